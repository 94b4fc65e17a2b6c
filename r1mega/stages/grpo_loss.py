"""The GRPO objective on the micro-batches of an update, and what is worth knowing about it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from r1mega.config.training import GrpoObjective
from r1mega.megatron.policy import LocalBatch, TokenLoss
from r1mega.objectives.grpo import policy_loss
from r1mega.objectives.mismatch import importance_weights, off_policy_sequences


@dataclass(frozen=True)
class GrpoLoss:
    """What `Policy.step` calls on each micro-batch."""

    objective: GrpoObjective
    update: int
    corrects: bool
    """Whether objective.mismatch corrects the loss."""
    sequences: int
    """Of the update."""
    add_up: Callable[[Tensor], Tensor]
    """Sums over the ranks that sequences are cut over."""

    def __call__(self, logprobs: Tensor, entropies: Tensor, batch: LocalBatch) -> TokenLoss:
        mask, extras = batch.mask, batch.extras
        # Where they were not asked for before, the weights have not moved since the rollout.
        old = extras.setdefault("old_logprobs", logprobs.detach())
        correction, sums = self._correction(logprobs.detach(), batch)
        ref, advantages = extras.get("ref_logprobs"), extras["advantages"]
        terms = policy_loss(logprobs, old, ref, advantages, mask, self.objective, self.update, correction)
        return TokenLoss(
            loss=terms.loss,
            sums=sums
            | {
                "tokens": mask.sum(),
                "kl": terms.kl.sum(),
                "clip_fraction": terms.clipped.sum(),
                "entropy": (entropies * mask).sum(),
            },
            peaks={"ratio": torch.where(mask, terms.ratio, 1.0).max()},
        )

    def _correction(self, logprobs: Tensor, batch: LocalBatch) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Factors [T] of the policy's loss, None for all 1; and what they did."""
        mismatch = self.objective.mismatch
        if not self.corrects:
            return None, {}
        mask, extras = batch.mask, batch.extras
        log_ratio = torch.where(mask, extras["old_logprobs"] - extras["rollout_logprobs"], 0.0)
        weights = importance_weights(log_ratio, mismatch)
        found = {"correction/weight": weights[mask].sum(), "correction/bounded": (weights != log_ratio.exp())[mask].sum()}
        if mismatch.sequence_mask is None:
            return weights, found
        left_out = off_policy_sequences(
            torch.where(mask, logprobs - extras["rollout_logprobs"], 0.0),
            extras["advantages"],
            mask,
            extras["sequence"],
            self.sequences,
            mismatch.sequence_mask,
            self.add_up,
        )
        return weights.masked_fill(left_out, 0.0), found | {"correction/left_out": left_out.sum()}


def loss_metrics(sums: dict[str, float], peaks: dict[str, float]) -> dict[str, float]:
    """A step's sums as means over its tokens, and its peaks, under the names that rows have."""
    tokens = max(sums["tokens"], 1.0)
    means = {name: value / tokens for name, value in sums.items() if name not in ("tokens", "loss", "mtp_loss")}
    return means | {"tokens": sums["tokens"]} | {f"{name}/max": value for name, value in peaks.items()}
