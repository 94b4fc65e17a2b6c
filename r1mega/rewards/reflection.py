"""Words with which a model looks back at what it has just thought."""

import re

from r1mega.data.prompts import Prompt

WORDS = ("wait", "mistake", "however", "but", "retry", "error", "verify", "wrong", "evaluate", "check")
"""The words that DeepSeek-R1's authors counted over the training of R1-Zero (arXiv 2501.12948v2, supplement C.2)."""

_WORD = re.compile(rf"\b(?:{'|'.join(WORDS)})\b", re.IGNORECASE)


def words(prompt: Prompt, response: str) -> float:
    """How many of these words a response holds."""
    return float(sum(1 for _ in _WORD.finditer(response)))
