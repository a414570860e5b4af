"""Tokenized rows made by hand: what the gate and the writer work on, without a tokenizer."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from support.keys.data_settings import data_settings

from dpo_dist.config.data_section import SourceSection
from dpo_dist.data.drop_reasons import CODES
from dpo_dist.data.screening.tokenized_rows import SCHEMA, PairColumns, collect
from dpo_dist.data.sources.sources import open_sources
from dpo_dist.reference.pair_key import pair_key

TokenRow = tuple[list[int], list[int], list[int]]  # prompt, chosen, rejected


def columns_of(
    folder: Path,
    rows: Sequence[TokenRow],
    reasons: dict[int, str] | None = None,
    weight: float = 1.0,
    batch_rows: int = 3,
) -> tuple[PairColumns, Path]:
    """The columns of these rows and their scratch file; `reasons` by row number."""
    folder.mkdir(parents=True, exist_ok=True)
    source_path = folder / "rows.jsonl"
    source_path.write_text('{"prompt": "", "chosen": "", "rejected": ""}\n' * len(rows))
    section = SourceSection.model_validate({"path": str(source_path), "weight": weight})
    sources = open_sources([section], "train", folder)
    batches = [
        pa.RecordBatch.from_pylist(
            [
                _fields(position, rows[position], (reasons or {}).get(position))
                for position in range(start, min(start + batch_rows, len(rows)))
            ],
            schema=SCHEMA,
        )
        for start in range(0, len(rows), batch_rows)
    ]
    scratch_path = folder / "scratch.arrow"
    found = collect(batches, sources, {"train": scratch_path}, data_settings(), lambda rows: None)
    return found["train"], scratch_path


def _fields(position: int, row: TokenRow, reason: str | None) -> dict[str, object]:
    prompt, chosen, rejected = row
    return {
        "prompt_ids": prompt,
        "chosen_ids": chosen,
        "rejected_ids": rejected,
        "source": 0,
        "position": position,
        "reason": CODES[reason] if reason else 0,
        "notes": 0,
        "detail": f"rows.jsonl:{position + 1}: no system role" if reason == "template" else None,
        "pair_key": pair_key(prompt, chosen, rejected),
        "swapped_key": pair_key(prompt, rejected, chosen),
        "prompt_key": pair_key(prompt, [], []),
        "held_out": False,
        "score_margin": None,
    }
