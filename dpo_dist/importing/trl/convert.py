"""The keys of TRL about model, adapter, loss and data that are more than a change of name."""

from collections.abc import Sequence
from typing import Any

from dpo_dist.config.objective_section import SMOOTHED
from dpo_dist.errors import ConfigError
from dpo_dist.importing.output import (
    convert_hub,
    convert_output,
    convert_reports,
    put_every,
)
from dpo_dist.importing.settings import Run, target_modules
from dpo_dist.importing.training import convert_train, recompute
from dpo_dist.importing.trl import keys
from dpo_dist.importing.trl.handbook import convert_handbook

# PEFT's own choice for llama, mistral, mixtral, gemma, gemma2, qwen2, qwen3, opt and more
TARGETS_OF_PEFT = ["q_proj", "v_proj"]
SMOOTHED_IN_TRL = ("robust", "exo_pair", "aot", "aot_unpaired")


def convert(run: Run) -> None:
    """Every section; raises ConfigError when a key is missing or unusable."""
    _model(run)
    _data(run)
    convert_train(run)
    _recompute(run)
    convert_output(run)
    convert_reports(run)
    _answers(run)
    convert_hub(run)


def _model(run: Run) -> None:
    """run, model, adapter and objective."""
    settings = run.settings
    path, output = settings.get("model_name_or_path"), settings.get("output_dir")
    if path is None:
        raise ConfigError(
            "model_name_or_path is missing",
            "the model that TRL trained",
            "Put model_name_or_path=MODEL behind the file.",
        )
    run.put("run.dir", output or "trainer_output", settings.why("output_dir"))
    run.put("model.path", path, settings.why("model_name_or_path"))
    revision = settings.get("model_revision")
    if revision != "main":
        run.put("model.revision", revision, settings.why("model_revision"))
    run.copy(keys.SAME)
    _precision(run)
    _adapter(run)
    _objective(run)


def _precision(run: Run) -> None:
    settings = run.settings
    half, dtype = settings.get("fp16"), str(settings.get("dtype"))
    mixed = settings.get("bf16") if settings.given("bf16") else not half
    if half:
        run.differs.append("fp16: true; float16 needs loss scaling, model.dtype is bfloat16")
    if dtype.endswith("float16") and not dtype.endswith("bfloat16"):
        run.differs.append(f"dtype: {dtype}; model.dtype is bfloat16")
    if mixed or half or not dtype.endswith("float32"):
        why = settings.why("bf16", "the optimizer keeps float32 copies")
        run.put("model.dtype", "bfloat16", why)
    else:
        run.put("model.dtype", "float32", "bf16 is false")


def _adapter(run: Run) -> None:
    settings = run.settings
    if settings.get("load_in_4bit"):
        run.put("model.quantization", "nf4", settings.why("load_in_4bit"))
    if not settings.get("use_peft"):
        return
    run.copy(keys.SAME_OF_ADAPTER)
    # the scale depends on both, so they are always shown
    run.put("adapter.rank", settings.get("lora_r"), settings.why("lora_r"))
    run.put("adapter.alpha", settings.get("lora_alpha"), settings.why("lora_alpha"))
    dropout = settings.get("lora_dropout")
    if settings.get("disable_dropout"):
        why = f"lora_dropout is {dropout}, but TRL's disable_dropout is true, LoRA's included"
        run.put("adapter.dropout", 0.0, why)
    else:
        run.put("adapter.dropout", dropout, settings.why("lora_dropout"))
    targets = settings.get("lora_target_modules")
    if targets is None:
        why = "PEFT's own choice for llama, mistral, gemma and qwen; correct it for other models"
        run.put("adapter.target_modules", TARGETS_OF_PEFT, why)
    else:
        value = target_modules(targets)
        run.put("adapter.target_modules", value, settings.why("lora_target_modules"))
    saved = settings.get("lora_modules_to_save")
    if saved:
        names = [saved] if isinstance(saved, str) else list(saved)
        run.put("adapter.modules_to_save", names, settings.why("lora_modules_to_save"))


def _objective(run: Run) -> None:
    settings = run.settings
    losses = settings.get("loss_type")
    names = [losses] if isinstance(losses, str) else list(losses)
    value = names[0] if len(names) == 1 else names
    run.put("objective.loss", value, settings.why("loss_type"))
    if settings.given("ld_alpha"):  # null in TRL is no such term
        run.put("objective.ld_alpha", settings.get("ld_alpha"), settings.why("ld_alpha"))
    _router(run)
    _smoothing(run, names)


def _router(run: Run) -> None:
    """TRL's null is the coefficient in the model's own config.json, which is not read here."""
    settings, key = run.settings, "router_aux_loss_coef"
    if settings.given(key):
        run.put(f"objective.{key}", settings.get(key), settings.why(key))
        return
    note = "of a mixture of experts TRL takes the one in its config.json: put that here"
    run.put(f"objective.{key}", 0.0, settings.why(key, note))


def _smoothing(run: Run, names: Sequence[str]) -> None:
    """Copied where TRL reads it; a loss that only we smooth is told."""
    settings = run.settings
    smoothing = settings.get("label_smoothing")
    if not smoothing:
        return
    ours_only = [name for name in names if name in SMOOTHED and name not in SMOOTHED_IN_TRL]
    if not set(names) & set(SMOOTHED_IN_TRL):
        run.differs.append(
            f"label_smoothing: {smoothing}; TRL reads it for {', '.join(SMOOTHED_IN_TRL)} only, so "
            "it did nothing; objective.label_smoothing makes sigmoid conservative DPO"
        )
        return
    run.put("objective.label_smoothing", smoothing, settings.why("label_smoothing"))
    if ours_only:
        run.differs.append(
            f"label_smoothing: {smoothing}; objective.label_smoothing smooths "
            f"{', '.join(ours_only)} too, TRL does not; there is no key for one loss of several"
        )


def _data(run: Run) -> None:
    """data and eval."""
    settings = run.settings
    mixture, name = settings.get("datasets"), settings.get("dataset_name")
    handbook = settings.given("dataset_mixture") or settings.given("dataset_mixer")
    if not mixture and name is None and not handbook:
        raise ConfigError(
            "neither dataset_name nor datasets is there",
            "the preference rows that TRL read",
            "Put dataset_name=NAME behind the file.",
        )
    evaluated = settings.get("eval_strategy") != "no"
    if handbook:
        convert_handbook(run, evaluated)
    elif mixture:
        sources = _mixture(run, mixture)
        if settings.get("streaming"):
            sources = [source | {"streaming": True} for source in sources]
        run.put("data.train", sources, "datasets")
        share = settings.get("test_split_size")
        if share and evaluated:
            why = settings.why("test_split_size", "held out by prompt, not by row")
            run.put("data.eval_fraction", share, why)
    else:
        config = settings.get("dataset_config")
        train, test = settings.get("dataset_train_split"), settings.get("dataset_test_split")
        name = str(name)
        streamed = {"streaming": True} if settings.get("dataset_streaming") else {}
        source = _source(name, config, train) | streamed
        run.put("data.train", [source], "dataset_name, dataset_train_split")
        if evaluated:
            source = _source(name, config, test) | streamed
            run.put("data.eval", [source], "dataset_name, dataset_test_split")
    if evaluated:
        put_every(run, "eval.every_steps", "eval_strategy", "eval_steps", "logging_steps")
        if settings.get("eval_on_start"):
            run.put("eval.on_start", True, "eval_on_start")
    longest = settings.get("max_length")
    if "max_length" in settings.values and settings.values["max_length"] is None:
        note = "max_length: null; nothing is cut in TRL, data.max_length auto cuts the longest 1 %"
        run.differs.append(note)
    else:
        why = settings.why("max_length", "the ends of answers are cut, prompts are not")
        run.put("data.max_length", longest, why)
    if settings.get("truncation_mode") != "keep_start":
        run.differs.append("truncation_mode: keep_end; answers are cut at their end")
    if settings.given("dataset_num_proc"):
        workers = settings.get("dataset_num_proc")
        run.put("data.num_workers", workers, settings.why("dataset_num_proc"))


def _recompute(run: Run) -> None:
    settings, source = run.settings, "gradient_checkpointing"
    if settings.given("activation_checkpointing"):
        source = "activation_checkpointing"
    asked, router_coef = bool(settings.get(source)), settings.get("router_aux_loss_coef")
    recompute(run, asked, settings.why(source), router_coef)


def _answers(run: Run) -> None:
    settings = run.settings
    if not settings.get("generate_during_eval"):
        return
    if settings.get("eval_strategy") == "no":
        run.differs.append(
            "generate_during_eval: nothing is held out, so no prompt is there to answer"
        )
        return
    why = "generate_during_eval; eval.num_samples prompts, the policy's answers only"
    run.put("eval.samples_every_steps", run.value("eval.every_steps"), why)


def _source(path: str, config: str | None, split: str) -> dict[str, Any]:
    return {"path": path} | ({"config": config} if config else {}) | {"split": split}


def _mixture(run: Run, mixture: Any) -> list[dict[str, Any]]:
    known = ("path", "name", "data_dir", "data_files", "split", "columns", "fraction")
    if not isinstance(mixture, list) or not all(isinstance(entry, dict) for entry in mixture):
        raise ConfigError(
            f"datasets: {mixture!r}", f"a list of mappings of {', '.join(known)}", "Correct it."
        )
    sources: list[dict[str, Any]] = []
    for number, entry in enumerate(mixture):
        unknown = [key for key in entry if key not in known]
        if unknown or "path" not in entry:
            found = f"datasets.{number}: {', '.join(unknown) or 'no path'}"
            raise ConfigError(found, f"a path, and of {', '.join(known)}", "Correct the YAML.")
        files = entry.get("data_files")
        if isinstance(files, str) and entry["path"] in ("json", "csv", "parquet"):
            sources.append(_source(files, None, entry.get("split") or "train"))
        else:
            split = entry.get("split") or "train"
            sources.append(_source(entry["path"], entry.get("name"), split))
            for key in ("data_dir", "data_files"):
                if entry.get(key):
                    run.differs.append(
                        f"datasets.{number}.{key}: {entry[key]}; a source is a file, a folder or a "
                        f"hub id: name the file in data.train[{number}].path"
                    )
        if entry.get("fraction") is not None and len(mixture) > 1:
            run.differs.append(
                f"datasets.{number}.fraction: {entry['fraction']}; TRL's share of the mixture, "
                f"while data.train[{number}].weight is the share of the source's own rows"
            )
    return sources
