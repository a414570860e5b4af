"""The work of a run: its prepared pairs and the optimizer steps that they make.

Opened by the planner, the doctor, and the stages that load a model, which look before they do.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpo_dist.config.run_config import RunConfig
from dpo_dist.data.batches import check_token_budget, num_steps, step_pair_indices
from dpo_dist.data.pairs import Pairs, open_pairs
from dpo_dist.engine.checkpoints.commit import check_new_files
from dpo_dist.engine.sharding.ds_config import check_optimizer, read_sharding
from dpo_dist.engine.sharding.schedule import warmup_and_decay
from dpo_dist.errors import ArtifactError, ConfigError, DataError
from dpo_dist.extras import require_bitsandbytes
from dpo_dist.inputs.setup import shares_prompts
from dpo_dist.metrics import wandb_log
from dpo_dist.model_files.files import read_model_config
from dpo_dist.model_files.of_run import RunModels
from dpo_dist.run.manifest import read_manifest
from dpo_dist.run.run_dir import RunDir

ORDERS = ("pairs", "prompts")  # values of data.order
# how families call the number of heads
HEAD_COUNTS = ("num_attention_heads", "n_head", "n_heads", "num_heads")


@dataclass(frozen=True)
class Work:
    """The prepared pairs of both splits and the optimizer steps that they make."""

    train: Pairs
    held_out: Pairs
    num_steps: int

    @property
    def first_steps(self) -> range:
        """Those that stand for all where counting them all would take long."""
        return range(min(self.num_steps, 16))


def computed_by_order(config: RunConfig, work: Work) -> dict[str, float]:
    """Of each `data.order`, which share of the tokens of a step is computed.

    It is the tokens of the first steps with what their pairs share counted once, over those of
    pairs alone; 1 where nothing is shared.
    """
    if work.train.shared is None or not shares_prompts(config):
        return dict.fromkeys(ORDERS, 1.0)
    return {order: _computed(config, work.train, work.first_steps, order) for order in ORDERS}


def _computed(config: RunConfig, train: Pairs, steps: range, order: str) -> float:
    assert train.shared is not None, "there is nothing to share"
    size, seed, together = config.train.global_batch_size, config.run.seed, train.together(order)
    alone = shared = 0
    for step in steps:
        indices = step_pair_indices(step, len(train), size, seed, together)
        alone += int(train.packed_lengths[indices].sum())
        shared += train.shared.tokens(indices)
    return shared / alone


def tokens_of(pairs: Pairs, pair_indices: Sequence[int], shares: bool) -> tuple[int, int]:
    """Tokens of these pairs in a row, and how many of them are scored.

    Where pairs may share (`shares_prompts`), every prompt and every answer counts once.
    """
    indices = np.asarray(pair_indices, dtype=np.int64)
    if shares and pairs.shared is not None:
        return pairs.shared.tokens(indices), pairs.shared.answer_tokens(indices)
    scored = pairs.chosen_lengths[indices] + pairs.rejected_lengths[indices]
    return int(pairs.packed_lengths[indices].sum()), int(scored.sum())


def prepared_work(config: RunConfig) -> Work | None:
    """The prepared pairs, None when there are none yet.

    Raises DataError when they are too few for a step or too long for a micro-batch, ConfigError
    when the schedule does not fit into their steps.
    """
    return _open_work(config) if RunDir(config.run.dir).pairs_dir.is_dir() else None


def checked_work(models: RunModels) -> Work:
    """The prepared pairs, once nothing is left that training would refuse without a model.

    The reference pass asks too: what comes after hours of it is found before them. Raises
    ArtifactError without pairs, DataError when they do not suffice, and as `check_settings`,
    `check_heads` and `check_tokenizer`.
    """
    config = models.config
    check_settings(config)
    check_heads(models)
    work = _open_work(config)
    check_tokenizer(models)
    _check_held_out(config, len(work.held_out))
    return work


def check_heads(models: RunModels) -> None:
    """Raises ConfigError when ranks that share rows cannot share the heads of a model's attention.

    A padded row is shared by its sequences, whatever the heads.
    """
    shared, model = models.config.train.sequence_parallel, models.config.model
    if shared == 1 or model.layout == "padded":
        return
    named = [] if models.config.reference.model is None else [models.reference]
    for folder in (models.source, *named):
        found = read_model_config(folder)
        text = found.get("text_config") or found
        heads = next((text[name] for name in HEAD_COUNTS if text.get(name)), shared)
        if heads % shared:
            fitting = [str(n) for n in range(1, heads + 1) if heads % n == 0]
            raise ConfigError(
                f"train.sequence_parallel: {shared}, and {folder} has {heads} attention heads",
                f"a number of ranks that share them evenly: {', '.join(fitting)}",
                "Set train.sequence_parallel to one of them; or model.layout to padded, where the "
                "ranks share the sequences of a row.",
            )


def check_tokenizer(models: RunModels) -> None:
    """Raises ArtifactError when the pairs were made with another tokenizer than the model has now:
    an export would carry that one, and every answer would be read in other tokens."""
    pairs_dir = RunDir(models.config.run.dir).pairs_dir
    made = read_manifest(pairs_dir).inputs.get("tokenizer", models.tokenizer_digest)
    if made != models.tokenizer_digest:
        raise ArtifactError(
            f"{models.base} has another tokenizer (digest {models.tokenizer_digest[:12]}) than "
            f"{pairs_dir} was made with ({made[:12]})",
            "the same",
            "Put the model's tokenizer back, or prepare and train in another run.dir.",
        )


def check_settings(config: RunConfig) -> None:
    """What training would refuse without a model or pairs.

    Raises ConfigError when the sharding or the optimizer is wrong or an optional package is
    missing, DataError when a setting needs held-out pairs and none are named, CheckpointError when
    a checkpoint could not be written, or not as this user's.
    """
    settings, model = config.train, config.model
    if not config.data.holds_out:
        _check_held_out(config, 0)
    check_optimizer(settings, model.dtype, read_sharding(settings.deepspeed))
    if model.quantization is not None:
        require_bitsandbytes(f"model.quantization: {model.quantization}")
    if "8bit" in settings.optimizer or "paged" in settings.optimizer:
        require_bitsandbytes(f"train.optimizer: {settings.optimizer}")
    if config.logging.wandb:
        wandb_log.check_installed()
    run, trusted = RunDir(config.run.dir), config.checkpoint.trusted_owners
    for folder in (run.root, run.checkpoints_dir):
        check_new_files(folder, trusted)


def _open_work(config: RunConfig) -> Work:
    pairs_dir, settings = RunDir(config.run.dir).pairs_dir, config.train
    train, held_out = (open_pairs(pairs_dir, split) for split in ("train", "eval"))
    _check_order(config, train)
    budget = settings.micro_batch_tokens
    too_long = np.flatnonzero(train.packed_lengths > budget)
    check_token_budget(train.packed_lengths, too_long, budget)
    steps = num_steps(len(train), settings.global_batch_size, settings.num_epochs)
    steps = min(steps, settings.max_steps or steps)
    warmup_and_decay(settings, steps)
    return Work(train, held_out, steps)


def _check_order(config: RunConfig, train: Pairs) -> None:
    """Raises ArtifactError when pairs of a prompt are to go together and no pair says which."""
    if config.data.order == "prompts" and train.shared is None:
        raise ArtifactError(
            f"data.order is prompts, and {train.folder} was prepared by a version that wrote no "
            "keys of prompts",
            "pairs with the columns prompt_key, chosen_key and rejected_key",
            "Delete the prepared pairs and run `dpo-dist prepare` again, or set data.order to "
            "pairs.",
        )


def _check_held_out(config: RunConfig, num_held_out: int) -> None:
    """Raises DataError when a setting needs held-out pairs and there are none."""
    needy = {
        "checkpoint.best_by": config.checkpoint.best_by,
        "eval.samples_every_steps": config.eval.samples_every_steps,
    }
    for key, value in needy.items():
        if value is not None and not num_held_out:
            raise DataError(
                f"{key} is {value}, and there are no held-out pairs",
                "at least one",
                "Set data.eval or data.eval_fraction and prepare the pairs in another run.dir, "
                f"or set {key} to null.",
            )
