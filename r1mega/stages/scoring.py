"""The reward of a response: rules judged in processes beside rank 0, and reward models scored on every rank."""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch
import torch.distributed as dist
from torch import Tensor

from r1mega.config.base import at
from r1mega.config.rollout import Reward
from r1mega.config.stages import Grpo, ModelReward, RuleReward
from r1mega.megatron.reward_model import RewardModel
from r1mega.pipeline import ranks
from r1mega.rewards.judge import Judge
from r1mega.rewards.worker import NO_VALUE
from r1mega.rollout.ask import Question, Response
from r1mega.stages.minibatch import Judgement

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MEASURE = "measure "
"""Measures are judged like rewards, under names that no reward can have."""


class Scorer:
    """Judges the responses of a GRPO stage. Every rank has one and calls it at the same time."""

    def __init__(self, stage: Grpo, processes: int, models: Mapping[str, RewardModel], tokenizer: "PreTrainedTokenizerBase") -> None:
        """`processes` judge rules beside rank 0; `models` are the stage's reward models by name."""
        self.stage, self.models, self.tokenizer = stage, models, tokenizer
        self._rewards: dict[str, RuleReward | ModelReward] = {**stage.rewards, **stage.reward_models}
        functions: dict[str, Reward] = dict(stage.rewards)
        functions |= {_MEASURE + name: Reward(function=path) for name, path in stage.measures.items()}
        self._judge = Judge(functions, processes) if dist.get_rank() == 0 else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._judge is not None:
            self._judge.close()

    def judge(self, kinds: Sequence[str], questions: Sequence[Question], groups: Sequence[Sequence[Response]], update: int) -> Judgement:
        """Every response by every reward that judges its kind of prompt. P prompts of the given kinds, G responses each."""
        values, reasons = ranks.shared(lambda: self._judged(kinds, questions, groups))
        parts = {name: values[name] for name in self.stage.rewards}
        for name, model in self.stage.reward_models.items():
            # A reward model without a weight yet is not worth its forward passes.
            if at(model.weight, update):
                parts[name] = self._scored(name, kinds, questions, groups)
        total = torch.zeros(len(groups), self.stage.group_size)
        for name, values_of in parts.items():
            reward = self._rewards[name]
            total = total + torch.where(_judges(reward, kinds)[:, None], at(reward.weight, update) * values_of, 0.0)
        says = parts[self.stage.correct or next(iter(self.stage.rewards))]
        return Judgement(
            rewards=total,
            parts=parts,
            measures={name: values[_MEASURE + name] for name in self.stage.measures},
            correct=torch.where(says.isnan(), torch.nan, (says > 0.5).float()),
            reasons=reasons,
        )

    def _scored(self, name: str, kinds: Sequence[str], questions: Sequence[Question], groups: Sequence[Sequence[Response]]) -> Tensor:
        """A reward model's scores [P, G]; NaN for prompts that it does not judge."""
        model, reward = self.models[name], self.stage.reward_models[name]
        judged = _judges(reward, kinds)
        chosen = [
            (question.prompt, response.text)
            for question, group, wanted in zip(questions, groups, judged.tolist(), strict=True)
            for response in group
            if wanted
        ]
        scores = torch.full((len(groups), self.stage.group_size), torch.nan)
        if chosen:
            prompts, answers = zip(*chosen, strict=True)
            found = model.scores(model.view.encode(prompts, answers, self.tokenizer, model.longest))
            scores[judged] = (found.sigmoid() if reward.scale == "probability" else found).view(-1, self.stage.group_size)
        return scores

    def _judged(
        self, kinds: Sequence[str], questions: Sequence[Question], groups: Sequence[Sequence[Response]]
    ) -> tuple[Mapping[str, Tensor], list[str]]:
        """Values [P, G] of every rule and measure, and why rules could not judge."""
        assert self._judge is not None, "judging is rank 0's"
        measures = [_MEASURE + name for name in self.stage.measures]
        wanted = {
            kind: [*(name for name, reward in self.stage.rewards.items() if reward.prompts is None or kind in reward.prompts), *measures]
            for kind in set(kinds)
        }
        items = [(question.prompt, response.text) for question, group in zip(questions, groups, strict=True) for response in group]
        asked = [wanted[kind] for kind, group in zip(kinds, groups, strict=True) for _ in group]
        verdicts = self._judge.judge(items, asked)
        values = {}
        for name in [*self.stage.rewards, *measures]:
            found = (verdict[name].value if name in verdict else None for verdict in verdicts)
            values[name] = torch.tensor([torch.nan if value is None else value for value in found], dtype=torch.float32)
        shape = (len(groups), self.stage.group_size)
        reasons = [
            f"{name.removeprefix(_MEASURE)}: {found.reason}"
            for verdict in verdicts
            for name, found in verdict.items()
            if found.value is None and not (name.startswith(_MEASURE) and found.reason in NO_VALUE)
        ]
        return {name: value.view(shape) for name, value in values.items()}, reasons


def _judges(reward: RuleReward | ModelReward, kinds: Sequence[str]) -> Tensor:
    """bool [P]: whether a reward judges prompts of these kinds."""
    return torch.tensor([reward.prompts is None or kind in reward.prompts for kind in kinds])
