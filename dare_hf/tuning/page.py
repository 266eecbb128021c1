"""The card and the page of a tuned folder; the page is one file that needs no network."""

from __future__ import annotations

from html import escape
from typing import Any

from dare_hf.report.frame import page_frame, pairs, plain

_COLUMNS = (
    ("family", "{}"),
    ("share", "{}"),
    ("vision_retention", "{:.2f}"),
    ("text_retention", "{:.2f}"),
    ("flops_ratio", "{:.3f}"),
    ("kv_ratio", "{:.3f}"),
    ("agreement", "{:.3f}"),
    ("kl", "{:.4f}"),
    ("drop", "{:.1f}"),
)
_WIDTH, _HEIGHT, _EDGE = 640, 320, 40


def card(found: dict[str, Any]) -> str:
    """README.md of the folder, from what `TuneResult.save` writes."""
    lines = ["---", "library_name: peft", "tags: [dare, token-routing]", "---", ""]
    lines += ["# DARE, tuned on one user's rows", "", found["reason"], ""]
    if found["chosen"] is not None:
        lines += [found["promise"]["text"], ""]
        lines += [f"- {name}: {plain(value)}" for name, value in found["chosen"].items()]
        lines += ["", "```python", "from dare_hf import apply_dare", ""]
        lines += ['model = apply_dare(model, "this folder")', "```", ""]
    lines += ["## How it was found", ""]
    lines += [f"- {name}: {plain(value)}" for name, value in found["about"].items()]
    if found["machine"] is not None:
        lines += ["", "## On the machine it was found on", ""]
        lines += [f"- {name}: {plain(value)}" for name, value in found["machine"].items()]
    lines += ["", "All that was measured: report.html, tune.json.", ""]
    return "\n".join(lines)


def page(found: dict[str, Any]) -> str:
    """report.html of the folder, likewise."""
    promise = found["promise"]["text"] if found["promise"] is not None else "Nothing is promised."
    body = [f"<p><b>{escape(promise)}</b></p>", f"<p>{escape(found['reason'])}</p>"]
    if found["chosen"] is not None:
        body.append(pairs(found["chosen"]))
    body += ["<h2>Drop over cost</h2>", _plot(found["table"], found["chosen"])]
    if found["machine"] is not None:
        body += ["<h2>On this machine</h2>", pairs(found["machine"])]
    body += ["<h2>All that was measured</h2>", _table(found["table"])]
    body += ["<h2>How</h2>", pairs(found["about"])]
    return page_frame("DARE: does it pay?", "Does it pay on these rows?", "".join(body))


def _table(table: list[dict[str, Any]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name, _ in _COLUMNS) + "<th>95 %</th>"
    rows = []
    for line in sorted(table, key=lambda line: (line["share"] != "held-out", line["flops_ratio"])):
        cells = "".join(f"<td>{escape(form.format(line[name]))}</td>" for name, form in _COLUMNS)
        low, high = line["interval"]
        kind = "held" if line["share"] == "held-out" else "fit"
        rows.append(f'<tr class="{kind}">{cells}<td>{low:.1f} to {high:.1f}</td></tr>')
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _plot(table: list[dict[str, Any]], chosen: dict[str, Any] | None) -> str:
    """A dot a configuration: what it costs to the right, what it loses upwards."""
    most = max([1.0, *(line["drop"] for line in table)])
    dots = []
    for line in table:
        cost = min((line["flops_ratio"] + line["kv_ratio"]) / 2, 1.1)
        x = _EDGE + cost / 1.1 * (_WIDTH - 2 * _EDGE)
        y = _HEIGHT - _EDGE - max(line["drop"], 0) / most * (_HEIGHT - 2 * _EDGE)
        held = line["share"] == "held-out"
        mine = held and chosen is not None and line["drop"] == chosen["drop"]
        mine = mine and line["flops_ratio"] == chosen["flops_ratio"]
        fill = "var(--mark)" if mine else "var(--fill)" if held else "#999"
        label = f"{line['family']}: cost {cost:.2f}, drop {line['drop']:.1f} ({line['share']})"
        dots.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{6 if mine else 4}" style="fill:{fill}">'
            f"<title>{escape(label)}</title></circle>"
        )
    words = (
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 10}">cost: mean share of FLOPs and KV bytes, 0 to '
        f'1.1</text><text x="8" y="20">drop, 0 to {most:.1f} points</text>'
    )
    return (
        '<svg class="panel" role="img" aria-label="Drop over cost" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" font-size="13">{"".join(dots)}'
        f"{words}</svg><p>Grey: fit share. Blue: held out. Red: chosen.</p>"
    )
