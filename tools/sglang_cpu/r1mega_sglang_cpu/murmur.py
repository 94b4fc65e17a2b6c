"""The random numbers of seeded draws, which SGLang hashes in a Triton kernel."""

import torch

_U32 = 0xFFFFFFFF


def murmur_hash32(seed: torch.Tensor, positions: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """MurmurHash3 (x86, 32 bits, Appleby 2011) of four words: both halves of a seed, a position and a column.

    Args:
        seed: uint64 [n]; positions: [n]; columns: [m].

    Returns:
        uint32 [n, m], the bits that SGLang's kernel gives on a GPU.
    """
    seed = seed.view(torch.int64)
    state = torch.zeros(len(seed), 1, dtype=torch.int64)
    for word in (seed & _U32, (seed >> 32) & _U32, positions.long() & _U32):
        state = _mixed(state, word[:, None])
    state = _mixed(state, columns.long()[None, :] & _U32) ^ 16
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        state = ((state ^ (state >> shift)) * factor) & _U32
    return (state ^ (state >> 16)).to(torch.uint32)


def _mixed(state: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
    """Words stand in the low half of an int64, whose products wrap: the low half stays right."""
    word = _rotated((word * 0xCC9E2D51) & _U32, 15)
    word = (word * 0x1B873593) & _U32
    return (_rotated(state ^ word, 13) * 5 + 0xE6546B64) & _U32


def _rotated(word: torch.Tensor, bits: int) -> torch.Tensor:
    return ((word << bits) | (word >> (32 - bits))) & _U32
