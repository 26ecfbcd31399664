"""What a finished run comes to, for the extras that show several: its rate, its CPU time and a name for it."""

from __future__ import annotations

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
