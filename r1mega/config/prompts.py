"""Where questions come from, and how they are shown to a model."""

from typing import Annotated, Any, Literal

from pydantic import Field

from r1mega.config.base import Closed, FilePath, FolderPath


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
    task: Literal["running_sum"] = Field(description="running_sum: add six digits modulo ten, in one of two languages")
    size: int = Field(20_000, ge=1, description="how many problems to draw")
    seed: int = Field(0, description="seed of the problems")


Prompts = Annotated[JsonlPrompts | ParquetPrompts | DatasetPrompts | GymPrompts | TinyPrompts, Field(discriminator="kind")]


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
