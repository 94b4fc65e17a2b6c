"""Canonical tensors into this rank's shards and back, for whatever layout is connected."""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from functools import cached_property, lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from r1mega.config.engine_layout import EngineLayout
from r1mega.config.layout import Layout
from r1mega.errors import UserError
from r1mega.megatron import model, platform
from r1mega.megatron.gathering import gathered
from r1mega.weights.architecture import Architecture
from r1mega.weights.canonical import canonical
from r1mega.weights.direct import direct_plan
from r1mega.weights.moving import Read, assemble, gather_local, load_local
from r1mega.weights.placement import LocalParam, Spelling, placement
from r1mega.weights.plan import ExportPlan, export_plan
from r1mega.weights.shipping import parcel
from r1mega.weights.source import Filled, Parcels, Room
from r1mega.weights.sync import Bucket, full_plan
from r1mega.weights.wire import Wire


class Exchange:
    """The weights of one rank and their place in the canonical coordinates. A `WeightSource`."""

    def __init__(self, arch: Architecture, layout: Layout, weights: Mapping[tuple[int, str], Tensor]) -> None:
        self._arch, self._layout, self._weights = arch, layout, weights
        self._spelling = Spelling(spec=platform.active().SPELLING, mtp_layer=model.mtp_layer_name())
        self._world, self._rank = dist.get_world_size(), dist.get_rank()
        self._shards: dict[tuple[EngineLayout, int, Wire, int, int | None, int], tuple[Bucket, ...]] = {}

    @cached_property
    def placed(self) -> list[LocalParam]:
        """Where each of this rank's parameters stands."""
        return placement(self._arch, self._layout, self._world, self._rank, self._spelling)

    @cached_property
    def _plan(self) -> ExportPlan:
        return export_plan(self._arch, self._layout, self._world, self._spelling)

    def over(self, weights: Sequence[Tensor]) -> "Exchange":
        """The same places, with other weights there: a copy on the host, in the order of this rank's own."""
        other = copy(self)
        other._weights = dict(zip(self._weights, weights, strict=True))
        return other

    def load(self, read: Read) -> None:
        """Fill this rank's shards. Every rank reads only what it holds."""
        load_local(self._weights, self.placed, read)

    def initialize(self, std: float, seed: int) -> None:
        """Draw fresh weights for all of this rank's shards, see `fresh`."""
        self.load(self.fresh(std, seed))

    def fresh(self, std: float, seed: int) -> Read:
        """Freshly drawn tensors: norms 1, biases 0, everything else normal with the given standard deviation.

        Projections back into the residual stream get std / sqrt(2 layers), Megatron-Core's own default (and GPT-2's).
        Each tensor has a generator of its own, seeded by its canonical name, so a model starts the same under every layout.
        """
        shapes = {tensor.name: tensor.shape for tensor in canonical(self._arch)}

        @lru_cache(maxsize=4)
        def draw(name: str) -> Tensor:
            if name.endswith("norm.weight"):
                return torch.ones(shapes[name])
            if name.endswith("bias"):
                return torch.zeros(shapes[name])
            digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
            scale = std / math.sqrt(2 * self._arch.layers) if name.endswith(("o_proj.weight", "down_proj.weight")) else std
            return torch.randn(shapes[name], generator=torch.Generator().manual_seed(int.from_bytes(digest) >> 1)) * scale

        return lambda name, box: draw(name)[box.slices]

    @property
    def arch(self) -> Architecture:
        """The model whose weights these are."""
        return self._arch

    def tensors(self, dtype: torch.dtype) -> Iterable[tuple[str, Tensor]]:
        """See `gather`."""
        return self.gather(dtype).items()

    def buckets(self, wire: Wire, limit: int, senders: Sequence[int] | None, rank: int, room: Room | None = None) -> Filled:
        """See `WeightSource.buckets`."""
        plan = _full_plan(self._arch, self._layout, self._world, self._spelling, wire, limit, None if senders is None else tuple(senders))
        return gathered(plan.buckets, self._weights, wire, platform.active().device(), room=room)

    def params(
        self, engine: EngineLayout, engine_rank: int, wire: Wire, limit: int, on: int, rank: int, room: Room | None = None
    ) -> Filled:
        """See `WeightSource.params`. Engine ranks are numbered as trainer ranks: what these hold themselves is sent by nobody."""
        # Of a bucket that comes together elsewhere this rank need not know what the others send.
        buckets = self._buckets(engine, engine_rank, wire, limit, only=None if rank == on else rank)
        return gathered(buckets, self._weights, wire, platform.active().device(), on, room)

    def parcels(self, engine: EngineLayout, engine_rank: int, wire: Wire, limit: int, rank: int) -> Parcels:
        """See `WeightSource.parcels`."""
        # Servers share no GPU with the trainer here, so their ranks are numbered behind its.
        for bucket in self._buckets(engine, engine_rank, wire, limit, rank, first=self._world):
            if any(entry.quantised for entry in bucket.entries):
                name = next(entry.name for entry in bucket.entries if entry.quantised)
                raise UserError(
                    f"rollout.sglang.block_fp8: no rank can quantise its part of {name} alone, as layouts cut its blocks of 128 x 128; "
                    "use rollout.sglang.path=full"
                )
            mine = rank in bucket.messages
            yield bucket, parcel(self._weights, bucket, rank, wire, platform.active().device()) if mine else None

    def _buckets(
        self, engine: EngineLayout, engine_rank: int, wire: Wire, limit: int, only: int | None, first: int = 0
    ) -> tuple[Bucket, ...]:
        """Of one rank of a server, with the messages of all ranks of the trainer or of one; `first`: see `direct_plan`."""
        key = (engine, engine_rank, wire, limit, only, first)
        if key not in self._shards:
            plan = _direct_plan(self._arch, self._layout, self._world, self._spelling, engine, wire, first)
            self._shards[key] = tuple(plan.buckets(first + engine_rank, limit, only=only))
        return self._shards[key]

    def gather(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Every canonical tensor, on every rank, in the given dtype (float32 where checkpoints always keep it).

        Meant for models that fit one process; every rank must call it. The tensors may share one buffer: use or copy them before
        the next call.
        """
        mine = gather_local(self._weights, self._plan, self._rank, dtype)
        if self._world == 1:
            return assemble(mine[None], self._plan, dtype)
        everyone = torch.empty(self._world * mine.numel(), dtype=torch.uint8, device=mine.device)
        dist.all_gather_into_tensor(everyone, mine)
        return assemble(everyone.view(self._world, -1), self._plan, dtype)


# A plan is made at the first sync of a stage, and the same at every other.
_full_plan = lru_cache(maxsize=2)(full_plan)
_direct_plan = lru_cache(maxsize=2)(direct_plan)
