"""Whether a response has the form it was asked for."""

from r1mega.data.prompts import Prompt
from r1mega.rewards.answer import after_thought, thought

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def think(prompt: Prompt, response: str) -> float:
    """1.0 for one thought that is closed and one summary behind it, neither blank, else 0.0: what R1's chat template asks for.

    The opening tag may be missing, where the template wrote it.
    """
    before, opened, _ = response.partition("<think>")
    closed = response.count("</think>") == 1 and response.count("<think>") <= 1 and not (opened and before.strip())
    return float(closed and bool((thought(response) or "").strip()) and bool(after_thought(response).strip()))


def tags(prompt: Prompt, response: str) -> float:
    """1.0 for `<think> thought </think> <answer> answer </answer>` and nothing around it, else 0.0.

    Each tag stands there exactly once, in this order, and neither the thought nor the answer is blank.
    """
    if any(response.count(tag) != 1 for tag in _TAGS):
        return 0.0
    before, _, rest = response.partition("<think>")
    thinking, _, rest = rest.partition("</think>")
    between, _, rest = rest.partition("<answer>")
    answer, closed, after = rest.partition("</answer>")
    return float(bool(closed and thinking.strip() and answer.strip()) and not (before.strip() or between.strip() or after.strip()))
