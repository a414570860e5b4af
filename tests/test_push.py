"""Publishing: what arrives at a stand-in hub, and what is never pushed."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from push_server import TOKEN, Hub, Repository, hub_server
from ranks import ROOT, free_port

from dpo_dist.config import RunConfig, load_config, parse_config
from dpo_dist.errors import ArtefactError, ConfigError, HubError
from dpo_dist.plan import stages_of
from dpo_dist.stages import export, push, verify
from tests.tiny_export import TrainedRun, make_trained_run

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


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_server() as hub:
        point_at(monkeypatch, hub.url)
        yield hub


def point_at(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """What HF_ENDPOINT and its kin would do, had they been set before the library's import."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    # Xet's own storage service is not stood in for: large files take the plain way here
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def config_of(run: TrainedRun, *overrides: str) -> RunConfig:
    return load_config(run.paths.root.parent / "run.yaml", [*LORA, *overrides])


def copy_of(run: TrainedRun, folder: Path, *overrides: str) -> RunConfig:
    shutil.copytree(run.paths.root, folder / "out")
    return config_of(run, f"run.dir={folder / 'out'}", *overrides)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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


def test_weights_of_an_earlier_push_do_not_stay(verified: TrainedRun, hub: Hub) -> None:
    old = {"model-00001-of-00002.safetensors": b"old", "notes.md": b"mine", "README.md": b"old"}
    hub.repositories["me/tiny"] = Repository(True, {"main": dict(old)})
    push.run(config_of(verified, REPO))
    arrived = hub.repositories["me/tiny"].branches["main"]
    wanted = contents(verified.paths.model_dir(merged=True))
    assert arrived == wanted | {"notes.md": b"mine"}


def test_a_public_repository_is_not_pushed_to_by_default(verified: TrainedRun, hub: Hub) -> None:
    hub.repositories["me/tiny"] = Repository(private=False)
    with pytest.raises(HubError) as error:
        push.run(config_of(verified, REPO))
    assert str(error.value) == (
        "me/tiny exists and is public; wanted a private repository (export.hub_private). Name "
        "another one, or set export.hub_private=false to publish."
    )
    assert hub.repositories["me/tiny"].branches == {"main": {}}


@pytest.mark.parametrize(
    ("call", "status", "words"),
    [
        ("create", 403, "the token may not write to me/tiny (403: no right to create); wanted a "
         "token with write access to that user or organization. Use another token or "
         "export.push_to_hub. Then `dpo-dist push` again: nothing half-written is there, and the "
         "export is kept."),
        ("create", 401, "does not know the token (401: no right to create); wanted a valid token."),
        ("create", 404, "has no me/tiny for this token (404: no right to create); wanted an "),
        ("preupload", 403, "the token may not write to me/tiny (403: no right to preupload)"),
        ("put", 403, "the token may not write to me/tiny (403: "),
        ("commit", 403, "the token may not write to me/tiny (403: no right to commit); wanted"),
        ("commit", 507, "answers 507 (no right to commit); wanted a hub that takes the push."),
    ],
)  # fmt: skip
def test_a_hub_that_refuses(
    call: str, status: int, words: str, verified: TrainedRun, hub: Hub, tmp_path: Path
) -> None:
    """Nothing half-written there, what was done is kept, and the same command then goes on."""
    config = copy_of(verified, tmp_path, REPO)
    before = contents(config.run.dir / "export" / "merged")
    hub.refuse = (call, status, f"no right to {call}")
    with pytest.raises(HubError) as error:
        push.run(config)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert TOKEN not in str(error.value)
    assert all(not any(r.branches.values()) for r in hub.repositories.values())
    assert not (config.run.dir / "push.json").exists()
    assert contents(config.run.dir / "export" / "merged") == before
    uploaded = hub.calls.count("put")
    hub.refuse = None
    push.run(config)
    assert hub.repositories["me/tiny"].branches["main"] == before
    assert hub.calls.count("put") == uploaded if call == "commit" else True, "not sent twice"


def test_no_token_and_a_wrong_one(
    verified: TrainedRun, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(HubError, match=r"does not know the token \(401: Invalid credentials"):
        push.run(config_of(verified, REPO))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(HubError) as error:
        push.run(config_of(verified, REPO))
    assert str(error.value) == (
        "no token to push to me/tiny with; wanted a token that may write there. Set HF_TOKEN or "
        "run `hf auth login`."
    )


def test_a_hub_that_is_down(verified: TrainedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    point_at(monkeypatch, url)
    with pytest.raises(HubError) as error:
        push.run(config_of(verified, REPO))
    assert str(error.value).startswith(f"the push to {url} broke off (ConnectError: ")
    assert "wanted a hub that this machine reaches. Push from a machine with" in str(error.value)


def test_only_what_was_verified_is_pushed(verified: TrainedRun, hub: Hub, tmp_path: Path) -> None:
    config = copy_of(verified, tmp_path, REPO)
    folder, report_path = config.run.dir / "export" / "merged", config.run.dir / "verify.json"
    report = json.loads(report_path.read_text())

    report_path.write_text(json.dumps(report | {"passed": False}))
    refused(config, f"{folder} failed verification; wanted an export that reproduces the training")
    report_path.write_text(json.dumps(report | {"exports": {}}))
    refused(config, f"{folder} has not been verified; wanted")
    report_path.unlink()
    refused(config, f"{folder} has not been verified; wanted")
    report_path.write_text(json.dumps(report))
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\xff")
    refused(config, f"{folder / 'model.safetensors'} has another content than was committed")
    (folder / "README.md").unlink()
    refused(config, f"{folder / 'README.md'} is missing; wanted the files that were verified")
    assert hub.calls == []


def refused(config: RunConfig, words: str) -> None:
    with pytest.raises(ArtefactError) as error:
        push.run(config)
    assert str(error.value).startswith(words), error.value


def test_an_adapter_that_names_a_folder_of_this_machine(tmp_path: Path, hub: Hub) -> None:
    run = make_trained_run(tmp_path, "llama", *LORA[:3], "export.merge=false", REPO)
    export.run(run.config)
    verify.run(run.config)
    refused(run.config, f"{run.paths.adapter_dir / 'adapter_config.json'} names the base model by")
    assert hub.calls == []


def test_it_pushes_only_when_asked(verified: TrainedRun) -> None:
    assert [stage.name for stage in stages_of(verified.config)][-1] == "verify"
    assert [stage.name for stage in stages_of(config_of(verified, REPO))][-1] == "push"
    with pytest.raises(ConfigError, match="export.push_to_hub is not set; wanted the repository"):
        push.run(verified.config)


@pytest.mark.parametrize("overrides", [{"hub_folder": "full"}, {"merge": False}])
def test_a_folder_that_is_not_exported(overrides: dict[str, object]) -> None:
    raw = {
        "run": {"dir": "x"}, "model": {"path": "m"}, "data": {"train": [{"path": "a"}]},
        "adapter": {}, "export": {"hub_folder": "merged"} | overrides,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="which this run does not export; wanted auto or adapter"):
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
    assert "error: the token may not write to me/tiny (403: no); wanted" in done.stderr
    hub.refuse = None
    done = call()
    assert done.returncode == 0, done.stderr
    adapter = contents(config.run.dir / "export" / "adapter")
    assert hub.repositories["me/tiny"].branches["main"] == adapter
    assert TOKEN not in (config.run.dir / "config.resolved.yaml").read_text() + done.stderr
