"""LiveCodeBench, code generation: problems of LeetCode, AtCoder and Codeforces with their contests' dates (Jain et al. 2024, 2403.07974).

The prompt is the generic one of the published evaluation (LiveCodeBench/LiveCodeBench, lcb_runner/prompts/code_generation.py, commit
28fef95), its system message set before the question: DeepSeek-R1 asks to be prompted without one.
"""

import json
import pickletools
from collections.abc import Mapping
from datetime import date, datetime
from typing import Any, Final

from r1mega.data import fields
from r1mega.data.code_tests import CodeTest, from_dicts, inflate, pack
from r1mega.data.prompts import Prompt
from r1mega.errors import UserError

R1_WINDOW: Final = (date(2024, 8, 1), date(2025, 1, 31))
"""First and last day of the contests that DeepSeek-R1 reports."""

_SYSTEM: Final = (
    "You are an expert Python programmer. You will be given a question (problem specification) and will generate a correct Python program "
    "that matches the specification and passes all tests."
)
_WITH_STARTER: Final = (
    "You will use the following starter code to write the solution to the problem and enclose your code within delimiters."
)
_WITHOUT_STARTER: Final = (
    "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on the sample inputs). Enclose your "
    "code within delimiters as follows. Ensure that when the python program runs, it reads the inputs, runs the algorithm and writes "
    "output to STDOUT."
)

_TIME_LIMIT_S: Final = 6.0
"""Seconds for a test, as in the published evaluation."""

_MEMORY_LIMIT_MB: Final = 1024
"""AtCoder's limit, the largest of the three sites'. The published evaluation sets none."""

_STRING_OPCODES: Final = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"}
_IDLE_OPCODES: Final = {"PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "STOP"}


def prompt_of(row: Mapping[str, Any], where: str) -> Prompt:
    """A row of `livecodebench/code_generation_lite` (test.jsonl to test6.jsonl) or of `livecodebench/code_generation`.

    `meta` is what `rewards.code` reads, and `platform`, `difficulty` and `contest_date`. Public tests stand before private ones.
    """
    question, starter = fields.text(row, where, "question_content"), str(row.get("starter_code") or "")
    metadata = _json(row, where, "metadata", dict)
    function = metadata.get("func_name")
    if starter and not isinstance(function, str):
        raise UserError(f"{where}: field 'metadata': starter code without 'func_name', got {metadata!r:.60}")
    tests = _tests(row, where, "public_test_cases") + _tests(row, where, "private_test_cases")
    if not tests:
        raise UserError(f"{where}: fields 'public_test_cases' and 'private_test_cases': no tests")
    return Prompt(
        id=f"livecodebench/{fields.scalar(row, where, 'question_id')}",
        text=f"{_SYSTEM}\n\n{_asked(question, starter)}",
        meta={
            "tests": pack(tests),
            "function": function,
            "compare": "lines",
            "language": "python",
            "time_limit_s": _TIME_LIMIT_S,
            "memory_limit_mb": _MEMORY_LIMIT_MB,
            "platform": fields.text(row, where, "platform"),
            "difficulty": fields.text(row, where, "difficulty"),
            "contest_date": contest_date(row, where).isoformat(),
        },
    )


def in_window(row: Mapping[str, Any], where: str, first: date = R1_WINDOW[0], last: date = R1_WINDOW[1]) -> bool:
    """Whether a row's contest took place from `first` to `last`, both included."""
    return first <= contest_date(row, where) <= last


def contest_date(row: Mapping[str, Any], where: str) -> date:
    """The day of a row's contest."""
    value = row[fields.present(row, where, "contest_date")]
    try:
        return value.date() if isinstance(value, datetime) else datetime.fromisoformat(value).date()
    except (TypeError, ValueError):
        raise UserError(f"{where}: field 'contest_date': expected a date such as 2024-08-24T00:00:00, got {value!r:.60}") from None


def _asked(question: str, starter: str) -> str:
    form, code = (_WITH_STARTER, starter) if starter else (_WITHOUT_STARTER, "# YOUR CODE HERE")
    answer = "### Answer: (use the provided format with backticks)\n\n"
    return f"### Question:\n{question}\n\n### Format: {form}\n```python\n{code}\n```\n\n{answer}"


def _tests(row: Mapping[str, Any], where: str, name: str) -> list[CodeTest]:
    try:
        return from_dicts(_json(row, where, name, list))
    except ValueError as error:
        raise UserError(f"{where}: field {name!r}: {error}") from None


def _json(row: Mapping[str, Any], where: str, name: str, kind: type) -> Any:
    """A field of JSON; for private tests, which the light data set compresses, also of base64 of zlib of a pickled string of JSON."""
    text = fields.text(row, where, name)
    try:
        if not text.lstrip().startswith(("[", "{")):
            text = pickled_string(inflate(text))
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: field {name!r}: {error}") from None
    if not isinstance(value, kind):
        raise UserError(f"{where}: field {name!r}: expected a JSON {kind.__name__}, got {value!r:.60}")
    return value


def pickled_string(data: bytes) -> str:
    """The string that a pickle holds, read without unpickling: a pickle is a program, and a file of benchmarks must not run one.

    Raises ValueError for a pickle of anything but one string.
    """
    found: list[str] = []
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in _STRING_OPCODES:
            found.append(str(argument))
        elif opcode.name not in _IDLE_OPCODES:
            raise ValueError(f"a pickle of something else than a string ({opcode.name}), which is not loaded")
    if len(found) != 1:
        raise ValueError(f"a pickle of {len(found)} strings instead of one")
    return found[0]
