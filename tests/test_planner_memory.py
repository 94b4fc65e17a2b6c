"""Bytes: parameters exact for every rank class of published layouts, schedules against a count, terms that move as they should."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from r1mega.config.layout import Layout
from r1mega.config.loading import load_layout
from r1mega.config.training import Optimizer, Train
from r1mega.planner.activations import layer_bytes, tensors, working_bytes
from r1mega.planner.execution import Execution, execution
from r1mega.planner.memory import owned_values, training_memory
from r1mega.planner.parameters import stage_values
from r1mega.planner.schedule import in_flight
from r1mega.weights.architecture import Architecture
from r1mega.weights.canonical import canonical
from r1mega.weights.placement import Spelling
from r1mega.weights.ranks import rank_classes

ROOT = Path(__file__).parents[1]
V3 = Architecture.from_hf(json.loads((ROOT / "configs/deepseek_v3/config.json").read_text()))
LLAMA = Architecture.from_hf(json.loads((ROOT / "configs/distill/llama_8b/config.json").read_text()))
PLAIN = Execution(4096, 4096)


def _exact(arch: Architecture, layout: Layout, ranks: int) -> None:
    planned = stage_values(arch, layout)
    held = set()
    for found in rank_classes(arch, layout, ranks, Spelling()):
        for stage in {layout.coordinates(rank, ranks).pp for rank in found.ranks}:
            assert (planned[stage].trained, planned[stage].buffers) == (found.values, found.buffers)
            held.add(stage)
    assert held == set(range(layout.pp))


@pytest.mark.parametrize("path", sorted((ROOT / "configs/layouts").glob("*.yaml")), ids=lambda path: path.stem)
def test_values_of_every_rank_class_are_those_of_conversion(path: Path) -> None:
    file = load_layout(path)
    _exact(V3, file.layout, file.ranks)


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, pp=2), Layout(tp=4, pp=2, vpp=2)])
@pytest.mark.parametrize("tied", [False, True])
def test_values_of_dense_models_are_those_of_conversion(layout: Layout, tied: bool) -> None:
    _exact(replace(LLAMA, tied=tied), layout, 16)


def test_deepseek_v3_has_as_many_values_as_its_checkpoint() -> None:
    """The embedding and head that its MTP layer repeats are counted with the checkpoint only."""
    alone = sum(value.trained + value.buffers for value in stage_values(V3, Layout()))
    copies = 2 * V3.vocab * V3.hidden
    assert alone + copies == sum(_size(tensor.shape) for tensor in canonical(V3)) == 684_489_845_504


def _size(shape: tuple[int, ...]) -> int:
    total = 1
    for extent in shape:
        total *= extent
    return total


@pytest.mark.parametrize(("pp", "vpp", "micro_batches"), [(4, 1, 8), (4, 1, 2), (4, 4, 64), (8, 4, 8), (2, 3, 2)])
def test_in_flight_is_what_the_schedule_runs(pp: int, vpp: int, micro_batches: int) -> None:
    """Played through: a stage's forward passes before each of its backward passes, by chunk."""
    for stage in range(pp):
        warm = min(2 * (pp - stage - 1) + (vpp - 1) * pp, vpp * micro_batches) if vpp > 1 else min(pp - stage - 1, micro_batches)
        passes = min(warm + 1, vpp * micro_batches)
        assert in_flight(pp, vpp, stage, micro_batches) == [sum(k // pp % vpp == chunk for k in range(passes)) for chunk in range(vpp)]


def test_what_is_recomputed_is_kept_no_more_but_exists_while_the_layer_runs() -> None:
    for arch in (V3, LLAMA):
        whole = layer_bytes(arch, PLAIN, moe=True)
        for module in ("layernorm", "mla_up_proj", "mlp", "moe_act"):
            how = replace(PLAIN, recompute=frozenset({module}))
            assert layer_bytes(arch, how, moe=True) + working_bytes(arch, how, moe=True) == whole
        full = replace(PLAIN, recompute=frozenset({"full"}))
        assert layer_bytes(arch, full, moe=True) == 2 * arch.hidden
        assert working_bytes(arch, full, moe=True) == whole


def test_every_recompute_module_is_one_that_a_tensor_knows() -> None:
    named = set().union(*(saved.by for kind in (False, True) for saved in tensors(V3, PLAIN, moe=kind)))
    assert named == {"layernorm", "mla_up_proj", "mlp", "moe_act"}


def test_the_optimizer_is_split_over_replicas_and_the_host() -> None:
    layout = Layout(pp=4, ep=64)
    whole = training_memory(V3, layout, 256, replace(PLAIN, distributed=False), 8)[1]
    split = training_memory(V3, layout, 256, PLAIN, 8)[1]
    assert whole.gpu.optimizer == 12 * whole.values.trained
    # One replica of each expert, 64 of everything else.
    assert split.gpu.optimizer == 12 * (whole.values.expert + whole.values.dense / 64)
    half = training_memory(V3, layout, 256, replace(PLAIN, offload=0.5), 8)[1]
    assert half.gpu.optimizer == split.gpu.optimizer / 2
    assert half.host["optimizer"] == pytest.approx(split.gpu.optimizer / 2 * 16 / 12)


def test_logits_stand_on_the_last_stage_and_follow_the_chunk() -> None:
    memory = training_memory(V3, Layout(pp=4), 4, replace(PLAIN, logits_chunk=1024), 8)
    assert [bool(rank.gpu.logits) for rank in memory] == [False, False, False, True]
    twice = training_memory(V3, Layout(pp=4), 4, replace(PLAIN, logits_chunk=2048), 8)
    assert twice[-1].gpu.logits - memory[-1].gpu.logits == 1024 * V3.vocab * 18


@pytest.mark.parametrize(
    ("keys", "fp8", "bytes_of_a_value"),
    [  # gradients; master copy, both moments, and the gradients' copy that steps
        ({}, "none", (4, 4 + 8)),
        ({"moments": "bfloat16"}, "none", (4, 2 + 4)),  # the master's other 16 bits are the weight's
        ({"moments": "bfloat16"}, "blockwise", (4, 4 + 4)),
        ({"moments": "bfloat16", "main_params": "float16"}, "blockwise", (4, 2 + 4)),
        ({"main_grads": "bfloat16"}, "none", (2, 2 + 8)),
        ({"main_grads": "bfloat16"}, "blockwise", (2, 4 + 8 + 4)),
    ],
)
def test_dtypes_of_the_optimizer_s_states(keys: dict[str, str], fp8: str, bytes_of_a_value: tuple[int, int]) -> None:
    layout = Layout(pp=8, ep=32)
    how = execution(Train(dtype="bfloat16", fp8=fp8), Optimizer(lr=1e-6, **keys), 4096, 1.0)
    for rank in training_memory(V3, layout, 256, how, 8):
        assert rank.gpu.gradients == bytes_of_a_value[0] * rank.values.trained
        assert rank.gpu.optimizer == bytes_of_a_value[1] * owned_values(layout, 256, rank.values, how)


def test_an_offloaded_optimizer_lives_on_the_host_with_its_gradients() -> None:
    layout, train = Layout(pp=8, ep=32), Train(dtype="bfloat16")
    for share in (0.25, 1.0):
        how = execution(train, Optimizer(lr=1e-6, offload=share), 4096, 1.0)
        for rank in training_memory(V3, layout, 256, how, 8):
            owned = owned_values(layout, 256, rank.values, how)
            assert rank.gpu.optimizer == pytest.approx(12 * (1 - share) * owned)
            assert rank.host == {"optimizer": pytest.approx(16 * share * owned)}


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, pp=4, ep=8, pipeline="Et*15|t*16|t*16|t*14mL")])
def test_fp8_keeps_copies_of_linear_layers_unless_they_pass_with_their_layer(layout: Layout) -> None:
    """Of V3 those are all weights but embedding, head, norms, routers and the MTP layer's join; an MoE layer has 11.3e9 in experts."""
    ranks = layout.tp * layout.pp * max(1, layout.ep // layout.tp)
    plain, fp8 = (training_memory(V3, layout, ranks, replace(PLAIN, fp8=fp8), 4) for fp8 in ("none", "blockwise"))
    full = replace(PLAIN, recompute=frozenset({"full"}))
    passing = training_memory(V3, layout, ranks, replace(full, fp8="blockwise"), 4)
    for a, b, c, d in zip(plain, fp8, passing, training_memory(V3, layout, ranks, full, 4), strict=True):
        assert b.gpu.weights == a.gpu.weights + 2 * a.values.linear
        assert c.gpu.weights == d.gpu.weights
        assert 0 < c.gpu.working - d.gpu.working <= 2 * (11.3e9 / layout.ep + 0.25e9)
    if layout == Layout():
        assert 0.99 < plain[0].values.linear / plain[0].values.trained < 1
