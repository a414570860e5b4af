"""Best checkpoint, early stop and samples in real training: kept, told, and the same after a kill.

With this learning rate the loss on the held-out pairs only rises after step 2.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import succeed
from support.ranks import ROOT, run_ranks, wait_until
from support.tiny_run import make_run, metrics_of, same_training, succeed_on

from dpo_dist.config.run_config import load_config
from dpo_dist.errors import DataError
from dpo_dist.metrics.evaluations import record
from dpo_dist.metrics.writer import read_lines
from dpo_dist.run.manifest import read_manifest
from dpo_dist.run.topology import SINGLE_PROCESS
from dpo_dist.stages import export, prepare, reference, train
from dpo_dist.training.records import why_ended_early

pytestmark = pytest.mark.timeout(900)
BEST = ["checkpoint.best_by=eval_loss", "train.learning_rate=0.01", "eval.every_steps=2"]
EARLY = [*BEST, "checkpoint.every_steps=4", "eval.patience=2"]
SAMPLES = [
    "eval.samples_every_steps=3", "eval.num_samples=3", "generate.max_new_tokens=4",
    "logging.tensorboard=true",
]  # fmt: skip


@pytest.fixture(scope="module")
def run_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its reference, trained to the end with the best checkpoint kept."""
    path = make_run(tmp_path_factory.mktemp("early"))
    succeed_on(1, "prepare", path)
    succeed_on(2, "reference", path)
    succeed_on(2, "train", path, *BEST, "checkpoint.every_steps=2")
    return path


@pytest.fixture(scope="module")
def ended(run_yaml: Path) -> Path:
    """The folder of a run that ended early."""
    target = fresh(run_yaml, "ended")
    succeed_on(2, "train", run_yaml, f"run.dir={target}", *EARLY)
    return target


def fresh(run_yaml: Path, name: str) -> Path:
    target = run_yaml.parent / name
    for part in ("pairs", "reference"):
        shutil.copytree(run_yaml.parent / "out" / part, target / part)
    return target


def steps_kept(run_dir: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step-*"))


def status_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "status.json").read_text())


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_beside_the_newest(run_yaml: Path) -> None:
    out = run_yaml.parent / "out"
    losses = {m["step"]: m["eval_loss"] for m in metrics_of(out) if "eval_loss" in m}
    assert min(losses, key=lambda step: losses[step]) == 2
    assert steps_kept(out) == [2, 8, 10]
    status = status_of(out)
    assert status["best_checkpoint"] == str(out / "checkpoints" / "step-000002")
    assert (status["best_by"], status["best_metric"]) == ("eval_loss", losses[2])
    said = succeed("status", out).stdout
    assert f"step-000002 (eval_loss {losses[2]:.4f})" in said and "ended" not in said


def test_the_best_is_exported_unless_the_newest_is_asked_for(run_yaml: Path) -> None:
    config = load_config(run_yaml, [*BEST, "checkpoint.every_steps=2"])
    folder = export.run(config) / "full"
    assert read_manifest(folder).details["step"] == 2
    shutil.rmtree(folder)
    newest = load_config(run_yaml, [*BEST, "checkpoint.every_steps=2", "export.checkpoint=newest"])
    assert read_manifest(export.run(newest) / "full").details["step"] == 10


def test_training_ends_early_with_a_checkpoint_and_says_why(ended: Path) -> None:
    assert max(line["step"] for line in metrics_of(ended)) == 6
    assert steps_kept(ended) == [4, 6]
    status = status_of(ended)
    assert status["state"] == "finished" and status["train"]["step"] == 6
    assert status["early_stop"].startswith("early stop at step 6: 2 evaluations in a row no better")
    assert status["best_checkpoint"].endswith("step-000004"), "the best of those that stand"


def test_an_ended_run_is_finished(run_yaml: Path, ended: Path) -> None:
    before = sorted((ended / "checkpoints").rglob("*"))
    said = succeed_on(2, "train", run_yaml, f"run.dir={ended}", *EARLY)
    assert "train: finished" in said and "step-000006" in said
    assert sorted((ended / "checkpoints").rglob("*")) == before
    assert status_of(ended)["early_stop"] is not None


@pytest.mark.slow
def test_killed_and_resumed_with_samples_ends_as_unbroken_without(
    run_yaml: Path, ended: Path
) -> None:
    other = fresh(run_yaml, "killed")
    arguments = [str(run_yaml), f"run.dir={other}", *EARLY, *SAMPLES]
    training = subprocess.Popen(
        [sys.executable, "-m", "dpo_dist", "train", *arguments],
        cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    log = other / "logs" / "train-01" / "rank0000.log"
    wait_until(lambda: log.exists() and "step 5/" in log.read_text(), timeout_s=120)
    os.killpg(training.pid, signal.SIGKILL)
    training.wait(30)
    assert steps_kept(other) == [4]
    succeed("train", *arguments)
    same_training(ended, other, 6)
    assert status_of(other)["early_stop"] == status_of(ended)["early_stop"]
    samples = read_lines(other / "samples.jsonl")
    assert [(s["step"], s["number"]) for s in samples] == [
        (s, n) for s in (0, 3, 6) for n in range(3)
    ]
    assert all(s["prompt"].startswith("<|im_start|>user\neval ") for s in samples)
    assert not (ended / "samples.jsonl").exists()


@pytest.mark.slow
def test_more_patience_goes_on_as_if_it_had_been_there(run_yaml: Path, ended: Path) -> None:
    other = run_yaml.parent / "patient"
    shutil.copytree(ended, other, symlinks=True)
    succeed_on(2, "train", run_yaml, f"run.dir={other}", *EARLY, "eval.patience=9")
    same_training(run_yaml.parent / "out", other, 10)
    assert status_of(other)["early_stop"] is None


def test_min_delta_decides_what_is_better(run_yaml: Path) -> None:
    evaluations = [record(step, {"loss": 1 - step / 100}) for step in (2, 4, 6)]
    config = load_config(run_yaml, EARLY)
    assert why_ended_early(config, evaluations) is None
    config = load_config(run_yaml, [*EARLY, "eval.min_delta=2.0"])
    assert "by more than 2 (" in str(why_ended_early(config, evaluations))


@pytest.mark.parametrize("key", ["checkpoint.best_by=eval_loss", "eval.samples_every_steps=5"])
def test_settings_that_need_held_out_pairs_are_refused_before_the_reference_pass(
    run_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    for variable, place in SINGLE_PROCESS.environment().items():
        monkeypatch.setenv(variable, place)
    overrides = [f"run.dir={tmp_path}", "data.eval=[]", "checkpoint.every_steps=5"]
    prepare.run(load_config(run_yaml, overrides))
    name, value = key.split("=")
    for stage in (reference, train):
        with pytest.raises(DataError) as error:
            stage.run(load_config(run_yaml, [*overrides, key]))
        assert str(error.value) == (
            f"{name} is {value}, and there are no held-out pairs; expected at least one. Set "
            "data.eval or data.eval_fraction and prepare the pairs in another run.dir, or set "
            f"{name} to null."
        )


def sampling_worker(model_dir: str, stage: str, sampled: bool) -> dict[str, Any]:
    """Losses of three steps of LoRA with dropout, with or without answers in between."""
    from dpo_dist.config.training_section import AdapterSection, ModelSection, TrainSection
    from dpo_dist.data.tokens.templates import load_tokenizer
    from dpo_dist.engine.distributed import collectives
    from dpo_dist.engine.forward.generation import Sampling, answer_in_training
    from dpo_dist.engine.forward.packing import pack_pairs
    from dpo_dist.engine.forward.pair_scorer import score_pairs
    from dpo_dist.engine.model.policy import PolicyParts, build_policy, settle_layout
    from dpo_dist.engine.sharding import ds_config, zero
    from dpo_dist.run.topology import from_environment

    topology = from_environment()
    with collectives.process_group(topology) as device:
        train = TrainSection(deepspeed=stage, learning_rate=1e-2, warmup_ratio=0.0)  # pyright: ignore
        model = ModelSection(path=model_dir, dtype="float32")  # pyright: ignore
        sharding = ds_config.training_config(train, "float32", topology.world_size)
        adapter = AdapterSection(rank=4, dropout=0.3)  # pyright: ignore
        parts = PolicyParts(Path(model_dir), model, adapter)
        engine, scorer = build_policy(parts, train, sharding, num_steps=3, device=device, seed=0)
        settle_layout(engine, scorer, model, device)
        tokenizer = load_tokenizer(Path(model_dir), None, False)
        losses, answers = [], []
        for step in range(3):
            pairs = [([5, 6 + step, 7], [8, 9, 10 + topology.rank], [11, 12])]
            logps = score_pairs(engine, pack_pairs(pairs, device))
            loss = (logps[:, 1] - logps[:, 0]).sum()
            zero.backward(engine, loss, last=True, world_size=topology.world_size)
            zero.update(engine)
            losses.append(loss.item())
            if sampled:
                prompts = [[5, 6, 7], [20, 21], [30]]
                answers += answer_in_training(
                    engine, tokenizer, prompts, Sampling(6, temperature=1.0), device=device, seed=1
                )
        zero.take_down(engine)
    return {"losses": losses, "answers": answers, "random": float(torch.rand(()))}


@pytest.mark.parametrize("stage", ["zero2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_answers_leave_training_and_its_dropout_alone(run_yaml: Path, stage: str) -> None:
    model_dir = str(run_yaml.parent / "model")
    with_answers = run_ranks(2, sampling_worker, model_dir, stage, True)
    without = run_ranks(2, sampling_worker, model_dir, stage, False)
    for one, other in zip(with_answers, without, strict=True):
        assert one["losses"] == other["losses"] and one["random"] == other["random"]
        assert len(one["answers"]) == 9
    assert with_answers[0]["answers"] == with_answers[1]["answers"]
    assert with_answers[0]["losses"][0] != with_answers[0]["losses"][2]
