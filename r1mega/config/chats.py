"""Answered conversations: what supervised training and reward models learn from."""

from typing import Annotated, Literal

from pydantic import Field

from r1mega.config.base import Closed, DatasetPath, FilePath, RewardFunction
from r1mega.config.prompts import PromptSet

# ---------------------------------------------------------------- conversations


class StageChats(Closed):
    """What a rejection stage of this recipe kept."""

    kind: Literal["stage"]
    stage: DatasetPath = Field(description="name of the stage, or a folder that such a stage of another run left")
    limit: int | None = Field(None, ge=1, description="use only the first so many conversations")


class FileChats(Closed):
    """A JSONL or Parquet file of conversations."""

    kind: Literal["file"]
    path: FilePath = Field(description="file of JSON lines, or Parquet file by its suffix .parquet")
    messages: str = Field("messages", description="field that holds the list of chat messages, each {'role': ..., 'content': ...}")
    limit: int | None = Field(None, ge=1, description="use only the first so many conversations")


class TinyChats(Closed):
    """Supervised conversations of the tiny language: requests that are no reasoning problems."""

    kind: Literal["tiny"]
    task: Literal["errand"] = Field(description="errand: greet, take leave or repeat, politely; refuse what is rude")
    size: int = Field(2_000, ge=1, description="how many conversations to draw")
    polite_share: float = Field(0.5, ge=0, le=1, description="share of the answers that end politely")
    safe_share: float = Field(0.7, ge=0, le=1, description="share of the rude requests that are refused")
    heldout_fraction: float = Field(
        0.1, ge=0, lt=1, description="share of the questions that no conversation holds; the same as the prompts'"
    )
    seed: int = Field(0, description="seed of the conversations")


Chats = Annotated[StageChats | FileChats | TinyChats, Field(discriminator="kind")]


# ---------------------------------------------------------------- preferences


class FilePreferences(Closed):
    """A JSONL or Parquet file of judged answers, in the field names that TRL and most published sets use."""

    kind: Literal["file"]
    path: FilePath = Field(description="file of JSON lines, or Parquet file by its suffix .parquet")
    prompt: str = Field("prompt", description="field that holds the question, a string or a list of chat messages")
    chosen: str = Field("chosen", description="field that holds the better answer (pairwise)")
    rejected: str = Field("rejected", description="field that holds the worse answer (pairwise)")
    response: str = Field("response", description="field that holds the answer (pointwise)")
    label: str = Field("label", description="field that says whether the answer is safe, true or false (pointwise)")


class TinyPreferences(Closed):
    """Judged answers to the tiny language's errands: polite over curt, safe over rude."""

    kind: Literal["tiny"]
    task: Literal["errand"] = Field(description="errand: greet, take leave or repeat, politely; refuse what is rude")
    size: int = Field(1_000, ge=1, description="how many pairs, or judged answers, to draw")
    heldout_fraction: float = Field(0.1, ge=0, lt=1, description="share of the questions that are left out; the same as the prompts'")
    seed: int = Field(0, description="seed of the answers")


Preferences = Annotated[FilePreferences | TinyPreferences, Field(discriminator="kind")]


# ---------------------------------------------------------------- rejection sampling


class Filters(Closed):
    """What a correct response must be besides, to be kept. Each refusal is counted by its reason. The paper names the kinds, no limits."""

    format: Literal["think", "tags"] | None = Field(
        "think", description="think: a thought and then an answer; tags: the answer in its tags as well; null: any"
    )
    truncated: bool = Field(False, description="keep responses that hit the length cap")
    language_min: float | None = Field(0.9, ge=0, le=1, description="smallest share of the thought's words in the question's language")
    language: RewardFunction = Field(
        "r1mega.rewards.language:share", description="import path of `f(prompt, response) -> float`, the share that language_min limits"
    )
    longest_paragraph: int | None = Field(500, ge=1, description="most words of a paragraph of the thought; null: no limit")
    code_in_thought: bool = Field(False, description="keep responses with code blocks in the thought")
    repetition_max: float | None = Field(0.5, ge=0, le=1, description="largest share of 10-grams that were said before; null: no limit")


class Endpoint(Closed):
    """A model served behind an OpenAI-compatible chat completions endpoint."""

    url: str = Field(description="base URL up to and with /v1, such as http://10.0.0.5:30000/v1")
    model: str = Field(description="name of the model as the server knows it")
    key_variable: str | None = Field(
        None, description="environment variable that holds the API key; the key itself never stands in a recipe"
    )
    concurrency: int = Field(64, ge=1, description="requests under way at once")
    retries: int = Field(5, ge=0, description="further attempts for a request that failed, with growing pauses")
    timeout_s: float = Field(1800.0, gt=0, description="seconds for one answer")


class Decontamination(Closed):
    """Benchmarks whose questions must not be trained on."""

    against: dict[str, PromptSet] = Field(min_length=1, description="benchmark questions by name")
    n: int = Field(10, ge=1, description="a sample that shares so many words in a row with a benchmark question is dropped (paper: 10)")
