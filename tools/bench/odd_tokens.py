"""The benchmark's reward: the share of odd token ids. Costs nothing, and differs between samples."""

from r1mega.data.prompts import Prompt
from r1mega.data.tiny.vocabulary import VOCABULARY

IDS = {word: index for index, word in enumerate(VOCABULARY)}


def reward(prompt: Prompt, response: str) -> float:
    """Computed from the response's words, as every reward here is; a word of the tiny language is a token."""
    ids = [IDS[word] for word in response.split()]
    return sum(index % 2 for index in ids) / max(len(ids), 1)
