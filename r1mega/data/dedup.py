"""Removing texts that are nearly the same as an earlier one: MinHash and locality-sensitive hashing (`datasketch`)."""

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from datasketch import MinHash, MinHashLSH

from r1mega.data.ngrams import ngram_hashes, normalised_words

_SEED = 1
_BATCH = 10_000
"""N-grams that are permuted at once, a kilobyte each."""


@dataclass(frozen=True)
class Deduplicated:
    """Places in the sequence of texts: those that were kept, in order, and for every other one the kept one that it repeats."""

    kept: tuple[int, ...]
    duplicate_of: dict[int, int]


def near_duplicates(texts: Iterable[str], threshold: float = 0.8, n: int = 5, permutations: int = 128) -> Deduplicated:
    """Drop every text whose word n-grams overlap with those of an earlier kept text.

    The overlap is the Jaccard index, estimated with a standard error of at most 0.5 / sqrt(permutations), and `threshold` is where a
    pair counts as the same. Of several such texts the first is named. Texts that are equal but for case, punctuation and white space
    are always found. Deterministic. The texts are read once and not kept: a kept one costs about 5 KB, whatever its length.
    """
    kept: list[int] = []
    duplicate_of: dict[int, int] = {}
    same: dict[bytes, int] = {}
    sketches: dict[int, MinHash] = {}
    index = MinHashLSH(threshold=threshold, num_perm=permutations)
    empty = MinHash(num_perm=permutations, seed=_SEED, hashfunc=int, scheme="affine64")
    for place, text in enumerate(texts):
        words = normalised_words(text)
        key = blake2b(" ".join(words or [text]).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        first = same.get(key)
        if first is None and words:
            sketch = empty.copy()
            hashes = np.unique(ngram_hashes(words, min(n, len(words))))
            for start in range(0, len(hashes), _BATCH):
                sketch.update_batch(hashes[start : start + _BATCH])
            first = min((other for other in index.query(sketch) if sketches[other].jaccard(sketch) >= threshold), default=None)
            if first is None:
                index.insert(place, sketch)
                sketches[place] = sketch
        same.setdefault(key, place if first is None else first)
        if first is None:
            kept.append(place)
        else:
            duplicate_of[place] = first
    return Deduplicated(tuple(kept), duplicate_of)
