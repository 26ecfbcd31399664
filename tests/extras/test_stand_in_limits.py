"""The stand-in's limits, slots, outages and replicas: on a clock that jumps, and on sockets where these count."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import Counter
from typing import Any

import pytest

from concurrent_prompts.extras import stand_in, stand_in_answers
from concurrent_prompts.extras.stand_in import Options, Server, serve
from concurrent_prompts.extras.stand_in_http import Head, Job
from concurrent_prompts.extras.stand_in_limits import OUTAGES, WINDOWS, limits_of
from tests.helpers import in_rows, virtual

HEAD = Head("POST", "/v1/chat/completions", 0, old=False, keep=True, expect=False, authorization="")
NEVER = "never"


class Link:
    """A connection, of which only the reply matters."""

    def __init__(self) -> None:
        self.reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def send(self, reply: Any, cut: bool = False) -> None:
        self.reply.set_result(reply)

    def reset(self) -> None:
        self.reply.set_exception(ConnectionResetError())

    def advance(self) -> None:
        """There is no next request on this connection."""


class Place:
    """A server in virtual time, and what its callers get."""

    def __init__(self, **options: Any) -> None:
        self.loop = asyncio.get_running_loop()
        self.server = Server(Options(**options), self.loop.time)
        self.server._loop = self.loop
        self.began = self.loop.time()

    @property
    def now(self) -> float:
        return round(self.loop.time() - self.began, 6)

    async def until(self, second: float) -> None:
        await asyncio.sleep(self.began + second - self.loop.time())

    async def reply(self, prompt: str = "p", give_up: float = 1e6, head: Head = HEAD) -> Any:
        """Return the reply to a prompt; None for a caller that has hung up."""
        job = Job(Link(), head, self.loop.time())  # type: ignore[arg-type]
        self.server.accept(job, json.dumps({"model": "m", "messages": [{"role": "user", "content": prompt}]}).encode())
        try:
            async with asyncio.timeout(give_up):
                return await job.link.reply  # type: ignore[attr-defined]
        except TimeoutError:
            self.server.drop(job)
            return None

    async def status(self, prompt: str = "p", give_up: float = 1e6) -> Any:
        """Return the status and when it came."""
        try:
            reply = await self.reply(prompt, give_up)
        except ConnectionResetError:
            return "reset", self.now
        return reply.status if reply else NEVER, self.now

    async def burst(self, count: int, **more: Any) -> Counter[Any]:
        """Ask for so many at once; return how often there was each status."""
        return Counter([status for status, _ in await asyncio.gather(*(self.status(**more) for _ in range(count)))])


# --- Slots --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("work_on", "came", "unheard"), [(False, 1.5, 0), (True, 4.0, 3)])
@virtual
async def test_slots_may_work_on_for_callers_that_hung_up(work_on: bool, came: float, unheard: int) -> None:
    """One is being worked on and two are queued as their callers leave after half a second."""
    place = Place(knee=1, latency=1.0, work_on=work_on)
    gone = asyncio.gather(*(place.status(give_up=0.5) for _ in range(3)))
    await place.until(0.5)
    assert await gone == [(NEVER, 0.5)] * 3
    assert place.server.stats.in_flight == 0
    assert await place.status() == (200, came)
    assert (place.server.stats.answered, place.server.stats.unheard) == (1, unheard)
    assert await place.status() == (200, came + 1.0)  # no slot is lost


@virtual
async def test_a_gateway_gives_up_and_the_server_works_on() -> None:
    place = Place(knee=1, latency=1.0, work_on=True, gateway_timeout=2.5)
    got = await asyncio.gather(*(place.status(f"{number}") for number in range(5)))
    assert got == [(200, 1.0), (200, 2.0), (504, 2.5), (504, 2.5), (504, 2.5)]
    assert await place.status() == (504, 5.0)  # three are worked on before it
    assert place.server.stats.faults == {"504": 4}
    await place.until(6.0)
    assert (place.server.stats.unheard, place.server.stats.in_flight) == (4, 0)
    reply = await Place(latency=1.0, gateway_timeout=0.5).reply()
    assert reply.content_type == "text/html" and "504 Gateway Timeout" in reply.body


@virtual
async def test_a_gateway_that_gives_up_frees_the_slot_if_the_server_does() -> None:
    place = Place(knee=1, latency=1.0, gateway_timeout=2.5)
    await asyncio.gather(*(place.status() for _ in range(5)))
    assert await place.status() == (200, 3.5)


@virtual
async def test_a_share_of_the_calls_are_stragglers() -> None:
    place = Place(latency=1.0, stragglers=0.2, straggler_factor=40)
    ends = [came for _, came in await asyncio.gather(*(place.status(f"{number}") for number in range(1000)))]
    assert set(ends) == {1.0, 40.0} and 150 < ends.count(40.0) < 250
    late = [f"{number}" for number, came in enumerate(ends) if came == 40.0]
    again = await asyncio.gather(*(place.status(prompt) for prompt in late))
    assert 0.6 < sum(came == 41.0 for _, came in again) / len(late) < 1  # another call may be luckier


# --- Limits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "burst"), [(503, 0), (429, 4)])
@virtual
async def test_a_gate_is_nginx_limit_req(status: int, burst: int) -> None:
    place = Place(gate=5.0, gate_burst=burst, reject_status=status)
    assert await place.burst(50) == {200: burst + 1, status: 49 - burst}
    await place.until(0.2)
    assert await place.burst(2) == {200: 1, status: 1}  # what was rejected does not count
    await place.until(60)
    assert (await place.burst(50))[200] == burst + 1
    page = await place.reply()
    assert (page.status, page.content_type, page.headers) == (status, "text/html", "")


@virtual
async def test_a_sliding_window() -> None:
    place = Place(window=(4, 10.0))
    assert await place.burst(3) == {200: 3}
    await place.until(6)
    assert await place.burst(3) == {200: 1, 429: 2}
    await place.until(9.9)
    assert await place.burst(1) == {429: 1}
    await place.until(10)
    assert await place.burst(5) == {200: 3, 429: 2}
    await place.until(16)
    assert await place.burst(2) == {200: 1, 429: 1}


@virtual
async def test_who_goes_on_asking_stays_outside_a_window_in_which_rejections_count() -> None:
    place = Place(window=(4, 10.0), count_rejected=True)
    assert await place.burst(4) == {200: 4}
    for second in range(1, 30):
        await place.until(second)
        assert await place.burst(1) == {429: 1}
    await place.until(41)
    assert await place.burst(5) == {200: 4, 429: 1}


@virtual
async def test_a_fixed_window_begins_anew_at_once() -> None:
    place = Place(window=(4, 20.0), window_kind="fixed")  # the clock begins at 1000, with a stretch
    assert await place.burst(9) == {200: 4, 429: 5}
    await place.until(19.9)
    assert await place.burst(1) == {429: 1}
    await place.until(20)
    assert await place.burst(9) == {200: 4, 429: 5}
    await place.until(39)
    assert await place.burst(1) == {429: 1}


@virtual
async def test_a_weighted_window_counts_the_share_that_is_left_of_the_last_stretch() -> None:
    place = Place(window=(10, 20.0), window_kind="weighted")
    assert await place.burst(12) == {200: 10, 429: 2}
    await place.until(30)  # half of the ten are left
    assert await place.burst(12) == {200: 5, 429: 7}
    await place.until(80)
    assert await place.burst(12) == {200: 10, 429: 2}


@in_rows("kind", WINDOWS)
@in_rows("count_rejected", [False, True])
@virtual
async def test_a_window_says_how_long_to_wait(kind: str, count_rejected: bool) -> None:
    """Whoever waits as long as that is let in."""
    loop = asyncio.get_running_loop()
    (window,) = limits_of(Options(window=(4, 7.0), window_kind=kind, count_rejected=count_rejected), loop.time)
    passed: list[float] = []
    for _ in range(60):
        if wait := window.wait(1):
            if count_rejected and window.drain(1) is None:
                wait = window.wait(1)
            await asyncio.sleep(wait + 1e-5)
        assert window.wait(1) == 0
        window.take(1)
        passed.append(loop.time())
    slack = 5 if count_rejected else 1.3 if kind == "weighted" else 1.1  # an estimate that is on the safe side
    assert passed[-1] - passed[0] < 60 / 4 * 7.0 * slack
    if kind == "sliding":
        assert all(later - one > 6.99 for one, later in zip(passed, passed[4:], strict=False))


@pytest.mark.parametrize("form", ["span", "date"])
@virtual
async def test_a_window_may_tell_its_limits(form: str) -> None:
    place = Place(window=(2, 20.0), window_kind="fixed", window_tells=(form, "retry-after"))
    await place.until(5)
    headers = [dict(line.split(": ") for line in (await place.reply()).headers.splitlines()) for _ in range(3)]
    assert [each["x-ratelimit-limit"] for each in headers] == ["2"] * 3
    assert [each["x-ratelimit-remaining"] for each in headers] == ["1", "0", "0"]
    until = float(headers[2]["x-ratelimit-reset"]) - (time.time() if form == "date" else 0)
    assert 14 <= until <= 16 and headers[2]["retry-after"] == "15" and "retry-after" not in headers[1]
    bare = Place(window=(1, 20.0))
    first, second = await bare.reply(), await bare.reply()
    assert "ratelimit" not in first.headers and (second.headers, second.content_type) == ("", "text/html")


@virtual
async def test_a_rejection_has_the_words_and_the_wait_that_it_is_given() -> None:
    words = "Limit type: max_parallel_requests. Current limit: 1"
    given = {"reject_status": 529, "retry_after": 40, "reject_message": words}
    for limit in ({"max_in_flight": 1, "latency": 1.0}, {"gate": 1.0}, {"window": (1, 9.0), "latency": 1.0}):
        place = Place(**given, **limit)
        _, reply = await asyncio.gather(place.reply(), place.reply())
        assert (reply.status, json.loads(reply.body)["error"]["message"]) == (529, words)
        assert "retry-after: 40\r\n" in reply.headers


async def test_a_status_without_a_phrase_goes_over_the_wire() -> None:
    async with serve(gate=0.001, reject_status=529) as server, talk(server) as ask:
        assert [await ask(), await ask()] == [200, 529]


# --- Outages ------------------------------------------------------------------------------------------------


OUTCOMES = {  # of the call that comes before, of the one that is due in it, of the one that comes in it
    "silent": ((200, 4.0), (NEVER, 29.5), (NEVER, 32.0)),
    "refused": ((200, 4.0), (200, 10.5), ("reset", 12.0)),  # where there is no socket that could be closed
    "503": ((200, 4.0), (200, 10.5), (503, 12.0)),
    "502-page": ((200, 4.0), (502, 10.5), (502, 12.0)),
    "loading": ((200, 4.0), (200, 10.5), (503, 12.0)),
    "slow": ((200, 4.0), (200, 10.5), (200, 22.0)),
}


@in_rows("kind", OUTAGES)
@virtual
async def test_an_outage_comes_and_goes(kind: str) -> None:
    place, calls = Place(latency=1.0, outage=(f"{kind}@7+5",)), []  # from 10 to 15: it counts from the first request
    for second in (3.0, 9.5, 12.0):
        await place.until(second)
        calls.append(asyncio.create_task(place.status(give_up=20)))
    await asyncio.sleep(0)
    assert place.server.outage == kind
    await place.until(15)
    assert (await place.status(), place.server.outage) == ((200, 16.0), "")
    assert tuple(await asyncio.gather(*calls)) == OUTCOMES[kind]


@virtual
async def test_an_outage_is_everybodys_and_takes_its_form() -> None:
    place = Place(outage=("loading@0+150", "502-page@150+10"))
    models = HEAD._replace(method="GET", path="/v1/models")
    for head in (HEAD, models):
        assert json.loads((await place.reply(head=head)).body) == {
            "error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}
    await place.until(150)
    page = await place.reply()
    assert (page.status, page.content_type) == (502, "text/html") and "502 Bad Gateway" in page.body
    await place.until(160)
    assert (await place.reply(head=models)).status == 200
    assert place.server.stats.faults == {"loading": 2, "502-page": 1}


@virtual
async def test_a_gateway_is_silent_too() -> None:
    place = Place(latency=1.0, gateway_timeout=3.0, outage=("silent@0.5+10",))
    assert await place.status(give_up=9) == (NEVER, 9.0)


async def test_an_outage_may_close_the_port() -> None:
    async with serve(outage=("refused@0.1+0.1",)) as server, contextlib.AsyncExitStack() as stack:
        idle = await stack.enter_async_context(talk(server))
        assert await idle() == 200
        while server._listener:
            await asyncio.sleep(0.005)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await idle()
        with pytest.raises(ConnectionRefusedError):
            await stack.enter_async_context(talk(server))
        while not server._listener:
            await asyncio.sleep(0.005)
        assert await (await stack.enter_async_context(talk(server)))() == 200


# --- Replicas -----------------------------------------------------------------------------------------------


@in_rows(("sick", "status"), [("3", 500), ("3:503", 503), ("3:never", NEVER)])
@virtual
async def test_a_connection_leads_to_one_replica(sick: str, status: Any) -> None:
    place = Place(replicas=10, sick=sick)
    found = await place.burst(400, give_up=5)  # each on a connection of its own
    assert found.keys() == {200, status} and 80 < found[status] < 160
    assert place.server.stats.faults == {"sick": found[status]} and place.server.stats.in_flight == 0


async def test_a_kept_alive_connection_stays_with_its_replica() -> None:
    async with serve(replicas=2, sick="1") as server, contextlib.AsyncExitStack() as stack:
        asks = [await stack.enter_async_context(talk(server)) for _ in range(16)]
        first = [await ask() for ask in asks]
        assert set(first) == {200, 500} and [await ask() for ask in asks] == first


@contextlib.asynccontextmanager
async def talk(server: Server) -> Any:
    """Yield a coroutine function that asks on one connection and returns the status."""
    port = int(server.url.rpartition(":")[2].partition("/")[0])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = b'{"model": "m", "messages": [{"role": "user", "content": "p"}]}'
    head = f"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: {len(body)}\r\n\r\n".encode()

    async def ask() -> int:
        writer.write(head + body)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        await reader.readexactly(int(next(line.split(": ")[1] for line in lines if line.startswith("content-length"))))
        return int(lines[0].split(" ")[1])

    try:
        yield ask
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


# --- Options ------------------------------------------------------------------------------------------------


@in_rows(("settings", "message"), [
    ({"work_on": True}, "--work-on needs --knee"),
    ({"gate_burst": 3}, "--gate-burst needs --gate"),
    ({"window_tells": ("span",)}, "--window-tells needs --window"),
    ({"sick": "1"}, "--sick needs --replicas"),
    ({"replicas": 2, "sick": "3"}, "--sick 3 is more than --replicas 2"),
    ({"replicas": 2, "sick": "1:200"}, "--sick takes K"),
    ({"replicas": 2, "sick": "all"}, "--sick takes K"),
    ({"gate": 0}, "--gate must be"),
    ({"gateway_timeout": 0}, "--gateway-timeout must be"),
    ({"window": (0, 5.0)}, "--window takes N/S"),
    ({"window": (5, 0.0)}, "--window takes N/S"),
    ({"window": (5, 1.0), "window_kind": "open"}, "--window-kind must be one of sliding, fixed, weighted"),
    ({"window": (5, 1.0), "window_tells": ("span", "all")}, "--window-tells all is unknown"),
    ({"window": (5, 1.0), "window_tells": ("span", "date")}, "--window-tells takes span or date"),
    ({"stragglers": 1.5}, "--stragglers takes a share"),
    ({"retry_after": -1}, "--retry-after must be"),
    ({"reject_status": 600}, "--reject-status must be from 400 to 599"),
    ({"outage": ("quiet@1+2",)}, "--outage quiet is unknown"),
    ({"outage": ("silent@1",)}, "--outage takes KIND@FROM"),
    ({"outage": ("silent@-1+2",)}, "--outage takes KIND@FROM"),
    ({"outage": ("silent@1+0",)}, "--outage takes KIND@FROM"),
    ({"outage": ("503@5+5", "silent@1+5")}, "--outage silent and 503 overlap"),
])
def test_options_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**settings)


def test_flags_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Options] = []

    async def note(options: Options, exit_on_eof: bool) -> None:
        found.append(options)

    monkeypatch.setattr(stand_in, "serve_until_told", note)
    flags = ("--window 40/8 --window-tells date,retry-after --outage silent@10+20 --outage 503@60+5,slow@90+1 "
             "--replicas 10 --sick 1:never --gate 0.5 --knee 4 --work-on --models a --models b")
    assert stand_in.main(flags.split()) == 0
    (options,) = found
    assert (options.window, options.window_tells) == ((40, 8.0), ("date", "retry-after"))
    assert options.outage == ("silent@10+20", "503@60+5", "slow@90+1")
    assert (options.sick, options.gate, options.work_on, options.models) == ("1:never", 0.5, True, ("a", "b"))


def test_a_window_that_cannot_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        stand_in.main(["--window", "forty"])
    assert "--window" in capsys.readouterr().err


def test_stragglers_do_not_change_other_fates() -> None:
    plain, late = Options(latency=1.0, sigma=1.0), Options(latency=1.0, sigma=1.0, stragglers=1.0, straggler_factor=3)
    (_, one), (_, other) = (stand_in_answers.fate(options, b"{}", 0) for options in (plain, late))
    assert other == pytest.approx(3 * one)
