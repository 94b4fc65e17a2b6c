"""Codeforces problems with their official tests, in the schema of `open-r1/codeforces`.

DeepSeek-R1 does not publish its prompt for Codeforces. A row of the `verifiable-prompts` configuration brings the data set's own; for
any other row the instruction is CodeElo's (Quan et al. 2025, arXiv 2501.01257; QwenLM/CodeElo, main.py), before the statement in the
sections of open-r1's prompt.
"""

from collections.abc import Mapping
from typing import Any, Final

from r1mega.data import fields
from r1mega.data.code_tests import CodeTest, from_dicts, pack
from r1mega.data.prompts import Prompt
from r1mega.errors import UserError

_INSTRUCTION: Final = (
    "You are a coding expert. Given a competition-level coding problem, you need to write a C++ program to solve it. You may start by "
    "outlining your thought process. In the end, please provide the complete code in a code block enclosed with ``` ```."
)


def prompt_of(row: Mapping[str, Any], where: str) -> Prompt:
    """A row of `open-r1/codeforces`; `meta` is what `rewards.code` reads, and contest, index, rating and tags.

    Tests are `official_tests`, or the `examples` of a row without any. Raises UserError also for a problem that cannot be judged here.
    """
    reason = unjudgeable(row)
    if reason is not None:
        raise UserError(f"{where}: {reason}; leave the row out")
    tests = _tests(row, where, "official_tests") or _tests(row, where, "examples")
    asked = row["prompt"] if row.get("prompt") else f"{_INSTRUCTION}\n\n{_statement(row, where)}"
    language = row.get("language")
    return Prompt(
        id="/".join(["codeforces", fields.scalar(row, where, "id"), *([language] if language else [])]),
        text=asked,
        meta={
            "tests": pack(tests),
            "function": None,
            "compare": "tokens",
            "language": language or None,
            "fallback_language": "cpp",
            "checker": row.get("generated_checker") or None,
            "time_limit_s": _number(row, where, "time_limit"),
            "memory_limit_mb": _number(row, where, "memory_limit"),
            "contest": fields.scalar(row, where, "contest_id"),
            "index": fields.scalar(row, where, "index"),
            "rating": row.get("rating"),
            "tags": list(row.get("tags") or []),
            "all_tests": bool(row.get("official_tests_complete")),
        },
    )


def unjudgeable(row: Mapping[str, Any]) -> str | None:
    """Why programs for a row cannot be judged, None where they can.

    The problem is a dialogue, reads and writes files, or the data set has no statement, limit or test of it: such columns may be None.
    """
    if row.get("interaction_format"):
        return "the problem is interactive, and its interactor is not in the data set"
    if (row.get("input_mode") or "stdio") != "stdio":
        return f"programs read and write files (input_mode {row['input_mode']!r}), not standard input and output"
    for name in ("description", "time_limit", "memory_limit"):
        if name in row and row[name] is None:
            return f"the data set has no {name} of the problem"
    if not row.get("official_tests") and not row.get("examples"):
        return "the data set has no tests of the problem"
    return None


def _statement(row: Mapping[str, Any], where: str) -> str:
    time, memory = _number(row, where, "time_limit"), _number(row, where, "memory_limit")
    parts = [
        f"# {fields.text(row, where, 'title')}\n\n{fields.text(row, where, 'description')}",
        f"## Constraints\nTime limit per test: {time:g} seconds\nMemory limit per test: {memory:g} megabytes",
    ]
    for name, heading in (("input_format", "Input Format"), ("output_format", "Output Format")):
        if row.get(name):
            parts.append(f"## {heading}\n{fields.text(row, where, name)}")
    examples = _tests(row, where, "examples")
    if examples:
        shown = (f"```input\n{test.input.rstrip()}\n```\n```output\n{test.output.rstrip()}\n```" for test in examples)
        parts.append("## Examples\n" + "\n-----\n".join(shown))
    if row.get("note"):
        parts.append(f"## Note\n{fields.text(row, where, 'note')}")
    return "\n\n".join(parts)


def _tests(row: Mapping[str, Any], where: str, name: str) -> list[CodeTest]:
    """Old problems have Windows' line ends, which their reference programs were given without."""
    try:
        tests = from_dicts(row.get(name) or [])
    except ValueError as error:
        raise UserError(f"{where}: field {name!r}: {error}") from None
    return [CodeTest(test.input.replace("\r\n", "\n"), test.output.replace("\r\n", "\n")) for test in tests]


def _number(row: Mapping[str, Any], where: str, name: str) -> float:
    value = row[fields.present(row, where, name)]
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise UserError(f"{where}: field {name!r}: expected a number above 0, got {value!r:.60}")
    return float(value)
