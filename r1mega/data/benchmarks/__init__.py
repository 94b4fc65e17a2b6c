"""Benchmarks in the schemas they were published in, one module each: `prompt_of(row, where)` makes a prompt of a row."""

from collections.abc import Iterator
from datetime import date
from importlib import import_module
from pathlib import Path

from r1mega.config.prompts import BenchmarkPrompts
from r1mega.data import tables
from r1mega.data.prompts import Prompt
from r1mega.data.rows import Row


def prompts(source: BenchmarkPrompts, path: Path) -> list[Prompt]:
    """The prompts of a benchmark's rows; UserError, naming file and line, for a row without its fields."""
    prompt_of = import_module(f"{__name__}.{source.name}").prompt_of
    return [prompt_of(row, where) for where, row in _chosen(source, tables.read(path, source.split))]


def _chosen(source: BenchmarkPrompts, rows: Iterator[Row]) -> Iterator[Row]:
    """Without the contests that are not asked for, and the problems whose programs no test can judge."""
    match source.name:
        case "livecodebench":
            from r1mega.data.benchmarks.livecodebench import in_window

            first = date.fromisoformat(source.first_day) if source.first_day else date.min
            last = date.fromisoformat(source.last_day) if source.last_day else date.max
            return ((where, row) for where, row in rows if in_window(row, where, first, last))
        case "codeforces":
            from r1mega.data.benchmarks.codeforces import unjudgeable

            return ((where, row) for where, row in rows if unjudgeable(row) is None)
    return rows
