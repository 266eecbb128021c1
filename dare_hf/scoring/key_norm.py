"""Small keys first, by the layer's own key projection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dare_hf.architectures.locate import attention_of
from dare_hf.report.flops import key_norm_scorer_flops
from dare_hf.routing.scores import key_norm_scores, local_mean
from dare_hf.scoring.scorer import Scorer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dare_hf.forward.run import Run
    from dare_hf.routing.scores import HeadMean
    from dare_hf.scoring.scorer import Scoring


@dataclass(frozen=True)
class KeyNormScorer(Scorer):
    """Small keys first (as kvpress' Knorm does): a baseline."""

    key_path: tuple[str | None, str]

    def scores(self, run: Run, layer: nn.Module, index: int, hidden: Tensor) -> Tensor:
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
        width = _head_dim(layer)
        if not projection.endswith("k_proj"):  # one matrix of queries, keys and values, in order
            both = 2 * width * _kv_heads(attention)
            keys = keys[..., -both : -both // 2]
        heads = keys.shape[-1] // width
        return key_norm_scores(keys.unflatten(-1, (heads, -1)).transpose(1, 2), mean)

    def flops(self, work: Scoring) -> int:
        """The key projection of all tokens."""
        return key_norm_scorer_flops(work.shapes[work.layer], work.hidden, work.tokens)


def _head_mean(attention: Any) -> HeadMean:
    """The mean over all heads, as DARE's state on the attention knows it."""
    return getattr(vars(attention).get("_dare"), "mean", local_mean)


def _latent_keys(attention: Any, normed: Tensor) -> Tensor:
    """[B, H, S, d] keys of multi-head latent attention, not yet rotated: norms are the same."""
    widths = [attention.kv_lora_rank, attention.qk_rope_head_dim]
    latent, turned = attention.kv_a_proj_with_mqa(normed).split(widths, dim=-1)
    latent = attention.kv_a_layernorm(latent)
    return attention.expand_kv(latent[:, None], turned[:, None])[0]


def _kv_heads(attention: Any) -> int:
    config = attention.config
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _head_dim(layer: Any) -> int:
    attention: Any = attention_of(layer)
    head_dim = getattr(attention, "head_dim", None)
    return head_dim or attention.config.hidden_size // attention.config.num_attention_heads
