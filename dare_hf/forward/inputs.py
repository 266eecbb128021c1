"""Reading one forward's arguments into its facts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dare_hf.cache.hop_counters import HopCounters, counters_of
from dare_hf.errors import DareInputError
from dare_hf.forward.delimiters import delimiter_ends
from dare_hf.forward.facts import ForwardContext
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
    state = HopCounters()
    if cache is not None:
        cache.hop_counters = cache.hop_counters or state
        state = counters_of(cache)
    state.ensure(source.shape[0])
    reader = _Reader(arguments, source, past, cache, rules, call, state)
    return reader.decode() if reader.all_sampled else reader.span()


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
        sampled = [self.length] * self.batch
        if valid is not None:
            sampled = valid.sum(1).tolist()
            valid = None if min(sampled) == self.length else valid
        if valid is not None:
            modality = modality.masked_fill(~valid, PAD)
        closing = self._closings(valid)
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
        continues = self.in_prompt and self.call.start < self.past
        injected = self.past > 0 and not continues
        forced = self._forced(modality, span, injected)
        rows = self._host_counts(modality, span, forced, sampled_at)
        counts = [[r[0], r[1]] for r in rows]
        if injected:
            for row in (i for i, c in enumerate(counts) if sum(c)):
                self.state.cut(row, self.past - 1)
        hops = self.state.open_hops()
        closing: list[list[int]] = [[] for _ in rows]
        if any(r[4] for r in rows):
            closing = self._closings(sampled_at if valid is None else sampled_at & valid)
        token_hop = self._token_hops(hops, closing)
        if any(r[4] for r in rows):
            opened = torch.tensor([[h == 0] for h in hops], device=self.device)
            token_hop = token_hop + (sampled_at & opened)
        ends = self.past == 0 or not continues
        if self.call is not None:
            ends = self.past + self.length >= self.call.prompt_length
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
            injected=injected,
        )

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

    def _forced(self, modality: Tensor, span: Tensor, injected: bool) -> Tensor:
        """Bool[B, S]: span tokens that no selection may drop."""
        before = None
        if self.past and not injected and self.cache is not None:
            before = (self.cache.log.modality >= 0).sum(1).to(self.device)
        return forced_of(modality, span, self.ids, self.rules, before)

    @staticmethod
    def _host_counts(
        modality: Tensor, span: Tensor, forced: Tensor, sampled_at: Tensor
    ) -> list[list[int]]:
        """The span forward's one device-to-host copy: six counts per row."""
        kinds = [modality == TEXT, modality == VISION]
        parts = [span & kind for kind in kinds] + [forced & kind for kind in kinds]
        parts += [sampled_at & (modality >= 0), modality < 0]
        return torch.stack([part.sum(1) for part in parts], dim=1).tolist()

    def _closings(self, sampled: Tensor | None) -> list[list[int]]:
        """Per row the logical positions at which sampled tokens of this forward close a hop.

        Args:
            sampled: Bool[B, S] sampled real tokens; None when all new tokens are.
        """
        rules, state = self.rules, self.state
        closing: list[list[int]] = [[] for _ in range(self.batch)]
        if not rules.closes_hops:
            return closing
        ends = torch.zeros(self.ids.shape, dtype=torch.bool, device=self.device)
        if rules.delimiters:
            ids = self.ids if sampled is None else self.ids.masked_fill(~sampled, -1)
            ends = delimiter_ends(ids, state.written(self.past), rules.delimiters)
        able = torch.ones_like(ends) if sampled is None else sampled
        flags = torch.stack([ends & able, able]).tolist() if self._must_look(sampled) else None
        for row in range(self.batch):
            last = state.ends[row][-1] if state.ends[row] else None
            for column in range(self.length):
                if flags is not None and not flags[1][row][column]:
                    continue
                position = self.past + column
                last = position - 1 if last is None else last
                since = position - last - state.injected_between(last, position)
                full = rules.window is not None and since >= rules.window
                if full or (flags is not None and flags[0][row][column]):
                    last = position
                    closing[row].append(last)
        return closing

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
