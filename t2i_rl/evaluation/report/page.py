"""The frame of a report: one HTML file with its style inside, light and dark, that takes nothing from the network."""

from collections.abc import Mapping
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #656d76; --paper: #ffffff; --panel: #f6f8fa; --line: #d8dee4;
  --right: #1a7f37; --wrong: #cf222e;
  --c0: #0969da; --c1: #bc4c00; --c2: #1a7f37; --c3: #8250df; --c4: #bf3989; --c5: #57606a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #8d96a0; --paper: #0d1117; --panel: #161b22;
  --line: #30363d; --right: #3fb950; --wrong: #f85149;
  --c0: #58a6ff; --c1: #f0883e; --c2: #3fb950; --c3: #bc8cff; --c4: #f778ba; --c5: #9ea7b3; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 1180px; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.45rem; line-height: 1.25; margin: 0 0 .5rem; font-weight: 650; }
h2 { font-size: 1.1rem; margin: 2.6rem 0 .3rem; font-weight: 650; }
p { margin: .3rem 0 .8rem; max-width: 75ch; }
.note { max-width: 105ch; }
.note, figcaption, .legend { color: var(--soft); font-size: .84rem; }
.lead { font-size: 1.08rem; border-left: 3px solid var(--c0); padding: .15rem 0 .15rem .9rem; margin: 1rem 0 1.4rem; }
code, pre { font: .82rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 6px; padding: .8rem 1rem;
  overflow-x: auto; overflow-wrap: normal; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1.2rem; margin: .8rem 0; font-size: .9rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; margin: .6rem 0; }
th, td { padding: .34rem .9rem .34rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; } th:first-child, td:first-child { text-align: left; }
td .range { color: var(--soft); } td.real { font-weight: 650; } td.real .range { font-weight: 400; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 1.4rem 1.6rem;
  margin-top: .8rem; }
.chart { margin: 0; } .chart figcaption { color: var(--ink); font-weight: 550; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 10.5px; }
.rule { stroke: var(--line); stroke-width: 1; }
polyline { fill: none; stroke-width: 1.7; stroke-linejoin: round; } .faint { stroke-width: 1; opacity: .28; }
.legend { list-style: none; margin: .2rem 0 0; padding: 0 0 0 8px; display: flex; flex-wrap: wrap; gap: .1rem 1rem; }
.legend li::before { content: ""; display: inline-block; width: .8rem; height: 3px; border-radius: 2px;
  margin-right: .4rem; vertical-align: middle; background: var(--key); }
.sets { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--set)), 1fr));
  gap: 1.6rem 1.4rem; margin-top: .9rem; }
.set h3 { font-size: .92rem; font-weight: 600; margin: 0 0 .35rem; }
.row { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(120px, 180px); gap: .8rem; overflow-x: auto; }
.row figure { margin: 0; }
.row img { display: block; width: 100%; border: 3px solid var(--wrong); border-radius: 4px; }
img.pixels { image-rendering: pixelated; } .figure { max-width: none; } .figure img { max-width: 100%; }
.row .strict img { border-color: var(--right); }
.row figcaption { line-height: 1.4; margin-top: .25rem; overflow-wrap: anywhere; }
.row b { color: var(--ink); font-weight: 600; }
.bad { color: var(--wrong); } .good { color: var(--right); }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--soft); }
a { color: var(--c0); }
@media (max-width: 640px) { body { padding: 1.2rem .8rem 3rem; }
  dl { grid-template-columns: fit-content(45%) minmax(0, 1fr); } dt { overflow-wrap: anywhere; }
  table { font-size: .8rem; } th, td { padding-right: .5rem; vertical-align: top; }
  th { white-space: normal; overflow-wrap: break-word; }
  td:first-child { white-space: normal; min-width: 5rem; max-width: 34vw; overflow-wrap: break-word; }
  td .range { display: block; } }
""" + "".join(f".c{n} {{ stroke: var(--c{n}); }} .k{n} {{ --key: var(--c{n}); }}\n" for n in range(6))


def page(title: str, body: str) -> str:
    """A whole HTML document; `title` is escaped here, `body` is HTML already."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def definitions(items: Mapping[str, object]) -> str:
    """Names and values in two columns."""
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in items.items()) + "</dl>"


def section(title: str, note: str, content: str) -> str:
    """A headed part of the page; `content` is HTML already."""
    return f'<section><h2>{escape(title)}</h2><p class="note">{escape(note)}</p>{content}</section>'


def folded(title: str, text: str) -> str:
    """Long text behind a title that opens it."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"
