"""The groups of a GRPO stage from prompt to minibatch: which are asked when, and those whose responses are drawn over several rollouts.

With `partial`, more prompts are under way than a rollout trains on. A round draws at most `segment` tokens of every unfinished response;
rounds follow one another until enough groups are finished, and the oldest of these are trained on. The others keep what they have and
go on in the next rollout, with the weights of then. Before a checkpoint, and at the end, nothing is left under way: every group that was
asked is trained on exactly once, and a run that goes on asks what it would have asked. Nothing here depends on the time that drawing takes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from r1mega.config.base import at
from r1mega.config.stages import Grpo
from r1mega.data.mixture import Mixture
from r1mega.pipeline import ranks
from r1mega.rollout.ask import Question, sample_seed
from r1mega.rollout.engine import Engine, Request, Sample, SamplingParams, joined
from r1mega.stages.schedule import crossed


@dataclass
class Group:
    """A prompt and its responses, as far as they are drawn."""

    update: int
    """At which it was asked; it says how long its responses may be."""
    kind: str
    question: Question
    samples: list[Sample | None]
    going_on: list[int]
    """Places of the responses that are not finished."""


class Groups:
    """All groups under way, the same on every rank."""

    def __init__(
        self, stage: Grpo, questions: Mapping[str, Sequence[Question]], stop_token_ids: tuple[int, ...], seed: int, name: str
    ) -> None:
        """`seed` and `name` are the stage's."""
        self._stage, self._questions, self._stop = stage, questions, stop_token_ids
        self._seed = f"{seed}/{name}"
        sizes = {kind: len(found) for kind, found in questions.items()}
        self._mixture = Mixture(sizes, {kind: prompts.share for kind, prompts in stage.prompts.items()}, seed)
        self._groups: list[Group] = []
        self._round: Callable[[], None] | None = None

    @property
    def drawing(self) -> bool:
        """Whether the next rollout was begun already."""
        return self._round is not None

    def begin(self, engine: Engine, update: int) -> None:
        """Ask what the rollout at an update needs, and do not wait for it."""
        self._groups += self._new(update)
        self._round = self._begun(engine, update)

    def settle(self) -> None:
        """Wait for what was begun: the engine is idle afterwards."""
        if self._round is not None:
            self._round()
            self._round = _nothing

    def take(self, engine: Engine, update: int) -> list[Group]:
        """The groups that the rollout at an update trains on, all finished, the oldest first."""
        while True:
            self.settle()
            finished = [group for group in self._groups if not group.going_on]
            if len(finished) >= self._stage.prompts_per_rollout:
                break
            self._round = self._begun(engine, update)
        self._round = None
        taken = finished[: self._stage.prompts_per_rollout]
        self._groups = [group for group in self._groups if not any(group is other for other in taken)]
        return taken

    def skip(self, update: int) -> None:
        """Pass over a rollout whose groups an earlier start of the run has trained on. Those after it come as they would have."""
        self._new(update)

    # -------------------------------------------------------- prompts

    def _new(self, update: int) -> list[Group]:
        """Prompts that come in at an update: as many as went out, and in the first rollout after a checkpoint those beyond."""
        stage = self._stage
        before = update - stage.updates_per_rollout
        left = self._target(before) - stage.prompts_per_rollout if update else 0
        drawn = self._mixture.draw(self._target(update) - left, update)
        size = stage.group_size
        return [Group(update, kind, self._questions[kind][place], [None] * size, list(range(size))) for kind, place in drawn]

    def _target(self, update: int) -> int:
        """Groups under way in the rollout at an update."""
        stage = self._stage
        extra = stage.partial.extra_prompts if stage.partial and not leaves_nothing(stage, update) else 0
        return stage.prompts_per_rollout + extra

    # -------------------------------------------------------- drawing

    def _begun(self, engine: Engine, update: int) -> Callable[[], None]:
        """A round: each rank asks for its share of the unfinished groups. What is returned waits for it and keeps what was drawn."""
        stage = self._stage
        sampling = SamplingParams(at(stage.sampling.temperature, update), at(stage.sampling.top_p, update), self._stop)
        groups = [group for group in self._groups if group.going_on]
        asked = [[self._request(group, place, update) for place in group.going_on] for group in groups]
        mine = ranks.dealt(asked)
        wait = engine.start([request for requests in mine for request in requests], sampling)

        def keep() -> None:
            drawn = iter(wait())
            found = ranks.collected([[next(drawn) for _ in requests] for requests in mine])
            for group, requests, samples in zip(groups, asked, found, strict=True):
                self._keep(group, requests, samples)

        return keep

    def _keep(self, group: Group, requests: Sequence[Request], samples: Sequence[Sample]) -> None:
        """What was drawn of the responses that go on; those go on further that were cut before the length cap."""
        places, group.going_on = group.going_on, []
        for place, request, sample in zip(places, requests, samples, strict=True):
            begun = group.samples[place]
            group.samples[place] = sample if begun is None else joined(begun, sample)
            if sample.finish == "length" and request.begun + request.max_new_tokens < self._cap(group):
                group.going_on.append(place)

    def _request(self, group: Group, place: int, update: int) -> Request:
        begun = group.samples[place]
        drawn = () if begun is None else begun.response_ids
        seed = sample_seed(f"{self._seed}/{group.update}/{group.question.prompt.id}/{place}")
        budget = self._cap(group) - len(drawn)
        partial = self._stage.partial
        if partial and not leaves_nothing(self._stage, update):
            rollouts = (update - group.update) // self._stage.updates_per_rollout + 1
            budget = budget if rollouts >= partial.rollouts else min(budget, partial.segment)
        return Request(group.question.ids + drawn, seed, budget, begun=len(drawn))

    def _cap(self, group: Group) -> int:
        return int(at(self._stage.sampling.max_new_tokens, group.update))


def leaves_nothing(stage: Grpo, update: int) -> bool:
    """Whether the rollout at an update is the last one, or the last before a checkpoint: then nothing is under way after it."""
    end = update + stage.updates_per_rollout
    return end >= stage.updates or crossed(end, stage.updates_per_rollout, stage.save_every)


def _nothing() -> None:
    """A round that is over."""
