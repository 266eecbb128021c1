"""FastV: one cut behind the first layers, by what the last token of the prompt attends to.

Layers 0 to K-1 see everything. Before layer K: the attention probabilities of layer K-1, mean over
heads, row of the span's last token; the vision tokens of the largest stay, for all deeper layers
and all tokens that follow. Text stays whole, positions stay original.

Source: Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", ECCV 2024 (arXiv 2403.06764),
K = 2, R = 0.5: a mean over 32 layers of 17/32, which is the default here.
"""

from dare_hf.policies.base import OBSERVED, ONE_CUT, Policy

POLICY = Policy(
    name="fastv",
    fields={
        **ONE_CUT,
        **OBSERVED,
        "scorer": "last_query",
        "schedule": "stages",
        "stages": ((2, 1.0),),
        "vision_retention": 17 / 32,
    },
    simplified=(
        "Any batch size, several images compete with each other, and the number kept is the "
        "ceiling of the share. LightFastV, which papers name beside it, has no source and is not "
        "here."
    ),
)
