"""A report as one HTML page: pictures inside, nothing from elsewhere, light and dark, for any width.

Pure functions from values to markup. All text that comes from outside passes `escape`.
"""

import base64
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from hashlib import sha256
from html import escape
from pathlib import Path

from trainer.report.look import CSS, SCRIPT

UNKNOWN = "\N{EN DASH}"
# The browser itself sees to it that the page asks nothing of the network and runs no other script than its own.
_POLICY = "; ".join(
    [
        "default-src 'none'",
        "img-src data:",
        "style-src 'unsafe-inline'",
        f"script-src 'sha256-{base64.b64encode(sha256(SCRIPT.encode()).digest()).decode()}'",
    ]
)


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of the page; `body` is markup, everything else text."""

    title: str
    body: str
    caption: str = ""


@dataclass(frozen=True)
class Markup:
    """A table cell that is markup already."""

    html: str


Cell = str | float | int | Markup


def page(title: str, subtitle: str, tiles: Sequence[tuple[str, str]], sections: Sequence[Section]) -> str:
    """Return the whole document; `tiles` are (label, value) of the headline numbers."""
    numbers = "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>" for label, value in tiles)
    links = "".join(
        f'<li><a href="#part-{number}">{escape(part.title)}</a></li>' for number, part in enumerate(sections, start=1)
    )
    parts = "\n".join(
        f'<section id="part-{number}"><h2>{escape(part.title)}</h2>\n'
        + (f"<p>{escape(part.caption)}</p>\n" if part.caption else "")
        + f"{part.body}</section>"
        for number, part in enumerate(sections, start=1)
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{escape(title)}</h1>\n<p>{escape(subtitle)}</p>\n<dl class="tiles">{numbers}</dl>\n'
        f'<nav aria-label="Parts of this page"><ul>{links}</ul></nav>\n'
        f"{parts}\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def picture(path: Path, description: str) -> str:
    """Return an image that carries the PNG at `path` inside; it scrolls where the window is narrow."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return _scroll(f'<img alt="{escape(description)}" src="data:image/png;base64,{data}">', description)


def chart(path: Path, description: str) -> str:
    """Return a picture of lines and letters alone, which shine brighter on a dark page."""
    return f'<div class="chart">{picture(path, description)}</div>\n'


def slides(label: str, parts: Sequence[tuple[str, str]]) -> str:
    """Return (name, markup) pairs of which a slider shows one at a time; `label` says what it chooses."""
    bodies = "".join(
        f'<div class="slide" data-name="{escape(name)}"><h3>{escape(name)}</h3>\n{body}</div>\n' for name, body in parts
    )
    return f'<div class="slides" data-label="{escape(label)}">\n{bodies}</div>\n'


def missing(what: str, remedy: str) -> str:
    """Return a visible note that a part could not be made, and what makes it."""
    return f'<p class="missing">Missing: {escape(what)}. {escape(remedy)}</p>\n'


def note(text: str) -> str:
    """Return a plain line, for what there is nothing to show of."""
    return f"<p>{escape(text)}</p>\n"


def table(headers: Sequence[str], rows: Sequence[Sequence[Cell]], *, right: Collection[str] = ()) -> str:
    """Return a table; numbers are rounded to four digits, the columns named in `right` are right-aligned."""
    style = [' class="number"' if header in right else "" for header in headers]
    head = "".join(f'<th scope="col"{kind}>{escape(text)}</th>' for text, kind in zip(headers, style, strict=True))
    body = "\n".join(
        "<tr>" + "".join(f"<td{kind}>{_cell(cell)}</td>" for cell, kind in zip(row, style, strict=True)) + "</tr>"
        for row in rows
    )
    markup = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"
    return _scroll(markup, f"table: {', '.join(filter(None, headers))}")


def verdict(good: bool | None, yes: str, no: str) -> Markup:
    """Return `yes` or `no` as coloured words with a mark; None becomes a dash."""
    if good is None:
        return Markup(UNKNOWN)
    return Markup(f'<span class="good">✓ {escape(yes)}</span>' if good else f'<span class="bad">✗ {escape(no)}</span>')


def bars(parts: Sequence[tuple[str, int, int]]) -> Markup:
    """Return one small bar per (name, kept, total), the names as tooltips, and the sum in words."""
    strips = "".join(
        f'<i title="{escape(name)}: {kept} of {total}"><b style="height:{100 * kept / total:.0f}%"></b></i>'
        for name, kept, total in parts
    )
    kept_all, total_all = sum(part[1] for part in parts), sum(part[2] for part in parts)
    return Markup(f'<span class="bars">{strips}</span> {kept_all} of {total_all}')


def shares(parts: Sequence[tuple[str, float]]) -> Markup:
    """Return names with their shares in percent, one below the other, each over a strip as long as its share."""
    return Markup(
        "".join(
            f'<span class="share" style="--share:{100 * share:.0f}%"><b>{escape(name)}</b> {100 * share:.0f} %</span>'
            for name, share in parts
        )
    )


def number(value: float) -> str:
    """Return a number with four significant digits; a dash where it is not known."""
    if not math.isfinite(value):
        return UNKNOWN
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def quantity(value: float) -> str:
    """Return a count with a decimal prefix: 12.3 M, 4.56 G."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * factor:  # what rounds up to the factor belongs to it
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g}"


def percent(fraction: float, *, signed: bool = False) -> str:
    """Return a fraction in percent with two decimals; a dash where it is not known."""
    if not math.isfinite(fraction):
        return UNKNOWN
    return f"{100 * fraction:+.2f} %" if signed else f"{100 * fraction:.2f} %"


def details(summary: str, text: str) -> str:
    """Return preformatted text that opens on a click."""
    return folded(summary, f'<pre tabindex="0">{escape(text)}</pre>')


def folded(summary: str, body: str) -> str:
    """Return markup that opens on a click."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>\n"


def _scroll(markup: str, name: str) -> str:
    """Return a box that scrolls on its own, by keyboard too, instead of the whole page."""
    return f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(name)}">{markup}</div>\n'


def _cell(cell: Cell) -> str:
    if isinstance(cell, Markup):
        return cell.html
    return escape(cell) if isinstance(cell, str) else number(cell)
