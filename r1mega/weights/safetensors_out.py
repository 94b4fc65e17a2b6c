"""Hugging Face checkpoint folders, written shard by shard and strip by strip: memory does not grow with the model or its tensors."""

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from r1mega.errors import UserError
from r1mega.weights import fp8
from r1mega.weights.architecture import Architecture, read_config
from r1mega.weights.boxes import Box
from r1mega.weights.canonical import Tensor as Canonical
from r1mega.weights.canonical import canonical
from r1mega.weights.moving import reader_of
from r1mega.weights.safetensors_in import DTYPES, INDEX, Stored, specs_of

Read = Callable[[str, Box], Tensor]
"""A region of a canonical tensor, by the tensor's name."""

SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""What a model folder holds beside its weights. Code is never copied."""

SHARD_BYTES = 5_000_000_000
STRIP_VALUES = 16 * 2**20
"""Values that are read, converted and written at a time at most, unless 128 rows have more."""


@dataclass(frozen=True)
class Encoding:
    """How a checkpoint stores weights; tensors that are float32 in every checkpoint stay so.

    `block_fp8` quantises what DeepSeek's checkpoints quantise and leaves the rest in `dtype`.
    """

    dtype: torch.dtype
    block_fp8: bool = False

    def stored(self, tensor: Canonical) -> list[Stored]:
        """What is stored of a canonical tensor: itself, or codes and scales."""
        return specs_of([tensor], self.dtype, self.block_fp8)


@dataclass(frozen=True)
class Shard:
    """One file: its name and the tensors it holds, with codes and scales of a matrix always together."""

    name: str
    tensors: tuple[Canonical, ...]


def shards(tensors: Iterable[Canonical], encoding: Encoding, shard_bytes: int = SHARD_BYTES) -> list[Shard]:
    """Cut a model into files of at most `shard_bytes`, or one tensor."""
    groups: list[list[Canonical]] = [[]]
    size = 0
    for tensor in tensors:
        nbytes = sum(spec.nbytes for spec in encoding.stored(tensor))
        if groups[-1] and size + nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += nbytes
    if len(groups) == 1:
        return [Shard("model.safetensors", tuple(groups[0]))]
    return [Shard(f"model-{i + 1:05}-of-{len(groups):05}.safetensors", tuple(group)) for i, group in enumerate(groups)]


def write_shard(path: Path, tensors: Sequence[Canonical], encoding: Encoding, read: Read) -> dict[str, int]:
    """Write one safetensors file; returns the CRC-32 of each stored tensor's bytes. UserError when the disk refuses."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    # Wide dtypes first in the file keeps every tensor aligned.
    for spec in sorted((s for t in tensors for s in encoding.stored(t)), key=lambda spec: -DTYPES[spec.dtype].itemsize):
        header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, offset + spec.nbytes]}
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    checksums: dict[str, int] = {}
    try:
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors:
                specs = encoding.stored(tensor)
                places = [start + header[spec.name]["data_offsets"][0] for spec in specs]
                for box in strips(tensor.shape, STRIP_VALUES):
                    parts = _encoded(read(tensor.copy_of or tensor.name, box), specs)
                    for i, (spec, part) in enumerate(zip(specs, parts, strict=True)):
                        data = part.detach().cpu().contiguous().view(torch.uint8).numpy().data
                        file.seek(places[i])
                        file.write(data)
                        places[i] += part.nbytes
                        checksums[spec.name] = zlib.crc32(data, checksums.get(spec.name, 0))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    return checksums


def check_shard(path: Path, checksums: Mapping[str, int]) -> None:
    """Read a file again and compare with what `write_shard` returned. UserError for the first tensor that differs."""
    with safe_open(path, framework="pt") as file:
        for name, checksum in checksums.items():
            if zlib.crc32(file.get_tensor(name).contiguous().view(torch.uint8).numpy().data) != checksum:
                raise UserError(f"{path}: {name} reads back differently from what was written; the same command writes the file again")


def _encoded(values: Tensor, specs: Sequence[Stored]) -> tuple[Tensor, ...]:
    return (values.to(DTYPES[specs[0].dtype]),) if len(specs) == 1 else fp8.quantise(values)


def strips(shape: tuple[int, ...], values: int) -> Iterator[Box]:
    """A tensor as consecutive boxes of whole rows with about so many values, cut between FP8's blocks."""
    rows = max(1, values // prod(shape[1:]) // fp8.BLOCK) * fp8.BLOCK
    for first in range(0, shape[0], rows):
        yield Box((first, *(0,) * (len(shape) - 1)), (min(first + rows, shape[0]), *shape[1:]))


def write_index(folder: Path, written: Sequence[Shard], encoding: Encoding) -> None:
    """The index that a checkpoint of more than one file has."""
    if len(written) == 1:
        return
    specs = {spec.name: (spec, shard.name) for shard in written for tensor in shard.tensors for spec in encoding.stored(tensor)}
    total = sum(spec.nbytes for spec, _ in specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": {name: specs[name][1] for name in sorted(specs)}}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def save(folder: Path, arch: Architecture, values: Mapping[str, Tensor], encoding: Encoding, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a whole model into an existing folder, such as `new_folder` gives: every canonical tensor of `arch`, copies included.

    Args:
        values: the canonical tensors by name, without copies, in any floating dtype.
    """
    planned = shards(canonical(arch), encoding, shard_bytes)
    for shard in planned:
        write_shard(folder / shard.name, shard.tensors, encoding, reader_of(values))
    write_index(folder, planned, encoding)


def copy_side_files(source: Path, target: Path, encoding: Encoding) -> None:
    """Configuration, which is told how the weights are stored now, and tokenizer."""
    for name in SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    config = restated(read_config(source), encoding)
    (target / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def restated(config: Mapping[str, Any], encoding: Encoding) -> dict[str, Any]:
    """A config.json whose words on dtype and quantisation are those of an encoding."""
    found = {key: value for key, value in config.items() if key not in ("quantization_config", "torch_dtype", "dtype")}
    found["dtype"] = str(encoding.dtype).removeprefix("torch.")
    if encoding.block_fp8:
        found["quantization_config"] = {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
        }  # fmt: skip
    return found


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder that appears at `target` whole or not at all: fill the one that is given, it is renamed at the end.

    UserError when the target exists or its parent cannot be written.
    """
    refuse_existing(target)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    make_folder(partial)
    try:
        yield partial
        publish(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def refuse_existing(target: Path) -> None:
    """UserError when there is something at `target`."""
    if target.exists():
        raise UserError(f"{target} exists already; choose another folder or remove it")


def make_folder(folder: Path) -> None:
    """UserError when it cannot be made; its parents are made too."""
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder.parent}: cannot be written ({error.strerror})") from None


def publish(partial: Path, target: Path) -> None:
    """Give a filled folder its final name, once everything in it is on the disk."""
    for path in (*partial.iterdir(), partial):
        _sync(path)
    partial.rename(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
