"""Asking an OpenAI-compatible endpoint for chat completions, within its limits.

Waits and asks again after 408, 409, 429, 5xx, a lost connection, a timeout and an answer that is
no chat completion; gives up on everything else. The key is never part of an error's text.
"""

import asyncio
import email.utils
import ipaddress
import os
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2

from dpo_dist.errors import EndpointError

TRANSIENT = {408, 409, 425, 429}
REFUSED = {400, 413, 422}  # this request, not the next one
LONGEST_WAIT_S = 60.0
EXCERPT_LENGTH = 200


class RequestRefusedError(EndpointError):
    """The endpoint does not take this one request, for example because it is too long."""


@dataclass(frozen=True)
class Limits:
    """How fast and how patiently to ask."""

    concurrency: int
    requests_per_minute: float | None
    timeout_s: float
    max_retries: int
    first_wait_s: float = 1.0


@dataclass(frozen=True)
class Reply:
    """A chat completion; `text` is "" when the model said nothing."""

    text: str
    finish_reason: str | None
    usage: Mapping[str, Any]
    model: str | None
    latency_s: float


@dataclass
class _Pace:
    """Spaces requests evenly: the next one may start `interval_s` after the last."""

    interval_s: float
    next_at: float = 0.0

    async def wait(self) -> None:
        now = time.monotonic()
        start = max(now, self.next_at)
        self.next_at = start + self.interval_s
        await asyncio.sleep(start - now)


@dataclass
class Endpoint:
    """One endpoint with its client; use as `async with`."""

    url: str
    key: str | None
    limits: Limits
    num_requests: int = 0
    _pace: _Pace = field(init=False)
    _client: httpx2.AsyncClient = field(init=False)

    async def __aenter__(self) -> "Endpoint":
        rate, count = self.limits.requests_per_minute, self.limits.concurrency
        self._pace = _Pace(60 / rate if rate else 0.0)
        self._client = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {self.key}"} if self.key else {},
            timeout=self.limits.timeout_s,
            limits=httpx2.Limits(max_connections=count, max_keepalive_connections=count),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def ask(self, payload: Mapping[str, Any]) -> Reply:
        """The completion of a request; raises EndpointError when it does not come."""
        last_try = self.limits.max_retries
        for number in range(last_try + 1):
            reply = await self._try(payload)
            if isinstance(reply, Reply):
                return reply
            if number < last_try:
                backoff = self.limits.first_wait_s * 2**number * random.uniform(0.5, 1.5)
                wait_s = min(backoff, LONGEST_WAIT_S) if reply.wait_s is None else reply.wait_s
                if wait_s > 10 * LONGEST_WAIT_S:
                    raise EndpointError(
                        f"{self.url} {reply.found}, and asks to wait {wait_s:.0f} s",
                        f"an answer within {10 * LONGEST_WAIT_S:.0f} s",
                        "Start the same command again later: what was judged is kept.",
                    )
                await asyncio.sleep(wait_s)
        raise EndpointError(
            f"{self.url} {reply.found}, {last_try + 1} times",
            "a chat completion",
            "Check the server, lower --concurrency or --requests-per-minute, and start the same "
            "command again: what was judged is kept.",
        )

    async def _try(self, payload: Mapping[str, Any]) -> "Reply | _Failure":
        await self._pace.wait()
        self.num_requests += 1
        start = time.monotonic()
        try:
            # httpx2's own timeout starts afresh with every byte: a server may drip for ever
            async with asyncio.timeout(self.limits.timeout_s):
                response = await self._client.post(self.url, json=dict(payload))
        except (TimeoutError, httpx2.TimeoutException):
            return _Failure(f"did not answer within {self.limits.timeout_s:g} s")
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            return _Failure(f"cannot be asked ({self._clean(str(error) or repr(error))})")
        code = response.status_code
        if code in TRANSIENT or code >= 500:
            wait_s = retry_after_s(response.headers.get("retry-after"))
            return _Failure(f"answered {code} ({self._excerpt(response)})", wait_s)
        if code in REFUSED:
            raise RequestRefusedError(
                f"{self.url} answered {code} ({self._excerpt(response)})",
                "a request that it takes",
                "Check --judge-model, --max-tokens and the length of the answers.",
            )
        if code != 200:
            raise EndpointError(
                f"{self.url} answered {code} ({self._excerpt(response)})",
                "a chat completion",
                _remedy(code, bool(self.key)),
            )
        reply = self._read(response, time.monotonic() - start)
        return reply or _Failure(f"answered with no chat completion ({self._excerpt(response)})")

    def _read(self, response: httpx2.Response, latency_s: float) -> Reply | None:
        try:
            body = response.json()
            choice = body["choices"][0]
            text = choice["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            return None
        if text is not None and not isinstance(text, str):
            return None
        usage = body.get("usage")
        return Reply(
            self._clean(text or ""), choice.get("finish_reason"),
            usage if isinstance(usage, dict) else {}, body.get("model"), latency_s,
        )  # fmt: skip

    def _excerpt(self, response: httpx2.Response) -> str:
        text = " ".join(response.text.split())
        return self._clean(text)[:EXCERPT_LENGTH] or "an empty body"

    def _clean(self, text: str) -> str:
        """A server may send back the headers it got."""
        return text.replace(self.key, "[key]") if self.key else text


@dataclass(frozen=True)
class _Failure:
    """Something that may be over at the next try."""

    found: str
    wait_s: float | None = None


def completions_url(endpoint: str) -> str:
    """The address to post to, from a base address such as http://localhost:8000/v1.

    Raises EndpointError for one that is no http address or carries a user, password or query.
    """
    try:
        url = httpx2.URL(endpoint)
    except httpx2.InvalidURL:
        url = httpx2.URL("")
    if url.scheme not in ("http", "https") or not url.host:
        raise EndpointError(
            f"--endpoint {endpoint}",
            "the address of an OpenAI-compatible API",
            "For example http://localhost:8000/v1.",
        )
    if url.userinfo or url.query:
        raise EndpointError(
            f"--endpoint on {url.host} carries a user, password or query",
            "an address alone: it is written into files",
            "Put the key into the environment variable that --api-key-env names.",
        )
    base = str(url).rstrip("/")
    return base if base.endswith("/chat/completions") else f"{base}/chat/completions"


def key_from_environment(name: str) -> str | None:
    """The key, None when the variable is not set: a local server needs none.

    Raises EndpointError when its value cannot be sent in a header.
    """
    key = os.environ.get(name, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise EndpointError(
            f"the environment variable {name} holds characters that no header takes",
            "a key in ASCII",
            f"Set {name} again.",
        )
    return key or None


def check_key_stays_secret(url: str, key: str | None) -> None:
    """Raises EndpointError when a key would leave this machine in clear text.

    No network is trusted for being local: a cluster's is shared with everybody on the cluster.
    """
    where = httpx2.URL(url)
    if key is None or where.scheme == "https" or _is_loopback(where.host):
        return
    raise EndpointError(
        f"--endpoint {url} would send the API key in clear text to {where.host}",
        "https, or this machine",
        "Use https, reach the server as localhost through a tunnel (ssh -L), or send no key: "
        '--api-key-env "".',
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def retry_after_s(value: str | None) -> float | None:
    """Seconds to wait by a Retry-After header: a number, or a date; None when it says neither."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError):
        return None


def _remedy(code: int, has_key: bool) -> str:
    if code in (401, 403) and not has_key:
        return "Set the environment variable that --api-key-env names (OPENAI_API_KEY)."
    if code in (401, 403):
        return "Check the key, and that --api-key-env names the variable that holds it."
    return "Check --endpoint (it usually ends in /v1) and --judge-model."
