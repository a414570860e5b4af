"""Bytes that DeepSpeed's ranks exchange, of a micro-batch and of an optimizer step."""

from dataclasses import dataclass

from dpo_dist.planning.setup import Setup


@dataclass(frozen=True)
class Traffic:
    """Bytes of whole tensors, whatever the number of ranks; a ring reduces by two such passes."""

    gathered: int  # parameters before a micro-batch's forward and backward
    gathered_inside: int  # of them, those that lie in the node a second time (hpZ)
    scattered: int  # gradients after each micro-batch
    reduced: int  # the same where each rank gets the whole sum
    reduced_once: int  # gradients after the last micro-batch only
    updated: int  # parameters after the update


def traffic_of(setup: Setup) -> Traffic:
    """What a training step exchanges; the few bytes of metrics and norms are not counted.

    ZeRO-3 gathers all parameters for the forward, and again for the backward those that its
    `stage3_max_live_parameters` could not keep. Gradients travel in `communication_data_type`.
    """
    sharding, shape = setup.sharding, setup.shape
    held = shape.num_held(setup.dtype_bytes)
    gradients = sharding.reduce_bytes * shape.num_trained
    trained = setup.dtype_bytes * shape.num_trained
    if setup.world_size == 1:
        return Traffic(0, 0, 0, 0, 0, 0)
    if sharding.stage == 3:
        again = setup.dtype_bytes * max(0, held - sharding.max_live)
        inside = again if sharding.secondary_ranks > 1 else 0
        forward = setup.dtype_bytes * held
        return Traffic(forward + again - inside, inside, gradients, 0, 0, 0)
    if sharding.stage == 2:
        return Traffic(0, 0, 0, gradients, 0, trained)
    return Traffic(0, 0, 0, 0, gradients, trained if sharding.stage else 0)
