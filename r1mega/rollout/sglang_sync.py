"""A weight sync with SGLang servers: paused, a session, buckets, checksums, a version, and on.

Nothing is served between the pause and the end of a sync that went well, so no sample is drawn from mixed weights.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from r1mega.rollout.engine import Differences
from r1mega.rollout.sglang_client import Client, Refused, Unanswered
from r1mega.rollout.sglang_payload import Carrier, InBytes, flattened
from r1mega.weights.shipping import tensors
from r1mega.weights.source import Room
from r1mega.weights.sync import Bucket


class Failed(Exception):
    """A sync that did not succeed, for a reason that another attempt may not meet."""


@dataclass(frozen=True)
class Control:
    """What is said to all servers at once about a sync."""

    clients: Sequence[Client]
    timeout_s: float

    def each(self, call: Callable[..., Any], *given: Sequence[Any]) -> list[Any]:
        """`call(client, ...)` of every server at the same time, each with its own of what is given. Failed, of the first that fails."""
        with ThreadPoolExecutor(len(self.clients)) as threads:
            pending = [threads.submit(call, *each) for each in zip(self.clients, *given, strict=True)]
        try:
            return [future.result() for future in pending]
        except (Unanswered, Refused) as error:
            raise Failed(str(error)) from None

    def post(self, path: str, body: Any) -> list[Any]:
        """The same request to every server; Failed where one says that it did not succeed."""
        return self.post_each(path, [body] * len(self.clients))

    def post_each(self, path: str, bodies: Sequence[Any]) -> list[Any]:
        """A request of its own to every server; Failed where one says that it did not succeed."""
        answers = self.each(lambda client, body: client.post(path, body, self.timeout_s), bodies)
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
        """Close the session: the engine finishes what it does to loaded weights."""
        self.post("/end_weight_update", {})

    def derive(self) -> None:
        """Have the engine compute anew what it derives from weights, MLA's `w_kc` and `w_vc`: at the end of a session without loads."""
        self.post("/begin_weight_update", {"selector": "all"})
        self.post("/end_weight_update", {})

    def differing(self, wanted: Mapping[int, Mapping[str, str]], whole: bool = True) -> dict[str, Differences]:
        """What of every server is not as wanted: checksums of parameters by rank of a server. By place, for all of them.

        `whole`: all that such a rank has is wanted, and nothing else.
        """
        places = {}
        for client, answer in zip(self.clients, self.post("/weights_checker", {"action": "checksum"}), strict=True):
            for rank, sums in wanted.items():
                got = answer["ranks"][rank]["checksums"]
                names = sums.keys() | got.keys() if whole else sums.keys()
                wrong = tuple(sorted(name for name in names if sums.get(name) != got.get(name)))
                where = f"{client.address}, rank {rank}" if len(answer["ranks"]) > 1 else client.address
                places[where] = Differences(wrong, len(names))
        return places

    def compare(self, wanted: Mapping[int, Mapping[str, str]], whole: bool = True) -> None:
        """Failed, with the names of parameters that are not as wanted; see `differing`."""
        for where, found in self.differing(wanted, whole).items():
            if wrong := found.names:
                more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
                raise Failed(f"{where}: after the sync {', '.join(wrong[:4])}{more} are not the trainer's ({found.compared} compared)")

    def resume(self, version: int) -> None:
        """Serve the new weights under their version."""
        self.post("/flush_cache?timeout=60", {})
        self.post("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})
        self.post("/continue_generation", {})


def contents(bucket: Bucket) -> str:
    """A bucket's tensors in a few words, for a line that says what a server was taking."""
    names = [entry.name for entry in bucket.entries]
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]} ({len(names)} tensors)"


class Transport(Protocol):
    """How buckets of full tensors reach servers."""

    senders: Sequence[int] | None
    """Ranks that can send; None: every one."""
    room: Room | None
    """Where buckets have to be put together; None: anywhere."""

    def begin(self) -> None:
        """On rank 0, before the first bucket. Failed when servers are not ready for it."""

    def send(self, bucket: Bucket, flat: Tensor) -> None:
        """On the rank `bucket.sender`: uint8 [bucket.nbytes] to all servers. Failed when one does not take it."""

    def end(self) -> None:
        """On rank 0, after all buckets were sent."""

    def close(self) -> None:
        """Free what does not outlive a server."""


class ByTensor:
    """`tensor` and `request`: any rank can send. Ranks of servers on its own machine map its memory, all others are sent the bytes."""

    senders: Sequence[int] | None = None

    def __init__(self, control: Control, here: Sequence[Sequence[bool]], memory: Carrier | None) -> None:
        """`here[s][r]`: whether rank r of server s is on this machine; `memory`: for those that are, None where none is."""
        self._control, self._here, self._memory = control, here, memory
        self.room = memory.room if memory else None

    def begin(self) -> None:
        self._control.begin()

    def send(self, bucket: Bucket, flat: Tensor) -> None:
        content, near = flattened(bucket, flat), sum(map(sum, self._here)) if self._memory else 0
        shared = iter(self._memory.payloads(content, near) if self._memory else [])
        sent = iter(InBytes().payloads(content, sum(map(len, self._here)) - near))
        parts = [[next(shared if here and self._memory else sent) for here in server] for server in self._here]
        load(self._control, parts, "flattened_bucket", contents(bucket))

    def end(self) -> None:
        self._control.end()

    def close(self) -> None:
        if self._memory:
            self._memory.close()


def load(control: Control, payloads: Sequence[Sequence[str]], load_format: str, what: str) -> None:
    """Have servers load tensors; `payloads[s][r]` is for rank r of server s. Failed, saying `what`, where one does not."""
    bodies = [{"serialized_named_tensors": list(part), "load_format": load_format, "flush_cache": False} for part in payloads]
    try:
        control.post_each("/update_weights_from_tensor", bodies)
    except Failed as error:
        raise Failed(f"{error}, while it loaded {what}") from None


class ByDisk:
    """`disk`: safetensors files in a folder that servers see too."""

    senders: Sequence[int] | None = None
    room: Room | None = None

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
