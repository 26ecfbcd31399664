"""What a finished run comes to, for the extras that show several: its rate, its CPU time and a name for it."""

from __future__ import annotations

from . import core


def rate(ran: core.Ran) -> float:
    """Return the answers a second."""
    return ran.tally.answered / ran.tally.wall if ran.tally.wall else 0.0


def cpu(ran: core.Ran) -> float:
    """Return the CPU time a prompt, in seconds."""
    return float(ran.tally.cpu / max(1, ran.tally.answered + ran.tally.failed))


def title(ran: core.Ran) -> str:
    """Return what a picture calls it."""
    auto = " (auto)" if ran.asked == "auto" else ""
    return f"{ran.api.name}, {'one at a time' if ran.asked == 1 else f'{ran.run.most_in_flight:,} in flight{auto}'}"


def times(ratio: float) -> str:
    """Return 'N times' with as many digits as mean something."""
    return f"{ratio:,.0f} times" if ratio >= 100 else f"{ratio:.1f} times"
