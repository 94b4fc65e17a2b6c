"""From a recipe's prompt set to prompts."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

from r1mega.config.prompts import (
    BenchmarkPrompts,
    DatasetPrompts,
    GymPrompts,
    JsonlPrompts,
    ParquetPrompts,
    Prompts,
    PromptSet,
    TinyPrompts,
)
from r1mega.data.prompts import Message, Prompt
from r1mega.data.rows import Row, jsonl, parquet, read_messages, saved_dataset
from r1mega.data.split import is_heldout, normalised
from r1mega.errors import UserError


def load_prompts(prompt_set: PromptSet, base: Path) -> list[Prompt]:
    """The prompts of one side of a source, each question once, in the source's order.

    A question that the source repeats is kept where it first stands. `is_heldout` of the question alone decides the side, so the train
    and the held-out prompts of any two sources, sizes and seeds share no question, provided that heldout_fraction is the same.
    Ids are made of the source's name and the question, so they do not move when rows do. Relative paths are relative to `base`.
    Raises UserError for a file that is missing, empty or malformed, and when nothing is left.
    """
    source = prompt_set.source
    name, drawn = _draw(source, base)
    kept: dict[bytes, Prompt] = {}
    rows = 0
    for prompt in drawn:
        rows += 1
        key = _key(prompt)
        kept.setdefault(key, prompt if prompt.id else replace(prompt, id=f"{name}/{key.hex()}"))
    if not rows:
        raise UserError(f"{name}: no rows")
    sides = {"train": (False,), "heldout": (True,), "all": (False, True)}[prompt_set.split]
    chosen = (prompt for prompt in kept.values() if is_heldout(prompt.text, prompt_set.heldout_fraction) in sides)
    prompts = list(islice(chosen, prompt_set.limit))
    if not prompts:
        raise UserError(
            f"{name}: none of its {len(kept)} questions is on the {prompt_set.split!r} side "
            f"of heldout_fraction={prompt_set.heldout_fraction:g}; add questions or change the fraction"
        )
    return prompts


def _key(prompt: Prompt) -> bytes:
    """Equal for equal questions: the same text after the same history."""
    parts = [*((turn.role, normalised(turn.content)) for turn in prompt.history), normalised(prompt.text)]
    return blake2b(json.dumps(parts).encode(), digest_size=8).digest()


def _draw(source: Prompts, base: Path) -> tuple[str, Iterable[Prompt]]:
    match source:
        case TinyPrompts():
            from r1mega.data import tiny

            return source.task, tiny.prompts(source)
        case GymPrompts():
            from r1mega.data import gym

            return source.task, gym.prompts(source)
        case JsonlPrompts():
            return _from_rows(source, base / source.path, jsonl)
        case ParquetPrompts():
            return _from_rows(source, base / source.path, parquet)
        case DatasetPrompts():
            return _from_rows(source, base / source.path, lambda path: saved_dataset(path, source.split))
        case BenchmarkPrompts():
            from r1mega.data import benchmarks

            return source.name, benchmarks.prompts(source, base / source.path)


# ---------------------------------------------------------------- from rows to prompts


def _from_rows(
    source: JsonlPrompts | ParquetPrompts | DatasetPrompts, path: Path, read: Callable[[Path], Iterator[Row]]
) -> tuple[str, Iterable[Prompt]]:
    rows = list(read(path))
    prompts = [_prompt(where, row, source.prompt, source.answer) for where, row in rows]
    if not prompts:
        raise UserError(f"{path}: no rows")
    without = [where for where, row in rows if source.answer not in row]
    if 0 < len(without) < len(rows):
        raise UserError(f"{without[0]}: no field {source.answer!r}, which other rows have; add it, null where there is no answer")
    if source.answer != type(source).model_fields["answer"].default and all(prompt.answer is None for prompt in prompts):
        raise UserError(f"{path}: no row has the answer field {source.answer!r}")
    return path.stem, prompts


def _prompt(where: str, row: Mapping[str, Any], prompt_field: str, answer_field: str) -> Prompt:
    if row.get(prompt_field) is None:
        raise UserError(f"{where}: no field {prompt_field!r}; the row has {', '.join(map(repr, row)) or 'no fields'}")
    history, text = _conversation(f"{where}: field {prompt_field!r}", row[prompt_field])
    answer = _answer(f"{where}: field {answer_field!r}", row.get(answer_field))
    meta = {key: value for key, value in row.items() if key not in (prompt_field, answer_field) and _is_json(value)}
    return Prompt(id="", text=text, answer=answer, meta=meta, history=history)


def _conversation(where: str, value: Any) -> tuple[tuple[Message, ...], str]:
    """The turns before the question, and the question: a string, or the last of a list of chat messages."""
    if isinstance(value, str):
        return (), _text(where, value)
    turns = read_messages(where, value)
    for turn in turns:
        _text(where, turn.content)
    *history, question = turns
    if question.role != "user":
        raise UserError(f"{where}: the last chat message is the user's question, got role {question.role!r}")
    return tuple(history), question.content


def _text(where: str, text: str) -> str:
    if not text.strip():
        raise UserError(f"{where}: empty text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: not Unicode: {error.reason} at character {error.start}") from None
    return text


def _answer(where: str, value: Any) -> str | None:
    if value is None or (isinstance(value, float) and value != value):  # pandas writes NaN for a missing cell
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{where}: a reference answer is a string or a number, got {value!r:.60}; rewards find other fields in prompt.meta")
    return str(value)


def _is_json(value: Any) -> bool:
    """Whether a column's value may stand in `Prompt.meta`; dates, bytes and decoded images may not."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_is_json, value))
    return value is None or isinstance(value, str | bool | int | float)
