"""The report as one HTML page: pictures inside, no script, no font from elsewhere, light and dark.

Pure functions from values to markup. All text that comes from outside passes `escape`.
"""

import base64
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

UNKNOWN = "\N{EN DASH}"
_CSS = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --text: #1c2128; --soft: #5d6673; --line: #dfe3e8;
  --accent: #0072b2; --good: #00785a; --bad: #b84a00; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1115; --card: #171a21; --text: #e4e8ee; --soft: #98a2b0;
  --line: #2b303a; --accent: #56b4e9; --good: #2cc295; --bad: #f08c4a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 40px 20px 80px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.02em; }
h2 { font-size: 19px; margin: 0 0 4px; letter-spacing: -0.01em; }
p { margin: 0 0 14px; color: var(--soft); max-width: 78ch; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 22px 24px;
  margin-top: 20px; }
.tiles { display: flex; flex-wrap: wrap; gap: 10px 34px; margin: 18px 0 0; }
.tiles dt { color: var(--soft); font-size: 12.5px; }
.tiles dd { margin: 0; font-size: 21px; font-weight: 600; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; font-size: 12.5px; color: var(--soft); }
th, td { padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); white-space: nowrap; vertical-align: middle; }
tr:last-child td { border-bottom: 0; }
th.number, td.number { text-align: right; }
img { display: block; max-width: 100%; height: auto; margin: 10px 0 18px; }
.good { color: var(--good); font-weight: 600; }
.bad { color: var(--bad); font-weight: 600; }
.missing { border-left: 3px solid var(--bad); padding-left: 12px; margin: 8px 0; }
.bars { display: inline-flex; align-items: flex-end; gap: 2px; height: 26px; vertical-align: middle; }
.bars i { display: block; width: 6px; background: var(--line); height: 100%; position: relative; }
.bars i b { position: absolute; bottom: 0; left: 0; right: 0; background: var(--accent); }
.share { display: block; width: 100px; padding: 0 6px; margin: 1px 0; font-size: 12.5px;
  background: linear-gradient(to right, color-mix(in srgb, var(--accent) 28%, transparent) var(--share), transparent 0);
}
summary { cursor: pointer; color: var(--accent); margin-top: 10px; }
pre { overflow-x: auto; background: var(--page); border: 1px solid var(--line); border-radius: 8px; padding: 14px;
  font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
"""


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
    parts = "\n".join(
        f"<section><h2>{escape(part.title)}</h2>\n"
        + (f"<p>{escape(part.caption)}</p>\n" if part.caption else "")
        + f"{part.body}</section>"
        for part in sections
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{escape(title)}</h1>\n<p>{escape(subtitle)}</p>\n<dl class="tiles">{numbers}</dl>\n'
        f"{parts}\n</main>\n</body>\n</html>\n"
    )


def picture(path: Path, description: str) -> str:
    """Return an image element that carries the PNG at `path` inside."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="{escape(description)}" src="data:image/png;base64,{data}">\n'


def missing(what: str, remedy: str) -> str:
    """Return a visible note that a part could not be made, and what makes it."""
    return f'<p class="missing">Missing: {escape(what)}. {escape(remedy)}</p>\n'


def note(text: str) -> str:
    """Return a plain line, for what there is nothing to show of."""
    return f"<p>{escape(text)}</p>\n"


def table(headers: Sequence[str], rows: Sequence[Sequence[Cell]], *, right: Collection[str] = ()) -> str:
    """Return a table; numbers are rounded to four digits, the columns named in `right` are right-aligned."""
    style = [' class="number"' if header in right else "" for header in headers]
    head = "".join(f"<th{kind}>{escape(text)}</th>" for text, kind in zip(headers, style, strict=True))
    body = "\n".join(
        "<tr>" + "".join(f"<td{kind}>{_cell(cell)}</td>" for cell, kind in zip(row, style, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>\n'


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
    return folded(summary, f"<pre>{escape(text)}</pre>")


def folded(summary: str, body: str) -> str:
    """Return markup that opens on a click."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>\n"


def _cell(cell: Cell) -> str:
    if isinstance(cell, Markup):
        return cell.html
    return escape(cell) if isinstance(cell, str) else number(cell)
