"""The raw-aiohttp backend: one aiohttp session, a pool as large as the run needs. Needs: pip install aiohttp."""

import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import aiohttp

from . import MAX_BODY, Post, proxy_for


@asynccontextmanager
async def connect(base_url: str, headers: dict[str, str], concurrency: int) -> AsyncIterator[Post]:
    """Open a session; see the contract in the package's docstring."""
    connector = aiohttp.TCPConnector(limit=concurrency, ssl=ssl.create_default_context())
    async with aiohttp.ClientSession(
        connector=connector,
        headers=headers,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),  # the core keeps the time
        cookie_jar=aiohttp.DummyCookieJar(),
        proxy=proxy_for(base_url),  # trust_env knows no ALL_PROXY, and would take passwords from ~/.netrc
    ) as session:

        async def post(path: str, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
            try:
                async with session.post(base_url + path, data=body, allow_redirects=False) as reply:
                    return reply.status, reply.headers, await bounded(reply)
            except TimeoutError as failure:
                raise TimeoutError(str(failure)) from failure
            except aiohttp.ClientConnectorError as failure:
                raise ConnectionRefusedError(f"{failure}") from failure
            except aiohttp.ClientError as failure:
                raise ConnectionError(f"{type(failure).__name__}: {failure}") from failure

        yield post


async def bounded(reply: aiohttp.ClientResponse) -> bytes:
    """Return the body. Raises ConnectionError where it is larger than any answer should be."""
    if (reply.content_length or MAX_BODY) < MAX_BODY and "content-encoding" not in reply.headers:
        return await reply.read()
    body = bytearray()
    while block := await reply.content.readany():
        body += block
        if len(body) > MAX_BODY:
            raise ConnectionError(f"the body is longer than {MAX_BODY} bytes")
    return bytes(body)
