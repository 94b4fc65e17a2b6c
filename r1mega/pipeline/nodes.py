"""A stage on several nodes: where its ranks meet, and what becomes of each of its attempts.

Every node starts `r1mega run --stage`, by Slurm for instance. The first one claims the stage, opens a port and says so in a file of the
run directory, which all nodes see; the others wait for that file. So no port is fixed and no host name is guessed from a list of nodes.
"""

import json
import socket
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from r1mega.env import Task
from r1mega.errors import UserError
from r1mega.pipeline import files

ALONE = Task(node=0, nodes=1, job="", restart=0)
_MEET_S = 1800.0
"""The first node reads weights' headers and every prompt before it opens the meeting."""

Outcome = Literal["finished", "stopped", "hung", "refused", "failed"]
"""`stopped`: by a signal, to go on later; `hung`: ended for it, to go on later; `refused`: a UserError, which another attempt would meet
again."""


@dataclass(frozen=True)
class Meeting:
    """Where the ranks of an attempt meet."""

    host: str
    port: int

    def torchrun(self, task: Task, name: str, ranks: int, restarts: int) -> list[str]:
        """Arguments of torchrun on this node, for `ranks` processes on all.

        Args:
            name: of the attempt, the same on every node and in no other attempt.
            restarts: how often all are started anew, in place, when one of them dies.
        """
        return [
            f"--nnodes={task.nodes}",
            f"--nproc-per-node={ranks // task.nodes}",
            f"--max-restarts={restarts}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={self.host}:{self.port}",
            f"--rdzv-id={name}",
            # Torchrun would compare host names to find out who keeps the store; nodes of one machine have the same.
            f"--rdzv-conf=is_host={'true' if task.node == 0 else 'false'}",
            f"--local-addr={socket.gethostname()}",
        ]


@dataclass(frozen=True)
class Attempt:
    """The record of one start of a stage, `attempt.json` in its folder of logs. Without an outcome it runs, or was lost with its node."""

    stage: str
    job: str
    restart: int
    nodes: int
    ranks: int
    began: str
    """UTC, ISO 8601."""
    ended: str | None = None
    outcome: Outcome | None = None
    reason: str = ""
    """One line: the signal, or the error."""

    def write(self, folder: Path) -> None:
        files.write_json(folder / "attempt.json", asdict(self))


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def folder_of(logs: Path, stage: str, task: Task) -> Path:
    """The folder of an attempt's logs, the same on every node. Without Slurm, starts are numbered."""
    if task.job:
        return logs / stage / task.attempt
    return logs / stage / f"start-{len(list((logs / stage).glob('start-*'))) + 1}"


def attempts(logs: Path, stage: str) -> list[tuple[Path, Attempt]]:
    """The attempts of a stage and their folders, in order of time."""
    found = [(path.parent, files.read_json(path)) for path in (logs / stage).glob("*/attempt.json")]
    return sorted(((folder, Attempt(**record)) for folder, record in found), key=lambda entry: (entry[1].began, entry[1].restart))


def outcome(folder: Path) -> Outcome | None:
    """How the attempt with this folder of logs has ended; None when it has not."""
    found = files.read_json(folder / "attempt.json")
    return Attempt(**found).outcome if found else None


def open_meeting(folder: Path) -> Meeting:
    """Choose a port of this node and tell the others."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        meeting = Meeting(socket.gethostname(), probe.getsockname()[1])
    files.write_json(folder / "meeting.json", asdict(meeting))
    return meeting


def find_meeting(folder: Path, seconds: float = _MEET_S) -> Meeting:
    """Wait for what the first node says. UserError when it says nothing for so long."""
    deadline = time.monotonic() + seconds
    while True:
        found: Any = None
        try:
            found = files.read_json(folder / "meeting.json")
        except (json.JSONDecodeError, OSError):
            pass  # a shared file system may show a file before its content
        if found is not None:
            return Meeting(**found)
        if time.monotonic() > deadline:
            raise UserError(f"no word from the first node in {seconds:g} s; is {folder} on a file system that all nodes share?")
        time.sleep(0.2)
