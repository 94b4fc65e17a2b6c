"""One GRPO update, 256 samples of the tiny DeepSeek-V3, against TRL's GRPOTrainer: same weights, prompts, reward, beta and lengths, fp32.

    python tools/bench/grpo_vs_trl.py [--trl-python PATH] [--pairs N] [--ranks 1|2] [--ep 1|2] [--cores 2|1]

First both compute loss and gradient norm of one shared batch, which must agree within 1e-3. Then updates are timed in turn, one of ours,
one of TRL's, after warm-up, each side on two threads in all and never both at once. Two workloads, 16 prompts x 16 samples each:
24 new tokens, and lengths with a long tail (log-normal, median 48, at most 256). TRL runs with micro-batches of 256 and of 32 samples
and is held to the faster one. Wall time means something on an idle machine alone; on a busy one give `--cores 1 --ranks 1` and read the
CPU time, in which threads that wait for each other do not count. Needs the extra `bench`, here or in the interpreter of --trl-python.
"""

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r1mega import env
from r1mega.pipeline.model_folder import ModelFolder
from r1mega.weights.canonical import canonical

HERE = Path(__file__).parent
ARCHITECTURE = HERE.parent.parent / "configs" / "tiny" / "architecture"
PROMPTS, GROUP = 16, 16
TOLERANCE = 1e-3
PHASES = {  # name printed: ours, TRL's
    "weights to engine": ("sync", ""),
    "generate": ("generate", "generate"),
    "reward": ("judge", "reward"),
    "pack, reference": ("logprobs", "reference"),
    "train": ("train", "train"),
}

# ---------------------------------------------------------------- what both sides get


def write_models(folder: Path) -> None:
    """Random weights in folder/policy, and a reference a little away from them."""
    template = ModelFolder(ARCHITECTURE)
    generator = torch.Generator().manual_seed(0)
    values: dict[str, Tensor] = {}
    for tensor in canonical(template.arch):
        is_matrix = len(tensor.shape) > 1
        start = torch.ones if tensor.name.endswith("norm.weight") else torch.zeros
        values[tensor.name] = 0.05 * torch.randn(tensor.shape, generator=generator) if is_matrix else start(tensor.shape)
    for name in ("policy", "reference"):
        (folder / name).mkdir()
        template.write(folder / name, values, torch.float32)
        values = {key: v + 0.005 * torch.randn(v.shape, generator=generator) if v.dim() > 1 else v for key, v in values.items()}


def write_workloads(folder: Path) -> tuple[dict[str, Path], list[list[int]]]:
    """The prompts with each workload's lengths; and the shared batch, token ids without special ones."""
    rng = random.Random(0)
    prompts = [" ".join(["en", *(str(rng.randrange(10)) for _ in range(6)), ":"]) for _ in range(PROMPTS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    samples = PROMPTS * GROUP
    tail = [min(256, max(4, round(math.exp(math.log(48) + 0.75 * rng.gauss(0, 1))))) for _ in range(samples)]
    tail[rng.randrange(samples)] = 256
    paths = {}
    for name, lengths in (("24 tokens", [24] * samples), ("long tail", tail)):
        paths[name] = folder / f"{name.replace(' ', '-')}.json"
        paths[name].write_text(json.dumps({"prompts": prompts, "group": GROUP, "lengths": lengths}))
    return paths, [[rng.randrange(3, 128) for _ in range(rng.randrange(5, 25))] for _ in range(samples)]


# ---------------------------------------------------------------- the two sides


class Worker:
    """A process that answers one command at a time and sleeps in between."""

    def __init__(self, name: str, command: Sequence[str], threads: int, log: Path, stack: ExitStack) -> None:
        self.name, self.log = name, log
        # Compilation is the library's choice: ours is told to leave it by its own platform.
        environment = {key: value for key, value in env.for_ranks(threads, "cpu").items() if key != "TORCHDYNAMO_DISABLE"}
        errors = stack.enter_context(log.open("w"))
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, cwd=HERE
        )
        stack.callback(self._stop)

    def ask(self, **command: Any) -> dict[str, Any]:
        """The answer to a command; SystemExit with the end of its log when the process ends instead."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.name} ended:\n" + "\n".join(self.log.read_text().splitlines()[-20:]))
        found: dict[str, Any] = json.loads(answer)
        return found

    def _stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()


@dataclass(frozen=True)
class Sides:
    """Starts workers on one workload."""

    folder: Path
    workload: Path
    options: argparse.Namespace
    stack: ExitStack

    def ours(self) -> Worker:
        ranks, threads = self.options.ranks, self.options.cores // self.options.ranks
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        extra = ["--prompts", str(self.folder / "prompts.jsonl"), "--scratch", str(self.folder), "--threads", str(threads)]
        extra += ["--ep", str(self.options.ep)]
        command = [sys.executable, *launcher, str(HERE / "r1mega_side.py"), *self._common(), *extra]
        return Worker("r1mega", command, threads, self.folder / "r1mega.log", self.stack)

    def trl(self, micro_batch: int) -> Worker:
        extra = ["--threads", str(self.options.cores), "--micro-batch", str(micro_batch)]
        command = [str(self.options.trl_python), str(HERE / "trl_side.py"), *self._common(), *extra]
        return Worker("TRL", command, self.options.cores, self.folder / f"trl-{micro_batch}.log", self.stack)

    def _common(self) -> list[str]:
        models = ["--model", str(self.folder / "policy"), "--reference", str(self.folder / "reference")]
        return [*models, "--workload", str(self.workload)]


# ---------------------------------------------------------------- what is measured


def check_parity(ours: Worker, trl: Worker, completions: list[list[int]]) -> None:
    """AssertionError unless both sides find the same loss and gradient norm for the same samples."""
    a, b = (worker.ask(op="check", completion_ids=completions) for worker in (ours, trl))
    assert a["prompt_ids"] == b["prompt_ids"], "the two sides tokenise the prompts differently"
    for name in ("loss", "grad_norm"):
        gap = abs(a[name] / b[name] - 1)
        print(f"shared batch: {name:9} r1mega {a[name]:.8f}, TRL {b[name]:.8f}, relative difference {gap:.1e}")
        assert gap <= TOLERANCE, f"{name} differs by more than {TOLERANCE:g}"
    print(f"shared batch: kl {a['kl']:.5f} and {b['kl']:.5f}, largest ratio {a['ratio/max']:.2f}", flush=True)


def timed(worker: Worker, updates: int) -> list[dict[str, Any]]:
    return [worker.ask(op="update") for _ in range(updates)]


def report(name: str, tokens: int, ours: list[dict[str, Any]], trl: list[dict[str, Any]]) -> None:
    ratios = [a["update"] / b["update"] for a, b in zip(ours, trl, strict=True)]
    print(f"{name}: {PROMPTS * GROUP} samples, {tokens} new tokens; median seconds of {len(ratios)} updates in turn")
    print(f"  {'':18}{'r1mega':>8}{'TRL':>8}")
    totals, cpu = ([statistics.median(u[key] for u in side) for side in (ours, trl)] for key in ("update", "cpu"))
    rest = totals
    for phase, keys in PHASES.items():
        cells = [statistics.median(u["phases"].get(key, 0.0) for u in side) for side, key in zip((ours, trl), keys, strict=True)]
        rest = [left - cell for left, cell in zip(rest, cells, strict=True)]
        print(f"  {phase:18}{cells[0]:8.3f}{cells[1]:8.3f}")
    print(f"  {'other':18}{rest[0]:8.3f}{rest[1]:8.3f}")
    print(f"  {'update':18}{totals[0]:8.3f}{totals[1]:8.3f}")
    print(f"  {'CPU time':18}{cpu[0]:8.3f}{cpu[1]:8.3f}")
    print(f"  ratio r1mega / TRL: median {statistics.median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}", flush=True)


def compare(name: str, sides: Sides, completions: list[list[int]], options: argparse.Namespace) -> None:
    """Parity and times of one workload."""
    ours = sides.ours()
    peers = {size: sides.trl(size) for size in (PROMPTS * GROUP, 32)}
    check_parity(ours, peers[PROMPTS * GROUP], completions)
    timed(ours, options.warmup)
    trials = {size: timed(peer, options.warmup + 2)[options.warmup :] for size, peer in peers.items()}
    times = {size: min(trial["update"] for trial in found) for size, found in trials.items()}
    best = min(times, key=times.__getitem__)
    found = ", ".join(f"{size} samples {seconds:.3f} s" for size, seconds in times.items())
    print(f"{name}: TRL by micro-batch: {found}; goes on with {best}", flush=True)
    pairs = [(timed(ours, 1)[0], timed(peers[best], 1)[0]) for _ in range(options.pairs)]
    report(name, sum(json.loads(sides.workload.read_text())["lengths"]), [a for a, _ in pairs], [b for _, b in pairs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", type=Path, default=Path(sys.executable), help="interpreter that has TRL (default: this one)")
    parser.add_argument("--pairs", type=int, default=7, help="timed updates of each side")
    parser.add_argument("--warmup", type=int, default=2, help="updates of each side that are not counted")
    parser.add_argument("--ranks", type=int, default=2, choices=(1, 2), help="our processes: 2 with a thread each, or 1 with two")
    parser.add_argument("--ep", type=int, default=1, choices=(1, 2), help="our processes that share the experts")
    parser.add_argument("--cores", type=int, default=2, help="threads of each side, all processes together")
    options = parser.parse_args()
    if options.cores % options.ranks:
        parser.error(f"--cores {options.cores} is not a multiple of --ranks {options.ranks}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_models(folder)
        workloads, completions = write_workloads(folder)
        for name, workload in workloads.items():
            with ExitStack() as stack:
                compare(name, Sides(folder, workload, options, stack), completions, options)


if __name__ == "__main__":
    main()
