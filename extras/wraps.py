"""The extras' `wrap` around each attempt: composed once, ended by the deadline, and named where one raises."""

from __future__ import annotations

import asyncio
import traceback
from typing import Any

from . import blaming, core, discreet, extra_failure, extra_name


def wrapped(run: core.Run, attempt: core.Ask, without: str = "") -> core.Ask:
    """Return the attempt with what the run's extras wrap around it, the first one outermost; leave out that one."""
    extras = [extra for extra in run.extras if hasattr(extra, "wrap") and extra_name(extra) != without]
    for extra in reversed(extras):
        with blaming(extra.wrap):
            attempt = extra.wrap(attempt)
    return endable(run, attempt) if extras else attempt


def endable(run: core.Run, attempt: core.Ask) -> core.Ask:
    """Let the deadline end what the extras do after a call, as it ends the call itself."""

    async def call(prompt: core.Prompt) -> core.Reply:
        task = asyncio.current_task()
        assert task is not None
        run.wrapping.add(task)
        run.start_more()  # an extra may wait, or call somebody else
        cancelled = task.cancelling()
        try:
            return await attempt(prompt)
        except asyncio.CancelledError:
            if task in run.wrapping or task.uncancel() > cancelled:
                raise
            failure = core.PromptError("deadline", "the deadline came before the answer was checked", "stop")
            failure.keep = run.open[prompt.number].reply
            raise failure from None
        finally:
            run.wrapping.discard(task)

    return call


def broken(run: core.Run, result: core.Result, reply: core.Reply | None, failure: Exception) -> core.PromptError:
    """Return the error for what an extra did not mean to raise; a reply that it came after was paid, and is kept."""
    hook = guilty(run.wrapped_by, failure) if run.wrapped_by else run.answer
    error: core.PromptError = discreet(run, extra_failure(hook, failure))
    if reply:
        error.keep = reply
        result.take(reply)
    return error


def guilty(wraps: list[Any], failure: Exception) -> Any:
    """Return the wrap of the extra that raised it: the innermost that it came through."""
    files = {wrap.__module__: wrap for wrap in wraps}
    came = [frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(failure.__traceback__)]
    return next((files[name] for name in reversed(came) if name in files), wraps[-1])
