"""A sweep: --compare -c 1,4,16,64,auto measures each number of calls in flight, and names the knee.

The knee is the fewest calls in flight that bring nine tenths of the most answers.
"""

from __future__ import annotations

from collections.abc import Iterator

from . import core
from .ran import rate, times


def verdicts(ran: list[core.Ran]) -> Iterator[str]:
    """Yield the sentences that name each backend's knee."""
    for name in dict.fromkeys(one.api.name for one in ran):
        runs = [one for one in ran if one.api.name == name and one.tally.answered]
        if len(runs) > 1:
            yield from knee(sorted(runs, key=lambda one: one.run.most_in_flight))


def knee(ran: list[core.Ran]) -> Iterator[str]:
    """Yield the sentence that names the fewest calls in flight which bring nine tenths of the most answers."""
    name, fewest, most = ran[0].api.name, ran[0], ran[-1]
    best = max(rate(one) for one in ran)
    at = next(one for one in ran if rate(one) >= 0.9 * best)
    calls, least, highest = (one.run.most_in_flight for one in (at, fewest, most))
    found = f"{rate(at):,.1f} answers/s at {calls:,} in flight"
    found += f", {times(rate(at) / rate(fewest))} those at {least:,}" if at is not fewest else ""
    if calls == highest:
        yield f"{name}: no knee yet: {found}; more calls in flight may be faster."
    else:
        yield f"{name}: the knee is at {calls:,} in flight: {found}, and {rate(at) / best:.0%} of the highest rate."
        many, few = (core.duration(one.tally.percentiles()["p50"] or 0.0) for one in (most, at))
        yield f"Half of its answers take up to {few}; with {highest:,} in flight, up to {many}."
    if (asked := max((one.asked for one in ran if isinstance(one.asked, int)), default=0)) > highest:
        yield f"{name}: no more than {highest:,} were ever in flight; to reach {asked:,}, use more prompts."
