"""What spawned trainer ranks do with a server that runs already: give it their shards' weights and let it draw."""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import sglang_support as support
import torch
import torch.distributed as dist
from megatron_support import cpu_platform

from r1mega.config.layout import Layout
from r1mega.config.rollout import Rollout
from r1mega.config.training import Optimizer, Train
from r1mega.megatron.policy import Policy
from r1mega.pipeline import ranks
from r1mega.pipeline.model_folder import ModelFolder
from r1mega.rollout.engine import SamplingParams
from r1mega.rollout.open import Surroundings
from r1mega.rollout.sglang import SglangEngine
from r1mega.weights.moving import reader_of


def work(rank: int, world: int, port: int, folder: Path, model: Path, settings: str, cases: list[dict[str, Any]]) -> None:
    """For each layout: weights of seed 100 + its index, after others, into the shards and to the server; this rank's samples into
    `rank-<r>.json`."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=300))
    arch = ModelFolder(model).arch
    found = []
    with cpu_platform():
        engine = SglangEngine(Rollout.model_validate_json(settings), model, Surroundings("cpu", folder))
        for index, layout in enumerate(cases):
            policy = Policy(arch, Layout(**layout), Train(chunk_tokens=128), Optimizer(lr=1e-3))
            # Twice from one source: what its first sync has worked out serves the second.
            for seed in (index, 100 + index):
                policy.exchange.load(reader_of(support.weights(model, seed)))
                engine.sync(policy.exchange, version=seed)
            samples = engine.generate(ranks.dealt(support.requests()), SamplingParams())
            found.append([vars(sample) for sample in samples])
        engine.close()
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
