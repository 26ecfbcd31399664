"""Limits and outages of the stand-in server: what it accepts, how it words a rejection, and when it fails.

Every limit has the same methods: `wait(amount)` seconds until the amount may pass, `take` it, `drain` it if rejected
requests count, and `headers` and `refusal` for the replies. They need a clock and no network.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

from .stand_in_answers import Refusal, Reply, encode_json, error, html

Clock = Callable[[], float]
EPSILON = 1e-6


class Limit(Protocol):
    """The interface of a limit."""

    name: str
    limit: float  # what one request may cost at most

    def wait(self, amount: float) -> float: ...

    def take(self, amount: float) -> None: ...

    def drain(self, amount: float) -> None: ...

    def headers(self) -> str: ...

    def refusal(self, model: str, amount: int, hints: bool) -> Refusal: ...


def limits_of(options: Any, clock: Clock) -> list[Limit]:
    """Return the limits that the options set."""
    limits: list[Limit] = [Bucket(name, number, options.burst, clock)
                           for name, number in (("requests", options.rpm), ("tokens", options.tpm)) if number]
    if options.gate:
        limits.append(Gate(options, clock))
    if options.window:
        limits.append(WINDOWS[options.window_kind](options, clock))
    return limits


class Bucket:
    """A limit a minute that is refilled continuously; a full bucket holds a share of a minute's worth."""

    def __init__(self, name: str, limit: float, burst: float, clock: Clock) -> None:
        self.name, self.limit = name, limit
        self._rate, self._capacity = limit / 60, limit * burst
        self._clock = clock
        self._held, self._stamp = self._capacity, clock()

    def level(self) -> float:
        now = self._clock()
        self._held = min(self._capacity, self._held + (now - self._stamp) * self._rate)
        self._stamp = now
        return self._held

    def wait(self, amount: float) -> float:
        """Return the seconds until the amount may be taken; a larger one than the bucket waits until that is full."""
        lack = min(amount, self._capacity) - self.level()
        return lack / self._rate if lack > EPSILON else 0.0

    def take(self, amount: float) -> None:
        self._held = self.level() - amount

    def drain(self, amount: float) -> None:
        """Count a rejected request, but incur no debt: many clients that retry at once would be rejected for hours."""
        self._held = max(min(self.level(), 0.0), self._held - amount)

    def remaining(self) -> int:
        return max(0, math.floor(self.level() + EPSILON))

    def headers(self) -> str:
        full = duration((self._capacity - self.level()) / self._rate)
        return (f"x-ratelimit-limit-{self.name}: {self.limit}\r\nx-ratelimit-remaining-{self.name}: "
                f"{self.remaining()}\r\nx-ratelimit-reset-{self.name}: {full}\r\n")

    def refusal(self, model: str, amount: int, hints: bool) -> Refusal:
        where = f"on {self.name} per min ({self.name[0].upper()}PM): Limit {self.limit}"
        message, headers, wait = f"Rate limit reached for {model}.", "", self.wait(amount)
        if amount > self.limit:
            message = f"Request too large for {model} {where}, Requested {amount}."
        elif hints:
            message = (f"Rate limit reached for {model} {where}, Used {self.limit - self.remaining()}, "
                       f"Requested {amount}. Please try again in {duration(wait)}.")
            headers = f"retry-after: {math.ceil(wait)}\r\nretry-after-ms: {milliseconds(wait)}\r\n"
        return Refusal(429, message, self.name, code="rate_limit_exceeded", headers=headers)


class Gate(Bucket):
    """A rate with a burst and without headers, as nginx's `limit_req zone=… burst=B nodelay`."""

    def __init__(self, options: Any, clock: Clock) -> None:
        most = options.gate_burst + 1  # nginx counts the burst beyond the request that is due
        super().__init__("gate", options.gate * 60, most / (options.gate * 60), clock)
        self.limit = math.inf
        self._options = options

    def headers(self) -> str:
        return ""

    def refusal(self, model: str, amount: int, hints: bool) -> Refusal:
        return rejection(self._options)


class Window:
    """At most N requests in any S seconds; a request counts until it is S seconds old."""

    name, limit = "window", math.inf

    def __init__(self, options: Any, clock: Clock) -> None:
        self._options, self._clock = options, clock
        self._most: int = options.window[0]
        self._seconds: float = options.window[1]
        self._times: deque[float] = deque()

    def used(self) -> float:
        """Return how many requests count now."""
        limit = self._clock() - self._seconds + EPSILON
        while self._times and self._times[0] <= limit:
            self._times.popleft()
        return len(self._times)

    def reset(self) -> float:
        """Return the seconds until the next request that counts now no longer does."""
        return self._times[0] + self._seconds - self._clock() if self.used() else 0.0

    def wait(self, amount: float) -> float:
        """Return the seconds until one more request may pass."""
        beyond = int(self.used()) - self._most
        return max(EPSILON, self._times[beyond] + self._seconds - self._clock()) if beyond >= 0 else 0.0

    def take(self, amount: float) -> None:
        self._times.append(self._clock())

    def drain(self, amount: float) -> None:
        """Count a rejected request: a client that keeps sending remains rejected."""
        self.take(amount)

    def headers(self) -> str:
        left, tells = max(0, self._most - math.ceil(self.used() - EPSILON)), self._options.window_tells
        resets = {"span": math.ceil(self.reset() - EPSILON), "date": math.ceil(time.time() + self.reset())}
        return "".join(f"x-ratelimit-limit: {self._most}\r\nx-ratelimit-remaining: {left}\r\n"
                       f"x-ratelimit-reset: {reset}\r\n" for form, reset in resets.items() if form in tells)

    def refusal(self, model: str, amount: int, hints: bool) -> Refusal:
        tells = self._options.window_tells if hints else ()
        wait = math.ceil(self.wait(amount) - EPSILON) if "retry-after" in tells else None
        return rejection(self._options, "Too many requests, please try again later." if tells else "", wait)


class FixedWindow(Window):
    """N requests in each stretch of S seconds, which may come all at once; the stretches are the clock's."""

    def __init__(self, options: Any, clock: Clock) -> None:
        super().__init__(options, clock)
        self._turn, self._counts = self._current(), [0, 0]  # in the stretch before this one, and in this one

    def _current(self) -> int:
        return math.floor(self._clock() / self._seconds + EPSILON)

    def _turn_over(self) -> list[int]:
        passed, self._turn = self._current() - self._turn, self._current()
        if passed:
            self._counts = [self._counts[1] if passed == 1 else 0, 0]
        return self._counts

    def used(self) -> float:
        return self._turn_over()[1]

    def reset(self) -> float:
        return (self._current() + 1) * self._seconds - self._clock()

    def wait(self, amount: float) -> float:
        return 0.0 if self.used() + 1 <= self._most else max(EPSILON, self.reset())

    def take(self, amount: float) -> None:
        self._turn_over()[1] += 1


class WeightedWindow(FixedWindow):
    """A sliding window as HAProxy's `http_req_rate` estimates it: the previous period counts by its remaining share.

    The stretches begin with the first request, and anew after two without any.
    """

    _began = -math.inf  # this stretch

    def _turn_over(self) -> list[int]:
        passed = (self._clock() - self._began) / self._seconds + EPSILON
        if passed >= 2:
            self._began, self._counts = self._clock(), [0, 0]
        elif passed >= 1:
            self._began, self._counts = self._began + self._seconds, [self._counts[1], 0]
        return self._counts

    def reset(self) -> float:
        return self._began + self._seconds - self._clock()

    def used(self) -> float:
        before, now = self._turn_over()
        return now + before * min(1.0, self.reset() / self._seconds)

    def wait(self, amount: float) -> float:
        if self.used() + 1 <= self._most + EPSILON:
            return 0.0
        before, now = self._counts
        room = self._most - 1 - now  # for the remaining share of the previous period
        if room >= 0 and before:
            return max(EPSILON, self.reset() - self._seconds * room / before)
        return self.reset() + max(0.0, self._seconds * (1 - (self._most - 1) / now))


WINDOWS: dict[str, type[Window]] = {"sliding": Window, "fixed": FixedWindow, "weighted": WeightedWindow}
WINDOW_TELLS = ("span", "date", "retry-after")


def rejection(options: Any, message: str = "", wait: float | None = None, kind: str = "requests") -> Refusal:
    """Word a rejection as the options want it: an error in JSON if there are words, else a proxy's page."""
    status, words = options.reject_status, options.reject_message or message
    wait = options.retry_after if options.retry_after is not None else wait
    headers = "" if wait is None else f"retry-after: {math.ceil(wait)}\r\n"
    refusal = Refusal(status, words, kind, code=REJECT_CODES.get(status), headers=headers)
    if not words:
        refusal.reply = html(status)._replace(headers=headers)
    return refusal


REJECT_CODES = {429: "rate_limit_exceeded", 503: "server_is_overloaded"}


# --- Outages ------------------------------------------------------------------------------------------------

OUTAGES: dict[str, Reply | None] = {  # the reply to every request while it lasts
    "silent": None,
    "refused": None,
    "slow": None,
    "503": error(503, "The service is temporarily unavailable.", "server_error"),
    "502-page": html(502),
    "loading": Reply(503, encode_json({"error": {
        "message": "Loading model", "type": "unavailable_error", "code": 503}})),  # llama.cpp's server
}
SLOW_FACTOR = 10.0


class Outage(NamedTuple):
    """A stretch of time in which the server fails; it is counted from the first request."""

    kind: str
    start: float
    end: float


def read_outage(text: str) -> Outage:
    """Read KIND@FROM+SECONDS. Raises ValueError."""
    kind, _, when = text.partition("@")
    start, _, seconds = when.partition("+")
    if kind not in OUTAGES:
        raise ValueError(f"--outage {kind} is unknown; choose {', '.join(OUTAGES)}")
    try:
        begin, length = float(start), float(seconds)
    except ValueError:
        begin = length = math.nan
    if not (0 <= begin < math.inf and 0 < length < math.inf):
        raise ValueError(f"--outage takes KIND@FROM+SECONDS, such as silent@10+20, not {text}")
    return Outage(kind, begin, begin + length)


def read_outages(texts: Iterable[str]) -> list[Outage]:
    """Read the outages, of which no two may overlap. Raises ValueError."""
    found = sorted(map(read_outage, texts), key=lambda outage: outage.start)
    for first, second in pairwise(found):
        if second.start < first.end:
            raise ValueError(f"--outage {first.kind} and {second.kind} overlap")
    return found


class Sick(NamedTuple):
    """How many of the replicas are sick, and what these answer: a status at once, or 0 for nothing ever."""

    number: int
    status: int


def read_sick(text: str) -> Sick:
    """Read K, K:STATUS or K:never. Raises ValueError."""
    count, _, how = text.partition(":")
    status = {"": "500", "never": "0"}.get(how, how)
    if not (count.isdecimal() and status.isdecimal() and (status == "0" or 400 <= int(status) <= 599)):
        raise ValueError(f"--sick takes K, K:STATUS or K:never, such as 1:503, not {text}")
    return Sick(int(count), int(status))


# --- Spans in words -----------------------------------------------------------------------------------------


def milliseconds(seconds: float) -> int:
    return math.ceil(seconds * 1000 - EPSILON)


def duration(seconds: float) -> str:
    """Write a duration as Go does, in whole milliseconds: 12ms, 1.5s, 6m0s."""
    total = milliseconds(seconds)
    if 0 < total < 1000:
        return f"{total}ms"
    minutes, rest = divmod(total, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{f'{hours}h' * (hours > 0)}{f'{minutes}m' * (total >= 60_000)}{rest / 1000:g}s"
