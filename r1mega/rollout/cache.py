"""Keys and values of the sequences in flight, and the attention that reads them.

`transformers` offers two ways in: a `Cache`, which its models call before attention, and a registered attention function.
This is the second: models hand over the keys and values of the new tokens only, and this file keeps the old ones.
That leaves out the models' own cache handling (DeepSeek's would expand every cached latent again at every step) and their masks.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

ATTENTION = "r1mega_rows"
"""Value of `attn_implementation` for models that attend through a `RowCache`."""

Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]
"""(layer, query [b, heads, s, d], key [b, kv_heads, s, d], value [b, kv_heads, s, dv], scale) -> [b, s, heads, dv]."""

MIN_WINDOW = 32
"""Columns that attention reads at least: `torch.bmm` leaves BLAS for a slow loop when a product has fewer than 400 terms."""


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: None, *, scaling: float, attend: Attend, **_: Any
) -> tuple[Tensor, None]:
    return attend(module.layer_idx, query, key, value, scaling), None  # type: ignore[arg-type]


AttentionInterface.register(ATTENTION, _attention)


class RowCache:
    """Keys [rows, kv_heads, columns, head_dim] and values of each layer, one row per sequence.

    All rows end in the same column: the newest token of every sequence is in column `end - 1`, whatever its length.
    So one step writes one column of all rows, and reads the few columns that any row uses. When the columns run out,
    `rewind` moves that window back to the front. Rows in flight are always the first ones; columns before a row's first
    token hold finite leftovers that are masked.
    """

    def __init__(self, layers: int, rows: int, longest_prompt: int, columns: int) -> None:
        """`columns` is how many columns are written before a rewind, beyond the `longest_prompt`."""
        self.rows, self.floor = rows, max(MIN_WINDOW, longest_prompt)
        self.columns, self.end = self.floor + columns, self.floor
        self._keys: list[Tensor | None] = [None] * layers
        self._values: list[Tensor | None] = [None] * layers

    def _layer(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self._keys[layer], self._values[layer]
        if keys is None or values is None:
            keys = key.new_empty(self.rows, key.shape[1], self.columns, key.shape[3])
            values = value.new_empty(self.rows, value.shape[1], self.columns, value.shape[3])
            self._keys[layer], self._values[layer] = keys, values
        return keys, values

    def prefill(self, first: int, owner: Tensor, lengths: Tensor) -> Attend:
        """Attention over left-padded prompts [p, s] of `lengths` [p]; rows first, first + 1, ... take the cache of prompts `owner`."""
        steps = torch.arange(int(lengths.max()))
        start = (len(steps) - lengths).view(-1, 1, 1, 1)
        visible = (steps <= steps[:, None]) & (steps >= start)
        # A padding query sees itself, so that its softmax is finite; nobody reads the result.
        mask = visible | torch.eye(len(steps), dtype=torch.bool) if bool(start.any()) else None
        taken = slice(first, first + len(owner))

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
            for stored, new in zip(self._layer(layer, key, value), (key, value), strict=True):
                stored[taken, :, : self.end - len(steps)] = 0
                stored[taken, :, self.end - len(steps) : self.end] = new[owner]
            out = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
            )
            return out.transpose(1, 2)

        return attend

    def decode(self, lengths: Tensor) -> Attend:
        """Attention of one new token in each of the first n rows, which hold `lengths` [n] tokens, the new one included."""
        if self.end == self.columns:
            self.rewind(lengths - 1)
        n, end = len(lengths), self.end
        self.end += 1
        width = max(MIN_WINDOW, int(lengths.max()))
        window = slice(self.end - width, self.end)
        hidden = torch.arange(width) < (width - lengths)[:, None]
        mask = torch.zeros(n, 1, 1, width).masked_fill_(hidden[:, None, None], -torch.inf)
        masks: dict[int, Tensor] = {}

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
            keys, values = self._layer(layer, key, value)
            keys[:n, :, end] = key[:, :, 0]
            values[:n, :, end] = value[:, :, 0]
            heads, kv_heads = query.shape[1], key.shape[1]
            if kv_heads not in masks:
                masks[kv_heads] = mask.expand(n, kv_heads, 1, width).flatten(0, 1).to(query.dtype)
            grouped = query.reshape(n * kv_heads, heads // kv_heads, -1)
            scores = torch.baddbmm(masks[kv_heads], grouped, keys[:n, :, window].flatten(0, 1).transpose(1, 2), alpha=scale)
            out = torch.bmm(scores.softmax(-1), values[:n, :, window].flatten(0, 1))
            return out.view(n, 1, heads, -1)

        return attend

    def rewind(self, lengths: Tensor) -> None:
        """Move the columns that the first n rows use, `lengths` [n], to the front."""
        n, width = len(lengths), max(self.floor, int(lengths.max()))
        for stored in (*self._keys, *self._values):
            assert stored is not None
            stored[:n, :, :width] = stored[:n, :, self.end - width : self.end].clone()
        self.end = width

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy rows `source` to rows `target`."""
        for stored in (*self._keys, *self._values):
            assert stored is not None
            stored[target, :, : self.end] = stored[source, :, : self.end]
