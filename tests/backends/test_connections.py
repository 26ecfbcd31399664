"""Which connections are used again, what becomes of a request on a dead one, and what says that a call is alive."""

import asyncio
import contextlib
import functools
import importlib
import socket
import ssl
import struct
import sys

import pytest

from concurrent_prompts import run_concurrent
from concurrent_prompts.backends import ALIVE
from concurrent_prompts.backends.api import Api
from concurrent_prompts.backends.pool import Reuse
from concurrent_prompts.extras.stand_in import serve
from tests.helpers import ANSWER, LIBRARIES, NAMES, in_rows, reply, scripted

BODY = b'{"model": "m", "messages": []}'
CHAT = "/chat/completions"


@pytest.fixture(params=[*NAMES, "openai-sdk without aiohttp"])
def connect(request, monkeypatch):
    """The backend under test, the SDK's with either of its transports."""
    name, _, without = request.param.partition(" ")
    pytest.importorskip(LIBRARIES.get(name, "asyncio"))
    module = importlib.import_module(f"concurrent_prompts.backends.{name.replace('-', '_')}")
    if without:
        import openai

        monkeypatch.setattr(module, "Client", type("Client", (module.Bounded, openai.DefaultAsyncHttpxClient), {}))
    return module.connect


# ---- Servers -------------------------------------------------------------------------------------------------


class Log(list):
    """The number of each request's connection, in the order in which they came."""

    connections = 0


@contextlib.asynccontextmanager
async def talking(talk, tls=None):
    """Serve each request with `await talk(writer, connection, number on it)`, until that returns True: hang up."""
    log, tasks = Log(), {}

    async def session(reader, writer):
        tasks[asyncio.current_task()] = writer
        log.connections += 1
        connection, number = log.connections, 0
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
                await reader.readexactly(int(lengths[0].split(b":")[1]) if lengths else 0)
                log.append(connection)
                number += 1
                if await talk(writer, connection, number):
                    break
        writer.close()

    async with await asyncio.start_server(session, "127.0.0.1", 0, ssl=tls) as server:
        log.server = server
        yield f"{'https' if tls else 'http'}://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", log
        for writer in tasks.values():
            with contextlib.suppress(AttributeError):  # before Python 3.11.5 a TLS connection that is closed raises it
                writer.transport.abort()
        await asyncio.gather(*tasks, return_exceptions=True)


async def fin(writer, connection, number):
    """Close right after the answer."""
    writer.write(reply())
    return True


async def reset(writer, connection, number):
    """Reset the connection right after the answer."""
    writer.write(reply())
    await writer.drain()
    linger = struct.pack("HH" if sys.platform == "win32" else "ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()
    return True


async def later(writer, connection, number):
    """Close a little after the answer, whatever has come meanwhile."""
    writer.write(reply())
    await asyncio.sleep(0.002)
    return True


async def hang_up(writer, connection, number):
    """Read the second request of a connection, and close without a word."""
    if number == 2:
        return True
    writer.write(reply())


@functools.cache
def certificate():
    """Return the certificate of an authority as PEM, and a server's context."""
    trustme = pytest.importorskip("trustme")
    authority, context = trustme.CA(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return authority.cert_pem.bytes(), context


# ---- Stale connections ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["straight", "proxy", "tls"])
@pytest.mark.parametrize("close", [fin, reset, later, hang_up])
async def test_a_server_that_closes_after_each_answer_costs_no_attempt(connect, close, way, monkeypatch, tmp_path):
    tls = None
    if way == "tls":
        pem, tls = certificate()
        (tmp_path / "ca.pem").write_bytes(pem)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    async with talking(close, tls) as (url, log):
        if way == "proxy":
            monkeypatch.setenv("HTTP_PROXY", url.removesuffix("/v1"))
            url = "http://api.invalid/v1"
        async with asyncio.timeout(20):
            results = await run_concurrent(map(str, range(8)), Api(connect, base_url=url), concurrency=2)
    assert [(result.text, result.attempts) for result in results] == [("hi", 1)] * 8
    assert len(log) <= 8 + (2 + 1 if close is hang_up else 0)  # only such a server reads what it does not answer


async def test_a_stale_connection_is_replaced_by_a_fresh_one_once(connect):
    async def talk(writer, connection, number):
        if number == 2 or connection == 2:
            return True
        writer.write(reply())

    async with talking(talk) as (url, log), connect(url, {}, 2) as post:
        assert (await post(CHAT, BODY))[0] == 200
        with pytest.raises(ConnectionError):
            await post(CHAT, BODY)
        assert log == [1, 1, 2]  # on a fresh one nothing is sent twice


@in_rows("start", [b"H", b"HTTP/1.1 200 OK\r\ncontent-le", b"HTTP/1.1 103 Early Hints\r\n\r\n"])
async def test_nothing_is_sent_again_after_a_byte_of_the_reply(connect, start):
    async def talk(writer, connection, number):
        writer.write(reply() if number == 1 else start)
        return number == 2

    async with talking(talk) as (url, log), connect(url, {}, 1) as post:
        await post(CHAT, BODY)
        with pytest.raises(ConnectionError):
            await post(CHAT, BODY)
        assert log == [1, 1]


async def test_a_refusal_after_a_stale_connection_is_a_refusal(connect):
    async def talk(writer, connection, number):
        if number == 2:
            log.server.close()  # which refuses connections from now on
            return True
        writer.write(reply())

    async with talking(talk) as (url, log), connect(url, {}, 1) as post:
        await post(CHAT, BODY)
        for _ in range(2):
            with pytest.raises(ConnectionRefusedError):
                await post(CHAT, BODY)
        assert log == [1, 1]


async def test_now_and_then_a_stale_connection_does_not_end_reuse(connect):
    async def talk(writer, connection, number):
        if number == 20:
            return True
        writer.write(reply())

    async with talking(talk) as (url, log), connect(url, {}, 1) as post:
        for _ in range(100):
            assert (await post(CHAT, BODY))[0] == 200
        assert (len(log), log.connections) == (105, 6)


async def test_reuse_is_tried_again_after_a_pause(connect, monkeypatch):
    monkeypatch.setattr(Reuse, "SHORTEST", 0.0)
    closing = True

    async def talk(writer, connection, number):
        if closing and number == 2:
            return True
        writer.write(reply())

    async with talking(talk) as (url, log), connect(url, {}, 1) as post:
        for _ in range(3):
            await post(CHAT, BODY)
        closing = False
        await asyncio.sleep(0.001)
        for _ in range(10):
            await post(CHAT, BODY)
        assert log[-5:] == [log[-1]] * 5


async def test_the_pauses_grow_and_answers_end_that():
    reuse, pauses = Reuse(), []
    loop = asyncio.get_running_loop()

    def later(seconds, function):
        pauses.append(seconds)
        loop.call_soon(function)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "call_later", later)
        for _ in range(3):
            reuse.on_stale()
            assert not reuse.allowed
            await asyncio.sleep(0)
            assert reuse.allowed
        while reuse.score:
            reuse.on_reused()
        for _ in range(3):
            assert reuse.allowed
            reuse.on_stale()
    assert pauses == [10, 20, 40, 10] and not reuse.allowed


# ---- Connections to a sick replica ---------------------------------------------------------------------------


@in_rows("whole", [True, False], ids=["at once", "in pieces"])
@in_rows("status", [b"500 -", b"503 -", b"529 -"])
async def test_a_connection_on_which_a_5xx_came_is_not_used_again(connect, status, whole):
    page = b'{"error": {"message": "sick"}}'

    async def talk(writer, connection, number):
        answer = reply(page, status) if connection == 1 else reply()
        writer.write(answer if whole else answer[:-5])
        if not whole:
            await asyncio.sleep(0.001)
            writer.write(answer[-5:])

    async with talking(talk) as (url, log), connect(url, {}, 1) as post:
        got = [await post(CHAT, BODY) for _ in range(3)]
    assert [(status, body) for status, _, body in got] == [(int(status[:3]), page), (200, ANSWER), (200, ANSWER)]
    assert log == [1, 2, 2]


async def test_a_connection_is_used_again_after_a_refusal(connect):
    async with talking(lambda writer, *_: asyncio.sleep(0, writer.write(reply(b"{}", b"429 -")))) as (url, log):
        async with connect(url, {}, 1) as post:
            assert [(await post(CHAT, BODY))[0] for _ in range(3)] == [429] * 3
    assert log == [1, 1, 1]


@in_rows("start", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n", b"HTTP/1.1 102 -\r\n\r\n"])
async def test_a_connection_whose_call_was_given_up_is_not_used_again(connect, start):
    asked = asyncio.Event()

    async def talk(writer, connection, number):
        writer.write(start if number == 2 else reply())
        if number == 2:
            asked.set()

    async with talking(talk) as (url, log), connect(url, {}, 1) as post:
        await post(CHAT, BODY)
        call = asyncio.ensure_future(post(CHAT, BODY))
        await asked.wait()
        call.cancel()
        await asyncio.wait([call])
        assert call.cancelled() and (await post(CHAT, BODY))[0] == 200
    assert log == [1, 1, 2]


async def test_one_sick_replica_of_ten(connect):
    async with serve(replicas=10, sick="1") as server:
        results = await run_concurrent(map(str, range(100)), Api(connect, base_url=server.url), concurrency=10)
    assert all(result.error is None for result in results)
    assert server.stats.requests <= 100 * 1.2


# ---- Signs of life -------------------------------------------------------------------------------------------

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
CHUNK = b"%x\r\n%b\r\n0\r\n\r\n" % (len(ANSWER), ANSWER)
SLOW = {
    "interim replies": [b"HTTP/1.1 102 Processing\r\n\r\n"] * 4 + [reply()],
    "blank lines": [HEAD + b"content-length: %d\r\n\r\n" % (len(ANSWER) + 4), *([b"\n"] * 4), ANSWER],
    "chunks of blanks": [HEAD + b"transfer-encoding: chunked\r\n\r\n", *([b"2\r\n \n\r\n"] * 4), CHUNK],
    "a slow body": [HEAD + b"content-length: %d\r\n\r\n" % len(ANSWER), b"{", b'"', b"c", b"h", ANSWER[4:]],
}


async def in_pieces(connect, pieces):
    """Return the reply that comes in these pieces, each after the one before has been read."""

    async def talk(writer, connection, number):
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0.002)

    async with talking(talk) as (url, _), connect(url, {}, 1) as post:
        return await post(CHAT, BODY)


@in_rows("kind", SLOW)
async def test_what_arrives_before_the_reply_is_whole_is_a_sign_of_life(connect, kind):
    signs = []
    context = ALIVE.set(lambda: signs.append(1))
    try:
        status, _, body = await in_pieces(connect, SLOW[kind])
    finally:
        ALIVE.reset(context)
    assert (status, body.strip()) == (200, ANSWER) and 3 <= len(signs) <= 8


@in_rows("kind", SLOW)
async def test_a_slow_reply_without_anybody_to_tell(connect, kind):
    assert (await in_pieces(connect, SLOW[kind]))[2].strip() == ANSWER


async def test_blank_lines_without_end_are_ended_by_the_deadline(connect):
    async def talk(writer, connection, number):
        writer.write(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        while not writer.is_closing():
            writer.write(b"1\r\n\n\r\n")
            await asyncio.sleep(0.001)

    async with talking(talk) as (url, log), asyncio.timeout(10):
        (result,) = await run_concurrent(["x"], Api(connect, base_url=url), deadline=0.2)
    assert result.error.type == "deadline" and log == [1]


async def test_a_sign_of_life_is_its_own_calls(connect):
    """Two calls, one after the other on the same connection: what the second one's bytes are told is its own."""

    async def talk(writer, connection, number):
        for piece in SLOW["blank lines"]:
            writer.write(piece)
            await asyncio.sleep(0.001)

    async def call(name):
        ALIVE.set(lambda: signs.append(name))
        before = len(signs)
        assert (await post(CHAT, BODY))[0] == 200
        assert set(signs[before:]) == {name}

    signs = []
    async with talking(talk) as (url, log), connect(url, {}, 1) as post:
        await asyncio.create_task(call("first"))
        await asyncio.create_task(call("second"))
    assert log == [1, 1] and set(signs) == {"first", "second"}


async def test_a_reply_that_comes_whole_tells_nothing_and_costs_nothing(connect):
    """The Python calls of an ordinary request are as many with somebody to tell as without."""

    async def count(hook):
        calls = 0

        def on_event(frame, event, argument):
            nonlocal calls
            parts = ("aiohttp", "http11", "concurrent_prompts") if event == "call" else ()
            calls += any(part in frame.f_globals.get("__name__", "") for part in parts)

        ALIVE.set(hook)
        for _ in range(20):  # until the server is trusted to keep its connections
            await post(CHAT, BODY)
        sys.setprofile(on_event)
        try:
            for _ in range(5):
                await post(CHAT, BODY)
        finally:
            sys.setprofile(None)
        return calls

    async with scripted(lambda head, body: reply()) as (url, _), connect(url, {}, 1) as post:
        signs = []
        await count(None)
        without = await asyncio.create_task(count(None))
        told = await asyncio.create_task(count(lambda: signs.append(1)))
    assert not signs and told == without


async def test_aiohttps_own_calls_are_no_byte_of_a_reply():
    """aiohttp hands over nothing, to go on after a pause; the connection may be another call's by then."""
    pytest.importorskip("aiohttp")
    from concurrent_prompts.backends.aiohttp_pool import Handler

    handler = Handler(asyncio.get_running_loop())
    handler.set_response_params()
    handler.data_received(b"")
    assert not handler.heard
    handler.data_received(b"H")
    assert handler.heard
