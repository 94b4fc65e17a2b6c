"""`r1mega run --stage`: one stage on one machine or two nodes, stopped, refused; what `status` and `logs` tell of it (dummy_worker.py)."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from test_pipeline_run import RECIPE, TESTS, alive, finish, wait_until

from r1mega.config.loading import load_recipe
from r1mega.errors import UserError
from r1mega.launch.status import logs, status
from r1mega.pipeline import nodes, rundir
from r1mega.pipeline.files import read_json
from r1mega.pipeline.metrics import read_metrics
from r1mega.pipeline.rundir import claimed, joined
from r1mega.process import die_with_parent

pytestmark = pytest.mark.slow
DRIVER = """
import functools, sys
from r1mega import cli
from r1mega.pipeline import stage_task
stage_task.run_stage = functools.partial(stage_task.run_stage, worker="dummy_worker")
stage_task.check_contents = lambda recipe, only, local_ranks: None
sys.exit(cli.main(["run", *sys.argv[1:]]))
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    shutil.copy(TESTS.parent / "configs" / "tiny" / "base" / "config.json", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "own_reward.py").write_text("def reward(prompt, response):\n    return 1.0\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "recipe.yaml"


def start(
    recipe: Path, stage: str, *arguments: str, slurm: tuple[int, int, int] | None = None, modules: Path = TESTS
) -> subprocess.Popen[str]:
    """`slurm`: node, nodes and restart of a step's task. `modules`: a folder with some that stand in for installed ones."""
    paths = [str(TESTS.parent), str(TESTS), str(modules), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if slurm:
        node, count, restart = map(str, slurm)
        environment |= {"SLURM_STEP_NUM_NODES": count, "SLURM_NODEID": node, "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": restart}
    command = [sys.executable, "-c", DRIVER, str(recipe), "--stage", stage, "-o", str(recipe.parent / "run"), *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, preexec_fn=die_with_parent)


def rows(run: Path) -> list[int]:
    return [row["update"] for row in read_metrics(run / "stages/01-zero/metrics.jsonl")]


def outcomes(run: Path, stage: str = "zero") -> list[str | None]:
    return [attempt.outcome for _, attempt in nodes.attempts(run / "logs", stage)]


def hold(run: Path) -> None:
    wait_until(lambda: (run / "resolved.yaml").exists())
    (run / "hold-2").touch()
    wait_until(lambda: rows(run) == [1, 2])


def test_two_nodes_meet_and_the_next_stage_runs_alone(recipe: Path) -> None:
    run = recipe.parent / "run"
    second, first = start(recipe, "zero", slurm=(1, 2, 0)), start(recipe, "zero", slurm=(0, 2, 0))
    assert [finish(process)[0] for process in (first, second)] == [0, 0]
    assert outcomes(run) == ["finished"] and rows(run) == [1, 2, 3, 4]
    assert read_json(run / "stages/01-zero/provenance.json")["ranks"] == 2
    assert read_json(run / "summary.json")["status"] == "running"
    assert sorted(path.name for path in (run / "logs/zero/7-0").glob("rank?.log")) == ["rank0.log", "rank1.log"]
    assert finish(start(recipe, "check"))[0] == 0
    assert read_json(run / "summary.json")["status"] == "finished"
    told = status(run)
    assert told[1].split() == ["zero", "finished", "update", "4", "of", "4"] and "7-0" in told[2] and "2 nodes, 2 ranks" in told[2]
    assert told[3].startswith("check  finished") and "start-1" in told[4]
    assert any("zero: 4/4" in line for line in logs(run, "zero", None, False))
    assert any("a library prints" in line for line in logs(run, None, 1, False))


def test_a_node_of_servers_alone_ends_with_the_ranks(recipe: Path) -> None:
    engines = ("--engine-nodes", "1", "--gpus-per-node", "8")
    processes = [start(recipe, "zero", *engines, slurm=(node, 3, 0)) for node in (2, 1, 0)]
    run = recipe.parent / "run"
    assert [finish(process)[0] for process in processes] == [0, 0, 0]
    assert outcomes(run) == ["finished"] and read_json(run / "stages/01-zero/provenance.json")["ranks"] == 2
    assert finish(start(recipe, "zero", *engines, slurm=(2, 3, 1)))[0] == 0  # another attempt at what is finished
    code, _, err = finish(start(recipe, "zero", "--engine-nodes", "3", slurm=(2, 3, 1)))
    assert code == 2 and "--engine-nodes 3 leaves no node for ranks: the job has 3" in err


def test_a_node_of_servers_stays_while_ranks_save_and_leaves_when_nobody_comes(recipe: Path) -> None:
    run = recipe.parent / "run"
    (run / "logs/zero/7-0").mkdir(parents=True)  # as the first node, which is then lost, has done
    node = start(recipe, "zero", "run.ranks=1", "--engine-nodes", "1", "--grace", "3", slurm=(1, 2, 0))
    wait_until(lambda: (run / "logs/zero/7-0/engine/nodes/1/here.json").exists())
    node.send_signal(signal.SIGUSR1)
    time.sleep(1)
    assert node.poll() is None
    assert finish(node)[0] == 128 + signal.SIGTERM


def test_a_stage_whose_input_is_not_made_is_refused(recipe: Path) -> None:
    code, _, err = finish(start(recipe, "check"))
    assert code == 2 and "the stage 'zero' is not finished" in err
    assert outcomes(recipe.parent / "run", "check") == ["refused"]
    assert "refused: 'stages.check.models.zero'" in "\n".join(status(recipe.parent / "run"))
    code, _, err = finish(start(recipe, "chek"))
    assert code == 2 and "there is no stage 'chek'; the stages are zero, check" in err
    code, _, err = finish(start(recipe, "zero", "run.ranks=3", slurm=(0, 2, 0)))
    assert code == 2 and "run.ranks=3 does not divide over 2 nodes" in err


@pytest.mark.parametrize("sign", [signal.SIGUSR1, signal.SIGTERM])
def test_slurms_signals_to_all_processes_save_and_the_next_attempt_goes_on(recipe: Path, sign: signal.Signals) -> None:
    run = recipe.parent / "run"
    process = start(recipe, "zero", slurm=(0, 1, 0))
    hold(run)
    everybody = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    assert len(everybody) >= 4  # launcher, torchrun, two ranks
    for member in everybody:
        member.send_signal(sign)
    code, _, err = finish(process)
    assert code == 128 + sign and f"stopped by {sign.name}" in err
    assert not alive(run)
    assert outcomes(run) == ["stopped"] and rows(run) == [1, 2]
    (run / "hold-2").unlink()
    assert finish(start(recipe, "zero", slurm=(0, 1, 1)))[0] == 0
    assert outcomes(run) == ["stopped", "finished"] and rows(run) == [1, 2, 3, 4]


def test_ranks_that_do_not_save_in_time_are_ended(recipe: Path) -> None:
    run = recipe.parent / "run"
    process = start(recipe, "zero", "--grace", "0.5", slurm=(0, 1, 0))
    hold(run)
    (run / "deaf").touch()
    process.send_signal(signal.SIGUSR1)
    begin = time.monotonic()
    assert finish(process)[0] == 128 + signal.SIGUSR1 and time.monotonic() - begin < 30
    wait_until(lambda: not alive(run))
    assert outcomes(run) == ["stopped"]


def test_a_crash_is_told_with_the_traceback_and_kept_as_failed(recipe: Path) -> None:
    code, _, err = finish(start(recipe, "zero", "description=crash on rank 1", slurm=(0, 1, 0)))
    assert code == 1 and "ArithmeticError: loss is NaN" in err and "rank 1 failed" in err
    assert outcomes(recipe.parent / "run") == ["failed"]
    assert read_json(recipe.parent / "run/summary.json")["status"] == "failed"


def test_a_rank_that_dies_is_started_again_in_place(recipe: Path) -> None:
    run = recipe.parent / "run"
    assert finish(start(recipe, "zero", "--restarts", "1", "description=die once, 1", slurm=(0, 1, 0)))[0] == 0
    assert (run / "logs/died").exists() and outcomes(run) == ["finished"] and rows(run) == [1, 2, 3, 4]


def test_an_error_of_input_on_a_rank_is_refused_on_every_node(recipe: Path) -> None:
    arguments = ("zero", "description=user error on rank 1", "--grace", "1")
    second, first = (start(recipe, *arguments, slurm=(node, 2, 0)) for node in (1, 0))
    ends = [finish(second)]
    first.send_signal(signal.SIGTERM)  # what srun --kill-on-bad-exit does
    ends.append(finish(first))
    assert [code for code, _, _ in ends] == [2, 2] and all("r1mega: the prompts are missing; name a file" in err for _, _, err in ends)
    assert outcomes(recipe.parent / "run") == ["refused"]


def test_stages_of_one_run_hold_their_own_locks(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rundir, "_ENDING_S", 0.0)
    run, loaded = recipe.parent / "run", load_recipe(recipe)
    with joined(run, loaded, "zero"), joined(run, loaded.model_copy(update={"run": loaded.run.model_copy(update={"ranks": 4})}), "check"):
        assert load_recipe(run / "resolved.yaml") == loaded  # another number of ranks does not rewrite it
        refused: list[Callable[[], object]] = [lambda: joined(run, loaded, "zero"), lambda: claimed(run, loaded, fresh=False)]
        for attempt in refused:
            with pytest.raises(UserError, match="in use by another run"), attempt():  # type: ignore[attr-defined]
                pass
    with claimed(run, loaded, fresh=False):
        pass


def test_nodes_that_share_no_file_system_are_told_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="file system that all nodes share"):
        nodes.find_meeting(tmp_path, seconds=0.0)
    made = nodes.open_meeting(tmp_path)
    assert nodes.find_meeting(tmp_path, seconds=0.0) == made
    assert json.loads((tmp_path / "meeting.json").read_text())["port"] == made.port
