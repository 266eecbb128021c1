"""Reading one forward's arguments into its facts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dare_hf.cache.hop_counters import HopCounters
from dare_hf.errors import DareInputError
from dare_hf.forward.delimiters import delimiter_ends, written_ids
from dare_hf.forward.facts import ForwardContext
from dare_hf.forward.hop_closing import OpenHop
from dare_hf.forward.modality import check_mask, resolve_span
from dare_hf.forward.token_rules import forced_of
from dare_hf.routing.kinds import PAD, TEXT, VISION
from dare_hf.routing.selection import isin_ids

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from dare_hf.cache import DareCache
    from dare_hf.forward.generation_call import GenerationCall
    from dare_hf.forward.token_rules import TokenRules

# Keyword arguments of a forward that the model itself never sees.
_OWN = ("modality_mask", "hop_ids", "prompt_length")


def without_own(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments without those that only DARE reads."""
    return {name: value for name, value in kwargs.items() if name not in _OWN}


def open_context(
    arguments: Mapping[str, Any],
    cache: DareCache | None,
    rules: TokenRules,
    call: GenerationCall | None,
) -> ForwardContext:
    """Read one forward's arguments; hops that an injected span closes are closed here.

    Args:
        arguments: The model forward's keyword arguments by name.
        cache: The cache the forward will use.
        rules: The token rules of the model.
        call: The running generate, None for a bare forward.

    Raises:
        DareInputError: The modality of a span cannot be told, or nothing was passed.
    """
    ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
    source = ids if ids is not None else embeds
    if source is None:
        raise DareInputError("expected input_ids or inputs_embeds; got neither")
    past = cache.get_seq_length() if cache is not None else 0
    _check_mask(arguments.get("attention_mask"), past, source.shape[1])
    state = HopCounters() if cache is None else cache.hop_counters
    state.ensure(source.shape[0])
    reader = _Reader(arguments, source, past, cache, rules, call, state)
    return reader.decode() if reader.all_sampled else reader.span()


def _check_mask(mask: Any, past: int, length: int) -> None:
    """Refuse a mask of fewer columns than the sequence has with this forward's.

    transformers fills one up with zeros, which hides the new tokens from each other. And a forward
    that is repeated although the cache holds its tokens is known by its mask.
    """
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[1] < past + length:
        raise DareInputError(
            f"attention_mask: expected [batch, {past + length}], over the {past} tokens in the "
            f"cache and {length} new ones; got {mask.shape[1]} columns. Where a forward hook of "
            "the model raised after its forward, the cache has those tokens: crop it by their "
            "number before the forward is repeated"
        )


class _Reader:
    """The steps of reading one forward's arguments."""

    def __init__(
        self,
        arguments: Mapping[str, Any],
        source: Tensor,
        past: int,
        cache: DareCache | None,
        rules: TokenRules,
        call: GenerationCall | None,
        state: HopCounters,
    ) -> None:
        self.arguments, self.past, self.cache = arguments, past, cache
        self.rules, self.call, self.state = rules, call, state
        self.ids: Any = arguments.get("input_ids")
        self.batch, self.length = source.shape[:2]
        self.device = source.device
        if call and self.in_prompt and self.ids is None and past == call.start:
            # a caller may widen the prompt it embeds: it is as long as what the model sees
            call.prompt_length = max(call.prompt_length, past + self.length)
        self.first = self._first_sampled()

    @property
    def in_prompt(self) -> bool:
        """Whether generate's own prompt and samples are read, not an injected span."""
        return self.call is not None and not self.call.injecting

    @property
    def all_sampled(self) -> bool:
        return self.ids is not None and isinstance(self.first, int) and self.first == 0

    def decode(self) -> ForwardContext:
        """A forward of sampled tokens only: no device-to-host copy unless delimiters need one."""
        modality = self._vision_of_ids(self.ids).to(torch.int8)
        valid = self._padding() if self.call is None else None
        real = [[True] * self.length] * self.batch if valid is None else valid.tolist()
        sampled = [sum(row) for row in real]
        if min(sampled) == self.length:
            valid = None
        if valid is not None:
            modality = modality.masked_fill(~valid, PAD)
        written = self._written(modality, valid)
        closing = self._closings(written, valid)
        hops = self.state.open_hops()
        nothing = [[0, 0] for _ in range(self.batch)]
        return self._context(
            modality=modality,
            token_hop=self._token_hops(hops, closing),
            valid=valid,
            span_hop=hops,
            counts=nothing,
            forced_counts=nothing,
            sampled=sampled,
            closing=closing,
            written=written,
            gaps=self._pads(real),
        )

    def span(self) -> ForwardContext:
        """A forward with a prompt or an injected span, perhaps followed by sampled tokens."""
        columns = torch.arange(self.length, device=self.device)
        first = self.first if isinstance(self.first, int) else self.first[:, None]
        sampled_at = (columns >= first).expand(self.batch, -1)
        self._check_labels(sampled_at)
        vision = self._span_vision(sampled_at)
        modality = torch.where(vision, VISION, TEXT).to(torch.int8)
        valid = self._padding()
        if valid is not None:
            modality = modality.masked_fill(~valid, PAD)
        span = (modality >= 0) & ~sampled_at
        start = self.call.start if self.in_prompt else self.past
        before = self._since(start)
        forced = forced_of(modality, span, self.ids, self.rules, before)
        rows = self._host_counts(modality, span, forced, sampled_at, before)
        counts = [[r[0], r[1]] for r in rows]
        if start:
            for row in (i for i, r in enumerate(rows) if r[0] + r[1] and not r[8]):
                self.state.cut(row, self.past, self.past + rows[row][6])
        hops = self.state.open_hops()
        written = self._written(modality, sampled_at)
        closing: list[list[int]] = [[] for _ in rows]
        if any(r[4] for r in rows):
            able = sampled_at if valid is None else sampled_at & valid
            closing = self._closings(written, able)
        token_hop = self._token_hops(hops, closing)
        if any(r[4] for r in rows):
            opened = torch.tensor([[h == 0] for h in hops], device=self.device)
            token_hop = token_hop + (sampled_at & opened)
        ends = self.past == 0 or bool(start)
        if self.call is not None:
            ends = self.past + self.length >= self.call.prompt_length
        spans, gaps = self._stretches(rows) if start else ([], [])
        if valid is not None and isinstance(self.first, torch.Tensor):
            gaps = self._pads(valid.tolist())  # of written text, whose sampled part may be padded
        return self._context(
            modality=modality,
            token_hop=token_hop,
            valid=valid if any(r[5] for r in rows) else None,
            span=span,
            forced=forced,
            span_hop=hops,
            counts=counts,
            forced_counts=[[r[2], r[3]] for r in rows],
            sampled=[r[4] for r in rows],
            closing=closing,
            span_ends=self._span_ends() if ends else None,
            spans=spans,
            gaps=gaps,
            written=written,
        )

    def _since(self, start: int) -> Tensor | None:
        """Long[B]: real tokens of this span that earlier chunks brought; None in the first."""
        if self.past == start or self.cache is None:
            return None
        return (self.cache.log.modality[:, start:] >= 0).sum(1).to(self.device)

    def _pads(self, real: list[list[bool]]) -> list[list[tuple[int, int]]]:
        """Per row the logical columns [start, end) of its pads, one by one."""
        return [
            [(self.past + i, self.past + i + 1) for i, is_real in enumerate(row) if not is_real]
            for row in real
        ]

    def _stretches(self, rows: list[list[int]]) -> tuple[list[Any], list[Any]]:
        """Per row the columns of its part of a span, and those that hold no token of it."""
        spans, gaps, past = [], [], self.past
        end = past + (self.first if isinstance(self.first, int) else self.length)
        for row in rows:
            first, last = past + min(row[6], end - past), past + max(row[7] + 1, 0)
            spans.append([(first, last)] if first < last else [])
            gaps.append([(past, first), (last, end)] if first < last else [(past, end)])
        return spans, gaps

    def _check_labels(self, sampled_at: Tensor) -> None:
        """Refuse supervision that only the training forward can route as generate would."""
        labels = self.arguments.get("labels")
        if labels is None or isinstance(self.first, int):
            return
        skipped = (labels == -100) & sampled_at
        valid = self._padding()
        skipped = skipped if valid is None else skipped & valid
        if bool(skipped.any()):
            raise DareInputError(
                "labels: expected -100 on the prompt only, then supervised tokens to the end; got "
                "-100 after the first supervised token, an injected span, which only a forward "
                "of its own can route. Run it inside `with dare_disabled(model)`"
            )

    def _context(self, **facts: Any) -> ForwardContext:
        keep = self.arguments.get("logits_to_keep", 0)
        head = keep if isinstance(keep, int) else len(keep)
        always = None
        if self.ids is not None and self.rules.keep_ids:
            always = isin_ids(self.ids, self.rules.keep_ids)
        return ForwardContext(
            always=always,
            batch=self.batch,
            length=self.length,
            past=self.past,
            cache=self.cache,
            head_rows=self.batch * (head or self.length),
            **facts,
        )

    def _first_sampled(self) -> int | Tensor:
        """New column of the first sampled token: one int, or Long[B] where labels tell."""
        if self.call is not None and self.call.injecting:
            return self.length
        if self.call is not None:
            return min(max(self.call.prompt_length - self.past, 0), self.length)
        labels = self.arguments.get("labels")
        if labels is not None and self.past == 0:
            return self.length - ((labels != -100).cumsum(1) > 0).sum(1)
        return self.length if self.past == 0 or self.length > 1 else 0

    def _span_ends(self) -> list[int]:
        """Per row the logical position of the last column a span can reach in this forward."""
        if self.in_prompt:
            return [self.call.prompt_length - 1] * self.batch
        if isinstance(self.first, torch.Tensor):
            return (self.first + self.past - 1).tolist()
        return [self.past + self.length - 1] * self.batch

    def _padding(self) -> Tensor | None:
        return padding_of(self.arguments, self.batch, self.length, self.past, self.device)

    def _vision_of_ids(self, ids: Tensor) -> Tensor:
        return isin_ids(ids, self.rules.vision_ids)

    def _span_vision(self, sampled_at: Tensor) -> Tensor:
        arguments = self.arguments
        if self.in_prompt and self.call.modality_mask is not None:
            vision = self._call_mask(self.call.modality_mask)
        else:
            vision = resolve_span(
                arguments, self.rules.vision_ids, self.rules.type_ids, self.length, self.past
            )
        if self.ids is not None and not (isinstance(self.first, int) and self.first >= self.length):
            vision = torch.where(sampled_at, self._vision_of_ids(self.ids), vision)
        return vision

    def _call_mask(self, mask: Tensor) -> Tensor:
        """The columns of generate's modality mask that this forward brings, Bool[B, S]."""
        call = self.call
        check_mask(mask, mask.shape[0], call.prompt_length - call.start, call.start)
        offset = self.past if mask.shape[1] == call.prompt_length else self.past - call.start
        part = mask[:, offset : offset + self.length]
        missing = self.length - part.shape[1]
        part = torch.nn.functional.pad(part, (0, max(missing, 0)))
        # beams and several returned sequences repeat rows, as generate expands its inputs
        rows = self.batch // part.shape[0]
        return (part.to(self.device) > 0).repeat_interleave(rows, dim=0)

    def _host_counts(
        self, modality: Tensor, span: Tensor, forced: Tensor, sampled_at: Tensor, before: Any
    ) -> list[list[int]]:
        """The span forward's one device-to-host copy: nine numbers per row.

        Text and vision tokens of the span, the same of the forced ones, sampled tokens, pads, the
        span's first and last column, its tokens in earlier chunks.
        """
        kinds = [modality == TEXT, modality == VISION]
        parts = [span & kind for kind in kinds] + [forced & kind for kind in kinds]
        parts += [sampled_at & (modality >= 0), modality < 0]
        columns = torch.arange(self.length, device=self.device)
        ends = [torch.where(span, columns, self.length).amin(1)]
        ends += [torch.where(span, columns, -1).amax(1)]
        ends += [torch.zeros_like(ends[0]) if before is None else before]
        return torch.stack([part.sum(1) for part in parts] + ends, dim=1).tolist()

    def _written(self, modality: Tensor, sampled: Tensor | None) -> Tensor | None:
        """Long[B, S] what a later part of a delimiter must know; None where none looks back."""
        if not self.rules.looks_back:
            return None
        return self.ids if sampled is None else written_ids(self.ids, sampled, modality)

    def _closings(self, written: Tensor | None, sampled: Tensor | None) -> list[list[int]]:
        """Per row the logical positions at which sampled tokens of this forward close a hop.

        Args:
            written: What `_written` made of this forward.
            sampled: Bool[B, S] sampled real tokens; None when all new tokens are.
        """
        rules = self.rules
        closing: list[list[int]] = [[] for _ in range(self.batch)]
        if not rules.closes_hops:
            return closing
        flags = None
        if self._must_look(sampled):
            able = torch.ones_like(self.ids, dtype=torch.bool) if sampled is None else sampled
            flags = torch.stack([self._delimited(written, able), able]).tolist()
        for row in range(self.batch):
            hop = OpenHop(rules.window, self.state.since(row, self.past))
            for column in range(self.length):
                if flags is not None and not flags[1][row][column]:
                    continue
                if hop.closes(flags is not None and flags[0][row][column]):
                    closing[row].append(self.past + column)
        return closing

    def _delimited(self, written: Tensor | None, able: Tensor) -> Tensor:
        """Bool[B, S]: the sampled tokens that end a delimiter."""
        rules = self.rules
        if not rules.delimiters:
            return torch.zeros_like(able)
        if self.ids is None:
            raise DareInputError(
                "expected input_ids of sampled tokens, in which hop delimiters are found; got "
                "inputs_embeds alone. Pass input_ids"
            )
        if written is None:
            return able & delimiter_ends(self.ids, None, rules.delimiters, padded=False)
        before = None if self.cache is None else self.cache.log.last_written(rules.looks_back)
        if before is not None:
            before = before.to(self.device)
        return able & delimiter_ends(
            written, before, rules.delimiters, padded=written is not self.ids
        )

    def _must_look(self, sampled: Tensor | None) -> bool:
        """Whether closings depend on what is on the device; a window alone is host arithmetic."""
        return bool(self.rules.delimiters) or sampled is not None

    def _token_hops(self, hops: list[int], closing: list[list[int]]) -> Tensor:
        """Int32[B, S]: the hop of each new token; a delimiter belongs to the hop it closes."""
        base = torch.tensor(hops, dtype=torch.int32, device=self.device)
        token_hop = base[:, None].expand(-1, self.length)
        if not any(closing) or self.length == 1:
            return token_hop
        token_hop = token_hop.clone()
        for row, ends in enumerate(closing):
            for end in ends:
                token_hop[row, end + 1 - self.past :] += 1
        return token_hop


def padding_of(
    arguments: Mapping[str, Any], batch: int, length: int, past: int, device: torch.device
) -> Tensor | None:
    """Bool[B, S] real tokens, None when no mask says otherwise."""
    mask = arguments.get("attention_mask")
    if isinstance(mask, dict):
        mask = next(iter(mask.values()), None)
    if not isinstance(mask, torch.Tensor):
        return None
    if mask.ndim == 2:
        return mask[:, mask.shape[1] - length :].bool().to(device)
    # a caller's own 4D mask: a token that may not see itself is padding
    block = mask[:, 0, :, past : past + length]
    diagonal = block.diagonal(dim1=-2, dim2=-1)
    real = diagonal if diagonal.dtype == torch.bool else diagonal == 0
    return real.expand(batch, -1).to(device)
