"""Verified export -> the Hugging Face Hub; only when asked, private unless said otherwise.

1. Choose the folder: the whole model, or the adapter.
2. See that `verify` passed for exactly these files: their manifest, and their content.
3. Push them in one commit; push.json says where they went.
"""

import contextlib
import logging
from pathlib import Path
from typing import Any

from dpo_dist.config.run_config import RunConfig
from dpo_dist.engine.checkpoints.commit import FileRecord, find_changed
from dpo_dist.errors import ArtifactError, ConfigError
from dpo_dist.model_files.adapter import ADAPTER_CONFIG_NAME, read_adapter_config
from dpo_dist.model_files.hub import push_folder
from dpo_dist.parsing import parse_object
from dpo_dist.run.exports import ExportDetails, ExportKind, export_folders, pushed_kind
from dpo_dist.run.manifest import digest_of_file, read_manifest, write_json
from dpo_dist.run.run_dir import MANIFEST_NAME, RunDir

_logger = logging.getLogger(__name__)


def run(config: RunConfig) -> Path:
    """Pushes one export folder and returns push.json.

    Raises ConfigError without a repository, ArtifactError for an export that is missing, not
    verified or changed since, and HubError when the hub refuses.
    """
    paths, export = RunDir(config.run.dir), config.export
    if export.push_to_hub is None:
        raise ConfigError(
            "export.push_to_hub is not set",
            "the repository to push to",
            "For example dpo-dist push run.yaml export.push_to_hub=me/my-model.",
        )
    kind = pushed_kind(config)
    folder = export_folders(config)[kind]
    files = _verified_files(paths, kind, folder)
    if kind == "adapter":
        _check_base_name(folder)
    url = push_folder(
        folder, files, export.push_to_hub,
        private=export.hub_private, revision=export.hub_revision,
        message=f"{config.run.dir.resolve().name}: {kind}, pushed by dpo-dist",
    )  # fmt: skip
    _logger.info("push: %s is at %s", folder, url)
    write_json(
        paths.push_path,
        {
            "repository": export.push_to_hub,
            "revision": export.hub_revision or "main",
            "private": export.hub_private,
            "folder": kind,
            "commit": url,
            "files": files,
        },
    )
    return paths.push_path


def _verified_files(paths: RunDir, kind: ExportKind, folder: Path) -> list[str]:
    """Names of the folder's files, which are those that verify has passed."""
    manifest = read_manifest(folder, ExportDetails)
    checked: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError, ValueError):  # a damaged one proves nothing
        checked = parse_object(paths.verify_path.read_bytes())
    exports = checked.get("exports")
    digests: dict[str, Any] = exports if isinstance(exports, dict) else {}
    same = digests.get(kind) == digest_of_file(folder / MANIFEST_NAME)
    if not (checked.get("passed") and same):
        found = "failed verification" if same else "has not been verified"
        raise ArtifactError(
            f"{folder} {found}", "an export that reproduces the training run",
            f"Run `dpo-dist verify`, which writes its checks into {paths.verify_path}.",
        )  # fmt: skip
    records = {name: FileRecord(**record) for name, record in manifest.details["files"].items()}
    missing = [f"{folder / name} is missing" for name in records if not (folder / name).is_file()]
    if changed := missing or find_changed(folder, records, records):
        raise ArtifactError(
            changed[0], "the files that were verified",
            f"Delete {folder}, then export and verify again.",
        )  # fmt: skip
    return sorted([*records, MANIFEST_NAME])


def _check_base_name(folder: Path) -> None:
    """Raises when an adapter names a folder of this machine as its base model."""
    base = read_adapter_config(folder).get("base_model_name_or_path")
    if Path(str(base)).is_absolute():
        raise ArtifactError(
            f"{folder / ADAPTER_CONFIG_NAME} names the base model by a folder of this machine",
            "its hub id, with which others can load the adapter",
            f"Delete {folder}, set export.base_model=owner/name, then export and verify again.",
        )
