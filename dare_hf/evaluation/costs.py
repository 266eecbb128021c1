"""Adds up the reports of generate calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dare_hf.api import last_report
from dare_hf.report.report import MODALITIES

if TYPE_CHECKING:
    from dare_hf.report import DareReport
    from dare_hf.tasks.mvot import BatchOutput

Retention = list[list[dict[str, float | None]]]
PHASES = ("prefill", "decode")


class ReportTotals:
    """Totals over generate calls of a model with DARE; give it to `solve` as `on_batch`.

    Args:
        model: The model.

    Attributes:
        flops: FLOPs by phase; "prefill" holds injected spans too.
        flops_baseline: FLOPs of the same tokens without pruning.
        kv_bytes: Bytes of the caches at the end of each call.
        kv_bytes_baseline: The same without pruning.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.flops, self.flops_baseline = dict.fromkeys(PHASES, 0), dict.fromkeys(PHASES, 0)
        self.kv_bytes = self.kv_bytes_baseline = 0
        self._held: list[list[dict[str, list[float]]]] = []  # [hop][layer][modality]: sum, weight

    def __call__(self, batch: BatchOutput) -> None:
        """Adds the last call."""
        self.add(last_report(self.model), len(batch.indices))

    def add(self, report: DareReport, rows: int) -> None:
        """Adds one call's report, of `rows` items."""
        for phase in PHASES:
            self.flops[phase] += report.flops[phase]
            self.flops_baseline[phase] += report.flops_baseline[phase]
        self.kv_bytes += report.kv_bytes
        self.kv_bytes_baseline += report.kv_bytes_baseline
        for hop, layers in enumerate(report.retention):
            if hop == len(self._held):
                self._held.append([{name: [0.0, 0.0] for name in MODALITIES} for _ in layers])
            for layer, shares in enumerate(layers):
                for name, share in shares.items():
                    if share is not None:
                        total = self._held[hop][layer][name]
                        total[0] += share * rows
                        total[1] += rows

    def flops_ratios(self) -> dict[str, float]:
        """FLOPs by phase, and of "all", as shares of those without pruning."""
        ratios = {phase: self.flops[phase] / self.flops_baseline[phase] for phase in PHASES}
        return ratios | {"all": self.flops_ratio}

    @property
    def flops_ratio(self) -> float:
        """FLOPs of both phases as a share of those without pruning."""
        return sum(self.flops.values()) / sum(self.flops_baseline.values())

    @property
    def kv_ratio(self) -> float:
        """KV bytes at the end as a share of those without pruning."""
        return self.kv_bytes / self.kv_bytes_baseline

    @property
    def retention(self) -> Retention:
        """`[hop][layer][modality]` share held when the hop begins, as reports define it.

        The mean over calls that have the hop, each weighted by its items.
        """
        return [
            [{name: s / w if w else None for name, (s, w) in layer.items()} for layer in hop]
            for hop in self._held
        ]


def by_hop(retention: Retention) -> dict[str, list[float | None]]:
    """`{"vision" | "text": [hop]}` means over layers."""
    means: dict[str, list[float | None]] = {}
    for name in reversed(MODALITIES):
        known = [[layer[name] for layer in hop if layer[name] is not None] for hop in retention]
        means[name] = [sum(x for x in hop if x) / len(hop) if hop else None for hop in known]
    return means
