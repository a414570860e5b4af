"""Generate, judge, count: against `transformers serve` with a real model."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.commands import dpo_dist
from support.ranks import wait_until

from dpo_dist.judging.comparison import parse_verdict

MODEL = os.environ.get("DPO_DIST_REAL_MODEL")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(MODEL is None, reason="DPO_DIST_REAL_MODEL is not set"),
]
QUESTIONS = {
    "What is the capital of France?": ("The capital of France is Paris.", "London."),
    "How many legs has a spider?": ("A spider has eight legs.", "I like trains."),
    "Name a color of the sky.": ("Blue.", "Four."),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path_factory.mktemp("serve") / "log").open("w")
    serving = subprocess.Popen(
        [
            str(Path(sys.executable).parent / "transformers"), "serve", str(MODEL),
            "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--device", "cpu",
        ],
        stdout=log, stderr=log, start_new_session=True, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip

    def answers() -> bool:
        assert serving.poll() is None, Path(log.name).read_text()
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
        return True

    try:
        wait_until(answers, timeout_s=240)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(serving.pid, signal.SIGKILL)
        serving.wait(30)
        log.close()


def test_a_real_server_judges(server: str, tmp_path: Path) -> None:
    for place, name in enumerate(("good", "bad")):
        rows = [
            {"question_id": number, "prompt": prompt, "answers": [replies[place]]}
            for number, (prompt, replies) in enumerate(QUESTIONS.items(), start=1)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    done = dpo_dist(
        "judge", tmp_path / "good.jsonl", tmp_path / "bad.jsonl", "--endpoint", server,
        "--judge-model", str(MODEL), "--max-tokens", "48", "--concurrency", "2",
        "--out", tmp_path / "out",
    )  # fmt: skip
    lines = [json.loads(x) for x in (tmp_path / "out" / "replies.jsonl").read_text().splitlines()]
    decided = [line for line in lines if line["decided"]]
    assert len(decided) == 2 * len(QUESTIONS), done.stderr
    assert {(line["question_id"], line["order"]) for line in decided} == {
        (number, order) for number in (1, 2, 3) for order in (1, 2)
    }
    for line in lines:
        assert line["reply"] and line["usage"]["completion_tokens"] > 0
        assert line["verdict"] == parse_verdict(line["reply"])
    by_question = {(line["question_id"], line["order"]): line["verdict"] for line in decided}
    both = [n for n in (1, 2, 3) if by_question[n, 1] and by_question[n, 2]]
    if both:
        assert done.returncode == 0, done.stderr
        result = json.loads((tmp_path / "out" / "result.json").read_text())
        assert result["all"]["n"] == len(both)
    else:  # a model this small often does not choose
        assert done.returncode == 2 and "gave no verdict in both orders" in done.stderr


def test_a_model_that_the_server_has_not(server: str, tmp_path: Path) -> None:
    row = {"question_id": 1, "prompt": "Hi", "answers": ["Hello"]}
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    files = (tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    more = ("--judge-model", "no-such-model", "--max-retries", "0", "--concurrency", "1")
    done = dpo_dist("judge", *files, "--endpoint", server, *more)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: " in done.stderr and "no-such-model" in done.stderr
