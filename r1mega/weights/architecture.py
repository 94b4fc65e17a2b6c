"""What a model is, read from its Hugging Face `config.json`. Planner, weight tables and Megatron configuration all start here."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from r1mega.errors import UserError

CLASSIFIER = "ForSequenceClassification"
"""How transformers' names of models with a score end."""


@dataclass(frozen=True)
class Mla:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True)
class Moe:
    """Routed and shared experts (DeepSeek-V3, arXiv 2412.19437, section 2.1.2)."""

    experts: int
    shared_experts: int
    top_k: int
    intermediate_size: int
    first_dense_layers: int
    groups: int
    top_groups: int
    scoring: Literal["sigmoid", "softmax"]
    normalize: bool
    scaling: float
    expert_bias: bool


@dataclass(frozen=True)
class Yarn:
    """YaRN context extension (arXiv 2309.00071)."""

    factor: float
    original_length: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float


@dataclass(frozen=True)
class Llama3Rope:
    """Frequency-dependent RoPE scaling of Llama 3.1."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int


@dataclass(frozen=True)
class Architecture:
    """One transformer, in the field's words; sizes are element counts."""

    family: Literal["deepseek_v3", "deepseek_v2", "qwen2", "llama"]
    vocab: int
    hidden: int
    layers: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope: Yarn | Llama3Rope | None
    max_positions: int
    tied: bool
    qkv_bias: bool
    mla: Mla | None
    moe: Moe | None
    mtp_layers: int
    head: Literal["lm", "score"] = "lm"
    """What follows the last norm: the vocabulary, or the one score of a reward model."""

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Architecture":
        """Read a parsed `config.json`, as transformers 4 or 5 writes it. UserError names a key that is wrong or missing."""
        from r1mega.weights import families  # the families build Architectures, so they import this module

        return families.architecture(config)

    def scored(self) -> "Architecture":
        """The reward model of this shape: one score in place of the vocabulary, and no MTP layer, which predicts tokens."""
        return replace(self, head="score", tied=False, mtp_layers=0)


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a model folder; UserError when it is missing or no JSON object."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} must hold a JSON object")
    return config


def scored_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the reward model of a model's shape: transformers' `...ForSequenceClassification` with one label."""
    names = {"deepseek_v3": "DeepseekV3", "deepseek_v2": "DeepseekV2", "qwen2": "Qwen2", "llama": "Llama"}
    kept = {key: value for key, value in config.items() if key not in ("id2label", "label2id")}
    if "num_nextn_predict_layers" in kept:
        kept["num_nextn_predict_layers"] = 0
    return kept | {"architectures": [names[config["model_type"]] + CLASSIFIER], "num_labels": 1}


def reward_architecture(folder: Path, policy: Architecture) -> Architecture:
    """The architecture of a reward model that is to be scored on a policy's model.

    Raises:
        UserError: the folder is no reward model, or its shapes are not the policy's.
    """
    arch, wanted = Architecture.from_hf(read_config(folder)), policy.scored()
    if arch.head != "score":
        raise UserError(f"{folder}: not a reward model: config.json names no ...{CLASSIFIER}; train one in a preference stage")
    for field in fields(arch):
        found, shared = getattr(arch, field.name), getattr(wanted, field.name)
        if found != shared:
            raise UserError(
                f"{folder}: a reward model is scored on the policy's model and must have its shapes, but its {field.name} is {found}, "
                f"the policy's {shared}"
            )
    return arch
