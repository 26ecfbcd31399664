"""Which calls are lost: stragglers among others that are answered, and those that a silent server leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from collections.abc import Iterable, Sequence

from . import core


class Patience:
    """Which calls are given up as lost, learned from how long the answered ones took.

    A call is late when it takes half as long again as the slowest answer so far, longer while few are known, and
    twice that after each time that its prompt was given up, so that an honest slow answer comes in the end. A late
    call is lost once one that began after it was late has been answered; where there is no such call, the oldest
    is given up to make one. An honest slow answer may be given up too, and paid twice: so no more calls are given up
    than 3 and a twentieth of the answers.

    Where all calls in flight are late, and they are several, it is the server that is silent: one is given up at ever
    longer intervals, to try whether it answers again, and a second after the first answer all that began before; at
    once if calls were answered that began after all of these (one replica of ten that never answers, when all prompts
    are out). These count for nothing, and cost their prompts no attempt.
    """

    LEAST = 1.0  # seconds
    SEVERAL = 3  # calls in flight, of which one may be slow by itself
    LONGEST = 8.0  # seconds between two tries of a silent server

    def __init__(self, run: core.Run, resend: bool = True) -> None:
        self.run, self._resend = run, resend
        self._asking: asyncio.Task[None] | None = None  # whether a silent server is back
        self.answers = 0
        self.slowest = 0.0
        self.given_up = 0
        self.latest = -math.inf  # the start of the latest call that was answered
        self._silent = self._back = -math.inf  # when the server was silent last, and when it answered after that
        self._passed = False  # whether it had answered calls that began after all that were in flight then
        self._next, self._interval = -math.inf, self.LEAST  # the next try of a silent server

    def limit(self, losses: int | None) -> float:
        """Return after how many seconds a call is late."""
        if not self.answers or losses is None or not self._resend:
            return math.inf
        return max(self.LEAST, 1.5 * self.slowest * (1 + 20 / self.answers)) * 2.0**losses

    def answered(self, call: core.Call) -> None:
        """Learn from an answer."""
        self.answers += 1
        if call.latency > self.slowest and call.started > self._silent:
            self.slowest = call.latency
        if call.started > self.latest:
            self.latest = call.started
        if self._silent > self._back:
            self._back, self._interval = call.started + call.latency, self.LEAST

    @property
    def late(self) -> float:
        """After how many seconds a call is late."""
        return self.limit(0)

    def give_up(self, calls: Sequence[core.Call], now: float) -> None:
        """End the calls that are lost; ask a silent server whether it is back."""
        for call, silent in self.lost(calls, now, self.run.stopped is not None):
            took = f"no answer in {core.duration(now - call.started)}"
            slowest = core.duration(self.slowest)
            reason = core.PromptError("lost", f"{took}; the slowest took {slowest}", "retry")
            reason.free = silent
            call.end(reason)
        if self.is_silent():
            self.run.limiter.silent = now
            if self._asking is None and not isinstance(self.run.api, core.Own):
                self._asking = asyncio.ensure_future(self._ask())
        elif self._asking and self._asking.done():
            self._asking = None

    async def close(self) -> None:
        """Ask no longer."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)

    def lost(self, calls: Iterable[core.Call], now: float, stopping: bool = False) -> list[tuple[core.Call, bool]]:
        """Return the calls that are to be given up, and whether it is the server's silence that each is lost to.

        `calls` are those in flight, in the order of their starts. A run that is `stopping` tries no server again.
        """

        def due(call: core.Call) -> float:
            return max(call.started, call.heard) + self.limit(call.losses)

        calls, least = [call for call in calls if call.ended is None], self.limit(0)
        late = [call for call in itertools.takewhile(lambda call: now - call.started > least, calls) if now > due(call)]
        grace = now <= self._back + self.LEAST and not self._passed  # in which what began before may still be answered
        soon = self._silent if grace else -math.inf
        found = [call for call in late if self.latest > due(call) and call.started >= soon]
        silenced = [call for call in found if call.started < self._silent]
        if late and not found and not grace and calls[-1].started <= now - least:
            found = late if stopping else late[:1]
            self._passed = self._passed if self.is_silent() else self.latest > calls[-1].started
            if stopping or len(calls) >= self.SEVERAL:
                silenced, found = found if stopping else self._try_again(found, now), []
        counted = [call for call in found if call not in silenced][: max(0, 3 + self.answers // 20 - self.given_up)]
        self.given_up += len(counted)
        return [(call, True) for call in silenced] + [(call, False) for call in counted]

    def is_silent(self) -> bool:
        """Whether the server is silent, as far as is known."""
        return self._silent > self._back

    def try_now(self) -> None:
        """Try it now: something says that it is back."""
        self._next = -math.inf

    def _try_again(self, calls: list[core.Call], now: float) -> list[core.Call]:
        """Return the calls if it is time to try a silent server, else none."""
        self._silent = now
        if now < self._next:
            return []
        self._next, self._interval = now + self._interval, min(self.LONGEST, 2 * self._interval)
        return calls

    async def _ask(self) -> None:
        """Ask a silent server for something that no prompt is part of, until it answers: it may be back."""
        while self.is_silent() and not self.run.stopped:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(core.PROBE):
                    if await self.run.api.is_there(self.run.call):
                        return self.try_now()
            await self.run.sleep(core.PROBE / 4)
