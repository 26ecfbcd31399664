"""Progress on standard error."""

import asyncio
import os
import sys

import pytest

import concurrent_prompts
from concurrent_prompts import Progress, Ran, Run, Tally
from tests.helpers import Terminal


@pytest.mark.parametrize("term", ["dumb", "", None, "xterm"])
async def test_a_terminal_that_cannot_redraw_a_line_gets_whole_lines(monkeypatch, term):
    monkeypatch.delenv("TERM", raising=False)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    if term is not None:
        monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(Progress, "EVERY", 0.001)
    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = Progress(3, Ran(None, Run(lambda prompt: None), 1, Tally()), None, False)
    while not sys.stderr.buffer.getvalue().count(b"3 done"):
        await asyncio.sleep(0)
    progress.close()
    concurrent_prompts.ErrorLog().emit(concurrent_prompts.logging.makeLogRecord({"msg": "noted"}))
    text = sys.stderr.buffer.getvalue().decode()
    if term == "xterm" or os.name == "nt":
        assert text.startswith("\r0 of 3 done") and text.endswith("\r\x1b[Knoted" + os.linesep)
    else:
        assert "\r" not in text and "\x1b" not in text and text.startswith("0 of 3 done, 0 in flight")
        assert text.endswith("/s\nnoted\n")
