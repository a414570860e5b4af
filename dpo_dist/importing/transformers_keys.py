"""The keys of transformers' TrainingArguments, which TRL and LlamaFactory build on.

The defaults are those of transformers 5.23.
"""

from dpo_dist.importing.settings import Default, Keys, Left, reasons

SAME: Keys = {
    "seed": ("run.seed", 42),
    "learning_rate": ("train.learning_rate", 5e-5),
    "weight_decay": ("train.weight_decay", 0.0),
    "adam_beta1": ("train.adam_beta1", 0.9),
    "adam_beta2": ("train.adam_beta2", 0.999),
    "adam_epsilon": ("train.adam_eps", 1e-8),
    "max_grad_norm": ("train.max_grad_norm", 1.0),
}
CONVERTED: Keys = {
    "output_dir": ("run.dir", None),
    "bf16": ("model.dtype", False),
    "fp16": ("model.dtype", False),
    "per_device_train_batch_size": ("train.global_batch_size, train.micro_batch_tokens", 8),
    "gradient_accumulation_steps": ("train.global_batch_size", 1),
    "num_train_epochs": ("train.num_epochs", 3.0),
    "max_steps": ("train.max_steps, train.num_epochs", -1),
    "lr_scheduler_type": ("train.lr_schedule", "linear"),
    "lr_scheduler_kwargs": ("train.min_lr_rate, train.decay_steps, train.decay_shape", None),
    "warmup_steps": ("train.warmup_steps, train.warmup_ratio", 0),
    "warmup_ratio": ("train.warmup_ratio", 0.0),  # of earlier versions
    "optim": ("train.optimizer", "adamw_torch_fused"),
    "gradient_checkpointing": ("train.gradient_checkpointing", None),
    "activation_checkpointing": ("train.gradient_checkpointing", None),
    "deepspeed": ("train.deepspeed", None),
    "save_strategy": ("checkpoint.every_steps", "steps"),
    "save_steps": ("checkpoint.every_steps", 500),
    "save_total_limit": ("checkpoint.keep", None),
    "eval_strategy": ("eval.every_steps", "no"),
    "eval_steps": ("eval.every_steps", None),
    "eval_on_start": ("eval.on_start", False),
    "logging_strategy": ("logging.every_steps", "steps"),
    "logging_steps": ("logging.every_steps", 500),
    "report_to": ("logging.tensorboard, logging.wandb", "none"),
    "run_name": ("logging.wandb_name", None),
    "load_best_model_at_end": ("checkpoint.best_by, export.checkpoint", False),
    "metric_for_best_model": ("checkpoint.best_by", None),
    "greater_is_better": ("checkpoint.best_by", None),
    "push_to_hub": ("export.push_to_hub", False),
    "hub_model_id": ("export.push_to_hub", None),
    "hub_private_repo": ("export.hub_private", None),
    "hub_revision": ("export.hub_revision", None),
}
DIFFERS: Left = {
    "label_smoothing_factor": (0.0, "it smooths tokens; objective.label_smoothing is for pairs"),
    "neftune_noise_alpha": (None, "no noise is added: policy and reference must agree at step 0"),
    "optim_args": (None, "set train.adam_beta1, adam_beta2 and adam_eps"),
    "optim_target_modules": (None, "the optimizer sees all trained parameters; try an adapter"),
    "data_seed": (None, "run.seed orders the samples too"),
    "train_sampling_strategy": ("random", "each epoch is a seeded permutation; batches are "
                                "packed by token count anyway"),
    "dataloader_drop_last": (False, "the last partial step of the run is left out, and no other"),
    "ignore_data_skip": (False, "a resumed run goes on at the pair where it stopped"),
    "use_cpu": (False, "CPUs are taken where no GPU is found; hide GPUs with CUDA_VISIBLE_DEVICES"),
    "fsdp": (None, "sharding is DeepSpeed's: train.deepspeed zero3 shards as much"),
    "fsdp_config": (None, "sharding is DeepSpeed's: ds_configs/README.md"),
    "resume_from_checkpoint": (None, "a run folder resumes by itself; checkpoints of others cannot "
                               "be read, but a model saved by them can be model.path"),
    "parallelism_config": (None, "ranks share the data; there is no tensor or context parallelism"),
    "accelerator_config": (None, "give its number of processes with --num-processes"),
    "save_only_model": (False, "checkpoints can always be resumed from"),
}  # fmt: skip
WITHOUT_PADDING = "pairs are packed and their prompt computed once, so there is no padding to tune"
OWN_LAYERS = "the head is computed in chunks, and layers are transformers' own"
ONE_RECOMPUTATION = "recomputation has one way, which works with ZeRO-3"
TOKENIZED_ONCE = "pairs are tokenized once into Arrow files, and read from there"
NOT_NEEDED: dict[str, str] = reasons({
    WITHOUT_PADDING: "length_column_name auto_find_batch_size",
    "train.micro_batch_tokens bounds the memory of evaluation too":
        "per_device_eval_batch_size eval_accumulation_steps torch_empty_cache_steps",
    OWN_LAYERS: "use_liger_kernel liger_kernel_config torch_compile torch_compile_backend "
        "torch_compile_mode use_cache tf32",
    ONE_RECOMPUTATION: "gradient_checkpointing_kwargs activation_checkpointing_kwargs",
    "the loss is the mean over the pairs of a step, whatever the ranks":
        "average_tokens_across_devices",
    "held-out pairs are scored by the same forward and summed exactly":
        "bf16_full_eval fp16_full_eval prediction_loss_only eval_do_concat_batches "
        "eval_use_gather_object include_for_metrics batch_eval_metrics label_names",
    "held-out pairs are scored every eval.every_steps": "eval_delay do_train do_eval do_predict",
    "every step logs TRL's metrics to metrics.jsonl": "logging_first_step log_on_each_node "
        "logging_nan_inf_filter include_num_input_tokens_seen log_level log_level_replica "
        "disable_tqdm skip_memory_metrics",
    "the run's name is its folder, run.dir": "project trackio_space_id trackio_bucket_id "
        "trackio_static_space_id",
    "set HF_TOKEN, or log in with `hf auth login`": "hub_token",
    "the verified export is pushed once, at the end of the run": "hub_strategy hub_always_push",
    "checkpoints lie in run.dir, which all nodes share, and hold all there is to go on from":
        "save_on_each_node restore_callback_states_from_checkpoint",
    "a signal always leads to a checkpoint and a restart": "enable_jit_checkpoint",
    "the same seed gives the same samples, adapter and dropout": "full_determinism",
    TOKENIZED_ONCE: "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
        "dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order "
        "remove_unused_columns",
    "ranks talk through DeepSpeed": "ddp_find_unused_parameters ddp_bucket_cap_mb "
        "ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout local_rank debug",
})  # fmt: skip
RENAMED: dict[str, str] = {"evaluation_strategy": "eval_strategy"}
FORMER: dict[str, str] = {
    "group_by_length": "batches are packed by token count",
    "logging_dir": "TensorBoard files lie in run.dir/tensorboard",
    "overwrite_output_dir": "a run folder is gone on with; remove it to start anew",
    "no_cuda": "CPUs are taken where no GPU is found",
    "save_safetensors": "weights are always safetensors",
}


def with_defaults(table: Keys, **defaults: Default) -> Keys:
    """A table with other defaults for some keys."""
    return {key: (ours, defaults.get(key, default)) for key, (ours, default) in table.items()}
