"""A real Slurm of two nodes and a spare on this machine: munge, MariaDB, slurmdbd, slurmctld and three slurmd, below one folder, as root.

Debian's slurmd is built with MULTIPLE_SLURMD, so that all nodes may have this machine's name. Nothing outside the folder is used or
changed; every port is a free one.
"""

import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from r1mega.process import die_with_parent

_SLURM_CONF = """
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ctld}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/ctld
SlurmdSpoolDir={folder}/slurmd-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=1
SlurmdTimeout=20
KillWait=5
OverTimeLimit=0
JobRequeue=1
SchedulerParameters=sched_interval=2,bf_interval=2
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd}
AccountingStoragePass={folder}/munge.socket
AccountingStorageEnforce=associations,limits
JobAcctGatherType=jobacct_gather/linux
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs=2 RealMemory=2000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} CPUs=2 RealMemory=2000 State=UNKNOWN
NodeName=n3 NodeHostname={host} NodeAddr=127.0.0.1 Port={n3} CPUs=2 RealMemory=2000 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=batch Nodes=n[1-3] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n[1-3] MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""
_NODES = ("n1", "n2", "n3")
_SLURMDBD_CONF = """
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={dbd}
SlurmUser=root
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={mariadb}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm
"""


class SlurmCluster:
    """The daemons, and what tests do to them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.daemons = folder, dict[str, subprocess.Popen[bytes]]()
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin"}

    def start(self) -> None:
        ports = dict(zip(("ctld", "dbd", "mariadb", *_NODES), _free_ports(6), strict=True))
        known = {"folder": self.folder, "host": socket.gethostname(), **ports}
        for name, text, mode in (("slurm.conf", _SLURM_CONF, 0o644), ("slurmdbd.conf", _SLURMDBD_CONF, 0o600)):
            (self.folder / name).write_text(text.format(**known).lstrip())
            (self.folder / name).chmod(mode)
        (self.folder / "ctld").mkdir()
        self._start_munge()
        self._start_mariadb(ports["mariadb"])
        self._daemon("slurmdbd", "slurmdbd", "-D")
        self.wait(lambda: self._runs("sacctmgr", "-i", "add", "cluster", "lab"), 60)
        self.run("sacctmgr", "-i", "add", "account", "lab", "Cluster=lab", "Description=tests", "Organization=tests")
        self.run("sacctmgr", "-i", "add", "user", "root", "Account=lab", "DefaultAccount=lab")
        self._daemon("slurmctld", "slurmctld", "-D", "-i")
        for node in _NODES:
            self.start_node(node)
        self.wait(lambda: self.run("sinfo", "--noheader", "--format=%D %T").strip() == "3 idle", 60)

    def start_node(self, node: str) -> None:
        """Start a node's slurmd; after `kill_node`, too."""
        self._daemon(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """What a loss of power does: SIGKILL to the slurmd, the step daemons and all processes of jobs on the node."""
        mine = [process for process in psutil.process_iter() if _on_node(process, node, self.environment["SLURM_CONF"])]
        steps = [parent for process in mine if (parent := _parent(process)) is not None and parent.name().startswith("slurmstepd")]
        for process in [*steps, *mine]:
            _kill(process.pid)
        _kill(self.daemons[node].pid)
        self.daemons[node].wait()

    def run(self, *command: str) -> str:
        """Output of a client of Slurm."""
        done = subprocess.run(["timeout", "60", *command], env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def states(self, job: str) -> list[str]:
        """States of every attempt of a job, the last one last, as the accounting has them."""
        lines = self.run("sacct", "--allocations", "--duplicates", "--noheader", "--parsable2", "--jobs", job, "--format=State").split("\n")
        return [line.split()[0] for line in lines if line]

    def wait(self, condition: Callable[[], bool], seconds: float) -> None:
        """Until a condition holds; what the daemons wrote where it does not."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                logs = [f"{path.name}:\n{path.read_text(errors='replace')[-2000:]}" for path in self.folder.glob("*.log")]
                raise AssertionError("\n".join(["waited in vain", *logs]))
            time.sleep(0.5)

    def stop(self) -> None:
        """End everything that was started, jobs first."""
        subprocess.run(["timeout", "20", "scancel", "--signal=KILL", "--user=root"], env=self.environment, capture_output=True)
        for node in _NODES:
            if node in self.daemons and self.daemons[node].poll() is None:
                self.kill_node(node)
        for daemon in reversed(self.daemons.values()):
            if daemon.poll() is None:
                daemon.terminate()
                try:
                    daemon.wait(20)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()

    def _start_munge(self) -> None:
        (self.folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (self.folder / "munge.key").chmod(0o400)
        names = {name: self.folder / f"munge.{name}" for name in ("socket", "pid", "seed")}
        options = [
            f"--{option}-file={path}"
            for option, path in (("key", self.folder / "munge.key"), ("pid", names["pid"]), ("seed", names["seed"]))
        ]
        log = f"--log-file={self.folder / 'munged.log'}"
        self._daemon("munged", "munged", "--foreground", "--force", f"--socket={names['socket']}", *options, log)
        self.wait(lambda: self._runs("munge", "-n", f"--socket={names['socket']}"), 20)

    def _start_mariadb(self, port: int) -> None:
        data = self.folder / "mariadb"
        self.run(
            *("mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={data}", "--skip-test-db"),
            "--auth-root-authentication-method=normal",
        )
        sock = f"--socket={self.folder / 'mariadb.socket'}"
        listen = ["--bind-address=127.0.0.1", f"--port={port}", f"--pid-file={self.folder / 'mariadb.pid'}"]
        self._daemon("mariadb", "mariadbd", "--no-defaults", "--user=root", f"--datadir={data}", sock, *listen)
        client = ("mariadb", "--no-defaults", sock, "--user=root", "--execute")
        self.wait(lambda: self._runs(*client, "SELECT 1"), 60)
        self.run(*client, "CREATE DATABASE slurm; GRANT ALL ON slurm.* TO slurm@'127.0.0.1' IDENTIFIED BY 'slurm'; FLUSH PRIVILEGES")

    def _daemon(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def _runs(self, *command: str) -> bool:
        return subprocess.run(["timeout", "10", *command], env=self.environment, capture_output=True).returncode == 0


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[SlurmCluster]:
    """Three idle nodes for as long as the block lasts. `folder` has a short path: sockets lie in it."""
    cluster = SlurmCluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _on_node(process: psutil.Process, node: str, conf: str) -> bool:
    try:
        found = process.environ()
    except psutil.Error:
        return False
    return found.get("SLURMD_NODENAME") == node and found.get("SLURM_CONF") == conf


def _parent(process: psutil.Process) -> psutil.Process | None:
    try:
        return process.parent()
    except psutil.Error:
        return None


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
