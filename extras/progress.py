"""The progress of a run on standard error, as long as it goes on and nobody has asked for quiet."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import itertools
import shutil
import sys
import time
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

    def __init__(self, total: int | None, ran: core.Ran, sink: Any) -> None:
        self._total, self._ran, self._run, self._sink, self._tally = total, ran, ran.run, sink, ran.tally
        self._terminal = console.obeys(sys.stderr)
        self._bar: Any = None
        self._timer: asyncio.TimerHandle | None = None
        self._began, self._last = time.monotonic(), (time.monotonic(), 0)
        notebook = "ipykernel" in sys.modules
        if self._terminal or notebook:
            with contextlib.suppress(ImportError):
                tqdm = importlib.import_module("tqdm.auto" if notebook else "tqdm").tqdm
                self._bar = tqdm(total=total, unit=" prompts", file=sys.stderr, leave=False)
        self._tick()

    def _tick(self) -> None:
        """Write what there is to say, and set the timer for the next time."""
        kept = self._sink.kept + len(self._sink.kept_errors) if self._sink else 0
        new = self._tally.answered + self._tally.failed
        now, lost = time.monotonic(), 0.0
        if self._run.limiter.away_since and new == self._last[1]:  # outage
            lost = now - self._last[0]
        self._began, self._last = self._began + lost, (now, new)
        if self._bar is not None:
            self._bar.start_t += lost
            self._bar.initial, self._bar.n = kept, kept + new
            self._bar.bar_format = self._form()
            self._bar.set_postfix_str(", ".join(self._state()))
        elif self._terminal:
            self._write(f"\r{self._text(kept, new, shutil.get_terminal_size().columns - 1)}\x1b[K")
        elif self._timer is not None:
            self._write(f"{self._text(kept, new)}\n")
        every = 0.2 if self._terminal or self._bar is not None else self.EVERY
        self._timer = asyncio.get_running_loop().call_later(every, self._tick)

    def _form(self) -> str | None:
        """Return what tqdm's bar shows besides itself: no time left in an outage, no rate in few columns."""
        if held(self._run):
            return "{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix}"
        narrow = self._total and shutil.get_terminal_size().columns < 80
        return "{l_bar}{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}" if narrow else None

    def _text(self, kept: int, new: int, width: int = sys.maxsize) -> str:
        """Return what there is to say, in so many columns: if they are few, without the rate, then the calls."""
        done, total, state = kept + new, self._total, self._state()
        parts, rare = [f"{done:,}" + (f" of {total:,}" if total else "") + " done", *state], [f"{self._calls()}"]
        if not held(self._run):
            rate = new / max(0.001, time.monotonic() - self._began)
            parts += [f"{rate:,.1f}/s"]
            parts += [f"{core.duration(max(0, total - done) / rate)} left"] if total and rate > 0 else []
            rare.insert(0, f"{rate:,.1f}/s")
        while rare and len(", ".join(parts)) > width:
            parts.remove(rare.pop(0))
        return ", ".join(parts)[:width]

    def _calls(self) -> str:
        return f"{self._run.limiter.in_flight} in flight"

    def _state(self) -> list[str]:
        failed = f"{self._tally.failed:,} failed" if self._tally.failed else ""
        hooks = core.hooked(self._run.extras, "status")
        told = [str(call_hook(self._run, hook, self._ran) or "") for hook in hooks]
        return [*filter(None, [failed, self._calls(), *told, held(self._run)])]

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.write(text)
            sys.stderr.flush()

    def close(self) -> None:
        """Clear the line."""
        if self._timer is not None:
            self._timer.cancel()
        if self._bar is not None:
            self._bar.close()
        elif self._timer is not None and self._terminal:
            self._write("\r\x1b[K")


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


def held(run: core.Run) -> str:
    """Return what holds the run back, in a few words, or ''."""
    if known := "stopping" if run.stopped else run.said or run.limiter.state():
        return str(known)
    now = run.clock()
    if not run.calls and run.backing_off:
        wait = core.duration(max(0.0, min(run.backing_off.values()) - now))
        return f"{len(run.backing_off)} waiting, {wait} to the next attempt"
    silence = now - max([run.answered_at, *itertools.islice((call.started for call in run.calls.values()), 1)])
    return f"no answer for {core.duration(silence)}" if run.calls and silence > max(5, run.patience.late) else ""
