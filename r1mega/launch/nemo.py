"""NeMo-Run's executors. `nemo_run`, whose import takes five seconds, is imported here and in `entrypoint` alone."""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1mega import env
from r1mega.config.cluster import Cluster, Local, Other, Slurm
from r1mega.errors import UserError
from r1mega.launch.plan import StageTask

_ASK_S = 60.0
_ENDS_FOR_GOOD = """\
# An error of input is one that another attempt would meet again; the first node has written it down.
scontrol() {{
    if [ "$1" = requeue ] && grep -qs '"outcome": "refused"' {logs}/"$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}"/attempt.json; then
        echo "refused, not requeued"
    else
        command scontrol "$@"
    fi
}}"""


@dataclass(frozen=True)
class Submitted:
    """Stages that NeMo-Run has queued or run."""

    experiment: str
    """NeMo-Run's id of it."""
    folder: Path
    """Where NeMo-Run keeps its scripts and logs."""
    jobs: dict[str, str]
    """Slurm's job by stage; empty for other executors."""


def check(title: str, tasks: Sequence[StageTask], cluster: Cluster, folders: Sequence[Path]) -> None:
    """Ask Slurm whether it would take every task. Nothing is queued, and the run directory need not be there.

    Raises:
        UserError: NeMo-Run is not installed, or Slurm refuses a job.
    """
    for name, script in scripts(title, tasks, cluster, folders).items():
        _ask_slurm(name, script)


def submit(title: str, tasks: Sequence[StageTask], cluster: Cluster, folders: Sequence[Path]) -> Submitted:
    """Queue every task with Slurm, or run all of them here; with other executors, as NeMo-Run does it.

    Args:
        title: NeMo-Run's name of the experiment.
        folders: where the stages find modules of the user's own.

    Raises:
        UserError: NeMo-Run is not installed.
    """
    with _experiment(title, tasks, cluster, folders) as experiment:
        experiment.run(detach=isinstance(cluster.executor, Slurm), tail_logs=False)
        handles = {job.id: str(getattr(job, "handle", "")) for job in experiment.jobs}
        jobs = {task.stage: handles[task.stage].rpartition("/")[2] for task in tasks} if isinstance(cluster.executor, Slurm) else {}
        return Submitted(experiment._id, Path(experiment._exp_dir), jobs)


def scripts(title: str, tasks: Sequence[StageTask], cluster: Cluster, folders: Sequence[Path]) -> dict[str, str]:
    """What `submit` would hand to Slurm, by stage; for other executors, the command of each stage."""
    if not isinstance(cluster.executor, Slurm):
        return {task.stage: shlex.join([_python(cluster), "-m", "r1mega.cli", *task.arguments]) + "\n" for task in tasks}
    with _experiment(title, tasks, cluster, folders) as experiment:
        experiment.dryrun(log=False, delete_exp_dir=False)
        folder = Path(experiment._exp_dir)
        found = {task.stage: (folder / f"{task.stage}_sbatch.sh").read_text(encoding="utf-8") for task in tasks}
        shutil.rmtree(folder)
        return found


@contextmanager
def _experiment(title: str, tasks: Sequence[StageTask], cluster: Cluster, folders: Sequence[Path]) -> Iterator[Any]:
    try:
        import nemo_run
    except ImportError as error:
        raise UserError(f"r1mega submit needs NeMo-Run ({error}); ./tools/install cluster, or pip install 'r1mega[cluster]'") from None
    # Its console announces what `r1mega submit` says in fewer lines.
    nemo_run.core.frontend.console.api.CONSOLE.quiet = True
    with nemo_run.Experiment(title) as experiment:
        for task in tasks:
            command = nemo_run.Script(
                path="r1mega.cli", args=[shlex.quote(text) for text in task.arguments], entrypoint=_python(cluster), m=True
            )
            after = list(task.after) or None
            experiment.add(command, executor=_executor(nemo_run, task, cluster, folders), name=task.stage, dependencies=after)
        yield experiment


def _python(cluster: Cluster) -> str:
    if cluster.python is not None:
        return cluster.python
    inside = isinstance(cluster.executor, Slurm) and cluster.executor.container is not None
    return "python" if inside else sys.executable


def _executor(nemo_run: Any, task: StageTask, cluster: Cluster, folders: Sequence[Path]) -> Any:
    executor = cluster.executor
    environment = cluster.environment
    if isinstance(executor, Local):
        environment = {"PYTHONPATH": env.python_path(folders), **environment}
        return nemo_run.LocalExecutor(env_vars=environment, packager=nemo_run.Packager())
    if isinstance(executor, Other):
        made = getattr(nemo_run, executor.executor, None)
        if made is None:
            raise UserError(f"{cluster.name}: 'executor.executor': nemo_run has no {executor.executor}")
        ranks = {executor.ranks_argument: task.ranks_per_node} if executor.ranks_argument else {}
        try:
            return made(env_vars=environment, **executor.arguments, **ranks)
        except TypeError as error:
            raise UserError(f"{cluster.name}: 'executor.arguments': {error}") from None
    return nemo_run.SlurmExecutor(
        **_slurm(executor, task),
        # NeMo-Run writes `export NAME=value` as it is.
        env_vars={name: shlex.quote(value) for name, value in environment.items()} | {"PYTHONPATH": _python_path(environment, folders)},
        setup_lines="\n".join([*cluster.setup, _ENDS_FOR_GOOD.format(logs=shlex.quote(str(task.logs)))]),
        packager=nemo_run.Packager(),
        job_name_prefix="r1mega.",
        poll_estimated_start_time=False,
    )


def _python_path(environment: Mapping[str, str], folders: Sequence[Path]) -> str:
    """A word of shell: what the cluster file says or else what the job has, then folders, which never shadow a library."""
    mine = ":".join(shlex.quote(str(folder)) for folder in folders)
    return f"{shlex.quote(environment['PYTHONPATH'])}:{mine}" if "PYTHONPATH" in environment else "${PYTHONPATH:+$PYTHONPATH:}" + mine


def _slurm(executor: Slurm, task: StageTask) -> dict[str, Any]:
    """Arguments of `SlurmExecutor`: one task a node, in which `r1mega run --stage` starts ranks or, on the last ones, servers alone."""
    found: dict[str, Any] = {
        "account": executor.account,
        "partition": executor.partition,
        "qos": executor.qos,
        "constraint": executor.constraint,
        "time": task.time,
        "nodes": task.nodes + task.engine_nodes,
        "ntasks_per_node": 1,
        "exclusive": executor.exclusive or None,
        "retries": executor.retries,
        "signal": f"USR1@{executor.signal_s}",
        "srun_args": executor.srun_arguments,
        "additional_parameters": _further(executor),
    }
    if executor.gpus == "gpus-per-node":
        found["gpus_per_node"] = task.gpus_per_node
    elif executor.gpus == "gres":
        found["gres"] = f"gpu:{task.gpus_per_node}"
    if executor.container is not None:
        found["container_image"] = executor.container.image
        found["container_mounts"] = list(executor.container.mounts)
        found["container_env"] = list(executor.container.variables) or None
    return found


def _further(executor: Slurm) -> dict[str, Any]:
    # A stage whose input failed would wait for ever.
    found: dict[str, Any] = {"kill-on-invalid-dep": "yes"}
    if executor.reservation is not None:
        found["reservation"] = executor.reservation
    return found | executor.sbatch


def _ask_slurm(stage: str, script: str) -> None:
    """Have Slurm check a script without queueing it. UserError with what it says."""
    try:
        asked = subprocess.run(["sbatch", "--test-only"], input=script, capture_output=True, text=True, timeout=_ASK_S)
    except FileNotFoundError:
        raise UserError("there is no sbatch here; submit from a login node of the cluster, or look at the scripts with --dry-run") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"sbatch does not answer within {_ASK_S:g} s; is the cluster's controller up? (scontrol ping)") from None
    if asked.returncode:
        said = [line for line in asked.stderr.splitlines() if line.strip()] or [f"exit code {asked.returncode}"]
        why = said[-1].replace("allocation failure:", "").replace("sbatch: error:", "").strip()
        raise UserError(f"Slurm refuses stage {stage!r}: {why}; nothing is queued: correct 'executor' of the cluster file")
