"""Tests of the stand-in server, over real connections on loopback; time is a fake clock or the server's own."""

from __future__ import annotations

import ast
import asyncio
import base64
import contextlib
import gzip
import http.client
import itertools
import json
import math
import random
import re
import shutil
import signal
import ssl
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest

from concurrent_prompts.extras import stand_in, stand_in_http, stand_in_limits
from concurrent_prompts.extras.stand_in import FAULTS, OUTAGES, Options, Server, serve
from concurrent_prompts.extras.stand_in import main as stand_in_main
from concurrent_prompts.extras.stand_in_limits import WINDOW_TELLS, WINDOWS
from tests.helpers import in_rows

CHAT = "/v1/chat/completions"
FOLDER = Path(stand_in.__file__).parent


class Got(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def text(self) -> str:
        return str(self.json["choices"][0]["message"]["content"])

    @property
    def error(self) -> dict[str, Any]:
        return dict(self.json["error"])


class Client:
    """One connection, driven by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def post(self, body: Any, path: str = CHAT, **headers: str) -> Got:
        self.writer.write(request(body, path, **headers))
        return await self.reply()

    async def get(self, path: str) -> Got:
        self.writer.write(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        return await self.reply()

    async def reply(self) -> Got:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, *lines = head.rstrip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (text.partition(":") for text in lines)}
        if headers.get("transfer-encoding") == "chunked":
            body = b"".join([part async for part in self.chunks()])
        else:
            body = await self.reader.readexactly(int(headers.get("content-length", 0)))
        if headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        return Got(int(line.split()[1]), headers, body)

    async def chunks(self) -> AsyncIterator[bytes]:
        size = -1
        while size:
            size = int(await self.reader.readline(), 16)
            yield await self.reader.readexactly(size)
            assert await self.reader.readexactly(2) == b"\r\n"

    async def at_end(self) -> bool:
        return await self.reader.read() == b""


@contextlib.asynccontextmanager
async def connect(server: Server, **more: Any) -> AsyncIterator[Client]:
    url = urlsplit(server.url)
    reader, writer = await asyncio.open_connection(url.hostname, url.port, **more)
    try:
        yield Client(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@contextlib.asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[Client]:
    """A server and a connection to it."""
    async with serve(**settings) as server, connect(server) as client:
        yield client


async def until(condition: Any) -> None:
    async with asyncio.timeout(2):
        while not condition():
            await asyncio.sleep(0)


def chat(prompt: str = "Tell me a story", **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": prompt}], **more}


def request(body: Any, path: str = CHAT, **headers: str) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "host: x", f"content-length: {len(data)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + data


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


# --- Answers ------------------------------------------------------------------------------------------------


async def test_the_official_sdk_reads_all_endpoints() -> None:
    openai = pytest.importorskip("openai")
    async with serve() as server, openai.AsyncOpenAI(api_key="k", base_url=server.url, max_retries=0) as client:
        answer = await client.chat.completions.create(**chat(n=2))
        assert answer.model == "m" and answer.id.startswith("chatcmpl-") and answer.created > 1_700_000_000
        assert [choice.finish_reason for choice in answer.choices] == ["stop", "stop"]
        assert 'beginning "Tell me a story"' in answer.choices[1].message.content
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        assert answer.usage.prompt_tokens_details.cached_tokens == 0
        assert answer.usage.completion_tokens_details.reasoning_tokens == 0

        reply = await client.responses.create(model="m", input="Tell me a story")
        assert reply.status == "completed" and 'beginning "Tell me a story"' in reply.output_text
        assert reply.usage.input_tokens == 4 and reply.usage.input_tokens_details.cached_tokens == 0
        assert reply.usage.output_tokens_details.reasoning_tokens == 0

        legacy = await client.completions.create(model="m", prompt=["one", "two"])
        assert ["one" in legacy.choices[0].text, "two" in legacy.choices[1].text] == [True, True]

        vectors = await client.embeddings.create(model="m", input=["one", "two", "one"])
        first, second, third = (item.embedding for item in vectors.data)
        assert first == third != second and math.isclose(math.hypot(*first), 1, rel_tol=1e-6)

        models = [model async for model in client.models.list()]
        assert [type(model).__name__ for model in models] == ["Model"] * 2 and models[0].shutdown_date is None
        for typed in (answer, reply, legacy, vectors, models[0]):
            type(typed).model_validate(typed.to_dict(mode="json"), strict=True)  # construct() alone checks nothing


async def test_an_answer_depends_on_the_body_alone() -> None:
    async with serving() as one, serving(latency=0.001, seed=7) as other:
        first, again = await one.post(chat()), await other.post(chat())
        assert first.text == again.text and first.json["usage"] == again.json["usage"]
        assert first.text.startswith('[made up by the stand-in server] 4 words, beginning "Tell me a story" (checksum ')
        assert first.json["id"] != again.json["id"] and first.headers["x-request-id"] != again.headers["x-request-id"]


async def test_no_two_prompts_get_the_same_answer() -> None:
    same_start = "The same six words for all"
    texts = set()
    async with serving() as client:
        for last in ("a", "b"):
            for system in ("c", "d"):
                messages = [{"role": "system", "content": system}, {"role": "user", "content": f"{same_start} {last}"}]
                texts.add((await client.post({"model": "m", "messages": messages})).text)
    assert len(texts) == 4


async def test_the_last_user_message_is_quoted_whatever_its_form() -> None:
    parts = [{"type": "text", "text": "Look at"}, {"type": "image_url"}, {"type": "text", "text": "it"}]
    messages = [{"role": "user", "content": "old"}, {"role": "user", "content": parts},
                {"role": "assistant", "content": None}]
    async with serving() as client:
        assert '3 words, beginning "Look at it"' in (await client.post({"model": "m", "messages": messages})).text


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_a_maximum_cuts_the_answer(name: str) -> None:
    async with serving() as client:
        answer = (await client.post(chat(**{name: 5}))).json
        assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["completion_tokens"] == 5
        answer = (await client.post(chat(**{name: 5000}))).json
        assert answer["choices"][0]["finish_reason"] == "stop" and answer["usage"]["completion_tokens"] < 50


async def test_a_response_may_be_incomplete() -> None:
    body = {"model": "m", "input": [{"role": "user", "content": "x" * 400}], "max_output_tokens": 3}
    async with serving() as client:
        answer = (await client.post(body, "/v1/responses")).json
        assert answer["status"] == "incomplete" and answer["incomplete_details"] == {"reason": "max_output_tokens"}
        assert answer["usage"]["input_tokens"] == 100 and answer["usage"]["output_tokens"] == 3
        longer = (await client.post({**body, "instructions": "y" * 400}, "/v1/responses")).json
        assert longer["usage"]["input_tokens"] == 201


@in_rows(("given", "prompts"), [
    ("one", 1), (["one", "two"], 2), ([1, 2, 3], 1), ([[1, 2], [3]], 2), (["one"] * 2048, 2048)])
async def test_completions_and_embeddings_answer_every_input(given: Any, prompts: int) -> None:
    async with serving() as client:
        texts = (await client.post({"model": "m", "prompt": given, "n": 2}, "/v1/completions")).json["choices"]
        assert [choice["index"] for choice in texts] == list(range(2 * prompts))
        vectors = (await client.post({"model": "m", "input": given}, "/v1/embeddings")).json["data"]
        assert [item["index"] for item in vectors] == list(range(prompts))


async def test_embeddings_are_the_same_in_both_encodings() -> None:
    body = {"model": "m", "input": "one", "dimensions": 3}
    async with serving() as client:
        (plain,) = (await client.post(body, "/v1/embeddings")).json["data"]
        (coded,) = (await client.post({**body, "encoding_format": "base64"}, "/v1/embeddings")).json["data"]
    assert list(struct.unpack("<3f", base64.b64decode(coded["embedding"]))) == plain["embedding"]


async def test_headers_are_those_of_the_api() -> None:
    async with serving(rpm=600, tpm=6000) as client:
        headers = (await client.post(chat())).headers
    assert headers["content-type"] == "application/json" and headers["openai-version"] == "2020-10-01"
    assert headers["x-request-id"].startswith("req_") and headers["openai-processing-ms"].isdigit()
    assert headers["x-ratelimit-limit-requests"] == "600" and headers["x-ratelimit-limit-tokens"] == "6000"


BAD_REQUESTS = [
    ("POST", "/chat/completions", chat(), 404, {"message": "Invalid URL (POST /chat/completions)"}),
    ("POST", "/v1/stories", chat(), 404, {"type": "invalid_request_error", "param": None, "code": None}),
    ("GET", CHAT, chat(), 405, {"message": f"Not allowed to GET on {CHAT}."}),
    ("POST", "/v1/models", {}, 405, {}),
    ("POST", CHAT, b"{", 400, {"type": "invalid_request_error"}),
    ("POST", CHAT, b"", 400, {}),
    ("POST", CHAT, b"\xff\xfe\x00", 400, {}),
    ("POST", CHAT, b"[" * 100_000, 400, {}),
    ("POST", CHAT, b'{"model": ' + b"9" * 5000, 400, {}),
    ("POST", CHAT, [], 400, {}),
    ("POST", CHAT, {"messages": [{}]}, 400, {"param": "model", "code": "missing_required_parameter"}),
    ("POST", CHAT, {"model": "m"}, 400, {"param": "messages", "message": "Missing required parameter: 'messages'."}),
    ("POST", CHAT, {"model": "m", "messages": []}, 400, {"param": "messages"}),
    ("POST", CHAT, {"model": "m", "messages": "hello"}, 400, {"param": "messages", "code": "invalid_value"}),
    ("POST", CHAT, {"model": "m", "messages": ["hello"]}, 400, {"param": "messages"}),
    ("POST", CHAT, chat(model=7), 400, {"param": "model"}),
    ("POST", CHAT, chat(n=129), 400, {"param": "n"}),
    ("POST", CHAT, chat(n=True), 400, {"param": "n"}),
    ("POST", CHAT, chat(max_tokens="many"), 400, {"param": "max_tokens"}),
    ("POST", CHAT, chat(stream="yes"), 400, {"param": "stream"}),
    ("POST", "/v1/responses", {"model": "m", "input": 7}, 400, {"param": "input"}),
    ("POST", "/v1/completions", {"model": "m"}, 400, {"param": "prompt"}),
    ("POST", "/v1/embeddings", {"model": "m", "input": {"a": 1}}, 400, {"param": "input"}),
    ("POST", "/v1/embeddings", {"model": "m", "input": ["a"] * 2049}, 400, {"param": "input"}),
    ("POST", "/v1/embeddings", {"model": "m", "input": "a", "dimensions": 0}, 400, {"param": "dimensions"}),
    ("POST", "/v1/embeddings", {"model": "m", "input": "a", "stream": True}, 400, {"param": "stream"}),
]


async def test_bad_requests_are_refused_as_openai_does_and_the_connection_lives_on() -> None:
    async with serving(fault={"hang": 1.0}) as client:  # none of them gets as far as a fault
        for method, path, body, status, expected in BAD_REQUESTS:
            client.writer.write(request(body, path).replace(b"POST", method.encode(), 1))
            got = await client.reply()
            assert got.status == status, (path, body, got)
            assert got.error.keys() == {"message", "type", "param", "code"} and got.error.items() >= expected.items()


# --- HTTP ---------------------------------------------------------------------------------------------------


async def test_bytes_may_come_one_by_one() -> None:
    async with serving() as client:
        wire = b"\r\n\r\n" + request(chat()) + b"\r\n" + request(chat())  # some clients send empty lines between
        for byte in range(len(wire)):
            client.writer.write(wire[byte : byte + 1])
            await asyncio.sleep(0)
        assert (await client.reply()).text == (await client.reply()).text


@pytest.mark.parametrize("settings", [{}, {"latency": 0.002, "sigma": 2.0}])
async def test_pipelined_requests_are_answered_in_order(settings: Any) -> None:
    async with serving(**settings) as client:
        client.writer.write(b"".join(request(chat(f"number {n}. {'x' * 10_000}")) for n in range(20)))
        for n in range(20):
            assert f"number {n}." in (await client.reply()).text


async def test_a_flood_of_pipelined_requests_is_not_hoarded() -> None:
    async with serve(fault={"hang": 1.0}) as server, connect(server) as client:
        client.writer.write(request(chat("x" * 1000)) * 20_000)
        await until(lambda: server.stats.in_flight)
        (link,) = server.links
        for _ in range(1000):
            await asyncio.sleep(0)
        assert len(link._inbox) <= stand_in_http.HEAD_LIMIT + stand_in_http.WINDOW
        client.writer.transport.abort()


async def test_a_client_that_does_not_read_is_not_served_for_ever() -> None:
    async with serve() as server, connect(server) as client:
        client.reader._transport.pause_reading()  # type: ignore[attr-defined]
        client.writer.write(request(chat(n=128)) * 600)
        before = -1
        while before != server.stats.answered:  # until it stops
            before = server.stats.answered
            for _ in range(200):
                await asyncio.sleep(0)
        assert 0 < before < 600
        client.reader._transport.resume_reading()  # type: ignore[attr-defined]
        for _ in range(600):
            await client.reply()


@in_rows("size", [1, 7, 10_000])
async def test_request_bodies_may_be_chunked(size: int) -> None:
    data = json.dumps(chat("word " * size)).encode()
    chunks = b"".join(b"%X;ext=1\r\n%b\r\n" % (len(data[i : i + size]), data[i : i + size])
                      for i in range(0, len(data), size))
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: Chunked\r\n\r\n".encode()
    async with serving() as client:
        client.writer.write(head + chunks + b"0\r\nTrailer: x\r\nAnother: y\r\n\r\n")
        client.writer.write(request(data) + request(chat("next")))
        got, same, other = [await client.reply() for _ in range(3)]
        assert got.status == 200 and got.text == same.text != other.text


async def test_100_continue_comes_before_the_body() -> None:
    head, _, body = request(chat(), expect="100-Continue").partition(b"\r\n\r\n")
    async with serving() as client:
        client.writer.write(head + b"\r\n\r\n")
        assert (await client.reply()).status == 100
        client.writer.write(body)
        assert (await client.reply()).status == 200


async def test_connection_close_is_honoured_and_announced() -> None:
    async with serving() as client:
        assert "connection" not in (await client.post(chat())).headers
        assert (await client.post(chat(), connection="Close")).headers["connection"] == "close"
        assert await client.at_end()


@pytest.mark.parametrize("keep", [False, True])
async def test_http_1_0(keep: bool) -> None:
    wire = request(chat(), **({"connection": "keep-alive"} if keep else {})).replace(b"HTTP/1.1", b"HTTP/1.0")
    async with serving(chunked=True) as client:
        client.writer.write(wire)
        got = await client.reply()
        assert got.status == 200 and "transfer-encoding" not in got.headers  # 1.0 knows no chunks
        assert got.headers["connection"] == ("keep-alive" if keep else "close")
        if keep:
            client.writer.write(wire)
            assert (await client.reply()).status == 200
        else:
            assert await client.at_end()


async def test_targets_may_be_whole_urls_or_have_a_query() -> None:
    async with serving() as client:
        assert (await client.post(chat(), f"http://api.example.com{CHAT}?api-version=1")).status == 200


async def test_head_gets_no_body() -> None:
    async with serving() as client:
        client.writer.write(b"HEAD /v1/models HTTP/1.1\r\n\r\n")
        assert b" 405 " in await client.reader.readuntil(b"\r\n\r\n")
        assert (await client.post(chat())).status == 200


@in_rows(("chunked", "zipped"), list(itertools.product([False, True], repeat=2)))
async def test_answers_may_be_chunked_and_gzipped(chunked: bool, zipped: bool) -> None:
    async with serving(chunked=chunked, gzip=zipped) as client:
        got = await client.post(chat())
        assert (("transfer-encoding" in got.headers), ("content-encoding" in got.headers)) == (chunked, zipped)
        assert "made up" in got.text and (await client.get("/v1/models")).json["data"]


async def test_close_every_closes_without_a_word() -> None:
    async with serve(close_every=2) as server:
        async with connect(server) as client:
            for _ in range(2):
                assert "connection" not in (await client.post(chat())).headers
            assert await client.at_end()
        async with connect(server) as client:
            assert (await client.post(chat())).status == 200


HOSTILE = {
    b"\x16\x03\x01\x02\x00\x01": 400,  # a TLS hello
    b"\x00" * 100: 400,
    b"GET\r\n\r\n": 400,
    b"GET / HTTP/2.0\r\n\r\n": 400,
    b"GET http://[ HTTP/1.1\r\n\r\n": 400,
    b"POST / HTTP/1.1\r\nno colon\r\n\r\n": 400,
    b"POST / HTTP/1.1\r\nspace : x\r\n\r\n": 400,
    b"POST / HTTP/1.1\r\na: b\r\n folded\r\n\r\n": 400,
    b"POST / HTTP/1.1\r\ncontent-length: -1\r\n\r\n": 400,
    b"POST / HTTP/1.1\r\ncontent-length: \xb2\r\n\r\n": 400,
    b"POST / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n": 400,
    b"POST / HTTP/1.1\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n": 400,
    b"POST / HTTP/1.1\r\ntransfer-encoding: gzip, chunked\r\n\r\n": 400,
    b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n0x1\r\n": 400,
    b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n\r\n": 400,
    b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n1\r\nabc": 400,
    b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nffffffffffff\r\n": 413,
    b"POST / HTTP/1.1\r\ncontent-length: 33554433\r\n\r\n": 413,
    b"POST / HTTP/1.1\r\ncontent-length: " + b"9" * 5000 + b"\r\n\r\n": 413,
    b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n" + b"a: b\r\n" * 102: 431,
    b"POST / HTTP/1.1\r\n" + b"a" * 70_000: 431,
    b"POST / HTTP/1.1\r\na: " + b"a" * 65_520 + b"\r\n\r\n": 431,
}


async def test_hostile_bytes_are_refused_and_the_connection_closed() -> None:
    async with serve() as server:
        for wire, status in HOSTILE.items():
            async with connect(server) as client:
                client.writer.write(wire)
                got = await client.reply()
                assert (got.status, got.headers["connection"]) == (status, "close"), wire[:80]
                assert got.error["type"] == "invalid_request_error" and await client.at_end()


GREEDY = {
    "an answer of 64 million numbers": ("/v1/embeddings", {"input": ["x"] * 2048, "dimensions": 4096}, 413),
    "an answer of 262,144 texts": ("/v1/completions", {"prompt": ["x"] * 2048, "n": 128}, 413),
    "a request of 4 million values": (CHAT, {"messages": [{"role": "user"}], "x": [[]] * 2_000_000}, 400),
    "a text of a billion characters": (CHAT, {"response_format": {"json_schema": {"schema": {
        "type": "string", "minLength": 10**9}}}}, 400),
    "a tree of a billion leaves": (CHAT, {"response_format": {"json_schema": {"schema": {
        "type": "object", "properties": {str(name): {"$ref": "#"} for name in range(40)}}}}}, 400),
    "an array of a billion values": (CHAT, {"response_format": {"json_schema": {"schema": {
        "type": "array", "items": {"type": "null"}, "minItems": 10**9}}}}, 400),
}  # fmt: skip


@pytest.mark.parametrize(("path", "body", "status"), GREEDY.values(), ids=GREEDY)
async def test_nobody_makes_it_work_without_end(path: str, body: dict[str, Any], status: int) -> None:
    async with serving() as client:
        began = time.monotonic()
        got = await client.post(json.dumps({"messages": [{"role": "user"}], "model": "m", **body}).encode(), path)
        assert got.status == status and got.error["type"] == "invalid_request_error"
        assert time.monotonic() - began < 3
        assert (await client.post(chat())).status == 200


@in_rows("depth", [500, 900, 960, 990, 100_000])
async def test_a_deep_request_is_answered_or_refused(depth: int) -> None:
    async with serving(sigma=0.1) as client:
        deep = b'{"model": "m", "messages": [{"role": "user"}], "x": %b%b}' % (b"[" * depth, b"]" * depth)
        assert (await client.post(deep)).status in (200, 400)
        assert (await client.post(chat())).status == 200


async def test_the_limits_themselves_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stand_in_http, "BODY_LIMIT", 100_000)
    body = json.dumps(chat()).encode()
    async with serving() as client:
        assert (await client.post(body.ljust(100_000), padding="a" * 65_000)).status == 200
        assert (await client.post(body.ljust(100_001))).status == 413


async def test_a_refused_client_that_is_still_sending_can_read_why() -> None:
    async with serving() as client:
        client.writer.write(b"POST / HTTP/1.1\r\ncontent-length: 40000000\r\n\r\n")
        for _ in range(400):
            client.writer.write(b"x" * 100_000)
            await client.writer.drain()
        assert (await client.reply()).status == 413


async def test_nothing_that_random_bytes_do_is_an_exception() -> None:
    alphabet = [b"POST ", CHAT.encode(), b" HTTP/1.1", b"\r\n", b"\r\n\r\n", b"content-length: ", b"12", b"\x00\xff",
                b"transfer-encoding: chunked", b"0\r\n\r\n", b'{"model": "\\ud800", "messages": [{}]}', b"close",
                b"expect: 100-continue", b"connection: ", request(chat("\ud800"))]
    draw, problems = random.Random(0), list[Any]()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
    async with serve(fault={"truncated": 0.1, "reset": 0.1}) as server:
        for _ in range(300):
            async with connect(server) as client:
                client.writer.write(b"".join(draw.choices(alphabet, k=draw.randrange(1, 30))))
                client.writer.write_eof()
                with contextlib.suppress(ConnectionError):
                    await client.reader.read()
        async with connect(server) as client:
            assert (await client.get("/v1/models")).status == 200
    assert not problems and server.stats.requests > 250 and server.stats.in_flight == 0


# --- Faults and limits --------------------------------------------------------------------------------------


@in_rows(("kind", "status", "check"), [
    ("429", 429, lambda got: got.error["code"] == "rate_limit_exceeded"),
    ("500", 500, lambda got: got.error["type"] == "server_error"),
    ("502", 502, lambda got: got.error["code"] == 502),
    ("503-html", 503, lambda got: got.headers["content-type"] == "text/html" and b"<h1>" in got.body),
    ("null-choices", 200, lambda got: got.json["choices"] is None),
    ("error-200", 200, lambda got: got.error["message"] and "choices" not in got.json),
    ("malformed", 200, lambda got: got.body.startswith(b'{"id":"chatcmpl-') and not got.body.endswith(b"}")),
    ("empty-html", 200, lambda got: got.headers["content-type"] == "text/html"),
])
async def test_faults_that_are_answers(kind: str, status: int, check: Any) -> None:
    async with serve(fault={kind: 1.0}) as server, connect(server) as client:
        for _ in range(2):  # they leave the connection as it was
            got = await client.post(chat())
            assert got.status == status and check(got), got
            assert ("x-request-id" in got.headers) == ("html" not in kind)  # a proxy knows nothing of that
        assert server.stats.faults == {kind: 2} and server.stats.answered == 0


@pytest.mark.parametrize(("path", "name"), [("responses", "output"), ("embeddings", "data")])
async def test_null_choices_have_other_names_elsewhere(path: str, name: str) -> None:
    async with serving(fault={"null-choices": 1.0}) as client:
        assert (await client.post({"model": "m", "input": "one"}, f"/v1/{path}")).json[name] is None


async def test_a_truncated_answer_ends_the_connection() -> None:
    for chunked in (False, True):
        async with serving(fault={"truncated": 1.0}, chunked=chunked) as client:
            with pytest.raises(asyncio.IncompleteReadError):
                await client.post(chat())
            assert await client.at_end()


async def test_a_reset_is_a_reset() -> None:
    async with serving(fault={"reset": 1.0}) as client:
        with pytest.raises(ConnectionResetError):
            await client.post(chat())


async def test_a_hung_request_is_in_flight_until_its_client_has_gone() -> None:
    async with serve(fault={"hang": 1.0}, knee=1, latency=9.0) as server:
        async with connect(server) as client, connect(server) as other:
            for each in (client, other):  # nor does it hold up the others at the knee
                each.writer.write(request(chat()))
            await until(lambda: server.stats.faults["hang"] == 2)
            assert server.stats.in_flight == 2
        await until(lambda: server.stats.in_flight == 0)


async def test_every_client_meets_the_same_fates() -> None:
    """Whatever the order of the requests, the connection, or the way the JSON is written."""
    prompts = [f"prompt {n}" for n in range(30)] * 3
    settings = {"fault": {"429": 0.2, "500": 0.2, "503-html": 0.2}, "seed": 3}

    async def fates(order: list[str], **style: Any) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        async with serving(**settings) as client:
            for prompt in order:
                got = await client.post(json.dumps(chat(prompt), **style).encode())
                found.setdefault(prompt, []).append(got.status)
        return found

    first = await fates(prompts)
    shuffled = random.Random(1).sample(prompts, len(prompts))
    assert await fates(shuffled, sort_keys=True, separators=(",", ":")) == first
    assert len({tuple(statuses) for statuses in first.values()}) > 10  # a second try is another draw
    settings["seed"] = 4
    assert await fates(prompts) != first


async def test_rejected_requests_do_not_change_the_fates() -> None:
    clock = Clock()
    async with serving(fault={"500": 0.5}) as client:
        expected = [(await client.post(chat())).status for _ in range(20)]
    found = []
    async with serving(fault={"500": 0.5}, rpm=60, burst=0, clock=clock) as client:
        for _ in range(20):
            found.append((await client.post(chat())).status)
            assert (await client.post(chat())).status == 429
            clock.now += 1
    assert found == expected and set(found) == {200, 500}


def test_shares_and_latencies_are_as_ordered() -> None:
    options = Options(latency=0.3, sigma=0.5, fault={"500": 0.05, "reset": 0.03})
    drawn = [stand_in.fate(options, b"%d" % n, 0) for n in range(20_000)]
    kinds = Counter(kind for kind, _ in drawn)
    logs = sorted(math.log(latency) for _, latency in drawn)
    assert kinds.keys() == {"", "500", "reset"}
    assert abs(kinds["500"] / 20_000 - 0.05) < 0.005 and abs(kinds["reset"] / 20_000 - 0.03) < 0.004
    assert abs(logs[10_000] - math.log(0.3)) < 0.02  # the median
    assert abs((logs[16_827] - logs[3_173]) / 2 - 0.5) < 0.02  # a standard deviation to each side


def test_fates_do_not_change_between_versions() -> None:
    options = Options(latency=1.0, sigma=1.0, fault={"500": 0.5})
    assert stand_in.fate(options, b"{}", 0) == ("", pytest.approx(1.0721310435))
    assert stand_in.fate(options, b"{}", 1) == ("500", pytest.approx(1.0721310435))


async def test_a_request_limit_is_worded_as_openai_does_and_refills() -> None:
    clock = Clock()
    async with serve(rpm=600, clock=clock) as server, connect(server) as client:
        first = await client.post(chat())
        assert first.headers["x-ratelimit-remaining-requests"] == "59"
        assert first.headers["x-ratelimit-reset-requests"] == "100ms"
        for _ in range(59):
            assert (await client.post(chat())).status == 200
        got = await client.post(chat())
        assert (got.status, got.error["code"], got.error["type"]) == (429, "rate_limit_exceeded", "requests")
        assert got.error["message"] == ("Rate limit reached for m on requests per min (RPM): Limit 600, Used 600, "
                                        "Requested 1. Please try again in 100ms.")
        assert (got.headers["retry-after"], got.headers["retry-after-ms"]) == ("1", "100")
        assert got.headers["x-ratelimit-remaining-requests"] == "0"
        assert got.headers["x-ratelimit-reset-requests"] == "6s"
        clock.now += 0.099
        assert (await client.post(chat())).status == 429
        clock.now += 0.001
        assert (await client.post(chat())).status == 200
        assert (await client.post(chat())).status == 429
        clock.now += 3600
        assert [(await client.post(chat())).status for _ in range(61)] == [200] * 60 + [429]
        assert server.stats.rejected == 4 and server.stats.by_status == {200: 121, 429: 4}


async def test_tokens_are_counted_as_prompt_and_maximum_output_times_n() -> None:
    async with serving(tpm=60_000, clock=Clock()) as client:  # 6,000 at once
        got = await client.post(chat("x" * 400, max_tokens=200, n=3))
        assert got.headers["x-ratelimit-remaining-tokens"] == str(6000 - 100 - 600)
        assert got.headers["x-ratelimit-reset-tokens"] == "700ms"
        got = await client.post(chat("x" * 400))  # it sets no maximum, so it costs what it gets
        left = 5300 - got.json["usage"]["total_tokens"]
        assert got.headers["x-ratelimit-remaining-tokens"] == str(left)
        got = await client.post({"model": "m", "input": ["x" * 400] * 2}, "/v1/embeddings")
        assert got.headers["x-ratelimit-remaining-tokens"] == str(left - 200)


async def test_a_request_above_the_limit_can_never_pass() -> None:
    async with serving(rpm=1000, tpm=6000, clock=Clock()) as client:
        got = await client.post(chat("x", max_tokens=6000))
        assert got.status == 429 and got.error["type"] == "tokens" and "retry-after" not in got.headers
        assert got.error["message"] == ("Request too large for m on tokens per min (TPM): Limit 6000, Requested 6001.")
        assert got.headers["x-ratelimit-remaining-requests"] == "100"  # it has cost nothing
    async with serving(rpm=60, tpm=6000, clock=Clock()) as client:
        for _ in range(6):
            assert (await client.post(chat("x", max_tokens=1))).status == 200
        assert "RPM" in (await client.post(chat("x", max_tokens=1))).error["message"]
        assert "too large" in (await client.post(chat("x", max_tokens=6000))).error["message"]  # which no wait mends


async def test_a_request_above_the_burst_leaves_a_debt() -> None:
    clock = Clock()
    async with serving(tpm=6000, clock=clock) as client:  # 600 at once
        assert (await client.post(chat("x", max_tokens=1599))).status == 200
        got = await client.post(chat("x", max_tokens=99))
        assert "Used 6000, Requested 100. Please try again in 11s." in got.error["message"]
        clock.now += 11
        assert (await client.post(chat("x", max_tokens=99))).status == 200


async def test_limits_may_be_silent() -> None:
    async with serving(rpm=60, burst=0, no_limit_headers=True) as client:
        assert not [name for name in (await client.post(chat())).headers if "ratelimit" in name]
        got = await client.post(chat())
        assert got.status == 429 and got.error["message"] == "Rate limit reached for m."
        assert not [name for name in got.headers if "ratelimit" in name or "retry" in name]


@pytest.mark.parametrize(("count_rejected", "answered"), [(False, 39), (True, 11)])
async def test_rejected_requests_may_count(count_rejected: bool, answered: int) -> None:
    """At twice the permitted rate half of the requests pass, or, where rejections count, the burst alone."""
    clock = Clock()
    settings: dict[str, Any] = {"rpm": 60, "burst": 0.1, "count_rejected": count_rejected}
    async with serve(**settings, clock=clock) as server, connect(server) as client:
        for _ in range(68):
            await client.post(chat())
            clock.now += 0.5
        assert (server.stats.answered, server.stats.rejected) == (answered, 68 - answered)
        clock.now += 1
        assert (await client.post(chat())).status == 200  # rejections leave no debt


def test_rounding_errors_cost_no_token() -> None:
    clock = Clock()
    bucket = stand_in_limits.Bucket("requests", 600, 0.1, clock)
    bucket.take(60)
    for _ in range(5):
        clock.now += 0.3
        bucket.level()
    assert bucket.level() < 15 == bucket.remaining() and not bucket.wait(15)


@in_rows(("seconds", "text"), [
    (0, "0s"), (0.0001, "1ms"), (0.012, "12ms"), (1, "1s"), (1.5, "1.5s"), (59.9999, "1m0s"), (360, "6m0s"),
    (61.25, "1m1.25s"), (3600, "1h0m0s"), (90061.001, "25h1m1.001s")])
def test_durations_are_written_as_go_does(seconds: float, text: str) -> None:
    assert stand_in_limits.duration(seconds) == text


@pytest.mark.parametrize(("status", "code"), [(429, "rate_limit_exceeded"), (503, "server_is_overloaded")])
async def test_more_than_the_maximum_in_flight_is_turned_away(status: int, code: str) -> None:
    async with serve(max_in_flight=1, reject_status=status, latency=9.0) as server:
        async with connect(server) as patient, connect(server) as client:
            patient.writer.write(request(chat()))
            await until(lambda: server.stats.in_flight)
            got = await client.post(chat())
            assert (got.status, got.error["code"]) == (status, code)
        assert server.stats.rejected == 1


async def test_beyond_the_knee_requests_queue() -> None:
    loop = asyncio.get_running_loop()
    async with serve(knee=2, latency=0.02) as server, contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connect(server)) for _ in range(8)]
        start = loop.time()
        clients[0].writer.write(request(chat()))
        await until(lambda: server.stats.in_flight == 1)
        waiting = [asyncio.create_task(client.post(chat())) for client in clients[1:7]]
        await until(lambda: server.stats.in_flight == 7)
        clients[7].writer.write(request(chat()))
        await until(lambda: server.stats.in_flight == 8)
        for leaving in (clients[0], clients[7]):  # one is being worked on and frees a slot, one is in the queue
            leaving.writer.transport.abort()
        await until(lambda: server.stats.in_flight == 6)
        await asyncio.gather(*waiting)
        assert loop.time() - start >= 0.06
        await clients[1].post(chat())  # by when a request that had been left in the queue would be done as well
        assert server.stats.max_in_flight == 8 and server.stats.in_flight == 0 and server.stats.answered == 7


async def test_a_quota_ends_everything() -> None:
    async with serving(quota=2) as client:
        got = [await client.post(chat()) for _ in range(4)]
        assert [each.status for each in got] == [200, 200, 429, 429]
        assert got[-1].error["code"] == got[-1].error["type"] == "insufficient_quota"


async def test_a_key_may_be_required() -> None:
    async with serving(require_key="sk-1") as client:
        assert (await client.post(chat(), authorization="Bearer sk-1")).status == 200
        for headers in ({}, {"authorization": "Bearer sk-12"}, {"authorization": "sk-1"}):
            got = await client.post(chat(), **headers)
            assert got.status == 401 and got.error["code"] == "invalid_api_key"
        assert (await client.get("/v1/models")).status == 401


async def test_models_may_be_few() -> None:
    async with serving(models=("m", "k")) as client:
        assert (await client.post(chat())).json["model"] == "m"
        got = await client.post(chat(model="other"))
        assert got.status == 404 and got.error["code"] == "model_not_found" and "`other`" in got.error["message"]
        listed = (await client.get("/v1/models")).json
        assert [model["id"] for model in listed["data"]] == ["m", "k"] and listed["object"] == "list"


@in_rows("settings", [
    {"fault": {"nonsense": 0.1}}, {"fault": {"500": 0.6, "429": 0.6}}, {"fault": {"500": -0.1}}, {"latency": -1},
    {"fault": {"500": math.nan}}, {"latency": math.inf}, {"sigma": math.nan}, {"knee": 0}, {"rpm": 0},
    {"reject_status": 200}, {"quota": -1}])
def test_nonsense_is_refused_at_once(settings: Any) -> None:
    with pytest.raises(ValueError, match=r"^--"):
        Options(**settings)


# --- Server and command line --------------------------------------------------------------------------------


async def test_the_stats_tell_what_the_server_saw() -> None:
    async with serve(latency=0.01, models=("m",)) as server, connect(server) as one, connect(server) as two:
        await asyncio.gather(one.post(chat()), two.post(chat("other")))
        await one.post(chat(model="unknown"))
        shown = (await two.get("/v1/stand_in/stats")).json
        assert shown == (await two.get("/v1/stand_in/stats")).json  # looking changes nothing
    assert shown["requests"] == 3 and shown["answered"] == 2 and shown["by_status"] == {"200": 2, "404": 1}
    assert shown["max_in_flight"] == 2 and shown["in_flight"] == 0 and shown["seconds"] >= 0.01
    assert 1.0 < shown["mean_in_flight"] <= 2.0
    assert str(server.stats) == "requests 3, answered 2, rejected 0, faults 0"


async def test_nothing_is_left_behind() -> None:
    tasks = asyncio.all_tasks()
    async with serve(latency=9.0) as server, connect(server) as client, connect(server) as idle:
        client.writer.write(request(chat()))
        await until(lambda: server.stats.in_flight)
        await server.close()
        assert not server.links and server.stats.in_flight == 0
        assert asyncio.all_tasks() == tasks and await idle.at_end()
        with pytest.raises(ConnectionRefusedError):
            async with connect(server):
                pass


async def test_tls(tmp_path: Path) -> None:
    if not (openssl := shutil.which("openssl")):
        pytest.skip("needs the openssl command to make a certificate")
    pem = tmp_path / "both.pem"
    subprocess.run([openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                    "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2",
                    "-keyout", pem, "-out", tmp_path / "cert.pem"], check=True, capture_output=True)
    pem.write_bytes(pem.read_bytes() + (tmp_path / "cert.pem").read_bytes())
    trust = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
    async with serve(tls=str(pem)) as server:
        assert server.url.startswith("https://127.0.0.1:")
        async with connect(server, ssl=trust) as client:
            assert (await client.post(chat("long " * 30_000))).status == 200
            assert (await client.post(b"{")).status == 400
        async with connect(server, ssl=trust) as client:
            client.writer.write(b"\x00")
            assert (await client.reply()).status == 400 and await client.at_end()


@contextlib.contextmanager
def started(*arguments: str, **more: Any) -> Iterator[tuple[subprocess.Popen[str], str]]:
    pipe = subprocess.PIPE
    command = [sys.executable, *arguments, "--port", "0"]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, **more) as process:
        try:
            assert process.stdout
            line = process.stdout.readline()
            match = re.fullmatch(r"stand-in server at http://(127\.0\.0\.1:\d+)/v1\n", line)
            assert match, (line, process.stderr and process.stderr.read())
            yield process, match[1]
        finally:
            process.kill()


def ask(address: str) -> int:
    connection = http.client.HTTPConnection(address, timeout=5)
    connection.request("POST", CHAT, json.dumps(chat()))
    status = connection.getresponse().status
    connection.close()
    return status


def test_as_a_module_it_serves_until_its_input_ends() -> None:
    module = ["-m", "concurrent_prompts.extras.stand_in", "--exit-on-eof", "--fault", "500=1", "--seed", "5"]
    with started(*module, cwd=FOLDER.parent) as (process, address):
        assert ask(address) == 500
        assert process.communicate(timeout=5) == ("", "requests 1, answered 0, rejected 0, faults 1\n")
        assert process.returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to send")
def test_without_the_core_it_serves_until_it_is_told_to_stop(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "extras")
    with started("-m", "extras.stand_in", cwd=tmp_path) as (process, address):
        assert ask(address) == 200
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=5) == ("", "requests 1, answered 1, rejected 0, faults 0\n")
        assert process.returncode == 0


@pytest.mark.parametrize(("arguments", "message"), [
    (["--fault", "nonsense=1"], "nonsense is unknown"), (["--fault", "500"], "--fault"),
    (["--knee", "0"], "--knee must be"), (["--latncy", "1"], "--latncy")])
def test_nonsense_on_the_command_line_is_one_line(arguments: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        stand_in.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--tls", "/no/such/file"], ["--host", "256.0.0.1"], ["--port", "70000"]])
def test_what_cannot_be_served_is_one_line(arguments: list[str], capsys: Any) -> None:
    kept = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        assert stand_in.main(arguments) == 2
    finally:
        for number, handler in kept:
            signal.signal(number, handler)
    assert re.fullmatch(r"stand_in: cannot serve at .+\n", capsys.readouterr().err)


def test_the_number_of_open_files_is_raised_but_never_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    endless, found = resource.RLIM_INFINITY, list[Any]()
    limits = iter([(256, endless), (1024, 4096), (20_000, endless), (endless, endless)])
    monkeypatch.setattr(resource, "getrlimit", lambda _: next(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: found.append(both))
    for _ in range(4):
        stand_in.allow_many_connections()
    assert found == [(10_240, endless), (4096, 4096)]


def test_the_manual_and_the_parser_agree(capsys: Any) -> None:
    with pytest.raises(SystemExit, match="0"):
        stand_in.main(["--help"])
    manual = capsys.readouterr().out
    assert manual.strip() == (stand_in.__doc__ or "").strip()
    described = set(re.findall(r"--[a-z-]+", manual))
    assert described == {f"--{item.name.replace('_', '-')}" for item in fields(Options)} | {"--exit-on-eof"}
    assert all(re.search(rf"\b{kind}\b", manual) for kind in (*FAULTS, *OUTAGES, *WINDOWS, *WINDOW_TELLS))
    defaults = vars(stand_in.make_parser().parse_args([]))
    for flag, default in re.findall(r"--([a-z-]+)[^\n]*\n?[^\n-]*?\bdefault ([\w.]+[\w])", manual):
        assert str(defaults[flag.replace("-", "_")]).removesuffix(".0") == default, flag


def test_it_needs_the_standard_library_alone() -> None:
    # each may import the ones before it
    layers = (
        "stand_in_answers", "stand_in_streams", "stand_in_dialects", "stand_in_limits", "stand_in_http",
        "stand_in_batches", "stand_in",
    )  # fmt: skip
    assert {file.stem for file in FOLDER.glob("stand_in*.py")} == set(layers)
    for place, name in enumerate(layers):
        nodes = list(ast.walk(ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))))
        beside = {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom) and node.level}
        found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        found |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
        assert beside <= set(layers[:place])
        assert {name.partition(".")[0] for name in found} <= set(sys.stdlib_module_names)


# ---- The manual ------------------------------------------------------------------------------------------------


def test_the_stand_in_has_a_manual(capsys):
    with pytest.raises(SystemExit, match="0"):
        stand_in_main(["--help"])
    assert "--latency" in capsys.readouterr().out
