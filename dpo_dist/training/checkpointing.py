"""A checkpoint of this training: the policy's shards, where training stands, and the probe."""

from collections.abc import Mapping, Sequence

import numpy as np

from dpo_dist.data.batches import plan_micro_batches
from dpo_dist.engine.checkpoints import saving
from dpo_dist.engine.checkpoints.host_copies import HostCopies
from dpo_dist.engine.checkpoints.train_state import TrainState
from dpo_dist.engine.distributed import collectives
from dpo_dist.engine.forward.scoring import score
from dpo_dist.engine.sharding import zero
from dpo_dist.errors import CheckpointError
from dpo_dist.metrics.evaluations import Evaluation
from dpo_dist.training.job import Job
from dpo_dist.watch.heartbeat import during


def host_copies(job: Job) -> HostCopies | None:
    """What checkpoints are copied into, None where training waits until they are written."""
    if job.config.checkpoint.mode == "blocking":
        return None
    return HostCopies(job.topology.local_world_size)


@during("checkpoint")
def begin_checkpoint(
    job: Job,
    step: int,
    digests: Mapping[str, str],
    evaluations: Sequence[Evaluation],
    skipped_steps: Sequence[int],
    copies: HostCopies | None,
) -> saving.Saving:
    """Begins the checkpoint of a step, to be committed once it is written.

    The probe holds this policy's log-probs of a few fixed pairs, which an export must reproduce.
    Raises CheckpointError on every rank, and writes nothing, when one of them or a weight that
    trains is not finite.
    """
    config, pairs = job.config, job.train.pairs
    (batches,) = plan_micro_batches(
        pairs.packed_lengths,
        range(min(config.checkpoint.probe_pairs, len(pairs))),
        world_size=1,
        micro_batch_tokens=config.train.micro_batch_tokens,
    )
    indices, scores = score(job.engine, batches, pairs.token_ids, job.device)
    _check_finite(step, bool(np.isfinite(scores).all()), zero.weights_are_finite(job.engine))
    order = np.argsort(indices)
    consumed_pairs = step * config.train.global_batch_size
    state = TrainState(
        step=step,
        consumed_pairs=consumed_pairs,
        epoch=consumed_pairs / len(pairs),
        digests=digests,
        world_size=job.topology.world_size,
        zero_stage=job.engine.zero_optimization_stage(),
        evaluations=list(evaluations),
        skipped_steps=list(skipped_steps),
    )
    folder = job.paths.checkpoints_dir
    return saving.begin(job.engine, folder, state, indices[order], scores[order], copies)


def _check_finite(step: int, probe_is_finite: bool, weights_are_finite: bool) -> None:
    """Raises CheckpointError on every rank, naming the ranks: no run could go on from it."""
    told = collectives.gather((probe_is_finite, weights_are_finite))
    probe, weights = (
        [rank for rank, ok in enumerate(column) if not ok] for column in zip(*told, strict=True)
    )
    if probe or weights:
        what = "weights" if weights else "log-probs of the probe"
        raise CheckpointError(
            f"step {step}: {what} of rank {', '.join(map(str, weights or probe))} are not finite",
            "finite numbers in a checkpoint",
            "Nothing was committed: lower train.learning_rate and start again, training continues "
            "from the checkpoint before.",
        )
