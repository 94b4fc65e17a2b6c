"""`transformers` models as the embedded engine runs them: without weights at first, with our attention and experts."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.integrations.moe import ExpertsInterface
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts, DeepseekV3TopkRouter

from r1mega.errors import UserError
from r1mega.rollout.cache import ATTENTION

FAMILIES = ("deepseek_v3", "qwen2", "llama")
"""Values of `model_type` whose log-probs the tests compare with an ordinary forward pass."""

EXPERTS = "r1mega_sorted"
"""Value of `experts_implementation` for models that run their experts through `_experts`."""


def _experts(module: Any, hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
    """Sum of weight * down(act(gate) * up) over each token's experts.

    hidden [tokens, d], expert_ids and weights [tokens, top_k] -> [tokens, d]; the ids are kept as `module.routed`. Like `transformers`'
    own "grouped_mm", with half of its passes over the [tokens * top_k, d] intermediates.
    """
    module.routed = expert_ids
    flat = expert_ids.reshape(-1)
    order = flat.argsort()
    place = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order)))
    ends = flat.bincount(minlength=module.num_experts).cumsum(0, dtype=torch.int32)
    gate_up = F.grouped_mm(hidden.index_select(0, order // expert_ids.shape[1]), module.gate_up_proj.mT, offs=ends)
    gate, up = gate_up.chunk(2, dim=-1)
    out = F.grouped_mm(module.act_fn(gate).mul_(up), module.down_proj.mT, offs=ends)
    # A bag is a token: its experts' rows of `out`, gathered, weighted and summed in one pass.
    return F.embedding_bag(place.view_as(expert_ids), out, mode="sum", per_sample_weights=weights.to(out.dtype))


ExpertsInterface.register(EXPERTS, _experts)


def build(model_dir: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model of `model_dir/config.json`, its weights unset, in `dtype`. UserError for a model that we do not run."""
    try:
        config = AutoConfig.from_pretrained(model_dir)
    except (OSError, ValueError) as error:
        raise UserError(f"{model_dir}: no model configuration to roll out ({str(error).splitlines()[0]})") from error
    if config.model_type not in FAMILIES:
        raise UserError(f"{model_dir}: the local rollout engine runs {', '.join(FAMILIES)}, not {config.model_type}")
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        raise UserError(f"{model_dir}: the local rollout engine has no sliding-window attention; turn it off in config.json")
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION, experts_implementation=EXPERTS)
    model.tie_weights()
    model.eval().requires_grad_(False)
    embedding = model.get_input_embeddings().weight
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight is not embedding:
            _transpose_storage(module.weight)
        elif isinstance(module, DeepseekV3Experts):
            _transpose_storage(module.gate_up_proj)
            _transpose_storage(module.down_proj)
        elif type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_rms_norm, module)
        elif isinstance(module, DeepseekV3TopkRouter):
            # As from_pretrained does: in bf16 the bias would be too coarse to choose experts by.
            module.e_score_correction_bias = nn.Buffer(module.e_score_correction_bias.float())
    return model


def sparse_layers(model: PreTrainedModel) -> list[DeepseekV3Experts]:
    """The experts of each layer that has some, from the first layer to the last."""
    return [module for module in model.modules() if isinstance(module, DeepseekV3Experts)]


def _rms_norm(module: Any, hidden: Tensor) -> Tensor:
    """What every family writes out in six operations, as the one that torch has."""
    return F.rms_norm(hidden, module.weight.shape, module.weight, module.variance_epsilon)


def _transpose_storage(weight: Tensor) -> None:
    """Lay [..., out, in] out as [..., in, out]: BLAS then skips a transposition that costs as much as a product with few tokens."""
    weight.data = weight.data.mT.contiguous().mT


def weight_places(model: PreTrainedModel) -> dict[str, Tensor]:
    """The memory of each Hugging Face tensor in the model, by name.

    Checkpoints hold the projections of each expert, `transformers` stacks them: [experts, 2 * intermediate, hidden] and
    [experts, hidden, intermediate]. A tied head is not a tensor of its own.
    """
    places: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        prefix, _, stacked = name.rpartition(".experts.")
        if stacked == "gate_up_proj":
            for expert, gate_up in enumerate(tensor):
                gate, up = gate_up.chunk(2)
                places[f"{prefix}.experts.{expert}.gate_proj.weight"] = gate
                places[f"{prefix}.experts.{expert}.up_proj.weight"] = up
        elif stacked == "down_proj":
            places.update({f"{prefix}.experts.{expert}.down_proj.weight": down for expert, down in enumerate(tensor)})
        else:
            places[name] = tensor
    if model.config.tie_word_embeddings:
        places.pop("lm_head.weight")
    return places
