"""What a request costs, by client, on this machine: the figures of docs/benchmarks.md.

    python -m benchmarks [--quick] [--only NAME,...] [--json FILE] [--markdown FILE] [--svg FILE]

Every run is a process of its own, and CPU time is what the system says it took, user + system. Client and server have
a core each, the server answers at once (unless a table says otherwise), and clients that are compared take turns,
round by round: a ratio is the median of the rounds' ratios, the least and the most stand behind it. A run that did not
answer every prompt gives no figure. `make bench` sets up what is needed.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import date
from pathlib import Path

from .report import Cell, Table, cell, draw
from .runs import CORES, SCRIPT, Bench, Client, Run, Server, clustered, ours, spawn, theirs

BARE = theirs("aiohttp", "bare aiohttp loop", slow=False)
CHUNKS = theirs("aiohttp-chunks", "aiohttp, gather in chunks", slow=False)
SDK = theirs("openai", "openai SDK, gather + semaphore")
STDLIB, STDLIB_FAST, STDLIB_AUTO = ours("stdlib"), ours("stdlib", fast=True), ours("stdlib", fast=True, auto=True)
AIOHTTP, AIOHTTP_FAST = ours("raw-aiohttp"), ours("raw-aiohttp", fast=True)
OPENAI, OPENAI_FAST = ours("openai-sdk"), ours("openai-sdk", fast=True)
PEERS = [
    theirs("lm-deluge", "lm-deluge"),
    theirs("flexllm", "flexllm"),
    theirs("openai-aiohttp", "openai SDK with aiohttp"),
    theirs("async-batch-llm", "async-batch-llm"),
    SDK,
    theirs("langchain", "langchain-openai, abatch"),
    theirs("litellm", "litellm"),
]


def cost(run: Run) -> float:
    """Return the microseconds of CPU time for a request, with its share of the process's start."""
    return run.cpu / run.requests * 1e6


def net(run: Run) -> float:
    """Return the same without the start."""
    return (run.cpu - run.start) / (run.requests - 1) * 1e6


def span(run: Run) -> float:
    """Return the seconds from the first connection to the last answer."""
    return run.seen["answered"] - run.seen["connected"]


def speed(run: Run) -> float:
    return 1 / span(run)


def on_wire(run: Run) -> float:
    """Return the requests a second by the clock."""
    return run.requests / span(run)


def sizes(requests: int) -> str:
    return f"{requests:,} requests, {requests // 10:,} or twice those in flight of slow clients"


def overhead(bench: Bench) -> Table:
    """The whole job against a loop that does nothing else, and the SDK under our tool against the SDK alone."""
    goals = [
        (STDLIB_FAST, BARE, {64: 0.25, 256: 0.20, 1000: 0.17}),
        (STDLIB_AUTO, BARE, {64: 0.28, 256: 0.23, 1000: 0.20}),
        (STDLIB, BARE, {64: 0.42, 256: 0.36, 1000: 0.28}),
        (AIOHTTP, BARE, {64: 1.00, 256: 0.95, 1000: 0.80}),
        (OPENAI, SDK, {64: 0.55, 256: 0.45, 1000: 0.40}),
    ]
    levels = (256,) if bench.quick else (64, 256, 1000)
    with Server() as server:
        clients = [BARE, *(one for one, base, _ in goals if base is BARE), SDK, OPENAI]
        runs = {level: bench.turns(clients, server, level) for level in levels}
    title = f"CPU time of a request, the process's start taken off ({sizes(bench.requests)})"
    table = Table(title, [*(f"{level} in flight" for level in levels), "CPU time to start, s"])
    begun = {client: cell(runs[levels[0]][client][:1], lambda run: run.start) for client in clients}
    for client in (BARE, SDK):
        cells = (cell(runs[level][client], net, form=",.0f") for level in levels)
        table.add(f"{client.name}, µs", *cells, begun[client])
    for one, base, most in goals:
        cells = (cell(runs[level][one], net, runs[level][base], most=most[level]) for level in levels)
        table.add(f"{one.name} / {base.name}", *cells, begun[one])
    return table


def peers(bench: Bench) -> Table:
    """What a user would take instead; to start takes some of them seconds, which are not held against them."""
    clients = [STDLIB_FAST, STDLIB_AUTO, STDLIB, AIOHTTP_FAST, AIOHTTP, BARE, OPENAI_FAST, OPENAI, *PEERS]
    with Server() as server:
        runs = bench.turns(clients, server, 256, 3, bench.requests // 2)
        floor = [wrk(bench, server, 256) for _ in runs[BARE]]
    title = f"A request at 256 in flight, once the process has started ({sizes(bench.requests // 2)})"
    columns = ["CPU time, µs", "/ bare", "/ wrk", "requests/s of a core", "requests/s by the clock"]
    table = Table(title, [*columns, "CPU time to start, s", "first request after, s"])
    for name, mine in [*((client.name, runs[client]) for client in clients), ("wrk", floor)]:
        costs = cell(mine, net, form=",.1f"), cell(mine, net, runs[BARE], ",.2f"), cell(mine, net, floor, ",.1f")
        rates = cell(mine, lambda run: 1e6 / net(run), form=",.0f"), cell(mine, on_wire, form=",.0f")
        begun = cell(mine[:1], lambda run: run.start), cell(mine[:1], lambda run: run.first)
        table.add(name, *costs, *rates, *(begun if mine is not floor else ()))
    return table


def wrk(bench: Bench, server: Server, concurrency: int, seconds: int = 1) -> Run:
    """Run wrk, a load generator in C: about what the system itself takes for a request."""
    script, program = os.path.join(bench.scratch, "wrk.lua"), shutil.which("wrk")
    if not program:
        return Run(error="not installed: wrk")
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "prompt 1: why is the sky blue?"}]})
    Path(script).write_text(f"wrk.method = 'POST'\nwrk.body = '{body}'\n")
    server.look()
    run, printed = spawn([program, "-t1", f"-c{concurrency}", f"-d{seconds}s", "-s", script, server.url])
    found = re.search(r"(\d+) requests in", printed)
    run.requests, run.seen = int(found[1]) if found else 0, server.look(concurrency)
    run.error = "" if run.requests > 1 and "Non-2xx" not in printed else "wrk had no answers"
    return run


def latency(bench: Bench) -> Table:
    """How long a slot is empty between an answer and the request that fills it again, when every answer takes 200 ms.

    The server takes the times. wrk shows what of them is the server's own and the system's.
    """
    levels = {100: 10} if bench.quick else {100: 10, 1000: 5, 5000: 3}
    columns = [f"{level:,}: {point}" for level in levels for point in POINTS]
    table = Table("Latency added when every answer takes 200 ms, in ms, by calls in flight", columns)
    tables = [empty_slots(bench, level, waves) for level, waves in levels.items()]
    for name in tables[0]:
        table.add(name, *(one for cells in tables for one in cells[name]))
    return table


POINTS = {"median": lambda run: run.seen["median"] * 1e3, "p99": lambda run: run.seen["p99"] * 1e3}


def empty_slots(bench: Bench, level: int, waves: int) -> dict[str, list[Cell]]:
    """Return median and 99th percentile of each client with so many calls in flight, so many times over."""
    quick, slow = (BARE, AIOHTTP_FAST, STDLIB_FAST, STDLIB), (SDK, OPENAI_FAST)
    need, most = level + SPARE_FILES, open_files()
    if most < need:
        run = Run(error=f"{level:,} in flight need {need:,} open files; the hard limit (ulimit -Hn) is {most:,}")
        return {name: [cell([run], cost)] * 2 for name in [*(client.name for client in (*quick, *slow)), "wrk"]}
    with Server("--latency", "0.2") as server:
        runs = bench.turns(quick, server, level, 3 if level < 5000 else 1, level * waves)
        runs |= bench.turns(slow, server, level, 3 if level < 1000 else 1, level + 1000)
        floor = [wrk(bench, server, level, 2) for _ in runs[BARE]]
    named = {client.name: mine for client, mine in runs.items()} | {"wrk": floor}
    return {name: [cell(mine, of, form=",.1f") for of in POINTS.values()] for name, mine in named.items()}


SPARE_FILES = 100  # of a process, beside its connections


def open_files() -> int:
    """Raise the limit of open files, which child processes inherit, as far as the system lets us; return it."""
    import resource  # not on Windows

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for more in (hard, 10_240):  # macOS has a lower limit than the one it names
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
            soft = more
            break
    return soft if soft != resource.RLIM_INFINITY else sys.maxsize


def memory(bench: Bench) -> Table:
    """The peak of a run with many prompts, whose results file is in the order of the prompts at the end."""
    few, many = (20_000, 0) if bench.quick else (100_000, 1_000_000)
    title = "Peak memory in MB, 256 in flight, the results in the order of the prompts"
    table = Table(title, [f"{n:,} prompts" for n in (few, many) if n])
    with Server() as server:
        for client, goals in ((STDLIB, {few: 38, many: 38}), (STDLIB_AUTO, {few: 38}), (AIOHTTP, {few: 45})):
            runs = {n: bench.turns([client], server, 256, 1, n)[client] for n in goals if n}
            table.add(client.name, *(cell(runs[n], lambda run: run.peak, (), ".0f", goals[n]) for n in runs))
    return table


def start(bench: Bench) -> Table:
    """How soon the program is there, and the first request on the wire."""
    plain, version = [], []
    first: dict[Client, list[Run]] = {STDLIB: [], STDLIB_FAST: []}
    with Server() as server:
        for _ in range(5 if bench.quick else 15):
            plain.append(spawn([sys.executable, "-c", "import asyncio, json, argparse"])[0])
            version.append(spawn([sys.executable, SCRIPT, "--version"])[0])
            for client, runs in first.items():
                runs.append(bench.run(client, server, 1, 1))
    table = Table("Start", ["ms", "ratio"])
    least, all_of_it = (cell(runs, lambda run: run.cpu * 1e3, form=".0f") for runs in (plain, version))
    table.add("`python -c 'import asyncio, json, argparse'`, CPU time", least)
    table.add("`--version`, CPU time", all_of_it, cell(version, lambda run: run.cpu, plain, most=1.5))
    for client, runs in first.items():
        after = cell(runs, lambda run: (run.seen["asked"] - run.began) * 1e3, (), ".0f", 150)
        table.add(f"until the first request is on the wire, {client.name}", after)
    return table


def stragglers(bench: Bench) -> Table:
    """A sliding window against chunks, where few answers take up to fifty times as long as most."""
    level, prompts = 64, 640 if bench.quick else 2_560
    title = f"Stragglers: latencies of 5 to 250 ms, heavy-tailed ({prompts:,} prompts, {level} in flight)"
    table = Table(title, ["gather in chunks, s", f"{STDLIB.name}, s", "times as fast"])
    for seed in range(1 if bench.quick else 3):
        with Server("--tail", str(seed)) as server:
            runs = bench.turns([STDLIB, CHUNKS], server, level, 1, prompts)
        mine, chunks = runs[STDLIB], runs[CHUNKS]
        table.add(f"seed {seed}", cell(chunks, span), cell(mine, span), cell(mine, speed, chunks, least=3))
    return table


def tls(bench: Bench) -> Table:
    """TLS 1.3 against plain HTTP, and what aiofastnet's transports, which the tool does not use, would save."""
    table = Table(
        f"CPU time of a request over TLS 1.3, 64 in flight, the start taken off ({bench.requests * 2:,} requests)",
        ["µs", "µs without TLS", "TLS / plain", "/ bare over TLS", "/ without aiofastnet"],
    )
    pem = os.path.join(bench.scratch, "certificate.pem")
    try:
        certify(pem)
    except (OSError, subprocess.CalledProcessError) as failure:
        table.add("TLS", cell([Run(error=f"openssl made no certificate: {failure}")], cost))
        return table
    fastnet = {ours("stdlib", fast, fastnet=True): base for fast, base in ((False, STDLIB), (True, STDLIB_FAST))}
    fastnet[ours("raw-aiohttp", fastnet=True)] = AIOHTTP
    clients = [BARE, AIOHTTP, STDLIB, STDLIB_FAST, *fastnet]
    with Server("--tls", pem, trust=pem) as secret, Server() as plain:
        runs, bare = (bench.turns(clients, server, 64, 3, bench.requests * 2) for server in (secret, plain))
    for client in clients:
        mine, without = runs[client], bare[client]
        costs = cell(mine, net, form=",.0f"), cell(without, net, form=",.0f")
        base = [cell(mine, net, runs[fastnet[client]])] if client in fastnet else []
        table.add(client.name, *costs, of_medians(mine, without, net), cell(mine, net, runs[BARE]), *base)
    return table


def certify(pem: str) -> None:
    """Make a certificate for 127.0.0.1 that signs itself, in one file with its key."""
    words = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    also = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", pem, "-out", pem + ".crt"]
    subprocess.run([*words.split(), *also], check=True, capture_output=True)
    with open(pem, "a") as both:
        both.write(Path(pem + ".crt").read_text())


def shards(bench: Bench) -> Table:
    """Two halves of the input in two processes on two cores; by CPU time where the server has no third."""
    half, slower, wholes = bench.requests * 2, [], []
    third = len(CORES) > 2
    with Server(roam=not third) as server, ThreadPoolExecutor(2) as pool:
        for _ in range(min(3, bench.rounds)):
            wholes.append(bench.run(STDLIB, server, 2 * half, 256))
            runs = pool.map(lambda first: bench.run(STDLIB, server, half, 256, first), (0, half))
            slower.append(max(runs, key=lambda run: run.wall if third else run.cpu))
    title = f"Two processes on two cores, times as fast as one ({2 * half:,} prompts)"
    table = Table(title, ["by the clock", "by CPU time"])
    clock = cell(wholes, lambda run: run.wall, slower, least=1.8 if third else None)
    cpu = cell(wholes, lambda run: run.cpu, slower, least=None if third else 1.8)
    table.add(STDLIB.name + ("" if third else " (the server is on the same two cores)"), clock, cpu)
    return table


def cluster(bench: Bench) -> Table:
    """One and two local processes of a Dask cluster once they are all there, with each live backend inside."""
    pairs = {name: (clustered(name, 1), clustered(name, 2)) for name in ("stdlib", "raw-aiohttp", "openai-sdk")}
    title = f"Local processes of a Dask cluster, 128 in flight ({sizes(bench.requests)})"
    columns = ["requests/s", "/ one process", "/ one, of the medians", "CPU time of a request, µs, all processes"]
    table = Table(title, columns)
    if importlib.util.find_spec("distributed") is None:
        table.add("dask-cluster", cell([Run(error="not installed: distributed")], cost))
        return table
    with Server(roam=True) as server:
        runs = bench.turns([client for pair in pairs.values() for client in pair], server, 128, 3)
    for one, two in pairs.values():
        ratios = cell(runs[two], rate, runs[one], least=1.8), of_medians(runs[two], runs[one])
        for client, middle in ((one, [cell([], rate)] * 2), (two, ratios)):
            table.add(client.name, cell(runs[client], rate, form=",.0f"), *middle, cell(runs[client], net, form=",.0f"))
    return table


def rate(run: Run) -> float:
    return run.rate


def of_medians(runs: list[Run], base: list[Run], of: Callable[[Run], float] = rate) -> Cell:
    """Return the ratio of the medians, where each run has the figure."""
    if any(run.error for run in [*runs, *base]):
        return Cell([], ".2f")
    middle, other = (statistics.median(map(of, each)) for each in (runs, base))
    return Cell([middle / other], ".2f")


SECTIONS = {one.__name__: one for one in (overhead, peers, latency, tls, start, shards, cluster, memory, stragglers)}


def machine() -> str:
    """Return the name of the processor, the number of cores and the system."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        name = subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True, stderr=-3).strip()
    return f"{name}, {len(CORES) or os.cpu_count()} cores, {platform.system()}; Python {platform.python_version()}"


def main() -> None:
    """Measure what is asked for, and print it."""
    if not hasattr(os, "wait4"):
        sys.exit("The benchmark needs Linux or macOS: it asks the system for the CPU time of each process (os.wait4).")
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer requests, one round: three minutes, not fifteen")
    parser.add_argument("--only", metavar="NAME,...", default=",".join(SECTIONS), help="default: %(default)s")
    parser.add_argument("--requests", type=int, metavar="N", help="of each run, where a table does not say otherwise")
    parser.add_argument("--minutes", type=float, metavar="N", default=15, help="begin nothing later; default: 15")
    for form in ("json", "markdown", "svg"):
        parser.add_argument(f"--{form}", metavar="FILE", type=Path, help=f"write the figures there as {form}")
    args = parser.parse_args()
    names = args.only.split(",")
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    if len(CORES) < 2:
        print("Client and server are not kept on a core each: there is one only, or no os.sched_setaffinity.\n")
    began, tables, load = time.monotonic(), {}, os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(scratch, args.quick, args.requests, began + 60 * args.minutes)
        for name in names:
            if time.monotonic() > bench.end:
                print(f"{name}: left out, {args.minutes:g} minutes are over. For this table: --only {name}\n")
                continue
            tables[name] = SECTIONS[name](bench)
            print(tables[name], flush=True)
    for name in ("uvloop", "orjson"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            bench.versions[name] = importlib.metadata.version(name)
    versions = ", ".join(f"{name} {version}" for name, version in sorted(bench.versions.items()))
    command = shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])
    loads = f"load {load:.1f} before and {os.getloadavg()[0]:.1f} after"
    facts = f"{machine()}, {loads}; {versions}; {date.today()}; `{command}`"
    facts += f" in {time.monotonic() - began:.0f} s"
    print(facts)
    if args.json:
        everything = {"facts": facts, "tables": {name: asdict(table) for name, table in tables.items()}}
        args.json.write_text(json.dumps(everything, indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text("\n".join([*map(str, tables.values()), facts, ""]))
    if args.svg and "peers" in tables:
        rates = [(name, cells[3].values) for name, cells in tables["peers"].rows if name != "wrk"]
        bars = [(name, statistics.median(values)) for name, values in rates if values]
        args.svg.write_text(draw(bars, f"{machine()}; {date.today()}"))


if __name__ == "__main__":
    main()
