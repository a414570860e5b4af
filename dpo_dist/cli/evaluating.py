"""dpo-dist evaluate, generate and judge: how good the export is."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from dpo_dist.cli.arguments import ConfigPath, Json, Overrides
from dpo_dist.cli.output import print_json, read_result
from dpo_dist.cli.rank import run_or_launch, set_up_command
from dpo_dist.config.run_config import load_config
from dpo_dist.run import pipeline
from dpo_dist.run.run_dir import RunDir


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
    if harness is not None:
        config = load_config(config_path, overrides or [])
        set_up_command()
        from dpo_dist.commands import harness as command

        result = read_result(command.run(config, harness, include_path, limit, chat, batch_size))
        if as_json:
            print_json(result)
        else:
            command.print_result(result)
        return
    config = run_or_launch(pipeline.EVALUATE, config_path, overrides or [])
    result = read_result(RunDir(config.run.dir).evaluate_path)
    if as_json:
        print_json(result)
    else:
        from dpo_dist.stages.evaluate import print_result

        print_result(result)


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
        Literal["jsonl", "fastchat"],
        typer.Option("--format", help="With --prompts: of the answer file."),
    ] = "jsonl",
    out: Annotated[
        Path | None, typer.Option(help="With --prompts: the answer file; its stem is model_id.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Answers of base and export side by side, to a file of prompts, or in a chat."""
    if prompts is not None:
        config = load_config(config_path, overrides or [])
        set_up_command()
        from dpo_dist.commands import answers

        print(answers.run(config, prompts, model, form, out))
        return
    if chat:
        config = load_config(config_path, overrides or [])
        set_up_command()
        from dpo_dist.commands.chat import run

        run(config, model)
        return
    config = run_or_launch(pipeline.GENERATE, config_path, overrides or [])
    result = read_result(RunDir(config.run.dir).generate_path)
    if as_json:
        print_json(result)
    else:
        from dpo_dist.stages.generate import print_result

        print_result(result)


def judge(
    first: Annotated[Path, typer.Argument(help="Answers to be judged.", metavar="A.JSONL")],
    second: Annotated[Path, typer.Argument(help="Answers to beat.", metavar="B.JSONL")],
    endpoint: Annotated[
        str, typer.Option(help="An OpenAI-compatible API, such as http://localhost:8000/v1.")
    ],
    judge_model: Annotated[str, typer.Option(help="The judge, as the endpoint calls it.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of replies, verdicts and the table.")
    ] = None,
    questions: Annotated[
        Path | None, typer.Option(help="The questions, for answers in FastChat's format.")
    ] = None,
    api_key_env: Annotated[
        str, typer.Option(help="The environment variable that holds the API key.")
    ] = "OPENAI_API_KEY",
    concurrency: Annotated[int, typer.Option(min=1, help="Requests open at a time.")] = 4,
    requests_per_minute: Annotated[
        float | None, typer.Option(min=0.001, help="At most so many; no limit by default.")
    ] = None,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="Seconds a reply may take.")] = 120,
    max_retries: Annotated[
        int, typer.Option(min=0, help="Tries after 429, 5xx, a timeout or garbage.")
    ] = 6,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest reply, tokens.")] = 1024,
    temperature: Annotated[float, typer.Option(min=0, help="Of the judge.")] = 0.0,
    ask_again: Annotated[
        bool, typer.Option("--ask-again", help="Ask again where an earlier run got no verdict.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Which of two answer files is better: an LLM judges every pair in both orders."""
    set_up_command()
    from dpo_dist.commands import judge as command
    from dpo_dist.judging.endpoint import Limits

    limits = Limits(concurrency, requests_per_minute, timeout_s, max_retries)
    settings = command.JudgeSettings(
        endpoint, judge_model, temperature, max_tokens, api_key_env, limits, ask_again
    )
    result = read_result(command.run((first, second), questions, out, settings))
    if as_json:
        print_json(result)
    else:
        command.print_result(result)
