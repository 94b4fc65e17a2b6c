"""What can be found out about a recipe before the first stage runs: its functions, its models, its layouts."""

import json
from pathlib import Path

from r1mega.config.base import FunctionMark, PathMark
from r1mega.config.schema import Evaluate, Pretrain, Recipe
from r1mega.config.tree import marked
from r1mega.errors import UserError
from r1mega.pipeline.artifacts import check_model
from r1mega.rewards.imports import load_function


def check_inputs(recipe: Recipe, folder: Path) -> None:
    """Import every function a recipe names, from installed modules or from its folder, and look at every model folder.

    Raises:
        UserError: names the key, and what is wrong with the function or folder.
    """
    for path, function, value in marked(recipe, FunctionMark):
        try:
            load_function(value, [folder], function.arguments)
        except UserError as error:
            raise UserError(f"'{path}': {error}") from None
    for path, mark, value in marked(recipe, PathMark):
        if mark.what == "model" and value not in recipe.stages:
            check_model(Path(value), f"'{path}'")
        elif path.endswith(".architecture") and not (Path(value) / "config.json").is_file():
            raise UserError(f"'{path}': {value} has no config.json")


def check_layouts(recipe: Recipe) -> None:
    """Check the layout of every training stage against its model, as far as its `config.json` exists already.

    Imports Megatron-Core, so the platform is started first.

    Raises:
        UserError: names the stage and the numbers that do not fit.
    """
    from r1mega.megatron import topology
    from r1mega.weights.architecture import Architecture

    for name, stage in recipe.stages.items():
        if isinstance(stage, Evaluate):
            continue
        config = json.loads((model_folder(recipe, name) / "config.json").read_text(encoding="utf-8"))
        try:
            topology.check(Architecture.from_hf(config), stage.layout or recipe.layout, recipe.run.ranks)
        except UserError as error:
            raise UserError(f"stages.{name}: {error}") from None


def model_folder(recipe: Recipe, name: str) -> Path:
    """The folder outside the run whose `config.json` describes a stage's model; followed through the stages it comes from."""
    stage = recipe.stages[name]
    if isinstance(stage, Pretrain):
        return Path(stage.architecture)
    return model_folder(recipe, stage.model) if stage.model in recipe.stages else Path(stage.model)
