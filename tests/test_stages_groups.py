"""Groups under way over a whole stage, with an engine whose answers are a function of seeds alone: nobody is lost, nobody counted twice."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import pytest
import torch.distributed as dist

from r1mega.config.stages import Grpo
from r1mega.data.prompts import Prompt
from r1mega.rewards.judge import Verdict
from r1mega.rollout.ask import Question
from r1mega.rollout.engine import Drawn, Request, Sample, SamplingParams, ignored, joined
from r1mega.stages.groups import Group, Groups, Verdicts, leaves_nothing

CAP, SEGMENT = 40, 7


@pytest.fixture(autouse=True, scope="module")
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@dataclass
class Fake:
    """Draws `seed % CAP` tokens and the stop token 2, or up to the length cap, each token a function of seed and place."""

    version: int = 0
    asked: list[Request] = field(default_factory=list)

    def start(self, requests: Sequence[Request], sampling: SamplingParams, drawn: Drawn = ignored) -> Callable[[], list[Sample]]:
        self.asked += requests
        samples = [self._sample(one) for one in requests]
        for place in reversed(range(len(samples))):
            drawn(place, samples[place])
        return lambda: samples

    def _sample(self, one: Request) -> Sample:
        whole = [3 + (one.seed + place) % 50 for place in range(one.seed % (2 * CAP))] + [2]
        ids = tuple(whole[one.begun : one.begun + one.max_new_tokens])
        return Sample(one.prompt_ids, ids, tuple(-0.1 * i for i in ids), "stop" if ids[-1] == 2 else "length", self.version)


def stage(**changes: object) -> Grpo:
    return Grpo.model_validate(
        {
            "kind": "grpo",
            "model": "/base",
            "prompts": {"sums": {"source": {"kind": "tiny", "task": "running_sum"}}},
            "rewards": {"accuracy": {"function": "r1mega.rewards.exact:accuracy"}},
            "group_size": 3,
            "prompts_per_rollout": 4,
            "updates_per_rollout": 2,
            "updates": 20,
            "save_every": 8,
            "sampling": {"max_new_tokens": CAP},
            "optimizer": {"lr": 1e-4},
            "partial": {"segment": SEGMENT, "extra_prompts": 3, "rollouts": 3},
        }
        | changes
    )


def judged(kind: str, question: Question, samples: Sequence[Sample]) -> "Future[Verdicts]":
    """Their lengths."""
    done = Future[Verdicts]()
    done.set_result([{"length": Verdict(float(len(sample.response_ids)), None)} for sample in samples])
    return done


def groups(settings: Grpo) -> Groups:
    questions = [Question(Prompt(f"p{index}", "?"), (5, 6, 7 + index)) for index in range(64)]
    return Groups(settings, {"sums": questions}, (2,), 1, "zero", judged)


def rollouts(settings: Grpo, first: int = 0, fake: Fake | None = None) -> list[list[Group]]:
    """What every rollout from update `first` on trains on."""
    fake, under_way = fake or Fake(), groups(settings)
    for update in range(0, first, settings.updates_per_rollout):
        under_way.skip(update)
    found = []
    for update in range(first, settings.updates, settings.updates_per_rollout):
        fake.version = update
        under_way.begin(fake, update)
        found.append(under_way.take(fake, update))
        left = 0 if settings.partial is None or leaves_nothing(settings, update) else settings.partial.extra_prompts
        assert len(under_way._groups) == left
    return found


def test_every_group_is_trained_on_once_and_in_time() -> None:
    settings, fake = stage(), Fake()
    taken = rollouts(settings, fake=fake)
    whole = rollouts(stage(partial=None))
    ids = [group.question.prompt.id for rollout in taken for group in rollout]
    assert len(set(ids)) == len(ids) == 40
    assert sorted(ids) == sorted(group.question.prompt.id for rollout in whole for group in rollout)
    ages = [index * 2 - group.update for index, rollout in enumerate(taken) for group in rollout]
    assert 0 < max(ages) <= 2 * (settings.partial.rollouts - 1)
    assert [len(rollout) for rollout in taken] == [4] * 10
    spans = {len(sample.versions) for rollout in taken for group in rollout for sample in group.samples}
    assert {1, 2} <= spans <= {1, 2, 3}
    assert any(one.max_new_tokens == SEGMENT for one in fake.asked) and any(one.begun >= SEGMENT for one in fake.asked)


@pytest.mark.parametrize("changes", [{}, {"partial": None}])
def test_a_group_is_judged_with_its_last_sample_and_once(changes: dict[str, object]) -> None:
    calls: list[str] = []

    def judge(kind: str, question: Question, samples: Sequence[Sample]) -> "Future[Verdicts]":
        calls.append(question.prompt.id)
        return judged(kind, question, samples)

    settings, fake = stage(**changes), Fake()
    questions = [Question(Prompt(f"p{index}", "?"), (5, 6, 7 + index)) for index in range(64)]
    under_way = Groups(settings, {"sums": questions}, (2,), 1, "zero", judge)
    for update in range(0, settings.updates, settings.updates_per_rollout):
        under_way.begin(fake, update)
        for group in under_way.take(fake, update):
            assert group.verdicts is not None
            assert group.verdicts.result() == judged("sums", group.question, [one for one in group.samples if one]).result()
    assert len(calls) == len(set(calls)) == 40


def test_responses_drawn_in_pieces_are_those_drawn_at_once() -> None:
    at_once = {group.question.prompt.id: group for rollout in rollouts(stage(partial=None)) for group in rollout}
    for rollout in rollouts(stage()):
        for group in rollout:
            if group.update != at_once[group.question.prompt.id].update:
                continue  # asked at another update, so with other seeds
            for one, other in zip(group.samples, at_once[group.question.prompt.id].samples, strict=True):
                assert (one.prompt_ids, one.response_ids, one.logprobs, one.finish) == (
                    other.prompt_ids, other.response_ids, other.logprobs, other.finish,
                )  # fmt: skip
                assert sum(count for _, count in one.versions) == len(one.response_ids) <= CAP


@pytest.mark.parametrize("changes", [{}, {"partial": None}])
def test_a_run_that_goes_on_after_a_checkpoint_asks_what_it_would_have_asked(changes: dict[str, object]) -> None:
    settings = stage(**changes)
    straight = rollouts(settings)
    assert rollouts(settings, first=8) == straight[4:]
    assert rollouts(settings, first=16) == straight[8:]


def test_spans_of_one_version_are_one_span() -> None:
    first = Sample((1,), (4, 5), (-1.0, -2.0), "length", 3, ((2, 1),))
    same, other = Sample((1, 4, 5), (6,), (-3.0,), "stop", 3), Sample((1, 4, 5), (6, 7), (-3.0, -4.0), "length", 9, ((8, 1),))
    assert joined(first, same) == Sample((1,), (4, 5, 6), (-1.0, -2.0, -3.0), "stop", 3, ((2, 1),))
    assert joined(first, other).versions == ((2, 1), (3, 1), (8, 1), (9, 1))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"partial": {"segment": 7, "extra_prompts": 5}}, "extra_prompts=5 is more than prompts_per_rollout=4"),
        ({"save_every": 2}, "nothing is being drawn when a checkpoint is written, so with save_every=2 rollouts would never overlap"),
        ({"save_every": 2, "partial": None, "staleness": 1}, "need at least 2 x updates_per_rollout = 4, or 0"),
        ({"staleness": 2}, "Input should be 0 or 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        stage(**changes)
