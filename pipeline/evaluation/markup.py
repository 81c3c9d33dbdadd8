"""Text -> HTML that is safe to open: escaping, the page around the fragments, its colours."""

import html
import re
from collections.abc import Mapping
from numbers import Integral, Real

import numpy as np

# The browser itself then holds the promise: no script runs and nothing is fetched, whatever a class is called.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

STYLE = """
:root { color-scheme: light dark; --paper: #fbfbfc; --card: #fff; --ink: #1c2430; --soft: #5d6877; --line: #dde2e9;
  --accent: 37 99 235; --wrong: 217 70 39; --bad: #c2361b; --good: #15803d;
  --series-0: #2563eb; --series-1: #d9591c; --series-2: #12906b; --series-3: #9245d6; --series-4: #b7860b;
  --series-5: #d02c7f; }
@media (prefers-color-scheme: dark) { :root { --paper: #12161c; --card: #1a2028; --ink: #e4e9f0; --soft: #98a4b3;
  --line: #323b47; --accent: 76 139 255; --wrong: 240 100 60; --bad: #ff8a6b; --good: #5bd08a;
  --series-0: #6ea2ff; --series-1: #ff9a5c; --series-2: #48cfa2; --series-3: #c08cff; --series-4: #e3bb4a;
  --series-5: #ff78b4; } }
* { box-sizing: border-box; }
html { font: clamp(15px, 12px + .3vw, 24px)/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
body { margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: anywhere; }
main { max-width: 78rem; margin: 0 auto; padding: clamp(1rem, 4vw, 3rem); }
header { margin-bottom: 1.5rem; }
h1 { font-size: clamp(1.6rem, 5vw, 2.4rem); line-height: 1.15; letter-spacing: -.02em; margin: 0 0 .4rem; }
header p, .note, figcaption small { color: var(--soft); }
header p { margin: 0; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin-top: 1rem; }
a { color: var(--series-0); text-decoration: none; }
a:hover { text-decoration: underline; }
section { margin: 2.5rem 0; }
h2 { font-size: 1.3rem; letter-spacing: -.01em; margin: 0 0 .8rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .6rem; }
figure { margin: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 9.5rem), 1fr)); gap: .8rem;
  margin: 0; }
.tiles div { display: flex; flex-direction: column; justify-content: space-between; }
.tiles div, .plot, .box { background: var(--card); border: 1px solid var(--line); border-radius: .7rem; }
.tiles div { padding: .8rem 1rem; }
.tiles dt { color: var(--soft); font-size: .85rem; }
.tiles dd { margin: 0; font-size: 1.55rem; font-weight: 650; letter-spacing: -.02em; line-height: 1.2; }
.tiles .long { font-size: 1.1rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: .8rem;
  margin: .8rem 0; }
.plots.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); }
.plot { padding: .8rem; }
.plot svg { display: block; width: 100%; height: auto; margin-top: .4rem; }
.plot svg * { stroke-linejoin: round; stroke-linecap: butt; }
.plot svg text { font-family: system-ui, sans-serif !important; }
.bad { color: var(--bad); }
.box { overflow: auto; max-width: 100%; width: fit-content; max-height: 40rem; padding: 0; }
table { border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .35rem .8rem; text-align: right; border-bottom: 1px solid var(--line); }
tr:last-child > * { border-bottom: 0; }
thead th { position: sticky; top: 0; z-index: 1; background: var(--card); color: var(--soft); font-weight: 500; }
th:first-child, td.name { text-align: left; }
th, td, dt, dd, figcaption b { unicode-bidi: isolate; }
td.name, tbody th { min-width: 6rem; max-width: 16rem; overflow-wrap: anywhere; font-weight: 500; }
.meter { min-width: 7rem; }
.meter i { display: block; height: .5rem; border-radius: .25rem; background: rgb(var(--accent)); }
.confusion td { padding: .2rem; min-width: 2.4em; height: 2.2em; text-align: center; border: 1px solid var(--card); }
.confusion td.zero { color: var(--line); }
.confusion td.deep { color: #fff; }
.confusion th { padding: .3rem .6rem; }
.confusion thead th { vertical-align: bottom; text-align: center; }
.confusion thead th span { display: inline-block; max-height: 9rem; overflow: hidden; white-space: nowrap; }
.confusion thead th.tall span { writing-mode: vertical-rl; transform: rotate(180deg); }
.confusion tbody th { position: sticky; left: 0; background: var(--card); min-width: 5rem; max-width: 9rem; }
.confusion th:first-child { text-align: right; }
.pixels { image-rendering: pixelated; }
.heat { display: block; width: 36rem; max-width: 100%; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.2rem, 1fr)); gap: .8rem; }
.gallery figcaption { font-size: .85rem; line-height: 1.3; margin-top: .35rem; }
.gallery img { display: block; width: 100%; height: auto; aspect-ratio: 1; object-fit: contain;
  background: rgb(128 128 128 / .12); border-radius: .5rem; border: 2px solid var(--good); }
.gallery b { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 4; overflow: hidden; }
.gallery .wrong img { border-color: var(--bad); }
.facts { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .25rem 1.2rem; margin: 0; }
.facts dt { color: var(--soft); max-width: 16rem; }
.facts dd { margin: 0; min-width: 0; }
.facts dd > .facts { border-left: 2px solid var(--line); padding-left: .8rem; }
.bars { display: flex; align-items: flex-end; gap: 1px; height: 8rem; margin-top: .8rem;
  border-bottom: 1px solid var(--line); }
.bars i { flex: 1 1 0; min-width: 0; background: rgb(var(--accent)); border-radius: .15rem .15rem 0 0; }
.ticks { position: relative; height: 1.5em; color: var(--soft); font-size: .85rem; margin-top: .2rem; }
.ticks span { position: absolute; transform: translateX(-50%); white-space: nowrap; }
.ticks span:first-child { transform: none; }
.ticks .end { transform: translateX(-100%); }
.strips { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); gap: 1rem 1.6rem; }
.strip div { display: grid; grid-template-columns: repeat(8, minmax(0, 1fr)); gap: .3rem; margin-top: .25rem; }
.strip img, .thumb img { display: block; width: 100%; height: auto; aspect-ratio: 1; object-fit: contain;
  background: rgb(128 128 128 / .12); border: 1px solid var(--line); border-radius: .3rem; }
.strip.wide { grid-column: 1 / -1; }
.strip.wide div { grid-template-columns: repeat(auto-fill, minmax(4.5rem, 1fr)); }
.list th, .list td { text-align: left; max-width: 28rem; }
.list td:last-child { min-width: 12rem; overflow-wrap: anywhere; }
.list td.thumb { width: 5.5rem; min-width: 4rem; padding: .3rem .5rem; }
.warning { border-left: .3rem solid var(--bad); padding: .4rem .9rem; background: var(--card); }
.sheet { max-width: 100%; height: auto; border-radius: .5rem; }
@media (max-width: 30rem) { .facts:has(.facts) { grid-template-columns: 1fr; }
  .gallery { grid-template-columns: repeat(3, 1fr); } .strip div { grid-template-columns: repeat(4, 1fr); }
  th, td { padding: .3rem .5rem; } }
@media print { .box { max-height: none; } section { break-inside: avoid; } }
"""


def page(title: str, subtitle: str, sections: list[tuple[str, str]]) -> str:
    """A whole HTML document that needs no other file and no network. The same arguments give the same text.

    sections: (heading, HTML fragment) pairs; headings are escaped, fragments are taken as they are, and a section with
    an empty heading stands without one (and out of the table of contents).
    """
    links = "".join(f'<a href="#part-{n}">{escaped(head)}</a>' for n, (head, _) in enumerate(sections) if head)
    body = "".join(
        f'<section id="part-{n}">{f"<h2>{escaped(head)}</h2>" if head else ""}{fragment}</section>\n'
        for n, (head, fragment) in enumerate(sections)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<header><h1>{escaped(title)}</h1><p>{escaped(subtitle)}</p><nav>{links}</nav></header>\n"
        f"{body}</main>\n</body>\n</html>\n"
    )


def headline(tiles: list[tuple[str, object]]) -> str:
    """(label, value) pairs -> the large numbers a page opens with; values are shown as by `shown`."""
    cells = "".join(
        f'<div><dt>{escaped(label)}</dt><dd class="{"long" if len(shown(value)) > 8 else "short"}">'
        f"{escaped(shown(value))}</dd></div>"
        for label, value in tiles
    )
    return f'<dl class="tiles">{cells}</dl>'


def facts(mapping: Mapping) -> str:
    """Names and values, nested mappings inset, as a definition list; values are shown as by `shown`."""
    lines = "".join(
        f"<dt>{escaped(name)}</dt><dd>{facts(value) if isinstance(value, Mapping) else escaped(shown(value))}</dd>"
        for name, value in mapping.items()
    )
    return f'<dl class="facts">{lines}</dl>' if lines else '<p class="note">none</p>'


def table(columns: list[str], rows: list[str], kind: str = "") -> str:
    """Column names, which are escaped, and rows of HTML (`<tr>...</tr>`) -> a table that scrolls in its box.

    kind: its class in STYLE; list: of text rather than numbers.
    """
    head = "".join(f'<th scope="col">{escaped(name)}</th>' for name in columns)
    return boxed(f"<tr>{head}</tr>", rows, kind)


def boxed(head: str, rows: list[str], kind: str = "") -> str:
    """The same with the head as HTML too."""
    # tabindex: what scrolls must be within a keyboard's reach.
    return (
        f'<div class="box" tabindex="0"><table class="{kind}"><thead>{head}</thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def shown(value: object) -> str:
    """A value as people read it: 1,234,567; 0.9312; yes; — for None; the first twenty of a list and how many more."""
    if value is None:
        return "—"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, Integral):
        return f"{value:,}"
    if isinstance(value, Real):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
    if isinstance(value, list | tuple | np.ndarray):
        more = f" … and {len(value) - 20:,} more" if len(value) > 20 else ""
        return (", ".join(shown(item) for item in value[:20]) or "none") + more
    return printable(value)


def printable(value: object) -> str:
    """Any value as text that every encoder takes: lone surrogates and control characters become U+FFFD."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", str(value))


def escaped(value: object) -> str:
    """Any value as text that cannot become markup, in an element or in a quoted attribute."""
    return html.escape(printable(value), quote=True)
