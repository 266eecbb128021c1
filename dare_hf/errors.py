"""Errors of the library: each says what was expected, what was given and what to do."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

INSTALL_CLI = "Install it with the command line: pip install 'dare-hf[cli]'"


class DareError(Exception):
    """Base of every error this library raises on purpose."""


class DareConfigError(DareError, ValueError):
    """A configuration value is out of range or does not fit the model."""


class UnsupportedModelError(DareError, TypeError):
    """The model's architecture cannot be routed; the text says why."""


class DareStateError(DareError, RuntimeError):
    """The call does not fit the model's present state (applied twice, not applied, no run yet)."""


class DareInputError(DareError, ValueError):
    """An input of a forward or of generate cannot be routed correctly."""


class AdapterMismatchError(DareError, ValueError):
    """A router adapter was made for another depth, width or architecture."""


def alike(name: str | None, names: Iterable[str]) -> str:
    """What a message adds about a name that is not known: those nearest to it, if any."""
    found = get_close_matches(name or "", list(names), n=3)
    return f" (near to it: {', '.join(found)})" if found else ""
