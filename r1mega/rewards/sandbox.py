"""Programs that a model wrote, run by bubblewrap (`bwrap`) where they can do no harm.

A program sees the system's `/usr` and its interpreter, read-only, one scratch folder of limited size, and nothing else of the machine: no
network, no other process, no environment, no file of the user. It has no capability, cannot get one, and cannot make namespaces of its
own. Time, memory, processes, file sizes and output are limited. All of it ends with the call that started it, and with the process that
called. What the program is judged by, such as expected outputs, never enters the sandbox.

Where that cannot be had, nothing is run: `find_sandbox` raises UserError with the reason and the remedy.
"""

import fcntl
import json
import os
import platform
import re
import resource
import selectors
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from pathlib import Path

from r1mega.errors import UserError
from r1mega.rewards import seccomp

FILES = "/judge"
"""Where the sandbox shows the files that it is given, read-only."""

SCRATCH = "/tmp"
"""The only place in the sandbox that can be written to, and its working directory. Empty at first, gone afterwards."""

_NOBODY = 65534
"""User and group in the sandbox. A judge that is root gives up root for it outside too: Linux exempts root from the process limit."""

_PROCESSES_OF_A_USER = 1 << 14

_ENVIRONMENT = {
    **{"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": SCRATCH, "LANG": "C.UTF-8"},
    # A BLAS that starts a thread for each core would meet the process limit, and its buffers the memory limit.
    **{"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
}

_LAUNCHER = """
import os, resource, sys
for number, value in (map(int, pair.split("=")) for pair in sys.argv[1].split(",")):
    hard = resource.getrlimit(number)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(number, (value, value))
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Limits are set inside, so that they hold for the program and not for bubblewrap, which needs processes and memory of its own."""

_PROBE = """
import json, os, socket, sys
asked = json.loads(sys.argv[1])
faults = []
for kind, outside in asked["namespaces"].items():
    try:
        if os.readlink(f"/proc/self/ns/{kind}") == outside:
            faults.append(f"programs share the machine's {kind} namespace")
    except FileNotFoundError:
        pass
if socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect_ex(("192.0.2.1", 9)) == 0:
    faults.append("the network can be reached")
if set(os.listdir("/")) - set(asked["roots"]):
    faults.append("files of this machine can be seen")
if any(os.access(folder, os.W_OK) for folder in asked["read_only"]):
    faults.append("files can be written outside the scratch folder")
if os.getuid() != asked["user"]:
    faults.append("programs keep their user")
print("; ".join(faults) or "isolated")
"""

_ROOTS = ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32", "etc", "proc", "dev", "tmp", "judge")

_SETTINGS = (
    ("kernel/unprivileged_userns_clone", "0", "sysctl kernel.unprivileged_userns_clone=1"),
    ("user/max_user_namespaces", "0", "sysctl user.max_user_namespaces=15000"),
    ("kernel/apparmor_restrict_unprivileged_userns", "1", "sysctl kernel.apparmor_restrict_unprivileged_userns=0"),
)
"""Settings under /proc/sys that forbid user namespaces: name, forbidding value, remedy."""


@dataclass(frozen=True)
class Limits:
    """What a program may use. Memory is counted as address space and, like CPU time, for each of its processes."""

    cpu_s: int = 6
    wall_s: float = 20.0
    memory: int = 1 << 30
    processes: int = 16
    scratch: int = 64 << 20
    """Bytes in the scratch folder, and of any one file."""
    output: int = 16 << 20
    """Bytes on standard output, and on standard error."""

    def rlimits(self) -> dict[int, int]:
        """Numbers of `resource` and their values."""
        return {
            resource.RLIMIT_CPU: self.cpu_s,
            resource.RLIMIT_AS: self.memory,
            resource.RLIMIT_STACK: min(self.memory // 2, 256 << 20),
            resource.RLIMIT_NPROC: self.processes,
            resource.RLIMIT_FSIZE: self.scratch,
            resource.RLIMIT_NOFILE: 256,
            resource.RLIMIT_CORE: 0,
        }


@dataclass(frozen=True)
class Outcome:
    """How a program ended. `code` is its exit code, 128 + n after signal n, and None where it was `stopped`: by `time` or by `output`."""

    stdout: bytes
    stderr: bytes
    code: int | None
    stopped: str | None = None


class SandboxError(RuntimeError):
    """Bubblewrap did not start a program, so nothing is known about it."""


@dataclass(frozen=True)
class Sandbox:
    """A way to call bubblewrap that was seen to isolate. `gaps` says what it does not do here."""

    bwrap: str
    python: str
    options: tuple[str, ...]
    filter: bytes | None
    """Of system calls, as `seccomp.program` makes it."""
    has_size: bool
    rlimits: Mapping[int, int] = field(default_factory=dict)
    """What takes the place of the asked limits, by number."""
    gaps: tuple[str, ...] = ()

    def run(
        self, command: Sequence[str], files: Mapping[str, bytes] | None = None, stdin: bytes = b"", limits: Limits | None = None
    ) -> Outcome:
        """Run a command, its first word an absolute path inside, and wait for its end or for a limit.

        `files` are shown in FILES, read-only and executable. Raises SandboxError where the program could not be started.
        """
        limits = limits or Limits()
        with ExitStack() as stack:
            source = stack.enter_context(_sealed(stdin))
            rules = None if self.filter is None else stack.enter_context(_sealed(self.filter))
            shown = {name: stack.enter_context(_sealed(content)) for name, content in (files or {}).items()}
            status, report = os.pipe()
            stack.callback(os.close, status)
            with os.fdopen(report, "wb"):
                process = self._start(command, shown, source, report, rules, limits)
            with process:
                try:
                    stdout, stderr, stopped = _collect(process, limits)
                finally:
                    process.kill()
            ended = b'"exit-code"' in _drain(status)
        if stopped is None and not ended:
            raise SandboxError(f"bubblewrap started no program: {_last_line(stderr) or f'exit code {process.returncode}'}")
        return Outcome(stdout, stderr, None if stopped else process.returncode, stopped)

    def _start(
        self, command: Sequence[str], shown: Mapping[str, int], stdin: int, report: int, rules: int | None, limits: Limits
    ) -> subprocess.Popen[bytes]:
        # The scratch folder comes first: an interpreter may lie in it, as that of a checkout in /tmp does, and is shown on top.
        options = ["--size", str(limits.scratch), "--tmpfs", SCRATCH] if self.has_size else ["--dir", SCRATCH]
        options += [*self.options, "--json-status-fd", str(report), "--dir", FILES]
        if rules is not None:
            options += ["--seccomp", str(rules)]
        for name, descriptor in shown.items():
            options += ["--perms", "0555", "--ro-bind-data", str(descriptor), f"{FILES}/{name}"]
        rlimits = ",".join(f"{number}={value}" for number, value in {**limits.rlimits(), **self.rlimits}.items())
        launcher = [self.python, "-I", "-S", "-c", _LAUNCHER, rlimits]
        root = os.geteuid() == 0
        # Not a session of its own: whoever kills the judge's process group kills bubblewrap, and Linux then all that it holds.
        return subprocess.Popen(
            [self.bwrap, *options, "--chdir", SCRATCH, "--remount-ro", "/", "--", *launcher, *command],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_ENVIRONMENT,
            cwd="/",
            pass_fds=(report, *shown.values(), *(() if rules is None else (rules,))),
            user=_NOBODY if root else None,
            group=_NOBODY if root else None,
            extra_groups=() if root else None,
        )


@lru_cache(maxsize=1)
def find_sandbox() -> Sandbox:
    """The strictest sandbox that this machine allows, tried once.

    Raises UserError where bubblewrap is missing or where network, files or user cannot be isolated; nothing is ever run without.
    """
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise UserError("code is only judged in a sandbox, and bubblewrap is missing: apt-get install bubblewrap")
    has = subprocess.run([bwrap, "--help"], capture_output=True, text=True, check=False).stdout
    has_size, rules, rlimits = "--size" in has, seccomp.program(platform.machine()), _rlimits()
    reasons: dict[str, str] = {}
    # Not every kernel filters, bubblewrap before 0.8 cannot forbid namespaces inside, and containers often refuse a /proc of one's own.
    for filtered, locked, proc in product((True, False), repeat=3):
        if (filtered and rules is None) or (locked and "--disable-userns" not in has):
            continue
        gaps = _gaps(filtered, locked, proc, has_size, not rlimits)
        for python, prefixes in _interpreters():
            sandbox = Sandbox(bwrap, python, _options(locked, proc, prefixes), rules if filtered else None, has_size, rlimits, gaps)
            reason = _fault(sandbox, prefixes)
            if reason is None:
                return sandbox
            reasons.setdefault(python, reason)
    # The system's interpreter comes last, and what it met has least to do with where an interpreter lies.
    *_, reason = reasons.values()
    raise UserError(f"code is only judged in a sandbox, and bubblewrap cannot make one here ({reason}); {_remedy()}")


def _interpreters() -> Iterator[tuple[str, tuple[str, ...]]]:
    """This interpreter, then the system's, each with the folders that must be shown beside /usr."""
    prefixes = dict.fromkeys(place for prefix in (sys.base_prefix, sys.prefix) for place in (os.path.realpath(prefix), prefix))
    yield sys.executable, tuple(prefix for prefix in prefixes if not Path(prefix).is_relative_to("/usr"))
    if Path("/usr/bin/python3").exists():
        yield "/usr/bin/python3", ()


def _options(locked: bool, proc: bool, prefixes: Sequence[str]) -> tuple[str, ...]:
    options = ["--unshare-all", "--unshare-user", "--uid", str(_NOBODY), "--gid", str(_NOBODY), "--cap-drop", "ALL"]
    options += ["--hostname", "sandbox", "--die-with-parent", "--new-session"]
    if locked:
        options.append("--disable-userns")
    options += ["--ro-bind", "/usr", "/usr"]
    for folder in map(Path, ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")):
        if folder.is_symlink():
            options += ["--symlink", str(folder.readlink()), str(folder)]
        elif folder.is_dir():
            options += ["--ro-bind", str(folder), str(folder)]
    for path in ("/etc/alternatives", "/etc/ld.so.cache", *prefixes):
        options += ["--ro-bind-try", path, path]
    if proc:
        options += ["--proc", "/proc", "--remount-ro", "/proc"]
    return (*options, "--dev", "/dev", "--remount-ro", "/dev")


def _rlimits() -> dict[int, int]:
    """Linux counts the processes of a user namespace by themselves from 5.14 on.

    Before, a limit is compared with all that its user runs, and a small one would keep an honest program from starting a thread.
    """
    version = tuple(int(part) for part in re.findall(r"\d+", platform.release())[:2])
    return {} if version >= (5, 14) else {resource.RLIMIT_NPROC: _PROCESSES_OF_A_USER}


def _gaps(filtered: bool, locked: bool, proc: bool, has_size: bool, counted: bool) -> tuple[str, ...]:
    gaps = {
        "system calls are not filtered, and shared memory that is not mapped is not counted": not filtered,
        "programs may make user namespaces, and file systems in memory with them (bubblewrap before 0.8)": not (locked or filtered),
        "there is no /proc, so that programs cannot open /dev/stdin by name": not proc,
        "the scratch folder is read-only (bubblewrap before 0.7 cannot limit its size)": not has_size,
        f"a user's sandboxes share one limit of {_PROCESSES_OF_A_USER:,} processes (Linux before 5.14)": not counted,
    }
    return tuple(gap for gap, holds in gaps.items() if holds)


def _fault(sandbox: Sandbox, prefixes: Sequence[str]) -> str | None:
    """What is wrong with a sandbox, None if it isolates."""
    asked = {
        "namespaces": {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in ("ipc", "mnt", "net", "pid", "user", "uts")},
        "roots": [*_ROOTS, *(Path(prefix).parts[1] for prefix in prefixes)],
        "read_only": ["/", "/usr", "/dev", FILES],
        "user": _NOBODY,
    }
    try:
        outcome = sandbox.run([sandbox.python, "-I", "-c", _PROBE, json.dumps(asked)], limits=Limits(wall_s=30))
    except SandboxError as error:
        return str(error)
    except OSError as error:  # root of a namespace without other users, or a bwrap that only its owner may run
        return f"bwrap cannot be started{f' as user {_NOBODY}' if os.geteuid() == 0 else ''}: {error.strerror}"
    said = outcome.stdout.decode(errors="replace").strip()
    return None if said == "isolated" else said or _last_line(outcome.stderr) or f"the probe ended with {outcome.code}"


def _remedy() -> str:
    for name, forbidding, remedy in _SETTINGS:
        setting = Path("/proc/sys", name)
        if setting.exists() and setting.read_text().strip() == forbidding:
            return f"run {remedy}"
    return "allow user namespaces; in a container: docker run --security-opt seccomp=unconfined --security-opt apparmor=unconfined"


def _collect(process: subprocess.Popen[bytes], limits: Limits) -> tuple[bytes, bytes, str | None]:
    """What the program wrote until its end or a limit, and which limit."""
    assert process.stdout is not None and process.stderr is not None
    written = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    deadline = time.monotonic() + limits.wall_s
    stopped = None
    with selectors.DefaultSelector() as selector:
        for descriptor in written:
            selector.register(descriptor, selectors.EVENT_READ)
        while selector.get_map() and stopped is None:
            events = selector.select(max(0.0, deadline - time.monotonic()))
            if time.monotonic() >= deadline:
                stopped = "time"
            for key, _ in events:
                data = os.read(key.fd, 1 << 16)
                written[key.fd] += data
                if not data:
                    selector.unregister(key.fd)
                if len(written[key.fd]) > limits.output:
                    stopped = "output"
    if stopped is None:
        try:  # a program may close its outputs and stay
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            stopped = "time"
    stdout, stderr = map(bytes, written.values())
    return stdout, stderr, stopped


@contextmanager
def _sealed(content: bytes) -> Iterator[int]:
    """A descriptor of a file in memory that nobody can change: what reads it cannot block, and cannot answer through it."""
    descriptor = os.memfd_create("input", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(content)
        os.lseek(descriptor, 0, os.SEEK_SET)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
        yield descriptor
    finally:
        os.close(descriptor)


def _drain(pipe: int) -> bytes:
    os.set_blocking(pipe, False)
    try:
        return os.read(pipe, 1 << 16)
    except BlockingIOError:
        return b""


def _last_line(text: bytes) -> str:
    lines = text.decode(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else ""
