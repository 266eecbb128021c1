"""The masked oracle: what routing means, run at full size with masks on an unpatched model.

The definition it executes: at layer ``l`` every column of a pruned token is blocked for all
queries, and the update of every pruned row is discarded. Nothing is gathered and no cache is used,
so it shares no code with the compact execution it is held against.

Source: docs/method.md, section 4.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dare_hf.architectures.locate import attention_of, locate
from dare_hf.routing import reference
from dare_hf.testing.models import CHAMELEON_TEXT_IDS, IMAGE_ID

TEXT, VISION, PAD = 0, 1, -1

Scorer = Callable[..., Tensor]
"""A scorer as :func:`dare_hf.register_scorer` takes it."""

Choose = Callable[[int, Tensor], Tensor]
"""From a layer's index and the hidden states that enter it to the tokens it keeps, Bool[B, S]."""


@dataclass(frozen=True)
class OracleRouting:
    """What the oracle needs to know of a config, already worked out.

    Attributes:
        rates: Retention of each layer as ``(vision, text)``.
        plan_layers: The layer whose selection each layer uses (default: its own).
        sources: The layer whose keys each layer reads, and that it follows in everything
            (default: its own).
        prefix_tokens: Tokens at the head of the prompt that are always kept (kappa).
        always_keep: Token ids that are always kept.
        pruned: ``"bypass"``, ``"drop"`` or ``"freeze"``.
        batch_budget: ``"row"`` or ``"equal"``.
        recent_tokens: The last text tokens of a span that are kept, beside image delimiters and
            `special_ids`; None where text is not protected.
        special_ids: Ids of special text tokens.
        recent_share: Share of a text budget that goes to the newest text.
        thresholds: Per layer Float[2], text and vision: a sampled token of a lower score skips it,
            but for the first ones of its hop (`prefix_tokens`, at least 1) and those always kept;
            no token skips the last layer.
        mean_update: Per layer Float[2, D], what a text and a vision token add that do not run it.
    """

    rates: Sequence[tuple[float, float]]
    plan_layers: Sequence[int] | None = None
    sources: Sequence[int] | None = None
    prefix_tokens: int = 2
    always_keep: tuple[int, ...] = ()
    pruned: str = "bypass"
    batch_budget: str = "row"
    recent_tokens: int | None = None
    special_ids: tuple[int, ...] = ()
    recent_share: float = 0.0
    mean_update: Sequence[Tensor] | None = None
    thresholds: Sequence[Tensor] | None = None


class OracleRun(NamedTuple):
    """Logits [B, S, V] and, per layer, the tokens it kept, Bool[B, S]."""

    logits: Tensor
    keep: list[Tensor]


def decoder_layers(model: PreTrainedModel) -> Sequence[nn.Module]:
    """Return the decoder layers of a tiny model that can be routed."""
    return locate(model).layers


def modality_of(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the modality of each token of tiny inputs: 0 text, 1 vision, -1 pad.

    Type ids decide where there are any, as the processor knows best; else the ids.
    """
    ids = inputs["input_ids"]
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            vision = inputs[name] > 0
            break
    else:
        vision = ids == IMAGE_ID
        if model.config.model_type == "chameleon":
            vision = vision | (ids >= CHAMELEON_TEXT_IDS)
    modality = torch.where(vision, VISION, TEXT)
    return modality.masked_fill(inputs["attention_mask"] == 0, PAD)


def _blocked(mask: Tensor | None, visible: Tensor, causal: bool) -> Tensor:
    """Take from an attention mask [B, 1, S, S] (bool or additive) what is not ``visible``."""
    size = visible.shape[-1]
    if mask is None:
        mask = torch.ones(size, size, dtype=torch.bool, device=visible.device)
        mask = (mask.tril() if causal else mask)[None, None]
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        raise TypeError(f"the oracle needs a 4D mask or None (sdpa, eager), got {type(mask)}")
    # A pruned query is discarded, but it must see something or its softmax is NaN.
    visible = visible | torch.eye(size, dtype=torch.bool, device=visible.device)
    if mask.dtype == torch.bool:
        return mask & visible[:, None]
    return mask.masked_fill(~visible[:, None], torch.finfo(mask.dtype).min)


@contextmanager
def masked_layers(
    model: PreTrainedModel,
    choose: Choose,
    visible: Sequence[Tensor] | None = None,
    added: Sequence[Tensor] | None = None,
    *,
    frozen: bool = False,
) -> Iterator[list[Tensor]]:
    """Run forwards in this context as if each layer executed only the tokens it keeps.

    Args:
        model: An unpatched model; hooks are put on its decoder layers and taken off again.
        choose: Which tokens a layer keeps.
        visible: Per layer, Bool[B, S, S]: keys each query may see at all (the matrix E).
        added: Per layer, [B, S, D]: what is added to a token that does not run it.
        frozen: Whether tokens that do not run are seen all the same.

    Yields:
        The kept tokens of each layer, filled as the forward goes.
    """
    kept: list[Tensor] = []
    scored = locate(model).scored

    def before(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        index = len(kept)
        keep = choose(index, scored(args[0]))
        kept.append(keep)
        seen = torch.ones_like(keep) if frozen else keep
        columns = seen[:, None, :].expand(-1, keep.shape[1], -1)
        if visible is not None:
            columns = columns & visible[index]
        causal = getattr(attention_of(layer), "is_causal", True)
        names = list(inspect.signature(type(layer).forward).parameters)[2:]
        kwargs = {**kwargs, **dict(zip(names, args[1:], strict=False))}
        mask = _blocked(kwargs.get("attention_mask"), columns, causal)
        return args[:1], {**kwargs, "attention_mask": mask}

    def after(layer: nn.Module, args: tuple, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        passed = args[0] if added is None else args[0] + added[len(kept) - 1].to(hidden.dtype)
        hidden = torch.where(kept[-1][..., None], hidden, passed)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    with ExitStack() as stack:
        for layer in decoder_layers(model):
            stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(after).remove)
        yield kept


@torch.no_grad()
def masked_forward(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    keep: Sequence[Tensor],
    visible: Sequence[Tensor] | None = None,
) -> Tensor:
    """Return the full-size logits [B, S, V] with the given tokens kept at each layer.

    Args:
        model: An unpatched model.
        inputs: Keyword arguments of its forward.
        keep: Per layer, Bool[B, S].
        visible: Per layer, Bool[B, S, S]; see :func:`masked_layers`.
    """
    with masked_layers(model, lambda layer, hidden: keep[layer], visible):
        return model(**inputs, use_cache=False).logits


@dataclass
class _Chooser:
    """Selects layer by layer from the hidden states the masked forward itself produces."""

    scorer: Scorer
    routing: OracleRouting
    modality: Tensor
    ids: Tensor
    span: int
    keeps: list[Tensor] = field(default_factory=list)

    def __call__(self, layer: int, hidden: Tensor) -> Tensor:
        plan = self._plan(layer)
        keep = self.keeps[plan] if plan < layer else self._select(layer, hidden)
        self.keeps.append(keep)
        return keep

    def _plan(self, layer: int) -> int:
        """The layer whose selection a layer uses."""
        sources, plans = self.routing.sources, self.routing.plan_layers
        source = layer if sources is None else sources[layer]
        if source != layer:
            return source
        return layer if plans is None else plans[layer]

    def _select(self, layer: int, hidden: Tensor) -> Tensor:
        modality = self.modality[:, : self.span]
        positions = torch.arange(self.span).expand_as(modality)
        scores = self.scorer(
            hidden[:, : self.span],
            modality,
            layer=layer,
            hop=torch.zeros_like(positions),
            positions=positions,
        )
        candidates = modality != PAD
        if self.routing.pruned == "drop" and self.keeps:
            candidates = candidates & self.keeps[-1][:, : self.span]
        keep = self._sampled(layer, hidden)
        forced, budgets = self._forced(), self._budgets(layer)
        newest = reference.newest_text(
            modality, candidates, forced, budgets[:, TEXT], self.routing.recent_share
        )
        keep[:, : self.span] = reference.keep_mask(
            scores.float(), modality, candidates, forced, budgets, first=newest
        )
        return keep

    def _sampled(self, layer: int, hidden: Tensor) -> Tensor:
        """Bool[B, S]: real tokens, without the sampled ones that skip the layer."""
        keep = self.modality != PAD
        if self.routing.thresholds is None or layer == len(self.routing.thresholds) - 1:
            return keep
        columns = torch.arange(hidden.shape[1]).expand_as(self.modality)
        sampled = columns >= self.span
        scores = self.scorer(
            hidden, self.modality, layer=layer, hop=sampled.long(), positions=columns
        )
        for row in range(len(keep)):
            written = [c for c in range(self.span, keep.shape[1]) if keep[row, c]]
            for column in written[max(self.routing.prefix_tokens, 1) :]:
                kind = int(self.modality[row, column])
                low = bool(scores[row, column] < self.routing.thresholds[layer][kind])
                kept = int(self.ids[row, column]) in self.routing.always_keep
                keep[row, column] = kept or not low
        return keep

    def _forced(self) -> Tensor:
        modality = self.modality[:, : self.span]
        forced = torch.zeros_like(modality, dtype=torch.bool)
        for row in range(len(modality)):
            real = [column for column in range(self.span) if modality[row, column] != PAD]
            for column in real[: self.routing.prefix_tokens] + real[-1:]:
                forced[row, column] = True
            for column in real:
                if int(self.ids[row, column]) in self.routing.always_keep:
                    forced[row, column] = True
        recent = self.routing.recent_tokens
        return forced if recent is None else forced | self._protected(modality, recent)

    def _protected(self, modality: Tensor, recent: int) -> Tensor:
        """Bool[B, S]: image delimiters, special tokens and the last text."""
        protected = reference.image_borders(modality)
        for row, kinds in enumerate(modality.tolist()):
            text = [column for column, kind in enumerate(kinds) if kind == TEXT]
            special = [c for c in text if int(self.ids[row, c]) in self.routing.special_ids]
            protected[row, [*special, *text[max(len(text) - recent, 0) :]]] = True
        return protected

    def _budgets(self, layer: int) -> Tensor:
        modality, (vision, text) = self.modality[:, : self.span], self.routing.rates[layer]
        counts = [[int((row == m).sum()) for m in (TEXT, VISION)] for row in modality]
        wanted = [
            [reference.budget(rate, n) for rate, n in zip((text, vision), row, strict=True)]
            for row in counts
        ]
        if self.routing.batch_budget == "equal":
            wanted = _equal(wanted, counts)
        return torch.tensor(wanted)


def _equal(wanted: list[list[int]], counts: list[list[int]]) -> list[list[int]]:
    """Raise every row to the batch's largest budgets, then to its largest total, one by one."""
    most = [max(row[kind] for row in wanted) for kind in (TEXT, VISION)]
    raised = [[min(most[kind], row[kind]) for kind in (TEXT, VISION)] for row in counts]
    total = max(map(sum, raised))
    for row, limit in zip(raised, counts, strict=True):
        for kind in (VISION, TEXT):
            while sum(row) < total and row[kind] < limit[kind]:
                row[kind] += 1
    return raised


@torch.no_grad()
def oracle_forward(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    scorer: Scorer,
    routing: OracleRouting,
    *,
    span: int | None = None,
    modality: Tensor | None = None,
) -> OracleRun:
    """Run the oracle, selecting each layer's tokens from its own hidden states.

    Args:
        model: An unpatched model.
        inputs: Keyword arguments of its forward, without a cache. Columns after the span are
            sampled tokens, which every layer keeps: one such forward stands for all the steps of a
            generate that was fed the same tokens.
        scorer: The scorer that is asked at every selecting layer.
        routing: Rates and rules of the selection.
        span: Columns of the prompt (default: all).
        modality: [B, S], 0 text, 1 vision, -1 pad (default: what tiny inputs tell).
    """
    ids = inputs["input_ids"]
    modality = modality_of(model, inputs) if modality is None else modality
    chooser = _Chooser(scorer, routing, modality, ids, span or ids.shape[1])
    added = None
    if routing.mean_update is not None:
        kinds = [(modality == kind)[..., None].float() for kind in (TEXT, VISION)]
        added = [sum(k * v for k, v in zip(kinds, two, strict=True)) for two in routing.mean_update]
    frozen = routing.pruned == "freeze"
    with masked_layers(model, chooser, added=added, frozen=frozen) as keep:
        logits = model(**inputs, use_cache=False).logits
    return OracleRun(logits, keep)


def written_inputs(
    model: PreTrainedModel, inputs: Mapping[str, Any], sequences: Tensor
) -> dict[str, Any]:
    """Return inputs of one forward over a prompt and what generate wrote after it.

    The position ids are those generate counts, in which pads have no place.

    Args:
        model: An unpatched model.
        inputs: What generate was given.
        sequences: Prompt and written tokens, [B, N].
    """
    new = sequences.shape[1] - inputs["input_ids"].shape[1]
    written = {**inputs, "input_ids": sequences}
    for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
        if name in inputs:
            written[name] = nn.functional.pad(inputs[name], (0, new), value=value)
    given = {name: value for name, value in written.items() if name != "input_ids"}
    written["position_ids"] = model._prepare_position_ids_for_generation(
        sequences, {**given, "input_ids": sequences}
    )
    return written
