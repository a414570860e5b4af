"""A peft adapter on disk: where it is, what it says of itself, and its identity."""

from pathlib import Path
from typing import Any

from dpo_dist.errors import ModelFilesError
from dpo_dist.parsing import parse_object
from dpo_dist.run.manifest import digest_of, digest_of_file
from dpo_dist.watch.heartbeat import during
from dpo_dist.wording import first_line

ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
_PATTERNS = (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME)


def resolve_adapter_dir(path: str) -> Path:
    """The local folder of an adapter given as a folder or as a hub id (downloaded when needed).

    Raises ModelFilesError when it is neither, or holds no adapter in safetensors.
    """
    folder = Path(path).expanduser()
    if not folder.exists() and not path.startswith((".", "/", "~")) and path.count("/") == 1:
        folder = _download(path)
    missing = [name for name in _PATTERNS if not (folder / name).is_file()]
    if missing:
        raise ModelFilesError(
            f"adapter.path {path} has no {missing[0]}",
            f"the folder or hub id of a peft adapter, with {' and '.join(_PATTERNS)}",
            "Correct adapter.path; pickled weights (adapter_model.bin) are not read: load the "
            "adapter with peft and save_pretrained it.",
        )
    return folder.resolve()


@during("network")
def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(_PATTERNS)))
    except Exception as error:  # the hub client raises a dozen unrelated types
        reason = first_line(error)
        raise ModelFilesError(
            f"adapter {hub_id!r} is not a folder here, and the hub gave none ({reason})",
            "an adapter folder or a reachable hub id",
            "Correct adapter.path, download it where there is a network, or set HF_TOKEN.",
        ) from None


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a folder; raises ModelFilesError when it is missing or not JSON."""
    path = folder / ADAPTER_CONFIG_NAME
    try:
        return parse_object(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelFilesError(
            f"{path} is not readable ({error})", "a JSON object", "Copy the adapter again."
        ) from None


def digest_of_adapter(folder: Path) -> str:
    """Identity of an adapter: SHA-256 of its settings and its weights."""
    return digest_of({name: digest_of_file(folder / name) for name in _PATTERNS})
