"""One self-contained HTML page: opens offline, loads nothing, reads well in light and in dark."""

from base64 import b64encode
from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --paper: #fff; --quiet: #63636b; --line: #d9d9de;
  --panel: #f5f5f7; --good: #1a7f37; --marginal: #9a6700; --poor: #c62828;
  --c0: #2563eb; --c1: #d9480f; --c2: #2b8a3e; --c3: #9c36b5; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececf0; --paper: #17171a; --quiet: #a5a5ae;
  --line: #3a3a42; --panel: #222227; --good: #4ac26b; --marginal: #d4a72c; --poor: #ff7b72;
  --c0: #79a8ff; --c1: #ff9e64; --c2: #69db7c; --c3: #da77f2; } }
body { color: var(--ink); background: var(--paper); max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2.4rem; }
p, li { max-width: 46rem; }
.numbers { display: flex; flex-wrap: wrap; gap: .8rem; }
.number { flex: 1 1 14rem; background: var(--panel); border-radius: .5rem; padding: .8rem 1rem; }
.number b { display: block; font-size: 1.9rem; line-height: 1.2; font-weight: 600;
  font-variant-numeric: tabular-nums; }
.number span { color: var(--quiet); font-size: .9rem; }
.good { color: var(--good); } .marginal { color: var(--marginal); } .poor { color: var(--poor); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .3rem .9rem .3rem 0;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; } td.n, th.n { text-align: right; }
figure { margin: 1rem 0; } figcaption { color: var(--quiet); font-size: .9rem; }
img { max-width: 100%; background: #fff; border-radius: .3rem; image-rendering: pixelated; }
.row { display: flex; flex-wrap: wrap; gap: 0 1rem; } .row figure { flex: 1 1 18rem; }
svg { max-width: 100%; height: auto; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
svg .grid { stroke: var(--line); } svg .axis { stroke: var(--quiet); }
"""

# Even a page that was tampered with may load nothing and run nothing.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(title: str, sections: Iterable[tuple[str, str]]) -> str:
    """A whole document. A section is (heading, HTML); without a heading it follows the title."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
    ]
    for heading, body in sections:
        if heading:
            parts.append(f"<h2>{escape(heading)}</h2>")
        parts.append(body)
    return "\n".join([*parts, "</body></html>", ""])


def paragraph(text: str, kind: str = "") -> str:
    """Plain text; `kind` is good, marginal or poor."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def numbers(items: Iterable[tuple[str, str, str]]) -> str:
    """Large figures side by side: (value, name, what it means)."""
    cells = [
        f'<div class="number"><b>{escape(value)}</b>{escape(name)}<br>'
        f"<span>{escape(meaning)}</span></div>"
        for value, name, meaning in items
    ]
    return '<div class="numbers">' + "".join(cells) + "</div>"


def table(rows: Iterable[Sequence[object]], header: Sequence[str] = ()) -> str:
    """Floats get three decimals, and numbers stand on the right."""

    def cell(value: object, tag: str = "td") -> str:
        shown = f"{value:.3f}" if isinstance(value, float) else str(value)
        side = ' class="n"' if isinstance(value, float | int) else ""
        return f"<{tag}{side}>{escape(shown)}</{tag}>"

    body = [list(row) for row in rows]
    first = body[0] if body else header
    heads = [
        f'<th class="n">{escape(name)}</th>' if isinstance(value, float | int) else cell(name, "th")
        for name, value in zip(header, first, strict=False)
    ]
    lines = ["".join(heads), *("".join(cell(value) for value in row) for row in body)]
    content = "".join(f"<tr>{line}</tr>" for line in lines if line)
    return f'<div class="scroll"><table>{content}</table></div>'


def items(lines: Iterable[str]) -> str:
    """Plain text, one below the other."""
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def picture(data: bytes, caption: str, kind: str = "png") -> str:
    """A PNG, or a picture of another kind: jpeg, webp."""
    text = b64encode(data).decode("ascii")
    image = f'<img alt="{escape(caption)}" src="data:image/{kind};base64,{text}">'
    return f'<figure><div class="scroll">{image}</div>{figcaption(caption)}</figure>'


def side_by_side(figures: Iterable[str]) -> str:
    """As many in a line as there is room for."""
    return f'<div class="row">{"".join(figures)}</div>'


def drawing(svg: str, caption: str) -> str:
    return f'<figure><div class="scroll">{svg}</div>{figcaption(caption)}</figure>'


def figcaption(caption: str) -> str:
    return f"<figcaption>{escape(caption)}</figcaption>"
