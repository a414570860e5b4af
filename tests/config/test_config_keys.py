"""Every config key has an effect: each is flipped, here or in the test that is named here."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import tiny_model

from dpo_dist.config.keys import explain_keys
from dpo_dist.config.run_config import RunConfig, parse_config, scoring_budget
from dpo_dist.config.training_section import AdapterSection
from dpo_dist.data.batches import num_steps, plan_micro_batches, step_pair_indices
from dpo_dist.engine.model.adapters import add_adapter
from dpo_dist.engine.sharding import ds_config, optimizers, zero
from dpo_dist.inputs.scored_pairs import objective_of
from dpo_dist.objective.mixture import pair_losses
from dpo_dist.objective.pair_logps import PairLogps
from dpo_dist.reference.contract import store_root
from dpo_dist.run.local_ranks import count_workers

TESTS = Path(__file__).parent
BASE: dict[str, Any] = {
    "run": {"dir": "runs/x"},
    "model": {"path": "m"},
    "data": {"train": [{"path": "a"}]},
    "adapter": {},
}

# Keys whose flip is a test of its own: key -> file, and words of the test that only it holds.
ELSEWHERE: dict[str, tuple[str, str]] = {
    "run.dir": ("test_pipeline.py", 'f"run.dir={other}"'),
    "model.path": ("test_prepare.py", '"model"'),
    "model.revision": ("test_export.py", "revision"),
    "model.quantization": ("test_qlora.py", "model.quantization=nf4"),
    "model.attention": ("test_attention.py", '"torch"'),
    "model.layout": ("test_settings.py", "model.layout is packed"),
    "model.add_tokens": ("test_start_model.py", "add_tokens="),
    "model.pad_vocab_to_multiple": ("test_start_model.py", "pad_vocab_to_multiple="),
    "adapter.path": ("test_start_model.py", "adapter.path={"),
    "adapter.start": ("test_start_model.py", "adapter.start=merge"),
    "model.trust_remote_code": ("test_settings.py", "trust_remote_code=True"),
    "model.allow_pickle_weights": ("test_model_files.py", "allow_pickle=True"),
    "data.train": ("test_pipeline.py", "data.train.0.path="),
    "data.train[].path": ("test_pipeline.py", "data.train.0.path="),
    "data.train[].name": ("test_sources.py", "test_names_are_made_distinct"),
    "data.train[].format": ("test_sources.py", "test_a_named_format_and_a_column_map"),
    "data.train[].columns": ("test_sources.py", "test_a_named_format_and_a_column_map"),
    "data.train[].config": ("test_hub.py", '"config": "big"'),
    "data.train[].streaming": ("test_hub.py", '"streaming": streaming'),
    "data.train[].min_score_margin": ("test_scores.py", '"min_score_margin": least'),
    "data.eval_fraction": ("test_split.py", "eval_fraction=0.2"),
    "data.eval_seed": ("test_split.py", "eval_seed=7"),
    "data.train[].split": ("test_table_rows.py", "split"),
    "data.train[].revision": ("test_hub.py", '"revision": "v1"'),
    "data.train[].limit": ("test_sources.py", "test_limit_and_weight_of_every_kind"),
    "data.train[].weight": ("test_sources.py", "weight=0.5"),
    "data.max_length": ("test_gate.py", "test_a_given_max_length"),
    "data.chat_template": ("test_templates.py", "chat_template"),
    "data.system_message": ("test_templates.py", "system_message"),
    "data.on_empty": ("test_gate.py", "on_empty="),
    "data.on_identical": ("test_gate.py", "on_identical"),
    "data.on_prompt_fills": ("test_gate.py", "on_prompt_fills"),
    "data.on_duplicate": ("test_gate.py", "on_duplicate"),
    "data.on_conflict": ("test_gate.py", "on_conflict"),
    "data.on_overlap": ("test_gate.py", "on_overlap"),
    "data.max_dropped": ("test_gate.py", "max_dropped="),
    "data.num_workers": ("test_worker.py", "num_workers"),
    "reference.part": ("test_reference_part.py", "reference.part="),
    "restart.max_restarts": ("test_attempts.py", "max_restarts="),
    "restart.max_without_progress": ("test_attempts.py", "max_without_progress="),
    "ray.workers": ("test_ray_launcher.py", "workers="),
    "ray.min_workers": ("test_ray_launcher.py", "min_workers="),
    "ray.gpus_per_worker": ("test_ray_launcher.py", "gpus_per_worker="),
    "ray.cpus_per_worker": ("test_ray_launcher.py", "cpus_per_worker="),
    "ray.placement": ("test_ray_launcher.py", "placement="),
    "ray.reference_tasks": ("clusters/test_ray.py", "ray.reference_tasks=3"),
    **{
        f"slurm.{prefix}{key}": ("test_slurm_launcher.py", key)
        for prefix in ("", "stages.NAME.")
        for key in (
            "partition", "account", "nodes", "tasks_per_node", "gpus_per_node", "cpus_per_task",
            "time", "options",
        )
    },
    "slurm.stages": ("test_slurm_launcher.py", "stages"),
    "reference.model": ("test_pipeline.py", "reference.model="),
    "reference.sharding": ("test_pipeline.py", "reference.sharding=zero3"),
    "checkpoint.every_steps": ("test_pipeline.py", "checkpoint.every_steps=3"),
    "checkpoint.keep": ("test_pipeline.py", "checkpoint.keep=3"),
    "checkpoint.resume": ("test_pipeline.py", "checkpoint.resume="),
    "checkpoint.probe_pairs": ("test_pipeline.py", "checkpoint.probe_pairs=3"),
    "eval.every_steps": ("test_pipeline.py", "eval.every_steps=4"),
    "checkpoint.best_by": ("test_early_stop.py", "test_the_best_checkpoint_is_kept"),
    "eval.patience": ("test_early_stop.py", "eval.patience=9"),
    "eval.min_delta": ("test_early_stop.py", "eval.min_delta=2.0"),
    "eval.samples_every_steps": ("test_early_stop.py", "eval.samples_every_steps=3"),
    "eval.num_samples": ("test_early_stop.py", "eval.num_samples=3"),
    "export.checkpoint": ("test_early_stop.py", "export.checkpoint=newest"),
    "export.dtype": ("test_export_stage.py", "test_type_and_shard_size"),
    "export.max_shard_size_mib": ("test_export_stage.py", "test_type_and_shard_size"),
    "export.merge": ("test_export_stage.py", "test_the_adapter_alone_needs_no_merge"),
    "export.base_model": ("test_push.py", '"export.base_model=me/base"'),
    "export.push_to_hub": ("test_push.py", '"export.push_to_hub=me/tiny"'),
    "export.hub_private": ("test_push.py", '"export.hub_private=false"'),
    "export.hub_revision": ("test_push.py", '"export.hub_revision=v1/a"'),
    "export.hub_folder": ("test_push.py", '"export.hub_folder=adapter"'),
    "logging.wandb": ("test_wandb_log.py", '"logging.wandb=true"'),
    "logging.wandb_project": ("test_wandb_log.py", '"logging.wandb_project=ours"'),
    "logging.wandb_name": ("test_wandb_log.py", '"logging.wandb_name=mine"'),
    "generate.num_prompts": ("test_pipeline.py", "generate.num_prompts=2"),
    "generate.max_new_tokens": ("test_pipeline.py", "generate.max_new_tokens=4"),
    "generate.temperature": ("test_settings.py", "temperature=5.0"),
    "generate.top_p": ("test_answers.py", "top_p=1e-6"),
    "generate.batch_size": ("test_answers.py", "generate.batch_size=1"),
    "logging.tensorboard": ("test_pipeline.py", "logging.tensorboard=true"),
    "logging.every_steps": ("test_pipeline.py", "logging.every_steps=2"),
    "train.gradient_checkpointing": ("test_pipeline.py", "train.gradient_checkpointing=true"),
}  # fmt: skip


def adapted(config: RunConfig) -> dict[str, Any]:
    """What the adapter settings make of a tiny model."""
    assert isinstance(config.adapter, AdapterSection)
    policy: Any = add_adapter(tiny_model("llama"), config.adapter, "m")
    layer = policy.base_model.model.model.layers[0].self_attn.q_proj
    shapes = {n: tuple(p.shape) for n, p in policy.named_parameters() if p.requires_grad}
    scaling = getattr(layer, "scaling", None)
    return {"shapes": shapes, "scaling": scaling, "layer": str(layer)}


def optimizer_of(config: RunConfig) -> dict[str, Any]:
    """The kind of the optimizer and the settings of its parameter group."""
    sharding = ds_config.training_config(config.train, config.model.dtype, 1)
    optimizer = optimizers.make_optimizer(torch.nn.Linear(2, 2), sharding, config.train)
    settings = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    return settings | {"kind": type(optimizer).__name__}


def learning_rates(config: RunConfig) -> list[float]:
    """The schedule's learning rate over 20 steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=1.0)
    schedule = zero.make_schedule(optimizer, config.train, 20)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def loss_of(config: RunConfig) -> list[float]:
    vectors = [torch.tensor([v]) for v in (-5.0, -9.0, -6.0, -8.0)]
    logps = PairLogps(
        *vectors,
        torch.tensor([4]),
        torch.tensor([7]),
        sum_sq_logps=torch.tensor([[-3.0, -7.0]]),
        expert_counts=torch.tensor([[5.0, 3.0]]),
        expert_probs=torch.tensor([[4.5, 3.5]]),
    )
    return pair_losses(logps, objective_of(config)).tolist()


def plan_of(config: RunConfig) -> Any:
    train = config.train
    pairs = step_pair_indices(0, 100, train.global_batch_size, config.run.seed)
    lengths = torch.full((100,), 1000).numpy()
    return plan_micro_batches(lengths, pairs, 2, train.micro_batch_tokens)


def steps_of(config: RunConfig) -> int:
    total = num_steps(1000, config.train.global_batch_size, config.train.num_epochs)
    return min(total, config.train.max_steps or total)


def sharding_of(config: RunConfig) -> Any:
    return ds_config.training_config(config.train, config.model.dtype, 2)


# Keys that are flipped here: key -> another value, and what has to change with it.
# A third entry holds keys without which the key would be refused.
FLIPPED: dict[str, tuple[Any, ...]] = {
    "run.seed": (7, plan_of),
    "model.dtype": ("float32", sharding_of),
    "reference.store_dir": ("shared", store_root),
    "reference.micro_batch_tokens": (99, scoring_budget),
    "adapter": (None, lambda config: config.adapter is None),
    "adapter.rank": (4, adapted),
    "adapter.alpha": (64.0, adapted),
    "adapter.dropout": (0.5, adapted),
    "adapter.target_modules": (["q_proj"], adapted),
    "adapter.use_rslora": (True, adapted),
    "adapter.use_dora": (True, adapted),
    "adapter.modules_to_save": (["lm_head"], adapted),
    "adapter.exclude_modules": (["up_proj"], adapted),
    "adapter.target_parameters": (["embed_tokens.weight"], adapted),
    "adapter.rank_pattern": ({"q_proj": 4}, adapted),
    "adapter.alpha_pattern": ({"q_proj": 4.0}, adapted),
    "objective.loss": ("ipo", loss_of),
    "objective.beta": (0.5, loss_of),
    "objective.label_smoothing": (0.2, loss_of),
    "objective.loss_weights": ([0.5], loss_of),
    "objective.f_divergence_type": ("js_divergence", loss_of),
    "objective.f_alpha_divergence_coef": (
        2.0,
        loss_of,
        {"objective.f_divergence_type": "alpha_divergence"},
    ),
    "objective.discopop_tau": (0.5, loss_of, {"objective.loss": "discopop"}),
    "objective.simpo_gamma": (1.0, loss_of, {"objective.loss": "simpo"}),
    "objective.ld_alpha": (0.5, lambda config: objective_of(config).terms()),
    "objective.use_weighting": (True, loss_of),
    "objective.router_aux_loss_coef": (
        0.1,
        loss_of,
        {"train.gradient_checkpointing": False},
    ),
    "train.num_epochs": (2.0, steps_of),
    "train.max_steps": (3, steps_of),
    "train.global_batch_size": (32, plan_of),
    "train.micro_batch_tokens": (2000, plan_of),
    "train.optimizer": ("adamw_8bit", optimizer_of),
    "train.learning_rate": (1e-3, optimizer_of),
    "train.lr_schedule": ("linear", learning_rates),
    "train.warmup_ratio": (0.5, learning_rates),
    "train.weight_decay": (0.1, optimizer_of),
    "train.adam_beta1": (0.8, optimizer_of),
    "train.adam_beta2": (0.95, optimizer_of),
    "train.adam_eps": (1e-6, optimizer_of),
    "train.max_grad_norm": (0.1, sharding_of),
    "train.deepspeed": ("zero2", sharding_of),
    "local.workers": (5, lambda config: count_workers(config.local)),
}


@pytest.mark.parametrize("key", sorted(FLIPPED))
def test_flipping_a_key_changes_something(key: str) -> None:
    value, effect, *others = FLIPPED[key]
    others = dict(*others)
    assert effect(config_with(others | {key: value})) != effect(config_with(others))


def config_with(values: dict[str, Any]) -> RunConfig:
    """BASE with some keys set."""
    raw = {k: dict(v) if isinstance(v, dict) else v for k, v in BASE.items()}
    for key, value in values.items():
        *parents, leaf = key.split(".")
        target = raw
        for parent in parents:
            target = target.setdefault(parent, {})
        target[leaf] = value
    return parse_config(raw)


def test_every_key_is_flipped_somewhere() -> None:
    keys = {key for key, *_ in explain_keys() if not re.match(r"data\.eval(\[\]|$)", key)}
    assert keys == set(FLIPPED) | set(ELSEWHERE), keys ^ (set(FLIPPED) | set(ELSEWHERE))
    assert not set(FLIPPED) & set(ELSEWHERE)
    for key, (name, words) in ELSEWHERE.items():
        assert words in (TESTS / name).read_text(), f"{key}: {name} does not hold {words!r}"
