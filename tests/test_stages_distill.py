"""The distill stage on the shipped tiny base: a student that was pushed away comes back to its teacher, and goes on to the same bits."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from r1mega import env
from r1mega.config.chats import TinyChats
from r1mega.config.loading import load_recipe
from r1mega.config.prompts import PromptSet, TinyPrompts
from r1mega.data.chats import read_chats
from r1mega.data.sources import load_prompts
from r1mega.data.supervision import supervised
from r1mega.data.templates import encode
from r1mega.errors import UserError
from r1mega.megatron import platform
from r1mega.pipeline.metrics import read_metrics
from r1mega.pipeline.model_folder import ModelFolder
from r1mega.pipeline.rundir import claimed
from r1mega.pipeline.worker import run_stages, stage_function
from r1mega.report.progress import Progress
from r1mega.rollout.engine import Request, SamplingParams, Scoring
from r1mega.rollout.local import LocalEngine
from r1mega.stages import training

BASE = Path(__file__).parents[1] / "configs/tiny/base"
METHODS: dict[str, dict[str, Any]] = {
    "on_policy": {
        "prompts": {"source": {"kind": "tiny", "task": "running_sum"}, "template": "chat", "limit": 64},
        "samples_per_prompt": 2,
        "sampling": {"max_new_tokens": 24},
        "batch": 128,
        "updates": 8,
        "optimizer": {"lr": 5e-4},
    },
    "logits": {
        "data": {"errands": {"kind": "tiny", "task": "errand", "size": 200}},
        "top_k": 8,
        "batch": 48,
        "updates": 16,
        "optimizer": {"lr": 2e-3},
    },
}
pytestmark = pytest.mark.lane


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    platform.start("cpu", 1)
    yield
    platform.stop()


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with noise in its weights."""
    folder = tmp_path_factory.mktemp("models") / "student"
    shutil.copytree(BASE, folder)
    generator = torch.Generator().manual_seed(0)
    weights = load_file(folder / "model.safetensors")
    noisy = {
        name: (value.float() * (1 + 0.5 * torch.randn(value.shape, generator=generator))).to(value.dtype) if value.dim() == 2 else value
        for name, value in weights.items()
    }
    save_file(noisy, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def recipe(folder: Path, student: Path, method: str, **settings: Any) -> Path:
    stage = {
        "kind": "distill",
        "model": str(student),
        "teacher": str(BASE),
        "method": method,
        "train": {"chunk_tokens": 2048},
        "export_dtype": "float32",
        "save_every": 0,
    }
    folder.mkdir(exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"name": "toy", "run": {"platform": "cpu"}, "stages": {"learn": stage | METHODS[method] | settings}}))
    return path


def run(folder: Path, path: Path) -> tuple[Path, list[dict[str, Any]]]:
    """Run the stage on one rank; returns its folder and its metrics rows."""
    with claimed(folder, load_recipe(path, ["run.ranks=1"]), fresh=False) as (directory, _):
        run_stages(directory, (), env.Ranks(0, 1, 0), Progress.silent(), stage_function, lambda: None)
    return folder / "stages/01-learn", read_metrics(folder / "stages/01-learn/metrics.jsonl")


def loaded(model: ModelFolder) -> LocalEngine:
    engine = LocalEngine(model.path)
    with model.open() as reader:
        engine.load_weights(reader.tensors(model.arch), version=0)
    return engine


def drawn(model: ModelFolder) -> list[Scoring]:
    """Answers that the model draws to questions of the tiny task."""
    prompts = load_prompts(PromptSet(source=TinyPrompts(kind="tiny", task="running_sum"), limit=100), Path())
    requests = [Request(ids, seed, 24) for seed, ids in enumerate(encode(prompts, "chat", model.tokenizer, 400))]
    samples = loaded(model).generate(requests, SamplingParams(stop_token_ids=model.stop_token_ids))
    return [Scoring(one.prompt_ids + one.response_ids, len(one.prompt_ids)) for one in samples]


def written(model: ModelFolder) -> list[Scoring]:
    """Conversations that no stage here trains on."""
    found = [supervised(one, "chat", model.tokenizer, "")[0] for one in read_chats(TinyChats(kind="tiny", task="errand", size=100, seed=9))]
    return [Scoring(one.ids, one.learnt.index(True)) for one in found]


def divergence(first: ModelFolder, second: ModelFolder, scorings: list[Scoring]) -> float:
    """KL(first || second) in nats a token, summed over the whole vocabulary."""
    found = [loaded(model).score(scorings, model.arch.vocab) for model in (first, second)]
    p, q = (torch.cat([torch.zeros_like(s.top_logprobs).scatter(1, s.top_ids, s.top_logprobs) for s in scores]) for scores in found)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_student_comes_nearer_to_its_teacher(method: str, student: Path, tmp_path: Path) -> None:
    stage, rows = run(tmp_path / "run", recipe(tmp_path, student, method))
    losses = [row["loss"] for row in rows]
    assert sum(losses[-4:]) / 4 < 0.4 * losses[0] and losses[0] > 0.2, losses
    models, teacher = [ModelFolder(student), ModelFolder(stage / "artifact")], ModelFolder(BASE)
    if method == "on_policy":
        before, after = (divergence(model, teacher, drawn(model)) for model in models)
    else:
        before, after = (divergence(teacher, model, written(teacher)) for model in models)
    print(f"{method}: {before:.3f} -> {after:.3f} nats a token")
    assert after < 0.25 * before and before > 0.1
    if method == "on_policy":
        assert all(row["rollout_gap/max"] < 1e-3 for row in rows)  # what was drawn is what is trained on
    else:
        assert all(0 < row["teacher_tail"] < 0.2 and row["loss"] > 0 for row in rows)
    summary = json.loads((tmp_path / "run/summary.json").read_text())["stages"][0]
    assert summary["kind"] == "distill" and summary["metrics"]["loss"] == losses[-1]
    assert load_file(student / "model.safetensors").keys() == load_file(stage / "artifact/model.safetensors").keys()


@pytest.mark.parametrize("method", METHODS)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(method: str, tmp_path: Path) -> None:
    _, (row,) = run(tmp_path / "run", recipe(tmp_path, BASE, method, updates=1))
    assert abs(row["loss"]) < 1e-5 and row["grad_norm"] < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_stage_that_was_stopped_goes_on_to_the_same_bits(
    method: str, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe(tmp_path, student, method, updates=4, save_every=2)
    straight, expected = run(tmp_path / "straight", path)

    class Stops(training.Checkpoints):
        polls = 0

        def poll(self) -> None:
            self.polls += 1
            if self.polls == 3:  # after update 3, when the newest checkpoint is that of update 2
                self.wait()
                raise InterruptedError
            super().poll()

    with monkeypatch.context() as patched:
        patched.setattr(training, "Checkpoints", Stops)
        with pytest.raises(InterruptedError):
            run(tmp_path / "broken", path)
    assert (tmp_path / "broken/stages/01-learn/checkpoints/update-000002").is_dir()
    broken, rows = run(tmp_path / "broken", path)
    one, other = (load_file(stage / "artifact/model.safetensors") for stage in (straight, broken))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    for first, second in zip(expected, rows, strict=True):
        assert {key: value for key, value in first.items() if "seconds" not in key} == {
            key: value for key, value in second.items() if "seconds" not in key
        }


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(BASE, other)
    text = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(text | {"version": "1.0"}, indent=1))
    with pytest.raises(UserError, match=r"the student .*other and the teacher .*base have different tokenizers"):
        run(tmp_path / "a", recipe(tmp_path, other, "logits"))
    with pytest.raises(UserError, match="top_k=128 leaves nothing of a vocabulary of 128; lower it"):
        run(tmp_path / "b", recipe(tmp_path, BASE, "logits", top_k=128))
    for settings, reason in [
        ({"sampling": {"temperature": 0.7}}, "temperature and top_p must be 1"),
        ({"samples_per_prompt": 3}, "samples_per_prompt=3 does not divide batch=128"),
        ({"train": {"mtp_loss": 0.1}}, "train.mtp_loss must be 0"),
    ]:
        with pytest.raises(UserError, match=reason):
            load_recipe(recipe(tmp_path, BASE, "on_policy", **settings), [])
