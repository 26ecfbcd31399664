"""Proxies: what each backend shows them, which addresses need none, and through which a key may go unencrypted."""

import asyncio
import base64
import contextlib
import importlib
import re
import ssl

import pytest

from concurrent_prompts import Run, UsageError, backends, load_backend, main, run_concurrent
from concurrent_prompts.backends.api import Api
from concurrent_prompts.extras import demo, shutdown
from concurrent_prompts.extras.stand_in import serve
from tests.backends.test_trust import REACH
from tests.helpers import LIBRARIES, NAMES, in_rows, reply, scripted, serving

KEY = "sk-very-secret-0123456789"
LOGIN = "someone:pass%27word-0123456789"
BASIC = base64.b64encode(b"someone:pass'word-0123456789")
OWN = {"Cookie": "session=cookie-0123456789", "X-Access-Pass": "access-0123456789", "api-key": "azure-0123456789"}
HARMLESS = {b"host", b"user-agent", b"accept", b"accept-encoding", b"connection", b"proxy-connection"}
HARMLESS |= {b"proxy-authorization"}
WAYS = (*NAMES, "openai-sdk over httpx2", "openai-batch", "openai-batch over httpx2")  # the SDK has two transports

# aiohttp's, for what the SDK's own transport does; and the second is for how such a client is closed
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture(params=WAYS)
def backend(request, monkeypatch):
    """The name of the backend under test."""
    name, _, transport = request.param.partition(" over ")
    pytest.importorskip(LIBRARIES.get(name, "openai" if "openai" in name else "asyncio"))
    if transport:
        sdk = importlib.import_module("concurrent_prompts.backends.openai_sdk")
        monkeypatch.setattr(sdk, "Transport", sdk.openai.DefaultAsyncHttpxClient)
    if "batch" in name:
        monkeypatch.setattr(importlib.import_module("concurrent_prompts.backends.openai_batch"), "FIRST_POLL", 0.01)
    return name


@contextlib.asynccontextmanager
async def relay(port, tls=None):
    """Pass connections on to a port of this machine, as a proxy too; yield the own port and what each client has sent.

    The first element is what came before a tunnel was there, or nothing, the second all that came after that.
    """
    tasks, sent = set(), []

    async def pipe(reader, writer, seen):
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                seen += data
                writer.write(data)
        writer.close()

    async def session(reader, writer):
        tasks.add(asyncio.current_task())
        sent.append((bytearray(), bytearray()))
        tunnel, rest = sent[-1]
        head = await reader.readuntil(b"\r\n\r\n")
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        if head.startswith(b"CONNECT "):
            tunnel += head
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            rest += head
            far_writer.write(head)
        await asyncio.gather(pipe(reader, far_writer, rest), pipe(far_reader, writer, bytearray()))

    server = await asyncio.start_server(session, "127.0.0.1", 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1], sent
    finally:
        server.close()
        await asyncio.wait([*tasks, asyncio.ensure_future(asyncio.sleep(0))], timeout=5)


@pytest.fixture(scope="module")
def authority():
    """A certificate authority, and the context of a server that is called api.test."""
    trustme = pytest.importorskip("trustme")
    authority, context = trustme.CA(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("api.test").configure_cert(context)
    return authority, context


@pytest.fixture
def secrets(monkeypatch, tmp_path, authority):
    """Put a key and secrets of other kinds into the environment; return their texts."""
    authority[0].cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "\n".join(f"{name}: {text}" for name, text in OWN.items()))
    return [KEY.encode(), *(text.encode() for text in OWN.values())]


async def ask(name, url):
    """Answer two prompts, and look up what is looked up beside a run; return the texts."""
    api = load_backend(name, base_url=url)
    results = await run_concurrent(["one", "two"], api, max_attempts=1)
    async with Run(api) as run:
        assert "data" in await shutdown.look_up(run, f"/models{api.query}")
    return [result.text or result.error for result in results]


@pytest.mark.parametrize("login", ["", f"{LOGIN}@"], ids=["no login", "login"])
async def test_a_tunnel_shows_no_header_to_the_proxy(backend, secrets, authority, login, monkeypatch):
    async with serve(require_key=KEY, batch_time=0.0) as server:
        port = int(server.url.rpartition(":")[2].removesuffix("/v1"))
        async with relay(port, authority[1]) as (secure, heard), relay(secure) as (proxy, seen):
            monkeypatch.setenv("HTTPS_PROXY", f"http://{login}127.0.0.1:{proxy}")
            texts = await ask(backend, "https://api.test/v1")
    assert all("made up" in text for text in texts)
    for tunnel, rest in seen:
        assert tunnel.startswith(b"CONNECT api.test:443 HTTP/1.1\r\n")
        names = {line.partition(b":")[0].lower() for line in bytes(tunnel).split(b"\r\n")[1:] if line}
        assert names <= HARMLESS and (b"proxy-authorization" in names) == bool(login)
        assert (b"Basic " + BASIC in tunnel) == bool(login)
        assert not any(secret in tunnel + rest for secret in secrets)
    told = b"".join(bytes(rest) for _, rest in heard)
    requests = len(re.findall(rb"(?:GET|POST) /v1/[^ ]+ HTTP/1.1\r\n", told))
    assert requests >= 3 and all(told.count(secret) == requests for secret in secrets)
    assert b"proxy-" not in told.lower() and BASIC not in told


@pytest.mark.parametrize("login", ["", f"{LOGIN}@"], ids=["no login", "login"])
async def test_without_a_tunnel_the_proxy_gets_each_request(backend, secrets, login, monkeypatch):
    async with serve(require_key=KEY, batch_time=0.0) as server:
        port = int(server.url.rpartition(":")[2].removesuffix("/v1"))
        async with relay(port) as (proxy, seen):
            monkeypatch.setenv("HTTP_PROXY", f"http://{login}127.0.0.1:{proxy}")
            texts = await ask(backend, "http://api.internal/v1")
    assert all("made up" in text for text in texts)
    told = b"".join(bytes(rest) for _, rest in seen)
    requests = len(re.findall(rb"(?:GET|POST) http://api.internal/v1/[^ ]+ HTTP/1.1\r\n", told))
    assert requests >= 3 and all(told.count(secret) == requests for secret in secrets)
    assert told.count(b"Basic " + BASIC) == len(re.findall(rb"(?mi)^proxy-authorization:", told))
    assert (b"Basic " + BASIC in told) == bool(login)


@pytest.mark.parametrize("backend", WAYS[:4], indirect=True)  # Azure's batches have paths of their own
@pytest.mark.parametrize("login", ["", f"{LOGIN}@"], ids=["no login", "login"])
async def test_a_tunnel_shows_no_azure_key_to_the_proxy(backend, secrets, authority, login, monkeypatch):
    monkeypatch.delenv("OPENAI_CUSTOM_HEADERS")
    answer = b'{"choices": [{"message": {"content": "hi"}}], "data": []}'
    async with scripted(lambda head, body: reply(answer), authority[1]) as (url, log):
        async with relay(int(url.rpartition(":")[2].removesuffix("/v1"))) as (proxy, seen):
            monkeypatch.setenv("HTTPS_PROXY", f"http://{login}127.0.0.1:{proxy}")
            texts = await ask(backend, "https://api.test/openai/deployments/d?api-version=2026-01-01")
    assert texts == ["hi", "hi"] and len(log) == 3
    assert all(f"api-key: {KEY}".encode() in head and b"proxy-auth" not in head.lower() for head, _ in log)
    assert seen and all(KEY.encode() not in tunnel + rest and b"api-key" not in tunnel.lower() for tunnel, rest in seen)


# ---- Addresses of this machine -------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "ALL_PROXY"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_this_machine_is_reached_directly(here, stand_in, backend, variable, host, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(lambda head, body: reply(b"", b"502 Bad")) as (proxy, log):
        monkeypatch.setenv(variable, proxy.removesuffix("/v1"))
        url = stand_in(require_key=KEY, batch_time=0.0).url.replace("127.0.0.1", host)
        assert main(["prompts.txt", "-q", "-b", backend, "--base-url", url]) == 0
    assert not log


def test_the_demo_needs_no_proxy(here, monkeypatch):
    monkeypatch.setattr(demo, "DEMO_SERVER", ("--port", "0", "--exit-on-eof"))  # without its latency
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    assert main(["--demo", "-q", "-n", "1", "-b", "stdlib"]) == 0


@in_rows(("host", "reach"), [(host, reach) for reach in REACH for host in REACH[reach].split()])
def test_which_addresses_need_a_proxy(host, reach, monkeypatch):
    for variable, scheme in (("HTTP_PROXY", "http"), ("HTTPS_PROXY", "https")):
        monkeypatch.setenv(variable, "p.test:1")
        wanted = None if reach == "loopback" else "http://p.test:1"
        assert backends.proxy_for(f"{scheme}://{host}/v1") == wanted


# ---- A key that a proxy would see ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "proxy", "said"),
    [
        ("gpu.lan", "127.0.0.1:3128", "the key goes to gpu.lan unencrypted; write https://"),
        ("gpu.lan", "squid.lan:3128", "the key goes to gpu.lan through the proxy squid.lan unencrypted"),
        ("gpu.lan", "proxy.example.com", None),
        ("gpu.lan", "https://proxy.example.com", None),  # it reads what it passes on
        ("gpu.lan", "socks5://proxy.example.com", None),
        ("api.example.com", "127.0.0.1:3128", None),
        ("localhost", "proxy.example.com", ""),
    ],
)
def test_a_proxy_is_judged_where_a_key_goes_unencrypted(host, proxy, said, monkeypatch, caplog):
    scheme, _, address = proxy.rpartition("://")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("ALL_PROXY", f"{scheme}://{LOGIN}@{address}" if scheme else f"{LOGIN}@{address}")
    settings = {"base_url": f"http://{host}/v1"}
    if said is None:
        with pytest.raises(UsageError) as caught:
            Api(None, **settings)
        through = f"{host} through the proxy {address}" if "127" not in address else host
        assert str(caught.value).startswith(f"the key would go to {through} unencrypted; write https://")
        assert "--allow-http" in str(caught.value) and "someone" not in str(caught.value)
        assert ("name gpu.lan in NO_PROXY" in str(caught.value)) == (host == "gpu.lan")
        Api(None, **settings, allow_http=True)
    else:
        Api(None, **settings)
    assert caplog.messages == [] if said == "" else len(caplog.messages) == 1 and (said or host) in caplog.messages[0]
    assert "someone" not in caplog.text and "0123456789" not in caplog.text
    caplog.clear()
    Api(None, base_url=f"https://{host}/v1")
    monkeypatch.delenv("OPENAI_API_KEY")
    Api(None, **settings)
    assert not caplog.messages, "with TLS, or with nothing secret, there is nothing to say"


def test_a_proxy_that_is_no_url_is_a_sentence(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("HTTP_PROXY", f"http://{LOGIN}@[::1")
    with pytest.raises(UsageError, match=r"^the proxy that the environment names is not of the form http://host:port$"):
        Api(None, base_url="http://gpu.lan/v1")


def test_the_machine_of_a_worker_may_have_another_proxy(monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    state = Api(None, base_url="http://gpu.lan/v1").state()
    caplog.clear()
    Api.of(state, None)
    assert not caplog.messages, "what has been said is not said again"
    monkeypatch.setenv("HTTP_PROXY", "http://squid.lan")
    Api.of(state, None)
    assert "through the proxy squid.lan" in caplog.text
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.example.com")
    with pytest.raises(UsageError, match=r"would go to gpu\.lan through the proxy proxy\.example\.com"):
        Api.of(state, None)


def test_a_key_through_an_open_proxy_is_refused_before_it_is_sent(here, backend, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.example.com")
    assert main(["prompts.txt", "-b", backend, "--base-url", "http://gpu.lan/v1"]) == 2
    assert "gpu.lan through the proxy proxy.example.com unencrypted" in " ".join(capsys.readouterr().err.split())


def test_a_custom_header_takes_the_place_of_ours_in_whatever_letters(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "authorization: Bearer another-0123456789\nuser-AGENT: mine")
    headers = load_backend("stdlib", base_url="http://127.0.0.1:9/v1").headers
    found = {name.lower(): value for name, value in headers.items()}
    assert len(found) == len(headers)
    assert (found["authorization"], found["user-agent"]) == ("Bearer another-0123456789", "mine")
