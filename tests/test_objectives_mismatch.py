"""Measures of the gap between engine and trainer, and corrections for it, against formulas written out token by token."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from r1mega.config.training import GrpoObjective, Mismatch
from r1mega.config.trust import Measure
from r1mega.objectives.grpo import policy_loss
from r1mega.objectives.mismatch import Gap, importance_weights, off_policy_sequences


def drawn(count: int = 5000, sequences: int = 40, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Trainer's and rollout's log-probs with gaps over many octaves, a mask, and owners."""
    generator = torch.Generator().manual_seed(seed)
    rollout = -3 * torch.rand(count, generator=generator)
    d = torch.randn(count, generator=generator) * 2.0 ** torch.randint(-20, 1, (count,), generator=generator)
    mask = torch.rand(count, generator=generator) < 0.8
    owners = torch.randint(0, sequences - 1, (count,), generator=generator)  # the last sequence has no token
    return rollout + d, rollout, mask, owners


# ---------------------------------------------------------------- measures


def test_measures_are_those_of_the_formulas() -> None:
    trainer, rollout, mask, owners = drawn()
    found = Gap.of(trainer, rollout, mask, owners, 40).measures()
    d = (trainer - rollout)[mask].double().numpy()
    sums = [d[owners[mask].numpy() == owner].sum() for owner in range(39)]
    expected = {
        "rollout_gap/mean": np.abs(d).mean(),
        "rollout_gap/max": np.abs(d).max(),
        "rollout_ratio/mean": np.exp(d).mean(),
        "rollout_ratio/min": np.exp(d.min()),
        "rollout_ratio/max": np.exp(d.max()),
        "rollout_kl/k1": -d.mean(),
        "rollout_kl/k3": (np.exp(d) - 1 - d).mean(),
        "rollout_sequence/mean": np.mean(sums),
        "rollout_sequence/min": min(sums),
        "rollout_sequence/max": max(sums),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-12)
    for name, share in (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999)):
        true = np.sort(np.abs(d))[math.ceil(share * len(d)) - 1]
        assert true <= found[f"rollout_gap/{name}"] <= true * 1.022
    assert set(get_args(Measure)) - {"probe_gap/after_max"} <= set(found)


def test_the_kl_estimates_are_those_of_the_rollout_from_the_trainer() -> None:
    """In expectation over what the rollout draws, both are sum_v p log(p / q)."""
    p, q = torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.4, 0.2]], dtype=torch.float64)
    counts = (p * 1000).round().long()
    tokens = torch.arange(3).repeat_interleave(counts)
    rows = torch.ones(len(tokens), dtype=torch.bool), torch.zeros(len(tokens), dtype=torch.int64)
    found = Gap.of(q.log()[tokens], p.log()[tokens], *rows, 1).measures()
    exact = (p * (p / q).log()).sum().item()
    assert found["rollout_kl/k1"] == pytest.approx(exact, rel=1e-12)
    assert found["rollout_kl/k3"] == pytest.approx(exact, rel=1e-12)
    assert found["rollout_ratio/mean"] == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("parts", [2, 7])
def test_cut_into_micro_batches_the_gap_is_the_same(parts: int) -> None:
    trainer, rollout, mask, owners = drawn()
    whole = Gap.of(trainer, rollout, mask, owners, 40)
    cut = Gap.nothing(40)
    for piece in torch.arange(len(trainer)).tensor_split(parts):
        cut += Gap.of(trainer[piece], rollout[piece], mask[piece], owners[piece], 40)
    assert cut.measures() == pytest.approx(whole.measures(), rel=1e-12)
    torch.testing.assert_close(cut.sequences, whole.sequences, rtol=1e-12, atol=1e-12)


def test_updates_joined_keep_their_sequences_apart() -> None:
    first, second = drawn(500, 4, seed=1), drawn(700, 6, seed=2)
    joined = Gap.joined([Gap.of(*first, 4), Gap.of(*second, 6)])
    assert joined.sequences.shape == (10, 3)
    both = [torch.cat(pair) for pair in zip(first[:3], second[:3], strict=True)]
    together = Gap.of(both[0], both[1], both[2], torch.cat([first[3], second[3] + 4]), 10)
    assert joined.measures() == pytest.approx(together.measures(), rel=1e-12)


def test_no_gap_reads_zero_and_no_token_says_nothing() -> None:
    trainer, _, mask, owners = drawn(100)
    found = Gap.of(trainer, trainer, mask, owners, 40).measures()
    assert all(found[name] == 0 for name in found if not name.startswith("rollout_ratio"))
    assert found["rollout_ratio/min"] == found["rollout_ratio/max"] == 1
    assert Gap.of(trainer, trainer, torch.zeros_like(mask), owners, 40).measures() == {}


def test_a_log_prob_gone_astray_is_a_number() -> None:
    one = torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.int64)
    found = Gap.of(torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -2001.0]), *one, 1).measures()
    assert found["rollout_gap/max"] == found["rollout_gap/p99"] == 2000
    assert found["rollout_ratio/max"] > 1e300


# ---------------------------------------------------------------- corrections

RATIOS = [0.1, 0.5, 0.9, 1.0, 1.5, 2.0, 2.5, 40.0]


def test_truncated_importance_sampling() -> None:
    weights = importance_weights(torch.tensor(RATIOS).double().log(), Mismatch(weights="tis", cap=2.0))
    torch.testing.assert_close(weights, torch.tensor([min(r, 2.0) for r in RATIOS]).double())


def test_icepop_leaves_out_what_lies_outside() -> None:
    weights = importance_weights(torch.tensor(RATIOS).double().log(), Mismatch(weights="icepop", low=0.4, high=2.2))
    torch.testing.assert_close(weights, torch.tensor([r if 0.4 <= r <= 2.2 else 0.0 for r in RATIOS]).double())


def test_a_ratio_beyond_all_numbers_is_bounded() -> None:
    far = torch.tensor([200.0, -200.0])
    assert importance_weights(far, Mismatch(weights="tis")).tolist() == [2.0, 0.0]
    assert importance_weights(far, Mismatch(weights="icepop")).tolist() == [0.0, 0.0]
    assert importance_weights(far, Mismatch()).tolist() == [1.0, 1.0]


def test_the_sequence_mask_takes_bad_answers_that_drifted() -> None:
    """Sequences 0 to 3: bad and far, bad and near, good and far, bad and far the other way."""
    owners = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 0])
    log_ratio = torch.tensor([-0.5, -0.1, -0.1, -0.2, -3.0, -3.0, 3.0, 3.0, -99.0])
    advantages = torch.tensor([-1.0, -1.0, -1.0, -1.0, 2.0, 2.0, -1.0, -1.0, -1.0])
    mask = torch.tensor([True] * 8 + [False])
    assert off_policy_sequences(log_ratio, advantages, mask, owners, 4, 0.2).tolist() == [True, True] + [False] * 7
    assert not off_policy_sequences(log_ratio, advantages, mask, owners, 4, 0.31).any()  # the mean of 0.5 and 0.1 is 0.3
    # Cut over two ranks, each adds what the other has: here half of every sequence, twice.
    half = torch.tensor([0, 2, 4, 6])
    cut = off_policy_sequences(
        log_ratio[half], advantages[half], mask[half], owners[half], 4, 0.2, lambda rows: rows + torch.tensor([[-0.1, 1.0]] * 4)
    )
    assert cut.tolist() == [True, False, False, False]


def test_the_correction_weighs_the_surrogate_and_not_the_kl() -> None:
    """Gradients against the loss written out with autograd's own products."""
    generator = torch.Generator().manual_seed(3)
    old, ref, rollout, advantages = torch.randn(4, 64, generator=generator, dtype=torch.float64)
    mask = torch.rand(64, generator=generator) < 0.7
    objective = GrpoObjective(clip=0.2, kl_coef=0.1)
    for mismatch in (Mismatch(weights="tis", cap=1.3), Mismatch(weights="icepop", low=0.7, high=1.6)):
        weights = importance_weights(torch.where(mask, old - rollout, 0.0), mismatch)
        logprobs = (old + 0.1 * torch.randn(64, generator=generator, dtype=torch.float64)).requires_grad_()
        found = policy_loss(logprobs, old, ref, advantages, mask, objective, 0, weights)
        (gradient,) = torch.autograd.grad(found.loss.sum(), logprobs)
        expected = []
        for t in range(64):
            r, rho, a = math.exp(logprobs[t].item() - old[t]), math.exp(old[t] - rollout[t]), advantages[t].item()
            c = min(rho, 1.3) if mismatch.weights == "tis" else rho if 0.7 <= rho <= 1.6 else 0.0
            moves = r <= 1.2 if a > 0 else r >= 0.8
            d = (ref[t] - logprobs[t]).item()
            expected.append((-c * r * a * moves + 0.1 * (1 - math.exp(d))) * mask[t].item())
        torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)


def test_settings_that_say_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"low=3 is above high=2"):
        Mismatch(weights="icepop", low=3.0)
    with pytest.raises(ValueError, match="needs a correction"):
        Mismatch(when="over_budget")
