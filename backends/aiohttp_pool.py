"""aiohttp's connections, as the contract requires them: for raw-aiohttp, and for openai-sdk if aiohttp is installed.

aiohttp pools connections by itself and says nothing of them. Here each one knows whether it was reused, whether a byte
of its reply has come, and whom to tell that the call is alive.
"""

import functools
import socket
from contextvars import ContextVar
from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler

from . import ALIVE
from .pool import Reuse

__all__ = ["Connector"]


class Socket(socket.socket):
    """A socket that reads at most 64 KiB: for the 256 KiB that asyncio asks for, malloc goes to the kernel."""

    def recv(self, size: int, flags: int = 0) -> bytes:
        return super().recv(min(size, 65536), flags)


class Handler(ResponseHandler):
    """The protocol of one connection."""

    reused = False  # whether it has answered before this request
    heard = False  # whether a byte of the reply has come
    stale = False
    alive: Any = None  # the function that tells the run that bytes have come

    def data_received(self, data: bytes) -> None:
        """Called by the event loop. What comes after the first bytes shows that the call is alive."""
        if data:  # aiohttp itself calls with nothing, to go on after a pause
            if self.heard and self.alive:
                self.alive()
            self.heard = True
        super().data_received(data)


USED: ContextVar[Handler | None] = ContextVar("used", default=None)  # the connection that this task's request was given


class Connector(aiohttp.TCPConnector):
    """A pool of at most `limit` connections to one server."""

    def __init__(self, limit: int, tls: Any) -> None:
        super().__init__(limit=limit, ssl=tls, socket_factory=lambda address: Socket(*address[:3]))
        self._factory: Any = functools.partial(Handler, loop=self._loop)
        self.reuse = Reuse()

    async def connect(self, req: Any, traces: Any, timeout: Any) -> Any:
        """Return a connection for a request: a fresh one after a stale one, and while no connection is reused."""
        before, reuse = USED.get(), self.reuse
        USED.set(None)
        connection: Any = await super().connect(req, traces, timeout)
        handler: Handler = connection._protocol
        while handler.heard and (not reuse.allowed or (before is not None and before.stale)):
            connection.close()  # the idle ones of a server that closes them have most likely gone the same way
            connection = await super().connect(req, traces, timeout)
            handler = connection._protocol
        if handler.reused and reuse.score:  # it has answered on that occasion
            reuse.on_reused()
        handler.reused, handler.heard, handler.alive = handler.heard, False, ALIVE.get()
        if not reuse.allowed:
            handler.force_close()
        USED.set(handler)
        return connection

    def is_stale(self) -> bool:
        """Return whether the request that has just failed was sent on a stale connection; count that."""
        handler = USED.get()
        if handler is None or not handler.reused or handler.heard:
            return False
        handler.stale = True
        self.reuse.on_stale()
        return True

    def drop(self) -> None:
        """Keep the connection of the reply that has just begun from being used again. Its body can still be read."""
        handler = USED.get()
        if handler is None:
            return
        if handler.should_close:  # more of the body is to come
            handler.force_close()
        else:  # it is in the pool already, where a closed one is passed over
            handler.close()
