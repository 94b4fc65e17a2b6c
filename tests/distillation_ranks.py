"""What ranks do to test listed log-probs under one layout; test_megatron_distillation runs it in one process and in several."""

import json
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import megatron_support as support
import torch
import torch.distributed as dist
from megatron_support import Case
from safetensors.torch import load_file
from torch import Tensor

from r1mega.config.layout import Layout
from r1mega.config.training import Optimizer, Train
from r1mega.data.packing import TokenSequence
from r1mega.megatron.policy import LocalBatch, Policy, TokenLoss
from r1mega.objectives.distillation import forward_kl
from r1mega.weights.architecture import Architecture
from r1mega.weights.moving import reader_of

K = 6


def sequences(vocab: int = 127) -> list[TokenSequence]:
    """Ragged sequences with a made-up teacher; some of its tokens are not the student's."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for sequence in support.sequences():
        length = len(sequence.tokens)
        top = (2 * torch.randn(length, vocab + 3, generator=generator)).log_softmax(-1).topk(K)
        known = top.values.masked_fill(top.indices >= vocab, -torch.inf)
        found.append(TokenSequence(sequence.tokens, sequence.weights, {"top_ids": top.indices, "top_logprobs": known}))
    return found


def run(case: Case) -> support.Outcome:
    """The gradients of one step of forward KL on random weights."""
    arch = Architecture.from_hf(support.CONFIGS[case.model])
    train = Train(**{"chunk_tokens": 128, "logprob_chunk": 17, **case.train})
    policy = Policy(arch, Layout(**case.layout), train, Optimizer(lr=1e-3, clip_grad=0.0, distributed=False))
    policy.exchange.load(reader_of(support.random_weights(arch)))

    def lose(hidden: Tensor, batch: LocalBatch) -> tuple[Tensor, TokenLoss]:
        logprobs, rest = policy.listed_logprobs(policy.trunk(hidden), batch.extras["top_ids"], batch.mask)
        divergence = forward_kl(logprobs, rest, batch.extras["top_logprobs"])
        loss = (batch.loss_weights * divergence).sum()
        return loss, TokenLoss(divergence, {"loss": loss, "rest": rest.sum(), "tokens": batch.mask.sum()})

    taken = policy.descend(policy.microbatches(sequences()), lose, 1e-3)
    local = {key: weight.main_grad.clone() for key, weight in policy.weights.items() if hasattr(weight, "main_grad")}
    return support.Outcome(policy, {"loss": taken.loss, "grad_norm": taken.grad_norm, **taken.sums}, {}, local)


def work(rank: int, world: int, port: int, folder: Path, cases: Sequence[Case]) -> None:
    """Write `folder/rank-<r>.json`: each case's scalars and differences from the reference, or the error."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=120))
    report: dict[str, Any] = {}
    with support.cpu_platform():
        for case in cases:
            try:
                outcome = run(case)
                reference = load_file(folder / f"{case.reference.name}.safetensors")
                report[case.name] = {"scalars": outcome.scalars, "differences": support.differences(outcome, reference)}
            except Exception:
                report[case.name] = {"error": traceback.format_exc()}
    (folder / f"rank-{rank}.json").write_text(json.dumps(report))
