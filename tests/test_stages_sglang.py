"""R1-Zero's tiny recipe with SGLang servers of its own, as a user runs it; and a server of another precision than its trainer."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import sglang_support as support
from attribution_support import NOW, PLAIN, looked_at
from megatron_support import cpu_platform

from r1mega.config.layout import Layout
from r1mega.config.training import Optimizer, Train
from r1mega.megatron.policy import Policy
from r1mega.pipeline.model_folder import ModelFolder
from r1mega.rollout.open import Surroundings
from r1mega.rollout.sglang import SglangEngine
from r1mega.weights.moving import reader_of

ROOT = Path(__file__).parents[1]


@pytest.mark.sglang
@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "transport"),
    [("full", "tensor"), *(pytest.param(path, "distributed", marks=pytest.mark.proof) for path in ("full", "shards"))],
)
def test_r1_zero_on_sglang_keeps_rollout_and_trainer_together(tmp_path, path, transport):
    """pytest -m proof tests/test_stages_sglang.py: by process groups as well, which ranks under torchrun form in another way."""
    support.require()
    small = ["stages.zero.updates=3", "stages.zero.prompts_per_rollout=4", "stages.zero.evaluation=null", "stages.zero.save_every=0"]
    asked = "prompts: {source: {kind: tiny, task: running_sum}, split: heldout, limit: 4}, k: 2, sampling: {max_new_tokens: 32}"
    suite = f"{{heldout: {{{asked}, judge: 'r1mega.rewards.exact:accuracy'}}}}"
    models = f"{{before: {ROOT / 'configs/tiny/base'}, after: zero}}"
    small.append(f"stages.measured={{kind: evaluate, models: {models}, suites: {suite}}}")
    engine = ["rollout.engine=sglang", "rollout.sglang.start_timeout_s=900", "rollout.sglang.bucket_bytes=200000"]
    engine += ["rollout.routing_replay=rollout", f"rollout.sglang.path={path}", f"rollout.sglang.transport={transport}"]
    command = [
        sys.executable,
        "-m",
        "r1mega.cli",
        "run",
        str(ROOT / "configs/tiny/r1_zero.yaml"),
        *engine,
        *small,
        "-o",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    stage = tmp_path / "run/stages/01-zero"
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["rollout_gap/max"] <= 1e-4
        assert row["routing_gap/tokens"] <= 0.01
        assert row["seconds/sync"] > 0
    assert all(row["grad_norm"] > 0 for row in rows), "weights move between the syncs"
    (log,) = (tmp_path / "run/logs/engine").glob("server-*.log")
    assert "Weight version changed" in log.read_text(errors="replace"), "one server drew for both stages and all models"
    running = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not [command for command in running if str(tmp_path) in " ".join(command)]


@pytest.mark.sglang
@pytest.mark.slow
def test_a_bf16_server_is_named_as_precision(tmp_path, monkeypatch):
    model = support.MODELS["deepseek"]
    with support.served(model, tmp_path, "bfloat16") as server, cpu_platform():
        monkeypatch.setenv(support.KEY, server.client.key)
        settings = support.settings(server).model_copy(update={"dtype": "bfloat16"})
        policy = Policy(ModelFolder(model).arch, Layout(), Train(chunk_tokens=512), Optimizer(lr=1e-3))
        policy.exchange.load(reader_of(support.weights(model, 0)))
        engine = SglangEngine(settings, model, Surroundings("cpu", tmp_path))
        engine.sync(policy.exchange, version=NOW)
        found, said = looked_at(policy, engine, PLAIN, engine_dtype="bfloat16")
        engine.close()
    assert [cause.name for cause in said.causes] == ["precision"]
    assert found.differing.names == () and said.gap > 1e-3
