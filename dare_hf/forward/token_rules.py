"""What a configuration says about single tokens, and which of them no selection may drop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dare_hf.routing.kinds import PAD, TEXT
from dare_hf.routing.selection import forced_tokens, image_borders, isin_ids, newest

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TokenRules:
    """What the configuration says about single tokens; the same for every forward of a model.

    Attributes:
        vision_ids: Sorted ids of vision tokens.
        keep_ids: Ids never pruned (`always_keep_token_ids`), sorted.
        protected_ids: Ids of special text tokens that are kept where text is protected, sorted.
        protect_text: Whether special tokens, image delimiters and recent text are kept.
        prefix: Kappa, the first tokens of each hop that are always kept.
        delimiters: Hop delimiters as id sequences.
        window: Close a hop every this many sampled tokens; None never.
        type_ids: Names of the arguments whose values 1 and 2 mark image and video tokens.
        recent_tokens: The last text tokens of a span that are kept where text is protected.
    """

    vision_ids: tuple[int, ...]
    keep_ids: tuple[int, ...]
    protected_ids: tuple[int, ...]
    protect_text: bool
    prefix: int
    delimiters: tuple[tuple[int, ...], ...]
    window: int | None
    type_ids: tuple[str, ...] = ("mm_token_type_ids", "token_type_ids")
    recent_tokens: int = 0

    @property
    def closes_hops(self) -> bool:
        """Whether sampled tokens can close a hop at all."""
        return bool(self.delimiters) or self.window is not None

    @property
    def looks_back(self) -> int:
        """Sampled ids before a forward that a delimiter may begin with."""
        return max((len(sequence) for sequence in self.delimiters), default=1) - 1


def forced_of(
    modality: Tensor, span: Tensor, ids: Any, rules: TokenRules, before: Tensor | None = None
) -> Tensor:
    """Bool[B, S]: tokens of one span that no selection may drop.

    Args:
        modality: [B, S].
        span: Bool[B, S].
        ids: [B, S] token ids, None where only embeddings are known.
        rules: The token rules of the model.
        before: Long[B] real tokens of the same hop before this forward; None for 0.
    """
    always = None
    if ids is not None and rules.keep_ids:
        always = isin_ids(ids, rules.keep_ids)
    forced = forced_tokens(span, prefix_tokens=rules.prefix, already=before, always=always)
    if rules.protect_text:
        only = torch.where(span, modality, PAD)
        text = newest(only == TEXT, rules.recent_tokens) | image_borders(only)
        if ids is not None and rules.protected_ids:
            text = text | isin_ids(ids, rules.protected_ids)
        forced = forced | (span & (modality == TEXT) & text)
    return forced
