"""Whole stages on the shipped tiny base: one rank in this process, and two ranks that are killed and go on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from r1mega import env, heartbeat
from r1mega.config.loading import load_recipe
from r1mega.errors import UserError
from r1mega.megatron import platform
from r1mega.pipeline.hangs import HUNG
from r1mega.pipeline.metrics import read_metrics
from r1mega.pipeline.rundir import claimed
from r1mega.pipeline.worker import run_stages, stage_function
from r1mega.process import die_with_parent
from r1mega.report.progress import Progress
from r1mega.stages.grpo import GrpoLoop

ROOT = Path(__file__).parents[1]
BASE = ROOT / "configs/tiny/base"
SHORT = [
    "stages.zero.updates=4",
    "stages.zero.prompts_per_rollout=8",
    "stages.zero.updates_per_rollout=2",
    "stages.zero.group_size=4",
    "stages.zero.reference_refresh=2",
    "stages.zero.save_every=2",
    "stages.zero.evaluation.suites.heldout.prompts.limit=8",
    "stages.zero.evaluation.suites.heldout.k=2",
]
# Checkpoints are written beside the training and appear an update or two late: enough updates must be left to break.
KILLED = {
    "grpo": ("configs/tiny/r1_zero.yaml", "01-zero", [*SHORT, "stages.zero.updates=10", "stages.zero.evaluation=null"]),
    "pretrain": (
        "configs/tiny/base.yaml",
        "01-base",
        [
            # The kill falls into the first of two phases, or into the second: both have their own corpus and schedule.
            *(f"stages.base.phases.{phase}.{change}" for phase in (0, 1) for change in ("updates=6", "documents_per_update=32")),
            *("stages.base.phases.0.optimizer.warmup=2", "stages.base.phases.1.optimizer.warmup=2"),
            *("stages.base.save_every=2", "stages.base.evaluation=null", "stages.base.gates=[]"),
        ],
    ),
}
# A checkpoint may take long on a machine that is busy, and is no hang.
SOON = [*(f"run.deadlines.{phase}=15" for phase in ("generate", "judge", "logprobs", "train", "sync")), "run.deadlines.save=60"]
STOPPED = r"hang: rank 1 has been in \w+ for \d+ s .*: it is stopped by a signal \(kill -CONT \d+ lets it go on\); .* goes on .*\n"
pytestmark = pytest.mark.lane


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    platform.start("cpu", 1)
    yield
    platform.stop()


def run(folder: Path, *overrides: str) -> tuple[Path, list[dict[str, Any]]]:
    """Run the tiny R1-Zero recipe, shortened, on one rank; returns the stage's folder and its metrics rows."""
    recipe = load_recipe(ROOT / "configs/tiny/r1_zero.yaml", ["run.ranks=1", "layout.ep=1", *SHORT, *overrides])
    with claimed(folder, recipe, fresh=False) as (directory, _):
        run_stages(directory, (), env.Ranks(0, 1, 0), Progress.silent(), stage_function, lambda: None)
    stage = folder / "stages/01-zero"
    return stage, read_metrics(stage / "metrics.jsonl")


def test_a_short_run_leaves_everything_that_others_read(tmp_path: Path) -> None:
    stage, rows = run(tmp_path / "run")
    updates = [row for row in rows if "grad_norm" in row]
    assert [row["update"] for row in updates] == [1, 2, 3, 4]
    assert all(row["rollout_gap/max"] <= 1e-4 for row in updates)  # fp32: engine and trainer agree
    assert updates[0]["kl"] == 0 and updates[0]["ratio/max"] == 1  # on-policy, and the reference is the policy
    evaluations = [row for row in rows if "eval/heldout/pass@1" in row]
    assert [row["update"] for row in evaluations] == [0, 4]
    assert set(evaluations[0]["eval/heldout/pass@1"]) == {"value", "ci95"}
    before, after = load_file(BASE / "model.safetensors"), load_file(stage / "artifact/model.safetensors")
    assert before.keys() == after.keys()
    mtp = {name for name in before if name.startswith("model.layers.3.")}
    assert mtp and all(torch.equal(before[name], after[name]) for name in mtp if not name.endswith(("embed_tokens.weight", "head.weight")))
    assert torch.equal(after["model.layers.3.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    summary = json.loads((tmp_path / "run/summary.json").read_text())["stages"][0]
    assert summary["name"] == "zero" and summary["kind"] == "grpo" and summary["metrics"]["n_prompts"] == 8


def test_minibatches_of_one_rollout_are_off_policy_and_still_close(tmp_path: Path) -> None:
    _, rows = run(tmp_path / "run", "stages.zero.evaluation=null", "rollout.routing_replay=rollout")
    ratios = {row["update"]: row["ratio/max"] for row in rows}
    assert ratios[1] == ratios[3] == 1  # the first minibatch is trained on with the weights that drew it
    assert ratios[2] > 1 and ratios[4] > 1
    # Experts of the same weights, later minibatches too: they are compared before these move.
    assert all(row["routing_gap/routers"] <= row["routing_gap/tokens"] <= 0.01 for row in rows)


def test_drawing_ahead_and_in_pieces_is_off_policy_and_says_so(tmp_path: Path) -> None:
    changes = ["staleness=1", "partial={segment: 8, extra_prompts: 4}", "updates=12", "save_every=0", "objective.kl_coef=0"]
    _, rows = run(tmp_path / "run", "stages.zero.evaluation.every=4", *(f"stages.zero.{change}" for change in changes))
    assert [row["update"] for row in rows if "eval/heldout/pass@1" in row] == [0, 4, 8, 12]
    rows = [row for row in rows if "grad_norm" in row]
    assert [row["update"] for row in rows] == list(range(1, 13))
    # Two updates a rollout, one rollout ahead, and a response in at most two of them; the oldest are in a rollout's first minibatch.
    assert rows[0]["staleness/max"] == 0 and rows[0]["ratio/max"] == 1
    assert max(row["staleness/max"] for row in rows) == 4
    assert all(row["staleness/mean"] >= 1 for row in rows[2:])
    assert 0 < max(row["continued"] for row in rows) < 1
    # The trainer's log-probs of what other weights drew are those of these weights: the engine's, but for rounding.
    assert all(row["rollout_gap/max"] <= 1e-4 for row in rows)
    assert all(1 < row["ratio/max"] < 3 for row in rows[2:])


def test_a_run_that_draws_ahead_and_in_pieces_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = ["staleness=1", "partial={segment: 8, extra_prompts: 4}", "updates=6", "updates_per_rollout=1", "save_every=3"]
    overrides = ["stages.zero.evaluation=null", *(f"stages.zero.{change}" for change in changes)]
    straight, expected = run(tmp_path / "straight", *overrides)
    finish = GrpoLoop.finish_rollout

    def stopped(self: GrpoLoop, update: int) -> None:
        finish(self, update)
        if update == 4:
            self.checkpoints.wait()
            raise ArithmeticError

    with monkeypatch.context() as patch, pytest.raises(ArithmeticError):
        patch.setattr(GrpoLoop, "finish_rollout", stopped)
        run(tmp_path / "broken", *overrides)
    broken, rows = run(tmp_path / "broken", *overrides)
    assert all(torch.equal(one, other) for one, other in zip(_weights(straight), _weights(broken), strict=True))
    kept = [[{key: value for key, value in row.items() if not key.startswith("seconds")} for row in found] for found in (expected, rows)]
    assert kept[0] == kept[1] and [row["update"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["staleness/max"] > 0 for row in rows] == [False, True, True, False, True, True], "after a checkpoint drawing begins afresh"


def _weights(stage: Path) -> list[torch.Tensor]:
    return list(load_file(stage / "artifact/model.safetensors").values())


def test_dapo_and_dr_grpo_are_settings(tmp_path: Path) -> None:
    dapo = ["aggregation=token", "clip=0.2", "clip_high=0.28", "kl_coef=0", "mask_truncated=true", "drop_uniform_groups=true"]
    _, rows = run(tmp_path / "dapo", "stages.zero.evaluation=null", *(f"stages.zero.objective.{setting}" for setting in dapo))
    assert all(row["kl"] == 0 for row in rows)
    dr_grpo = ["aggregation=constant", "constant_length=32", "normalize_std=false"]
    _, rows = run(tmp_path / "dr", "stages.zero.evaluation=null", *(f"stages.zero.objective.{setting}" for setting in dr_grpo))
    assert all(row["grad_norm"] > 0 for row in rows)


def test_rewards_that_cannot_be_judged_stop_the_run(tmp_path: Path) -> None:
    # The measure is NaN for a bare guess, which most responses of the base are.
    override = "stages.zero.rewards.accuracy.function=r1mega.data.tiny.measures:consistency"
    with pytest.raises(UserError, match=r"stage zero, update 1: \d+\.\d% of the rewards could not be judged.*first reason: accuracy: "):
        run(tmp_path / "run", override, "stages.zero.evaluation=null")
    assert not (tmp_path / "run/stages/01-zero/artifact").exists()


STUCK = """
import re
from pathlib import Path
from r1mega.rewards import exact

def once(name):
    marker = Path(__file__).with_name(name)
    if not marker.exists():
        marker.touch()
        re.match(r"(a+)+$", "a" * 64 + "b")

def reward(prompt, response):
    once("rewarded")
    return exact.accuracy(prompt, response)

def extract(response):
    once("extracted")
    return exact.answer_of(response)
"""


def test_an_endless_regex_costs_one_response_its_reward_and_a_benchmark_one_vote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stuck.py").write_text(STUCK)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    suite = "stages.zero.evaluation.suites.heldout."
    changes = [f"{suite}extract=stuck:extract", f"{suite}deadline_s=1", "stages.zero.rewards.accuracy.function=stuck:reward"]
    changes += ["stages.zero.rewards.accuracy.deadline_s=1", "stages.zero.not_judged_limit=0.1", "stages.zero.updates=2"]
    changes.append("stages.zero.evaluation.at_start=false")
    with pytest.raises(UserError, match=r"suite heldout: extract could not judge 6\.2% .*: no verdict within 1 s; its process was killed"):
        run(tmp_path / "run", *changes)
    rows = read_metrics(tmp_path / "run/stages/01-zero/metrics.jsonl")
    assert sorted(row["not_judged"] for row in rows) == [0, 1 / 16]


@pytest.mark.parametrize("key", ["judge", "measures.consistency"])
def test_an_evaluation_whose_function_fails_is_no_result(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_judge.py").write_text("def judge(prompt, response):\n    raise ValueError('no idea')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    reason = rf"suite heldout: {key} could not judge 100.0% .* first reason: ValueError: no idea \(broken_judge.py, line 2\)"
    with pytest.raises(UserError, match=reason):
        run(tmp_path / "run", f"stages.zero.evaluation.suites.heldout.{key}=broken_judge:judge")


def test_a_loss_that_is_not_finite_is_not_applied_and_its_batch_is_kept(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"stage zero, update \d+: the (loss|gradient norm) is (nan|inf); the step was not applied"
    ) as error:
        run(tmp_path / "run", "stages.zero.optimizer.lr=1e30", "stages.zero.evaluation=null", "stages.zero.updates_per_rollout=4")
    (saved,) = (tmp_path / "run/stages/01-zero").glob("not-finite-update-*.json")
    assert str(saved) in str(error.value)
    batch = json.loads(saved.read_text())
    assert len(batch) == 8 and {"prompt_ids", "response_ids", "logprobs", "text", "reward", "advantage"} <= batch[0].keys()


def test_a_length_cap_beyond_the_context_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"max_new_tokens=600 leaves no room for prompts in the context of 512 tokens"):
        run(tmp_path / "run", "stages.zero.sampling.max_new_tokens={0: 32, 3: 600}")


def stop_rank_1(run: Path) -> None:
    """Not while it saves, for which it has longer."""
    beat = heartbeat.read(run / "logs/beats/0/1")
    while beat is None or beat.phase not in ("generate", "logprobs", "train", "sync"):
        time.sleep(0.01)
        beat = heartbeat.read(run / "logs/beats/0/1")
    os.kill(beat.pid, signal.SIGSTOP)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KILLED)
def test_a_run_that_was_killed_or_hung_goes_on_to_the_same_bits(kind: str, tmp_path: Path) -> None:
    recipe, stage, changes = KILLED[kind]

    def command(folder: str, *more: str) -> list[str]:
        return [sys.executable, "-m", "r1mega.cli", "run", str(ROOT / recipe), "-o", str(tmp_path / folder), *changes, *more]

    subprocess.run(command("straight"), check=True, timeout=300, stdout=subprocess.DEVNULL, preexec_fn=die_with_parent)
    said = tmp_path / "said"
    with said.open("w") as file:
        broken = subprocess.Popen(command("broken", *SOON), stdout=subprocess.DEVNULL, stderr=file, preexec_fn=die_with_parent)
    checkpoint = tmp_path / "broken/stages" / stage / "checkpoints/update-000002"
    deadline = time.monotonic() + 240
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    if kind == "grpo":
        stop_rank_1(tmp_path / "broken")
        assert broken.wait(120) == HUNG and re.fullmatch(STOPPED, said.read_text())
    else:
        broken.kill()
        broken.wait()
    assert checkpoint.exists() and not (tmp_path / "broken/stages" / stage / "artifact").exists()
    subprocess.run(command("broken"), check=True, timeout=300, stdout=subprocess.DEVNULL, preexec_fn=die_with_parent)
    one, other = (load_file(tmp_path / name / "stages" / stage / "artifact/model.safetensors") for name in ("straight", "broken"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    rows = [read_metrics(tmp_path / name / "stages" / stage / "metrics.jsonl") for name in ("straight", "broken")]
    for straight, resumed in zip(*rows, strict=True):
        assert {k: v for k, v in straight.items() if not k.startswith("seconds")} == {
            k: v for k, v in resumed.items() if not k.startswith("seconds")
        }
