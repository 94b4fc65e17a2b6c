"""`r1mega doctor` on this machine and on ones that lack something."""

import importlib.util
import subprocess
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from r1mega import cli
from r1mega.launch import doctor
from r1mega.launch.doctor import Finding, able, examine, lines

CONFIGS = Path(__file__).parent.parent / "configs"


def found(recipe: Path | None = None, *overrides: str) -> dict[str, Finding]:
    return {finding.name: finding for finding in examine(recipe, overrides, quick=True)}


def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    version = metadata.version

    def missing(name: str) -> str:
        if name in names:
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", missing)


def with_modules(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: ModuleSpec(name, None) if name in names else find(name))


def test_this_machine_can_run_the_tiny_recipe_and_no_other_platform(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", str(CONFIGS / "tiny/r1_zero.yaml"), "--quick"]) == 0
    shown = capsys.readouterr().out
    assert "recipe" in shown and "tiny-r1-zero can run on 2 ranks (cpu)" in shown
    assert cli.main(["doctor", str(CONFIGS / "tiny/r1_zero.yaml"), "--quick", "run.platform=cuda"]) == 1
    shown = capsys.readouterr().out
    assert "CUDA                MISSING" in shown and "Transformer Engine  MISSING" in shown


def test_what_is_missing_has_a_price_and_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "nemo-run", "megatron-core")
    all_found = found()
    assert all_found["NeMo-Run"].state == "missing" and "pip install 'r1mega[cluster]'" in all_found["NeMo-Run"].fix
    core = all_found["megatron-core"]
    assert core.state == "missing" and core.needed and core.fix.startswith("pip install 'megatron-core")
    assert not able(list(all_found.values()))
    text = "\n".join(lines(list(all_found.values())))
    assert "MISSING" in text and "no r1mega submit" in text


def test_versions_that_do_not_go_together_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.15.0" if name == "megatron-core" else version(name))
    assert found()["megatron-core"].state == "wrong" and "0.15.0; <0.20,>=0.16.1 is needed" in found()["megatron-core"].found


def test_the_apex_of_the_index_is_not_nvidias(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found()["Apex"].state == "missing"
    with_modules(monkeypatch, "apex")
    assert found()["Apex"].found == "a package `apex` that is not NVIDIA's"
    with_modules(monkeypatch, "apex", "amp_C", "fused_weight_gradient_mlp_cuda")
    assert found()["Apex"].state == "ok"


def test_a_recipe_that_cannot_run_is_an_error_with_its_reason(tmp_path: Path) -> None:
    broken = found(CONFIGS / "tiny/r1_zero.yaml", f"stages.zero.model={tmp_path}/nothing")
    assert broken["recipe"].state == "wrong" and "no folder" in broken["recipe"].found
    assert not able(list(broken.values()))


@pytest.mark.slow
def test_two_ranks_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    good = doctor._two_ranks("cpu")
    assert good.state in ("ok", "wrong") and good.found.startswith("all-reduce of 64 MB at ")
    bad: Any = subprocess.CompletedProcess([], 1, "", "RuntimeError: no route to host\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: bad)
    assert doctor._two_ranks("cpu") == Finding(
        *("two ranks", "wrong", "RuntimeError: no route to host", True, "no run of several ranks", "NCCL_DEBUG=INFO r1mega doctor")
    )
