"""The mismatch budget in the stage: what happens beyond it, and what is left behind."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core")
import torch
from test_stages import run

from r1mega.config.loading import load_recipe
from r1mega.errors import UserError
from r1mega.megatron import platform
from r1mega.report.progress import Progress
from r1mega.rollout.engine import Drawn, Sample, SamplingParams
from r1mega.rollout.local import LocalEngine

ROOT = Path(__file__).parents[1]
FEW = ["stages.zero.evaluation=null", "stages.zero.updates=2"]
MISMATCH = "stages.zero.objective.mismatch"


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    platform.start("cpu", 1)
    yield
    platform.stop()


@pytest.fixture
def hot(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that draws at temperature 1.5, whatever it is asked for."""
    start = LocalEngine.start
    monkeypatch.setattr(
        LocalEngine, "start", lambda self, requests, sampling, *drawn: start(self, requests, replace(sampling, temperature=1.5), *drawn)
    )


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(Progress, "note", lambda self, text: said.append(text))
    return said


def budget(then: str, most: float = 0.01) -> str:
    return f"stages.zero.trust.budget=[{{measure: rollout_gap/mean, most: {most}, then: {then}}}]"


def numbers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith(("seconds", "budget"))} for row in rows]


def test_a_budget_that_is_kept_changes_nothing(tmp_path: Path, notes: list[str]) -> None:
    _, plain = run(tmp_path / "plain", *FEW)
    stage, held = run(tmp_path / "held", *FEW, budget("stop", most=1e-4), "stages.zero.trust.probe=4")
    assert held[0]["budget/exceeded"] == 0 and held[0]["budget/rollout_gap/mean"] <= 1e-5
    assert 0 <= held[0]["probe_gap/after_max"] <= 1e-4 and "probe_gap/before_max" not in held[0]  # there was no weight before
    assert "budget/exceeded" not in held[1]  # one decision a rollout
    assert numbers(plain) == [{k: v for k, v in row.items() if not k.startswith("probe")} for row in numbers(held)]
    assert not notes and not (stage / "trust").exists()


def test_the_probe_shows_every_sync(tmp_path: Path) -> None:
    _, rows = run(tmp_path / "run", "stages.zero.evaluation=null", "stages.zero.trust.probe=8")
    first, second = (row for row in rows if "probe_gap/after_max" in row)
    assert second["probe_gap/before_max"] > 1e-3  # two updates moved the trainer
    assert max(first["probe_gap/after_max"], second["probe_gap/after_max"]) <= 1e-4  # and the engine follows


@pytest.mark.usefixtures("hot")
def test_a_warning_is_a_line_a_number_and_a_file(tmp_path: Path, notes: list[str]) -> None:
    stage, rows = run(tmp_path / "run", "stages.zero.evaluation=null", budget("warn"))
    decided = [row for row in rows if "budget/exceeded" in row]
    assert [row["budget/exceeded"] for row in decided] == [1, 1]
    assert [row["budget/corrected"] for row in decided] == [0, 0]
    assert decided[0]["attribution/sampling"] > 0.9 and "attribution/sampling" not in decided[1]  # again after 100 updates
    lines = [note for note in notes if "update" in note]
    assert len(lines) == 3 and all("\n" not in line for line in lines)
    assert "rollout_gap/mean is" in lines[0] and "more than its budget of 0.01" in lines[0]
    assert "sampling: log-probs are those of temperature 1.5" in lines[1]
    (file,) = (stage / "trust").iterdir()
    found = json.loads(file.read_text())
    assert found["causes"][0]["name"] == "sampling" and found["numbers"]["fitted_temperature"] == pytest.approx(1.5, rel=0.01)
    assert found["differing"] == [] and found["tokens"] > 0 and len(found["responses"]) == 16


@pytest.mark.usefixtures("hot")
def test_a_rollout_beyond_the_budget_is_corrected(tmp_path: Path) -> None:
    settings = [f"{MISMATCH}.weights=tis", f"{MISMATCH}.cap=1.0", f"{MISMATCH}.sequence_mask=0.0", f"{MISMATCH}.when=over_budget"]
    _, rows = run(tmp_path / "beyond", *FEW, budget("correct"), *settings)
    assert rows[0]["budget/corrected"] == 1
    assert all(0.3 < row["correction/weight"] < 1 and 0 < row["correction/bounded"] < 1 for row in rows)
    assert any(row["correction/left_out"] > 0 for row in rows)
    _, always = run(tmp_path / "always", *FEW, *settings[:-1])
    assert [row["grad_norm"] for row in always] == [row["grad_norm"] for row in rows]
    _, within = run(tmp_path / "within", *FEW, budget("correct", most=100.0), *settings)
    _, plain = run(tmp_path / "plain", *FEW)
    assert "correction/weight" not in within[0]
    assert [row["grad_norm"] for row in within] == [row["grad_norm"] for row in plain] != [row["grad_norm"] for row in rows]


def test_a_stop_keeps_the_state_from_before_and_goes_on_when_the_cause_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = ["stages.zero.evaluation=null", "stages.zero.save_every=0", budget("stop")]
    start, calls = LocalEngine.start, []

    def spoilt(self: LocalEngine, requests: Any, sampling: SamplingParams, *drawn: Drawn) -> Callable[[], list[Sample]]:
        calls.append(1)
        return start(self, requests, replace(sampling, temperature=1.5) if len(calls) > 1 else sampling, *drawn)

    _, straight = run(tmp_path / "straight", *limits)
    monkeypatch.setattr(LocalEngine, "start", spoilt)
    with pytest.raises(UserError, match=r"stage zero, update 3: rollout_gap/mean is .*; mean gap .* comes from sampling: .*") as error:
        run(tmp_path / "run", *limits)
    assert "\n" not in str(error.value)
    assert (tmp_path / "run/stages/01-zero/checkpoints/update-000002").is_dir()
    monkeypatch.undo()
    _, rows = run(tmp_path / "run", *limits)
    assert numbers(rows) == numbers(straight)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ([budget("correct")], "set objective.mismatch.when to over_budget"),
        ([f"{MISMATCH}.weights=tis", f"{MISMATCH}.when=over_budget"], "no limit of trust.budget has `then: correct`"),
        (["stages.zero.trust.budget=[{measure: rollout_gap/p98, most: 1}]"], "rollout_gap/p99"),
        (["stages.zero.trust.budget=[{measure: probe_gap/after_max, most: 1}]"], "set probe"),
    ],
)
def test_a_budget_that_means_nothing_is_refused(settings: list[str], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        load_recipe(ROOT / "configs/tiny/r1_zero.yaml", settings)


def test_the_random_state_of_the_run_is_left_alone(tmp_path: Path) -> None:
    """An attribution without a reason, at every rollout, moves no bit of the training."""
    _, plain = run(tmp_path / "plain", "stages.zero.evaluation=null")
    torch.manual_seed(123)
    settings = ["stages.zero.trust.attribution.every=1", "stages.zero.trust.attribution.keep_previous=true"]
    stage, looked = run(tmp_path / "looked", "stages.zero.evaluation=null", *settings)
    assert len(list((stage / "trust").iterdir())) == 2
    assert numbers(plain) == [{k: v for k, v in row.items() if not k.startswith("attribution")} for row in numbers(looked)]
