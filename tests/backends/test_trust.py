"""Secrets and trust: the key is nowhere but in the request header, and no answer commands the terminal."""

import base64
import contextlib
import functools
import html
import io
import json
import logging
import os
import pathlib
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
import traceback
import urllib.parse

import pytest

import concurrent_prompts
from concurrent_prompts import UsageError, load_backend, main, run
from concurrent_prompts.backends import interrupts
from concurrent_prompts.backends.api import Api
from concurrent_prompts.backends.keys import concealer
from concurrent_prompts.extras import demo
from tests.helpers import LIBRARIES, NAMES, create_default_context, in_rows, reply, serving

KEY = "sk-very-secret/KEY+0123456789-abcdefghij-KLMNOPQRST-uvwxyz=="
COOKIE = "cookie~0123456789~crumbs"
QUERY = "query!secret!0123456789!asked"
PASSWORD = "pass'word-0123456789-proxy"
LOGIN = f"someone:{PASSWORD}"
SECRETS = (KEY, COOKIE, QUERY, PASSWORD)
SPOKEN = " and ".join((KEY, COOKIE, QUERY, LOGIN))
PARTS = {part for secret in SECRETS for part in (secret[:8], secret[-8:])}


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # aiohttp's, for the SDK's own transport


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory with two prompts, secrets in every place that takes one, no waiting."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(concurrent_prompts, "BACKOFF_BASE", 0.0)
    monkeypatch.setattr(concurrent_prompts, "PROBE", 0.01)
    monkeypatch.setattr(ssl, "create_default_context", create_default_context)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", f"Cookie: session={COOKIE}; theme=dark")
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    batch = {"custom_id": "b", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", "messages": []}}
    (tmp_path / "both.jsonl").write_text(json.dumps(batch) + '\n"one"\n')
    return tmp_path


@pytest.fixture
def shown(here, capfd, caplog, monkeypatch):
    """Return a function that runs the command line and returns its status and all that it leaves behind."""
    caplog.set_level(logging.DEBUG, "concurrent_prompts")
    children, begin = [], subprocess.Popen.__init__

    def spy(self, args, *rest, **options):
        children.append(" ".join(map(str, args)))
        begin(self, args, *rest, **options)

    monkeypatch.setattr(subprocess.Popen, "__init__", spy)

    def command(*arguments):
        problem = ""
        try:
            status = main([*arguments, "--max-attempts", "2"])
        except SystemExit as end:
            status = end.code
        except Exception:
            status, problem = "traceback", traceback.format_exc()
        places = sorted(here.rglob("*"))
        files = [place.read_text("utf-8", "surrogateescape") for place in places if place.is_file()]
        return status, "\n".join([*capfd.readouterr(), caplog.text, problem, *files, *map(str, places), *children])

    return command


def assert_secret(text, parts=PARTS):
    """Fail where the beginning or the end of a secret shows in the text, escaped or not; say what stands before it."""
    decoded = re.sub(r"\\u00(..)", r"%\1", text)
    for form in (text, urllib.parse.unquote(decoded), html.unescape(decoded), text.replace("\\/", "/")):
        found = [form[max(0, form.index(part) - 60) :][:60] for part in parts if part in form]
        assert not found


def usual(message, **more):
    """Return an error body in the usual form."""
    return json.dumps({"error": {"message": message, **more}}).encode()


def escape_json(text):
    """Return the text as it stands within quotes in JSON."""
    return json.dumps(text)[1:-1]


def escaped(text):
    """Return the text as a JSON string in which nothing is written as it is."""
    return '"' + "".join(f"\\u{ord(c):04X}" for c in text) + '"'


TITLE = f"<html><title>{html.escape(SPOKEN)}</title></html>".encode()
REFERENCES = "".join(f"&#x{ord(c):x};" for c in SPOKEN)
REPLIES = {
    "400": reply(usual(f"bad: {SPOKEN}"), b"400 Bad"),
    "401": reply(usual(f"Incorrect API key provided: {SPOKEN}.", code="invalid_api_key"), b"401 Unauthorized"),
    "403 page": reply(TITLE, b"403 Forbidden"),
    "403 page of references": reply(f"<title>{REFERENCES}</title>".encode(), b"403 Forbidden"),
    "404": reply(usual(f"no {SPOKEN}"), b"404 Not Found"),
    "429 quota": reply(usual(SPOKEN, code="insufficient_quota"), b"429 Too Many"),
    "500": reply(usual(f"bad: {SPOKEN}"), b"500 Error"),
    "as the code": reply(usual("no", code=KEY), b"400 Bad"),
    "escaped": reply(b'{"error": {"message": %b}}' % escaped(SPOKEN).encode(), b"400 Bad"),
    "escaped slashes": reply(usual(SPOKEN).replace(b"/", b"\\/"), b"400 Bad"),
    "JSON in JSON": reply(usual(json.dumps({"headers": SPOKEN})), b"500 Error"),
    "escaped and cut off": reply(b'{"error": {"message": %b}}' % escaped("x " * 142 + SPOKEN).encode(), b"400 Bad"),
    "percent signs": reply(usual("no " + "".join(f"%{ord(c):02x}" for c in SPOKEN)), b"400 Bad"),
    "cut off by the server": reply(usual(f"bad: {KEY[:20]}..."), b"400 Bad"),
    "not JSON": reply(SPOKEN.encode(), b"502 Bad"),
    **{f"cut off at {n}": reply(usual("x " * (n // 2) + SPOKEN), b"400 Bad") for n in (270, 284)},
    "200 with an error": reply(usual(SPOKEN)),
    "200 page": reply(TITLE, headers=b"content-type: text/html\r\n"),
    "malformed": reply(SPOKEN.encode()),
    "in a header": reply(usual("no"), b"400 Bad", f"x-request-id: {KEY}\r\n".encode()),
    "redirect": reply(b"", b"308 Moved", f"location: https://{LOGIN}@h/?{urllib.parse.quote(KEY)}\r\n".encode()),
    "not HTTP": f"{KEY} connection: close\r\n\r\n".encode(),
    "a bad header": f"HTTP/1.1 200 OK\r\n{KEY}\r\nconnection: close\r\n\r\n".encode(),
    "truncated": f"HTTP/1.1 200 OK\r\ncontent-length: 900\r\nconnection: close\r\n\r\n{KEY}".encode(),
    "reset": None,
}
SILENT = ("in a header", "not HTTP", "a bad header", "truncated", "reset")  # of these not every backend quotes


@pytest.fixture(params=NAMES)
def backend(request):
    """The name of the backend under test."""
    pytest.importorskip(LIBRARIES.get(request.param, "asyncio"))
    return request.param


@pytest.mark.parametrize("name", REPLIES)
def test_no_secret_shows_whatever_the_server_says(shown, backend, name, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", f"http://{LOGIN}@127.0.0.1:9")  # not for this URL; its password is hidden anyway
    with serving(lambda head, body: REPLIES[name]) as (url, log):
        base = ["--base-url", f"{url}?key={QUERY}&api-version=7", "-b", backend]
        compared = ["prompts.txt", "--compare", "-q"] if backend == NAMES[0] or name in SILENT else []
        for arguments in filter(None, (["both.jsonl", "-v"], compared)):
            status, text = shown(*arguments, *base)
            assert status in (1, 3) and "Traceback" not in text
            assert name in SILENT or "***" in text
            assert_secret(text)
    heads = b"".join(head for head, _ in log)
    assert all(secret.encode() in heads for secret in (KEY, COOKIE, QUERY)), "they were sent"


def test_a_redirect_takes_the_key_nowhere(shown, backend):
    with serving(lambda head, body: reply()) as (other, heard):
        location = f"location: {other}/chat/completions\r\n".encode()
        for status_line in (b"301 Moved", b"302 Found", b"303 See Other", b"307 Temporary", b"308 Permanent"):
            answer = reply(b"", status_line, location)
            with serving(lambda head, body, answer=answer: answer) as (url, log):
                status, text = shown("prompts.txt", "--base-url", url, "-b", backend)
            assert (status, len(log) > 0, heard) == (3, True, [])
            assert_secret(text)


PROXIES = {
    "none, and nobody there": None,
    "one that is not there": f"http://{LOGIN}@127.0.0.1:9",
    "one whose port is none": f"http://{LOGIN}@127.0.0.1:99999",
    "one whose login is not escaped": f"http://some one:{PASSWORD}@127.0.0.1:9",
    "one of another kind": f"ftp://{LOGIN}@127.0.0.1:9",
}


@pytest.mark.parametrize("proxy", PROXIES.values(), ids=PROXIES)
def test_no_secret_shows_where_nobody_answers(here, shown, backend, proxy, monkeypatch):
    if proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy)
    base = f"{'https://api.invalid' if proxy else 'http://127.0.0.1:9'}/v1?key={QUERY}"
    for arguments in (["prompts.txt", "-v"], ["prompts.txt", "--compare"]):
        status, text = shown(*arguments, "--base-url", base, "-b", backend)
        assert status in (1, 2, 3) and "Traceback" not in text
        assert_secret(text)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_no_secret_shows_where_a_proxy_refuses(here, shown, backend, scheme, monkeypatch):
    with serving(lambda head, body: reply(usual(SPOKEN), b"407 Proxy Authentication Required")) as (proxy, log):
        monkeypatch.setenv(f"{scheme}_proxy", proxy.removesuffix("/v1").replace("//", f"//{LOGIN}@"))
        url = f"{scheme}://api.internal/v1?key={QUERY}"
        status, text = shown("prompts.txt", "-v", "--base-url", url, "-b", backend)
    assert status in (1, 3) and ("407" in text or "***" in text) and b"proxy-authorization" in log[0][0].lower()
    assert_secret(text)
    assert scheme == "http" or KEY.encode() not in log[0][0], "CONNECT carries no key"


def test_a_certificate_that_is_not_verified_gets_no_key(here, shown, backend):
    trustme = pytest.importorskip("trustme")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    with serving(lambda head, body: reply(), context) as (url, log):
        status, text = shown("prompts.txt", "--base-url", f"{url}?key={QUERY}", "-b", backend)
    assert (status, log) == (3, []) and "certificate" in text
    assert_secret(text)


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no signal to one thread")
@pytest.mark.parametrize("twice", [False, True])
def test_no_secret_shows_at_a_ctrl_c(here, shown, backend, twice, monkeypatch):
    say = interrupts.say

    def say_and_press_again(*lines, **options):
        say(*lines, **options)
        if twice and "stopping" in lines[0]:
            signal.raise_signal(signal.SIGINT)

    def answer(head, body):
        if body:  # and not for the list of models
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return b"HTTP/1.1 500 Error\r\n" if twice else REPLIES["500"]

    monkeypatch.setattr(interrupts, "say", say_and_press_again)
    with serving(answer) as (url, _):
        status, text = shown("prompts.txt", "-v", "--sequential", "--base-url", f"{url}?key={QUERY}", "-b", backend)
    assert status == 130 and "to continue: the same command again" in text and "Traceback" not in text
    assert_secret(text)


def test_no_secret_shows_in_results_or_superseded_ones(here, shown, backend):
    with serving(lambda head, body: reply()) as (url, _):
        base = ["prompts.txt", "-v", "-b", backend, "--base-url"]
        assert shown(*base, f"{url}?key={QUERY}")[0] == 0
        status, text = shown(*base, f"{url}?key=another-{QUERY[::-1]}")
        assert status == 0 and "2 answers of an earlier run kept" in text, "another key is not another question"
        status, text = shown(*base, f"{url}?key={QUERY}", "-m", "other")
    assert status == 0 and "prompts.results.superseded.jsonl" in text
    assert_secret(text)


UNUSABLE = {
    "an unwritable output": ["-o", "no/where.jsonl"],
    "a directory for output": ["-o", "."],
    "a key on the command line": ["--api-key", KEY],
    "the same with =": [f"--api-key={KEY}"],
    "a bad number": ["-c", "0"],
    "a bad parameter": ["-p", "stop=x"],
    "an unknown backend": ["-b", "curl"],
    "the key where its variable's name belongs": ["--api-key-env", KEY],
    "a password in the URL": ["--base-url", f"https://{LOGIN}@host/v1"],
    "a password in a URL without a scheme": ["--base-url", f"{LOGIN}@host/v1"],
    "a password with a slash": ["--base-url", f"https://someone:/{PASSWORD}@host/v1"],
    "a password with a question mark": ["--base-url", f"https://someone:?{PASSWORD}@host/v1"],
    "a query behind a bad URL": ["--base-url", f"host/v1?key={QUERY}"],
    "a key over plain http": ["--base-url", f"http://example.com/v1?key={QUERY}"],
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_no_secret_shows_where_the_arguments_cannot_be_used(shown, case):
    status, text = shown("prompts.txt", "-v", *UNUSABLE[case])
    assert status == 2 and "Traceback" not in text
    assert_secret(text)


def test_no_secret_is_in_a_child_process(shown, monkeypatch):
    monkeypatch.setattr(demo, "DEMO_SERVER", ("--port", "0", "--exit-on-eof"))  # without its latency
    status, text = shown("--demo", "-n", "1", "-b", "stdlib", "-v")
    assert status == 0 and "extras.stand_in" in text
    assert_secret(text)


BROKEN = """
import contextlib, os
class Status(Exception):
    status_code = 400
    body = {{"error": {{"message": "", "code": os.environ["OPENAI_API_KEY"]}}}}
@contextlib.asynccontextmanager
async def connect(base_url, headers, concurrency):
    def fail(place):
        if place == {place!r}:
            try:
                raise LookupError("behind it: %r" % headers)
            except LookupError as failure:
                if {kind} is KeyError:
                    raise {kind}("in front") from failure
                if {kind} is Status:
                    raise Status("in front") from None
                raise {kind}("bad %s, %s" % (headers, os.environ["HTTPS_PROXY"]))
    async def post(path, body):
        fail("call")
        return 200, {{}}, b'{{"choices": [{{"message": {{"content": "hi"}}}}]}}'
    fail("open")
    yield post
    fail("close")
"""


@pytest.mark.parametrize("kind", ["KeyError", "RuntimeError", "OSError", "ValueError", "Status"])
@pytest.mark.parametrize("place", ["open", "call", "close"])
def test_no_secret_shows_in_what_a_broken_backend_raises(here, shown, monkeypatch, tmp_path_factory, place, kind):
    folder = tmp_path_factory.mktemp("theirs")
    (folder / "broken_backend.py").write_text(BROKEN.format(place=place, kind=kind))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "broken_backend", raising=False)
    monkeypatch.setenv("HTTPS_PROXY", f"http://{LOGIN}@127.0.0.1:9")
    backend = ["-b", "broken_backend:connect", "--base-url", f"https://host/v1?key={QUERY}"]
    status, text = shown("both.jsonl", "-v", *backend)
    one_line = place == "open" and kind in ("OSError", "ValueError")
    assert status == 1 if place == "call" else status in ([2] if one_line else [2, 3])
    assert_secret(text)
    api = load_backend("broken_backend:connect", base_url="https://host/v1")
    with pytest.raises(Exception) as caught:
        run(["x"], api, max_attempts=1, return_exceptions=False)
    assert_secret("".join(traceback.format_exception(caught.value)) + repr(caught.value))
    if place == "call":
        assert_secret(repr(run(["x"], api, max_attempts=1)))


def test_no_secret_is_in_a_repr_and_answers_are_left_alone(here):
    answer = json.dumps({"choices": [{"message": {"content": SPOKEN}}]}).encode()
    with serving(lambda head, body: reply(answer)) as (url, _):
        api = load_backend("stdlib", base_url=f"{url}?key={QUERY}")
        (result,) = run(["x"], api)
    assert result.text == SPOKEN
    assert_secret(repr(api) + repr(result.prompt))


def test_short_secrets_are_hidden_and_what_stands_around_them_is_not(here, monkeypatch):
    own = ["X-Api-Key: s3cr3t", "X-Team: blue", "X-Stage: production", "X-Fruit: blueberry", "X-Pass: it is me",
           "Authorization: Bearer b3ar", "OpenAI-Beta: assistants=v2", "X-Auth-Mode: default"]  # fmt: skip
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "\n".join(own))
    kept = "blue, production, assistants=v2, default, true, 2026-01-01"
    body = usual(f"Bearer s3cr3t, q%31w2e3, blueberry, Bearer b3ar, it is me: {kept}")
    with serving(lambda head, _: reply(body, b"400 Bad")) as (url, _):
        base = f"{url}?api-version=2026-01-01&token=q1w2e3&bypass=true"
        (result,) = run(["x"], load_backend("stdlib", base_url=base))
    assert result.error.message == f"Bearer ***, ***, ***, Bearer ***, ***: {kept}"


# ---- Secrets under other names, quoted one by one --------------------------------------------------------------------


OWN = {
    "X-Access-Pass": "hunter2",
    "X-Jwt": "eyJhbGciOi.eyJzdWIiOi.c2lnbmF0dXJl",
    "Ocp-Subscription": "0a1b2c3d4e5f6a7b",
    "X-Note": "open sesame, seven",
    "X-Upstream": "Basic dXNlcjpiYXNpYy13b3Jk",
    "X-Domain": r"CORP\somebody",
}
ITEMS = {
    "pwd": "pwd%2F12345", "pass": "pass-1234", "passwd": "passwd-1234", "jwt": "jwt-1234", "sas": "sas-1234",
    "x-amz-credential": "cred+1234", "accessId": "access-1234", "sid": "sid-1234", "p%77d": "escaped-1234",
}  # fmt: skip
BASIC = base64.b64encode(LOGIN.encode()).decode()
FORMS = {*OWN.values(), *ITEMS.values(), "pwd/12345", "cred 1234", "basic-word", r"CORP\\somebody", PASSWORD, BASIC}
FORMS = {form.removeprefix("Basic ") for form in FORMS}
QUOTED = [*sorted(FORMS), *(f"a {form[:12]}..." for form in sorted(FORMS) if len(form) > 12 and "\\" not in form)]


class Quoting:
    """Answers as a server would that quotes, in one error after the other, each line of a request and each secret."""

    def __init__(self):
        self.quoted, self.answered = [], False

    def line(self, head):
        lines = [*QUOTED, *head.decode().replace("&", "\r\n").split("\r\n")[:-2]]
        self.quoted.append(lines[len(self.quoted) % len(lines)])
        return usual(f"no: {self.quoted[-1]}")

    def live(self, head, body):
        if body and not self.answered:  # else the run would stop: everything is refused alike
            self.answered = True
            return reply(b'{"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}]}')
        return reply(self.line(head), b"400 Bad") if body else reply(b'{"data": []}')

    def batch(self, head, body):
        """Take a file and make a batch of it, of which each row is an error."""
        method, path = head.decode().split()[:2]
        place = path.partition("/v1")[2].partition("?")[0]
        if place == "/files":
            self.names = re.findall(rb'"custom_id": ?"([^"]+)"', body)
            return reply(b'{"id": "file-1", "object": "file", "created_at": 1}')
        if place == "/files/file-2/content":
            row = b'{"custom_id": "%b", "response": {"status_code": 400, "body": %b}}'
            return reply(b"\n".join(row % (name, self.line(head)) for name in self.names))
        batch = {"id": "batch_1", "object": "batch", "created_at": 1, "input_file_id": "file-1"}
        batch |= {"error_file_id": "file-2", "status": "completed" if method == "GET" else "validating"}
        return reply(json.dumps(batch if "batches" in place else {"data": []}).encode())

    def failed(self, head, body):
        """Refuse each batch as a whole."""
        found = json.loads(self.batch(head, body).partition(b"\r\n\r\n")[2])
        if found.get("status") == "completed":
            error = json.loads(self.line(head))["error"]
            found |= {"status": "failed", "errors": {"data": [error | {"code": error["message"]}]}}
        return reply(json.dumps(found).encode())

    def refused(self, head, body):
        """Refuse whatever is asked."""
        return reply(self.line(head), b"403 Forbidden")


@pytest.fixture
def quoted(here, shown, monkeypatch):
    """Return a function that runs the command line against such a server, behind a proxy with a login.

    It fails if a secret shows, and returns the status and what was shown.
    """
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "\n".join(f"{name}: {text}" for name, text in OWN.items()))
    items = "&".join(f"{name}={text}" for name, text in ITEMS.items())
    (here / "prompts.txt").write_text("".join(f"prompt {number}\n" for number in range(len(QUOTED) + 60)))

    def call(answer, *flags):
        with serving(answer) as (proxy, _):
            monkeypatch.setenv("HTTP_PROXY", proxy.removesuffix("/v1").replace("//", f"//{LOGIN}@"))
            base = "--base-url", f"http://api.internal/v1?api-version=7&{items}"
            status, text = shown("prompts.txt", "-v", *base, *flags)
        assert "Traceback" not in text
        assert_secret(text, {part for form in FORMS for part in (form[:8], form[-8:])})
        return status, text

    return call


def test_no_secret_shows_under_another_name(quoted, backend):
    server = Quoting()
    status, text = quoted(server.live, "-b", backend, "--report", "r.json")
    assert status == 1 and {*QUOTED} <= {*server.quoted} and text.count("no: ***") > len(FORMS)
    assert any(line.lower() == f"proxy-authorization: basic {BASIC}".lower() for line in server.quoted)


def test_no_secret_shows_under_another_name_in_a_batch(quoted, monkeypatch):
    batch = pytest.importorskip("concurrent_prompts.backends.openai_batch")
    monkeypatch.setattr(batch, "FIRST_POLL", 0.0)
    server = Quoting()
    status, text = quoted(server.batch, "-b", "openai-batch", "--report", "r.json")
    assert status == 1 and {*QUOTED} <= {*server.quoted} and text.count("no: ***") > len(FORMS)
    for answer in (server.refused, server.failed):
        for number in range(0, len(QUOTED), 3):
            server.quoted = [""] * number
            status, text = quoted(answer, "-b", "openai-batch", "--overwrite", "--report", "r.json")
            assert status == 3 and "no: " in text


def test_no_secret_shows_in_the_notes_of_a_batch(quoted, monkeypatch):
    batch = pytest.importorskip("concurrent_prompts.backends.openai_batch")
    monkeypatch.setattr(batch, "GRACE", 0.0)
    server = Quoting()

    def running(head, body):
        if b"/v1/batches/" in head:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            return reply(server.line(head), b"500 Error")
        return server.batch(head, body)

    status, _ = quoted(running, "-b", "openai-batch", "--report", "r.json")
    assert status == 130 and '"batch":"batch_1"' in pathlib.Path("prompts.results.jsonl.running").read_text()


def test_no_secret_shows_under_another_name_in_a_dry_run(quoted):
    status, text = quoted(None, "--dry-run")
    assert status == 0 and all(f"{name}: ***" in text for name in OWN)
    assert "POST http://api.internal/v1/chat/completions?api-version=7&***" in text, "what is plain is shown"


TEXTS = {
    "words": "the quick brown fox jumps over the lazy dog; ",
    "the same character": "s",
    "backslashes": "\\",
    "escapes": r"\u0073\\u0065",
    "percent signs": "%73%65",
    "references": "&#x00000073;&#101;",
    "all but the last character": f"{KEY[:11]} {COOKIE[:11]} {QUERY[:11]} ",
    "hits": f"{KEY} {COOKIE} {QUERY} ",
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_long_text_is_rid_of_secrets_in_no_time(here, monkeypatch, name):
    own = [f"Cookie: {COOKIE}", "X-Key: " + "\\" * 20 + "x", "X-Jwt: eyJhbGci.eyJzdWIi.c2ln"]
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "\n".join(own))
    monkeypatch.setenv("HTTPS_PROXY", f"http://{LOGIN}@127.0.0.1:9")
    conceal = Api(None, base_url=f"https://host/v1?key={QUERY}").conceal
    text = (TEXTS[name] * (100_000 // len(TEXTS[name]) + 1))[:100_000]
    begun = time.process_time()
    shown = conceal(text)
    assert time.process_time() - begun < 3.0, "it takes 0.01 s to 0.3 s, and minutes if it is not linear"
    assert (shown == text) == (name != "hits")


# ---- A key over plain http -------------------------------------------------------------------------------------------


REACH = {
    "loopback": "0.0.0.0 127.0.0.1 127.9.9.9 127.1 2130706433 [::1] [::ffff:127.0.0.1] localhost LOCALHOST localhost. "
    "a.localhost localhost:8000",
    "private": "10.0.0.1 192.168.1.1:8000 172.16.0.1 169.254.1.1 [fe80::1] [fd00::1] gpu gpu:80 gpu.local gpu.internal "
    "gpu.lan gpu.home.arpa vllm.ns.svc.cluster.local vllm.ns.svc gpu.local. [::ffff:10.0.0.1]",
    "public": "example.com 8.8.8.8 134744072 0x08080808 172.32.0.1 [2001:4860:4860::8888] [::ffff:8.8.8.8] "
    "127.0.0.1.nip.io localhost.example.com notlocalhost.com local.example.com xlocal.com evil\u3002com 100.64.0.1",
}


@pytest.mark.parametrize(("host", "reach"), [(host, reach) for reach in REACH for host in REACH[reach].split()])
def test_a_key_over_plain_http(here, caplog, host, reach):
    url = f"http://{host}/v1"
    if reach == "public":
        with pytest.raises(UsageError, match=r"unencrypted; write https:// .* or give --allow-http if .* is trusted"):
            Api(None, base_url=url)
        assert not caplog.messages
        Api(None, base_url=url, allow_http=True)
    else:
        Api(None, base_url=url)
    assert len(caplog.messages) == (reach != "loopback")
    assert all("unencrypted; write https://" in message for message in caplog.messages)
    caplog.clear()
    Api(None, base_url=url.replace("http:", "https:"))
    assert not caplog.messages


@pytest.mark.parametrize(
    ("header", "query", "counts"),
    [
        ("Authorization: Bearer x", "", True),
        ("authorization: x", "", True),
        ("api-key: x", "", True),
        ("X-Api-Key: x", "", True),
        ("Cookie: a=b", "", True),
        ("", "?key=x", True),
        ("", "", False),
        ("X-Team: blue\nAuthorization:", "?api-version=2026-01-01", False),
    ],
)
def test_what_counts_as_a_key(here, monkeypatch, header, query, counts):
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", header)
    with pytest.raises(UsageError) if counts else contextlib.nullcontext():
        Api(None, base_url=f"http://example.com/v1{query}")


def test_the_command_line_warns_once_and_takes_the_flag(here, monkeypatch, capsys):
    with serving(lambda head, body: reply()) as (proxy, log):
        monkeypatch.setenv("http_proxy", proxy.removesuffix("/v1"))
        assert main(["prompts.txt", "-q", "--base-url", "http://api.example.com/v1"]) == 2
        assert "--allow-http" in capsys.readouterr().err and not log
        assert main(["prompts.txt", "-q", "--base-url", "http://api.example.com/v1", "--allow-http"]) == 0
        assert capsys.readouterr().err.count("the key goes to api.example.com unencrypted") == 1
        assert len([head for head, _ in log if head.startswith(b"POST")]) == 2


def test_a_password_in_the_url_is_refused_with_advice(here):
    with pytest.raises(UsageError, match=r"^the base URL holds an @: .* put the key into OPENAI_API_KEY"):
        Api(None, base_url=f"https://{LOGIN}@host/v1")
    assert Api(None, base_url="https://host/%40team/v1").base_url == "https://host/%40team/v1"


# ---- The terminal ----------------------------------------------------------------------------------------------------


ORDERS = "".join(map(chr, [*range(32), 127, *range(0x80, 0xA0), 0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F)]))
ORDERS += "".join(map(chr, range(0x2066, 0x206A)))


class Terminal(io.TextIOWrapper):
    """Standard output or error that says it is a terminal."""

    def __init__(self):
        super().__init__(io.BytesIO(), "utf-8", newline="", write_through=True)

    def isatty(self):
        return True


@pytest.fixture
def terminal(here, monkeypatch):
    """Return a function that makes terminals of both streams; the prompt's id holds every order there is."""
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setenv("TERM", "xterm")
    (here / "p.jsonl").write_text(json.dumps({"id": f"a{ORDERS}b", "prompt": "x"}))

    def switch():
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, Terminal())
        return sys.stdout, sys.stderr

    return switch


CHOICE = {"message": {"content": f"a{ORDERS}b"}}
ANSWER = json.dumps({"choices": [CHOICE], "model": ORDERS}, ensure_ascii=False).encode()
ERROR = usual(f"a{ORDERS}b")


def orders_in(stream):
    """Return the control characters that reached the terminal, but for line ends and the program's own."""
    text = re.sub(r"\r[ -~]*\x1b\[K", "", stream.buffer.getvalue().decode())
    return set(text) & set(ORDERS) - {"\n"}


def test_an_answer_printed_on_a_terminal_commands_nothing(terminal):
    out, err = terminal()
    with serving(lambda head, body: reply(ANSWER)) as (url, _):
        assert main(["p.jsonl", "-o", "-", "--format", "jsonl", "--base-url", url]) == 0
        assert main(["p.jsonl", "--compare", "--base-url", url]) == 0
    assert (orders_in(out), orders_in(err)) == (set(), set())
    row = json.loads(out.buffer.getvalue().splitlines()[0])
    assert (row["text"], row["id"]) == (f"a{ORDERS}b", f"a{ORDERS}b"), "the same JSON value"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such file names")
def test_an_error_printed_on_a_terminal_commands_nothing(terminal, monkeypatch):
    out, err = terminal()
    name = "p\x1b[31m\u202e.jsonl"
    pathlib.Path("p.jsonl").rename(name)
    replies = [reply(ERROR, b"500 Error"), reply(ERROR, b"400 Bad")]
    with serving(lambda head, body: replies.pop(0) if body else reply(ERROR)) as (url, _):
        assert main([name, "-v", "--base-url", url]) == 1
    assert main(["\x9b31m.txt", "--base-url", url]) == 2
    text = err.buffer.getvalue().decode()
    assert (orders_in(out), orders_in(err)) == (set(), set())
    assert "results in p\\u001b[31m\\u202e.results.jsonl\n" in text and "cannot read \\u009b31m.txt" in text
    assert "\r\x1b[Ka\\u0000" in text, "the program's own order clears the progress line before a log line"


def test_a_pipe_gets_the_bytes_as_they_are(here, capfdbinary):
    with serving(lambda head, body: reply(ANSWER)) as (url, _):
        assert main(["prompts.txt", "-o", "-", "-q", "-n", "1", "--base-url", url]) == 0
    out, _ = capfdbinary.readouterr()
    assert "\x7f\x80\x9b".encode() in out.replace(bytes(range(0x20)), b"") or "\x9b\x9c".encode() in out
    assert json.loads(out)["text"] == f"a{ORDERS}b"


# ---- What answers, schemas and the dry run could show --------------------------------------------------------


def test_no_secret_shows_where_an_answer_that_does_not_fit_quotes_it(here, shown):
    pytest.importorskip("jsonschema")
    pathlib.Path("s.json").write_text('{"type": "object", "properties": {"a": {"type": "integer"}}}')
    content = json.dumps({"choices": [{"message": {"content": json.dumps({"a": KEY})}}], "model": f"{KEY}/gpt-4o",
                          "usage": {"prompt_tokens": 5, "completion_tokens": 5}}).encode()  # fmt: skip
    with serving(lambda head, body: reply(content)) as (url, _):
        status, text = shown("prompts.txt", "--base-url", url, "--schema", "s.json", "--report", "r.json", "-v")
    told = pathlib.Path("r.json").read_text()
    assert status == 1 and "$.a: '***" in text and "schema_mismatch" in told
    assert KEY not in told, told[max(0, told.index(KEY) - 300) :][:600]
    assert KEY not in text.replace(pathlib.Path("prompts.results.jsonl").read_text(), ""), "answers stay as they are"


def test_a_dry_run_shows_only_harmless_headers(here, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Session-Id: hush-1\nX-Pass: hush-2\nX-Credential: hush-3")
    assert main(["prompts.txt", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "hush" not in out and "X-Pass: ***" in out and "Content-Type: application/json" in out


# ---- Files that are replaced ---------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="links are not for everybody there")
@pytest.mark.parametrize("name", ["r.json", "prompts.results.jsonl"])
def test_no_link_that_somebody_has_laid_is_written_through(here, name):
    victim = pathlib.Path("victim")
    victim.write_text("precious")
    pathlib.Path(f".{name}.tmp").symlink_to(victim)
    with serving(lambda head, body: reply()) as (url, _):
        assert main(["prompts.txt", "-q", "--base-url", url, "--report", "r.json"]) == 0
    assert victim.read_text() == "precious"
    assert pathlib.Path(name).is_file() and not pathlib.Path(name).is_symlink()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
@pytest.mark.parametrize("flag", ["--report", "--plot"])
def test_what_is_no_regular_file_is_not_replaced(here, capsys, flag):
    pytest.importorskip("matplotlib")
    name = {"--report": "r.json", "--plot": "p.svg"}[flag]
    os.mkfifo(name)
    assert main(["prompts.txt", "--base-url", "http://127.0.0.1:9/v1", flag, name]) == 2
    assert "not a regular file" in capsys.readouterr().err


def test_the_schema_is_not_overwritten(here, capsys):
    pathlib.Path("s.json").write_text("{}")
    assert main(["prompts.txt", "--base-url", "http://127.0.0.1:9/v1", "--schema", "s.json", "--report", "s.json"]) == 2
    assert "s.json is the schema; choose another file" in capsys.readouterr().err


def test_a_report_that_cannot_be_written_is_named_and_costs_no_answer(here, capsys, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(concurrent_prompts, "replacing", full)
    with serving(lambda head, body: reply()) as (url, _):
        assert main(["prompts.txt", "--base-url", url, "--report", "r.json"]) == 3
    err = capsys.readouterr().err
    assert "cannot write r.json: No space left on device" in err and "2 answered, 0 failed" in err


WRITTEN = {
    "as it is": str,
    "in JSON": escape_json,
    "in JSON with escaped slashes": lambda text: escape_json(text).replace("/", "\\/"),
    "in JSON in JSON": lambda text: escape_json(escape_json(text).replace("/", "\\/")),
    "in HTML": html.escape,
    "in a URL": functools.partial(urllib.parse.quote, safe=""),
}


@in_rows("key", ["sk-0123456789abc/def.ghi/jkl~mno", "sk-0123456789abc/def&ghi'jkl\"mno<pqr+stu"])
@in_rows("how", WRITTEN)
def test_no_end_of_a_secret_is_left_behind_an_escaped_sign(key, how):
    conceal = concealer(key, [])
    assert conceal(f'{{"error": "no {WRITTEN[how](key)} here"}}') == '{"error": "no *** here"}'
