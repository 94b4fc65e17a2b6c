"""`r1mega run` with real torchrun processes and stages that need no model (dummy_worker.py)."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from r1mega.launch.status import logs
from r1mega.launch.status import status as told
from r1mega.pipeline.files import file_digest
from r1mega.pipeline.metrics import read_metrics
from r1mega.pipeline.rundir import RunDirectory
from r1mega.process import die_with_parent

TESTS = Path(__file__).parent
DRIVER = """
import functools, sys
from r1mega import cli
from r1mega.pipeline import launcher
launcher.run = functools.partial(launcher.run, worker="dummy_worker")
launcher.check_contents = lambda recipe: None  # test_pipeline_preflight.py; here it would load a tokenizer and weights that are not used
sys.exit(cli.main(["run", *sys.argv[1:]]))
"""
RECIPE = """
name: dummy
run: {ranks: 2}
stages:
  zero:
    kind: grpo
    model: model
    updates: 4
    prompts: {sums: {source: {kind: tiny, task: running_sum}}}
    measures: {}
    rewards: {own: {function: "own_reward:reward"}}
    optimizer: {lr: 1e-4}
  check:
    kind: evaluate
    models: {zero: zero}
    suites: {tiny: {prompts: {source: {kind: tiny, task: running_sum}}, judge: "own_reward:reward"}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    shutil.copy(TESTS.parent / "configs" / "tiny" / "base" / "config.json", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "own_reward.py").write_text("def reward(prompt, response):\n    return 1.0\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "recipe.yaml"


def start(recipe: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(recipe), "-o", str(recipe.parent / "run"), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=die_with_parent,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def alive(run: Path) -> list[int]:
    """Processes whose command line names the run directory, the launcher left out."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().decode().split("\0") if entry.name.isdigit() else []
        except OSError:
            continue
        if str(run) in command and "-o" not in command:
            found.append(int(entry.name))
    return found


def wait_until(condition, seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def status(run: Path) -> str:
    return json.loads((run / "summary.json").read_text())["status"]


def test_a_run_with_two_ranks_and_the_same_command_again(recipe: Path) -> None:
    code, out, err = finish(start(recipe))
    run = recipe.parent / "run"
    assert (code, err) == (0, "")
    assert "zero: grpo begins" in out and "zero: 4/4" in out and f"{run}" in out.splitlines()[-1]
    assert "a library prints" not in out and "a library prints" in (run / "logs" / "rank0.log").read_text()
    assert list(RunDirectory.open(run).finished()) == ["zero", "check"] and status(run) == "finished"
    assert [row["update"] for row in read_metrics(run / "stages" / "01-zero" / "metrics.jsonl")] == [1, 2, 3, 4]
    inputs = json.loads((run / "stages" / "01-zero" / "provenance.json").read_text())["inputs"]
    assert inputs["rewards.own.function"] == {"reference": "own_reward:reward", "digest": file_digest(recipe.parent / "own_reward.py")}
    before = (run / "stages" / "01-zero" / "provenance.json").stat().st_mtime_ns
    code, out, err = finish(start(recipe))
    assert (code, err) == (0, "") and "all stages are finished" in out
    assert (run / "stages" / "01-zero" / "provenance.json").stat().st_mtime_ns == before


def test_servers_are_waited_for_before_ranks_and_not_by_a_finished_run(recipe: Path) -> None:
    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    address = f"http://127.0.0.1:{server.server_port}"
    settings = ["rollout.engine=sglang", f"rollout.sglang.addresses=[{address}]", "rollout.sglang.start_timeout_s=60"]
    # Its socket takes connections, which nobody answers yet.
    process = start(recipe, *settings)
    assert process.stderr is not None
    said = process.stderr.readline()
    assert said == f"waiting for the SGLang server at {address}, at most 60 s\n" and not (recipe.parent / "run").exists()
    thread.start()
    assert finish(process)[0] == 0
    server.shutdown()
    server.server_close()
    code, out, err = finish(start(recipe, *settings))
    assert (code, err) == (0, "") and "all stages are finished" in out


def test_a_user_error_of_a_rank_is_one_line(recipe: Path) -> None:
    code, _, err = finish(start(recipe, "description=user error on rank 1"))
    assert (code, err) == (2, "r1mega: the prompts are missing; name a file\n")
    assert status(recipe.parent / "run") == "failed"


def test_a_crash_shows_the_traceback_of_the_rank_and_nothing_of_torchrun(recipe: Path) -> None:
    code, _, err = finish(start(recipe, "description=crash on rank 0"))
    assert code == 1
    assert err.startswith("Traceback") and "ArithmeticError: loss is NaN" in err and "rank 0 failed; logs: " in err
    assert "ChildFailedError" not in err and err.count("Traceback") == 1


def test_a_rank_that_is_killed_is_named_with_the_signal(recipe: Path) -> None:
    code, _, err = finish(start(recipe, "description=die on rank 1"))
    assert code == 1 and "rank 1 was killed by SIGKILL (out of memory?)" in err


@pytest.mark.slow
def test_a_stopped_run_leaves_no_process_and_goes_on_where_it_was(recipe: Path) -> None:
    run = recipe.parent / "run"
    for update, sign in ((1, signal.SIGKILL), (2, signal.SIGTERM), (3, signal.SIGINT)):
        process = start(recipe)
        wait_until(run.exists)
        (run / f"hold-{update}").touch()
        done = run / "stages" / "01-zero" / "done-0"
        wait_until(lambda done=done, update=update: done.exists() and done.read_text() == str(update))
        assert len(alive(run)) == 3
        process.send_signal(sign)
        code, _, err = finish(process)
        wait_until(lambda: not alive(run), 60)
        if sign != signal.SIGKILL:
            asked, ended = err.splitlines()
            assert code == 128 + sign and "what is under way is saved" in asked and status(run) == "interrupted"
            assert f"{sign.name}; the same command goes on with zero, of which there is no checkpoint yet: {run}" in ended
            assert told(run)[1] == f"zero   interrupted  update {update} of 4" and "rank0.log, the last start" in next(
                logs(run, None, None, False)
            )
        (run / f"hold-{update}").unlink()
    code, _, err = finish(start(recipe))
    assert (code, err) == (0, "")
    assert [row["update"] for row in read_metrics(run / "stages" / "01-zero" / "metrics.jsonl")] == [1, 2, 3, 4]


def test_bad_input_is_refused_before_a_folder_is_made(recipe: Path) -> None:
    for overrides, message in [
        (["stages.zero.updtes=1"], "the nearest known key is 'stages.zero.updates'"),
        (["stages.zero.rewards.own.function=own_reward:nothing"], "own_reward has no function 'nothing'"),
        (["stages.zero.model=zero/none"], "no folder"),
        (["run.ranks=3", "layout.tp=2"], "tp x cp x pp = 2"),
        (["run.ranks=8", "layout.tp=8", "layout.ep=8"], "stages.zero: layout: tp=8 does not divide"),
    ]:
        code, out, err = finish(start(recipe, *overrides))
        assert code == 2 and out == "" and message in err and err.count("\n") == 1
        assert not (recipe.parent / "run").exists()


def test_a_refused_run_makes_room_for_the_corrected_command(recipe: Path) -> None:
    code, _, _ = finish(start(recipe, "description=user error on rank 0", "run.ranks=1"))
    assert code == 2 and (recipe.parent / "run" / "stages" / "01-zero").is_dir()
    code, _, err = finish(start(recipe))
    assert (code, err) == (0, "")


def test_an_output_folder_that_cannot_be_made_is_one_line(recipe: Path) -> None:
    code, out, err = finish(start(recipe, "-o", str(recipe / "run")))
    assert (code, out) == (2, "") and "recipe.yaml is a file; choose another folder with -o" in err and err.count("\n") == 1
