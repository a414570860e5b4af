"""A folder to the Hugging Face Hub, in one commit: it arrives whole or not at all.

1. The repository is made private unless the config says otherwise; an existing public one is
   refused then.
2. Large files go first, by content: a push that was cut off and starts again does not repeat them.
3. One commit names all files and drops weights that an earlier push left in the repository.
"""

import contextlib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from dpo_dist.errors import HubError
from dpo_dist.watch.heartbeat import during

# Readers prefer a single model.safetensors to an index, so one of an earlier push must not stay.
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")


@during("network")
def push_folder(
    folder: Path,
    files: list[str],
    repo_id: str,
    *,
    private: bool,
    revision: str | None,
    message: str,
) -> str:
    """Commits `files` of a folder to a model repository; the URL of the commit.

    `revision` is a branch, made from main when it is missing. Raises HubError.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    require_token(repo_id)
    api = HfApi(library_name="dpo-dist")
    branch = revision or "main"
    with _explained(repo_id, api.endpoint):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private and api.repo_info(repo_id).private is False:
            raise HubError(
                f"{repo_id} exists and is public",
                "a private repository (export.hub_private)",
                "Name another one, or set export.hub_private=false to publish.",
            )
        if branch != "main":
            api.create_branch(repo_id, branch=branch, exist_ok=True)
        stale = [
            CommitOperationDelete(name)
            for name in api.list_repo_files(repo_id, revision=branch)
            if name not in files and any(fnmatch(name, pattern) for pattern in WEIGHT_FILES)
        ]
        added = [CommitOperationAdd(name, str(folder / name)) for name in files]
        # not upload_folder, which makes several commits of a large folder
        done = api.create_commit(repo_id, [*added, *stale], commit_message=message, revision=branch)
    return str(done.commit_url)


def require_token(repo_id: str) -> None:
    """Raises HubError when this user has no token at all to push with."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise HubError(
            f"no token to push to {repo_id} with",
            "a token that may write there",
            "Set HF_TOKEN or run `hf auth login`.",
        )


@contextlib.contextmanager
def _explained(repo_id: str, endpoint: str) -> Iterator[None]:
    """Turns what the hub's client raises into a word for the user."""
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    try:
        yield
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise _explain(error, repo_id, endpoint) from error


def _explain(error: Exception, repo_id: str, endpoint: str) -> HubError:
    cause: BaseException = error
    while cause.__cause__ is not None and not hasattr(cause, "response"):
        cause = cause.__cause__
    code = getattr(getattr(cause, "response", None), "status_code", None)
    said = getattr(cause, "server_message", None) or str(cause) or repr(cause)
    said = " ".join(said.split())
    again = "Then `dpo-dist push` again: nothing half-written is there, and the export is kept."
    if code == 401:
        return HubError(
            f"{endpoint} does not know the token (401: {said})", "a valid token",
            f"Set HF_TOKEN or run `hf auth login`. {again}",
        )  # fmt: skip
    if code == 403:
        return HubError(
            f"the token may not write to {repo_id} (403: {said})",
            "a token with write access to that user or organization",
            f"Use another token or export.push_to_hub. {again}",
        )
    if code == 404:
        return HubError(
            f"{endpoint} has no {repo_id} for this token (404: {said})",
            "an existing user or organization, and a branch",
            f"Correct export.push_to_hub or export.hub_revision. {again}",
        )
    if code is not None:
        return HubError(
            f"{endpoint} answers {code} ({said})", "a hub that takes the push",
            f"Fix what it names. {again}",
        )  # fmt: skip
    return HubError(
        f"the push to {endpoint} broke off ({type(cause).__name__}: {said})",
        "a hub that this machine reaches",
        f"Push from a machine with network access (HF_ENDPOINT names the hub). {again}",
    )
