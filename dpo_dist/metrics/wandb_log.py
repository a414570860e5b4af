"""Metrics to Weights & Biases: one run of theirs for a run of ours, with nothing private in it.

The id of their run is kept in the run folder, so a resumed training goes on in the same one. Steps
that are trained again after a kill are dropped there; they have the same numbers. What is sent
about the run is what changes its numbers, without paths of this machine, tokens or passwords; no
console output, code, host or user name, or machine statistics.
"""

import contextlib
import os
import re
from pathlib import Path
from typing import Any

from dpo_dist.config.run_config import RunConfig
from dpo_dist.errors import ConfigError, HubError
from dpo_dist.extras import import_fault
from dpo_dist.parsing import parse_object
from dpo_dist.run.manifest import write_json
from dpo_dist.run.run_dir import RunDir

SENT_SECTIONS = (
    "run", "model", "data", "reference", "adapter", "objective", "train", "checkpoint", "eval",
    "export",
)  # fmt: skip
SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY|CREDENTIAL")
SECRET_VALUE = re.compile(r"\b(hf_|sk-|ghp_|AKIA)\w{8,}")
CREDENTIALS = re.compile(r"://[^/@\s]+@")  # https://user:password@host
MIN_SECRET = 6  # characters; shorter values of such variables are switches, not secrets
REDACTED = "[redacted]"


def check_installed() -> None:
    """Raises ConfigError when the package does not import, before anything expensive starts."""
    try:
        import wandb  # noqa: F401
    except Exception as error:
        fault, remedy = import_fault("wandb", "wandb", error)
        raise ConfigError(
            f"logging.wandb is set, and wandb {fault}",
            "the extra `wandb`",
            f"{remedy}, or set logging.wandb=false.",
        ) from None


def start_run(config: RunConfig) -> Any:
    """Starts, or goes on with, the run at Weights & Biases; raises HubError when that fails."""
    import wandb

    paths, logging = RunDir(config.run.dir), config.logging
    paths.wandb_dir.mkdir(parents=True, exist_ok=True)
    try:
        return wandb.init(
            project=logging.wandb_project,
            name=logging.wandb_name or config.run.dir.resolve().name,
            id=_run_id(paths.wandb_id_path),
            resume="allow",
            dir=str(paths.wandb_dir),
            config=public_settings(config),
            settings=wandb.Settings(
                console="off", silent=True, save_code=False, disable_git=True, disable_code=True,
                disable_job_creation=True, x_disable_meta=True, x_disable_stats=True,
                x_disable_machine_info=True, x_save_requirements=False, host="", username="",
                program="dpo-dist", program_relpath="dpo-dist", program_abspath="dpo-dist",
            ),
        )  # fmt: skip
    except wandb.Error as error:
        raise HubError(
            f"Weights & Biases does not start a run ({' '.join(str(error).split())})",
            "a login, or offline mode",
            "Run `wandb login`, set WANDB_MODE=offline and `wandb sync` later, or set "
            "logging.wandb=false.",
        ) from error


def finish_run(run: Any) -> None:
    """Ends the run and waits for wandb's own process, which writes and sends after `finish`."""
    import wandb

    run.finish()
    wandb.teardown()


def public_settings(config: RunConfig) -> dict[str, Any]:
    """The sections that change numbers, redacted."""
    values = config.model_dump(mode="json", include=set(SENT_SECTIONS))
    secrets = {
        value
        for name, value in os.environ.items()
        if SECRET_NAME.search(name.upper()) and len(value) >= MIN_SECRET
    }
    return redact(values, secrets)


def redact(value: Any, secrets: set[str]) -> Any:
    """Paths become their last part; secrets and what looks like one are blotted out."""
    if isinstance(value, dict):
        return {key: redact(entry, secrets) for key, entry in value.items()}
    if isinstance(value, list):
        return [redact(entry, secrets) for entry in value]
    if not isinstance(value, str):
        return value
    for secret in secrets:
        value = value.replace(secret, REDACTED)
    value = SECRET_VALUE.sub(REDACTED, CREDENTIALS.sub(f"://{REDACTED}@", value))
    is_path = value.startswith(("/", "~", "./", "../")) or value.count("/") > 1
    return Path(value).name if is_path and "://" not in value else value


def _run_id(path: Path) -> str:
    with contextlib.suppress(OSError, ValueError):  # a damaged one is made anew
        if isinstance(known := parse_object(path.read_bytes()).get("id"), str):
            return known
    number = os.urandom(6).hex()
    write_json(path, {"id": number})
    return number
