"""HTTP/1.1 as the stand-in server speaks it: requests taken from a connection, replies written to it.

A Connection reads one request after the other, hands each to its server as a Job, and writes the reply; what becomes of
the request is the server's to decide. Whatever a client sends is bounded, and what is no HTTP is told so.
"""

from __future__ import annotations

import asyncio
import gzip
import os
import socket
import struct
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

from .stand_in_answers import REASONS, STREAM, Ask, Refusal, Reply

HEAD_LIMIT = 64 * 1024
BODY_LIMIT = 32 * 1024 * 1024
FILE_LIMIT = 200 * 1000 * 1000  # of an upload
TRAILER_LIMIT = 100  # lines after a chunked body
WINDOW = 16 * 1024  # bytes taken from a socket at a time; asyncio.Protocol's fresh 256 KiB for each read are slow
BEGINNING = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ntransfer-encoding: chunked\r\n\r\n"
LINGER = 1.0  # seconds that a rejected client that is still sending has to read the reply


class Head(NamedTuple):
    """The parts of a request's head that are used."""

    method: str
    path: str
    length: int | None  # None: chunked
    old: bool  # HTTP/1.0
    keep: bool  # the connection
    expect: bool  # 100-continue
    authorization: str
    api_key: str = ""  # Azure's header
    query: str = ""
    content_type: str = ""
    limit: int = 0  # of the body


UNREADABLE = Head("", "", 0, old=False, keep=False, expect=False, authorization="")
UNREPEATABLE = {"content-length", "transfer-encoding", "host"}


@lru_cache(256)  # a client's heads are all alike, and reading one costs as much as the rest of HTTP
def parse_head(raw: bytes) -> Head:
    line, *lines = raw.decode("latin-1").split("\r\n")
    found: dict[str, str] = {}
    for name, colon, value in (text.partition(":") for text in lines):
        name = name.lower()
        if not colon or not name or name != name.strip() or (name in found and name in UNREPEATABLE):
            raise Refusal(400, "Malformed header.")
        found[name] = value.strip(" \t")
    try:
        method, target, version = line.split(" ")
        old = {"HTTP/1.0": True, "HTTP/1.1": False}[version]
        url = urlsplit(target)  # a client that uses this server as a proxy sends a whole URL
    except (ValueError, KeyError):
        raise Refusal(400, "Malformed request line.") from None
    connection = found.get("connection", "").lower()
    limit = FILE_LIMIT + HEAD_LIMIT if (method, url.path) == ("POST", "/v1/files") else BODY_LIMIT
    return Head(method, url.path, body_length(found, limit), old, authorization=found.get("authorization", ""),
                api_key=found.get("api-key", ""),
                query=url.query, content_type=found.get("content-type", ""), limit=limit,
                keep="keep-alive" in connection if old else "close" not in connection,
                expect=not old and found.get("expect", "").lower() == "100-continue")


def body_length(headers: dict[str, str], limit: int) -> int | None:
    length, coding = headers.get("content-length", "0"), headers.get("transfer-encoding")
    if coding is not None and ("content-length" in headers or coding.lower() != "chunked"):
        raise Refusal(400, "Only 'Transfer-Encoding: chunked' is understood, and without Content-Length.")
    if not (length.isascii() and length.isdigit()):
        raise Refusal(400, "Malformed Content-Length.")
    if len(length) > 15 or int(length) > limit:
        raise Refusal(413, f"Request body larger than {limit} bytes.")
    return None if coding else int(length)


def encode(reply: Reply, head: Head, options: Any) -> tuple[bytes, bytes]:
    """Return the head and the body of a response as they go over the wire."""
    body, more = reply.file or reply.body.encode(), reply.headers
    if not head.keep:
        more += "connection: close\r\n"
    elif head.old:
        more += "connection: keep-alive\r\n"
    if options.gzip:
        body = gzip.compress(body, 1, mtime=0)
        more += "content-encoding: gzip\r\n"
    streamed = reply.content_type == STREAM
    if (options.chunked or streamed) and not head.old:
        half = len(body) // 2
        parts = [body[:half], body[half:]]
        if streamed and not options.gzip:  # an event each
            parts = [event + b"\n\n" for event in body.removesuffix(b"\n\n").split(b"\n\n")]
        body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (*parts, b""))
        more += "transfer-encoding: chunked\r\n"
    else:
        more += f"content-length: {len(body)}\r\n"
    status = f"{reply.status} {REASONS.get(reply.status, '')}"
    start = f"HTTP/1.1 {status}\r\ncontent-type: {reply.content_type}\r\n{more}\r\n"
    return start.encode("latin-1"), b"" if head.method == "HEAD" else body


@dataclass(slots=True, eq=False)
class Job:
    """One request, from its arrival to its answer."""

    link: Connection
    head: Head
    started: float
    ask: Ask | None = None
    fault: str = ""
    latency: float = 0.0
    timer: asyncio.TimerHandle | None = None  # while it is being worked on
    patience: asyncio.TimerHandle | None = None  # the gateway's
    blank: asyncio.TimerHandle | None = None  # until the next blank line
    counted: bool = False  # as a request
    left: bool = False  # its client has been answered or has gone


class Service(Protocol):
    """What connections and batches use of the server."""

    options: Any
    stats: Any
    clock: Callable[[], float]
    links: set[Connection]
    closed: bool

    def accept(self, job: Job, raw: bytes) -> None: ...

    def refuse(self, job: Job, reply: Reply) -> None: ...

    def drop(self, job: Job) -> None: ...

    def draw_fate(self, ask: Ask) -> tuple[str, float]: ...


class Connection(asyncio.BufferedProtocol):
    """Takes requests one after the other, so that pipelined ones are answered in order."""

    _transport: asyncio.Transport

    def __init__(self, server: Service) -> None:
        self._server = server
        self._job: Job | None = None  # the request that is being answered
        self._window = memoryview(bytearray(WINDOW))
        self._inbox = bytearray()
        self._reader = self._read()
        self._choked = False
        self._answers = 0
        self._begun = False  # the body of an answer, by a blank line

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's class is not a subclass of Transport
        self.abort = transport.abort  # type: ignore[attr-defined]
        self._server.links.add(self)
        if self._server.closed:
            transport.abort()  # type: ignore[attr-defined]

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.links.discard(self)
        if self._job:
            self._server.drop(self._job)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._window

    def buffer_updated(self, nbytes: int) -> None:
        self._inbox += self._window[:nbytes]
        self.advance()

    def pause_writing(self) -> None:
        self._choked = True

    def resume_writing(self) -> None:
        self._choked = False
        self.advance()

    def advance(self) -> None:
        """Read on: there are more bytes, or the last request has been answered."""
        try:
            next(self._reader)
        except Refusal as refusal:
            self._job = Job(self, UNREADABLE, self._server.clock())
            self._server.refuse(self._job, refusal.reply)
        except StopIteration:
            self._inbox.clear()  # the connection is being closed
        if (self._job or self._choked) and len(self._inbox) > HEAD_LIMIT:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def send(self, reply: Reply, cut: bool = False) -> None:
        """Write the response to the current request, or half of it, and hang up when it is time to."""
        assert self._job
        head, self._job = self._job.head, None
        start, body = encode(reply, head, self._server.options)
        if self._begun:  # too late for a status
            self._begun, raw = False, reply.file or reply.body.encode()
            start, body = b"", b"%x\r\n%b\r\n0\r\n\r\n" % (len(raw), raw)
        self._transport.write(start + (body[: len(body) // 2] if cut else body))
        self._answers += 1
        if head is UNREADABLE and self._transport.can_write_eof():
            # The rest of the request may be on its way, and would reset a closed connection under the answer.
            self._transport.write_eof()
            asyncio.get_running_loop().call_later(LINGER, self.abort)
        elif cut or not head.keep or self._answers == self._server.options.close_every:
            self._transport.close()

    def send_blank(self, comment: str = "") -> None:
        """Begin the answer to the current request, or go on with it, by a blank line; a stream's by a comment."""
        start = b"" if self._begun else BEGINNING % (STREAM if comment else "application/json").encode()
        self._begun = True
        line = f"{comment}\n\n".encode() if comment else b"\n"
        self._transport.write(start + b"%x\r\n%b\r\n" % (len(line), line))

    def cut_off(self) -> None:
        """Close the connection with a RST, whether its request was answered or not."""
        if self._job:
            self._server.drop(self._job)
        self.reset()

    def reset(self) -> None:
        """Hang up with a RST, as a crashed server or an impatient router does."""
        self._job = None
        linger = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)
        self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._transport.abort()

    def _read(self) -> Generator[None, None, None]:
        """Take the stream apart; each ``yield`` waits for more bytes."""
        while not self._transport.is_closing():
            raw = (yield from self._until(b"\r\n\r\n")).lstrip(b"\r\n")
            if not raw:
                continue
            head = parse_head(raw)
            if head.expect and not self._inbox:
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            body = yield from (self._chunks(head.limit) if head.length is None else self._exactly(head.length))
            self._job = Job(self, head, self._server.clock())
            self._server.accept(self._job, body)
            while self._job or self._choked:
                yield

    def _until(self, mark: bytes) -> Generator[None, None, bytes]:
        seen = 0
        while (end := self._inbox.find(mark, seen)) < 0 and len(self._inbox) <= HEAD_LIMIT:
            if self._inbox[:1].strip() and not self._inbox[:1].isalnum():
                raise Refusal(400, "This is not HTTP.")  # most likely TLS, whose client would wait for ever
            seen = max(0, len(self._inbox) - len(mark) + 1)
            yield
        if not 0 <= end <= HEAD_LIMIT:
            raise Refusal(431, f"Request header larger than {HEAD_LIMIT} bytes.")
        line = bytes(self._inbox[:end])
        del self._inbox[: end + len(mark)]
        return line

    def _exactly(self, size: int) -> Generator[None, None, bytes]:
        while len(self._inbox) < size:
            yield
        data = bytes(self._inbox[:size])
        del self._inbox[:size]
        return data

    def _chunks(self, limit: int) -> Generator[None, None, bytes]:
        body = bytearray()
        while True:
            digits = (yield from self._until(b"\r\n")).partition(b";")[0].strip()
            if not digits or digits.strip(b"0123456789abcdefABCDEF"):
                raise Refusal(400, "Malformed chunk.")
            size = int(digits, 16)
            if len(body) + size > limit:
                raise Refusal(413, f"Request body larger than {limit} bytes.")
            if not size:
                break
            body += yield from self._exactly(size)
            if (yield from self._exactly(2)) != b"\r\n":
                raise Refusal(400, "Malformed chunk.")
        for _ in range(TRAILER_LIMIT + 1):
            if not (yield from self._until(b"\r\n")):
                return bytes(body)
        raise Refusal(431, f"More than {TRAILER_LIMIT} trailer lines.")
