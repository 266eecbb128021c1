"""What is known about one forward: which token is what, in which hop and phase, and how many."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from dare_hf.hops import HopState, delimiter_ends
from dare_hf.modality import mask_to_modality, resolve_span
from dare_hf.routing.kinds import PAD, TEXT, VISION
from dare_hf.routing.selection import image_borders, isin_ids, last_text_run, last_valid

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from dare_hf.cache import DareCache
    from dare_hf.plan import Plan
    from dare_hf.recorder import Recorder

# How many sampled ids beyond a delimiter's length are remembered, so that a rejected
# speculation (crop) still leaves enough of them.
_ROLLBACK = 64

@dataclass(frozen=True)
class TokenRules:
    """What the configuration says about single tokens; the same for every forward of a model.

    Attributes:
        vision_ids: Sorted ids of vision tokens.
        keep_ids: Ids never pruned (`always_keep_token_ids`), sorted.
        protected_ids: Ids of special text tokens an untrained scorer may not prune, sorted.
        protect_text: Whether the scorer is untrained and text can be pruned at all.
        prefix: Kappa, the first tokens of each hop that are always kept.
        delimiters: Hop delimiters as id sequences.
        window: Close a hop every this many sampled tokens; None never.
    """

    vision_ids: tuple[int, ...]
    keep_ids: tuple[int, ...]
    protected_ids: tuple[int, ...]
    protect_text: bool
    prefix: int
    delimiters: tuple[tuple[int, ...], ...]
    window: int | None

    @property
    def closes_hops(self) -> bool:
        """Whether sampled tokens can close a hop at all."""
        return bool(self.delimiters) or self.window is not None


@dataclass
class GenerationCall:
    """One running `generate`: what tells sampled tokens from the prompt.

    Attributes:
        prompt_length: Logical columns before the first sampled token, carried ones included.
        start: Logical columns the cache held when generate began (a carried chat turn).
        modality_mask: The caller's explicit mask over the prompt, or None.
        continues: Whether the caller can go on with the cache afterwards.
        recorder: Who counts this call; made by its first forward.
    """

    prompt_length: int
    start: int
    modality_mask: Tensor | None = None
    continues: bool = False
    recorder: Recorder | None = None


@dataclass
class ForwardContext:
    """One forward. Tensors are on the model's device; lists are host numbers per row.

    Attributes:
        batch: B rows.
        length: S new columns.
        past: P logical columns before them.
        cache: The cache in use, None for a forward without one.
        modality: Int8[B, S], TEXT, VISION or PAD.
        token_hop: Int16[B, S].
        valid: Bool[B, S], None when no new column is padding.
        span: Bool[B, S] real tokens to be routed as a span; None when there are none.
        forced: Bool[B, S] span tokens that are always kept; None when there is no span.
        span_hop: Hop of each row's span.
        counts: Per row [text, vision] real tokens of the span.
        forced_counts: The same of `forced`.
        sampled: Real sampled tokens per row.
        closing: Per row the logical positions at which a hop closes in this forward.
        span_end: Logical position at which the prompt's hop 0 ends, None while it goes on.
        head_rows: Rows the language-model head computes.
        plans: Per layer the plan it ran with.
        recorder: Who counts the forward, while it is open.
        cached_before: Per layer the real tokens per row its cache held before.
            attention_score: Float[B, S] running score of the attention scorer.
        attention_layer: The layer whose attention gave it last.
        columns: Long[B|1, C] logical position of each key of the layer that runs now.
        capture_layer: The layer that runs now and whose attention is to be read, -1 none.
    """

    batch: int
    length: int
    past: int
    cache: DareCache | None
    modality: Tensor
    token_hop: Tensor
    valid: Tensor | None
    span_hop: list[int]
    counts: list[list[int]]
    forced_counts: list[list[int]]
    sampled: list[int]
    closing: list[list[int]]
    head_rows: int
    span: Tensor | None = None
    forced: Tensor | None = None
    span_end: int | None = None
    plans: dict[int, Plan] = field(default_factory=dict)
    cached_before: dict[int, list[int]] = field(default_factory=dict)
    attention_score: Tensor | None = None
    attention_layer: int = -1
    columns: Tensor | None = None
    capture_layer: int = -1
    recorder: Recorder | None = None
    _local_index: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.modality.device

    @property
    def real_counts(self) -> list[int]:
        """Real new tokens per row."""
        return [sum(c) + s for c, s in zip(self.counts, self.sampled, strict=True)]

    def positions(self) -> Tensor:
        """Long[B, S]: 0-based logical column of each new token, pads included."""
        columns = torch.arange(self.past, self.past + self.length, device=self.device)
        return columns.expand(self.batch, -1)

    def local_index(self) -> Tensor:
        """Long[B, S]: index of each new token among the row's real tokens so far."""
        if self._local_index is None:
            real = torch.ones_like(self.modality, dtype=torch.long)
            if self.valid is not None:
                real = self.valid.long()
            before = torch.zeros((self.batch, 1), dtype=torch.long, device=self.device)
            if self.cache is not None and self.past:
                seen = (self.cache.log.modality >= 0).sum(1, keepdim=True)
                before = seen.to(self.device)
            self._local_index = (before + real.cumsum(1) - 1).clamp(min=0)
        return self._local_index


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
        DareInputError: The modality of a span cannot be told.
    """
    ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
    source = ids if ids is not None else embeds
    past = cache.get_seq_length() if cache is not None else 0
    state = HopState()
    if cache is not None:
        state = cache.hop_state = cache.hop_state or HopState()
    state.ensure(source.shape[0])
    reader = _Reader(arguments, source, past, cache, rules, call, state)
    return reader.decode() if reader.all_sampled else reader.span()


class _Reader:
    """The steps of reading one forward's arguments."""

    def __init__(  # noqa: PLR0913 - one forward's facts, all needed
        self,
        arguments: Mapping[str, Any],
        source: Tensor,
        past: int,
        cache: DareCache | None,
        rules: TokenRules,
        call: GenerationCall | None,
        state: HopState,
    ) -> None:
        self.arguments, self.past, self.cache = arguments, past, cache
        self.rules, self.call, self.state = rules, call, state
        self.ids = arguments.get("input_ids")
        self.batch, self.length = source.shape[:2]
        self.device = source.device
        self.first = self._first_sampled()

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
        closing = self._closings(0, valid)
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
        vision = self._span_vision(sampled_at)
        modality = torch.where(vision, VISION, TEXT).to(torch.int8)
        valid = self._padding()
        if valid is not None:
            modality = modality.masked_fill(~valid, PAD)
        span = (modality >= 0) & ~sampled_at
        continues = self.call is not None and self.call.start < self.past
        injected = self.past > 0 and not continues
        forced = self._forced(modality, span, injected)
        rows = self._host_counts(modality, span, forced, sampled_at)
        counts = [[r[0], r[1]] for r in rows]
        if injected:
            for row in (i for i, c in enumerate(counts) if sum(c)):
                self.state.close(row, self.past - 1)
        hops = self.state.open_hops()
        closing: list[list[int]] = [[] for _ in rows]
        if isinstance(self.first, int) and self.first < self.length:
            closing = self._closings(self.first, None)
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
            span_end=self._span_end() if ends else None,
        )

    def _context(self, **facts: Any) -> ForwardContext:
        keep = self.arguments.get("logits_to_keep", 0)
        head = keep if isinstance(keep, int) else len(keep)
        return ForwardContext(
            batch=self.batch,
            length=self.length,
            past=self.past,
            cache=self.cache,
            head_rows=self.batch * (head or self.length),
            **facts,
        )

    def _first_sampled(self) -> int | Tensor:
        """New column of the first sampled token: one int, or Long[B] where labels tell."""
        if self.call is not None:
            return min(max(self.call.prompt_length - self.past, 0), self.length)
        labels = self.arguments.get("labels")
        if labels is not None and self.past == 0:
            return self.length - ((labels != -100).cumsum(1) > 0).sum(1)
        return self.length if self.past == 0 or self.length > 1 else 0

    def _span_end(self) -> int:
        """Logical position of the last column a span can reach in this forward."""
        if self.call is not None:
            return self.call.prompt_length - 1
        return self.past + self.length - 1

    def _padding(self) -> Tensor | None:
        """Bool[B, S] real tokens, None when no mask says otherwise."""
        mask = self.arguments.get("attention_mask")
        if isinstance(mask, dict):
            mask = next(iter(mask.values()), None)
        if not isinstance(mask, torch.Tensor):
            return None
        if mask.ndim == 2:
            return mask[:, mask.shape[1] - self.length :].bool().to(self.device)
        # a caller's own 4D mask: a token that may not see itself is padding
        block = mask[:, 0, :, self.past : self.past + self.length]
        diagonal = block.diagonal(dim1=-2, dim2=-1)
        real = diagonal if diagonal.dtype == torch.bool else diagonal == 0
        return real.expand(self.batch, -1).to(self.device)

    def _vision_of_ids(self, ids: Tensor) -> Tensor:
        return isin_ids(ids, self.rules.vision_ids)

    def _span_vision(self, sampled_at: Tensor) -> Tensor:
        arguments = self.arguments
        if self.call is not None and self.call.modality_mask is not None:
            vision = self._call_mask(self.call.modality_mask)
        else:
            vision = resolve_span(arguments, self.rules.vision_ids, self.length)
        if self.ids is not None and not (isinstance(self.first, int) and self.first >= self.length):
            vision = torch.where(sampled_at, self._vision_of_ids(self.ids), vision)
        return vision

    def _call_mask(self, mask: Tensor) -> Tensor:
        """The columns of generate's modality mask that this forward brings, Bool[B, S]."""
        offset = self.past if mask.shape[1] == self.call.prompt_length else (
            self.past - self.call.start
        )
        part = mask[:, offset : offset + self.length]
        missing = self.length - part.shape[1]
        part = torch.nn.functional.pad(part, (0, max(missing, 0)))
        return mask_to_modality(part.to(self.device), self.batch, self.length)

    def _forced(self, modality: Tensor, span: Tensor, injected: bool) -> Tensor:
        """Bool[B, S]: span tokens that no selection may drop."""
        rank = span.long().cumsum(1) - 1
        if self.past and not injected and self.cache is not None:
            log = self.cache.log
            rank = rank + (log.modality >= 0).sum(1, keepdim=True).to(self.device)
        forced = span & (rank < self.rules.prefix)
        forced = forced | last_valid(span)
        if self.ids is not None and self.rules.keep_ids:
            forced = forced | (span & isin_ids(self.ids, self.rules.keep_ids))
        if self.rules.protect_text:
            only = torch.where(span, modality, PAD)
            text = last_text_run(only) | image_borders(only)
            if self.ids is not None and self.rules.protected_ids:
                text = text | isin_ids(self.ids, self.rules.protected_ids)
            forced = forced | (span & (modality == TEXT) & text)
        return forced

    @staticmethod
    def _host_counts(
        modality: Tensor, span: Tensor, forced: Tensor, sampled_at: Tensor
    ) -> list[list[int]]:
        """The span forward's one device-to-host copy: six counts per row."""
        kinds = [modality == TEXT, modality == VISION]
        parts = [span & kind for kind in kinds] + [forced & kind for kind in kinds]
        parts += [sampled_at & (modality >= 0), modality < 0]
        return torch.stack([part.sum(1) for part in parts], dim=1).tolist()

    def _closings(self, first: int, valid: Tensor | None) -> list[list[int]]:
        """Per row the logical positions at which sampled tokens of this forward close a hop."""
        rules, state = self.rules, self.state
        closing: list[list[int]] = [[] for _ in range(self.batch)]
        if not rules.closes_hops:
            return closing
        start, ids = self.past + first, self.ids[:, first:]
        found: list[list[bool]] | None = None
        if rules.delimiters:
            ends = delimiter_ends(ids, state.tail, rules.delimiters)
            found = (ends if valid is None else ends & valid).tolist()
        for row in range(self.batch):
            last = state.ends[row][-1] if state.ends[row] else start - 1
            for offset in range(ids.shape[1]):
                full = rules.window is not None and start + offset - last >= rules.window
                if full or (found is not None and found[row][offset]):
                    last = start + offset
                    closing[row].append(last)
        return closing

    def _token_hops(self, hops: list[int], closing: list[list[int]]) -> Tensor:
        """Int16[B, S]: the hop of each new token; a delimiter belongs to the hop it closes."""
        base = torch.tensor(hops, dtype=torch.int16, device=self.device)
        token_hop = base[:, None].expand(-1, self.length)
        if not any(closing) or self.length == 1:
            return token_hop
        token_hop = token_hop.clone()
        for row, ends in enumerate(closing):
            for end in ends:
                token_hop[row, end + 1 - self.past :] += 1
        return token_hop


def close_context(context: ForwardContext, arguments: Mapping[str, Any], rules: TokenRules) -> None:
    """After the layers ran: write the log and close the hops that ended in this forward."""
    cache = context.cache
    if cache is None:
        return
    cache.log.append(context.modality, context.token_hop)
    state: HopState = cache.hop_state
    if context.span_end is not None:
        for row, ends in enumerate(state.ends):
            if not ends:
                state.close(row, context.span_end)
    for row, ends in enumerate(context.closing):
        for end in ends:
            state.close(row, end)
    longest = max((len(s) for s in rules.delimiters), default=1)
    ids = arguments.get("input_ids")
    if longest > 1 and ids is not None and any(context.sampled):
        first = context.length - max(context.sampled)
        state.remember(ids[:, first:], longest + _ROLLBACK)
