"""Each Python block of the documentation runs, in order, offline."""

from pathlib import Path

import pytest
from sybil.document import Document
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def _page(path: Path) -> Document:
    return Document.parse(str(path), PythonCodeBlockParser(), SkipParser())


@pytest.mark.parametrize(
    "path", [path for path in PAGES if list(_page(path))], ids=lambda path: path.stem
)
def test_page_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for example in _page(path):
        example.evaluate()
