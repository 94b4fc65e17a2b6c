"""Group-relative policy optimisation as pure tensor functions. GRPO, Dr.GRPO and DAPO are settings of `GrpoObjective`.

Legend: N responses of one update, in groups of G; T packed tokens of one micro-batch, in any order.

The loss of an update is `sum_t w_t * l_t` over all micro-batches and data-parallel ranks, with `l_t` from `policy_loss` and `w_t` from
`token_weights`. The weights already hold every normaliser, so how the tokens are cut into micro-batches cannot change the gradient.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from r1mega.config.base import at
from r1mega.config.training import GrpoObjective


@dataclass(frozen=True)
class PolicyLoss:
    """Per-token terms of the objective, each [T]. Only `loss` carries a gradient."""

    loss: Tensor
    """l_t = -c_t min(r_t A_t, clip(r_t) A_t) + kl_coef * kl_t, before weighting; 0 outside the mask. c_t is the correction, or 1."""
    ratio: Tensor
    """r_t = pi(o_t) / pi_old(o_t); 1 outside the mask."""
    clipped: Tensor
    """bool, tokens whose policy gradient the clip removes."""
    kl: Tensor
    """Estimate of KL(pi || pi_ref) in nats; 0 outside the mask and without a reference."""


def group_advantages(rewards: Tensor, judged: Tensor | None, normalize_std: bool, eps: float = 1e-4) -> Tensor:
    """Advantages [groups, G] of rewards [groups, G]: (r - mean) / (std + eps) over each group (DeepSeekMath, arXiv 2402.03300, 4.1.2).

    The paper says "std" only; this is the unbiased one (divisor G - 1) plus `eps`, as in TRL 1.16, whose eps is 1e-4. Dr.GRPO
    (arXiv 2503.20783) leaves the division out: `normalize_std` false.
    `judged` [groups, G] bool marks the rewards that exist, None for all of them. The others take no part in mean and standard deviation,
    whatever they hold (NaN included), and get advantage 0; so does every response of a group with fewer than two judged.
    """
    judged = torch.ones_like(rewards, dtype=torch.bool) if judged is None else judged
    count = judged.sum(dim=1, keepdim=True)
    # In float64 the mean of equal float32 rewards is exact. In float32 its rounding error, divided by eps, is an advantage of 1e-3.
    known = rewards.double().masked_fill(~judged, 0.0)
    advantages = (known - known.sum(dim=1, keepdim=True) / count.clamp(min=1)).masked_fill(~judged, 0.0)
    if normalize_std:
        variance = advantages.square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)
        advantages = advantages / (variance.sqrt() + eps)
    return advantages.to(rewards.dtype)


def uniform_groups(rewards: Tensor, judged: Tensor | None = None) -> Tensor:
    """Bool [groups]: groups without a policy gradient, whose judged rewards [groups, G] are all equal (or fewer than two)."""
    judged = torch.ones_like(rewards, dtype=torch.bool) if judged is None else judged
    highest = rewards.masked_fill(~judged, -torch.inf).amax(dim=1)
    lowest = rewards.masked_fill(~judged, torch.inf).amin(dim=1)
    return highest <= lowest


def token_weights(lengths: Tensor, truncated: Tensor, in_uniform_group: Tensor, objective: GrpoObjective) -> Tensor:
    """Weight [N] float32 that each token of response i carries in the loss of an update; 0 for responses that are left out.

    `lengths` [N] int, response tokens, the stop token included; `truncated` [N] bool, cut at the length cap; `in_uniform_group` [N] bool,
    see `uniform_groups`. One call for all N responses of the update, those of all data-parallel ranks. With n responses of |o_i| tokens:

    - "sequence" (GRPO): 1 / (n |o_i|)
    - "token" (DAPO, arXiv 2503.14476, Eq. 8): 1 / sum_j |o_j|
    - "constant" (Dr.GRPO, arXiv 2503.20783): 1 / (n `constant_length`)

    With mask_truncated, a truncated response still counts in n (a zero in the mean) while its tokens leave the token sum, as in TRL 1.16.
    With drop_uniform_groups, a uniform group was never in the batch (DAPO's dynamic sampling): it counts in neither.
    """
    in_batch = ~in_uniform_group if objective.drop_uniform_groups else torch.ones_like(truncated)
    trained = in_batch & ~truncated if objective.mask_truncated else in_batch
    responses = in_batch.sum().clamp(min=1)
    if objective.aggregation == "token":
        divisor = (lengths * trained).sum().expand_as(lengths)
    elif objective.aggregation == "sequence":
        divisor = responses * lengths
    else:
        assert objective.constant_length is not None, "the schema requires constant_length"
        divisor = (responses * objective.constant_length).expand_as(lengths)
    return torch.where(trained, 1.0 / divisor.clamp(min=1).float(), 0.0)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: Literal["k1", "k2", "k3"]) -> Tensor:
    """Per-token estimate [T] of KL(pi || pi_ref) for tokens drawn from pi (Schulman, "Approximating KL divergence", 2020).

    With d = log pi_ref - log pi: k1 = -d (unbiased, can be negative), k2 = d^2 / 2 (biased, low variance), and k3 = exp(d) - d - 1
    (unbiased, never negative).

    Inside a loss the gradient matters, not the value. Differentiated at fixed samples drawn from pi, k1 has expected gradient 0;
    k2 has that of KL(pi || pi_ref); k3, which DeepSeek-R1 uses, has that of KL(pi_ref || pi), the same near pi = pi_ref only.
    """
    d = ref_logprobs - logprobs
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return 0.5 * d.square()
    return torch.expm1(d) - d  # not exp(d) - 1: d is near 0 for most tokens and the difference would cancel


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    objective: GrpoObjective,
    update: int = 0,
    correction: Tensor | None = None,
) -> PolicyLoss:
    """The clipped surrogate plus a KL to the reference, per token (arXiv 2402.03300, Eq. 3; DeepSeek-R1, arXiv 2501.12948, Eq. 1).

    All tensors are [T] and floating; log-probabilities, in nats, of the sampled tokens. `old_logprobs` are those of the policy that the
    rollout was drawn from; None stands for `logprobs` themselves, right for the first update after a rollout (the ratio is 1, its gradient
    that of log pi). `ref_logprobs` may be None only with kl_coef 0. `mask` [T] bool: tokens that are trained on. Elsewhere (prompt,
    padding) the other tensors may hold any finite value: loss and gradient are exactly 0 there. What `objective` says as a schedule
    is taken at `update`. `correction` [T] are factors of the surrogate, without gradient (`objectives.mismatch`); the KL has none.
    """
    kl_coef = at(objective.kl_coef, update)
    if ref_logprobs is None and kl_coef > 0:
        raise ValueError(f"kl_coef={kl_coef:g} needs ref_logprobs")
    # Masked before exp, not after: a placeholder log-prob of 0 can overflow exp, and 0 * inf is NaN.
    log_ratio = torch.where(mask, logprobs - (logprobs.detach() if old_logprobs is None else old_logprobs), 0.0)
    advantages = torch.where(mask, advantages, 0.0)
    low = at(objective.clip, update)
    high = low if objective.clip_high is None else at(objective.clip_high, update)
    ratio = log_ratio.exp()
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    if correction is not None:
        loss = torch.where(mask, correction, 0.0) * loss
    kl = torch.zeros_like(loss)
    if ref_logprobs is not None:
        kl = kl_estimate(torch.where(mask, logprobs, 0.0), torch.where(mask, ref_logprobs, 0.0), objective.kl_estimator)
        if kl_coef > 0:
            loss = loss + kl_coef * kl
    ratio = ratio.detach()
    clipped = ((advantages > 0) & (ratio > 1 + high)) | ((advantages < 0) & (ratio < 1 - low))
    return PolicyLoss(loss=loss, ratio=ratio, clipped=clipped, kl=kl.detach())
