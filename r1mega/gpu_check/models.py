"""What is measured: tiny models of every family, slices of DeepSeek-V3 in its real shape, and the tokens that they are given."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import r1mega
from r1mega.config.corpora import TinyCorpus
from r1mega.data.packing import ROUTED, ROUTING, TokenSequence
from r1mega.data.tiny import running_sum
from r1mega.pipeline.model_folder import ModelFolder
from r1mega.weights.architecture import Architecture, Mla, Moe, read_config
from r1mega.weights.canonical import canonical
from r1mega.weights.moving import Read

CONFIGS = Path(r1mega.__file__).parents[1] / "configs"
FAMILIES = ("DeepSeek-V3", "Moonlight", "Qwen2", "Llama")
Kind = Literal["dense", "MoE"]
WARMUP = 8
"""Steps in which the rate of a short run rises."""


def family(name: str) -> Architecture:
    """A tiny model: those of configs/tiny, V3's without compressed queries (Moonlight's form), and Llama's shape as a Qwen2."""
    if name in ("DeepSeek-V3", "Moonlight"):
        v3 = Architecture.from_hf(read_config(CONFIGS / "tiny/architecture"))
        assert v3.mla is not None
        return v3 if name == "DeepSeek-V3" else replace(v3, mla=replace(v3.mla, q_lora_rank=None), mtp_layers=0)
    llama = Architecture.from_hf(read_config(CONFIGS / "tiny/student"))
    return llama if name == "Llama" else replace(llama, family="qwen2", tied=True, qkv_bias=True)


@dataclass(frozen=True)
class Scale:
    """How large a device's measurements are. `gemm`: side of the square products; `rows`: of the slices' vocabulary."""

    shrink: int
    """Divisor of V3's hidden and intermediate sizes and ranks; 1: the real shape."""
    heads: int
    rows: int
    tokens: int
    length: int
    gemm: int
    curve: Architecture
    settle: int
    """Steps from fresh weights until the loss hardly falls; 0: the shipped tiny base is there already."""
    steps: int


def scale(device: str) -> Scale:
    """V3's real shape for a GPU; for a CPU what takes seconds, to try the harness itself."""
    tiny = replace(family("DeepSeek-V3"), mtp_layers=0)
    if device == "cpu":
        return Scale(shrink=32, heads=4, rows=256, tokens=512, length=128, gemm=512, curve=tiny, settle=0, steps=12)
    assert tiny.moe is not None
    # Multiples of FP8's blocks of 128, but for the keys' rotary part, as in V3.
    curve = replace(
        tiny, hidden=1024, layers=6, intermediate_size=2816, heads=8, kv_heads=8, head_dim=192, max_positions=4096, rope_theta=10000.0,
        mla=Mla(q_lora_rank=512, kv_lora_rank=256, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
        moe=replace(tiny.moe, experts=16, top_k=4, intermediate_size=512, groups=4, top_groups=2),
    )  # fmt: skip
    # 8,192 tokens of top 8 over 16 experts are 4,096 for each of them, as under EP64 with as many tokens on every GPU.
    return Scale(shrink=1, heads=128, rows=16160, tokens=8192, length=4096, gemm=8192, curve=curve, settle=300, steps=100)


def layer_slice(kind: Kind, size: Scale) -> Architecture:
    """One layer of DeepSeek-V3, with 16 of its 256 experts, between an embedding and a head of `rows` tokens."""
    v3 = Architecture.from_hf(read_config(CONFIGS / "deepseek_v3"))
    mla, moe = v3.mla, v3.moe
    assert mla is not None and mla.q_lora_rank is not None and moe is not None
    by = size.shrink
    narrow = 1 if by == 1 else 4
    attention = Mla(
        mla.q_lora_rank // by, mla.kv_lora_rank // by, mla.qk_nope_head_dim // narrow, mla.qk_rope_head_dim // narrow,
        mla.v_head_dim // narrow,
    )  # fmt: skip
    experts: Moe = replace(moe, experts=16, intermediate_size=moe.intermediate_size // by, first_dense_layers=int(kind == "dense"))
    return replace(
        v3, vocab=size.rows, hidden=v3.hidden // by, layers=1, intermediate_size=v3.intermediate_size // by, heads=size.heads,
        kv_heads=size.heads, head_dim=attention.qk_nope_head_dim + attention.qk_rope_head_dim, mla=attention, moe=experts, mtp_layers=0,
    )  # fmt: skip


def random_weights(arch: Architecture) -> dict[str, Tensor]:
    """A float32 value for every canonical tensor; none is 0 or 1 throughout, where a lost term would not show."""
    generator = torch.Generator().manual_seed(0)
    values = {}
    for tensor in canonical(arch):
        if tensor.copy_of is None:
            noise = 0.1 * torch.randn(tensor.shape, generator=generator)
            values[tensor.name] = 1 + noise if tensor.name.endswith("norm.weight") else noise
    return values


def random_sequences(arch: Architecture, lengths: tuple[int, ...], *, routed: bool = False) -> list[TokenSequence]:
    """Random tokens, each of the same weight; `routed`: with experts for every token, which routers then take."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for length in lengths:
        extras = {}
        if routed and arch.moe is not None:
            chances = torch.rand(length, arch.layers - arch.moe.first_dense_layers, arch.moe.experts, generator=generator)
            extras = {ROUTING: chances.argsort(-1)[..., : arch.moe.top_k].to(torch.uint8), ROUTED: torch.ones(length, dtype=torch.bool)}
        tokens = torch.randint(arch.vocab, (length,), generator=generator)
        found.append(TokenSequence(tokens, torch.full((length,), 1.0 / sum(lengths)), extras))
    return found


def learnt() -> Read:
    """The weights of the shipped tiny base, which has learnt the tiny language."""
    return ModelFolder(CONFIGS / "tiny/base").open().read


def text(size: Scale) -> Iterator[list[TokenSequence]]:
    """What the tiny base learnt last, update by update.

    For the base itself each document is a sequence, as it learnt them; a model that learns here reads one after another, cut every
    `length` tokens, which spares a GPU the many short sequences.
    """
    model = ModelFolder(CONFIGS / "tiny/architecture")
    # As in the second phase of configs/tiny/base.yaml.
    corpus = TinyCorpus(
        kind="tiny", task="running_sum", long_share=0.12, tagged_share=0.8, error_rate=(0.05, 0.01), corrected_share=0.7, seed=1
    )
    documents = ([*model.tokenizer(one)["input_ids"], model.tokenizer.eos_token_id] for one in running_sum.documents(corpus))
    stream = chain.from_iterable(documents)
    while True:
        if size.settle:
            parts = torch.tensor(list(islice(stream, size.tokens))).split(min(size.length, size.curve.max_positions))
        else:
            parts = tuple(map(torch.tensor, islice(documents, size.tokens // 32)))
        total = sum(map(len, parts))
        yield [TokenSequence(part, torch.full((len(part),), 1.0 / total)) for part in parts]
