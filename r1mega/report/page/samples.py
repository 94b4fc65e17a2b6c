"""What was answered: a bounded part of it to read, and the lengths of all of it."""

import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1mega.config.evaluation import Suite
from r1mega.config.schema import Recipe
from r1mega.data.tiny.vocabulary import CONNECTIVES, WAIT
from r1mega.report.page.charts import Histogram
from r1mega.report.page.run import RunView, StageView
from r1mega.report.response import parts
from r1mega.rewards.reflection import WORDS

PROMPTS, RESPONSES, LETTERS, BYTES = 60, 3, 4_000, 1_500_000
"""Of a suite: prompts; responses of a checkpoint to a prompt; letters of a text; and bytes in all, for which prompts are left out."""
CHECKPOINTS = 4
"""Of a training stage: the first, the last, and some between."""
_BINS = 28


@dataclass(frozen=True)
class Checkpoint:
    """A model at one moment, and its file of samples."""

    label: str
    group: str
    """The stage that wrote the samples."""
    path: Path


@dataclass(frozen=True)
class SuiteSamples:
    """Samples of one suite, as the page's script reads them."""

    name: str
    data: dict[str, Any]
    shown: str
    """In words, how much of all there is."""
    lengths: list[Histogram]


def collect(view: RunView) -> list[SuiteSamples]:
    """Samples and lengths of every suite of a run, the suites that stages which measure have first."""
    found: dict[str, list[Checkpoint]] = {}
    for stage in sorted(view.stages, key=lambda stage: not stage.measures):
        for suite, label, path in _files(stage):
            found.setdefault(suite, []).append(Checkpoint(label, stage.name, path))
    return [_suite(name, checkpoints, _tiny(view.run.recipe, name), BYTES // len(found)) for name, checkpoints in found.items()]


def _files(stage: StageView) -> Iterator[tuple[str, str, Path]]:
    order = list((stage.config if stage.measures else stage.config.get("evaluation") or {}).get("suites", ()))
    labels = stage.samples if stage.measures else _spread(stage.samples, CHECKPOINTS)
    for label, files in labels:
        update = label.removeprefix("update-")
        shown = f"{stage.name}, update {int(update)}" if update != label and update.isdigit() else label
        for suite, path in sorted(files.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)):
            yield suite, shown, path


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """So many of the items, first and last among them, evenly spread."""
    if len(items) <= count:
        return list(items)
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]


def _tiny(recipe: Recipe, name: str) -> bool:
    """Whether a suite speaks the tiny language."""
    for stage in recipe.stages.values():
        evaluation = getattr(stage, "evaluation", None)
        suites: dict[str, Suite] = getattr(stage, "suites", None) or (evaluation.suites if evaluation else {})
        if name in suites and suites[name].prompts.source.kind == "tiny":
            return True
    return False


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a file of samples; one that was cut off, as by a machine that stopped, ends at its last whole line."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        try:
            for line in file:
                yield json.loads(line)
        except (EOFError, json.JSONDecodeError):
            return


def _suite(name: str, checkpoints: Sequence[Checkpoint], tiny: bool, budget: int) -> SuiteSamples:
    order: dict[str, dict[str, Any]] = {}
    lengths: list[dict[bool | None, list[int]]] = []
    for checkpoint in checkpoints:
        by_outcome: dict[bool | None, list[int]] = {True: [], False: [], None: []}
        for row in read(checkpoint.path):
            order.setdefault(row["prompt_id"], {"id": row["prompt_id"], "prompt": row["prompt"], "answer": row["answer"]})
            by_outcome[row["correct"]].append(row["length"])
        lengths.append(by_outcome)
    count = PROMPTS
    while True:
        chosen = _spread(list(order), count)
        rows = [_answers(checkpoint.path, chosen) for checkpoint in checkpoints]
        data = {
            "suite": name,
            "checkpoints": [{"label": checkpoint.label, "group": checkpoint.group} for checkpoint in checkpoints],
            "prompts": [{key: _cut(str(value or "")) for key, value in order[prompt].items()} for prompt in chosen],
            "rows": rows,
            "words": _words(tiny),
        }
        if len(json.dumps(data)) <= budget or count <= 2:
            break
        count //= 2
    most = max((answers["k"] for answered in rows for answers in answered if answers), default=0)
    shown = (
        f"{len(chosen)} of {len(order):,} prompts, evenly spread; the first {min(RESPONSES, most)} of {most} responses of each checkpoint; "
        f"texts of more than {LETTERS:,} characters are cut in their middle."
    )
    return SuiteSamples(name, data, shown, _histograms(checkpoints, lengths))


def _answers(path: Path, chosen: Sequence[str]) -> list[dict[str, Any] | None]:
    """For every chosen prompt the first responses, how many there are and how many of them are right; None where it was not asked."""
    found: dict[str, dict[str, Any]] = {prompt: {"k": 0, "right": 0, "first": []} for prompt in chosen}
    for row in read(path):
        answers = found.get(row["prompt_id"])
        if answers is not None:
            answers["k"] += 1
            answers["right"] += row["correct"] is True
            if len(answers["first"]) < RESPONSES:
                answers["first"].append(_shown(row))
    return [answers if answers["k"] else None for answers in found.values()]


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    split = parts(row["response"])
    return {
        "thought": None if split.thought is None else _cut(split.thought),
        "answer": _cut(split.answer),
        "extracted": row["extracted"],
        "correct": row["correct"],
        "length": row["length"],
        "cut": row["finish"] == "length",
    }


def _cut(text: str) -> str:
    if len(text) <= LETTERS:
        return text
    half = LETTERS // 2
    return f"{text[:half]}\n[... {len(text) - LETTERS:,} characters are left out here ...]\n{text[-half:]}"


def _words(tiny: bool) -> dict[str, Any]:
    """What is marked in the texts: reflection words, and the words of two languages where letters do not tell them apart."""
    if not tiny:
        return {"reflection": list(WORDS), "languages": None}
    return {"reflection": list(WAIT.values()), "languages": [list(words) for words in CONNECTIVES.values()]}


def _histograms(checkpoints: Sequence[Checkpoint], lengths: Sequence[dict[bool | None, list[int]]]) -> list[Histogram]:
    """Histograms over the same bins, from the shortest to the longest response of all checkpoints."""
    everything = [length for by_outcome in lengths for found in by_outcome.values() for length in found]
    if not everything:
        return []
    low, high = min(everything), max(everything) + 1
    width = max(1, -(-(high - low) // _BINS))
    edges = [low + width * index for index in range(-(-(high - low) // width) + 1)]

    def counted(found: list[int]) -> list[int]:
        counts = [0] * (len(edges) - 1)
        for length in found:
            counts[(length - low) // width] += 1
        return counts

    histograms = []
    for checkpoint, by_outcome in zip(checkpoints, lengths, strict=True):
        each = [length for found in by_outcome.values() for length in found]
        if each:
            counts = [counted(by_outcome[outcome]) for outcome in (True, False, None)]
            histograms.append(Histogram(checkpoint.label, sum(each) / len(each), [float(edge) for edge in edges], *counts))
    return histograms
