"""The run's page, in a real headless Chromium."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright
from run_fixture import HOSTILE, make_run

from r1mega import cli
from r1mega.report.page import charts, graph, write_page
from r1mega.report.page.names import duration, figure, rounded
from r1mega.report.page.run import read_run

SIZES = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}

CONTRAST = """() => {
  const parse = (colour) => { const c = document.createElement("canvas"); c.width = c.height = 1; const x = c.getContext("2d");
    x.fillStyle = colour; x.fillRect(0, 0, 1, 1); return [...x.getImageData(0, 0, 1, 1).data]; };
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255).map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (node) => { for (let at = node; at; at = at.parentElement) {
    const colour = parse(getComputedStyle(at).backgroundColor); if (colour[3] === 255) return colour; } return parse("white"); };
  const wrong = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const node = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || !node.checkVisibility() || node.closest("script, style, button:disabled, .skip")) continue;
    const style = getComputedStyle(node);
    const [a, b] = [light(parse(node.closest("svg") ? style.fill : style.color)), light(ground(node))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) wrong.push([((a + 0.05) / (b + 0.05)).toFixed(2), texts.currentNode.data.trim().slice(0, 40)]);
  }
  return wrong;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
    if path is None:
        pytest.fail("no Chromium on this machine; install it: apt-get install chromium (tools/install_system does)")
    with sync_playwright() as playwright:
        # Chromium refuses to be root inside its own sandbox.
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("page") / "run"
    make_run(run, thought=HOSTILE)
    assert cli.main(["report", str(run)]) == 0
    return run / "report.html"


@pytest.fixture
def page(browser: Browser, report: Path, request: pytest.FixtureRequest) -> Iterator[Page]:
    """The open page, on a screen `<size> <scheme>`. Whatever it says to the console or asks of the world fails the test."""
    size, scheme = getattr(request, "param", "desktop light").split()
    context = browser.new_context(viewport=SIZES[size], color_scheme=scheme)
    opened = context.new_page()
    said: list[str] = []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    asked: list[str] = []
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(report.as_uri())
    yield opened
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [report.as_uri()]
    context.close()


def draw(page: Page) -> None:
    page.evaluate("Promise.all(plots.filter((plot) => plot.offsetParent).map(draw)).then(() => null)")


@pytest.mark.parametrize("page", ["desktop light", "desktop dark", "phone light", "phone dark"], indirect=True)
def test_charts_are_drawn_and_text_is_readable(page: Page, request: pytest.FixtureRequest) -> None:
    """Curves that change have marks, in the colours of the page; every text stands out 4.5 : 1; nothing is wider than the page."""
    draw(page)
    drawn = page.evaluate(
        "plots.filter((p) => p.offsetParent).map((p) => p.querySelectorAll('.mark-line path[d], .mark-rect path[d]').length)"
    )
    assert len(drawn) >= 10 and all(drawn)
    page.evaluate("document.querySelectorAll('details').forEach((node) => { node.open = true; })")
    draw(page)
    assert page.evaluate(CONTRAST) == []
    assert page.evaluate("document.documentElement.scrollWidth") == page.viewport_size["width"]  # type: ignore[index]
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", dark)[0]) < 60) == ("dark" in request.node.name)
    page.locator("#theme").click()
    assert int(re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[0]) > 200  # light was asked for


@pytest.mark.parametrize("page", ["desktop dark", "phone light"], indirect=True)
def test_samples_are_browsed(page: Page) -> None:
    """Base is right on one prompt, the last checkpoint on seven: the first comparison offered, and the filters agree with it."""
    samples = page.locator("#samples")
    sides = [side.locator("select").first for side in samples.locator(".side").all()]
    assert [side.evaluate("(s) => s.selectedOptions[0].text") for side in sides] == ["Base", "R1"]
    assert samples.locator(".place").text_content() == "1 of 24"
    assert samples.locator(".thought").first.text_content() == f"thoughtso 0 wait ze 0 {HOSTILE}"
    assert samples.locator("mark").first.text_content() == "reflection" and samples.locator(".thought mark").first.text_content() == "wait"
    assert samples.locator(".thought .b").first.text_content() == "ze"
    samples.get_by_text("Next →").click()
    assert "en 1 + 0 :" in (samples.locator(".question").text_content() or "")
    assert samples.locator(".verdict").all_text_contents() == ["✗ wrong", "✓ right"]
    page.keyboard.press("ArrowLeft")
    assert samples.locator(".place").text_content() == "1 of 24"
    samples.get_by_label("Answers on the left").select_option("wrong")
    samples.get_by_label("Answers on the right").select_option("right")
    assert samples.locator(".place").text_content() == "1 of 18"
    samples.get_by_label("Checkpoint on the right").select_option("0")
    assert samples.locator(".empty").is_visible()
    assert page.evaluate("window.harmed") is None


def test_stages_are_chosen_with_the_keyboard(page: Page) -> None:
    tabs = page.get_by_role("tab")
    assert tabs.all_text_contents() == ["zero", "dev1", "helpful", "r1"]
    tabs.first.focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.textContent") == "dev1"
    assert page.locator("h3.stage:visible").all_text_contents()[0].startswith("dev1")
    draw(page)
    page.emulate_media(media="print", color_scheme="dark")
    assert page.locator("h3.stage:visible").count() == 4
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(252, 251, 248)"


def test_the_file_is_small_and_an_unfinished_run_has_one_too(browser: Browser, report: Path, tmp_path: Path) -> None:
    assert report.stat().st_size < 2_000_000
    make_run(tmp_path / "run", finished=2)
    path = write_page(tmp_path / "run", tmp_path / "half.html")
    page = browser.new_page()
    page.goto(path.as_uri())
    # No process holds the lock of this run, whatever its summary says.
    assert page.locator(".status").text_content() == "interrupted"
    assert page.locator(".node").evaluate_all("(nodes) => nodes.map((node) => node.className)") == [
        *("node outside", "node finished", "node finished", "node stopped", "node waiting", "node waiting", "node waiting")
    ]
    page.close()


def test_the_graph_is_that_of_the_recipe(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    found = graph.build(read_run(tmp_path / "run"))
    labels = [node.label for node in found.nodes]
    assert labels == ["base", "zero", "cold-start", "dev1", "helpful", "r1", "table"]
    assert {(labels[edge.source], labels[edge.target], edge.what) for edge in found.edges} == {
        *(("base", "zero", "model"), ("zero", "cold-start", "model"), ("base", "dev1", "model"), ("cold-start", "dev1", "dataset")),
        *(("dev1", "helpful", "model"), ("dev1", "r1", "model"), ("helpful", "r1", "reward_model")),
        *(("base", "table", "measures"), ("zero", "table", "measures"), ("r1", "table", "measures")),
    }
    # An artifact in use keeps its lane to itself: dev1 takes over the base's, which ends there, and helpful stands beside it.
    assert found.lanes == [0, 1, 1, 0, 1, 0, 2]


def test_many_updates_are_averaged_and_figures_are_short() -> None:
    curve = [(float(update), update * 2.0) for update in range(10_000)]
    thin = charts.thinned(curve, 300)
    assert len(thin) == 300 and thin[-1] == curve[-1] and thin == sorted(thin)
    assert all(abs(value - 2 * update) <= 1 for update, value in thin)
    assert [figure(value) for value in (0.97891, 18.0, 5.0859, 123.456, 1e-7, 0.0, None)] == [
        *("0.979", "18", "5.086", "123.5", "1.00e-7", "0.000", "–")
    ]
    assert [duration(seconds) for seconds in (0.2, 74, 700, 12_000, 200_000)] == ["1 s", "74 s", "12 min", "3 h 20 min", "2 d 7 h"]
    assert rounded(0.123456) == 0.1235 and rounded(18.0) == 18


def test_what_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run", finished=0)
    for arguments, message in [
        ([str(tmp_path)], "is not a run directory"),
        ([str(tmp_path / "run"), "-o", str(tmp_path / "none/report.html")], "cannot be written"),
        ([str(tmp_path / "run"), "-o", str(tmp_path)], "is a folder"),
    ]:
        assert cli.main(["report", *arguments]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
