"""Packing: every token exactly once, aligned, and back; plans that fit and balance."""

import math
import random
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r1mega.data.packing import PackedBatch, TokenSequence, context_parallel_index, pack, plan_chunks, round_up, unpack
from r1mega.errors import UserError

QUICK = settings(max_examples=60)


def make(lengths: list[int]) -> list[TokenSequence]:
    """Sequences whose tokens are 1, 2, 3, ... over all of them, so that a token says where it comes from; fractional weights and extras."""
    sequences, first = [], 1
    for n in lengths:
        tokens = torch.arange(first, first + n)
        sequences.append(TokenSequence(tokens, tokens / 1024, {"advantages": -tokens.float(), "old_logprobs": tokens.float() / 8}))
        first += n
    return sequences


def flops(length: int) -> float:
    return 100.0 * length + length**2


plans = st.tuples(
    st.lists(st.integers(1, 40), max_size=40),
    st.sampled_from([40, 64, 128]),
    st.integers(1, 4),
    st.sampled_from([1, 2, 4, 8]),
)


@QUICK
@given(plans)
def test_plan_covers_fits_and_is_even(case: tuple[list[int], int, int, int]) -> None:
    lengths, capacity, ranks, pad_to = case
    plan = plan_chunks(lengths, capacity, ranks, pad_to, flops)
    assert len(plan) == ranks and len({len(chunks) for chunks in plan}) == 1 and len(plan[0]) >= 1
    assert sorted(i for chunks in plan for chunk in chunks for i in chunk) == list(range(len(lengths)))
    content = [sum(round_up(lengths[i], pad_to) for i in chunk) for chunks in plan for chunk in chunks]
    assert max(content) <= capacity
    # Best-fit decreasing leaves at most one chunk half empty, so it needs at most 2 x total / capacity + 1, rounded up to the ranks.
    assert len(content) <= round_up(math.floor(2 * sum(content) / capacity) + 1, ranks)
    assert plan == plan_chunks(lengths, capacity, ranks, pad_to, flops)


def test_plan_by_hand() -> None:
    assert plan_chunks([5, 4, 3, 2], capacity=8, ranks=1, pad_to=1, cost=flops) == [[[0, 3], [1, 2]]]
    assert plan_chunks([5, 4, 3, 2], capacity=8, ranks=2, pad_to=1, cost=flops) == [[[0, 3]], [[1, 2]]]
    assert plan_chunks([5], capacity=8, ranks=2, pad_to=1, cost=flops) == [[[0]], [[]]]
    assert plan_chunks([5, 4, 3], capacity=12, ranks=1, pad_to=1, cost=flops, rounds_of=2) == [[[1, 2], [0]]]
    assert plan_chunks([], capacity=8, ranks=2, pad_to=1, cost=flops) == [[[]], [[]]]
    # 18 tokens would fit into two chunks, three sequences of 6 do not; the two ranks then take two chunks each.
    assert plan_chunks([6, 6, 6], capacity=10, ranks=2, pad_to=1, cost=flops) == [[[0], [2]], [[1], []]]
    # The second round gives the idler rank the costlier chunk: 9 + 4 and 8 + 5.
    assert plan_chunks([9, 8, 5, 4], capacity=9, ranks=2, pad_to=1, cost=float) == [[[0], [3]], [[1], [2]]]


def test_a_full_bin_is_found_where_balancing_alone_fails() -> None:
    """Longest-processing-time-first spreads 5, 5 over two chunks and strands a 4; best fit packs (5, 5) and (4, 3, 3)."""
    plan = plan_chunks([5, 5, 4, 3, 3], capacity=10, ranks=1, pad_to=1, cost=flops)
    assert sorted(sum([5, 5, 4, 3, 3][i] for i in chunk) for chunk in plan[0]) == [10, 10]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_work_is_balanced_on_long_tails(seed: int, ranks: int) -> None:
    rng = random.Random(seed)
    lengths = [min(4096, 16 + int(rng.lognormvariate(math.log(250), 1.2))) for _ in range(512)]
    plan = plan_chunks(lengths, capacity=8192, ranks=ranks, pad_to=1, cost=flops)
    work = [[sum(flops(lengths[i]) for i in chunk) for chunk in chunks] for chunks in plan]
    totals = [sum(w) for w in work]
    assert max(totals) <= 1.3 * sum(totals) / ranks
    for together in zip(*work, strict=True):
        assert max(together) <= max(1.3 * sum(together) / ranks, flops(max(lengths)))  # one sequence cannot be divided
    chunks = sum(map(len, plan))
    assert chunks == round_up(-(-sum(lengths) // 8192), ranks)


def test_a_sequence_longer_than_a_chunk_is_named() -> None:
    with pytest.raises(UserError, match="65 tokens does not fit into a chunk of 64"):
        plan_chunks([3, 65], capacity=64, ranks=1, pad_to=1, cost=flops)
    with pytest.raises(UserError, match=r"63 tokens \(padded to 64\) does not fit into a chunk of 63"):
        plan_chunks([3, 63], capacity=63, ranks=1, pad_to=4, cost=flops)


def test_pack_by_hand() -> None:
    a = TokenSequence(torch.tensor([5, 6, 7]), torch.tensor([9.0, 0.0, 0.5]), {"advantages": torch.tensor([9.0, 0.0, 2.0])})
    b = TokenSequence(torch.tensor([8, 9]), torch.tensor([9.0, 0.25]), {"advantages": torch.tensor([9.0, -1.0])})
    batch = pack([a, b], [1, 0], pad_to=2, align=8)
    assert batch.tokens.tolist() == [8, 9, 5, 6, 7, 0, 0, 0]
    assert batch.position_ids.tolist() == [0, 1, 0, 1, 2, 3, 0, 1]
    assert batch.labels.tolist() == [9, 0, 6, 7, 0, 0, 0, 0]
    assert batch.loss_weights.tolist() == [0.25, 0, 0, 0.5, 0, 0, 0, 0]
    assert batch.mtp_labels.tolist() == [0, 0, 7, 0, 0, 0, 0, 0]
    assert batch.mtp_weights.tolist() == [0, 0, 0.5, 0, 0, 0, 0, 0]
    assert batch.extras["advantages"].tolist() == [-1, 0, 0, 2, 0, 0, 0, 0]
    assert batch.cu_seqlens.tolist() == [0, 2, 6, 8] and batch.cu_seqlens.dtype == torch.int32
    assert batch.lengths == (2, 3, 0) and batch.sequences == (1, 0, -1)


def test_no_tail_segment_when_the_content_is_aligned() -> None:
    batch = pack(make([3, 5]), [0, 1], pad_to=1, align=4)
    assert batch.cu_seqlens.tolist() == [0, 3, 8] and batch.sequences == (0, 1)


def test_filler_chunk_has_no_weight_and_the_same_extras() -> None:
    batch = pack(make([3]), [], pad_to=4, align=8)
    assert batch.tokens.tolist() == [0] * 8 and batch.cu_seqlens.tolist() == [0, 8] and batch.sequences == (-1,)
    assert batch.loss_weights.sum() == 0 and batch.mtp_weights.sum() == 0
    assert {name: x.tolist() for name, x in batch.extras.items()} == {"advantages": [0] * 8, "old_logprobs": [0] * 8}


def check_alignment(batch: PackedBatch, sequences: list[TokenSequence]) -> None:
    """Each label, weight and extra says of one position what the sequence says of the token one (or two) further."""
    segments = zip(batch.cu_seqlens.tolist(), batch.cu_seqlens.diff().tolist(), batch.lengths, batch.sequences, strict=False)
    for start, padded, n, index in segments:
        tokens = sequences[index].tokens.tolist() if n else []
        for t in range(padded):
            here = start + t
            assert batch.position_ids[here] == t
            assert batch.tokens[here] == (tokens[t] if t < n else 0)
            token, second = (tokens[t + 1] if t + 1 < n else 0), (tokens[t + 2] if t + 2 < n else 0)
            assert batch.labels[here] == token and batch.mtp_labels[here] == second
            assert batch.loss_weights[here] == token / 1024 and batch.mtp_weights[here] == second / 1024
            if sequences:
                assert batch.extras["advantages"][here] == -token and batch.extras["old_logprobs"][here] == token / 8


@QUICK
@given(plans, st.sampled_from([1, 2, 3]))
def test_pack_and_unpack(case: tuple[list[int], int, int, int], multiple: int) -> None:
    lengths, capacity, ranks, pad_to = case
    sequences, align = make(lengths), pad_to * multiple
    plan = plan_chunks(lengths, capacity, ranks, pad_to, flops)
    batches = [pack(sequences, chunk, pad_to, align) for chunks in plan for chunk in chunks]
    for batch in batches:
        content = sum(round_up(n, pad_to) for n in batch.lengths)
        assert len(batch.tokens) == max(align, round_up(content, align))
        assert len(batch.cu_seqlens) - 1 == len(batch.lengths) == len(batch.sequences)
        assert (batch.cu_seqlens.diff() % pad_to == 0).all() and int(batch.cu_seqlens[-1]) == len(batch.tokens)
        check_alignment(batch, sequences)
    assert sorted(t for batch in batches for t in batch.tokens.tolist() if t) == list(range(1, sum(lengths) + 1))
    total = sum(float(s.weights[1:].sum()) for s in sequences)
    assert sum(float(batch.loss_weights.sum()) for batch in batches) == pytest.approx(total, rel=1e-6)
    for name in ("advantages", "old_logprobs") if lengths else ():
        back = unpack([batch.extras[name] for batch in batches], batches)
        assert list(back) == list(range(len(lengths)))
        for index, values in back.items():
            assert values[0] == 0 and torch.equal(values[1:], sequences[index].extras[name][1:])


def test_unpack_of_one_rank_names_its_sequences() -> None:
    sequences = make([3, 4, 2])
    batch = pack(sequences, [2, 0], pad_to=1, align=8)
    back = unpack([batch.labels], [batch])
    assert {i: v.tolist() for i, v in back.items()} == {0: [0, 2, 3], 2: [0, 9]}


def test_align_must_hold_whole_slices() -> None:
    with pytest.raises(ValueError, match="align=6 is not a multiple of pad_to=4"):
        pack(make([3]), [0], pad_to=4, align=6)


@QUICK
@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.sampled_from([1, 2, 3, 4]))
def test_context_parallel_ranks_partition_the_chunk(units: list[int], cp: int) -> None:
    cu_seqlens = torch.tensor([0, *units]).cumsum(0).int() * 2 * cp
    parts = [context_parallel_index(cu_seqlens, cp, rank) for rank in range(cp)]
    assert {len(part) for part in parts} == {int(cu_seqlens[-1]) // cp}
    assert torch.cat(parts).sort().values.tolist() == list(range(int(cu_seqlens[-1])))
    # A causal token at position p attends to p + 1 tokens: all ranks attend to the same number.
    position = torch.cat([torch.arange(u * 2 * cp) for u in units])
    assert len({int((position[part] + 1).sum()) for part in parts}) == 1


def test_context_parallel_order_is_megatrons() -> None:
    cu_seqlens = torch.tensor([0, 8, 12], dtype=torch.int32)
    assert context_parallel_index(cu_seqlens, 2, 0).tolist() == [0, 1, 6, 7, 8, 11]
    assert context_parallel_index(cu_seqlens, 2, 1).tolist() == [2, 3, 4, 5, 9, 10]
    with pytest.raises(ValueError, match="2 x cp = 4"):
        context_parallel_index(torch.tensor([0, 6]), 2, 0)


def test_packing_a_minibatch_takes_milliseconds() -> None:
    """256 sequences of 30 tokens, every update. CPU time, so that a busy machine does not count."""
    sequences = make([30] * 256)
    fastest = math.inf
    for _ in range(5):
        start = time.process_time()
        batch = pack(sequences, range(256), pad_to=1, align=64)
        fastest = min(fastest, time.process_time() - start)
    assert len(batch.tokens) == 7680 and fastest < 0.01
