"""Shipped benchmarks by name: in a recipe, and on the command line."""

import json
from pathlib import Path
from typing import Any

import pytest

from r1mega import cli
from r1mega.config import suites
from r1mega.config.loading import dump_resolved, load_recipe, load_resolved, load_suite
from r1mega.config.stages import Evaluate
from r1mega.errors import UserError

PUBLISHED = {"aime_2024": 64, "math_500": 16, "gpqa_diamond": 64, "livecodebench": 8, "codeforces": 16, "ifeval": 1}

ROW = {"id": 1, "problem": "1 + 1?", "answer": "2"}


@pytest.fixture
def recipe_file(tmp_path: Path, byte_model: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"name: test\nstages:\n  table:\n    kind: evaluate\n    models: {{one: {byte_model}}}\n"
        "    suites:\n"
        "      aime: {suite: aime_2024, data: rows.jsonl, k: 4, sampling: {max_new_tokens: 16}}\n"
        "      sums: {suite: running_sum}\n"
    )
    return path


def stage_of(path: Path, *overrides: str) -> Evaluate:
    stage = load_recipe(path, overrides).stages["table"]
    assert isinstance(stage, Evaluate)
    return stage


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_are_the_published_ones(name: str) -> None:
    suite = load_suite(name, Path("rows.jsonl"))
    assert (suite.k, suite.prompts.split, suite.prompts.template, suite.prompts.limit) == (PUBLISHED[name], "all", "chat", None)
    sampling = suite.sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_new_tokens) == (0.6, 0.95, 32768)
    assert suite.prompts.source.model_dump()["path"] == str(Path("rows.jsonl").absolute())


def test_a_recipe_names_a_shipped_benchmark(recipe_file: Path) -> None:
    stage = stage_of(recipe_file)
    shipped = load_suite("aime_2024", recipe_file.parent / "rows.jsonl")
    changed = shipped.model_copy(update={"k": 4, "sampling": shipped.sampling.model_copy(update={"max_new_tokens": 16.0})})
    assert stage.suites == {"aime": changed, "sums": load_suite("running_sum")}
    assert stage.suites["aime"].sampling.temperature == 0.6


def test_what_was_resolved_stands_alone(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file)
    (tmp_path / "resolved.yaml").write_text(dump_resolved(recipe))
    assert load_resolved(tmp_path / "resolved.yaml") == recipe
    assert "suite:" not in (tmp_path / "resolved.yaml").read_text()


def test_overrides_reach_into_a_named_benchmark(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "other.jsonl").write_text(json.dumps(ROW) + "\n")
    monkeypatch.chdir(tmp_path / "here")
    suite = stage_of(recipe_file, "stages.table.suites.aime.data=other.jsonl", "stages.table.suites.aime.prompts.limit=1").suites["aime"]
    assert suite.prompts.source.model_dump()["path"] == str(tmp_path / "here" / "other.jsonl")
    assert (suite.prompts.limit, suite.prompts.split) == (1, "all")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{suite: aime, data: rows.jsonl}", r"'stages.table.suites.aime': no suite 'aime'; there are aime_2024, codeforces"),
        ("{data: rows.jsonl}", "'stages.table.suites.aime': has 'data' but no 'suite'; there are aime_2024"),
        ("{suite: aime_2024}", "suite 'aime_2024' needs data: FILE, the benchmark's rows; docs/benchmarks.md"),
        ("{suite: running_sum, data: rows.jsonl}", "suite 'running_sum' makes its own prompts; leave out data: FILE"),
        ("{suite: aime_2024, data: [rows.jsonl]}", "'data' is the path of the benchmark's rows; got"),
        ("{suite: aime_2024, data: gone.jsonl}", "'stages.table.suites.aime.prompts.source.path': no file or folder .*gone.jsonl"),
        ("{suite: aime_2024, data: rows.jsonl, K: 3}", "unknown key 'stages.table.suites.aime.K'; the nearest known key is"),
    ],
)
def test_a_wrong_entry_is_one_line(recipe_file: Path, entry: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        stage_of(recipe_file, f"stages.table.suites.aime={entry}")
    assert "\n" not in str(error.value)


def test_check_reads_the_rows_and_the_functions(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only = "stages.table.suites={aime: {suite: aime_2024, data: ROWS, k: 4, sampling: {max_new_tokens: 16}"
    only = only.replace("ROWS", str(recipe_file.parent / "rows.jsonl"))
    assert cli.main(["check", str(recipe_file), only + "}}"]) == 0
    assert "math:same" in capsys.readouterr().out
    for more, message in [
        ("equal: 'r1mega.rewards.exact:answer_of'", "'stages.table.suites.aime.equal': 'r1mega.rewards.exact:answer_of' is called with "
         "(answer, other_answer) but is defined as answer_of(response: str)"),
        ("rating: {contests: /gone, humans: /gone}", "'stages.table.suites.aime.rating.contests': no file /gone"),
    ]:  # fmt: skip
        assert cli.main(["check", str(recipe_file), f"{only}, {more}}}}}"]) == 2
        assert message in capsys.readouterr().err
    (recipe_file.parent / "rows.jsonl").write_text('{"id": 1, "problem": "1 + 1?"}\n')
    assert cli.main(["check", str(recipe_file), only + "}}"]) == 2
    assert "rows.jsonl:1: no field 'answer' or 'Answer'" in capsys.readouterr().err


def test_eval_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments: list[tuple[list[str], str]] = [
        (["--suite", "aime_2024"], "suite aime_2024 needs --data FILE, the benchmark's rows; docs/benchmarks.md"),
        (["--suite", "running_sum", "--data", "x"], "suite running_sum makes its own prompts; leave out --data FILE"),
        (["--suite", "aime_2024", "--data", "gone"], "'prompts.source.path': no file or folder "),
        (["--suite", "aime_2024", "--data", "gone", "k=0"], "override 'k=0': 'k': expected"),
        (["--suite", "aime_2024", "--data", "gone", "kk=0"], "unknown key 'kk'; the nearest known key is 'k'"),
    ]
    for given, message in arguments:
        assert cli.main(["eval", str(tmp_path), *given]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1


def test_rows_of_a_users_own_suite(tmp_path: Path) -> None:
    own: dict[str, Any] = {"prompts": {"source": {"kind": "jsonl", "path": "mine.jsonl"}}, "judge": "r1mega.rewards.math:accuracy"}
    (tmp_path / "own.yaml").write_text(json.dumps(own))
    assert load_suite(str(tmp_path / "own.yaml")).prompts.source.model_dump()["path"] == str(tmp_path / "mine.jsonl")
    assert load_suite(str(tmp_path / "own.yaml"), tmp_path / "x.jsonl").prompts.source.model_dump()["path"] == str(tmp_path / "x.jsonl")
    assert set(suites.names()) >= {*PUBLISHED, "running_sum"}
