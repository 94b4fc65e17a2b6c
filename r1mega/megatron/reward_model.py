"""Reward models: one score for a whole sequence, read off the hidden state of its last token.

A reward model is trained as a `Policy` whose architecture has a score for a head (`scores`, `step`). In reinforcement learning it has
no model of its own: it is scored on the policy's, into which its shards are swapped (`RewardModel`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from r1mega.data.packing import TokenSequence
from r1mega.data.preferences import View
from r1mega.megatron.policy import LocalBatch, NotFinite, Policy, StepResult, TokenLoss
from r1mega.weights.architecture import read_config, reward_architecture
from r1mega.weights.boxes import Box
from r1mega.weights.canonical import canonical
from r1mega.weights.moving import load_local
from r1mega.weights.safetensors_in import Reader

_SCORE = "score.weight"


def as_sequences(ids: Sequence[Sequence[int] | Tensor]) -> list[TokenSequence]:
    """Token ids as `Policy.microbatches` takes them. None may be empty: it would have no last token."""
    return [TokenSequence(torch.as_tensor(tokens, dtype=torch.int64), torch.zeros(len(tokens))) for tokens in ids]


def initialize(policy: Policy, reader: Reader, std: float, seed: int) -> None:
    """Fill a reward model from a language model's folder; its score is drawn from a normal distribution, the same under every layout."""
    draw = policy.exchange.fresh(std, seed)
    policy.exchange.load(lambda name, box: draw(name, box) if name == _SCORE else reader.read(name, box))


@torch.no_grad()
def scores(policy: Policy, batches: Sequence[LocalBatch], count: int, projection: Tensor | None = None) -> Tensor:
    """The scores of the `count` sequences that `Policy.microbatches` packed; every rank calls it.

    Args:
        projection: [1, hidden], stands for the score of a model that has none.

    Returns:
        float32 [count], on every rank's host.
    """
    found = torch.zeros(count, device=policy.device)
    counts = parallel_state.get_tensor_model_parallel_rank() == 0

    def collect(hidden: Tensor, batch: LocalBatch) -> tuple[Tensor, dict[str, Any]]:
        values, which = _ending(policy, policy.trunk(hidden), batch, projection)
        if counts:
            found[which] = values
        return hidden.new_zeros(()), {}

    policy.run(batches, collect, forward_only=True)
    dist.all_reduce(found)
    return found.cpu()


def step(
    policy: Policy, batches: Sequence[LocalBatch], count: int, objective: Callable[[Tensor], Tensor], lr: float
) -> tuple[StepResult, Tensor]:
    """One optimizer step of a reward model down an objective, a scalar made of the scores [count] of all sequences.

    The gradient takes two passes: the scores, then the gradient of their sum weighed by d loss / d score. For one more forward pass a
    loss may compare any sequences, however they were packed and dealt out to ranks.

    Returns:
        The step, and float32 [count], the scores before it.

    Raises:
        NotFinite: loss or gradient norm is not finite; parameters, router biases and optimizer are as they were.
    """
    before = scores(policy, batches, count).requires_grad_()
    loss = objective(before)
    if not math.isfinite(loss.item()):
        raise NotFinite(f"the loss is {loss.item()}")
    (slopes,) = torch.autograd.grad(loss, before)
    slopes = slopes.to(policy.device)

    def weighed(hidden: Tensor, batch: LocalBatch) -> tuple[Tensor, TokenLoss]:
        values, which = _ending(policy, hidden, batch, None)
        total = (slopes[which] * values).sum()
        return total, TokenLoss(total, {"loss": total})

    return replace(policy.descend(batches, weighed, lr), loss=loss.item()), before.detach()


def _ending(policy: Policy, hidden: Tensor, batch: LocalBatch, projection: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of the sequences whose last tokens are in this rank's share: float32 [n] scores, and int64 [n] which sequences they are."""
    if policy.layout.tp > 1:
        # Every tensor-parallel rank makes the same scores, so that each takes its own rows of the gradient, with nothing to add up.
        group = parallel_state.get_tensor_model_parallel_group()
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False, group=group)
    weight = policy.chunks[-1].score.weight if projection is None else projection
    rows = (batch.ends >= 0).nonzero()[:, 0]
    return (hidden.squeeze(1).index_select(0, rows).float() @ weight.float().t())[:, 0], batch.ends[rows]


class RewardModel:
    """A trained reward model that scores through the policy's model. Its shards wait on the host, like the reference's."""

    def __init__(self, policy: Policy, folder: Path) -> None:
        """Read this rank's shards of the reward model in a Hugging Face folder.

        Raises:
            UserError: the folder is no reward model, or not one of the policy's shapes.
        """
        arch = reward_architecture(folder, policy.arch)
        shared = {tensor.name for tensor in canonical(arch)}
        placed = [local for local in policy.exchange.placed if local.pieces and all(piece.tensor in shared for piece in local.pieces)]
        held = {(local.chunk, local.name): policy.weights[local.chunk, local.name] for local in placed}
        host = {key: torch.empty_like(weight, device="cpu", requires_grad=False) for key, weight in held.items()}
        with Reader(folder) as reader:
            reader.check(canonical(arch))
            load_local(host, placed, reader.read)
            projection = reader.read(_SCORE, Box.whole((1, arch.hidden)))
        self.view = View.of(read_config(folder))
        """What it is to be shown of an answer."""
        self.longest = min(policy.train.chunk_tokens, arch.max_positions)
        """Most tokens of a sequence."""
        self._policy = policy
        self._shards = [host.get(key) for key in policy.weights]
        self._projection = projection.to(policy.device)

    def scores(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Score token sequences, none of them empty; every rank calls it with the same list.

        Returns:
            float32 [len(sequences)], on every rank's host.

        Raises:
            UserError: a sequence is longer than `train.chunk_tokens`.
        """
        if not sequences:
            return torch.zeros(0)
        batches = self._policy.microbatches(as_sequences(sequences))
        with self._policy.holding(self._shards):
            return scores(self._policy, batches, len(sequences), self._projection)
