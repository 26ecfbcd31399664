"""For use as a library: checks of the user's function, `retry`, `on_result`, asynchronous prompts, event loops."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import copy
import functools
import inspect
import itertools
import math
import os
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sized
from typing import Any, TypeVar

from . import core

T = TypeVar("T")


def replying(send: Callable[[Any], Any]) -> Callable[[Any], core.Reply]:
    """Return a function that makes a Reply from what `send` returns. Raises TypeError unless it takes one argument."""
    try:
        inspect.signature(send).bind(None)
    except (TypeError, ValueError) as failure:  # some functions written in C have no signature
        if isinstance(failure, TypeError) or isinstance(send, functools.partial):
            raise TypeError(f"send must take one argument, the prompt: {failure}") from None
    return as_reply


def as_reply(answer: Any) -> core.Reply:
    """Return the answer as a Reply, with usage as a dict and lower-case headers. Raises PromptError for no answer."""
    if isinstance(answer, Awaitable | AsyncIterator | Iterator | BaseException):
        raise wrong(answer, "await it, join its parts, or raise it")
    if not isinstance(answer, core.Reply):
        return core.Reply(answer)
    usage: Any = answer.usage
    headers = answer.headers
    usage = usage.model_dump() if hasattr(usage, "model_dump") else usage  # an SDK's own
    if not isinstance(usage, dict | None) or not hasattr(headers, "get"):
        raise wrong(answer, "a Reply's usage must be a dict or None, and its headers a mapping")
    headers = {name.lower(): text for name, text in headers.items()} if type(headers) is dict else headers
    return answer._replace(usage=usage, headers=headers)


def wrong(given: Any, advice: str) -> core.PromptError:
    """Return the error that stops the run because `send` returned no possible answer; the user sees a TypeError."""
    given = f"{type(given).__name__} {core.short(repr(given), 60)}"
    return core.PromptError("send", f"send returned {given}: {advice}", "stop")


def deciding(retry: Callable[[Exception], Any]) -> Callable[[Exception], Exception]:
    """Return a function that maps an exception of `send` to the one to raise, as the user's `retry` decides."""
    check_callable("retry", retry)

    def decided(failure: Exception) -> Exception:
        if isinstance(failure, core.PromptError) and failure.kind == "send":
            return failure
        try:
            decision = retry(failure)
        except Exception as another:
            return core.PromptError("send", f"retry raised {core.in_short(another)}", "stop")
        return failure if decision is None else as_decided(failure, decision)

    return decided


def as_decided(failure: Exception, decision: Any) -> core.PromptError:
    """Return the error for an exception with the user's decision: a verdict, or the seconds until the retry."""
    waits = isinstance(decision, int | float) and not isinstance(decision, bool) and 0 <= decision < math.inf
    if not waits and decision not in ("retry", "fail", "stop"):
        given = core.short(repr(decision), 60)
        what = f"retry returned {given}, not 'retry', 'fail', 'stop', seconds to wait, or None for the default"
        return core.PromptError("send", what, "stop")
    error = copy.copy(core.as_prompt_error(failure))
    error.verdict = "retry" if waits else decision
    error.error = error.error._replace(retryable=error.verdict == "retry")
    error.wait = float(decision) if waits else error.wait
    error.decided, error.loading = True, False
    error.heard = error.heard and decision != "stop"  # stop at once, not only after further rejections
    error.__cause__ = failure
    return error


def check_callable(name: str, given: Any) -> None:
    """Raise TypeError if an option that must be a function is none."""
    if given is not None and not callable(given):
        raise TypeError(f"{name} must be a function, not {type(given).__name__} {core.short(repr(given), 60)}")


def worker_for(run: core.Run, prompts: Any, record: core.Record) -> Callable[[], Coroutine[Any, Any, None]]:
    """Return a worker: a coroutine function that pulls and answers one prompt of an async iterable after the other."""
    if run.loop:
        raise core.UsageError(f"{run.api.name} takes no asynchronous iterable; pass a list")
    turn, items, numbers = asyncio.Lock(), aiter(prompts), itertools.count()

    async def pull() -> core.Prompt | None:
        async with turn:
            while True:
                try:
                    item = None if run.stopped or run.broken else await run.wait_or_stop(anext(items, turn))
                except BaseException as failure:
                    run.broken = users_own(failure)
                    return None
                ended = item is None or item is turn
                prompt = None if ended else next(run.admit([core.own_prompt(item, next(numbers))]), None)
                if prompt is None or not run.passed or not await run.passed(prompt):
                    return prompt

    async def worker() -> None:
        while (prompt := await pull()) is not None:
            await core.deliver(run, record, await run.answer(prompt))

    return worker


def watched(
    run: core.Run, items: Any, take: core.Record, on_result: Callable[[core.Result], Any] | None, progress: bool
) -> core.Record:
    """Add the progress to the run; return a function that passes each new Result to `take`, then to `on_result`.

    An exception of `on_result` stops the run in good order and is raised at its end.
    """
    check_callable("on_result", on_result)
    if progress:
        shown = Shown(len(items) if isinstance(items, Sized) else None)
        run.extras.append(shown)
        run.listeners.append(shown.on_result)
    if on_result is None:
        return take
    failed: list[BaseException] = []

    async def record(result: core.Result) -> None:
        if (waiting := take(result)) is not None:
            await waiting
        if not result.done or failed:
            return
        try:
            if isinstance(waiting := on_result(result), Awaitable):
                await waiting
        except BaseException as failure:
            failed.append(users_own(failure))
            reason = core.PromptError("on_result", f"on_result: {core.in_short(failure)}", "stop")
            reason.__cause__ = failure
            run.stop(reason)

    return record


def drop_frames(failure: BaseException) -> None:
    """Take the tracebacks from an exception and all behind it: each keeps the variables of its call alive."""
    behind, seen = list[BaseException | None]([failure]), set[int]()
    while behind:
        if (one := behind.pop()) is not None and id(one) not in seen:
            seen.add(id(one))
            one.__traceback__ = None
            behind += one.__cause__, one.__context__
            behind += one.exceptions if isinstance(one, BaseExceptionGroup) else ()


def users_own(failure: BaseException) -> Any:
    """Return the exception if the user's code raised it, or awaited what was cancelled; else raise it again."""
    task = asyncio.current_task()
    if isinstance(failure, asyncio.CancelledError) and task and not task.cancelling():
        return failure
    if not isinstance(failure, Exception):
        raise failure
    return failure


class Shown:
    """The progress of a library run, as an extra; `total` is the number of prompts, None if unknown."""

    def __init__(self, total: int | None) -> None:
        self._total = total

    @contextlib.asynccontextmanager
    async def session(self, run: core.Run) -> AsyncIterator[None]:
        """Show the progress while the run lasts."""
        self._tally = core.sibling("extras", "tally").Tally(run.api.model_of)
        ran = core.Ran(run.api, run, run.concurrency, self._tally)
        progress = core.sibling("extras", "progress", "progress=True").Progress(self._total, ran, run.journal)
        try:
            yield
        finally:
            progress.close()

    def on_result(self, result: core.Result) -> None:
        """Count a result."""
        self._tally.add(result)


PATIENCE = 1.0  # seconds for tasks to end after their event loop was left in the middle of its work
_threads = threading.local()  # each thread's lasting event loop, and its helper thread for `run` inside a loop


def run_here(work: Coroutine[Any, Any, T]) -> T:
    """Run the coroutine to its end, in another thread if an event loop is running in this one.

    Everything else on that loop waits; a warning says so, except in a notebook, where nothing else runs.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return run_lasting(work)
    if "ipykernel" not in sys.modules:
        core.log.warning("run blocks the event loop that is running here; use `await run_concurrent(...)`")
    pool = of_this_thread("pool", lambda: concurrent.futures.ThreadPoolExecutor(1, "concurrent_prompts"))
    started: list[Callable[[], Any]] = []
    ready = threading.Event()  # set once this thread handles Ctrl-C

    async def body() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        started.append(lambda: loop.call_soon_threadsafe(task.cancel))
        return await work

    def begin() -> T:
        ready.wait(5)
        return run_lasting(body())

    outcome = pool.submit(contextvars.copy_context().run, begin)
    ended = threading.Lock()  # Ctrl-C does not break it, as it may threading's and concurrent.futures' conditions
    ended.acquire()
    outcome.add_done_callback(lambda _: ended.release())
    try:
        ready.set()
        while not outcome.done():
            ended.acquire(timeout=0.2)  # Windows handles Ctrl-C in between
    except KeyboardInterrupt as interrupt:
        try:
            for cancel in started:
                cancel()
            while not outcome.done():
                ended.acquire(timeout=0.2)
        finally:
            if not outcome.done():  # interrupted again: the next run has another thread
                forget(pool)
        vars(interrupt)["results"] = getattr(outcome.exception(), "results", [])
        raise
    return outcome.result()  # type: ignore[no-any-return]


def run_lasting(work: Coroutine[Any, Any, T]) -> T:
    """Run the coroutine on the thread's lasting event loop, since a client works only on the loop of its first call.

    Tasks that it leaves are cancelled. Whatever it raises has the `results` so far.
    """
    so_far: list[core.Result] = []
    tasks: list[asyncio.Task[Any]] = []

    async def body() -> T:
        tasks.extend(asyncio.all_tasks())
        try:
            return await work
        except BaseException as failure:
            so_far.extend(getattr(failure, "results", ()))
            raise
        finally:
            left = asyncio.all_tasks() - {*tasks}
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    runner: asyncio.Runner = of_this_thread("runner", new_runner)
    try:
        return runner.run(body(), context=contextvars.copy_context())
    except BaseException as failure:  # KeyboardInterrupt and SystemExit leave an event loop in the middle of its work
        finish(runner, tasks)
        vars(failure).setdefault("results", so_far)
        raise


def finish(runner: asyncio.Runner, tasks: list[asyncio.Task[Any]]) -> None:
    """Cancel the tasks that are not done and let them end; if they do not, the next run has another event loop."""
    for _ in range(2):  # they may raise such an exception, too
        if left := [task for task in tasks if not task.done()]:
            with contextlib.suppress(BaseException):
                for task in left:
                    task.cancel()
                runner.get_loop().run_until_complete(asyncio.wait(left, timeout=PATIENCE))
    for task in tasks:
        with contextlib.suppress(BaseException):  # asyncio reports what is not looked at
            task.result()
    if not all(task.done() for task in tasks):
        forget(runner)


def new_runner() -> asyncio.Runner:
    """Return a new event loop, which is closed when its thread or the process ends."""
    runner, pid = core.new_runner(), os.getpid()
    weakref.finalize(runner, lambda loop: os.getpid() == pid and loop.close(), runner.get_loop())
    return runner


def of_this_thread(name: str, create: Callable[[], Any]) -> Any:
    """Return this thread's object of that name, created if needed; a forked process does not use its parent's."""
    own, key = vars(_threads), f"{name} {os.getpid()}"
    if key not in own:
        own[key] = create()
    return own[key]


def forget(thing: Any) -> None:
    """Let the next run have another one of this thread's objects."""
    for name in [name for name, one in vars(_threads).items() if one is thing]:
        del vars(_threads)[name]
