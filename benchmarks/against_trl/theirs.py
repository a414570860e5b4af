"""TRL's DPOTrainer as it is: its reference pass, its loop, its collator.

Its best settings for these rows: no gradient checkpointing, no evaluation, no saving, the fused
optimizer, one rank without DeepSpeed, the same ZeRO settings as ours under it.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from typing import Any

import datasets
import torch
import transformers
import trl
from peft import LoraConfig
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from benchmarks.against_trl.job import BETA, LEARNING_RATE, SEED, Clock, Job, new_clock
from dpo_dist.engine.distributed import collectives
from dpo_dist.engine.sharding.ds_config import config_folder
from dpo_dist.run.topology import VARIABLES, from_environment

VERSION = trl.__version__
BY_TRAINER = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "gradient_clipping",
)  # fmt: skip


class StepClock(TrainerCallback):
    """A step lasts from the end of the one before it, with what is logged between them."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.step = clock, 0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if self.step == 0:
            self.clock.begin(0)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clock.end(self.step)
        self.step += 1
        self.clock.begin(self.step)


def measure(job: Job) -> dict[str, Any]:
    """The figures of this rank."""
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    clock, topology, group = new_clock(job), from_environment(), contextlib.nullcontext()
    if job.sharding != "plain":
        group = collectives.process_group(topology)
    else:
        for name in VARIABLES:  # with which it would wrap a single process in DDP
            os.environ.pop(name)
    with group:
        config = _config(job)  # first: under ZeRO-3 the model is loaded in partitions
        trainer = _trainer(job, config, clock)
        losses, tokens = _watched(trainer)
        trainer.add_callback(StepClock(clock))
        trainer.train()
        per_step = len(losses) // job.steps
        for step in range(job.steps):
            own = losses[step * per_step : (step + 1) * per_step]
            means = collectives.gather(sum(own) / per_step)
            clock.figures["losses"].append(sum(means) / len(means))
            of_step = tokens[step * per_step : (step + 1) * per_step]
            clock.figures["tokens"].append(sum(collectives.gather(sum(of_step))))
        clock.figures["micro_batches"] = per_step
        rows = trainer.train_dataset[-job.pairs :]
        pairs = zip(rows["ref_chosen_logps"], rows["ref_rejected_logps"], strict=True)
        clock.figures["logps"] = [[float(chosen), float(rejected)] for chosen, rejected in pairs]
        _check_ids(job, trainer)
    return clock.figures


def _config(job: Job) -> DPOConfig:
    deepspeed: dict[str, Any] | None = None
    if job.sharding != "plain":
        deepspeed = json.loads((config_folder() / f"{job.sharding}.json").read_text())
        deepspeed |= dict.fromkeys(BY_TRAINER, "auto") | {"zero_allow_untested_optimizer": True}
    return DPOConfig(
        output_dir=f"{job.rows}/trl",
        beta=BETA,
        loss_type="sigmoid",
        max_length=job.max_length,
        per_device_train_batch_size=job.micro,
        gradient_accumulation_steps=job.pairs // job.ranks // job.micro,
        max_steps=job.steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        precompute_ref_log_probs=True,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": "float32"},
        deepspeed=deepspeed,
        use_cpu=True,
        bf16=False,
        seed=SEED,
        save_strategy="no",
        eval_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
    )


def _trainer(job: Job, config: DPOConfig, clock: Clock) -> DPOTrainer:
    """The trainer, whose constructor makes the reference pass; timed over the last step's pairs."""
    scores, stamps = DPOTrainer.compute_ref_log_probs, []
    warm_up = (job.steps - 1) * job.pairs // job.ranks // job.micro

    def stamped(self: DPOTrainer, model: Any, inputs: Any) -> Any:
        if len(stamps) in (0, warm_up + 1):
            clock.collectives.reset()
        if not stamps:
            stamps.append(time.perf_counter())
        found = scores(self, model, inputs)
        stamps.append(time.perf_counter())
        return found

    DPOTrainer.compute_ref_log_probs = stamped
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = DPOTrainer(
        model=job.model,
        args=config,
        train_dataset=datasets.load_from_disk(job.dataset),
        processing_class=transformers.AutoTokenizer.from_pretrained(job.model),
        peft_config=lora if job.adapter else None,
    )
    DPOTrainer.compute_ref_log_probs = scores
    clock.reference(stamps[-1] - stamps[warm_up], stamps[-1] - stamps[0])
    return trainer


def _watched(trainer: DPOTrainer) -> tuple[list[float], list[int]]:
    """Loss and padded tokens of every micro-batch, filled while it trains."""
    compute, losses, tokens = trainer.compute_loss, list[float](), list[int]()

    def watched(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = compute(model, inputs, *args, **kwargs)
        losses.append(float(loss.detach()))
        tokens.append(inputs["input_ids"].numel())
        return loss

    trainer.compute_loss = watched
    return losses, tokens


def _check_ids(job: Job, trainer: DPOTrainer) -> None:
    """TRL has the tokens that the others have."""
    ours = job.token_ids(trainer.processing_class)
    for index, row in enumerate(trainer.train_dataset):
        room = job.max_length - len(row["prompt_ids"])
        theirs = row["prompt_ids"], row["chosen_ids"][:room], row["rejected_ids"][:room]
        assert theirs == ours[index], f"pair {index} has other tokens"
