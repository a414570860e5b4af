"""lm-eval's tasks on the base model and on the export, one after the other.

1. The tasks are found and loaded first: a wrong name costs no model.
2. Both models run on the same rows, with the run's tokenizer and chat template.
3. harness.json holds every metric of both, and the difference.
"""

import difflib
import logging
import math
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.table import Table

from dpo_dist.config.run_config import RunConfig
from dpo_dist.engine.distributed.devices import device_of
from dpo_dist.engine.model.model_choice import choose_model, load_chosen
from dpo_dist.errors import HarnessError
from dpo_dist.extras import import_fault
from dpo_dist.inputs.scored_pairs import load_chat_tokenizer
from dpo_dist.model_files.of_run import RunModels
from dpo_dist.run.logs import console
from dpo_dist.run.manifest import write_json
from dpo_dist.run.run_dir import RunDir
from dpo_dist.run.topology import SINGLE_PROCESS

_logger = logging.getLogger(__name__)
SHOWN_NAMES = 3


def run(
    config: RunConfig,
    names: str,
    include_path: Path | None,
    limit: int | None,
    chat: bool,
    batch_size: str,
) -> Path:
    """Runs the comma-separated tasks and writes harness.json; its path.

    `batch_size` is a number of rows, or `auto` for the largest that fits. Raises HarnessError when
    lm-eval does not import, and for a task that it does not have or cannot load.
    """
    paths, base_dir = RunDir(config.run.dir), RunModels(config).base
    choices = [choose_model(which, paths, base_dir) for which in ("base", "export")]
    tasks = [name.strip() for name in names.split(",") if name.strip()]
    if not tasks:
        raise HarnessError(f"--harness {names!r}", "names of tasks", "For example arc_easy,piqa.")
    rows = _batch_size(batch_size)
    manager = _task_manager(tasks, include_path)
    results: list[dict[str, Any]] = []
    for choice in choices:
        _logger.info("%s: %s", choice.name, ", ".join(tasks))
        tokenizer = load_chat_tokenizer(config, choice.folder, choice.is_adapter, base_dir)
        model = load_chosen(choice, base_dir, config.model, device_of(SINGLE_PROCESS))
        results.append(_evaluate(model, tokenizer, tasks, manager, limit, chat, rows))
        del model  # the next one may need its memory
    base, export = results
    settings = {
        "tasks": tasks, "limit": limit, "chat_template": chat, "batch_size": rows,
        "dtype": config.model.dtype, "lm_eval": metadata.version("lm_eval"),
        "base": str(base_dir), "export": str(choices[1].folder),
    }  # fmt: skip
    write_json(paths.harness_path, settings | {"results": _compare(base, export)})
    return paths.harness_path


def _batch_size(text: str) -> int | str:
    if text != "auto" and not (text.isdecimal() and int(text) > 0):
        raise HarnessError(
            f"--batch-size {text}", "a number of rows, or auto", "For example --batch-size 8."
        )
    return text if text == "auto" else int(text)


def _task_manager(tasks: Sequence[str], include_path: Path | None) -> Any:
    """lm-eval's index of tasks, in which all of these were found and loaded once."""
    try:
        from lm_eval.tasks import TaskManager
    except Exception as error:  # its own imports are many
        fault, remedy = import_fault("lm_eval", "eval", error)
        raise HarnessError(f"lm-eval {fault}", "it, for --harness", remedy) from None
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    if include_path is not None and not include_path.is_dir():
        raise HarnessError(
            f"--include-path {include_path} is no folder", "a folder of task files", "Correct it."
        )
    manager = TaskManager(include_path=include_path and str(include_path))
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        close = difflib.get_close_matches(unknown[0], manager.all_tasks, n=SHOWN_NAMES)
        raise HarnessError(
            f"lm-eval has no task {', '.join(unknown)} (of {len(manager.all_tasks)})",
            "names of its tasks or of those in --include-path",
            f"Did you mean {', '.join(close)}?" if close else "See `lm-eval ls tasks`.",
        )
    try:
        manager.load(list(tasks))
    except Exception as error:  # a task is YAML, code and a download: anything may come
        reason = " ".join(str(error).split()) or repr(error)
        raise HarnessError(
            f"lm-eval cannot load {', '.join(tasks)} ({reason})",
            "tasks whose rows can be read",
            "Check the task file and its data, or load them once where there is a network.",
        ) from None
    return manager


def _evaluate(
    model: Any, tokenizer: Any, tasks: Sequence[str], manager: Any, limit: int | None, chat: bool,
    batch_size: int | str,
) -> dict[str, Any]:  # fmt: skip
    """lm-eval's result on one model: `results`, `n-samples`, `higher_is_better`."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    wrapped: Any = HFLM
    result: Any = simple_evaluate(
        model=wrapped(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=list(tasks), task_manager=manager, limit=limit, apply_chat_template=chat,
        log_samples=False,
    )  # fmt: skip
    assert result is not None, "lm-eval gives None on other ranks than the first only"
    return dict(result)


def _compare(base: dict[str, Any], export: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for every task and metric.

    The error of a difference is sqrt(a^2 + b^2): of two independent samples. The rows are the same
    for both models, so the true one is smaller as a rule.
    """
    rows = []
    for task, metrics in base["results"].items():
        for key, before in metrics.items():
            name, _, filtered = key.partition(",")
            if not isinstance(before, int | float) or not filtered or name.endswith("_stderr"):
                continue
            after = export["results"][task][key]
            errors = [r["results"][task].get(f"{name}_stderr,{filtered}") for r in (base, export)]
            known = all(isinstance(error, int | float) for error in errors)
            rows.append(
                {
                    "task": task,
                    "metric": name if filtered == "none" else f"{name} ({filtered})",
                    "higher_is_better": base["higher_is_better"].get(task, {}).get(name),
                    "num_rows": base["n-samples"].get(task, {}).get("effective"),
                    "base": before,
                    "export": after,
                    "difference": after - before,
                    "base_stderr": errors[0] if known else None,
                    "export_stderr": errors[1] if known else None,
                    "difference_stderr": math.hypot(*errors) if known else None,
                }
            )
    return rows


def print_result(result: dict[str, Any]) -> None:
    """Shows harness.json, a row a metric."""
    table = Table("task", "rows", "metric", "", "base", "export", "difference")
    arrows = {True: "higher is better", False: "lower is better", None: ""}
    for row in result["results"]:
        cells = [
            f"{row[name]:{'+' if name == 'difference' else ''}.4f}"
            + ("" if row[f"{name}_stderr"] is None else f" ± {row[f'{name}_stderr']:.4f}")
            for name in ("base", "export", "difference")
        ]
        better = arrows[row["higher_is_better"]]
        table.add_row(row["task"], str(row["num_rows"]), row["metric"], better, *cells)
    console.print(table)
    console.print(
        "± one standard error; of the difference sqrt(base² + export²), as if of different rows",
        style="dim", highlight=False, soft_wrap=True,
    )  # fmt: skip
