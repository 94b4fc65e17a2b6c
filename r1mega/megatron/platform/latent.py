"""Latent attention as every DeepSeek model has it, on both platforms: the layer spec says of what parts, and Megatron-Core builds those."""

from typing import Any

from megatron.core.transformer.multi_latent_attention import MLASelfAttention

EPSILON = 1e-6
"""Of the norms of compressed queries and keys, whatever `rms_norm_eps` says: DeepSeek's own code leaves it at RMSNorm's default."""


class LatentAttention(MLASelfAttention):
    """MLA made of exactly what the layer spec says.

    megatron-core 0.19 second-guesses the spec: without q_lora it builds the query projection with a norm fused into it. Its weight is in
    no family's checkpoint, and its input is normalised already.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in ("linear_q_up_proj", "linear_kv_up_proj"):
            projection = getattr(self, name, None)
            if hasattr(projection, "layer_norm_weight"):
                # Transformer Engine's fused norms are given the model's epsilon.
                projection.eps = EPSILON  # type: ignore[union-attr]

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        return vars(submodules)
