"""Torture: real runs against the stand-in server that are killed, interrupted, cut off and starved, and what was lost.

    python -m tests.torture [--only NAME,...] [--quick] [--backend NAME] [--seed N]

Prints a line for each figure with its goal, and exits with 1 if one is missed. The tool runs as a user runs it, in a
process of its own; the server runs in a thread of this one, so that what each process was told is on record here, on
the same clock. The seed settles the prompts, the server's latencies and faults and the moments of the blows; the
tool's own jitter and the system's scheduling remain what they are.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import heapq
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import random
import re
import signal
import socket
import socketserver
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from concurrent_prompts.extras import stand_in, stand_in_answers, stand_in_batches
from tests import server_cases

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = str(ROOT / "concurrent_prompts.py")
LATENCY = {"latency": 0.3, "sigma": 0.5}  # of the server, unless a scenario says otherwise
MARGIN = 0.05  # seconds that a process is given to read an answer and write it down, or to hear a signal
LIBRARIES = {"raw-aiohttp": "aiohttp", "openai-sdk": "openai", "openai-batch": "openai", "dask-cluster": "distributed"}
PATIENCE = 120.0  # seconds after which a run that does not end is a failure


# ---- The server, which keeps a record --------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Request:
    """What the server saw of a request; times are time.monotonic()."""

    prompt: str
    came: float
    sent: float = math.inf  # when all of the answer was in the system's hands
    status: int | None = None  # of the answer; None: it is open still, or the client or the connection has gone
    fault: str = ""  # what the server was to do wrong
    latency: float = 0.0  # seconds that the server was to take
    in_flight: int = 0  # requests at the server, this one too, when it was answered

    @property
    def answered(self) -> bool:
        return self.status == 200 and not self.fault and self.sent < math.inf

    @property
    def billed(self) -> bool:
        """Whether an API would want money for it: it made an answer, however little of it was of use."""
        return self.fault in ("", "truncated", "null-choices", "malformed") and self.status in (200, None)


class Recorder(stand_in.Server):
    """The stand-in server, which notes what it sees, and can go away and come back."""

    loop: asyncio.AbstractEventLoop  # in a thread of its own

    def __init__(self, options: stand_in.Options) -> None:
        super().__init__(options)
        self.requests: list[Request] = []
        self.plan: dict[int, Callable[[], None]] = {}  # what to do when so many requests have come
        self._open: dict[stand_in.Job, Request] = {}

    def accept(self, job: stand_in.Job, raw: bytes) -> None:
        if job.head.path in stand_in.ENDPOINTS:  # else it is no call to a model: the list of them, files, batches
            self._note(job, json.loads(raw)["messages"][-1]["content"])
            self.plan.get(len(self.requests), lambda: None)()
        super().accept(job, raw)

    def refuse(self, job: stand_in.Job, reply: stand_in.Reply) -> None:
        self._note(job, "unreadable")
        super().refuse(job, reply)

    def _note(self, job: stand_in.Job, prompt: str) -> None:
        self._open[job] = request = Request(prompt, time.monotonic())
        self.requests.append(request)

    def _leave(self, job: stand_in.Job, reply: stand_in.Reply | None) -> None:
        request = self._open.pop(job, Request("", 0.0))  # what is no call was not noted
        request.fault, request.latency, request.in_flight = job.fault, job.latency, self.stats.in_flight
        super()._leave(job, reply)
        if reply:
            request.status = reply.status
            if not job.link._transport.get_write_buffer_size():
                request.sent = time.monotonic()

    def set(self, **options: Any) -> None:
        """Change the options from now on."""
        self.options = replace(self.options, **options)

    def limit(self, number: int) -> None:
        """Change the limit."""
        (bucket,) = self._limits
        bucket.level()
        bucket.limit, bucket._rate, bucket._capacity = number, number / 60, number / 10
        bucket._held = min(bucket._held, bucket._capacity)

    async def all_ended(self) -> None:
        """Wait until all batches have ended: what they cost is known only then, those of a dead client included."""
        self._batches.settle()
        while any(batch.shown["status"] not in stand_in_batches.FINISHED for batch in self._batches._batches.values()):
            await asyncio.sleep(0.01)
            self._batches.settle()

    def do(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine in the server's thread."""
        asyncio.run_coroutine_threadsafe(work, self.loop).result(10)


@contextlib.contextmanager
def serving(**options: Any) -> Iterator[Recorder]:
    """Serve in a thread while the block runs."""
    server = Recorder(stand_in.Options(**options))
    server.loop = asyncio.new_event_loop()
    thread = threading.Thread(target=server.loop.run_forever, daemon=True)
    thread.start()
    try:
        server.do(server.start())
        yield server
        server.do(server.close())
    finally:
        server.loop.call_soon_threadsafe(server.loop.stop)
        thread.join()
        server.loop.close()


# ---- The tool, in a process ------------------------------------------------------------------------------------------


def clean_environment() -> dict[str, str]:
    """Return the environment without the reader's own keys, proxies and certificates."""
    foreign = re.compile(r"OPENAI_.*|SSL_CERT_.*|.*_PROXY", re.IGNORECASE)
    return {name: value for name, value in os.environ.items() if not foreign.fullmatch(name)}


class Client:
    """A run of the tool."""

    def __init__(self, server: Recorder, folder: Path, command: list[str], environment: dict[str, str]) -> None:
        self._server, self._first = server, len(server.requests)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self.began = time.monotonic()
        self.ended = self.stopped = math.inf  # stopped: when it was told to end at once
        self.requests: list[Request] = []
        self.text = ""
        self.process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                        stderr=self._log, env=clean_environment() | environment)

    def until(self, condition: Callable[[], bool], patience: float = PATIENCE) -> bool:
        """Wait until the condition holds; return False where the process ended before it did."""
        give_up = time.monotonic() + patience
        while self.process.poll() is None:
            if condition():
                return True
            if time.monotonic() > give_up:
                raise TimeoutError(f"the run did not end within {patience:.0f} s")
            time.sleep(0.001)
        return False

    def requested(self, count: int) -> bool:
        """Wait until it has sent so many requests; return False where the process ended before."""
        return self.until(lambda: len(self._server.requests) >= self._first + count)

    def after(self, seconds: float) -> bool:
        """Wait so long; return False where the process ended before."""
        end = time.monotonic() + seconds
        return self.until(lambda: time.monotonic() >= end, seconds + 1)

    def send(self, number: int) -> float:
        """Send a signal; return the time."""
        now = time.monotonic()
        self.process.send_signal(number)
        return now

    def kill(self) -> None:
        """End it as `kill -9` does."""
        self.stopped = time.monotonic()
        self.process.kill()

    def wait(self, patience: float = PATIENCE) -> Client:
        """Wait until the process has ended and the server has read all that it sent."""
        self.until(lambda: False, patience)
        self.ended = time.monotonic()
        while self._server.links:
            time.sleep(0.001)
        self.requests = self._server.requests[self._first :]
        self._log.seek(0)
        self.text = self._log.read().decode(errors="replace")
        return self

    @property
    def status(self) -> int:
        return self.process.wait()

    def told(self) -> set[str]:
        """Return the prompts whose answers it was sent in full, and `MARGIN` before it was made to end."""
        return {one.prompt for one in self.requests if one.answered and one.sent < self.stopped - MARGIN}

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._log.close()


class Job:
    """A file of prompts, its results, and the one command that is given again and again."""

    def __init__(self, bench: Bench, server: Recorder, prompts: int | list[str], *flags: str, backend: str = "",
                 folder: Path | None = None) -> None:
        self.bench, self._server, self._flags = bench, server, flags
        self.folder, number = bench.folder()
        self.folder = folder or self.folder
        self.results = self.folder / "prompts.results.jsonl"
        self.draft = self.folder / ".prompts.results.jsonl.tmp"
        if isinstance(prompts, int):
            prompts = [f"job {number}, prompt {n}" for n in range(1, prompts + 1)]
        self.prompts = prompts
        self.options = ["-b", backend or bench.backend, "--base-url", server.url]
        (self.folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in self.prompts))

    def start(self, *flags: str, wrap: Sequence[str] = (), program: Sequence[str] = (SCRIPT,),
              environment: dict[str, str] | None = None) -> Client:
        """Give the command, maybe inside another (`wrap`)."""
        tool = [*wrap, sys.executable, *program, "prompts.txt", *self.options, *self._flags, *flags]
        client = Client(self._server, self.folder, tool, environment or {})
        self.bench.stack.callback(client.close)
        return client

    def run(self, *flags: str, **more: Any) -> Client:
        """Give the command and wait for its end."""
        return self.start(*flags, **more).wait()

    def lines(self) -> list[bytes]:
        """Return the whole lines of the results file."""
        return [line for line in self._raw().splitlines(keepends=True) if line.endswith(b"\n")]

    def whole(self) -> bool:
        """Whether the results file has whole lines only, each of JSON."""
        with contextlib.suppress(ValueError):
            return all(json.loads(line) for line in self._raw().splitlines()) and self._raw()[-1:] in (b"", b"\n")
        return False

    def _raw(self) -> bytes:
        return self.results.read_bytes() if self.results.exists() else b""

    def ids(self) -> list[int]:
        return [json.loads(line)["id"] for line in self.lines()]

    def answered(self) -> set[str]:
        """Return the prompts whose own answer is in the results file."""
        rows = map(json.loads, self.lines())
        pairs = ((self.prompts[row["id"] - 1], row["text"]) for row in rows)
        return {prompt for prompt, text in pairs if text == stand_in_answers.invent(prompt, prompt, "")}

    def lost(self) -> int:
        return len(self.prompts) - len(self.answered())

    def drafted(self) -> int:
        """Return when the file in order was begun that is to replace the results file; 0: there is none."""
        with contextlib.suppress(FileNotFoundError):
            return self.draft.stat().st_mtime_ns
        return 0

    def doubles(self) -> int:
        """Return how many lines are of a prompt that has another, here or set aside."""
        aside = sum(path.read_bytes().count(b"\n") for path in self.folder.glob("*.superseded.jsonl"))
        return aside + len(self.ids()) - len(set(self.ids()))

    def ordered(self) -> bool:
        return self.ids() == list(range(1, len(self.prompts) + 1))


def asked_again(clients: Iterable[Client]) -> int:
    """Count the requests for what an earlier run had been told."""
    count, told = 0, set()
    for client in clients:
        count += sum(request.prompt in told for request in client.requests)
        told |= client.told()
    return count


def sent_again(clients: Iterable[Client]) -> list[int]:
    """Return for each run how many of its requests an earlier one had sent already."""
    counts, asked = [], set()
    for client in clients:
        counts.append(sum(request.prompt in asked for request in client.requests))
        asked |= {request.prompt for request in client.requests}
    return counts


# ---- The bench and its table -----------------------------------------------------------------------------------------


class Bench:
    """What a scenario is given: its size, its dice, its folders, and where it reports."""

    def __init__(self, name: str, args: argparse.Namespace, stack: contextlib.ExitStack, counts: Counter[str]) -> None:
        self.name, self.quick, self.seed, self.backend = name, args.quick, args.seed, args.backend
        self.rng = random.Random(f"{args.seed} {name}")
        self.stack, self._counts, self._jobs = stack, counts, 0

    def size(self, full: Any, quick: Any) -> Any:
        return quick if self.quick else full

    def folder(self) -> tuple[Path, int]:
        """Return a new folder and its number."""
        self._jobs += 1
        return Path(self.stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))), self._jobs

    def serve(self, **options: Any) -> Recorder:
        """Return a server that lasts as long as the scenario."""
        return self.stack.enter_context(serving(seed=self.seed, **LATENCY | options))

    def row(self, what: str, measured: Any, goal: Any, verdict: str) -> None:
        self._counts[verdict.partition(":")[0]] += 1
        print(line(f"{self.name}: {what}", shown(measured), shown(goal), verdict), flush=True)

    def exactly(self, what: str, measured: Any, goal: Any) -> None:
        self.row(what, measured, goal, "ok" if measured == goal else "MISSED")

    def at_most(self, what: str, measured: float, goal: float, unit: str = "") -> None:
        self.row(what, shown(measured) + unit, f"<= {shown(goal)}{unit}", "ok" if measured <= goal else "MISSED")

    def at_least(self, what: str, measured: float, goal: float, unit: str = "") -> None:
        self.row(what, shown(measured) + unit, f">= {shown(goal)}{unit}", "ok" if measured >= goal else "MISSED")

    def skip(self, what: str, why: str) -> None:
        self.row(what, "-", "-", f"skipped: {why}")


def line(what: str, measured: str, goal: str, verdict: str) -> str:
    """Return a line of the table."""
    return f"{what:76} {measured:>12}  {goal:>12}  {verdict}"


def shown(value: Any) -> str:
    """Return a figure as the table has it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


# ---- The scenarios ---------------------------------------------------------------------------------------------------


def kill(bench: Bench) -> None:
    """Kill the run (`kill -9`) 100 times: in its start-up, in mid-run, and while it puts the file in order.

    2,000 prompts, 100 in flight; after each kill the same command again, and a fresh job when one is done. The
    latency's median is 0.1 s, so that 100 kills take a minute or two.
    """
    kills, deaths, jobs = bench.size(100, 10), Counter[str](), []
    server = bench.serve(latency=0.1)
    turns = ["start", "middle", "middle", "end"]
    again, most, sent, ends = 0, 0, 0, []
    while deaths.total() < kills:
        job = Job(bench, server, bench.size(2000, 300), "-c", "100")
        runs = []
        while deaths.total() < kills and (place := strike(bench, job, runs, turns[deaths.total() % 4])):
            deaths[place] += 1
        ends.append(job.run())
        runs.append(ends[-1])
        jobs.append(job)
        again += asked_again(runs)
        most, sent = max(most, *sent_again(runs)), sent + sum(sent_again(runs))
    bench.exactly("kills", deaths.total(), kills)
    for place in ("in the start-up", "in mid-run", "at the final replace"):
        bench.at_least(f"kills {place}", deaths[place], 1)
    bench.exactly("the runs to the end, exit status", statuses(ends), "0")
    bench.exactly(f"prompts lost of {sum(len(job.prompts) for job in jobs):,}", sum(job.lost() for job in jobs), 0)
    bench.exactly("duplicate lines", sum(job.doubles() for job in jobs), 0)
    bench.exactly("files in input order", sum(job.ordered() for job in jobs), len(jobs))
    bench.exactly("asked again, told 50 ms before the kill", again, 0)
    bench.at_most("sent again after a kill, the most", most, 100)
    bench.at_most("sent again after a kill, the mean", sent / kills, 100.0)


def strike(bench: Bench, job: Job, runs: list[Client], turn: str) -> str:
    """Start the job's command and kill it at a random moment; return where that was, or '' if it had ended."""
    before, dice, client = job.drafted(), bench.rng, job.start()
    runs.append(client)
    if turn == "start":
        alive = client.after(dice.uniform(0, 0.15))
    elif turn == "middle":
        alive = client.requested(dice.randrange(1, len(job.prompts) // 3)) and client.after(dice.uniform(0, 0.1))
    else:
        alive = client.until(lambda: job.drafted() != before) and client.after(dice.uniform(0, 0.003))
    if alive:
        client.kill()
    if client.wait().status == 0:
        return ""
    if not alive:
        raise RuntimeError(f"a run ended by itself with exit status {client.status}")
    return "at the final replace" if turn == "end" else "in mid-run" if client.requests else "in the start-up"


def ctrl_c(bench: Bench) -> None:
    """Interrupt runs in the middle of 1,000 prompts, 100 in flight: once (then it ends in good order), and twice.

    SIGINT and SIGTERM, five times each; twice with each backend that is installed, 0.2 s apart.
    """
    if os.name == "nt":
        bench.skip("all", "Windows sends no SIGINT to one process")
        return
    server = bench.serve()
    signals = bench.size([signal.SIGINT, signal.SIGTERM] * 5, [signal.SIGINT])
    interrupt_once(bench, server, signals)
    for backend in ("stdlib", "raw-aiohttp", "openai-sdk"):
        if missing(backend):
            bench.skip(f"twice, {backend}", f"{LIBRARIES[backend].split()[0]} is not installed")
        else:
            interrupt_twice(bench, server, signals, backend)


def missing(backend: str) -> bool:
    """Whether the library that a backend needs is not installed."""
    return backend in LIBRARIES and importlib.util.find_spec(LIBRARIES[backend].split()[0]) is None


def interrupt_once(bench: Bench, server: Recorder, signals: Iterable[int]) -> None:
    """Interrupt and let it end by itself; then give the same command."""
    first, second, jobs, lost, late, named = [], [], [], 0, 0, []
    for number in signals:
        jobs.append(job := Job(bench, server, bench.size(1000, 200), "-c", "100"))
        client = job.start()
        client.requested(len(job.prompts) // 2)
        told = client.send(number)
        first.append(client.wait())
        lost += len({one.prompt for one in client.requests if one.answered} - job.answered())
        late += sum(one.came > told + MARGIN for one in client.requests)
        named += re.findall(r"stopping: (\d+) calls? in flight may finish", client.text)
        second.append(job.run())
    bench.exactly("once, exit status", statuses(first), "130")
    bench.exactly("once, answers sent and not in the file", lost, 0)
    bench.exactly("once, requests 50 ms after it or later", late, 0)
    bench.exactly(f"once, said how many are in flight ({', '.join(sorted(set(named)))})", len(named), len(first))
    report_continued(bench, "once", second, jobs)
    again = sum(sum(sent_again(pair)) for pair in zip(first, second, strict=True))
    bench.exactly("once, continued, sent again", again, 0)


def interrupt_twice(bench: Bench, server: Recorder, signals: Iterable[int], backend: str) -> None:
    """Interrupt, and once more 0.2 s later, while there are calls in flight; then give the same command."""
    first, second, jobs, lost = [], [], [], 0
    for number in signals:
        jobs.append(job := Job(bench, server, bench.size(1000, 200), "-c", "100", backend=backend))
        client = job.start()
        client.requested(len(job.prompts) // 2)
        client.send(number)
        client.after(0.2)
        client.stopped = client.send(number)
        first.append(client.wait())
        lost += len(client.told() - job.answered())
        second.append(job.run())
    name = f"twice, {backend}"
    bench.exactly(f"{name}, exit status", statuses(first), "130")
    bench.at_most(f"{name}, to its end, the worst", max(one.ended - one.stopped for one in first), 0.3, " s")
    bench.exactly(f"{name}, answers not in the file", lost, 0)
    report_continued(bench, name, second, jobs)
    again = sum(asked_again(pair) for pair in zip(first, second, strict=True))
    bench.exactly(f"{name}, continued, answers asked again", again, 0)


def report_continued(bench: Bench, name: str, runs: list[Client], jobs: list[Job]) -> None:
    bench.exactly(f"{name}, continued, exit status", statuses(runs), "0")
    bench.exactly(f"{name}, continued, prompts lost", sum(job.lost() for job in jobs), 0)


def statuses(clients: Iterable[Client]) -> str:
    """Return the exit statuses that there were."""
    return ", ".join(str(status) for status in sorted({client.status for client in clients}))


def faults(bench: Bench) -> None:
    """Let 15 % of the requests fail, in all ways; 1,000 prompts, 50 in flight, and as many as `auto` makes it.

    The ideal is as many slots, the very latencies that the server drew, and no faults; the wall time is that of the
    whole process. An answer that came without anything of use is billed twice and cannot be helped; the seed says how
    many there are, 30 being likely.
    """
    shares = {"500": 0.05, "503-html": 0.03, "reset": 0.03, "truncated": 0.02, "hang": 0.01, "null-choices": 0.005,
              "error-200": 0.005, "malformed": 0.005}
    goals = [(50, ["-c", "50"], 2.5, 36), (256, [], 2.2, 45)]
    for slots, flags, ratio, most in bench.size(goals, goals[:1]):
        server = bench.serve(fault=shares)
        job = Job(bench, server, bench.size(1000, 200), *flags)
        run, name = job.run(), " ".join(flags) or "-c auto"
        bench.exactly(f"{name}, exit status", run.status, 0)
        bench.exactly(f"{name}, prompts answered", len(job.answered()), len(job.prompts))
        best, wall = ideal(job, run, slots), run.ended - run.began
        bench.at_most(f"{name}, wall time {wall:.1f} s / ideal {best:.1f} s", wall / best, bench.size(ratio, 10.0))
        bills = Counter(one.prompt for one in run.requests if one.billed)
        useless = sum(one.billed and not one.answered for one in run.requests)
        twice = bills.total() - len(bills)
        bench.at_most(f"{name}, billed twice", twice, most)
        bench.at_most(f"{name}, billed twice needlessly", twice - useless, 6)


def ideal(job: Job, run: Client, slots: int) -> float:
    """Return the seconds that the job would take with so many slots, each busy until no prompt is left."""
    latencies = {one.prompt: one.latency for one in run.requests}
    free = [0.0] * slots
    for prompt in job.prompts:
        heapq.heapreplace(free, free[0] + latencies.get(prompt, 0.0))
    return max(free)


def outage(bench: Bench) -> None:
    """Let the server go away in mid-run for 20 s and for 5 minutes, and for longer than `--deadline` allows.

    Its port refuses connections meanwhile, and those that there were are reset. 1,000 prompts, 50 in flight. The span
    is from the first request to the last answer; the ideal is the time without faults, and the outage.
    """
    for seconds in ([4] if bench.quick else [20, 300]):
        server = bench.serve(port=quiet_port())
        job = Job(bench, server, bench.size(1000, 300), "-c", "50", backend="tests.torture:counted")
        counts = job.folder / "counts.json"
        run = job.start(environment={"TORTURE_BACKEND": bench.backend, "TORTURE_COUNTS": str(counts)})
        run.requested(len(job.prompts) * 2 // 5)
        server.do(server.go_away())
        run.after(seconds)
        server.do(server.come_back())
        run.wait()
        bench.exactly(f"{seconds} s, exit status", run.status, 0)
        bench.exactly(f"{seconds} s, prompts answered", len(job.answered()), len(job.prompts))
        span = max(one.sent for one in run.requests if one.answered) - run.requests[0].came
        best = ideal(job, run, 50) + seconds
        share = 0.0 if job.lost() else best / span
        bench.at_least(f"{seconds} s, ideal {best:.1f} s / span {span:.1f} s", share, bench.size(0.95, 0.8))
        met = Counter(json.loads(counts.read_text()))
        connects = met["refused"] * 20 / seconds
        bench.at_most(f"{seconds} s, refused connects in 20 s ({met['lost']} lost)", connects, 25.0)
    deadline(bench)


def deadline(bench: Bench) -> None:
    """Let the server go away for good, with `--deadline 5`."""
    limit = bench.size(5, 3)
    server = bench.serve(port=quiet_port())
    job = Job(bench, server, 1000, "-c", "50", "--deadline", str(limit))
    run = job.start()
    run.requested(200)
    server.do(server.go_away())
    run.wait()
    name = f"--deadline {limit}"
    bench.exactly(f"{name}, exit status", run.status, 3)
    bench.at_most(f"{name}, ended after", run.ended - run.began, limit + 1.0, " s")
    bench.at_least(f"{name}, answers kept", len(job.answered()), 1)
    bench.exactly(f"{name}, answers sent and not in the file", len(run.told() - job.answered()), 0)


def quiet_port() -> int:
    """Return a free port that no connection is given as its own, lest a client that tries it in vain meet itself."""
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@contextlib.asynccontextmanager
async def counted(base_url: str, headers: dict[str, str], concurrency: int) -> AsyncIterator[Any]:
    """Be the backend that TORTURE_BACKEND names, and count in the file TORTURE_COUNTS how its calls fail."""
    module = importlib.import_module(f"concurrent_prompts.backends.{os.environ['TORTURE_BACKEND'].replace('-', '_')}")
    counts = Counter[str]()
    async with module.connect(base_url, headers, concurrency) as post:

        async def counting_post(path: str, body: bytes) -> Any:
            try:
                return await post(path, body)
            except ConnectionError as failure:
                refused = isinstance(failure, ConnectionRefusedError)
                counts["refused" if refused else "lost"] += 1
                raise

        try:
            yield counting_post
        finally:
            Path(os.environ["TORTURE_COUNTS"]).write_text(json.dumps(counts))


def final(bench: Bench) -> None:
    """Let the server refuse all prompts for good, and mend it: the key, the credit, the model, the certificate.

    1,000 prompts, 50 in flight. The key is refused from request 200 on, the credit is used up after 200 answers, the
    model is never there, and neither is an authority for the certificate.
    """
    server = bench.serve(require_key="old")
    server.plan[200] = lambda: server.set(require_key="new")
    refuse(bench, "key", server, 401, "check the key", {"OPENAI_API_KEY": "old"}, {"OPENAI_API_KEY": "new"})

    server = bench.serve(quota=200)
    refuse(bench, "credit", server, 429, "credit or spending limit is used up", mend=lambda: server.set(quota=None))

    server = bench.serve(models=("another",))
    refuse(bench, "model", server, 404, "check the model (-m)", mend=lambda: server.set(models=()))

    if importlib.util.find_spec("trustme") is None:
        bench.skip("certificate", "trustme is not installed")
        return
    own, authority = certificates(bench.folder()[0])
    server = bench.serve(tls=str(own))
    refuse(bench, "certificate", server, None, "set SSL_CERT_FILE", {}, {"SSL_CERT_FILE": str(authority)})


def refuse(bench: Bench, name: str, server: Recorder, status: int | None, advice: str,
           bad: dict[str, str] | None = None, good: dict[str, str] | None = None,
           mend: Callable[[], None] = lambda: None) -> None:
    """Run until the server refuses with the status, look at what is left, mend the cause and run again."""
    job = Job(bench, server, bench.size(1000, 300), "-c", "50")
    first = job.run(environment=bad)
    bench.exactly(f"{name}, exit status", first.status, 3)
    bench.exactly(f"{name}, says what to do", advice in first.text, True)
    bench.at_most(f"{name}, requests after the first refusal", needless(first, status, 50), 6)
    bench.exactly(f"{name}, answers sent and not in the file", len(first.told() - job.answered()), 0)
    kept = len(job.answered())
    mend()
    second = job.run(environment=good)
    bench.exactly(f"{name}, mended, exit status", second.status, 0)
    bench.exactly(f"{name}, mended, prompts lost", job.lost(), 0)
    bench.exactly(f"{name}, mended, asked again of {kept} kept", asked_again([first, second]), 0)


def needless(run: Client, status: int | None, concurrency: int) -> int:
    """Return how many requests came after the first answer of that status, but for those on their way."""
    if status is None:
        return len(run.requests)
    first = min((one for one in run.requests if one.status == status), key=lambda one: one.sent)
    on_their_way = concurrency - first.in_flight
    return max(0, sum(one.came > first.sent for one in run.requests) - on_their_way)


def certificates(folder: Path) -> tuple[Path, Path]:
    """Make a certificate with its key for the server, and the authority's that it is verified by."""
    import trustme

    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "authority.pem")
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(folder / "server.pem")
    return folder / "server.pem", folder / "authority.pem"


def disk(bench: Bench) -> None:
    """Let the disk refuse the results: from the start, and in the middle of 1,000 prompts, 50 in flight."""
    server = bench.serve()
    job = Job(bench, server, bench.size(1000, 300), "-c", "50")
    run = job.run("-o", "missing/results.jsonl")
    refused = (run.status, len(run.requests), "cannot write missing" in run.text)
    bench.exactly("no such folder: exit status, requests, said so", str(refused), str((2, 0, True)))
    read_only(bench, server)
    file_limit(bench, server)
    small_disk(bench, server)


def read_only(bench: Bench, server: Recorder) -> None:
    """Give it a folder that it may not write to."""
    if os.name == "nt" or os.geteuid() == 0:
        bench.skip("read-only folder", "root, and on Windows anybody, may write to it")
        return
    job = Job(bench, server, 10)
    job.folder.chmod(0o555)
    run = job.run()
    job.folder.chmod(0o755)
    refused = (run.status, len(run.requests), "cannot write" in run.text)
    bench.exactly("read-only folder: exit status, requests, said so", str(refused), str((2, 0, True)))


def file_limit(bench: Bench, server: Recorder) -> None:
    """Let no file grow beyond what about a third of the results take (RLIMIT_FSIZE)."""
    if os.name == "nt":
        bench.skip("limit on files", "Windows has no RLIMIT_FSIZE")
        return
    job = Job(bench, server, bench.size(1000, 300), "-c", "50")
    first = job.run(wrap=limited(len(job.prompts) * 150))
    report_full(bench, "limit on files", job, first)
    kept = len(job.answered())
    second = job.run()
    report_room(bench, "limit on files", job, second, kept, sent_again([first, second])[1])


def limited(size: int) -> list[str]:
    """Return the beginning of a command that may write no file larger than that."""
    program = ("import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2); "
               "os.execv(sys.argv[2], sys.argv[2:])")
    return [sys.executable, "-c", program, str(size)]


def small_disk(bench: Bench, server: Recorder) -> None:
    """Let the results stand on a file system of their own that has too little room, and then has enough."""
    count = bench.size(1000, 300)
    folder = bench.folder()[0]
    try:
        holder = mount(bench, folder, f"{count * 150 // 1024}k")
    except OSError as failure:
        bench.skip("full disk", f"no small file system can be mounted ({failure})")
        return
    job = Job(bench, server, count, "-c", "50", folder=Path(f"/proc/{holder.pid}/root{folder}"))
    inside = ["nsenter", "--user", "--mount", "--preserve-credentials", f"--target={holder.pid}",
              "sh", "-c", 'cd "$0" && exec "$@"', str(folder)]
    first = job.run(wrap=inside)
    report_full(bench, "full disk", job, first)
    kept = len(job.answered())
    holder.stdin.write("more room\n")
    holder.stdout.readline()
    second = job.run(wrap=inside)
    report_room(bench, "full disk", job, second, kept, sent_again([first, second])[1])


def mount(bench: Bench, folder: Path, size: str) -> subprocess.Popen[str]:
    """Mount a small file system there for a process, and more room on its next line of input. Raises OSError."""
    script = 'mount -t tmpfs -o size=$1 none "$0" && echo && read _ && mount -o remount,size=64m "$0" && echo && cat'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, folder, size]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    holder = subprocess.Popen(command, text=True, bufsize=1, **pipes)
    bench.stack.enter_context(holder)
    bench.stack.callback(holder.kill)
    if not holder.stdout.readline():
        raise OSError(holder.stderr.read().strip())
    return holder


def report_full(bench: Bench, name: str, job: Job, run: Client) -> None:
    """Report on a run that met the end of its room."""
    bench.exactly(f"{name}, exit status", run.status, 3)
    said = "cannot write" in run.text and "free some space" in run.text
    bench.exactly(f"{name}, says what to do", said, True)
    bench.exactly(f"{name}, whole lines only ({len(job.lines())})", job.whole() and len(job.lines()) > 0, True)
    # The calls in flight, and one that each worker began in the turn of the event loop in which the disk was full.
    bench.at_most(f"{name}, sent beyond what was kept", len(run.requests) - len(job.answered()), 100)


def report_room(bench: Bench, name: str, job: Job, run: Client, kept: int, again: int) -> None:
    """Report on the same command where there is room again."""
    bench.exactly(f"{name}, room again, exit status", run.status, 0)
    bench.exactly(f"{name}, room again, prompts lost", job.lost(), 0)
    bench.exactly(f"{name}, room again, in input order", job.ordered(), True)
    bench.at_most(f"{name}, room again, sent again ({kept} kept)", again, 100)


def two(bench: Bench) -> None:
    """Give the same command twice at once."""
    server = bench.serve()
    job = Job(bench, server, bench.size(1000, 200), "-c", "50")
    first = job.start()
    first.requested(len(job.prompts) // 3)
    for flag in ("--quiet", "--overwrite"):
        second = job.start(flag)
        second.until(lambda: False)
        bench.exactly(f"the second, {flag}, exit status", second.status, 2)
    first.wait()
    bench.exactly("the first, exit status", first.status, 0)
    bench.exactly("prompts lost", job.lost(), 0)
    bench.exactly("file in input order", job.ordered(), True)
    bench.exactly("requests for the prompts", len(first.requests), len(job.prompts))


def order(bench: Bench) -> None:
    """Kill the run as it puts its complete file into the input's order.

    At each step that matters, from within; and from without, at random moments once the new file has been begun.
    """
    server = bench.serve(latency=0.02)
    job = Job(bench, server, bench.size(2000, 500), "-c", "100")
    runs, lost, hits = [], 0, 0
    for step in BLOWS:
        run = job.run(program=["-c", BLOWS[step] + TOOL], environment={"PYTHONPATH": str(ROOT)})
        runs.append(run)
        bench.exactly(f"killed {step}, lines lost", max(job.lost(), len(job.prompts) - len(job.lines())), 0)
        bench.exactly(f"killed {step}, exit status", run.status, -signal.SIGKILL if os.name == "posix" else 9)
    for _ in range(bench.size(30, 3)):
        lines = job.lines()
        bench.rng.shuffle(lines)
        job.results.write_bytes(b"".join(lines))
        hits += strike(bench, job, runs, "end") != ""
        lost = max(lost, job.lost(), len(job.prompts) - len(job.lines()))
    bench.at_least("killed as the new file is written", hits, 1)
    bench.exactly("killed as the new file is written, lines lost", lost, 0)
    runs.append(job.run())
    bench.exactly("in the end, exit status", runs[-1].status, 0)
    bench.exactly("in the end, file in input order", job.ordered(), True)
    bench.exactly("in the end, duplicate lines", job.doubles(), 0)
    bench.exactly("in the end, sent again", sum(sent_again(runs)), 0)


TOOL = "; import sys, concurrent_prompts; sys.exit(concurrent_prompts.main(sys.argv[1:]))"
BLOWS = {
    "before the new file is safe": "import os; f = os.fsync; n = []; "  # the journal may be synced more than once
                                   "os.fsync = lambda d: (n.append(os.fstat(d).st_ino), "
                                   "os.kill(os.getpid(), 9) if n[0] != n[-1] else f(d))",
    "before the replace": "import os; os.replace = lambda *names: os.kill(os.getpid(), 9)",
    "after the replace": "import os; r = os.replace; os.replace = lambda *names: (r(*names), os.kill(os.getpid(), 9))",
}

def limits(bench: Bench) -> None:
    """Run against servers with limits that nobody has told: requests a minute, calls at once, and where they saturate.

    The span is from the first request to the last answer, as the server saw them; the ideal takes the limit as known.
    """
    rate, forty, count = {"rpm": 600}, {"max_in_flight": 40}, bench.size(1000, 300)
    cases: list[tuple[str, dict[str, Any], int, int, float, float]] = [
        ("600/min, headers", rate, bench.size(600, 100), 0, 0.98, 0.005),
        ("600/min, no headers", rate | {"no_limit_headers": True}, bench.size(600, 100), 0, 0.97, 0.01),
        ("600/min, refused ones count", rate | {"count_rejected": True}, bench.size(600, 100), 0, 0.90, 1.0),
        ("at most 40, else 429", forty, count, 40, 0.95, 0.03),
        ("at most 40, else 503", forty | {"reject_status": 503}, count, 40, 0.95, 0.03),
        ("saturated at 64", {"knee": 64}, bench.size(3000, 600), 64, 0.97, 0.0),
    ]
    for name, options, count, slots, efficiency, refused in cases:
        job = Job(bench, bench.serve(**options), count)
        run = job.run()
        best = ideal(job, run, slots) if slots else refilled(job, run)
        report_limit(bench, name, run, best, efficiency, refused)
        bench.exactly(f"{name}, prompts answered", len(job.answered()), count)
        if name == "saturated at 64" and not bench.quick:
            taken = sorted(one.sent - one.came for one in run.requests)
            bench.at_most(f"{name}, median latency / without a queue", taken[count // 2] / LATENCY["latency"], 1.4)
            bench.at_most(f"{name}, mean in flight", sum(taken) / span(run), 1.3 * 64)
    if not bench.quick:
        tokens_a_minute(bench)
        changing(bench)
        shared(bench)
        no_limit(bench)


def refilled(job: Job, run: Client) -> float:
    """Return the seconds that the job would take with 60 saved up and 10 a second, each with its own latency."""
    latencies = {one.prompt: one.latency for one in run.requests}
    return max(max(0, n - 59) / 10 + latencies[prompt] for n, prompt in enumerate(job.prompts))


def report_limit(bench: Bench, name: str, run: Client, best: float, efficiency: float, refused: float) -> None:
    share = sum(one.status in (429, 503) for one in run.requests) / len(run.requests)
    bench.at_least(f"{name}, ideal {best:.1f} s / span", best / span(run), efficiency - bench.size(0, 0.3))
    bench.at_most(f"{name}, refused", 100 * share, 100 * refused + bench.size(0, 5), " %")


def tokens_a_minute(bench: Bench) -> None:
    """Let prompts of very mixed size meet a limit of 60,000 tokens a minute."""
    sizes = [int(10 * math.exp(bench.rng.gauss(2.2, 1))) for _ in range(300)]
    for name, efficiency, refused in (("headers", 0.97, 0.01), ("no headers", 0.93, 0.03)):
        server = bench.serve(tpm=60000, no_limit_headers=name == "no headers")
        job = Job(bench, server, [f"{number} " + "word " * size for number, size in enumerate(sizes)])
        run = job.run()
        rows = map(json.loads, job.lines())
        cost = sum(row["usage"]["total_tokens"] for row in rows)
        report_limit(bench, f"60,000 tokens/min, {name}", run, (cost - 6000) / 1000 + 0.3, efficiency, refused)


def changing(bench: Bench) -> None:
    """Let a limit of 1,200 a minute halve after 20 s, and double after 30 more."""
    server = bench.serve(rpm=1200)
    job = Job(bench, server, 1200)
    run = job.start()
    run.requested(1)
    for wait, limit in ((20, 600), (30, 1200)):
        run.after(wait)
        server.loop.call_soon_threadsafe(server.limit, limit)
    run.wait()
    report_limit(bench, "1,200/min, halved, doubled", run, 69.3, 0.93, 0.02)


def shared(bench: Bench) -> None:
    """Let two runs share a key that may ask 600 times a minute."""
    server = bench.serve(rpm=600)
    jobs = [Job(bench, server, 300) for _ in range(2)]
    for run in [job.start() for job in jobs]:
        run.wait()
    sent = [[one.sent for one in server.requests if one.answered and one.prompt in job.prompts] for job in jobs]
    first = min(map(max, sent))
    before = [sum(when <= first for when in whens) for whens in sent]
    share = sum(one.status == 429 for one in server.requests) / len(server.requests)
    last = max(one.sent for one in server.requests if one.answered)
    bench.at_least("two runs, ideal 54.3 s / span", 54.3 / (last - server.requests[0].came), 0.9)
    bench.at_most("two runs, refused", 100 * share, 5, " %")
    bench.at_least("two runs, share of the slower one", min(before) / sum(before), 0.35)


def no_limit(bench: Bench) -> None:
    """Compare the default with the best of some fixed numbers, where the server takes all and answers in 0.1 s."""
    spans = {}
    for flags in ((), ("-c", "128"), ("-c", "256"), ("-c", "512"), ("-c", "1000")):
        job = Job(bench, bench.serve(latency=0.1, sigma=0.0), 20000, *flags)
        spans[" ".join(flags)] = span(job.run())
    best = min(filter(None, spans), key=lambda name: spans[name])
    bench.at_least(f"no limit, span of {best} / span of the default", spans[best] / spans[""], 0.9)


def span(run: Client) -> float:
    """Return the seconds from the first request to the last answer."""
    return max(one.sent for one in run.requests if one.answered) - run.requests[0].came


def servers(bench: Bench) -> None:
    """Run against servers with slots, gates, windows and caps that nobody has told (tests/server_cases.py).

    Then against one whose every reply is the same failure, and one that closes each connection after its answer.
    """
    for case in bench.size(server_cases.ALL, [server_cases.SLOTS[0], *server_cases.GATES[:1], *server_cases.CAPS[2:3]]):
        server = bench.serve(**case.server)
        job = Job(bench, server, bench.size(case.prompts, case.prompts // 4), *case.flags)
        run = in_time(job)
        best = case.ideal(latencies(job, run), run.requests[0].came) + case.pause
        slack = bench.size(0.0, 0.3)  # with a quarter of the prompts the first guesses count four times as much
        report_span(bench, case.name, job, run, best, case.within + slack)
        bench.at_most(f"{case.name}, calls a prompt", len(run.requests) / len(job.prompts), case.calls + slack)
        share = sum(one.status not in (200, None) for one in run.requests) / len(run.requests)
        bench.at_most(f"{case.name}, refused", 100 * share, 100 * (case.refused + slack), " %")
        if case.server.get("work_on"):
            bench.exactly(f"{case.name}, worked for nobody", server.stats.unheard, 0)
    hopeless(bench)
    closing(bench)


def in_time(job: Job, *flags: str) -> Client:
    """Run the job, but not for too long: it is killed then, and its figures are missed."""
    return cut_off(job, job.start(*flags))


def cut_off(job: Job, run: Client) -> Client:
    """Wait for the end of a run, and kill it if that is too long."""
    with contextlib.suppress(TimeoutError):
        run.until(lambda: False, job.bench.size(75.0, 15.0))
    run.kill()
    return run.wait()


def latencies(job: Job, run: Client) -> list[float]:
    """Return for each prompt the latency that the server drew when it was first let in."""
    drawn = {one.prompt: one.latency for one in reversed(run.requests) if one.latency}
    return [drawn.get(prompt, 0.0) for prompt in job.prompts]


def report_span(bench: Bench, name: str, job: Job, run: Client, best: float, within: float) -> None:
    """Report whether all was answered, and how long that took against the best that was possible."""
    report_answered(bench, name, job, run)
    took = span(run) if any(one.answered for one in run.requests) else math.inf
    bench.at_most(f"{name}, span {took:.1f} s / ideal {best:.1f} s", math.inf if job.lost() else took / best, within)


def report_answered(bench: Bench, name: str, job: Job, run: Client) -> None:
    bench.exactly(f"{name}, answered, exit status", f"{len(job.answered())}, {run.status}", f"{len(job.prompts)}, 0")


def hopeless(bench: Bench) -> None:
    """Let every reply be the same failure, from the first call on; also with -q."""
    for status, flags in bench.size([("500", ()), ("500", ("-q",)), ("429", ())], [("500", ("-q",))]):
        name = " ".join([f"{status} to everything", *flags])
        job = Job(bench, bench.serve(fault={status: 1.0}, latency=0.05), 200, *flags)
        run = in_time(job)
        bench.exactly(f"{name}, exit status", run.status, 3)
        bench.at_most(f"{name}, calls", len(run.requests), 40)
        reason = {"500": "an error while processing", "429": "Rate limit reached"}[status]
        bench.exactly(f"{name}, the reason is said", reason in run.text, True)
        if status == "429":
            bench.exactly(f"{name}, no limit is reported", "requests/min" in run.text, False)
        else:
            hints = [flag in run.text for flag in ("-e", "-p")]
            bench.exactly(f"{name}, hints at -e and -p", all(hints), True)


def closing(bench: Bench) -> None:
    """Close each connection after its answer, without a word; 500 prompts, with every backend."""
    for backend in bench.size(["stdlib", "raw-aiohttp", "openai-sdk"], ["stdlib"]):
        name = f"closes after each answer, {backend}"
        if missing(backend):
            bench.skip(name, f"{LIBRARIES[backend].split()[0]} is not installed")
            continue
        job = Job(bench, bench.serve(close_every=1, latency=0.05), bench.size(500, 100), backend=backend)
        run = in_time(job)
        report_answered(bench, name, job, run)
        tries = sum(json.loads(row)["attempts"] for row in job.lines())
        bench.at_most(f"{name}, attempts a prompt", tries / len(job.prompts), 1.02)


def away(bench: Bench) -> None:
    """Let the server be silent, ill, slow, loading, partly sick or full of stragglers, and nobody say so.

    1,000 prompts; outages of 20 s, 20 in flight; all else is the default.
    """
    for kind, within, more in bench.size(ILLS, ILLS[:2]):
        ill(bench, kind, within, more)
    loading(bench)
    if not bench.quick:
        dropped(bench)
        replicas(bench)
        stragglers(bench)
        silent_interrupt(bench)


ILLS = [("silent", 1.15, 20), ("503", 1.1, 0), ("502-page", 1.1, 20), ("slow", 1.1, 10)]


def ill(bench: Bench, kind: str, within: float, twice: int) -> None:
    """Let an outage come in the fifth second."""
    seconds = bench.size(20, 3)
    server = bench.serve(outage=(f"{kind}@{bench.size(5, 1)}+{seconds}",))
    job = Job(bench, server, bench.size(1000, 200), "-c", "20")
    run, name = in_time(job), f"{kind} for {seconds} s"
    best = server_cases.in_slots(20)(latencies(job, run), 0) + seconds
    report_span(bench, name, job, run, best, within + bench.size(0, 0.3))
    bench.at_most(f"{name}, paid twice", paid_twice(run), twice)
    if kind in ("503", "502-page"):
        met = sum(one.fault == kind for one in run.requests)
        bench.at_most(f"{name}, calls that met it", met, 30)
        bench.exactly(f"{name}, prompts that lost an attempt", lost_attempts(job), 0)


def paid_twice(run: Client) -> int:
    """Count the calls that an API would want money for beyond one a prompt."""
    bills = Counter(one.prompt for one in run.requests if one.billed)
    return bills.total() - len(bills)


def lost_attempts(job: Job) -> int:
    return sum(json.loads(row)["attempts"] > 1 for row in job.lines())


class Relay:
    """A way to the server on which packets can be lost: what has been sent waits, and new connections get no answer."""

    def __init__(self, server: Recorder) -> None:
        self._server, self._loop = server, server.loop
        self._fillers: list[socket.socket] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._flows = asyncio.Event()
        self._flows.set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._listener.setblocking(False)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/v1"
        self._accepting = self._begin(self._accept())

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _accept(self) -> None:
        while True:
            connection, _ = await self._loop.sock_accept(self._listener)
            self._begin(self._join(connection))

    async def _join(self, connection: socket.socket) -> None:
        port = int(self._server.url.rpartition(":")[2].partition("/")[0])
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(connection.close)
            near = await self._streams(stack, sock=connection)
            far = await self._streams(stack, host="127.0.0.1", port=port)
            await asyncio.gather(self._pump(near[0], far[1]), self._pump(far[0], near[1]), return_exceptions=True)

    async def _streams(self, stack: contextlib.AsyncExitStack, **where: Any) -> tuple[Any, Any]:
        reader, writer = await asyncio.open_connection(**where)

        async def end() -> None:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

        stack.push_async_callback(end)
        return reader, writer

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                await self._flows.wait()
                writer.write(data)
                await writer.drain()
        finally:
            await self._flows.wait()
            writer.close()

    async def freeze(self) -> None:
        """Lose every packet from now on; the system drops a SYN if the queue of connections is full."""
        self._flows.clear()
        self._accepting.cancel()
        await asyncio.sleep(0)
        self._listener.listen(0)
        for _ in range(3):
            self._fillers.append(filler := socket.socket())
            filler.setblocking(False)
            filler.connect_ex(self._listener.getsockname())

    async def thaw(self) -> None:
        """Let the packets through again."""
        for filler in self._fillers:
            filler.close()
        self._listener.listen(1024)
        self._flows.set()
        self._accepting = self._begin(self._accept())

    async def close(self) -> None:
        self._flows.set()
        self._listener.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def dropped(bench: Bench) -> None:
    """Let every packet be lost for 20 s, in both directions."""
    server = bench.serve()
    relay = Relay(server)
    server.do(relay.start())
    bench.stack.callback(lambda: server.do(relay.close()))
    job = Job(bench, server, 1000, "-c", "20", "--base-url", relay.url)
    run = job.start()
    run.requested(300)
    server.do(relay.freeze())
    run.after(20)
    server.do(relay.thaw())
    cut_off(job, run)
    best = server_cases.in_slots(20)(latencies(job, run), 0) + 20
    report_span(bench, "packets dropped for 20 s", job, run, best, 1.2)
    bench.at_most("packets dropped for 20 s, paid twice", paid_twice(run), 20)


def loading(bench: Bench) -> None:
    """Let the server load its model first, also for longer than --deadline allows."""
    seconds = bench.size(30, 3)
    server = bench.serve(outage=(f"loading@0+{seconds}",))
    job = Job(bench, server, 40)
    run, name = in_time(job), f"loading for {seconds} s"
    best = max(latencies(job, run)) + seconds
    report_span(bench, name, job, run, best, 1.05 + bench.size(0, 0.5))
    bench.exactly(f"{name}, says what is waited for", "oading" in run.text, True)
    limit = bench.size(5, 2)
    run = in_time(Job(bench, bench.serve(outage=("loading@0+600",)), 40), "--deadline", str(limit))
    bench.exactly(f"loading for ever, --deadline {limit}, exit status", run.status, 3)
    bench.at_most(f"loading for ever, --deadline {limit}, ended after", run.ended - run.began, limit + 1.0, " s")


def replicas(bench: Bench) -> None:
    """Let one replica of ten be sick: 500 at once, or no answer ever; at 50 in flight, and as many as the default."""
    for flags in (("-c", "50"), ()):
        healthy = Job(bench, bench.serve(replicas=10), 1000, *flags)
        best = span(in_time(healthy))
        for sick, what in (("1", "answers 500"), ("1:never", "never answers")):
            server = bench.serve(replicas=10, sick=sick)
            job = Job(bench, server, healthy.prompts, *flags)
            run = in_time(job)
            name = f"one replica of ten {what}, {' '.join(flags) or '-c auto'}"
            report_span(bench, name, job, run, best, 1.3)
            bench.at_most(f"{name}, calls a prompt", len(run.requests) / len(job.prompts), 1.2)


def stragglers(bench: Bench) -> None:
    """Let 2 % of the calls take 40 times as long; and let a third of them, so that slowness is honest."""
    job = Job(bench, bench.serve(stragglers=0.02), 1000)
    run = in_time(job)
    best = server_cases.in_slots(256)(latencies(job, run), 0)
    report_span(bench, "2 % take 40 times as long", job, run, best, 0.35)
    bench.at_most("2 % take 40 times as long, paid twice", paid_twice(run), len(job.prompts) // 20)
    job = Job(bench, bench.serve(stragglers=0.33, straggler_factor=20), 1000)
    run = in_time(job)
    best = server_cases.in_slots(256)(latencies(job, run), 0)
    report_span(bench, "a third takes 20 times as long", job, run, best, 2.0)
    bench.at_most("a third takes 20 times as long, paid twice", paid_twice(run), len(job.prompts) // 10)


def silent_interrupt(bench: Bench) -> None:
    """Interrupt a run whose server is silent: it must not wait in silence, and the second time it ends at once."""
    if os.name == "nt":
        bench.skip("interrupted on a silent server", "Windows sends no SIGINT to one process")
        return
    job = Job(bench, bench.serve(outage=("silent@2+600",)), 500, "-c", "20")
    run, name = job.start(), "interrupted on a silent server"
    run.requested(20)
    run.after(4)
    run.send(signal.SIGINT)
    patient = run.after(8)
    run.stopped = run.send(signal.SIGINT) if patient else math.inf
    run.wait(30)
    said = [text for text in run.text.splitlines() if "wait" in text.lower() and "again" in text.lower()]
    bench.exactly(f"{name}, exit status", run.status, 130)
    bench.exactly(f"{name}, says what it waits for, or has ended", bool(said) or not patient, True)
    bench.at_most(f"{name}, to its end", run.ended - run.stopped if patient else 0.0, 0.5, " s")
    bench.exactly(f"{name}, answers not in the file", len(run.told() - job.answered()), 0)


ROW = 500  # bytes of a result, or a few more
SOAK_FAULTS = {"500": 0.01, "503-html": 0.005, "reset": 0.003, "truncated": 0.002, "hang": 0.0002,
               "null-choices": 0.0005, "error-200": 0.0005, "malformed": 0.0005}


def soak(bench: Bench) -> None:
    """Send a million prompts through mixed faults, an outage of each kind and three `kill -9`.

    The server is in a process of its own here, since its records of a million calls would be most of the memory.
    """
    count, kills, long = bench.size(1_000_000, 2000), bench.size(3, 1), bench.size(10.0, 0.3)
    first, gap = bench.size((20.0, 35.0), (0.5, 0.6))
    outages = [f"{kind}@{first + gap * number:g}+{long:g}" for number, kind in enumerate(stand_in.OUTAGES)]
    options = {"latency": 0.05, "sigma": 0.5, "port": quiet_port(), "seed": bench.seed}
    flags = [f"--{name}={value}" for name, value in options.items()] + [f"--outage={each}" for each in outages]
    flags += [f"--fault={kind}={share}" for kind, share in SOAK_FAULTS.items()]
    command = [sys.executable, "-m", "concurrent_prompts.extras.stand_in", *flags, "--exit-on-eof"]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              text=True, env=clean_environment(), cwd=ROOT)
    bench.stack.enter_context(server)
    bench.stack.callback(server.kill)
    assert server.stdout
    url = server.stdout.readline().rpartition(" ")[2].strip()
    soaked(bench, url, count, kills)


def soaked(bench: Bench, url: str, count: int, kills: int) -> None:
    """Give the command again and again until it ends by itself; look at the memory meanwhile, and then at the rows."""
    folder, _ = bench.folder()
    prompts, results = folder / "p.txt", folder / "p.results.jsonl"
    prompts.write_text("".join(f"prompt {number}\n" for number in range(1, count + 1)))
    command = [sys.executable, SCRIPT, "p.txt", "-b", bench.backend, "--base-url", url, "-q"]
    began, size, memories, statuses_seen = time.monotonic(), 0, [], []
    limit = bench.size(900, 90)
    for turn in range(kills + 1):
        process = subprocess.Popen(command, cwd=folder, env=clean_environment(), stdin=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        bench.stack.callback(process.kill)
        memories = []
        while process.poll() is None and time.monotonic() < began + limit:
            time.sleep(0.05)
            size = results.stat().st_size if results.exists() else 0
            memories.append(memory(process.pid))
            if turn < kills and size > count * ROW * (turn + 1) / (kills + 1):
                break
        process.kill()
        statuses_seen.append(process.wait())
    with urllib.request.urlopen(f"{url}/stand_in/stats") as reply:
        met = json.load(reply)["faults"].keys() & {"silent", "503", "502-page", "loading"}  # the others leave no trace
    bench.exactly("outages that were met", ", ".join(sorted(met)), "502-page, 503, loading, silent")
    report_soak(bench, results, count, statuses_seen, memories, time.monotonic() - began, limit)


def report_soak(bench: Bench, results: Path, count: int, ends: list[int], memories: list[int], took: float,
                limit: float) -> None:
    """Report on what a soak has left."""
    seen, failed, wrong = set(), Counter[str](), 0
    with results.open("rb") as file:
        for row in map(json.loads, file):
            text = f"prompt {row['id']}"
            seen.add(row["id"])
            failed.update([row["error"]["type"]] if row["error"] else [])
            wrong += row["error"] is None and row["text"] != stand_in_answers.invent(text, text, "")
    if os.name != "nt":
        honest = ", ".join([*["-9"] * (len(ends) - 1), "1" if failed else "0"])
        bench.exactly("exit statuses", ", ".join(map(str, ends)), honest)
    bench.exactly(f"prompts lost of {count:,}", count - len(seen), 0)
    unlucky = failed.pop("no_answer", 0)  # billed for nothing twice, which is not tried a third time
    bench.at_most("prompts with no answer in two replies", unlucky, 3 + 2 * count * SOAK_FAULTS["null-choices"] ** 2)
    bench.exactly("prompts failed otherwise", ", ".join(map("{0[1]} {0[0]}".format, failed.items())) or "none", "none")
    bench.exactly("prompts with another's answer", wrong, 0)
    bench.at_most("seconds", took, limit, " s")
    settled, last = memories[len(memories) // 4 :], max(memories[-20:])
    bench.at_most("memory at the end beyond that after a quarter", (last - settled[0]) / 1e6, 30.0, " MB")
    bench.at_most("memory, the most", max(memories) / 1e6, bench.size(400.0, 150.0), " MB")


def batches(bench: Bench) -> None:
    """Kill (`kill -9`) jobs of 300 rows through openai-batch, each up to four times, and then run them to their end.

    A batch takes 0.8 s, and a tenth of the rows expire there the first time, so that they need another one. What was
    paid is what the server has answered when all batches have ended, also those that no run may know of.
    """
    if missing("openai-batch"):
        bench.skip("all", "openai is not installed")
        return
    server = bench.serve(latency=0.0, batch_time=0.8, batch_fault={"expire-once": 0.1})
    jobs = [Job(bench, server, 300, backend="openai-batch") for _ in range(bench.size(30, 3))]
    deaths, ends = Counter[str](), []
    for job in jobs:
        files, made = server.stats.files, server.stats.batches
        for _ in range(4):
            if not strike_batch(bench, server, job, deaths.total() % 4):
                break
            deaths[reached(job, server.stats.files - files, server.stats.batches - made)] += 1
        ends.append(job.run())
    server.do(server.all_ended())
    rows = sum(len(job.prompts) for job in jobs)
    bench.at_least("kills", deaths.total(), len(jobs))
    for place in ("before the upload", "before the batch is made", "before its rows", "among its rows, or later"):
        bench.at_least(f"kills {place}", deaths[place], bench.size(1, 0))
    bench.exactly("the runs to the end, exit status", statuses(ends), "0")
    bench.exactly(f"rows lost of {rows:,}", sum(job.lost() for job in jobs), 0)
    bench.exactly("rows answered twice", sum(job.doubles() for job in jobs), 0)
    bench.exactly("files in input order", sum(job.ordered() for job in jobs), len(jobs))
    bench.exactly(f"rows paid twice ({server.stats.batch_rows:,} paid)", server.stats.batch_rows - rows, 0)


def strike_batch(bench: Bench, server: Recorder, job: Job, turn: int) -> bool:
    """Start the job's command and kill it at a random moment; return False where it had ended.

    In two turns of four the moment is within 10 ms of an upload, or of the first rows kept, if one comes before.
    """
    files, lines = server.stats.files, len(job.lines())
    news = {1: lambda: server.stats.files > files, 3: lambda: len(job.lines()) > lines}.get(turn, lambda: False)
    client, after = job.start(), bench.rng.uniform(0, 0.01)
    end = client.began + bench.rng.uniform(0.3, 2.2)
    alive = client.until(lambda: news() or time.monotonic() >= end) and client.after(after)
    if alive:
        client.kill()
    if client.wait().status and not alive:
        raise RuntimeError(f"a run ended by itself with exit status {client.status}: {client.text[-200:]}")
    return client.status != 0


def reached(job: Job, files: int, made: int) -> str:
    """Return how far a job of so many uploads and batches had come when it was killed."""
    if files > made:
        return "before the batch is made"
    if job.lines():
        return "among its rows, or later"
    return "before its rows" if made else "before the upload"


def cluster(bench: Bench) -> None:
    """Kill (`kill -9`) one of two local workers in the middle of 2,000 prompts, 100 in flight; ten times."""
    if missing("dask-cluster"):
        bench.skip("all", "distributed is not installed")
        return
    server, flags = bench.serve(latency=0.1), ["-c", "100", "--cluster", "2", "--worker-backend", bench.backend]
    jobs = [Job(bench, server, 2000, *flags, backend="dask-cluster") for _ in range(bench.size(10, 1))]
    runs, again, had = [], [], []
    for job in jobs:
        runs.append(run := job.start())
        run.requested(bench.rng.randrange(400, 1600))
        bench.rng.choice(workers(run)).kill()
        run.wait()
        again.append(len(run.requests) - len({one.prompt for one in run.requests}))
        had += [int(count.replace(",", "")) for count in re.findall(r"is lost; ([\d,]+) prompts?\b", run.text)]
    bench.exactly("exit status", statuses(runs), "0")
    bench.exactly("workers lost, as the runs say", len(had), len(jobs))
    bench.exactly(f"prompts answered, of {len(jobs)} times", min(len(job.answered()) for job in jobs), 2000)
    bench.exactly("duplicate lines", sum(job.doubles() for job in jobs), 0)
    bench.exactly("files in input order", sum(job.ordered() for job in jobs), len(jobs))
    bench.at_most("asked again, the most; goal: what a worker had", max(again), max(had, default=0))
    bench.at_most("asked again, the mean; goal: likewise", statistics.mean(again), statistics.mean(had or [0]))


def workers(run: Client) -> list[Any]:
    """Return the two worker processes of a run; among its children is one that keeps track of resources, too."""
    import psutil  # comes with distributed

    children = psutil.Process(run.process.pid).children()
    found = sorted((child for child in children if "spawn_main" in " ".join(child.cmdline())), key=lambda one: one.pid)
    if len(found) != 2:
        raise RuntimeError(f"a run with --cluster 2 has {len(found)} worker processes")
    return found


def replies(bench: Bench) -> None:
    """Answer three prompts with replies that are made to hang the run, or to fill its memory; --deadline is 20 s.

    Each is one attempt. A hang is a run that takes longer than its goal, or an event loop that hears no Ctrl-C.
    """
    for name, (made, kind) in POISONS.items():
        run = Poisoned(bench, bench.backend, made())
        bench.at_most(name, run.seconds, 15.0, " s")
        bench.exactly(f"{name}: came to", run.kinds, kind)
    for backend in ("stdlib", "raw-aiohttp", "openai-sdk"):
        if missing(backend):
            bench.skip(f"{backend}: memory", f"{LIBRARIES[backend]} is not installed")
            continue
        for name, reply in FLOODS.items():
            run = Poisoned(bench, backend, reply, prompts=1)
            bench.at_most(f"{backend}, {name}: memory", run.megabytes, 1000.0, " MB")
            bench.exactly(f"{backend}, {name}: exit status, time", f"{run.status}, {run.seconds < 15}", "3, True")
    if not importlib.util.find_spec("jsonschema"):
        bench.skip("a pattern that never ends", "jsonschema is not installed")
        return
    vicious = poison(json.dumps({"choices": [{"message": {"content": json.dumps("a" * 40 + "b")}}]}).encode())
    schema = json.dumps({"type": "string", "pattern": "^(a+)+$"})
    run = Poisoned(bench, bench.backend, vicious, schema=schema)
    bench.at_most("a schema's pattern that never ends, 5 s each", run.seconds, 20.0, " s")
    bench.exactly("a schema's pattern that never ends: came to", run.kinds, "schema_mismatch")
    run = Poisoned(bench, bench.backend, vicious, schema=schema, deadline=3)
    bench.at_most("the same with --deadline 3", run.seconds, 6.0, " s")
    run = Poisoned(bench, bench.backend, vicious, schema=schema, interrupts=2)
    bench.at_most("the same, the second Ctrl-C to the end", run.after_signal, 1.0, " s")
    listed = json.dumps([{"a": number} for number in range(30_000)])
    items = poison(json.dumps({"choices": [{"message": {"content": listed}}]}).encode())
    run = Poisoned(bench, bench.backend, items, schema='{"uniqueItems": true}', deadline=3)
    bench.at_most("an hour of uniqueItems, --deadline 3", run.seconds, 6.0, " s")


def poisoned(bench: Bench) -> None:
    """Let single prompts, or all, try to keep a run from ending; --max-attempts, --deadline and signals must end it."""
    bad, few = ["poison 1", "poison 2", "poison 3"], ("--max-attempts", "3")
    many = [f"prompt {number}" for number in range(60)]
    many[20:20] = bad
    for what, reply, more in (("reset", resetting, ()), ("never answered", silent, ("--timeout", "1"))):
        for among, prompts in (("alone", bad), ("among 60 others", many)):
            run = Poisoned(bench, bench.backend, reply, prompts=prompts, flags=(*few, *more), deadline=60)
            bench.at_most(f"3 prompts that are {what} each time, {among}", run.seconds, 20.0, " s")
            if among == "alone":  # a server that has never said a word is given up
                bench.exactly(f"3 prompts {what}, {among}: exit status", run.status in (1, 3), True)
            else:
                bench.exactly(f"3 prompts {what}, {among}: answered, failed, status", run.counts, "60, 3, 1")
    stubborn = ("--max-attempts", "1000000")
    run = Poisoned(bench, bench.backend, resetting, prompts=many, flags=stubborn, deadline=3)
    bench.at_most("3 prompts reset for ever, --deadline 3", run.seconds, 5.0, " s")
    for number in (signal.SIGINT, signal.SIGTERM):
        run = Poisoned(bench, bench.backend, resetting, prompts=many, flags=stubborn, deadline=60, interrupts=1,
                       by=number)
        bench.at_most(f"3 prompts reset for ever, one {number.name}", run.after_signal, 2.0, " s")
    for backend in ("stdlib", "raw-aiohttp", "openai-sdk"):
        if missing(backend):
            bench.skip(f"{backend}: interim replies, a charset", f"{LIBRARIES[backend]} is not installed")
            continue
        run = Poisoned(bench, backend, CHARSET, deadline=30)
        bench.at_most(f"{backend}, an error in charset=punycode", run.seconds, 10.0, " s")
        run = Poisoned(bench, backend, interim, prompts=1, deadline=3)  # in aiohttp they hold up the event loop
        goal = 3.0 if backend == "stdlib" else 60.0
        bench.at_most(f"{backend}, interim replies without an end, --deadline 3", run.seconds, goal, " s")
    for what, (code, goal) in FUNCTIONS.items():
        began = time.monotonic()
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run([sys.executable, "-c", f"{FUNCTION}{code}"], timeout=PATIENCE, check=False,
                           env=clean_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        bench.at_most(what, time.monotonic() - began, goal, " s")


def resetting(connection: socket.socket, body: bytes) -> list[bytes]:
    """Reset the connection of a prompt that is poison, and answer any other."""
    if b"poison" not in body:
        return ANSWER
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    return []


def silent(connection: socket.socket, body: bytes) -> list[bytes]:
    """Say nothing to a prompt that is poison, and answer any other."""
    if b"poison" in body:
        connection.settimeout(PATIENCE)
        connection.recv(1)
    return ANSWER


def interim(connection: socket.socket, body: bytes) -> Iterator[bytes]:
    """Yield interim replies that never end."""
    while True:
        yield b"HTTP/1.1 103 -\r\n\r\n" * 1000


def poison(body: bytes, status: int = 200, *headers: str) -> list[bytes]:
    """Return a reply as it goes over the wire."""
    lines = [f"HTTP/1.1 {status} -", f"content-length: {len(body)}", "connection: close", *headers, "", ""]
    return ["\r\n".join(lines).encode(), body]


def chunks(head: str, block: bytes) -> Iterator[bytes]:
    """Yield a reply in chunks that never ends."""
    yield f"HTTP/1.1 200 -\r\ntransfer-encoding: chunked\r\n{head}\r\n".encode()
    while True:
        yield b"%x\r\n%b\r\n" % (len(block), block)


def bomb() -> bytes:
    """Return 5 GB of spaces, as gzip of 5 MB; a block that ends with a full flush can be repeated."""
    packer = zlib.compressobj(wbits=31)
    head = packer.compress(b" ") + packer.flush(zlib.Z_FULL_FLUSH)
    return head + 500 * (packer.compress(b" " * 10_000_000) + packer.flush(zlib.Z_FULL_FLUSH))


LIMITS = "x-ratelimit-limit-requests: 1", "x-ratelimit-remaining-requests: 1"
DEEP = b"[" * 990 + b"]" * 990
POISONS: dict[str, tuple[Callable[[], list[bytes]], str]] = {  # made when they are needed: some are large
    "8,000 digits in a header": (
        lambda: poison(b"{}", 500, *LIMITS, "x-ratelimit-reset-requests: " + "9" * 8000), "http_500"),
    "a million digits after 'Limit '": (lambda: poison(b'{"error": "Limit %b"}' % (b"9" * 10**6), 500), "http_500"),
    "60,000 digits after 'Limit '": (lambda: poison(b'{"error": "Limit %b"}' % (b"9" * 60_000), 500), "http_500"),
    "400 kB of <title>": (lambda: poison(b"<title>" * 57_000, 502), "http_502"),
    "an error nested 990 deep": (lambda: poison(DEEP, 500), "http_500"),
    "a number of 5,000 digits": (lambda: poison(b'{"error": {"code": %b}}' % (b"9" * 5000), 500), "http_500"),
    "an error of 200 MB": (lambda: poison(b'{"error": "%b"}' % (b"a" * 200_000_000), 400), "http_400"),
    "an answer of 200 MB that is none": (lambda: poison(b"[" + b"[]," * 66_000_000), "malformed_reply"),
}
FLOODS: dict[str, Any] = {
    "chunks without an end": lambda *_: chunks("", b" " * 65536),
    "5 GB of gzip": lambda *_: poison(bomb(), 200, "content-encoding: gzip"),
}
ANSWER = poison(json.dumps({"choices": [{"message": {"content": "fine"}}]}).encode())
CHARSET = poison(b"bcdefg0123-" * 90_000, 500, "content-type: text/html; charset=punycode")
FUNCTION = f"""
import asyncio, itertools, sys, time
sys.path.insert(0, {str(ROOT)!r})
from concurrent_prompts import run
"""
ENDLESS = "run(map(str, itertools.count()), send, deadline=3, max_attempts=3)"
FUNCTIONS = {  # with the user's own coroutine: code, and the seconds that it may take
    "one refused prompt among others, no deadline": (
        "async def send(prompt):\n    if prompt == 'bad': raise ConnectionRefusedError('no')\n    return prompt\n"
        "run(['a', 'bad', 'b'], send, max_attempts=3)", 60.0,
    ),
    "endless prompts, deadline=3": (
        f"async def send(prompt):\n    await asyncio.sleep(0.01)\n    return prompt\n{ENDLESS}", 6.0,
    ),
    "the same, a function that awaits nothing": (f"async def send(prompt):\n    return prompt\n{ENDLESS}", 6.0),
    "the same, a function that blocks": (
        f"async def send(prompt):\n    time.sleep(0.1)\n    return prompt\n{ENDLESS}", 6.0,
    ),
    "the same, all of them refused": (
        f"async def send(prompt):\n    raise ConnectionRefusedError('no')\n{ENDLESS}", 6.0,
    ),
}  # fmt: skip


class Poisoned:
    """A run of the tool against a server that answers everything with the same bytes."""

    def __init__(self, bench: Bench, backend: str, reply: Any, *, prompts: int | Sequence[str] = 3, schema: str = "",
                 deadline: float = 20, interrupts: int = 0, by: int = signal.SIGINT, flags: Sequence[str] = ()) -> None:
        folder, _ = bench.folder()
        prompts = [f"prompt {number}" for number in range(prompts)] if isinstance(prompts, int) else prompts
        (folder / "p.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
        (folder / "s.json").write_text(schema)
        with contextlib.ExitStack() as stack:
            url = stack.enter_context(answering(reply))
            flags = ["--base-url", url, "-b", backend, "--max-attempts", "1", "--deadline", str(deadline), *flags]
            command = [sys.executable, SCRIPT, "p.txt", *flags, *(["--schema", "s.json"] if schema else [])]
            began = told = time.monotonic()
            process = subprocess.Popen(command, cwd=folder, env=clean_environment(), stdin=subprocess.DEVNULL,
                                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            stack.callback(process.kill)
            for _ in range(interrupts):
                time.sleep(1)
                told = time.monotonic()
                process.send_signal(by)
            most = 0
            while process.poll() is None and time.monotonic() < began + PATIENCE:
                most = max(most, memory(process.pid))
                time.sleep(0.005)
            self.status, self.megabytes = process.poll(), most / 1e6
            self.seconds, self.after_signal = time.monotonic() - began, time.monotonic() - told
        results = folder / "p.results.jsonl"
        rows = [json.loads(line) for line in (results.read_bytes().splitlines() if results.exists() else [])]
        self.kinds = " ".join(sorted({row["error"]["type"] if row["error"] else "answered" for row in rows}))
        answered = sum(row["error"] is None for row in rows)
        self.counts = f"{answered}, {len(rows) - answered}, {self.status}"


def memory(pid: int) -> int:
    """Return the bytes that a process holds; 0 if that cannot be told."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


@contextlib.contextmanager
def answering(reply: Any) -> Iterator[str]:
    """Serve on loopback; answer each request with the blocks of bytes in `reply`, or that it returns for a request.

    It is given the connection and the request's body.
    """

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError, ValueError):
                length, line = 0, b"-"
                while line.strip():
                    line = self.rfile.readline(65536)
                    name, _, value = line.partition(b":")
                    length = int(value) if name.lower() == b"content-length" else length
                body = self.rfile.read(length)
                for block in reply(self.connection, body) if callable(reply) else reply:
                    self.connection.sendall(block)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads, block_on_close, request_queue_size = True, False, 1024

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        finally:
            server.shutdown()


SCENARIOS = {"kill": kill, "ctrl-c": ctrl_c, "faults": faults, "outage": outage, "final": final, "disk": disk,
             "two": two, "order": order, "limits": limits, "servers": servers, "away": away, "batches": batches,
             "cluster": cluster, "replies": replies, "poisoned": poisoned, "soak": soak}


# ---- Command line ----------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Run the scenarios; return the exit status."""
    parser = argparse.ArgumentParser("tests.torture", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", metavar="NAME,...", default=",".join(SCENARIOS), help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="small versions, three minutes in all")
    parser.add_argument("--backend", metavar="NAME", default="stdlib", help="default: %(default)s")
    parser.add_argument("--seed", metavar="N", type=int, default=0)
    args = parser.parse_args(argv)
    names = args.only.split(",")
    if unknown := set(names) - SCENARIOS.keys():
        parser.error(f"there is no scenario {min(unknown)}; there are {', '.join(SCENARIOS)}")
    stand_in.allow_many_connections()
    heed_signals()
    print(*heading(args), "", line("scenario", "measured", "goal", ""), sep="\n", flush=True)
    began, counts = time.monotonic(), Counter[str]()
    for name in names:
        torture(name, args, counts)
    missed = f", {counts['MISSED']} MISSED" if counts["MISSED"] else ""
    skipped = f", {counts['skipped']} skipped" if counts["skipped"] else ""
    print(f"\n{counts['ok']} figures ok{missed}{skipped} in {time.monotonic() - began:.0f} s")
    return 1 if counts["MISSED"] else 0


def heed_signals() -> None:
    """Let the tool hear the signals: a shell starts what runs in the background with some of them ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def heading(args: argparse.Namespace) -> Iterator[str]:
    """Yield what the figures depend on."""
    versions = [f"Python {platform.python_version()}"]
    for name in ("aiohttp", "openai", "distributed"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    tool = subprocess.run([sys.executable, SCRIPT, "--version"], capture_output=True, text=True).stdout.strip()
    yield f"{tool}, backend {args.backend}, {', '.join(versions)}"
    yield f"{platform.system()} {platform.release()}, {platform.machine()}, {os.cpu_count()} CPUs"
    yield f"{time.strftime('%Y-%m-%d %H:%M')}, seed {args.seed}{', quick' if args.quick else ''}"


def torture(name: str, args: argparse.Namespace, counts: Counter[str]) -> None:
    """Run a scenario; what breaks it is a missed figure and not the end of the others."""
    with contextlib.ExitStack() as stack:
        bench = Bench(name, args, stack, counts)
        try:
            SCENARIOS[name](bench)
        except Exception as failure:
            bench.row("broken off", "-", "-", f"MISSED: {type(failure).__name__}: {failure}")


if __name__ == "__main__":
    sys.exit(main())
