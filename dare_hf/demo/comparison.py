"""The same items with and without DARE: accuracy, FLOPs, KV bytes and time of both."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dare_hf.demo.cost import ReportedCost
from dare_hf.evaluation.costs import PHASES
from dare_hf.evaluation.measurement import default_batch_size, kinds_of
from dare_hf.evaluation.phases import watched
from dare_hf.report.report import amount, ratio

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.table import Table

    from dare_hf.demo.cost import Cost
    from dare_hf.demo.runner import Runner
    from dare_hf.evaluation.arm import Arm
    from dare_hf.evaluation.costs import Retention
    from dare_hf.evaluation.phases import Watch

_WARM_UP_ITEMS = 2


@dataclass(frozen=True)
class Side:
    """One of the two runs over all items.

    Attributes:
        score: Accuracy and what else the task scores.
        flops: FLOPs of all generate calls: decoder layers, scorers and lm_head.
        kv_bytes: Bytes of the caches at the end of each generate call, summed.
        sampled: Tokens sampled, pads fed to rows that had ended among them.
        seconds: Wall-clock time, from building the inputs to reading the answers.
        detail: What the runner scores beside answers, in [0, 1].
        watch: Seconds by phase and the most memory held.
    """

    score: Any
    flops: int
    kv_bytes: int
    sampled: int
    seconds: float
    detail: float
    watch: Watch


@dataclass(frozen=True)
class Comparison:
    """Both runs over the same items.

    Attributes:
        full: The plain model, without DARE and without a LoRA.
        dare: The model with the arm on it.
        retention: `[hop][layer][modality]` share held when a hop began, of the DARE side.
    """

    full: Side
    dare: Side
    retention: Retention

    def to_dict(self) -> dict[str, float]:
        """What `dare-hf demo --json` prints."""
        return {
            "n": self.full.score.n,
            "accuracy_full": self.full.score.accuracy,
            "accuracy_dare": self.dare.score.accuracy,
            "flops_ratio": self.dare.flops / self.full.flops,
            "kv_ratio": self.dare.kv_bytes / self.full.kv_bytes,
            "seconds_full": self.full.seconds,
            "seconds_dare": self.dare.seconds,
        }


def compare(
    runner: Runner,
    items: Sequence[Any],
    arm: Arm,
    *,
    batch_size: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Comparison:
    """Solves the items with the plain model, then with an arm on a copy of it.

    FLOPs and KV bytes of the DARE side are its reports'; those of the side without are counted from
    the tokens it processed (`Runner.plain_cost`). On both sides a row that ended before its batch
    did is fed pad ids as transformers does it, and they count.

    Args:
        runner: An embedded model without DARE; it stays as it is.
        items: At least one.
        arm: Of the DARE side; it prunes.
        batch_size: Rows of a generate call; None: the runner's, or `default_batch_size`.
        progress: Called with ("full" or "DARE", items done, items in all).
    """
    size = batch_size or runner.batch_size or default_batch_size(len(items))
    full = _Run(runner, items, size, progress).side(
        "full", runner.plain_cost(runner.sampled_columns)
    )
    armed = runner.with_arm(arm)
    cost = ReportedCost(armed.model, armed.sampled_columns)
    dare = _Run(armed, items, size, progress).side("DARE", cost)
    return Comparison(full, dare, cost.totals.retention)


@dataclass(frozen=True)
class _Run:
    runner: Runner
    items: Sequence[Any]
    batch_size: int
    progress: Callable[[str, int, int], None] | None

    def side(self, name: str, cost: Cost) -> Side:
        """Solves all items, after a few that warm up and do not count."""
        self.runner.solve(self.items[:_WARM_UP_ITEMS])
        progress = self.progress
        tell = None if progress is None else lambda done, total: progress(name, done, total)
        if tell is not None:
            tell(0, len(self.items))
        with watched(self.runner.model) as watch:
            start = time.perf_counter()
            solutions = self.runner.solve(
                self.items, batch_size=self.batch_size, on_batch=cost, progress=tell
            )
            seconds = time.perf_counter() - start
        score = self.runner.score(solutions)
        detail = self.runner.detail_share(score)
        return Side(score, cost.flops, cost.kv_bytes, cost.sampled, seconds, detail, watch)


def table(result: Comparison, title: str, detail: str) -> Table:
    """The comparison for a terminal, each line with its ratio; `detail` names `Side.detail`."""
    from rich.table import Table

    full, dare = result.full, result.dare
    lines = Table(title=title, title_justify="left")
    for name, justify in (("", "left"), ("full", "right"), ("DARE", "right"), ("ratio", "right")):
        lines.add_column(name, justify=justify)
    lines.add_row("accuracy", *_percent(full.score.accuracy, dare.score.accuracy))
    spans = (f"{low:.0%} to {high:.0%}" for low, high in _intervals(result))
    lines.add_row("  95 % interval", *spans, "")
    for kind, share in kinds_of(full.score).items():
        lines.add_row(f"  {kind}", *_percent(share, kinds_of(dare.score)[kind]))
    lines.add_row(detail, *_percent(full.detail, dare.detail))
    lengths = (full.sampled, dare.sampled)
    lines.add_row("tokens sampled", *map(str, lengths), ratio(lengths[1], lengths[0]))
    flops = (f"{side.flops / 1e9:.1f}" for side in (full, dare))
    lines.add_row("GFLOPs", *flops, ratio(dare.flops, full.flops))
    stored = (amount(side.kv_bytes, "B") for side in (full, dare))
    lines.add_row("KV cache at the end", *stored, ratio(dare.kv_bytes, full.kv_bytes))
    seconds = (f"{side.seconds:.1f}" for side in (full, dare))
    lines.add_row("seconds", *seconds, ratio(dare.seconds, full.seconds))
    for phase in PHASES:
        spent = [side.watch.seconds[phase] for side in (full, dare)]
        lines.add_row(f"  of {phase}", *(f"{s:.1f}" for s in spent), ratio(spent[1], spent[0]))
    peaks = [side.watch.peak_bytes for side in (full, dare)]
    if peaks[0] is not None and peaks[1] is not None:
        held = (amount(peak, "B") for peak in peaks if peak is not None)
        lines.add_row("peak memory of the run", *held, ratio(peaks[1], peaks[0]))
    return lines


def _percent(full: float, dare: float) -> tuple[str, str, str]:
    return f"{full:.1%}", f"{dare:.1%}", ratio(dare, full)


def _intervals(result: Comparison) -> list[tuple[float, float]]:
    return [side.score.accuracy_interval for side in (result.full, result.dare)]
