"""Reference log-probs on disk, keyed by the token ids that were scored.

    root/<first 16 hex digits of the contract digest>/
        contract.json        what the rows mean, for people and for `explain_miss`
        part-000000.rows     rows as they were committed (reference_parts.py)
        quarantine/          parts that failed their check

Where two parts hold the same key the lower number wins, so a row never changes its value once
somebody has read it. Shapes: N keys in a call; a log-prob is a sum over one completion.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpo_dist.errors import ReferenceStoreError, disk_errors_as
from dpo_dist.parsing import parse_object
from dpo_dist.reference.arrays import IntArray, KeyArray, LogpArray
from dpo_dist.reference.pair_key import Keys, as_key_array
from dpo_dist.reference.parts import (
    QUARANTINE_NAME,
    ROW_DTYPE,
    Rows,
    num_rows_in,
    part_paths,
    publish_part,
    read_part,
)
from dpo_dist.reference.sorted_rows import (
    Mask,
    SortedRows,
    Words,
    key_order,
    key_words,
    sort_rows,
)
from dpo_dist.run.manifest import digest_of, write_json

SCHEMA_VERSION = 1

_CONTRACT_NAME = "contract.json"
_NUM_NAMED = 5  # pairs that an error message lists


@dataclass(frozen=True)
class ScoringContract:
    """Everything but the token ids that a reference log-prob depends on."""

    reference_digest: str  # of the weight files of the reference model
    tokenizer_digest: str
    dtype: str  # of the forward pass
    layout: str  # how a pair lies in a row of tokens
    mask_rule: str  # which positions count
    quantization: str | None = None  # of the reference's linear layers
    schema_version: int = SCHEMA_VERSION

    def digest(self) -> str:
        """Hex SHA-256 of the fields that are set."""
        fields = dataclasses.asdict(self)
        return digest_of({name: value for name, value in fields.items() if value is not None})


@dataclass(frozen=True)
class StoredContract:
    """One folder below a store's root; `fields` is empty when its contract.json is unreadable."""

    directory: Path
    fields: dict[str, Any]
    num_rows: int  # from file sizes: a key that stands in two parts counts twice
    num_parts: int
    num_quarantined: int


class ReferenceStore:
    """The rows of one scoring contract, held in memory: 24 bytes each."""

    def __init__(self, directory: Path, contract: ScoringContract) -> None:
        self.directory = directory
        self.contract = contract
        self._read_parts: set[str] = set()
        # with distinct keys, and each at most half as long as the one before: what is appended
        # is sorted into few rows, and only seldom into all of them
        self._blocks: list[SortedRows] = []
        self.refresh()

    @property
    def num_rows(self) -> int:
        """Distinct keys held."""
        return sum(map(len, self._blocks))

    def refresh(self) -> None:
        """Takes in the parts that this or another process has appended since the last look.

        A corrupt part is moved to quarantine/ with a warning; its rows then count as missing.
        Raises ReferenceStoreError when the store cannot be read.
        """
        unread: list[Rows] = []
        contract_digest = self.contract.digest()
        with _disk_errors("read", self.directory):
            for path in part_paths(self.directory, self._read_parts):
                rows = read_part(path, contract_digest)
                if rows is not None:
                    unread.append(rows)
                    self._read_parts.add(path.name)
        if unread:
            words = key_words(np.concatenate([rows["key"] for rows in unread]))
            logps = np.concatenate([rows["logps"] for rows in unread])
            del unread, rows  # as large as what is made of them
            self._add(words, logps)

    def coverage(self, keys: Keys) -> tuple[int, IntArray]:
        """How many of the N keys are present, and the positions in `keys` of those that are not."""
        _, present = self._find(key_words(as_key_array(keys)))
        return int(present.sum()), np.flatnonzero(~present)

    def append(self, keys: Keys, logps: LogpArray, pair_indices: IntArray) -> int:
        """Commits the rows that the store lacks as one part; returns how many that were.

        `logps` is (N, 2) float32, columns chosen, rejected; `pair_indices` (N,) names the rows in
        messages. On return the rows are on disk for good. Raises ReferenceStoreError, and writes
        nothing, when a value is not finite; also when the store cannot be written.
        """
        key_array = as_key_array(keys)
        assert logps.shape == (len(key_array), 2), f"logps {logps.shape} for {len(key_array)} keys"
        assert logps.dtype == np.float32, f"logps are {logps.dtype}, expected float32"
        _check_finite(logps, pair_indices)
        self.refresh()
        _, present = self._find(key_words(key_array))
        unique, first = np.unique(key_array[~present], return_index=True)
        if len(unique) == 0:
            return 0
        with _disk_errors("write", self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            contract_path = self.directory / _CONTRACT_NAME
            if not contract_path.exists():
                write_json(contract_path, dataclasses.asdict(self.contract))
            rows = _to_rows(unique, logps[~present][first])
            publish_part(self.directory, rows, self.contract.digest())
        # from disk and by number: another process may have published the same keys just before
        self.refresh()
        return len(unique)

    def lookup(self, keys: Keys, pair_indices: IntArray | None = None) -> LogpArray:
        """The (N, 2) log-probs of the keys, columns chosen, rejected.

        Raises ReferenceStoreError when a key is missing, naming the first of them by pair index
        (by position in `keys` when `pair_indices` is None).
        """
        logps, present = self._find(key_words(as_key_array(keys)))
        missing = np.flatnonzero(~present)
        if len(missing):
            named = missing if pair_indices is None else pair_indices[missing]
            raise ReferenceStoreError(
                f"{self.directory} lacks reference log-probs for {len(missing)} of {len(present)} "
                f"pairs ({_name_pairs(named)})",
                "a row for every pair",
                "Run `dpo-dist reference`, which scores the missing pairs only.",
            )
        return logps

    def _find(self, words: Words) -> tuple[LogpArray, Mask]:
        """(N, 2) log-probs of the keys, meaningful only where the second array, (N,), says that
        they are present."""
        logps = np.zeros((words.shape[1], 2), dtype=np.float32)
        present = np.zeros(len(logps), dtype=np.bool_)
        if not self._blocks:
            return logps, present
        order = key_order(words)
        in_order = np.take(words, order, axis=1)
        both = logps.view(np.uint64)[:, 0]  # two numbers as one, which numpy moves much faster
        for block in self._blocks:
            positions, here = block.find(in_order)
            at = order[here]
            both[at], present[at] = block.logps.view(np.uint64)[positions[here], 0], True
        return logps, present

    def _add(self, words: Words, logps: LogpArray) -> None:
        """Takes in rows that come in the order of their parts; the first row of a key stays."""
        if self._blocks:
            _, present = self._find(words)
            words, logps = words[:, ~present], logps[~present]
        self._blocks.append(sort_rows(words, logps))
        while len(self._blocks) > 1 and len(self._blocks[-2]) < 2 * len(self._blocks[-1]):
            last, before = self._blocks.pop(), self._blocks.pop()
            words = np.concatenate([before.words, last.words], axis=1)
            self._blocks.append(sort_rows(words, np.concatenate([before.logps, last.logps])))


def open_store(root: Path, contract: ScoringContract) -> ReferenceStore:
    """Reads the rows of `contract` below `root`; an absent store is an empty one.

    Nothing is created before the first `append`. Raises ReferenceStoreError when it cannot be read.
    """
    return ReferenceStore(root / _directory_name(contract), contract)


def list_contracts(root: Path) -> list[StoredContract]:
    """Every contract that the store has rows for, by folder name."""
    return [_stored_contract(path.parent) for path in sorted(root.glob(f"*/{_CONTRACT_NAME}"))]


def explain_miss(root: Path, contract: ScoringContract) -> list[str]:
    """Says, nearest contract first, what the store holds instead and in what it differs."""
    others = [
        (stored, _differences(stored.fields, contract))
        for stored in list_contracts(root)
        if stored.directory.name != _directory_name(contract)
    ]
    others.sort(key=lambda item: len(item[1]))
    return [
        f"the store holds {stored.num_rows} rows scored with {'; '.join(differences)}"
        for stored, differences in others
    ]


def _directory_name(contract: ScoringContract) -> str:
    return contract.digest()[:16]


def _stored_contract(directory: Path) -> StoredContract:
    try:
        fields = parse_object((directory / _CONTRACT_NAME).read_bytes())
    except ValueError:
        fields = {}
    parts = part_paths(directory)
    return StoredContract(
        directory=directory,
        fields=fields,
        num_rows=sum(map(num_rows_in, parts)),
        num_parts=len(parts),
        num_quarantined=len(list((directory / QUARANTINE_NAME).glob("*"))),
    )


def _differences(fields: dict[str, Any], contract: ScoringContract) -> list[str]:
    """`name found, expected other` for each field that differs, also those of another version."""
    if not fields:
        return ["unknown settings: its contract.json is unreadable"]
    expected = dataclasses.asdict(contract)
    names = [*expected, *(name for name in fields if name not in expected)]
    return [
        f"{name} {_short(fields.get(name))}, expected {_short(expected.get(name))}"
        for name in names
        if fields.get(name) != expected.get(name)
    ]


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] + "..." if re.fullmatch(r"[0-9a-f]{32,}", text) else text


def _to_rows(keys: KeyArray, logps: LogpArray) -> Rows:
    rows = np.empty(len(keys), dtype=ROW_DTYPE)
    rows["key"], rows["logps"] = keys, logps
    return rows


def _check_finite(logps: LogpArray, pair_indices: IntArray) -> None:
    bad = np.flatnonzero(~np.isfinite(logps).all(axis=1))
    if len(bad):
        raise ReferenceStoreError(
            f"reference log-probs are not finite for {len(bad)} of {len(logps)} pairs "
            f"({_name_pairs(pair_indices[bad])})",
            "finite numbers",
            "Check the reference weights and these pairs, or score them in float32.",
        )


def _name_pairs(indices: Iterable[int]) -> str:
    listed = [str(index) for index in indices]
    more = ", ..." if len(listed) > _NUM_NAMED else ""
    return f"pair index {', '.join(listed[:_NUM_NAMED])}{more}"


def _disk_errors(action: str, directory: Path) -> contextlib.AbstractContextManager[None]:
    return disk_errors_as(
        ReferenceStoreError,
        f"cannot {action} the reference store {directory}",
        "a readable and writable folder, free space, and a file system with hard links",
        "Fix this, or set reference.store_dir to another folder.",
    )
