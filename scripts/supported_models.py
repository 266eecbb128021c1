"""Write the tables of supported architectures into docs/supported-models.md."""

from pathlib import Path

from dare_hf.conformance.page import renewed

PAGE = Path(__file__).parents[1] / "docs" / "supported-models.md"

if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
