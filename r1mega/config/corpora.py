"""Documents to pre-train on."""

from typing import Annotated, Literal

from pydantic import Field

from r1mega.config.base import Closed, FilePath
from r1mega.config.training import Optimizer


class TinyCorpus(Closed):
    """Documents of the tiny language: problems with long or short answers."""

    kind: Literal["tiny"]
    task: Literal["running_sum"] = Field(description="running_sum: add six digits modulo ten, in one of two languages")
    long_share: float = Field(ge=0, le=1, description="share of documents with a chain of thought; the others guess")
    mixed_share: float = Field(0.5, ge=0, le=1, description="share of the long documents that mix the two languages")
    tagged_share: float = Field(1.0, ge=0, le=1, description="share of the documents with all tags; the others lose think or answer tags")
    error_rate: tuple[float, float] = Field((0.08, 0.02), description="probability of a wrong step in English and in Chinese")
    corrected_share: float = Field(0.5, ge=0, le=1, description="share of the wrong steps that are corrected at once, after a `wait`")
    heldout_fraction: float = Field(0.1, ge=0, lt=1, description="share of the questions that no document holds; the same as the prompts'")
    seed: int = Field(0, description="seed of the documents")


class SignsCorpus(Closed):
    """Documents of the tiny language: signs to be found, by guessing or by trying."""

    kind: Literal["signs"]
    long_share: float = Field(ge=0, le=1, description="share of documents that try; the others guess")
    patience: float = Field(1.0, ge=0, le=1, description="probability of another try after one that fails; else its signs are the answer")
    tagged_share: float = Field(1.0, ge=0, le=1, description="share of the documents with all tags; the others lose think or answer tags")
    heldout_fraction: float = Field(0.1, ge=0, lt=1, description="share of the questions that no document holds; the same as the prompts'")
    seed: int = Field(0, description="seed of the documents")


class JsonlCorpus(Closed):
    """Plain documents, one JSON object a line."""

    kind: Literal["jsonl"]
    path: FilePath = Field(description="file of JSON lines")
    text: str = Field("text", description="field that holds the document")


Corpus = Annotated[TinyCorpus | SignsCorpus | JsonlCorpus, Field(discriminator="kind")]


class Phase(Closed):
    """A stretch of pre-training on one corpus with one learning rate schedule."""

    corpus: Corpus = Field(description="the documents")
    updates: int = Field(ge=1, description="optimizer steps of this phase")
    documents_per_update: int = Field(64, ge=1, description="documents of one optimizer step")
    optimizer: Optimizer
