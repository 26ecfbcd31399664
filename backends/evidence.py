"""Whose fault a failure is: its prompt's, every prompt's, or that of a server that is not there.

A run stops only for what would meet every prompt, and an outage costs no prompt an attempt: neither is believed on the
word of one prompt.
"""

from __future__ import annotations

import math
import re
from typing import Any

from . import core


def likeness(failure: core.PromptError) -> tuple[Any, ...]:
    """Return what is the same in failures that have the same cause."""
    return failure.error.status, failure.error.type, re.sub(r"\d+", "", failure.error.message)


class Evidence(core.Evidence):
    """What the failures of a run come to."""

    BELIEVED = 3  # free attempts of each prompt, before an API is asked whether it is there
    MANY = 12  # prompts that are believed in any case
    ASK_EVERY = 10.0  # seconds

    def __init__(self, run: core.Run) -> None:
        super().__init__(run)
        self._asked, self._is_there = -math.inf, False  # when the API was asked whether it is there
        self._overdue: list[int] = []  # the prompts whose calls had no answer in time, before anything was heard
        self._refused: set[int] = set()  # the prompts that were refused alike since the last answer
        self._doubtful: list[core.Result] = []  # whose attempt found nobody, before that was known
        self._alike: tuple[Any, ...] = ()  # what all calls have failed with, as long as none was answered
        self._failed_alike, self._alike_since = 0, 0.0

    def weigh(self, result: core.Result, failure: core.PromptError) -> str:
        """Return "stop" if every prompt would fail so, else "fail", or "retry" as long as that is not known.

        It would if nothing was answered yet, or if several prompts are refused alike with no answer in between. A 403
        is not always the key's: some providers say so of what a prompt holds.
        """
        if not failure.heard:
            return "stop"
        if self.run.answers and not self.run.limiter.sent:  # a bulk backend's: its errors come in a row
            return "fail"
        if (alike := likeness(failure)) != self.refusal:
            self.refusal, self._refused = alike, set()
        self._refused.add(result.prompt.number)
        others = any(call.prompt not in self._refused for call in self.run.calls.values())
        own = failure.error.status == 403 or (failure.error.status == 404 and isinstance(self.run.api, core.Own))
        if len(self._refused) >= (12 if others else 3) or not (self.run.answers or own):
            return "stop"
        if self.run.limiter.latest > result.sent or result.attempts >= 3:
            return "fail"
        self.refused_at = self.run.limiter.alone_since = self.run.clock()
        return "retry"

    async def examine(self, prompt: core.Prompt, failure: core.PromptError, result: core.Result) -> bool:
        """Whether an attempt failed because nobody was answered at that time. Stop what goes on in vain."""
        outage = not failure.free and await self.is_outage(prompt, failure, result)
        self.compare(prompt, failure)
        if self.was_never_there(failure, result):
            kind = "timeout" if failure.kind == "timeout" else "unreachable"
            self.run.stop(core.PromptError(kind, failure.error.message, "stop"))
        return outage

    def compare(self, prompt: core.Prompt, failure: core.PromptError) -> None:
        """Stop the run if nothing was ever answered and all fail alike; before that, go on one by one."""
        if self.run.limiter.latest > -math.inf or not failure.heard or self.run.stopped:
            return
        if (alike := likeness(failure)) != self._alike:
            self._alike, self._alike_since, self._failed_alike = alike, self.run.clock(), 0
        self._failed_alike += 1
        most = 2 * self._failed_alike > self.run.limiter.sent and not (failure.slow and self.run.calls)
        if self._failed_alike >= 3 and most and self.run.limiter.alone_since == math.inf:
            core.log.error("every call so far failed with the same error: %s", failure)
            self.run.limiter.alone_since = -math.inf
        waits = failure.error.status in (502, 503, 504)
        enough = 36 if waits else 12
        early = failure.slow and not waits and self.run.clock() < self._alike_since + 90
        if failure.loading or failure.decided or early:
            return
        if self._failed_alike >= enough:
            reason = core.PromptError(*failure.error[:2], "stop", failure.error.status)
            reason.asked = prompt.path
            self.run.stop(reason, prompt)

    async def is_outage(self, prompt: core.Prompt, failure: core.PromptError, result: core.Result) -> bool:
        """Whether an attempt failed because nobody was answered at that time: it costs its prompt nothing.

        A few prompts may be the cause themselves, if no others are tried meanwhile: an API is then asked for something
        that no prompt is part of. Elsewhere each prompt is believed only so often.
        """
        if not (failure.slow or core.no_service(failure)):
            self.unheard.clear()
            result.missed = math.inf
            return False
        result.missed = min(result.missed, result.sent)
        if self.run.answered_since(result):
            return False
        self.unheard[prompt.number] += 1
        attempts, prompts = self.unheard.total(), len(self.unheard)
        if failure.kind == "unreachable" and not isinstance(self.run.api, core.Own):  # before any of it was sent
            return True
        if not core.no_service(failure):
            return self.run.limiter.requests.barren > 2 and attempts <= self.FREE_ATTEMPTS * prompts
        alone = failure.kind == "unreachable" or (failure.heard and self.run.concurrency < 3)
        if self.run.limiter.away_since is None and (not alone or failure.error.status == 500):
            self._doubtful = [*(one for one in self._doubtful if not self.run.answered_since(one)), result]
            return False
        self._give_back()
        if failure.heard and prompts < 3 and isinstance(self.run.api, core.Own):
            return False
        if failure.loading or prompts >= self.MANY or attempts <= self.BELIEVED * prompts:
            return True
        if isinstance(self.run.api, core.Own):
            return attempts <= self.FREE_ATTEMPTS * prompts
        now = self.run.clock()
        if now >= self._asked + self.ASK_EVERY:
            self._asked = now
            self._is_there = bool(await self.run.wait_or_stop(self.run.api.is_there(self.run.call)))
        return not self._is_there

    def _give_back(self) -> None:
        """Give back the attempts of those who found nobody just before the server was known to be away."""
        for result in self._doubtful:
            if self.run.open.get(result.prompt.number) is result and not self.run.answered_since(result):
                result.attempts -= 1
        self._doubtful.clear()

    def was_never_there(self, failure: core.PromptError, result: core.Result) -> bool:
        """Whether a server that has never said a word is to be given up."""
        if self.run.limiter.heard or failure.verdict != "retry" or failure.heard or failure.decided:
            return False
        if failure.kind == "timeout":  # a user's function may take long by itself, and a prompt, too
            self._overdue.append(result.prompt.number)
            return len({*self._overdue} if isinstance(self.run.api, core.Own) else self._overdue) >= 3
        now, since = self.run.clock(), self.run.limiter.away_since
        if since is not None:
            return bool(now - since >= core.PROBE * min(2, self.run.max_attempts - 1))
        if any(now - call.started > max(core.PROBE, 2 * result.latency) for call in self.run.calls.values()):
            return False  # somebody there is thinking
        return result.attempts >= min(3, self.run.max_attempts)
