"""What a run costs: the report's line and the progress, from the tokens that the core counts by model.

`--price IN,OUT` gives the price in USD per million tokens for models that the table lacks, or instead of it; a third
number is for input that the provider has cached, a fourth for what it has written to its cache. It is the price of the
service tier that is asked for (`-p service_tier=`). What a reply says counts: its tier, whether the input was long, and
its cost in USD where it tells that (`usage.cost`, as OpenRouter does), which no price is applied to.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from . import core, named
from .tally import LONG_INPUT

usage_file = core.sibling("backends", "usage")
told_cost, COST_NAMES = usage_file.told_cost, usage_file.COST_NAMES
MODELS_MOST = 100  # of a run that are counted separately
PRICES_DATE = "2026-11-05"  # of the prices that name no date of their own
# Times the ordinary tier's price; "ultrafast" until 2027-02-28: https://developers.openai.com/api/docs/models/gpt-6.2-sol
TIERS = {"flex": 0.5, "batch": 0.5, "ultrafast": 3.0}
FAST_TIERS = "priority", "fast"  # two names of one, whose price is the model's own
LONG_IN, LONG_OUT = 2.0, 1.5  # times the price of all of a call, if more than LONG_INPUT tokens go in
WRITTEN = 1.25  # times the input's price for cache writes: OpenAI from gpt-5.6 on, Anthropic's 5 minutes


class Price(NamedTuple):
    """USD per million tokens: in, in from a cache, out, in that is written to a cache; and what makes them dearer.

    `fast` is what the tier "priority" costs of the ordinary one, `long` whether long inputs cost more, `tiers` whether
    service tiers have a price of their own, `date` when it was looked up, "" if the user has told it, and `base` which
    tier's price that is, as a factor.
    """

    given: float
    cached: float
    made: float
    written: float
    fast: float = 2.0
    long: bool = False
    tiers: bool = True
    date: str = PRICES_DATE
    base: float = 1.0

    def times(self, given: float, made: float) -> Price:
        """Return so many times the price of what goes in, and of what comes out."""
        return self._replace(
            given=given * self.given, cached=given * self.cached, written=given * self.written, made=made * self.made
        )

    def of_tier(self, tier: str) -> float | None:
        """Return what a service tier costs, in times of this price ("": 1.0); None if that is unknown."""
        if not tier or not self.tiers:
            return 1.0
        factor = TIERS.get(tier, self.fast if tier in FAST_TIERS else None)
        return factor and factor / self.base

    def served(self, tier: str, long: bool, unknown: float = 1.0) -> Price:
        """Return the price of a call that was served so; `unknown` is for a tier of which nothing is known."""
        factor = self.of_tier(tier)
        factor = unknown if factor is None else factor
        if long and self.long:
            return self.times(LONG_IN * factor, LONG_OUT * factor)
        return self if factor == 1 else self.times(factor, factor)


def recent(given: float, cached: float, made: float, date: str = PRICES_DATE) -> Price:
    """Return the price of a model from gpt-5.6 on: cache writes and long inputs cost more."""
    return Price(given, cached, made, WRITTEN * given, long=True, date=date)


def older(given: float, cached: float, made: float, fast: float = 2.0, long: bool = False) -> Price:
    """Return the price of a model before gpt-5.6: a cache write costs what input costs."""
    return Price(given, cached, made, given, fast, long)


# Standard prices of https://developers.openai.com/api/docs/pricing and of the models' own pages (those with a date);
# what "priority" costs is from https://openai.com/api-priority-processing/, and 2 where that page says nothing. Tools
# and the 10 % for regional processing are not counted.
PRICES: dict[str, Price] = {
    "gpt-6.2-astra": recent(8.00, 0.40, 40.00, "2026-11-18"),
    "gpt-6.2-sol": recent(2.00, 0.10, 10.00, "2026-11-18"),
    "gpt-6.1-terra": recent(1.00, 0.05, 5.00, "2026-11-18"),
    "gpt-6.1-sol": recent(2.00, 0.10, 10.00),
    "gpt-6-astra": recent(10.00, 1.00, 50.00),
    "gpt-6-sol": recent(2.00, 0.20, 10.00),
    "gpt-6-luna": recent(0.10, 0.01, 0.50),
    "gpt-5.6-sol": recent(4.00, 0.40, 20.00),
    "gpt-5.6-terra": recent(2.00, 0.20, 12.00),
    "gpt-5.6-luna": recent(0.20, 0.02, 1.20),
    "gpt-5.5": older(5.00, 0.50, 30.00, 2.5, long=True),
    "gpt-5.4": older(2.50, 0.25, 15.00, long=True),
    "gpt-5.4-mini": older(0.75, 0.075, 4.50),
    "gpt-5.4-nano": older(0.20, 0.02, 1.25),
    "gpt-5.2": older(1.75, 0.175, 14.00),
    "gpt-5.1": older(1.25, 0.125, 10.00),
    "gpt-5": older(1.25, 0.125, 10.00),
    "gpt-5-mini": older(0.25, 0.025, 2.00, 1.8),
    "gpt-5-nano": older(0.05, 0.005, 0.40),
    "gpt-4.1": older(2.00, 0.50, 8.00, 1.75),
    "gpt-4.1-mini": older(0.40, 0.10, 1.60, 1.75),
    "gpt-4.1-nano": older(0.10, 0.025, 0.40),
    "gpt-4o": older(2.50, 1.25, 10.00, 1.7),
    "gpt-4o-2024-05-13": older(5.00, 5.00, 15.00, 1.75),
    "gpt-4o-mini": older(0.15, 0.075, 0.60),
    "text-embedding-3-small": older(0.02, 0.02, 0.00),
    "text-embedding-3-large": older(0.13, 0.13, 0.00),
}


@functools.lru_cache
def price_of(model: str | None, share: float = 1.0) -> Price | None:
    """Return a share of a model's price, None where it is unknown.

    A provider's prefix and a snapshot's date do not matter.
    """
    name = (model or "").rpartition("/")[2]
    price = PRICES.get(name) or PRICES.get(re.sub(r"-\d{4}-\d\d-\d\d$", "", name))
    price = price or (None if share else older(0.0, 0.0, 0.0))
    return price if price is None or share == 1 else price.times(share, share)._replace(tiers=False)


def known_price(told: Price | None, *models: str | None, share: float = 1.0) -> tuple[str, Price | None]:
    """Return the first of the models with a price, and that price: the user's, or a share of the table's."""
    names = [model for model in models if model] or ["a model that is not named"]
    found = ((name, told or price_of(name, share)) for name in names)
    return next(((name, price) for name, price in found if price), (names[0], None))


def as_price(numbers: Iterable[float | str]) -> Price:
    """Return the price of IN, OUT and optionally CACHED and WRITTEN. Raises ValueError if it is none."""
    if isinstance(numbers, Price):
        return numbers
    with contextlib.suppress(TypeError, ValueError):
        given, made, *more = map(float, numbers)
        cached, written = [*more, *(given, WRITTEN * given)[len(more) :]]
        if all(0 <= part < math.inf for part in (given, made, cached, written)):
            return Price(given, cached, made, written, date="")
    raise ValueError("a price must be (in, out), (in, out, cached) or (in, out, cached, written), USD per million")


def told_price(numbers: Iterable[float | str], asked_tier: Any) -> Price:
    """Return the user's price, for the requested service tier. Raises ValueError if it is none."""
    price = as_price(numbers)
    factor = price.of_tier(asked_tier) if isinstance(asked_tier, str) else None
    return price._replace(base=factor) if factor else price


def cost_of(tokens: Sequence[float], price: Price) -> float:
    """Return what so many tokens in, out, cached, for reasoning and written to a cache cost, in USD.

    Those cached and written are of those in, those for reasoning of those out.
    """
    asked, answered, cached = tokens[:3]
    cached = min(asked, cached)
    written = min(asked - cached, tokens[4]) if len(tokens) > 4 else 0
    plain = (asked - cached - written) * price.given + answered * price.made
    return (plain + cached * price.cached + written * price.written) / 1e6


def money(dollars: float) -> str:
    """Return the amount with its significant digits: $12.30, $0.0123."""
    digits = 2 if dollars >= 1 or dollars <= 0 else 2 - math.floor(math.log10(dollars))
    whole, _, part = f"{dollars:,.{digits}f}".partition(".")
    return f"${whole}.{part.rstrip('0').ljust(2, '0')}"


def usage_of_row(row: dict[str, Any]) -> dict[str, Any] | None:
    """Return the usage that a line of a results file holds."""
    reply = row if "request" in row else (row.get("response") or {}).get("body")  # of a Batch output line
    usage = reply.get("usage") if isinstance(reply, dict) else None
    return usage if isinstance(usage, dict) else None


def usage_in(row: dict[str, Any]) -> tuple[str | None, Sequence[int], str]:
    """Return the model, the tokens and the service tier that a line of a results file names."""
    reply = row if "request" in row else (row.get("response") or {}).get("body")  # of a Batch output line
    if not isinstance(reply, dict) or not isinstance(reply.get("usage"), dict):
        return None, core.NO_TOKENS, ""
    model = reply.get("model")
    tier = core.sibling("backends", "usage").tier_of(reply)
    return model if isinstance(model, str) else None, core.token_counts(reply["usage"]), tier


def say_cost(amount: str, prices: Mapping[str, Price | None]) -> str:
    """Return the amount with the prices that it comes from, or else why it is unknown and what to do."""
    known, unknown, dates = [], [], set()
    for name, price in prices.items():
        if price is None:
            unknown.append(core.short(name, 60))
        else:
            out = f", {money(price.made)} out" if price.made else ""
            known.append(f"{core.short(name, 60)} at {money(price.given)} in{out}")
            dates.add(f"prices of {price.date}" if price.date else "as given")
    way_out = f"no price for {', '.join(unknown)}; give --price IN,OUT"
    if not known:
        return f"unknown: {way_out}"
    source = " and ".join(sorted(dates)).replace("and prices of", "and")
    return f"{amount} ({', '.join(known)} per million, {source})" + (f"; {way_out}" if unknown else "")


class Ledger:
    """The costs in USD that replies report, and the tokens that these cover."""

    def __init__(self) -> None:
        self.replies, self.spent = 0, 0.0
        self._tokens: dict[tuple[Any, str, bool], list[int]] = {}  # by what a bill is known by besides the model asked

    def add(self, result: core.Result, cost: float) -> None:
        """Count an answer that reports its cost."""
        self.replies += 1
        self.spent += cost
        model = result.model if type(result.model) is str else None
        key = model, result.extra.get("service_tier", ""), result.tokens[0] > LONG_INPUT
        if key in self._tokens or len(self._tokens) < MODELS_MOST:  # a server may name what it likes
            tokens = self._tokens.setdefault(key, [*core.NO_TOKENS])
            tokens[:] = map(int.__add__, tokens, result.tokens)

    def left_of(self, bills: Mapping[Any, Sequence[int]]) -> Iterator[tuple[Any, list[int]]]:
        """Yield each bill with the tokens whose cost no reply has reported, if there are any."""
        settled = {key: [*tokens] for key, tokens in self._tokens.items()}
        for key, tokens in bills.items():
            known = settled.get(key[1:], [*core.NO_TOKENS])
            left = [max(0, count - less) for count, less in zip(tokens, known, strict=True)]
            known[:] = [max(0, less - count) for count, less in zip(tokens, known, strict=True)]
            if any(left) or not any(tokens):
                yield key, left


class Prices:
    """The costs of runs, at the user's price or those of the table."""

    def __init__(self, told: Iterable[Any] | None = None, hidden: bool = False) -> None:
        self.told, self._hidden = None if told is None else as_price(told), hidden
        self._ledgers: WeakKeyDictionary[core.Run, Ledger] = WeakKeyDictionary()
        self._ledger = Ledger()

    @contextlib.asynccontextmanager
    async def session(self, run: core.Run) -> AsyncIterator[None]:
        """Count the costs that this run's replies report."""
        self._ledger = self._ledgers[run] = Ledger()
        yield

    def on_result(self, result: core.Result) -> None:
        """Count the cost that an answer's usage reports."""
        if not result.usage or COST_NAMES.isdisjoint(result.usage):  # of nearly all
            return
        if (cost := told_cost(result.usage)) is not None:
            self._ledger.add(result, cost)

    def ledger(self, ran: core.Ran) -> Ledger:
        """Return the ledger of the costs that a run's replies reported."""
        return self._ledgers.get(ran.run) or Ledger()

    def parts(self, ran: core.Ran) -> Iterator[tuple[str, Price | None, float, str, bool]]:
        """Yield each bill's model, its price, the cost in USD, the service tier and whether long inputs cost more."""
        for (*models, tier, long), tokens in self.ledger(ran).left_of(ran.tally.bills):
            name, price = known_price(self.told, *models, share=getattr(ran.api, "price_share", 1.0))
            cost = cost_of(tokens, price.served(tier, long)) if price else 0.0
            yield name, price, cost, tier, bool(price and price.long and long)

    def bill(self, ran: core.Ran) -> tuple[float, dict[str, Price | None]]:
        """Return the known cost in USD, and the price of each model, None if unknown."""
        parts = list(self.parts(ran))
        return self.ledger(ran).spent + sum(part[2] for part in parts), {name: price for name, price, *_ in parts}

    def remarks(self, ran: core.Ran) -> Iterator[str]:
        """Yield the parts of the cost at other prices than the named ones: tiers, long inputs."""
        sums: dict[str, float] = {}
        for _, price, cost, tier, long in self.parts(ran):
            factor = price.of_tier(tier) if price else 1
            at = f"at {factor:.3g} times that" if factor else "counted at that price: its own is unknown"
            if factor != 1:
                text = f"in the tier {core.short(tier, 40)}, {at}"
                sums[text] = sums.get(text, 0.0) + cost
            if long:
                text = f"for inputs above {LONG_INPUT:,} tokens, {LONG_IN:g} times that in, {LONG_OUT:g} out"
                sums[text] = sums.get(text, 0.0) + cost
        yield from (f"{money(cost)} of it {text}" for text, cost in sums.items())

    def cost(self, ran: core.Ran) -> float | None:
        """Return the whole cost in USD; None if any part is unknown."""
        spent, prices = self.bill(ran)
        told = prices or self.ledger(ran).replies
        return spent if told and not ran.tally.silent and all(prices.values()) else None

    def status(self, ran: core.Ran) -> str:
        """Return the cost so far, for the progress, unless a budget shows it."""
        cost = None if named(ran.run, "budget") else self.cost(ran)
        return money(cost) if cost else ""

    def report(self, ran: list[core.Ran], status: int) -> Iterator[str]:
        """Yield the report's line on the cost of a run; none for a comparison, which is a measurement."""
        if len(ran) == 1 and not self._hidden and (line := self._line(ran[0])):
            yield line

    def _line(self, ran: core.Ran) -> str:
        tally = ran.tally
        if not any(tally.tokens):
            return "cost unknown: the server reports no usage" if tally.silent else ""
        spent, prices = self.bill(ran)
        without = f"; {core.plural(tally.silent, 'answer')} without usage not counted" if tally.silent else ""
        lost = core.plural(tally.unanswered, "lost call")
        without += f"; {lost} may have been billed, too" if tally.unanswered else ""
        ledger, said = self.ledger(ran), []
        cost = say_cost(money(spent), prices)
        if ledger.replies and any(prices.values()):
            said = [f"{money(ledger.spent)} of it as reported in {core.plural(ledger.replies, 'answer')}"]
        elif ledger.replies:  # the rest has no price
            said = [say_cost("", prices)] if prices else []
            cost = f"{money(ledger.spent)}, as the replies report"
        return "; ".join([f"cost {cost}", *said, *self.remarks(ran)]) + without

    def as_dict(self, ran: core.Ran) -> dict[str, Any]:
        """Return the fields of --report for a run's cost."""
        spent, prices = self.bill(ran)
        dates = [price.date for price in prices.values() if price and price.date] or [PRICES_DATE]
        told = {name: price and price[:3] for name, price in prices.items()}
        date = None if self.told else min(dates)
        ledger = self.ledger(ran)
        known = {"cost_usd": self.cost(ran), "cost_known_usd": spent}
        known["cost_told_usd"] = ledger.spent if ledger.replies else None
        return known | {"prices": told, "prices_date": date}


def add_arguments(option: Callable[..., Any]) -> None:
    """Add the flag."""
    option("--price", metavar="IN,OUT",
           help="USD per million tokens instead of the table's; longer: IN,OUT,CACHED,WRITTEN")  # fmt: skip


def create(args: argparse.Namespace) -> Prices:
    """Return the prices of a run; made-up answers cost nothing."""
    told = None
    if args.price is not None:
        try:
            told = told_price(args.price.split(","), args.params.get("service_tier"))
        except ValueError:
            what = f"--price {core.short(args.price, 40)} is not IN,OUT in USD per million tokens"
            raise core.UsageError(what) from None
        args.price = told
    return Prices(told, hidden=told is None and bool(getattr(args, "demo", False)))
