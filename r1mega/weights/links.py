"""What a plan costs: bytes per link, the bound that no order of transfers can beat, and an order that comes close to it.

Every GPU has one full-duplex link to the network: it sends to one and receives from one at a time, each at the full rate.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from r1mega.weights.direct import DirectPlan
from r1mega.weights.sync import FullPlan

Links = Mapping[tuple[int, int], int]
"""Bytes by (sending rank, receiving rank)."""


def egress(links: Links) -> Counter[int]:
    """Bytes that each rank sends."""
    return _summed((source, nbytes) for (source, _), nbytes in links.items())


def ingress(links: Links) -> Counter[int]:
    """Bytes that each rank receives."""
    return _summed((target, nbytes) for (_, target), nbytes in links.items())


def _summed(items: Iterable[tuple[int, int]]) -> Counter[int]:
    total: Counter[int] = Counter()
    for rank, nbytes in items:
        total[rank] += nbytes
    return total


def direct_bound(plan: DirectPlan) -> int:
    """Bytes that some link must carry, whoever of the replicas sends: the largest of what a rank must receive, what a set of replicas
    must send divided by their number, and what all must send divided by all.

    Sets of replicas are widened to those of a whole pipeline stage where they lie within one another.
    """
    links = plan.links()
    needed = _needed(plan)
    forced = [-(-sum(nbytes for ranks, nbytes in needed.items() if ranks <= among) // len(among)) for among in _unions(needed)]
    return max([*ingress(links).values(), *forced], default=0)


def _needed(plan: DirectPlan) -> Counter[frozenset[int]]:
    """Bytes that each set of replicas must send, without what stays where it is."""
    total: Counter[frozenset[int]] = Counter()
    for (ranks, h), nbytes in plan.nbytes.items():
        total[frozenset(ranks)] += nbytes * sum(rank not in ranks for rank in plan.target[h].ranks)
    return total


def _unions(needed: Iterable[frozenset[int]]) -> set[frozenset[int]]:
    """The sets themselves, connected ones joined, and all."""
    sets = set(needed)
    joined: list[set[int]] = []
    for one in sorted(sets, key=lambda ranks: -len(ranks)):
        touching = [group for group in joined if group & one]
        joined = [group for group in joined if not group & one] + [set(one).union(*touching)]
    everyone = frozenset().union(*sets)
    return sets | {frozenset(group) for group in joined} | ({everyone} if everyone else set())


@dataclass(frozen=True)
class Transfer:
    """`nbytes` from `source` to `target`, begun `start` seconds after the first."""

    start: float
    source: int
    target: int
    nbytes: int


@dataclass(frozen=True)
class Schedule:
    """When each transfer begins; a rank works through its own in this order, so nobody needs a clock."""

    transfers: tuple[Transfer, ...]
    seconds: float

    def queues(self) -> dict[int, list[Transfer]]:
        """What each rank sends, in order."""
        queues: dict[int, list[Transfer]] = defaultdict(list)
        for transfer in self.transfers:
            queues[transfer.source].append(transfer)
        return dict(queues)


def schedule(links: Links, rate: float, chunk: int) -> Schedule:
    """List scheduling: whenever a link is free, the rank with most left to send serves the free rank with most left to receive.

    Args:
        rate: bytes per second of a link in each direction.
        chunk: largest transfer in bytes; another may come between two chunks.
    """
    sources, targets = sorted({s for s, _ in links}), sorted({t for _, t in links})
    row, column = {rank: i for i, rank in enumerate(sources)}, {rank: i for i, rank in enumerate(targets)}
    left = np.zeros((len(sources), len(targets)), dtype=np.int64)
    for (source, target), nbytes in links.items():
        left[row[source], column[target]] = nbytes
    to_send, to_receive = left.sum(1), left.sum(0)
    idle, open_ = set(range(len(sources))), np.ones(len(targets), dtype=bool)
    running: list[tuple[float, int, int]] = []
    transfers: list[Transfer] = []
    now = 0.0
    while True:
        for s in sorted(idle, key=lambda s: -to_send[s]):
            ready = np.where(open_ & (left[s] > 0), to_receive, 0)
            t = int(ready.argmax())
            if ready[t] == 0:
                continue
            nbytes = min(int(left[s, t]), chunk)
            left[s, t] -= nbytes
            to_send[s] -= nbytes
            to_receive[t] -= nbytes
            idle.discard(s)
            open_[t] = False
            transfers.append(Transfer(now, sources[s], targets[t], nbytes))
            heapq.heappush(running, (now + nbytes / rate, s, t))
        idle = {s for s in idle if to_send[s]}
        if not running:
            return Schedule(tuple(transfers), now)
        now = running[0][0]
        while running and running[0][0] <= now:
            _, s, t = heapq.heappop(running)
            idle.add(s)
            open_[t] = True


def full_seconds(plan: FullPlan, rate: float) -> float:
    """Time of the first path, in which all engine ranks receive every bucket: gathers overlap with sending, buckets follow each other.

    Its bound is `plan.nbytes / rate`: every engine rank receives the whole model.
    """
    gathered = sent = 0.0
    free: dict[int, float] = defaultdict(float)
    for bucket in plan.buckets:
        incoming = sum(bucket.message_bytes(rank) for rank in bucket.messages if rank != bucket.sender)
        gathered = max(gathered, free[bucket.sender]) + incoming / rate
        sent = max(sent, gathered) + bucket.nbytes / rate
        free[bucket.sender] = sent
    return sent
