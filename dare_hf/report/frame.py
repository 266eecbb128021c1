"""What every page of ours is made of: one file, no network, no scripts, light and dark."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

_STYLE = (
    ":root{color-scheme:light dark;--paper:#fff;--ink:#1b1b1b;--soft:#5a5a5a;--line:#ccc;"
    "--panel:#f6f6f6;--fill:#06c;--mark:#c00}"
    "@media (prefers-color-scheme:dark){:root{--paper:#16181c;--ink:#e6e6e6;--soft:#a2a2a2;"
    "--line:#444;--panel:#22252b;--fill:#6ab0ff;--mark:#ff7a7a}}"
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;"
    "background:var(--paper);color:var(--ink)}"
    ".wide{overflow-x:auto}table{border-collapse:collapse;font-size:14px}"
    "td,th{padding:.2rem .7rem;text-align:right;border-bottom:1px solid var(--line)}"
    "td:first-child,th:first-child{text-align:left}.held td{font-weight:600}"
    "svg{max-width:100%;height:auto}svg text{fill:var(--ink)}"
    ".panel{background:var(--panel);border:1px solid var(--line)}"
    "pre{white-space:pre-wrap;overflow-wrap:anywhere;padding:.6rem 1rem;font-size:15px}"
    ".soft{color:var(--soft)}"
)


def page_frame(title: str, heading: str, body: str) -> str:
    """A whole page.

    Args:
        title: What the browser shows, as plain text.
        heading: The line on top, as plain text.
        body: What comes below, as HTML whose every value is escaped.
    """
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(heading)}</h1>{body}</body></html>\n"
    )


def plain(value: Any) -> str:
    """A value of a JSON object in one line of text."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return " to ".join(map(plain, value))
    if isinstance(value, dict):
        return ", ".join(f"{name} {plain(one)}" for name, one in value.items()) or "none"
    return str(value)


def pairs(values: Mapping[str, Any]) -> str:
    """Names and values as a table of two columns."""
    rows = (f"<tr><td>{escape(k)}</td><td>{escape(plain(v))}</td></tr>" for k, v in values.items())
    return f'<div class="wide"><table>{"".join(rows)}</table></div>'
