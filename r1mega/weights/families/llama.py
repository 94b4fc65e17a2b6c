"""Llama 3: grouped-query attention without biases, RoPE with `llama3` scaling."""

from r1mega.weights.architecture import Architecture
from r1mega.weights.families import dense
from r1mega.weights.families.config import Config, expect
from r1mega.weights.families.dense import table as table


def architecture(config: Config) -> Architecture:
    """Read a `LlamaForCausalLM` config.json."""
    expect(config, attention_bias=False)
    return dense.architecture("llama", config, qkv_bias=False)
