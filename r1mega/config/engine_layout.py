"""How an engine's servers are laid out over their GPUs, in SGLang's words."""

from typing import Literal

from pydantic import Field, model_validator

from r1mega.config.base import Closed


class EngineLayout(Closed):
    """Parallel sizes of a server, and how many servers there are.

    Ranks of all servers are numbered server by server; within one, attention-tensor-parallel ranks vary fastest.
    """

    servers: int = Field(1, ge=1, description="servers with a copy of the model each")
    tp: int = Field(1, ge=1, description="GPUs of one server (--tp-size); more than a node has are equal parts on several")
    ep: int = Field(1, ge=1, description="ranks over which a server's experts are spread; the other tp / ep cut each expert (--ep-size)")
    attn_dp: int = Field(1, ge=1, description="copies of the attention in one server, each over tp / attn_dp GPUs (--attn-dp-size)")
    dense_tp: Literal["tp", "whole"] = Field("tp", description="'whole': every GPU holds all of the dense MLPs (--moe-dense-tp-size 1)")
    shared_experts: Literal["tp", "fused", "whole"] = Field(
        "tp",
        description="'tp': cut over the GPUs; 'fused': one more routed expert, SGLang's choice for DeepSeek-V3 on CUDA unless ep > 1 or "
        "--disable-shared-experts-fusion; 'whole': on every GPU, as with --moe-a2a-backend deepep",
    )
    device: Literal["cuda", "cpu"] = Field("cuda", description="'cpu': SGLang pads the columns of all MLPs to a multiple of 32 x tp")
    dp_lm_head: bool = Field(False, description="the output layer is cut like the attention, not over all GPUs (--enable-dp-lm-head)")

    @model_validator(mode="after")
    def _sizes_divide(self) -> "EngineLayout":
        for name, size in (("ep", self.ep), ("attn_dp", self.attn_dp)):
            if self.tp % size:
                raise ValueError(f"{name}={size} does not divide tp={self.tp}")
        return self

    @property
    def attn_tp(self) -> int:
        """GPUs that one copy of the attention is cut over."""
        return self.tp // self.attn_dp

    @property
    def moe_tp(self) -> int:
        """GPUs that each expert is cut over."""
        return self.tp // self.ep

    @property
    def ranks(self) -> int:
        """GPUs of all servers."""
        return self.servers * self.tp


class EngineFile(Closed):
    """An engine's layout and what it is sent: one YAML file, such as those in `configs/engines`."""

    model: str = Field("", description="the model that the layout was made for")
    source: str = Field("", description="where the layout was published")
    colocated: bool = Field(False, description="trainer and engine share their GPUs, rank by rank")
    block_fp8: bool = Field(False, description="weights are sent as DeepSeek's block FP8, otherwise in bfloat16")
    engine: EngineLayout
