"""The dask-cluster backend, a bulk one: the same job on the workers of a Dask cluster.

Needs: pip install distributed cryptography. Without an address the cluster is made of processes on this machine, one
for each core, that talk over TLS with credentials of their own: others on the machine can neither join nor listen.
Each worker runs the core's own concurrent loop over a live backend, so that retries, limits and error classes are the
core's there as here. It needs no copy of this project: an `Engine` is made there of the source text that the driver
sends with the job's settings.

The driver and an engine talk in exchanges through the scheduler, one at a time: prompts go there, results come back as
soon as there are some. An engine holds little more than what it has in flight, so that the input may be larger than
any memory, and little is lost if a worker dies. The key goes there once, compressed, into the engine's memory; it is
in no task, environment, file or log. An engine that has not heard from its driver for a minute ends.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import gc
import hashlib
import importlib.metadata
import importlib.util
import itertools
import linecache
import logging
import math
import os
import pickle
import signal
import sys
import threading
import time
import types
import uuid
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Mapping
from typing import Any

import distributed

TURN = 1.0  # seconds after which an engine replies even without results, and between two looks at the list of workers
# What every live backend needs, in this order.
FILES = (
    "pool", "keys", "meanings", "exceptions", "failures", "hints", "usage", "streams", "prompts", "replies", "limits",
    "limiter", "rejections", "evidence", "stragglers", "strict", "api", "loading",
)  # fmt: skip
DIALECT = "backends", *(f"backends.{name}" for name in FILES)
OPERATION = f"{__name__.partition('.')[0]}.exchange"  # the name of this handler on a Dask worker


# ---- On a worker ---------------------------------------------------------------------------------------------


engines: dict[str, Engine] = {}


def install(
    name: str,
    sources: Mapping[str, str],
    state: dict[str, Any],
    options: dict[str, Any],
    backend: str,
    proxies: dict[str, str] | None,
    carried: list[tuple[str, Any]],
) -> str:
    """Make an engine in this process, on the event loop of a Dask worker; return why that is impossible, or ''.

    `carried` names the extras that wrap the calls, each with the value that restores it. `proxies` are the variables
    without which our own processes were started, since they hold passwords; None on a cluster that is not ours.
    """
    os.environ.update(proxies or {})
    package = OPERATION.partition(".")[0]
    core: Any = make_module(package, sources)
    for part in (*DIALECT, "extras", "extras.wraps", *(f"extras.{name}" for name, _ in carried)):
        make_module(f"{package}.{part}", sources)
    core.log = logging.Logger("concurrent_prompts", logging.WARNING)
    loading = core.sibling("backends", "loading")
    backend = backend or loading.default_backend()
    try:
        connect = live_backend(backend, package, sources)
    except ModuleNotFoundError as missing:
        return loading.missing_backend(backend, missing.name or "")  # type: ignore[no-any-return]
    for worker in list(distributed.Worker._instances):
        worker.handlers.setdefault(OPERATION, exchange)
    if proxies is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all; the driver passes it on
        gc.freeze()  # as the core does in its own process
        gc.set_threshold(50_000)

    def begin() -> Any:
        extras = [core.sibling("extras", file).restore(value) for file, value in carried]
        return core.Run(core.sibling("backends", "api").Api.of(state, connect), extras=extras, **options)

    engines[name] = Engine(name, core, begin)
    return ""


def live_backend(name: str, package: str, sources: Mapping[str, str]) -> Any:
    """Return the function that the backend is, ours made from its source. Raises ModuleNotFoundError."""
    module, _, attribute = name.partition(":")
    if attribute:
        live: Any = sys.modules[f"{package}.backends.loading"].import_named(module)
        return functools.reduce(getattr, attribute.split("."), live)
    if name == "openai-sdk":
        make_module(f"{package}.backends.httpcore_pool", sources)
    if name in ("raw-aiohttp", "openai-sdk"):
        with contextlib.suppress(ModuleNotFoundError):  # openai-sdk does without aiohttp
            make_module(f"{package}.backends.aiohttp_pool", sources)
    return make_module(f"{package}.backends.{name.replace('-', '_')}", sources).connect


def make_module(name: str, sources: Mapping[str, str]) -> types.ModuleType:
    """Return the module of that name, made from its source unless it is there."""
    if name in sys.modules:
        return sys.modules[name]
    module = sys.modules[name] = types.ModuleType(name)
    module.__package__ = name.rpartition(".")[0]
    if any(other.startswith(f"{name}.") for other in sources):
        module.__package__, module.__path__ = name, []
    try:
        lines = sources[name].splitlines(keepends=True)
        linecache.cache[f"<{name}>"] = len(sources[name]), None, lines, f"<{name}>"  # inspect.getsource looks there
        exec(compile(sources[name], f"<{name}>", "exec", dont_inherit=True), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module


async def exchange(engine: str, message: bytes) -> bytes | str:
    """Do one exchange, for the Dask worker: return the reply, or else why there is none, '' if the engine has ended."""
    found = engines.get(engine)
    if found is None:
        return ""
    if reason := await asyncio.wrap_future(found.ready):
        del engines[engine]
        return reason
    try:
        reply = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(found.exchange(message), found.loop))
    except RuntimeError:  # its loop is closed
        return ""
    await asyncio.wait([reply])  # if Dask cancels this, the engine has not ended
    if reply.cancelled():
        return ""
    failure = reply.exception()
    return f"{type(failure).__name__}: {failure}" if failure else reply.result()


def occupy(engine: str) -> None:
    """Be a Dask task until the engine ends: a cluster that shrinks ends workers without a task, as idle."""
    distributed.secede()  # type: ignore[no-untyped-call]
    if engine in engines:
        engines[engine].thread.join()


class Engine:
    """A run of the core in a worker process, in a thread and an event loop of its own."""

    SILENCE = 60.0  # seconds without the driver after which it ends
    AHEAD = 3  # exchanges for which prompts are kept ready in advance

    def __init__(self, name: str, core: Any, make_run: Callable[[], Any]) -> None:
        self._name, self._core = name, core
        self._fields = fields_of(core)
        self._tasks: set[asyncio.Task[None]] = set()  # one for each prompt on this worker
        self._done: list[tuple[int, tuple[Any, ...]]] = []
        self._said: list[tuple[str, str]] = []  # the core's warnings, which the driver logs
        core.log.addFilter(lambda record: self._said.append((str(record.msg), record.getMessage())))
        self._run = make_run()  # after the filter, since it may warn
        self.ready: concurrent.futures.Future[str] = concurrent.futures.Future()  # "" once it works, or why it cannot
        self.thread = threading.Thread(target=self._live, name=name, daemon=True)
        self.thread.start()

    def _live(self) -> None:
        try:
            self._core.run_loop(self._serve())
        except BaseException as failure:  # a third party's backend may raise anything
            if not self.ready.done():
                self.ready.set_result(f"{type(failure).__name__}: {failure}")
        else:
            engines.pop(self._name, None)

    async def _serve(self) -> None:
        """Keep the run open until the driver ends it, or is silent for too long."""
        self.loop, self._some, self._enough = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        loading = self._core.sibling("backends", "loading")
        loading.at_most(self._run, loading.open_files() - 64)
        self._replied = self.loop.time()
        async with self._run:
            self.ready.set_result("")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.SILENCE) as self._patience:
                    await self.loop.create_future()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def exchange(self, message: bytes) -> bytes:
        """Accept orders and prompts; return, after the interval, finished Results and the figures for the driver."""
        orders, rows = pickle.loads(message)
        self._patience.reschedule(self.loop.time() + (0.0 if "end" in orders else self.SILENCE))
        if "stop" in orders:
            self._run.stop(self._core.PromptError("interrupted", orders["stop"], "stop"))
        if "calls" not in orders:
            return b""
        self._share(min(orders["calls"], self._run.concurrency), orders["start"], orders["rates"])
        for number, kind, path, body in rows:
            prompt = self._core.Prompt(number, None, kind=kind, path=path, body=body)
            self._tasks.add(asyncio.ensure_future(self._answer(prompt)))
        if orders["interval"]:  # the first exchange only returns how many prompts are wanted
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._some.wait(), TURN)
                await asyncio.wait_for(self._enough.wait(), orders["interval"])
        return self._reply(orders["interval"])

    def _share(self, calls: int, start: float, rates: list[tuple[float, str] | None]) -> None:
        """Apply this worker's share: the most calls in flight, how many to begin with, and the rates.

        `rates`, of requests and of tokens a second, are those that the user gave or that rejections showed, else None.
        """
        limiter, window = self._run.limiter, self._run.limiter.window
        if not window.source:
            window.size = float(max(start, window.size if limiter.sent else 0))
        window.ceiling, window.size = calls, min(window.size, calls)
        for quota, known in zip((limiter.requests, limiter.tokens), rates, strict=True):
            if known:
                window.source = window.source if quota.source else ""  # the limit was a rate, not the calls in flight
                quota.tell(*known, self._run.clock())
        limiter.release()

    async def _answer(self, prompt: Any) -> None:
        result = await self._run.answer(prompt)
        result.error = result.error and tuple(result.error)
        result.http = result.http if prompt.kind == "batch" else None
        self._done.append((prompt.number, tuple([getattr(result, name) for name in self._fields])))
        self._tasks.discard(asyncio.current_task())
        self._some.set()
        if not self._tasks or len(self._done) >= self._run.limiter.window.size // 2:
            self._enough.set()

    def _reply(self, interval: float) -> bytes:
        limiter, stopped = self._run.limiter, self._run.stopped
        facts = {
            "room": self._room(interval), "in_flight": limiter.in_flight,
            "most": self._run.most_in_flight, "sent": limiter.sent,
            "quotas": [(one.source, one.limit, one.spent, one.refused) for one in (limiter.requests, limiter.tokens)],
            "window": (limiter.window.size, limiter.window.source), "state": limiter.state(),
            "stopped": stopped and tuple(stopped.error), "said": self._said[:], "heard": limiter.heard,
        }  # fmt: skip
        self._said.clear()
        answers, self._done, self._replied = self._done, [], self.loop.time()
        self._some.clear()
        self._enough.clear()
        return pickle.dumps((facts, answers), 5)

    def _room(self, interval: float) -> int:
        """Return how many more prompts are wanted: for the slots that are free, and for those that soon will be."""
        size: int = int(self._run.limiter.window.size)
        waiting: int = len(self._tasks) - self._run.limiter.in_flight
        # If prompts wait, slots are free for another reason than a lack of prompts.
        free = 0 if waiting > 0 else size - len(self._tasks)
        rate = len(self._done) / max(1e-3, self.loop.time() - self._replied)
        return max(0, free + min(size, int(self.AHEAD * interval * rate)) - waiting)


# ---- In the driver -------------------------------------------------------------------------------------------


BOOT = """
import sys
try:
    if sys.version_info < (3, 11):
        report = "it runs Python %d.%d, and 3.11 or newer is needed" % sys.version_info[:2]
    else:
        import pickle, types, zlib
        package, source, given = pickle.loads(zlib.decompress(cargo))
        home = sys.modules.get(package + ".backends.dask_cluster")
        if home is None:
            home = types.ModuleType(package + ".backends.dask_cluster")
            sys.modules[home.__name__] = home
            exec(compile(source, "<%s>" % home.__name__, "exec"), home.__dict__)
        report = home.install(engine, *given)
except BaseException as failure:
    report = "%s: %s" % (type(failure).__name__, failure)
"""
PARTS = 4  # into which the prompts of a worker that died are divided, to find the one that killed it
REFUSALS = "from rejections"


class Lost(Exception):
    """A worker is gone."""


@dataclasses.dataclass(eq=False)
class Link:
    """What the driver knows of a worker."""

    address: str
    engine: str
    sent: dict[int, Any] = dataclasses.field(default_factory=dict)  # requests by their numbers
    calls: int = 0  # the most calls in flight that it was allowed
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)  # of its last reply
    task: asyncio.Task[Any] | None = None  # its exchange under way
    alone: int | None = None  # how often its prompts killed a worker that had no others; None if not suspected
    presence: Any = None  # the Dask task that keeps the worker from counting as idle


def fields_of(core: Any) -> list[str]:
    """Return the names of what goes back of a Result."""
    return [one.name for one in dataclasses.fields(core.Result) if one.name not in ("prompt", "exception")]


class Shared:
    """A limit that the server does not state, learned from all workers together.

    The bucket is empty at a rejection, so what was accepted between two of them is what was refilled. Workers report
    rejections late, so the rate rises slowly.
    """

    PAUSE = 2.0  # seconds in which calls that were in flight at the first rejection may be rejected, too

    def __init__(self) -> None:
        self._began = math.inf  # when the first call was reported
        self._settled = self._when = self._spent = 0.0  # the pause's end, the last rejection, what was spent by then
        self._start = 0.0, 0.0  # the same for the first one since the limit has changed
        self._sure, self._accepted = False, 0

    def learn(self, quota: Any, calls: int, rejected: float, now: float) -> None:
        """Learn from so many calls and set the quota's rate; `rejected` is the cost of a call if any was, else 0."""
        self._began = min(self._began, now)
        if not quota.source or now < self._settled:
            if not quota.source:
                quota.source, quota.size, self._settled = REFUSALS, 0.0, now + self.PAUSE
                quota.rate = max(0.1, quota.spent / max(0.1, now - self._began) / 4)
            self._when, self._spent = self._start = now, quota.spent
        elif rejected:
            self._refuse(quota, rejected, now)
        else:
            self._accepted += calls
            more = 1e-5 * (1 + (self._accepted / 250) ** 2) if self._sure else 0.05
            quota.rate = min(quota.rate * (1 + more) ** calls, 1e6)

    def _refuse(self, quota: Any, cost: float, now: float) -> None:
        accepted = quota.spent - self._spent
        if accepted > 0 and (self._sure or accepted >= 2 * cost):  # else how full the bucket was matters more
            if self._sure and (accepted + 1.5 * cost) / max(1e-3, now - self._when) < 0.9 * quota.rate:
                self._start = self._when, self._spent  # the server accepts less than it did
            when, spent = self._start
            quota.rate = max(0.01, (quota.spent - spent + (cost - 0.5) / 2) / max(1e-3, now - when))
            self._sure = True
        self._accepted, self._when, self._spent = 0, now, quota.spent


class Crew:
    """The workers, and which prompts each of them has."""

    START = 5.0  # seconds to wait for the first worker
    RETURN = 10.0  # seconds to wait for one if there were some: a nanny restarts it, which takes some seconds

    def __init__(self, job: Any, client: Any, where: str, proxies: dict[str, str] | None) -> None:
        self._job, self._client, self._where, self._local = job, client, where, proxies is not None
        self._core = job.core
        self._package, self._cargo = cargo(self._core, job, proxies)
        self._fields = fields_of(self._core)
        self._links: dict[str, Link] = {}
        self._unfit: dict[str, str] = {}
        self._pending: list[Any] = []  # requests to be sent before others are taken
        self._suspects: list[tuple[list[Any], int]] = []  # and how often they have died alone on a worker
        self._numbers = itertools.count()
        self._shared = Shared(), Shared()  # limits of requests, of tokens
        self._met = False  # whether any worker has ever answered
        self._said: dict[str, float] = {}
        self._since = time.monotonic()  # when the last worker was there
        self._calls = self._core.AUTO_CONCURRENCY
        if job.options["concurrency"] != "auto":
            self._calls = job.options["concurrency"]

    async def work(self, first: list[Any]) -> AsyncGenerator[tuple[Any, Any], None]:
        """Yield requests with their Results."""
        self._pending = first
        self._job.in_flight(0)
        look, stop = asyncio.ensure_future(self._look(0.0)), asyncio.ensure_future(self._stop())
        try:
            while not await self._over():
                await self._hand_out(idle=True)
                busy = {link.task for link in self._links.values() if link.task}
                await asyncio.wait({*busy, look, *([] if stop.done() else [stop])}, return_when=asyncio.FIRST_COMPLETED)
                results: list[tuple[Any, Any]] = []
                lost: ConnectionError | None = None
                for link in list(self._links.values()):
                    try:
                        results += self._collect(link)
                    except ConnectionError as failure:
                        lost = failure  # what the others have brought comes first
                if lost is None:
                    await self._hand_out(idle=False)
                await asyncio.sleep(0)  # send prompts before processing results
                for outcome in results:
                    yield outcome
                if lost is not None:
                    raise lost
                if look.done():
                    self._meet(look.result())
                    look = asyncio.ensure_future(self._look(TURN if self._links else TURN / 10))
        finally:
            await self._close(look, stop)

    async def _over(self) -> bool:
        """Return whether nothing is left to do; all results so far have been yielded."""
        if self._job.stopped:
            return self._job.stopped == "deadline" or not any(link.sent for link in self._links.values())
        if not self._pending and not self._suspects and not any(link.sent for link in self._links.values()):
            self._pending = await self._job.take(1)
            return not self._pending
        return False

    async def _look(self, wait: float) -> list[str]:
        """Return the workers' addresses, after a while."""
        await asyncio.sleep(wait)
        with self._asking():
            return list(await self._client.nthreads())

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """Raise ConnectionError, "the scheduler is gone", if a call to the scheduler in this block fails."""
        try:
            yield
        except Exception as failure:
            told = f"the scheduler at {self._where} is gone ({failure or type(failure).__name__})"
            raise ConnectionError(told) from None

    def _meet(self, addresses: list[str]) -> None:
        """Begin to use the workers that are new, and let go of those that are gone."""
        from .dask_local import check_network

        for link in list(self._links.values()):
            if link.address not in addresses and link.task:
                link.task.cancel()  # `_collect` does the rest
        for address in addresses:
            if address not in self._links and address not in self._unfit and len(self._links) < self._calls:
                check_network(self._job, address)
                link = self._links[address] = Link(address, f"{self._package}-{uuid.uuid4().hex[:12]}")
                link.task = asyncio.ensure_future(self._greet(link))
        now = time.monotonic()
        self._since = now if self._links else self._since
        if self._links or self._job.stopped:
            return
        if self._unfit and set(addresses) <= self._unfit.keys():
            raise ValueError("; ".join(f"the worker {one} cannot be used: {why}" for one, why in self._unfit.items()))
        self._job.say("waiting for a worker")
        if now - self._since > (self.RETURN if self._met else self.START):
            raise ConnectionError(f"the cluster at {self._where} has no workers{' any longer' if self._met else ''}")

    async def _greet(self, link: Link) -> tuple[dict[str, Any], list[Any]]:
        """Start an engine on a worker; return its first reply. Raises ValueError if the worker cannot be used."""
        given = {"boot": BOOT, "box": {"cargo": self._cargo, "engine": link.engine}}
        expression = "exec(boot, box) or box['report']"
        with self._asking():
            told = await self._client.run(eval, expression, given, workers=[link.address], on_error="return")
        report = told.get(link.address)
        if isinstance(report, Exception) or report is None:
            raise Lost
        if report:
            raise ValueError(report)
        if not self._local:
            work = f"__import__('sys').modules['{self._package}.backends.dask_cluster'].occupy('{link.engine}')"
            link.presence = self._client.submit(
                eval, work, {}, key=link.engine, workers=[link.address], allow_other_workers=False, pure=False
            )
        return await self._exchange(link, self._orders(link) | {"interval": 0.0}, [])

    async def _exchange(self, link: Link, orders: dict[str, Any], rows: list[Any]) -> tuple[dict[str, Any], list[Any]]:
        """Do one exchange. Raises Lost if the worker is gone, or ValueError if it cannot be used."""
        reply = await self._send(link, orders, rows)
        if isinstance(reply, bytes):
            return pickle.loads(reply)  # type: ignore[no-any-return]
        if reply is None:
            raise Lost
        raise ValueError(reply) if reply else Lost("the engine has ended")

    async def _send(self, link: Link, orders: dict[str, Any], rows: Iterable[Any] = ()) -> bytes | str | None:
        """Send a message; return the engine's reply, or why there is none as a text; None if the worker is gone."""
        message = pickle.dumps((orders, list(rows)), 5)
        call = {"op": f"{self._package}.exchange", "engine": link.engine, "message": message}
        with self._asking():
            send = self._client.scheduler.broadcast
            replies = await send(msg=call, workers=[link.address], on_error="ignore")
        reply = replies.get(link.address)
        return reply if isinstance(reply, bytes | str) else None

    async def _stop(self) -> None:
        """Wait until the run is stopped; tell the engines, which let the calls in flight finish."""
        while await self._job.sleep(3600):
            pass
        await self._tell({"stop": f"the run was stopped: {self._job.stopped}"})

    async def _tell(self, orders: dict[str, Any]) -> None:
        links = [link for link in self._links.values() if link.facts]
        await asyncio.gather(*(self._send(link, orders) for link in links), return_exceptions=True)

    async def _hand_out(self, idle: bool) -> None:
        """Begin an exchange with each worker that has none under way, with prompts for it.

        Those that have nothing to do can wait until what came is looked at: the budget may then allow more.
        """
        reserved = self._reserve()
        for link in self._links.values():
            if link.task is None:
                orders = self._orders(link)
                requests: list[Any] = []
                if self._job.stopped:
                    orders["stop"] = f"the run was stopped: {self._job.stopped}"
                elif link in reserved:
                    if not link.sent and self._suspects and link.alone is None:
                        requests, link.alone = self._suspects.pop()
                elif link.alone is None and link.calls:
                    requests = await self._take(link.facts["room"])
                if not idle and not link.sent and not requests:
                    continue
                sent = dict(zip(self._numbers, requests))  # noqa: B905 - the numbers do not end
                link.sent |= sent
                rows = [(number, one.prompt.kind, one.path, one.body) for number, one in sent.items()]
                link.task = asyncio.ensure_future(self._exchange(link, orders, rows))

    def _reserve(self) -> list[Link]:
        """Return the workers that are to have nothing but suspects: as many as there are of these."""
        free = [link for link in self._links.values() if link.alone is None and link.facts]
        return sorted(free, key=lambda link: len(link.sent))[: len(self._suspects)]

    async def _take(self, count: int) -> list[Any]:
        """Return the next requests, those first that were taken before."""
        taken, self._pending = self._pending[:count], self._pending[count:]
        if len(taken) < count:
            taken += await self._job.take(count - len(taken), 1 << 25)
        return taken

    def _orders(self, link: Link) -> dict[str, Any]:
        """Return a worker's share of what the whole run may do, and how it is to answer."""
        links = list(self._links.values())
        count, place = max(1, len(links)), links.index(link) if link in links else 0
        others = sum(max(one.calls, one.facts.get("in_flight", 0)) for one in links if one is not link)
        share = self._calls // count + (place < self._calls % count)
        link.calls = max(0, min(share, self._calls - others))  # a greater share has to wait until others have less
        start = max(1, 16 // count) if self._job.options["concurrency"] == "auto" else link.calls
        rates = [self._rate(link, links, number, name) for number, name in enumerate(("rpm", "tpm"))]
        interval = max(0.05, 0.01 * count)  # a hundred exchanges a second are enough
        return {
            "calls": link.calls,
            "start": start,
            "rates": rates,
            "interval": interval,
        }

    def _rate(self, link: Link, links: list[Link], number: int, name: str) -> tuple[float, str] | None:
        """Return a worker's share of a limit, a second, and the limit's source; None if there is no limit."""
        if told := self._job.options[name]:
            return told / 60 / len(links), "as given"
        quota = (self._job.limiter.requests, self._job.limiter.tokens)[number]
        return (quota.rate / len(links), REFUSALS) if quota.source == REFUSALS else None

    def _collect(self, link: Link) -> Iterator[tuple[Any, Any]]:
        """Yield what an exchange has brought, if it is over."""
        if link.task is None or not link.task.done():
            return
        task, link.task = link.task, None
        try:
            before, (link.facts, answers) = link.facts, task.result()
        except (Lost, asyncio.CancelledError) as failure:
            yield from self._lose(link, alive=bool(failure.args))
            return
        except ValueError as failure:
            self._pending += link.sent.values()
            self._dismiss(link, str(failure))
            return
        again = []
        whole = self._job.limiter.calls_a_minute()
        for number, values in answers:
            request = link.sent.pop(number)
            result = self._core.Result(request.prompt, **dict(zip(self._fields, values, strict=True)))
            result.error = result.error and self._core.Error(*result.error)
            result.limit = result.limit and whole  # theirs may be that of a share
            if result.done:
                yield request, result
            else:
                again.append((request, result))
        if not link.sent:
            link.alone = None
        self._learn(link, before)
        if self._job.stopped:
            yield from again
        else:
            self._pending += [request for request, _ in again]

    def _dismiss(self, link: Link, reason: str) -> None:
        self._unfit[link.address] = reason
        del self._links[link.address]
        if self._links:  # or else the run ends with that
            self._core.log.warning("the worker %s cannot be used: %s", link.address, reason)

    def _lose(self, link: Link, alive: bool) -> Iterator[tuple[Any, Any]]:
        """Remove a worker; its prompts are sent again, apart from the others: one of them may have killed it."""
        self._links.pop(link.address, None)
        if link.presence is not None:
            link.presence.release()
        requests = list(link.sent.values())
        if alive:
            self._pending += requests
        if alive or not requests or self._job.stopped:
            return
        had = self._core.plural(len(requests), "prompt")
        self._warn("lost", f"the worker {link.address} is lost; {had} that it had will be sent again")
        deaths = 0 if link.alone is None or len(requests) > 1 else link.alone + 1
        if deaths > 1:
            error = self._core.Error("killed_worker", "each worker that this prompt was sent to died")
            yield requests[0], self._core.Result(requests[0].prompt, error=error, attempts=deaths + 1)
            return
        size = -(-len(requests) // PARTS)
        parts = [requests[start : start + size] for start in range(0, len(requests), size)]
        self._suspects += [(part, deaths) for part in parts]

    def _learn(self, link: Link, before: dict[str, Any]) -> None:
        """Process the figures of a worker, and combine what all workers know of the limits."""
        job, facts, links = self._job, link.facts, [one for one in self._links.values() if one.facts]
        self._met = True
        self._job.limiter.latest = time.monotonic()
        for form, text in facts["said"]:
            self._warn(form, text)
        if facts["stopped"] and not job.stopped:
            kind, message, status, _ = facts["stopped"]
            if facts["heard"] or not any(one.facts["heard"] for one in links):
                job.stop(kind, message, status)
            elif not link.sent:
                self._dismiss(link, message)
        self._learn_limits(facts, before)
        flights = sum(one.facts["in_flight"] for one in links)
        held = next((f", {one.facts['state']}" for one in links if one.facts["state"]), "")
        if "held by the limit" in held:  # a worker's limit is its share
            held = f", held by the limit: {job.limiter.tokens if ' tokens/' in held else job.limiter.requests}"
        job.in_flight(min(self._calls, sum(one.facts["most"] for one in links)))
        job.in_flight(flights)
        job.say(f"{self._core.plural(len(links), 'worker')}{held}")
        sources = [one.facts["window"][1] for one in links if one.facts["window"][1]]
        job.limiter.window.source = sources[0] if sources else ""
        job.limiter.window.size = sum(one.facts["window"][0] for one in links)

    def _learn_limits(self, facts: dict[str, Any], before: dict[str, Any]) -> None:
        """Learn the server's limits from what all workers have sent and what was rejected.

        One worker sees only its own calls; it would take the limit for its share.
        """
        limiter, now = self._job.limiter, time.monotonic()
        calls = facts["sent"] - before.get("sent", 0)
        limiter.sent += calls
        for number, quota in enumerate((limiter.requests, limiter.tokens)):
            source, limit, spent, refused = facts["quotas"][number]
            *_, spent_before, refused_before = before["quotas"][number] if before else (0.0, 0)
            quota.spent += spent - spent_before
            if source == "from headers":
                quota.tell(limit, source, now)
            elif source == REFUSALS:
                cost = quota.spent / max(1, limiter.sent)
                self._shared[number].learn(quota, calls, cost if refused > refused_before else 0.0, now)

    def _warn(self, form: str, text: str) -> None:
        """Log a warning, unless a worker has just sent a similar one."""
        now = time.monotonic()
        if now > self._said.get(form, -math.inf) + 30:
            self._said[form] = now
            self._core.log.warning("%s", text)

    async def _close(self, *tasks: asyncio.Task[Any]) -> None:
        """End the engines, and what waits for them."""
        mine = [*tasks, *(link.task for link in self._links.values() if link.task)]
        for task in mine:
            task.cancel()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._tell({"end": True}), 2)
        await asyncio.gather(*mine, return_exceptions=True)
        for link in self._links.values():
            if link.presence is not None:
                link.presence.release()


def cargo(core: Any, job: Any, proxies: dict[str, str] | None) -> tuple[str, bytes]:
    """Return our modules' package on the workers, named after a hash of the sources, and what an engine is made of."""
    root, live = (__package__ or "").rpartition(".")[0], job.options["worker_backend"]
    names = [live] if live else ["raw-aiohttp", "stdlib"]
    modules = [f"backends.{name.replace('-', '_')}" for name in names if ":" not in name]
    modules += [*DIALECT, "backends.aiohttp_pool", "backends.httpcore_pool", "backends.dask_cluster", "extras"]
    modules += ["extras.wraps", *(f"extras.{name}" for name, _ in job.carried)]
    sources = {name: source_of(f"{root}.{name}") for name in modules}
    name = getattr(core.__loader__, "name", core.__name__)  # `python -m` calls it __main__, its loader does not
    main = core.__loader__.get_source(name)
    package = f"concurrent_prompts_{hashlib.blake2b(repr((main, sources)).encode(), digest_size=6).hexdigest()}"
    own = sources.pop("backends.dask_cluster")
    sources = {f"{package}.{name}": text for name, text in sources.items()} | {package: main}
    options = {name: job.options[name] for name in ("concurrency", "max_attempts", "timeout", "rpm", "tpm")}
    given = sources, job.api.state(), options, live, proxies, job.carried
    return package, zlib.compress(pickle.dumps((package, own, given), 5))


def source_of(name: str) -> str:
    """Return a module's source. Libraries that it imports may be missing here."""
    spec = importlib.util.find_spec(name)
    source = getattr(spec and spec.loader, "get_source", lambda name: None)(name)
    if source is None:
        raise ValueError(f"the source of {name}, which the workers need, cannot be read")
    return source  # type: ignore[no-any-return]


async def submit(job: Any) -> AsyncIterator[tuple[Any, Any]]:
    """Answer the job's requests on the workers of a cluster; see the contract in the package's docstring."""
    from .dask_local import connected  # which is not there when a worker executes this module

    if first := await job.take(1):
        async with connected(job) as (client, where, proxies):
            async with contextlib.aclosing(Crew(job, client, where, proxies).work(first)) as outcomes:
                async for outcome in outcomes:
                    yield outcome


submit.retries = True  # type: ignore[attr-defined]
submit.uses = ("rpm", "tpm", "cluster", "worker_backend")  # type: ignore[attr-defined]
