"""Everything a recipe can say: here the recipe itself, in the modules beside it its parts.

One class per thing, closed: an unknown key is an error. Fields carry their unit and meaning in `description`, which is what
`r1mega explain KEY` prints.
"""

from typing import Literal

from pydantic import Field

from r1mega.config.base import Closed, FolderPath
from r1mega.config.deadlines import Deadlines
from r1mega.config.layout import Layout
from r1mega.config.rollout import Rollout
from r1mega.config.stages import Stage


class Run(Closed):
    """The processes of a run."""

    platform: Literal["cpu", "cuda"] = Field("cpu", description="what ranks compute on")
    ranks: int = Field(1, ge=1, description="processes that r1mega run starts on this machine")
    judges: int = Field(1, ge=1, description="processes that judge responses, beside every rank")
    threads_per_rank: int = Field(1, ge=1, description="BLAS threads of each process on a CPU")
    deadlines: Deadlines = Field(default_factory=Deadlines, description="how long ranks may be in a phase before the run hangs")


class Recipe(Closed):
    """A whole run: a graph of stages that exchange artifacts."""

    name: str = Field(description="name of the run: letters, digits, '-' and '_'")
    description: str = Field("", description="a line for people")
    seed: int = Field(1, description="seed of everything random; a stage may have its own")
    run: Run = Run()
    layout: Layout = Layout()
    rollout: Rollout = Rollout()
    models: dict[str, FolderPath] = Field(
        default_factory=dict, description="Hugging Face folders by name; where a stage asks for a model, the name stands for the folder"
    )
    stages: dict[str, Stage] = Field(min_length=1, description="stages by name, run in this order; a stage reads what earlier ones made")
