"""dpo-dist doctor, status, report, plan and config: looks at machines, runs and settings."""

from pathlib import Path
from typing import Annotated

import typer

from dpo_dist.cli.arguments import ConfigPath, Json, OptionalConfigPath, Overrides, RunFolder
from dpo_dist.cli.output import print_json, read_result
from dpo_dist.cli.rank import run_or_launch
from dpo_dist.config.keys import explain_keys, to_yaml
from dpo_dist.config.run_config import RunConfig, load_config
from dpo_dist.errors import ArtifactError, ConfigError
from dpo_dist.run import pipeline
from dpo_dist.run.run_dir import RunDir
from dpo_dist.run.status import describe_status, is_overdue, last_word, read_status
from dpo_dist.run.topology import SINGLE_PROCESS


def doctor(
    config_path: OptionalConfigPath = None, overrides: Overrides = None, as_json: Json = False
) -> None:
    """Versions, GPUs, disk and network of this machine, before the expensive stages."""
    if config_path is None:
        from dpo_dist.stages.doctor import look, print_machine

        facts = look(Path.cwd(), SINGLE_PROCESS)
        if as_json:
            print_json(facts)
        else:
            print_machine(facts)
        return
    config = run_or_launch(pipeline.DOCTOR, config_path, overrides or [])
    result = read_result(RunDir(config.run.dir).doctor_path)
    if as_json:
        print_json(result)
    else:
        from dpo_dist.stages.doctor import print_result

        print_result(result)


def status(
    run_dir: RunFolder,
    as_json: Json = False,
    check: Annotated[
        bool, typer.Option("--check", help="Exit 1 when the run failed or is silent for too long.")
    ] = False,
) -> None:
    """Stage, step, loss, pairs/s, time left, last checkpoint and restarts of a run."""
    paths = RunDir(run_dir)
    path = paths.status_path
    if not path.is_file():
        raise ArtifactError(
            f"{path} does not exist", "the folder of a run", "Name the run.dir of a run.yaml."
        )
    values, (age, limit) = read_status(path), last_word(path, paths.heartbeat_path)
    if not values:
        raise ArtifactError(
            f"{path} is not readable", "what a stage wrote", "Start the run again: it is rewritten."
        )
    if as_json:
        print_json(values)
    else:
        for name, value in describe_status(values, age, limit):
            print(f"{name:<16} {value}")
    if check and (values.get("state") == "failed" or is_overdue(values, age, limit)):
        raise typer.Exit(1)


def report(run_dir: RunFolder) -> None:
    """One HTML page with plots: curves, samples, data, settings; at any point of a run."""
    from dpo_dist.commands.report import run

    print(run(run_dir))


def plan(
    config_path: ConfigPath,
    overrides: Overrides = None,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="Ranks of the training stage.")
    ] = None,
    gpu_memory_gib: Annotated[float | None, typer.Option(help="Memory of one GPU, GiB.")] = None,
    nodes: Annotated[
        str | None, typer.Option(help="Predict times and cost for these numbers of nodes: 1,2,4.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="With --nodes: their GPU; H100 unless given.")
    ] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="With --nodes; 8 unless given.")
    ] = None,
    link_gbit: Annotated[
        float | None,
        typer.Option(min=0.1, help="With --nodes: Gbit/s of a whole node; 3200 unless given."),
    ] = None,
    utilization: Annotated[
        float | None,
        typer.Option(
            min=0.01, max=1.0, help="With --nodes: share of a GPU's peak; 0.4 unless given."
        ),
    ] = None,
    gpu_hour: Annotated[
        float | None, typer.Option(min=0.0, help="With --nodes: the price of a GPU for an hour.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Memory, steps, tokens and disk, or how a run scales; neither weights nor GPU needed."""
    config = load_config(config_path, overrides or [])
    here = {"--world-size": world_size, "--gpu-memory-gib": gpu_memory_gib}
    there = {
        "--gpu": gpu, "--gpus-per-node": gpus_per_node, "--link-gbit": link_gbit,
        "--utilization": utilization, "--gpu-hour": gpu_hour,
    }  # fmt: skip
    _refuse_unused(nodes, here if nodes is not None else there)
    if nodes is not None:
        from dpo_dist.commands.scaling import Nodes, nodes_of, print_scaling

        asked = Nodes(
            nodes_of(nodes), gpu or "H100", gpus_per_node or 8, link_gbit or 3200.0,
            utilization or 0.4, gpu_hour,
        )  # fmt: skip
        print_scaling(config, asked, as_json)
        return
    from dpo_dist.commands.plan import print_plan

    print_plan(config, world_size, gpu_memory_gib, as_json)


def _refuse_unused(nodes: str | None, ignored: dict[str, object]) -> None:
    found = ", ".join(name for name, value in ignored.items() if value is not None)
    if not found:
        return
    if nodes is None:
        raise ConfigError(
            f"{found} without --nodes", "--nodes 1,2,4 with it", "Add it, or leave the rest out."
        )
    raise ConfigError(
        f"{found} with --nodes", "--nodes, or a run's own ranks", "Leave one of them out."
    )


def config(
    config_path: OptionalConfigPath = None,
    overrides: Overrides = None,
    schema: Annotated[bool, typer.Option("--schema", help="JSON schema for editors.")] = False,
) -> None:
    """Explain every key; with a file print it resolved."""
    if schema:
        print_json(RunConfig.model_json_schema())
    elif config_path is not None:
        print(to_yaml(load_config(config_path, overrides or [])), end="")
    else:
        for key, kind, default, description in explain_keys():
            print(f"{key}  ({kind}{', default ' + default if default else ''})\n    {description}")
