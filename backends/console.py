"""What a command says on standard error: messages, warnings, the extras' part of the report, how to go on."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from typing import IO, Any

from . import core

UNIT = re.compile(r"(\d) (ms|s|min|h)\b")  # as in `core.duration`
CONTROLS = re.compile(r"[\0-\t\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """Return the text with its control characters escaped as in JSON: no terminal obeys them; line ends stay."""
    return CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def obeys(stream: IO[str]) -> bool:
    """Tell whether the stream is a terminal that can clear a line; Emacs' and a serial one cannot."""
    return stream.isatty() and (sys.platform == "win32" or os.environ.get("TERM") not in (None, "", "dumb"))


def say(*lines: str, start: str = "", indent: str = "", width: int | None = None, wrap: bool = True) -> None:
    """Print lines on standard error, with nothing in them that a terminal would obey but `start`.

    They are wrapped to a terminal's width, elsewhere to `width`, if one is given.
    """
    width = shutil.get_terminal_size().columns if sys.stderr.isatty() else width
    width = max(20, width - 3) if wrap and width else sys.maxsize
    with contextlib.suppress(OSError):
        for line in "\n".join(lines).split("\n") if lines else ():
            print(start + "\n  ".join(wrapped(indent + visible(line), width)), file=sys.stderr)


def wrapped(line: str, width: int) -> list[str]:
    """Return the line in parts of so many columns; a longer word or address stays whole, a number keeps its unit."""
    indent = " " * (len(line) - len(line.lstrip()))
    whole = {"break_long_words": False, "break_on_hyphens": False}
    parts = textwrap.wrap(UNIT.sub("\\1\xa0\\2", line), width, subsequent_indent=indent, **whole)  # type: ignore[arg-type]
    return [part.replace("\xa0", " ") for part in parts] or [line]


def columns() -> int:
    """Return how wide a line on standard output may be: as the terminal, but 40 at least; 80 in a file or a pipe."""
    return max(40, shutil.get_terminal_size().columns) if sys.stdout.isatty() else 80


class ErrorLog(logging.Handler):
    """Log records on standard error, on a line of their own where there is a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record."""
        say(record.getMessage(), start="\r\x1b[K" if obeys(sys.stderr) else "")


def silence(stream: IO[str]) -> None:
    """Let what a stream still holds go nowhere: its reader takes no more, and Python would complain at its exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# ---- The end of a run ------------------------------------------------------------------------------------------


class Tally:
    """What the plain report is made of, counted as the results come. The one in extras/tally.py counts more."""

    def __init__(self) -> None:
        self.answered = self.failed = self.unwritten = self.hopeful = 0  # of these failures another run may have none
        self.first: core.Error | None = None  # failure
        self.wall, self._start = 0.0, time.monotonic()

    def stop(self) -> None:
        """Take the time."""
        self.wall = time.monotonic() - self._start

    def add(self, result: core.Result) -> None:
        """Count a result."""
        if result.done and result.error is not None:
            self.failed += 1
            self.note(result.error)
        else:
            self.answered += result.done

    def note(self, error: core.Error) -> None:
        """Take notice of a failure, maybe an earlier run's."""
        self.first = self.first or error
        self.hopeful += error.retryable

    def lines(self, ran: core.Ran) -> Iterator[str]:
        """Yield the lines of the report."""
        yield f"{self.answered:,} answered, {self.failed:,} failed in {core.duration(self.wall)}"
        if ran.run.journal.kept:
            yield f"{core.plural(ran.run.journal.kept, 'answer')} of an earlier run kept"

    def warnings(self) -> Iterator[str]:
        """Yield what has gone wrong."""
        if self.unwritten:
            yield f"{core.plural(self.unwritten, 'answer')} could not be written"
        if self.first:
            yield f"first failure: {self.first.type}: {self.first.message}"


def new_tally(api: Any) -> Any:
    """Return what counts the results of a run for its report."""
    return core.sibling("extras", "tally").Tally(api.model_of) if core.extras_folder() else Tally()


def tell_report(ran: list[core.Ran], status: int) -> tuple[int, list[str]]:
    """Let the extras write their files; return the exit status and the lines that they have for the report."""
    lines: list[str] = []
    for hook in core.hooked(ran[-1].run.extras, "report"):
        try:
            lines.extend(map(str, hook(ran, status) or ()))
        except Exception as failure:
            status = status or 3
            say(f"{core.PROGRAM}: {core.extras_folder().extra_failure(hook, failure)}")
    return status, lines


def say_next(args: argparse.Namespace, ran: core.Ran) -> None:
    """Say why the run was stopped, if it was, and the commands that one may want next."""
    tally, sink = ran.tally, ran.run.journal
    if ran.run.stopped is not None:
        say_stopped(ran.run.stopped, args)
    elif not args.quiet:
        failed = tally.failed + len(sink.kept_errors)
        retry = f"{tally.hopeful:,} of {core.plural(failed, 'failure')} may be temporary. Retry them with"
        if sink.path and tally.hopeful:
            args.next.insert(0, (retry, ["--retry-failed"], []))
        for text, more, less in args.next:
            say(f"{text}:", indent="  ")
            say(command_again(args.argv, True, *more, without=less), indent="    ", wrap=False)


def say_stopped(reason: core.PromptError, args: argparse.Namespace | None) -> None:
    """Say why the run was stopped, what to do and how to continue."""
    say(f"{core.PROGRAM}: {'' if reason.kind == 'interrupted' else 'stopped: '}{reason.error.message}")
    if advice := core.sibling("backends", "hints").hint(reason.error, reason.asked):
        say(f"-> {advice}", indent="  ")
    if reason.prompt:
        where = f" ({reason.prompt.where})" if reason.prompt.where else ""
        say(f"first seen at prompt {reason.prompt.id}{where}", indent="  ")
    if args and args.output != "-" and not args.compare:
        again = command_again(args.argv, args.begun)
        say(f"to continue: {again}", indent="  ", wrap=False)


def command_again(argv: list[str], begun: bool, *more: str, without: Sequence[str] = ()) -> str:
    """Return the command line that continues what this one began; not where a key stands in it, in a URL's query."""
    less = [*without, *["--overwrite"] * begun]  # what it has written is to be kept
    more = tuple(word for word in more if word not in argv)
    if any("?" in word and core.sibling("backends", "keys").without_secrets(word) != word for word in argv):
        changes = [f"without {word}" for word in less if word in argv] + ([f"with {' '.join(more)}"] if more else [])
        return ", ".join(["the same command again", *changes])
    name = os.path.basename(sys.executable)
    python = [name if shutil.which(name) == sys.executable else sys.executable] * sys.argv[0].endswith(".py")
    words = [*python, sys.argv[0], *(word for word in argv if word not in less), *more]
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)
