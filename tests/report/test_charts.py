"""Charts: to scale, escaped, in the page's colors; as SVG inside a page and as PNG files."""

import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from support.ranks import ROOT

from dpo_dist.metrics.curves import PLOTS, QUALITY_PLOTS, Line, Plot
from dpo_dist.report import charts
from dpo_dist.report.bars import bars, histogram

EVIL = "<script>alert('x')</script>\"&$\\frac{1}{2}$"
SVG = "{http://www.w3.org/2000/svg}"
LOSS, REWARDS = QUALITY_PLOTS[:2]


def texts_of(chart: str) -> list[str]:
    return [str(text.text) for text in ET.fromstring(chart).iter(f"{SVG}text")]


def titles_of(chart: str) -> list[str]:
    """What a chart shows under the pointer."""
    return [str(title.text) for title in ET.fromstring(chart).iter(f"{SVG}title")]


def paths_of(chart: str, style: str) -> list[list[tuple[float, float]]]:
    """The points of every path with these words in its style."""
    found = [p for p in ET.fromstring(chart).iter(f"{SVG}path") if style in p.get("style", "")]
    return [
        [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path.attrib["d"])]
        for path in found
    ]


def heights_of(chart: str, color: str) -> list[float]:
    """Heights of the filled shapes of a color; a dot of a curve is none."""
    found = [path for path in paths_of(chart, f"fill: var(--{color})") if len(path) > 3]
    return [max(y for _, y in path) - min(y for _, y in path) for path in found]


def widths_of(chart: str, color: str) -> list[float]:
    found = paths_of(chart, f"fill: var(--{color})")
    return [max(x for x, _ in path) - min(x for x, _ in path) for path in found]


def lines_of(values: Sequence[float], name: str = "loss") -> list[Line]:
    return [{"step": step, name: value} for step, value in enumerate(values, 1)]


def test_bars_of_a_histogram_are_to_scale_and_tell_their_counts() -> None:
    chart = histogram([0, 10, 20, 3000], {"pairs": [1000, 0, 2000]}, "tokens")
    low, high = heights_of(chart, "first")
    assert high == pytest.approx(2 * low, rel=1e-4)
    assert titles_of(chart) == ["0 to 10: pairs 1,000", "20 to 3,000: pairs 2,000"]
    assert {"tokens", "pairs", "2,000"} <= set(texts_of(chart))


def test_signed_bins_have_two_colors() -> None:
    counts = {"a": [1, 2, 3, 4]}
    chart = histogram([-2, -1, 0, 1, 2], counts, "x", signed=True)
    assert [len(heights_of(chart, color)) for color in ("first", "second")] == [2, 2]
    plain = histogram([-2, -1, 0, 1, 2], counts, "x")
    assert [len(heights_of(plain, color)) for color in ("first", "second")] == [4, 0]


def test_several_series_are_laid_over_each_other_and_named() -> None:
    chart = histogram([0, 1, 2], {"chosen": [1, 2], EVIL: [2, 1]}, "x")
    assert [len(heights_of(chart, color)) for color in ("first", "second")] == [1, 1]
    assert {"chosen", EVIL} <= set(texts_of(chart))
    assert titles_of(chart) == [f"0 to 1: chosen 1, {EVIL} 2", f"1 to 2: chosen 2, {EVIL} 1"]


def test_bars_have_their_names_and_numbers() -> None:
    chart = bars({"duplicate": 1000, EVIL: 250})
    long, short = widths_of(chart, "first")
    assert long == pytest.approx(4 * short, rel=1e-3)
    assert texts_of(chart) == ["duplicate", "1,000", EVIL, "250"]


def test_a_curve_has_gaps_where_numbers_are_not_finite() -> None:
    values = [0.5, math.nan, 0.25, 0.5, math.inf, 0.75, 0.5]
    chart = charts.curve_svg(lines_of(values), LOSS)
    curve = next(d for d in re.findall(r' d="([^"]*)" clip-path[^>]*var\(--first\)', chart))
    assert re.sub("[^ML]", "", curve) == "MMLML"


@pytest.mark.parametrize(
    ("plot", "count", "labels"),
    [
        (LOSS, charts.FEW, {"training", "held-out"}),
        (LOSS, charts.FEW + 1, {"training, smoothed", "held-out"}),
        (REWARDS, charts.FEW + 1, {f"{part}, {where}" for part in ("chosen", "rejected")
                                   for where in ("training, smoothed", "held-out")}),
        (PLOTS[6], charts.FEW + 1, {"training", "held-out"}),
    ],
    ids=["few", "many", "two metrics", "learning rate"],
)  # fmt: skip
def test_many_points_are_smoothed_and_the_legend_says_so(
    plot: Plot, count: int, labels: set[str]
) -> None:
    lines: list[Line] = []
    for step in range(count):
        numbers = {name: 1.0 + step % 2 for name in plot.metrics}
        lines.append({"step": step, **numbers, **{f"eval_{name}": 2.0 for name in numbers}})
    shown = set(texts_of(charts.curve_svg(lines, plot)))
    assert {text for text in shown if "training" in text or "held-out" in text} == labels
    assert plot.title not in shown, "the page has it"


def test_a_long_run_does_not_make_a_long_page() -> None:
    noisy = [math.sin(step * step) for step in range(20_000)]
    assert len(charts.curve_svg(lines_of(noisy), LOSS)) < 150_000


def test_pictures_are_those_that_have_numbers(tmp_path: Path) -> None:
    lines = [*lines_of([0.7, 0.6]), {"step": 2, "rewards/margins": None, "eval_logps/chosen": -9}]
    folder = tmp_path / "plots"
    names = charts.write_pictures(lines, PLOTS, folder)
    assert names == {"Loss": "loss.png", "Log-probs": "logps.png"}
    for name in names.values():
        height, width, _ = matplotlib.image.imread(folder / name).shape
        assert abs(width - 1008) <= 1 and height == 522  # matplotlib 3.10.0 rounds down
    assert charts.write_pictures([], PLOTS, tmp_path / "none") == {}
    assert [path.name for path in tmp_path.iterdir()] == ["plots"]


def any_charts() -> Iterator[Any]:
    evil = Plot("a", EVIL, EVIL, (f"a/{EVIL}", f"b/{EVIL}"))
    few = [{"step": step, f"a/{EVIL}": 1.0, f"b/{EVIL}": step} for step in (1, 2)]
    for name, chart in {
        "no pairs": histogram([0, 1], {"a": [0]}, "x"),
        "no series": histogram([0, 1], {}, "x"),
        "names": histogram([0, 1], {EVIL: [1], "b": [2]}, EVIL),
        "score": histogram([-0.1, 0.0, 0.1], {"a": [1, 10**9]}, "score", signed=True),
        "bars": bars({EVIL: 3, "b": 0}),
        "curves": charts.curve_svg(few, evil),
        "point": charts.curve_svg(lines_of([1e-9]), LOSS),
        "large": charts.curve_svg(lines_of([1e12, -1e-9, math.nan]), LOSS),
    }.items():
        yield pytest.param(chart, id=name)


@pytest.mark.parametrize("chart", [*any_charts()])
def test_any_numbers_and_names_give_a_chart_for_a_page(chart: str) -> None:
    """Well-formed, no script, nothing from elsewhere, no color or name of a second chart."""
    root = ET.fromstring(chart)
    assert {element.tag.removeprefix(SVG) for element in root.iter()} <= {
        "svg", "g", "path", "text", "title", "use", "defs", "clipPath", "rect",
    }  # fmt: skip
    assert not re.search(r"<script|nan|inf|#[0-9a-f]{6}", chart)
    ids = {element.attrib["id"] for element in root.iter() if "id" in element.attrib}
    assert set(re.findall(r'(?:xlink:href="|url\()#(\w+)', chart)) == ids
    assert re.findall(r'(?:href="|url\()(?!#)', chart) == []


def test_the_same_numbers_give_the_same_bytes() -> None:
    first, second = (charts.curve_svg(lines_of([0.7, 0.5, 0.6]), LOSS) for _ in range(2))
    assert first == second


def test_matplotlib_is_imported_only_to_draw_and_left_as_it_was() -> None:
    for path in (ROOT / "dpo_dist").rglob("*.py"):
        assert not re.search(r"^(from|import) matplotlib", path.read_text(), re.MULTILINE), path
    program = (
        "import sys\n"
        "from dpo_dist.report import bars, charts\n"
        "bars.bars({'a': 1})\n"
        "assert 'matplotlib' not in sys.modules\n"
        "with charts.drawing():\n    import matplotlib\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert matplotlib.rcParams['svg.fonttype'] == 'path'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
