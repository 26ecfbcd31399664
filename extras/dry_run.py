"""--dry-run: show what would be sent, what it would cost and how long it would take; send and write nothing.

Tokens are counted by tiktoken if it is installed (pip install tiktoken), else estimated.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import pathlib
import re
import textwrap
import threading
from collections.abc import Callable, Iterator
from typing import Any

from . import core
from .budget import Budget, max_output_tokens
from .files import unwritable
from .outputs import Look
from .prices import Price, as_price, known_price, money, say_cost, usage_in
from .tally import LONG_INPUT
from .text import Printer, check_stdout

loading = core.sibling("backends", "loading")
console = core.sibling("backends", "console")


def add_arguments(option: Callable[..., Any]) -> None:
    """Add the flag."""
    option("--dry-run", action="store_true", help="show what would be sent and what it would cost; send nothing")


def create(args: argparse.Namespace) -> DryRun | None:
    """Return the command, or None without --dry-run."""
    return DryRun(args) if args.dry_run else None


class DryRun:
    """The command. Raises UsageError with --report or --plot."""

    def __init__(self, args: argparse.Namespace) -> None:
        if getattr(args, "report", None) or getattr(args, "plot", None):
            raise core.UsageError("--dry-run sends nothing that --report or --plot could show; leave them out")
        check_stdout()
        self._args = args

    def command(self) -> int:
        """Print the plan; return the exit status."""
        return dry_run(self._args)


CACHED_LEAST = 1024  # fewer input tokens are not cached: https://platform.openai.com/docs/guides/prompt-caching


class Plan:
    """What a run would send, and its cost."""

    SAMPLE = 8 << 20  # bytes that tiktoken counts, in two seconds; the rest is assumed to be similar

    def __init__(self, api: Any, told: Price | None, first: core.Prompt) -> None:
        self.asked = 0
        self.first: core.Prompt | None = None
        self.errors: dict[str, list[Any]] = {}  # by the reason without its numbers: how many, and the first one
        self.tokens = [0.0, 0.0, 0.0]  # in, out at most, and one for each answer that has no maximum
        self.costs = [0.0, 0.0, 0.0]  # the same in USD
        self.prices: dict[str, Price | None] = {}
        self._api, self._told = api, told
        self._known = functools.partial(known_price, told, share=api.price_share)
        self._usual = self._known(api.model_of(first))[1]
        self._reserve = 0.0  # USD by which a call is counted for more than it is likely to cost, until it has ended
        self.earlier, self._answers, self._answered = Budget(math.inf), 0, 0  # what the results file holds
        self._left_out: set[str] = set()
        self._encode, self._how = tokenizer(api.model_of(first) or "")
        self._bytes = self._counted = 0  # by tiktoken

    def count(self, row: dict[str, Any]) -> Price | None:
        """Count a line of the results file; return its price."""
        model, tokens, _ = usage_in(row)
        self._answers += tokens[0] > 0
        self._answered += tokens[1]
        return self._known(model)[1] or self._usual

    def add(self, prompt: core.Prompt) -> None:
        """Count a prompt that would be sent, or one that cannot be."""
        if prompt.error is not None:
            reason = re.sub(r"\d+", "#", prompt.error.message.removeprefix(f"{prompt.where}: "))
            reason = reason if len(self.errors) < 20 or reason in self.errors else "others"
            self.errors.setdefault(reason, [0, prompt.error.message])[0] += 1
            return
        self.asked += 1
        self.first = self.first or prompt
        request = core.parse_json(prompt.body)  # orjson alone does not take every number
        if any(request.get(key) for key in ("tools", "functions", "response_format", "text")):
            self._left_out.add("tools and schemas")
        given = sum(self._tokens(request.get(key)) for key in ("instructions", "messages", "input", "prompt"))
        most, answers = max_output_tokens(request) if "embeddings" not in prompt.path else (0, 0)
        tokens = (given + 3 * ("messages" in request), most * answers, 0 if most else answers)
        name, price = self._known(self._api.model_of(prompt))
        self.prices[name] = price
        tier = request.get("service_tier")
        served = price and price.served(tier if isinstance(tier, str) else "", given > LONG_INPUT)
        for kind, count in enumerate(tokens):
            self.tokens[kind] += count
            self.costs[kind] += count * (served.made if kind else served.given) / 1e6 if served else 0.0
        self._left_out |= {"cache hits and writes"} if served and given >= CACHED_LEAST else set()
        if price and served:
            most_in = self.earlier.most_of(prompt.body, price)[0] - most * answers * served.made / 1e6
            self._reserve = max(self._reserve, most_in - given * served.given / 1e6)

    def _tokens(self, value: Any) -> float:
        """Return the tokens of all texts in a part of a request; each message takes 4 more."""
        if isinstance(value, list):
            return sum(map(self._tokens, value))
        if isinstance(value, str):
            size = len(value.encode(errors="replace"))
            if self._encode is None or self._bytes > self.SAMPLE:
                return size * (self._counted / self._bytes if self._bytes else 0.25)
            count = sum(len(self._encode(value[start : start + 10_000])) for start in range(0, len(value), 10_000))
            self._bytes += size
            self._counted += count
            return count
        if not isinstance(value, dict):
            return float(isinstance(value, int))  # a token itself
        if re.search("image|audio|file", str(value.get("type"))):
            self._left_out.add("images, audio and files")
            return 0
        kept = ("content", "text", "arguments", "output", "refusal")
        return sum(self._tokens(value[key]) for key in kept if key in value) + 4 * ("role" in value)

    def rows(self, args: argparse.Namespace, runs: int) -> Iterator[tuple[str, str]]:
        """Yield the lines for tokens, cost and time, each with its label."""
        given, most, untold = (runs * count for count in self.tokens)
        part = " in part, the rest estimated from that" if self._bytes > self.SAMPLE else ""
        yield "tokens in", f"about {given:,.0f}, {self._how}{part}"
        outs = [f"at most {most:,.0f} where a maximum is set"] if most else []
        outs += [f"{100 * untold:,.0f} if each answer has 100 (no maximum is set)"] if untold else []
        yield "tokens out", "; ".join(outs) or "none"
        yield from self._money(getattr(args, "max_cost", None), runs)
        limits = [(runs * self.asked - 1, args.rpm, "requests"), (given + most, args.tpm, "tokens")]
        if least := [(60 * amount / limit, f"{limit:,.0f} {name}/min") for amount, limit, name in limits if limit]:
            yield "time", f"at least {core.duration(max(least)[0])} at {max(least)[1]}"
        if self._left_out:
            yield "besides", f"{' and '.join(sorted(self._left_out))}: not counted"

    def _money(self, budget: float | None, runs: int) -> Iterator[tuple[str, str]]:
        """Yield the cost, and whether a budget suffices for it."""
        given, most, token = (runs * cost for cost in self.costs)
        text = f"about {money(given)} in"
        if most:
            text += f" + at most {money(most)} out = at most {money(given + most)}"
        if token:
            text += f" + {money(100 * token)} for each 100 tokens of an answer"
        if token and self._answers:
            alike = given + most + token * self._answered / self._answers
            text += f", {money(alike)} if they are like the answers so far"
        yield "cost", say_cost(f"{text}, without retries", self.prices)
        if budget and not all(self.prices.values()):
            yield "--max-cost", "cannot be kept without a price"
        elif budget:
            spent = self.earlier.spent
            left = budget - spent - given - most - self._reserve
            answers = core.plural(math.floor(left / token), "token") if token else ""
            enough = f"suffices for answers of about {answers}" if token else "suffices"
            short_of = "may not suffice: the run would stop before exceeding it, and can be continued"
            already = f", with the {money(spent)} spent already," if spent else ""
            yield "--max-cost", f"{money(budget)}{already} {short_of if left < 0 else enough}"


ENCODING_TIMEOUT = 4.0  # seconds; tiktoken may have to download it


def tokenizer(model: str) -> tuple[Callable[[str], list[int]] | None, str]:
    """Return tiktoken's encoder for the model, or None if it does not load in time, and a text that says how."""
    try:
        import tiktoken
    except ImportError:
        return None, "estimated, four bytes a token; pip install tiktoken counts them"
    found: list[Any] = [None, "estimated, four bytes a token; tiktoken's encoding did not load in time"]

    def find() -> None:
        try:
            try:
                encoding, doubt = tiktoken.encoding_for_model(model.rpartition("/")[2]), ""
            except KeyError:
                encoding, doubt = tiktoken.get_encoding("o200k_base"), ", approximate for this model"
            found[:] = encoding.encode_ordinary, f"counted by tiktoken ({encoding.name}{doubt})"
        except Exception:  # it downloads the encoding
            found[1] = "estimated, four bytes a token; tiktoken's encoding cannot be loaded"

    thread = threading.Thread(target=find, daemon=True)
    thread.start()
    thread.join(ENCODING_TIMEOUT)
    return found[0], found[1]


def dry_run(args: argparse.Namespace) -> int:
    """Print what would be sent and its cost; send, write and create nothing. Return the exit status."""
    api, *_ = [core.sibling("backends", "loading").make_api(args, name, dry=True) for name in args.backends]
    prompts = loading.checked(loading.prompts_of(args, args.limit), api)
    plan = Plan(api, args.price and as_price(args.price), next(loading.prompts_of(args), core.Prompt(0, "")))
    sink: Look | Printer = Printer()
    for extra in args.extras:
        if hasattr(extra, "check"):
            extra.check()
    if args.output != "-" and (why := unwritable(args.journal)):
        raise core.UsageError(f"{why}; choose another file with -o")
    if args.output != "-" and not args.compare and not args.overwrite and os.path.exists(args.journal):
        sink = Look(pathlib.Path(args.journal), retry_failed=args.retry_failed)
        plan.earlier.load(pathlib.Path(args.journal), plan.count)
    with sink:
        sink.check(map(api.prepare, loading.prompts_of(args)), args.name)
        for prompt in sink.left(prompts):
            plan.add(prompt)
    api.warn_of_input()
    kept, failed, bad = sink.kept, len(sink.kept_errors), sum(count for count, _ in plan.errors.values())
    runs = len(args.backends) * max(2, len(args.calls)) if args.compare else 1
    shard = next((f"{extra} of " for extra in args.extras if hasattr(extra, "select") and hasattr(extra, "count")), "")
    rows = [("prompts", f"{plan.asked + kept + failed + bad:,} in {shard}{args.name}")]
    rows += [("unusable", f"{count:,} x {example}") for count, example in plan.errors.values()]
    if args.output != "-" and not args.overwrite and os.path.exists(running := f"{args.journal}.running"):
        rows += [("running", f"what is in {running} is not sent again")]
    if kept or failed:
        rows += [("answered", f"{kept:,} in {args.journal}" + (f"; {failed:,} failed there" if failed else ""))]
    rows += [("to send", f"{plan.asked:,}" + (f" in each of {runs} runs (and one before it)" if runs > 1 else ""))]
    rows += plan.rows(args, runs) if plan.asked else []
    width = min(80, console.columns())
    for label, text in rows:
        row = f"{label:<12}{console.visible(text)}"
        print(textwrap.fill(row, width - 2, subsequent_indent=" " * 12, break_on_hyphens=False))
    if plan.first is not None:
        lines = list(map(console.visible, api.show(plan.first)))
        lines[40:] = ["…"] * (len(lines) > 40)
        cut = (line if len(line) < width else f"{line[: width - 2]}…" for line in lines)
        print("\nthe first request:", *cut, sep="\n")
    return 0 if not bad else 1 if plan.asked + kept + failed else 2
