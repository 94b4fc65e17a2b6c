"""Why an engine's log-probs are not the trainer's: facts on a probe batch, and the verdict that follows from them.

All log-probs are natural and of the same P drawn tokens of a few responses. A cause explains the share of the mean gap that is gone once
the trainer's log-probs are replaced by what they would be under it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from r1mega.rollout.engine import Differences

Name = Literal["version", "weights", "sampling", "routing", "precision", "kernels", "rest"]

NOTHING = 1e-5
"""Mean gap, in nats, that float32 alone can leave between two ways of computing the same."""
_EXPLAINS = 0.5
"""Share of the gap from which on a cause is named."""
_ACTIVATIONS = 4.0
"""How much larger the gap of an engine that computes in a coarse dtype may be than that of rounding the weights to it: activations are
rounded too, in every layer."""


@dataclass(frozen=True)
class Facts:
    """What was measured. Log-probs are float64 [P]."""

    recorded: Tensor
    """As the engine gave them when it drew the tokens."""
    trainer: Tensor
    """The trainer's, by the recipe's definition: tempered by `temperature`, the full softmax."""
    trainer_plain: Tensor
    """The trainer's at temperature 1."""
    engine_plain: Tensor
    """The engine's at temperature 1, as it reads the same tokens now."""
    drawn: Tensor
    """float64 [any], of other tokens: the engine's log-probs at temperature 1 as it drew them, minus those as it reads them."""
    temperature: float
    top_p: float
    fitted_temperature: float
    """At which the trainer is nearest to `recorded`."""
    fitted: Tensor
    """The trainer's at that temperature."""
    version: int
    """Of the trainer's weights."""
    versions: Mapping[int, int]
    """Tokens by the weight version that the engine says drew them."""
    engine_dtype: str
    trainer_dtype: str
    nucleus: Tensor | None = None
    """The trainer's by the definition that leaves out what top-p leaves out; None at top-p 1."""
    differing: Differences | None = None
    """Parameters of the engine that are not the trainer's; None where it cannot tell."""
    differing_previous: Differences | None = None
    """The same against the weights of the sync before, where they were kept."""
    previous: Tensor | None = None
    """The trainer's with those weights."""
    rounded_plain: Tensor | None = None
    """The trainer's at temperature 1 with its weights rounded to the engine's dtype; None where that changes nothing."""
    replayed: Tensor | None = None
    """The trainer's with the engine's choice of experts replayed, where that is measured."""


@dataclass(frozen=True)
class Cause:
    """One reason for the gap."""

    name: Name
    share: float
    """Of the mean gap that it explains, 0 to 1."""
    why: str
    """What that rests on, in words and numbers."""


@dataclass(frozen=True)
class Verdict:
    """What the gap comes from."""

    gap: float
    """Mean of |trainer - recorded| over the probe batch."""
    causes: list[Cause]
    """Those that are named, the one that explains most first; none where there is no gap."""
    numbers: dict[str, float] = field(default_factory=dict)
    """What was measured, by name."""

    @property
    def line(self) -> str:
        """The verdict in one line."""
        if not self.causes:
            return f"no gap to explain: {self.gap:.2g} is within float32's rounding"
        return f"mean gap {self.gap:.2g} comes from " + "; also ".join(f"{cause.name}: {cause.why}" for cause in self.causes)


def verdict(facts: Facts) -> Verdict:
    """Name what explains at least half of the gap; where nothing does, the rest."""
    gap = _distance(facts.trainer, facts.recorded)
    numbers = _numbers(facts)
    if gap <= NOTHING:
        return Verdict(gap, [], numbers)
    found = [cause for ask in _QUESTIONS if (cause := ask(facts, gap)) is not None]
    named = sorted((cause for cause in found if cause.share >= _EXPLAINS), key=lambda cause: -cause.share)
    shares = {f"share/{cause.name}": cause.share for cause in found}
    # Precision and kernels are what is left over when bytes and definitions agree: they do not compete with what is proven.
    proven = [cause for cause in named if cause.name not in ("precision", "kernels")]
    return Verdict(gap, proven or named[:1] or [_rest(facts)], numbers | shares)


def fitted_temperature(recorded: Tensor, logprobs: Callable[[float], Tensor], start: float) -> tuple[float, Tensor]:
    """The temperature at which `logprobs` [P] are nearest to the recorded ones, between a quarter and four times `start`, and they.

    A grid of factors of sqrt(2), then a golden-section search around its best point, to 1 %. 19 evaluations.
    """
    seen: dict[float, Tensor] = {}

    def distance(log: float) -> float:
        if log not in seen:
            seen[log] = logprobs(start * math.exp(log))
        return _distance(seen[log], recorded)

    step = math.log(2) / 2
    best = min((step * place for place in range(-4, 5)), key=distance)
    golden = (math.sqrt(5) - 1) / 2
    low, high = best - step, best + step
    left, right = high - golden * (high - low), low + golden * (high - low)
    for _ in range(9):
        if distance(left) <= distance(right):
            high, right = right, left
            left = high - golden * (high - low)
        else:
            low, left = left, right
            right = low + golden * (high - low)
    found = min(seen, key=distance)
    return start * math.exp(found), seen[found]


def nucleus_logprobs(trainer: Tensor, trainer_plain: Tensor, top: Tensor, temperature: float, top_p: float) -> Tensor:
    """Log-probs [P] renormalised over the nucleus: the trainer's tempered ones minus the log of the mass that top-p keeps.

    `top` [P, k] are log-probs at temperature 1 of the k likeliest tokens in each place. How much all of them weigh at another temperature
    follows from one token whose log-prob is known at both: log Z = trainer_plain / temperature - trainer.
    """
    log_norm = trainer_plain / temperature - trainer
    probs = (top / temperature - log_norm[:, None]).exp()
    kept = (probs.cumsum(-1) - probs) < top_p
    return trainer - (probs * kept).sum(-1).log()


# ---------------------------------------------------------------- one question a cause


def _version(facts: Facts, gap: float) -> Cause | None:
    """Stale or mixed by the engine's own word, or else by its weights."""
    tokens = sum(facts.versions.values())
    stale = tokens - facts.versions.get(facts.version, 0)
    if stale:
        said = ", ".join(f"{count} by version {version}" for version, count in sorted(facts.versions.items()))
        share = 1.0 if facts.previous is None else _explained(facts, facts.previous, gap)
        return Cause("version", share, f"of {tokens} tokens the engine drew {said}; the trainer is at {facts.version}")
    if facts.previous is None:
        return None
    share = _explained(facts, facts.previous, gap)
    same = facts.differing_previous is not None and facts.differing is not None and not facts.differing_previous.names
    if same and facts.differing is not None and facts.differing.names:
        return Cause(
            "version", max(share, _EXPLAINS), f"all of the engine's {facts.differing.compared} tensors are those of the sync before"
        )
    return Cause("version", share, f"the weights of the sync before leave {_distance(facts.previous, facts.recorded):.2g} of it")


def _weights(facts: Facts, gap: float) -> Cause | None:
    """Tensors that are not the trainer's, as far as the engine, reading the same tokens, is off by as much."""
    wrong = facts.differing
    if wrong is None or not wrong.names or (facts.differing_previous is not None and not facts.differing_previous.names):
        return None
    more = f" and {len(wrong.names) - 3} more" if len(wrong.names) > 3 else ""
    where = f"{', '.join(wrong.names[:3])}{more} of {wrong.compared} tensors on the engine are not the trainer's"
    return Cause("weights", min(1.0, _reading(facts) / facts.temperature / gap), where)


def _sampling(facts: Facts, gap: float) -> Cause | None:
    """Log-probs of another definition: another temperature, or the nucleus alone."""
    tempered = _explained(facts, facts.fitted, gap)
    if facts.nucleus is not None and (cut := _explained(facts, facts.nucleus, gap)) > tempered:
        return Cause("sampling", cut, f"log-probs are of the nucleus (top_p {facts.top_p:g}), not of the full softmax")
    if abs(math.log(facts.fitted_temperature / facts.temperature)) < 0.02:
        return None
    return Cause("sampling", tempered, f"log-probs are those of temperature {facts.fitted_temperature:.2f}, not {facts.temperature:g}")


def _routing(facts: Facts, gap: float) -> Cause | None:
    if facts.replayed is None:
        return None
    left = _distance(facts.replayed, facts.recorded)
    return Cause("routing", _explained(facts, facts.replayed, gap), f"with the engine's experts replayed {left:.2g} of it are left")


def _precision(facts: Facts, gap: float) -> Cause | None:
    """An engine of another dtype, off by no more than that dtype can make it."""
    if facts.engine_dtype == facts.trainer_dtype:
        return None
    what = f"the engine computes in {facts.engine_dtype}, the trainer in {facts.trainer_dtype}"
    if facts.rounded_plain is None:
        return Cause("precision", _EXPLAINS, f"{what}; nothing bounds what that makes")
    rounding = _distance(facts.rounded_plain, facts.trainer_plain)
    bound = _ACTIVATIONS * rounding / facts.temperature
    return Cause("precision", min(1.0, bound / gap), f"{what}; rounding its weights alone moves the trainer by {rounding:.2g}")


def _kernels(facts: Facts, gap: float) -> Cause | None:
    """An engine that does not agree with itself: drawing and reading the same tokens."""
    apart = facts.drawn.abs().mean().item() if len(facts.drawn) else 0.0
    return Cause(
        "kernels", min(1.0, apart / facts.temperature / gap), f"what the engine draws and what it then reads are {apart:.2g} apart"
    )


def _rest(facts: Facts) -> Cause:
    checked = "its weights could not be compared" if facts.differing is None else "its weights are right"
    read = _reading(facts)
    return Cause("rest", 1.0, f"none of what was looked at; reading the same tokens the engine is {read:.2g} off, {checked}")


_QUESTIONS: tuple[Callable[[Facts, float], Cause | None], ...] = (_version, _weights, _sampling, _routing, _precision, _kernels)


def _numbers(facts: Facts) -> dict[str, float]:
    found = {
        "gap": _distance(facts.trainer, facts.recorded),
        "reading": _reading(facts),
        "drawing_and_reading": facts.drawn.abs().mean().item() if len(facts.drawn) else math.nan,
        "fitted_temperature": facts.fitted_temperature,
        "fitted_left": _distance(facts.fitted, facts.recorded),
    }
    for name, other in (("nucleus", facts.nucleus), ("previous", facts.previous), ("replayed", facts.replayed)):
        if other is not None:
            found[f"{name}_left"] = _distance(other, facts.recorded)
    if facts.rounded_plain is not None:
        found["rounding"] = _distance(facts.rounded_plain, facts.trainer_plain)
    if facts.differing is not None:
        found |= {"tensors_compared": float(facts.differing.compared), "tensors_differing": float(len(facts.differing.names))}
    return found


def _reading(facts: Facts) -> float:
    """How far the engine, reading, is from the trainer, at temperature 1."""
    return _distance(facts.engine_plain, facts.trainer_plain)


def _explained(facts: Facts, other: Tensor, gap: float) -> float:
    """Share of the gap that is gone with other log-probs in the trainer's place."""
    return max(0.0, 1.0 - _distance(other, facts.recorded) / gap)


def _distance(a: Tensor, b: Tensor) -> float:
    return torch.mean((a - b).abs()).item()
