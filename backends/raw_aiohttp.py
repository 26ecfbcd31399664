"""The raw-aiohttp backend: one aiohttp session, a pool as large as the run needs. Needs: pip install aiohttp."""

import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from multidict import CIMultiDict

from . import MAX_BODY, Post, proxy_for, tls_context


class Socket(socket.socket):
    """A socket that reads at most 64 KiB: for the 256 KiB that asyncio asks for, malloc goes to the kernel."""

    def recv(self, size: int, flags: int = 0) -> bytes:
        return super().recv(min(size, 65536), flags)


@asynccontextmanager
async def connect(base_url: str, headers: dict[str, str], concurrency: int) -> AsyncIterator[Post]:
    """Open a session; see the contract in the package's docstring."""

    def new_socket(address: tuple[Any, ...]) -> Socket:
        return Socket(*address[:3])

    fields = CIMultiDict(headers)  # what aiohttp would make of them for each request
    connector = aiohttp.TCPConnector(limit=concurrency, ssl=tls_context(base_url), socket_factory=new_socket)
    async with aiohttp.ClientSession(
        connector=connector,  # and no headers: those of a session go to the proxy too, in CONNECT
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),  # the core keeps the time
        cookie_jar=aiohttp.DummyCookieJar(),
        proxy=proxy_for(base_url),  # trust_env knows no ALL_PROXY, and would take passwords from ~/.netrc
    ) as session:

        async def post(path: str, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
            try:
                method = "POST" if body else "GET"
                reply = await session.request(
                    method, base_url + path, headers=fields, data=body or None, allow_redirects=False
                )
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
    body = bytearray()
    try:
        while block := await reply.content.readany():  # when it has read the last, it releases the connection
            body += block
            if len(body) > MAX_BODY:
                raise ConnectionError(f"the body is longer than {MAX_BODY} bytes")
    except BaseException:
        reply.close()
        raise
    return bytes(body)
