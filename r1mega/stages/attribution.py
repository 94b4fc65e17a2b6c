"""The facts that a gap between engine and trainer is explained by, measured on a few of the responses that show it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from r1mega.data.packing import TokenSequence
from r1mega.megatron.policy import LocalBatch, Policy
from r1mega.pipeline import ranks
from r1mega.rollout.ask import sample_seed, scores
from r1mega.rollout.attribution import Facts, fitted_temperature, nucleus_logprobs
from r1mega.rollout.engine import Differences, Engine, Request, Sample, SamplingParams, Scoring
from r1mega.stages.minibatch import routing_extras
from r1mega.weights.source import WeightSource

_TOP = 64
"""Likeliest tokens that the nucleus is looked for in."""


class Reader:
    """The trainer's log-probs of given tokens, on every rank."""

    def __init__(self, policy: Policy, scorings: Sequence[Scoring], extras: Sequence[dict[str, Tensor]] | None = None) -> None:
        """Pack the sequences; every rank has all of them. `extras`: more to go with each, the experts that its tokens are sent through."""
        self._policy, self._tokens = policy, 0
        sequences: list[TokenSequence] = []
        for one, more in zip(scorings, extras or [{}] * len(scorings), strict=True):
            places = torch.full((len(one.ids),), -1)
            places[one.start :] = self._tokens + torch.arange(len(one.ids) - one.start)
            self._tokens += len(one.ids) - one.start
            sequences.append(TokenSequence(torch.tensor(one.ids), (places >= 0).float(), {"place": places, **more}))
        self._batches: list[LocalBatch] = policy.microbatches(sequences)

    def logprobs(self, temperature: float) -> Tensor:
        """float64 [P] in host memory: of all scored tokens, one sequence after the other."""
        found = self._policy.logprobs(self._batches, temperature)
        flat = torch.zeros(self._tokens, dtype=torch.float64)
        if self._policy.counts and found is not None:
            for batch, values in zip(self._batches, found, strict=True):
                flat[batch.extras["place"][batch.mask].cpu()] = values[batch.mask].double().cpu()
        return self._policy.total(flat).cpu()


@dataclass(frozen=True)
class Side:
    """What is known of engine and trainer beside their log-probs."""

    version: int
    """Of the trainer's weights."""
    engine_dtype: str
    replays: bool = False
    """Whether the trainer replays the engine's choice of experts."""
    previous: Sequence[Tensor] | None = None
    """The trainer's weights of the sync before, as `Policy.host_copy` gives them."""


def facts(policy: Policy, engine: Engine, samples: Sequence[Sample], sampling: SamplingParams, side: Side, new: int, seed: str) -> Facts:
    """Measure what there is to know about the gap of these samples. Every rank calls it with all of them; weights stay as they are.

    The engine must still hold the weights that drew the samples, and the trainer those that they were drawn for.

    Args:
        sampling: how the recipe says that they were drawn.
        new: most tokens of a response that is drawn to compare drawing with reading.
        seed: of these responses.
    """
    scorings = [Scoring(one.prompt_ids + one.response_ids, len(one.prompt_ids)) for one in samples]
    temperature, top_p = sampling.temperature, sampling.top_p
    read = scores(engine, scorings, min(_TOP, policy.arch.vocab) if top_p < 1 else 0)
    drawn = _drawn(engine, samples, sampling, new, seed)
    differing = _compared(engine, policy.exchange)

    routing = [routing_extras(one) for one in samples]
    reader = Reader(policy, scorings, routing if side.replays else None)
    recorded = torch.tensor([logprob for one in samples for logprob in one.logprobs], dtype=torch.float64)
    trainer, plain = reader.logprobs(temperature), reader.logprobs(1.0)
    fitted, at_fitted = fitted_temperature(recorded, reader.logprobs, temperature)
    nucleus = None
    if top_p < 1:
        nucleus = nucleus_logprobs(trainer, plain, torch.cat([one.top_logprobs for one in read]).double(), temperature, top_p)
    replayed = Reader(policy, scorings, routing).logprobs(temperature) if all(routing) and not side.replays else None
    previous = differing_previous = None
    if side.previous is not None:
        with policy.holding(side.previous):
            previous, differing_previous = reader.logprobs(temperature), _compared(engine, policy.exchange)
    return Facts(
        recorded=recorded,
        trainer=trainer,
        trainer_plain=plain,
        engine_plain=torch.cat([one.logprobs for one in read]).double(),
        drawn=drawn,
        temperature=temperature,
        top_p=top_p,
        fitted_temperature=fitted,
        fitted=at_fitted,
        version=side.version,
        versions=_versions(samples),
        engine_dtype=side.engine_dtype,
        trainer_dtype=policy.train.dtype if policy.train.fp8 == "none" else f"fp8 ({policy.train.fp8})",
        nucleus=nucleus,
        replayed=replayed,
        differing=differing,
        differing_previous=differing_previous,
        previous=previous,
        rounded_plain=_rounded(policy, side.engine_dtype, partial(reader.logprobs, 1.0)),
    )


def _drawn(engine: Engine, samples: Sequence[Sample], sampling: SamplingParams, new: int, seed: str) -> Tensor:
    """float64 [any]: log-probs of tokens that the engine draws at temperature 1, minus those that it then reads the same tokens with."""
    requests = [
        Request(one.prompt_ids, sample_seed(f"{seed}/{index}"), min(new, len(one.response_ids))) for index, one in enumerate(samples)
    ]
    found = ranks.collected(engine.generate(ranks.dealt(requests), SamplingParams(stop_token_ids=sampling.stop_token_ids)))
    read = scores(engine, [Scoring(one.prompt_ids + one.response_ids, len(one.prompt_ids)) for one in found], 0)
    parts = [torch.tensor(one.logprobs, dtype=torch.float64) - known.logprobs for one, known in zip(found, read, strict=True)]
    return torch.cat(parts)


def _compared(engine: Engine, source: WeightSource) -> Differences | None:
    """What differs on any rank: an embedded engine has weights on each."""
    found = ranks.gathered(engine.differing(source))
    known = [one for one in found if one is not None]
    if len(known) < len(found):
        return None
    return Differences(tuple(dict.fromkeys(name for one in known for name in one.names)), known[0].compared)


def _versions(samples: Sequence[Sample]) -> dict[int, int]:
    """Tokens by the weight version that drew them."""
    found: dict[int, int] = {}
    for one in samples:
        earlier = sum(count for _, count in one.earlier_versions)
        for version, count in (*one.earlier_versions, (one.weight_version, len(one.response_ids) - earlier)):
            found[version] = found.get(version, 0) + count
    return found


def _rounded(policy: Policy, engine_dtype: str, logprobs: Callable[[], Tensor]) -> Tensor | None:
    """What the trainer makes of its own weights in the engine's dtype; None where they have that precision already."""
    if torch.finfo(getattr(torch, engine_dtype)).eps <= torch.finfo(getattr(torch, policy.train.dtype)).eps:
        return None
    dtype = getattr(torch, engine_dtype)
    # What has no gradient, router biases, stays in float32 on every engine.
    rounded = [weight.detach().to("cpu", dtype) if weight.requires_grad else None for weight in policy.weights.values()]
    with policy.holding(rounded):
        return logprobs()
