"""dpo-dist judge A.jsonl B.jsonl: a command of its own, since no run config is needed."""

import json
from pathlib import Path
from typing import Annotated

import typer

from dpo_dist.cli.rank import set_up_command


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
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Which of two answer files is better: an LLM judges every pair in both orders."""
    set_up_command()
    from dpo_dist.commands import judge as judge_stage
    from dpo_dist.judging.endpoint import Limits

    limits = Limits(concurrency, requests_per_minute, timeout_s, max_retries)
    settings = judge_stage.JudgeSettings(
        endpoint, judge_model, temperature, max_tokens, api_key_env, limits, ask_again
    )
    result = json.loads(judge_stage.run((first, second), questions, out, settings).read_text())
    if as_json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        judge_stage.print_result(result)
