"""Judging against a real server on this machine: tables, failures, and going on after them."""

import email.utils
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from support.faults.limits import limited
from support.ranks import ROOT, wait_until
from support.servers.local_judge import Answer, LocalJudge, Request, serve

from dpo_dist.commands import judge as stage
from dpo_dist.errors import ArtifactError, DataError, DPODistError, EndpointError, as_disk_error
from dpo_dist.judging.endpoint import (
    Limits,
    check_key_stays_secret,
    completions_url,
    key_from_environment,
    retry_after_s,
)

KEY = "sk-local-0123456789abcdef"
NUM_QUESTIONS = 6
LIMITS = Limits(2, None, 5.0, 2, first_wait_s=0.01)


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return write_answers(tmp_path / "ours.jsonl", 10), write_answers(tmp_path / "base.jsonl", 20)


def write_answers(path: Path, first: int, count: int = NUM_QUESTIONS) -> Path:
    """Answers that are numbers, so that a judge can be a rule."""
    rows = [
        {"question_id": n, "prompt": f"question {n}", "answers": [f"value {first + n}"]}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def shown(request: Request) -> tuple[int, int]:
    """The numbers that assistants A and B said."""
    a, b = re.findall(r"value (\d+)", request.asked)
    return int(a), int(b)


def larger_is_better(request: Request, _: int) -> Answer:
    a, b = shown(request)
    return Answer("It is larger. [[A]]" if a > b else "It is larger. [[B]]")


def judge(
    files: tuple[Path, Path], url: str, out: Path, *, again: bool = False,
    limits: Limits = LIMITS, questions: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    settings = stage.JudgeSettings(url, "local", 0.0, 64, "OPENAI_API_KEY", limits, again)
    return json.loads(stage.run(files, questions, out, settings).read_text())


def replies(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "replies.jsonl").read_text().splitlines()]


def test_the_better_answers_win_in_both_orders(files: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with serve(larger_is_better) as server:
        result = judge(files, server.url, out)
    assert len(server.requests) == 2 * NUM_QUESTIONS
    assert {request.path for request in server.requests} == {"/v1/chat/completions"}
    assert all("authorization" not in map(str.lower, r.headers) for r in server.requests)
    table = result["all"]["table"]
    assert table["base"] == {
        "win": 6, "loss": 0, "tie": 0, "win_rate": 1.0, "loss_rate": 0.0, "win_rate_adjusted": 1.0,
    }  # fmt: skip
    assert table["ours"]["loss"] == 6 and table["ours"]["win_rate_adjusted"] == 0.0
    verdicts = pq.read_table(out / "verdicts.parquet").to_pylist()
    assert len(verdicts) == 12 and {row["winner"] for row in verdicts} == {"base"}
    for row in verdicts:
        assert row["shown_as_a"] == ("ours", "base")[row["order"] - 1]
        assert row["verdict"] == ("B", "A")[row["order"] - 1]
        assert row["reply"].startswith("It is larger.") and row["num_asks"] == 1


def test_a_judge_that_takes_the_first_makes_ties(files: tuple[Path, Path], tmp_path: Path) -> None:
    with serve(lambda *_: Answer("[[A]]")) as server:
        result = judge(files, server.url, tmp_path / "out")
    numbers = result["all"]
    assert numbers["changed"] == numbers["table"]["ours"]["tie"] == 6
    assert numbers["table"]["ours"]["win_rate_adjusted"] == 0.5
    assert result["verdicts"] == {"A": 12, "B": 0, "C": 0, "none": 0}


def test_nothing_is_asked_twice(files: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with serve(larger_is_better) as server:
        first = judge(files, server.url, out)
        with (out / "replies.jsonl").open("a") as stream:
            stream.write('{"digest": "cut sho')  # a kill in the middle of a write
        assert judge(files, server.url, out) == first and len(server.requests) == 12
        write_answers(files[0], 11)  # other answers are other comparisons
        judge(files, server.url, out)
        assert len(server.requests) == 24
        judge(files, server.url, out)
    assert len(server.requests) == 24 and len(replies(out)) == 24


def test_429_is_waited_out_as_long_as_asked_for(files: tuple[Path, Path], tmp_path: Path) -> None:
    def rate_limited(request: Request, number: int) -> Answer:
        if number == 3:
            return Answer(status=429, body="slow down", headers={"Retry-After": "1"})
        return Answer(status=503) if number == 5 else larger_is_better(request, number)

    with serve(rate_limited) as server:
        result = judge(files, server.url, tmp_path / "out", limits=replace(LIMITS, concurrency=1))
    assert result["all"]["table"]["base"]["win"] == 6
    assert len(server.requests) == 14
    assert server.requests[3].at - server.requests[2].at >= 1.0
    assert server.requests[3].payload == server.requests[2].payload


FAILURES: dict[str, tuple[Answer, str, int]] = {
    "garbage": (Answer(body="<html>hello</html>"), "answered with no chat completion (<html>", 3),
    "no choices": (Answer(body='{"choices": []}'), "answered with no chat completion", 3),
    "a list": (Answer(body="[1]"), "answered with no chat completion ([1])", 3),
    "500": (Answer(status=500, body="oh no"), "answered 500 (oh no), 3 times", 3),
    "429": (
        Answer(status=429, body="busy", headers={"Retry-After": "0"}),
        "answered 429 (busy)",
        3,
    ),
    "wait an hour": (Answer(status=429, headers={"Retry-After": "3600"}), "to wait 3600 s", 1),
    "401": (Answer(status=401, body="who are you"), "answered 401 (who are you)", 1),
    "404": (Answer(status=404), "answered 404 (an empty body)", 1),
    "redirect": (Answer(status=307, headers={"Location": "http://x/"}), "answered 307", 1),
    "hangs": (Answer("[[A]]", wait_s=3.0), "did not answer within 0.3 s, 3 times", 3),
}


@pytest.mark.parametrize("name", FAILURES)
def test_what_was_judged_before_a_failure_is_kept(
    name: str, files: tuple[Path, Path], tmp_path: Path
) -> None:
    failure, found, num_tries = FAILURES[name]
    out, done = tmp_path / "out", 4

    def fails_later(request: Request, number: int) -> Answer:
        return larger_is_better(request, number) if number <= done else failure

    limits = replace(LIMITS, concurrency=1, timeout_s=0.3 if name == "hangs" else 5.0)
    with serve(fails_later) as server:
        with pytest.raises(EndpointError) as caught:
            judge(files, server.url, out, limits=limits)
        assert found in caught.value.found and caught.value.found.startswith(server.url)
        assert len(server.requests) == done + num_tries
        assert len(replies(out)) == done
        assert not (out / "verdicts.parquet").exists() and not (out / "result.json").exists()
        server.answer = larger_is_better
        result = judge(files, server.url, out)
    assert result["all"]["table"]["base"]["win"] == 6
    assert len(server.requests) == done + num_tries + 12 - done
    assert sorted(path.name for path in out.iterdir()) == [
        "replies.jsonl", "result.json", "verdicts.parquet",
    ]  # fmt: skip


def test_no_server_at_all(files: tuple[Path, Path], tmp_path: Path) -> None:
    with serve(larger_is_better) as server:
        pass
    with pytest.raises(EndpointError) as caught:
        judge(files, server.url, tmp_path / "out")
    assert f"{server.url}/chat/completions cannot be asked (" in caught.value.found
    assert caught.value.remedy == (
        "Check the server, lower --concurrency or --requests-per-minute, and start the same "
        "command again: what was judged is kept."
    )


def test_a_judge_that_refuses_to_choose(files: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with serve(lambda *_: Answer("Both have their merits.")) as server:
        with pytest.raises(EndpointError) as caught:
            judge(files, server.url, out)
        assert str(caught.value) == (
            "local gave no verdict in both orders of any comparison (the last reply: 'Both have "
            "their merits.'); expected [[A]], [[B]] or [[C]] at the end of its replies. Name "
            "a judge "
            "that follows instructions, or raise --max-tokens, and add --ask-again."
        )
        assert len(server.requests) == len(replies(out)) == 12 * stage.ASKS
        assert not (out / "result.json").exists()
        assert pq.read_table(out / "verdicts.parquet")["winner"].to_pylist() == ["error"] * 12
        with pytest.raises(EndpointError):
            judge(files, server.url, out)
        assert len(server.requests) == 12 * stage.ASKS, "refusals are asked again when told to"
        server.answer = larger_is_better
        assert judge(files, server.url, out, again=True)["all"]["n"] == 6


def test_a_reminder_helps_and_refusals_are_no_ties(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    def reluctant(request: Request, number: int) -> Answer:
        if min(shown(request)) == 10:
            return Answer("I cannot say.")
        reminded = request.payload["messages"][-1]["content"] == stage.REMINDER
        return larger_is_better(request, number) if reminded else Answer("Hard to say.")

    with serve(reluctant) as server:
        result = judge(files, server.url, tmp_path / "out")
    assert result["all"]["error"] == 1 and result["all"]["n"] == 5
    assert result["all"]["table"]["base"]["win"] == 5
    assert len(server.requests) == 2 * 3 + 10 * 2
    reminded = server.requests[-1].payload["messages"]
    assert [m["role"] for m in reminded] == ["system", "user", "assistant", "user"]


def test_one_answer_that_is_too_long(files: tuple[Path, Path], tmp_path: Path) -> None:
    def picky(request: Request, number: int) -> Answer:
        if min(shown(request)) == 12:
            return Answer(status=400, body="context length exceeded")
        return larger_is_better(request, number)

    with serve(picky) as server:
        result = judge(files, server.url, tmp_path / "out")
        assert result["all"]["error"] == 1 and result["all"]["n"] == 5
        server.answer = lambda *_: Answer(status=400, body="no such model")
        with pytest.raises(EndpointError, match="answered 400 \\(no such model\\)"):
            # one at a time: another would reach the server after the first has failed
            judge(files, server.url, tmp_path / "other", limits=replace(LIMITS, concurrency=1))
        num_requests, server.answer = len(server.requests), larger_is_better
        assert judge(files, server.url, tmp_path / "out")["all"]["n"] == 6
        assert len(server.requests) == num_requests + 2
    errors = [row["error"] for row in replies(tmp_path / "out") if row["verdict"] is None]
    assert len(errors) == 2 and all("context length exceeded" in error for error in errors)


def test_the_rate_and_the_number_of_open_requests(files: tuple[Path, Path], tmp_path: Path) -> None:
    def slow(request: Request, number: int) -> Answer:
        return replace(larger_is_better(request, number), wait_s=0.15)

    with serve(slow) as server:
        judge(files, server.url, tmp_path / "a", limits=replace(LIMITS, concurrency=3))
        assert server.most_open == 3
        server.requests.clear()
        limits = replace(LIMITS, concurrency=12, requests_per_minute=1200)
        judge(files, server.url, tmp_path / "b", limits=limits)
    times = [request.at for request in server.requests]
    assert times[-1] - times[0] >= 11 * 60 / 1200 * 0.9


def test_turns_of_fastchat_files_are_judged_apart(tmp_path: Path) -> None:
    questions = tmp_path / "question.jsonl"
    questions.write_text('{"question_id": 81, "category": "x", "turns": ["first?", "second?"]}\n')
    files = []
    for name, turns in (("m1", ["value 1", "value 9"]), ("m2", ["value 5", "value 2"])):
        row = {"question_id": 81, "answer_id": "x", "model_id": name, "tstamp": 1.0}
        row["choices"] = [{"index": 0, "turns": turns}]
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text(json.dumps(row) + "\n")

    def by_last(request: Request, _: int) -> Answer:
        values = [int(value) for value in re.findall(r"value (\d+)", request.asked)]
        a, b = values[len(values) // 2 - 1], values[-1]
        return Answer("[[A]]" if a > b else "[[B]]")

    pair = (files[0], files[1])
    with serve(by_last) as server:
        result = judge(pair, server.url, tmp_path / "out", questions=questions)
        assert "second?" in server.requests[-1].asked
        with pytest.raises(DataError, match="Add --questions question.jsonl."):
            judge(pair, server.url, tmp_path / "out")
    assert result["all"]["n"] == 2 and result["all"]["num_questions"] == 1
    assert result["per_turn"]["1"]["table"]["m2"]["win"] == 1
    assert result["per_turn"]["2"]["table"]["m1"]["win"] == 1


def test_files_of_different_questions(files: tuple[Path, Path], tmp_path: Path) -> None:
    write_answers(files[1], 20, NUM_QUESTIONS - 2)
    with pytest.raises(DataError) as caught:
        judge(files, "http://127.0.0.1:9/v1", tmp_path / "out")
    assert str(caught.value) == (
        f"{files[1]} has no answer to 2 questions of the other file (4, 5); expected answers "
        "to the "
        "same questions. Generate both from the same prompts."
    )
    write_answers(files[1], 20)
    files[1].write_text(files[1].read_text().replace("question 3", "question three"))
    with pytest.raises(DataError, match="name different questions 3"):
        judge(files, "http://127.0.0.1:9/v1", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_at_a_time_are_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    out, refused = tmp_path / "out", list[str]()

    def second_one(request: Request, number: int) -> Answer:
        if number == 1:
            try:
                judge(files, server.url, out)
            except ArtifactError as error:
                refused.append(str(error))
        return larger_is_better(request, number)

    with serve(second_one) as server:
        assert judge(files, server.url, out, limits=replace(LIMITS, concurrency=1))["all"]["n"] == 6
    assert refused == [
        f"{out / 'replies.jsonl'} is being written by another judge; expected one at a time. Wait "
        "for it, or choose another --out."
    ]


@pytest.mark.parametrize(
    ("endpoint", "found"),
    [
        ("localhost:8000", "--endpoint localhost:8000"),
        ("ftp://x/v1", "--endpoint ftp://x/v1"),
        ("https://user:secret@x/v1", "--endpoint on x carries a user, password or query"),
        ("https://x/v1?api-key=secret", "--endpoint on x carries a user, password or query"),
    ],
)
def test_endpoints_that_are_none(endpoint: str, found: str) -> None:
    with pytest.raises(EndpointError) as caught:
        completions_url(endpoint)
    assert caught.value.found == found and "secret" not in str(caught.value)


def test_truth_17_a_key_leaves_the_machine_encrypted_only(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with pytest.raises(EndpointError) as caught:
        judge(files, "http://gpu-node:8000/v1", tmp_path / "out")
    assert str(caught.value) == (
        "--endpoint http://gpu-node:8000/v1/chat/completions would send the API key in clear text "
        "to gpu-node; expected https, or this machine. Use https, reach the server as localhost "
        'through a tunnel (ssh -L), or send no key: --api-key-env "".'
    )
    assert key_from_environment("") is None
    for url, key in (
        ("http://gpu-node:8000/v1", None), ("https://gpu-node/v1", "sk-secret"),
        ("http://localhost:8000/v1", "sk-secret"), ("http://127.0.0.2/v1", "sk-secret"),
        ("http://[::1]:8000/v1", "sk-secret"),
    ):  # fmt: skip
        check_key_stays_secret(url, key)
    for host in ("10.0.0.7", "localhost.example.org", "[fe80::1]", "0.0.0.0"):
        with pytest.raises(EndpointError, match="in clear text"):
            check_key_stays_secret(f"http://{host}/v1", "sk-secret")


def test_endpoints_with_and_without_the_last_part() -> None:
    expected = "https://x/v1/chat/completions"
    assert completions_url("https://x/v1") == completions_url("https://x/v1/") == expected
    assert completions_url(expected) == expected


def test_retry_after() -> None:
    assert retry_after_s("12") == 12.0
    at = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert retry_after_s(at) == pytest.approx(30, abs=2)
    assert [retry_after_s(value) for value in (None, "soon", "nan", "-1")] == [None] * 4


def run_command(
    files: tuple[Path, Path], server: LocalJudge, out: Path, *more: str
) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "dpo_dist", "judge", *map(str, files), "--endpoint", server.url,
        "--judge-model", "local", "--out", str(out), *more,
    ]  # fmt: skip
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OPENAI_API_KEY": KEY, "COLUMNS": "200"}, start_new_session=True,
        # what a shell starts in the background ignores it, with all its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


@pytest.mark.fault(28, "a judge that sends the key back", becomes="in no file and no message")
@pytest.mark.parametrize("status", [200, 401, 400, 500])
def test_the_key_is_in_no_file_and_no_message(
    status: int, files: tuple[Path, Path], tmp_path: Path
) -> None:
    """The server gives back the headers it got, as a text and as an error."""

    def echoing(request: Request, number: int) -> Answer:
        said = f"you sent {request.headers}"
        return Answer(f"{said} [[A]]") if status == 200 else Answer(status=status, body=said)

    with serve(echoing) as server:
        running = run_command(files, server, tmp_path / "out", "--max-retries", "0")
        said = "".join(running.communicate(timeout=60))
    assert server.requests[0].headers["Authorization"] == f"Bearer {KEY}"
    assert running.returncode == (0 if status == 200 else 2), said
    assert KEY not in said and "Traceback" not in said
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == {200: 5, 401: 3, 400: 3, 500: 3}[status]
    for path in written:
        assert KEY.encode() not in path.read_bytes(), path
    if status == 200:
        assert "Bearer [key]" in replies(tmp_path / "out")[0]["reply"]
    else:
        assert "Bearer [key]" in said


def test_a_disk_that_fills_up(files: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with serve(larger_is_better) as server:
        with (
            limited(resource.RLIMIT_FSIZE, 1500),
            pytest.raises((OSError, BaseExceptionGroup)) as full,
        ):
            judge(files, server.url, out)
        assert "File too large; expected a writable disk" in str(as_disk_error(full.value))
        kept = (out / "replies.jsonl").read_bytes()
        judge(files, server.url, out)
        assert 0 < kept.count(b"\n") < len(replies(out)) == 12
        assert (out / "replies.jsonl").read_bytes().startswith(kept[: kept.rindex(b"\n")])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill", "ctrl-c"])
def test_an_interrupted_judge_goes_on(
    number: signal.Signals, files: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def stuck_after_five(request: Request, count: int) -> Answer:
        return replace(larger_is_better(request, count), wait_s=120.0 if count > 5 else 0.0)

    with serve(stuck_after_five) as server:
        running = run_command(files, server, out, "--concurrency", "1")
        wait_until(lambda: len(server.requests) == 6, timeout_s=120)
        os.killpg(running.pid, number)
        running.communicate(timeout=60)
        assert running.returncode != 0
        assert [path.name for path in out.iterdir()] == ["replies.jsonl"]
        assert len(replies(out)) == 5
        server.answer = larger_is_better
        running = run_command(files, server, out)
        _, shown_table = running.communicate(timeout=120)
    assert running.returncode == 0, shown_table
    assert len(server.requests) == 6 + 7
    assert "12 comparisons, 5 of them judged before" in shown_table
    assert "win_rate_adjusted = (win 0 + 0.5 x tie 0) / n 6 = 0.0000" in shown_table


def test_every_error_is_one_line(files: tuple[Path, Path], tmp_path: Path) -> None:
    asks: list[Callable[[], object]] = [
        lambda: judge((tmp_path / "no.jsonl", files[1]), "http://x/v1", tmp_path / "out"),
        lambda: judge(files, "http://127.0.0.1:9/v1", tmp_path / "out"),
    ]
    for ask in asks:
        with pytest.raises(DPODistError) as caught:
            ask()
        assert "\n" not in str(caught.value)
