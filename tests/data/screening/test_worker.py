"""Tokenizing in chunks and in processes: order, errors, killed processes, killed parents."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from support.keys.data_settings import data_settings
from support.tiny_tokenizer import make_tokenizer

from dpo_dist.config.data_section import SourceSection
from dpo_dist.data.drop_reasons import BAD_ROW, CODES
from dpo_dist.data.screening import tokenizer_pool as worker
from dpo_dist.data.screening.bad_rows import BadRow
from dpo_dist.data.screening.tokenizer_pool import Chunk, TokenizeJob, make_chunks, tokenize_chunks
from dpo_dist.data.sources.sources import open_sources
from dpo_dist.errors import DataError

NUM_ROWS = 40


def write_rows(path: Path, num_rows: int = NUM_ROWS, broken: int | None = None) -> Path:
    with path.open("w") as stream:
        for number in range(num_rows):
            row = {"prompt": f"Question {number}", "chosen": " yes", "rejected": " no"}
            if number == broken:
                del row["chosen"]
            stream.write(json.dumps(row) + "\n")
    return path


def job_of(folder: Path, *paths: Path, **settings: object) -> TokenizeJob:
    sections = [SourceSection.model_validate({"path": str(path), **settings}) for path in paths]
    sources = tuple(open_sources(sections, "train", folder))
    return TokenizeJob(make_tokenizer(folder / "model"), None, False, data_settings(), sources)


def test_chunks_cover_the_taken_rows_of_every_source_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "CHUNK_ROWS", 7)
    first, second = write_rows(tmp_path / "a.jsonl"), write_rows(tmp_path / "b.jsonl", 3)
    chunks = list(make_chunks(job_of(tmp_path, first, second, weight=0.5).sources))
    assert chunks == [
        Chunk(0, [*range(0, 14, 2)]),
        Chunk(0, [*range(14, 28, 2)]),
        Chunk(0, [*range(28, 40, 2)]),
        Chunk(1, [0, 2]),
    ]


def test_long_rows_come_in_small_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "a.jsonl")
    monkeypatch.setattr(worker, "CHUNK_BYTES", path.stat().st_size // 4)
    sizes = [len(chunk.positions) for chunk in make_chunks(job_of(tmp_path, path).sources)]
    assert sum(sizes) == NUM_ROWS and 4 <= len(sizes) <= 5


def test_a_batch_has_a_row_for_every_row_read(tmp_path: Path) -> None:
    good = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    bad = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": ""}]
    rows = [
        {"chosen": good, "rejected": [good[0], {"role": "assistant", "content": "B"}]},
        {"chosen": good, "rejected": [{"role": "user", "content": "X"}, good[1]]},
        {"chosen": good, "rejected": bad},
        {"chosen": good, "rejected": good, "tools": None},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = job_of(tmp_path, path)
    (batch,) = tokenize_chunks(job, job.load_tokenizer(), make_chunks(job.sources), 1)
    found = batch.to_pylist()
    assert [row["reason"] for row in found] == [0, CODES["no_shared_prompt"], CODES["empty"], 0]
    assert [row["position"] for row in found] == [0, 1, 2, 3]
    assert found[1]["prompt_ids"] == found[1]["chosen_ids"] == []
    assert found[0]["pair_key"] != found[0]["swapped_key"]
    assert found[3]["pair_key"] == found[3]["swapped_key"]
    assert found[0]["prompt_key"] == found[3]["prompt_key"]


def test_a_refusing_template_is_quoted_with_the_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "Q", "chosen": "A", "rejected": "B"}\n')
    job = job_of(tmp_path, path)
    tokenizer = job.load_tokenizer()
    tokenizer.tokenizer.chat_template = "{{ raise_exception('never') }}"
    (batch,) = tokenize_chunks(job, tokenizer, make_chunks(job.sources), 1)
    (row,) = batch.to_pylist()
    assert (row["reason"], row["detail"]) == (CODES["template"], f"{path}:1: never")


def test_a_template_that_drops_the_answer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "Q", "chosen": "A", "rejected": "B"}\n')
    job = job_of(tmp_path, path)
    tokenizer = job.load_tokenizer()
    tokenizer.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    (batch,) = tokenize_chunks(job, tokenizer, make_chunks(job.sources), 1)
    assert batch["reason"].to_pylist() == [CODES["lost_text"]]
    assert batch["detail"].to_pylist() == [f"{path}:1: content of the answer"]


def test_processes_give_what_one_process_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "CHUNK_ROWS", 3)
    job = job_of(tmp_path, write_rows(tmp_path / "a.jsonl"))
    tokenizer, chunks = job.load_tokenizer(), list(make_chunks(job.sources))
    alone = [batch.to_pylist() for batch in tokenize_chunks(job, tokenizer, chunks, 1)]
    together = [batch.to_pylist() for batch in tokenize_chunks(job, tokenizer, chunks, 2)]
    assert together == alone and len(alone) == 14

    # a damaged row costs itself only, and comes in its place
    job = job_of(tmp_path, write_rows(tmp_path / "b.jsonl", broken=4))
    batches = tokenize_chunks(job, tokenizer, make_chunks(job.sources), 2)
    rows = [row for batch in batches for row in batch.to_pylist()]
    assert [n for n, row in enumerate(rows) if row["reason"] == CODES[BAD_ROW]] == [4]
    assert BadRow.parse(rows[4]["detail"]).found.startswith(
        f"{tmp_path}/b.jsonl:5 has no field 'chosen'"
    )

    # a process that is killed, as for want of memory
    job = job_of(tmp_path, write_rows(tmp_path / "c.jsonl", 3000))
    batches = tokenize_chunks(job, tokenizer, make_chunks(job.sources), 2)
    next(batches)
    threading.Timer(0.0, _kill_one_process).start()
    with pytest.raises(DataError) as caught:
        list(batches)
    assert str(caught.value) == (
        "a tokenizing process was killed; expected 2 processes to the end. "
        "If memory ran out, lower data.num_workers."
    )


def _kill_one_process() -> None:
    _tokenizing_processes(os.getpid())[0].send_signal(signal.SIGKILL)


def _tokenizing_processes(pid: int) -> list[psutil.Process]:
    """The children of the fork server."""
    return [
        process
        for server in psutil.Process(pid).children()
        if "forkserver" in " ".join(server.cmdline())
        for process in server.children()
    ]


PARENT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_worker as t
if __name__ == "__main__":
    folder = Path(sys.argv[1])
    job = t.job_of(folder, t.write_rows(folder / "a.jsonl", 100_000))
    for batch in t.tokenize_chunks(job, None, t.make_chunks(job.sources), 2):  # they load their own
        print("batch", flush=True)
"""


def test_processes_leave_with_a_killed_parent(tmp_path: Path) -> None:
    program = tmp_path / "parent.py"
    program.write_text(PARENT.format(tests=str(Path(__file__).parent)))
    root = Path(__file__).parents[3]
    parent = subprocess.Popen(
        [sys.executable, str(program), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (root, root / "tests")))},
    )
    assert parent.stdout is not None and parent.stdout.readline() == "batch\n"
    processes = _tokenizing_processes(parent.pid)
    assert len(processes) == 2
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while any(map(_is_alive, processes)):
        assert time.monotonic() < deadline, "processes outlive their parent"
        time.sleep(0.05)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
