"""Write the tables of supported architectures into their pages of docs/."""

from pathlib import Path

from dare_hf.conformance.page import PAGES, renewed

DOCS = Path(__file__).parents[1] / "docs"

if __name__ == "__main__":
    for kind, name in PAGES.items():
        page = DOCS / name
        page.write_text(renewed(page.read_text(encoding="utf-8"), kind), encoding="utf-8")
