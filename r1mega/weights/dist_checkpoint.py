"""Megatron's distributed checkpoints ("torch_dist", PyTorch's own format): read by region, written chunk by chunk.

Megatron-Core reads and writes them with a process for every shard. Conversion has none of these processes, so it goes to the files:
`.metadata` says which tensors there are and where their chunks lie, a `.distcp` file is one `torch.save` archive after the other.
The bytes of a chunk are mapped into memory, not loaded. Both the metadata and the archives hold pickles, of which nothing but the
handful of names below is ever executed.
"""

import io
import json
import mmap
import pickle
import zipfile
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from r1mega.errors import UserError
from r1mega.weights.architecture import Architecture
from r1mega.weights.boxes import Box
from r1mega.weights.checkpoint_keys import StoredTensor, stored_tensors
from r1mega.weights.safetensors_out import STRIP_VALUES, Read

METADATA = ".metadata"
_ALIGNMENT = 64
_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}


def is_dist_checkpoint(folder: Path) -> bool:
    """Whether a folder is a distributed checkpoint rather than a Hugging Face folder."""
    return (folder / METADATA).is_file() or (folder / "metadata.json").is_file()


# ---------------------------------------------------------------- reading


class DistReader:
    """The model of one distributed checkpoint, by canonical tensor; optimizer and other states in it are passed over.

    Raises (when opened): UserError for damaged or foreign metadata, a missing or truncated file, a tensor of another shape.
    """

    def __init__(self, folder: Path, arch: Architecture) -> None:
        self.folder = folder
        self._index = read_metadata(folder)
        self._files: dict[str, mmap.mmap] = {}
        self._chunks: dict[str, list[tuple[Box, filesystem._StorageInfo]]] = {}
        self._parts: dict[str, list[tuple[str, Box, Box]]] = {}
        for stored in stored_tensors(arch):
            found = self._index.state_dict_metadata.get(stored.key)
            if isinstance(found, TensorStorageMetadata):
                self._check(stored, tuple(found.size))
                for region, name, source in stored.parts:
                    self._parts.setdefault(name, []).append((stored.key, region, source))
        self._checked: set[tuple[str, int]] = set()
        ranks = {key: len(found.size) for key, found in _tensors(self._index)}
        sizes = {key: {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in found.chunks} for key, found in _tensors(self._index)}
        for place, info in self._index.storage_data.items():
            if place.fqn in sizes:
                start = tuple(place.offset or (0,) * ranks[place.fqn])
                if start not in sizes[place.fqn]:
                    raise UserError(f"{folder / METADATA}: {place.fqn} has no chunk at {list(start)}")
                box = Box.whole(sizes[place.fqn][start]).shift(start)
                self._chunks.setdefault(place.fqn, []).append((box, info))

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def read(self, name: str, box: Box) -> Tensor:
        """A region of a canonical tensor, in the dtype of the checkpoint. UserError when it is missing or a file is damaged."""
        if name not in self._parts:
            raise UserError(f"{self.folder}: nothing in this checkpoint holds {name}")
        pieces = []
        for key, region, source in self._parts[name]:
            wanted = source.intersect(box)
            if wanted is not None:
                lead = len(region.start) - len(source.start)
                inside = wanted.within(source).shift(region.start[lead:])
                stored = Box(region.start[:lead] + inside.start, region.stop[:lead] + inside.stop)
                pieces.append((wanted, self._region(key, stored).reshape(wanted.shape)))
        return pieces[0][1] if len(pieces) == 1 else _joined(box, pieces)

    def _region(self, key: str, box: Box) -> Tensor:
        """A region of a stored tensor: a view of the file when one chunk has all of it."""
        overlaps = [(common, chunk, info) for chunk, info in self._chunks[key] if (common := chunk.intersect(box)) is not None]
        if sum(common.size for common, _, _ in overlaps) < box.size:
            raise UserError(f"{self.folder / METADATA}: the chunks of {key} do not cover it")
        views = ((common, self._tensor(key, chunk, info)[common.within(chunk).slices]) for common, chunk, info in overlaps)
        if len(overlaps) == 1:
            return next(views)[1]
        return _joined(box, views)

    def _tensor(self, key: str, chunk: Box, info: filesystem._StorageInfo) -> Tensor:
        """A chunk, mapped."""
        path = self.folder / info.relative_path
        expectation = f"{path}: {key} at byte {info.offset}: expected a tensor of shape {list(chunk.shape)}"
        if info.transform_descriptors:
            raise UserError(f"{path}: {key} is compressed ({info.transform_descriptors}), which is not supported")
        try:
            described, start, nbytes, expected = _archive(self._file(info.relative_path), info.offset, info.length)
        except (zipfile.BadZipFile, pickle.UnpicklingError, KeyError, ValueError, IndexError, AttributeError, EOFError) as error:
            raise UserError(f"{expectation}, found a damaged archive ({error})") from None
        if described.shape != chunk.shape or start + nbytes > len(self._file(info.relative_path)):
            raise UserError(f"{expectation}, found {list(described.shape)} of {nbytes} bytes")
        flat = torch.frombuffer(self._file(info.relative_path), dtype=torch.uint8, count=nbytes, offset=start)
        if (info.relative_path, info.offset) not in self._checked:
            # Writers may leave the checksum out, as 0.
            if expected and zlib.crc32(flat.numpy().data) != expected:
                raise UserError(f"{path}: {key} at byte {info.offset}: the values do not have the checksum that they were written with")
            self._checked.add((info.relative_path, info.offset))
        if start % described.dtype.itemsize:
            flat = flat.clone()
        return flat.view(described.dtype).as_strided(described.shape, described.stride, described.offset)

    def _file(self, name: str) -> mmap.mmap:
        if name not in self._files:
            path = self.folder / name
            try:
                self._files[name] = _mapped(path)
            except (OSError, ValueError) as error:
                raise UserError(f"{path}, which {METADATA} names, cannot be read ({error})") from None
        return self._files[name]

    def _check(self, stored: StoredTensor, shape: tuple[int, ...]) -> None:
        # Megatron pads the vocabulary for its tensor-parallel size; the padding is never read.
        vocabulary = stored.key.endswith(("word_embeddings.weight", "output_layer.weight"))
        fits = shape[1:] == stored.shape[1:] and (shape[0] >= stored.shape[0] if vocabulary else shape[0] == stored.shape[0])
        if not fits:
            raise UserError(f"{self.folder}: {stored.key} has shape {list(shape)}, config.json says {list(stored.shape)}")


def _joined(box: Box, pieces: Iterable[tuple[Box, Tensor]]) -> Tensor:
    """The box, from regions that cover it."""
    result: Tensor | None = None
    for region, values in pieces:
        if result is None:
            result = torch.empty(box.shape, dtype=values.dtype)
        result[region.within(box).slices] = values
    assert result is not None
    return result


_KNOWN = {
    (module.__name__, name): getattr(module, name)
    for module, names in (
        (metadata, ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties")),
        (metadata, ("MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
        (planner, ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")),
        (filesystem, ("_StorageInfo",)),
        (torch.serialization, ("_get_layout",)),
        (torch, ("Size", "float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "uint8", "int8", "bool", "float8_e4m3fn")),
    )
    for name in names
}


class _Ignored:
    """Stands for Megatron's own classes in old metadata."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if module.startswith("megatron.") and name in ("MCoreMetadata", "MCoreSavePlan"):
            return _Ignored
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def read_metadata(folder: Path) -> Metadata:
    """The index of a checkpoint whose files are all there and as long as it says. UserError for anything else."""
    path = folder / METADATA
    try:
        with open(path, "rb") as file:
            found = _MetadataUnpickler(file).load()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, AttributeError, TypeError, KeyError) as error:
        raise UserError(f"{path}: damaged, or not the metadata of a distributed checkpoint ({error})") from None
    if not isinstance(found, Metadata) or found.storage_data is None:
        raise UserError(f"{path}: not the metadata of a distributed checkpoint")
    ends: dict[str, int] = {}
    for info in found.storage_data.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in ends.items():
        file_path = folder / name
        if not file_path.is_file():
            raise UserError(f"{file_path}: missing; the checkpoint is not whole")
        if file_path.stat().st_size < end:
            raise UserError(f"{file_path}: has {file_path.stat().st_size} bytes of {end}; the checkpoint is not whole")
    return found


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Global shape of every tensor of a checkpoint, optimizer states included, by key. Errors are those of `read_metadata`."""
    return {key: tuple(found.size) for key, found in _tensors(read_metadata(folder))}


def _tensors(index: Metadata) -> Iterator[tuple[str, TensorStorageMetadata]]:
    return ((key, found) for key, found in index.state_dict_metadata.items() if isinstance(found, TensorStorageMetadata))


@dataclass(frozen=True)
class _Described:
    """A tensor as its archive's pickle describes it."""

    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


_STORAGES = {
    "FloatStorage": torch.float32, "BFloat16Storage": torch.bfloat16, "HalfStorage": torch.float16, "DoubleStorage": torch.float64,
}  # fmt: skip


class _TensorUnpickler(pickle.Unpickler):
    """Describes the tensor of a `torch.save` archive without its data."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda dtype, offset, shape, stride, *_: _Described(dtype, offset, tuple(shape), tuple(stride))
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")

    def persistent_load(self, reference: tuple[Any, ...]) -> torch.dtype:
        dtype: torch.dtype = reference[1]
        return dtype


def _archive(file: mmap.mmap, offset: int, length: int) -> tuple[_Described, int, int, int]:
    """(the tensor of the archive at `offset`, where its data starts in the file, bytes of the data, their CRC-32)."""
    with zipfile.ZipFile(_Window(file, offset, length)) as archive:
        names = {name.split("/", 1)[1]: name for name in archive.namelist()}
        described = _TensorUnpickler(io.BytesIO(archive.read(names["data.pkl"]))).load()
        entry = archive.getinfo(names["data/0"])
    if not isinstance(described, _Described) or entry.compress_type != zipfile.ZIP_STORED:
        raise pickle.UnpicklingError("not one plain tensor")
    header = offset + entry.header_offset
    # A local header is 30 bytes, then the name and an extra field whose lengths it holds (APPNOTE.TXT 4.3.7).
    name, extra = (int.from_bytes(file[header + at : header + at + 2], "little") for at in (26, 28))
    reach = described.offset + 1 + sum((n - 1) * s for n, s in zip(described.shape, described.stride, strict=True))
    if prod(described.shape) and reach * described.dtype.itemsize > entry.file_size:
        raise ValueError("the data is shorter than the tensor")
    return described, header + 30 + name + extra, entry.file_size, entry.CRC


class _Window(io.RawIOBase):
    """A part of a mapped file as a file."""

    def __init__(self, file: mmap.mmap, offset: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        end = self._length if size is None or size < 0 else min(self._length, self._at + size)
        data = self._file[self._start + self._at : self._start + max(self._at, end)]
        self._at += len(data)
        return data


# ---------------------------------------------------------------- writing


@dataclass(frozen=True)
class Chunk:
    """A part of a stored tensor that is written, and later read, in one go.

    `parts` say what it holds: this region of the chunk is that region of that canonical tensor.
    """

    key: str
    box: Box
    dtype: torch.dtype
    parts: tuple[tuple[Box, str, Box], ...]

    @property
    def nbytes(self) -> int:
        return self.box.size * self.dtype.itemsize


@dataclass(frozen=True)
class DistFile:
    """One `.distcp` file."""

    name: str
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Written:
    """Where a chunk lies."""

    key: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str
    offset: int
    length: int


def dist_files(tensors: Sequence[StoredTensor], dtype: torch.dtype, file_bytes: int) -> list[DistFile]:
    """Cut a model into chunks of whole rows (of one expert, where experts are stacked) and files of at most `file_bytes`."""
    groups: list[list[Chunk]] = [[]]
    size = 0
    for tensor in tensors:
        for chunk in _chunks(tensor, torch.float32 if tensor.float32 else dtype):
            if groups[-1] and size + chunk.nbytes > file_bytes:
                groups.append([])
                size = 0
            groups[-1].append(chunk)
            size += chunk.nbytes
    return [DistFile(f"__0_{i}.distcp", tuple(group)) for i, group in enumerate(groups)]


def _chunks(tensor: StoredTensor, dtype: torch.dtype) -> Iterator[Chunk]:
    # A layer's experts are hundreds of parts of one tensor, so the parts of a chunk are searched, not scanned.
    parts = sorted(tensor.parts, key=lambda part: part[0].start)
    starts, stops = [region.start[0] for region, _, _ in parts], [region.stop[0] for region, _, _ in parts]
    rows = max(1, STRIP_VALUES // prod(tensor.shape[1:]))
    for first in range(0, tensor.shape[0], rows):
        box = Box((first, *(0,) * (len(tensor.shape) - 1)), (min(first + rows, tensor.shape[0]), *tensor.shape[1:]))
        touching = parts[bisect_right(stops, first) : bisect_left(starts, box.stop[0])]
        yield Chunk(tensor.key, box, dtype, tuple(_inside(box, *part) for part in touching))


def _inside(box: Box, region: Box, name: str, source: Box) -> tuple[Box, str, Box]:
    """The share of a part that lies in a box, in the box's coordinates."""
    common = region.intersect(box)
    assert common is not None, "the part was found by its rows, and has all columns"
    lead = len(region.start) - len(source.start)
    inside = common.within(region)
    return common.within(box), name, Box(inside.start[lead:], inside.stop[lead:]).shift(source.start)


def write_file(path: Path, chunks: Sequence[Chunk], read: Read) -> list[Written]:
    """Write one `.distcp` file. UserError when the disk refuses."""
    written = []
    try:
        with open(path, "wb") as file:
            for chunk in chunks:
                values = torch.empty(chunk.box.shape, dtype=chunk.dtype)
                for region, name, source in chunk.parts:
                    values[region.slices] = read(name, source).view(region.shape)
                # Aligned archives have aligned values, which can be used where they lie.
                file.seek(-(-file.tell() // _ALIGNMENT) * _ALIGNMENT)
                offset = file.tell()
                torch.save(values, file)
                dtype = str(chunk.dtype).removeprefix("torch.")
                written.append(Written(chunk.key, chunk.box.start, chunk.box.shape, dtype, offset, file.tell() - offset))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    return written


def check_file(path: Path, written: Sequence[Written]) -> None:
    """Read a `.distcp` file again: every archive holds the CRC-32 of what was written. UserError for the first that differs."""
    mapped = _mapped(path)
    for entry in written:
        try:
            with zipfile.ZipFile(_Window(mapped, entry.offset, entry.length)) as archive:
                damaged = archive.testzip()
        except zipfile.BadZipFile as error:
            damaged = str(error)
        if damaged is not None:
            raise UserError(f"{path}: {entry.key} reads back differently from what was written; the same command writes the file again")


def _mapped(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        # Private, so that torch gets memory it may believe to be writable.
        return mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def write_metadata(folder: Path, tensors: Sequence[StoredTensor], written: Sequence[tuple[str, Sequence[Written]]]) -> None:
    """Everything beside the `.distcp` files: Megatron's marks, an empty common state, and the index, which is PyTorch's."""
    chunks: dict[str, list[ChunkStorageMetadata]] = {tensor.key: [] for tensor in tensors}
    dtypes: dict[str, torch.dtype] = {}
    storage: dict[MetadataIndex, Any] = {}
    for name, entries in written:
        for entry in entries:
            start, index = torch.Size(entry.start), len(chunks[entry.key])
            chunks[entry.key].append(ChunkStorageMetadata(start, torch.Size(entry.shape)))
            storage[MetadataIndex(entry.key, start, index)] = filesystem._StorageInfo(name, entry.offset, entry.length)
            dtypes[entry.key] = getattr(torch, entry.dtype)
    described: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
        tensor.key: TensorStorageMetadata(TensorProperties(dtype=dtypes[tensor.key]), torch.Size(tensor.shape), chunks[tensor.key])
        for tensor in tensors
    }
    with open(folder / METADATA, "wb") as file:
        pickle.dump(Metadata(described, None, storage, StorageMeta()), file)
    (folder / "metadata.json").write_text(json.dumps(_FORMAT), encoding="utf-8")
    torch.save({"checkpoint_version": 3.0, "iteration": 0}, folder / "common.pt")
