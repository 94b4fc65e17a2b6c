"""What `r1mega plan` prints: tables of plain columns, and bars of what fills a GPU."""

from collections.abc import Sequence

from r1mega.planner.backtest import Row


def backtested(rows: Sequence[Row]) -> list[str]:
    """The back-test as a Markdown table; rows that a constant was fitted on are marked."""
    lines = ["| figure | published | planner | error | asked | |", "|---|---|---|---|---|---|"]
    group = ""
    for row in rows:
        if row.group != group:
            group = row.group
            lines.append(f"| **{group}** | | | | | |")
        asked = "-" if row.bound is None else f"{row.bound:.0%}"
        marks = ["fitted"] if row.fitted else []
        marks += [] if row.holds else ["outside"]
        marks += [row.note] if row.note else []
        lines.append(
            f"| {row.name} | {_figure(row.published)} {row.unit} | {_figure(row.predicted)} | {row.error:+.1%} | {asked} | {'; '.join(marks)} |"
        )
    return lines


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
