"""Keys and shapes of checkpoints: the arithmetic of checkpoint_keys against what Megatron-Core's own modules say they store."""

import time
from math import prod

import megatron_support as support
import numpy as np
import pytest
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories
from test_weights_table import V3

from r1mega.config.layout import Layout
from r1mega.config.training import Train
from r1mega.megatron import checkpoint
from r1mega.megatron.policy import Policy
from r1mega.weights.architecture import Architecture
from r1mega.weights.canonical import canonical
from r1mega.weights.checkpoint_keys import stored_tensors

pytestmark = pytest.mark.lane

QWEN_UNTIED = support.QWEN | {"tie_word_embeddings": False}
CONFIGS = support.CONFIGS | {"qwen untied": QWEN_UNTIED, "V3 with dense layers only behind": support.V3 | {"first_k_dense_replace": 0}}


def of_megatron(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Key and global shape of every tensor that Megatron-Core stores of a model."""
    policy = Policy(arch, Layout(), Train(mtp_loss=0.3 if arch.mtp_layers else 0.0), None)
    (chunk,) = policy.chunks
    stored = chunk.sharded_state_dict(metadata=checkpoint.metadata())
    apply_factories(stored)
    found: dict[str, tuple[int, ...]] = {}
    for value in _leaves(stored):
        assert isinstance(value, ShardedTensor), value
        assert found.setdefault(value.key, value.global_shape) == value.global_shape
    return found


def _leaves(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif not (isinstance(value, ShardedObject) and value.key.endswith("_extra_state")):
        yield value


@pytest.mark.parametrize("name", CONFIGS)
def test_keys_and_shapes_are_megatrons(name: str) -> None:
    arch = Architecture.from_hf(CONFIGS[name])
    with support.cpu_platform():
        expected = of_megatron(arch)
    assert {tensor.key: tensor.shape for tensor in stored_tensors(arch)} == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_parts_cover_every_tensor_once(name: str) -> None:
    arch = Architecture.from_hf(CONFIGS[name])
    left = {tensor.name: np.ones(tensor.shape, int) for tensor in canonical(arch) if tensor.copy_of is None}
    for tensor in stored_tensors(arch):
        filled = np.zeros(tensor.shape, int)
        for box, source, region in tensor.parts:
            assert box.shape in (region.shape, (1, *region.shape))
            filled[box.slices] += 1
            left[source][region.slices] -= 1
        assert (filled == 1).all(), tensor.key
        assert tensor.float32 == tensor.key.endswith("expert_bias")
    assert not any(values.any() for values in left.values())


def test_the_released_v3_is_described_in_seconds() -> None:
    started = time.process_time()
    stored = stored_tensors(V3)
    assert time.process_time() - started < 3
    assert sum(prod(tensor.shape) for tensor in stored) == 682_636_472_320 + 59 * 256  # Megatron's parameters, and the router biases
    assert len(stored) < 1000
