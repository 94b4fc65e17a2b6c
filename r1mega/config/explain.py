"""What a key of a recipe means: `r1mega explain stages.zero.objective.clip`, or `grpo.objective.clip`."""

from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from r1mega.config import tree
from r1mega.config.base import Closed
from r1mega.config.cluster import Cluster
from r1mega.config.schema import Recipe
from r1mega.config.stages import Stage
from r1mega.errors import UserError

_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


@dataclass(frozen=True)
class _Spot:
    """One meaning of a key path: the annotation found there, its field, and the class that has the field."""

    annotation: Any
    field: FieldInfo | None
    owner: type[Closed] | None


def explain(path: str) -> str:
    """Type, default and description of a key, or the keys below it.

    Paths start at the recipe, at the kind of a stage, or at `cluster` for a cluster file. A key that several kinds have is explained
    for each.

    Raises:
        UserError: there is no such key; names the nearest one.
    """
    spots = [_Spot(Recipe, None, None)]
    steps = [step for step in path.split(".") if step]
    path = ".".join(steps)
    if steps and steps[0] == "cluster":
        steps.pop(0)
        spots = [_Spot(Cluster, None, None)]
    kinds = {tree.kind(member): member for member in tree.classes(Stage)}
    if steps and steps[0] in kinds:
        spots = [_Spot(kinds[steps.pop(0)], None, None)]
    for depth, step in enumerate(steps):
        below = [found for spot in spots for found in _below(spot, step)]
        if not below:
            above = ".".join(path.split(".")[: len(path.split(".")) - len(steps) + depth])
            fixes = [tree.known_instead(step, spot.annotation, above) for spot in spots if tree.classes(spot.annotation)]
            fix = fixes[0] if fixes else f"'{above}' has no keys below it"
            raise UserError(f"no key '{path}'; {fix}")
        spots = below
    texts = [_describe(path, spot) for spot in spots]
    return "\n\n".join(dict.fromkeys(texts))


def _below(spot: _Spot, step: str) -> list[_Spot]:
    found = [
        _Spot(member.model_fields[step].annotation, member.model_fields[step], member)
        for member in tree.classes(spot.annotation)
        if step in member.model_fields
    ]
    item = tree.item(spot.annotation) if not _is_schedule(spot.annotation) else None
    return found if found or item is None else [_Spot(item, None, None)]


def _describe(path: str, spot: _Spot) -> str:
    lines = []
    if spot.field is not None:
        kind = tree.kind(spot.owner) if spot.owner else None
        lines.append(f"{path}{f'  (kind: {kind})' if kind else ''}: {_type(spot.field.annotation, spot.field)}; {_default(spot.field)}")
        if spot.field.description:
            lines.append(f"  {spot.field.description}")
    item = tree.item(spot.annotation)
    members = tree.classes(spot.annotation) or (tree.classes(item) if item is not None else [])
    for member in members:
        kind = tree.kind(member)
        lines.append(f"{'  ' if lines else ''}{f'kind: {kind}. ' if kind else ''}{(member.__doc__ or '').splitlines()[0]}")
        width = max(len(name) for name in member.model_fields)
        lines.extend(
            f"    {name.ljust(width)}  {_type(field.annotation, field)}; {_default(field)}"
            for name, field in member.model_fields.items()
            if name != "kind"
        )
    return "\n".join(lines)


def _is_schedule(annotation: Any) -> bool:
    return {get_origin(part) or part for part in tree.alternatives(annotation)} == {float, dict}


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Closed):
        return "has defaults"
    if value is None:
        return "may be left out"
    return f"default {_plain(value)}"


def _plain(value: Any) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value) or "empty"


def _type(annotation: Any, field: FieldInfo | None = None) -> str:
    bounds = [
        f"{symbol} {getattr(mark, name):g}"
        for mark in (field.metadata if field else ())
        for name, symbol in _BOUNDS.items()
        if getattr(mark, name, None) is not None
    ]
    return " ".join([_type_name(annotation), ", ".join(bounds)]).strip()


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin in (Union, UnionType):
        if _is_schedule(annotation):
            return "number or schedule"
        members = tree.classes(annotation)
        if len(members) > 1:
            return "one of the kinds " + ", ".join(str(tree.kind(member)) for member in members)
        return " or ".join(_type_name(part) for part in tree.alternatives(annotation))
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin is dict:
        return f"mapping from {_type_name(arguments[0])} to {_type_name(arguments[1])}"
    if origin is list:
        return f"list of {_type_name(arguments[0])}"
    if origin is tuple:
        return "list of " + ", ".join(_type_name(part) for part in arguments)
    if isinstance(annotation, type) and issubclass(annotation, Closed):
        return annotation.__name__
    return {str: "string", int: "integer", float: "number", bool: "true or false"}.get(annotation, "any value")
