"""The torture suite in small: what only whole processes can show, and that the suite would notice a loss."""

import argparse
import collections
import contextlib
import http.client
import os
import threading
import types

import pytest

from concurrent_prompts.extras import stand_in, stand_in_limits
from tests import server_cases, torture
from tests.helpers import in_rows
from tests.torture import BLOWS, ROOT, TOOL, Bench, Job, asked_again, ideal, limited, needless, sent_again

FAST = {"latency": 0.02}


@pytest.fixture
def bench():
    with contextlib.ExitStack() as stack:
        args = argparse.Namespace(quick=True, seed=0, backend="stdlib")
        yield Bench("test", args, stack, collections.Counter())


def test_killed_in_mid_run_and_continued(bench):
    job, runs = Job(bench, bench.serve(**FAST), 40, "-c", "10"), []
    for count in (12, 15):
        runs.append(client := job.start())
        client.requested(count)
        client.kill()
        client.wait()
    runs.append(job.run())
    assert (runs[-1].status, job.lost(), job.doubles(), job.ordered()) == (0, 0, 0, True)
    assert asked_again(runs) == 0
    assert max(sent_again(runs)) <= 10


@pytest.mark.skipif(os.name == "nt", reason="os.kill(9) is another thing there")
@pytest.mark.parametrize("step", BLOWS)
def test_killed_as_the_file_is_put_in_order(bench, step):
    job = Job(bench, bench.serve(**FAST), 20, "-c", "10")
    killed = job.run(program=["-c", BLOWS[step] + TOOL], environment={"PYTHONPATH": str(ROOT)})
    assert (killed.status, job.lost(), len(job.lines())) == (-9, 0, 20)
    again = job.run()
    assert (again.status, again.requests, job.ordered()) == (0, [], True)


def test_a_key_that_is_refused_in_mid_run(bench):
    server = bench.serve(require_key="old", **FAST)
    server.plan[30] = lambda: server.set(require_key="new")
    job = Job(bench, server, 40, "-c", "10")
    first = job.run(environment={"OPENAI_API_KEY": "old"})
    assert first.status == 3 and "check the key" in first.text
    assert len(job.answered()) == 29 and needless(first, 401, 10) <= 6  # three prompts are asked to be sure
    second = job.run(environment={"OPENAI_API_KEY": "new"})
    assert (second.status, job.lost(), asked_again([first, second])) == (0, 0, 0)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no RLIMIT_FSIZE")
def test_a_file_that_may_not_grow(bench):
    job = Job(bench, bench.serve(**FAST), 40, "-c", "10")
    first = job.run(wrap=limited(6000))
    assert first.status == 3 and "free some space" in first.text
    assert job.whole() and 0 < len(job.answered()) < 40 and len(first.requests) - len(job.answered()) <= 20
    second = job.run()
    assert (second.status, job.lost(), job.ordered()) == (0, 0, True)
    assert sent_again([first, second])[1] <= 20


def test_two_at_once(bench):
    server, over = bench.serve(**FAST), threading.Event()
    server.plan[6] = lambda: over.wait(10)  # the first run is kept in its middle meanwhile
    job = Job(bench, server, 10, "-c", "5")
    first = job.start()
    assert first.requested(6)
    second = job.start("--overwrite")
    second.until(lambda: False)
    over.set()
    assert (second.status, first.wait().status, job.lost(), len(first.requests)) == (2, 0, 0, 10)


def test_the_suite_notices_a_loss(bench):
    job = Job(bench, bench.serve(**FAST), 10)
    run = job.run()
    assert (asked_again([run, run]), sent_again([run, run])) == (10, [0, 10])
    assert (job.lost(), job.doubles(), job.ordered(), job.whole()) == (0, 0, True, True)
    lines = job.lines()
    job.results.write_bytes(b"".join([*lines[1:], lines[1][:-5]]))
    assert (job.lost(), job.ordered(), job.whole()) == (1, False, False)
    job.results.write_bytes(b"".join([*lines, lines[3]]))
    assert (job.lost(), job.doubles(), job.ordered()) == (0, 1, False)
    job.results.write_bytes(b"".join(lines).replace(b"prompt 3", b"prompt 4"))
    assert job.lost() == 1


def test_the_ideal_is_a_sliding_window(bench):
    job, run = argparse.Namespace(prompts="abc"), argparse.Namespace(requests=[])
    for prompt, latency in (("c", 1.0), ("a", 3.0), ("b", 1.5)):
        run.requests.append(torture.Request(prompt, 0.0, latency=latency))
    assert [ideal(job, run, slots) for slots in (1, 2, 3)] == [5.5, 3.0, 3.0]


@in_rows("case", [*server_cases.GATES, *server_cases.WINDOWS], ids=lambda case: case.name)
@in_rows("start", [1000.0, 1003.0])
def test_the_ideal_of_a_limit_is_what_a_client_reaches_that_knows_it(case, start):
    clock = types.SimpleNamespace(now=start)
    (limit,) = stand_in_limits.limits_of(stand_in.Options(**case.server), lambda: clock.now)
    for _ in range(case.prompts):
        while wait := limit.wait(1):
            clock.now += wait + 1e-6
        limit.take(1)
    assert clock.now - start == pytest.approx(case.ideal([0.0] * case.prompts, start), rel=0.01)


def test_the_ideal_of_slots():
    assert server_cases.in_slots(2)([3.0, 1.5, 1.0], 0.0) == 3.0
    assert server_cases.in_slots(1)([3.0, 1.5, 1.0], 0.0) == 5.5


@in_rows("case", server_cases.ALL, ids=lambda case: case.name)
def test_the_ideal_of_a_case_is_short(case):
    options = stand_in.Options(**torture.LATENCY | case.server)
    assert 1 < case.ideal([options.latency] * case.prompts, 1000.0) + case.pause < 40


def test_a_way_on_which_packets_are_lost(bench):
    server = bench.serve(latency=0.0)
    relay = torture.Relay(server)
    server.do(relay.start())
    port = int(relay.url.split(":")[2].partition("/")[0])
    kept, body = http.client.HTTPConnection("127.0.0.1", port, timeout=0.1), '{"messages": [{"content": "x"}]}'
    for _ in range(2):
        kept.request("POST", "/v1/chat/completions", body)
        assert kept.getresponse().read()  # an error, but an answer
    server.do(relay.freeze())
    kept.request("POST", "/v1/chat/completions", body)
    with pytest.raises(TimeoutError):
        kept.sock.recv(1)
    late = http.client.HTTPConnection("127.0.0.1", port, timeout=0.1)
    with pytest.raises(TimeoutError):  # neither is there anybody who accepts a new one
        late.connect()
    server.do(relay.thaw())
    kept.sock.settimeout(5)
    assert kept.getresponse().status == 400
    kept.close()
    server.do(relay.close())


def test_a_run_that_takes_too_long_is_cut_off(bench, monkeypatch):
    monkeypatch.setattr(bench, "size", lambda full, quick: 0.3)
    job = Job(bench, bench.serve(fault={"hang": 1.0}), 3)
    run = torture.in_time(job)
    assert run.status not in (0, None) and len(job.answered()) == 0


@pytest.mark.parametrize(("measured", "status"), [(3, 0), (4, 1), (None, 1)])
def test_a_missed_figure_is_an_exit_status(monkeypatch, capsys, measured, status):
    monkeypatch.setitem(torture.SCENARIOS, "small", lambda bench: bench.at_most("figure", measured, 3))
    monkeypatch.setattr(torture, "heading", lambda args: ["heading"])
    assert torture.main(["--only", "small"]) == status
    assert ("MISSED" in capsys.readouterr().out) == bool(status)
