"""Speed and memory of `r1mega convert` on layers of DeepSeek-V3's real shapes, against `cp`.

    python tools/bench/convert_speed.py [--scratch DIR] [--experts 256] [--processes 2]

Makes a block-FP8 checkpoint (one dense and one MoE layer, embedding and head; 15 GB), then converts it to Megatron's format, from there to
bf16 and back. Each conversion is followed by `cp` of what it wrote. Both are timed until the bytes are on the disk; the rate is bytes read
and bytes written together, over seconds. Anonymous memory (RssAnon) of every process is sampled. The way back must give the same bytes.
Needs 66 GB of disk for all 256 experts; what is not needed any more is removed on the way.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

from r1mega.weights.architecture import Architecture
from r1mega.weights.boxes import Box
from r1mega.weights.canonical import canonical
from r1mega.weights.safetensors_out import STRIP_VALUES, Encoding, Shard, restated, shards, write_index, write_shard

CONFIG = Path(__file__).parents[2] / "configs" / "deepseek_v3" / "config.json"
FP8 = Encoding(torch.bfloat16, block_fp8=True)


# ---------------------------------------------------------------- the checkpoint


def make(folder: Path, experts: int, processes: int) -> None:
    """A block-FP8 checkpoint quantised from float32 values."""
    changes = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0, "n_routed_experts": experts}
    config = json.loads(CONFIG.read_text()) | changes
    planned = shards(canonical(Architecture.from_hf(config)), FP8, 2_000_000_000)
    folder.mkdir(parents=True)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        list(pool.map(partial(_make_shard, folder), planned))
    write_index(folder, planned, FP8)
    (folder / "config.json").write_text(json.dumps(restated(config, FP8)))


def _make_shard(folder: Path, shard: Shard) -> None:
    torch.set_num_threads(1)
    # Drawing each value anew would take longer than everything else here: strips are windows of one pool, each with its own scale.
    pool = torch.randn(4 * STRIP_VALUES, generator=torch.Generator().manual_seed(0))

    def read(name: str, box: Box) -> torch.Tensor:
        digest = hash((name, box.start)) & 0xFFFFFFFF
        start = digest % (pool.numel() - box.size)
        return (pool[start : start + box.size] * (0.01 + digest % 89 / 5000)).view(box.shape)

    write_shard(folder / shard.name, shard.tensors, FP8, read)


# ---------------------------------------------------------------- what is measured


class Memory(threading.Thread):
    """Largest RssAnon in GB of any process below this one, sampled."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.largest, self.over = pid, 0.0, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.1):
            for pid in self._family():
                try:
                    status = Path(f"/proc/{pid}/status").read_text()
                except OSError:
                    continue
                found = [int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")]
                self.largest = max(self.largest, *(kb * 1024 / 1e9 for kb in found), 0.0)

    def _family(self) -> list[int]:
        found = [self.pid]
        for pid in found:
            try:
                found += [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
            except OSError:
                continue
        return found


def convert(source: Path, target: Path, processes: int) -> float:
    """Convert, print, and return bytes per second, read and written together."""
    os.sync()
    begin = time.monotonic()
    command = [sys.executable, "-m", "r1mega.cli", "convert", str(source), str(target), "--processes", str(processes)]
    process = subprocess.Popen([*command, "--file-size", "2", "--dtype", "bfloat16"], stdout=subprocess.DEVNULL)
    memory = Memory(process.pid)
    memory.start()
    if process.wait():
        raise SystemExit(f"conversion of {source} failed")
    seconds = time.monotonic() - begin
    memory.over.set()
    moved = size(source) + size(target)
    rate = f"{moved / 1e9:.1f} GB read and written in {seconds:.1f} s, {moved / seconds / 1e9:.2f} GB/s"
    print(f"{source.name} -> {target.name}: {rate}, largest RssAnon {memory.largest:.2f} GB", flush=True)
    return moved / seconds


def copy(folder: Path, limit: float) -> float:
    """`cp` of a folder's files, up to so many bytes; returns bytes per second, read and written together."""
    chosen, moved = [], 0
    for path in sorted(folder.iterdir(), key=lambda path: -path.stat().st_size):
        if moved + path.stat().st_size <= limit:
            chosen.append(path)
            moved += path.stat().st_size
    target = folder.with_name("copy")
    target.mkdir()
    os.sync()
    begin = time.monotonic()
    subprocess.run(["cp", *map(str, chosen), str(target)], check=True)
    subprocess.run(["sync", "-f", str(target)], check=True)
    seconds = time.monotonic() - begin
    shutil.rmtree(target)
    print(f"cp: {2 * moved / 1e9:.1f} GB read and written in {seconds:.1f} s, {2 * moved / seconds / 1e9:.2f} GB/s", flush=True)
    return 2 * moved / seconds


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of weights."""
    found = {}
    for path in sorted(folder.glob("*.distcp")):
        with open(path, "rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, help="folder on the disk to measure (default: a temporary one)")
    parser.add_argument("--experts", type=int, default=256, help="experts of the MoE layer (DeepSeek-V3: 256)")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        fp8, megatron, bf16, again = (Path(scratch) / name for name in ("fp8", "megatron", "bf16", "again"))
        begin = time.monotonic()
        make(fp8, options.experts, options.processes)
        print(f"made {size(fp8) / 1e9:.1f} GB in {time.monotonic() - begin:.0f} s", flush=True)
        ratios = {}
        for source, target in ((fp8, megatron), (megatron, bf16), (bf16, again)):
            rate = convert(source, target, options.processes)
            free = shutil.disk_usage(scratch).free - 2e9
            ratios[f"{source.name} -> {target.name}"] = rate / copy(target, min(free, (size(source) + size(target)) / 2))
            if target == megatron:
                first = digests(megatron)
            # There is never room for three.
            if source != bf16:
                shutil.rmtree(source)
        print("the way back gives the same bytes:", digests(again) == first)
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f} of cp's rate")


if __name__ == "__main__":
    main()
