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
from tests.helpers import Terminal


@pytest.mark.parametrize("term", ["dumb", "", None, "xterm"])
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
        assert text.endswith("/s\nnoted\n")


class Costs:
    def status(self, ran):
        return "$0.0012"


@pytest.mark.parametrize(("columns", "expected"), [
    (80, "100 of 200 done, 0 in flight, $0.0012, 10.0/s, 10.0 s left"),
    (58, "100 of 200 done, 0 in flight, $0.0012, 10.0 s left"),
    (50, "100 of 200 done, $0.0012, 10.0 s left"),
    (30, "100 of 200 done, $0.0012, 10."),
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
    progress._timer.cancel()
    progress._tick()
    progress.close()
    assert sys.stderr.buffer.getvalue().decode().split("\r")[-2] == f"{expected}\x1b[K"


@pytest.mark.parametrize("columns", [60, 80, 120])
async def test_so_does_tqdms_bar(monkeypatch, columns):
    pytest.importorskip("tqdm")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "stderr", Terminal())
    tally = Tally()
    progress = Progress(200, Ran(None, Run(lambda prompt: None, extras=[Costs()]), 1, tally), None)
    progress._bar.start_t -= 10
    progress._bar.ncols = columns
    tally.answered = 100
    progress._timer.cancel()
    progress._tick()
    line = str(progress._bar)
    progress.close()
    assert "$0.0012" in line and len(line) <= columns and ("00:10 left" if columns < 80 else "<00:") in line


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
        progress._timer.cancel()
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


async def test_tqdm_counts_no_outage_either(monkeypatch):
    pytest.importorskip("tqdm")
    now = [1000.0]
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(concurrent_prompts.time, "monotonic", lambda: now[0])
    run = Run(lambda prompt: None)
    progress = Progress(200, Ran(None, run, 1, Tally()), None)
    began, run.limiter.away_since = progress._bar.start_t, now[0]
    now[0] += 30
    progress._timer.cancel()
    progress._tick()
    progress.close()
    assert progress._bar.start_t == began + 30
