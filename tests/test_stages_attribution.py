"""An engine that was tampered with is named: the facts are measured on a trainer and an embedded engine, the verdict follows."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")
import sglang_support as support
import torch
from attribution_support import NOW, PLAIN, looked_at
from megatron_support import cpu_platform
from torch import Tensor

from r1mega.config.layout import Layout
from r1mega.config.training import Optimizer, Train
from r1mega.megatron.policy import Policy
from r1mega.pipeline.model_folder import ModelFolder
from r1mega.rollout.attribution import NOTHING
from r1mega.rollout.engine import SamplingParams
from r1mega.rollout.local import LocalEngine
from r1mega.weights.moving import reader_of
from r1mega.weights.source import Mapped

MODEL = Path(__file__).parents[1] / "configs/tiny/base"
EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"


@pytest.fixture(scope="module", autouse=True)
def cpu() -> Iterator[None]:
    with cpu_platform():
        yield


@pytest.fixture(scope="module")
def weights() -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """The trainer's, and those of the sync before: every one a little different."""
    now = support.weights(MODEL, 0)
    generator = torch.Generator().manual_seed(1)
    return now, {name: value + 0.01 * torch.randn(value.shape, generator=generator) for name, value in now.items()}


@pytest.fixture(scope="module")
def policy(weights) -> Policy:
    built = Policy(ModelFolder(MODEL).arch, Layout(), Train(chunk_tokens=512), Optimizer(lr=1e-3))
    built.exchange.load(reader_of(weights[0]))
    return built


@pytest.fixture(scope="module")
def previous(policy, weights) -> list[Tensor]:
    policy.exchange.load(reader_of(weights[1]))
    kept = policy.host_copy()
    policy.exchange.load(reader_of(weights[0]))
    return kept


def synced(policy: Policy, dtype: torch.dtype = torch.float32) -> LocalEngine:
    engine = LocalEngine(MODEL, dtype=dtype)
    engine.sync(policy.exchange, NOW)
    return engine


@pytest.mark.parametrize("sampling", [PLAIN, SamplingParams(0.6, 0.8, (2,))])
def test_there_is_nothing_to_name_where_both_agree(policy, previous, sampling) -> None:
    found, said = looked_at(policy, synced(policy), sampling, previous=previous)
    assert said.gap <= NOTHING and said.causes == []
    assert found.differing.names == () and found.differing.compared > 50
    assert said.numbers["drawing_and_reading"] <= NOTHING
    assert "no gap" in said.line


def test_a_response_that_is_cut_says_so(policy) -> None:
    support.check_cuts(synced(policy), SamplingParams(1.0, 1.0, tuple(range(2, 20))))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_bf16_engine_is_precision(policy, temperature) -> None:
    engine = synced(policy, torch.bfloat16)
    _, said = looked_at(policy, engine, SamplingParams(temperature, 1.0, (2,)), engine_dtype="bfloat16")
    assert [cause.name for cause in said.causes] == ["precision"]
    assert "bfloat16" in said.line and said.numbers["tensors_differing"] == 0


@pytest.mark.parametrize("kept", [False, True])
def test_one_altered_expert_is_named(policy, previous, kept) -> None:
    engine = synced(policy)
    engine._places[EXPERT].add_(0.5)
    found, said = looked_at(policy, engine, PLAIN, previous=previous if kept else None)
    assert [cause.name for cause in said.causes] == ["weights"]
    assert found.differing.names == (EXPERT,)
    assert EXPERT in said.line


def test_an_expert_altered_on_a_bf16_engine_is_not_taken_for_precision(policy) -> None:
    engine = synced(policy, torch.bfloat16)
    engine._places[EXPERT].add_(0.5)
    _, said = looked_at(policy, engine, PLAIN, engine_dtype="bfloat16")
    assert said.causes[0].name == "weights" and EXPERT in said.line


def test_a_stale_engine_that_says_it_is_not_is_known_by_its_weights(policy, previous, weights) -> None:
    engine = LocalEngine(MODEL)
    engine.sync(Mapped(policy.exchange.arch, weights[1]), NOW)
    _, said = looked_at(policy, engine, PLAIN, previous=previous)
    assert [cause.name for cause in said.causes] == ["version"]
    assert "those of the sync before" in said.line
    _, unknown = looked_at(policy, engine, PLAIN)
    assert [cause.name for cause in unknown.causes] == ["weights"]  # without the old weights: that they are wrong, not why


def test_samples_that_say_they_are_stale_are_believed(policy, weights) -> None:
    engine = LocalEngine(MODEL)
    engine.sync(Mapped(policy.exchange.arch, weights[1]), NOW - 1)
    found, said = looked_at(policy, engine, PLAIN)
    assert said.causes[0].name == "version"
    assert found.versions == {NOW - 1: len(found.recorded)}
    assert f"by version {NOW - 1}; the trainer is at {NOW}" in said.line


@pytest.mark.parametrize(("claimed", "drawn"), [(1.0, 0.7), (0.6, 1.0)])
def test_a_wrong_temperature_is_found(policy, previous, claimed, drawn) -> None:
    found, said = looked_at(policy, synced(policy), SamplingParams(claimed, 1.0, (2,)), SamplingParams(drawn, 1.0, (2,)), previous=previous)
    assert [cause.name for cause in said.causes] == ["sampling"]
    assert found.fitted_temperature == pytest.approx(drawn, rel=0.01)
    assert f"not {claimed:g}" in said.line


def test_other_experts_than_the_trainers_are_routing(policy, monkeypatch) -> None:
    """An engine whose routers lean otherwise, as those of other kernels do, has the trainer's weights and another choice of experts."""
    engine = synced(policy)
    leaning = torch.tensor([0.3, -0.3] * 32)[: policy.arch.moe.experts]
    monkeypatch.setattr(engine, "differing", lambda source: None)  # nobody can tell, as on a GPU
    for place in (name for name in engine._places if name.endswith("e_score_correction_bias")):
        engine._places[place].add_(leaning)
    recording = SamplingParams(1.0, 1.0, (2,), routing=True)
    found, said = looked_at(policy, engine, recording)
    assert [cause.name for cause in said.causes] == ["routing"]
    assert found.replayed is not None and float((found.replayed - found.recorded).abs().max()) <= 1e-4
    replayed, quiet = looked_at(policy, engine, recording, replays=True)
    assert replayed.replayed is None and quiet.causes == []
