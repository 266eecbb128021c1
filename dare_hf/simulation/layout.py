"""Hops and phases of a teacher-forced row: from its labels, or from hop ids the user gives."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from dare_hf.errors import DareInputError
from dare_hf.forward.delimiters import delimiter_ends, written_ids
from dare_hf.forward.hop_closing import OpenHop
from dare_hf.routing.kinds import PAD, TEXT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from dare_hf.forward.token_rules import TokenRules

IGNORED = -100


class Layout(NamedTuple):
    """What each token of a batch would have been in a step-by-step run; on the CPU.

    Attributes:
        hop: Int32[B, S], that of the token before for pads.
        sampled: Bool[B, S], False for the prompt, injected tokens and pads.
        injects: Whether any row has a span after its prompt.
    """

    hop: Tensor
    sampled: Tensor
    injects: bool


def read_layout(
    ids: Tensor | None,
    labels: Tensor | None,
    hop_ids: Tensor | None,
    real: Tensor,
    rules: TokenRules,
) -> Layout:
    """The layout of a batch; one copy to the host of each argument.

    Args:
        ids: Long[B, S], None where only embeddings are given.
        labels: Long[B, S], -100 where a token is not supervised.
        hop_ids: Int[B, S], one of the two is given.
        real: Bool[B, S], False for pads.
        rules: Delimiters and window.

    Raises:
        DareInputError: They do not describe a run of generate.

    Source: docs/method.md, sections 1 and 7.
    """
    real = real.cpu()
    for name, given in (("labels", labels), ("hop_ids", hop_ids)):
        if given is not None and given.shape != real.shape:
            raise DareInputError(
                f"{name}: expected the shape of the tokens, {list(real.shape)}; got "
                f"{list(given.shape)}"
            )
    sampled = real if labels is None else real & (labels.cpu() != IGNORED)
    if hop_ids is not None:
        return _given(hop_ids.cpu(), sampled, real)
    ends = torch.zeros_like(real)
    if rules.delimiters:
        if ids is None:
            raise DareInputError(
                "expected input_ids beside labels, in which hop delimiters are found; got "
                "inputs_embeds alone. Pass hop_ids [batch, tokens] as well"
            )
        written = written_ids(ids.cpu(), sampled, torch.where(real, TEXT, PAD))
        ends = delimiter_ends(written, None, rules.delimiters, padded=True)
    rows = zip(sampled.tolist(), real.tolist(), ends.tolist(), strict=True)
    found = [_derive_row(*row, rules.window) for row in rows]
    hop = torch.tensor([hops for hops, _ in found], dtype=torch.int32)
    return Layout(hop, sampled, any(injects for _, injects in found))


def _derive_row(
    sampled: Sequence[bool], real: Sequence[bool], ends: Sequence[bool], window: int | None
) -> tuple[list[int], bool]:
    """Hops of one row, and whether it has an injected span.

    The prompt is hop 0. Sampled tokens close their hops as in generate (`OpenHop`); so does
    whatever stands before an injected span.
    """
    hops: list[int] = []
    hop, closed, injects, inside, own = 0, True, False, False, OpenHop(window)
    for is_sampled, is_real, ends_hop in zip(sampled, real, ends, strict=True):
        if is_real and is_sampled:
            hop, inside = hop + closed, False
            closed = own.closes(ends_hop)
        elif is_real and hop > 0:
            if not inside:
                hop, closed, own = hop + 1, False, OpenHop(window)
            injects = inside = True
        hops.append(hop)
    return hops, injects


def _given(hop_ids: Tensor, sampled: Tensor, real: Tensor) -> Layout:
    """Hop 0 is the prompt even where it is supervised; the user's word goes before the labels'."""
    rows, injects = [], False
    sampled = sampled & (hop_ids > 0)
    for row in range(len(hop_ids)):
        hops = hop_ids[row][real[row]].tolist()
        steps = [after - before for before, after in itertools.pairwise(hops)]
        if hops and (hops[0] not in (0, 1) or any(step not in (0, 1) for step in steps)):
            raise DareInputError(
                "hop_ids: expected 0 over a row's prompt, then each hop's number, rising by 1 from "
                f"hop to hop; row {row} has {_runs(hops)}. Pads may hold anything"
            )
        spans = [not flag for flag in sampled[row][real[row]].tolist()]
        for place in range(1, len(hops)):
            if spans[place] and not spans[place - 1] and not steps[place - 1]:
                raise DareInputError(
                    "labels: expected -100 inside a hop only on the tokens that open it (an "
                    f"injected span); row {row} has -100 after a supervised token of hop "
                    f"{hops[place]}. Supervise that token, or begin a hop there in hop_ids"
                )
        injects = injects or any(s and h > 0 for s, h in zip(spans, hops, strict=True))
        rows.append(_filled(hop_ids[row].tolist(), real[row].tolist()))
    return Layout(torch.tensor(rows, dtype=torch.int32), sampled, injects)


def _filled(hops: list[int], real: list[bool]) -> list[int]:
    """Pads take the hop of the token before them."""
    last, filled = 0, []
    for hop, is_real in zip(hops, real, strict=True):
        last = hop if is_real else last
        filled.append(last)
    return filled


def _runs(hops: list[int]) -> str:
    """Hops in order, repeats left out, cut off after a few."""
    changes: list[Any] = [h for i, h in enumerate(hops) if i == 0 or h != hops[i - 1]]
    return ", ".join(map(str, [*changes[:8], "..."] if len(changes) > 8 else changes))
