"""`r1mega run`: claim the run directory, start the ranks with torchrun, pass signals on, say what went wrong."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from r1mega import env
from r1mega.config.loading import load_recipe
from r1mega.errors import UserError
from r1mega.pipeline import files
from r1mega.pipeline.preflight import check_contents, check_references
from r1mega.pipeline.rundir import RunDirectory, check_belongs, claimed
from r1mega.process import die_with_parent

_GRACE_S = 20.0
_WORKER = "r1mega.pipeline.worker"


def run(recipe_path: Path, overrides: Sequence[str] = (), run_dir: Path | None = None, fresh: bool = False, worker: str = _WORKER) -> int:
    """Run a recipe, or go on with it where an earlier start stopped.

    Args:
        recipe_path: the recipe's YAML file.
        overrides: `key.path=value`, values in YAML.
        run_dir: folder of the run; left out: `runs/<recipe name>`.
        fresh: delete an earlier run in that folder first.
        worker: module that torchrun starts on every rank.

    Returns:
        Exit code: 0 finished, 1 failed (the traceback of the first rank that failed is on stderr), 128 + N stopped by signal N.

    Raises:
        UserError: the recipe, the folder or the input of a stage cannot be used.
    """
    begin = time.monotonic()
    recipe = load_recipe(recipe_path, overrides)
    path = (run_dir or Path("runs") / recipe.name).absolute()
    check_belongs(path, recipe, fresh)
    check_references(recipe, recipe_path.parent.absolute())
    check_contents(recipe)
    with claimed(path, recipe, fresh) as (directory, lock):
        directory.check_finished()
        if set(directory.finished()) == set(recipe.stages):
            print(f"all stages are finished: {path}")
            directory.write_summary("finished")
            return 0
        directory.write_summary("running")
        code = _Ranks(directory, recipe_path.parent.absolute(), lock, worker).wait()
        stopped = code > 128
        directory.write_summary("finished" if code == 0 else "interrupted" if stopped else "failed")
        if code == 0:
            print(f"finished in {time.monotonic() - begin:.1f} s: {path}")
        elif stopped:
            name = signal.Signals(code - 128).name
            print(f"stopped by {name}; the same command goes on from the last checkpoint: {path}", file=sys.stderr)
        else:
            _explain_failure(directory.logs)
        return code


class _Ranks:
    """The torchrun process of a run, and the signals that reach it."""

    def __init__(self, directory: RunDirectory, recipe_folder: Path, lock: int, worker: str) -> None:
        settings = directory.recipe.run
        self._received: int | None = None
        directory.logs.mkdir(exist_ok=True)
        for old in directory.logs.glob("*.error.json"):
            old.unlink()
        environment = env.for_ranks(settings.threads_per_rank, settings.platform)
        # A user's own rewards lie beside the recipe; last, so that they never shadow a library.
        known = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([known, str(recipe_folder)] if known else [str(recipe_folder)])
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(settings.ranks)]
        with (directory.logs / "torchrun.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "-m", worker, str(directory.path)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stderr=log,
                pass_fds=(lock,),
                # Ctrl-C reaches this process alone, which passes it on once.
                start_new_session=True,
                preexec_fn=lambda: die_with_parent(signal.SIGTERM),
            )

    def wait(self) -> int:
        """Wait for the ranks to end; returns the run's exit code."""
        handlers = {sign: signal.signal(sign, self._forward) for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            code = None
            while code is None and self._received is None:
                code = self._ended(0.5)
            # A signal can arrive while the last look is under way, and the ranks be gone before it ends: still a stopped run.
            if self._received is None or code == 0:
                return 1 if code else 0
            if self._ended(_GRACE_S) is None:
                # Ranks die with torchrun: each asked for SIGKILL at its parent's death.
                self._process.kill()
                self._process.wait()
            return 128 + self._received
        finally:
            for sign, handler in handlers.items():
                signal.signal(sign, handler)
            if sys.stdout.isatty():
                sys.stdout.write("\x1b[?25h")  # a rank that was killed while its display was live left the cursor hidden

    def _ended(self, seconds: float) -> int | None:
        """Torchrun's exit code, None where it still runs after so many seconds."""
        try:
            return self._process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None

    def _forward(self, number: int, frame: Any) -> None:
        self._received = number
        # Always SIGTERM: a rank that waits in a collective would not see a KeyboardInterrupt before the collective's timeout.
        self._process.send_signal(signal.SIGTERM)


def _explain_failure(logs: Path) -> None:
    """Raise the first rank's UserError, or print the first rank's traceback."""
    errors = sorted((files.read_json(path) for path in logs.glob("*.error.json")), key=lambda error: float(error["time"]))
    if not errors:
        _explain_death(logs)
    elif errors[0]["user"]:
        raise UserError(errors[0]["message"])
    else:
        print(errors[0]["traceback"], end="", file=sys.stderr)
        print(f"rank {errors[0]['rank']} failed; logs: {logs}", file=sys.stderr)


def _explain_death(logs: Path) -> None:
    """Print the end of what a rank left that died without an exception, killed or crashed in native code."""
    report = _text(logs / "torchrun.log").rpartition("Root Cause")[2]
    found = re.search(r"rank\s*: (\d+).*?exitcode\s*: (-?\d+)", report, re.DOTALL)
    if found is None:
        print("\n".join(_text(logs / "torchrun.log").splitlines()[-20:]), file=sys.stderr)
        print(f"the ranks did not start; logs: {logs}", file=sys.stderr)
        return
    rank, code = int(found[1]), int(found[2])
    print("\n".join(_text(logs / f"rank{rank}.log").splitlines()[-20:]), file=sys.stderr)
    cause = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
    hint = " (out of memory?)" if code == -signal.SIGKILL else ""
    print(f"rank {rank} {cause}{hint}; logs: {logs}", file=sys.stderr)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
