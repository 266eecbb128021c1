"""Give the project its address: absolute links in README.md (PyPI shows those), [project.urls].

    python scripts/set_address.py https://github.com/OWNER/dare_hf

Links into the checkout become links to URL/blob/main, pictures to URL/raw/main. A second run with
another address changes what the first wrote.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINK = re.compile(
    r"(!?\[[^\[\]]*\])"  # its text
    r"\((?:https://[^)\s]+?/(?:blob|raw)/main/)?([\w./-]+)(#[\w-]+)?\)"
)
NAMES = {
    "Source": "",
    "Documentation": "/tree/main/docs",
    "Changelog": "/blob/main/CHANGELOG.md",
    "Issues": "/issues",
}


def absolute(readme: str, url: str) -> str:
    """The text with links to files of the checkout as links to `url`."""

    def linked(found: re.Match[str]) -> str:
        text, path, anchor = found.groups()
        kind = "raw" if text.startswith("!") else "blob"
        return f"{text}({url}/{kind}/main/{path}{anchor or ''})"

    return LINK.sub(linked, readme)


def with_urls(pyproject: str, url: str) -> str:
    """The text with the addresses of `NAMES` at the end of [project.urls]."""
    before, head, rest = pyproject.partition("[project.urls]\n")
    own, _, after = rest.partition("\n\n")
    kept = [line for line in own.splitlines() if line.partition(" = ")[0] not in NAMES]
    lines = [*kept, *(f'{name} = "{url}{path}"' for name, path in NAMES.items())]
    return before + head + "\n".join(lines) + "\n\n" + after


if __name__ == "__main__":
    address = sys.argv[1].rstrip("/")
    for name, change in (("README.md", absolute), ("pyproject.toml", with_urls)):
        file = ROOT / name
        file.write_text(change(file.read_text(encoding="utf-8"), address), encoding="utf-8")
