"""Plans cover every element exactly once, and moving along them loses nothing."""

import random
import time

import numpy as np
import pytest
import torch
from test_weights_families import FAMILIES, small
from test_weights_table import LAYOUTS, V3, tiny, tiny_config

from r1mega.config.layout import Layout
from r1mega.weights.architecture import Architecture
from r1mega.weights.boxes import Box
from r1mega.weights.canonical import canonical
from r1mega.weights.moving import assemble, gather_local, load_local, reader_of
from r1mega.weights.placement import Spelling, holders, placement
from r1mega.weights.plan import export_plan, owned_pieces, transfer_plan
from r1mega.weights.table import Storage


def random_tensors(arch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {t.name: torch.randn(t.shape, generator=generator) for t in canonical(arch) if t.copy_of is None}


def loaded(arch, layout, world, tensors, spelling=None):
    """Every rank's parameters, filled from canonical tensors."""
    ranks = []
    for rank in range(world):
        placed = placement(arch, layout, world, rank, spelling or Spelling())
        params = {(p.chunk, p.name): torch.full(p.shape, torch.nan) for p in placed}
        load_local(params, placed, reader_of(tensors))
        ranks.append(params)
    return ranks


MODELS = [tiny_config(), *(small(FAMILIES[name]) for name in ("deepseek_v2", "qwen2 tied", "llama"))]


def random_layout(rng, arch):
    """A layout that fits the model, over at most 16 ranks, and its world size."""
    while True:
        layout = Layout(
            tp=rng.choice([1, 2, 4]), cp=rng.choice([1, 1, 2]), pp=(pp := rng.choice([1, 2])), vpp=rng.choice([1, 2]) if pp > 1 else 1,
            etp=rng.choice([1, 2, 4]) if arch.moe else 1, ep=rng.choice([1, 2, 4, 8]) if arch.moe else 1,
        )  # fmt: skip
        world = rng.choice([1, 2, 4, 8, 16])
        fits = pp * layout.vpp <= arch.layers and not (arch.kv_heads % layout.tp or arch.heads % layout.tp)
        if fits and world % layout.model_ranks == 0 and world % (layout.etp * layout.ep * layout.pp) == 0:
            return layout, world


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("layout", "world"), LAYOUTS)
def test_export_gives_back_what_was_loaded(layout, world, dtype):
    arch = tiny()
    tensors = random_tensors(arch)
    ranks = loaded(arch, layout, world, tensors)
    plan = export_plan(arch, layout, world, Spelling())
    buffers = torch.stack([gather_local(params, plan, rank, dtype) for rank, params in enumerate(ranks)])
    exported = assemble(buffers, plan, dtype)
    assert list(exported) == list(tensors)
    for tensor in canonical(arch):
        if tensor.copy_of is None:
            expected = tensors[tensor.name] if tensor.storage is Storage.FLOAT32 else tensors[tensor.name].to(dtype)
            assert exported[tensor.name].dtype == expected.dtype
            assert torch.equal(exported[tensor.name], expected), tensor.name


def test_padding_is_zero():
    arch = tiny(vocab_size=5)
    tensors = random_tensors(arch)
    ranks = loaded(arch, Layout(tp=4), 4, tensors)
    assert ranks[3][0, "output_layer.weight"].shape == (2, 24)
    assert not ranks[3][0, "output_layer.weight"].any()
    assert not ranks[2][0, "embedding.word_embeddings.weight"][1].any()


@pytest.mark.parametrize("seed", range(16))
def test_owners_cover_every_element_once(seed):
    arch = Architecture.from_hf(MODELS[seed % len(MODELS)])
    layout, world = random_layout(random.Random(seed), arch)
    owned = owned_pieces(holders(arch, layout, world, Spelling()), world)
    covered = {t.name: np.zeros(t.shape, int) for t in canonical(arch) if t.copy_of is None}
    placed = [{(p.chunk, p.name): p for p in placement(arch, layout, world, rank, Spelling())} for rank in range(world)]
    for rank, pieces in enumerate(owned):
        for piece in pieces:
            covered[piece.tensor][piece.source.slices] += 1
            holder = placed[rank][piece.chunk, piece.param]
            whole = next(p for p in holder.pieces if p.tensor == piece.tensor and p.source.intersect(piece.source))
            assert piece.source.within(whole.source) == piece.box.within(whole.box)
    assert all((count == 1).all() for count in covered.values())


def test_owners_are_balanced_where_replicas_allow():
    layout, world = Layout(ep=2), 4
    load = [sum(p.source.size for p in pieces) for pieces in owned_pieces(holders(tiny(), layout, world, Spelling()), world)]
    assert max(load) - min(load) <= 0.01 * sum(load)


@pytest.mark.parametrize("seed", range(16))
def test_transfers_between_random_layouts(seed):
    """Moving along a transfer plan gives every rank of the target layout what loading from files would."""
    rng, arch, te = random.Random(seed), Architecture.from_hf(MODELS[seed % len(MODELS)]), Spelling("te", "mtp_model_layer")
    (source, source_world), (target, target_world) = random_layout(rng, arch), random_layout(rng, arch)
    tensors = random_tensors(arch)
    sent = loaded(arch, source, source_world, tensors)
    wanted = loaded(arch, target, target_world, tensors, te)
    plan = transfer_plan(holders(arch, source, source_world, Spelling()), holders(arch, target, target_world, te))
    by_source = {rank: list(plan.of(rank)) for rank in range(source_world)}
    for rank, expected in enumerate(wanted):
        received = {key: torch.zeros_like(value) for key, value in expected.items()}
        written = {key: torch.zeros(value.shape, dtype=torch.int) for key, value in expected.items()}
        for transfer in plan.to(rank):
            assert transfer in by_source[transfer.source_rank]
            key = transfer.received.chunk, transfer.received.param
            part = sent[transfer.source_rank][transfer.sent.chunk, transfer.sent.param][transfer.sent.box.slices]
            received[key][transfer.received.box.slices] = part
            written[key][transfer.received.box.slices] += 1
        for key, value in expected.items():
            assert torch.equal(received[key], value), key
            assert written[key].max() == 1


def test_transfers_stay_at_home_when_they_can():
    groups = holders(tiny(), Layout(ep=2), 4, Spelling())
    plan = transfer_plan(groups, groups)
    assert all(transfer.source_rank == rank for rank in range(4) for transfer in plan.to(rank))


def test_plan_of_the_671b_model_on_1024_ranks():
    """From a training layout to another; each rank gets exactly the elements it is placed with."""
    started = time.process_time()
    source = holders(V3, Layout(pp=16, ep=64), 1024, Spelling())
    target = holders(V3, Layout(tp=8, pp=4, ep=32), 1024, Spelling("te"))
    plan = transfer_plan(source, target)
    assert time.process_time() - started < 30
    for rank in (0, 555, 1023):
        wanted = sum(piece.source.size for group in target if rank in group.ranks for p in group.params for piece in p.pieces)
        assert sum(transfer.received.source.size for transfer in plan.to(rank)) == wanted


def test_boxes():
    box = Box((2, 0), (6, 5))
    assert box.shape == (4, 5) and box.size == 20
    assert box.intersect(Box((5, 1), (9, 3))) == Box((5, 1), (6, 3))
    assert box.intersect(Box((6, 0), (9, 5))) is None
    assert Box((3, 1), (4, 2)).within(box) == Box((1, 1), (2, 2))
