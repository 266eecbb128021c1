"""Arms of the router comparison and rows of the ablation: what each asks of DareConfig."""

from __future__ import annotations

from typing import Any

from dare_hf.config.dare_config import PRESETS

ARMS: dict[str, dict[str, Any] | None] = {
    "full": None,
    "random": {"scorer": "random", "schedule": "constant"},
    # UniPrune's rule: one router and one rate for all tokens, no cut, no hard loss, no prefix.
    "symmetric": {
        "schedule": "constant",
        "image_token_ids": (),
        "prefix_tokens": 0,
        "lambda_hard": 0.0,
        "hop_aware": False,
    },
    "constant": {"schedule": "constant"},
    "dare_l": {"hop_aware": False},
    "dare_lh": {},
}
ROWS: dict[str, dict[str, Any]] = {
    "no_hard": {"lambda_hard": 0.0},
    "no_soft": {"lambda_soft": 0.0},
    "no_ratio": {"lambda_ratio": 0.0},
    "no_losses": {"lambda_hard": 0.0, "lambda_soft": 0.0, "lambda_ratio": 0.0},
    "per_rate": {"ratio": "per_rate"},
    "summed": {"loss_reduction": "sum"},
    "multiply": {"score_scaling": "multiply"},
    "multiply_training": {"score_scaling": "multiply_training"},
    "gumbel": {"selector": "gumbel"},
    "kappa_0": {"prefix_tokens": 0},
    "kappa_1": {"prefix_tokens": 1},
    "kappa_4": {"prefix_tokens": 4},
    # one router and one learned rate for both modalities, hops and all else as DARE-LH
    "no_asymmetry": {"image_token_ids": ()},
    "raw_input": {"normalize_input": False},
    "cut_third": {"cut_layer": 1 / 3},
    "cut_two_thirds": {"cut_layer": 2 / 3},
    "routed_decode": {"decode": "routed"},
    "literal": {k: v for k, v in PRESETS["literal"].items() if not k.endswith("_retention")},
}
"""One thing out, or otherwise, of DARE-LH; `dare_l` is the row without hops."""
ROWS["literal_multiply"] = ROWS["literal"] | {"score_scaling": "multiply"}

ONE_RATE = ("symmetric", "no_asymmetry")
"""Those with one rate for all tokens: the mean of the two targets, weighted by tokens."""
