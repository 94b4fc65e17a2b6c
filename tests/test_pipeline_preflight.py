import json
from pathlib import Path

import pytest

from r1mega.config.schema import Recipe
from r1mega.errors import UserError
from r1mega.pipeline.preflight import check_inputs, check_layouts, model_folder

CONFIG = Path(__file__).parent.parent / "configs" / "deepseek_v3" / "config.json"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(CONFIG.read_text())
    (folder / "model.safetensors").touch()
    return folder


def recipe(model: Path, reward: str = "r1mega.rewards.exact:accuracy", **changes: object) -> Recipe:
    source = {"source": {"kind": "tiny", "task": "running_sum"}}
    grpo = {
        "kind": "grpo",
        "updates": 1,
        "prompts": source,
        "rewards": {"right": {"function": reward}},
        "optimizer": {"lr": 1e-4},
    }
    suite = {"prompts": source, "judge": "r1mega.rewards.exact:accuracy", "measures": {"own": reward}}
    check = {"kind": "evaluate", "model": "second", "suites": {"tiny": suite}}
    stages = {"first": {**grpo, "model": str(model)}, "second": {**grpo, "model": "first"}, "check": check}
    return Recipe.model_validate({"name": "test", "stages": stages, **changes})


def test_a_stage_is_followed_to_the_folder_its_model_comes_from(model: Path) -> None:
    assert [model_folder(recipe(model), name) for name in ("first", "second", "check")] == [model] * 3


def test_functions_are_imported_from_the_recipe_s_folder(tmp_path: Path, model: Path) -> None:
    (tmp_path / "preflight_reward.py").write_text("def reward(prompt, response):\n    return 1.0\n\ndef one(response):\n    return 1.0\n")
    check_inputs(recipe(model, "preflight_reward:reward"), tmp_path)
    for function, message in [
        ("preflight_reward:nothing", "'stages.first.rewards.right.function': 'preflight_reward:nothing': preflight_reward has no function"),
        ("preflight_reward:one", "is called with (prompt, response) but is defined as one(response)"),
        ("preflight_absent:reward", "no module 'preflight_absent'"),
        ("preflight_reward", "write module:function"),
    ]:
        with pytest.raises(UserError) as error:
            check_inputs(recipe(model, function), tmp_path)
        assert message in str(error.value)


def test_a_folder_without_weights_is_refused(tmp_path: Path, model: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"'stages.first.model': .* has no \*\.safetensors"):
        check_inputs(recipe(model), tmp_path)


@pytest.mark.lane
def test_layouts_are_checked_against_the_model_and_name_the_numbers(model: Path) -> None:
    assert json.loads(CONFIG.read_text())["n_routed_experts"] == 256
    check_layouts(recipe(model, run={"ranks": 2}, layout={"ep": 2}))
    with pytest.raises(UserError, match=r"^stages\.first: layout: ep=3 does not divide 256, experts$"):
        check_layouts(recipe(model, run={"ranks": 3}, layout={"ep": 3}))
