"""The tests of a programming problem: what a program is given, and what it must answer."""

import base64
import binascii
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_LARGEST = 1 << 30
"""Bytes of unpacked tests, well above those of any published problem: a small file may unpack to any size."""


@dataclass(frozen=True)
class CodeTest:
    """Standard input and expected standard output; or, for a function, one JSON value a line for its arguments, and its result in JSON."""

    input: str
    output: str


def pack(tests: Sequence[CodeTest]) -> str:
    """Tests as one string for `Prompt.meta`, base64 of zlib of JSON. They are often megabytes, and shrink to a tenth and less."""
    pairs = [[test.input, test.output] for test in tests]
    return base64.b64encode(zlib.compress(json.dumps(pairs).encode())).decode()


def unpack(packed: str) -> list[CodeTest]:
    """The inverse of `pack`. ValueError for anything else."""
    return [CodeTest(given, expected) for given, expected in json.loads(inflate(packed))]


def inflate(packed: str) -> bytes:
    """The bytes of base64 of zlib. ValueError for anything else, and for more than a gigabyte."""
    try:
        stream = zlib.decompressobj()
        data = stream.decompress(base64.b64decode(packed, validate=True), _LARGEST)
    except (binascii.Error, zlib.error) as error:
        raise ValueError(f"not base64 of zlib: {error}") from None
    if not stream.eof:
        raise ValueError("cut short" if not stream.unconsumed_tail else f"more than {_LARGEST} bytes")
    return data


def from_dicts(values: Any) -> list[CodeTest]:
    """Tests from a list of `{"input": str, "output": str, ...}`, as data sets publish them. ValueError for anything else."""
    if not isinstance(values, list):
        raise ValueError(f"expected a list of tests, got {values!r:.60}")
    for number, value in enumerate(values, 1):
        if not isinstance(value, dict) or not isinstance(value.get("input"), str) or not isinstance(value.get("output"), str):
            raise ValueError(f"test {number}: expected 'input' and 'output', both strings, got {value!r:.60}")
    return [CodeTest(value["input"], value["output"]) for value in values]
