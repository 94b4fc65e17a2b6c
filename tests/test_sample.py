import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from r1mega import cli
from r1mega.report.response import Parts, parts
from r1mega.sample import Reply, show

ROOT = Path(__file__).parent.parent
BASE = str(ROOT / "configs/tiny/base")
QUESTION = "en 3 + 1 + 4 + 1 + 5 + 9 :"


@pytest.mark.parametrize(
    ("response", "thought", "answer"),
    [
        ("<think> a </think> <answer> 3 </answer>", "a", "3"),
        ("a </think> so it is 3", "a", "so it is 3"),
        ("<think> never closed", "never closed", ""),
        ("just 3", None, "just 3"),
        ("<think></think>3", "", "3"),
    ],
)
def test_parts_of_a_response(response: str, thought: str | None, answer: str) -> None:
    assert parts(response) == Parts(thought, answer)


def test_a_question_is_answered_and_a_seed_draws_it_again(capsys: pytest.CaptureFixture[str]) -> None:
    drawn = []
    for seed in ("7", "7", "8", "9", "10"):
        assert cli.main(["sample", BASE, QUESTION, "--seed", seed, "--temperature", "1", "--max-new-tokens", "40"]) == 0
        drawn.append(capsys.readouterr().out)
    assert drawn[0] == drawn[1] and len(set(drawn)) > 1
    assert all(out.splitlines()[-1].endswith((" tokens", ", cut off there")) for out in drawn)


def test_lines_are_answered_until_the_input_ends(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The second cannot be asked, and does not end the conversation; the last is the first again, and drawn anew."""
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\nwords it never saw\n\n{QUESTION}"))
    assert cli.main(["sample", BASE, "--max-new-tokens", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "tokens" in line and not line.startswith("r1mega")] == ["1 tokens, cut off there"] * 2
    assert [line for line in lines if line.startswith("r1mega: prompt 2 holds text that the tokenizer does not know")]


def test_what_cannot_be_asked_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copytree(BASE, tmp_path / "bare", ignore=shutil.ignore_patterns("chat_template.jinja"))
    for arguments, message in [
        ([str(tmp_path / "empty"), "1"], "has no config.json"),
        ([str(tmp_path / "bare"), "1", "--template", "chat"], "has no chat template; use --template r1_zero or --template none"),
        ([BASE, "never seen"], "the tokenizer does not know"),
        ([BASE, "1 " * 600, "--template", "none"], "has 601 tokens, more than the 511"),
        ([BASE, "1", "--max-new-tokens", "512"], "no room for prompts in the context of 512 tokens"),
        ([BASE, "1", "--top-p", "0"], "--top-p above 0"),
        ([BASE, "1", "--temperature", "nan"], "--temperature must be at least 0"),
        ([BASE, "1", "--max-new-tokens", "0"], "must be at least 1"),
    ]:
        assert cli.main(["sample", *arguments]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1


def test_thought_is_dim_and_answer_bright_and_no_response_commands_the_terminal() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="standard", width=60)
    show(console, Reply(Parts("hm \x1b[2J wait", "3"), 9, cut=True))
    text = out.getvalue()
    assert "\x1b[2mhm \ufffd[2J wait\x1b[0m" in text and "\x1b[1m3\x1b[0m" in text and "9 tokens, cut off there" in text
    assert "\x1b[2J" not in text
