"""Who answers the questions of a dataset: an engine that r1mega runs, or a server that is asked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from r1mega import heartbeat
from r1mega.config.base import at
from r1mega.config.rollout import Sampling
from r1mega.pipeline.model_folder import ModelFolder
from r1mega.rollout.ask import Question, ask
from r1mega.rollout.engine import Engine, SamplingParams


@dataclass(frozen=True)
class Answer:
    """One response. `ids` are its tokens, stop token included, None where the server gives text only."""

    text: str
    finish: Literal["stop", "length", "failed"]
    """length: it was cut; failed: the server gave none, for which `error` says why."""
    ids: tuple[int, ...] | None = None
    error: str | None = None


class Teacher(Protocol):
    """Anything that answers questions. Every rank calls it with the same arguments and gets the same answers."""

    def answer(self, questions: Sequence[Question], k: int, seed: str) -> list[list[Answer]]:
        """k answers to each question, in order. They depend on the seed, the question and the number of the answer alone."""


class EngineTeacher:
    """The weights of a model folder in an engine."""

    def __init__(self, engine: Engine, model: ModelFolder, sampling: Sampling) -> None:
        self.engine, self.model = engine, model
        self._params = SamplingParams(at(sampling.temperature, 0), at(sampling.top_p, 0), model.stop_token_ids)
        self._cap = int(at(sampling.max_new_tokens, 0))
        with heartbeat.phase("sync"):
            engine.sync(model, version=0)

    def answer(self, questions: Sequence[Question], k: int, seed: str) -> list[list[Answer]]:
        groups = ask(self.engine, questions, k, self._params, self._cap, seed, self.model.tokenizer)
        return [[Answer(r.text, r.sample.finish, r.sample.response_ids) for r in group] for group in groups]
