"""One warning if the server's list of models says that the model has less than 90 days left.

OpenAI's has a `shutdown_date` (https://platform.openai.com/docs/api-reference/models). Best effort: errors are ignored,
and the run never waits for it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
from collections.abc import AsyncIterator, Callable
from typing import Any

from . import core


def add_arguments(option: Callable[..., Any]) -> None:
    """Add nothing: it is part of every run."""


def create(args: argparse.Namespace) -> Shutdown:
    """Return the extra."""
    return Shutdown()


class Shutdown:
    """A look at the list of models beside the run; once for a comparison."""

    def __init__(self) -> None:
        self._begun = False

    @contextlib.asynccontextmanager
    async def session(self, run: core.Run) -> AsyncIterator[None]:
        """Look up the model while the run goes on."""
        if self._begun or not hasattr(run.api, "query"):
            yield
            return
        self._begun = True
        look = asyncio.ensure_future(warn_of_shutdown(run))
        try:
            yield
        finally:
            look.cancel()


async def look_up(run: core.Run, path: str) -> Any:
    """Return the document at a path of the API: beside the run, outside its limits, once. Raises what a call raises."""
    return (await run.call(core.Prompt(0, None, path=path))).extra["reply"]


async def warn_of_shutdown(run: core.Run) -> None:
    """Warn if the model of the first prompt is to be shut down within 90 days."""
    model = run.api.model_of(run.first)
    with contextlib.suppress(Exception):
        listed = (await look_up(run, f"/models{run.api.query}"))["data"]
        date = next(entry["shutdown_date"] for entry in listed if entry["id"] == model and entry["shutdown_date"])
        left = (datetime.date.fromisoformat(date) - datetime.date.today()).days
        when = f"will be shut down in {core.plural(left, 'day')}, on" if left > 0 else "was to be shut down on"
        if left <= 90:
            core.log.warning("%s %s %s: choose another model (-m)", model, when, date)
