"""Layers of a hybrid model that hold something else than keys of kept tokens: transformers' own.

A linear-attention or convolution layer keeps a state of fixed size, a cross-attention layer the
keys of the image, one with an indexer index keys beside those of every token. DARE routes none of
them; the cache carries them along.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache, LinearAttentionCacheLayerMixin

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedConfig


def other_layers(config: PreTrainedConfig, slots: Sequence[int]) -> dict[int, Any]:
    """Fresh cache layers of transformers for every layer but those at `slots`.

    Args:
        config: The text config.
        slots: Cache indices of the routed layers.
    """
    return {
        i: layer for i, layer in enumerate(DynamicCache(config=config).layers) if i not in slots
    }


def recurs(config: PreTrainedConfig, slots: Sequence[int]) -> bool:
    """Whether some layer but those at `slots` keeps a state, into which padding would go.

    Args:
        config: The text config.
        slots: Cache indices of the routed layers.
    """
    others = other_layers(config, slots).values()
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in others)


def snapshot(layer: Any) -> Any:
    """The layer as it is now; linear states are overwritten in place, so they are copied."""
    twin = copy.copy(layer)
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        for name, value in vars(layer).items():
            if isinstance(value, dict):
                states = {
                    k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in value.items()
                }
                setattr(twin, name, states)
    return twin


def select_rows(layer: Any, indices: Tensor) -> None:
    """Take the rows `indices`, as beam search does."""
    layer.reorder_cache(indices)


def row_count(layer: Any) -> int:
    """Rows of the batch a layer holds; 0 before anything was stored."""
    states = [*getattr(layer, "conv_states", {}).values(), getattr(layer, "keys", None)]
    found = next((state for state in states if isinstance(state, torch.Tensor)), None)
    return 0 if found is None else found.shape[0]
