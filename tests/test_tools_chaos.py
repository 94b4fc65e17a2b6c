"""The chaos tool on one stage. What it found on all of them stands in docs/cluster.md."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Drawn ahead and in pieces, there is most to lose and to count twice.
AHEAD = ("updates_per_rollout=1", "staleness=1", "partial={segment: 10, extra_prompts: 3}")


@pytest.mark.slow
def test_a_stage_killed_again_and_again_leaves_what_an_unbroken_one_leaves(tmp_path: Path) -> None:
    words = ["--stages", "zero", "--ranks", "1", "--kills", "3", "--least", "2", "--json", str(tmp_path / "figures.json")]
    command = [sys.executable, str(ROOT / "tools/chaos"), "--output", str(tmp_path), *words]
    done = subprocess.run([*command, *(f"stages.zero.{change}" for change in AHEAD)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    figures = json.loads((tmp_path / "figures.json").read_text())
    kills = [kill for kill in figures["kills"] if kill["stage"] == "grpo"]
    assert len(kills) >= 2 and any(kill["target"] != "judge" for kill in figures["kills"])
    assert not any(figures["differences"].values())
    for bitwise in (True, False):
        assert tampered(tmp_path / "unbroken", bitwise) == ["zero: rows"]


def tampered(unbroken: Path, bitwise: bool) -> list[str]:
    """What the tool says of a run of which one row of metrics is there twice."""
    run = Path(shutil.copytree(unbroken, unbroken.with_name(f"tampered-{bitwise}")))
    rows = run / "stages/01-zero/metrics.jsonl"
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join([lines[0], *lines]))
    found: list[str] = runpy.run_path(str(ROOT / "tools/chaos"))["different"](unbroken, run, bitwise)
    return found
