"""SGLang's own layout: the boxes against what its loaders do with full tensors."""

import hashlib
import json
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from test_weights_families import FAMILIES, small
from test_weights_plan import random_tensors
from test_weights_table import V3, tiny

from r1mega.config.engine_layout import EngineLayout
from r1mega.config.loading import load_engine
from r1mega.errors import UserError
from r1mega.weights import fp8
from r1mega.weights.architecture import Architecture
from r1mega.weights.canonical import canonical
from r1mega.weights.engine import check_engine, derived, engine_holders, engine_params
from r1mega.weights.shipping import torch_dtype
from r1mega.weights.table import Storage

ENGINE_FILES = {path.stem: path for path in sorted((Path(__file__).parent.parent / "configs/engines").glob("*.yaml"))}


def sharded(arch, engine, rank, values, wire, mtp=False):
    """(parameters of the model, of its draft) on a rank, made as SGLang's loaders make them: narrow, chunk and concatenate full tensors."""
    loader = _Loader(arch, engine, rank, values)
    loader.vocabulary("model.embed_tokens.weight", engine.attn_dp > 1)
    for layer in range(arch.layers):
        loader.layer(f"model.layers.{layer}.", f"model.layers.{layer}.", dense=not arch.moe or layer < arch.moe.first_dense_layers)
    loader.keep("model.norm.weight", "model.norm.weight")
    if not arch.tied:
        loader.vocabulary("lm_head.weight", engine.dp_lm_head)
    model, loader.found = loader.found, {}
    if mtp:
        last = f"model.layers.{arch.layers}."
        for name in ("enorm", "hnorm", "eh_proj", "shared_head.norm"):
            loader.keep(f"model.{name}.weight", f"{last}{name}.weight")
        loader.layer(last, "model.decoder.", dense=False)
    quantised = {t.name for t in canonical(arch) if wire.quantises(t.storage)}
    floats = {t.name for t in canonical(arch) if t.storage is Storage.FLOAT32}
    return _encoded(model, wire, quantised, floats), _encoded(loader.found, wire, quantised, floats)


class _Loader:
    def __init__(self, arch, engine, rank, values):
        self.arch, self.engine, self.values, self.found = arch, engine, values, {}
        self.rank, self.attention = (rank, engine.tp), (rank % engine.attn_tp, engine.attn_tp)
        self.expert_part = (rank % engine.moe_tp, engine.moe_tp)
        count = arch.moe.experts // engine.ep if arch.moe else 0
        self.experts = range(rank // engine.moe_tp * count, (rank // engine.moe_tp + 1) * count)

    def keep(self, name, *sources):
        self.found[name] = (torch.cat([self.values[source] for source in sources]), sources[0])

    def cut(self, name, sources, part, dim=0):
        index, parts = part
        self.found[name] = (torch.cat([self.values[source].chunk(parts, dim)[index] for source in sources]), sources[0])

    def vocabulary(self, name, like_attention):
        index, parts = self.attention if like_attention else self.rank
        pad = 64 * (1 if (-(-self.arch.vocab // 64) * 64) % parts == 0 else parts)
        padded = torch.zeros(-(-self.arch.vocab // pad) * pad, self.arch.hidden)
        padded[: self.arch.vocab] = self.values[name]
        self.found[name] = (padded.chunk(parts)[index], name)

    def layer(self, source, target, dense):
        self.keep(f"{target}input_layernorm.weight", f"{source}input_layernorm.weight")
        self.keep(f"{target}post_attention_layernorm.weight", f"{source}post_attention_layernorm.weight")
        (self.latent if self.arch.mla else self.grouped)(f"{source}self_attn.", f"{target}self_attn.")
        if dense:
            self.mlp(f"{source}mlp.", f"{target}mlp.", (0, 1) if self.engine.dense_tp == "whole" else self.rank)
            return
        for name in ("mlp.gate.weight", "mlp.gate.e_score_correction_bias"):
            if source + name in self.values:
                self.keep(target + name, source + name)
        if self.arch.moe.shared_experts and self.engine.shared_experts != "fused":
            shared = (0, 1) if self.engine.shared_experts == "whole" else self.rank
            self.mlp(f"{source}mlp.shared_experts.", f"{target}mlp.shared_experts.", shared, self.arch.moe.shared_experts)
        names = [f"{source}mlp.experts.{e}." for e in self.experts]
        names += [f"{source}mlp.shared_experts."] if self.engine.shared_experts == "fused" else []
        index, parts = self.expert_part
        width = self.padded(self.arch.moe.intermediate_size) // parts
        gate_up = [
            torch.cat([_grown(self.values[f"{name}{part}_proj.weight"].chunk(parts)[index], 0, width) for part in ("gate", "up")])
            for name in names
        ]
        down = [_grown(self.values[f"{name}down_proj.weight"].chunk(parts, 1)[index], 1, width) for name in names]
        self.found[f"{target}mlp.experts.w13_weight"] = (torch.stack(gate_up), f"{names[0]}gate_proj.weight")
        self.found[f"{target}mlp.experts.w2_weight"] = (torch.stack(down), f"{names[0]}down_proj.weight")

    def latent(self, source, target):
        rows = ["kv_b_proj"]
        if self.arch.mla.q_lora_rank is None:
            rows.append("q_proj")
            self.keep(f"{target}kv_a_proj_with_mqa.weight", f"{source}kv_a_proj_with_mqa.weight")
        else:
            rows.append("q_b_proj")
            down = (f"{source}q_a_proj.weight", f"{source}kv_a_proj_with_mqa.weight")
            self.keep(f"{target}fused_qkv_a_proj_with_mqa.weight", *down)
            self.keep(f"{target}q_a_layernorm.weight", f"{source}q_a_layernorm.weight")
        self.keep(f"{target}kv_a_layernorm.weight", f"{source}kv_a_layernorm.weight")
        for name in rows:
            self.cut(f"{target}{name}.weight", [f"{source}{name}.weight"], self.attention)
        self.cut(f"{target}o_proj.weight", [f"{source}o_proj.weight"], self.attention, dim=1)

    def grouped(self, source, target):
        rank, tp = self.rank
        for kind in ("weight", "bias") if self.arch.qkv_bias else ("weight",):
            q, k, v = (self.values[f"{source}{p}_proj.{kind}"] for p in "qkv")
            repeats = max(1, tp // self.arch.kv_heads)
            kv = [heads.chunk(tp // repeats)[rank // repeats] for heads in (k, v)]
            self.found[f"{target}qkv_proj.{kind}"] = (torch.cat([q.chunk(tp)[rank], *kv]), f"{source}q_proj.{kind}")
        self.cut(f"{target}o_proj.weight", [f"{source}o_proj.weight"], self.rank, dim=1)

    def mlp(self, source, target, part, count=1):
        index, parts = part
        gate, up, down = (self.values[f"{source}{name}_proj.weight"] for name in ("gate", "up", "down"))
        extent = count * self.padded(gate.shape[0] // count)
        gate_up = [_grown(values, 0, extent).chunk(parts)[index] for values in (gate, up)]
        self.found[f"{target}gate_up_proj.weight"] = (torch.cat(gate_up), f"{source}gate_proj.weight")
        self.found[f"{target}down_proj.weight"] = (_grown(down, 1, extent).chunk(parts, 1)[index], f"{source}down_proj.weight")

    def padded(self, columns):
        """On a CPU, SGLang's `adjust_config_with_unaligned_cpu_tp`."""
        multiple = 32 * self.engine.tp if self.engine.device == "cpu" else 1
        return -(-columns // multiple) * multiple


def _grown(values, dim, extent):
    """With zeros at the end of an axis."""
    shape = list(values.shape)
    shape[dim] = extent - shape[dim]
    return torch.cat([values, torch.zeros(shape)], dim)


def _encoded(found, wire, quantised, floats):
    result = {}
    for name, (value, source) in found.items():
        if source not in quantised:
            result[name] = value.to(torch.float32 if source in floats else torch_dtype(wire.dtype))
            continue
        matrices = [fp8.quantise(matrix.to(torch_dtype(wire.dtype))) for matrix in (value if value.ndim == 3 else value[None])]
        codes, scales = (torch.stack(parts) for parts in zip(*matrices, strict=True))
        result[name], result[name + "_scale_inv"] = (codes, scales) if value.ndim == 3 else (codes[0], scales[0])
    return result


def test_names_and_shapes_of_deepseek_v3():
    """As SGLang 0.5.23 lists them; the shapes of a rank follow from its published sizes."""
    engine = EngineLayout(tp=16, ep=4, attn_dp=4)
    params = {param.name: param.tensor_shape for param in engine_params(V3, engine, 5)}
    layer = {name.split(".", 3)[3]: shape for name, shape in params.items() if name.startswith("model.layers.60.")}
    assert layer == {
        "input_layernorm.weight": (7168,),
        "self_attn.fused_qkv_a_proj_with_mqa.weight": (1536 + 512 + 64, 7168),
        "self_attn.q_a_layernorm.weight": (1536,),
        "self_attn.q_b_proj.weight": (128 * 192 // 4, 1536),
        "self_attn.kv_b_proj.weight": (128 * 256 // 4, 512),
        "self_attn.o_proj.weight": (7168, 128 * 128 // 4),
        "self_attn.kv_a_layernorm.weight": (512,),
        "post_attention_layernorm.weight": (7168,),
        "mlp.gate.weight": (256, 7168),
        "mlp.gate.e_score_correction_bias": (256,),
        "mlp.experts.w13_weight": (64, 2 * 2048 // 4, 7168),
        "mlp.experts.w2_weight": (64, 7168, 2048 // 4),
        "mlp.shared_experts.gate_up_proj.weight": (2 * 2048 // 16, 7168),
        "mlp.shared_experts.down_proj.weight": (7168, 2048 // 16),
    }
    assert params["model.layers.0.mlp.gate_up_proj.weight"] == (2 * 18432 // 16, 7168)
    assert params["model.embed_tokens.weight"] == (129280 // 4, 7168) and params["lm_head.weight"] == (129280 // 16, 7168)
    assert not any(name.startswith("model.layers.61.") for name in params)
    fused = {p.name: p.tensor_shape for p in engine_params(V3, EngineLayout(tp=16, shared_experts="fused"), 0)}
    assert fused["model.layers.3.mlp.experts.w2_weight"] == (257, 7168, 128) and not any("shared_experts" in name for name in fused)


def test_the_draft_model_is_the_mtp_layer():
    names = {param.name for param in engine_params(V3, EngineLayout(tp=8), 0, mtp=True) if param.chunk == 1}
    assert {"model.enorm.weight", "model.hnorm.weight", "model.eh_proj.weight", "model.shared_head.norm.weight"} < names
    assert "model.decoder.self_attn.fused_qkv_a_proj_with_mqa.weight" in names and "model.decoder.mlp.experts.w13_weight" in names
    # The embedding and the output layer are the model's own.
    assert not names & {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize("name", ["qwen2 tied", "llama"])
def test_names_of_the_dense_families(name):
    arch = Architecture.from_hf(small(FAMILIES[name]))
    params = {param.name: param.shape for param in engine_params(arch, EngineLayout(tp=2), 1)}
    q, kv = arch.heads // 2 * arch.head_dim, arch.kv_heads // 2 * arch.head_dim
    assert params["model.layers.0.self_attn.qkv_proj.weight"] == (q + 2 * kv, arch.hidden)
    assert ("model.layers.0.self_attn.qkv_proj.bias" in params) == (name == "qwen2 tied")
    assert params["model.layers.0.mlp.gate_up_proj.weight"] == (arch.intermediate_size, arch.hidden)
    # 61 rows are padded to 64 before they are cut.
    assert params["model.embed_tokens.weight"] == (32, arch.hidden) and ("lm_head.weight" in params) != arch.tied


def test_derived_tensors_are_named_and_are_no_parameters():
    found = derived(V3)
    assert len(found) == 2 * 61
    assert {(one.name, one.of) for one in found} > {
        ("model.layers.7.self_attn.w_kc", "model.layers.7.self_attn.kv_b_proj.weight"),
        ("model.layers.7.self_attn.w_vc", "model.layers.7.self_attn.kv_b_proj.weight"),
    }
    assert not {one.name for one in found} & {param.name for param in engine_params(V3, EngineLayout(tp=8), 0)}
    assert derived(Architecture.from_hf(small(FAMILIES["llama"]))) == ()


@pytest.mark.parametrize(
    "engine",
    [EngineLayout(servers=2, tp=4), EngineLayout(tp=4, ep=2, attn_dp=2), EngineLayout(tp=2, shared_experts="fused")],
    ids=str,
)
def test_groups_are_the_ranks_and_cover_each_copy_once(engine):
    """Every rank's groups hold its parameters; over the ranks of a server every element is held as often as its copies."""
    arch = tiny()
    by_rank = {rank: set() for rank in range(7, 7 + engine.ranks)}
    for group in engine_holders(arch, engine, first=7):
        assert len(set(group.ranks)) == len(group.ranks)
        for rank in group.ranks:
            by_rank[rank] |= {(param.name, param.shape, param.pieces) for param in group.params}
    for rank, found in by_rank.items():
        assert found == {(p.name, p.shape, p.pieces) for p in engine_params(arch, engine, (rank - 7) % engine.tp)}
    held = {tensor.name: np.zeros(tensor.shape, int) for tensor in canonical(arch) if tensor.copy_of is None}
    for rank in range(engine.tp):
        for param in engine_params(arch, engine, rank):
            for piece in param.pieces:
                held[piece.tensor][piece.source.slices] += 1
                assert piece.box.shape == piece.source.shape
    copies = {"self_attn.q_b_proj": engine.attn_dp, "experts.0.up_proj": 1, "mlp.gate_proj": 1, "input_layernorm": engine.tp}
    for part, times in copies.items():
        counts = [count for name, count in held.items() if part in name and f"layers.{arch.layers}." not in name]
        assert counts and all((count == times).all() for count in counts), part


def test_an_engine_that_does_not_fit_is_one_line():
    arch, dense = tiny(), Architecture.from_hf(small(FAMILIES["llama"]))
    for model, engine, message in [
        (arch, EngineLayout(tp=8), "rollout.sglang.layout: tp / attn_dp = 8 does not divide the 4 attention heads; 4 would"),
        (
            arch,
            EngineLayout(tp=16, ep=16, attn_dp=16, dense_tp="whole", shared_experts="whole"),
            "ep = 16 does not divide the 8 experts; 8 would",
        ),
        (dense, EngineLayout(tp=2, ep=2), "ep=2 needs a model with experts"),
        (dense, EngineLayout(tp=2, attn_dp=2), "attn_dp=2 is planned for latent attention (DeepSeek) only"),
        (dense, EngineLayout(shared_experts="fused"), "shared_experts=fused needs a model with exactly one shared expert"),
        (arch.scored(), EngineLayout(), "a reward model has no vocabulary; it is not served"),
    ]:
        with pytest.raises(UserError) as error:
            check_engine(model, engine)
        assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="drafting needs one MTP layer, the model has 0"):
        check_engine(replace(arch, mtp_layers=0), EngineLayout(), mtp=True)
    with pytest.raises(ValueError, match="ep=3 does not divide tp=4"):
        EngineLayout(tp=4, ep=3)


@pytest.mark.parametrize("name", ENGINE_FILES)
def test_a_shipped_engine_serves_the_671b_model(name):
    """Its bytes: those of the model on every server, and what is repeated there."""
    file = load_engine(ENGINE_FILES[name])
    assert file.model == "deepseek-ai/DeepSeek-V3" and file.source and ENGINE_FILES[name].read_text().startswith("# ")
    values = sum(prod(p.tensor_shape) for p in engine_params(V3, file.engine, 0)) * file.engine.tp
    # The model without its MTP layer, and what a server repeats: 5% where all is cut, 54% with whole dense layers and 8 attentions.
    assert 671_026_419_200 <= values < 1.6 * 671_026_419_200


SERVERS = sorted((Path(__file__).parent / "sglang_shards").glob("*.json"))


@pytest.mark.parametrize("path", SERVERS, ids=lambda path: path.stem)
def test_a_server_held_what_the_boxes_say(path):
    """What `/weights_checker` answered on a server that had loaded `random_tensors`: every parameter of every rank, by its SHA-256."""
    recorded = json.loads(path.read_text())
    arch, engine = Architecture.from_hf(recorded["config"]), EngineLayout(**recorded["engine"])
    values = random_tensors(arch)
    for rank, found in enumerate(recorded["checksums"]):
        held = {}
        for param in engine_params(arch, engine, rank):
            value = torch.zeros(param.shape)
            for piece in param.pieces:
                value[piece.box.slices] = values[piece.tensor][piece.source.slices]
            held[param.name] = hashlib.sha256(value.numpy().tobytes()).hexdigest()[:16]
        assert held == found
