"""Every layout trains alike: losses, gradients of every parameter and weights after steps, against the run in one process."""

import gc
import json
import math
import weakref
from functools import cache

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

pytest.importorskip("megatron.core")
import megatron_ranks
import megatron_support as support
from megatron_support import Case
from safetensors.torch import save_file

from r1mega.megatron.topology import MEGATRON_VERSION

pytestmark = pytest.mark.lane

MTP = {"mtp_loss": 0.3}
OVERLAP = {"overlap": True}
BIAS = {"router_bias_rate": 1e-3}
BALANCE = {"aux_loss": 0.05, "mtp_loss": 0.3}
TWO = [{}, {"ep": 2}, {"tp": 2, "ep": 2}, {"tp": 2, "etp": 2}, {"pp": 2}, {"pp": 2, "vpp": 2}, {"cp": 2}, {"cp": 2, "ep": 2}]
if MEGATRON_VERSION >= (0, 19):
    TWO.append({"tp": 2})
FOUR = [
    {"tp": 2, "ep": 2},
    {"tp": 2, "ep": 4},
    {"tp": 4, "ep": 2, "etp": 2},
    {"etp": 2, "ep": 2},
    {"tp": 2, "pp": 2, "ep": 2},
    {"pp": 2, "ep": 2},
    {"pp": 2, "vpp": 2, "ep": 2},
    {"cp": 2, "tp": 2, "ep": 2},
    {"cp": 2, "pp": 2},
    {"cp": 4},
    {"pp": 4},
    {"pp": 4, "pipeline": "E|tt|tt|mL"},
]
CASES = {
    2: [
        *(Case("v3", layout, MTP) for layout in TWO),
        *(Case("v3", layout) for layout in ({"tp": 2, "ep": 2}, {"pp": 2, "vpp": 2}, {"cp": 2})),
        *(Case(model, layout) for model in ("moonlight", "v2") for layout in ({"ep": 2}, {"pp": 2}, {"tp": 2, "ep": 2})),
        *(Case(model, {"cp": 2, "ep": 2}) for model in ("moonlight", "v2")),
        *(Case(model, layout) for model in ("qwen", "llama") for layout in ({"tp": 2}, {"pp": 2}, {"cp": 2})),
        *(Case("v3", layout, MTP | {"recompute": "full"}) for layout in ({"tp": 2, "ep": 2}, {"pp": 2})),
        *(Case("v3", layout, MTP | {"recompute": "selective"}) for layout in ({"tp": 2, "ep": 2}, {"pp": 2})),
        *(Case("v3", layout, BALANCE, even=True) for layout in ({"ep": 2}, {"tp": 2, "ep": 2}, {"cp": 2}, {"pp": 2})),
        *(Case("v3", layout, MTP, 3, distributed) for layout in ({}, {"ep": 2}, {"tp": 2, "ep": 2}) for distributed in (False, True)),
        *(Case("v3", layout, MTP | OVERLAP, 3, distributed=True) for layout in ({}, {"ep": 2})),
        *(Case("v3", layout, BIAS, 3) for layout in ({"ep": 2}, {"pp": 2}, {"pp": 2, "vpp": 2}, {"tp": 2, "ep": 2})),
        *(Case("v3", layout, {"dtype": "bfloat16"}) for layout in ({"ep": 2}, {"tp": 2, "ep": 2}, {"pp": 2})),
        *(Case("v3", layout, MTP, replay=True) for layout in ({"ep": 2}, {"tp": 2, "ep": 2}, {"pp": 2}, {"pp": 2, "vpp": 2}, {"cp": 2})),
        *(Case("v3", layout, MTP | {"recompute": "full"}, replay=True) for layout in ({"tp": 2, "ep": 2}, {"pp": 2}, {"pp": 2, "vpp": 2})),
        *(Case("v3", layout, BIAS, 3, replay=True) for layout in ({"ep": 2}, {"pp": 2})),
        Case("v2", {"tp": 2, "ep": 2}, replay=True),
    ],
    4: [
        *(Case("v3", layout, MTP) for layout in FOUR),
        *(Case("v3", layout) for layout in ({"tp": 2, "pp": 2, "ep": 2}, {"pp": 4})),
        *(Case(model, {"tp": 2, "pp": 2, "ep": 2}) for model in ("moonlight", "v2")),
        *(Case(model, layout) for model in ("qwen", "llama") for layout in ({"tp": 2, "pp": 2}, {"tp": 2, "cp": 2})),
        Case("v3", {"cp": 2, "tp": 2, "ep": 2}, BALANCE, even=True),
        Case("v3", {"tp": 2, "ep": 2}, MTP, 3, distributed=True),
        *(Case("v3", layout, MTP | OVERLAP, 3, distributed=True) for layout in ({"pp": 2, "ep": 2}, {"pp": 2, "vpp": 2})),
        *(Case("v3", layout, MTP, replay=True) for layout in ({"tp": 2, "pp": 2, "ep": 2}, {"cp": 2, "tp": 2, "ep": 2})),
    ],
}  # fmt: skip
BF16 = "dtype=bfloat16"


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """Results of the runs in one process, and the folder with their gradients or weights."""
    folder = tmp_path_factory.mktemp("references")
    scalars = {}
    with support.cpu_platform():
        for case in {case.reference.name: case.reference for cases in CASES.values() for case in cases}.values():
            outcome = support.run(case)
            save_file(support.canonical_values(outcome), folder / f"{case.name}.safetensors")
            scalars[case.name] = outcome
    return folder, scalars


@pytest.fixture(scope="module")
def reports(references):
    """What each rank of a world found, from one spawn per world size."""
    folder, _ = references

    @cache
    def of(world: int) -> list[dict]:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        mp.spawn(megatron_ranks.work, (world, store.port, folder, CASES[world]), nprocs=world)
        return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(world)]

    return of


@pytest.mark.parametrize(("world", "case"), [pytest.param(w, c, id=f"{w}: {c.name}") for w, cases in CASES.items() for c in cases])
def test_layout_trains_like_one_process(world, case, references, reports):
    expected = references[1][case.reference.name]
    for report in reports(world):
        found = report[case.name]
        assert "error" not in found, found["error"]
        assert found["digests"] == expected.digests
        loose = BF16 in case.name
        for name, value in expected.scalars.items():
            assert found["scalars"][name] == pytest.approx(value, rel=0.05 if loose else 1e-5), name
        worst = max(found["differences"].values())
        assert math.isfinite(worst) if loose else worst < 1e-5, max(found["differences"].items(), key=lambda item: item[1])


def test_a_loss_that_is_not_finite_on_one_rank_changes_no_weight(reports):
    assert all(report["one rank is not finite"] == [] for world in CASES for report in reports(world))


def test_stand_ins_leave_device_blocks_alone(reports):
    assert all(report["devices in a meta block"] == ["meta", "meta"] for report in reports(2))


def test_a_trained_model_is_freed():
    with support.cpu_platform():
        outcome = support.run(Case("v3", train=MTP))
        weights = [weakref.ref(weight) for weight in outcome.policy.weights.values()]
        del outcome
        gc.collect()
        assert not any(weight() is not None for weight in weights)
