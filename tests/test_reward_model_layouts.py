"""Reward models score, learn, and are scored by policies alike under every layout, against the run in one process."""

import json
from functools import cache

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

pytest.importorskip("megatron.core")
import megatron_support as support
import reward_model_ranks as ranks
from megatron_support import Case
from safetensors.torch import save_file

from r1mega.weights.architecture import Architecture, scored_config
from r1mega.weights.safetensors_out import Encoding, save

pytestmark = pytest.mark.lane

CASES = {
    2: [
        *(Case("v3", layout) for layout in ({}, {"tp": 2, "ep": 2}, {"pp": 2, "vpp": 2}, {"cp": 2})),
        *(Case(model, layout) for model, layout in (("qwen", {"pp": 2}), ("llama", {"tp": 2}))),
        Case("v3", {"tp": 2, "ep": 2}, steps=2, distributed=True),
    ],
    4: [
        *(Case("v3", layout) for layout in ({"ep": 2}, {"tp": 2, "etp": 2}, {"tp": 2, "pp": 2, "ep": 2}, {"cp": 2, "tp": 2, "ep": 2})),
        *(Case(model, layout) for model in ("qwen", "llama") for layout in ({"tp": 2, "pp": 2}, {"tp": 2, "cp": 2})),
        *(Case("v3", layout, steps=2, distributed=True) for layout in ({"ep": 2}, {"pp": 2})),
        Case("v3", {"tp": 2, "ep": 2}, {"recompute": "full"}),
    ],
}
MARKS = {2: pytest.mark.slow, 4: pytest.mark.proof}


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """Results of the runs in one process, and the folder with their gradients or weights and with the reward models."""
    folder = tmp_path_factory.mktemp("references")
    results = {}
    for model in {case.model for cases in CASES.values() for case in cases}:
        config = support.CONFIGS[model]
        target = folder / f"{model} reward model"
        target.mkdir()
        arch = Architecture.from_hf(config).scored()
        save(target, arch, support.random_weights(arch), Encoding(torch.float32))
        (target / "config.json").write_text(json.dumps(scored_config(config)))
    with support.cpu_platform():
        for case in {case.reference.name: case.reference for cases in CASES.values() for case in cases}.values():
            outcome, seen = ranks.run(case)
            save_file(support.canonical_values(outcome), folder / f"{case.name}.safetensors")
            results[case.name] = (outcome.scalars, seen)
    return folder, results


@pytest.fixture(scope="module")
def reports(references):
    """What each rank of a world found, from one spawn per world size."""
    folder, _ = references

    @cache
    def of(world: int) -> list[dict]:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        mp.spawn(ranks.work, (world, store.port, folder, CASES[world]), nprocs=world)
        return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(world)]

    return of


@pytest.mark.parametrize(
    ("world", "case"), [pytest.param(w, c, id=f"{w}: {c.name}", marks=MARKS[w]) for w, cases in CASES.items() for c in cases]
)
def test_a_layout_scores_and_learns_like_one_process(world, case, references, reports):
    scalars, scores = references[1][case.reference.name]
    for report in reports(world):
        found = report[case.name]
        assert "error" not in found, found["error"]
        assert found["scores"] == pytest.approx(scores, abs=1e-5)
        for name, value in scalars.items():
            assert found["scalars"][name] == pytest.approx(value, rel=1e-5), name
        worst = max(found["differences"].values())
        assert worst < 1e-5, max(found["differences"].items(), key=lambda item: item[1])
        if not case.steps:
            assert found["by a policy"] == pytest.approx(scores[: len(found["by a policy"])], abs=1e-5)
            assert found["changed"] == []


@pytest.mark.slow
def test_a_checkpoint_goes_on_under_another_layout(reports):
    assert all(report["restored"] for report in reports(2))
