"""Names and figures as people read them."""

import math
from typing import Any

_NAMES = {
    "response_length": "length, tokens",
    "consistency": "language consistency",
    "format": "format",
    "reflection": "reflection words",
    "uniform_groups": "groups without a signal",
    "truncated": "cut off",
    "not_judged": "not judged",
    "kl": "KL to the reference",
    "clip_fraction": "clipped tokens",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "loss": "loss",
    "mtp_loss": "MTP loss",
}

KINDS = {
    "pretrain": "pre-training",
    "sft": "supervised training",
    "grpo": "reinforcement learning",
    "rejection": "rejection sampling",
    "preference": "reward model",
    "distill": "distillation",
    "evaluate": "evaluation",
}


def name(key: str) -> str:
    """A metric's key in words; the last part of `a/b` alone is not enough, so all parts stay."""
    return " · ".join(_NAMES.get(part, part.replace("_", " ")) for part in key.split("/"))


def share_like(key: str) -> bool:
    """Whether a metric is a share or probability of which more is better, so that the best of a column can be told."""
    last = key.rpartition("/")[2]
    return last.startswith(("pass@", "cons@")) or last in ("format", "consistency", "accuracy", "preference")


def figure(value: Any) -> str:
    """A number in about four digits; anything else as it is written."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (float(value).is_integer() and abs(value) > 1):
        return f"{value:,.0f}"
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e6):
        return f"{value:.2e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.1f}" if size >= 100 else f"{value:.2f}" if size >= 10 else f"{value:.3f}"


def duration(seconds: float) -> str:
    """Wall time: `74 s`, `12 min`, `3 h 20 min`, `2 d 4 h`."""
    minutes, hours = seconds / 60, seconds / 3600
    if seconds < 120:
        return f"{max(seconds, 1):.0f} s"
    if minutes < 120:
        return f"{minutes:.0f} min"
    if hours < 48:
        return f"{int(hours)} h {int(minutes) % 60} min"
    return f"{int(hours) // 24} d {int(hours) % 24} h"


def rounded(value: float, digits: int = 4) -> float:
    """A number in few significant digits: what a curve needs, in a third of the bytes."""
    if value == 0 or not math.isfinite(value):
        return value
    found = round(value, digits - 1 - math.floor(math.log10(abs(value))))
    return int(found) if found.is_integer() and abs(found) < 2**53 else found
