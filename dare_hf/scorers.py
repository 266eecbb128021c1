"""Who scores tokens: the built-in scorers, and the registry of the user's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from dare_hf.adapters import attention_of
from dare_hf.errors import DareConfigError, DareInputError, DareStateError
from dare_hf.routers.holder import holder_of
from dare_hf.routing.retention import UNSCORED_LAYERS
from dare_hf.routing.scores import (
    HeadMean,
    key_norm_scores,
    local_mean,
    position_scores,
    random_scores,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from dare_hf.config import DareConfig
    from dare_hf.context import ForwardContext

    ScoreFunction = Callable[..., Tensor]

_REGISTERED: dict[str, ScoreFunction] = {}
BUILT_IN = ("attention", "random", "key_norm", "position", "router")


class Scorer(Protocol):
    """Scores the new tokens of a forward before a layer runs.

    Text that structures the prompt is protected from an `untrained` one; one that
    `needs_attention` reads the previous layer's.
    """

    @property
    def untrained(self) -> bool:
        """Whether nothing was learned."""

    @property
    def needs_attention(self) -> bool:
        """Whether it reads the layer before."""

    def scores(
        self, context: ForwardContext, layer: nn.Module, index: int, hidden: Tensor
    ) -> Tensor:
        """Float32[B, S] for hidden states [B, S, D] that enter layer `index`."""


def register_scorer(name: str, fn: ScoreFunction) -> None:
    """Make `fn` available as `DareConfig(scorer=name)`.

    Args:
        name: A new name; a name registered before is replaced, a built-in one is refused.
        fn: `fn(hidden [B, S, D], modality [B, S] (0 text, 1 vision, -1 pad), *, layer: int,
            hop [B, S], positions [B, S]) -> scores [B, S] in [0, 1]`, higher is kept first.
            positions are 0-based columns of the full sequence, pads included.

    Raises:
        DareConfigError: The name belongs to a built-in scorer, or fn is not callable.
    """
    if name in BUILT_IN or not isinstance(name, str) or not name:
        raise DareConfigError(
            f"register_scorer: expected a new name, none of {', '.join(BUILT_IN)}; got {name!r}"
        )
    if not callable(fn):
        raise DareConfigError(f"register_scorer: expected a function; got {type(fn).__name__}")
    _REGISTERED[name] = fn


def make_scorer(config: DareConfig, key_path: tuple[str | None, str]) -> Scorer:
    """The scorer a configuration names.

    Args:
        config: The configuration.
        key_path: The architecture's pre-attention norm and key projection.

    Raises:
        DareConfigError: The name is unknown.
    """
    name = config.scorer
    if name == "attention":
        return AttentionScorer(key_path)
    if name == "random":
        return RandomScorer(config.seed)
    if name == "key_norm":
        return KeyNormScorer(key_path)
    if name == "position":
        return PositionScorer()
    if name in _REGISTERED:
        return FunctionScorer(name, _REGISTERED[name])
    if name == "router":
        return RouterScorer()
    known = ", ".join((*BUILT_IN, *sorted(_REGISTERED)))
    raise DareConfigError(f"scorer: expected one of {known}; got {name!r}")


@dataclass(frozen=True)
class FunctionScorer:
    """A scorer the user registered; its function reads what `register_scorer` says."""

    name: str
    fn: ScoreFunction
    untrained: bool = False
    needs_attention: bool = False

    def scores(
        self, context: ForwardContext, layer: nn.Module, index: int, hidden: Tensor
    ) -> Tensor:
        """Float32[B, S], checked for shape.

        Raises:
            DareInputError: The function returned something else.
        """
        scores = self.fn(
            hidden,
            context.modality,
            layer=index,
            hop=context.token_hop.long(),
            positions=context.positions(),
        )
        if not isinstance(scores, torch.Tensor) or scores.shape != hidden.shape[:2]:
            got = list(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
            raise DareInputError(
                f"scorer {self.name!r}: expected scores of shape {list(hidden.shape[:2])} "
                f"[batch, tokens]; got {got}"
            )
        return scores.float()


@dataclass(frozen=True)
class RandomScorer:
    """A hash of seed, layer and the token's index in its row: a baseline."""

    seed: int
    untrained: bool = True
    needs_attention: bool = False

    def scores(
        self, context: ForwardContext, layer: nn.Module, index: int, hidden: Tensor
    ) -> Tensor:
        """Float32[B, S] in [0, 1)."""
        return random_scores(self.seed, index, context.local_index())


@dataclass(frozen=True)
class PositionScorer:
    """Earlier tokens first: a baseline."""

    untrained: bool = True
    needs_attention: bool = False

    def scores(
        self, context: ForwardContext, layer: nn.Module, index: int, hidden: Tensor
    ) -> Tensor:
        """Float32[B, S] in (0, 1]."""
        return position_scores(context.local_index())


@dataclass(frozen=True)
class KeyNormScorer:
    """Small keys first (as kvpress' Knorm does): a baseline."""

    key_path: tuple[str | None, str]
    untrained: bool = True
    needs_attention: bool = False

    def scores(
        self, context: ForwardContext, layer: nn.Module, index: int, hidden: Tensor
    ) -> Tensor:
        """Float32[B, S] from the layer's own key projection, before RoPE."""
        norm, projection = self.key_path
        normed = layer.get_submodule(norm)(hidden) if norm else hidden
        attention: Any = attention_of(layer)
        mean = _head_mean(attention)
        if hasattr(attention, "expand_kv"):
            return key_norm_scores(_latent_keys(attention, normed), mean)
        if hasattr(attention, "query_key_value"):  # one matrix for all three
            _, keys, _ = attention._split_heads(attention.query_key_value(normed))
            return key_norm_scores(keys.transpose(1, 2), mean)
        keys = layer.get_submodule(projection)(normed)
        heads = keys.shape[-1] // _head_dim(layer)
        return key_norm_scores(keys.unflatten(-1, (heads, -1)).transpose(1, 2), mean)


def _head_mean(attention: Any) -> HeadMean:
    """The mean over all heads, as DARE's state on the attention knows it."""
    return getattr(vars(attention).get("_dare"), "mean", local_mean)


def _latent_keys(attention: Any, normed: Tensor) -> Tensor:
    """[B, H, S, d] keys of multi-head latent attention, not yet rotated: norms are the same."""
    widths = [attention.kv_lora_rank, attention.qk_rope_head_dim]
    latent, turned = attention.kv_a_proj_with_mqa(normed).split(widths, dim=-1)
    latent = attention.kv_a_layernorm(latent)
    return attention.expand_kv(latent[:, None], turned[:, None])[0]


@dataclass(frozen=True)
class AttentionScorer:
    """What the previous layer's last text queries attended to (method page, "Scores")."""

    key_path: tuple[str | None, str]
    untrained: bool = True
    needs_attention: bool = True

    def scores(
        self, context: ForwardContext, layer: nn.Module, index: int, hidden: Tensor
    ) -> Tensor:
        """Float32[B, S]; layers 0 and 1 have no such score and take key_norm.

        Raises:
            DareStateError: The attention of the layer before was not seen.
        """
        if context.span is None:  # no attention score for sampled tokens: the hop's end gives one
            return torch.zeros(hidden.shape[:2], device=hidden.device)
        if index < UNSCORED_LAYERS:
            return KeyNormScorer(self.key_path).scores(context, layer, index, hidden)
        if context.attention_score is None or context.attention_layer != index - 1:
            raise DareStateError(
                "expected the attention implementation DARE set when it was applied; it was "
                "changed since (set_attn_implementation?). Call remove_dare(model), set the "
                "attention implementation, then apply_dare(model) again"
            )
        return context.attention_score


@dataclass(frozen=True)
class RouterScorer:
    """The active adapter's routers (method page, "Scores"); without gradients."""

    untrained: bool = False
    needs_attention: bool = False

    def scores(
        self, context: ForwardContext, layer: nn.Module, index: int, hidden: Tensor
    ) -> Tensor:
        """Float32[B, S] in (0, 1), 0 for pads.

        Raises:
            DareStateError: The layer has no router.
        """
        holder = holder_of(layer)
        router = None if holder is None else holder.active_router
        if router is None:
            raise DareStateError(
                f"expected a router on layer {index}; its child module was taken off or replaced. "
                "Unload the adapter and load it again"
            )
        with torch.no_grad():
            return router(hidden, context.modality.to(hidden.device)).float()


def _head_dim(layer: Any) -> int:
    attention: Any = attention_of(layer)
    head_dim = getattr(attention, "head_dim", None)
    return head_dim or attention.config.hidden_size // attention.config.num_attention_heads
