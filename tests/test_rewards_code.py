"""Judging programs by their tests: what is taken for the program, what counts as passing, and programs that would rather not be judged."""

import json
import os
import time
from pathlib import Path

import pytest

from r1mega.config.rollout import Reward
from r1mega.data.benchmarks import codeforces, livecodebench
from r1mega.data.code_tests import CodeTest, pack
from r1mega.data.prompts import Prompt
from r1mega.data.rows import jsonl
from r1mega.errors import UserError
from r1mega.rewards import code
from r1mega.rewards.code import Program, accuracy, final_program, same_lines, same_tokens
from r1mega.rewards.judge import Judge
from r1mega.rewards.sandbox import SandboxError, find_sandbox

BENCHMARKS = Path(__file__).parent / "benchmarks"


def lcb(number: int) -> Prompt:
    where, row = list(jsonl(BENCHMARKS / "livecodebench.jsonl"))[number]
    return livecodebench.prompt_of(row, where)


def cf(number: int) -> Prompt:
    where, row = list(jsonl(BENCHMARKS / "codeforces.jsonl"))[number]
    return codeforces.prompt_of(row, where)


def prompt(*tests: tuple[str, str], **meta) -> Prompt:
    limits = {"time_limit_s": 1.0, "memory_limit_mb": 256, "compare": "tokens"}
    return Prompt(id="p", text="?", meta={"tests": pack([CodeTest(*test) for test in tests])} | limits | meta)


def fenced(source: str, label: str = "python") -> str:
    return f"<think>Try\n```python\nprint('draft')\n```\n</think>Here it is.\n```{label}\n{source}\n```\nIt works."


# ---------------------------------------------------------------- the program of a response


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("```python\na\nb\n```", Program("a\nb", "python")),
        ("```\na\n```", Program("a", "python")),
        ("```python\na\n```\nor\n```python\nb\n```\n", Program("b", "python")),
        ("```cpp\na\n```", Program("a", "cpp")),
        ("``` C++ \na\n```", Program("a", "cpp")),
        ("  ```python\n    a\n  ```", Program("    a", "python")),
        ("<think>\n```python\na\n```\n</think>\nno code", None),
        ("<think>\n```python\na\n```\n", None),
        ("```python\na\n", None),
        ("```python\n\n```", None),
        ("a = 1", None),
        ("", None),
        ("```python\na\0b\n```", None),
    ],
)
def test_the_last_block_outside_the_thoughts_is_the_program(response, expected):
    assert final_program(response) == expected


def test_a_problem_may_fix_the_language_or_that_of_unlabelled_blocks():
    assert final_program("```cpp\na\n```", {"language": "python"}) == Program("a", "python")
    assert final_program("```\na\n```", {"language": None, "fallback_language": "cpp"}) == Program("a", "cpp")


def test_a_response_of_megabytes_is_read_in_linear_time():
    start = time.monotonic()
    for response in ("```\n" * (1 << 20), "`" * (1 << 22), "<think></think>```python\n" * (1 << 17), "\n" * (1 << 22)):
        final_program(response)
    assert time.monotonic() - start < 20


# ---------------------------------------------------------------- comparing outputs


@pytest.mark.parametrize(
    ("expected", "actual", "same"),
    [
        ("1 2\n3", " 1 2 \n3\n\n", True),
        ("1 2", "1  2", True),  # equal decimals
        ("1.0", "1.00", True),
        ("50000000000000000", "50000000000000001", False),
        ("0.1", "0.10000000000000001", False),
        ("a b", "a  b", False),
        ("1\n2", "1 2", False),
        ("", "", True),
        ("NaN", "nan", False),
        ("sNaN 1", "1 1", False),
        ("Yes", "YES", False),
        ("1", "", False),
    ],
)
def test_lines(expected, actual, same):
    assert same_lines(expected, actual) is same


@pytest.mark.parametrize(
    ("expected", "actual", "same"),
    [
        ("1 2\n3", "1 2 3\n", True),
        ("YES", "yes", True),
        ("YES", "no", False),
        ("Alice", "alice", False),
        ("0.5", "0.5000009", True),
        ("0.5", "0.500002", False),
        ("1000000.0", "1000000.9", True),
        ("1000000.0", "1000002", False),
        ("3", "3.0", False),  # an integer is expected as one
        ("1e-3", "0.001", True),
        ("0.5", "nan", False),
        ("0.5", "inf", False),
        ("2.5", "2.5 2.5", False),
        ("one.", "1.", False),
        ("", "\n", True),
    ],
)
def test_tokens(expected, actual, same):
    assert same_tokens(expected, actual) is same


# ---------------------------------------------------------------- the benchmarks' programs


# Names are in place without an import, a main guard is entered, and leaving is no error.
GUARDED = """
def main():
    k = int(stdin.readline().split()[1])
    print(sum(filter(k.__lt__, map(int, stdin.read().split()))))
    exit(1)

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("n, k = map(int, input().split())\nprint(sum(a for a in map(int, input().split()) if a > k))", 1.0),
        ("n, k = map(int, input().split())\nprint(sum(a for a in map(int, input().split()) if a >= k))", 0.0),
        (GUARDED, 1.0),
        ("print(5)", 0.0),  # the public test's answer
        ("def", 0.0),
        ("", 0.0),
        ("raise SystemExit", 0.0),
    ],
)
def test_livecodebench_programs(source, value):
    assert accuracy(lcb(0), fenced(source)) == value


METHOD = """
class Solution:
    def pairApart(self, nums: List[int], gap: int) -> List[int]:
        print("debugging")
        return sorted({v for v in nums if v + gap in nums})
"""
FUNCTION = """
from dataclasses import dataclass

@dataclass
class Box:
    value: 'int'

def pairApart(nums, gap):
    return tuple(sorted({Box(v).value for v in nums if v + gap in nums}))
"""


@pytest.mark.parametrize(
    ("source", "value"),
    [
        (METHOD, 1.0),
        (FUNCTION, 1.0),
        (METHOD.replace("sorted({", "list([").replace("})", "])"), 0.0),
        (METHOD.replace("return", "print"), 0.0),
        (METHOD.replace("pairApart", "pairapart"), 0.0),
        (METHOD.replace("sorted({", "set({"), 0.0),  # a set is no list
        (METHOD.replace("return", "return 1 / 0 or"), 0.0),
    ],
)
def test_livecodebench_functions(source, value):
    assert accuracy(lcb(1), fenced(source)) == value


CPP = '#include <cstdio>\nint main() { double w, n; scanf("%lf %lf", &w, &n); printf("%.9f\\n", w / n); }'


def test_codeforces_programs():
    assert accuracy(cf(0), fenced("w, n = map(int, input().split())\nprint(w / n)")) == 1.0
    assert accuracy(cf(0), fenced("w, n = map(int, input().split())\nprint(w // n)")) == 0.0
    assert accuracy(cf(0), fenced("w, n = map(int, input().split())\nprint(w / n)\nraise SystemExit(1)")) == 0.0
    assert accuracy(cf(2), fenced("print('yes')")) == 1.0
    assert accuracy(cf(2), fenced("print('no')")) == 0.0


def test_a_checker_accepts_any_right_answer():
    assert accuracy(cf(1), fenced("print(int(input()) - 1, 1)")) == 1.0
    assert accuracy(cf(1), fenced("print(int(input()), 0)")) == 0.0
    assert accuracy(cf(1), fenced("print('1')")) == 0.0


def test_cpp_is_compiled_and_run_in_the_sandbox():
    if not os.path.exists("/usr/bin/g++"):
        with pytest.raises(SandboxError, match="apt-get install g"):
            accuracy(cf(0), fenced(CPP, "cpp"))
        return
    assert accuracy(cf(0), fenced(CPP, "cpp")) == 1.0
    assert accuracy(cf(0), fenced(CPP.replace(";", ""), "")) == 0.0


# ---------------------------------------------------------------- programs that would rather not be judged

SECRET = "7f3a91"

# What a program could read: files, its own driver among them, and the memory and the commands of the processes that it sees.
SEARCH_FILES = """
import os
for root in ("/judge", "/tmp", "/etc", "/var", "/home", "/root", "/run"):
    for folder, _, names in os.walk(root):
        for name in names:
            try:
                print(open(os.path.join(folder, name), "rb").read(1 << 16).decode(errors="replace"))
            except OSError:
                pass
"""
SEARCH_PROCESSES = """
import os, re
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        found = open(f"/proc/{pid}/environ").read() + open(f"/proc/{pid}/cmdline").read()
        memory = open(f"/proc/{pid}/mem", "rb")
        for start, end in re.findall("(?m)^([0-9a-f]+)-([0-9a-f]+) rw", open(f"/proc/{pid}/maps").read()):
            memory.seek(int(start, 16))
            found += memory.read(int(end, 16) - int(start, 16)).decode(errors="replace")
    except OSError:
        continue
    print(*re.findall("7f3a9[1]", found)[:1])
"""
# Whom it could tell that all is well.
TELL_THE_JUDGE = """
import os
for descriptor in range(3, 64):
    try:
        os.write(descriptor, b'{ "exit-code": 0 }[1.0, null]\\n')
    except OSError:
        pass
os._exit(0)
"""
KILL = """
import os, signal
os.kill(1, signal.SIGKILL)
os.kill(os.getppid(), signal.SIGKILL)
os.killpg(0, signal.SIGKILL)
"""


@pytest.mark.parametrize(
    "source",
    [
        SEARCH_FILES,
        SEARCH_PROCESSES,
        TELL_THE_JUDGE,
        KILL,
        "print('[1.0, null]')\nprint('1')\nimport os\nos._exit(0)",
        "import os\nos.close(1)\nos.close(2)\nos._exit(0)",
        "class Always(str):\n    __eq__ = lambda self, other: True\n    __hash__ = str.__hash__\nprint(Always('x'))",
        "import json\njson.dumps = json.dump = lambda *a, **k: None\nprint('*')",
        f"print('{SECRET[:5]}')",
    ],
)
def test_injections_score_nothing(source):
    stdio = prompt(("1\n", SECRET + "\n"))
    assert accuracy(stdio, fenced(source)) == 0.0
    assert accuracy(prompt(("1\n", SECRET + "\n"), compare="lines"), fenced(source)) == 0.0
    assert accuracy(prompt(("1", json.dumps(SECRET)), compare="lines", function="f"), fenced(f"def f(n):\n    return 0\n{source}")) == 0.0


def test_the_search_finds_what_is_there():
    assert accuracy(prompt((SECRET, SECRET)), fenced(f"held = input()\n{SEARCH_PROCESSES}")) == 1.0


def test_expected_outputs_do_not_enter_the_sandbox(monkeypatch):
    """Whatever a program could find, this it could not: the sandbox is given the input and the program."""
    given = []
    real = code.Sandbox.run

    def spied(self, command, files=None, stdin=b"", limits=None):
        given.append(repr((command, files, stdin)))
        return real(self, command, files, stdin, limits)

    monkeypatch.setattr(code.Sandbox, "run", spied)
    assert accuracy(prompt(("1\n", SECRET)), fenced("print(1)")) == 0.0
    assert accuracy(prompt(("1", json.dumps(SECRET)), compare="lines", function="f"), fenced("def f(n): return n")) == 0.0
    assert len(given) == 2 and not any(SECRET in text for text in given)


def test_limits_are_failures_and_end_the_tests(monkeypatch):
    two = prompt(("1", "1"), ("1", "1"))
    runs = []
    real = code.Sandbox.run
    monkeypatch.setattr(code.Sandbox, "run", lambda *a, **k: runs.append(1) or real(*a, **k))
    for source in ("while True: pass", "bytearray(1 << 30)", "while True: print('y' * 9999)"):
        runs.clear()
        start = time.monotonic()
        assert accuracy(two, fenced(source)) == 0.0
        assert len(runs) == 1 and time.monotonic() - start < 30


def test_sleeping_is_wrong_not_unjudged(monkeypatch):
    monkeypatch.setattr(code, "TOTAL_S", 1.5)
    start = time.monotonic()
    assert accuracy(prompt(*[("1", "1")] * 60), fenced("import time; time.sleep(1); print(1)")) == 0.0
    assert time.monotonic() - start < 30


def test_judges_run_it():
    right, wrong = (fenced(f"print({text})") for text in ("int(input()) + 1", "0"))
    task = prompt(("1\n", "2\n"), ("5\n", "6\n"))
    with Judge({"code": Reward(function="r1mega.rewards.code:accuracy", deadline_s=60.0)}, workers=1) as judge:
        verdicts = judge.judge([(task, right), (task, wrong), (task, "no code"), (Prompt("bare", "?"), right)])
    assert [verdict["code"].value for verdict in verdicts] == [1.0, 0.0, 0.0, None]
    assert "prompt bare has no tests" in verdicts[3]["code"].reason


def test_no_tests_are_not_passed():
    for meta in ({}, {"tests": None}, dict(prompt().meta)):
        with pytest.raises(ValueError, match="prompt p has no tests"):
            accuracy(Prompt("p", "?", meta=meta), fenced("print(1)"))


def test_without_bubblewrap_nothing_is_judged(monkeypatch):
    monkeypatch.setenv("PATH", "")
    find_sandbox.cache_clear()
    try:
        with pytest.raises(UserError, match="apt-get install bubblewrap"):
            accuracy(prompt(("1", "1")), fenced("print(1)"))
    finally:
        find_sandbox.cache_clear()
