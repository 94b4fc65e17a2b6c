"""Weight sync on tiny models, all ranks simulated in one process: what arrives, and that every byte was predicted."""

import random
from collections import Counter
from math import prod

import pytest
import torch
from test_weights_engine import sharded
from test_weights_families import FAMILIES, small
from test_weights_plan import MODELS, loaded, random_layout, random_tensors
from test_weights_table import LAYOUTS, V3, tiny, tiny_config

from r1mega.config.engine_layout import EngineLayout
from r1mega.config.layout import Layout
from r1mega.errors import UserError
from r1mega.weights import fp8
from r1mega.weights.architecture import Architecture
from r1mega.weights.canonical import canonical
from r1mega.weights.direct import direct_plan
from r1mega.weights.engine import engine_params
from r1mega.weights.placement import Spelling
from r1mega.weights.safetensors_in import specs_of
from r1mega.weights.shipping import Assembly, message, tensors, torch_dtype
from r1mega.weights.sync import full_plan
from r1mega.weights.table import Storage
from r1mega.weights.wire import Wire

# Sizes around the blocks of 128: with tp 2, kv_b_proj is cut at row 448 of 896 and q_b_proj at 256 of 512.
BLOCKS = tiny_config(
    vocab_size=200, hidden_size=256, num_hidden_layers=3, intermediate_size=512, q_lora_rank=128, kv_lora_rank=128, qk_nope_head_dim=96,
    qk_rope_head_dim=32, v_head_dim=128, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=256,
    first_k_dense_replace=1, num_nextn_predict_layers=1,
)  # fmt: skip


def delivered(bucket, params, wire, links):
    """A bucket's tensors, with the bytes of every message counted."""
    assembly = Assembly(bucket, wire)
    for rank in bucket.messages:
        if rank == bucket.sender:
            assembly.take_own(params[rank], rank)
            continue
        sent = message(params[rank], bucket, rank, wire)
        assert sent.dtype == torch.uint8 and sent.numel() == bucket.message_bytes(rank)
        links[rank, bucket.sender] += sent.numel()
        assembly.take(rank, sent)
    flat = assembly.finish()
    assert flat.numel() == bucket.nbytes == sum(tensor.nbytes for _, tensor in tensors(bucket, flat))
    return tensors(bucket, flat)


def encoded(tensor, values, wire):
    """What must arrive of a canonical tensor."""
    if not wire.quantises(tensor.storage):
        return {tensor.name: values.to(torch_dtype(wire.dtype_of(tensor.storage)))}
    codes, scales = fp8.quantise(values.to(torch_dtype(wire.dtype)))
    return {tensor.name: codes, tensor.name + "_scale_inv": scales}


def expected(arch, values, wire, mtp=False):
    last = f"model.layers.{arch.layers}."
    wanted = [t for t in canonical(arch) if t.copy_of is None and (mtp or not t.name.startswith(last))]
    return {name: value for t in wanted for name, value in encoded(t, values[t.name], wire).items()}


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        assert torch.equal(found[name].contiguous().view(torch.uint8), value.contiguous().view(torch.uint8)), name


def full_sync(arch, layout, world, wire, limit, **options):
    """Run a full plan; checks every tensor, every link and every rank's memory."""
    values = random_tensors(arch)
    params = loaded(arch, layout, world, values)
    plan = full_plan(arch, layout, world, Spelling(), wire, limit, **options)
    found, links = {}, Counter()
    for bucket in plan.buckets:
        for name, value in delivered(bucket, params, wire, links):
            assert name not in found
            found[name] = value
    same(found, expected(arch, values, wire, options.get("mtp", False)))
    assert links == plan.gathered()
    assert sum(plan.handed_over().values()) == plan.nbytes == sum(value.nbytes for value in found.values())
    return plan


@pytest.mark.parametrize("wire", [Wire("float32"), Wire("bfloat16")], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("layout", "world"), LAYOUTS)
def test_full_tensors_arrive_once(layout, world, wire):
    full_sync(tiny(), layout, world, wire, 20_000, mtp=True)


@pytest.mark.parametrize("seed", range(8))
def test_full_tensors_of_every_family(seed):
    arch = Architecture.from_hf(MODELS[seed % len(MODELS)])
    full_sync(arch, *random_layout(random.Random(seed), arch), Wire("bfloat16"), random.Random(seed).choice([1, 5_000, 10**9]))


@pytest.mark.parametrize(
    ("layout", "world"),
    [(Layout(), 1), (Layout(ep=2), 2), (Layout(tp=2), 2), (Layout(tp=2, etp=2, pp=2), 4), (Layout(tp=4, ep=2, etp=2), 4)],
)
def test_block_fp8_is_that_of_the_whole_tensor(layout, world):
    """Whoever quantises, codes and scales are those of the converter's quantiser."""
    plan = full_sync(Architecture.from_hf(BLOCKS), layout, world, Wire("bfloat16", block_fp8=True), 200_000)
    by_sender = {entry.name.split(".", 3)[3] for bucket in plan.buckets for entry in bucket.entries if entry.quantised}
    cut = {1: set(), 2: {"self_attn.kv_b_proj.weight"}, 4: {"self_attn.kv_b_proj.weight", "mlp.shared_experts.gate_proj.weight",
           "mlp.shared_experts.up_proj.weight", "mlp.shared_experts.down_proj.weight"}}[layout.tp]  # fmt: skip
    assert by_sender == cut


def test_buckets_are_bounded_and_whole():
    arch, limit = tiny(), 8_000
    plan = full_plan(arch, Layout(tp=2, pp=2, ep=2), 8, Spelling(), Wire("bfloat16"), limit)
    for bucket in plan.buckets:
        names = [entry.name for entry in bucket.entries]
        # A bucket over the limit holds one tensor, or the two that must come together.
        assert bucket.nbytes <= limit or len(names) == 1 or {name.split(".")[-2] for name in names} == {"q_a_proj", "kv_a_proj_with_mqa"}
        assert [entry.offset for entry in bucket.entries] == [sum(e.nbytes for e in bucket.entries[:i]) for i in range(len(names))]
        assert all(entry.offset % torch_dtype(entry.dtype).itemsize == 0 for entry in bucket.entries)
        # SGLang's loader forgets q_a_proj when kv_a_proj_with_mqa comes in another call.
        for name in names:
            if "q_a_proj" in name:
                assert name.replace("q_a_proj", "kv_a_proj_with_mqa") in names
    assert all(first.sender != second.sender for first, second in zip(plan.buckets, plan.buckets[1:], strict=False))


def test_nobody_holds_more_than_a_bucket_and_a_message():
    plan = full_plan(tiny(), Layout(tp=2, pp=2, ep=2), 8, Spelling(), Wire("bfloat16"), 8_000)
    largest = max(bucket.nbytes for bucket in plan.buckets)
    assert 0 < max(map(plan.held, range(8))) <= 2 * largest < plan.nbytes / 4


def test_senders_can_be_chosen():
    plan = full_sync(tiny(), Layout(pp=2, ep=2), 4, Wire("bfloat16"), 8_000, senders=[1, 2])
    assert {bucket.sender for bucket in plan.buckets} == {1, 2}
    alone = full_sync(tiny(), Layout(pp=2, ep=2), 4, Wire("bfloat16"), 8_000, senders=[3])
    assert {bucket.sender for bucket in alone.buckets} == {3}
    with pytest.raises(UserError, match=r"senders \[4\] are not among the 4 ranks of the trainer"):
        full_plan(tiny(), Layout(pp=2, ep=2), 4, Spelling(), Wire(), 8_000, senders=[4])


def test_experts_that_one_rank_holds_are_gathered_from_nobody():
    plan = full_plan(tiny(), Layout(pp=2, ep=4), 8, Spelling(), Wire("bfloat16"), 8_000)
    assert plan.gathered() == Counter()


def direct_sync(arch, layout, world, engine, wire, limit, first, mtp=False):
    """Run a direct plan; checks every parameter of every engine rank, and every link."""
    values = random_tensors(arch)
    params = loaded(arch, layout, world, values)
    plan = direct_plan(arch, layout, world, Spelling(), engine, wire, first, mtp)
    links = Counter()
    for rank in range(first, first + engine.ranks):
        wanted = sharded(arch, engine, (rank - first) % engine.tp, values, wire, mtp)
        for draft in (False, True) if mtp else (False,):
            found = {}
            buckets = list(plan.buckets(rank, limit, draft))
            for bucket in buckets:
                assert bucket.sender == rank
                assert bucket.nbytes <= limit or len({entry.name.removesuffix("_scale_inv") for entry in bucket.entries}) == 1
                # A trainer rank that works out its own messages only finds the same ones.
                found |= dict(delivered(bucket, dict(enumerate(params)), wire, links))
            same(found, wanted[draft])
            for source in {source for bucket in buckets for source in bucket.messages}:
                only = list(plan.buckets(rank, limit, draft, only=source))
                assert [b.messages.get(source) for b in only] == [b.messages.get(source) for b in buckets]
    assert links == plan.links()
    return plan


ENGINES = [
    EngineLayout(), EngineLayout(tp=2), EngineLayout(servers=2, tp=2, ep=2), EngineLayout(tp=4, ep=2, attn_dp=2),
    EngineLayout(tp=4, attn_dp=4, ep=4, dense_tp="whole", shared_experts="whole", dp_lm_head=True),
    EngineLayout(tp=2, shared_experts="fused"), EngineLayout(tp=4, ep=4, attn_dp=2, shared_experts="fused"),
    EngineLayout(tp=2, device="cpu"), EngineLayout(tp=4, ep=2, attn_dp=2, device="cpu"),
]  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES, ids=str)
@pytest.mark.parametrize(("layout", "world"), [(Layout(), 1), (Layout(tp=2, pp=2, ep=2), 4), (Layout(tp=2, etp=2), 2), (Layout(ep=4), 8)])
def test_engine_ranks_get_their_own_shards(layout, world, engine):
    direct_sync(tiny(), layout, world, engine, Wire("bfloat16"), 20_000, first=world)


@pytest.mark.parametrize("seed", range(8))
def test_own_shards_of_every_family(seed):
    rng = random.Random(seed)
    arch = Architecture.from_hf(MODELS[seed % len(MODELS)])
    engine = EngineLayout(servers=rng.choice([1, 2]), tp=rng.choice([1, 2, 4]))
    direct_sync(arch, *random_layout(rng, arch), engine, Wire("float32"), rng.choice([1, 5_000, 10**9]), first=0)


def test_key_value_heads_are_repeated():
    arch = Architecture.from_hf(small(FAMILIES["llama"]))
    assert arch.kv_heads == 4
    direct_sync(arch, Layout(), 1, EngineLayout(tp=8), Wire("bfloat16"), 10**9, first=1)


def test_a_drafting_engine_gets_two_models():
    direct_sync(tiny(), Layout(pp=2, ep=2), 4, EngineLayout(tp=2), Wire("bfloat16"), 20_000, first=4, mtp=True)


@pytest.mark.parametrize(("layout", "world"), [(Layout(), 1), (Layout(ep=2), 2), (Layout(tp=2, etp=2), 2), (Layout(tp=4, ep=4), 4)])
@pytest.mark.parametrize("engine", [EngineLayout(), EngineLayout(tp=2, ep=2, attn_dp=2)], ids=str)
def test_own_shards_in_block_fp8(layout, world, engine):
    direct_sync(Architecture.from_hf(BLOCKS), layout, world, engine, Wire("bfloat16", block_fp8=True), 300_000, first=0)


def test_an_engine_that_cuts_blocks_is_refused():
    arch = Architecture.from_hf(BLOCKS)
    for engine, name in [(EngineLayout(tp=2), "kv_b_proj"), (EngineLayout(tp=4, attn_dp=4), "experts.w13_weight")]:
        with pytest.raises(
            UserError, match=rf"rollout.sglang.layout: model.layers.\d.*{name}.* cannot be served in block FP8: .* not whole blocks"
        ):
            direct_plan(arch, Layout(), 1, Spelling(), engine, Wire(block_fp8=True))


def test_llama_has_no_block_fp8():
    arch = Architecture.from_hf(small(FAMILIES["llama"]))
    for plan in (
        lambda wire: full_plan(arch, Layout(), 1, Spelling(), wire, 1),
        lambda wire: direct_plan(arch, Layout(), 1, Spelling(), EngineLayout(), wire),
    ):
        with pytest.raises(UserError, match="loses the scales of block FP8 for llama"):
            plan(Wire(block_fp8=True))


def test_what_is_sent_takes_the_bytes_of_a_checkpoint():
    """The wire's tensors are those that the converter stores: names, shapes and bytes."""
    names = {"float32": "F32", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3"}
    for arch in (V3, tiny()):
        tensors_ = canonical(arch)
        for block_fp8 in (False, True):
            sent = [(one.name, one.shape, names[one.dtype], one.nbytes) for t in tensors_ for one in Wire("bfloat16", block_fp8).of(t)]
            assert sent == [(s.name, s.shape, s.dtype, s.nbytes) for s in specs_of(tensors_, torch.bfloat16, block_fp8)]


def test_nothing_travels_that_is_there_already():
    """One rank each on one GPU: all stays; with the engine elsewhere, all of it travels."""
    arch, wire = tiny(), Wire("bfloat16")
    assert not direct_plan(arch, Layout(), 2, Spelling(), EngineLayout(servers=2), wire, first=0).links()
    away = direct_plan(arch, Layout(), 2, Spelling(), EngineLayout(servers=2), wire, first=2).links()
    shapes = {p.name: (p.tensor_shape, 4 if p.storage is Storage.FLOAT32 else 2) for p in engine_params(arch, EngineLayout(), 0)}
    real = sum(prod(shape) * size for shape, size in shapes.values()) - 2 * 2 * (64 - 61) * arch.hidden
    assert sum(away.values()) == 2 * real and sorted(target for _, target in away) == [2, 3]


def test_real_expert_shards_in_block_fp8():
    """Rank 5 of 16 in a server of the 671B model: its parameters' bytes, codes and scales."""
    engine, wire = EngineLayout(servers=2, tp=16), Wire(block_fp8=True)
    plan = direct_plan(V3, Layout(pp=16, ep=16), 256, Spelling(), engine, wire, first=256)
    buckets = list(plan.buckets(256 + 5, 2**30))
    entries = {entry.name: entry for bucket in buckets for entry in bucket.entries}
    assert entries["model.layers.3.mlp.experts.w13_weight"].shape == (256, 2 * 2048 // 16, 7168)
    assert entries["model.layers.3.mlp.experts.w13_weight_scale_inv"].shape == (256, 2, 56)
    assert entries["model.layers.0.self_attn.fused_qkv_a_proj_with_mqa.weight_scale_inv"].shape == (17, 56)
    assert not any(entry.quantised for entry in entries.values())
