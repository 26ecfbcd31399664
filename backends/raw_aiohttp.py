"""The raw-aiohttp backend: one aiohttp session, a pool as large as the run needs. Needs: pip install aiohttp."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import aiohttp
from multidict import CIMultiDict

from . import MAX_BODY, Post, proxy_for, tls_context
from .aiohttp_pool import Connector


@asynccontextmanager
async def connect(base_url: str, headers: dict[str, str], concurrency: int) -> AsyncIterator[Post]:
    """Open a session; see the contract in the package's docstring."""
    fields = CIMultiDict(headers)  # what aiohttp would make of them for each request
    connector = Connector(concurrency, tls_context(base_url))
    async with aiohttp.ClientSession(
        connector=connector,  # no headers here: aiohttp sends a session's headers to the proxy, too, in CONNECT
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),  # the core keeps the time
        cookie_jar=aiohttp.DummyCookieJar(),
        proxy=proxy_for(base_url),  # trust_env knows no ALL_PROXY, and would take passwords from ~/.netrc
    ) as session:

        async def post(path: str, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
            method, url, content = "POST" if body else "GET", base_url + path, body or None
            try:
                try:
                    reply = await session.request(method, url, headers=fields, data=content, allow_redirects=False)
                except (aiohttp.ClientError, OSError):
                    if not connector.is_stale():
                        raise
                    reply = await session.request(method, url, headers=fields, data=content, allow_redirects=False)
                if reply.status >= 500:
                    connector.drop()
                return reply.status, reply.headers, await read(reply)
            except TimeoutError as failure:
                raise TimeoutError(str(failure)) from failure
            except aiohttp.ClientConnectorError as failure:
                raise ConnectionRefusedError(f"{failure}") from failure
            except aiohttp.ClientError as failure:
                raise ConnectionError(f"{type(failure).__name__}: {failure}") from failure

        yield post


async def read(reply: aiohttp.ClientResponse) -> bytes:
    """Return the body. Raises ConnectionError if it is larger than any answer should be."""
    content = reply.content
    if content.is_eof() and content.total_bytes <= MAX_BODY:  # the usual case: it has come with the head
        return content.read_nowait()
    body = bytearray()
    try:
        while block := await content.readany():  # when it has read the last, it releases the connection
            body += block
            if len(body) > MAX_BODY:
                raise ConnectionError(f"the body is longer than {MAX_BODY} bytes")
    except BaseException:
        reply.close()
        raise
    return bytes(body)
