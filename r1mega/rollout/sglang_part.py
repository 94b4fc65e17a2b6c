"""The processes of one SGLang server on one node: all of it, or one of its parts where it spans nodes."""

import os
import secrets
import signal
import socket
import subprocess
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from r1mega import env
from r1mega.process import die_with_parent

LOOPBACK = "127.0.0.1"
INSIDE = Path(__file__).with_name("in_sglang")
"""What servers' processes find beside SGLang's own modules."""
_KEY = "R1MEGA_ENGINE_KEY"
_PATH = "PYTHONPATH"
_LONGER = "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"
_MEETING_PORTS = 7
"""Ranks of a server that spans nodes meet at the first; with copies of the attention its processes talk at those that follow."""
_DEALT = Path("/proc/sys/net/ipv4/ip_local_port_range")
_CHOICE = 16_384
_KILLS_ITSELF = "kill_process_tree called"
"""In the log of a server of SGLang that ends after an error of one of its processes: by SIGKILL."""


@dataclass(frozen=True)
class Order:
    """What is to be started on one node."""

    server: str
    """Name of the server's life; another life has another."""
    part: int
    """The first one serves HTTP."""
    parts: int
    python: str
    arguments: list[str]
    """Of `sglang.launch_server`, without addresses and ports."""
    ranks: int
    """Of this part."""
    threads: int
    platform: str
    meeting: str | None = None
    """host:port where ranks of all parts meet; the first part opens it."""

    @property
    def name(self) -> str:
        """Of its files."""
        return self.server if self.parts == 1 else f"{self.server}-part{self.part}"


@dataclass(frozen=True)
class State:
    """What there is to know of a part that was begun."""

    address: str
    """host:port of its HTTP."""
    meeting: str | None
    pid: int
    log: str
    ended: str | None = None
    """How it ended; None while it runs."""
    said: str = ""
    """Of one that has ended, the last error in its log."""


class Part:
    """A part on this node. It dies with this process, however that dies."""

    def __init__(self, order: Order, key: str | None, host: str, folder: Path, ignored: Collection[signal.Signals] = ()) -> None:
        """Start it. Call it in the thread that lives as long as the server should.

        Args:
            key: API key; None for parts that serve nobody.
            host: where a first part listens.
            folder: of logs.
            ignored: signals that are not meant for it.
        """
        self.place, self.log = "", folder / f"{order.name}.log"
        # The others answer nothing but that they are there.
        host = host if order.part == 0 else LOOPBACK
        port, self._meeting = free_port(host), order.meeting
        words = [*order.arguments, "--host", host, "--port", str(port)]
        if order.parts > 1:
            self._meeting = order.meeting or f"{host}:{free_port(host, _MEETING_PORTS)}"
            words += ["--nnodes", str(order.parts), "--node-rank", str(order.part), "--dist-init-addr", self._meeting]
        self._address = f"{host}:{port}"
        folder.mkdir(parents=True, exist_ok=True)
        bound = order.ranks if order.ranks * order.parts > 1 else 0
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [order.python, str(INSIDE / "serve.py"), _KEY, *words],
                env=env.for_servers(
                    order.threads, bound, order.platform, {_LONGER: "1", _PATH: str(INSIDE)} | ({_KEY: key} if key else {})
                ),
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C reaches the launcher alone, which ends the run in order.
                start_new_session=True,
                preexec_fn=partial(_before_exec, ignored),
            )

    def state(self) -> State:
        """How it is now."""
        code = self._process.poll()
        ended = None if code is None else f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        said = "" if code is None else _last_words(self.log, code)
        return State(self._address, self._meeting, self._process.pid, str(self.log), ended, said)

    def end(self) -> None:
        """End it with all its processes."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def gone_within(self, seconds: float) -> bool:
        """Whether it has ended, waited for so long at most."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True


def _before_exec(ignored: Collection[signal.Signals]) -> None:
    for sign in ignored:
        signal.signal(sign, signal.SIG_IGN)
    die_with_parent()


def free_port(host: str, count: int = 1) -> int:
    """The first of `count` ports in a row that nobody has on this host.

    Not one of those that Linux deals out to whoever asks for any: SGLang listens a minute after it was told where, and until then its own
    processes ask for many.
    """
    dealt, last = map(int, _DEALT.read_text(encoding="ascii").split())
    below = range(max(1024, dealt - _CHOICE), dealt - count)
    if len(below) < 2 * count:
        below = range(dealt, last - count)
    while True:
        # Not by `random`, which all runs of a recipe seed alike.
        port = below[secrets.randbelow(len(below))]
        if all(_is_free(host, one) for one in range(port, port + count)):
            return port


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def address_towards(host: str, port: int = 80) -> str:
    """The address of this machine as another one sees it, which is that of the network between them."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        address: str = probe.getsockname()[0]
        return address


def _last_words(log: Path, code: int) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if code == -signal.SIGKILL and not any(_KILLS_ITSELF in line for line in lines):
        return "from outside, or for want of memory"
    errors = [line for line in lines if "Error" in line or "ERROR:" in line]
    return (errors or lines or ["it wrote nothing"])[-1][:300]
