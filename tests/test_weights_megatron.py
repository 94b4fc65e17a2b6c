"""The tables against the real thing: names and shapes of Megatron's own GPTModel, rank by rank."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_weights_families import FAMILIES, small
from test_weights_table import V3_CONFIG, tiny_config

from r1mega.config.layout import Layout
from r1mega.weights.architecture import Architecture
from r1mega.weights.placement import Spelling, placement

pytest.importorskip("megatron.core")

V3_LAYOUTS = [
    ({}, 1),
    ({"ep": 2}, 2),
    ({"tp": 2, "ep": 2}, 4),
    ({"tp": 2, "etp": 2}, 2),
    ({"tp": 4, "pp": 2, "ep": 4, "cp": 2}, 16),
    ({"pp": 2, "vpp": 2, "ep": 2}, 4),
    ({"pp": 3, "pipeline": "E|tttt|tmL"}, 3),
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
def built():
    """Everything that Megatron builds for CASES, from one process."""
    cases = [{"config": config, "layout": layout, "world": world, "ranks": list(ranks)} for config, layout, world, ranks in CASES.values()]
    command = [sys.executable, "-m", "tests.megatron_shapes"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, env=env, input=json.dumps(cases), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout[done.stdout.index('{"mtp_layer"') :])


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_of_megatron(built, name):
    config, layout, world, ranks = CASES[name]
    found = built["cases"][list(CASES).index(name)]
    assert isinstance(found, list), found
    arch, spelling = Architecture.from_hf(config), Spelling("local", built["mtp_layer"])
    for rank, shapes in zip(ranks, found, strict=True):
        placed = placement(arch, Layout(**layout), world, rank, spelling)
        assert {f"{p.chunk} {p.name}": list(p.shape) for p in placed} == shapes, f"rank {rank}"
