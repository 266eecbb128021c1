"""What travels with a cache: who counts its run, the generate it is used in."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from dare_hf.cache import DareCache
    from dare_hf.report import DareReport


class RunningCall(Protocol):
    """A generate, as the cache of its sequence knows it."""

    running: bool


class Recorder(Protocol):
    """Who counts a run."""

    def report(self, cache: DareCache) -> DareReport:
        """What was counted, with the cache as it is now."""

    def reorder(self, indices: Tensor) -> None:
        """Take the rows `indices`."""

    def repeat(self, repeats: int) -> None:
        """Repeat every row in place."""

    def crop(self, columns: int) -> None:
        """Forget the last `columns` logical tokens."""


class Told(NamedTuple):
    """What was counted by a recorder that a copied cache has left behind."""

    found: DareReport

    def report(self, cache: DareCache) -> DareReport:
        """What was counted then."""
        return copy.deepcopy(self.found)

    def reorder(self, indices: Tensor) -> None:
        """Nothing: who counts the copy asks the cache anew."""

    def repeat(self, repeats: int) -> None:
        """Nothing: who counts the copy asks the cache anew."""

    def crop(self, columns: int) -> None:
        """Nothing: who counts the copy asks the cache anew."""
