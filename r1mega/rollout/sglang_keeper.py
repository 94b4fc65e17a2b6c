"""Parts of servers on the nodes of a job: every node's task keeps those that rank 0 has ordered there, told by small files that all see.

In the folder of an engine's logs, `nodes/<n>` is node n's:

here.json           the keeper is there
<part>.key          mode 0600, the API key of a server that is to listen there; the keeper takes it away as it starts the part
<part>.order.json   this part is wanted, until the file is gone
<part>.state.json   the keeper has begun it; gone when it has ended it

So what a rank 0 that died has ordered ends when the next one begins (`forget`), and all of it ends with the job.
"""

import os
import signal
import socket
import time
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from r1mega.pipeline import files
from r1mega.rollout.sglang_part import Order, Part, State, address_towards

ENGINE = "engine"
"""Folder of an engine's logs, below those of a run or of an attempt at a stage."""
LOOK_S = 0.5
_GONE_S = 30.0
_ORDER, _STATE, _KEY = ".order.json", ".state.json", ".key"


class Keeper:
    """Starts and ends what is ordered on one node; `look` does whatever is to be done now."""

    def __init__(self, folder: Path, node: int, ignored: Collection[signal.Signals] = ()) -> None:
        """Called in the thread that will look.

        Args:
            folder: of the engine's logs.
            node: number of this one.
            ignored: signals that are not meant for servers.
        """
        self._logs, self._node, self._ignored = folder, node, ignored
        self._folder = _of(folder, node)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._parts: dict[str, Part] = {}
        self._told: dict[str, State] = {}
        files.write_json(self._folder / "here.json", {"host": socket.gethostname()})

    def look(self) -> None:
        """End what is no longer wanted, begin what is, and say how all of it is."""
        wanted = {path.name.removesuffix(_ORDER): path for path in self._folder.glob(f"*{_ORDER}")}
        for name in [name for name in self._told if name not in wanted]:
            self._end(name)
        for name in [name for name in wanted if name not in self._told]:
            order = _read(wanted[name])
            if order is not None:
                self._begin(name, Order(**order))
        for name, part in self._parts.items():
            self._tell(name, part.state())

    def _begin(self, name: str, order: Order) -> None:
        key = self._folder / f"{name}{_KEY}"
        try:
            host = self._host()
            if host is None or (order.part == 0 and not key.exists()):
                return
            secret = key.read_text(encoding="utf-8") if order.part == 0 else None
            key.unlink(missing_ok=True)
            self._parts[name] = Part(order, secret, host, self._logs, self._ignored)
        except OSError as error:
            self._tell(name, State("", None, 0, str(self._logs), "not begun", str(error)))

    def _host(self) -> str | None:
        """The address at which other nodes see this one, as soon as there is one of them to ask for the way."""
        there = _read(_of(self._logs, 1 if self._node == 0 else 0) / "here.json")
        return None if there is None else address_towards(there["host"])

    def _tell(self, name: str, state: State) -> None:
        if self._told.get(name) != state:
            self._told[name] = state
            files.write_json(self._folder / f"{name}{_STATE}", asdict(state))

    def _end(self, name: str) -> None:
        part = self._parts.pop(name, None)
        if part is not None:
            part.end()
            part.gone_within(_GONE_S)
        del self._told[name]
        (self._folder / f"{name}{_STATE}").unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """End all parts."""
        for name in list(self._told):
            self._end(name)
        (self._folder / "here.json").unlink(missing_ok=True)


class Ordered:
    """A part that the keeper of some node starts for rank 0."""

    def __init__(self, order: Order, key: str | None, folder: Path, node: int) -> None:
        """Order it. `key`: as `Part`; `folder`: of the engine's logs."""
        self._name, self.log, self._node = order.name, folder / f"{order.name}.log", node
        self._folder = _of(folder, node)
        self._folder.mkdir(parents=True, exist_ok=True)
        if key is not None:
            with os.fdopen(os.open(self._path(_KEY), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
                file.write(key)
        files.write_json(self._path(_ORDER), asdict(order))

    def state(self) -> State | None:
        """How it is; None where it was not begun."""
        found = _read(self._path(_STATE))
        return None if found is None else State(**found)

    def end(self) -> None:
        """Have it ended."""
        self._path(_ORDER).unlink(missing_ok=True)
        self._path(_KEY).unlink(missing_ok=True)

    def gone_within(self, seconds: float) -> bool:
        """Whether its keeper has ended it, waited for so long at most."""
        end = time.monotonic() + seconds
        while self._path(_STATE).exists():
            if time.monotonic() > end:
                return False
            time.sleep(LOOK_S / 2)
        return True

    @property
    def place(self) -> str:
        """Its node, for people."""
        there = _read(self._folder / "here.json")
        return f"node {self._node} ({there['host']})" if there else f"node {self._node}, where nobody looks after servers,"

    def _path(self, suffix: str) -> Path:
        return self._folder / f"{self._name}{suffix}"


def forget(folder: Path) -> None:
    """Withdraw whatever was ordered below the folder of an engine's logs."""
    for path in [*folder.glob(f"nodes/*/*{_ORDER}"), *folder.glob(f"nodes/*/*{_KEY}")]:
        path.unlink(missing_ok=True)


def _of(folder: Path, node: int) -> Path:
    return folder / "nodes" / str(node)


def _read(path: Path) -> Any:
    """A file's value; None also where a shared file system shows the file before its content."""
    try:
        return files.read_json(path)
    except (ValueError, OSError):
        return None
