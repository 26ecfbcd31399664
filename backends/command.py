"""The command: streams, log and signals of its process, what it is to do, and what each failure is called at the end.

`answer_file` is the main job: it answers the prompts of a file with a run of the core.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import io
import logging
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from . import core
from .console import ErrorLog, new_tally, say, say_next, say_stopped, silence, tell_report
from .interrupts import interruptible, restored
from .loading import checked, make_api, make_run, prompts_of, raised_in
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
    job = core.sibling("extras", "compare", "--compare").compare if args.compare else answer_file
    return int(core.run_loop(job(args)))


def ended(instead: Callable[[], int | None]) -> int | None:
    """Return the exit status of what an extra does instead of a run; None if the run is to go on.

    Raises UsageError for what it raises, but OSError if standard output takes no more.
    """
    full = None
    with core.extras_folder().blaming(instead):
        try:
            status = instead()
            return None if status is None else int(status)
        except OSError as failure:
            if failure.filename is not None:
                raise
            full = failure
    raise full


# ---- The main job ----------------------------------------------------------------------------------------------


async def answer_file(args: Any) -> int:
    """Do the main job: answer the file's prompts, write the results, report; return the exit status."""
    api = make_api(args, args.backends[0])
    prompts = checked(prompts_of(args, args.limit), api)
    way, calls = (core.sequentially, 1) if args.sequential else (core.concurrently, args.calls[0])
    run = make_run(args, api, calls)
    sink = open_sink(args)
    sound = (prompt for prompt in prompts_of(args) if api.prepare(prompt).error is None)
    run.first, run.overwrites, run.whole = next(sound, core.Prompt(0, "")), args.overwrite, args.limit is None
    with interruptible(run):
        async with core.journaled(run, sink, prompts_of(args), args.name):
            ran = core.Ran(api, run, calls, new_tally(api))
            recorder = Recorder(args, ran, sink)
            shown = None if args.quiet else core.meanings("progress", "extras")
            try:
                with shown.shown(args, ran, sink) if shown else contextlib.nullcontext():
                    await way(run, sink.left(prompts), recorder)
            finally:
                recorder.close()
            ran.tally.stop()
    api.warn_of_input()
    return report(args, ran)


def open_sink(args: Any) -> Any:
    """Open what keeps or prints the results."""
    for check in core.hooked(args.extras, "check"):
        with core.extras_folder().blaming(check):
            check()
    if args.output == "-":
        return (args.printer or core.sibling("extras", "text", "-o -").standard_output)(args)
    return core.open_journal(pathlib.Path(args.journal), overwrite=args.overwrite, retry_failed=args.retry_failed)


class Recorder:
    """Keeps the results as they come, those of one turn of the event loop at once, and counts them."""

    def __init__(self, args: Any, ran: core.Ran, sink: Any) -> None:
        self._args, self._ran, self._sink = args, ran, sink
        self._listeners, ran.run.listeners = ran.run.listeners, []  # they hear of a result once it is kept
        self._results: list[core.Result] = []
        self._broken: Exception | None = None
        self._loop = asyncio.get_running_loop()

    def __call__(self, result: core.Result) -> None:
        if not self._results:
            self._loop.call_soon(self._flush)
        self._results.append(result)

    def _flush(self) -> None:
        results, self._results = self._results, []
        self._args.begun |= any(result.done for result in results)
        try:
            self._ran.tally.unwritten += core.keep(self._ran.run, self._sink, results)
        except Exception as failure:  # of a reader that has had enough, say
            self._broken = self._broken or failure
            self._ran.run.cut(core.PromptError("output", core.in_short(failure), "stop"))
        for result in results:
            self._ran.tally.add(result)
            for listener in self._listeners:
                core.extras_folder().call_hook(self._ran.run, listener, result)

    def close(self) -> None:
        """Keep what is left. Raises what the sink has raised."""
        self._flush()
        if self._broken:
            raise self._broken


def report(args: Any, ran: core.Ran) -> int:
    """Print the report and the warnings; return the exit status."""
    tally, reason, sink = ran.tally, ran.run.stopped, ran.run.journal
    for error in sink.kept_errors:
        tally.note(error)
    status = (130 if reason.kind == "interrupted" else 3) if reason else int(bool(tally.failed or sink.kept_errors))
    status, more = tell_report([ran], status)
    if not args.quiet:
        first, *lines = tally.lines(ran)
        say(first)
        results = sink.path and (tally.answered or tally.failed or sink.kept or sink.kept_errors)
        say(*lines, *more, *([f"results in {sink.path}"] if results else []), indent="  ", width=80)
    for warning in tally.warnings():
        say(warning, indent="  ")
    say_next(args, ran)
    return int(status)
