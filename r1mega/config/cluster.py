"""What a cluster file can say: where the stages of a recipe run, and on how much of it; `r1mega explain cluster` prints it."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from r1mega.config.base import Closed

_TIME = re.compile(r"(?:(\d+)-)?(\d{1,2}):(\d{2}):(\d{2})$")
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*$")
_MARGIN_S = 20
"""Between the end of a stage's time for saving and the end of its job: exit codes travel, the batch script asks for its requeue."""


def seconds(time: str) -> int:
    """Seconds of Slurm's `[days-]hours:minutes:seconds`; ValueError for anything else."""
    found = _TIME.match(time)
    if found is None:
        raise ValueError(f"expected a time as '[days-]hours:minutes:seconds', in quotes; got {time!r}")
    days, *clock = (int(part or 0) for part in found.groups())
    return days * 86400 + clock[0] * 3600 + clock[1] * 60 + clock[2]


class Container(Closed):
    """The image that stages run in, by Slurm's pyxis plugin."""

    image: str = Field(
        description="an image as --container-image takes it: a squashfs file, or one of a registry, such as nvcr.io#org/name:tag"
    )
    mounts: list[str] = Field(
        default_factory=list, description="'source:target' or 'source:target:flags'; the run directory and the recipe's folder among them"
    )
    variables: list[str] = Field(
        default_factory=list, description="variables of `environment` that win over those of the image (--container-env)"
    )


class Resources(Closed):
    """What one stage is given."""

    nodes: int | None = Field(None, ge=1, description="nodes; left out: as many as run.ranks of the recipe fill")
    ranks_per_node: int | None = Field(None, ge=1, description="ranks on each; left out: the cluster's")
    time: str | None = Field(None, description="time limit of one attempt; left out: the cluster's")

    @field_validator("time")
    @classmethod
    def _is_a_time(cls, time: str | None) -> str | None:
        if time is not None:
            seconds(time)
        return time


class Slurm(Closed):
    """Slurm, reached from a login node."""

    kind: Literal["slurm"]
    account: str = Field(description="account that is charged (--account)")
    partition: str | None = Field(None, description="partition; left out: Slurm's default")
    qos: str | None = Field(None, description="quality of service (--qos)")
    reservation: str | None = Field(None, description="reservation (--reservation)")
    constraint: str | None = Field(None, description="features that nodes must have (--constraint)")
    gpus: Literal["gpus-per-node", "gres", "none"] = Field(
        "gpus-per-node",
        description="how GPUs are asked for: --gpus-per-node, --gres=gpu:N, or not at all",
    )
    exclusive: bool = Field(True, description="nodes are not shared with other jobs")
    retries: int = Field(
        100,
        ge=0,
        description="how often a job goes back into the queue: after a time limit or a failure, never after an error of input",
    )
    signal_s: int = Field(
        300,
        ge=10,
        description="seconds before the time limit, or up to a minute more, at which a stage is asked to save (SIGUSR1); it then has "
        "20 s less than that",
    )
    srun_arguments: list[str] = Field(default_factory=list, description="further arguments of srun, such as --mpi=pmix")
    sbatch: dict[str, str | int | bool] = Field(default_factory=dict, description="further options of sbatch, such as {mail-type: END}")
    container: Container | None = Field(None, description="the image of pyxis; left out: stages run on the nodes as they are")

    @property
    def grace_s(self) -> int:
        """Seconds that a stage has for saving."""
        return max(self.signal_s - _MARGIN_S, self.signal_s // 2)


class Local(Closed):
    """This machine, with NeMo-Run's local executor: for trying a cluster's recipe on a laptop."""

    kind: Literal["local"]


class Other(Closed):
    """Any other executor of NeMo-Run. Stages run on one node each; NeMo-Run's own documentation has the arguments."""

    kind: Literal["other"]
    executor: str = Field(description="class of nemo_run, such as DockerExecutor, KubeflowExecutor, LeptonExecutor or SkypilotExecutor")
    arguments: dict[str, Any] = Field(default_factory=dict, description="its arguments by name")
    ranks_argument: str | None = Field(
        None, description="the argument that is set to a stage's ranks, such as num_gpus (DockerExecutor) or gpus_per_node (LeptonExecutor)"
    )


Executor = Annotated[Slurm | Local | Other, Field(discriminator="kind")]


class Cluster(Closed):
    """Where the stages of a recipe run: one YAML file, such as those in `configs/clusters`."""

    name: str = Field(description="name of the cluster, for people")
    executor: Executor = Field(description="who starts the stages")
    python: str | None = Field(
        None, description="interpreter that has r1mega, on the nodes or in the image; left out: this one, in an image `python`"
    )
    ranks_per_node: int = Field(8, ge=1, description="ranks on a node, one GPU each on a cluster with GPUs")
    gpus_per_node: int = Field(8, ge=1, description="GPUs that a node has, for ranks and the engine's servers beside them")
    max_nodes: int | None = Field(None, ge=1, description="nodes that a stage may ask for at most; left out: not checked here")
    time: str = Field("04:00:00", description="time limit of one attempt, '[days-]hours:minutes:seconds' in quotes")
    restarts: int = Field(1, ge=0, description="how often torchrun starts the ranks of an attempt anew, in place, when one of them dies")
    environment: dict[str, str] = Field(
        default_factory=dict, description="variables of the stages, capitals alone; never a secret: they stand in the scripts"
    )
    setup: list[str] = Field(default_factory=list, description="lines of shell before a stage, such as 'module load cuda' (Slurm)")
    stages: dict[str, Resources] = Field(default_factory=dict, description="stages that differ, by name")

    @field_validator("time")
    @classmethod
    def _is_a_time(cls, time: str) -> str:
        seconds(time)
        return time

    @field_validator("environment")
    @classmethod
    def _are_variables(cls, environment: dict[str, str]) -> dict[str, str]:
        for name in environment:
            if not _VARIABLE.match(name):
                raise ValueError(f"{name!r} is not the name of a variable in capitals, and NeMo-Run would change it into one")
            if name.endswith(("_KEY", "_TOKEN", "_SECRET", "_PASSWORD")):
                raise ValueError(f"{name} looks like a secret and would stand in a script; export it where you submit, Slurm passes it on")
        return environment

    @model_validator(mode="after")
    def _there_is_time_to_save(self) -> "Cluster":
        if isinstance(self.executor, Slurm):
            for where, time in [("time", self.time), *((f"stages.{name}.time", found.time) for name, found in self.stages.items())]:
                if time is not None and seconds(time) <= self.executor.signal_s:
                    raise ValueError(
                        f"{where}={time!r} is not longer than executor.signal_s={self.executor.signal_s}: all of it would be saving"
                    )
        return self
