"""Bringing the model's logical attention mask to the rows and columns a layer really has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

try:
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask
except ImportError:  # torch built without flex attention
    BlockMask, create_block_mask = (), None


def is_flash(implementation: str | None) -> bool:
    """Whether this attention takes 2D masks and its own causal flag."""
    return "flash" in (implementation or "")


def gather_mask(
    mask: Any,
    rows: Tensor,
    columns: Tensor,
    *,
    past: int,
    holes: bool,
    rows_live: Tensor | None,
    causal: bool,
    implementation: str | None,
    dtype: torch.dtype,
) -> Any:
    """The mask of the tokens a layer runs, from HF's mask over logical rows and columns.

    Args:
        mask: What HF passed: None, bool or additive [B|1, H|1, S, N], 2D [B, N] for flash, or
            a flex BlockMask over [B, H, S, N].
        rows: Long[B|1, K] index of the running tokens among the S new columns.
        columns: Long[B|1, C] logical positions of the physical keys, -1 for holes; its last K
            are the running tokens.
        past: Logical columns before this forward.
        holes: Whether `columns` may hold -1.
        rows_live: Bool[B, K], False for tokens that only fill a ragged row; None if none do.
        causal: What a None mask means for this layer.
        implementation: Name of the attention function.
        dtype: Of the additive mask that eager attention needs.

    Returns:
        A mask of the kind that was given, over K rows and C columns. Rows that only fill see
        themselves alone.
    """
    if is_flash(implementation):
        return _gather_flat(mask, columns) if holes or mask is not None else None
    if mask is not None and isinstance(mask, BlockMask):
        return _gather_block(mask, rows, columns, rows_live)
    kept = (columns >= 0)[:, None, None, :]
    if mask is not None:
        taken = _take(_take(mask, rows, 2), columns.clamp(min=0), 3)
        visible = _hide(taken, ~kept) if holes else taken
    else:
        visible = kept.expand(-1, 1, rows.shape[1], -1)
        if causal:
            query = (rows + past)[:, None, :, None]
            visible = visible & (columns[:, None, None, :] <= query)
        if implementation is not None and implementation.endswith("eager"):
            low = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=visible.device)
            visible = torch.where(visible, torch.zeros_like(low), low)
    return visible if rows_live is None else _self_only(visible, rows_live)


def _take(mask: Tensor, index: Tensor, dim: int) -> Tensor:
    """Select entries of a [B|1, H, S, N] mask along `dim` by Long[B|1, K], per row."""
    if index.shape[0] == 1:
        return mask.index_select(dim, index[0])
    shape = [index.shape[0], mask.shape[1], mask.shape[2], mask.shape[3]]
    mask = mask.expand(index.shape[0], -1, -1, -1)
    shape[dim] = index.shape[1]
    view = index[:, None, :, None] if dim == 2 else index[:, None, None, :]
    return mask.gather(dim, view.expand(shape))


def _hide(mask: Tensor, hidden: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask & ~hidden
    return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)


def _self_only(mask: Tensor, live: Tensor) -> Tensor:
    """Let filling rows see themselves and nothing else, so that no softmax is empty."""
    count = live.shape[1]
    own = torch.zeros((count, mask.shape[-1]), dtype=torch.bool, device=mask.device)
    own[:, mask.shape[-1] - count :] = torch.eye(count, dtype=torch.bool, device=mask.device)
    if mask.dtype == torch.bool:
        return torch.where(live[:, None, :, None], mask, own)
    low = torch.finfo(mask.dtype).min
    alone = torch.where(own, torch.zeros((), dtype=mask.dtype, device=mask.device), low)
    return torch.where(live[:, None, :, None], mask, alone)


def _gather_flat(mask: Tensor | None, columns: Tensor) -> Tensor:
    """2D flash masks: 1 for stored tokens; the kernel's causal flag does the rest."""
    kept = columns >= 0
    if mask is not None:
        logical = mask.expand(columns.shape[0], -1)
        kept = kept & logical.gather(1, columns.clamp(min=0)).bool()
    return kept


def _gather_block(mask: Any, rows: Tensor, columns: Tensor, live: Tensor | None) -> Any:
    inner, offset = mask.mask_mod, columns.shape[1] - rows.shape[1]
    rows, columns = rows.contiguous(), columns.contiguous()
    one_row, one_column = rows.shape[0] == 1, columns.shape[0] == 1

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        row = rows[0, q] if one_row else rows[b, q]
        column = columns[0, kv] if one_column else columns[b, kv]
        seen = inner(b, h, row, column.clamp(min=0)) & (column >= 0)
        return seen if live is None else torch.where(live[b, q], seen, kv == q + offset)

    batch = max(rows.shape[0], columns.shape[0])
    return create_block_mask(
        mask_mod, batch, None, rows.shape[1], columns.shape[1], device=rows.device
    )
