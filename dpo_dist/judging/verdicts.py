"""What a judge said, as a table of verdicts and a table of results."""

from pathlib import Path
from typing import Any

from dpo_dist.judging.comparison import Outcome, Tally, Winner, outcome_of, tally, winner_of
from dpo_dist.run.manifest import digest_of_file, write_atomic


def write_verdicts(path: Path, rows: list[dict[str, Any]], names: tuple[str, str]) -> None:
    """One row a comparison: who was shown as A, the verdict, whom it prefers, the reply."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "question_id": pa.array([str(row["question_id"]) for row in rows], pa.string()),
            "turn": pa.array([row["turn"] for row in rows], pa.int32()),
            "order": pa.array([row["order"] for row in rows], pa.int32()),
            "shown_as_a": pa.array([names[row["order"] - 1] for row in rows], pa.string()),
            "shown_as_b": pa.array([names[2 - row["order"]] for row in rows], pa.string()),
            "judge_model": pa.array([row["judge_model"] for row in rows], pa.string()),
            "verdict": pa.array([row["verdict"] for row in rows], pa.string()),
            "winner": pa.array([_winner_name(row, names) for row in rows], pa.string()),
            "num_asks": pa.array([row["ask"] for row in rows], pa.int32()),
            "reply": pa.array([row["reply"] for row in rows], pa.string()),
            "error": pa.array([row["error"] for row in rows], pa.string()),
            "digest": pa.array([row["digest"] for row in rows], pa.string()),
            "time": pa.array([row["time"] for row in rows], pa.float64()),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_atomic(path, sink.getvalue().to_pybytes())


def _winner_name(row: dict[str, Any], names: tuple[str, str]) -> str:
    named = {"first": names[0], "second": names[1], "tie": "tie", None: "error"}
    return named[_winner(row)]


def _winner(row: dict[str, Any]) -> Winner | None:
    return winner_of(row["verdict"], row["order"]) if row["verdict"] else None


def result_of(
    files: tuple[Path, Path],
    names: tuple[str, str],
    rows: list[dict[str, Any]],
    judge: dict[str, Any],
) -> dict[str, Any]:
    """The table over all turns and for each turn, and how often the judge said which letter.

    `rows` are the newest replies of the comparisons, both orders of one behind each other.
    """
    outcomes: list[tuple[Any, int, Outcome]] = [
        (first["question_id"], first["turn"], outcome_of(_winner(first), _winner(second)))
        for first, second in zip(rows[::2], rows[1::2], strict=True)
    ]
    turns = sorted({turn for _, turn, _ in outcomes})
    letters = [row["verdict"] for row in rows]
    return {
        "answers": {
            name: {"path": str(path), "sha256": digest_of_file(path)}
            for name, path in zip(names, files, strict=True)
        },
        "judge": judge,
        "all": _numbers(tally((q, o) for q, _, o in outcomes), names),
        "per_turn": {
            str(turn): _numbers(tally((q, o) for q, t, o in outcomes if t == turn), names)
            for turn in turns
        },
        "verdicts": {letter: letters.count(letter) for letter in ("A", "B", "C")}
        | {"none": letters.count(None)},
    }


def _numbers(counted: Tally, names: tuple[str, str]) -> dict[str, Any]:
    numbers: dict[str, Any] = {
        "n": counted.n, "changed": counted.changed, "error": counted.error,
        "num_questions": counted.num_questions,
    }  # fmt: skip
    if counted.n:
        numbers["table"] = {names[0]: counted.row(), names[1]: counted.turned_round().row()}
        numbers["interval_95"] = list(counted.interval())
        numbers["arithmetic"] = counted.arithmetic()
    return numbers
