"""Adds up the FLOPs, the KV bytes and the sampled tokens of generate calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from dare_hf.architectures.locate import locate
from dare_hf.evaluation.costs import ReportTotals
from dare_hf.report.flops import shapes_of, unpruned_generate_flops, unpruned_kv_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from dare_hf.tasks.mvot import BatchOutput

    SampledColumns = Callable[[BatchOutput], int]


class Cost(Protocol):
    """Totals over generate calls.

    Attributes:
        sampled: Tokens sampled, pads fed to rows that had ended among them.
    """

    sampled: int

    @property
    def flops(self) -> int:
        """FLOPs of decoder layers, scorers and lm_head."""

    @property
    def kv_bytes(self) -> int:
        """Bytes of the caches at the end of each call."""

    def __call__(self, batch: BatchOutput) -> None:
        """Adds one call."""


class PlainCost:
    """Of a model without DARE, counted from the tokens it processed.

    Args:
        model: The model.
        columns: Sampled columns of a call.
    """

    def __init__(self, model: Any, columns: SampledColumns) -> None:
        parts = locate(model)
        self.shapes = shapes_of(parts.layers, parts.text_config)
        self.hidden, self.vocab = parts.text_config.hidden_size, parts.text_config.vocab_size
        self.itemsize, self.columns = model.dtype.itemsize, columns
        self.flops = self.kv_bytes = self.sampled = 0

    def __call__(self, batch: BatchOutput) -> None:
        """Adds one call."""
        prompts = batch.inputs["attention_mask"].sum(1).tolist()
        sampled = self.columns(batch)
        self.sampled += sampled * len(prompts)
        self.flops += unpruned_generate_flops(
            self.shapes, prompts, sampled, hidden=self.hidden, vocab=self.vocab
        )
        stored = [prompt + sampled - 1 for prompt in prompts]
        self.kv_bytes += unpruned_kv_bytes(self.shapes, stored, self.itemsize)


class ReportedCost:
    """Of a model with DARE, as its reports say.

    Args:
        model: The model.
        columns: Sampled columns of a call.

    Attributes:
        totals: The reports' sums, and what was held at each hop.
    """

    def __init__(self, model: Any, columns: SampledColumns) -> None:
        self.totals, self.columns = ReportTotals(model), columns
        self.sampled = 0

    @property
    def flops(self) -> int:
        """FLOPs of decoder layers, scorers and lm_head."""
        return sum(self.totals.flops.values())

    @property
    def kv_bytes(self) -> int:
        """Bytes of the caches at the end of each call."""
        return self.totals.kv_bytes

    def __call__(self, batch: BatchOutput) -> None:
        """Adds one call."""
        self.totals(batch)
        self.sampled += self.columns(batch) * len(batch.indices)
