"""What a finished run and an answer come to where they are shown: rate, CPU time and a name; a text for a cell."""

from __future__ import annotations

import sys
from typing import Any

from . import core


def rate(ran: core.Ran) -> float:
    """Return the answers a second."""
    return ran.tally.answered / ran.tally.wall if ran.tally.wall else 0.0


def cpu(ran: core.Ran) -> float:
    """Return the CPU time a prompt, in seconds."""
    return ran.tally.cpu / max(1, ran.tally.answered + ran.tally.failed)


def title(ran: core.Ran) -> str:
    """Return what a picture calls it."""
    auto = " (auto)" if ran.asked == "auto" else ""
    return f"{ran.api.name}, {'one at a time' if ran.asked == 1 else f'{ran.most:,} in flight{auto}'}"


NO_TEXTS = ("texts", "embedding", "reply")  # where an answer is that is not one text


def answer_of(result: core.Result) -> Any:
    """Return the answer: a text, or else all of several, the vectors, or the whole reply."""
    return next((result.extra[name] for name in NO_TEXTS if name in result.extra), result.text)


def cell(value: Any) -> str:
    """Return what stands in a table for a value: a text as it is, anything else as JSON."""
    return value if isinstance(value, str) else "" if value is None else core.to_line(value).decode().rstrip("\n")


def check_stdout() -> None:
    """Raise UsageError where there is no standard output."""
    if sys.stdout is None:
        raise core.UsageError("standard output is closed; name a file with -o")
