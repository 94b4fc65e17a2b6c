"""The CPU plugin's hash against the published algorithm. The rest of the plugin is what every test with a server runs on."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tools/sglang_cpu"))
from r1mega_sglang_cpu.murmur import murmur_hash32

U32 = 0xFFFFFFFF


def murmur3(data: bytes, seed: int = 0) -> int:
    """MurmurHash3_x86_32 of whole words, written from its definition with numbers of any size."""

    def rotated(word: int, bits: int) -> int:
        return (word << bits | word >> 32 - bits) & U32

    state = seed
    for start in range(0, len(data), 4):
        word = int.from_bytes(data[start : start + 4], "little") * 0xCC9E2D51 & U32
        state ^= rotated(word, 15) * 0x1B873593 & U32
        state = rotated(state, 13) * 5 + 0xE6546B64 & U32
    state ^= len(data)
    state = (state ^ state >> 16) * 0x85EBCA6B & U32
    state = (state ^ state >> 13) * 0xC2B2AE35 & U32
    return state ^ state >> 16


def test_the_definition_gives_published_values():
    assert murmur3(b"aaaa", 0x9747B28C) == 0x5A97808A  # from the reference implementation's test vectors
    assert murmur3(b"") == 0


def test_hashes_are_murmur3_of_seed_position_and_column():
    seeds, positions, columns = [1, 2**63 - 1, 2**40 + 17], [0, 7, 4095], [0, 1, 127, 151_935]
    found = murmur_hash32(torch.tensor(seeds).to(torch.uint64), torch.tensor(positions), torch.tensor(columns))
    expected = [
        [murmur3(seed.to_bytes(8, "little") + position.to_bytes(4, "little") + column.to_bytes(4, "little")) for column in columns]
        for seed, position in zip(seeds, positions, strict=True)
    ]
    assert found.dtype == torch.uint32
    assert found.to(torch.int64).tolist() == expected
