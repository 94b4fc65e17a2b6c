"""A recipe on a real Slurm of two nodes, through NeMo-Run: whole, after a lost node, and within time limits that are too short for it."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml
from slurm_support import SlurmCluster, slurm_cluster

from r1mega.launch.submit import Submission
from r1mega.pipeline.files import file_digest, read_json
from r1mega.pipeline.metrics import read_metrics
from r1mega.pipeline.nodes import attempts

pytestmark = pytest.mark.slurm
ROOT = Path(__file__).parent.parent
PATIENCE = int(os.environ.get("R1MEGA_TEST_PATIENCE", "1"))
"""How many times as long everything may take, on a machine that is busy with something else."""
PATIENCE_S = PATIENCE * 300.0
SHORT = [
    *("stages.zero.updates=10", "stages.zero.save_every=2", "stages.zero.evaluation=null", "stages.zero.reference_refresh=4"),
    *("stages.zero.prompts_per_rollout=4", "stages.zero.group_size=4", "stages.zero.sampling.max_new_tokens=8"),
    # Written before the next update begins, so that the third row says that there is a checkpoint.
    "stages.zero.train.async_save=false",
    "stages.zero.measures={pause: 'pause:pause'}",
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    pytest.importorskip("nemo_run")
    if os.geteuid() or not shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin"):
        pytest.skip("needs root and tools/install_slurm")
    # A short path: sockets lie in it.
    with tempfile.TemporaryDirectory(prefix="slurm") as folder, slurm_cluster(Path(folder)) as found:
        yield found


@pytest.fixture(scope="module")
def unbroken(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("unbroken") / "run"
    job = submit(cluster, run)
    cluster.wait(lambda: cluster.states(job)[-1:] == ["COMPLETED"], PATIENCE_S)
    return run


def submit(cluster: SlurmCluster, run: Path, *overrides: str, **changes: object) -> str:
    """Submit the short recipe, with changes of the cluster file; returns Slurm's job."""
    file = run.parent / "cluster.yaml"
    executor = {"kind": "slurm", "account": "lab", "partition": "batch", "gpus": "none", "exclusive": True, "retries": 20}
    whole = {
        "name": "lab",
        "executor": {**executor, "signal_s": 20 * PATIENCE},
        "ranks_per_node": 1,
        "restarts": 0,
        "environment": {"PYTHONPATH": python_path()},
        **changes,
    }
    file.write_text(yaml.safe_dump(whole))
    done = command(cluster, "submit", ROOT / "configs/tiny/r1_zero.yaml", *SHORT, *overrides, "--cluster", file, "-o", run)
    assert done.returncode == 0, done.stderr
    made = Submission.read(run)
    assert made is not None and f"job {made.jobs['zero']}" in done.stdout
    return made.jobs["zero"]


def command(cluster: SlurmCluster, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**cluster.environment, "PYTHONPATH": python_path(), "NEMORUN_HOME": str(cluster.folder / "nemo")}
    words = [sys.executable, "-m", "r1mega.cli", *map(str, arguments)]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)


def python_path() -> str:
    known = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(ROOT), str(ROOT / "tests"), *([known] if known else [])])


def weights(run: Path) -> str:
    return file_digest(run / "stages/01-zero/artifact/model.safetensors")


def updates(run: Path) -> list[int]:
    return [row["update"] for row in read_metrics(run / "stages/01-zero/metrics.jsonl")]


def outcomes(run: Path) -> list[str | None]:
    return [attempt.outcome for _, attempt in attempts(run / "logs", "zero")]


def test_two_nodes_run_a_recipe(unbroken: Path) -> None:
    assert updates(unbroken) == list(range(1, 11))
    assert outcomes(unbroken) == ["finished"]
    assert read_json(unbroken / "summary.json")["status"] == "finished"
    assert read_json(unbroken / "stages/01-zero/provenance.json")["ranks"] == 2


def test_a_lost_node_costs_no_more_than_the_updates_since_the_checkpoint(cluster: SlurmCluster, unbroken: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(cluster, run)
    cluster.wait(lambda: len(updates(run)) >= 3, PATIENCE_S)
    cluster.kill_node("n2")
    cluster.wait(lambda: "NODE_FAIL" in cluster.states(job), PATIENCE_S)
    # The spare takes its place: a node that returns at once would be told to end the attempt that it was lost in, and end the next.
    cluster.wait(lambda: cluster.states(job)[-1] == "COMPLETED", PATIENCE_S)
    assert updates(run) == list(range(1, 11))
    assert outcomes(run)[-1] == "finished" and len(outcomes(run)) >= 2
    assert "goes on after update" in log_of(cluster, run)
    assert weights(run) == weights(unbroken)
    cluster.start_node("n2")


def test_a_preempted_stage_saves_and_comes_back(cluster: SlurmCluster, unbroken: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(cluster, run)
    cluster.wait(lambda: len(updates(run)) >= 3, PATIENCE_S)
    all_nodes = ("--account=lab", "--partition=urgent", "--nodes=3", "--exclusive")
    urgent = cluster.run("sbatch", "--parsable", *all_nodes, "--output=/dev/null", "--wrap=true")
    cluster.wait(lambda: cluster.states(urgent.strip())[-1:] == ["COMPLETED"], PATIENCE_S)
    cluster.wait(lambda: cluster.states(job)[-1] == "COMPLETED", PATIENCE_S)
    (_, first), (second, _) = attempts(run / "logs", "zero")
    assert (first.outcome, first.reason) == ("stopped", "SIGTERM")
    # Saved where it was stopped, not where a checkpoint was due.
    went_on = re.search(r"goes on after update (\d)", (second / "progress.log").read_text())
    assert went_on is not None and int(went_on[1]) >= 3
    assert updates(run) == list(range(1, 11))
    assert weights(run) == weights(unbroken)


def test_a_time_limit_saves_and_requeues(cluster: SlurmCluster, unbroken: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(
        cluster, run, time=f"00:{PATIENCE:02d}:00", environment={"PYTHONPATH": python_path(), "R1MEGA_TEST_PAUSE": str(0.25 * PATIENCE)}
    )
    cluster.wait(lambda: cluster.states(job)[-1:] == ["COMPLETED"], 4 * PATIENCE_S)
    assert updates(run) == list(range(1, 11))
    assert "stopped" in outcomes(run) and outcomes(run)[-1] == "finished"
    assert weights(run) == weights(unbroken)


def test_a_rank_that_hangs_is_named_and_the_job_requeued(cluster: SlurmCluster, unbroken: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    phases = ("generate", "judge", "logprobs", "train", "sync", "save")
    job = submit(cluster, run, *(f"run.deadlines.{phase}={15 * PATIENCE}" for phase in phases))
    cluster.wait(lambda: len(updates(run)) >= 3, PATIENCE_S)
    rank_of(run, 1).suspend()
    cluster.wait(lambda: cluster.states(job)[-1] == "COMPLETED", PATIENCE_S)
    assert outcomes(run) == ["hung", "finished"]
    assert re.search(r"hang: rank 1 has been in \w+ .*: it is stopped by a signal", log_of(cluster, run))
    assert updates(run) == list(range(1, 11))
    assert weights(run) == weights(unbroken)


def rank_of(run: Path, number: int) -> psutil.Process:
    """The process of a rank, not what it has started."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("RANK") == str(number) and str(run) in process.cmdline():
                found.append(process)
    return min(found, key=psutil.Process.create_time)


def log_of(cluster: SlurmCluster, run: Path) -> str:
    return command(cluster, "logs", run).stdout


def test_what_slurm_refuses_is_said_before_anything_is_queued(cluster: SlurmCluster, tmp_path: Path) -> None:
    executor = {"kind": "slurm", "account": "lab", "partition": "nosuch", "gpus": "none", "signal_s": 10}
    file = tmp_path / "cluster.yaml"
    for change, word in (({"partition": "nosuch"}, "partition"), ({"account": "nobody"}, "account")):
        whole = {"name": "lab", "executor": {**executor, "partition": "batch", **change}, "ranks_per_node": 1}
        file.write_text(yaml.safe_dump(whole))
        done = command(cluster, "submit", ROOT / "configs/tiny/r1_zero.yaml", *SHORT, "--cluster", file, "-o", tmp_path / "run")
        assert done.returncode == 2 and word in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert not (tmp_path / "run").exists()
    assert cluster.run("squeue", "--noheader") == ""
