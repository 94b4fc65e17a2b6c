"""For teams that live in NeMo-Run: `nemorun r1mega submit recipe=... cluster=...`, and `nemorun r1mega stage ...` under their executors.

NeMo-Run finds this module by the entry point `nemo_run.cli` of pyproject.toml.
"""

from collections.abc import Callable
from pathlib import Path

from nemo_run.cli import entrypoint

from r1mega.errors import UserError


def submit(recipe: str, cluster: str, output: str = "", dry_run: bool = False) -> None:
    """Queue the unfinished stages of a recipe on a cluster, as r1mega submit does."""
    from r1mega.launch.submit import submit as queue

    _exits(lambda: print(*queue(Path(recipe), Path(cluster), [], Path(output) if output else None, dry_run), sep="\n"))


def stage(recipe: str, stage: str, output: str, ranks: int = 1, engine_nodes: int = 0, gpus_per_node: int = 0) -> None:
    """Run one stage of a recipe, as r1mega run --stage does: one task a node, `ranks` on all but the last `engine_nodes`."""
    from r1mega.pipeline.stage_task import Alone, run_stage

    alone = Alone(stage, engine_nodes=engine_nodes, gpus_per_node=gpus_per_node)
    _exits(lambda: run_stage(Path(recipe), [f"run.ranks={ranks}"], Path(output), alone))


def _exits(call: Callable[[], int | None]) -> None:
    try:
        code = call()
    except UserError as error:
        raise SystemExit(f"r1mega: {error}") from None
    if code:
        raise SystemExit(code)


for _command in (submit, stage):
    entrypoint(namespace="r1mega", help=(_command.__doc__ or "").rstrip("."))(_command)
