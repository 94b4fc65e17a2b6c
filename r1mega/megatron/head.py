"""Token log-probabilities from hidden states, without ever holding the logits of a whole sequence."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def token_logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, vocab: int, temperature: float, chunk: int, tp_group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label, and the entropy of the distribution it was drawn from.

    The vocabulary is sharded over the tensor-parallel ranks; each holds rows [rank x V/tp, (rank + 1) x V/tp) of the output
    embedding, padding rows past `vocab` last. Logits exist for `chunk` tokens at a time, in float32, forward and backward.

    Args:
        hidden: [tokens, hidden], the same on every tensor-parallel rank. Its gradient is this rank's part of the sum.
        weight: [V/tp, hidden], this rank's shard of the output embedding.
        labels: int64 [tokens].
        vocab: true vocabulary size.
        temperature: logits are divided by it.

    Returns:
        float32 [tokens] log-probabilities (differentiable) and float32 [tokens] entropies in nats (not).
    """
    return _TokenLogprobs.apply(hidden, weight, labels, vocab, temperature, chunk, tp_group)  # type: ignore[no-any-return]


def listed_logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, vocab: int, chunk: int, tp_group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of k listed tokens in each place, and of everything else together, at temperature 1.

    Sharded and chunked as `token_logprobs` is.

    Args:
        hidden: [tokens, hidden], the same on every tensor-parallel rank. Its gradient is this rank's part of the sum.
        weight: [V/tp, hidden], this rank's shard of the output embedding.
        labels: int64 [tokens, k], k < vocab, different ones in each place. For an id outside the vocabulary the log-probability is a
            finite number without meaning, and it is not left out of everything else.
        vocab: true vocabulary size.

    Returns:
        float32 [tokens, k] and float32 [tokens], both differentiable. The second is a log-sum over the other tokens themselves, for
        1 - sum would leave nothing of a small tail.
    """
    return _ListedLogprobs.apply(hidden, weight, labels, vocab, chunk, tp_group)  # type: ignore[no-any-return]


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, vocab: int, temperature: float, chunk: int, tp_group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        shard = _Shard(weight, vocab, temperature, tp_group)
        logprobs = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
        entropies = torch.empty_like(logprobs)
        log_norms = torch.empty_like(logprobs)
        for rows in _chunks(labels.shape[0], chunk):
            logits = shard.logits(hidden[rows])
            highest = shard.reduce(logits.amax(-1), dist.ReduceOp.MAX)
            exps = (logits - highest[:, None]).exp_()
            local, inside = shard.localise(labels[rows])
            picked = torch.where(inside, logits.gather(1, local[:, None])[:, 0], 0.0)
            # 0 x -inf would poison the padding columns: their probability is exactly 0, so any finite logit serves.
            moments = torch.stack([exps.sum(-1), picked, (exps * logits.clamp_min(torch.finfo(logits.dtype).min)).sum(-1)])
            total, target, weighted = shard.reduce(moments, dist.ReduceOp.SUM)
            log_norms[rows] = highest + total.log()
            logprobs[rows] = target - log_norms[rows]
            entropies[rows] = log_norms[rows] - weighted / total
        ctx.save_for_backward(hidden, weight, labels, log_norms)
        ctx.constants = (vocab, temperature, chunk, tp_group)
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, labels, log_norms = ctx.saved_tensors
        vocab, temperature, chunk, tp_group = ctx.constants
        shard = _Shard(weight, vocab, temperature, tp_group)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for rows in _chunks(labels.shape[0], chunk):
            # d logprob / d logits = onehot(label) - softmax(logits)
            grad_logits = (shard.logits(hidden[rows]) - log_norms[rows, None]).exp_().neg_()
            local, inside = shard.localise(labels[rows])
            grad_logits.scatter_add_(1, local[:, None], inside[:, None].to(grad_logits.dtype))
            grad_logits = (grad_logits * (grad[rows, None] / temperature)).to(hidden.dtype)
            grad_hidden[rows] = grad_logits @ weight
            grad_weight += grad_logits.t() @ hidden[rows]
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None, None


class _ListedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, vocab: int, chunk: int, tp_group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        shard = _Shard(weight, vocab, 1.0, tp_group)
        logprobs = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
        log_norms = torch.empty(labels.shape[0], dtype=torch.float32, device=hidden.device)
        log_rests = torch.empty_like(log_norms)
        for rows in _chunks(labels.shape[0], chunk):
            logits = shard.logits(hidden[rows])
            local, inside = shard.localise(labels[rows])
            picked = shard.reduce(torch.where(inside, logits.gather(1, local), 0.0), dist.ReduceOp.SUM)
            log_norms[rows] = shard.log_sum(logits)
            log_rests[rows] = shard.log_sum(logits.masked_fill_(_marked(local, inside, logits.shape[1]), -torch.inf))
            logprobs[rows] = picked - log_norms[rows, None]
        ctx.save_for_backward(hidden, weight, labels, log_norms, log_rests)
        ctx.constants = (vocab, chunk, tp_group)
        return logprobs, log_rests - log_norms

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_rest: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, labels, log_norms, log_rests = ctx.saved_tensors
        vocab, chunk, tp_group = ctx.constants
        shard = _Shard(weight, vocab, 1.0, tp_group)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for rows in _chunks(labels.shape[0], chunk):
            logits = shard.logits(hidden[rows])
            local, inside = shard.localise(labels[rows])
            # d logprob_i / d logits = onehot(i) - softmax; d rest / d logits = softmax over the rest - softmax
            total = grad[rows].sum(-1) + grad_rest[rows]
            grad_logits = (logits - log_norms[rows, None]).exp() * -total[:, None]
            among_rest = logits.masked_fill_(_marked(local, inside, logits.shape[1]), -torch.inf)
            grad_logits += (among_rest - log_rests[rows, None]).exp_() * grad_rest[rows, None]
            grad_logits.scatter_add_(1, local, torch.where(inside, grad[rows], 0.0))
            grad_logits = grad_logits.to(hidden.dtype)
            grad_hidden[rows] = grad_logits @ weight
            grad_weight += grad_logits.t() @ hidden[rows]
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def _marked(local: Tensor, inside: Tensor, columns: int) -> Tensor:
    """bool [tokens, columns]: the columns that are listed. Ids that are elsewhere go to a column beyond the last."""
    marks = torch.zeros(local.shape[0], columns + 1, dtype=torch.bool, device=local.device)
    return marks.scatter_(1, torch.where(inside, local, columns), True)[:, :columns]


class _Shard:
    """One rank's rows of the output embedding."""

    def __init__(self, weight: Tensor, vocab: int, temperature: float, group: dist.ProcessGroup) -> None:
        self.weight, self.temperature, self.group = weight, temperature, group
        self.start = group.rank() * weight.shape[0]
        self.real = max(0, min(weight.shape[0], vocab - self.start))

    def logits(self, hidden: Tensor) -> Tensor:
        logits = (hidden @ self.weight.t()).float()
        if self.temperature != 1.0:
            logits = logits / self.temperature
        logits[:, self.real :] = -torch.inf
        return logits

    def localise(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        local = labels - self.start
        inside = (local >= 0) & (local < self.real)
        return torch.where(inside, local, 0), inside

    def log_sum(self, logits: Tensor) -> Tensor:
        """log sum exp over the whole vocabulary, [tokens]; somewhere a logit is finite."""
        highest = self.reduce(logits.amax(-1), dist.ReduceOp.MAX)
        return highest + self.reduce((logits - highest[:, None]).exp_().sum(-1), dist.ReduceOp.SUM).log()

    def reduce(self, x: Tensor, op: Any) -> Tensor:
        if self.group.size() > 1:
            dist.all_reduce(x, op=op, group=self.group)
        return x


def _chunks(tokens: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]
