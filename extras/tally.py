"""What a report says of a run: its clocks, percentiles, tokens, and what is to be done about each kind of failure.

backends/console.py counts answers and failures alone; this one is used in its place where this folder is there.
"""

from __future__ import annotations

import bisect
import collections
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence

from . import core
from .ran import times

hint = core.sibling("backends", "hints").hint
NO_TOKENS = core.NO_TOKENS
LONG_INPUT = 272_000  # tokens in; above it some models cost more
WHOLE = core.sibling("backends", "meanings").WHOLE
EMPTY = "empty"
EMPTY_THOUGHT = "empty: reasoning took all tokens; raise max_completion_tokens (-p), or ask for less reasoning"
WAITS = {
    "slot_wait": "for a slot",
    "limit_wait": "for limits or the server's return",
    "retry_wait": "in back-off",
    "lost": "in failed attempts",
}


class Tally(core.sibling("backends", "console").Tally):  # type: ignore[misc]
    """What the report and its extras are made of, counted as the results come."""

    KINDS = 50  # of failures that are told apart

    def __init__(self, model_of: Callable[[core.Prompt], str | None] = lambda prompt: None) -> None:
        super().__init__()
        self.attempts = 0
        self.latency = 0.0  # of all answers together
        self.latencies: collections.Counter[int] = collections.Counter()  # by their logarithm, a thousandth a step
        self.slot_wait = self.limit_wait = self.retry_wait = self.lost = 0.0
        # Tokens by what their price depends on: model asked, that of the reply, its service tier, a long input.
        self.bills: dict[tuple[str | None, str | None, str, bool], list[int]] = {}
        self.wasted = self.silent = 0  # tokens of attempts that failed; answers that do not tell theirs
        self.unanswered = 0  # calls whose replies were lost
        self._model_of = model_of
        self.errors: collections.Counter[str] = collections.Counter()
        self._examples: dict[str, core.Error] = {}
        self._first: dict[str, str] = {}  # the prompts that those are of
        self.marked: collections.Counter[str] = collections.Counter()
        self.texts: dict[int, str] = {}  # the first few answers, for --compare
        self.cpu, self._began = 0.0, time.process_time()

    def stop(self) -> None:
        """Take the time."""
        super().stop()
        self.cpu = time.process_time() - self._began

    def add(self, result: core.Result) -> None:
        """Count a result."""
        if (tokens := result.tokens) is not NO_TOKENS:
            self._bill(result, tokens)
        if result.attempts != 1 or result.error is not None or result.slot_wait or result.limit_wait:
            self._add_rare(result)
        else:
            self.attempts += 1
        if result.error is None and result.done:
            latency = result.latency
            self.answered += 1
            self.latency += latency
            self.latencies[round(1000 * math.log(latency or 1e-6))] += 1
            if result.finish_reason not in WHOLE or result.text == "":
                self.mark(result)
            if not (tokens[0] and tokens[1]):
                self.silent += not tokens[0] or bool(result.text)

    def _add_rare(self, result: core.Result) -> None:
        """Count what has waited, and the attempts that failed."""
        self.attempts += result.attempts
        self.slot_wait += result.slot_wait
        self.limit_wait += result.limit_wait
        self.retry_wait += result.retry_wait
        self.lost += result.lost
        self.unanswered += result.unanswered
        if result.lost_tokens is not NO_TOKENS:
            self._bill(result, result.lost_tokens)
            self.wasted += sum(result.lost_tokens[:2])
        if result.done and result.error is not None:
            self.failed += 1
            self.note(result.error, result.id)

    def mark(self, result: core.Result) -> None:
        """Count an answer that is not whole, by what ended it, or that has nothing in it."""
        reason = str(result.finish_reason or "")
        if reason.lower() in WHOLE:
            if result.text or result.extra.keys() - {"more", "service_tier"}:
                return
            reason = EMPTY_THOUGHT if result.tokens[3] or "more" in result.extra else EMPTY
        self.marked[reason if reason in self.marked or len(self.marked) < self.KINDS else "others"] += 1

    def _bill(self, result: core.Result, tokens: Sequence[int]) -> None:
        model = result.model if type(result.model) is str else None
        tier = result.extra.get("service_tier", "") if result.extra else ""
        key = self._model_of(result.prompt), model, tier, tokens[0] > LONG_INPUT
        if (bill := self.bills.get(key)) is None:  # a server may name what it likes
            key = key if len(self.bills) < 100 else (key[0], None, "", key[3])
            bill = self.bills.setdefault(key, [*NO_TOKENS])
        given, made, *parts = tokens
        bill[0] += given
        bill[1] += made
        if any(parts):
            for place, count in enumerate(parts, 2):
                bill[place] += count

    def note(self, error: core.Error, prompt: str | int = "") -> None:
        """Count a failure by its kind."""
        self.hopeful += error.retryable
        kind = error.type if error.type in self.errors or len(self.errors) < self.KINDS else "others"
        self.errors[kind] += 1  # a server may name them as it likes
        self._examples.setdefault(kind, error._replace(type=kind))
        self._first.setdefault(kind, f" (prompt {core.short(str(prompt), 40)})" if prompt and error.status else "")

    @property
    def tokens(self) -> list[int]:
        """The tokens in, out, cached, for reasoning and written to a cache of all attempts."""
        return [sum(counts) for counts in zip(*self.bills.values(), strict=True)] or [*NO_TOKENS]

    def lines(self, ran: core.Ran) -> Iterator[str]:
        """Yield the lines of the report."""
        run, sink = ran.run, ran.run.journal
        most = f", up to {run.most_in_flight} in flight" if run.most_in_flight else ""
        yield f"{ran.api.name} at {ran.api.base_url}{', one at a time' if ran.asked == 1 else most}"
        untold = () if ran.api.clocked else ("sum of latencies", "latency")
        yield from (line for line in self.figures() if not line.startswith(untold))
        yield from (f"limit: {known}" for known in run.limiter.learned())
        if kept := sink.answers if run.stopped else sink.kept:
            yield f"{core.plural(kept, 'answer')} of an earlier run kept"
        if sink.kept_errors:
            yield f"{core.plural(len(sink.kept_errors), 'failure')} of an earlier run kept"

    def figures(self) -> Iterator[str]:
        """Yield what was counted, in sentences."""
        yield f"{self.answered:,} answered, {self.failed:,} failed in {core.duration(self.wall)}"
        if self.answered > 1 and self.wall > 0:
            ratio = self.latency / self.wall
            compared = f" ({times(ratio)} the wall time)" if ratio > 1.05 else ""
            rate = f"{self.answered / self.wall:,.1f} answers/s"
            yield f"sum of latencies {core.duration(self.latency)}{compared}, {rate}"
        spread = [f"{name} {core.duration(value)}" for name, value in self.percentiles().items() if value is not None]
        if spread:
            yield f"latency {', '.join(spread)}"
        if any(self.tokens):
            counts = zip(self.tokens, ("in", "out", "cached", "for reasoning", "cache writes"), strict=True)
            wasted = f"; {self.wasted:,} of them in failed attempts" if self.wasted else ""
            yield "tokens " + ", ".join(f"{count:,} {name}" for count, name in counts if count) + wasted
        lost = self.attempts - self.answered - self.unwritten
        yield core.plural(self.attempts, "attempt") + (f", {lost:,} without an answer" if lost > 0 else "")
        waited = [(getattr(self, name), text) for name, text in WAITS.items()]
        if waits := [f"{core.duration(wait)} {text}" for wait, text in waited if wait >= 0.005]:
            yield f"waiting, all calls added up: {', '.join(waits)}"

    def failures(self) -> Iterator[tuple[core.Error, int]]:
        """Yield the first failure of each kind and how many there are, the most frequent kind first."""
        for kind, count in self.errors.most_common():
            yield self._examples[kind], count

    def percentiles(self) -> dict[str, float | None]:
        """Return the latency's p50, p90 and p99 in seconds, None where there are too few answers to know it."""
        steps = sorted(self.latencies)
        upto = list(itertools.accumulate(self.latencies[step] for step in steps))
        found: dict[str, float | None] = {"p50": None, "p90": None, "p99": None}
        for name in found:
            share = int(name[1:]) / 100
            if self.answered * (1 - share) >= 1 - 1e-9:
                found[name] = math.exp(steps[bisect.bisect_left(upto, self.answered * share)] / 1000)
        return found

    def warnings(self) -> Iterator[str]:
        """Yield a line for each kind of failure, with what to do, and for answers that are not whole."""
        if self.unwritten:
            yield f"{core.plural(self.unwritten, 'answer')} could not be written"
        for error, count in self.failures():
            advice, first = hint(error), ", first" if count > 1 else ""
            message = error.message + self._first[error.type]
            yield f"{count:,} x {error.type}{first}: {message}" + (f"\n  -> {advice}" if advice else "")
        for reason, count in self.marked.items():
            cut = "length" in reason or "max" in reason.lower()
            advice = "raise max_completion_tokens (-p)" if cut else "see their text"
            ended = f"answered but {reason}" if reason in (EMPTY, EMPTY_THOUGHT) else ""
            yield f"{count:,} {ended or f'answered but ended by {core.short(reason, 60)}: {advice}'}"
