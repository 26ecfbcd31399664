"""Servers with limits that nobody tells, as options of the stand-in: data for real time (torture) and for simulated.

A Case says what the server is, how many prompts it gets, how long a client that knew it would take, and what is asked
of one that does not. The seconds are scaled so that the ideal is under 40.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Ideal = Callable[[Sequence[float], float], float]  # from the latencies in the prompts' order and the server's clock


@dataclass(frozen=True)
class Case:
    """A server, and what is asked of a run that is told nothing about it."""

    name: str
    server: Mapping[str, Any]
    prompts: int
    ideal: Ideal
    within: float = 1.12  # the span from the first request to the last answer / ideal, at most
    calls: float = 1.06  # a prompt, at most
    refused: float = 0.06  # share of the calls, at most
    pause: float = 0.0  # seconds that it may wait once, beyond the ideal
    flags: Sequence[str] = field(default=())  # of the command; all else is the default


def in_slots(count: int) -> Ideal:
    """So many calls at a time, without a gap."""

    def ideal(latencies: Sequence[float], clock: float) -> float:
        free = [0.0] * count
        for latency in latencies:
            heapq.heapreplace(free, free[0] + latency)
        return max(free)

    return ideal


def at_rate(rate: float, burst: float) -> Ideal:
    """So many at once, and then so many a second, each with its own latency."""
    return lambda latencies, clock: max(
        max(0.0, number - burst) / rate + latency for number, latency in enumerate(latencies, 1))


def in_windows(most: int, seconds: float, aligned: bool = False) -> Ideal:
    """So many at once every so many seconds; `aligned`: the first stretch has begun before."""

    def ideal(latencies: Sequence[float], clock: float) -> float:
        first = seconds - clock % seconds if aligned else seconds
        starts = ((number // most - 1) * seconds + first if number >= most else 0.0 for number in range(len(latencies)))
        return max(start + latency for start, latency in zip(starts, latencies, strict=True))

    return ideal


def in_weighted_windows(most: int, seconds: float) -> Ideal:
    """So many at once, none in the rest of that window, and then the rate: the best that HAProxy's estimate allows."""
    return lambda latencies, clock: max(
        (seconds + (number - most) / most * seconds if number > most else 0.0) + latency
        for number, latency in enumerate(latencies, 1))


def slots(count: int, prompts: int, latency: float, timeout: float) -> Case:
    """A server that works on so many at a time, queues the others, and works on for callers that hung up."""
    return Case(f"{count} slot{'s'[: count != 1]} of {latency:g} s, works on, --timeout {timeout:g}",
                {"knee": count, "work_on": True, "latency": latency, "sigma": 0.0}, prompts, in_slots(count),
                within=1.1, calls=1.05, refused=0.0, flags=("--timeout", f"{timeout:g}"))


def gate(rate: float, burst: int, status: int, prompts: int, **more: Any) -> Case:
    """A gate as nginx's limit_req; of the first calls, sent before anything is known, some are in vain."""
    refused = 0.06 + max(0, FIRST - 1 - burst) / prompts
    words = " with Retry-After" if "retry_after" in more else ""
    return Case(f"gate of {rate:g}/s, burst {burst}, {status}{words}",
                {"gate": rate, "gate_burst": burst, "reject_status": status, **more}, prompts, at_rate(rate, burst + 1),
                refused=refused, calls=1 / (1 - refused))


def window(most: int, seconds: float, kind: str, prompts: int, *tells: str, **more: Any) -> Case:
    """A window as HAProxy's, Express' or LiteLLM's."""
    name = f"{most} in {seconds:g} s, {kind}, " + (" and ".join(tells) or "no headers")
    name += ", refused ones count" if more.get("count_rejected") else ""
    ideal = in_weighted_windows(most, seconds) if kind == "weighted" else in_windows(most, seconds, kind == "fixed")
    options = {"window": (most, seconds), "window_kind": kind, "window_tells": tells}
    return Case(name, options | more, prompts, ideal, within=1.3)


FIRST = 16  # calls in flight at the start
PARALLEL = {"max_in_flight": 3, "latency": 1.25, "sigma": 0.0, "retry_after": 8.0}
SLOTS = [
    slots(1, 80, 0.35, 6),
    slots(1, 250, 0.1, 12),  # the default of 600 s and answers of 5 s, fifty times as fast
    slots(2, 120, 0.35, 6),
    slots(4, 240, 0.35, 6),
    slots(16, 640, 0.35, 6),
    Case("4 slots of 0.4 s behind a gateway that gives up after 2 s",
         {"knee": 4, "work_on": True, "gateway_timeout": 2.0, "latency": 0.4, "sigma": 0.0}, 240, in_slots(4),
         within=1.15, calls=1.05, refused=0.0),
]
GATES = [
    gate(6, 10, 503, 120),
    gate(6, 10, 429, 120),
    gate(20, 0, 429, 300),
    gate(200, 60, 503, 3000),
    gate(2, 1, 429, 40, retry_after=1.0),
]
WINDOWS = [
    window(40, 8, "weighted", 120, count_rejected=True),  # HAProxy's http_req_rate
    window(40, 8, "sliding", 120),
    window(100, 1, "sliding", 1500),
    window(40, 8, "fixed", 160),
    window(40, 8, "fixed", 160, "span", "retry-after"),
    window(40, 8, "fixed", 160, "date"),
]
CAPS = [
    Case("3 at once, else 429 with Retry-After 8 and LiteLLM's words",
         PARALLEL | {"reject_message": "Limit type: max_parallel_requests. Current limit: 3, Remaining: 0."}, 24,
         in_slots(3), calls=2.0, refused=0.5, pause=8.0),
    Case("3 at once, else 429 with Retry-After 8", PARALLEL, 24, in_slots(3), calls=2.0, refused=0.5, pause=8.0),
    Case("5 at once, else a page with 503", {"max_in_flight": 5, "reject_status": 503}, 250, in_slots(5), calls=1.1),
    Case("20 at once, else 529 with Retry-After 1",
         {"max_in_flight": 20, "reject_status": 529, "retry_after": 1.0}, 700, in_slots(20), pause=1.0),
]
GENEROUS = [
    Case("10,000/min told in headers, 2 s an answer", {"rpm": 10_000, "latency": 2.0, "sigma": 0.0}, 600,
         lambda latencies, clock: 2 * max(latencies), within=1.5, calls=1.0, refused=0.0),  # known after one answer
    Case("110 slots of 1.5 s, no headers", {"knee": 110, "work_on": True, "latency": 1.5, "sigma": 0.0}, 300,
         in_slots(110), within=1.25, calls=1.05, refused=0.0),
]
ALL = [*SLOTS, *GATES, *WINDOWS, *CAPS, *GENEROUS]
