"""Judged answers: what reward models learn from."""

from dataclasses import dataclass

from r1mega.data.prompts import Prompt


@dataclass(frozen=True)
class Pair:
    """Two answers to one question, of which `chosen` is the better one."""

    prompt: Prompt
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Judged:
    """One answer, and whether it is safe."""

    prompt: Prompt
    response: str
    safe: bool
