"""The backend contract: how to teach concurrent_prompts.py another HTTP client, or another way to answer in bulk.

A live backend is one function, an async context manager factory:

    @asynccontextmanager
    async def connect(base_url, headers, concurrency):
        ...                     # open a session, a pool, a client
        yield post              # the run happens here
        ...                     # close it

    async def post(path, body) -> (status, headers, body)

`connect` is given
    base_url     str, without a trailing slash: "https://api.openai.com/v1"
    headers      dict of str to str, to send with every request: Content-Type, Authorization, ...
    concurrency  int, the most calls that will ever be in flight; a pool must not be smaller

`post` is given the path below the base URL ("/chat/completions", maybe with a "?query") and the
body, JSON as bytes, or b"" for a GET ("/models"); it returns the status as an int, a mapping whose
get() finds a header by its lower-case name, and the body as bytes, content and transfer encodings undone.

The rules:
  * Every HTTP status is returned as a value, redirects too: none is followed, none is an exception.
  * Whatever goes wrong below HTTP (refused, reset, cut short, not HTTP at all, a certificate that is
    not verified, a limit on size exceeded) is raised as the built-in ConnectionError, or TimeoutError,
    from the library's own exception; the message is one line that says what happened. Nobody there at all
    (refused, no route, no such name) is its subclass ConnectionRefusedError.
  * A backend never retries, sleeps, limits, times out or prints; the core does, once for all. The one exception:
    if a connection that has answered before ends before the first byte of the next reply, the server or a proxy had
    closed it meanwhile; the backend sends the request again at once, once, on a fresh connection. A ConnectionError
    is for what happened on a fresh connection or after the first byte. `pool.Reuse` counts, and says when to keep none.
  * `post` may be cancelled at any await; a connection with half an answer on it is never used again, nor is one on
    which a 5xx came: another connection may lead to another replica.
  * Bytes that arrive before a reply is complete (1xx replies, blank lines, comments, a slow body) show that the call is
    alive. `ALIVE.get()`, read in `post` itself, is None or a function without arguments to call at each such arrival;
    it is cheap, and may be called from a callback of the event loop. A reply that arrives whole needs no such call.
  * HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY, SSL_CERT_FILE and SSL_CERT_DIR are honoured; a loopback address is
    reached directly (`proxy_for` knows). A proxy is sent its own login and, if it tunnels, none of `headers`.
  * One `connect` serves one event loop. It needs nothing from the core.

A bulk backend takes the whole stream of requests and answers it in its own way: a batch service, a cluster, a
model in this process. It is one async generator function, which is how it is recognised:

    async def submit(job):
        while requests := await job.take(256):
            ...                                       # answer them all at once, somewhere
            for request in requests:
                yield request, (status, headers, body)

Each request is yielded once, with what `post` would have returned, or with the exception that it would have raised;
(0, {}, body) is an error, in OpenAI's form, without a call that could have a status.
The core classifies that, and gives out again what may be answered the next time; journal, resume, budget, report and
exit status are its own. A job is
    take(count, size=inf)  the next requests: so many, of so many bytes, at the most, and one at the least; []
                           where there are none now, or, with nothing under way, none at all
    base_url, headers      as `connect` is given them; `query` belongs to every URL ("api-version=...", mostly "")
    options                a dict: concurrency ("auto" or a number), max_attempts, timeout, rpm, tpm, cluster,
                           worker_backend
    stopped                "", or why the run is to end ("interrupted", "deadline", ...): take gives [] from
                           then on; what comes soon may still be yielded
    sleep(seconds)         returns early where the run is stopped, and whether it did not
    call(function, ...)    awaits it, again where that may help; raises PromptError, with `error` (type,
                           message, status) and `heard` (False: nobody knows whether it has been done)
    notes, note(value)     what is running elsewhere, kept beside the results for the next run of the same job;
                           forget() removes it where nothing is, keep_notes() lets it stay when all is answered
    noted_in, answered     the notes' file, or None; how many answers earlier runs have kept
    say(text), log         for the progress, and for all else that is to be said
    in_flight(count)       for the progress, where it is not all that was taken
and a request has `path` and `body`, as `post` is given them, `model`, and `key`, by which a later run knows it again.
take, sleep, call and note are awaited. ValueError before the first answer means that the job cannot be done as asked;
any other exception stops the run, with all that was answered, and so does stop(kind, message). The second Ctrl-C is a
CancelledError at the next await. The function may have attributes: `price_share`, what it costs of the usual price (0:
nothing, and no key is wanted); `uses`, which of the options rpm, tpm, cluster and worker_backend mean something to it;
`parting`, what Ctrl-C does. `core` is the core's module, whatever it is called. A backend that runs it elsewhere yields
Results; it has `api`, `limiter` and `request.prompt`, the core's own, and says with `retries` = True that a Result may
come of several calls.

`-b NAME` loads `connect` or `submit` from backends/NAME.py (dashes become underscores), `-b package.module:name`
from anywhere else: a third party's backend is used exactly as the built-in ones are.
"""

import contextlib
import importlib
import ipaddress
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import concurrent_prompts as core

    __all__ = ["ALIVE", "MAX_BODY", "MAX_ERROR", "Post", "core", "named_proxy", "proxy_for", "reach_of"]

MAX_BODY = 256 * 1024 * 1024  # bytes of a body, sent and decompressed: what is larger is no answer
ALIVE: ContextVar[Callable[[], None] | None] = ContextVar("alive", default=None)  # set by the run for each call
PRIVATE_NAMES = (".local", ".internal", ".lan", ".home.arpa", ".cluster.local", ".svc")

Post = Callable[[str, bytes], Awaitable[tuple[int, Mapping[str, str], bytes]]]
Connect = Callable[[str, dict[str, str], int], AbstractAsyncContextManager[Post]]


def __getattr__(name: str) -> Any:
    """Return the core, whatever it is called, when it is asked for: a live backend does without."""
    if name == "core":
        return importlib.import_module(__name__.rpartition(".")[0] or "concurrent_prompts")
    raise AttributeError(f"module {__name__} has no attribute {name}")


def proxy_for(base_url: str) -> str | None:
    """Return the URL of the proxy that a backend is to use for this base URL, or None.

    Raises ConnectionError for a kind of proxy that no backend here can use.
    """
    proxy = named_proxy(base_url)
    if proxy and proxy.lower().startswith("socks"):
        raise ConnectionError("the environment names a SOCKS proxy, which is not supported; use an HTTP proxy")
    return proxy


def named_proxy(base_url: str) -> str | None:
    """Return the URL of the proxy that the environment names for this base URL, of whatever kind, or None.

    A loopback address has none: a proxy elsewhere would send to its own machine what is meant for this one.
    """
    parts = urlsplit(base_url)
    if not any(name.lower().endswith("_proxy") for name in os.environ) or reach_of(parts.hostname or "") == "loopback":
        return None
    import urllib.request as request  # slow to import, seldom needed

    proxies = request.getproxies_environment()
    bypassed: Callable[..., bool] = request.proxy_bypass_environment  # type: ignore[attr-defined]  # not in typeshed
    if bypassed(parts.hostname, proxies) or bypassed(parts.netloc.rpartition("@")[2], proxies):
        return None
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    return proxy if not proxy or "://" in proxy else f"http://{proxy}"


def tls_context(base_url: str) -> Any:
    """Return the ssl.SSLContext to verify the server of this base URL, and its proxy, with.

    Reading the system's certificates takes 50 ms: if neither speaks TLS, the context trusts nobody.
    """
    import ssl

    if not any(url.lower().startswith("https:") for url in (base_url, named_proxy(base_url) or "")):
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    check_certificates()
    return ssl.create_default_context()


def check_certificates() -> None:
    """Raise ValueError if the environment names certificates that are not there: OpenSSL passes over them."""
    file, folders = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
    if file:
        try:
            with open(file, "rb") as lines:
                found = any(b"CERTIFICATE-----" in line for line in lines)
        except OSError as failure:
            what = f"SSL_CERT_FILE names {file}, which cannot be read: {failure.strerror or failure}"
            raise ValueError(f"{what}; correct or unset it") from None
        if not found:
            raise ValueError(f"SSL_CERT_FILE names {file}, which contains no PEM certificate; correct or unset it")
    if folders and not any(map(os.path.isdir, folders.split(os.pathsep))):
        raise ValueError(f"SSL_CERT_DIR names {folders}, which is not a folder; correct or unset it")


def reach_of(host: str) -> str:
    """Return whether a host is "loopback", "private" or "public", as its name says: nothing is looked up."""
    host = host.rstrip(".")
    for parse in (ipaddress.ip_address, socket.inet_aton):  # the latter knows 127.1 and 2130706433 too
        with contextlib.suppress(ValueError, OSError):
            address = ipaddress.ip_address(parse(host))
            address = getattr(address, "ipv4_mapped", None) or address
            if address.is_loopback or address.is_unspecified:  # connecting to 0.0.0.0 reaches this machine
                return "loopback"
            return "private" if address.is_private or address.is_link_local else "public"
    if host == "localhost" or host.endswith(".localhost"):
        return "loopback"
    bare = host.isascii() and "." not in host  # there are other dots than ASCII's
    return "private" if bare or host.endswith(PRIVATE_NAMES) else "public"
