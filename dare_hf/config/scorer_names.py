"""The names a configuration may give as its scorer."""

from __future__ import annotations

from typing import Any

from dare_hf.config.checks import shown
from dare_hf.errors import DareConfigError, alike

BUILT_IN = (
    "attention",
    "random",
    "key_norm",
    "position",
    "recent",
    "router",
    "last_query",
    "text_raters",
    "own_attention",
    "diverse",
)
REGISTERED: dict[str, Any] = {}
"""The functions given to `register_scorer`, by name."""


class FromFile(str):
    """Mark of a name that a file gave: it may be registered after the file is read.

    It lives in the value itself, since `dataclasses.replace` passes every field on by value.
    """


def scorer_name(name: str, value: Any) -> str:
    """The check of `scorer`: a name that is known, or was read from a file.

    Raises:
        DareConfigError: It is neither.
    """
    if isinstance(value, str) and (isinstance(value, FromFile) or is_known(value)):
        return value
    raise unknown_scorer(name, value)


def unknown_scorer(name: str, value: Any) -> DareConfigError:
    """The error of a scorer that there is not, with those there are."""
    names = ", ".join(map(repr, known()))
    near = alike(value, known()) if isinstance(value, str) else ""
    expected = f"one of {names}, or a name that was given to register_scorer before"
    return DareConfigError(f"{name} must be {expected}, got {shown(value)}{near}.")


def is_known(name: str) -> bool:
    """Whether there is such a scorer now."""
    return name in BUILT_IN or name in REGISTERED


def known() -> tuple[str, ...]:
    """All names there are now."""
    return (*BUILT_IN, *sorted(REGISTERED))
