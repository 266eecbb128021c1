"""The same mazes with and without DARE: accuracy, FLOPs, KV bytes and time of both."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dare_hf import DareConfig, accounting, apply_dare, last_report, remove_dare
from dare_hf.adapters.registry import locate
from dare_hf.demo.embedded import demo_config
from dare_hf.report import amount, ratio
from dare_hf.tasks import maze, mvot

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.table import Table
    from transformers import ChameleonForConditionalGeneration, ChameleonProcessor

_WARM_UP_ITEMS = 2


@dataclass(frozen=True)
class Side:
    """One of the two runs over all items.

    Attributes:
        score: Accuracy and images drawn right.
        flops: FLOPs of all generate calls: decoder layers, scorers and lm_head.
        kv_bytes: Bytes of the caches at the end of each generate call, summed.
        sampled: Tokens sampled, pads fed to rows that had ended among them.
        seconds: Wall-clock time, from building the inputs to reading the answers.
    """

    score: mvot.Score
    flops: int
    kv_bytes: int
    sampled: int
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """Both runs over the same items."""

    full: Side
    dare: Side

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
    model: ChameleonForConditionalGeneration,
    processor: ChameleonProcessor,
    items: Sequence[maze.MazeItem],
    *,
    config: DareConfig | None = None,
    batch_size: int = 25,
    progress: Callable[[str, int, int], None] | None = None,
) -> Comparison:
    """Solves the items with the plain model, then with DARE; the model is left plain.

    FLOPs and KV bytes of the plain side are counted from the tokens it processed, those of the
    DARE side are its reports'. On both sides a row that ended before its batch did is fed pad ids
    as transformers does it, and they count.

    Args:
        model: A model without DARE.
        processor: Its processor.
        items: At least one maze.
        config: Default: `demo_config`.
        batch_size: Rows of a generate call.
        progress: Called with ("full" or "DARE", items done, items in all).
    """
    config = demo_config(processor) if config is None else config
    run = _Run(model, processor, items, batch_size, progress)
    full = run.side("full", _UnprunedCost(model))
    apply_dare(model, config)
    try:
        dare = run.side("DARE", _ReportedCost(model))
    finally:
        remove_dare(model)
    return Comparison(full, dare)


class _UnprunedCost:
    """Adds up what generate calls of a plain model cost."""

    def __init__(self, model: ChameleonForConditionalGeneration) -> None:
        parts = locate(model)
        self.shapes = accounting.shapes_of(parts.layers, parts.text_config)
        self.hidden, self.vocab = parts.text_config.hidden_size, parts.text_config.vocab_size
        self.itemsize = model.dtype.itemsize
        self.flops = self.kv_bytes = self.sampled = 0

    def __call__(self, batch: mvot.BatchOutput) -> None:
        prompts = batch.inputs["attention_mask"].sum(1).tolist()
        sampled = _sampled_columns(batch)
        self.sampled += sampled * len(prompts)
        self.flops += accounting.unpruned_generate_flops(
            self.shapes, prompts, sampled, hidden=self.hidden, vocab=self.vocab
        )
        stored = [prompt + sampled - 1 for prompt in prompts]
        self.kv_bytes += accounting.unpruned_kv_bytes(self.shapes, stored, self.itemsize)


class _ReportedCost:
    """Adds up the reports of generate calls with DARE."""

    def __init__(self, model: ChameleonForConditionalGeneration) -> None:
        self.model = model
        self.flops = self.kv_bytes = self.sampled = 0

    def __call__(self, batch: mvot.BatchOutput) -> None:
        report = last_report(self.model)
        self.flops += sum(report.flops.values())
        self.kv_bytes += report.kv_bytes
        self.sampled += _sampled_columns(batch) * len(batch.indices)


def _sampled_columns(batch: mvot.BatchOutput) -> int:
    ids = getattr(batch.outputs, "sequences", batch.outputs)
    return ids.shape[1] - batch.prompt_length


@dataclass(frozen=True)
class _Run:
    model: ChameleonForConditionalGeneration
    processor: ChameleonProcessor
    items: Sequence[maze.MazeItem]
    batch_size: int
    progress: Callable[[str, int, int], None] | None

    def side(self, name: str, cost: _UnprunedCost | _ReportedCost) -> Side:
        """Solves all items, after a few that warm up and do not count."""
        mvot.solve(self.model, self.processor, self.items[:_WARM_UP_ITEMS])
        progress = self.progress
        tell = None if progress is None else lambda done, total: progress(name, done, total)
        if tell is not None:
            tell(0, len(self.items))
        start = time.perf_counter()
        solutions = mvot.solve(
            self.model,
            self.processor,
            self.items,
            batch_size=self.batch_size,
            on_batch=cost,
            progress=tell,
        )
        seconds = time.perf_counter() - start
        return Side(mvot.score(solutions), cost.flops, cost.kv_bytes, cost.sampled, seconds)


def table(result: Comparison, title: str) -> Table:
    """The comparison for a terminal, each line with its ratio."""
    from rich.table import Table

    full, dare = result.full, result.dare
    lines = Table(title=title, title_justify="left")
    for name, justify in (("", "left"), ("full", "right"), ("DARE", "right"), ("ratio", "right")):
        lines.add_column(name, justify=justify)
    one, two, lengths = full.score, dare.score, (full.sampled, dare.sampled)
    lines.add_row("accuracy", *_percent(one.accuracy, two.accuracy))
    spans = (f"{low:.0%} to {high:.0%}" for low, high in _intervals(result))
    lines.add_row("  95 % interval", *spans, "")
    lines.add_row("images drawn right", *_percent(one.images_right, two.images_right))
    lines.add_row("tokens sampled", *map(str, lengths), ratio(lengths[1], lengths[0]))
    flops = (f"{side.flops / 1e9:.1f}" for side in (full, dare))
    lines.add_row("GFLOPs", *flops, ratio(dare.flops, full.flops))
    stored = (amount(side.kv_bytes, "B") for side in (full, dare))
    lines.add_row("KV cache at the end", *stored, ratio(dare.kv_bytes, full.kv_bytes))
    seconds = (f"{side.seconds:.1f}" for side in (full, dare))
    lines.add_row("seconds", *seconds, ratio(dare.seconds, full.seconds))
    return lines


def _percent(full: float, dare: float) -> tuple[str, str, str]:
    return f"{full:.1%}", f"{dare:.1%}", ratio(dare, full)


def _intervals(result: Comparison) -> list[tuple[float, float]]:
    return [side.score.accuracy_interval for side in (result.full, result.dare)]
