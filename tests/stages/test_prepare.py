"""The prepare stage: rows in, a pairs folder out; skipped, refused, killed, previewed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.prepared import (
    REAL_DATA,
    REAL_MODEL,
    WORDS,
    make_config,
    make_model,
    needs_real,
    orca_row,
    pairs_of,
    report_of,
    write_jsonl,
)

from dpo_dist.config.run_config import RunConfig, parse_config
from dpo_dist.data.pairs import open_pairs
from dpo_dist.data.rows.messages import message
from dpo_dist.errors import ArtifactError, ConfigError, DataError
from dpo_dist.run.manifest import read_manifest
from dpo_dist.stages import prepare


def test_rows_become_pairs_with_report_and_manifest(tmp_path: Path) -> None:
    rows = [orca_row(number) for number in range(30)]
    rows += [orca_row(30, "same", "same"), orca_row(31, ""), orca_row(0), orca_row(32, "y " * 400)]
    rows += [orca_row(33, "a", "b"), orca_row(33, "b", "a")]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "eval.jsonl", [orca_row(5), orca_row(99), orca_row(98)])
    config = make_config(tmp_path, max_length=64)

    folder = prepare.run(config)
    train, held_out = (open_pairs(folder, split) for split in ("train", "eval"))
    assert (len(train), len(held_out)) == (31, 2)
    assert train.origin(30) == f"{tmp_path}/train.jsonl:34"
    longest = train.prompt_lengths + train.chosen_lengths
    assert longest.max() == longest[30] == 64
    assert [path.name for path in folder.iterdir() if path.name.startswith((".", "scratch"))] == []

    report = json.loads((folder / "report.json").read_text())
    counts = report["splits"]["train"]
    assert (counts["rows"], counts["kept"], counts["pairs"]) == (36, 31, 31)
    dropped = {name: number for name, number in counts["dropped"].items() if number}
    assert dropped == {"empty": 1, "identical": 1, "conflict": 2, "duplicate": 1}
    assert {name: number for name, number in counts["noted"].items() if number} == {"truncated": 1}
    assert counts["first"]["duplicate"] == f"{tmp_path}/train.jsonl:33"
    assert counts["sources"]["train"]["format"] == "orca"
    assert counts["lengths"]["chosen"]["max"] == train.chosen_lengths.max()
    assert counts["lengths"]["prompt"]["p50"] == sorted(train.prompt_lengths)[15]
    assert counts["tokens"] == train.packed_lengths.sum()
    shared = train.prompt_lengths.sum()
    assert counts["tokens_saved_by_sharing"] == pytest.approx(shared / (counts["tokens"] + shared))
    assert report["splits"]["eval"]["dropped"]["overlap"] == 1

    manifest = read_manifest(folder)
    assert manifest.details["max_length"] == 64
    assert manifest.details["splits"] == {
        "train": {"num_pairs": 31, "digest": train.digest},
        "eval": {"num_pairs": 2, "digest": held_out.digest},
    }


def test_what_pairs_of_a_prompt_save_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    answers = [f"{word} {word}" for word in WORDS[:4]]
    rows = [
        {"prompt": f"{WORDS[number]} " * 8, "responses": answers, "scores": [4, 3, 2, 1]}
        for number in range(8)
    ]
    caplog.set_level("INFO")
    told = {}
    for pairs in ("best_vs_worst", "all"):
        caplog.clear()
        folder = tmp_path / pairs
        folder.mkdir()
        write_jsonl(folder / "rows.jsonl", rows)
        config = make_config(folder, train=[{"path": f"{folder}/rows.jsonl", "pairs": pairs}])
        step = config.train.model_copy(update={"global_batch_size": 8})
        prepare.run(config.model_copy(update={"train": step}))
        told[pairs] = [line for line in caplog.messages if "is computed once" in line]
    assert told["best_vs_worst"] == [], "every pair has its own prompt"
    (line,) = told["all"]
    found = re.fullmatch(
        r"prepare: what pairs of a step share is computed once: (0\.\d{3}) with data.order pairs, "
        r"(0\.\d{3}) with data.order prompts of the tokens",
        line,
    )
    assert found is not None and float(found[2]) < float(found[1]) < 1


def test_max_length_auto_is_reported_with_its_arithmetic(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [orca_row(n, "yes " * (n % 20)) for n in range(1, 80)])
    report = report_of(make_config(tmp_path))
    assert report["max_length"] % 8 == 0
    assert report["max_length_reason"].startswith(
        f"{report['max_length']} (auto: p99 of prompt + longer answer over 76 training pairs is "
    )


@pytest.mark.parametrize("limit", [{"max_position_embeddings": 60}, {"n_positions": 60}])
def test_the_models_positions_bound_max_length(tmp_path: Path, limit: dict[str, int]) -> None:
    write_jsonl(tmp_path / "train.jsonl", [orca_row(n, "yes " * 100) for n in range(4)])
    make_model(tmp_path, **limit)
    with pytest.raises(DataError, match="data.max_length 61 is above the model's 60 positions"):
        prepare.run(make_config(tmp_path, max_length=61))
    assert report_of(make_config(tmp_path))["max_length"] == 60


def test_sources_are_mixed_by_weight_and_counted_apart(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [orca_row(number) for number in range(10)])
    plain = [{"prompt": f"{n}", "chosen": " yes", "rejected": " no"} for n in range(4)]
    write_jsonl(tmp_path / "b.jsonl", plain)
    sources = [
        {"path": str(tmp_path / "a.jsonl"), "weight": 0.5},
        {"path": str(tmp_path / "b.jsonl"), "weight": 2, "name": "[plain]"},
    ]
    config = make_config(tmp_path, train=sources)
    report = report_of(config)
    by_source = report["splits"]["train"]["sources"]
    assert {n: (c["rows"], c["pairs"]) for n, c in by_source.items()} == {
        "a": (5, 5), "[plain]": (4, 8)
    }  # fmt: skip
    assert pairs_of(config).sources.tolist() == ["a"] * 5 + ["[plain]"] * 8
    assert report["hints"] == [
        "[plain]: format standard is plain text without the chat template, as in TRL; for the "
        "template set format: orca and columns: {question: prompt}"
    ]


def test_a_split_template_marker_is_hinted_at(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [orca_row(0)])
    (hint,) = report_of(make_config(tmp_path, chat_template="llama3"))["hints"]
    assert hint.startswith("chat template llama3 writes <|start_header_id|>, ")


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"global_batch_size": 9}, "8 pairs; expected at least one global batch of 9"),
        ({"micro_batch_tokens": 9}, "expected at most micro_batch_tokens = 9"),
        ({"num_epochs": 0.01}, "do not fill one optimizer step"),
        ({"lr_schedule": "wsd", "decay_steps": 1000}, "1000 of decay in a run of"),
    ],
)
def test_pairs_that_training_cannot_begin_on_are_refused_here(
    tmp_path: Path, settings: dict[str, Any], found: str
) -> None:
    """And stay: with another setting the next run finds them current."""
    write_jsonl(tmp_path / "train.jsonl", [orca_row(number) for number in range(8)])
    config = make_config(tmp_path)
    wrong = config.model_copy(update={"train": config.train.model_copy(update=settings)})
    with pytest.raises((ConfigError, DataError), match=found):
        prepare.run(wrong)
    made = (config.run.dir / "pairs").stat().st_ino
    prepare.run(config)
    assert (config.run.dir / "pairs").stat().st_ino == made


def test_a_current_folder_is_left_alone(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [orca_row(n) for n in range(4)])
    config = make_config(tmp_path)
    folder = prepare.run(config)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert prepare.run(make_config(tmp_path, num_workers=2)) == folder  # speed changes no pair
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def stale_reason(config: RunConfig) -> str:
    with pytest.raises(ArtifactError) as caught:
        prepare.run(config)
    found = str(caught.value)
    assert found.endswith(
        f"Choose another run.dir, or delete {config.run.dir}/pairs to make it again."
    )
    return found


def test_a_stale_folder_is_refused_with_the_difference(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [orca_row(n) for n in range(4)])
    config = make_config(tmp_path)
    digest = pairs_of(config).digest

    assert '(max_length: "auto" -> 32)' in stale_reason(make_config(tmp_path, max_length=32))
    limited = make_config(tmp_path, train=[{"path": str(path), "limit": 2}])
    assert "(train.0.limit: null -> 2)" in stale_reason(limited)
    templated = make_config(tmp_path, chat_template="zephyr")
    assert 'chat_template: null -> "zephyr"; input chat_template: null' in stale_reason(templated)

    write_jsonl(path, [orca_row(n) for n in range(5)])
    assert "(input data.train.0: " in stale_reason(config)
    write_jsonl(path, [orca_row(n) for n in range(4)])
    assert pairs_of(config).digest == digest  # the same rows again, whatever the file's date
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert "(input tokenizer: " in stale_reason(config)


def test_nothing_is_left_of_a_failed_run(tmp_path: Path) -> None:
    rows = [orca_row(n) for n in range(4)]
    del rows[2]["chosen"]
    write_jsonl(tmp_path / "train.jsonl", rows)
    config = make_config(tmp_path)
    with pytest.raises(DataError) as caught:
        prepare.run(config)
    assert str(caught.value).startswith(f"{tmp_path}/train.jsonl:3 has no field 'chosen'")
    assert list(config.run.dir.iterdir()) == []


@pytest.mark.parametrize("on", ["eval", "train"])
def test_an_empty_split_is_refused(tmp_path: Path, on: str) -> None:
    write_jsonl(tmp_path / "train.jsonl", [orca_row(0), orca_row(1)])
    write_jsonl(tmp_path / "eval.jsonl", [orca_row(2)])
    write_jsonl(tmp_path / f"{on}.jsonl", [orca_row(0, "", "")])
    with pytest.raises(DataError, match=f"no {on} pair is left of 1 rows"):
        prepare.run(make_config(tmp_path))


def test_the_preview_shows_scored_tokens_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(tmp_path / "a.jsonl", [orca_row(0), orca_row(1)])
    write_jsonl(tmp_path / "b.jsonl", [{"prompt": "P", "chosen": "", "rejected": " no"}])
    sources = [{"path": str(tmp_path / name)} for name in ("a.jsonl", "b.jsonl")]
    config = make_config(tmp_path, train=sources)
    prepare.preview(config, 5)
    shown = capsys.readouterr().out
    assert f"a, orca, {tmp_path}/a.jsonl:1\n" in shown
    assert "<|im_start|>user\none one 0<|im_end|>\n<|im_start|>assistant\n" in shown
    assert "[<|im_end|>][\u21b5]" in shown
    assert "scored tokens" in shown
    assert f"{tmp_path}/b.jsonl:1\ndropped, empty: the prompt or an answer is empty" in shown
    assert not config.run.dir.exists()

    prepare.preview(make_config(tmp_path, train=sources, max_length=20), 1)
    cut = capsys.readouterr().out
    assert "b.jsonl" not in cut and cut.count("scored tokens") == 2


def test_a_template_that_leaves_text_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "weather"}]}
    no = message("assistant", "no")
    calls = [
        {"prompt": [message("user", f"Q{n}")], "chosen": [call], "rejected": [no]} for n in range(4)
    ]
    good = [{**row, "chosen": [message("assistant", "yes")]} for row in calls]
    path = tmp_path / "calls.jsonl"
    write_jsonl(path, [*calls, *good])
    config = make_config(tmp_path, train=[{"path": str(path)}])
    prepare.preview(config, 1)
    shown = capsys.readouterr().out
    assert shown.startswith("[scored] [token][s]; read and not scored; {lost}: in the row, and in")
    assert "leaves it out\ntool_calls of the answer: {weather}\n" in shown
    with pytest.raises(DataError) as caught:
        prepare.run(config)
    assert str(caught.value) == (
        "4 of 8 train rows where the chat template leaves out what the row says (the first is "
        f"{path}:1: tool_calls of the answer); expected at most 3, because data.on_lost_text is "
        "raise. Set data.chat_template to one that writes it, or data.allow_lost to do without. Or "
        "set data.on_lost_text=drop."
    )
    write_jsonl(path, [*calls[:3], *good])
    prepare.run(config)
    counts = report_of(config)["splits"]["train"]
    assert counts["dropped"]["lost_text"] == 3 and counts["pairs"] == 4
    assert counts["lost_text"][0] == f"{path}:1: tool_calls of the answer"


def run_in_process(path: Path) -> "subprocess.Popen[str]":
    program = (
        "import sys; from pathlib import Path\n"
        "from dpo_dist.config.run_config import load_config\n"
        "from dpo_dist.stages import prepare\n"
        "if __name__ == '__main__': prepare.run(load_config(Path(sys.argv[1])))\n"
    )
    script = path.parent / "prepare_run.py"
    script.write_text(program)
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "COLUMNS": "200"}
    return subprocess.Popen(
        [sys.executable, str(script), str(path)],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def write_config(folder: Path, num_rows: int, **data: Any) -> tuple[Path, RunConfig]:
    write_jsonl(folder / "train.jsonl", [orca_row(n, WORDS[n % 9]) for n in range(num_rows)])
    config = make_config(folder, **data)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path, config


def test_killed_half_way_leaves_no_pairs_and_the_next_run_makes_them(tmp_path: Path) -> None:
    path, config = write_config(tmp_path, 30_000, num_workers=1)
    partial = config.run.dir / ".pairs.partial" / "scratch"
    killed = run_in_process(path)
    deadline = time.monotonic() + 60
    while not (partial.exists() and any(p.stat().st_size > 10_000 for p in partial.iterdir())):
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (config.run.dir / "pairs").exists() and partial.exists()

    shorter = [{"path": str(tmp_path / "train.jsonl"), "limit": 100}]
    pairs = pairs_of(make_config(tmp_path, train=shorter))
    assert len(pairs) == 100 and not partial.exists()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    peaks_mib: list[float] = []
    for num_rows in (6_000, 60_000):
        folder = tmp_path / str(num_rows)
        folder.mkdir()
        path, config = write_config(folder, num_rows, num_workers=1)
        done = run_in_process(path)
        _, status, usage = os.wait4(done.pid, 0)
        assert status == 0, done.stderr and done.stderr.read()
        assert len(open_pairs(config.run.dir / "pairs", "train")) == num_rows
        peaks_mib.append(usage.ru_maxrss / 1024)
    # about 400 bytes a row of keys and lengths, and never the token ids
    assert peaks_mib[1] - peaks_mib[0] < 54_000 * 1000 / 2**20, peaks_mib


@needs_real
def test_real_rows_of_all_formats(tmp_path: Path) -> None:
    assert REAL_DATA is not None and REAL_MODEL is not None
    formats = {
        "ultrafeedback_binarized": ("ultrafeedback", 300),
        "orca_dpo_pairs": ("orca", 284),
        "stack_exchange_paired": ("stack_exchange", 25),
        "llmbar": ("standard", 885),
    }
    sources = [{"path": f"{REAL_DATA}/{name}.jsonl"} for name in formats]
    config = parse_config(
        {
            "run": {"dir": str(tmp_path / "out")},
            "model": {"path": REAL_MODEL},
            "data": {"train": sources, "max_length": 1024},
        }
    )
    pairs, report = pairs_of(config), report_of(config)
    counts = report["splits"]["train"]["sources"]
    for name, (row_format, num_rows) in formats.items():
        assert (counts[name]["format"], counts[name]["rows"]) == (row_format, num_rows)
        assert counts[name]["pairs"] >= 0.8 * num_rows
    assert counts["llmbar"]["dropped"]["empty"] > 0
    assert len(pairs) == report["splits"]["train"]["pairs"] > 1200
    assert (pairs.prompt_lengths + pairs.chosen_lengths).max() <= 1024
    assert (pairs.chosen_lengths > 0).all() and (pairs.rejected_lengths > 0).all()
    for index in range(0, len(pairs), 50):
        pairs.token_ids(index)
