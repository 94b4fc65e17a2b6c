"""r1mega: DeepSeek-R1's training, whole, on Megatron-Core and SGLang."""

__version__ = "0.1.0"
