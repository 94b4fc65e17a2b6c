"""GPQA Diamond: 198 questions of biology, physics and chemistry with four choices (Rein et al. 2023, arXiv 2311.12022)."""

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, Final

from r1mega.data import fields
from r1mega.data.prompts import Prompt

_LETTERS: Final = "ABCD"
_CORRECT: Final = "Correct Answer"
_CHOICES: Final = (_CORRECT, "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")

_ASKED: Final = (
    "Answer the following multiple choice question. The last line of your response should be of the following format: "
    "'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think step by step before answering."
)
"""The wording of OpenAI's simple-evals."""


def prompt_of(row: Mapping[str, Any], where: str) -> Prompt:
    """A row of `Idavidrein/gpqa`: Question, Correct Answer, Incorrect Answer 1 to 3, and much else.

    The order of the choices is that of their hashes with the question, so it depends neither on the file nor on a seed.
    """
    question = fields.text(row, where, "Question").strip()
    texts = {name: fields.scalar(row, where, name).strip() for name in _CHOICES}
    order = sorted(_CHOICES, key=lambda name: _digest(f"{question}\0{texts[name]}"))
    choices = "\n".join(f"{letter}) {texts[name]}" for letter, name in zip(_LETTERS, order, strict=True))
    return Prompt(
        id=f"gpqa_diamond/{_digest(question)}",
        text=f"{_ASKED}\n\n{question}\n\n{choices}",
        answer=_LETTERS[order.index(_CORRECT)],
        meta={"domain": str(row.get("High-level domain") or "")},
    )


def _digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=8).hexdigest()
