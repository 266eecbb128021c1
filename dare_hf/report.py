"""What a run computed and stored, beside what it would have without pruning."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from dare_hf import accounting

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dare_hf.accounting import LayerShape

Phase = Literal["prefill", "decode"]
MODALITIES = ("text", "vision")  # index = modality id


def _phases() -> dict[str, int]:
    return {"prefill": 0, "decode": 0}


@dataclass
class DareReport:
    """Plain numbers of one generate or forward, rows summed; holds no tensors.

    Attributes:
        flops: FLOPs executed, by "prefill" (prompt and injected spans) and "decode" (sampled
            tokens): decoder layers, scorers and lm_head.
        flops_baseline: FLOPs of the same tokens without pruning.
        kv_bytes: Bytes of the real tokens the cache holds, measured on its tensors.
        kv_bytes_baseline: Bytes of an unpruned cache of the same rows and real tokens.
        kv_bytes_predicted: Bytes the rates promise, from token counts alone.
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

    def __str__(self) -> str:
        total, baseline = sum(self.flops.values()), sum(self.flops_baseline.values())
        rows = [("prefill", self.flops["prefill"], self.flops_baseline["prefill"], "FLOP")]
        rows += [("decode", self.flops["decode"], self.flops_baseline["decode"], "FLOP")]
        rows += [("in all", total, baseline, "FLOP")]
        rows += [("KV cache", self.kv_bytes, self.kv_bytes_baseline, "B")]
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
        return f"hop {hop}: {' + '.join(new)} tokens; held {when}: {', '.join(held) or '-'}"


class ReportBuilder:
    """Counts what forwards did, from host integers only.

    Args:
        shapes: One per decoder layer.
        hidden: Width of the hidden state, in elements.
        vocab: Rows of the lm_head; 0 for a model without one.
        itemsize: Bytes of one element of the cache.
    """

    def __init__(
        self, shapes: Sequence[LayerShape], *, hidden: int, vocab: int = 0, itemsize: int = 4
    ) -> None:
        self.shapes = tuple(shapes)
        self.hidden, self.vocab, self.itemsize = hidden, vocab, itemsize
        self._report = DareReport()
        self._held: list[list[list[int]]] = []  # [hop][layer][modality], rows summed
        self._total: list[list[list[int]]] = []

    def forward(
        self,
        queries: Sequence[Sequence[int]],
        keys: Sequence[Sequence[int]],
        full_queries: Sequence[int],
        full_lengths: Sequence[int],
        phase: Phase,
        tails: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        """Adds one forward of all layers.

        Args:
            queries: [layers][rows] tokens that ran the layer.
            keys: [layers][rows] tokens the layer's attention had: stored ones and its own queries.
            full_queries: [rows] real tokens of the forward.
            full_lengths: [rows] real tokens of the sequence so far, those of this forward included.
            phase: "prefill" for spans, "decode" for sampled tokens.
            tails: [rows] tokens that are all a layer computes even unpruned, by its index.
        """
        report, shapes = self._report, self.shapes
        report.flops[phase] += accounting.forward_flops(shapes, queries, keys)
        full = accounting.unpruned_flops(shapes, full_queries, full_lengths, tails)
        report.flops_baseline[phase] += full

    def head(self, rows: int, phase: Phase) -> None:
        """Adds the lm_head on `rows` hidden states, on both sides."""
        flops = accounting.head_flops(self.hidden, self.vocab, rows)
        self._report.flops[phase] += flops
        self._report.flops_baseline[phase] += flops

    def scorer(self, flops: int, phase: Phase) -> None:
        """Adds FLOPs of scoring, on the pruned side only."""
        self._report.flops[phase] += flops

    def tokens(self, hop: int, text: int, vision: int) -> None:
        """Adds real tokens, rows summed, to hop `hop`."""
        for modality, count in (("text", text), ("vision", vision)):
            counts = self._report.tokens[modality]
            counts.extend([0] * (hop + 1 - len(counts)))
            counts[hop] += count
        self._report.hops = max(self._report.hops, hop + 1)

    def set_tokens(self, counts: Sequence[Sequence[Sequence[int]]]) -> None:
        """Replaces the token counts by [rows][hops][modality], as the token log gives them."""
        self._report.tokens = {"vision": [], "text": []}
        self._report.hops = 0
        for row in counts:
            for hop, (text, vision) in enumerate(row):
                if text or vision:
                    self.tokens(hop, text, vision)

    def retention(self, hop: int, layer: int, modality: int, kept: int, total: int) -> None:
        """Adds one row's (or all rows') tokens of one modality that a layer holds at a hop's begin.

        Args:
            hop: 0-based hop that begins, 0 for the state after the prompt.
            layer: 0-based layer.
            modality: 0 text, 1 vision.
            kept: Real tokens held.
            total: Real tokens of closed hops and of the hop's own span, pruned ones counted.
        """
        while len(self._held) <= hop:
            self._held.append([[0, 0] for _ in self.shapes])
            self._total.append([[0, 0] for _ in self.shapes])
        self._held[hop][layer][modality] += kept
        self._total[hop][layer][modality] += total

    def kv(self, measured: int, kept: Sequence[Sequence[int]], lengths: Sequence[int]) -> None:
        """Sets the state of the cache at the end of a run.

        Args:
            measured: Bytes of real tokens, from the cache's tensors.
            kept: [layers][rows] real tokens each layer should hold by host counts.
            lengths: [rows] real tokens of each sequence, pruned ones counted.
        """
        shapes, itemsize, report = self.shapes, self.itemsize, self._report
        report.kv_bytes = int(measured)
        report.kv_bytes_predicted = accounting.kv_bytes(shapes, kept, itemsize)
        report.kv_bytes_baseline = accounting.unpruned_kv_bytes(shapes, lengths, itemsize)

    def skipped(self, layer: int, count: int) -> None:
        """Adds sampled tokens that skipped a layer."""
        if not self._report.skipped_layers:
            self._report.skipped_layers = [0] * len(self.shapes)
        self._report.skipped_layers[layer] += count

    def seconds(self, elapsed: float) -> None:
        """Adds wall-clock time."""
        self._report.seconds += elapsed

    def note(self, text: str) -> None:
        """Adds a note once."""
        if text not in self._report.notes:
            self._report.notes.append(text)

    def snapshot(self) -> DareReport:
        """The report so far, independent of what is counted later."""
        report = deepcopy(self._report)
        report.retention = [
            [
                {
                    name: held[layer][m] / total[layer][m] if total[layer][m] else None
                    for m, name in enumerate(MODALITIES)
                }
                for layer in range(len(self.shapes))
            ]
            for held, total in zip(self._held, self._total, strict=True)
        ]
        return report


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
