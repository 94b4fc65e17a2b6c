"""From a recipe and a cluster to one task a stage: what it is given, what it waits for, what it runs. No NeMo-Run, no Slurm."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from r1mega.config.checks import check_ranks
from r1mega.config.cluster import Cluster, Container, Resources, Slurm
from r1mega.config.graph import waits_for
from r1mega.config.schema import Recipe
from r1mega.config.stages import Distill, Evaluate, Grpo, Rejection
from r1mega.errors import UserError
from r1mega.pipeline.preflight import check_layouts
from r1mega.rollout.sglang_places import Allocation, own_nodes, places, rooms


@dataclass(frozen=True)
class StageTask:
    """One stage as one job."""

    stage: str
    nodes: int
    """With ranks."""
    ranks_per_node: int
    engine_nodes: int
    """That the engine's servers have to themselves."""
    gpus_per_node: int
    """For ranks and servers, on the fullest node."""
    time: str
    """Slurm's `[days-]hours:minutes:seconds`, of one attempt."""
    after: tuple[str, ...]
    """Stages whose jobs must have succeeded."""
    arguments: tuple[str, ...]
    """Of `r1mega`, the same on every node."""
    logs: Path
    """Folder of the attempts' logs."""


def tasks(recipe: Recipe, cluster: Cluster, run_dir: Path, skip: Mapping[str, object] = {}) -> list[StageTask]:
    """A task for every stage that is not in `skip`, in the recipe's order.

    Each runs `resolved.yaml` of the run directory: what is queued does not change when somebody edits the recipe.

    Raises:
        UserError: the cluster file names a stage that the recipe lacks, a stage does not fit its nodes, or its layout its ranks.
    """
    unknown = cluster.stages.keys() - recipe.stages.keys()
    if unknown:
        raise UserError(f"{cluster.name}: 'stages.{min(unknown)}': no such stage; the recipe's stages are {', '.join(recipe.stages)}")
    found = []
    for name, needs in waits_for(recipe).items():
        if name in skip:
            continue
        nodes, ranks_per_node, time = _given(recipe, cluster, name)
        engines, gpus = _servers(recipe, cluster, name, nodes, ranks_per_node)
        arguments = ["run", str(run_dir / "resolved.yaml"), f"run.ranks={nodes * ranks_per_node}", "--stage", name, "-o", str(run_dir)]
        arguments += ["--restarts", str(cluster.restarts)]
        if isinstance(cluster.executor, Slurm):
            arguments += ["--grace", str(cluster.executor.grace_s)]
        if recipe.rollout.engine == "sglang":
            arguments += ["--engine-nodes", str(engines), "--gpus-per-node", str(gpus)]
        after = tuple(need for need in needs if need not in skip)
        found.append(StageTask(name, nodes, ranks_per_node, engines, gpus, time, after, tuple(arguments), run_dir / "logs" / name))
    return found


def _given(recipe: Recipe, cluster: Cluster, name: str) -> tuple[int, int, str]:
    """Nodes, ranks on each, and time of a stage."""
    own = cluster.stages.get(name, Resources())
    per_node = own.ranks_per_node or cluster.ranks_per_node
    wanted = recipe.run.ranks
    if own.nodes is None and wanted < per_node:
        nodes, per_node = 1, wanted
    elif own.nodes is None and wanted % per_node:
        raise UserError(
            f"{cluster.name}: run.ranks={wanted} does not fill nodes of {per_node} ranks; "
            f"set run.ranks, or stages.{name}.nodes of the cluster file"
        )
    else:
        nodes = own.nodes or wanted // per_node
    if not isinstance(cluster.executor, Slurm) and nodes > 1:
        raise UserError(
            f"{cluster.name}: stage {name!r} needs {nodes} nodes of {per_node} ranks; executor {cluster.executor.kind!r} has one: "
            f"set run.ranks={per_node} or less, or use a cluster file of kind slurm"
        )
    _check_fit(recipe, name, nodes * per_node)
    return nodes, per_node, own.time or cluster.time


def _servers(recipe: Recipe, cluster: Cluster, name: str, nodes: int, per_node: int) -> tuple[int, int]:
    """Nodes that a stage's servers have to themselves, and GPUs that its fullest node needs."""
    servers, generates = recipe.rollout.sglang, isinstance(recipe.stages[name], Grpo | Rejection | Distill | Evaluate)
    engines, gpus = 0, per_node
    if recipe.rollout.engine == "sglang" and not servers.addresses and generates:
        try:
            engines = own_nodes(servers, nodes, per_node, cluster.gpus_per_node)
        except UserError as error:
            raise UserError(f"{cluster.name}: stage {name!r}: {error}") from None
        found = places(servers.layout, rooms(servers, Allocation(0, nodes, engines, cluster.gpus_per_node), per_node))
        gpus = max(per_node, *(piece.first + piece.count for pieces in found for piece in pieces))
    if engines and not isinstance(cluster.executor, Slurm):
        raise UserError(
            f"{cluster.name}: stage {name!r}: its servers need {engines} nodes of their own; executor {cluster.executor.kind!r} has one: "
            "make rollout.sglang.layout smaller, or use a cluster file of kind slurm"
        )
    if cluster.max_nodes is not None and nodes + engines > cluster.max_nodes:
        of = f" and {engines} for its servers" if engines else ""
        raise UserError(
            f"{cluster.name}: stage {name!r} needs {nodes} nodes ({nodes * per_node} ranks, {per_node} a node){of}, more than "
            f"max_nodes={cluster.max_nodes}; choose a smaller layout and run.ranks, or another cluster"
        )
    return engines, gpus


def _check_fit(recipe: Recipe, name: str, ranks: int) -> None:
    check_ranks(recipe, name, ranks, recipe.name)
    check_layouts(recipe.model_copy(update={"run": recipe.run.model_copy(update={"ranks": ranks})}), inputs=False, only=name)


def check_container(container: Container, needed: Mapping[str, Path]) -> None:
    """Look for an image and mounts that are files, and for the folders that a stage needs at their own paths inside.

    Args:
        needed: folders by what they are to the user.

    Raises:
        UserError: names what is not there, or what is not mounted.
    """
    if container.image.startswith(("/", ".")) and not Path(container.image).exists():
        raise UserError(
            f"'executor.container.image': no file {container.image}; build it (docs/cluster.md), or name an image of a registry"
        )
    kept = []
    for mount in container.mounts:
        source, _, rest = mount.partition(":")
        if not Path(source).exists():
            raise UserError(f"'executor.container.mounts': {mount!r}: no folder {source}")
        if rest.partition(":")[0] in ("", source):
            kept.append(Path(source))
    for what, folder in needed.items():
        if not any(folder.is_relative_to(source) for source in kept):
            raise UserError(f"'executor.container.mounts' lacks {what}: add '{folder}:{folder}'")
