"""The canonical list and the placement, against the released DeepSeek-V3 and against each other."""

import json
import subprocess
import sys
import time
from math import prod
from pathlib import Path

import numpy as np
import pytest

from r1mega.config.layout import Layout
from r1mega.errors import UserError
from r1mega.weights.architecture import Architecture
from r1mega.weights.canonical import canonical
from r1mega.weights.placement import Spelling, placement

ROOT = Path(__file__).parent.parent
V3_CONFIG = json.loads((ROOT / "configs/deepseek_v3/config.json").read_text())
V3 = Architecture.from_hf(V3_CONFIG)
TE = Spelling("te", "mtp_model_layer")


def tiny_config(**changes):
    """A DeepSeek-V3 whose every size differs from the others, so that a swapped axis shows."""
    sizes = dict(
        vocab_size=61, hidden_size=24, num_hidden_layers=5, intermediate_size=40, num_attention_heads=4, num_key_value_heads=4,
        q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=2, v_head_dim=5, n_routed_experts=8, n_group=4,
        topk_group=2, num_experts_per_tok=4, moe_intermediate_size=16, first_k_dense_replace=2, num_nextn_predict_layers=1,
    )  # fmt: skip
    return {**V3_CONFIG, **sizes, **changes}


def tiny(**changes):
    return Architecture.from_hf(tiny_config(**changes))


LAYOUTS = [
    (Layout(), 1),
    (Layout(), 3),
    (Layout(ep=2), 2),
    (Layout(tp=2, ep=2), 4),
    (Layout(tp=2, etp=2), 2),
    (Layout(tp=2, pp=2, ep=4, cp=2), 16),
    (Layout(pp=2, vpp=2, ep=2), 4),
    (Layout(tp=4, pp=3, pipeline="E|tttt|tmL"), 12),
    (Layout(pp=2, vpp=2, pipeline="Et|tt|tt|mL"), 2),
]


def test_v3_parameter_counts_match_megatron():
    """Counts of the real GPTModel: megatron-core 0.16.1, one rank of 1 and rank 0 of 1,024."""
    whole = placement(V3, Layout(), 1, 0, TE)
    assert sum(prod(p.shape) for p in whole if not p.is_buffer) == 682_636_472_320
    layout = Layout(pp=16, ep=64, pipeline="Ettt|(tttt|)*14ttmL")
    assert sum(prod(p.shape) for p in placement(V3, layout, 1024, 0, TE) if not p.is_buffer) == 2_677_129_216


def test_v3_placement_is_fast():
    started = time.process_time()
    placement(V3, Layout(), 1, 0, TE)
    assert time.process_time() - started < 1.0


@pytest.mark.parametrize(("layout", "world"), LAYOUTS)
@pytest.mark.parametrize("spec", ["local", "te"])
def test_every_element_is_held_once_per_replica(layout, world, spec):
    """Over all ranks, each canonical element is held as often as its parameter's replication says."""
    arch = tiny()
    held = {t.name: np.zeros(t.shape, int) for t in canonical(arch)}
    expected = {t.name: 0 for t in canonical(arch)}
    sizes = {"tp": layout.tp, "cp": layout.cp, "dp": layout.dp(world), "edp": layout.edp(world)}
    for rank in range(world):
        for param in placement(arch, layout, world, rank, Spelling(spec)):
            filled = np.zeros(param.shape, int)
            for piece in param.pieces:
                assert piece.box.shape == piece.source.shape
                held[piece.tensor][piece.source.slices] += 1
                filled[piece.box.slices] += 1
                expected[piece.tensor] = prod(sizes.get(axis, 1) for axis in param.replicated)
            assert filled.max(initial=0) <= 1
            assert filled.all() or "embed" in param.name or "output" in param.name
    embeddings = 1 if layout.pp == 1 else 2
    for tensor in canonical(arch):
        if tensor.copy_of:
            assert not held[tensor.name].any()
        else:
            copies = expected[tensor.name] * (embeddings if tensor.name == "model.embed_tokens.weight" else 1)
            assert (held[tensor.name] == copies).all(), tensor.name


def test_gate_and_up_are_stacked_per_rank():
    (fc1,) = [p for p in placement(tiny(), Layout(tp=2), 2, 1, Spelling()) if p.name == "decoder.layers.0.mlp.linear_fc1.weight"]
    gate, up = fc1.pieces
    assert fc1.shape == (40, 24)
    assert (gate.tensor, gate.box.start, gate.source.start) == ("model.layers.0.mlp.gate_proj.weight", (0, 0), (20, 0))
    assert (up.tensor, up.box.start, up.source.start) == ("model.layers.0.mlp.up_proj.weight", (20, 0), (20, 0))


def test_names_of_both_spellings():
    layout = Layout(pp=2, ep=4)
    local = {p.name for p in placement(tiny(), layout, 8, 7, Spelling())}
    fused = {p.name for p in placement(tiny(), layout, 8, 7, TE)}
    assert "decoder.layers.1.mlp.experts.local_experts.1.linear_fc2.weight" in local
    assert "mtp.layers.0.transformer_layer.self_attention.q_layernorm.weight" in local
    assert "decoder.layers.1.mlp.experts.linear_fc2.weight1" in fused
    assert "mtp.layers.0.mtp_model_layer.self_attention.linear_q_up_proj.layer_norm_weight" in fused
    assert {n for n in local & fused if "layers" not in n} == {
        "embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(tp=3), "tp=3 does not divide the model's 4 attention heads"),
        (Layout(ep=3), "ep=3 does not divide the model's 8 experts"),
        (Layout(etp=5), "etp=5 does not divide the model's 16 columns of an expert"),
        (Layout(pp=3, vpp=2), "6 stages for 5 layers"),
        (Layout(pp=2, pipeline="Ett|tttL"), "places 0 MTP layers"),
        (Layout(pp=2, pipeline="Ett|ttmL"), "places 4 layers"),
        (Layout(pp=2, pipeline="Ett|ttt|mL"), "has 3 stages"),
        (Layout(pp=2, pipeline="Ett|tttmLx"), "has 'x'"),
        (Layout(pp=2, vpp=2, pipeline="Ett|ttt|m|L"), None),
        (Layout(pp=2, vpp=2, pipeline="Ett|tttm||L"), "last model chunk"),
    ],
)
def test_layouts_that_do_not_fit(layout, message):
    if message is None:
        assert placement(tiny(), layout, 30, 0, Spelling())
        return
    with pytest.raises(UserError, match=message):
        placement(tiny(), layout, 30, 0, Spelling())


def test_tables_and_plans_need_no_torch():
    program = "import sys, r1mega.weights.plan; print(sorted({'torch', 'megatron', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
