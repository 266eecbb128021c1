"""A measurement for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from dare_hf.evaluation.costs import by_hop
from dare_hf.report.report import amount

if TYPE_CHECKING:
    from dare_hf.evaluation.measurement import Measurement


def table(result: Measurement, title: str, detail: str | None) -> Table:
    """One line per figure; `detail` names `Measurement.detail`."""
    lines = Table(title=title, title_justify="left", show_header=False)
    low, high = result.accuracy_interval
    lines.add_row("accuracy", f"{result.accuracy:.1%} (95 % interval {low:.1%} to {high:.1%})")
    for kind, share in (result.kinds or {}).items():
        lines.add_row(f"  {kind}", f"{share:.1%}")
    lines.add_row("answers that do not parse", f"{result.unparsed:.1%}")
    if detail is not None and result.detail is not None:
        lines.add_row(detail.replace("_", " "), f"{result.detail:.1%}")
    if result.flops_ratio is None or result.kv_ratio is None or result.retention is None:
        lines.add_row("FLOPs, KV cache", "nothing is pruned")
    else:
        for phase, name in _PHASES.items():
            lines.add_row(f"FLOPs, {name}", f"{result.flops_ratio[phase]:.3f} of unpruned")
        lines.add_row("KV cache at the end", f"{result.kv_ratio:.3f} of unpruned")
        for name, shares in by_hop(result.retention).items():
            held = " ".join("-" if share is None else f"{share:.2f}" for share in shares)
            lines.add_row(f"{name} held when hop 0, 1, ... begins", held)
    spent = ", ".join(f"{phase} {s:.1f}" for phase, s in result.watch.seconds.items())
    lines.add_row("seconds", f"{result.seconds:.1f} ({spent})")
    if result.watch.peak_bytes is not None:
        lines.add_row("peak memory of the run", amount(result.watch.peak_bytes, "B"))
    return lines


_PHASES = {"prefill": "prompt and injected spans", "decode": "sampled tokens", "all": "in all"}
