"""Packed sequences: several documents in one row, which DARE would take for one; refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dare_hf.errors import DareInputError
from dare_hf.forward.inputs import padding_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

# Arguments by which transformers is told where the documents of a row begin.
_BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


def check_packed(arguments: Mapping[str, Any]) -> None:
    """Refuse a bare forward, or a prompt, over packed sequences.

    Args:
        arguments: Keyword arguments by name.

    Raises:
        DareInputError: position_ids start anew inside a row, or bounds of sequences are given.

    Source: docs/method.md, section 1.
    """
    for name in _BOUNDS:
        if arguments.get(name) is not None:
            raise _refusal(f"{name}, their bounds")
    positions = arguments.get("position_ids")
    if not isinstance(positions, torch.Tensor) or positions.shape[-1] < 2:
        return
    positions = positions.reshape(-1, *positions.shape[-2:]) if positions.ndim > 1 else positions
    positions = positions if positions.ndim > 1 else positions[None, None]
    batch, length = positions.shape[-2:]
    real = padding_of(arguments, batch, length, 0, positions.device)
    rows = _begin_anew(positions, real)
    if (found := rows.nonzero()[:, 0].tolist()) != []:
        raise _refusal(f"position_ids that start anew inside row {found[0]}")


def _begin_anew(positions: Tensor, real: Tensor | None) -> Tensor:
    """Bool[B]: rows in which a real token is back at the place of the first one, or before it.

    Images may step back along one axis; a new document does along all of them.

    Args:
        positions: [axes, B, S].
        real: Bool[B, S]; None where all tokens are.
    """
    if real is None:
        real = torch.ones_like(positions[0], dtype=torch.bool)
    elif real.shape[0] != positions.shape[1]:  # one row of positions for all
        real = real.any(0, keepdim=True)
    place = real.int().argmax(-1).expand(positions.shape[:2])[..., None]
    first = positions.gather(-1, place)
    top = positions.masked_fill(~real, positions.min()).cummax(-1).values
    back = (positions <= first).all(0) & (positions < top).any(0)
    return (back & real).any(-1)


def _refusal(got: str) -> DareInputError:
    return DareInputError(
        f"packed sequences: expected one sequence in each row; got {got} (packing, padding_free or "
        "DataCollatorWithFlattening), of which each would have its own prompt and hops. Pass one "
        "sequence a row, padded, or run inside `with dare_disabled(model)`"
    )
