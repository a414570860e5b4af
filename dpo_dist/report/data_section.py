"""The data report as HTML: one file without scripts, and its sections for a larger page."""

from collections.abc import Iterator, Mapping
from typing import Any

from dpo_dist.data.drop_reasons import DROP_REASONS, NOTES
from dpo_dist.data.screening.distributions import describe_bias
from dpo_dist.report import svg
from dpo_dist.report.html_page import figure, page, paragraph, table, tiles

SPLIT_TITLES = {"train": "Training pairs", "eval": "Held-out pairs"}
MEANINGS = {reason.name: reason.meaning for reason in DROP_REASONS}


def report_page(report: Mapping[str, Any]) -> str:
    """The whole page of report.json."""
    return page("Preference data", html_sections(report))


def html_sections(report: Mapping[str, Any]) -> str:
    """What the page shows, from tiles to tables, for a page with `svg.STYLE` and `html_page`'s."""
    splits: dict[str, dict[str, Any]] = report["splits"]
    figures = {
        SPLIT_TITLES[split].lower(): f"{counts['pairs']:,}" for split, counts in splits.items()
    }
    figures |= {
        "tokens to train on": f"{splits['train']['tokens']:,}",
        "saved by sharing prompts": f"{splits['train']['tokens_saved_by_sharing']:.0%}",
        "tokens at most": f"{report['max_length']:,}",
    }
    parts = [tiles(figures)]
    parts += [paragraph(text, "warning") for text in (*report["warnings"], *report["hints"])]
    parts.append(paragraph(f"max_length: {report['max_length_reason']}", "faint"))
    if report["held_out"]:
        parts.append(paragraph(f"held out: {report['held_out']}", "faint"))
    for split, counts in splits.items():
        parts.append(f"<h2>{SPLIT_TITLES[split]}</h2>")
        parts += _split(counts)
    return "\n".join(parts)


def _split(counts: Mapping[str, Any]) -> Iterator[str]:
    yield _sources(counts)
    if counts["length_bias"]:
        yield paragraph(f"Length: {describe_bias(counts['length_bias'])}.")
    yield f'<div class="charts">{"".join(_charts(counts))}</div>'
    for kind, meanings in (("dropped", MEANINGS), ("noted", NOTES)):
        rows = [
            (name, meanings[name], number, counts["first"].get(name, ""))
            for name, number in counts[kind].items()
            if number
        ]
        if rows:
            yield table((kind, "because", "rows", "first"), rows)
    yield from (paragraph(f"refused {refusal}", "faint") for refusal in counts["refusals"])


def _sources(counts: Mapping[str, Any]) -> str:
    rows: list[tuple[str | int | float, ...]] = []
    for name, source in counts["sources"].items():
        bias = source["length_bias"]
        longer = (bias["chosen_longer"], round(bias["mean_difference"])) if bias else ("", "")
        dropped = source["rows"] - source["kept"]
        numbers = (source["rows"], dropped, source["pairs"])
        share = source["pairs"] / counts["pairs"] if counts["pairs"] else 0.0
        rows.append((name, source["format"], *numbers, share, *longer, source["path"]))
    headers = ("source", "format", "rows", "dropped", "pairs", "share")
    return table((*headers, "chosen longer", "by tokens", "path"), rows)


def _charts(counts: Mapping[str, Any]) -> Iterator[str]:
    found: Mapping[str, Any] = counts["histograms"]
    dropped = {name: number for name, number in counts["dropped"].items() if number}
    if dropped:
        yield figure("Rows dropped, by reason", svg.bars(dropped, "rows"))
    if not counts["pairs"]:
        return
    yield _histogram("Prompts", found["prompt"], "tokens")
    answers = found["answers"]
    yield _histogram("Answers, as they are trained on", answers, "tokens")
    note = "Right of zero the chosen answer is the longer one."
    for name, alone in _by_source(found["difference"]):
        yield _histogram(f"Chosen - rejected, {name}", alone, "tokens", note, signed=True)
    note = "Of all rows with scores, also of those dropped."
    for name, alone in _by_source(found.get("score_margin")):
        yield _histogram(f"Scores, chosen - rejected, {name}", alone, "score", note, signed=True)


def _by_source(found: Mapping[str, Any] | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """A histogram of several series as one each, on the same edges."""
    if found is None:
        return
    for name, counts in found["counts"].items():
        yield name, {"edges": found["edges"], "counts": {"pairs": counts}}


def _histogram(
    title: str, found: Mapping[str, Any], unit: str, note: str = "", signed: bool = False
) -> str:
    names = list(found["counts"])
    chart = svg.histogram(found["edges"], found["counts"], unit, signed=signed)
    return figure(title, (svg.legend(names) if len(names) > 1 else "") + chart, note)
