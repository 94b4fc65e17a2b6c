"""A reward of one's own: the right digit, and steps in the language that the row asks for."""

from r1mega.data.prompts import Prompt
from r1mega.rewards.exact import answer_of

STEPS = {"en": ("so", "wait"), "zh": ("ze", "deng")}


def reward(prompt: Prompt, response: str) -> float:
    """0 for a wrong digit; for the right one, 0.5 and up to 0.5 more with the share of steps in the language `speak`."""
    if answer_of(response) != prompt.answer:
        return 0.0
    return 0.5 + 0.5 * spoken(prompt, response)


def spoken(prompt: Prompt, response: str) -> float:
    """Share of the response's steps in the language that the row's field `speak` asks for; 0 without steps."""
    steps = [word for word in response.split() for words in STEPS.values() if word in words]
    return sum(word in STEPS[prompt.meta["speak"]] for word in steps) / max(1, len(steps))
