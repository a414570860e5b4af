"""Disk that training and export take: checkpoints while they rotate, and the exported model."""

from collections.abc import Iterator

from dpo_dist.planning.memory_resident import checkpoint_bytes_each
from dpo_dist.planning.setup import ModelShape, Setup
from dpo_dist.planning.sizes import Size, shortened, size_of_parameters


def checkpoint_size(setup: Setup, num_kept: int) -> Size:
    """Checkpoints on disk while one more than `num_kept` is being written.

    A trained parameter takes its optimizer state and the float32 copy, below ZeRO-3 also the
    parameter in the dtype it is trained in; a frozen one takes nothing.
    """
    each, trained = checkpoint_bytes_each(setup), setup.shape.num_trained
    return Size(
        "checkpoints",
        round((num_kept + 1) * each * trained),
        f"{num_kept + 1} x {each:g} bytes x {shortened(trained)} trained parameters",
    )


def export_sizes(shape: ModelShape, d: int, *, adapter: bool, merge: bool) -> Iterator[Size]:
    """The exported adapter and the whole model, in elements of d bytes."""
    base = shape.num_parameters - (shape.num_trained if adapter else 0)
    if adapter:
        yield size_of_parameters("export_adapter", d, shape.num_trained, "trained")
    if merge or not adapter:
        yield size_of_parameters("export_model", d, base)
