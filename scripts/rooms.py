"""The rooms of `dare_hf` as a picture, from the contract that import-linter enforces."""

import ast
import textwrap
import tomllib
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
WIDTH, GAP, SIDE = 1060, 10, 44
STYLE = """
  .panel { fill: #ffffff } .room { fill: #eef2ff; stroke: #5b6ee1 }
  .name { fill: #1a1f36; font: 600 15px sans-serif } .what { fill: #444b63; font: 11px sans-serif }
  .arrow { stroke: #5b6ee1; stroke-width: 2; fill: none } .tip { fill: #5b6ee1 }
  @media (prefers-color-scheme: dark) {
    .panel { fill: #161a27 } .room { fill: #232a44; stroke: #8d9bff }
    .name { fill: #f1f3ff } .what { fill: #c2c8e2 }
    .arrow { stroke: #8d9bff } .tip { fill: #8d9bff }
  }
"""


def floors() -> list[list[str]]:
    """The rooms by floor, the highest first."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    contracts = tomllib.loads(text)["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [[name.strip(" ()") for name in line.replace(":", "|").split("|")] for line in layers]


def purpose(room: str) -> str:
    """What a room says of itself: the first line of its docstring."""
    folder = ROOT / "dare_hf" / room
    path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return said.split("\n")[0].replace("`", "")


def floor(rooms: list[str], top: int) -> tuple[int, list[str]]:
    """Height of one floor, and its boxes."""
    wide = (WIDTH - SIDE - GAP * (len(rooms) + 1)) / len(rooms)
    told = [textwrap.wrap(purpose(room), int((wide - 20) / 6.3)) for room in rooms]
    height, parts = 30 + 13 * max(map(len, told)), []
    for place, (room, lines) in enumerate(zip(rooms, told, strict=True)):
        left = round(SIDE + GAP + place * (wide + GAP))
        box = f'x="{left}" y="{top}" width="{wide:.0f}" height="{height}" rx="6"'
        parts.append(f'<rect class="room" {box}/>')
        parts.append(f'<text class="name" x="{left + 10}" y="{top + 20}">{room}</text>')
        for line, words in enumerate(lines):
            at = f'x="{left + 10}" y="{top + 36 + 13 * line}"'
            parts.append(f'<text class="what" {at}>{escape(words)}</text>')
    return height, parts


def picture() -> str:
    """The SVG: an arrow at the side says that each floor may import those below it."""
    top, parts = GAP, []
    for rooms in floors():
        height, boxes = floor(rooms, top)
        top, parts = top + height + GAP, parts + boxes
    arrow = f'<path class="arrow" d="M22 {GAP} V{top - GAP - 10}"/>'
    tip = f'<path class="tip" d="M15 {top - GAP - 12} L29 {top - GAP - 12} L22 {top - GAP} Z"/>'
    size = f'width="{WIDTH}" height="{top}" viewBox="0 0 {WIDTH} {top}"'
    title = "Rooms of dare_hf: each floor may import only from floors below it"
    body = "\n".join([f"{arrow}{tip}", *parts])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{title}">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n"
        f'<rect class="panel" width="{WIDTH}" height="{top}" rx="8"/>\n{body}\n</svg>\n'
    )
