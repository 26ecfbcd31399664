"""What several files of tests use: where the module is, servers to talk to, a clock that jumps."""

import asyncio
import contextlib
import functools
import inspect
import io
import itertools
import json
import pathlib
import selectors
import ssl
import subprocess
import sys
import threading
import time

import pytest

import concurrent_prompts
from concurrent_prompts.backends.api import Api

SCRIPT = concurrent_prompts.__file__
ROOT = pathlib.Path(SCRIPT).parent
PRICE = 1.0, 4.0  # USD per million tokens in, out
NAMES = ("stdlib", "raw-aiohttp", "openai-sdk")
LIBRARIES = {"raw-aiohttp": "aiohttp", "openai-sdk": "openai"}
needs_extras = pytest.mark.skipif(not (ROOT / "extras").is_dir(), reason="the folder extras/ is not here")
ANSWER = b'{"choices": [{"message": {"role": "assistant", "content": "hi"}}]}'
VARIABLES = (
    "OPENAI_API_KEY OPENAI_BASE_URL OPENAI_API_BASE OPENAI_ORG_ID OPENAI_PROJECT_ID OPENAI_CUSTOM_HEADERS "
    "HTTP_PROXY HTTPS_PROXY ALL_PROXY NO_PROXY http_proxy https_proxy all_proxy no_proxy SSL_CERT_FILE SSL_CERT_DIR"
)

create_default_context = functools.cache(ssl.create_default_context)  # loading the certificates is what takes the time


def start(arguments, **options):
    """Start the script in a process of its own."""
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, SCRIPT, *arguments], stdout=pipe, stderr=pipe, text=True, **options)


def jsonl(*values):
    """Return the values as JSON Lines."""
    return "".join(f"{json.dumps(value)}\n" for value in values)


def batch_line(custom_id, content, model="gpt-6-luna", url="/v1/chat/completions"):
    """Return a request line of a Batch."""
    body = {"model": model, "messages": [{"role": "user", "content": content}]}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def said(capsys):
    """Return the last message on standard error, without the program's name."""
    return capsys.readouterr().err.splitlines()[-1].removeprefix("concurrent_prompts.py: ")


def rows(path):
    """Return the rows of a results file."""
    return [json.loads(line) for line in pathlib.Path(path).read_text("utf-8").splitlines()]


class Terminal(io.TextIOWrapper):
    """A stream that says it is a terminal."""

    def __init__(self):
        super().__init__(io.BytesIO(), "utf-8", newline="", write_through=True)

    def isatty(self):
        return True


def contents(prompts):
    """Return each prompt's content, or "!" for one that could not be read."""
    return ["!" if prompt.error else prompt.content for prompt in prompts]


def line_of(prompt):
    """Return the line number that a prompt's error names, after checking that the message names the file too."""
    assert prompt.error.type in ("unreadable", "missing_column") and not prompt.error.retryable
    where, _, reason = prompt.error.message.partition(": ")
    assert where == prompt.where and reason
    return int(where.rpartition(" line ")[2])


def in_rows(names, table, ids=None):
    """Run a test for each row of a table, as pytest's parametrize does, but as one test: for rows that take no time.

    The rows share the other arguments, and each is called; the failure has those of all rows, with their names. A row
    that is skipped costs no other. What `monkeypatch` sets is undone after each row.
    """
    names = names.replace(",", " ").split() if isinstance(names, str) else names
    table = [row if len(names) > 1 else (row,) for row in table]
    ids = [*ids] if ids is not None and not callable(ids) else [", ".join(map(ids or repr, row)) for row in table]
    assert len(ids) == len(table) > 1 and all(len(row) == len(names) for row in table)

    def decorate(test):
        def rows_with(given):
            failures, skipped = [], []
            for label, row in zip(ids, table, strict=True):
                with contextlib.ExitStack() as stack:
                    fresh = {name: stack.enter_context(given[name].context()) for name in {"monkeypatch"} & {*given}}
                    yield kept(failures, skipped, label), given | fresh | dict(zip(names, row, strict=True))
            if failures:
                failed = "; ".join(", ".join(failure.__notes__) for failure in failures)
                raise ExceptionGroup(f"{len(failures)} of {len(table)} rows: {failed}", failures)
            if len(skipped) == len(table):
                raise skipped[0]

        def run(**given):
            for keeping, arguments in rows_with(given):
                with keeping:
                    test(**arguments)

        async def run_async(**given):
            for keeping, arguments in rows_with(given):
                with keeping:
                    await test(**arguments)

        wrapped = functools.wraps(test)(run_async if inspect.iscoroutinefunction(test) else run)
        signature = inspect.signature(test)
        left = [parameter for name, parameter in signature.parameters.items() if name not in names]
        wrapped.__signature__ = signature.replace(parameters=left)
        return wrapped

    return decorate


@contextlib.contextmanager
def kept(failures, skipped, label):
    """Keep a failure in the list, with the row's name in a note, or that the row was skipped."""
    try:
        yield
    except pytest.skip.Exception as failure:
        skipped.append(failure)
    except (Exception, pytest.fail.Exception) as failure:
        given = failure if isinstance(failure, Exception) else AssertionError(str(failure))
        given.add_note(f"row {label:.200}")
        failures.append(given)


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
        for _ in range(4):  # asyncio takes as many turns to make a session of a connection that was just accepted
            await asyncio.sleep(0)
        for writer in sessions.values():
            writer.transport.abort()
        await asyncio.gather(*sessions, return_exceptions=True)
        await asyncio.sleep(0)  # in which the transports close their sockets
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
    """Run a stand-in server in a thread; yield it."""
    from concurrent_prompts.extras.stand_in import serve

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


# ---- Backends that are no servers ----------------------------------------------------------------------------


def completion(text="Yes.", asked=20, answered=200, **more):
    """Return what a backend returns: a chat completion with its usage."""
    usage = {"prompt_tokens": asked, "completion_tokens": answered}
    choices = [{"message": {"content": text}, "finish_reason": "stop"}]
    return 200, {}, json.dumps({"model": "m", "choices": choices, "usage": usage} | more).encode()


def connector(answer):
    """Return a backend whose replies `answer` makes from the request."""

    @contextlib.asynccontextmanager
    async def connect(base_url, headers, concurrency):
        async def post(path, body):
            return await answer(json.loads(body))

        yield post

    return connect


def api_of(answer, **settings):
    return Api(connector(answer), base_url="http://127.0.0.1:9/v1", **{"model": "m"} | settings)


def constant(*replies):
    """Return an Api that gives these replies, one after the other, the last again and again; and its requests."""
    left, requests = list(replies), []

    async def answer(request):
        requests.append(request)
        found = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(found, Exception):
            raise found
        return found

    return answer, requests


# ---- Time ----------------------------------------------------------------------------------------------------


class Clock:
    """A clock that moves only while somebody sleeps by it: then at once."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    async def sleep(self, seconds):
        self.now += seconds
        await asyncio.sleep(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer whenever there is nothing else to do."""

    def __init__(self):
        super().__init__(selectors.SelectSelector())
        self.now, turns = 1000.0, itertools.count()
        select = self._selector.select

        def jump(timeout):
            assert timeout is not None, "everything waits and nothing will ever happen"
            self.now += timeout
            return [] if next(turns) % 16 else select(0)  # a system call, and nobody is outside

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
    """Return what comes of it, and the longest time of the processor in which the event loop did nothing else."""
    longest, task = 0.0, asyncio.ensure_future(waiting)
    while not task.done():
        began = time.thread_time()
        await asyncio.sleep(0.001)
        longest = max(longest, time.thread_time() - began)
    return await task, longest
