"""A small real HTTP server that answers chat completions as a test says."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Answer:
    """What the server sends: a completion's text, or a raw body with a status."""

    text: str | None = None
    status: int = 200
    body: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    wait_s: float = 0.0


@dataclass
class Request:
    """What the server got, and when."""

    path: str
    headers: dict[str, str]
    payload: dict[str, Any]
    at: float

    @property
    def asked(self) -> str:
        return self.payload["messages"][1]["content"]


class LocalJudge:
    """The server's address and the requests it got; `answer` may be exchanged at any time."""

    def __init__(self, answer: Callable[[Request, int], Answer]) -> None:
        self.answer, self.requests = answer, list[Request]()
        self.most_open = self.num_open = 0
        self.lock = threading.Lock()
        self.url = ""

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        raw = handler.rfile.read(int(handler.headers["content-length"]))
        request = Request(handler.path, dict(handler.headers), json.loads(raw), time.monotonic())
        with self.lock:
            self.requests.append(request)
            number = len(self.requests)
            self.num_open += 1
            self.most_open = max(self.most_open, self.num_open)
        answer = self.answer(request, number)
        time.sleep(answer.wait_s)
        with self.lock:
            self.num_open -= 1
        body = answer.body if answer.text is None else completion(answer.text)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            handler.send_response(answer.status)
            for name, value in answer.headers.items():
                handler.send_header(name, value)
            handler.send_header("Content-Length", str(len(body.encode())))
            handler.end_headers()
            handler.wfile.write(body.encode())


def completion(text: str) -> str:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return json.dumps({"model": "local", "choices": [choice], "usage": {"total_tokens": 7}})


@contextlib.contextmanager
def serve(answer: Callable[[Request, int], Answer]) -> Iterator[LocalJudge]:
    """Serves on a free port of this machine while the block runs."""
    judge = LocalJudge(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            judge.handle(self)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64  # with 5 a burst of connections waits a second for its retry

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    judge.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
