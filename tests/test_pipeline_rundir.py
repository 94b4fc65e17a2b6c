import json
import shutil
from pathlib import Path

import pytest

from r1mega import env
from r1mega.config.layout import Layout
from r1mega.config.schema import Recipe
from r1mega.errors import UserError
from r1mega.pipeline import artifacts, files, rundir
from r1mega.pipeline.context import StageContext
from r1mega.pipeline.metrics import MetricsWriter, read_metrics, scalars
from r1mega.pipeline.rundir import RunDirectory, claimed, first_difference
from r1mega.pipeline.worker import run_stages
from r1mega.report.progress import Progress


def recipe(model: Path, **changes: object) -> Recipe:
    stage = {
        "kind": "grpo",
        "model": str(model),
        "updates": 4,
        "prompts": {"sums": {"source": {"kind": "tiny", "task": "running_sum"}}},
        "measures": {},
        "rewards": {"right": {"function": "r1mega.rewards.exact:accuracy"}},
        "optimizer": {"lr": 1e-4},
    }
    suite = {"prompts": {"source": {"kind": "tiny", "task": "running_sum"}}, "judge": "r1mega.rewards.exact:accuracy"}
    check = {"kind": "evaluate", "models": {"zero": "zero"}, "suites": {"tiny": suite}, "seed": 9}
    return Recipe.model_validate({"name": "test", "stages": {"zero": stage, "check": check}, **changes})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def train(ctx: StageContext) -> dict[str, object]:
    with ctx.artifact() as folder:
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"trained")
    return {"pass@1": {"value": 0.5, "ci95": [0.4, 0.6]}, "seed": ctx.seed}


def measure(ctx: StageContext) -> dict[str, object]:
    assert ctx.stage.kind == "evaluate"
    assert (ctx.model_dir(ctx.stage.models["zero"]) / "model.safetensors").read_bytes() == b"trained"
    return {"seed": ctx.seed}


def run_all(run: RunDirectory, find=lambda kind: {"grpo": train, "evaluate": measure}[kind]) -> None:
    ranks = env.Ranks(rank=0, world_size=1, local_rank=0)
    run_stages(run, run.finished(), ranks, Progress.silent(), find, lambda: None)


def test_a_run_leaves_what_the_contract_says(tmp_path: Path, model: Path) -> None:
    with claimed(tmp_path / "run", recipe(model), fresh=False) as (run, _):
        run_all(run)
        run.write_summary("finished")
    assert sorted(path.name for path in (tmp_path / "run" / "stages").iterdir()) == ["01-zero", "02-check"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["recipe"], summary["status"]) == ("test", "finished")
    assert [(stage["name"], stage["kind"]) for stage in summary["stages"]] == [("zero", "grpo"), ("check", "evaluate")]
    assert summary["stages"][0]["metrics"]["pass@1"] == {"value": 0.5, "ci95": [0.4, 0.6]}
    assert [stage["metrics"]["seed"] for stage in summary["stages"]] == [1, 9]
    zero, check = RunDirectory.open(tmp_path / "run").finished().values()
    assert zero.artifact is not None and check.artifact is None
    assert zero.artifact["files"]["model.safetensors"] == files.file_digest(tmp_path / "run/stages/01-zero/artifact/model.safetensors")
    assert check.inputs == {"models.zero": {"reference": "zero", "digest": zero.artifact["digest"]}}
    assert zero.inputs["model"]["digest"] == files.combined_digest(files.digests(model))
    assert zero.code["packages"]["torch"] and zero.config["optimizer"]["lr"] == 1e-4


def test_finished_stages_are_skipped_and_the_unfinished_one_runs_again(tmp_path: Path, model: Path) -> None:
    def fail(ctx: StageContext) -> dict[str, object]:
        with ctx.artifact() as folder:
            (folder / "half").touch()
            raise ArithmeticError("loss is NaN")

    with claimed(tmp_path / "run", recipe(model), fresh=False) as (run, _):
        with pytest.raises(ArithmeticError):
            run_all(run, lambda kind: {"grpo": train, "evaluate": fail}[kind])
        assert list(run.finished()) == ["zero"]
        assert not (run.stage_dirs["check"] / "artifact").exists()
    calls = []
    with claimed(tmp_path / "run", recipe(model), fresh=False) as (run, _):
        run_all(run, lambda kind: calls.append(kind) or measure)
    assert calls == ["evaluate"]


def test_stages_made_from_what_is_no_longer_there_are_named(tmp_path: Path, model: Path) -> None:
    with claimed(tmp_path / "run", recipe(model), fresh=False) as (run, _):
        run_all(run)
        run.check_finished()
        zero, check = (run.stage_dirs[name] for name in ("zero", "check"))
        record = json.loads((zero / "provenance.json").read_text())
        files.write_json(zero / "provenance.json", record | {"artifact": record["artifact"] | {"digest": "another"}})
        with pytest.raises(UserError, match=rf"the artifact of zero is gone, or another one than check began .*: rm -r {check}$"):
            run.check_finished()
        files.write_json(zero / "provenance.json", record)
        (zero / "artifact" / "model.safetensors").unlink()
        with pytest.raises(UserError, match=rf"the artifact of zero is gone, .* zero, check began .*: rm -r {zero} {check}$"):
            run.check_finished()
        shutil.rmtree(zero)
        with pytest.raises(UserError, match=r"the artifact of zero is gone"):
            run.check_finished()
        shutil.rmtree(check)
        run.check_finished()


def test_another_configuration_is_refused_and_fresh_deletes_the_run(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "run"
    with claimed(path, recipe(model), fresh=False) as (run, _):
        run_all(run)
    refused = pytest.raises(UserError, match=r"'seed' was 1, is now 2; choose another folder with -o, or --fresh")
    with refused, claimed(path, recipe(model, seed=2), fresh=False):
        pass
    assert len(RunDirectory.open(path).finished()) == 2
    with claimed(path, recipe(model, seed=2), fresh=True) as (run, _):
        assert run.finished() == {} and RunDirectory.open(path).recipe.seed == 2
        assert not (path / "stages").exists()


def test_a_run_goes_on_with_other_ranks_and_another_layout(tmp_path: Path, model: Path) -> None:
    before = recipe(model)
    after = before.model_copy(update={"layout": Layout(ep=2), "run": before.run.model_copy(update={"ranks": 2})})
    with claimed(tmp_path / "run", before, fresh=False) as (run, _):
        run_all(run)
    with claimed(tmp_path / "run", after, fresh=False) as (run, _):
        assert list(run.finished()) == ["zero", "check"]
        assert RunDirectory.open(tmp_path / "run").recipe == after


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path, model: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for fresh in (False, True):
        with pytest.raises(UserError, match="is not empty and not a run directory"), claimed(tmp_path, recipe(model), fresh=fresh):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "notes.txt"]
    with pytest.raises(UserError, match="is a file"), claimed(tmp_path / "notes.txt", recipe(model), fresh=False):
        pass


def test_two_runs_do_not_share_a_folder(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rundir, "_ENDING_S", 0.5)
    monkeypatch.setattr(rundir, "_SAY_S", 0.1)
    run, told = tmp_path / "run", list[str]()
    with claimed(run, recipe(model), fresh=False):
        with pytest.raises(UserError, match="is in use by another run"), claimed(run, recipe(model), fresh=True, note=told.append):
            pass
        assert (run / "resolved.yaml").exists() and told == [f"{run} is in use; waiting at most 0.5 s for a run there that ends"]
    with claimed(run, recipe(model), fresh=False):
        pass


def test_the_order_of_stages_is_part_of_the_configuration() -> None:
    assert first_difference({"a": 1, "b": [1, {"c": 2}]}, {"a": 1, "b": [1, {"c": 3}]}) == ("b.1.c", "2", "3")
    assert first_difference({"a": 1}, {"a": 1, "b": 2}) == ("b", "'absent'", "2")
    assert first_difference({"a": [1]}, {"a": [1, 2]}) == ("a", "[1]", "[1, 2]")
    assert first_difference({"a": 1}, {"a": 1}) is None


def test_a_model_that_is_not_there_names_the_stage_or_the_file(tmp_path: Path, model: Path) -> None:
    with claimed(tmp_path / "run", recipe(model), fresh=False) as (run, _):
        with pytest.raises(UserError, match=r"stage 'zero' is not finished.*run it first"):
            run.model("zero")
        assert run.model(str(model)) == model
    with claimed(tmp_path / "run", recipe(model), fresh=False) as (run, _):
        run_all(run)
        zero = run.stage_dirs["zero"]
    (zero / "metrics.jsonl").touch()
    with pytest.raises(UserError, match=rf"is the folder of a run's stage; name its artifact, {zero}/artifact"):
        artifacts.check_model(zero, "model")
    (zero / "provenance.json").unlink()
    with pytest.raises(UserError, match=r"it is not finished: run that stage first"):
        artifacts.check_model(zero, "model")
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no \*\.safetensors"):
        artifacts.check_model(model, "model")
    (model / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config\.json"):
        artifacts.check_model(model, "model")


def test_provenance_holds_no_absolute_path_below_the_working_directory(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stage = recipe(model).stages["zero"]
    assert artifacts.portable(stage)["model"] == "model"
    assert artifacts.input_digests(stage, {})["model"]["reference"] == "model"


def test_the_combined_digest_changes_with_any_byte_and_any_name(model: Path) -> None:
    before = files.combined_digest(files.digests(model))
    (model / "model.safetensors").write_bytes(b"weightz")
    changed = files.combined_digest(files.digests(model))
    (model / "model.safetensors").rename(model / "other.safetensors")
    assert len({before, changed, files.combined_digest(files.digests(model))}) == 3


def test_metrics_of_a_resumed_stage_drop_the_rows_past_it(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, enabled=True)
    for update in range(1, 6):
        writer.write({"update": update, "loss": float("nan") if update == 2 else 1.0 / update})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"update": 6, "lo')
    assert [row["update"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert read_metrics(tmp_path / "metrics.jsonl")[1]["loss"] is None

    writer = MetricsWriter(tmp_path, enabled=True)
    writer.resume(after=3)
    writer.write({"update": 4, "loss": 7.0})
    with pytest.raises(RuntimeError):
        writer.resume(after=2)
    writer.close()
    assert [(row["update"], row["loss"]) for row in read_metrics(tmp_path / "metrics.jsonl")][2:] == [(3, 1 / 3), (4, 7.0)]

    writer = MetricsWriter(tmp_path, enabled=True)
    writer.write({"update": 1, "loss": 1.0})
    writer.close()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_other_ranks_write_no_metrics(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, enabled=False)
    writer.write({"update": 1})
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_scalars_flatten_measured_values() -> None:
    row = {"update": 3, "loss": 1, "eval/x/pass@1": {"value": 0.5, "ci95": [0.4, 0.6]}, "time": {"rollout": 2.0}, "note": "x", "flag": True}
    assert dict(scalars(row)) == {"loss": 1.0, "eval/x/pass@1": 0.5, "time/rollout": 2.0}


def test_tensorboard_gets_every_scalar_once_after_a_resume(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for after, updates in ((-1, range(1, 5)), (2, range(3, 6))):
        writer = MetricsWriter(tmp_path, enabled=True)
        writer.resume(after=after)
        for update in updates:
            writer.write({"update": update, "reward/mean": float(update)})
        writer.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [(n, float(n)) for n in range(1, 6)]


def test_a_run_that_left_nothing_makes_room_for_another_configuration(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "run"
    with claimed(path, recipe(model), fresh=False) as (run, _):
        run.write_summary("failed")
        run.stage_dirs["zero"].mkdir(parents=True)
        (run.stage_dirs["zero"] / "metrics.jsonl").touch()
        run.logs.mkdir()
        (run.logs / "rank0.log").write_text("refused")
    with claimed(path, recipe(model, seed=2), fresh=False) as (run, _):
        assert RunDirectory.open(path).recipe.seed == 2
        assert not (path / "stages").exists() and (path / "logs/rank0.log").read_text() == "refused"


@pytest.mark.parametrize("left", ["stages/01-zero/metrics.jsonl", "stages/01-zero/checkpoints/update-000016/part", "notes.txt"])
def test_a_run_that_left_anything_keeps_its_folder(tmp_path: Path, model: Path, left: str) -> None:
    path = tmp_path / "run"
    with claimed(path, recipe(model), fresh=False):
        (path / left).parent.mkdir(parents=True, exist_ok=True)
        (path / left).write_text("x")
    before = (path / "resolved.yaml").read_text()
    with pytest.raises(UserError, match="'seed' was 1, is now 2"), claimed(path, recipe(model, seed=2), fresh=False):
        pass
    assert (path / left).read_text() == "x" and (path / "resolved.yaml").read_text() == before


def test_a_checkpoint_that_is_a_link_is_kept(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "run"
    with claimed(path, recipe(model), fresh=False):
        (path / "stages" / "01-zero").mkdir(parents=True)
        (path / "stages" / "01-zero" / "checkpoints").symlink_to(model)
    with pytest.raises(UserError, match="'seed' was 1, is now 2"), claimed(path, recipe(model, seed=2), fresh=False):
        pass


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def message(folder: str) -> str:
        with pytest.raises(UserError) as error, claimed(tmp_path / folder, recipe(model), fresh=False):
            pass
        return str(error.value)

    assert message("model/config.json/a/run") == f"{model}/config.json is a file; choose another folder with -o"
    assert "the run cannot be written there (File name too long); choose another folder with -o" in message("x" * 300)
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError(2, "No such file or directory")))
    assert "run: the run cannot be written there (No such file or directory)" in message("run")
    monkeypatch.setattr("os.access", lambda *_: False)
    assert "a/run: the run cannot be written there (Permission denied)" in message("a/run")


def test_whether_a_file_can_be_written_is_found_out_without_a_trace(tmp_path: Path) -> None:
    files.check_writable(tmp_path / "metrics.json", "--json")
    assert list(tmp_path.iterdir()) == []
    for path, message in [(tmp_path, "is a folder"), (tmp_path / "no" / "x.json", "cannot be written"), (Path("/"), "is a folder")]:
        with pytest.raises(UserError, match=f"^--json {path}: {message}"):
            files.check_writable(path, "--json")
