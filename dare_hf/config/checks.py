"""Checks of single configuration values: each names the field, its range and what was given."""

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, get_args

from dare_hf.errors import DareConfigError


def refuse(name: str, expected: str, value: object) -> DareConfigError:
    """The error to raise for a value that is not as expected."""
    return DareConfigError(f"{name} must be {expected}, got {value!r}.")


def number(
    expected: str, *, above: float | None = None, least: float = -math.inf, most: float = math.inf
) -> Callable[[str, Any], float]:
    """A check for a finite number: in [least, most] and, where given, greater than `above`."""

    def check(name: str, value: Any) -> float:
        is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or not least <= value <= most or (above is not None and value <= above):
            raise refuse(name, expected, value)
        return float(value)

    return check


def integer(expected: str, least: float = -math.inf) -> Callable[[str, Any], int]:
    """A check for an integer >= `least`; True and False are none."""

    def check(name: str, value: Any) -> int:
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise refuse(name, expected, value)
        return int(value)

    return check


def choice(literal: Any) -> Callable[[str, Any], str]:
    """A check for one of the strings of a Literal."""
    choices = get_args(literal)
    expected = "one of " + ", ".join(map(repr, choices))

    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            raise refuse(name, expected, value)
        return value

    return check


def optional(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    """The same check, which also lets None pass."""

    def checked(name: str, value: Any) -> Any:
        if value is None:
            return None
        try:
            return check(name, value)
        except DareConfigError as error:
            raise DareConfigError(str(error).replace(", got ", " or None, got ", 1)) from None

    return checked


def flag(name: str, value: Any) -> bool:
    """The check for True or False."""
    if not isinstance(value, bool):
        raise refuse(name, "True or False", value)
    return value
