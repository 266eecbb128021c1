"""Watching a plain forward: what enters each layer, and what later queries attend to there."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from dare_hf.architectures.locate import attention_of
from dare_hf.architectures.tensor_parallel import head_mean, shared_heads
from dare_hf.engine.attention_functions import watch
from dare_hf.engine.undo import UndoRecord
from dare_hf.routing.kinds import TEXT, VISION
from dare_hf.routing.scores import HeadMean, attention_scores, local_mean
from dare_hf.scoring.attention import visible_keys
from dare_hf.scoring.observe import AttentionCall

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from dare_hf.architectures.locate import Anatomy

# Queries that are scored together; keys of their own window are left out.
_WINDOW = 32


@dataclass(frozen=True)
class Tokens:
    """What the columns of one forward are.

    Attributes:
        modality: Int[B, S], 0 text, 1 vision, -1 pad.
        later: Bool[B, S], the queries whose attention tells what will be needed: the continuation.
        prompt_weight: Share of the importance that comes from the text of the prompt instead.
    """

    modality: Tensor
    later: Tensor
    prompt_weight: float

    def query_groups(self) -> list[tuple[Tensor, float]]:
        """Bool[B, S] queries and their weight: the continuation, and the prompt's text."""
        groups = [(self.later, 1.0 - self.prompt_weight)]
        if self.prompt_weight:
            groups.append(((self.modality == TEXT) & ~self.later, self.prompt_weight))
        return groups


@dataclass
class Seen:
    """What was observed of one layer in one forward; empty before it.

    Attributes:
        hidden: [B, S, D] states that entered it.
        output: [B, S, D] what it made of them; the next layer's `hidden` mostly, not a copy.
        importance: Float32[B, S], attention of later queries times value norm; mean about 1.
        known: Bool[B, S], tokens that some later query could see.
        vision_share: Share of its attention that text of the continuation puts on vision.
    """

    hidden: Tensor = field(default_factory=lambda: torch.empty(0))
    output: Tensor = field(default_factory=lambda: torch.empty(0))
    importance: Tensor = field(default_factory=lambda: torch.empty(0))
    known: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    vision_share: float = 0.0


@dataclass
class _Watcher:
    """Sits where the attention function looks for DARE; changes nothing."""

    tokens: Tokens
    mean: HeadMean = local_mean
    seen: Seen = field(default_factory=Seen)
    watching: bool = True

    def tensors(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return query, key, value

    def before_attention(self, tensors: tuple[Tensor, ...], call: AttentionCall) -> Any:
        return call.mask

    def after_attention(self, tensors: tuple[Tensor, Tensor, Tensor], call: AttentionCall) -> None:
        with torch.no_grad():
            parts = [
                (_importance(tensors, call, queries, self.tokens.modality), weight)
                for queries, weight in self.tokens.query_groups()
            ]
            self.seen.known = parts[0][0][1]
            self.seen.importance = torch.stack([p[0] * w for p, w in parts]).sum(0)
            self.seen.vision_share = self._vision_share(tensors, call)

    def _vision_share(self, tensors: tuple[Tensor, Tensor, Tensor], call: AttentionCall) -> float:
        query, key, value = tensors
        modality = self.tokens.modality
        text = self.tokens.later & (modality == TEXT)
        mass, _ = _importance((query, key, torch.ones_like(value[..., :1])), call, text, modality)
        vision = (modality == VISION).to(mass.device)
        return float((mass * vision).sum() / mass.sum().clamp(min=1e-12))


def _importance(
    tensors: tuple[Tensor, Tensor, Tensor], call: AttentionCall, queries: Tensor, modality: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean score of each key over the windows of queries that come after it.

    Args:
        tensors: query [B, H, S, d], key and value [B, Hkv, S, d].
        call: How attention was called.
        queries: Bool[B, S], which queries count.
        modality: Int[B, S], -1 for pads.

    Returns:
        Float32[B, S] and Bool[B, S], the keys that were judged at all.
    """
    query, key, value = tensors
    queries, real = queries.to(query.device), (modality >= 0).to(query.device)
    batch, length = queries.shape
    columns = torch.arange(length, device=query.device)[None].expand(batch, -1)
    keys = columns.masked_fill(~real, -1)
    total = torch.zeros(batch, length, device=query.device)
    windows = torch.zeros_like(total)
    wanted = queries.any(0).nonzero()[:, 0].tolist()
    for first in range(wanted[0] if wanted else length, length, _WINDOW):
        last = min(first + _WINDOW, length)
        valid = queries[:, first:last]
        index = columns[:, first:last]
        visible = visible_keys(call, index, keys, length)
        before = real & (columns < first) & (visible & valid[:, None, :, None]).any(2).any(1)
        taken = query[:, :, first:last]
        shown = (visible, valid, before)
        score = attention_scores(taken, key, value, *shown, *call.softmax)
        # the mean over the span is 1, whatever share of its attention the window spent on itself
        total += score * before
        windows += before
    return total / windows.clamp(min=1), windows > 0


@contextmanager
def watching(anatomy: Anatomy, tokens: Tokens) -> Iterator[list[Seen]]:
    """Observe the forwards inside the block; the model is left as it was.

    Args:
        anatomy: The parts of a model without DARE, or with DARE disabled.
        tokens: What the columns of the forward are.

    Yields:
        One Seen per layer, filled by the forward.
    """
    model = anatomy.hooked[0]
    means = [head_mean(shared_heads(attention_of(layer), model)) for layer in anatomy.layers]
    undo, watchers = UndoRecord(), [_Watcher(tokens, mean) for mean in means]
    try:
        name = anatomy.text_config._attn_implementation
        for layer, watcher in zip(anatomy.layers, watchers, strict=True):
            watch(attention_of(layer), name, undo)
            undo.set(attention_of(layer), "_dare", watcher)
            undo.hook(layer.register_forward_pre_hook(_keep_input(watcher), with_kwargs=True))
            undo.hook(layer.register_forward_hook(_keep_output(watcher)))
        yield [watcher.seen for watcher in watchers]
    finally:
        undo.undo()


def _keep_input(watcher: _Watcher) -> Any:
    def keep(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        watcher.seen.hidden = args[0] if args else kwargs["hidden_states"]

    return keep


def _keep_output(watcher: _Watcher) -> Any:
    def keep(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        watcher.seen.output = output[0] if isinstance(output, tuple) else output

    return keep
