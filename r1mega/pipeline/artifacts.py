"""What a stage leaves behind: the artifact, and the record of what made it, from what, and how it measured."""

import importlib.util
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import r1mega
from r1mega.config.base import Closed, FunctionMark, PathMark
from r1mega.config.tree import marked, rewritten
from r1mega.errors import UserError
from r1mega.pipeline import files

_PACKAGES = ("torch", "megatron-core", "transformer-engine", "sglang", "transformers", "safetensors", "tokenizers", "numpy", "math-verify")


@dataclass(frozen=True)
class Provenance:
    """The record of a finished stage, `provenance.json`. It is written last: a stage without one is not finished."""

    recipe: str
    name: str
    kind: str
    finished: str
    """Time of the end, UTC, ISO 8601."""
    wall_s: float
    """Seconds of the process that finished the stage; time before an interruption is not in it."""
    seed: int
    ranks: int
    platform: str
    config: dict[str, Any]
    """The stage's resolved configuration; paths below the working directory are relative to it."""
    config_digest: str
    inputs: dict[str, dict[str, str]]
    """Key path -> {"reference": what the recipe says, "digest": SHA-256 of its content when the stage began}."""
    artifact: dict[str, Any] | None
    """{"digest": combined SHA-256, "files": {relative path: SHA-256}}, None for a stage that only measures."""
    metrics: dict[str, Any]
    code: dict[str, Any]
    machine: dict[str, Any]

    def write(self, stage_dir: Path) -> None:
        """Mark the stage as finished."""
        files.write_json(stage_dir / "provenance.json", asdict(self))

    @classmethod
    def read(cls, stage_dir: Path) -> "Provenance | None":
        """The record of a finished stage, None when the stage is not finished."""
        found = files.read_json(stage_dir / "provenance.json")
        return None if found is None else cls(**found)


def record(
    *,
    recipe: str,
    name: str,
    stage: Closed,
    seed: int,
    ranks: int,
    platform_name: str,
    wall_s: float,
    inputs: dict[str, dict[str, str]],
    artifact: Path | None,
    metrics: dict[str, Any],
) -> Provenance:
    """Describe a stage that has just ended. `artifact` is its folder, hashed here; None when it makes none."""
    config = portable(stage)
    contents = files.digests(artifact) if artifact else None
    return Provenance(
        recipe=recipe,
        name=name,
        kind=config["kind"],
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        wall_s=round(wall_s, 3),
        seed=seed,
        ranks=ranks,
        platform=platform_name,
        config=config,
        config_digest=files.text_digest(json.dumps(config, sort_keys=True)),
        inputs=inputs,
        artifact=None if contents is None else {"digest": files.combined_digest(contents), "files": contents},
        metrics=metrics,
        code=_code(),
        machine=_machine(),
    )


def input_digests(stage: Closed, stage_dirs: Mapping[str, Path]) -> dict[str, dict[str, str]]:
    """Reference and digest of every file, folder and model that a stage reads and every function of the user's own, by key path."""
    found = {}
    for path, mark, value in marked(stage, PathMark):
        if mark.names_stage and value in stage_dirs:
            made = Provenance.read(stage_dirs[value])
            digest = str(made.artifact["digest"]) if made and made.artifact else ""
        elif Path(value).is_file():
            digest = files.file_digest(Path(value))
        else:
            digest = files.combined_digest(files.digests(Path(value)))
        found[path] = {"reference": _portable_path(value, stage_dirs), "digest": digest}
    for path, _, value in marked(stage, FunctionMark):
        module = importlib.util.find_spec(value.partition(":")[0])
        # What r1mega brings along is part of `code`.
        if module is not None and module.origin and not module.name.startswith("r1mega."):
            found[path] = {"reference": value, "digest": files.file_digest(Path(module.origin))}
    return found


def portable(stage: Closed) -> dict[str, Any]:
    """A stage's configuration as plain JSON, its paths relative to the working directory where they lie below it."""

    def relative(_: str, mark: PathMark, value: str) -> str:
        return value if mark.names_stage and not os.path.isabs(value) else _portable_path(value, {})

    return rewritten(stage, relative).model_dump(mode="json")


def _portable_path(value: str, stage_dirs: Mapping[str, Path]) -> str:
    if value in stage_dirs or not Path(value).is_relative_to(Path.cwd()):
        return value
    return Path(value).relative_to(Path.cwd()).as_posix()


def check_model(folder: Path, what: str) -> Path:
    """A Hugging Face model folder, or UserError that says what `what` lacks."""
    if not folder.is_dir():
        raise UserError(f"{what}: no folder {folder}")
    if (folder / "metrics.jsonl").is_file():
        made = (folder / "provenance.json").is_file()
        fix = f"name its artifact, {folder / 'artifact'}" if made else "it is not finished: run that stage first, then name its artifact"
        raise UserError(f"{what}: {folder} is the folder of a run's stage; {fix}")
    if not (folder / "config.json").is_file():
        raise UserError(f"{what}: {folder} has no config.json; expected a Hugging Face model folder")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{what}: {folder} has no *.safetensors; expected a Hugging Face model folder")
    return folder


def _code() -> dict[str, Any]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"r1mega": r1mega.__version__, **_commit(Path(r1mega.__file__).parent), "packages": versions}


def _commit(package: Path) -> dict[str, Any]:
    """Commit of the checkout that holds the package; empty when it is installed without one."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(package), *arguments], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # A package installed below some other project's checkout must not claim that project's commit.
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return {}
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
    return {"commit": git("rev-parse", "HEAD"), "modified": bool(changed)}


def _machine() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "architecture": platform.machine(),
        "cpus": os.cpu_count(),
    }
