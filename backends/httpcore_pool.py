"""httpcore's connections, with what the contract asks of them: used by openai-sdk where aiohttp is not installed."""

from contextvars import ContextVar
from typing import Any

import httpcore2

from . import ALIVE
from .pool import Reuse

__all__ = ["Watch"]


class Stream(httpcore2.AsyncNetworkStream):
    """One connection: knows whether it was reused for its request, and whether a byte of the reply has come."""

    def __init__(self, stream: Any, watch: "Watch") -> None:
        self._stream, self._watch = stream, watch
        self.reused = self.heard = self.dropped = False
        self._stales = watch.stales

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Write a part of a request; the first one after a reply begins the next."""
        if self.heard:
            if self.reused and self._watch.reuse.score:
                self._watch.reuse.on_reused()
            self.reused, self.heard = True, False
        USED.set(self)
        await self._stream.write(buffer, timeout)

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Read a part of a reply. What comes after the first bytes shows that the call is alive."""
        data: bytes = await self._stream.read(max_bytes, timeout)
        if self.heard and data and (alive := ALIVE.get()):
            alive()
        self.heard = self.heard or bool(data)
        return data

    async def aclose(self) -> None:
        """Close it."""
        await self._stream.aclose()

    async def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> "Stream":
        """Return the connection that TLS makes of it."""
        return Stream(await self._stream.start_tls(ssl_context, server_hostname, timeout), self._watch)

    def get_extra_info(self, info: str) -> Any:
        """Return a property of the stream. A connection that must not be used again claims to be readable."""
        watch = self._watch
        if info == "is_readable" and (self.dropped or self._stales != watch.stales or not watch.reuse.allowed):
            return True  # httpcore then treats it as closed by the server
        return self._stream.get_extra_info(info)


USED: ContextVar[Stream | None] = ContextVar("used", default=None)  # the connection that this task's request is sent on


class Watch(httpcore2.AsyncNetworkBackend):
    """What opens the connections of some pools, and knows them."""

    def __init__(self, pools: list[Any]) -> None:
        self.reuse, self.stales = Reuse(), 0
        self._backend = pools[0]._network_backend
        for pool in pools:
            pool._network_backend = self

    async def connect_tcp(self, host: str, port: int, *more: Any, **options: Any) -> Stream:
        """Open a connection."""
        USED.set(None)
        return Stream(await self._backend.connect_tcp(host, port, *more, **options), self)

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await self._backend.sleep(seconds)

    def is_stale(self) -> bool:
        """Return whether the request that has just failed was sent on a stale connection; count that."""
        stream = USED.get()
        if stream is None or not stream.reused or stream.heard:
            return False
        stream.heard = True  # once
        self.reuse.on_stale()
        self.stales += 1  # the other connections have most likely gone the same way
        return True

    def drop(self) -> None:
        """Keep the connection of the reply that has just begun from being used again. Its body can still be read."""
        stream = USED.get()
        if stream is not None:
            stream.dropped = True
