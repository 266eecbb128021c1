"""Methods put on instances in the place of their own, and the arguments of a forward by name."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

from dare_hf.errors import DareInputError

if TYPE_CHECKING:
    from collections.abc import Callable

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_BY_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class Bound:
    """A method of one instance: its class's own, or a function in the place of it.

    A pickle holds a bound method as its name on the instance, and would find the one that was put
    there. This holds the instance; callers are shown the signature of the class.

    Args:
        owner: The instance.
        name: The method's name on the instance's class.
        function: What stands in its place, called with the owner first; None for the class's own.
    """

    def __init__(self, owner: Any, name: str, function: Callable[..., Any] | None = None) -> None:
        self.owner, self.name, self.function = owner, name, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        function = self.function or getattr(type(self.owner), self.name)
        return function(self.owner, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(getattr(type(self.owner), self.name).__get__(self.owner))

    @property
    def __self__(self) -> Any:
        return self.owner

    @property
    def __func__(self) -> Callable[..., Any]:  # accelerate (1.14) wraps it for mixed precision
        kind = type(self.owner)
        return _function(kind, self.name, self.function or getattr(kind, self.name))

    @property
    def __code__(self) -> Any:  # torch.export (2.13) says by it where the forward is
        return getattr(type(self.owner), self.name).__code__


@functools.cache
def _function(kind: type, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with the signature of the class's; nothing below it shows as wrapped."""

    def call(owner: Any, *args: Any, **kwargs: Any) -> Any:
        return function(owner, *args, **kwargs)

    shown: Any = call
    shown.__signature__ = inspect.signature(getattr(kind, name))
    return shown


def current(owner: Any, name: str) -> Callable[..., Any]:
    """The method of `owner` by this name, in a form that its copies and pickles keep."""
    return vars(owner)[name] if name in vars(owner) else Bound(owner, name)


@functools.cache
def positional(kind: type) -> dict[str, Any]:
    """Default values of the positional parameters of a class's `forward`, by name and in order.

    ``*args`` stands for what the forward of the next class takes behind the same names.
    """
    found: dict[str, Any] = {}
    for cls in kind.__mro__:
        if "forward" not in vars(cls):
            continue
        parameters = list(inspect.signature(vars(cls)["forward"]).parameters.values())[1:]
        own = {p.name: p.default for p in parameters if p.kind in _POSITIONAL}
        if list(found) != list(own)[: len(found)]:
            break
        found = own
        if all(p.kind is not inspect.Parameter.VAR_POSITIONAL for p in parameters):
            break
    return found


def named(kind: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward by name.

    Raises:
        DareInputError: An argument's name is not known.
    """
    names = positional(kind)
    if len(args) > len(names):
        raise DareInputError(
            f"expected at most {len(names)} arguments by position, which the forward of "
            f"{kind.__name__} names ({', '.join(names)}); got {len(args)}. Pass them by keyword"
        )
    return dict(zip(names, args, strict=False)) | kwargs


@functools.cache
def _keywords(kind: Any) -> frozenset[str] | None:
    """What a class's `forward` takes by keyword; None when it takes any."""
    parameters = inspect.signature(kind.forward).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters if p.kind in _BY_KEYWORD)


def passed(kind: Any, count: int, given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Named arguments as the forward takes them.

    Args:
        kind: The class.
        count: How many came by position, and go so.
        given: The arguments by name.

    Returns:
        Positional and keyword arguments.
    """
    names, given, known = positional(kind), dict(given), _keywords(kind)
    if known is not None:
        places = [i for i, name in enumerate(names, 1) if name in given and name not in known]
        count = max([count, *places])
    pairs = list(names.items())[:count]
    return tuple(given.pop(name, default) for name, default in pairs), given
