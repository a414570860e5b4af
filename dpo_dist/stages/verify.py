"""The export, loaded afresh, must compute what the training engine computed: verify.json.

1. Find the checkpoint that the export was made from, and its probe: the log-probs that the
   engine gave a few training pairs when it saved.
2. For every exported folder: its files; names, shapes and types; a strict load; the
   tokenizer; an answer.
3. Score the probe pairs with the loaded model, by our forward and through the model's own logits.
4. Write every check with its largest difference, then fail when one did.

K probe pairs.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import torch

from dpo_dist.config.run_config import RunConfig, scoring_budget
from dpo_dist.data.batches import plan_micro_batches
from dpo_dist.data.pairs import Pairs, open_pairs
from dpo_dist.data.tokens.templates import load_tokenizer, resolve_template
from dpo_dist.engine.checkpoints.checkpoint import read_probe
from dpo_dist.engine.checkpoints.commit import FileRecord, find_changed
from dpo_dist.engine.export.weight_writer import export_dtype
from dpo_dist.engine.forward.generation import answer
from dpo_dist.engine.forward.packing import pack_pairs
from dpo_dist.engine.forward.pair_scorer import PairScorer
from dpo_dist.engine.forward.scoring import score
from dpo_dist.engine.model.model_choice import load_adapted, load_whole, stored_specs
from dpo_dist.engine.model.policy import settle_layout
from dpo_dist.engine.weights.base_weights import open_base
from dpo_dist.engine.weights.safetensors_stream import TensorSpec
from dpo_dist.errors import ArtifactError, DPODistError, VerificationError
from dpo_dist.model_files.files import read_model_config
from dpo_dist.model_files.of_run import base_model_dir
from dpo_dist.run.exports import Kind, export_folders
from dpo_dist.run.logs import progress_bar
from dpo_dist.run.manifest import Manifest, digest_of_file, read_manifest, write_json
from dpo_dist.run.run_dir import MANIFEST_NAME, RunDir

_logger = logging.getLogger(__name__)
LogpArray = npt.NDArray[np.float32]
# Largest difference of a log-prob per square root of its tokens, whose rounding errors add up
# like a random walk. docs/export.md has the figures behind them.
TOLERANCE = {"float32": 5e-4, "bfloat16": 5e-2}
# Nats per token between a policy on its quantized base and the same merged onto the full one: no
# rounding error but another model, so only a sign that it is still the same model at all.
QUANTIZED_BOUND = 3.0
NUM_ANSWER_TOKENS = 16
NUM_SHOWN = 3  # problems that a check names
GPU_SHARE = 0.8  # of its free memory for weights; a model that needs more is verified on the CPU


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; numbers where two were compared."""

    name: str
    passed: bool
    detail: str
    max_difference: float | None = None
    tolerance: float | None = None


@dataclass(frozen=True)
class Probe:
    """What the training engine computed for K pairs: log-probs (K, 2)."""

    pairs: Pairs
    indices: npt.NDArray[np.int64]
    logps: LogpArray

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(K, 2) tokens of the completions."""
        columns = (self.pairs.chosen_lengths, self.pairs.rejected_lengths)
        return np.stack([column[self.indices] for column in columns], axis=1)


def run(config: RunConfig) -> Path:
    """Checks every exported folder and writes verify.json.

    Raises ArtifactError when there is no export, or no longer the checkpoint it was made from, and
    VerificationError, after writing, when a check failed.
    """
    paths = RunDir(config.run.dir)
    folders = export_folders(config)
    manifests: dict[Kind, Manifest] = {kind: read_manifest(path) for kind, path in folders.items()}
    checkpoint_dir, *_ = [_checkpoint_of(paths, manifest) for manifest in manifests.values()]
    probe = Probe(open_pairs(paths.pairs_dir, "train"), *read_probe(checkpoint_dir))
    checks = []
    with progress_bar("folders") as bar:
        task = bar.add_task("verify", total=len(manifests))
        for kind, manifest in manifests.items():
            for check in _check_folder(config, kind, manifest, probe):
                _logger.log(
                    logging.INFO if check.passed else logging.ERROR,
                    "verify: %s: %s (%s)", check.name, "passed" if check.passed else "FAILED",
                    check.detail,
                )  # fmt: skip
                checks.append(check)
            bar.advance(task)
    failed = [check for check in checks if not check.passed]
    write_json(
        paths.verify_path,
        {
            "passed": not failed,
            "checkpoint": str(checkpoint_dir),
            "exports": {k: digest_of_file(path / MANIFEST_NAME) for k, path in folders.items()},
            "num_probe_pairs": len(probe.indices),
            "checks": [asdict(check) for check in checks],
        },
    )
    if failed:
        raise VerificationError(
            f"{len(failed)} of {len(checks)} checks failed, first {failed[0].name}: "
            f"{failed[0].detail}",
            "an export that reproduces the training run",
            f"{_remedy(config, failed)} {paths.verify_path} has all checks.",
        )
    return paths.verify_path


def _remedy(config: RunConfig, failed: Sequence[Check]) -> str:
    """A merge in bfloat16 rounds small updates away: what then to do instead."""
    if config.export.dtype != "float32" and all("probe" in check.name for check in failed):
        adapter = ", or use the adapter unmerged" if config.adapter else ""
        rounding = {"auto": "the base's own type"}.get(config.export.dtype, config.export.dtype)
        return f"{rounding} may round the update away: export with export.dtype=float32{adapter}."
    return "Do not use it."


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


def _check_folder(
    config: RunConfig, kind: Kind, manifest: Manifest, probe: Probe
) -> Iterator[Check]:
    """All checks of one folder; a load that fails ends them."""
    folder, base_dir = export_folders(config)[kind], base_model_dir(config)
    yield _check(f"{kind}: files", lambda: _files(folder, manifest))
    if kind != "adapter":
        yield _check(f"{kind}: names, shapes and types", lambda: _tensors(config, folder, base_dir))
    device = _device_for(folder, base_dir)
    expected = probe
    if kind == "merged" and config.model.quantization is not None:
        # before the merged model, so that only one of them is in memory
        try:
            expected = replace(probe, logps=_unquantized(config, probe, device))
        except DPODistError as error:
            yield Check(f"{kind}: adapter on the full-precision base", False, error.found)
            return
    loaded: list[Any] = []

    def load() -> str:
        if kind == "adapter":
            model, problems = load_adapted(base_dir, folder, config.model, device)
        else:
            unread = open_base(base_dir, config.model.trust_remote_code).unread
            model, problems = load_whole(folder, config.model, device, unread)
        loaded.append(model)
        _refuse(problems)
        return f"every weight in its place, on {device.type}"

    yield _check(f"{kind}: strict load", load)
    if not loaded:
        return
    (model,) = loaded
    yield _check(f"{kind}: tokenizer", lambda: _tokenizer(config, folder, base_dir, probe))
    # before scoring, which changes the model's attention
    yield _check(f"{kind}: answer", lambda: _answer(model, folder, config, probe))
    yield from _check_probe(kind, model, config, probe, expected, device)


def _check(name: str, work: Callable[[], str]) -> Check:
    """Runs a check that tells what it saw, or raises: whatever a broken folder makes of it."""
    try:
        return Check(name, True, work())
    except DPODistError as error:
        return Check(name, False, error.found)
    except Exception as error:
        return Check(name, False, repr(error))


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        more = f"; {len(problems)} in all" if len(problems) > NUM_SHOWN else ""
        raise VerificationError("; ".join(problems[:NUM_SHOWN]) + more, "none of this", "")


def _files(folder: Path, manifest: Manifest) -> str:
    """The files are those that the export wrote."""
    files = {name: FileRecord(**record) for name, record in manifest.details["files"].items()}
    missing = [name for name in files if not (folder / name).is_file()]
    problems = [f"{folder / name} is missing" for name in missing]
    _refuse(problems + find_changed(folder, files, [n for n in files if n not in missing]))
    return f"{len(files)} as they were written"


def _tensors(config: RunConfig, folder: Path, base_dir: Path) -> str:
    """The tensors of the base model, and beside them at most a head that training untied.

    Types are the base's under export.dtype auto, else that one.
    """
    exported, base = stored_specs(folder), stored_specs(base_dir)
    main = open_base(base_dir, config.model.trust_remote_code).main_dtype
    dtype = None if config.export.dtype == "auto" else getattr(torch, config.export.dtype)
    expected = {
        name: TensorSpec(export_dtype(main, spec.dtype, dtype), spec.shape)
        for name, spec in base.items()
    }
    base_tied, still_tied = (
        config.get("tie_word_embeddings") is not False
        for config in (read_model_config(base_dir), read_model_config(folder))
    )
    added = [name for name in exported if name not in base]
    wrong = [name for name, spec in expected.items() if exported.get(name) != spec]
    if len(added) > int(base_tied and not still_tied):
        wrong += added
    _refuse(
        [f"{n} is {_told(exported.get(n))} here, expected {_told(expected.get(n))}" for n in wrong]
    )
    kinds = sorted({str(spec.dtype).removeprefix("torch.") for spec in exported.values()})
    untied = f", untied {added[0]}" if added else ""
    return f"{len(exported)} tensors of {', '.join(kinds)}{untied}"


def _told(spec: TensorSpec | None) -> str:
    return f"{str(spec.dtype).removeprefix('torch.')} {spec.shape}" if spec else "absent"


def _tokenizer(config: RunConfig, folder: Path, base_dir: Path, probe: Probe) -> str:
    """The exported tokenizer encodes the probe as the run's, and has the run's chat template."""
    template = resolve_template(config.data.chat_template)
    remote = config.model.trust_remote_code
    own = load_tokenizer(base_dir, template, remote)
    exported = load_tokenizer(folder, None, remote)
    texts = [
        own.decode([*prompt, *chosen])
        for prompt, chosen, _ in map(probe.pairs.token_ids, probe.indices.tolist())
    ]
    _refuse([f"encodes {t!r} differently" for t in texts if own.encode(t) != exported.encode(t)])
    if own.chat_template != exported.chat_template:
        _refuse(["has another chat template than the run"])
    return f"{len(texts)} texts encode alike, same chat template"


def _answer(model: Any, folder: Path, config: RunConfig, probe: Probe) -> str:
    """Greedy generation runs."""
    tokenizer = load_tokenizer(folder, None, config.model.trust_remote_code)
    prompt = probe.pairs.token_ids(int(probe.indices[0]))[0]
    (own,) = answer(model, tokenizer, [prompt], max_new_tokens=NUM_ANSWER_TOKENS, temperature=0.0)
    return f"greedy, at most {NUM_ANSWER_TOKENS} tokens: {own.text!r}"


def _check_probe(
    kind: Kind, model: Any, config: RunConfig, probe: Probe, expected: Probe, device: torch.device
) -> Iterator[Check]:
    """The probe in the layout that training scored in, and through the model's own logits.

    `expected` are the same pairs with what this folder must compute; after QLoRA the merged model
    is none that was trained, and how far it is from that is told first.
    """
    scorer = PairScorer(model).eval()
    try:
        layout = settle_layout(scorer, scorer, config.model, device)
    except DPODistError as error:
        yield Check(f"{kind}: probe", False, error.found)
        return
    (batches,) = plan_micro_batches(
        probe.pairs.packed_lengths,
        probe.indices,
        world_size=1,
        micro_batch_tokens=scoring_budget(config),
    )
    indices, scores = score(scorer, batches, probe.pairs.token_ids, device)
    order = {int(index): position for position, index in enumerate(indices)}
    scores = scores[[order[int(index)] for index in probe.indices]]
    if expected is not probe:
        yield _compare_quantized(scores, config, probe)
    yield _compare(f"{kind}: probe, {layout} forward", scores, config, expected)
    yield _compare(f"{kind}: probe, plain forward", _plain(scorer, probe, device), config, expected)


def _unquantized(config: RunConfig, probe: Probe, device: torch.device) -> LogpArray:
    """What the merged model must compute: peft's adapter, unmerged, on the full-precision base."""
    section = config.model.model_copy(update={"quantization": None})
    folder = export_folders(config)["adapter"]
    policy, problems = load_adapted(base_model_dir(config), folder, section, device)
    _refuse(problems)
    return _plain(PairScorer(policy).eval(), probe, device)


def _compare_quantized(scores: LogpArray, config: RunConfig, probe: Probe) -> Check:
    """What leaving quantization behind does to the probe, per token; reported, hardly judged."""
    per_token = np.abs(scores - probe.logps) / probe.lengths
    (own, merged) = (logps[:, 0] - logps[:, 1] for logps in (probe.logps, scores))
    detail = (
        f"per token {per_token.mean():.3f} nats on average, {per_token.max():.3f} at most, from "
        f"the {config.model.quantization} policy that was trained; chosen - rejected "
        f"{merged.mean():.3f} on average instead of {own.mean():.3f}"
    )
    largest = float(per_token.max())
    passed = bool(largest <= QUANTIZED_BOUND)
    return Check("merged: against quantized training", passed, detail, largest, QUANTIZED_BOUND)


@torch.no_grad()
def _plain(scorer: PairScorer, probe: Probe, device: torch.device) -> LogpArray:
    """(K, 2) log-probs, one sequence at a time."""
    rows = []
    for index in probe.indices.tolist():
        packed = pack_pairs([probe.pairs.token_ids(index)], device)
        rows.append(scorer(packed, layout="plain").float().cpu().numpy())
    return np.concatenate(rows)


def _compare(name: str, scores: LogpArray, config: RunConfig, probe: Probe) -> Check:
    """Differences from the engine's log-probs, per square root of the tokens."""
    exact = config.export.dtype == config.model.dtype == "float32"
    tolerance = TOLERANCE["float32" if exact else "bfloat16"]
    differences = np.abs(scores - probe.logps)
    scaled = differences / np.sqrt(probe.lengths)
    worst = np.unravel_index(np.argmax(np.nan_to_num(scaled, nan=np.inf)), scaled.shape)
    detail = (
        f"log-probs of {len(probe.indices)} pairs, furthest {scores[worst]:.4f} instead of "
        f"{probe.logps[worst]:.4f} ({probe.lengths[worst]} tokens)"
    )
    largest = float(scaled[worst])
    return Check(name, bool(largest <= tolerance), detail, largest, tolerance)


def _device_for(folder: Path, base_dir: Path) -> torch.device:
    """The GPU when the weights fit into it, else the CPU."""
    stored = sum(
        path.stat().st_size for d in (folder, base_dir) for path in d.glob("*.safetensors")
    )
    if torch.cuda.is_available() and stored < GPU_SHARE * torch.cuda.mem_get_info()[0]:
        return torch.device("cuda", torch.cuda.current_device())
    if stored > psutil.virtual_memory().available:
        _logger.warning("verify: the model is larger than this machine's free memory")
    return torch.device("cpu")
