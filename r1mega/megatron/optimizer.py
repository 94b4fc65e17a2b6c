"""From a recipe's `optimizer` and `train` to Megatron-Core's configurations of its optimizer and of the gradients' reduction."""

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig

from r1mega.config.training import Optimizer, Train

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def reduction_config(settings: Optimizer, train: Train) -> DistributedDataParallelConfig:
    """How gradients are kept and summed over data-parallel ranks. Buffers are float32, or the weights' bfloat16."""
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=settings.main_grads == "float32",
        use_distributed_optimizer=settings.distributed,
        overlap_grad_reduce=train.overlap,
        check_for_nan_in_grad=False,
    )


def optimizer_config(settings: Optimizer, train: Train) -> OptimizerConfig:
    """AdamW, and the dtypes and places of its states.

    Raises:
        RuntimeError: of Megatron-Core, for dtypes below float32 without Transformer Engine's FusedAdam.
    """
    return OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.lr if settings.min_lr is None else settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        clip_grad=settings.clip_grad,
        bf16=train.dtype == "bfloat16",
        params_dtype=DTYPES[train.dtype],
        # Who keeps the master copy depends on it: Transformer Engine's kernel has none for weights that an FP8 recipe quantises.
        fp8_recipe=None if train.fp8 == "none" else train.fp8,
        use_distributed_optimizer=settings.distributed,
        use_precision_aware_optimizer=settings.precision_aware,
        exp_avg_dtype=DTYPES[settings.moments],
        exp_avg_sq_dtype=DTYPES[settings.moments],
        main_params_dtype=DTYPES[settings.main_params],
        main_grads_dtype=DTYPES[settings.main_grads],
        optimizer_cpu_offload=settings.offload > 0,
        optimizer_offload_fraction=settings.offload,
        overlap_cpu_optimizer_d2h_h2d=settings.offload > 0,
    )
