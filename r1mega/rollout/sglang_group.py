"""`distributed`: rank 0 broadcasts buckets to all ranks of all servers, over NCCL or gloo."""

import socket
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from r1mega.rollout.sglang_client import Refused, Unanswered
from r1mega.rollout.sglang_sync import Control, Failed
from r1mega.weights.source import Room
from r1mega.weights.sync import Bucket

_JOIN_S = 300.0
_LOOK_S = 0.002


class ByBroadcast:
    """A process group of rank 0 of the trainer and every rank of every server; it lasts until a sync fails in it."""

    senders: Sequence[int] | None = (0,)
    room: Room | None = None

    def __init__(self, control: Control, tp: int, backend: str) -> None:
        """`backend`: "gloo" or "nccl"."""
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
            with suppress(Failed):
                self._control.post("/destroy_weights_update_group", {"group_name": name})
            dist.destroy_process_group(group)
        self._threads.shutdown(wait=False)

    def _join(self) -> None:
        address, port, name = _own_address(self._control.clients[0].address), _free_port(), f"r1mega-{uuid.uuid4().hex}"
        world = 1 + self._tp * len(self._control.clients)
        asked = self._ask(
            "/init_weights_update_group",
            [
                {
                    "master_address": address,
                    "master_port": port,
                    "rank_offset": 1 + index * self._tp,
                    "world_size": world,
                    "group_name": name,
                    "backend": self._backend,
                }
                for index in range(len(self._control.clients))
            ],
        )
        try:
            self._group = _joined(address, port, world, name, self._backend)
        except (RuntimeError, dist.DistError) as error:
            raise Failed(f"no process group with the servers at {address}:{port}: {' '.join(str(error).split())[:200]}") from None
        self._answers(asked)
        self._name = name

    def _ask(self, path: str, bodies: Sequence[Any]) -> list[Future[Any]]:
        """One request to each server, at the same time."""
        clients, timeout = self._control.clients, self._control.timeout_s
        return [self._threads.submit(client.post, path, body, timeout) for client, body in zip(clients, bodies, strict=True)]

    def _answers(self, asked: Sequence[Future[Any]]) -> None:
        """Wait for all; Failed where one did not succeed, and then there is no group any more."""
        errors = [error for error in (future.exception() for future in asked) if error is not None]
        if not errors:
            return
        self._group = None
        if isinstance(errors[0], Unanswered | Refused):
            raise Failed(str(errors[0]))
        raise errors[0]


def _joined(address: str, port: int, world: int, name: str, backend: str) -> Any:
    """Rank 0's side of SGLang's `init_custom_process_group`: torch offers no public way into a second world."""
    timeout = timedelta(seconds=_JOIN_S)
    store, _, _ = next(iter(dist.rendezvous(f"tcp://{address}:{port}", 0, world, timeout=timeout)))
    store = dist.PrefixStore(name, store)
    joining: Any = c10d._new_process_group_helper
    group, _ = joining(world, 0, [], c10d.Backend(backend), store, group_name=name, timeout=timeout)
    c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(world)}
    return group


def _own_address(server: str) -> str:
    """The address of this machine as a server sees it."""
    parts = urlsplit(server)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port or 80))
        address: str = probe.getsockname()[0]
        return address


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port
