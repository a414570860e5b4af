"""The keys of LlamaFactory that are more than a change of name."""

from dpo_dist.errors import ConfigError
from dpo_dist.importing.llamafactory import keys
from dpo_dist.importing.llamafactory.data import convert_data
from dpo_dist.importing.output import (
    convert_hub,
    convert_output,
    convert_reports,
    holds_out,
    put_every,
)
from dpo_dist.importing.settings import Run, names_in, number_of, target_modules
from dpo_dist.importing.training import convert_train, recompute

LOSSES = ("sigmoid", "hinge", "ipo", "orpo", "simpo")
ATTENTION = {"sdpa": "sdpa", "fa2": "flash_attn"}


def convert(run: Run) -> None:
    """Every section; raises ConfigError when it is another task, or a key is unusable."""
    settings = run.settings
    _check_task(run)
    if settings.get("output_dir") is None:
        run.put("run.dir", "trainer_output", settings.why("output_dir"))
    else:
        run.put("run.dir", settings.get("output_dir"), "output_dir")
    if settings.get("model_revision") != "main":
        run.put("model.revision", settings.get("model_revision"), "model_revision")
    run.copy(keys.SAME)
    _model(run)
    if settings.get("finetuning_type") == "lora":
        _adapter(run)
    _objective(run)
    convert_data(run)
    workers = settings.get("ray_num_workers")
    if run.num_processes is None and workers is not None:
        run.num_processes = int(workers)
    convert_train(run, rest_decays=2 / 3)
    if settings.get("use_muon"):
        run.put("train.optimizer", "muon", "use_muon")
        run.put("train.max_grad_norm", 0.0, "not LlamaFactory's: muon is not clipped here")
    _recompute(run)
    if settings.get("eval_strategy") != "no" and holds_out(run):
        put_every(run, "eval.every_steps", "eval_strategy", "eval_steps", "logging_steps")
        if settings.get("eval_on_start"):
            run.put("eval.on_start", True, "eval_on_start")
    convert_output(run)
    _early_stop(run)
    convert_reports(run)
    convert_hub(run)


def _check_task(run: Run) -> None:
    settings, stage = run.settings, run.settings.get("stage")
    if stage != "dpo":
        remedy = "Train that with LlamaFactory, and give the result to model.path here."
        if stage == "kto":
            remedy = "Labeled rows can be paired: stage=dpo behind the file, and format: labelled."
        raise ConfigError(settings.why("stage", f"{stage}").replace("; ", ": "), "stage: dpo",
                          remedy)  # fmt: skip
    if not settings.given("model_name_or_path"):
        raise ConfigError("model_name_or_path is missing", "the model that LlamaFactory trained",
                          "Put model_name_or_path=MODEL behind the file.")  # fmt: skip
    kind = settings.get("finetuning_type")
    if kind not in ("lora", "full"):
        raise ConfigError(f"finetuning_type: {kind}", "lora or full",
                          "Put finetuning_type=lora behind the file.")  # fmt: skip


def _model(run: Run) -> None:
    settings = run.settings
    if settings.get("fp16"):
        run.differs.append("fp16: true; float16 needs loss scaling, model.dtype is bfloat16")
    half = [settings.get(key) for key in ("bf16", "pure_bf16", "fp16")]
    if any(half):
        why = "the optimizer keeps float32 copies"
        run.put("model.dtype", "bfloat16", settings.why("bf16", why))
    else:
        why = "not LlamaFactory's, which takes the dtype of config.json without bf16"
        run.put("model.dtype", "bfloat16", why)
    bits, method = settings.get("quantization_bit"), settings.get("quantization_method")
    if method not in ("bnb", "bitsandbytes"):
        run.differs.append(f"quantization_method: {method}; nf4 is bitsandbytes'")
    if bits == 4:
        run.put("model.quantization", "nf4", "quantization_bit")
    elif bits is not None:
        run.differs.append(f"quantization_bit: {bits}; model.quantization is nf4, of 4 bits")
    attention = str(settings.get("flash_attn"))
    if attention in ATTENTION:
        run.put("model.attention", ATTENTION[attention], "flash_attn")
    added = [*names_in(settings.get("add_tokens") or []),
             *names_in(settings.get("add_special_tokens") or [])]  # fmt: skip
    if added:
        run.put("model.add_tokens", added, "add_tokens, add_special_tokens")


def _adapter(run: Run) -> None:
    settings = run.settings
    dropout = settings.get("lora_dropout")
    if dropout:
        why = f"lora_dropout is {dropout}, but LlamaFactory turns dropout off for preferences"
        run.put("adapter.dropout", 0.0, why)
    paths = names_in(settings.get("adapter_name_or_path") or [])
    if paths:
        run.put("adapter.path", paths[-1], "adapter_name_or_path")
        if len(paths) > 1:
            run.differs.append(
                f"adapter_name_or_path: {', '.join(paths[:-1])}; merge all but the last into "
                "model.path"
            )
        if not settings.get("create_new_adapter"):
            return  # with its own rank, alpha and targets
        run.put("adapter.start", "merge", "create_new_adapter")
    run.copy(keys.SAME_OF_ADAPTER)
    rank = settings.get("lora_rank")
    run.put("adapter.rank", rank, settings.why("lora_rank"))
    alpha = number_of(settings, "lora_alpha")
    why = settings.why("lora_alpha", "" if alpha else "twice lora_rank")
    run.put("adapter.alpha", alpha or 2.0 * rank, why)
    targets = names_in(settings.get("lora_target"))
    value = "all-linear" if targets == ["all"] else target_modules(targets)
    run.put("adapter.target_modules", value, settings.why("lora_target"))
    saved = names_in(settings.get("additional_target") or [])
    if saved:
        run.put("adapter.modules_to_save", saved, "additional_target")


def _recompute(run: Run) -> None:
    """On unless it is disabled; transformers' own keys turn it on as well."""
    settings, source = run.settings, "disable_gradient_checkpointing"
    asked = not settings.get(source)
    for key in ("gradient_checkpointing", "activation_checkpointing"):
        if settings.get(key) and not asked:
            asked, source = True, key
    recompute(run, asked, settings.why(source), number_of(settings, "moe_aux_loss_coef"))


def _objective(run: Run) -> None:
    settings, loss = run.settings, run.settings.get("pref_loss")
    if loss not in LOSSES:
        remedy = "Put pref_loss=sigmoid behind the file"
        if loss == "kto_pair":
            remedy += "; objective.loss nca_pair and bco_pair are near kto_pair"
        raise ConfigError(f"pref_loss: {loss}", f"one of {', '.join(LOSSES)}", f"{remedy}.")
    smoothing = settings.get("dpo_label_smoothing")
    if smoothing and loss == "sigmoid":
        run.put("objective.label_smoothing", smoothing, "dpo_label_smoothing")
    elif smoothing:
        run.differs.append(f"dpo_label_smoothing: {smoothing}; LlamaFactory reads it for sigmoid")
    if loss == "simpo":
        run.put("objective.simpo_gamma", settings.get("simpo_gamma"), settings.why("simpo_gamma"))
    also = settings.get("pref_ftx")
    if also:
        why = "pref_loss, pref_ftx: the likelihood of chosen, here the mean over a step's tokens"
        run.put("objective.loss", [loss, "sft"], why)
        run.put("objective.loss_weights", [1.0, also], "pref_ftx")
    else:
        run.put("objective.loss", loss, settings.why("pref_loss"))
    if settings.given("ld_alpha"):
        run.put("objective.ld_alpha", number_of(settings, "ld_alpha"), "ld_alpha")
    router = number_of(settings, "moe_aux_loss_coef")
    if router:
        run.put("objective.router_aux_loss_coef", router, "moe_aux_loss_coef")


def _early_stop(run: Run) -> None:
    patience = run.settings.get("early_stopping_steps")
    if not patience or not holds_out(run):
        return
    if "checkpoint.best_by" not in run.values:
        run.put("checkpoint.best_by", "eval_loss", "early_stopping_steps compares by it")
        why = "as often as eval.every_steps: a checkpoint needs an evaluation to be compared by"
        run.put("checkpoint.every_steps", run.value("eval.every_steps"), why)
    run.put("eval.patience", int(patience), "early_stopping_steps, which counts evaluations")
