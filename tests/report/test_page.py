"""The frame of a page: texts stay texts, numbers stand right, both color schemes are whole."""

import re

import pytest

from dpo_dist.report.bars import bars
from dpo_dist.report.charts import COLORS
from dpo_dist.report.page import (
    Page,
    Section,
    Share,
    chart,
    grid,
    heading,
    note,
    number,
    table,
    tiles,
    warning,
)

EVIL = "<script>alert('x')</script>\"&"
EMPTY = Page("A run", "today", {}, (), ())


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"), (True, "True"), ("text", "text"), (0, "0"), (1234567, "1,234,567"),
        (0.6931471, "0.6931"), (1e-6, "1e-06"), (12345.678, "12,346"), (-2000.5, "-2,000"),
        (1e20, "1e+20"), (float("nan"), "nan"), (Share(0.123), "12.3%"),
    ],
)  # fmt: skip
def test_numbers_for_people(value: object, shown: str) -> None:
    assert number(value) == shown


def test_columns_of_numbers_stand_right() -> None:
    rows = [("a", 1234, Share(0.5), None), ("b", 5, None, "c")]
    classes = re.findall(r'<td class="(\w*)">([^<]*)', table(("name", "n", "share", "mixed"), rows))
    assert classes[:4] == [("", "a"), ("number", "1,234"), ("number", "50.0%"), ("", "-")]
    texts = table(("n", "answer"), [(1, "two\nlines")], texts=True)
    assert '<td class="number">1</td><td class="text">two\nlines</td>' in texts
    assert "<th" in table(("a", "b"), [])


def test_every_text_is_escaped_and_no_script_allowed() -> None:
    blocks = [
        note(EVIL), warning(EVIL), heading(EVIL), tiles({EVIL: EVIL}),
        table((EVIL, "n"), [(EVIL, 1234)]), chart(EVIL, bars({EVIL: 1}), EVIL),
        grid([note(EVIL), note(EVIL)]),
    ]  # fmt: skip
    sections = [Section(EVIL, blocks), Section("x", [], EVIL)]
    page = Page(EVIL, EVIL, {EVIL: EVIL}, [EVIL], sections, [EVIL]).html()
    assert "<script" not in page and "&amp;lt;" not in page
    assert len(re.findall(r"&lt;script&gt;", page)) == 23
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page


def test_a_section_without_blocks_says_why() -> None:
    sections = (Section("Samples", (), "None yet."), Section("Data", iter([note("Some.")]), "No."))
    page = Page("A run", "today", {}, (), sections).html()
    assert '<h2 id="part-1">Samples</h2>\n<p class="note">None yet.</p>' in page
    assert '<a href="#part-2">Data</a>' in page and "Some." in page and "No." not in page


def test_both_schemes_have_every_color_of_the_page() -> None:
    page = EMPTY.html()
    light, dark = re.findall(r":root \{([^}]*)\}", page)
    for which, scheme in enumerate((light, dark)):
        assert re.findall(r"--([\w-]+): (#\w+);", scheme) == [
            (name, shades[which]) for name, shades in COLORS.items()
        ]
    assert set(re.findall(r"var\(--([\w-]+)\)", page)) <= COLORS.keys()
    assert re.findall(r"#[0-9a-f]{6}", page.replace(light, "").replace(dark, "")) == []
