"""`r1mega plan`: recipes on clusters, what does not fit, bad input in one line, and the search."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from r1mega import cli
from r1mega.config.engine_layout import EngineLayout
from r1mega.config.layout import Layout
from r1mega.config.loading import load_layout
from r1mega.errors import UserError
from r1mega.planner.devices import DEVICES, device
from r1mega.planner.engine import Engine, Lengths, cache_bytes, engine_weights, rollout_seconds
from r1mega.planner.execution import Execution
from r1mega.planner.flops import decode_flops, forward_flops
from r1mega.planner.memory import Memory
from r1mega.planner.schedule import bubble
from r1mega.planner.search import folded, layouts, pipelines, rounded, search
from r1mega.planner.step import step
from r1mega.report.plan import WIDTH, bar
from r1mega.weights.architecture import Architecture
from r1mega.weights.pipeline import stages

ROOT = Path(__file__).parents[1]
R1 = str(ROOT / "configs/deepseek_v3/r1.yaml")
V3 = Architecture.from_hf(json.loads((ROOT / "configs/deepseek_v3/config.json").read_text()))
QWEN = Architecture.from_hf(json.loads((ROOT / "configs/distill/qwen_7b/config.json").read_text()))
PUBLISHED = sorted((ROOT / "configs/layouts").glob("*.yaml"))


# ---------------------------------------------------------------- the command


def test_every_stage_of_r1_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", R1, "--device", "h100", "--json", str(tmp_path / "plan.json"), "stages.zero.train.chunk_tokens=139264"]
    assert cli.main(command) == 1
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "plan.json").read_text())
    assert [stage["name"] for stage in record["stages"]] == [
        "zero", "cold-start", "dev1", "dev2", "reasoning", "dev3", "helpful", "safe", "r1", "table",
    ]  # fmt: skip
    zero = record["stages"][0]
    assert set(zero["seconds"]) == {"rollout", "reference", "old log-probs", "training", "weight sync"}
    assert set(zero["flops"]) == {"training", "log-probs", "generation"}
    assert len(zero["memory"]) == 8
    # Micro-batches twice as long are too much for 80 GB, and the plan says so before anything is submitted.
    assert record["verdict"].startswith("does not fit: zero: pipeline stage")
    assert printed.splitlines()[-1] == record["verdict"]


def test_what_fits_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(ROOT / "configs/distill/qwen_7b.yaml")
    assert cli.main(["plan", recipe, "--device", "h200", "layout.cp=2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "everything fits"


def test_the_worked_example_fits(capsys: pytest.CaptureFixture[str]) -> None:
    """docs/sizing.md: 256 H100, the overlay that its search leads to."""
    page = (ROOT / "docs/sizing.md").read_text(encoding="utf-8")
    overlay = ROOT / "configs/deepseek_v3/overlays/h100_256.yaml"
    assert all(f"    {line}\n" in page for line in overlay.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
    assert cli.main(["plan", R1, "--gpus", "256", "--response", "8000"]) == 1
    assert f"    {capsys.readouterr().out.splitlines()[-1]}\n" in page
    assert cli.main(["plan", R1, str(overlay), "--response", "8000"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "everything fits"
    shown = [line[4:] for line in page.splitlines() if line.startswith("    zero (grpo)") or line.startswith("      engine:")]
    assert len(shown) == 2
    assert all(line in printed for line in shown)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "h10"], "--device h10: not known; there are h100, h800"),
        (["--device", "h10"], "nearest: h100"),
        (["--link", "ndd"], "nearest: ndr"),
        (["--gpus", "500"], "tp x cp x pp = 64 does not divide the 500 ranks; 384 or 512 would do"),
        (["layout={tp: 3, pp: 8}"], "tp x cp x pp = 24 does not divide the 512 ranks; 504 or 528 would do"),
        (["layout={tp: 16, pp: 16, ep: 16, pipeline: Et|t*59|tmL}"], "has 3 stages, but pp x vpp = 16 x 1"),
        (["layout={ep: 48}", "run.ranks=480"], "ep=48 does not divide the model's 256 experts; 32 does"),
        (["stages.zero.optimizer.offload=2"], "'stages.zero.optimizer.offload': expected less than or equal to 1"),
        (["--gpus", "0"], "--gpus 0: expected more than 0"),
        (["--engine-tp", "48"], "servers of 48 GPUs do not divide 512 GPUs or the model; nearest: 32"),
        (["--search", "--stage", "cold-start"], "does not train"),
        (["--search", "--stage", "nowhere"], "there is no such stage"),
        (["--search", "--gpus", "8"], "no layout fits 8 H100: the nearest"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", R1, *arguments]) == 2
    found = capsys.readouterr().err
    assert said in found
    assert found.count("\n") == 1


def test_a_bar_is_as_long_as_a_gpu_and_shows_what_stands_out() -> None:
    half = Memory(40, 0, 0, 0, 0, 0, 0, 0, 0)
    assert bar(half, 80) == "W" * (WIDTH // 2) + "." * (WIDTH // 2) + "|"
    full = Memory(40, 40, 40, 0, 0, 0, 0, 0, 0)
    assert bar(full, 80) == "W" * 30 + "G" * 30 + "|" + "O" * 30


# ---------------------------------------------------------------- formulas


def test_the_bubble_is_the_one_of_the_paper() -> None:
    assert bubble(8, 1, 64) == 7 / 64
    assert bubble(8, 4, 64) == 7 / 256
    how = Execution(4096, 4096, reduce_overlap=True, gather_overlap=True)
    long, short = (step(V3, Layout(pp=8, ep=32), 256, how, count, DEVICES["h100"]) for count in (64, 32))
    assert long.bubble == short.bubble
    assert long.busy.total == pytest.approx(2 * short.busy.total)


def test_a_device_takes_another_network_and_host() -> None:
    found = device("H100", "hdr", 1000)
    assert (found.network, found.host, found.hbm) == (25e9, 1e12, 80e9)


def test_engines_share_all_weights_but_what_every_gpu_needs() -> None:
    whole = engine_weights(V3, Engine(EngineLayout(tp=1, ep=1)))
    # Two bytes of everything, MTP left out, which is no part of the model served.
    trunk = replace(V3, mtp_layers=0)
    assert whole == pytest.approx(2 * 671.0264e9, rel=1e-4)
    assert engine_weights(trunk, Engine(EngineLayout(tp=32, ep=32))) == pytest.approx(whole / 32, rel=0.06)
    assert engine_weights(V3, Engine(EngineLayout(tp=16, ep=16), fp8=True)) == pytest.approx(whole / 32, rel=0.1)
    # Attention in 8 copies costs each GPU more of it, and no more experts.
    more = engine_weights(V3, Engine(EngineLayout(tp=64, ep=64, attn_dp=8))) - engine_weights(V3, Engine(EngineLayout(tp=64, ep=64)))
    attention = 2 * 61 * 187e6
    assert more == pytest.approx(attention / 8 - attention / 64, rel=0.15)


def test_the_cache_of_latent_attention() -> None:
    assert cache_bytes(V3, Engine(EngineLayout(tp=8, ep=8))) == 2 * 61 * 576
    assert cache_bytes(QWEN, Engine(EngineLayout(tp=2, ep=2))) == 2 * 28 * 2 * 4 * 128 / 2


def test_response_lengths() -> None:
    lengths = Lengths(prompt=100, mean=1000, cap=10**6)
    assert lengths.expected(100_000) == pytest.approx(1000, rel=0.01)
    assert lengths.longer(lengths.median()) == pytest.approx(0.5)
    assert lengths.longer(10**6) == 0
    assert Lengths(100, 1000, 800).expected() < 800


def test_a_rollout_takes_longer_with_longer_responses_and_not_in_proportion_with_more() -> None:
    def seconds(responses: int, mean: float) -> float:
        return rollout_seconds(V3, Engine(EngineLayout(tp=32, ep=32)), DEVICES["h100"], 256, responses, Lengths(200, mean, 8192))

    assert seconds(512, 2000) > 1.3 * seconds(512, 1000)
    # Reading the weights is shared by the batch.
    assert seconds(512, 1000) < seconds(2048, 1000) < 2 * seconds(512, 1000)


def test_decoding_a_token_costs_a_forward_pass_of_the_trunk() -> None:
    trunk = replace(V3, mtp_layers=0)
    assert decode_flops(trunk, 0) == pytest.approx(forward_flops(trunk, 1), rel=1e-3)


# ---------------------------------------------------------------- the search


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_every_published_layout_is_searched(path: Path) -> None:
    file = load_layout(path)
    wanted = (_sizes(file.layout), stages(V3, file.layout))
    assert any((_sizes(found), stages(V3, found)) == wanted for found in layouts(V3, file.ranks, _nothing()))


def _sizes(layout: Layout) -> tuple[int, ...]:
    return (layout.tp, layout.pp, layout.vpp, layout.cp, layout.ep, layout.etp)


def _nothing():
    from collections import Counter

    return Counter()


def test_cuts_place_every_layer_once() -> None:
    for pp, vpp in ((2, 1), (8, 4), (16, 1), (12, 1), (4, 4), (16, 2)):
        for pipeline in pipelines(61, 1, pp, vpp):
            cut = stages(V3, Layout(pp=pp, vpp=vpp, pipeline=pipeline))
            assert cut == stages(V3, Layout(pp=pp, vpp=vpp, pipeline=folded(pipeline)))
            assert sum(len(chunk.layers) for chunks in cut for chunk in chunks) == 61
    assert "Et|(tt|)*30mL" in {folded(pipeline) for pipeline in pipelines(61, 1, 8, 4)}


def test_the_interleaved_schedule_takes_micro_batches_pp_at_a_time() -> None:
    assert rounded(9.2, Layout(pp=4, vpp=2)) == 12
    assert rounded(9.2, Layout(pp=4)) == 10


def test_the_search_is_sorted_and_fits_and_says_why_others_lose() -> None:
    found = search(QWEN, 16, 64, Execution(32768, 8192), DEVICES["h100"])
    seconds = [one.step.seconds for one in found.found]
    assert seconds == sorted(seconds)
    assert all(one.bytes_needed <= 0.95 * 80e9 for one in found.found)
    best, last = found.found[0], found.found[-1]
    part = last.loses(best)
    assert last.step.phases()[part] > best.step.phases()[part]
    assert sum(best.step.phases().values()) == pytest.approx(best.step.seconds)


def test_what_cannot_fit_names_the_number_that_breaks() -> None:
    with pytest.raises(UserError, match=r"no layout fits 16 H100: the nearest, .* needs [\d,.]+ GB of 76 with everything recomputed"):
        search(V3, 16, 64, Execution(4096, 4096), DEVICES["h100"])


@pytest.mark.slow
def test_v3_on_1024_gpus_within_a_minute() -> None:
    """One core, 31,302 layouts."""
    how = Execution(4096, 4096, fp8="blockwise", ep_overlap=True, moment_bytes=2)
    begin = time.process_time()
    found = search(V3, 1024, 8192, how, DEVICES["h100"])
    assert time.process_time() - begin < 60
    every = [(_sizes(one.layout), stages(V3, one.layout)) for one in (*found.found, *found.rejected)]
    for path in PUBLISHED:
        file = load_layout(path)
        if file.ranks == 1024:
            assert (_sizes(file.layout), stages(V3, file.layout)) in every
