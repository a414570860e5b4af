"""Values, texts and damaged bytes, and what may come of them: a result, or an error by name."""

import functools
import json
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

from hypothesis import strategies as st

from dpo_dist.errors import DPODistError

T = TypeVar("T")
TRIED: Counter[str] = Counter()  # examples by what was tried

NASTY_TEXTS = (
    "", " ", "\0", "\ufeff", "\ud800", "\u2028", "\x85", "'", '"', "null", "NaN", "5", "é" * 3,
    "<|im_end|>", "{{ x }}", "../x", "[]", "{}", '[{"role": "user"', "9" * 5000, "²",
    '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]',
)  # fmt: skip
NASTY_NUMBERS = (
    0, -1, 1, 2, 3, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.0, -0.5, 0.5, 1.5, 1e308, -1e308,
    float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
DEPTHS = (50, 400, 5000, 100_000)


@functools.cache
def texts() -> st.SearchStrategy[str]:
    """Short ones, of any characters, half a character of UTF-16 among them."""
    characters = st.characters(codec=None, exclude_categories=())
    return st.sampled_from(NASTY_TEXTS) | st.text(characters, max_size=8)


def scalars() -> st.SearchStrategy[Any]:
    return (
        st.none() | st.booleans() | st.sampled_from(NASTY_NUMBERS) | texts()
        | st.integers() | st.floats()
    )  # fmt: skip


@functools.cache
def values(*keys: str) -> st.SearchStrategy[Any]:
    """Any JSON value; its objects have these keys, or any text."""
    names = st.sampled_from(keys) | texts() if keys else texts()

    def grown(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        return st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3)

    return st.recursive(scalars(), grown, max_leaves=8)


def nested(depth: int) -> str:
    """JSON text, lists in lists."""
    return "[" * depth + "]" * depth


def json_texts(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[str]:
    """A value as JSON, escaped or not where it can be; now and then one that is nested deeply."""

    def spell(value: Any, escaped: bool, depth: int | None) -> str:
        text = json.dumps(value, ensure_ascii=escaped)
        if not escaped:
            text = text.encode(errors="replace").decode()
        return text if depth is None else text.replace("null", nested(depth))

    depths = st.none() | st.none() | st.none() | st.sampled_from(DEPTHS)
    return st.builds(spell, inner, st.booleans(), depths)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The content with a few bytes flipped, cut away, put in or repeated."""
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(len(content) - 1, 0)))
        how = draw(st.sampled_from(("flip", "cut", "insert", "drop", "repeat")))
        if how == "cut":
            content = content[:place]
        elif how == "insert":
            piece = draw(st.binary(min_size=1, max_size=4) | st.sampled_from(PIECES))
            content = content[:place] + piece + content[place:]
        elif how == "drop":
            content = content[:place] + content[place + draw(st.integers(1, 20)) :]
        elif how == "repeat":
            content = content[:place] + content[max(place - 30, 0) :]
        elif content:
            bit = 1 << draw(st.integers(0, 7))
            content = content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]
    return content


PIECES = (
    b"\0", b"\xef\xbb\xbf", b"\r", b"\n", b"\x0b", b"\x0c", b"\xff", b" ", b'"', b"\\ud800", b",",
    b"{", b"}", b"[", b"]", b":", b"null", b"NaN", b"1e999", b"9" * 5000,
    b"[" * 100_000, b'{"a":' * 5000,
)  # fmt: skip


@st.composite
def replaced(draw: st.DrawFn, document: Any) -> Any:
    """The JSON document with one value in it replaced by another, or a key removed or added."""
    if isinstance(document, dict) and document and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(document)))
        if not draw(st.integers(0, 5)):
            return {name: value for name, value in document.items() if name != key}
        return document | {key: draw(replaced(document[key]))}
    if isinstance(document, dict) and not draw(st.integers(0, 3)):
        return document | {draw(texts()): draw(values())}
    if isinstance(document, list) and document and draw(st.integers(0, 3)):
        place = draw(st.integers(0, len(document) - 1))
        return [*document[:place], draw(replaced(document[place])), *document[place + 1 :]]
    return draw(values())


def changed_json(document: Any) -> st.SearchStrategy[bytes]:
    """A JSON file that was damaged, or that holds other values."""
    text = json.dumps(document, indent=2).encode()
    spelled = json_texts(replaced(document)).map(lambda t: t.encode(errors="surrogatepass"))
    return spelled | damaged(text)


def outcome(what: str, call: Callable[[], T], *names: str) -> T | None:
    """What a call gives; None where it refuses by an error that holds one of the names."""
    TRIED[what] += 1
    try:
        return call()
    except DPODistError as error:
        told = str(error)
        assert any(name in told for name in names), f"none of {names} in {told!r}"
        assert error.expected and error.remedy
        return None
