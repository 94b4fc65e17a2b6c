"""The GRPO objective against hand-computed values, finite differences, and exact expectations."""

import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from r1mega.config.training import GrpoObjective
from r1mega.objectives.grpo import PolicyLoss, group_advantages, kl_estimate, policy_loss, token_weights, uniform_groups

GRPO = GrpoObjective()
DAPO = GrpoObjective(
    clip=0.2, clip_high=0.28, kl_coef=0.0, aggregation="token", normalize_std=True, mask_truncated=True, drop_uniform_groups=True
)
DR_GRPO = GrpoObjective(clip=0.2, kl_coef=0.0, aggregation="constant", constant_length=8, normalize_std=False)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def loss_of(ratio: list[float], advantages: list[float], objective: GrpoObjective) -> PolicyLoss:
    logprobs = f64(*ratio).log()
    return policy_loss(logprobs, torch.zeros_like(logprobs), None, f64(*advantages), torch.ones_like(logprobs, dtype=torch.bool), objective)


# ---------------------------------------------------------------- advantages


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]], dtype=torch.float64)
    # Group 1: mean 1/4, unbiased variance (9/16 + 3/16) / 3 = 1/4.
    expected = torch.tensor([[0.75, -0.25, -0.25, -0.25], [0, 0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(group_advantages(rewards, None, normalize_std=False), expected, rtol=0, atol=1e-15)
    torch.testing.assert_close(group_advantages(rewards, None, normalize_std=True), expected / 0.5001, rtol=1e-14, atol=0)
    torch.testing.assert_close(group_advantages(rewards, None, normalize_std=True, eps=0.5), expected, rtol=1e-14, atol=0)


def test_unjudged_samples_take_no_part() -> None:
    rewards = torch.tensor([[1.0, 0.0, math.nan, 5.0], [1.0, math.nan, math.nan, math.nan], [math.nan] * 4])
    judged = torch.tensor([[True, True, False, False], [True, False, False, False], [False] * 4])
    advantages = group_advantages(rewards, judged, normalize_std=True)
    scaled = 0.5 / (math.sqrt(0.5) + 1e-4)
    torch.testing.assert_close(advantages, torch.tensor([[scaled, -scaled, 0, 0], [0.0] * 4, [0.0] * 4]))
    assert uniform_groups(rewards, judged).tolist() == [False, True, True]


@pytest.mark.parametrize("reward", [0.1, 1.1, 1 / 3])
def test_equal_rewards_give_exactly_zero(reward: float) -> None:
    rewards = torch.full((3, 16), reward)
    assert (group_advantages(rewards, None, normalize_std=True) == 0).all()
    assert uniform_groups(rewards).all()


# ---------------------------------------------------------------- the clipped surrogate


def test_clip_by_hand() -> None:
    """Symmetric 0.2: the clip bites only where it lowers the objective; elsewhere the ratio passes."""
    out = loss_of([1.5, 0.5, 1.5, 0.5, 1.1], [2.0, 2.0, -2.0, -2.0, 2.0], GrpoObjective(clip=0.2, kl_coef=0))
    torch.testing.assert_close(out.loss, f64(-2.4, -1.0, 3.0, 1.6, -2.2))
    assert out.clipped.tolist() == [True, False, False, True, False]
    torch.testing.assert_close(out.ratio, f64(1.5, 0.5, 1.5, 0.5, 1.1))


def test_separate_bounds() -> None:
    out = loss_of([1.25, 1.25, 0.75, 1.5], [1.0, 1.0, -1.0, 1.0], DAPO)
    torch.testing.assert_close(out.loss, f64(-1.25, -1.25, 0.8, -1.28))
    assert out.clipped.tolist() == [False, False, True, True]
    assert loss_of([1.25], [1.0], GrpoObjective(clip=0.2, kl_coef=0)).loss.item() == pytest.approx(-1.2)


def test_clip_of_ten_bounds_only_good_tokens_from_above() -> None:
    out = loss_of([20.0, 10.9, 1e-6, 20.0, 1e-6], [1.0, 1.0, 1.0, -1.0, -1.0], GrpoObjective(clip=10, kl_coef=0))
    torch.testing.assert_close(out.loss, f64(-11.0, -10.9, -1e-6, 20.0, 1e-6))
    assert out.clipped.tolist() == [True, False, False, False, False]


@pytest.mark.parametrize("clip", [0.2, 10.0])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradient_by_finite_differences(clip: float, estimator: Literal["k1", "k2", "k3"]) -> None:
    """Tokens on both sides of both bounds, none at a kink; what `clipped` marks has no policy gradient."""
    objective = GrpoObjective(clip=clip, kl_coef=0.3, kl_estimator=estimator)
    ratio = f64(1.0, 0.5, 1.7, 1.1, 30.0, 0.01, 1.7, 0.9)
    advantages = f64(1.0, 1.0, 1.0, -2.0, 1.5, -1.5, -0.5, 0.0)
    old = f64(-1.0, -2.0, -0.5, -3.0, -4.0, -0.1, -1.5, -2.5)
    reference = old + f64(0.1, -0.4, 0.0, 0.7, 2.0, -1.0, 0.3, -0.2)
    weights = f64(0.5, 0.1, 0.2, 0.3, 0.4, 0.7, 0.9, 0.6)
    mask = torch.ones(8, dtype=torch.bool)

    def weighted(logprobs: Tensor) -> Tensor:
        return (policy_loss(logprobs, old, reference, advantages, mask, objective).loss * weights).sum()

    logprobs = (old + ratio.log()).requires_grad_()
    assert torch.autograd.gradcheck(weighted, (logprobs,), eps=1e-6, atol=1e-7)

    free = objective.model_copy(update={"kl_coef": 0.0})
    out = policy_loss(logprobs, old, None, advantages, mask, free)
    (gradient,) = torch.autograd.grad(out.loss.sum(), logprobs)
    torch.testing.assert_close(gradient, torch.where(out.clipped, 0.0, -ratio * advantages))
    assert out.clipped.tolist() == [False, False, clip < 1, False, True, clip < 1, False, False]


def test_no_old_logprobs_means_the_policy_gradient() -> None:
    logprobs = f64(-1.0, -2.0, -3.0).requires_grad_()
    advantages = f64(1.0, -2.0, 0.5)
    out = policy_loss(logprobs, None, None, advantages, torch.ones(3, dtype=torch.bool), DR_GRPO)
    torch.testing.assert_close(out.loss, -advantages)
    assert out.ratio.tolist() == [1, 1, 1] and not out.clipped.any()
    torch.testing.assert_close(torch.autograd.grad(out.loss.sum(), logprobs)[0], -advantages)


def test_only_the_loss_carries_a_gradient() -> None:
    logprobs = torch.randn(4).requires_grad_()
    out = policy_loss(logprobs, None, torch.randn(4), torch.ones(4), torch.ones(4, dtype=torch.bool), GRPO)
    assert out.loss.requires_grad and not (out.ratio.requires_grad or out.kl.requires_grad or out.clipped.requires_grad)


def test_masked_positions_cannot_overflow() -> None:
    """Where a log-prob is -200 and its placeholders are 0, exp(200) would be inf in float32, and inf x 0 NaN."""
    mask = torch.tensor([True, False, False])
    logprobs = torch.tensor([-1.0, -200.0, -1.0]).requires_grad_()
    old, reference = torch.tensor([-1.0, 0.0, 150.0]), torch.tensor([-1.0, 0.0, 150.0])
    out = policy_loss(logprobs, old, reference, torch.tensor([1.0, 0.0, 3.0]), mask, GRPO)
    (gradient,) = torch.autograd.grad((out.loss * mask).sum(), logprobs)
    assert out.loss.tolist() == [-1, 0, 0] and out.ratio.tolist() == [1, 1, 1] and out.kl.tolist() == [0, 0, 0]
    assert gradient.tolist() == [-1, 0, 0]


def test_kl_needs_a_reference() -> None:
    with pytest.raises(ValueError, match="ref_logprobs"):
        policy_loss(torch.zeros(1), None, None, torch.zeros(1), torch.ones(1, dtype=torch.bool), GRPO)


# ---------------------------------------------------------------- KL estimators


def test_kl_by_hand() -> None:
    logprobs, reference = f64(math.log(0.5), math.log(0.2)), f64(math.log(0.25), math.log(0.4))
    torch.testing.assert_close(kl_estimate(logprobs, reference, "k1"), f64(math.log(2), -math.log(2)))
    torch.testing.assert_close(kl_estimate(logprobs, reference, "k2"), f64(math.log(2) ** 2 / 2, math.log(2) ** 2 / 2))
    torch.testing.assert_close(kl_estimate(logprobs, reference, "k3"), f64(0.5 + math.log(2) - 1, 2 - math.log(2) - 1))


def test_k3_keeps_its_digits_near_zero() -> None:
    d = 1e-3
    value = kl_estimate(torch.tensor([0.0]), torch.tensor([d]), "k3").item()
    assert value == pytest.approx(math.expm1(d) - d, rel=2e-4)
    assert (kl_estimate(torch.zeros(100), torch.linspace(-1e-4, 1e-4, 100), "k3") >= 0).all()


def test_kl_values_and_gradients_in_expectation() -> None:
    """Over a whole categorical: k1 and k3 have the KL's value, and each estimator the gradient its docstring claims."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, generator=generator, dtype=torch.float64).requires_grad_()
    reference = torch.randn(7, generator=generator, dtype=torch.float64).log_softmax(0)
    logprobs = logits.log_softmax(0)
    p = logprobs.exp().detach()
    forward = (logprobs.exp() * (logprobs - reference)).sum()
    reverse = (reference.exp() * (reference - logprobs)).sum()

    def gradient(value: Tensor) -> Tensor:
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    estimators: tuple[Literal["k1", "k2", "k3"], ...] = ("k1", "k2", "k3")
    expected = {name: (p * kl_estimate(logprobs, reference, name)).sum() for name in estimators}
    torch.testing.assert_close(expected["k1"], forward)
    torch.testing.assert_close(expected["k3"], forward)
    assert abs(expected["k2"].item() - forward.item()) > 1e-2
    torch.testing.assert_close(gradient(expected["k1"]), torch.zeros(7, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(gradient(expected["k2"]), gradient(forward))
    torch.testing.assert_close(gradient(expected["k3"]), gradient(reverse))


# ---------------------------------------------------------------- weights

LENGTHS = torch.tensor([2, 4, 8, 6])
TRUNCATED = torch.tensor([False, False, True, False])
UNIFORM = torch.tensor([True, True, False, False])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"aggregation": "sequence"}, [1 / 8, 1 / 16, 1 / 32, 1 / 24]),
        ({"aggregation": "token"}, [1 / 20] * 4),
        ({"aggregation": "constant", "constant_length": 8}, [1 / 32] * 4),
        ({"aggregation": "sequence", "mask_truncated": True}, [1 / 8, 1 / 16, 0, 1 / 24]),
        ({"aggregation": "token", "mask_truncated": True}, [1 / 12, 1 / 12, 0, 1 / 12]),
        ({"aggregation": "constant", "constant_length": 8, "mask_truncated": True}, [1 / 32, 1 / 32, 0, 1 / 32]),
        ({"aggregation": "sequence", "drop_uniform_groups": True}, [0, 0, 1 / 16, 1 / 12]),
        ({"aggregation": "token", "drop_uniform_groups": True}, [0, 0, 1 / 14, 1 / 14]),
        ({"aggregation": "constant", "constant_length": 8, "drop_uniform_groups": True}, [0, 0, 1 / 16, 1 / 16]),
        ({"aggregation": "token", "drop_uniform_groups": True, "mask_truncated": True}, [0, 0, 0, 1 / 6]),
    ],
)
def test_weights_by_hand(settings: dict[str, Any], expected: list[float]) -> None:
    weights = token_weights(LENGTHS, TRUNCATED, UNIFORM, GrpoObjective(**settings))
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float32), rtol=1e-7, atol=0)


def test_nothing_to_train_on_is_weight_zero() -> None:
    everything = torch.ones(4, dtype=torch.bool)
    for objective in (DAPO, GrpoObjective(mask_truncated=True), GrpoObjective(drop_uniform_groups=True)):
        assert token_weights(LENGTHS, everything, everything, objective).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("objective", [GRPO, DAPO, DR_GRPO], ids=["grpo", "dapo", "dr_grpo"])
def test_update_loss_equals_the_published_formula(objective: GrpoObjective) -> None:
    """The flat weighted sum, cut into two micro-batches, against each paper's formula written as loops over responses and tokens."""
    generator = torch.Generator().manual_seed(1)
    lengths = [3, 8, 1, 5, 2, 4]
    rewards = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    truncated = torch.tensor([n == 8 for n in lengths])
    uniform = uniform_groups(rewards).repeat_interleave(3)
    advantage = group_advantages(rewards, None, objective.normalize_std).flatten()
    sample = [[torch.randn(n, generator=generator) * 0.5 for n in lengths] for _ in range(3)]
    new, old, reference = sample
    flat_new, flat_old, flat_reference = (torch.cat(values) for values in sample)

    per_token = torch.tensor(lengths)
    weights = token_weights(per_token, truncated, uniform, objective).repeat_interleave(per_token)
    advantages = advantage.repeat_interleave(per_token)
    loss = 0.0
    for cut in (slice(0, 7), slice(7, None)):
        out = policy_loss(flat_new[cut], flat_old[cut], flat_reference[cut], advantages[cut], weights[cut] > 0, objective)
        loss += float((out.loss * weights[cut]).sum())

    def token(i: int, t: int) -> float:
        ratio, a = math.exp(new[i][t] - old[i][t]), float(advantage[i])
        high = objective.clip_high or objective.clip
        d = float(reference[i][t] - new[i][t])
        return min(ratio * a, min(max(ratio, 1 - objective.clip), 1 + high) * a) - objective.kl_coef * (math.exp(d) - d - 1)

    if objective is GRPO:
        published = sum(sum(token(i, t) for t in range(n)) / n for i, n in enumerate(lengths)) / 6
    elif objective is DR_GRPO:
        published = sum(token(i, t) for i, n in enumerate(lengths) for t in range(n)) / (6 * 8)
    else:  # group 2 is uniform, response 1 truncated
        published = sum(token(i, t) for i in (0, 2) for t in range(lengths[i])) / (lengths[0] + lengths[2])
    assert loss == pytest.approx(-published, rel=1e-5)
