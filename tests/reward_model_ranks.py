"""What ranks do with a reward model under one layout; test_reward_model_layouts runs it in one process and in several."""

import json
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import megatron_support as support
import torch
import torch.distributed as dist
from megatron_support import Case
from safetensors.torch import load_file
from torch import Tensor

from r1mega.config.layout import Layout
from r1mega.config.training import Optimizer, Train
from r1mega.megatron import reward_model
from r1mega.megatron.checkpoint import Checkpoints
from r1mega.megatron.policy import Policy
from r1mega.megatron.reward_model import RewardModel
from r1mega.objectives import preference
from r1mega.weights.architecture import Architecture
from r1mega.weights.moving import reader_of

IDS = [sequence.tokens.tolist() for sequence in support.sequences()]


def pairs_loss(scores: Tensor) -> Tensor:
    return preference.pairwise(scores[0::2], scores[1::2]).mean()


def built(case: Case) -> Policy:
    """A reward model with random weights."""
    train = Train(**{"chunk_tokens": 64, **case.train})
    arch = Architecture.from_hf(support.CONFIGS[case.model]).scored()
    policy = Policy(arch, Layout(**case.layout), train, Optimizer(lr=1e-3, distributed=case.distributed))
    policy.exchange.load(reader_of(support.random_weights(arch)))
    return policy


def run(case: Case) -> tuple[support.Outcome, list[float]]:
    """Score and step; returns the gradients, or the weights after `case.steps`, and all scores that were seen."""
    policy = built(case)
    batches = policy.microbatches(reward_model.as_sequences(IDS))
    seen = reward_model.scores(policy, batches, len(IDS)).tolist()
    for _ in range(case.steps or 1):
        result, before = reward_model.step(policy, batches, len(IDS), pairs_loss, 1e-3 if case.steps else 0.0)
        seen += before.tolist()
    scalars = {"loss": result.loss, "grad_norm": result.grad_norm}
    if case.steps:
        local = {key: weight.detach().clone() for key, weight in policy.weights.items()}
    else:
        local = {key: weight.main_grad.clone() for key, weight in policy.weights.items() if hasattr(weight, "main_grad")}
    return support.Outcome(policy, scalars, {}, local), seen


def scored_by_a_policy(case: Case, folder: Path) -> tuple[list[float], list[str]]:
    """(scores of the reward model in `folder` on a policy that was trained, the policy's weights that are not what they were)."""
    arch = Architecture.from_hf(support.CONFIGS[case.model])
    policy = Policy(arch, Layout(**case.layout), Train(chunk_tokens=64), Optimizer(lr=1e-3))
    policy.exchange.load(reader_of(support.random_weights(arch, seed=1)))
    policy.step(policy.microbatches(support.sequences()), support.objective, 1e-3)
    before = policy.host_copy()
    model = RewardModel(policy, folder)
    found = model.scores(IDS).tolist()
    pairs = zip(policy.weights, before, policy.weights.values(), strict=True)
    return found, [name for (_, name), old, new in pairs if not torch.equal(old, new)]


def saved_and_restored(case: Case, other: dict[str, Any], folder: Path) -> bool:
    """Whether a step that another layout goes on with from a checkpoint leads to nearly the same weights."""
    policy = built(case)
    reward_model.step(policy, policy.microbatches(reward_model.as_sequences(IDS)), len(IDS), pairs_loss, 1e-3)
    checkpoints = Checkpoints(policy, folder)
    checkpoints.save("one", {"update": 1}, None)
    checkpoints.wait()
    found = []
    for layout in (case.layout, other):
        again = built(Case(case.model, layout, case.train, case.steps, case.distributed))
        Checkpoints(again, folder).restore(None)
        reward_model.step(again, again.microbatches(reward_model.as_sequences(IDS)), len(IDS), pairs_loss, 1e-3)
        found.append({name: value.clone() for name, value in again.exchange.gather(torch.float32).items()})
    first, second = found
    return all(torch.allclose(first[name], second[name], rtol=0, atol=1e-5) for name in first) and "score.weight" in first


def work(rank: int, world: int, port: int, folder: Path, cases: Sequence[Case]) -> None:
    """Write `folder/rank-<r>.json`: what each case came to here, or the error."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=120))
    report: dict[str, Any] = {}
    with support.cpu_platform():
        for case in cases:
            report[case.name] = _compared(case, folder)
        if world == 2:
            case = Case("v3", {"tp": 2, "ep": 2}, steps=1, distributed=True)
            report["restored"] = saved_and_restored(case, {"pp": 2}, folder / "checkpoints")
    (folder / f"rank-{rank}.json").write_text(json.dumps(report))


def _compared(case: Case, folder: Path) -> dict[str, Any]:
    try:
        outcome, seen = run(case)
        reference = load_file(folder / f"{case.reference.name}.safetensors")
        report = {"scalars": outcome.scalars, "scores": seen, "differences": support.differences(outcome, reference)}
        if not case.steps:
            found, changed = scored_by_a_policy(case, folder / f"{case.model} reward model")
            report |= {"by a policy": found, "changed": changed}
        return report
    except Exception:
        return {"error": traceback.format_exc()}
