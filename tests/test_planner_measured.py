"""What the planner says of tiny models on a CPU, against what a training step of Megatron-Core holds; `tools/gpu_check` asks a GPU."""

import pytest
import torch
from megatron_support import CONFIGS, cpu_platform, objective

from r1mega.config.layout import Layout
from r1mega.config.training import Optimizer, Train
from r1mega.data.packing import TokenSequence
from r1mega.gpu_check.measures import memory
from r1mega.megatron.policy import Policy
from r1mega.planner.execution import execution
from r1mega.planner.memory import training_memory
from r1mega.weights.architecture import Architecture

TOKENS, LENGTH = 1024, 128


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
        measured = memory(policy, lambda: policy.step(batches, objective, 1e-3))["held"]
    how = execution(train, optimizer, LENGTH, 1.0, "local")
    planned = training_memory(arch, Layout(), 1, how, 1)[0].gpu
    assert planned.weights == measured["weights"]
    for part, nbytes in measured.items():
        print(f"{model}: {part} {nbytes:,} bytes, planned {getattr(planned, part):,.0f}: {getattr(planned, part) / nbytes - 1:+.2%}")
        assert getattr(planned, part) == pytest.approx(nbytes, rel=0.05), part
