"""The path of own shards: every rank of a server is sent its own parameters, as it keeps them.

A request carries one payload for every rank of a server, so buckets go out in rounds, one for each of these ranks. What the payloads are
is the transport's: the parameters (`ShardsByPayload`), or a note of what follows over the network (`sglang_network`).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from r1mega.config.engine_layout import EngineLayout
from r1mega.pipeline import ranks
from r1mega.rollout.sglang_payload import Carrier, InBytes, named
from r1mega.rollout.sglang_sync import Control, Failed, contents, load
from r1mega.weights.source import WeightSource
from r1mega.weights.sync import Bucket
from r1mega.weights.wire import Wire

Given = TypeVar("Given")


class Shards(ABC, Generic[Given]):
    """Sends a source's weights to all servers, which are alike. Every rank calls what it offers alike; `Given` is what a rank adds."""

    load_format: str
    """What SGLang makes of a payload."""

    def __init__(self, control: Control, layout: EngineLayout) -> None:
        self.control, self.layout = control, layout

    def begin(self) -> None:
        """On rank 0, before the first bucket."""
        self.control.begin()

    def send(self, source: WeightSource, wire: Wire, limit: int) -> str | None:
        """Send all rounds, each while the next one is gathered; why that failed, on every rank the same.

        Args:
            limit: bytes of a round, of all ranks of a server together.
        """
        under_way: Future[str | None] | None = None
        lost: str | None = None
        with ThreadPoolExecutor(1) as thread:
            for index, (bucket, mine) in enumerate(self.rounds(source, wire, limit)):
                # After this every rank may write over what the round before last has left.
                error = ranks.first((under_way.result() if under_way else None) or lost)
                if error is not None:
                    return error
                payloads = self.payloads(index, bucket, mine)
                lost = self.go(mine)
                if payloads is not None:
                    under_way = thread.submit(self._load, payloads, f"parameters {contents(bucket)}")
            error = (under_way.result() if under_way else None) or lost
            return ranks.first(error)

    @abstractmethod
    def rounds(self, source: WeightSource, wire: Wire, limit: int) -> Iterator[tuple[Bucket, Given]]:
        """A bucket of every round, of whichever rank of a server, and what this rank of the trainer adds to it. `limit`: as of `send`."""

    @abstractmethod
    def payloads(self, index: int, bucket: Bucket, mine: Given) -> list[list[str]] | None:
        """On every rank, which adds `mine`: payloads of round `index` by server and rank, on rank 0; None on the others."""

    def go(self, mine: Given) -> str | None:
        """On every rank, when a round is about to be asked for; why this rank cannot give what it has added to it."""
        return None

    def _load(self, payloads: list[list[str]], what: str) -> str | None:
        try:
            load(self.control, payloads, self.load_format, what)
        except Failed as error:
            return str(error)
        return None

    def end(self) -> None:
        """On rank 0, after all buckets. What the engine derives from parameters is stale until a session without loads ends."""
        self.control.end()
        self.control.derive()

    @abstractmethod
    def close(self) -> None:
        """Free what is shared with servers."""


@dataclass(frozen=True)
class Way:
    """One walk over the parameters of an engine rank: gathered on rank `home` of the trainer, for this rank of all these servers."""

    engine_rank: int
    home: int
    near: bool
    """Whether the servers are on the home's machine."""
    servers: tuple[int, ...]


def ways(here: Sequence[Sequence[Sequence[bool]]], tp: int) -> list[Way]:
    """All walks of a sync; `here[k][s][r]`: whether rank r of server s may map the memory of rank k of the trainer, on its machine."""
    found: dict[tuple[int, int, bool], list[int]] = {}
    for server in range(len(here[0])):
        for rank in range(tp):
            near = [trainer for trainer, servers in enumerate(here) if servers[server][rank]]
            found.setdefault((rank, near[rank % len(near)] if near else 0, bool(near)), []).append(server)
    return [Way(rank, home, near, tuple(servers)) for (rank, home, near), servers in sorted(found.items())]


class ShardsByPayload(Shards[Mapping[tuple[int, int], str]]):
    """`tensor` and `request`, with SGLang's load format "direct".

    A rank's parameters are gathered on a rank of the trainer on the same machine, once for all servers that have that rank there; rank 0
    collects the payloads, handles as a rule. What is on a machine without a rank of the trainer is gathered on rank 0 and travels as bytes.
    """

    load_format = "direct"

    def __init__(self, control: Control, layout: EngineLayout, here: Sequence[Sequence[bool]], memory: Carrier | None) -> None:
        """`here`, `memory`: as of `ByTensor`, on each rank its own."""
        super().__init__(control, layout)
        self._memory = memory
        self.ways = ways(ranks.gathered([[flag and memory is not None for flag in server] for server in here]), layout.tp)

    def rounds(self, source: WeightSource, wire: Wire, limit: int) -> Iterator[tuple[Bucket, Mapping[tuple[int, int], str]]]:
        """Payloads by server and rank."""
        me, room = ranks.number(), self._memory.room if self._memory else None
        each = max(1, limit // self.layout.tp)
        walks = [source.params(self.layout, way.engine_rank, wire, each, way.home, me, room if way.near else None) for way in self.ways]
        for parts in zip(*walks, strict=True):
            mine: dict[tuple[int, int], str] = {}
            for way, (bucket, flat) in zip(self.ways, parts, strict=True):
                if flat is not None:
                    mine |= self._payloads(way, named(bucket, flat))
            yield parts[0][0], mine

    def _payloads(self, way: Way, content: list[tuple[str, Tensor]]) -> dict[tuple[int, int], str]:
        carrier = self._memory if way.near and self._memory else InBytes()
        found = carrier.payloads(content, len(way.servers))
        return {(server, way.engine_rank): payload for server, payload in zip(way.servers, found, strict=True)}

    def payloads(self, index: int, bucket: Bucket, mine: Mapping[tuple[int, int], str]) -> list[list[str]] | None:
        """See `Shards.payloads`."""
        given = ranks.to_first(mine)
        if given is None:
            return None
        all_of = {place: payload for one in given for place, payload in one.items()}
        return [[all_of[server, rank] for rank in range(self.layout.tp)] for server in range(len(self.control.clients))]

    def close(self) -> None:
        """See `Shards.close`."""
        if self._memory:
            self._memory.close()
