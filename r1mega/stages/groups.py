"""The groups of a GRPO stage from prompt to minibatch: which are asked when, and those whose responses are drawn over several rollouts.

With `partial`, more prompts are under way than a rollout trains on. A round draws at most `segment` tokens of every unfinished response;
rounds follow one another until enough groups are finished, and the oldest of these are trained on. The others keep what they have and
go on in the next rollout, with the weights of then. A group is given to the judges as soon as its last response is finished, on the rank
that draws it, while others are still being drawn. Before a checkpoint, and at the end, nothing is left under way: every group that was
asked is trained on exactly once, and a run that goes on asks what it would have asked. Nothing here depends on the time that drawing takes.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Lock

from r1mega.config.base import at
from r1mega.config.stages import Grpo
from r1mega.data.mixture import Mixture
from r1mega.pipeline import ranks
from r1mega.rewards.judge import Verdict
from r1mega.rollout.ask import Question, sample_seed
from r1mega.rollout.engine import Drawn, Engine, Request, Sample, SamplingParams, joined
from r1mega.stages.schedule import crossed

Verdicts = list[dict[str, Verdict]]
"""Of each response of a group, by the name of what judged it."""


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
    verdicts: Future[Verdicts] | None = field(default=None, compare=False)
    """On the rank that drew the last of it, what the judges say."""


class Groups:
    """All groups under way, the same on every rank."""

    def __init__(
        self,
        stage: Grpo,
        questions: Mapping[str, Sequence[Question]],
        stop_token_ids: tuple[int, ...],
        seed: int,
        name: str,
        judge: Callable[[str, Question, Sequence[Sample]], Future[Verdicts]],
        routing: bool = False,
    ) -> None:
        """`seed` and `name` are the stage's; `judge` begins to judge a group, in any thread; `routing`: whether experts are recorded."""
        self._stage, self._questions, self._stop, self._judge, self._routing = stage, questions, stop_token_ids, judge, routing
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

    def sampling(self, update: int) -> SamplingParams:
        """How tokens are drawn at an update."""
        sampling = self._stage.sampling
        return SamplingParams(at(sampling.temperature, update), at(sampling.top_p, update), self._stop, self._routing)

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
        groups = [group for group in self._groups if group.going_on]
        asked = [[self._request(group, place, update) for place in group.going_on] for group in groups]
        mine = ranks.dealt(list(zip(groups, asked, strict=True)))
        wait = engine.start([request for _, requests in mine for request in requests], self.sampling(update), self._told(mine))

        def keep() -> None:
            drawn = iter(wait())
            found = ranks.collected([[next(drawn) for _ in requests] for _, requests in mine])
            for group, requests, samples in zip(groups, asked, found, strict=True):
                group.samples, group.going_on = self._with(group, requests, samples)

        return keep

    def _told(self, mine: Sequence[tuple[Group, Sequence[Request]]]) -> Drawn:
        """Has a group judged with the last of its samples."""
        owners = [index for index, (_, requests) in enumerate(mine) for _ in requests]
        firsts = [owners.index(index) for index in range(len(mine))]
        found: list[dict[int, Sample]] = [{} for _ in mine]
        lock = Lock()

        def drawn(place: int, sample: Sample) -> None:
            index = owners[place]
            group, requests = mine[index]
            with lock:
                found[index][place] = sample
                if len(found[index]) < len(requests):
                    return
            samples, going_on = self._with(group, requests, [found[index][firsts[index] + i] for i in range(len(requests))])
            if not going_on:
                group.verdicts = self._judge(group.kind, group.question, [one for one in samples if one])

        return drawn

    def _with(self, group: Group, requests: Sequence[Request], drawn: Sequence[Sample]) -> tuple[list[Sample | None], list[int]]:
        """A group's samples with what was drawn of those that went on, and places of those that go on further: cut before the cap."""
        samples, going_on = list(group.samples), []
        for place, request, sample in zip(group.going_on, requests, drawn, strict=True):
            begun = samples[place]
            samples[place] = sample if begun is None else joined(begun, sample)
            if sample.finish == "length" and request.begun + request.max_new_tokens < self._cap(group):
                going_on.append(place)
        return samples, going_on

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
