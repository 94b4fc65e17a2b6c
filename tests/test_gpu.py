"""What needs a GPU and Transformer Engine: `pytest -m gpu`, which `tools/gpu_check` runs too.

A process of these alone: where the CPU platform was started, torch's CUDA calls are stand-ins.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("megatron.core")
from r1mega.config.layout import Layout
from r1mega.config.training import Optimizer, Train
from r1mega.errors import UserError
from r1mega.gpu_check import models
from r1mega.gpu_check.measures import LENGTHS, cross_entropy
from r1mega.megatron import platform
from r1mega.megatron.checkpoint import Checkpoints
from r1mega.megatron.platform import cuda
from r1mega.megatron.policy import LocalBatch, Policy
from r1mega.weights.architecture import Architecture
from r1mega.weights.moving import reader_of

pytestmark = pytest.mark.gpu

SHORT = Train(dtype="bfloat16", chunk_tokens=1024)
V3 = models.family("DeepSeek-V3")


@pytest.fixture(autouse=True)
def started() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    try:
        platform.start("cuda", 1)
    except UserError as lack:
        pytest.skip(str(lack))
    yield
    platform.stop()


def built(arch: Architecture, train: Train = SHORT, optimizer: Optimizer | None = None, routed: bool = False) -> tuple:
    policy = Policy(arch, Layout(), train, optimizer or Optimizer(lr=1e-3))
    policy.exchange.initialize(0.05, seed=3)
    return policy, policy.microbatches(models.random_sequences(arch, LENGTHS, routed=routed))


def stepped(policy: Policy, batches: list[LocalBatch]) -> float:
    taken = policy.step(batches, cross_entropy, 1e-3)
    assert taken.grad_norm > 0
    return taken.loss


@pytest.mark.parametrize("name", models.FAMILIES)
def test_weights_come_back_as_they_were_given(name: str) -> None:
    arch = models.family(name)
    policy = Policy(arch, Layout(), SHORT.model_copy(update={"mtp_loss": 0.3 if arch.mtp_layers else 0.0}), None)
    given = models.random_weights(arch)
    policy.exchange.load(reader_of(given))
    # Biases of routers are kept in float32.
    exact = {name: value if name.endswith("correction_bias") else value.bfloat16().float() for name, value in given.items()}
    found = policy.exchange.gather(torch.float32)
    assert all(torch.equal(found[name].cpu(), value) for name, value in exact.items())


@pytest.mark.parametrize("fp8", ["none", "blockwise", "tensorwise", "mxfp8"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_losses_fall_under_every_recipe(fp8: str, recompute: str) -> None:
    train = SHORT.model_copy(update={"fp8": fp8, "recompute": recompute})
    try:
        cuda.check(train)
    except UserError as lack:
        pytest.skip(str(lack))
    policy, batches = built(models.scale("cuda").curve, train)
    losses = [stepped(policy, batches) for _ in range(5)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"moments": "bfloat16"},
        {"moments": "bfloat16", "main_params": "float16", "main_grads": "bfloat16"},
        {"offload": 1.0},
        {"offload": 0.5},
    ],
    ids=str,
)
def test_losses_fall_under_every_optimizer(settings: dict) -> None:
    policy, batches = built(V3, optimizer=Optimizer(lr=1e-3, **settings))
    losses = [stepped(policy, batches) for _ in range(5)]
    assert losses[-1] < losses[0]


def test_experts_are_replayed() -> None:
    policy, batches = built(V3, routed=True)
    stepped(policy, batches)
    assert policy.routing_disagreement(batches)["tokens"] > 0.5  # random experts are hardly ever a router's


def test_what_waits_on_the_host_is_not_on_the_gpu() -> None:
    policy, batches = built(models.scale("cuda").curve)
    stepped(policy, batches)
    states, gradients = policy.training_state()
    held = sum(tensor.numel() * tensor.element_size() for tensor in (*policy.weights.values(), *states, *gradients))
    before, kept = torch.cuda.memory_allocated(), [tensor.clone().cpu() for tensor in (*policy.weights.values(), *states)]
    with policy.without_training_state(), policy.without_weights():
        assert torch.cuda.memory_allocated() < before - 0.99 * held
    states, _ = policy.training_state()
    assert all(torch.equal(now.cpu(), then) for now, then in zip((*policy.weights.values(), *states), kept, strict=True))
    stepped(policy, batches)


def test_a_checkpoint_goes_on_where_it_was(tmp_path: Path) -> None:
    policy, batches = built(V3, SHORT.model_copy(update={"mtp_loss": 0.3}))
    stepped(policy, batches)
    checkpoints = Checkpoints(policy, tmp_path)
    checkpoints.save("only", {"update": 1}, None)
    checkpoints.wait()
    other, _ = built(V3, SHORT.model_copy(update={"mtp_loss": 0.3}))
    assert Checkpoints(other, tmp_path).restore(None) == {"update": 1}
    assert all(torch.equal(value, policy.weights[key]) for key, value in other.weights.items())
    # The backward of attention adds up in no fixed order, so losses after another step are compared, not gradients.
    stepped(policy, batches), stepped(other, batches)
    assert stepped(other, batches) == pytest.approx(stepped(policy, batches), rel=1e-2)
