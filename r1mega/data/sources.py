"""From a recipe's prompt set to prompts."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

from r1mega.config.prompts import DatasetPrompts, GymPrompts, JsonlPrompts, ParquetPrompts, Prompts, PromptSet, TinyPrompts
from r1mega.data.prompts import Message, Prompt
from r1mega.data.split import is_heldout, normalised
from r1mega.errors import UserError

Row = tuple[str, Mapping[str, Any]]
"""Where a row stands, for messages (`problems.jsonl:12`), and its fields."""


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

            return source.task, tiny.prompts(source.task, source.size, source.seed)
        case GymPrompts():
            from r1mega.data import gym

            return source.task, gym.prompts(source)
        case JsonlPrompts():
            return _from_rows(source, base / source.path, _jsonl)
        case ParquetPrompts():
            return _from_rows(source, base / source.path, _parquet)
        case DatasetPrompts():
            return _from_rows(source, base / source.path, lambda path: _dataset(path, source.split))


# ---------------------------------------------------------------- rows of files


def _jsonl(path: Path) -> Iterator[Row]:
    if not path.is_file():
        raise UserError(f"no prompt file {path}")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from None
            except (json.JSONDecodeError, RecursionError) as error:
                raise UserError(f"{where}: not JSON: {error}") from None
            if not isinstance(row, dict):
                raise UserError(f"{where}: expected a JSON object with the prompt's fields, got {type(row).__name__}")
            yield where, row


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    if not path.is_file():
        raise UserError(f"no prompt file {path}")
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: not a Parquet file: {error}") from None


def _dataset(path: Path, split: str | None) -> Iterator[Row]:
    from datasets import DatasetDict, load_from_disk

    try:
        saved = load_from_disk(str(path))
    except FileNotFoundError:
        raise UserError(f"no dataset in {path}; expected a folder that Dataset.save_to_disk wrote") from None
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise UserError(f"{path}: {'name a split' if split is None else f'no split {split!r}'}; it has {', '.join(saved)}")
        saved = saved[split]
    elif split is not None:
        raise UserError(f"{path}: holds one dataset without splits; leave out split={split!r}")
    for number, row in enumerate(saved, 1):
        yield f"{path}, row {number}", row


# ---------------------------------------------------------------- from rows to prompts


def _from_rows(
    source: JsonlPrompts | ParquetPrompts | DatasetPrompts, path: Path, read: Callable[[Path], Iterator[Row]]
) -> tuple[str, Iterable[Prompt]]:
    prompts = [_prompt(where, row, source.prompt, source.answer) for where, row in read(path)]
    if not prompts:
        raise UserError(f"{path}: no rows")
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
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: expected a string or a list of chat messages, got {value!r:.60}")
    turns = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise UserError(f"{where}: a chat message is {{'role': ..., 'content': ...}} with two strings, got {message!r:.60}")
        turns.append(Message(message["role"], _text(where, message["content"])))
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
