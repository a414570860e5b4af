"""Every key that a YAML for LlamaFactory's training may hold, and what becomes of it here.

The defaults are those of LlamaFactory 0.9.5, and of transformers where it leaves a key to it.
"""

from dpo_dist.importing import transformers_keys as shared
from dpo_dist.importing.settings import Keys, Left, Peer, reasons

SAME: Keys = {
    **shared.SAME,
    "model_name_or_path": ("model.path", None),
    "trust_remote_code": ("model.trust_remote_code", False),
    "pref_beta": ("objective.beta", 0.1),
    "ref_model": ("reference.model", None),
    "default_system": ("data.system_message", None),
    "preprocessing_num_workers": ("data.num_workers", None),
}
SAME_OF_ADAPTER: Keys = {
    "lora_rank": ("adapter.rank", 8),
    "use_rslora": ("adapter.use_rslora", False),
    "use_dora": ("adapter.use_dora", False),
    "lora_target_parameters": ("adapter.target_parameters", None),
}
CONVERTED: Keys = {
    "stage": ("objective.loss", "sft"),
    "model_revision": ("model.revision", "main"),
    "finetuning_type": ("adapter", "lora"),
    "lora_alpha": ("adapter.alpha", None),
    "lora_dropout": ("adapter.dropout", 0.0),
    "lora_target": ("adapter.target_modules", "all"),
    "additional_target": ("adapter.modules_to_save", None),
    "adapter_name_or_path": ("adapter.path", None),
    "create_new_adapter": ("adapter.start", False),
    "quantization_bit": ("model.quantization", None),
    "quantization_method": ("model.quantization", "bnb"),
    "add_tokens": ("model.add_tokens", None),
    "add_special_tokens": ("model.add_tokens", None),
    "pure_bf16": ("model.dtype", False),
    "flash_attn": ("model.attention", "auto"),
    "disable_gradient_checkpointing": ("train.gradient_checkpointing", False),
    "moe_aux_loss_coef": ("objective.router_aux_loss_coef", None),
    "pref_loss": ("objective.loss", "sigmoid"),
    "pref_ftx": ("objective.loss, objective.loss_weights", 0.0),
    "dpo_label_smoothing": ("objective.label_smoothing", 0.0),
    "simpo_gamma": ("objective.simpo_gamma", 0.5),
    "ld_alpha": ("objective.ld_alpha", None),
    "dataset": ("data.train", None),
    "eval_dataset": ("data.eval", None),
    "dataset_dir": ("data.train, data.eval", "data"),
    "max_samples": ("data.train", None),
    "streaming": ("data.train", False),
    "val_size": ("data.eval_fraction", 0.0),
    "cutoff_len": ("data.max_length", 2048),
    "template": ("data.chat_template", None),
    "enable_thinking": ("data.chat_template_kwargs", None),
    **shared.CONVERTED,
    "early_stopping_steps": ("eval.patience, checkpoint.best_by", None),
    "use_muon": ("train.optimizer", False),
    "ray_num_workers": ("train.global_batch_size", None),
}
OTHER_OPTIMIZER = "see train.optimizer for those that there are"
ONE_LR = "all parameters have train.learning_rate"
PREFERENCES = "the loss is one of preferences"
DIFFERS: Left = {
    **shared.DIFFERS,
    "pref_bco_weight": (0.0, "objective.loss [sigmoid, bco_pair] with objective.loss_weights"),
    "ref_model_adapters": (None, "merge them, and name the result in reference.model"),
    "ref_model_quantization_bit": (None, "the reference is read as the policy is"),
    "quantization_type": ("nf4", "the one kind of 4-bit base is nf4"),
    "double_quantization": (True, "the constants of the 4-bit base are always quantized too"),
    "fp8": (False, "model.dtype is bfloat16 or float32"),
    "rope_scaling": (None, "put it into the config.json of the model's folder"),
    "shift_attn": (False, "attention is the model's own"),
    "mixture_of_depths": (None, "layers are those of the model"),
    "train_from_scratch": (False, "training starts from the model's weights"),
    "resize_vocab": (False, "model.add_tokens adds tokens, model.pad_vocab_to_multiple pads"),
    "new_special_tokens_config": (None, "new tokens of model.add_tokens start as the mean of the "
                                  "rest"),
    "init_special_tokens": ("noise_init", "new tokens start as the mean of the rest"),
    "split_special_tokens": (False, "special tokens are whole"),
    "upcast_layernorm": (False, "norms are in model.dtype"),
    "upcast_lmhead_output": (False, "log-probs are always taken in float32"),
    "pissa_init": (False, "A is random and B is zero"),
    "loraplus_lr_ratio": (None, ONE_LR),
    "use_llama_pro": (False, "all parameters train, or an adapter"),
    "use_galore": (False, OTHER_OPTIMIZER),
    "use_apollo": (False, OTHER_OPTIMIZER),
    "use_badam": (False, OTHER_OPTIMIZER),
    "use_adam_mini": (False, OTHER_OPTIMIZER),
    "use_mca": (False, "sharding is DeepSpeed's"),
    "use_kt": (False, "all weights are on the devices; see train.deepspeed zero3_offload"),
    "use_dft_loss": (False, PREFERENCES),
    "use_asft_loss": (False, PREFERENCES),
    "use_eaft_loss": (False, PREFERENCES),
    "freeze_language_model": (False, "the language model is what is trained"),
    "disable_shuffling": (False, "each epoch is a seeded permutation"),
    "train_on_prompt": (False, "answers are scored, prompts never"),
    "mask_history": (False, "the turns behind the prompt that two dialogues share are scored"),
    "mix_strategy": ("concat", "weight and limit of a source say how many of its rows count"),
    "interleave_probs": (None, "weight and limit of a source say how many of its rows count"),
    "tool_format": (None, "tools are written by the chat template"),
    "media_dir": (None, "rows are text"),
    "tokenized_path": (None, "prepare a run once, and give its run.dir to the next stages"),
    "eval_on_each_dataset": (False, "evaluations are over all held-out pairs; `dpo-dist evaluate` "
                             "tells them apart by source"),
    "predict_with_generate": (False, "eval.samples_every_steps lets the policy answer"),
}  # fmt: skip
NOT_NEEDED: dict[str, str] = shared.NOT_NEEDED | reasons({
    "of a kind of training that is not asked for": "freeze_trainable_layers "
        "freeze_trainable_modules freeze_extra_modules module_dropout oft_rank oft_block_size "
        "oft_target kto_chosen_weight kto_rejected_weight ppo_buffer_size ppo_epochs "
        "ppo_score_norm ppo_target ppo_whiten_rewards reward_model reward_model_adapters "
        "reward_model_quantization_bit reward_model_type compute_accuracy "
        "asft_alpha eaft_alpha freeze_vision_tower freeze_multi_modal_projector",
    "of an optimizer that is not there": "galore_target galore_rank galore_update_interval "
        "galore_scale galore_proj_type galore_layerwise apollo_target apollo_rank "
        "apollo_update_interval apollo_scale apollo_proj apollo_proj_type apollo_scale_type "
        "apollo_layerwise apollo_scale_front badam_mode badam_start_block badam_switch_mode "
        "badam_switch_interval badam_update_ratio badam_mask_mode badam_verbose "
        "loraplus_lr_embedding pissa_iter pissa_convert",
    shared.WITHOUT_PADDING: "packing neat_packing ignore_pad_token_for_loss",
    shared.OWN_LAYERS: "enable_liger_kernel use_unsloth use_unsloth_gc use_v1_kernels use_kv_cache",
    shared.ONE_RECOMPUTATION: "use_reentrant_gc",
    shared.TOKENIZED_ONCE: "overwrite_cache preprocessing_batch_size buffer_size "
        "data_shared_file_system",
    "the tokenizer is the fast one": "use_fast_tokenizer",
    "weights are read one tensor at a time, to where they belong": "low_cpu_mem_usage "
        "offload_folder quantization_device_map device_map cache_dir adapter_folder "
        "print_param_status",
    "set HF_TOKEN, or log in with `hf auth login`": "hf_hub_token ms_hub_token om_hub_token",
    "rows are text": "image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches "
        "video_max_pixels video_min_pixels video_fps video_maxlen use_audio_in_video "
        "audio_sampling_rate",
    "the section export says what comes out": "export_dir export_size export_device "
        "export_quantization_bit export_quantization_dataset export_quantization_nsamples "
        "export_quantization_maxlen export_legacy_format export_hub_model_id",
    "answers during training have the section generate": "do_sample temperature top_p top_k "
        "num_beams max_length max_new_tokens repetition_penalty length_penalty "
        "skip_special_tokens eval_num_beams generation_max_length generation_num_beams "
        "generation_config sortish_sampler",
    "of an engine for inference": "infer_backend infer_dtype vllm_maxlen vllm_gpu_util "
        "vllm_enforce_eager vllm_max_lora_rank vllm_config sglang_maxlen sglang_mem_fraction "
        "sglang_tp_size sglang_config sglang_lora_backend kt_optimize_rule cpu_infer chunk_size "
        "mode kt_maxlen kt_use_cuda_graph kt_mode kt_force_think",
    "fp8 is not there": "fp8_backend fp8_enable_fsdp_float8_all_gather",
    "other trackers can read run.dir/metrics.jsonl or TensorBoard's files": "use_swanlab "
        "swanlab_project swanlab_workspace swanlab_run_name swanlab_mode swanlab_api_key "
        "swanlab_logdir swanlab_lark_webhook_url swanlab_lark_secret",
    "`dpo-dist report` has the curves": "plot_loss",
    "tokens per second are always reported": "include_effective_tokens_per_second",
    "the section ray says where a run runs": "ray_run_name ray_storage_path "
        "ray_storage_filesystem resources_per_worker placement_strategy ray_init_kwargs",
})  # fmt: skip
RENAMED: dict[str, str] = shared.RENAMED | {
    "dpo_beta": "pref_beta",
    "dpo_loss": "pref_loss",
    "dpo_ftx": "pref_ftx",
    "orpo_beta": "pref_beta",
}
FORMER: dict[str, str] = shared.FORMER | {
    "do_export": "the section export says what comes out",
    "visual_inputs": "rows are text",
    "reserved_label_len": "answers are cut, prompts are not",
}
LLAMAFACTORY = Peer(
    "LlamaFactory",
    "LlamaFactory 0.9.5's arguments, or transformers' TrainingArguments",
    SAME, SAME_OF_ADAPTER, CONVERTED, DIFFERS, NOT_NEEDED, RENAMED, FORMER,
)  # fmt: skip
