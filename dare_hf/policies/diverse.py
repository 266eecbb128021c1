"""Diverse: before the first layer, the images' most different tokens (DivPrune).

Cosine distance between the projected features, those of one row and hop together: first the token
whose nearest neighbour is farthest, then always the one that is farthest from those taken.

Source: Alvar et al., "DivPrune", CVPR 2025 (arXiv 2503.02175).
"""

from dare_hf.policies.base import OBSERVED, ONE_CUT, Policy

POLICY = Policy(
    name="diverse",
    fields={
        **ONE_CUT,
        **OBSERVED,
        "scorer": "diverse",
        "schedule": "constant",
        "vision_retention": 0.4,
    },
    simplified=(
        "Features are read as they enter the first decoder layer, so that a family that scales its "
        "embeddings or adds positions to them is read with both; original positions instead of "
        "renumbered ones; the number kept is the ceiling of the share. The default rate is ours."
    ),
)
