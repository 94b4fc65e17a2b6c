"""Qwen2 and Qwen2.5: grouped-query attention with biases on q, k and v; small models tie the output layer."""

from r1mega.weights.architecture import Architecture
from r1mega.weights.families import dense
from r1mega.weights.families.config import Config, expect
from r1mega.weights.families.dense import table as table


def architecture(config: Config) -> Architecture:
    """Read a `Qwen2ForCausalLM` config.json."""
    expect(config, use_sliding_window=False)
    return dense.architecture("qwen2", config, qkv_bias=True)
