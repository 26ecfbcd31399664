"""The contract of a live backend, the same tests for all three, against real servers on loopback."""

import asyncio
import contextlib
import functools
import importlib
import json
import socket
import sys
import tracemalloc
import zlib

import pytest

import concurrent_prompts
from concurrent_prompts import UsageError, load_backend, read_prompts, run_concurrent
from concurrent_prompts.backends.api import Api
from concurrent_prompts.extras.stand_in import serve
from tests.helpers import ANSWER, NAMES, in_rows, longest_pause, reply, scripted

BODY = b'{"model": "m", "messages": [{"role": "user", "content": "Gr\xc3\xbc\xc3\x9fe \xf0\x9f\x91\x8b"}]}'


@pytest.fixture(params=NAMES)
def connect(request):
    """The backend under test."""
    module = {"raw-aiohttp": "aiohttp", "openai-sdk": "openai"}.get(request.param, "asyncio")
    pytest.importorskip(module)
    return importlib.import_module(f"concurrent_prompts.backends.{request.param.replace('-', '_')}").connect


async def test_what_is_sent_and_what_comes_back(connect):
    async with scripted(lambda head, body: reply(headers=b"X-Request-ID: req_7\r\n")) as (url, log):
        own = {"Authorization": "Bearer k", "X-Own": "1", "Content-Type": "application/json"}
        async with connect(url, own, 2) as post:
            status, headers, body = await post("/chat/completions", BODY)
    assert (status, headers.get("x-request-id"), body) == (200, "req_7", ANSWER)
    head = log[0][0].lower()
    assert head.startswith(b"post /v1/chat/completions http/1.1\r\n")
    assert head.count(b"authorization: bearer k\r\n") == head.count(b"authorization") == 1
    assert b"x-own: 1\r\n" in head and b"content-type: application/json\r\n" in head
    assert json.loads(log[0][1]) == json.loads(BODY)


async def test_no_key_no_header(connect):
    async with scripted(lambda head, body: reply()) as (url, log):
        async with connect(url, {}, 1) as post:
            await post("/chat/completions", BODY)
    assert b"authorization" not in log[0][0].lower()


async def test_a_query_stays_behind_the_path(connect):
    async with scripted(lambda head, body: reply()) as (url, log):
        async with connect(url, {}, 1) as post:
            await post("/chat/completions?api-version=2026-01-01", BODY)
    assert log[0][0].startswith(b"POST /v1/chat/completions?api-version=2026-01-01 ")


@in_rows("status", [204, 301, 307, 308, 400, 401, 404, 408, 409, 422, 429, 500, 503, 529])
async def test_every_status_is_a_value_and_nothing_is_tried_twice(connect, status):
    line = str(status).encode() + b" "
    extra = b"location: http://127.0.0.1:9/v1/elsewhere\r\nretry-after: 7\r\n"
    body = b"" if status == 204 else b'{"error": {"message": "no"}}'
    async with scripted(lambda head, _: reply(body, line, extra)) as (url, log):
        async with connect(url, {}, 1) as post:
            got, headers, content = await post("/chat/completions", BODY)
    assert (got, headers.get("retry-after"), content, len(log)) == (status, "7", body, 1)


@in_rows(
    "broken",
    [
        None,
        b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\nconnection: close\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n5\r\nhal",
        b"SSH-2.0-OpenSSH_9.2 connection: close\r\n\r\n",
    ],
    ids=["reset", "truncated", "truncated chunk", "not HTTP"],
)
async def test_below_http_it_is_a_connection_error(connect, broken):
    async with scripted(lambda head, body: broken) as (url, _), connect(url, {}, 1) as post:
        with pytest.raises(ConnectionError) as caught:
            await post("/chat/completions", BODY)
    assert str(caught.value) and "\n" not in str(caught.value)


async def test_refused_connection(connect):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        async with connect(url, {}, 1) as post:
            with pytest.raises(ConnectionError):
                await post("/chat/completions", BODY)


async def test_the_certificate_is_verified(connect, monkeypatch, tmp_path):
    trustme = pytest.importorskip("trustme")
    import ssl

    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    async with scripted(lambda head, body: reply(), context) as (url, _):
        async with connect(url, {}, 1) as post:
            with pytest.raises(ConnectionError) as caught:
                await post("/chat/completions", BODY)
        assert concurrent_prompts.as_prompt_error(caught.value).error.type == "certificate"
        authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        async with connect(url, {}, 1) as post:
            assert (await post("/chat/completions", BODY))[2] == ANSWER


async def test_certificates_are_read_for_tls_alone(connect, monkeypatch):
    read = []
    monkeypatch.setattr("ssl.SSLContext.load_default_certs", lambda context, purpose: read.append(purpose))
    async with scripted(lambda head, body: reply()) as (url, _), connect(url, {}, 1) as post:
        assert (await post("/chat/completions", BODY))[0] == 200
    assert not read
    async with connect("https://127.0.0.1:9/v1", {}, 1):
        assert read
    read.clear()
    monkeypatch.setenv("HTTP_PROXY", "https://127.0.0.1:9")
    async with connect("http://api.invalid/v1", {}, 1):
        assert read


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # aiohttp's, for what the SDK's own transport does
@in_rows("variable", ["http_proxy", "HTTP_PROXY", "ALL_PROXY"])
async def test_a_proxy_is_honoured_and_no_proxy_too(connect, monkeypatch, variable):
    async with scripted(lambda head, body: reply()) as (proxy, log):
        monkeypatch.setenv(variable, proxy.removesuffix("/v1").replace("//", "//user:word@"))
        async with connect("http://api.invalid/v1", {}, 1) as post:
            assert (await post("/chat/completions", BODY))[0] == 200
        assert log[0][0].startswith(b"POST http://api.invalid/v1/chat/completions ")
        assert b"proxy-authorization: basic dxnlcjp3b3jk" in log[0][0].lower()
        monkeypatch.setenv("NO_PROXY", "api.invalid")
        async with connect("http://api.invalid/v1", {}, 1) as post:
            with pytest.raises(ConnectionError):
                await post("/chat/completions", BODY)
        assert len(log) == 1


async def test_a_socks_proxy_is_refused_before_the_first_call(connect, monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    with pytest.raises(UsageError, match="which is not supported"):
        await run_concurrent(["x"], Api(connect, base_url="http://api.invalid/v1"))


@in_rows("name", NAMES)
async def test_the_official_variables_are_honoured(name, monkeypatch):
    pytest.importorskip({"raw-aiohttp": "aiohttp", "openai-sdk": "openai"}.get(name, "asyncio"))
    async with scripted(lambda head, body: reply()) as (url, log):
        monkeypatch.setenv("OPENAI_BASE_URL", url + "/")
        monkeypatch.setenv("OPENAI_API_KEY", "sk-own")
        monkeypatch.setenv("OPENAI_ORG_ID", "org-1")
        monkeypatch.setenv("OPENAI_PROJECT_ID", "proj_1")
        monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-One: 1\nX-Two: b c")
        (result,) = await run_concurrent(["x"], load_backend(name))
    head = log[0][0].lower()
    assert result.text == "hi" and head.startswith(b"post /v1/chat/completions http/1.1\r\n")
    for line in ("authorization: bearer sk-own", "openai-organization: org-1", "openai-project: proj_1", "x-two: b c"):
        assert head.count(f"\r\n{line}\r\n".encode()) == 1, line


@in_rows("name", NAMES)
async def test_azure_takes_its_key_and_its_version_in_its_own_way(name, monkeypatch):
    pytest.importorskip({"raw-aiohttp": "aiohttp", "openai-sdk": "openai"}.get(name, "asyncio"))
    async with scripted(lambda head, body: reply()) as (url, log):
        monkeypatch.setenv("OPENAI_API_KEY", "azure-key")
        url = f"{url.removesuffix('/v1')}/openai/deployments/d?api-version=2026-01-01"
        await run_concurrent(["x"], load_backend(name, base_url=url))
    head = log[0][0]
    assert head.startswith(b"POST /openai/deployments/d/chat/completions?api-version=2026-01-01 ")
    assert b"\r\napi-key: azure-key\r\n" in head and b"uthorization" not in head


async def test_the_pool_is_as_large_as_the_concurrency_and_no_answer_is_swapped(connect):
    async with serve(latency=0.3) as server, connect(server.url, {}, 150) as post:

        async def ask(number):
            body = json.dumps({"model": "m", "messages": [{"role": "user", "content": f"question {number}"}]})
            return json.loads((await post("/chat/completions", body.encode()))[2])

        answers = await asyncio.gather(*map(ask, range(150)))
        assert server.stats.max_in_flight == 150
    texts = [answer["choices"][0]["message"]["content"] for answer in answers]
    assert all(f"question {number}" in text for number, text in enumerate(texts))


async def test_a_cancelled_call_leaves_no_answer_for_the_next(connect):
    gate = asyncio.Event()
    seen = asyncio.Event()

    async def session(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        body = await reader.readexactly(length)
        seen.set()
        if b"slow" in body:
            await gate.wait()
        with contextlib.suppress(ConnectionError):
            writer.write(reply(b'{"choices": [], "echo": "%s"}' % (b"slow" if b"slow" in body else b"fast")))
            await writer.drain()
        writer.close()

    async with await asyncio.start_server(session, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        async with connect(url, {}, 1) as post:
            first = asyncio.ensure_future(post("/chat/completions", b'{"model": "slow", "messages": []}'))
            await seen.wait()
            first.cancel()
            await asyncio.wait([first])
            second = asyncio.ensure_future(post("/chat/completions", b'{"model": "fast", "messages": []}'))
            gate.set()
            assert b"fast" in (await second)[2]


@in_rows("endpoint", ["chat", "responses", "completions", "embeddings"])
async def test_all_endpoints(connect, endpoint):
    async with serve() as server:
        params = {"max_tokens": 9} if endpoint == "chat" else {}
        api = Api(connect, endpoint=endpoint, base_url=server.url, params=params)
        (result,) = await run_concurrent(["What is a coroutine?"], api)
    assert result.error is None and result.model == "gpt-6-luna" and result.usage["total_tokens"] > 0
    if endpoint == "embeddings":
        assert all(isinstance(number, float) for number in result.extra["embedding"])
    else:
        assert "made up" in result.text


async def test_identical_results_through_faults(tmp_path, monkeypatch):
    """The same prompts and a server that mixes faults: the same results but for clocks and attempts."""
    for library in ("aiohttp", "openai"):
        pytest.importorskip(library)
    monkeypatch.setattr(concurrent_prompts, "BACKOFF_BASE", 0.001)
    (tmp_path / "p.txt").write_text("".join(f"prompt {number}\n" for number in range(200)))
    faults = {"429": 0.05, "500": 0.05, "truncated": 0.03, "reset": 0.03, "null-choices": 0.03, "malformed": 0.03}
    outcomes = []
    for name in NAMES:
        async with serve(fault=faults, seed=7) as server:
            send = load_backend(name, base_url=server.url)
            results = await run_concurrent(read_prompts(tmp_path / "p.txt"), send, concurrency=20, max_attempts=50)
        own = ("attempts", "latency", "started", "slot_wait", "limit_wait", "retry_wait", "lost", "tries", "limit")
        outcomes.append([{k: v for k, v in result.as_row().items() if k not in own} for result in results])
        assert sum(result.attempts for result in results) > 220, "the faults did not come through"
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert all(row["error"] is None for row in outcomes[0])


async def test_aiohttp_failures_that_a_server_cannot_be_made_to_do():
    aiohttp = pytest.importorskip("aiohttp")
    from aioresponses import aioresponses

    from concurrent_prompts.backends.raw_aiohttp import connect

    with aioresponses() as mocked:
        mocked.post("http://h/v1/x", exception=aiohttp.ClientPayloadError("not whole"))
        mocked.post("http://h/v1/x", exception=aiohttp.ServerTimeoutError("slow"))
        mocked.post("http://h/v1/x", status=200, body="{}")
        async with connect("http://h/v1", {}, 1) as post:
            with pytest.raises(ConnectionError, match="not whole"):
                await post("/x", b"{}")
            with pytest.raises(TimeoutError, match="slow"):
                await post("/x", b"{}")
            assert (await post("/x", b"{}"))[0] == 200


@pytest.mark.parametrize(("name", "library"), [("raw-aiohttp", "aiohttp"), ("openai-sdk", "openai")])
def test_a_missing_library_is_one_sentence(monkeypatch, name, library):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"concurrent_prompts.backends.{name.replace('-', '_')}", raising=False)
    with pytest.raises(UsageError, match=f"^backend {name} needs {library}: pip install {library}$"):
        load_backend(name, base_url="http://127.0.0.1:1/v1")


async def test_a_third_partys_backend(monkeypatch, tmp_path):
    (tmp_path / "theirs.py").write_text(
        "from contextlib import asynccontextmanager\n"
        "@asynccontextmanager\n"
        "async def connect(base_url, headers, concurrency):\n"
        "    async def post(path, body):\n"
        '        return 200, {}, b\'{"choices": [{"message": {"content": "from afar"}}]}\'\n'
        "    yield post\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (result,) = await run_concurrent(["x"], load_backend("theirs:connect", base_url="http://h/v1"))
    assert result.text == "from afar"


async def test_one_api_serves_two_runs_at_once_and_prompts_may_be_asked_again_otherwise(tmp_path):
    (tmp_path / "p.txt").write_text("".join(f"prompt {number}\n" for number in range(20)))
    prompts = list(read_prompts(tmp_path / "p.txt"))
    async with serve(latency=0.01) as server:
        one, two = (load_backend("stdlib", base_url=server.url, model=model) for model in "mn")
        found = await asyncio.gather(*(run_concurrent(prompts, send, concurrency=4) for send in (one, one, two)))
    assert [{result.model for result in results} for results in found] == [{"m"}, {"m"}, {"n"}]
    assert all(f"prompt {number}" in result.text for results in found for number, result in enumerate(results))


@pytest.mark.parametrize("name", NAMES)
async def test_a_kept_connection_that_was_closed_is_replaced_at_once(name):
    async with serve(close_every=3) as server:
        results = await concurrent_prompts.run_sequential(map(str, range(50)), load_backend(name, base_url=server.url))
    assert all(result.error is None and result.attempts <= 2 and result.retry_wait < 0.1 for result in results)


# ---- What a server may send without end ----------------------------------------------------------------------


@functools.cache
def bomb(window):
    """Return 30 MB of zeros: as gzip (31), deflate (15), or deflate without its header (-15)."""
    packer = zlib.compressobj(wbits=window)
    return packer.compress(bytes(30_000_000)) + packer.flush()


def endless(head, block):
    """Return a reply without an end."""
    yield b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n" + head + b"\r\n\r\n"
    while True:
        yield block


FLOODS = {
    "a length": lambda: [reply(b" " * 200_000)],
    "endless chunks": lambda: endless(b"transfer-encoding: chunked", b"1000\r\n" + bytes(4096) + b"\r\n"),
    "no end": lambda: endless(b"connection: close", bytes(4096)),
    "gzip": lambda: [reply(bomb(31), headers=b"content-encoding: gzip\r\n")],
    "deflate": lambda: [reply(bomb(15), headers=b"content-encoding: deflate\r\n")],
    "bare deflate": lambda: [reply(bomb(-15), headers=b"content-encoding: deflate\r\n")],
}


@pytest.fixture(params=[*NAMES, "openai-sdk without aiohttp"])
def bounded(request, monkeypatch):
    """A backend that takes no more than 100,000 bytes, the SDK's with either of its transports."""
    name, _, without = request.param.partition(" ")
    pytest.importorskip({"raw-aiohttp": "aiohttp", "openai-sdk": "openai"}.get(name, "asyncio"))
    module = importlib.import_module(f"concurrent_prompts.backends.{name.replace('-', '_')}")
    if without:
        import openai

        monkeypatch.setattr(module, "Client", type("Client", (module.Bounded, openai.DefaultAsyncHttpxClient), {}))
    monkeypatch.setattr(module, "MAX_BODY", 100_000)
    return module.connect


@pytest.mark.parametrize("flood", FLOODS)
async def test_a_body_that_is_too_large_is_refused(bounded, flood):
    next(iter(FLOODS[flood]()))  # is compressed before the memory is counted
    async with scripted(lambda head, body: FLOODS[flood]()) as (url, _), bounded(url, {}, 1) as post:
        tracemalloc.start()
        try:
            with pytest.raises(ConnectionError, match="longer than 100000 bytes"):
                await post("/chat/completions", BODY)
            assert tracemalloc.get_traced_memory()[1] < 10e6
        finally:
            tracemalloc.stop()


# ---- The server's list of models -----------------------------------------------------------------------------


async def test_no_cookie_is_kept(connect):
    sent = reply(headers=b"Set-Cookie: one=1; Path=/\r\nSet-Cookie: two=2\r\n")
    async with scripted(lambda head, body: sent) as (url, log), connect(url, {}, 1) as post:
        for _ in range(3):
            await post("/chat/completions", b'{"model": "m", "messages": []}')
    assert len(log) == 3 and not any(b"cookie" in head.lower() for head, _ in log)


@in_rows("charset", ["punycode", "idna", "bz2_codec", "utf-16", "none such"])
async def test_the_charset_that_an_error_names_is_not_believed(connect, charset):
    body = b"<title>" + b"bcdefg0123-" * 3000 + b"</title>"  # for punycode an hour, if there is a megabyte of it
    sent = reply(body, b"500 -", b"Content-Type: text/html; charset=%b\r\n" % charset.encode())
    async with scripted(lambda head, asked: sent) as (url, _), connect(url, {}, 1) as post:
        (status, _, found), pause = await longest_pause(post("/chat/completions", b'{"model": "m", "messages": []}'))
    assert (status, found) == (500, body) and pause < 0.5


@in_rows("name", NAMES)
async def test_an_empty_body_is_a_get(name):
    async with serve(require_key="k", shutdown="2027-01-14") as server:
        module = importlib.import_module(f"concurrent_prompts.backends.{name.replace('-', '_')}")
        async with module.connect(server.url, {"Authorization": "Bearer k"}, 1) as post:
            status, _, body = await post("/models", b"")
            assert (status, json.loads(body)["data"][0]["shutdown_date"]) == (200, "2027-01-14")
        async with module.connect(server.url, {"Authorization": "Bearer wrong"}, 1) as post:
            assert (await post("/models", b""))[0] == 401


@in_rows("name", NAMES)
async def test_three_prompts_on_which_the_server_hangs_up_do_not_keep_the_run_from_ending(name, monkeypatch):
    def answer(head, body):
        if head.startswith(b"GET "):
            return reply(b"{}", b"404 Not Found")
        return None if b"poison" in body else reply()

    monkeypatch.setattr(concurrent_prompts, "PROBE", 0.01)
    monkeypatch.setattr(concurrent_prompts, "BACKOFF_BASE", 0.001)
    prompts = ["a", "poison 1", "b", "poison 2", "c", "poison 3"]
    async with asyncio.timeout(20):
        async with scripted(answer) as (url, log):
            results = await run_concurrent(prompts, load_backend(name, base_url=url), max_attempts=4)
    assert [result.error and result.error.type for result in results] == [None, "connection_error"] * 3
    assert sum(b"poison" in body for _, body in log) <= 3 * 8
