"""What is due when over the updates of a stage: learning rates, and what comes every so many updates."""

import math

from r1mega.config.training import Optimizer


def learning_rate(settings: Optimizer, update: int, updates: int) -> float:
    """The rate of an update (counted from 0) among `updates`: linear warm-up, then the decay down to `min_lr`."""
    if update < settings.warmup:
        return settings.lr * (update + 1) / settings.warmup
    if settings.decay == "constant" or settings.min_lr is None:
        return settings.lr
    done = (update - settings.warmup) / max(1, updates - settings.warmup)
    falling = 1 - done if settings.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
    return settings.min_lr + (settings.lr - settings.min_lr) * falling


def crossed(update: int, step: int, every: int) -> bool:
    """Whether a multiple of `every` lies in the last `step` of `update` updates; never where `every` is 0."""
    return every > 0 and update // every > (update - step) // every
