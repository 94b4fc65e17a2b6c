from pathlib import Path

import pytest

from r1mega import cli


def test_explain_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "grpo.objective.clip"]) == 0
    assert capsys.readouterr().out.startswith("grpo.objective.clip: number > 0; default 10.0")


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in [
        (["explain", "grpo.clop"], "r1mega: no key 'grpo.clop'"),
        (["run", str(tmp_path / "none.yaml")], "cannot be read"),
        (["check", str(tmp_path)], "is a folder"),
        (["eval", str(tmp_path), "--suite", "aime"], "no suite 'aime'"),
        (["eval", str(tmp_path), "--suite", "running_sum"], "has no config.json"),
        (["eval", str(tmp_path), "--suite", "running_sum", "--samples", "0"], "--samples 0: expected at least 1"),
    ]:
        assert cli.main(arguments) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1


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
