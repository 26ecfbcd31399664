"""One server's limits for several runs in this process: `limits = Limits(rpm=600)`, run(..., limits=limits) for each.

The runs share one Limiter: the calls in flight, the rates, what was learned, and outages. They may run at the same time
in one event loop, one after another, or in threads, each with an event loop of its own. Calls go out in turn; between
threads there is no order, and each thread may be one call ahead of the limit for a moment, after which it waits longer.
Processes do not share it: use dask-cluster.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

from . import core

# The limiters whose slots the current call holds, each in a list that is empty when the call has ended.
holding: ContextVar[tuple[list[core.Limiter], ...]] = ContextVar("holding", default=())


class Limits:
    """The limits that runs share: `rpm` and `tpm` a minute (None: learned), `concurrency` a number or "auto".

    Raises ValueError for values that are not above 0.
    """

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
            raise ValueError("rpm, tpm and concurrency must be greater than 0")
        start = 16 if concurrency == "auto" else calls
        self.clock, self.sleep = clock, sleep
        self.limiter = Common(start, calls, clock, sleep, rpm, tpm, core.DEFAULT_TIMEOUT)

    def __repr__(self) -> str:
        return f"<Limits of {self.limiter!r}>"

    def learned(self) -> list[str]:
        """Return a line for each limit that is known, as the report has them."""
        return list(self.limiter.learned())

    def share(self, at_odds: Any) -> Share:
        """Return the limiter of one run. Raises UsageError inside a call that has the same one: it may never end.

        Raises ValueError if the run has what is `at_odds` with it.
        """
        if at_odds:
            raise ValueError("rpm and tpm are set in Limits, which no bulk backend takes")
        if any(self.limiter in held for held in holding.get()):
            raise core.UsageError("send starts a run with its own limits, which may wait for itself; pass other limits")
        return Share(self.limiter)


class Share:
    """The shared Limiter as one run uses it; only the number of its own waiting calls is the run's."""

    _common: core.Limiter
    queued: int

    def __init__(self, common: core.Limiter) -> None:
        vars(self).update(_common=common, queued=0, defer=None, opened=None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._common, name)

    @property
    def has_room(self) -> bool:
        """Whether another call may be sent or wait: each run has one that waits, so that they take turns."""
        return bool(self._common.has_room or not self.queued)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self):
            vars(self)[name] = value
        else:
            setattr(self._common, name, value)

    def admit(self, call: core.Call) -> bool:
        """Let a call go out at once if that is allowed, as the Limiter does."""
        admitted = self._common.admit(call)
        if admitted:
            holding.set((*holding.get(), [self._common]))
        return admitted

    def settle(self, call: core.Call, outcome: core.Reply | core.PromptError) -> None:
        """Count a call as ended, as the Limiter does."""
        *others, held = holding.get()
        held.clear()
        holding.set((*others,))
        self._common.settle(call, outcome)

    async def turn(self, call: core.Call, again: bool) -> float:
        """Wait until a call may go out, as the Limiter does."""
        self.queued += 1
        try:
            waited = await self._common.turn(call, again)
        finally:
            self.queued -= 1
        holding.set((*holding.get(), [self._common]))
        return waited


class Common(core.best("rejections", core.Limiter)):  # type: ignore[misc]
    """A Limiter that several event loops and threads can use."""

    LONGEST = 0.1  # seconds after which a waiting call looks again: another thread may have freed a slot

    def __init__(self, *options: Any) -> None:
        super().__init__(*options)
        self._guard = threading.RLock()

    def admit(self, call: core.Call) -> bool:
        with self._guard:
            return bool(super().admit(call))

    def settle(self, call: core.Call, outcome: core.Reply | core.PromptError) -> None:
        with self._guard:
            super().settle(call, outcome)

    def release(self) -> None:
        with self._guard:
            super().release()

    async def turn(self, call: core.Call, again: bool) -> float:
        held_up = 0.0
        with self._guard:
            waiting = self._line_up(call, again)
        try:
            while not waiting.done():
                began, span = self._clock(), self._due - self._clock()
                await asyncio.wait([waiting], timeout=max(0.001, min(self.LONGEST, span)))
                held_up += self._clock() - began if span > 0 else 0.0
                self.release()
        except asyncio.CancelledError:
            waiting.cancel()
            with self._guard:
                self._leave(call, waiting, again)
            raise
        return held_up

    @staticmethod
    def _call_up(waiting: asyncio.Future[None]) -> None:
        try:
            same = waiting.get_loop() is asyncio.get_running_loop()
        except RuntimeError:
            same = False
        if same:
            waiting.set_result(None)
        else:
            waiting.get_loop().call_soon_threadsafe(core.Limiter._call_up, waiting)

    def _set_alarm(self, span: float, now: float) -> None:
        self._due = now + span  # every waiting call reads it
