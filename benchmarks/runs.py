"""One run is one process: who is started, how, on which core, and what the system says that it took."""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = str(ROOT / "concurrent_prompts.py")
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
FIRST, SECOND = CORES[:2] if len(CORES) > 1 else (None, None)  # for clients; the server is on the last one
PATIENCE = 120.0  # seconds after which a run is killed, and gives no figure
FOREIGN = re.compile("PYTHON|OPENAI_|.*_proxy$", re.IGNORECASE)  # variables that are no part of the measurement
ANSWER = re.compile(rb'\{"id": ?(\d+), ?"text": ?".+\}\n$')  # a line of our results
LAUNCH = 'import runpy, sys; {}; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name="__main__")'
WITH, WITHOUT = "import uvloop, orjson", "sys.modules.update(uvloop=None, orjson=None)"
# aiofastnet's own way to put its transports under a loop; no part of the tool, see docs/benchmarks.md
FASTNET = "; import aiofastnet, {loop} as its; its.new_event_loop = aiofastnet.loop_factory(its.new_event_loop)"


@dataclass(frozen=True)
class Client:
    """How a client is started; the slow get a tenth of the requests, so that all ends in time."""

    name: str
    start: tuple[str, ...]
    backend: str = ""  # of ours
    slow: bool = False
    auto: bool = False  # no -c given
    workers: int = 0  # local processes of a cluster that call the API with the backend; they roam


def ours(backend: str, fast: bool = False, auto: bool = False, fastnet: bool = False) -> Client:
    """Return our tool, with uvloop and orjson or as if they were not there, and with aiofastnet beneath it."""
    name = backend + ", uvloop + orjson" * fast + " + aiofastnet" * fastnet + ", no -c given" * auto
    if backend == "stdlib" and not fast and not fastnet:
        start: tuple[str, ...] = (sys.executable, "-S", SCRIPT)  # -S: no site-packages
        name = name.replace("stdlib", "stdlib, nothing installed")
    else:
        also = FASTNET.format(loop="uvloop" if fast else "asyncio") if fastnet else ""
        start = (sys.executable, "-c", LAUNCH.format((WITH if fast else WITHOUT) + also), SCRIPT)
    return Client(name, start, backend, backend == "openai-sdk", auto)


def clustered(backend: str, workers: int) -> Client:
    """Return our tool with so many local processes of a Dask cluster."""
    name = f"{backend}, {workers} process{'es' * (workers > 1)}"
    return Client(name, (sys.executable, SCRIPT), backend, backend == "openai-sdk", workers=workers)


def theirs(key: str, name: str, slow: bool = True) -> Client:
    """Return a client of clients.py; one that wants other versions than ours has an environment of its own."""
    own = ROOT / ".venv" / key / "bin" / "python"
    python = str(own) if own.exists() else sys.executable
    return Client(name, (python, str(ROOT / "benchmarks" / "clients.py"), key), slow=slow)


@dataclass
class Run:
    """What the system and the server say of a client process."""

    requests: int = 0
    cpu: float = 0.0  # seconds
    wall: float = 0.0
    peak: float = 0.0  # MB
    began: float = 0.0
    start: float = 0.0  # seconds of CPU time that a run of one request takes
    first: float = 0.0  # seconds of the clock until that run's request is on the wire
    error: str = ""
    seen: dict[str, float] = field(default_factory=dict)  # by the server
    rate: float = 0.0  # answers a second of a cluster whose workers are all there


def pin(process: int, core: int | None) -> None:
    """Keep a process on a core, where the system can."""
    if sys.platform == "linux" and core is not None:
        os.sched_setaffinity(process, {core})


def spawn(command: Sequence[str], core: int | None = FIRST, trust: str | None = None) -> tuple[Run, str]:
    """Run a command on a core; return what the system says of it, and what it printed."""
    environment = {name: value for name, value in os.environ.items() if not FOREIGN.match(name)}
    if trust:
        environment["SSL_CERT_FILE"] = trust
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        began = time.monotonic()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=ROOT, env=environment)
        pin(process.pid, core)
        timer = threading.Timer(PATIENCE, process.kill)
        timer.start()
        _, status, used = os.wait4(process.pid, 0)
        wall = time.monotonic() - began
        timer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        printed, failure = out.read().decode(), err.read().decode().strip()
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss; it begins with the peak of this process
    run = Run(0, used.ru_utime + used.ru_stime, wall, used.ru_maxrss * unit / 1e6, began)
    if process.returncode:
        run.error = failure.splitlines()[-1] if failure else f"exit status {process.returncode}"
    return run, printed


def answers_in(output: str) -> int:
    """Return how many answers this file of results has, in the order of the prompts and none left out."""
    answers = 0
    with open(output, "rb") as file:
        for line in file:
            found = ANSWER.match(line)
            answers += found is not None and int(found[1]) == answers + 1
    return answers


def steady(output: str) -> float:
    """Return the answers a second between the 20th and the 90th percentile of the results' own ends."""
    waits = ("started", "slot_wait", "limit_wait", "retry_wait", "lost", "latency")
    with open(output, "rb") as file:
        ends = sorted(sum(row[name] for name in waits) for row in map(json.loads, file))
    first, last = len(ends) * 2 // 10, len(ends) * 9 // 10
    return float((last - first) / (ends[last] - ends[first]))


class Server:
    """The server process; it has the last core, unless it is to roam."""

    def __init__(self, *options: str, trust: str | None = None, roam: bool = False) -> None:
        command = [sys.executable, "-m", "benchmarks.server", *options]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT)
        pin(self.process.pid, CORES[-1] if SECOND is not None and not roam else None)
        self.trust, self.one_by_one = trust, threading.Lock()
        self.url = f"http{'s' if trust else ''}://127.0.0.1:{self.line().strip()}/v1"

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline()

    def look(self, slots: int | str = "") -> dict[str, float]:
        """Return what the server has seen since the last look, of so many slots how long they were empty."""
        assert self.process.stdin
        with self.one_by_one:
            self.process.stdin.write(f"{slots}\n")
            self.process.stdin.flush()
            seen: dict[str, float] = json.loads(self.line())
        return seen


class Bench:
    """How much is asked, where the files are, and what has been found out on the way."""

    def __init__(self, scratch: str, quick: bool, requests: int | None = None, end: float = math.inf) -> None:
        self.scratch, self.quick = scratch, quick
        self.end = end  # of the monotonic clock, after which no round is begun but a first one
        self.requests = requests or (4_000 if quick else 8_000)
        self.rounds = 1 if quick else 5
        self.versions: dict[str, str] = {}
        self.warm: dict[tuple[Client, str | None], Run] = {}

    def run(self, client: Client, server: Server, requests: int, concurrency: int, first: int = 0) -> Run:
        """Run a client to its end, on the second core if it has not the first prompts."""
        prompts = os.path.join(self.scratch, f"{first}-{first + requests}.txt")
        output = os.path.join(self.scratch, f"{first}.jsonl")
        if not os.path.exists(prompts):
            with open(prompts, "w") as file:
                file.writelines(f"prompt {number}: why is the sky blue?\n" for number in range(first, first + requests))
        command = [*client.start, server.url, prompts, str(concurrency)]
        if client.backend:
            options = f"-b {client.backend} -m m --overwrite --base-url {server.url}".split()
            options += [] if client.auto else ["-c", str(concurrency)]
            if client.workers:
                options += f"--cluster {client.workers} --worker-backend {client.backend}".split()
                options[1] = "dask-cluster"
            command = [*client.start, prompts, *options, "-o", output]
        server.look()
        run, printed = spawn(command, None if client.workers else SECOND if first else FIRST, server.trust)
        run.requests, run.seen = requests, server.look(concurrency)
        if not run.error:
            told = {} if client.backend else json.loads(printed.splitlines()[-1])
            answers = told.pop("answers", None) or answers_in(output)
            self.versions |= told
            run.error = "" if answers == requests else f"answered {answers:,} of {requests:,}"
            if client.workers and not run.error and requests > 1:
                run.rate = steady(output)
        return run

    def ready(self, client: Client, server: Server) -> Run:
        """Return a run of one request, made once: bytecode is written, and it shows who is not installed."""
        key = (client, server.trust)  # with TLS the certificates are loaded, and checked
        if key not in self.warm:
            runs = [self.run(client, server, 1, 1) for _ in range(1 if self.quick else 2 if client.slow else 3)]
            self.warm[key] = next((run for run in runs if run.error), min(runs, key=lambda run: run.cpu))
        return self.warm[key]

    def turns(
        self, clients: Sequence[Client], server: Server, concurrency: int, rounds: int = 0, requests: int = 0
    ) -> dict[Client, list[Run]]:
        """Let the clients take turns, and return their runs; who fails once is not tried again, and has that one."""
        runs: dict[Client, list[Run]] = {client: [] for client in clients}
        failed = {client: run for client in clients if (run := self.ready(client, server)).error}
        for turn in range(min(rounds or self.rounds, self.rounds)):
            if turn and time.monotonic() > self.end:
                break
            for client in clients:
                if client not in failed:
                    every, one = requests or self.requests, self.ready(client, server)
                    share = max(every // 10, min(2 * concurrency, every)) if client.slow else every
                    run = self.run(client, server, share, concurrency)
                    run.start, run.first = one.cpu, one.seen["asked"] - one.began
                    runs[client].append(run)
                    if run.error:
                        failed[client] = run
        return runs | {client: [run] for client, run in failed.items()}
