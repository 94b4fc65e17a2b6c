"""Texts as sequences of words, and the hashes of their n-grams."""

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

_CJK = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]{{1,32}}")
# Normalised piece by piece: the time of one piece is quadratic in its combining marks.
_PIECE = re.compile(r"\s*\S{1,256}")
_LATEX_DRESS = re.compile(r"\\(?:left|right|[bB]igg?[lr]?|q?quad|displaystyle|limits|text|mathrm|(?=[dt]frac))(?![a-z])|\\[dt](?=frac)")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def normalised_words(text: str) -> list[str]:
    r"""The words of a text as texts are compared: NFKC, case folded, without punctuation, operators and LaTeX's spacing and sizes.

    Chinese characters and kana are words by themselves; `\frac{1}{2}` and `\dfrac 12` do not come out alike, but `$x + 1$` and `x+1` do.
    """
    if not text.isascii():
        text = "".join(unicodedata.normalize("NFKC", piece) for piece in _PIECE.findall(text))
    return _WORD.findall(_LATEX_DRESS.sub(" ", text).casefold())


def ngram_hashes(words: Sequence[str], n: int) -> Hashes:
    """64-bit hashes of the n-grams of words, in order, [max(0, words - n + 1)]. The same on every machine."""
    count = len(words) - n + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    each = np.fromiter(map(_hash, words), dtype=np.uint64, count=len(words))
    combined = np.zeros(count, dtype=np.uint64)
    for offset in range(n):
        combined = combined * _MULTIPLIER + each[offset : offset + count]
    return combined


@lru_cache(maxsize=1 << 18)
def _hash(word: str) -> int:
    return int.from_bytes(blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
