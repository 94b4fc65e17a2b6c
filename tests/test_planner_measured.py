"""What the planner says of tiny models on a CPU, against what a training step of Megatron-Core holds.

Activations are the storages that autograd saves between forward and backward, counted by torch's saved-tensor hooks. torch's
`MemTracker` cannot watch these models: it calls `module.buffers()`, which Megatron-Core's DistributedDataParallel replaces by a list.
"""

from typing import Any

import pytest
import torch
from megatron_support import CONFIGS, cpu_platform, objective
from torch import Tensor

from r1mega.config.layout import Layout
from r1mega.config.training import Optimizer, Train
from r1mega.data.packing import TokenSequence
from r1mega.megatron.policy import Policy
from r1mega.planner.execution import execution
from r1mega.planner.memory import training_memory
from r1mega.weights.architecture import Architecture

TOKENS, LENGTH = 1024, 128


def _size(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _saved(policy: Policy, step: Any) -> int:
    """Bytes of the storages that one step saves for its backward pass, parameters left out."""
    own = {weight.untyped_storage().data_ptr() for chunk in policy.chunks for weight in chunk.parameters()}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            # Held, so that no address is used twice.
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.lane
@pytest.mark.parametrize("model", ["v3", "moonlight", "v2", "qwen", "llama"])
def test_memory_of_a_training_step(model: str) -> None:
    generator = torch.Generator().manual_seed(0)
    train, optimizer = Train(chunk_tokens=TOKENS, logprob_chunk=128), Optimizer(lr=1e-3)
    arch = Architecture.from_hf(CONFIGS[model] | ({"num_nextn_predict_layers": 0} if model in ("v3", "moonlight") else {}))
    sequences = [
        TokenSequence(
            torch.randint(0, 127, (LENGTH,), generator=generator), torch.ones(LENGTH) / TOKENS, {"advantages": torch.ones(LENGTH)}
        )
        for _ in range(TOKENS // LENGTH)
    ]
    with cpu_platform():
        policy = Policy(arch, Layout(), train, optimizer)
        policy.exchange.initialize(0.02, seed=3)
        batches = policy.microbatches(sequences)
        assert [batch.tokens.shape[0] for batch in batches] == [TOKENS]
        activations = _saved(policy, lambda: policy.step(batches, objective, 1e-3))
        chained = getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])
        states = [
            value for part in chained for state in part.optimizer.state.values() for value in state.values() if torch.is_tensor(value)
        ]
        buffers = [buffer.grad_data for chunk in policy._wrapped for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]]
        measured = {"weights": _size(policy.weights.values()), "gradients": _size(buffers), "optimizer": _size(states)}
    how = execution(train, optimizer, LENGTH, 1.0, "local")
    planned = training_memory(arch, Layout(), 1, how, 1)[0].gpu
    assert planned.weights == measured["weights"]
    for part, nbytes in {**measured, "activations": activations}.items():
        print(f"{model}: {part} {nbytes:,} bytes, planned {getattr(planned, part):,.0f}: {getattr(planned, part) / nbytes - 1:+.2%}")
        assert getattr(planned, part) == pytest.approx(nbytes, rel=0.05), part
