"""The planner against published figures: `tools/plan_backtest` prints the table, docs/planner.md keeps it."""

import json
from pathlib import Path

import pytest

from r1mega.planner.backtest import Row, rows
from r1mega.report.plan import backtested
from r1mega.weights.architecture import Architecture

ROOT = Path(__file__).parents[1]
V3 = Architecture.from_hf(json.loads((ROOT / "configs/deepseek_v3/config.json").read_text()))
ROWS = rows(V3)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.group}: {row.name}")
def test_published_figures(row: Row) -> None:
    assert row.holds, f"{row.name}: {row.error:+.1%}"


def test_what_was_not_fitted_is_the_larger_part() -> None:
    throughput = [row for row in ROWS if row.group == "throughput of V3"]
    assert sum(row.fitted for row in throughput) == 9
    assert len(throughput) == 20


def test_orders_of_magnitude() -> None:
    """Rows without a bound are within a factor of 10 and have a note that says why they are apart."""
    for row in ROWS:
        if row.bound is None:
            assert 0.1 < row.predicted / row.published < 10
            assert row.note


def test_the_page_has_the_table_as_it_is_printed() -> None:
    assert "\n".join(backtested(ROWS)) in (ROOT / "docs/planner.md").read_text(encoding="utf-8")
