"""Runs that hang: whom the watch blames, from what it sees, and from real ranks that need no model (dummy_worker.py)."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import test_pipeline_run
import test_pipeline_stage
from test_pipeline_run import TESTS, alive, finish, status
from test_pipeline_stage import outcomes, recipe, rows  # noqa: F401 - a fixture

from r1mega import heartbeat
from r1mega.config.deadlines import Deadlines
from r1mega.launch.status import status as told
from r1mega.pipeline.hangs import HUNG, Seen, Watch, blame

pytestmark = pytest.mark.slow
COLLECTIVE = "training.py:50 in stop_asked"
WAITS = Seen(0, "train", 40.0, 60.0, 7, at=COLLECTIVE, waits=True)
SIGSTOP = "description=stop once on rank 1"


def seen(*changes: dict[str, object]) -> list[Seen]:
    """Ranks that wait in the same collective, but for some changes; the first one is overdue unless it says otherwise."""
    return [replace(WAITS, **({"rank": rank, "seconds": 61.0 if rank == 0 else 40.0} | change)) for rank, change in enumerate(changes)]


@pytest.mark.parametrize(
    ("ranks", "culprit", "words"),
    [
        # A process that does not run is to blame, however far it has got.
        (seen({}, {"count": 9, "phase": "sync", "trouble": "it is stopped", "at": ""}), 1, "in sync for 40 s, and rank 0 in train"),
        # So is who is busy while others wait for him,
        (seen({}, {}, {"waits": False, "at": "own.py:3 in reward"}), 2, "at own.py:3 in reward; 2 of 2 other ranks wait in collectives"),
        # of several the one who has got the least far,
        (seen({"waits": False, "count": 8}, {"waits": False, "count": 6, "phase": "save"}, {}), 1, "rank 1 has been in save"),
        # of which who begins last where they are equally far.
        (seen({"waits": False}, {"waits": False, "seconds": 30.0}), 1, "rank 1 has been in train for 30 s"),
        # All wait: one has not reached the collective of the others,
        (seen({}, {"count": 6, "phase": "logprobs"}, {}), 1, "logprobs for 40 s, and rank 0 in train for 61 s (run.deadlines.train is 60)"),
        # or all are in the same one.
        (seen({}, {}), 1, "like all others it waits in a collective, at training.py:50 in stop_asked: look at the network"),
        # A server is nobody's rank.
        (seen({"waits": False, "waits_for": "3 answers"}, {}), 0, "(run.deadlines.train is 60): it waits for 3 answers; 1 of 1 other"),
    ],
)  # fmt: skip
def test_who_is_blamed(ranks: list[Seen], culprit: int, words: str) -> None:
    verdict = blame(ranks)
    assert verdict.rank == culprit and words in verdict.line and "\n" not in verdict.line


def test_every_phase_has_a_deadline_and_the_other_way_round() -> None:
    assert set(Deadlines.model_fields) == set(get_args(heartbeat.Phase))


RANK = """
import sys, time
from pathlib import Path
import torch.distributed as dist
from r1mega import heartbeat
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
heartbeat.start(folder / f"beats/0/{rank}", folder / f"rank{rank}.stacks")
with heartbeat.phase("judge"):
    dist.barrier()
with heartbeat.phase("train"):
    if rank == 1:
        time.sleep(100)
    dist.barrier()
"""


def test_who_waits_in_a_collective_is_told_from_who_keeps_it_waiting(tmp_path: Path) -> None:
    watch = Watch(tmp_path, Deadlines(train=1.0), ranks=2)
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path)], cwd=TESTS.parent) for rank in range(2)]
    try:
        verdict = None
        while verdict is None:
            assert all(rank.poll() is None for rank in ranks)
            time.sleep(0.1)
            verdict = watch.look()
        assert verdict.rank == 1
        assert "hang: rank 1 has been in train for 1 s (run.deadlines.train is 1), at <string>:13 in <module>; 1 of 1 other" in verdict.line
        assert [rank.wait(10) for rank in ranks] == [-signal.SIGKILL] * 2
        assert "distributed_c10d.py" in (tmp_path / "hang-1/rank0.txt").read_text()
        assert "line 13 in <module>" in (tmp_path / "hang-1/rank1.txt").read_text()
        assert watch.look() is None  # the same ranks are not accused twice
    finally:
        for rank in ranks:
            rank.kill()


def test_a_full_disk_is_named_though_nothing_can_be_written(recipe: Path) -> None:  # noqa: F811
    run = recipe.parent / "run"
    code, _, err = finish(test_pipeline_run.start(recipe, "description=full disk on rank 1"))
    assert (code, status(run)) == (2, "failed")
    told = f"a disk or a quota is full; make room for {run}, and the same command goes on"
    assert err == f"r1mega: rank 1: [Errno 28] No space left on device: {told}\n"
    assert not alive(run)


def test_a_run_that_hangs_when_all_is_done_is_finished(recipe: Path) -> None:  # noqa: F811
    run = recipe.parent / "run"
    code, out, _ = finish(test_pipeline_run.start(recipe, "description=stop at the end on rank 1", "run.deadlines.setup=4"))
    assert code == 0 and out.splitlines()[-1].startswith("finished in") and status(run) == "finished"
    assert not alive(run)


def test_hung_ranks_are_started_again_in_place(recipe: Path) -> None:  # noqa: F811
    run = recipe.parent / "run"
    process = test_pipeline_stage.start(recipe, "zero", "--restarts", "1", SIGSTOP, "run.deadlines.setup=4", slurm=(0, 1, 0))
    code, _, err = finish(process)
    assert code == 0 and "hang: rank 1 has been" in err and "its ranks are started again" in err and err.count("\n") == 1
    assert outcomes(run) == ["finished"] and rows(run) == [1, 2, 3, 4]


def test_a_rank_of_another_node_is_named_by_the_first_and_both_nodes_end_for_another_attempt(recipe: Path) -> None:  # noqa: F811
    run = recipe.parent / "run"
    started = [test_pipeline_stage.start(recipe, "zero", SIGSTOP, "run.deadlines.setup=4", slurm=(node, 2, 0)) for node in (0, 1)]
    ends = [finish(process) for process in started]
    assert [code for code, _, _ in ends] == [HUNG, HUNG]
    assert "hang: rank 1 has been in setup" in ends[0][2] and "the next attempt goes on from the last checkpoint" in ends[0][2]
    assert ends[1][2] == ""
    assert outcomes(run) == ["hung"] and "hung: hang: rank 1" in told(run)[2]
    assert {path.name for path in (run / "logs/zero/7-0/hang-1").iterdir()} == {"node-0.json", "node-1.json", "rank0.txt", "rank1.txt"}
    assert [finish(test_pipeline_stage.start(recipe, "zero", SIGSTOP, slurm=(0, 1, 1)))[0]] == [0]
    assert outcomes(run) == ["hung", "finished"]
