"""The only file that speaks to `reasoning-gym`: its problems as prompts, and its own scorers."""

import ast
import difflib
import json
from functools import lru_cache
from typing import Any

from r1mega.config.prompts import GymPrompts
from r1mega.data.prompts import Prompt
from r1mega.errors import UserError


def prompts(source: GymPrompts) -> list[Prompt]:
    """`size` problems of one task, duplicates among them where the task is small.

    `meta["gym"]` holds what the task's scorer needs: the task, its options, and the problem as a Python literal, because JSON would
    turn the tuples and integer keys that some scorers compare into lists and strings.
    """
    options = json.dumps(source.options, sort_keys=True)
    try:
        dataset = _dataset(source.task, options, source.size, source.seed)
    except (TypeError, ValueError, AssertionError, KeyError) as error:
        raise UserError(f"reasoning-gym task {source.task!r} refuses its options {options}: {error}") from None
    drawn = []
    for index in range(source.size):
        entry = dataset[index]
        literal = repr(_plain(entry))
        if index == 0:
            _check_literal(source.task, entry, literal)
        meta = {"gym": {"task": source.task, "options": options, "entry": literal}}
        answer = entry["answer"]
        drawn.append(Prompt(id="", text=entry["question"], answer=None if answer is None else str(answer), meta=meta))
    return drawn


def score(prompt: Prompt, answer: str) -> float:
    """The task's own score of an answer, from 0 to 1; many tasks give a little for a wrong answer of the right form."""
    gym = prompt.meta.get("gym")
    if gym is None:
        raise ValueError(f"prompt {prompt.id} does not come from a reasoning_gym source")
    return float(_dataset(gym["task"], gym["options"], 1, 0).score_answer(answer, ast.literal_eval(gym["entry"])))


@lru_cache(maxsize=64)
def _dataset(task: str, options: str, size: int, seed: int) -> Any:
    try:
        import reasoning_gym
        from reasoning_gym.composite import DatasetSpec
        from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError as error:
        raise UserError(f"a reasoning_gym source needs a package that is not installed ({error.name}); pip install 'r1mega[gym]'") from None
    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=3, cutoff=0) or [""]
        raise UserError(f"reasoning-gym has no task {task!r}; the nearest are {', '.join(near)}")
    settings = json.loads(options)
    if task == "composite":
        settings["datasets"] = [DatasetSpec(**spec) for spec in settings.get("datasets", [])]
    return reasoning_gym.create_dataset(task, size=size, seed=seed, **settings)


def _plain(value: Any) -> Any:
    """Python's own types in place of NumPy's scalars."""
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    return value.item() if hasattr(value, "item") else value


def _check_literal(task: str, entry: dict[str, Any], literal: str) -> None:
    try:
        same = ast.literal_eval(literal) == entry
    except (ValueError, SyntaxError):
        same = False
    if not same:
        raise UserError(f"reasoning-gym task {task!r} keeps objects in its problems that cannot be written down; its scorer is not usable")
