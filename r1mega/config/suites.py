"""Benchmarks that ship with the package, as YAML; and recipes that name one in place of writing it out."""

import os
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from r1mega.config import yaml
from r1mega.errors import UserError

Mapping = dict[Any, Any]


def names() -> list[str]:
    """The benchmarks that ship with the package."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _folder().iterdir() if entry.name.endswith(".yaml"))


def shipped(name: str) -> Mapping:
    """The keys of a benchmark that ships with the package; a published one lacks `prompts.source.path`."""
    with resources.as_file(_folder() / f"{name}.yaml") as path:
        data: Mapping = yaml.read(path)
    return data


def expand(data: Any, source: str, base: Callable[[str], Path], path: str = "") -> None:
    """Write out every `{suite: NAME, data: FILE, ...}` below a key `suites`, in place.

    Keys beside these two replace the benchmark's own; `base(key path)` is the folder that a relative FILE is in.
    Raises UserError, naming `source` and the key, for a benchmark that does not exist or rows that are missing.
    """
    if isinstance(data, list):
        data = dict(enumerate(data))
    for key, value in list(data.items()) if isinstance(data, dict) else []:
        here = f"{path}.{key}" if path else str(key)
        if key == "suites" and isinstance(value, dict):
            for name, entry in value.items():
                if isinstance(entry, dict) and entry.keys() & {"suite", "data"}:
                    value[name] = _written_out(entry, f"{source}: '{here}.{name}'", base(f"{here}.{name}.data"))
        else:
            expand(value, source, base, here)


def set_rows(suite: Mapping, rows: str | None, where: str, fix: str) -> None:
    """Put the rows of a published benchmark where its prompts look for them; UserError, saying `fix`, unless it needs them and has them."""
    prompts = suite.get("prompts")
    drawn = prompts.get("source") if isinstance(prompts, dict) else None
    if not isinstance(drawn, dict):
        return  # what is wrong there is said when keys are checked
    if rows is not None and drawn.get("kind") not in ("benchmark", "jsonl", "parquet"):
        raise UserError(f"{where} makes its own prompts; leave out {fix}")
    if rows is not None:
        drawn["path"] = rows
    elif drawn.get("kind") == "benchmark" and "path" not in drawn:
        raise UserError(f"{where} needs {fix}, the benchmark's rows; docs/benchmarks.md says where to get them")


def _written_out(entry: Mapping, where: str, base: Path) -> Mapping:
    entry = dict(entry)
    name, rows = entry.pop("suite", None), entry.pop("data", None)
    if name not in names():
        wrong = "has 'data' but no 'suite'" if name is None else f"no suite {name!r}"
        raise UserError(f"{where}: {wrong}; there are {', '.join(names())}")
    if rows is not None and not isinstance(rows, str):
        raise UserError(f"{where}: 'data' is the path of the benchmark's rows; got {rows!r:.60}")
    suite = _merged(shipped(name), entry)
    set_rows(suite, None if rows is None else os.path.abspath(base / Path(rows).expanduser()), f"{where}: suite {name!r}", "data: FILE")
    return suite


def _merged(first: Mapping, second: Mapping) -> Mapping:
    """The keys of both; mappings are merged, but for one that says its own kind."""
    merged = dict(first)
    for key, value in second.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) and "kind" not in value else value
    return merged


def _folder() -> resources.abc.Traversable:
    return resources.files("r1mega") / "suites"
