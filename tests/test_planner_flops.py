"""FLOPs against published figures."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from r1mega.planner.flops import active_parameters, forward_flops, training_flops
from r1mega.weights.architecture import Architecture

V3 = Architecture.from_hf(json.loads((Path(__file__).parents[1] / "configs/deepseek_v3/config.json").read_text()))


def test_training_a_token_of_deepseek_v3_costs_what_nvidia_reports() -> None:
    """1,024 H100: 368 TFLOP/s at 1,412 tokens/s per GPU, 4k sequences with MTP (arXiv 2603.07685)."""
    assert training_flops(V3, 4096) / 4096 == pytest.approx(260.65e9, rel=0.005)
    assert training_flops(V3, 4096) / 4096 == pytest.approx(368e12 / 1412, rel=0.005)


def test_the_trunk_of_deepseek_v3() -> None:
    trunk = replace(V3, mtp_layers=0)
    assert forward_flops(trunk, 4096) / 4096 == pytest.approx(83.5e9, rel=0.005)
    assert active_parameters(V3) == pytest.approx(36.63e9, rel=0.001)


def test_attention_is_the_only_quadratic_part() -> None:
    one, two, four = (forward_flops(V3, length) / length for length in (1024, 2048, 4096))
    assert (four - two) == pytest.approx(2 * (two - one))
