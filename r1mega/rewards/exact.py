"""Answers that are compared as strings."""

from r1mega.data.prompts import Prompt
from r1mega.rewards.answer import final_answer


def answer_of(response: str) -> str | None:
    """The response's answer, runs of white space made one space; None if it gives none. Consensus votes on it."""
    answer = final_answer(response)
    return None if answer is None else " ".join(answer.split())


def accuracy(prompt: Prompt, response: str) -> float:
    """1.0 if the response's answer is the reference answer, character by character but for white space, else 0.0."""
    if prompt.answer is None or not prompt.answer.strip():
        raise ValueError(f"prompt {prompt.id} has no reference answer")
    return float(answer_of(response) == " ".join(prompt.answer.split()))
