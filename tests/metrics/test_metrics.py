"""The metrics files, read back as scripts and TensorBoard read them."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dpo_dist.metrics.writer import MetricsWriter, read_lines


def lines_of(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def events_of(directory: Path) -> EventAccumulator:
    return EventAccumulator(str(directory)).Reload()


def scalars_of(directory: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events_of(directory).Scalars(tag)]


def test_train_and_eval_metrics_have_the_names_the_trainer_gives_them(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "run" / "metrics.jsonl", tmp_path / "tb") as writer:
        writer.write(1, {"loss": 0.6875, "rewards/accuracies": 0.5, "consumed_pairs": 8})
        writer.write(1, {"loss": 0.75, "rewards/accuracies": 0.25}, kind="eval")
    train, evaluation = lines_of(tmp_path / "run" / "metrics.jsonl")
    assert train.pop("time") > 1.7e9 and evaluation.pop("time") > 1.7e9
    assert train == {"step": 1, "loss": 0.6875, "rewards/accuracies": 0.5, "consumed_pairs": 8}
    assert evaluation == {"step": 1, "eval_loss": 0.75, "eval_rewards/accuracies": 0.25}
    assert set(events_of(tmp_path / "tb").Tags()["scalars"]) == {
        "train/loss",
        "train/rewards/accuracies",
        "train/consumed_pairs",
        "eval/loss",
        "eval/rewards/accuracies",
    }
    assert scalars_of(tmp_path / "tb", "train/loss") == [(1, 0.6875)]
    assert scalars_of(tmp_path / "tb", "eval/rewards/accuracies") == [(1, 0.25)]


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    path, events = tmp_path / "metrics.jsonl", tmp_path / "tb"
    with MetricsWriter(path, events) as writer:
        for step in range(1, 6):
            writer.write(step, {"loss": float(step)})
        writer.write(2, {"loss": 20.0}, kind="eval")
        writer.write(4, {"loss": 40.0}, kind="eval")
    with MetricsWriter(path, events, resume_step=3) as writer:
        for step in range(4, 7):
            writer.write(step, {"loss": 10.0 * step})
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 50.0), (6, 60.0)]
    lines = lines_of(path)
    assert [(line["step"], line["loss"]) for line in lines if "loss" in line] == expected
    assert [line["step"] for line in lines if "eval_loss" in line] == [2]
    assert scalars_of(events, "train/loss") == expected
    assert scalars_of(events, "eval/loss") == [(2, 20.0)]


def test_a_fresh_start_in_a_used_folder_begins_anew(tmp_path: Path) -> None:
    path, events = tmp_path / "metrics.jsonl", tmp_path / "tb"
    for loss in (1.0, 2.0):
        with MetricsWriter(path, events) as writer:
            writer.write(0, {"loss": loss})
            writer.write(1, {"loss": loss})
    assert [(line["step"], line["loss"]) for line in lines_of(path)] == [(0, 2.0), (1, 2.0)]
    assert scalars_of(events, "train/loss") == [(0, 2.0), (1, 2.0)]


def test_a_line_torn_by_a_kill_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 1.0}\nnot json\n{"loss": 1}\n{"step": 2, "lo\xff\x00')
    with MetricsWriter(path, None, resume_step=5) as writer:
        writer.write(6, {"loss": 6.0})
    assert [line["step"] for line in lines_of(path)] == [1, 6]


def test_numbers_json_does_not_know_become_null_and_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = {"loss": math.nan, "grad_norm": math.inf, "epoch": 0.5}
    with MetricsWriter(path, tmp_path / "tb") as writer:
        writer.write(1, metrics)
        writer.write(2, metrics, kind="eval")
    train, evaluation = lines_of(path)
    assert (train["loss"], train["grad_norm"], train["epoch"]) == (None, None, 0.5)
    assert train["non_finite"] == ["loss", "grad_norm"]
    assert evaluation["non_finite"] == ["eval_loss", "eval_grad_norm"]
    ((step, value),) = scalars_of(tmp_path / "tb", "train/loss")
    assert step == 1 and math.isnan(value)


def test_samples_reach_both_files(tmp_path: Path) -> None:
    answer = "answer with ü, \u2028 and \N{SNAKE}\nin two lines"
    path = tmp_path / "samples.jsonl"
    with MetricsWriter(tmp_path / "metrics.jsonl", tmp_path / "tb", samples_path=path) as writer:
        writer.write_samples(7, [("who?", answer)])
    (line,) = lines_of(path)
    assert line.pop("time") > 1.7e9
    assert line == {"step": 7, "number": 0, "prompt": "who?", "answer": answer}
    events = events_of(tmp_path / "tb")
    assert events.Tags()["tensors"] == ["samples/0/text_summary"]
    assert events.SummaryMetadata("samples/0/text_summary").plugin_data.plugin_name == "text"
    (event,) = events.Tensors("samples/0/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert (event.step, text.splitlines()[2]) == (7, "    who?")
    assert text.endswith("\n    in two lines")


def test_samples_of_an_earlier_attempt_go_with_its_metrics(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    for resume_step, steps in ((-1, (0, 2, 4)), (3, (4,))):
        with MetricsWriter(tmp_path / "m.jsonl", None, resume_step, path) as writer:
            for step in steps:
                writer.write_samples(step, [("p", str(resume_step))])
    assert [(line["step"], line["answer"]) for line in lines_of(path)] == [
        (0, "-1"), (2, "-1"), (4, "3"),
    ]  # fmt: skip


def test_lines_are_read_up_to_a_step_and_a_torn_one_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_lines(path) == []
    path.write_bytes(b'{"step": 1, "loss": 1.0}\n{"step": 2}\n{"step": 3, "lo\xff')
    assert read_lines(path) == [{"step": 1, "loss": 1.0}, {"step": 2}]
    assert read_lines(path, last_step=1) == [{"step": 1, "loss": 1.0}]


def test_what_was_written_is_there_before_close(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl", tmp_path / "tb")
    writer.write(1, {"loss": 1.0})
    assert lines_of(tmp_path / "metrics.jsonl")[0]["loss"] == 1.0
    assert scalars_of(tmp_path / "tb", "train/loss") == [(1, 1.0)]
    writer.close()


def test_without_a_tensorboard_folder_only_the_lines_are_written(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "metrics.jsonl", None) as writer:
        writer.write(1, {"loss": 1.0})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("tensorboard_dir", ["None", "Path(sys.argv[1]) / 'tb'"])
def test_torch_is_never_imported(tensorboard_dir: str, tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from dpo_dist.metrics.writer import MetricsWriter
folder = Path(sys.argv[1])
with MetricsWriter(folder / "m.jsonl", {tensorboard_dir}, samples_path=folder / "s") as writer:
    writer.write(1, {{"loss": 1.0}})
    writer.write_samples(1, [("prompt", "text")])
sys.exit("torch" in sys.modules)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    assert subprocess.run(command, cwd=Path(__file__).parents[2]).returncode == 0
