"""LiveCodeBench and Codeforces rows: prompts, tests, dates, and rows that are not as published."""

import base64
import json
import os
import pickle
import zlib
from datetime import date
from pathlib import Path

import pytest

from r1mega.data.benchmarks import codeforces, livecodebench
from r1mega.data.code_tests import CodeTest, inflate, pack, unpack
from r1mega.data.rows import jsonl
from r1mega.errors import UserError

BENCHMARKS = Path(__file__).parent / "benchmarks"
LCB = [row for _, row in jsonl(BENCHMARKS / "livecodebench.jsonl")]
CF = [row for _, row in jsonl(BENCHMARKS / "codeforces.jsonl")]


def packed(value, protocol: int) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value, protocol))).decode()


# ---------------------------------------------------------------- tests


def test_tests_survive_packing():
    tests = [CodeTest("1\n", "2"), CodeTest("", "\u2713\n" * 1000)]
    assert unpack(pack(tests)) == tests
    assert len(pack(tests)) < 300


@pytest.mark.parametrize("text", ["", "?", "AAAA", pack([CodeTest("1", "2")])[:-8]])
def test_what_is_not_packed_is_a_value_error(text):
    with pytest.raises(ValueError):
        unpack(text)


def test_a_small_file_does_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr("r1mega.data.code_tests._LARGEST", 1 << 20)
    assert len(inflate(base64.b64encode(zlib.compress(b"0" * (1 << 20))).decode())) == 1 << 20
    with pytest.raises(ValueError, match="more than 1048576 bytes"):
        inflate(base64.b64encode(zlib.compress(b"0" * ((1 << 20) + 1))).decode())


# ---------------------------------------------------------------- LiveCodeBench


def test_livecodebench_prompts_are_the_published_ones():
    stdin, function = (livecodebench.prompt_of(row, "here:1") for row in LCB)
    start = (
        "You are an expert Python programmer. You will be given a question (problem specification) and will generate a correct Python "
        "program that matches the specification and passes all tests.\n\n### Question:\n"
    )
    assert stdin.text == start + LCB[0]["question_content"] + (
        "\n\n### Format: Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on the sample "
        "inputs). Enclose your code within delimiters as follows. Ensure that when the python program runs, it reads the inputs, runs the "
        "algorithm and writes output to STDOUT.\n```python\n# YOUR CODE HERE\n```\n\n### Answer: (use the provided format with backticks)\n"
        "\n"
    )
    assert function.text == start + LCB[1]["question_content"] + (
        "\n\n### Format: You will use the following starter code to write the solution to the problem and enclose your code within "
        f"delimiters.\n```python\n{LCB[1]['starter_code']}\n```\n\n### Answer: (use the provided format with backticks)\n\n"
    )
    assert stdin.id == "livecodebench/self_made_a" and stdin.answer is None and stdin.history == ()
    assert (stdin.meta["function"], function.meta["function"]) == (None, "pairApart")
    assert stdin.meta["contest_date"] == "2024-08-24" and stdin.meta["time_limit_s"] == 6.0
    assert json.loads(json.dumps(stdin.meta)) == stdin.meta


@pytest.mark.parametrize("protocol", range(5))
def test_private_tests_may_be_pickled_strings(protocol):
    """The light data set's encoding; the tests are those of the plain one, public ones first."""
    plain = unpack(livecodebench.prompt_of(LCB[0], "here:1").meta["tests"])
    row = LCB[0] | {"private_test_cases": packed(LCB[0]["private_test_cases"], protocol)}
    assert unpack(livecodebench.prompt_of(row, "here:1").meta["tests"]) == plain
    assert [test.output for test in plain] == ["5", "0\n", "-2\n"]


class Call:
    def __reduce__(self):
        return os.system, ("touch /tmp/r1mega-was-run",)


@pytest.mark.parametrize("value", [Call(), ["[]"], b"[]", 1, None, ("[]", "[]"), [Call()], {"a": "[]"}])
def test_a_pickle_of_anything_else_is_not_loaded(value):
    for protocol in range(5):
        row = LCB[0] | {"private_test_cases": packed(value, protocol)}
        with pytest.raises(UserError, match=r"^here:1: field 'private_test_cases': .*pickle of"):
            livecodebench.prompt_of(row, "here:1")
    assert not Path("/tmp/r1mega-was-run").exists()


def test_a_pickle_that_is_cut_short_is_not_loaded():
    for data in (pickle.dumps("[]")[:-3], b"", b"\x80\x04", b"garbage", pickle.dumps("[]").replace(b"\x8c\x02", b"\x8c\xff")):
        with pytest.raises(UserError, match=r"^here:1: field 'private_test_cases': "):
            livecodebench.prompt_of(LCB[0] | {"private_test_cases": base64.b64encode(zlib.compress(data)).decode()}, "here:1")


def test_the_window_of_contests():
    assert [livecodebench.in_window(row, "here") for row in LCB] == [True, False]
    assert livecodebench.in_window(LCB[1], "here", date(2025, 2, 1), date(2025, 2, 1))
    for day, inside in (("2024-07-31", False), ("2024-08-01", True), ("2025-01-31T23:00:00", True), ("2025-02-01T00:00:00", False)):
        assert livecodebench.in_window({"contest_date": day}, "here") is inside
    with pytest.raises(UserError, match=r"here:3: field 'contest_date': expected a date"):
        livecodebench.in_window({"contest_date": "soon"}, "here:3")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({name: None}, f"no field '{name}'") for name in ("question_content", "question_id", "contest_date", "platform", "difficulty")),
        ({"public_test_cases": None}, "no field 'public_test_cases'"),
        ({"private_test_cases": None}, "no field 'private_test_cases'"),
        ({"metadata": None}, "no field 'metadata'"),
        ({"metadata": "[]"}, "field 'metadata': expected a JSON dict"),
        ({"starter_code": "def f():"}, "field 'metadata': starter code without 'func_name'"),
        ({"public_test_cases": "[", "private_test_cases": "[]"}, "field 'public_test_cases': "),
        ({"public_test_cases": "[]", "private_test_cases": "[]"}, "no tests"),
        ({"public_test_cases": '[{"input": 1, "output": ""}]'}, "field 'public_test_cases': test 1: expected 'input' and 'output'"),
        ({"private_test_cases": "not base64"}, "field 'private_test_cases': not base64 of zlib"),
    ],
)
def test_livecodebench_rows_that_are_not_as_published(change, message):
    with pytest.raises(UserError) as error:
        livecodebench.prompt_of(LCB[0] | change, "tests.jsonl:7")
    assert str(error.value).startswith("tests.jsonl:7: ") and message in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------- Codeforces


def test_codeforces_prompts():
    composed, checked, given = (codeforces.prompt_of(row, "here:1") for row in CF)
    assert composed.text.startswith("You are a coding expert. Given a competition-level coding problem, you need to write a C++ program")
    for part in (
        "# Fair Slices\n\nA cake",
        "Time limit per test: 1 seconds",
        "## Input Format\nTwo",
        "```input\n10 4\n```\n```output\n2.5\n```",
    ):
        assert part in composed.text
    assert "## Note\nIn the example" in checked.text and "## Note" not in composed.text
    assert given.text == CF[2]["prompt"] and given.id == "codeforces/9001/C/python"
    assert unpack(composed.meta["tests"]) == [CodeTest("10 4\n", "2.5\n"), CodeTest("1 3\n", "0.333333333\n")]
    assert (composed.meta["contest"], composed.meta["index"], composed.meta["rating"]) == ("9001", "A", 800)
    assert composed.meta["checker"] is None and "sys.argv[3]" in checked.meta["checker"]
    assert json.loads(json.dumps(checked.meta)) == checked.meta


def test_examples_are_the_tests_of_a_row_without_official_ones():
    assert unpack(codeforces.prompt_of(CF[2], "here").meta["tests"]) == [CodeTest("4\n", "YES\n")]
    assert codeforces.prompt_of(CF[2], "here").meta["all_tests"] is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({name: None}, f"no field '{name}'") for name in ("id", "contest_id", "index", "title")),
        *(({name: None}, f"the data set has no {name} of the problem") for name in ("description", "time_limit", "memory_limit")),
        ({"time_limit": 0}, "field 'time_limit': expected a number above 0"),
        ({"official_tests": [{"input": "1"}]}, "field 'official_tests': test 1: expected 'input' and 'output'"),
        ({"official_tests": None, "examples": None}, "the data set has no tests"),
        ({"interaction_format": "Ask me."}, "the problem is interactive"),
        ({"input_mode": "file"}, "programs read and write files"),
    ],
)
def test_codeforces_rows_that_are_not_as_published(change, message):
    with pytest.raises(UserError) as error:
        codeforces.prompt_of(CF[0] | change, "tests.jsonl:7")
    assert str(error.value).startswith("tests.jsonl:7: ") and message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["id", "contest_id", "index", "title", "description", "time_limit", "memory_limit"])
def test_a_column_that_is_not_there_is_named(name):
    row = {key: value for key, value in CF[0].items() if key != name}
    assert codeforces.unjudgeable(row) is None
    with pytest.raises(UserError, match=f"^tests.jsonl:7: no field '{name}'; the row has "):
        codeforces.prompt_of(row, "tests.jsonl:7")


def test_rows_that_can_be_judged():
    assert [codeforces.unjudgeable(row) for row in CF] == [None] * 3
