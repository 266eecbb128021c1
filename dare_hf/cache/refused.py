"""Caches that cannot hold other tokens in each layer: refused, wherever they come from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.generation.continuous_batching.cache import PagedAttentionCache

from dare_hf.cache import DareCache
from dare_hf.compat import CACHE, NEWEST, OLDEST, stray_cache, untested
from dare_hf.errors import DareInputError, DareStateError

if TYPE_CHECKING:
    from collections.abc import Mapping

PAGED = "paged"

_WHY_NOT_PAGED = (
    "continuous batching packs the tokens of all requests into one row, and pages of its cache "
    "hold the same tokens in every layer, so that no layer can leave out tokens of its own"
)
_INSTEAD_OF_PAGED = (
    "Call model.generate with a left-padded batch; or remove_dare(model) first, then put DARE on "
    "again (dare_disabled does not reach the thread continuous batching runs in)"
)


def check_cache(cache: Any) -> None:
    """Refuse a cache that is no DareCache.

    Raises:
        DareInputError: It is another cache; lengths and masks would be wrong.
    """
    if cache is None or isinstance(cache, DareCache):
        return
    if isinstance(cache, PagedAttentionCache):
        raise DareInputError(
            f"{CACHE}: expected a DareCache or nothing; got {type(cache).__name__}: "
            f"{_WHY_NOT_PAGED}. {_INSTEAD_OF_PAGED}"
        )
    raise DareInputError(
        f"{CACHE}: expected a DareCache or nothing; got {type(cache).__name__}, whose layers "
        "cannot hold different tokens. Pass DareCache(), or leave it out"
    )


def check_caches(kwargs: Mapping[str, Any]) -> None:
    """Refuse the caches among a forward's keyword arguments that are no DareCache.

    Raises:
        DareInputError: There is one.
    """
    check_cache(kwargs.get(CACHE))
    if (name := stray_cache(kwargs)) is not None:
        raise DareInputError(
            f"{name}: expected the cache in {CACHE!r}, as transformers {OLDEST} to {NEWEST} pass "
            f"it; got {type(kwargs[name]).__name__} there. {untested() or 'Pass it by that name'}"
        )


def check_implementation(asked: Any) -> None:
    """Refuse a cache_implementation of the caller's.

    Raises:
        DareInputError: There is one.
    """
    if asked is None:
        return
    why, way = "DARE brings its own cache", "run inside `with dare_disabled(model)`"
    if asked == PAGED:
        why, way = _WHY_NOT_PAGED, "call remove_dare(model) first"
    raise DareInputError(
        f"cache_implementation: expected none; got {asked!r}: {why}. Leave it out, or {way}"
    )


def check_attention_cache(implementation: str) -> None:
    """Refuse an attention implementation that reads a paged cache.

    Raises:
        DareStateError: The model has one.
    """
    if implementation.startswith(f"{PAGED}|"):
        raise DareStateError(
            f"expected a model with eager, sdpa, flash or flex attention; this one has "
            f"{implementation!r}, which reads the paged cache of continuous batching: "
            f"{_WHY_NOT_PAGED}. Call model.set_attn_implementation('sdpa') or 'eager' first"
        )


def refuse_continuous_batching(model: Any, *args: Any, **kwargs: Any) -> Any:
    """What `init_continuous_batching` of a model with DARE does; generate_batch calls it.

    Raises:
        DareStateError: Always.
    """
    raise DareStateError(
        f"continuous batching (generate_batch, init_continuous_batching): expected a model without "
        f"DARE; this one has it, and {_WHY_NOT_PAGED}. {_INSTEAD_OF_PAGED}"
    )
