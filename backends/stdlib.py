"""HTTP/1.1 over asyncio with nothing installed: the `stdlib` backend.

It keeps connections alive, verifies TLS certificates (SSL_CERT_FILE and SSL_CERT_DIR count), goes
through the proxies that the environment names, reads Content-Length, chunked and close-delimited
bodies, undoes gzip and deflate, and bounds whatever a server may send.

One request costs one write, usually one read, one future, and a parser that is a generator: it is
sent the bytes as they come, waits for more wherever it stands, and returns the answer. A parser
lives for one answer, so nothing of one can be left over for the next. Header lines are checked by
one regular expression and are otherwise left as they came until somebody asks for one.

No request ever gets another's answer: a connection is used again only if its last answer was framed
beyond doubt, nothing came after it, and the request had been sent in full; anything else closes it,
and so does a byte that arrives while it is idle, an error, or the cancellation of `post`.

It does not:
  * speak HTTP/2, pipeline, or send anything but POST
  * stream: bodies are held in memory, whole, in both directions
  * follow redirects, keep cookies, retry, wait or time out
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
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar
from urllib.parse import SplitResult, unquote, urlsplit

from . import Post

__all__ = ["connect"]

MAX_HEAD = 64 * 1024  # bytes of status line and header lines
MAX_LINES = 100  # header lines of an answer, and trailer lines of a chunked body
MAX_INTERIM = 20  # answers 1xx before the one that counts
MAX_LINE = 4096  # bytes of one chunk-size or trailer line
MAX_BODY = 256 * 1024 * 1024  # bytes of a body, both as sent and as decompressed
MAX_MEMBERS = 100  # gzip members in a body
BUFFER = 16 * 1024  # bytes of one read; each connection has its own, so small is kind to the cache

Answer = tuple[int, Mapping[str, str], bytes]
T = TypeVar("T")
Reading = Generator[None, bytes, T]  # is sent bytes, returns a T; the end of the stream is thrown in as EOFError

_TEXT = rb"[^\0-\x08\n-\x1f\x7f]*+"  # a reason phrase or a header value: no control character but the tab
_FIELD = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]++:" + _TEXT + rb"\r\n"
_is_field = re.compile(_FIELD).fullmatch
_is_head = re.compile(rb"HTTP/1\.[0-9] [1-9][0-9]{2}(?: %b)?\r\n(?:%b){0,%d}+" % (_TEXT, _FIELD, MAX_LINES)).fullmatch
_framing_fields = re.compile(
    rb"\r\n(content-length|transfer-encoding|content-encoding|connection):([^\r]*)", re.IGNORECASE
).findall
_chunk_size = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;%b)?\r\n" % _TEXT).fullmatch
_bare_line_feed = re.compile(rb"(?<!\r)\n").search


class _UnansweredError(ConnectionError):
    """The connection ended before the first byte of an answer."""


class Headers(Mapping[str, str]):
    """The header lines of one answer, found by lower-case name; of lines with the same name, the first."""

    __slots__ = ("_head", "_lower")

    def __init__(self, head: bytes) -> None:
        self._head = head
        self._lower: bytes | None = None

    def get(self, name: str, default: Any = None) -> Any:
        """Search the lines as they stand: cheaper than a dictionary of which little is ever used."""
        if self._lower is None:
            self._lower = self._head.lower()
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
        lines = self._head.lower().decode("latin-1").split("\r\n")[1:-1]
        return iter(dict.fromkeys(line.partition(":")[0] for line in lines))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"Headers({dict(self)})"


# ---- Parsing: generators that are sent the bytes of one answer -------------------------------------------------------


def _answer(tunnel: bool = False) -> Reading[tuple[Answer, bool]]:
    """Read one answer; return it, and whether the connection may be used again.

    The answer to CONNECT (`tunnel`) has no body, whatever its header says.
    """
    try:
        data = yield
    except (EOFError, ConnectionError) as error:
        raise _UnansweredError(str(error) or "the server closed the connection without answering") from error
    head, data = yield from _final_head(data)
    status, headers = int(head[9:12]), Headers(head)
    if tunnel:
        return (status, headers, b""), not data
    fields: dict[bytes, bytes] = {}
    for name, value in _framing_fields(head):
        name, value = name.lower(), value.strip(b" \t").lower()
        fields[name] = fields[name] + b"," + value if name in fields else value
    body, data = yield from _body(status, fields, data)
    if b"content-encoding" in fields:
        body = _decompress(body, fields[b"content-encoding"])
    return (status, headers, body), not data and _persistent(head, fields)


def _final_head(data: bytes) -> Reading[tuple[bytes, bytes]]:
    """Read heads up to the first that is not interim; return it and what came after it."""
    for _ in range(MAX_INTERIM):
        head, data = yield from _head(data)
        if head[9:10] != b"1":
            return head, data
        if head[9:12] == b"101":
            raise ConnectionError("the server switched protocols, which it was not asked to")
    raise ConnectionError(f"the server sent {MAX_INTERIM} interim answers (1xx) and no other")


def _head(data: bytes) -> Reading[tuple[bytes, bytes]]:
    """Read a status line and header lines; return them, without the empty line, and what came after."""
    end, seen = data.find(b"\r\n\r\n"), 0
    while end < 0 and len(data) <= MAX_HEAD:
        # What cannot become a head is refused now, since its server may wait for us in silence.
        if not data.startswith(b"HTTP/1."[: len(data)]) or _bare_line_feed(data, seen):
            raise ConnectionError(_complaint(data))
        seen = max(0, len(data) - 3)
        data += yield
        end = data.find(b"\r\n\r\n", seen)
    if not 0 <= end <= MAX_HEAD:
        raise ConnectionError(f"the header is longer than {MAX_HEAD} bytes")
    head = data[: end + 2]
    if not _is_head(head):
        raise ConnectionError(_complaint(head))
    return head, data[end + 4 :]


def _complaint(head: bytes) -> str:
    """Say what is wrong with a head that is not one."""
    status, *fields = head.splitlines(keepends=True) or [b""]
    if not _is_head(status):
        return f"not an HTTP/1.1 answer: {status[:60]!r}"
    if len(fields) > MAX_LINES:
        return f"more than {MAX_LINES} header lines"
    return f"malformed header line: {next((field for field in fields if not _is_field(field)), b'')[:60]!r}"


def _persistent(head: bytes, fields: dict[bytes, bytes]) -> bool:
    """Whether the server keeps the connection open, and its end of the body was beyond doubt."""
    if head.startswith(b"HTTP/1.0") or (b"transfer-encoding" in fields and b"content-length" in fields):
        return False
    return b"connection" not in fields or b"close" not in re.split(rb"[ \t]*,[ \t]*", fields[b"connection"])


def _body(status: int, fields: dict[bytes, bytes], data: bytes) -> Reading[tuple[bytes, bytes]]:
    """Read the body, framed as RFC 9112 (6.3) has it; return it and what came after it."""
    if status in (204, 304):
        return b"", data
    if b"transfer-encoding" in fields:  # it wins over Content-Length
        if fields[b"transfer-encoding"] != b"chunked":
            raise ConnectionError(f"unknown transfer coding: {fields[b'transfer-encoding'][:60]!r}")
        return (yield from _chunked_body(data))
    if b"content-length" in fields:
        return (yield from _counted_body(data, _length(fields[b"content-length"])))
    return (yield from _endless_body(data)), b""


def _length(value: bytes) -> int:
    """Return the length that Content-Length gives; several fields or values must agree."""
    values = set(re.split(rb"[ \t]*,[ \t]*", value))
    digits = values.pop()
    if values or not digits.isdigit() or len(digits) > 18:
        raise ConnectionError(f"bad Content-Length: {value[:60]!r}")
    return _checked(int(digits))


def _checked(size: int) -> int:
    """Return the size of a body if that is within the limit."""
    if size > MAX_BODY:
        raise ConnectionError(f"the body is longer than {MAX_BODY} bytes")
    return size


def _counted_body(data: bytes, length: int) -> Reading[tuple[bytes, bytes]]:
    """Read a body of a known length; return it and what came after it."""
    if len(data) < length:
        body = bytearray(data)  # grows with what has come, not with what was announced
        try:
            while len(body) < length:
                body += yield
        except EOFError:
            message = f"the server closed the connection after {len(body)} of {length} bytes"
            raise ConnectionError(message) from None
        data = bytes(body)
    return data[:length], data[length:]


def _endless_body(data: bytes) -> Reading[bytes]:
    """Read a body that ends where the connection does."""
    body = bytearray(data)
    try:
        while _checked(len(body)) >= 0:
            body += yield
    except EOFError:
        pass
    return bytes(body)


def _chunked_body(data: bytes) -> Reading[tuple[bytes, bytes]]:
    """Undo the chunked transfer coding; return the body and what came after its trailer."""
    body = bytearray()
    while True:
        line, data = yield from _line(data)
        match = _chunk_size(line)
        if not match:
            raise ConnectionError(f"bad chunk size: {line[:60]!r}")
        size = int(match[1], 16)
        if not size:
            return bytes(body), (yield from _trailer(data))
        _checked(len(body) + size)
        while len(data) < size:
            body += data
            size -= len(data)
            data = yield
        body += data[:size]
        data = data[size:]
        while len(data) < 2:
            data += yield
        if not data.startswith(b"\r\n"):
            raise ConnectionError("a chunk is longer than its size says")
        data = data[2:]


def _trailer(data: bytes) -> Reading[bytes]:
    """Skip the trailer lines and the empty line that ends them; return what came after."""
    for _ in range(MAX_LINES + 1):
        line, data = yield from _line(data)
        if line == b"\r\n":
            return data
        if not _is_field(line):
            raise ConnectionError(f"malformed trailer line: {line[:60]!r}")
    raise ConnectionError(f"more than {MAX_LINES} trailer lines")


def _line(data: bytes) -> Reading[tuple[bytes, bytes]]:
    """Read a line; return it, line end and all, and what came after it."""
    end = data.find(b"\n")
    while end < 0 and len(data) <= MAX_LINE:
        data += yield
        end = data.find(b"\n")
    if not 0 <= end <= MAX_LINE:
        raise ConnectionError(f"a line of a chunked body is longer than {MAX_LINE} bytes")
    return data[: end + 1], data[end + 1 :]


def _decompress(data: bytes, coding: bytes) -> bytes:
    """Undo gzip, one member or several, or deflate, with or without the zlib header that it should have."""
    if coding in (b"", b"identity"):
        return data
    if coding not in (b"gzip", b"x-gzip", b"deflate"):
        raise ConnectionError(f"unknown content coding: {coding[:60]!r}")
    has_header = data[:1] and data[0] & 15 == zlib.DEFLATED and int.from_bytes(data[:2], "big") % 31 == 0
    window = 31 if coding != b"deflate" else 15 if has_header else -15
    body = bytearray()
    for _ in range(MAX_MEMBERS):
        if not data:
            return bytes(body)
        stream = zlib.decompressobj(window)
        try:
            body += stream.decompress(data, MAX_BODY + 1 - len(body))
        except zlib.error as error:
            raise ConnectionError(f"the body is not {coding.decode()}: {error}") from error
        _checked(len(body))
        if not stream.eof:
            raise ConnectionError(f"the {coding.decode()} body was cut short after {len(body)} bytes")
        data = stream.unused_data
    raise ConnectionError(f"more than {MAX_MEMBERS} gzip members")


# ---- Connections -----------------------------------------------------------------------------------------------------


class _Connection(asyncio.BufferedProtocol):
    """One connection with at most one request on it."""

    transport: asyncio.Transport

    def __init__(self, idle: dict["_Connection", None]) -> None:
        self._idle = idle
        self._loop = asyncio.get_running_loop()
        self._buffer = memoryview(bytearray(BUFFER))
        self._parser: Reading[tuple[Answer, bool]] | None = None
        self._waiter: asyncio.Future[Answer]

    def send(self, request: bytes, tunnel: bool = False) -> asyncio.Future[Answer]:
        """Write the request; the future is for its answer."""
        if self.transport.is_closing():
            raise _UnansweredError("the server closed the connection without answering")
        self._waiter = self._loop.create_future()
        self._parser = _answer(tunnel)
        next(self._parser)
        self.transport.write(request)
        return self._waiter

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self.transport = transport  # type: ignore[assignment]

    def get_buffer(self, sizehint: int) -> memoryview:
        """Called by the event loop: where the next bytes go."""
        return self._buffer

    def buffer_updated(self, count: int) -> None:
        """Called by the event loop: so many bytes have come."""
        if self._parser:
            self._advance(self._parser.send, self._buffer[:count].tobytes())
        else:
            self.transport.abort()  # nobody asked for this, and the next request must not take it for its answer

    def connection_lost(self, error: Exception | None) -> None:
        """Called by the event loop: the connection was closed (None) or broken."""
        self._idle.pop(self, None)
        if self._parser:
            lost = ConnectionError(f"connection lost: {_reason(error)}") if error else EOFError()
            lost.__cause__ = error
            self._advance(self._parser.throw, lost)

    def _advance(self, step: Callable[[Any], None], value: bytes | Exception) -> None:
        """Let the parser take a step, and settle the future if that was the last."""
        try:
            step(value)
            return
        except StopIteration as end:
            answer, reusable = end.value
            if not reusable or self.transport.get_write_buffer_size():
                self.transport.abort()
            if not self._waiter.done():
                self._waiter.set_result(answer)
        except (ConnectionError, EOFError) as error:
            self.transport.abort()
            if isinstance(error, EOFError):
                error = ConnectionError("the server closed the connection in the middle of its answer")
            if not self._waiter.done():
                self._waiter.set_exception(error)
        self._parser = None


def _reason(error: Exception) -> str:
    """Say in a few words what the operating system or TLS has against a connection."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate not verified: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {(error.reason or str(error)).replace('_', ' ').lower()}"
    if isinstance(error, socket.gaierror):
        return str(error.strerror).lower()
    # asyncio joins the errors of several addresses into one text without a number; the first is reason enough.
    code = getattr(error, "errno", None) or next(iter(re.findall(r"\[Errno (\d+)\]", str(error))), None)
    return os.strerror(int(code)).lower() if code else str(error) or "connection closed"


# ---- Client ----------------------------------------------------------------------------------------------------------


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


def _split(url: str, what: str) -> tuple[_Origin, SplitResult]:
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
    if not any(name.lower().endswith("_proxy") for name in os.environ):
        return None, {}
    from urllib.request import getproxies_environment, proxy_bypass_environment  # slow to import, seldom needed

    proxies = getproxies_environment()
    url = proxies.get(target.scheme) or proxies.get("all")
    if not url or any(proxy_bypass_environment(name, proxies) for name in (target.host, str(target))):
        return None, {}
    if "://" not in url:
        url = f"http://{url}"
    if url.lower().startswith("socks"):
        raise ConnectionError("a SOCKS proxy is set in the environment; the stdlib backend uses HTTP proxies only")
    proxy, parts = _split(url, f"the proxy for {target.scheme}")
    if parts.username is None:
        return proxy, {}
    login = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
    return proxy, {"Proxy-Authorization": f"Basic {base64.b64encode(login).decode()}"}


def _lines(fields: Mapping[str, str]) -> bytes:
    """Write header lines; a field that could smuggle in another is refused, its value unquoted: it may be a key."""
    for name, value in fields.items():
        line = f"{name}: {value}\r\n"
        if not line.isascii() or not _is_field(line.encode()):
            raise ValueError(f"header {name!r} holds a line end or another character that HTTP cannot carry")
        if name.lower() in ("content-length", "transfer-encoding", "connection"):
            raise ValueError(f"header {name!r} is not for callers to set")
    return "".join(f"{name}: {value}\r\n" for name, value in fields.items()).encode()


def _request_fields(target: _Origin, login: Mapping[str, str], headers: Mapping[str, str]) -> bytes:
    """Write the header lines of every request: the caller's, and our own where the caller has none."""
    own = {"Host": target.netloc, "User-Agent": "concurrent-prompts", "Accept": "application/json"}
    own |= {"Accept-Encoding": "gzip, deflate", **login}
    given = {name.lower() for name in headers}
    return _lines({name: value for name, value in own.items() if name.lower() not in given} | dict(headers))


def _tls_context() -> ssl.SSLContext:
    """Trust what OpenSSL trusts by default, SSL_CERT_FILE and SSL_CERT_DIR included."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


class _Client:
    """A pool of connections to one origin, straight or through a proxy."""

    def __init__(self, base_url: str, headers: Mapping[str, str], concurrency: int) -> None:
        target, parts = _split(base_url, "the base URL")
        if parts.query or parts.fragment:
            raise ValueError("the base URL must not hold a query or a fragment")
        proxy, login = _proxy_for(target)
        self._target, self._first_hop = target, proxy or target
        self._tunnelled = proxy is not None and target.scheme == "https"
        self._greeting = b"CONNECT %b HTTP/1.1\r\n%b\r\n" % (str(target).encode(), _lines({"Host": str(target)} | login))
        # Told the whole URL, a proxy forwards the request; a tunnel's proxy never sees it, nor may the server see `login`.
        forwarded = proxy is not None and not self._tunnelled
        self._prefix = (f"http://{target.netloc}" if forwarded else "") + parts.path
        self._fields = _request_fields(target, login if forwarded else {}, headers)
        self._head = lru_cache(maxsize=64)(self._write_head)
        self._tls = _tls_context() if "https" in (target.scheme, self._first_hop.scheme) else None
        self._concurrency = concurrency
        self._idle: dict[_Connection, None] = {}  # a stack from which a lost connection can be taken at once

    async def post(self, path: str, body: bytes) -> Answer:
        """Send one request; on a fresh connection if the one it was sent on had been closed before any answer."""
        request = b"%b%d\r\n\r\n%b" % (self._head(path), len(body), body)
        if self._idle:
            try:
                return await self._exchange(self._idle.popitem()[0], request)
            except _UnansweredError:
                pass
        return await self._exchange(await self._open(), request)

    async def close(self) -> None:
        """Close the idle connections; one that is still at work is closed when it is done."""
        self._concurrency = 0
        for connection in list(self._idle):
            connection.transport.abort()
        while self._idle:  # connection_lost takes them out, in the event loop's next round
            await asyncio.sleep(0)

    def _write_head(self, path: str) -> bytes:
        """Write everything of a request up to the number of bytes of its body."""
        url = self._prefix + path
        if not path.startswith("/") or not url.isascii() or not url.isprintable() or " " in url:
            raise ValueError(f"a path must start with a slash, and hold neither spaces nor letters with accents: {path!r}")
        return b"POST %b HTTP/1.1\r\n%bContent-Length: " % (url.encode(), self._fields)

    async def _exchange(self, connection: _Connection, request: bytes) -> Answer:
        """Send a request and wait for the answer; keep the connection if it may be kept."""
        try:
            answer = await connection.send(request)
        except BaseException:
            connection.transport.abort()  # an answer on its way must not become the next request's
            raise
        if len(self._idle) >= self._concurrency:
            connection.transport.abort()
        elif not connection.transport.is_closing():
            self._idle[connection] = None
        return answer

    async def _open(self) -> _Connection:
        """Connect, through a tunnel if need be."""
        loop, hop = asyncio.get_running_loop(), self._first_hop
        tls = self._tls if hop.scheme == "https" else None
        # Of a name's several addresses the first may be silent. (uvloop knows no race; it tries them in turn.)
        race = {"happy_eyeballs_delay": 0.25} if isinstance(loop, asyncio.BaseEventLoop) else {}
        try:
            _, connection = await loop.create_connection(
                lambda: _Connection(self._idle), hop.host, hop.port, ssl=tls, **race
            )
        except OSError as error:
            raise ConnectionError(f"cannot connect to {hop}: {_reason(error)}") from error
        if self._tunnelled:
            await self._dig(connection)
        return connection

    async def _dig(self, connection: _Connection) -> None:
        """Have the proxy connect to the target, and speak TLS with that."""
        loop, host = asyncio.get_running_loop(), self._target.host
        try:
            status, _, _ = await connection.send(self._greeting, tunnel=True)
            if not 200 <= status < 300:
                raise ConnectionError(f"it answered CONNECT with status {status}")
            if not connection.transport.is_closing():
                tls = await loop.start_tls(connection.transport, connection, self._tls, server_hostname=host)
                connection.transport = tls or connection.transport  # None: lost as soon as it was made
            if connection.transport.is_closing():
                raise ConnectionError("it closed the tunnel, or sent something of its own down it")
        except BaseException as error:
            connection.transport.abort()
            if isinstance(error, OSError):
                message = f"cannot connect to {self._target} through the proxy {self._first_hop}: {_reason(error)}"
                raise ConnectionError(message) from error
            raise


@asynccontextmanager
async def connect(base_url: str, headers: dict[str, str], concurrency: int) -> AsyncIterator[Post]:
    """Open a pool of at most `concurrency` connections and yield its `post`; see the package for the contract."""
    client = _Client(base_url, headers, concurrency)
    try:
        yield client.post
    finally:
        await client.close()
