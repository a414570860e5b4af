"""What a run writes to disk, as far as it is known."""

from dpo_dist.config.run_config import RunConfig
from dpo_dist.inputs.setup import DTYPE_BYTES
from dpo_dist.inputs.work import Work
from dpo_dist.model_files.of_run import makes_base
from dpo_dist.planning.disk import checkpoint_size, export_sizes
from dpo_dist.planning.setup import Setup
from dpo_dist.planning.sizes import Size
from dpo_dist.reference.contract import store_root
from dpo_dist.reference.parts import ROW_DTYPE
from dpo_dist.run.run_dir import RunDir


def disk_sizes(config: RunConfig, setup: Setup, work: Work | None) -> list[Size]:
    """Every artifact of the run; pairs and reference store only once the pairs are prepared."""
    export = config.export
    exported = export_sizes(
        setup.shape,
        DTYPE_BYTES[export.dtype],
        adapter=config.adapter is not None,
        merge=export.merge,
    )
    num_kept = config.checkpoint.keep + (config.checkpoint.best_by is not None)
    return [
        *(_pairs_sizes(config, work) if work is not None else []),
        *([_base_size(config, setup)] if makes_base(config) else []),
        checkpoint_size(setup, num_kept),
        *exported,
    ]


def _pairs_sizes(config: RunConfig, work: Work) -> list[Size]:
    """The pairs on disk, and the rows of the reference store that they will get."""
    files = RunDir(config.run.dir).pairs_dir.rglob("*")
    size = sum(path.stat().st_size for path in files if path.is_file())
    sizes = [Size("pairs", size, "bytes of the prepared files")]
    if not config.objective.reference_free:
        count, row_bytes = len(work.train) + len(work.held_out), ROW_DTYPE.itemsize
        why = f"{row_bytes} bytes x {count:,} pairs, in {store_root(config)}"
        sizes.append(Size("reference_store", row_bytes * count, why))
    return sizes


def _base_size(config: RunConfig, setup: Setup) -> Size:
    """The base model that `prepare` makes when the config changes the one at model.path."""
    shape, each = setup.shape, DTYPE_BYTES[config.model.dtype]
    count = shape.num_parameters - (shape.num_trained if config.adapter else 0)
    why = f"{each} bytes x {count:,} parameters, in {RunDir(config.run.dir).base_dir}"
    return Size("base_model", each * count, why)
