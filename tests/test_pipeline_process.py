import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STUCK = """
import re, sys
from r1mega.config.rollout import Reward
from r1mega.data.prompts import Prompt
from r1mega.rewards.judge import Judge

judge = Judge({"stuck": Reward(function="stuck_reward:reward", deadline_s=600)}, 1)
judge.judge([(Prompt("1", "1+1"), "x")])
"""


def exists(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_a_judge_stuck_in_native_code_dies_with_its_rank(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    (tmp_path / "stuck_reward.py").write_text(
        "import os, re\n\ndef reward(prompt, response):\n"
        f"    open({str(told)!r}, 'w').write(str(os.getpid()))\n    os.rename({str(told)!r}, {str(told)!r} + '.whole')\n"
        "    return float(re.match('(a*)*b', 'a' * 64) is None)\n"
    )
    check_that_it_dies_with([sys.executable, "-c", STUCK], told.with_name("pid.whole"))


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_a_rank_that_is_still_importing_dies_with_torchrun(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    (tmp_path / "slow_worker.py").write_text(
        f"import os, time\nopen({str(told)!r}, 'w').write(str(os.getpid()))\n"
        f"os.rename({str(told)!r}, {str(told)!r} + '.whole')\ntime.sleep(600)\n"
    )
    torchrun = "import subprocess, sys; subprocess.run([sys.executable, '-m', 'r1mega.pipeline.rank', 'slow_worker'])"
    check_that_it_dies_with([sys.executable, "-c", torchrun], told.with_name("pid.whole"))


def check_that_it_dies_with(command: list[str], told: Path) -> None:
    """Start a process, kill it when its child has written its number into a file, and wait for the child's end."""
    environment = {"PYTHONPATH": f"{ROOT}:{told.parent}", "OMP_NUM_THREADS": "1"}
    parent = subprocess.Popen(command, env=environment, cwd=told.parent)
    deadline = time.monotonic() + 60
    while not told.exists():
        assert parent.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    child = int(told.read_text())
    assert exists(child)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while exists(child):
        assert time.monotonic() < deadline, "the child outlives its parent"
        time.sleep(0.05)


@pytest.mark.parametrize("room", ["objectives", "weights", "rewards", "config"])
def test_pure_rooms_know_no_process_groups(room: str) -> None:
    files = sorted((ROOT / "r1mega" / room).rglob("*.py"))
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            # The classes that make up a distributed checkpoint's index are a file format.
            used = [name for name in names if name.startswith("torch.distributed") and not name.startswith("torch.distributed.checkpoint.")]
            assert not used, f"{file} imports {used}"


def test_launcher_and_weight_plans_start_without_torch() -> None:
    # The launcher's second of imports is paid before every run; plans and audits run where torch is not wanted.
    code = "import sys, r1mega.cli, r1mega.pipeline.launcher, r1mega.weights.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
