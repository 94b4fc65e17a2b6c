"""The stage table: checkpoints down, metrics across, like the table of Dev1 to R1 in the paper."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from r1mega.report.page.names import figure, name, share_like
from r1mega.report.page.run import RunView, StageView

_ORDER = ("pass@1", "cons@", "pass@", "accuracy", "format", "consistency", "reflection", "preference", "response_length")
_SETTINGS = ("n_prompts", "k")
_WIDTH = 64
_COLUMNS = 8


@dataclass(frozen=True)
class Cell:
    """A value, its 95 % interval where it has one, and the marks of a small scale from 0 to 1 (in pixels) where the column has one."""

    value: str
    interval: str = ""
    best: bool = False
    scale: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Table:
    """Rows of cells under columns; columns are grouped by suite."""

    title: str
    caption: str
    suites: list[tuple[str, int]]
    """Name and number of columns."""
    columns: list[str]
    rows: list[tuple[str, str, list[Cell]]]
    """Name, what it is, cells."""
    width: int = _WIDTH


def tables(view: RunView) -> list[Table]:
    """A table for every stage that measures, and one for what training stages measured before and after."""
    found: list[Table] = []
    for stage in (stage for stage in view.stages if stage.measures and stage.evaluation_rows):
        found += _by_suite(stage.name, [(str(row.get("model", stage.name)), _role(view, stage, row), row) for row in stage.evaluation_rows])
    during = []
    for stage in (stage for stage in view.stages if not stage.measures and stage.evaluation_rows):
        ends = {row["update"]: row for row in (stage.evaluation_rows[0], stage.evaluation_rows[-1])}
        during += [(stage.name, f"after {update} updates" if update else "before the first update", row) for update, row in ends.items()]
    return found + (_by_suite("during training", during) if during else [])


def _by_suite(title: str, rows: list[tuple[str, str, dict[str, Any]]]) -> list[Table]:
    """One table while it has so few columns that a page shows them all, else one a suite."""
    whole = _table(title, rows)
    if len(whole.suites) == 1 or len(whole.columns) <= _COLUMNS:
        return [whole]
    suites = [suite for suite, _ in whole.suites]
    parts = [
        [(label, role, {key: row[key] for key in row if key.startswith(f"eval/{suite}/")}) for label, role, row in rows] for suite in suites
    ]
    return [_table(f"{title}: {suite}", part) for suite, part in zip(suites, parts, strict=True)]


def _role(view: RunView, stage: StageView, row: dict[str, Any]) -> str:
    reference = stage.config.get("models", {}).get(row.get("model"), "")
    return reference if reference != row.get("model") and reference in view.run.recipe.stages else ""


def _table(title: str, rows: list[tuple[str, str, dict[str, Any]]]) -> Table:
    measured = [_measured(row) for _, _, row in rows]
    suites = list(dict.fromkeys(suite for found in measured for suite, _ in found))
    keys = [
        (suite, metric)
        for suite in suites
        for metric in sorted({metric for found in measured for at, metric in found if at == suite}, key=_rank)
        if metric not in _SETTINGS and _says_something(found.get((suite, metric)) for found in measured)
    ]
    columns = [[found.get(key) for found in measured] for key in keys]
    cells = [_column(metric, values) for (_, metric), values in zip(keys, columns, strict=True)]
    return Table(
        title=title,
        caption=_caption(measured, suites),
        suites=[(suite, sum(at == suite for at, _ in keys)) for suite in suites],
        columns=[name(metric) for _, metric in keys],
        rows=[(label, role, [column[index] for column in cells]) for index, (label, role, _) in enumerate(rows)],
    )


def _measured(row: dict[str, Any]) -> dict[tuple[str, str], Any]:
    found = {}
    for key, value in row.items():
        if key.startswith("eval/") and not (isinstance(value, dict) and "value" not in value):
            suite, _, metric = key.removeprefix("eval/").partition("/")
            # The versions that a score was measured with lie beside the scores.
            if not isinstance(value, dict) or "value" in value:
                found[suite, metric] = value
    return found


def _says_something(values: Iterable[Any]) -> bool:
    """Shares of what went wrong are shown only where something did."""
    return any(isinstance(value, dict) or value for value in values)


def _rank(metric: str) -> tuple[int, str]:
    # pass@16 begins like pass@1, and comes after the vote.
    known = (index for index, prefix in enumerate(_ORDER) if metric == prefix or (prefix != "pass@1" and metric.startswith(prefix)))
    return next(known, len(_ORDER)), metric


def _column(metric: str, values: list[Any]) -> list[Cell]:
    plain = [value["value"] if isinstance(value, dict) else value for value in values]
    known = [value for value in plain if value is not None]
    best = max(known) if share_like(metric) and len(set(known)) > 1 else None
    scaled = share_like(metric) and all(0 <= bound <= 1 for value in values if isinstance(value, dict) for bound in value["ci95"])
    cells = []
    for value, number in zip(values, plain, strict=True):
        if number is None:
            cells.append(Cell("–"))
        elif isinstance(value, dict):
            low, high = value["ci95"]
            scale = (low * _WIDTH, number * _WIDTH, high * _WIDTH) if scaled else None
            cells.append(Cell(_decimal(number), f"{_decimal(low)} – {_decimal(high)}", number == best, scale))
        else:
            cells.append(Cell(_decimal(number), best=number == best))
    return cells


def _decimal(value: Any) -> str:
    """Three decimals below 1, so that the numbers of a column line up."""
    return f"{value:.3f}" if isinstance(value, float) and abs(value) < 1 else figure(value)


def _caption(measured: list[dict[tuple[str, str], Any]], suites: list[str]) -> str:
    parts = []
    for suite in suites:
        counts = [{found[suite, key] for found in measured if (suite, key) in found} for key in _SETTINGS]
        if all(len(count) == 1 for count in counts):
            prompts, k = (next(iter(count)) for count in counts)
            asked = f"{prompts} prompts, {k} {'sample' if k == 1 else 'samples'} each"
            parts.append(f"{suite}: {asked}" if len(suites) > 1 else asked)
    return "; ".join(parts)
