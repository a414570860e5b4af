"""The HTML page of a run and of its data: `page.html.jinja`, `parts.html.jinja` and `page.css`.

A page is one file. The templates escape every text, and the page's own policy lets no script, no
font and no request through, whatever a text of the run says.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from dpo_dist.report.charts import COLORS

Html = str  # of the template: its texts are escaped already
Row = Sequence[Any]


class Share(float):
    """A fraction, shown as a percentage."""


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it: its blocks, or a note when there are none."""

    title: str
    blocks: Iterable[Html]
    without: str = ""


@dataclass(frozen=True)
class Page:
    """A whole page; `tiles` are the figures at its top, name -> value."""

    title: str
    subtitle: str
    tiles: Mapping[str, str]
    warnings: Sequence[str]
    sections: Sequence[Section]
    notes: Sequence[str] = ()

    def html(self) -> Html:
        return template("page.html.jinja").render(page=self, colors=COLORS)


@cache
def template(name: str) -> Any:
    """A template of this folder; it escapes every text."""
    return Environment(
        loader=PackageLoader("dpo_dist.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template(name)


def note(text: str) -> Html:
    """A line of explanation; it also stands in for what the run does not have yet."""
    return _parts().note(text)


def warning(text: str) -> Html:
    """What the reader should look into."""
    return _parts().warning(text)


def heading(text: str) -> Html:
    """A heading inside a section."""
    return _parts().heading(text)


def tiles(values: Mapping[str, str]) -> Html:
    """Figures in a row, each with its name."""
    return _parts().tiles(values)


def chart(title: str, svg: str, note: str = "") -> Html:
    """A chart of `charts` or `bars` under its title."""
    return _parts().chart(title, svg, note)


def grid(parts: Iterable[Html]) -> Html:
    """Parts side by side where the window is wide enough."""
    return _parts().grid(list(parts))


def table(head: Row, rows: Iterable[Row], texts: bool = False) -> Html:
    """Columns of numbers stand to the right; with `texts` the line breaks of cells are kept."""
    lines = list(rows)
    columns = zip(*lines, strict=True) if lines else [() for _ in head]
    classes = [
        "number" if column and all(isinstance(cell, int | float | None) for cell in column)
        else "text" if texts else ""
        for column in columns
    ]  # fmt: skip
    return _parts().table(classes, [*map(str, head)], [[*map(number, row)] for row in lines])


def number(value: Any) -> str:
    """A value for people: numbers to four digits or with thousands set apart, "-" for none."""
    if value is None:
        return "-"
    if isinstance(value, Share):
        return f"{value:.1%}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or 1000 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _parts() -> Any:
    return template("parts.html.jinja").module
