"""Log-probs of listed tokens: values and gradients against plain torch, and the same under every layout."""

import json
from collections.abc import Iterator

import distillation_ranks
import megatron_support as support
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from megatron_support import Case
from safetensors.torch import save_file

from r1mega.megatron import head

pytestmark = pytest.mark.lane

VOCAB, PADDED = 50, 64
CASES = [
    Case("v3", {"tp": 2, "ep": 2}),
    Case("qwen", {"tp": 2}),
    Case("qwen", {"pp": 2}),
    Case("llama", {"cp": 2}),
    Case("llama"),
]


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("chunk", [3, 100])
@pytest.mark.parametrize("k", [1, 8, VOCAB - 1])
def test_listed_logprobs_against_plain_torch(chunk: int, k: int, alone: None) -> None:
    generator = torch.Generator().manual_seed(k)
    hidden = torch.randn(20, 16, generator=generator).requires_grad_()
    weight = torch.randn(PADDED, 16, generator=generator).requires_grad_()
    labels = torch.stack([torch.randperm(VOCAB, generator=generator)[:k] for _ in range(20)])
    weights = torch.randn(20, k, generator=generator), torch.randn(20, generator=generator)

    def gradients(logprobs: torch.Tensor, rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad((weights[0] * logprobs).sum() + (weights[1] * rest).sum(), (hidden, weight))

    found = head.listed_logprobs(hidden, weight, labels, vocab=VOCAB, chunk=chunk, tp_group=dist.group.WORLD)
    logprobs = (hidden.double() @ weight.double().t())[:, :VOCAB].log_softmax(-1)
    others = torch.ones_like(logprobs, dtype=torch.bool).scatter(1, labels, False)
    expected = logprobs.gather(1, labels), logprobs.masked_fill(~others, -torch.inf).logsumexp(-1)
    for one, other in zip((*found, *gradients(*found)), (*expected, *gradients(*expected)), strict=True):
        assert one.dtype == torch.float32 and torch.allclose(one, other.float(), atol=3e-5)


def test_a_tail_far_below_the_precision_of_a_sum_is_kept(alone: None) -> None:
    weight = torch.zeros(4, 2)
    weight[:, 0] = torch.tensor([0.0, -1.0, -120.0, -121.0])
    hidden = torch.tensor([[1.0, 0.0]], requires_grad=True)
    labels = torch.tensor([[0, 1]])
    _, rest = head.listed_logprobs(hidden, weight, labels, vocab=4, chunk=8, tp_group=dist.group.WORLD)
    expected = weight[:, 0].double().log_softmax(-1)[2:].logsumexp(-1)
    assert rest.item() == pytest.approx(expected.item(), rel=1e-6) and expected < -119
    rest.sum().backward()
    assert hidden.grad is not None and hidden.grad.isfinite().all()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, support.Outcome], list[dict]]:
    """The runs in one process, and what each of two ranks found."""
    folder = tmp_path_factory.mktemp("references")
    alone = {}
    with support.cpu_platform():
        for case in {case.reference.name: case.reference for case in CASES}.values():
            alone[case.name] = outcome = distillation_ranks.run(case)
            save_file(support.canonical_values(outcome), folder / f"{case.name}.safetensors")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mp.spawn(distillation_ranks.work, (2, store.port, folder, CASES), nprocs=2)
    return alone, [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layouts_learn_like_one_process(case: Case, outcomes: tuple[dict[str, support.Outcome], list[dict]]) -> None:
    expected = outcomes[0][case.reference.name].scalars
    assert expected["loss"] > 0.01 and expected["grad_norm"] > 0.01
    for report in outcomes[1]:
        found = report[case.name]
        assert "error" not in found, found["error"]
        assert found["scalars"] == pytest.approx(expected, rel=1e-5)
        assert max(found["differences"].values()) < 1e-5, found["differences"]
