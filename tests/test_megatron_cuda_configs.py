"""All that Megatron-Core gets of the shipped recipes on CUDA is built for real: meta device, no peers, stand-ins for Transformer Engine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_recipes import CONFIGS, PLANNED

pytest.importorskip("megatron.core")

pytestmark = pytest.mark.lane

ROOT = Path(__file__).parents[1]
ZERO = CONFIGS / "deepseek_v3/r1_zero.yaml"
VARIANTS = [  # what no shipped recipe says
    *([f"stages.zero.train.fp8={fp8}"] for fp8 in ("none", "tensorwise", "mxfp8")),
    ["stages.zero.train.recompute=selective"],
    ["stages.zero.train.overlap=true", "stages.zero.train.dispatcher=alltoall"],
    ["stages.zero.optimizer={lr: 1e-6, moments: bfloat16, main_params: float16, main_grads: bfloat16}"],
]
CASES = [
    *(list(map(str, paths)) for paths in PLANNED),
    *([str(ZERO), str(CONFIGS / "deepseek_v3/overlays/h100_128.yaml"), *changes] for changes in VARIANTS),
]


@pytest.fixture(scope="module")
def found() -> list[dict]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.cuda_configs"]
    done = subprocess.run(command, cwd=ROOT, env=env, input=json.dumps(CASES), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda index: " ".join(Path(part).name for part in CASES[index]))
def test_megatron_core_takes_it(found: list[dict], index: int) -> None:
    assert found[index]["errors"] == []


def test_ranks_of_every_class_were_built(found: list[dict]) -> None:
    assert all(report["built"] for report in found[-len(VARIANTS) :])
    assert sum(report["built"] for report in found) > 50
