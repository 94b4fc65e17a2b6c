"""What the routers of a `transformers` model choose."""

import torch
from torch import Tensor, nn

from r1mega.rollout.engine import Sample


def chosen(model: nn.Module, sample: Sample) -> Tensor:
    """Experts [n, sparse layers, top_k], in ascending order, of the n tokens of a sample that were fed: all but its last."""
    seen: list[Tensor] = []
    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    hooks = [gate.register_forward_hook(lambda _module, _args, out: seen.append(out[2])) for gate in gates]
    with torch.no_grad():
        model(input_ids=torch.tensor([(sample.prompt_ids + sample.response_ids)[:-1]]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack(seen, dim=1).sort(-1).values
