"""SparseVLM: three cuts, by what the text that looks at the image attends to; the rest is merged.

Raters, once, from the input embeddings: softmax over the text behind the image of vision times
text, mean over the vision rows; text tokens above the mean of these rate. Behind layers 2, 6 and 15
of 32: that layer's attention, mean over heads and raters; the largest of the vision tokens stay for
all deeper layers. Recycling: of what is cut, the best 30 % (and one) are clustered by density peaks
into a tenth (and one), whose means stay too. It is left out by
`DareConfig.preset("sparsevlm", recycle=False)`.

Source: Zhang et al., "SparseVLM", ICML 2025 (arXiv 2410.04417), version 1 with the lists of its
released code for 192 tokens: 300, 200, 110 of 576. The mean over 32 layers is 0.352, the default
here; other budgets scale the three alike.
"""

from dare_hf.policies.base import OBSERVED, ONE_CUT, Policy

_LAYERS, _TOKENS = 32, 576
_LISTS = ((3, 300), (7, 200), (16, 110))
_ENDS = (*(start for start, _ in _LISTS[1:]), _LAYERS)
_LATER = sum((end - start) * n for (start, n), end in zip(_LISTS, _ENDS, strict=True))

POLICY = Policy(
    name="sparsevlm",
    fields={
        **ONE_CUT,
        **OBSERVED,
        "scorer": "text_raters",
        "schedule": "stages",
        "stages": tuple((start / _LAYERS, n / _TOKENS) for start, n in _LISTS),
        "recycle": True,
        "vision_retention": (_LISTS[0][0] + _LATER / _TOKENS) / _LAYERS,
    },
    simplified=(
        "The released code's fixed lists, not the rank of the attention matrix. Clusters are part "
        "of the budget. Original positions instead of renumbered ones: merged vectors take the "
        "places of the first tokens that were dropped, in position order, and not those behind "
        "all that was kept. The clustering has no random tie-breaking, and its FLOPs and those of "
        "the raters are not counted (under a ten-thousandth of a 7B prefill)."
    ),
)
