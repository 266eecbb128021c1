"""Which budgets are tried on the share that is fitted to, and which one is chosen on the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dare_hf.errors import DareInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from dare_hf.config import DareConfig
    from dare_hf.tuning.bench import Bench, Measured
    from dare_hf.tuning.candidates import Family

# Mean rates that are tried, falling.
VISION_RATES = (0.85, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.12)
TEXT_RATES = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
TEXT_BESIDE_VISION = (1.0, 0.85, 0.7, 0.5)
_PROBES_VISION, _PROBES_TEXT = ((0.4, 1.0), (0.4, 0.7)), ((1.0, 0.7),)
_KEPT_FAMILIES = 2
_STEPS = 3  # of a bisection over eight rates
SAVES = 0.98  # a cost above it is no saving


@dataclass(frozen=True)
class Target:
    """A share of FLOPs or KV bytes that may not be exceeded."""

    what: Literal["flops", "kv"]
    share: float

    def met(self, one: Measured) -> bool:
        """Whether a configuration stays within it."""
        return (one.kv_ratio if self.what == "kv" else one.flops_ratio) <= self.share


def read_target(text: str | None) -> Target | None:
    """A target as the command line writes it: kv=0.5, flops=0.6.

    Raises:
        DareInputError: It says neither, or no share in (0, 1].
    """
    if text is None:
        return None
    what, _, number = text.partition("=")
    try:
        share = float(number)
    except ValueError:
        share = 0.0
    if what == "kv" and 0 < share <= 1:
        return Target("kv", share)
    if what == "flops" and 0 < share <= 1:
        return Target("flops", share)
    raise DareInputError(f"target: expected kv=SHARE or flops=SHARE in (0, 1]; got {text!r}")


class Search:
    """Finds the cheapest configuration that loses no more than it may.

    Families first, at a middle budget; the nearest to the unpruned model are kept. Then for each of
    them and each text rate the lowest vision rate whose drop on the fit share is within the bound
    (text alone: the lowest text rate), by bisection.

    Args:
        bench: The fit share.
        images: Whether rows have images.
        router: Folder of the fitted router adapter.
        max_drop: Points that may be lost.
        target: What may not be exceeded.
        tell: Called after each measurement.
        takes: Whether the model can run a configuration; None: all of them.
    """

    def __init__(
        self,
        bench: Bench,
        images: bool,
        router: Path | None,
        max_drop: float,
        target: Target | None,
        tell: Callable[[Measured], None],
        takes: Callable[[DareConfig], bool] | None = None,
    ) -> None:
        self.bench, self.images, self.router = bench, images, router
        self.max_drop, self.target, self.tell = max_drop, target, tell
        self.takes = takes or (lambda config: True)
        self.found: dict[str, Measured] = {}
        self._paths: list[tuple[Family, float | None, int]] = []

    def run(self, families: Sequence[Family]) -> list[Measured]:
        """All that was measured."""
        for family in self._nearest(families):
            before: set[tuple[float, ...]] = set()
            for text in TEXT_BESIDE_VISION if self.images else (None,):
                known = set(self.found)
                best = self._lowest(family, text, lambda one: one.drop > self.max_drop)
                self._paths.append((family, text, best))
                if self.target is not None:
                    self._lowest(family, text, self.target.met)
                new = {_alike(self.found[key]) for key in set(self.found) - known}
                if best < 0 or (new and new <= before):
                    break  # still less text loses more, or is no less: all of it is protected
                before |= new
        return list(self.found.values())

    def milder(self) -> list[list[tuple[str, DareConfig]]]:
        """For each path of `run`, budgets above the lowest that passed, the smallest first."""
        paths = []
        for family, text, best in self._paths:
            configs = [self._config(family, text, index) for index in range(best - 1, -1, -1)]
            paths.append([(family.name, config) for config in configs if config is not None])
        return paths

    def expected(self, families: int) -> int:
        """About how many configurations `run` measures."""
        tried = families + _KEPT_FAMILIES  # frozen ones
        probes = tried * len(_PROBES_VISION if self.images else _PROBES_TEXT)
        paths = _KEPT_FAMILIES * (len(TEXT_BESIDE_VISION) if self.images else 1)
        return probes + paths * _STEPS * (1 if self.target is None else 2)

    def measure(self, family: str, config: DareConfig) -> Measured:
        """A configuration on the fit share."""
        one = self.bench.measure(family, config, self.router)
        self.found[f"{family} {config.to_dict()}"] = one
        self.tell(one)
        return one

    def _nearest(self, families: Sequence[Family]) -> list[Family]:
        """The nearest to the unpruned model for what they save; then their frozen forms as well."""
        probes = _PROBES_VISION if self.images else _PROBES_TEXT

        def distance(family: Family) -> float:
            configs = [family.config(*probe) for probe in probes]
            measured = [self.measure(family.name, c) for c in configs if c is not None]
            saved = sum(1 - one.cost for one in measured)
            return sum(one.kl for one in measured) / saved if saved > 0 else float("inf")

        def nearest(pairs: list[tuple[float, Family]]) -> list[tuple[float, Family]]:
            # two families of one distance are the same under different names
            one_each = dict(sorted(pairs, key=lambda pair: pair[0], reverse=True))
            return [(far, one_each[far]) for far in sorted(one_each)[:_KEPT_FAMILIES]]

        if len(families) <= _KEPT_FAMILIES and not any(family.frozen() for family in families):
            return list(families)
        near = nearest([(distance(family), family) for family in families])
        for _, family in list(near):
            frozen = family.frozen()
            config = None if frozen is None else frozen.config(*probes[0])
            if frozen is not None and config is not None and self.takes(config):
                near.append((distance(frozen), frozen))
        return [family for _, family in nearest(near)]

    def _lowest(
        self, family: Family, text: float | None, beyond: Callable[[Measured], bool]
    ) -> int:
        """Index of the last rate that is not beyond something that lower rates are; -1: none."""
        low, high = -1, len(TEXT_RATES if text is None else VISION_RATES)
        while high - low > 1:
            middle = (low + high) // 2
            config = self._config(family, text, middle)
            if config is None or beyond(self.measure(family.name, config)):
                high = middle
            else:
                low = middle
        return low

    def _config(self, family: Family, text: float | None, index: int) -> DareConfig | None:
        """A budget of a path: text alone where `text` is None."""
        if text is None:
            return family.config(1.0, TEXT_RATES[index])
        return family.config(VISION_RATES[index], text)


def choose(
    search: Search, held_out: Callable[[str, DareConfig], Measured]
) -> tuple[Measured | None, list[Measured]]:
    """The cheapest configuration whose held-out drop is within the bound.

    Those within it on the fit share are looked at from the cheapest on, until one is within it on
    the held-out share too. Where none is, milder budgets of the same kinds are.

    Args:
        search: What was measured on the fit share.
        held_out: Measures one on the held-out share.

    Returns:
        It as measured on the held-out share, None where there is none; and all looked at.
    """
    target = search.target

    def good(one: Measured) -> bool:
        within = one.drop <= search.max_drop and one.cost < SAVES
        return within and (target is None or target.met(one))

    seen: list[Measured] = []
    known: set[tuple[float, ...]] = set()
    for one in sorted(filter(good, search.found.values()), key=lambda one: one.cost):
        if _alike(one) in known:
            continue
        known.add(_alike(one))
        seen.append(held_out(one.family, one.config))
        if good(seen[-1]):
            return seen[-1], seen
    passed = []
    for path in search.milder():
        for family, config in path:
            seen.append(held_out(family, config))
            if good(seen[-1]):
                passed.append(seen[-1])
                break
    return min(passed, key=lambda one: one.cost, default=None), seen


def _alike(one: Measured) -> tuple[float, ...]:
    """What two configurations that do the same have in common."""
    return (one.agreement, one.kl, one.kv_ratio)
