"""The graph of artifacts, drawn like a map of lines: one row a stage, one line an artifact from where it is made to where it is last used.

Rows are in the recipe's order, in which every artifact comes before its uses. Folders from outside the run get a row above their first use.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from r1mega.config.base import PathMark
from r1mega.config.tree import marked
from r1mega.pipeline import files
from r1mega.report.page.run import RunView, StageView

What = Literal["model", "dataset", "reward_model", "measures"]

HEIGHT, PITCH, MARGIN, CORNER = 64, 20, 16, 9
"""Of a row, between lines, beside the outer lines, of a line's turns; pixels."""

_MAKES: Mapping[str, What] = {"rejection": "dataset", "preference": "reward_model", "evaluate": "measures"}


@dataclass(frozen=True)
class Edge:
    """An artifact that a stage reads."""

    source: int
    target: int
    what: What
    """What the artifact is; `measures` where the target only measures it."""
    key: str
    """Key path of the reference in the stage, such as `teacher`."""


@dataclass(frozen=True)
class Node:
    """A row: a stage, or a folder from outside the run."""

    label: str
    what: What
    """What it makes."""
    stage: StageView | None
    path: str = ""
    record: dict[str, Any] | None = None
    """Of a folder from outside: the provenance.json in it."""


@dataclass(frozen=True)
class Graph:
    """Nodes in order of rows, their edges, and the lane each node stands on."""

    nodes: list[Node]
    edges: list[Edge]
    lanes: list[int]

    @property
    def width(self) -> int:
        """Pixels that the lines take."""
        return 2 * MARGIN + PITCH * max([*self.lanes, *self._buses().values()], default=0)

    def row(self, index: int) -> "Row":
        """What is drawn beside one row."""
        buses, middle = self._buses(), HEIGHT / 2
        x = _x(self.lanes[index])
        paths = [(self.nodes[lane].what, f"M{_x(self.lanes[lane])} 0V{HEIGHT}") for lane in self._through(index)]
        for edge in (edge for edge in self.edges if edge.target == index and edge.what != "measures"):
            paths.append((edge.what, _turn(_x(self.lanes[edge.source]), x, middle)))
        if self._last(index) > index:
            paths.append((self.nodes[index].what, f"M{x} {middle}V{HEIGHT}"))
        for target, lane in buses.items():
            measured = [edge.source for edge in self.edges if edge.target == target]
            if index in measured:
                end = _x(lane)
                # The first one goes on to the bottom; the others join a line that passes here already, and dots drawn twice would blur.
                down = HEIGHT if index == min(measured) else middle + CORNER
                paths.append(("measures", f"M{x} {middle}H{end - CORNER}Q{end} {middle} {end} {middle + CORNER}V{down}"))
            if min(measured, default=target) < index <= target:
                paths.append(("measures", f"M{_x(lane)} 0V{middle if index == target else HEIGHT}"))
        below = [(self.nodes[lane].what, _x(self.lanes[lane])) for lane in range(index + 1) if self._last(lane) > index]
        below += [("measures", _x(lane)) for target, lane in buses.items() if self._first(target) <= index < target]
        return Row(self.nodes[index], x, paths, below, [edge for edge in self.edges if edge.target == index])

    def _through(self, index: int) -> list[int]:
        return [source for source in range(index) if self._last(source) > index]

    def _last(self, source: int) -> int:
        return max((edge.target for edge in self.edges if edge.source == source and edge.what != "measures"), default=source)

    def _first(self, target: int) -> int:
        return min((edge.source for edge in self.edges if edge.target == target), default=target)

    def _buses(self) -> dict[int, int]:
        """The lane of each stage that measures: right of the others, since what it reads goes on elsewhere."""
        return {index: self.lanes[index] for index, node in enumerate(self.nodes) if node.what == "measures"}


@dataclass(frozen=True)
class Row:
    """A node, its place and the lines that pass it; coordinates in pixels, `below` those that go on under it."""

    node: Node
    x: int
    paths: list[tuple[What, str]]
    below: list[tuple[What, int]]
    reads: list[Edge]


def build(view: RunView) -> Graph:
    """The graph of a run, straight from its recipe."""
    nodes: list[Node] = []
    edges: list[Edge] = []
    place: dict[str, int] = {}
    for stage in view.stages:
        found = [
            (path, mark.what, reference)
            for path, mark, reference in marked(view.run.recipe.stages[stage.name], PathMark)
            if mark.names_stage
        ]
        for _, what, reference in found:
            if reference not in place:
                place[reference] = len(nodes)
                nodes.append(_outside(view, reference, what))  # type: ignore[arg-type]
        place[stage.name] = len(nodes)
        nodes.append(Node(stage.name, _MAKES.get(stage.kind, "model"), stage))
        for path, what, reference in found:
            edges.append(Edge(place[reference], place[stage.name], "measures" if stage.measures else what, path))  # type: ignore[arg-type]
    return Graph(nodes, edges, _lanes(nodes, edges))


def _outside(view: RunView, reference: str, what: What) -> Node:
    path = Path(reference)
    named = next((name for name, folder in view.run.recipe.models.items() if folder == reference), path.name)
    shown = path.relative_to(Path.cwd()).as_posix() if path.is_relative_to(Path.cwd()) else reference
    return Node(named or reference, what, None, shown, files.read_json(path / "provenance.json") if path.is_dir() else None)


def _lanes(nodes: list[Node], edges: list[Edge]) -> list[int]:
    """A lane for every node: that of a model which ends here, else the leftmost free one. Stages that measure stand right of all."""
    lanes: list[int] = []
    busy: dict[int, int] = {}
    for index, node in enumerate(nodes):
        if node.what == "measures":
            lanes.append(-1)
            continue
        busy = {lane: until for lane, until in busy.items() if until > index}
        ending = [lanes[edge.source] for edge in edges if edge.target == index and edge.what == "model" and lanes[edge.source] not in busy]
        lane = next((lane for lane in ending if lane >= 0), None)
        if lane is None:
            lane = next(lane for lane in range(len(nodes)) if lane not in busy)
        lanes.append(lane)
        busy[lane] = max((edge.target for edge in edges if edge.source == index and edge.what != "measures"), default=index)
    right = max(lanes, default=0) + 1
    for index, node in enumerate(nodes):
        if node.what == "measures":
            lanes[index] = right
            right += 1
    return lanes


def _x(lane: int) -> int:
    return MARGIN + PITCH * lane


def _turn(start: int, end: int, middle: float) -> str:
    """From the top of a row at `start` down and sideways into the node at `end`."""
    if start == end:
        return f"M{start} 0V{middle}"
    side = CORNER if end > start else -CORNER
    return f"M{start} 0V{middle - CORNER}Q{start} {middle} {start + side} {middle}H{end}"
