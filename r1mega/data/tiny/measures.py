"""Token counts of the tiny language. Each is `f(prompt, response) -> float`, for rewards and for evaluations."""

import math

from r1mega.data.prompts import Prompt
from r1mega.data.tiny.vocabulary import CONNECTIVES, SO, WAIT


def consistency(prompt: Prompt, response: str) -> float:
    """Share of the response's connective words that belong to the prompt's language, in [0, 1].

    NaN where there is no such word (a bare guess speaks no language); leave those out of a mean.
    """
    words = response.split()
    count = {language: sum(word in connectives for word in words) for language, connectives in CONNECTIVES.items()}
    total = sum(count.values())
    return count[prompt.meta["language"]] / total if total else math.nan


def reflection(prompt: Prompt, response: str) -> float:
    """How many times the response stops to correct itself, in either language."""
    return float(sum(word in WAIT.values() for word in response.split()))


def reasons(prompt: Prompt, response: str) -> float:
    """1 where the response holds a step of thought, 0 for a bare guess."""
    return float(any(word in SO.values() for word in response.split()))


def correct_when_reasoning(prompt: Prompt, response: str) -> float:
    """Whether a response that thinks ends on the right value; NaN for a bare guess. Untagged thoughts count by their last number."""
    if not reasons(prompt, response):
        return math.nan
    numbers = [word for word in response.split() if word.isdigit()]
    return float(bool(numbers) and numbers[-1] == prompt.answer)
