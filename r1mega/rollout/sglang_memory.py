"""The memory of servers that share the trainer's GPUs: given back while the trainer trains, and taken again piece by piece.

On a CPU SGLang says yes to all of this and frees nothing: it has no memory saver there.
"""

from collections import defaultdict
from typing import Literal

from r1mega.rollout.sglang_client import Client
from r1mega.rollout.sglang_sync import Control

Region = Literal["weights", "kv_cache"]


class Memory:
    """Which server has given back what. It lives on rank 0, as the servers do; a server that replaces another has all of its own."""

    def __init__(self) -> None:
        self._released: dict[str, set[Region]] = defaultdict(set)

    def release(self, control: Control) -> None:
        """Pause the servers and take their weights and caches from them. Failed where one does not answer."""
        control.pause()
        # A server that is not idle dies of it; this waits for the last abort to be through.
        control.post("/flush_cache?timeout=60", {})
        control.each(lambda client: self._release(control, client))

    def resume(self, control: Control, region: Region) -> None:
        """Have a region again, filled with nothing in particular. Servers that have it are left alone."""
        control.each(lambda client: self._resume(control, client, region))

    def _release(self, control: Control, client: Client) -> None:
        held = self._released[client.address]
        regions: list[Region] = [region for region in ("kv_cache", "weights") if region not in held]
        if regions:
            client.post("/release_memory_occupation", {"tags": regions}, control.timeout_s)
            held.update(regions)

    def _resume(self, control: Control, client: Client, region: Region) -> None:
        held = self._released[client.address]
        if region in held:
            client.post("/resume_memory_occupation", {"tags": [region]}, control.timeout_s)
            held.discard(region)
