"""Symmetric: one router and one rate for all tokens, no cut layer, no hard loss, no prefix.

What papers on DARE call UniPrune; there is no source of it, and this definition is ours. No token
counts as vision, so that both modalities share a router and a budget. To be trained, as "literal".
"""

from dare_hf.policies.base import Policy

POLICY = Policy(
    name="symmetric",
    fields={
        "scorer": "router",
        "schedule": "constant",
        "image_token_ids": (),
        "vision_retention": 0.5,
        "text_retention": 0.5,
        "prefix_tokens": 0,
        "lambda_hard": 0.0,
        "hop_aware": False,
    },
    simplified="Our own definition: UniPrune has no source.",
    moves=("vision_retention", "text_retention"),
)
