"""The run folder: the only place that spells its file names, which are a documented interface."""

import re
from dataclasses import dataclass
from pathlib import Path

STEP_NAME = re.compile(r"step-(\d{6,})$")


@dataclass(frozen=True)
class RunDir:
    """Paths of one run; nothing is created by asking for a path."""

    root: Path

    @classmethod
    def of_checkpoints(cls, checkpoints_dir: Path) -> "RunDir":
        """The run whose checkpoints are in a folder."""
        run = cls(checkpoints_dir.parent)
        assert run.checkpoints_dir == checkpoints_dir, f"{checkpoints_dir}, {run.checkpoints_dir}"
        return run

    @property
    def config_path(self) -> Path:
        return self.root / "config.resolved.yaml"

    @property
    def base_dir(self) -> Path:
        """The base model, where it is not the one at model.path: more tokens, or merged."""
        return self.root / "base"

    @property
    def pairs_dir(self) -> Path:
        return self.root / "pairs"

    @property
    def reference_dir(self) -> Path:
        return self.root / "reference"

    @property
    def reference_status_path(self) -> Path:
        return self.root / "reference.json"

    @property
    def checkpoints_dir(self) -> Path:
        return self.root / "checkpoints"

    @property
    def quarantine_dir(self) -> Path:
        return self.checkpoints_dir / "quarantine"

    def checkpoint_dir(self, step: int) -> Path:
        return self.checkpoints_dir / f"step-{step:06d}"

    @property
    def export_dir(self) -> Path:
        return self.root / "export"

    @property
    def adapter_dir(self) -> Path:
        return self.export_dir / "adapter"

    def model_dir(self, merged: bool) -> Path:
        """The folder of the exported whole model: `merged` after LoRA, `full` otherwise."""
        return self.export_dir / ("merged" if merged else "full")

    @property
    def self_check_path(self) -> Path:
        """What the self-checks of models have found so far in this run."""
        return self.root / "self_check.json"

    @property
    def verify_path(self) -> Path:
        return self.root / "verify.json"

    @property
    def push_path(self) -> Path:
        return self.root / "push.json"

    @property
    def evaluate_path(self) -> Path:
        return self.root / "evaluate.json"

    @property
    def generate_path(self) -> Path:
        return self.root / "generate.json"

    def answers_path(self, model_id: str, fastchat: bool) -> Path:
        """Answers of a model to a file of prompts, in a folder that FastChat names so too."""
        return self.root / ("model_answer" if fastchat else "answers") / f"{model_id}.jsonl"

    @property
    def harness_path(self) -> Path:
        return self.root / "harness.json"

    @property
    def status_path(self) -> Path:
        return self.root / "status.json"

    @property
    def heartbeat_path(self) -> Path:
        """Written while a stage gets further; its age is how long it has not."""
        return self.root / "heartbeat.json"

    @property
    def lock_path(self) -> Path:
        return self.root / "run.lock"

    @property
    def lease_dir(self) -> Path:
        """In place of the lock, on a file system without."""
        return self.root / "lease"

    @property
    def metrics_path(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def samples_path(self) -> Path:
        return self.root / "samples.jsonl"

    def non_finite_path(self, step: int) -> Path:
        """The pairs of a step whose loss or gradient was not finite."""
        return self.root / "non_finite" / f"step-{step:06d}.json"

    @property
    def report_dir(self) -> Path:
        return self.root / "report"

    @property
    def tensorboard_dir(self) -> Path:
        return self.root / "tensorboard"

    def trace_path(self, rank: int) -> Path:
        """The profiler's trace of a rank, for train.profile_steps."""
        return self.root / "profile" / f"rank{rank:04d}.trace.json"

    def memory_snapshot_path(self, rank: int) -> Path:
        """What held a rank's GPU memory during these steps."""
        return self.root / "profile" / f"rank{rank:04d}.memory.pickle"

    @property
    def wandb_dir(self) -> Path:
        return self.root / "wandb"

    @property
    def wandb_id_path(self) -> Path:
        return self.root / "wandb.json"

    @property
    def logs_dir(self) -> Path:
        return self.root / "logs"

    @property
    def ray_dir(self) -> Path:
        return self.root / "ray"

    @property
    def latest_log_link(self) -> Path:
        return self.logs_dir / "latest"

    @property
    def doctor_dir(self) -> Path:
        return self.root / "doctor"

    @property
    def doctor_path(self) -> Path:
        return self.root / "doctor.json"

    @property
    def sweep_dir(self) -> Path:
        return self.root / "sweep"

    def sweep_run_dir(self, name: str) -> Path:
        """The run folder of one point of a sweep, or of inputs that points share."""
        return self.sweep_dir / name

    def sweep_array_dir(self, digest: str) -> Path:
        """Overrides of the jobs of an array, a file each."""
        return self.sweep_dir / f"array-{digest}"

    @property
    def sweep_results_path(self) -> Path:
        return self.sweep_dir / "results.json"

    @property
    def sweep_table_path(self) -> Path:
        return self.sweep_dir / "results.csv"

    @property
    def sweep_plot_path(self) -> Path:
        return self.sweep_dir / "results.png"

    def log_dir(self, stage: str, attempt: int) -> Path:
        """Logs of one attempt at a stage, counted from 1; `rankNNNN.log` each."""
        return self.logs_dir / f"{stage}-{attempt:02d}"

    def count_attempts(self, stage: str) -> int:
        """Attempts at a stage so far; a launcher makes the next one's folder."""
        attempt = 0
        while self.log_dir(stage, attempt + 1).is_dir():
            attempt += 1
        return attempt


@dataclass(frozen=True)
class JudgedDir:
    """Paths of one comparison of two answer files."""

    root: Path

    @property
    def replies_path(self) -> Path:
        return self.root / "replies.jsonl"

    @property
    def verdicts_path(self) -> Path:
        return self.root / "verdicts.parquet"

    @property
    def result_path(self) -> Path:
        return self.root / "result.json"


def partial_path(path: Path) -> Path:
    """A file of lines while it is being written."""
    return path.with_name(f"{path.name}.partial")


def manifest_beside(path: Path) -> Path:
    """The manifest of an artifact that is a single file."""
    return path.with_name(f"{path.name}.manifest")


def step_of(checkpoint_dir: Path) -> int | None:
    """The optimizer step in a checkpoint folder's name, None for other folders."""
    match = STEP_NAME.fullmatch(checkpoint_dir.name)
    return int(match.group(1)) if match else None


MANIFEST_NAME = "MANIFEST.json"
COMMIT_NAME = "COMMITTED"
PROBE_NAME = "probe.safetensors"
TRAIN_STATE_NAME = "train_state.json"
PAIRS_REPORT_NAME = "report.json"
REPORT_PAGE_NAME = "index.html"
PAIRS_PAGE_NAME = "report.html"


def rng_name(rank: int) -> str:
    """A checkpoint's file with the random generators of one rank."""
    return f"rng_rank_{rank:05d}.pt"


def rank_log_path(log_dir: Path, rank: int) -> Path:
    """The log of one rank in the folder of an attempt."""
    return log_dir / f"rank{rank:04d}.log"


def rank_failure_path(log_dir: Path, rank: int) -> Path:
    """What a rank other than 0 failed of, or which signal killed a rank."""
    return log_dir / f"rank{rank:04d}.failed.json"


def rank_failures(log_dir: Path) -> dict[int, Path]:
    """These files of an attempt by rank, in rank order."""
    paths = sorted(log_dir.glob("rank*.failed.json"))
    return {int(path.name.removeprefix("rank").partition(".")[0]): path for path in paths}
