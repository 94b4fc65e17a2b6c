"""Every family: its config.json in both spellings, its tensors against transformers, its published sizes."""

from dataclasses import replace
from math import prod

import numpy as np
import pytest
import torch
from test_weights_table import V3, V3_CONFIG, tiny

from r1mega.config.layout import Layout
from r1mega.errors import UserError
from r1mega.weights.architecture import Architecture, Llama3Rope, Yarn
from r1mega.weights.canonical import canonical
from r1mega.weights.placement import Spelling, placement

YARN = {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# The published configurations, as far as they name an architecture.
MOONLIGHT = {
    **{k: v for k, v in V3_CONFIG.items() if k not in ("rope_scaling", "quantization_config")},
    "hidden_size": 2048, "num_hidden_layers": 27, "first_k_dense_replace": 1, "num_attention_heads": 16, "num_key_value_heads": 16,
    "q_lora_rank": None, "intermediate_size": 11264, "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2,
    "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.446, "aux_loss_alpha": 0.001, "rope_theta": 50000,
    "max_position_embeddings": 8192, "vocab_size": 163840, "rms_norm_eps": 1e-5, "num_nextn_predict_layers": 0,
}  # fmt: skip
V2_LITE = {
    "model_type": "deepseek_v2", "hidden_size": 2048, "num_hidden_layers": 27, "first_k_dense_replace": 1, "num_attention_heads": 16,
    "num_key_value_heads": 16, "q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2,
    "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1, "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False,
    "routed_scaling_factor": 1.0, "rope_scaling": YARN, "rope_theta": 10000, "max_position_embeddings": 163840, "vocab_size": 102400,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu", "attention_bias": False, "moe_layer_freq": 1,
}  # fmt: skip


def qwen(layers, hidden, ffn, heads, kv, vocab, tied=False):
    return {
        "model_type": "qwen2", "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": ffn, "num_attention_heads": heads,
        "num_key_value_heads": kv, "vocab_size": vocab, "tie_word_embeddings": tied, "rms_norm_eps": 1e-6, "rope_theta": 10000,
        "max_position_embeddings": 131072, "hidden_act": "silu", "use_sliding_window": False, "sliding_window": 4096,
    }  # fmt: skip


def llama(layers, hidden, ffn, heads, kv, vocab, tied=False):
    return {
        "model_type": "llama", "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": ffn, "num_attention_heads": heads,
        "num_key_value_heads": kv, "vocab_size": vocab, "tie_word_embeddings": tied, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "rope_scaling": LLAMA3, "max_position_embeddings": 131072, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("config", "billions"),
    [
        (MOONLIGHT, 15.960),
        (V2_LITE, 15.706),
        (qwen(28, 1536, 8960, 12, 2, 151936, tied=True), 1.544),
        (qwen(28, 1536, 8960, 12, 2, 151936), 1.777),
        (qwen(28, 3584, 18944, 28, 4, 152064), 7.616),
        (qwen(48, 5120, 13824, 40, 8, 152064), 14.770),
        (qwen(64, 5120, 27648, 40, 8, 152064), 32.764),
        (llama(32, 4096, 14336, 32, 8, 128256), 8.030),
        (llama(80, 8192, 28672, 64, 8, 128256), 70.554),
    ],
)
def test_published_sizes(config, billions):
    arch = Architecture.from_hf(config)
    assert round(sum(prod(t.shape) for t in canonical(arch)) / 1e9, 3) == billions
    held = [p for p in placement(arch, Layout(), 1, 0, Spelling()) if not p.is_buffer]
    biases = sum(prod(t.shape) for t in canonical(arch) if t.name.endswith("correction_bias"))
    assert sum(prod(p.shape) for p in held) == sum(prod(t.shape) for t in canonical(arch)) - biases


def test_qwen_1_5b_has_339_tensors():
    assert len(canonical(Architecture.from_hf(qwen(28, 1536, 8960, 12, 2, 151936)))) == 339


def small(config):
    changes = {"num_hidden_layers": 3, "vocab_size": 61, "intermediate_size": 40, "num_attention_heads": 8}
    if "n_routed_experts" in config:
        changes |= {"hidden_size": 24, "num_key_value_heads": 8, "kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 2,
                    "v_head_dim": 5, "n_routed_experts": 8, "moe_intermediate_size": 16, "num_experts_per_tok": 2}  # fmt: skip
        if config.get("q_lora_rank"):
            changes["q_lora_rank"] = 12
    else:
        changes |= {"hidden_size": 48, "num_key_value_heads": 4}
    return {**config, **changes}


FAMILIES = {
    "deepseek_v3": V3_CONFIG | {"num_nextn_predict_layers": 0},
    "moonlight": MOONLIGHT,
    "deepseek_v2": V2_LITE,
    "qwen2": qwen(3, 48, 40, 8, 4, 61),
    "qwen2 tied": qwen(3, 48, 40, 8, 4, 61, tied=True),
    "llama": llama(3, 48, 40, 8, 4, 61),
    "llama tied": llama(3, 48, 40, 8, 4, 61, tied=True),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_are_those_transformers_saves(family, tmp_path):
    """Names, shapes, and the architecture that config.json gives after transformers rewrote it."""
    transformers = pytest.importorskip("transformers")
    from safetensors import safe_open

    config = small(FAMILIES[family])
    ours = Architecture.from_hf(config)
    with torch.device("cpu"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert saved == {t.name: t.shape for t in canonical(ours)}
    assert Architecture.from_hf(model.config.to_dict()) == ours


@pytest.mark.parametrize("family", ["qwen2", "qwen2 tied", "llama", "llama tied"])
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(tp=4, pp=3), Layout(pp=3), Layout(tp=2, pp=2, cp=2)])
def test_dense_families_hold_every_element(family, layout):
    arch = Architecture.from_hf(small(FAMILIES[family]))
    world = layout.model_ranks
    held = {t.name: np.zeros(t.shape, int) for t in canonical(arch)}
    for rank in range(world):
        params = placement(arch, layout, world, rank, Spelling())
        assert len({(p.chunk, p.name) for p in params}) == len(params)
        for param in params:
            filled = np.zeros(param.shape, int)
            for piece in param.pieces:
                held[piece.tensor][piece.source.slices] += 1
                filled[piece.box.slices] += 1
            assert filled.max() <= 1 and (filled.all() or "embed" in param.name or "output" in param.name)
    for name, count in held.items():
        copies = layout.cp * (layout.tp if count.ndim == 1 and "bias" not in name else 1)
        if name == "model.embed_tokens.weight" and arch.tied and layout.pp > 1:
            copies *= 2
        assert (count == copies).all(), name


def test_qkv_is_interleaved_by_key_value_head():
    arch = Architecture.from_hf(small(FAMILIES["qwen2"]))  # 8 query heads, 4 key-value heads, head size 6
    (bias,) = [p for p in placement(arch, Layout(tp=2), 2, 1, Spelling()) if p.name == "decoder.layers.1.self_attention.linear_qkv.bias"]
    where = {(p.tensor.split(".")[4], p.source.start[0]): (p.box.start[0], p.box.shape[0]) for p in bias.pieces}
    assert where == {
        ("q_proj", 24): (0, 12), ("k_proj", 12): (12, 6), ("v_proj", 12): (18, 6),
        ("q_proj", 36): (24, 12), ("k_proj", 18): (36, 6), ("v_proj", 18): (42, 6),
    }  # fmt: skip


def test_rope_in_both_spellings():
    assert Architecture.from_hf(V2_LITE).rope == Yarn(40.0, 4096, 32.0, 1.0, 0.707, 0.707)
    new = {k: v for k, v in V2_LITE.items() if k not in ("rope_scaling", "rope_theta")}
    new["rope_parameters"] = {**{k: v for k, v in YARN.items() if k != "type"}, "rope_type": "yarn", "rope_theta": 10000.0}
    assert Architecture.from_hf(new) == Architecture.from_hf(V2_LITE)
    assert Architecture.from_hf(llama(1, 48, 40, 8, 4, 61)).rope == Llama3Rope(8.0, 1.0, 4.0, 8192)
    assert Architecture.from_hf(MOONLIGHT).rope is None and Architecture.from_hf(MOONLIGHT).rope_theta == 50000.0


def test_old_and_new_v3_configs_agree():
    assert Architecture.from_hf({**V3_CONFIG, "aux_loss_alpha": 0.001, "seq_aux": True, "pretraining_tp": 1}) == V3
    # transformers 5 writes none of these; they are properties of the family.
    lean = {k: v for k, v in V3_CONFIG.items() if k not in ("scoring_func", "topk_method", "moe_layer_freq", "ep_size", "auto_map")}
    assert Architecture.from_hf(lean) == V3
    assert Architecture.from_hf({k: v for k, v in V3_CONFIG.items() if k != "num_nextn_predict_layers"}) == replace(V3, mtp_layers=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba', known families are deepseek_v3, deepseek_v2, qwen2, llama"),
        ({"hidden_size": "big"}, "hidden_size must be a whole number >= 1, got 'big'"),
        ({"hidden_size": 0}, "hidden_size must be a whole number >= 1, got 0"),
        ({"n_group": None}, "n_group must be a whole number"),
        ({"rms_norm_eps": -1}, "rms_norm_eps must be a number above 0, got -1"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
        ({"scoring_func": "tanh"}, "scoring_func must be one of sigmoid, softmax"),
        ({"rope_scaling": {"type": "dynamic", "original_max_position_embeddings": 8}}, "rope type 'dynamic' is not supported"),
        ({"rope_scaling": {"type": "yarn"}}, "original_max_position_embeddings is missing"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object"),
    ],
)
def test_wrong_config_names_the_key(changes, message):
    with pytest.raises(UserError, match=message):
        Architecture.from_hf({**V3_CONFIG, **changes})


@pytest.mark.parametrize(
    "key", ["hidden_size", "q_lora_rank", "kv_lora_rank", "n_routed_experts", "num_hidden_layers", "vocab_size", "rms_norm_eps"]
)
def test_missing_config_key_is_named(key):
    with pytest.raises(UserError, match=f"{key} is missing"):
        Architecture.from_hf({k: v for k, v in V3_CONFIG.items() if k != key})


def test_layouts_for_dense_models():
    arch = Architecture.from_hf(small(FAMILIES["qwen2"]))
    with pytest.raises(UserError, match="tp=8 does not divide the model's 4 key-value heads"):
        placement(arch, Layout(tp=8), 8, 0, Spelling())
    with pytest.raises(UserError, match="ep=2 and etp=1 need a model with experts"):
        placement(arch, Layout(ep=2), 2, 0, Spelling())
    with pytest.raises(UserError, match="does not divide num_attention_heads"):
        Architecture.from_hf(qwen(1, 48, 40, 8, 3, 61))


def test_tied_deepseek_copies_the_embedding_twice():
    copies = {t.name: t.copy_of for t in canonical(tiny(tie_word_embeddings=True)) if t.copy_of}
    assert set(copies.values()) == {"model.embed_tokens.weight"}
