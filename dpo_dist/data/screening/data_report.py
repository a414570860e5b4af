"""The data report: what was read, kept, dropped and noted, by source; as JSON and as a table.

`report/data_section.py` shows the same as a page.
"""

# pyright: basic
# (transformers' types are partial)

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from dpo_dist.config.data_section import DataSection
from dpo_dist.data.drop_reasons import (
    CODES,
    DROP_REASONS,
    KEPT,
    LOST_TEXT,
    NOTE_BITS,
    NOTES,
    TEMPLATE,
)
from dpo_dist.data.screening.bad_rows import MOST_TOLD, bad_rows, by_reason
from dpo_dist.data.screening.distributions import describe_bias, histograms, is_biased, length_bias
from dpo_dist.data.screening.tokenized_rows import PairColumns
from dpo_dist.data.sources.sources import Source
from dpo_dist.data.tokens.render import end_of_turn
from dpo_dist.data.tokens.templates import split_markers
from dpo_dist.data.tokens.tokenize import PairTokenizer
from dpo_dist.reference.arrays import IntArray

PERCENTILES = (50, 90, 99, 100)
NUM_DETAILS = 3  # how many refusals of the template and lost texts are shown


def split_report(columns: PairColumns) -> dict[str, Any]:
    """Counts and token lengths of a split as they go into report.json.

    The length of an answer is that of its scored tokens; "prompt + chosen + rejected" are all.
    """
    kept = columns.reasons == KEPT
    answers = (columns.chosen_scored, columns.rejected_scored)
    packed_lengths = columns.prompt_lengths + columns.chosen_lengths + columns.rejected_lengths
    prompt, chosen, rejected, packed = (
        np.repeat(lengths[kept], columns.copies[kept])
        for lengths in (columns.prompt_lengths, *answers, packed_lengths)
    )
    source = np.repeat(columns.source[kept], columns.copies[kept])
    return {
        **_counts(columns, np.ones(len(columns), dtype=bool)),
        "sources": {
            opened.name: {
                "path": opened.rows.label,
                "format": opened.row_format,
                **_counts(columns, columns.source == index),
                "length_bias": length_bias(chosen[source == index], rejected[source == index]),
            }
            for index, opened in enumerate(columns.sources)
            if (columns.source == index).any()
        },
        "first": _first_origins(columns),
        "refusals": list(columns.details.get(TEMPLATE, ())[:NUM_DETAILS]),
        "bad_rows": [
            {"found": found, "rows": count, "first": origin}
            for found, count, origin in by_reason(bad_rows(columns.details))[:MOST_TOLD]
        ],
        "lost_text": list(columns.details.get(LOST_TEXT, ())[:NUM_DETAILS]),
        "lengths": {
            "prompt": _percentiles(prompt),
            "chosen": _percentiles(chosen),
            "rejected": _percentiles(rejected),
            "prompt + chosen + rejected": _percentiles(packed),
        },
        "length_bias": length_bias(chosen, rejected),
        "histograms": histograms(columns),
        "tokens": int(packed.sum()),
        "tokens_saved_by_sharing": float(prompt.sum() / (packed.sum() + prompt.sum())),
    }


def bias_warnings(split: str, report: dict[str, Any]) -> list[str]:
    """What to warn of in a split's report: sources where length alone would tell the answers."""
    return [
        f"{split}, {name}: {describe_bias(counts['length_bias'])}. A model can learn this "
        "instead of the preference: compare objective.loss sigmoid_norm, or balance the pairs"
        for name, counts in report["sources"].items()
        if is_biased(counts["length_bias"], counts["pairs"])
    ]


def hints(section: DataSection, tokenizer: PairTokenizer, sources: Sequence[Source]) -> list[str]:
    """What is allowed, yet seldom meant."""
    found: list[str] = []
    plain = sorted({source.name for source in sources if source.row_format == "standard"})
    if plain and tokenizer.tokenizer.chat_template:
        found.append(
            f"{', '.join(plain)}: format standard is plain text without the chat template, as in "
            "TRL; for the template set format: orca and columns: {question: prompt}"
        )
    if plain and not tokenizer.tokenizer.eos_token:
        found.append(f"{', '.join(plain)}: the tokenizer has no EOS, so answers end without one")
    if markers := split_markers(tokenizer.tokenizer, section.chat_template):
        found.append(
            f"chat template {section.chat_template} writes {', '.join(markers)}, which this "
            "tokenizer has not as one token: the model will hardly learn to stop"
        )
    elif len(plain) < len({source.name for source in sources}):
        found += _end_hints(tokenizer.tokenizer)
    return found


def _end_hints(tokenizer: Any) -> list[str]:
    """What to know of the token that ends an answer, after which a model stops."""
    end = end_of_turn(tokenizer)
    if end is None:
        return ["the chat template ends an answer in no special token: the model will hardly learn "
                "to stop"]  # fmt: skip
    if end == tokenizer.eos_token_id:
        return []
    name, eos = tokenizer.convert_ids_to_tokens(end), tokenizer.eos_token
    return [f"answers end in {name}, not in the tokenizer's EOS {eos}: the export stops at both"]


def print_report(report: dict[str, Any], console: Console) -> None:
    """Prints the tables and notes of a whole report ({"splits": ..., "max_length": ...})."""
    splits: dict[str, dict[str, Any]] = report["splits"]
    console.print(_source_table(splits))
    console.print(_length_table(splits))
    console.print(f"max_length: {report['max_length_reason']}", highlight=False, markup=False)
    if report["held_out"]:
        console.print(f"held out: {report['held_out']}", highlight=False, markup=False)
    for split, counts in splits.items():
        for line in _lines(split, counts):
            console.print(line, highlight=False, markup=False)
    for hint in report["hints"]:
        console.print(f"hint: {hint}", highlight=False, markup=False)


def _counts(columns: PairColumns, rows: npt.NDArray[np.bool_]) -> dict[str, Any]:
    kept = rows & (columns.reasons == KEPT)
    return {
        "rows": int(rows.sum()),
        "kept": int(kept.sum()),
        "pairs": int(columns.copies[kept].sum()),
        "dropped": {
            name: int((columns.reasons[rows] == code).sum()) for name, code in CODES.items()
        },
        "noted": {
            name: int((columns.notes[kept] & bit > 0).sum()) for name, bit in NOTE_BITS.items()
        },
    }


def _first_origins(columns: PairColumns) -> dict[str, str]:
    """Where each reason and note was met first."""
    kept = columns.reasons == KEPT
    found = {name: columns.reasons == code for name, code in CODES.items()}
    found |= {name: kept & (columns.notes & bit > 0) for name, bit in NOTE_BITS.items()}
    return {name: columns.origin(int(rows.argmax())) for name, rows in found.items() if rows.any()}


def _percentiles(lengths: IntArray) -> dict[str, int]:
    if len(lengths) == 0:
        return {}
    values = np.percentile(lengths, PERCENTILES, method="inverted_cdf")
    names = [f"p{percent}" if percent < 100 else "max" for percent in PERCENTILES]
    return dict(zip(names, map(int, values), strict=True))


def _source_table(splits: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="pairs by source", title_justify="left")
    for name in ("split", "source", "format"):
        table.add_column(name, overflow="fold")
    for name in ("rows", "pairs"):
        table.add_column(name, justify="right")
    table.add_column("dropped")
    for split, report in splits.items():
        for name, counts in report["sources"].items():
            _add_row(
                table,
                [split, name, counts["format"], counts["rows"], counts["pairs"], _dropped(counts)],
            )
    return table


def _length_table(splits: dict[str, dict[str, Any]]) -> Table:
    table = Table(
        title="tokens a pair, truncated; of an answer those that are scored", title_justify="left"
    )
    for name in ("split", "part"):
        table.add_column(name)
    for percent in PERCENTILES:
        table.add_column(f"p{percent}" if percent < 100 else "max", justify="right")
    for split, report in splits.items():
        for part, values in report["lengths"].items():
            _add_row(table, [split, part, *values.values()])
    return table


def _add_row(table: Table, cells: Sequence[str | int]) -> None:
    from rich.text import Text

    # Text, because a source's name may hold square brackets, which rich takes for styles
    table.add_row(*(Text(f"{cell:,}" if isinstance(cell, int) else cell) for cell in cells))


def _dropped(counts: dict[str, Any]) -> str:
    parts = [f"{number:,} {name}" for name, number in counts["dropped"].items() if number]
    return ", ".join(parts) or "-"


def _lines(split: str, report: dict[str, Any]) -> list[str]:
    first = report["first"]
    lines = [
        f"{split}: {report['pairs']:,} pairs, {report['tokens']:,} tokens; sharing the prompt "
        f"saves {report['tokens_saved_by_sharing']:.0%}"
    ]
    if report["length_bias"]:
        lines.append(f"{split}: {describe_bias(report['length_bias'])}")
    for reason in DROP_REASONS:
        if number := report["dropped"][reason.name]:
            lines.append(
                f"{split}: {number:,} dropped, {reason.name}: {reason.meaning} "
                f"(first {first[reason.name]})"
            )
    lines += [
        f"{split}: cannot read {bad['rows']:,}: {bad['found']} (first {bad['first']})"
        for bad in report.get("bad_rows", [])
    ]
    lines += [f"{split}: refused {refusal}" for refusal in report["refusals"]]
    lines += [f"{split}: lost {text}" for text in report.get("lost_text", [])]
    for name, meaning in NOTES.items():
        if number := report["noted"][name]:
            lines.append(f"{split}: {number:,} noted, {meaning} (first {first[name]})")
    return lines
