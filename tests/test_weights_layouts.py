"""The shipped layouts of the 671B model: as published, and every rank class against Megatron's own GPTModel."""

from dataclasses import replace
from functools import cache
from math import prod
from pathlib import Path

import megatron_shapes
import pytest
from test_weights_table import LAYOUTS, V3, V3_CONFIG, tiny

from r1mega.config.layout import Layout
from r1mega.config.loading import load_layout
from r1mega.errors import UserError
from r1mega.report.audit import spans
from r1mega.weights.pipeline import stages
from r1mega.weights.placement import Spelling, placement
from r1mega.weights.ranks import rank_classes

FILES = {path.stem: path for path in sorted((Path(__file__).parent.parent / "configs/layouts").glob("*.yaml"))}
SHIPPED = {name: load_layout(path) for name, path in FILES.items()}

# As published: ranks, tp, pp, vpp, cp, ep, dp, expert dp, layers of each stage.
PUBLISHED = {
    "slime_128": (128, 8, 4, 1, 4, 32, 1, 1, [16, 16, 16, 13]),
    "miles_128": (128, 4, 4, 1, 4, 16, 2, 2, [16, 16, 16, 13]),
    "verl_96": (96, 8, 12, 1, 1, 8, 1, 1, [5] * 11 + [6]),
    "verl_128": (128, 8, 16, 1, 1, 8, 1, 1, [4] * 15 + [1]),
    "verl_256": (256, 8, 16, 1, 1, 8, 2, 2, [4] * 15 + [1]),
    "verl_512": (512, 1, 16, 1, 1, 32, 32, 1, [4] * 15 + [1]),
    "nemo_rl_256": (256, 1, 16, 1, 1, 16, 16, 1, [3] + [4] * 14 + [2]),
    "nemo_rl_256_16k": (256, 8, 8, 1, 4, 32, 1, 1, [7] + [8] * 6 + [6]),
    "bridge_1024": (1024, 2, 8, 4, 1, 64, 64, 2, [1] + [2] * 30 + [0]),
    "bridge_1024_base": (1024, 2, 16, 1, 1, 64, 32, 1, [4] * 15 + [1]),
    "modelzoo_256": (256, 1, 8, 4, 1, 32, 32, 1, [2] * 23 + [1] + [2] * 7 + [0]),
}


@cache
def classes(name):
    file = SHIPPED[name]
    return rank_classes(V3, file.layout, file.ranks, Spelling())


@pytest.mark.parametrize("name", FILES)
def test_a_shipped_layout_is_the_published_one(name):
    file, layout = SHIPPED[name], SHIPPED[name].layout
    assert file.model == "deepseek-ai/DeepSeek-V3" and file.source and FILES[name].read_text().startswith("# ")
    by_chunk = sorted((stage for chunks in stages(V3, layout) for stage in chunks), key=lambda stage: (stage.chunk, stage.pp))
    split = [len(stage.layers) for stage in by_chunk]
    sizes = (file.ranks, layout.tp, layout.pp, layout.vpp, layout.cp, layout.ep, layout.dp(file.ranks), layout.edp(file.ranks), split)
    assert sizes == PUBLISHED[name] and layout.etp == 1
    assert list(by_chunk[-1].mtp) == [0] and by_chunk[-1].loss


@pytest.mark.parametrize(("layout", "world"), LAYOUTS)
@pytest.mark.parametrize("spec", ["local", "te"])
def test_rank_classes_are_those_of_every_rank_one_by_one(layout, world, spec):
    arch, spelling = tiny(), Spelling(spec)
    by_shape: dict[frozenset, list[int]] = {}
    for rank in range(world):
        held = frozenset((p.chunk, p.name, p.shape, p.is_buffer) for p in placement(arch, layout, world, rank, spelling))
        by_shape.setdefault(held, []).append(rank)
    found = rank_classes(arch, layout, world, spelling)
    assert [list(one.ranks) for one in found] == list(by_shape.values())
    for one, held in zip(found, by_shape, strict=True):
        params = [prod(shape) for _, _, shape, buffer in held if not buffer]
        buffers = [prod(shape) for _, _, shape, buffer in held if buffer]
        assert (one.parameters, one.values, one.buffers) == (len(params), sum(params), sum(buffers))
        assert one.bytes_in_bf16 == 2 * sum(params) + 4 * sum(buffers)


def test_what_1024_ranks_hold():
    """Five classes, and over all of them every value of the model as often as the layout repeats it."""
    layout, ranks = SHIPPED["bridge_1024"].layout, 1024
    assert [spans(one.ranks) for one in classes("bridge_1024")] == ["0-127", "128-255", "256-767", "768-895", "896-1023"]
    # Every rank of a stage holds as much: dense values once per tp rank, experts once per ep rank.
    dense, experts = 0, 0
    for one in classes("bridge_1024"):
        for pp in {layout.coordinates(rank, ranks).pp for rank in one.ranks}:
            params = [p for p in placement(V3, layout, ranks, pp * 128, Spelling()) if not p.is_buffer]
            experts += sum(prod(p.shape) for p in params if p.is_expert) * layout.ep
            dense += sum(prod(p.shape) * (1 if "tp" in p.replicated else layout.tp) for p in params if not p.is_expert)
    # The whole model in one rank, and the embedding once more on the stage of the MTP layer.
    assert dense + experts == 682_636_472_320 + 129_280 * 7_168


def test_a_layout_that_does_not_fit_is_one_line(tmp_path):
    path = tmp_path / "layout.yaml"
    for text, message in [
        ("ranks: 96\nlayout: {tp: 8, pp: 4, ep: 32}", "etp x ep x pp = 128 does not divide the 96 ranks"),
        ("ranks: 100\nlayout: {tp: 8}", "tp x cp x pp = 8 does not divide the 100 ranks"),
        ("ranks: 8\nlayout: {tp: 8, eep: 1}", "unknown key 'layout.eep'; the nearest known key is 'layout.ep'"),
        ("world: 8\nlayout: {tp: 8}", "unknown key 'world'; known keys there are model, "),
        ("ranks: 0\nlayout: {}", "'ranks': expected greater than or equal to 1; got 0"),
        ("ranks: 8", "missing key 'layout'"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError) as error:
            load_layout(path)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_spans():
    assert spans([0, 1, 2, 3, 8, 10, 11]) == "0-3, 8, 10-11" and spans([]) == ""


@pytest.fixture(scope="module")
def found():
    """Differences of the lowest and the highest rank of every class of every layout: other tp, cp, ep and pp coordinates of one class."""
    pytest.importorskip("megatron.core")
    cases = [_case(name, sorted({rank for one in classes(name) for rank in (one.ranks[0], one.ranks[-1])})) for name in SHIPPED]
    return dict(zip(SHIPPED, megatron_shapes.finish(megatron_shapes.start(cases)), strict=True))


@pytest.mark.lane
@pytest.mark.parametrize("name", SHIPPED)
def test_every_rank_class_of_megatron(found, name):
    assert len(found[name]) >= len(classes(name))
    assert all(differences == [] for differences in found[name]), found[name]


@pytest.mark.proof
@pytest.mark.lane
def test_all_1024_ranks_of_megatron():
    """Not one rank of a class but all of them, in two processes."""
    pytest.importorskip("megatron.core")
    started = [megatron_shapes.start([_case("bridge_1024", list(range(first, 1024, 2)))]) for first in (0, 1)]
    for process in started:
        (differences,) = megatron_shapes.finish(process, timeout=900)
        assert differences == [[]] * 512


def _case(name, ranks):
    file = SHIPPED[name]
    return {"config": V3_CONFIG, "layout": file.layout.model_dump(), "world": file.ranks, "ranks": ranks}


@pytest.mark.lane
def test_every_kind_of_difference_is_named():
    pytest.importorskip("megatron.core")
    from r1mega.megatron.shapes import BuiltRank, differences

    arch, layout = tiny(), Layout(pp=2, ep=2)
    placed = placement(arch, layout, 4, 3, Spelling())
    built = BuiltRank(
        shapes={(param.chunk, param.name): param.shape for param in placed}, layers={(0, 0): 3, (0, 1): 4}, experts=(4, 5, 6, 7)
    )
    assert differences(placed, built) == []
    norm, expert = "decoder.layers.1.input_layernorm.weight", "decoder.layers.0.mlp.experts.local_experts.2.linear_fc2.weight"
    shapes = {**built.shapes, (0, "more"): (1,), (0, norm): (25,)}
    del shapes[0, expert]
    assert differences(placed, replace(built, shapes=shapes)) == [
        f"chunk 0 {expert}: placed, but not a parameter of Megatron-Core's",
        "chunk 0 more: a parameter of Megatron-Core's, but not placed",
        f"chunk 0 {norm}: placed as [24], Megatron-Core has [25]",
    ]
    assert f"chunk 0 {norm}: placed from model.layers.4.input_layernorm.weight, layer 5 for Megatron-Core" in differences(
        placed, replace(built, layers={(0, 0): 3, (0, 1): 5})
    )
    assert f"chunk 0 {expert}: placed from model.layers.3.mlp.experts.6.down_proj.weight, expert 7 for Megatron-Core" in differences(
        placed, replace(built, experts=(4, 5, 7, 6))
    )
