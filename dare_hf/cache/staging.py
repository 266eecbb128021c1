"""What a routed layer announces before the attention stores it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from dare_hf.errors import DareStateError

if TYPE_CHECKING:
    from torch import Tensor


class Staged(NamedTuple):
    """The columns that the next update of a layer brings.

    Attributes:
        columns: Long[rows, new] logical positions, -1 for fills and pads; None when every row
            stores the tokens up to `seen`.
        seen: Logical tokens seen by the layer after the update.
        kept: Real tokens among the columns, per row.
        scores: Float[rows, new], or None.
    """

    columns: Tensor | None
    seen: int
    kept: list[int]
    scores: Tensor | None

    def check(self, keys: Tensor, rows: int, seen: int) -> None:
        """Hold what arrives against what was announced.

        Args:
            keys: New keys [B, H, q, d].
            rows: Rows the layer holds, 0 for none yet.
            seen: Logical tokens the layer has seen.

        Raises:
            DareStateError: Rows or columns differ.
        """
        given, count = keys.shape[0], keys.shape[2]
        if rows and given != rows:
            raise DareStateError(
                f"This DareCache holds {rows} rows; got keys of {given} rows. Use a new cache, "
                "batch_select_indices or batch_repeat_interleave"
            )
        expected = self.seen - seen if self.columns is None else self.columns.shape[1]
        if count != expected:
            raise DareStateError(
                f"The layer's plan announced {expected} new columns; the attention brought {count}"
            )
        if self.columns is not None and (len(self.kept) != given or self.seen < seen):
            raise DareStateError(
                f"The layer's plan announced {len(self.kept)} rows up to token {self.seen}; "
                f"expected {given} rows and at least token {seen}"
            )


# One more token in every row, and nothing else is to be said of it.
NEXT = Staged(None, -1, [], None)
