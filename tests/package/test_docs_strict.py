"""Strict documentation: links, anchors, alt texts, lengths, and what the FAQ quotes."""

import ast
import importlib.util
import re
import tomllib
from pathlib import Path
from urllib.parse import unquote

import pytest
from markdown.extensions.toc import slugify

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ROOT_PAGES = [
    ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
]
PAGES = [*ROOT_PAGES, *sorted(DOCS.glob("*.md"))]
LONGEST = 250  # lines; a reader scrolls no further
LOG = "log.md"  # grows by its nature
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
IMAGE = re.compile(r"!\[([^\[\]]*)\]\(")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+?)(?: \{#([\w-]+)\})?$", re.MULTILINE)


def _text(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def _anchors(page: Path) -> set[str]:
    found = HEADING.findall(_text(page))
    return {own or slugify(re.sub(r"[`*]", "", title), "-") for title, own in found}


def broken_links(page: Path) -> list[str]:
    """Targets of a page that are no file of the checkout, or no heading of that file."""
    wrong = []
    for target in LINK.findall(_text(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in _anchors(file)):
            wrong.append(target)
    return wrong


def unnamed_images(text: str) -> list[str]:
    """Images of a page without an alternative text, in Markdown or HTML."""
    bare = [found for found in IMAGE.findall(text) if not found.strip()]
    tags = re.findall(r"<(?:img|svg)\b[^>]*>", text)
    return bare + [tag for tag in tags if not re.search(r'\b(?:alt|aria-label)="[^"]+"', tag)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    assert not broken_links(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_images_have_alternative_texts(page):
    assert not unnamed_images(_text(page))


@pytest.mark.parametrize("picture", sorted(DOCS.glob("pictures/*.svg")), ids=lambda file: file.stem)
def test_a_drawing_has_a_title_and_no_colour_of_one_theme(picture):
    text = picture.read_text(encoding="utf-8")
    assert re.search(r"<title>[^<]+</title>", text)
    assert "prefers-color-scheme: dark" in text


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_a_page_is_short(page):
    count = len(page.read_text(encoding="utf-8").splitlines())
    assert count <= LONGEST or page.name == LOG, "split it, or let its script split it"


def test_mkdocs_is_strict():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    rules = ("omitted_files", "absolute_links", "unrecognized_links", "anchors")
    assert "\nstrict: true\n" in text
    assert all(f"  {rule}: warn\n" in text for rule in rules)


def test_what_is_broken_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# One two\n\n[a](page.md#one-two) [b](gone.md) [c](#three)\n```\n[d](gone.md)\n```\n"
        '![](x.png) ![seen](x.png) <img src="x.png"> <img alt="seen" src="x.png">\n'
    )
    assert broken_links(page) == ["gone.md", "#three", "x.png", "x.png"]
    assert unnamed_images(_text(page)) == ["", '<img src="x.png">']


def _messages() -> str:
    """All text of the package's strings, f-strings' fields as "{}", one string a line."""
    lines = []
    for file in (ROOT / "dare_hf").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "{}" for p in node.values)
                lines.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                lines.append(node.value)
    return "\n".join(lines)


def test_the_error_page_quotes_what_the_code_says():
    text = _messages()
    quoted = re.findall(
        r"^## `(.+)`$", (DOCS / "errors.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(quoted) > 10
    missing = [q for q in quoted if any(part.strip() not in text for part in q.split("..."))]
    assert not missing, "docs/errors.md quotes messages that no code has"


def test_the_readme_gets_an_address():
    spec = importlib.util.spec_from_file_location("set_address", ROOT / "scripts/set_address.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = "[a](docs/a.md#b) ![c\nd](docs/e.png) [f](https://other.org/g)"
    once = script.absolute(text, "https://one.org/x")
    assert once.startswith(
        "[a](https://one.org/x/blob/main/docs/a.md#b) ![c\nd](https://one.org/x/raw/main/"
    )
    assert "[f](https://other.org/g)" in once
    assert script.absolute(once, "https://two.org/y").count("two.org") == once.count("one.org")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for _ in range(2):
        project = script.with_urls(project, "https://one.org/x")
    urls = tomllib.loads(project)["project"]["urls"]
    assert set(urls) == {"Paper", *script.NAMES}
    readme = script.absolute((ROOT / "README.md").read_text(encoding="utf-8"), "https://one.org/x")
    assert not re.findall(r"\]\((?!https://)", readme)
