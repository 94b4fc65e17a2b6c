"""Process groups with servers, over NCCL or gloo, and `distributed`: rank 0 broadcasts buckets to all ranks of all servers."""

import socket
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from r1mega.rollout.sglang_client import Refused, Unanswered
from r1mega.rollout.sglang_part import address_towards
from r1mega.rollout.sglang_sync import Control, Failed
from r1mega.weights.source import Room
from r1mega.weights.sync import Bucket

_JOIN_S = 300.0
_LOOK_S = 0.002


@dataclass(frozen=True)
class Meeting:
    """Where a group forms: its first ranks are the trainer's, then follow those of the first server, of the second, and so on."""

    address: str
    port: int
    name: str
    backend: str
    """"gloo" or "nccl"."""
    trainers: int
    tp: int
    servers: int

    @classmethod
    def with_servers(cls, control: Control, tp: int, backend: str, trainers: int) -> "Meeting":
        """At this rank, which has to be the group's first."""
        first = urlsplit(control.clients[0].address)
        address = address_towards(first.hostname or "", first.port or 80)
        return cls(address, _free_port(), f"r1mega-{uuid.uuid4().hex}", backend, trainers, tp, len(control.clients))

    @property
    def world(self) -> int:
        """Ranks of the group."""
        return self.trainers + self.tp * self.servers

    @property
    def invitations(self) -> list[dict[str, object]]:
        """For every server, what /init_weights_update_group is to be told; it answers when all have come."""
        return [
            {
                "master_address": self.address,
                "master_port": self.port,
                "rank_offset": self.trainers + self.tp * server,
                "world_size": self.world,
                "group_name": self.name,
                "backend": self.backend,
            }
            for server in range(self.servers)
        ]

    def joined(self, rank: int) -> Any:
        """The group, on a rank of the trainer: as SGLang's `init_custom_process_group`, torch offers no public way into a second world.

        Failed when the others do not come.
        """
        timeout = timedelta(seconds=_JOIN_S)
        try:
            # Not by `dist.rendezvous`, which under torchrun takes torchrun's store for everybody's, and opens none.
            store: dist.Store = dist.TCPStore(self.address, self.port, self.world, is_master=rank == 0, timeout=timeout)
            store = dist.PrefixStore(self.name, store)
            joining: Any = c10d._new_process_group_helper
            group, _ = joining(self.world, rank, [], c10d.Backend(self.backend), store, group_name=self.name, timeout=timeout)
        except (RuntimeError, dist.DistError) as error:
            reason = " ".join(str(error).split())[:200]
            raise Failed(f"no process group with the servers at {self.address}:{self.port}: {reason}") from None
        c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(self.world)}
        return group


def leave(control: Control | None, name: str, group: Any) -> None:
    """End a group; `control`: for telling servers that are still there."""
    if control is not None:
        with suppress(Failed):
            control.post("/destroy_weights_update_group", {"group_name": name})
    dist.destroy_process_group(group)


def abandon(group: Any) -> None:
    """Give up a group in which others may be gone, with what is under way: NCCL would end this process when that exceeds its time."""
    with suppress(RuntimeError):
        c10d._abort_process_group(group)


class ByBroadcast:
    """A process group of rank 0 of the trainer and every rank of every server; it lasts until a sync fails in it."""

    senders: Sequence[int] | None = (0,)
    room: Room | None = None

    def __init__(self, control: Control, tp: int, backend: str) -> None:
        """`backend`: see `Meeting`."""
        self._control, self._tp, self._backend = control, tp, backend
        self._name, self._group = "", None
        self._threads = ThreadPoolExecutor(len(control.clients), thread_name_prefix="broadcast")

    def begin(self) -> None:
        """Form the group where there is none, and open a session."""
        if self._group is None:
            self._join()
        self._control.begin()

    def send(self, bucket: Bucket, flat: Tensor) -> None:
        body = {
            "names": [entry.name for entry in bucket.entries],
            "dtypes": [entry.dtype for entry in bucket.entries],
            "shapes": [entry.shape for entry in bucket.entries],
            "group_name": self._name,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        asked = self._ask("/update_weights_from_distributed", [body] * len(self._control.clients))
        sent = dist.broadcast(flat, src=0, group=self._group, async_op=True)
        # A server that refuses takes no part in the broadcast, which would wait for it.
        while not sent.is_completed():
            if any(future.done() and future.exception() is not None for future in asked):
                break
            time.sleep(_LOOK_S)
        self._answers(asked)

    def end(self) -> None:
        self._control.end()

    def close(self) -> None:
        """Leave the group; servers that are still there are told to."""
        if self._group is not None:
            name, group, self._name, self._group = self._name, self._group, "", None
            leave(self._control, name, group)
        self._threads.shutdown(wait=False)

    def _join(self) -> None:
        meeting = Meeting.with_servers(self._control, self._tp, self._backend, trainers=1)
        asked = self._ask("/init_weights_update_group", meeting.invitations)
        self._group = meeting.joined(0)
        self._answers(asked)
        self._name = meeting.name

    def _ask(self, path: str, bodies: Sequence[Any]) -> list[Future[Any]]:
        """One request to each server, at the same time."""
        clients, timeout = self._control.clients, self._control.timeout_s
        return [self._threads.submit(client.post, path, body, timeout) for client, body in zip(clients, bodies, strict=True)]

    def _answers(self, asked: Sequence[Future[Any]]) -> None:
        """Wait for all; Failed where one did not succeed, and then there is no group any more."""
        errors = [error for error in (future.exception() for future in asked) if error is not None]
        if not errors:
            return
        group, self._group = self._group, None
        if group is not None:
            abandon(group)
        if isinstance(errors[0], Unanswered | Refused):
            raise Failed(str(errors[0]))
        raise errors[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port
