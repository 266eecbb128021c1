"""One layer of the cache: keys and values of the tokens kept, and which tokens those are."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers.cache_utils import CacheLayerMixin

from dare_hf.cache.columns import ColumnTable
from dare_hf.cache.slab import Slabs, limit, right_packed, roomy
from dare_hf.cache.staging import NEXT, Staged
from dare_hf.cache.stored import StoredColumns
from dare_hf.cache.unscored import Unscored
from dare_hf.errors import DareStateError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from dare_hf.cache.ring import QueryRing


class _Saved(NamedTuple):
    """A layer as it was when a forward began."""

    table: ColumnTable
    slabs: Slabs | None
    plain: bool
    ring: QueryRing | None
    unscored: Unscored


class BeforeStep(NamedTuple):
    """A layer as it was when a step began that only adds one token to every row."""

    layer: DareLayer
    seen: int
    tail: int
    ring: QueryRing | None


class DareLayer(StoredColumns, CacheLayerMixin):
    """Keys and values of one layer, for the tokens this layer executed.

    `keys` and `values` [B, H, width, d] are views of slabs with some columns to spare. Lengths
    that HF asks for are logical (`seen`); `width` is physical. A routed layer announces with
    `stage` what the attention's next `update` will bring. The columns `update` returns are
    `positions()` as it was before it, then the staged ones: storing may repack what is kept.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(self) -> None:
        super().__init__()
        self._saved: _Saved | None = None
        self._drop()

    def _drop(self) -> None:
        self._table = ColumnTable()
        self._slabs: Slabs | None = None
        self._staged: Staged | None = None
        # Whether columns are the logical ones, pads included, so that HF's own masks fit. Who
        # stages other columns sets it to False.
        self.plain = True
        # The last queries, for scoring closed hops; None while nobody needs them.
        self.ring: QueryRing | None = None
        self.unscored = Unscored()
        self._visible: tuple[Tensor | None, Tensor] | None = None
        self.keys = self.values = None
        self.is_initialized = False

    # Storing

    def stage(
        self,
        columns: Int[Tensor, "rows new"] | None,
        new_seen: int,
        kept: list[int],
        scores: Float[Tensor, "rows new"] | None = None,
    ) -> None:
        """Announce what the next `update` brings.

        Args:
            columns: Logical position of each new column, ascending in a row, -1 for fills and
                pads. None: the next `new_seen - seen` tokens of every row, all real.
            new_seen: Logical tokens seen by this layer after the update.
            kept: Real tokens among the columns, per row.
            scores: Score of each column.
        """
        self._staged = Staged(columns, new_seen, kept, scores)

    def stage_next(self) -> None:
        """Announce the next token of every row, real and without a score."""
        self._staged = NEXT

    def advance(self, new_seen: int) -> None:
        """Logical tokens up to `new_seen` pass with nothing stored here."""
        self._table.advance(new_seen)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype, device, heads and rows from the first tensors; stores nothing."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._table.open(key_states.shape[0], key_states.device)
        self._slabs = Slabs.adopt(key_states[:, :, :0], value_states[:, :, :0])
        self._show(0)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, H, q, d] as staged; unstaged ones as the next q tokens.

        Returns:
            Keys and values of all physical columns, the new ones last.

        Raises:
            DareStateError: Nothing is staged and the layer is pruned, or rows or columns are not
                those announced.
        """
        staged, self._staged = self._staged, None
        if staged is NEXT and (shown := self._append(key_states, value_states)) is not None:
            return shown
        if staged is None or staged is NEXT:
            if staged is None:
                self._refuse_when_pruned()
            staged = Staged(None, self.seen + key_states.shape[2], [], None)
        staged.check(key_states, self.rows, self.seen)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self._write(key_states, value_states, staged)
        if staged.columns is None:
            self._table.append_dense(key_states.shape[2], staged.scores)
        else:
            self._table.append_ragged(staged.columns, staged.kept, staged.scores, staged.seen)
        self._fit()
        return keys, values

    def _append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor] | None:
        """The next token of every row, where there is room for it; None where there is not."""
        slabs, table = self._slabs, self._table
        end = table.head + table.tail + 1
        if keys.shape[2] != 1 or keys.shape[0] != table.rows or slabs is None:
            return None
        if torch.is_grad_enabled() or self._saved is not None or not slabs.writable(end):
            return None
        slabs.write(end - 1, keys, values)
        table.append_dense(1, None)
        return self._show(end)

    def note_scores(self, start: int, scores: Float[Tensor, "rows tokens"]) -> None:
        """Scores of the tokens from logical position `start` on, where they are stored."""
        where, count = self.positions(), scores.shape[1]
        index = where - start
        new = scores.to(where.device).float().gather(1, index.clamp(0, count - 1))
        self._table.set_scores(torch.where((index >= 0) & (index < count), new, self.scores()))

    def _refuse_when_pruned(self) -> None:
        if self.pruned:
            raise DareStateError(
                f"This DareCache is pruned ({max(self.kept_host, default=0)} of {self.seen} tokens "
                "stored in a layer); only a model with DARE enabled can go on with it, got an "
                "update with DARE disabled or removed. Start with a new cache, or leave "
                "dare_disabled"
            )

    def _write(self, keys: Tensor, values: Tensor, staged: Staged) -> tuple[Tensor, Tensor]:
        """Put new columns behind those in use; returns all of them, also in `keys`, `values`."""
        assert self._slabs is not None
        start, count = self.width, keys.shape[2]
        end = start + count
        if start == 0:
            self._slabs = Slabs.adopt(keys, values)
        elif torch.is_grad_enabled() or self._slabs.graph:
            self._slabs = self._slabs.joined(start, keys, values)
        else:
            if not self._slabs.writable(end) or self._snapshot_needs_tail():
                added = [count] * self.rows if staged.columns is None else staged.kept
                peak = max(a + b for a, b in zip(self.kept_host, added, strict=True))
                room = min(roomy(end, self.rows), limit(peak, self.rows))
                self._resize(max(room, end))
            self._slabs.write(start, keys, values)
        return self._show(end)

    def _snapshot_needs_tail(self) -> bool:
        """Whether a rollback would read columns beyond those in use: a crop came after `begin`."""
        saved = self._saved
        return saved is not None and saved.slabs is self._slabs and saved.table.width > self.width

    # Storage

    def _show(self, width: int) -> tuple[Tensor, Tensor]:
        assert self._slabs is not None
        self.keys, self.values = shown = self._slabs.used(width)
        return shown

    def _resize(self, capacity: int) -> None:
        """Move to slabs of another capacity; the columns in use stay as they are."""
        assert self._slabs is not None
        old, saved = self._slabs, self._saved
        self._slabs = old.resized(self.width, capacity)
        if saved is not None and saved.slabs is old and saved.table.width <= self.width:
            # The snapshot's columns are in the new slabs too: let the old ones go.
            self._saved = saved._replace(slabs=self._slabs)
        self._show(self.width)

    def _fit(self) -> None:
        """Keep what is reserved within `limit`, and `keys` and `values` to the columns in use."""
        if self._slabs is None or not self.rows:
            return
        allowed = limit(self._table.max_kept, self.rows)
        if self.width > allowed:
            self._pack(self.positions() >= 0, self.kept_host)
        elif self._slabs.capacity > allowed:
            self._resize(min(roomy(self.width, self.rows), allowed))
        elif self.keys is None or self.keys.shape[2] != self.width:
            self._show(self.width)

    def _pack(self, keep: Tensor, kept: list[int], table: ColumnTable | None = None) -> None:
        """New slabs of exactly the longest row, with the columns `keep` at their right end."""
        assert self._slabs is not None
        table = table or self._table.snapshot()
        index, live = right_packed(keep, max(kept))
        table.take(index, live, kept)
        slabs = self._slabs.packed(self.width, index)
        shown = slabs.used(table.width)
        # Nothing fails from here on.
        self._table, self._slabs, self.plain = table, slabs, False
        self.keys, self.values = shown

    def keep_columns(
        self,
        keep: Bool[Tensor, "rows width"],
        kept: list[int],
        scores: Float[Tensor, "rows width"] | None = None,
    ) -> None:
        """Compaction: hold only the real tokens of `keep`, and free the memory of the others.

        All or nothing.

        Args:
            keep: Columns to hold.
            kept: Real tokens among them per row.
            scores: New scores of all columns; None leaves them.
        """
        if self._slabs is None or (kept == self.kept_host and scores is None):
            return
        table = self._table.snapshot()
        if scores is not None:
            table.set_scores(scores)
        if kept == self.kept_host:
            self._table = table
        else:
            keep, real = keep.to(self.device), table.valid()
            self._pack(keep if real is None else keep & real, kept, table)

    # What HF calls

    def get_seq_length(self) -> int:
        """Logical tokens that have passed this layer."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Logical length of the keys and their offset: HF's mask is logical."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """-1: a layer grows without limit."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self._drop()

    def crop_counts(self, tokens_to_remove: int) -> Tensor | None:
        """Real tokens per row that `crop` would leave, on the device; None when the host knows."""
        if self._slabs is None or -tokens_to_remove <= self._table.tail:
            return None
        return self._table.counts(before=max(self.seen + tokens_to_remove, 0))

    def crop(self, tokens_to_remove: int, kept: list[int] | None = None) -> None:
        """Remove the last `-tokens_to_remove` logical tokens.

        Args:
            tokens_to_remove: Zero or negative, as HF has it.
            kept: `crop_counts` on the host, when the caller has fetched it.

        Raises:
            ValueError: `tokens_to_remove` is positive.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"Calling `crop` with a positive value (`{tokens_to_remove}`) is not supported: "
                "give minus the number of tokens to remove"
            )
        removed = min(-tokens_to_remove, self.seen)
        table, seen = self._table, self.seen - removed
        if removed == 0:
            return
        if self.ring is not None:
            self.ring = self.ring.cropped(seen, removed, dense=removed <= table.tail)
        if self.unscored:
            self.unscored = self.unscored.cropped(seen)
        if self._slabs is None:
            table.advance(seen)
        elif removed <= table.tail:
            table.drop_last(removed, seen)
        else:
            self._crop_head(seen, table.counts(before=seen).tolist() if kept is None else kept)
        self.plain = self.plain or seen == 0
        self._fit()

    def _crop_head(self, seen: int, kept: list[int]) -> None:
        table = self._table
        gone = [old - new for old, new in zip(table.kept, kept, strict=True)]
        if not any(gone):
            table.advance(seen)
        elif not table.holes and len(set(gone)) == 1:
            table.drop_last(gone[0], seen)
        else:
            positions = table.positions()
            self._pack((positions >= 0) & (positions < seen), kept)
            self._table.seen = seen

    def reorder_cache(self, beam_idx: Tensor, order: list[int] | None = None) -> None:
        """Take the rows `beam_idx`; `order` is the same on the host, when the caller knows."""
        if self._slabs is None:
            return
        index = beam_idx.to(self.device)
        self._table.select_rows(index, order)
        self._slabs = self._slabs.selected(index)
        if self.ring is not None:
            self.ring = self.ring.rows(index)
        if self.unscored:
            self.unscored = self.unscored.rows(index)
        self.keys = self.values = None
        self._fit()

    def batch_select_indices(self, indices: Tensor, order: list[int] | None = None) -> None:
        """Keep the rows `indices` (numbers or a mask)."""
        self.reorder_cache(
            indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices, order
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times in place."""
        if self._slabs is not None:
            order = [row for row in range(self.rows) for _ in range(repeats)]
            self.reorder_cache(torch.tensor(order, device=self.device), order)

    # A forward that fails leaves no trace

    def begin(self) -> None:
        """Remember the layer as it is, until `commit` or `rollback`."""
        self._staged = None
        kept = self._slabs, self.plain, self.ring, self.unscored
        self._saved = _Saved(self._table.snapshot(), *kept)

    def commit(self) -> None:
        """Keep what has happened since `begin`."""
        self._saved = None

    def rollback(self) -> None:
        """Undo everything since `begin`."""
        saved, self._saved = self._saved, None
        if saved is None:
            return
        self._staged = None
        self._table, self._slabs, self.plain, self.ring, self.unscored = saved
        self.is_initialized = self._slabs is not None
        self.keys = self.values = None
        if self._slabs is not None:
            self._show(self.width)

    def before_step(self) -> BeforeStep:
        """What `undo_step` needs."""
        self._staged = None
        return BeforeStep(self, self._table.seen, self._table.tail, self.ring)

    def undo_step(self, before: BeforeStep) -> None:
        """Forget the token of a step, however far it came."""
        self._staged = None
        self.ring = None if before.ring is None else before.ring.before(before.seen)
        self.unscored = self.unscored.cropped(before.seen)
        self._table.back_to(before.tail, before.seen)
        self._show(self.width)

    def give_back(self) -> None:
        """Free what a rollback left too much of; where memory lacks for that, it is left."""
        with suppress(RuntimeError):
            self._fit()
