"""From a YAML file, overlays and `key=value` overrides to a checked Recipe, and back to `resolved.yaml`."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from r1mega.config import suites, tree, yaml
from r1mega.config.base import Closed, PathMark
from r1mega.config.checks import check
from r1mega.config.cluster import Cluster
from r1mega.config.engine_layout import EngineFile
from r1mega.config.evaluation import Suite
from r1mega.config.layout import LayoutFile
from r1mega.config.schema import Recipe
from r1mega.errors import UserError

C = TypeVar("C", bound=Closed)
_WORDS = {
    "Input should be": "expected",
    "a valid integer": "an integer",
    "a valid number": "a number",
    "a valid string": "a string",
    "a valid boolean": "true or false",
    "a valid list": "a list",
    "a valid array": "a list",
    "a valid dictionary": "a mapping",
    "an object": "a mapping",
}


@dataclass(frozen=True)
class Override:
    """One `key.path=value` of a command line, or of an overlay; `text` names either. `folder`: what its paths are relative to."""

    path: str
    value: Any
    text: str
    folder: Path

    def covers(self, path: str) -> bool:
        """Whether a key path is this override's or lies below it."""
        return path == self.path or path.startswith(self.path + ".")


def load_recipe(path: str | Path, overrides: Sequence[str] = (), inputs: bool = True, only: str | None = None) -> Recipe:
    """Read a recipe, apply overrides, make its paths absolute and check it.

    An override is `key.path=value` (values are YAML) or the path of an overlay, a YAML file with keys of a recipe: mappings are merged
    into the recipe's, everything else takes the place of what is there. `stages.*.optimizer.offload` is that key of every stage with an
    `optimizer`. They are applied in order.

    Without `inputs`, its files and folders need not be on this machine. With `only`, the name of a stage, that one alone must suit
    `run.ranks`: the others run elsewhere.

    Paths in a file are relative to the file, paths in overrides to the working directory.
    Raises UserError, one line, for anything the recipe says that cannot be run.
    """
    path = Path(path)
    recipe = _load(Recipe, path, [override for text in overrides for override in _overrides(text)])
    check(recipe, str(path), inputs, only)
    return recipe


def load_resolved(path: Path) -> Recipe:
    """Read back a `resolved.yaml`. Nothing is checked against the machine: a run's inputs may be gone when it is only read."""
    return _load(Recipe, path, [])


def load_suite(name: str, rows: Path | None = None, overrides: Sequence[str] = ()) -> Suite:
    """A benchmark that ships with r1mega by its name, or a user's by the path of its YAML file.

    `rows` is the file or folder with a published benchmark's rows. Raises UserError when there is no such benchmark, when it needs rows
    and has none or the other way round, and for overrides as `load_recipe`.
    """
    changes = [_parse_override(text) for text in overrides]
    if name in suites.names():
        data, source, folder = suites.shipped(name), f"suite {name}", Path.cwd()
    elif Path(name).suffix in (".yaml", ".yml"):
        data, source, folder = _read(Path(name)), name, Path(name).parent
    else:
        raise UserError(f"no suite {name!r}; there are {', '.join(suites.names())}, or name a YAML file")
    for change in changes:
        _apply(data, change)
    suites.set_rows(data, None if rows is None else str(rows.absolute()), f"suite {name}", "--data FILE")
    return _build(Suite, data, source, folder, changes)


def load_layout(path: Path) -> LayoutFile:
    """Read one layout from its YAML file; UserError, one line, when it does not suit its own number of ranks."""
    return _load(LayoutFile, path, [])


def load_engine(path: Path) -> EngineFile:
    """Read one engine's layout from its YAML file; UserError, one line, when its sizes do not divide."""
    return _load(EngineFile, path, [])


def load_cluster(path: Path) -> Cluster:
    """Read a cluster file; UserError, one line, for anything in it that cannot be used."""
    return _load(Cluster, path, [])


def dump_resolved(recipe: Recipe) -> str:
    """The whole configuration with every default filled in, as YAML that `load_resolved` reads back to an equal Recipe."""
    return yaml.dump(recipe.model_dump(mode="python"))


def _load(cls: type[C], path: Path, overrides: list[Override]) -> C:
    data = _read(path)
    overrides = [one for override in overrides for one in _each_stage(data, override)]
    for override in overrides:
        _apply(data, override)
    if cls is Recipe:
        suites.expand(data, str(path), lambda key: _folder(key, overrides, path.parent))
    return _build(cls, data, str(path), path.parent, overrides)


def _read(path: Path) -> dict[Any, Any]:
    if path.is_dir():
        raise UserError(f"{path} is a folder; name the YAML file")
    data = yaml.read(path)
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a mapping of keys, got {'nothing' if data is None else repr(data)[:60]}")
    return data


def _build(cls: type[C], data: dict[Any, Any], source: str, folder: Path, overrides: list[Override]) -> C:
    try:
        # JSON mode is the strict mode in which a list may stand for a tuple; numbers in strings stay refused.
        config = cls.model_validate_json(json.dumps(data, default=repr), strict=True)
    except ValidationError as error:
        raise UserError(_first_error(cls, error.errors(include_url=False), source, overrides)) from None
    names = (*config.stages, *config.models) if isinstance(config, Recipe) else ()

    def absolute(path: str, mark: PathMark, value: str) -> str:
        if mark.names_stage and value in names:
            return value
        return os.path.abspath(_folder(path, overrides, folder) / Path(value).expanduser())

    config = tree.rewritten(config, absolute)
    if not isinstance(config, Recipe):
        return config
    models, stages = config.models, config.stages
    return tree.rewritten(config, lambda _, mark, value: models.get(value, value) if mark.names_stage and value not in stages else value)


def _parse_override(text: str) -> Override:
    path, equals, value = text.partition("=")
    if not equals or not path or not all(path.split(".")):
        raise UserError(f"override {text!r}: expected key.path=value, such as stages.zero.updates=100, or a YAML file of keys")
    return Override(path, yaml.parse(value, f"override {text!r}"), text, Path.cwd())


def _overrides(text: str) -> list[Override]:
    """What one argument changes: a key, or the keys of an overlay."""
    if "=" in text or Path(text).suffix not in (".yaml", ".yml"):
        return [_parse_override(text)]
    return list(_leaves(_read(Path(text)), "", text, Path(text).parent))


def _leaves(data: dict[Any, Any], path: str, text: str, folder: Path) -> Iterator[Override]:
    for key, value in data.items():
        if isinstance(value, dict) and value and all(isinstance(below, str) for below in value):
            yield from _leaves(value, f"{path}{key}.", text, folder)
        else:
            yield Override(f"{path}{key}", value, text, folder)


def _each_stage(data: dict[Any, Any], override: Override) -> list[Override]:
    """`stages.*.part.key` stands for that key of every stage that has such a part."""
    if not override.path.startswith("stages.*."):
        return [override]
    below = override.path.removeprefix("stages.*.")
    part, stages = below.partition(".")[0], data.get("stages")
    found = [name for name, stage in stages.items() if isinstance(stage, dict) and part in stage] if isinstance(stages, dict) else []
    if not found:
        raise UserError(f"override {override.text!r}: no stage of this recipe has {part!r}")
    return [replace(override, path=f"stages.{name}.{below}") for name in found]


def _folder(path: str, overrides: Sequence[Override], folder: Path) -> Path:
    """What a path at some key is relative to: the working directory, or its file's folder."""
    return next((override.folder for override in reversed(overrides) if override.covers(path)), folder)


def _apply(data: dict[Any, Any], override: Override) -> None:
    *parents, last = override.path.split(".")
    node: Any = data
    for depth, step in enumerate([*parents, last]):
        if isinstance(node, list):
            if not step.isdigit() or int(step) >= len(node):
                raise UserError(
                    f"override {override.text!r}: '{'.'.join(parents[:depth])}' is a list of {len(node)}; "
                    f"expected an index from 0 to {len(node) - 1}, got {step!r}"
                )
            key: Any = int(step)
        elif isinstance(node, dict):
            key = int(step) if step not in node and step.isdigit() and int(step) in node else step
        else:
            raise UserError(f"override {override.text!r}: '{'.'.join(parents[:depth])}' is {node!r}, which has no keys below it")
        if depth == len(parents):
            node[key] = override.value
            return
        if isinstance(node, dict) and node.get(key) is None:
            if parents[:depth] == ["stages"]:
                raise UserError(f"override {override.text!r}: there is no stage {key!r}; the stages are {', '.join(map(str, node))}")
            node[key] = {}
        node = node[key]


def _first_error(cls: type[Closed], errors: list[ErrorDetails], source: str, overrides: list[Override]) -> str:
    """One line for the error that most likely caused the others: an unknown key before a missing one."""
    error = min(errors, key=lambda found: found["type"] != "extra_forbidden")
    path, text = _describe(cls, error)
    override = next((found for found in reversed(overrides) if found.covers(path) or _made(found, error, path)), None)
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{f'override {override.text!r}' if override else source}: {text}{more}"


def _made(override: Override, error: ErrorDetails, path: str) -> bool:
    """Whether an override of a key below is the likelier cause than the file, which was right as it was shipped."""
    return error["type"] in ("extra_forbidden", "value_error") and override.path.startswith(path + ".")


def _describe(cls: type[Closed], error: ErrorDetails) -> tuple[str, str]:
    path, annotation = tree.locate(cls, error["loc"])
    shown = f"'{path}'" if path else "the file"
    given = repr(error["input"])
    given = given if len(given) <= 80 else given[:77] + "..."
    match error["type"]:
        case "extra_forbidden":
            above = path.rpartition(".")[0]
            return path, f"unknown key {shown}; {tree.known_instead(path.rpartition('.')[2], annotation, above)}"
        case "missing":
            return path, f"missing key {shown}"
        case "union_tag_not_found":
            return path, f"{shown} needs a key 'kind', one of {_kinds(annotation)}"
        case "union_tag_invalid":
            return f"{path}.kind", f"'{path}.kind' is {error['ctx']['tag']!r}; expected one of {_kinds(annotation)}"
        case "value_error":
            return path, f"{shown}: {error['ctx']['error']}"
        case "too_short":
            return path, f"{shown}: expected at least {error['ctx']['min_length']} entry; got {given}"
        case _:
            return path, f"{shown}: {_expectation(annotation, error['msg'])}; got {given}"


def _expectation(annotation: Any, message: str) -> str:
    members = tree.classes(annotation)
    if len(members) > 1:
        return f"expected a mapping with a key 'kind', one of {_kinds(annotation)}"
    if members:
        return f"expected a mapping with keys such as {', '.join(tree.keys(annotation)[:4])}"
    for theirs, ours in _WORDS.items():
        message = message.replace(theirs, ours)
    return message


def _kinds(annotation: Any) -> str:
    return ", ".join(str(tree.kind(member)) for member in tree.classes(annotation))
