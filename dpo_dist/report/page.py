"""The report of a run as one HTML page that needs nothing beside itself.

Everything that comes from files of the run is escaped, and the page's own policy lets no script,
no font and no request through, whatever a sample says.
"""

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from dpo_dist.report import svg

Row = Sequence[Any]
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
# after svg.STYLE: its charts get this page's colors, in light and dark alike
STYLE = """
:root { color-scheme: light; --ink: #1c2430; --soft: #5b6675; --line: #e1e5ea; --paper: #ffffff;
  --wash: #f6f8fa; --faint: #5b6675; --rule: #e1e5ea; --c0: #0072b2; --c1: #d55e00; --c2: #009e73;
  --c3: #a0528a; --c4: #b3402e; --c5: #5b6675; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--wash); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 26px; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 38px 0 12px; padding-bottom: 6px;
  border-bottom: 1px solid var(--line); }
h3 { font-size: 14px; margin: 18px 0 6px; color: var(--soft); }
p { margin: 6px 0; } .soft { color: var(--soft); }
nav { margin: 10px 0 0; } nav a { margin-right: 14px; color: #0059a3; text-decoration: none; }
.facts { display: flex; flex-wrap: wrap; gap: 12px; margin: 18px 0 0; }
.fact { background: var(--paper); border: 1px solid var(--line); border-radius: 8px;
  padding: 10px 16px; min-width: 150px; }
.fact b { display: block; font-size: 20px; font-variant-numeric: tabular-nums; }
.fact span { color: var(--soft); font-size: 12.5px; }
.warning { background: #fff6e5; border: 1px solid #f0c36d; border-left-width: 5px;
  border-radius: 6px; padding: 10px 14px; margin: 12px 0; overflow-wrap: anywhere; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(420px, 1fr)); gap: 14px; }
.plots img { width: 100%; display: block; background: var(--paper); border: 1px solid var(--line);
  border-radius: 8px; }
.wide, .scroll { overflow-x: auto; background: var(--paper); border: 1px solid var(--line);
  border-radius: 8px; margin: 8px 0; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { text-align: left; vertical-align: top; padding: 6px 12px;
  border-bottom: 1px solid var(--line); min-width: 86px; }
td { overflow-wrap: anywhere; } tr:last-child td { border-bottom: 0; }
th { background: var(--wash); font-weight: 600; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; }
td.text { white-space: pre-wrap; min-width: 220px; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(480px, 1fr)); gap: 14px;
  align-items: start; }
.data h2 { font-size: 15px; margin: 24px 0 6px; border-bottom: 0; }
.data h3 { margin-top: 0; } .faint { color: var(--soft); }
.data .tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 0 0 12px; }
.data .tiles div, .data figure { background: var(--paper); border: 1px solid var(--line);
  border-radius: 8px; padding: 10px 16px; margin: 0; min-width: 120px; }
.data .tiles b { display: block; font-size: 18px; } .data .tiles span { color: var(--soft);
  font-size: 12.5px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(420px, 1fr)); gap: 14px; }
.legend { font-size: 12.5px; } .legend span { margin-right: 16px; }
.legend i { display: inline-block; width: 10px; height: 10px; margin-right: 6px; }
@media (max-width: 560px) { .plots, .charts, .columns { grid-template-columns: 1fr; } }
"""


@dataclass(frozen=True)
class Section:
    """A heading and the HTML under it, made with the functions of this module."""

    title: str
    body: str


def page(
    title: str,
    subtitle: str,
    facts: Iterable[tuple[str, str]],
    warnings: Iterable[str],
    sections: Sequence[Section],
) -> str:
    """The whole page; `facts` are (name, value) of the figures at its top."""
    links = "".join(f'<a href="#{_id(s.title)}">{escape(s.title)}</a>' for s in sections)
    boxes = "".join(
        f'<div class="fact"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
        for name, value in facts
    )
    body = "\n".join(
        f'<section><h2 id="{_id(s.title)}">{escape(s.title)}</h2>\n{s.body}</section>'
        for s in sections
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{svg.STYLE}{STYLE}</style>
</head>
<body><main>
<h1>{escape(title)}</h1>
<p class="soft">{escape(subtitle)}</p>
<nav>{links}</nav>
{"".join(f'<div class="warning">{escape(warning)}</div>' for warning in warnings)}
<div class="facts">{boxes}</div>
{body}
</main></body>
</html>
"""


def paragraph(text: str) -> str:
    """A line of explanation; also what stands in for a part that the run does not have yet."""
    return f'<p class="soft">{escape(text)}</p>\n'


def heading(text: str) -> str:
    """A heading inside a section."""
    return f"<h3>{escape(text)}</h3>\n"


def part_of(kind: str, shown: str) -> str:
    """HTML of another page, under the rules that STYLE has for its kind."""
    return f'<div class="{kind}">{shown}</div>\n'


def columns(*parts: str) -> str:
    """Parts beside each other where the window is wide enough."""
    return f'<div class="columns">{"".join(f"<div>{part}</div>" for part in parts if part)}</div>\n'


def pictures(images: Iterable[tuple[str, bytes]]) -> str:
    """(alternative text, PNG) images in a grid, inside the page itself."""
    tags = "".join(
        f'<img alt="{escape(text)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">\n'
        for text, png in images
    )
    return f'<div class="plots">\n{tags}</div>\n'


def table(head: Row, rows: Iterable[Row], texts: bool = False) -> str:
    """Numbers to the right; with `texts` the line breaks of cells are kept."""
    rows = list(rows)
    numeric = [
        bool(rows) and all(isinstance(row[i], int | float | None) for row in rows)
        for i in range(len(head))
    ]
    kinds = ["number" if n else "text" if texts else "" for n in numeric]
    top = "".join(
        f'<th class="{kind if kind == "number" else ""}">{escape(str(cell))}</th>'
        for kind, cell in zip(kinds, head, strict=True)
    )
    lines = "".join(
        f"<tr>{''.join(_cell(kind, cell) for kind, cell in zip(kinds, row, strict=True))}</tr>\n"
        for row in rows
    )
    return f'<div class="wide"><table><tr>{top}</tr>\n{lines}</table></div>\n'


def number(value: Any) -> str:
    """A number for people; "-" for none."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (abs(value) >= 1000 and abs(value) < 1e15):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def flatten(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(section.key, value) of a nested mapping; entries of a list by their position."""
    found: list[tuple[str, str]] = []
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
            value = {str(i): entry for i, entry in enumerate(value)}
        if isinstance(value, Mapping):
            found += flatten(value, f"{name}.")
        elif value is not None and value != []:
            found.append((name, number(value) if isinstance(value, float) else str(value)))
    return found


def _cell(kind: str, value: Any) -> str:
    return f'<td class="{kind}">{escape(number(value))}</td>'


def _id(title: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in title.lower())
