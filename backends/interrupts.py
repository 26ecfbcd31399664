"""Ctrl-C, SIGTERM and SIGHUP: the first one lets a command end in good order, the second at once."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import time
from collections.abc import Iterator
from typing import Any

from . import core

HELD_UP = 0.5  # seconds in which an event loop that works hears a signal


@contextlib.contextmanager
def interruptible(run: core.Run) -> Iterator[None]:
    """Let the first Ctrl-C (SIGTERM, SIGHUP) stop the run in good order, and the second at once.

    The second does so too where the event loop is held up: by an input that takes long to read, by somebody's function.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    presses, interrupted = itertools.count(1), core.PromptError("interrupted", "interrupted", "stop")
    unheard: list[float] = []  # when the first signal came that the event loop has not heard of yet

    def signalled(*_: Any) -> None:
        if unheard and time.monotonic() > unheard[0] + HELD_UP:
            run.stop(interrupted)
            raise KeyboardInterrupt  # from within whatever it is that keeps the event loop
        unheard.append(time.monotonic())
        loop.call_soon_threadsafe(interrupt)

    def interrupt() -> None:
        unheard.clear()
        if next(presses) > 1:
            task.cancel()
            return
        run.stop(interrupted)
        calls = f"{core.plural(run.limiter.in_flight, 'call')} in flight may finish; once more to stop at once"
        core.say_error(f"\nstopping: {run.api.parting or calls}")

    with contextlib.ExitStack() as stack:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # nohup
                with contextlib.suppress(ValueError):  # not in the main thread
                    before = signal.signal(number, signalled)
                    stack.callback(signal.signal, number, before)
        yield
