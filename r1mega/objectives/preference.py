"""Losses of reward models, and how well their scores agree with the judgements. Pure functions of scores."""

import numpy as np
import torch.nn.functional as F
from torch import Tensor


def pairwise(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid(chosen - rejected), float32 [pairs], of the scores [pairs] of two answers to one question.

    The negative log-likelihood of the judgement under the model of Bradley and Terry (Ouyang et al. 2022, arXiv 2203.02155, equation 1).
    """
    return -F.logsigmoid(chosen - rejected)


def pointwise(scores: Tensor, safe: Tensor) -> Tensor:
    """Binary cross-entropy [n] of scores [n] as logits, against labels [n] that are 1 for a safe answer and 0 for another."""
    return F.binary_cross_entropy_with_logits(scores, safe, reduction="none")


def ranked(chosen: Tensor, rejected: Tensor) -> Tensor:
    """1 where the better answer scores higher, 0 where it scores lower, 0.5 where both score the same: float32 [pairs]."""
    return (1 + (chosen - rejected).sign()) / 2


def auc(scores: Tensor, safe: Tensor) -> float:
    """Area under the ROC curve: how often a safe answer scores higher than another, ties counted as half; NaN with one kind only.

    Mann and Whitney's U from the ranks, O(n log n).
    """
    values, labels = scores.double().numpy(), safe.bool().numpy()
    positives = int(labels.sum())
    if positives in (0, len(labels)):
        return float("nan")
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    # Equal scores share the mean of the ranks that they take up, counted from 1.
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[which]
    return float((ranks[labels].sum() - positives * (positives + 1) / 2) / (positives * (len(labels) - positives)))
