"""The path of own shards: every rank of a server is sent its own parameters, as it keeps them (SGLang's load format "direct").

A request carries one payload for every rank of a server, so buckets go out in rounds, one for each of these ranks. Each is gathered on a
rank of the trainer on the same machine, once for all servers that have that rank there; rank 0 collects the payloads, handles as a rule,
and makes the requests. What is on a machine without a rank of the trainer is gathered on rank 0 and travels as bytes.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from r1mega.config.engine_layout import EngineLayout
from r1mega.pipeline import ranks
from r1mega.rollout.sglang_payload import Carrier, InBytes, named
from r1mega.rollout.sglang_sync import Control, Failed, contents, load
from r1mega.weights.source import WeightSource
from r1mega.weights.wire import Wire


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


class OwnShards:
    """Sends a source's weights to all servers, which are alike. Every rank calls what it offers alike."""

    def __init__(self, control: Control, layout: EngineLayout, here: Sequence[Sequence[bool]], memory: Carrier | None) -> None:
        """`here`, `memory`: as of `ByTensor`, on each rank its own."""
        self._control, self._layout, self._memory = control, layout, memory
        self.ways = ways(ranks.gathered([[flag and memory is not None for flag in server] for server in here]), layout.tp)

    def begin(self) -> None:
        """On rank 0, before the first bucket."""
        self._control.begin()

    def send(self, source: WeightSource, wire: Wire, limit: int) -> str | None:
        """Send all rounds, each while the next one is gathered; why that failed, on every rank the same.

        Args:
            limit: bytes of a round, of all ranks of a server together.
        """
        me, tp = ranks.number(), self._layout.tp
        room = self._memory.room if self._memory else None
        walks = [
            source.params(self._layout, way.engine_rank, wire, max(1, limit // tp), way.home, me, room if way.near else None)
            for way in self.ways
        ]
        under_way: Future[str | None] | None = None
        with ThreadPoolExecutor(1) as thread:
            for parts in zip(*walks, strict=True):
                mine: dict[tuple[int, int], str] = {}
                for way, (bucket, flat) in zip(self.ways, parts, strict=True):
                    if flat is not None:
                        mine |= self._payloads(way, named(bucket, flat))
                # After this every rank may write over what the round before last has left.
                told = ranks.gathered(({} if me == 0 else mine, under_way.result() if under_way else None))
                error = told[0][1]
                if error is not None:
                    return error
                if me == 0:
                    all_of = {place: payload for given, _ in [(mine, None), *told] for place, payload in given.items()}
                    what = f"parameters {contents(parts[0][0])}"
                    servers = range(len(self._control.clients))
                    under_way = thread.submit(self._load, [[all_of[server, rank] for rank in range(tp)] for server in servers], what)
            return ranks.shared(lambda: under_way.result() if under_way else None)

    def _payloads(self, way: Way, content: object) -> dict[tuple[int, int], str]:
        """By server and rank."""
        carrier = self._memory if way.near and self._memory else InBytes()
        found = carrier.payloads(content, len(way.servers))
        return {(server, way.engine_rank): payload for server, payload in zip(way.servers, found, strict=True)}

    def _load(self, payloads: list[list[str]], what: str) -> str | None:
        try:
            load(self._control, payloads, "direct", what)
        except Failed as error:
            return str(error)
        return None

    def end(self) -> None:
        """On rank 0, after all buckets. What the engine derives from parameters is stale until a session without loads ends."""
        self._control.end()
        self._control.derive()

    def close(self) -> None:
        """Free what is shared with servers."""
        if self._memory:
            self._memory.close()
