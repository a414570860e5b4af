"""Rows through TRL's own preparation and through ours, to prompt, chosen and rejected ids."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jinja2
from datasets import IterableDataset
from support.keys.data_settings import data_settings
from trl.trainer.dpo_trainer import DPOTrainer

from dpo_dist.data.rows.formats import detect_format, implied_columns, read_pair, rename_columns
from dpo_dist.data.rows.pair import Pair
from dpo_dist.data.rows.row import Row, RowError
from dpo_dist.data.tokens.render import TemplateRefusal
from dpo_dist.data.tokens.tokenize import PairTokenizer, TokenPair

Fields = Mapping[str, Any]
Ids = tuple[list[int], list[int], list[int]]  # prompt, chosen, rejected
_ARGUMENTS = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
# what a template, or a row that it does not take, makes TRL raise
_REFUSALS = (jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError, IndexError)


@dataclass(frozen=True)
class Case:
    """A row, what both made of it, and the tokenizer; a string says why there are no ids."""

    tokenizer: Any
    fields: Fields
    ours: TokenPair | str
    theirs: Ids | str

    @property
    def agrees(self) -> bool:
        """Whether both have the same ids, or neither has any."""
        if isinstance(self.ours, str) or isinstance(self.theirs, str):
            return isinstance(self.ours, str) and isinstance(self.theirs, str)
        return self.ours.lost is None and ids_of(self.ours) == self.theirs


def cases(tokenizer: Any, rows: Sequence[Fields], trl_rows: Sequence[Fields] = ()) -> list[Case]:
    """A case for every row; `trl_rows` are the same as TRL wants them, where that differs."""
    encode = PairTokenizer(tokenizer, data_settings()).encode
    pairs = [_pair_of(fields) for fields in rows]
    encoded = iter(encode([pair for pair in pairs if isinstance(pair, Pair)]))
    ours = [next(encoded) if isinstance(pair, Pair) else pair for pair in pairs]
    given = trl_rows or rows
    return [
        Case(tokenizer, fields, str(mine) if isinstance(mine, TemplateRefusal) else mine, theirs)
        for fields, mine, theirs in zip(given, ours, trl_ids(tokenizer, given), strict=True)
    ]


def trl_ids(tokenizer: Any, rows: Sequence[Fields]) -> list[Ids | str]:
    """The ids that TRL's trainer would train on, row by row, or its error."""
    return [_trl_ids(tokenizer, fields) for fields in rows]


def ids_of(pair: TokenPair) -> Ids:
    """The ids of a pair with the marks of what is not scored."""
    return pair.prompt_ids, pair.chosen_ids, pair.rejected_ids


def _trl_ids(tokenizer: Any, fields: Fields) -> Ids | str:
    rows = IterableDataset.from_generator(lambda: iter([dict(fields)]))
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer)
    arguments: Any = _ARGUMENTS
    try:
        prepared = DPOTrainer._prepare_dataset(trainer, rows, tokenizer, arguments, "train")
        (row,) = prepared
    except _REFUSALS as error:
        return f"{type(error).__name__}: {error}"
    return row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]


def _pair_of(fields: Fields) -> Pair | str:
    row = Row(fields, "rows.jsonl:7")
    try:
        row = rename_columns(row, implied_columns(row))
        return read_pair(row, detect_format(row, "data.train.0"), "rows")
    except RowError as error:
        return str(error)
