"""The table of the documentation, from the data the code itself uses."""

from __future__ import annotations

from dare_hf.architectures.locate import SPECS
from dare_hf.architectures.supported import REFUSED
from dare_hf.compat import broken
from dare_hf.conformance.runner import architectures
from dare_hf.testing.clips import clip_of
from dare_hf.testing.families import family_of

EVERYDAY = (
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "gemma3", "gemma4", "internvl", "smolvlm"),
    *("idefics3", "llava_onevision", "llava_next", "paligemma", "mistral3", "aya_vision", "glm4v"),
    *("lfm2_vl", "mllama", "llama4", "janus", "chameleon"),
)
"""The names most people look for; they come first."""
_HEAD = "| `model_type` | class | since | pruned in | every token runs | shown | particular |"
BEGIN, END = "<!-- conformance table: begin -->", "<!-- conformance table: end -->"
"""What stands around the table in docs/supported-models.md."""


def expected(model_type: str) -> str:
    """The status an architecture's row must have: "pass" or "refused"."""
    return "pass" if model_type in SPECS and not broken(model_type) else "refused"


def shown(model_type: str) -> str:
    """What the tiny model of an architecture is shown while it is held to the laws."""
    family, clip = family_of(model_type), clip_of(model_type)
    if not family.sees:
        return "text"
    if model_type == "instructblipvideo":  # its images are frames
        return "frames"
    kind = "random features" if family.picture is None else "images"
    return kind if clip is None else f"{kind}, frames"


def table() -> str:
    """Every image-text-to-text architecture as Markdown: everyday ones, others, refused ones."""
    names = architectures()
    others = sorted(name for name in names if name in SPECS and name not in EVERYDAY)
    lines = []
    for group in (EVERYDAY, others):
        lines += [_HEAD, "|---|---|---|---|---|---|---|"]
        for model_type in group:
            spec = SPECS[model_type]
            facts = (f"`{model_type}`", f"`{names[model_type]}`", spec.since, spec.pruned)
            facts += (spec.whole, shown(model_type), spec.note or "-")
            lines.append(f"| {' | '.join(facts)} |")
        lines.append("")
    lines += ["| refused | class | why |", "|---|---|---|"]
    for model_type in sorted(name for name in names if name not in SPECS):
        lines.append(f"| `{model_type}` | `{names[model_type]}` | {REFUSED[model_type]} |")
    return "\n".join(lines)


def renewed(page: str) -> str:
    """The text of the page with the table as it should be.

    Raises:
        ValueError: The marks around the table are missing.
    """
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"expected {BEGIN} and {END} in the page")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"
