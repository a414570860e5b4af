"""Publishing: what arrives at a stand-in hub, and what is never pushed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.ranks import ROOT
from support.servers.push_server import TOKEN, Hub
from support.tiny_export import TrainedRun, make_trained_run

from dpo_dist.config.run_config import RunConfig, load_config, parse_config
from dpo_dist.errors import ArtifactError, ConfigError
from dpo_dist.run.pipeline import stages_of
from dpo_dist.stages import export, push, verify

LORA = (
    "adapter.rank=3", "adapter.alpha=4", "export.dtype=float32", "export.base_model=me/base",
)  # fmt: skip
REPO = "export.push_to_hub=me/tiny"


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    run = make_trained_run(tmp_path_factory.mktemp("lora"), "llama", *LORA)
    export.run(run.config)
    verify.run(run.config)
    return run


def config_of(run: TrainedRun, *overrides: str) -> RunConfig:
    return load_config(run.paths.root.parent / "run.yaml", [*LORA, *overrides])


def copy_of(run: TrainedRun, folder: Path, *overrides: str) -> RunConfig:
    shutil.copytree(run.paths.root, folder / "out")
    return config_of(run, f"run.dir={folder / 'out'}", *overrides)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_the_merged_model_arrives_whole_private_and_in_one_commit(
    verified: TrainedRun, hub: Hub
) -> None:
    config = config_of(verified, REPO)
    told = json.loads(push.run(config).read_text())
    repository = hub.repositories["me/tiny"]
    assert repository.private is True
    assert repository.branches == {"main": contents(verified.paths.model_dir(merged=True))}
    assert repository.commits == ["out: merged, pushed by dpo-dist"]
    assert told["commit"] == f"{hub.url}/me/tiny/commit/{'1' * 40}"
    assert (told["repository"], told["revision"], told["folder"]) == ("me/tiny", "main", "merged")

    push.run(config)
    assert len(repository.commits) == 1 and hub.calls.count("put") == 1, "nothing has changed"


def test_the_adapter_to_a_branch_of_a_public_repository(verified: TrainedRun, hub: Hub) -> None:
    more = ("export.hub_revision=v1/a", "export.hub_private=false", "export.hub_folder=adapter")
    push.run(config_of(verified, REPO, *more))
    repository = hub.repositories["me/tiny"]
    assert repository.private is False
    adapter = contents(verified.paths.adapter_dir)
    assert repository.branches == {"main": {}, "v1/a": adapter}
    assert json.loads(adapter["adapter_config.json"])["base_model_name_or_path"] == "me/base"
    assert b"base_model: me/base" in adapter["README.md"]


def test_only_what_was_verified_is_pushed(verified: TrainedRun, hub: Hub, tmp_path: Path) -> None:
    config = copy_of(verified, tmp_path, REPO)
    folder, report_path = config.run.dir / "export" / "merged", config.run.dir / "verify.json"
    report = json.loads(report_path.read_text())

    report_path.write_text(json.dumps(report | {"passed": False}))
    refused(
        config, f"{folder} failed verification; expected an export that reproduces the training"
    )
    report_path.write_text(json.dumps(report | {"exports": {}}))
    refused(config, f"{folder} has not been verified; expected")
    report_path.unlink()
    refused(config, f"{folder} has not been verified; expected")
    report_path.write_text(json.dumps(report))
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\xff")
    refused(config, f"{folder / 'model.safetensors'} has another content than was committed")
    (folder / "README.md").unlink()
    refused(config, f"{folder / 'README.md'} is missing; expected the files that were verified")
    assert hub.calls == []


def refused(config: RunConfig, words: str) -> None:
    with pytest.raises(ArtifactError) as error:
        push.run(config)
    assert str(error.value).startswith(words), error.value


def test_an_adapter_that_names_a_folder_of_this_machine(tmp_path: Path, hub: Hub) -> None:
    lora = (*LORA[:3], "export.merge=false")
    run = make_trained_run(tmp_path, "llama", *lora)
    export.run(run.config)
    verify.run(run.config)
    pushed = load_config(tmp_path / "run.yaml", [*lora, REPO])  # `prepare` would have refused it
    refused(pushed, f"{run.paths.adapter_dir / 'adapter_config.json'} names the base model by")
    assert hub.calls == []


def test_it_pushes_only_when_asked(verified: TrainedRun) -> None:
    assert [stage.name for stage in stages_of(verified.config)][-1] == "verify"
    assert [stage.name for stage in stages_of(config_of(verified, REPO))][-1] == "push"
    with pytest.raises(ConfigError, match="export.push_to_hub is not set; expected the repository"):
        push.run(verified.config)


@pytest.mark.parametrize("overrides", [{"hub_folder": "full"}, {"merge": False}])
def test_a_folder_that_is_not_exported(overrides: dict[str, object]) -> None:
    raw = {
        "run": {"dir": "x"}, "model": {"path": "m"}, "data": {"train": [{"path": "a"}]},
        "adapter": {}, "export": {"hub_folder": "merged"} | overrides,
    }  # fmt: skip
    with pytest.raises(
        ConfigError, match="which this run does not export; expected auto or adapter"
    ):
        parse_config(raw)


def test_the_command(verified: TrainedRun, hub: Hub, tmp_path: Path) -> None:
    config = copy_of(verified, tmp_path)
    run_yaml = verified.paths.root.parent / "run.yaml"
    command = [
        sys.executable, "-m", "dpo_dist", "push", str(run_yaml), *LORA, REPO,
        f"run.dir={config.run.dir}", "--what", "adapter",
    ]  # fmt: skip
    environment = os.environ | {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1", "COLUMNS": "1000",
    }  # fmt: skip

    def call() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120
        )

    hub.refuse = ("create", 403, "no")
    done = call()
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: the token may not write to me/tiny (403: no); expected" in done.stderr
    hub.refuse = None
    done = call()
    assert done.returncode == 0, done.stderr
    adapter = contents(config.run.dir / "export" / "adapter")
    assert hub.repositories["me/tiny"].branches["main"] == adapter
    assert TOKEN not in (config.run.dir / "config.resolved.yaml").read_text() + done.stderr
