"""Hugging Face checkpoint folders, read by box without loading.

Block-FP8 tensors are dequantised while they are read, so readers see float tensors only. No pickle is ever opened.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from r1mega.errors import UserError
from r1mega.weights import canonical, fp8
from r1mega.weights.architecture import Architecture
from r1mega.weights.blocks import SCALE as SCALE
from r1mega.weights.boxes import Box
from r1mega.weights.table import Storage

INDEX = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor as a file stores it; `dtype` in safetensors' spelling, such as "BF16"."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    shard: str

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize


class Reader:
    """The tensors of one Hugging Face folder, with one `model.safetensors` or an index and shards.

    Opening reads headers only. `stored` has every tensor in the files, scales included; use as a context manager.

    Raises (when opened): UserError for a missing folder, index or shard, an index that disagrees with its shards,
    a truncated or damaged file, a dtype that no checkpoint of these families has.
    """

    def __init__(self, folder: Path, dequantised: torch.dtype = torch.float32) -> None:
        """`dequantised` is the dtype in which block-FP8 tensors are read."""
        self.folder, self.dequantised = folder, dequantised
        self._files: dict[str, Any] = {}
        self.stored: dict[str, Stored] = {}
        index = _read_index(folder)
        for shard in _shard_names(index):
            self._open(shard)
        if index is not None:
            self._check_index(index)

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._files.clear()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; UserError when there is none of that name."""
        return self._find(name).shape

    def read(self, name: str, box: Box) -> Tensor:
        """A region of a tensor, in the dtype of the file, or `dequantised` when it is block-FP8.

        UserError when the tensor is missing, smaller than the box, or quantised without fitting scales.
        """
        stored = self._find(name)
        if len(stored.shape) != len(box.stop) or any(stop > extent for stop, extent in zip(box.stop, stored.shape, strict=True)):
            raise UserError(f"{self.folder / stored.shard}: {name} has shape {list(stored.shape)}, expected at least {list(box.stop)}")
        values = self._slice(stored, box)
        if stored.dtype != "F8_E4M3":
            return values
        if len(stored.shape) != 2:
            raise UserError(f"{self.folder / stored.shard}: {name} is float8 but no matrix; block scales are for matrices")
        scale = self._find(name + SCALE)
        if scale.shape != fp8.scale_shape(stored.shape):
            expected = list(fp8.scale_shape(stored.shape))
            raise UserError(f"{self.folder / scale.shard}: {scale.name} has shape {list(scale.shape)}, expected {expected}")
        touched = Box(tuple(a // fp8.BLOCK for a in box.start), fp8.scale_shape(box.stop))
        return fp8.dequantise(values, self._slice(scale, touched), (box.start[0], box.start[1]), self.dequantised)

    def tensors(self, arch: Architecture) -> Iterator[tuple[str, Tensor]]:
        """Every canonical tensor of a model, whole, one after the other; copies are left out."""
        for tensor in canonical.canonical(arch):
            if tensor.copy_of is None:
                yield tensor.name, self.read(tensor.name, Box.whole(tensor.shape))

    def check(self, tensors: Iterable[canonical.Tensor]) -> None:
        """UserError for the first of these tensors that is missing or has another shape. Copies need not be there."""
        for tensor in tensors:
            if tensor.copy_of is None and self.shape(tensor.name) != tensor.shape:
                stored = self.stored[tensor.name]
                raise UserError(
                    f"{self.folder / stored.shard}: {tensor.name} has shape {list(stored.shape)}, "
                    f"config.json says {list(tensor.shape)}"
                )  # fmt: skip

    def _find(self, name: str) -> Stored:
        if name not in self.stored:
            raise UserError(f"{self.folder}: tensor {name} is missing")
        return self.stored[name]

    def _slice(self, stored: Stored, box: Box) -> Tensor:
        try:
            values: Tensor = self._files[stored.shard].get_slice(stored.name)[box.slices]
        except SafetensorError as error:
            raise UserError(f"{self.folder / stored.shard}: cannot read {stored.name}: {error}") from None
        return values

    def _open(self, shard: str) -> None:
        self._files[shard], tensors = _opened(self.folder, shard)
        for stored in tensors:
            if stored.name in self.stored:
                raise UserError(f"{self.folder / shard}: {stored.name} is also in {self.stored[stored.name].shard}")
            self.stored[stored.name] = stored

    def _check_index(self, index: Mapping[str, str]) -> None:
        for name, shard in index.items():
            found = self.stored.get(name)
            if found is None or found.shard != shard:
                where = "no shard" if found is None else found.shard
                raise UserError(f"{self.folder / INDEX} puts {name} in {shard}, but {where} has it")
        for name, found in self.stored.items():
            if name not in index:
                raise UserError(f"{self.folder / found.shard}: {name} is not in {INDEX}")


def headers(folder: Path) -> list[Stored]:
    """Every tensor of every shard that a `Reader` would open, one that stands in two shards twice; UserError as from `Reader`."""
    return [stored for shard in _shard_names(_read_index(folder)) for stored in _opened(folder, shard)[1]]


def _shard_names(index: Mapping[str, str] | None) -> list[str]:
    return sorted(set(index.values())) if index is not None else ["model.safetensors"]


def _opened(folder: Path, shard: str) -> tuple[Any, list[Stored]]:
    path = folder / shard
    if not path.is_file():
        raise UserError(f"{path} is missing" + (f", but {INDEX} names it" if (folder / INDEX).exists() else ""))
    try:
        file: Any = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: truncated or damaged ({error})") from None
    tensors = []
    for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
        entry = file.get_slice(name)
        if entry.get_dtype() not in DTYPES:
            raise UserError(f"{path}: {name} has dtype {entry.get_dtype()}, expected one of {', '.join(DTYPES)}")
        tensors.append(Stored(name, tuple(entry.get_shape()), entry.get_dtype(), shard))
    return file, tensors


def _read_index(folder: Path) -> dict[str, str] | None:
    """Tensor name to shard, or None for a folder with a single file."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    path = folder / INDEX
    if not path.exists():
        return None
    try:
        index = json.loads(path.read_text())["weight_map"]
        shards = set(index.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is no safetensors index: expected JSON with a weight_map") from None
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise UserError(f"{path}: shard {shard!r} must be the name of a file in the same folder")
    return dict(index)


def specs_of(tensors: Iterable[canonical.Tensor], dtype: torch.dtype, block_fp8: bool = False) -> list[Stored]:
    """What a checkpoint of these canonical tensors stores: copies included, and scales when quantised."""
    specs = []
    for tensor in tensors:
        name = "F32" if tensor.storage is Storage.FLOAT32 else _DTYPE_NAMES[dtype]
        if block_fp8 and tensor.storage is Storage.BLOCK_FP8:
            specs.append(Stored(tensor.name, tensor.shape, "F8_E4M3", ""))
            specs.append(Stored(tensor.name + SCALE, fp8.scale_shape(tensor.shape), "F32", ""))
        else:
            specs.append(Stored(tensor.name, tensor.shape, name, ""))
    return specs
