"""Checksums of parameters as SGLang 0.5.23's `weights_checker` gives them, for comparing a server's with the trainer's."""

import hashlib
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor

from r1mega.weights.blocks import SCALE

_WORD = (1 << 32) - 1
_LONG = (1 << 64) - 1
_TILE = 8192
_AT_ONCE = 64 * _TILE
_SEEDS = (0x243F6A88, ((0x243F6A88 * 0x9E3779B1) ^ 0xDEADBEEF) & _WORD)
_POSITIONS = ((0x27D4EB2D, 15), (0x165667B1, 13))


def checksum_on(platform: Literal["cpu", "cuda"]) -> Callable[[Tensor], str]:
    """The function of servers there, of contiguous tensors anywhere."""
    return on_cpu if platform == "cpu" else on_gpu


def on_cpu(values: Tensor) -> str:
    """The first 8 bytes of the SHA-256 of a tensor's bytes, in hex."""
    return hashlib.sha256(values.contiguous().view(-1).view(torch.uint8).cpu().numpy().data).hexdigest()[:16]


def on_gpu(values: Tensor) -> str:
    """Sum over tiles of 8,192 words of 32 bits of two hashes each, MurmurHash3's finisher over words mixed with their places; in hex.

    What SGLang computes in a Triton kernel (`gpu_tensor_hash`), here by torch, wherever the tensor is. All sums are modulo 2^32 or 2^64;
    products of int64 wrap, and their low half is right.
    """
    data = values.contiguous().view(-1).view(torch.uint8)
    words = torch.nn.functional.pad(data, (0, -data.numel() % 4)).view(torch.int32)
    if not words.numel():
        return f"{0:016x}"
    total = 0
    for start in range(0, words.numel(), _AT_ONCE):
        part = words[start : start + _AT_ONCE].long() & _WORD
        places = torch.arange(start, start + part.numel(), device=part.device) & _WORD
        first, second = (_tiles(part, places, seed, words.numel(), *how) for seed, how in zip(_SEEDS, _POSITIONS, strict=True))
        total += sum((one << 32) | other for one, other in zip(first, second, strict=True))
    return f"{_split_mixed(total & _LONG):016x}"


def _tiles(words: Tensor, places: Tensor, seed: int, count: int, factor: int, turn: int) -> list[int]:
    """A hash of each tile."""
    mixed = ((places * factor + seed) & _WORD) ^ (((places << turn) | (places >> (32 - turn))) & _WORD)
    hashes = torch.nn.functional.pad(_finished(words ^ mixed), (0, -words.numel() % _TILE))
    found: list[int] = _finished((hashes.view(-1, _TILE).sum(1) & _WORD) ^ (4 * count & _WORD)).tolist()
    return found


def _finished(words: Tensor) -> Tensor:
    """MurmurHash3's finisher (Appleby 2011)."""
    words = ((words ^ (words >> 16)) * 0x85EBCA6B) & _WORD
    words = ((words ^ (words >> 13)) * 0xC2B2AE35) & _WORD
    return words ^ (words >> 16)


def _split_mixed(value: int) -> int:
    """SplitMix64's finisher (Steele et al. 2014)."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _LONG
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _LONG
    return value ^ (value >> 31)


def comparable(named: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Without block FP8: servers hash the values that codes and scales stand for."""
    found = dict(named)
    return [(name, value) for name, value in found.items() if not name.endswith(SCALE) and name + SCALE not in found]
