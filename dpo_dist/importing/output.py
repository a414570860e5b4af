"""Checkpoints, the best of them, evaluations, logs, the hub, under transformers' names."""

import re
from typing import get_args

from dpo_dist.config.training_section import HeldOutMetric
from dpo_dist.importing.settings import Run

AT_THE_END = {
    "checkpoint.every_steps": "a run always ends with a checkpoint, and saves to resume from",
    "eval.every_steps": "held-out pairs are always scored at the end",
    "logging.every_steps": "every step is logged, which costs nothing",
}


def convert_output(run: Run) -> None:
    """checkpoint and logging, but for where the metrics go."""
    settings = run.settings
    if settings.get("save_strategy") != "best":
        put_every(run, "checkpoint.every_steps", "save_strategy", "save_steps")
    limit = settings.get("save_total_limit")
    if limit:
        note = "at least 2, in case the newest is damaged" if limit < 2 else ""
        run.put("checkpoint.keep", max(2, limit), settings.why("save_total_limit", note))
    _best(run)
    put_every(run, "logging.every_steps", "logging_strategy", "logging_steps")


def put_every(run: Run, ours: str, strategy_key: str, *names: str) -> None:
    """Steps between two checkpoints, evaluations or lines, or their share of all steps."""
    settings = run.settings
    strategy = settings.get(strategy_key)
    if not any(settings.given(name) for name in (strategy_key, *names)):
        return  # how often is no matter of the numbers
    key = next((name for name in names if settings.given(name)), names[-1])
    steps = settings.get(key)
    if strategy == "epoch":
        put_times_a_run(run, ours, settings.get("num_train_epochs"), f"{strategy_key} epoch")
    elif strategy == "no":
        run.not_needed.append(f"{strategy_key}: no: {AT_THE_END[ours]}")
    elif strategy not in ("steps", None):
        run.differs.append(f"{strategy_key}: {strategy}; {ours} counts steps, or is a share of all")
    elif steps:
        steps = float(steps)
        why = settings.why(key) if steps >= 1 else f"{key}, as a share of all steps"
        run.put(ours, round(steps) if steps >= 1 else steps, why)


def put_times_a_run(run: Run, ours: str, times: float, source: str) -> None:
    """An interval of which a run has so many; the end counts anyway."""
    if run.value("train.max_steps") is not None:
        run.differs.append(f"{source}: set {ours}, which counts steps, or is a share of all")
    elif times > 1:
        run.put(ours, 1 / times, f"{source}: {times:g} times a run")
    else:
        run.not_needed.append(f"{source}: {AT_THE_END[ours]}")


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
    if not holds_out(run):
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
    saved, evaluated = run.value("checkpoint.every_steps"), run.value("eval.every_steps")
    shares = isinstance(saved, float) or isinstance(evaluated, float)
    apart = saved != evaluated if shares else saved % evaluated > 0
    if apart or settings.get("save_strategy") == "best":
        why = "as often as eval.every_steps: a checkpoint needs an evaluation to be compared by"
        run.put("checkpoint.every_steps", evaluated, why)


def holds_out(run: Run) -> bool:
    """Whether there will be held-out pairs."""
    return bool(run.value("data.eval_fraction")) or "data.eval" in run.values


def convert_reports(run: Run) -> None:
    """logging.tensorboard and wandb, from report_to and run_name."""
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


def convert_hub(run: Run) -> None:
    """export.push_to_hub and its kin, where push_to_hub is set."""
    if run.settings.get("push_to_hub"):
        put_hub(run, "push_to_hub", run.settings.get("hub_private_repo"))


def put_hub(run: Run, source: str, private: bool | None) -> None:
    """Pushes to hub_model_id, which must name its owner."""
    settings = run.settings
    name = settings.get("hub_model_id")
    if name is None or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        found = "without hub_model_id" if name is None else f"with hub_model_id {name}"
        run.differs.append(
            f"{source}: {found}; set export.push_to_hub to OWNER/{name or 'NAME'}, where OWNER is "
            f"your account or organization ({settings.peer.name} takes the account of the token)"
        )
        return
    run.put(
        "export.push_to_hub", name, "hub_model_id; the verified export only, never a checkpoint"
    )
    if private is None:
        why = (
            f"not {settings.peer.name}'s, which leaves it to the owner's default: nothing goes "
            "public by omission"
        )
        run.put("export.hub_private", True, why)
    else:
        run.put("export.hub_private", bool(private), "hub_private_repo")
    if settings.given("hub_revision"):
        run.put("export.hub_revision", str(settings.get("hub_revision")), "hub_revision")
