"""The base of every configuration class, marks for paths, and numbers that change over a run."""

import bisect
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, PlainSerializer, PlainValidator


class Closed(BaseModel):
    """A configuration class that refuses keys it does not know and values of another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


@dataclass(frozen=True)
class PathMark:
    """Marks a field that holds a path. Loading makes it absolute, unless it names a stage: `model`, `dataset` and `reward_model` may.

    `data` is a file or a folder.
    """

    what: Literal["file", "folder", "data", "model", "dataset", "reward_model"]

    @property
    def names_stage(self) -> bool:
        return self.what not in ("file", "folder", "data")


@dataclass(frozen=True)
class FunctionMark:
    """Marks a field that names a function as `module:function`, called with so many arguments."""

    arguments: int
    called: str | None = None
    """The arguments as messages show them; None: `(response)` or `(prompt, response)`."""


FilePath = Annotated[str, PathMark("file")]
FolderPath = Annotated[str, PathMark("folder")]
DataPath = Annotated[str, PathMark("data")]
ModelPath = Annotated[str, PathMark("model")]
DatasetPath = Annotated[str, PathMark("dataset")]
RewardModelPath = Annotated[str, PathMark("reward_model")]
RewardFunction = Annotated[str, FunctionMark(2)]
ExtractFunction = Annotated[str, FunctionMark(1)]
EqualFunction = Annotated[str, FunctionMark(2, "(answer, other_answer)")]
RewriteFunction = Annotated[str, FunctionMark(2)]


@dataclass(frozen=True)
class _ScheduleOf:
    """Checks a number, or the numbers that hold from given updates on."""

    above: float = -math.inf
    """Every number is larger than this, """
    least: float = -math.inf
    """and not less than this, """
    most: float = math.inf
    """and not more than this."""

    def __call__(self, value: Any) -> float | dict[int, float]:
        if not isinstance(value, dict):
            return self._number(value)
        wrong = [key for key in value if not str(key).isdigit()]
        if wrong:
            raise ValueError(f"the keys of a schedule are updates, counted from 0; got {wrong[0]!r}")
        # JSON, through which recipes are checked, turns keys into strings.
        schedule = {int(key): self._number(number) for key, number in value.items()}
        if 0 not in schedule:
            raise ValueError(f"a schedule holds the key 0, its value from the first update on; got the keys {sorted(schedule)}")
        return schedule

    def _number(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"expected a number, or a mapping from update to number such as {{0: 1.0, 400: 0.7}}; got {value!r}")
        for wrong, bound in (
            (value <= self.above, f"greater than {self.above:g}"),
            (value < self.least, f"at least {self.least:g}"),
            (value > self.most, f"at most {self.most:g}"),
        ):
            if wrong:
                raise ValueError(f"expected a number that is {bound}; got {value!r}")
        return float(value)


_AS_IT_IS = PlainSerializer(lambda value: value, return_type=Any)
"""Pydantic's own serializer takes the keys of a schedule for strings, and warns."""

Schedule = Annotated[float | dict[int, float], PlainValidator(_ScheduleOf()), _AS_IT_IS]
"""A number, or the numbers that hold from given updates on: `{0: 32768, 8200: 65536}`."""
PositiveSchedule = Annotated[float | dict[int, float], PlainValidator(_ScheduleOf(above=0)), _AS_IT_IS]
NonNegativeSchedule = Annotated[float | dict[int, float], PlainValidator(_ScheduleOf(least=0)), _AS_IT_IS]
ShareSchedule = Annotated[float | dict[int, float], PlainValidator(_ScheduleOf(above=0, most=1)), _AS_IT_IS]
"""Above 0, at most 1."""


def at(schedule: Schedule, update: int) -> float:
    """The value of a schedule at an update (counted from 0)."""
    if not isinstance(schedule, dict):
        return schedule
    starts = sorted(schedule)
    return schedule[starts[bisect.bisect_right(starts, update) - 1]]


def largest(schedule: Schedule) -> float:
    """The largest value that a schedule ever has."""
    return max(schedule.values()) if isinstance(schedule, dict) else schedule


def smallest(schedule: Schedule) -> float:
    """The smallest value that a schedule ever has."""
    return min(schedule.values()) if isinstance(schedule, dict) else schedule
