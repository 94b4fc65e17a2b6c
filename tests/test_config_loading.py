from pathlib import Path

import pytest

from r1mega.config.loading import dump_resolved, load_recipe, load_resolved
from r1mega.config.schema import Recipe
from r1mega.errors import UserError

KINDS = "pretrain, sft, grpo, rejection, preference, distill, evaluate"
RECIPE = """
name: test
run: {ranks: 2}
stages:
  base:
    kind: pretrain
    architecture: arch
    phases:
      - corpus: {kind: tiny, task: running_sum, long_share: 0.9}
        updates: 10
        optimizer: {lr: 1e-3}
  zero:
    kind: grpo
    model: base
    updates: 16
    prompts: {sums: {source: {kind: jsonl, path: data/prompts.jsonl}, template: r1_zero}}
    rewards:
      accuracy: {function: "r1mega.rewards.exact:accuracy"}
    optimizer: {lr: 3e-6}
    sampling: {temperature: {0: 1.0, 8: 0.7}}
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    (tmp_path / "arch").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "prompts.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n')
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load_recipe(path, overrides)
    text = str(error.value)
    assert "\n" not in text
    return text


def test_paths_are_relative_to_the_recipe_and_stage_names_stay(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    recipe = load_recipe(recipe_file)
    base, zero = recipe.stages["base"], recipe.stages["zero"]
    assert base.kind == "pretrain" and base.architecture == str(recipe_file.parent / "arch")
    assert zero.kind == "grpo" and zero.model == "base"
    source = zero.prompts["sums"].source
    assert source.kind == "jsonl" and source.path == str(recipe_file.parent / "data" / "prompts.jsonl")


def test_a_path_in_an_override_is_relative_to_the_working_directory(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "mine").mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    recipe = load_recipe(recipe_file, ["stages.zero.model=mine"])
    zero = recipe.stages["zero"]
    assert zero.kind == "grpo" and zero.model == str(elsewhere / "mine")


def test_numbers_overrides_and_schedules(recipe_file: Path) -> None:
    recipe = load_recipe(
        recipe_file,
        [
            "seed=7",
            "layout.ep=2",
            "stages.base.phases.0.updates=3",
            "stages.zero.sampling.temperature.8=0.5",
            "stages.zero.train={mtp_loss: 0.1}",
        ],
    )
    base, zero = recipe.stages["base"], recipe.stages["zero"]
    assert base.kind == "pretrain" and zero.kind == "grpo"
    assert (recipe.seed, recipe.layout.ep, base.phases[0].updates, base.phases[0].optimizer.lr) == (7, 2, 3, 1e-3)
    assert zero.optimizer.lr == 3e-6
    assert zero.sampling.temperature == {0: 1.0, 8: 0.5}
    assert zero.train.mtp_loss == 0.1


def test_part_of_a_pretraining_step_keeps_the_other_defaults_of_pretraining(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["stages.base.train.dtype=bfloat16"])
    base = recipe.stages["base"]
    assert base.kind == "pretrain"
    assert (base.train.dtype, base.train.mtp_loss, base.train.router_bias_rate, base.train.aux_loss) == ("bfloat16", 0.3, 1e-3, 1e-4)


def test_resolved_yaml_loads_back_equal_and_is_deterministic(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file, ["description='no: 1e-4, ~ \"x\" 数'"])
    text = dump_resolved(recipe)
    (tmp_path / "resolved.yaml").write_text(text, encoding="utf-8")
    again = load_resolved(tmp_path / "resolved.yaml")
    assert again == recipe and dump_resolved(again) == text
    assert isinstance(again, Recipe)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.zero.objective.clp=3", "unknown key 'stages.zero.objective.clp'; the nearest known key is 'stages.zero.objective.clip'"),
        ("stages.zero.lr=3", "unknown key 'stages.zero.lr'; the nearest known key is 'stages.zero.optimizer.lr'"),
        ("stages.zero.train.steps=3", "unknown key 'stages.zero.train.steps'; known keys there are "),
        ("sead=3", "unknown key 'sead'; the nearest known key is 'seed'"),
        ("stages.zero.objective.clip=x", "'stages.zero.objective.clip': expected a number, or a mapping"),
        ("stages.zero.updates=2.0", "'stages.zero.updates': expected an integer; got 2.0"),
        ("stages.zero.updates='2'", "'stages.zero.updates': expected an integer; got '2'"),
        ("stages.zero.updates=true", "'stages.zero.updates': expected an integer; got True"),
        ("stages.zero.optimizer.lr=-1", "'stages.zero.optimizer.lr': expected greater than 0; got -1"),
        ("stages.zero.objective.kl_estimator=k9", "'stages.zero.objective.kl_estimator': expected 'k1', 'k2' or 'k3'; got 'k9'"),
        ("stages.zero.kind=grp", f"'stages.zero.kind' is 'grp'; expected one of {KINDS}"),
        ("stages.zero=3", f"'stages.zero': expected a mapping with a key 'kind', one of {KINDS}; got 3"),
        ("stages.zero.prompts.sums.source={path: x}", "'stages.zero.prompts.sums.source' needs a key 'kind', one of jsonl, parquet"),
        ("stages.zero.sampling.temperature={3: 1}", "a schedule holds the key 0, its value from the first update on; got the keys [3]"),
        ("stages.zero.sampling.temperature=hot", "expected a number, or a mapping from update to number"),
        ("stages.zero.rewards={}", "'stages.zero.rewards': expected at least 1 entry"),
        ("stages.zero.optimizer={}", "missing key 'stages.zero.optimizer.lr'"),
        ("stages.base.phases.1.updates=3", "'stages.base.phases' is a list of 1; expected an index from 0 to 0, got '1'"),
        ("stages.base.phases.0.optimizer.l=3", "unknown key 'stages.base.phases.0.optimizer.l'"),
        ("seed.x=3", "'seed' is 1, which has no keys below it"),
        ("seed", "expected key.path=value"),
        ("seed=[", "line 1, column 2"),
        ("layout.vpp=2", "vpp=2 needs pp >= 2, got pp=1"),
        ("stages.zero.updates_per_rollout=7", "updates_per_rollout=7 does not divide prompts_per_rollout=512"),
        ("stages.zro.updates=3", "there is no stage 'zro'; the stages are base, zero"),
        ("stages.zero.objectiv.clip=0.2", "unknown key 'stages.zero.objectiv'; the nearest known key is 'stages.zero.objective'"),
        ("stages.zero.sampling.temperature=0", "sampling.temperature must be above 0"),
    ],
)
def test_a_wrong_override_is_one_line_that_names_the_key_and_the_fix(recipe_file: Path, override: str, message: str) -> None:
    if override == "seed.x=3":
        recipe_file.write_text("seed: 1\n" + RECIPE)
    text = refusal(recipe_file, override)
    assert message in text
    assert text.startswith(f"override {override!r}: ")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["layout.tp=4"], "'layout': tp x cp x pp = 4 does not divide the 2 ranks"),
        (["run.ranks=3", "layout.ep=2"], "'layout': etp x ep x pp = 2 does not divide the 3 ranks"),
        (["stages.zero.layout={pp: 3}"], "'stages.zero.layout': tp x cp x pp = 3 does not divide the 2 ranks"),
        (["stages.zero.model=zero"], "'stages.zero.model' is the stage 'zero', which does not come before this one"),
        (["stages.zero.model=missing"], "and no earlier stage (base)"),
        (["stages.base.architecture=missing"], "'stages.base.architecture': no folder"),
        (["stages.zero.prompts.sums.source.path=missing.jsonl"], "'stages.zero.prompts.sums.source.path': no file"),
        (["name=a/b"], "'name': 'a/b' names a folder"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_starts(recipe_file: Path, overrides: list[str], message: str) -> None:
    assert message in refusal(recipe_file, *overrides)


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.yaml").endswith("cannot be read (No such file or directory)")
    assert refusal(tmp_path).endswith("is a folder; name the YAML file")
    for content, message in [
        (b"", "got nothing"),
        (b"- 1", "got [1]"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"{}", "missing key 'name' (and 1 more)"),
    ]:
        (tmp_path / "r.yaml").write_bytes(content)
        assert message in refusal(tmp_path / "r.yaml")


def test_a_benchmark_may_not_hold_out_more_than_the_training_prompts_leave_out(tmp_path: Path) -> None:
    recipe = Path(__file__).parents[1] / "configs/tiny/r1_zero.yaml"
    load_recipe(recipe, ["stages.zero.evaluation.suites.heldout.prompts.heldout_fraction=0.05"])
    with pytest.raises(UserError, match=r"holds out 0.2 of the questions, the training prompts leave out 0.1"):
        load_recipe(recipe, ["stages.zero.evaluation.suites.heldout.prompts.heldout_fraction=0.2"])


COLOCATED = ["rollout.engine=sglang", "rollout.sglang.placement=colocated"]


def test_servers_on_the_trainers_gpus_draw_for_no_trainer_that_trains(recipe_file: Path) -> None:
    load_recipe(recipe_file, COLOCATED)
    load_recipe(recipe_file, ["stages.zero.staleness=1", "stages.zero.save_every=0"])
    ahead = [*COLOCATED, "stages.zero.staleness=1", "stages.zero.save_every=0"]
    with pytest.raises(UserError, match=r"'stages.zero.staleness': servers on the trainer's GPUs cannot draw while it trains; use rollout"):
        load_recipe(recipe_file, ahead)
    load_recipe(recipe_file, [*COLOCATED, "rollout.sglang.transport=distributed"])
    with pytest.raises(UserError, match=r"'rollout.sglang.transport': distributed needs a group .*; use tensor for placement=colocated"):
        load_recipe(recipe_file, [*COLOCATED, "rollout.sglang.transport=distributed", "run.platform=cuda"])


def test_states_that_megatron_core_would_keep_otherwise_are_refused(recipe_file: Path) -> None:
    where = "stages.zero.optimizer"
    assert "keeps the states of an offloaded optimizer in float32" in refusal(
        recipe_file, f"{where}={{lr: 1e-6, offload: 1, moments: bfloat16}}"
    )
    assert "use distributed: true" in refusal(recipe_file, f"{where}={{lr: 1e-6, moments: bfloat16, distributed: false}}")


def test_an_override_of_one_stage_leaves_those_that_are_written_like_it(recipe_file: Path) -> None:
    text = (
        recipe_file.read_text()
        .replace("  zero:\n", "  zero: &rl\n")
        .replace("    sampling:", "    train: {chunk_tokens: 64}\n    sampling:")
    )
    recipe_file.write_text(text + "  again: {<<: *rl, model: zero}\n")
    stages = load_recipe(recipe_file, ["stages.zero.train.chunk_tokens=128"]).stages
    assert (stages["zero"].train.chunk_tokens, stages["again"].train.chunk_tokens) == (128, 64)


def test_an_overlay_is_laid_over_the_recipe(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cluster").mkdir()
    overlay = tmp_path / "cluster/small.yaml"
    overlay.write_text(
        "run: {ranks: 8}\nlayout: {tp: 2}\n"
        "stages: {zero: {updates: 4, sampling: {temperature: {0: 0.5}}, prompts: {sums: {source: {kind: jsonl, path: other.jsonl}}}}}\n"
    )
    (tmp_path / "cluster/other.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n')
    recipe = load_recipe(recipe_file, ["layout.cp=2", "cluster/small.yaml", "run.ranks=4"])
    zero = recipe.stages["zero"]
    assert zero.kind == "grpo"
    # What is given later wins; mappings are merged, and a schedule is one value.
    assert (recipe.run.ranks, recipe.layout.tp, recipe.layout.cp) == (4, 2, 2)
    assert (zero.updates, zero.sampling.temperature, zero.optimizer.lr) == (4, {0: 0.5}, 3e-6)
    source = zero.prompts["sums"].source
    assert source.kind == "jsonl" and source.path == str(tmp_path / "cluster/other.jsonl")


def test_an_overlay_that_is_wrong_is_named(recipe_file: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    for text, said in (
        ("layuot: {tp: 2}", "unknown key 'layuot'; the nearest known key is 'layout'"),
        ("layout: {tp: two}", "'layout.tp': expected an integer; got 'two'"),
        ("stages: {one: {updates: 2}}", "there is no stage 'one'; the stages are base, zero"),
        ("- layout", "expected a mapping of keys"),
    ):
        overlay.write_text(text)
        assert str(overlay) in refusal(recipe_file, str(overlay)) and said in refusal(recipe_file, str(overlay))
    assert "absent.yaml: cannot be read" in refusal(recipe_file, str(tmp_path / "absent.yaml"))
    assert "expected key.path=value, such as stages.zero.updates=100, or a YAML file of keys" in refusal(recipe_file, "small")


def test_a_star_stands_for_every_stage_that_has_the_part(recipe_file: Path, tmp_path: Path) -> None:
    text = (
        recipe_file.read_text()
        + "  last: {kind: evaluate, models: {zero: zero}, suites: {aime_2024: {suite: aime_2024, data: aime.jsonl}}}\n"
    )
    recipe_file.write_text(text + "  again: {kind: grpo, model: zero, updates: 1, prompts: {}, rewards: {}, optimizer: {lr: 1e-6}}\n")
    assert "'stages.again.prompts'" in refusal(recipe_file)
    recipe_file.write_text(text)
    (tmp_path / "aime.jsonl").write_text("")
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text('stages: {"*": {optimizer: {beta1: 0.8, lr: 1e-5}}}')
    zero = load_recipe(recipe_file, [str(overlay), "stages.zero.optimizer.lr=2e-5"]).stages["zero"]
    assert zero.kind == "grpo" and (zero.optimizer.beta1, zero.optimizer.lr) == (0.8, 2e-5)
    assert "no stage of this recipe has 'optimiser'" in refusal(recipe_file, "stages.*.optimiser.lr=1")
