"""For teams that live in NeMo-Run: `nemorun r1mega submit recipe=... cluster=...`, and `nemorun r1mega stage ...` under their executors.

NeMo-Run finds this module by the entry point `nemo_run.cli` of pyproject.toml.
"""

from pathlib import Path

from nemo_run.cli import entrypoint

from r1mega.errors import UserError


@entrypoint(namespace="r1mega", help="queue a recipe's stages on a cluster, as r1mega submit does")
def submit(recipe: str, cluster: str, output: str = "", dry_run: bool = False) -> None:
    """Queue the unfinished stages of a recipe."""
    from r1mega.launch.submit import submit as queue

    try:
        print(*queue(Path(recipe), Path(cluster), [], Path(output) if output else None, dry_run), sep="\n")
    except UserError as error:
        raise SystemExit(f"r1mega: {error}") from None


@entrypoint(namespace="r1mega", help="run one stage, as r1mega run --stage does, one task a node")
def stage(recipe: str, stage: str, output: str, ranks: int = 1) -> None:
    """Run one stage of a recipe on this node's part of the ranks."""
    from r1mega.pipeline.stage_task import Alone, run_stage

    try:
        code = run_stage(Path(recipe), [f"run.ranks={ranks}"], Path(output), Alone(stage))
    except UserError as error:
        raise SystemExit(f"r1mega: {error}") from None
    raise SystemExit(code)
