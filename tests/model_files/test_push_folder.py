"""A folder to a stand-in hub: it arrives whole and private, or an error says why not."""

from pathlib import Path
from typing import Any

import pytest
from support.ranks import free_port
from support.servers.push_server import TOKEN, Hub, Repository, point_at

from dpo_dist.errors import HubError
from dpo_dist.model_files.hub import push_folder

FILES = {
    "README.md": b"---\ntags: [dpo]\n---\n", "config.json": b"{}", "empty.txt": b"",
    "model-00001-of-00002.safetensors": b"one" * 1000, "model-00002-of-00002.safetensors": b"two",
    "model.safetensors.index.json": b"{}",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def pushed(folder: Path, **changes: Any) -> str:
    settings = {"private": True, "revision": None, "message": "pushed"} | changes
    return push_folder(folder, sorted(FILES), "me/tiny", **settings)


def refused(folder: Path) -> str:
    with pytest.raises(HubError) as error:
        pushed(folder)
    assert "\n" not in str(error.value) and TOKEN not in str(error.value)
    return str(error.value)


def test_it_arrives_whole_private_and_in_one_commit(folder: Path, hub: Hub) -> None:
    assert pushed(folder) == f"{hub.url}/me/tiny/commit/{'1' * 40}"
    repository = hub.repositories["me/tiny"]
    assert repository.private is True
    assert repository.branches == {"main": FILES} and repository.commits == ["pushed"]
    pushed(folder)
    assert repository.commits == ["pushed"] and hub.calls.count("put") == 2, "nothing has changed"


def test_to_a_branch_of_a_public_repository(folder: Path, hub: Hub) -> None:
    for _ in range(2):
        pushed(folder, private=False, revision="v1/a")
    repository = hub.repositories["me/tiny"]
    assert repository.private is False
    assert repository.branches == {"main": {}, "v1/a": FILES}


def test_weights_of_an_earlier_push_do_not_stay(folder: Path, hub: Hub) -> None:
    old = {"model.safetensors": b"old", "notes.md": b"mine", "README.md": b"old"}
    hub.repositories["me/tiny"] = Repository(True, {"main": old})
    pushed(folder)
    assert hub.repositories["me/tiny"].branches["main"] == FILES | {"notes.md": b"mine"}


def test_a_public_repository_is_not_pushed_to_by_default(folder: Path, hub: Hub) -> None:
    hub.repositories["me/tiny"] = Repository(private=False)
    assert refused(folder) == (
        "me/tiny exists and is public; expected a private repository (export.hub_private). Name "
        "another one, or set export.hub_private=false to publish."
    )
    assert hub.repositories["me/tiny"].branches == {"main": {}}


@pytest.mark.parametrize(
    ("call", "status", "words"),
    [
        ("create", 403, "the token may not write to me/tiny (403: no right to create); expected a "
         "token with write access to that user or organization. Use another token or "
         "export.push_to_hub. Then `dpo-dist push` again: nothing half-written is there, and the "
         "export is kept."),
        ("create", 401, "does not know the token (401: no right to create); expected a valid "
            "token."),
        ("create", 404, "has no me/tiny for this token (404: no right to create); expected an "),
        ("preupload", 403, "the token may not write to me/tiny (403: no right to preupload)"),
        ("put", 403, "the token may not write to me/tiny (403: "),
        ("commit", 403, "the token may not write to me/tiny (403: no right to commit); expected"),
        ("commit", 507, "answers 507 (no right to commit); expected a hub that takes the push."),
    ],
)  # fmt: skip
def test_a_hub_that_refuses(call: str, status: int, words: str, folder: Path, hub: Hub) -> None:
    """Nothing half-written there, what was done is kept, and the same command then goes on."""
    hub.refuse = (call, status, f"no right to {call}")
    assert words in refused(folder)
    assert not any(files for r in hub.repositories.values() for files in r.branches.values())
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    uploaded = hub.calls.count("put")
    hub.refuse = None
    pushed(folder)
    assert hub.repositories["me/tiny"].branches["main"] == FILES
    if call == "commit":
        assert hub.calls.count("put") == uploaded == 2, "large files are not sent twice"


def test_no_token_and_a_wrong_one(folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    assert "does not know the token (401: Invalid credentials" in refused(folder)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert refused(folder) == (
        "no token to push to me/tiny with; expected a token that may write there. Set HF_TOKEN or "
        "run `hf auth login`."
    )


def test_a_hub_that_is_down(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    point_at(monkeypatch, url)
    said = refused(folder)
    assert said.startswith(f"the push to {url} broke off (ConnectError: ")
    assert "expected a hub that this machine reaches. Push from a machine with" in said
