"""The path of own shards: every rank of a server is sent its own parameters, as it keeps them (SGLang's load format "direct").

A request carries one payload for every rank of a server, so buckets go out in rounds, one for each of these ranks. Each is gathered on a
rank of the trainer near the servers; rank 0 collects the payloads, handles as a rule, and makes the requests.
"""

from concurrent.futures import Future, ThreadPoolExecutor

from r1mega.config.engine_layout import EngineLayout
from r1mega.pipeline import ranks
from r1mega.rollout.sglang_payload import Carrier, InBytes, named
from r1mega.rollout.sglang_sync import Control, Failed, contents, load
from r1mega.weights.source import WeightSource
from r1mega.weights.wire import Wire


class OwnShards:
    """Sends a source's weights to all servers, which are alike. Every rank calls what it offers alike."""

    def __init__(self, control: Control, layout: EngineLayout, carrier: Carrier) -> None:
        self._control, self._layout, self._carrier = control, layout, carrier
        near = [rank for rank, here in enumerate(ranks.gathered(not isinstance(carrier, InBytes))) if here]
        # Bytes would be collected on rank 0 anyway.
        self.homes = [near[rank % len(near)] if near else 0 for rank in range(layout.tp)]
        """The trainer's rank on which each engine rank's buckets are gathered."""

    def begin(self) -> None:
        """On rank 0, before the first bucket."""
        self._control.begin()

    def send(self, source: WeightSource, wire: Wire, limit: int) -> str | None:
        """Send all rounds, each while the next one is gathered; why that failed, on every rank the same.

        Args:
            limit: bytes of a round, of all engine ranks together.
        """
        me, tp = ranks.number(), self._layout.tp
        walks = [source.params(self._layout, r, wire, max(1, limit // tp), self.homes[r], me, self._carrier.room) for r in range(tp)]
        under_way: Future[str | None] | None = None
        with ThreadPoolExecutor(1) as thread:
            for parts in zip(*walks, strict=True):
                servers = len(self._control.clients)
                mine = {
                    r: self._carrier.payloads(named(bucket, flat), servers) for r, (bucket, flat) in enumerate(parts) if flat is not None
                }
                # After this every rank may write over what the round before last has left.
                told = ranks.gathered(({} if me == 0 else mine, under_way.result() if under_way else None))
                error = told[0][1]
                if error is not None:
                    return error
                if me == 0:
                    payloads = {r: found for given, _ in [(mine, None), *told] for r, found in given.items()}
                    what = f"parameters {contents(parts[0][0])}"
                    under_way = thread.submit(self._load, [[payloads[r][s] for r in range(tp)] for s in range(servers)], what)
            return ranks.shared(lambda: under_way.result() if under_way else None)

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
        self._carrier.close()
