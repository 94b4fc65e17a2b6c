"""The picture of a reinforcement-learning stage: pass@1, response length and reward over updates."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1mega.pipeline.metrics import read_metrics

_TRAINING = (("response_length/mean", "response length (tokens)", "#d1495b"), ("reward/mean", "reward", "#3a7d44"))
_SUITES = ("#1f5a94", "#e08e0b", "#7a4ea3", "#4d9078")


@dataclass(frozen=True)
class Curve:
    """Values over updates; `low` and `high` bound the 95 % interval where there is one."""

    name: str
    updates: list[int]
    values: list[float]
    low: list[float]
    high: list[float]


def training_curve(rows: Sequence[dict[str, Any]], key: str) -> Curve:
    """One number of the training rows; rows without it, or with null, are left out."""
    found = [(row["update"], row[key]) for row in rows if row.get(key) is not None]
    values = [value for _, value in found]
    return Curve(key, [update for update, _ in found], values, values, values)


def evaluation_curves(rows: Sequence[dict[str, Any]], metric: str = "pass@1") -> list[Curve]:
    """One curve per suite from the keys `eval/<suite>/<metric>`, each {"value": v, "ci95": [lo, hi]}."""
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith("eval/") and key.endswith(f"/{metric}"))
    curves = []
    for key in keys:
        found = [(row["update"], row[key]) for row in rows if row.get(key) is not None]
        curves.append(
            Curve(
                key.removeprefix("eval/").removesuffix(f"/{metric}"),
                [update for update, _ in found],
                [measured["value"] for _, measured in found],
                [measured["ci95"][0] for _, measured in found],
                [measured["ci95"][1] for _, measured in found],
            )
        )
    return curves


def draw(stage_dir: Path, title: str) -> Path | None:
    """Draw `curves.png` beside a stage's `metrics.jsonl`.

    Returns:
        The picture, or None when there is nothing to show or matplotlib (extra `report`) is not installed.
    """
    rows = read_metrics(stage_dir / "metrics.jsonl")
    evaluations = evaluation_curves(rows)
    training = [(training_curve(rows, key), label, colour) for key, label, colour in _TRAINING]
    training = [panel for panel in training if panel[0].updates]
    if not evaluations and not training:
        return None
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    panels = bool(evaluations) + len(training)
    figure = Figure(figsize=(7.2, 1.0 + 2.3 * panels), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = iter(figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0])
    figure.suptitle(title, x=0.02, ha="left", fontsize=12, fontweight="bold")
    if evaluations:
        _draw_evaluations(next(axes), evaluations)
    for curve, label, colour in training:
        _draw_training(next(axes), curve, label, colour)
    figure.axes[-1].set_xlabel("update")
    figure.align_ylabels()
    path = stage_dir / "curves.png"
    temporary = stage_dir / ".curves.tmp.png"
    figure.savefig(temporary)
    temporary.replace(path)
    return path


def _draw_evaluations(axis: Any, curves: Sequence[Curve]) -> None:
    for index, curve in enumerate(curves):
        colour = _SUITES[index % len(_SUITES)]
        axis.fill_between(curve.updates, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0)
        axis.plot(curve.updates, curve.values, "o-", color=colour, markersize=4, linewidth=1.8, label=curve.name)
        for at, offset in {0: 1, len(curve.updates) - 1: -1}.items():
            alignment = "left" if offset > 0 else "right"
            axis.annotate(
                f"{curve.values[at]:.3f}",
                (curve.updates[at], curve.values[at]),
                xytext=(4 * offset, 7 if curve.values[at] < 0.85 else -13),
                textcoords="offset points",
                ha=alignment,
                fontsize=8,
                color=colour,
            )
    axis.set_ylim(0, 1.03)
    axis.set_ylabel("pass@1 (95 % interval)")
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    _plain(axis)


def _draw_training(axis: Any, curve: Curve, label: str, colour: str) -> None:
    axis.plot(curve.updates, curve.values, color=colour, linewidth=1.4)
    axis.set_ylim(bottom=min(0.0, min(curve.values)))
    axis.set_ylabel(label)
    _plain(axis)


def _plain(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8)
    axis.margins(x=0.02)
