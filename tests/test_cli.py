import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from r1mega import cli

ROOT = Path(__file__).parent.parent
V3 = ROOT / "configs/deepseek_v3"


def test_explain_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "grpo.objective.clip"]) == 0
    assert capsys.readouterr().out.startswith("grpo.objective.clip: number or schedule; default 10.0")


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in [
        (["explain", "grpo.clop"], "r1mega: no key 'grpo.clop'"),
        (["run", str(tmp_path / "none.yaml")], "cannot be read"),
        (["check", str(tmp_path)], "is a folder"),
        (["eval", str(tmp_path), "--suite", "aime"], "no suite 'aime'"),
        (["eval", str(tmp_path), "--suite", "running_sum"], "has no config.json"),
        (["eval", str(tmp_path), "--suite", "running_sum", "--samples", "0"], "--samples 0: expected at least 1"),
        (["audit", str(tmp_path)], "config.json is missing"),
        (["audit", str(V3), "--rank", "0"], "--rank needs --layout"),
        (["audit", str(V3), "--layout", str(tmp_path / "none.yaml")], "cannot be read"),
        (["audit", str(V3), "--layout", str(ROOT / "configs/layouts/verl_96.yaml"), "--rank", "96"], "has the ranks 0 to 95"),
        (["audit", str(ROOT / "configs/tiny/base"), "--layout", str(ROOT / "configs/layouts/verl_96.yaml")], "does not divide"),
        (["audit", str(V3), "--json", str(tmp_path / "none" / "v3.json")], "v3.json: cannot be written"),
    ]:
        assert cli.main(arguments) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1


def test_functions_of_a_suite_lie_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [*sys.path])
    (tmp_path / "judge_beside.py").write_text("def right(prompt, response):\n    return 1.0\n")
    suite = (ROOT / "r1mega/suites/running_sum.yaml").read_text()
    for judge, message in (
        ("judge_beside:wrong", "judge_beside has no function 'wrong'; it has right"),
        ("judge_beside:right", "no config.json"),
    ):
        (tmp_path / "suite.yaml").write_text(suite.replace("r1mega.rewards.exact:accuracy", judge))
        assert cli.main(["eval", str(tmp_path), "--suite", str(tmp_path / "suite.yaml")]) == 2
        assert message in capsys.readouterr().err


def test_audit_prints_the_released_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The published repository holds 91,991 tensors in 688,574,839,360 bytes."""
    assert cli.main(["audit", str(V3), "--json", str(tmp_path / "v3.json")]) == 0
    figures = {"stored tensors": 91_991, "stored bytes": 688_574_839_360, "tensors": 46_183, "values": 684_489_845_504}
    rows = [line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:]]
    assert {what.strip(): count for what, count in rows} == {what: f"{count:,}" for what, count in figures.items()}
    assert list(json.loads((tmp_path / "v3.json").read_text())["config"].values()) == [91_991, 46_183, 684_489_845_504, 688_574_839_360]


def test_audit_of_a_folder_exits_with_1_when_something_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["audit", str(ROOT / "configs/tiny/base")]) == 0
    assert capsys.readouterr().out.endswith("\nno findings\n")
    tensors = load_file(ROOT / "configs/tiny/base/model.safetensors")
    del tensors["model.norm.weight"]
    tensors["more"] = torch.ones(1)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((ROOT / "configs/tiny/base/config.json").read_bytes())
    assert cli.main(["audit", str(tmp_path), "--json", str(tmp_path / "audit.json")]) == 1
    assert capsys.readouterr().out.endswith("\n2 findings\n  missing: model.norm.weight\n  unexpected: more\n")
    assert json.loads((tmp_path / "audit.json").read_text())["findings"]["missing"] == ["model.norm.weight"]


def test_audit_of_a_layout_and_of_one_of_its_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["audit", str(V3), "--layout", str(ROOT / "configs/layouts/slime_128.yaml")]) == 0
    out = capsys.readouterr().out
    assert "128 ranks, tp 8, cp 4, pp 4, vpp 1, ep 32, etp 1, dp 1, edp 1; fits" in out
    assert [line.split()[:3] for line in out.splitlines()[3:]] == [["0-31", "32", "0"], ["32-95", "64", "1-2"], ["96-127", "32", "3"]]
    # Its own process: building a rank changes torch for the rest of one.
    command = [sys.executable, "-m", "r1mega.cli", "audit", str(V3), "--layout", str(ROOT / "configs/layouts/verl_96.yaml"), "--rank", "95"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert lines[0] == "rank 95: tp 7, cp 0, dp 0, pp 11; experts: etp 0, ep 7, edp 0"
    assert lines[2].split() == ["0", "embedding.word_embeddings.weight", "[16160,", "7168]"]
    assert lines[-1].endswith("builds them: names, shapes, layers, experts")


@pytest.mark.parametrize("arguments", [[], ["walk"], ["run"], ["eval", "x"], ["run", "r.yaml", "--what"]])
def test_a_wrong_command_line_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2
    assert "usage: r1mega" in capsys.readouterr().err


def test_overrides_may_stand_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    from r1mega.pipeline import launcher

    seen = []
    monkeypatch.setattr(launcher, "run", lambda *given: seen.append(given) or 0)
    assert cli.main(["run", "r.yaml", "a=1", "-o", "out", "b=2", "--fresh", "c=3"]) == 0
    assert seen == [(Path("r.yaml"), ["a=1", "b=2", "c=3"], Path("out"), True)]
