"""The memory of servers that share the trainer's GPUs: given back while the trainer trains, and taken again piece by piece.

On a CPU SGLang says yes to all of this and frees nothing: it has no memory saver there.
"""

from collections import defaultdict
from typing import Literal

from r1mega.rollout.sglang_client import Client
from r1mega.rollout.sglang_sync import Control

Part = Literal["weights", "kv_cache"]


class Memory:
    """Which server has given back what. It lives on rank 0, as the servers do; a server that replaces another has all of its own."""

    def __init__(self) -> None:
        self._released: dict[str, set[Part]] = defaultdict(set)

    def release(self, control: Control) -> None:
        """Pause the servers and take their weights and caches from them. Failed where one does not answer."""
        control.pause()
        # A server that is not idle dies of it; this waits for the last abort to be through.
        control.post("/flush_cache?timeout=60", {})
        control.each(lambda client: self._release(control, client))

    def resume(self, control: Control, part: Part) -> None:
        """Have a part again, filled with nothing in particular. Servers that have it are left alone."""
        control.each(lambda client: self._resume(control, client, part))

    def _release(self, control: Control, client: Client) -> None:
        held = self._released[client.address]
        parts: list[Part] = [part for part in ("kv_cache", "weights") if part not in held]
        if parts:
            client.post("/release_memory_occupation", {"tags": parts}, control.timeout_s)
            held.update(parts)

    def _resume(self, control: Control, client: Client, part: Part) -> None:
        held = self._released[client.address]
        if part in held:
            client.post("/resume_memory_occupation", {"tags": [part]}, control.timeout_s)
            held.discard(part)
