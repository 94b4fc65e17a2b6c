"""The mismatch budget: how far the engine that draws may be from the trainer that learns, what is done beyond, and why it is so."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from r1mega.config.stages import Grpo
from r1mega.config.trust import Limit
from r1mega.megatron.policy import LocalBatch, Policy
from r1mega.objectives.mismatch import Gap
from r1mega.pipeline import files
from r1mega.pipeline.context import StageContext
from r1mega.rollout.ask import Question, scores
from r1mega.rollout.attribution import Facts, Verdict, verdict
from r1mega.rollout.engine import Engine, Sample, SamplingParams, Scoring
from r1mega.stages.attribution import Reader, Side, facts


@dataclass(frozen=True)
class Decision:
    """What the budget says of one rollout."""

    row: dict[str, float] = field(default_factory=dict)
    """For the metrics of its first update."""
    corrects: bool = False
    """Whether it is trained on with the corrections of objective.mismatch."""
    stop: str | None = None
    """Why the run ends before it."""


@dataclass(frozen=True)
class Part:
    """One minibatch of a rollout: its responses, and this rank's micro-batches of them, which have `old_logprobs`."""

    samples: Sequence[Sample]
    batches: Sequence[LocalBatch]


class Guard:
    """Holds the budget of a stage against its rollouts, and says why one exceeds it."""

    def __init__(self, ctx: StageContext, stage: Grpo, policy: Policy, engine: Engine, questions: Sequence[Question]) -> None:
        self._ctx, self._policy, self._engine = ctx, policy, engine
        self._trust, self._mismatch = stage.trust, stage.objective.mismatch
        self._probe = [Scoring(question.ids, 1) for question in questions if len(question.ids) > 1][: stage.trust.probe]
        self._probed: dict[str, float] = {}
        self._reader = Reader(policy, self._probe) if self._probe else None
        self._synced = False
        self._kept: list[list[Tensor]] = []
        self._attributed: int | None = None
        # Facts are asked of an idle engine that has the weights which drew every token.
        self._can_ask = not (stage.partial or stage.staleness or engine.colocated)

    @property
    def asks_ahead(self) -> bool:
        """Whether the trainer's log-probs are wanted of every minibatch before the first is trained on."""
        return bool(self._trust.budget) or self._trust.attribution.every > 0

    # -------------------------------------------------------- around a sync

    @contextmanager
    def syncing(self) -> Iterator[None]:
        """Around every sync: what engine and trainer make of the fixed probe batch before and after; and the weights, where kept."""
        reader = self._reader
        wanted = reader.logprobs(1.0) if reader is not None else None
        probed = self._apart("before", wanted) if wanted is not None and self._synced and not self._engine.colocated else {}
        yield
        self._synced = True
        if wanted is not None:
            self._probed = probed | self._apart("after", wanted)
        if self._trust.attribution.keep_previous:
            self._kept = [*self._kept[-1:], self._policy.host_copy()]

    def _apart(self, when: str, wanted: Tensor) -> dict[str, float]:
        read = torch.cat([one.logprobs for one in scores(self._engine, self._probe, 0)])
        gap = (wanted - read).abs()
        return {f"probe_gap/{when}_mean": gap.mean().item(), f"probe_gap/{when}_max": gap.max().item()}

    # -------------------------------------------------------- before a rollout is trained on

    def hold(self, update: int, parts: Sequence[Part], sampling: SamplingParams) -> Decision:
        """Compare a rollout with the budget, before update `update` (counted from 0) is trained on. Every rank calls it alike."""
        always = self._mismatch.corrects and self._mismatch.when == "always"
        row, self._probed = self._probed, {}
        if not self.asks_ahead:
            return Decision(row, always)
        gap = Gap.joined([measured(self._policy, part.batches, len(part.samples)) for part in parts])
        measures = row | gap.measures()
        # What is no number is within no budget.
        beyond = [limit for limit in self._trust.budget if not measures.get(limit.measure, 0.0) <= limit.most]
        corrects = always or any(limit.then == "correct" for limit in beyond)
        if self._trust.budget:
            row |= {f"budget/{limit.measure}": measures[limit.measure] for limit in self._trust.budget if limit.measure in measures}
            row |= {"budget/exceeded": float(len(beyond)), "budget/corrected": float(corrects)}
        for limit in beyond:
            self._note(update, _said(limit, measures))
        why = ""
        if gap.measures() and self._attribution_is_due(update, bool(beyond)):
            found = self._attribute(update, gap, [sample for part in parts for sample in part.samples], sampling, beyond, measures)
            row |= {"attribution/gap": found.gap} | {f"attribution/{cause.name}": cause.share for cause in found.causes}
            why = f"; {found.line}"
        stops = [limit for limit in beyond if limit.then == "stop"]
        return Decision(row, corrects, _said(stops[0], measures) + why if stops else None)

    def _attribution_is_due(self, update: int, exceeded: bool) -> bool:
        wanted, last = self._trust.attribution, self._attributed
        if not self._can_ask:
            return False
        if exceeded and (last is None or update - last >= wanted.again):
            return True
        return wanted.every > 0 and (last is None or update - last >= wanted.every)

    def _attribute(
        self,
        update: int,
        gap: Gap,
        samples: Sequence[Sample],
        sampling: SamplingParams,
        beyond: Sequence[Limit],
        measures: dict[str, float],
    ) -> Verdict:
        """Look at the responses with the largest gap; leave the verdict as a file and a line."""
        wanted, self._attributed = self._trust.attribution, update
        tokens, _, absolute = gap.sequences.unbind(dim=1)
        worst = (absolute / tokens.clamp(min=1)).argsort(descending=True, stable=True)[: wanted.responses].tolist()
        previous = self._kept[0] if len(self._kept) == 2 else None
        rollout = self._ctx.recipe.rollout
        side = Side(update, rollout.dtype, rollout.routing_replay == "rollout", previous)
        seed = f"{self._ctx.seed}/{self._ctx.name}/{update}/attribution"
        known = facts(self._policy, self._engine, [samples[index] for index in worst], sampling, side, wanted.new_tokens, seed)
        found = verdict(known)
        path = self._ctx.dir / "trust" / f"update-{update + 1:06d}.json"
        if self._ctx.rank == 0:
            path.parent.mkdir(exist_ok=True)
            exceeded = [_said(limit, measures) for limit in beyond]
            files.write_json(path, {"update": update + 1, "exceeded": exceeded, "responses": worst, **_record(known, found)})
        self._note(update, f"{found.line} (trust/{path.name})")
        return found

    def _note(self, update: int, text: str) -> None:
        self._ctx.progress.note(f"{self._ctx.name}: update {update + 1}: {text}")


def measured(policy: Policy, batches: Sequence[LocalBatch], sequences: int) -> Gap:
    """The gap of one update's micro-batches, which have `old_logprobs`, over all ranks; `sequences` is how many sequences it has.

    What travels are a histogram and three numbers a sequence, never tokens.
    """
    gap = Gap.nothing(sequences, policy.device)
    if policy.counts:
        for batch in batches:
            extras = batch.extras
            # Where nobody has the weights any more, the engine's log-probs stand for the trainer's.
            mask = batch.mask & ~extras["earlier"] if "earlier" in extras else batch.mask
            gap += Gap.of(extras["old_logprobs"], extras["rollout_logprobs"], mask, extras["sequence"], sequences)
    return Gap(policy.total(gap.added).cpu(), policy.highest(gap.highest).cpu())


_DOES = {"warn": "", "correct": "; trained on with objective.mismatch", "stop": ""}


def _said(limit: Limit, measures: dict[str, float]) -> str:
    return f"{limit.measure} is {measures[limit.measure]:.3g}, more than its budget of {limit.most:g}{_DOES[limit.then]}"


def _record(known: Facts, found: Verdict) -> dict[str, object]:
    return {
        "verdict": found.line,
        "causes": [{"name": cause.name, "share": cause.share, "why": cause.why} for cause in found.causes],
        "numbers": found.numbers,
        "tokens": len(known.recorded),
        "sampling": {"temperature": known.temperature, "top_p": known.top_p},
        "weight_version": known.version,
        "tokens_by_version": {str(version): count for version, count in known.versions.items()},
        "dtypes": {"engine": known.engine_dtype, "trainer": known.trainer_dtype},
        "differing": None if known.differing is None else list(known.differing.names),
    }
