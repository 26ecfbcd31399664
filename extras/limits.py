"""One server's limits for several runs in this process: `limits = Limits(rpm=600)`, run(..., limits=limits) for each.

The runs share one Limiter: the calls in flight, the rates, what was learned, and outages. They may go on at once in one
event loop, one after another, or in threads, each with an event loop of its own. Calls go out in turn; among runs in
different threads there is no order, and each thread may be a call ahead of the limit for a moment, which it makes up
for. Other processes need --shard or dask-cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

from . import core


class Limits:
    """What is passed to the runs; each has a `share` of it."""

    def __init__(
        self,
        rpm: float | None,
        tpm: float | None,
        concurrency: int | str,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        calls = core.AUTO_CONCURRENCY if concurrency == "auto" else int(concurrency)
        if calls < 1 or not all(limit > 0 for limit in (rpm, tpm) if limit is not None):
            raise ValueError("rpm, tpm and concurrency are greater than 0")
        start = 16 if concurrency == "auto" else calls
        self.clock, self.sleep = clock, sleep
        self.limiter = Common(start, calls, clock, sleep, rpm, tpm, core.DEFAULT_TIMEOUT)

    def __repr__(self) -> str:
        return f"<Limits of {self.limiter!r}>"

    def learned(self) -> list[str]:
        """Return what is known of the server's limits."""
        return self.limiter.learned()

    def share(self) -> Share:
        """Return the limiter of one run."""
        return Share(self.limiter)


class Share:
    """The Limiter as one run sees it: all is common but how many of its own calls wait."""

    _common: core.Limiter
    queued: int

    def __init__(self, common: core.Limiter) -> None:
        vars(self).update(_common=common, queued=0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._common, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self):
            vars(self)[name] = value
        else:
            setattr(self._common, name, value)

    async def acquire(self, cost: float = 0.0, again: bool = False) -> float:
        """Wait until a call may go out, as the Limiter does."""
        self.queued += 1
        try:
            return await self._common.acquire(cost, again)
        finally:
            self.queued -= 1


class Common(core.Limiter):
    """A Limiter that belongs to no event loop and to no thread."""

    LONGEST = 0.1, 1.0  # seconds after which it is looked again, for a call's end and for a limit: another thread's

    def __init__(self, *options: Any) -> None:
        super().__init__(*options)
        self._guard = threading.RLock()
        self._queue: Any = Turns()
        self.changed: Any = Signal()

    def admit(self, cost: float, again: bool) -> bool:
        with self._guard:
            return super().admit(cost, again)

    def enter(self, call: core.Call) -> None:
        with self._guard:
            super().enter(call)

    def settle(self, call: core.Call, outcome: core.Reply | core.PromptError) -> None:
        with self._guard:
            super().settle(call, outcome)

    def _let_go(self, cost: float, now: float) -> None:
        with self._guard:
            super()._let_go(cost, now)

    async def _change(self, span: float) -> None:
        if span < math.inf:
            return await super()._change(min(span, self.LONGEST[1]))
        self.changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.LONGEST[0]):
                await self.changed.wait()


class Turns:
    """A lock for each event loop."""

    def __init__(self) -> None:
        self._locks: weakref.WeakKeyDictionary[Any, asyncio.Lock] = weakref.WeakKeyDictionary()

    def _lock(self) -> asyncio.Lock:
        return self._locks.setdefault(asyncio.get_running_loop(), asyncio.Lock())

    async def __aenter__(self) -> None:
        await self._lock().acquire()

    async def __aexit__(self, *failure: object) -> None:
        self._lock().release()


class Signal:
    """An Event that wakes who waits for it in any event loop."""

    def __init__(self) -> None:
        self._set = False
        self._waiting: set[asyncio.Future[None]] = set()

    def clear(self) -> None:
        """Forget what has happened."""
        self._set = False

    def set(self) -> None:
        """Wake all."""
        self._set = True
        for future in [*self._waiting]:
            with contextlib.suppress(RuntimeError):  # its event loop was closed
                future.get_loop().call_soon_threadsafe(wake, future)

    async def wait(self) -> None:
        """Wait for it."""
        if self._set:
            return
        future = asyncio.get_running_loop().create_future()
        self._waiting.add(future)
        try:
            await future
        finally:
            self._waiting.discard(future)


def wake(future: asyncio.Future[None]) -> None:
    """Let go on who waits."""
    if not future.done():
        future.set_result(None)
