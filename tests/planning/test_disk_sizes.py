"""Estimated disk against the files that DeepSpeed really writes."""

from dataclasses import replace
from pathlib import Path

import pytest
from support.planner_setups import LLAMA_8B, setup_of
from support.ranks import run_ranks
from support.tiny_engine import start_engine, train_step

from dpo_dist.engine.distributed import collectives
from dpo_dist.planning.disk import checkpoint_size, export_sizes
from dpo_dist.run.topology import from_environment


@pytest.mark.parametrize(
    ("stage", "dtype", "each"),
    [
        (0, "float32", 12),
        (3, "bfloat16", 12),
        pytest.param(0, "bfloat16", 14, marks=pytest.mark.slow),
        pytest.param(1, "bfloat16", 14, marks=pytest.mark.slow),
        pytest.param(2, "float32", 16, marks=pytest.mark.slow),
        pytest.param(3, "float32", 12, marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_is_as_large_as_estimated(
    tmp_path: Path, stage: int, dtype: str, each: int
) -> None:
    sizes = run_ranks(2, bytes_of_a_checkpoint, stage, dtype, str(tmp_path))
    shape = replace(LLAMA_8B, num_trained=sizes[0]["num_trained"])
    setup = setup_of(shape, {"zero_optimization": {"stage": stage}}, dtype, 2)
    size = checkpoint_size(setup, 1)
    assert size.num_bytes == 2 * each * shape.num_trained
    assert sizes[0]["num_bytes"] == pytest.approx(size.num_bytes / 2, rel=0.05)


def bytes_of_a_checkpoint(stage: int, dtype: str, folder: str) -> dict[str, int]:
    """Bytes of DeepSpeed's files after one step, and the parameters that train."""
    with collectives.process_group(from_environment()):
        engine = start_engine(stage, adapter=False, dtype=dtype, width=196, depth=8)
        train_step(engine, 1)
        engine.save_checkpoint(folder, tag="t", save_latest=False, exclude_frozen_parameters=True)
        collectives.barrier()
        files = Path(folder).rglob("*.pt")
        parameters = engine.module.parameters()
        return {
            "num_bytes": sum(path.stat().st_size for path in files),
            "num_trained": sum(getattr(p, "ds_numel", p.numel()) for p in parameters),
        }


def test_exports() -> None:
    adapted = replace(LLAMA_8B, num_parameters=1100, num_trained=100)
    sizes = {s.name: s.num_bytes for s in export_sizes(adapted, 2, adapter=True, merge=True)}
    assert sizes == {"export_adapter": 200, "export_model": 2000}
    alone = export_sizes(adapted, 2, adapter=True, merge=False)
    assert [size.name for size in alone] == ["export_adapter"]
