"""What `tools/plan_sync` prints: what a weight sync moves, the bound of its links, and how close its schedule comes."""

from dataclasses import dataclass

from r1mega.config.engine_layout import EngineFile
from r1mega.config.layout import LayoutFile
from r1mega.report.audit import columns
from r1mega.weights.architecture import Architecture
from r1mega.weights.direct import direct_plan
from r1mega.weights.links import direct_bound, egress, full_seconds, ingress, schedule
from r1mega.weights.placement import Spelling
from r1mega.weights.sync import full_plan
from r1mega.weights.wire import Wire


@dataclass(frozen=True)
class Cost:
    """One path from a trainer to an engine. Bytes are those over the network; what stays on a GPU is not among them.

    `links`: pairs of GPUs between which bytes move. `bound_s` and `schedule_s` are seconds at the given rate of every GPU's link.
    """

    path: str
    received: int
    sent: int
    links: int
    total: int
    quantised_late: int
    bound_s: float
    schedule_s: float

    @property
    def ratio(self) -> float:
        return self.schedule_s / self.bound_s if self.bound_s else 1.0


def costs(arch: Architecture, train: LayoutFile, serve: EngineFile, rate: float, limit: int) -> list[Cost]:
    """Both paths, for a GPU link of `rate` bytes per second in each direction and buckets of `limit` bytes.

    UserError when a layout does not fit the model.
    """
    wire, first = Wire("bfloat16", serve.block_fp8), 0 if serve.colocated else train.ranks
    direct = direct_plan(arch, train.layout, train.ranks, Spelling(), serve.engine, wire, first)
    links = direct.links()
    found = [Cost(
        path="own shards",
        received=max(ingress(links).values(), default=0), sent=max(egress(links).values(), default=0),
        links=len(links), total=links.total(), quantised_late=direct.quantised_late,
        bound_s=direct_bound(direct) / rate, schedule_s=schedule(links, rate, limit).seconds,
    )]  # fmt: skip
    full = full_plan(arch, train.layout, train.ranks, Spelling(), wire, limit)
    gathered = full.gathered()
    found.append(Cost(
        path="full tensors",
        received=full.nbytes, sent=max((egress(gathered) + full.handed_over()).values()),
        links=len(gathered) + len(full.handed_over()) * serve.engine.ranks, total=gathered.total() + full.nbytes * serve.engine.ranks,
        quantised_late=sum(entry.quantised for bucket in full.buckets for entry in bucket.entries),
        bound_s=full.nbytes / rate, schedule_s=full_seconds(full, rate),
    ))  # fmt: skip
    return found


def described(train_name: str, train: LayoutFile, serve_name: str, serve: EngineFile, found: list[Cost]) -> list[str]:
    """A heading and a table of the paths."""
    engine = serve.engine
    where = "on the trainer's GPUs" if serve.colocated else "on GPUs of its own"
    rows = [["path", "GB to a GPU", "GB from a GPU", "links", "TB in all", "quantised late", "bound s", "schedule s", "ratio"]]
    for cost in found:
        bytes_ = (f"{cost.received / 1e9:,.2f}", f"{cost.sent / 1e9:,.2f}", f"{cost.links:,}", f"{cost.total / 1e12:,.2f}")
        rows.append([cost.path, *bytes_, str(cost.quantised_late), f"{cost.bound_s:.3f}", f"{cost.schedule_s:.3f}", f"{cost.ratio:.3f}"])
    return [
        f"{train_name} ({train.ranks:,} GPUs) to {serve_name} ({engine.servers} x {engine.tp} GPUs {where}), "
        f"{'block FP8' if serve.block_fp8 else 'bfloat16'}",
        *columns(rows),
    ]
