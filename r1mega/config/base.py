"""The base of every configuration class, and numbers that change over a run."""

import bisect

from pydantic import BaseModel, ConfigDict


class Closed(BaseModel):
    """A configuration class that refuses keys it does not know and values of another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


Schedule = float | dict[int, float]
"""A number, or the numbers that hold from given updates on: `{0: 32768, 8200: 65536}`."""


def at(schedule: Schedule, update: int) -> float:
    """The value of a schedule at an update (counted from 0). A dictionary must hold the key 0."""
    if not isinstance(schedule, dict):
        return schedule
    starts = sorted(schedule)
    return schedule[starts[bisect.bisect_right(starts, update) - 1]]
