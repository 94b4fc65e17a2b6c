import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.version import Version

from r1mega import cli
from r1mega.config.loading import load_recipe
from r1mega.config.schema import Recipe
from r1mega.errors import UserError
from r1mega.megatron.limits import MEGATRON_VERSION
from r1mega.pipeline.preflight import check_contents, check_layouts, check_references, origin

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "deepseek_v3" / "config.json"


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
        "prompts": {"sums": source},
        "measures": {},
        "rewards": {"right": {"function": reward}},
        "optimizer": {"lr": 1e-4},
    }
    suite = {"prompts": source, "judge": "r1mega.rewards.exact:accuracy", "measures": {"own": reward}}
    check = {"kind": "evaluate", "models": {"second": "second"}, "suites": {"tiny": suite}}
    stages = {"first": {**grpo, "model": str(model)}, "second": {**grpo, "model": "first"}, "check": check}
    return Recipe.model_validate({"name": "test", "stages": stages, **changes})


def test_a_stage_is_followed_to_the_folder_its_model_comes_from(model: Path) -> None:
    assert [origin(recipe(model), name) for name in ("first", "second")] == [model] * 2


def test_functions_are_imported_from_the_recipe_s_folder(tmp_path: Path, model: Path) -> None:
    (tmp_path / "preflight_reward.py").write_text("def reward(prompt, response):\n    return 1.0\n\ndef one(response):\n    return 1.0\n")
    check_references(recipe(model, "preflight_reward:reward"), tmp_path)
    for function, message in [
        ("preflight_reward:nothing", "'stages.first.rewards.right.function': 'preflight_reward:nothing': preflight_reward has no function"),
        ("preflight_reward:one", "is called with (prompt, response) but is defined as one(response)"),
        ("preflight_absent:reward", "no module 'preflight_absent'"),
        ("preflight_reward", "write module:function"),
    ]:
        with pytest.raises(UserError) as error:
            check_references(recipe(model, function), tmp_path)
        assert message in str(error.value)


def test_a_folder_without_weights_is_refused(tmp_path: Path, model: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"'stages.first.model': .* has no \*\.safetensors"):
        check_references(recipe(model), tmp_path)


def test_layouts_are_checked_against_the_model_and_name_the_numbers(model: Path) -> None:
    assert json.loads(CONFIG.read_text())["n_routed_experts"] == 256
    check_layouts(recipe(model, run={"ranks": 2}, layout={"ep": 2}))
    with pytest.raises(UserError, match=r"^stages\.first: layout: ep=3 does not divide 256, experts$"):
        check_layouts(recipe(model, run={"ranks": 3}, layout={"ep": 3}))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The shipped recipe beside a copy of the shipped base, with prompts of its own."""
    shutil.copytree(ROOT / "configs/tiny/base", tmp_path / "base")
    shutil.copy(ROOT / "configs/tiny/r1_zero.yaml", tmp_path)
    (tmp_path / "sums.jsonl").write_text('{"prompt": "en 3 + 1 :"}\n' * 2 + '{"prompt": "en 4 + 1 + 5 :"}\n')
    return tmp_path / "r1_zero.yaml"


SUMS = [
    "stages.zero.evaluation=null",
    "stages.zero.prompts.sums.split=all",
    "stages.zero.prompts.sums.source={kind: jsonl, path: sums.jsonl}",
]


def refused(tiny: Path, *overrides: str) -> str:
    """What a recipe with small prompts is refused with."""
    recipe = load_recipe(tiny, [text.replace("sums.jsonl", str(tiny.with_name("sums.jsonl"))) for text in [*SUMS, *overrides]])
    with pytest.raises(UserError) as error:
        check_references(recipe, tiny.parent)
        check_contents(recipe)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_shipped_recipe_passes_without_megatron() -> None:
    code = (
        "import sys; from pathlib import Path; from r1mega.config.loading import load_recipe; from r1mega.pipeline import preflight\n"
        "path = Path('configs/tiny/r1_zero.yaml'); recipe = load_recipe(path)\n"
        "preflight.check_references(recipe, path.parent); assert 'torch' not in sys.modules\n"
        "preflight.check_contents(recipe); assert 'megatron.core' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["rollout.engine=sglang", "rollout.sglang.addresses=[http://127.0.0.1:9]", "rollout.sglang.key_variable=R1MEGA_NO_SUCH_KEY"],
            "the environment variable R1MEGA_NO_SUCH_KEY, which the recipe names for an API key, is not set",
        ),
        (
            ["rollout.engine=sglang", "rollout.sglang.layout.tp=3"],
            "stages.zero: rollout.sglang.layout: tp / attn_dp = 3 does not divide the 4 attention heads; 2 or 4 would",
        ),
        (
            ["rollout.engine=sglang", "rollout.sglang.block_fp8=true"],
            "stages.zero: rollout.sglang.block_fp8: SGLang's FP8 kernels need a GPU; leave it out on a CPU",
        ),
        (
            ["rollout.engine=sglang", f"rollout.sglang.python={sys.executable}"],
            f"rollout.sglang.python: {sys.executable} is no interpreter with SGLang; run tools/install_sglang_cpu, or name another",
        ),
        (["stages.zero.train.dispatcher=deepep"], "stages.zero: train.dispatcher=deepep needs run.platform=cuda; on a CPU use alltoall"),
        (
            ["stages.zero.optimizer.offload=0.5"],
            "stages.zero: optimizer.offload=0.5 needs run.platform=cuda: on a CPU the states are on the",
        ),
        (["stages.zero.optimizer.moments=bfloat16"], "stages.zero: optimizer.moments, main_params and main_grads below float32 need"),
        (["stages.zero.train.fp8=blockwise"], "stages.zero: train.fp8=blockwise needs run.platform=cuda; on a CPU use fp8=none"),
        (["stages.zero.train.mtp_loss=0.3", "stages.zero.model={no_mtp}"], "stages.zero: train.mtp_loss=0.3 needs a model with"),
        (["run.ranks=8", "layout.tp=8", "layout.ep=8"], "stages.zero: layout: tp=8 does not divide"),
        (["run.ranks=64", "layout.pp=64", "layout.ep=1"], "stages.zero: layout: pp x vpp = 64"),
        (["run.ranks=2", "layout={pp: 2, pipeline: E|L}"], "stages.zero: layout: pipeline"),
        (["stages.zero.sampling.max_new_tokens=100000"], "'stages.zero.prompts.sums': sampling.max_new_tokens=100000 leaves no room"),
        (["stages.zero.train.chunk_tokens=32"], "'stages.zero.train.chunk_tokens': 32 is less than the 40 tokens of the longest prompt"),
        (["stages.zero.prompts.sums.template=r1_zero"], "'stages.zero.prompts.sums': prompt sums/"),
        (
            ["stages.zero.prompts.sums.source={kind: tiny, task: running_sum, size: 3000000}"],
            "'stages.zero.prompts.sums': running_sum has 2000000 problems, 3000000 were asked for",
        ),
    ],
)
def test_what_the_recipe_alone_gets_wrong(tiny: Path, overrides: list[str], message: str) -> None:
    shutil.copytree(tiny.parent / "base", tiny.parent / "no_mtp")
    edit_config(tiny.parent / "no_mtp", num_nextn_predict_layers=0)
    assert refused(tiny, *(text.replace("{no_mtp}", str(tiny.parent / "no_mtp")) for text in overrides)).startswith(message)


def test_replayed_routing_needs_experts(tiny: Path) -> None:
    replayed = load_recipe(tiny, ["rollout.routing_replay=rollout", "run.ranks=1", "layout.ep=1"])
    check_layouts(replayed)
    shutil.copy(ROOT / "configs/tiny/student/config.json", tiny.parent / "base")
    with pytest.raises(UserError, match=r"^stages\.zero: rollout\.routing_replay=rollout needs a model with experts"):
        check_layouts(replayed)


@pytest.mark.lane
def test_a_layout_that_one_version_of_megatron_trains_wrongly(tiny: Path) -> None:
    overrides = ["run.ranks=2", "layout.tp=2", "layout.ep=1"]
    if MEGATRON_VERSION < (0, 19):
        assert refused(tiny, *overrides).startswith("stages.zero: layout: tp=2 with ep x etp = 1: megatron-core 0.")
    else:
        check_layouts(load_recipe(tiny, overrides))


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda base: (base / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda base: (base / "config.json").write_text("[]"), "config.json must hold a JSON object"),
        (lambda base: edit_config(base, model_type="mamba"), "stages.zero: "),
        (lambda base: edit_config(base, vocab_size=64), "'stages.zero.model': .*the tokenizer has 128 tokens, the embedding only 64 rows"),
        (lambda base: edit_config(base, moe_intermediate_size=16), "'stages.zero.model': .*has shape .*, config.json says"),
        (lambda base: (base / "tokenizer.json").write_text("{"), "'stages.zero.model': .*its tokenizer cannot be loaded"),
        (lambda base: (base / "model.safetensors").write_bytes(b"no weights"), "'stages.zero.model': .*truncated or damaged"),
    ],
)
def test_what_is_wrong_with_the_model_s_folder(tiny: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(tiny.parent / "base")
    assert re.search(message, refused(tiny))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "sums.jsonl: no rows"),
        ('{"prompt": "en 3 :"}\n{"prompt"\n', "sums.jsonl:2: not JSON"),
        ('{"question": "en 3 :"}\n', "sums.jsonl:1: no field 'prompt'"),
        ('{"prompt": "en pi :"}\n', "holds text that the tokenizer does not know"),
        ('{"prompt": "' + "3 " * 600 + '"}\n', "has 601 tokens, more than the "),
    ],
)
def test_what_is_wrong_with_the_prompts(tiny: Path, text: str, message: str) -> None:
    tiny.with_name("sums.jsonl").write_text(text)
    found = refused(tiny)
    assert found.startswith("'stages.zero.prompts.sums': ") and message in found


def test_prompts_of_a_later_stage_are_held_against_the_model_it_comes_from(tiny: Path) -> None:
    suite = "{prompts: {source: {kind: jsonl, path: sums.jsonl}, split: all}, judge: 'r1mega.rewards.exact:accuracy'}"
    tiny.write_text(tiny.read_text() + f"  check:\n    kind: evaluate\n    models: {{zero: zero}}\n    suites: {{own: {suite}}}\n")
    assert refused(tiny, "stages.check.suites.own.sampling.max_new_tokens=100000").startswith("'stages.check.suites.own.prompts': ")


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            "{kind: distill, model: base, teacher: other, method: logits, data: {own: {kind: file, path: sums.jsonl}}, updates: 1, "
            "optimizer: {lr: 1e-4}}",
            "'stages.later.teacher': the student .*base and the teacher .*other have different tokenizers",
        ),
        (
            "{kind: preference, model: base, loss: pairwise, sees: all, data: {kind: file, path: sums.jsonl}, optimizer: {lr: 1e-4}}",
            "'stages.later.data': .*sums.jsonl:1: no field 'chosen'",
        ),
        (
            "{kind: rejection, endpoint: {url: 'http://127.0.0.1:1/v1', model: big, key_variable: R1MEGA_NO_SUCH_KEY}, "
            "prompts: {source: {kind: tiny, task: running_sum}}}",
            "'stages.later.endpoint': the environment variable R1MEGA_NO_SUCH_KEY, .* is not set",
        ),
    ],
)
def test_what_a_later_stage_needs_is_found_before_the_first_begins(tiny: Path, stage: str, message: str) -> None:
    shutil.copytree(tiny.parent / "base", tiny.parent / "other")
    tokenizer = tiny.parent / "other" / "tokenizer.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()), indent=3))
    tiny.write_text(tiny.read_text() + f"  later: {stage}\n")
    assert re.match(message, refused(tiny))


def test_a_language_model_is_no_reward_model(tiny: Path) -> None:
    shutil.copytree(tiny.parent / "base", tiny.parent / "other")
    weighed = f"stages.zero.reward_models={{helpful: {{model: {tiny.parent / 'other'}}}}}"
    assert re.match("stages.zero: .*other: not a reward model: ", refused(tiny, weighed))


def test_a_machine_without_a_gpu_is_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refused(tiny, "run.platform=cuda").startswith("run.platform=cuda: torch sees no CUDA device")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    cuda = "r1mega.megatron.platform.cuda"
    assert "Transformer Engine is missing; pip install" in refused(tiny, "run.platform=cuda")
    monkeypatch.setattr(f"{cuda}._installed", lambda module: True)
    monkeypatch.setattr(f"{cuda}._version", lambda name: Version("2.8.1"))
    assert "Transformer Engine 2.8.1 is older than 2.9; pip install" in refused(tiny, "run.platform=cuda")
    monkeypatch.setattr(f"{cuda}._version", lambda name: Version("2.14"))
    assert refused(tiny, "run.platform=cuda") == "run.platform=cuda: 2 ranks need a GPU each; this machine has 1"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    said = refused(tiny, "run.platform=cuda", "stages.zero.train.fp8=mxfp8")
    assert said == "stages.zero.train.fp8=mxfp8 needs Blackwell (compute capability 10.0); this GPU is NVIDIA H100"
    monkeypatch.setattr(f"{cuda}._installed", lambda module: module != "deep_ep")
    assert "DeepEP is missing; pip install" in refused(tiny, "run.platform=cuda", "stages.zero.train.dispatcher=deepep")


def test_eval_looks_at_its_output_before_it_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "absent" / "x.json"
    assert cli.main(["eval", str(tmp_path), "--suite", "running_sum", "--json", str(path)]) == 2
    assert capsys.readouterr() == ("", f"r1mega: --json {path}: cannot be written (No such file or directory)\n")


def test_check_finds_what_run_would_refuse(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["stages.zero.prompts.sums.source.size=20", "stages.zero.evaluation=null"]
    assert cli.main(["check", str(tiny), *overrides]) == 0
    assert capsys.readouterr().err == f"{tiny} can run here\n"
    (tiny.parent / "base" / "model.safetensors").write_bytes(b"no weights")
    assert cli.main(["check", str(tiny), *overrides]) == 2
    found = capsys.readouterr()
    assert found.out == "" and "truncated or damaged" in found.err and found.err.count("\n") == 1
    (tiny.parent / "base" / "model.safetensors").unlink()
    assert cli.main(["check", str(tiny), *overrides, "--dry-run"]) == 0
    lacks = f"'stages.zero.model': {tiny.parent / 'base'} has no *.safetensors; expected a Hugging Face model folder"
    assert capsys.readouterr().out.endswith(f"needs, and this machine lacks:\n  {lacks}\n")
