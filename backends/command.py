"""The command: streams, log and signals of its process, what it is to do, and what each failure is called at the end.

The main job itself, `answer_file`, is the core's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import io
import logging
import os
import sys
from collections.abc import Callable

from . import core
from .console import ErrorLog, say, say_stopped, silence
from .interrupts import restored
from .loading import raised_in
from .options import parse


def main(argv: list[str] | None) -> int:
    """Run the command line; return the exit status. With arguments, the process is left as it was."""
    with restored(core.log) if argv is not None else contextlib.nullcontext():
        sound_streams()
        handler = ErrorLog()
        core.log.addHandler(handler)
        try:
            return guarded(argv)
        finally:
            core.log.removeHandler(handler)
            try:
                sys.stderr.flush()
            except OSError:
                silence(sys.stderr)


def sound_streams() -> None:
    """Let no file of ours become what a closed stream was, and standard output take any text."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(number)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115 - started without one
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an answer may hold what the terminal cannot show


def guarded(argv: list[str] | None) -> int:
    """Do what the command line says; return the exit status, after one sentence for whatever goes wrong."""
    args = None
    try:
        with contextlib.ExitStack() as stack:
            args = parse(sys.argv[1:] if argv is None else argv, stack)
            status = work(args)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a failure still has a name
        return status
    except core.UsageError as problem:
        say(f"{core.PROGRAM}: {problem}")
        return 2
    except (KeyboardInterrupt, asyncio.CancelledError):
        say_stopped(core.PromptError("interrupted", "interrupted", "stop"), args)
        return 130
    except OSError as failure:
        silence(sys.stdout)
        if not isinstance(failure, BrokenPipeError):  # whose reader has had enough
            say(f"{core.PROGRAM}: cannot write the output: {failure.strerror or failure}")
        return 3
    except Exception as failure:
        known = isinstance(failure, core.PromptError)  # of an extra's `select`, or of a backend that cannot be opened
        if args is None or (not known and not (where := raised_in(failure, args))):
            raise
        say(f"{core.PROGRAM}: {failure if known else f'{where}: {core.in_short(failure)}'}")
        return 3 if args.begun else 2


def work(args: argparse.Namespace) -> int:
    """Do what an extra has to do instead of a run, else the comparison or the main job."""
    core.log.setLevel(logging.INFO if args.verbose else logging.WARNING)
    args.source = args.prompts
    if args.prompts == "-":
        args.source = args.stack.enter_context(core.sibling("extras", "inputs", core.STDIN).spooled())
    for instead in core.hooked(args.extras, "command"):
        if (status := ended(instead)) is not None:
            return status
    gc.freeze()  # what is there by now stays, and what a thousand calls in flight hold is in no circles:
    gc.set_threshold(50_000)  # for the collector to look at all of it again and again is a waste
    job = core.sibling("extras", "compare", "--compare").compare if args.compare else core.answer_file
    return int(core.run_loop(job(args)))


def ended(instead: Callable[[], int | None]) -> int | None:
    """Return the exit status of what an extra does instead of a run; None if the run is to go on.

    Raises UsageError for what it raises, but OSError if standard output takes no more.
    """
    full = None
    with core.blaming(instead):
        try:
            status = instead()
            return None if status is None else int(status)
        except OSError as failure:
            if failure.filename is not None:
                raise
            full = failure
    raise full
