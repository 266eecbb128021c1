"""Each Python block of the documentation runs, in order, offline."""

import re
from pathlib import Path

import pytest
from sybil.document import Document
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


# name = "an id of the hub"  # offline: what runs in its place where there is no hub
ONLINE = re.compile(r'= "[^"]+"  # offline: (.+)$', re.MULTILINE)


def _page(path: Path) -> Document:
    text = ONLINE.sub(r"= \1", path.read_text(encoding="utf-8"))
    document = Document(text, str(path))
    for parser in (PythonCodeBlockParser(), SkipParser()):
        for region in parser(document):
            document.add(region)
    return document


@pytest.mark.parametrize(
    "path", [path for path in PAGES if list(_page(path))], ids=lambda path: path.stem
)
def test_page_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for example in _page(path):
        example.evaluate()


def test_paths_that_contributing_names_are_there():
    """A how-to that names a file or function of yesterday sends people astray."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name in re.findall(r"`([\w/.]+\.(?:py|md))`", text):
        places = [ROOT, *(ROOT / folder for folder in ("dare_hf", "dare_hf/scoring", "tests"))]
        assert "/" not in name or any((place / name).exists() for place in places), name
        assert any(ROOT.rglob(Path(name).name)), name
    for name in ("BUILT_IN", "make_scorer", "NAMED", "Schedule", "build_table", "stage_weights"):
        assert f"`{name}`" in text
        files = (ROOT / "dare_hf").rglob("*.py")
        assert any(re.search(rf"\b{name}\b", f.read_text(encoding="utf-8")) for f in files), name
