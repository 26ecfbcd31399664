"""When the next call may go out: how many calls a server takes at once and a minute, learned from its responses.

The core's Limiter, which a lone copy uses, only slows down after failures; this one measures. backends/rejections.py
adds what rejections show, backends/limits.py what headers say.
"""

from __future__ import annotations

import asyncio
import collections
import math
import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from . import core

ENVELOPE = 60  # bytes of a request around its prompt
REFILL_EVERY = 0.01  # seconds between two updates of a bucket's level


class Quota:
    """What a server lets through of one thing, requests or tokens: a bucket that is refilled all the time.

    Its rate comes from the user or from the headers of the responses. backends/rejections.py learns it from what is
    rejected, too.
    """

    exploring, period, led = False, 0.0, False  # what rejections tell
    barren = refused = 0

    def __init__(self, name: str, told: float | None = None) -> None:
        self.name = name
        self.rate, self.source = math.inf, ""  # a second
        self.size = math.inf  # what a full bucket holds
        self.spent, self.calls = 0.0, 0
        self.first = math.inf  # when the first call went out of a full bucket
        self._level, self._stamp = math.inf, 0.0
        self._closed = -math.inf  # until when nothing goes out
        self.headers: Any = None  # what the headers of replies tell of it,
        self.stated, self.reset = math.inf, math.inf  # the rate, and when a window of theirs is over
        self.told = math.inf if told is None else told / 60
        if told is not None:
            self.rate, self.size, self.source, self._level = self.told, 1.0, "as given", 0.0

    def __str__(self) -> str:
        return f"{60 * self.limit:,.0f} {self.name}/min, {self.source}"

    def tell(self, rate: float, source: str, now: float) -> None:
        """Adopt a rate (a second) that other processes of the run have learned."""
        if source == "from headers":
            self.stated, self.source = rate, source
        elif source == "as given" and rate != self.told:
            self._level, self._stamp = self.level(now), now
            self.told = self.rate = rate

    @property
    def known(self) -> bool:
        """Whether a limit is known, and not only searched for."""
        return bool(self.source) and not self.exploring

    @property
    def limit(self) -> float:
        """The limit a second: the server's, or the user's if that is lower; inf if none is known."""
        return self.rate if self.source == "from rejections" else min(self.told, self.stated)

    def level(self, now: float) -> float:
        """Return what is in the bucket."""
        if now >= self.reset:
            self.headers.renew(now)
        if self.rate == math.inf or self.reset < math.inf:
            return self._level
        return min(self.size, self._level + (now - self._stamp) * self.rate)

    def wait(self, cost: float, now: float) -> float:
        """Return the seconds until so much may be spent; a cost above the bucket's size waits until that is full."""
        if self._level >= cost and self._closed < now:  # without what is refilled since
            return 0.0
        closed, lack = self._closed - now, min(cost, self.size) - self.level(now)
        if lack <= 0:
            return max(0.0, closed)
        return max(closed, lack / self.rate if self.reset == math.inf else self.reset - now)

    def spare(self, now: float) -> float:
        """Return how much may be spent now; 0.0 if each call has to be checked."""
        return 0.0 if self._closed >= now else max(0.0, self.level(now))

    def spend(self, cost: float, now: float, calls: int = 1) -> None:
        """Take out the cost of calls that go out."""
        if now < self.first:
            self.first = now
        if self.rate < math.inf:
            if now < self._stamp + REFILL_EVERY and now < self.reset:
                self._level -= cost
            else:
                self._level, self._stamp = self.level(now) - cost, now
        self.spent += cost
        self.calls += calls

    def correct(self, more: float) -> None:
        """Take out what calls cost beyond their estimates."""
        self._level -= more
        self.spent += more

    def refund(self, cost: float, started: float) -> None:
        """Put back the cost of a call that began at `started` and was rejected."""
        self.spent -= cost
        self._level += cost
        self.calls -= 1

    def hear(self, headers: Mapping[str, str], call: core.Call, spent: float, now: float) -> bool:
        """Learn from a response's headers; return whether they allow no further call like this one."""
        if self.headers is None and (known := core.meanings("limits")):
            self.headers = known.Headers(self)
        return bool(self.headers and self.headers.read(headers, call, spent, now))

    def set(self, rate: float, size: float, level: float, now: float) -> None:
        """Set the rate (a second), the size of a full bucket, and the level now."""
        self.rate, self.size, self._level, self._stamp = rate, size, level, now


class Window:
    """How many calls may be in flight: as few as bring the most answers.

    It grows fourfold each round trip and holds where answers take a third longer than they did. If by then twice as
    many in flight bring less than half as many answers again, it is set to what keeps the server busy (Little's law:
    throughput times the latency without a queue, and a little more). From then on it grows slowly while there is hardly
    a queue, and tries a quarter more now and then: the answers may have become longer since, or the servers more.
    Where the server rejects one more, that was the limit; one more is tried after ever more round trips, and ever more
    as long as that goes well. No more are in flight than will be answered `within` so many seconds at the throughput
    seen: half of what the caller, or a gateway before the server, waits for an answer.
    """

    LONGER = math.log(4 / 3)
    GAIN = 0.55  # log2 of what twice as many must bring

    def __init__(self, start: int, ceiling: int, within: float = math.inf) -> None:
        self.size = float(start)
        self.ceiling = ceiling
        self.within = within
        self.source = ""  # why it grows fourfold no longer
        self.highest = 0  # place of the last call in the row that was answered
        self.answers = 0  # since it was last set
        self.throughput = math.inf  # a second, the mean of late
        self._octaves: dict[int, list[float]] = {}  # answers, the logarithms of their latencies, places
        self._noted = 0  # answers in the octaves
        self._early: list[float] = []  # logarithms of the latencies of the first few calls
        self._usual, self._lately, self._held = math.inf, 0.0, 0.0  # logarithms of latencies; round trips on hold
        self._total = 0.0  # logarithms of the latencies since it was last set
        self._before: tuple[float, float] | None = None  # size and mean before a quarter more was tried
        self.rounds = 24.0  # to the next trial
        self._limit, self._more = math.inf, 0.0  # where a call was rejected; how many more are tried

    def __str__(self) -> str:
        return f"{int(self.size)} in flight, {self.source}"

    @property
    def room(self) -> float:
        """How many calls may be in flight now."""
        return max(1.0, min(self.size, self.within * self.throughput))

    def answered(self, place: float, latency: float, count: int = 1) -> None:
        """Learn from answers to so many calls that were about the `place`-th in flight."""
        latency = max(1e-6, latency)
        self.answers += count
        rate = place / latency
        share = min(1.0, count / 8) if self.throughput < math.inf else 1.0
        self.throughput = rate if share == 1.0 else self.throughput + (rate - self.throughput) * share
        if self.source == "from rejections":
            self._try_more(place)
        elif self.source:
            self._watch(place, math.log(latency), count)
        else:
            latency = math.log(latency)
            self._note(place, latency, count)
            if self._lately < self._usual + self.LONGER:
                if 4 * place >= self.size and (self._noted > 16 or latency < self._usual + self.LONGER):
                    self.size, self._held = min(self.ceiling, self.size + min(3 * count, 3 * self.size)), 0.0
            else:
                self._held += count / self.size
                if self._held > 1:
                    self._decide()

    def _note(self, place: float, latency: float, count: int) -> None:
        octave = self._octaves.setdefault(int(place).bit_length(), [0, 0.0, 0])
        octave[0] += count
        octave[1] += latency * count
        octave[2] += place * count
        self._noted += count
        self._lately += (latency - self._lately) * min(1.0, count / min(16, self._noted))
        if self._noted <= 16 and place < 5:
            self._early += [latency] * count
            if len(self._early) > 2:
                self._usual = sum(self._early) / len(self._early)
        if octave[0] > 15:
            self._usual = min(self._usual, octave[1] / octave[0])

    def _decide(self) -> None:
        """Grow on, or settle where the throughput is about the highest with the least waiting at the server."""
        octaves, self._held = self._octaves.values(), 0.0
        means = sorted((places / count, math.exp(total / count)) for count, total, places in octaves if count > 11)
        early = 2.5, math.exp(sum(self._early) / (len(self._early) or 1))  # three, perhaps quick by chance
        (few, quick), (many, slow) = [early, early, *means][-2:]
        gain = self.GAIN if means[1:] else 0.7
        gains = many > few and math.log(many * quick / (few * slow)) > gain * math.log(many / few)
        self._usual = self._lately if gains else self._usual
        if gains or not means[1:]:
            return
        throughput = max(place / latency for place, latency in means)
        calm = [(count, total) for count, total, places in octaves if places <= count * many / 3]
        self._usual = sum(total for _, total in calm) / sum(count for count, _ in calm) if calm else math.log(quick)
        self.source = "more brought no more throughput"
        self.size, self.answers = min(self.size, 1.02 * throughput * math.exp(self._usual) + 1), 0
        core.log.info("more calls in flight do not raise the throughput: now %d", self.size)

    def _watch(self, place: float, latency: float, count: int) -> None:
        self._lately += (latency - self._lately) * min(1.0, count / 16)
        self._total += latency * count
        if self._lately < self._usual + math.log(1.12) and place >= self.size - 2:
            self.size = min(self.ceiling, self.size + min(1.0, count / self.size))
        if self.answers < self.rounds * self.size:
            return
        mean = self._total / self.answers
        before, self._before = self._before, None
        if before is None:
            self._before = self.size, mean
            self.size, self.rounds = min(self.ceiling, self.size * 1.25), 4
        elif mean > before[1] + math.log(1.1):  # it does not bring a tenth more
            self.size, self.rounds = before[0], 24
        self.answers, self._total = 0, 0.0

    def _try_more(self, place: float) -> None:
        """Try one more after `rounds` round trips; if it is answered, twice as many the next time."""
        if place > 1.25 * self._limit + 2:
            self.source = ""  # it was no limit of calls at once
        elif self.answers >= self.size * (self.rounds if not self._more else 1):
            self._more = 2 * self._more or 1
            self.size, self.answers = min(self.ceiling, self.size + self._more), 0

    def reduce(self, size: float, rounds: float = 1.0) -> None:
        """Reduce the window after a rejection, for so many round trips at least."""
        again = self.source == "from rejections" and self._limit * 0.75 <= size
        self.rounds = max(rounds, min(32.0, 2 * self.rounds) if again else 1.0)
        self.source, self.size, self.answers, self._more = "from rejections", max(1.0, min(self.size, size)), 0, 0.0
        self._limit = self.size
        core.log.info("the server rejected more calls at once: now %d", self.size)

    def tell(self, size: int) -> None:
        """Adopt the number of calls in flight that the server states."""
        self.source, self.size, self.ceiling = "as the server states", min(self.size, size), min(self.ceiling, size)

    def grow(self, size: float) -> None:
        """Grow at once to what the limits in the server's headers allow."""
        if not self.source and size > self.size:
            self.size = min(self.ceiling, size)


class Limiter(core.Limiter):
    """When the next call may go out, of a run that learns the server's limits.

    A `Window` bounds the calls in flight, two `Quota`s what goes out a minute; `settle` learns from how each call ends:
    from answers every 10 ms at the most. In between calls go out freely, as many as nothing holds up.
    A wait that the server asks for pauses the whole run, with jitter at its end so that calls do not go out together.
    While a window grows, its calls go out one after the other, so that few of them hit a limit.
    After a connection that is lost or refused one call goes ahead and the others wait until the server responds,
    for a second at most. If the calls of several prompts fail so, or with a status of 500 and above, and nothing that
    was sent after the first of them is answered, the server is down: one call a second tries until it is back.
    """

    AT_ONCE = 4  # calls, before a server has said anything
    LOOK_EVERY = 0.01  # seconds between two looks at the answers

    alone_since = math.inf  # one call at a time goes out until one is answered that began since then
    _turned_away = -math.inf  # when a call was last rejected before it took any room at the server
    silent = pause_end = -math.inf  # when the server was silent last; when a pause that it asked for is over
    # The answers since the last look, what may go out before the next one, and what has of it
    _look_at, _deferred, _answers, _latencies, _places = -math.inf, False, 0, 0.0, 0
    _free_calls, _free_tokens, _room, _used_calls, _used_tokens = 0.0, 0.0, 0.0, 0, 0.0
    _began, _latency = math.inf, 0.0  # when the first call went out; the latency of late
    _spread_end = -math.inf  # until when calls go out one after the other, `_gap` seconds apart
    # Since when calls have found nobody, how many were sent by then, and since when they say something
    _failing_since, _failing_sent, _failing_from = math.inf, 0, -math.inf
    _doubt = _failed = _probed = _down_at = -math.inf  # until when one call a second goes out; when one did what

    def __init__(
        self,
        start: int,
        ceiling: int,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        rpm: float | None = None,
        tpm: float | None = None,
        timeout: float = math.inf,
    ) -> None:
        super().__init__(start, ceiling, clock, sleep)
        self.window = Window(start, ceiling, timeout / 2)
        self.requests, self.tokens = self._quota("requests", rpm), self._quota("tokens", tpm)
        self._costs = Costs()
        self.learn = self._costs.learn  # once a reply
        self._last: tuple[core.Call, Mapping[str, str]]  # the last call that was answered, and its reply's headers
        self._paced = start < ceiling
        self._failing: collections.Counter[int] = collections.Counter()  # prompts that found nobody since one did,
        self._before = 0.0, ""  # and the window by then

    def _quota(self, name: str, told: float | None) -> Any:
        return Quota(name, told)

    def __repr__(self) -> str:
        facts = [f"{self.in_flight} in flight of {int(self.window.size)} allowed", *self.learned(), self.state()]
        return f"<Limiter {', '.join(filter(None, facts))}>"

    def learned(self) -> list[str]:
        """Return what is known of the server's limits, for the report."""
        if self.latest == -math.inf:
            return []
        quotas = [str(quota) for quota in (self.requests, self.tokens) if quota.known]
        return [*quotas, str(self.window)] if self.window.source else quotas

    def calls_a_minute(self) -> float | None:
        """Return how many calls a minute the server is known to let through, None where nothing is known."""
        if not self.requests.source and not self.tokens.source:
            return None
        rate = min(self.requests.limit, self.tokens.limit * self.sent / max(1.0, self.tokens.spent))
        return 60 * rate if rate < math.inf else None

    def state(self) -> str:
        """Return what holds up the run, in a few words, or ''."""
        now = self._clock()
        if self.away_since is not None:
            return f"server unreachable for {core.duration(now - self.away_since)}, retrying once a second"
        if self.pause_end > now:
            return f"pausing as the server requested, {core.duration(self.pause_end - now)} left"
        held = next((f"limit: {quota}" for quota in (self.requests, self.tokens) if quota.wait(1, now)), "")
        held = held or (f"server: {self.window}" if self.window.source else "")
        return f"held by the {held}" if held and self.queued else ""

    def release(self) -> None:
        """Send the waiting calls that may go out; set an alarm for the next one if it waits for a time."""
        self._account(self._clock())
        super().release()

    def estimate(self, body: bytes) -> float:
        """Return how many tokens a request will count for."""
        costs = self._costs
        asked = (len(body) - ENVELOPE) * costs.per_byte
        return (asked if asked > 1 else 1.0) + (costs.most(body) if b'"max_' in body else costs.answer)

    def admit(self, call: core.Call) -> bool:
        """Let a call go out if it need not wait; return whether it may."""
        tokens = self._used_tokens + call.cost
        if self._used_calls < self._free_calls and self.in_flight < self._room and tokens <= self._free_tokens:
            self._used_calls += 1  # as the last look has found
            self._used_tokens = tokens
            self.in_flight += 1
            self.sent += 1
            call.started = self._clock()
            self._note_place(call)
            return True
        now = self._clock()
        self._account(now)
        if self.queued or self._closed(call, now):
            return False
        self._let_go(call, now)
        self._free(now)
        return True

    def _note_place(self, call: core.Call) -> None:
        call.place, call.number = self.in_flight, self.sent
        call.spent = self.requests.spent + self._used_calls, self.tokens.spent + self._used_tokens

    def _account(self, now: float) -> None:
        """Charge the quotas for the calls that went out unchecked; from now on each call is checked."""
        if more := self._costs.look():
            self.tokens.correct(more)
        if self._used_calls:
            self.requests.spend(self._used_calls, now, self._used_calls)
            self.tokens.spend(self._used_tokens, now, self._used_calls)
        self._used_calls = self._free_calls = 0
        self._used_tokens = 0.0

    def _free(self, now: float) -> None:
        """Let calls go out unchecked until the next look, as many as no limit holds up."""
        if self.defer is None or self.queued or self._is_unusual(now) or now < max(self._opens, self._spread_end):
            return
        self._room = min(self.window.room, self.window.highest)
        self._free_calls, self._free_tokens = self.requests.spare(now), self.tokens.spare(now)

    @property
    def has_room(self) -> bool:
        """Whether one more call may be in flight."""
        return self.in_flight + 1 <= (1 if self.alone_since < math.inf else self.window.room)

    def _closed(self, call: core.Call, now: float) -> float:
        """Return the seconds until a call may go out: 0.0 now, inf not before another has ended."""
        if not self.has_room:
            return math.inf
        wait = max(self._opens - now - 0.001, self.requests.wait(1, now), self.tokens.wait(call.cost, now))
        return wait if wait > 1e-6 else 0.0

    def _let_go(self, call: core.Call, now: float) -> None:
        self.in_flight += 1
        self.sent += 1
        self._began = min(self._began, now)
        self.requests.spend(1, now)
        self.tokens.spend(call.cost, now)
        self._pace(now)
        call.started = now
        self._note_place(call)

    def _take_back(self, call: core.Call) -> None:
        super()._take_back(call)
        self.requests.refund(1, call.started)
        self.tokens.refund(call.cost, call.started)

    def _pace(self, now: float) -> None:
        """Note when the next call may go out."""
        if now < self._doubt:
            self._probe(now)
        elif now < self._spread_end:
            self._opens = now + random.uniform(0.5, 1.5) * self._gap
        elif self._latency:
            if self.in_flight > max(self.AT_ONCE, self.window.highest):
                self._opens = max(now, self._opens) + self._latency / self.in_flight / 4
        elif self._paced and self.sent >= self.AT_ONCE and self.latest == -math.inf:
            self._opens = now + (0.01 if self.sent < 16 else 0.05)
            self._opens += 0.35 if self.sent == 16 else 0.0
            if 16 <= self.sent < 32 and self.window.size >= 16:
                self.window.size += 1

    def _probe(self, now: float) -> None:
        """Note a probe. If the one before has not failed for a second, the server is back."""
        if self.away_since is not None and self._probed > self._failed and now - self._probed > 0.9 * core.PROBE:
            self._mark_up(now)
        else:
            self._probed, self._opens = now, now + core.PROBE

    def settle(self, call: core.Call, outcome: core.Reply | core.PromptError) -> None:
        """Take back the place of a call, and learn from how it ended: from the usual at most every 10 ms."""
        now = self._clock()
        call.latency = now - call.started
        self.in_flight -= 1
        if isinstance(outcome, core.PromptError):
            self._learn_from_failure(call, outcome, now)
        else:
            if call.started >= self.silent:  # the latency of what was sent before says nothing
                self._answers += 1
                self._latencies += call.latency
                place = call.place
                if call.started < self._turned_away:  # some of those before it may have been rejected
                    place = min(place, self.in_flight + 1)
                self._places += place
                if place > self.window.highest:
                    self.window.highest = place
            if call.started > self.latest:
                self.latest = call.started
            self._last = call, outcome.headers
            if now >= self._look_at or self.defer is None or (not self._free_calls and self._is_unusual(now)):
                self._learn(call, now)
            elif not self._deferred:
                self._deferred = True
                growing = not self.window.source and self.window.size < self.window.ceiling
                self.defer(0.0 if growing else self.LOOK_EVERY, self.look)
        if self.queued:
            self.release()

    def _is_unusual(self, now: float) -> bool:
        """Whether each answer may change something."""
        return bool(self.alone_since < math.inf or now < self._doubt or not self._latency or self._failing)

    def look(self) -> None:
        """Learn from the answers since the last look, if there are any."""
        self._deferred = False
        if self._answers:
            self._learn(self._last[0], self._clock())
            self.release()

    def _learn(self, call: core.Call, now: float) -> None:
        """Learn from the answers since the last time, the last of which is the call's."""
        self._look_at = now + self.LOOK_EVERY
        self._account(now)
        self._read(*self._last, now)
        self._note(call, None, now)
        self._learn_from(call)
        self._free(now)
        if self.opened:
            self.opened()

    def _learn_from_failure(self, call: core.Call, failure: core.PromptError, now: float) -> None:
        self._account(now)
        if failure.slow:
            self.requests.refund(1, call.started)
            self.tokens.refund(call.cost, call.started)
        told = self._read(call, failure.headers, now)
        self._note(call, failure, now)
        if failure.slow and self.away_since is None:
            self._rejected(call, failure, told, now)
        elif failure.error.status == 504 or failure.kind == "timeout":
            self._overdue(call)

    def _read(self, call: core.Call, headers: Mapping[str, str], now: float) -> bool:
        """Read what headers tell of limits; return whether they leave nothing for such a call."""
        told: bool = self.requests.hear(headers, call, call.spent[0], now)
        told |= self.tokens.hear(headers, call, call.spent[1], now)
        self.limit = self.calls_a_minute()
        return told

    def _learn_from(self, call: core.Call) -> None:
        if call.started >= self.alone_since:
            self.alone_since = math.inf
        if not self._latency:  # the first answer
            self._opens = max(self.pause_end, min(self._opens, self._clock()))
        if answers := self._answers:
            latency = self._latencies / answers
            self._latency += (latency - self._latency) / (max(1.0, 50 / answers) if self._latency else 1)
            self.window.answered(self._places / answers, latency, answers)
            self._answers, self._latencies, self._places = 0, 0.0, 0
        if (rate := self.requests.limit) < math.inf and self.requests.source != "from rejections":
            self.window.grow(2 * rate * self._latency)
        self._rejections = 0

    def _rejected(self, call: core.Call, failure: core.PromptError, told: bool, now: float) -> None:
        """Learn from a rejection; `told` is whether its headers say why. See backends/rejections.py."""

    def _overdue(self, call: core.Call) -> None:
        """Reduce the window after a time-out, ours or a gateway's, while others are answered."""
        if self._latency and call.started > self._rejection:
            self.window.within = min(self.window.within, call.latency / 2)
            self.window.reduce(self.window.room * 2 / 3)
            self._rejection = self._clock()

    def _pause(self, wait: float) -> None:
        spread = min(1.0, wait / 10)
        self._gap = spread / max(2.0, self.window.room)
        self.pause_end = max(self.pause_end, self._clock() + wait)
        self._spread_end = self.pause_end + spread
        self._opens = self.pause_end + random.random() * self._gap

    def _note(self, call: core.Call, failure: core.PromptError | None, now: float) -> None:
        """Note whether the server is reachable; calls sent before it was marked down say nothing."""
        if failure is not None and core.no_service(failure):
            self._note_failure(call, failure, now)
        elif failure is None or failure.heard:
            self.heard = True
            if self.away_since is None and now < self._doubt:
                self._doubt, self._opens = -math.inf, self.pause_end
            if call.started >= self._failing_from:
                self._failing.clear()
                if self.away_since is not None:
                    self._mark_up(now)

    def _note_failure(self, call: core.Call, failure: core.PromptError, now: float) -> None:
        self.heard |= failure.heard
        if not self._failing:
            self._failing_since, self._failing_sent = now, self.sent
            self._failing_from = call.started  # what was sent before that says nothing
            self._before = self.window.size, self.window.source
        self._failing[call.prompt] += 1
        self._failed = now
        failed, sent = self._failing.total(), self.sent - self._failing_sent
        if failure.kind == "unreachable":
            several = failed > 1
        else:
            fewest = 2 if failure.heard else 1
            fewest = min(4 + self.in_flight // 8, max(fewest, self.window.ceiling))
            several = len(self._failing) >= fewest and failed > 2
        if not failure.heard:
            self._doubt = max(self._doubt, now + core.PROBE)
        if self.away_since is not None and call.started < self._down_at:
            return  # it was on its way
        if self.away_since is not None:
            self._opens = now + core.PROBE * (1 if self.latest > -math.inf else 3)
        elif several and 2 * failed > sent and not failure.slow:
            self.mark_down(failure, now)

    def mark_down(self, failure: core.PromptError, now: float) -> None:
        """Enter outage mode: one probe a second until the server is back."""
        self.away_since, self._doubt = self._failing_since, math.inf
        self._down_at, self._opens = now, now + 0.25
        self.window.size, self.window.source = self._before
        if self.heard:
            core.log.warning("server unreachable (%s): retrying once a second", failure)

    def _mark_up(self, now: float) -> None:
        """Leave outage mode."""
        core.log.warning("the server is back after %s", core.duration(now - (self.away_since or now)))
        self.away_since = None
        self._failing.clear()
        self._doubt, self._opens = -math.inf, self.pause_end


class Costs:
    """How many tokens a request will count for: its prompt by length, and its longest answer."""

    MOST = re.compile(rb'"max_(?:completion_|output_)?tokens": ?(\d{1,9})')  # an input may hold any number
    CHOICES = re.compile(rb'"n": ?(\d{1,9})')

    def __init__(self) -> None:
        self._bytes, self._in, self._out, self._answers = 4, 1, 20, 1  # four characters a token, at first
        self._more = 0.0  # tokens by which the answers since the last look exceeded their estimates
        self.per_byte, self.answer = 0.25, 20.0

    def most(self, body: bytes) -> float:
        """Return the most tokens that the answer to a request may have, as far as it says."""
        most, choices = self.MOST.search(body), self.CHOICES.search(body)
        return float(most[1]) * (int(choices[1]) if choices else 1) if most else self.answer

    def learn(self, body: bytes, tokens: Sequence[int], estimate: float) -> None:
        """Note what the server has counted."""
        asked, answered, size = tokens[0], tokens[1], len(body)
        if 0 < asked < size + 1e5 and answered < 1e6:  # else it says nothing, or nonsense
            self._bytes += size - ENVELOPE if size > ENVELOPE + 4 else 4
            self._in += asked
            self._out += answered
            self._answers += 1
            if b'"max_' not in body:  # else the most is counted even if the answer is shorter
                self._more += asked + answered - estimate

    def look(self) -> float:
        """Learn from what was noted; return how many tokens that was more than the estimates."""
        more, self._more = self._more, 0.0
        self.per_byte, self.answer = self._in / self._bytes, self._out / self._answers
        return more
