"""Runs with the reader's own coroutine, in virtual time: order, bounds, failures, retries, limits, the end."""

import asyncio
import contextlib
import functools
import itertools
import math
import random
import threading
import time

import pytest

import concurrent_prompts
from concurrent_prompts import (
    Call,
    PromptError,
    Reply,
    as_completed,
    http_error,
    run,
    run_concurrent,
    run_sequential,
)
from concurrent_prompts.backends import api as api_file
from concurrent_prompts.backends.hints import hint
from tests.helpers import in_rows, needs_extras, virtual

# ---- What answers --------------------------------------------------------------------------------------------


def now():
    return asyncio.get_running_loop().time() - 1000


def options(**more):
    """Return the options of a run on the clock of the running loop."""
    return {"clock": asyncio.get_running_loop().time} | more


class Server:
    """What answers the prompts: `replies` is, for each, the list of its replies, a text or exception, after seconds."""

    def __init__(self, replies=None, latency=1.0):
        self.replies, self.latency = replies or {}, latency
        self.calls = []  # (prompt, when)
        self.in_flight = self.most = self.cancelled = 0

    async def __call__(self, prompt):
        self.calls.append((prompt, now()))
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        replies = self.replies.get(prompt, [])
        reply = replies.pop(0) if len(replies) > 1 else replies[0] if replies else f"to {prompt}"
        latency, reply = reply if isinstance(reply, tuple) else (self.latency, reply)
        try:
            await asyncio.sleep(latency)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.in_flight -= 1
        if isinstance(reply, BaseException):
            raise reply
        return reply

    def times(self, prompt):
        return [when for what, when in self.calls if what == prompt]


def limited(after=None, status=429, **headers):
    """Return the error of a server that has too much to do."""
    return http_error(status, {"retry-after": str(after)} if after is not None else {}, b"")


def outcomes(results):
    return [result.error.type if result.error else result.text for result in results]


KEY = http_error(401, {}, b'{"error": {"message": "bad key", "code": "invalid_api_key"}}')
WAYS = {"sequential": run_sequential, "concurrent": run_concurrent}
both = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


async def gathered(prompts, send, **more):
    """Return the results of as_completed, as a list."""
    return [result async for result in as_completed(prompts, send, **more)]


# ---- Order and bounds ----------------------------------------------------------------------------------------


@virtual
async def test_sequential_takes_the_sum_and_concurrent_the_slowest():
    replies = {"a": [(3, "A")], "b": [(1, "B")], "c": [(2, "C")]}
    for way, wall in ((run_sequential, 6), (run_concurrent, 3)):
        began, server = now(), Server({key: list(value) for key, value in replies.items()})
        results = await way(["a", "b", "c"], server, **options())
        assert outcomes(results) == ["A", "B", "C"]
        assert [result.latency for result in results] == [3, 1, 2]
        assert now() - began == pytest.approx(wall)
        assert server.most == (1 if way is run_sequential else 3)


@virtual
async def test_as_completed_yields_in_the_order_of_the_answers():
    server = Server({"a": [(3, "A")], "b": [(1, "B")], "c": [(2, "C")]})
    found = [(result.text, now()) async for result in as_completed(list("abc"), server, **options())]
    assert found == [("B", 1), ("C", 2), ("A", 3)]


@in_rows("concurrency", [1, 2, 7, 100])
@virtual
async def test_no_more_calls_are_in_flight_than_asked_and_no_fewer(concurrency):
    server = Server({str(number): [(1 + number % 3, "x")] for number in range(50)})
    results = await run_concurrent(map(str, range(50)), server, **options(concurrency=concurrency))
    assert len(results) == 50 and server.most == min(50, concurrency)
    if concurrency < 50:
        assert now() < 100 / concurrency + 3


@virtual
async def test_concurrency_auto_starts_low_and_grows():
    server, seen = Server(), []
    async for _ in as_completed(map(str, range(3000)), server, **options()):
        seen.append(server.most)
    assert seen[0] < 64 <= seen[-1] == server.most <= 1024


@pytest.mark.parametrize("concurrency", [1, 5])
@virtual
async def test_prompts_are_pulled_only_when_there_is_room(concurrency):
    pulled = []
    endless = (pulled.append(number) or str(number) for number in itertools.count())
    results = as_completed(endless, Server(), **options(concurrency=concurrency))
    async with contextlib.aclosing(results):
        for taken in range(1, 30):
            await anext(results)
            await asyncio.sleep(100)  # a slow reader; meanwhile calls end and are not replaced without end
            assert len(pulled) <= taken + 2 * concurrency + 1


@virtual
async def test_waiting_calls_hold_up_the_pulling():
    pulled, gate = [], asyncio.Event()

    async def send(prompt):
        await gate.wait()
        return prompt

    prompts = (pulled.append(number) or str(number) for number in range(1000))
    task = asyncio.ensure_future(run_concurrent(prompts, send, **options(concurrency=10)))
    await asyncio.sleep(5)
    assert len(pulled) <= 11
    gate.set()
    assert len(await task) == len(pulled) == 1000


@virtual
async def test_leaving_as_completed_early_cancels_what_is_in_flight():
    server = Server({"a": [(1, "A")]}, latency=50)
    async with contextlib.aclosing(as_completed(["a", "b", "c", "d"], server, **options(concurrency=3))) as results:
        assert (await anext(results)).text == "A"
    assert (server.in_flight, server.cancelled) == (0, len(server.calls) - 1)


# ---- Prompts -------------------------------------------------------------------------------------------------


@in_rows("way", [run, run_sequential, run_concurrent, gathered])
@in_rows("prompts", ["one text", b"bytes"])
def test_a_text_instead_of_a_list_is_refused(way, prompts):
    async def send(prompt):
        return prompt

    with pytest.raises(TypeError, match="list"):
        result = way(prompts, send)
        asyncio.run(result)


@both
@virtual
async def test_what_a_coroutine_is_given_and_what_cannot_be_asked(way):
    given = []

    async def send(prompt):
        given.append(prompt)

    talk = [{"role": "user", "content": "b"}]
    results = await way(["a", {"messages": talk, "id": "x"}, 3, {"input": "c"}, {"question": "?"}], send, **options())
    went_in = ["a", {"messages": talk, "id": "x"}, {"input": "c"}, {"question": "?"}]
    assert len(given) == 4 and all(item in given for item in went_in)
    assert [result.id for result in results[:2]] == [1, "x"]
    assert outcomes(results)[2] == "unreadable" and results[2].attempts == 0 and results[2].done


@in_rows("wrong", [{"concurrency": 0}, {"max_attempts": 0}, {"timeout": 0}, {"timeout": float("nan")}])
async def test_options_that_cannot_be(wrong):
    with pytest.raises(ValueError, match="greater than 0"):
        await run_concurrent(["a"], shout, **wrong)


@both
async def test_no_prompts(way):
    assert await way([], shout) == []


@virtual
async def test_an_iterable_that_breaks_is_raised():
    def prompts():
        yield "a"
        raise OSError("disk")

    for way in (run_sequential, run_concurrent, gathered):
        with pytest.raises(OSError, match="disk"):
            await way(prompts(), Server(), **options())


# ---- Failures ------------------------------------------------------------------------------------------------


@in_rows("way", [run_sequential, run_concurrent, gathered])
@in_rows(
    "failure",
    [ValueError("boom"), KeyError(), http_error(400, {}, b""), ExceptionGroup("g", [ValueError()]),
     asyncio.CancelledError()],
    ids=lambda failure: type(failure).__name__,
)  # fmt: skip
@virtual
async def test_one_failure_costs_no_other_its_answer(way, failure):
    server = Server({"b": [failure]})
    results = await way(["a", "b", "c", "d"], server, **options(concurrency=2))
    found = {result.prompt.content: result for result in results}
    assert [found[prompt].text for prompt in "abcd"] == ["to a", None, "to c", "to d"]
    assert [found[prompt].error is None for prompt in "abcd"] == [True, False, True, True]
    assert found["b"].error.message and not found["b"].error.retryable
    assert (found["b"].attempts, found["b"].done) == (1, True)


@both
@virtual
async def test_a_failure_is_raised_where_that_is_asked_for(way):
    server = Server({"b": [(0.5, ValueError("boom"))]}, latency=60)
    with pytest.raises(PromptError, match="boom") as caught:
        await way(["b", "a", "c", "d"], server, return_exceptions=False, **options(concurrency=3))
    assert caught.value.error.type == "ValueError"
    assert server.in_flight == 0 and now() == pytest.approx(0.5)
    assert server.cancelled == len(server.calls) - 1 == (0 if way is run_sequential else 2)


@virtual
async def test_cancelling_a_run_cancels_its_calls():
    server = Server({"b": [(100, "B")], "c": [limited(50)]})
    task = asyncio.ensure_future(run_concurrent(list("abc"), server, **options()))
    await asyncio.sleep(11)
    assert server.in_flight == 1  # and c rests
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (server.in_flight, server.cancelled, now()) == (0, 1, pytest.approx(11))


# ---- Retries -------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    "failure", [ConnectionResetError("reset"), http_error(500, {}, b""), limited(), http_error(408, {}, b"")],
    ids=["reset", "500", "429", "408"],
)  # fmt: skip
@virtual
async def test_what_may_pass_is_tried_again(way, failure):
    server = Server({"a": [failure, failure, "A"]})
    result, other = await way(["a", "b"], server, **options())
    assert (result.text, result.error, result.attempts, result.done) == ("A", None, 3, True)
    assert (other.text, other.attempts) == ("to b", 1)
    assert result.lost == pytest.approx(2) and result.latency == pytest.approx(1)


@virtual
async def test_attempts_end(monkeypatch):
    server = Server({"b": [http_error(500, {}, b"")]})
    first, second = await run_sequential(["a", "b"], server, **options(max_attempts=4))
    assert (first.attempts, second.attempts, len(server.times("b"))) == (1, 4, 4)
    assert (second.error.type, second.error.retryable, second.done) == ("http_500", True, True)


@in_rows("draw", [0.0, 0.5, 1.0])
@virtual
async def test_backoff_is_drawn_between_nothing_and_a_ceiling_that_doubles(monkeypatch, draw):
    monkeypatch.setattr(concurrent_prompts, "backoff", functools.partial(concurrent_prompts.backoff, draw=lambda: draw))
    server = Server({"b": [http_error(500, {}, b"")]}, latency=0)
    await run_sequential(["b"], server, **options(max_attempts=12))
    waits = [two - one for one, two in itertools.pairwise(server.times("b"))]
    assert waits == pytest.approx([draw * min(60, 0.5 * 2**attempt) for attempt in range(1, 12)])


def test_backoff_stays_bounded():
    assert [concurrent_prompts.backoff(attempt, lambda: 1.0) for attempt in (1, 2, 3, 100, 10**9)] == [1, 2, 4, 60, 60]
    drawn = [concurrent_prompts.backoff(3) for _ in range(200)]
    assert 0 <= min(drawn) < 1 and 3 < max(drawn) <= 4


@pytest.mark.parametrize("status", [429, 500], ids=["everybody waits", "this one waits"])
@virtual
async def test_retry_after_is_the_floor(status):
    server = Server({"b": [limited(20, status), "B"]}, latency=0.1)
    results = await run_concurrent(["a", "b"], server, **options())
    one, two = server.times("b")
    assert 20.1 <= two - one <= 20.1 + 1 + 2 + 1e-6  # the floor, full jitter of the first back-off, and of the pause
    assert outcomes(results) == ["to a", "B"]


@virtual
async def test_a_retry_after_beyond_the_ceiling_is_said_and_cut(caplog):
    server = Server({"b": [limited(11520), "B"], "c": [http_error(500, {"retry-after": "11520"}, b""), "C"]})
    results = await run_concurrent(["a", "b", "c"], server, **options())
    assert outcomes(results) == ["to a", "B", "C"] and 120 <= now() <= 200
    assert caplog.text.count("3 h 12 min") == 1 and "120 s" in caplog.text


@virtual
async def test_one_429_pauses_everybody():
    prompts = [str(number) for number in range(40)]
    server = Server({"0": [(0.5, limited(30)), "x"]})
    results = await run_concurrent(prompts, server, **options(concurrency=4))
    assert all(result.error is None for result in results)
    assert not [when for _, when in server.calls if 0.5 < when < 30.5]
    assert max(result.limit_wait for result in results) >= 29
    first = [when for _, when in server.calls if when > 30][:3]
    assert len(set(first)) == 3  # nobody comes back in a herd


@virtual
async def test_the_clocks_add_up():
    replies = {str(number): [limited(5), http_error(500, {}, b""), "x"] for number in range(0, 30, 3)}
    ended = {}
    async for result in as_completed(map(str, range(30)), Server(replies), **options(concurrency=4)):
        ended[result.prompt.content] = now(), result
    first = min(result.started for _, result in ended.values())
    for end, result in ended.values():
        total = result.latency + result.slot_wait + result.limit_wait + result.retry_wait + result.lost
        assert result.started - first + total == pytest.approx(end, abs=1e-3)
        assert result.error is None and result.attempts == (3 if int(result.text == "x") else 1)


@virtual
async def test_the_failed_attempts_are_told_one_by_one():
    failures = [(2, http_error(500, {}, b"")), (3, ConnectionResetError())]
    server = Server({"a": [*failures, (4, "A")], "b": [(1, ValueError())]})
    a, b = await run_concurrent(["a", "b"], server, **options())
    when = [began for prompt, began in server.calls if prompt == "a"]
    assert [began for began, _ in a.tries] == pytest.approx([began - when[0] for began in when[:2]])
    assert [took for _, took in a.tries] == pytest.approx([2, 3]) and sum(took for _, took in a.tries) == a.lost
    assert "tries" not in b.as_row() and b.error is not None  # its only attempt is the last one


# ---- Timeouts ------------------------------------------------------------------------------------------------


@virtual
async def test_a_call_that_hangs_is_ended_and_tried_again():
    server = Server({"b": [(10**6, "never"), "B"], "c": [(10**6, "never")]})
    results = await run_concurrent(["a", "b", "c"], server, **options(timeout=7, max_attempts=2))
    assert outcomes(results) == ["to a", "B", "timeout"]
    lasted = pytest.approx(7, abs=0.01)
    assert (results[1].lost, results[2].latency, server.cancelled) == (lasted, lasted, 3)
    assert results[2].error.retryable and results[2].error.message


# ---- The end of a run ----------------------------------------------------------------------------------------


@virtual
async def test_a_stop_lets_calls_finish_wakes_what_rests_and_sends_nothing_more():
    server = Server({
        "slow": [(9, "done")],
        "bad": [(2, KEY)],
        "rests": [(1, http_error(500, {"retry-after": "100"}, b""))],
        "late": [(5, http_error(500, {}, b""))],
    })  # fmt: skip
    prompts = ["slow", "bad", "rests", "late", *map(str, range(50))]
    results = await run_concurrent(prompts, server, **options(concurrency=4))
    assert now() == pytest.approx(9) and len(server.calls) == 4
    assert outcomes(results[:4]) == ["done", "invalid_api_key", "http_500", "http_500"]
    assert [result.done for result in results[:4]] == [True, False, False, False]
    assert outcomes(results[4:]) == ["not_sent"] * 50
    for result in results[4:]:
        assert (result.attempts, result.done, result.text) == (0, False, None)
        assert "bad key" in result.error.message and result.error.retryable


@both
@virtual
async def test_after_a_stop_every_prompt_still_has_a_result(way):
    results = await way(["a", "b", "c"], Server({"a": [KEY], "b": [KEY], "c": [KEY]}), **options(concurrency=1))
    assert outcomes(results) == ["invalid_api_key", "not_sent", "not_sent"]
    assert [result.prompt.content for result in results] == ["a", "b", "c"]


@virtual
async def test_what_still_waited_for_its_place_was_not_sent():
    """With `auto` more prompts are pulled than calls allowed; and a pause holds up all of them."""
    server = Server({"0": [(1, KEY)]}, latency=5)
    results = await run_concurrent([*map(str, range(100))], server, **options())
    sent = {prompt for prompt, _ in server.calls}
    assert len(sent) < 100
    for result in results:
        expected = "invalid_api_key" if result.id == 1 else None if result.prompt.content in sent else "not_sent"
        assert (result.error and result.error.type) == expected
        assert result.attempts == (result.prompt.content in sent)

    server = Server({"a": [(1, limited(60))], "b": [(2, KEY)]})
    began = now()
    results = await run_concurrent(list("abcdef"), server, **options(concurrency=2))
    assert outcomes(results) == ["http_429", "invalid_api_key", *["not_sent"] * 4]
    assert now() - began == pytest.approx(2)


@virtual
async def test_a_server_that_was_never_there_stops_the_run_soon():
    server = Server({str(number): [ConnectionRefusedError("refused")] for number in range(50)}, latency=0)
    results = await run_concurrent([*map(str, range(50))], server, **options(concurrency=2))
    assert len(server.calls) <= 6 and set(outcomes(results[2:])) == {"not_sent"}
    assert "refused" in results[-1].error.message


@in_rows("heard", ["to a", *(http_error(status, {}, b"") for status in (400, 500))], ids=str)
@virtual
async def test_a_server_that_has_spoken_is_not_given_up(heard):
    server = Server({"a": [heard], "b": [ConnectionResetError("reset")]}, latency=0)
    results = await run_sequential(["a", "b", "c"], server, **options(max_attempts=5))
    assert outcomes(results)[1:] == ["connection_error", "to c"]
    assert results[1].attempts == 5


# ---- run -----------------------------------------------------------------------------------------------------


async def shout(prompt):
    await asyncio.sleep(0)
    return prompt.upper()


def test_run_is_synchronous():
    assert [result.text for result in run(["a", "b"], shout)] == ["A", "B"]


@needs_extras
async def test_run_works_where_a_loop_is_running():
    assert [result.text for result in run(["a", "b"], shout, concurrency=1)] == ["A", "B"]
    threads = threading.active_count()
    with pytest.raises(TypeError, match="list"):
        run("one text", shout)
    with pytest.raises(PromptError, match="boom"):
        run(["a"], Boom(), return_exceptions=False)
    assert threading.active_count() == threads
    assert asyncio.get_running_loop().is_running()


class Boom:
    """A callable object does as well as a function."""

    async def __call__(self, prompt):
        raise ValueError("boom")


@needs_extras
@pytest.mark.parametrize("nested", [False, True])
def test_run_leaves_no_task_behind(nested):
    ended, tasks = [], set()

    async def background():
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("background")

    async def send(prompt):
        tasks.add(asyncio.ensure_future(background()))
        await asyncio.sleep(0)
        return prompt

    async def main():
        return run(["a"], send)

    began = time.monotonic()
    (result,) = asyncio.run(main()) if nested else run(["a"], send)
    assert (result.text, ended) == ("a", ["background"]) and time.monotonic() - began < 5


# ---- The limiter ---------------------------------------------------------------------------------------------


def limiter(start, ceiling=1000):
    kind = concurrent_prompts.best("rejections", concurrent_prompts.Limiter)
    return kind(start, ceiling, asyncio.get_running_loop().time)


def settle(limiter, started, failure):
    """End a call that began then, in the last place and after a while, as seen from outside."""
    limiter.settle(Call(None, started, place=limiter.in_flight, number=limiter.sent), failure or Reply("x"))


def loop_time():
    return asyncio.get_running_loop().time()


async def fill(limiter):
    """Take every place that is free."""
    while limiter.in_flight < int(limiter.window.size):
        await limiter.turn(Call(None))


async def round_trip(limiter, failure=None):
    """Keep every place taken for a second, then end the calls with the same outcome, each followed by the next."""
    await fill(limiter)
    started, calls = loop_time(), limiter.in_flight
    await asyncio.sleep(1)
    for _ in range(calls):
        settle(limiter, started, failure)
        if failure is None:
            await fill(limiter)


@virtual
async def test_the_window_grows_until_it_is_too_much_then_gives_way_and_comes_back():
    found = limiter(16)
    grown = [found.window.size]
    for _ in range(2):
        await round_trip(found)
        grown.append(found.window.size)
    assert grown == [16, 128, 512]  # it has grown to 32 before anything was answered
    await fill(found)
    settle(found, loop_time(), limited())  # rejected at the door, as may happen once
    assert found.window.size == 512
    await found.turn(Call(None))
    settle(found, loop_time(), limited())
    assert found.window.size == 511
    for _ in range(5):
        await round_trip(found)
    assert 511 < found.window.size <= 1000


@virtual
async def test_the_limit_never_passes_its_ceiling_nor_grows_unused():
    found = limiter(4, ceiling=6)
    for _ in range(5):
        await round_trip(found)
    assert found.window.size == 6
    found = limiter(100)
    for _ in range(50):
        await found.turn(Call(None))
        settle(found, loop_time(), None)
    assert found.window.size == 100


@in_rows(
    "failure", [http_error(500, {"retry-after": "5"}, b""), http_error(400, {}, b""), PromptError("x", "m", "retry")],
    ids=["500", "400", "reset"],
)  # fmt: skip
@virtual
async def test_only_a_server_with_too_much_to_do_slows_everybody(failure):
    found = limiter(8)
    await round_trip(found, failure)
    assert found.window.size == 8
    assert await found.turn(Call(None)) == 0 and now() < 1.1


@virtual
async def test_a_pause_is_shared_and_its_end_is_spread():
    found = limiter(100)
    await found.turn(Call(None))
    settle(found, loop_time(), limited(30))
    found.window.size = 100.0
    waits = await asyncio.gather(*(found.turn(Call(None)) for _ in range(50)))
    assert all(30 <= wait <= 32 for wait in waits) and len(set(waits)) > 40
    await asyncio.sleep(2)
    assert await found.turn(Call(None)) == 0


@virtual
async def test_a_longer_pause_replaces_a_shorter_one_and_not_the_other_way():
    found = limiter(3)
    for _ in range(3):
        await found.turn(Call(None))
    for wait in (5, 50, 1):
        settle(found, loop_time(), limited(wait))
    assert 49.99 <= await found.turn(Call(None)) <= 51


@virtual
async def test_turns_are_taken_in_order():
    found, order = limiter(1), []

    async def call(name, times=1):
        for _ in range(times):
            await found.turn(Call(None))
            order.append(name)
            await asyncio.sleep(1)
            settle(found, -1, PromptError("x", "m"))

    await asyncio.gather(*(call(name) for name in "abcde"))
    assert "".join(order) == "abcde"
    order.clear()
    await asyncio.gather(call("a", 3), call("b"), call("c"))  # who comes back at once goes to the end
    assert "".join(order) == "abcaa"


@in_rows("pause", [None, 10], ids=["plain", "during a pause"])
@in_rows("when", ["before its turn", "at its turn", "after its turn"])
@virtual
async def test_a_cancelled_waiter_passes_its_turn_on(when, pause):
    found = limiter(1)
    await found.turn(Call(None))
    first, second = asyncio.ensure_future(found.turn(Call(None))), asyncio.ensure_future(found.turn(Call(None)))
    await asyncio.sleep(0)
    if when == "before its turn":
        first.cancel()
    settle(found, loop_time(), limited(pause) if pause else None)
    if when == "after its turn":
        await asyncio.sleep(0)
        if first.done():  # without a pause it has its place by now
            settle(found, -1, None)
    first.cancel()
    await asyncio.wait_for(second, 60)
    assert (found.in_flight, second.result()) == (1, pytest.approx(pause or 0, abs=1.1))


@virtual
async def test_the_repr_says_what_matters():
    found = limiter(4)
    await found.turn(Call(None))
    await found.turn(Call(None))
    settle(found, loop_time(), limited(30))
    assert repr(found) == "<Limiter 1 in flight of 4 allowed, pausing as the server requested, 30.0 s left>"


@both
async def test_what_is_no_function_is_refused_at_once(way):
    with pytest.raises(TypeError, match="neither a coroutine function nor a loaded backend"):
        await way(["a"], None)


async def test_as_completed_raises_where_that_is_asked_for():
    async def send(prompt):
        raise KeyError("no")

    with pytest.raises(PromptError) as caught:
        async for _ in as_completed(["a"], send, return_exceptions=False):
            pass
    assert isinstance(caught.value.__cause__, KeyError)


async def test_exceptions_that_go_round_in_a_circle_and_odd_headers():
    async def send(prompt):
        failure = ValueError("round")
        failure.status, failure.headers = (500, [("a", "b")]) if prompt == "b" else (None, None)
        raise failure from failure

    results = await run_concurrent(["a", "b"], send, max_attempts=1)
    assert [result.error.type for result in results] == ["ValueError", "http_500"]


async def test_a_great_bound_costs_nothing():
    results = await run_concurrent(["a", "b"], shout, concurrency=10**9)
    assert [result.text for result in results] == ["A", "B"]


# ---- Outages -------------------------------------------------------------------------------------------------


class Outage(Server):
    """A server that answers within `latency` seconds, but refuses connections in `gap`, where it also drops calls."""

    def __init__(self, gap, latency=0.3):
        super().__init__(latency=latency)
        self.gap, self.refused = gap, 0

    async def __call__(self, prompt):
        begin, end = self.gap
        if begin <= now() < end:
            self.refused += 1
            raise ConnectionRefusedError("refused")
        if now() < begin <= now() + self.latency:
            await asyncio.sleep(begin - now() + 1e-6)
            raise ConnectionResetError("reset")
        return await super().__call__(prompt)


@pytest.mark.parametrize(("concurrency", "away"), [(1, 20), (50, 20), (50, 300), ("auto", 20), ("auto", 300)])
@virtual
async def test_an_outage_is_waited_for_and_costs_no_prompt_an_attempt(concurrency, away):
    prompts = [str(number) for number in range(20 if concurrency == 1 else 500)]
    undisturbed = Server(latency=0.3)
    await run_concurrent(prompts, undisturbed, **options(concurrency=concurrency))
    ideal, server = now(), Outage((now() + 0.7, now() + 0.7 + away))
    results = await run_concurrent(prompts, server, **options(concurrency=concurrency, max_attempts=2))
    assert all(result.error is None and result.attempts <= 2 for result in results)
    assert server.refused <= away + 3
    assert now() - ideal <= ideal + away + 2
    assert max(result.limit_wait for result in results) >= away - 1


@virtual
async def test_a_server_that_shuts_down_in_good_order_meets_few_connects():
    """What is in flight is still answered while nobody listens any longer."""
    server, refused = Server({str(number): [(1 + number % 13, "x")] for number in range(200)}), []

    async def send(prompt):
        if 5 <= now() < 25:
            refused.append(prompt)
            raise ConnectionRefusedError("refused")
        return await server(prompt)

    results = await run_concurrent(server.replies, send, **options(concurrency=50))
    assert all(result.text == "x" for result in results) and len(refused) <= 25


def api_of(post):
    """Return an API whose backend posts by that function."""

    @contextlib.asynccontextmanager
    async def connect(base_url, headers, concurrency):
        yield post

    return api_file.Api(connect, base_url="http://127.0.0.1/v1")


def answering(text):
    """Return the reply of a server that answers so."""
    return 200, {}, b'{"choices": [{"message": {"content": "%b"}, "finish_reason": "stop"}]}' % text.encode()


REFUSED, RESET = ConnectionRefusedError("refused"), ConnectionResetError("reset")


@pytest.mark.parametrize(("failure", "concurrency"), [(REFUSED, 1), (REFUSED, 5), (RESET, 5)], ids=str)
@virtual
async def test_the_outage_of_an_api_is_waited_for_by_a_few_prompts_alone(failure, concurrency):
    async def post(path, body):
        await asyncio.sleep(0.3)
        if 0.7 <= now() < 300:
            raise failure
        return answering("x")

    prompts = list("abcdefghijklmnop")
    results = await run_concurrent(prompts, api_of(post), **options(concurrency=concurrency, max_attempts=4))
    assert [result.text for result in results] == ["x"] * 16 and 300 <= now() < 306


@pytest.mark.parametrize("concurrency", [20, "auto"])
@pytest.mark.parametrize("status", [500, 502, 503])
@virtual
async def test_errors_before_the_outage_was_known_cost_no_attempt_either(status, concurrency):
    latencies = itertools.cycle([0.1, 0.7, 0.2, 0.4, 0.3])

    async def post(path, body):
        away = 0.7 <= now() < 20
        await asyncio.sleep(0.01 if away else next(latencies))
        return (status, {}, b"<html>") if away else answering("x")

    prompts = [str(number) for number in range(300)]
    results = await run_concurrent(prompts, api_of(post), **options(concurrency=concurrency))
    assert [(result.text, result.attempts) for result in results] == [("x", 1)] * 300 and now() < 27


@virtual
async def test_calls_that_are_never_answered_are_given_up_when_all_prompts_are_out():
    dice = random.Random(1)

    async def post(path, body):
        if dice.random() < 0.06:
            await asyncio.sleep(1e6)
        await asyncio.sleep(0.3 * math.exp(dice.gauss(0, 0.5)))
        return answering("x")

    results = await run_concurrent([str(number) for number in range(500)], api_of(post), **options(concurrency="auto"))
    assert all(result.text == "x" for result in results) and now() < 6


# ---- Prompts that meet an outage alone -----------------------------------------------------------------------


@in_rows("poisoned", ["b", "bcd"])
@in_rows("failure", [REFUSED, RESET], ids=repr)
@in_rows("concurrency", [1, 4, "auto"])
@virtual
async def test_prompts_that_alone_find_nobody_fail_in_the_end(poisoned, failure, concurrency):
    server = Server({prompt: [(0.1, failure)] for prompt in poisoned}, latency=0.3)
    results = await run_concurrent(list("abcde"), server, **options(concurrency=concurrency, max_attempts=4))
    expected = [type(failure).__name__ if prompt in poisoned else None for prompt in "abcde"]
    assert [type(result.exception.__cause__).__name__ if result.error else None for result in results] == expected
    assert all(result.done and result.attempts <= 4 for result in results)
    assert sum(len(server.times(prompt)) for prompt in poisoned) <= 36 * len(poisoned) and now() < 60 * len(poisoned)


@in_rows("concurrency", [1, 4, "auto"])
@virtual
async def test_prompts_on_which_a_server_hangs_up_fail_soon(concurrency):
    """It is asked for its models, which shows that it is there."""
    calls = []

    async def post(path, body):
        calls.append(path)
        await asyncio.sleep(0.1)
        if path == "/models":
            return 404, {}, b""
        if b"poison" in body:
            raise ConnectionResetError("reset")
        return answering("x")

    prompts = ["a", "poison 1", "poison 2", "b", "poison 3", "c"]
    results = await run_concurrent(prompts, api_of(post), **options(concurrency=concurrency, max_attempts=4))
    assert [result.error and result.error.type for result in results] == [
        None, "connection_error", "connection_error", None, "connection_error", None,
    ]  # fmt: skip
    assert now() < 60 and len(calls) < 40


def endless():
    yield from map(str, itertools.count())


@pytest.mark.parametrize("reply", [None, "stop"])
@both
@virtual
async def test_a_run_over_endless_prompts_ends(way, reply):
    server = Server({str(number): [KEY] * 9 for number in range(20, 40)} if reply else {}, latency=0.3)
    results = await way(endless(), server, **options(concurrency=4, deadline=None if reply else 9))
    assert now() < 10 and len(results) >= 21 and {result.text for result in results[:20]} == {
        f"to {number}" for number in range(20)
    }  # fmt: skip


async def at_once(prompt):
    return prompt


async def holding_up(prompt):
    time.sleep(0.1)
    return prompt


@pytest.mark.parametrize("send", [at_once, holding_up])
@both
async def test_a_deadline_ends_a_run_whose_function_never_lets_go_of_the_event_loop(way, send):
    began = time.monotonic()
    results = await way(endless(), send, deadline=0.2)
    assert time.monotonic() - began < 2 and len(results) > 1 and results[0].text == "0"


@virtual
async def test_timers_that_are_always_late_are_heard_all_the_same():
    loop = asyncio.get_running_loop()

    async def flooded(prompt):
        for _ in range(100):
            await asyncio.sleep(0)
            loop.now += 2.0  # so long was each turn of the event loop

    (result,) = await run_concurrent(["a"], flooded, **options(deadline=9))
    assert result.error.type == "deadline" and now() < 25


@virtual
async def test_as_completed_over_endless_prompts_ends():
    texts = [result.text async for result in as_completed(endless(), Server(latency=0.3), **options(deadline=3))]
    assert len(texts) > 20 and now() < 4


@virtual
async def test_the_outage_is_said_once_and_so_is_its_end(caplog):
    await run_concurrent(map(str, range(100)), Outage((1, 9)), **options(concurrency=10))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and said[0].startswith("server unreachable (")
    assert 8 <= float(said[1].removeprefix("the server is back after ").removesuffix(" s")) <= 9.5


@virtual
async def test_a_connection_that_is_lost_now_and_then_holds_nobody_up():
    replies = {str(number): [(0.3, ConnectionResetError()), (0.3, "x")] for number in range(0, 1000, 20)}
    results = await run_concurrent(map(str, range(1000)), Server(replies, latency=0.3), **options(concurrency=50))
    assert all(result.error is None and result.retry_wait == 0 for result in results)
    assert now() < 0.3 * 1050 / 50 + 1


@virtual
async def test_after_a_lost_connection_one_call_goes_ahead():
    """A slow server may still be there: the others wait for a second at most."""
    server = Server({str(number): [(1, ConnectionResetError()), (20, "x")] for number in range(10)})
    results = await run_concurrent(map(str, range(10)), server, **options(concurrency=10))
    assert [len([when for _, when in server.calls if begin <= when < begin + 0.9]) for begin in (0, 1)] == [10, 1]
    assert all(result.text == "x" for result in results) and now() < 23.5


# ---- Lost calls ----------------------------------------------------------------------------------------------


@virtual
async def test_a_call_that_never_answers_does_not_cost_the_timeout():
    replies = {str(number): [(10**6, "never"), (0.5, "x")] for number in range(50, 1000, 100)}
    server = Server(replies, latency=0.5)
    results = await run_concurrent(map(str, range(1000)), server, **options(concurrency=50))
    assert all(result.error is None for result in results) and now() < 15
    assert sum(result.attempts for result in results) == 1010


@virtual
async def test_an_honest_slow_answer_comes_in_the_end_and_few_are_asked_twice():
    replies = {str(number): [(200, "slow")] for number in range(10, 2000, 20)}
    results = await run_concurrent(map(str, range(2000)), Server(replies, latency=1), **options(concurrency=100))
    slow = [result for result in results if result.text == "slow"]
    assert len(slow) == 100 and all(result.error is None for result in results)
    assert max(result.attempts for result in slow) <= 6
    assert sum(result.attempts for result in results) <= 2000 * 1.06


@virtual
async def test_a_server_at_a_standstill_is_waited_for():
    async def send(prompt):
        await asyncio.sleep(1)
        if 10 <= now() < 40:
            await asyncio.sleep(40 - now() + int(prompt) % 10 / 10)
        calls.append(prompt)
        return prompt

    calls = []
    results = await run_concurrent(map(str, range(2000)), send, **options(concurrency=50))
    assert all(result.error is None for result in results)
    assert sum(result.attempts for result in results) <= 2005


class Silence:
    """A server that answers after lognormal latencies, but nothing that it is asked, or still has, in `gap`."""

    def __init__(self, gap, seed):
        self.gap, self.draw, self.sent = gap, random.Random(seed), []

    async def __call__(self, prompt):
        self.sent.append(prompt)
        latency = 0.3 * math.exp(0.5 * self.draw.gauss(0, 1))
        if now() < self.gap[1] and now() + latency >= self.gap[0]:
            latency = 10**6
        await asyncio.sleep(latency)
        return prompt


@pytest.mark.parametrize(("concurrency", "length", "seed"), [(20, 20, 0), (20, 120, 1), ("auto", 20, 2), (3, 20, 0)])
@virtual
async def test_a_server_that_is_silent_for_a_while_costs_little_more_than_that(concurrency, length, seed):
    """Connections are accepted and never answered; those calls are lost for good."""
    prompts = [*map(str, range(1000))]
    undisturbed = Silence((math.inf, -math.inf), seed)
    await run_concurrent(prompts, undisturbed, **options(concurrency=concurrency))
    ideal = now()
    server = Silence((ideal + 3, ideal + 3 + length), seed)
    results = await run_concurrent(prompts, server, **options(concurrency=concurrency, max_attempts=3))
    assert all(result.error is None and result.attempts <= 3 for result in results)
    assert now() - ideal <= ideal + length + max(9, 0.15 * (ideal + length))
    in_flight = max(result.lost > 1 for result in results) and sum(result.lost > 1 for result in results)
    assert len(server.sent) - 1000 <= in_flight + 4 + length / 8


@virtual
async def test_each_silence_is_asked_about():
    """Tries with prompts come ever more rarely; a request that costs nothing tells soon that the server is back."""
    silences, answered = [(2, 30), (40, 70)], []

    async def post(path, body):
        if any(begin <= now() < end for begin, end in silences):
            await asyncio.sleep(10**6)
        await asyncio.sleep(0.3)
        answered.append(now())
        return answering("x")

    results = await run_concurrent(map(str, range(1000)), api_of(post), **options(concurrency=5))
    assert all(result.error is None for result in results)
    for _, end in silences:
        assert min(when for when in answered if when > end) < end + 2


@virtual
async def test_a_stop_does_not_wait_for_a_silent_server():
    server = Silence((3, math.inf), seed=1)
    async with concurrent_prompts.Run(server, concurrency=20, **options()) as work:
        asyncio.get_running_loop().call_later(8, work.stop, PromptError("interrupted", "interrupted", "stop"))
        prompts, results = concurrent_prompts.as_prompts(map(str, range(1000))), []
        await concurrent_prompts.concurrently(work, prompts, results.append)
    assert now() < 12 and sum(result.error is None for result in results) > 100
    assert sum(not result.done for result in results) == 20


@virtual
async def test_a_lost_call_in_a_sequential_run_is_tried_again():
    server = Server({"30": [(10**6, "never"), (1, "x")]})
    results = await run_sequential(map(str, range(40)), server, **options())
    assert all(result.error is None for result in results) and now() < 50


# ---- Deadline ------------------------------------------------------------------------------------------------


@both
@virtual
async def test_the_deadline_ends_the_run_and_what_is_in_flight(way):
    server = Server(latency=3)
    results = await way([*map(str, range(100))], server, **options(concurrency=10, deadline=10))
    assert now() == pytest.approx(10) and server.in_flight == 0
    answered = [result for result in results if result.error is None]
    assert len(answered) == (3 if way is run_sequential else 30)
    assert {result.error.type for result in results if result.error} == {"deadline", "not_sent"}
    assert all(not result.done for result in results if result.error)


@in_rows("failure", [ConnectionRefusedError(), limited(100), http_error(500, {}, b"")], ids=str)
@virtual
async def test_the_deadline_ends_every_kind_of_wait(failure):
    server = Server({"b": [failure]}, latency=0)
    results = await run_concurrent(["a", "b", "c"], server, **options(deadline=4, concurrency=1, max_attempts=99))
    assert now() == pytest.approx(4) and [result.done for result in results] == [True, False, False]


# ---- What a server writes does not steer the run -------------------------------------------------------------


@in_rows("code", ["unreachable", "connection_error", "lost", "timeout", "deadline", "disk"])
@virtual
async def test_the_servers_own_words_are_not_ours(code):
    failure = http_error(503, {}, b'{"error": {"message": "m", "code": "%b"}}' % code.encode())
    server = Server({"b": [failure]}, latency=0)
    first, second = await run_sequential(["a", "b"], server, **options(max_attempts=4))
    assert (first.text, second.error.type, second.attempts, len(server.times("b"))) == ("to a", code, 4, 4)
    assert "the server's own fault" in hint(second.error) and second.done


# ---- Doubt ---------------------------------------------------------------------------------------------------


@virtual
async def test_a_few_refused_connections_are_no_outage(caplog):
    replies = {str(number): [(0, ConnectionRefusedError()), (0.3, "x")] for number in range(0, 1000, 50)}
    results = await run_concurrent(map(str, range(1000)), Server(replies, latency=0.3), **options(concurrency=50))
    assert all(result.error is None and result.attempts == 1 for result in results)
    assert now() < 8 and not caplog.records


@virtual
async def test_a_prompt_that_alone_is_always_refused_fails():
    server = Server({"b": [(0, ConnectionRefusedError())]}, latency=0.3)
    results = await run_concurrent(["a", "b", *map(str, range(100))], server, **options(concurrency=5))
    assert outcomes(results).count("unreachable") == 1 and results[1].done and len(server.times("b")) < 30


@virtual
async def test_an_outage_of_lost_connections_is_one_too():
    """As of a port that something else forwards: it accepts, and then there is nobody."""

    async def send(prompt):
        await asyncio.sleep(0.3)
        if 2 <= now() < 302:
            calls.append(now())
            raise ConnectionResetError("reset")
        return prompt

    calls = []
    results = await run_concurrent(map(str, range(1000)), send, **options(concurrency=50))
    assert all(result.error is None for result in results)
    assert len(calls) < 400 and now() < 312


@virtual
async def test_a_slow_server_is_not_given_up_for_one_lost_prompt():
    server = Server({"0": [ConnectionResetError("reset")]}, latency=30)
    results = await run_concurrent(map(str, range(100)), server, **options(concurrency=20, timeout=100))
    assert outcomes(results).count("connection_error") == 1 and [result.done for result in results] == [True] * 100


@virtual
async def test_a_timer_that_comes_late_lets_what_has_come_be_read_first():
    """As after a process was stopped for a while (Ctrl-Z): the clock has jumped, the replies are in the buffers."""

    async def send(prompt):
        await asyncio.sleep(2)
        return prompt

    loop = asyncio.get_running_loop()
    loop.call_later(1, lambda: setattr(loop, "now", loop.now + 60))
    results = await run_concurrent(["a", "b"], send, **options(timeout=10, deadline=30))
    assert outcomes(results) == ["a", "b"] and [result.attempts for result in results] == [1, 1]


# ---- Evidence before a stop ----------------------------------------------------------------------------------


def refusing(status, message="not for you"):
    return status, {}, b'{"error": {"message": "%b"}}' % message.encode()


def picky(refuses, status=403, latency=0.3):
    """Return a server that refuses the prompts of which that is true, at once, and answers the others; and its log."""
    calls = []

    async def post(path, body):
        prompt = body.partition(b'"content":"')[2].partition(b'"')[0].decode()
        calls.append(prompt)
        refused = refuses(int(prompt), len(calls))
        await asyncio.sleep(0.02 if refused else latency)
        return refusing(status) if refused else answering("x")

    return post, calls


@pytest.mark.parametrize("status", [402, 403, 404])
@both
@virtual
async def test_a_refusal_of_one_prompt_among_others_is_its_own(way, status):
    post, calls = picky(lambda number, _: number == 2 and (status == 403 or len(calls) > 4), status)
    results = await way([str(number) for number in range(2 if status == 403 else 0, 12)], api_of(post), **options())
    refused = [result for result in results if result.error]
    assert all(result.done and result.error.status == status for result in refused) and len(refused) <= 1
    assert len(calls) <= len(results) + 3


@virtual
async def test_a_key_that_is_refused_from_some_moment_on_stops_the_run():
    post, calls = picky(lambda number, so_far: so_far > 100, 401)
    async with concurrent_prompts.Run(api_of(post), **options(concurrency=10)) as run:
        results = []
        prompts = concurrent_prompts.as_prompts([str(number) for number in range(500)])
        await concurrent_prompts.concurrently(run, prompts, results.append)
    assert run.stopped.error.status == 401 and run.stopped.prompt.content in calls and len(calls) <= 100 + 10 + 6
    assert all(result.error is None or not result.done for result in results)


@pytest.mark.parametrize(("status", "most"), [(401, 8), (403, 12), (400, 16), (500, 40), (429, 40)])
@virtual
async def test_a_run_stops_where_everything_is_refused_alike(status, most, caplog):
    post, calls = picky(lambda *_: True, status)
    async with concurrent_prompts.Run(api_of(post), **options()) as run:
        results = []
        prompts = concurrent_prompts.as_prompts([str(number) for number in range(200)])
        await concurrent_prompts.concurrently(run, prompts, results.append)
    assert run.stopped.error.message == "not for you" and len(calls) <= most and not run.limiter.learned()
    if status in (400, 500, 429):
        assert "every call so far failed with the same error" in caplog.text
        assert "/chat/completions" in hint(run.stopped.error, run.stopped.asked)
