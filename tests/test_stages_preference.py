"""The preference stage on the shipped tiny base: what it learns, what it leaves, and that it goes on to the same bits."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from r1mega import env
from r1mega.config.chats import FilePreferences
from r1mega.config.layout import Layout
from r1mega.config.loading import load_recipe
from r1mega.config.training import Train
from r1mega.data.preferences import View, read_judged, read_pairs
from r1mega.errors import UserError
from r1mega.megatron import platform, reward_model
from r1mega.megatron.policy import Policy
from r1mega.megatron.reward_model import RewardModel
from r1mega.pipeline.artifacts import Provenance
from r1mega.pipeline.metrics import read_metrics
from r1mega.pipeline.model_folder import ModelFolder
from r1mega.pipeline.rundir import claimed
from r1mega.pipeline.worker import run_stages, stage_function
from r1mega.report.progress import Progress
from r1mega.weights.architecture import Architecture, read_config

transformers = pytest.importorskip("transformers")
BASE = Path(__file__).parents[1] / "configs/tiny/base"
RECIPE = """
name: toy
run: {platform: cpu, ranks: 1}
stages:
  judge:
    kind: preference
    model: %s
    loss: pairwise
    data: {kind: file, path: %s}
    sees: summary
    template: none
    batch: 16
    optimizer: {lr: 1.0e-3, min_lr: 1.0e-4, decay: cosine, warmup: 4}
    train: {chunk_tokens: 512}
    export_dtype: float32
    save_every: 4
"""
pytestmark = [pytest.mark.lane, pytest.mark.slow]


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    platform.start("cpu", 1)
    yield
    platform.stop()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Questions of two numbers; the better summary is that of the larger one, and the thought says nothing of it."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, 10, (400, 2), generator=generator).tolist()
    rows = []
    for index, (a, b) in enumerate(numbers):
        first, second = ("so", "wait") if index % 2 else ("wait", "so")
        good, bad = (f"<think> {word} {a} </think> <answer> {end} </answer>" for word, end in ((first, max(a, b)), (second, "wait")))
        rows.append({"prompt": f"en {a} {b} :", "chosen": good, "rejected": bad, "response": good, "label": True})
        rows.append({"prompt": f"en {a} {b} :", "chosen": good, "rejected": bad, "response": bad, "label": False})
    path = tmp_path / "judged.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(folder: Path, data: Path, *overrides: str) -> tuple[Path, list[dict[str, Any]]]:
    """Run the stage on one rank; returns its folder and its metrics rows."""
    path = data.with_name("recipe.yaml")
    path.write_text(RECIPE % (BASE, data), encoding="utf-8")
    recipe = load_recipe(path, list(overrides))
    with claimed(folder, recipe, fresh=False) as (directory, _):
        run_stages(directory, (), env.Ranks(0, 1, 0), Progress.silent(), stage_function, lambda: None)
    stage = folder / "stages/01-judge"
    return stage, read_metrics(stage / "metrics.jsonl")


def source(data: Path) -> FilePreferences:
    return FilePreferences(kind="file", path=str(data))


def scores_of(folder: Path, ids: list[tuple[int, ...]]) -> list[float]:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(model).__name__ == "DeepseekV3ForSequenceClassification" and model.num_labels == 1
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(sequence) for sequence in ids], batch_first=True)
    with torch.no_grad():
        alone = [model(torch.tensor([sequence])).logits.item() for sequence in ids]
        together = model(padded, attention_mask=(padded != 0).long()).logits[:, 0]
    assert together.tolist() == pytest.approx(alone, abs=1e-5) and model.config.pad_token_id == 0
    return alone


def test_pairs_are_learnt_and_the_artifact_is_what_transformers_opens(data: Path, tmp_path: Path) -> None:
    stage, rows = run(tmp_path / "run", data)
    made = Provenance.read(stage)
    assert made is not None
    print({name: made.metrics[name] for name in ("accuracy", "margin", "n_train", "n_test", "sequences", "tokens")})
    assert made.metrics["accuracy"]["value"] >= 0.95 and made.metrics["accuracy"]["ci95"][0] > 0.9
    assert made.metrics["n_train"] + made.metrics["n_test"] == 800 and made.metrics["sequences"] == 1600
    updates = -(-made.metrics["n_train"] // 16)
    assert [row["update"] for row in rows] == list(range(1, updates + 1)) and made.metrics["updates"] == updates
    assert rows[0]["lr"] == 2.5e-4 and rows[3]["lr"] == 1e-3 and rows[-1]["lr"] < 1.1e-4
    assert sum(row["sequences"] for row in rows) == 2 * made.metrics["n_train"]

    base, config = ModelFolder(BASE), read_config(stage / "artifact")
    assert Architecture.from_hf(config) == base.arch.scored() and config["num_labels"] == 1
    view = View.of(config)
    assert view == View("summary", "none")
    pairs = list(read_pairs(source(data)))[:40:2]
    prompts = [pair.prompt for pair in pairs for _ in pair.answers]
    ids = view.encode(prompts, [answer for pair in pairs for answer in pair.answers], base.tokenizer)
    expected = scores_of(stage / "artifact", ids)
    assert sum(chosen > rejected for chosen, rejected in zip(expected[0::2], expected[1::2], strict=True)) >= 19

    policy = Policy(base.arch, Layout(), Train(chunk_tokens=512), None)
    with base.open() as reader:
        policy.exchange.load(reader.read)
    model = RewardModel(policy, stage / "artifact")
    assert model.view == view and model.scores(ids).tolist() == pytest.approx(expected, abs=1e-5)


def test_judged_answers_are_learnt(data: Path, tmp_path: Path) -> None:
    stage, _ = run(tmp_path / "run", data, "stages.judge.loss=pointwise", "stages.judge.sees=all", "stages.judge.epochs=2")
    made = Provenance.read(stage)
    assert made is not None
    print({name: made.metrics[name] for name in ("accuracy", "auc")})
    assert made.metrics["accuracy"]["value"] >= 0.95 and made.metrics["auc"]["value"] >= 0.95
    assert made.metrics["sequences"] == 800
    assert len(list(read_judged(source(data)))) == 800


def test_a_stage_that_broke_off_goes_on_to_the_same_bits(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = ["stages.judge.train.async_save=false", "stages.judge.epochs=2", "stages.judge.batch=128"]
    straight, rows = run(tmp_path / "straight", data, *changes)
    steps, true_step = iter(range(100)), reward_model.step

    def breaking(*arguments: Any) -> Any:
        if next(steps) == 6:
            raise RuntimeError("power cut")
        return true_step(*arguments)

    monkeypatch.setattr(reward_model, "step", breaking)
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "broken", data, *changes)
    monkeypatch.setattr(reward_model, "step", true_step)
    broken, resumed = run(tmp_path / "broken", data, *changes)
    one, other = (load_file(stage / "artifact/model.safetensors") for stage in (straight, broken))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert "score.weight" in one and not any(name.startswith(("lm_head", "model.layers.3.")) for name in one)
    for row, again in zip(rows, resumed, strict=True):
        assert {k: v for k, v in row.items() if not k.startswith("seconds")} == {
            k: v for k, v in again.items() if not k.startswith("seconds")
        }


def test_judgements_that_cannot_be_used(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none of the 800 judgements fits into 8 tokens \(train.chunk_tokens\)"):
        run(tmp_path / "short", data, "stages.judge.train.chunk_tokens=8")
    first, *rest = data.read_text(encoding="utf-8").splitlines()
    long = json.dumps({**json.loads(first), "chosen": "so " * 600})
    data.write_text("\n".join([long, *rest]), encoding="utf-8")
    with pytest.raises(UserError, match=r"1 of 800 judgements are about answers of more than 512 tokens .* or set too_long: drop"):
        run(tmp_path / "refused", data, "stages.judge.too_long=refuse")
    data.write_text(first, encoding="utf-8")
    with pytest.raises(UserError, match=r"the 1 judgements leave . to train on and . to measure with at test_share=0.1"):
        run(tmp_path / "one", data)
