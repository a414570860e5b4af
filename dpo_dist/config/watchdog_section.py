"""Limits of the watchdog in seconds, by what a rank does; 0 and null switch one off."""

from typing import Annotated

from pydantic import Field

from dpo_dist.config.section import Section

Seconds = Annotated[float, Field(ge=0.0)]


class WatchdogSection(Section):
    silent: Seconds | None = Field(
        120.0, description="Seconds until a process that says nothing at all is taken for stopped."
    )
    load: Seconds | None = Field(
        1800.0, description="The start of a rank, and loading a model: nothing tells in between."
    )
    self_check: Seconds | None = Field(600.0, description="One forward of a model's self-check.")
    reference: Seconds | None = Field(600.0, description="One micro-batch of the reference pass.")
    step: Seconds | None = Field(600.0, description="One micro-batch of training, or one update.")
    evaluation: Seconds | None = Field(600.0, description="One micro-batch of an evaluation.")
    checkpoint: Seconds | None = Field(
        900.0, description="One write of a checkpoint, at most a tensor or 2 GiB."
    )
    export: Seconds | None = Field(900.0, description="One tensor of an export.")
    verify: Seconds | None = Field(900.0, description="One tensor or micro-batch of verify.")
    prepare: Seconds | None = Field(900.0, description="One chunk of rows, 256 at most.")
    generate: Seconds | None = Field(600.0, description="One token of an answer.")
