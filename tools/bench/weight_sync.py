"""Bytes per second of every way to give an SGLang server its weights, against a plain copy of the same bytes.

    python tools/bench/weight_sync.py [--gigabytes 1] [--ranks 1] [--tp 1] [--repeats 5] [--bucket-mb 256] [--json FILE]

Starts one server on this machine with a DeepSeek-V3 of small experts in float32, and `--ranks` trainer processes with the shards that
Megatron would hold (TP x EP when there are two or more). A repeat goes once through all ways, each preceded by a copy between two buffers
that were touched before; the table has the medians of seconds, of bytes per second, and of the ratio to the copy just before. A sync is
timed from the pause to the answer that serves the new version, without checksums. `gather` is the walk over the buckets alone; `gathered
first` makes the whole model on every rank before it is sent by `tensor`. The bytes that each rank sends and receives over gloo must be
those that the plan predicts, or the bench ends with exit code 1. Run it on a quiet machine: it needs two cores and 5 GB a gigabyte.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from r1mega import env
from r1mega.config.engine_layout import EngineLayout
from r1mega.config.layout import Layout
from r1mega.config.rollout import Rollout, Sglang
from r1mega.megatron import platform
from r1mega.megatron.exchange import Exchange
from r1mega.pipeline import ranks
from r1mega.rollout.open import Surroundings
from r1mega.rollout.sglang import SglangEngine
from r1mega.rollout.sglang_network import LOADER
from r1mega.rollout.sglang_payload import InSegments
from r1mega.rollout.sglang_servers import Started
from r1mega.weights.architecture import Architecture
from r1mega.weights.canonical import canonical
from r1mega.weights.direct import direct_plan
from r1mega.weights.placement import Spelling, placement
from r1mega.weights.source import Mapped, WeightSource
from r1mega.weights.sync import full_plan
from r1mega.weights.wire import Wire

HIDDEN, COLUMNS, EXPERTS = 512, 256, 64
KEY = "R1MEGA_BENCH_KEY"
WIRE = Wire("float32")
WAYS: dict[str, dict[str, str]] = {
    "tensor": {"transport": "tensor"},
    "own shards": {"transport": "tensor", "path": "shards"},
    "own, network": {"transport": "distributed", "path": "shards"},
    "request": {"transport": "request"},
    "distributed": {"transport": "distributed"},
    "disk": {"transport": "disk"},
}


def config(gigabytes: float) -> dict[str, Any]:
    """A model of about so many bytes: MoE layers of 64 experts of 1.6 MB each."""
    layers = max(1, round(gigabytes * 1e9 / (EXPERTS * 3 * HIDDEN * COLUMNS * 4)))
    return {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 1024, "hidden_size": HIDDEN,
        "intermediate_size": 1024, "moe_intermediate_size": COLUMNS, "num_hidden_layers": layers + 1, "first_k_dense_replace": 1,
        "moe_layer_freq": 1, "num_attention_heads": 8, "num_key_value_heads": 8, "q_lora_rank": 128, "kv_lora_rank": 64,
        "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "n_routed_experts": EXPERTS, "n_shared_experts": 1,
        "num_experts_per_tok": 4, "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
        "norm_topk_prob": True, "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 0, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "attention_bias": False, "attention_dropout": 0.0, "rope_theta": 10000.0, "max_position_embeddings": 512,
        "initializer_range": 0.02, "tie_word_embeddings": False, "use_cache": True, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, "dtype": "float32",
    }  # fmt: skip


@contextmanager
def counted() -> Iterator[Counter[tuple[int, int]]]:
    """Bytes by (from, to) that this rank sends; both ends count, and must agree."""
    found: Counter[tuple[int, int]] = Counter()
    send, recv, me = dist.send, dist.recv, dist.get_rank()

    def sending(values: torch.Tensor, other: int) -> Any:
        found[me, other] += values.nbytes
        return send(values, other)

    def receiving(values: torch.Tensor, other: int) -> Any:
        found[other, me] += values.nbytes
        return recv(values, other)

    dist.send, dist.recv = sending, receiving  # type: ignore[assignment]
    try:
        yield found
    finally:
        dist.send, dist.recv = send, recv


class Bench:
    """One trainer rank."""

    def __init__(self, options: argparse.Namespace, model: Path, address: str, folder: Path) -> None:
        self.options, self.limit = options, options.bucket_mb * 2**20
        self.arch, self.layout = Architecture.from_hf(config(options.gigabytes)), layout_of(options.ranks)
        placed = placement(self.arch, self.layout, options.ranks, ranks.number(), Spelling())
        self.exchange = Exchange(self.arch, self.layout, {(p.chunk, p.name): torch.randn(p.shape) for p in placed})
        self.nbytes = sum(4 * torch.Size(tensor.shape).numel() for tensor in canonical(self.arch))
        self.engine_layout = EngineLayout(tp=options.tp, device="cpu")
        common = {"addresses": [address], "key_variable": KEY, "checksums": "none", "retries": 0, "bucket_bytes": self.limit}
        self.engines = {
            name: SglangEngine(
                Rollout(engine="sglang", sglang=Sglang.model_validate({**common, "layout": {"tp": options.tp}, **way})),
                model,
                Surroundings("cpu", folder / name.replace(" ", "-")),
            )
            for name, way in WAYS.items()
            if name in options.ways
        }
        self.version = 0
        self.copied = (torch.ones(self.nbytes, dtype=torch.uint8), torch.zeros(self.nbytes, dtype=torch.uint8))

    def copy_seconds(self) -> float:
        """Of a copy of the model's bytes on rank 0, while the others wait."""
        dist.barrier()
        begin = time.perf_counter()
        if ranks.number() == 0:
            self.copied[1].copy_(self.copied[0])
        return float(ranks.shared(lambda: time.perf_counter() - begin))

    def timed(self, act: Callable[[], object]) -> tuple[float, float]:
        """(seconds of a copy, seconds of an act until all ranks have done it)."""
        copy = self.copy_seconds()
        dist.barrier()
        begin = time.perf_counter()
        act()
        dist.barrier()
        return copy, time.perf_counter() - begin

    def acts(self) -> dict[str, Callable[[], object]]:
        """What a repeat goes through."""
        found: dict[str, Callable[[], object]] = {
            name: lambda e=engine: self.sync(e, self.exchange) for name, engine in self.engines.items()
        }
        segments, tensor = InSegments(2), self.engines["tensor"]
        found["gather"] = lambda: [None for _ in self.exchange.buckets(WIRE, self.limit, None, ranks.number(), segments.room)]
        found["gathered first"] = lambda: self.sync(tensor, Mapped(self.arch, self.exchange.gather(torch.float32)))
        return found

    def sync(self, engine: SglangEngine, source: WeightSource) -> None:
        self.version += 1
        engine.sync(source, self.version)

    def mispredicted(self) -> list[str]:
        """Links on which other bytes travelled than planned."""
        arch, layout, world, me, tp = self.arch, self.layout, self.options.ranks, ranks.number(), self.options.tp
        full = full_plan(arch, layout, world, Spelling(), WIRE, self.limit)
        direct = direct_plan(arch, layout, world, Spelling(), self.engine_layout, WIRE)
        walks: dict[str, tuple[Counter[tuple[int, int]], Callable[[], object]]] = {
            "full": (full.gathered(), lambda: [None for _ in self.exchange.buckets(WIRE, self.limit, None, me)])
        }
        if tp <= world:
            walks["own shards"] = (
                direct.links(),
                lambda: [None for r in range(tp) for _ in self.exchange.params(self.engine_layout, r, WIRE, self.limit, r, me)],
            )
        wrong = []
        apart = direct_plan(arch, layout, world, Spelling(), self.engine_layout, WIRE, first=world).links()
        for rank in range(tp):
            parcels = [parcel for _, parcel in self.exchange.parcels(self.engine_layout, rank, WIRE, self.limit, me) if parcel]
            given = sum(parcel.message.nbytes for parcel in parcels)
            if given != apart[me, world + rank]:
                wrong.append(f"own, network: rank {me} to {rank} of the server: {given:,} bytes, {apart[me, world + rank]:,} planned")
        for name, (planned, walk) in walks.items():
            with counted() as moved:
                walk()
            for link in {link for link in planned.keys() | moved.keys() if me in link}:
                if planned[link] != moved[link]:
                    wrong.append(f"{name}: rank {link[0]} to {link[1]}: {moved[link]:,} bytes, {planned[link]:,} planned")
        return [line for lines in ranks.gathered(wrong) for line in lines]


def layout_of(count: int) -> Layout:
    """Both kinds of cuts as soon as there are two ranks."""
    return Layout(tp=count, ep=count) if count > 1 else Layout()


def work(rank: int, options: argparse.Namespace, port: int, model: Path, address: str, folder: Path) -> None:
    """All of a trainer rank; rank 0 prints."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=options.ranks, timeout=timedelta(seconds=3600))
    platform.start("cpu", 1)
    bench = Bench(options, model, address, folder)
    wrong = bench.mispredicted()
    acts = bench.acts()
    for act in acts.values():
        act()  # pages touched, groups formed, plans made
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in acts}
    for _ in range(options.repeats):
        for name, act in acts.items():
            seconds[name].append(bench.timed(act))
    if rank == 0:
        rows = {
            name: {
                "seconds": statistics.median(spent for _, spent in found),
                "bytes_per_second": statistics.median(bench.nbytes / spent for _, spent in found),
                "of_copy": statistics.median(copy / spent for copy, spent in found),
                "lowest": min(copy / spent for copy, spent in found),
                "highest": max(copy / spent for copy, spent in found),
            }
            for name, found in seconds.items()
        }
        copies = [copy for found in seconds.values() for copy, _ in found]
        report = {"bytes": bench.nbytes, "copy_bytes_per_second": bench.nbytes / statistics.median(copies), "ways": rows, "wrong": wrong}
        (folder / "report.json").write_text(json.dumps(report, indent=1))
    for engine in bench.engines.values():
        engine.close()


def spawned(options: argparse.Namespace, model: Path, server: Started, folder: Path) -> None:
    """Run all trainer ranks. RuntimeError when one fails."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = env.for_ranks(1, "cpu") | {KEY: server.client.key or ""}
    call = [sys.executable, __file__, *sys.argv[1:], "--worker"]
    each = [[*call, *map(str, (rank, store.port, model, server.client.address, folder))] for rank in range(options.ranks)]
    running = [subprocess.Popen(command, env=environment) for command in each]
    try:
        for process in running:
            if process.wait():
                raise RuntimeError(f"a trainer rank ended with exit code {process.returncode}")
    finally:
        for process in running:
            process.kill()


def printed(report: dict[str, Any], options: argparse.Namespace) -> None:
    """The table."""
    print(
        f"{report['bytes'] / 1e9:.3f} GB, {options.ranks} trainer rank(s), server tp {options.tp}, buckets of {options.bucket_mb} MiB, "
        f"median of {options.repeats}; a copy: {report['copy_bytes_per_second'] / 1e9:.2f} GB/s"
    )
    print(f"{'':16}{'seconds':>9}{'GB/s':>8}{'of copy':>9}{'lowest':>8}{'highest':>9}")
    for name, row in report["ways"].items():
        numbers = f"{row['seconds']:9.3f}{row['bytes_per_second'] / 1e9:8.3f}{row['of_copy']:9.3f}{row['lowest']:8.3f}{row['highest']:9.3f}"
        print(f"{name:16}{numbers}")
    print("\n".join(report["wrong"]) or "bytes of every rank and link: as planned")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--ranks", type=int, default=1, choices=(1, 2, 4))
    parser.add_argument("--tp", type=int, default=1, help="ranks of the server")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bucket-mb", type=int, default=256)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS), help="'tensor' is always among them")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.ways = sorted({"tensor", *options.ways}, key=list(WAYS).index)
    if options.worker:
        rank, port, model, address, folder = options.worker
        work(int(rank), options, int(port), Path(model), address, Path(folder))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = folder / "model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(config(options.gigabytes)))
        settings = Sglang(
            layout=EngineLayout(tp=options.tp), start_timeout_s=1800, max_total_tokens=2048, max_running_requests=2, deterministic=False,
            arguments=["--custom-weight-loader", LOADER],
        )  # fmt: skip
        server = Started(settings, model, "float32", Surroundings("cpu", folder), 0)
        try:
            while not server.ready():
                time.sleep(1)
            spawned(options, model, server, folder)
        finally:
            server.stop()
        report = json.loads((folder / "report.json").read_text())
    printed(report, options)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))
    return 1 if report["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
