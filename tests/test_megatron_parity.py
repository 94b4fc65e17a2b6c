"""The same log-probs as transformers, for every family, from its checkpoint and back."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("megatron.core")
transformers = pytest.importorskip("transformers")
import megatron_support as support
from megatron_support import LLAMA, MOONLIGHT, QWEN, V2, V3
from safetensors.torch import load_file, save_file

from r1mega.config.layout import Layout
from r1mega.config.training import Train
from r1mega.data.packing import TokenSequence
from r1mega.megatron.policy import Policy
from r1mega.pipeline.model_folder import ModelFolder
from r1mega.weights.architecture import Architecture
from r1mega.weights.canonical import canonical

pytestmark = pytest.mark.lane
TOLERANCE = 1e-5

MODELS = {
    "V3": V3,
    "V3 without q_lora": V3 | {"q_lora_rank": None},
    "V3 with plain RoPE": V3 | {"rope_scaling": None},
    "V3 with YaRN's default scale": V3 | {"rope_scaling": {k: v for k, v in V3["rope_scaling"].items() if not k.startswith("mscale")}},
    "V3 without dense layers": V3 | {"routed_scaling_factor": 1.0, "n_shared_experts": 2, "first_k_dense_replace": 0},
    "Moonlight: one group, epsilon 1e-5": MOONLIGHT,
    "V2-Lite: softmax scores": V2,
    "V2: softmax scores, groups": V2 | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 3, "q_lora_rank": 24},
    "Qwen2, tied": QWEN,
    "Qwen2": QWEN | {"tie_word_embeddings": False},
    "Llama 3.1": LLAMA,
    "Llama 3.2, tied": LLAMA | {"tie_word_embeddings": True, "rope_scaling": LLAMA["rope_scaling"] | {"factor": 32.0}},
    "Llama with wide heads": LLAMA | {"head_dim": 16, "rope_scaling": None},
}


@pytest.fixture(scope="module", autouse=True)
def cpu():
    with support.cpu_platform():
        yield


def checkpoint(config: dict, folder: Path) -> tuple[torch.nn.Module, Path]:
    """A random transformers model and its saved folder, to which an MTP layer is added where the config has one."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config)).float().eval()
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith(("weight", "bias", "proj")):
                # Norms and biases too: at 1 and 0 they would hide what is applied to them.
                value.add_(torch.randn(value.shape) * 0.08)
    model.save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    for tensor in canonical(Architecture.from_hf(json.loads((folder / "config.json").read_text()))):
        if tensor.name not in stored:
            assert tensor.name.startswith(f"model.layers.{config['num_hidden_layers']}."), f"transformers did not save {tensor.name}"
            stored[tensor.name] = stored[tensor.copy_of].clone() if tensor.copy_of else torch.randn(tensor.shape)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    return model, folder


def loaded(folder: Path, **train) -> Policy:
    source = ModelFolder(folder)
    policy = Policy(source.arch, Layout(), Train(chunk_tokens=512, logprob_chunk=50, **train), None)
    with source.open() as reader:
        policy.exchange.load(reader.read)
    return policy


def segments(policy: Policy, sequences: list[TokenSequence]) -> list[tuple[Tensor, Tensor]]:
    """(tokens, logits) of every packed sequence, all from one micro-batch."""
    (batch,) = policy.microbatches(sequences)
    model = policy.chunks[0].eval()
    with torch.no_grad():
        hidden = model(
            input_ids=batch.tokens[None],
            position_ids=batch.position_ids[None],
            attention_mask=None,
            labels=batch.labels[None],
            packed_seq_params=batch.packing,
        )
    logits = (
        hidden[:, 0] @ model.shared_embedding_or_output_weight().t() if policy.arch.tied else hidden[:, 0] @ model.output_layer.weight.t()
    )
    bounds = batch.packing.cu_seqlens_q.tolist()
    return [(batch.tokens[a:b], logits[a:b, : policy.arch.vocab]) for a, b in pairwise(bounds)]


@pytest.mark.parametrize("name", MODELS)
def test_logprobs_are_those_of_transformers(name, tmp_path):
    reference, folder = checkpoint(MODELS[name], tmp_path / "reference")
    policy = loaded(folder)
    worst = 0.0
    for tokens, logits in segments(policy, support.sequences()):
        with torch.no_grad():
            expected = reference(tokens[None]).logits[0]
        worst = max(worst, (logits.log_softmax(-1) - expected.log_softmax(-1)).abs().max().item())
    print(f"{name}: largest difference of a log-prob {worst:.2e}")
    assert worst <= TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_saved_weights_give_transformers_the_same_model(name, tmp_path):
    reference, folder = checkpoint(MODELS[name], tmp_path / "reference")
    policy = loaded(folder)
    target = tmp_path / "saved"
    target.mkdir()
    ModelFolder(folder).write(target, policy.exchange.gather(torch.float32), torch.float32)
    before, after = load_file(folder / "model.safetensors"), load_file(target / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    again = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    tokens = torch.arange(40)[None] * 3
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, reference(tokens).logits)


@pytest.mark.parametrize("name", ["V3", "Qwen2, tied"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_policy_logprobs(name, temperature, tmp_path):
    """`Policy.logprobs` over several micro-batches, aligned with the labels, 0 where nothing is predicted."""
    reference, folder = checkpoint(MODELS[name], tmp_path)
    policy = loaded(folder)
    policy.train = policy.train.model_copy(update={"chunk_tokens": 64})
    batches = policy.microbatches(support.sequences())
    assert len(batches) > 3
    found = policy.logprobs(batches, temperature)
    for batch, logprobs in zip(batches, found, strict=True):
        expected = torch.zeros_like(logprobs)
        bounds = batch.packing.cu_seqlens_q.tolist()
        for a, b in pairwise(bounds):
            with torch.no_grad():
                logits = reference(batch.tokens[None, a:b]).logits[0] / temperature
            expected[a:b] = logits.log_softmax(-1).gather(1, batch.labels[a:b, None])[:, 0]
        assert (logprobs - expected * batch.mask).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", ["Llama 3.1", "Llama 3.2, tied", "Llama with wide heads"])
def test_rope_frequencies_are_those_of_transformers(name, tmp_path):
    """Short sequences hardly turn the slow frequencies, so these are compared as numbers."""
    reference, folder = checkpoint(MODELS[name], tmp_path)
    found, expected = loaded(folder).chunks[0].rotary_pos_emb.inv_freq, reference.model.rotary_emb.inv_freq
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
