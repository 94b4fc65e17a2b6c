"""Whether a response has the form it was asked for."""

from r1mega.data.prompts import Prompt

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def tags(prompt: Prompt, response: str) -> float:
    """1.0 for `<think> thought </think> <answer> answer </answer>` and nothing around it, else 0.0.

    Each tag stands there exactly once, in this order, and neither the thought nor the answer is blank.
    """
    if any(response.count(tag) != 1 for tag in _TAGS):
        return 0.0
    before, _, rest = response.partition("<think>")
    thought, _, rest = rest.partition("</think>")
    between, _, rest = rest.partition("<answer>")
    answer, closed, after = rest.partition("</answer>")
    return float(bool(closed and thought.strip() and answer.strip()) and not (before.strip() or between.strip() or after.strip()))
