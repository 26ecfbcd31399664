"""Progress on standard error."""

import asyncio
import logging
import os
import sys

import pytest

import concurrent_prompts
from concurrent_prompts import Ran, Run
from concurrent_prompts.backends.console import ErrorLog
from concurrent_prompts.extras.progress import Progress
from concurrent_prompts.extras.tally import Tally
from tests.helpers import Terminal, in_rows


@in_rows("term", ["dumb", "", None, "xterm"])
async def test_a_terminal_that_cannot_redraw_a_line_gets_whole_lines(monkeypatch, term):
    monkeypatch.delenv("TERM", raising=False)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    if term is not None:
        monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(Progress, "EVERY", 0.001)
    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = Progress(3, Ran(None, Run(lambda prompt: None), 1, Tally()), None)
    while not sys.stderr.buffer.getvalue().count(b"3 done"):
        await asyncio.sleep(0)
    progress.close()
    ErrorLog().emit(logging.makeLogRecord({"msg": "noted"}))
    text = sys.stderr.buffer.getvalue().decode()
    if term == "xterm" or os.name == "nt":
        assert text.startswith("\r0 of 3 done") and text.endswith("\r\x1b[Knoted" + os.linesep)
    else:
        assert "\r" not in text and "\x1b" not in text and text.startswith("0 of 3 done, 0 in flight")
        assert text.endswith("in flight\nnoted\n")


class Costs:
    def status(self, ran):
        return "$0.0012"


@in_rows(("columns", "expected"), [
    (80, "100 of 200 done, 0 in flight, $0.0012, 10.0/s, 10.0 s left"),
    (60, "100 of 200 done, 0 in flight, $0.0012, 10.0 s left"),
    (50, "100 of 200 done, $0.0012, 10.0 s left"),
    (30, "100 of 200 done, $0.0012"),
    (20, "100 of 200 done"),
])  # fmt: skip
async def test_few_columns_keep_the_cost_and_the_time_that_is_left(monkeypatch, columns, expected):
    now, tally = [1000.0], Tally()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(concurrent_prompts.time, "monotonic", lambda: now[0])
    monkeypatch.setitem(sys.modules, "tqdm", None)
    progress = Progress(200, Ran(None, Run(lambda prompt: None, extras=[Costs()]), 1, tally), None)
    tally.answered, now[0] = 100, 1010.0
    progress._tick()
    progress.close()
    assert sys.stderr.buffer.getvalue().decode().split("\r")[-2] == f"{expected}\x1b[K"


@in_rows(("columns", "shown"), [
    (45, "100 of 200 done, $0.0012"),
    (50, "100 of 200 done, $0.0012, 10.0 s left"),
    (60, "100 of 200 done, $0.0012, 10.0 s left"),
    (80, "100 of 200 done, 0 in flight, $0.0012, 10.0/s, 10.0 s left"),
    (120, "100 of 200 done, 0 in flight, $0.0012, 10.0/s, 10.0 s left"),
])  # fmt: skip
async def test_so_does_tqdms_bar(monkeypatch, columns, shown):
    pytest.importorskip("tqdm")
    now, tally = [1000.0], Tally()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(concurrent_prompts.time, "monotonic", lambda: now[0])
    progress = Progress(200, Ran(None, Run(lambda prompt: None, extras=[Costs()]), 1, tally), None)
    tally.answered, now[0] = 100, 1010.0
    progress._tick()
    line = str(progress._bar)
    progress.close()
    assert line.startswith(f" 50%|{'█' if columns > 45 else ''}") and line.endswith(f"| {shown}")
    assert len(line) == columns - 3


LIMIT = "held by the limit: 3,000 requests/min, from headers"


@pytest.mark.parametrize(("columns", "state", "said", "shown"), [
    (130, LIMIT, "", f"100 of 200 done, 0 in flight, $0.0012, {LIMIT}, 10.0/s, 10.0 s left"),
    (80, LIMIT, "", "100 of 200 done, $0.0012, held by the limit: 3,000 requests/min, 10.0 s left"),
    (60, LIMIT, "", "100 of 200 done, $0.0012, 10.0 s left"),
    (130, "", f"2 workers, {LIMIT}", f"100 of 200 done, 0 in flight, $0.0012, 2 workers, {LIMIT}, 10.0/s, 10.0 s left"),
    (130, "", "2 workers, pausing, 3 s left", "100 of 200 done, 0 in flight, $0.0012, 2 workers, pausing, 3 s left"),
    (60, "", "server unreachable for 9.0 s, retrying", "100 of 200 done, $0.0012, server unreachable for 9.0 s"),
])  # fmt: skip
async def test_a_limit_that_holds_the_run_leaves_the_rate_and_the_time(monkeypatch, columns, state, said, shown):
    now, tally = [1000.0], Tally()
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(concurrent_prompts.time, "monotonic", lambda: now[0])
    monkeypatch.setitem(sys.modules, "tqdm", None)
    run = Run(lambda prompt: None, extras=[Costs()])
    monkeypatch.setattr(run.limiter, "state", lambda: state)
    run.said = said
    progress = Progress(200, Ran(None, run, 1, tally), None)
    tally.answered, now[0] = 100, 1010.0
    assert progress._text(0, 100, columns - 3) == shown
    progress.close()


async def test_a_notebooks_bar_ends_at_what_is_done(monkeypatch):
    """The last count came after the last tick: tqdm showed a run that answered all as one that broke off, in red."""
    pytest.importorskip("tqdm")
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    monkeypatch.setattr(sys, "stderr", Terminal())
    tally = Tally()
    progress = Progress(2, Ran(None, Run(lambda prompt: None), 1, tally), None)
    tally.answered = 2
    progress.close()
    assert (progress._bar.n, progress._bar.leave) == (2, True) and "2 of 2 done" in str(progress._bar)
    assert "left" not in str(progress._bar)


async def test_the_time_that_is_left_counts_no_outage(monkeypatch):
    """100 of 200 in 10 s, then two minutes in which nobody is there: the other 100 take 10 s."""
    now, tally = [1000.0], Tally()
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(concurrent_prompts.time, "monotonic", lambda: now[0])
    monkeypatch.setitem(sys.modules, "tqdm", None)
    run = Run(lambda prompt: None)
    progress = Progress(200, Ran(None, run, 1, tally), None)

    def tick(seconds):
        now[0] += seconds
        progress._tick()

    tally.answered = 100
    tick(10)
    run.limiter.away_since = now[0]
    for _ in range(120):
        tick(1)
    run.limiter.away_since = None
    tick(0.001)
    progress.close()
    assert "100 of 200 done, 0 in flight, 10.0/s, 10.0 s left" in sys.stderr.buffer.getvalue().decode()
