"""Losses of reward models, and how well their scores agree with the judgements. Pure functions of scores."""

import torch
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


def outscored(scores: Tensor, safe: Tensor) -> Tensor:
    """For each safe answer the share of the unsafe ones that score lower, ties counted as half: float64 [safe answers].

    Its mean is the area under the ROC curve, Mann and Whitney's U over the number of comparisons. There must be unsafe answers.
    """
    lower, _ = scores[safe == 0].sort()
    higher = scores[safe != 0]
    below, upto = torch.searchsorted(lower, higher), torch.searchsorted(lower, higher, right=True)
    return (below + upto).double() / (2 * len(lower))
