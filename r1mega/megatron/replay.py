"""Routing replay (R3, arXiv 2510.11370): the experts that a rollout engine chose, used again by the trainer's routers.

Only the selection is replayed. What the chosen experts weigh is made of the trainer's own logits, as always: for DeepSeek-V3
g_i = 2.5 sigmoid(s_i) / sum_j sigmoid(s_j) over the chosen, to which expert bias and groups contribute nothing. So gradients reach the
router's weights through the experts that the engine took.

Megatron-Core's routers ask a `RouterReplay` for the selection. Its own is handed a target per router, and a first-in-first-out list for
recomputation that must be switched to between a forward and a backward pass: with several micro-batches under way, or with several model
chunks on a rank, it says nothing about which one a router is at. Here the selection travels with the micro-batch, among the packing that
every layer is handed, when it is computed as when it is computed again; and it may be missing for single tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor, nn

from r1mega.data.packing import ROUTED, ROUTING
from r1mega.weights.architecture import Architecture


@dataclass(frozen=True)
class Routing:
    """The engine's selection for one micro-batch as this rank sees it: the tokens its routers see, the sparse layers it holds."""

    experts: Tensor
    """integers [tokens, layers, top_k], in any order."""
    routed: Tensor
    """bool [tokens]: whose experts are known. The others (padding, the last token of a sequence) go where the trainer sends them."""
    differs: Tensor
    """bool [tokens, layers]: where the trainer would have chosen other experts. Written by the routers."""


@dataclass
class RoutedPacking(PackedSeqParams):
    """What every layer is handed with a micro-batch."""

    routing: Routing | None = None
    """None: routers choose."""


class Replay:
    """The routers of this rank's model chunks. Those of MTP layers, of which engines tell nothing, are left alone."""

    def __init__(self, chunks: Sequence[Any], arch: Architecture) -> None:
        self._sparse_layers = arch.layers - arch.moe.first_dense_layers if arch.moe else 0
        self._layers: list[int] = []
        for layer in (layer for chunk in chunks for layer in chunk.decoder.layers):
            if isinstance(layer.mlp, MoELayer):
                assert arch.moe is not None
                layer.mlp.router.router_replay = choice = _Choice(len(self._layers))
                layer.register_forward_pre_hook(choice.look, with_kwargs=True)
                # Layers are numbered from 1, over all pipeline stages and their chunks.
                self._layers.append(layer.layer_number - 1 - arch.moe.first_dense_layers)

    def share(self, extras: Mapping[str, Tensor], share: Callable[[Tensor], Tensor]) -> Routing | None:
        """This rank's part of a packed micro-batch's selection. `share` cuts for context parallelism and moves to the device."""
        if ROUTING not in extras:
            return None
        rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
        # Layers first: what other pipeline stages hold need not be moved. Under sequence parallelism a router sees consecutive tokens.
        experts = share(extras[ROUTING][:, self._layers]).chunk(size)[rank]
        routed = share(extras[ROUTED]).chunk(size)[rank]
        return Routing(experts, routed, torch.zeros(experts.shape[:2], dtype=torch.bool, device=experts.device))

    def disagreement(self, routings: Sequence[Routing]) -> dict[str, float]:
        """How often the trainer's routers would have chosen other experts than the engine's, in the last pass with replay.

        `tokens` is the share of the tokens for which any router would have, `routers` that of all pairs of a token and a router.
        Every rank calls it with the micro-batches of its data-parallel share.
        """
        counts = torch.cat([routing.differs.sum(1, dtype=torch.int32) for routing in routings])
        dist.all_reduce(counts, group=parallel_state.get_pipeline_model_parallel_group())
        routed = sum(int(routing.routed.sum()) for routing in routings)
        counted = [int((counts > 0).sum()), int(counts.sum()), routed]
        # Pipeline stages have the same tokens: only the last one's count.
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        totals = torch.tensor(counted if last else [0, 0, 0], dtype=torch.int64, device=counts.device)
        dist.all_reduce(totals)
        tokens, routers, routed = totals.tolist()
        return {"tokens": tokens / max(routed, 1), "routers": routers / max(routed * self._sparse_layers, 1)}


class _Choice:
    """Which experts one router takes: stands where Megatron-Core keeps a `RouterReplay`."""

    def __init__(self, column: int) -> None:
        self._column = column
        self._routing: Routing | None = None

    def look(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the router's layer runs, for the first time or again: whose tokens it is about to see."""
        self._routing = kwargs["packed_seq_params"].routing

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Values of the scores [tokens, experts] and indices [tokens, topk] of the chosen experts."""
        values, own = default_compute_topk(scores, topk, num_groups, group_topk)
        routing = self._routing
        if routing is None:
            return values, own
        given = routing.experts[:, self._column].long()
        differs = routing.routed & (given.sort(1).values != own.sort(1).values).any(1)
        routing.differs[:, self._column] = differs
        # Where the same experts are meant their order stays the router's, and with it every bit of the sum of their scores.
        chosen = torch.where(differs[:, None], given, own)
        return scores.gather(1, chosen), chosen
