"""Signals (Ctrl-C, SIGTERM, SIGHUP), and the process-wide settings that a command changes and puts back.

The first signal lets the calls in flight finish; the second ends the command at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import itertools
import logging
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

from . import core
from .console import say

resource: Any = None
with contextlib.suppress(ImportError):  # Windows has none
    import resource

HELD_UP = 0.5  # seconds within which an event loop that is not blocked handles a signal


@contextlib.contextmanager
def interruptible(run: core.Run) -> Iterator[None]:
    """Let the first Ctrl-C (SIGTERM, SIGHUP) stop the run in good order, and the second one at once.

    The second one also works while the event loop is blocked: by a slow input, or a user's function.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    presses, interrupted = itertools.count(1), core.PromptError("interrupted", "interrupted", "stop")
    unheard: list[float] = []  # when the first signal came that the event loop has not handled yet

    def signalled(*_: Any) -> None:
        if unheard and time.monotonic() > unheard[0] + HELD_UP:
            run.stop(interrupted)
            raise KeyboardInterrupt  # within whatever blocks the event loop
        unheard.append(time.monotonic())
        loop.call_soon_threadsafe(interrupt)

    def interrupt() -> None:
        unheard.clear()
        if next(presses) > 1:
            task.cancel()
            return
        run.stop(interrupted)
        calls = f"{core.plural(run.limiter.in_flight, 'call')} in flight may finish; interrupt again to stop at once"
        say(f"\nstopping: {run.api.parting or calls}")

    with contextlib.ExitStack() as stack:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # nohup
                with contextlib.suppress(ValueError):  # not in the main thread
                    before = signal.signal(number, signalled)
                    stack.callback(signal.signal, number, before)
        yield


@contextlib.contextmanager
def restored(log: logging.Logger) -> Iterator[None]:
    """Restore, at the end, what a command changes in a process that outlives it."""
    level, threshold, frozen = log.level, gc.get_threshold(), gc.get_freeze_count()
    stdout, stderr = sys.stdout, sys.stderr
    errors = getattr(stdout, "errors", None)
    files = resource.getrlimit(resource.RLIMIT_NOFILE) if resource else None
    try:
        yield
    finally:
        log.setLevel(level)
        gc.set_threshold(*threshold)
        if not frozen:
            gc.unfreeze()
        if resource and files:
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (files[0], resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        sys.stdout, sys.stderr = stdout, stderr
        if isinstance(stdout, io.TextIOWrapper) and errors:
            stdout.reconfigure(errors=errors)
