"""A trainer whose tensors were on the host between two steps takes the same steps to the last bit."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("megatron.core")
import megatron_support as support
from megatron_support import QWEN, V3

from r1mega.config.layout import Layout
from r1mega.config.training import Optimizer, Train
from r1mega.megatron.policy import Policy
from r1mega.weights.architecture import Architecture
from r1mega.weights.moving import reader_of

pytestmark = pytest.mark.lane


@pytest.fixture(scope="module", autouse=True)
def cpu() -> Iterator[None]:
    with support.cpu_platform():
        yield


def everything(policy: Policy) -> list[Tensor]:
    """Weights, main parameters and optimizer states."""
    inner = [part.optimizer for part in getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])]
    states = [value for one in inner for state in one.state.values() for value in state.values() if isinstance(value, Tensor)]
    mains = [main.detach() for one in inner for group in one.param_groups for main in group["params"]]
    return [*(weight.detach() for weight in policy.weights.values()), *mains, *states]


def stepped(config: dict, dtype: str, distributed: bool, is_moved: bool) -> tuple[list[Tensor], list[float]]:
    arch = Architecture.from_hf(config)
    policy = Policy(arch, Layout(), Train(chunk_tokens=128, dtype=dtype), Optimizer(lr=1e-2, distributed=distributed))
    policy.exchange.load(reader_of(support.random_weights(arch)))
    losses = []
    for _ in range(3):
        batches = policy.microbatches(support.sequences())
        losses.append(policy.step(batches, support.objective, 1e-2).loss)
        if is_moved:
            before = [tensor.clone() for tensor in everything(policy)]
            with policy.without_training_state():
                gradients = [buffer.grad_data for chunk in policy._wrapped for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
                assert all(gradient.untyped_storage().nbytes() == 0 for gradient in gradients)
                assert all(torch.isfinite(weight.float()).all() for weight in policy.weights.values()), "weights can be synced here"
                with policy.without_weights():
                    assert all(tensor.untyped_storage().nbytes() == 0 for tensor in everything(policy))
            assert all(torch.equal(tensor, other) for tensor, other in zip(everything(policy), before, strict=True))
            assert all(not gradient.any() for gradient in gradients)
    return [tensor.clone() for tensor in everything(policy)], losses


@pytest.mark.parametrize(
    ("config", "dtype", "distributed"), [(V3, "float32", True), (V3, "bfloat16", True), (QWEN, "float32", False), (QWEN, "bfloat16", False)]
)
def test_the_next_step_is_the_same_to_the_last_bit(config: dict, dtype: str, distributed: bool) -> None:
    moved, losses = stepped(config, dtype, distributed, is_moved=True)
    stayed, expected = stepped(config, dtype, distributed, is_moved=False)
    assert losses == expected and len(set(losses)) == 3
    assert len(moved) == len(stayed) and all(torch.equal(one, other) for one, other in zip(moved, stayed, strict=True))
    weights = len(Policy(Architecture.from_hf(config), Layout(), Train(chunk_tokens=128), None).weights)
    assert len(moved) > 2 * weights, "main parameters and both moments were looked at"


def test_weights_come_back_after_an_error() -> None:
    arch = Architecture.from_hf(QWEN)
    policy = Policy(arch, Layout(), Train(chunk_tokens=128), None)
    policy.exchange.load(reader_of(support.random_weights(arch)))
    before = policy.host_copy()
    with pytest.raises(ArithmeticError), policy.without_training_state(), policy.without_weights():
        raise ArithmeticError
    assert all(torch.equal(weight, other) for weight, other in zip(policy.weights.values(), before, strict=True))
