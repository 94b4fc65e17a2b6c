"""A weight sync with SGLang servers: paused, a session, buckets, checksums, a version, and on.

Nothing is served between the pause and the end of a sync that went well, so no sample is drawn from mixed weights.
"""

import base64
import hashlib
import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor

from r1mega.rollout.engine import Differences
from r1mega.rollout.sglang_client import Client, Refused, Unanswered
from r1mega.weights.shipping import tensors
from r1mega.weights.sync import Bucket


class Failed(Exception):
    """A sync that did not succeed, for a reason that another attempt may not meet."""


@dataclass(frozen=True)
class Control:
    """What is said to all servers at once about a sync."""

    clients: Sequence[Client]
    timeout_s: float

    def each(self, call: Callable[[Client], Any]) -> list[Any]:
        """`call` of every server at the same time. Failed, of the first that does not do it."""
        with ThreadPoolExecutor(len(self.clients)) as threads:
            pending = [threads.submit(call, client) for client in self.clients]
        try:
            return [future.result() for future in pending]
        except (Unanswered, Refused) as error:
            raise Failed(str(error)) from None

    def post(self, path: str, body: Any) -> list[Any]:
        """The same request to every server; Failed where one says that it did not succeed."""
        answers = self.each(lambda client: client.post(path, body, self.timeout_s))
        for client, answer in zip(self.clients, answers, strict=True):
            if isinstance(answer, dict) and answer.get("success") is False:
                raise Failed(f"{client.address}{path}: {' '.join(str(answer.get('message')).split())[:300]}")
        return answers

    def pause(self) -> None:
        """Take no more requests; what is under way is ended."""
        self.post("/pause_generation", {"mode": "abort"})

    def begin(self) -> None:
        """Open a session, which a failed sync may have left open."""
        with suppress(Failed):
            self.post("/end_weight_update", {})
        self.post("/begin_weight_update", {"selector": "all"})

    def end(self) -> None:
        """Close the session: the engine derives what it derives from weights."""
        self.post("/end_weight_update", {})

    def differing(self, wanted: Sequence[Mapping[str, str]]) -> dict[str, Differences]:
        """What of every server is not as wanted: checksums of parameters by rank of a server. By place, for all of them."""
        places = {}
        for client, answer in zip(self.clients, self.post("/weights_checker", {"action": "checksum"}), strict=True):
            for rank, (sums, found) in enumerate(zip(wanted, answer["ranks"], strict=True)):
                got = found["checksums"]
                wrong = tuple(sorted(name for name in sums.keys() | got.keys() if sums.get(name) != got.get(name)))
                where = f"{client.address}, rank {rank}" if len(wanted) > 1 else client.address
                places[where] = Differences(wrong, len(got))
        return places

    def compare(self, wanted: Sequence[Mapping[str, str]]) -> None:
        """Failed, with the names of parameters that are not as wanted; see `differing`."""
        for where, found in self.differing(wanted).items():
            if wrong := found.names:
                more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
                raise Failed(f"{where}: after the sync {', '.join(wrong[:4])}{more} are not the trainer's ({found.compared} compared)")

    def resume(self, version: int) -> None:
        """Serve the new weights under their version."""
        self.post("/flush_cache?timeout=60", {})
        self.post("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})
        self.post("/continue_generation", {})


def checksum(values: Tensor) -> str:
    """As SGLang's `weights_checker` gives it of a tensor in host memory: the first 8 bytes of the SHA-256 of its bytes, in hex."""
    return hashlib.sha256(values.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()[:16]


class Transport(Protocol):
    """How buckets reach servers."""

    senders: Sequence[int] | None
    """Ranks that can send; None: every one."""

    def begin(self) -> None:
        """On rank 0, before the first bucket. Failed when servers are not ready for it."""

    def send(self, bucket: Bucket, flat: Tensor) -> None:
        """On the rank `bucket.sender`: uint8 [bucket.nbytes] to all servers. Failed when one does not take it."""

    def end(self) -> None:
        """On rank 0, after all buckets were sent."""

    def close(self) -> None:
        """Free what lasts longer than a sync."""


class InRequests:
    """`tensor`: the bytes stand in the request. Any rank can send; it needs no network but HTTP."""

    senders: Sequence[int] | None = None

    def __init__(self, control: Control, tp: int) -> None:
        self._control, self._tp = control, tp

    def begin(self) -> None:
        self._control.begin()

    def send(self, bucket: Bucket, flat: Tensor) -> None:
        payload = base64.b64encode(_pickled(bucket, flat)).decode()
        body = {"serialized_named_tensors": [payload] * self._tp, "load_format": "flattened_bucket", "flush_cache": False}
        self._control.post("/update_weights_from_tensor", body)

    def end(self) -> None:
        self._control.end()

    def close(self) -> None:
        pass


class ByDisk:
    """`disk`: safetensors files in a folder that servers see too."""

    senders: Sequence[int] | None = None

    def __init__(self, control: Control, folder: Path) -> None:
        self._control, self._folder = control, folder

    def begin(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self.close()

    def send(self, bucket: Bucket, flat: Tensor) -> None:
        from safetensors.torch import save_file

        save_file({name: value.cpu() for name, value in tensors(bucket, flat)}, self._folder / f"{bucket.entries[0].name}.safetensors")

    def end(self) -> None:
        self._control.post(
            "/update_weights_from_disk", {"model_path": str(self._folder), "load_format": "safetensors", "flush_cache": False}
        )
        self.close()

    def close(self) -> None:
        for file in self._folder.glob("*.safetensors"):
            file.unlink()


def _pickled(bucket: Bucket, flat: Tensor) -> bytes:
    """A flattened bucket as SGLang reads it: its unpickler takes tensors and namespaces, and no class of ours."""
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
    # A view would be pickled with all of its storage.
    whole = flat if flat.untyped_storage().nbytes() == bucket.nbytes else flat.clone()
    written = io.BytesIO()
    pickle.Pickler(written, protocol=pickle.HIGHEST_PROTOCOL).dump({"flattened_tensor": whole, "metadata": metadata})
    return written.getvalue()
