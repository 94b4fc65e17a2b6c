"""Training sequences on disk, encoded once by all ranks together and read by each where its updates need them.

Each rank writes every world_size-th conversation into files of its own; the order of the sequences is that of the conversations, whatever
the number of ranks. At 800,000 conversations of 5,400 tokens the store takes 22 GB, and no rank holds more than an update's share.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_FILES = ("tokens", "learnt", "index")


@dataclass(frozen=True)
class Counts:
    """What one source came to."""

    conversations: int = 0
    sequences: int = 0
    tokens: int = 0
    learnt: int = 0
    """Tokens with a loss."""
    dropped: int = 0
    """Sequences that were too long."""


def write_part(folder: Path, rank: int, rows: Iterable[tuple[int, Sequence[int], Sequence[bool]]]) -> None:
    """Write this rank's sequences: (row, ids, learnt), in ascending rows. Overwrites what an interrupted start left."""
    ends: list[tuple[int, int]] = []
    total = 0
    with open(folder / f"tokens-{rank}.bin", "wb") as tokens, open(folder / f"learnt-{rank}.bin", "wb") as flags:
        for row, ids, learnt in rows:
            tokens.write(np.asarray(ids, dtype=np.int32).tobytes())
            flags.write(np.asarray(learnt, dtype=np.bool_).tobytes())
            total += len(ids)
            ends.append((row, total))
    (folder / f"index-{rank}.bin").write_bytes(np.asarray(ends, dtype=np.int64).reshape(-1, 2).tobytes())


class TokenStore:
    """The sequences of all ranks' parts, by their place in the order of the conversations."""

    def __init__(self, folder: Path, parts: int) -> None:
        self._tokens, self._learnt, places = [], [], []
        for part in range(parts):
            self._tokens.append(_open(folder / f"tokens-{part}.bin", np.int32))
            self._learnt.append(_open(folder / f"learnt-{part}.bin", np.bool_))
            index = np.fromfile(folder / f"index-{part}.bin", dtype=np.int64).reshape(-1, 2)
            starts = np.concatenate([[0], index[:-1, 1]]) if len(index) else index[:, 1]
            places.append(np.stack([index[:, 0], np.full(len(index), part), starts, index[:, 1]], axis=1))
        everything = np.concatenate(places)
        # Of one row, the sequences stand in one part in their own order, which a stable sort keeps.
        self._places = everything[np.argsort(everything[:, 0], kind="stable")]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        """Token ids int64 [n] and learnt bool [n] of one sequence."""
        _, part, start, end = self._places[place]
        return (
            torch.from_numpy(self._tokens[part][start:end].astype(np.int64)),
            torch.from_numpy(self._learnt[part][start:end].copy()),
        )


def _open(path: Path, dtype: type) -> np.ndarray:
    # An empty file cannot be mapped.
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype=dtype)
