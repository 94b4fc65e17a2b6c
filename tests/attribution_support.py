"""An engine that is looked at by the trainer it belongs to."""

from typing import Any

import sglang_support as support
import torch

from r1mega.megatron.policy import Policy
from r1mega.rollout.attribution import Facts, Verdict, verdict
from r1mega.rollout.engine import Engine, SamplingParams
from r1mega.stages.attribution import Side, facts

NOW = 7
"""The trainer's weight version."""
PLAIN = SamplingParams(1.0, 1.0, (2,))


def looked_at(
    policy: Policy, engine: Engine, claimed: SamplingParams, drawn: SamplingParams | None = None, **side: Any
) -> tuple[Facts, Verdict]:
    """Draw with `drawn`, which is what the recipe claims unless said otherwise, and ask why the log-probs differ."""
    samples = engine.generate(support.requests(12, new=24), drawn or claimed)
    before = policy.host_copy()
    found = facts(policy, engine, samples, claimed, Side(NOW, **{"engine_dtype": "float32", **side}), 24, "seed")
    assert all(torch.equal(a, b) for a, b in zip(before, policy.host_copy(), strict=True)), "looking changes nothing"
    said = verdict(found)
    print(said.line, {name: float(f"{value:.3g}") for name, value in said.numbers.items()})
    return found, said
