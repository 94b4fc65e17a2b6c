"""A stage's model as a folder to hand on: the artifact as it is, a model card, and the records of what made it."""

import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from r1mega.errors import UserError
from r1mega.pipeline import files
from r1mega.pipeline.artifacts import Provenance, check_model
from r1mega.pipeline.metrics import read_metrics
from r1mega.pipeline.rundir import RunDirectory
from r1mega.report.card import Score, card

_MODEL_KINDS = ("pretrain", "sft", "grpo", "distill")


def publish(run_dir: Path, stage: str, target: Path, licence: str | None = None, base_model: str | None = None) -> Path:
    """Copy the model that a finished stage made to `target`, with README.md, provenance.json and provenance/<stage>.json of its ancestors.

    A folder that holds this very model already gets its card and records anew, with scores that were measured since.
    The digests of the record cover the artifact's files, not the card and the records.

    Raises:
        UserError: there is no such model, its files are not those that the stage left, or `target` holds something else.
    """
    run = RunDirectory.open(run_dir)
    made = _finished(run, stage)
    artifact = check_model(run.stage_dirs[stage] / "artifact", f"stage {stage!r}")
    assert made.artifact is not None
    _check_files(artifact, made, f"stage {stage!r}: its artifact is not what the stage left; run the stage again")
    ancestors = _ancestors(run, made)
    scores = _scores(run, stage, made)
    text = card(made, ancestors, scores, licence, base_model)
    try:
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            _check_same(target, made)
            _write_records(target, text, made, ancestors)
        else:
            temporary = target.with_name(f".{target.name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(artifact, temporary)
            _write_records(temporary, text, made, ancestors)
            os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror})") from None
    return target


def _finished(run: RunDirectory, stage: str) -> Provenance:
    if stage not in run.recipe.stages:
        raise UserError(f"{run.path} has no stage {stage!r}; it has {', '.join(run.recipe.stages)}")
    kind = run.recipe.stages[stage].kind
    if kind not in _MODEL_KINDS:
        raise UserError(f"stage {stage!r} ({kind}) makes no language model to publish")
    made = Provenance.read(run.stage_dirs[stage])
    if made is None or made.artifact is None:
        raise UserError(f"stage {stage!r} is not finished, so there is nothing to publish; run it first")
    return made


def _check_files(folder: Path, made: Provenance, message: str) -> None:
    assert made.artifact is not None
    expected = made.artifact["files"]
    found = files.digests(folder)
    differing = sorted(name for name in expected if found.get(name) != expected[name])
    if differing:
        raise UserError(f"{message} (first difference: {differing[0]})")


def _check_same(target: Path, made: Provenance) -> None:
    record = files.read_json(target / "provenance.json") if target.is_dir() else None
    if record is None:
        raise UserError(f"{target} holds something else; name a new folder")
    _check_files(target, made, f"{target} holds another model; name a new folder")


def _write_records(target: Path, text: str, made: Provenance, ancestors: list[Provenance]) -> None:
    shutil.rmtree(target / "provenance", ignore_errors=True)
    (target / "provenance").mkdir()
    for number, ancestor in enumerate(ancestors, 1):
        files.write_json(target / "provenance" / f"{number:02d}-{ancestor.name}.json", asdict(ancestor))
    files.write_atomic(target / "README.md", text)
    made.write(target)


def _ancestors(run: RunDirectory, made: Provenance) -> list[Provenance]:
    """The records that a stage goes back to, newest first: other stages of the run, and folders that hold a record of their own.

    A record counts where the digest of its artifact is that of the input; what has changed since is not an ancestor.
    """
    found: dict[str, Provenance] = {}
    waiting = [made]
    while waiting:
        for given in waiting.pop(0).inputs.values():
            reference = given["reference"]
            folder = run.stage_dirs.get(reference, Path(reference))
            record = Provenance.read(folder) if folder.is_dir() else None
            if record is None or record.artifact is None or folder.as_posix() in found:
                continue
            if given["digest"] not in (record.artifact["digest"], files.combined_digest(files.digests(folder))):
                continue
            found[folder.as_posix()] = record
            waiting.append(record)
    # By the clock, since one stage may be reached on a short way and on a long one.
    return sorted(found.values(), key=lambda record: record.finished, reverse=True)


def _scores(run: RunDirectory, stage: str, made: Provenance) -> list[Score]:
    """What stages that measure found of this model; where none did, what its own stage found after its last update."""
    scores = []
    for name, judge in run.finished().items():
        if judge.kind != "evaluate":
            continue
        for label, reference in judge.config["models"].items():
            assert made.artifact is not None
            if reference == stage and judge.inputs.get(f"models.{label}", {}).get("digest") == made.artifact["digest"]:
                rows = [row for row in read_metrics(run.stage_dirs[name] / "metrics.jsonl") if row.get("model") == label]
                scores += [score for row in rows[-1:] for score in _of_row(row, name, judge.config["suites"])]
    if scores:
        return scores
    rows = [row for row in read_metrics(run.stage_dirs[stage] / "metrics.jsonl") if any(key.startswith("eval/") for key in row)]
    suites = (made.config.get("evaluation") or {}).get("suites", {})
    return [score for row in rows[-1:] for score in _of_row(row, f"{stage}, update {row['update']}", suites)]


def _of_row(row: dict[str, Any], stage: str, suites: dict[str, Any]) -> list[Score]:
    found: dict[str, dict[str, Any]] = {}
    for key, value in row.items():
        if key.startswith("eval/"):
            suite, _, metric = key.removeprefix("eval/").partition("/")
            found.setdefault(suite, {})[metric] = value
    return [Score(stage, suite, metrics, suites.get(suite, {})) for suite, metrics in found.items()]
