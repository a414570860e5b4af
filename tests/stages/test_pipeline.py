"""The stages end to end on real ranks: numbers do not depend on ranks, packing or interruptions."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from support.commands import dpo_dist, started, succeed
from support.faults.other_user import give_away, needs_root
from support.ranks import ROOT, wait_until
from support.tiny_run import (
    NUM_EVAL,
    NUM_TRAIN,
    fail_on,
    make_run,
    metrics_of,
    same_training,
    succeed_on,
    write_rows,
)

from dpo_dist.config.run_config import load_config
from dpo_dist.data.pairs import open_pairs
from dpo_dist.engine.checkpoints.checkpoint import read_probe
from dpo_dist.model_files.of_run import RunModels
from dpo_dist.reference.contract import complete_store

pytestmark = pytest.mark.timeout(900)
LAST_STEP = 10
LORA = "adapter.rank=4"


@pytest.fixture(scope="module")
def run_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose pairs and reference are there, and which is trained on two ranks."""
    path = make_run(tmp_path_factory.mktemp("pipeline"))
    succeed_on(1, "prepare", path)
    succeed_on(2, "reference", path)
    succeed("train", path)
    return path


def out_of(run_yaml: Path) -> Path:
    return run_yaml.parent / "out"


def fresh_copy(run_yaml: Path, name: str) -> Path:
    """A run folder with the same pairs and reference, and nothing trained."""
    target = run_yaml.parent / name
    for part in ("pairs", "reference"):
        shutil.copytree(out_of(run_yaml) / part, target / part)
    return target


def assert_same_curve(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    a, b = metrics_of(one), metrics_of(other)
    assert len(a) == len(b) == LAST_STEP + 2  # and two evaluations
    for left, right in zip(a, b, strict=True):
        if abs(left.get("rewards/margins", 1.0)) < 1e-4:  # ties before the first update
            left, right = (
                {k: v for k, v in m.items() if k != "rewards/accuracies"} for m in (left, right)
            )
        norms = [metrics.pop("grad_norm", 0.0) for metrics in (left, right)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-4)  # of large gradients, by then
        assert left == pytest.approx(right, abs=tolerance, rel=tolerance)


def test_the_run_learns_and_reports(run_yaml: Path) -> None:
    lines = metrics_of(out_of(run_yaml))
    train = [line for line in lines if "loss" in line]
    assert train[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert train[-1]["rewards/margins"] > 1.0
    assert [line["consumed_pairs"] for line in train] == [8 * s for s in range(1, LAST_STEP + 1)]
    expected = {
        "loss", "grad_norm", "learning_rate", "rewards/chosen", "rewards/rejected",
        "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
        "tokens_saved_by_sharing", "epoch", "consumed_pairs", "step",
    }  # fmt: skip
    assert expected <= set(train[0])
    held_out = [line["step"] for line in lines if "eval_rewards/margins" in line]
    assert held_out == [5, 10]
    status = json.loads((out_of(run_yaml) / "status.json").read_text())
    assert status["state"] == "finished" and status["train"]["step"] == LAST_STEP


@pytest.mark.fault(
    24,
    "10 held-out pairs and batches of 8 on 3 ranks",
    becomes="no deadlock; the numbers of 2 ranks",
)
@pytest.mark.parametrize(
    ("num_ranks", "overrides"),
    [
        (1, []),
        (3, ["train.deepspeed=zero2"]),
        (2, ["train.micro_batch_tokens=100", "train.gradient_checkpointing=true"]),
    ],
    ids=["1-rank", "3-ranks-zero2", "other-packing"],
)
def test_numbers_do_not_depend_on_ranks_packing_or_sharding(
    run_yaml: Path, num_ranks: int, overrides: list[str]
) -> None:
    other = fresh_copy(run_yaml, f"ranks-{num_ranks}")
    succeed_on(num_ranks, "train", run_yaml, f"run.dir={other}", *overrides)
    assert_same_curve(out_of(run_yaml), other)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("sharding", ["zero0", "zero1", "zero3_hpz", "zero3_offload"])
def test_every_sharding_trains_resumes_and_exports(
    run_yaml: Path, tmp_path: Path, sharding: str
) -> None:
    if sharding == "zero3_hpz":  # groups as large as a node of this test
        config = json.loads((ROOT / "ds_configs" / f"{sharding}.json").read_text())
        config["zero_optimization"]["zero_hpz_partition_size"] = 2
        path = tmp_path / "hpz.json"
        path.write_text(json.dumps(config))
        sharding = str(path)
    other = fresh_copy(run_yaml, Path(sharding).stem)
    arguments = run_yaml, f"run.dir={other}", f"train.deepspeed={sharding}"
    succeed("train", *arguments)
    assert_same_curve(out_of(run_yaml), other)
    shutil.rmtree(other / "checkpoints" / f"step-{LAST_STEP:06d}")
    succeed("train", *arguments)
    resumed = log_of(other, attempt=2)
    assert "step 9/" in resumed and "step 8/" not in resumed  # the checkpoint before is of step 8
    assert_same_curve(out_of(run_yaml), other)
    succeed("export", *arguments)
    succeed("verify", *arguments)
    assert json.loads((other / "verify.json").read_text())["passed"]


@pytest.mark.fault(
    1,
    "SIGKILL of the launcher and all ranks after step 6",
    becomes="goes on from step 4; metrics and weights equal an unbroken run to the bit",
)
def test_killed_and_resumed_is_bit_equal_to_unbroken(run_yaml: Path) -> None:
    other = fresh_copy(run_yaml, "killed")
    with started("train", run_yaml, f"run.dir={other}") as training:
        wait_until(lambda: "step 6/" in log_of(other), timeout_s=120)
        os.killpg(training.pid, signal.SIGKILL)
        training.wait()
    assert not (other / "checkpoints" / f"step-{LAST_STEP:06d}").exists()
    succeed_on(2, "train", run_yaml, f"run.dir={other}")
    same_training(out_of(run_yaml), other, LAST_STEP)


@pytest.mark.fault(
    6,
    "USR2 to the launcher in step 2",
    becomes="a checkpoint, `stopped`, exit 75; three ranks continue the same curve",
)
def test_stopped_by_a_signal_and_continued_on_three_ranks(run_yaml: Path) -> None:
    other = fresh_copy(run_yaml, "stopped")
    with started("train", run_yaml, f"run.dir={other}") as training:
        wait_until(lambda: "step 2/" in log_of(other), timeout_s=120)
        os.kill(training.pid, signal.SIGUSR2)
        training.wait()
    assert training.returncode == 75
    status = json.loads((other / "status.json").read_text())
    assert status["state"] == "stopped"
    succeed_on(3, "train", run_yaml, f"run.dir={other}")
    assert_same_curve(out_of(run_yaml), other)


def log_of(run_dir: Path, attempt: int = 1) -> str:
    path = run_dir / "logs" / f"train-{attempt:02d}" / "rank0000.log"
    return path.read_text() if path.exists() else ""


def copied(run_yaml: Path, name: str) -> Path:
    """The trained run elsewhere, and its last checkpoint."""
    other = fresh_copy(run_yaml, name)
    shutil.copytree(out_of(run_yaml) / "checkpoints", other / "checkpoints")
    shutil.copyfile(out_of(run_yaml) / "metrics.jsonl", other / "metrics.jsonl")
    return other


@pytest.mark.fault(
    13,
    "a bit of the last checkpoint flipped",
    becomes="set aside, trained again from the one before; equals an unbroken run",
)
def test_truth_05_a_damaged_last_checkpoint_is_trained_again(run_yaml: Path) -> None:
    other = copied(run_yaml, "damaged")
    last = other / "checkpoints" / f"step-{LAST_STEP:06d}"
    (last / "train_state.json~").write_text("a backup")  # no damage by itself
    assert "train: finished" in succeed_on(2, "train", run_yaml, f"run.dir={other}")
    shard = last / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    assert "finished" not in succeed_on(2, "train", run_yaml, f"run.dir={other}")
    assert (other / "checkpoints" / "quarantine" / last.name / "train_state.json~").exists()
    same_training(out_of(run_yaml), other, LAST_STEP)


@pytest.mark.fault(
    32,
    "a run folder of a colleague",
    becomes=(
        "an error with the remedy, nothing moved; trusted, it goes on and equals an unbroken run"
    ),
)
@needs_root
def test_truth_06_a_colleagues_resubmission_stops_before_it_moves_anything(run_yaml: Path) -> None:
    other = copied(run_yaml, "colleague")
    checkpoints = other / "checkpoints"
    shutil.rmtree(checkpoints / f"step-{LAST_STEP:06d}")
    give_away(checkpoints)
    before = sorted(checkpoints.rglob("*"))
    message = fail_on(1, "train", run_yaml, f"run.dir={other}")
    assert "step-000008 belongs to user 12345, this is user 0; expected checkpoint files" in message
    assert "set checkpoint.trusted_owners=[12345], or copy the run folder as this user" in message
    assert sorted(checkpoints.rglob("*")) == before
    trusted = "checkpoint.trusted_owners=[12345]"
    assert f"step {LAST_STEP}/" in succeed_on(2, "train", run_yaml, f"run.dir={other}", trusted)
    same_training(out_of(run_yaml), other, LAST_STEP)


def test_a_finished_run_ends_at_once(run_yaml: Path) -> None:
    checkpoints = sorted((out_of(run_yaml) / "checkpoints").iterdir())
    assert "finished" in succeed_on(2, "train", run_yaml)
    assert sorted((out_of(run_yaml) / "checkpoints").iterdir()) == checkpoints


@pytest.mark.fault(
    27,
    "an adapter and its merged model, loaded in a process of their own",
    becomes="the probe is reproduced",
)
@pytest.mark.slow
def test_lora_is_exported_merged_and_verified(run_yaml: Path) -> None:
    other = fresh_copy(run_yaml, "lora")
    arguments = [
        run_yaml, f"run.dir={other}", LORA,
        "logging.every_steps=2", "logging.tensorboard=true", "eval.every_steps=4",
        "checkpoint.every_steps=3", "checkpoint.keep=3", "checkpoint.probe_pairs=3",
        "generate.num_prompts=2", "generate.max_new_tokens=4",
    ]  # fmt: skip
    succeed("run", *arguments)
    lines = metrics_of(other)
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8, 10]
    assert [line["step"] for line in lines if "eval_loss" in line] == [4, 8, 10]
    kept = sorted(path.name for path in (other / "checkpoints").glob("step-*"))
    assert kept == ["step-000006", "step-000009", "step-000010"]
    assert len(read_probe(other / "checkpoints" / kept[-1])[0]) == 3
    assert any((other / "tensorboard").iterdir())
    assert not (out_of(run_yaml) / "tensorboard").exists()
    assert json.loads((other / "verify.json").read_text())["passed"] is True
    succeed_on(1, "evaluate", *arguments)
    evaluation = json.loads((other / "evaluate.json").read_text())
    assert evaluation["num_pairs"] == NUM_EVAL
    for name in ("rewards/accuracies", "rewards/margins"):
        assert evaluation["after"][name] == pytest.approx(lines[-1][f"eval_{name}"], abs=2e-2)
    assert evaluation["before"]["rewards/margins"] == 0.0
    generated = json.loads(succeed("generate", *arguments, "--json").stdout)["answers"]
    assert keys_checked(other) == [[], ["default"]], "verify tries neither again"
    assert len(generated) == 2 and {"prompt", "before", "after"} == set(generated[0])


@pytest.mark.fault(
    27,
    "a whole model, loaded in a process of its own",
    becomes="the probe is reproduced",
)
def test_full_is_exported_and_verified(run_yaml: Path) -> None:
    succeed_on(1, "export", run_yaml)
    succeed_on(1, "verify", run_yaml)
    assert json.loads((out_of(run_yaml) / "verify.json").read_text())["passed"] is True
    assert keys_checked(out_of(run_yaml)) == [[]]  # by the reference pass, and no stage after it


def keys_checked(run_dir: Path) -> list[list[str]]:
    """The adapters of every model whose layout was found out by trying."""
    checks = json.loads((run_dir / "self_check.json").read_text()).values()
    return sorted(list(check["key"]["adapters"]) for check in checks)


def test_reference_status_and_growing_data(run_yaml: Path) -> None:
    report = json.loads(succeed("reference", run_yaml, "--status").stdout)
    splits = report["layouts"]["packed"]["splits"]
    assert splits["train"] == {"present": NUM_TRAIN, "missing": 0, "total": NUM_TRAIN}
    assert report["layouts"]["padded"]["splits"]["eval"]["missing"] == NUM_EVAL
    grown = run_yaml.parent / "grown.jsonl"
    grown.write_text((run_yaml.parent / "train.jsonl").read_text())
    write_rows(run_yaml.parent / "more.jsonl", "more", 4)
    with grown.open("a") as stream:
        stream.write((run_yaml.parent / "more.jsonl").read_text())
    shared = [
        f"run.dir={run_yaml.parent / 'grown'}", f"data.train.0.path={grown}",
        f"reference.store_dir={out_of(run_yaml) / 'reference'}",
    ]  # fmt: skip
    succeed_on(1, "prepare", run_yaml, *shared)
    assert "4 of 54 pairs to score" in succeed_on(2, "reference", run_yaml, *shared)


def test_a_reference_that_is_not_the_start_stops_at_the_gate(run_yaml: Path) -> None:
    from support.tiny_models import tiny_model

    folder = run_yaml.parent / "other_model"
    shutil.copytree(run_yaml.parent / "model", folder)
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    tiny_model("llama", seed=1, vocab_size=vocab_size).save_pretrained(folder)
    other = fresh_copy(run_yaml, "gate")
    arguments = [run_yaml, f"run.dir={other}", f"reference.model={folder}"]
    succeed_on(2, "reference", *arguments)
    message = fail_on(2, "train", *arguments)
    assert "step-0 gate: pair " in message
    assert "expected the same within 1e-03. Check that reference.model is what training" in message
    assert not (other / "checkpoints").exists()


@pytest.mark.fault(16, "another beta and number of epochs", becomes="refused with the difference")
def test_resume_with_other_settings_is_refused(run_yaml: Path) -> None:
    message = fail_on(2, "train", run_yaml, "objective.beta=0.1", "train.num_epochs=3")
    assert 'objective.beta: "0.5" -> "0.1"' in message
    assert 'train.num_epochs: "2.0" -> "3.0"' in message


@pytest.mark.fault(17, "`checkpoint.resume=no/such`", becomes="an error that names it")
def test_a_mistyped_resume_path_is_an_error(run_yaml: Path) -> None:
    other = fresh_copy(run_yaml, "mistyped")
    done = dpo_dist("train", run_yaml, f"run.dir={other}", "checkpoint.resume=no/such")
    assert done.returncode == 2 and "no/such" in done.stderr
    assert not (other / "logs" / "train-02").exists(), "every rank failed of it, and for good"


@pytest.mark.fault(
    16,
    "another tokenizer in the model's folder, behind the pairs",
    becomes="refused by every later stage with both digests",
)
@pytest.mark.parametrize("stage", ["reference", "train", "export"])
def test_fault_16_another_tokenizer_than_that_of_the_pairs_is_refused(
    run_yaml: Path, tmp_path: Path, stage: str
) -> None:
    """The export would carry it beside a model that was trained on the first one's ids."""
    other = copied(run_yaml, f"tokenizer-{stage}")
    shutil.copytree(run_yaml.parent / "model", tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    words = tokenizer["model"]["vocab"]
    first, second = sorted(words)[:2]
    words[first], words[second] = words[second], words[first]
    path.write_text(json.dumps(tokenizer))
    message = fail_on(1, stage, run_yaml, f"run.dir={other}", f"model.path={tmp_path}/model")
    assert f"{tmp_path}/model has another tokenizer (digest " in message
    assert "Put the model's tokenizer back, or prepare and train in another run.dir." in message


def test_missing_reference_rows_are_named(run_yaml: Path) -> None:
    other = fresh_copy(run_yaml, "no-reference")
    shutil.rmtree(other / "reference")
    message = fail_on(2, "train", run_yaml, f"run.dir={other}")
    assert f"{NUM_TRAIN} of {NUM_TRAIN}" in message and "dpo-dist reference" in message


def reference_of(run_yaml: Path, run_dir: Path) -> np.ndarray:
    """(N, 2) reference log-probs of the training pairs in a run's store."""
    config = load_config(run_yaml, [f"run.dir={run_dir}"])
    keys = open_pairs(run_dir / "pairs", "train").keys
    held = complete_store(RunModels(config), keys)
    assert held is not None
    return held[1].lookup(keys)


def test_a_sharded_reference_pass_gives_the_same_rows(run_yaml: Path) -> None:
    other = fresh_copy(run_yaml, "sharded")
    shutil.rmtree(other / "reference")
    said = succeed_on(2, "reference", run_yaml, f"run.dir={other}", "reference.sharding=zero3")
    assert "reference: ZeRO-3 (reference.sharding)" in said
    whole, sharded = reference_of(run_yaml, out_of(run_yaml)), reference_of(run_yaml, other)
    assert whole.shape == (NUM_TRAIN, 2)
    assert np.abs(whole - sharded).max() < 1e-4
    # the gate compares them
    succeed_on(2, "train", run_yaml, f"run.dir={other}", "train.max_steps=1")


def test_stale_pairs_are_refused(run_yaml: Path) -> None:
    message = fail_on(1, "prepare", run_yaml, "data.max_length=32")
    assert "max_length: 64 -> 32" in message


@pytest.mark.fault(
    23,
    "fewer pairs than one batch, a pair longer than a micro-batch",
    becomes="refused before a model is loaded",
)
@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "train.global_batch_size=41",
            "40 pairs; expected at least one global batch of 41 pairs. Set train.global_batch_size "
            "to 40 or less, or add pairs.",
        ),
        ("train.micro_batch_tokens=20", "expected at most micro_batch_tokens = 20"),
    ],
)
def test_impossible_batches_stop_before_a_model_is_loaded(
    run_yaml: Path, override: str, message: str
) -> None:
    other = fresh_copy(run_yaml, override)
    assert message in fail_on(2, "train", run_yaml, f"run.dir={other}", override)
