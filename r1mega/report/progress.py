"""Progress in the terminal: one line per stage while it moves, plain lines where there is no terminal."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bars
from rich.table import Column

_PLAIN_INTERVAL_S = 5.0


class Progress:
    """Shows where a run stands. Rank 0 has the terminal; other ranks get `Progress.silent`.

    Args:
        stages: names of all stages in order.
        console: where to show; lines that move need a terminal, anything else gets a plain line every few seconds.
    """

    def __init__(self, stages: Sequence[str], console: Console) -> None:
        self._console = console
        self._bars = Bars(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[pace]}", style="cyan"),
            # In a narrow terminal the figures are cut, never the name or the bar.
            TextColumn("{task.fields[values]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
            console=console,
            expand=True,
            refresh_per_second=4,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live = console.is_terminal
        width = max((len(name) for name in stages), default=0)
        self._tasks: dict[str, TaskID] = {
            name: self._bars.add_task(name.ljust(width), total=None, start=False, pace="", values="", visible=False) for name in stages
        }
        self._name = ""
        self._pace: deque[tuple[float, int]] = deque(maxlen=32)
        self._printed = 0.0

    @classmethod
    def silent(cls) -> "Progress":
        """Progress that shows nothing."""
        return cls((), Console(quiet=True, force_terminal=False))

    def __enter__(self) -> "Progress":
        if self._live:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._bars.stop()

    def begin(self, name: str, kind: str) -> None:
        """A stage starts."""
        self._name = name
        self._pace.clear()
        if self._live:
            self._bars.update(self._tasks[name], visible=True)
            self._bars.start_task(self._tasks[name])
        else:
            self._console.print(f"{name}: {kind} begins", highlight=False, markup=False)

    def update(self, done: int, total: int, values: Mapping[str, float]) -> None:
        """The current stage has done `done` of `total` updates; `values` are its figures of the moment."""
        now = time.monotonic()
        self._pace.append((now, done))
        pace, text = self._describe_pace(total), "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self._live and self._name in self._tasks:
            self._bars.update(self._tasks[self._name], completed=done, total=total, pace=pace, values=text)
        elif done >= total or now - self._printed >= _PLAIN_INTERVAL_S:
            self._printed = now
            line = "  ".join(part for part in (f"{self._name}: {done}/{total}", pace, text) if part)
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def end(self, name: str, wall_s: float, values: Mapping[str, float]) -> None:
        """A stage is finished."""
        text = "  ".join(f"{key} {value:.4g}" for key, value in values.items())
        if self._live:
            task = self._bars.tasks[self._tasks[name]]
            total = task.total or 1
            self._bars.update(task.id, completed=total, total=total, pace="", values=text, visible=True)
        else:
            self._console.print(f"{name}: finished in {wall_s:.1f} s  {text}".rstrip(), highlight=False, markup=False, soft_wrap=True)

    def skip(self, name: str) -> None:
        """A stage was finished by an earlier start of this run."""
        self._console.print(f"{name}: finished earlier", highlight=False, markup=False)

    def _describe_pace(self, total: int) -> str:
        (first_time, first), (last_time, last) = self._pace[0], self._pace[-1]
        if last <= first or last_time <= first_time:
            return ""
        per_second = (last - first) / (last_time - first_time)
        rate = f"{per_second:.2f}/s" if per_second >= 0.1 else f"{1 / per_second:.1f} s each"
        minutes, seconds = divmod(int((total - last) / per_second), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{rate}  eta {hours}:{minutes:02d}:{seconds:02d}" if hours else f"{rate}  eta {minutes}:{seconds:02d}"


@contextmanager
def bytes_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar for bytes, gone at the end; yields the function that is told of each lot. Nothing where there is no terminal."""
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(what, total=total)
        yield lambda nbytes: bars.advance(task, nbytes)
