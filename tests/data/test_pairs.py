"""The pairs folder: what is written is what is read, and damage is noticed."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from support.token_rows import TokenRow, columns_of

from dpo_dist.data.drop_reasons import CODES
from dpo_dist.data.pairs import DATA_NAME, EARLIER_SCHEMA, Pairs, digest_of_keys, open_pairs
from dpo_dist.data.screening.tokenized_rows import truncate
from dpo_dist.data.screening.write_pairs import truncate_lists, write_pairs
from dpo_dist.errors import ArtifactError
from dpo_dist.reference.pair_key import as_key_array, pair_key
from dpo_dist.run.manifest import Manifest, write_manifest

ROWS: list[TokenRow] = [
    ([n, n + 1][: 1 + n % 2], list(range(n, n + 1 + n % 5)), [n + 7] * (1 + n % 3))
    for n in range(300)
]


def written(folder: Path, max_length: int = 100, weight: float = 1.0) -> Path:
    """A pairs folder of ROWS without row 1, as the prepare stage leaves it."""
    columns, scratch_path = columns_of(folder / "source", ROWS, weight=weight, batch_rows=64)
    cut = truncate(columns, scratch_path, max_length)
    reasons = cut.reasons.copy()
    reasons[1] = CODES["duplicate"]
    pairs_dir = folder / "pairs"
    kept = replace(cut, reasons=reasons)
    splits = {
        split: {"num_pairs": count, "digest": write_pairs(pairs_dir / split, which, scratch_path)}
        for split, which, count in (("train", kept, int((reasons == 0).sum())), ("eval", None, 0))
    }
    write_manifest(pairs_dir, Manifest("prepare", {}, {}, {"splits": splits}))
    return pairs_dir


def expected(max_length: int = 100) -> list[TokenRow]:
    rows = [row for number, row in enumerate(ROWS) if number != 1]
    return [(p, c[: max_length - len(p)], r[: max_length - len(p)]) for p, c, r in rows]


def ids_of(pairs: Pairs, index: int) -> TokenRow:
    prompt, chosen, rejected = pairs.token_ids(index)
    return prompt.tolist(), chosen.tolist(), rejected.tolist()


def test_what_is_read_is_what_was_kept(tmp_path: Path) -> None:
    pairs, rows = open_pairs(written(tmp_path, 4), "train"), expected(4)
    assert len(pairs) == len(rows) == 299
    assert [ids_of(pairs, index) for index in range(len(pairs))] == rows
    assert pairs.prompt_lengths.tolist() == [len(p) for p, _, _ in rows]
    assert pairs.chosen_lengths.tolist() == [len(c) for _, c, _ in rows]
    assert pairs.rejected_lengths.tolist() == [len(r) for _, _, r in rows]
    assert pairs.packed_lengths.tolist() == [sum(map(len, row)) for row in rows]
    keys = as_key_array([pair_key(*row) for row in rows])
    assert pairs.keys.dtype == "S16" and (pairs.keys == keys).all()
    assert pairs.digest == digest_of_keys(keys)
    assert set(pairs.sources) == {"rows"}
    assert pairs.origin(0) == f"{tmp_path}/source/rows.jsonl:1"
    assert pairs.origin(1) == f"{tmp_path}/source/rows.jsonl:3"


def test_lengths_of_some_pairs_are_those_among_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs_dir = written(tmp_path)
    pairs, full = open_pairs(pairs_dir, "train"), open_pairs(pairs_dir, "train")
    columns = (full.prompt_lengths, full.chosen_lengths, full.rejected_lengths)
    random = np.random.default_rng(0)
    with monkeypatch.context() as patched:
        patched.setattr(Pairs, "chosen_lengths", None)  # nothing reads the tokens of all pairs
        for count in (0, 1, 5, 18):
            rows = random.integers(0, len(pairs), count)
            expected = np.stack([column[rows] for column in columns], axis=1)
            assert pairs.lengths_of(rows).tolist() == expected.tolist()
            assert pairs.lengths_of(tuple(rows.tolist())).tolist() == expected.tolist()
    many = random.integers(0, len(pairs), 200)
    assert pairs.lengths_of(many).tolist() == np.stack(columns, axis=1)[many].tolist()


def test_tokens_that_are_read_and_not_scored_do_not_count(tmp_path: Path) -> None:
    marked: list[TokenRow] = [([1], [5, ~6, 7], [~n, 9]) for n in range(40)]
    ids = [pa.array(column, pa.list_(pa.int32())) for column in zip(*marked, strict=True)]
    keys = pa.array([bytes(16)] * 40, pa.binary(16))
    names = pa.array([""] * 40)
    pairs = Pairs(pa.table([*ids, keys, names, names], schema=EARLIER_SCHEMA), tmp_path)
    assert pairs.lengths_of([3, 3]).tolist() == [[1, 2, 1]] * 2
    assert pairs.lengths_of(range(40)).tolist() == [[1, 2, 1]] * 40


def test_opening_copies_no_keys_and_reads_no_tokens(tmp_path: Path) -> None:
    pairs = open_pairs(written(tmp_path), "train")
    assert pairs.packed_lengths.sum() > 0
    assert not {"keys", "prompt_lengths", "chosen_lengths", "rejected_lengths"} & vars(pairs).keys()


def test_sources_are_named_in_the_order_of_the_pairs(tmp_path: Path) -> None:
    names = ["a", "bb", "a", "a", "ccc", "bb"]
    table = pa.table({"source": pa.chunked_array([names[:2], names[2:5], names[5:]])})
    assert Pairs(table, tmp_path).sources.tolist() == names


def test_weighted_rows_are_repeated(tmp_path: Path) -> None:
    pairs = open_pairs(written(tmp_path, weight=2.0), "train")
    found = [ids_of(pairs, index) for index in range(len(pairs))]
    assert found == [row for row in expected() for _ in range(2)]


def test_a_split_without_pairs(tmp_path: Path) -> None:
    pairs = open_pairs(written(tmp_path), "eval")
    assert len(pairs) == 0 and pairs.keys.shape == (0,) and pairs.keys.dtype == "S16"
    assert pairs.packed_lengths.shape == pairs.sources.shape == (0,)
    assert len(np.concatenate([pairs.keys, pairs.keys])) == 0


def test_the_datasets_library_opens_a_split(tmp_path: Path) -> None:
    pairs_dir = written(tmp_path)
    opened = datasets.load_from_disk(str(pairs_dir / "train"))
    pairs = open_pairs(pairs_dir, "train")
    assert len(opened) == len(pairs)
    first = opened[0]
    assert (first["prompt_ids"], first["chosen_ids"], first["rejected_ids"]) == ids_of(pairs, 0)
    assert first["pair_key"] == pair_key(*pairs.token_ids(0))


def test_lists_are_truncated_also_in_a_slice() -> None:
    lists = pa.array([[1, 2, 3], [], [4, 5], [6]], pa.list_(pa.int32()))
    assert truncate_lists(lists, np.array([2, 1, 2, 0])).to_pylist() == [[1, 2], [], [4, 5], []]
    assert truncate_lists(lists[2:], np.array([1, 1])).to_pylist() == [[4], [6]]


def error_of(pairs_dir: Path, split: str = "train") -> str:
    with pytest.raises(ArtifactError) as caught:
        open_pairs(pairs_dir, split)
    return str(caught.value)


def remedy(pairs_dir: Path) -> str:
    return (
        "expected prepared pairs as they were written. "
        f"Delete {pairs_dir} and run `dpo-dist prepare` again."
    )


def test_no_pairs_folder(tmp_path: Path) -> None:
    assert error_of(tmp_path / "pairs") == (
        f"{tmp_path}/pairs/MANIFEST.json does not exist; expected an artifact with its manifest. "
        "Run the stage that writes it, or `dpo-dist run`."
    )


def test_an_unknown_split(tmp_path: Path) -> None:
    pairs_dir = written(tmp_path)
    assert error_of(pairs_dir, "test") == (
        f"{pairs_dir}/test is not in the manifest; {remedy(pairs_dir)}"
    )


@pytest.mark.parametrize("damage", ["missing", "truncated", "garbage"])
def test_an_arrow_file_that_does_not_open(tmp_path: Path, damage: str) -> None:
    pairs_dir = written(tmp_path)
    path = pairs_dir / "train" / DATA_NAME
    content = path.read_bytes()
    match damage:
        case "missing":
            path.unlink()
        case "truncated":
            path.write_bytes(content[: len(content) // 2])
        case _:
            path.write_bytes(b"garbage" * 100)
    message = error_of(pairs_dir)
    assert message.startswith(f"{pairs_dir}/train is not readable (")
    assert message.endswith(remedy(pairs_dir))


def test_pairs_of_another_run_are_not_those_of_the_manifest(tmp_path: Path) -> None:
    pairs_dir, other = written(tmp_path / "a"), written(tmp_path / "b", max_length=3)
    (other / "train" / DATA_NAME).replace(pairs_dir / "train" / DATA_NAME)
    assert error_of(pairs_dir) == (
        f"{pairs_dir}/train holds 299 pairs that are not those of the manifest; {remedy(pairs_dir)}"
    )


def test_other_columns(tmp_path: Path) -> None:
    pairs_dir = written(tmp_path)
    table = pa.table({"a": [1]})
    with pa.ipc.new_stream(str(pairs_dir / "train" / DATA_NAME), table.schema) as writer:
        writer.write_table(table)
    assert error_of(pairs_dir).startswith(f"{pairs_dir}/train has the columns a; expected")


def test_a_pair_is_found_in_any_record_batch(tmp_path: Path) -> None:
    whole = open_pairs(written(tmp_path), "train").table.combine_chunks()
    parts = [whole.slice(start, 7) for start in range(0, len(whole), 7)]
    pairs = Pairs(pa.concat_tables(parts), tmp_path)
    assert pairs.table["prompt_ids"].num_chunks == len(parts) > 40
    assert [ids_of(pairs, index) for index in range(len(pairs))] == expected()


@pytest.mark.fault(13, "a bit of the prepared pairs flipped", becomes="refused, the file named")
def test_a_flipped_bit_in_the_tokens_is_noticed_when_they_are_read(tmp_path: Path) -> None:
    pairs_dir = written(tmp_path)
    path = pairs_dir / "train" / DATA_NAME
    content = bytearray(path.read_bytes())
    position = content.index(np.array(ROWS[4][1], "<i4").tobytes())  # 4, 5, 6, 7, 8
    content[position] ^= 1
    path.write_bytes(content)
    pairs = open_pairs(pairs_dir, "train")
    readable = [index for index in range(len(pairs)) if _is_readable(pairs, index)]
    (damaged,) = set(range(len(pairs))) - set(readable)
    with pytest.raises(ArtifactError) as caught:
        pairs.token_ids(damaged)
    assert str(caught.value) == (
        f"{pairs_dir}/train pair {damaged} has other tokens than its key says; {remedy(pairs_dir)}"
    )


def _is_readable(pairs: Pairs, index: int) -> bool:
    try:
        pairs.token_ids(index)
    except ArtifactError:
        return False
    return True


def test_reading_needs_neither_transformers_nor_datasets() -> None:
    program = (
        "import json, sys, dpo_dist.data.pairs\n"
        "print(json.dumps([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert json.loads(done.stdout) == []
