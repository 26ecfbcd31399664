"""The openai-batch backend against the stand-in server: what is paid, what is found again, what goes wrong."""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
import types

import pytest

from concurrent_prompts import PromptError, UsageError, load_backend, main, run_concurrent
from concurrent_prompts.backends import api as api_file
from concurrent_prompts.backends import bulk as bulk_file
from concurrent_prompts.backends.api import reply_of
from concurrent_prompts.extras import stand_in as stand_in_server
from tests.helpers import SCRIPT, in_rows, reply, rows, scripted, serving

pytest.importorskip("openai")
openai_batch = pytest.importorskip("concurrent_prompts.backends.openai_batch")


class Killed(BaseException):
    """What ends a run at a place of the test's choice, as a kill would."""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Look often, and wait for a second Ctrl-C only where the test is about that."""
    for name, value in {"FIRST_POLL": 0.01, "LAST_POLL": 0.05, "GRACE": 0.0}.items():
        monkeypatch.setattr(openai_batch, name, value)


@pytest.fixture
def ask(here, stand_in):
    """Return a function that runs the command line on `count` prompts; the stand-in server is its attribute."""

    def call(*flags, count=None):
        if count is not None:
            pathlib.Path("prompts.txt").write_text("".join(f"prompt {number}\n" for number in range(count)))
        return main(["prompts.txt", "-b", "openai-batch", "--base-url", call.server.url, *flags])

    def serve(**options):
        call.server = stand_in(**options)
        return call

    return serve


@pytest.fixture
def clock():
    """The time of a server whose batches end when the test says so: serve(batch_time=30, clock=clock.time)."""
    it = types.SimpleNamespace(now=0.0)
    it.time = lambda: it.now
    return it


def answered(count=None):
    found = rows("prompts.results.jsonl")
    assert all(row["error"] is None and "made up" in row["text"] for row in found), found
    assert [row["id"] for row in found] == list(range(1, (count or len(found)) + 1))
    return found


def running():
    """Return the notes of what is running."""
    return [json.loads(line) for line in pathlib.Path("prompts.results.jsonl.running").read_text().splitlines()][1:]


def noted(_):
    """Tell whether the run has noted the batch that it has made."""
    with contextlib.suppress(OSError, ValueError):  # it is being written
        return len(running()) > 1


def test_the_main_job(ask, capsys):
    call = ask()
    assert call(count=30) == 0
    assert len(answered(30)) == 30 and call.server.stats.batches == 1 and call.server.stats.batch_rows == 30
    err = " ".join(capsys.readouterr().err.split())
    assert "30 answered, 0 failed" in err and "gpt-6-luna at $0.05 in, $0.25 out per million" in err
    assert not pathlib.Path("prompts.results.jsonl.running").exists()
    assert call() == 0 and call.server.stats.batches == 1, "nothing is asked again"


def test_the_answers_are_those_of_a_live_backend(ask):
    call = ask()
    assert call("-s", "Be brief.", "-p", "max_completion_tokens=9", count=5) == 0
    batch = rows("prompts.results.jsonl")
    assert main(["prompts.txt", "--base-url", call.server.url, "-s", "Be brief.", "-p", "max_completion_tokens=9",
                 "-o", "live.jsonl"]) == 0  # fmt: skip
    live = rows("live.jsonl")
    for name in ("id", "text", "finish_reason", "model", "usage", "request"):
        assert [row[name] for row in batch] == [row[name] for row in live]


@pytest.mark.parametrize("lines, size, batches", [(10, 10**6, 3), (100, 16_000, 30), (100, 17_320, 3)])
def test_large_inputs_are_split(ask, monkeypatch, lines, size, batches):
    monkeypatch.setattr(api_file, "BATCH_LINES", lines)
    monkeypatch.setattr(api_file, "BATCH_BYTES", size)
    call = ask()
    assert call("-s", "x" * (800 if batches == 30 else 100), count=30) == 0
    assert len(answered(30)) == 30 and call.server.stats.batches == batches


def test_no_more_batches_at_once_than_asked(ask, monkeypatch):
    monkeypatch.setattr(api_file, "BATCH_LINES", 5)
    most = []
    say = openai_batch.Batches.say
    monkeypatch.setattr(openai_batch.Batches, "say", lambda self: (most.append(len(self.running)), say(self)))
    call = ask(batch_time=0.05)
    assert call("-c", "2", count=30) == 0
    assert max(most) == 2 and call.server.stats.batches == 6 and len(answered(30)) == 30


def test_a_file_holds_one_endpoint_and_one_model(ask):
    lines = []
    for number in range(12):
        chat = number % 3 > 0
        body = {"messages": [{"role": "user", "content": f"{number}"}]} if chat else {"input": f"{number}"}
        body["model"] = "one" if number % 2 else "two"
        url = "/v1/chat/completions" if chat else "/v1/embeddings"
        lines.append({"custom_id": f"n{number}", "method": "POST", "url": url, "body": body})
    pathlib.Path("in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    call = ask()
    assert main(["in.jsonl", "-b", "openai-batch", "--base-url", call.server.url]) == 0
    found = rows("in.results.jsonl")
    assert [row["custom_id"] for row in found] == [f"n{number}" for number in range(12)]
    assert all(row["response"]["status_code"] == 200 and row["response"]["request_id"] for row in found)
    assert call.server.stats.batches == 4


def test_prompts_asked_twice_are_answered_twice(ask):
    call = ask()
    pathlib.Path("prompts.txt").write_text("same\nother\nsame\nsame\n")
    assert call() == 0
    assert len(answered(4)) == 4 and call.server.stats.batch_rows == 4


@pytest.mark.parametrize("faults", ["shuffle", "strings", "poll-500", "shuffle strings"])
def test_what_servers_do_differently(ask, faults):
    call = ask(batch_fault=dict.fromkeys(faults.split(), 1.0))
    assert call(count=20) == 0
    assert len(answered(20)) == 20 and call.server.stats.batch_rows == 20


def test_rows_that_fail_are_asked_again(ask):
    call = ask(fault={"500": 0.3})
    assert call(count=30) == 0
    assert max(row["attempts"] for row in answered(30)) > 1 and call.server.stats.batches > 1


def test_rows_that_expire_are_asked_again(ask):
    call = ask(batch_fault={"expire-once": 0.4})
    assert call(count=30) == 0
    assert sum(row["attempts"] == 2 for row in answered(30)) > 3 and call.server.stats.batch_rows == 30


def test_rows_that_always_expire_are_rows(ask, capsys):
    call = ask(batch_fault={"expire": 1.0})
    assert call("--max-attempts", "2", count=3) == 1
    errors = [row["error"] for row in rows("prompts.results.jsonl")]
    assert {(error["type"], error["retryable"]) for error in errors} == {("batch_expired", True)}
    assert call.server.stats.batches == 2 and call.server.stats.batch_rows == 0
    assert "--retry-failed" in capsys.readouterr().err


def test_a_batch_of_errors_only(ask):
    call = ask(batch_fault={"errors-only": 1.0})
    assert call(count=3) == 1
    assert [row["error"]["status"] for row in rows("prompts.results.jsonl")] == [400] * 3
    assert call.server.stats.batches == 1


def test_an_output_that_is_gone_is_not_paid_again_unasked(ask, capsys):
    call = ask(batch_fault={"lost-file": 1.0})
    assert call(count=3) == 1
    error = rows("prompts.results.jsonl")[0]["error"]
    assert error["type"] == "file_gone" and "--retry-failed sends and pays again" in error["message"]
    assert call() == 1 and call.server.stats.batches == 1
    assert call("--retry-failed") == 1 and call.server.stats.batches == 2


def test_a_batch_whose_creation_is_not_confirmed_is_found(ask):
    call = ask(batch_fault={"create-lost": 1.0})
    assert call(count=10) == 0
    assert len(answered(10)) == 10 and call.server.stats.batches == 1 and call.server.stats.batch_rows == 10


def test_lines_that_are_refused_cost_no_other(ask):
    good = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    bad = good | {"max_completion_tokens": -1}
    lines = [{"custom_id": f"n{n}", "method": "POST", "url": "/v1/chat/completions", "body": bad if n == 2 else good}
             for n in range(5)]  # fmt: skip
    pathlib.Path("in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    call = ask()
    assert main(["in.jsonl", "-b", "openai-batch", "--base-url", call.server.url]) == 1
    found = rows("in.results.jsonl")
    assert [row["response"]["status_code"] for row in found] == [200, 200, 400, 200, 200]
    assert "max_completion_tokens" in json.dumps(found[2])


def test_a_file_that_is_refused_as_a_whole_stops_the_run(ask, capsys):
    call = ask(batch_fault={"invalid": 1.0})
    assert call(count=3) == 3
    err = capsys.readouterr().err
    assert "was refused: This batch was to fail validation." in err and "to continue: " in err
    assert call() == 3 and call.server.stats.batches == 2, "the next run tries anew"


def test_a_full_queue_is_waited_for_and_what_is_too_large_is_split(ask, monkeypatch):
    call = ask(batch_queue=40, batch_time=0.05)
    assert call(count=30) == 0
    assert len(answered(30)) == 30 and call.server.stats.batch_rows == 30


@pytest.mark.parametrize("place", ["upload", "create", "fetch"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_run_that_is_killed_anywhere_pays_nothing_twice(ask, monkeypatch, place, when):
    call = ask()
    original = getattr(openai_batch.Batches, place)

    async def killed(self, batch):
        if when == "before":
            raise Killed
        await original(self, batch)
        raise Killed

    async def killed_in_fetch(self, batch):
        async for count, outcome in _numbered(original(self, batch)):
            yield outcome
            if when == "before" and count == 3:
                raise Killed
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(openai_batch.Batches, place, killed_in_fetch if place == "fetch" else killed)
        with pytest.raises(Killed):
            call(count=10)
    assert call() == 0
    assert len(answered(10)) == 10 and call.server.stats.batches == 1 and call.server.stats.batch_rows == 10
    assert not pathlib.Path("prompts.results.jsonl.running").exists()


async def _numbered(outcomes):
    count = 0
    async for outcome in outcomes:
        count += 1
        yield count, outcome


def command(url, *flags):
    return [sys.executable, SCRIPT, "prompts.txt", "-b", "openai-batch", "--base-url", url, *flags]


def test_kill_9_at_any_time_pays_nothing_twice(ask, here):
    call = ask(batch_time=0.3)
    pathlib.Path("prompts.txt").write_text("".join(f"prompt {number}\n" for number in range(200)))
    for name in ("files", "batches"):
        process = subprocess.Popen(command(call.server.url), stderr=subprocess.DEVNULL)
        while not getattr(call.server.stats, name) and process.poll() is None:
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert call() == 0
    assert len(answered(200)) == 200 and call.server.stats.batch_rows == 200


def interrupt_when(condition, times=1):
    """Send Ctrl-C from a thread, so often, each time that the condition holds."""

    def watch():
        for number in range(times):
            while not condition(number):
                time.sleep(0.005)
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_an_interrupt_leaves_the_batches_running(ask, capsys, clock):
    call = ask(batch_time=30, clock=clock.time)
    interrupt_when(noted)
    assert call(count=10) == 130
    err = capsys.readouterr().err
    assert "batches run on; interrupt again within 5 s to cancel them" in err and "to continue: " in err
    assert f"still running: {running()[1]['batch']}\n" in err
    assert [[*note] for note in running()] == [["file", "names", "time", "instead"], ["file", "batch"]]
    clock.now = 60.0
    assert call() == 0
    assert len(answered(10)) == 10 and call.server.stats.batches == 1 and call.server.stats.batch_rows == 10


def test_a_second_interrupt_asks_for_cancellation(ask, capsys, monkeypatch):
    now = [0.0, 0.0]  # the server's time, and how far it goes on at each look

    def clock():
        now[0] += now[1]
        return now[0]

    text = []

    def ready(number):
        text.append(capsys.readouterr().err)
        return noted(number) if number == 0 else "interrupt again" in "".join(text)

    monkeypatch.setattr(openai_batch, "GRACE", 60.0)
    call = ask(batch_time=30, clock=clock)
    interrupt_when(ready, 2)
    assert call(count=10) == 130
    err = "".join(text) + capsys.readouterr().err
    assert f"the server is cancelling {running()[1]['batch']}; what is answered is billed" in err
    assert "to continue: " in err
    now[1] = 10.0
    assert call() == 0
    assert len(answered(10)) == 10 and call.server.stats.batches == 2 and call.server.stats.batch_rows == 10


def test_batches_of_another_input_are_refused(ask, capsys):
    call = ask(batch_time=30)
    interrupt_when(noted)
    assert call(count=10) == 130
    capsys.readouterr()
    pathlib.Path("prompts.txt").write_text("something else\n")
    assert call() == 2
    sentence = "contains none of these requests (another input, model or parameter?); run the command that started it"
    assert sentence in " ".join(capsys.readouterr().err.split()) and call.server.stats.batches == 1


def test_a_batch_that_the_server_does_not_know(ask, capsys):
    call = ask(batch_time=30)
    interrupt_when(noted)
    assert call(count=3) == 130
    capsys.readouterr()
    assert ask()() == 2
    assert "is unknown to this server and key" in " ".join(capsys.readouterr().err.split())
    assert call.server.stats.batches == 0


async def test_a_server_without_a_batch_api():
    missing = reply(b'{"detail": "Not Found"}', b"404 Not Found", b"connection: close\r\n")
    async with scripted(lambda head, body: missing) as (url, _):
        with pytest.raises(UsageError, match="there is no Batch API at http"):
            await run_concurrent(["one"], load_backend("openai-batch", base_url=url))


def test_a_wrong_key_stops_the_run(ask, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong-123456")
    call = ask(require_key="sk-right-123456")
    assert call(count=3) == 3
    err = capsys.readouterr().err
    assert "check the key" in err and "sk-wrong" not in err and "sk-right" not in err


def test_nobody_there_stops_the_run(here, capsys):
    assert main(["prompts.txt", "-b", "openai-batch", "--base-url", "http://127.0.0.1:9/v1"]) == 3
    assert "--base-url is its address" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("flag", ["--rpm", "--tpm", "--cluster", "--worker-backend"])
def test_flags_that_mean_nothing(here, capsys, flag):
    value = "stdlib" if flag == "--worker-backend" else "5"
    assert main(["prompts.txt", "-b", "openai-batch", "--base-url", "http://127.0.0.1:9/v1", flag, value]) == 2
    assert f"{flag} has no effect with openai-batch; leave it out" in capsys.readouterr().err


def test_a_budget_is_not_charged_twice_for_what_is_running(ask, capsys, clock):
    budget = "-p", "max_completion_tokens=50", "--max-cost", "0.001"
    call = ask(batch_time=30, clock=clock.time)
    interrupt_when(noted)
    assert call(*budget, count=50) == 130
    clock.now = 60.0
    assert call(*budget) == 0
    assert len(answered(50)) == 50 and call.server.stats.batch_rows == 50 and call.server.stats.batches == 1
    assert "assumed" not in capsys.readouterr().err


def test_rows_that_were_never_run_are_not_paid(ask, capsys):
    call = ask(batch_fault={"expire": 1.0})
    assert call("--max-attempts", "1", "-p", "max_completion_tokens=50", "--max-cost", "0.01", count=5) == 1
    assert "$0.00 of $0.01 spent" in capsys.readouterr().err


def test_rows_that_a_run_does_not_ask_for_are_left_for_the_next(ask, clock):
    call = ask(batch_time=30, clock=clock.time)
    interrupt_when(noted)
    assert call(count=20) == 130
    clock.now = 60.0
    assert call("-n", "5") == 0 and len(answered(5)) == 5
    assert call() == 0 and len(answered(20)) == 20
    assert call.server.stats.batch_rows == 20 and call.server.stats.batches == 1
    assert not pathlib.Path("prompts.results.jsonl.running").exists()


@in_rows(
    "error, status, kind",
    [
        ({"code": "batch_expired", "message": "late"}, 0, "retry"),
        ({"type": "request_failed", "message": "Error code: 400 - {'error': 'no such role'}"}, 400, "fail"),
        ({"type": "request_failed", "message": "Error code: 503 - busy"}, 503, "retry"),
        ({"message": "whatever"}, 0, "fail"),
        (None, 0, "fail"),
    ],
)
def test_rows_without_a_response(error, status, kind):
    line = json.dumps({"custom_id": "a-1", "response": None, "error": error}).encode()
    name, outcome = openai_batch.row_outcome(line)
    assert name == "a-1" and outcome[0] == status
    with pytest.raises(PromptError) as failure:
        reply_of("/chat/completions", *outcome)
    assert failure.value.verdict == kind and failure.value.error.message


def test_expired_rows_that_are_asked_again_are_paid_once_whatever_is_killed(ask, monkeypatch):
    call = ask(batch_fault={"expire-once": 0.4})
    fetch, look = openai_batch.Batches.fetch, openai_batch.Batches.look

    async def killed_in_fetch(self, batch):
        async for count, outcome in _numbered(fetch(self, batch)):
            yield outcome
            if count == 3:
                raise Killed

    async def killed_at_second(self, batch):
        if call.server.stats.batches == 2:
            raise Killed
        return await look(self, batch)

    for name, way in (("fetch", killed_in_fetch), ("look", killed_at_second)):
        with monkeypatch.context() as patch:
            patch.setattr(openai_batch.Batches, name, way)
            with pytest.raises(Killed):
                call(count=30)
    assert call() == 0
    assert len(answered(30)) == 30 and call.server.stats.batches == 2 and call.server.stats.batch_rows == 30


def test_looks_grow_rarer_and_say_how_far_the_batch_is(ask, monkeypatch, capsys):
    now, waits, said = [0.0], [], []

    async def sleep(self, seconds):
        now[0] += 20
        waits.append(seconds)
        return True

    monkeypatch.setattr(bulk_file.Job, "sleep", sleep)
    monkeypatch.setattr(bulk_file.Job, "say", lambda self, text: said.append(text))
    for name, value in {"FIRST_POLL": 1.0, "LAST_POLL": 60.0}.items():
        monkeypatch.setattr(openai_batch, name, value)
    call = ask(batch_time=400, clock=lambda: now[0])
    assert call(count=20) == 0
    assert waits[:4] == [1.0, 1.5, 2.25, 3.375] and max(waits) == 60.0 and waits == sorted(waits)
    assert said[0] == "1 batch validating, 0 of 20 rows there"
    assert "1 batch in progress, 10 of 20 rows there" in said


def test_a_batch_that_does_not_end_is_warned_of_once(ask, monkeypatch, capsys):
    monkeypatch.setattr(openai_batch, "DAY", -7200.0)
    call = ask(batch_time=0.1)
    assert call(count=3) == 0
    assert capsys.readouterr().err.count("should have ended by now; --overwrite discards it") == 1


@pytest.mark.parametrize("times, status", [(1, 0), (9, 1)])
def test_a_short_output_is_fetched_again_and_not_paid_again(ask, monkeypatch, times, status):
    download, calls = openai_batch.Batches.download, []

    async def short(self, file, out):
        found = await download(self, file, out)
        calls.append(file)
        if len(calls) <= times:
            out.truncate(len(out.readline()) + 20)
            out.seek(0)
        return found

    monkeypatch.setattr(openai_batch.Batches, "download", short)
    call = ask()
    assert call(count=10) == status
    assert call.server.stats.batches == 1 and len(calls) == min(times + 1, openai_batch.TRIALS)
    errors = [row["error"] for row in rows("prompts.results.jsonl") if row["error"]]
    assert [error["type"] for error in errors] == ["row_missing"] * (9 if status else 0)


def test_a_batch_of_another_model_stays_noted_while_it_runs(ask, capsys):
    call = ask(batch_time=0.4)
    assert call(count=2) == 0
    pathlib.Path("prompts.txt").write_text("".join(f"prompt {number}\n" for number in range(4)))
    interrupt_when(lambda _: call.server.stats.batches == 2)
    assert call() == 130
    name = running()[1]["batch"]
    assert call("-m", "other") == 0
    assert f"{name} is running and contains none of these requests" in capsys.readouterr().err
    assert {"file": running()[0]["file"], "batch": name} in running()


# ---- What a server may send without end ----------------------------------------------------------------------


@pytest.fixture
def output(monkeypatch):
    """Return a function that says what becomes of the content of output files."""
    keep = stand_in_server.Batches._keep

    def change(function):
        def kept(self, name, filename, purpose, content):
            return keep(self, name, filename, purpose, function(content) if purpose == "batch_output" else content)

        monkeypatch.setattr(stand_in_server.Batches, "_keep", kept)

    return change


@pytest.mark.parametrize("count", [1, 3])
def test_a_row_without_an_end_costs_no_other(ask, monkeypatch, output, count):
    monkeypatch.setattr(openai_batch, "MAX_BODY", 10_000)
    output(lambda content: content.partition(b"\n")[0] + b" " * 10_000 * count + b"\n" + content.partition(b"\n")[2])
    assert ask()(count=5) == 1
    errors = [row["error"] for row in rows("prompts.results.jsonl")]
    assert errors[0]["type"] == "row_missing" and errors[1:] == [None] * 4


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_an_output_file_without_an_end_stops_the_run(ask, monkeypatch, output, capsys, end):
    monkeypatch.setattr(openai_batch, "MAX_FILE", 100_000)
    output(lambda content: (content + end) * 1000)
    assert ask()(count=3) == 3
    assert "is too large" in " ".join(capsys.readouterr().err.split())
    assert running(), "another run may fetch it"


def test_an_object_without_an_end_is_no_batch_api(ask, monkeypatch, capsys):
    monkeypatch.setattr(openai_batch, "MAX_OBJECT", 100)
    assert ask()(count=3) == 3
    assert "the body is longer than 100 bytes" in " ".join(capsys.readouterr().err.split())


DEEP = b"[" * 990 + b"]" * 990
ROW = b'{"custom_id": "x", "response": %b, "error": %b}'
BAD_ROWS = (
    ROW % (b'{"status_code": %b, "body": {}}' % (b"9" * 4000), b"null"),
    ROW % (b'{"status_code": %b, "body": {}}' % (b"9" * 5000), b"null"),
    ROW % (b'{"status_code": 1e400, "body": {}}', b"null"),
    ROW % (b'{"status_code": -1, "body": {}}', b"null"),
    ROW % (b'{"status_code": 200, "body": %b}' % DEEP, b"null"),
    ROW % (b"null", b'{"code": %b, "message": "m"}' % DEEP),
    ROW % (b"null", b'{"code": "row_unreadable", "message": "%b"}' % (b"m" * 10**6)),
    ROW % (b'{"status_code": 200, "body": [%b0]}' % (b"0," * openai_batch.MAX_VALUES), b"null"),
)


@pytest.mark.usefixtures("codec")
@in_rows("row", BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_rows_that_are_made_to_hurt(row):
    began = time.perf_counter()
    name, (status, headers, body) = openai_batch.row_outcome(row)
    assert name in ("x", "") and (status == 0 or DEEP in row) and len(body) < 10_000
    with pytest.raises(PromptError) as caught:
        reply_of("/chat/completions", status, headers, body)
    assert caught.value.error.type in ("row_unreadable", "malformed_reply", "no_answer")
    assert time.perf_counter() - began < 1


@in_rows("moment", [10**400, -1, None, "soon", 1e999])
def test_times_that_cannot_be(moment):
    assert openai_batch.moment(moment, 7.0) == 7.0


# ---- Rows as servers really write them -----------------------------------------------------------------------

EMPTY_ROWS = [
    {"response": {"status_code": 0, "body": {}}, "error": None},  # ellmer#830
    {"response": {"status_code": 0, "request_id": "", "body": None}},
    {"response": {"status_code": None, "body": ""}, "error": None},
    {"response": {"status_code": "0", "body": []}},
]


@pytest.mark.parametrize("row", EMPTY_ROWS, ids=json.dumps)
def test_a_row_with_nothing_in_it_goes_into_the_next_batch(ask, monkeypatch, row):
    lines_of, emptied = openai_batch.lines_of, []

    def emptying(file):
        for line in lines_of(file):
            if not emptied:
                emptied.append(line)
                line = json.dumps({"custom_id": json.loads(line)["custom_id"], **row}).encode()
            yield line

    monkeypatch.setattr(openai_batch, "lines_of", emptying)
    call = ask()
    assert call(count=5) == 0
    assert sorted(row["attempts"] for row in answered(5)) == [1, 1, 1, 1, 2] and call.server.stats.batches == 2


def test_a_row_that_cannot_be_read_is_called_that():
    name, outcome = openai_batch.row_outcome(b'{"custom_id": "a", "response": {"status_code": 0, "body": {"x": 1}}}')
    assert name == "a" and b"row_unreadable" in outcome[2]


FIELD_ROWS = {
    "flagged": ((403, {"error": {"message": "m", "metadata": {"reasons": ["x"]}}}), "fail", "content_filter"),
    "cancelled": ((499, {"error": {"status": "CANCELLED", "message": "x"}}), "retry", "CANCELLED"),
    "context": ((500, {"error": {"message": "Context size has been exceeded."}}), "fail", "context_length_exceeded"),
    "half": (
        (200, {"choices": [{"message": {"content": "Half"}, "finish_reason": "error", "error": {"code": 502}}]}),
        "retry", "http_502",
    ),
    "not done": ((200, {"id": "r", "status": "queued", "output": []}), "fail", "unfinished"),
    "key": ((400, [{"error": {"message": "API key not valid."}}]), "stop", "invalid_api_key"),
}  # fmt: skip


@in_rows(("response", "verdict", "kind"), FIELD_ROWS.values(), ids=FIELD_ROWS)
def test_a_row_means_what_the_same_reply_means(response, verdict, kind):
    line = {"custom_id": "a", "response": {"status_code": response[0], "body": response[1]}, "error": None}
    _, outcome = openai_batch.row_outcome(json.dumps(line).encode())
    with pytest.raises(PromptError) as caught:
        reply_of("/responses" if kind == "unfinished" else "/chat/completions", *outcome)
    assert (caught.value.verdict, caught.value.error.type) == (verdict, kind)


@pytest.mark.parametrize("backend", ["stdlib", "raw-aiohttp", "openai-sdk", "openai-batch"])
def test_azures_lines_are_taken(ask, backend):
    """Their `url` is the path alone (litellm#7402)."""
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    urls = ("/chat/completions", "/v1/chat/completions")
    lines = [{"custom_id": url, "method": "POST", "url": url, "body": body} for url in urls]
    pathlib.Path("in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    call = ask()
    assert main(["in.jsonl", "-b", backend, "--base-url", call.server.url]) == 0
    assert [row["custom_id"] for row in rows("in.results.jsonl") if row["response"]["status_code"] == 200] == [*urls]


def test_refusals_in_the_error_file_are_their_prompts_own(here):
    """Providers say with a 403 that they have looked at what a prompt holds."""
    names = []

    def answer(head, body):
        method, path = head.decode().split()[:2]
        place = path.partition("/v1")[2].partition("?")[0]
        if place == "/files":
            names.extend(re.findall(rb'"custom_id": ?"([^"]+)"', body))
            return reply(b'{"id": "file-1", "object": "file", "created_at": 1}')
        if place == "/files/file-2/content":
            message = b'{"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}'
            row = b'{"custom_id": "%b", "response": {"status_code": 200, "body": %b}}'
            return reply(b"\n".join(row % (name, message) for name in names[4:]))
        if place == "/files/file-3/content":
            row = b'{"custom_id": "%b", "response": {"status_code": 403, "body": {"error": {"message": "flagged"}}}}'
            return reply(b"\n".join(row % name for name in names[:4]))
        batch = {"id": "batch_1", "object": "batch", "created_at": 1, "input_file_id": "file-1"}
        batch |= {"output_file_id": "file-2", "error_file_id": "file-3"}
        batch |= {"status": "completed" if method == "GET" else "validating"}
        return reply(json.dumps(batch if "batches" in place else {"data": []}).encode())

    pathlib.Path("p.txt").write_text("".join(f"prompt {number}\n" for number in range(8)))
    with serving(answer) as (url, _):
        assert main(["p.txt", "-b", "openai-batch", "--base-url", url]) == 1
    statuses = [row["error"] and row["error"]["status"] for row in rows("p.results.jsonl")]
    assert statuses == [403] * 4 + [None] * 4
