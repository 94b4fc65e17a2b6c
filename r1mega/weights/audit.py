"""What a checkpoint must hold, from its config.json alone, and what a folder really holds."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

from r1mega.errors import UserError
from r1mega.weights import fp8
from r1mega.weights.architecture import Architecture, read_config
from r1mega.weights.canonical import Tensor, canonical
from r1mega.weights.safetensors_in import INDEX, SCALE, Reader, headers, specs_of
from r1mega.weights.safetensors_out import STRIP_VALUES, strips

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Figures:
    """Counts of a checkpoint. `tensors` and `values` are those of the dequantised model, copies included."""

    stored_tensors: int
    tensors: int
    values: int
    stored_bytes: int


@dataclass
class Findings:
    """What is wrong with a folder, by tensor name. Empty lists mean that the folder is what its config.json says.

    With `duplicated` tensors nothing was compared or read: it is not known which of them counts.
    """

    duplicated: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshaped: list[str] = field(default_factory=list)
    non_finite: list[str] = field(default_factory=list)
    identical: list[tuple[str, ...]] = field(default_factory=list)
    """Groups of matrices with equal values that are not copies of each other."""
    copies_that_differ: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """One line per problem."""
        groups = [" = ".join(names) for names in self.identical]
        named = {
            "duplicated": self.duplicated, "missing": self.missing, "unexpected": self.unexpected, "wrong shape": self.misshaped,
            "not finite": self.non_finite, "identical": groups, "differs from the tensor it copies": self.copies_that_differ,
        }  # fmt: skip
        return [f"{what}: {name}" for what, names in named.items() for name in names]


def figures(config: Mapping[str, Any]) -> Figures:
    """What the checkpoint of a config.json must hold, in the dtype and quantisation that it names."""
    tensors = canonical(Architecture.from_hf(config))
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    if name not in _DTYPES:
        raise UserError(f"config.json: torch_dtype is {name!r}, expected {', '.join(_DTYPES)}")
    specs = specs_of(tensors, _DTYPES[name], is_block_fp8(config))
    return Figures(
        stored_tensors=len(specs),
        tensors=len(tensors),
        values=sum(prod(tensor.shape) for tensor in tensors),
        stored_bytes=sum(spec.nbytes for spec in specs),
    )


def is_block_fp8(config: Mapping[str, Any]) -> bool:
    """Whether a config.json names DeepSeek's 128 x 128 block FP8; UserError for any other quantisation."""
    quantisation = config.get("quantization_config")
    if quantisation is None:
        return False
    if not isinstance(quantisation, Mapping) or quantisation.get("quant_method") != "fp8":
        raise UserError("config.json: quantization_config is supported with quant_method fp8 only")
    if list(quantisation.get("weight_block_size") or ()) != [128, 128]:
        raise UserError(f"config.json: weight_block_size is {quantisation.get('weight_block_size')}, only [128, 128] is supported")
    return True


def has_weights(folder: Path) -> bool:
    """Whether a folder holds safetensors; UserError when it holds weights of another kind only, which nothing here opens."""
    if any(folder.glob("*.safetensors")) or (folder / INDEX).exists():
        return True
    others = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth") for path in folder.glob(kind))
    if others:
        raise UserError(f"{folder} holds {others[0]} and no safetensors; pickles are never read, convert it to safetensors first")
    return False


def stored_figures(folder: Path) -> Figures:
    """What a folder's shards hold, by their headers. A tensor that stands in two shards counts twice."""
    stored = headers(folder)
    weights = [tensor for tensor in stored if not tensor.name.endswith(SCALE)]
    return Figures(
        stored_tensors=len(stored),
        tensors=len(weights),
        values=sum(prod(tensor.shape) for tensor in weights),
        stored_bytes=sum(tensor.nbytes for tensor in stored),
    )


def inspect(folder: Path) -> Findings:
    """Compare a folder with its config.json and read every value once, a strip of rows at a time.

    UserError when the files themselves are damaged, or their index is not of them.
    """
    expected = {tensor.name: tensor for tensor in canonical(Architecture.from_hf(read_config(folder)))}
    shards = _shards(folder)
    found = Findings(duplicated=[f"{name} in {' and '.join(files)}" for name, files in shards.items() if len(files) > 1])
    if found.duplicated:
        return found
    with Reader(folder) as reader:
        readable = _compare(reader, expected, found)
        digests: dict[str, str] = {}
        for name in readable:
            digests[name], finite = _digest(reader, name, expected[name].shape)
            if not finite:
                found.non_finite.append(name)
    named = {file for files in shards.values() for file in files}
    found.unexpected += sorted(f"file {path.name}" for path in folder.glob("*.safetensors") if path.name not in named)
    by_digest: dict[str, list[str]] = defaultdict(list)
    for name, digest in digests.items():
        source = expected[name].copy_of
        if source is None and len(expected[name].shape) > 1:
            by_digest[digest].append(name)
        elif source is not None and digests.get(source, digest) != digest:
            found.copies_that_differ.append(name)
    found.identical = [tuple(names) for names in by_digest.values() if len(names) > 1]
    return found


def _shards(folder: Path) -> dict[str, list[str]]:
    """The shards that each tensor stands in."""
    shards: dict[str, list[str]] = defaultdict(list)
    for stored in headers(folder):
        shards[stored.name].append(stored.shard)
    return shards


def _compare(reader: Reader, expected: Mapping[str, Tensor], found: Findings) -> list[str]:
    """Note what names and shapes say; returns the expected tensors that can be read."""
    # Whether a matrix has scales is said by its own dtype: folders mix quantised and plain matrices.
    scaled = {name + SCALE: name for name, stored in reader.stored.items() if stored.dtype == "F8_E4M3"}
    shapes = {name: tensor.shape for name, tensor in expected.items()}
    shapes |= {scale: fp8.scale_shape(expected[name].shape) for scale, name in scaled.items() if name in expected}
    copies = {name for name, tensor in expected.items() if tensor.copy_of is not None}
    found.missing = sorted(shapes.keys() - reader.stored.keys() - copies)
    found.unexpected = sorted(reader.stored.keys() - shapes.keys())
    present = [name for name in shapes if name in reader.stored]
    wrong = {name for name in present if reader.shape(name) != shapes[name]}
    found.misshaped = [
        f"{name} {list(reader.shape(name))}, config.json says {list(shapes[name])}" for name in present if name in wrong
    ]  # fmt: skip
    damaged = wrong | set(found.missing)
    return [name for name in present if name in expected and name not in damaged and name + SCALE not in damaged]


def _digest(reader: Reader, name: str, shape: tuple[int, ...]) -> tuple[str, bool]:
    """(digest of the values in float32, whether all are finite)."""
    digest, finite = hashlib.blake2b(repr(shape).encode(), digest_size=16), True
    for box in strips(shape, STRIP_VALUES):
        values = reader.read(name, box).float()
        finite = finite and bool(values.isfinite().all())
        digest.update(values.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest(), finite
