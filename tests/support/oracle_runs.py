"""Models that the masked oracle runs, and what it is told of their routing."""

import functools

import torch

from dare_hf import DareConfig
from dare_hf.routing.retention import build_table
from dare_hf.testing import (
    OracleRouting,
    tiny_model,
)

LAYERS = 4


def routing_of(fields: dict) -> OracleRouting:
    """Say in the oracle's words what a config asks for."""
    asked = DareConfig(**{"schedule": "constant", **fields})
    table = build_table(
        LAYERS,
        schedule=asked.schedule,
        vision_retention=asked.vision_retention,
        text_retention=asked.text_retention,
        cut_layer=fields.get("cut_layer", "auto"),
        plan_every=fields.get("plan_every", 1),
    )
    return OracleRouting(
        rates=[(table.rate(0, layer, 1), table.rate(0, layer, 0)) for layer in range(LAYERS)],
        plan_layers=table.plan_layers,
        prefix_tokens=fields.get("prefix_tokens", 2),
        always_keep=fields.get("always_keep_token_ids", ()),
        pruned=fields.get("pruned", "bypass"),
        batch_budget=fields.get("batch_budget", "row"),
    )


@functools.cache
def oracle_model(name: str, attention: str, dtype: torch.dtype, seed: int = 0):
    """Return the same model as the shared one, never patched."""
    return tiny_model(name, attn_implementation=attention, dtype=dtype, seed=seed)
