"""Checks of single configuration values: each names the field, its range and what was given."""

import difflib
import functools
import math
import reprlib
from collections.abc import Callable, Sized
from numbers import Integral, Real
from typing import Any, TypeVar, get_args

from dare_hf.errors import DareConfigError

LARGEST = 2**31 - 1
"""The largest integer a field takes unless it says otherwise."""


class _Short(reprlib.Repr):
    """A repr of bounded length and depth: a value that is refused may come from anywhere."""

    def repr_int(self, x: int, level: int) -> str:
        """A long integer by its size; Python itself refuses to print one of 4,300 digits."""
        return repr(x) if abs(x) < 10**60 else f"an integer of {x.bit_length()} bits"


_short = _Short()
_short.maxlevel, _short.maxstring, _short.maxother = 4, 200, 200
_short.maxlist = _short.maxtuple = _short.maxdict = _short.maxset = 12


def shown(value: object) -> str:
    """What an error shows of a value: its repr, shortened."""
    return _short.repr(value)


_Class = TypeVar("_Class", bound=type)

# What other libraries name by the share that goes; retention is the share that stays.
_COMPLEMENTS = ("compress", "sparsity", "prun", "reduc", "drop")


class Unnamed:
    """Mark of a value that its caller left at the default, which another choice may change.

    It lives in the value itself, since `dataclasses.replace` passes every field on by value.
    """


class _UnnamedInt(Unnamed, int):
    pass


class _UnnamedFloat(Unnamed, float):
    pass


class _UnnamedStr(Unnamed, str):
    pass


def unnamed(value: Any) -> Any:
    """The same int, float or str, marked as left at the default."""
    kinds = {int: _UnnamedInt, float: _UnnamedFloat, str: _UnnamedStr}
    return kinds[type(value)](value)


def plain(value: Any) -> Any:
    """The value without the mark."""
    if not isinstance(value, Unnamed):
        return value
    return next(kind(value) for kind in (int, float, str) if isinstance(value, kind))


def refuses_unknown(cls: _Class) -> _Class:
    """Let a dataclass say which field is nearest to a keyword that it does not have."""
    kind: Any = cls
    init, known = kind.__init__, kind.__dataclass_fields__

    @functools.wraps(init)
    def checked_init(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in kwargs.keys() - known.keys():
            what = f"{name}: expected a field of {cls.__name__}; there is none of this name. "
            close = difflib.get_close_matches(name, known, 1, 0.75)
            if not close and any(word in name.lower() for word in _COMPLEMENTS):
                raise DareConfigError(
                    f"{what}Rates are the share that is kept: give vision_retention and "
                    f"text_retention, each 1 - {name}"
                )
            close = close or difflib.get_close_matches(name, known, 1, 0.0)
            raise DareConfigError(f"{what}The nearest is {close[0]}")
        init(self, *args, **kwargs)

    kind.__init__ = checked_init
    return cls


def refuse(name: str, expected: str, value: object) -> DareConfigError:
    """The error to raise for a value that is not as expected."""
    return DareConfigError(f"{name} must be {expected}, got {shown(value)}.")


def number(
    expected: str, *, above: float | None = None, least: float = -math.inf, most: float = math.inf
) -> Callable[[str, Any], float]:
    """A check for a finite number: in [least, most] and, where given, greater than `above`."""

    def check(name: str, value: Any) -> float:
        try:
            found = float(value) if isinstance(value, Real) else math.nan
        except OverflowError:  # an integer beyond all floats
            found = math.inf
        known = math.isfinite(found) and not isinstance(value, bool)
        if not known or not least <= found <= most or (above is not None and found <= above):
            raise refuse(name, expected, value)
        return found

    return check


def integer(expected: str, least: int, most: int = LARGEST) -> Callable[[str, Any], int]:
    """A check for an integer in [least, most]; True and False are none."""

    def check(name: str, value: Any) -> int:
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise refuse(name, expected, value)
        if value > most:
            raise refuse(name, f"an integer <= {most}", value)
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


def text(expected: str) -> Callable[[str, Any], str]:
    """A check for a string that is not empty."""

    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or not value:
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


def instance(expected: str, kind: type) -> Callable[[str, Any], Any]:
    """A check for an object of a type."""

    def check(name: str, value: Any) -> Any:
        if not isinstance(value, kind):
            raise refuse(name, expected, value)
        return value

    return check


def at_most(name: str, count: int, what: str, value: Sized) -> None:
    """Refuse a collection of more than `count`; `what` names its members."""
    try:
        size = len(value)
    except OverflowError:  # of a range
        size = count + 1
    if size > count:
        raise refuse(name, f"at most {count} {what}", value)


def flag(name: str, value: Any) -> bool:
    """The check for True or False."""
    if not isinstance(value, bool):
        raise refuse(name, "True or False", value)
    return value
