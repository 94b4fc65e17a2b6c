"""The sandbox: what a program can reach, what it can use, what is left of it, and when nothing is run at all."""

import errno
import os
import platform
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from r1mega.errors import UserError
from r1mega.rewards import seccomp
from r1mega.rewards.sandbox import FILES, SCRATCH, Limits, Outcome, Sandbox, SandboxError, find_sandbox

USER = 0x10000000
"""CLONE_NEWUSER."""

CLONE = seccomp._CLONE.get(platform.machine())


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    """Without one, these tests fail, and say why."""
    return find_sandbox()


def run(sandbox: Sandbox, program: str, stdin: bytes = b"", **limits) -> Outcome:
    files = {"main.py": textwrap.dedent(program).encode()}
    return sandbox.run([sandbox.python, "-I", f"{FILES}/main.py"], files, stdin, Limits(**limits))


def said(outcome: Outcome) -> str:
    assert outcome.code == 0, outcome
    return outcome.stdout.decode().strip()


def attempts(sandbox: Sandbox, *statements: str) -> list[str]:
    """Each statement's error, or `done`."""
    program = f"""
        import ctypes, os, signal, socket, subprocess
        libc = ctypes.CDLL(None, use_errno=True)
        def call(name, *arguments):
            if getattr(libc, name)(*arguments) < 0:
                raise OSError(ctypes.get_errno(), "")
        for statement in {list(statements)!r}:
            try:
                exec(statement)
                print("done")
            except Exception as error:
                print(type(error).__name__)
    """
    return said(run(sandbox, program)).splitlines()


# ---------------------------------------------------------------- what a program is given


def test_stdin_files_and_exit_code(sandbox):
    outcome = run(sandbox, "import sys; print(sys.stdin.read()[::-1]); print('to stderr', file=sys.stderr); sys.exit(3)", b"abc")
    assert outcome == Outcome(b"cba\n", b"to stderr\n", 3)
    assert said(run(sandbox, "print(open('/dev/stdin').read())", b"by name")) == "by name"
    assert run(sandbox, "import os; os.kill(os.getpid(), 11)").code == 128 + signal.SIGSEGV


def test_a_megabyte_of_input_that_is_not_read_does_not_block(sandbox):
    assert said(run(sandbox, "print('done')", b"x" * (1 << 24))) == "done"


def test_the_environment_is_cleared(sandbox, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "s3cret")
    names = said(run(sandbox, "import os; print(sorted(os.environ))"))
    assert names == str(["HOME", "LANG", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PATH", "PWD"])
    everything = said(run(sandbox, "print(*(open(f'/proc/{p}/environ').read() for p in ('1', 'self')))"))
    assert "s3cret" not in everything and "SECRET" not in everything


def test_only_three_descriptors_are_open(sandbox):
    """None of bubblewrap's and none of the judge's, which are pipes to the trainer."""
    reachable = """
        import os
        found = []
        for number in range(256):
            try:
                os.fstat(number)
                found.append(number)
            except OSError:
                pass
        print(found)
    """
    held = os.pipe()
    for end in held:
        os.set_inheritable(end, True)
    assert said(run(sandbox, reachable)) == "[0, 1, 2]"
    for end in held:
        os.close(end)


@pytest.mark.parametrize("parent", ["/var/tmp", "/tmp"])
def test_packages_of_the_judges_environment_can_be_imported(parent):
    """And nothing else of the folder that it lies in."""
    folder = Path(tempfile.mkdtemp(dir=parent))
    folder.chmod(0o755)
    try:
        (folder / "answers.txt").write_text("42")
        own = Path(os.path.realpath(sys.executable))
        python = own if own.is_relative_to("/usr") or os.geteuid() else Path("/usr/bin/python3")  # one that the sandbox's user can read
        version = subprocess.run([python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True, text=True).stdout
        bin, packages = folder / "venv/bin", folder / f"venv/lib/python{version.strip()}/site-packages"
        bin.mkdir(parents=True)
        packages.mkdir(parents=True)
        (bin / "python").symlink_to(python)
        (folder / "venv/pyvenv.cfg").write_text(f"home = {python.parent}\n")
        (packages / "installed_here.py").write_text("import sys; where = sys.prefix")
        program = f"import os, installed_here; print(installed_here.where, os.listdir({str(folder)!r}))"
        asked = (
            f"from r1mega.rewards.sandbox import *; s = find_sandbox(); print(s.run([s.python, '-I', '-c', {program!r}]).stdout.decode())"
        )
        environment = {"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": os.environ["PATH"]}
        answered = subprocess.run([bin / "python", "-B", "-c", asked], env=environment, capture_output=True, text=True, check=True).stdout
        assert answered.strip() == f"{folder / 'venv'} ['venv']"
    finally:
        shutil.rmtree(folder)


# ---------------------------------------------------------------- what a program can reach


def test_the_network_is_refused(sandbox):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        name = f"r1mega-test-{os.getpid()}"
        local.bind(f"\0{name}")
        local.listen()
        errors = attempts(
            sandbox,
            f"socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 2)",
            f"socket.socket(socket.AF_UNIX).connect('\\0{name}')",
            "socket.create_connection(('192.0.2.1', 80), 2)",
            "socket.getaddrinfo('example.org', 80)",
        )
    assert errors == ["ConnectionRefusedError", "ConnectionRefusedError", "OSError", "gaierror"]


def test_files_of_this_machine_are_not_there(sandbox, tmp_path):
    """A folder in which the interpreter lies is there, with nothing but the interpreter."""
    (tmp_path / "answers.txt").write_text("42")
    folders = ("/root", "/home", "/var", "/sys", "/run", "/etc/ssl", str(Path(__file__).parent), str(tmp_path))
    prefixes = {Path(place) for prefix in (sys.prefix, sys.base_prefix) for place in (prefix, os.path.realpath(prefix))}
    for folder, error in zip(folders, attempts(sandbox, *(f"os.listdir({folder!r})" for folder in folders)), strict=True):
        shown = {prefix.relative_to(folder).parts[0] for prefix in prefixes if prefix.is_relative_to(folder)}
        if error == "done":
            assert set(said(run(sandbox, f"import os; print(*os.listdir({folder!r}))")).split()) <= shown
        else:
            assert error == "FileNotFoundError"
    passwords, *rest = attempts(sandbox, "open('/etc/passwd')", "open('/proc/1/root/etc/passwd')", f"open('{tmp_path}/answers.txt')")
    assert passwords == "FileNotFoundError" and set(rest) <= {"FileNotFoundError", "PermissionError"}
    assert said(run(sandbox, f"import os; print(os.listdir({FILES!r}))")) == "['main.py']"


def test_writes_go_to_the_scratch_folder_only(sandbox):
    refused = [f"open({path!r}, 'w')" for path in ("/x", "/usr/x", "/dev/x", "/etc/x", f"{FILES}/x", "/proc/sys/kernel/core_pattern")]
    refused += [
        f"open('{FILES}/main.py', 'a')",
        "os.write(os.open('/proc/self/fd/0', os.O_WRONLY), b'x')",
        "os.chmod('/', 0o777)",
        "os.mkdir('/dev/shm/x')",
    ]
    errors = attempts(sandbox, *refused, f"open('{SCRATCH}/x', 'w').write('1')")
    assert errors.pop() == "done"
    assert set(errors) <= {"PermissionError", "OSError"}, errors
    assert said(run(sandbox, f"import os; print(os.path.exists('{SCRATCH}/x'))")) == "False"


def test_privileges_cannot_be_had(sandbox):
    errors = attempts(
        sandbox,
        "os.setuid(0)",
        "call('mount', b'none', b'/tmp', b'tmpfs', 0, None)",
        "call('mount', None, b'/usr', None, 32 | 4096, None)",  # remount what is read-only
        f"call('unshare', {USER})",
        f"call('unshare', {USER | 0x20000})",
        "call('chroot', b'/tmp')",
        "call('setns', os.open('/proc/1/ns/mnt', os.O_RDONLY), 0)",
        "os.mknod('/tmp/disk', 0o60600, os.makedev(254, 0))",
        f"os.kill({os.getpid()}, 0)",
    )
    assert "done" not in errors, errors
    status = said(run(sandbox, "print(open('/proc/self/status').read())"))
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert {fields[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert fields["NoNewPrivs"] == "1" and fields["Uid"].split() == ["65534"] * 4


def test_root_outside_is_not_the_sandboxs_user(sandbox):
    """The owner of a process is what Linux compares, whatever a user namespace shows."""
    marker = "271828"
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; from r1mega.rewards.sandbox import *; find_sandbox().run(['/bin/sleep', sys.argv[1]])", marker]
    )
    try:
        (pid,) = _wait_for(lambda: _processes("/bin/sleep", marker))
        assert os.stat(f"/proc/{pid}").st_uid == (65534 if os.geteuid() == 0 else os.geteuid())
    finally:
        process.kill()
        process.wait()


def test_other_processes_cannot_be_seen(sandbox):
    seen = said(run(sandbox, "import os; print([(p, open(f'/proc/{p}/cmdline').read()) for p in os.listdir('/proc') if p.isdigit()])"))
    (first, init), (_, own) = eval(seen)
    assert first == "1" and init.startswith(f"{sandbox.bwrap}\0") and own == f"{sandbox.python}\0-I\0{FILES}/main.py\0"


# ---------------------------------------------------------------- what a program can use


def test_cpu_time(sandbox):
    ignoring = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\n"
    for program in ("while True: pass", ignoring + "while True: pass"):
        assert run(sandbox, program, cpu_s=1, wall_s=60.0).code == 128 + signal.SIGKILL


def test_time_on_the_wall(sandbox):
    asleep = "import os, signal, time\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n    except OSError: pass\n"
    for program in (asleep + "time.sleep(600)", asleep + "os.close(1); os.close(2); time.sleep(600)"):
        start = time.monotonic()
        outcome = run(sandbox, program, wall_s=1.0)
        assert outcome == Outcome(b"", b"", None, "time")
        assert time.monotonic() - start < 30


def test_memory_that_no_limit_counts_cannot_be_had(sandbox):
    """System V segments and memory files hold what is written to them without being mapped."""
    errors = attempts(sandbox, "call('shmget', 0, 1 << 20, 0o1600)", "os.memfd_create('x')", "call('syscall', 425, 8, b' ' * 120)")
    assert errors == ["PermissionError"] * 3
    assert said(run(sandbox, "import threading\nt = threading.Thread(target=print, args=['a thread'])\nt.start()\nt.join()")) == "a thread"


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_of_system_calls(machine):
    """The kernel's arithmetic, in a few lines: which calls come through."""
    code = list(struct.iter_unpack("HBBI", seccomp.program(machine)))

    def decide(number: int, flags: int = 0, architecture: int | None = None) -> int:
        data = {0: number, 4: seccomp._AUDIT[machine] if architecture is None else architecture, 16: flags}
        place = value = 0
        while True:
            kind, met, unmet, operand = code[place]
            place += 1
            match kind:
                case 0x20:
                    value = data[operand]
                case 0x06:
                    return operand
                case _:
                    holds = {0x15: value == operand, 0x35: value >= operand, 0x45: bool(value & operand)}[kind]
                    place += met if holds else unmet

    refused = set(seccomp._REFUSED[machine].values())
    clone = seccomp._CLONE[machine]
    assert len(refused) == len(seccomp._REFUSED[machine])
    for number in range(512):
        expected = 0x00050000 | errno.EPERM if number in refused else 0x00050000 | errno.ENOSYS if number == 435 else 0x7FFF0000
        assert decide(number) == expected
        assert decide(number, architecture=0x40000003) == decide(number | 0x40000000) == 0x00050000 | errno.EPERM
    assert decide(clone, USER | signal.SIGCHLD) == 0x00050000 | errno.EPERM and decide(clone, 0x3D0F00) == 0x7FFF0000


def test_memory(sandbox):
    assert b"MemoryError" in run(sandbox, "bytearray(1 << 30)", memory=1 << 29).stderr
    assert said(run(sandbox, "print(len(bytearray(1 << 28)))", memory=1 << 29)) == str(1 << 28)
    mapped = "import mmap\nmmap.mmap(-1, 1 << 30, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)"
    assert run(sandbox, mapped, memory=1 << 29).code == 1


def test_a_fork_bomb(sandbox):
    bomb = """
        import os, time
        born = 0
        try:
            while True:
                if os.fork() == 0:
                    time.sleep(600)
                born += 1
        except OSError:
            print(born)
    """
    assert 1 <= int(said(run(sandbox, bomb, processes=8))) <= 8
    start = time.monotonic()
    outcome = run(sandbox, "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", processes=8, wall_s=2.0)
    assert outcome.stopped == "time" or outcome.code == 128 + signal.SIGKILL
    assert time.monotonic() - start < 30


def test_files_and_scratch_have_a_size(sandbox):
    assert b"File too large" in run(sandbox, "open('/tmp/x', 'wb').write(b'x' * (2 << 20))", scratch=1 << 20).stderr
    several = "for n in range(9): open(f'/tmp/{n}', 'wb').write(b'x' * (1 << 19))"
    assert b"No space left" in run(sandbox, several, scratch=1 << 20).stderr


def test_a_flood_of_output(sandbox):
    start = time.monotonic()
    for stream in (1, 2):
        outcome = run(sandbox, f"import os\nwhile True: os.write({stream}, b'y' * 65536)", output=1 << 20)
        assert outcome.stopped == "output" and outcome.code is None
        assert len(outcome.stdout) + len(outcome.stderr) <= (1 << 20) + (1 << 16)
    assert time.monotonic() - start < 30


# ---------------------------------------------------------------- what is left of a program


def test_a_process_left_behind_is_gone(sandbox):
    marker = "314159"
    daemon = f"""
        import os, subprocess
        subprocess.Popen(["/bin/sleep", "{marker}"], start_new_session=True, stdin=-3, stdout=-3, stderr=-3)
        print("left")
    """
    assert said(run(sandbox, daemon)) == "left"
    _wait_for(lambda: not _processes("/bin/sleep", marker))


def test_the_sandbox_ends_with_the_process_that_called(sandbox):
    marker = "161803"
    judge = subprocess.Popen(
        [sys.executable, "-c", "import sys; from r1mega.rewards.sandbox import *; find_sandbox().run(['/bin/sleep', sys.argv[1]])", marker]
    )
    _wait_for(lambda: _processes("/bin/sleep", marker))
    judge.kill()
    judge.wait()
    _wait_for(lambda: not _processes("/bin/sleep", marker))


def test_no_descriptors_are_leaked(sandbox):
    run(sandbox, "pass")
    before = len(os.listdir("/proc/self/fd"))
    for program in ("pass", "while True: print('y' * 4096)"):
        run(sandbox, program, output=1 << 16)
    assert len(os.listdir("/proc/self/fd")) == before


# ---------------------------------------------------------------- when nothing is run


@pytest.fixture
def fake(monkeypatch) -> Iterator:
    """Put a shell script in bubblewrap's place."""
    folder = Path(tempfile.mkdtemp(dir="/var/tmp"))
    folder.chmod(0o755)
    real = find_sandbox().bwrap

    def install(script: str) -> None:
        path = folder / "bwrap"
        path.write_text(script if script.startswith("#!") else f"#!/bin/sh\n{script.replace('REAL', real)}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        find_sandbox.cache_clear()

    yield install
    find_sandbox.cache_clear()
    shutil.rmtree(folder)


def test_without_bubblewrap_nothing_is_run(monkeypatch):
    monkeypatch.setenv("PATH", "")
    find_sandbox.cache_clear()
    with pytest.raises(UserError, match=r"bubblewrap is missing: apt-get install bubblewrap"):
        find_sandbox()


def test_a_machine_without_user_namespaces_is_refused(fake):
    fake('[ "$1" = --help ] && exec REAL --help; echo "bwrap: No permissions to create a new namespace" >&2; exit 1')
    with pytest.raises(UserError, match="No permissions to create a new namespace") as error:
        find_sandbox()
    assert "allow user namespaces" in str(error.value) or "run sysctl" in str(error.value)
    assert "\n" not in str(error.value)


RUN_BARE = """#!/usr/bin/python3 -I
import os, sys
options, command = sys.argv[1 : sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1 :]
os.write(int(options[options.index("--json-status-fd") + 1]), b'{ "exit-code": 0 }')
os.execv(command[0], command)
"""


def test_a_bubblewrap_that_does_not_isolate_is_refused(fake):
    fake(RUN_BARE)
    with pytest.raises(UserError, match="files of this machine can be seen"):
        find_sandbox()


def test_a_shared_network_is_refused(fake):
    fake('for word; do set -- "$@" "$word"; [ "$word" = --unshare-all ] && set -- "$@" --share-net; shift; done; exec REAL "$@"')
    with pytest.raises(UserError, match="share the machine's net namespace"):
        find_sandbox()


def test_old_versions_are_locked_otherwise_and_say_what_they_lack(fake):
    fake('[ "$1" = --help ] && { REAL --help | grep -v -e --disable-userns -e --size; exit; }; exec REAL "$@"')
    sandbox = find_sandbox()
    assert len(sandbox.gaps) == 1 and "scratch" in sandbox.gaps[0]
    cloning = f"call('syscall', {CLONE}, {USER | signal.SIGCHLD}, 0, 0, 0, 0)"
    assert attempts(sandbox, f"call('unshare', {USER})", cloning) == ["PermissionError"] * 2
    assert attempts(sandbox, f"open('{SCRATCH}/x', 'w')", "open('/x', 'w')") == ["OSError", "OSError"]


def test_a_kernel_that_filters_nothing_is_a_gap(fake):
    fake('for word; do [ "$word" = --seccomp ] && { echo "bwrap: prctl(PR_SET_SECCOMP)" >&2; exit 1; }; done; exec REAL "$@"')
    (gap,) = find_sandbox().gaps
    assert "system calls are not filtered" in gap


def test_an_old_kernel_counts_all_processes_of_a_user(monkeypatch):
    monkeypatch.setattr(platform, "release", lambda: "4.18.0-553.el8.x86_64")
    find_sandbox.cache_clear()
    sandbox = find_sandbox()
    find_sandbox.cache_clear()
    assert "16,384 processes" in sandbox.gaps[-1]
    program = "import resource; print(resource.getrlimit(resource.RLIMIT_NPROC)[0])"
    assert said(run(sandbox, program)) == "16384"


def test_without_proc_programs_still_run(fake):
    fake('for word; do [ "$word" = --proc ] && { echo "bwrap: mount proc: Operation not permitted" >&2; exit 1; }; done; exec REAL "$@"')
    sandbox = find_sandbox()
    assert len(sandbox.gaps) == 1 and "/proc" in sandbox.gaps[0]
    assert said(run(sandbox, "print(input())", b"hello")) == "hello"


def test_a_program_that_was_not_started_is_no_outcome(sandbox):
    broken = replace(sandbox, options=(*sandbox.options, "--ro-bind", "/no/such/folder", "/x"))
    with pytest.raises(SandboxError, match="started no program"):
        broken.run(["/bin/true"])


def _processes(*words: str) -> list[int]:
    """Processes of this machine with all of these words in their command."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it ended
            continue
        if all(word.encode() in command for word in words) and int(folder.name) != os.getpid() and command[0] == words[0].encode():
            found.append(int(folder.name))
    return found


def _wait_for(condition, seconds: float = 20.0):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value
