"""The schema as a tree: what may stand at a key path, and the names near a wrong one."""

import difflib
from collections.abc import Callable, Iterator, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from r1mega.config.base import Closed, FunctionMark, PathMark

M = TypeVar("M", PathMark, FunctionMark)
C = TypeVar("C", bound=Closed)

_ALIKE = 0.5
"""A known key less like the wrong one is no guess."""


def alternatives(annotation: Any) -> list[Any]:
    """The types an annotation allows, without `Annotated`, `Optional` and `Union`."""
    if get_origin(annotation) is Annotated:
        return alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [member for part in get_args(annotation) for member in alternatives(part)]
    return [] if annotation is NoneType else [annotation]


def classes(annotation: Any) -> list[type[Closed]]:
    """The configuration classes an annotation allows."""
    return [member for member in alternatives(annotation) if isinstance(member, type) and issubclass(member, Closed)]


def item(annotation: Any) -> Any | None:
    """The type of the values of a dictionary or list annotation, None for anything else."""
    for member in alternatives(annotation):
        if get_origin(member) in (dict, list, tuple):
            return get_args(member)[-1]
    return None


def kind(cls: type[Closed]) -> str | None:
    """The value of the field `kind` that selects a class in a union, None for classes without one."""
    field = cls.model_fields.get("kind")
    return None if field is None else str(get_args(field.annotation)[0])


def locate(root: Any, location: Sequence[int | str]) -> tuple[str, Any]:
    """Follow a pydantic error location, which names the `kind` after every union it passes.

    Returns the key path as a recipe's author writes it ("stages.zero.phases.0.lr") and the annotation of the deepest known key.
    """
    annotation, path = root, []
    for step in location:
        members = classes(annotation)
        if len(members) > 1:
            chosen = [member for member in members if kind(member) == step]
            if chosen:
                annotation = chosen[0]
                continue
        if step == "[key]":
            continue
        path.append(str(step))
        below = _step(annotation, str(step))
        annotation = annotation if below is None else below
    return ".".join(path), annotation


def _step(annotation: Any, key: str) -> Any | None:
    for member in classes(annotation):
        if key in member.model_fields:
            return member.model_fields[key].annotation
    return item(annotation)


def marked(config: Closed, mark: type[M], path: str = "") -> Iterator[tuple[str, M, str]]:
    """Every value below a configuration whose field carries a kind of mark: its key path, the mark, the value."""
    for name, field in type(config).model_fields.items():
        yield from _marked(getattr(config, name), field.annotation, field.metadata, mark, f"{path}.{name}" if path else name)


def _marked(value: Any, annotation: Any, marks: Sequence[Any], mark: type[M], path: str) -> Iterator[tuple[str, M, str]]:
    if isinstance(value, Closed):
        yield from marked(value, mark, path)
    elif isinstance(value, dict | list):
        below = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in below:
            yield from _marked(part, item(annotation), (), mark, f"{path}.{key}")
    elif isinstance(value, str):
        found = [one for one in (*marks, *metadata(annotation)) if isinstance(one, mark)]
        yield from ((path, one, value) for one in found)


def rewritten(config: C, change: Callable[[str, PathMark, str], str], path: str = "") -> C:
    """A copy of a configuration with every path in it changed: `change(key path, mark, value)`."""

    def part(value: Any, annotation: Any, marks: Sequence[Any], here: str) -> Any:
        if isinstance(value, Closed):
            return rewritten(value, change, here)
        if isinstance(value, dict):
            return {key: part(below, item(annotation), (), f"{here}.{key}") for key, below in value.items()}
        if isinstance(value, list):
            return [part(below, item(annotation), (), f"{here}.{index}") for index, below in enumerate(value)]
        mark = next((one for one in (*marks, *metadata(annotation)) if isinstance(one, PathMark)), None)
        return change(here, mark, value) if mark is not None and isinstance(value, str) else value

    fields = type(config).model_fields.items()
    return config.model_copy(
        update={
            name: part(getattr(config, name), field.annotation, field.metadata, f"{path}.{name}" if path else name)
            for name, field in fields
        }
    )


def metadata(annotation: Any) -> list[Any]:
    """What `Annotated` says of an annotation, and of the members of a union."""
    if get_origin(annotation) is Annotated:
        return list(get_args(annotation)[1:])
    if get_origin(annotation) in (Union, UnionType):
        return [mark for part in get_args(annotation) for mark in metadata(part)]
    return []


def paths_below(annotation: Any, prefix: str = "") -> Iterator[str]:
    """Key paths of every field below an annotation, nearest level first within each class."""
    for member in classes(annotation):
        yield from (prefix + name for name in member.model_fields)
        for name, field in member.model_fields.items():
            yield from paths_below(field.annotation, f"{prefix}{name}.")


def known_instead(key: str, annotation: Any, above: str) -> str:
    """In words, the known key below an annotation that a wrong key most likely meant; all of them where none is like it.

    Args:
        above: path of what is annotated; empty for the whole file.
    """
    paths = list(dict.fromkeys(paths_below(annotation)))
    deeper = [path for path in paths if path.rpartition(".")[2] == key]
    near = min(deeper, key=lambda path: path.count(".")) if deeper else nearest_of(key, keys(annotation))
    if not deeper and likeness(key, near) < _ALIKE:
        return f"known keys there are {', '.join(keys(annotation))}"
    return f"the nearest known key is '{f'{above}.' if above else ''}{near}'"


def nearest_of(word: str, known: Sequence[str]) -> str:
    """The known word that a wrong one most likely meant."""
    return max(known, key=lambda one: likeness(word, one))


def likeness(word: str, other: str) -> float:
    """Between 0 and 1; upper and lower case are one."""
    return difflib.SequenceMatcher(None, word.lower(), other.lower()).ratio()


def keys(annotation: Any) -> list[str]:
    """The keys that may stand directly below an annotation."""
    return list(dict.fromkeys(name for member in classes(annotation) for name in member.model_fields))
