"""The table of the documentation, from the data the code itself uses."""

from __future__ import annotations

from dare_hf.adapters import REFUSED, SPECS
from dare_hf.conformance.runner import architectures

BEGIN, END = "<!-- conformance table: begin -->", "<!-- conformance table: end -->"
"""What stands around the table in docs/supported-models.md."""


def expected(model_type: str) -> str:
    """The status an architecture's row must have: "pass" or "refused"."""
    return "pass" if model_type in SPECS else "refused"


def table() -> str:
    """Every image-text-to-text architecture as Markdown: first those that pass, then the others."""
    names = architectures()
    lines = [
        "| `model_type` | class | since | what is pruned | what is particular |",
        "|---|---|---|---|---|",
    ]
    for model_type in sorted(name for name in names if name in SPECS):
        spec = SPECS[model_type]
        note = spec.note or "-"
        facts = (f"`{model_type}`", f"`{names[model_type]}`", spec.since, spec.pruned, note)
        lines.append(f"| {' | '.join(facts)} |")
    lines += ["", "| refused | class | why |", "|---|---|---|"]
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
