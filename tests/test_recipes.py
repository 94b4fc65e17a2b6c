"""The recipes that ship: every one resolves, those of the paper with the paper's numbers."""

from pathlib import Path

import pytest

from r1mega import cli
from r1mega.config.base import at
from r1mega.config.loading import load_recipe
from r1mega.config.schema import Recipe
from r1mega.weights.architecture import Architecture, read_config
from r1mega.weights.audit import figures

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
RECIPES = sorted(path for folder in ("tiny", "deepseek_v3", "moonlight_16b", "distill") for path in (CONFIGS / folder).glob("*.yaml"))
OVERLAYS = sorted((CONFIGS / "deepseek_v3/overlays").glob("*.yaml"))
PLANNED = [  # a recipe for H100, with what is laid over it
    *((path,) for path in RECIPES if path.parent.name != "tiny"),
    *((path, overlay) for path in RECIPES if path.parent.name == "deepseek_v3" for overlay in OVERLAYS),
]
STUDENTS = {  # initial learning rate (paper, table of B.4.3) and parameters in billions (of the published bases, output embedding untied)
    "qwen_1.5b": (1e-4, 1.777),
    "qwen_7b": (8e-5, 7.616),
    "qwen_14b": (7e-5, 14.770),
    "qwen_32b": (6e-5, 32.764),
    "llama_8b": (5e-5, 8.030),
    "llama_70b": (2e-5, 70.554),
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_stage_resolves_without_the_cluster_s_files(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", str(path), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    recipe = load_recipe(path, inputs=False)
    assert [line.split()[0] for line in lines[1 : 1 + len(recipe.stages)]] == list(recipe.stages)


@pytest.mark.parametrize("paths", PLANNED, ids=lambda paths: " + ".join(path.stem for path in paths))
def test_it_fits_its_cluster_trainer_and_engines(paths: tuple[Path, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *map(str, paths)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "everything fits"
    assert cli.main(["check", *map(str, paths), "--dry-run"]) == 0


def test_overlays_are_for_four_sizes_and_fill_their_gpus() -> None:
    sizes = []
    for overlay in OVERLAYS:
        recipe = load_recipe(CONFIGS / "deepseek_v3/r1.yaml", [str(overlay)], inputs=False)
        assert recipe.rollout.sglang.placement == "colocated"
        assert recipe.rollout.sglang.layout.ranks == recipe.run.ranks == int(overlay.stem.removeprefix("h100_"))
        sizes.append(recipe.run.ranks)
    assert sorted(sizes) == [128, 256, 512, 1024]


def test_the_stages_that_have_recipes_of_their_own_are_those_of_r1() -> None:
    stages = r1().stages
    alone = load_recipe(CONFIGS / "deepseek_v3/r1_zero.yaml", inputs=False)
    assert alone.stages == {"zero": stages["zero"]} and alone.layout == r1().layout
    sft = load_recipe(CONFIGS / "deepseek_v3/sft.yaml", inputs=False).stages["sft"]
    assert sft.kind == stages["dev3"].kind == "sft"
    assert (sft.batch, sft.epochs, sft.optimizer, sft.train) == (
        *(stages["dev3"].batch, stages["dev3"].epochs, stages["dev3"].optimizer, stages["dev3"].train),
    )


def test_moonlight_has_its_16_billion_parameters() -> None:
    found = figures(read_config(CONFIGS / "moonlight_16b"))
    assert found.values / 1e9 == pytest.approx(15.96, abs=5e-3)


def r1() -> Recipe:
    return load_recipe(CONFIGS / "deepseek_v3/r1.yaml", inputs=False)


def test_r1_s_graph_is_the_published_one() -> None:
    base = str(CONFIGS / "deepseek_v3")
    stages = r1().stages
    models = {name: stage.model for name, stage in stages.items() if stage.kind != "evaluate"}
    assert models == {
        "zero": base,
        "cold-start": "zero",
        "dev1": base,
        "dev2": "dev1",
        "reasoning": "dev2",
        "dev3": base,  # the 800k set is trained from the base again
        "helpful": "dev3",
        "safe": "dev3",
        "r1": "dev3",
    }
    assert stages["dev3"].data["reasoning"].stage == "reasoning"


def test_r1_s_numbers_are_the_published_ones() -> None:
    stages = r1().stages
    zero, last = stages["zero"], stages["r1"]
    assert (zero.group_size, zero.prompts_per_rollout, zero.updates_per_rollout) == (16, 512, 16)
    assert zero.updates == 10_400 and zero.reference_refresh == 400 and zero.optimizer.lr == 3e-6
    assert at(zero.objective.kl_coef, 0) == 1e-3 and at(zero.objective.clip, 0) == 10 and zero.objective.aggregation == "sequence"
    caps = zero.sampling.max_new_tokens
    assert [at(caps, update) for update in (0, 8199, 8200, 10_399)] == [32_768, 32_768, 65_536, 65_536]
    assert last.updates == 1_700 and at(last.sampling.temperature, 0) == 0.7
    weights = [at(last.reward_models["helpful"].weight, update) for update in (0, 1_299, 1_300, 1_699)]
    assert weights == [0, 0, 1, 1]  # the last 400
    assert [at(last.prompts["general"].share, update) for update in (1_299, 1_300)] == [0, 66]
    assert at(last.rewards["language"].weight, 0) == 1
    for name in ("dev1", "dev3"):
        sft = stages[name]
        assert (sft.batch, sft.optimizer.lr, sft.optimizer.min_lr, sft.optimizer.decay) == (128, 5e-5, 5e-6, "cosine")
        assert sft.train.chunk_tokens == 32_768 and sft.epochs in (2, 3)
    helpful, safe = stages["helpful"], stages["safe"]
    assert (helpful.batch, helpful.optimizer.lr, helpful.epochs, helpful.train.chunk_tokens) == (256, 6e-6, 1, 8_192)
    assert (helpful.sees, helpful.loss, safe.sees, safe.loss) == ("summary", "pairwise", "all", "pointwise")


@pytest.mark.parametrize("name", STUDENTS)
def test_students_are_the_published_ones(name: str) -> None:
    lr, billions = STUDENTS[name]
    stage = load_recipe(CONFIGS / f"distill/{name}.yaml", inputs=False).stages["student"]
    assert stage.kind == "sft" and stage.batch == 64 and stage.epochs in (2, 3) and stage.train.chunk_tokens == 32_768
    assert (stage.optimizer.lr, stage.optimizer.min_lr, stage.optimizer.decay) == (lr, pytest.approx(lr / 10), "cosine")
    config = read_config(CONFIGS / "distill" / name)
    assert Architecture.from_hf(config).max_positions >= 32_768
    assert figures(config).values / 1e9 == pytest.approx(billions, abs=6e-4)
