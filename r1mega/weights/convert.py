"""Checkpoints from one format to another, streaming: Hugging Face folders and Megatron's distributed checkpoints.

A conversion is a list of files to write. Each is written by one process from regions of the source, under a name that says that it is not
finished, and leaves a record when it is: an interrupted conversion goes on after the last record. The target appears at the end, whole.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from r1mega.errors import UserError
from r1mega.process import die_with_parent
from r1mega.weights import dist_checkpoint, safetensors_out
from r1mega.weights.architecture import Architecture, read_config
from r1mega.weights.boxes import Box
from r1mega.weights.canonical import canonical
from r1mega.weights.checkpoint_keys import stored_tensors
from r1mega.weights.dist_checkpoint import DistFile, DistReader, Written, is_dist_checkpoint
from r1mega.weights.safetensors_in import Reader
from r1mega.weights.safetensors_out import Encoding, Shard

Format = Literal["hf", "megatron"]

_RECORDS, _PLAN = ".records", ".conversion.json"
_WORTH_PROCESSES = 2**28
"""Bytes from which several processes are faster than one: each imports torch first."""


@dataclass(frozen=True)
class Conversion:
    """What is converted into what.

    `model` is a Hugging Face folder that a Megatron checkpoint without config.json is completed from: configuration, tokenizer, and the
    tensors that it lacks (an MTP layer that was not trained).
    """

    source: Path
    target: Path
    to: Format
    dtype: str
    block_fp8: bool = False
    file_bytes: int = safetensors_out.SHARD_BYTES
    model: Path | None = None

    @property
    def encoding(self) -> Encoding:
        return Encoding(getattr(torch, self.dtype), self.block_fp8)

    @property
    def partial(self) -> Path:
        """Where the target grows."""
        return self.target.with_name(f".{self.target.name}.partial")

    @property
    def stored_as(self) -> str:
        """For people."""
        return f"block FP8 and {self.dtype}" if self.block_fp8 else self.dtype


def conversion(
    source: Path, target: Path, to: Format | None, dtype: str | None, block_fp8: bool, file_bytes: int, model: Path | None
) -> Conversion:
    """A conversion whose format and dtype follow from the source where they are left out."""
    for folder in (source, model):
        if folder is not None and not folder.is_dir():
            raise UserError(f"{folder} is not a folder")
    if source.resolve() in target.resolve().parents:
        raise UserError(f"{target} lies in {source}, which is only read; choose a folder elsewhere")
    to = to or ("hf" if is_dist_checkpoint(source) else "megatron")
    if to == "megatron" and is_dist_checkpoint(source):
        raise UserError(f"{source} is a Megatron checkpoint already; Megatron reshards it on loading")
    if dtype is None:
        config = read_config(config_folder(source, model))
        dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
        if dtype not in ("bfloat16", "float16", "float32"):
            raise UserError(f"{source / 'config.json'}: dtype is {dtype!r}; say which one to write with --dtype")
    # Absolute, because the growing target is found again by other processes and later runs.
    return Conversion(source.absolute(), target.absolute(), to, dtype, block_fp8, file_bytes, model and model.absolute())


def cores() -> int:
    """Processes that a conversion uses when nobody says."""
    return min(8, len(os.sched_getaffinity(0)))


@dataclass(frozen=True)
class Plan:
    """The files of a conversion, in the order in which they are begun."""

    conversion: Conversion
    arch: Architecture
    config_folder: Path
    files: tuple[Shard | DistFile, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of weights that the target will hold."""
        return sum(self.size(file) for file in self.files)

    def size(self, file: Shard | DistFile) -> int:
        """Bytes of weights in one file."""
        if isinstance(file, DistFile):
            return sum(chunk.nbytes for chunk in file.chunks)
        return sum(spec.nbytes for tensor in file.tensors for spec in self.conversion.encoding.stored(tensor))


def plan(conversion: Conversion) -> Plan:
    """Check the source and decide what is written; nothing is touched.

    UserError: the source is not there, damaged, or lacks a tensor; the target exists; FP8 for a family that has none.
    """
    return _open(conversion)[0]


def _open(conversion: Conversion) -> tuple[Plan, "_Source"]:
    safetensors_out.refuse_existing(conversion.target)
    if conversion.block_fp8 and conversion.to == "megatron":
        raise UserError("block FP8 is a format of Hugging Face checkpoints; Megatron quantises for itself")
    folder = config_folder(conversion.source, conversion.model)
    arch = Architecture.from_hf(read_config(folder))
    if conversion.block_fp8 and not arch.family.startswith("deepseek"):
        raise UserError(f"block FP8 is a format of DeepSeek's checkpoints, {folder / 'config.json'} is of the family {arch.family}")
    tensors = canonical(arch)
    source = _Source(conversion, arch)
    missing = [tensor.name for tensor in tensors if tensor.copy_of is None and tensor.name not in source]
    if missing:
        hint = "" if conversion.model else "; name the model it was trained from to take them over"
        raise UserError(f"{conversion.source}: {missing[0]} is missing" + (f" and {len(missing) - 1} more" if missing[1:] else "") + hint)
    dtype = conversion.encoding.dtype
    if conversion.to == "megatron":
        files: Sequence[Shard | DistFile] = dist_checkpoint.dist_files(stored_tensors(arch), dtype, conversion.file_bytes)
    else:
        files = safetensors_out.shards(tensors, conversion.encoding, conversion.file_bytes)
    return Plan(conversion, arch, folder, tuple(files)), source


def config_folder(source: Path, model: Path | None) -> Path:
    """Where the config.json of a source is: in itself, or in the model that completes it."""
    for folder in (source, model):
        if folder is not None and (folder / "config.json").is_file():
            return folder
    raise UserError(f"{source}: no config.json; name the Hugging Face folder of this model with --model")


class _Source:
    """Regions of canonical tensors, wherever they come from."""

    def __init__(self, conversion: Conversion, arch: Architecture) -> None:
        folder = conversion.source
        self._dist = DistReader(folder, arch) if is_dist_checkpoint(folder) else None
        origin = folder if self._dist is None else conversion.model
        dtype = conversion.encoding.dtype if not conversion.block_fp8 else torch.float32
        self._hf = Reader(origin, dequantised=dtype) if origin is not None else None
        if self._hf is not None and self._dist is None:
            self._hf.check(canonical(arch))

    def __contains__(self, name: str) -> bool:
        return (self._dist is not None and name in self._dist) or (self._hf is not None and name in self._hf.stored)

    def read(self, name: str, box: Box) -> Tensor:
        """A region, from the checkpoint itself or from the model that completes it."""
        if self._dist is not None and name in self._dist:
            return self._dist.read(name, box)
        assert self._hf is not None, "plan() has looked for every tensor"
        return self._hf.read(name, box)


# ---------------------------------------------------------------- doing it


def convert(plan: Plan, processes: int = 1, verify: bool = False, report: Callable[[int], None] = lambda nbytes: None) -> None:
    """Carry out a plan, or go on with it where an earlier run was interrupted.

    Args:
        processes: how many write files at a time.
        verify: read every file again at the end and compare checksums with what was written.
        report: called with the bytes of every file that is there, also of those of an earlier run.

    Raises:
        UserError: no room, a source that turns out damaged, another conversion's remains. Finished files are kept for the next run.
    """
    _opened.cache_clear()  # a source may have changed since the last conversion of this process
    with _begun(plan) as folder:
        waiting = []
        for index, file in enumerate(plan.files):
            if _is_done(folder, file):
                report(plan.size(file))
            else:
                waiting.append(index)
        _check_room(plan, waiting)
        if plan.nbytes < _WORTH_PROCESSES:
            processes = 1
        for index in _each(partial(_write, plan.conversion), waiting, processes):
            report(plan.size(plan.files[index]))
        if verify:
            for _ in _each(partial(_verify, plan.conversion), range(len(plan.files)), processes):
                pass
        _finish(plan, folder)


def _each(work: Callable[[int], int], indices: Sequence[int], processes: int) -> Iterator[int]:
    """Call `work` for every index, in other processes when there are to be several; yields the index of each that is done."""
    if processes == 1 or len(indices) < 2:
        yield from map(work, indices)
        return
    # Spawned: torch's threads do not survive a fork.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_prepare) as pool:
        try:
            for done in as_completed([pool.submit(work, index) for index in indices]):
                yield done.result()
        except BrokenProcessPool:
            raise UserError("a converting process was killed (out of memory?); the same command goes on from here") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _prepare() -> None:
    die_with_parent()
    torch.set_num_threads(1)


_opened = lru_cache(maxsize=1)(_open)
"""What a process needs for its files, made once."""


def _write(conversion: Conversion, index: int) -> int:
    plan, source = _opened(conversion)
    file = plan.files[index]
    path, unfinished = conversion.partial / file.name, conversion.partial / f".{file.name}.unfinished"
    if isinstance(file, DistFile):
        record: Any = [asdict(written) for written in dist_checkpoint.write_file(unfinished, file.chunks, source.read)]
    else:
        record = safetensors_out.write_shard(unfinished, file.tensors, conversion.encoding, source.read)
    os.replace(unfinished, path)
    note = _note(conversion.partial, file)
    note.with_suffix(".tmp").write_text(json.dumps({"size": path.stat().st_size, "content": record}), encoding="utf-8")
    os.replace(note.with_suffix(".tmp"), note)
    return index


def _is_done(folder: Path, file: Shard | DistFile) -> bool:
    """Whether an earlier run finished a file, and it is as long as it was then."""
    note, path = _note(folder, file), folder / file.name
    return note.is_file() and path.is_file() and path.stat().st_size == json.loads(note.read_text(encoding="utf-8"))["size"]


def _note(folder: Path, file: Shard | DistFile) -> Path:
    return folder / _RECORDS / f"{file.name}.json"


def _verify(conversion: Conversion, index: int) -> int:
    """Read a file again as any reader would, and compare."""
    file = _opened(conversion)[0].files[index]
    path, record = conversion.partial / file.name, _record(conversion, file)
    try:
        if isinstance(file, DistFile):
            dist_checkpoint.check_file(path, [Written(**entry) for entry in record])
        else:
            safetensors_out.check_shard(path, record)
    except UserError:
        _note(conversion.partial, file).unlink()  # the next run writes it again
        raise
    return index


def _record(conversion: Conversion, file: Shard | DistFile) -> Any:
    return json.loads(_note(conversion.partial, file).read_text(encoding="utf-8"))["content"]


@contextmanager
def _begun(plan: Plan) -> Iterator[Path]:
    """The growing target, ours alone."""
    folder = plan.conversion.partial
    identity = json.dumps({**{k: str(v) for k, v in asdict(plan.conversion).items()}, "source_files": _fingerprint(plan.conversion)})
    if not folder.exists():
        safetensors_out.make_folder(folder)
        (folder / _RECORDS).mkdir()
        (folder / _PLAN).write_text(identity, encoding="utf-8")
    elif not (folder / _PLAN).is_file() or (folder / _PLAN).read_text(encoding="utf-8") != identity:
        raise UserError(f"{folder} is left from a conversion with another source or other options; remove it")
    with _locked(folder):
        yield folder


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with open(folder / _PLAN, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{folder}: another process is converting into it") from None
        yield


def _fingerprint(conversion: Conversion) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the source's files."""
    found = ((path.name, path.stat()) for path in sorted(conversion.source.iterdir()) if path.is_file())
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]


def _check_room(plan: Plan, waiting: Sequence[int]) -> None:
    needed, free = sum(plan.size(plan.files[index]) for index in waiting), shutil.disk_usage(plan.conversion.partial).free
    if needed > free:
        raise UserError(f"{plan.conversion.target.parent}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")


def _finish(plan: Plan, folder: Path) -> None:
    """Index, configuration and tokenizer; then the final name."""
    conversion = plan.conversion
    if conversion.to == "megatron":
        records = [(file.name, [Written(**w) for w in _record(conversion, file)]) for file in plan.files]
        dist_checkpoint.write_metadata(folder, stored_tensors(plan.arch), records)
    else:
        safetensors_out.write_index(folder, [file for file in plan.files if isinstance(file, Shard)], conversion.encoding)
    safetensors_out.copy_side_files(plan.config_folder, folder, conversion.encoding)
    shutil.rmtree(folder / _RECORDS)
    (folder / _PLAN).unlink()
    safetensors_out.publish(folder, conversion.target)
