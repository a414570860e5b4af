"""Every key that a YAML for Axolotl may hold, and what becomes of it here.

The defaults are those of its schema, and of TRL where Axolotl leaves a key to it.
"""

from dpo_dist.importing import transformers_keys as shared
from dpo_dist.importing.settings import Keys, Left, Peer, reasons

SAME: Keys = {
    "base_model": ("model.path", None),
    "revision_of_model": ("model.revision", None),
    "trust_remote_code": ("model.trust_remote_code", False),
    "seed": ("run.seed", 42),
    "learning_rate": ("train.learning_rate", None),
    "weight_decay": ("train.weight_decay", 0.0),
    "adam_beta1": ("train.adam_beta1", 0.9),
    "adam_beta2": ("train.adam_beta2", 0.999),
    "adam_epsilon": ("train.adam_eps", 1e-8),
    "max_grad_norm": ("train.max_grad_norm", 1.0),
    "dpo_use_weighting": ("objective.use_weighting", False),
    "default_system_message": ("data.system_message", None),
    "chat_template_kwargs": ("data.chat_template_kwargs", None),
    "dataset_num_proc": ("data.num_workers", None),
}
SAME_OF_ADAPTER: Keys = {
    "lora_r": ("adapter.rank", None),
    "lora_alpha": ("adapter.alpha", None),
    "peft_use_rslora": ("adapter.use_rslora", False),
    "peft_use_dora": ("adapter.use_dora", False),
}
CONVERTED: Keys = {
    "rl": ("objective.loss", None),
    "rl_beta": ("objective.beta", 0.1),
    "trl": ("objective.beta", None),
    "dpo_label_smoothing": ("objective.label_smoothing", 0.0),
    "dpo_loss_type": ("objective.loss", None),
    "dpo_loss_weights": ("objective.loss_weights", None),
    "rpo_alpha": ("objective.loss, objective.loss_weights", None),
    "orpo_alpha": ("objective.beta", None),
    "simpo_gamma": ("objective.simpo_gamma", 0.5),
    "cpo_alpha": ("objective.loss, objective.loss_weights", 1.0),
    "output_dir": ("run.dir", "./model-out"),
    "bf16": ("model.dtype", "auto"),
    "fp16": ("model.dtype", False),
    "bfloat16": ("model.dtype", False),
    "float16": ("model.dtype", False),
    "float32": ("model.dtype", False),
    "load_in_4bit": ("model.quantization", False),
    "adapter": ("adapter", None),
    "lora_dropout": ("adapter.dropout", 0.0),
    "lora_target_modules": ("adapter.target_modules", None),
    "lora_target_linear": ("adapter.target_modules", False),
    "lora_target_parameters": ("adapter.target_parameters", None),
    "lora_modules_to_save": ("adapter.modules_to_save", None),
    "lora_model_dir": ("adapter.path", None),
    "datasets": ("data.train", None),
    "test_datasets": ("data.eval", None),
    "val_set_size": ("data.eval_fraction", 0.0),
    "streaming": ("data.train", False),
    "sequence_len": ("data.max_length", 512),
    "excess_length_strategy": ("data.max_length", None),
    "chat_template": ("data.chat_template", None),
    "chat_template_jinja": ("data.chat_template", None),
    "tokens": ("model.add_tokens", None),
    "micro_batch_size": ("train.global_batch_size, train.micro_batch_tokens", 1),
    "gradient_accumulation_steps": ("train.global_batch_size", 1),
    "batch_size": ("train.global_batch_size", None),
    "num_epochs": ("train.num_epochs", 1.0),
    "max_steps": ("train.max_steps, train.num_epochs", None),
    "lr_scheduler": ("train.lr_schedule", "cosine"),
    "lr_scheduler_kwargs": ("train.min_lr_rate, train.decay_steps, train.decay_shape", None),
    "cosine_min_lr_ratio": ("train.min_lr_rate", None),
    "warmup_steps": ("train.warmup_steps, train.warmup_ratio", None),
    "warmup_ratio": ("train.warmup_ratio", 0.03),
    "optimizer": ("train.optimizer", "adamw_torch_fused"),
    "gradient_checkpointing": ("train.gradient_checkpointing", False),
    "deepspeed": ("train.deepspeed", None),
    "save_strategy": ("checkpoint.every_steps", None),
    "save_steps": ("checkpoint.every_steps", None),
    "saves_per_epoch": ("checkpoint.every_steps", None),
    "save_total_limit": ("checkpoint.keep", None),
    "eval_strategy": ("eval.every_steps", None),
    "eval_steps": ("eval.every_steps", None),
    "evals_per_epoch": ("eval.every_steps", None),
    "logging_steps": ("logging.every_steps", None),
    "load_best_model_at_end": ("checkpoint.best_by, export.checkpoint", False),
    "metric_for_best_model": ("checkpoint.best_by", None),
    "greater_is_better": ("checkpoint.best_by", None),
    "early_stopping_patience": ("eval.patience, checkpoint.best_by", None),
    "generate_samples": ("eval.samples_every_steps", False),
    "use_tensorboard": ("logging.tensorboard", False),
    "use_wandb": ("logging.wandb", None),
    "wandb_project": ("logging.wandb, logging.wandb_project", None),
    "wandb_name": ("logging.wandb_name", None),
    "hub_model_id": ("export.push_to_hub", None),
    "hub_revision": ("export.hub_revision", None),
    "ray_num_workers": ("train.global_batch_size", None),
}
NO_RELORA = "an adapter is trained in one go"
NO_GALORE = "see train.optimizer for those that there are"
ONE_LR = "all parameters have train.learning_rate"
NO_KTO = "KTO's loss is not there"
WHOLE = "all parameters train, or an adapter"
AS_IN_TRANSFORMERS = (
    "neftune_noise_alpha", "optim_args", "optim_target_modules", "dataloader_drop_last",
    "resume_from_checkpoint", "save_only_model", "fsdp", "fsdp_config",
)  # fmt: skip
DIFFERS: Left = {
    **{key: shared.DIFFERS[key] for key in AS_IN_TRANSFORMERS},
    "load_in_8bit": (False, "there is no 8-bit base; leave it in model.dtype"),
    "bnb_config_kwargs": (None, "the one kind of 4-bit base is nf4, its constants quantized too"),
    "gptq": (False, "a base that is quantized already cannot be trained on; use load_in_4bit's"),
    "model_quantization_config": (None, "a base is in model.dtype, or quantized to nf4"),
    "model_quantization_config_kwargs": (None, "a base is in model.dtype, or quantized to nf4"),
    "quantize_moe_experts": (False, "experts stay in model.dtype"),
    "fp8": (None, "model.dtype is bfloat16 or float32"),
    "tokenizer_config": (None, "put the tokenizer's files into the model's folder"),
    "base_model_config": (None, "put config.json into the model's folder"),
    "cls_model_config": (None, "the class is that of config.json"),
    "overrides_of_model_config": (None, "put them into the config.json of the model's folder"),
    "overrides_of_model_kwargs": (None, "see the keys of the section model"),
    "special_tokens": (None, "set them in the tokenizer's own folder; nothing is padded, and the "
                       "chat template ends an answer"),
    "added_tokens_overrides": (None, "rename them in the tokenizer's own folder"),
    "resize_token_embeddings_to_32x": (False, "model.pad_vocab_to_multiple=32"),
    "shrink_embeddings": (False, "embeddings keep their size"),
    "mean_resizing_embeddings": (False, "new tokens start as the mean of the rest"),
    "fix_untrained_tokens": (None, "name new tokens in model.add_tokens"),
    "reinit_weights": (False, "training starts from the model's weights"),
    "unfrozen_parameters": (None, "all parameters train, or an adapter: adapter.target_modules"),
    "freeze_mm_modules": (False, "rows are text"),
    "peft": (None, "an adapter starts as LoRA does, on the weights as they are"),
    "peft_layers_to_transform": (None, "name the layers in adapter.target_modules, such as "
                                 r".*layers\.(1|2)\..*_proj"),
    "peft_layers_pattern": (None, "name the layers in adapter.target_modules"),
    "peft_layer_replication": (None, "layers are those of the model"),
    "peft_init_lora_weights": (True, "A is random and B is zero"),
    "peft_trainable_token_indices": (None, "adapter.modules_to_save trains whole embeddings"),
    "lora_fan_in_fan_out": (False, "the layout is known from the layer"),
    "loraplus_lr_ratio": (None, ONE_LR),
    "embedding_lr": (None, ONE_LR),
    "embedding_lr_scale": (None, ONE_LR),
    "lr_groups": (None, ONE_LR),
    "relora": (False, NO_RELORA),
    **dict.fromkeys(("jagged_restart_steps", "jagged_restart_warmup_steps",
                     "jagged_restart_anneal_steps"), (None, NO_RELORA)),
    **dict.fromkeys(("lisa_n_layers", "lisa_step_interval"), (None, WHOLE)),
    "cosine_constant_lr_ratio": (None, "cosine runs to the last step; train.min_lr_rate ends it"),
    "lr_quadratic_warmup": (False, "the warm-up is linear"),
    "lr_div_factor": (None, "see train.lr_schedule for those that there are"),
    "adam_epsilon2": (None, NO_GALORE),
    "adam_beta3": (None, NO_GALORE),
    "max_prompt_len": (None, "there is one limit, data.max_length; answers are cut, prompts are "
                       "not"),
    "eval_sequence_len": (None, "held-out pairs have data.max_length too"),
    "min_sample_len": (None, "short pairs are kept"),
    "curriculum_sampling": (False, "each epoch is a seeded permutation"),
    "shuffle_merged_datasets": (True, "each epoch is a seeded permutation"),
    "shuffle_before_merging_datasets": (False, "each epoch is a seeded permutation"),
    "dataset_exact_deduplication": (True, "data.on_duplicate drop, the default, does it; keep "
                                    "leaves them in"),
    **dict.fromkeys(("dataset_shard_num", "dataset_shard_idx"),
                    (None, "data.train[0].limit takes a part of the rows")),
    "skip_prepare_dataset": (False, "prepare a run once, and give its run.dir to the next stages"),
    **dict.fromkeys(("loss_watchdog_threshold", "loss_watchdog_patience"),
                    (None, "look at the margins; train.non_finite stops at NaN")),
    "save_first_step": (False, "a signal saves at any step"),
    "context_parallel_size": (1, "no ring; train.sequence_parallel lets ranks share rows"),
    "tensor_parallel_size": (1, "ranks share the data; there is no tensor parallelism"),
    "qat": (None, "quantize the export afterwards"),
    "quantization": (None, "quantize the export afterwards"),
    **dict.fromkeys(("kto_desirable_weight", "kto_undesirable_weight"), (None, NO_KTO)),
    "trainer_cls": (None, "there is no trainer class to replace; docs/python.md has the parts"),
    "plugins": (None, "kernels of plugins change no number that matters; other plugins have no "
                "equal"),
    "use_pose": (False, "positions are those of the text"),
    "scaling_softmax": (False, "attention is the model's own"),
    "pretraining_dataset": (None, "data.train names rows of preferences"),
    **dict.fromkeys(("reward_model", "process_reward_model"),
                    (False, "a policy is trained, not a reward model")),
    **dict.fromkeys(("do_bench_eval", "do_causal_lm_eval"),
                    (False, "run `dpo-dist evaluate --harness` on the export")),
    "push_dataset_to_hub": (None, "prepared pairs lie in run.dir/pairs"),
    "profiler_steps": (None, "train.profile_steps=[first, last]"),
}  # fmt: skip
NOT_NEEDED: dict[str, str] = reasons({
    "the class is that of the files in model.path": "type_of_model tokenizer_type processor_type "
        "tokenizer_use_fast tokenizer_legacy tokenizer_use_mistral_common "
        "tokenizer_save_jinja_files is_falcon_derived_model is_llama_derived_model "
        "is_mistral_derived_model is_qwen_derived_model",
    "the reference is always scored beforehand, in a stage of its own": "precompute_ref_log_probs",
    shared.WITHOUT_PADDING: "sample_packing eval_sample_packing sample_packing_group_size "
        "sample_packing_bin_size sample_packing_sequentially sample_packing_mp_start_method "
        "sample_packing_eff_est pad_to_sequence_len pad_to_multiple_of multipack_real_batches "
        "batch_flattening dpo_padding_free group_by_length auto_find_batch_size "
        "pretrain_multipack_attn pretrain_multipack_buffer_size streaming_multipack_buffer_size "
        "pretraining_sample_concatenation total_num_tokens total_supervised_tokens",
    "attention: model.attention auto takes the fastest kernel that the model allows":
        "attn_implementation flash_attention sdp_attention xformers_attention flex_attention "
        "eager_attention sage_attention s2_attention flex_attn_compile_kwargs "
        "gemma4_hybrid_attn_impl flash_optimum",
    shared.OWN_LAYERS: "flash_attn_cross_entropy flash_attn_rms_norm flash_attn_fuse_mlp "
        "dpo_use_liger_kernel lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel "
        "chunked_cross_entropy chunked_cross_entropy_num_chunks tiled_mlp tiled_mlp_num_shards "
        "tiled_mlp_use_original_mlp torch_compile torch_compile_backend torch_compile_mode "
        "deepcompile tf32 use_kernels experts_implementation llama4_linearized_experts "
        "activation_offloading layer_offloading scaling_softmax_factor scaling_softmax_bias",
    shared.ONE_RECOMPUTATION: "gradient_checkpointing_kwargs",
    "train.micro_batch_tokens bounds the memory of evaluation too": "eval_batch_size",
    "answers are scored, prompts never": "train_on_inputs eot_tokens",
    "of another task than preferences": "vllm ebft num_labels center_rewards_coefficient "
        "use_eaft eaft_alpha eaft_k image_size image_resize_algorithm",
    "of an optimizer that is not there": "torchdistx_path dion_lr dion_momentum dion_rank_fraction "
        "dion_rank_multiple_of qgalore_rank qgalore_update_proj_gap qgalore_scale "
        "qgalore_proj_type qgalore_proj_quant qgalore_proj_bits qgalore_proj_group_size "
        "qgalore_cos_threshold qgalore_gamma_proj qgalore_queue_size loraplus_lr_embedding "
        "relora_prune_ratio relora_prune_method relora_cpu_offload lisa_layers_attribute "
        "pose_split_on_token_ids pose_max_context_len pose_num_chunks",
    shared.TOKENIZED_ONCE: "dataset_prepared_path dataset_keep_in_memory dataloader_num_workers "
        "num_dataset_shards_to_save dataloader_pin_memory dataloader_prefetch_factor "
        "remove_unused_columns preprocess_iterable is_preprocess",
    "set HF_TOKEN, or log in with `hf auth login`": "hf_use_auth_token",
    "the verified export is pushed once, at the end of the run": "hub_strategy",
    "weights are always safetensors": "save_safetensors",
    "after LoRA the merged model is written too: export.merge": "merge_lora merge_method",
    "weights are read one tensor at a time, to where they belong": "low_cpu_mem_usage lora_on_cpu "
        "qlora_sharded_model_loading device device_map max_memory gpu_memory_limit "
        "experimental_skip_move_to_device embeddings_skip_upcast peft_autocast_adapter_dtype "
        "peft_ensure_weight_tying",
    "a run folder is gone on with by itself": "auto_resume_from_checkpoints dynamic_checkpoint",
    "ranks talk through DeepSpeed": "ddp ddp_timeout ddp_bucket_cap_mb ddp_broadcast_buffers "
        "ddp_find_unused_parameters local_rank world_size accelerator_config dp_shard_size "
        "dp_replicate_size heads_k_stride ring_attn_func fsdp_version "
        "fsdp_final_state_dict_type fp8_enable_fsdp_float8_all_gather",
    "export WANDB_ENTITY and its kin in the shell, or in slurm/site.env": "wandb_entity wandb_mode "
        "wandb_run_id wandb_watch wandb_log_model",
    "other trackers can read run.dir/metrics.jsonl or TensorBoard's files": "use_mlflow "
        "mlflow_tracking_uri mlflow_experiment_name mlflow_run_name hf_mlflow_log_artifacts "
        "use_comet comet_api_key comet_workspace comet_project_name comet_experiment_key "
        "comet_mode comet_online comet_experiment_config use_trackio trackio_project_name "
        "trackio_run_name trackio_space_id use_otel_metrics otel_metrics_host otel_metrics_port",
    "tokens per second are always reported": "include_tokens_per_second include_tkps "
        "profiler_steps_start",
    "answers during training have the section generate": "num_generation_samples "
        "generation_max_new_tokens generation_temperature generation_top_p generation_top_k "
        "generation_prompt_ratio generation_do_sample eval_causal_lm_metrics bench_dataset "
        "bench_split",
    "memory is freed as it comes": "gc_steps",
    "`dpo-dist run --chat` talks to a model": "gradio_title gradio_share gradio_server_name "
        "gradio_server_port gradio_max_new_tokens gradio_temperature",
    "the section ray says where a run runs": "use_ray ray_run_name resources_per_worker",
    "of Axolotl's own command line": "strict axolotl_config_path",
})  # fmt: skip
RENAMED: dict[str, str] = {
    "model_type": "type_of_model",
    "model_revision": "revision_of_model",
    "model_config": "overrides_of_model_config",
    "model_kwargs": "overrides_of_model_kwargs",
    "evaluation_strategy": "eval_strategy",
    "dpo_beta": "rl_beta",
    "noisy_embedding_alpha": "neftune_noise_alpha",
    "dataset_processes": "dataset_num_proc",
    "sequence_parallel_degree": "context_parallel_size",
}
# keys of earlier versions, and of plugins that come with it
FORMER: dict[str, str] = {
    "dpo_norm_loss": "objective.loss sigmoid_norm",
    "dpo_generate_during_eval": "eval.samples_every_steps",
    "dpo_use_logits_to_keep": "only completions meet the vocabulary anyway",
    "eval_table_size": "eval.samples_every_steps",
    "eval_max_new_tokens": "generate.max_new_tokens",
    "max_packed_sequence_len": "data.max_length",
    "rope_scaling": "put it into the config.json of the model's folder",
    **dict.fromkeys(("relora_steps", "relora_warmup_steps", "relora_anneal_steps"), NO_RELORA),
    "random_init_weights": "training starts from the model's weights",
    "base_model_ignore_patterns": "the files of model.path are read as they are",
    "flash_attn_fuse_qkv": shared.OWN_LAYERS,
    "debug": "docs/debugging.md",
    **dict.fromkeys(
        (
            "unsloth_cross_entropy_loss", "unsloth_lora_mlp", "unsloth_lora_qkv", "unsloth_lora_o",
            "unsloth_rms_norm", "unsloth_rope", "cut_cross_entropy", "liger_rope",
            "liger_rms_norm", "liger_layer_norm", "liger_glu_activation", "liger_cross_entropy",
            "liger_fused_linear_cross_entropy", "liger_swiglu",
        ),
        shared.OWN_LAYERS,
    ),
    **dict.fromkeys(("spectrum_top_fraction", "spectrum_model_name"), WHOLE),
}  # fmt: skip
AXOLOTL = Peer(
    "Axolotl", "Axolotl's config reference", SAME, SAME_OF_ADAPTER, CONVERTED, DIFFERS,
    NOT_NEEDED, RENAMED, FORMER,
    {
        "per_device_train_batch_size": "micro_batch_size",
        "num_train_epochs": "num_epochs",
        "lr_scheduler_type": "lr_scheduler",
        "optim": "optimizer",
    },
)  # fmt: skip
