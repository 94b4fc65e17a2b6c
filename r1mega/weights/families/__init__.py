"""Model families. Each module has the same two functions: `architecture(config)` and `table(arch)`."""

from collections.abc import Mapping
from functools import lru_cache
from types import ModuleType
from typing import Any

from r1mega.errors import UserError
from r1mega.weights.architecture import CLASSIFIER, Architecture
from r1mega.weights.families import deepseek_v2, deepseek_v3, llama, qwen2
from r1mega.weights.table import Table

_FAMILIES: dict[str, ModuleType] = {"deepseek_v3": deepseek_v3, "deepseek_v2": deepseek_v2, "qwen2": qwen2, "llama": llama}


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a `config.json` describes; UserError names the key that is wrong or missing."""
    kind = config.get("model_type")
    if kind not in _FAMILIES:
        raise UserError(f"config.json: model_type is {kind!r}, known families are {', '.join(_FAMILIES)}")
    arch: Architecture = _FAMILIES[kind].architecture(config)
    if not any(str(name).endswith(CLASSIFIER) for name in config.get("architectures") or ()):
        return arch
    # transformers writes `id2label`, whose length is the number of labels, and takes 2 where neither key is there.
    labels = config.get("num_labels", len(config.get("id2label") or (0, 1)))
    if labels != 1:
        raise UserError(f"config.json: {config['architectures'][0]} with {labels} labels; a reward model has one (num_labels: 1)")
    return arch.scored()


@lru_cache(maxsize=16)
def table(arch: Architecture) -> Table:
    """The family's table for this architecture."""
    rows: Table = _FAMILIES[arch.family].table(arch)
    return rows
