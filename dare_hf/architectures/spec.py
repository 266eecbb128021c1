"""An architecture as data: what the generic path has to know about one `model_type`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelSpec:
    """One supported `model_type`.

    Attributes:
        model_type: `config.model_type` of the top-level model.
        layers: Dotted path from the top-level model to the `ModuleList` of decoder layers.
        pre_attention_norm: Name of the norm the layer applies before its attention, None where
            attention reads the residual stream itself (key_norm scoring needs it).
        key_projection: Dotted path from a layer to the linear that makes keys.
        token_kwargs: Further per-token keyword arguments of a layer, name -> dimension that
            counts tokens (hidden states, masks and positions are known to the generic path).
        unrouted: Paths of modules that mark a layer which every token runs: linear attention,
            convolution, cross-attention, experts of their own, and (in `self_attn`) an indexer.
        streams: Hidden states are [streams, B, S, D], of which `config.altup_active_idx` is scored.
        generates_inside: Its generate embeds the prompt and calls the text model's own generate,
            which sees no placeholder ids.
        type_ids: Names of the arguments whose values 1 and 2 mark image and video tokens.
        vocabulary_images: Images are ids of the text vocabulary (`config.vocabulary_map`).
        since: First version of transformers that has it, "5.0" where an older one had it already.
        pruned: What is pruned, for the documentation.
        whole: What every token runs, for the documentation.
        note: One sentence for the documentation.
    """

    model_type: str
    layers: str = "model.language_model.layers"
    pre_attention_norm: str | None = "input_layernorm"
    key_projection: str = "self_attn.k_proj"
    token_kwargs: tuple[tuple[str, int], ...] = ()
    unrouted: tuple[str, ...] = ()
    streams: bool = False
    generates_inside: bool = False
    type_ids: tuple[str, ...] = ("mm_token_type_ids", "token_type_ids")
    vocabulary_images: bool = False
    since: str = "5.0"
    pruned: str = "all decoder layers"
    whole: str = "the vision tower"
    note: str = ""
