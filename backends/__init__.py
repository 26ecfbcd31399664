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
  * A backend never retries, sleeps, limits, times out or prints; the core does, once for all. So a
    kept-alive connection that the server has closed as the request was written is a ConnectionError like
    any other: the core sends it again at once.
  * `post` may be cancelled at any await; a connection with half an answer on it is never used again.
  * HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY, SSL_CERT_FILE and SSL_CERT_DIR are honoured.
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

import os
import sys

# As the core does: `python -m backends.plot` takes nothing from the current folder but this package, if it is there.
if sys.argv[:1] == ["-m"] and not sys.flags.safe_path and sys.path[0] != os.path.dirname(__path__[0]):
    del sys.path[0]

from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from urllib.parse import urlsplit

MAX_BODY = 256 * 1024 * 1024  # bytes of a body, sent and decompressed: what is larger is no answer

Post = Callable[[str, bytes], Awaitable[tuple[int, Mapping[str, str], bytes]]]
Connect = Callable[[str, dict[str, str], int], AbstractAsyncContextManager[Post]]


def proxy_for(base_url: str) -> str | None:
    """Return the URL of the proxy that the environment names for this base URL, or None.

    Raises ConnectionError for a kind of proxy that no backend here can use.
    """
    if not any(name.lower().endswith("_proxy") for name in os.environ):
        return None
    import urllib.request as request  # slow to import, seldom needed

    parts = urlsplit(base_url)
    proxies = request.getproxies_environment()
    bypassed: Callable[..., bool] = request.proxy_bypass_environment  # type: ignore[attr-defined]  # not in typeshed
    if bypassed(parts.hostname, proxies) or bypassed(parts.netloc.rpartition("@")[2], proxies):
        return None
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy and proxy.lower().startswith("socks"):
        raise ConnectionError("the environment names a SOCKS proxy; only HTTP proxies can be used")
    return proxy if not proxy or "://" in proxy else f"http://{proxy}"
