"""--compare: the ways of sending the prompts side by side, for each backend named, as a table with a sentence.

Several numbers of calls after -c make it a sweep, whose sentences are in sweep.py.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

from . import core
from .progress import shown
from .ran import cpu, rate, times, title
from .tally import Tally
from .text import answer_of, cell, check_stdout

loading = core.sibling("backends", "loading")
console = core.sibling("backends", "console")
RARE = "p99 ms", "CPU ms", "p90 ms", "sum s"


def add_arguments(option: Callable[..., Any]) -> None:
    """Add nothing: the flag is the core's."""


def create(args: argparse.Namespace) -> None:
    """Nothing is to be checked: the core calls `compare`."""


async def compare(args: argparse.Namespace) -> int:
    """Run the prompts with each of so many calls in flight, with each backend; print who won."""
    check_stdout()
    sweep = len(args.calls) > 1
    levels: list[int | str] = args.calls if sweep else [1, args.calls[0]]
    ran: list[core.Ran] = []
    deadline = args.deadline or math.inf
    end = time.monotonic() + deadline
    apis = [core.sibling("backends", "loading").make_api(args, name) for name in args.backends]
    prompts = list(loading.checked(loading.prompts_of(args, args.limit), apis[0]))
    for api, calls in itertools.product(apis, levels):
        args.deadline = min(args.deadline, max(0.001, end - time.monotonic())) if args.deadline else None
        ran.append(await measure(args, api, calls, prompts))
        if (reason := ran[-1].run.stopped) is not None:
            print(*table(ran, console.columns()), sep="\n")
            if reason.kind == "deadline":  # of all runs together
                reason = core.PromptError("deadline", f"the deadline of {core.duration(deadline)} is over", "stop")
            args.facts["verdicts"] = []
            status: int
            status, files = console.tell_report(ran, 130 if reason.kind == "interrupted" else 3)
            console.say(*files)
            console.say_stopped(reason, args)
            return status
    ways = () if sweep else zip(ran, ("Sequential", "Concurrent"), strict=False)  # of the first backend
    width = console.columns()
    told = [as_in_the_article(one, way, min(width, 80)) for one, way in ways]
    judge = core.sibling("extras", "sweep", "a sweep").verdicts if sweep else verdicts
    said = args.facts["verdicts"] = [*judge(ran), *cheapest(ran)]
    won = (line for sentence in said for line in console.wrapped(sentence, width))
    for lines in [*told, table(ran, width), won]:
        print(*lines, "", sep="\n")
    for one in ran:
        console.say(*(f"{title(one)}: {warning}" for warning in one.tally.warnings()))
    status, files = console.tell_report(ran, int(any(one.tally.failed for one in ran)))
    console.say(*([] if args.quiet else files))
    return status


async def measure(args: argparse.Namespace, api: Any, calls: int | str, prompts: list[core.Prompt]) -> core.Ran:
    """Do one run of the comparison; the first call, which loads and connects everything, is before the clock."""
    run = core.sibling("backends", "loading").make_run(args, api, calls)
    run.first = prompts[0]
    with core.sibling("backends", "interrupts").interruptible(run):
        async with run:
            await run.answer(prompts[0])
            ran = core.Ran(api, run, calls, Tally(api.model_of))

            def note(result: core.Result) -> None:
                ran.tally.add(result)
                if result.prompt.number < 3:
                    text = result.error.message if result.error else cell(answer_of(result))
                    ran.tally.texts[result.prompt.number] = text

            with contextlib.nullcontext() if args.quiet else shown(args, ran, None, len(prompts)):
                await (core.sequentially if calls == 1 else core.concurrently)(run, iter(prompts), note)
                ran.tally.stop()
    return ran


def as_in_the_article(ran: core.Ran, way: str, width: int) -> Iterator[str]:
    """Yield the first results of a run, in so many columns, and its time."""
    yield f"{way} results ({ran.api.name}):"
    yield from (f"  {number + 1}. {core.short(text, width - 6)}" for number, text in sorted(ran.tally.texts.items()))
    if (rest := ran.tally.answered + ran.tally.failed - len(ran.tally.texts)) > 0:
        yield f"  ... and {rest:,} more"
    yield f"{way} time: {ran.tally.wall:.2f} seconds"


def table(ran: list[core.Ran], width: int) -> Iterator[str]:
    """Yield the lines of the comparison, aligned, one unit a column; '-' for what cannot be known.

    On a terminal of less than 80 columns the figures of RARE are left out, the first ones first, until a line fits.
    """
    rows = [["backend", "-c", "wall s", "sum s", "req/s", "CPU ms", "p50 ms", "p90 ms", "p99 ms", "failed"]]
    for one in ran:
        tally = one.tally
        spread = [f"{1000 * value:,.0f}" if value is not None else "-" for value in tally.percentiles().values()]
        figures = [f"{tally.wall:.2f}", f"{tally.latency:.2f}", f"{rate(one):,.1f}", f"{1000 * cpu(one):.2f}", *spread]
        rows.append([core.short(one.api.name, 20), str(one.asked), *figures, str(tally.failed)])
    columns = list(zip(*rows, strict=True))
    for rare in RARE:
        if width < 80 and sum(2 + max(map(len, column)) for column in columns) - 2 > width:
            columns = [column for column in columns if column[0] != rare]
    first, *widths = [max(map(len, column)) for column in columns]
    for name, *figures in zip(*columns, strict=True):
        yield "  ".join([name.ljust(first), *map(str.rjust, figures, widths)])


def verdicts(ran: list[core.Ran]) -> Iterator[str]:
    """Yield the sentences that say which way was faster, with each backend."""
    for name in dict.fromkeys(one.api.name for one in ran):
        runs = [one for one in ran if one.api.name == name and one.tally.answered]
        if len(runs) == 2:
            slow, fast = (one.tally.wall for one in runs)
            won = f"ran {times(slow / fast)} faster than" if slow >= 1.05 * fast else "was no faster than"
            yield f"{name}: concurrent {won} sequential ({core.duration(fast)}, {core.duration(slow)})."


def cheapest(ran: list[core.Ran]) -> Iterator[str]:
    """Yield the sentence that names the backend which used the least CPU time, if there are several."""
    known = [one for one in {one.api.name: one for one in ran}.values() if one.tally.answered >= 100]
    if len(known) > 1:  # CPU time of fewer is mostly chance
        cheap, *_, dear = sorted(known, key=cpu)
        less = times(cpu(dear) / cpu(cheap))
        yield f"{cheap.api.name} used the least CPU time per request, {less} less than {dear.api.name}."
