"""PyramidDrop: four stages of equal depth, each cut by the attention of the layer that follows it.

At the begin of layers L/4, L/2 and 3L/4: that layer's own queries and keys of the tokens that are
left (its norm, projections and rotary embedding), query of the span's last token, causal softmax
over all that is left, mean over heads; the largest of the vision tokens stay for all deeper layers.
Of the images 1/2, 1/4 and 1/8 are left; other budgets scale the three alike.

Source: Xing et al., "PyramidDrop", CVPR 2025 (arXiv 2410.17247), lambda 0.5: a mean over the depth
of 15/32, which is the default here. Budgets under 1/4 need earlier stages, as Reroute (arXiv
2606.12412) sets them: ``stages=((2, 0.2789), (7, 0.0937), (15, 0.0315), (23, 0.0106))``.
"""

from dare_hf.policies.base import OBSERVED, ONE_CUT, Policy

POLICY = Policy(
    name="pyramiddrop",
    fields={
        **ONE_CUT,
        **OBSERVED,
        "scorer": "own_attention",
        "schedule": "stages",
        "stages": ((0.25, 0.5), (0.5, 0.25), (0.75, 0.125)),
        "vision_retention": 15 / 32,
    },
    simplified=(
        "Original positions instead of renumbered ones; the number kept is the ceiling of the "
        "share; no training. A span that follows other tokens ranks by all keys that are stored."
    ),
)
