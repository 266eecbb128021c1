"""The tables of the documentation, from the data the code itself uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dare_hf.architectures.locate import REFUSALS, SPECS
from dare_hf.compat import broken
from dare_hf.conformance.runner import Kind, architectures
from dare_hf.testing.clips import clip_of
from dare_hf.testing.families import family_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

EVERYDAY = {
    Kind.vision: (
        *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "gemma3", "gemma4", "internvl"),
        *("smolvlm", "idefics3", "llava_onevision", "llava_next", "paligemma", "mistral3"),
        *("aya_vision", "glm4v", "lfm2_vl", "mllama", "llama4", "janus", "chameleon"),
    ),
    Kind.text: (
        *("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next"),
        *("gemma2", "gemma3_text", "phi3", "smollm3", "olmo2", "olmo3", "granite", "glm4"),
        *("cohere2", "gpt_oss", "deepseek_v3", "gpt2"),
    ),
}
"""The names most people look for; they come first."""
_SHARED = ("`model_type`", "class", "since", "pruned in", "every token runs")
_HEADS = {Kind.vision: (*_SHARED, "shown", "particular"), Kind.text: (*_SHARED, "particular")}
MARKS = {
    kind: (f"<!-- {name} table: begin -->", f"<!-- {name} table: end -->")
    for kind, name in ((Kind.vision, "conformance"), (Kind.text, "language models"))
}
"""What stands around each table in its page."""
PAGES = {Kind.vision: "supported-models.md", Kind.text: "language-models.md"}
"""The page of docs/ that has the table of each kind."""


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


def table(kind: Kind) -> str:
    """Every architecture of a kind as Markdown: everyday ones, others, refused ones."""
    names = architectures(kind)
    others = sorted(name for name in names if name in SPECS and name not in EVERYDAY[kind])
    lines = []
    for group in (EVERYDAY[kind], others):
        lines += _rows(_HEADS[kind], group, lambda name: _facts(kind, name, names[name]))
    refused = sorted(name for name in names if name not in SPECS)
    lines += _rows(
        ("refused", "class", "why"),
        refused,
        lambda name: (f"`{name}`", f"`{names[name]}`", REFUSALS[name]),
    )
    return "\n".join(lines[:-1])


def _facts(kind: Kind, model_type: str, name: str) -> tuple[str, ...]:
    spec = SPECS[model_type]
    facts = (f"`{model_type}`", f"`{name}`", spec.since, spec.pruned, spec.whole)
    seen = (shown(model_type),) if kind is Kind.vision else ()
    return (*facts, *seen, spec.note or "-")


def _rows(
    head: Iterable[str], names: Iterable[str], facts: Callable[[str], Iterable[str]]
) -> list[str]:
    """A Markdown table with an empty line behind it."""
    head = tuple(head)
    rows = (f"| {' | '.join(facts(name))} |" for name in names)
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *rows, ""]


def renewed(page: str, kind: Kind) -> str:
    """The text of a kind's page with the table as it should be.

    Raises:
        ValueError: The marks around the table are missing.
    """
    begin, end = MARKS[kind]
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"expected {begin} and {end} in the page")
    return f"{before}{begin}\n{table(kind)}\n{end}{after}"
