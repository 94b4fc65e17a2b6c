"""Hugging Face checkpoint folders: read by box without loading, write atomically.

Block-FP8 tensors are dequantised while they are read, so readers see float tensors only. No pickle is ever opened.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from r1mega.weights.boxes import Box
from r1mega.weights.table import Storage

INDEX = "model.safetensors.index.json"
SCALE = "_scale_inv"
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

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        self.stored: dict[str, Stored] = {}
        index = _read_index(folder)
        shards = sorted(set(index.values())) if index is not None else ["model.safetensors"]
        for shard in shards:
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
        """A region of a tensor, in the dtype of the file, or float32 when it is block-FP8.

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
        return fp8.dequantise(values, self._slice(scale, touched), (box.start[0], box.start[1]))

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
        path = self.folder / shard
        if not path.is_file():
            raise UserError(f"{path} is missing" + (f", but {INDEX} names it" if shard != "model.safetensors" else ""))
        try:
            file: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: truncated or damaged ({error})") from None
        self._files[shard] = file
        for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            entry = file.get_slice(name)
            if name in self.stored:
                raise UserError(f"{path}: {name} is also in {self.stored[name].shard}")
            if entry.get_dtype() not in DTYPES:
                raise UserError(f"{path}: {name} has dtype {entry.get_dtype()}, expected one of {', '.join(DTYPES)}")
            self.stored[name] = Stored(name, tuple(entry.get_shape()), entry.get_dtype(), shard)

    def _check_index(self, index: Mapping[str, str]) -> None:
        for name, shard in index.items():
            found = self.stored.get(name)
            if found is None or found.shard != shard:
                where = "no shard" if found is None else found.shard
                raise UserError(f"{self.folder / INDEX} puts {name} in {shard}, but {where} has it")
        for name, found in self.stored.items():
            if name not in index:
                raise UserError(f"{self.folder / found.shard}: {name} is not in {INDEX}")


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


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder that appears at `target` whole or not at all: fill the one that is given, it is renamed at the end.

    UserError when the target exists or its parent cannot be written.
    """
    if target.exists():
        raise UserError(f"{target} exists already; choose another folder or remove it")
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror})") from None
    try:
        yield partial
        for path in (*partial.iterdir(), partial):
            _sync(path)
        partial.rename(target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(
    folder: Path,
    arch: Architecture,
    values: Mapping[str, Tensor],
    dtype: torch.dtype,
    *,
    block_fp8: bool = False,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a whole model: every canonical tensor of `arch`, copies included.

    Args:
        folder: an existing folder, such as `new_folder` gives.
        values: the canonical tensors by name, without copies, in any floating dtype.
        dtype: dtype of the files; tensors that are float32 in every checkpoint stay float32.
        block_fp8: quantise what DeepSeek's checkpoints quantise.
    """
    tensors = canonical.canonical(arch)
    write(folder, specs_of(tensors, dtype, block_fp8), AsStored(tensors, values, dtype, block_fp8), shard_bytes)


def write(folder: Path, specs: Sequence[Stored], tensors: Mapping[str, Tensor], shard_bytes: int = 5_000_000_000) -> None:
    """Write tensors as safetensors shards of at most `shard_bytes` (or one tensor), with an index when there is more than one.

    A tensor is asked from `tensors` when its turn comes, so a mapping may make each on demand; shapes and dtypes must be
    those of its spec (`specs_of` makes specs for one model). UserError when the disk refuses.
    """
    shards = _shards(specs, shard_bytes)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))] if len(shards) > 1 else ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        try:
            _write_shard(folder / name, shard, tensors)
        except OSError as error:
            raise UserError(f"{folder / name}: cannot be written ({error.strerror})") from None
    if len(shards) > 1:
        weight_map = {spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard}
        total = sum(spec.nbytes for spec in specs)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shards(specs: Sequence[Stored], shard_bytes: int) -> list[list[Stored]]:
    shards: list[list[Stored]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return shards


def _write_shard(path: Path, specs: Sequence[Stored], tensors: Mapping[str, Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    # Wide dtypes first in the file keeps every tensor aligned. Tensors are still asked for in the order of `specs`,
    # so that codes and scales of one matrix are made together.
    for spec in sorted(specs, key=lambda spec: -DTYPES[spec.dtype].itemsize):
        header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, offset + spec.nbytes]}
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for spec in specs:
            tensor = tensors[spec.name]
            assert tuple(tensor.shape) == spec.shape and tensor.dtype == DTYPES[spec.dtype], spec
            file.seek(8 + len(text) + header[spec.name]["data_offsets"][0])
            file.write(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)


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


class AsStored(Mapping[str, Tensor]):
    """Canonical tensors as `specs_of` describes them: converted, quantised and copied when asked for.

    Args:
        values: the canonical tensors by name, without copies.
    """

    def __init__(
        self, tensors: Iterable[canonical.Tensor], values: Mapping[str, Tensor], dtype: torch.dtype, block_fp8: bool = False
    ) -> None:
        tensors = list(tensors)
        self._dtypes = {spec.name: DTYPES[spec.dtype] for spec in specs_of(tensors, dtype, block_fp8)}
        self._sources = {tensor.name: tensor.copy_of or tensor.name for tensor in tensors}
        self._values = values
        self._last: tuple[str, tuple[Tensor, Tensor]] | None = None

    def __getitem__(self, name: str) -> Tensor:
        if name.endswith(SCALE):
            return self._quantised(name.removesuffix(SCALE))[1]
        if self._dtypes[name] == torch.float8_e4m3fn:
            return self._quantised(name)[0]
        return self._values[self._sources[name]].to(self._dtypes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._dtypes)

    def __len__(self) -> int:
        return len(self._dtypes)

    def _quantised(self, name: str) -> tuple[Tensor, Tensor]:
        if self._last is None or self._last[0] != name:
            self._last = name, fp8.quantise(self._values[self._sources[name]])
        return self._last[1]
