"""The audit: the released DeepSeek-V3's figures from its config.json, and every kind of wrong folder."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_weights_plan import random_tensors
from test_weights_table import V3_CONFIG, tiny, tiny_config

from r1mega.errors import UserError
from r1mega.weights.architecture import read_config
from r1mega.weights.audit import Figures, figures, has_weights, inspect, stored_figures
from r1mega.weights.safetensors_in import Reader
from r1mega.weights.safetensors_out import Encoding, save


def test_released_deepseek_v3():
    """91,991 tensors and 688,574,839,360 bytes are what the published repository holds."""
    assert figures(V3_CONFIG) == Figures(stored_tensors=91_991, tensors=46_183, values=684_489_845_504, stored_bytes=688_574_839_360)


def test_figures_follow_dtype_and_quantisation():
    plain = {k: v for k, v in V3_CONFIG.items() if k != "quantization_config"}
    biases = 59 * 256
    assert figures(plain).stored_bytes == 2 * 684_489_845_504 + 2 * biases
    assert figures({**plain, "torch_dtype": "float32"}).stored_bytes == 4 * 684_489_845_504
    with pytest.raises(UserError, match="torch_dtype is 'int8'"):
        figures({**plain, "torch_dtype": "int8"})
    with pytest.raises(UserError, match=r"weight_block_size is \[64, 64\]"):
        figures({**plain, "quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}})
    with pytest.raises(UserError, match="quant_method fp8 only"):
        figures({**plain, "quantization_config": {"quant_method": "awq"}})


@pytest.fixture
def folder(tmp_path):
    save(tmp_path, tiny(), random_tensors(tiny()), Encoding(torch.float32))
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    return tmp_path


def test_a_sound_folder_has_no_findings(folder):
    assert inspect(folder).lines() == []


def test_a_block_fp8_folder_has_no_findings(tmp_path):
    save(tmp_path, tiny(), random_tensors(tiny()), Encoding(torch.bfloat16, block_fp8=True))
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    assert inspect(tmp_path).lines() == []


def test_everything_that_is_wrong_is_found(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    expert = "model.layers.3.mlp.experts.{}.up_proj.weight"
    del tensors["model.layers.0.self_attn.kv_b_proj.weight"]
    tensors["model.layers.9.input_layernorm.weight"] = torch.ones(24)
    tensors["model.norm.weight"] = torch.ones(25)
    tensors["model.layers.2.mlp.gate.weight"][3, 4] = torch.nan
    tensors[expert.format(5)] = tensors[expert.format(2)].clone()
    tensors["model.layers.5.shared_head.head.weight"] += 1
    save_file(tensors, path)
    assert inspect(folder).lines() == [
        "missing: model.layers.0.self_attn.kv_b_proj.weight",
        "unexpected: model.layers.9.input_layernorm.weight",
        "wrong shape: model.norm.weight [25], config.json says [24]",
        "not finite: model.layers.2.mlp.gate.weight",
        f"identical: {expert.format(2)} = {expert.format(5)}",
        "differs from the tensor it copies: model.layers.5.shared_head.head.weight",
    ]


def test_scales_are_compared_and_read(tmp_path):
    save(tmp_path, tiny(), random_tensors(tiny()), Encoding(torch.bfloat16, block_fp8=True))
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.3.self_attn.{}.weight"
    del tensors[name.format("o_proj") + "_scale_inv"]
    tensors[name.format("q_a_proj") + "_scale_inv"] = torch.ones(2, 1)
    tensors["model.norm.weight_scale_inv"] = torch.ones(1, 1)
    tensors[name.format("kv_b_proj") + "_scale_inv"][0, 0] = torch.inf
    tensors[name.format("q_b_proj")].view(torch.uint8)[1, 2] = 0x7F
    save_file(tensors, path)
    assert inspect(tmp_path).lines() == [
        f"missing: {name.format('o_proj')}_scale_inv",
        "unexpected: model.norm.weight_scale_inv",
        f"wrong shape: {name.format('q_a_proj')}_scale_inv [2, 1], config.json says [1, 1]",
        f"not finite: {name.format('q_b_proj')}",
        f"not finite: {name.format('kv_b_proj')}",
    ]


def test_tensors_in_two_shards_and_shards_that_no_index_names(tmp_path):
    save(tmp_path, tiny(), random_tensors(tiny()), Encoding(torch.float32), shard_bytes=20_000)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    assert inspect(tmp_path).lines() == []
    save_file({"model.norm.weight": torch.ones(24)}, tmp_path / "old.safetensors")
    assert inspect(tmp_path).lines() == ["unexpected: file old.safetensors"]
    first, second = sorted(tmp_path.glob("model-*.safetensors"))[:2]
    twice = next(iter(load_file(second)))
    save_file({**load_file(first), twice: load_file(second)[twice]}, first)
    assert inspect(tmp_path).lines() == [f"duplicated: {twice} in {first.name} and {second.name}"]
    with pytest.raises(UserError, match=f"{twice} is also in {first.name}"):
        Reader(tmp_path)


def test_counts_of_a_folder(folder):
    assert stored_figures(folder) == figures({**tiny_config(torch_dtype="float32"), "quantization_config": None})


def test_weights_that_are_pickles_are_not_opened(tmp_path):
    assert not has_weights(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds pytorch_model\.bin and no safetensors; pickles are never read"):
        has_weights(tmp_path)


@pytest.mark.parametrize(("text", "message"), [(None, "is missing"), ("{", "is not JSON"), ("[]", "must hold a JSON object")])
def test_config_that_is_none(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=f"config.json {message}"):
        read_config(tmp_path)
