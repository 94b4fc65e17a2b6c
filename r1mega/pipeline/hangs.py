"""Who hangs, where, and since when: watched on every node by the process that started its ranks, which is none of them.

A node's watch looks at its own ranks. When one has been in its phase for longer than the phase's deadline, all watches of the run
collect the stacks of their ranks, tell one another what they see in files of the run directory, and come to the same verdict.
The first node prints it; every node ends its ranks. Torchrun starts them again in place where it may (`restarts`), or the run ends
with the exit code `HUNG`, and goes on from its last checkpoint when it is started again.
"""

import os
import re
import shutil
import signal
import subprocess
import sysconfig
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from r1mega import heartbeat
from r1mega.config.deadlines import Deadlines
from r1mega.heartbeat import Beat
from r1mega.pipeline import files

HUNG = 75
"""Exit code of a run that was ended because it hung: EX_TEMPFAIL of sysexits.h, for which another attempt is worth it."""

_START_S = 600.0
"""In which torchrun has met its like on other nodes, or given up, and started ranks."""
_ANSWER_S = 5.0
"""In which a process that runs at all has written its stacks."""
_MEET_S = 30.0
"""In which other nodes, if they are there, have said what they see, on a shared file system that may be slow to show it."""
_SPY_S = 20.0
_FRAME = re.compile(r'^  File "(?P<file>.+)", line (?P<line>\d+) in (?P<function>.+)$', re.MULTILINE)
_COLLECTIVES = ("torch/distributed/", "pipeline_parallel/p2p_communication.py")
_LIBRARY = sysconfig.get_path("stdlib")
_STATES = {
    psutil.STATUS_STOPPED: "it is stopped by a signal (kill -CONT {pid} lets it go on)",
    psutil.STATUS_TRACING_STOP: "a debugger holds it",
    psutil.STATUS_DISK_SLEEP: "it waits in the kernel, for a file system or a driver that does not answer",
}


@dataclass(frozen=True)
class Seen:
    """What there is to see of one rank."""

    rank: int
    phase: str
    seconds: float
    """Since the phase began."""
    deadline_s: float
    count: int
    """Phases begun: how far the rank has got."""
    trouble: str = ""
    """Why its process does not run, or does not answer; empty where it does."""
    at: str = ""
    """The innermost Python frame of its main thread."""
    waits: bool = False
    """Whether that is a collective's: then another rank keeps it waiting."""
    waits_for: str = ""

    @property
    def overdue(self) -> bool:
        return self.seconds > self.deadline_s


@dataclass(frozen=True)
class Verdict:
    """The rank that keeps the others waiting, as far as can be told, and the line that says so."""

    rank: int
    line: str


def blame(ranks: Sequence[Seen]) -> Verdict:
    """Find the culprit among all ranks, of which one is overdue at least.

    A process that does not run keeps the others waiting wherever they are. Then whoever is busy outside of collectives, the one that has
    got the least far first. When all wait in collectives, it is the one that has got the least far: it never reached those of the others.
    (NCCL's collectives return at once; a rank then waits where it needs the result, which looks like work. There the counts decide.)
    """
    culprit = min(ranks, key=lambda one: (not one.trouble, one.waits, one.count, one.seconds))
    first = max(ranks, key=lambda one: one.seconds - one.deadline_s)
    told = f"hang: rank {culprit.rank} has been in {culprit.phase} for {culprit.seconds:.0f} s"
    if culprit.overdue:
        told += f" (run.deadlines.{culprit.phase} is {culprit.deadline_s:g})"
    else:
        told += f", and rank {first.rank} in {first.phase} for {first.seconds:.0f} s (run.deadlines.{first.phase} is {first.deadline_s:g})"
    others = [one for one in ranks if one is not culprit]
    if culprit.trouble:
        told += f": {culprit.trouble}"
    elif culprit.waits_for:
        told += f": it waits for {culprit.waits_for}"
    elif culprit.waits and len({one.count for one in ranks}) == 1:
        told += f": like all others it waits in a collective, at {culprit.at}: look at the network"
    else:
        told += f", at {culprit.at}" if culprit.at else ""
    waiting = sum(one.waits for one in others)
    if waiting and not all(one.waits for one in ranks):
        told += f"; {waiting} of {len(others)} other ranks wait in collectives"
    return Verdict(culprit.rank, told)


class Watch:
    """The ranks of one node."""

    def __init__(self, logs: Path, deadlines: Deadlines, ranks: int, node: int = 0, nodes: int = 1) -> None:
        """`ranks`: how many there are on this node. `logs` is the folder of logs that all nodes of the attempt share."""
        self._logs, self._deadlines, self._ranks, self._node, self._nodes = logs, deadlines, ranks, node, nodes
        self._beats = logs / "beats" / str(node)
        shutil.rmtree(self._beats, ignore_errors=True)
        self._beats.mkdir(parents=True)
        self._look_s = min(5.0, max(0.2, min(deadlines.model_dump().values()) / 20))
        self._next, self._begin = 0.0, time.monotonic()
        self._over: set[int] = set()
        self._hangs = len(list(logs.glob("hang-*")))

    @property
    def leads(self) -> bool:
        """Whether this is the first node, which speaks for all."""
        return self._node == 0

    @property
    def begun(self) -> bool:
        """Whether ranks have begun since the last hang."""
        return any(beat.pid not in self._over for beat in self._all().values())

    def look(self) -> Verdict | None:
        """Look at the ranks now and then; at a hang, collect and end them. None while all is well."""
        if time.monotonic() < self._next:
            return None
        self._next = time.monotonic() + self._look_s
        folder = self._logs / f"hang-{self._hangs + 1}"
        beats = self._running()
        if not (folder.is_dir() or self._late(beats) or any(self._overdue(beat) for beat in beats.values())):
            return None
        folder.mkdir(exist_ok=True)
        seen = self._collected(beats, folder)
        files.write_json(folder / f"node-{self._node}.json", [asdict(one) for one in seen])
        verdict = self._agreed(folder)
        self._end(beats, verdict.rank)
        return verdict

    def last_words(self) -> list[str]:
        """Why ranks of this node failed, of those that could not write it into a file of their own."""
        return [beat.failed for beat in self._all().values() if beat.failed]

    # -------------------------------------------------------- looking

    def _all(self) -> dict[int, Beat]:
        found = ((int(path.name), heartbeat.read(path)) for path in sorted(self._beats.iterdir()))
        return {rank: beat for rank, beat in found if beat is not None}

    def _running(self) -> dict[int, Beat]:
        """Beats of the processes that are there, without those of an earlier hang."""
        return {
            rank: beat
            for rank, beat in self._all().items()
            if beat.phase != "done" and beat.pid not in self._over and _status(beat.pid) not in ("", psutil.STATUS_ZOMBIE)
        }

    def _overdue(self, beat: Beat) -> bool:
        return time.monotonic() - beat.since > self._deadline(beat)

    def _deadline(self, beat: Beat) -> float:
        return float(getattr(self._deadlines, beat.phase))

    def _late(self, beats: dict[int, Beat]) -> bool:
        """Whether ranks have not begun in the time that they have for it."""
        begun = sum(beat.pid not in self._over for beat in self._all().values())
        return begun < self._ranks and time.monotonic() - self._begin > self._deadlines.setup + _START_S

    # -------------------------------------------------------- collecting

    def _collected(self, beats: dict[int, Beat], folder: Path) -> list[Seen]:
        now = time.monotonic()
        begun = {rank: self._stacks(rank).stat().st_size for rank in beats}
        for beat in beats.values():
            with suppress(ProcessLookupError):
                os.kill(beat.pid, heartbeat.STACK_SIGNAL)
        found = [self._seen(rank, beat, now, begun[rank]) for rank, beat in beats.items()]
        for rank, beat in beats.items():
            with self._stacks(rank).open(errors="replace") as file:
                file.seek(begun[rank])
                text = file.read() or _spied(beat.pid) or "it did not answer\n"
            (folder / f"rank{rank}.txt").write_text(text, encoding="utf-8")
        return found

    def _stacks(self, rank: int) -> Path:
        return self._logs / f"rank{rank}.stacks"

    def _seen(self, rank: int, beat: Beat, now: float, begun: int) -> Seen:
        path, end = self._stacks(rank), now + _ANSWER_S
        state = _STATES.get(_status(beat.pid), "").format(pid=beat.pid)
        while not (state or path.stat().st_size > begun or time.monotonic() > end):
            time.sleep(0.05)
        time.sleep(0.05)  # the rest of what it writes
        at, waits = _innermost(path.read_bytes()[begun:].decode(errors="replace"))
        trouble = state or ("" if at else "it does not answer a signal")
        return Seen(rank, beat.phase, now - beat.since, self._deadline(beat), beat.count, trouble, at, waits, beat.waits_for)

    def _agreed(self, folder: Path) -> Verdict:
        """The verdict on what all nodes saw; on what is known, where some of them say nothing."""
        end = time.monotonic() + (_MEET_S if self._nodes > 1 else 0.0)
        while len(list(folder.glob("node-*.json"))) < self._nodes and time.monotonic() < end:
            time.sleep(0.2)
        said = {path.stem.removeprefix("node-"): files.read_json(path) for path in sorted(folder.glob("node-*.json"))}
        ranks = [Seen(**one) for seen in said.values() for one in seen]
        silent = [str(node) for node in range(self._nodes) if str(node) not in said]
        if not ranks:
            begun = f"{len(self._all())} of {self._ranks} ranks of node {self._node}"
            verdict = Verdict(-1, f"hang: in {self._deadlines.setup:g} s (run.deadlines.setup) only {begun} have begun")
        else:
            verdict = blame(ranks)
        more = f"; nothing is heard of node {', '.join(silent)}" if silent else ""
        return Verdict(verdict.rank, f"{verdict.line}{more}; stacks of all ranks: {folder}")

    # -------------------------------------------------------- ending

    def _end(self, beats: dict[int, Beat], culprit: int) -> None:
        """Kill the ranks, the culprit last: what the others would say of its death helps nobody."""
        # Also of those that were done before the others hung: they have not begun since.
        self._over |= {beat.pid for beat in (*beats.values(), *self._all().values())}
        for rank in sorted(beats, key=lambda rank: rank == culprit):
            with suppress(ProcessLookupError):
                os.kill(beats[rank].pid, signal.SIGKILL)
        self._hangs, self._begin = self._hangs + 1, time.monotonic()


def _status(pid: int) -> str:
    try:
        return psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return ""


def _innermost(dump: str) -> tuple[str, bool]:
    """Where faulthandler found the main thread, which it writes last, and whether that is in a collective."""
    frames = list(_FRAME.finditer(dump.rpartition("(most recent call first):")[2]))
    if not frames:
        return "", False
    waits = any(name in frame["file"] for frame in frames[:3] for name in _COLLECTIVES)
    # Of a collective or of Python's own library the caller is of interest, not where in them it is.
    own = next((one for one in frames if not (_is_library(one["file"]) or (waits and "torch/" in one["file"]))), frames[0])
    return f"{Path(own['file']).name}:{own['line']} in {own['function']}", waits


def _is_library(file: str) -> bool:
    return file.startswith("<frozen") or (file.startswith(_LIBRARY) and "-packages/" not in file)


def _spied(pid: int) -> str:
    """What py-spy, if it is installed, sees of a process that does not answer."""
    spy = shutil.which("py-spy")
    if spy is None:
        return ""
    try:
        return subprocess.run([spy, "dump", "--nonblocking", "--pid", str(pid)], capture_output=True, text=True, timeout=_SPY_S).stdout
    except subprocess.TimeoutExpired:
        return ""
