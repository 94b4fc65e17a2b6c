"""Votes of equivalent answers, weighted means, and what makes two scores comparable."""

import time
from pathlib import Path
from typing import Any

import pytest

from r1mega.config.evaluation import Suite
from r1mega.config.rollout import Reward
from r1mega.data.prompts import Message, Prompt
from r1mega.evaluation import versions
from r1mega.evaluation.metrics import estimate
from r1mega.evaluation.votes import Pair, merged
from r1mega.rewards import choice, math
from r1mega.rewards.judge import Judge


def test_answers_vote_with_the_most_frequent_of_their_equals() -> None:
    rounds: list[list[Pair]] = []

    def equal(pairs: list[Pair]) -> list[bool | None]:
        rounds.append(pairs)
        return [abs(eval(a) - eval(b)) < 1e-9 for a, b in pairs]

    found = merged([["1/2", "3", "0.5", "0.5", "3.0", "4"], ["7"], []], equal)
    assert found == [{"0.5": "0.5", "1/2": "0.5", "3": "3", "3.0": "3", "4": "4"}, {"7": "7"}, {}]
    assert rounds == [[("0.5", "1/2"), ("0.5", "3"), ("0.5", "3.0"), ("0.5", "4")], [("3", "3.0"), ("3", "4")]]


def test_an_answer_that_cannot_be_compared_votes_alone_and_costs_one_failure() -> None:
    asked: list[Pair] = []

    def equal(pairs: list[Pair]) -> list[bool | None]:
        asked.extend(pairs)
        return [None if "hangs" in pair[1] else pair[0] == "a" and pair[1] == "A" for pair in pairs]

    hanging = [f"hangs {i}" for i in range(10)]
    (found,) = merged([["a", "a", *hanging, "A", "b"]], equal)
    assert found == {"a": "a", "A": "a", "b": "b", **{answer: answer for answer in hanging}}
    assert len(asked) == 12


def test_answers_are_compared_in_processes_that_are_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "slow_equal.py").write_text(
        "import time\ndef equal(a, b):\n    if 'hangs' in b:\n        time.sleep(60)\n    return a.lower() == b.lower()\n"
    )
    with Judge({"equal": Reward(function="slow_equal:equal", deadline_s=0.5)}, workers=1) as judge:
        begin = time.monotonic()
        (found,) = merged(
            [["x", "x", "hangs", "X", "y"]], lambda pairs: [verdict["equal"].value and True for verdict in judge.judge(pairs)]
        )
    assert found["hangs"] == "hangs" and found["X"] == "x" and time.monotonic() - begin < 30


SPELLINGS = [
    ("0.5", r"\frac{1}{2}", True),
    ("1/2", "50\\%", True),
    ("x=5", "5", True),
    ("5", "x=5", True),
    ("1,000", "1000", True),
    (r"\{1,2\}", r"\{2,1\}", True),
    ("(1,2)", "(2,1)", False),
    ("yes", "no", False),
    ("1/3", "0.33", False),
    (r"\sqrt{8}", r"2\sqrt{2}", True),
    (r"50\%", "50", True),
    (r"\frac{1}{3}", "0.333333333", True),
    ("10^{400}", "10^{401}", False),
    ("?!", "??", False),
    ("((((((((((((((1))))))))))))))", "1", False),
]


@pytest.mark.parametrize(("one", "other", "expected"), SPELLINGS)
def test_equivalent_answers_are_one_vote(one: str, other: str, expected: bool) -> None:
    assert math.same(one, other) is expected
    assert math.same(other, one) is expected


def test_different_numbers_are_told_apart_quickly() -> None:
    answers = [rf"\frac{{{i}\sqrt{{{i + 2}}}}}{{7}}" for i in range(2, 34)]
    begin = time.process_time()
    assert not any(math.same(one, other) for place, one in enumerate(answers) for other in answers[:place])
    assert time.process_time() - begin < 10  # 496 pairs; math-verify alone takes twenty milliseconds a pair and more


def test_mathematical_answers_have_one_spelling() -> None:
    for answer, expected in [("025", "25"), ("$-3$.", "-3"), (r"1{,}000", "1000"), (r"\frac{1}{2}", r"\frac{1}{2}"), ("9" * 1_001, None)]:
        assert math.answer_of(rf"so \boxed{{{answer}}}") == expected
    assert math.answer_of("nothing") is None


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("Answer: B", "B"),
        ("so\n**Answer: C**\n", "C"),
        ("Answer: $D$.", "D"),
        ("Answer: A) 10 pm", "A"),
        (r"Answer: \boxed{B}", "B"),
        (r"\boxed{A}", "A"),
        ("Answer: A\n\nWait. Answer: B", "B"),
        ("<think>Answer: A</think>Answer: c", "C"),
        ("Answer: A</think>\nnothing", None),
        ("Answer: A bird", None),
        ("Answer: A, B", None),
        ("Answer: A\nAnswer: none", None),
        ("<answer>A</answer>", "A"),
        ("Answer: A <answer>B</answer>", "B"),
        ("answer: " * 100_000 + "B", None),
    ],
)
def test_the_letter_of_a_last_line(response: str, letter: str | None) -> None:
    assert choice.answer_of(response) == letter


def test_weighted_means() -> None:
    assert estimate([0.0, 1.0], weights=[1.0, 3.0])["value"] == 0.75
    weighted, plain = estimate([0.2, 0.4, 0.9], 3, [2.0, 2.0, 2.0]), estimate([0.2, 0.4, 0.9], 3)
    assert [weighted["value"], *weighted["ci95"]] == pytest.approx([plain["value"], *plain["ci95"]], abs=1e-12)
    low, high = estimate([1.0] * 50 + [0.0] * 50, weights=[3.0] * 50 + [1.0] * 50)["ci95"]
    assert low < 0.75 < high and high - low < 0.25


# ---------------------------------------------------------------- versions

SUITE: dict[str, Any] = {
    "prompts": {"source": {"kind": "jsonl", "path": "a.jsonl"}},
    **{"judge": "graded_here:right", "extract": "r1mega.rewards.math:answer_of", "k": 4},
}
PROMPTS = [Prompt("p", "1 + 1?", "2", history=(Message("system", "s"),))]


@pytest.fixture
def graded_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "graded_here.py").write_text("import json\nfrom beside_it import same\n\ndef right(p, r):\n    return same(p, r)\n")
    (tmp_path / "beside_it.py").write_text("import numpy\nfrom . import nothing\n\ndef same(a, b):\n    return 1.0\n")
    return tmp_path


def changed(suite: dict[str, Any] | None = None, prompts: list[Prompt] | None = None) -> dict[str, str]:
    return versions.version(Suite.model_validate(SUITE | (suite or {})), prompts or PROMPTS)


def test_versions_are_plain_strings_and_name_libraries(graded_here: Path) -> None:
    import numpy

    found = changed()
    assert found.keys() == {"prompts", "template", "sampling", "truncated", "judge", "extract", "math-verify", "numpy"}
    assert all(isinstance(value, str) for value in found.values())
    assert (found["template"], found["sampling"], found["numpy"]) == (
        "none",
        "temperature 1, top_p 1, max_new_tokens 1024",
        numpy.__version__,
    )
    assert found["judge"].startswith("graded_here:right ")


@pytest.mark.parametrize("file", ["graded_here.py", "beside_it.py"])
def test_another_source_is_another_version(graded_here: Path, file: str) -> None:
    before = changed()
    (graded_here / file).write_text((graded_here / file).read_text() + "\nMORE = 1\n")
    after = changed()
    assert {key for key in before if before[key] != after[key]} == {"judge"}


def test_an_import_of_an_extractor_is_part_of_it(graded_here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = changed()
    monkeypatch.setattr(Path, "read_text", _with_a_line("answer.py", Path.read_text))
    after = changed()
    assert {key for key in before if before[key] != after[key]} == {"extract"}


def _with_a_line(name: str, read: Any) -> Any:
    return lambda path, *args, **kwargs: read(path, *args, **kwargs) + ("\n# more\n" if path.name == name else "")


def test_what_is_asked_and_how_is_part_of_the_version(graded_here: Path) -> None:
    before = changed()
    for key, suite, prompts in [
        ("prompts", None, [Prompt("p", "1 + 1?", "3", history=PROMPTS[0].history)]),
        ("prompts", None, [Prompt("p", "1 + 1?", "2")]),
        ("template", {"prompts": SUITE["prompts"] | {"template": "r1_zero"}}, None),
        ("sampling", {"sampling": {"top_p": 0.95}}, None),
        ("extract", {"extract": "r1mega.rewards.exact:answer_of"}, None),
    ]:
        after = changed(suite, prompts)
        assert key in {name for name in before if before[name] != after.get(name)}
    # Where the file lies, and how many samples are drawn, is not.
    assert changed({"k": 64, "deadline_s": 1.0, "prompts": {"source": {"kind": "jsonl", "path": "b.jsonl"}}}) == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"extract": None, "equal": "r1mega.rewards.math:same"}, "equal compares the answers that extract finds"),
        ({"weights": {"length": "a:b"}}, r"weights: 'length' is none of the measures \(there are none\)"),
        ({"rating": {"contests": "c", "humans": "h", "attempts": 3}}, "rating.attempts=3 does not divide k=4"),
    ],
)
def test_suites_that_cannot_work(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Suite.model_validate(SUITE | more)
