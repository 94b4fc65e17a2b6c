"""MATH-500: five hundred problems of the MATH test set (Lightman et al. 2023, arXiv 2305.20050)."""

from collections.abc import Mapping
from typing import Any, Final

from r1mega.data import fields
from r1mega.data.prompts import Prompt

DIRECTIVE: Final = r"Please reason step by step, and put your final answer within \boxed{}."
"""What DeepSeek-R1's model card asks of mathematical problems."""


def prompt_of(row: Mapping[str, Any], where: str) -> Prompt:
    """A row of `HuggingFaceH4/MATH-500`: problem, solution, answer, subject, level, unique_id."""
    problem, answer = fields.text(row, where, "problem"), fields.scalar(row, where, "answer")
    name = fields.scalar(row, where, "unique_id")
    meta = {"subject": fields.text(row, where, "subject"), "level": fields.scalar(row, where, "level")}
    return Prompt(id=f"math_500/{name}", text=f"{problem.strip()}\n{DIRECTIVE}", answer=answer, meta=meta)
