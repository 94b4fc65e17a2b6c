"""Tokens per second of the embedded rollout engine against `transformers`' `generate`: same weights, same prompts, same lengths.

Response lengths are long-tailed (log-normal, median 48, at most 256) and forced on both sides: by `max_new_tokens` of each request here,
by a stopping criterion of each row there. `generate` computes finished rows until the longest is done. Both sample at temperature 1.

    python tools/bench/rollout.py [--model DIR] [--threads N] [--pairs N]
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3Config, GenerationConfig, PreTrainedModel, StoppingCriteria

from r1mega.rollout.engine import Request, SamplingParams
from r1mega.rollout.local import LocalEngine


def tiny() -> DeepseekV3Config:
    """DeepSeek-V3 in small: four layers, the first dense, 16 experts of which 4 are used, 1.5M parameters."""
    return DeepseekV3Config(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=384,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=16,
        n_shared_experts=1,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        q_lora_rank=64,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )


def checkpoint(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `model` by their Hugging Face names: one for each expert's projection."""
    for name, tensor in model.state_dict().items():
        prefix, _, stacked = name.rpartition(".experts.")
        for expert, matrix in enumerate(tensor if prefix else ()):
            parts = {"down_proj": matrix} if stacked == "down_proj" else dict(zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True))
            yield from ((f"{prefix}.experts.{expert}.{part}.weight", value) for part, value in parts.items())
        if not prefix:
            yield name, tensor


class OwnLength(StoppingCriteria):
    """Each row of `generate` stops after its own number of new tokens."""

    def __init__(self, prompt_width: int, lengths: NDArray[np.int64]) -> None:
        self.ends = torch.from_numpy(prompt_width + lengths)

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        return input_ids.shape[1] >= self.ends


def by_generate(model: Any, requests: list[Request]) -> int:
    """New tokens that `generate` drew for the requests, padding left out."""
    width = max(len(request.prompt_ids) for request in requests)
    ids = torch.tensor([(0,) * (width - len(request.prompt_ids)) + request.prompt_ids for request in requests])
    mask = torch.tensor([[0] * (width - len(request.prompt_ids)) + [1] * len(request.prompt_ids) for request in requests])
    lengths = np.array([request.max_new_tokens for request in requests])
    sampling = GenerationConfig(do_sample=True, top_k=0, temperature=1.0, pad_token_id=0, max_new_tokens=int(lengths.max()))
    out = model.generate(ids, attention_mask=mask, generation_config=sampling, stopping_criteria=[OwnLength(width, lengths)])
    assert out.shape[1] == width + lengths.max()
    return int(lengths.sum())


def by_engine(engine: LocalEngine, requests: list[Request]) -> int:
    """New tokens that the engine drew for the requests."""
    return sum(len(sample.response_ids) for sample in engine.generate(requests, SamplingParams()))


def workload(count: int, vocab: int, siblings: int) -> list[Request]:
    """`count` requests, `siblings` for each prompt of 8 to 16 tokens, with log-normal lengths."""
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(0, vocab, rng.integers(8, 17)).tolist()) for _ in range(count // siblings)]
    lengths = np.exp(rng.normal(np.log(48), 0.8, count)).clip(1, 256).astype(int)
    return [Request(prompts[index // siblings], seed=index, max_new_tokens=int(length)) for index, length in enumerate(lengths)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, help="Hugging Face folder to take configuration and weights from (default: random tiny DeepSeek-V3)"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--siblings", type=int, default=1, help="samples of each prompt")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        if options.model:
            folder, model = options.model, AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        else:
            folder, model = Path(scratch), AutoModelForCausalLM.from_config(tiny(), dtype=torch.float32)
            model.config.save_pretrained(folder)
        engine = LocalEngine(folder, max_batch=options.requests)
    model.eval().requires_grad_(False)
    model.generation_config.eos_token_id = None
    engine.load_weights(checkpoint(model), version=0)
    requests = workload(options.requests, model.config.vocab_size, options.siblings)
    warm = [Request(request.prompt_ids, request.seed, 8) for request in requests]
    by_engine(engine, warm), by_generate(model, warm)

    ratios = []
    for pair in range(options.pairs):
        rates = []
        for run in (lambda: by_engine(engine, requests), lambda: by_generate(model, requests)):
            start = time.perf_counter()
            tokens = run()
            rates.append(tokens / (time.perf_counter() - start))
        ratios.append(rates[0] / rates[1])
        print(f"pair {pair}: engine {rates[0]:.0f} tokens/s, generate {rates[1]:.0f} tokens/s, ratio {ratios[-1]:.2f}", flush=True)
    print(f"{options.threads} threads, {len(requests)} requests, {tokens} new tokens: median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
