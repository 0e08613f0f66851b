"""Replacements inside the embedded engine's own copy of a transformers model, each with the same result, sooner.

* ``GrowingLayer``: a KV cache written in place, where transformers copies the whole cache for every token.
* grouped attention: query heads that share a key head are attended together, where transformers first copies keys and
  values once per query head.
* oneDNN, of ``cppo_lightning.onednn``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cppo_lightning.onednn import use_onednn

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

GROUPED_ATTENTION = "cppo_lightning_grouped_sdpa"


class GrowingLayer(DynamicLayer):
    """One layer's keys and values, each a view ``[rows, heads, length, width]`` of a larger buffer.

    Only for inference: tokens are written in place, and rows that leave are overwritten by rows that stay.
    """

    _layer_type = None  # not offered to other models as their cache layer

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._key_buffer = self.keys = key_states[..., :0, :]
        self._value_buffer = self.values = value_states[..., :0, :]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append ``[rows, heads, new, width]`` and return all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        self._key_buffer, self.keys = _append(self._key_buffer, self.keys, key_states)
        self._value_buffer, self.values = _append(self._value_buffer, self.values, value_states)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Row i becomes the former row ``indices[i]``; rows that stay in place are not copied."""
        if self.keys is None or self.values is None:
            return
        self._key_buffer, self.keys = _select(self._key_buffer, self.keys, indices)
        self._value_buffer, self.values = _select(self._value_buffer, self.values, indices)


def _append(buffer: Tensor, view: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    rows, heads, start, width = view.shape
    end = start + new.shape[-2]
    if end > buffer.shape[-2]:
        # room for half as much again keeps the copies below the tokens written
        buffer = view.new_empty(rows, heads, end + max(64, end // 2) if start else end, width)
        buffer[:, :, :start] = view
    buffer[:rows, :, start:end] = new
    return buffer, buffer[:rows, :, :end]


def _select(buffer: Tensor, view: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    rows, length = len(indices), view.shape[-2]
    if rows > len(view):
        chosen = view[indices]
        return chosen, chosen
    moved = (indices != torch.arange(rows, device=indices.device)).nonzero()[:, 0]
    buffer[moved, :, :length] = view[indices[moved]]
    return buffer, buffer[:rows, :, :length]


def growing_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache for ``model``; layers with a window or a state of their own keep transformers' classes."""
    cache = DynamicCache(config=model.config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``sdpa`` attention; at one new token per row, the query heads of a key head form the query length.

    query ``[R, heads, new, width]``, key and value ``[R, key_heads, length, width]``; returns ``[R, new, heads, width]``.
    """
    rows, heads, new, width = query.shape
    if new > 1 or heads == key.shape[1] or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    grouped = query.reshape(rows, key.shape[1], -1, width)
    out = nn.functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
    )
    return out.reshape(rows, 1, heads, value.shape[-1]), None


def speed_up(model: PreTrainedModel) -> None:
    """Apply grouped attention, where it fits, and oneDNN to ``model``; its parameters stay the same tensors."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(GROUPED_ATTENTION, grouped_attention)
        AttentionMaskInterface.register(GROUPED_ATTENTION, sdpa_mask)
        model.set_attn_implementation(GROUPED_ATTENTION)
    use_onednn(model)
