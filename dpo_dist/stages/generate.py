"""Answers of the policy as it started and of the export to held-out prompts, side by side.

On one rank, which holds the whole model; in partitions training answers, with
`eval.samples_every_steps`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from dpo_dist.config.run_config import RunConfig
from dpo_dist.data.pairs import open_pairs
from dpo_dist.data.tokens.templates import load_tokenizer, resolve_template
from dpo_dist.engine.distributed.devices import device_of
from dpo_dist.engine.forward.generation import Answer, Sampling, answer
from dpo_dist.engine.model.model_choice import choose_model, load_chosen
from dpo_dist.engine.model.policy import PolicyParts, load_policy
from dpo_dist.errors import DataError
from dpo_dist.inputs.scored_pairs import distinct_prompts
from dpo_dist.model_files.of_run import RunModels
from dpo_dist.run.logs import console
from dpo_dist.run.manifest import write_json
from dpo_dist.run.run_dir import RunDir
from dpo_dist.run.topology import from_environment
from dpo_dist.watch.heartbeat import during


@during("generate")
def run(config: RunConfig) -> Path:
    """Answers the first `generate.num_prompts` distinct held-out prompts; writes generate.json."""
    paths, settings = RunDir(config.run.dir), config.generate
    pairs = open_pairs(paths.pairs_dir, "eval")
    if not len(pairs):
        raise DataError(
            f"{paths.pairs_dir} has no held-out pairs",
            "prompts to answer",
            "Set data.eval or data.eval_fraction and prepare the pairs in another run.dir.",
        )
    prompts = distinct_prompts(pairs, settings.num_prompts)
    device = device_of(from_environment())
    models = RunModels(config)
    base_dir = models.base
    template = resolve_template(config.data.chat_template)
    tokenizer = load_tokenizer(base_dir, template, config.model.trust_remote_code)
    export = choose_model("export", paths, base_dir)
    model = export.section(config.model)  # both in full precision where the export is
    start = PolicyParts(base_dir, model, models.start_section, models.start_adapter)

    def answered_by(load: Callable[[], Any]) -> list[Answer]:
        torch.manual_seed(config.run.seed)
        sampling = Sampling.of(settings)
        return answer(load(), tokenizer, prompts, sampling, batch_size=settings.batch_size)

    # one after the other, so that only one of them is in memory
    before = answered_by(lambda: load_policy(start, device).eval())
    after = answered_by(lambda: load_chosen(export, base_dir, config.model, device))
    rows = [
        {"prompt": tokenizer.decode(ids), "before": first.text, "after": last.text}
        for ids, first, last in zip(prompts, before, after, strict=True)
    ]
    write_json(paths.generate_path, {"answers": rows} | settings.model_dump(mode="json"))
    return paths.generate_path


def print_result(result: dict[str, Any]) -> None:
    """Shows generate.json, a row a prompt."""
    table = Table("prompt", "before", "after", show_lines=True)
    for row in result["answers"]:
        table.add_row(*(row[key].strip() for key in ("prompt", "before", "after")))
    console.print(table)
