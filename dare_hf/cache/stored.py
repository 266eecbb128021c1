"""What a layer of the cache tells of the tokens it stores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from dare_hf.cache.columns import ColumnTable
    from dare_hf.cache.slab import Slabs


_MASK_ROOM = 64  # columns a mask of steps is made wider than needed


class StoredColumns:
    """Reads the table of the columns in use, and the slabs."""

    _table: ColumnTable
    _slabs: Slabs | None
    plain: bool
    _visible: tuple[Tensor | None, Tensor] | None

    @property
    def seen(self) -> int:
        """Logical tokens that have passed this layer."""
        return self._table.seen

    @property
    def width(self) -> int:
        """Physical columns in use."""
        return self._table.width

    @property
    def rows(self) -> int:
        """Rows of the batch; 0 until something was stored."""
        return self._table.rows

    @property
    def kept_host(self) -> list[int]:
        """Real tokens stored per row, as the host knows them."""
        return self._table.kept

    @property
    def holes(self) -> bool:
        """Whether some row has a column that holds no real token."""
        return self._table.holes

    @property
    def even(self) -> bool:
        """Whether all rows store the same number of tokens."""
        return self._table.even

    @property
    def pruned(self) -> bool:
        """Whether columns are not the logical ones: HF's own masks do not fit any more."""
        return not self.plain or self._table.width != self._table.seen

    def positions(self) -> Int[Tensor, "rows width"]:
        """Logical position of every physical column, -1 for holes."""
        return self._table.positions()

    def valid(self) -> Bool[Tensor, "rows width"] | None:
        """Which columns hold a real token; None when all do."""
        return self._table.valid()

    def scores(self) -> Float[Tensor, "rows width"]:
        """Score of every column, 0 where none was given."""
        return self._table.scores()

    def kept_lengths(self) -> Int[Tensor, " rows"]:
        """Real tokens stored per row, counted from the bookkeeping on the device."""
        return self._table.counts()

    def token_bytes(self) -> int:
        """Bytes of one token's key and value."""
        return 0 if self._slabs is None else self._slabs.token_bytes

    def allocated_bytes(self) -> int:
        """Bytes of the storage of keys and values, spare columns included."""
        return 0 if self._slabs is None else self._slabs.allocated_bytes

    def bookkeeping_bytes(self) -> int:
        """Bytes of the position and score tables, which `allocated_bytes` leaves out."""
        return self._table.nbytes()

    def visible(self) -> Tensor:
        """Bool[B, 1, 1, width + 1]: the columns a next token sees where it sees all, and itself."""
        table = self._table
        made, mask = self._visible if self._visible is not None else (None, None)
        fits = mask is not None and mask.shape[0] == self.rows and mask.shape[3] > self.width
        if mask is None or not fits or made is not table.pos:
            columns = self.width + 1 + _MASK_ROOM
            mask = torch.ones(self.rows, 1, 1, columns, dtype=torch.bool, device=table.device)
            if table.pos is not None:
                mask[:, 0, 0, : table.head] = table.pos >= 0
            self._visible = (table.pos, mask)
        return mask[:, :, :, : self.width + 1]
