"""The keys of TRL about what comes out: checkpoints, the best of them, logs, answers, the hub."""

import re
from typing import get_args

from dpo_dist.config.training_section import HeldOutMetric
from dpo_dist.trl_import.convert_train import put_every
from dpo_dist.trl_import.settings import OUR_DEFAULTS, Run


def convert_output(run: Run) -> None:
    """checkpoint, logging, export, and the answers of eval."""
    settings = run.settings
    if settings.get("save_strategy") != "best":
        put_every(run, "checkpoint.every_steps", "save_strategy", "save_steps")
    limit = settings.get("save_total_limit")
    if limit:
        note = "at least 2, in case the newest is damaged" if limit < 2 else ""
        run.put("checkpoint.keep", max(2, limit), settings.why("save_total_limit", note))
    _best(run)
    put_every(run, "logging.every_steps", "logging_strategy", "logging_steps")
    _reports(run)
    _answers(run)
    _hub(run)


def _best(run: Run) -> None:
    """The checkpoint that is kept for its metric, and whether it is the one that comes out."""
    settings = run.settings
    loaded = settings.get("load_best_model_at_end")
    given = settings.get("metric_for_best_model")
    if not (loaded or given or settings.get("save_strategy") == "best"):
        return
    metric = str(given or "loss")
    ours = metric if metric.startswith("eval_") else f"eval_{metric}"
    source = settings.why("metric_for_best_model")
    if settings.get("eval_strategy") == "no":
        note = f"{source}: nothing is held out; checkpoint.best_by needs evaluations"
        run.differs.append(note)
        return
    if ours not in get_args(HeldOutMetric):
        names = ", ".join(get_args(HeldOutMetric))
        run.differs.append(f"metric_for_best_model: {metric}; checkpoint.best_by is one of {names}")
        return
    greater, natural = settings.get("greater_is_better"), not ours.endswith("loss")
    if greater is not None and bool(greater) != natural:
        run.differs.append(
            f"greater_is_better: {greater}; checkpoint.best_by takes the "
            f"{'highest' if natural else 'lowest'} {ours}, so none is chosen by it"
        )
        return
    note = "export takes that checkpoint; a run trains to its end all the same" if loaded else ""
    run.put("checkpoint.best_by", ours, f"{source}; {note}" if note else source)
    if not loaded:
        why = settings.why("load_best_model_at_end", "the best is kept, the last comes out")
        run.put("export.checkpoint", "newest", why)
    saved, evaluated = (
        run.values.get(key, (OUR_DEFAULTS[key],))[0]
        for key in ("checkpoint.every_steps", "eval.every_steps")
    )
    if saved % evaluated or settings.get("save_strategy") == "best":
        why = "as often as eval.every_steps: a checkpoint needs an evaluation to be compared by"
        run.put("checkpoint.every_steps", evaluated, why)


def _reports(run: Run) -> None:
    settings = run.settings
    if not settings.given("report_to"):
        return
    value = settings.get("report_to")
    targets = value if isinstance(value, list) else [value]
    expected = "tensorboard" in targets or "all" in targets
    run.put("logging.tensorboard", expected, settings.why("report_to"))
    if "wandb" in targets:
        why = settings.why("report_to", "its project is logging.wandb_project, not WANDB_PROJECT")
        run.put("logging.wandb", True, why)
        if settings.given("run_name"):
            run.put("logging.wandb_name", str(settings.get("run_name")), "run_name")
    taken = ("tensorboard", "wandb", "none", "all")
    others = [str(name) for name in targets if name not in taken]
    if others:
        run.not_needed.append(
            f"report_to: {', '.join(others)} can read run.dir/metrics.jsonl or TensorBoard's files"
        )


def _answers(run: Run) -> None:
    settings = run.settings
    if not settings.get("generate_during_eval"):
        return
    if settings.get("eval_strategy") == "no":
        run.differs.append(
            "generate_during_eval: nothing is held out, so no prompt is there to answer"
        )
        return
    every = run.values.get("eval.every_steps", (OUR_DEFAULTS["eval.every_steps"],))[0]
    why = "generate_during_eval; eval.num_samples prompts, the policy's answers only"
    run.put("eval.samples_every_steps", every, why)


def _hub(run: Run) -> None:
    settings = run.settings
    if not settings.get("push_to_hub"):
        return
    name = settings.get("hub_model_id")
    if name is None or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        found = "without hub_model_id" if name is None else f"with hub_model_id {name}"
        run.differs.append(f"push_to_hub: {found}; set export.push_to_hub to owner/name")
        return
    run.put(
        "export.push_to_hub", name, "hub_model_id; the verified export only, never a checkpoint"
    )
    private = settings.get("hub_private_repo")
    if private is None:
        why = "not TRL's, which leaves it to the owner's default: nothing goes public by omission"
        run.put("export.hub_private", True, why)
    else:
        run.put("export.hub_private", bool(private), "hub_private_repo")
    if settings.given("hub_revision"):
        run.put("export.hub_revision", str(settings.get("hub_revision")), "hub_revision")
