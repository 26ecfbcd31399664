"""The server's limits, learned: the stand-in's own logic on a clock that jumps, so that minutes take milliseconds.

What is tuned in the limiter was tuned on the seeds 0 to 23; here is another.
"""

import asyncio
import contextlib
import heapq
import math
import random
import time

import pytest

from concurrent_prompts import AUTO_CONCURRENCY, Run, as_prompts, concurrently, run_concurrent
from concurrent_prompts.backends.api import Api
from concurrent_prompts.backends.limiter import Window
from concurrent_prompts.backends.limits import limits_in
from tests.helpers import in_rows, virtual

stand_in = pytest.importorskip("concurrent_prompts.extras.stand_in")

SEEDS = (101,)
LATENCY = {"latency": 0.3, "sigma": 0.5}
ROUND_TRIP = 0.002  # seconds
HEAD = stand_in.Head("POST", "/v1/chat/completions", 0, old=False, keep=True, expect=False, authorization="")


class Link:
    """Where the stand-in sends a reply: into a future."""

    def __init__(self):
        self.reply = asyncio.get_running_loop().create_future()

    def send(self, reply, cut=False):
        if not self.reply.done():
            self.reply.set_result(reply)

    def reset(self):
        if not self.reply.done():
            self.reply.set_exception(ConnectionResetError("reset"))

    def advance(self):
        """There is no next request on this connection."""


@pytest.fixture(autouse=True)
def seeded():
    random.seed(7)  # the limiter draws, too


class Simulation:
    """A stand-in server, reached through a backend that is only its clock's."""

    def __init__(self, **options):
        self.loop = asyncio.get_running_loop()
        self.server = stand_in.Server(stand_in.Options(**LATENCY | options), self.loop.time)
        self.server._loop = self.loop
        self.came, self.ended, self.latencies, self.rejected = [], [], {}, 0
        self.in_flight, self.area = 0, 0.0

    @contextlib.asynccontextmanager
    async def connect(self, base_url, headers, concurrency):
        yield self.post

    async def post(self, path, body):
        await asyncio.sleep(ROUND_TRIP / 2)
        job = stand_in.Job(Link(), HEAD, self.loop.time())
        self.came.append(self.loop.time())
        try:
            self.server.accept(job, body)
            reply = await job.link.reply
        except asyncio.CancelledError:
            self.server.drop(job)
            raise
        took = self.loop.time() - self.came[-1] if job.fault else job.latency
        self.area += self.loop.time() - job.started
        if reply.status == 200:
            self.latencies[body] = took
            self.ended.append((self.loop.time(), self.loop.time() - job.started))
        self.rejected += reply.status in (429, 503)
        await asyncio.sleep(ROUND_TRIP / 2)
        fields = (line.partition(":") for line in filter(None, reply.headers.split("\r\n")))
        headers = {name.lower(): value.strip() for name, _, value in fields}
        return reply.status, headers, reply.body.encode()

    async def answer(self, items, **options):
        """Answer the prompts as a run does that is told nothing; return the results and the run."""
        results = []
        async with Run(Api(self.connect, base_url="http://test/v1"), clock=self.loop.time, **options) as run:
            await concurrently(run, as_prompts(items), results.append)
        assert all(result.error is None for result in results) and len(results) == len(items)
        return results, run

    @property
    def span(self):
        return max(self.ended)[0] - self.came[0]

    def share_rejected(self):
        return self.rejected / len(self.came)

    def window(self, slots):
        """Return the seconds that the answers would have taken in so many slots."""
        free = [0.0] * slots
        for latency in self.latencies.values():
            heapq.heapreplace(free, free[0] + latency)
        return max(free)

    def limit(self, number):
        """Change the limit."""
        (bucket,) = self.server._limits
        bucket.level()
        bucket.limit, bucket._rate, bucket._capacity = number, number / 60, number / 10
        bucket._held = min(bucket._held, bucket._capacity)


def texts(count, seed, mixed=False):
    dice = random.Random(seed)
    sizes = [int(10 * math.exp(dice.gauss(2.2, 1))) if mixed else 1 for _ in range(count)]
    return [f"{number} " + "word " * size for number, size in enumerate(sizes)]


def tokens(results):
    return sum(stand_in.Ask("/v1/chat/completions", result.prompt.body).cost() for result in results)


each_seed = pytest.mark.parametrize("seed", SEEDS)


@each_seed
@pytest.mark.parametrize(
    ("options", "told", "efficiency", "rejected"),
    [
        ({}, {}, 0.98, 0.005),
        ({"no_limit_headers": True}, {}, 0.97, 0.015),
        ({"count_rejected": True}, {}, 0.90, 0.02),
        ({"count_rejected": True, "no_limit_headers": True}, {}, 0.90, 0.02),
        ({}, {"rpm": 600}, 0.98, 0),
    ],
    ids=["headers", "no headers", "rejected count", "rejected count, no headers", "told"],
)
@virtual
async def test_requests_per_minute(seed, options, told, efficiency, rejected):
    server = Simulation(rpm=600, seed=seed, **options)
    results, run = await server.answer(texts(600, seed), **told)
    ideal = max(max(0, result.prompt.number - 59) / 10 + result.latency for result in results)
    assert ideal / server.span >= efficiency and server.share_rejected() <= rejected
    source = "as given" if told else "from rejections" if "no_limit_headers" in options else "from headers"
    assert source in run.limiter.learned()[0]


@each_seed
@pytest.mark.parametrize(
    ("options", "told", "efficiency", "rejected"),
    [({}, {}, 0.97, 0.01), ({"no_limit_headers": True}, {}, 0.93, 0.045), ({}, {"tpm": 60000}, 0.96, 0)],
    ids=["headers", "no headers", "told"],
)
@virtual
async def test_tokens_per_minute_with_prompts_of_every_size(seed, options, told, efficiency, rejected):
    server = Simulation(tpm=60000, seed=seed, **options)
    results, _ = await server.answer(texts(300, seed, mixed=True), **told)
    ideal = (tokens(results) - 6000) / 1000 + 0.3
    assert ideal / server.span >= efficiency and server.share_rejected() <= rejected


@each_seed
@pytest.mark.parametrize("status", [429, 503])
@virtual
async def test_at_most_40_in_flight(seed, status):
    server = Simulation(max_in_flight=40, reject_status=status, seed=seed)
    await server.answer(texts(600, seed))
    assert server.window(40) / server.span >= 0.95 and server.share_rejected() <= 0.03


@each_seed
@virtual
async def test_a_server_that_saturates(seed):
    server = Simulation(knee=64, seed=seed)
    await server.answer(texts(1500, seed))
    latencies = sorted(latency for _, latency in server.ended)
    assert server.window(64) / server.span >= 0.97
    assert latencies[750] <= 1.4 * 0.3 and server.area / server.span <= 1.3 * 64


@each_seed
@virtual
async def test_a_limit_that_halves_and_doubles(seed):
    server = Simulation(rpm=1200, seed=seed)
    server.loop.call_later(20, server.limit, 600)
    server.loop.call_later(50, server.limit, 1200)
    await server.answer(texts(1200, seed))  # 120 saved up, 20 a second for 20 s, 10 for 30, and 20 again
    assert (69 + 0.3) / server.span >= 0.93 and server.share_rejected() <= 0.02


@each_seed
@virtual
async def test_two_runs_that_share_a_key(seed):
    server = Simulation(rpm=600, seed=seed)
    first = asyncio.wait([asyncio.ensure_future(server.answer(texts(300, seed + more))) for more in (0, 1000)],
                         return_when=asyncio.FIRST_COMPLETED)  # fmt: skip
    _, (other,) = await first
    done = server.server.stats.answered
    assert (done - 300) / done >= 0.35  # neither starves
    await other
    assert (54 + 0.3) / server.span >= 0.90 and server.share_rejected() <= 0.05


def test_a_window_grows_although_the_first_answers_were_quick_by_chance():
    window, queued = Window(16, 1024), Window(16, 1024)
    for place in (1, 2, 3, *[18] * 60):
        window.answered(place, 0.15 if place < 4 else 0.25)
        queued.answered(place, 0.1 * place)  # a server of one slot
    assert window.size > 64 and queued.size < 32


@virtual
async def test_no_limit():
    server = Simulation(latency=0.1, sigma=0)
    await server.answer(texts(1000, 0))
    ramp = 0.1 * math.log(AUTO_CONCURRENCY / 16, 4)
    assert server.span <= 0.1 * math.ceil(1000 / AUTO_CONCURRENCY) + ramp + 0.11


@pytest.mark.parametrize(("rate", "burst"), [(100, 10), (60, 20)])
@virtual
async def test_a_gate_that_is_far_away_is_no_limit_of_calls_at_once(rate, burst, monkeypatch):
    monkeypatch.setitem(globals(), "ROUND_TRIP", 0.03)  # a third of what an answer takes: many are out in vain by then
    server = Simulation(gate=rate, gate_burst=burst, reject_status=503, latency=0.1, seed=3)
    _, run = await server.answer(texts(400, 3))  # all of them
    assert server.share_rejected() < 0.3 and server.span < 2.5 * 400 / rate
    assert "requests/min" in str(run.limiter.learned())


@pytest.mark.parametrize("share", [0.02, 0.05])
@virtual
async def test_refusals_at_random_are_no_limit(share):
    server = Simulation(fault={"429": share}, seed=101)
    await server.answer(texts(1000, 101))
    assert server.span < (6 if share < 0.03 else 15)


class Overloaded(Simulation):
    """It says to a tenth of the calls that it is overloaded, after the time of an answer."""

    async def post(self, path, body):
        reply = await super().post(path, body)
        return reply if self.dice.random() > 0.1 else (429, {}, b'{"error":{"message":"overloaded"}}')


@virtual
async def test_refusals_at_random_that_come_late_are_no_limit():
    server = Overloaded(seed=4)
    server.dice = random.Random(4)
    await server.answer(texts(600, 4))
    assert server.span < 6


@virtual
async def test_a_prompt_larger_than_the_limit_fails_and_holds_nobody_up():
    async with Run(Api(Simulation(tpm=60000).connect, base_url="http://test/v1"), clock=loop_time) as run:
        results = []
        await concurrently(run, as_prompts(["a", "word " * 60000, "b"]), results.append)
    errors = {result.id: result.error and result.error.type for result in results}
    assert errors == {1: None, 2: "larger_than_limit", 3: None}


def loop_time():
    return asyncio.get_running_loop().time()


def fields(kind, limit, left, reset):
    """Return the headers of a limit, without x-ratelimit-."""
    told = {"limit": limit, "remaining": left, "reset": reset}
    return {f"{name}{kind}": value for name, value in told.items() if value}


HEADERS = {
    "OpenAI's": (fields("-requests", "600", "44", "1.6s"), (10, 44, 60, 1.6)),
    "a day's": (fields("-requests", "10000", "9999", "9s"), (0.1157, 9999, 1e4, 9)),
    "many": (fields("-requests", "5000", "4999", "1"), (5000 / 60, 4999, 5000, 1)),
    "Azure's": (fields("-requests", "60", "59", "1"), (1, 59, 60, 1)),
    "nonsense": (fields("-requests", "-1", "-1", ""), None),
    "zeros": (fields("-requests", "0", "0", ""), None),
    "words": (fields("-requests", "many", "5", ""), None),
    "not a number": (fields("-requests", "nan", "5", ""), None),
    "half": (fields("-requests", "600", "", ""), None),
    "a debt": (fields("-requests", "600", "0", "1m5s"), (10, 0, 600, 65)),
    "for ever": (fields("-requests", "600", "5", "inf"), (10, 5, 5, 0)),
    "for long": (fields("-requests", "600", "5", "9" * 400), (10, 5, 5, 0)),
    "not per second": (fields("", "600", "0", "6"), (10, 0, 600, 6)),
    "Together's": (fields("", "10", "9", "1"), (10, 9, 10, 1)),
    "no period": (fields("", "20", "19", ""), (20 / 60, 19, 20, 0)),
    "an hour's": (fields("", "3600", "9", "61m"), (1, 9, 3600, 3660)),
    "a list": (fields("", "100, 100;window=60, 10000;window=86400", "98", "3"), (100 / 60, 98, 100, 3)),
    "a list without windows": (fields("", "100, 10000", "98", "3"), (100 / 60, 98, 100, 3)),
    "a window that cannot be": (fields("", "100;w=0", "98", "3"), (100 / 60, 98, 100, 3)),
    "LiteLLM's": ({"api_key-limit-requests": "20", "api_key-remaining-requests": "19"}, (20 / 60, 19, 20, 0)),
    "LiteLLM's, the team's is the nearer": (
        {f"{whose}-{what}-requests": number for whose, left in (("api_key", "90"), ("team", "7"), ("user", "8"))
         for what, number in (("limit", "100"), ("remaining", left))},
        (100 / 60, 7, 100, 0)),
    "a date that is none": (fields("", "20", "19", "Wed, 99 Foo 2026 99:99:99 GMT"), (20 / 60, 19, 20, 0)),
}


@in_rows("name", HEADERS)
def test_headers(name):
    headers, expected = HEADERS[name]
    found = limits_in({f"x-ratelimit-{key}": value for key, value in headers.items()}, "requests")
    assert found == (expected and pytest.approx(expected, rel=1e-3))
    if expected and "limit" in headers:  # https://datatracker.ietf.org/doc/draft-ietf-httpapi-ratelimit-headers/
        assert limits_in({f"ratelimit-{key}": value for key, value in headers.items()}, "requests") == found


def test_litellms_headers_of_tokens():
    headers = {"x-ratelimit-api_key-limit-tokens": "2000", "x-ratelimit-api_key-remaining-tokens": "1500"}
    assert limits_in(headers, "tokens") == pytest.approx((2000 / 60, 1500, 2000, 0))
    assert limits_in(headers, "requests") is None


class Parallel(Simulation):
    """LiteLLM, where a key may have so many calls in flight: its headers say so."""

    async def post(self, path, body):
        if self.in_flight == 40:
            self.rejected += 1
            return 429, {}, b'{"error":{"message":"no"}}'
        self.in_flight += 1
        status, _, reply = await super().post(path, body)
        self.in_flight -= 1
        told = {"X-RateLimit-user-Limit-max_parallel_requests": "90", "x-ratelimit-api_key-limit-requests": "x"}
        return status, told | {"x-ratelimit-api_key-limit-max_parallel_requests": "40"}, reply


@virtual
async def test_a_number_of_calls_at_once_that_headers_tell_is_kept_to():
    server = Parallel(seed=101)
    _, run = await server.answer(texts(1000, 101))
    assert server.rejected == 0 and server.span < 1.1 * server.window(40) + 0.5
    assert run.limiter.learned() == ["40 in flight, as the server states"]


class Windowed(Simulation):
    """A gateway before it that lets so many through in each window of time, and tells what is left of them."""

    def __init__(self, most, seconds, form, **options):
        super().__init__(**options)
        self.most, self.seconds, self.form, self.began, self.used = most, seconds, form, -math.inf, 0

    async def post(self, path, body):
        now = self.loop.time()
        if now >= self.began + self.seconds:
            self.began, self.used = now, 0
        self.used += 1
        told = self.form.format("limit"), self.form.format("remaining"), self.form.format("reset")
        reset = f"{self.began + self.seconds - now:.3f}s"
        headers = dict(zip(told, (str(self.most), str(max(0, self.most - self.used)), reset), strict=True))
        if self.form == LITELLMS:
            del headers[told[2]]
        if self.used <= self.most:
            status, _, reply = await super().post(path, body)
            return status, headers, reply
        self.came.append(now)
        self.rejected += 1
        headers = {"retry-after": str(self.seconds)} if self.form == LITELLMS else headers
        return 429, headers, b'{"error":{"message":"no"}}'


LITELLMS = "x-ratelimit-api_key-{}-requests"


@pytest.mark.parametrize(
    ("form", "most", "seconds"),
    [(form, *window) for form in ("x-ratelimit-{}-requests", "x-ratelimit-{}")
     for window in ((10, 1), (10, 10), (40, 8), (100, 1), (60, 60), (20, 3600))]
    + [(LITELLMS, 20, 8), (LITELLMS, 20, 60), (LITELLMS, 600, 60)],
)  # fmt: skip
@virtual
async def test_a_window_of_any_length_that_headers_tell_is_kept_to(form, most, seconds):
    windows = 3 if most > 100 else 8 if most == 100 else 15 if seconds == 1 else 5
    server = Windowed(most, seconds, form, seed=101)
    await server.answer(texts(windows * most, 101))
    assert server.span / ((windows - 1) * seconds + 0.3) <= 1.3 and server.share_rejected() <= 0.07


MOMENT = 1_795_901_100.0  # which is 2026-11-28T21:25:00Z
DATES = {
    "seconds": "1795901100",
    "seconds, float": "1795901100.0",
    "milliseconds": "1795901100000",
    "microseconds": "1795901100000000",
    "ISO": "2026-11-28T21:25:00Z",
    "ISO, another zone": "2026-11-28T22:25:00+01:00",
    "ISO, no zone": "2026-11-28T21:25:00",
    "HTTP": "Sat, 28 Nov 2026 21:25:00 GMT",
}


@in_rows("left", [(45.5, 60), (0.5, 60), (60.9, 60), (61.5, 3600), (9000, 86400), (-5, 60)], ids=str)
@in_rows("date", DATES.values(), ids=DATES)
@in_rows("kind", ["", "-requests", "-tokens"])
def test_a_reset_that_is_a_date_is_one(monkeypatch, kind, date, left):
    wait, period = left
    monkeypatch.setattr(time, "time", lambda: MOMENT - wait)
    headers = {f"x-ratelimit-{key}": value for key, value in fields(kind, "20", "3", date).items()}
    found = limits_in(headers, kind.removeprefix("-") or "requests")
    assert found == pytest.approx((20 / period, 3, 20, max(0.0, wait)))
    assert found.reset == found[3] and found.size == 20


def test_a_date_is_read_by_the_servers_own_clock():
    """Ours may be hours away; what the reply says of the time is by the same clock as the reset."""
    headers = {f"x-ratelimit-{key}": value for key, value in fields("", "20", "3", "1795901100").items()}
    found = limits_in(headers | {"date": "Sat, 28 Nov 2026 21:24:20 GMT"}, "requests")
    assert found == pytest.approx((20 / 60, 3, 20, 40))


def test_anthropics_headers(monkeypatch):
    """A bucket, although the reset is a date: that of when it will be full."""
    names = {"limit": "50", "remaining": "49", "reset": "2026-11-28T21:25:00Z"}
    headers = {f"anthropic-ratelimit-requests-{key}": value for key, value in names.items()}
    for now, left in ((MOMENT + 60, 0), (MOMENT - 1.2, 1.2)):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        assert limits_in(headers, "requests") == pytest.approx((50 / 60, 49, 49 + left * 50 / 60, left))


@in_rows("name", ["requests", "tokens"])
@in_rows("limit", ["1e-323", "5e-324", "1e-7", "0", "nan", "1e400", "-1"])
def test_a_limit_that_no_server_has_is_none(name, limit):
    headers = {f"x-ratelimit-limit-{name}": limit, f"x-ratelimit-remaining-{name}": "0"}
    assert limits_in(headers, name) is None


@pytest.mark.parametrize("wrong", [{"rpm": 0}, {"tpm": -1}])
async def test_limits_that_cannot_be(wrong):
    with pytest.raises(ValueError, match="greater than 0"):
        await run_concurrent(["a"], print, **wrong)


@virtual
async def test_answers_that_become_longer_are_not_taken_for_a_queue_for_ever():
    server = Simulation(latency=0.1, seed=3)
    longer = stand_in.Options(latency=0.4, sigma=0.5, seed=3)
    server.loop.call_later(0.35, setattr, server.server, "options", longer)
    _, run = await server.answer(texts(6000, 3))
    assert run.limiter.window.size > 180


@virtual
async def test_what_is_told_holds_where_the_server_would_take_more():
    server = Simulation(rpm=60000, seed=101)
    await server.answer(texts(300, 101), rpm=600)
    assert 29 < server.span < 33


@virtual
async def test_another_limit_than_the_headers_is_learned_too():
    server = Simulation(rpm=60000, max_in_flight=40, seed=101)
    await server.answer(texts(600, 101))
    assert server.share_rejected() < 0.05 and server.span < 8


@pytest.mark.parametrize("told", [{}, {"rpm": 1200}], ids=["learned", "told"])
@virtual
async def test_full_speed_comes_back_after_a_storm(told):
    server = Simulation(rpm=1200, no_limit_headers=True, seed=101)
    server.loop.call_later(20, setattr, server.server, "options", stand_in.Options(latency=0.001, fault={"429": 1.0}))
    server.loop.call_later(30, setattr, server.server, "options", server.server.options)
    await server.answer(texts(1000, 101), max_attempts=50, **told)
    assert server.span < 100  # 50 s and the storm, and finding back


@virtual
async def test_nonsense_in_the_usage_holds_nobody_up():
    server = Simulation(tpm=60000, no_limit_headers=True, seed=101)
    post = server.post

    async def mad(path, body):
        status, headers, reply = await post(path, body)
        return status, headers, reply.replace(b'"prompt_tokens":', b'"prompt_tokens":9999999999')

    server.post = mad
    await server.answer(texts(100, 101), tpm=60000)
    assert server.span < 30
