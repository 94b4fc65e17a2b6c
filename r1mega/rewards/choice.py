"""Multiple-choice questions, answered with a letter."""

import re

from r1mega.data.prompts import Prompt
from r1mega.rewards.answer import final_answer

_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}")
_LETTER = re.compile(
    r"(?:(?:the )?(?:correct |final |best )?(?:answer|option|choice)(?: is)?[\s:]*|答案[是为]?[\s:：]*|选项?\s*)?"
    r"[(\[（]?(?P<letter>[A-Z])(?:[)\]）]?[.。]?|[)\]）.、:：]\s*\S.*)",
    re.IGNORECASE | re.DOTALL,
)


def answer_of(response: str) -> str | None:
    """The letter that a response chooses, in upper case; None if it chooses none or more than one. Consensus votes on it."""
    answer = final_answer(response)
    return None if answer is None else _letter(answer)


def accuracy(prompt: Prompt, response: str) -> float:
    """1.0 if the response chooses the reference's letter, else 0.0. `B`, `(B)`, `B. Paris` and `the answer is B` all choose B."""
    reference = _letter(prompt.answer or "")
    if reference is None:
        raise ValueError(f"prompt {prompt.id}: the reference answer {prompt.answer!r} is not the letter of a choice")
    return float(answer_of(response) == reference)


def _letter(answer: str) -> str | None:
    """`A bird` chooses nothing: after the letter comes the end or a mark that sets it off from the choice's text."""
    found = _LETTER.fullmatch(_WRAPPED.sub(r"\1", answer[:1_000]).replace("$", "").replace("*", "").strip())
    return None if found is None else found["letter"].upper()
