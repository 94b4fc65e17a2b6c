r"""Where a response gives its answer: `<think> ... </think> <answer> ... </answer>`, or `\boxed{...}`.

Every function is linear in the length of the response, which is whatever a policy under training writes, megabytes of tags included.
"""

import re

_BOX = "\\boxed{"
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_JOINT = re.compile(r"(?:[\s$,;]|\\[,;() \[\]]|\\text\{\s*(?:and|or)\s*\}|and|or)*")
_SPACER = re.compile(r"(?:[\s$]|\\[() \[\]])*")
_THOUGHT_TAG = re.compile("</?think>")
_WINDOW = 10_000
"""Characters, counted from the end, in which a box is looked for."""


def after_thought(response: str) -> str:
    """The part of a response that is outside its thoughts: what follows the last `</think>`, up to a thought that begins anew.

    A response that never closes a thought that it opened has only what stands before it.
    """
    return response.rpartition("</think>")[2].partition("<think>")[0]


def thought(response: str) -> str | None:
    """What `after_thought` leaves out: the text inside thoughts, one below the other; None for a response without a thought's tag.

    A thought that is never closed reaches to the end, and one that is closed without being opened, as where the chat template opens
    it, began where the response did.
    """
    pieces, start, inside = [], 0, False
    for tag in _THOUGHT_TAG.finditer(response):
        closes = tag[0] == "</think>"
        if inside or closes:
            pieces.append(response[start : tag.start()])
        start, inside = tag.end(), not closes
    if start == 0:
        return None
    if inside:
        pieces.append(response[start:])
    return "\n".join(pieces)


def tagged_answer(text: str) -> str | None:
    """The content of the last `<answer> ... </answer>`, None if there is none."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if start < 0:
        return None
    return text[start + len("<answer>") : end].partition("</answer>")[0].strip()


def boxed_answer(text: str) -> str | None:
    r"""The content of the last `\boxed{...}`, None if there is none or if it is not closed.

    Boxes that are joined by commas, `and` or `or` state one answer together, `\boxed{2}, \boxed{3}`, which is returned as
    `2, 3`: taking one of them would let a response bet on several answers.
    """
    text = text[-_WINDOW:]
    start = text.rfind(_BOX)
    box = _box(text, start) if start >= 0 else None
    if box is None:
        return None
    contents = [box[0]]
    while (previous := text.rfind(_BOX, 0, start)) >= 0:
        box = _box(text, previous)
        if box is None or box[1] > start:
            break
        gap = text[box[1] : start]
        if not _JOINT.fullmatch(gap) or _SPACER.fullmatch(gap):
            break
        contents.append(box[0])
        start = previous
    return ", ".join(dict.fromkeys(reversed(contents)))


def final_answer(response: str) -> str | None:
    r"""The answer that a response gives, None if it gives none. What stands only inside a thought is no answer.

    It is the content of the last answer tag, of the box in it where there is one; without the tag, of the last `\boxed{...}`.
    """
    text = after_thought(response)
    tagged = tagged_answer(text)
    boxed = boxed_answer(text if tagged is None else tagged)
    return tagged if boxed is None else boxed


def _box(text: str, start: int) -> tuple[str, int] | None:
    """Content and end of the box that opens at `start`, None if its braces do not close."""
    depth = 1
    for brace in _BRACE.finditer(text, start + len(_BOX)):
        if brace[0] == "{":
            depth += 1
        elif brace[0] == "}":
            depth -= 1
            if depth == 0:
                return text[start + len(_BOX) : brace.start()].strip(), brace.end()
    return None
