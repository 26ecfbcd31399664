"""A sweep: --compare -c 1,4,16,64,auto measures each number of calls in flight, and names the knee.

The knee is the fewest calls in flight that bring nine tenths of the most answers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

from . import core


def add_arguments(option: Callable[..., Any]) -> None:
    """Add nothing: several numbers after -c ask for it."""


def create(args: argparse.Namespace) -> Sweep | None:
    """Return what measures, if there are several numbers of calls."""
    return Sweep(args) if args.compare and len(args.calls) > 1 else None


class Sweep:
    """A comparison over backends and calls in flight."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args

    def command(self) -> int | None:
        """Measure, unless nothing is to be sent; return the exit status."""
        if getattr(self._args, "dry_run", False):
            return None
        return core.run_command(core.compare(self._args, self._args.calls, verdicts))


def verdicts(ran: list[core.Ran]) -> Iterator[str]:
    """Yield the sentences that name each backend's knee, and the cheapest backend."""
    for name in dict.fromkeys(one.api.name for one in ran):
        runs = [one for one in ran if one.api.name == name and one.tally.answered]
        if len(runs) > 1:
            yield from knee(sorted(runs, key=lambda one: one.most))
    yield from cheapest(ran)


def cheapest(ran: list[core.Ran]) -> Iterator[str]:
    """Yield the sentence that names the backend which used the least CPU time, if there are several."""
    known = [one for one in {one.api.name: one for one in ran}.values() if one.tally.answered >= 100]
    if len(known) > 1:  # CPU time of fewer is mostly chance
        cheap, *_, dear = sorted(known, key=lambda one: one.cpu)
        less = core.times(dear.cpu / cheap.cpu)
        yield f"{cheap.api.name} used the least CPU time per request, {less} less than {dear.api.name}."


def knee(ran: list[core.Ran]) -> Iterator[str]:
    """Yield the sentence that names the fewest calls in flight which bring nine tenths of the most answers."""
    name, fewest, most = ran[0].api.name, ran[0], ran[-1]
    best = max(one.rate for one in ran)
    at = next(one for one in ran if one.rate >= 0.9 * best)
    found = f"{at.rate:,.1f} answers/s at {at.most:,} in flight"
    found += f", {core.times(at.rate / fewest.rate)} those at {fewest.most:,}" if at is not fewest else ""
    if at.most == most.most:
        yield f"{name}: no knee yet: {found}; more may bring more."
    else:
        yield f"{name}: the knee is at {at.most:,} in flight: {found}, and {at.rate / best:.0%} of the most."
        many, few = (core.duration(one.tally.percentiles()["p50"] or 0.0) for one in (most, at))
        yield f"Half of its answers take up to {few}; with {most.most:,} in flight, up to {many}."
    if (asked := max((one.asked for one in ran if isinstance(one.asked, int)), default=0)) > most.most:
        yield f"{name}: no more than {most.most:,} were ever in flight; for {asked:,} give more prompts."
