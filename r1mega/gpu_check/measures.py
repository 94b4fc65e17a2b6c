"""Measurements on the platform that this process has started. Each gives scalars, and tensors to compare, by name."""

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import benchmark

from r1mega.config.layout import Layout
from r1mega.config.training import Optimizer, Train
from r1mega.data.packing import TokenSequence
from r1mega.gpu_check import models
from r1mega.gpu_check.models import Kind
from r1mega.megatron import platform
from r1mega.megatron.exchange import Exchange
from r1mega.megatron.policy import LocalBatch, Policy, TokenLoss
from r1mega.planner.execution import execution
from r1mega.planner.flops import attention_flops, layer_weights
from r1mega.planner.memory import training_memory
from r1mega.weights.architecture import Architecture
from r1mega.weights.moving import reader_of


class Measured(NamedTuple):
    """What a worker writes down."""

    scalars: dict[str, Any]
    tensors: dict[str, Tensor]


LENGTHS = (1, 37, 64, 5, 128, 90, 17, 200)
"""Tokens of the sequences that platforms are compared on: ragged, one of a single token."""
_LEARNING_RATE = 3e-4
_TIMED_S = {"cpu": 0.2, "cuda": 2.0}


def cross_entropy(logprobs: Tensor, entropies: Tensor, batch: LocalBatch) -> TokenLoss:
    """The loss of every measurement here."""
    return TokenLoss(-logprobs)


# ------------------------------------------------------------ what platforms must agree on


def outputs(train: Train, *, families: list[str], routed: bool) -> Measured:
    """Loss, log-probs over the vocabulary and gradients of tiny models with the same weights and tokens on every platform.

    `routed`: experts are given. Rounding then sends no token elsewhere, and errors are those of the arithmetic alone. A family that
    fails does not hide the others: its error is among the scalars.
    """
    scalars: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name in families:
        try:
            loss, found = _outputs(models.family(name), train, routed)
        except Exception as error:  # noqa: BLE001 - whatever one family meets, the next one is another model
            scalars[name] = {"error": f"{type(error).__name__}: {error}"}
            continue
        scalars[name] = {"loss": loss}
        tensors |= {f"{name}/{part}": value.contiguous().cpu() for part, value in found.items()}
    return Measured(scalars, tensors)


def _outputs(arch: Architecture, train: Train, routed: bool) -> tuple[float, dict[str, Tensor]]:
    # Nothing tells an MTP layer's router where to send tokens, so it is compared where routers choose.
    train = train.model_copy(update={"mtp_loss": 0.3 if arch.mtp_layers and not routed else 0.0})
    policy = Policy(arch, Layout(), train, Optimizer(lr=1e-3, clip_grad=0.0, distributed=False))
    policy.exchange.load(reader_of(models.random_weights(arch)))
    batches = policy.microbatches(models.random_sequences(arch, LENGTHS, routed=routed))
    found: list[Tensor] = []

    def vocabulary(hidden: Tensor, batch: LocalBatch) -> tuple[Tensor, dict[str, Any]]:
        # All tokens but one, whose probability is what is left.
        labels = torch.arange(arch.vocab - 1, device=hidden.device).expand(batch.tokens.shape[0], -1)
        found.append(policy.listed_logprobs(policy.trunk(hidden), labels, torch.ones_like(batch.mask))[0])
        return hidden.new_zeros(()), {}

    with torch.no_grad():
        policy.run(batches, vocabulary, forward_only=True)
    taken = policy.step(batches, cross_entropy, 1e-3)
    # A router's bias has no gradient.
    gradients = {key: getattr(weight, "main_grad", torch.zeros_like(weight)) for key, weight in policy.weights.items()}
    named = Exchange(policy.arch, policy.layout, gradients).gather(torch.float32)
    return taken.loss, {"logits": torch.cat(found)} | {f"gradients/{name}": value.clone() for name, value in named.items()}


# ------------------------------------------------------------ a short run


def curve(train: Train, *, base: dict[str, Any], device: str) -> Measured:
    """Losses of every step of two short runs from the same weights on the same text: as `base` says, and as `train` does.

    The weights have learnt the tiny language before. While a loss still falls steeply, a step more or less is a larger gap than FP8 makes.
    """
    size = models.scale(device)
    plain = Train(**base, chunk_tokens=size.tokens)
    batches = models.text(size)
    if size.settle:
        policy = Policy(size.curve, Layout(), plain, Optimizer(lr=_LEARNING_RATE))
        policy.exchange.initialize(1 / math.sqrt(size.curve.hidden), seed=1)
        _descended(policy, islice(batches, size.settle), _LEARNING_RATE)
        learnt = {name: value.cpu().clone() for name, value in policy.exchange.gather(torch.float32).items()}
        del policy
        read = reader_of(learnt)
    else:
        read = models.learnt()
    drawn = list(islice(batches, size.steps))
    losses = []
    for how in (plain, train.model_copy(update={"chunk_tokens": size.tokens})):
        policy = Policy(size.curve, Layout(), how, Optimizer(lr=_LEARNING_RATE))
        policy.exchange.load(read)
        losses.append(_descended(policy, drawn, _LEARNING_RATE / 3))
    return Measured({"base": losses[0], "losses": losses[1]}, {})


def _descended(policy: Policy, batches: Iterable[list[TokenSequence]], lr: float) -> list[float]:
    """Losses of a step on each of the batches, the rate warmed up."""
    return [
        policy.step(policy.microbatches(sequences), cross_entropy, lr * min(1.0, (step + 1) / models.WARMUP)).loss
        for step, sequences in enumerate(batches)
    ]


# ------------------------------------------------------------ a layer


def layer(train: Train, *, kind: Kind, device: str) -> Measured:
    """Speed and memory of one layer of DeepSeek-V3: seconds of a pass and FLOP/s of products, bytes by part as measured and planned."""
    size = models.scale(device)
    arch = models.layer_slice(kind, size)
    optimizer = Optimizer(lr=1e-5)
    train = train.model_copy(update={"chunk_tokens": size.tokens, "logprob_chunk": min(2048, size.tokens)})
    how = execution(train, optimizer, size.length, 1.0, "local" if device == "cpu" else "te")
    planned = training_memory(arch, Layout(), 1, how, 1)[0].gpu
    scalars: dict[str, Any] = {"fp8": train.fp8, "planned": planned.parts()}
    if device == "cuda" and planned.total > torch.cuda.mem_get_info()[0]:
        free = torch.cuda.mem_get_info()[0]
        return Measured(scalars | {"lacks": f"needs {planned.total / 1e9:.0f} GB, {free / 1e9:.0f} GB of the GPU are free"}, {})
    policy = Policy(arch, Layout(), train, optimizer)
    _fill(policy)
    batches = policy.microbatches(models.random_sequences(arch, (size.length,) * (size.tokens // size.length)))
    scalars |= memory(policy, lambda: policy.step(batches, cross_entropy, 1e-5))
    seconds = _seconds(lambda: _pass(policy, batches), device)
    # Forward 2 FLOPs a weight and token, backward twice that.
    each = 2 * layer_weights(arch, kind == "MoE") + attention_flops(arch, size.length)
    scalars |= {"seconds": seconds, "flops": 3 * size.tokens * each, "gemm": gemm_rate(train, size.gemm, device)}
    return Measured(scalars, {})


def _fill(policy: Policy) -> None:
    """Small random weights, drawn where they are: no value is compared, and routers must spread tokens."""
    generator = torch.Generator(policy.device).manual_seed(0)
    with torch.no_grad():
        for weight in policy.weights.values():
            if not weight.requires_grad:
                weight.zero_()
            elif weight.dim() == 1:
                weight.fill_(1)
            else:
                weight.normal_(0, 0.02, generator=generator)


def _pass(policy: Policy, batches: list[LocalBatch]) -> None:
    """Forward and backward of the layer alone, without the head."""

    def finish(hidden: Tensor, batch: LocalBatch) -> tuple[Tensor, dict[str, Any]]:
        return policy.trunk(hidden).float().square().mean(), {}

    policy.run(batches, finish, forward_only=False)


def memory(policy: Policy, step: Callable[[], object]) -> dict[str, Any]:
    """Bytes that training keeps, by part: `held`, and on a GPU the allocator's `peak` over a step.

    Activations are the storages that autograd saves between forward and backward, counted by torch's saved-tensor hooks. torch's
    `MemTracker` cannot watch these models: it calls `module.buffers()`, which Megatron-Core's DistributedDataParallel replaces by a list.
    """
    policy.training_state()  # makes the optimizer, which moves the weights into buffers
    own = {weight.untyped_storage().data_ptr() for chunk in policy.chunks for weight in chunk.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            # Held, so that no address is used twice.
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    activations = sum(storage.nbytes() for storage in saved.values())
    saved.clear()
    states, gradients = policy.training_state()
    held = {
        "weights": _size(policy.weights.values()), "gradients": _size(gradients), "optimizer": _size(states), "activations": activations,
    }  # fmt: skip
    if policy.device.type != "cuda":
        return {"held": held}
    platform.active().release_cached()
    torch.cuda.reset_peak_memory_stats()
    step()
    return {"held": held, "peak": torch.cuda.max_memory_allocated()}


def _size(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def gemm_rate(train: Train, size: int, device: str) -> float:
    """FLOP/s of a square product in the dtype that the layer's products have: of FP8 operands as they are, nothing quantised."""
    place = platform.active().device()
    dtype = getattr(torch, train.dtype)
    a, b = (torch.randn(size, size, device=place, dtype=dtype) for _ in range(2))
    if train.fp8 == "none":
        return 2 * size**3 / _seconds(lambda: a @ b, device)
    # The second operand of torch's FP8 product is stored by columns.
    x, y, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t(), torch.ones((), device=place)
    return 2 * size**3 / _seconds(lambda: torch._scaled_mm(x, y, scale_a=one, scale_b=one, out_dtype=dtype, use_fast_accum=True), device)


def _seconds(run: Callable[[], object], device: str) -> float:
    """Median seconds of a call, the device's work included: torch's Timer waits for it."""
    run()
    return float(benchmark.Timer("run()", globals={"run": run}).blocked_autorange(min_run_time=_TIMED_S[device]).median)


MEASURES: Mapping[str, Callable[..., Measured]] = {"outputs": outputs, "curve": curve, "layer": layer}
"""By the name that a worker is asked for."""
