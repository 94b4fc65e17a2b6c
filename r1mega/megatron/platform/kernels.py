"""Layer kernels for the CPU where Megatron-Core's local spec refuses or miscomputes what V3 needs. They run wherever their tensors are."""

from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor, nn

from r1mega.megatron.platform.latent import EPSILON


class RmsNorm(nn.Module):
    """RMSNorm; unlike torch's wrapped one it may stand inside a sequence-parallel region."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in x's dtype."""
        return _RmsNorm.apply(x, self.weight, self.eps)  # type: ignore[no-any-return]


class _RmsNorm(torch.autograd.Function):
    """RMSNorm in half the passes over memory that torch, which composes it of elementwise operations on a CPU, makes of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = torch.linalg.vecdot(wide, wide)[..., None].div_(x.shape[-1]).add_(eps).rsqrt_()
        normal = wide * scale
        ctx.save_for_backward(normal, scale, weight)
        return (normal * weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        normal, scale, weight = ctx.saved_tensors
        wide = grad.float()
        grad_weight = (wide * normal).flatten(0, -2).sum(0)
        # With n = x s and s = 1 / rms: dx = s (dn - n mean(dn n)).
        grad_normal = wide * weight
        mean = torch.linalg.vecdot(grad_normal, normal)[..., None].div_(normal.shape[-1])
        return grad_normal.addcmul_(normal, mean, value=-1).mul_(scale).to(grad.dtype), grad_weight.to(weight.dtype), None


class LatentNorm(RmsNorm):
    """Norm of MLA's compressed queries and keys."""

    def __init__(self, config: TransformerConfig, hidden_size: int, **_: Any) -> None:
        super().__init__(config, hidden_size, eps=EPSILON)


class WholeLinear(nn.Module):
    """A linear layer that every tensor-parallel rank holds whole: Transformer Engine's `parallel_mode="duplicated"`.

    MLA's down projections must be of this kind. As column-parallel layers their gathered output feeds every rank's heads,
    and the gather's backward only splits: gradients come out wrong by up to 2 % without any error.
    """

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, init_method: Any, bias: bool = False, **_: Any
    ) -> None:
        super().__init__()
        assert not bias, "no family has a bias here"
        self.weight = nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
        if config.perform_initialization:
            init_method(self.weight)
        set_tensor_model_parallel_attributes(self.weight, False, -1, 1)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return nn.functional.linear(x, self.weight), None


class PackedAttention(nn.Module):
    """Causal softmax attention over packed sequences, with context parallelism, through torch's SDPA.

    Sequences are laid into a padded batch, longest lengths together, and attended in one call per length bucket: a causal mask
    already hides the padding at a sequence's end, and one call for many short sequences beats a Python loop over them.
    Under context parallelism keys and values are gathered (the gather's backward is a reduce-scatter) and queries are masked
    by their global position.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        assert pg_collection is not None
        self.cp_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: PackedSeqParams,
        **_: Any,
    ) -> Tensor:
        """Attend.

        Args:
            query: [tokens, heads, qk_dim]
            key: [tokens, kv_heads, qk_dim]
            value: [tokens, kv_heads, v_dim]
            packed_seq_params: boundaries over all context-parallel ranks, in `cu_seqlens_q`.

        Returns:
            [tokens, heads * v_dim]
        """
        if packed_seq_params is None:
            raise ValueError("r1mega always packs: attention needs packed_seq_params")
        plan = attention_plan(packed_seq_params.cu_seqlens_q, self.cp_group.size(), self.cp_group.rank())
        if self.cp_group.size() > 1:
            key = gather_from_sequence_parallel_region(key, group=self.cp_group)
            value = gather_from_sequence_parallel_region(value, group=self.cp_group)
        qk_dim, v_dim = query.shape[-1], value.shape[-1]
        # torch's fused CPU kernel wants one head size for keys and values; zeros added to the values change nothing.
        if v_dim < qk_dim:
            value = nn.functional.pad(value, (0, qk_dim - v_dim))
        q, k, v = (_Lay.apply(x, *rows) for x, rows in ((query, plan.queries), (key, plan.keys), (value, plan.keys)))
        queries = [(bucket.sequences, bucket.query_length) for bucket in plan.buckets]
        keys = [(bucket.sequences, bucket.key_length) for bucket in plan.buckets]
        attended = [
            nn.functional.scaled_dot_product_attention(
                q_rows,
                k_rows,
                v_rows,
                attn_mask=bucket.mask,
                is_causal=bucket.mask is None,
                scale=self.softmax_scale,
                enable_gqa=key.shape[1] != query.shape[1],
            )
            .transpose(1, 2)
            .flatten(0, 1)
            for bucket, q_rows, k_rows, v_rows in zip(
                plan.buckets, _by_bucket(q, queries), _by_bucket(k, keys), _by_bucket(v, keys), strict=True
            )
        ]
        out = _Lift.apply(torch.cat(attended) if len(attended) > 1 else attended[0], *plan.queries)
        return out[..., :v_dim].reshape(query.shape[0], -1)


def _by_bucket(x: Tensor, shapes: list[tuple[int, int]]) -> list[Tensor]:
    """Padded rows [rows, heads, dim] as one [sequences, heads, length, dim] for each (sequences, length).

    One split, whose backward is one concatenation: that of a slice per bucket fills and adds a gradient of all rows each time.
    """
    parts = x.split([sequences * length for sequences, length in shapes])
    return [part.view(*shape, *x.shape[1:]).transpose(1, 2) for part, shape in zip(parts, shapes, strict=True)]


class _Lay(torch.autograd.Function):
    """Tokens into padded rows. No real token is laid twice and padding gets no gradient, so the backward is a gather as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        ctx.places = places
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad.index_select(0, ctx.places), None, None


class _Lift(torch.autograd.Function):
    """Padded rows back into tokens: the inverse of `_Lay`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        ctx.places, ctx.size = places, rows.shape[0]
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad.new_zeros(ctx.size, *grad.shape[1:]).index_copy_(0, ctx.places, grad), None, None


@dataclass(frozen=True)
class Bucket:
    """Sequences of similar length, attended in one call. Buckets follow each other in the padded rows; lengths count these."""

    sequences: int
    query_length: int
    key_length: int
    mask: Tensor | None  # bool [sequences, 1, query_length, key_length], or None: plainly causal


@dataclass(frozen=True)
class AttentionPlan:
    """Where every token of a packed micro-batch stands in the padded rows.

    `queries` and `keys` are pairs (rows, places): `rows[i]` is the token laid at padded row i (padding repeats the sequence's
    first token), `places[t]` the padded row of token t.
    """

    queries: tuple[Tensor, Tensor]
    keys: tuple[Tensor, Tensor]
    buckets: tuple[Bucket, ...]


def attention_plan(cu_seqlens: Tensor, cp: int, cp_rank: int) -> AttentionPlan:
    """Sort the sequences of a packed micro-batch into length buckets.

    Args:
        cu_seqlens: int [sequences + 1], boundaries over all context-parallel ranks; lengths are multiples of 2 cp when cp > 1.
        cp, cp_rank: context-parallel size and rank; a rank holds chunks r and 2 cp - 1 - r of each sequence.
    """
    if _plan_cache and _plan_cache[0][0] is cu_seqlens and _plan_cache[0][1] == (cp, cp_rank):
        return _plan_cache[0][2]
    lengths, device = np.diff(cu_seqlens.cpu().numpy()).astype(np.int64), cu_seqlens.device
    keys_of = _sequence_tokens(lengths, cp)
    order = [s for s in np.argsort(-lengths, kind="stable") if lengths[s] > 0]
    groups: list[list[int]] = []
    for s in order:
        # A bucket's shortest sequence keeps at least 3/4 of the longest's length: at most a third more rows than tokens.
        if groups and lengths[s] * 4 >= lengths[groups[-1][0]] * 3:
            groups[-1].append(s)
        else:
            groups.append([s])
    buckets: list[Bucket] = []
    query_rows, key_rows = [], []
    for group in groups:
        longest = int(lengths[group[0]])
        keys = [keys_of[s] for s in group]
        local = [np.nonzero(_owner(lengths[s], cp) == cp_rank)[0] for s in group]
        query_length = longest // cp
        mask = None
        if cp > 1:
            positions = np.stack([np.resize(p, query_length) for p in local])
            mask = torch.from_numpy(positions[:, None, :, None] >= np.arange(longest)).to(device)
            queries = [k[p] - cp_rank * int(lengths.sum()) // cp for k, p in zip(keys, local, strict=True)]
        else:
            queries = keys
        query_rows += [_padded(q, query_length) for q in queries]
        key_rows += [_padded(k, longest) for k in keys]
        buckets.append(Bucket(len(group), query_length, longest, mask))
    plan = AttentionPlan(_with_places(query_rows, device), _with_places(key_rows, device), tuple(buckets))
    # Every layer of a micro-batch asks for the same plan: keep the last one, with the tensor it was made from.
    _plan_cache[:] = [(cu_seqlens, (cp, cp_rank), plan)]
    return plan


_plan_cache: list[tuple[Tensor, tuple[int, int], AttentionPlan]] = []


def _owner(length: int, cp: int) -> np.ndarray:
    """Context-parallel rank that holds each position of a sequence (Megatron's zigzag)."""
    chunk = np.arange(length) * 2 * cp // max(length, 1)
    return np.minimum(chunk, 2 * cp - 1 - chunk) if cp > 1 else np.zeros(length, dtype=np.int64)


def _sequence_tokens(lengths: np.ndarray, cp: int) -> list[np.ndarray]:
    """For each sequence, the index of its tokens by position in the tokens gathered over the context-parallel ranks."""
    per_rank = int(lengths.sum()) // cp
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]) // cp
    tokens = []
    for start, length in zip(starts, lengths, strict=True):
        owner = _owner(int(length), cp)
        index = np.empty(length, dtype=np.int64)
        for rank in range(cp):
            held = np.nonzero(owner == rank)[0]
            index[held] = rank * per_rank + start + np.arange(len(held))
        tokens.append(index)
    return tokens


def _padded(row: np.ndarray, length: int) -> np.ndarray:
    return np.concatenate([row, np.full(length - len(row), -1 - row[0])])


def _with_places(rows: list[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    flat = np.concatenate(rows)
    real = np.nonzero(flat >= 0)[0]
    places = np.empty(len(real), dtype=np.int64)
    places[flat[real]] = real
    return torch.from_numpy(np.where(flat >= 0, flat, -1 - flat)).to(device), torch.from_numpy(places).to(device)


class GroupedExperts(SequentialMLP):
    """Megatron-Core's sequential experts with the same parameters and fewer passes over memory.

    Only the matrix products go expert by expert, straight into their rows of one buffer; SwiGLU and the routing probabilities are
    applied to all experts' tokens at once, and nothing is split or concatenated.
    """

    def forward(self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor) -> tuple[Tensor, None]:
        """Outputs [tokens, hidden] of tokens sorted by expert, each scaled by its probability [tokens]."""
        weights = [expert.linear_fc1.weight for expert in self.local_experts] + [expert.linear_fc2.weight for expert in self.local_experts]
        counts = tuple(tokens_per_expert.tolist())
        return _Experts.apply(permuted_local_hidden_states, permuted_probs, counts, *weights), None


class _Experts(torch.autograd.Function):
    """SwiGLU experts: y = p (silu(x G^T) * (x U^T)) D^T, with [G; U] stacked in fc1 and D in fc2."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, probs: Tensor, counts: tuple[int, ...], *weights: Tensor) -> Tensor:
        fc1, fc2 = weights[: len(counts)], weights[len(counts) :]
        hidden = x.new_empty(x.shape[0], fc1[0].shape[0])
        for rows, weight in zip(_rows(counts), fc1, strict=True):
            torch.mm(x[rows], weight.t(), out=hidden[rows])
        gate, up = hidden.chunk(2, dim=-1)
        active = nn.functional.silu(gate).mul_(up).mul_(probs[:, None].to(x.dtype))
        y = torch.empty_like(x)
        for rows, weight in zip(_rows(counts), fc2, strict=True):
            torch.mm(active[rows], weight.t(), out=y[rows])
        ctx.save_for_backward(x, probs, hidden, *weights)
        ctx.counts = counts
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, probs, hidden, *weights = ctx.saved_tensors
        counts = ctx.counts
        fc1, fc2 = weights[: len(counts)], weights[len(counts) :]
        gate, up = hidden.chunk(2, dim=-1)
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        plain = silu * up
        scale = probs[:, None].to(x.dtype)
        grad_active = torch.empty_like(plain)
        for rows, weight in zip(_rows(counts), fc2, strict=True):
            torch.mm(grad[rows], weight, out=grad_active[rows])
        grad_fc2 = [grad[rows].t() @ active for rows, active in zip(_rows(counts), (plain * scale).split(counts), strict=True)]
        grad_probs = torch.linalg.vecdot(grad_active, plain).to(probs.dtype)
        grad_active.mul_(scale)
        grad_hidden = torch.empty_like(hidden)
        grad_gate, grad_up = grad_hidden.chunk(2, dim=-1)
        torch.mul(grad_active, silu, out=grad_up)
        # d silu(g) = sigmoid(g) (1 + g (1 - sigmoid(g))) = sigmoid(g) + silu(g) (1 - sigmoid(g))
        torch.mul(grad_active.mul_(up), torch.addcmul(sigmoid, silu, 1 - sigmoid), out=grad_gate)
        grad_x = torch.empty_like(x)
        for rows, weight in zip(_rows(counts), fc1, strict=True):
            torch.mm(grad_hidden[rows], weight, out=grad_x[rows])
        grad_fc1 = [grad_hidden[rows].t() @ x[rows] for rows in _rows(counts)]
        return grad_x, grad_probs, None, *grad_fc1, *grad_fc2


def _rows(counts: tuple[int, ...]) -> list[slice]:
    ends = list(accumulate(counts, initial=0))
    return [slice(start, end) for start, end in pairwise(ends)]


class CpuKernels(LocalSpecProvider):
    """Megatron-Core's local layer parts with the replacements above."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> type:
        return RmsNorm

    def core_attention(self) -> type:
        return PackedAttention

    def grouped_mlp_modules(self, *args: Any, **kwargs: Any) -> Any:
        found = super().grouped_mlp_modules(*args, **kwargs)
        if isinstance(found, partial):  # 0.19 hands out builders, 0.16 a class and its submodules
            return partial(GroupedExperts, *found.args, **found.keywords)
        return GroupedExperts, found[1]
