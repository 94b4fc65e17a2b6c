"""The reward of a response: rules, judged in processes beside the rank that drew it, and reward models, scored on every rank."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from r1mega.config.base import at
from r1mega.config.rollout import Reward
from r1mega.config.stages import Grpo, ModelReward, RuleReward
from r1mega.megatron.reward_model import RewardModel
from r1mega.pipeline import ranks
from r1mega.rewards.judge import Judge, Verdict
from r1mega.rewards.worker import NO_VALUE
from r1mega.rollout.ask import Question, Response, read
from r1mega.rollout.engine import Sample
from r1mega.stages.groups import Group, Verdicts
from r1mega.stages.minibatch import Judgement

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MEASURE = "measure "
"""Measures are judged like rewards, under names that no reward can have."""


class Scorer:
    """Judges the responses of a GRPO stage. Every rank has one, with judges of its own for the groups that it draws."""

    def __init__(self, stage: Grpo, processes: int, models: Mapping[str, RewardModel], tokenizer: "PreTrainedTokenizerBase") -> None:
        """`processes` judge rules beside this rank; `models` are the stage's reward models by name."""
        self.stage, self.models, self.tokenizer = stage, models, tokenizer
        self._rewards: dict[str, RuleReward | ModelReward] = {**stage.rewards, **stage.reward_models}
        self._measures = [_MEASURE + name for name in stage.measures]
        functions: dict[str, Reward] = dict(stage.rewards)
        functions |= {_MEASURE + name: Reward(function=path) for name, path in stage.measures.items()}
        self._judge = Judge(functions, processes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._judge.close()

    def begin(self, kind: str, question: Question, samples: Sequence[Sample]) -> Future[Verdicts]:
        """Have one group judged by rules and measures, and do not wait for it. Any thread may ask."""
        ((*responses,),) = read([question], [samples], self.tokenizer)
        items = [(question.prompt, response.text) for response in responses]
        return self._judge.ask(items, [[*self._rules(kind, response.sample), *self._measures] for response in responses])

    def judge(self, groups: Sequence[Group], responses: Sequence[Sequence[Response]], update: int) -> Judgement:
        """Every response by every reward that judges its kind of prompt. P groups of G responses; every rank calls it at the same time."""
        mine = {place: group.verdicts.result() for place, group in enumerate(groups) if group.verdicts is not None}
        found = {place: verdicts for part in ranks.gathered(mine) for place, verdicts in part.items()}
        verdicts = [found[place] for place in range(len(groups))]
        kinds = [group.kind for group in groups]
        cut = torch.tensor([[response.sample.finish == "length" for response in group] for group in responses])
        parts = {name: _filled(_values(name, verdicts), cut, reward) for name, reward in self.stage.rewards.items()}
        for name, model in self.stage.reward_models.items():
            # A reward model without a weight yet is not worth its forward passes.
            if at(model.weight, update):
                parts[name] = self._scored(name, groups, responses, cut)
        total = torch.zeros(cut.shape)
        for name, values in parts.items():
            reward = self._rewards[name]
            total = total + torch.where(_judged(reward, kinds)[:, None], at(reward.weight, update) * values, 0.0)
        says = parts[self.stage.correct or next(iter(self.stage.rewards))]
        return Judgement(
            rewards=total,
            parts=parts,
            measures={name: _values(_MEASURE + name, verdicts) for name in self.stage.measures},
            correct=torch.where(says.isnan(), torch.nan, (says > 0.5).float()),
            reasons=[reason for group in verdicts for verdict in group for reason in _reasons(verdict)],
        )

    def _rules(self, kind: str, sample: Sample) -> list[str]:
        """The rules that are asked about a sample."""
        return [
            name
            for name, reward in self.stage.rewards.items()
            if (reward.prompts is None or kind in reward.prompts) and not (sample.finish == "length" and reward.truncated is not None)
        ]

    def _scored(self, name: str, groups: Sequence[Group], responses: Sequence[Sequence[Response]], cut: Tensor) -> Tensor:
        """A reward model's scores [P, G]; NaN for prompts that it does not judge."""
        model, reward = self.models[name], self.stage.reward_models[name]
        judged = _judged(reward, [group.kind for group in groups])[:, None].expand_as(cut)
        asked = judged if reward.truncated is None else judged & ~cut
        chosen = [(groups[place].question.prompt, responses[place][index].text) for place, index in asked.nonzero().tolist()]
        scores = torch.full(cut.shape, torch.nan)
        if chosen:
            prompts, answers = zip(*chosen, strict=True)
            found = model.scores(model.view.encode(prompts, answers, self.tokenizer, model.longest))
            scores[asked] = found.sigmoid() if reward.scale == "probability" else found
        return torch.where(judged, _filled(scores, cut, reward), torch.nan)


def _values(name: str, verdicts: Sequence[Verdicts]) -> Tensor:
    """float32 [P, G]: what a rule or a measure says; NaN where it was not asked or could not say."""
    each = [[verdict[name].value if name in verdict else None for verdict in group] for group in verdicts]
    return torch.tensor([[torch.nan if value is None else value for value in group] for group in each], dtype=torch.float32)


def _filled(values: Tensor, cut: Tensor, reward: RuleReward | ModelReward) -> Tensor:
    """Values [P, G] with a reward's own for responses that the length cap cut: they are not finished, however they read."""
    return values if reward.truncated is None else values.masked_fill(cut, reward.truncated)


def _reasons(verdict: Mapping[str, Verdict]) -> Iterator[str]:
    """Why rules could not judge a response; a measure may have nothing to say."""
    for name, found in verdict.items():
        if found.value is None and not (name.startswith(_MEASURE) and found.reason in NO_VALUE):
            yield f"{name.removeprefix(_MEASURE)}: {found.reason}"


def _judged(reward: RuleReward | ModelReward, kinds: Sequence[str]) -> Tensor:
    """bool [P]: whether a reward judges prompts of these kinds."""
    return torch.tensor([reward.prompts is None or kind in reward.prompts for kind in kinds])
