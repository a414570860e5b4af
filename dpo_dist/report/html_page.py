"""The frame of a self-contained HTML page; every text that is handed in is escaped."""

import html
from collections.abc import Mapping, Sequence

from dpo_dist.report import svg

_STYLE = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 24px 64px; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 40px 0 12px; }
h3 { font-size: 15px; margin: 0 0 8px; } p { margin: 6px 0; } .faint { color: var(--faint); }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 16px 0; padding: 0; }
.tiles div, figure { background: var(--panel); border-radius: 8px; }
.tiles div { padding: 10px 16px; min-width: 120px; }
.tiles b { display: block; font-size: 21px; font-weight: 600; }
.tiles span { color: var(--faint); font-size: 13px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(400px, 1fr)); gap: 16px; }
figure { margin: 0; padding: 14px 16px; min-width: 0; }
.legend { font-size: 13px; } .legend span { margin-right: 16px; }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 2px;
  margin-right: 6px; }
.scroll { overflow-x: auto; margin: 12px 0; }
table { border-collapse: collapse; font-size: 14px; width: 100%; }
th { text-align: left; color: var(--faint); font-weight: 500; white-space: nowrap; }
th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td:last-child { overflow-wrap: anywhere; min-width: 150px; } .legend span { white-space: nowrap; }
.warning { border-left: 3px solid var(--c1); background: var(--panel); padding: 8px 14px; }
@media (max-width: 480px) { .charts { grid-template-columns: 1fr; } main { padding: 20px 14px; } }
"""
Cell = str | int | float


def page(title: str, body: str) -> str:
    """A whole page around `body`, which is HTML already."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\">"
        f"<title>{html.escape(title)}</title><style>{svg.STYLE}{_STYLE}</style></head>"
        f"<body><main><h1>{html.escape(title)}</h1>\n{body}\n</main></body></html>\n"
    )


def table(headers: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A table; numbers stand to the right with thousands set apart, fractions are percentages."""
    numeric = [all(isinstance(row[at], int | float) for row in rows) for at in range(len(headers))]
    head = "".join(
        f"<th{_number(right)}>{html.escape(name)}</th>"
        for name, right in zip(headers, numeric, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{_number(right)}>{_cell(cell)}</td>"
            for cell, right in zip(row, numeric, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def tiles(values: Mapping[str, str]) -> str:
    """A row of figures with their names."""
    items = (
        f"<div><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>"
        for name, value in values.items()
    )
    return f'<div class="tiles">{"".join(items)}</div>'


def figure(title: str, chart: str, note: str = "") -> str:
    """A chart, HTML already, under its title."""
    below = f'<p class="faint">{html.escape(note)}</p>' if note else ""
    return f"<figure><h3>{html.escape(title)}</h3>{chart}{below}</figure>"


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph; kind `warning` or `faint`."""
    return f"<p{f' class={kind}' if kind else ''}>{html.escape(text)}</p>"


def _number(right: bool) -> str:
    return ' class="number"' if right else ""


def _cell(cell: Cell) -> str:
    if isinstance(cell, float):
        return f"{cell:.1%}"
    return html.escape(f"{cell:,}" if isinstance(cell, int) else cell)
