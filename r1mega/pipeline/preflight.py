"""What can be found out about a recipe before the first rank starts: one process, no Megatron-Core.

`check_references` takes a fraction of a second and no torch. `check_contents` imports torch and transformers, reads headers of weights
and tokenizes every prompt: 5 s for the tiny recipe, and as much again as a rank will spend on its prompts.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from r1mega.config.base import FunctionMark, PathMark, at, largest
from r1mega.config.chats import FileChats, FilePreferences
from r1mega.config.evaluation import Suite
from r1mega.config.prompts import PromptSet
from r1mega.config.schema import Recipe
from r1mega.config.stages import Distill, Evaluate, Grpo, Preference, Pretrain, Rejection, Sft, Stage
from r1mega.config.training import Optimizer
from r1mega.config.tree import marked
from r1mega.data.chats import check_dataset
from r1mega.errors import UserError
from r1mega.pipeline.artifacts import check_model
from r1mega.rewards.imports import load_function
from r1mega.rewards.sandbox import find_sandbox

if TYPE_CHECKING:
    from r1mega.pipeline.model_folder import ModelFolder
    from r1mega.weights.architecture import Architecture


def check_references(recipe: Recipe, folder: Path, inputs: bool = True, only: str | None = None) -> list[str]:
    """Import every function a recipe names, from installed modules or from its folder; find every model; fit every layout to its model.

    Without `inputs`, files and folders that are not on this machine are returned, each with the first key that names it, or with what a
    folder lacks, instead of refused; layouts are held against every model whose `config.json` is here. With `only`, the name of a stage,
    its layout alone.

    Raises:
        UserError: names the key, and what is wrong with the function, the folder or the layout.
    """
    for path, function, value in marked(recipe, FunctionMark):
        try:
            load_function(value, [folder], function.arguments, function.called)
            if inputs and value.startswith("r1mega.rewards.code:"):
                find_sandbox()
        except UserError as error:
            raise UserError(f"'{path}': {error}") from None
    missing: dict[str, str] = {}
    for path, mark, value in marked(recipe, PathMark):
        if mark.names_stage and value in recipe.stages:
            continue
        try:
            _check_path(mark, path, Path(value))
        except UserError as error:
            if inputs:
                raise
            missing.setdefault(value, str(error) if Path(value).exists() else f"{value} ({path})")
    check_layouts(recipe, inputs, only)
    return list(missing.values())


def _check_path(mark: PathMark, path: str, value: Path) -> None:
    if mark.what in ("model", "reward_model"):
        check_model(value, f"'{path}'")
    elif mark.what == "dataset":
        check_dataset(value, f"'{path}'")
    elif path.endswith(".architecture"):
        if not (value / "config.json").is_file():
            raise UserError(f"'{path}': {value} has no config.json")
    elif not value.exists():
        raise UserError(f"'{path}': no file or folder {value}")


def check_layouts(recipe: Recipe, inputs: bool = True, only: str | None = None) -> None:
    """Check the layout of every training stage, or of one, against the `config.json` of its model, and what this platform can train.

    Without `inputs`, models whose `config.json` is not here are passed over.

    Raises:
        UserError: names the stage and the numbers that do not fit.
    """
    from r1mega.weights.architecture import Architecture, read_config
    from r1mega.weights.engine import check_engine
    from r1mega.weights.wire import Wire

    for name, stage in _chosen(recipe, only):
        try:
            for key, reference in models_of(stage):
                folder = origin(recipe, reference)
                if not inputs and not (folder / "config.json").is_file():
                    continue
                arch = Architecture.from_hf(read_config(folder))
                if key in ("model", "architecture"):
                    _check_layout(recipe, stage, arch)
                if recipe.rollout.engine == "sglang" and arch.head == "lm":
                    engine = recipe.rollout.sglang.layout.model_copy(update={"device": recipe.run.platform})
                    check_engine(arch, engine)
                    Wire(recipe.rollout.dtype, recipe.rollout.sglang.block_fp8).check_served(arch, engine)
                if isinstance(stage, Grpo):
                    if recipe.rollout.routing_replay != "off" and arch.moe is None:
                        raise UserError("rollout.routing_replay=rollout needs a model with experts, and this one has none; use off")
                    for reward in stage.reward_models.values():
                        _check_reward_model(recipe, arch, reward.model, inputs)
        except UserError as error:
            raise UserError(f"stages.{name}: {error}") from None


def _check_layout(recipe: Recipe, stage: Stage, arch: "Architecture") -> None:
    from r1mega.megatron import limits
    from r1mega.weights.pipeline import stages
    from r1mega.weights.placement import check_layout

    if isinstance(stage, Evaluate | Rejection):
        return
    layout = stage.layout or recipe.layout
    limits.check(arch, layout, recipe.run.ranks)
    for optimizer in _optimizers(stage):
        limits.check_platform(recipe.run.platform, stage.train, optimizer)
    arch, layout = limits.trained(arch, layout, stage.train.mtp_loss)
    check_layout(arch, layout)
    stages(arch, layout)


def _optimizers(stage: Pretrain | Sft | Preference | Distill | Grpo) -> list[Optimizer]:
    return [phase.optimizer for phase in stage.phases] if isinstance(stage, Pretrain) else [stage.optimizer]


def _check_reward_model(recipe: Recipe, policy: "Architecture", reference: str, inputs: bool) -> None:
    from r1mega.weights.architecture import Architecture, read_config, reward_architecture

    folder = origin(recipe, reference)
    if not inputs and not (folder / "config.json").is_file():
        return
    if reference not in recipe.stages:
        reward_architecture(folder, policy)
    elif Architecture.from_hf(read_config(folder)).scored() != policy.scored():
        raise UserError(
            f"the reward model {reference!r} is scored on the policy's model and must have its shapes; train it from one like it"
        )


def _chosen(recipe: Recipe, only: str | None) -> list[tuple[str, Stage]]:
    return [(name, stage) for name, stage in recipe.stages.items() if only in (None, name)]


def check_contents(recipe: Recipe, only: str | None = None, local_ranks: int | None = None) -> None:
    """Check the engine, this machine's devices, and for every stage the weights, the tokenizer, the prompts and the conversations.

    Of a model that an earlier stage makes, the configuration and the tokenizer are those of the folder it comes from.

    Args:
        only: the name of the one stage to check; left out: all.
        local_ranks: ranks on this machine; left out: all of `run.ranks`.

    Raises:
        UserError: names the key, and what is missing, malformed or too long.
    """
    from r1mega.pipeline.model_folder import ModelFolder
    from r1mega.rollout import open as engines

    engines.require(recipe.rollout)
    if recipe.run.platform == "cuda":
        from r1mega.megatron.platform import cuda

        cuda.require(local_ranks or recipe.run.ranks)
        for name, stage in _chosen(recipe, only):
            if not isinstance(stage, Evaluate | Rejection):
                cuda.check(stage.train, f"stages.{name}.")
    folders: dict[Path, ModelFolder] = {}
    lengths: dict[tuple[Path, str, int], int] = {}
    for name, stage in _chosen(recipe, only):
        where = f"stages.{name}"
        for key, reference in models_of(stage):
            path = origin(recipe, reference)
            model = folders.setdefault(path, ModelFolder(path))
            _check_folder(model, reference in recipe.stages or key == "architecture", f"{where}.{key}")
            for asked, prompts, cap in _asked(stage, where):
                known = (path, prompts.model_dump_json(), cap)
                if known not in lengths:
                    lengths[known] = _longest(prompts, model, cap, asked)
                if isinstance(stage, Grpo) and asked.startswith(f"{where}.prompts."):
                    _check_chunk(stage, recipe, lengths[known] + cap, where)
        if isinstance(stage, Distill):
            _check_pair(folders[origin(recipe, stage.model)], folders[origin(recipe, stage.teacher)], f"{where}.teacher")
        _check_first_rows(stage, where)
        _check_endpoints(stage, where)


def _check_folder(model: "ModelFolder", made: bool, key: str) -> None:
    """The tokenizer of a model's folder, and the headers of its weights unless these are still to be made."""
    try:
        assert model.tokenizer is not None
        if not made:
            with model.open():
                pass
    except UserError as error:
        raise UserError(f"'{key}': {error}") from None


def _check_pair(student: "ModelFolder", teacher: "ModelFolder", key: str) -> None:
    from r1mega.pipeline.model_folder import check_same_tokens

    try:
        check_same_tokens(student, teacher)
    except UserError as error:
        raise UserError(f"'{key}': {error}") from None


def _check_first_rows(stage: Stage, where: str) -> None:
    """The first row of every file of conversations or judged answers: its fields are those of all the others, mostly."""
    from r1mega.data.chats import read_chats
    from r1mega.data.preferences import read_judged, read_pairs

    try:
        if isinstance(stage, Preference) and isinstance(stage.data, FilePreferences):
            where = f"{where}.data"
            next(read_pairs(stage.data) if stage.loss == "pairwise" else read_judged(stage.data))
        for name, chats in stage.data.items() if isinstance(stage, Sft | Distill) else ():
            if isinstance(chats, FileChats):
                where = f"{where}.data.{name}"
                next(read_chats(chats))
    except UserError as error:
        raise UserError(f"'{where}': {error}") from None


def _check_endpoints(stage: Stage, where: str) -> None:
    """The package and the API key that a server is asked with; whether it answers is found out when its stage begins."""
    if not isinstance(stage, Rejection):
        return
    from r1mega.rollout.openai import credentials

    for key, endpoint in (("endpoint", stage.endpoint), ("judge_endpoint", stage.judge_endpoint)):
        try:
            if endpoint is not None:
                credentials(endpoint)
        except UserError as error:
            raise UserError(f"'{where}.{key}': {error}") from None


def models_of(stage: Stage) -> Iterator[tuple[str, str]]:
    """The language models that a stage reads: the key below the stage, and a stage's name or a folder."""
    match stage:
        case Pretrain():
            yield "architecture", stage.architecture
        case Evaluate():
            yield from ((f"models.{label}", reference) for label, reference in stage.models.items())
        case Distill():
            yield from (("model", stage.model), ("teacher", stage.teacher))
        case Rejection():
            if stage.model is not None:
                yield "model", stage.model
        case _:
            yield "model", stage.model


def origin(recipe: Recipe, reference: str) -> Path:
    """The folder outside the run whose `config.json` describes a model; followed through the stages it comes from."""
    if reference not in recipe.stages:
        return Path(reference)
    return origin(recipe, next(reference for _, reference in models_of(recipe.stages[reference])))


def architectures(recipe: Recipe) -> dict[str, "Architecture"]:
    """The architecture of each stage's model, the student's of a distillation. A stage that asks a server has none."""
    from r1mega.weights.architecture import Architecture, read_config

    first = {name: next((reference for _, reference in models_of(stage)), None) for name, stage in recipe.stages.items()}
    return {
        name: Architecture.from_hf(read_config(origin(recipe, reference))) for name, reference in first.items() if reference is not None
    }


def _asked(stage: Stage, where: str) -> Iterator[tuple[str, PromptSet, int]]:
    """Every prompt set of a stage: its key path, itself, and the most tokens of a response."""
    if isinstance(stage, Grpo):
        for name, prompts in stage.prompts.items():
            yield f"{where}.prompts.{name}", prompts, int(largest(stage.sampling.max_new_tokens))
    if isinstance(stage, Rejection | Distill) and stage.prompts is not None:
        yield f"{where}.prompts", stage.prompts, int(largest(stage.sampling.max_new_tokens))
    suites: Mapping[str, Suite] = {}
    if isinstance(stage, Evaluate):
        suites, where = stage.suites, f"{where}.suites"
    elif not isinstance(stage, Rejection | Preference) and stage.evaluation:
        suites, where = stage.evaluation.suites, f"{where}.evaluation.suites"
    for name, suite in suites.items():
        yield f"{where}.{name}.prompts", suite.prompts, int(at(suite.sampling.max_new_tokens, 0))


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
            f"sampling.max_new_tokens={largest(stage.sampling.max_new_tokens)}; raise the one or lower the other"
        )
