"""Rewards of a rollout: judged group by group, summed by kind, and of a response that is not finished."""

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from r1mega.config.stages import Grpo
from r1mega.data.prompts import Prompt
from r1mega.megatron.reward_model import RewardModel
from r1mega.rollout.ask import Question, Response
from r1mega.rollout.engine import Sample
from r1mega.stages.groups import Group
from r1mega.stages.minibatch import Judgement
from r1mega.stages.scoring import Scorer

RIGHT, WRONG = "<think> so 5 </think> <answer> 5 </answer>", "<think> so 4 </think> <answer> 4 </answer>"
TEXTS = [RIGHT, WRONG]


@pytest.fixture(autouse=True, scope="module")
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Words:
    """A tokenizer that knows two texts."""

    def batch_decode(self, ids: Sequence[Sequence[int]], skip_special_tokens: bool) -> list[str]:
        return [TEXTS[one[0]] for one in ids]

    def decode(self, ids: Sequence[int]) -> str:
        return "5 :"


class Lengths:
    """A reward model whose score is the number of characters."""

    view = SimpleNamespace(encode=lambda prompts, answers, tokenizer, longest: [len(answer) for answer in answers])
    longest = 99

    def scores(self, ids: list[int]) -> torch.Tensor:
        return torch.tensor(ids, dtype=torch.float32)


def judged(rule: dict[str, Any], model: dict[str, Any]) -> Judgement:
    """Two groups of two kinds; of each the last response is right but cut."""
    sums = {"source": {"kind": "tiny", "task": "running_sum"}}
    stage = Grpo.model_validate(
        {
            "kind": "grpo", "model": "/base", "prompts": {"sums": sums, "others": sums}, "group_size": 3, "prompts_per_rollout": 2,
            "updates_per_rollout": 1, "updates": 1, "optimizer": {"lr": 1e-4}, "measures": {"format": "r1mega.rewards.format:tags"},
            "rewards": {"accuracy": {"function": "r1mega.rewards.exact:accuracy", "weight": 2.0, **rule}},
            "reward_models": {"long": {"model": "/long", "scale": "logit", "prompts": ["others"], **model}},
        }
    )  # fmt: skip
    samples = [Sample((1,), (text,), (-1.0,), finish, 0) for text, finish in ((0, "stop"), (1, "stop"), (0, "length"))]
    question = Question(Prompt("p", "5 :", answer="5"), (1,))
    groups = [Group(0, kind, question, list(samples), []) for kind in ("sums", "others")]
    with Scorer(stage, 1, {"long": cast(RewardModel, Lengths())}, cast(Any, Words())) as scorer:
        for group in groups:
            group.verdicts = scorer.begin(group.kind, group.question, samples)
        return scorer.judge(groups, [[Response(sample, TEXTS[sample.response_ids[0]]) for sample in samples]] * 2, 0)


def test_what_the_cap_cut_is_not_finished_however_it_reads() -> None:
    found = judged({}, {})
    long = float(len(RIGHT))
    assert found.rewards.tolist() == [[2, 0, 0], [2 + long, long, 0]]
    assert found.correct.tolist() == [[1, 0, 0], [1, 0, 0]]
    assert found.parts["long"][0].isnan().all()
    assert found.measures["format"].tolist() == [[1, 1, 1], [1, 1, 1]]  # what is only logged reads the text
    assert found.reasons == []


def test_its_value_can_be_given_or_left_to_the_judges() -> None:
    long = float(len(RIGHT))
    assert judged({"truncated": -1}, {"truncated": -8}).rewards.tolist() == [[2, 0, -2], [2 + long, long, -10]]
    assert judged({"truncated": None}, {"truncated": None}).rewards.tolist() == [[2, 0, 2], [2 + long, long, 2 + long]]
