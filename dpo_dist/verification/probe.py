"""The log-probs that the training engine gave a few pairs, and what a loaded model gives them.

K probe pairs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from dpo_dist.config.run_config import RunConfig
from dpo_dist.data.batches import plan_micro_batches
from dpo_dist.data.pairs import Pairs, open_pairs
from dpo_dist.engine.checkpoints.checkpoint import read_probe
from dpo_dist.engine.forward.packing import pack_pairs
from dpo_dist.engine.forward.pair_scorer import score_pairs
from dpo_dist.engine.forward.scoring import score
from dpo_dist.errors import DPODistError
from dpo_dist.inputs.frozen_model import FrozenModel
from dpo_dist.run.run_dir import RunDir
from dpo_dist.verification.check import Check
from dpo_dist.verification.exported import Exported

LogpArray = npt.NDArray[np.float32]
# Largest difference of a log-prob per square root of its tokens, whose rounding errors add up
# like a random walk. docs/export.md has the figures behind them.
TOLERANCE = {"float32": 5e-4, "bfloat16": 5e-2}
# Nats per token between a policy on its quantized base and the same merged onto the full one: no
# rounding error but another model, so only a sign that it is still the same model at all.
QUANTIZED_BOUND = 3.0


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


def open_probe(paths: RunDir, checkpoint_dir: Path) -> Probe:
    """The probe of a checkpoint beside the pairs that it is of."""
    return Probe(open_pairs(paths.pairs_dir, "train"), *read_probe(checkpoint_dir))


def check_probe(
    exported: Exported, frozen: FrozenModel, probe: Probe, expected: LogpArray
) -> Iterator[Check]:
    """The probe in the layout that training scored in, and through the model's own logits.

    `expected` (K, 2) is what this folder must compute: the probe's own log-probs, unless the
    folder holds another model than the one that was trained, as a merge after QLoRA does; how far
    it is from that one is told first.
    """
    kind, config, device = exported.kind, exported.config, exported.device
    try:
        layout = frozen.settle(config)
    except DPODistError as error:
        yield Check(f"{kind}: probe", False, error.found)
        return
    scores = _packed(frozen.model, probe, config, device)
    if expected is not probe.logps:
        yield _compare_quantized(scores, probe, config)
    yield _compare(f"{kind}: probe, {layout} forward", scores, expected, probe, config)
    plain = plain_logps(frozen.model, probe, device)
    yield _compare(f"{kind}: probe, plain forward", plain, expected, probe, config)


def _packed(model: nn.Module, probe: Probe, config: RunConfig, device: torch.device) -> LogpArray:
    """(K, 2) log-probs in the order of the probe, in the micro-batches of training."""
    (batches,) = plan_micro_batches(
        probe.pairs.packed_lengths,
        probe.indices,
        world_size=1,
        micro_batch_tokens=config.scoring_tokens,
    )
    indices, scores = score(model, batches, probe.pairs.token_ids, device)
    order = {int(index): position for position, index in enumerate(indices)}
    return scores[[order[int(index)] for index in probe.indices]]


@torch.no_grad()
def plain_logps(model: nn.Module, probe: Probe, device: torch.device) -> LogpArray:
    """(K, 2) log-probs, one sequence at a time, through the model's own logits."""
    rows = []
    for index in probe.indices.tolist():
        packed = pack_pairs([probe.pairs.token_ids(index)], device)
        rows.append(score_pairs(model, packed, "plain").float().cpu().numpy())
    return np.concatenate(rows)


def _compare(
    name: str, scores: LogpArray, expected: LogpArray, probe: Probe, config: RunConfig
) -> Check:
    """Differences from the expected log-probs, per square root of the tokens."""
    exact = config.export.dtype == config.model.dtype == "float32"
    tolerance = TOLERANCE["float32" if exact else "bfloat16"]
    scaled = np.abs(scores - expected) / np.sqrt(probe.lengths)
    worst = np.unravel_index(np.argmax(np.nan_to_num(scaled, nan=np.inf)), scaled.shape)
    detail = (
        f"log-probs of {len(probe.indices)} pairs, furthest {scores[worst]:.4f} instead of "
        f"{expected[worst]:.4f} ({probe.lengths[worst]} tokens)"
    )
    largest = float(scaled[worst])
    return Check(name, bool(largest <= tolerance), detail, largest, tolerance)


def _compare_quantized(scores: LogpArray, probe: Probe, config: RunConfig) -> Check:
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
