"""Extras and backends of third parties that raise anything, anywhere, or that never let go of the event loop."""

import signal
import subprocess
import sys
import time

import pytest

import concurrent_prompts
from concurrent_prompts.backends import interrupts
from tests.helpers import SCRIPT

EXTRA = """
import contextlib

class Odd(Exception):
    def __str__(self):
        raise RuntimeError("no text")

def go_wrong(place):
    if place == {place!r}:
        raise {failure}

def add_arguments(option):
    go_wrong("add_arguments")
    if {place!r} == "a flag that is taken":
        option("-o")

def create(args):
    go_wrong("create")
    return Extra()

class Extra:
    def command(self):
        go_wrong("command")

    def check(self):
        go_wrong("check")

    def select(self, prompts):
        go_wrong("select")
        yield from prompts
        go_wrong("the end of select")

    def count(self, lines):
        go_wrong("count")
        return lines

    @contextlib.asynccontextmanager
    async def session(self, run):
        go_wrong("session")
        yield
        go_wrong("the end of session")

    def wrap(self, attempt):
        go_wrong("wrap")

        async def call(prompt):
            reply = await attempt(prompt)
            go_wrong("the call")
            return reply

        return call

    def on_result(self, result):
        go_wrong("on_result")

    def status(self, ran):
        go_wrong("status")
        return "fine"

    def report(self, ran, status):
        go_wrong("report")
        return [5]

go_wrong("import")
"""
PLACES = ["import", "add_arguments", "a flag that is taken", "create", "command", "check", "select"]
PLACES += ["the end of select", "count", "session", "the end of session", "wrap", "the call", "on_result", "report"]
AFTER = {"the end of session", "the call", "on_result", "report"}  # the answers are kept


@pytest.mark.parametrize("failure", ["RuntimeError('boom')", "Odd()"])
@pytest.mark.parametrize("place", PLACES)
def test_what_an_extra_raises_is_a_sentence_that_names_it(here, stand_in, capsys, monkeypatch, place, failure):
    name = f"mine_{abs(hash((place, failure)))}"
    (here / f"{name}.py").write_text(EXTRA.format(place=place, failure=failure))
    monkeypatch.syspath_prepend(str(here))
    status = concurrent_prompts.main(["prompts.txt", "--base-url", stand_in().url, "-b", "stdlib", "--extra", name])
    said = capsys.readouterr().err
    assert status in (2, 3) and name in said
    assert ("ArgumentError" if place == "a flag that is taken" else failure.partition("(")[0]) in said
    results = here / "prompts.results.jsonl"
    assert place not in AFTER or results.read_text().count("\n") >= 1


def test_what_an_extra_raises_for_the_progress_stops_the_run(monkeypatch):
    progress_file = pytest.importorskip("concurrent_prompts.extras.progress")

    class Extra:
        def status(self, ran):
            raise RuntimeError("boom")

    run = concurrent_prompts.Run(None.__class__, extras=[Extra()])
    ran = concurrent_prompts.Ran(None, run, 1, progress_file.core.sibling("backends", "console").Tally())
    progress = object.__new__(progress_file.Progress)
    progress._ran, progress._run, progress._tally, progress._total = ran, run, ran.tally, None
    assert progress._text(0, 0) == "0 done, 0 in flight" and "boom" in str(run.stopped)
    assert progress._text(0, 0) == "0 done, 0 in flight, stopping"


@pytest.mark.parametrize("what", ["raise RuntimeError('boom')", "def", "import none_such_as_this"])
def test_a_backend_that_cannot_be_imported_is_a_sentence(here, capsys, what):
    (here / "broken.py").write_text(what)
    sys.modules.pop("broken", None)
    assert concurrent_prompts.main(["prompts.txt", "-b", "broken:connect", "--base-url", "http://127.0.0.1:1"]) == 2
    assert "backend broken:connect: " in capsys.readouterr().err


HOLDING = """
import contextlib, time

@contextlib.asynccontextmanager
async def connect(base_url, headers, concurrency):
    async def post(path, body):
        print("held", flush=True)
        time.sleep(60)

    yield post
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to send")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_what_never_lets_go_of_the_event_loop(here, number):
    (here / "holding.py").write_text(HOLDING)
    command = [sys.executable, SCRIPT, "prompts.txt", "-b", "holding:connect", "--base-url", "http://127.0.0.1:1", "-q"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            process.send_signal(number)
            time.sleep(interrupts.HELD_UP + 0.1)
            process.send_signal(number)
            began = time.monotonic()
            said = process.communicate(timeout=20)[1]
        finally:
            process.kill()
    assert process.returncode == 130 and time.monotonic() - began < 5
    assert "interrupted" in said and "Traceback" not in said
