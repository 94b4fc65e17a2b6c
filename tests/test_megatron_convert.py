"""Conversion against Megatron-Core itself: it opens what was converted, and what it saved converts."""

import json
from pathlib import Path
from typing import Any

import megatron_support as support
import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from test_weights_plan import random_tensors

from r1mega import cli
from r1mega.config.layout import Layout
from r1mega.config.training import Train
from r1mega.megatron import checkpoint
from r1mega.megatron.policy import Policy
from r1mega.weights.architecture import Architecture
from r1mega.weights.moving import reader_of
from r1mega.weights.safetensors_in import Reader
from r1mega.weights.safetensors_out import Encoding, save

pytestmark = pytest.mark.lane


@pytest.fixture(params=support.CONFIGS)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return support.CONFIGS[request.param]


def built(config: dict[str, Any]) -> Policy:
    arch = Architecture.from_hf(config)
    return Policy(arch, Layout(), Train(mtp_loss=0.3 if arch.mtp_layers else 0.0), None)


def described(policy: Policy) -> dict[str, Any]:
    states = policy.chunks[0].sharded_state_dict(metadata=checkpoint.metadata())
    return {name: state for name, state in states.items() if not isinstance(state, ShardedObject)}


def model_folder(folder: Path, config: dict[str, Any], values: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    save(folder, Architecture.from_hf(config), values, Encoding(torch.float32), shard_bytes=50_000)
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    return folder


def convert(source: Path, target: Path) -> Path:
    assert cli.main(["convert", str(source), str(target), "--processes", "1", "--file-size", "1e-4"]) == 0
    return target


def test_megatron_opens_what_was_converted(config: dict[str, Any], tmp_path: Path) -> None:
    values = random_tensors(Architecture.from_hf(config))
    converted = convert(model_folder(tmp_path / "hf", config, values), tmp_path / "megatron")
    with support.cpu_platform():
        policy = built(config)
        policy.exchange.load(reader_of(values))
        expected = {name: weight.detach().clone() for (_, name), weight in policy.weights.items()}
        for weight in policy.weights.values():
            weight.data.zero_()
        loaded = dist_checkpointing.load(described(policy), str(converted))
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def test_what_megatron_saved_converts(config: dict[str, Any], tmp_path: Path) -> None:
    values = random_tensors(Architecture.from_hf(config))
    saved = tmp_path / "megatron"
    saved.mkdir()
    with support.cpu_platform():
        policy = built(config)
        policy.exchange.load(reader_of(values))
        dist_checkpointing.save(described(policy), str(saved))
    (saved / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    with Reader(convert(saved, tmp_path / "hf")) as reader:
        found = dict(reader.tensors(Architecture.from_hf(config)))
    assert found.keys() == values.keys() and all(torch.equal(found[name], value) for name, value in values.items())
