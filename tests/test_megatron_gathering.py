"""Weight sync out of Megatron's own shards: the bytes of the converter's files, over the links and in the amounts that were predicted."""

import json
from collections import Counter
from pathlib import Path

import gathering_ranks
import pytest
import torch.distributed as dist
import torch.multiprocessing as mp
from gathering_ranks import ENGINES, LIMIT, WIRES
from test_weights_convert import make, run
from test_weights_sync import BLOCKS

from r1mega.config.layout import Layout
from r1mega.megatron import limits
from r1mega.megatron.platform import cpu
from r1mega.weights.architecture import Architecture
from r1mega.weights.direct import direct_plan
from r1mega.weights.placement import Spelling
from r1mega.weights.sync import full_plan


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "world"), [({"tp": 2, "ep": 2}, 2), ({"tp": 2, "ep": 2, "pp": 2}, 4)])
def test_bytes_are_the_converters_and_as_many_as_predicted(tmp_path: Path, layout: dict[str, int], world: int) -> None:
    source = make(tmp_path / "bfloat16", BLOCKS)
    assert run(source, tmp_path / "block_fp8", "--to", "hf", "--fp8") == 0
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mp.spawn(gathering_ranks.work, (world, store.port, tmp_path, layout), nprocs=world)
    reports = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(world)]
    arch, placed = limits.trained(Architecture.from_hf(BLOCKS), Layout(**layout), 0.0)
    spelling = Spelling(cpu.SPELLING)
    for name, wire in WIRES.items():
        full = full_plan(arch, placed, world, spelling, wire, LIMIT)
        assert _links(reports, f"full {name}") == full.gathered()
        # Every tensor on one rank, whichever gathered it.
        arrived = [key for report in reports for key in report[f"full {name}"]["names"]]
        assert sorted(arrived) == sorted(entry.name for bucket in full.buckets for entry in bucket.entries)
        direct = direct_plan(arch, placed, world, spelling, ENGINES[name], wire)
        assert _links(reports, f"direct {name}") == direct.links() != {}


def _links(reports: list[dict], path: str) -> Counter[tuple[int, int]]:
    """Bytes by (from, to) as the senders counted them; receivers must have counted the same."""
    sent, received = Counter(), Counter()
    for rank, report in enumerate(reports):
        sent.update({(rank, int(other)): nbytes for other, nbytes in report[path]["moved"]["sent"].items()})
        received.update({(int(other), rank): nbytes for other, nbytes in report[path]["moved"]["received"].items()})
    assert sent == received
    return sent
