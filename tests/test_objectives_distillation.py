"""Distillation's losses against plain torch over the whole vocabulary."""

import pytest
import torch
from torch import Tensor

from r1mega.objectives.distillation import forward_kl, reverse_kl_loss, tail_mass

VOCAB = 29


def logits(rows: int, seed: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def listed(student: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of the ids and of everything else, with a gradient to the logits."""
    logprobs = student.log_softmax(-1)
    others = torch.ones_like(student, dtype=torch.bool).scatter(1, ids, False)
    return logprobs.gather(1, ids), logprobs.masked_fill(~others, -torch.inf).logsumexp(-1)


def whole_kl(teacher: Tensor, student: Tensor) -> Tensor:
    q, p = teacher.log_softmax(-1), student.log_softmax(-1)
    return (q.exp() * (q - p)).sum(-1)


def test_reverse_kl_has_the_gradient_of_the_divergence() -> None:
    student, teacher = logits(5, 0).requires_grad_(), logits(5, 1)
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    exact = (p.exp() * (p - q)).sum(-1)
    # The expectation over the student's own draws, in full: every token once, weighed by its probability.
    losses = reverse_kl_loss(p.flatten(), q.flatten(), torch.ones(5 * VOCAB, dtype=torch.bool)).view(5, VOCAB)
    expected = (p.detach().exp() * losses).sum(-1)
    assert torch.allclose(expected, exact, rtol=1e-12)
    (wanted,) = torch.autograd.grad(exact.sum(), student, retain_graph=True)
    (found,) = torch.autograd.grad(expected.sum(), student)
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12) and wanted.abs().max() > 0.1


def test_reverse_kl_is_a_policy_gradient_with_a_constant_advantage() -> None:
    logprobs = torch.tensor([-1.0, -3.0, 0.0], requires_grad=True)
    loss = reverse_kl_loss(logprobs, torch.tensor([-2.0, -1.0, 7e4]), torch.tensor([True, True, False]))
    assert loss.tolist() == [1.0, -2.0, 0.0]
    loss.sum().backward()
    assert logprobs.grad is not None and logprobs.grad.tolist() == [1.0, -2.0, 0.0]  # -A_t, and nothing outside the mask


def test_forward_kl_over_all_but_one_token_is_the_whole_divergence() -> None:
    student, teacher = logits(6, 2).requires_grad_(), logits(6, 3)
    top = teacher.log_softmax(-1).topk(VOCAB - 1)
    exact = whole_kl(teacher, student)
    found = forward_kl(*listed(student, top.indices), top.values)
    assert torch.allclose(found, exact, rtol=1e-9)
    (wanted,) = torch.autograd.grad(exact.sum(), student, retain_graph=True)
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert torch.allclose(gradient, wanted, atol=1e-10) and wanted.abs().max() > 0.1


@pytest.mark.parametrize("k", [1, 2, 5, 20])
def test_forward_kl_of_a_coarser_outcome(k: int) -> None:
    student, teacher = logits(200, 4), logits(200, 5)
    top = teacher.log_softmax(-1).topk(k)
    found, exact = forward_kl(*listed(student, top.indices), top.values), whole_kl(teacher, student)
    assert (found >= 0).all() and (found <= exact + 1e-12).all() and found.mean() > 0.1 * exact.mean()
    assert forward_kl(*listed(teacher, top.indices), top.values).abs().max() < 1e-12
    # The tail's own order is the student's choice; its total is not.
    others = torch.ones_like(student, dtype=torch.bool).scatter(1, top.indices, False)
    shuffled = torch.where(
        others, teacher.masked_fill(~others, -torch.inf).logsumexp(-1, keepdim=True) - torch.tensor(VOCAB - k).log(), teacher
    )
    assert forward_kl(*listed(shuffled, top.indices), top.values).abs().max() < 1e-12
    assert (forward_kl(*listed(teacher + 2.0 * others, top.indices), top.values) > 1e-4).float().mean() > 0.9


def test_forward_kl_agrees_with_pytorch_s_own_gradient() -> None:
    student, teacher = logits(4, 6).requires_grad_(), logits(4, 7)
    top = teacher.log_softmax(-1).topk(3)

    def coarse(values: Tensor) -> Tensor:
        chosen, rest = listed(values, top.indices)
        return torch.cat([chosen, rest[:, None]], dim=1)

    exact = torch.nn.functional.kl_div(coarse(student), coarse(teacher), log_target=True, reduction="none").sum(-1)
    found = forward_kl(*listed(student, top.indices), top.values)
    assert torch.allclose(found, exact, rtol=1e-10)
    (wanted,) = torch.autograd.grad(exact.sum(), student, retain_graph=True)
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert torch.allclose(gradient, wanted, atol=1e-12)


def test_tokens_that_the_student_lacks_count_as_tail() -> None:
    student, teacher = logits(3, 8), logits(3, 9)
    top = teacher.log_softmax(-1).topk(4)
    unknown = top.values.clone()
    unknown[:, 1] = -torch.inf
    chosen, _ = listed(student, top.indices)
    _, rest = listed(student, top.indices[:, [0, 2, 3]])  # of an unknown token nothing is left out of the rest
    expected = forward_kl(*listed(student, top.indices[:, [0, 2, 3]]), top.values[:, [0, 2, 3]])
    assert torch.allclose(forward_kl(chosen, rest, unknown), expected, rtol=1e-12)


def test_a_teacher_that_is_certain_is_finite() -> None:
    certain = torch.tensor([[0.0, -80.0]], dtype=torch.float32)
    assert tail_mass(certain).item() == 0.0
    chosen, rest = torch.tensor([[-2.0, -3.0]], requires_grad=True), torch.tensor([-1.0], requires_grad=True)
    loss = forward_kl(chosen, rest, certain)
    loss.sum().backward()
    assert loss.item() == 2.0 and rest.grad is not None and rest.grad.item() == 0.0
