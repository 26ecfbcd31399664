"""--report FILE.json: all that the report says, and the numbers behind it, for a program.

Names stay and mean the same as long as `report`, its version, is 1; times are in seconds, null is what cannot be known.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import platform
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

from . import core, named
from .files import replacing
from .ran import cpu, rate
from .tally import WAITS, Tally

hint = core.sibling("backends", "hints").hint
REPORT_VERSION = 1  # of the form of --report; it changes where a name goes or means something else
OPTIONAL = (
    "aiohttp", "distributed", "httpx2", "jsonschema", "matplotlib", "openai", "orjson", "tiktoken", "tqdm", "uvloop",
)  # fmt: skip


def add_arguments(option: Callable[..., Any]) -> None:
    """Add the flag."""
    option("--report", metavar="FILE.json", help="write the report as JSON, with the numbers behind it")


def create(args: argparse.Namespace) -> Report | None:
    """Return what writes the report."""
    return Report(args) if args.report else None


class Report:
    """The report as a file."""

    def __init__(self, args: argparse.Namespace) -> None:
        if not args.report.lower().endswith(".json"):
            raise core.UsageError(f"--report {args.report}: the name of a report ends in .json")
        args.writes.append(("--report", args.report))
        self._args = args

    def report(self, ran: list[core.Ran], status: int) -> Iterator[str]:
        """Write it, and yield where it is."""
        with core.sibling("backends", "keys").PublicEnvironment(self._args.api_key_env):  # platform asks uname
            text = json.dumps(self._facts(ran, status), indent=2, ensure_ascii=False)
        text = re.sub(r"\[\s+([\d.e-]+),\s+(\d+)\s+\]", r"[\1, \2]", text)  # the histogram's pairs, each on a line
        try:
            with replacing(self._args.report, self._args.journal) as file:
                file.write(f"{text}\n".encode("utf-8", "replace"))
        except OSError as failure:
            raise core.disk_error(self._args.report, failure) from None
        yield f"report in {self._args.report}"

    def _facts(self, ran: list[core.Ran], status: int) -> dict[str, Any]:
        args, reason, keys = self._args, ran[-1].run.stopped, core.sibling("backends", "keys")
        return {
            "report": REPORT_VERSION,
            "program": f"{core.PROGRAM} {core.__version__}",
            "python": platform.python_version(),
            "platform": platform.platform(),
            "picture": getattr(args, "plot", None),
            "libraries": {name: importlib.metadata.version(name) for name in OPTIONAL if name in sys.modules},
            "command": [ran[-1].api.conceal(keys.without_secrets(word)) for word in args.argv],
            "input": args.name,
            "exit_status": status,
            "stopped": reason and reason.error._asdict() | {"hint": hint(reason.error) or None},
            **kept(ran[-1].run.journal),
            **args.facts,
            "runs": [self._figures(one) for one in ran],
        }

    def _figures(self, ran: core.Ran) -> dict[str, Any]:
        prices, budget = named(ran.run, "prices"), named(ran.run, "budget")
        costs = prices.as_dict(ran) if prices else {}
        return figures(ran) | costs | {"budget": budget and budget.as_dict()}


def kept(sink: Any) -> dict[str, Any]:
    """Return where the results are, and how many earlier runs have left; {} if they are kept nowhere."""
    if sink is None:
        return {}
    path = str(sink.path) if sink.path else None
    return {"results": path, "table": None, "kept": sink.kept, "kept_failed": len(sink.kept_errors)}


def counted(tally: Tally) -> dict[str, Any]:
    """Return what was counted of a run; times are in seconds."""
    names = ("in", "out", "cached", "reasoning", "cache_written")
    return {
        "wall_seconds": tally.wall,
        "cpu_seconds": tally.cpu,
        "answered": tally.answered,
        "failed": tally.failed,
        "attempts": tally.attempts,
        "latency_sum_seconds": tally.latency,
        "latency_seconds": tally.percentiles(),
        "latency_counts": [[math.exp(step / 1000), count] for step, count in sorted(tally.latencies.items())],
        "waited_seconds": {name: getattr(tally, name) for name in WAITS},
        "tokens": dict(zip(names, tally.tokens, strict=True)) | {"in_failed_attempts": tally.wasted},
        "answers_without_usage": tally.silent,
        "lost_calls": tally.unanswered,
        "errors": [
            {**error._asdict(), "count": count, "hint": hint(error) or None} for error, count in tally.failures()
        ],
        "ended_by": dict(tally.marked),
    }


def figures(ran: core.Ran) -> dict[str, Any]:
    """Return the figures of a run; docs/results.md says what they mean."""
    limiter = ran.run.limiter
    return {
        "backend": ran.api.name,
        "base_url": ran.api.base_url,
        "model": ran.api.params.get("model") or ran.api.model or core.DEFAULT_MODEL,
        "endpoint": ran.api.endpoint,
        "concurrency": ran.asked,
        "most_in_flight": ran.run.most_in_flight,
        "answers_a_second": rate(ran),
        "cpu_seconds_a_prompt": cpu(ran),
        **counted(ran.tally),
        "limits": limiter.learned(),
        "limits_a_minute": {q.name: 60 * q.limit for q in (limiter.requests, limiter.tokens) if q.source},
    }
