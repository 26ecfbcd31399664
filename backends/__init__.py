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
  * Every HTTP status is returned, redirects too: none is followed, and none is an exception.
  * A failure below HTTP (reset, cut short, not HTTP at all, a certificate that is not verified, a body that is too
    large) is raised as the built-in ConnectionError, or TimeoutError, from the library's own exception; the message is
    one line that says what happened. If the server cannot be reached at all (connection refused, no route, unknown
    name) it is the subclass ConnectionRefusedError.
  * A backend never retries, sleeps, limits, times out or prints: the core does. The one exception: if a reused
    connection ends before the first byte of the reply, the server or a proxy had closed it; the backend sends the
    request again at once, once, on a fresh connection. A ConnectionError is for a failure on a fresh connection or
    after the first byte. `pool.Reuse` counts these cases, and says when not to reuse connections.
  * `post` may be cancelled at any await. A connection with half a reply on it is never used again, nor is one on
    which a 5xx came: another connection may lead to another replica.
  * Bytes that arrive before a reply is complete (1xx replies, blank lines, comments, a slow body) show that the server
    works. `ALIVE.get()`, read in `post` itself, is None or a function without arguments to call whenever bytes arrive;
    it is cheap, and may be called from a callback of the event loop. A reply that arrives whole needs no such call.
  * HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY, SSL_CERT_FILE and SSL_CERT_DIR are honoured; a loopback address is
    reached directly (see `proxy_for`). A proxy is sent its own login and, if it tunnels, none of `headers`.
  * One `connect` serves one event loop. It needs nothing from the core.

A bulk backend takes the whole stream of requests and answers it in its own way: a batch service, a cluster, a
model in this process. It is one async generator function, which is how it is recognised:

    async def submit(job):
        while requests := await job.take(256):
            ...                                       # answer them all at once, somewhere
            for request in requests:
                yield request, (status, headers, body)

Each request is yielded once, with what `post` would have returned, or with the exception that it would have raised;
(0, {}, body) is an error in OpenAI's form for which there is no HTTP status.
The core classifies the outcome and gives out a request again if a retry may help; journal, resume, budget, report and
exit status are the core's. A job has
    take(count, size=inf)  the next requests: up to `count`, with up to `size` bytes in all, but at least one if any is
                           left; [] if none is available now, or, with no request open, none will come
    base_url, headers      as `connect` is given them; `query` is added to every URL ("api-version=...", mostly "")
    options                a dict: concurrency ("auto" or a number), max_attempts, timeout, rpm, tpm, cluster,
                           worker_backend
    stopped                "", or why the run is stopping ("interrupted", "deadline", ...): then `take` returns [];
                           outcomes that come soon may still be yielded
    sleep(seconds)         returns early if the run is stopped; the value is whether the time is over
    call(function, ...)    awaits the function, and retries it; raises PromptError, with `error` (type, message,
                           status) and `heard` (False: it is unknown whether the server received the request)
    notes, note(value)     JSON values that name the jobs running elsewhere, kept beside the results file for the next
                           run; forget() removes them, keep_notes() keeps them even after the last answer
    noted_in, answered     the notes' file, or None; how many answers of earlier runs the results file holds
    say(text), log         a text for the progress; the logger for everything else
    in_flight(count)       how many calls are in flight, if not all requests taken are
and a request has `path` and `body`, as `post` is given them, `model`, and `key`, a hash that is the same in later runs.
take, sleep, call and note are awaited. ValueError before the first outcome means that the job cannot be done as
requested; any other exception stops the run and keeps its answers, as stop(kind, message) does. The second Ctrl-C is
a CancelledError at the next await. The function may have attributes: `price_share`, its price as a share of the usual
one (0: free, and no key is needed); `uses`, those of the options rpm, tpm, cluster and worker_backend that it takes;
`parting`, what is printed at the first Ctrl-C. `core` is the core's module, whatever its name. A backend that runs the
core elsewhere yields Results; it uses `api`, `limiter` and `request.prompt`, the core's own objects, and has
`retries` = True if a Result may come of several calls.

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

MAX_BODY = 256 * 1024 * 1024  # bytes of a reply's body, as received and decompressed; a larger one is an error
ALIVE: ContextVar[Callable[[], None] | None] = ContextVar("alive", default=None)  # set by the run for each call
PRIVATE_NAMES = (".local", ".internal", ".lan", ".home.arpa", ".cluster.local", ".svc")

Post = Callable[[str, bytes], Awaitable[tuple[int, Mapping[str, str], bytes]]]
Connect = Callable[[str, dict[str, str], int], AbstractAsyncContextManager[Post]]


def __getattr__(name: str) -> Any:
    """Return the core, whatever its name, when it is first used: a live backend works without it."""
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
    """Return the URL of the proxy that the environment names for this base URL, of any kind, or None.

    A loopback address has none: a proxy on another machine would send the request to that machine.
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
    """Return the ssl.SSLContext that verifies the server of this base URL, and its proxy.

    Reading the system's certificates takes 50 ms: if neither speaks TLS, the context trusts nobody.
    """
    import ssl

    if not any(url.lower().startswith("https:") for url in (base_url, named_proxy(base_url) or "")):
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    check_certificates()
    return ssl.create_default_context()


def check_certificates() -> None:
    """Raise ValueError if the environment names certificates that do not exist: OpenSSL ignores that."""
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
