"""The tables against the real thing: names and shapes of Megatron's own GPTModel, rank by rank."""

import megatron_shapes
import pytest
from test_weights_families import FAMILIES, small
from test_weights_table import V3_CONFIG, tiny_config

pytest.importorskip("megatron.core")
pytestmark = pytest.mark.lane

V3_LAYOUTS = [
    ({}, 1),
    ({"ep": 2}, 2),
    ({"tp": 2, "ep": 2}, 4),
    ({"tp": 2, "etp": 2}, 2),
    ({"tp": 4, "pp": 2, "ep": 4, "cp": 2}, 16),
    ({"pp": 2, "vpp": 2, "ep": 2}, 4),
    ({"pp": 3, "pipeline": "E|tttt|tmL"}, 3),
    ({"pp": 3, "ep": 2, "pipeline": "Ettt|tt|mL"}, 6),
    ({"pp": 2, "vpp": 2, "pipeline": "Ett|tt|t|mL"}, 2),
]
DENSE_LAYOUTS = [({}, 1), ({"tp": 2}, 2), ({"tp": 4, "pp": 3}, 12), ({"pp": 3}, 3)]
CASES = {
    **{f"tiny V3 {layout}": (tiny_config(), layout, world, range(world)) for layout, world in V3_LAYOUTS},
    "tiny V3 without q_lora": (tiny_config(q_lora_rank=None), {"tp": 2, "ep": 2}, 2, range(2)),
    **{
        f"{family} {layout}": (small(FAMILIES[family]), layout, world, range(world))
        for family in ("qwen2", "qwen2 tied", "llama", "llama tied")
        for layout, world in DENSE_LAYOUTS
    },
    "V3 on 1,024 ranks": (V3_CONFIG, {"tp": 2, "pp": 16, "ep": 32}, 1024, (0, 63, 511, 961, 1023)),
}


@pytest.fixture(scope="module")
def found():
    """The differences from what Megatron builds for CASES, from one process."""
    cases = [{"config": config, "layout": layout, "world": world, "ranks": list(ranks)} for config, layout, world, ranks in CASES.values()]
    return dict(zip(CASES, megatron_shapes.finish(megatron_shapes.start(cases)), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_of_megatron(found, name):
    assert found[name] == [[] for _ in CASES[name][3]]
