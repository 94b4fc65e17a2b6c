"""Where questions come from, and how they are shown to a model."""

from datetime import date
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from r1mega.config.base import Closed, DataPath, FilePath, FolderPath


class JsonlPrompts(Closed):
    """One JSON object a line."""

    kind: Literal["jsonl"]
    path: FilePath = Field(description="file of JSON lines; relative paths are relative to the recipe")
    prompt: str = Field("prompt", description="field that holds the question, a string or a list of chat messages")
    answer: str = Field("answer", description="field that holds the reference answer; may be absent from rows whose reward needs none")


class ParquetPrompts(Closed):
    """Rows of a Parquet file."""

    kind: Literal["parquet"]
    path: FilePath = Field(description="Parquet file")
    prompt: str = Field("prompt", description="column that holds the question")
    answer: str = Field("answer", description="column that holds the reference answer")


class DatasetPrompts(Closed):
    """A Hugging Face dataset saved on disk (`Dataset.save_to_disk`)."""

    kind: Literal["dataset"]
    path: FolderPath = Field(description="folder of the saved dataset")
    split: str | None = Field(None, description="split to read when the folder holds a DatasetDict")
    prompt: str = Field("prompt", description="column that holds the question")
    answer: str = Field("answer", description="column that holds the reference answer")


class GymPrompts(Closed):
    """A procedural task of the `reasoning-gym` package."""

    kind: Literal["reasoning_gym"]
    task: str = Field(description="name of the reasoning-gym dataset, such as 'chain_sum'")
    size: int = Field(10_000, ge=1, description="how many problems to draw")
    seed: int = Field(0, description="seed of the problems")
    options: dict[str, Any] = Field(default_factory=dict, description="options handed to reasoning_gym.create_dataset")


class TinyPrompts(Closed):
    """A procedural task of r1mega's own tiny language."""

    kind: Literal["tiny"]
    task: Literal["running_sum", "signs", "errand", "rude_errand"] = Field(
        description="running_sum: add six digits modulo ten, in one of two languages; signs: find three signs that make a sum right; "
        "errand: greet or repeat; rude_errand: what to refuse"
    )
    size: int = Field(20_000, ge=1, description="how many problems to draw")
    seed: int = Field(0, description="seed of the problems")


class BenchmarkPrompts(Closed):
    """A published benchmark, its rows as they are on the Hugging Face hub (docs/benchmarks.md)."""

    kind: Literal["benchmark"]
    name: Literal["aime_2024", "math_500", "gpqa_diamond", "livecodebench", "codeforces", "ifeval"] = Field(description="which benchmark")
    path: DataPath = Field(description="its rows: a file (.jsonl, .parquet, .csv), a folder of such files, or one of Dataset.save_to_disk")
    split: str | None = Field(None, description="split to read when a saved folder holds several")
    first_day: str | None = Field(None, description="livecodebench: leave out contests before this day, such as 2024-08-01")
    last_day: str | None = Field(None, description="livecodebench: leave out contests after this day")

    @model_validator(mode="after")
    def _days(self) -> "BenchmarkPrompts":
        for day in (self.first_day, self.last_day):
            if day is None:
                continue
            if self.name != "livecodebench":
                raise ValueError(f"{self.name} has no contests' days; leave out first_day and last_day")
            try:
                date.fromisoformat(day)
            except ValueError:
                raise ValueError(f"expected a day such as 2024-08-01, got {day!r}") from None
        return self


Prompts = Annotated[
    JsonlPrompts | ParquetPrompts | DatasetPrompts | GymPrompts | TinyPrompts | BenchmarkPrompts, Field(discriminator="kind")
]


class PromptSet(Closed):
    """Prompts, the part of them to use, and how they are shown to the model."""

    source: Prompts = Field(description="where the questions come from")
    split: Literal["train", "heldout", "all"] = Field(
        "train", description="prompts are divided by a hash of their text, so train and heldout never share a question"
    )
    heldout_fraction: float = Field(0.1, ge=0, lt=1, description="share of the questions that belong to heldout")
    template: Literal["none", "r1_zero", "chat"] = Field(
        "none", description="none: the bare text; r1_zero: the conversation preamble of the R1 paper; chat: the tokenizer's chat template"
    )
    limit: int | None = Field(None, ge=1, description="use only the first so many prompts")
