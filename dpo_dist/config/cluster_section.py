"""Sections of a run config about where it runs; none of them changes a number."""

from typing import Any, Literal

from pydantic import Field, field_validator

from dpo_dist.config.section import PositiveInt, Section


class LocalSection(Section):
    workers: PositiveInt | Literal["auto"] = Field(
        "auto", description="Ranks on this machine; auto: one a GPU, or 2 on CPU."
    )


class RestartSection(Section):
    max_restarts: int = Field(
        100, ge=0, description="Restarts of a submission that a launcher makes by itself."
    )
    max_without_progress: int = Field(
        3, ge=0, description="Restarts in a row without anything new committed."
    )


class SlurmJobSection(Section):
    partition: str | None = Field(None, description="sbatch --partition.")
    account: str | None = Field(None, description="sbatch --account.")
    nodes: PositiveInt | None = Field(None, description="sbatch --nodes.")
    tasks_per_node: PositiveInt | None = Field(
        None, description="sbatch --ntasks-per-node: one task a GPU."
    )
    gpus_per_node: int | None = Field(None, ge=0, description="sbatch --gpus-per-node.")
    cpus_per_task: PositiveInt | None = Field(None, description="sbatch --cpus-per-task.")
    time: str | None = Field(None, description="sbatch --time, in quotes: '12:00:00'.")
    options: list[str] = Field([], description="More sbatch options, such as --qos=high.")

    @field_validator("time", mode="before")
    @classmethod
    def _refuse_number(cls, value: Any) -> Any:
        if isinstance(value, int):
            raise ValueError(
                f"slurm time: the number {value}, which is how YAML reads 12:00:00 without quotes; "
                "expected text. Put it in quotes."
            )
        return value


class SlurmSection(SlurmJobSection):
    stages: dict[
        Literal["doctor", "prepare", "reference", "train", "export", "verify", "push"],
        SlurmJobSection,
    ] = Field({}, description="Keys of this section for one stage, as {train: {nodes: 8}}.")


class RaySection(Section):
    workers: PositiveInt = Field(1, description="Ranks of the distributed stages, one a GPU.")
    min_workers: PositiveInt | None = Field(
        None, description="Go on with as few as these after a loss; null waits for all."
    )
    gpus_per_worker: float = Field(1.0, ge=0, description="GPUs of one rank; 0 trains on CPUs.")
    cpus_per_worker: float = Field(1.0, gt=0, description="CPUs of one rank.")
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = Field(
        "PACK", description="How Ray spreads the ranks over nodes."
    )
    reference_tasks: int = Field(
        0, ge=0,
        description="Score the reference in this many independent Ray tasks; 0: one job of ranks.",
    )  # fmt: skip
