"""The run's page: one HTML file that shows a run to people, and needs nothing but a browser."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import r1mega
from r1mega.config import yaml
from r1mega.errors import UserError
from r1mega.pipeline import files
from r1mega.report.page import graph, names
from r1mega.report.page.run import RunView, StageView, read_run
from r1mega.report.page.table import tables

if TYPE_CHECKING:
    from r1mega.report.page.charts import Chart, Section


def write_page(run_dir: Path, target: Path | None = None) -> Path:
    """Write the page of a run, finished or not, and return where it is: `target`, or `report.html` in the run directory.

    Raises:
        UserError: the folder is no run directory, the file cannot be written, or the extra `report` is not installed.
    """
    target = target or run_dir / "report.html"
    view = read_run(run_dir)
    files.check_writable(target, "report")
    files.write_atomic(target, render(view))
    return target


def render(view: RunView) -> str:
    """The page as text."""
    try:
        import altair as alt
        import vl_convert
    except ImportError as error:
        raise UserError(f"the page needs {error.name}; install the extra: pip install 'r1mega[report]'") from None
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from r1mega.report.page import charts, samples

    suites = samples.collect(view)
    points = charts.points_each(charts.count_curves(view.stages))
    drawn = _Drawn()
    curves = [
        (stage, [_section(section, drawn) for section in charts.sections(stage, points)]) for stage in view.stages if not stage.measures
    ]
    lengths = [(suite.name, [drawn.add(chart) for chart in charts.histograms(suite.lengths)]) for suite in suites if suite.lengths]
    environment = Environment(
        loader=PackageLoader("r1mega.report.page", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"figure": names.figure, "duration": names.duration, "yaml": yaml.dump, "short": lambda digest: digest[:12]}
    pipeline = graph.build(view)
    vega = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", ".".join(alt.SCHEMA_VERSION.lstrip("v").split(".")[:2]))
    return environment.get_template("page.html").render(
        view=view,
        recipe=view.run.recipe,
        facts=_facts(view),
        graph=pipeline,
        rows=[pipeline.row(index) for index in range(len(pipeline.nodes))],
        headline=headline,
        kinds=names.KINDS,
        states=_STATES,
        asdict=asdict,
        row_height=graph.HEIGHT,
        tables=tables(view),
        curves=[(stage, sections) for stage, sections in curves if sections],
        points=points,
        lengths=lengths,
        suites=suites,
        charts=_script({"specs": drawn.specs, "charts": drawn.charts}),
        samples=_script([suite.data for suite in suites]),
        css=_asset("page.css"),
        # The end of a script is found before it is parsed, also in a string.
        vega=vega.replace("</script", "<\\/script"),
        js=_asset("page.js"),
        version=r1mega.__version__,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


_STATES = {"finished": "finished", "running": "running", "stopped": "stopped", "waiting": "not started"}


class _Drawn:
    """The charts of a page, numbered: what the template places by number the script draws."""

    def __init__(self) -> None:
        self.specs: list[dict[str, Any]] = []
        self.charts: list[dict[str, Any]] = []

    def add(self, chart: "Chart") -> dict[str, Any]:
        if chart.spec not in self.specs:
            self.specs.append(chart.spec)
        self.charts.append({"spec": self.specs.index(chart.spec), "description": chart.description, "columns": chart.columns})
        return {"number": len(self.charts) - 1, "title": chart.title, "ends": chart.ends}


def _section(section: "Section", drawn: _Drawn) -> dict[str, Any]:
    return {
        "title": section.title,
        "quiet": section.quiet,
        "constants": section.constants,
        "charts": [drawn.add(chart) for chart in section.charts],
    }


def headline(stage: StageView) -> str:
    """The figure of a stage, before and after: pass@1 where it was measured, else what its training rows say first."""
    if stage.measures:
        models = len({row.get("model") for row in stage.evaluation_rows})
        return f"{models} of {len(stage.config['models'])} models measured" if stage.rows else ""
    passed = [(key, value) for row in stage.evaluation_rows for key, value in row.items() if key.endswith("/pass@1") and value]
    if passed:
        first = passed[0][0]
        values = [value["value"] for key, value in passed if key == first and value["value"] is not None]
        return "pass@1 " + " → ".join(names.figure(value) for value in dict.fromkeys((values[0], values[-1])))
    for key in _HEADLINES:
        trained = [row[key] for row in stage.rows if row.get(key) is not None]
        if trained:
            return f"{names.name(key)} " + " → ".join(names.figure(value) for value in dict.fromkeys((trained[0], trained[-1])))
    numbers = [(key, value) for key, value in (stage.made.metrics if stage.made else {}).items() if isinstance(value, int | float)]
    return ", ".join(f"{names.name(key)} {names.figure(value)}" for key, value in numbers[:1])


_HEADLINES = ("pass_rate", "reward/mean", "accuracy", "loss")


def _facts(view: RunView) -> Sequence[tuple[str, str]]:
    """What is true of the whole run, as far as its finished stages tell."""
    recipe, made = view.run.recipe, [stage.made for stage in view.stages if stage.made]
    facts = [("stages", f"{len(made)} of {len(view.stages)} finished"), ("seed", str(recipe.seed))]
    if made:
        facts.append(("wall time", names.duration(sum(stage.wall_s for stage in made))))
        facts.append(("ranks", f"{made[-1].ranks} on {made[-1].platform.upper()}"))
        codes = list(dict.fromkeys(_code(stage.code) for stage in made))
        facts.append(("code", codes[-1] if len(codes) == 1 else f"{codes[0]} to {codes[-1]}"))
        facts.append(("ended", made[-1].finished[:16].replace("T", " ") + " UTC"))
    return facts


def _code(code: dict[str, Any]) -> str:
    commit = code.get("commit")
    return f"{commit[:10]}{' with changes' if code.get('modified') else ''}" if commit else f"r1mega {code['r1mega']}"


def _script(value: Any) -> str:
    """JSON inside a script element: nothing in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _asset(name: str) -> str:
    return (resources.files("r1mega.report.page") / name).read_text(encoding="utf-8")
