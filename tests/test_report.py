import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from r1mega.report import plot
from r1mega.report.progress import Progress


def rows(folder: Path, *found: dict[str, object]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))


def test_curves_read_training_and_evaluation_rows() -> None:
    found = [
        {"update": 0, "eval/heldout/pass@1": {"value": 0.1, "ci95": [0.05, 0.15]}, "eval/heldout/cons@16": {"value": 0.2, "ci95": [0, 1]}},
        {"update": 1, "reward/mean": 0.5, "response_length/mean": None},
        {"update": 2, "reward/mean": 0.75, "eval/heldout/pass@1": {"value": 0.9, "ci95": [0.85, 0.95]}},
    ]
    (curve,) = plot.evaluation_curves(found)
    assert (curve.name, curve.updates, curve.values, curve.low, curve.high) == ("heldout", [0, 2], [0.1, 0.9], [0.05, 0.85], [0.15, 0.95])
    assert plot.training_curve(found, "reward/mean").values == [0.5, 0.75]
    assert plot.training_curve(found, "response_length/mean").updates == []


def test_a_stage_gets_a_picture_and_an_empty_one_gets_none(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert plot.draw(tmp_path, "nothing yet") is None
    rows(tmp_path, {"update": 1, "loss": 1.0})
    assert plot.draw(tmp_path, "no curve") is None
    rows(tmp_path, {"update": 1, "reward/mean": 0.5}, {"update": 2, "eval/h/pass@1": {"value": 0.1, "ci95": [0.0, 0.2]}})
    path = plot.draw(tmp_path, "test: zero")
    assert path == tmp_path / "curves.png" and path.read_bytes().startswith(b"\x89PNG")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_without_a_terminal_progress_is_plain_lines() -> None:
    out = io.StringIO()
    with Progress(["zero", "check"], Console(file=out, width=200)) as progress:
        progress.skip("zero")
        progress.begin("check", "evaluate")
        for done in range(1, 5):
            progress.update(done, 4, {"reward": done / 4})
        progress.note("a [note] stays as it is")
        progress.end("check", 1.25, {"pass@1": 0.5})
    lines = out.getvalue().splitlines()
    assert lines[0] == "zero: finished earlier"
    assert lines[1] == "check: evaluate begins"
    assert lines[2].startswith("check: 1/4") and lines[3].startswith("check: 4/4")  # not every update: a log is read by people
    assert lines[-2:] == ["a [note] stays as it is", "check: finished in 1.2 s  pass@1 0.5"]
    assert "\x1b" not in out.getvalue()


def test_in_a_terminal_every_stage_has_a_line() -> None:
    out = io.StringIO()
    with Progress(["zero", "check"], Console(file=out, width=120, force_terminal=True)) as progress:
        progress.begin("zero", "grpo")
        progress.update(3, 4, {"reward": 0.5})
        progress.end("zero", 1.0, {"pass@1": 0.9})
        progress.begin("check", "evaluate")
    text = out.getvalue()
    assert "zero" in text and "4/4" in text and "pass@1 0.9" in text and "check" in text


def test_a_narrow_terminal_cuts_the_figures_not_the_name() -> None:
    out = io.StringIO()
    figures = {f"figure_{index}": 1 / 3 for index in range(9)}
    with Progress(["zero", "check"], Console(file=out, width=80, force_terminal=True, color_system=None)) as progress:
        progress.begin("check", "evaluate")
        for done in range(1, 3):
            progress.update(done, 200, figures)
    last = [line.rpartition("\x1b[2K")[2] for line in out.getvalue().splitlines() if "2/200" in line][-1]
    assert "check" in last and "figure_0" in last and "figure_8" not in last and len(last) <= 80


def test_silence_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    with Progress.silent() as progress:
        progress.begin("zero", "grpo")
        progress.update(1, 1, {"reward": 1.0})
        progress.note("x")
        progress.end("zero", 1.0, {})
        progress.skip("zero")
    assert capfd.readouterr() == ("", "")
