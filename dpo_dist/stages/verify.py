"""The export, loaded afresh, must compute what the training engine computed: verify.json.

1. Find the checkpoint that the export was made from, and its probe: the log-probs that the
   engine gave a few training pairs when it saved.
2. Check every exported folder: its files and tensors, a strict load, the tokenizer, an answer,
   and the probe by our forward and through the model's own logits.
   On several ranks each holds the model whole, or its part where `reference.sharding` says so.
3. Write every check with its largest difference, then fail when one did.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from dpo_dist.config.run_config import RunConfig
from dpo_dist.engine.distributed import collectives
from dpo_dist.errors import ArtifactError, VerificationError
from dpo_dist.inputs.frozen_model import Placement, place_model
from dpo_dist.inputs.setup import without_quantization
from dpo_dist.model_files.of_run import RunModels
from dpo_dist.run.exports import ExportDetails, export_folders
from dpo_dist.run.logs import progress_bar
from dpo_dist.run.manifest import Manifest, digest_of_file, read_manifest, write_json
from dpo_dist.run.run_dir import MANIFEST_NAME, RunDir
from dpo_dist.run.topology import SINGLE_PROCESS, from_environment, launched
from dpo_dist.verification.check import Check
from dpo_dist.verification.exported import Exported
from dpo_dist.verification.folder import check_folder
from dpo_dist.verification.probe import Probe, open_probe
from dpo_dist.watch.heartbeat import during

_logger = logging.getLogger(__name__)


@during("verify")
def run(config: RunConfig) -> Path:
    """Checks every exported folder and writes verify.json.

    Raises ArtifactError when there is no export, or no longer the checkpoint it was made from, and
    VerificationError, after writing, when a check failed.
    """
    topology = from_environment() if launched() else SINGLE_PROCESS
    if topology.world_size == 1 and config.reference.sharding != "zero3":
        return _run(config, None)  # alone it needs no process group, and finds a device that fits
    with collectives.process_group(topology) as device:
        merges = config.adapter is not None and config.export.merge
        largest = without_quantization(config) if merges else config
        base = RunModels(config).base
        return _run(config, place_model(largest, base, topology, device, "verify"))


def _run(config: RunConfig, placement: Placement | None) -> Path:
    paths, models = RunDir(config.run.dir), RunModels(config)
    folders = [
        Exported(config, kind, path, read_manifest(path, ExportDetails), models.base, placement)
        for kind, path in export_folders(config).items()
    ]
    checkpoint_dir, *_ = [_checkpoint_of(paths, exported.manifest) for exported in folders]
    probe = open_probe(paths, checkpoint_dir)
    # of the ranks those that failed first: each has checked its own model, or all of them one
    on_ranks = collectives.gather(_check_all(folders, probe))
    checks = next((found for found in on_ranks if not all(c.passed for c in found)), on_ranks[0])
    passed = all(check.passed for check in checks)
    report = {
        "passed": passed,
        "checkpoint": str(checkpoint_dir),
        "exports": {e.kind: digest_of_file(e.folder / MANIFEST_NAME) for e in folders},
        "num_probe_pairs": len(probe.indices),
        "checks": [asdict(check) for check in checks],
    }
    collectives.on_first(lambda: write_json(paths.verify_path, report))
    if not passed:
        raise _failure(config, checks)
    return paths.verify_path


def _checkpoint_of(paths: RunDir, manifest: Manifest) -> Path:
    """The checkpoint an export was made from, by content and not by name."""
    folder = paths.checkpoint_dir(manifest.details["step"])
    path = folder / MANIFEST_NAME
    if not path.is_file() or digest_of_file(path) != manifest.inputs["checkpoint"]:
        raise ArtifactError(
            f"{folder} is not the checkpoint that the export was made from",
            "that checkpoint, with the log-probs to reproduce",
            f"Delete {paths.export_dir} and run `dpo-dist export` again.",
        )
    return folder


def _check_all(folders: Sequence[Exported], probe: Probe) -> list[Check]:
    """The checks of all folders, each logged as soon as it is done."""
    checks: list[Check] = []
    with progress_bar("folders", enabled=collectives.is_first()) as bar:
        task = bar.add_task("verify", total=len(folders))
        for exported in folders:
            for check in check_folder(exported, probe):
                level = logging.INFO if check.passed else logging.ERROR
                verdict = "passed" if check.passed else "FAILED"
                _logger.log(level, "verify: %s: %s (%s)", check.name, verdict, check.detail)
                checks.append(check)
            bar.advance(task)
    return checks


def _failure(config: RunConfig, checks: Sequence[Check]) -> VerificationError:
    failed = [check for check in checks if not check.passed]
    return VerificationError(
        f"{len(failed)} of {len(checks)} checks failed, first {failed[0].name}: {failed[0].detail}",
        "an export that reproduces the training run",
        f"{_remedy(config, failed)} {RunDir(config.run.dir).verify_path} has all checks.",
    )


def _remedy(config: RunConfig, failed: Sequence[Check]) -> str:
    """A merge in bfloat16 rounds small updates away: what then to do instead."""
    if config.export.dtype != "float32" and all(
        "probe" in check.name or "moved" in check.name for check in failed
    ):
        adapter = ", or use the adapter unmerged" if config.adapter else ""
        rounding = {"auto": "the base's own type"}.get(config.export.dtype, config.export.dtype)
        return f"{rounding} may round the update away: export with export.dtype=float32{adapter}."
    return "Do not use it."
