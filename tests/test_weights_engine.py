"""SGLang's own layout: the boxes against what its loaders do with full tensors."""

import torch

from r1mega.weights import fp8
from r1mega.weights.canonical import canonical
from r1mega.weights.shipping import torch_dtype
from r1mega.weights.table import Storage


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
            self.mlp(f"{source}mlp.shared_experts.", f"{target}mlp.shared_experts.", shared)
        names = [f"{source}mlp.experts.{e}." for e in self.experts]
        names += [f"{source}mlp.shared_experts."] if self.engine.shared_experts == "fused" else []
        index, parts = self.expert_part
        gate_up = [torch.cat([self.values[f"{n}{p}_proj.weight"].chunk(parts)[index] for p in ("gate", "up")]) for n in names]
        down = [self.values[f"{n}down_proj.weight"].chunk(parts, 1)[index] for n in names]
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

    def mlp(self, source, target, part):
        self.cut(f"{target}gate_up_proj.weight", [f"{source}gate_proj.weight", f"{source}up_proj.weight"], part)
        self.cut(f"{target}down_proj.weight", [f"{source}down_proj.weight"], part, dim=1)


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
