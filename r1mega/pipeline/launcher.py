"""`r1mega run`: claim the run directory, start the ranks with torchrun, pass signals on, say what went wrong."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence, Set
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from r1mega import env
from r1mega.config.loading import load_recipe
from r1mega.errors import UserError
from r1mega.pipeline import files
from r1mega.pipeline.hangs import HUNG, Verdict, Watch
from r1mega.pipeline.preflight import check_contents, check_references
from r1mega.pipeline.rundir import RunDirectory, check_belongs, claimed
from r1mega.process import die_with_parent

_GRACE_S = 20.0
_RESTART_S = 600.0
"""In which torchrun has met the other nodes again, and the new ranks have imported what they begin with."""
_TURN_S = 0.5
RANK = "r1mega.pipeline.rank"
"""What torchrun starts on every rank,"""
WORKER = "r1mega.pipeline.worker"
"""and what that runs."""


def run(recipe_path: Path, overrides: Sequence[str] = (), run_dir: Path | None = None, fresh: bool = False, worker: str = WORKER) -> int:
    """Run a recipe, or go on with it where an earlier start stopped.

    Args:
        recipe_path: the recipe's YAML file.
        overrides: `key.path=value`, values in YAML.
        run_dir: folder of the run; left out: `runs/<recipe name>`.
        fresh: delete an earlier run in that folder first.
        worker: module that every rank runs.

    Returns:
        Exit code: 0 finished, 1 failed (the traceback of the first rank that failed is on stderr), 128 + N stopped by signal N, `HUNG`.

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
        arguments = ["--standalone", "--nproc-per-node", str(recipe.run.ranks), "-m", RANK, worker, str(directory.path)]
        watch = Watch(directory.logs, recipe.run.deadlines, recipe.run.ranks)
        ranks = Ranks(directory, recipe_path.parent.absolute(), (lock,), arguments, watch)
        code = ranks.wait()
        stopped = code > 128 or code == HUNG
        with suppress(OSError) if code else nullcontext():  # on a full disk the ranks have more to say
            directory.write_summary("finished" if code == 0 else "interrupted" if stopped else "failed")
        if code == 0:
            print(f"finished in {time.monotonic() - begin:.1f} s: {path}")
        elif ranks.hung is not None:
            print(f"{ranks.hung.line}; the same command goes on from the last checkpoint: {path}", file=sys.stderr)
        elif stopped:
            name = signal.Signals(code - 128).name
            print(f"stopped by {name}; the same command goes on from the last checkpoint: {path}", file=sys.stderr)
        else:
            explain_failure(directory.logs, watch.last_words())
        return code


@dataclass(frozen=True)
class Saving:
    """Signals after which ranks are asked, by a file that they look for, to save and leave."""

    signals: Set[signal.Signals]
    stop_file: Path
    grace_s: float


class Ranks:
    """The torchrun process of a run, and the signals that reach it."""

    def __init__(
        self,
        directory: RunDirectory,
        recipe_folder: Path,
        locks: tuple[int, ...],
        arguments: Sequence[str],
        watch: Watch,
        restarts: int = 0,
        saving: Saving | None = None,
        log_name: str = "torchrun.log",
    ) -> None:
        """`restarts` is how often torchrun, by its own arguments, starts ranks that have died anew."""
        settings = directory.recipe.run
        self.hung: Verdict | None = None
        """Why the ranks were ended in the end, where they hung."""
        self._watch, self._restarts = watch, restarts
        self._received: int | None = None
        self._saving = saving
        logs = saving.stop_file.parent if saving else directory.logs
        logs.mkdir(parents=True, exist_ok=True)
        if saving is None:
            for old in logs.glob("*.error.json"):
                old.unlink()
        environment = env.for_ranks(settings.threads_per_rank, settings.platform)
        if saving and signal.SIGTERM in saving.signals:
            # Ranks ignore SIGTERM, see below: torchrun passes none on, and does not wait for them to obey one.
            environment |= {"PET_SIGNALS_TO_HANDLE": "SIGINT", "PET_SHUTDOWN_TIMEOUT": "5"}
        # A user's own rewards lie beside the recipe; last, so that they never shadow a library.
        environment["PYTHONPATH"] = env.python_path([recipe_folder])
        with (logs / log_name).open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stderr=log,
                pass_fds=locks,
                # Ctrl-C reaches this process alone, which passes it on once.
                start_new_session=True,
                preexec_fn=self._before_exec,
            )

    def _before_exec(self) -> None:
        """What torchrun and, through it, the ranks inherit. Slurm sends a step's signals to every process in it, not to this one alone."""
        ignored = self._saving.signals if self._saving else ()
        for sign in ignored:
            signal.signal(sign, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ignored)
        die_with_parent(signal.SIGKILL if signal.SIGTERM in ignored else signal.SIGTERM)

    def wait(self, meanwhile: Callable[[], None] = lambda: None) -> int:
        """Wait for the ranks to end, with a look at something else twice a second; returns the run's exit code."""
        heard = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP} | (self._saving.signals if self._saving else set())
        handlers = {sign: signal.signal(sign, self._forward) for sign in heard}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, heard)
        try:
            code = None
            while code is None and self._received is None and self.hung is None:
                meanwhile()
                code = self._ended(_TURN_S)
                if code is None:
                    self._look(meanwhile)
            if self.hung is not None:
                return HUNG
            # A signal can arrive while the last look is under way, and the ranks be gone before it ends: still a stopped run.
            if self._received is None or code == 0:
                return 1 if code else 0
            if self._saving and self._received in self._saving.signals:
                self._saving.stop_file.touch()
                grace_s = self._saving.grace_s
            else:
                grace_s = _GRACE_S
            deadline = time.monotonic() + grace_s
            while self._ended(_TURN_S) is None and time.monotonic() < deadline:
                meanwhile()
            if self._ended(0) is None:
                # Ranks die with torchrun: each asked for SIGKILL at its parent's death.
                self._process.kill()
                self._process.wait()
            return 128 + self._received
        finally:
            for sign, handler in handlers.items():
                # Slurm repeats itself; how the attempt ended is still to be written.
                signal.signal(sign, signal.SIG_IGN if self._saving and sign in self._saving.signals else handler)
            if sys.stdout.isatty():
                sys.stdout.write("\x1b[?25h")  # a rank that was killed while its display was live left the cursor hidden

    def _look(self, meanwhile: Callable[[], None]) -> None:
        """At a hang the watch ends the ranks; torchrun then starts them again in place, or ends as well."""
        verdict = self._watch.look()
        if verdict is None:
            return
        end = time.monotonic() + (_RESTART_S if self._restarts else _GRACE_S)
        while (code := self._ended(_TURN_S)) is None and not self._watch.begun and time.monotonic() < end:
            meanwhile()
        if self._watch.begun:
            if self._watch.leads:
                print(f"{verdict.line}; its ranks are started again", file=sys.stderr, flush=True)
            return
        self.hung = verdict
        if code is None:
            self._process.kill()
            self._process.wait()

    def _ended(self, seconds: float) -> int | None:
        """Torchrun's exit code, None where it still runs after so many seconds."""
        try:
            return self._process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None

    def _forward(self, number: int, frame: Any) -> None:
        if self._saving and number in self._saving.signals:
            # Slurm's SIGTERM may follow its SIGUSR1: it does not cut short what is being saved.
            self._received = self._received or number
            return
        self._received = number
        # Always SIGTERM: a rank that waits in a collective would not see a KeyboardInterrupt before the collective's timeout.
        self._process.send_signal(signal.SIGTERM)


def explain_failure(logs: Path, words: Sequence[str], torchrun_log: str = "torchrun.log") -> None:
    """Raise the first rank's UserError, or print the first rank's traceback; `words` are of ranks that could write no file."""
    errors = _errors(logs)
    if words:
        raise UserError(words[0])
    if not errors:
        _explain_death(logs, torchrun_log)
    elif errors[0]["user"]:
        raise UserError(errors[0]["message"])
    else:
        print(errors[0]["traceback"], end="", file=sys.stderr)
        print(f"rank {errors[0]['rank']} failed; logs: {logs}", file=sys.stderr)


def first_refusal(logs: Path, words: Sequence[str]) -> str | None:
    """The message of the first UserError that a rank has left; `words` as above."""
    refusals = (str(error["message"]) for error in _errors(logs) if error["user"])
    return next(chain(words, refusals), None)


def _errors(logs: Path) -> list[dict[str, Any]]:
    """What ranks have left that failed, the first one first."""
    return sorted((files.read_json(path) for path in logs.glob("*.error.json")), key=lambda error: float(error["time"]))


def _explain_death(logs: Path, torchrun_log: str) -> None:
    """Print the end of what a rank left that died without an exception, killed or crashed in native code."""
    report = _text(logs / torchrun_log).rpartition("Root Cause")[2]
    found = re.search(r"rank\s*: (\d+).*?exitcode\s*: (-?\d+)", report, re.DOTALL)
    if found is None:
        print("\n".join(_text(logs / torchrun_log).splitlines()[-20:]), file=sys.stderr)
        print(f"the ranks did not start; logs: {logs}", file=sys.stderr)
        return
    rank, code = int(found[1]), int(found[2])
    print("\n".join(_text(logs / f"rank{rank}.log").splitlines()[-20:]), file=sys.stderr)
    cause = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
    hint = " (out of memory?)" if code == -signal.SIGKILL else ""
    print(f"rank {rank} {cause}{hint}; logs: {logs}", file=sys.stderr)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
