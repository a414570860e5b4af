"""Every key that a YAML for TRL's `dpo` script may hold, and what becomes of it here.

1. SAME: the value is copied; only the name changes.
2. CONVERTED: convert.py, convert_train.py or convert_output.py makes something of it.
3. DIFFERS: not taken, and the numbers of the run would differ unless it has TRL's default.
4. NOT_NEEDED: not taken, and no number depends on it.
5. RENAMED and FORMER: keys of earlier versions of TRL and transformers.

The defaults are those of TRL 1.16 and transformers 5.23: a key that a YAML leaves out has them.
"""

from typing import Any

Default = Any

# TRL's key -> (ours, TRL's default)
SAME: dict[str, tuple[str, Default]] = {
    "seed": ("run.seed", 42),
    "trust_remote_code": ("model.trust_remote_code", False),
    "learning_rate": ("train.learning_rate", 1e-6),
    "weight_decay": ("train.weight_decay", 0.0),
    "adam_beta1": ("train.adam_beta1", 0.9),
    "adam_beta2": ("train.adam_beta2", 0.999),
    "adam_epsilon": ("train.adam_eps", 1e-8),
    "max_grad_norm": ("train.max_grad_norm", 1.0),
    "beta": ("objective.beta", 0.1),
    "loss_weights": ("objective.loss_weights", None),
    "f_divergence_type": ("objective.f_divergence_type", "reverse_kl"),
    "f_alpha_divergence_coef": ("objective.f_alpha_divergence_coef", 0.5),
    "use_weighting": ("objective.use_weighting", False),
    "discopop_tau": ("objective.discopop_tau", 0.05),
}
# the same for an adapter; without use_peft they do nothing
SAME_OF_ADAPTER: dict[str, tuple[str, Default]] = {
    "lora_r": ("adapter.rank", 16),
    "lora_alpha": ("adapter.alpha", 32),
    "use_rslora": ("adapter.use_rslora", False),
    "use_dora": ("adapter.use_dora", False),
    "lora_target_parameters": ("adapter.target_parameters", None),
}

# TRL's key -> TRL's default
CONVERTED: dict[str, Default] = {
    "model_name_or_path": None,
    "model_revision": "main",
    "output_dir": None,
    "dtype": "float32",
    "bf16": None,
    "fp16": False,
    "dataset_name": None,
    "dataset_config": None,
    "dataset_train_split": "train",
    "dataset_test_split": "test",
    "datasets": [],
    "test_split_size": None,
    "dataset_streaming": False,
    "streaming": False,
    "dataset_num_proc": None,
    "max_length": 1024,
    "truncation_mode": "keep_start",
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3.0,
    "max_steps": -1,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "optim": "adamw_torch_fused",
    "activation_checkpointing": None,
    "gradient_checkpointing": True,
    "deepspeed": None,
    "loss_type": ["sigmoid"],
    "label_smoothing": 0.0,
    "ld_alpha": None,
    "router_aux_loss_coef": None,
    "load_in_4bit": False,
    "use_peft": False,
    "lora_dropout": 0.05,
    "disable_dropout": True,
    "lora_target_modules": None,
    "lora_modules_to_save": None,
    "save_strategy": "steps",
    "save_steps": 500,
    "save_total_limit": None,
    "eval_strategy": "no",
    "eval_steps": None,
    "logging_strategy": "steps",
    "logging_steps": 10,
    "report_to": "none",
    "run_name": None,
    "load_best_model_at_end": False,
    "metric_for_best_model": None,
    "greater_is_better": None,
    "push_to_hub": False,
    "hub_model_id": None,
    "hub_private_repo": None,
    "hub_revision": None,
}

# TRL's key -> (TRL's default, what to do instead)
DIFFERS: dict[str, tuple[Default, str]] = {
    "load_in_8bit": (False, "there is no 8-bit base; leave it in model.dtype"),
    "bnb_4bit_quant_type": ("nf4", "the one kind of 4-bit base is nf4"),
    "lora_task_type": ("CAUSAL_LM", "preferences are trained into a causal language model only"),
    "sync_ref_model": (False, "the reference is scored once and stays as it is"),
    "ref_model_mixup_alpha": (0.6, "the reference is scored once and stays as it is"),
    "ref_model_sync_steps": (512, "the reference is scored once and stays as it is"),
    "label_smoothing_factor": (0.0, "it smooths tokens; objective.label_smoothing is for pairs"),
    "neftune_noise_alpha": (None, "no noise is added: policy and reference must agree at step 0"),
    "lr_scheduler_kwargs": (None, "the schedules of train.lr_schedule have no settings"),
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
    "model_init_kwargs": (None, "see the keys of the section model"),
    "pad_token": (None, "set it in the tokenizer's own folder, and name that in model.path"),
    "resume_from_checkpoint": (None, "a run folder resumes by itself; TRL's checkpoints cannot be "
                               "read, but a model saved by TRL can be model.path"),
    "parallelism_config": (None, "ranks share the data; there is no tensor or context parallelism"),
    "accelerator_config": (None, "give its number of processes with --num-processes"),
    "save_only_model": (False, "checkpoints can always be resumed from"),
}  # fmt: skip

# why nothing has to be done -> TRL's keys, the separate words of one text
_NOT_NEEDED: dict[str, str] = {
    "the reference is always scored beforehand, in a stage of its own":
        "precompute_ref_log_probs precompute_ref_batch_size",
    "pairs are packed and their prompt computed once, so there is no padding to tune":
        "padding_free pad_to_multiple_of length_column_name auto_find_batch_size",
    "train.micro_batch_tokens bounds the memory of evaluation too":
        "per_device_eval_batch_size eval_accumulation_steps torch_empty_cache_steps",
    "attention: model.attention auto takes the fastest kernel that the model allows":
        "attn_implementation",
    "the head is computed in chunks, and layers are transformers' own":
        "use_liger_kernel liger_kernel_config torch_compile torch_compile_backend "
        "torch_compile_mode activation_offloading use_cache tf32",
    "recomputation has one way, which works with ZeRO-3":
        "activation_checkpointing_kwargs gradient_checkpointing_kwargs",
    "the loss is the mean over the pairs of a step, whatever the ranks":
        "average_tokens_across_devices",
    "held-out pairs are scored by the same forward and summed exactly":
        "bf16_full_eval fp16_full_eval prediction_loss_only eval_do_concat_batches "
        "eval_use_gather_object include_for_metrics batch_eval_metrics label_names",
    "held-out pairs are scored every eval.every_steps": "eval_delay eval_on_start do_train do_eval "
        "do_predict",
    "every step logs TRL's metrics to metrics.jsonl": "logging_first_step "
        "log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen log_level "
        "log_level_replica disable_tqdm skip_memory_metrics",
    "the run's name is its folder, run.dir": "project trackio_space_id trackio_bucket_id "
        "trackio_static_space_id",
    "set HF_TOKEN, or log in with `hf auth login`": "hub_token",
    "the verified export is pushed once, at the end of the run": "hub_strategy hub_always_push",
    "checkpoints lie in run.dir, which all nodes share, and hold all there is to go on from":
        "save_on_each_node restore_callback_states_from_checkpoint",
    "a signal always leads to a checkpoint and a restart": "enable_jit_checkpoint",
    "the same seed gives the same samples, adapter and dropout": "full_determinism",
    "pairs are tokenized once into Arrow files, and read from there": "dataloader_num_workers "
        "dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
        "dataloader_multiprocessing_context dataloader_in_order remove_unused_columns",
    "ranks talk through DeepSpeed": "ddp_find_unused_parameters ddp_bucket_cap_mb "
        "ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout local_rank "
        "ignore_bias_buffers debug",
    "4-bit weights are stored as ZeRO needs them": "bnb_4bit_quant_storage",
    "the constants of the 4-bit base are always quantized too": "use_bnb_nested_quant",
}  # fmt: skip
NOT_NEEDED: dict[str, str] = {key: why for why, keys in _NOT_NEEDED.items() for key in keys.split()}

# keys of earlier versions -> today's
RENAMED: dict[str, str] = {
    "evaluation_strategy": "eval_strategy",
    "torch_dtype": "dtype",
    "preprocessing_num_workers": "dataset_num_proc",
}
# a key of earlier versions, or of the alignment-handbook, that is converted still -> its default
CONVERTED_FORMER: dict[str, Default] = {
    "warmup_ratio": 0.0, "generate_during_eval": False,
    "dataset_mixture": None, "dataset_mixer": None, "dataset_splits": None,
}  # fmt: skip
# keys of earlier versions, or of scripts around TRL -> what to do
FORMER: dict[str, str] = {
    "max_prompt_length": "there is one limit, data.max_length; answers are cut, prompts are not",
    "max_completion_length": "there is one limit, data.max_length",
    "rpo_alpha": "objective.loss [sigmoid, sft] with objective.loss_weights [1, rpo_alpha]",
    "reference_free": "objective.loss simpo and orpo have no reference",
    "force_use_ref_model": "reference.model names a reference",
    "ref_model_init_kwargs": "reference.model names a reference, read as the policy is",
    "ref_adapter_name": "reference.model names a reference",
    "model_adapter_name": "the adapter of a run has no name to choose",
    "label_pad_token_id": "nothing is padded",
    "padding_value": "nothing is padded",
    "is_encoder_decoder": "models are causal language models",
    "use_logits_to_keep": "only completions meet the vocabulary anyway",
    "tools": "a row brings its own in the column tools",
    "group_by_length": "batches are packed by token count",
    "logging_dir": "TensorBoard files lie in run.dir/tensorboard",
    "overwrite_output_dir": "a run folder is gone on with; remove it to start anew",
    "no_cuda": "CPUs are taken where no GPU is found",
    "save_safetensors": "weights are always safetensors",
    "hub_model_revision": "export.hub_revision names the branch to push to",
    "env": "export these variables in the shell, or in slurm/site.env",
}
DEFAULTS: dict[str, Default] = {
    **{key: default for table in (SAME, SAME_OF_ADAPTER) for key, (_, default) in table.items()},
    **CONVERTED,
    **CONVERTED_FORMER,
}
KNOWN: tuple[str, ...] = (*DEFAULTS, *DIFFERS, *NOT_NEEDED, *RENAMED, *FORMER)
