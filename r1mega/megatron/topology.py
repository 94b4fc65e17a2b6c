"""Megatron-Core's process groups for a layout."""

import math

import torch.distributed as dist
from megatron.core import parallel_state

from r1mega.config.layout import Layout
from r1mega.megatron import platform
from r1mega.megatron.limits import MEGATRON_VERSION as MEGATRON_VERSION
from r1mega.megatron.limits import check as check


def connect(layout: Layout) -> None:
    """Make Megatron-Core's process groups for a layout, replacing those of an earlier one. Every rank calls this.

    Groups of a layout that was connected before are not reused: they are destroyed and new ones are made,
    which costs milliseconds on gloo and lets one process go through many layouts.
    """
    if parallel_state.model_parallel_is_initialized():
        # A rank that still waits for the last message of a group must get it before a peer leaves the group.
        dist.barrier()
        disconnect()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=math.ceil(platform.patience().total_seconds() / 60),
    )


def disconnect() -> None:
    """Destroy the process groups of the connected layout. A policy that was built on them is of no more use."""
    if not parallel_state.model_parallel_is_initialized():
        return
    # Megatron-Core only forgets its groups; each holds threads and sockets, or a communicator's device memory.
    for group in parallel_state._global_process_group_list or []:
        if group is not None:
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()
