"""The data report: histograms, length bias and warnings in JSON, and the page made of them."""

import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
from support.prepared import WORDS, make_config, orca_row, report_of, write_jsonl

from dpo_dist.data.screening.distributions import describe_bias, is_biased, length_bias
from dpo_dist.stages import prepare
from dpo_dist.wording import nice_step

EVIL = "<script>alert(1)</script>"


def outward_links(page: str) -> list[str]:
    """What a page would fetch: neither parts of itself nor the name of SVG's vocabulary."""
    own = r'(href="|url\()#[\w-]+|xmlns(:\w+)?="[^"]*"|<link rel="icon" href="data:,">|&lt;img src'
    return re.findall(r" src=|href=|url\(|https?:|@import", re.sub(own, "", page))


def test_length_bias() -> None:
    bias = length_bias(np.array([5, 2, 3, 9]), np.array([1, 4, 3, 1]))
    assert bias == {
        "chosen_longer": 0.5, "rejected_longer": 0.25, "same_length": 0.25,
        "mean_chosen": 4.75, "mean_rejected": 2.25, "mean_difference": 2.5,
    }  # fmt: skip
    assert describe_bias(bias) == (
        "chosen is longer in 50% of pairs; on average chosen has 4.8 tokens, rejected 2.2, +2.5"
    )
    assert length_bias(np.array([], dtype=int), np.array([], dtype=int)) == {}


@pytest.mark.parametrize(
    ("longer", "num_pairs", "expected"),
    [(0.69, 100, False), (0.7, 100, True), (0.7, 49, False), (0.29, 100, True)],
)
def test_what_counts_as_biased(longer: float, num_pairs: int, expected: bool) -> None:
    bias = {"chosen_longer": longer, "rejected_longer": 1 - longer}
    assert is_biased(bias, num_pairs) is expected


@pytest.mark.parametrize(
    ("span", "parts", "step"), [(100, 5, 20), (99, 5, 20), (1, 6, 0.2), (7, 7, 1), (0, 3, 1)]
)
def test_widths_of_bins_are_round(span: float, parts: int, step: float) -> None:
    assert nice_step(span, parts) == pytest.approx(step)


def test_histograms_count_every_pair_as_often_as_it_is_trained_on(tmp_path: Path) -> None:
    rows = [orca_row(n, "yes " * (n % 7 + 1), "no " * (n % 5 + 1)) for n in range(60)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    report = report_of(make_config(tmp_path, train=[{"path": str(path), "weight": 2}]))
    counts = report["splits"]["train"]
    assert counts["pairs"] == 2 * counts["kept"]
    found = counts["histograms"]
    for name, series in (("prompt", ["prompt"]), ("answers", ["chosen", "rejected"]),
                         ("difference", ["a"])):  # fmt: skip
        edges = found[name]["edges"]
        assert list(found[name]["counts"]) == series and 0 in edges
        for values in found[name]["counts"].values():
            assert sum(values) == counts["pairs"] and len(values) == len(edges) - 1
    below = sum(
        number
        for low, number in zip(
            found["difference"]["edges"], found["difference"]["counts"]["a"], strict=False
        )
        if low < 0
    )
    assert below / counts["pairs"] == pytest.approx(counts["length_bias"]["rejected_longer"])
    assert counts["sources"]["a"]["length_bias"] == counts["length_bias"]


def test_a_strong_bias_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_jsonl(tmp_path / "train.jsonl", [orca_row(n, "yes " * 9) for n in range(60)])
    with caplog.at_level(logging.WARNING):
        (warning,) = report_of(make_config(tmp_path))["warnings"]
    assert warning.startswith("train, train: chosen is longer in 100% of pairs; on average chosen")
    assert f"prepare: {warning}" in caplog.messages


def test_the_page_has_every_number_and_no_markup_of_the_users(tmp_path: Path) -> None:
    rows = [orca_row(n, f"{WORDS[n % 9]} {EVIL}") | {"system": EVIL} for n in range(30)]
    rows += [orca_row(0) | {"question": f"{EVIL} refuse"}, orca_row(1, "same", "same")]
    path = write_jsonl(tmp_path / "<img src=x onerror=alert(1)>.jsonl", rows)
    template = tmp_path / "quoting.jinja"
    template.write_text(
        "{% for m in messages %}{% if 'refuse' in m['content'] %}"
        "{{ raise_exception('no ' + m['content']) }}{% endif %}{{ m['content'] }}\n{% endfor %}"
    )
    source = {"path": str(path), "name": f"<b>{EVIL}"}
    config = make_config(
        tmp_path, train=[source], chat_template=str(template), eval_fraction=0.3, max_length=256
    )
    folder = prepare.run(config)
    page = (folder / "report.html").read_text()
    report = json.loads((folder / "report.json").read_text())
    refusal = report["splits"]["train"]["refusals"] + report["splits"]["eval"]["refusals"]
    assert EVIL in refusal[0]  # a refusing template quotes the prompt
    assert not re.search(r"<(script|img|b>[^0-9])", page)
    assert "&lt;script&gt;alert(1)&lt;/script&gt; refuse" in page
    assert outward_links(page) == []
    for split in ("train", "eval"):
        assert f">{report['splits'][split]['pairs']:,}</b>" in page
    assert page.count("<svg") == 7 and "dropped" in page and "identical" in page


def test_a_split_of_one_pair_and_a_page_without_held_out_pairs(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [orca_row(0)])
    folder = prepare.run(make_config(tmp_path))
    page = (folder / "report.html").read_text()
    assert "Training pairs" in page and "Held-out pairs" not in page
