"""`r1mega eval` on published benchmarks: what is asked, how often, and what is made of the answers."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SANDBOXED = shutil.which("bwrap") is not None

GPQA = {
    "Question": "Which gas?",
    "Correct Answer": "He",
    "Incorrect Answer 1": "Ne",
    "Incorrect Answer 2": "Ar",
    "Incorrect Answer 3": "Xe",
}
COMMA = "punctuation:no_comma"
IFEVAL = [
    {"key": 1, "prompt": "First.", "instruction_id_list": [COMMA], "kwargs": [{}]},
    {
        **{"key": 2, "prompt": "Second.", "kwargs": [{}, {}, {}]},
        "instruction_id_list": [COMMA, "startend:quotation", "detectable_format:title"],
    },
]


def aime(number: int, answer: str) -> dict[str, Any]:
    return {"id": number, "problem": f"Problem {number}?", "solution": "s", "answer": answer, "url": "u", "year": "2024"}


def boxed(*answers: str) -> list[str]:
    return [rf"<think>or \boxed{{7}}</think>It is $\boxed{{{answer}}}$." for answer in answers]


# 26 in four spellings outvotes the right answer's one; of the second problem nothing is answered 63 times.
AIME_SAID = {
    "Problem 1?": [*boxed("25") * 30, *boxed("26", "26.0", r"\frac{52}{2}", "$26$") * 8, "no", "<think>\\boxed{25}"],
    "Problem 2?": [*boxed("204"), *["?"] * 63],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, byte_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    opens = folder / "opens"
    opens.mkdir()
    for file in byte_model.iterdir():
        (opens / file.name).symlink_to(file)
    (opens / "chat_template.jinja").unlink()
    (opens / "chat_template.jinja").write_text((byte_model / "chat_template.jinja").read_text() + "<think>\n")
    for name, rows in {"aime": [aime(1, "025"), aime(2, "204")], "one": [aime(1, "25")], "gpqa": [GPQA], "ifeval": IFEVAL}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def programs(folder: Path) -> dict[str, Any]:
    """What is said to rows of LiveCodeBench and Codeforces, and further arguments."""

    def python(*programs: str) -> list[str]:
        return [f"<think>hm</think>\n```python\n{program}\n```" for program in programs]

    people = [{"rating": rating, "points": points, "penalty": 0} for rating, points in ((1200, 0), (1500, 500), (1800, 1500), (2100, 3000))]
    problems = [{"index": "A", "points": 500}, {"index": "B", "points": 1000}, {"index": "C", "points": 1500}]
    (folder / "contests.json").write_text(json.dumps([{"contest_id": "9001", "problems": problems, "participants": people}]))
    (folder / "humans.json").write_text(json.dumps({"1000": 8, "2000": 2}))
    right = "n, k = map(int, input().split())\nprint(sum(x for x in map(int, input().split()) if x > k))"
    ratings = [f"rating.contests={folder / 'contests.json'}", f"rating.humans={folder / 'humans.json'}"]
    cake = python("w, n = map(int, input().split())\nprint(w / n)")
    return {
        "livecodebench": ({"A gauge": python(right, "print(7)", "while 1: pass", right)}, "k=4"),
        "codeforces": (
            {"A cake": cake, "sum of two": python("print(int(input()) - 1, 1)"), "n even": python("print('NO')")},
            *ratings,
            "k=2",
        ),
    }


@pytest.fixture(scope="module")
def results(folder: Path, byte_model: Path) -> dict[str, dict[str, Any]]:
    """All evaluations in one process with an engine that says what it is told."""

    def job(said: dict[str, list[str]], model: Path, suite: str, data: str, *more: str) -> dict[str, Any]:
        return {"said": said, "arguments": [str(model), "--suite", suite, "--data", str(folder / data), *more]}

    opened = {"Problem 1?": [r"so \boxed{25}, but", r"so \boxed{1}</think>\boxed{25}"]}
    jobs = {
        "aime": job(AIME_SAID, byte_model, "aime_2024", "aime.jsonl", "--responses", str(folder / "all.jsonl.gz")),
        "gpqa": job(
            {"Which gas?": ["Answer: A", "**Answer: B**", r"$\boxed{C}$", "Answer: $D$"]}, byte_model, "gpqa_diamond", "gpqa.jsonl"
        ),
        "opened": job(opened, folder / "opens", "aime_2024", "one.jsonl", "--samples", "2"),
        "ifeval": job({"First.": ["a, b"], "Second.": ['Sure, so:\n"<<a>> b"']}, byte_model, "ifeval", "ifeval.jsonl"),
    }
    if SANDBOXED:
        jobs |= {name: job(said, byte_model, name, str(HERE / f"{name}.jsonl"), *more) for name, (said, *more) in programs(folder).items()}
    (folder / "jobs.json").write_text(json.dumps(list(jobs.values())))
    script = [str(HERE / "scripted_eval.py"), str(folder / "jobs.json"), str(folder / "results.json")]
    execute(script)
    return dict(zip(jobs, json.loads((folder / "results.json").read_text()), strict=True))


def execute(arguments: list[str]) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr


def test_aime_as_published(results: dict[str, Any], folder: Path) -> None:
    metrics, asked = results["aime"]["metrics"], results["aime"]["asked"]
    assert len(asked) == 128 and {tuple(settings) for _, *settings in asked} == {(32768, 0.6, 0.95)}
    expected = "<|user|>Problem {}?\nPlease reason step by step, and put your final answer within \\boxed{{}}.<|assistant|>"
    assert [asked[0][0], asked[-1][0]] == [expected.format(1), expected.format(2)]
    assert metrics["pass@1"]["value"] == pytest.approx((30 / 64 + 1 / 64) / 2)
    assert metrics["cons@64"]["value"] == 0.5  # the first is lost to 26, the second won by its only vote
    assert (metrics["pass@64"]["value"], metrics["not_compared"], metrics["k"], metrics["n_prompts"]) == (1.0, 0.0, 64, 2)
    assert metrics["suite"].keys() == {"prompts", "template", "sampling", "truncated", "judge", "extract", "equal", "math-verify"}
    with gzip.open(folder / "all.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == 128 and rows[0]["response"] == AIME_SAID["Problem 1?"][0]
    assert [rows[0][key] for key in ("prompt_id", "answer", "extracted", "correct")] == ["aime_2024/1", "025", "25", True]
    assert (rows[62]["extracted"], rows[62]["correct"]) == (None, False)


def test_gpqa_as_published(results: dict[str, Any]) -> None:
    metrics, asked = results["gpqa"]["metrics"], results["gpqa"]["asked"]
    assert len(asked) == 64 and asked[0][0].startswith("<|user|>Answer the following multiple choice question.")
    assert (metrics["pass@1"]["value"], metrics["cons@64"]["value"]) == (0.25, 0.25)


def test_a_thought_that_the_template_opens_holds_no_answer(results: dict[str, Any]) -> None:
    metrics, asked = results["opened"]["metrics"], results["opened"]["asked"]
    assert asked[0][0].endswith("<|assistant|><think>")
    assert (metrics["pass@1"]["value"], metrics["cons@2"]["value"]) == (0.5, 1.0)


def test_ifeval_by_prompt_and_by_instruction(results: dict[str, Any]) -> None:
    metrics, asked = results["ifeval"]["metrics"], results["ifeval"]["asked"]
    assert [text for text, *_ in asked] == ["<|user|>First.<|assistant|>", "<|user|>Second.<|assistant|>"]
    values = {name: metrics[name]["value"] for name in ("pass@1", "prompt_loose", "instruction_strict", "instruction_loose")}
    # Of four instructions one is followed, and three by the second response without its first line.
    assert values == {"pass@1": 0.0, "prompt_loose": 0.5, "instruction_strict": 0.25, "instruction_loose": 0.75}
    assert not any(name.startswith("cons@") for name in metrics)


@pytest.mark.skipif(not SANDBOXED, reason="needs bubblewrap")
def test_programs_are_run_and_rated(results: dict[str, Any]) -> None:
    metrics, asked = results["livecodebench"]["metrics"], results["livecodebench"]["asked"]
    assert len(asked) == 4  # the second row's contest is after the window
    assert (metrics["pass@1"]["value"], metrics["pass@4"]["value"], metrics["not_judged"]) == (0.5, 1.0, 0.0)
    metrics = results["codeforces"]["metrics"]
    assert (metrics["pass@1"]["value"], metrics["n_prompts"], "cons@2" in metrics) == (pytest.approx(2 / 3), 3, False)
    # 1,500 points are as good as the second of four, who had 1800.
    assert 1500 < metrics["rating"]["value"] < 2100 and metrics["percentile"]["value"] == 80.0
    assert metrics["problems_asked"] == 1.0


def test_a_tiny_model_really_answers(byte_model: Path, tmp_path: Path) -> None:
    rows = [
        {"problem": f"What is {i} / 2?", "solution": "", "answer": rf"\frac{{{i}}}{{2}}", "subject": "a", "level": 1, "unique_id": f"{i}"}
        for i in (1, 3)
    ]
    (tmp_path / "math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        "eval",
        str(byte_model),
        "--suite",
        "math_500",
        "--data",
        str(tmp_path / "math.jsonl"),
        "--json",
        str(tmp_path / "m.json"),
        "--judges",
        "2",
    ]
    execute(["-m", "r1mega.cli", *arguments, "k=2", "sampling.max_new_tokens=6"])
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert (metrics["pass@1"]["value"], metrics["k"], metrics["n_prompts"], metrics["truncated"]) == (0.0, 2, 2, 1.0)
    assert metrics["suite"]["sampling"] == "temperature 0.6, top_p 0.95, max_new_tokens 6"
