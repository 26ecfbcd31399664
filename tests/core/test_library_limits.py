"""limits=: several runs in one process share what a server lets through."""

import asyncio
import bisect
from concurrent.futures import ThreadPoolExecutor

import pytest

from concurrent_prompts import Limits, http_error, load_backend, run, run_concurrent, run_sequential
from tests.core.test_library import gathered, shout
from tests.helpers import in_rows, virtual

pytest.importorskip("concurrent_prompts.extras.limits")


class Server:
    """The user's own function in front of a bucket of `rate` calls a second, which rejects what is too much."""

    def __init__(self, rate=None, latency=0.2, holds=2.0):
        self.rate, self.latency, self.holds = rate, latency, holds
        self.times, self.rejected, self.in_flight, self.most = [], 0, 0, 0
        self._level, self._stamp = 1.0, 0.0

    async def __call__(self, prompt):
        now = asyncio.get_running_loop().time()
        if self.rate:
            self._level = min(self.holds, self._level + (now - self._stamp) * self.rate)
            self._stamp = now
            if self._level < 1:
                self.rejected += 1
                raise http_error(429, {}, b"")
            self._level -= 1
        self.times.append(now)
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        await asyncio.sleep(self.latency)
        self.in_flight -= 1
        return prompt.upper()


def shared(**limits):
    return Limits(clock=asyncio.get_running_loop().time, **limits)


def prompts(name, count=80):
    return [f"{name}{number}" for number in range(count)]


@virtual
async def test_four_runs_at_once_keep_to_one_limit():
    server, limits = Server(rate=10.0), shared(rpm=600)
    began = asyncio.get_running_loop().time()
    found = await asyncio.gather(*(run_concurrent(prompts(name), server, limits=limits) for name in "abcd"))
    took = asyncio.get_running_loop().time() - began
    assert [result.text for results in found for result in results] == [
        text.upper() for name in "abcd" for text in prompts(name)
    ]
    assert server.rejected < 6 and 30 < took < 34
    assert limits.learned() == ["600 requests/min, as given"] and "in flight" in repr(limits)


@virtual
async def test_without_it_they_do_not():
    server, clock = Server(rate=10.0), asyncio.get_running_loop().time
    await asyncio.gather(*(run_concurrent(prompts(name), server, rpm=600, clock=clock) for name in "abcd"))
    assert server.rejected > 30


@virtual
async def test_no_run_starves_the_others():
    server, limits, ends = Server(), shared(rpm=600), {}

    async def one(name):
        await run_concurrent(prompts(name, 40), server, limits=limits)
        ends[name] = asyncio.get_running_loop().time()

    await asyncio.gather(*map(one, "abcd"))
    assert max(ends.values()) - min(ends.values()) < 6


@virtual
async def test_a_run_that_begins_later_gets_its_share():
    server, limits = Server(latency=1.0), shared(concurrency=8)
    first = asyncio.ensure_future(run_concurrent(prompts("a", 400), server, limits=limits))
    await asyncio.sleep(5)
    began = asyncio.get_running_loop().time()
    await run_concurrent(prompts("b", 40), server, limits=limits)
    assert asyncio.get_running_loop().time() - began < 12 and not first.done()  # half of 8 a second
    await first


@virtual
async def test_what_one_run_has_learned_the_next_one_knows():
    server, limits = Server(rate=10.0, holds=50.0), shared()
    await run_concurrent(prompts("a", 300), server, limits=limits)
    assert "requests/min" in limits.learned()[0]
    learning, server.rejected = server.rejected, 0
    results = await gathered(prompts("b", 300), server, limits=limits)
    assert len(results) == 300 and server.rejected < learning / 2, (learning, server.rejected)


@virtual
async def test_the_calls_in_flight_are_bounded_together():
    server, limits = Server(), shared(concurrency=5)
    await asyncio.gather(*(run_concurrent(prompts(name, 20), server, limits=limits) for name in "abc"))
    assert server.most == 5


@virtual
async def test_a_run_that_is_cancelled_gives_its_places_back():
    server, limits = Server(latency=50.0), shared(concurrency=3)
    first = asyncio.ensure_future(run_concurrent(prompts("a"), server, limits=limits))
    await asyncio.sleep(1)
    first.cancel()
    await asyncio.wait([first])
    server.latency = 0.1
    assert len(await run_concurrent(prompts("b"), server, limits=limits)) == 80


def test_runs_one_after_another_have_event_loops_of_their_own():
    limits = Limits(rpm=60_000, concurrency=2)
    for _ in range(2):
        assert len(run(prompts("a", 20), shout, limits=limits)) == 20
        assert len(asyncio.run(run_concurrent(prompts("b", 20), shout, limits=limits))) == 20


def test_runs_in_threads_keep_to_one_limit():
    """60 calls at 6,000 a minute take 0.6 s, whichever thread they are of; never are there many more in 0.1 s."""
    limits, server = Limits(rpm=6_000, concurrency=4), Server(latency=0.001)
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(run, prompts(name, 15), server, limits=limits) for name in "abcd"]
        assert all(result.text for one in runs for result in one.result(20))
    times = sorted(server.times)
    assert max(bisect.bisect(times, when + 0.1) - place for place, when in enumerate(times)) <= 16
    assert times[-1] - times[0] > 0.5 and server.most <= 4 + 3
    assert limits.limiter.in_flight == 0


@in_rows("wrong", [{"rpm": 0}, {"tpm": -1}, {"concurrency": 0}])
def test_limits_are_above_zero(wrong):
    with pytest.raises(ValueError, match="greater than 0"):
        Limits(**wrong)


def test_limits_are_told_once():
    with pytest.raises(ValueError, match="set in Limits"):
        run(["a"], shout, limits=Limits(), rpm=5)
    pytest.importorskip("openai")
    with pytest.raises(ValueError, match="no bulk backend"):
        run(["a"], load_backend("openai-batch", base_url="http://127.0.0.1:9/v1"), limits=Limits())


@pytest.mark.parametrize("way", [run_sequential, run_concurrent])
async def test_a_run_inside_a_call_does_not_wait_for_the_slot_of_that_call(way):
    limits, later = Limits(concurrency=1), []

    async def inner(prompt):
        return prompt.upper()

    async def outer(prompt):
        later.append(asyncio.create_task(afterwards()))
        return (await way([prompt], inner, limits=limits if prompt == "b" else Limits(concurrency=1)))[0].text

    async def afterwards():
        await ended.wait()
        return (await way(["late"], inner, limits=limits))[0].text

    ended = asyncio.Event()
    first, second = await way(["a", "b"], outer, limits=limits)
    assert first.text == "A" and second.error.type == "UsageError" and "other limits" in second.error.message
    ended.set()
    assert await asyncio.gather(*later) == ["LATE", "LATE"] and (await way(["c"], inner, limits=limits))[0].text == "C"
