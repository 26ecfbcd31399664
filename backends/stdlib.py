"""HTTP/1.1 over asyncio with nothing installed: the `stdlib` backend.

It keeps connections alive, verifies TLS certificates (SSL_CERT_FILE and SSL_CERT_DIR count), goes
through the proxies that the environment names, reads Content-Length, chunked and close-delimited
bodies, decompresses gzip and deflate, and bounds whatever a server may send.

A request costs one write, usually one read, one future and one step of a parser. The parser is a generator:
it is sent the bytes as they come, waits for more wherever it stands, and returns the answer. It
lives for that one answer, so that nothing can be left over for the next; what outlives it only hands
over bytes and answers. Header lines are checked by a regular expression and then stay as they came
until one is looked up.

No request ever gets another's answer: a connection is used again only if the end of its last answer
was beyond doubt, nothing came after it and the request had been sent in full. Anything else closes
it, and so do a byte that arrives before a request has been written, an error, a status of 5xx (another
connection may lead to another replica), and the cancellation of `post`. A reused connection that ends
before the first byte of its reply is replaced by a fresh one, on which the request is sent again, once.

It does not:
  * speak HTTP/2, pipeline, or send anything but POST and GET
  * stream: bodies are held in memory, whole, in both directions
  * follow redirects, keep cookies, wait, time out, or retry a request on a connection that was fresh
  * use SOCKS proxies, or any content coding but gzip and deflate
"""

import asyncio
import base64
import os
import re
import socket
import ssl
import zlib
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping
from contextlib import asynccontextmanager
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeVar
from urllib.parse import SplitResult, unquote, urlsplit

from . import ALIVE, MAX_BODY, Post, check_certificates, proxy_for
from .pool import Reuse

__all__ = ["connect"]

MAX_HEAD = 64 * 1024  # bytes of a status line and its header lines
MAX_LINES = 100  # header lines of an answer, or trailer lines of a chunked body
MAX_INTERIM = 1000  # answers 1xx before the one that counts: some servers send one a second while they work
MAX_LINE = 4096  # bytes of a chunk-size or trailer line
MAX_MEMBERS = 100  # gzip members of a body
STEP = 1024 * 1024  # bytes that are decompressed at a time
UNANSWERED = "the server closed the connection without answering"
CUT = "the server closed the connection in the middle of its answer"
BUFFER = 64 * 1024  # bytes of one read

Answer = tuple[int, Mapping[str, str], bytes]
T = TypeVar("T")
Reading = Generator[None, bytes, T]  # is sent bytes and returns a T; the end of the stream is thrown in as EOFError
Split = tuple[bytes, bytes]  # what was looked for, and the bytes that came after it

_TEXT = rb"[^\0-\x08\n-\x1f\x7f]*+"  # a reason phrase or a value: no control character but the tab
_STATUS = rb"HTTP/1\.[0-9] ([1-9][0-9]{2})(?: %b)?\r\n"
_FIELD = rb"[!#$%%&'*+.^_`|~0-9A-Za-z-]++:%b\r\n"
_is_status = re.compile(_STATUS % _TEXT).fullmatch
_is_field = re.compile(_FIELD % _TEXT).fullmatch
_chunk_size = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;%b)?\r\n" % _TEXT).fullmatch
# A head is matched loosely, which is three times as fast, and what its lines hold is checked by deleting _TEXT_BYTES.
_match_head = re.compile(rb"%b(?:%b)*+\r\n" % (_STATUS % rb"[^\r]*+", _FIELD % rb"[^\r]*+")).match
_TEXT_BYTES = bytes({9, *range(32, 127), *range(128, 256)})
_LINE_ENDS = b"\r\n" * (1 + MAX_LINES + 1)  # the most that may be left: the status line and the empty one count too
_bare_line_feed = re.compile(rb"(?<!\r)\n").search
_framing_fields = re.compile(
    rb"\n(content-length|transfer-encoding|content-encoding|connection):[ \t]*+([^\r]*[^\r \t])?"
).findall
_says_close = re.compile(rb"(?:^|[ \t,])close(?:[ \t,]|$)").search


class Headers(Mapping[str, str]):
    """The header lines of one answer, found by lower-case name; of several with one name, the first."""

    __slots__ = ("_head", "_lower")

    def __init__(self, head: bytes, lower: bytes) -> None:
        self._head = head
        self._lower = lower

    def get(self, name: str, default: Any = None) -> Any:
        """Search the lines as they stand: cheaper than a dictionary of which little is ever used."""
        at = self._lower.find(b"\r\n%b:" % name.encode())
        if at < 0:
            return default
        start = at + len(name) + 3
        return self._head[start : self._head.find(b"\r\n", start)].strip(b" \t").decode("latin-1")

    def __getitem__(self, name: str) -> str:
        value: str | None = self.get(name)
        if value is None:
            raise KeyError(name)
        return value

    def __iter__(self) -> Iterator[str]:
        lines = self._lower.decode("latin-1").split("\r\n")[1:-2]
        return iter(dict.fromkeys(line.partition(":")[0] for line in lines))

    def __len__(self) -> int:
        return sum(1 for _ in self)


# ---- Parsing: generators that are sent the bytes of one answer -------------------------------------------------------


def _answers(tunnel: bool = False) -> Generator[tuple[Answer, bool] | None, bytes, None]:
    """Read the answers of one connection: yield None for more bytes, or an answer as `_answer` returns it."""
    data = yield None
    while True:
        data = yield (yield from _answer(data, tunnel))
        tunnel = False


def _answer(data: bytes, tunnel: bool) -> Reading[tuple[Answer, bool]]:
    """Read one answer, of which some bytes have come; return it, and whether its connection may be used again.

    The answer to CONNECT (`tunnel`) has no body, whatever its header lines say.
    """
    for _ in range(MAX_INTERIM):
        match = _match_head(data) or (yield from _until_head(data))
        head, data = match[0], match.string[match.end() :]
        if len(head) > MAX_HEAD or not _LINE_ENDS.startswith(head.translate(None, _TEXT_BYTES)):
            raise ConnectionError(_complaint(head))
        status = int(match[1])
        if status >= 200:
            break
    else:
        raise ConnectionError(f"{MAX_INTERIM} interim answers (1xx) and no other")
    lower = head.lower()
    fields = _fields(_framing_fields(lower))
    length = fields.get(b"content-length")
    if length and len(fields) == 1 + (fields.get(b"connection") == b"keep-alive") and status == 200 and not tunnel:
        body, data = yield from _body(_length(length), data)  # as most are
        return (200, Headers(head, lower), body), not data and head[:8] != b"HTTP/1.0"
    if tunnel or status in (204, 304):
        body = b""
    elif b"transfer-encoding" in fields:
        body, data = yield from _chunked_body(data, fields[b"transfer-encoding"])
    elif b"content-length" in fields:
        body, data = yield from _body(_length(fields[b"content-length"]), data)
    else:
        body, data = (yield from _endless_body(data)), b""
    if b"content-encoding" in fields and not tunnel:
        body = _decompress(body, fields[b"content-encoding"])
    reusable = not data and (tunnel or _persistent(head, status, fields))
    return (status, Headers(head, lower), body), reusable


def _until_head(data: bytes) -> Reading[re.Match[bytes]]:
    """Read until a head is whole."""
    seen = 0
    while (end := data.find(b"\r\n\r\n", seen)) < 0:
        # What can no longer become a head is refused at once, since its server may send no more.
        if len(data) > MAX_HEAD or not data.startswith(b"HTTP/1."[: len(data)]) or _bare_line_feed(data, seen):
            raise ConnectionError(_complaint(data))
        seen = max(0, len(data) - 3)
        data += yield
    match = _match_head(data)
    if not match:
        raise ConnectionError(_complaint(data[: end + 4]))
    return match


def _complaint(head: bytes) -> str:
    """Return what is wrong with a malformed response head."""
    if len(head) > MAX_HEAD:
        return f"the header is longer than {MAX_HEAD} bytes"
    status, *fields = head.replace(b"\r\n\r\n", b"\r\n").splitlines(keepends=True) or [b""]
    if not _is_status(status):
        return f"not an HTTP/1.1 answer: {status[:60]!r}"
    if len(fields) > MAX_LINES:
        return f"more than {MAX_LINES} header lines"
    return f"malformed header line: {next((field for field in fields if not _is_field(field)), b'')[:60]!r}"


def _fields(found: list[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """Return the fields that say where a body ends and what it is; those of one name are joined by commas."""
    fields = dict(found)
    if len(fields) < len(found):
        return {name: b",".join(value for other, value in found if other == name) for name in fields}
    return fields


def _persistent(head: bytes, status: int, fields: dict[bytes, bytes]) -> bool:
    """Return whether the server keeps the connection open and the end of the body was unambiguous."""
    if head.startswith(b"HTTP/1.0") or (b"connection" in fields and _says_close(fields[b"connection"])):
        return False
    lengths = (b"content-length" in fields) + (b"transfer-encoding" in fields)
    return lengths == (0 if status in (204, 304) else 1)


def _length(digits: bytes) -> int:
    """Return the value of a Content-Length; several were joined by a comma, so that they fail too."""
    if not digits.isdigit() or len(digits) > 18:
        raise ConnectionError(f"bad Content-Length: {digits[:60]!r}")
    return _bounded(int(digits))


def _bounded(size: int) -> int:
    """Return the size of a body, or refuse it."""
    if size > MAX_BODY:
        raise ConnectionError(f"the body is longer than {MAX_BODY} bytes")
    return size


def _body(length: int, data: bytes) -> Reading[Split]:
    """Read a body of so many bytes."""
    if len(data) < length:
        data = yield from _until(length, data)
    return data[:length], data[length:]


def _until(length: int, data: bytes) -> Reading[bytes]:
    """Read until so many bytes have come, or more."""
    body = bytearray(data)  # grows with what has come: what was announced may never come
    try:
        while len(body) < length:
            body += yield
    except EOFError:
        message = f"the server closed the connection after {len(body)} of {length} bytes"
        raise ConnectionError(message) from None
    return bytes(body)


def _endless_body(data: bytes) -> Reading[bytes]:
    """Read a body that ends with the connection."""
    body = bytearray(data)
    try:
        while True:
            _bounded(len(body))
            body += yield
    except EOFError:
        return bytes(body)


def _chunked_body(data: bytes, coding: bytes) -> Reading[Split]:
    """Read a body in chunks and the trailer lines after it, which are dropped."""
    if coding != b"chunked":
        raise ConnectionError(f"unknown transfer coding: {coding[:60]!r}")
    body = bytearray()
    while True:
        line, data = yield from _line(data)
        match = _chunk_size(line)
        if not match:
            raise ConnectionError(f"bad chunk size: {line[:60]!r}")
        size = int(match[1], 16)
        if not size:
            break
        _bounded(len(body) + size)
        while len(data) < size:
            body += data
            size -= len(data)
            data = yield
        body += data[:size]
        line, data = yield from _line(data[size:], limit=2)
        if line != b"\r\n":
            raise ConnectionError("a chunk is longer than its size")
    for _ in range(MAX_LINES + 1):
        line, data = yield from _line(data)
        if line == b"\r\n":
            return bytes(body), data
        if not _is_field(line):
            raise ConnectionError(f"malformed trailer line: {line[:60]!r}")
    raise ConnectionError(f"more than {MAX_LINES} trailer lines")


def _line(data: bytes, limit: int = MAX_LINE) -> Reading[Split]:
    """Read a line with its end; of one that is too long, enough to show that."""
    end = data.find(b"\n", 0, limit)
    while end < 0 and len(data) < limit:
        data += yield
        end = data.find(b"\n", 0, limit)
    length = end + 1 or limit
    return data[:length], data[length:]


def _decompress(data: bytes, coding: bytes) -> bytes:
    """Undo gzip, of one member or several, or deflate, with or without the zlib header that it should have."""
    if coding not in (b"gzip", b"x-gzip", b"deflate"):
        if re.search(rb"\b(gzip|deflate|br|zstd|compress)\b", coding):
            raise ConnectionError(f"content coding that was not requested: {coding[:60]!r}")
        return data  # "identity", or a charset, which some servers put here
    headed = data[:1] and data[0] & 15 == zlib.DEFLATED and int.from_bytes(data[:2], "big") % 31 == 0
    window = 31 if coding != b"deflate" else 15 if headed else -15
    body = bytearray()
    for _ in range(MAX_MEMBERS):
        if not data:
            return bytes(body)
        stream = zlib.decompressobj(window)
        try:
            while block := stream.decompress(data, min(STEP, MAX_BODY + 1 - len(body))):
                body += block
                _bounded(len(body))
                data = stream.unconsumed_tail
        except zlib.error as error:
            raise ConnectionError(f"the body is not {coding.decode()}: {error}") from error
        if not stream.eof:
            raise ConnectionError(f"the {coding.decode()} body was cut short after {len(body)} bytes")
        data = stream.unused_data
    raise ConnectionError(f"more than {MAX_MEMBERS} gzip members")


# ---- Connections -----------------------------------------------------------------------------------------------------


class _Stale(ConnectionError):
    """A connection ended before the first byte of an answer."""


class _Outbox:
    """The requests of one turn of the event loop, which are written one right after the other.

    To wake a server on this machine that sleeps between two requests costs as much as the rest of a write.
    """

    MOST = 32  # requests; the first of a great many should not wait for the last

    def __init__(self) -> None:
        self._connections: list[_Connection] = []

    def add(self, connection: "_Connection") -> None:
        """Have the connection write at the end of this turn."""
        if not self._connections:
            asyncio.get_running_loop().call_soon(self._write)
        self._connections.append(connection)
        if len(self._connections) >= self.MOST:
            self._write()

    def _write(self) -> None:
        connections, self._connections = self._connections, []
        for connection in connections:
            connection.write()


class _Connection(asyncio.BufferedProtocol):
    """A connection with at most one request on it."""

    transport: asyncio.Transport

    def __init__(
        self, idle: dict["_Connection", None], outbox: _Outbox, buffer: memoryview, tunnel: bool = False
    ) -> None:
        self._idle, self._outbox = idle, outbox
        self._request = b""  # while it is still to be written
        self._loop = asyncio.get_running_loop()
        self._buffer = buffer  # all share one: an event loop fills it and calls `buffer_updated` in one go
        self._waiter: asyncio.Future[Answer] | None = None
        self._alive: Callable[[], None] | None = None  # the function that tells the run that bytes have come
        self._parser = _answers(tunnel)
        next(self._parser)

    def send(self, request: bytes) -> asyncio.Future[Answer]:
        """Have the request written; the future is for its answer."""
        if self.transport.is_closing():
            raise _Stale(UNANSWERED)
        self._waiter = waiter = self._loop.create_future()
        self._alive = ALIVE.get()
        self._request = request
        self._outbox.add(self)
        return waiter

    def write(self) -> None:
        """Write the request, unless the connection has gone since."""
        request, self._request = self._request, b""
        if not self.transport.is_closing():
            self.transport.write(request)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self.transport = transport  # type: ignore[assignment]  # it is a Transport, though typed as less

    def get_buffer(self, sizehint: int) -> memoryview:
        """Called by the event loop: where the next bytes go."""
        return self._buffer

    def buffer_updated(self, count: int) -> None:
        """Called by the event loop: so many bytes have come."""
        if self._waiter and not self._request:
            self._advance(self._parser.send, self._buffer[:count].tobytes())
        else:
            self.transport.abort()  # unrequested bytes, which must not become the next request's answer

    def eof_received(self) -> None:
        """Called by the event loop: no more bytes will come."""
        self.transport.abort()  # by itself it would first write the rest of the request, which may be large

    def connection_lost(self, error: Exception | None) -> None:
        """Called by the event loop: the connection was closed (None) or broken."""
        self._idle.pop(self, None)
        begun = self._parser.gi_yieldfrom  # type: ignore[attr-defined]  # the answer that it is reading, if any
        end: Exception = EOFError(CUT) if begun else _Stale(UNANSWERED)
        if error:
            end = (ConnectionError if begun else _Stale)(f"connection lost: {_reason(error)}")
            end.__cause__ = error
        if self._waiter:
            self._advance(self._parser.throw, end)

    def _advance(self, step: Callable[[Any], tuple[Answer, bool] | None], value: bytes | Exception) -> None:
        """Let the parser take a step, and settle the future if an answer is whole or never will be."""
        waiter = self._waiter
        assert waiter
        try:
            end = step(value)
        except (ConnectionError, EOFError) as error:
            self._waiter = None
            self.transport.abort()
            if not waiter.done():
                waiter.set_exception(ConnectionError(str(error)) if isinstance(error, EOFError) else error)
            return
        if end:
            self._waiter = None
            answer, reusable = end
            if not reusable or self.transport.get_write_buffer_size():
                self.transport.abort()
            if not waiter.done():
                waiter.set_result(answer)
        elif self._alive:
            self._alive()


def _reason(error: Exception) -> str:
    """Return in a few words why the operating system or TLS refused or ended a connection."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate not verified: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {(error.reason or str(error)).replace('_', ' ').lower()}"
    if isinstance(error, socket.gaierror):
        return str(error.strerror).lower()
    # asyncio joins the errors of several addresses into one text without a number; the first is reason enough.
    code = getattr(error, "errno", None) or next(iter(re.findall(r"\[Errno (\d+)\]", str(error))), None)
    return os.strerror(int(code)).lower() if code else str(error) or "connection closed"


# ---- Origins, proxies, header lines ----------------------------------------------------------------------------------


class _Origin(NamedTuple):
    """Where a URL points to; as text, host:port."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def netloc(self) -> str:
        """Host and port as the Host field wants them: without the scheme's own port."""
        return str(self).removesuffix({"http": ":80", "https": ":443"}[self.scheme])

    @property
    def is_name(self) -> bool:
        """Whether the host must be resolved."""
        return ":" not in self.host and not self.host.replace(".", "").isdigit()


def _origin(url: str, what: str) -> tuple[_Origin, SplitResult]:
    """Take a URL apart, or say what it should be without quoting it: it may hold a password."""
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna").decode("ascii")
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        if not host or not url.isprintable() or " " in url or not parts.path.isascii():
            raise ValueError
    except (ValueError, KeyError):
        raise ValueError(f"{what} must look like https://host:port/path, without spaces or line ends") from None
    return _Origin(parts.scheme, host, port), parts


def _proxy_for(target: _Origin) -> tuple[_Origin | None, dict[str, str]]:
    """Return the proxy that the environment names for the target, and the header field that it wants."""
    if not (url := proxy_for(f"{target.scheme}://{target}")):
        return None, {}
    proxy, parts = _origin(url, f"the proxy for {target.scheme}")
    if parts.username is None:
        return proxy, {}
    login = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
    return proxy, {"Proxy-Authorization": f"Basic {base64.b64encode(login).decode()}"}


def _lines(fields: Mapping[str, str]) -> bytes:
    """Return header lines. Raises ValueError for one that HTTP does not allow, without its value: it may be a key."""
    lines = {name: f"{name}: {value}\r\n" for name, value in fields.items()}
    for name, line in lines.items():
        if ":" in name or not line.isascii() or not _is_field(line.encode()):
            raise ValueError(f"header {name!r} contains a line end or another character that HTTP does not allow")
        if name.lower() in ("content-length", "transfer-encoding", "connection"):
            raise ValueError(f"header {name!r} is set by the backend alone")
    return "".join(lines.values()).encode()


def _request_fields(target: _Origin, login: Mapping[str, str], headers: Mapping[str, str]) -> bytes:
    """Return the header lines of every request: the caller's, and defaults for those that it lacks."""
    own = {"Host": target.netloc, "User-Agent": "concurrent-prompts", "Accept": "application/json"}
    own |= {"Accept-Encoding": "gzip, deflate", **login}
    given = {name.lower() for name in headers}
    return _lines({name: value for name, value in own.items() if name.lower() not in given} | dict(headers))


# ---- Client ----------------------------------------------------------------------------------------------------------


class _Client:
    """A pool of connections to one origin, straight or through a proxy."""

    def __init__(self, base_url: str, headers: Mapping[str, str], concurrency: int) -> None:
        self._target, parts = _origin(base_url, "the base URL")
        if parts.query or parts.fragment:
            raise ValueError("the base URL must not hold a query or a fragment")
        proxy, login = _proxy_for(self._target)
        self._hop = proxy or self._target
        secure = self._target.scheme == "https"
        # Through a tunnel the proxy sees no request and the server no `login`; without, the proxy needs the whole URL.
        self._tunnel = b""
        if proxy and secure:
            lines = _lines({"Host": str(self._target), **login})
            self._tunnel = b"CONNECT %b HTTP/1.1\r\n%b\r\n" % (str(self._target).encode(), lines)
        self._prefix = f"http://{self._target.netloc}{parts.path}" if proxy and not secure else parts.path
        self._fields = _request_fields(self._target, {} if secure else login, headers)
        self._head = lru_cache(maxsize=64)(self._write_head)
        self._tls: ssl.SSLContext | None = None
        if secure or self._hop.scheme == "https":  # loading the certificates takes its time
            check_certificates()
            self._tls = ssl.create_default_context()  # OpenSSL itself minds SSL_CERT_FILE and SSL_CERT_DIR
            self._tls.set_alpn_protocols(["http/1.1"])
        self._concurrency = concurrency
        self._idle: dict[_Connection, None] = {}  # a stack from which a lost connection can be taken at once
        self._reuse = Reuse()
        buffer = memoryview(bytearray(BUFFER))
        self._connection = partial(_Connection, self._idle, _Outbox(), buffer, bool(self._tunnel))

    async def post(self, path: str, body: bytes) -> Answer:
        """Send one request, on the connection that was used last or a fresh one."""
        request = b"%b%d\r\n\r\n%b" % (self._head("POST" if body else "GET", path), len(body), body)
        reuse = self._reuse
        reused = bool(self._idle) and reuse.allowed
        connection = self._idle.popitem()[0] if reused else await self._open()
        while True:
            try:
                answer = await connection.send(request)
                break
            except BaseException as failure:
                connection.transport.abort()  # its answer may still come, and must not reach another request
                if not reused or not isinstance(failure, _Stale):
                    raise
            reuse.on_stale()
            if not reuse.allowed:
                self._abort_idle()
            reused, connection = False, await self._open()
        if reused and reuse.score:
            reuse.on_reused()
        if answer[0] >= 500 or not reuse.allowed or len(self._idle) >= self._concurrency:
            connection.transport.abort()
        elif not connection.transport.is_closing():
            self._idle[connection] = None
        return answer

    def _abort_idle(self) -> None:
        for connection in list(self._idle):
            connection.transport.abort()  # connection_lost takes them out, in the next round of the event loop

    async def close(self) -> None:
        """Close the idle connections, and from now on each one that has done its work."""
        self._concurrency = 0
        self._abort_idle()
        while self._idle:
            await asyncio.sleep(0)

    def _write_head(self, method: str, path: str) -> bytes:
        """Return all of a request up to the number of its body's bytes."""
        if not path.startswith("/") or not path.isascii() or not path.isprintable() or " " in path:
            raise ValueError(f"a path must start with a slash and be plain ASCII without spaces: {path!r}")
        return f"{method} {self._prefix}{path} HTTP/1.1\r\n".encode() + self._fields + b"Content-Length: "

    async def _open(self) -> _Connection:
        """Connect, through a tunnel if need be."""
        loop, hop = asyncio.get_running_loop(), self._hop
        tls = self._tls if hop.scheme == "https" else None
        # Of a name's several addresses the first may be dead. uvloop has no such race: it tries them in turn.
        race = hop.is_name and isinstance(loop, asyncio.BaseEventLoop)
        options: dict[str, Any] = {"happy_eyeballs_delay": 0.25} if race else {}
        try:
            _, connection = await loop.create_connection(self._connection, hop.host, hop.port, ssl=tls, **options)
        except OSError as error:
            spoke = isinstance(error, ssl.SSLError | ConnectionResetError | ConnectionAbortedError)
            kind = ConnectionError if spoke else ConnectionRefusedError
            raise kind(f"cannot connect to {hop}: {_reason(error)}") from error
        if self._tunnel:
            await self._dig(connection)
        return connection

    async def _dig(self, connection: _Connection) -> None:
        """Have the proxy connect to the target, and start TLS with the target."""
        assert self._tls
        loop, host = asyncio.get_running_loop(), self._target.host
        try:
            status, _, _ = await connection.send(self._tunnel)
            if not 200 <= status < 300:
                raise ConnectionError(f"it answered CONNECT with status {status}")
            if not connection.transport.is_closing():
                tls = await loop.start_tls(connection.transport, connection, self._tls, server_hostname=host)
                connection.transport = tls or connection.transport  # None: lost in the very moment
            if connection.transport.is_closing():
                raise ConnectionError("it closed the tunnel or sent data of its own through it")
        except BaseException as error:
            connection.transport.abort()
            if isinstance(error, OSError):
                message = f"cannot connect to {self._target} through the proxy {self._hop}: {_reason(error)}"
                raise ConnectionError(message) from error
            raise


@asynccontextmanager
async def connect(base_url: str, headers: dict[str, str], concurrency: int) -> AsyncIterator[Post]:
    """Open a pool of at most `concurrency` connections and yield its `post`; the package has the contract."""
    client = _Client(base_url, headers, concurrency)
    try:
        yield client.post
    finally:
        await client.close()
