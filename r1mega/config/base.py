"""The base of every configuration class, marks for paths, and numbers that change over a run."""

import bisect
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, PlainValidator


class Closed(BaseModel):
    """A configuration class that refuses keys it does not know and values of another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


@dataclass(frozen=True)
class PathMark:
    """Marks a field that holds a path. Loading makes it absolute; `model` fields may name a stage instead."""

    what: Literal["file", "folder", "model"]


@dataclass(frozen=True)
class FunctionMark:
    """Marks a field that names a function as `module:function`, called with so many arguments."""

    arguments: int


FilePath = Annotated[str, PathMark("file")]
FolderPath = Annotated[str, PathMark("folder")]
ModelPath = Annotated[str, PathMark("model")]
RewardFunction = Annotated[str, FunctionMark(2)]
ExtractFunction = Annotated[str, FunctionMark(1)]


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"expected a number, or a mapping from update to number such as {{0: 1.0, 400: 0.7}}; got {value!r}")
    return float(value)


def _schedule(value: Any) -> float | dict[int, float]:
    if not isinstance(value, dict):
        return _number(value)
    wrong = [key for key in value if not str(key).isdigit()]
    if wrong:
        raise ValueError(f"the keys of a schedule are updates, counted from 0; got {wrong[0]!r}")
    # JSON, through which recipes are checked, turns keys into strings.
    schedule = {int(key): _number(number) for key, number in value.items()}
    if 0 not in schedule:
        raise ValueError(f"a schedule holds the key 0, its value from the first update on; got the keys {sorted(schedule)}")
    return schedule


Schedule = Annotated[float | dict[int, float], PlainValidator(_schedule)]
"""A number, or the numbers that hold from given updates on: `{0: 32768, 8200: 65536}`."""


def at(schedule: Schedule, update: int) -> float:
    """The value of a schedule at an update (counted from 0)."""
    if not isinstance(schedule, dict):
        return schedule
    starts = sorted(schedule)
    return schedule[starts[bisect.bisect_right(starts, update) - 1]]
