"""GPUs of a node before ranks start on it, as NVIDIA's nvidia-resiliency-ext finds them, where that is installed."""

import logging
import warnings


def sick_gpus() -> str:
    """Why GPUs of this machine cannot be relied on, such as one that must be reset; empty where nothing is known against them.

    The driver says so from release 570 on. An older one, or none at all, says nothing against any GPU.
    """
    try:
        from nvidia_resiliency_ext.shared_utils.health_check import GPUHealthCheck
    except ImportError:
        return ""
    said = _Said()
    log = logging.getLogger(GPUHealthCheck.__module__)
    log.addHandler(said)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of pynvml, about its own name
            check = GPUHealthCheck()
        said.lines.clear()
        return "" if check() else " ".join(said.lines) or "the check of its GPUs fails and says nothing"
    finally:
        log.removeHandler(said)


class _Said(logging.Handler):
    """What the check tells its logger, and nobody else."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self.lines.append(record.getMessage())
