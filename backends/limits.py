"""What the headers of replies tell of a server's limits: the forms, and what a run learns from one reply after another.

`limits_in` reads one reply. `Headers` is what a Quota of the core hears from all of them: a bucket that is refilled all
the time, or a window of time, after which all of it is there again. A copy of the core alone learns limits from
rejections instead.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from . import core
from .failures import header, reset_wait
from .meanings import LEFT_TEXT, POLICY_TEXT, RESET_TEXT

LIMIT_LEAST, LIMIT_MOST = 1e-6, 1e15  # of a limit that is believed
LIMIT_FORMS = {
    "requests": ("x-ratelimit-{}-requests", "anthropic-ratelimit-requests-{}", "x-ratelimit-{}", "ratelimit-{}",
                 "x-ratelimit-{}-requests-minute", "x-ratelimit-{}-req-minute", "x-ratelimit-{}-requests-day"),
    "tokens": ("x-ratelimit-{}-tokens", "anthropic-ratelimit-tokens-{}", "x-ratelimit-{}-tokens-minute",
               "x-ratelimit-{}-tokens-day"),
}  # fmt: skip
# Windows that name their period: Cerebras' (https://inference-docs.cerebras.ai/support/rate-limits) and Mistral's
NAMED = {"x-ratelimit-{}-requests-minute": 60, "x-ratelimit-{}-req-minute": 60, "x-ratelimit-{}-requests-day": 86400,
         "x-ratelimit-{}-tokens-minute": 60, "x-ratelimit-{}-tokens-day": 86400}  # fmt: skip
# Whose limit it is, in LiteLLM's headers; the one with the least left counts. It is a window of a minute that tells no
# reset; if LITELLM_RATE_LIMIT_WINDOW_SIZE is another, only the Retry-After of a rejection says so:
# https://github.com/BerriAI/litellm/blob/main/litellm/proxy/hooks/parallel_request_limiter_v3.py
SCOPES = "api_key", "model_per_key", "user", "team", "team_member", "end_user", "organization", "model_per_team"
AT_ONCE = [f"x-ratelimit-{scope}-limit-max_parallel_requests" for scope in SCOPES]
SCOPED = {name: [f"x-ratelimit-{scope}-{{}}-{name}" for scope in SCOPES] for name in LIMIT_FORMS}
NAMED |= dict.fromkeys(itertools.chain(*SCOPED.values()), 60)
# A limit that names no kind holds for a window of time, after which all of it is there again: OpenRouter's, Together's,
# https://datatracker.ietf.org/doc/draft-ietf-httpapi-ratelimit-headers/
WINDOWS = {"x-ratelimit-{}", "ratelimit-{}"}
# These are buckets, refilled all the time, though the reset is a date: https://docs.claude.com/en/api/rate-limits
BUCKETS = {"anthropic-ratelimit-requests-{}", "anthropic-ratelimit-tokens-{}"}
PERIODS = 1, 60, 3600, 86400, 7 * 86400, 31 * 86400  # seconds
THOUSANDS_TEXT = re.compile(r"\d{1,3}(?:,\d{3}){1,4}")  # "14,400"
NUMBER_TEXT = re.compile(r"\d{1,15}+")  # "100, 100;window=60, 10000;window=86400", "100;w=60"
WINDOW_TEXT = re.compile(r"(\d{1,15}+);\s?w(?:indow)?=(\d{1,9}+)")


class Told(NamedTuple):
    """A limit as the headers tell it: the rate (a second), what is left, and the most that there can be at once.

    `reset` is in how many seconds the window is over, or a bucket is full; 0.0 if that is not said.
    """

    rate: float
    left: float
    size: float
    reset: float


def limits_in(headers: Mapping[str, str], name: str, window: bool = False) -> Told | None:
    """Return what the headers of a reply tell of the limit of requests or tokens; None if they tell nothing.

    `window` says that the limit is known to be a window's, which these headers do not say of themselves.
    """
    found = next(filter(None, (told_by(form, headers, window) for form in LIMIT_FORMS[name])), None)
    if found is None and (scoped := [*filter(None, (told_by(form, headers, window) for form in SCOPED[name]))]):
        found = min(scoped, key=lambda told: told.left)
    return told_in_one(headers) if found is None and name == "requests" else found


def at_once_in(headers: Mapping[str, str]) -> int:
    """Return how many calls at once the headers allow, 0 if they do not tell it."""
    told = [header(headers, name) for name in AT_ONCE]
    return min((int(text) for text in told if text.isdecimal() and len(text) < 10), default=0)


def told_by(form: str, headers: Mapping[str, str], window: bool) -> Told | None:
    """Return what the headers of this form tell."""
    if not (text := header(headers, form.format("limit"))):
        return None
    try:
        limit, seconds = float(text), 0
    except ValueError:
        limit, seconds = limit_in_words(text)
    try:
        left = float(header(headers, form.format("remaining")).replace(",", ""))
    except ValueError:
        return None
    if not LIMIT_LEAST < limit < LIMIT_MOST or not 0 <= left < LIMIT_MOST:  # Azure's -1
        return None
    wait, is_date = reset_wait(header(headers, form.format("reset")), headers)
    if form in NAMED:
        return Told(limit / NAMED[form], left, limit, wait)
    if form in WINDOWS or ((is_date or window) and form not in BUCKETS):
        return Told(limit / (seconds or window_of(wait, 60 if is_date else 1)), left, limit, wait)
    period = period_of(limit, left, wait)
    return Told(limit / period, left, max(1.0, min(limit, left + wait * limit / period)), wait)


def told_in_one(headers: Mapping[str, str]) -> Told | None:
    """Return what one header tells of the limit of requests, `"default";r=50;t=30` beside `"default";q=100;w=60`."""
    if not (both := header(headers, "ratelimit")):
        return None
    policy = POLICY_TEXT.search(header(headers, "ratelimit-policy"))
    left, reset = LEFT_TEXT.search(both), RESET_TEXT.search(both)
    if not (policy and left and int(policy[1]) and int(policy[2])):
        return None
    limit = float(policy[1])
    return Told(limit / int(policy[2]), float(left[1]), limit, float(reset[1]) if reset else 0.0)


def limit_in_words(text: str) -> tuple[float, int]:
    """Return the limit, and the seconds that it is for (0 if unsaid), of a list of them; the nearest comes first."""
    if THOUSANDS_TEXT.fullmatch(text):
        return float(text.replace(",", "")), 0
    if not (found := NUMBER_TEXT.match(text)):
        return 0.0, 0
    return float(found[0]), int(dict(WINDOW_TEXT.findall(text)).get(found[0], 0))


def window_of(wait: float, least: int) -> int:
    """Return the least usual period that so many seconds are left of; a minute if that is not said."""
    if not wait:
        return 60
    return next((period for period in PERIODS if least <= period and wait <= 1.02 * period), PERIODS[-1])


def period_of(limit: float, left: float, wait: float) -> int:
    """Return the seconds that a limit is for: with too short ones more would be left at the reset than there can be."""
    wait = max(0.0, wait - 1) if wait == int(wait) else wait  # whole seconds are rounded
    for period, slack in ((60, 0.1), (3600, 0.0), (86400, 0.0)):
        if left + wait * limit / period <= limit * (1 + slack) + 1:
            return period
    return 60


class Headers:
    """What headers tell of a quota (`requests` or `tokens`), learned over the replies of a run.

    `read` takes each reply that is looked at. A limit without a unit is taken for a bucket of a minute until its reset
    stands still while calls are taken: then it is a window, of which all is there again at the reset. The longest reset
    of a whole window is its length.
    """

    FADE = 3.0  # seconds over which the use of others, who share the key, is averaged
    RAMP = 1e6 / 60  # tokens a second, above which OpenAI answers 429 slow_down to half as much again in 15 minutes

    def __init__(self, quota: Any) -> None:
        self._quota = quota
        self._unread = 0  # replies since one has told the limit
        self._others = 0.0  # their rate
        self._heard = -math.inf, 0.0, 0.0  # when the last reply came, what was left by then, and spent
        self._windowed = False
        self._began = -math.inf, 0.0  # when the window did, and what was spent by then
        self._length = 0.0  # seconds of a window, as far as was seen
        self._compared: tuple[float, ...] = ()  # an earlier reply: when asked, when answered, what was left, the reset
        self._ramp_began = math.inf

    def read(self, headers: Mapping[str, str], call: Any, spent: float, now: float) -> bool:
        """Learn from a reply; return whether it leaves nothing for such a call.

        `spent` is what all calls had spent when this one went out.
        """
        self._unread += 1
        if (self._unread > 50 and self._unread % 50) or not (found := limits_in(headers, self._quota.name)):
            return False  # looking for them costs time, too
        self._unread = 0
        if not self._windowed and found.reset:
            self._windowed = self._stands_still(found, call, now)
        if self._windowed:
            found = limits_in(headers, self._quota.name, window=True) or found
            found = found._replace(rate=self._rate_of(found))
        self._state(found.rate)
        since = max(0.0, self._quota.spent - spent) if spent < math.inf else 0.0
        if self._windowed and found.rate <= self._quota.told:
            return self._in_window(found, call, since, now)
        return self._in_bucket(found, call, since, now)

    def _state(self, rate: float) -> None:
        quota = self._quota
        if not quota.source:
            core.log.info("the server tells its limit of %s", quota.name)
        elif quota.stated not in (rate, math.inf) and not self._windowed:
            core.log.info("the server has changed its limit of %s to %.0f/min", quota.name, 60 * rate)
        quota.stated = rate
        if quota.source != "as given":
            quota.source, quota.period = "from headers", 0.0

    def _stands_still(self, told: Told, call: Any, now: float) -> bool:
        """Whether it is a window: its end stays where it is while calls are taken, a bucket is full the later.

        The reset may be told as it was when the call was asked, or answered.
        """
        seen = call.started, now, told.left, told.reset
        asked, answered, before, reset = self._compared or seen
        later = call.started - asked + (before - told.left) / told.rate
        window = told.reset > 1.3 * (told.size - told.left) / told.rate + 1
        if not self._compared or told.left > before or later > (0.3 if told.reset % 1 else 2.0):  # they are rounded
            self._compared = seen
            moved = told.reset - reset + max(call.started - asked, now - answered)
            window |= told.left < before and moved < later / 2
        return window

    def _rate_of(self, told: Told) -> float:
        """Return the rate of a window, whose length is known once one has ended."""
        if self._began[0] == -math.inf:
            return min(told.rate, float(self._quota.stated))
        self._length = max(self._length, told.reset)
        return told.size / self._length if self._length else told.rate

    def _in_window(self, told: Told, call: Any, since: float, now: float) -> bool:
        quota = self._quota
        if call.started >= self._began[0]:  # else it tells of the window before
            length = max(self._length, told.reset)  # whole seconds are rounded
            slack = length / 40 if told.reset % 1 and length < 20 else min(1.0, length / 10)
            end = (now + told.reset if self._compared else quota.first + length) + slack
            left = min(told.left - since, told.size - (quota.spent - self._began[1]))
            quota.set(told.rate, told.size, left, now)
            quota.reset = min(quota.reset, max(end, now + slack))
        return told.left < 2

    def renew(self, now: float) -> None:
        """Begin a new window."""
        quota = self._quota
        self._began, quota.first = (now, quota.spent), math.inf
        quota.set(quota.rate, quota.size, quota.size, now)
        quota.reset = now + 1.1 * (self._length or quota.size / quota.rate) + 1  # unless headers tell another

    def shut(self, wait: float, now: float) -> None:
        """Take a rejection that asks to wait for a window's, whose end no header tells (LiteLLM)."""
        self._windowed, self._quota.reset, self._length = True, now + wait, max(self._length, wait)
        self._quota.set(self._quota.rate, self._quota.size, 0.0, now)

    def _in_bucket(self, told: Told, call: Any, since: float, now: float) -> bool:
        quota, (rate, left, size, reset) = self._quota, told
        if quota.name == "tokens" and rate > self.RAMP:
            self._ramp_began = min(self._ramp_began, now)
            rate = min(rate, self.RAMP * 1.5 ** ((now - self._ramp_began) / 900))
        own = quota.level(now) if quota.told < rate else math.inf  # who is told less keeps his own account
        quota.size = size if own == math.inf else 1.0
        if not reset:  # LiteLLM's window: no more is in it before its end, which the first rejection tells
            quota.set(min(quota.told, rate), quota.size, min(own, left - since), now)
            return left < 2
        self._count_others(rate, left, now)
        rate = min(quota.told, max(rate / 2, rate - max(0.0, self._others)))
        # The server counts when it admits or when it answers: the lesser of both, and a call in reserve.
        mean = quota.spent / max(1, quota.calls)
        reserve = min(mean * (2 if quota.source == "as given" else 1), size / 10)
        full = min(size, left + rate * (now - call.started))
        quota.set(rate, quota.size, min(own, left - reserve, full - since - reserve), now)
        return bool(left < 2 * max(1.0, mean, call.cost if quota.name == "tokens" else 1.0))

    def _count_others(self, rate: float, left: float, now: float) -> None:
        when, before, spent = self._heard
        span = now - when
        if span >= 0.01:
            gone = min(self._quota.size, before + rate * span) - (self._quota.spent - spent) - left
            fade = math.exp(-span / self.FADE)
            self._others = self._others * fade + gone / span * (1 - fade)
            self._heard = now, left, self._quota.spent
