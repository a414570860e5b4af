"""Sections of a run config about where it runs; none of them changes a number."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, field_validator

from dpo_dist.config.section import PositiveInt, Rule, Section


class LocalSection(Section):
    workers: PositiveInt | Literal["auto"] = Field(
        "auto", description="Ranks on this machine; auto uses one per GPU, or 2 on CPU."
    )


class RestartSection(Section):
    max_restarts: int = Field(
        100, ge=0, description="Restarts that a launcher makes per submission before it gives up."
    )
    max_without_progress: int = Field(
        3, ge=0, description="Restarts in a row that may pass with nothing new committed."
    )


class SlurmJobSection(Section):
    partition: str | None = Field(None, description="sbatch --partition.")
    account: str | None = Field(None, description="sbatch --account.")
    nodes: PositiveInt | None = Field(None, description="sbatch --nodes.")
    tasks_per_node: PositiveInt | None = Field(
        None, description="sbatch --ntasks-per-node; use one task per GPU."
    )
    gpus_per_node: int | None = Field(None, ge=0, description="sbatch --gpus-per-node.")
    cpus_per_task: PositiveInt | None = Field(None, description="sbatch --cpus-per-task.")
    time: str | None = Field(None, description="sbatch --time, in quotes: '12:00:00'.")
    options: list[str] = Field([], description="More sbatch options, e.g. --qos=high.")

    @field_validator("time", mode="before")
    @classmethod
    def _refuse_number(cls, value: Any) -> Any:
        if isinstance(value, int):
            raise ValueError(
                f"{value}, which is how YAML reads an unquoted 12:00:00; expected text. Quote it."
            )
        return value


class SlurmSection(SlurmJobSection):
    stages: dict[
        Literal["doctor", "prepare", "reference", "train", "export", "verify", "push"],
        SlurmJobSection,
    ] = Field({}, description="Keys of this section for single stages, e.g. {train: {nodes: 8}}.")


class RaySection(Section):
    workers: PositiveInt = Field(1, description="Ranks of distributed stages, one per GPU.")
    min_workers: PositiveInt | None = Field(
        None, description="After a loss, continue with as few ranks as this; null waits for all."
    )
    gpus_per_worker: float = Field(1.0, ge=0, description="GPUs per rank; 0 trains on CPUs.")
    cpus_per_worker: float = Field(1.0, gt=0, description="CPUs per rank.")
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = Field(
        "PACK", description="How Ray places the ranks on nodes."
    )
    reference_tasks: int = Field(
        0, ge=0,
        description="Independent Ray tasks that score the reference; 0 uses one job of ranks.",
    )  # fmt: skip


def ray_rules(ray: RaySection) -> Iterator[Rule]:
    """What must hold between keys of the section."""
    yield (
        ray.min_workers is not None and ray.min_workers > ray.workers,
        f"ray.min_workers: {ray.min_workers} with ray.workers {ray.workers}",
        f"at most {ray.workers}",
        "Lower it, or raise ray.workers.",
    )
