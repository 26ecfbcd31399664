"""What several files of tests use: where the module is, servers to talk to, a clock that jumps."""

import asyncio
import contextlib
import functools
import json
import pathlib
import selectors
import ssl
import threading
import time

import concurrent_prompts
from concurrent_prompts.extras.stand_in import serve

SCRIPT = concurrent_prompts.__file__
ROOT = pathlib.Path(SCRIPT).parent
NAMES = ("stdlib", "raw-aiohttp", "openai-sdk")
LIBRARIES = {"raw-aiohttp": "aiohttp", "openai-sdk": "openai"}
ANSWER = b'{"choices": [{"message": {"role": "assistant", "content": "hi"}}]}'
VARIABLES = (
    "OPENAI_API_KEY OPENAI_BASE_URL OPENAI_API_BASE OPENAI_ORG_ID OPENAI_PROJECT_ID OPENAI_CUSTOM_HEADERS "
    "HTTP_PROXY HTTPS_PROXY ALL_PROXY NO_PROXY http_proxy https_proxy all_proxy no_proxy SSL_CERT_FILE SSL_CERT_DIR"
)

create_default_context = functools.cache(ssl.create_default_context)  # loading the certificates is what takes the time


def rows(path):
    """Return the rows of a results file."""
    return [json.loads(line) for line in pathlib.Path(path).read_text("utf-8").splitlines()]


# ---- Servers -------------------------------------------------------------------------------------------------


def reply(body=ANSWER, status=b"200 OK", headers=b""):
    """Return a whole HTTP reply."""
    length = str(len(body)).encode()
    return b"HTTP/1.1 " + status + b"\r\ncontent-type: application/json\r\n" + headers + (
        b"content-length: " + length + b"\r\n\r\n" + body
    )  # fmt: skip


@contextlib.asynccontextmanager
async def scripted(answer, tls=None):
    """Serve each request on loopback with answer(head, body): bytes, blocks of them, or None to reset.

    Yield the URL and the log.
    """
    log, sessions = [], {}

    async def session(reader, writer):
        sessions[asyncio.current_task()] = writer
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                lengths = [line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
                body = await reader.readexactly(int(lengths[0].split(b":")[1])) if lengths else b""
                log.append((head, body))
                reply = answer(head, body)
                if reply is None:
                    writer.transport.abort()
                    return
                for block in [reply] if isinstance(reply, bytes) else reply:
                    writer.write(block)
                    await writer.drain()
                if isinstance(reply, bytes) and b"connection: close" in reply.lower():
                    break
        writer.close()

    server = await asyncio.start_server(session, "127.0.0.1", 0, ssl=tls)
    try:
        yield f"{'https' if tls else 'http'}://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", log
    finally:
        server.close()
        for writer in sessions.values():
            writer.transport.abort()
        await asyncio.gather(*sessions, return_exceptions=True)
        await server.wait_closed()


@contextlib.contextmanager
def serving(answer, tls=None):
    """Serve as `scripted` does, in a thread; yield the URL and the log."""
    loop, server = asyncio.new_event_loop(), scripted(answer, tls)
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield asyncio.run_coroutine_threadsafe(server.__aenter__(), loop).result(5)
    finally:
        asyncio.run_coroutine_threadsafe(server.__aexit__(None, None, None), loop).result(5)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextlib.contextmanager
def in_thread(options):
    ready, server = threading.Event(), {}

    async def work():
        async with serve(**options) as server["it"]:
            server["loop"], server["end"] = asyncio.get_running_loop(), asyncio.Event()
            ready.set()
            await server["end"].wait()

    thread = threading.Thread(target=asyncio.run, args=(work(),))
    thread.start()
    ready.wait(5)
    yield server["it"]
    server["loop"].call_soon_threadsafe(server["end"].set)
    thread.join()


# ---- Time ----------------------------------------------------------------------------------------------------


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer whenever there is nothing else to do."""

    def __init__(self):
        super().__init__(selectors.SelectSelector())
        self.now = 1000.0
        select = self._selector.select

        def jump(timeout):
            assert timeout is not None, "everything waits and nothing will ever happen"
            self.now += timeout
            return select(0)

        self._selector.select = jump

    def time(self):
        return self.now


def virtual(test):
    """Run an async test in virtual time."""

    @functools.wraps(test)
    def run_test(*args, **kwargs):
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            runner.run(test(*args, **kwargs))

    return run_test


async def longest_pause(waiting):
    """Return what comes of it, and the longest time in which the event loop did nothing else."""
    longest, task = 0.0, asyncio.ensure_future(waiting)
    while not task.done():
        began = time.perf_counter()
        await asyncio.sleep(0.001)
        longest = max(longest, time.perf_counter() - began)
    return await task, longest
