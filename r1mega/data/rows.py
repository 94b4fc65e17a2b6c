"""Rows of files, each with the place where it stands."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from r1mega.data.prompts import Message
from r1mega.errors import UserError

Row = tuple[str, Mapping[str, Any]]
"""Where a row stands, for messages (`problems.jsonl:12`), and its fields."""


def jsonl(path: Path) -> Iterator[Row]:
    """Objects of a file of JSON lines; UserError, naming file and line, for a file that is missing or malformed."""
    if not path.is_file():
        raise UserError(f"no file {path}")
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
                raise UserError(f"{where}: expected a JSON object, got {type(row).__name__}")
            yield where, row


def parquet(path: Path) -> Iterator[Row]:
    """Rows of a Parquet file; UserError for a file that is missing or of another kind."""
    import pyarrow
    from pyarrow import parquet

    if not path.is_file():
        raise UserError(f"no file {path}")
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: not a Parquet file: {error}") from None


def saved_dataset(path: Path, split: str | None) -> Iterator[Row]:
    """Rows of a folder that `Dataset.save_to_disk` wrote; UserError for another folder, and for a split that it lacks."""
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


def read_messages(where: str, value: Any) -> tuple[Message, ...]:
    """Chat messages as files hold them, `[{"role": ..., "content": ...}, ...]`; UserError, naming `where`, for anything else."""
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: expected a string or a list of chat messages, got {value!r:.60}")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise UserError(f"{where}: a chat message is {{'role': ..., 'content': ...}} with two strings, got {message!r:.60}")
    return tuple(Message(message["role"], message["content"]) for message in value)
