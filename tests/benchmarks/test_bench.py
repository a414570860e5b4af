"""`make bench` in small: a case of each kind on a tiny model, and the page written of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.ranks import run_ranks

from benchmarks.against_trl.results.figures import difference, of_case
from benchmarks.against_trl.results.page import write_page
from benchmarks.against_trl.results.targets import targets

pytestmark = pytest.mark.slow
SEVERAL, FULL = "4 answers", "2 ranks, zero2, full"


def measure(folder: str) -> dict[str, Any]:
    """In a process that may fork, since it only imports."""
    from benchmarks.against_trl import cases, driver, processes, tiny
    from benchmarks.against_trl.results import machine

    model = f"{folder}/tiny"
    processes.one(tiny.write_tiny_model, model)
    chosen = cases.named(cases.quick(), [SEVERAL, FULL])
    measured = driver.measure(chosen, Path(model), None, Path(folder, "work"), num_starts=0)
    return {"machine": machine.described(), "model": "tiny", "quick": True} | measured


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    (found,) = run_ranks(1, measure, str(tmp_path_factory.mktemp("bench")))
    return found


def figures(results: dict[str, Any], name: str) -> dict[str, Any]:
    return of_case(next(case for case in results["cases"] if case["name"] == name))


@pytest.mark.parametrize("name", [SEVERAL, FULL])
def test_all_systems_compute_the_same(results: dict[str, Any], name: str) -> None:
    found = figures(results, name)
    for figure, limit in (("losses", 1e-5), ("logps", 1e-3)):
        assert max(difference(found["trl"], own, figure) for own in found.values()) < limit


def test_what_is_counted_is_what_each_layout_computes(results: dict[str, Any]) -> None:
    found = figures(results, SEVERAL)
    assert found["ours"]["tokens_per_unique"] == 1
    assert found["trl"]["tokens_per_unique"] > found["alone"]["tokens_per_unique"] > 2
    assert found["trl"]["tflop"] > found["alone"]["tflop"] > 2 * found["ours"]["tflop"] > 0
    assert found["trl"]["live_mib"] > found["ours"]["live_mib"] > 0
    two = figures(results, FULL)
    assert two["trl"]["calls"] > two["ours"]["calls"] > 0
    assert two["ours"]["mib_exchanged"] > 0


def test_the_page_is_written_from_the_results_alone(
    results: dict[str, Any], tmp_path: Path
) -> None:
    page = tmp_path / "RESULTS.md"
    write_page(json.loads(json.dumps(results)), page)
    text = page.read_text()
    assert results["machine"]["commit"] in text
    assert all(f"| {target.what} |" in text for target in targets(results))
    assert "**missed**" in text, "a tiny model meets no target of speed"
    assert (tmp_path / "plots" / "answers.png").exists()
    pictures = [line for line in text.splitlines() if line.startswith("![")]
    assert len(pictures) == len(list((tmp_path / "plots").iterdir()))
