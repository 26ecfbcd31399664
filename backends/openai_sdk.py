"""The openai-sdk backend: the official SDK, called as its users call it. Needs: pip install openai.

Each request goes through the SDK's typed `create` and is parsed into its typed objects, so that a comparison shows what
the SDK costs; the core then reads the same bytes. Retries and redirects are off, because the core has its own rules
for both. Where aiohttp is installed too, the SDK's aiohttp transport is used, several times lighter than its default.
"""

import contextlib
import inspect
import json
import os
import platform
import ssl
import sys
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx2  # the SDK's own HTTP library since 3.0
import openai

from . import Post, proxy_for

BELOW_HTTP: tuple[type[Exception], ...] = (openai.APIConnectionError, httpx2.HTTPError)
REFUSED = ("ClientConnectorError", "ClientConnectorDNSError", "ConnectError")
Transport: Any = openai.DefaultAsyncHttpxClient
with contextlib.suppress(ImportError):
    import aiohttp

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


def open_client(base_url: str, headers: dict[str, str], connections: int, **more: Any) -> openai.AsyncOpenAI:
    """Return the SDK's client, to be entered, without its own retries and redirects."""
    pool = httpx2.Limits(max_connections=connections, max_keepalive_connections=connections)
    network: dict[str, Any] = {"proxy": proxy_for(base_url), "verify": ssl.create_default_context(), "trust_env": False}
    transport = Transport(limits=pool, follow_redirects=False, timeout=None, **network)
    key = "the key is in the headers"
    settings = {"default_headers": headers, "max_retries": 0, "timeout": None, "http_client": transport} | more
    return openai.AsyncOpenAI(base_url=base_url, api_key=key, **settings)


def without_key(headers: dict[str, str]) -> dict[str, Any]:
    """Return what a call is to be given as extra_headers, lest the SDK sends a key where there is none."""
    return {} if "Authorization" in headers else {"Authorization": openai.Omit()}


@contextlib.asynccontextmanager
async def connect(base_url: str, headers: dict[str, str], concurrency: int) -> AsyncIterator[Post]:
    """Open a client; see the contract in the package's docstring."""
    keyless = without_key(headers)
    async with open_client(base_url, headers, concurrency) as client:
        create: dict[str, Any] = {
            "/chat/completions": client.chat.completions.with_raw_response.create,
            "/responses": client.responses.with_raw_response.create,
            "/completions": client.completions.with_raw_response.create,
            "/embeddings": client.embeddings.with_raw_response.create,
            "/models": client.models.with_raw_response.list,
        }
        known = {path: inspect.signature(call).parameters.keys() for path, call in create.items()}

        async def post(path: str, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
            url, _, query = path.partition("?")
            arguments: dict[str, Any] = json.loads(body or "{}")
            if url == "/embeddings":
                arguments.setdefault("encoding_format", "float")  # the API's default; the SDK's own is base64
            more = {name: arguments.pop(name) for name in arguments.keys() - known[url]}  # other servers' own
            extra = dict(pair.split("=", 1) for pair in query.split("&") if "=" in pair)
            try:
                reply = await create[url](
                    **arguments, extra_query=extra, extra_headers=keyless, extra_body=more or None
                )
            except openai.APIStatusError as failure:
                return failure.status_code, failure.response.headers, failure.response.content
            except BELOW_HTTP as failure:
                raise below_http(failure) from failure
            with contextlib.suppress(ValueError, TypeError, openai.OpenAIError):
                reply.parse()  # into typed objects, as its users do; what that cannot read is for the core
            return reply.http_response.status_code, reply.http_response.headers, reply.http_response.content

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
