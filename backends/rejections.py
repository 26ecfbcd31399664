"""What rejections show of a server's limits: how many calls it takes at once, how many a minute, or in which window.

The Limiter of backends/limiter.py measures answers and headers; this one finds the limits behind rejections, too.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping
from typing import Any

from . import core, limiter
from .limits import at_once_in


class Rejected(limiter.Quota):
    """A quota that is learned from rejections, where neither the user nor the headers tell it.

    What was accepted between two of them, when the bucket was empty, is what was refilled. Some limits are windows
    instead: several calls are accepted at once after nothing was. While nothing is known of an empty bucket, single
    calls try it at intervals that fit the usual windows (STEPS).
    """

    STEPS = (0.25, 0.5, 1, 2, 5, 10, 15, 30, 60, 90, 120, 300, 600, 900, 1800, *range(3600, 90_000, 3600))  # seconds
    USUAL = 1, 60, 3600  # seconds of a window
    TRIAL = 50.0  # calls a second, if the bucket may hold several: few are rejected before one is seen to be
    PAUSE = 2.0  # seconds in which an unknown bucket of tokens may fill
    ENOUGH = 10  # calls that tell a rate
    LATE = 1.02  # a window is not over before this share of its length

    def __init__(self, name: str, told: float | None = None) -> None:
        super().__init__(name, told)
        self._start = self._last = 0.0, 0.0  # an empty bucket, and what was spent by then: long ago, and the last time
        self.barren = 0  # rejections since anything was accepted
        self._emptied = self._tried = 0.0  # when the first and the last of them came
        self._sure = self._fades = False
        self._burst, self._burst_began = 0.0, math.inf  # what a full bucket was seen to hold, when it was begun
        self._growth = 0.05  # by which the rate rises after each call that was accepted
        self._accepted = 0  # calls since the last rejection
        self._log: collections.deque[float] = collections.deque(maxlen=10_000)  # when they went out
        self.most = 0  # calls in a learned window
        self._longer = self._least = 0.0  # seconds of a learned window at most, at least
        self._clean, self._until = 0, 2  # calls since one was rejected; windows to the next trial
        self.refused = 0

    def __str__(self) -> str:
        if self.period:
            return f"{self.most} {self.name} in {core.duration(self.period)}, {self.source}"
        return f"{'about ' if self.source == 'from rejections' else ''}{super().__str__()}"

    def tell(self, rate: float, source: str, now: float) -> None:
        """Adopt a rate that other processes of the run have learned."""
        super().tell(rate, source, now)
        if source == "from rejections":
            self._level, self._stamp = 0.0 if self.source == "" else self.level(now), now
            self.rate, self.size, self.source, self.led = rate, 0.0, source, True

    def wait(self, cost: float, now: float) -> float:
        """Return the seconds until so much may be spent."""
        if not self.period:
            return super().wait(cost, now)
        full = self._log[-self.most] + self.period - now if len(self._log) >= self.most else 0.0
        return max(self._closed - now, full, -self.level(now) / self.rate)

    def spare(self, now: float) -> float:
        """Return how much may be spent now; 0.0 if each call has to be checked."""
        return 0.0 if self.period else super().spare(now)

    def spend(self, cost: float, now: float, calls: int = 1) -> None:
        """Take out the cost of calls that go out."""
        super().spend(cost, now, calls)
        if self.source == "from rejections":
            self._log.append(now)
            if self.period:
                self._widen()
            if self.period or self.exploring:
                self.rate = min(1.1 * self.rate, 4 * self.TRIAL)

    def refund(self, cost: float, started: float) -> None:
        """Put back the cost of a call that began at `started` and was rejected."""
        level = self._level
        super().refund(cost, started)
        if self._log:
            self._log.pop()
        self._level = level + (cost if started > self._last[0] else 0.0)
        marks = self._start, self._last
        self._start, self._last = ((when, spent - cost * (started <= when)) for when, spent in marks)

    def guess(self, rate: float, now: float, wait: float = 0.0) -> None:
        """Begin to look for the limit of an empty bucket: a call goes out now and then until one is accepted."""
        self.source, self.size, self.period, self._sure, self._fades = "from rejections", 0.0, 0.0, False, False
        if self.enough:
            self.exploring = True
            return self.refuse(1, now, wait)
        self.empty(now)
        core.log.info("looking for the limit of %s a minute", self.name)
        if self.name == "tokens":
            self.rate, self._level, self._stamp, self._closed = max(0.1, rate), 0.0, now, now + (wait or self.PAUSE)
        else:
            self._hold(now, wait)

    @property
    def enough(self) -> bool:
        """Whether so much was accepted since the bucket was empty that it tells the rate."""
        return self.name == "requests" and self._last[0] > 0 and self.spent - self._last[1] >= self.ENOUGH

    def empty(self, now: float) -> None:
        """Note that the bucket may be empty for the first time."""
        if self._burst_began == math.inf:
            self._burst, self._burst_began = self.spent - self._last[1], self.first
        self._start = self._last = now, self.spent

    def _hold(self, now: float, wait: float) -> None:
        """Let nothing out before the next step, or for so many seconds; then ever more until a call is rejected."""
        self._emptied = self._emptied if self.exploring or self.barren > 1 else now
        ends = (self._emptied + step * self.LATE for step in self.STEPS)
        self._tried, self.exploring = now, True
        self._closed = now + wait if wait else next((end for end in ends if end > now + 0.2), now + 3600)
        self._level, self._stamp, self.rate = 0.0, self._closed, self.TRIAL

    def begin(self) -> None:
        """Note that a full bucket is begun with the next call."""
        self.first = math.inf

    def release(self, span: float = 0.0) -> None:
        """Wait no longer for the next step; do not count the seconds in which the server was down."""
        self._closed, self.barren = min(self._closed, self._tried), 0
        self._start, self._last = ((when + span, spent) for when, spent in (self._start, self._last))

    def let_in(self, started: float = math.inf) -> None:
        """Raise the rate a little after each accepted call, by more the longer no call is rejected."""
        feeling = self.source == "from rejections" and not (self.led or self.exploring or self.period)
        if feeling and started > self._last[0]:
            self._accepted += 1
            more = 1e-5 if self.name == "requests" else 6e-4  # a token limit is known less exactly: calls differ
            faster = 1 + more * (1 + (self._accepted / 250) ** 2) if self._sure else 1 + self._growth
            self.rate = min(self.rate * faster, 1e6)

    def refuse(self, cost: float, now: float, wait: float = 0.0, spent: float = math.inf) -> None:
        """Learn from a call that was rejected, of which nothing more is known than, perhaps, the seconds to `wait`.

        `spent` is what all calls before it had spent: those since may be rejected as well.
        """
        self.refused += 1
        accepted = min(self.spent, spent) - self._last[1]
        if self.led:
            self._level, self._stamp = -cost, now
        elif self.period:
            self._narrow(now, wait)
        elif self._fades and self.barren < 5:
            self.barren += 1
            self.rate, self._growth = 0.9 * self.rate, max(0.002, self._growth / 2)
            self._level, self._stamp = -cost * self.barren, now
        elif accepted < cost * (0.99 if self.exploring or self._sure else 2):
            self.barren += 1
            if self.name == "requests":
                self._hold(now, wait)
            else:  # calls differ: the next may be small enough
                patience = min(8.0, 2.0 ** (self.barren - 3)) if self.barren > 2 else 0.0
                self._level, self._stamp = -max(cost, self.rate * patience), now
        else:
            if self.name == "requests" and (accepted > 3 and wait > 2 if wait else self._is_window(accepted)):
                self._see_window(accepted, now, wait)
            else:
                self._estimate(accepted, cost, now)
            self._burst_began = math.inf
            self.barren, self.exploring, self._accepted = 0, False, 0
            self._last, self.first = (now, self.spent), math.inf
            self._level, self._stamp = -cost, now

    def _estimate(self, accepted: float, cost: float, now: float) -> None:
        """Learn the rate from what was accepted since the bucket was empty: the last time, and over a longer time."""
        more = (cost - 0.5) / 2
        lately = (accepted + more) / max(1e-3, now - self._last[0])
        average = (self._last[1] + accepted - self._start[1] + more) / max(1e-3, now - self._start[0])
        calls = self.name == "requests"  # which are all alike; tokens are known less exactly
        # The limit has changed, or the bucket was not used up.
        if abs(lately / average - 1) > 0.15 if calls else self._sure and lately < 0.9 * self.rate:
            self._start, average = self._last, lately
        # A bucket that holds few was not empty all the time: then the rate is between the average and what was tried.
        few = self._burst < 10 * cost and calls and not 0.9 < self.rate / average < 1.1
        self._growth = (0.05 if self._burst < 10 * cost else 0.01) if self.exploring else self._growth / 3
        self._sure = self._growth < 0.004 or not calls
        self.rate = max(0.01, math.sqrt(average * self.rate) if few and not self.exploring else average)
        core.log.info("limit: %s", self)

    def forget(self) -> None:
        """Discard what was learned: no limit is known."""
        self.rate = self.size = self._level = math.inf
        self.source, self.period, self.exploring = "", 0.0, False
        self._log.clear()

    def _is_window(self, accepted: float) -> bool:
        """Return whether more were accepted at once than a bucket, empty at the last probe, could hold by now."""
        return self.barren > 0 and accepted > 1 + (self._closed - self._emptied) / max(0.1, self._tried - self._emptied)

    def _see_window(self, accepted: float, now: float, wait: float) -> None:
        """Take the limit for a window: the last began at `first`, this one by what was tried at `_closed`.

        If it lets through much less than at first it fades out (HAProxy's http_req_rate): what was let through at first
        comes at a rate.
        """
        began = self._burst_began
        brief = 4 * (self._start[0] - began) < now - began  # all of the first ones were within a window
        if brief and not wait and accepted < 0.6 * self._burst:
            self.rate, self._growth, self._sure, self._fades = self._burst / (now - began), 0.01, False, True
            core.log.info("limit: %s", self)
            return
        self.most, self.size, self.rate, self._clean = int(accepted), 0.0, self.TRIAL, 0
        if round((self._closed - self._emptied) / self.LATE, 1) in self.USUAL and not wait:
            self._clean = -4 * self.most  # hardly any shorter one is tried
        self.period = now + wait - self.first if wait else self._closed - self._emptied
        self._least = self.period if wait else self._tried - self._emptied
        core.log.info("limit: %s", self)

    def _narrow(self, now: float, wait: float) -> None:
        """Learn from a rejection within a window: it is longer, or takes less; more in a row say nothing."""
        self.barren = self.barren + 1 if self._clean < 2 else 0
        if self._longer > self.period:
            near = self._longer < 1.15 * self.period
            self._least, self.period = self.period, self._longer if near else math.sqrt(self.period * self._longer)
        elif not self.barren:
            self.most, self._until = max(1, self.most - 1), min(32, 2 * self._until)
            self._longer = self.period
        self._clean, self._closed = 0, now + (wait or self.period * min(1, 2**self.barren / 20))

    def _widen(self) -> None:
        """After a window without a rejection try a shorter one, as long as that may be, or else a call more."""
        self._clean += 1
        if self._clean % self.most or self._clean < 0:
            return
        self._longer, self.rate = self.period, self.TRIAL
        if self.period > 1.15 * self._least:
            self.period = math.sqrt(self.period * self._least)
        elif self._clean >= self._until * self.most:
            self._clean, self.most = 0, self.most + 1


class Limiter(limiter.Limiter):
    """A Limiter that learns from rejections whether they are for too many calls at once or for too many a minute.

    A rejection that says nothing more is taken for the window's where it hit one call more than were ever answered, for
    the rate's where the next ones are rejected as well. Some proxies reject at random: then it counts only once one of
    the next few calls is rejected, too.
    """

    LOOKS = 50  # at replies, for how many calls at once their headers allow

    def __init__(self, start: int, ceiling: int, *options: Any) -> None:
        super().__init__(start, ceiling, *options)
        self._mark, self._strikes = 0, 0  # calls sent by the last rejection; rejections in a row
        self._unconfirmed: core.Call | None = None  # a call that was rejected, if that is to be confirmed
        self._probe_calls = 0, 0  # the numbers of the calls that do so, from the first one on to the last
        self._looks = 0
        self._quickest = math.inf  # the least latency of an answer
        self._confirmed = self._trusted = 0  # rejections in a row; how many are not to be confirmed

    def _quota(self, name: str, told: float | None) -> limiter.Quota:
        return Rejected(name, told)

    def _is_unusual(self, now: float) -> bool:
        """Whether each answer may change something."""
        sources = self.requests.source, self.tokens.source
        return "from rejections" in sources or self._unconfirmed is not None or super()._is_unusual(now)

    def _closed(self, call: core.Call, now: float) -> float:
        if self._unconfirmed and self.sent < self._probe_calls[1] and self.has_room:
            return max(0.0, self.pause_end - now)
        return super()._closed(call, now)

    def _pace(self, now: float) -> None:
        if self._unconfirmed and now >= self._doubt:
            self._count_probe(now)
        else:
            super()._pace(now)

    def _read(self, call: core.Call, headers: Mapping[str, str], now: float) -> bool:
        if self._looks < self.LOOKS:  # looking for them costs time
            self._looks += 1
            if most := at_once_in(headers):
                self.window.ceiling = min(self.window.ceiling, most)
                if self.window.size >= most:
                    self.window.tell(most)
        return super()._read(call, headers, now)

    def _learn_from(self, call: core.Call) -> None:
        super()._learn_from(call)
        self._quickest = min(self._quickest, call.latency)
        self.requests.let_in(call.started)
        self.tokens.let_in(call.started)
        if self._strikes and call.started > self._rejection:
            self._spread_end = -math.inf

    def mark_down(self, failure: core.PromptError, now: float) -> None:
        """Enter outage mode: one probe a second until the server is back."""
        for quota in (self.requests, self.tokens):
            quota.forget() if quota.exploring else quota.release()
        self._unconfirmed = None
        super().mark_down(failure, now)

    def _mark_up(self, now: float) -> None:
        away = now - (self.away_since or now)
        self.requests.release(away)
        self.tokens.release(away)
        super()._mark_up(now)

    def _rejected(self, call: core.Call, failure: core.PromptError, told: bool, now: float) -> None:
        """Learn from a rejection: the words and headers first, else it is confirmed and then weighed."""
        wait = min(failure.wait or 0.0, core.PAUSE_CEILING)
        if failure.at_once:
            self.window.tell(failure.at_once)
            return
        quota = self.tokens if "token" in failure.scope else self.requests
        if wait:
            self._pause(wait)
        if told or (wait and quota.source in ("as given", "from headers")):
            if not told and quota.source == "from headers" and quota.headers:
                quota.headers.shut(wait, now)
            return
        at_the_door = not self._latency or call.latency < max(self._latency / 4, 0.7 * self._quickest)
        self._turned_away = now if at_the_door else self._turned_away
        confirmed = self._confirmed_by(call, quota, now, at_the_door and not wait)
        if confirmed is not None:
            self._weigh(confirmed, failure, quota, now, at_the_door)
            if wait:
                quota.begin()

    def _confirmed_by(self, call: core.Call, quota: Any, now: float, may_be_chance: bool) -> core.Call | None:
        """Return the rejected call to learn from: itself, the one that it confirms, or None where it says nothing.

        Some proxies reject at random: the first rejection counts once one of a few more calls is rejected, too. Where
        that was so several times in a row (a gate), the next ones are believed.
        """
        unconfirmed, first, last = self._unconfirmed, *self._probe_calls
        if unconfirmed and first <= call.number <= last:
            self._unconfirmed = None
            self._confirmed += 1
            self._trusted = 2 * (self._confirmed - 1)
            return unconfirmed
        if call.started > self._rejection and may_be_chance and self._doubted(quota):
            if not self._trusted:
                self._confirm(call, now)
                return None
            self._trusted -= 1
        elif call.started <= self._rejection:  # one of those that went out together
            if self.window.source == "from rejections" and call.place > self.window.highest:
                self.window.reduce(self.in_flight, self.window.rounds)
            return None
        return call

    def _weigh(self, call: core.Call, failure: core.PromptError, quota: Any, now: float, at_the_door: bool) -> None:
        """Decide whether it was too many at once or too many a minute."""
        wait = min(failure.wait or 0.0, core.PAUSE_CEILING)
        again = call.number - self._mark <= 2
        self._rejection, self._mark = now, self.sent
        if not (quota.source or self._strikes):
            quota.empty(now)
        if at_the_door and quota.source == "from rejections":
            cost, spent = (call.cost, call.spent[1]) if quota is self.tokens else (1, call.spent[0])
            quota.refuse(cost, now, wait, spent - cost)
            if quota.barren > 2 and core.no_service(failure) and self._failing:
                self.mark_down(failure, now)
        elif not at_the_door:
            self.window.reduce(min(self.window.size, self.in_flight + 1) * 2 / 3)
        elif not again and call.place > (self.window.highest if wait else 0.9 * self.window.highest - 1):
            self.window.reduce(self.in_flight, 10 * wait / (self._latency or 1.0))
            self._strikes = 0
        else:
            self._strike(quota, again, now, wait)

    def _doubted(self, quota: Any) -> bool:
        """Return whether a rejection may be random, as those of some servers and proxies are."""
        known = quota.exploring or quota.period > 1 or quota.source in ("as given", "from headers")
        return quota is self.requests and not known

    def _confirm(self, call: core.Call, now: float) -> None:
        """Send a few calls at once: if none of them is rejected, too, the rejection was no limit's."""
        more = int(2 * call.latency * min(1000.0, self.window.throughput)) if self._latency else 0
        more += self.requests.source != ""  # where calls are paced the first may have been a near miss
        self._unconfirmed, self._probe_calls = call, (self.sent + 1, self.sent + 1 + more)
        self._rejection, self._opens = now, self.pause_end

    def _count_probe(self, now: float) -> None:
        """Note that a call goes out to confirm a rejection; the next ones wait until it would have been rejected."""
        assert self._unconfirmed
        if self.sent == self._probe_calls[1]:
            self._opens = now + max(0.02, 2.5 * self._unconfirmed.latency)
        elif self.sent > self._probe_calls[1]:
            self._dismiss()

    def _dismiss(self) -> None:
        """Discard what was learned from rejections that no limit caused."""
        self._unconfirmed, self._confirmed, self._strikes = None, 0, 0
        if self.window.source == "from rejections":
            self.window.source = ""

    def _strike(self, quota: Any, again: bool, now: float, wait: float) -> None:
        """Take a rejection for the rate's, if it is the second one in a row.

        Or the first, if as many calls were let in since the last that they tell the rate (a gate that is far away).
        """
        self._strikes = self._strikes + 1 if again else 1
        if self._strikes == 1 and not (again or wait or quota.enough):
            self._gap, self._spread_end, self._opens = 0.05, now + 1, now + 0.05
        elif quota.source:
            self.window.reduce(min(self.window.size, self.in_flight + 1) * 2 / 3)  # that limit is known: another one
        else:
            quota.guess(quota.spent / max(0.1, now - self._began) / 4, now, wait)
            self.window.source = ""  # it was not the number at once
