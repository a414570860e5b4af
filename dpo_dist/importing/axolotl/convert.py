"""The keys of Axolotl that are more than a change of name."""

from typing import Any, cast

from dpo_dist.config.objective_section import SMOOTHED
from dpo_dist.errors import ConfigError
from dpo_dist.importing.axolotl import keys
from dpo_dist.importing.axolotl.data import convert_data
from dpo_dist.importing.output import convert_output, holds_out, put_every, put_hub, put_times_a_run
from dpo_dist.importing.settings import Run, number_of, target_modules, wrong
from dpo_dist.importing.training import convert_train, recompute

TASKS = ("dpo", "ipo", "simpo", "orpo")


def convert(run: Run) -> None:
    """Every section; raises ConfigError when it is another task, or a key is unusable."""
    _check_task(run)
    settings = run.settings
    run.put("run.dir", settings.get("output_dir"), settings.why("output_dir"))
    run.copy(keys.SAME)
    _precision(run)
    _adapter(run)
    _objective(run)
    convert_data(run)
    _batch(run)
    convert_train(run)
    _warmup(run)
    why = settings.why("gradient_checkpointing")
    recompute(run, bool(settings.get("gradient_checkpointing")), why, None)
    _evaluations(run)
    convert_output(run)
    _times_an_epoch(run, "checkpoint.every_steps", "saves_per_epoch")
    _early_stop(run)
    _logging(run)
    if settings.given("hub_model_id"):
        put_hub(run, "hub_model_id", True)


def _check_task(run: Run) -> None:
    task = run.settings.get("rl")
    if task in TASKS:
        for key in ("base_model", "learning_rate"):
            if not run.settings.given(key):
                raise ConfigError(f"{key} is missing", "it, as Axolotl does",
                                  f"Put {key}=VALUE behind the file.")  # fmt: skip
        return
    if task is None:
        raise ConfigError(
            "there is no rl: the file is of supervised fine-tuning",
            f"rl: {', '.join(TASKS)}",
            "Train that with Axolotl, and give the result to model.path here.",
        )
    remedy = "Train that with Axolotl."
    if task == "kto":
        remedy = "Labeled rows can be paired: rl=dpo behind the file, and format: labelled here."
    raise ConfigError(f"rl: {task}", f"one of {', '.join(TASKS)}", remedy)


def _precision(run: Run) -> None:
    settings = run.settings
    for key in ("fp16", "float16"):
        if settings.get(key):
            run.differs.append(f"{key}: true; float16 needs loss scaling, model.dtype is bfloat16")
    half = [settings.get(key) for key in ("bf16", "bfloat16", "fp16", "float16")]
    if settings.get("float32") or not any(half):
        why = settings.why("float32" if settings.given("float32") else "bf16")
        run.put("model.dtype", "float32", why)
    else:
        why = settings.why("bf16", "the optimizer keeps float32 copies")
        run.put("model.dtype", "bfloat16", why)
    if settings.get("tokens"):
        run.put("model.add_tokens", list(settings.get("tokens")), "tokens")


def _adapter(run: Run) -> None:
    settings, kind = run.settings, run.settings.get("adapter")
    if settings.get("load_in_4bit"):
        run.put("model.quantization", "nf4", settings.why("load_in_4bit"))
    if kind is None:
        return
    if kind not in ("lora", "qlora"):
        raise ConfigError(f"adapter: {kind}", "lora or qlora", "Change it, or leave it out.")
    dropout = settings.get("lora_dropout")
    if dropout:
        why = f"lora_dropout is {dropout}, but TRL's disable_dropout is true, LoRA's included"
        run.put("adapter.dropout", 0.0, why)
    if settings.given("lora_model_dir"):
        why = "lora_model_dir; its rank, alpha and targets are its own"
        run.put("adapter.path", settings.get("lora_model_dir"), why)
        return
    for key in ("lora_r", "lora_alpha"):
        if not settings.given(key):
            raise ConfigError(f"adapter: {kind} without {key}", "lora_r and lora_alpha",
                              f"Put {key}=NUMBER behind the file.")  # fmt: skip
    run.copy(keys.SAME_OF_ADAPTER)
    parameters = settings.get("lora_target_parameters")
    if parameters:
        names = [parameters] if isinstance(parameters, str) else list(parameters)
        run.put("adapter.target_parameters", names, "lora_target_parameters")
    _targets(run)
    saved = settings.get("lora_modules_to_save")
    if saved:
        run.put("adapter.modules_to_save", list(saved), "lora_modules_to_save")


def _targets(run: Run) -> None:
    settings, ours = run.settings, "adapter.target_modules"
    targets = settings.get("lora_target_modules")
    if settings.get("lora_target_linear"):
        run.put(ours, "all-linear", "lora_target_linear")
    elif targets:
        run.put(ours, target_modules(targets), settings.why("lora_target_modules"))
    elif not run.value("adapter.target_parameters"):
        why = "PEFT's own choice for llama, mistral, gemma and qwen; correct it for other models"
        run.put(ours, ["q_proj", "v_proj"], why)


def _objective(run: Run) -> None:
    settings, task = run.settings, run.settings.get("rl")
    nested = cast("dict[str, Any]", settings.get("trl") or {})
    others = [f"trl.{key}" for key in nested if key != "beta"]
    if others:
        run.differs.append(f"{', '.join(others)}: of another task than preferences")
    if nested.get("beta") is not None:
        run.put("objective.beta", float(nested["beta"]), "trl.beta")
    elif settings.given("rl_beta") or not settings.given("orpo_alpha"):
        run.put("objective.beta", settings.get("rl_beta"), settings.why("rl_beta"))
    else:
        run.put("objective.beta", number_of(settings, "orpo_alpha"), "orpo_alpha")
    losses: list[str] = ["sigmoid" if task == "dpo" else task]
    weights: list[float] | None = None
    why = f"rl: {task}"
    if task == "dpo" and settings.given("dpo_loss_type"):
        named = settings.get("dpo_loss_type")
        losses, why = [named] if isinstance(named, str) else list(named), "dpo_loss_type"
        weights = settings.get("dpo_loss_weights")
    if task == "simpo":
        run.put("objective.simpo_gamma", settings.get("simpo_gamma"), settings.why("simpo_gamma"))
        also = settings.get("cpo_alpha")
        why = settings.why("cpo_alpha", "the weight of the likelihood of chosen beside simpo")
    else:
        also = number_of(settings, "rpo_alpha")
        why = "rpo_alpha, the weight of the likelihood of chosen" if also else why
    if also:
        losses, weights = [*losses, "sft"], [*(weights or [1.0] * len(losses)), float(also)]
    run.put("objective.loss", losses[0] if len(losses) == 1 else losses, why)
    if weights:
        run.put("objective.loss_weights", weights, why)
    _smoothing(run, losses)


def _smoothing(run: Run, losses: list[str]) -> None:
    smoothing, key = run.settings.get("dpo_label_smoothing"), "dpo_label_smoothing"
    if smoothing and {*losses} & {*SMOOTHED}:
        why = f"{key}; of some versions of TRL, sigmoid does not read it"
        run.put("objective.label_smoothing", smoothing, why)
    elif smoothing:
        run.differs.append(f"{key}: {smoothing}; {', '.join(losses)} does not read it")


def _batch(run: Run) -> None:
    """Axolotl's batch_size is what a device sees before an optimizer step."""
    settings = run.settings
    if settings.given("batch_size") and not settings.given("gradient_accumulation_steps"):
        each, total = settings.get("micro_batch_size"), int(settings.get("batch_size"))
        if total % each:
            raise wrong("batch_size", total, f"a multiple of micro_batch_size {each}")
        settings.values["gradient_accumulation_steps"] = total // each
    workers = settings.get("ray_num_workers")
    if run.num_processes is None and workers is not None:
        run.num_processes = int(workers)


def _warmup(run: Run) -> None:
    settings, ours = run.settings, "train.warmup_ratio"
    if not settings.given("warmup_steps") and not settings.given("warmup_ratio"):
        why = "Axolotl's default: 3 % of the steps, at most 100"
        run.put(ours, settings.get("warmup_ratio"), why)
    lowest = number_of(settings, "cosine_min_lr_ratio")
    if lowest and run.value("train.lr_schedule") == "cosine":
        run.put("train.min_lr_rate", lowest, "cosine_min_lr_ratio")


def _evaluations(run: Run) -> None:
    if holds_out(run):
        put_every(run, "eval.every_steps", "eval_strategy", "eval_steps")
        _times_an_epoch(run, "eval.every_steps", "evals_per_epoch")
        if run.settings.get("generate_samples"):
            every = run.value("eval.every_steps")
            run.put("eval.samples_every_steps", every, "generate_samples")


def _times_an_epoch(run: Run, ours: str, key: str) -> None:
    times = number_of(run.settings, key)
    if times:
        epochs = run.settings.get("num_epochs")
        put_times_a_run(run, ours, times * epochs, f"{key} {times:g} x num_epochs {epochs:g}")


def _early_stop(run: Run) -> None:
    patience = run.settings.get("early_stopping_patience")
    if not patience or not holds_out(run):
        return
    if "checkpoint.best_by" not in run.values:
        run.put("checkpoint.best_by", "eval_loss", "early_stopping_patience compares by it")
        why = "as often as eval.every_steps: a checkpoint needs an evaluation to be compared by"
        run.put("checkpoint.every_steps", run.value("eval.every_steps"), why)
    run.put("eval.patience", int(patience), "early_stopping_patience")


def _logging(run: Run) -> None:
    settings = run.settings
    run.put("logging.tensorboard", settings.get("use_tensorboard"), settings.why("use_tensorboard"))
    project = settings.get("wandb_project")
    if settings.get("use_wandb") or (project and settings.get("use_wandb") is None):
        run.put("logging.wandb", True, "wandb_project" if project else "use_wandb")
        if project:
            run.put("logging.wandb_project", str(project), "wandb_project")
        if settings.given("wandb_name"):
            run.put("logging.wandb_name", str(settings.get("wandb_name")), "wandb_name")
