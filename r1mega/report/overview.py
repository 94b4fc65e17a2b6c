"""A recipe's stages as lines: what reads what, and how much is done."""

from r1mega.config.base import PathMark
from r1mega.config.schema import Recipe
from r1mega.config.stages import Distill, Evaluate, Grpo, Preference, Pretrain, Rejection, Sft, Stage
from r1mega.config.tree import marked


def overview(recipe: Recipe) -> list[str]:
    """One line a stage, in order, aligned."""
    width, kinds = max(map(len, recipe.stages)), max(len(stage.kind) for stage in recipe.stages.values())
    lines = [f"{recipe.name}: {len(recipe.stages)} stages on {recipe.run.ranks} ranks ({recipe.run.platform})"]
    for name, stage in recipe.stages.items():
        read = [value for _, mark, value in marked(stage, PathMark) if mark.names_stage and value in recipe.stages]
        source = " + ".join(dict.fromkeys(read)) or "-"
        lines.append(f"  {name:<{width}}  {stage.kind:<{kinds}}  from {source}; {_amount(stage)}")
    return lines


def _amount(stage: Stage) -> str:
    match stage:
        case Pretrain():
            return f"{sum(phase.updates for phase in stage.phases):,} updates"
        case Grpo():
            samples = stage.updates * stage.prompts_per_rollout // stage.updates_per_rollout * stage.group_size
            return f"{stage.updates:,} updates, {samples:,} samples"
        case Sft():
            return f"{stage.epochs} epochs of {', '.join(stage.data)} in batches of {stage.batch}"
        case Rejection():
            return f"{stage.k} samples a prompt, at most {stage.keep} kept"
        case Preference():
            return f"{stage.loss}, {stage.epochs} epoch in batches of {stage.batch}"
        case Distill():
            return f"{stage.method}, {stage.updates:,} updates"
        case Evaluate():
            return f"{len(stage.models)} models on {', '.join(stage.suites)}"
