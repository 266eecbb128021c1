"""What the span's last token attends to in the very layer that selects: PyramidDrop's score."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dare_hf.architectures.locate import attention_of
from dare_hf.errors import DareInputError, UnsupportedModelError
from dare_hf.routing.scores import attention_scores
from dare_hf.routing.selection import last_columns, last_valid

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dare_hf.forward.facts import ForwardContext

_ROTARY = "apply_rotary_pos_emb"


@dataclass(frozen=True)
class OwnAttentionScorer:
    """Probabilities of the span's last token over all that is left, mean over heads.

    Queries and keys are made by the layer's own norm, projections and rotary embedding.
    """

    key_path: tuple[str | None, str]
    untrained: bool = True
    yields_text: bool = True
    needs_attention: bool = False
    reads_inputs: bool = False

    def scores(
        self, context: ForwardContext, layer: nn.Module, index: int, hidden: Tensor
    ) -> Tensor:
        """Float32[B, S].

        Raises:
            DareInputError: A forward over a whole sequence with its hops (training).
            UnsupportedModelError: The attention is not made of those parts alone.
        """
        if context.span is None:
            return torch.zeros(hidden.shape[:2], device=hidden.device)
        if context.simulation is not None:
            raise DareInputError(
                "scorer: expected another one than 'own_attention' for a forward over a sequence "
                "with its hops (labels, hop_ids). Run it inside `with dare_disabled(model)`"
            )
        attention: Any = attention_of(layer)
        _check(attention, context, self.key_path[1])
        norm = self.key_path[0]
        normed = layer.get_submodule(norm)(hidden) if norm else hidden
        last, there = last_columns(last_valid(context.span), 1)
        columns = torch.arange(hidden.shape[1], device=hidden.device)[None]
        key = _rotated(attention, "k", normed, columns, context)
        query = _rotated(attention, "q", normed, last, context)
        left = _left(context, index)
        seen = left[:, None] & (columns <= last[:, :, None])
        span = context.span & left
        slot: Any = None if context.cache is None else context.cache.layer(index)
        if slot is not None and slot.rows:
            key = torch.cat([slot.keys, key], dim=2)
            stored = slot.positions().expand(hidden.shape[0], -1) >= 0
            seen = torch.cat([stored[:, None], seen], dim=2)
            span = torch.cat([torch.zeros_like(stored), span], dim=1)
        weights = torch.ones_like(key[..., :1])  # a norm of 1: probabilities alone
        scale = attention.scaling
        scores = attention_scores(query, key, weights, seen[:, None], there, span, scale)
        return scores[:, -hidden.shape[1] :]


def _check(attention: Any, context: ForwardContext, projection: str) -> None:
    """Refuse what makes its attention otherwise.

    Raises:
        UnsupportedModelError: It does.
    """
    module = sys.modules[type(attention).__module__]
    parts = projection == "self_attn.k_proj" and hasattr(attention, "q_proj")
    own = getattr(attention, "sliding_window", None), getattr(attention, "sinks", None)
    capped = getattr(attention, "attn_logit_softcapping", None)
    rotary = hasattr(module, _ROTARY) and context.rotary is not None
    plain = parts and rotary and not any(part is not None for part in (*own, capped))
    if not plain or getattr(attention, "is_causal", True) is not True:
        raise UnsupportedModelError(
            "scorer 'own_attention': expected an attention of q_proj, k_proj, a rotary embedding "
            f"and a causal softmax over all tokens; got {type(attention).__name__}. Choose another "
            "policy, or 'fastv', which reads the attention of the layer before"
        )


def _rotated(
    attention: Any, kind: str, normed: Tensor, columns: Tensor, context: ForwardContext
) -> Tensor:
    """[B, H, K, d]: queries ("q") or keys ("k") of the tokens [B, S, D] at `columns` [B|1, K]."""
    rows = torch.arange(normed.shape[0], device=normed.device)[:, None]
    made = getattr(attention, f"{kind}_proj")(normed[rows, columns])
    made = made.unflatten(-1, (-1, attention.head_dim))
    own = getattr(attention, f"{kind}_norm", None)
    made = (made if own is None else own(made)).transpose(1, 2)
    rotate = getattr(sys.modules[type(attention).__module__], _ROTARY)
    assert context.rotary is not None  # `_check`
    angles = [part.expand(normed.shape[0], -1, -1)[rows, columns] for part in context.rotary]
    return rotate(made, made, *angles)[0]


def _left(context: ForwardContext, index: int) -> Tensor:
    """Bool[B, S]: tokens that the layers before have not dropped."""
    before = context.plans.get(index - 1)
    return context.modality >= 0 if before is None or before.keep is None else before.keep
