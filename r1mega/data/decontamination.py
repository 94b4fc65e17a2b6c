"""Keeping a benchmark's texts out of training data, by word n-grams as DeepSeek-R1 did (10-grams; arXiv 2501.12948)."""

from collections.abc import Iterable

import numpy as np

from r1mega.data.ngrams import ngram_hashes, normalised_words

_FEW, _SHARED = 3, 0.1
"""An n-gram is an instruction's when it stands in more texts than this many, and in more than this share of them."""


class Contamination:
    """The n-grams of benchmark texts: questions, and reference solutions if they are given. Eight bytes each.

    An n-gram that many of the texts share is no question but an instruction that goes with all of them, such as where to write the
    answer, and training data has that too: it is left out.
    """

    def __init__(self, benchmark_texts: Iterable[str], n: int = 10) -> None:
        self.n = n
        ngrams, wholes = [], []
        for text in benchmark_texts:
            words = normalised_words(text)
            if len(words) >= n:
                ngrams.append(np.unique(ngram_hashes(words, n)))
            elif words:
                wholes.append((len(words), int(ngram_hashes(words, len(words))[0])))
        found, counts = np.unique(np.concatenate(ngrams), return_counts=True) if ngrams else (np.empty(0, dtype=np.uint64), np.empty(0))
        self._ngrams = found[counts <= max(_FEW, _SHARED * len(ngrams))]
        self._wholes = frozenset(wholes)

    def found(self, text: str) -> str | None:
        """The first n-gram of a text that is a benchmark's too, as normalised words; None if there is none.

        A text of fewer than n words is found if it is all of a benchmark's text: as a part of others it would drop what merely holds
        `2 + 2`.
        """
        words = normalised_words(text)
        if len(words) < self.n:
            whole = words and (len(words), int(ngram_hashes(words, len(words))[0])) in self._wholes
            return " ".join(words) if whole else None
        if not len(self._ngrams):
            return None
        hashes = ngram_hashes(words, self.n)
        places = np.minimum(np.searchsorted(self._ngrams, hashes), len(self._ngrams) - 1)
        hits = np.flatnonzero(self._ngrams[places] == hashes)
        return " ".join(words[hits[0] : hits[0] + self.n]) if len(hits) else None
