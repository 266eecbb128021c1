"""FLOPs and bytes of a decoder as pure functions of layer shapes and token counts.

One multiply-add is 2 FLOPs. Counted are the matrix products of the decoder layers (projections, MLP
or experts, both products of the attention) and of the lm_head; norms, activations, softmax and
rotary angles are not, and neither is the vision tower. Attention counts as a rectangle, queries x
keys, as it is executed without a fused causal kernel. Pads are never counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

ROUTER_MODULE = "dare_router"  # counted by router_flops, not as part of the layer
_BASE_LAYER = "base_layer"  # where PEFT's wrappers keep the layer they wrap


@dataclass(frozen=True)
class LayerShape:
    """What one decoder layer costs a token.

    Attributes:
        linear_macs: Multiply-adds of all linear maps that one token passes through.
        q_heads: Query heads.
        kv_heads: Key and value heads stored in the cache; 0 where an earlier layer's are read.
        qk_dim: Width of one query or key head.
        v_dim: Width of one value head.
        window: Tokens a sliding-window layer attends to, itself included; None for full attention.
        latent: Elements the cache stores of a token where it holds the latents that keys and values
            are made from; None where it holds keys and values.
        kv_shares: Processes that store the key and value heads between them.
    """

    linear_macs: int
    q_heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    window: int | None = None
    latent: int | None = None
    kv_shares: int = 1

    @classmethod
    def of(cls, layer: nn.Module, config: Any) -> LayerShape:
        """Measures a decoder layer of transformers.

        Args:
            layer: The layer, with real, quantised, wrapped or meta weights.
            config: Its text config; used for what the layer itself does not tell.
        """
        attention = _attention(layer)
        heads = config.num_attention_heads
        head_dim = getattr(attention, "head_dim", None) or getattr(config, "head_dim", None)
        head_dim = head_dim or config.hidden_size // heads
        qk_dim = getattr(attention, "qk_head_dim", head_dim)
        v_dim = getattr(attention, "v_head_dim", qk_dim)
        q_out = getattr(getattr(attention, "q_proj", None), "out_features", heads * qk_dim)
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        k_out = getattr(getattr(attention, "k_proj", None), "out_features", kv_heads * qk_dim)
        return cls(
            linear_macs=linear_macs_per_token(layer),
            q_heads=_query_heads(attention, v_dim) or q_out // qk_dim,
            kv_heads=0 if getattr(attention, "is_kv_shared_layer", False) else k_out // qk_dim,
            qk_dim=qk_dim,
            v_dim=v_dim,
            window=_window(attention, config),
            latent=_latent(attention),
        )

    @property
    def projection_width(self) -> int:
        """Outputs of the maps that make a token's query, key and value."""
        return self.q_heads * self.qk_dim + self.kv_heads * (self.qk_dim + self.v_dim)

    @property
    def pair_macs(self) -> int:
        """Multiply-adds of one query with one key: both products of the attention, all heads."""
        return self.q_heads * (self.qk_dim + self.v_dim)

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes one token's key and value take in this layer's cache, in this process."""
        if self.latent is not None:
            return self.latent * itemsize
        heads = self.kv_heads // self.kv_shares
        return kv_bytes_per_token(heads, self.qk_dim, self.v_dim, itemsize)

    def unpruned_keys(self, queries: int, length: int) -> int:
        """Keys an unpruned layer has in a forward of `queries` tokens, `length` seen in all."""
        past = length - queries
        return queries + (past if self.window is None else min(past, self.window - 1))

    def unpruned_stored(self, length: int) -> int:
        """Tokens an unpruned layer's cache holds after `length` tokens."""
        return length if self.window is None else min(length, self.window - 1)


def shapes_of(layers: Iterable[nn.Module], config: Any) -> list[LayerShape]:
    """The `LayerShape` of each decoder layer, in order."""
    return [LayerShape.of(layer, config) for layer in layers]


def linear_macs_per_token(module: nn.Module) -> int:
    """Multiply-adds of all linear maps that one token passes through, counted on the real modules.

    A module with `in_features` and `out_features` is linear (nn.Linear and its quantised kinds). A
    PEFT wrapper counts as what it wraps plus each adapter in it. Of experts, a token passes
    `top_k`: of a list of experts and of weights [experts, in, out] that many are counted, whatever
    a kernel may compute beside them; the matrix [experts, hidden] that picks them counts whole. The
    DARE router is left out.
    """
    return _linear_macs(module, _experts_per_token(module))


def layer_flops(
    linear_macs: int, q_tokens: int, kv_tokens: int, heads: int, qk_dim: int, v_dim: int
) -> int:
    """2 (q linear + heads q kv (d_qk + d_v)): one layer, one row, queries x keys a rectangle."""
    return 2 * (q_tokens * linear_macs + heads * q_tokens * kv_tokens * (qk_dim + v_dim))


def forward_flops(
    shapes: Sequence[LayerShape], queries: Sequence[Sequence[int]], keys: Sequence[Sequence[int]]
) -> int:
    """FLOPs of one forward through all layers.

    Args:
        shapes: One per layer.
        queries: [layers][rows] tokens that ran the layer.
        keys: [layers][rows] tokens they attended to or could have, their own among them.
    """
    macs = 0
    for shape, q, kv in zip(shapes, queries, keys, strict=True):
        macs += shape.linear_macs * sum(q)
        macs += shape.pair_macs * sum(a * b for a, b in zip(q, kv, strict=True))
    return 2 * macs


def step_flops(shapes: Sequence[LayerShape], before: Sequence[Sequence[int]], steps: int) -> int:
    """FLOPs of `steps` forwards of one token a row, each seeing what was stored and itself.

    Args:
        shapes: One per layer.
        before: [layers][rows] tokens stored before the first step; each step adds one.
        steps: How many.
    """
    flops = 0
    for shape, rows in zip(shapes, before, strict=True):
        pairs = sum(steps * (2 * n + steps + 1) for n in rows)  # twice the sum over the steps
        flops += 2 * shape.linear_macs * steps * len(rows) + shape.pair_macs * pairs
    return flops


def unpruned_flops(
    shapes: Sequence[LayerShape],
    queries: Sequence[int],
    lengths: Sequence[int],
    tails: Mapping[int, Sequence[int]] | None = None,
) -> int:
    """FLOPs of the same forward with every token in every layer.

    Args:
        shapes: One per layer.
        queries: [rows] real tokens of this forward.
        lengths: [rows] real tokens seen so far, those of this forward included.
        tails: [rows] the last tokens that are all a layer computes even unpruned, by its index.
    """
    macs, cached = 0, {}
    total = sum(queries)
    for index, shape in enumerate(shapes):
        if tails and index in tails:
            pairs = [(q, n) for q, n in zip(tails[index], lengths, strict=True)]
            keys = sum(q * shape.unpruned_keys(q, n) for q, n in pairs)
            macs += shape.linear_macs * sum(tails[index]) + shape.pair_macs * keys
            continue
        if shape.window not in cached:
            rows = zip(queries, lengths, strict=True)
            cached[shape.window] = sum(q * shape.unpruned_keys(q, n) for q, n in rows)
        macs += shape.linear_macs * total + shape.pair_macs * cached[shape.window]
    return 2 * macs


def unpruned_generate_flops(
    shapes: Sequence[LayerShape],
    prompts: Sequence[int],
    sampled: int,
    *,
    hidden: int,
    vocab: int,
) -> int:
    """FLOPs of one unpruned generate as transformers runs it.

    Every row runs until the longest has ended: a row that ended earlier is fed pad ids, which cost
    as much as any token. The last sampled token is not processed. The lm_head runs on one hidden
    state of each row and step.

    Args:
        shapes: One per layer.
        prompts: [rows] real prompt tokens.
        sampled: Columns generate added, the same for all rows.
        hidden: Width of the hidden state.
        vocab: Rows of the lm_head.
    """
    flops = unpruned_flops(shapes, prompts, prompts) + head_flops(
        hidden, vocab, len(prompts) * sampled
    )
    for step in range(1, sampled):
        flops += unpruned_flops(shapes, [1] * len(prompts), [n + step for n in prompts])
    return flops


def head_flops(hidden: int, vocab: int, rows: int) -> int:
    """FLOPs of the lm_head on `rows` hidden states."""
    return 2 * hidden * vocab * rows


def router_flops(hidden: int, tokens: int) -> int:
    """FLOPs of one layer's router on `tokens` tokens: one weight row per modality."""
    return 2 * 2 * hidden * tokens


def attention_scorer_flops(shape: LayerShape, window: int, keys: int) -> int:
    """FLOPs of one layer's attention scores: `window` queries x `keys` keys, and value norms."""
    return 2 * keys * (shape.q_heads * window * shape.qk_dim + shape.kv_heads * shape.v_dim)


def key_norm_scorer_flops(shape: LayerShape, hidden: int, tokens: int) -> int:
    """FLOPs of one layer's key norms: the key projection of every token, and its squares."""
    return 2 * tokens * shape.kv_heads * shape.qk_dim * (hidden + 1)


def kv_bytes_per_token(kv_heads: int, k_dim: int, v_dim: int, itemsize: int) -> int:
    """n_kv_heads (d_k + d_v) itemsize: bytes of one token in one layer's cache."""
    return kv_heads * (k_dim + v_dim) * itemsize


def frozen_flops(shape: LayerShape, hidden: int, tokens: int) -> int:
    """FLOPs of making queries, keys and values of tokens once more (pruned="freeze").

    Args:
        shape: The layer.
        hidden: Width of the model.
        tokens: How many.
    """
    return 2 * tokens * hidden * shape.projection_width


def kv_bytes(shapes: Sequence[LayerShape], kept: Sequence[Sequence[int]], itemsize: int) -> int:
    """Bytes of `kept` [layers][rows] real tokens. Source: method.md section 5."""
    pairs = zip(shapes, kept, strict=True)
    return sum(shape.kv_bytes_per_token(itemsize) * sum(rows) for shape, rows in pairs)


def unpruned_kv_bytes(shapes: Sequence[LayerShape], lengths: Sequence[int], itemsize: int) -> int:
    """Bytes of an unpruned cache after `lengths` [rows] real tokens; sliding layers: the window."""
    kept = [[shape.unpruned_stored(n) for n in lengths] for shape in shapes]
    return kv_bytes(shapes, kept, itemsize)


def _attention(layer: nn.Module) -> nn.Module | None:
    for name, child in layer.named_children():
        named = "attn" in name or "attention" in name or hasattr(child, "k_proj")
        if named and any(child.children()):  # not a norm
            return child
    return None


def _query_heads(attention: Any, v_dim: int) -> int | None:
    """By what leaves the attention: the query projection may make gates beside the queries."""
    width = getattr(getattr(attention, "o_proj", None), "in_features", None)
    return None if width is None else width // v_dim


def _latent(attention: Any) -> int | None:
    """Multi-head latent attention stores latents and one rotated key for all heads."""
    if not hasattr(attention, "expand_kv"):
        return None
    return attention.kv_lora_rank + attention.qk_rope_head_dim


def _window(attention: Any, config: Any) -> int | None:
    """The window of a layer's own attention, else what the config says of its index."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    window, types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    index = getattr(attention, "layer_idx", None)
    if types is not None and index is not None and types[index] != "sliding_attention":
        return None
    return window


def _experts_per_token(module: nn.Module) -> int:
    counts = (getattr(child, "top_k", None) for child in module.modules())
    return next((count for count in counts if isinstance(count, int)), 1)


def _linear_macs(module: Any, experts_per_token: int) -> int:
    macs = 0
    children = [(name, m) for name, m in module.named_children() if name != ROUTER_MODULE]
    for name, child in children:
        if name == "experts" and isinstance(child, nn.ModuleList):
            macs += min(experts_per_token, len(child)) * _linear_macs(child[0], experts_per_token)
        else:
            macs += _linear_macs(child, experts_per_token)
    if any(name == _BASE_LAYER for name, _ in children):
        return macs
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return macs + module.in_features * module.out_features
    if isinstance(module, Conv1D):  # of GPT-2: a linear map, stored transposed
        return macs + module.weight.numel()
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.ndim == 3:
            macs += experts_per_token * parameter[0].numel()
        elif parameter.ndim == 2 and hasattr(module, "num_experts") and not name.endswith("bias"):
            macs += parameter.numel()
    return macs
