"""What `prepare` found in the data: a page of its own, and a section of a run's report."""

from collections.abc import Iterator, Mapping
from typing import Any

from dpo_dist import __version__
from dpo_dist.data.drop_reasons import DROP_REASONS, NOTES
from dpo_dist.data.screening.distributions import describe_bias
from dpo_dist.report.bars import bars, histogram
from dpo_dist.report.page import (
    Html,
    Page,
    Section,
    Share,
    chart,
    grid,
    heading,
    note,
    table,
    tiles,
    warning,
)

TITLES = {"train": "Training pairs", "eval": "Held-out pairs"}
MEANINGS = {reason.name: reason.meaning for reason in DROP_REASONS}


def report_page(report: Mapping[str, Any]) -> Html:
    """The whole page of report.json."""
    return Page(
        "Preference data",
        f"dpo-dist {__version__}",
        _figures(report),
        [*report["warnings"], *report["hints"]],
        [Section(TITLES[split], _split(counts)) for split, counts in report["splits"].items()],
        _notes(report),
    ).html()


def blocks(report: Mapping[str, Any]) -> Iterator[Html]:
    """The same inside a larger page, which has the warnings at its top; none of an empty report."""
    if not report:
        return
    yield tiles(_figures(report))
    yield from map(warning, report["hints"])
    yield from map(note, _notes(report))
    for split, counts in report["splits"].items():
        yield heading(TITLES[split])
        yield from _split(counts)


def _figures(report: Mapping[str, Any]) -> dict[str, str]:
    splits: dict[str, dict[str, Any]] = report["splits"]
    train = splits["train"]
    pairs = {TITLES[split].lower(): f"{counts['pairs']:,}" for split, counts in splits.items()}
    return pairs | {
        "tokens to train on": f"{train['tokens']:,}",
        "saved by sharing prompts": f"{train['tokens_saved_by_sharing']:.0%}",
        "max_length": f"{report['max_length']:,}",
    }


def _notes(report: Mapping[str, Any]) -> list[str]:
    held_out = [f"held out: {report['held_out']}"] if report["held_out"] else []
    return [f"max_length: {report['max_length_reason']}", *held_out]


def _split(counts: Mapping[str, Any]) -> Iterator[Html]:
    yield _sources(counts)
    if counts["length_bias"]:
        yield note(f"Length: {describe_bias(counts['length_bias'])}.")
    yield grid(_charts(counts))
    lengths = [(part, *values.values()) for part, values in counts["lengths"].items() if values]
    if lengths:
        title = "tokens, truncated; of an answer those that are scored"
        yield table((title, "p50", "p90", "p99", "max"), lengths)
    for kind, meanings in (("dropped", MEANINGS), ("noted", NOTES)):
        rows = [
            (name, meanings[name], number, counts["first"].get(name, ""))
            for name, number in counts[kind].items()
            if number
        ]
        if rows:
            yield table((kind, "because", "rows", "first"), rows)
    yield from (note(f"refused {refusal}") for refusal in counts["refusals"])
    yield from (note(f"lost {text}") for text in counts.get("lost_text", []))


def _sources(counts: Mapping[str, Any]) -> Html:
    rows: list[tuple[Any, ...]] = []
    for name, source in counts["sources"].items():
        bias = source["length_bias"]
        longer = Share(bias["chosen_longer"]) if bias else None
        difference = round(bias["mean_difference"]) if bias else None
        dropped = source["rows"] - source["kept"]
        share = Share(source["pairs"] / counts["pairs"] if counts["pairs"] else 0.0)
        numbers = (source["rows"], dropped, source["pairs"], share, longer, difference)
        rows.append((name, source["format"], *numbers, source["path"]))
    numbers = ("rows", "dropped", "pairs", "share", "chosen longer", "by tokens")
    return table(("source", "format", *numbers, "path"), rows)


def _charts(counts: Mapping[str, Any]) -> Iterator[Html]:
    found: Mapping[str, Any] = counts["histograms"]
    dropped = {name: number for name, number in counts["dropped"].items() if number}
    if dropped:
        yield chart("Rows dropped, by reason", bars(dropped))
    if not counts["pairs"]:
        return
    for name, title in (("prompt", "Prompts"), ("answers", "Answers, as they are trained on")):
        shown = histogram(found[name]["edges"], found[name]["counts"], "tokens")
        yield chart(title, shown)
    yield from _by_source(
        found["difference"], "Chosen - rejected", "tokens",
        "Right of zero the chosen answer is the longer one.",
    )  # fmt: skip
    if "score_margin" in found:
        yield from _by_source(
            found["score_margin"], "Scores, chosen - rejected", "score",
            "All rows with scores, including those that were dropped.",
        )  # fmt: skip


def _by_source(found: Mapping[str, Any], title: str, unit: str, below: str) -> Iterator[Html]:
    """A chart for each series of a histogram, all on the same edges."""
    for name, counts in found["counts"].items():
        shown = histogram(found["edges"], {"pairs": counts}, unit, signed=True)
        yield chart(f"{title}, {name}", shown, below)
