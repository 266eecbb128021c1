"""What a run computed and stored, beside what it would have without pruning."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dare_hf.report.page import SeenImage

Phase = Literal["prefill", "decode"]
MODALITIES = ("text", "vision")  # index = modality id


def _phases() -> dict[str, int]:
    return {"prefill": 0, "decode": 0}


@dataclass(repr=False)
class DareReport:
    """Plain numbers of one generate or forward, rows summed; holds no tensors.

    Attributes:
        flops: FLOPs executed, by "prefill" (prompt and injected spans) and "decode" (sampled
            tokens): decoder layers, scorers and lm_head.
        flops_baseline: FLOPs of the same tokens without pruning.
        kv_bytes: Bytes of the real tokens the cache holds, measured on its tensors.
        kv_bytes_baseline: Bytes of an unpruned cache of the same rows and real tokens.
        kv_bytes_predicted: Bytes the rates promise, from the run's token counts alone, as
            `expected_kv_bytes` counts them before a run.
        retention: `[hop][layer][modality]` share of all real tokens of "vision" or "text" in closed
            hops and in the hop's own span that the layer holds when the hop's sampled tokens begin;
            None where there is no such token.
        tokens: `{"vision" | "text": [hop]}` real tokens processed.
        hops: Number of hops, the prompt's hop 0 included; of the row that has most.
        seconds: Wall-clock time.
        skipped_layers: `[layer]` sampled tokens that skipped the layer (routed decode); else empty.
        notes: What was left unpruned, and why.
    """

    flops: dict[str, int] = field(default_factory=_phases)
    flops_baseline: dict[str, int] = field(default_factory=_phases)
    kv_bytes: int = 0
    kv_bytes_baseline: int = 0
    kv_bytes_predicted: int = 0
    retention: list[list[dict[str, float | None]]] = field(default_factory=list)
    tokens: dict[str, list[int]] = field(default_factory=lambda: {"vision": [], "text": []})
    hops: int = 0
    seconds: float = 0.0
    skipped_layers: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return asdict(self)

    def to_html(
        self,
        *,
        answer: str | None = None,
        images: Sequence[SeenImage] = (),
        title: str = "One generate with DARE",
    ) -> str:
        """This report as one HTML file without scripts, which needs no network.

        Args:
            answer: What the model said; any text, it is escaped.
            images: The run's pictures and what each layer held of them, as
                `dare_hf.visualize.SeenImage`.
            title: The line on top.

        Raises:
            DareInputError: What is held of a picture is not [layers, down, across].
        """
        from dare_hf.report.page import report_page

        return report_page(self, answer=answer, images=images, title=title)

    def __repr__(self) -> str:
        rows = {name: ratio(got, full) for name, got, full, _ in cost_rows(self)}
        return (
            f"<DareReport: {self.hops} hop{'s' * (self.hops != 1)}, {self.seconds:.2f} s, FLOPs "
            f"{rows['in all']} and KV cache {rows['KV cache']} of unpruned; print() for all>"
        )

    def __str__(self) -> str:
        rows = cost_rows(self)
        lines = [f"DareReport: {self.hops} hop{'s' * (self.hops != 1)}, {self.seconds:.2f} s"]
        lines += [f"{'':10}{'with DARE':>14}{'unpruned':>14}{'ratio':>8}"]
        lines += [
            f"{name:10}{amount(got, unit):>14}{amount(full, unit):>14}{ratio(got, full):>8}"
            for name, got, full, unit in rows
        ]
        if self.kv_bytes_predicted != self.kv_bytes:
            lines += [f"predicted KV cache: {amount(self.kv_bytes_predicted, 'B')}"]
        lines += [self._hop_line(hop) for hop in range(len(self.retention))]
        if any(self.skipped_layers):
            lines += [f"layer runs skipped by sampled tokens: {sum(self.skipped_layers)}"]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])

    def _hop_line(self, hop: int) -> str:
        """Tokens of a hop, and the share of what came before that was held when it began."""
        new, held = [], []
        for modality in ("vision", "text"):
            counts = self.tokens[modality]
            new.append(f"{counts[hop] if hop < len(counts) else 0} {modality}")
            shares = [layer[modality] for layer in self.retention[hop]]
            known = [share for share in shares if share is not None]
            if known:
                mean, least, most = sum(known) / len(known), min(known), max(known)
                held.append(f"{mean:.2f} of {modality} (layers {least:.2f} to {most:.2f})")
        when = "after the prompt" if hop == 0 else "at its begin"
        if same_as_prompt(self, hop):
            held = ["as after the prompt"]
        return f"hop {hop}: {' + '.join(new)} tokens; held {when}: {', '.join(held) or '-'}"


def cost_rows(report: DareReport) -> list[tuple[str, int, int, str]]:
    """Name, amount with DARE, amount unpruned and unit of each line of a report's table."""
    flops, full = report.flops, report.flops_baseline
    return [
        *((phase, flops[phase], full[phase], "FLOP") for phase in ("prefill", "decode")),
        ("in all", sum(flops.values()), sum(full.values()), "FLOP"),
        ("KV cache", report.kv_bytes, report.kv_bytes_baseline, "B"),
    ]


def same_as_prompt(report: DareReport, hop: int) -> bool:
    """Whether it is hop 1 and begins, as it mostly does, with what was held after the prompt."""
    return hop == 1 and report.retention[1] == report.retention[0]


def ratio(got: float, full: float) -> str:
    """Got / full with two decimals; a dash where there is nothing to compare."""
    return f"{got / full:.2f}" if full else "-"


def amount(value: float, unit: str) -> str:
    """A count with a decimal prefix: 1234567, "B" -> "1.23 MB"."""
    for prefix in ("", "k", "M", "G", "T"):
        if value < 999.5:
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    return f"{value:.4g} P{unit}"
