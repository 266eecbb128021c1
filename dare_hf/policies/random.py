"""Random: every layer keeps its rate of vision tokens by a hash of seed, layer and index.

The control of every comparison: what scores are worth is what they add to it at the same budget.
"""

from dare_hf.policies.base import Policy

POLICY = Policy(
    name="random",
    fields={
        "scorer": "random",
        "schedule": "constant",
        "vision_retention": 0.4,
        "text_retention": 1.0,
        "prefix_tokens": 0,
        "hop_score": "stored",
        "hop_budget": "pooled",
    },
    simplified="Nothing: there is no paper. What is dropped in a layer may come back in the next.",
)
