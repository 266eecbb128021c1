"""Which crops a cache cannot do: what it let go was chosen with the tokens that would go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dare_hf.errors import DareStateError

if TYPE_CHECKING:
    from dare_hf.cache import DareCache


def check_crop(cache: DareCache, length: int) -> None:
    """Refuse to leave a part of an input that was pruned as a whole, or what a compaction took.

    Args:
        cache: The cache as it is.
        length: Logical tokens that would stay.

    Raises:
        DareStateError: `length` is inside a row's prompt or injected input, which some layer holds
            in part only, or in a hop before one whose begin took tokens away.
    """
    if cache.drafts:  # what is drafted is verified in any case
        return
    state, seen = cache.hop_counters, cache.get_seq_length()
    for row, ends in enumerate(state.ends):
        prompt = (0, ends[0] + 1 if ends else seen)
        for start, end in (prompt, *state.spans[row]):
            if start < length < end and _pruned(cache, row, start, end):
                raise DareStateError(
                    f"DareCache.crop: expected to keep or remove an input as a whole, since what a "
                    f"layer holds of it was chosen among all its tokens; got a crop to {length} "
                    f"tokens, inside the input at positions {start} to {end - 1}. Crop to {start} "
                    f"or {end}, or start with a new DareCache"
                )
        later = [hop for hop in state.thinned[row] if hop > len(state.ends_at(row, length))]
        if length and later:
            raise DareStateError(
                f"DareCache.crop: expected to go back no further than the last compaction; got a "
                f"crop to {length} tokens, and those that were let go when hop {later[0]} began "
                "cannot come back. Crop less, or start with a new DareCache"
            )


def _pruned(cache: DareCache, row: int, start: int, end: int) -> bool:
    """Whether some layer lacks a real token of a row's positions [start, end)."""
    real = int((cache.log.modality[row, start:end] >= 0).sum())
    for layer in cache.stored:
        if layer.rows:
            where = layer.positions()[row]
            if int(((where >= start) & (where < end)).sum()) < real:
                return True
    return False
