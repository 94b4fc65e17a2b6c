"""What a stage is given."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1mega.config.chats import Chats, StageChats
from r1mega.config.layout import Layout
from r1mega.config.schema import Recipe
from r1mega.config.stages import Stage
from r1mega.pipeline.metrics import MetricsWriter
from r1mega.pipeline.rundir import RunDirectory
from r1mega.report.progress import Progress
from r1mega.rollout.pool import Engines


class Stopped(Exception):
    """Every rank leaves the stage: it was asked to stop, and has saved what it goes on from."""


@dataclass(frozen=True)
class StageContext:
    """One stage on one rank: what to do, from what, and where results go."""

    run: RunDirectory
    name: str
    rank: int
    world_size: int
    metrics: MetricsWriter
    """Rows of `metrics.jsonl`; does nothing on ranks other than 0."""
    progress: Progress
    """The terminal; silent on ranks other than 0."""
    engines: Engines
    """Of the whole run."""
    stop_file: Path | None = None
    """The launcher makes this file when it is asked to stop, by whoever started it or before a time limit; None where it never is."""

    def stop_asked(self) -> bool:
        """Whether the stage is to save and raise `Stopped`. The same on every rank, each of which must ask."""
        from r1mega.pipeline import ranks

        stop_file = self.stop_file
        return stop_file is not None and ranks.shared(stop_file.exists)

    @property
    def recipe(self) -> Recipe:
        """The whole recipe."""
        return self.run.recipe

    @property
    def stage(self) -> Stage:
        """This stage's configuration."""
        return self.recipe.stages[self.name]

    @property
    def dir(self) -> Path:
        """The stage's folder, the same on every rank; checkpoints and saved batches go here."""
        return self.run.stage_dirs[self.name]

    @property
    def seed(self) -> int:
        """The stage's seed, or the recipe's."""
        return self.recipe.seed if self.stage.seed is None else self.stage.seed

    @property
    def layout(self) -> Layout:
        """The stage's layout, or the recipe's."""
        return self.stage.layout or self.recipe.layout

    def model_dir(self, reference: str) -> Path:
        """The Hugging Face folder a `model` key means; UserError when it is missing or its stage is not finished."""
        return self.run.model(reference)

    def reward_model_dir(self, reference: str) -> Path:
        """The folder of a reward model; UserError when it is missing or its stage is not finished."""
        return self.run.reward_model(reference)

    def chats(self, chats: Chats) -> Chats:
        """A source of conversations with the folder in place of a stage's name; UserError when that stage is not finished."""
        return chats.model_copy(update={"stage": str(self.run.dataset(chats.stage))}) if isinstance(chats, StageChats) else chats

    @contextmanager
    def artifact(self) -> Iterator[Path]:
        """Yield a new folder that becomes the stage's artifact when the block ends without an error.

        May be entered on rank 0 alone or on every rank; all get the same path, and rank 0 makes and renames it.
        Ranks that write into it themselves meet at a barrier after entering and before leaving.
        """
        temporary, final = self.dir / ".artifact.tmp", self.dir / "artifact"
        if self.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        yield temporary
        if self.rank == 0:
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)


StageFunction = Callable[[StageContext], dict[str, Any]]
"""A stage: called on every rank, returns its summary metrics (rank 0's are recorded)."""
