"""The openai-sdk backend: the official SDK, called as its users call it. Needs: pip install openai.

Each request goes through the SDK's typed `create` and is parsed into its typed objects, so that a comparison shows what
the SDK costs; the core then reads the same bytes. Retries and redirects are off, because the core has its own rules
for both. Where aiohttp is installed too, the SDK's aiohttp transport is used, several times lighter than its default.
"""

import asyncio
import contextlib
import http.cookiejar
import inspect
import json
import os
import platform
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

import httpx2  # the SDK's own HTTP library since 3.0
import openai

from . import MAX_BODY, Post, proxy_for, tls_context
from .httpcore_pool import Watch

MAX_ERROR = 1024 * 1024  # bytes of a body with an error; what comes after them is left unread
MAX_PARSED = 16 * 1024 * 1024  # bytes of an answer that the SDK makes objects of
BELOW_HTTP: tuple[type[Exception], ...] = (openai.APIConnectionError, httpx2.HTTPError)
REFUSED = ("ClientConnectorError", "ClientConnectorDNSError", "ConnectError")
Transport: Any = openai.DefaultAsyncHttpxClient
with contextlib.suppress(ImportError):
    import aiohttp

    from .aiohttp_pool import Connector

    BELOW_HTTP += (aiohttp.ClientError,)  # some pass through the SDK as they are
    Transport = openai.DefaultAioHttpClient


def ask_platform() -> None:
    """Run `uname` once, as the SDK does with its first request, but without the key in the environment."""
    environment = dict(os.environ)
    if sys.platform != "win32":  # where it is read from the environment
        os.environ.clear()
    try:
        platform.platform()  # which remembers the answer
    finally:
        os.environ.update(environment)


ask_platform()


class Bounded:
    """A mixin for the SDK's HTTP client that bounds the size of a reply. Its decoders work in small steps."""

    most: int | None = None  # bytes of an answer; MAX_BODY unless it is set
    pool: Any = None  # a Connector or a Watch, if stale connections are to be replaced and those with a 5xx dropped

    async def send(self, request: httpx2.Request, *, stream: bool = False, **more: Any) -> httpx2.Response:
        """Send a request. Raises ConnectionError if the body of an answer is too long."""
        reply: httpx2.Response
        try:
            reply = await super().send(request, stream=True, **more)  # type: ignore[misc]
        except BELOW_HTTP:
            if not self.pool or not self.pool.is_stale():
                raise
            reply = await super().send(request, stream=True, **more)  # type: ignore[misc]
        if self.pool and reply.status_code >= 500:
            self.pool.drop()
        reply.encoding = "utf-8"  # whatever charset it names: some of Python's decoders take hours, some decode no text
        bound_body(reply, None if stream else self.most or MAX_BODY)  # a file is streamed: its reader bounds it
        if not stream:
            try:
                await reply.aread()
            except BaseException:
                await reply.aclose()
                raise
        return reply


Client = type("Client", (Bounded, Transport), {})


def bound_body(reply: httpx2.Response, most: int | None) -> None:
    """Bound the bytes, decompressed, that can be read of a reply: an error is cut off, an answer is refused."""
    read, is_error = reply.aiter_bytes, reply.status_code >= 300

    async def aiter_bytes(chunk_size: int | None = None) -> AsyncGenerator[bytes, None]:
        size = 0
        async with contextlib.aclosing(read(chunk_size)) as blocks:
            async for block in blocks:
                size += len(block)
                if is_error and size >= MAX_ERROR:
                    yield block[: len(block) - (size - MAX_ERROR)]
                    return
                if most is not None and size > most:
                    raise ConnectionError(f"the body is longer than {most} bytes")
                yield block
                if len(block) > 65536:  # it was compressed: the event loop has had no turn since the last one
                    await asyncio.sleep(0)

    reply.aiter_bytes = aiter_bytes  # type: ignore[method-assign]  # all that reads it goes through this


def open_client(
    base_url: str,
    headers: dict[str, str],
    connections: int,
    most: int | None = None,
    resend: bool = False,
    **more: Any,
) -> openai.AsyncOpenAI:
    """Return the SDK's client, to be entered, without its own retries and redirects.

    A body of more than `most` bytes, MAX_BODY unless given, is a ConnectionError. With `resend` a request whose reused
    connection ends before the first byte of its reply is sent again: not for requests that must not arrive twice.
    """
    pool = httpx2.Limits(max_connections=connections, max_keepalive_connections=connections)
    network: dict[str, Any] = {"proxy": proxy_for(base_url), "verify": tls_context(base_url), "trust_env": False}
    transport = Client(limits=pool, follow_redirects=False, timeout=None, **network)
    transport.most = most
    if resend:
        transport.pool = pool_of(transport, connections, network["verify"])
    # A server may set any number of them.
    transport.cookies.jar.set_policy(http.cookiejar.DefaultCookiePolicy(allowed_domains=()))
    key = "the key is in the headers"
    settings: dict[str, Any] = {"default_headers": headers, "max_retries": 0, "timeout": None} | more
    return openai.AsyncOpenAI(base_url=base_url, api_key=key, http_client=transport, **settings)


def pool_of(client: Any, connections: int, tls: Any) -> Any:
    """Give the client connections that know of themselves; return what knows them all."""
    transports = [client._transport, *filter(None, client._mounts.values())]  # the latter if there is a proxy
    if any(hasattr(transport, "get_client") for transport in transports):
        connector = Connector(connections, tls)
        session = aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())
        for transport in transports:
            transport.client = session
        return connector
    return Watch([transport._pool for transport in transports])


def without_key(headers: dict[str, str]) -> dict[str, Any]:
    """Return the extra_headers of each call, which keep the SDK from sending a key if there is none."""
    return {} if "Authorization" in headers else {"Authorization": openai.Omit()}


@contextlib.asynccontextmanager
async def connect(base_url: str, headers: dict[str, str], concurrency: int) -> AsyncIterator[Post]:
    """Open a client; see the contract in the package's docstring."""
    keyless = without_key(headers)
    async with open_client(base_url, headers, concurrency, resend=True) as client:
        create: dict[str, Any] = {
            "/chat/completions": client.chat.completions.with_raw_response.create,
            "/responses": client.responses.with_raw_response.create,
            "/completions": client.completions.with_raw_response.create,
            "/embeddings": client.embeddings.with_raw_response.create,
            "/models": client.models.with_raw_response.list,
        }
        known = {path: inspect.signature(call).parameters.keys() for path, call in create.items()}

        async def other(url: str, arguments: dict[str, Any], options: Any) -> httpx2.Response:
            """Call what the SDK has no typed function for here."""
            if arguments:
                return await client.post(url, cast_to=httpx2.Response, body=arguments, options=options)
            return await client.get(url, cast_to=httpx2.Response, options=options)

        async def post(path: str, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
            url, _, query = path.partition("?")
            arguments: dict[str, Any] = json.loads(body or "{}")
            if url == "/embeddings":
                arguments.setdefault("encoding_format", "float")  # the API's default; the SDK's own is base64
            extra = dict(pair.split("=", 1) for pair in query.split("&") if "=" in pair)
            try:
                if url not in create:
                    found = await other(url, arguments, {"params": extra, "headers": keyless})
                    return found.status_code, found.headers, found.content
                # Other servers' own; and `stream`, or else the SDK would leave the reply unread.
                more = {name: arguments.pop(name) for name in arguments.keys() - (known[url] - {"stream"})}
                reply = await create[url](
                    **arguments, extra_query=extra, extra_headers=keyless, extra_body=more or None
                )
            except openai.APIStatusError as failure:
                return failure.status_code, failure.response.headers, failure.response.content
            except BELOW_HTTP as failure:
                raise below_http(failure) from failure
            content = reply.http_response.content
            if len(content) <= MAX_PARSED:
                with contextlib.suppress(ValueError, TypeError, RecursionError, openai.OpenAIError):
                    reply.parse()  # into typed objects, as its users do; what that cannot read is for the core
            return reply.http_response.status_code, reply.http_response.headers, content

        yield post


def below_http(failure: BaseException) -> Exception:
    """Return the built-in exception for what the SDK wraps; its aiohttp transport calls a refusal a time-out."""
    refused = False
    for _ in range(20):  # causes may go round in a circle
        refused = refused or type(failure).__name__ in REFUSED
        cause = failure.__cause__ or failure.__context__
        if cause is None:
            break
        failure = cause
    text = " ".join(f"{type(failure).__name__}: {failure}".split())
    if refused or isinstance(failure, ConnectionRefusedError):
        return ConnectionRefusedError(text)
    return TimeoutError(text) if isinstance(failure, TimeoutError) else ConnectionError(text)
