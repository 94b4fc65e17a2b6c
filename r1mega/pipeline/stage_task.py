"""`r1mega run --stage`: one stage on one machine, or as this node's part of a job on several. Every node makes the same call."""

import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from types import FrameType

from r1mega import env
from r1mega.config.base import PathMark
from r1mega.config.loading import load_recipe
from r1mega.config.tree import marked
from r1mega.errors import UserError
from r1mega.pipeline import nodes
from r1mega.pipeline.hangs import HUNG, Watch
from r1mega.pipeline.launcher import RANK, WORKER, Ranks, Saving, explain_failure, first_refusal, say
from r1mega.pipeline.node_health import sick_gpus
from r1mega.pipeline.preflight import check_contents, check_references
from r1mega.pipeline.rundir import RunDirectory, joined
from r1mega.rollout.sglang_keeper import ENGINE, LOOK_S, Keeper
from r1mega.rollout.sglang_places import Allocation


@dataclass(frozen=True)
class Alone:
    """How a stage runs alone, as one task of a cluster."""

    stage: str
    restarts: int = 0
    """How often torchrun starts the ranks anew when one of them dies."""
    grace_s: float = 60.0
    """Seconds from the signal until ranks that have not saved by then are ended."""
    engine_nodes: int = 0
    """The last ones of the job's nodes, which have no ranks, but parts of the engine's servers."""
    gpus_per_node: int = 0
    """For ranks and servers; 0: as many as they want."""


def run_stage(recipe_path: Path, overrides: Sequence[str], run_dir: Path | None, alone: Alone, worker: str = WORKER) -> int:
    """Run one stage of a recipe, on this machine or as this node's task of a Slurm step; every node makes this call.

    `run.ranks` is the number of ranks on all nodes. SIGUSR1, and in a Slurm step SIGTERM, ask the ranks to save and leave.

    Returns:
        Exit code as `run`, `HUNG` where all restarts in place are used up and where this node has GPUs that are not to be relied on;
        128 + N also when the stage was saved and left after signal N.

    Raises:
        UserError: as `run`; or there is no such stage, what it reads is not finished, the ranks do not divide over the nodes.
    """
    task = env.slurm_task() or nodes.ALONE
    recipe = load_recipe(recipe_path, overrides, only=alone.stage)
    path = (run_dir or Path("runs") / recipe.name).absolute()
    trainers = task.nodes - alone.engine_nodes
    if trainers < 1:
        raise UserError(f"--engine-nodes {alone.engine_nodes} leaves no node for ranks: the job has {task.nodes}")
    if recipe.run.ranks % trainers:
        raise UserError(f"run.ranks={recipe.run.ranks} does not divide over {trainers} nodes")
    if task.node >= trainers:
        return _StageTask(RunDirectory(path, recipe), recipe_path, task, alone, worker).serve()
    if task.node:
        return _StageTask(RunDirectory(path, recipe), recipe_path, task, alone, worker).follow()
    with joined(path, recipe, alone.stage, say) as (directory, locks):
        return _StageTask(directory, recipe_path, task, alone, worker).lead(locks)


class _StageTask:
    """One node's part in an attempt at a stage."""

    def __init__(self, directory: RunDirectory, recipe_path: Path, task: env.Task, alone: Alone, worker: str) -> None:
        self._directory, self._folder, self._task, self._alone, self._worker = directory, recipe_path.parent.absolute(), task, alone, worker
        self._hung = ""
        self._logs = nodes.folder_of(directory.logs, alone.stage, task)
        self._allocation = Allocation(task.node, task.nodes - alone.engine_nodes, alone.engine_nodes, alone.gpus_per_node)
        # Slurm's SIGTERM announces the end of a preempted job or of its time: the same as SIGUSR1, which it sends ahead of that.
        self._signals = {signal.SIGUSR1, signal.SIGTERM} if task.job else {signal.SIGUSR1}

    def lead(self, locks: tuple[int, ...]) -> int:
        """The first node: check, keep the record of the attempt, and call the others."""
        directory, name, begin = self._directory, self._alone.stage, time.monotonic()
        self._logs.mkdir(parents=True, exist_ok=True)
        attempt = nodes.Attempt(name, self._task.job, self._task.restart, self._task.nodes, directory.recipe.run.ranks, nodes.now())
        attempt.write(self._logs)
        outcome: nodes.Outcome = "failed"
        reason = ""
        # What arrives while inputs are checked waits until there is somebody to ask.
        signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)
        try:
            self._check()
            if reason := self._sick():
                return HUNG
            code = 0 if name in directory.finished() else self._run(nodes.open_meeting(self._logs), locks)
            if code > 128:
                outcome, reason = "stopped", _signal_name(code)
            elif code == HUNG:
                outcome, reason = "hung", self._hung
            elif code == 0:
                outcome = "finished"
                print(f"{name}: finished in {time.monotonic() - begin:.1f} s: {directory.stage_dirs[name]}")
            return code
        except UserError as error:
            outcome, reason = "refused", str(error)
            raise
        finally:
            with suppress(OSError) if outcome == "refused" else nullcontext():  # by a full disk, perhaps
                replace(attempt, ended=nodes.now(), outcome=outcome, reason=reason).write(self._logs)
                whole = directory.finished().keys() == directory.recipe.stages.keys()
                directory.write_summary("finished" if whole else "failed" if outcome in ("failed", "refused") else "running")

    def follow(self) -> int:
        """Any other node. A stage that is finished already opens no meeting."""
        if self._alone.stage in self._directory.finished():
            return 0
        if self._sick():
            return HUNG
        before = signal.signal(signal.SIGTERM, self._leave)
        meeting = nodes.find_meeting(self._logs)
        signal.signal(signal.SIGTERM, before)
        return self._run(meeting, ())

    def serve(self) -> int:
        """A node without ranks: keep servers until the first node has written how the attempt has ended."""
        heard: list[float] = []
        for sign in self._signals:
            # Ranks that save may still draw; Slurm ends this node when the first one is gone.
            signal.signal(sign, lambda number, frame: heard.append(time.monotonic()))
        finished = self._alone.stage in self._directory.finished()
        if not finished and self._sick():
            return HUNG
        keeper: Keeper | None = None
        with ExitStack() as stack:
            while not finished and nodes.outcome(self._logs) is None:
                if heard and time.monotonic() > heard[0] + self._alone.grace_s:
                    return 128 + signal.SIGTERM
                if keeper is None and self._logs.is_dir():
                    # Nothing may lie in the run directory before the first node has claimed it.
                    keeper = stack.enter_context(self._keeper())
                if keeper is not None:
                    keeper.look()
                time.sleep(LOOK_S)
        return 0

    def _keeper(self) -> Keeper:
        return Keeper(self._logs / ENGINE, self._task.node, self._signals)

    def _leave(self, number: int, frame: FrameType | None) -> None:
        """Slurm ends this node because the first one is gone. If that was refused, so is this: the job is not worth another attempt."""
        refused = nodes.outcome(self._logs) == "refused"
        raise SystemExit(2 if refused else 128 + number)

    def _sick(self) -> str:
        """Why this node's GPUs are not to be relied on, which is said in one line: the job then ends for another attempt."""
        why = sick_gpus() if self._directory.recipe.run.platform == "cuda" else ""
        if why:
            advice = "nothing was started here; drain the node, the job goes back into the queue"
            print(f"{self._alone.stage}: {socket.gethostname()}: {why} (nvidia-resiliency-ext); {advice}", file=sys.stderr)
        return why

    def _check(self) -> None:
        recipe, name = self._directory.recipe, self._alone.stage
        self._directory.check_finished()
        for path, mark, value in marked(recipe.stages[name], PathMark, f"stages.{name}"):
            if mark.names_stage and value in recipe.stages and value not in self._directory.finished():
                raise UserError(f"'{path}': the stage {value!r} is not finished in {self._directory.path}; run it first")
        check_references(recipe, self._folder, only=name)
        check_contents(recipe, only=name, local_ranks=recipe.run.ranks // self._allocation.trainers)

    def _run(self, meeting: nodes.Meeting, locks: tuple[int, ...]) -> int:
        directory, name, task, allocation = self._directory, self._alone.stage, self._task, self._allocation
        trainers = replace(task, nodes=allocation.trainers)
        arguments = meeting.torchrun(trainers, self._logs.name, directory.recipe.run.ranks, self._alone.restarts)
        arguments += ["-m", RANK, self._worker, str(directory.path), name, str(self._logs), *map(str, astuple(allocation))]
        stop_file, log = self._logs / "stop", f"torchrun-{task.node}.log"
        settings, saving = directory.recipe.run, Saving(self._signals, stop_file, self._alone.grace_s, reach_ranks=True)
        watch = Watch(self._logs, settings.deadlines, settings.ranks // allocation.trainers, task.node, allocation.trainers)
        ranks = Ranks(directory, self._folder, locks, arguments, watch, saving, self._alone.restarts, log)
        if allocation.nodes == 1:
            code = ranks.wait()
        else:
            with self._keeper() as keeper:
                code = ranks.wait(keeper.look)
        if name in directory.finished():
            return 0
        if ranks.hung is not None:
            self._hung = ranks.hung.line
            if watch.leads:
                print(f"{self._hung}; the next attempt goes on from the last checkpoint", file=sys.stderr)
            return code
        refusal = first_refusal(self._logs, watch.last_words())
        if refusal is not None:
            # Whatever else happened: Slurm ends the other nodes when the first one has failed.
            raise UserError(refusal)
        if code == 0 and stop_file.exists():
            code = 128 + signal.SIGUSR1  # another node was asked, and its ranks took these along
        if code > 128:
            print(f"{name}: stopped by {_signal_name(code)}; the next attempt goes on from the last checkpoint", file=sys.stderr)
        elif code:
            explain_failure(self._logs, (), log)
        return code


def _signal_name(code: int) -> str:
    return signal.Signals(code - 128).name
