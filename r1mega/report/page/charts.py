"""Curves and histograms as Vega-Lite charts, made with Altair. Values travel beside them, in columns, to keep the page small."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

import altair as alt

from r1mega.report.page.names import figure, name, rounded
from r1mega.report.page.run import StageView

POINTS = 300
"""Points of a curve at most; more updates are averaged over stretches of equal length."""
TOTAL = 80_000
"""Points of all curves of a page, roughly."""
COLOURS = [f"var(--s{index})" for index in range(1, 7)]
"""Variables of the style sheet, so that a chart follows the page between light and dark without being drawn again."""


@dataclass(frozen=True)
class Chart:
    """One picture: its heading, the first and last value in words, a Vega-Lite chart, and the columns of its values.

    Charts of the same lines share one `spec` object.
    """

    title: str
    ends: str
    description: str
    """For those who do not see it."""
    spec: dict[str, Any]
    columns: dict[str, list[Any]]


@dataclass
class Section:
    """Charts of one kind."""

    title: str
    charts: list[Chart] = field(default_factory=list)
    constants: list[str] = field(default_factory=list)
    """In words, what never changed and needs no picture."""
    quiet: bool = False
    """Folded away at first."""


@dataclass(frozen=True)
class Panel:
    """Which metrics are drawn together, in which section, under which heading."""

    section: str
    title: str
    takes: Callable[[str], bool]


def _starts(*prefixes: str) -> Callable[[str], bool]:
    return lambda key: key.startswith(prefixes)


def _holds(*parts: str) -> Callable[[str], bool]:
    return lambda key: any(part in key for part in parts)


LEARNS, MOVES, OPTIMISES, MACHINE = "What it learns", "How the policy moves", "Optimisation", "Machine"
SECTIONS = (LEARNS, MOVES, OPTIMISES, MACHINE)
PANELS = (
    Panel(MACHINE, "Seconds", _starts("seconds/")),
    Panel(MACHINE, "Tokens", _starts("tokens")),
    Panel(MACHINE, "Engine against trainer, log-probs", _starts("rollout_gap", "probe_gap")),
    Panel(MACHINE, "Engine against trainer, ratio", _starts("rollout_ratio", "rollout_sequence")),
    Panel(MACHINE, "Engine against trainer, KL", _starts("rollout_kl")),
    Panel(MACHINE, "Mismatch: budget, corrections, causes", _starts("budget/", "correction/", "attribution/")),
    Panel(MACHINE, "Engine against trainer, experts: share that differs", _starts("routing_gap")),
    Panel(LEARNS, "Reflection words", _holds("reflection")),
    Panel(LEARNS, "Language consistency", _holds("consistency", "language")),
    Panel(LEARNS, "Pass rate", _holds("pass_rate", "difficulty")),
    Panel(MACHINE, "Longest response, tokens", lambda key: key == "response_length/max"),
    Panel(LEARNS, "Response length, tokens", _starts("response_length")),
    Panel(LEARNS, "Reward", _starts("reward")),
    Panel(LEARNS, "Loss", _holds("loss")),
    Panel(LEARNS, "Accuracy", _holds("accuracy", "margin")),
    Panel(MOVES, "Entropy", _starts("entropy")),
    Panel(MOVES, "KL to the reference", _starts("kl")),
    Panel(MOVES, "Clipped tokens, share", _starts("clip_fraction")),
    Panel(MOVES, "Ratio to the old policy", _starts("ratio")),
    Panel(MOVES, "Left without a signal, share", lambda key: key in ("uniform_groups", "truncated", "not_judged")),
    Panel(OPTIMISES, "Learning rate", lambda key: key == "lr"),
    Panel(OPTIMISES, "Gradient norm", _starts("grad_norm")),
)


def count_curves(stages: Sequence[StageView]) -> int:
    """Curves of a page, from which `points_each` is found."""
    return sum(len(_keys(stage.training_rows)) for stage in stages)


def points_each(curves: int) -> int:
    """Points that each of so many curves may have."""
    return max(60, min(POINTS, TOTAL // max(curves, 1)))


def sections(stage: StageView, points: int) -> list[Section]:
    """Every number that a training stage wrote, over its updates."""
    found = {title: Section(title, quiet=title == MACHINE) for title in SECTIONS}
    found[LEARNS].charts += _evaluations(stage.evaluation_rows)
    rows, taken = stage.training_rows, set()
    chosen: dict[tuple[str, str], list[str]] = {}
    for key in _keys(rows):
        panel = next((panel for panel in PANELS if panel.takes(key)), None)
        section, title = (panel.section, panel.title) if panel else (OPTIMISES, name(key.partition("/")[0]))
        chosen.setdefault((section, title), []).append(key)
    order = [(panel.section, panel.title) for panel in PANELS]
    # Reward and length first: the table of panels is in the order in which keys are recognised.
    order.sort(key=lambda place: _FIRST.index(place[1]) if place[1] in _FIRST else len(_FIRST))
    for section, title in [*order, *chosen]:
        keys = chosen.get((section, title))
        if not keys or (section, title) in taken:
            continue
        taken.add((section, title))
        values = {key: {row[key] for row in rows if _number(row.get(key)) is not None} for key in keys}
        if len(rows) > 1 and all(len(seen) == 1 for seen in values.values()):
            found[section].constants += [f"{name(key)} {figure(seen.pop())}" for key, seen in values.items()]
        else:
            found[section].charts.append(_curves(title, keys, rows, points))
    return [section for section in found.values() if section.charts or section.constants]


_FIRST = ("Loss", "Reward", "Response length, tokens", "Reflection words", "Language consistency")


def _keys(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Numbers of training rows, in the order in which they appear."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return [key for key in keys if key != "update" and any(_number(row.get(key)) is not None for row in rows)]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _curves(title: str, keys: Sequence[str], rows: Sequence[dict[str, Any]], points: int) -> Chart:
    columns: dict[str, list[Any]] = {"u": [], "s": [], "v": []}
    ends = ""
    labels = _labels(keys)
    for key, label in zip(keys, labels, strict=True):
        curve = [(row["update"], value) for row in rows if (value := _number(row.get(key))) is not None]
        for update, value in thinned(curve, points):
            columns["u"].append(update)
            columns["s"].append(label)
            columns["v"].append(rounded(value))
        ends = ends or f"{figure(curve[0][1])} → {figure(curve[-1][1])}"
    spec = _lines(tuple(labels), intervals=False)
    return Chart(title, ends if len(keys) == 1 else "", f"{title} over updates, {ends}", spec, columns)


def _labels(keys: Sequence[str]) -> list[str]:
    """Names of the lines of one chart: what their keys do not have in common. Vega reads dots and brackets as paths, so none is left."""
    prefixes = {key.partition("/")[0] for key in keys}
    shared = len(prefixes) == 1 and all("/" in key for key in keys)
    shown = [name(key.partition("/")[2] if shared else key) for key in keys]
    return [label.replace(".", "·").replace("[", "(").replace("]", ")").replace("'", "’").replace('"', "”") for label in shown]


def thinned(curve: Sequence[tuple[float, float]], points: int) -> list[tuple[float, float]]:
    """At most so many points: the means of updates and values over stretches of equal length; the last point stays as it is."""
    if len(curve) <= points:
        return list(curve)
    body, found = curve[:-1], []
    for index in range(points - 1):
        stretch = body[len(body) * index // (points - 1) : len(body) * (index + 1) // (points - 1)]
        found.append((round(sum(u for u, _ in stretch) / len(stretch)), sum(v for _, v in stretch) / len(stretch)))
    return [*found, curve[-1]]


def _evaluations(rows: Sequence[dict[str, Any]]) -> list[Chart]:
    """A chart for every metric with an interval, the suites as its lines."""
    if len({row["update"] for row in rows}) < 2:
        return []
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if isinstance(value, dict) and "ci95" in value)
    metrics: dict[str, list[str]] = {}
    for key in keys:
        suite, _, metric = key.removeprefix("eval/").partition("/")
        metrics.setdefault(metric, []).append(suite)
    charts = []
    for metric, suites in metrics.items():
        columns: dict[str, list[Any]] = {"u": [], "s": [], "v": [], "lo": [], "hi": []}
        for suite, label in zip(suites, _labels(suites), strict=True):
            for row in rows:
                value = row.get(f"eval/{suite}/{metric}")
                if value and value["value"] is not None:
                    numbers = (value["value"], *value["ci95"])
                    for column, item in zip(columns, (row["update"], label, *map(rounded, numbers)), strict=True):
                        columns[column].append(item)
        ends = f"{figure(columns['v'][0])} → {figure(columns['v'][-1])}" if len(suites) == 1 else ""
        title = f"Held out: {name(metric)}"
        spec = _lines(tuple(_labels(suites)), intervals=True)
        charts.append(Chart(title, ends, f"{title} over updates with 95 % intervals, {ends}", spec, columns))
    return charts


@cache
def _lines(labels: tuple[str, ...], intervals: bool) -> dict[str, Any]:
    """Lines over updates with a rule that follows the pointer; `labels` are all values of the column s."""
    x = alt.X("u:Q", title="update", axis=alt.Axis(tickCount=5, tickMinStep=1, format="~s", grid=False), scale=alt.Scale(nice=False))
    y = alt.Y("v:Q", title=None, axis=alt.Axis(tickCount=4, format="~g"), scale=alt.Scale(zero=False))
    legend = (
        None
        if len(labels) == 1
        else alt.Legend(title=None, orient="top", direction="horizontal", columns=2 if max(map(len, labels)) > 14 else 3, labelLimit=150)
    )
    colour = alt.Color("s:N", legend=legend, scale=alt.Scale(domain=list(labels), range=COLOURS))
    data = alt.Data(name="values")
    line = alt.Chart(data).mark_line(strokeWidth=1.6, point={"size": 14, "filled": True} if intervals else False)
    layers: list[alt.Chart] = [line.encode(x, y, colour)]
    if intervals:
        band = alt.Chart(data).mark_area(opacity=0.16)
        layers.insert(0, band.encode(x, alt.Y("lo:Q", title=None, scale=alt.Scale(zero=False)), alt.Y2("hi:Q"), colour))
    near = alt.selection_point(name="near", fields=["u"], nearest=True, on="pointermove", clear="pointerout", empty=False)
    hover = (
        alt.Chart(data)
        .transform_pivot("s", value="v", groupby=["u"])
        .mark_rule(color="var(--muted)", strokeDash=[2, 3])
        .encode(
            x=alt.X("u:Q"),
            opacity=alt.condition(near, alt.value(0.8), alt.value(0), empty=False),
            tooltip=[alt.Tooltip("u:Q", title="update"), *(alt.Tooltip(f"{label}:Q", format=".4~g") for label in labels)],
        )
        .add_params(near)
    )
    chart = alt.layer(*layers, hover).properties(width="container", height=150)
    return dict(chart.to_dict(validate=False))


@dataclass(frozen=True)
class Histogram:
    """Response lengths of one checkpoint: counts of right, wrong and not judged responses by bin."""

    label: str
    mean: float
    edges: list[float]
    right: list[int]
    wrong: list[int]
    unjudged: list[int]

    @property
    def total(self) -> int:
        """Responses in all."""
        return sum(self.right) + sum(self.wrong) + sum(self.unjudged)


def histograms(found: Sequence[Histogram]) -> list[Chart]:
    """Response lengths of the checkpoints of a suite, as shares of a checkpoint's responses, stacked by outcome, with the same axes."""
    highest = max((max(map(sum, zip(one.right, one.wrong, one.unjudged, strict=True))) / one.total for one in found), default=1.0)
    return [_histogram(one, rounded(highest, 3)) for one in found]


def _histogram(found: Histogram, highest: float) -> Chart:
    columns: dict[str, list[Any]] = {"a": [], "b": [], "s": [], "v": [], "n": []}
    for outcome, counts in (("right", found.right), ("wrong", found.wrong), ("not judged", found.unjudged)):
        for (low, high), count in zip(pairwise(found.edges), counts, strict=True):
            if count:
                for column, item in zip(columns, (low, high, outcome, rounded(count / found.total), count), strict=True):
                    columns[column].append(item)
    return Chart(
        found.label,
        f"mean {figure(found.mean)}",
        f"Response lengths of {found.label}, mean {figure(found.mean)} tokens",
        _bars(found.edges[0], found.edges[-1], highest),
        columns,
    )


@cache
def _bars(low: float, high: float, highest: float) -> dict[str, Any]:
    bars = (
        alt.Chart(alt.Data(name="values"))
        .mark_bar(binSpacing=1)
        .encode(
            x=alt.X(
                "a:Q",
                bin="binned",
                title="tokens",
                scale=alt.Scale(domain=[low, high], nice=False),
                axis=alt.Axis(tickCount=6, format="~s", grid=False),
            ),
            x2="b:Q",
            y=alt.Y("v:Q", title=None, stack="zero", scale=alt.Scale(domain=[0, highest]), axis=alt.Axis(tickCount=3, format="~%")),
            color=alt.Color(
                "s:N",
                legend=None,
                scale=alt.Scale(domain=["right", "wrong", "not judged"], range=["var(--right)", "var(--wrong)", "var(--s6)"]),
            ),
            tooltip=[
                alt.Tooltip("a:Q", title="from"),
                alt.Tooltip("b:Q", title="to below"),
                alt.Tooltip("s:N", title="answer"),
                alt.Tooltip("n:Q", title="responses"),
            ],
        )
        .properties(width="container", height=90)
    )
    return dict(bars.to_dict(validate=False))
