"""--max-cost USD: stop before the job's total cost, earlier runs with the same results file included, exceeds this.

What is spent is kept beside the results, in FILE.spent, so that a run knows what earlier ones have paid. A bulk backend
reserves the cost itself before it takes a block of requests (`named(run, "budget")`): a batch cannot be stopped midway.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import itertools
import math
import pathlib
import re
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any

from . import core
from .files import open_regular, replacing
from .prices import TIERS, Price, as_price, cost_of, known_price, money, usage_in, usage_of_row
from .tally import LONG_INPUT

USAGE = core.sibling("backends", "usage")
STANDARD, tier_of, told_cost = USAGE.STANDARD, USAGE.tier_of, USAGE.told_cost
WORST = max(TIERS.values())  # times the ordinary price: assumed for an unknown service tier
HINTS = core.sibling("backends", "hints").HINTS
HINTS["budget"] = "raise --max-cost; it includes what earlier runs of the job have cost"
HINTS["unknown_price"] = "send these in a run of their own, with --price IN,OUT"

TOKENS_MOST = 10**12  # larger maxima in the input are cut to this: it may contain any number


def max_output_tokens(request: dict[str, Any]) -> tuple[int, int]:
    """Return the most tokens in each answer to a request (0 if it sets no maximum), and the number of answers."""

    def told(least: int, *names: str) -> int:
        given = [request[name] for name in names if type(request.get(name)) in (int, float)]
        found: list[int] = [math.ceil(min(count, TOKENS_MOST)) for count in given]
        return max([least, *found])

    texts = request.get("prompt")  # /completions takes a list of texts, or one text as a list of tokens
    many = len(texts) if isinstance(texts, list) and texts and not isinstance(texts[0], int) else 1
    return told(0, "max_completion_tokens", "max_tokens", "max_output_tokens"), told(1, "n", "best_of") * many


class Budget:
    """A limit of `most` USD for a job: a call is sent only if even the worst case of all calls in flight keeps it.

    Before the call, its worst case is reserved:
    - input: one token per byte sent (at the price of a cache write, if that is higher), and PART tokens for each
      picture or file;
    - output: the maximum that the request sets. If it sets none: the longest answer so far, and more while few answers
      are known. Then the first call goes out alone, and later ones only while at most half as many calls are in flight
      as there were answers, unless the budget has room for answers ROOM times as long;
    - service tier: the requested one. If none is requested: the most expensive one so far, and "priority" before the
      first reply, since a project may have that as its default.

    After the call, its cost is taken from its usage and tier, or is what the usage reports in USD, if above 0. A reply
    that was lost, or has no usage, counts as the worst case, since it may have been billed. Calls cut off at the end of
    a run count as the mean. `price` is as for --price, in USD per million tokens; None is the table's.

    Raises ValueError if `most` is not above 0, or `price` is not a price.
    """

    PART, ROOM = 3000, 16
    PARTS = re.compile(rb'"type":"(?:image_url|input_image|input_audio|input_file|file)"')

    def __init__(self, most: float, price: Iterable[float] | None = None) -> None:
        if not most > 0:
            raise ValueError("max_cost must be greater than 0")
        self.most = most
        self.price = None if price is None else as_price(price)
        self._usual: Price | None = None  # for rows that name no model with a price
        self.spent = self.earlier = self.assumed = 0.0  # USD: all, by earlier runs, without usage
        self._calls, self._fixed, self._open = 0, 0.0, 0.0  # in flight: calls, USD, USD per token
        self._answers = self._ended = 0
        self._dearest, self._longest, self._beyond = 1.0, 0.0, 0.0  # most tokens a byte, an answer, above a maximum
        self._tier: float | None = None  # the most expensive tier so far, in times of the ordinary one
        self._lines, self._later = 0.0, 0.0  # USD: all lines of the results file, and those after the last account
        # The account of the earlier runs: USD spent, the most that calls in flight might cost, their number, and the
        # length of the results file.
        self._account = 0.0, 0.0, 0, sys.maxsize
        self._saving = threading.Lock()  # the thread of the last second may still be saving
        self._queue = asyncio.Lock()
        self._changed = asyncio.Event()

    def most_of(self, body: bytes, price: Price) -> tuple[float, float]:
        """Return the most that a request may cost: USD, and USD per token of an answer without a maximum."""
        request = core.parse_json(body)
        most, answers = max_output_tokens(request)
        told = max(most, self._beyond) * answers if most else 0
        given = len(body) * self._dearest + self.PART * len(self.PARTS.findall(body))
        tier = self._tier_asked(request, price)
        price = price.times(tier, tier).served("", given > LONG_INPUT)
        # With the user's own price it is unknown whether caches are written; replies will show it.
        written = given if price.date and price.written > price.given else 0
        return cost_of((given, told, 0, 0, written), price), 0.0 if most else price.made * answers / 1e6

    def _tier_asked(self, request: dict[str, Any], price: Price) -> float:
        """Return what the service tier may cost, in times of the ordinary one; the project's default if none is set."""
        tier = request.get("service_tier")
        if tier in (None, "auto") or not isinstance(tier, str):
            return (price.fast if price.date and price.tiers else 1.0) if self._tier is None else self._tier
        factor = price.of_tier("" if tier in STANDARD else tier)
        return WORST if factor is None else factor

    def in_all(self, fixed: float, per_token: float) -> float:
        """Return the sum in USD, for answers up to five times as long as the longest so far while few are known."""
        return fixed + per_token * self._longest * (1 + 4 / max(1, self._answers))

    def likely(self, most: float, calls: int = 1) -> float:
        """Return what calls without a reply are likely to have cost: the mean, and `most` at the most."""
        return min(most, calls * self.spent / self._ended) if self._ended and calls else most

    def admit(self, most: tuple[float, float], in_turn: bool = False) -> bool:
        """Reserve what a call may cost; return False if it does not fit, or (unless `in_turn`) others are waiting."""
        fixed, per_token = self._fixed + most[0], self._open + most[1]
        left = self.most - self.spent - fixed
        ample = not per_token or (self._answers and per_token * self._longest * self.ROOM <= left)
        fits = (ample or self._calls <= self._answers // 2) and self.in_all(0, per_token) <= left
        if not fits or (self._queue.locked() and not in_turn):
            return False
        self._calls, self._fixed, self._open = self._calls + 1, fixed, per_token
        return True

    async def acquire(self, most: tuple[float, float]) -> bool:
        """Wait until a call fits and reserve it; return False if it does not fit although nothing else is in flight."""
        async with self._queue:
            while not (fits := self.admit(most, in_turn=True)) and self._calls:
                self._changed.clear()
                await self._changed.wait()
        return fits

    def used_up(self, most: tuple[float, float]) -> core.PromptError:
        """Return the error that stops a run whose budget is too small for one more such call."""
        spent = f"{money(self.spent)} of {money(self.most)} is spent"
        return core.PromptError("budget", f"{spent} and the next call may cost {money(self.in_all(*most))}", "stop")

    def settle(self, most: tuple[float, float], cost: float, assumed: bool = False) -> None:
        """Replace what was reserved for a call by its cost in USD; `assumed` if that is not known from a usage."""
        self._calls -= 1
        self._ended += 1
        self._fixed, self._open = (self._fixed - most[0], self._open - most[1]) if self._calls else (0.0, 0.0)
        self.spent += cost
        self.assumed += cost if assumed else 0.0
        self._changed.set()

    def as_served(self, price: Price, asked: float, tier: str) -> Price:
        """Return the price of a call with `asked` input tokens, in the service tier that the reply names."""
        factor = price.of_tier(tier)
        self._tier = max(self._tier or 0.0, WORST if factor is None else factor)
        return price.served(tier, asked > LONG_INPUT, unknown=WORST)

    def learn(self, body: bytes, asked: float, answered: float) -> None:
        """Update the worst case by the input and output tokens of an answer."""
        most, answers = max_output_tokens(core.parse_json(body))
        self._answers += 1
        self._dearest = max(self._dearest, asked / len(body))
        if not most:
            self._longest = max(self._longest, answered / answers)
        elif answered > most * answers:
            self._beyond = max(self._beyond, answered / answers)

    def as_dict(self) -> dict[str, float]:
        """Return the budget and what is spent, in USD, for --report."""
        return {"most": self.most, "spent": self.spent, "earlier": self.earlier, "assumed": self.assumed}

    def said(self) -> str:
        """Return the report's line: what is spent, and of it by earlier runs and without usage."""
        parts = ((self.earlier, "by earlier runs"), (self.assumed, "assumed for calls without usage"))
        told = ", ".join(f"{money(part)} {text}" for part, text in parts if part)
        passed = ": the cost of a call is not always known in advance" if self.spent > self.most > self.earlier else ""
        return f"{money(self.spent)} of {money(self.most)} spent" + (f", of it {told}" if told else "") + passed

    def load(
        self, results: pathlib.Path, price_of_row: Callable[[dict[str, Any]], Price | None] = lambda row: None
    ) -> None:
        """Read the account of earlier runs, and add the lines of the results file that are newer."""
        self._read_account(results)
        for offset, row in read_results(results) if results.exists() else ():
            if price := price_of_row(row):
                self.count(row, price, offset)

    def _read_account(self, results: pathlib.Path) -> None:
        try:
            with open_regular(core.beside_results(results, "spent"), links=False) as file:
                told = core.parse_json(file.read(1000))
            spent, most, calls, size = (float(told[name]) for name in ("spent", "most", "calls", "size"))
            if not all(0 <= number < math.inf for number in (spent, most, calls, size)):
                raise ValueError
            self._account = spent, most, int(calls), int(size)
            self._take_over()
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, KeyError, OverflowError):
            place = core.beside_results(results, "spent")
            core.log.warning("%s is damaged: counting the cost of the results instead", place)

    def count(self, row: dict[str, Any], price: Price, offset: int = 0) -> None:
        """Add what a line of the results file, at `offset`, has cost, by its usage."""
        _, tokens, tier = usage_in(row)
        self._answers += tokens[1] > 0
        self._ended += any(tokens)
        self._longest = max(self._longest, tokens[1])
        cost = cost_of(tokens, self.as_served(price, tokens[0], tier)) if any(tokens) else 0.0
        cost = told_cost(usage_of_row(row)) or cost
        self._lines += cost
        self._later += cost if offset >= self._account[3] else 0.0
        self._take_over()

    def _take_over(self) -> None:
        spent, most, calls, _ = self._account
        self.spent = max(self._lines, spent + self._later)
        self.earlier = self.spent = max(self._lines, spent + self._later + self.likely(most, calls))

    def save(self, results: pathlib.Path, lost: bool = True) -> None:
        """Write the account, with the calls in flight if these may be `lost`. Raises OSError if that fails."""
        most, calls = (self.in_all(self._fixed, self._open), self._calls) if lost else (0.0, 0)
        account = {"spent": self.spent, "most": most, "calls": calls, "size": results.stat().st_size}
        with self._saving, replacing(core.beside_results(results, "spent"), results, side=True) as file:
            file.write(core.dump(account))

    cost_of = staticmethod(cost_of)

    # -- the hooks

    def price_for(self, prompt: core.Prompt) -> tuple[str, Price | None]:
        """Return the model that a prompt is sent to, and its price, None if it is unknown."""
        return known_price(self.price, self._run.api.model_of(prompt), share=self._run.api.price_share)

    def _price_of_row(self, row: dict[str, Any]) -> Price | None:
        share = self._run.api.price_share
        return known_price(self.price, usage_in(row)[0], share=share)[1] or self._usual

    @contextlib.asynccontextmanager
    async def session(self, run: core.Run) -> AsyncIterator[None]:
        """Read what earlier runs have spent, and write the account once a second.

        Raises UsageError if no price is known, and for a user's own function, whose usage is unknown.
        """
        if not hasattr(run.api, "price_share"):
            raise core.UsageError("max_cost needs a loaded backend: it cannot see what your own function spends")
        self._run = run
        name, self._usual = self.price_for(run.first)
        if self._usual is None:
            raise core.UsageError(f"--max-cost: no price is known for {core.short(name, 60)}; give --price IN,OUT")
        if run.path and not run.overwrites:
            self.load(run.path, self._price_of_row)
        keeper = asyncio.ensure_future(self._keep()) if run.path else None
        try:
            yield
        finally:
            if keeper:
                keeper.cancel()
                with contextlib.suppress(OSError):  # `report` tries again, and reports it
                    self._save()

    def _save(self) -> None:
        assert self._run.path
        self.save(self._run.path, not (self._run.pending and self._run.pending.entries))

    async def _keep(self) -> None:
        for wait in itertools.chain([0.1], itertools.repeat(1.0)):  # soon, in case of a kill in the first second
            await asyncio.sleep(wait)
            try:
                await asyncio.to_thread(self._save)
            except OSError as failure:
                self._run.stop(core.disk_error(self._run.path, failure))
                return

    def wrap(self, attempt: core.Ask) -> core.Ask:
        """Reserve before each attempt, which stops the run if it cannot fit, and settle the cost after it."""

        async def paid(prompt: core.Prompt) -> core.Reply:
            name, price = self.price_for(prompt)
            if price is None:
                text = f"{prompt.where}: no price is known for {core.short(name, 60)}"
                raise core.PromptError("unknown_price", text)
            most = self.most_of(prompt.body, price)
            result = self._run.open[prompt.number]
            await self._reserve(most, result)
            return await self._settled(attempt, prompt, result, most, price)

        return paid

    async def _reserve(self, most: tuple[float, float], result: core.Result) -> None:
        if self._run.stopped or not self.admit(most):
            began = self._run.clock()
            if not await self._run.wait_or_stop(self.acquire(most)):
                raise self._run.stop_error() if self._run.stopped else self.used_up(most)
            result.slot_wait += self._run.clock() - began

    async def _settled(
        self, attempt: core.Ask, prompt: core.Prompt, result: core.Result, most: tuple[float, float], price: Price
    ) -> core.Reply:
        """Make the attempt, and replace what was reserved by its cost, also if it fails or is cancelled."""
        before, cost, assumed = result.attempts, 0.0, False
        try:
            reply = await attempt(prompt)
            cost, assumed = self.price_reply(prompt, reply, most, price)
            return reply
        except core.PromptError as failure:
            if result.attempts > before:
                cost, assumed = self.price_failure(failure, most, price)
            raise
        except BaseException:  # the second Ctrl-C
            cost, assumed = self.likely(self.in_all(*most)) if result.attempts > before else 0.0, True
            raise
        finally:
            self.settle(most, cost, assumed)

    def price_failure(self, failure: core.PromptError, most: tuple[float, float], price: Price) -> tuple[float, bool]:
        """Return the cost of a failed call in USD, and whether it is assumed."""
        tokens = core.token_counts(failure.usage or {})
        if tokens[0]:
            tier = tier_of(failure.http[2]) if failure.http else ""
            return told_cost(failure.usage) or cost_of(tokens, self.as_served(price, tokens[0], tier)), False
        lost = failure.error.status == 200 or not (failure.heard or failure.kind in core.NEVER_THERE)
        return (self.in_all(*most), True) if lost else (0.0, False)

    def price_reply(
        self, prompt: core.Prompt, reply: core.Reply | core.Result, most: tuple[float, float], price: Price
    ) -> tuple[float, bool]:
        """Return the cost of an answer in USD, and whether it is assumed; update the worst case."""
        tokens = reply.tokens if isinstance(reply, core.Result) else core.token_counts(reply.usage or {})
        asked, answered, *kinds = tokens
        told = asked and (answered or not reply.text)
        if not told:
            text = "the server reports no usage: --max-cost counts one token per byte"
            self._run.warn_once("usage", text)
            asked = asked or len(prompt.body)
            answered = len(str(reply.extra.get("texts") or reply.text or "").encode(errors="replace"))
        self.learn(prompt.body, asked, answered)
        cost = cost_of((asked, answered, *kinds), self.as_served(price, asked, reply.extra.get("service_tier", "")))
        if paid := told_cost(reply.usage):  # a reported 0 is not trusted
            return paid, False
        return (cost, False) if told else (max(most[0], cost), True)

    def status(self, ran: core.Ran) -> str:
        """Return what is spent, for the progress."""
        return f"{money(self.spent)} of {money(self.most)}"

    def report(self, ran: list[core.Ran], status: int) -> Iterator[str]:
        """Write the account, now that the results file has its final length, and yield the report's line."""
        try:
            if self._run.path:
                self._save()
        except OSError as failure:
            raise core.disk_error(self._run.path, failure) from None
        yield self.said()


def read_results(path: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the offset in bytes and the row of each result in a results file; other lines are skipped."""
    offset = 0
    with open_regular(path) as lines:
        for line in iter(functools.partial(lines.readline, core.RESULT_MOST), b""):
            row = core.parse_json(line.strip(b"\0\r\n "))
            with contextlib.suppress(ValueError):
                core.recognised(row)
                yield offset, row
            offset += len(line)


def add_arguments(option: Callable[..., Any]) -> None:
    """Add the flag."""
    option("--max-cost", metavar="USD", type=core.sibling("backends", "options").positive(float),
           help="stop before the job's total cost (earlier runs included) exceeds this")  # fmt: skip


def create(args: argparse.Namespace) -> Budget | None:
    """Return the budget, or None without --max-cost."""
    if args.max_cost and args.compare:
        raise core.UsageError("--compare sends every prompt several times and keeps no results; leave out --max-cost")
    return Budget(args.max_cost, args.price) if args.max_cost else None
