"""Losses and gradients against autograd through transformers' modules, and the MTP layer written out in plain torch."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

pytest.importorskip("megatron.core")
transformers = pytest.importorskip("transformers")
import megatron_support as support
from megatron_support import CONFIGS, Case

from r1mega.data.packing import ROUTED, ROUTING, TokenSequence
from r1mega.weights.architecture import Architecture

pytestmark = pytest.mark.lane
MTP_WEIGHT = 0.3


@pytest.fixture(scope="module", autouse=True)
def cpu():
    with support.cpu_platform():
        yield


class Reference:
    """A model whose weights are the canonical tensors, leaves of autograd."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.arch = Architecture.from_hf(config)
        self.leaves = {name: value.requires_grad_() for name, value in support.random_weights(self.arch).items()}
        self.model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config)).float().eval()
        self._given: Tensor | None = None
        self.differing: list[Tensor] = []
        """For each pass of a router that was given experts, bool [n]: whether it would have chosen others."""
        gates = [layer.mlp.gate for layer in self.model.model.layers if hasattr(layer.mlp, "gate")]
        for index, gate in enumerate(gates):
            gate.forward = partial(self._route, gate.forward, index)

    def _route(self, choose: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], layer: int, hidden: Tensor) -> tuple[Tensor, ...]:
        """A router's logits, and weights and indices of the experts: those that are given for a token, or else its own."""
        logits, weights, chosen = choose(hidden)
        if self._given is None:
            return logits, weights, chosen
        given = self._given[:, layer]
        self.differing.append((given[:, 0] >= 0) & (given.sort(-1).values != chosen.sort(-1).values).any(-1))
        chosen = torch.where(given < 0, chosen, given)
        moe = self.arch.moe
        scores = (logits.sigmoid() if moe.scoring == "sigmoid" else logits.softmax(-1)).gather(1, chosen)
        return logits, moe.scaling * (scores / scores.sum(-1, keepdim=True) if moe.normalize else scores), chosen

    def trunk(self, tokens: Tensor, extras: Mapping[str, Tensor] | None = None) -> Tensor:
        """Hidden states [n, hidden] after the final norm; of what a sequence's extras say, element i + 1 is about the pass of token i."""
        if extras and ROUTING in extras:
            given = torch.where(extras[ROUTED][:, None, None], extras[ROUTING].long(), -1)
            self._given = torch.cat([given[1:], torch.full_like(given[:1], -1)])
        try:
            return self._trunk(tokens)
        finally:
            self._given = None

    def _trunk(self, tokens: Tensor) -> Tensor:
        found = functional_call(self.model.model, self._state(self.model.model, "model."), (tokens[None],), {"use_cache": False})
        return found.last_hidden_state[0]

    def mtp(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """DeepSeek-V3's multi-token prediction (arXiv 2412.19437, equations 21 to 23), as [n, hidden].

        h' = M [norm(emb(next token)); norm(h)], one transformer layer, and the norm before the shared head. Transformers has none of it
        but the layer. What follows a sequence's last token does not matter: no prediction counts there.
        """
        prefix = f"model.layers.{self.arch.layers}."
        following = torch.cat([tokens[1:], tokens.new_zeros(1)])
        embedded = self._norm(self.leaves["model.embed_tokens.weight"][following], prefix + "enorm.weight")
        joined = torch.cat([embedded, self._norm(hidden, prefix + "hnorm.weight")], -1) @ self.leaves[prefix + "eh_proj.weight"].t()
        layer, positions = self.model.model.layers[-1], torch.arange(len(tokens))[None]
        rotary = self.model.model.rotary_emb(joined[None], positions)
        options = {"position_embeddings": rotary, "attention_mask": None, "position_ids": positions}
        out = functional_call(layer, self._state(layer, prefix), (joined[None],), options)
        return self._norm(out[0], prefix + "shared_head.norm.weight")

    def logprobs(self, hidden: Tensor) -> Tensor:
        """[n, vocab]."""
        head = self.leaves["model.embed_tokens.weight" if self.arch.tied else "lm_head.weight"]
        return (hidden @ head.t()).log_softmax(-1)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.leaves[name], self.arch.norm_eps)

    def _state(self, module: torch.nn.Module, prefix: str) -> dict[str, Tensor]:
        """Values of a module's parameters and buffers, from the leaves."""
        state = {}
        for name, _ in (*module.named_parameters(), *module.named_buffers()):
            if prefix + name in self.leaves:
                state[name] = self.leaves[prefix + name]
            elif name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                state[name] = torch.stack([self._expert(prefix + name, e) for e in range(self.arch.moe.experts)])
        return state

    def _expert(self, name: str, index: int) -> Tensor:
        folder, _, kind = name.rpartition(".")
        parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
        return torch.cat([self.leaves[f"{folder}.{index}.{part}.weight"] for part in parts])


def losses(reference: Reference, sequences: list[TokenSequence]) -> tuple[Tensor, Tensor]:
    """(the loss of `support.objective`, the MTP loss), both summed over all sequences with their weights."""
    main, mtp = torch.zeros(()), torch.zeros(())
    for sequence in sequences:
        tokens, weights, advantages = sequence.tokens, sequence.weights, sequence.extras["advantages"]
        if len(tokens) < 2:
            continue
        hidden = reference.trunk(tokens, sequence.extras)
        chosen = reference.logprobs(hidden)[:-1].gather(1, tokens[1:, None])[:, 0]
        main = main + (weights[1:] * (-advantages[1:] * chosen + 0.2 * chosen.square())).sum()
        if reference.arch.mtp_layers and len(tokens) > 2:
            second = reference.logprobs(reference.mtp(tokens, hidden))[:-2].gather(1, tokens[2:, None])[:, 0]
            mtp = mtp - (weights[2:] * second).sum()
    return main, mtp


@pytest.mark.parametrize(("model", "replay"), [*((model, False) for model in CONFIGS), ("v3", True), ("moonlight", True), ("v2", True)])
def test_losses_and_gradients_are_those_of_autograd(model, replay):
    """With `replay` most tokens go through given experts, in the trunk; the MTP layer's router chooses as ever."""
    reference = Reference(CONFIGS[model])
    has_mtp = reference.arch.mtp_layers > 0
    sequences = support.sequences()
    main, mtp = losses(reference, support.routed(sequences, reference.arch) if replay else sequences)
    (main + MTP_WEIGHT * mtp).backward()
    outcome = support.run(Case(model, train={"mtp_loss": MTP_WEIGHT} if has_mtp else {}, replay=replay))
    assert outcome.scalars["loss"] == pytest.approx(main.item(), rel=1e-5)
    if has_mtp:
        assert outcome.scalars["mtp_loss"] == pytest.approx(mtp.item(), rel=1e-5)
    expected = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in reference.leaves.items()}
    norm = torch.cat([gradient.flatten() for gradient in expected.values()]).double().norm().item()
    assert outcome.scalars["grad_norm"] == pytest.approx(norm, rel=1e-5)
    if replay:
        layers = reference.arch.layers - reference.arch.moe.first_dense_layers
        passes = [torch.stack(reference.differing[i : i + layers]) for i in range(0, len(reference.differing), layers)]
        known = sum(int(sequence.extras[ROUTED][1:].sum()) for sequence in support.routed(sequences, reference.arch))
        tokens = sum(int(differs.any(0).sum()) for differs in passes) / known
        routers = sum(int(differs.sum()) for differs in passes) / (known * layers)
        print(f"{model}: other experts than given for {tokens:.3f} of the tokens, {routers:.3f} of the routers")
        assert (outcome.scalars["differing tokens"], outcome.scalars["differing routers"]) == (tokens, routers)
    found = support.differences(outcome, expected)
    assert found.keys() == {name for name in expected if not name.endswith("correction_bias")}
    print(f"{model}: largest relative difference of a gradient {max(found.values()):.1e}")
    assert max(found.values()) < 1e-5, max(found.items(), key=lambda item: item[1])


def test_mtp_logprobs_over_the_vocabulary():
    reference = Reference(CONFIGS["v3"])
    outcome = support.run(Case("v3", train={"mtp_loss": MTP_WEIGHT, "chunk_tokens": 512}))
    policy = outcome.policy
    policy.exchange.load(lambda name, box: reference.leaves[name].detach()[box.slices])
    (batch,) = policy.microbatches(support.sequences())
    model, worst = policy.chunks[0].eval(), 0.0
    with torch.no_grad():
        both = model(batch.tokens[None], batch.position_ids[None], None, labels=batch.labels[None], packed_seq_params=batch.packing)
        assert both.shape == (2 * len(batch.tokens), 1, policy.arch.hidden)
        found = (both[len(batch.tokens) :, 0] @ model.output_layer.weight.t())[:, : policy.arch.vocab].log_softmax(-1)
        start = 0
        for end in batch.packing.cu_seqlens_q.tolist()[1:]:
            tokens = batch.tokens[start:end]
            expected = reference.logprobs(reference.mtp(tokens, reference.trunk(tokens)))
            worst = max([worst, *(found[start:end] - expected)[:-1].abs().flatten().tolist()])
            start = end
    print(f"largest difference of an MTP log-prob {worst:.2e}")
    assert worst <= 1e-5


def test_mtp_labels_and_weights_stop_at_sequence_ends():
    """The packed targets of the MTP layer: the token after next of the same sequence, and nothing past its end."""
    outcome = support.run(Case("v3", train={"mtp_loss": MTP_WEIGHT, "chunk_tokens": 512}))
    (batch,) = outcome.policy.microbatches(support.sequences())
    by_length: Mapping[tuple[int, ...], TokenSequence] = {tuple(s.tokens.tolist()): s for s in support.sequences()}
    start = 0
    for end in batch.packing.cu_seqlens_q.tolist()[1:]:
        sequence = by_length[tuple(batch.tokens[start:end].tolist())]
        assert torch.equal(batch.mtp_labels[start:end], F.pad(sequence.tokens[2:], (0, min(2, end - start))))
        assert torch.equal(batch.mtp_weights[start:end], F.pad(sequence.weights[2:], (0, min(2, end - start))))
        start = end
