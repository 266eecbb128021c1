"""What the span's last token attends to in the very layer that selects: PyramidDrop's score."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from dare_hf.architectures.locate import attention_of
from dare_hf.errors import UnsupportedModelError
from dare_hf.routing.scores import attention_scores
from dare_hf.routing.selection import last_columns, last_valid
from dare_hf.scoring.scorer import Scorer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dare_hf.forward.run import Run
    from dare_hf.scoring.scorer import Scoring

_ROTARY = "apply_rotary_pos_emb"


@dataclass(frozen=True)
class OwnAttentionScorer(Scorer):
    """Probabilities of the span's last token over all that is left, mean over heads.

    Queries and keys are made by the layer's own norm, projections and rotary embedding.
    """

    key_path: tuple[str | None, str]
    stepwise: ClassVar[bool] = True

    def scores(self, run: Run, layer: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """Float32[B, S].

        Raises:
            UnsupportedModelError: The attention is not made of those parts alone.
        """
        context = run.context
        if context.span is None:
            return torch.zeros(hidden.shape[:2], device=hidden.device)
        attention: Any = attention_of(layer)
        _check(attention, run, self.key_path[1])
        norm = self.key_path[0]
        normed = layer.get_submodule(norm)(hidden) if norm else hidden
        last, there = last_columns(last_valid(context.span), 1)
        columns = torch.arange(hidden.shape[1], device=hidden.device)[None]
        key = _rotated(attention, "k", normed, columns, run)
        query = _rotated(attention, "q", normed, last, run)
        left = _left(run, index)
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

    def flops(self, work: Scoring) -> int:
        """Keys of all tokens, one query a row, and its attention."""
        shape, rows = work.shapes[work.layer], len(work.span)
        made = work.hidden * (shape.kv_heads * work.tokens + shape.q_heads * rows)
        return 2 * shape.qk_dim * (made + shape.q_heads * work.tokens)


def _check(attention: Any, run: Run, projection: str) -> None:
    """Refuse what makes its attention otherwise.

    Raises:
        UnsupportedModelError: It does.
    """
    module = sys.modules[type(attention).__module__]
    parts = projection == "self_attn.k_proj" and hasattr(attention, "q_proj")
    own = getattr(attention, "sliding_window", None), getattr(attention, "sinks", None)
    capped = getattr(attention, "attn_logit_softcapping", None)
    rotary = hasattr(module, _ROTARY) and run.rotary is not None
    plain = parts and rotary and not any(part is not None for part in (*own, capped))
    if not plain or getattr(attention, "is_causal", True) is not True:
        raise UnsupportedModelError(
            "scorer 'own_attention': expected an attention of q_proj, k_proj, a rotary embedding "
            f"and a causal softmax over all tokens; got {type(attention).__name__}. Choose another "
            "policy, or 'fastv', which reads the attention of the layer before"
        )


def _rotated(attention: Any, kind: str, normed: Tensor, columns: Tensor, run: Run) -> Tensor:
    """[B, H, K, d]: queries ("q") or keys ("k") of the tokens [B, S, D] at `columns` [B|1, K]."""
    rows = torch.arange(normed.shape[0], device=normed.device)[:, None]
    made = getattr(attention, f"{kind}_proj")(normed[rows, columns])
    made = made.unflatten(-1, (-1, attention.head_dim))
    own = getattr(attention, f"{kind}_norm", None)
    made = (made if own is None else own(made)).transpose(1, 2)
    rotate = getattr(sys.modules[type(attention).__module__], _ROTARY)
    assert run.rotary is not None  # `_check`
    angles = [part.expand(normed.shape[0], -1, -1)[rows, columns] for part in run.rotary]
    return rotate(made, made, *angles)[0]


def _left(run: Run, index: int) -> Tensor:
    """Bool[B, S]: tokens that the layers before have not dropped."""
    before = run.plans.get(index - 1)
    return run.context.modality >= 0 if before is None or before.keep is None else before.keep
