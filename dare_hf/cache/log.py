"""Modality and hop of every logical token of the sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dare_hf.errors import DareStateError

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Bool, Int, Int8
    from torch import Tensor

PAD = -1
# Where the id of a sampled token would stand: a prompt's or an injected one.
UNWRITTEN = -2
_MERGE_AT = 64


class TokenLog:
    """What each logical token is, whether a layer stored it or not.

    Layers store positions only and look modality and hop up here. A step appends its tensors to a
    list; they are joined when somebody reads.
    """

    def __init__(self) -> None:
        self._modality: list[Tensor] = []
        self._hop: list[Tensor] = []
        self._always: list[Tensor] = []
        self._written: list[Tensor] = []
        self._padded = 0  # columns up to the last one that may be a pad in some row
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def modality(self) -> Int8[Tensor, "rows tokens"]:
        """0 text, 1 vision, -1 pad."""
        self._modality = self._joined(self._modality, torch.int8)
        return self._modality[0]

    @property
    def hop(self) -> Int[Tensor, "rows tokens"]:
        """Hop of each token; means nothing where the modality is pad."""
        self._hop = self._joined(self._hop, torch.int32)
        return self._hop[0]

    @property
    def always(self) -> Bool[Tensor, "rows tokens"] | None:
        """Tokens that are kept whatever their score; None when no forward named any."""
        if not self._always:
            return None
        self._always = self._joined(self._always, torch.bool)
        return self._always[0]

    def append(
        self,
        modality: Int[Tensor, "rows new"],
        hop: Int[Tensor, "rows new"],
        always: Bool[Tensor, "rows new"] | None = None,
        written: Int[Tensor, "rows new"] | None = None,
        *,
        padded: bool = True,
    ) -> None:
        """Add the tokens of a forward.

        Args:
            modality: 0 text, 1 vision, -1 pad.
            hop: The hop each token belongs to.
            always: Tokens that no compaction may drop.
            written: Ids of sampled tokens, PAD and UNWRITTEN where none is; None where no hop
                delimiter has several ids.
            padded: Whether there may be pads among them.

        Raises:
            DareStateError: The rows are not those of the tokens logged before.
        """
        if self._modality and modality.shape[0] != self._modality[0].shape[0]:
            raise DareStateError(
                f"DareCache holds {self._modality[0].shape[0]} rows; got tokens of "
                f"{modality.shape[0]} rows. Use a new DareCache or batch_select_indices"
            )
        if always is not None and not self._always:
            self._always = [always.new_zeros(always.shape[0], self._length, dtype=torch.bool)]
        if always is not None or self._always:
            absent = torch.zeros_like(modality, dtype=torch.bool)
            self._always.append(absent if always is None else always)
        if written is not None and not self._written:
            self._written = [written.new_full((written.shape[0], self._length), UNWRITTEN)]
        if written is not None or self._written:
            unknown = torch.full_like(modality, UNWRITTEN, dtype=torch.long)
            self._written.append(unknown if written is None else written)
        self._modality.append(modality.to(torch.int8))
        self._hop.append(hop.to(torch.int32))
        self._length += modality.shape[1]
        self._padded = self._length if padded else self._padded
        if len(self._modality) >= _MERGE_AT:
            self._each(lambda whole: whole)

    def last_written(self, count: int) -> Int[Tensor, "rows last"] | None:
        """Each row's last ids, at most `count`, pads left out; None when no forward named any.

        UNWRITTEN for the prompt's and injected tokens, PAD where a row has fewer.
        """
        if not self._written:
            return None
        if self._padded > self._length - count:
            self._written = whole = self._joined(self._written, torch.long)
            order = (whole[0] != PAD).byte().argsort(dim=1, stable=True)
            return whole[0].gather(1, order)[:, max(self._length - count, 0) :]
        last: list[Tensor] = []
        while sum(chunk.shape[1] for chunk in last) < count:
            last.insert(0, self._written[-1 - len(last)])
        return torch.cat(last, dim=1)[:, -count:]

    def lookup(
        self, positions: Int[Tensor, "*layers rows columns"]
    ) -> tuple[Int8[Tensor, "*layers rows columns"], Int[Tensor, "*layers rows columns"]]:
        """Modality and hop at logical `positions`; both -1 where a position is -1."""
        device = positions.device
        hole = positions < 0
        index = positions.clamp(min=0)
        modality, hop = (
            track.to(device).expand(*positions.shape[:-1], -1).gather(-1, index)
            for track in (self.modality, self.hop)
        )
        return modality.masked_fill(hole, PAD), hop.masked_fill(hole, -1)

    def counts_by_hop(self) -> list[list[list[int]]]:
        """Real tokens per row, hop and modality: counts[row][hop][0 text | 1 vision].

        One device-to-host copy.
        """
        if not self._length:
            return []
        code = torch.where(self.modality == PAD, -1, self.hop.int() * 2 + self.modality).cpu()
        hops = max(int(code.max()) // 2 + 1, 0)
        rows = [torch.bincount(row[row >= 0], minlength=2 * hops) for row in code]
        return [row.view(hops, 2).tolist() for row in rows]

    def crop(self, length: int) -> None:
        """Forget the tokens at positions >= `length`."""
        if length >= self._length:
            return
        self._each(lambda whole: whole[:, :length])
        self._length, self._padded = length, min(self._padded, length)

    def reorder(self, index: Int[Tensor, " chosen"]) -> None:
        """Take the rows `index`."""
        self._each(lambda whole: whole.index_select(0, index.to(whole.device)))

    def repeat(self, repeats: int) -> None:
        """Repeat every row `repeats` times in place, as HF expands a batch."""
        self._each(lambda whole: whole.repeat_interleave(repeats, dim=0))

    def reset(self) -> None:
        """Back to an empty sequence."""
        self._modality, self._hop, self._always, self._written = [], [], [], []
        self._length = self._padded = 0

    def snapshot(self) -> TokenLog:
        """A copy that later changes of this log do not reach; the tensors are shared."""
        saved = TokenLog()
        saved._modality, saved._hop = list(self._modality), list(self._hop)
        saved._always, saved._written = list(self._always), list(self._written)
        saved._length, saved._padded = self._length, self._padded
        return saved

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Join every track and change it."""
        if self._modality:
            self._modality, self._hop = [change(self.modality)], [change(self.hop)]
        if self.always is not None:
            self._always = [change(self.always)]
        if self._written:
            self._written = [change(self._joined(self._written, torch.long)[0])]

    def _joined(self, chunks: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        if not chunks:
            return [torch.zeros(0, 0, dtype=dtype)]
        return chunks if len(chunks) == 1 else [torch.cat(chunks, dim=1)]
