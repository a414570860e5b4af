"""Charts as SVG: well-formed, to scale, escaped."""

import math
import re
import xml.etree.ElementTree as ET

import pytest

from dpo_dist.report import svg
from dpo_dist.report.html_page import figure, page, paragraph, table, tiles

EVIL = "<script>alert('x')</script>\"&"


def parsed(chart: str) -> ET.Element:
    return ET.fromstring(chart)


def test_bars_of_a_histogram_are_to_scale() -> None:
    chart = parsed(svg.histogram([0, 10, 20, 30], {"pairs": [5, 0, 10]}, "tokens"))
    heights = [
        float(bar.attrib["height"]) for bar in chart.iter("rect") if "bar" in str(bar.attrib)
    ]
    assert heights[1] == 0 and heights[2] == pytest.approx(2 * heights[0], abs=0.11)
    titles = [title.text for title in chart.iter("title")]
    assert titles == ["0 to 10: pairs 5", "10 to 20: pairs 0", "20 to 30: pairs 10"]


def test_signed_bins_have_two_colors() -> None:
    chart = parsed(svg.histogram([-2, -1, 0, 1, 2], {"a": [1, 1, 1, 1]}, "x", signed=True))
    classes = [bar.attrib["class"] for bar in chart.iter("rect")]
    assert [name for name in classes if name != "hover"] == ["bar k1"] * 2 + ["bar k0"] * 2


def test_several_series_are_outlines() -> None:
    chart = parsed(svg.histogram([0, 1, 2], {"a": [1, 2], "b": [2, 1]}, "x"))
    assert [path.attrib["class"] for path in chart.iter("path")] == ["area k0", "area k1"]
    names = svg.legend(["a", EVIL])
    assert 'class="k0"' in names and 'class="k1"' in names and "<script" not in names


def test_lines_leave_out_what_is_not_finite() -> None:
    points = [(1.0, 0.5), (2.0, math.nan), (3.0, 0.25), (4.0, math.inf)]
    chart = parsed(svg.lines({"loss": points}, "step", "loss"))
    (path,) = chart.iter("path")
    assert len(re.findall("[ML]", path.attrib["d"])) == 2
    assert [title.text for title in path] == ["loss, last 0.25 at 3"]


@pytest.mark.parametrize(
    "chart",
    [
        svg.histogram([0, 1], {"a": [0]}, "x"),
        svg.histogram([0, 1], {}, "x"),
        svg.lines({}, "x", "y"),
        svg.lines({"a": []}, "x", "y"),
        svg.lines({"a": [(1.0, 2.0)]}, "x", "y"),
        svg.lines({"a": [(0.0, -1e-9), (1e9, 1e12)]}, "x", "y"),
        svg.bars({}, "rows"),
        svg.bars({"a": 0}, "rows"),
        svg.histogram([0, 1], {EVIL: [1], "b": [2]}, EVIL, EVIL),
        svg.lines({EVIL: [(0.0, 1.0), (1.0, 2.0)]}, EVIL, EVIL),
        svg.bars({EVIL: 3}, EVIL),
    ],
)
def test_any_numbers_and_names_give_a_well_formed_chart(chart: str) -> None:
    assert not {"script", "nan", "inf"} & {e.tag for e in parsed(chart).iter()}
    assert "nan" not in chart and "<script" not in chart


@pytest.mark.parametrize(
    ("span", "parts", "step"), [(100, 5, 20), (99, 5, 20), (1, 6, 0.2), (7, 7, 1), (0, 3, 1)]
)
def test_steps_are_round(span: float, parts: int, step: float) -> None:
    assert svg.nice_step(span, parts) == pytest.approx(step)


def test_a_page_escapes_all_texts_and_allows_no_scripts() -> None:
    parts = [tiles({EVIL: EVIL}), table((EVIL, "n"), [(EVIL, 1234), (EVIL, 5)]),
             figure(EVIL, svg.bars({EVIL: 1}, EVIL), EVIL), paragraph(EVIL, "faint")]  # fmt: skip
    whole = page(EVIL, "".join(parts))
    assert "<script" not in whole and "default-src 'none'" in whole
    assert "1,234" in whole and table(("share",), [(0.123,)]).count("12.3%") == 1
