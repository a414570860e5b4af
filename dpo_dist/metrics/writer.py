"""Metrics of a run as JSON lines, TensorBoard events and to W&B, under TRL's names.

A line of the JSONL file is strict JSON: {"step": 200, "time": <Unix seconds>, name: number, ...}.

| names | unit, and over what |
| --- | --- |
| loss, rewards/chosen, rewards/rejected, rewards/margins | mean over the pairs of the step |
| rewards/accuracies | share of pairs whose chosen reward is the larger one |
| logps/chosen, logps/rejected | mean over pairs of the policy's summed log-probs |
| grad_norm, learning_rate, epoch | before clipping; as used by the step; epochs consumed |
| tokens_per_second, pairs_per_second | all ranks together |
| tokens_per_second_per_gpu | packed tokens of one rank |
| mfu | model FLOPs a second over the GPUs' peak, where that is known |
| peak_memory_gib | of the fullest rank: most GPU memory of tensors since the last line; without \
GPUs the most memory its process ever held |
| tokens_saved_by_sharing | prompt tokens not computed twice, share of the unshared tokens |
| skipped_steps | steps so far whose gradient was not finite; under train.non_finite skip only |
| consumed_pairs | pairs trained on since the start of the run |

Evaluation metrics are `eval_<name>` in the JSONL file and `eval/<name>` in TensorBoard, training
metrics `<name>` and `train/<name>`, as the transformers Trainer writes them. With held-out pairs of
several sources each has them apart too, as `eval_<name>/<source>`.
"""

# pyright: reportAttributeAccessIssue=false
# (protobuf makes its message classes at import, where no type checker sees them)

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dpo_dist.errors import naming
from dpo_dist.metrics.wandb_log import finish_run
from dpo_dist.parsing import parse_object
from dpo_dist.run.manifest import write_atomic
from dpo_dist.watch.lease import fence

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

_logger = logging.getLogger(__name__)
Kind = Literal["train", "eval"]


class MetricsWriter:
    """Appends the metrics of one process, rank 0, to `jsonl_path` and `tensorboard_dir`.

    Answers to held-out prompts go to `samples_path` and, as text, to `tensorboard_dir`. What an
    earlier attempt wrote after `resume_step` is dropped from all of them, so a step appears once;
    -1 drops everything. Nothing is written for TensorBoard when `tensorboard_dir` is None;
    `wandb_run`, from wandb_log.start_run, gets the same names and is finished at the end. Every
    write is flushed: what was written survives a killed process.
    """

    def __init__(
        self,
        jsonl_path: Path,
        tensorboard_dir: Path | None,
        resume_step: int = -1,
        samples_path: Path | None = None,
        wandb_run: Any = None,
    ) -> None:
        jsonl_path.parent.mkdir(parents=True, exist_ok=True)
        _truncate(jsonl_path, resume_step)
        self._jsonl = jsonl_path.open("a", encoding="utf-8")
        self._samples_path = samples_path
        if samples_path is not None:
            _truncate(samples_path, resume_step)
        self._wandb = wandb_run
        self._events = None
        if tensorboard_dir is not None:
            self._events = _EventFile(tensorboard_dir, purge_step=resume_step + 1)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is not None and self._wandb is not None:
            # W&B is waited for, which a server that is gone makes long: the reason comes first
            _logger.error("the run ends: %r", error)
        self.close()

    def write(self, step: int, metrics: Mapping[str, float], kind: Kind = "train") -> None:
        """Writes one line and one event of each metric.

        A number that JSON does not know (NaN, infinity) becomes null, and `non_finite` lists the
        names of those; TensorBoard gets the number itself.
        """
        prefix = "eval_" if kind == "eval" else ""
        named = {prefix + name: value for name, value in metrics.items()}
        non_finite = [name for name, value in named.items() if not math.isfinite(value)]
        line: dict[str, Any] = {**named, **dict.fromkeys(non_finite)}
        if non_finite:
            line["non_finite"] = non_finite
        self._write_line(step, line)
        tagged = {f"{kind}/{name}": value for name, value in metrics.items()}
        if self._events is not None:
            self._events.add_scalars(step, tagged)
        if self._wandb is not None:
            self._wandb.log(tagged, step=step)

    def write_samples(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        """Writes (prompt, answer) texts: lines {"step", "time", "number", "prompt", "answer"}."""
        assert self._samples_path is not None, "opened without samples_path"
        now = time.time()
        path = self._samples_path
        with naming(path), path.open("a", encoding="utf-8") as stream:
            for number, (prompt, answer) in enumerate(samples):
                line = {"step": step, "time": now, "number": number}
                stream.write(json.dumps(line | {"prompt": prompt, "answer": answer}) + "\n")
                if self._events is not None:
                    self._events.add_text(step, f"samples/{number}", _as_markdown(prompt, answer))

    def close(self) -> None:
        """Flushes and closes the files."""
        self._jsonl.close()
        if self._events is not None:
            self._events.close()
        if self._wandb is not None:
            finish_run(self._wandb)

    def _write_line(self, step: int, values: dict[str, Any]) -> None:
        line = {"step": step, "time": time.time(), **values}
        fence()
        with naming(self._jsonl.name):
            self._jsonl.write(json.dumps(line, allow_nan=False) + "\n")
            self._jsonl.flush()


class _EventFile:
    """A TensorBoard event file written without torch; tensorboard is imported on first use."""

    def __init__(self, directory: Path, purge_step: int) -> None:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event = event_pb2.Event
        self._writer = EventFileWriter(str(directory))
        # a session start makes readers forget the events of earlier files from this step on;
        # the version in the same event tells them that this file knows about session starts
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        now = time.time()
        self._writer.add_event(
            event_pb2.Event(wall_time=now, step=purge_step, file_version="brain.Event:2")
        )
        self._writer.add_event(event_pb2.Event(wall_time=now, step=purge_step, session_log=start))
        self._writer.flush()

    def add_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._add(
            step,
            Summary(
                value=[Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
            ),
        )

    def add_text(self, step: int, tag: str, text: str) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING
        from tensorboard.plugins.text.metadata import create_summary_metadata

        value = Summary.Value(
            tag=f"{tag}/text_summary",
            metadata=create_summary_metadata(display_name=tag, description=""),
            tensor=TensorProto(dtype=DT_STRING, string_val=[text.encode()]),
        )
        self._add(step, Summary(value=[value]))

    def close(self) -> None:
        self._writer.close()

    def _add(self, step: int, summary: Summary) -> None:
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()


def read_lines(path: Path, last_step: int | None = None) -> list[dict[str, Any]]:
    """The lines of a metrics or samples file up to a step; none when there is no such file.

    A line cut short by a kill, or one that is being written, is passed over.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    steps = [(_step_of(line), line) for line in lines]
    return [
        parse_object(line)
        for step, line in steps
        if step >= 0 and (last_step is None or step <= last_step)
    ]


def _as_markdown(prompt: str, answer: str) -> str:
    """Both texts as blocks of code, which no renderer takes for markup."""
    parts = []
    for name, text in (("prompt", prompt), ("answer", answer)):
        parts += [f"**{name}**", "\n".join(f"    {line}" for line in text.splitlines())]
    return "\n\n".join(parts)


def _truncate(jsonl_path: Path, resume_step: int) -> None:
    """Keeps the lines up to `resume_step`; a last line cut short by a kill goes too."""
    if not jsonl_path.exists():
        return
    kept = [
        line
        for line in jsonl_path.read_text(encoding="utf-8", errors="replace").splitlines()
        if 0 <= _step_of(line) <= resume_step
    ]
    write_atomic(jsonl_path, "".join(line + "\n" for line in kept))


def _step_of(line: str) -> int:
    try:
        step = parse_object(line).get("step")
    except ValueError:
        return -1
    return step if type(step) is int else -1
