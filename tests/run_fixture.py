"""A run directory with made-up numbers, in the format that runs leave."""

import gzip
import json
from pathlib import Path
from typing import Any

from r1mega.config.loading import dump_resolved, load_recipe
from r1mega.pipeline import artifacts, files
from r1mega.pipeline.rundir import RunDirectory

BASE = Path(__file__).parent.parent / "configs/tiny/base"
HOSTILE = "</script><script>window.harmed = 1</script><!-- <img src=x onerror='window.harmed = 1'>"

RECIPE = f"""
name: small-r1
description: A run of the tests.
models: {{base: {BASE}}}
stages:
  zero: &rl
    kind: grpo
    model: base
    prompts: {{sums: &sums {{source: {{kind: tiny, task: running_sum}}}}}}
    rewards: {{accuracy: {{function: "r1mega.rewards.exact:accuracy"}}}}
    updates: 400
    optimizer: {{lr: 5.0e-4}}
    evaluation:
      suites: &suites
        heldout:
          prompts: {{<<: *sums, split: heldout}}
          judge: r1mega.rewards.exact:accuracy
  cold-start: {{kind: rejection, model: zero, prompts: *sums, judge: "r1mega.rewards.exact:accuracy"}}
  dev1:
    kind: sft
    model: base
    data: {{cold: {{kind: stage, stage: cold-start}}}}
    optimizer: {{lr: 1.0e-3}}
  helpful: {{kind: preference, model: dev1, loss: pairwise, sees: summary, data: {{kind: tiny, task: errand}}, optimizer: {{lr: 1.0e-3}}}}
  r1:
    <<: *rl
    model: dev1
    reward_models: {{helpful: {{model: helpful}}}}
  table: {{kind: evaluate, models: {{Base: base, Zero: zero, R1: r1}}, suites: *suites}}
"""


def make_run(path: Path, finished: int = 6, thought: str = "") -> RunDirectory:
    """A run whose first `finished` of six stages are finished and whose next one is under way; `thought` is put into every thought."""
    path.mkdir(parents=True)
    (path / "recipe.yaml").write_text(RECIPE)
    recipe = load_recipe(path / "recipe.yaml")
    (path / "recipe.yaml").unlink()
    (path / "resolved.yaml").write_text(dump_resolved(recipe))
    run = RunDirectory(path, recipe)
    for index, (name, folder) in enumerate(run.stage_dirs.items()):
        if index <= finished:
            folder.mkdir(parents=True)
            _write_rows(folder, _rows(recipe.stages[name].kind))
            _write_samples(folder, recipe.stages[name].kind, thought)
        if index < finished:
            _finish(run, name, folder)
    run.write_summary("running" if finished < 6 else "finished")
    return run


def _rows(kind: str) -> list[dict[str, Any]]:
    if kind == "grpo":
        rows = [
            {
                "update": update,
                "reward/mean": update / 400,
                "reward/accuracy": update / 500,
                "response_length/mean": 5 + update / 40,
                "response_length/correct": 6.0 if update > 10 else None,
                "pass_rate": update / 400,
                "entropy": 1 - update / 500,
                "clip_fraction": 0.0,
                "rollout_gap/mean": 1e-7 * update,
                "never/seen before": update,
            }
            for update in range(1, 401)
        ]
        return [{"update": 0, **_scores(0.1)}, *rows, {"update": 400, **_scores(0.9)}]
    if kind == "evaluate":
        return [{"update": 0, "model": label, **_scores(value)} for label, value in (("Base", 0.1), ("Zero", 0.9), ("R1", 0.95))]
    if kind == "rejection":
        return []
    return [{"update": update, "loss": 1 / update, "lr": 1e-3} for update in range(1, 9)]


def _scores(value: float) -> dict[str, Any]:
    return {
        "eval/heldout/pass@1": {"value": value, "ci95": [value - 0.05, value + 0.05]},
        "eval/heldout/consistency": {"value": 1 - value / 2, "ci95": [0.5, 1.0]},
        "eval/heldout/response_length": {"value": 20 * value, "ci95": [18 * value, 22 * value]},
        "eval/heldout/preference": None,
        "eval/heldout/truncated": 0.0,
        "eval/heldout/n_prompts": 8,
        "eval/heldout/k": 4,
        "eval/heldout/suite": {"template": "chat", "sampling": "temperature 0.6"},
    }


def _write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    if rows:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_samples(folder: Path, kind: str, thought: str) -> None:
    labels = {"evaluate": ("Base", "Zero", "R1"), "grpo": ("update-000000", "update-000400")}.get(kind, ())
    for skill, label in enumerate(labels):
        (folder / "samples" / label).mkdir(parents=True)
        with gzip.open(folder / "samples" / label / "heldout.jsonl.gz", "wt", encoding="utf-8") as file:
            for prompt in range(8):
                for k in range(4):
                    file.write(json.dumps(_sample(prompt, k, right=prompt < 3 * skill + 1, thought=thought), ensure_ascii=False) + "\n")


def _sample(prompt: int, k: int, right: bool, thought: str) -> dict[str, Any]:
    said = str(prompt if right else 9)
    return {
        "prompt_id": f"running_sum/{prompt}",
        "prompt": f"en {prompt} + 0 :",
        "answer": str(prompt),
        "response": f"<think> so {k} wait ze {prompt} {thought}</think> <answer> {said} </answer>",
        "extracted": said,
        "correct": right,
        "length": 9 + k + 10 * right,
        "finish": "stop",
    }


def _finish(run: RunDirectory, name: str, folder: Path) -> None:
    stage = run.recipe.stages[name]
    if stage.kind in ("grpo", "sft"):
        (folder / "artifact").mkdir()
        for file in BASE.iterdir():
            if file.name != "provenance.json":
                (folder / "artifact" / file.name).write_bytes(file.read_bytes())
    elif stage.kind != "evaluate":
        (folder / "artifact").mkdir()
        (folder / "artifact/data.jsonl").write_text("{}\n")
    rows = [row for row in _rows(stage.kind) if "eval/heldout/pass@1" in row]
    metrics = (
        {key.removeprefix("eval/heldout/"): value for key, value in rows[-1].items() if key.startswith("eval/")} if rows else {"kept": 8}
    )
    made = folder / "artifact"
    artifacts.record(
        recipe=run.recipe.name,
        name=name,
        stage=stage,
        seed=1,
        ranks=2,
        platform_name="cpu",
        wall_s=61.5,
        inputs=artifacts.input_digests(stage, run.stage_dirs),
        artifact=made if made.is_dir() else None,
        metrics=metrics,
    ).write(folder)


def write_again(run: RunDirectory, name: str, changes: dict[str, Any]) -> None:
    """Change the record of a finished stage."""
    path = run.stage_dirs[name] / "provenance.json"
    files.write_json(path, files.read_json(path) | changes)
