"""Objectives, the optimizer, and how a training step is executed."""

from typing import Literal

from pydantic import Field, model_validator

from r1mega.config.base import Closed, NonNegativeSchedule, PositiveSchedule


class Mismatch(Closed):
    """Corrections of the policy's loss for tokens that the engine drew with other probabilities than the trainer gives them."""

    weights: Literal["none", "tis", "icepop"] = Field(
        "none",
        description="factor of each token's loss, by its ratio r = pi_trainer / pi_rollout; tis: min(r, cap); "
        "icepop: r inside [low, high], else 0; none: 1",
    )
    cap: float = Field(2.0, gt=0, description="C of tis")
    low: float = Field(0.5, gt=0, description="smallest ratio that icepop keeps")
    high: float = Field(2.0, gt=0, description="largest ratio that icepop keeps")
    sequence_mask: float | None = Field(
        None,
        ge=0,
        description="delta of DeepSeek-V3.2's off-policy sequence mask: a response with a negative advantage is left out when the mean of "
        "log(pi_rollout / pi) over its tokens is larger; null: none is",
    )
    when: Literal["always", "over_budget"] = Field(
        "always", description="over_budget: only for rollouts that exceed a limit of trust.budget with `then: correct`"
    )

    @property
    def corrects(self) -> bool:
        """Whether there is a correction at all."""
        return self.weights != "none" or self.sequence_mask is not None

    @model_validator(mode="after")
    def _is_a_range(self) -> "Mismatch":
        if self.low > self.high:
            raise ValueError(f"low={self.low:g} is above high={self.high:g}: no ratio lies between them")
        if self.when == "over_budget" and not self.corrects:
            raise ValueError("when 'over_budget' needs a correction: set weights or sequence_mask")
        return self


class GrpoObjective(Closed):
    """Group-relative policy optimisation and its published variants (DeepSeekMath, DeepSeek-R1, Dr.GRPO, DAPO)."""

    clip: PositiveSchedule = Field(10.0, description="eps of the ratio clip on both sides; the R1 paper uses 10")
    clip_high: PositiveSchedule | None = Field(None, description="upper eps when it differs from `clip` (DAPO: clip 0.2, clip_high 0.28)")
    kl_coef: NonNegativeSchedule = Field(1e-3, description="beta, weight of the KL to the reference; 0 needs no reference model")
    kl_estimator: Literal["k1", "k2", "k3"] = Field("k3", description="KL estimator; k3 = exp(d) - d - 1 with d = log pi_ref - log pi")
    aggregation: Literal["sequence", "token", "constant"] = Field(
        "sequence",
        description="sequence: mean over a response's tokens, then over responses (GRPO); token: mean over all tokens (DAPO); "
        "constant: sum over tokens divided by responses x `constant_length` (Dr.GRPO)",
    )
    constant_length: int | None = Field(None, ge=1, description="divisor of aggregation `constant`, usually the length cap")
    normalize_std: bool = Field(True, description="divide advantages by the group's standard deviation (Dr.GRPO: false)")
    mask_truncated: bool = Field(False, description="leave responses that hit the length cap out of the loss (DAPO)")
    drop_uniform_groups: bool = Field(False, description="leave out groups whose rewards are all equal (DAPO's dynamic sampling)")
    mismatch: Mismatch = Field(default_factory=Mismatch, description="corrections for the gap between engine and trainer")

    @model_validator(mode="after")
    def _constant_needs_its_length(self) -> "GrpoObjective":
        if self.aggregation == "constant" and self.constant_length is None:
            raise ValueError("aggregation 'constant' needs constant_length")
        return self


class Optimizer(Closed):
    """AdamW with a warm-up and a decay, through Megatron-Core's optimizer."""

    lr: float = Field(gt=0, description="peak learning rate")
    min_lr: float | None = Field(None, ge=0, description="learning rate at the end of the decay; left out: no decay")
    decay: Literal["constant", "linear", "cosine"] = Field("constant", description="shape of the decay from lr to min_lr")
    warmup: int = Field(0, ge=0, description="updates of linear warm-up from 0")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the mean of gradients")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of the mean of squared gradients")
    eps: float = Field(1e-8, gt=0, description="added to the root of the mean of squared gradients")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay; norms and biases are exempt")
    clip_grad: float = Field(1.0, ge=0, description="largest global gradient norm; 0 does not clip")
    distributed: bool = Field(True, description="shard optimizer states over data-parallel ranks (ZeRO-1)")
    moments: Literal["float32", "bfloat16"] = Field(
        "float32", description="dtype of both moments; bfloat16: DeepSeek-V3's (arXiv 2412.19437, section 3.3.3); CUDA only"
    )
    main_params: Literal["float32", "float16"] = Field("float32", description="dtype of the master copy of bfloat16 weights; CUDA only")
    main_grads: Literal["float32", "bfloat16"] = Field(
        "float32", description="dtype in which gradients are added up over micro-batches and ranks; CUDA only"
    )
    offload: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the optimizer's states that live on the host, where AdamW steps them; their moments are float32; CUDA only",
    )

    @property
    def precision_aware(self) -> bool:
        """Whether Megatron-Core's optimizer with dtypes of its own is needed; offloading goes through it as well."""
        return self.reduced or self.offload > 0

    @property
    def reduced(self) -> bool:
        """Whether anything of it is kept in less than float32."""
        return (self.moments, self.main_params, self.main_grads) != ("float32", "float32", "float32")

    @model_validator(mode="after")
    def _states_can_be_kept_so(self) -> "Optimizer":
        if self.precision_aware and not self.distributed:
            raise ValueError(
                "moments, main_params, main_grads and offload are of Megatron-Core's distributed optimizer; use distributed: true"
            )
        if self.offload > 0 and (self.moments, self.main_params) != ("float32", "float32"):
            raise ValueError(
                f"offload={self.offload:g}: Megatron-Core keeps the states of an offloaded optimizer in float32, on the GPU as well; use "
                "moments and main_params float32, or offload 0"
            )
        return self


class Train(Closed):
    """How a training step is executed."""

    dtype: Literal["float32", "bfloat16"] = Field("float32", description="dtype of parameters and activations")
    fp8: Literal["none", "blockwise", "tensorwise", "mxfp8"] = Field(
        "none",
        description="Transformer Engine's FP8 recipe; blockwise: DeepSeek-V3's, 128 x 128 weights and 1 x 128 activations; tensorwise: "
        "current scaling; mxfp8: 1 x 32, on Blackwell; CUDA only",
    )
    chunk_tokens: int = Field(4096, ge=8, description="tokens of one packed micro-batch; the longest sequence must fit")
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="activation recomputation; selective: norms, latent attention's up projections and dense MLPs"
    )
    dispatcher: Literal["alltoall", "deepep"] = Field(
        "alltoall",
        description="how tokens reach their experts; deepep: DeepEP's kernels, once to each node, where ep or tp is above 1; CUDA only",
    )
    overlap: bool = Field(False, description="reduce gradients over data-parallel ranks while the backward pass still runs")
    logprob_chunk: int = Field(2048, ge=1, description="tokens whose logits exist at once when log-probs are computed")
    router_bias_rate: float = Field(0.0, ge=0, description="update rate of the router's expert bias (V3: 1e-3 in pre-training, 0 in RL)")
    aux_loss: float = Field(0.0, ge=0, description="weight of the sequence-wise expert-balance loss (V3: 1e-4 in pre-training)")
    mtp_loss: float = Field(0.0, ge=0, description="weight of the multi-token-prediction loss; 0 leaves the MTP weights as they are")
    async_save: bool = Field(True, description="go on training while a checkpoint's files are written")


class PretrainTrain(Train):
    """How a pre-training step is executed: Train with the balance and MTP losses of DeepSeek-V3 on."""

    router_bias_rate: float = Field(1e-3, ge=0, description="update rate of the router's expert bias")
    aux_loss: float = Field(1e-4, ge=0, description="weight of the sequence-wise expert-balance loss")
    mtp_loss: float = Field(0.3, ge=0, description="weight of the multi-token-prediction loss; 0 leaves the MTP weights as they are")
