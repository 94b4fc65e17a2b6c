"""The audit: the released DeepSeek-V3's figures from its config.json, and every kind of wrong folder."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_weights_plan import random_tensors
from test_weights_table import V3_CONFIG, tiny, tiny_config

from r1mega.errors import UserError
from r1mega.weights.audit import Figures, figures, inspect, read_config
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


@pytest.mark.parametrize(("text", "message"), [(None, "is missing"), ("{", "is not JSON"), ("[]", "must hold a JSON object")])
def test_config_that_is_none(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=f"config.json {message}"):
        read_config(tmp_path)
