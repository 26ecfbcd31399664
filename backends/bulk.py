"""The core's side of the bulk contract (see the package's docstring): the job, its requests, its notes.

`load_backend` makes a `BulkApi` of a backend that is an async generator function. Its `loop` replaces the run's own, so
that journal, resume, report and exit status remain the core's. The budget is the only extra that it knows by name: a
batch cannot be stopped half way, so its cost is reserved before the backend takes its requests.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import itertools
import logging
import math
import os
import pathlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from . import core
from .api import Api, request_line
from .failures import MESSAGE_MOST

T = TypeVar("T")


class BulkApi(Api):
    """An Api whose backend takes the whole stream of requests; `connect` serves single look-ups, such as /models."""

    def __init__(
        self,
        connect: Callable[..., Any],
        *,
        submit: Callable[..., Any],
        cluster: str | None = None,
        worker_backend: str | None = None,
        **settings: Any,
    ) -> None:
        self.submit, self.worker_backend = submit, worker_backend
        self.cluster = None if cluster is None else str(cluster)
        super().__init__(connect, price_share=getattr(submit, "price_share", 1.0), **settings)
        self.clocked = bool(getattr(submit, "retries", False))
        self.parting = getattr(submit, "parting", "")
        self.extras = (*self.extras, self)

    def check_options(self, args: argparse.Namespace) -> None:
        """Raise UsageError if an option has no effect with this backend."""
        if args.compare or args.sequential:
            raise core.UsageError(f"{self.name} is a bulk backend; leave out --compare and --sequential")
        for name in ("rpm", "tpm", "cluster", "worker_backend"):
            if getattr(args, name, None) is not None and name not in getattr(self.submit, "uses", ()):
                raise core.UsageError(f"--{name.replace('_', '-')} has no effect with {self.name}; leave it out")

    @contextlib.asynccontextmanager
    async def session(self, run: core.Run) -> AsyncIterator[None]:
        """Load the notes of jobs that earlier runs have running for the same results file."""
        answers = run.journal.answers if run.journal else 0
        run.pending = PendingJobs(run.path, self.name, run.overwrites, answers)
        yield

    def report(self, ran: list[core.Ran], status: int) -> Iterator[str]:
        """Remove the notes if every prompt was answered; yield no line."""
        run = ran[-1].run
        if run.stopped is None and run.whole and not run.pending.keep_after_finish:
            run.pending.clear()
        yield from ()

    async def loop(self, run: core.Run, prompts: Iterable[core.Prompt], record: core.Record) -> None:
        """Answer the prompts through the backend's generator, in place of the run's own loop."""
        await in_bulk(run, self, prompts, record)


class PendingJobs:
    """Notes of the jobs that a bulk backend has running elsewhere: lines in FILE.running, each flushed to the disk.

    `results` is the results file, None for none; `answered` the answers that it held at the start. `overwrite` discards
    the notes. Raises UsageError if they are damaged, or another backend's.
    """

    def __init__(
        self, results: pathlib.Path | None = None, backend: str = "", overwrite: bool = False, answered: int = 0
    ) -> None:
        self.answered, self.keep_after_finish = answered, False
        self.path = results and core.beside_results(results, "running")
        self._results = results
        self.entries: list[Any] = []
        self._backend = {"backend": backend}
        if self.path is None or not self.path.exists():
            return
        if overwrite:
            core.log.warning("%s is discarded, and with it the jobs that an earlier run left running", self.path)
            return self.clear()
        files = core.meanings("files", "extras")  # the journal has looked whether it is one
        with files.open_regular(self.path, links=False) if files else open(self.path, "rb") as file:
            *lines, torn = file.read().split(b"\n")
        first, *self.entries = [*map(core.parse_json, lines)] or [self._backend]
        sound = all(isinstance(value, dict) for value in (first, *self.entries))
        if not sound or type(first.get("backend")) is not str:
            raise core.UsageError(f"{self.path} is damaged; repair it, or remove it to discard the running jobs")
        if (other := first["backend"]) != backend:
            what = f"{self.path}: {other} has jobs running for these results"
            raise core.UsageError(f"{what}; continue with -b {other}, or remove that file to discard them")
        if torn:
            os.truncate(self.path, sum(len(line) + 1 for line in lines))

    def add(self, value: Any) -> None:
        """Append a JSON value. Raises OSError if it cannot be written."""
        self.entries.append(value)
        if self.path and self._results:
            files = core.meanings("files", "extras")
            with files.open_beside(self.path, self._results) if files else open(self.path, "ab") as file:
                file.writelines(core.dump(line) + b"\n" for line in ([] if file.tell() else [self._backend]) + [value])
                core.flush(file)

    def clear(self) -> None:
        """Remove all notes: nothing is running any longer."""
        self.entries.clear()
        if self.path:
            self.path.unlink(missing_ok=True)


@dataclasses.dataclass(slots=True, eq=False)
class Request:
    """A request that a bulk backend is given."""

    prompt: core.Prompt  # with the body of this attempt
    result: core.Result
    model: str | None = None
    taken: float = 0.0  # when, by the run's clock
    most: tuple[float, float] = 0.0, 0.0  # reserved in the budget: USD, USD for each token of the longest answer

    @property
    def path(self) -> str:
        """The path below the base URL."""
        return self.prompt.path

    @property
    def body(self) -> bytes:
        """The request's body, JSON as bytes."""
        return self.prompt.body

    def line(self, custom_id: str) -> bytes:
        """Return the request as a line of a Batch file."""
        return request_line(custom_id, self.path.partition("?")[0], self.body)

    @property
    def key(self) -> str:
        """A hash by which a later run recognises the request; two equal requests have the same."""
        return core.fingerprint(self.result.prompt)[:16]


class Job:
    """What a bulk backend is given; the contract in backends/__init__.py lists what it may use."""

    def __init__(self, run: core.Run, api: BulkApi, prompts: Iterable[core.Prompt], record: core.Record) -> None:
        self.api, self.base_url, self.headers = api, api.base_url, api.headers
        self.options = run.options | {"cluster": api.cluster, "worker_backend": api.worker_backend}
        self.core = core
        carried = [extra for extra in run.extras if hasattr(extra, "portable")]
        self.carried = [(core.extras_folder().extra_name(extra), extra.portable()) for extra in carried]
        self.limiter, self.log, self.query = run.limiter, core.log, api.whole_query()
        pending = run.pending or PendingJobs()
        self.answered, self.noted_in = pending.answered, pending.path
        self._run, self._record, self._kept = run, record, pending
        self._budget: Any = core.extras_folder().named(run, "budget") if run.extras else None
        self._fresh = run.admit(prompts)
        self._again: collections.deque[Request] = collections.deque()  # requests to be retried,
        self._since = self._due = -math.inf  # when the first of them failed, and when all of them are due
        self._calls = run.options["max_attempts"] if getattr(api.submit, "retries", False) else 1  # a request
        self.broken: OSError | None = None  # why a result could not be recorded
        self._counted = False  # whether the backend itself counts the calls in flight
        self._held: Request | None = None  # the request that did not fit into the last block
        self._open: set[Request] = set()

    @property
    def stopped(self) -> str:
        """Why the run is stopping ("interrupted", "deadline", ...), or ''."""
        return self._run.stopped.error.type if self._run.stopped else ""

    def stop(self, kind: str, message: str, status: int | None = None) -> None:
        """Stop the run with an error of type `kind`, redacted, because every prompt would fail."""
        kind, message = self.api.conceal(kind[:MESSAGE_MOST]), self.api.conceal(message[:MESSAGE_MOST])
        self._run.stop(core.PromptError(core.short(kind, 60), core.short(message, 1000), "stop", status))

    @property
    def notes(self) -> Sequence[Any]:
        """The notes of this run and of the ones before it."""
        entries: Sequence[Any] = self._kept.entries
        return entries

    async def note(self, value: Any) -> None:
        """Write a note to the disk. Raises PromptError if that fails."""
        try:
            await asyncio.to_thread(self._kept.add, value)
        except OSError as failure:
            raise core.disk_error(self._kept.path, failure) from None

    def keep_notes(self) -> None:
        """Keep the notes after the last answer: a job is running that belongs to other prompts."""
        self._kept.keep_after_finish = True

    def forget(self) -> None:
        """Remove all notes: nothing is running elsewhere any longer."""
        self._kept.clear()

    def say(self, text: str) -> None:
        """Show a text in the progress: what the backend is waiting for."""
        self._run.said = text

    def in_flight(self, count: int | None = None) -> None:
        """Set how many calls are in flight; without `count`, all requests taken, unless the backend counts itself."""
        self._counted = self._counted or count is not None
        if count is not None or not self._counted:
            self.limiter.in_flight = len(self._open) if count is None else count
            self._run.most_in_flight = max(self._run.most_in_flight, self.limiter.in_flight)

    async def sleep(self, seconds: float) -> bool:
        """Sleep, or return early if the run is stopped; return whether the time is over."""
        return await self._run.wait_or_stop(self._run.sleep(seconds)) is not None

    async def call(
        self, function: Callable[..., Awaitable[T]], *args: Any, attempts: float = math.inf, **more: Any
    ) -> T:
        """Await `function`, with at most `attempts` tries while its failures may be temporary. Raises PromptError."""
        for attempt in itertools.count(1):
            try:
                return await function(*args, **more)
            except Exception as exc:
                failure = self.api.discreet(exc)
            wait = self._run.wait_after(failure, attempt)
            if failure.verdict != "retry" or attempt >= attempts:
                raise failure
            core.log.log(logging.WARNING if attempt == 3 else logging.INFO, "%s; retrying", failure)
            if not await self.sleep(wait):
                raise failure
        raise AssertionError

    async def take(self, count: int, size: float = math.inf) -> list[Request]:
        """Return the next requests: up to `count`, with up to `size` bytes in all, but at least one if any is left."""
        taken: list[Request] = []
        while not self.stopped and len(taken) < count:
            request = await self._next()
            if request is None:
                if taken or self._open or not self._again:
                    break
                await self.sleep(self._due - self._run.clock())
            elif (taken and len(request.body) > size) or not self._reserve(request):
                self._held = request
                break
            else:
                self._send_out(request)
                taken.append(request)
                size -= len(request.body)
        return taken

    async def _next(self) -> Request | None:
        """Return a request that is due for a retry, else the next prompt's; None if there is neither."""
        if held := self._held:
            self._held = None
            return held
        if self._again and self._due <= self._run.clock():
            return self._again.popleft()
        for number, prompt in enumerate(self._fresh):
            prompt.error = prompt.error or self.unpaid(prompt)
            if number % 100 == 99:
                await asyncio.sleep(0)
            if self._run.passed and await self._run.passed(prompt):
                continue
            if prompt.error is None:
                return Request(prompt, core.Result(prompt), self.api.model_of(prompt))
            try:
                await core.deliver(self._run, self._record, core.Result(prompt, error=prompt.error))
            except OSError as failure:
                self.broken = failure
                raise
        return None

    def unpaid(self, prompt: core.Prompt) -> core.Error | None:
        """Return the error of a prompt whose cost cannot be bounded, as a budget requires, or None."""
        if not self._budget or not prompt.body:
            return None
        name, price = self._budget.price_for(prompt)
        if price is None:
            return core.Error("unknown_price", f"{prompt.where}: no price is known for {core.short(name, 60)}")
        text = f"with --max-cost {self.api.name} needs a maximum for the answer (-p max_completion_tokens=N)"
        untold = self._budget.most_of(prompt.body, price)[1]
        return core.Error("no_maximum", f"{prompt.where}: {text}") if untold else None

    def _reserve(self, request: Request) -> bool:
        """Reserve what the request may cost, if there is a budget; stop the run if it cannot fit."""
        budget = self._budget
        if budget is None:
            return True
        most, _ = budget.most_of(request.prompt.body, budget.price_for(request.prompt)[1])
        request.most = most * self._calls, 0.0
        if budget.admit(request.most):
            return True
        if not self._open:
            self._run.stop(budget.used_up(request.most))
        return False

    def _send_out(self, request: Request) -> None:
        request.taken = now = self._run.clock()
        result = request.result
        result.started = result.started or self._run.epoch + now
        result.retry_wait = self._run.epoch + now - result.started - result.lost
        self._open.add(request)
        self._run.open[request.prompt.number] = result
        self.in_flight()

    def _put_back(self, request: Request, wait: float) -> None:
        now = self._run.clock()
        self._since = self._since if self._again else now
        self._again.append(request)
        self._due = min(max(self._due, now + wait), self._since + core.PAUSE_CEILING)

    async def settle(self, request: Request, outcome: Any) -> None:
        """Process the outcome of a request: record its answer or failure, or queue it for a retry.

        `outcome` is (status, headers, body), an exception, or a Result.
        """
        if not isinstance(request, Request) or request not in self._open:
            return self.stop("twice", f"{self.api.name} answered a prompt twice, or one that it was not given")
        self._open.remove(request)
        self.in_flight()
        if isinstance(outcome, core.Result):
            outcome.prompt = request.result.prompt
            del self._run.open[request.prompt.number]
            self._pay(request, outcome, None)
            return await core.deliver(self._run, self._record, outcome)
        result, run = request.result, self._run
        result.latency = run.clock() - request.taken
        failure = await self._read(request, outcome)
        del self._run.open[request.prompt.number]
        self._pay(request, result, failure)
        if failure is None or run.has_failed(result, failure):
            return await core.deliver(self._run, self._record, result)
        if run.stopped:
            return await core.deliver(self._run, self._record, run.unfinished(result))
        if failure.again:
            request.prompt = dataclasses.replace(request.prompt, body=failure.again)
        result.set_aside(result.waited(), result.latency)
        self._put_back(request, run.wait_after(failure, result.attempts))

    async def _read(self, request: Request, outcome: Any) -> core.PromptError | None:
        """Fill in the answer; return None, or the error that there is instead."""

        async def told(prompt: core.Prompt) -> core.Reply:
            request.result.attempts += 1
            try:
                if isinstance(outcome, Exception):
                    raise outcome
                return self.api.read(prompt, *outcome)
            except Exception as exc:
                raise self.api.discreet(exc) from None

        run, before, attempt = self._run, request.result.attempts, told
        if run.wrapped_by:
            attempt = core.sibling("extras", "wraps").wrapped(run, told, without="budget")
        try:
            run.took(request.result, await attempt(request.prompt))
        except Exception as exc:
            return run.missed(request.result, exc, request.result.attempts > before)
        return None

    def _pay(self, request: Request, result: core.Result, failure: core.PromptError | None) -> None:
        """Replace what was reserved for a request by what it has cost."""
        budget = self._budget
        price = budget.price_for(request.prompt)[1] if budget else None
        if price is None:
            return
        cost, assumed, most = 0.0, False, request.most[0] / self._calls
        if failure:
            cost, assumed = budget.price_failure(failure, (most, 0.0), price)
        elif result.error is None:
            cost, assumed = budget.price_reply(request.prompt, result, (most, 0.0), price)
        if failure is None:  # a Result may include failed calls
            cost += budget.cost_of(result.lost_tokens, price) + result.unanswered * most
            assumed = assumed or result.unanswered > 0
        budget.settle(request.most, cost, assumed)

    def refund(self) -> None:
        """Release the reservations of all open requests, if no call is in flight."""
        if self._budget and not self.limiter.in_flight:
            for request in self._open:
                self._budget.settle(request.most, 0.0)

    async def close(self) -> None:
        """Record the prompts that the backend left unanswered, and stop the run if there are any."""
        rest = [*self._open, *self._again, *filter(None, [self._held])]
        results = [request.result for request in rest]
        results += [core.Result(prompt) for prompt in itertools.islice(self._fresh, 1)]
        if results:
            left = core.plural(len(results), "prompt")
            self.stop("unanswered", f"{self.api.name} ended and left {left} unanswered")
        for result in results:
            await core.deliver(self._run, self._record, self._run.unfinished(result))


async def settle_all(run: core.Run, api: BulkApi, job: Job, outcomes: AsyncIterator[Any]) -> None:
    """Process what a bulk backend yields; stop the run if it fails.

    Raises UsageError for a ValueError before the first answer: the job cannot be done as requested.
    """
    for answered in itertools.count():
        if answered % 50 == 49:
            await asyncio.sleep(0)  # let other tasks run: many may be ready at once
        try:
            request, outcome = await anext(outcomes)
        except StopAsyncIteration:
            return
        except (Exception, SystemExit) as exc:
            if exc is job.broken:  # not the backend's failure, but our results file's
                raise
            failure = api.discreet(exc if isinstance(exc, Exception) else RuntimeError("it called sys.exit()"))
            if isinstance(exc, ValueError) and not answered and not run.stopped:
                raise core.UsageError(f"{api.name}: {failure}") from None
            kind = failure.error.type if isinstance(exc, core.PromptError) else "backend"
            return job.stop(kind, f"{api.name}: {failure}", failure.error.status)
        await job.settle(request, outcome)
        if job.stopped == "twice":
            return


async def in_bulk(run: core.Run, api: BulkApi, prompts: Iterable[core.Prompt], record: core.Record) -> None:
    """Run a bulk backend over the prompts. Raises UsageError if a budget needs a maximum that the prompts lack."""
    job = Job(run, api, prompts, record)
    if (error := job.unpaid(run.first)) and error.type == "no_maximum":
        raise core.UsageError(f"--max-cost with {api.name} needs a maximum for each answer: -p max_completion_tokens=N")
    try:
        async with contextlib.aclosing(api.submit(job)) as outcomes:
            await settle_all(run, api, job, outcomes)
    finally:
        job.refund()
    await job.close()
