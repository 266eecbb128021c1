"""Counts what forwards did into a report."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING

from dare_hf.report.flops import (
    forward_flops,
    frozen_flops,
    head_flops,
    kv_bytes,
    step_flops,
    unpruned_flops,
    unpruned_kv_bytes,
)
from dare_hf.report.report import MODALITIES, DareReport

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dare_hf.report.flops import LayerShape
    from dare_hf.report.report import Phase


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
        # [hop][held, in all][layer][modality], rows summed
        self._stored: list[list[list[list[int]]]] = []

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
        report.flops[phase] += forward_flops(shapes, queries, keys)
        full = unpruned_flops(shapes, full_queries, full_lengths, tails)
        report.flops_baseline[phase] += full

    def frozen(self, layer: int, tokens: int) -> None:
        """Adds the projections of tokens whose keys are stored before some of them run."""
        self._report.flops["prefill"] += frozen_flops(self.shapes[layer], self.hidden, tokens)

    def steps(
        self,
        shapes: Sequence[LayerShape],
        kept: Sequence[Sequence[int]],
        lengths: Sequence[int],
        count: int,
    ) -> None:
        """Adds `count` forwards of one sampled token in every row.

        Args:
            shapes: Of the layers that run; none has a window.
            kept: [layers][rows] tokens each held before the first step.
            lengths: [rows] real tokens of the sequence before it.
            count: How many.
        """
        report = self._report
        report.flops["decode"] += step_flops(shapes, kept, count)
        report.flops_baseline["decode"] += step_flops(shapes, [lengths] * len(shapes), count)

    def head(self, rows: int, phase: Phase) -> None:
        """Adds the lm_head on `rows` hidden states, on both sides."""
        flops = head_flops(self.hidden, self.vocab, rows)
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
        while len(self._stored) <= hop:
            self._stored.append([[[0, 0] for _ in self.shapes] for _ in range(2)])
        held, of = self._stored[hop]
        held[layer][modality] += kept
        of[layer][modality] += total

    def kv(self, measured: int, kept: Sequence[Sequence[int]], lengths: Sequence[int]) -> None:
        """Sets the state of the cache at the end of a run.

        Args:
            measured: Bytes of real tokens, from the cache's tensors.
            kept: [layers][rows] real tokens each layer should hold by rates and token counts; []
                for one that no forward has come to.
            lengths: [rows] real tokens of each sequence, pruned ones counted.
        """
        shapes, itemsize, report = self.shapes, self.itemsize, self._report
        report.kv_bytes = int(measured)
        report.kv_bytes_predicted = kv_bytes(shapes, kept, itemsize)
        ran = [shape for shape, rows in zip(shapes, kept, strict=True) if rows]
        report.kv_bytes_baseline = unpruned_kv_bytes(ran, lengths, itemsize)

    def skipped(self, layer: int, count: int) -> None:
        """Adds sampled tokens that skipped a layer."""
        if not self._report.skipped_layers:
            self._report.skipped_layers = [0] * len(self.shapes)
        self._report.skipped_layers[layer] += count

    def seconds(self, elapsed: float) -> None:
        """Adds wall-clock time."""
        self._report.seconds += elapsed

    def set_seconds(self, elapsed: float) -> None:
        """Sets the wall-clock time of a run that is measured as a whole."""
        self._report.seconds = elapsed

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
            for held, total in self._stored
        ]
        return report
