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
from r1mega.config.schema import Recipe
from r1mega.errors import UserError
from r1mega.pipeline import files
from r1mega.pipeline.hangs import HUNG, Verdict, Watch
from r1mega.pipeline.preflight import check_contents, check_references
from r1mega.pipeline.rundir import RunDirectory, check_belongs, claimed
from r1mega.process import die_with_parent

_GRACE_S = 20.0
_SAVE_S = 60.0
"""For what is under way when a run is stopped, and for saving it."""
_RESTART_S = 600.0
"""In which torchrun has met the other nodes again, and the new ranks have imported what they begin with."""
_TURN_S = 0.5
_TWICE_S = 1.0
"""Later than this, a second signal is meant."""
_WARNING = re.compile(r"\S+:\d+: \w*Warning: ")
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
    if fresh or not _is_finished(RunDirectory(path, recipe)):
        _wait_for_servers(recipe)
    with claimed(path, recipe, fresh, say) as (directory, lock):
        directory.check_finished()
        if _is_finished(directory):
            print(f"all stages are finished: {path}")
            directory.write_summary("finished")
            return 0
        directory.write_summary("running")
        arguments = ["--standalone", "--nproc-per-node", str(recipe.run.ranks), "-m", RANK, worker, str(directory.path)]
        watch = Watch(directory.logs, recipe.run.deadlines, recipe.run.ranks)
        saving = Saving({signal.SIGINT, signal.SIGTERM}, directory.logs / "stop", _SAVE_S)
        ranks = Ranks(directory, recipe_path.parent.absolute(), (lock,), arguments, watch, saving)
        code = ranks.wait()
        stopped = code > 128 or code == HUNG
        if stopped and _is_finished(directory):
            # It was stopped, or hung, when all was done.
            code, stopped = 0, False
        with suppress(OSError) if code else nullcontext():  # on a full disk the ranks have more to say
            directory.write_summary("finished" if code == 0 else "interrupted" if stopped else "failed")
        if code == 0:
            print(f"finished in {time.monotonic() - begin:.1f} s: {path}")
        elif ranks.hung is not None:
            print(f"{ranks.hung.line}; {_goes_on(directory)}: {path}", file=sys.stderr)
        elif stopped:
            name = signal.Signals(code - 128).name
            print(f"stopped by {name}; {_goes_on(directory)}: {path}", file=sys.stderr)
        else:
            explain_failure(directory.logs, watch.last_words())
        return code


def say(line: str) -> None:
    """Tell whoever started the run, while it goes on."""
    print(line, file=sys.stderr, flush=True)


def _is_finished(directory: RunDirectory) -> bool:
    return set(directory.finished()) == set(directory.recipe.stages)


def _wait_for_servers(recipe: Recipe) -> None:
    """Wait for servers at given addresses, before ranks wait for them with their GPUs. UserError where they do not come in their time."""
    from r1mega.rollout import open as engines  # imports torch, as what was checked before does

    for found in engines.found(recipe.rollout):
        if not found.ready(engines.GLANCE_S):
            limit = f"at most {recipe.rollout.sglang.start_timeout_s:g} s"
            say(f"waiting for the SGLang server at {found.client.address}, {limit}")
            while not found.ready():
                time.sleep(_TURN_S)


def _goes_on(directory: RunDirectory) -> str:
    """What the same command does after a run that was ended."""
    name = next(name for name in directory.recipe.stages if name not in directory.finished())
    kept = [path.name.rpartition("-")[2] for path in (directory.stage_dirs[name] / "checkpoints").glob("update-*")]
    if kept:
        return f"the same command goes on after update {max(map(int, kept))} of {name}"
    anew = ", of which there is no checkpoint yet" if hasattr(directory.recipe.stages[name], "save_every") else ""
    return f"the same command goes on with {name}{anew}"


@dataclass(frozen=True)
class Saving:
    """Signals after which ranks are asked, by a file that they look for, to save and leave."""

    signals: Set[signal.Signals]
    stop_file: Path
    """Beside the logs."""
    grace_s: float
    reach_ranks: bool = False
    """Slurm sends a step's signals to every process in it: whoever is to save has to ignore them. Else a second one ends the ranks."""


class Ranks:
    """The torchrun process of a run, and the signals that reach it."""

    def __init__(
        self,
        directory: RunDirectory,
        recipe_folder: Path,
        locks: tuple[int, ...],
        arguments: Sequence[str],
        watch: Watch,
        saving: Saving,
        restarts: int = 0,
        log_name: str = "torchrun.log",
    ) -> None:
        """`restarts` is how often torchrun, by its own arguments, starts ranks that have died anew."""
        settings = directory.recipe.run
        self.hung: Verdict | None = None
        """Why the ranks were ended in the end, where they hung."""
        self._watch, self._restarts = watch, restarts
        self._received: int | None = None
        self._insisted, self._heard_s = False, 0.0
        self._saving = saving
        logs = saving.stop_file.parent
        logs.mkdir(parents=True, exist_ok=True)
        if not saving.reach_ranks:
            # Of an earlier start; the folder of a step's attempt has none, and may have those of another node.
            for old in [*logs.glob("*.error.json"), *logs.glob(saving.stop_file.name)]:
                old.unlink()
        environment = env.for_ranks(settings.threads_per_rank, settings.platform)
        if signal.SIGTERM in self._ignored:
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

    @property
    def _ignored(self) -> Set[signal.Signals]:
        """By torchrun and the ranks."""
        return self._saving.signals if self._saving.reach_ranks else set()

    def _before_exec(self) -> None:
        """What torchrun and, through it, the ranks inherit."""
        for sign in self._ignored:
            signal.signal(sign, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._ignored)
        die_with_parent(signal.SIGKILL if signal.SIGTERM in self._ignored else signal.SIGTERM)

    def wait(self, meanwhile: Callable[[], None] = lambda: None) -> int:
        """Wait for the ranks to end, with a look at something else twice a second; returns the run's exit code."""
        heard = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP} | self._saving.signals
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
            if self._received in self._saving.signals:
                self._save(meanwhile)
            else:
                self._wait_for_end(_GRACE_S, meanwhile)
            if self._ended(0) is None:
                # Ranks die with torchrun: each asked for SIGKILL at its parent's death.
                self._process.kill()
                self._process.wait()
            return 128 + self._received
        finally:
            for sign, handler in handlers.items():
                # Slurm repeats itself; how the attempt ended is still to be written.
                signal.signal(sign, signal.SIG_IGN if sign in self._ignored else handler)
            if sys.stdout.isatty():
                sys.stdout.write("\x1b[?25h")  # a rank that was killed while its display was live left the cursor hidden

    def _save(self, meanwhile: Callable[[], None]) -> None:
        """Let the ranks save and leave; where they do not in their time, ask torchrun to end them."""
        self._saving.stop_file.touch()
        if not self._ignored:
            say(f"stopping: what is under way is saved, in at most {_SAVE_S:g} s; once more ends it at once")
        self._wait_for_end(self._saving.grace_s, meanwhile)
        if self._ended(0) is None and not self._ignored:
            self._process.send_signal(signal.SIGTERM)
            self._wait_for_end(_GRACE_S, meanwhile)

    def _wait_for_end(self, seconds: float, meanwhile: Callable[[], None]) -> None:
        """Until torchrun has ended, or its time is over, or somebody insists."""
        deadline = time.monotonic() + seconds
        while self._ended(_TURN_S) is None and time.monotonic() < deadline and not self._insisted:
            meanwhile()

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
                say(f"{verdict.line}; its ranks are started again")
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
        if number in self._saving.signals:
            # Slurm's SIGTERM may follow its SIGUSR1: it does not cut short what is being saved. Nor does the copy that a wrapper passes on.
            if self._received is None:
                self._received, self._heard_s = number, time.monotonic()
            elif not self._ignored and time.monotonic() > self._heard_s + _TWICE_S:
                self._insisted = True
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
    print("\n".join(_without_warnings(_text(logs / f"rank{rank}.log").splitlines())[-20:]), file=sys.stderr)
    cause = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
    hint = " (out of memory?)" if code == -signal.SIGKILL else ""
    print(f"rank {rank} {cause}{hint}; logs: {logs}", file=sys.stderr)


def _without_warnings(lines: Sequence[str]) -> list[str]:
    """Without those of Python's module `warnings`, which take two lines each."""
    dropped = {place + more for place, line in enumerate(lines) if _WARNING.match(line) for more in (0, 1)}
    return [line for place, line in enumerate(lines) if place not in dropped]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
