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
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from types import MappingProxyType, TracebackType
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


Item = tuple[Prompt | str, str]
"""What is judged: a prompt and a response, or two answers."""


@dataclass(frozen=True)
class Verdict:
    """The outcome of one reward for one response: a finite number, or None and the reason why it could not be judged."""

    value: float | None
    reason: str | None
    text: str | None = None
    """What one said that returns a text, or None."""


class _Call:
    """What one caller has asked, and what of it is judged."""

    def __init__(self, items: Sequence[Item], wanted: Sequence[Collection[str]]) -> None:
        self.items, self._wanted = items, wanted
        self.answer = Future[list[dict[str, Verdict]]]()
        self.cases: list[_Case] = [(self, index, name) for index, names in enumerate(wanted) for name in names]
        self._verdicts: dict[tuple[int, str], Verdict] = {}
        self._again: set[tuple[int, str]] = set()
        self._settle()

    def take(self, index: int, name: str, verdict: Verdict) -> None:
        """Keep a verdict; with the last one the caller is answered."""
        self._verdicts[index, name] = verdict
        self._settle()

    def once_more(self, index: int, name: str) -> bool:
        """Whether a case may be judged again whose process ended: the machine, short of memory, may have picked that one."""
        first = (index, name) not in self._again
        self._again.add((index, name))
        return first

    def _settle(self) -> None:
        if len(self._verdicts) == len(self.cases):
            found = [{name: self._verdicts[index, name] for name in names} for index, names in enumerate(self._wanted)]
            self.answer.set_result(found)


_Case = tuple[_Call, int, str]
"""One verdict to come: the call, the item's place in it, the reward's name."""


class Judge:
    """Reward functions, the processes that run them, and the thread that deals out what any thread asks."""

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        workers: int,
        search_path: Sequence[Path] = (),
        memory: int = 8 << 30,
        texts: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        """Start `workers` processes, each with every function imported.

        `search_path` are folders with modules that are not installed. `memory` is the most bytes a worker may allocate: `10^{10^{12}}`
        is a short answer. `texts` are those of the functions that return a text or None, with the number of their arguments: a response
        alone, or its prompt before it. Raises UserError if a function cannot be imported or does not take (prompt, response).
        """
        self._rewards = dict(rewards)
        setup = {
            "functions": {name: reward.function for name, reward in rewards.items()},
            "texts": dict(texts),
            "search_path": [str(folder.resolve()) for folder in search_path],
            "memory": memory,
        }
        self._workers = [_Worker(setup) for _ in range(workers)]
        self._selector = selectors.DefaultSelector()
        self._calls = SimpleQueue[_Call | None]()
        self._waiting = deque[_Case]()
        # The thread sleeps until a worker writes; a byte in this pipe says that there is a call.
        self._bell, self._ring = os.pipe()
        self._selector.register(self._bell, selectors.EVENT_READ)
        self._failure: Exception | None = None
        self._thread = Thread(target=self._serve, name="judge", daemon=True)
        try:
            for worker in self._workers:
                self._start(worker)
            while not all(worker.ready for worker in self._workers):
                for worker in self._readable():
                    worker.read()
        except BaseException:
            self._end()
            raise
        self._thread.start()

    def judge(self, items: Sequence[Item], wanted: Sequence[Collection[str]] | None = None) -> list[dict[str, Verdict]]:
        """One verdict per reward for each (prompt, response), in order; of each item only the rewards that `wanted` names, if given.

        A reward that exceeds its deadline, or ends its process twice, is not judged; whatever shared its batch is judged again elsewhere.
        """
        return self.ask(items, wanted).result()

    def ask(self, items: Sequence[Item], wanted: Sequence[Collection[str]] | None = None) -> "Future[list[dict[str, Verdict]]]":
        """What `judge` returns, later. Calls under way at the same time are judged side by side."""
        call = _Call(items, wanted or [self._rewards] * len(items))
        if call.cases:
            self._put(call)
        return call.answer

    def close(self) -> None:
        """End the workers. What has not been judged by then is not answered."""
        self._put(None)
        self._thread.join()
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _put(self, call: _Call | None) -> None:
        self._calls.put(call)
        os.write(self._ring, b"!")
        if self._failure is not None:
            self._fail(self._failure)

    def _end(self) -> None:
        for worker in self._workers:
            worker.kill()
        self._selector.close()
        os.close(self._bell)
        os.close(self._ring)

    # -------------------------------------------------------- the thread

    def _serve(self) -> None:
        try:
            while self._take_calls():
                self._deal()
                for worker in self._readable():
                    self._take_verdicts(worker)
                for worker in self._workers:
                    if worker.sent and time.monotonic() > worker.deadline:
                        seconds = self._rewards[worker.sent[0][2]].deadline_s
                        self._give_up(worker, f"no verdict within {seconds:g} s; its process was killed")
        except Exception as error:  # noqa: BLE001 - whatever ends this thread has to reach those who wait for it
            self._failure = error
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Answer every open call with what ended the thread."""
        self._take_calls()
        for call, *_ in [*self._waiting, *(case for worker in self._workers for case in worker.sent)]:
            if not call.answer.done():
                call.answer.set_exception(error)

    def _take_calls(self) -> bool:
        """Whether the judge is to go on."""
        while True:
            try:
                call = self._calls.get_nowait()
            except Empty:
                return True
            if call is None:
                return False
            self._waiting.extend(call.cases)

    def _deal(self) -> None:
        """Give waiting cases to idle workers."""
        for worker in self._workers:
            if not self._waiting:
                return
            # One that died idle has no part in what it would be sent; its end is read where verdicts are.
            if worker.sent or not worker.ready or worker.process.poll() is not None:
                continue
            batch = min(_LARGEST_BATCH, -(-len(self._waiting) // (_BATCHES_PER_WORKER * len(self._workers))))
            worker.sent.extend(self._waiting.popleft() for _ in range(batch))
            worker.write(pack([(name, *call.items[index]) for call, index, name in worker.sent]))
            self._watch(worker)

    def _take_verdicts(self, worker: "_Worker") -> None:
        for verdict in worker.read():
            call, index, name = worker.sent.popleft()
            call.take(index, name, verdict)
            self._watch(worker)
        if worker.ended:
            if worker.sent and worker.sent[0][0].once_more(*worker.sent[0][1:]):
                self._waiting.append(worker.sent.popleft())
                self._replace(worker)
            else:
                self._give_up(worker, f"its process ended with {worker.exit_code()}")

    def _watch(self, worker: "_Worker") -> None:
        """Start the clock of the case that the worker is now at."""
        if worker.sent:
            worker.deadline = time.monotonic() + self._rewards[worker.sent[0][2]].deadline_s

    def _give_up(self, worker: "_Worker", reason: str) -> None:
        """The case that the worker is at is not judged, the rest of its batch goes back, and another process takes its place."""
        if worker.sent:
            call, index, name = worker.sent.popleft()
            call.take(index, name, Verdict(None, reason))
        self._replace(worker)

    def _replace(self, worker: "_Worker") -> None:
        """Another process in place of this one, whose cases go back."""
        self._waiting.extendleft(reversed(worker.sent))
        self._selector.unregister(worker.pipe)
        worker.kill()
        self._start(worker)

    def _start(self, worker: "_Worker") -> None:
        worker.start()
        self._selector.register(worker.pipe, selectors.EVENT_READ, worker)

    def _readable(self) -> list["_Worker"]:
        """Wait until a worker has written, a deadline has passed or there is a call."""
        deadlines = [worker.deadline for worker in self._workers if worker.sent or not worker.ready]
        timeout = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
        events = self._selector.select(timeout)
        for worker in self._workers:
            if not worker.ready and time.monotonic() > worker.deadline:
                raise UserError(f"a judge did not import {worker.functions} within {_START_S:g} s")
        found = [key.data for key, _ in events]
        if None in found:
            os.read(self._bell, 1 << 16)
        return [worker for worker in found if worker is not None]


class _Worker:
    """One process, the tasks sent to it that it has not answered, and the time by which it must answer the first."""

    process: subprocess.Popen[bytes]
    pipe: int

    def __init__(self, setup: Mapping[str, Any]) -> None:
        self._setup = setup
        self.functions = ", ".join(setup["functions"].values())
        self.sent = deque[_Case]()
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
        return [Verdict(*said) for said in json.loads(b"[" + b",".join(lines) + b"]")]

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
