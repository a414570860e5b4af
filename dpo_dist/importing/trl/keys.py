"""Every key that a YAML for TRL's `dpo` script may hold, and what becomes of it here.

The defaults are those of TRL 1.16: a key that a YAML leaves out has them.
"""

from dpo_dist.importing import transformers_keys as shared
from dpo_dist.importing.settings import Keys, Left, Peer, reasons

SAME: Keys = {
    **shared.with_defaults(shared.SAME, learning_rate=1e-6),
    "trust_remote_code": ("model.trust_remote_code", False),
    "beta": ("objective.beta", 0.1),
    "loss_weights": ("objective.loss_weights", None),
    "f_divergence_type": ("objective.f_divergence_type", "reverse_kl"),
    "f_alpha_divergence_coef": ("objective.f_alpha_divergence_coef", 0.5),
    "use_weighting": ("objective.use_weighting", False),
    "discopop_tau": ("objective.discopop_tau", 0.05),
}
SAME_OF_ADAPTER: Keys = {
    "lora_r": ("adapter.rank", 16),
    "lora_alpha": ("adapter.alpha", 32),
    "use_rslora": ("adapter.use_rslora", False),
    "use_dora": ("adapter.use_dora", False),
    "lora_target_parameters": ("adapter.target_parameters", None),
}
CONVERTED: Keys = {
    "model_name_or_path": ("model.path", None),
    "model_revision": ("model.revision", "main"),
    "dtype": ("model.dtype", "float32"),
    "dataset_name": ("data.train", None),
    "dataset_config": ("data.train", None),
    "dataset_train_split": ("data.train", "train"),
    "dataset_test_split": ("data.eval", "test"),
    "datasets": ("data.train", []),
    "test_split_size": ("data.eval_fraction", None),
    "dataset_streaming": ("data.train", False),
    "streaming": ("data.train", False),
    "dataset_num_proc": ("data.num_workers", None),
    "max_length": ("data.max_length", 1024),
    "truncation_mode": ("data.max_length", "keep_start"),
    **shared.with_defaults(
        shared.CONVERTED, bf16=None, gradient_checkpointing=True, logging_steps=10
    ),
    "loss_type": ("objective.loss", ["sigmoid"]),
    "label_smoothing": ("objective.label_smoothing", 0.0),
    "ld_alpha": ("objective.ld_alpha", None),
    "router_aux_loss_coef": ("objective.router_aux_loss_coef", None),
    "load_in_4bit": ("model.quantization", False),
    "use_peft": ("adapter", False),
    "lora_dropout": ("adapter.dropout", 0.05),
    "disable_dropout": ("adapter.dropout", True),
    "lora_target_modules": ("adapter.target_modules", None),
    "lora_modules_to_save": ("adapter.modules_to_save", None),
    # of earlier versions, and of the alignment-handbook
    "generate_during_eval": ("eval.samples_every_steps", False),
    "dataset_mixture": ("data.train, data.eval_fraction, data.eval_seed", None),
    "dataset_mixer": ("data.train, data.eval", None),
    "dataset_splits": ("data.train, data.eval", None),
}
FORMER_CONVERTED = (
    "warmup_ratio", "generate_during_eval", "dataset_mixture", "dataset_mixer", "dataset_splits",
)  # fmt: skip
STAYS = "the reference is scored once and stays as it is"
DIFFERS: Left = {
    "load_in_8bit": (False, "there is no 8-bit base; leave it in model.dtype"),
    "bnb_4bit_quant_type": ("nf4", "the one kind of 4-bit base is nf4"),
    "lora_task_type": ("CAUSAL_LM", "preferences are trained into a causal language model only"),
    "sync_ref_model": (False, STAYS),
    "ref_model_mixup_alpha": (0.6, STAYS),
    "ref_model_sync_steps": (512, STAYS),
    "model_init_kwargs": (None, "see the keys of the section model"),
    "pad_token": (None, "set it in the tokenizer's own folder, and name that in model.path"),
    **shared.DIFFERS,
}
NOT_NEEDED: dict[str, str] = reasons({
    "the reference is always scored beforehand, in a stage of its own":
        "precompute_ref_log_probs precompute_ref_batch_size",
    shared.WITHOUT_PADDING: "padding_free pad_to_multiple_of",
    "attention: model.attention auto takes the fastest kernel that the model allows":
        "attn_implementation",
    shared.OWN_LAYERS: "activation_offloading",
    "ranks talk through DeepSpeed": "ignore_bias_buffers",
    "4-bit weights are stored as ZeRO needs them": "bnb_4bit_quant_storage",
    "the constants of the 4-bit base are always quantized too": "use_bnb_nested_quant",
}) | shared.NOT_NEEDED  # fmt: skip
RENAMED: dict[str, str] = shared.RENAMED | {
    "torch_dtype": "dtype",
    "preprocessing_num_workers": "dataset_num_proc",
}
# keys of earlier versions, or of scripts around TRL
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
    "hub_model_revision": "export.hub_revision names the branch to push to",
    "env": "export these variables in the shell, or in slurm/site.env",
    **shared.FORMER,
}
TRL = Peer(
    "TRL",
    "TRL 1.16's DPOConfig, ModelConfig, ScriptArguments or DatasetMixtureConfig",
    SAME, SAME_OF_ADAPTER, CONVERTED, DIFFERS, NOT_NEEDED, RENAMED, FORMER,
)  # fmt: skip
