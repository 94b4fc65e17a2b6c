"""Multiple-choice questions, answered with a letter."""

import re

from r1mega.data.prompts import Prompt
from r1mega.rewards.answer import after_thought, boxed_answer, tagged_answer

_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}")
_LETTER = re.compile(
    r"(?:(?:the )?(?:correct |final |best )?(?:answer|option|choice)(?: is)?[\s:]*|答案[是为]?[\s:：]*|选项?\s*)?"
    r"[(\[（]?(?P<letter>[A-Z])(?:[)\]）]?[.。]?|[)\]）.、:：]\s*\S.*)",
    re.IGNORECASE | re.DOTALL,
)
_STATED = re.compile(r"\banswer(?:\s+is)?[\s*]*[:：](?P<choice>.*)", re.IGNORECASE)
"""What simple-evals asks of the last line: `Answer: B`."""

_WINDOW = 10_000
"""Characters, counted from the end, in which a line is looked for."""


def answer_of(response: str) -> str | None:
    """The letter that a response chooses, in upper case; None if it chooses none or more than one. Consensus votes on it.

    It stands in the last answer tag; without the tag, in the last line `Answer: B`; without that, in the last `\\boxed{...}`.
    """
    text = after_thought(response)
    tagged = tagged_answer(text)
    if tagged is not None:
        return _letter(boxed_answer(tagged) or tagged)
    for line in reversed(text[-_WINDOW:].splitlines()):
        stated = _STATED.search(line)
        if stated is not None:
            return _letter(boxed_answer(stated["choice"]) or stated["choice"])
    boxed = boxed_answer(text)
    return None if boxed is None else _letter(boxed)


def accuracy(prompt: Prompt, response: str) -> float:
    """1.0 if the response chooses the reference's letter, else 0.0. `B`, `(B)`, `B. Paris` and `the answer is B` all choose B."""
    reference = _letter(prompt.answer or "")
    if reference is None:
        raise ValueError(f"prompt {prompt.id}: the reference answer {prompt.answer!r} is not the letter of a choice")
    return float(answer_of(response) == reference)


def _letter(answer: str) -> str | None:
    """`A bird` chooses nothing: after the letter comes the end or a mark that sets it off from the choice's text."""
    bare = _WRAPPED.sub(r"\1", answer[:1_000]).replace("$", "").replace("*", "")
    found = _LETTER.fullmatch(bare.strip())
    return None if found is None else found["letter"].upper()
