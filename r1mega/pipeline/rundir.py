"""The run directory: its layout, who may use it, and whether what lies in it belongs to this run.

resolved.yaml            the whole configuration
summary.json             {"recipe", "status", "stages": [{"name", "kind", "wall_s", "metrics"}]}
logs/                    what ranks and their launcher print
logs/<stage>/<attempt>/  the same of a stage that runs alone (`r1mega run --stage`), one folder a start, and attempt.json
stages/<nn>-<name>/      metrics.jsonl, artifact/, and provenance.json once the stage is finished

A folder belongs to the configuration it was started with as soon as any file below stages/ holds a byte: a row of metrics, a checkpoint,
an artifact, the record of a finished stage. A run that was refused or stopped before that left nothing to lose, and the next
configuration takes its folder over; the logs stay and are appended to.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EACCES
from pathlib import Path
from typing import Any, Literal

from r1mega.config.loading import dump_resolved, load_resolved
from r1mega.config.schema import Recipe
from r1mega.data.chats import check_dataset
from r1mega.errors import UserError
from r1mega.pipeline import files
from r1mega.pipeline.artifacts import Provenance, check_model

LOCK = ".lock"
"""Of a run directory and of a stage's folder."""
_DELETED = ".deleted"
_OURS = frozenset({LOCK, _DELETED, "resolved.yaml", "summary.json", "submitted.json", "scripts", "logs", "stages"})
_ENDING_S = 20.0
_SAY_S = 2.0

Note = Callable[[str], None]


@dataclass(frozen=True)
class RunDirectory:
    """A run's folder and its configuration."""

    path: Path
    recipe: Recipe

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """An existing run directory; UserError when the folder is none."""
        if not (path / "resolved.yaml").is_file():
            raise UserError(f"{path} is not a run directory: it has no resolved.yaml")
        return cls(path, load_resolved(path / "resolved.yaml"))

    @property
    def logs(self) -> Path:
        """Folder of what the processes print."""
        return self.path / "logs"

    @property
    def stage_dirs(self) -> dict[str, Path]:
        """Folder of every stage, by name, in order."""
        return {name: self.path / "stages" / f"{index:02d}-{name}" for index, name in enumerate(self.recipe.stages, 1)}

    def finished(self) -> dict[str, Provenance]:
        """Records of the stages that are finished, by name, in order."""
        found = {name: Provenance.read(folder) for name, folder in self.stage_dirs.items()}
        return {name: made for name, made in found.items() if made is not None}

    def check_finished(self) -> None:
        """UserError for finished stages whose own artifact is gone, or which were made from another one than an earlier stage has now."""
        finished = self.finished()
        stale: list[str] = []
        causes: dict[str, None] = {}
        for name, made in finished.items():
            kept = self.stage_dirs[name] / "artifact"
            lost = [name] if made.artifact and not all((kept / file).exists() for file in made.artifact["files"]) else []
            sources = [entry for entry in made.inputs.values() if entry["reference"] in self.recipe.stages]
            changed = [entry["reference"] for entry in sources if _differs(entry, finished, stale)]
            if lost or changed:
                stale.append(name)
                causes |= dict.fromkeys(cause for cause in (*lost, *changed) if cause == name or cause not in stale)
        if stale:
            folders = " ".join(str(self.stage_dirs[name]) for name in stale)
            raise UserError(
                f"the artifact of {', '.join(causes)} is gone, or another one than {', '.join(stale)} began with; delete what was made "
                f"from it, and the same command makes it again: rm -r {folders}"
            )

    def model(self, reference: str) -> Path:
        """The Hugging Face folder that a recipe's `model` means: a finished stage's artifact, or the folder itself."""
        return check_model(self._artifact(reference), f"model {reference!r}")

    def reward_model(self, reference: str) -> Path:
        """The folder of a reward model: a finished stage's artifact, or the folder itself."""
        return check_model(self._artifact(reference), f"reward model {reference!r}")

    def dataset(self, reference: str) -> Path:
        """The folder of a dataset of conversations: a finished stage's artifact, or the folder itself."""
        return check_dataset(self._artifact(reference), f"dataset {reference!r}")

    def _artifact(self, reference: str) -> Path:
        if reference not in self.recipe.stages:
            return Path(reference)
        folder = self.stage_dirs[reference]
        if Provenance.read(folder) is None:
            raise UserError(f"stage {reference!r} is not finished, so there is no artifact in {folder}; run it first")
        return folder / "artifact"

    def write_summary(self, status: Literal["running", "finished", "failed", "interrupted"]) -> None:
        """Write `summary.json` from the records of the finished stages."""
        stages = [
            {"name": name, "kind": made.kind, "wall_s": made.wall_s, "metrics": made.metrics} for name, made in self.finished().items()
        ]
        files.write_json(self.path / "summary.json", {"recipe": self.recipe.name, "status": status, "stages": stages})

    def status(self) -> str:
        """finished, running, failed, interrupted or not started, of a run of all stages; one that was killed could not say so."""
        told = files.read_json(self.path / "summary.json")
        status = str(told["status"]) if told else "not started"
        return "interrupted" if status == "running" and not held(self.path) else status


def held(folder: Path) -> bool:
    """Whether a run or a stage holds its lock, as far as the file system tells.

    Taking it for a moment does no harm: who wants it tries for seconds.
    """
    try:
        with (folder / LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _differs(entry: Mapping[str, str], finished: Mapping[str, Provenance], stale: Sequence[str]) -> bool:
    """Whether an input, as it was recorded, is not the one that its stage has now."""
    source = finished.get(entry["reference"])
    return source is None or entry["reference"] in stale or (source.artifact or {}).get("digest") != entry["digest"]


@contextmanager
def claimed(path: Path, recipe: Recipe, fresh: bool, note: Note = lambda line: None) -> Iterator[tuple[RunDirectory, int]]:
    """Hold a run directory, new or of an earlier start of the same recipe, for as long as the block lasts.

    Args:
        path: the folder; made when absent.
        fresh: delete what an earlier run left there.
        note: is told in a line that another run is waited for.

    Yields:
        The directory, and the descriptor of its lock. A child that inherits the descriptor keeps the lock while it lives.

    Raises:
        UserError: the folder holds something else, results of another configuration (but for ranks and layout), is in use, or cannot
            be written.
    """
    check_belongs(path, recipe, fresh)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _unusable(path, error) from None
    try:
        _wait_for(lock, path, fcntl.LOCK_EX, note)
        check_belongs(path, recipe, fresh)
        try:
            _prepare(path, recipe, fresh)
        except OSError as error:
            raise _unusable(path, error) from None
        yield RunDirectory(path, recipe), lock
    finally:
        os.close(lock)


@contextmanager
def joined(path: Path, recipe: Recipe, stage: str, note: Note = lambda line: None) -> Iterator[tuple[RunDirectory, tuple[int, int]]]:
    """Hold one stage of a run directory; others may hold its other stages at the same time, but nobody the whole of it.

    `note` as of `claimed`.

    Yields:
        The directory, and the descriptors of its locks, as `claimed` does.

    Raises:
        UserError: as `claimed`; or the stage runs already.
    """
    check_belongs(path, recipe, fresh=False)
    directory, held = RunDirectory(path, recipe), list[int]()

    def hold(folder: Path, kind: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        held.append(os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644))
        _wait_for(held[-1], folder, kind, note)

    try:
        try:
            hold(path, fcntl.LOCK_SH)
            check_belongs(path, recipe, fresh=False)
            # Stages of one run may have different numbers of ranks, and then none of them rewrites the file of the others.
            if not (path / "resolved.yaml").exists() or _without_ranks(load_resolved(path / "resolved.yaml")) != _without_ranks(recipe):
                files.write_atomic(path / "resolved.yaml", dump_resolved(recipe))
            hold(directory.stage_dirs[stage], fcntl.LOCK_EX)
        except OSError as error:
            raise _unusable(path, error) from None
        yield directory, (held[0], held[1])
    finally:
        for lock in held:
            os.close(lock)


def _without_ranks(recipe: Recipe) -> dict[str, Any]:
    plain = recipe.model_dump()
    del plain["run"]["ranks"]
    return plain


def _prepare(path: Path, recipe: Recipe, fresh: bool) -> None:
    """Remove what does not belong to the recipe and write its `resolved.yaml`. The caller holds the lock and has checked the folder."""
    if fresh:
        _clear(path)
    elif not _has_results(path):
        shutil.rmtree(path / "stages", ignore_errors=True)
    resolved = dump_resolved(recipe)
    if not (path / "resolved.yaml").exists() or (path / "resolved.yaml").read_text(encoding="utf-8") != resolved:
        files.write_atomic(path / "resolved.yaml", resolved)


def _unusable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: the run cannot be written there ({error.strerror}); choose another folder with -o")


def _wait_for(lock: int, path: Path, kind: int, note: Note) -> None:
    """Take the lock. The ranks of a run whose launcher was killed hold it until they have ended, which takes them some seconds."""
    begin, said = time.monotonic(), False
    while True:
        try:
            return fcntl.flock(lock, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            waited_s = time.monotonic() - begin
            if waited_s > _ENDING_S:
                raise UserError(f"{path} is in use by another run; wait for it, or choose another folder with -o") from None
            if waited_s > _SAY_S and not said:
                note(f"{path} is in use; waiting at most {_ENDING_S:g} s for a run there that ends")
                said = True
        time.sleep(0.1)


def check_belongs(path: Path, recipe: Recipe, fresh: bool) -> None:
    """Refuse a folder that a run of this recipe must not write into; changes nothing.

    Raises:
        UserError: the folder holds something else, or results of another configuration, or cannot be written as far as its
            permissions tell.
    """
    try:
        nearest = next(folder for folder in (path, *path.parents) if folder.exists())
        if not nearest.is_dir():
            raise UserError(f"{nearest} is a file; choose another folder with -o")
        if not os.access(nearest, os.W_OK):
            raise PermissionError(EACCES, os.strerror(EACCES))
        content = {entry.name for entry in path.iterdir()} - {LOCK, _DELETED} if nearest == path else set()
    except OSError as error:
        raise _unusable(path, error) from None
    if not content:
        return
    if "resolved.yaml" not in content:
        raise UserError(f"{path} is not empty and not a run directory (it has no resolved.yaml); choose another folder with -o")
    if fresh:
        return
    try:
        before = load_resolved(path / "resolved.yaml")
    except UserError as error:
        raise UserError(f"{path} holds a run this version cannot read ({error}); choose another folder with -o, or --fresh") from None
    difference = first_difference(_ordered(before), _ordered(recipe))
    # Only where every name is ours: a resolved.yaml beside somebody's own files is not overwritten.
    if difference and (_has_results(path) or not content <= _OURS):
        key, old, new = difference
        raise UserError(
            f"{path} holds a run with another configuration: '{key}' was {old}, is now {new}; "
            "choose another folder with -o, or --fresh to delete that run"
        )


def _has_results(path: Path) -> bool:
    """Whether anything below `stages` holds a byte, or is a link to where it might."""
    return any(entry.is_symlink() or (entry.is_file() and entry.stat().st_size > 0) for entry in (path / "stages").rglob("*"))


def _ordered(recipe: Recipe) -> dict[str, Any]:
    """What must stay for a run to go on. The number of its ranks and their layout need not: a checkpoint loads under any.

    Nor need deadlines: one that was too short is mended so.
    """
    plain = recipe.model_dump()
    del plain["layout"], plain["run"]["ranks"], plain["run"]["deadlines"]
    for stage in plain["stages"].values():
        del stage["layout"]
    # Stages run in the order of the file, which comparing dictionaries does not see.
    return plain | {"order of stages": list(recipe.stages)}


def _clear(path: Path) -> None:
    # One rename takes all stages away at once, so that a deletion cut short never leaves a stage that looks finished.
    deleted = path / _DELETED
    shutil.rmtree(deleted, ignore_errors=True)
    if (path / "stages").exists():
        os.replace(path / "stages", deleted)
        shutil.rmtree(deleted)
    shutil.rmtree(path / "logs", ignore_errors=True)
    for name in ("summary.json", "submitted.json", "resolved.yaml"):
        (path / name).unlink(missing_ok=True)


def first_difference(before: Any, now: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """The first key path at which two plain configurations differ, with both values; None when they are equal."""
    if before == now:
        return None
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            found = first_difference(before.get(key, "absent"), now.get(key, "absent"), f"{path}.{key}" if path else str(key))
            if found:
                return found
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        differing = (first_difference(old, new, f"{path}.{index}") for index, (old, new) in enumerate(zip(before, now, strict=True)))
        return next(found for found in differing if found)
    return path, _short(before), _short(now)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
