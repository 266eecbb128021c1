"""Bytes of the KV cache at each hop, before any run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dare_hf.expected.run import ExpectedRun
from dare_hf.expected.subject import Subject
from dare_hf.expected.tokens import rows_of
from dare_hf.report.flops import unpruned_kv_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dare_hf.expected.subject import Config, Source
    from dare_hf.expected.tokens import HopTokens


@dataclass(frozen=True)
class ExpectedBytes:
    """Bytes of keys and values that a DareCache will store, rows summed.

    Attributes:
        begins: `[hops][layers]` when a hop begins, after the cache was pruned to its rates; zero
            for the prompt.
        ends: `[hops][layers]` when the last token of a hop was processed; of the prompt it is what
            the prefill leaves, `max_kv_tokens` kept to. A row without such a hop counts as it is.
        baseline: Bytes at the end if every layer stored every token.
        exact: Whether counts decide. False where scores decide too, how many vision and how many
            text tokens a cap has left, or what `pruned="drop"` leaves to deeper layers when a later
            hop's rates are lower: the numbers are then the most there can be.
    """

    begins: tuple[tuple[int, ...], ...]
    ends: tuple[tuple[int, ...], ...]
    baseline: int
    exact: bool

    @property
    def total(self) -> int:
        """Bytes once the last token given was processed."""
        return sum(self.ends[-1])


def expected_kv_bytes(
    model: Source,
    config: Config = None,
    *,
    hops: Sequence[HopTokens] | Sequence[Sequence[HopTokens]],
    itemsize: int | None = None,
) -> ExpectedBytes:
    """Bytes that a run will store, from rates and token counts alone; nothing is run.

    Law: given the counts a run turns out to have, these are the bytes its cache holds, after the
    prefill and after every hop.

    Args:
        model: A supported model of transformers, weights or not (meta device), with DARE or
            without; or a `dare_hf.report.flops.LayerShape` for each layer.
        config: What to prune: a DareConfig, a preset's name, an adapter's folder or hub id. None:
            what is on the model now, else `DareConfig()`.
        hops: The prompt and the hops after it, in order. Of several rows, a list for each; under
            ``batch_budget="equal"`` the n-th entries of all rows are taken for one forward.
        itemsize: Bytes of one element of the cache; None: those of the model's dtype, 2 for shapes.

    Raises:
        DareConfigError: The configuration does not fit the model, has learned rates without an
            adapter, or `decode` is not "full".
        DareInputError: Counts that cannot be.
        UnsupportedModelError: The architecture cannot be routed.

    Source: docs/method.md, sections 4 and 5.

    Examples:
        >>> from dare_hf import DareConfig, HopTokens, expected_kv_bytes
        >>> from dare_hf.testing import tiny_model
        >>> cost = expected_kv_bytes(
        ...     tiny_model("llava"), DareConfig(), hops=[HopTokens(vision=576, text=64)]
        ... )
        >>> cost.total < cost.baseline
        True
    """
    subject, rows = Subject.of(model, config, itemsize), rows_of(hops)
    runs = ExpectedRun.of_rows(subject, rows)
    hops_run = range(max(len(run.ends) for run in runs))
    return ExpectedBytes(
        begins=tuple(_bytes(subject, [run.begun(hop) for run in runs]) for hop in hops_run),
        ends=tuple(_bytes(subject, [run.ended(hop) for run in runs]) for hop in hops_run),
        baseline=unpruned_kv_bytes(subject.shapes, [run.seen for run in runs], subject.itemsize),
        exact=all(run.exact for run in runs),
    )


def _bytes(subject: Subject, rows: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """[layers] bytes of the tokens that `rows` [rows][layers] hold."""
    held = [sum(row[layer] for row in rows) for layer in range(len(subject.shapes))]
    pairs = zip(subject.shapes, held, strict=True)
    return tuple(shape.kv_bytes_per_token(subject.itemsize) * count for shape, count in pairs)
