"""Routing replay in one process: the router's own experts, others, and what is counted. Layouts are in test_megatron_layouts, values and
gradients against autograd in test_megatron_reference."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("megatron.core")
import megatron_support as support

from r1mega.config.layout import Layout
from r1mega.config.training import Optimizer, Train
from r1mega.data.packing import ROUTED, ROUTING, TokenSequence
from r1mega.megatron.policy import LocalBatch, Policy
from r1mega.weights.architecture import Architecture
from r1mega.weights.moving import reader_of

pytestmark = pytest.mark.lane
RATE = 1e-3


@pytest.fixture(scope="module", autouse=True)
def cpu():
    with support.cpu_platform():
        yield


def built(model: str, recompute: str = "none") -> Policy:
    arch = Architecture.from_hf(support.CONFIGS[model])
    rate = RATE if arch.moe.expert_bias else 0.0
    train = Train(chunk_tokens=128, logprob_chunk=17, router_bias_rate=rate, recompute=recompute)
    policy = Policy(arch, Layout(), train, Optimizer(lr=1e-3, clip_grad=0.0))
    policy.exchange.load(reader_of(support.random_weights(arch)))
    return policy


@contextmanager
def watched(policy: Policy) -> Iterator[list[list[Tensor]]]:
    """By sparse layer, the routing map [tokens, experts] of every pass of its router."""
    routers = [layer.mlp.router for layer in policy.chunks[0].decoder.layers if hasattr(layer.mlp, "router")]
    seen: list[list[Tensor]] = [[] for _ in routers]
    hooks = [
        router.register_forward_hook(lambda _m, _a, out, kept=kept: kept.append(out[1].clone()))
        for router, kept in zip(routers, seen, strict=True)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def choices(policy: Policy, sequences: list[TokenSequence]) -> list[TokenSequence]:
    """The same sequences with the experts that the policy's own routers choose for them, in an order that is not theirs."""
    batches = policy.microbatches(sequences)
    with watched(policy) as seen:
        policy.logprobs(batches)
    found = list(sequences)
    for index, batch in enumerate(batches):
        experts = torch.stack([torch.stack([row.nonzero()[:, 0].flip(0) for row in layer[index]]) for layer in seen], 1)
        start = 0
        for end in (batch.ends >= 0).nonzero()[:, 0].tolist():
            which, fed = int(batch.ends[end]), experts[start : end + 1]
            routing = torch.cat([torch.zeros_like(fed[:1]), fed[:-1]]).to(torch.uint8)
            routed = torch.arange(len(routing)) > 0
            found[which] = replace(found[which], extras={**found[which].extras, ROUTING: routing, ROUTED: routed})
            start = end + 1
    return found


def stepped(policy: Policy, batches: list[LocalBatch]) -> tuple[float, dict]:
    """The loss of one step, and all weights after it and all gradients."""
    loss = policy.step(batches, support.objective, 1e-3).loss
    after = {key: weight.detach().clone() for key, weight in policy.weights.items()}
    return loss, after | {(*key, "grad"): w.main_grad.clone() for key, w in policy.weights.items() if hasattr(w, "main_grad")}


@pytest.mark.parametrize("model", ["v3", "moonlight", "v2"])
def test_own_experts_replayed_change_no_bit(model):
    policy = built(model)
    before = policy.host_copy()
    loss, plain = stepped(policy, policy.microbatches(support.sequences()))
    again = built(model)
    assert all(torch.equal(a, b) for a, b in zip(before, again.host_copy(), strict=True))
    batches = again.microbatches(choices(again, support.sequences()))
    assert sum(int(batch.packing.routing.routed.sum()) for batch in batches) > 300
    replayed, found = stepped(again, batches)
    assert replayed == loss
    assert found.keys() == plain.keys() and all(torch.equal(plain[key], found[key]) for key in plain)
    assert again.routing_disagreement(batches) == {"tokens": 0.0, "routers": 0.0}


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_given_experts_are_taken_and_counted(recompute):
    """Where they are known; and the bias moves against the load that they make, once also when a layer is computed again."""
    policy = built("v3", recompute)
    moe = policy.arch.moe
    batches = policy.microbatches(support.routed(support.sequences(), policy.arch))
    before = {key: bias.clone() for key, bias in policy.weights.items() if key[1].endswith("expert_bias")}
    with watched(policy) as seen:
        policy.step(batches, support.objective, 1e-3)
    # Recomputation runs in the backward pass of each micro-batch: every map is seen twice in a row.
    passes = 2 if recompute == "full" else 1
    for layer, ((_, name), bias) in enumerate(before.items()):
        maps = seen[layer][::passes]
        assert len(maps) == len(batches) > 2
        for batch, found, repeated in zip(batches, maps, seen[layer][passes - 1 :: passes], strict=True):
            routing = batch.packing.routing
            given = torch.zeros_like(found).scatter_(1, routing.experts[:, layer].long(), True)
            assert torch.equal(found[routing.routed], given[routing.routed]) and torch.equal(found, repeated)
            assert not torch.equal(found[~routing.routed], given[~routing.routed])
        load = torch.cat(maps).sum(0).float()
        assert load.sum() == moe.top_k * sum(len(batch.tokens) for batch in batches)
        assert torch.equal(policy.weights[0, name], bias + RATE * (load.mean() - load).sign())


def test_without_replay_routers_choose_and_nothing_is_counted():
    policy = built("v3")
    plain = policy.logprobs(policy.microbatches(support.sequences()))
    batches = policy.microbatches(support.routed(support.sequences(), policy.arch))
    assert all(torch.equal(a, b) for a, b in zip(plain, policy.logprobs(batches, replay=False), strict=True))
    assert policy.routing_disagreement(batches)["tokens"] == 0
    given = policy.logprobs(batches)
    assert max((a - b).abs().max().item() for a, b in zip(plain, given, strict=True)) > 0.01
    assert policy.routing_disagreement(batches)["tokens"] > 0.9
    assert policy.routing_disagreement(policy.microbatches(support.sequences())) == {}
