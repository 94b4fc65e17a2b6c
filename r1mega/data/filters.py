"""Which sampled responses become training data.

DeepSeek-R1's rejection sampling keeps correct responses and drops chains of thought with mixed languages, long paragraphs or code blocks,
and its cold start drops repetition (arXiv 2501.12948). The paper gives no limits; those here are this project's.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from r1mega.data.ngrams import ngram_hashes
from r1mega.data.prompts import Prompt
from r1mega.rewards import format, language
from r1mega.rewards.answer import thought

Reason = Literal["truncated", "wrong_format", "code_in_thought", "long_paragraph", "repetition", "mixed_language"]
REASONS: Final[tuple[Reason, ...]] = ("truncated", "wrong_format", "code_in_thought", "long_paragraph", "repetition", "mixed_language")
"""In the order in which they are looked for."""

_CODE = re.compile(r"```|^[ \t]*~~~|<(?:code|pre)[ >]|\\begin\{(?:lstlisting|minted|verbatim)\}", re.MULTILINE)
_CJK = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\s{_CJK}]+")
# Brackets and signs of LaTeX's grammar are left out, or most of a formula's n-grams would be punctuation.
_SYMBOL = re.compile(rf"\\[A-Za-z]{{1,16}}|[{_CJK}]|[^\W_{_CJK}]{{1,16}}|[^\w\s{{}}()\[\]$^\\,_]")
_NGRAM = 10
_FORMATS: Final = {"think": format.think, "tags": format.tags}
_SMALLEST_WINDOW = 200


@dataclass(frozen=True)
class Filters:
    """What is dropped; None switches a filter off. Those on the thought pass a response without one, which is for `format` to refuse."""

    language_min: float | None = 0.9
    """Least share of the thought's words in the target language."""
    longest_paragraph: int | None = 500
    """Most words of a paragraph in the thought, where CJK characters are words and a line break ends a paragraph."""
    code_in_thought: bool = False
    """Whether the thought may hold code blocks."""
    repetition_max: float | None = 0.5
    """Most that `repetition` may be, in thought and answer together."""
    format: Literal["think", "tags"] | None = "think"
    """`think`: a thought and then an answer; `tags`: the answer in its tags as well (`rewards.format.tags`)."""
    truncated: bool = False
    """Whether a response may be cut off by the limit of its length."""
    share: Callable[[Prompt, str], float | None] = language.share
    """The measure that `language_min` limits; None or NaN where there is nothing to measure."""

    def reason(self, prompt: Prompt, response: str, finish: str = "stop") -> Reason | None:
        """Why a response is dropped, the first in the order of `REASONS`; None if it is kept. `finish` is that of its sample."""
        text = thought(response) or ""
        if finish == "length" and not self.truncated:
            return "truncated"
        if self.format is not None and not _FORMATS[self.format](prompt, response):
            return "wrong_format"
        if not self.code_in_thought and has_code(text):
            return "code_in_thought"
        if self.longest_paragraph is not None and longest_paragraph(text) > self.longest_paragraph:
            return "long_paragraph"
        if self.repetition_max is not None and repetition(response) > self.repetition_max:
            return "repetition"
        if self.language_min is not None:
            share = self.share(prompt, response)
            if share is not None and not math.isnan(share) and share < self.language_min:
                return "mixed_language"
        return None


def has_code(text: str) -> bool:
    """Whether a text holds a block of code: a fence, closed or not, an HTML block or one of LaTeX's listings. Code inline is none."""
    return _CODE.search(text) is not None


def longest_paragraph(text: str) -> int:
    """Words of the longest paragraph. CJK characters are words; a line break ends a paragraph, since a list is not hard to read."""
    return max(sum(1 for _ in _WORD.finditer(paragraph)) for paragraph in text.split("\n"))


def repetition(text: str) -> float:
    """Share of 10-grams that stood before in the same window, in [0, 1), in the window of a text where it is largest.

    Windows are of 200, 400, 800, ... words, numbers and signs, each overlapping half of the next, and at last the whole text, so that
    a loop is seen wherever it begins and whatever its length. A text of fewer is a part of a window: a few repeated words are no loop.
    """
    symbols = _SYMBOL.findall(text)
    hashes = ngram_hashes(symbols, _NGRAM)
    largest, size = 0.0, _SMALLEST_WINDOW
    while True:
        for start in range(0, max(len(hashes) - size // 2, 1), size // 2):
            window = hashes[start : start + size]
            largest = max(largest, (len(window) - len(np.unique(window))) / max(len(window), _SMALLEST_WINDOW))
        if size >= len(hashes):
            return largest
        size *= 2
