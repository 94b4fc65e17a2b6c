"""Answered conversations: from files, from rejection stages, and from the tiny language."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from r1mega.config.chats import Chats, FileChats, StageChats, TinyChats
from r1mega.data.prompts import Message
from r1mega.data.rows import Row, jsonl, parquet, read_messages
from r1mega.errors import UserError

DATA = ("data.jsonl", "data.parquet")
"""The file of a dataset folder, whichever is there."""
DESCRIPTION = "dataset.json"
"""What a dataset folder says of itself: how it was made, and the digest of the tokenizer that its `response_ids` belong to."""


@dataclass(frozen=True)
class Conversation:
    """Messages that end with an assistant's. `where` says where they stand, for messages (`data.jsonl:12`).

    `response_ids` are the tokens that the last message was sampled as, stop token included, None where it was never sampled. They belong
    to the tokenizer with the digest `tokenizer`.
    """

    where: str
    messages: tuple[Message, ...]
    response_ids: tuple[int, ...] | None = None
    tokenizer: str | None = None


def read_chats(chats: Chats) -> Iterator[Conversation]:
    """The conversations of one source, in its order.

    Raises UserError for a file that is missing, empty or malformed; names file and line.
    """
    found = islice(_read(chats), chats.limit if not isinstance(chats, TinyChats) else None)
    first = next(found, None)
    if first is None:
        raise UserError(f"{chats.path if isinstance(chats, FileChats) else chats}: no conversations")
    yield first
    yield from found


def _read(chats: Chats) -> Iterator[Conversation]:
    match chats:
        case TinyChats():
            from r1mega.data.tiny import errand

            yield from errand.conversations(chats)
        case FileChats():
            yield from (_conversation(where, row, chats.messages, None) for where, row in _rows(Path(chats.path)))
        case StageChats():
            folder = Path(chats.stage)
            tokenizer = description(folder).get("tokenizer")
            yield from (_conversation(where, row, "messages", tokenizer) for where, row in _rows(_data_file(folder)))


def description(folder: Path) -> dict[str, Any]:
    """What a dataset folder says of itself; UserError when it is none."""
    try:
        found: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{folder}: not a dataset of conversations: its {DESCRIPTION} cannot be read ({error})") from None
    return found


def check_dataset(folder: Path, what: str) -> Path:
    """A dataset folder, or UserError that says what `what` lacks."""
    if not folder.is_dir():
        raise UserError(f"{what}: no folder {folder}")
    _data_file(folder)
    description(folder)
    return folder


def write_dataset(folder: Path, rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any], file_format: str) -> None:
    """Write rows, each with `messages`, and the folder's description. `file_format` is jsonl or parquet."""
    if file_format == "parquet":
        import pyarrow
        from pyarrow import parquet as files

        files.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), folder / "data.parquet")
    else:
        with open(folder / "data.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / DESCRIPTION).write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _data_file(folder: Path) -> Path:
    found = [folder / name for name in DATA if (folder / name).is_file()]
    if not found:
        raise UserError(f"{folder}: not a dataset of conversations: it has neither {' nor '.join(DATA)}")
    return found[0]


def _rows(path: Path) -> Iterator[Row]:
    return parquet(path) if path.suffix == ".parquet" else jsonl(path)


def _conversation(where: str, row: Mapping[str, Any], field: str, tokenizer: str | None) -> Conversation:
    if row.get(field) is None:
        raise UserError(f"{where}: no field {field!r}; the row has {', '.join(map(repr, row)) or 'no fields'}")
    messages = read_messages(f"{where}: field {field!r}", row[field])
    if messages[-1].role != "assistant":
        raise UserError(f"{where}: field {field!r}: the last message is the assistant's answer, got role {messages[-1].role!r}")
    ids = row.get("response_ids")
    return Conversation(where, messages, None if ids is None or tokenizer is None else tuple(ids), tokenizer)
