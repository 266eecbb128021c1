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
    ) -> None:
        """Add the tokens of a forward.

        Args:
            modality: 0 text, 1 vision, -1 pad.
            hop: The hop each token belongs to.
            always: Tokens that no compaction may drop.

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
        self._modality.append(modality.to(torch.int8))
        self._hop.append(hop.to(torch.int32))
        self._length += modality.shape[1]
        if len(self._modality) >= _MERGE_AT:
            self._each(lambda whole: whole)

    def lookup(
        self, positions: Int[Tensor, "rows columns"]
    ) -> tuple[Int8[Tensor, "rows columns"], Int[Tensor, "rows columns"]]:
        """Modality and hop at logical `positions`; both -1 where a position is -1."""
        device = positions.device
        hole = positions < 0
        index = positions.clamp(min=0)
        modality = self.modality.to(device).gather(1, index).masked_fill(hole, PAD)
        return modality, self.hop.to(device).gather(1, index).masked_fill(hole, -1)

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
        self._length = length

    def reorder(self, index: Int[Tensor, " chosen"]) -> None:
        """Take the rows `index`."""
        self._each(lambda whole: whole.index_select(0, index.to(whole.device)))

    select = reorder

    def repeat(self, repeats: int) -> None:
        """Repeat every row `repeats` times in place, as HF expands a batch."""
        self._each(lambda whole: whole.repeat_interleave(repeats, dim=0))

    def reset(self) -> None:
        """Back to an empty sequence."""
        self._modality, self._hop, self._always, self._length = [], [], [], 0

    def snapshot(self) -> TokenLog:
        """A copy that later changes of this log do not reach; the tensors are shared."""
        saved = TokenLog()
        saved._modality, saved._hop = list(self._modality), list(self._hop)
        saved._always = list(self._always)
        saved._length = self._length
        return saved

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Join every track and change it."""
        if self._modality:
            self._modality, self._hop = [change(self.modality)], [change(self.hop)]
        if self.always is not None:
            self._always = [change(self.always)]

    def _joined(self, chunks: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        if not chunks:
            return [torch.zeros(0, 0, dtype=dtype)]
        return chunks if len(chunks) == 1 else [torch.cat(chunks, dim=1)]
