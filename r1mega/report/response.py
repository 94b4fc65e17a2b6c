"""A response as people read it: what was thought, and what was said."""

from dataclasses import dataclass

from r1mega.rewards.answer import after_thought, tagged_answer, thought


@dataclass(frozen=True)
class Parts:
    """A response in two. `thought` is None where nothing marks one, and then `answer` is the whole response."""

    thought: str | None
    answer: str


def parts(response: str) -> Parts:
    """Split a response at its thought's tags; of the rest, the content of the answer's tags where it has them."""
    rest = after_thought(response)
    tagged = tagged_answer(rest)
    thinking = thought(response)
    return Parts(None if thinking is None else thinking.strip(), (rest if tagged is None else tagged).strip())
