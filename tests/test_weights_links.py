"""Costs of a weight sync: bounds that hold, schedules that keep to one transfer per link, and the 671B model's numbers."""

import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from test_weights_engine import ENGINE_FILES
from test_weights_layouts import SHIPPED
from test_weights_plan import MODELS, random_layout
from test_weights_table import V3, tiny

from r1mega.config.engine_layout import EngineLayout
from r1mega.config.layout import Layout
from r1mega.config.loading import load_engine
from r1mega.report.sync import costs
from r1mega.weights.architecture import Architecture
from r1mega.weights.direct import direct_plan
from r1mega.weights.links import direct_bound, egress, full_seconds, ingress, schedule
from r1mega.weights.placement import Spelling
from r1mega.weights.sync import full_plan
from r1mega.weights.wire import Wire

ROOT = Path(__file__).parent.parent


def check_schedule(links, found, rate, chunk):
    """Every byte once, and never two transfers at a time out of or into a rank."""
    moved = Counter()
    for transfer in found.transfers:
        moved[transfer.source, transfer.target] += transfer.nbytes
        assert 0 < transfer.nbytes <= chunk
    assert moved == Counter(links)
    for end in ("source", "target"):
        busy_until: dict[int, float] = {}
        for transfer in sorted(found.transfers, key=lambda one: one.start):
            rank = getattr(transfer, end)
            assert transfer.start >= busy_until.get(rank, 0.0)
            busy_until[rank] = transfer.start + transfer.nbytes / rate
        assert max(busy_until.values()) <= found.seconds
    assert sum(map(len, found.queues().values())) == len(found.transfers)


@pytest.mark.parametrize("seed", range(8))
def test_a_schedule_moves_everything_once(seed):
    rng = random.Random(seed)
    links = {(rng.randrange(6), 10 + rng.randrange(5)): rng.randrange(1, 1000) for _ in range(20)}
    busiest = max(*egress(links).values(), *ingress(links).values())
    for chunk in (7, 10**6):
        found = schedule(links, 10.0, chunk)
        check_schedule(links, found, 10.0, chunk)
        # List scheduling of such transfers is never worse than twice the bound, and chunks make it nearly preemptive.
        assert busiest / 10.0 <= found.seconds * (1 + 1e-9) and found.seconds <= (1.2 if chunk == 7 else 2.0) * busiest / 10.0


def test_nothing_to_move_takes_no_time():
    assert schedule({}, 1.0, 1).seconds == 0.0


@pytest.mark.parametrize("seed", range(8))
def test_no_choice_of_replicas_beats_the_bound(seed):
    rng = random.Random(seed)
    arch = Architecture.from_hf(MODELS[seed % len(MODELS)])
    layout, world = random_layout(rng, arch)
    engine = EngineLayout(servers=rng.choice([1, 2, 4]), tp=rng.choice([1, 2]))
    plan = direct_plan(arch, layout, world, Spelling(), engine, Wire(), rng.choice([0, world]))
    links, bound = plan.links(), direct_bound(plan)
    if links:
        assert max(ingress(links).values()) <= bound <= max(*egress(links).values(), *ingress(links).values())


def test_one_rank_that_feeds_many_is_bound_by_what_it_sends():
    arch, wire = tiny(), Wire()
    plan = direct_plan(arch, Layout(), 1, Spelling(), EngineLayout(servers=3), wire, first=1)
    links = plan.links()
    assert direct_bound(plan) == egress(links)[0] == 3 * links[0, 1]


def test_gathers_overlap_with_sending():
    """Two stages whose dense layers are cut in two: only the first bucket's gather is waited for."""
    plan = full_plan(tiny(), Layout(tp=2, pp=2, ep=2), 8, Spelling(), Wire(), 8_000)
    incoming = [sum(b.message_bytes(r) for r in b.messages if r != b.sender) for b in plan.buckets]
    assert plan.nbytes < full_seconds(plan, 1.0) <= plan.nbytes + incoming[0] + max(b.nbytes for b in plan.buckets)
    assert sum(incoming) > 5 * incoming[0]


CHEAP = [("slime_128", "slime_ep64")]
ALL = [
    ("nemo_rl_256", "nemo_rl_tp32"), ("nemo_rl_256", "nemo_rl_fp8_tp16"), ("verl_96", "verl_tp32"), ("verl_256", "nemo_rl_tp32"),
    ("miles_128", "nemo_rl_tp32"), ("slime_128", "nemo_rl_fp8_tp16"), ("nemo_rl_256_16k", "nemo_rl_tp32"), ("bridge_1024", "nemo_rl_tp32"),
]  # fmt: skip


def within_the_bound(train, serve):
    """No more than 1.5 times what the links allow, in a minute of CPU time."""
    started = time.process_time()
    direct, full = costs(V3, SHIPPED[train], load_engine(ENGINE_FILES[serve]), 50e9, 500_000_000)
    assert time.process_time() - started < 60
    for cost in (direct, full):
        assert cost.ratio * (1 + 1e-9) >= 1.0 and cost.ratio <= 1.5, cost
    # The whole model, 671,026,419,200 values without the MTP layer (and 256 float32 biases in each of 58 layers).
    values = 671_026_419_200
    assert full.received == pytest.approx(values * (1.003 if load_engine(ENGINE_FILES[serve]).block_fp8 else 2), rel=2e-3)
    assert direct.received < full.received / 12 and direct.quantised_late == full.quantised_late == 0
    return direct, full


@pytest.mark.parametrize(("train", "serve"), CHEAP)
def test_the_671b_model_comes_close_to_the_bound(train, serve):
    within_the_bound(train, serve)


@pytest.mark.proof
@pytest.mark.parametrize(("train", "serve"), ALL)
def test_every_published_pair_comes_close_to_the_bound(train, serve):
    within_the_bound(train, serve)


# Runs the script named after it and says its own peak at the end: ru_maxrss of a child would begin at what its parent held.
WITH_PEAK = """
import atexit, pathlib, runpy, sys
atexit.register(lambda: print(pathlib.Path("/proc/self/status").read_text(), file=sys.stderr))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_command_prints_and_needs_little_memory(tmp_path):
    files = ("configs/layouts/slime_128.yaml", "configs/engines/slime_ep64.yaml")
    command = ["tools/plan_sync", "--train", files[0], "--serve", files[1], "--json", str(tmp_path / "plans.json")]
    done = subprocess.run([sys.executable, "-c", WITH_PEAK, *command], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    head, titles, direct, full = done.stdout.splitlines()
    assert head == "slime_128 (128 GPUs) to slime_ep64 (2 x 64 GPUs on the trainer's GPUs), block FP8"
    assert direct.split()[:2] == ["own", "shards"] and full.split()[:2] == ["full", "tensors"] and "bound s" in titles
    assert [plan["path"] for plan in json.loads((tmp_path / "plans.json").read_text())["plans"]] == ["own shards", "full tensors"]
    assert int(re.search(r"VmHWM:\s+(\d+) kB", done.stderr)[1]) < 1_000_000
    wrong = subprocess.run([sys.executable, *command[:4], "nowhere.yaml"], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "nowhere.yaml" in wrong.stderr
