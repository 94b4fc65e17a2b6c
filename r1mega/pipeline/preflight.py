"""What can be found out about a recipe before the first rank starts: one process, no Megatron-Core.

`check_references` takes a fraction of a second and no torch. `check_contents` imports torch and transformers, reads headers of weights
and tokenizes every prompt: 5 s for the tiny recipe, and as much again as a rank will spend on its prompts.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from r1mega.config.base import FunctionMark, PathMark, Schedule, at
from r1mega.config.evaluation import Suite
from r1mega.config.prompts import PromptSet
from r1mega.config.schema import Recipe
from r1mega.config.stages import Evaluate, Grpo, Pretrain, Stage
from r1mega.config.tree import marked
from r1mega.errors import UserError
from r1mega.pipeline.artifacts import check_model
from r1mega.rewards.imports import load_function

if TYPE_CHECKING:
    from r1mega.pipeline.model_folder import ModelFolder


def check_references(recipe: Recipe, folder: Path) -> None:
    """Import every function a recipe names, from installed modules or from its folder; find every model; fit every layout to its model.

    Raises:
        UserError: names the key, and what is wrong with the function, the folder or the layout.
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
    check_layouts(recipe)


def check_layouts(recipe: Recipe) -> None:
    """Check the layout of every training stage against the `config.json` of its model, and what this platform can train.

    Raises:
        UserError: names the stage and the numbers that do not fit.
    """
    from r1mega.megatron import limits
    from r1mega.weights.architecture import Architecture, read_config
    from r1mega.weights.pipeline import stages
    from r1mega.weights.placement import check_layout

    for name, stage in recipe.stages.items():
        try:
            arch = Architecture.from_hf(read_config(model_folder(recipe, name)))
            if isinstance(stage, Evaluate):
                continue
            layout = stage.layout or recipe.layout
            limits.check(arch, layout, recipe.run.ranks)
            limits.check_fp8(recipe.run.platform, stage.train.fp8)
            arch, layout = limits.trained(arch, layout, stage.train.mtp_loss)
            check_layout(arch, layout)
            stages(arch, layout)
        except UserError as error:
            raise UserError(f"stages.{name}: {error}") from None


def check_contents(recipe: Recipe) -> None:
    """Check the engine, this machine's devices, and for every stage the weights, the tokenizer and the prompts.

    Of a model that an earlier stage makes, the configuration and the tokenizer are those of the folder it comes from.

    Raises:
        UserError: names the key, and what is missing, malformed or too long.
    """
    from r1mega.pipeline.model_folder import ModelFolder
    from r1mega.rollout import open as engines

    engines.require(recipe.rollout)
    if recipe.run.platform == "cuda":
        from r1mega.megatron.platform import cuda

        cuda.require(recipe.run.ranks)
    folders: dict[Path, ModelFolder] = {}
    lengths: dict[tuple[Path, str, int], int] = {}
    for name, stage in recipe.stages.items():
        path = model_folder(recipe, name)
        model = folders.setdefault(path, ModelFolder(path))
        _check_folder(stage, model, f"stages.{name}", recipe)
        for key, prompts, cap in _asked(stage, f"stages.{name}"):
            known = (path, prompts.model_dump_json(), cap)
            if known not in lengths:
                lengths[known] = _longest(prompts, model, cap, key)
            if isinstance(stage, Grpo) and prompts is stage.prompts:
                _check_chunk(stage, recipe, lengths[known] + cap, f"stages.{name}")


def _check_folder(stage: Stage, model: "ModelFolder", where: str, recipe: Recipe) -> None:
    try:
        assert model.tokenizer is not None
        if not isinstance(stage, Pretrain) and stage.model not in recipe.stages:
            with model.open():
                pass
    except UserError as error:
        raise UserError(f"'{where}.{'architecture' if isinstance(stage, Pretrain) else 'model'}': {error}") from None


def _asked(stage: Stage, where: str) -> Iterator[tuple[str, PromptSet, int]]:
    """Every prompt set of a stage: its key path, itself, and the most tokens of a response."""
    if isinstance(stage, Grpo):
        yield f"{where}.prompts", stage.prompts, _largest(stage.sampling.max_new_tokens)
    suites: Mapping[str, Suite] = {}
    if isinstance(stage, Evaluate):
        suites, where = stage.suites, f"{where}.suites"
    elif stage.evaluation:
        suites, where = stage.evaluation.suites, f"{where}.evaluation.suites"
    for name, suite in suites.items():
        yield f"{where}.{name}.prompts", suite.prompts, int(at(suite.sampling.max_new_tokens, 0))


def _largest(schedule: Schedule) -> int:
    return int(max(schedule.values()) if isinstance(schedule, dict) else schedule)


def _longest(prompts: PromptSet, model: "ModelFolder", cap: int, key: str) -> int:
    """Load and tokenize prompts as the stage will; returns the tokens of the longest."""
    from r1mega.data.sources import load_prompts
    from r1mega.data.templates import encode

    try:
        return max(map(len, encode(load_prompts(prompts, Path()), prompts.template, model.tokenizer, model.prompt_room(cap))))
    except UserError as error:
        raise UserError(f"'{key}': {error}") from None
    except OSError as error:
        raise UserError(f"'{key}': cannot be read ({error})") from None


def _check_chunk(stage: Grpo, recipe: Recipe, longest: int, where: str) -> None:
    """Refuse a chunk that the longest prompt with the longest response overflows: the run would stop at the first such sequence."""
    from r1mega.data.packing import round_up
    from r1mega.megatron.limits import pad_to

    needed = round_up(longest, pad_to(stage.layout or recipe.layout))
    if needed > stage.train.chunk_tokens:
        raise UserError(
            f"'{where}.train.chunk_tokens': {stage.train.chunk_tokens} is less than the {needed} tokens of the longest prompt with "
            f"sampling.max_new_tokens={_largest(stage.sampling.max_new_tokens)}; raise the one or lower the other"
        )


def model_folder(recipe: Recipe, name: str) -> Path:
    """The folder outside the run whose `config.json` describes a stage's model; followed through the stages it comes from."""
    stage = recipe.stages[name]
    if isinstance(stage, Pretrain):
        return Path(stage.architecture)
    return model_folder(recipe, stage.model) if stage.model in recipe.stages else Path(stage.model)
