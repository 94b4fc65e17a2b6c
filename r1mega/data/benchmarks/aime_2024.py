"""AIME 2024: thirty competition problems whose answers are integers from 0 to 999."""

from collections.abc import Mapping
from typing import Any

from r1mega.data import fields
from r1mega.data.benchmarks.math_500 import DIRECTIVE
from r1mega.data.prompts import Prompt


def prompt_of(row: Mapping[str, Any], where: str) -> Prompt:
    """A row of `HuggingFaceH4/aime_2024` (id, problem, solution, answer, url, year) or of `Maxwell-Jia/AIME_2024` (ID, Problem, ...)."""
    problem, answer = fields.text(row, where, "problem", "Problem"), fields.scalar(row, where, "answer", "Answer")
    name = fields.scalar(row, where, "id", "ID")
    return Prompt(id=f"aime_2024/{name}", text=f"{problem.strip()}\n{DIRECTIVE}", answer=answer)
