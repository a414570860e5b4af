"""The export stage: folders, what lies in them, when they are made, left alone and refused."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from support.faults.limits import limited
from support.tiny_export import TrainedRun, make_trained_run, write_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_dist.commands import report
from dpo_dist.config.run_config import RunConfig, load_config
from dpo_dist.data.tokens.templates import BUILTIN_TEMPLATES
from dpo_dist.engine.weights.safetensors_writer import TensorFile
from dpo_dist.errors import ArtifactError, CheckpointError, DataError, ModelFilesError
from dpo_dist.run.manifest import read_manifest
from dpo_dist.run.status import update_stage
from dpo_dist.run.stop_flag import SIGNALS, Stopped
from dpo_dist.stages import export, prepare, verify

LORA = ("adapter.rank=3", "adapter.alpha=4", "export.dtype=float32")
FULL_FILES = {
    "MANIFEST.json", "README.md", "chat_template.jinja", "config.json", "generation_config.json",
    "model.safetensors", "plots", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    run = make_trained_run(tmp_path_factory.mktemp("lora"), "llama", *LORA)
    export.run(run.config)
    return run


def copy_of(run: TrainedRun, folder: Path, *overrides: str) -> RunConfig:
    """The run without its export, elsewhere and with other settings."""
    shutil.copytree(run.paths.root, folder / "out", ignore=shutil.ignore_patterns("export"))
    source = run.paths.root.parent
    return load_config(source / "run.yaml", [*LORA, f"run.dir={folder / 'out'}", *overrides])


def test_a_full_run_becomes_one_folder(tmp_path: Path) -> None:
    run = make_trained_run(tmp_path, "llama", "export.dtype=float32")
    assert export.run(run.config) == run.paths.export_dir
    assert [path.name for path in run.paths.export_dir.iterdir()] == ["full"]
    folder = run.paths.model_dir(merged=False)
    assert {path.name for path in folder.iterdir()} == FULL_FILES
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    for name, tensor in run.policy.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_a_lora_run_becomes_an_adapter_and_a_merged_model(lora_run: TrainedRun) -> None:
    paths = lora_run.paths
    assert {path.name for path in paths.export_dir.iterdir()} == {"adapter", "merged"}
    merged = paths.model_dir(merged=True)
    assert {path.name for path in merged.iterdir()} == FULL_FILES
    adapter_files = {path.name for path in paths.adapter_dir.iterdir()}
    assert adapter_files == FULL_FILES - {
        "config.json", "generation_config.json", "model.safetensors",
    } | {"adapter_config.json", "adapter_model.safetensors"}  # fmt: skip
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = lora_run.policy(ids).logits
        for model in (
            AutoPeftModelForCausalLM.from_pretrained(paths.adapter_dir, dtype=torch.float32),
            AutoModelForCausalLM.from_pretrained(merged, dtype="auto"),
        ):
            torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=2e-4)


def test_the_adapter_alone_needs_no_merge(lora_run: TrainedRun, tmp_path: Path) -> None:
    config = copy_of(lora_run, tmp_path, "export.merge=false")
    assert [path.name for path in export.run(config).iterdir()] == ["adapter"]


def test_type_and_shard_size(lora_run: TrainedRun, tmp_path: Path) -> None:
    config = copy_of(lora_run, tmp_path, "export.dtype=bfloat16")
    folder = export.run(config) / "merged"
    settings = json.loads((folder / "config.json").read_text())
    assert settings["dtype"] == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert (folder / "model.safetensors").stat().st_size < 1 << 20


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_auto_keeps_the_types_of_the_base(tmp_path: Path, dtype: torch.dtype) -> None:
    run = make_trained_run(tmp_path, "llama", "export.dtype=auto")
    path = Path(run.config.model.path) / "model.safetensors"
    base = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    base["model.norm.weight"] = base["model.norm.weight"].float()  # one that is wider
    save_file(base, path, metadata={"format": "pt"})
    write_checkpoint(run.config, run.policy, run.trained, step=8)
    folder = export.run(run.config) / "full"
    exported = load_file(folder / "model.safetensors")
    assert {n: t.dtype for n, t in exported.items()} == {n: t.dtype for n, t in base.items()}
    name = str(dtype).removeprefix("torch.")
    assert json.loads((folder / "config.json").read_text())["dtype"] == name
    assert f"Weights are {name}" in (folder / "README.md").read_text()
    verify.run(run.config)


def test_truth_17_all_files_of_a_run_have_the_mode_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        run = make_trained_run(tmp_path, "llama", *LORA)
        own_base = [f"run.dir={run.paths.root / 'own'}", "model.pad_vocab_to_multiple=512"]
        prepare.run(load_config(tmp_path / "run.yaml", own_base))
        export.run(run.config)
        verify.run(run.config)
        update_stage(run.paths.status_path, "verify", "finished")
        report.run(run.config.run.dir)
    finally:
        os.umask(before)
    written = {run.paths.root, *run.paths.root.rglob("*")} - {*run.step_dir.iterdir()}
    assert {oct(path.stat().st_mode) for path in written} == {oct(0o40750), oct(0o100640)}


def test_tokenizer_and_card(lora_run: TrainedRun) -> None:
    base = AutoTokenizer.from_pretrained(lora_run.config.model.path)
    for folder in lora_run.paths.export_dir.iterdir():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.chat_template == base.chat_template
        assert tokenizer.encode("a red cat") == base.encode("a red cat")
        _, front, body = (folder / "README.md").read_text().split("---\n", 2)
        metadata = yaml.safe_load(front)
        assert metadata["base_model"] == "model"
        assert metadata["library_name"] == ("peft" if folder.name == "adapter" else "transformers")
        assert {"dpo", "lora"} <= set(metadata["tags"])
        for part in (
            "| train | train |", "| 40 | 40 |", "| objective.beta | 0.5 |", "| adapter.rank | 3 |",
            "| 6 | 0.1667 |", "## Held-out pairs at step 6", "| rewards/accuracies | 0.875 |",
            "transformers 5.", "![Loss](plots/loss.png)\n![Reward margin](plots/margins.png)\n",
        ):  # fmt: skip
            assert part in body, f"{part!r} is not in\n{body}"
        pictures = {path.name for path in (folder / "plots").iterdir()}
        assert pictures == {"loss.png", "margins.png", "accuracies.png"}
        assert str(lora_run.paths.root) not in body, "a card must not tell paths of this machine"


def test_the_runs_chat_template_goes_with_the_model(tmp_path: Path) -> None:
    run = make_trained_run(tmp_path, "llama", *LORA, "data.chat_template=zephyr")
    own = AutoTokenizer.from_pretrained(run.config.model.path).chat_template
    assert own not in (None, BUILTIN_TEMPLATES["zephyr"].text)
    for folder in export.run(run.config).iterdir():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.chat_template == BUILTIN_TEMPLATES["zephyr"].text


def test_a_current_export_is_left_alone(lora_run: TrainedRun) -> None:
    files = sorted(lora_run.paths.export_dir.rglob("*"))
    before = [path.stat().st_mtime_ns for path in files]
    export.run(lora_run.config)
    assert [path.stat().st_mtime_ns for path in files] == before


def test_the_best_needs_an_evaluation(lora_run: TrainedRun, tmp_path: Path) -> None:
    best = ("checkpoint.best_by=eval_loss", "eval.every_steps=4")
    config = copy_of(lora_run, tmp_path, *best)
    with pytest.raises(CheckpointError) as error:
        export.run(config)
    assert str(error.value) == (
        f"{tmp_path / 'out' / 'checkpoints'} holds no checkpoint with an evaluation by eval_loss; "
        "expected one to compare. Set export.checkpoint to newest."
    )


def test_a_card_warns_of_likelihood_displacement(lora_run: TrainedRun, tmp_path: Path) -> None:
    config = copy_of(lora_run, tmp_path)
    falling = [
        {"step": 1, "loss": 0.5, "eval_logps/chosen": x, "eval_logps/rejected": 2 * x}
        for x in (-100.0, -150.0)
    ]
    metrics_path = tmp_path / "out" / lora_run.paths.metrics_path.name
    metrics_path.write_text("".join(json.dumps(line) + "\n" for line in falling))
    card = (export.run(config) / "adapter" / "README.md").read_text()
    assert "> **Note:** Likelihood displacement: the log-probs of chosen and of rejected" in card
    assert "chosen -100.0 -> -150.0 nats (-50.0)" in card


def test_a_stale_export_is_refused(lora_run: TrainedRun, tmp_path: Path) -> None:
    config = copy_of(lora_run, tmp_path)
    folder = export.run(config) / "adapter"
    write_checkpoint(config, lora_run.policy, lora_run.trained, step=8)
    with pytest.raises(ArtifactError) as error:
        export.run(config)
    assert f"{folder} was made by `export` from other settings (input checkpoint: " in str(
        error.value
    )
    assert f"delete {folder} to make it again." in str(error.value)
    other = config.model_copy(
        update={"export": config.export.model_copy(update={"dtype": "bfloat16"})}
    )
    with pytest.raises(ArtifactError, match='dtype: "float32" -> "bfloat16"'):
        export.run(other)


def test_the_manifest_names_its_inputs(lora_run: TrainedRun) -> None:
    manifest = read_manifest(lora_run.paths.adapter_dir)
    assert manifest.settings == {"kind": "adapter", "dtype": "float32"}
    assert set(manifest.inputs) == {"checkpoint", "base_model"}
    assert manifest.details["step"] == 6
    folder = lora_run.paths.adapter_dir
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert set(manifest.details["files"]) == files - {"MANIFEST.json"}


def test_without_a_checkpoint(lora_run: TrainedRun, tmp_path: Path) -> None:
    config = copy_of(lora_run, tmp_path)
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-000006")
    with pytest.raises(CheckpointError) as error:
        export.run(config)
    assert str(error.value) == (
        f"{tmp_path / 'out' / 'checkpoints'} holds no committed checkpoint; expected one to "
        "export. "
        "Run `dpo-dist train` first."
    )
    assert not (tmp_path / "out" / "export").exists()


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def exported_step(config: RunConfig) -> int:
    return read_manifest(export.run(config) / "adapter").details["step"]


@pytest.mark.fault(32, "a note in the last checkpoint", becomes="it is the one exported")
def test_truth_05_a_note_beside_the_last_checkpoint_changes_no_export(
    lora_run: TrainedRun, tmp_path: Path
) -> None:
    config = copy_of(lora_run, tmp_path, "export.merge=false")
    last = write_checkpoint(config, lora_run.policy, lora_run.trained, step=8)
    (last / "note.txt").write_text("the one for the paper")
    (last / ".nfs0001").write_text("")
    assert exported_step(config) == 8
    assert sorted(os.listdir(last.parent)) == ["step-000006", "step-000008"]


@pytest.mark.fault(
    33,
    "the last checkpoint damaged",
    becomes="no export of an older one unless it is named",
)
def test_truth_05_an_older_checkpoint_is_exported_only_by_name(
    lora_run: TrainedRun, tmp_path: Path
) -> None:
    config = copy_of(lora_run, tmp_path, "export.merge=false")
    last = write_checkpoint(config, lora_run.policy, lora_run.trained, step=8)
    shard = last / "mp_rank_00_model_states.pt"
    flip_a_bit(shard)
    with pytest.raises(CheckpointError) as error:
        export.run(config)
    assert str(error.value) == (
        f"{shard} has another content than was committed; expected the checkpoint of the end of "
        "training, whole. Run `dpo-dist train`, which goes on from the last one that is whole. Or "
        "ask for one by name: export.checkpoint=step-000006."
    )
    assert sorted(os.listdir(last.parent)) == ["step-000006", "step-000008"], "nothing is moved"
    (last / "COMMITTED").unlink()
    with pytest.raises(CheckpointError, match="step-000008 has no COMMITTED marker; expected the"):
        export.run(config)
    named = load_config(
        lora_run.paths.root.parent / "run.yaml",
        [*LORA, f"run.dir={tmp_path / 'out'}", "export.checkpoint=step-000006"],
    )
    assert exported_step(named) == 6
    other = named.model_copy(
        update={"export": named.export.model_copy(update={"checkpoint": "step-000007"})}
    )
    with pytest.raises(CheckpointError, match="step-000007 does not exist"):
        export.run(other)


def test_truth_05_a_training_that_has_not_ended_is_exported_only_by_name(
    lora_run: TrainedRun, tmp_path: Path
) -> None:
    config = copy_of(lora_run, tmp_path, "export.merge=false")
    last = write_checkpoint(config, lora_run.policy, lora_run.trained, step=8, last_step=10)
    with pytest.raises(CheckpointError) as error:
        export.run(config)
    assert str(error.value) == (
        f"{last} is the newest, of step 8 of 10; expected the checkpoint of the end of training, "
        "whole. Run `dpo-dist train`, which goes on from the last one that is whole. Or ask for "
        "one by name: export.checkpoint=step-000008."
    )
    section = config.export.model_copy(update={"checkpoint": last.name})
    assert exported_step(config.model_copy(update={"export": section})) == 8


@pytest.mark.fault(26, "another base model", becomes="refused")
def test_another_base_model_is_refused(lora_run: TrainedRun, tmp_path: Path) -> None:
    other = make_trained_run(tmp_path / "other", "qwen3")
    config = copy_of(lora_run, tmp_path, f"model.path={other.config.model.path}")
    with pytest.raises(ModelFilesError) as error:
        export.run(config)
    step_dir = tmp_path / "out" / "checkpoints" / "step-000006"
    assert f"{step_dir} was trained from other weights than {other.config.model.path} holds" in str(
        error.value
    )
    assert str(error.value).endswith(
        "expected the base model of the run. Set model.path, model.revision and adapter.path "
        "to it, "
        "or restore its files."
    )


def test_another_alpha_is_refused(lora_run: TrainedRun, tmp_path: Path) -> None:
    """It shows in no shape, and would scale the adapter wrongly."""
    config = copy_of(lora_run, tmp_path, "adapter.alpha=8")
    with pytest.raises(CheckpointError) as error:
        export.run(config)
    step_dir = tmp_path / "out" / "checkpoints" / "step-000006"
    assert str(error.value) == (
        f'{step_dir} was trained with another adapter (adapter.alpha: "4.0" -> "8.0"); expected '
        "the adapter section of this run config. Put these keys back."
    )


def test_a_missing_template_file_is_named(lora_run: TrainedRun, tmp_path: Path) -> None:
    config = copy_of(lora_run, tmp_path, "data.chat_template=zephir")
    with pytest.raises(DataError, match="Did you mean zephyr?"):
        export.run(config)


@pytest.mark.fault(26, "a shard index that names `../x`", becomes="refused")
def test_a_shard_index_that_leaves_the_folder_is_refused(
    lora_run: TrainedRun, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(lora_run.config.model.path, base)
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    config = copy_of(lora_run, tmp_path, f"model.path={base}")
    with pytest.raises(ModelFilesError, match=r"names '\.\./model.safetensors'"):
        export.run(config)


@pytest.mark.fault(7, "USR2 in the middle of an export", becomes="stopped; no half-written model")
def test_a_signal_ends_the_export_and_leaves_nothing(
    lora_run: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = TensorFile.write

    def signaled(file: TensorFile, name: str, tensor: torch.Tensor) -> None:
        if name == "model.layers.1.mlp.up_proj.weight":
            os.kill(os.getpid(), signal.SIGUSR2)
        write(file, name, tensor)

    config = copy_of(lora_run, tmp_path)
    monkeypatch.setattr(TensorFile, "write", signaled)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        with pytest.raises(Stopped, match="export stopped by SIGUSR2"):
            export.run(config)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert [path.name for path in (tmp_path / "out" / "export").iterdir()] == ["adapter"]


def test_a_full_disk_is_named(
    lora_run: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = copy_of(lora_run, tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ArtifactError) as error:
        export.run(config)
    out = tmp_path / "out" / "export"
    assert str(error.value) == (
        f"{out} has 0 MiB free; expected 0 MiB for the exported adapter. "
        "Free some space, or choose export.dtype=bfloat16."
    )


@pytest.mark.fault(15, "a file limit in an export", becomes="named; nothing half-written")
def test_a_write_that_fails_is_named(lora_run: TrainedRun, tmp_path: Path) -> None:
    config = copy_of(lora_run, tmp_path)
    folder = tmp_path / "out" / "export" / "adapter"
    with limited(resource.RLIMIT_FSIZE, 2000), pytest.raises(ArtifactError) as error:
        export.run(config)
    assert str(error.value) == (
        f"{folder} could not be written (File too large); expected a writable folder with free "
        "space. Fix this and run `dpo-dist export` again; nothing half-written is left."
    )
    assert list(folder.parent.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from dpo_dist.config.run_config import load_config
from dpo_dist.engine.weights.safetensors_writer import TensorFile
from dpo_dist.stages import export

write = TensorFile.write

def killing(file, name, tensor):
    write(file, name, tensor)
    if name == "model.layers.1.mlp.up_proj.weight":
        os.kill(os.getpid(), signal.SIGKILL)

TensorFile.write = killing
export.run(load_config(Path(sys.argv[1]), sys.argv[2:]))
"""


@pytest.mark.fault(
    26,
    "SIGKILL in the middle of an export",
    becomes="nothing under the final name; the next export is whole",
)
@pytest.mark.slow
def test_killed_half_way(lora_run: TrainedRun, tmp_path: Path) -> None:
    config = copy_of(lora_run, tmp_path)
    run_yaml = lora_run.paths.root.parent / "run.yaml"
    command = [sys.executable, "-c", KILLED, run_yaml, *LORA, f"run.dir={config.run.dir}"]
    done = subprocess.run(command, timeout=120, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    export_dir = tmp_path / "out" / "export"
    assert (export_dir / ".merged.partial" / "model.safetensors").exists()
    assert not (export_dir / "merged").exists()
    started = time.time()
    export.run(config)
    assert {path.name for path in export_dir.iterdir()} == {"adapter", "merged"}
    assert (export_dir / "adapter" / "MANIFEST.json").stat().st_mtime < started, "was current"
    AutoModelForCausalLM.from_pretrained(export_dir / "merged")
