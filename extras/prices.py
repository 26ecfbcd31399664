"""What a run costs: the report's line and the progress, from the tokens that the core counts by model.

`--price IN,OUT` gives the price in USD per million tokens for models that the table lacks, or instead of it; a third
number is for input that the provider has cached.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from . import core

# USD per million tokens: in, in from the cache, out. Standard prices of https://developers.openai.com/api/docs/pricing;
# what comes on top of them or off (long contexts, service tiers, cache writes, tools) is not counted.
PRICES_DATE = "2026-11-05"
Price = tuple[float, float, float]
PRICES: dict[str, Price] = {
    "gpt-6.1-sol": (2.00, 0.10, 10.00),
    "gpt-6-astra": (10.00, 1.00, 50.00),
    "gpt-6-sol": (2.00, 0.20, 10.00),
    "gpt-6-luna": (0.10, 0.01, 0.50),
    "gpt-5.6-sol": (4.00, 0.40, 20.00),
    "gpt-5.6-terra": (2.00, 0.20, 12.00),
    "gpt-5.6-luna": (0.20, 0.02, 1.20),
    "gpt-5.5": (5.00, 0.50, 30.00),
    "gpt-5.4": (2.50, 0.25, 15.00),
    "gpt-5.4-mini": (0.75, 0.075, 4.50),
    "gpt-5.4-nano": (0.20, 0.02, 1.25),
    "gpt-5.2": (1.75, 0.175, 14.00),
    "gpt-5": (1.25, 0.125, 10.00),
    "gpt-5-mini": (0.25, 0.025, 2.00),
    "gpt-5-nano": (0.05, 0.005, 0.40),
    "gpt-4.1": (2.00, 0.50, 8.00),
    "gpt-4.1-mini": (0.40, 0.10, 1.60),
    "gpt-4o": (2.50, 1.25, 10.00),
    "gpt-4o-2024-05-13": (5.00, 5.00, 15.00),
    "gpt-4o-mini": (0.15, 0.075, 0.60),
    "text-embedding-3-small": (0.02, 0.02, 0.00),
    "text-embedding-3-large": (0.13, 0.13, 0.00),
}


@functools.lru_cache
def price_of(model: str | None, share: float = 1.0) -> Price | None:
    """Return a share of a model's price, None where it is unknown.

    A provider's prefix and a snapshot's date do not matter.
    """
    name = (model or "").rpartition("/")[2]
    price = PRICES.get(name) or PRICES.get(re.sub(r"-\d{4}-\d\d-\d\d$", "", name))
    price = price or (None if share else (0.0, 0.0, 0.0))
    return price and (share * price[0], share * price[1], share * price[2])


def known_price(told: Price | None, *models: str | None, share: float = 1.0) -> tuple[str, Price | None]:
    """Return the first of the models that has a price, and that: what the user has told, or a share of the table's."""
    names = [model for model in models if model] or ["a model that is not named"]
    found = ((name, told or price_of(name, share)) for name in names)
    return next(((name, price) for name, price in found if price), (names[0], None))


def as_price(numbers: Iterable[float | str]) -> Price:
    """Return the price that IN, OUT and perhaps CACHED make. Raises ValueError where they make none."""
    with contextlib.suppress(TypeError, ValueError):
        asked, answered, *cached = map(float, numbers)
        price = asked, *(cached or [asked]), answered
        if len(price) == 3 and all(0 <= part < math.inf for part in price):
            return price
    raise ValueError("a price is (in, out) or (in, out, cached), in USD per million tokens")


def cost_of(tokens: Sequence[float], price: Price) -> float:
    """Return what so many tokens in, out and cached (of those in) cost, in USD."""
    asked, answered, cached = tokens[:3]
    cached = min(asked, cached)
    return ((asked - cached) * price[0] + cached * price[1] + answered * price[2]) / 1e6


def money(dollars: float) -> str:
    """Return the amount with as many digits as mean something: $12.30, $0.0123."""
    digits = 2 if dollars >= 1 or dollars <= 0 else 2 - math.floor(math.log10(dollars))
    whole, _, part = f"{dollars:,.{digits}f}".partition(".")
    return f"${whole}.{part.rstrip('0').ljust(2, '0')}"


def usage_in(row: dict[str, Any]) -> tuple[str | None, Sequence[int]]:
    """Return the model and the tokens that a line of a results file names."""
    reply = row if "request" in row else (row.get("response") or {}).get("body")  # of a Batch output line
    if not isinstance(reply, dict) or not isinstance(reply.get("usage"), dict):
        return None, core.NO_TOKENS
    model = reply.get("model")
    return model if isinstance(model, str) else None, core.token_counts(reply["usage"])


def say_cost(amount: str, prices: Mapping[str, Price | None], told: bool) -> str:
    """Return the amount with the prices that it comes from, or else why it is unknown and what to do."""
    known, unknown = [], []
    for name, price in prices.items():
        if price is None:
            unknown.append(core.short(name, 60))
        else:
            out = f", {money(price[2])} out" if price[2] else ""
            known.append(f"{core.short(name, 60)} at {money(price[0])} in{out}")
    way_out = f"no price for {', '.join(unknown)}; give --price IN,OUT"
    if not known:
        return f"unknown: {way_out}"
    source = "as told" if told else f"prices of {PRICES_DATE}"
    return f"{amount} ({', '.join(known)} per million, {source})" + (f"; {way_out}" if unknown else "")


Models = tuple[str | None, str | None]  # the one that was asked for, and the one that the replies name


class Prices:
    """The costs of runs: at the price that the user has told, or else at those of the table."""

    def __init__(self, told: Price | None = None, hidden: bool = False) -> None:
        self.told, self._hidden = told, hidden

    def bill(self, ran: core.Ran) -> tuple[float, dict[str, Price | None]]:
        """Return what is known to have been spent, in USD, and the price of each model, None where it is unknown."""
        spent, prices = 0.0, {}
        for models, tokens in ran.tally.bills.items():
            name, price = known_price(self.told, *models, share=ran.api.price_share)
            prices[name] = price
            spent += cost_of(tokens, price) if price else 0.0
        return spent, prices

    def cost(self, ran: core.Ran) -> float | None:
        """Return what all has cost, in USD; None where that is not known of all."""
        spent, prices = self.bill(ran)
        return spent if prices and not ran.tally.silent and all(prices.values()) else None

    def status(self, ran: core.Ran) -> str:
        """Return what it has cost so far, unless a budget says that."""
        cost = None if ran.run.extra("budget") else self.cost(ran)
        return money(cost) if cost else ""

    def report(self, ran: list[core.Ran], status: int) -> Iterator[str]:
        """Yield the line that says what a run has cost; a comparison is a measurement."""
        if len(ran) == 1 and not self._hidden and (line := self._line(ran[0])):
            yield line

    def _line(self, ran: core.Ran) -> str:
        tally = ran.tally
        if not any(tally.tokens):
            return "cost unknown: the server tells no usage" if tally.silent else ""
        spent, prices = self.bill(ran)
        without = f"; {core.plural(tally.silent, 'answer')} without usage not counted" if tally.silent else ""
        lost = core.plural(tally.unanswered, "lost call")
        without += f"; {lost} may have been billed, too" if tally.unanswered else ""
        return f"cost {say_cost(money(spent), prices, self.told is not None)}{without}"

    def as_dict(self, ran: core.Ran) -> dict[str, Any]:
        """Return what --report says of a run's cost."""
        spent, prices = self.bill(ran)
        date = None if self.told else PRICES_DATE
        return {"cost_usd": self.cost(ran), "cost_known_usd": spent, "prices": prices, "prices_date": date}


def add_arguments(option: Callable[..., Any]) -> None:
    """Add the flag."""
    option("--price", metavar="IN,OUT",
           help="USD per million tokens instead of the table's; a third number is for cached input")  # fmt: skip


def create(args: argparse.Namespace) -> Prices:
    """Return the prices of a run; made-up answers cost nothing."""
    told = None
    if args.price is not None:
        try:
            told = as_price(args.price.split(","))
        except ValueError:
            what = f"--price {core.short(args.price, 40)} is not IN,OUT in USD per million tokens"
            raise core.UsageError(what) from None
        args.price = args.price.split(",")
    return Prices(told, hidden=told is None and bool(getattr(args, "demo", False)))
