"""What the streams of all tasks check alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dare_hf.errors import DareInputError

if TYPE_CHECKING:
    from collections.abc import Collection


def item_indices(split: str, known: Collection[str], n: int, first: int) -> range:
    """The indices of `n` items of a split's stream, from `first` on.

    Raises:
        DareInputError: The split is not one of `known`, or a count is negative.
    """
    if split not in known:
        raise DareInputError(f"split: expected one of {sorted(known)}, got {split!r}")
    if n < 0 or first < 0:
        raise DareInputError(f"expected n >= 0 and first >= 0, got n={n}, first={first}")
    return range(first, first + n)
