"""dpo-dist STAGE run.yaml [section.key=value ...]: the command line, without torch at start."""

import json
import sys
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from dpo_dist import __version__
from dpo_dist.cli.judge import judge
from dpo_dist.cli.rank import launch, print_error, run_or_launch, set_up_command
from dpo_dist.config.keys import explain_keys, override_names, to_yaml
from dpo_dist.config.run_config import RunConfig, load_config
from dpo_dist.errors import ArtifactError, ConfigError, DPODistError, as_disk_error
from dpo_dist.run import pipeline
from dpo_dist.run.manifest import write_atomic
from dpo_dist.run.run_dir import RunDir
from dpo_dist.run.status import describe_status, read_status
from dpo_dist.run.topology import SINGLE_PROCESS, launched

app = typer.Typer(
    no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False,
    help="Multi-node DPO: prepare, reference, train, export, verify.",
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip

ConfigPath = Annotated[Path, typer.Argument(help="The run config.", metavar="RUN.YAML")]


def _complete_override(incomplete: str) -> list[str]:
    return [name for name in override_names() if name.startswith(incomplete)]


Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="section.key=value", metavar="[SECTION.KEY=VALUE]...",
        autocompletion=_complete_override,
    ),
]  # fmt: skip
AnswerFormat = StrEnum("AnswerFormat", ["jsonl", "fastchat"])
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _print_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        # eager: answered before a missing command is complained about
        typer.Option("--version", callback=_print_version, is_eager=True, help="The version."),
    ] = False,
) -> None:
    pass


@app.command()
def run(
    config_path: ConfigPath,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be done, and its cost.")
    ] = False,
) -> None:
    """Run all stages on this machine; what is current is skipped."""
    config = load_config(config_path, overrides or [])
    if dry_run:
        from dpo_dist.commands import plan as plan_stage

        plan_stage.print_dry_run(config, config_path, overrides or [])
        return
    for stage in pipeline.stages_of(config):
        code = launch(stage, config, config_path, overrides or [])
        if code:
            raise typer.Exit(code)


@app.command()
def sweep(
    config_path: ConfigPath,
    overrides: Overrides = None,
    train_only: Annotated[
        bool, typer.Option("--train-only", help="End each point after training: no export.")
    ] = False,
    table: Annotated[bool, typer.Option("--table", help="Only show what there is so far.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the commands.")] = False,
    slurm: Annotated[bool, typer.Option("--slurm", help="Submit it as an array of jobs.")] = False,
    ray: Annotated[bool, typer.Option("--ray", help="Submit each point as a Ray job.")] = False,
    at_once: Annotated[
        int | None, typer.Option(min=1, help="Points at the same time, on a cluster.")
    ] = None,
) -> None:
    """A run for every combination of values such as objective.beta=0.05,0.1; one reference pass."""
    from dpo_dist.cli import sweep as sweep_here
    from dpo_dist.sweeps.points import plan_sweep

    if slurm or ray:
        flags = {"--train-only": train_only, "--dry-run": dry_run, f"--at-once={at_once}": at_once}
        given_flags = [flag for flag, given in flags.items() if given]
        launcher = "slurm_sweep" if slurm else "ray_sweep"
        code = sweep_here.hand_over(launcher, [str(config_path), *(overrides or []), *given_flags])
        raise typer.Exit(code)
    planned = plan_sweep(config_path, overrides or [], train_only=train_only)
    if dry_run:
        sweep_here.print_commands(planned, config_path)
    elif code := (
        sweep_here.show_sweep(planned) if table else sweep_here.run_sweep(planned, config_path)
    ):
        raise typer.Exit(code)


def _stage_command(stage: pipeline.Stage) -> None:
    def command(config_path: ConfigPath, overrides: Overrides = None) -> None:
        run_or_launch(stage, config_path, overrides or [])

    command.__doc__ = f"{stage.purpose[0].upper()}{stage.purpose[1:]}."
    app.command(stage.name)(command)


for _stage in pipeline.STAGES:
    if _stage.name not in ("prepare", "reference"):
        _stage_command(_stage)


@app.command()
def prepare(
    config_path: ConfigPath,
    overrides: Overrides = None,
    preview: Annotated[
        int, typer.Option(help="Show this many rendered pairs and write nothing.")
    ] = 0,
) -> None:
    """Preference rows -> tokenized pairs."""
    if preview:
        from dpo_dist.stages import prepare as prepare_stage

        prepare_stage.preview(load_config(config_path, overrides or []), preview)
        return
    run_or_launch(pipeline.STAGES[0], config_path, overrides or [])


@app.command()
def reference(
    config_path: ConfigPath,
    overrides: Overrides = None,
    status: Annotated[bool, typer.Option("--status", help="Show the store's coverage.")] = False,
) -> None:
    """Pairs -> reference log-probs."""
    if status:
        from dpo_dist.stages import reference as reference_stage

        _print_json(reference_stage.status(load_config(config_path, overrides or [])))
        return
    run_or_launch(pipeline.STAGES[1], config_path, overrides or [])


@app.command()
def push(
    config_path: ConfigPath,
    overrides: Overrides = None,
    what: Annotated[
        str | None, typer.Option(help="full, merged or adapter, as export.hub_folder.")
    ] = None,
) -> None:
    """Verified export -> the Hugging Face Hub (export.push_to_hub)."""
    chosen = [f"export.hub_folder={what}"] if what else []
    run_or_launch(pipeline.PUSH, config_path, [*(overrides or []), *chosen])


@app.command()
def evaluate(
    config_path: ConfigPath,
    overrides: Overrides = None,
    harness: Annotated[
        str | None, typer.Option(metavar="TASKS", help="Run these lm-eval tasks: a,b,c.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="With --harness: a folder of own task files.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="With --harness: rows of each task.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="With --harness: apply the chat template.")
    ] = False,
    batch_size: Annotated[str, typer.Option(help="With --harness: rows at a time, or auto.")] = "8",
    as_json: Json = False,
) -> None:
    """Held-out accuracy and margin, per source, before and after; or lm-eval's tasks."""
    if harness is None:
        config = run_or_launch(pipeline.EVALUATE, config_path, overrides or [])
        _show_result(config, "evaluate", RunDir(config.run.dir).evaluate_path, as_json)
        return
    config = load_config(config_path, overrides or [])
    set_up_command()
    from dpo_dist.commands import harness as harness_stage

    harness_stage.run(config, harness, include_path, limit, chat, batch_size)
    _show_result(config, "harness", RunDir(config.run.dir).harness_path, as_json)


@app.command()
def generate(
    config_path: ConfigPath,
    overrides: Overrides = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Answer this file's prompts: .txt, or JSON rows.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Talk to the model.")] = False,
    model: Annotated[
        str,
        typer.Option(help="With these two: base, export, merged, full, adapter, or a path."),
    ] = "export",
    form: Annotated[
        AnswerFormat, typer.Option("--format", help="With --prompts: of the answer file.")
    ] = AnswerFormat.jsonl,
    out: Annotated[
        Path | None, typer.Option(help="With --prompts: the answer file; its stem is model_id.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Answers of base and export side by side, to a file of prompts, or in a chat."""
    if prompts is None and not chat:
        config = run_or_launch(pipeline.GENERATE, config_path, overrides or [])
        _show_result(config, "generate", RunDir(config.run.dir).generate_path, as_json)
        return
    config = load_config(config_path, overrides or [])
    set_up_command()
    if prompts is None:
        import_module("dpo_dist.commands.chat").run(config, model)
    else:
        print(import_module("dpo_dist.commands.answers").run(config, prompts, model, form, out))


app.command("judge")(judge)


@app.command()
def doctor(
    config_path: Annotated[Path | None, typer.Argument(metavar="[RUN.YAML]")] = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Versions, GPUs, disk and network of this machine, before the expensive stages."""
    if config_path is None:
        from dpo_dist.stages import doctor as doctor_stage

        facts = doctor_stage.look(Path.cwd(), SINGLE_PROCESS)
        if as_json:
            _print_json(facts)
        else:
            doctor_stage.print_machine(facts)
        return
    config = run_or_launch(pipeline.DOCTOR, config_path, overrides or [])
    _show_result(config, "doctor", RunDir(config.run.dir).doctor_path, as_json)


@app.command()
def status(
    run_dir: Annotated[Path, typer.Argument(help="The run folder.", metavar="RUN_DIR")],
    as_json: Json = False,
) -> None:
    """Stage, step, loss, pairs/s, time left, last checkpoint and restarts of a run."""
    path = RunDir(run_dir).status_path
    if not path.is_file():
        raise ArtifactError(
            f"{path} does not exist", "the folder of a run", "Name the run.dir of a run.yaml."
        )
    values = read_status(path)
    if as_json:
        _print_json(values)
    else:
        for name, value in describe_status(values):
            print(f"{name:<16} {value}")


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="The run folder.", metavar="RUN_DIR")],
) -> None:
    """One HTML page with plots: curves, samples, data, settings; at any point of a run."""
    from dpo_dist.commands import report as report_stage

    print(report_stage.run(run_dir))


@app.command("plan")
def plan_command(
    config_path: ConfigPath,
    overrides: Overrides = None,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="Ranks of the training stage.")
    ] = None,
    gpu_memory_gib: Annotated[float | None, typer.Option(help="Memory of one GPU, GiB.")] = None,
    as_json: Json = False,
) -> None:
    """Memory, steps, tokens and disk; neither weights nor GPU needed."""
    from dpo_dist.commands import plan as plan_stage

    config = load_config(config_path, overrides or [])
    plan_stage.print_plan(config, world_size, gpu_memory_gib, as_json)


@app.command("config")
def config_command(
    config_path: Annotated[Path | None, typer.Argument(metavar="[RUN.YAML]")] = None,
    overrides: Overrides = None,
    schema: Annotated[bool, typer.Option("--schema", help="JSON schema for editors.")] = False,
) -> None:
    """Explain every key; with a file print it resolved."""
    if schema:
        _print_json(RunConfig.model_json_schema())
    elif config_path is not None:
        print(to_yaml(load_config(config_path, overrides or [])), end="")
    else:
        for key, kind, default, description in explain_keys():
            print(f"{key}  ({kind}{', default ' + default if default else ''})\n    {description}")


@app.command("import-trl")
def import_trl_command(
    path: Annotated[Path, typer.Argument(help="A YAML for TRL's dpo script.", metavar="TRL.YAML")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Keys of TRL.", metavar="[KEY=VALUE]...")
    ] = None,
    num_processes: Annotated[
        int | None, typer.Option(min=1, help="GPUs of the TRL run; its batch depends on them.")
    ] = None,
    accelerate_config: Annotated[
        Path | None, typer.Option(help="Accelerate's YAML: processes, ZeRO stage.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write here; printed by default.")] = None,
) -> None:
    """TRL's DPOConfig YAML -> run.yaml; every key taken, or listed with what to do instead."""
    from dpo_dist.trl_import.run_yaml import import_trl

    if out is not None and out.exists():
        raise ConfigError(f"{out} exists", "a new file", "Name another, or remove it.")
    imported = import_trl(path, overrides or [], num_processes, accelerate_config)
    if out is None:
        print(imported.text, end="")
    else:
        write_atomic(out, imported.text)
    for line in (imported.arithmetic, *(f"not taken: {note}" for note in imported.differs)):
        print(line, file=sys.stderr)


def _show_result(config: RunConfig, stage: str, path: Path, as_json: bool) -> None:
    if launched():
        return
    result = json.loads(path.read_text())
    if as_json:
        _print_json(result)
    else:
        import_module(f"dpo_dist.stages.{stage}").print_result(result)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def main() -> None:
    """Entry point: an error of the user is one message and exit code 2, never a traceback."""
    try:
        app()
    except DPODistError as error:
        print_error(error)
        sys.exit(error.exit_code)
    except (OSError, BaseExceptionGroup) as error:
        disk = as_disk_error(error)
        if disk is None:
            raise
        print_error(disk)
        sys.exit(disk.exit_code)
