"""What every reply and every exception means for its prompt and for the run: failed, retry or stop."""

import asyncio
import contextlib
import email.utils
import errno
import http.client
import itertools
import json
import logging
import socket
import ssl
import urllib.error

import pytest

from concurrent_prompts import (
    Error,
    PromptError,
    as_prompt_error,
    http_error,
    run,
    run_concurrent,
    run_sequential,
    short,
)
from concurrent_prompts.backends.api import Api, batch_row
from concurrent_prompts.backends.failures import asked_wait, error_of
from concurrent_prompts.backends.hints import hint
from concurrent_prompts.backends.replies import read_reply
from tests.helpers import Clock, in_rows

pytestmark = pytest.mark.usefixtures("codec")

CHAT, RESPONSES, COMPLETIONS, EMBEDDINGS = "/chat/completions", "/responses", "/completions", "/embeddings"


def usual(code=None, kind=None, message="m"):
    """Return the body of an error as OpenAI sends it."""
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}).encode()


# ---- Statuses and codes --------------------------------------------------------------------------------------

VERDICTS = [
    # status, code, x-should-retry, verdict
    *((status, "", "", "fail") for status in (400, 406, 410, 411, 413, 415, 422, 431)),
    *((status, "", "", "stop") for status in (301, 302, 303, 307, 308, 401, 402, 403, 404, 405, 407)),
    *((status, "", "", "retry") for status in (408, 409, 425, 429, 500, 502, 503, 504, 520, 524, 529, 599)),
    (400, "context_length_exceeded", "", "fail"),
    (400, "content_policy_violation", "", "fail"),
    (400, "invalid_api_key", "", "stop"),
    (400, "model_not_found", "", "stop"),
    (429, "rate_limit_exceeded", "", "retry"),
    (429, "slow_down", "", "retry"),
    (429, "insufficient_quota", "", "stop"),
    (429, "credit_balance_exhausted", "", "stop"),
    (429, "organization_spend_limit_exceeded", "", "stop"),
    (429, "project_spend_limit_exceeded", "", "stop"),
    (429, "organization_usage_limit_exceeded", "", "stop"),
    (429, "insufficient_quota", "true", "stop"),
    (503, "server_is_overloaded", "", "retry"),
    (400, "", "true", "retry"),
    (500, "", "false", "fail"),
    (429, "", "false", "fail"),
    (401, "", "false", "stop"),
    (400, "", "maybe", "fail"),
    (308, "", "true", "stop"),
]


@in_rows(("status", "code", "should_retry", "verdict"), VERDICTS)
def test_verdicts(status, code, should_retry, verdict):
    error = http_error(status, {"x-should-retry": should_retry}, usual(code))
    assert (error.verdict, error.error.status, error.error.retryable) == (verdict, status, verdict == "retry")
    assert error.heard


@in_rows("code", [None, "", 429, "429"], ids=repr)
def test_the_type_counts_where_the_code_says_nothing(code):
    error = http_error(429, {}, usual(code, "insufficient_quota"))
    assert (error.error.type, error.verdict) == ("insufficient_quota", "stop")


@in_rows(
    ("message", "verdict", "kind"),
    [
        ("on tokens per min (TPM): Limit 10000, Used 9000, Requested 2000. try again in 599ms", "retry", "c"),
        ("on tokens per min (TPM): Limit 10000, Requested 10000.", "retry", "c"),
        ("on tokens per min (TPM): Limit 10000, Requested 10001.", "fail", "larger_than_limit"),
        ("Limit: 10 / min.\nRequested: 11", "fail", "larger_than_limit"),
    ],
)
def test_what_is_larger_than_the_limit_can_never_fit(message, verdict, kind):
    error = http_error(429, {}, usual("c", message=message))
    assert (error.verdict, error.error.type) == (verdict, kind)
    assert error.slow is (verdict == "retry")


@in_rows(
    ("status", "code", "slow"),
    [(429, "", True), (503, "", True), (529, "", True), (500, "", False), (408, "", False),
     (429, "insufficient_quota", False)],
)  # fmt: skip
def test_who_says_that_it_has_too_much_to_do(status, code, slow):
    assert http_error(status, {}, usual(code)).slow is slow


def test_a_redirect_says_where_to():
    error = http_error(308, {"location": "https://host/v2"}, b"")
    assert (error.error.type, error.verdict) == ("redirect", "stop") and "https://host/v2" in error.error.message


def test_what_a_batch_output_line_needs_is_kept():
    assert http_error(400, {"x-request-id": "r"}, usual("c")).http == (400, "r", json.loads(usual("c")))
    assert http_error(502, {}, b"<html>").http == (502, "", None)


# ---- Bodies in the wild --------------------------------------------------------------------------------------

BODIES = {
    "OpenAI": (usual("c", "t"), "c", "m"),
    "no code": (usual(None, "t"), "t", "m"),
    "code a number": (usual(404, "NotFoundError"), "NotFoundError", "m"),
    "code a number, no type": (usual(502), "", "m"),
    "vLLM, flat": (b'{"object": "error", "message": "m", "type": "TheirError", "code": 400}', "TheirError", "m"),
    "error a text": (b'{"error": "m"}', "", "m"),
    "error null beside a message": (b'{"error": null, "message": "m"}', "", "m"),
    "FastAPI": (b'{"detail": "Not Found"}', "", "Not Found"),
    "FastAPI, list": (b'{"detail": [{"loc": ["body"], "msg": "m"}]}', "", '[{"loc": ["body"], "msg": "m"}]'),
    "message an object": (b'{"error": {"message": {"a": 1}}}', "", '{"a": 1}'),
    "empty object": (b"{}", "", ""),
    "a list": (b"[]", "", ""),
    "null": (b"null", "", ""),
}


@in_rows(("body", "code", "message"), BODIES.values(), ids=BODIES)
def test_error_bodies(body, code, message):
    assert error_of(json.loads(body)) == (code, message)
    error = http_error(400, {}, body).error
    assert error.type == (code or "http_400")
    assert message in error.message and error.message not in ("", "None")


TEXTS = {
    "empty": (b"", "HTTP 502"),
    "no body": (None, "HTTP 502"),
    "HTML with a title": (b"<html><head><TITLE>502\n Bad  Gateway</TITLE></head><body>x</body>", "502 Bad Gateway"),
    "HTML without": (b"<h1>Bad</h1><p>gateway</p>", "Bad gateway"),
    "text": (b"upstream connect error", "upstream connect error"),
    "not UTF-8": (b"caf\xe9", "caf\ufffd"),
    "control characters": (b"a\x1b[31m\r\nb\0", "a [31m b"),
    "JSON cut off": (b'{"error": {"message": "m', '{"error": {"message": "m'),
}


@in_rows(("body", "message"), TEXTS.values(), ids=TEXTS)
def test_bodies_that_are_no_json(body, message):
    assert http_error(502, {}, body).error == Error("http_502", message, 502, True)


def test_a_message_is_one_line_of_bounded_length():
    message = http_error(400, {}, usual("c", message="word \n" * 1000)).error.message
    assert len(message) <= 300 and "\n" not in message and message.endswith("…")
    assert len(http_error(500, {}, b"<p>" + b"word " * 10_000).error.message) <= 300


# ---- The wait that is asked for ------------------------------------------------------------------------------

NOW = 1_800_000_000.0
DATE = email.utils.formatdate(NOW + 30, usegmt=True)
WAITS = {
    "nothing": ({}, "", None),
    "milliseconds": ({"retry-after-ms": "4321"}, "", 4.321),
    "milliseconds, float": ({"retry-after-ms": "12.5"}, "", 0.0125),
    "seconds": ({"retry-after": "5"}, "", 5),
    "seconds, float": ({"retry-after": " 5.5 "}, "", 5.5),
    "milliseconds first": ({"retry-after-ms": "250", "retry-after": "1"}, "try again in 7s", 0.25),
    "headers before the text": ({"retry-after": "1"}, "try again in 7s", 1),
    "a date": ({"retry-after": DATE}, "", 30),
    "a date in the past": ({"retry-after": email.utils.formatdate(NOW - 30, usegmt=True)}, "", None),
    "a date years ahead": ({"retry-after": email.utils.formatdate(NOW + 1e8, usegmt=True)}, "", 1e8),
    "absurd": ({"retry-after": "1152000"}, "", 1152000),
    "negative": ({"retry-after": "-1"}, "", None),
    "zero": ({"retry-after": "0"}, "", None),
    "zero, but the text knows": ({"retry-after": "0"}, "try again in 599ms", 0.599),
    "negative milliseconds, but seconds": ({"retry-after-ms": "-1", "retry-after": "3"}, "", 3),
    "NaN": ({"retry-after": "nan", "retry-after-ms": "NaN"}, "", None),
    "infinite": ({"retry-after": "inf", "retry-after-ms": "1e999"}, "", None),
    "not a number": ({"retry-after": "soon", "retry-after-ms": "soon"}, "", None),
    "another kind of date": ({"retry-after": "2026-11-20T10:00:00Z"}, "", None),
    "a date that cannot be": ({"retry-after": "Wed, 99 Foo 2026 99:99:99 GMT"}, "", None),
    "empty": ({"retry-after": "", "retry-after-ms": ""}, "", None),
    "text, ms": ({}, "Please try again in 599ms. Visit …", 0.599),
    "text, s": ({}, "Please try again in 20s.", 20),
    "text, float": ({}, "try again in 1.5s", 1.5),
    "text, minutes": ({}, "try again in 6m0s", 360),
    "text, hours": ({}, "try again in 1h2m3.5s.", 3723.5),
    "text, nonsense": ({}, "try again in 1.2.3s", None),
    "text, no unit": ({}, "try again in 5", None),
}


@in_rows(("headers", "message", "expected"), WAITS.values(), ids=WAITS)
def test_asked_wait(headers, message, expected):
    found = asked_wait(headers, message, now=lambda: NOW)
    assert found == (expected if expected is None else pytest.approx(expected))


def test_only_a_retry_has_a_wait():
    assert http_error(429, {"retry-after": "5"}, b"").wait == 5
    assert http_error(500, {"retry-after": "5"}, b"").wait == 5
    assert http_error(429, {}, usual("rate_limit_exceeded", message="try again in 2s")).wait == 2
    assert http_error(400, {"retry-after": "5"}, b"").wait is None
    assert http_error(429, {"retry-after": "5"}, usual("insufficient_quota")).wait is None


# ---- Replies with status 200 ---------------------------------------------------------------------------------


def chat(content="a", reason="stop", **message):
    return {"choices": [{"message": {"content": content, **message}, "finish_reason": reason}]}


def response(*output, **more):
    return {"status": "completed", "output": list(output), **more}


def said(*parts):
    return {"type": "message", "content": list(parts)}


PART, NO = {"type": "output_text", "text": "a"}, {"type": "refusal", "refusal": "no"}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
FUNCTION = {"type": "function_call", "name": "f", "arguments": "{}"}
ANSWERS = {
    "chat": (CHAT, chat(), "a", "stop"),
    "chat, query": (CHAT + "?api-version=1", chat(), "a", "stop"),
    "chat, cut off": (CHAT, chat("", "length"), "", "length"),
    "chat, filtered": (CHAT, chat(None, "content_filter"), "", "content_filter"),
    "chat, refusal": (CHAT, chat(None, refusal="no"), "no", "stop"),
    "chat, tool calls": (CHAT, chat(None, "tool_calls", tool_calls=[CALL]), [CALL], "tool_calls"),
    "chat, tool calls, empty text": (CHAT, chat("", "tool_calls", tool_calls=[CALL]), [CALL], "tool_calls"),
    "chat, parts": (CHAT, chat([PART, PART]), "aa", "stop"),
    "chat, no reason": (CHAT, {"choices": [{"message": {"content": "a"}}]}, "a", None),
    "chat, error null": (CHAT, chat() | {"error": None}, "a", "stop"),
    "completions": (COMPLETIONS, {"choices": [{"text": "a", "finish_reason": "length"}]}, "a", "length"),
    "responses": (RESPONSES, response(said(PART, PART)), "aa", "completed"),
    "responses, reasoning": (RESPONSES, response({"type": "reasoning", "summary": []}, said(PART)), "a", "completed"),
    "responses, refusal": (RESPONSES, response(said(NO)), "no", "completed"),
    "responses, call": (RESPONSES, response(FUNCTION), [FUNCTION], "completed"),
    "responses, incomplete": (
        RESPONSES,
        response(said(PART), status="incomplete", incomplete_details={"reason": "max_output_tokens"}, error=None),
        "a", "max_output_tokens",
    ),
    "responses, incomplete and empty": (
        RESPONSES, response(status="incomplete", incomplete_details={"reason": "content_filter"}), "", "content_filter",
    ),
}  # fmt: skip


@in_rows(("path", "data", "text", "reason"), ANSWERS.values(), ids=ANSWERS)
def test_answers(path, data, text, reason):
    reply = read_reply(path, {"x-request-id": "r"}, json.dumps(data).encode())
    assert (json.loads(reply.text) if isinstance(text, list) else reply.text) == text
    assert (reply.finish_reason, reply.extra, reply.http) == (reason, {}, (200, "r", data))


def test_what_else_an_answer_holds():
    usage = {"prompt_tokens": 1}
    reply = read_reply(CHAT, {}, json.dumps(chat() | {"model": "m-1", "usage": usage}).encode())
    assert (reply.model, reply.usage) == ("m-1", usage)
    assert read_reply(CHAT, {}, json.dumps(chat() | {"usage": "?"}).encode()).usage is None
    two = {"choices": chat("a")["choices"] + chat("b")["choices"]}
    assert read_reply(CHAT, {}, json.dumps(two).encode())[::4] == ("a", {"texts": ["a", "b"]})
    two = {"choices": [{"text": "a"}, {"text": "b"}]}
    assert read_reply(COMPLETIONS, {}, json.dumps(two).encode())[::4] == ("a", {"texts": ["a", "b"]})
    assert read_reply("/moderations", {}, b'{"results": []}').extra == {"reply": {"results": []}}


@in_rows(
    ("data", "embedding"),
    [([[1.0, 2.0]], [1.0, 2.0]), ([[1.0], [2.0]], [[1.0], [2.0]]), (["AACAPw=="], "AACAPw==")],
    ids=["one", "two", "base64"],
)
def test_embeddings(data, embedding):
    body = {"object": "list", "data": [{"embedding": vector} for vector in data]}
    reply = read_reply(EMBEDDINGS, {}, json.dumps(body).encode())
    assert (reply.text, reply.extra) == (None, {"embedding": embedding})


def failed(code, **more):
    return response(status="failed", error={"code": code, "message": "m"}, **more)


NO_ANSWERS = {
    "choices null": (CHAT, {"choices": None}, "no_answer", "retry"),
    "choices empty": (CHAT, {"choices": []}, "no_answer", "retry"),
    "choices missing": (CHAT, {}, "no_answer", "retry"),
    "choices a text": (CHAT, {"choices": "a"}, "no_answer", "retry"),
    "message null": (CHAT, {"choices": [{"message": None}]}, "no_answer", "retry"),
    "completions, choices null": (COMPLETIONS, {"choices": None}, "no_answer", "retry"),
    "responses, nothing": (RESPONSES, response(), "no_answer", "retry"),
    "responses, output null": (RESPONSES, {"output": None}, "no_answer", "retry"),
    "embeddings, data null": (EMBEDDINGS, {"object": "list", "data": None}, "no_answer", "retry"),
    "embeddings, data empty": (EMBEDDINGS, {"object": "list", "data": []}, "no_answer", "retry"),
    "embeddings, no data": (EMBEDDINGS, {"object": "list"}, "no_answer", "retry"),
    "error": (CHAT, {"error": {"message": "m"}, "choices": None}, "no_answer", "retry"),
    "error a text": (CHAT, {"error": "loading"}, "no_answer", "retry"),
    "error, rate limit": (CHAT, {"error": {"code": "rate_limit_exceeded"}}, "rate_limit_exceeded", "retry"),
    "error, quota": (CHAT, {"error": {"code": "insufficient_quota"}}, "insufficient_quota", "stop"),
    "error, too long": (CHAT, {"error": {"code": "context_length_exceeded"}}, "context_length_exceeded", "fail"),
    "error, a number: 400": (CHAT, {"error": {"code": 400, "message": "m"}}, "http_400", "fail"),
    "error, a number: 401": (CHAT, {"error": {"code": 401, "message": "m"}}, "http_401", "stop"),
    "error, a number: 502": (CHAT, {"error": {"code": 502, "message": "m"}}, "http_502", "retry"),
    "responses failed, server": (RESPONSES, failed("server_error"), "server_error", "retry"),
    "responses failed, limit": (RESPONSES, failed("rate_limit_exceeded"), "rate_limit_exceeded", "retry"),
    "responses failed, prompt": (RESPONSES, failed("invalid_prompt"), "invalid_prompt", "fail"),
    "responses failed, no reason": (RESPONSES, response(status="failed", error=None), "no_answer", "retry"),
}


@in_rows(("path", "data", "kind", "verdict"), NO_ANSWERS.values(), ids=NO_ANSWERS)
def test_replies_without_an_answer(path, data, kind, verdict):
    with pytest.raises(PromptError) as caught:
        read_reply(path, {}, json.dumps(data).encode())
    assert (caught.value.error.type, caught.value.verdict) == (kind, verdict)
    assert caught.value.error.message and caught.value.heard
    assert caught.value.slow is (kind == "rate_limit_exceeded")


@in_rows(
    ("body", "content_type", "kind", "verdict"),
    [
        (b"<html><title>Sign in</title>", "text/html; charset=utf-8", "web_page", "stop"),
        (b"<html><title>Sign in</title>", None, "malformed_reply", "retry"),
        (b"", "application/json", "malformed_reply", "retry"),
        (b'{"choices": [', "application/json", "malformed_reply", "retry"),
        (b"\xff\xfe\xfa", "application/json", "malformed_reply", "retry"),
        (b'"a"', "application/json", "malformed_reply", "retry"),
        (b"[" * 100_000, "application/json", "malformed_reply", "retry"),
    ],
    ids=["HTML", "HTML unsaid", "empty", "cut off", "not UTF-8", "a text", "nested"],
)
def test_replies_that_are_no_json(body, content_type, kind, verdict):
    with pytest.raises(PromptError) as caught:
        read_reply(CHAT, {"content-type": content_type} if content_type else {}, body)
    assert (caught.value.error.type, caught.value.verdict) == (kind, verdict)
    assert "Sign in" in caught.value.error.message or b"Sign" not in body


# ---- Exceptions of others ------------------------------------------------------------------------------------


def class_of(name, *bases, **attributes):
    """Return an exception class as a library has it: "package.Class"."""
    package, _, name = name.rpartition(".")
    return type(name, bases or (Exception,), attributes | ({"__module__": f"{package}._inside"} if package else {}))


def make(name, *bases, **attributes):
    """Return an instance of an exception class as a library has it."""
    return class_of(name, *bases, **attributes)("boom")


class Answer:
    """A library's response object."""

    def __init__(self, status, headers=(), body=None):
        self.status_code, self.headers, self.text = status, dict(headers), body


def of_openai(status, body=None, headers=()):
    """Return an openai.APIStatusError: its body is what stood under "error"."""
    return make("APIStatusError", status_code=status, body=body, response=Answer(status, headers))


def of_httpx(status, headers=()):
    """Return an httpx.HTTPStatusError: the status is only on its response."""
    return make("HTTPStatusError", response=Answer(status, headers), request=object())


def of_aiohttp(status, headers=None):
    """Return an aiohttp.ClientResponseError."""
    return make("ClientResponseError", type("ClientError", (Exception,), {}), status=status, headers=headers)


def chained(*failures):
    """Return the first of the exceptions, each raised from the one after it."""
    for one, two in itertools.pairwise(failures):
        one.__cause__ = two
    return failures[0]


TRANSPORT = class_of("httpx.TransportError")
CONNECTION = class_of("aiohttp.ClientConnectionError")
UNVERIFIED = ssl.SSLCertVerificationError("self-signed certificate")
FOREIGN = {
    "ours": (PromptError("k", "m", "stop", 401), "k", "stop", 401),
    "timeout": (TimeoutError(), "timeout", "retry", None),
    "refused": (ConnectionRefusedError(111, "refused"), "unreachable", "retry", None),
    "certificate": (UNVERIFIED, "certificate", "stop", None),
    "certificate, one below": (chained(ConnectionError("x"), UNVERIFIED), "certificate", "stop", None),
    "certificate, three below": (
        chained(make("openai.APIConnectionError"), make("httpx.ConnectError", TRANSPORT), make("x"), UNVERIFIED),
        "certificate", "stop", None,
    ),
    "a bug": (ValueError("boom"), "ValueError", "fail", None),
    "a bug without words": (KeyError(), "KeyError", "fail", None),
    "openai 400": (of_openai(400, {"code": "c", "message": "m"}), "c", "fail", 400),
    "openai 401": (of_openai(401), "http_401", "stop", 401),
    "openai 429": (of_openai(429), "http_429", "retry", 429),
    "openai 429, quota": (of_openai(429, {"code": "insufficient_quota"}), "insufficient_quota", "stop", 429),
    "openai 500, x-should-retry": (of_openai(500, headers={"x-should-retry": "false"}), "http_500", "fail", 500),
    "httpx 400": (of_httpx(400), "http_400", "fail", 400),
    "httpx 401": (of_httpx(401), "http_401", "stop", 401),
    "httpx 503": (of_httpx(503), "http_503", "retry", 503),
    "aiohttp 429": (of_aiohttp(429, {"retry-after": "3"}), "http_429", "retry", 429),
    "aiohttp 404": (of_aiohttp(404), "http_404", "stop", 404),
}  # fmt: skip


@in_rows(("failure", "kind", "verdict", "status"), FOREIGN.values(), ids=FOREIGN)
def test_exceptions(failure, kind, verdict, status):
    found = as_prompt_error(failure)
    assert (found.error.type, found.verdict, found.error.status) == (kind, verdict, status)
    assert found.error.message


PASSING = {
    "openai.APIConnectionError": make("openai.APIConnectionError", class_of("openai.APIError"), body=None),
    "openai.APITimeoutError": make("openai.APITimeoutError", class_of("openai.APIConnectionError")),
    "httpx.ConnectError": make("httpx.ConnectError", class_of("httpx.NetworkError", TRANSPORT)),
    "httpx.ReadTimeout": make("httpx.ReadTimeout", class_of("httpx.TimeoutException", TRANSPORT)),
    "httpx.RemoteProtocolError": make("httpx.RemoteProtocolError", TRANSPORT),
    "aiohttp.ServerDisconnectedError": make("aiohttp.ServerDisconnectedError", CONNECTION),
    "aiohttp.ClientPayloadError": make("aiohttp.ClientPayloadError"),
    "requests.ConnectionError": make("requests.ConnectionError", class_of("requests.RequestException", OSError)),
    "reset": ConnectionResetError(104, "boom"),
    "cut short": asyncio.IncompleteReadError(b"", 9),
    "no such name": socket.gaierror(-2, "boom"),
    "no route": OSError(errno.EHOSTUNREACH, "boom"),
    "TLS": ssl.SSLError(1, "boom"),
    "http.client": http.client.IncompleteRead(b""),
    "urllib": urllib.error.URLError("boom"),
}


@in_rows("failure", PASSING.values(), ids=PASSING)
def test_trouble_with_the_connection_is_retried_and_has_a_hint(failure):
    found = as_prompt_error(failure)
    assert (found.verdict, found.error.status) == ("retry", None) and found.error.message and hint(found.error)


@in_rows("name", ["PayloadTooOdd", "TimeoutReached", "mine.ConnectError", "TransportProblem"])
def test_a_class_of_the_users_own_is_not_taken_for_a_librarys(name):
    """It fails at once: it is not asked again because of a word in its name."""
    found = as_prompt_error(make(name))
    assert (found.error.type, found.verdict) == (name.rpartition(".")[2], "fail")


class Unreadable(Exception):
    def __str__(self):
        raise RuntimeError("no text")


def raising(*names, status=500):
    """Return an exception whose attributes raise something themselves."""
    own = {name: property(lambda self: 1 / 0) for name in names}
    return type("Odd", (Exception,), {"status_code": status} | own)("boom")


ODD = {
    "its text": Unreadable(),
    "its text is none": type("Odd", (Exception,), {"__str__": lambda self: 5})(),
    "its response": raising("response"),
    "its status": raising("status_code"),
    "its body": raising("body"),
    "its headers": raising("headers"),
    "its number": raising("errno"),
    "its class's module": type("Odd", (Exception,), {"__module__": None})("boom"),
}


@in_rows("failure", ODD.values(), ids=ODD)
async def test_an_exception_that_cannot_be_looked_at_fails_its_prompt_alone(failure):
    async def send(prompt):
        await asyncio.sleep(0)
        if prompt == "bad":
            raise failure
        return "fine"

    good, bad, other = await run_concurrent(["a", "bad", "b"], send, max_attempts=2)
    assert (good.text, other.text, bad.error.type) == ("fine", "fine", type(failure).__name__) and bad.error.message


@in_rows("status", [0, 7, 600, 10**9, True, "404"])
def test_a_status_that_is_none_of_http(status):
    assert as_prompt_error(make("Odd", status=status)).error.type == "Odd"


def test_the_wait_of_a_foreign_exception():
    for failure in (of_openai(429, headers={"retry-after": "3"}), of_httpx(429, {"retry-after": "3"}),
                    of_aiohttp(429, {"retry-after": "3"})):  # fmt: skip
        assert (as_prompt_error(failure).wait, as_prompt_error(failure).slow) == (3, True)


# ---- Hints ---------------------------------------------------------------------------------------------------

HINTS = {
    # what the advice must name, so that it is the right one
    (401, ""): "OPENAI_API_KEY",
    (402, ""): "credit",
    (403, ""): "project",
    (404, ""): "--base-url",
    (405, ""): "--base-url",
    (407, ""): "HTTPS_PROXY",
    (308, ""): "--base-url",
    (404, "model_not_found"): "-m",
    (400, "model_not_found"): "-m",
    (400, "invalid_api_key"): "OPENAI_API_KEY",
    (401, "invalid_api_key"): "OPENAI_API_KEY",
    (429, "insufficient_quota"): "credit",
    (429, "credit_balance_exhausted"): "credit",
    (429, "project_spend_limit_exceeded"): "spending",
    (429, "organization_usage_limit_exceeded"): "spending",
    (429, "billing_hard_limit_reached"): "spending",
    (429, "billing_not_active"): "credit",
    (413, ""): "shorten",
    (429, ""): "-c",
    (429, "rate_limit_exceeded"): "-c",
    (400, "context_length_exceeded"): "shorten",
    (400, "content_filter"): "reword",
    (400, "content_policy_violation"): "reword",
    (400, "invalid_request_error"): "",
    (422, ""): "",
    (408, ""): "retry",
    (500, ""): "retry",
    (503, "server_is_overloaded"): "retry",
    (200, "server_error"): "retry",
}


@in_rows(("what", "named"), HINTS.items(), ids=str)
def test_every_kind_has_the_right_hint(what, named):
    status, code = what
    advice = hint(http_error(status, {}, usual(code)).error)
    assert advice and named in advice


@in_rows(
    "failure",
    [
        http_error(429, {}, usual("c", message="Limit 1, Requested 2")),
        as_prompt_error(UNVERIFIED),
        as_prompt_error(TimeoutError()),
        as_prompt_error(ConnectionError()),
        *(PromptError(kind, "m", "retry", 200) for kind in ("no_answer", "malformed_reply", "web_page")),
        PromptError("unreachable", "m", "stop"),
        PromptError("unreadable", "m"),
    ],
    ids=lambda failure: failure.error.type,
)
def test_other_hints(failure):
    assert hint(failure.error)


# ---- The key -------------------------------------------------------------------------------------------------

KEY = "sk-very-secret-1234"


def api(monkeypatch, *replies, **settings):
    """Return an API whose server gives these replies (status, headers, body), the last one for ever."""
    replies = list(replies)

    async def post(path, body):
        return replies.pop(0) if len(replies) > 1 else replies[0]

    @contextlib.asynccontextmanager
    async def connect(base_url, headers, concurrency):
        yield post

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return Api(connect, base_url="http://test/v1", **settings)


BATCH = {"custom_id": "r", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m"}}


@pytest.mark.parametrize("prompt", ["a", BATCH], ids=["text", "Batch"])
@pytest.mark.parametrize(
    "reply",
    [
        (401, {}, usual("invalid_api_key", message=f"Incorrect API key provided: {KEY}.")),
        (403, {}, f"<title>no access for {KEY}</title>".encode()),
        (308, {"location": f"https://host/?key={KEY}"}, b""),
        (400, {}, usual(message=f"bad: {KEY}")),
        (500, {}, usual(message=f"bad: {KEY}")),
        (200, {}, json.dumps({"error": {"message": f"bad: {KEY}"}}).encode()),
        (200, {"content-type": "text/html"}, f"<title>{KEY}</title>".encode()),
    ],
    ids=["401", "403 page", "redirect", "400", "500", "200 with an error", "200 page"],
)
def test_the_key_is_in_no_error_row_or_log(monkeypatch, caplog, reply, prompt):
    caplog.set_level(logging.DEBUG)
    prompts, clock = [prompt, "b", "c"], Clock()
    results = run(prompts, api(monkeypatch, reply), concurrency=1, max_attempts=2, clock=clock, sleep=clock.sleep)
    rows = [[result.as_row(), batch_row(result)] for result in results]
    assert results[0].error is not None and len(results) == 3
    assert "***" in json.dumps(rows)
    assert KEY not in json.dumps(rows) + repr(results) + caplog.text


async def test_the_key_is_in_no_repr_and_an_answer_is_left_alone(monkeypatch):
    found = api(monkeypatch, (200, {}, json.dumps(chat(f"say {KEY}")).encode()))
    assert KEY not in repr(found) and "http://test/v1" in repr(found)
    (result,) = await run_sequential(["a"], found)
    assert result.text == f"say {KEY}"


@in_rows(("model", "verdict"), [(None, "failed"), ("m", "stopped")])
async def test_a_batch_lines_own_model_is_its_own_matter(monkeypatch, model, verdict):
    found = api(monkeypatch, (404, {}, usual("model_not_found")), (200, {}, json.dumps(chat()).encode()), model=model)
    first, second = await run_sequential([BATCH, BATCH | {"custom_id": "s"}], found)
    assert first.error.type == "model_not_found"
    assert (second.error.type if second.error else second.text) == ("a" if verdict == "failed" else "not_sent")


@in_rows("text", ["错" * 400, '{"a":' * 100, "word " * 100])
def test_a_long_message_is_cut_not_lost(text):
    cut = short(text)
    assert len(cut) <= 300 and cut.endswith(" …") and text.startswith(cut[:200])
