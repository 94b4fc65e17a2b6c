"""Keys and values of the sequences in flight, and the attention that reads them.

`transformers` offers two ways in: a `Cache`, which its models call before attention, and a registered attention function.
This is the second: models hand over the keys and values of new tokens only, and this file keeps the old ones.
That leaves out the models' masks, and lets a step of latent attention read latents: DeepSeek's own forward pass expands
every cached latent into the keys and values of all heads again at every step.
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache

ATTENTION = "r1mega_rows"
"""Value of `attn_implementation` for models that attend through a `RowCache`."""

FLOOR = 64
"""Columns that a row has at least."""

STEPS = 128
"""Columns of a new cache beyond its longest prompt."""


class Latents(Cache):
    """Stands where DeepSeek's attention expects its cache: notes the new tokens' latents and gives them back, with no old ones."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.new = torch.empty(0)
        """Latents [b, 1, s, kv_lora_rank + qk_rope_head_dim] of the layer that is running."""

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Compressed latents and rotated keys, under the names of the base class."""
        self.new = torch.cat((key_states, value_states), dim=-1)
        return key_states, value_states


class RowCache:
    """Keys [rows, kv_heads, columns, head_dim] and values of each layer, or latents alone, one row per sequence.

    All rows end in the same column: the newest token of every sequence is in column `end - 1`, whatever its length.
    So one step writes one column of all rows, and reads the few columns that any row uses. When the columns run out,
    `rewind` moves that window back to the front. Rows in flight are always the first ones; columns before a row's first
    token hold finite leftovers that are masked.
    """

    def __init__(self, layers: int, rows: int, longest_prompt: int, *, latent: bool) -> None:
        """`latent` is for models that cache latents. Memory is taken at the first tokens, whose shapes tell the sizes."""
        self.rows, self.floor = rows, max(FLOOR, longest_prompt)
        self.columns, self.end = self.floor + STEPS, self.floor
        self.latents = Latents() if latent else None
        self._layers: list[tuple[Tensor, ...]] = [()] * layers

    def layer(self, index: int, new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What is kept of a layer, shaped after its `new` tensors [b, heads, s, dim]."""
        if not self._layers[index]:
            self._layers[index] = tuple(part.new_empty(self.rows, part.shape[1], self.columns, part.shape[3]) for part in new)
        return self._layers[index]

    @property
    def narrowest(self) -> int:
        """Columns that a step reads at least: MKL's batched products take two to three times as long when keys are wider than many."""
        return min(self.floor, self._layers[0][0].shape[3])

    def rewind(self, lengths: Tensor) -> None:
        """Move the columns that the first n rows use, `lengths` [n], to the front, of a longer cache if they are more than half."""
        width = max(self.floor, int(lengths.max()))
        self.columns = max(self.columns, 2 * width)
        self._layers = [tuple(self._rewound(part, len(lengths), width) for part in layer) for layer in self._layers]
        self.end = width

    def _rewound(self, kept: Tensor, n: int, width: int) -> Tensor:
        window = kept[:n, :, self.end - width : self.end].clone()
        if kept.shape[2] < self.columns:
            kept = kept.new_empty(*kept.shape[:2], self.columns, kept.shape[3])
        kept[:n, :, :width] = window
        return kept

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy rows `source` to rows `target`."""
        for kept in (part[:, :, : self.end] for layer in self._layers for part in layer):
            kept[target] = kept[source]


class Pass(Protocol):
    """One forward pass over a cache: keeps the new tokens and attends. Query [b, heads, s, d], result [b, s, heads, dv]."""

    cache: RowCache

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Plain attention: key [b, kv_heads, s, d] and value [b, kv_heads, s, dv] of the new tokens."""

    def attend_latent(self, module: Any, query: Tensor, key: Tensor, value: Tensor, latent: Tensor, scale: float) -> Tensor:
        """Latent attention, as `attend`, where `latent` [b, 1, s, rank + rope] is to be kept."""


class Prefill:
    """Left-padded prompts [p, s] of `lengths` [p]; rows first, first + 1, ... keep those of prompts `owner`."""

    def __init__(self, cache: RowCache, first: int, owner: Tensor, lengths: Tensor) -> None:
        self.cache, self.owner, self.width = cache, owner, int(lengths.max())
        self.rows = slice(first, first + len(owner))
        steps = torch.arange(self.width)
        start = (self.width - lengths).view(-1, 1, 1, 1)
        visible = (steps <= steps[:, None]) & (steps >= start)
        # A padding query sees itself, so that its softmax is finite; nobody reads the result.
        self.mask = visible | torch.eye(self.width, dtype=torch.bool) if bool(start.any()) else None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        self._keep(layer, (key, value))
        return self._causal(query, key, value, scale)

    def attend_latent(self, module: Any, query: Tensor, key: Tensor, value: Tensor, latent: Tensor, scale: float) -> Tensor:
        self._keep(module.layer_idx, (latent,))
        return self._causal(query, key, value, scale)

    def _keep(self, layer: int, new: tuple[Tensor, ...]) -> None:
        end = self.cache.end
        for kept, part in zip(self.cache.layer(layer, new), new, strict=True):
            kept[self.rows, :, : end - self.width] = 0
            kept[self.rows, :, end - self.width : end] = part[self.owner]

    def _causal(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        grouped = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=self.mask, is_causal=self.mask is None, scale=scale, enable_gqa=grouped
        )
        return out.transpose(1, 2)


class Whole(Prefill):
    """Left-padded sequences [p, s] of `lengths` [p] that are read once and not continued: no keys and values are kept."""

    def __init__(self, cache: RowCache, lengths: Tensor) -> None:
        super().__init__(cache, 0, torch.arange(len(lengths)), lengths)

    def _keep(self, layer: int, new: tuple[Tensor, ...]) -> None:
        pass


class Decode:
    """One new token in each of the first n rows, which hold `lengths` [n] tokens, the new one included."""

    def __init__(self, cache: RowCache, lengths: Tensor) -> None:
        if cache.end == cache.columns:
            cache.rewind(lengths - 1)
        self.cache, self.column, self.n = cache, cache.end, len(lengths)
        cache.end += 1
        width = max(cache.narrowest, int(lengths.max()))
        self.window = slice(cache.end - width, cache.end)
        self.hidden = torch.arange(width) < (width - lengths)[:, None]
        self._masks: dict[int, Tensor] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return self._attend(layer, query, (key, value), value.shape[3], scale)

    def attend_latent(self, module: Any, query: Tensor, key: Tensor, value: Tensor, latent: Tensor, scale: float) -> Tensor:
        """Attention among latents, the up-projections absorbed into query and output (DeepSeek-V2, arXiv 2405.04434, section 2.1.2).

        All heads share one key, the latent, whose first `kv_lora_rank` elements are also the value.
        """
        up_key, up_value = module.kv_b_proj.weight.unflatten(0, (query.shape[1], -1)).split(
            (module.qk_nope_head_dim, module.v_head_dim), dim=1
        )
        nope, rope = query[:, :, 0].split((module.qk_nope_head_dim, module.qk_rope_head_dim), dim=-1)
        absorbed = torch.bmm(nope.transpose(0, 1), up_key).transpose(0, 1)
        mixed = self._attend(module.layer_idx, torch.cat((absorbed, rope), dim=-1)[:, :, None], (latent,), module.kv_lora_rank, scale)
        return torch.bmm(mixed[:, 0].transpose(0, 1), up_value.mT).transpose(0, 1)[:, None]

    def _attend(self, layer: int, query: Tensor, new: tuple[Tensor, ...], value_dim: int, scale: float) -> Tensor:
        kept = [part[: self.n] for part in self.cache.layer(layer, new)]
        for part, token in zip(kept, new, strict=True):
            part[:, :, self.column] = token[:, :, 0]
        keys = kept[0][:, :, self.window].flatten(0, 1)
        values = kept[-1][:, :, self.window, :value_dim].flatten(0, 1)
        grouped = query.reshape(len(keys), -1, query.shape[3])
        scores = torch.baddbmm(self._mask(kept[0]), grouped, keys.mT, alpha=scale)
        weights = scores.softmax(-1, dtype=torch.float32).to(values.dtype)
        return torch.bmm(weights, values).view(self.n, 1, query.shape[1], value_dim)

    def _mask(self, keys: Tensor) -> Tensor:
        """What is added to scores, [n * kv_heads, 1, window]: the same for all layers of a model."""
        heads = keys.shape[1]
        if heads not in self._masks:
            additive = keys.new_zeros(self.hidden.shape).masked_fill_(self.hidden, -torch.inf)
            self._masks[heads] = additive[:, None].repeat_interleave(heads, 0)
        return self._masks[heads]


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: None, *, scaling: float, rows: Pass, **_: Any
) -> tuple[Tensor, None]:
    if rows.cache.latents is None:
        return rows.attend(module.layer_idx, query, key, value, scaling), None
    return rows.attend_latent(module, query, key, value, rows.cache.latents.new, scaling), None


AttentionInterface.register(ATTENTION, _attention)
