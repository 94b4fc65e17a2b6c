"""The CPU platform's own kernels against what they replace or against the plain formula."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

pytest.importorskip("megatron.core")
import megatron_support as support
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron_support import Case

from r1mega.data.packing import context_parallel_index
from r1mega.megatron import head
from r1mega.megatron.platform import kernels, standins

pytestmark = pytest.mark.lane
LENGTHS = ([1], [7, 1, 33, 1, 12, 30, 2], [5] * 40, [64, 3, 64, 0, 40], list(range(1, 30)))


@pytest.fixture(scope="module", autouse=True)
def cpu():
    with support.cpu_platform():
        yield


class Group:
    """A context-parallel group that nobody speaks through."""

    def __init__(self, size: int, rank: int) -> None:
        self.size, self.rank = lambda: size, lambda: rank


def boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


# ---------------------------------------------------------------- attention


def naive_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """Causal softmax attention of one sequence after the other, [tokens, heads * v_dim]."""
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    outputs = []
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end]) * scale
        scores = scores.masked_fill(torch.ones(end - start, end - start).triu(1).bool(), -torch.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[start:end]))
    return torch.cat(outputs).flatten(1)


def tensors(tokens: int, heads: int, kv_heads: int, qk_dim: int, v_dim: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((tokens, heads, qk_dim), (tokens, kv_heads, qk_dim), (tokens, kv_heads, v_dim))
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


def attention(cp: Group, scale: float) -> kernels.PackedAttention:
    return kernels.PackedAttention(None, 1, None, "self", softmax_scale=scale, pg_collection=SimpleNamespace(cp=cp))


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("heads", "kv_heads", "qk_dim", "v_dim"), [(4, 4, 20, 10), (4, 2, 12, 12), (2, 1, 8, 12)])
def test_packed_attention(lengths, heads, kv_heads, qk_dim, v_dim):
    cu_seqlens = boundaries(lengths)
    inputs = tensors(sum(lengths), heads, kv_heads, qk_dim, v_dim)
    expected = naive_attention(*inputs, cu_seqlens, 0.3)
    found = attention(Group(1, 0), 0.3)(*inputs, packed_seq_params=SimpleNamespace(cu_seqlens_q=cu_seqlens))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((found * weights).sum(), inputs)
    for gradient, wanted in zip(gradients, torch.autograd.grad((expected * weights).sum(), inputs), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("cp", [2, 4])
def test_packed_attention_of_a_context_parallel_rank(cp, monkeypatch):
    lengths = [2 * cp * n for n in (1, 5, 0, 2, 9, 8, 1)]
    cu_seqlens = boundaries(lengths)
    q, k, v = (x.detach() for x in tensors(sum(lengths), 4, 4, 20, 10))
    expected = naive_attention(q, k, v, cu_seqlens, 0.3)
    held = [context_parallel_index(cu_seqlens, cp, rank) for rank in range(cp)]
    for rank in range(cp):
        everything = iter([torch.cat([k[index] for index in held]), torch.cat([v[index] for index in held])])
        monkeypatch.setattr(kernels, "gather_from_sequence_parallel_region", lambda x, group, everything=everything: next(everything))
        mine = (x[held[rank]] for x in (q, k, v))
        found = attention(Group(cp, rank), 0.3)(*mine, packed_seq_params=SimpleNamespace(cu_seqlens_q=cu_seqlens))
        torch.testing.assert_close(found, expected[held[rank]], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("cp", [1, 2, 4])
@pytest.mark.parametrize("seed", range(5))
def test_attention_plan(cp, seed):
    """Every token is laid once, sequences stay whole and in order, and padding is at most a third."""
    lengths = [2 * cp * n for n in torch.randint(0, 30, (25,), generator=torch.Generator().manual_seed(seed)).tolist()]
    cu_seqlens = boundaries(lengths)
    for rank in range(cp):
        plan = kernels.attention_plan(cu_seqlens.clone(), cp, rank)
        for (rows, places), tokens in ((plan.queries, sum(lengths) // cp), (plan.keys, sum(lengths))):
            assert torch.equal(rows[places], torch.arange(tokens))
            assert len(rows) * 3 <= tokens * 4
        assert sum(bucket.sequences for bucket in plan.buckets) == sum(length > 0 for length in lengths)
        held = [context_parallel_index(cu_seqlens, cp, other) for other in range(cp)]
        positions = standins.packed_positions(cu_seqlens, 1, 0)
        of_keys, of_queries = positions[torch.cat(held)], positions[held[rank]]
        laid_keys = plan.keys[0].split([bucket.sequences * bucket.key_length for bucket in plan.buckets])
        laid_queries = plan.queries[0].split([bucket.sequences * bucket.query_length for bucket in plan.buckets])
        for bucket, key_rows, query_rows in zip(plan.buckets, laid_keys, laid_queries, strict=True):
            keys, queries = key_rows.view(bucket.sequences, -1), query_rows.view(bucket.sequences, -1)
            for index in range(bucket.sequences):
                length = 1 + int(of_keys[keys[index]].max())
                assert torch.equal(of_keys[keys[index]][:length], torch.arange(length))
                assert torch.equal(of_queries[queries[index]][: length // cp].sort().values, of_queries[queries[index]][: length // cp])
                if bucket.mask is not None:
                    visible = of_queries[queries[index]][: length // cp, None] >= torch.arange(bucket.key_length)
                    assert torch.equal(bucket.mask[index, 0, : length // cp], visible)


# ---------------------------------------------------------------- experts


@pytest.fixture(scope="module")
def experts():
    return support.run(Case("v3")).policy.chunks[0].decoder.layers[1].mlp.experts


@pytest.mark.parametrize("counts", [[3, 1, 4, 1, 5, 9, 2, 6], [0, 7, 0, 0, 5, 0, 1, 0], [0, 0, 0, 0, 0, 0, 0, 11]])
def test_grouped_experts(experts, counts):
    """Values and every gradient of Megatron-Core's own sequential experts, experts without tokens included."""
    assert type(experts) is kernels.GroupedExperts
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(counts), 48, generator=generator, requires_grad=True)
    probs = torch.rand(sum(counts), generator=generator, requires_grad=True)
    weights = torch.randn(sum(counts), 48, generator=generator)
    results = []
    for forward in (SequentialMLP.forward, kernels.GroupedExperts.forward):
        y, bias = forward(experts, x, torch.tensor(counts), probs)
        assert bias is None
        results.append((y, *torch.autograd.grad((y * weights).sum(), (x, probs, *experts.parameters()), allow_unused=True)))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, torch.zeros_like(found) if expected is None else expected, rtol=1e-5, atol=2e-6)


def test_grouped_experts_without_any_token(experts):
    x = torch.zeros(0, 48, requires_grad=True)
    y, _ = experts(x, torch.zeros(8, dtype=torch.int64), torch.zeros(0))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert y.shape == gradient.shape == (0, 48)


def test_experts_gradient_by_finite_differences():
    generator = torch.Generator().manual_seed(0)
    x, probs = torch.randn(6, 4, generator=generator).double(), torch.rand(6, generator=generator).double()
    weights = [torch.randn(shape, generator=generator).double() for shape in [(6, 4)] * 3 + [(4, 3)] * 3]
    inputs = [tensor.requires_grad_() for tensor in (x, probs, *weights)]
    assert torch.autograd.gradcheck(lambda x, p, *w: kernels._Experts.apply(x, p, (2, 0, 4), *w), inputs)


# ---------------------------------------------------------------- RoPE


def megatron_rope_utils():
    """Megatron-Core's own module, without the stand-in."""
    spec = importlib.util.find_spec("megatron.core.models.common.embeddings.rope_utils")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("cp", "rank"), [(1, 0), (2, 0), (2, 1), (4, 2)])
@pytest.mark.parametrize("mla", [True, False])
def test_rope_of_packed_tokens(cp, rank, mla):
    lengths = [2 * cp * n for n in (1, 5, 2, 16)]
    cu_seqlens = boundaries(lengths)
    t = torch.randn(sum(lengths) // cp, 3, 8, generator=torch.Generator().manual_seed(0))
    freqs = torch.randn(max(lengths), 1, 1, 8, generator=torch.Generator().manual_seed(1))
    options = {"rotary_interleaved": False, "multi_latent_attention": mla, "mscale": 1.3, "cp_group": Group(cp, rank)}
    expected = megatron_rope_utils()._apply_rotary_pos_emb_thd(t, cu_seqlens, freqs, **options)
    torch.testing.assert_close(standins._rope_by_position(t, cu_seqlens, freqs, **options), expected, rtol=0, atol=0)


@pytest.mark.parametrize("cp", [1, 2, 4])
def test_packed_positions_are_those_of_the_packed_batch(cp):
    cu_seqlens = boundaries([2 * cp * n for n in (3, 1, 7, 2)])
    whole = torch.cat([torch.arange(length) for length in cu_seqlens.diff().tolist()])
    for rank in range(cp):
        found = standins.packed_positions(cu_seqlens, cp, rank)
        assert torch.equal(found, whole[context_parallel_index(cu_seqlens, cp, rank)])


# ---------------------------------------------------------------- head


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("padding", [0, 5])
def test_token_logprobs(chunk, temperature, padding):
    generator = torch.Generator().manual_seed(0)
    tokens, width, vocab = 23, 16, 127
    hidden = torch.randn(tokens, width, generator=generator, requires_grad=True)
    weight = torch.randn(vocab + padding, width, generator=generator, requires_grad=True)
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    upstream = torch.randn(tokens, generator=generator)
    options = {"vocab": vocab, "temperature": temperature, "chunk": chunk, "tp_group": dist.group.WORLD}
    found, entropies = head.token_logprobs(hidden, weight, labels, **options)
    dense = (hidden @ weight[:vocab].t() / temperature).log_softmax(-1)
    expected = dense.gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropies, -(dense.exp() * dense).sum(-1).detach(), rtol=1e-5, atol=1e-5)
    assert not entropies.requires_grad
    gradients = torch.autograd.grad((found * upstream).sum(), (hidden, weight))
    for gradient, wanted in zip(gradients, torch.autograd.grad((expected * upstream).sum(), (hidden, weight)), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5)
    assert not gradients[1][vocab:].any()


def test_token_logprobs_of_no_token_and_of_extreme_logits():
    weight = torch.eye(4) * 1e4
    hidden = torch.tensor([[1.0, 0, 0, 0], [0.0, 0, 0, 0]], requires_grad=True)
    options = {"vocab": 3, "temperature": 1.0, "chunk": 8, "tp_group": dist.group.WORLD}
    found, entropies = head.token_logprobs(hidden, weight, torch.tensor([0, 2]), **options)
    torch.testing.assert_close(found, torch.tensor([0.0, -torch.tensor(3.0).log()]))
    torch.testing.assert_close(entropies, torch.tensor([0.0, torch.tensor(3.0).log()]))
    assert torch.autograd.grad(found.sum(), hidden)[0].isfinite().all()
    none, _ = head.token_logprobs(hidden[:0], weight, torch.zeros(0, dtype=torch.int64), **options)
    assert none.shape == (0,) and torch.autograd.grad(none.sum(), hidden)[0].shape == (2, 4)
