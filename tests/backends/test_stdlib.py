"""The stdlib backend as an HTTP/1.1 client: scripted servers on loopback, and bytes fed to its protocol by hand."""

import asyncio
import base64
import contextlib
import gc
import gzip
import itertools
import os
import random
import socket
import ssl
import struct
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from concurrent_prompts.backends import Post, stdlib
from concurrent_prompts.backends.pool import Reuse
from concurrent_prompts.backends.stdlib import connect
from tests.helpers import in_rows

PATIENCE = 5  # seconds after which a test is hanging; none waits for it to pass


# ---- Servers and other helpers ---------------------------------------------------------------------------------------


@dataclass
class Request:
    """A request as the server read it, and the connection it came on."""

    head: bytes
    body: bytes
    connection: int
    number: int
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def header(self, name: str) -> str | None:
        for line in self.head.decode().split("\r\n")[1:]:
            key, _, value = line.partition(": ")
            if key.lower() == name.lower():
                return value
        return None

    async def until_closed(self) -> None:
        """Wait until the client has closed the connection."""
        with contextlib.suppress(OSError):
            while await self.reader.read(65536):
                pass


Script = Callable[[Request], Awaitable[bytes | None]]


@dataclass
class Server:
    """Answers each request with what `script` returns; None closes the connection."""

    script: Script
    requests: list[Request] = field(default_factory=list)
    connections: int = 0
    ended: list[int] = field(default_factory=list)
    url: str = ""
    port: int = 0
    read_body: bool = True

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        connection = self.connections
        with contextlib.suppress(OSError, EOFError):
            for number in itertools.count(1):
                head = await reader.readuntil(b"\r\n\r\n")
                request = Request(head, b"", connection, number, reader, writer)
                if self.read_body:
                    request.body = await reader.readexactly(int(request.header("content-length") or 0))
                self.requests.append(request)
                answer = await self.script(request)
                if answer is None or writer.is_closing():
                    break
                writer.write(answer)
                await writer.drain()
        self.ended.append(connection)
        writer.close()


@asynccontextmanager
async def serving(
    script: Script, *, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1", **options: Any
) -> AsyncIterator[Server]:
    """Run a server for the length of a block, and wait for its connections to end."""
    server = Server(script, **options)
    tasks: list[asyncio.Task[None]] = []
    writers: list[asyncio.StreamWriter] = []

    def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.create_task(server.handle(reader, writer)))
        writers.append(writer)

    listener = await asyncio.start_server(handle, host, 0, ssl=tls, limit=2**20)
    server.port = listener.sockets[0].getsockname()[1]
    server.url = f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{server.port}/v1"
    try:
        async with asyncio.timeout(PATIENCE):
            yield server
    finally:
        listener.close()
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        for writer in writers:
            writer.transport.abort()
        await listener.wait_closed()
        await asyncio.sleep(0)
    assert not [end for end in ends if isinstance(end, Exception)]


@asynccontextmanager
async def listening(words: bytes, *, greeting: bool = False) -> AsyncIterator[tuple[int, asyncio.Event, asyncio.Event]]:
    """Accept connections and say some words, as a greeting or to the first byte; give the port, and when it was
    spoken to and hung up on."""
    asked, ended = asyncio.Event(), asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            if not greeting:
                await reader.read(1)
            writer.write(words)
            asked.set()
            while await reader.read(65536):
                pass
        writer.close()
        ended.set()

    listener = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with asyncio.timeout(PATIENCE):
        yield listener.sockets[0].getsockname()[1], asked, ended
    listener.close()
    await listener.wait_closed()


def always(answer: bytes | None) -> Script:
    """Answer every request with the same bytes."""

    async def script(request: Request) -> bytes | None:
        return answer

    return script


def then_close(answer: bytes) -> Script:
    """Answer with some bytes and end the connection."""

    async def script(request: Request) -> None:
        request.writer.write(answer)

    return script


def answer(body: bytes = b"{}", status: str = "200 OK", *lines: str) -> bytes:
    """A plain answer with a Content-Length."""
    head = "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *lines])
    return head.encode() + b"\r\n\r\n" + body


def chunked(body: bytes, size: int = 7, *lines: str) -> bytes:
    """The same in chunks."""
    head = "\r\n".join(["HTTP/1.1 200 OK", "Transfer-Encoding: chunked", *lines]).encode() + b"\r\n\r\n"
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    return head + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


class FakeTransport:
    """What the protocol needs of a transport, for bytes fed by hand."""

    def __init__(self) -> None:
        self.closed = False
        self.unsent = 0
        self.written = b""

    def is_closing(self) -> bool:
        return self.closed

    def abort(self) -> None:
        self.closed = True

    def write(self, data: bytes) -> None:
        assert not self.closed
        self.written += data

    def get_write_buffer_size(self) -> int:
        return self.unsent


def made() -> tuple[Any, FakeTransport]:
    """Return a connection and its transport."""
    transport = FakeTransport()
    connection = stdlib._Connection({}, stdlib._Outbox(), memoryview(bytearray(stdlib.BUFFER)))
    connection.connection_made(transport)  # type: ignore[arg-type]
    return connection, transport


def feed(pieces: list[bytes], *, end: bool = True) -> tuple[Any, bool]:
    """Give a connection its answer in these pieces; return answer or error, and whether it may be reused."""
    connection, transport = made()
    future = connection.send(b"")
    for piece in pieces:
        for at in range(0, len(piece), stdlib.BUFFER):
            part = piece[at : at + stdlib.BUFFER]
            if not transport.closed:  # a real transport reads no more, either
                connection.get_buffer(-1)[: len(part)] = part
                connection.buffer_updated(len(part))
    reusable = future.done() and not transport.closed
    if end and not transport.closed:
        connection.eof_received()
    if end:
        connection.connection_lost(None)
    assert future.done(), "neither an answer nor an error"
    error = future.exception()
    if error:
        assert isinstance(error, ConnectionError)
        assert str(error) and "\n" not in str(error)
        return str(error), reusable
    status, headers, body = future.result()
    return (status, dict(headers), body), reusable


@pytest.fixture(autouse=True)
async def clean(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """No proxies but a test's own; nothing that only the event loop's log would know of; no unclosed sockets."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUEST_METHOD"):
            monkeypatch.delenv(name)
    problems: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: problems.append(context))
    yield
    gc.collect(1)  # the oldest generation holds nothing of this test, and takes its time
    assert not problems


# ---- Framing ---------------------------------------------------------------------------------------------------------

GZIP = gzip.compress(b"hello " * 100, mtime=0)
RAW = zlib.compressobj(wbits=-15)
DEFLATE = RAW.compress(b"hello " * 100) + RAW.flush()
HELLO = b"hello " * 100

# name: bytes, status, body, whether the connection is kept
FRAMINGS: dict[str, tuple[bytes, int, bytes, bool]] = {
    "content-length": (answer(b"body"), 200, b"body", True),
    "empty body": (answer(b""), 200, b"", True),
    "no reason phrase": (answer(b"{}", "429 "), 429, b"{}", True),
    "no reason phrase, no space": (answer(b"{}", "429"), 429, b"{}", True),
    "redirect": (answer(b"", "302 Found", "Location: http://elsewhere/"), 302, b"", True),
    "lower case": (b"HTTP/1.1 200 ok\r\ncontent-length:2\r\n\r\nhi", 200, b"hi", True),
    "mixed case, spaces": (b"HTTP/1.1 200 OK\r\nCONTENT-length: \t2 \r\n\r\nhi", 200, b"hi", True),
    "bytes beyond ASCII": (answer(b"hi", "200 \xc3\xa9", "X-Name: \xff"), 200, b"hi", True),
    "leading zeros": (b"HTTP/1.1 200 OK\r\nContent-Length: 0002\r\n\r\nhi", 200, b"hi", True),
    "head's end in the body": (answer(b"\r\n\r\nHTTP/1.1 \r\n\r\n"), 200, b"\r\n\r\nHTTP/1.1 \r\n\r\n", True),
    "larger than the buffer": (answer(b"x" * 100_000), 200, b"x" * 100_000, True),
    "chunked": (chunked(HELLO), 200, HELLO, True),
    "chunks larger than the buffer": (chunked(b"x" * 100_000, 40_000), 200, b"x" * 100_000, True),
    "chunked, in capitals": (chunked(b"hi").replace(b"chunked", b"CHUNKED"), 200, b"hi", True),
    "chunk extensions": (
        b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;a;b="c d"\r\nhi\r\n0;z\r\n\r\n',
        *(200, b"hi", True),
    ),
    "hexadecimal sizes": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0A \r\n0123456789\r\nb\r\n0123456789a\r\n00\r\n\r\n",
        *(200, b"01234567890123456789a", True),
    ),
    "trailer": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nX-A: 1\r\nContent-Length: 9\r\n\r\n",
        *(200, b"hi", True),
    ),
    "close-delimited": (b"HTTP/1.1 200 OK\r\nServer: x\r\n\r\nto the end", 200, b"to the end", False),
    "close-delimited and empty": (b"HTTP/1.1 200 OK\r\n\r\n", 200, b"", False),
    "204": (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b"", True),
    "304": (b"HTTP/1.1 304 Not Modified\r\nETag: x\r\n\r\n", 304, b"", True),
    "204 with a body": (b"HTTP/1.1 204 No Content\r\nContent-Length: 2\r\n\r\nhi", 204, b"", False),
    "interim answers": (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nContent-Length: 9\r\n\r\n" + answer(b"last"),
        *(200, b"last", True),
    ),
    "connection: close": (answer(b"hi", "200 OK", "Connection: close"), 200, b"hi", False),
    "connection: list": (answer(b"hi", "200 OK", "Connection: Upgrade , CLOSE"), 200, b"hi", False),
    "connection: twice": (answer(b"hi", "200 OK", "Connection: x", "Connection: close"), 200, b"hi", False),
    "connection: keep-alive": (answer(b"hi", "200 OK", "Connection: keep-alive"), 200, b"hi", True),
    "connection: closed": (answer(b"hi", "200 OK", "Connection: closed"), 200, b"hi", True),
    "HTTP/1.0": (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nhi", 200, b"hi", False),
    "chunked wins over a length": (
        chunked(b"hello world", 7, "Content-Length: 3"),
        *(200, b"hello world", False),
    ),
    "more than the length": (answer(b"hi") + b"HTTP/1.1 200 OK\r\n", 200, b"hi", False),
    "more than the chunks": (chunked(b"hi") + b"\r\n", 200, b"hi", False),
    "gzip": (answer(GZIP, "200 OK", "Content-Encoding: gzip"), 200, HELLO, True),
    "x-gzip, mixed case": (answer(GZIP, "200 OK", "content-encoding: X-GZip"), 200, HELLO, True),
    "gzip in chunks": (chunked(GZIP, 5, "Content-Encoding: gzip"), 200, HELLO, True),
    "gzip to the end": (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + GZIP, 200, HELLO, False),
    "gzip members": (answer(GZIP + GZIP, "200 OK", "Content-Encoding: gzip"), 200, HELLO * 2, True),
    "deflate": (answer(zlib.compress(HELLO), "200 OK", "Content-Encoding: deflate"), 200, HELLO, True),
    "deflate, no zlib header": (answer(DEFLATE, "200 OK", "Content-Encoding: deflate"), 200, HELLO, True),
    "gzip of nothing": (answer(b"", "200 OK", "Content-Encoding: gzip"), 200, b"", True),
    "identity": (answer(b"hi", "200 OK", "Content-Encoding: identity"), 200, b"hi", True),
    "a charset for a coding": (answer(b"hi", "200 OK", "Content-Encoding: utf-8"), 200, b"hi", True),
}
framings = in_rows("name", FRAMINGS)


@framings
async def test_framing(name: str) -> None:
    raw, status, body, kept = FRAMINGS[name]
    closing = name.startswith(("close-delimited", "gzip to the end"))
    async with serving(then_close(raw) if closing else always(raw)) as server:
        async with connect(server.url, {}, 1) as post:
            for _ in range(2):
                got, headers, content = await post("/x", b"{}")
                assert (got, content) == (status, body)
                assert headers.get("no-such-header") is None
        assert [request.connection for request in server.requests] == ([1, 1] if kept else [1, 2])


@framings
async def test_every_split_gives_the_same_answer(name: str) -> None:
    raw, status, body, kept = FRAMINGS[name]
    (got, headers, content), reusable = feed([raw])
    assert (got, content, reusable) == (status, body, kept)
    if len(raw) < 2000:
        for at in range(1, len(raw)):
            assert feed([raw[:at], raw[at:]])[0] == (got, headers, content), at
        assert feed([raw[at : at + 1] for at in range(len(raw))])[0] == (got, headers, content)


@framings
async def test_every_cut_is_an_error_or_the_whole(name: str) -> None:
    raw = FRAMINGS[name][0]
    if name.startswith(("close-delimited", "gzip to the end", "more than")) or len(raw) > 2000:
        return
    whole = len(raw) - 2 if name == "204 with a body" else len(raw)
    for at in range(whole):
        result, reusable = feed([raw[:at]])
        assert isinstance(result, str) and not reusable, at


async def test_headers_are_a_mapping() -> None:
    head = "X-Request-ID: aB1", "Retry-After:\t5 ", "retry-after: 6", "x: ", "X-Request-ID-2: no"
    async with serving(always(answer(b"", "200 OK", *head))) as server, connect(server.url, {}, 1) as post:
        _, headers, _ = await post("/x", b"")
    assert dict(headers) == {
        "content-length": "0",
        "x-request-id": "aB1",
        "retry-after": "5",
        "x": "",
        "x-request-id-2": "no",
    }
    assert len(headers) == 5
    assert headers.get("x-request") is None and headers.get("ok", "fallback") == "fallback"
    assert "retry-after" in headers and "retry" not in headers
    with pytest.raises(KeyError):
        headers["request-id"]


# ---- Malformed answers and limits ------------------------------------------------------------------------------------

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"

# name: bytes, part of the message. The server then waits: nothing may depend on its closing the connection.
MALFORMED: dict[str, tuple[bytes, str]] = {
    "not HTTP": (b"SSH-2.0-OpenSSH_9.6\r\n", "not an HTTP/1.1 answer: b'SSH-2.0"),
    "TLS alert": (b"\x15\x03\x01\x00\x02\x02\x46", "not an HTTP/1.1 answer"),
    "HTTP/2": (b"HTTP/2 200\r\n\r\n", "not an HTTP/1.1 answer"),
    "HTTP/11": (b"HTTP/11 200 OK\r\n\r\n", "not an HTTP/1.1 answer"),
    "lower-case http": (b"http/1.1 200 OK\r\n\r\n", "not an HTTP/1.1 answer"),
    "empty line first": (b"\r\n" + answer(), "not an HTTP/1.1 answer"),
    "no status": (b"HTTP/1.1\r\n\r\n", "not an HTTP/1.1 answer"),
    "no status, a space": (b"HTTP/1.1 \r\n\r\n", "not an HTTP/1.1 answer"),
    "a word for a status": (b"HTTP/1.1 OK\r\n\r\n", "not an HTTP/1.1 answer"),
    "status of two digits": (b"HTTP/1.1 20 OK\r\n\r\n", "not an HTTP/1.1 answer"),
    "status of four digits": (b"HTTP/1.1 2000 OK\r\n\r\n", "not an HTTP/1.1 answer"),
    "status 099": (b"HTTP/1.1 099 OK\r\n\r\n", "not an HTTP/1.1 answer"),
    "negative status": (b"HTTP/1.1 -20 OK\r\n\r\n", "not an HTTP/1.1 answer"),
    "status of other digits": ("HTTP/1.1 \u0662\u0660\u0660 OK\r\n\r\n".encode(), "not an HTTP/1.1 answer"),
    "two spaces": (b"HTTP/1.1  200 OK\r\n\r\n", "not an HTTP/1.1 answer"),
    "NUL in the reason": (b"HTTP/1.1 200 O\0K\r\n\r\n", "not an HTTP/1.1 answer"),
    "escape in the reason": (b"HTTP/1.1 200 \x1b[31m\r\n\r\n", "not an HTTP/1.1 answer"),
    "bare line feeds": (b"HTTP/1.1 200 OK\nContent-Length: 2\n\nhi", "not an HTTP/1.1 answer"),
    "one bare line feed": (OK + b"X: 1\nContent-Length: 2\r\n\r\nhi", "malformed header line: b'X: 1\\n'"),
    "bare line feed, no end": (OK + b"Content-Length: 2\n", "malformed header line"),
    "bare carriage return": (OK + b"X: 1\rContent-Length: 2\r\n\r\nhi", "malformed header line"),
    "folded line": (OK + b"X: 1\r\n 2\r\nContent-Length: 2\r\n\r\nhi", "malformed header line: b' 2"),
    "folded length": (OK + b"Content-Length:\r\n 2\r\n\r\nhi", "malformed header line"),
    "space before the colon": (OK + b"Content-Length : 2\r\n\r\nhi", "malformed header line"),
    "no colon": (OK + b"Content-Length 2\r\n\r\nhi", "malformed header line"),
    "no name": (OK + b": 2\r\n\r\nhi", "malformed header line"),
    "NUL in a value": (OK + b"X: \0\r\nContent-Length: 2\r\n\r\nhi", "malformed header line"),
    "NUL in a name": (OK + b"Content-\0Length: 2\r\n\r\nhi", "malformed header line"),
    "two lengths": (OK + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nhi!", "bad Content-Length: b'2,3'"),
    "two lengths, far apart": (OK + b"content-length: 3\r\nX: y\r\nCONTENT-LENGTH: 2\r\n\r\nhi!", "bad Content-Length"),
    "list of lengths": (OK + b"Content-Length: 2, 3\r\n\r\nhi!", "bad Content-Length"),
    "negative length": (OK + b"Content-Length: -1\r\n\r\n", "bad Content-Length"),
    "signed length": (OK + b"Content-Length: +2\r\n\r\nhi", "bad Content-Length"),
    "hexadecimal length": (OK + b"Content-Length: 0x2\r\n\r\nhi", "bad Content-Length"),
    "length with underscore": (OK + b"Content-Length: 1_0\r\n\r\n0123456789", "bad Content-Length"),
    "fractional length": (OK + b"Content-Length: 2.0\r\n\r\nhi", "bad Content-Length"),
    "empty length": (OK + b"Content-Length:\r\n\r\nhi", "bad Content-Length"),
    "other digits": (OK + "Content-Length: \u0662\r\n\r\nhi".encode(), "bad Content-Length"),
    "5,000 digits": (OK + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", "bad Content-Length"),
    "length over the limit": (OK + b"Content-Length: 268435457\r\n\r\n", "the body is longer than 268435456 bytes"),
    "gzip as transfer coding": (OK + b"Transfer-Encoding: gzip\r\n\r\n", "unknown transfer coding: b'gzip'"),
    "gzip, chunked": (OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n", "unknown transfer coding"),
    "chunked twice": (CHUNKED[:-2] + b"Transfer-Encoding: chunked\r\n\r\n", "unknown transfer coding"),
    "chunked, nearly": (OK + b"Transfer-Encoding: xchunked\r\n\r\n", "unknown transfer coding"),
    "no chunk size": (CHUNKED + b"\r\n", "bad chunk size"),
    "chunk size 0x10": (CHUNKED + b"0x10\r\n0123456789abcdef\r\n0\r\n\r\n", "bad chunk size"),
    "chunk size -1": (CHUNKED + b"-1\r\nx\r\n0\r\n\r\n", "bad chunk size"),
    "chunk size +1": (CHUNKED + b"+1\r\nx\r\n0\r\n\r\n", "bad chunk size"),
    "chunk size 1_0": (CHUNKED + b"1_0\r\n0123456789abcdef\r\n0\r\n\r\n", "bad chunk size"),
    "space before the size": (CHUNKED + b" 1\r\nx\r\n0\r\n\r\n", "bad chunk size"),
    "chunk size of a word": (CHUNKED + b"xyz\r\n", "bad chunk size"),
    "huge chunk size": (CHUNKED + b"f" * 15 + b"\r\n", "the body is longer"),
    "too huge chunk size": (CHUNKED + b"0" * 15 + b"1\r\nx\r\n", "bad chunk size"),
    "chunk size, bare line feed": (CHUNKED + b"1\nx\n0\n\n", "bad chunk size"),
    "NUL in an extension": (CHUNKED + b"1;\0\r\nx\r\n0\r\n\r\n", "bad chunk size"),
    "carriage return in an extension": (CHUNKED + b"1;\r1\r\nx\r\n0\r\n\r\n", "bad chunk size"),
    "endless size line": (CHUNKED + b"1;" + b"x" * 5000, "bad chunk size"),
    "chunk longer than its size": (CHUNKED + b"1\r\nxy\r\n0\r\n\r\n", "a chunk is longer than its size"),
    "chunk without its end": (CHUNKED + b"1\r\nx0\r\n\r\n", "a chunk is longer than its size"),
    "chunk ended by a line feed": (CHUNKED + b"1\r\nx\n0\r\n\r\n", "a chunk is longer than its size"),
    "trailer without colon": (CHUNKED + b"0\r\nX\r\n\r\n", "malformed trailer line"),
    "endless trailer line": (CHUNKED + b"0\r\nX:" + b"x" * 5000, "malformed trailer line"),
    "101 trailer lines": (CHUNKED + b"0\r\n" + b"X: 1\r\n" * 101 + b"\r\n", "more than 100 trailer lines"),
    "101 header lines": (OK + b"X: 1\r\n" * 101 + b"\r\n", "more than 100 header lines"),
    "header of 64 KiB": (OK + b"X: " + b"x" * 65536, "the header is longer than 65536 bytes"),
    "header of 64 KiB, ended": (OK + b"X: " + b"x" * 65536 + b"\r\n\r\n", "the header is longer than 65536 bytes"),
    "interim answers only": (b"HTTP/1.1 100 Continue\r\n\r\n" * 1000, "1000 interim answers (1xx) and no other"),
    "not gzip": (answer(b"hello", "200 OK", "Content-Encoding: gzip"), "the body is not gzip"),
    "not deflate": (answer(b"\xff\xff", "200 OK", "Content-Encoding: deflate"), "the body is not deflate"),
    "gzip cut short": (answer(GZIP[:-1], "200 OK", "Content-Encoding: gzip"), "the gzip body was cut short after 600"),
    "second member cut short": (
        answer(GZIP + GZIP[:20], "200 OK", "Content-Encoding: gzip"),
        "the gzip body was cut short",
    ),
    "gzip with a bad checksum": (
        answer(GZIP[:-8] + b"\0" * 8, "200 OK", "Content-Encoding: gzip"),
        "the body is not gzip",
    ),
    "garbage after gzip": (answer(GZIP + b"garbage", "200 OK", "Content-Encoding: gzip"), "the body is not gzip"),
    "101 gzip members": (
        answer(gzip.compress(b"") * 101, "200 OK", "Content-Encoding: gzip"),
        "more than 100 gzip members",
    ),
    "brotli": (answer(b"xx", "200 OK", "Content-Encoding: br"), "content coding that was not requested: b'br'"),
    "gzip twice": (answer(GZIP, "200 OK", "Content-Encoding: gzip, gzip"), "content coding that was not requested"),
}


@in_rows("name", MALFORMED)
async def test_malformed_answer_is_an_error_at_once(name: str) -> None:
    raw, message = MALFORMED[name]

    async def script(request: Request) -> None:
        request.writer.write(raw)
        await request.until_closed()

    async with serving(script) as server, connect(server.url, {}, 1) as post:
        with pytest.raises(ConnectionError) as caught:
            await post("/x", b"{}")
        assert message in str(caught.value)
        assert "\n" not in str(caught.value) and "\0" not in str(caught.value) and len(str(caught.value)) < 200
        assert len(server.requests) == 1


@in_rows("name", MALFORMED)
async def test_malformed_answer_in_single_bytes(name: str) -> None:
    raw, _ = MALFORMED[name]
    result, reusable = feed([raw[at : at + 1] for at in range(min(len(raw), 7000))] + [raw[7000:]], end=False)
    assert isinstance(result, str) and not reusable


@in_rows(
    ("start", "forever"),
    [
        (OK, b"X: y\r\n"),
        (OK, b"x" * 1000),
        (b"HTTP/1.1 ", b"1"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"", OK.replace(b"200", b"103") + b"Link: x\r\n\r\n"),
        (OK + b"\r\n", b"x" * 1000),
        (CHUNKED, b"3e8\r\n" + b"x" * 1000 + b"\r\n"),
        (CHUNKED, b"1"),
        (CHUNKED + b"1;", b"x"),
        (CHUNKED + b"0\r\n", b"X: y\r\n"),
        (OK + b"Content-Length: 100001\r\n\r\n", b"x"),
    ],
)
async def test_endless_answer_is_cut(start: bytes, forever: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stdlib, "MAX_BODY", 100_000)
    sent = 0

    async def script(request: Request) -> None:
        nonlocal sent
        request.writer.write(start)
        while True:
            request.writer.write(forever * (4096 // len(forever) + 1))
            sent += 4096
            await request.writer.drain()

    async with serving(script) as server, connect(server.url, {}, 1) as post:
        with pytest.raises(ConnectionError, match=r"longer than|more than|interim|not an HTTP|bad chunk size"):
            await post("/x", b"{}")
        while not server.ended:
            await asyncio.sleep(0)
    assert sent < 20_000_000


async def test_bodies_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stdlib, "MAX_BODY", 1000)
    for size, fits in (1000, True), (1001, False):
        body = b"x" * size
        for raw in (
            answer(body),
            chunked(body, 300),
            OK + b"\r\n" + body,
            answer(gzip.compress(body), "200 OK", "Content-Encoding: gzip"),
            answer(gzip.compress(body[:500]) + gzip.compress(body[500:]), "200 OK", "Content-Encoding: gzip"),
            chunked(zlib.compress(body), 7, "Content-Encoding: deflate"),
        ):
            result, _ = feed([raw])
            assert (result[2] == body) if fits else (result == "the body is longer than 1000 bytes"), raw[:100]


async def test_decompression_bomb_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stdlib, "MAX_BODY", 1_000_000)
    bomb = gzip.compress(b"\0" * 50_000_000)
    made: list[int] = []
    decompressobj = zlib.decompressobj

    class Spy:
        def __init__(self, window: int) -> None:
            self.stream = decompressobj(window)

        def decompress(self, data: bytes, limit: int) -> bytes:
            made.append(len(out := self.stream.decompress(data, limit)))
            return out

        def __getattr__(self, name: str) -> Any:
            return getattr(self.stream, name)

    monkeypatch.setattr(zlib, "decompressobj", Spy)
    result, _ = feed([answer(bomb, "200 OK", "Content-Encoding: gzip")])
    assert result == "the body is longer than 1000000 bytes"
    assert sum(made) == 1_000_001


@in_rows(
    ("raw", "message"),
    [
        (b"", "the server closed the connection without answering"),
        (b"HTTP/1.1 2", "the server closed the connection in the middle of its answer"),
        (OK, "the server closed the connection in the middle of its answer"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", "the server closed the connection in the middle of its answer"),
        (OK + b"Content-Length: 345\r\n\r\n" + b"x" * 120, "the server closed the connection after 120 of 345 bytes"),
        (OK + b"Content-Length: 1\r\n\r\n", "the server closed the connection after 0 of 1 bytes"),
        (CHUNKED + b"5\r\nhel", "the server closed the connection in the middle of its answer"),
        (CHUNKED + b"5\r\nhello\r\n0\r\n", "the server closed the connection in the middle of its answer"),
    ],
)
async def test_end_in_the_middle(raw: bytes, message: str) -> None:
    async with serving(then_close(raw)) as server, connect(server.url, {}, 1) as post:
        with pytest.raises(ConnectionError) as caught:
            await post("/x", b"{}")
        assert str(caught.value) == message
        assert server.connections == 1


@in_rows("raw", [b"", OK, answer(b"x" * 100)[:-1], CHUNKED + b"5\r\nhe", OK + b"\r\nto the end"])
async def test_reset_in_the_middle(raw: bytes) -> None:
    async def script(request: Request) -> None:
        request.writer.write(raw)
        linger = struct.pack("ii", 1, 0)
        request.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    async with serving(script) as server, connect(server.url, {}, 1) as post:
        with pytest.raises(ConnectionError, match=r"^connection lost: connection reset") as caught:
            await post("/x", b"{}")
        assert caught.value.__cause__
        assert server.connections == 1


# ---- Connections: reuse, re-sending, closing -------------------------------------------------------------------------


async def test_connections_are_reused_newest_first() -> None:
    started, go = asyncio.Semaphore(0), asyncio.Event()

    async def script(request: Request) -> bytes:
        started.release()
        await go.wait()
        return answer(request.body)

    async with serving(script) as server:
        async with connect(server.url, {}, 3) as post:
            tasks = [asyncio.ensure_future(post("/x", b"%d" % n)) for n in range(3)]
            for _ in tasks:
                await started.acquire()
            go.set()
            assert [body for _, _, body in await asyncio.gather(*tasks)] == [b"0", b"1", b"2"]
            for _ in range(5):
                await post("/x", b"")
            assert server.connections == 3
            assert len({request.connection for request in server.requests[3:]}) == 1
            assert server.ended == []
        while len(server.ended) < 3:
            await asyncio.sleep(0)


async def test_pool_keeps_no_more_than_concurrency() -> None:
    gate = asyncio.Barrier(4)

    async def script(request: Request) -> bytes:
        await gate.wait()
        return answer()

    async with serving(script) as server, connect(server.url, {}, 2) as post:
        await asyncio.gather(*(post("/x", b"") for _ in range(4)))
        while len(server.ended) < 2:
            await asyncio.sleep(0)
        assert server.connections == 4


async def persistently(post: Post, body: bytes) -> bytes:
    """Post a body, again where its connection was lost, as the core does; return what came."""
    for _ in range(7):
        with contextlib.suppress(ConnectionError):
            return (await post("/x", body))[2]
    return (await post("/x", body))[2]


async def test_a_connection_that_is_closed_is_never_used_again() -> None:
    async def script(request: Request) -> bytes | None:
        return answer(request.body) if request.number < 3 else None

    async with serving(script) as server, connect(server.url, {}, 1) as post:
        for n in range(7):
            assert (await post("/x", b"%d" % n))[2] == b"%d" % n
        # The second time within so few answers, and the server gets no reused connections.
        assert b"".join(request.body for request in server.requests) == b"012234456"
        assert server.connections == 5


async def test_sent_once_more_on_a_fresh_connection_after_a_stale_one() -> None:
    async def script(request: Request) -> bytes | None:
        return answer() if request.number == 1 and request.connection in (1, 3) else None

    async with serving(script) as server, connect(server.url, {}, 1) as post:
        await post("/x", b"1")
        with pytest.raises(ConnectionError, match="without answering"):
            await post("/x", b"2")
        await post("/x", b"3")
        sent = [(request.connection, request.body) for request in server.requests]
        assert sent == [(1, b"1"), (1, b"2"), (2, b"2"), (3, b"3")]


async def test_never_sent_twice_on_a_fresh_connection() -> None:
    async with serving(always(None)) as server, connect(server.url, {}, 1) as post:
        with pytest.raises(ConnectionError, match="without answering"):
            await post("/x", b"1")
        assert len(server.requests) == 1


@in_rows("start", [b"H", b"HTTP/1.1 100 Continue\r\n\r\n", answer(b"123")[:-1]])
async def test_never_sent_twice_after_a_byte_of_the_answer(start: bytes) -> None:
    async def script(request: Request) -> bytes | None:
        if request.number == 1:
            return answer()
        request.writer.write(start)
        return None

    async with serving(script) as server, connect(server.url, {}, 1) as post:
        await post("/x", b"1")
        with pytest.raises(ConnectionError):
            await post("/x", b"2")
        assert len(server.requests) == 2


async def test_unasked_bytes_close_an_idle_connection() -> None:
    got_first, ended = asyncio.Event(), asyncio.Event()

    async def script(request: Request) -> bytes | None:
        if request.connection > 1:
            return answer(b"second")
        request.writer.write(answer(b"first"))
        await got_first.wait()
        request.writer.write(answer(b"nobody asked"))
        await request.until_closed()
        ended.set()
        return None

    async with serving(script) as server, connect(server.url, {}, 1) as post:
        assert (await post("/x", b""))[2] == b"first"
        got_first.set()
        await ended.wait()
        assert (await post("/x", b""))[2] == b"second"


async def test_server_that_speaks_first() -> None:
    async with listening(answer(b"nobody asked"), greeting=True) as (port, _, ended):
        client = stdlib._Client(f"http://127.0.0.1:{port}", {}, 1)
        connection = await client._open()
        await ended.wait()
        with pytest.raises(ConnectionError, match="without answering"):
            await connection.send(b"")


async def test_an_answer_to_what_is_not_yet_written_is_none() -> None:
    connection, transport = made()
    future, early = connection.send(b"POST"), answer(b"too early")
    connection.get_buffer(-1)[: len(early)] = early
    connection.buffer_updated(len(early))
    assert transport.closed and not future.done()
    connection.connection_lost(None)
    with pytest.raises(ConnectionError, match="without answering"):
        await future
    await asyncio.sleep(0)
    assert transport.written == b""


async def test_the_requests_of_a_turn_are_written_at_its_end() -> None:
    connections = [made() for _ in range(3)]
    outbox = stdlib._Outbox()
    for number, (connection, _) in enumerate(connections):
        connection._outbox = outbox
        connection.send(b"%d" % number)
    assert [transport.written for _, transport in connections] == [b""] * 3
    connections[1][1].abort()
    await asyncio.sleep(0)
    assert [transport.written for _, transport in connections] == [b"0", b"", b"2"]


async def test_the_first_of_many_requests_do_not_wait_for_the_last() -> None:
    connections, outbox = [made() for _ in range(stdlib._Outbox.MOST + 1)], stdlib._Outbox()
    for connection, _ in connections:
        connection._outbox = outbox
        connection.send(b"x")
    assert [transport.written for _, transport in connections] == [b"x"] * stdlib._Outbox.MOST + [b""]
    await asyncio.sleep(0)
    assert connections[-1][1].written == b"x"


@in_rows("start", [b"", answer(b"first")[:-2], OK + b"\r\nfir", CHUNKED + b"5\r\nfir"])
async def test_cancelled_in_the_middle_of_an_answer(start: bytes) -> None:
    half, ended = asyncio.Event(), asyncio.Event()

    async def script(request: Request) -> bytes | None:
        if request.connection > 1:
            return answer(request.body)
        request.writer.write(start)
        half.set()
        await request.until_closed()
        ended.set()
        return None

    async with serving(script) as server, connect(server.url, {}, 1) as post:
        task = asyncio.ensure_future(post("/x", b"first"))
        await half.wait()
        await asyncio.sleep(0)  # the client reads what there is
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await post("/x", b"second"))[2] == b"second"
        await ended.wait()
        assert [request.connection for request in server.requests] == [1, 2]


async def test_cancelled_just_when_the_answer_is_there() -> None:
    async with serving(always(answer())) as server, connect(server.url, {}, 1) as post:
        task = asyncio.ensure_future(post("/x", b""))
        # The answer settles the future, and before the task wakes up to it the task is cancelled.
        advance = stdlib._Connection._advance

        def advance_and_cancel(self: stdlib._Connection, step: Any, value: Any) -> None:
            advance(self, step, value)
            task.cancel()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stdlib._Connection, "_advance", advance_and_cancel)
            with pytest.raises(asyncio.CancelledError):
                await task
        await post("/x", b"")
        assert [request.connection for request in server.requests] == [1, 2]


async def cancel_once(asked: asyncio.Event, post: Post) -> None:
    """Begin a request, and cancel it once it has been heard of."""
    task = asyncio.ensure_future(post("/x", b""))
    await asked.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_cancelled_while_connecting() -> None:
    async with (
        listening(b"") as (port, asked, ended),  # so that the TLS handshake waits
        connect(f"https://127.0.0.1:{port}", {}, 1) as post,
    ):
        await cancel_once(asked, post)
        assert await asyncio.wait_for(ended.wait(), 5), "the connection is still open"


async def test_busy_when_the_block_ends() -> None:
    asked, go, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def script(request: Request) -> None:
        asked.set()
        await go.wait()
        request.writer.write(answer(b"late"))
        await request.until_closed()
        ended.set()

    async with serving(script) as server:
        async with connect(server.url, {}, 1) as post:
            task = asyncio.ensure_future(post("/x", b""))
            await asked.wait()
        go.set()
        assert (await task)[2] == b"late"
        await ended.wait()


async def test_early_answer_to_a_body_not_read() -> None:
    ended = asyncio.Event()

    async def script(request: Request) -> bytes | None:
        if request.connection > 1:
            return answer(b"small")
        request.writer.write(answer(b"too large", "413 Content Too Large"))
        # Only now, when the answer is on its way, is the rest read: until the client has had enough.
        await request.until_closed()
        ended.set()
        return None

    async with serving(script, read_body=False) as server, connect(server.url, {}, 1) as post:
        status, _, body = await post("/x", b"x" * 50_000_000)
        assert (status, body) == (413, b"too large")
        await ended.wait()
        assert (await post("/x", b""))[2] == b"small"
        assert server.connections == 2


async def test_end_of_stream_while_a_large_body_is_written() -> None:
    go = asyncio.Event()

    async def script(request: Request) -> None:
        request.writer.write_eof()  # the server will say no more, and reads no more either
        await go.wait()

    async with serving(script, read_body=False) as server, connect(server.url, {}, 1) as post:
        with pytest.raises(ConnectionError, match="without answering"):
            await post("/x", b"x" * 50_000_000)
        go.set()


async def test_large_body_arrives_whole() -> None:
    body = random.Random(1).randbytes(20_000_000)

    async def script(request: Request) -> bytes:
        return answer(request.body)

    async with serving(script) as server, connect(server.url, {}, 1) as post:
        assert (await post("/x", body))[2] == body


async def test_no_answer_is_ever_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    dice = random.Random(2026)
    finished = cancelled = resent = 0

    async def script(request: Request) -> bytes | None:
        """Echo the body in some framing, in pieces with pauses; sometimes close, or die, or say too much."""
        body = request.body
        raw = dice.choice([answer(body), chunked(body, 9), chunked(gzip.compress(body), 11, "Content-Encoding: gzip")])
        extra = dice.choice([b""] * 8 + [b"HTTP", answer(b"nobody asked")])
        at = 0
        if request.number > 1 and dice.random() < 0.05:
            return None
        while at < len(raw) and not request.writer.is_closing():
            size = dice.choice([1, 5, 40, 1000])
            # What is too much comes with the end of the answer: later it could be the next one, for all we know.
            request.writer.write(raw[at : at + size] + (extra if at + size >= len(raw) else b""))
            at += size
            await asyncio.sleep(dice.choice([0, 0, 0.0005, 0.002]))
        return b"" if dice.random() < 0.9 else None

    async def one(n: int) -> None:
        nonlocal finished, cancelled
        body = b'{"prompt": %d, "filler": "%b"}' % (n, b"x" * dice.randrange(60))
        task = asyncio.ensure_future(persistently(post, body))
        if n % 5 == 0:
            asyncio.get_running_loop().call_later(dice.random() * 0.01, task.cancel)
        try:
            echoed = await task
        except asyncio.CancelledError:
            cancelled += 1
        else:
            assert echoed == body
            finished += 1

    async def worker() -> None:
        for n in numbers:
            await one(n)

    monkeypatch.setattr(Reuse, "MOST", 1000)  # else connections that die so often are not reused
    async with serving(script) as server, connect(server.url, {}, 20) as post:
        numbers = iter(range(400))
        await asyncio.gather(*(worker() for _ in range(20)))
        resent = len(server.requests) - len({request.body for request in server.requests})
        assert len(server.requests) > server.connections + 50, "hardly a connection was reused"
    assert finished + cancelled == 400
    assert cancelled > 10 and resent > 0


# ---- Connecting ------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_refused() -> None:
    port = free_port()
    async with connect(f"http://user:secret@127.0.0.1:{port}/v1", {}, 1) as post:
        with pytest.raises(ConnectionError) as caught:
            await post("/x", b"")
    assert str(caught.value) == f"cannot connect to 127.0.0.1:{port}: connection refused"
    assert isinstance(caught.value.__cause__, OSError)


def resolve(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    """Have every name stand for these addresses."""

    async def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
        if not addresses:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        kinds = {address: socket.AF_INET6 if ":" in address else socket.AF_INET for address in addresses}
        return [(kinds[address], socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)


async def test_unknown_name(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve(monkeypatch)
    async with connect("http://nowhere.test:8000", {}, 1) as post:
        with pytest.raises(ConnectionError) as caught:
            await post("/x", b"")
    assert str(caught.value) == "cannot connect to nowhere.test:8000: name or service not known"


async def test_name_with_two_addresses_of_which_one_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(always(answer(b"hi"))) as server:
        resolve(monkeypatch, "::1", "127.0.0.1")
        async with connect(f"http://localhost:{server.port}", {}, 1) as post:
            assert (await post("/x", b""))[2] == b"hi"


async def test_name_with_an_address_that_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    if not isinstance(loop, asyncio.BaseEventLoop):
        pytest.skip("this event loop tries addresses in turn")
    sock_connect = loop.sock_connect

    async def silent(sock: socket.socket, address: Any) -> None:
        if address[0] == "127.0.0.2":
            await asyncio.Event().wait()
        await sock_connect(sock, address)

    monkeypatch.setattr(loop, "sock_connect", silent)
    async with serving(always(answer(b"hi"))) as server:
        resolve(monkeypatch, "127.0.0.2", "127.0.0.1")
        async with connect(f"http://localhost:{server.port}", {}, 1) as post:
            assert (await post("/x", b""))[2] == b"hi"


async def test_name_with_two_addresses_of_which_none_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve(monkeypatch, "127.0.0.1", "127.0.0.2")
    port = free_port()
    async with connect(f"http://localhost:{port}", {}, 1) as post:
        with pytest.raises(ConnectionError) as caught:
            await post("/x", b"")
    assert str(caught.value) == f"cannot connect to localhost:{port}: connection refused"


async def test_request_as_sent() -> None:
    async with serving(always(answer())) as server:
        async with connect(server.url, {"Content-Type": "application/json", "Authorization": "Bearer k"}, 1) as post:
            await post("/chat/completions?api-version=1", b'{"a": 1}')
        assert server.requests[0].head.decode() == (
            "POST /v1/chat/completions?api-version=1 HTTP/1.1\r\n"
            f"Host: 127.0.0.1:{server.port}\r\n"
            "User-Agent: concurrent-prompts\r\n"
            "Accept: application/json\r\n"
            "Accept-Encoding: gzip, deflate\r\n"
            "Content-Type: application/json\r\n"
            "Authorization: Bearer k\r\n"
            "Content-Length: 8\r\n\r\n"
        )
        assert server.requests[0].body == b'{"a": 1}'


async def test_callers_header_replaces_ours() -> None:
    async with serving(always(answer())) as server:
        async with connect(server.url, {"host": "virtual.test", "USER-AGENT": "mine"}, 1) as post:
            await post("/x", b"")
        head = server.requests[0].head.lower()
        assert head.count(b"host:") == head.count(b"user-agent:") == 1
        assert server.requests[0].header("host") == "virtual.test"


@in_rows(
    ("base_url", "host", "url"),
    [
        ("http://name.test", "name.test", "/x"),
        ("http://name.test:80/v1", "name.test", "/v1/x"),
        ("HTTP://Name.Test:8080/V1", "name.test:8080", "/V1/x"),
        ("https://name.test:443/v1", "name.test", "/v1/x"),
        ("https://name.test:80/v1", "name.test:80", "/v1/x"),
        ("http://user:secret@name.test/v1", "name.test", "/v1/x"),
        ("http://[::1]:8000/v1", "[::1]:8000", "/v1/x"),
        ("http://[::1]/v1", "[::1]", "/v1/x"),
        ("http://b\u00fccher.test/v1", "xn--bcher-kva.test", "/v1/x"),
    ],
)
async def test_host_and_path_of_a_base_url(base_url: str, host: str, url: str) -> None:
    client = stdlib._Client(base_url, {}, 1)
    lines = client._head("POST", "/x").decode().split("\r\n")
    assert lines[:2] == [f"POST {url} HTTP/1.1", f"Host: {host}"]
    assert not any("secret" in line or "authorization" in line.lower() for line in lines)


async def test_ipv6() -> None:
    try:
        async with serving(always(answer(b"six")), host="::1") as server, connect(server.url, {}, 1) as post:
            assert (await post("/x", b""))[2] == b"six"
            assert server.requests[0].header("host") == f"[::1]:{server.port}"
    except OSError as error:
        if not isinstance(error, ConnectionError):
            pytest.skip("no IPv6 here")
        raise


@in_rows(
    "base_url",
    [
        *("", "api.test/v1", "ftp://api.test", "http://", "http:///v1", "http://:80/v1", "//api.test", "http://[::1/v"),
        *("http://api.test:port", "http://api.test:99999", "http://a..b/v1", "http://.test", f"http://{'a' * 64}.test"),
        *("http://api.test/v1\r\nX: y", "http://api.test/a b", "http://api.test/\n", " http://api.test", "http://a/\0"),
        *("http://api.test/v\u00e9", "http://user:hunter2@api.test:port", "http://user:hunter2@[::1/"),
        *("http://api.test/v1?a=b", "http://api.test/v1#a"),
    ],
)
async def test_bad_base_url(base_url: str) -> None:
    with pytest.raises(ValueError, match="the base URL must") as caught:
        async with connect(base_url, {}, 1):
            pass
    assert "hunter2" not in str(caught.value) and caught.value.__suppress_context__ | (caught.value.__context__ is None)


@in_rows(
    ("name", "value"),
    [
        *(("Authorization", f"Bearer hunter2{bad}") for bad in ("\n", "\r\nX: y", "\0", "\u2019", "\u00e9", "\x1b")),
        *((bad, "hunter2") for bad in ("", "A B", "A:", "A\r\nB", "\u00c4")),
        *((ours, "hunter2") for ours in ("Content-Length", "transfer-encoding", "CONNECTION")),
    ],
)
async def test_bad_header(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=r"^header") as caught:
        async with connect("http://api.test", {name: value}, 1):
            pass
    assert "hunter2" not in str(caught.value)


@in_rows("path", ["", "x", "http://elsewhere/", "/a b", "/a\r\nX: y", "/\u00e9", "/\0"])
async def test_bad_path(path: str) -> None:
    async with connect("http://api.test", {}, 1) as post:
        with pytest.raises(ValueError, match="a path must"):
            await post(path, b"")


# ---- TLS -------------------------------------------------------------------------------------------------------------


@dataclass
class Authority:
    """A certificate authority of our own, in a file, and what servers need of it."""

    file: str
    ca: Any

    def server(self, *names: str) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.ca.issue_cert(*names).configure_cert(context)
        context.set_alpn_protocols(["h2", "http/1.1"])
        return context


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    trustme = pytest.importorskip("trustme")
    ca, file = trustme.CA(), tmp_path_factory.mktemp("ca") / "ca.pem"
    ca.cert_pem.write_to_path(file)
    return Authority(str(file), ca)


async def test_tls_with_a_certificate_we_trust(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", authority.file)
    spoken: set[Any] = set()

    async def script(request: Request) -> bytes:
        spoken.add(request.writer.get_extra_info("ssl_object").selected_alpn_protocol())
        return chunked(request.body, 50_000)

    async with serving(script, tls=authority.server("127.0.0.1")) as server:
        async with connect(server.url, {}, 5) as post:
            for round_ in range(3):
                bodies = [b"%d" % n * 50_000 * round_ for n in range(5)]
                assert [a[2] for a in await asyncio.gather(*(post("/x", b) for b in bodies))] == bodies
        assert server.connections <= 5
    assert spoken == {"http/1.1"}


async def test_tls_with_a_certificate_we_do_not_trust(authority: Authority) -> None:
    async with serving(always(answer()), tls=authority.server("127.0.0.1")) as server:
        async with connect(server.url, {"Authorization": "Bearer hunter2"}, 1) as post:
            with pytest.raises(ConnectionError, match="certificate not verified: unable to get local issuer") as caught:
                await post("/x", b"")
        assert isinstance(caught.value.__cause__, ssl.SSLCertVerificationError)
        assert not server.requests


async def test_tls_with_another_hosts_certificate(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", authority.file)
    async with serving(always(answer()), tls=authority.server("other.test")) as server:
        async with connect(server.url, {}, 1) as post:
            with pytest.raises(ConnectionError, match="certificate not verified: IP address mismatch") as caught:
                await post("/x", b"")
        assert isinstance(caught.value.__cause__, ssl.SSLCertVerificationError)
        assert not server.requests


async def test_tls_to_a_server_that_speaks_plain_http() -> None:
    async with (
        listening(b"HTTP/1.1 400 Bad Request\r\n\r\n") as (port, _, ended),
        connect(f"https://127.0.0.1:{port}", {}, 1) as post,
    ):
        with pytest.raises(ConnectionError, match=rf"^cannot connect to 127\.0\.0\.1:{port}: TLS: ") as caught:
            await post("/x", b"")
        assert isinstance(caught.value.__cause__, ssl.SSLError)
        await ended.wait()


async def test_tls_connection_closed_while_idle(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", authority.file)

    async def script(request: Request) -> bytes | None:
        return answer(request.body) if request.number == 1 else None

    async with serving(script, tls=authority.server("127.0.0.1")) as server, connect(server.url, {}, 1) as post:
        for n in range(4):
            assert await persistently(post, b"%d" % n) == b"%d" % n
        assert server.connections == 4


# ---- Proxies ---------------------------------------------------------------------------------------------------------


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    with contextlib.suppress(OSError):
        writer.close()


def tunnel(reply: bytes = b"HTTP/1.1 200 Connection established\r\n\r\n") -> Script:
    """Connect to where CONNECT asks for, and pass bytes to and fro."""

    async def script(request: Request) -> None:
        port = request.head.split()[1].rpartition(b":")[2]
        reader, writer = await asyncio.open_connection("127.0.0.1", int(port))
        try:
            request.writer.write(reply)
            await asyncio.gather(pump(request.reader, writer), pump(reader, request.writer))
        finally:
            writer.transport.abort()

    return script


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 200 Connection established\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nProxy-Agent: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
)
async def test_https_through_a_proxy(reply: bytes, authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", authority.file)

    async def script(request: Request) -> bytes:
        return answer(request.body)

    async with (
        serving(script, tls=authority.server("api.test")) as server,
        serving(tunnel(reply), read_body=False) as proxy,
    ):
        monkeypatch.setenv("HTTPS_PROXY", f"http://us%3Aer:p%40ss@127.0.0.1:{proxy.port}")
        async with connect(f"https://api.test:{server.port}/v1", {"Authorization": "Bearer k"}, 2) as post:
            assert [(await post("/x", b"%d" % n))[2] for n in range(3)] == [b"0", b"1", b"2"]
        assert proxy.requests[0].head.decode() == (
            f"CONNECT api.test:{server.port} HTTP/1.1\r\nHost: api.test:{server.port}\r\n"
            f"Proxy-Authorization: Basic {base64.b64encode(b'us:er:p@ss').decode()}\r\n\r\n"
        )
        assert len(proxy.requests) == server.connections == 1
        assert server.requests[0].head.startswith(b"POST /v1/x HTTP/1.1\r\n")
        assert server.requests[0].header("authorization") == "Bearer k"
        assert server.requests[0].header("proxy-authorization") is None


async def test_https_through_an_https_proxy(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", authority.file)

    async def script(request: Request) -> bytes:
        return answer(request.body)

    async with (
        serving(script, tls=authority.server("api.test")) as server,
        serving(tunnel(), tls=authority.server("127.0.0.1"), read_body=False) as proxy,
    ):
        monkeypatch.setenv("HTTPS_PROXY", f"https://127.0.0.1:{proxy.port}")
        async with connect(f"https://api.test:{server.port}/v1", {}, 1) as post:
            for body in b"0" * 40_000, b"1" * 40_000, b"":
                assert (await post("/x", body))[2] == body
        assert len(proxy.requests) == server.connections == 1


async def test_certificate_not_verified_through_a_proxy(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    async with (
        serving(always(answer()), tls=authority.server("api.test")) as server,
        serving(tunnel(), read_body=False) as proxy,
    ):
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
        async with connect(f"https://api.test:{server.port}/v1", {}, 1) as post:
            with pytest.raises(ConnectionError, match=r"through the proxy .*: certificate not verified") as caught:
                await post("/x", b"")
        assert isinstance(caught.value.__cause__, ssl.SSLCertVerificationError)
        assert not server.requests


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (answer(b"<html>", "407 Proxy Authentication Required"), "it answered CONNECT with status 407"),
        (b"HTTP/1.1 502 Bad Gateway\r\n\r\n", "it answered CONNECT with status 502"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://login/\r\n\r\n", "it answered CONNECT with status 302"),
        (b"HTTP/1.1 200 OK\r\n\r\nhello", "it closed the tunnel or sent data of its own through it"),
        (b"junk\r\n", "not an HTTP/1.1 answer: b'junk\\r\\n'"),
        (b"", "the server closed the connection without answering"),
    ],
)
async def test_proxy_that_refuses(reply: bytes, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(request: Request) -> None:
        request.writer.write(reply)
        if reply:
            await request.until_closed()

    async with serving(script) as proxy:
        monkeypatch.setenv("https_proxy", f"http://user:hunter2@127.0.0.1:{proxy.port}")
        async with connect("https://api.test/v1", {}, 1) as post:
            with pytest.raises(ConnectionError) as caught:
                await post("/x", b"")
        where = f"api.test:443 through the proxy 127.0.0.1:{proxy.port}"
        assert str(caught.value) == f"cannot connect to {where}: {message}"
        assert len(proxy.requests) == 1
        while not proxy.ended:
            await asyncio.sleep(0)


async def test_proxy_that_hangs_up_after_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(then_close(b"HTTP/1.1 200 OK\r\n\r\n")) as proxy:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.port}")
        async with connect("https://api.test/v1", {}, 1) as post:
            with pytest.raises(ConnectionError, match=r"^cannot connect to api\.test:443 through the proxy"):
                await post("/x", b"")


async def test_proxy_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("https_proxy", f"user:hunter2@127.0.0.1:{port}")
    async with connect("https://api.test/v1", {}, 1) as post:
        with pytest.raises(ConnectionError) as caught:
            await post("/x", b"")
    assert str(caught.value) == f"cannot connect to 127.0.0.1:{port}: connection refused"


async def test_cancelled_while_the_tunnel_is_dug(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, ended = asyncio.Event(), asyncio.Event()

    async def script(request: Request) -> None:
        request.writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        await request.reader.read(1)  # the TLS handshake, which is never answered
        asked.set()
        await request.until_closed()
        ended.set()

    async with serving(script) as proxy:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.port}")
        async with connect("https://api.test/v1", {}, 1) as post:
            await cancel_once(asked, post)
            assert await asyncio.wait_for(ended.wait(), 5), "the tunnel is still open"
        assert len(proxy.requests) == 1


async def test_http_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(always(answer(b"via"))) as proxy:
        monkeypatch.setenv("http_proxy", f"http://user:pass@127.0.0.1:{proxy.port}/")
        async with connect("http://me:secret@api.test:8000/v1", {}, 1) as post:
            for _ in range(2):
                assert (await post("/x", b"{}"))[2] == b"via"
        assert proxy.requests[0].head.startswith(b"POST http://api.test:8000/v1/x HTTP/1.1\r\nHost: api.test:8000\r\n")
        assert proxy.requests[0].header("proxy-authorization") == f"Basic {base64.b64encode(b'user:pass').decode()}"
        assert b"secret" not in proxy.requests[0].head
        assert proxy.connections == 1


@in_rows(
    ("environment", "base_url", "proxy"),
    [
        ({}, "http://api.test/v1", None),
        ({"HTTP_PROXY": "http://p.test:1"}, "http://api.test/v1", "p.test:1"),
        ({"HTTP_PROXY": "http://p.test:1"}, "https://api.test/v1", None),
        ({"HTTPS_PROXY": "http://p.test:1"}, "https://api.test/v1", "p.test:1"),
        ({"ALL_PROXY": "http://p.test:1"}, "https://api.test/v1", "p.test:1"),
        ({"all_proxy": "http://p.test:1", "http_proxy": "http://q.test:2"}, "http://api.test", "q.test:2"),
        ({"HTTP_PROXY": "http://p.test:1", "http_proxy": "http://q.test:2"}, "http://api.test", "q.test:2"),
        ({"HTTP_PROXY": "http://p.test:1", "REQUEST_METHOD": "GET"}, "http://api.test", None),
        ({"HTTP_PROXY": ""}, "http://api.test", None),
        ({"HTTP_PROXY": "p.test:1"}, "http://api.test", "p.test:1"),
        ({"HTTP_PROXY": "http://p.test"}, "http://api.test", "p.test:80"),
        ({"HTTP_PROXY": "https://p.test"}, "http://api.test", "p.test:443"),
        ({"HTTP_PROXY": "http://p.test:1", "NO_PROXY": "*"}, "http://api.test", None),
        ({"HTTP_PROXY": "http://p.test:1", "NO_PROXY": "x.test, api.test"}, "http://api.test", None),
        ({"HTTP_PROXY": "http://p.test:1", "no_proxy": ".test"}, "http://api.test", None),
        ({"HTTP_PROXY": "http://p.test:1", "NO_PROXY": "test"}, "http://api.test:99", None),
        ({"HTTP_PROXY": "http://p.test:1", "NO_PROXY": "api.test:99"}, "http://api.test:99", None),
        ({"HTTP_PROXY": "http://p.test:1", "NO_PROXY": "api.test:98"}, "http://api.test:99", "p.test:1"),
        ({"HTTP_PROXY": "http://p.test:1", "NO_PROXY": "i.test"}, "http://api.test:99", "p.test:1"),
        ({"HTTP_PROXY": "http://p.test:1", "NO_PROXY": "127.0.0.1"}, "http://127.0.0.1:99", None),
        ({"HTTP_PROXY": "http://p.test:1", "NO_PROXY": "::1"}, "http://[::1]:99", None),
    ],
)
async def test_which_proxy(
    environment: dict[str, str], base_url: str, proxy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    client = stdlib._Client(base_url, {}, 1)
    assert (str(client._hop) if client._hop != client._target else None) == proxy


@in_rows(
    ("url", "kind", "message"),
    [
        ("socks5://user:hunter2@p.test:1080", ConnectionError, "SOCKS proxy"),
        ("socks5h://p.test", ConnectionError, "SOCKS proxy"),
        ("SOCKS4://p.test", ConnectionError, "SOCKS proxy"),
        ("http://user:hunter2@p.test:port", ValueError, "the proxy for https must look like"),
        ("http://user:hunter2@p .test", ValueError, "the proxy for https must look like"),
        ("ftp://u:hunter2@p", ValueError, "the proxy for https must look like"),
    ],
)
@in_rows("variable", ["HTTPS_PROXY", "ALL_PROXY"])
async def test_proxies_that_cannot_be_used(
    variable: str, url: str, kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, url)
    with pytest.raises(kind, match=message) as caught:
        async with connect("https://api.test", {}, 1):
            pass
    assert "hunter2" not in str(caught.value)


# ---- Fuzzing and comparing -------------------------------------------------------------------------------------------

TOKENS = [
    *(b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b";", b",", b"0", b"-1", b"+5", b"0x10", b"1_0", b"\xff"),
    *(b"HTTP/1.1 ", b"Content-Length: 5\r\n", b"Content-Length: 6\r\n", b"Transfer-Encoding: chunked\r\n", b"\r\n\r\n"),
    *(b"Connection: close\r\n", b"Content-Encoding: gzip\r\n", b"0\r\n\r\n", b"1\r\nx\r\n", b"f" * 16, b"9" * 20),
    *(b"A" * 70_000, b"a: b\r\n" * 120, b"HTTP/1.1 100 Continue\r\n\r\n" * 25, b"\x1f\x8b\x08"),
]
SAMPLES = [raw for raw, *_ in FRAMINGS.values() if len(raw) < 2000]


def mutated(dice: random.Random) -> bytes:
    """Damage a good answer in one or a few places."""
    raw = bytearray(dice.choice(SAMPLES))
    for _ in range(dice.choice((1, 1, 1, 2, 3, 6))):
        at = dice.randrange(len(raw) + 1)
        end = at + dice.randrange(12)
        other = dice.choice(SAMPLES)
        start = dice.randrange(len(other))
        raw[at : dice.choice((at, end))] = dice.choice(
            (b"", bytes([dice.randrange(256)]), dice.choice(TOKENS), raw[at:end] * 2, other[start : start + 40])
        )
    return bytes(raw)


def pieces(raw: bytes, dice: random.Random) -> Iterator[bytes]:
    """Cut bytes into pieces of any sizes."""
    at = 0
    while at < len(raw):
        size = dice.choice((1, 2, 7, 100, 5000))
        yield raw[at : at + size]
        at += size


async def test_hostile_answers_settle_alike_however_they_are_split() -> None:
    answers = 0
    for seed in range(500):
        dice = random.Random(seed)
        raw = mutated(dice)
        whole, _ = feed([raw])
        again, _ = feed(list(pieces(raw, dice)))
        assert again == whole or (isinstance(again, str) and isinstance(whole, str)), seed
        answers += not isinstance(whole, str)
    assert 50 < answers < 450


async def test_same_answers_as_aiohttp() -> None:
    aiohttp = pytest.importorskip("aiohttp")
    dice = random.Random(7)

    def well_formed() -> bytes:
        body = dice.randbytes(dice.choice((0, 1, 10, 3000))) * dice.choice((1, 20))
        lines = [f"X-{n}: {'v' * dice.randrange(9)}" for n in range(dice.randrange(5))]
        if dice.random() < 0.5:
            body = dice.choice((gzip.compress(body), gzip.compress(body) * 2, zlib.compress(body)))
            lines.append(f"Content-Encoding: {'gzip' if body[:1] == bytes([31]) else 'deflate'}")
        if dice.random() < 0.2:
            lines.append("Connection: close")
        if dice.random() < 0.5:
            raw = chunked(body, dice.choice((1, 100, 5000) if len(body) < 5000 else (4000,)), *lines)
        else:
            raw = answer(body, dice.choice(("200 OK", "429 Too Many Requests", "500 ", "529 Site Overloaded")), *lines)
        return dice.choice((b"", b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n")) + raw

    samples = [well_formed() for _ in range(60)]

    async def script(request: Request) -> bytes:
        return samples[int(request.body)]

    async with serving(script) as server, connect(server.url, {}, 1) as post, aiohttp.ClientSession() as session:
        for n in range(len(samples)):
            status, headers, body = await post("/x", b"%d" % n)
            async with session.post(server.url + "/x", data=b"%d" % n) as theirs:
                assert (status, body) == (theirs.status, await theirs.read())
                assert dict(headers) == {name.lower(): value for name, value in theirs.headers.items()}
