"""Settings that must hold before torch is imported, and what a machine without a GPU leaves out."""

import os

# One thread per process: tests start several, and a BLAS thread too many makes tiny steps tens of times slower.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

# A machine that is busy for a second says nothing about the code; the same examples every time make a failure one to be seen again.
settings.register_profile("here", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("here")


_LONG = ("slow", "sglang", "lane")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files with long tests first: in the end one would keep a worker busy while all others have nothing to do.
    long = {item.path for item in items if any(mark in item.keywords for mark in _LONG)}
    items.sort(key=lambda item: item.path not in long)
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
