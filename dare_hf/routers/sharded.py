"""Tensors of which FSDP2 keeps each process a part: DTensors of torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def in_parts(tensor: Tensor) -> bool:
    """Whether this process holds a part of a tensor only."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Tensor:
    """The tensor with the parts of all processes, which call this together."""
    return tensor.full_tensor() if in_parts(tensor) else tensor
