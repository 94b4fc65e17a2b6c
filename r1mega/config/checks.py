"""What a recipe must satisfy beyond the types of its keys, checked before anything starts."""

import re
from pathlib import Path

from r1mega.config import tree
from r1mega.config.base import PathMark
from r1mega.config.prompts import PromptSet
from r1mega.config.schema import Recipe
from r1mega.config.stages import Distill, Grpo, Stage
from r1mega.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*$")


_MAKERS = {
    "model": ("pretrain", "sft", "grpo", "distill"),
    "reward_model": ("preference",),
    "dataset": ("rejection",),
}
"""The kinds of stage that make what a reference asks for."""


def check(recipe: Recipe, source: str, inputs: bool = True, only: str | None = None) -> None:
    """Raise UserError for the first thing in a recipe that cannot run; `source` names the recipe in the message.

    Without `inputs`, files and folders of the recipe need not be on this machine. With `only`, that stage alone must suit `run.ranks`.
    """
    _check_names(recipe, source)
    if only is not None and only not in recipe.stages:
        raise UserError(f"{source}: there is no stage {only!r}; the stages are {', '.join(recipe.stages)}")
    twice = recipe.models.keys() & recipe.stages.keys()
    if twice:
        raise UserError(f"{source}: {min(twice)!r} names a folder below 'models' and a stage; give one of them another name")
    for index, (name, stage) in enumerate(recipe.stages.items()):
        earlier = list(recipe.stages)[:index]
        for path, mark, value in tree.marked(stage, PathMark, f"stages.{name}"):
            if mark.names_stage and value in recipe.stages:
                _check_reference(recipe, earlier, path, mark, value, source)
            elif inputs:
                _check_input(earlier, path, mark, value, source)
        if only in (None, name):
            check_ranks(recipe, name, recipe.run.ranks, source)
        _check_placement(recipe, stage, f"stages.{name}", source)
        if isinstance(stage, Grpo):
            for prompts in stage.prompts.values():
                _check_heldout(stage, prompts, f"stages.{name}", source)


def _check_placement(recipe: Recipe, stage: Stage, where: str, source: str) -> None:
    """Servers on the trainer's GPUs draw when it does not train, and there is room for one model's."""
    if recipe.rollout.engine != "sglang" or recipe.rollout.sglang.placement != "colocated":
        return
    if recipe.rollout.sglang.transport == "distributed" and recipe.run.platform == "cuda":
        raise UserError(
            f"{source}: 'rollout.sglang.transport': distributed needs a group with trainer and servers on GPUs of their own, as NCCL takes "
            "each GPU once; use tensor for placement=colocated"
        )
    if isinstance(stage, Grpo) and stage.staleness:
        raise UserError(
            f"{source}: '{where}.staleness': servers on the trainer's GPUs cannot draw while it trains; use "
            "rollout.sglang.placement=disaggregated, or staleness 0"
        )
    if isinstance(stage, Distill):
        raise UserError(
            f"{source}: '{where}' asks a teacher while it trains, and servers on the trainer's GPUs cannot answer then; use "
            "rollout.sglang.placement=disaggregated"
        )


def check_ranks(recipe: Recipe, name: str, ranks: int, source: str) -> None:
    """UserError unless the layout of a stage divides so many ranks."""
    stage = recipe.stages[name]
    layout = stage.layout or recipe.layout
    try:
        layout.dp(ranks), layout.edp(ranks)
    except ValueError as error:
        where = f"stages.{name}.layout" if stage.layout else "layout"
        raise UserError(f"{source}: '{where}': {error} (run.ranks)") from None


def _check_heldout(stage: Grpo, prompts: PromptSet, where: str, source: str) -> None:
    """A question is held out below its own hash, so a benchmark that holds out more than the training prompts do shares some with them."""
    trained = prompts.heldout_fraction if prompts.split == "train" else 0.0
    for name, suite in (stage.evaluation.suites if stage.evaluation else {}).items():
        if suite.prompts.source == prompts.source and suite.prompts.split == "heldout" and suite.prompts.heldout_fraction > trained:
            raise UserError(
                f"{source}: '{where}.evaluation.suites.{name}' holds out {suite.prompts.heldout_fraction:g} of the questions, the training "
                f"prompts leave out {trained:g}: some would be trained on; use the same heldout_fraction"
            )


def _check_names(recipe: Recipe, source: str) -> None:
    for path, name in [("name", recipe.name), *(("stages", name) for name in recipe.stages)]:
        if not _NAME.match(name):
            raise UserError(f"{source}: '{path}': {name!r} names a folder; use letters, digits, '-' and '_'")


def _check_reference(recipe: Recipe, earlier: list[str], path: str, mark: PathMark, value: str, source: str) -> None:
    if value not in earlier:
        raise UserError(f"{source}: '{path}' is the stage {value!r}, which does not come before this one; move it up")
    what = mark.what.replace("_", " ")
    if recipe.stages[value].kind not in _MAKERS[mark.what]:
        raise UserError(
            f"{source}: '{path}' is the stage {value!r}, which makes no {what}; stages of kind {' or '.join(_MAKERS[mark.what])} do"
        )


def _check_input(earlier: list[str], path: str, mark: PathMark, value: str, source: str) -> None:
    if mark.what == "file":
        if not Path(value).is_file():
            raise UserError(f"{source}: '{path}': no file {value}")
    elif mark.what == "data":
        if not Path(value).exists():
            raise UserError(f"{source}: '{path}': no file or folder {value}")
    elif not Path(value).is_dir():
        stages = f" and no earlier stage ({', '.join(earlier) or 'none'})" if mark.names_stage else ""
        raise UserError(f"{source}: '{path}': no folder {value}{stages}")
