"""The openai-sdk backend: the official SDK, called as its users call it. Needs: pip install openai.

Each request goes through the SDK's typed `create` and is parsed into its typed objects, so that a comparison shows what
the SDK costs; the core then reads the same bytes. Retries and redirects are off, because the core has its own rules
for both. Where aiohttp is installed too, the SDK's aiohttp transport is used, several times lighter than its default.
"""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx2  # the SDK's own HTTP library since 3.0
import openai

from . import Post


@asynccontextmanager
async def connect(base_url: str, headers: dict[str, str], concurrency: int) -> AsyncIterator[Post]:
    """Open a client; see the contract in the package's docstring."""
    keyless: dict[str, Any] = {} if "Authorization" in headers else {"Authorization": openai.Omit()}
    pool = httpx2.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    transport: Any = openai.DefaultAioHttpClient if has_aiohttp() else openai.DefaultAsyncHttpxClient
    async with openai.AsyncOpenAI(
        base_url=base_url,
        api_key="the key is in the headers",
        default_headers=headers,
        max_retries=0,
        timeout=None,
        http_client=transport(limits=pool, follow_redirects=False, timeout=None),
    ) as client:
        create: dict[str, Any] = {
            "/chat/completions": client.chat.completions.with_raw_response.create,
            "/responses": client.responses.with_raw_response.create,
            "/completions": client.completions.with_raw_response.create,
            "/embeddings": client.embeddings.with_raw_response.create,
        }

        async def post(path: str, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
            url, _, query = path.partition("?")
            arguments: dict[str, Any] = json.loads(body)
            extra = dict(pair.split("=", 1) for pair in query.split("&") if "=" in pair)
            try:
                reply = await create[url](**arguments, extra_query=extra, extra_headers=keyless)
            except openai.APIStatusError as failure:
                return failure.status_code, failure.response.headers, failure.response.content
            except openai.APITimeoutError as failure:
                raise TimeoutError("the SDK's time-out") from failure
            except openai.APIConnectionError as failure:
                cause = failure.__cause__ or failure
                raise ConnectionError(f"{type(cause).__name__}: {cause}") from cause
            http = reply.http_response
            content = http.content
            reply.parse()
            return http.status_code, http.headers, content

        yield post


def has_aiohttp() -> bool:
    """Say whether the SDK's aiohttp transport can be used."""
    try:
        import aiohttp  # noqa: F401
    except ImportError:
        return False
    return True
