"""r1mega: Reasoning models by reinforcement learning, as DeepSeek-R1 was trained, on Megatron-Core."""

__version__ = "0.1.0"
