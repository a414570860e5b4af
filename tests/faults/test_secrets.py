"""Tokens and keys are in no file, no output and no argv of a run: FAULTS 28.

The environment of the ranks has them, since they inherit it: a rank asks the Hub for a gated model.
"""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.commands import succeed
from support.ranks import ROOT
from support.tiny_run import make_run

from dpo_dist.config.run_config import load_config
from dpo_dist.errors import ConfigError

SECRETS = {
    "HF_TOKEN": "hf_" + "Qz7" * 12,
    "OPENAI_API_KEY": "sk-" + "w8y2k5" * 6,
    "WANDB_API_KEY": "4d5a" * 10,
    "RAY_AUTH_TOKEN": "ray-auth-7c1f0e9d2b",
}
LAUNCHER = ROOT / "launch" / "slurm_launcher.py"
SETTINGS = ("local.workers=1", "train.max_steps=2", "logging.tensorboard=true")


def start(*command: str | Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT,
        env=os.environ | SECRETS | {"HF_HUB_OFFLINE": "1", "COLUMNS": "1000"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def told_in(content: bytes) -> list[str]:
    return [name for name, secret in SECRETS.items() if secret.encode() in content]


def argv_of_all() -> bytes:
    """The commands of every process of this machine."""
    commands = b""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            commands += path.read_bytes()
    return commands


@pytest.mark.fault(
    28,
    "tokens of the Hub, a judge, W&B and Ray in the environment of `dpo-dist run`",
    becomes="in no file of the run, no output and no argv; the environment of ranks has them",
)
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_fault_28_a_run_tells_no_token(tmp_path: Path) -> None:
    out = tmp_path / "said"
    running = start("-m", "dpo_dist", "run", make_run(tmp_path), *SETTINGS)
    seen: set[bytes] = set()
    with running, out.open("wb") as said:
        assert running.stdout is not None
        os.set_blocking(running.stdout.fileno(), False)
        while running.poll() is None:
            said.write(running.stdout.read() or b"")
            seen.add(argv_of_all())
            time.sleep(0.1)
        said.write(running.stdout.read() or b"")
    assert running.returncode == 0, out.read_text()
    assert any(b"dpo_dist\0train" in commands for commands in seen), "no rank was looked at"
    assert [told for commands in seen if (told := told_in(commands))] == []
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.resolved.yaml", "status.json", "rank0000.log"} <= {p.name for p in files}
    assert {str(path): told for path in files if (told := told_in(path.read_bytes()))} == {}


@pytest.mark.fault(
    28, "the same, and dry runs for this machine, Slurm and Ray", becomes="in no output"
)
def test_fault_28_no_dry_run_tells_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_yaml, cluster = make_run(tmp_path), ("slurm.nodes=2", "objective.beta=0.1,0.5")
    written = sorted(tmp_path.rglob("*"))
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    for command in (
        ("run", run_yaml, "--dry-run"),
        ("sweep", run_yaml, *cluster, "--slurm", "--dry-run"),
        ("sweep", run_yaml, cluster[1], "--ray", "--dry-run"),
    ):
        done = succeed(*command)
        assert str(run_yaml) in done.stdout + done.stderr
        assert told_in(f"{done.stdout}{done.stderr}".encode()) == [], command
    dry = start(LAUNCHER, run_yaml, "slurm.nodes=2", "--dry-run")
    said, _ = dry.communicate(timeout=120)
    assert dry.returncode == 0 and str(run_yaml).encode() in said, said.decode()
    assert told_in(said) == []
    assert sorted(tmp_path.rglob("*")) == written


@pytest.mark.fault(
    28,
    "a token or a password in a config, in a key that is not known, in an override",
    becomes="refused before anything is written, without its value",
)
@pytest.mark.parametrize(
    ("override", "secret"),
    [
        ("data.train.0.path=https://me:pa55word@host/rows.jsonl", "pa55word"),
        (f"data.train.0.revision={SECRETS['HF_TOKEN']}", SECRETS["HF_TOKEN"]),
        (f"export.hub_token={SECRETS['HF_TOKEN']}", SECRETS["HF_TOKEN"]),
        (f"slurm.options=[--export=KEY={SECRETS['OPENAI_API_KEY']}]", SECRETS["OPENAI_API_KEY"]),
        (f"logging.wandb_name={SECRETS['WANDB_API_KEY']}", SECRETS["WANDB_API_KEY"]),
        (f"train.learning_rate.x={SECRETS['HF_TOKEN']}", SECRETS["HF_TOKEN"]),
    ],
)
def test_fault_28_a_config_with_a_secret_is_refused(
    override: str, secret: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    path = tmp_path / "run.yaml"
    path.write_text("{run: {dir: out}, model: {path: m}, data: {train: [{path: a}]}}")
    with pytest.raises(ConfigError, match="holds what looks like a token or a password") as caught:
        load_config(path, [override])
    assert override.partition("=")[0] in str(caught.value) and secret not in str(caught.value)


def test_names_that_begin_like_a_token_are_none(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("{run: {dir: hf_checkpoints}, model: {path: m}, data: {train: [{path: a}]}}")
    names = ["run.dir=runs/sk-large_model", "data.train.0.path=https://host/a@b.jsonl"]
    assert load_config(path, names).run.dir == Path("runs/sk-large_model")
