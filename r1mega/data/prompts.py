"""Prompts: what every source yields."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """A question.

    `text` is the bare question; templates are applied later. `history` is what was said before it: a system message, earlier turns.
    `answer` is the reference answer, None where a reward needs none.
    `meta` holds whatever else the source knows (language, difficulty, tests), plain JSON values only.
    """

    id: str
    text: str
    answer: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    history: tuple[Message, ...] = ()
