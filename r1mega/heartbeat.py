"""What a rank is doing, for whoever watches it: a line in a file of its own, written in place when the phase changes.

`pipeline/hangs` reads it. A process without a `start`, such as a test or a notebook, has no heart, and every call here does nothing.
"""

import faulthandler
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

Phase = Literal["setup", "generate", "judge", "logprobs", "train", "sync", "save", "evaluate"]
"""What ranks do together. Every rank enters every phase, or their numbers of phases would say nothing."""

STACK_SIGNAL = signal.SIGUSR2
"""Makes a rank write the stacks of its threads, whatever it is doing: faulthandler's handler needs no interpreter."""

_ROOM = 4096
"""Bytes of the file, written at once when it is made: a disk that fills up later has room for what comes into their place."""


@dataclass(frozen=True)
class Beat:
    """One look at a rank."""

    pid: int
    phase: Phase | Literal["done"]
    since: float
    """When the phase began, or was last known to get on: seconds of this machine's monotonic clock, which all of its processes share."""
    count: int = 0
    """Phases begun. Ranks that are at the same place have the same."""
    waits_for: str = ""
    """In words, where it is something other than a rank."""
    failed: str = ""
    """Why this rank ended, where it could write no file that says so: the disk is full, or gone."""


class _Heart:
    def __init__(self, path: Path, stacks: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        self._stacks = stacks.open("ab")
        faulthandler.enable(self._stacks)
        faulthandler.register(STACK_SIGNAL, self._stacks, all_threads=True)
        self.left: int | None = None
        self.beat = Beat(os.getpid(), "setup", time.monotonic())
        self.write()

    def write(self, **changes: object) -> None:
        self.beat = replace(self.beat, **changes)  # type: ignore[arg-type]
        with suppress(OSError):  # a full disk is told of where something is lost by it
            os.pwrite(self._file, json.dumps(asdict(self.beat)).encode()[:_ROOM].ljust(_ROOM), 0)

    def enter(self, phase: Phase) -> None:
        self.left = None
        self.write(phase=phase, since=time.monotonic(), count=self.beat.count + 1, waits_for="")


_heart: _Heart | None = None


def start(path: Path, stacks: Path) -> None:
    """Keep the file `path` from now on, and write stacks to another, at `STACK_SIGNAL` and at a crash in native code."""
    global _heart
    _heart = _Heart(path, stacks)


@contextmanager
def phase(name: Phase) -> Iterator[None]:
    """Be in a phase for as long as the block lasts, then in the one before, whose time begins anew. In the main thread only."""
    if _heart is None:
        yield
        return
    before = _heart.beat.phase
    _heart.enter(name)
    yield
    # Not after an error: the phase in which it happened is what a reader wants to know.
    if before != "done":
        _heart.enter(before)


def waiting(left: int, what: str) -> None:
    """Say that the phase waits for `left` more of something, the same number on every rank. Whenever it changes, the time begins anew."""
    if _heart is not None:
        fresh = {} if left == _heart.left else {"since": time.monotonic()}
        _heart.left = left
        _heart.write(waits_for=what, **fresh)


def end(failed: str = "") -> None:
    """Nothing is expected of this rank any more; `failed` says why, where that is an error."""
    if _heart is not None:
        _heart.write(phase="done", failed=failed[: _ROOM // 2])


def read(path: Path) -> Beat | None:
    """The beat in a file; None where it is being written at this moment."""
    with suppress(OSError, ValueError, TypeError):
        return Beat(**json.loads(path.read_bytes()))
    return None
