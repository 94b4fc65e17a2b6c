"""Build, for every training stage of the recipes that ship, all that Megatron-Core gets of them on CUDA, and print what was refused.

Run as a program with a JSON list of lists on standard input, each a recipe and what is laid over it. Prints one line of JSON a list: the
errors, and how many models were built. Transformer Engine is `te_standins`'; its versions and kernels, and DeepEP, are taken to be there.
A process of its own, because of those stand-ins.
"""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

ROOT = Path(__file__).parent.parent


def install() -> None:
    """Stand-ins, and the answers to what Megatron-Core asks of versions."""
    sys.path.insert(0, str(ROOT))
    from tests import te_standins

    te_standins.install()
    adam: Any = ModuleType("transformer_engine.pytorch.optimizers")

    class FusedAdam:
        def __init__(self, master_weight_dtype: Any, exp_avg_dtype: Any, exp_avg_sq_dtype: Any, use_decoupled_grad: bool) -> None:
            raise AssertionError("only its signature is read")

    adam.FusedAdam = adam.FusedSGD = FusedAdam
    adam.multi_tensor_applier = adam.multi_tensor_l2norm = adam.multi_tensor_scale = None
    sys.modules[adam.__name__] = adam

    from megatron.core.transformer import multi_latent_attention, transformer_config

    from r1mega.megatron.platform import meta

    real = multi_latent_attention.TELinear
    meta.prepare(1)
    multi_latent_attention.TELinear = real  # the CPU platform puts its own in its place
    from megatron.core.transformer.moe import experts, moe_utils, token_dispatcher
    from torch import nn

    from r1mega.megatron.platform import cuda

    transformer_config.is_te_min_version = lambda *_, **__: True
    for name in ("permute", "permute_with_probs", "sort_chunks_by_index", "sort_chunks_by_index_with_probs", "unpermute"):
        setattr(moe_utils, f"fused_{name}", object())
    token_dispatcher.fused_dispatch = token_dispatcher.fused_combine = object()
    experts.Fp8Padding = experts.Fp8Unpadding = lambda *_, **__: nn.Identity()
    token_dispatcher.set_deepep_num_sms = lambda count: None
    cuda._installed = lambda module: True
    cuda.fuse_gradients()
    chosen: Any = meta
    chosen.layer_spec, chosen.kernels, chosen.SPELLING = cuda.layer_spec, cuda.kernels, cuda.SPELLING
    chosen.config_overrides = lambda *asked: cuda.config_overrides(*asked) | {"use_cpu_initialization": True}


def examine(paths: list[str], seen: set[str]) -> SimpleNamespace:
    """Every stage that trains: the optimizer's and the reduction's configuration, and a rank of every class of pipeline stages."""
    from r1mega.config.loading import load_recipe
    from r1mega.config.stages import Evaluate, Preference, Rejection
    from r1mega.pipeline.preflight import architectures

    recipe = load_recipe(paths[0], paths[1:], inputs=False)
    found = SimpleNamespace(errors=[], built=0)
    for name, arch in architectures(recipe).items():
        stage = recipe.stages[name]
        if isinstance(stage, Rejection | Evaluate):
            continue
        arch = arch.scored() if isinstance(stage, Preference) else arch
        case = (arch, stage.layout or recipe.layout, recipe.run.ranks, stage.train, stage.optimizer)
        if repr(case) not in seen:
            seen.add(repr(case))
            try:
                found.built += build(*case)
            except Exception as error:  # one stage's failure must not hide the others'
                found.errors.append(f"{name}: {type(error).__name__}: {error}")
    return found


def build(arch: Any, layout: Any, ranks: int, train: Any, optimizer: Any) -> int:
    import torch

    from r1mega.megatron import limits, model, platform, topology
    from r1mega.megatron.architecture import transformer_config
    from r1mega.megatron.optimizer import optimizer_config, reduction_config
    from r1mega.planner.parameters import kinds
    from r1mega.weights.placement import Spelling, placement

    reduction_config(optimizer, train), optimizer_config(optimizer, train)
    topology.check(arch, layout, ranks)
    arch, layout = limits.trained(arch, layout, train.mtp_loss)
    firsts = [first for first, _ in kinds(arch, layout)]
    for stage in firsts:
        # pp varies slowest.
        rank = stage * (ranks // layout.pp)
        with platform.imagined(rank, ranks):
            topology.connect(layout)
            config = transformer_config(arch, layout, train)
            with torch.device("meta"):
                shapes = {key: tuple(weight.shape) for key, weight in model.named_weights(model.build(arch, layout, config)).items()}
            spelling = Spelling("te", model.mtp_layer_name())
            wanted = {(param.chunk, param.name): param.shape for param in placement(arch, layout, ranks, rank, spelling)}
            assert shapes == wanted, f"rank {rank}: {sorted(shapes.items() ^ wanted.items())[:4]}"
    return len(firsts)


def main() -> None:
    asked = json.load(sys.stdin)
    install()
    seen: set[str] = set()
    for paths in asked:
        found = examine(paths, seen)
        print(json.dumps({"errors": found.errors, "built": found.built}), flush=True)


if __name__ == "__main__":
    main()
