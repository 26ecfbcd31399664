"""A lone copy: one's own function with neither backends/ nor extras/ beside the module.

It gives way to limits, waits for outages and tells a prompt's own failure from everybody's, in plainer ways.
"""

import asyncio
import os
import signal

import pytest

import concurrent_prompts
from concurrent_prompts import UsageError, run, run_concurrent
from tests.helpers import virtual


class Failed(Exception):
    def __init__(self, status):
        super().__init__(f"HTTP {status}")
        self.status_code = status


@pytest.fixture(autouse=True)
def lone(monkeypatch):
    def missing(folder, name, asked=""):
        raise UsageError(f"{asked} needs {folder}/{name}.py")

    monkeypatch.setattr(concurrent_prompts, "sibling", missing)
    concurrent_prompts.meanings.cache_clear()
    yield
    concurrent_prompts.meanings.cache_clear()


def now():
    return asyncio.get_running_loop().time()


async def answer(send, count=200, **options):
    """Answer so many prompts on the event loop's own clock; return the Results and the seconds."""
    began = now()
    results = await run_concurrent([str(number) for number in range(count)], send, clock=now, **options)
    return results, now() - began


@virtual
async def test_a_gate_is_given_way_to():
    level, rejected = [10.0, 0.0], []

    async def send(prompt):
        level[:] = min(10.0, level[0] + 40 * (now() - level[1])), now()
        if level[0] < 1:
            rejected.append(prompt)
            raise Failed(429)
        level[0] -= 1
        await asyncio.sleep(0.1)
        return prompt

    results, span = await answer(send)
    assert all(result.error is None for result in results)
    assert span < 3 * 190 / 40 and len(rejected) <= 40


@virtual
async def test_a_cap_of_calls_at_once_is_given_way_to():
    flying, rejected = set(), []

    async def send(prompt):
        if len(flying) >= 3:
            rejected.append(prompt)
            raise Failed(503)
        flying.add(prompt)
        await asyncio.sleep(0.1)
        flying.remove(prompt)
        return prompt

    results, span = await answer(send)
    assert all(result.error is None for result in results)
    assert span < 3 * 200 * 0.1 / 3 and len(rejected) <= 40


@virtual
async def test_a_server_that_is_busy_now_and_then_slows_nobody_down():
    calls = []

    async def send(prompt):
        calls.append(prompt)
        await asyncio.sleep(0.5)
        if len(calls) % 100 == 0:
            raise Failed(503)
        return prompt

    results, span = await answer(send, 2000)
    assert all(result.error is None for result in results) and span < 20


@virtual
async def test_a_limit_a_minute_costs_few_attempts():
    window = [0, 0]

    async def send(prompt):
        window[:] = now() // 60, (window[1] if window[0] == now() // 60 else 0) + 1
        if window[1] > 300:
            raise Failed(429)
        await asyncio.sleep(0.5)
        return prompt

    results, _ = await answer(send, 900)
    assert all(result.error is None for result in results) and max(result.attempts for result in results) < 6


@virtual
async def test_a_server_that_was_never_there_is_soon_given_up(caplog):
    async def send(prompt):
        raise ConnectionRefusedError("nobody there")

    results, span = await answer(send, 40)
    assert span < 5 and {result.error.type for result in results} == {"unreachable", "not_sent"}
    assert "server unreachable (nobody there): retrying once a second" in caplog.text


@virtual
async def test_an_outage_is_waited_for():
    async def send(prompt):
        if 1 < now() < 31:
            raise ConnectionRefusedError("nobody there")
        await asyncio.sleep(0.1)
        return prompt

    results, span = await answer(send, 300, concurrency=10)
    assert all(result.error is None for result in results) and span < 40


@virtual
async def test_a_404_of_some_prompts_is_their_own():
    async def send(prompt):
        await asyncio.sleep(0.1)
        if prompt in ("0", "50", "90"):
            raise Failed(404)
        return prompt

    results, _ = await answer(send, 100, concurrency=4)
    assert [result.prompt.content for result in results if result.error] == ["0", "50", "90"]


@virtual
async def test_a_key_that_is_refused_stops_the_run():
    calls = []

    async def send(prompt):
        calls.append(prompt)
        await asyncio.sleep(0.1)
        raise Failed(401)

    results, _ = await answer(send, 100, concurrency=4)
    assert len(calls) <= 4 and {result.error.type for result in results} == {"http_401", "not_sent"}


@virtual
async def test_a_first_prompt_that_takes_too_long_stops_no_run():
    async def send(prompt):
        await asyncio.sleep(100 if prompt == "0" else 0.1)
        return prompt

    results, _ = await answer(send, 10, concurrency=1, timeout=5, max_attempts=3)
    assert [result.error and result.error.type for result in results] == ["timeout"] + [None] * 9


@virtual
async def test_a_run_that_is_cancelled_says_so_and_leaves_nothing_behind():
    async def send(prompt):
        await asyncio.sleep(1)
        return prompt

    for options in {}, {"rpm": 60}:  # some of whose calls wait for the time to come
        running = asyncio.ensure_future(answer(send, 100, concurrency=5, **options))
        await asyncio.sleep(3.5)
        running.cancel()
        with pytest.raises(asyncio.CancelledError) as stopped:
            await running
        assert len(stopped.value.results) == (15 if not options else 3)
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.skipif(os.name == "nt", reason="Windows' own Ctrl-C")
def test_an_interrupt_has_the_results_so_far():
    async def send(prompt):
        if prompt == "2":
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(10)
        return prompt

    with pytest.raises(KeyboardInterrupt) as stopped:
        run(list("0123"), send, concurrency=1)
    assert [result.text for result in stopped.value.results] == ["0", "1"]
