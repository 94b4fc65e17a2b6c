"""Distillation from a teacher's log-probs, as pure functions of tensors. All values are in nats, all distributions at temperature 1.

Legend: T packed tokens of one micro-batch; p the student's next-token distribution in a place, q the teacher's; k tokens of the vocabulary.
"""

import torch
from torch import Tensor


def reverse_kl_loss(logprobs: Tensor, teacher_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Loss [T] of tokens that the student drew: its value estimates KL(p || q), its gradient is a policy gradient; 0 outside the mask.

    The advantage of a drawn token o_t is A_t = log q(o_t) - log p(o_t), held constant, and the loss is -A_t p(o_t) / sg[p(o_t)]: on policy
    the importance ratio is 1. In expectation over o_t ~ p the gradient is that of KL(p || q) in this place, since
    grad sum_v p(v) (log p(v) - log q(v)) = E[(log p - log q) grad log p] and E[grad log p] = 0.

    MiniLLM (arXiv 2306.08543, section 2.2) has the same single-step term, and adds what a token does to the divergence of all later ones;
    like GKD (arXiv 2306.13649, section 3) and on-policy distillation as it is practised, this leaves the later ones to their own terms.
    GKD takes the sum over the vocabulary where this has one sample of it, for which the teacher need score nothing but the response.

    logprobs, teacher_logprobs: [T], of the drawn tokens; outside the mask any finite value. mask: bool [T].
    """
    advantages = torch.where(mask, teacher_logprobs - logprobs.detach(), 0.0)
    ratio = torch.where(mask, logprobs - logprobs.detach(), 0.0).exp()
    return -advantages * ratio


def forward_kl(logprobs: Tensor, rest: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """KL(q || p) [T] over k tokens and a bucket with all others: sum_i q_i log(q_i / p_i) + Q log(Q / P), Q = 1 - sum_i q_i.

    The k tokens are the teacher's most likely ones, so this is the forward KL (word-level distillation, Kim and Rush 2016,
    arXiv 1606.07947; GKD's supervised term, arXiv 2306.13649) of both distributions with the tail made one outcome: never negative, at
    most the KL over the whole vocabulary, and 0 exactly where p agrees with q on every listed token. What of the tail is more likely than
    the rest of it stays the student's own choice. Renormalising q over the k tokens instead would teach the student that nothing else
    exists, a bias that "Sparse Logit Sampling" (arXiv 2503.16870) proves of top-k distillation.

    Args:
        logprobs: [T, k], the student's of the k tokens. With `rest`, all that carries a gradient.
        rest: [T], the student's log-probability log P of everything else.
        teacher_logprobs: [T, k]; -inf where a listed token is none of the student's, whose mass then counts as tail.
    """
    q = teacher_logprobs.exp()
    known = q > 0
    listed = torch.where(known, q * (torch.where(known, teacher_logprobs, 0.0) - logprobs), 0.0).sum(-1)
    tail = tail_mass(teacher_logprobs)
    return listed + torch.where(tail > 0, tail * (tail.clamp_min(torch.finfo(tail.dtype).tiny).log() - rest), 0.0)


def tail_mass(teacher_logprobs: Tensor) -> Tensor:
    """Q [T], the probability that the teacher gives to all tokens but the listed [T, k]."""
    # In float64: the sum is mostly so near to 1 that float32 would leave nothing of the difference.
    return (1.0 - teacher_logprobs.double().exp().sum(-1)).clamp_min(0.0).to(teacher_logprobs.dtype)
