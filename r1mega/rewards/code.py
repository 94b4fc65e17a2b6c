"""Programs, judged by their tests in the sandbox.

`prompt.meta` says how: `tests` (`data.code_tests.pack`), `time_limit_s` and `memory_limit_mb` for each test, `compare` (`lines` or
`tokens`), and where they apply `function` (the name of what the tests call, else they are standard input and output), `language`
(`python` or `cpp`, else the code block names it, else it is `fallback_language`) and `checker` (a Python program that accepts outputs).
Expected outputs stay outside the sandbox.
"""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, DecimalException
from functools import lru_cache
from typing import Any

from r1mega.data.code_tests import CodeTest, pack, unpack
from r1mega.data.prompts import Prompt
from r1mega.rewards.answer import after_thought
from r1mega.rewards.sandbox import FILES, SCRATCH, Limits, Outcome, Sandbox, SandboxError, find_sandbox

TOLERANCE = 1e-6
"""Absolute or relative error, whichever is larger, of a token where `compare` is `tokens` and the expected one has a point or exponent."""

TOTAL_S = 300.0
"""Seconds for all tests of a response together, after which it is too slow, and wrong. Give the reward a `deadline_s` of 450 or more, which
leaves room for a compiler and a checker: what the judge cuts short is not judged, and a policy must not get there by sleeping."""

_OVERHEAD = 256 << 20
"""Bytes of address space beside a problem's memory: an interpreter, libraries, and stacks that are reserved but not used."""

_COMPILING = Limits(cpu_s=30, wall_s=90.0, memory=4 << 30, processes=16, scratch=256 << 20, output=64 << 20)
_CHECKING = Limits(cpu_s=15, wall_s=45.0, memory=2 << 30)

_CPP = ("cpp", "c++", "cc", "cxx")
_STAR_MODULES = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics", "itertools", "functools"),
    *("operator", "io", "sys", "json", "builtins", "typing"),
)
"""LiveCodeBench runs programs with the names of these modules in place, later ones hiding earlier ones: solutions say `List` at once."""

_DRIVER = """
import importlib, json, os, sys, types
function = sys.argv[1]
module = types.ModuleType("solution" if function else "__main__")
sys.modules[module.__name__] = module
space = vars(module)
for name in MODULES:
    names = vars(importlib.import_module(name))
    space.update((key, names[key]) for key in names.get("__all__", names) if not key.startswith("_"))
space.update((name, importlib.import_module(name)) for name in MODULES if name not in ("builtins", "typing"))
sys.setrecursionlimit(50000)
sys.argv = ["main.py"]
if function:  # what a solution prints is no answer
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(os.open("/dev/null", os.O_WRONLY), 1)
    arguments = [json.loads(line) for line in sys.stdin.read().split("\\n") if line.strip()]
source = open("FOLDER/main.py", encoding="utf-8").read()
try:
    exec(compile(source, "main.py", "exec", dont_inherit=True), space)
    if function:
        target = getattr(space["Solution"](), function) if "class Solution" in source else space[function]
        json.dump(target(*arguments), channel)
        channel.close()
except SystemExit:
    if function:
        raise
""".replace("MODULES", repr(_STAR_MODULES)).replace("FOLDER", FILES)


Runnable = tuple[list[str], dict[str, bytes]]
"""The command that runs a program, and the files that it needs."""


@dataclass(frozen=True)
class Program:
    """Source code and its language, `python` or `cpp`."""

    source: str
    language: str


def accuracy(prompt: Prompt, response: str) -> float:
    """1.0 if the response's program passes all tests, else 0.0; it is not run again after the first that fails.

    Raises UserError without a sandbox, SandboxError where it breaks or the program is C++ and there is no compiler, ValueError for a prompt
    without tests: such a response is not judged.
    """
    tests = _tests(prompt.meta.get("tests") or pack([]))
    if not tests:
        raise ValueError(f"prompt {prompt.id} has no tests")
    sandbox = find_sandbox()
    program = final_program(response, prompt.meta)
    if program is None:
        return 0.0
    runnable = _built(sandbox, program, prompt.meta)
    if runnable is None:
        return 0.0
    until = time.monotonic() + TOTAL_S
    return float(all(_passes(sandbox, runnable, test, prompt.meta, until) for test in tests))


def final_program(response: str, meta: Mapping[str, Any] | None = None) -> Program | None:
    """What stands between the last two lines with a code fence, outside the thoughts; None if there is no such program.

    It is LiveCodeBench's rule (lcb_runner/utils/extraction_utils.py).
    """
    lines = after_thought(response).split("\n")
    fences = [number for number, line in enumerate(lines) if "```" in line]
    if len(fences) < 2:
        return None
    source = "\n".join(lines[fences[-2] + 1 : fences[-1]])
    if not source.strip() or "\0" in source:
        return None
    meta = meta or {}
    label = lines[fences[-2]].rpartition("```")[2].strip().lower() or meta.get("fallback_language") or "python"
    return Program(source, meta.get("language") or ("cpp" if label in _CPP else "python"))


def same_lines(expected: str, actual: str) -> bool:
    """LiveCodeBench's comparison: equal lines but for white space around them, or lines of equal decimal numbers.

    White space around the whole is not compared either (lcb_runner/evaluation/testing_util.py, `grade_stdio`).
    """
    ours, theirs = ([line.strip() for line in text.strip().split("\n")] for text in (actual, expected))
    return len(ours) == len(theirs) and all(map(_same_line, theirs, ours))


def same_tokens(expected: str, actual: str) -> bool:
    """Equal words between white space; `yes` and `no` in any case, and numbers that are expected with a point or exponent by TOLERANCE."""
    ours, theirs = actual.split(), expected.split()
    return len(ours) == len(theirs) and all(map(_same_token, theirs, ours))


def _same_line(expected: str, actual: str) -> bool:
    if expected == actual:
        return True
    ours, theirs = actual.split(), expected.split()
    try:
        return len(ours) == len(theirs) and all(Decimal(a) == Decimal(b) for a, b in zip(ours, theirs, strict=True))
    except (DecimalException, ValueError):
        return False


def _same_token(expected: str, actual: str) -> bool:
    if expected == actual or (expected.lower() in ("yes", "no") and expected.lower() == actual.lower()):
        return True
    if not any(mark in expected for mark in ".eE"):
        return False
    try:
        wanted, given = float(expected), float(actual)
    except ValueError:
        return False
    return math.isfinite(wanted) and math.isfinite(given) and abs(given - wanted) <= TOLERANCE * max(1.0, abs(wanted))


@lru_cache(maxsize=4)
def _tests(packed: str) -> list[CodeTest]:
    """Samples of one prompt are judged one after another."""
    return unpack(packed)


def _built(sandbox: Sandbox, program: Program, meta: Mapping[str, Any]) -> Runnable | None:
    """None if it does not compile."""
    try:
        source = program.source.encode()
    except UnicodeEncodeError:  # half a surrogate pair is text to nobody
        return None
    if program.language == "cpp":
        binary = _compiled(sandbox, source)
        return None if binary is None else ([f"{FILES}/program"], {"program": binary})
    files = {"main.py": source}
    if meta["compare"] == "lines":
        return [sandbox.python, "-I", f"{FILES}/driver.py", meta.get("function") or ""], files | {"driver.py": _DRIVER.encode()}
    return [sandbox.python, "-I", f"{FILES}/main.py"], files


def _compiled(sandbox: Sandbox, source: bytes) -> bytes | None:
    """The binary comes back on standard output, since nothing else leaves the sandbox."""
    command = (
        "command -v g++ >/dev/null || exit 99; "
        f"g++ -O2 -std=c++17 -o {SCRATCH}/program {FILES}/main.cpp 1>&2 || exit 98; cat {SCRATCH}/program"
    )
    outcome = sandbox.run(["/bin/sh", "-c", command], {"main.cpp": source}, limits=_COMPILING)
    if outcome.code == 99:
        raise SandboxError("the program is C++ and there is no compiler in /usr: apt-get install g++")
    return outcome.stdout if outcome.code == 0 else None


def _passes(sandbox: Sandbox, runnable: Runnable, test: CodeTest, meta: Mapping[str, Any], until: float) -> bool:
    """Whether a program passes one test within the test's limits and before the moment `until`.

    The limit is of CPU time. The clock on the wall only ends what sleeps, and leaves room for a machine that is busy.
    """
    command, files = runnable
    seconds = float(meta["time_limit_s"])
    memory = (int(meta["memory_limit_mb"]) << 20) + _OVERHEAD
    wall_s = min(4 * seconds + 10, until - time.monotonic())
    if wall_s <= 0:
        return False
    limits = Limits(cpu_s=math.ceil(seconds), wall_s=wall_s, memory=memory)
    outcome = sandbox.run(command, files, test.input.encode(), limits)
    if outcome.code != 0:
        return False
    if meta.get("checker"):
        return _accepted(sandbox, meta["checker"], test, outcome)
    actual = outcome.stdout.decode(errors="replace")
    if meta.get("function"):
        return _same_value(test.output, actual)
    return same_lines(test.output, actual) if meta["compare"] == "lines" else same_tokens(test.output, actual)


def _same_value(expected: str, actual: str) -> bool:
    try:
        return bool(json.loads(actual) == json.loads(expected))
    except (ValueError, RecursionError):
        return False


def _accepted(sandbox: Sandbox, checker: str, test: CodeTest, outcome: Outcome) -> bool:
    """`checker.py input correct_output solution_output` prints 1 if it accepts (the convention of open-r1/codeforces).

    What a checker reads was made by the solution, so it runs in a sandbox of its own. One that breaks accepts nothing.
    """
    files = {
        "checker.py": checker.encode(),
        "input.txt": test.input.encode(),
        "correct_output.txt": test.output.encode(),
        "solution_output.txt": outcome.stdout,
    }
    command = [sandbox.python, "-I", *(f"{FILES}/{name}" for name in files)]
    verdict = sandbox.run(command, files, limits=_CHECKING)
    return verdict.code == 0 and verdict.stdout.split()[-1:] in ([b"1"], [b"1.0"])
