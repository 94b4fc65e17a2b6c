"""Rejection sampling: many answers to every prompt, of which the correct and readable ones become a dataset of conversations.

Every chunk of prompts that is done is a line of `ledger.jsonl`; a stage that was interrupted goes on after the last one.
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r1mega import heartbeat
from r1mega.config.base import largest
from r1mega.config.rollout import Reward, Sampling
from r1mega.config.stages import Rejection
from r1mega.data.chats import write_dataset
from r1mega.data.decontamination import Contamination
from r1mega.data.dedup import near_duplicates
from r1mega.data.filters import Filters
from r1mega.data.prompts import Prompt
from r1mega.data.sources import load_prompts
from r1mega.data.templates import encode
from r1mega.errors import UserError
from r1mega.pipeline import ranks
from r1mega.pipeline.context import StageContext, Stopped
from r1mega.pipeline.model_folder import ModelFolder
from r1mega.rewards import agreement
from r1mega.rewards.judge import Judge, Verdict
from r1mega.rewards.worker import NO_VALUE
from r1mega.rollout.ask import Question
from r1mega.rollout.open import open_endpoint
from r1mega.rollout.teacher import Answer, EngineTeacher, Teacher
from r1mega.stages.engines import opened

_OPINION = Sampling(temperature=0.0, max_new_tokens=8192)
"""How a judge model is asked; the room is for those that think before they say their word."""

Row = dict[str, Any]
"""One kept sample as it is written: `messages`, and what made it."""


def run(ctx: StageContext) -> dict[str, Any]:
    """Sample, judge, filter, and leave the dataset; returns how many samples were kept and why the others were not."""
    stage = ctx.stage
    assert isinstance(stage, Rejection)
    counts = Counter[str]()
    with ExitStack() as stack:
        model = ModelFolder(ctx.model_dir(stage.model)) if stage.model is not None else None
        questions = _questions(stage, model, counts)
        sampler = _Sampler(ctx, stage, _teacher(ctx, stage, model, stack), stack)
        ledger = _Ledger(ctx.dir / "ledger.jsonl")
        chunks = [questions[start : start + stage.chunk] for start in range(0, len(questions), stage.chunk)]
        # Only rank 0 keeps what was sampled.
        done = ledger.read() if ctx.rank == 0 else []
        first = ranks.shared(lambda: len(done))
        for index, chunk in enumerate(chunks[first:], first):
            made = sampler.sample(chunk, index)
            if ctx.rank == 0:
                ledger.append(made)
                done.append(made)
            ctx.progress.update(index + 1, len(chunks), {"kept": sum(len(one.rows) for one in done)})
            if index + 1 < len(chunks) and ctx.stop_asked():
                raise Stopped  # the ledger holds what is done
    rows = [row for one in done for row in one.rows]
    for one in done:
        counts.update(one.counts)
    if ctx.rank == 0:
        rows = _different(rows, stage.near_duplicates, counts)
        if not rows:
            raise UserError(f"stage {ctx.name}: nothing was kept of {counts['samples']} samples; reasons: {_reasons(counts)}")
    summary = {"kept": len(rows), **_summary(counts)}
    with ctx.artifact() as folder:
        if ctx.rank == 0:
            about = {"stage": ctx.name, "template": stage.prompts.template, "counts": summary}
            write_dataset(folder, rows, about | ({"tokenizer": model.tokenizer_digest} if model else {}), stage.format)
    return summary


def _questions(stage: Rejection, model: ModelFolder | None, counts: Counter[str]) -> list[Question]:
    """The prompts that are not a benchmark's, as the model is shown them; a server is shown their text."""
    prompts = ranks.shared(lambda: load_prompts(stage.prompts, Path()))
    counts["prompts"] = len(prompts)
    if stage.decontamination is not None:
        sets = stage.decontamination.against.values()
        found = Contamination((prompt.text for one in sets for prompt in load_prompts(one, Path())), stage.decontamination.n)
        prompts = [prompt for prompt in prompts if found.found(prompt.text) is None]
        counts["prompts contaminated"] = counts["prompts"] - len(prompts)
    if model is None:
        return [Question(prompt, ()) for prompt in prompts]
    room = model.prompt_room(largest(stage.sampling.max_new_tokens))
    return [Question(*pair) for pair in zip(prompts, encode(prompts, stage.prompts.template, model.tokenizer, room), strict=True)]


def _teacher(ctx: StageContext, stage: Rejection, model: ModelFolder | None, stack: ExitStack) -> Teacher:
    if model is None:
        assert stage.endpoint is not None, "the schema requires a model or an endpoint"
        return open_endpoint(stage.endpoint, stage.sampling)
    return EngineTeacher(opened(ctx, model.path, stack), model, stage.sampling)


@dataclass
class _Done:
    """What a chunk of prompts came to."""

    rows: list[Row] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


class _Ledger:
    """Finished chunks, one line each."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[_Done]:
        """The finished chunks in order; a last line that was cut off is as good as none, and is removed."""
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            os.truncate(self.path, len(whole.encode()))
        return [_Done(**json.loads(line)) for line in whole.split("\n")[:-1]]

    def append(self, done: _Done) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(vars(done), ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


@dataclass(frozen=True)
class _Opinion:
    """Whether a sample is right; None, and why, where that could not be judged."""

    right: bool | None
    reason: str = ""


class _Sampler:
    """Answers to a chunk of questions, and which of them are kept."""

    def __init__(self, ctx: StageContext, stage: Rejection, teacher: Teacher, stack: ExitStack) -> None:
        self.ctx, self.stage, self.teacher = ctx, stage, teacher
        settings = stage.filters.model_dump(exclude={"language"})
        self.filters = Filters(**settings, share=self._share)
        self.referee = open_endpoint(stage.judge_endpoint, _OPINION) if stage.judge_endpoint else None
        # Whatever a user's function may do, it does in a process that can be killed.
        functions = {"judge": stage.judge, "language": stage.filters.language, "rewrite": stage.rewrite}
        rewards = {name: Reward(function=path, deadline_s=stage.deadline_s) for name, path in functions.items() if path is not None}
        self.judge = stack.enter_context(Judge(rewards, ctx.recipe.run.judges, texts={"rewrite": 2}))

    def sample(self, questions: Sequence[Question], index: int) -> _Done:
        """Ask the questions and keep what is correct and readable; the same on every rank."""
        seed = f"{self.ctx.seed}/{self.ctx.name}/{index}"
        groups = self.teacher.answer(questions, self.stage.k, seed)
        samples = [(question.prompt, answer) for question, group in zip(questions, groups, strict=True) for answer in group]
        self._check_share("were not answered", [answer.error for _, answer in samples if answer.finish == "failed"], len(samples), index)
        with heartbeat.phase("judge"):
            opinions = ranks.collected(self._judged(ranks.dealt(samples)))
        if self.referee is not None:
            opinions = self._refereed(self.referee, samples, opinions, f"{seed}/judge")
        unknown = [
            one.reason for (_, answer), one in zip(samples, opinions, strict=True) if one.right is None and answer.finish != "failed"
        ]
        self._check_share("could not be judged", unknown, len(samples), index)
        verdicts = [one.right for one in opinions]
        correct = [verdicts[start : start + self.stage.k] for start in range(0, len(verdicts), self.stage.k)]
        with heartbeat.phase("judge"):
            found = ranks.collected([self._kept(*one) for one in ranks.dealt(list(zip(questions, groups, correct, strict=True)))])
        self._check_share("could not be rewritten", [reason for _, reasons in found for reason in reasons], len(samples), index)
        done = [one for one, _ in found]
        totals = sum((Counter(one.counts) for one in done), Counter[str]())
        return _Done([row for one in done for row in one.rows], dict(totals))

    def _check_share(self, what: str, reasons: Sequence[str | None], total: int, index: int) -> None:
        """UserError where more of the samples are lost than may be. What is in the ledger stays there."""
        if len(reasons) > self.stage.not_judged_limit * total:
            raise UserError(
                f"stage {self.ctx.name}, chunk {index + 1}: {len(reasons) / total:.1%} of the samples {what}, more than "
                f"not_judged_limit={self.stage.not_judged_limit:g}; first reason: {reasons[0]}"
            )

    def _judged(self, samples: Sequence[tuple[Prompt, Answer]]) -> list[_Opinion]:
        """What the judge function says. Without one all samples are right, unless a model is to judge them."""
        if self.stage.judge is None:
            return [_Opinion(None, "it has no reference answer") if self.referee else _Opinion(True)] * len(samples)
        items = [(prompt, answer.text) for prompt, answer in samples]
        verdicts = [found["judge"] for found in self.judge.judge(items, [["judge"]] * len(items))]
        return [_Opinion(None if found.value is None else found.value > 0.5, found.reason or "") for found in verdicts]

    def _refereed(
        self, referee: Teacher, samples: Sequence[tuple[Prompt, Answer]], opinions: Sequence[_Opinion], seed: str
    ) -> list[_Opinion]:
        """The opinions, with a judge model's where there was none and there is a reference to compare with."""
        found, asked = list(opinions), dict[int, Question]()
        for place, (prompt, answer) in enumerate(samples):
            if found[place].right is not None or answer.finish == "failed" or prompt.answer is None:
                continue
            request = agreement.request(prompt, answer.text)
            if request is None:
                found[place] = _Opinion(False)
            else:
                asked[place] = Question(Prompt(f"{prompt.id}/{place}", request), ())
        for place, (reply,) in zip(asked, referee.answer(list(asked.values()), 1, seed), strict=True):
            reason = f"the judge endpoint {reply.error or f'said {reply.text[-80:]!r}'}"
            found[place] = _Opinion(agreement.verdict(reply.text), reason)
        return found

    def _kept(self, question: Question, answers: Sequence[Answer], correct: Sequence[bool | None]) -> tuple[_Done, list[str]]:
        """Of one prompt's answers the first that pass, at most `keep`; and why others could not be rewritten."""
        rows: list[Row] = []
        lost: list[str] = []
        counts = Counter(samples=len(answers))
        for answer, right in zip(answers, correct, strict=True):
            reason = _rejected(answer, right) or self.filters.reason(question.prompt, answer.text, answer.finish)
            if reason is None and len(rows) == self.stage.keep:
                reason = "enough_of_this_prompt"
            text: str | None = answer.text
            if reason is None and self.stage.rewrite is not None:
                said = self._said("rewrite", question.prompt, answer.text)
                text = said.text
                if text is None:
                    reason = "not_rewritten"
                    lost += [said.reason] if said.reason is not None else []
            if reason is not None:
                counts[f"dropped {reason}"] += 1
                continue
            rows.append(_row(question.prompt, answer, str(text)))
        return _Done(rows, dict(counts)), lost

    def _said(self, function: str, prompt: Prompt, text: str) -> Verdict:
        return self.judge.judge([(prompt, text)], [[function]])[0][function]

    def _share(self, prompt: Prompt, text: str) -> float | None:
        """The share of a text that is in its prompt's language; None where there is nothing to measure."""
        said = self._said("language", prompt, text)
        if said.value is None and said.reason not in NO_VALUE:
            raise UserError(f"stage {self.ctx.name}: filters.language does not judge an answer to {prompt.id}: {said.reason}")
        return said.value


def _rejected(answer: Answer, right: bool | None) -> str | None:
    if answer.finish == "failed":
        return "not_answered"
    if right is None:
        return "not_judged"
    return None if right else "wrong"


def _row(prompt: Prompt, answer: Answer, text: str) -> Row:
    history = [{"role": turn.role, "content": turn.content} for turn in prompt.history]
    turns = [*history, {"role": "user", "content": prompt.text}, {"role": "assistant", "content": text}]
    # A text that was rewritten was never sampled.
    ids = list(answer.ids) if answer.ids is not None and text == answer.text else None
    return {"messages": turns, "prompt_id": prompt.id, "answer": prompt.answer, "response_ids": ids}


def _different(rows: list[Row], threshold: float | None, counts: Counter[str]) -> list[Row]:
    """Without near-duplicates: of samples with almost the same words the first is kept."""
    if threshold is None:
        return rows
    found = near_duplicates((" ".join(message["content"] for message in row["messages"]) for row in rows), threshold)
    counts["dropped near_duplicate"] = len(rows) - len(found.kept)
    return [rows[place] for place in found.kept]


def _summary(counts: Counter[str]) -> dict[str, int]:
    return {name.replace(" ", "/"): count for name, count in sorted(counts.items())}


def _reasons(counts: Counter[str]) -> str:
    return ", ".join(f"{name.removeprefix('dropped ')} {count}" for name, count in counts.most_common() if name.startswith("dropped"))
