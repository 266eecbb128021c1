"""The page of one generate: numbers, pictures and what each layer held, in one file."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from dare_hf.errors import DareInputError
from dare_hf.report.frame import page_frame
from dare_hf.report.groups import layer_groups
from dare_hf.report.report import MODALITIES, amount, cost_rows, ratio, same_as_prompt

if TYPE_CHECKING:
    from PIL.Image import Image

    from dare_hf.report.groups import LayerGroup
    from dare_hf.report.report import DareReport

    Held = Mapping[int, np.ndarray]

_SIDE, _GAP = 96, 8  # of a thumbnail, in pixels
_CELL = (54, 22)  # of a cell of the retention charts
_MOST_PIXELS = 512  # a picture's longer side; a page shall stay small
_FADE = 0.88  # opacity of what covers a patch that no layer of the group holds


@dataclass(frozen=True)
class SeenImage:
    """A picture of a run, and which of its patches each layer held.

    Attributes:
        image: The picture.
        caption: What to call it.
        held: By hop a bool [layers, down, across]: whether the layer held the patch when the hop
            began. Empty where nobody knows how the picture's tokens lie in it.
    """

    image: Image
    caption: str
    held: Held = field(default_factory=dict)


def report_page(
    report: DareReport,
    *,
    answer: str | None = None,
    images: Sequence[SeenImage] = (),
    title: str = "One generate with DARE",
) -> str:
    """The page that `DareReport.to_html` returns; arguments as there."""
    body = [f'<p class="soft">{_hops(report.hops)}, {report.seconds:.2f} s</p>']
    if answer is not None:
        body += ["<h2>Answer</h2>", f'<pre class="panel">{escape(answer)}</pre>']
    body += ["<h2>What it cost</h2>", _costs(report)]
    if images:
        body += ["<h2>What the layers held of the pictures</h2>", *_pictures(images)]
    if report.retention:
        body += ["<h2>What each layer held when each hop began</h2>", *_retention(report)]
    body += ["<h2>Tokens by hop</h2>", _tokens(report)]
    if any(report.skipped_layers):
        skipped = ", ".join(f"layer {i}: {n}" for i, n in enumerate(report.skipped_layers) if n)
        body.append(f"<p>Layer runs skipped by sampled tokens: {skipped}</p>")
    if report.notes:
        notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
        body += ["<h2>Notes</h2>", f"<ul>{notes}</ul>"]
    return page_frame(title, title, "".join(body))


def _hops(count: int) -> str:
    return f"{count} hop{'s' * (count != 1)}"


def _number(value: int, unit: str) -> str:
    """A count for people, and exactly for programs."""
    return f'<data value="{value}">{amount(value, unit)}</data>'


def _costs(report: DareReport) -> str:
    rows = [
        f"<tr><td>{name}</td><td>{_number(got, unit)}</td><td>{_number(full, unit)}</td>"
        f"<td>{ratio(got, full)}</td><td>{_bar(got, full, name)}</td></tr>"
        for name, got, full, unit in cost_rows(report)
    ]
    predicted = ""
    if report.kv_bytes_predicted != report.kv_bytes:
        predicted = f"<p>Predicted KV cache: {_number(report.kv_bytes_predicted, 'B')}</p>"
    head = "<tr><th></th><th>with DARE</th><th>unpruned</th><th>ratio</th><th></th></tr>"
    return f'<div class="wide"><table>{head}{"".join(rows)}</table></div>{predicted}'


def _bar(got: int, full: int, name: str) -> str:
    """The ratio as a bar; the frame is the unpruned run."""
    if not full:
        return ""
    width = min(got / full, 1) * 160
    return (
        f'<svg role="img" aria-label="{name}: {ratio(got, full)} of unpruned" viewBox="0 0 160 14" '
        f'width="160" height="14"><rect width="{width:.1f}" height="14" style="fill:var(--fill)"/>'
        '<rect x=".5" y=".5" width="159" height="13" style="fill:none;stroke:var(--line)"/></svg>'
    )


def _tokens(report: DareReport) -> str:
    counts = [report.tokens[name] for name in ("vision", "text")]
    rows = [
        f"<tr><td>{hop}</td>"
        + "".join(f"<td>{c[hop] if hop < len(c) else 0}</td>" for c in counts)
        + "</tr>"
        for hop in range(report.hops)
    ]
    head = "<tr><th>hop</th><th>vision</th><th>text</th></tr>"
    return f'<div class="wide"><table>{head}{"".join(rows)}</table></div>'


def _retention(report: DareReport) -> list[str]:
    """A chart for each modality: layers down, hops across."""
    shown = [hop for hop in range(len(report.retention)) if not same_as_prompt(report, hop)]
    charts = [_chart(report, shown, name) for name in reversed(MODALITIES)]
    words = '<p class="soft">Share of the tokens so far that the layer holds; hop 0 is the prompt.'
    if len(shown) < len(report.retention):
        words += " Hop 1 begins with what is held after it."
    return [f"{words}</p>", '<div class="wide">', *charts, "</div>"]


def _chart(report: DareReport, hops: Sequence[int], name: str) -> str:
    wide, high = _CELL
    layers = len(report.retention[0])
    width, height = 60 + wide * len(hops), 40 + high * layers
    parts = [f'<text x="0" y="14" font-weight="600">{name}</text>']
    parts += [
        f'<text x="{60 + wide * (at + 0.5)}" y="34" text-anchor="middle">hop {hop}</text>'
        for at, hop in enumerate(hops)
    ]
    for layer in range(layers):
        y = 40 + high * layer
        parts.append(f'<text x="52" y="{y + 15}" text-anchor="end">{layer}</text>')
        for at, hop in enumerate(hops):
            share = report.retention[hop][layer][name]
            if share is not None:
                parts.append(_cell(60 + wide * at, y, share, f"hop {hop}, layer {layer}, {name}"))
    return (
        f'<svg role="img" aria-label="{name} held, by layer and hop" viewBox="0 0 {width} {height}"'
        f' width="{width}" font-size="12">{"".join(parts)}</svg> '
    )


def _cell(x: float, y: float, share: float, where: str) -> str:
    wide, high = _CELL
    # Ink over a half-clear fill is readable in light and in dark.
    return (
        f'<g><title>{where}: {share!r}</title><rect x="{x}" y="{y}" width="{wide - 2}" '
        f'height="{high - 2}" style="fill:var(--fill)" fill-opacity="{share * 0.6:.3f}"/>'
        f'<text x="{x + wide / 2 - 1}" y="{y + 15}" text-anchor="middle">{share:.0%}</text></g>'
    )


def _pictures(images: Sequence[SeenImage]) -> list[str]:
    parts = [
        '<p class="soft">Clear: all layers of the group held the patch when the hop began; covered:'
        " none did.</p>"
    ]
    for number, seen in enumerate(images):
        _check(number, seen)
        name = escape(seen.caption)
        parts.append(f"<h3>{name}</h3>")
        if seen.held:
            parts.append(_thumbnails(number, seen))
            continue
        picture = _defined(seen.image, "")
        width, height = _size(seen.image)
        parts.append(
            f'<svg role="img" aria-label="{name}" viewBox="0 0 {width} {height}" width="{width}">'
            f'{picture}</svg><p class="soft">How its tokens lie in the picture is not known for '
            "this model: the charts below have what was held.</p>"
        )
    return parts


def _check(number: int, seen: SeenImage) -> None:
    for hop, held in seen.held.items():
        if np.ndim(held) != 3:
            raise DareInputError(
                f"images[{number}].held[{hop}]: expected bool [layers, down, across]; got shape "
                f"{list(np.shape(held))}"
            )


def _size(image: Image) -> tuple[int, int]:
    """Width and height of a thumbnail; its longer side is `_SIDE`."""
    scale = _SIDE / max(image.size)
    return max(round(image.width * scale), 1), max(round(image.height * scale), 1)


def _defined(image: Image, name: str) -> str:
    """The picture as an SVG image of a thumbnail's size, in the page itself."""
    small = image.convert("RGB")
    small.thumbnail((_MOST_PIXELS, _MOST_PIXELS))
    file = io.BytesIO()
    small.save(file, "PNG", optimize=True)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    width, height = _size(image)
    smooth = "auto" if max(image.size) > _SIDE else "pixelated"
    mark = f'id="{name}" ' if name else ""
    return (
        f'<image {mark}width="{width}" height="{height}" preserveAspectRatio="none" '
        f'style="image-rendering:{smooth}" href="data:image/png;base64,{data}"/>'
    )


def _thumbnails(number: int, seen: SeenImage) -> str:
    """Groups of layers down, hops across; the picture is in the page once."""
    width, height = _size(seen.image)
    groups = layer_groups(len(next(iter(seen.held.values()))))
    parts, left = [f"<defs>{_defined(seen.image, f'picture{number}')}</defs>"], 130
    for at, hop in enumerate(sorted(seen.held)):
        x = left + at * (width + _GAP)
        parts.append(f'<text x="{x + width / 2}" y="12" text-anchor="middle">hop {hop}</text>')
        for row, group in enumerate(groups):
            y = 18 + row * (height + _GAP)
            parts.append(_thumbnail(number, seen, hop, group, (x, y)))
            if not at:
                parts.append(f'<text x="0" y="{y + height / 2}">{group.label}</text>')
    wide = left + len(seen.held) * (width + _GAP)
    high = 18 + len(groups) * (height + _GAP)
    return (
        f'<div class="wide"><svg role="img" aria-label="{escape(seen.caption)}: held by layers and '
        f'hops" viewBox="0 0 {wide} {high}" width="{wide}" style="max-width:none" font-size="12">'
        f"{''.join(parts)}</svg></div>"
    )


def _thumbnail(
    number: int, seen: SeenImage, hop: int, group: LayerGroup, place: tuple[float, float]
) -> str:
    share = np.asarray(seen.held[hop])[group.first : group.stop].mean(axis=0)
    down, across = share.shape
    width, height = _size(seen.image)
    covers = []
    for level in np.unique(share[share < 1]):
        # One path a level: a page of many hops would else hold a rectangle for every patch.
        squares = "".join(f"M{x} {y}h1v1h-1z" for y, x in np.argwhere(share == level))
        covers.append(
            f'<path d="{squares}" transform="scale({width / across:.4f} {height / down:.4f})" '
            f'style="fill:var(--paper)" fill-opacity="{_FADE * (1 - level):.3f}"/>'
        )
    return (
        f'<g transform="translate({place[0]} {place[1]})"><title>{group.label}, hop {hop}: '
        f'{share.mean():.1%} held</title><use href="#picture{number}"/>{"".join(covers)}'
        f'<rect width="{width}" height="{height}" style="fill:none;stroke:var(--line)"/></g>'
    )
