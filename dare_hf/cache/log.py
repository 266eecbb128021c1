"""Modality and hop of every logical token of the sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dare_hf.errors import DareStateError

if TYPE_CHECKING:
    from jaxtyping import Int, Int8
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
        self._length = 0
        # Bool[rows, tokens] tokens that are kept whatever their score; None when there are none.
        self.always: Tensor | None = None

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
        self._hop = self._joined(self._hop, torch.int16)
        return self._hop[0]

    def append(self, modality: Int[Tensor, "rows new"], hop: Int[Tensor, "rows new"]) -> None:
        """Add the tokens of a forward.

        Raises:
            DareStateError: The rows are not those of the tokens logged before.
        """
        if self._modality and modality.shape[0] != self._modality[0].shape[0]:
            raise DareStateError(
                f"DareCache holds {self._modality[0].shape[0]} rows; got tokens of "
                f"{modality.shape[0]} rows. Use a new DareCache or batch_select_indices"
            )
        self._modality.append(modality.to(torch.int8))
        self._hop.append(hop.to(torch.int16))
        self._length += modality.shape[1]
        if len(self._modality) >= _MERGE_AT:
            self._modality, self._hop = [self.modality], [self.hop]

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
        self._modality = [self.modality[:, :length]]
        self._hop = [self.hop[:, :length]]
        self._length = length

    def reorder(self, index: Int[Tensor, " chosen"]) -> None:
        """Take the rows `index`."""
        if not self._modality:
            return
        modality, hop = self.modality, self.hop
        index = index.to(modality.device)
        self._modality, self._hop = [modality.index_select(0, index)], [hop.index_select(0, index)]

    select = reorder

    def repeat(self, repeats: int) -> None:
        """Repeat every row `repeats` times in place, as HF expands a batch."""
        if not self._modality:
            return
        self._modality = [self.modality.repeat_interleave(repeats, dim=0)]
        self._hop = [self.hop.repeat_interleave(repeats, dim=0)]

    def reset(self) -> None:
        """Back to an empty sequence."""
        self._modality, self._hop, self._length = [], [], 0

    def snapshot(self) -> TokenLog:
        """A copy that later changes of this log do not reach; the tensors are shared."""
        saved = TokenLog()
        saved._modality, saved._hop = list(self._modality), list(self._hop)
        saved._length = self._length
        return saved

    def _joined(self, chunks: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        if not chunks:
            return [torch.zeros(0, 0, dtype=dtype)]
        return chunks if len(chunks) == 1 else [torch.cat(chunks, dim=1)]
