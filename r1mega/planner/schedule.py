"""Pipeline schedules: how many micro-batches a stage keeps, and how long stages wait."""


def in_flight(pp: int, vpp: int, stage: int, micro_batches: int) -> list[int]:
    """Forward passes whose activations a stage holds at its peak, by model chunk.

    1F1B: pp - stage (Narayanan et al., arXiv 2104.04473, section 2.2). Interleaved: the warm-up of Megatron-Core's schedule,
    2 (pp - stage - 1) + (vpp - 1) pp, and the forward pass after it, dealt to chunks pp at a time (its `schedules.py`).
    """
    if vpp == 1:
        return [min(pp - stage, micro_batches)]
    passes = min(2 * (pp - stage - 1) + (vpp - 1) * pp + 1, vpp * micro_batches)
    cycles, rest = divmod(passes, pp * vpp)
    return [cycles * pp + max(0, min(pp, rest - chunk * pp)) for chunk in range(vpp)]


def bubble(pp: int, vpp: int, micro_batches: int) -> float:
    """Time that stages wait, over the time that they work: (pp - 1) / (vpp x micro-batches), arXiv 2104.04473, section 2.2.2."""
    return (pp - 1) / (vpp * micro_batches)
