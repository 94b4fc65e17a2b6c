"""A stage that is asked to stop: what it saves, and when it goes on all the same. On a real Slurm: test_launch_slurm.py."""

from types import SimpleNamespace
from typing import Any

import pytest

from r1mega.pipeline.context import Stopped
from r1mega.stages import training


class Checkpoints:
    saved: list[str]

    def __init__(self, policy: Any, folder: Any) -> None:
        Checkpoints.saved = []

    def save(self, name: str, state: dict[str, int], reference: Any) -> None:
        assert name == f"update-{state['update']:06d}"
        self.saved.append(name)

    def poll(self) -> None: ...

    def wait(self) -> None: ...


def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Any, asked_after: int, save_every: int) -> tuple[list[int], list[str]]:
    """Six updates, of which `asked_after` are done when the stop is asked for; the updates done, and the checkpoints."""
    monkeypatch.setattr(training, "Checkpoints", Checkpoints)
    monkeypatch.setattr(training, "restore", lambda ctx, checkpoints: 0)
    done: list[int] = []
    quiet = SimpleNamespace(write=lambda row: None, update=lambda *_: None)
    ctx: Any = SimpleNamespace(dir=tmp_path, name="sft", metrics=quiet, progress=quiet, stop_asked=lambda: len(done) >= asked_after)

    def step(update: int) -> dict[str, float]:
        done.append(update + 1)
        return {"loss": 0.0}

    try:
        training.run_updates(ctx, None, 6, save_every, step)  # type: ignore[arg-type]
    except Stopped:
        done.append(-1)
    return done, Checkpoints.saved


@pytest.mark.parametrize(
    ("asked_after", "save_every", "updates", "saved"),
    [
        (3, 2, [1, 2, 3, -1], ["update-000002", "update-000003"]),
        (4, 2, [1, 2, 3, 4, -1], ["update-000002", "update-000004"]),  # saved once, not twice
        (1, 0, [1, -1], ["update-000001"]),  # also where nothing is saved otherwise
        (6, 4, [1, 2, 3, 4, 5, 6], ["update-000004"]),  # done anyway
    ],
)
def test_a_stage_saves_the_update_that_it_stops_after(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, asked_after: int, save_every: int, updates: list[int], saved: list[str]
) -> None:
    assert run(monkeypatch, tmp_path, asked_after, save_every) == (updates, saved)
