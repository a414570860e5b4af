"""Pairwise judging of two answer files.

1. Every turn of every question is a comparison, asked in both orders.
2. Each reply of the judge is appended to replies.jsonl as it comes; a comparison that has its
   verdict there is not asked again, so a run that was stopped goes on.
3. At the end all verdicts become verdicts.parquet, and the table result.json.
"""

import asyncio
import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from rich.table import Table

from dpo_dist.data.answers.answer_files import (
    Answered,
    check_same_questions,
    keep_whole_lines,
    read_answers,
)
from dpo_dist.data.answers.questions import QuestionId, read_questions
from dpo_dist.data.rows.messages import text_of
from dpo_dist.errors import ArtifactError, DPODistError, EndpointError
from dpo_dist.judging.comparison import (
    REMINDER,
    Dialogue,
    Order,
    judge_messages,
    parse_verdict,
    request_digest,
)
from dpo_dist.judging.endpoint import (
    Endpoint,
    Limits,
    RequestRefusedError,
    check_key_stays_secret,
    completions_url,
    key_from_environment,
)
from dpo_dist.judging.verdicts import result_of, write_verdicts
from dpo_dist.run.lock import alone_with
from dpo_dist.run.logs import console, progress_bar
from dpo_dist.run.manifest import write_json
from dpo_dist.run.run_dir import JudgedDir

_logger = logging.getLogger(__name__)
ASKS = 3  # for one verdict: once, and twice with a reminder
MOST_REFUSED = 5  # requests in a row: then it is not the length of one answer
ORDERS: tuple[Order, Order] = (1, 2)


@dataclass(frozen=True)
class JudgeSettings:
    """Who judges, and how it is asked."""

    endpoint: str
    judge_model: str
    temperature: float
    max_tokens: int
    api_key_env: str
    limits: Limits
    ask_failed_again: bool

    @property
    def sampling(self) -> dict[str, float | int]:
        return {"temperature": self.temperature, "max_tokens": self.max_tokens}

    @property
    def described(self) -> dict[str, Any]:
        return {"model": self.judge_model, "endpoint": self.endpoint} | self.sampling


@dataclass(frozen=True)
class Comparison:
    """One request: a turn of a question in one order; `digest` says what would change it."""

    question_id: QuestionId
    turn: int
    order: Order
    messages: list[dict[str, str]]
    digest: str


@dataclass
class Judging:
    """Comparisons being asked; what comes is appended to `stream` at once."""

    endpoint: Endpoint
    settings: JudgeSettings
    stream: TextIO
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)  # by digest: the newest reply
    refused_in_a_row: int = 0

    async def ask(self, comparison: Comparison) -> None:
        """Asks until there is a verdict, `ASKS` times at most."""
        messages: list[dict[str, str]] = comparison.messages
        for number in range(1, ASKS + 1):
            payload = {"model": self.settings.judge_model, "messages": messages}
            try:
                reply = await self.endpoint.ask(payload | self.settings.sampling)
            except RequestRefusedError as refusal:
                self.refused_in_a_row += 1
                if self.refused_in_a_row >= MOST_REFUSED:
                    raise
                self._record(comparison, number, error=str(refusal), decided=True)
                return
            self.refused_in_a_row = 0
            verdict = parse_verdict(reply.text)
            self._record(
                comparison, number, reply=reply.text, verdict=verdict,
                error=None if verdict else f"no single verdict (finish: {reply.finish_reason})",
                decided=verdict is not None or number == ASKS, model=reply.model,
                usage=dict(reply.usage), latency_s=round(reply.latency_s, 3),
            )  # fmt: skip
            if verdict is not None:
                return
            said = [{"role": "assistant", "content": reply.text}] if reply.text.strip() else []
            reminder = {"role": "user", "content": REMINDER}
            messages = [*comparison.messages, *said, reminder] if said else comparison.messages

    def _record(self, comparison: Comparison, number: int, **fields: Any) -> None:
        row = {
            "digest": comparison.digest, "question_id": comparison.question_id,
            "turn": comparison.turn, "order": comparison.order,
            "judge_model": self.settings.judge_model, "ask": number, "time": time.time(),
            "reply": None, "verdict": None, **fields,
        }  # fmt: skip
        self.rows[comparison.digest] = row
        self.stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.stream.flush()
        os.fsync(self.stream.fileno())


def run(
    files: tuple[Path, Path],
    questions_path: Path | None,
    out_dir: Path | None,
    settings: JudgeSettings,
) -> Path:
    """Judges the first file's answers against the second's; the path of result.json.

    Raises DataError when the files do not answer the same questions, EndpointError when the
    endpoint fails or no comparison got a verdict.
    """
    url, key = completions_url(settings.endpoint), key_from_environment(settings.api_key_env)
    check_key_stays_secret(url, key)
    names = _names(files)
    questions = None
    if questions_path is not None:
        questions = {question.question_id: question for question in read_questions(questions_path)}
    first, second = (read_answers(path, questions) for path in files)
    check_same_questions(files, first, second)
    comparisons = list(_comparisons(first, second, settings))
    paths = JudgedDir(out_dir or files[0].parent / f"{names[0]}-vs-{names[1]}")
    with _replies(paths) as (stream, known):
        done = {digest for digest, row in known.items() if _is_done(row, settings)}
        pending = [comparison for comparison in comparisons if comparison.digest not in done]
        _logger.info(
            "%d questions, %d turns x 2 orders = %d comparisons, %d of them judged before",
            len(first), len(comparisons) // 2, len(comparisons), len(comparisons) - len(pending),
        )  # fmt: skip
        judging = Judging(Endpoint(url, key, settings.limits), settings, stream, dict(known))
        if pending:
            paths.result_path.unlink(missing_ok=True)
            paths.verdicts_path.unlink(missing_ok=True)
            asyncio.run(_ask_all(judging, pending))
    rows = [judging.rows[comparison.digest] for comparison in comparisons]
    write_verdicts(paths.verdicts_path, rows, names)
    result = result_of(files, names, rows, settings.described)
    if result["all"]["n"] == 0:
        last = rows[-1]["reply"] or rows[-1]["error"]
        raise EndpointError(
            f"{settings.judge_model} gave no verdict in both orders of any comparison "
            f"(the last reply: {last[:200]!r})",
            "[[A]], [[B]] or [[C]] at the end of its replies",
            "Name a judge that follows instructions, or raise --max-tokens, and add --ask-again.",
        )
    write_json(paths.result_path, result)
    return paths.result_path


def _is_done(row: dict[str, Any], settings: JudgeSettings) -> bool:
    """Whether a comparison is not asked again, given its newest reply.

    A refused request is: it costs nothing, and the server may have been set right.
    """
    gave_up = row["decided"] and row["reply"] is not None and not settings.ask_failed_again
    return bool(row["verdict"] or gave_up)


async def _ask_all(judging: Judging, pending: Sequence[Comparison]) -> None:
    """Asks with as many workers as requests may be open; the first failure ends them all."""
    failures: list[DPODistError] = []
    with progress_bar("comparisons") as bar:
        task = bar.add_task("judge", total=len(pending))
        waiting = iter(pending)

        async def work() -> None:
            for comparison in waiting:
                await judging.ask(comparison)
                bar.advance(task)

        async with judging.endpoint:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(judging.settings.limits.concurrency, len(pending))):
                        group.create_task(work())
            except* DPODistError as raised:
                failures += [e for e in raised.exceptions if isinstance(e, DPODistError)]
    if failures:
        raise failures[0]


@contextlib.contextmanager
def _replies(paths: JudgedDir) -> Iterator[tuple[TextIO, dict[str, dict[str, Any]]]]:
    """The file of replies to append to, for this process alone, and what it holds by digest."""
    paths.root.mkdir(parents=True, exist_ok=True)
    replies = paths.replies_path
    with replies.open("a") as stream, alone_with(stream, replies) as alone:
        if not alone:
            raise ArtifactError(
                f"{replies} is being written by another judge",
                "one at a time",
                "Wait for it, or choose another --out.",
            )
        yield stream, {row["digest"]: row for row in keep_whole_lines(replies)}


def _names(files: tuple[Path, Path]) -> tuple[str, str]:
    """What to call the models: the files' stems, as FastChat does, where they differ."""
    first, second = (path.stem for path in files)
    return (first, second) if first != second else (f"{first}-1", f"{second}-2")


def _comparisons(
    first: dict[QuestionId, Answered],
    second: dict[QuestionId, Answered],
    settings: JudgeSettings,
) -> Iterator[Comparison]:
    for question_id, answered in first.items():
        for turn in range(1, answered.question.num_turns + 1):
            ours = _dialogue(answered, turn)
            theirs = _dialogue(second[question_id], turn)
            for order in ORDERS:
                shown = (ours, theirs) if order == 1 else (theirs, ours)
                messages = judge_messages(*shown)
                digest = request_digest(messages, settings.judge_model, settings.sampling)
                # equal answers make both orders one request, and yet two comparisons
                yield Comparison(question_id, turn, order, messages, f"{digest}-{order}")


def _dialogue(answered: Answered, turn: int) -> Dialogue:
    """The first `turn` turns as text."""
    messages = answered.question.conversation(())
    opening = text_of(messages[0])
    if len(messages) > 1:
        opening = "\n\n".join(f"[{item['role']}] {text_of(item)}" for item in messages)
    answers = tuple(text or "(no reply)" for text in answered.answers[:turn])
    return Dialogue(opening, answered.question.follow_ups[: turn - 1], answers)


def print_result(result: dict[str, Any]) -> None:
    """Shows result.json: the table, the arithmetic of its first row, and the judge's leanings."""
    columns = ("win", "loss", "tie", "win_rate", "loss_rate", "win_rate_adjusted")
    table = Table("model", *columns)
    for name, row in result["all"]["table"].items():
        counts = [str(row[column]) for column in columns[:3]]
        table.add_row(name, *counts, *(f"{row[column]:.4f}" for column in columns[3:]))
    console.print(table)
    first, *_ = result["all"]["table"]
    for line in result["all"]["arithmetic"]:
        console.print(f"{first}: {line}", highlight=False, soft_wrap=True)
    if len(result["per_turn"]) > 1:
        for turn, numbers in result["per_turn"].items():
            if numbers["n"]:
                adjusted = numbers["table"][first]["win_rate_adjusted"]
                line = f"turn {turn}: win_rate_adjusted {adjusted:.4f} of n {numbers['n']}"
                console.print(line, highlight=False)
    said = result["verdicts"]
    console.print(
        f"verdicts: {said['A']} for the answer shown first, {said['B']} for the second, "
        f"{said['C']} ties, {said['none']} none",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    if result["all"]["error"]:
        console.print(
            f"left out: {result['all']['error']} comparisons without a verdict in both orders; "
            "--ask-again asks them again", style="bold yellow", soft_wrap=True,
        )  # fmt: skip
