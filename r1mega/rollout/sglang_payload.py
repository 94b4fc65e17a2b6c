"""How tensors get into an SGLang process: their bytes in the request, or in memory that both sides map.

SGLang unpickles a payload with an allow-list of torch's own reducers, so what is shared is shared by torch: a segment in /dev/shm (torch's
"file_system" strategy; file descriptors cannot be handed to a process that is no relative) or a CUDA IPC handle.
"""

import base64
import io
import pickle
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch.multiprocessing import reductions

from r1mega.errors import UserError
from r1mega.weights.shipping import tensors
from r1mega.weights.source import Room
from r1mega.weights.sync import Bucket

_SHM = Path("/dev/shm")
_SPARE = 16 * 2**20
_DEVICE = 6
"""Place of the GPU's number among the arguments of torch's `rebuild_cuda_tensor`."""
_strategy = Lock()


class Carrier(Protocol):
    """How payloads are made on this rank."""

    room: Room | None
    """Where buckets have to be put together; None: anywhere."""

    def payloads(self, content: object, receivers: int) -> list[str]:
        """What stands in a request in place of `content`, once for each process that takes it: each is read once."""

    def close(self) -> None:
        """Free what is shared."""


class InBytes:
    """The bytes themselves, in base64: to servers anywhere."""

    room: Room | None = None

    def payloads(self, content: object, receivers: int) -> list[str]:
        return [_pickled(_ByValue, content)] * receivers if receivers else []

    def close(self) -> None:
        pass


class InSegments:
    """Names of shared memory, to servers on this machine. Buckets are put together there, so a rank copies its weights once.

    Segments are used in turn and kept from sync to sync: a page that was never touched costs more than a copy. They are gone after `close`,
    and when this process ends without it: `torch_shm_manager`, which torch starts beside every process that shares, removes what it left.
    A server has one too, which removes what the server has mapped when that ends. So `close` after a server is lost; others are made then.
    """

    def __init__(self, count: int) -> None:
        """`count`: buckets that may be in use at once; one that is asked for after them is written over the first."""
        self._segments: list[_Segment | None] = [None] * count
        self._turn = 0
        self.room: Room | None = self._room

    def _room(self, nbytes: int) -> Tensor:
        place, self._turn = self._turn, (self._turn + 1) % len(self._segments)
        segment = self._segments[place]
        if segment is None or segment.values.numel() < nbytes:
            self._remove(place)
            segment = self._segments[place] = _Segment(nbytes)
        return segment.values[:nbytes]

    def _remove(self, place: int) -> None:
        segment, self._segments[place] = self._segments[place], None
        if segment is not None:
            segment.file.unlink(missing_ok=True)

    def payloads(self, content: object, receivers: int) -> list[str]:
        with _by_name():
            return [_pickled(_ByName, content) for _ in range(receivers)]

    def close(self) -> None:
        for place in range(len(self._segments)):
            self._remove(place)


class _Segment:
    """`values`: uint8 [nbytes] in /dev/shm. UserError when there is no room, which would end this process without a word later."""

    def __init__(self, nbytes: int) -> None:
        free = shutil.disk_usage(_SHM).free
        if free < nbytes + _SPARE:
            raise UserError(
                f"weight sync: a bucket of {nbytes:,} bytes does not fit into {_SHM}, which has {free:,} bytes left; give the container "
                "more (docker: --shm-size), choose a smaller rollout.sglang.bucket_bytes, or rollout.sglang.transport=request"
            )
        with _by_name():
            self.values = torch.empty(nbytes, dtype=torch.uint8).share_memory_()
            # Counts a user that never comes. The last user would remove the file, and end its process if somebody else had done so.
            _, (_, _, name, _) = reductions.reduce_storage(self.values.untyped_storage())
        self.file = _SHM / name.decode().lstrip("/")


class InHandles:
    """CUDA IPC handles, to servers on this machine's GPUs. Written after SGLang's own patches of torch, and not yet run."""

    room: Room | None = None  # never written twice: the server still copies when it has answered, and torch frees what it is done with

    def payloads(self, content: object, receivers: int) -> list[str]:
        return [_pickled(_ByDevice, content) for _ in range(receivers)]

    def close(self) -> None:
        pass


def carrier(platform: Literal["cpu", "cuda"], buckets: int) -> Carrier:
    """For processes of servers on this rank's own machine; `buckets`: how many may be in use at once."""
    return InHandles() if platform == "cuda" else InSegments(buckets)


def is_here(address: str) -> bool:
    """Whether http://host:port is on this machine, which is where a socket can be bound to the host's address."""
    host = urlsplit(address).hostname or ""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(where)
    except OSError:
        return False
    return True


def flattened(bucket: Bucket, flat: Tensor) -> dict[str, object]:
    """Full tensors as SGLang's "flattened_bucket" has them; its unpickler takes namespaces, and no class of ours."""
    metadata = [
        SimpleNamespace(
            name=entry.name,
            shape=torch.Size(entry.shape),
            dtype=getattr(torch, entry.dtype),
            start_idx=entry.offset,
            end_idx=entry.offset + entry.nbytes,
            numel=entry.nbytes,
        )
        for entry in bucket.entries
    ]
    return {"flattened_tensor": flat, "metadata": metadata}


def named(bucket: Bucket, flat: Tensor) -> list[tuple[str, Tensor]]:
    """An engine rank's parameters as SGLang's "direct" has them."""
    return tensors(bucket, flat)


class _ByValue(pickle.Pickler):
    def reducer_override(self, obj: object) -> Any:
        if not isinstance(obj, Tensor):
            return NotImplemented
        held = obj.cpu()
        # A view would be pickled with all of its storage.
        own = held if held.untyped_storage().nbytes() == held.nbytes else held.clone()
        return own.__reduce_ex__(pickle.HIGHEST_PROTOCOL)


class _ByName(ForkingPickler):
    def reducer_override(self, obj: object) -> Any:
        if not isinstance(obj, torch.UntypedStorage):
            return NotImplemented
        # Without the name of our manager a server asks its own, and ours, with what it inherited, does not live as long as the server.
        rebuild, (kind, _, *rest) = reductions.reduce_storage(obj)
        return rebuild, (kind, b"", *rest)


class _ByDevice(ForkingPickler):
    def reducer_override(self, obj: object) -> Any:
        if not isinstance(obj, Tensor):
            return NotImplemented
        # The server may number its GPUs otherwise; SGLang's `patch_torch` takes the GPU's UUID in the number's place.
        rebuild, arguments = reductions.reduce_tensor(obj)
        uuid = str(torch.cuda.get_device_properties(arguments[_DEVICE]).uuid)
        return rebuild, (*arguments[:_DEVICE], uuid, *arguments[_DEVICE + 1 :])


def _pickled(pickler: type[pickle.Pickler], content: object) -> str:
    written = io.BytesIO()
    pickler(written, pickle.HIGHEST_PROTOCOL).dump(content)
    return base64.b64encode(written.getbuffer()).decode()


@contextmanager
def _by_name() -> Iterator[None]:
    """Share tensors by the names of files in /dev/shm. Torch knows one strategy for all threads; one sends while another gathers."""
    with _strategy:
        before = mp.get_sharing_strategy()
        mp.set_sharing_strategy("file_system")
        try:
            yield
        finally:
            mp.set_sharing_strategy(before)
