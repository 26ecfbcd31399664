"""The progress of a run on standard error, as long as it goes on and nobody has asked for quiet."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import itertools
import re
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

from . import blaming, call_hook, core
from .reading import BROKEN, open_input, reader_of, sound_lines

console = core.sibling("backends", "console")


@contextlib.contextmanager
def shown(args: argparse.Namespace, ran: core.Ran, sink: Any, total: int | None = None) -> Iterator[None]:
    """Show the progress of a run, of so many prompts or those of the input, whose results go into the sink."""
    if sink and args.output == "-" and sys.stdout.isatty():  # the answers themselves are the progress
        yield
        return
    progress = Progress(total or count_prompts(args), ran, sink)
    try:
        yield
    finally:
        progress.close()


class Progress:
    """A bar on a terminal (tqdm's where it is installed), elsewhere a line every few seconds."""

    EVERY = 5.0  # seconds between lines
    BAR, SPARE = 8, 9  # columns of tqdm's bar at its smallest, with "100%|" and "| "; those that it has if it can
    NOTEBOOK = 100  # columns

    def __init__(self, total: int | None, ran: core.Ran, sink: Any) -> None:
        self._total, self._ran, self._run, self._sink, self._tally = total, ran, ran.run, sink, ran.tally
        self._terminal, self._notebook = console.obeys(sys.stderr), "ipykernel" in sys.modules
        self._bar: Any = None
        self._timer: asyncio.TimerHandle | None = None
        self._began, self._last = time.monotonic(), (time.monotonic(), 0)
        if self._terminal or self._notebook:
            with contextlib.suppress(ImportError), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that ipywidgets would make it prettier
                tqdm = importlib.import_module("tqdm.auto" if self._notebook else "tqdm").tqdm
                form = {"bar_format": "{l_bar}{bar}|", "leave": self._notebook}
                self._bar = tqdm(total=total, file=sys.stderr, **form)
        self._tick()

    def _tick(self) -> None:
        """Write what there is to say, and set the timer for the next time."""
        if self._timer is not None:
            self._timer.cancel()
        kept = self._sink.kept + len(self._sink.kept_errors) if self._sink else 0
        new = self._tally.answered + self._tally.failed
        now, lost = time.monotonic(), 0.0
        if self._run.limiter.away_since and new == self._last[1]:  # outage
            lost = now - self._last[0]
        self._began, self._last = self._began + lost, (now, new)
        columns = shutil.get_terminal_size().columns - 3  # so that the ^C of an interrupt breaks no line
        if self._bar is not None:
            self._draw(kept, new, self.NOTEBOOK if self._notebook else columns)
        elif self._terminal:
            self._write(f"\r{self._text(kept, new, columns)}\x1b[K")
        elif self._timer is not None:
            self._write(f"{self._text(kept, new)}\n")
        every = 0.2 if self._terminal or self._bar is not None else self.EVERY
        self._timer = asyncio.get_running_loop().call_later(every, self._tick)

    def _draw(self, kept: int, new: int, columns: int) -> None:
        """Draw tqdm's bar with the same text after it as where there is no tqdm."""
        text = self._text(kept, new, columns - self.BAR, self.SPARE)
        self._bar.n, self._bar.bar_format = kept + new, "{l_bar}{bar}| " + re.sub("([{}])", r"\1\1", text)
        if not self._notebook:
            self._bar.ncols = columns
        self._bar.refresh()

    def _text(self, kept: int, new: int, width: int = sys.maxsize, spare: int = 0) -> str:
        """Return what there is to say, in so many columns; if they are few, the parts of a high rank are left out."""
        (state, moving), done, total = held(self._run), kept + new, self._total
        reason, _, detail = state.partition(", ")
        hooks = core.hooked(self._run.extras, "status")
        ranked = [
            (0, f"{done:,}" + (f" of {total:,}" if total else "") + " done"),
            (1, f"{self._tally.failed:,} failed" if self._tally.failed else ""),
            (3 if moving else 4, f"{self._run.limiter.in_flight} in flight"),
            *((1, str(call_hook(self._run, hook, self._ran) or "")) for hook in hooks),
            (2 if moving else 1, reason),
            (4 if moving else 3, detail),
        ]
        if moving and new:
            rate = new / max(0.001, time.monotonic() - self._began)
            ranked += [(5, f"{rate:,.1f}/s")]
            ranked += [(1, f"{core.duration((total - done) / rate)} left")] if total and total > done else []
        return fitted([(rank, part) for rank, part in ranked if part], width, spare)

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.write(text)
            sys.stderr.flush()

    def close(self) -> None:
        """Clear the line; in a notebook leave the bar, which is green if nothing is open, else red."""
        if self._notebook and self._bar is not None:
            self._tick()
        if self._timer is not None:
            self._timer.cancel()
        if self._bar is not None:
            self._bar.close()
        elif self._timer is not None and self._terminal:
            self._write("\r\x1b[K")


def fitted(parts: list[tuple[int, str]], width: int, spare: int) -> str:
    """Join the parts, each with its rank; leave out the last of the highest rank until the text fits.

    As long as one has a rank above 1 the text has `spare` columns less.
    """
    while True:
        text, least = ", ".join(part for _, part in parts), max(rank for rank, _ in parts)
        if len(parts) == 1 or len(text) <= width - (spare if least > 1 else 0):
            return text[:width]
        del parts[max(place for place, (rank, _) in enumerate(parts) if rank == least)]


def count_prompts(args: argparse.Namespace) -> int | None:
    """Return about how many prompts there are, for the progress; None where that cannot be known beforehand."""
    selecting = [extra for extra in args.extras if hasattr(extra, "select")]
    if not all(hasattr(extra, "count") for extra in selecting):
        return None
    left: int | None = None
    with contextlib.suppress(core.UsageError, *BROKEN), open_input(args.source, args.name) as (file, form, _):
        reader = reader_of(form)
        found = (b"?\n" if isinstance(line, core.Error) else line for line in sound_lines(file, "", []))
        lines = reader.count(found) if reader else sum(not line.isspace() for line in found)
        left = min(lines, args.limit or lines)
    for extra in selecting:
        with blaming(extra.count):
            left = extra.count(left) if left is not None else None
    return left


def held(run: core.Run) -> tuple[str, bool]:
    """Return what holds the run back, in a few words, or '', and whether answers come all the same."""
    now = run.clock()
    if run.stopped:
        return "stopping", False
    if known := run.said:  # by a bulk backend: a Dask cluster, whose calls are seen here, or batches
        return known, run.api.clocked and known.partition(", ")[2][:8] in ("", "held by ")
    if known := run.limiter.state():
        return str(known), run.limiter.away_since is None and run.limiter.pause_end <= now
    if not run.calls and run.backing_off:
        wait = core.duration(max(0.0, min(run.backing_off.values()) - now))
        return f"{len(run.backing_off)} waiting, {wait} to the next attempt", False
    silence = now - max([run.answered_at, *itertools.islice((call.started for call in run.calls.values()), 1)])
    late = run.calls and silence > max(5, run.patience.late)
    return (f"no answer for {core.duration(silence)}", False) if late else ("", True)
