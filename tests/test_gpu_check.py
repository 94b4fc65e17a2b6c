"""`tools/gpu_check`: what it concludes from measurements, and all of it that a CPU can run."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from r1mega.gpu_check import checks, report
from r1mega.gpu_check.checks import ACTIVATIONS, LOSS_GAP, PARITY, Answer, Bench
from r1mega.gpu_check.report import Row

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools/gpu_check"


def answer(loss: float = 2.0, scale: float = 1.0, noise: float = 0.0, **changed: torch.Tensor) -> Answer:
    generator = torch.Generator().manual_seed(0)
    found = {name: torch.randn(50, generator=generator) for name in ("Llama/logits", "Llama/gradients/a", "Llama/gradients/b")}
    found |= {"Qwen2/logits": torch.zeros(3)}
    other = torch.Generator().manual_seed(1)
    tensors = {name: scale * (value + noise * torch.randn(value.shape, generator=other)) for name, value in found.items()}
    return Answer({"Llama": {"loss": loss}}, tensors | {name.replace("__", "/"): value for name, value in changed.items()})


def test_equal_platforms_pass() -> None:
    rows = list(checks.compared("Llama", answer(), answer()))
    assert [(row.case, row.state, row.value) for row in rows] == [
        (f"Llama: {part}", "passed", 0.0) for part in ("loss", "logits", "gradients")
    ]


@pytest.mark.parametrize(
    ("found", "failed"),
    [
        (answer(loss=2.0 * (1 + 2 * PARITY)), {"Llama: loss"}),
        (answer(loss=math.nan), {"Llama: loss"}),
        (answer(scale=1 + 2 * PARITY), {"Llama: logits", "Llama: gradients"}),
        (answer(Llama__gradients__b=torch.full((50,), math.nan)), {"Llama: gradients"}),
        (answer(Llama__logits=torch.zeros(50)), {"Llama: logits"}),
    ],
)
def test_platforms_that_differ_fail(found: Answer, failed: set[str]) -> None:
    rows = list(checks.compared("Llama", answer(), found))
    assert {row.case for row in rows if row.state == "failed"} == failed
    assert len(rows) == 3


def test_the_worst_gradient_is_named() -> None:
    *_, row = checks.compared("Llama", answer(), answer(Llama__gradients__b=torch.zeros(50)))
    assert row.note == "worst of 2: b"
    assert row.value == 1.0


@pytest.mark.parametrize(("noise", "state"), [(0.01, "passed"), (0.019, "passed"), (0.03, "failed"), (math.nan, "failed")])
def test_rounding_is_held_against_that_of_plain_kernels(noise: float, state: str) -> None:
    rows = list(checks.rounded("Llama", answer(), answer(noise=0.01), answer(noise=noise)))
    assert [(row.case, row.state) for row in rows] == [("Llama: logits", state), ("Llama: gradients", state)]


def test_a_family_that_failed_is_an_error_of_its_own() -> None:
    broken = Answer({"Llama": {"error": "RuntimeError: no kernel"}}, {})
    for compared in (lambda: checks.compared("Llama", answer(), broken), lambda: checks.rounded("Llama", answer(), answer(), broken)):
        with pytest.raises(RuntimeError, match="no kernel"):
            list(compared())


def test_the_gap_of_losses_is_that_of_smoothed_ones_after_the_warm_up() -> None:
    losses = [4.0 - 0.1 * step for step in range(20)]
    assert checks.largest_gap(losses, losses, 4) == (0.0, 4)
    value, step = checks.largest_gap(losses, [loss * 1.002 for loss in losses], 4)
    assert value == pytest.approx(0.002) and 4 <= step < 20
    assert value < LOSS_GAP
    # A single step weighs a tenth.
    value, step = checks.largest_gap(losses, [*losses[:10], losses[10] + 1.0, *losses[11:]], 4)
    assert step == 10 and 0.02 < value < 0.04
    early, _ = checks.largest_gap(losses, [losses[0], losses[1] + 0.1, *losses[2:]], 15)
    assert early < LOSS_GAP
    broken, step = checks.largest_gap(losses, [*losses[:7], math.nan, *losses[8:]], 4)
    assert math.isnan(broken) and step == 7
    assert report.bounded("loss", "", broken, LOSS_GAP).state == "failed"


def test_the_planner_is_held_against_what_was_held() -> None:
    planned = {"weights": 100.0, "activations": 100.0, "working": 10.0, "runtime": 5e9}
    found = {"fp8": "none", "held": {"weights": 106, "activations": 106}, "planned": planned, "peak": 300}
    rows = list(checks.planned("layer", found))
    assert [(row.case, row.state) for row in rows] == [
        ("layer: weights", "failed"), ("layer: activations", "passed"), ("layer: peak", "failed"),
    ]  # fmt: skip
    assert rows[2].value == pytest.approx(1 - 210 / 300) and rows[2].bound == ACTIVATIONS
    *_, row = checks.planned("layer", {"fp8": "blockwise", "held": {"activations": 200}, "planned": planned})
    assert (row.state, row.bound) == ("measured", None)


def test_nothing_hides_what_comes_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[Row]:
        raise RuntimeError("illegal memory access")

    def lacking() -> list[Row]:
        raise checks.Skipped("no Transformer Engine")

    monkeypatch.setattr(
        checks,
        "CHECKS",
        {"first": lambda bench: [("a", broken), ("b", lacking)], "second": lambda bench: [("c", lambda: [Row("second", "c", "passed")])]},
    )
    told: list[Row] = []
    rows = checks.run(Bench("cpu"), ["first", "second"], told.append)
    assert [(row.case, row.state, row.note) for row in rows] == [
        ("a", "failed", "RuntimeError: illegal memory access"), ("b", "skipped", "no Transformer Engine"), ("c", "passed", ""),
    ]  # fmt: skip
    assert told == rows


def test_a_worker_that_fails_says_how() -> None:
    with pytest.raises(RuntimeError, match="KeyError: 'nothing'"):
        Bench("cpu").ask("cpu", "nothing", {})
    with pytest.raises(RuntimeError, match=r"did not end in 0\.01 s"):
        Bench("cpu", patience_s=0.01).ask("cpu", "outputs", {})


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_platforms_that_are_not_there_are_skipped() -> None:
    for platform in ("cuda", "cuda_local"):
        with pytest.raises(checks.Skipped, match="torch sees no CUDA device"):
            Bench("cpu").ask(platform, "outputs", {"dtype": "bfloat16"}, families=["Llama"], routed=False)


def test_results_of_tests_are_rows(tmp_path: Path) -> None:
    (tmp_path / "test_three.py").write_text(
        "import pytest\ndef test_right(): pass\ndef test_wrong(): assert 1 == 2\n@pytest.mark.skip('no GPU')\ndef test_left_out(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "--junitxml=found.xml", "-c", "/dev/null", "--rootdir", ".", "test_three.py"]
    subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60)
    rows = list(checks.of_tests(tmp_path / "found.xml"))
    assert [(row.case, row.state, row.note) for row in rows] == [
        ("test_right", "passed", ""), ("test_wrong", "failed", "assert 1 == 2"), ("test_left_out", "skipped", "no GPU"),
    ]  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_nothing_is_checked(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, TOOL, "--output", tmp_path / "out"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    first, *parts = done.stdout.splitlines()
    assert first == "gpu_check: no GPU here, so nothing was checked; --device cpu tries the harness itself"
    assert any("install a CUDA build of torch" in line for line in parts)
    assert any("transformer-engine" in line for line in parts)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_cpu_runs_what_it_can(tmp_path: Path) -> None:
    """The whole command: every measurement of a GPU's, through the same code, at sizes of seconds."""
    # On a machine with a GPU it is installed; Megatron-Core would call its kernels for a CPU's tensors.
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine/__init__.py").write_text("raise RuntimeError('imported')")
    ranks = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, TOOL, "--device", "cpu", "--output", tmp_path]
    done = subprocess.run(command, env=ranks, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    rows = {(row["check"], row["case"]): row for row in found["rows"]}
    states = {check: {row["state"] for (name, _), row in rows.items() if name == check} for check, _ in rows}
    assert states == {
        "tests": {"skipped"}, "parity": {"passed"}, "layers": {"skipped"}, "loss": {"passed"},
        "throughput": {"measured"}, "memory": {"passed"},
    }  # fmt: skip
    assert all(row["note"] for row in rows.values() if row["state"] == "skipped")
    assert len([row for row in rows if row[0] == "parity"]) == 12
    assert {case for check, case in rows if check == "memory"} == {
        f"{kind} layer, float32: {part}" for kind in ("dense", "MoE") for part in ("weights", "gradients", "optimizer", "activations")
    }
    # A pass does some of what products reach, and no more than they do.
    assert all(0.02 < row["value"] < 1.2 for (_, case), row in rows.items() if case.endswith("of products"))
    assert found["machine"]["device"].startswith("CPU") and "torch" in found["machine"]
    table = (tmp_path / "gpu_check.md").read_text()
    assert table.startswith(found["machine"]["date"])
    assert all(f"| {case} |" in table for _, case in rows)
    assert table.strip() in done.stdout
