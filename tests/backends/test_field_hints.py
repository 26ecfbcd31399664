"""Hints lead somewhere: what a message names, and each hint followed to the letter on its own case."""

import base64
import contextlib
import itertools
import json
import re
import socket
import ssl
import subprocess
import threading

import pytest

import concurrent_prompts
from concurrent_prompts import Error, PromptError, main
from concurrent_prompts.backends import check_certificates, options
from concurrent_prompts.backends.hints import HINTS, NAMED, hint
from tests.backends.test_field_replies import chat, once, served, told
from tests.helpers import LIBRARIES, NAMES, in_rows, rows, serving

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture(params=NAMES)
def backend(request):
    """The name of the backend under test."""
    pytest.importorskip(LIBRARIES.get(request.param, "asyncio"))
    return request.param


GOOD = served(200, chat())


def path_of(head):
    return head.split(b" ")[1].decode()


@pytest.fixture
def ask(here, backend, capsys):
    """Return a function that runs the command against a server that `answer`s; the status, and what it says."""

    def ask(answer, *more, tls=None, at="/v1", scheme=None):
        with serving(answer, tls) as (url, log):
            url = url.removesuffix("/v1") + at
            url = re.sub("^https?", scheme, url) if scheme else url
            status = main(["prompts.txt", "-b", backend, "--base-url", url, "-c", "1", "--max-attempts", "2", *more])
            return status, " ".join(capsys.readouterr().err.split()), [head for head, body in log if body]

    return ask


def test_every_flag_that_a_hint_names_is_there():
    text = options.build_parser(concurrent_prompts.extras_folder().files_for(["--help"])).format_help()
    known = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", text))
    for advice in [*HINTS.values(), *(advice for _, _, advice in NAMED)]:
        assert set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", advice)) <= known, advice


# ---- The key of a hint ---------------------------------------------------------------------------------------

RIGHT = {
    # status, code, message: what the advice must name
    (404, "server_error", "m"): "--base-url",
    (404, "api_error", "m"): "--base-url",
    (405, "", "m"): "-e",
    (500, "server_error", "m"): "own fault",
    (200, "server_error", "m"): "own fault",
    (400, "ContextWindowExceededError", "m"): "shorten",
    (401, "", "Authorization Required (WWW-Authenticate: Basic)"): "OPENAI_CUSTOM_HEADERS",
    (401, "", "m"): "OPENAI_API_KEY",
    (402, "", "requires more credits, or fewer max_tokens"): "-p max_tokens=N",
    (402, "", "m"): "credit",
    (400, "", "m"): "--retry-failed",
    (400, "", "The plain HTTP request was sent to HTTPS port"): "https://",
    (498, "capacity_exceeded", "m"): "service_tier",
    (501, "", "m"): "-e",
    (403, "", "denied (through the proxy p:1)"): "NO_PROXY",
}


@in_rows(("what", "named"), RIGHT.items(), ids=str)
def test_the_status_comes_before_a_code_that_says_nothing(what, named):
    status, code, message = what
    error = concurrent_prompts.http_error(status, {}, told(message, code)).error
    assert named in hint(error), hint(error)


def test_our_own_kinds_have_hints():
    for kind in ("proxy_refused", "plain_http", "plain_https", "unfinished", "broken_off", "cut_off", "wrong_path"):
        assert hint(PromptError(kind, "m").error)
    assert "NO_PROXY" in hint(Error("unreachable", "refused (through the proxy p:1)"))


# ---- Followed --------------------------------------------------------------------------------------------------


def at_v1(head, body):
    """Answer as a server whose API is below /v1."""
    return GOOD if path_of(head) == "/v1/chat/completions" else served(404, told("Not here", None, "server_error"))


@pytest.mark.parametrize(
    "elsewhere",
    [
        served(404, told("Not here", None, "server_error")),
        served(404, {"detail": "Not Found"}),
        served(405, "<title>405 Not Allowed</title>", content_type="text/html"),
        served(200, {"error": "Unexpected endpoint or method. (POST /chat/completions)"}),
    ],
    ids=["404", "FastAPI", "405", "LM Studio"],
)
def test_a_base_url_without_v1(ask, elsewhere):
    def answer(head, body):
        return GOOD if path_of(head) == "/v1/chat/completions" else elsewhere

    status, text, log = ask(answer, at="")
    assert status == 3 and len(log) == 1
    assert "(POST http://127.0.0.1:" in text and "/chat/completions)" in text and "most end in /v1" in text
    assert ask(answer)[0] == 0


def test_an_endpoint_that_is_not_there(ask):
    status, text, _ = ask(at_v1, "-e", "responses")
    assert status == 3 and "(POST http://127.0.0.1:" in text and "/v1/responses)" in text and "(-e)" in text
    assert ask(at_v1, "-e", "chat")[0] == 0


def test_a_user_and_a_password_are_wanted(ask, monkeypatch):
    login = b"authorization: basic " + base64.b64encode(b"user:password").lower()

    def answer(head, body):
        page = "<title>401 Authorization Required</title>"
        return GOOD if login in head.lower() else served(401, page, www_authenticate='Basic realm="x"')

    monkeypatch.setenv("OPENAI_API_KEY", "some-key-0123456789")
    status, text, _ = ask(answer)
    command = re.search(r'-> .*?export (OPENAI_CUSTOM_HEADERS)="(.*)"', text)
    assert status == 3 and command
    said = subprocess.run(["sh", "-c", f'printf %s "{command[2]}"'], capture_output=True, text=True, check=True).stdout
    monkeypatch.setenv(command[1], said)
    assert ask(answer)[0] == 0


def test_a_port_that_speaks_tls(ask, monkeypatch, tmp_path):
    trustme = pytest.importorskip("trustme")
    authority, context = trustme.CA(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    status, text, _ = ask(lambda head, body: GOOD, tls=context)
    assert status == 3 and "SSL_CERT_FILE" in text, "the certificate is not known"
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    assert ask(lambda head, body: GOOD, tls=context)[0] == 0


def test_a_port_that_does_not_speak_tls(ask):
    with blunt(served(400)) as port:
        status, text, _ = ask(lambda head, body: GOOD, "--base-url", f"https://127.0.0.1:{port}/v1")
    assert status == 3 and "write http:// in --base-url" in text
    assert ask(lambda head, body: GOOD)[0] == 0


@contextlib.contextmanager
def blunt(answer):
    """Serve whatever comes, HTTP or not, with these bytes, in a thread; yield the port."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection:
                        connection.recv(65536)
                        connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
    thread.join()


@pytest.mark.parametrize(
    "reply",
    [
        served(400, "<title>400 The plain HTTP request was sent to HTTPS port</title>", content_type="text/html"),
        served(400, "Client sent an HTTP request to an HTTPS server.", content_type="text/plain"),
        b"\x15\x03\x03\x00\x02\x02\x46",
    ],
    ids=["nginx", "Go", "an alert"],
)
def test_plain_http_to_a_tls_port_is_said_once(ask, reply):
    status, text, log = ask(lambda head, body: reply)
    assert status == 3 and "write https:// in --base-url" in text and len(log) == 1


def test_shorter_answers_need_less_credit(ask):
    def answer(head, body):
        asked = json.loads(body).get("max_tokens", 65536)
        message = "This request requires more credits, or fewer max_tokens. You requested up to 65536 tokens."
        return GOOD if asked <= 100 else served(402, told(message, 402))

    status, text, _ = ask(answer)
    assert status == 3 and "-p max_tokens=N" in text
    assert ask(answer, "-p", "max_tokens=100")[0] == 0


def test_what_was_the_servers_is_asked_again_with_retry_failed(ask):
    good = itertools.chain([False] * 3, itertools.repeat(True))

    def answer(head, body):
        return GOOD if not body or next(good) else served(400, told("no such thing"))

    status, text, log = ask(answer)
    assert status == 1 and len(log) == 3 and "add --retry-failed" in text
    status, _, log = ask(answer, "--retry-failed")
    assert status == 0 and len(log) == 3 and all(row["text"] for row in rows("prompts.results.jsonl"))


def test_a_redirect_is_followed_by_the_user(ask):
    with serving(at_v1) as (there, _):
        moved = served(308, "", location=f"{there}/chat/completions")
        status, text, _ = ask(lambda head, body: moved)
        assert status == 3 and f"{there}/chat/completions" in text
        assert ask(at_v1, "--base-url", f"{there}/chat/completions")[0] == 0


# ---- Certificates --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "content", "named"),
    [
        ("SSL_CERT_FILE", None, "cannot be read"),
        ("SSL_CERT_FILE", "hello", "contains no PEM certificate"),
        ("SSL_CERT_DIR", None, "is not a folder"),
    ],
)
def test_certificates_that_are_not_there_are_named_before_the_first_call(
    ask, tmp_path, monkeypatch, variable, content, named
):
    place = tmp_path / "nowhere.pem"
    if content:
        place.write_text(content)
    monkeypatch.setenv(variable, str(place))
    status, text, log = ask(lambda head, body: GOOD, scheme="https")
    assert status == 2 and f"{variable} names" in text and named in text and str(place.name) in text and not log
    assert ask(lambda head, body: GOOD)[0] == 0, "where nothing speaks TLS, nobody needs them"
    monkeypatch.setenv(
        variable, ssl.get_default_verify_paths().cafile or str(tmp_path) if "FILE" in variable else str(tmp_path)
    )


def test_certificates_that_are_there(tmp_path, monkeypatch):
    (tmp_path / "ca.pem").write_text("-----BEGIN CERTIFICATE-----\n")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    check_certificates()


# ---- The proxy's own words -------------------------------------------------------------------------------------

PAGE = served(403, "<title>ERROR: Access Denied</title>", content_type="text/html", server="squid")


def through(monkeypatch, backend, url, proxy, scheme="HTTP"):
    monkeypatch.setenv(f"{scheme}_PROXY", proxy)
    return {"base_url": url}


async def test_a_proxys_page_names_the_proxy(backend, monkeypatch):
    with serving(lambda head, body: PAGE) as (proxy, log):
        address = proxy.removesuffix("/v1").removeprefix("http://")
        monkeypatch.setenv("HTTP_PROXY", f"http://me:secret-0123@{address}")
        failure, _ = await once(backend, PAGE, base_url="http://api.internal/v1")
    assert (
        failure.verdict == "stop" and f"(through the proxy {address})" in str(failure) and "secret" not in str(failure)
    )
    assert "NO_PROXY" in hint(failure.error) and log
    with serving(lambda head, body: served(403, told("no access"))) as (proxy, _):
        monkeypatch.setenv("HTTP_PROXY", proxy.removesuffix("/v1"))
        failure, _ = await once(backend, PAGE, base_url="http://api.internal/v1")
    assert "proxy" not in str(failure) and "key" in hint(failure.error), "the API's own words"


@in_rows("scheme", ["http", "https"])
async def test_a_proxy_that_is_not_there_is_named(backend, monkeypatch, scheme):
    monkeypatch.setenv("ALL_PROXY", "http://me:secret-0123@127.0.0.1:9")
    failure, _ = await once(backend, PAGE, base_url=f"{scheme}://api.internal/v1")
    assert failure.kind == "unreachable" and "127.0.0.1:9" in str(failure) and "proxy" in str(failure)
    assert "secret" not in str(failure) and "NO_PROXY" in hint(failure.error)


@pytest.mark.parametrize("status", [403, 407])
async def test_a_proxy_that_will_not_connect_is_named(backend, monkeypatch, status):
    with serving(lambda head, body: served(status, "")) as (proxy, _):
        monkeypatch.setenv("HTTPS_PROXY", proxy.removesuffix("/v1"))
        failure, _ = await once(backend, PAGE, base_url="https://api.internal/v1")
    assert (failure.verdict, failure.error.type) == ("stop", "proxy_refused"), failure
    assert str(status) in str(failure) and "proxy" in str(failure).lower() and "NO_PROXY" in hint(failure.error)


async def test_a_proxy_that_fails_now_and_then_is_asked_again(backend, monkeypatch):
    with serving(lambda head, body: served(503, "")) as (proxy, _):
        monkeypatch.setenv("HTTPS_PROXY", proxy.removesuffix("/v1"))
        failure, _ = await once(backend, PAGE, base_url="https://api.internal/v1")
    assert failure.verdict == "retry" and "proxy" in str(failure).lower()


@pytest.mark.parametrize("there", [True, False], ids=["a proxy that refuses", "no proxy"])
def test_a_host_in_no_proxy_is_reached_without_the_proxy(ask, monkeypatch, there):
    monkeypatch.setattr("concurrent_prompts.backends.reach_of", lambda host: "public")  # as if it were another machine
    with serving(lambda head, body: PAGE) as (proxy, log):
        monkeypatch.setenv("HTTP_PROXY", proxy.removesuffix("/v1") if there else "http://127.0.0.1:9")
        status, text, direct = ask(lambda head, body: GOOD, "--deadline", "30" if there else "0.5")
        assert status == 3 and not direct and bool(log) is there
        if there:
            named = re.search(r"name the server's host in (NO_PROXY)", text)
            monkeypatch.setenv(named[1], "127.0.0.1")
        else:
            monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        before = len(log)
        status, _, direct = ask(lambda head, body: GOOD, "--retry-failed")
    assert status == 0 and len(direct) == 3 and len(log) == before
