"""Hops step by step on an unpatched model, as masks say."""

import functools

from laws import (
    FP32_TOLERANCE,
    assert_close,
)

from dare_hf.routing.retention import build_table
from dare_hf.testing import (
    HopRules,
    OracleRouting,
    tiny_model,
)

LAYERS = 4


STEPS = {1: [[3, 4, 11, 16]], 3: [[2, 9], [5, 6, 7, 15], [0, 12]]}


@functools.cache
def unpatched(name: str):
    return tiny_model(name)


def steps_for(inputs):
    return STEPS[len(inputs["input_ids"])]


def oracle_rules(fields) -> tuple[OracleRouting, HopRules]:
    """Say in the oracle's words what a config asks for."""
    hop_aware = fields.get("hop_aware", True)
    table = build_table(
        LAYERS,
        schedule=fields.get("schedule", "constant"),
        vision_retention=fields["vision_retention"],
        text_retention=fields["text_retention"],
        plan_every=fields.get("plan_every", 1),
        first_whole=fields.get("first_layers_whole", 0),
        max_hops=fields.get("max_hops", 8) if hop_aware else 1,
        hop_decay=fields["hop_decay"] if hop_aware else 1.0,
    )
    pairs = [list(zip(*rows, strict=True)) for rows in zip(table.vision, table.text, strict=True)]
    routing = OracleRouting(
        rates=pairs[0],
        plan_layers=table.plan_layers,
        prefix_tokens=fields.get("prefix_tokens", 2),
        always_keep=fields.get("always_keep_token_ids", ()),
        pruned=fields.get("pruned", "bypass"),
    )
    hops = HopRules(
        rates=pairs,
        delimiters=[(token,) for token in fields["hop_delimiters"]],
        window=fields.get("decode_window"),
        pooled=fields.get("hop_budget", "pooled") == "pooled",
        cap=fields.get("max_kv_tokens"),
    )
    return routing, hops


def hold_steps(out, logits, span, *, what):
    """Hold every step of a generate to a full-length forward's logits [B, S, V]."""
    for step, step_logits in enumerate(out.logits):
        theirs = logits[:, span - 1 + step].to(step_logits.dtype)
        assert_close(step_logits, theirs, tolerance=FP32_TOLERANCE, what=f"{what}: step {step}")
