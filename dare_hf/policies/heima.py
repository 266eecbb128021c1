"""Heima-style: a closed hop leaves its last token alone, the prompt stays.

Source: Shen et al., "Efficient Reasoning with Hidden Thinking" (Heima, arXiv 2501.19201), where a
stage of reasoning becomes one trained token. It needs `hop_delimiters`, and prunes nothing of a
prompt: budgets of FLOPs do not apply to it. `hop_summary` is the number of tokens left.
"""

from dare_hf.policies.base import Policy

POLICY = Policy(
    name="heima",
    fields={
        "scorer": "recent",
        "schedule": "constant",
        "vision_retention": 1.0,
        "text_retention": 1.0,
        "plan_every": 1024,
        "prefix_tokens": 0,
        "hop_summary": 1,
        "hop_score": "stored",
        "hop_budget": "per_hop",
    },
    simplified=(
        "The hop is written in full before it is left behind, so that what is saved is the cache "
        "of later hops; the token that stays is the hop's last text token, its delimiter, and "
        "nothing was trained to sum up in it. No decoder re-expands it."
    ),
    moves=(),
)
