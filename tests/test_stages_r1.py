"""The stages that R1 adds to R1-Zero, on the shipped tiny base and one rank: what they leave, and that they go on where they stopped."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from safetensors.torch import load_file

from r1mega import env
from r1mega.config.chats import StageChats
from r1mega.config.loading import load_recipe
from r1mega.data.chats import read_chats
from r1mega.errors import UserError
from r1mega.megatron import platform
from r1mega.pipeline.metrics import read_metrics
from r1mega.pipeline.rundir import claimed
from r1mega.pipeline.worker import run_stages, stage_function
from r1mega.report.progress import Progress

BASE = Path(__file__).parents[1] / "configs/tiny/base"
SUMS = "{source: {kind: tiny, task: running_sum, size: 400}, template: chat}"
MEASURES = "{reflection: 'r1mega.data.tiny.measures:reflection'}"
RECIPE = f"""
name: test
models: {{base: {BASE}}}
stages:
  samples:
    kind: rejection
    model: base
    prompts: {{source: {{kind: tiny, task: running_sum, size: 400}}, template: chat, limit: 60}}
    k: 8
    chunk: 20
    sampling: {{max_new_tokens: 32}}
    judge: r1mega.rewards.exact:accuracy
    filters: {{format: tags, language_min: 0.5, language: "r1mega.data.tiny.measures:consistency"}}
    near_duplicates: null
  tuned:
    kind: sft
    model: base
    data:
      samples: {{kind: stage, stage: samples}}
      errands: {{kind: tiny, task: errand, size: 60}}
    epochs: 2
    batch: 16
    optimizer: {{lr: 1e-3, min_lr: 1e-4, decay: cosine}}
    save_every: 2
  helpful:
    kind: preference
    model: tuned
    loss: pairwise
    sees: summary
    data: {{kind: tiny, task: errand, size: 100}}
    batch: 32
    optimizer: {{lr: 1e-3}}
  everything:
    kind: grpo
    model: tuned
    prompts:
      sums: {SUMS}
      errands: {{source: {{kind: tiny, task: errand}}, template: chat, share: {{0: 0, 4: 1}}}}
    rewards:
      accuracy: {{function: "r1mega.rewards.exact:accuracy", prompts: [sums]}}
      format: {{function: "r1mega.rewards.format:tags"}}
    reward_models:
      helpful: {{model: helpful, prompts: [errands], weight: {{0: 0, 4: 2.0}}}}
    measures: {MEASURES}
    group_size: 4
    prompts_per_rollout: 8
    updates_per_rollout: 2
    updates: 8
    sampling: {{temperature: {{0: 1.0, 4: 0.7}}, max_new_tokens: {{0: 16, 4: 24}}}}
    objective: {{kl_coef: {{0: 1.0e-3, 6: 1.0e-2}}}}
    optimizer: {{lr: 1e-4}}
    train: {{chunk_tokens: 4096}}
    save_every: 2
"""
pytestmark = pytest.mark.lane


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    platform.start("cpu", 1)
    yield
    platform.stop()


def forget_unfinished_saves() -> None:
    """Megatron-Core collects what its writers did in one queue per process, which a crash would end; these tests live on."""
    filesystem_async._results_queue = None


def run(folder: Path, *overrides: str, progress: Progress | None = None, until: str = "everything") -> Path:
    """Run the recipe up to a stage, or go on with it; returns that stage's folder."""
    recipe_file = folder.parent / "recipe.yaml"
    recipe_file.write_text(RECIPE)
    recipe = load_recipe(recipe_file, overrides)
    names = list(recipe.stages)
    recipe = recipe.model_copy(update={"stages": {name: recipe.stages[name] for name in names[: names.index(until) + 1]}})
    with claimed(folder, recipe, fresh=False) as (directory, _):
        run_stages(directory, directory.finished(), env.Ranks(0, 1, 0), progress or Progress.silent(), stage_function, lambda: None)
        return directory.stage_dirs[until]


class Stopped(Exception):
    pass


class StopAt(Progress):
    """Interrupts a stage after an update, as a crash would: nothing behind it runs."""

    def __init__(self, stage: str, update: int) -> None:
        self.stage, self.at, self.now = stage, update, ""

    def begin(self, name: str, kind: str) -> None:
        self.now = name

    def update(self, done: int, total: int, values: Any) -> None:
        if self.now == self.stage and done >= self.at:
            raise Stopped

    def note(self, text: str) -> None:
        pass

    def end(self, name: str, wall_s: float, values: Any) -> None:
        pass

    def skip(self, name: str) -> None:
        pass


def metrics(stage: Path) -> list[dict[str, Any]]:
    rows = read_metrics(stage / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith("seconds")} for row in rows]


def assert_same_weights(one: Path, other: Path) -> None:
    left, right = (load_file(stage / "artifact/model.safetensors") for stage in (one, other))
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_what_was_sampled_is_correct_readable_and_counted(tmp_path: Path) -> None:
    stage = run(tmp_path / "run", until="samples")
    counts = json.loads((stage / "provenance.json").read_text())["metrics"]
    assert counts["prompts"] == 60 and counts["samples"] == 480
    assert counts["kept"] + sum(count for name, count in counts.items() if name.startswith("dropped/")) == 480
    assert counts["dropped/wrong"] > 240 and counts["dropped/wrong_format"] > 0
    rows = [json.loads(line) for line in (stage / "artifact/data.jsonl").read_text().splitlines()]
    assert len(rows) == counts["kept"] == len({row["prompt_id"] for row in rows})
    for row in rows:
        question, response = (message["content"] for message in row["messages"])
        digits = [int(word) for word in question.split() if word.isdigit()]
        assert response.endswith(f"<answer> {sum(digits) % 10} </answer>") and response.startswith("<think>")
        assert row["response_ids"][-1] == 2


REWRITER = """
import time
from pathlib import Path

def louder(prompt, response):
    marker = Path(__file__).with_name("failed")
    if not marker.exists():
        marker.touch()
        time.sleep(100)
    marker = Path(__file__).with_name("failed again")
    if not marker.exists():
        marker.touch()
        raise LookupError("no louder word")
    return f"{response} !"
"""


def test_what_is_kept_may_be_rewritten_and_what_cannot_be_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rewriter.py").write_text(REWRITER)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    changes = ["stages.samples.rewrite=rewriter:louder", "stages.samples.prompts.limit=20"]
    with pytest.raises(UserError, match=r"1.2% of the samples could not be rewritten, .* first reason: no verdict within 3 s"):
        run(tmp_path / "strict", *changes, "stages.samples.not_judged_limit=0", "stages.samples.deadline_s=3", until="samples")
    (tmp_path / "failed again").unlink()
    stage = run(tmp_path / "run", *changes, until="samples")
    counts = json.loads((stage / "provenance.json").read_text())["metrics"]
    rows = [json.loads(line) for line in (stage / "artifact/data.jsonl").read_text().splitlines()]
    assert counts["dropped/not_rewritten"] == 1 and len(rows) == counts["kept"] > 5
    assert all(row["messages"][-1]["content"].endswith("</answer> !") and row["response_ids"] is None for row in rows)


def test_an_interrupted_sampling_goes_on_after_its_ledger(tmp_path: Path) -> None:
    straight = run(tmp_path / "straight", until="samples")
    with pytest.raises(Stopped):
        run(tmp_path / "broken", progress=StopAt("samples", 2), until="samples")
    ledger = tmp_path / "broken/stages/01-samples/ledger.jsonl"
    before = ledger.read_text()
    assert before.count("\n") == 2
    ledger.write_text(before + before[:100])  # a line that was cut off
    broken = run(tmp_path / "broken", until="samples")
    assert ledger.read_text().startswith(before)
    assert (broken / "artifact/data.jsonl").read_bytes() == (straight / "artifact/data.jsonl").read_bytes()


def test_prompts_of_a_benchmark_are_not_sampled(tmp_path: Path) -> None:
    against = "{bench: {source: {kind: tiny, task: running_sum, size: 400}, limit: 20}}"
    # A question of the tiny language has ten words: `en 3 + ...` counts the digits and the signs.
    stage = run(tmp_path / "run", f"stages.samples.decontamination={{against: {against}, n: 3}}", until="samples")
    counts = json.loads((stage / "provenance.json").read_text())["metrics"]
    assert 20 <= counts["prompts/contaminated"] < 60 and counts["samples"] == 8 * (60 - counts["prompts/contaminated"])


def test_a_dataset_from_which_nothing_is_left_is_refused_with_the_reasons(tmp_path: Path) -> None:
    judge = "stages.samples.judge=r1mega.data.tiny.measures:preference"  # there are no errands among these prompts
    with pytest.raises(UserError, match=r"100.0% of the samples could not be judged.*first reason: KeyError"):
        run(tmp_path / "run", judge, until="samples")
    with pytest.raises(UserError, match=r"nothing was kept of 480 samples; reasons: wrong \d+, (wrong_format|long_paragraph) \d+"):
        run(tmp_path / "other", "stages.samples.filters.longest_paragraph=1", until="samples")


def test_supervised_training_lowers_the_loss_counts_its_data_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    straight = run(tmp_path / "straight", until="tuned")
    with pytest.raises(Stopped):
        run(tmp_path / "broken", progress=StopAt("tuned", 5), until="tuned")
    forget_unfinished_saves()
    broken = run(tmp_path / "broken", until="tuned")
    assert_same_weights(straight, broken)
    assert metrics(straight) == metrics(broken)
    rows, summary = metrics(straight), json.loads((straight / "provenance.json").read_text())["metrics"]
    kept = summary["data/samples/conversations"]
    assert summary["data/errands/conversations"] == 60 and len(list(read_chats(chats(tmp_path / "straight")))) == kept
    assert summary["updates"] == len(rows) == -(-2 * (60 + kept) // 16)
    assert sum(row["sequences"] for row in rows) == 2 * (60 + kept)
    assert sum(row["tokens"] for row in rows) == 2 * (summary["data/samples/tokens"] + summary["data/errands/tokens"])
    assert rows[0]["lr"] == 1e-3 and rows[-1]["lr"] < 2e-4
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]


def chats(folder: Path) -> StageChats:
    return StageChats(kind="stage", stage=str(folder / "stages/01-samples/artifact"))


def test_conversations_that_are_too_long_are_dropped_or_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.jsonl:\d+: 3\d tokens, more than train\.chunk_tokens=30 or the context of 512"):
        run(tmp_path / "refused", "stages.tuned.train.chunk_tokens=30", "stages.tuned.too_long=refuse", until="tuned")
    only = "stages.tuned.data={errands: {kind: tiny, task: errand, size: 60}}"
    stage = run(tmp_path / "dropped", "stages.samples.prompts.limit=20", only, "stages.tuned.train.chunk_tokens=20", until="tuned")
    counts = json.loads((stage / "provenance.json").read_text())["metrics"]
    # Refusals are short.
    assert 0 < counts["data/errands/sequences"] < 30 and counts["data/errands/sequences"] + counts["data/errands/dropped"] == 60
    with pytest.raises(UserError, match=r"stage tuned: none of the \d+ conversations of data\.samples fits into train\.chunk_tokens=20"):
        run(tmp_path / "none", "stages.tuned.train.chunk_tokens=20", until="tuned")


@pytest.mark.slow
def test_schedules_mixtures_and_reward_models_survive_a_resume(tmp_path: Path) -> None:
    straight = run(tmp_path / "straight")
    with pytest.raises(Stopped):
        run(tmp_path / "broken", progress=StopAt("everything", 6))
    forget_unfinished_saves()
    broken = run(tmp_path / "broken")
    assert_same_weights(straight, broken)
    rows = metrics(straight)
    assert rows == metrics(broken)
    assert [row["update"] for row in rows] == list(range(1, 9))
    # Until update 4 nothing of the errands: neither prompts nor the reward model.
    assert not any("reward/helpful" in row or "reward/of_errands" in row for row in rows[:4])
    assert all(0 < row["reward/helpful"] < 1 and "reward/of_errands" in row for row in rows[4:])
    assert all(row["response_length/max"] <= 16 for row in rows[:4]) and max(row["response_length/max"] for row in rows[4:]) > 16
    logged = {
        "reflection/mean",
        "response_length/mean",
        "response_length/wrong",
        "entropy",
        "pass_rate",
        "uniform_groups",
        "clip_fraction",
        "kl",
    }
    assert all(logged <= row.keys() for row in rows) and any("response_length/correct" in row for row in rows)
