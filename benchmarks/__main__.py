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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import date
from pathlib import Path

from .report import Cell, Table, cell, draw
from .runs import CORES, SCRIPT, Bench, Client, Run, Server, clustered, ours, spawn, theirs

BARE = theirs("aiohttp", "bare aiohttp loop", slow=False)
CHUNKS = theirs("aiohttp-chunks", "aiohttp, gather in chunks", slow=False)
SDK = theirs("openai", "openai SDK")
STDLIB, STDLIB_FAST = ours("stdlib"), ours("stdlib", fast=True)
AIOHTTP, AIOHTTP_FAST = ours("raw-aiohttp"), ours("raw-aiohttp", fast=True)
OPENAI, OPENAI_FAST = ours("openai-sdk"), ours("openai-sdk", fast=True)
PEERS = [
    theirs("flexllm", "flexllm"),
    theirs("openai-aiohttp", "openai SDK with aiohttp"),
    theirs("async-batch-llm", "async-batch-llm"),
    SDK,
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


def sizes(requests: int) -> str:
    return f"{requests:,} requests, {requests // 10:,} of slow clients"


def overhead(bench: Bench) -> Table:
    """The whole job against a loop that does nothing else, and the SDK under our tool against the SDK alone."""
    goals = [
        (AIOHTTP, BARE, {64: 1.05, 256: 1.05, 1000: 0.95}),
        (STDLIB, BARE, {64: 0.45, 256: 0.40, 1000: 0.30}),
        (STDLIB_FAST, BARE, {64: 0.17, 256: 0.17, 1000: 0.17}),
        (OPENAI, SDK, {64: 0.65, 256: 0.40, 1000: 0.20}),
    ]
    levels = (256,) if bench.quick else (64, 256, 1000)
    with Server() as server:
        clients = [BARE, AIOHTTP, STDLIB, STDLIB_FAST, SDK, OPENAI]
        runs = {level: bench.turns(clients, server, level) for level in levels}
    title = f"CPU time of a request, the process's start included ({sizes(bench.requests)})"
    table = Table(title, [f"{level} in flight" for level in levels])
    for client in (BARE, SDK):
        table.add(f"{client.name}, µs", *(cell(runs[level][client], cost, form=",.0f") for level in levels))
    for one, base, most in goals:
        cells = (cell(runs[level][one], cost, runs[level][base], most=most[level]) for level in levels)
        table.add(f"{one.name} / {base.name}", *cells)
    return table


def peers(bench: Bench) -> Table:
    """What a user would take instead; to start takes some of them seconds, which are not held against them."""
    clients = [STDLIB_FAST, STDLIB, AIOHTTP_FAST, AIOHTTP, BARE, OPENAI_FAST, OPENAI, *PEERS]
    with Server() as server:
        runs = bench.turns(clients, server, 256, 3, bench.requests // 2)
        floor = [wrk(bench, server, 256) for _ in runs[BARE]]
    title = f"CPU time of a request at 256 in flight, once the process has started ({sizes(bench.requests // 2)})"
    table = Table(title, ["µs", "requests/s of a core", "/ bare", "/ wrk", "CPU time to start, s"])
    for name, mine in [*((client.name, runs[client]) for client in clients), ("wrk", floor)]:
        rate, begun = cell(mine, lambda run: 1e6 / net(run), form=",.0f"), cell(mine[:1], lambda run: run.start)
        ratios = cell(mine, net, runs[BARE], ",.2f"), cell(mine, net, floor, ",.1f")
        table.add(name, cell(mine, net, form=",.1f"), rate, *ratios, begun)
    return table


def wrk(bench: Bench, server: Server, concurrency: int) -> Run:
    """Run wrk, a load generator in C: about what the system itself takes for a request."""
    script, program = os.path.join(bench.scratch, "wrk.lua"), shutil.which("wrk")
    if not program:
        return Run(error="not installed: wrk")
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "prompt 1: why is the sky blue?"}]})
    Path(script).write_text(f"wrk.method = 'POST'\nwrk.body = '{body}'\n")
    run, printed = spawn([program, "-t1", f"-c{concurrency}", "-d1s", "-s", script, server.url])
    found = re.search(r"(\d+) requests in", printed)
    run.requests = int(found[1]) if found else 0
    run.error = "" if run.requests > 1 and "Non-2xx" not in printed else "wrk had no answers"
    return run


def efficiency(bench: Bench) -> Table:
    """What the wire is used for when every answer takes 200 ms."""
    level, waves, latency = 1000, 5 if bench.quick else 10, 0.2
    goals = {STDLIB_FAST: 0.96, STDLIB: 0.93, AIOHTTP: None, BARE: None}
    with Server("--latency", str(latency)) as server:
        runs = bench.turns(list(goals), server, level, 3, level * waves)
    title = f"When every answer takes 200 ms, connecting included ({level * waves:,} prompts, {level:,} in flight)"
    table = Table(title, ["share of the ideal", "times as fast as bare"])
    for client, goal in goals.items():
        share = cell(runs[client], lambda run: waves * latency / span(run), form=".3f", least=goal)
        table.add(client.name, share, cell(runs[client], speed, runs[BARE], least=1.0 if client is AIOHTTP else None))
    return table


def memory(bench: Bench) -> Table:
    """The peak of a run with many prompts, whose results file is in the order of the prompts at the end."""
    prompts = (20_000,) if bench.quick else (100_000, 1_000_000)
    title = "Peak memory in MB, 256 in flight, the results in the order of the prompts"
    table = Table(title, [f"{n:,} prompts" for n in prompts])
    with Server() as server:
        for client, goal in ((STDLIB, 40), (AIOHTTP, 56)):
            runs = {n: bench.turns([client], server, 256, 1, n)[client] for n in prompts}
            table.add(client.name, *(cell(runs[n], lambda run: run.peak, (), ".0f", goal) for n in prompts))
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
    """The same ratios over TLS 1.3."""
    requests = bench.requests // 2
    table = Table(f"CPU time of a request over TLS 1.3, 256 in flight ({requests:,} requests)", ["µs", "/ bare"])
    pem = os.path.join(bench.scratch, "certificate.pem")
    words = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    also = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", pem, "-out", pem + ".crt"]
    try:
        subprocess.run([*words.split(), *also], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as failure:
        table.add("TLS", cell([Run(error=f"openssl made no certificate: {failure}")], cost))
        return table
    with open(pem, "a") as both:
        both.write(Path(pem + ".crt").read_text())
    clients = [BARE, AIOHTTP, STDLIB, STDLIB_FAST]
    with Server("--tls", pem, trust=pem) as server:
        runs = bench.turns(clients, server, 256, 3, requests)
    for client in clients:
        table.add(client.name, cell(runs[client], cost, form=",.0f"), cell(runs[client], cost, runs[BARE]))
    return table


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
        runs = bench.turns([client for pair in pairs.values() for client in pair], server, 128)
    for one, two in pairs.values():
        ratios = cell(runs[two], rate, runs[one], least=1.8), of_medians(runs[two], runs[one])
        for client, middle in ((one, [cell([], rate)] * 2), (two, ratios)):
            table.add(client.name, cell(runs[client], rate, form=",.0f"), *middle, cell(runs[client], net, form=",.0f"))
    return table


def rate(run: Run) -> float:
    return run.rate


def of_medians(runs: list[Run], base: list[Run]) -> Cell:
    """Return the ratio of the median rates, where each run has one."""
    if any(run.error for run in [*runs, *base]):
        return Cell([], ".2f")
    middle, other = (statistics.median(map(rate, each)) for each in (runs, base))
    return Cell([middle / other], ".2f")


SECTIONS = {one.__name__: one for one in (overhead, peers, efficiency, memory, start, stragglers, tls, shards, cluster)}


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
    parser.add_argument("--quick", action="store_true", help="fewer requests, one round: one minute instead of ten")
    parser.add_argument("--only", metavar="NAME,...", default=",".join(SECTIONS), help="default: %(default)s")
    parser.add_argument("--requests", type=int, metavar="N", help="of each run, where a table does not say otherwise")
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
        bench = Bench(scratch, args.quick, args.requests)
        for name in names:
            tables[name] = SECTIONS[name](bench)
            print(tables[name], flush=True)
    for name in ("uvloop", "orjson"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            bench.versions[name] = importlib.metadata.version(name)
    versions = ", ".join(f"{name} {version}" for name, version in sorted(bench.versions.items()))
    command = shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])
    facts = f"{machine()}, load {load:.1f} before; {versions}; {date.today()}; `{command}`"
    facts += f" in {time.monotonic() - began:.0f} s"
    print(facts)
    if args.json:
        everything = {"facts": facts, "tables": {name: asdict(table) for name, table in tables.items()}}
        args.json.write_text(json.dumps(everything, indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text("\n".join([*map(str, tables.values()), facts, ""]))
    if args.svg and "peers" in tables:
        rates = [(name, cells[1].values) for name, cells in tables["peers"].rows if name != "wrk"]
        bars = [(name, statistics.median(values)) for name, values in rates if values]
        args.svg.write_text(draw(bars, f"{machine()}; {date.today()}"))


if __name__ == "__main__":
    main()
