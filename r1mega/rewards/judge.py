"""Judging responses in processes that can be killed.

A reward runs a policy's text through parsers and regular expressions, and sooner or later one of them runs for ever inside C, where
no signal handler and no thread gets a turn. Each worker is therefore a process of its own, watched from here.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from r1mega.config.rollout import Reward
from r1mega.data.prompts import Prompt
from r1mega.errors import UserError
from r1mega.rewards.worker import pack

_START_S = 120.0
"""Seconds that a worker may take to start and import, on a file system that a whole cluster reads at that moment."""

_LARGEST_BATCH = 64
_BATCHES_PER_WORKER = 4
"""Cases are sent in batches, a round trip each; the more batches, the later a slow one leaves the other workers idle."""

_BOOTSTRAP = "import sys; sys.path[:] = sys.argv[1:]; from r1mega.rewards.worker import main; main()"
"""Neither `spawn` nor `forkserver` will do: both import the parent's main module again, and torch with it."""


@dataclass(frozen=True)
class Verdict:
    """The outcome of one reward for one response: a finite number, or None and the reason why it could not be judged."""

    value: float | None
    reason: str | None


class Judge:
    """Reward functions and the processes that run them. Not for several threads at once."""

    def __init__(self, rewards: Mapping[str, Reward], workers: int, search_path: Sequence[Path] = (), memory: int = 8 << 30) -> None:
        """Start `workers` processes, each with every function imported.

        `search_path` are folders with modules that are not installed. `memory` is the most bytes a worker may allocate: `10^{10^{12}}`
        is a short answer. Raises UserError if a function cannot be imported or does not take (prompt, response).
        """
        self._rewards = dict(rewards)
        setup = {
            "functions": {name: reward.function for name, reward in rewards.items()},
            "search_path": [str(folder.resolve()) for folder in search_path],
            "memory": memory,
        }
        self._workers = [_Worker(setup) for _ in range(workers)]
        self._selector = selectors.DefaultSelector()
        try:
            for worker in self._workers:
                self._start(worker)
            while not all(worker.ready for worker in self._workers):
                for worker in self._readable():
                    worker.read()
        except BaseException:
            self.close()
            raise

    def judge(self, items: Sequence[tuple[Prompt | str, str]], wanted: Sequence[Collection[str]] | None = None) -> list[dict[str, Verdict]]:
        """One verdict per reward for each (prompt, response), in order; of each item only the rewards that `wanted` names, if given.

        A reward that exceeds its deadline or ends its process is not judged; whatever shared its batch is judged again elsewhere.
        """
        for worker in self._workers:
            if worker.sent:  # left over from a call that was interrupted
                self._restart(worker)
        verdicts: dict[tuple[int, str], Verdict] = {}
        asked = wanted or [self._rewards] * len(items)
        waiting = deque((index, name) for index, names in enumerate(asked) for name in names)
        total = len(waiting)
        batch = min(_LARGEST_BATCH, -(-total // (_BATCHES_PER_WORKER * len(self._workers))))
        while len(verdicts) < total:
            for worker in self._workers:
                if not (worker.ready and waiting) or worker.sent:
                    continue
                if worker.process.poll() is not None:  # it died idle, by no case's fault
                    self._restart(worker)
                    continue
                worker.sent.extend(waiting.popleft() for _ in range(min(batch, len(waiting))))
                worker.write(pack([(name, *items[index]) for index, name in worker.sent]))
                self._watch(worker)
            for worker in self._readable():
                for verdict in worker.read():
                    verdicts[worker.sent.popleft()] = verdict
                    self._watch(worker)
                if worker.ended:
                    self._give_up(worker, f"its process ended with {worker.exit_code()}", verdicts, waiting)
            for worker in self._workers:
                if worker.sent and time.monotonic() > worker.deadline:
                    seconds = self._rewards[worker.sent[0][1]].deadline_s
                    self._give_up(worker, f"no verdict within {seconds:g} s; its process was killed", verdicts, waiting)
        return [{name: verdicts[index, name] for name in names} for index, names in enumerate(asked)]

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.kill()
        self._selector.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _watch(self, worker: "_Worker") -> None:
        """Start the clock of the case that the worker is now at."""
        if worker.sent:
            worker.deadline = time.monotonic() + self._rewards[worker.sent[0][1]].deadline_s

    def _give_up(self, worker: "_Worker", reason: str, verdicts: dict[tuple[int, str], Verdict], waiting: deque[tuple[int, str]]) -> None:
        """The case that the worker is at is not judged, the rest of its batch goes back, and another process takes its place."""
        if worker.sent:
            verdicts[worker.sent.popleft()] = Verdict(None, reason)
        waiting.extendleft(reversed(worker.sent))
        self._restart(worker)

    def _restart(self, worker: "_Worker") -> None:
        self._selector.unregister(worker.pipe)
        worker.kill()
        self._start(worker)

    def _start(self, worker: "_Worker") -> None:
        worker.start()
        self._selector.register(worker.pipe, selectors.EVENT_READ, worker)

    def _readable(self) -> list["_Worker"]:
        """Wait until a worker has written or a deadline has passed."""
        deadlines = [worker.deadline for worker in self._workers if worker.sent or not worker.ready]
        timeout = max(0.0, min(deadlines) - time.monotonic())
        events = self._selector.select(timeout)
        for worker in self._workers:
            if not worker.ready and time.monotonic() > worker.deadline:
                raise UserError(f"a judge did not import {worker.functions} within {_START_S:g} s")
        return [key.data for key, _ in events]


class _Worker:
    """One process, the tasks sent to it that it has not answered, and the time by which it must answer the first."""

    process: subprocess.Popen[bytes]
    pipe: int

    def __init__(self, setup: Mapping[str, Any]) -> None:
        self._setup = setup
        self.functions = ", ".join(setup["functions"].values())
        self.sent: deque[tuple[int, str]] = deque()
        self.ready = False

    def start(self) -> None:
        path = [os.path.abspath(folder) for folder in sys.path]
        # A session of its own, so that what a reward starts is killed with it and Ctrl-C reaches the trainer alone.
        self.process = subprocess.Popen(
            [sys.executable, "-c", _BOOTSTRAP, *path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        assert self.process.stdout is not None
        self.pipe = self.process.stdout.fileno()
        self.sent.clear()
        self.ready = self.ended = False
        self.deadline = time.monotonic() + _START_S
        self._unread = b""
        self.write(self._setup)

    def write(self, message: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # its end is seen where it is read
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def read(self) -> list[Verdict]:
        """The verdicts that have arrived. The first message of all says that the worker is ready, or raises what it refused."""
        data = os.read(self.pipe, 1 << 20)
        self.ended = not data
        *lines, self._unread = (self._unread + data).split(b"\n")
        if not self.ready:
            if self.ended:
                raise UserError(f"a judge that imported {self.functions} ended with {self.exit_code()}")
            if lines:
                hello = json.loads(lines.pop(0))
                if "refused" in hello:
                    raise UserError(hello["refused"])
                self.ready = True
        return [Verdict(value, reason) for value, reason in json.loads(b"[" + b",".join(lines) + b"]")]

    def exit_code(self) -> str:
        code = self.process.wait()
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def kill(self) -> None:
        if not hasattr(self, "process"):
            return
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with suppress(BrokenPipeError):  # what was not flushed is lost with the worker
                stream.close()
