"""Own shards over the network: each rank of the trainer sends each rank of a server the pieces that it holds of that rank's parameters.

Nothing is gathered, and no rank of the trainer holds more of a server's parameters than its own pieces of them. A request brings every
rank of the servers a note of what comes from whom; the bytes follow over a process group of all ranks of the trainer and of the servers,
where `in_sglang/r1mega_loader`, a weight loader of ours inside SGLang, puts them in place.
"""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import ref

import torch

from r1mega.config.engine_layout import EngineLayout
from r1mega.pipeline import ranks
from r1mega.rollout.sglang_group import Meeting, abandon, leave
from r1mega.rollout.sglang_payload import InBytes
from r1mega.rollout.sglang_shards import Shards
from r1mega.rollout.sglang_sync import Control, Failed
from r1mega.weights.shipping import Parcel, Patch
from r1mega.weights.source import WeightSource
from r1mega.weights.sync import Bucket
from r1mega.weights.wire import Wire

LOADER = "r1mega_loader.load"
"""What servers have as `--custom-weight-loader`."""

Announced = dict[int, tuple[int, tuple[Patch, ...]]]
"""By rank of all servers, what a rank of the trainer gives to it in a round: bytes, and where they belong."""


class ShardsByNetwork(Shards[dict[int, Parcel]]):
    """`distributed`. The group lasts until a sync fails in it."""

    load_format = LOADER

    def __init__(self, control: Control, layout: EngineLayout, backend: str) -> None:
        """`backend`: see `Meeting`."""
        # Servers have their weights from different replicas where there are some: the plan is of all of them.
        super().__init__(control, layout.model_copy(update={"servers": len(control.clients)}))
        self._backend = backend
        self._meeting: Meeting | None = None
        self._group: Any = None
        self._noted: tuple[ref[WeightSource], Wire, int] | None = None
        """Of which source's sync the notes are. They are the same at its next one: plans do not change."""
        self._notes: list[list[list[str]]] = []
        """By round, on rank 0."""
        self._under_way: list[Any] = []

    def send(self, source: WeightSource, wire: Wire, limit: int) -> str | None:
        """See `Shards.send`."""
        error = self._join() if self._group is None else None
        if self._noted is None or self._noted[0]() is not source or self._noted[1:] != (wire, limit):
            self._noted, self._notes = None, []
        error = error or super().send(source, wire, limit)
        self._noted = (ref(source), wire, limit) if error is None else None
        if error is not None:
            # Servers may wait in it for what never comes, and are lost then: another one is made with those that follow.
            group, self._group, self._under_way = self._group, None, []
            if group is not None:
                abandon(group)
        return error

    def rounds(self, source: WeightSource, wire: Wire, limit: int) -> Iterator[tuple[Bucket, dict[int, Parcel]]]:
        """Parcels by rank of all servers."""
        each, me = max(1, limit // self.layout.ranks), ranks.number()
        walks = [source.parcels(self.layout, rank, wire, each, me) for rank in range(self.layout.ranks)]
        for parts in zip(*walks, strict=True):
            yield parts[0][0], {rank: parcel for rank, (_, parcel) in enumerate(parts) if parcel is not None}

    def payloads(self, index: int, bucket: Bucket, mine: dict[int, Parcel]) -> list[list[str]] | None:
        """See `Shards.payloads`."""
        if self._noted is None:
            announced: Announced = {rank: (parcel.message.numel(), parcel.patches) for rank, parcel in mine.items()}
            given = ranks.to_first(announced)
            if given is not None:
                self._notes.append(self._note(bucket, given))
        return self._notes[index] if self._notes else None

    def _note(self, bucket: Bucket, given: Sequence[Announced]) -> list[list[str]]:
        """What comes from whom, for every rank of the servers, whose buckets of a round have the same names and shapes."""
        assert self._meeting is not None
        entries = [(entry.name, entry.dtype, entry.shape) for entry in bucket.entries]
        notes = []
        for rank in range(self.layout.ranks):
            messages = [(trainer, *announced[rank]) for trainer, announced in enumerate(given) if rank in announced]
            note = json.dumps({"group": self._meeting.name, "entries": entries, "messages": messages}).encode()
            notes += InBytes().payloads([("note", torch.frombuffer(bytearray(note), dtype=torch.uint8))], 1)
        tp = self.layout.tp
        return [notes[server * tp : (server + 1) * tp] for server in range(self.layout.servers)]

    def go(self, mine: dict[int, Parcel]) -> str | None:
        """Send the round; what the round before has sent is there, for its request was answered."""
        assert self._meeting is not None
        try:
            for work in self._under_way:
                work.wait()
            self._under_way = [self._group.send([parcel.message], self._meeting.trainers + rank, 0) for rank, parcel in mine.items()]
        except RuntimeError as error:
            return f"a server was lost while it was sent its parameters: {' '.join(str(error).split()):.200}"
        return None

    def _join(self) -> str | None:
        """Form the group; why that failed, on every rank the same."""
        control = self.control
        meeting = ranks.shared(lambda: Meeting.with_servers(control, self.layout.tp, self._backend, ranks.count()))
        error: str | None = None
        with ThreadPoolExecutor(1) as thread:
            asked = ranks.on_first(lambda: thread.submit(control.post_each, "/init_weights_update_group", meeting.invitations))
            try:
                self._group = meeting.joined(ranks.number())
                if asked is not None:
                    asked.result()
            except Failed as failed:
                error = str(failed)
        self._meeting = meeting
        return ranks.first(error)

    def close(self) -> None:
        """Leave the group; servers that are still there are told to."""
        if self._group is not None and self._meeting is not None:
            group, self._group = self._group, None
            leave(self.control if ranks.number() == 0 else None, self._meeting.name, group)
