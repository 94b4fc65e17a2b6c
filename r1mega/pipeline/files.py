"""Files that are whole or absent, and digests of what they hold."""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from r1mega.errors import UserError


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that a reader, or a run started after a crash, sees all of it or what was there before."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def check_writable(path: Path, what: str) -> None:
    """Find out before any work whether `write_atomic` will be able to write a file; UserError says what `what` is wrong with."""
    if path.is_dir():
        raise UserError(f"{what} {path}: is a folder; name a file")
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise UserError(f"{what} {path}: cannot be written ({error.strerror})") from None


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of indented JSON."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The value of a JSON file, None when there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by relative path in sorted order."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    # hashlib lets go of the interpreter lock, so shards of a large model are hashed in parallel.
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(file_digest, files))
    return {path.relative_to(folder).as_posix(): digest for path, digest in zip(files, found, strict=True)}


def combined_digest(files: Mapping[str, str]) -> str:
    """One digest of a folder from the digests of its files: SHA-256 of the sorted lines `digest  path`, as sha256sum prints them."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def text_digest(text: str) -> str:
    """SHA-256 of text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()
