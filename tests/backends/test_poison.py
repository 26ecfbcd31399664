"""Replies made to hold up the run: every text of a server's is bounded, and every pattern takes linear time."""

import ast
import contextlib
import functools
import importlib
import itertools
import json
import pathlib
import re
import time

import pytest

import concurrent_prompts
from concurrent_prompts import PromptError, http_error
from concurrent_prompts.backends import api as api_file
from concurrent_prompts.backends import meanings
from concurrent_prompts.backends.api import limits_in
from concurrent_prompts.backends.failures import ERROR_MOST, HEADER_MOST, asked_wait
from concurrent_prompts.backends.replies import read_reply
from tests.helpers import NAMES, ROOT, in_rows, longest_pause, reply, scripted

OTHERS = "plot", "plot_page", "stand_in", "stand_in_answers", "stand_in_batches", "stand_in_http"  # hear no server
FILES = [file for file in [*ROOT.glob("backends/*.py"), *ROOT.glob("extras/*.py")] if file.stem not in OTHERS]
MODULES = "concurrent_prompts", *(f"concurrent_prompts.{file.parent.name}.{file.stem}" for file in sorted(FILES))
FEW, SOME, MANY = 800, 4_000, 20_000  # characters: a linear pattern takes five times as long for the next
BITS = (
    *'<">\'\\/.,:;{}[]()= \n\t0a-_@&?%#|~+*!\x00é', '\\"', '"a', "<title>", "</title>", "<a", "1.", "1s", "1ms",
    "try again in ", "try again in 1s1", "Limit 1 ", "Limit: 9", "Requested: ", "model ", "model", "not found",
    "invalid model name", "'type': ", "tokens per", "TPM ", "a_spend_limit_exceeded", "a_parse_error", "content_",
    "\\u0041", "&#65;", "&#x0", "%41", '"$ref":"', '"$ref":"\\', "{a}", "close,", "x: y\r\n", "a:", "\r\n",
    "HTTP/1.1 200 OK\r\n", "HTTP/1.1 200 ", "1;a", "\ncontent-length: 1", "\nconnection: \t", "\nconnection: a b",
    "[Errno 1]", "batch_", "word, ", "1) ", "- ", "    - ", '"n": 1', '"max_tokens": 1', "[ 1, 1 ]", "[  1",
    "shard-1-of-1", ".shard-1-of-", "gzip", "Error code: 400", "image",
)  # fmt: skip


METHODS = "search|match|fullmatch|findall|finditer|sub|split"
MADE = "pattern_of(words) if words else '(?!)'"  # by concealer, of the key
JOINED = "self.pattern"  # by meanings.py: its tables are looked through


def patterns():
    """Yield every pattern in the source, in a constant or in a call, with where it stands and how it is used."""
    sources = {name: pathlib.Path(importlib.import_module(name).__file__).read_text() for name in MODULES}
    methods = {*re.findall(rf"([\w.]+)\.({METHODS})\b", "\n".join(sources.values()))}
    for number, meaning in enumerate(meanings.MEANINGS):
        yield f"codes of meaning {number}", meaning.codes, {"fullmatch"}
        yield f"words of meaning {number}", meaning.words, {"search"}
    for name, pattern in vars(meanings).items():
        if isinstance(pattern, re.Pattern | meanings.Forms):
            yield f"{name} of meanings", pattern, {"fullmatch"} if "CODES" in name else {"match", "search", "finditer"}
    for name, source in sources.items():
        for node, above in pairs(ast.parse(source)):
            if used := isinstance(node, ast.Call) and re.fullmatch(rf"re\.(compile|{METHODS})", ast.unparse(node.func)):
                text, *more = [ast.unparse(one) for one in (*node.args, *(one.value for one in node.keywords))]
                if text not in (MADE, JOINED):
                    flags = "|".join(one for one in more if re.fullmatch(r"[re.|A-Z ]+", one))
                    known = dict(vars(importlib.import_module(name)), place=1, shards=1)
                    pattern = re.compile(eval(text, known), eval(flags or "0", known))
                    yield f"{name} line {node.lineno}", pattern, uses(used[1], above, methods)


def uses(function, above, used):
    """Return the methods by which a pattern is used; those that begin at one place only have less to do."""
    if function != "compile":
        return {function}
    if isinstance(above, ast.Attribute):
        return {above.attr}
    if not isinstance(above, ast.Assign):  # a part of a table
        return set(METHODS.split("|"))
    name = ast.unparse(above.targets[0])
    return {method for of, method in used if f".{of}".endswith(f".{name}")} or set(METHODS.split("|"))


def pairs(tree):
    """Yield each node of a syntax tree with the one that it is a part of."""
    ahead = [tree]
    while ahead:
        above = ahead.pop()
        for node in ast.iter_child_nodes(above):
            yield node, above
            ahead.append(node)


def seconds_for(pattern, methods, bit, size):
    text = bit * (size // len(bit))
    began = time.thread_time()  # of the processor, which others may use meanwhile
    for method in methods:
        getattr(pattern, method)(*([lambda match: ""] if method == "sub" else []), text)
    return time.thread_time() - began


def test_every_pattern_takes_linear_time():
    found = list(patterns())
    assert len(found) > 50 and len(set().union(*(methods for _, _, methods in found))) > 4
    for (place, pattern, methods), bit in itertools.product(found, BITS):
        bit = bit.encode() if isinstance(pattern.pattern, bytes) else bit
        few, some, many = (functools.partial(seconds_for, pattern, methods, bit, size) for size in (FEW, SOME, MANY))
        if few() > 0.0001 and some() > 0.01 and (taken := min(many(), many())) > 0.15:
            pytest.fail(f"{place}: {pattern.pattern!r} takes {taken:.2f} s for 20,000 characters of {bit!r}")


# ---- Much of each, as a server may send it -------------------------------------------------------------------

MUCH = 300_000  # bytes: what takes quadratic time would take minutes
DIGITS, DEEP = "9" * MUCH, "[" * 990 + "]" * 990


def fill(text):
    return text * (MUCH // len(text))


MESSAGES = {
    "digits of a limit": "Limit " + DIGITS,
    "limits": fill("Limit 1 "),
    "models": fill("model "),
    "a wait in dots": "try again in " + fill("1."),
    "a wait in digits": "try again in " + DIGITS + "s",
    "waits": fill("try again in 1s"),
    "types": fill("'type': "),
    "words": fill("_"),
}


@pytest.mark.parametrize("status", [400, 429])
@pytest.mark.parametrize("message", MESSAGES.values(), ids=MESSAGES)
def test_messages(message, status):
    began = time.thread_time()
    for body in ({"error": {"message": message}}, {"error": message}, {"error": {"code": message, "type": message}}):
        error = http_error(status, {"retry-after": message}, body)
        passing = status == 429 or message.startswith("try again in")
        assert (error.error.status, error.verdict) == (status, "retry" if passing else "fail")
        assert len(error.error.message) <= 300 and len(error.error.type) <= 60
        http_error(status, {}, json.dumps(body).encode())
    assert time.thread_time() - began < 1


STREAMS = {
    "parts without end": b'data: {"choices": [{"index": 0, "delta": {"content": "word "}}]}\n\n' * 6_000,
    "line ends": b"data: \n" * 1_100_000,
    "parts of a call": b'data: {"choices": [{"delta": {"tool_calls": [{"function": {"name": "a"}}]}}]}\n\n' * 6_000,
    "depth": b'data: {"choices": [{"delta": ' + b'{"a": ' * 300 + b"1" + b"}" * 300 + b"}]}\n\ndata: [DONE]\n\n",
    "no parts": b'data: {"choices": [1]}\n\n',
    "choices that are none": b'data: {"choices": {"a": 1}}\n\n',
    "an index that is none": b'data: {"choices": [{"index": "x", "delta": {"tool_calls": [1]}}]}\n\n',
}


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
def test_streams(stream):
    began = time.thread_time()
    with contextlib.suppress(PromptError):
        read_reply("/chat/completions", {"content-type": "text/event-stream"}, stream)
    assert time.thread_time() - began < 2


PAGES = {
    "titles": fill("<title>"),
    "an open title": "<title>" + fill("a"),
    "brackets": fill("<"),
    "tags": fill("<a>"),
    "half tags": fill("<a"),
    "spaces": fill(" "),
    "no UTF-8": fill("\\xff"),
}


@in_rows("page", PAGES.values(), ids=PAGES)
def test_pages(page):
    began = time.thread_time()
    assert http_error(502, {}, page).error.type == http_error(502, {}, page.encode("latin-1")).error.type == "http_502"
    for kind in ("text/html", "text/plain"):
        with pytest.raises(PromptError):
            read_reply("/chat/completions", {"content-type": kind}, page.encode("latin-1"))
    assert time.thread_time() - began < 1


VALUES = DIGITS, "-" + DIGITS, *map(fill, ("1.", "1m", "1.1ms", ":", "2026-11-21T", " ", "a, "))
OTHERS = "retry-after", "retry-after-ms", "x-should-retry", "location", "x-request-id", "content-type"


@in_rows("value", VALUES, ids=lambda value: value[:4])
def test_headers(value):
    began = time.thread_time()
    names = [form.format(part) for forms in api_file.LIMIT_FORMS.values() for form in forms
             for part in ("limit", "remaining", "reset")]  # fmt: skip
    for known in ({}, dict.fromkeys(names, "1")):
        for name in [*names, *OTHERS]:
            headers = known | {name: value}
            limits_in(headers, "requests"), limits_in(headers, "tokens"), asked_wait(headers, "")
            assert len(http_error(300, headers, b"").http[1]) <= HEADER_MOST
    assert time.thread_time() - began < 1


@in_rows("value", ["1e308", "inf", "nan", "1e999", "9" * 5000, "-1", "1" * 300])
def test_numbers_that_cannot_be(value):
    names = ("limit", "remaining", "reset")
    assert limits_in({f"x-ratelimit-{name}-requests": value for name in names}, "requests") is None
    found = asked_wait({"retry-after": value, "retry-after-ms": value}, f"try again in {value}s")
    assert found is None or 0 < found <= 1e9


KEY = "sk-" + "Ab3dE" * 30
NEAR = {
    "its beginning": KEY[:11],
    "its first letter": "s",
    "escapes": "s" + "\\" * 9,
    "escaped": "".join(f"{chr(92) * 9}u{ord(c):04x}" for c in KEY[:11]),
    "percents": "%73%6b%2d",
    "entities": "&#x0000073;&#107;&#",
}


@pytest.mark.parametrize("text", NEAR.values(), ids=NEAR)
def test_near_keys(monkeypatch, text):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "\n".join(f"X-Key-{n}: secret{n}-{KEY[3:40]}" for n in range(5)))
    api = concurrent_prompts.load_backend("stdlib", base_url="http://127.0.0.1:9/v1")
    began = time.thread_time()
    for status in (200, 429):
        for body in (fill(text).encode(), json.dumps({"error": {"message": fill(text)}}).encode()):
            with pytest.raises(PromptError):
                api.read(concurrent_prompts.Prompt(0, "", path="/chat/completions"), status, {}, body)
    with pytest.raises(PromptError):
        api.raise_discreetly(ConnectionError(fill(text) + KEY))
    assert time.thread_time() - began < 2


# ---- Through the backends ------------------------------------------------------------------------------------

OPENAI = b'{"error": {"message": "%b", "type": "t", "code": "c"}}'
LINE = b"Content-Type: text/html\r\n"
LIMITS = b"x-ratelimit-limit-requests: 1\r\nx-ratelimit-remaining-requests: 1\r\nx-ratelimit-reset-requests: "
BIG = 5_000_000
CHAT = b'{"choices": [{"message": {"content": "hi"}}], "usage": %b}'
EITHER = "no_answer malformed_reply"  # json reads less deep than orjson
POISONS = {  # the reply, and the types of the error or else the texts that may come of it
    "deep": (lambda: reply(DEEP.encode(), b"429 -"), "http_429"),
    "a deep message": (lambda: reply(b'{"error": {"message": %b}}' % DEEP.encode(), b"429 -"), "http_429"),
    "a deep code": (lambda: reply(b'{"error": {"code": %b}}' % DEEP.encode(), b"429 -"), "http_429"),
    "a number of 5,000 digits": (lambda: reply(b'{"error": {"code": %b}}' % (b"9" * 5000), b"429 -"), "http_429"),
    "digits in the message": (lambda: reply(OPENAI % (b"Limit " + b"9" * 50_000), b"429 -"), "c"),
    "digits in a header": (lambda: reply(OPENAI % b"", b"429 -", LIMITS + b"9" * 8000 + b"\r\n"), "c"),
    "titles": (lambda: reply(b"<title>" * 60_000, b"502 -", LINE), "http_502"),
    "a large error": (lambda: reply(b"[1]," * (BIG // 4), b"400 -"), "http_400"),
    "a large error in JSON": (lambda: reply(OPENAI % (b"a" * BIG), b"400 -"), "http_400"),
    "a large answer of text": (lambda: reply(b'"' + b"a" * BIG), "malformed_reply"),
    "a large answer of values": (lambda: reply(b"[" + b"[]," * 6_700_000 + b"[]]"), "malformed_reply"),
    "a large object without an answer": (lambda: reply(b'{"a": "%b"}' % (b"a" * BIG)), "no_answer"),
    "a large object with an error": (lambda: reply(b'{"error": "%b"}' % (b"a" * BIG)), "no_answer"),
    "a deep answer": (lambda: reply(b'{"choices": [{"message": {"content": [%b]}}]}' % DEEP.encode()), EITHER),
    "deep calls": (lambda: reply(b'{"choices": [{"message": {"tool_calls": %b}}]}' % DEEP.encode()), EITHER),
    "usage beyond numbers": (lambda: reply(CHAT % b'{"prompt_tokens": 1e400}'), "hi"),
    "usage of 4,000 digits": (lambda: reply(CHAT % (b'{"prompt_tokens": %b}' % (b"9" * 4000))), "hi"),
    "usage of 5,000 digits": (lambda: reply(CHAT % (b'{"prompt_tokens": %b}' % (b"9" * 5000))), "malformed_reply"),
    "a deep usage": (lambda: reply(CHAT % (b'{"prompt_tokens": %b}' % DEEP.encode())), "hi malformed_reply"),
}


@pytest.mark.parametrize("name", [*NAMES, "json alone"])
@pytest.mark.parametrize("poison", POISONS)
async def test_a_poisoned_reply(name, poison, monkeypatch):
    if name == "json alone":  # which is the same for all backends
        name = "stdlib"
        monkeypatch.setattr(concurrent_prompts, "load", json.loads)
        monkeypatch.setattr(concurrent_prompts, "dump", lambda value: concurrent_prompts.encode_json(value).encode())
    pytest.importorskip({"raw-aiohttp": "aiohttp", "openai-sdk": "openai"}.get(name, "asyncio"))
    made, expected = POISONS[poison]
    sent = made()
    async with scripted(lambda head, body: sent) as (url, _):
        send = concurrent_prompts.load_backend(name, base_url=url)
        asking = concurrent_prompts.run_concurrent(["x"], send, max_attempts=1)
        (result,), pause = await longest_pause(asking)
    found = result.error.type if result.error else result.text
    assert found in expected.split(), result.error
    assert not result.error or result.error.status == int(sent[9:12])
    assert pause < 1
    json.loads(result.as_line())
    result.prompt.kind = "batch"
    assert len(result.as_line()) < 3 * ERROR_MOST
