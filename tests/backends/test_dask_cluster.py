"""The dask-cluster backend: whole runs of the script, on its own processes and on a cluster that is started by hand."""

import asyncio
import contextlib
import gzip
import json
import math
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import types

import pytest

import concurrent_prompts
from concurrent_prompts import load_backend, main
from concurrent_prompts.backends import bulk as bulk_file
from tests.helpers import ROOT, SCRIPT, VARIABLES

distributed = pytest.importorskip("distributed")
psutil = pytest.importorskip("psutil")
dask_cluster = pytest.importorskip("concurrent_prompts.backends.dask_cluster")
dask_local = pytest.importorskip("concurrent_prompts.backends.dask_local")
pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="signals, sessions and /proc"),
    pytest.mark.xdist_group("dask"),  # they share clusters
]

KEY = "sk-never-to-be-seen-0123456789"
PROXY = "http://someone:password-0123456789@127.0.0.1:9"
IDLE = {  # Dask looks at itself every 10 and 20 ms
    "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False",
    "DASK_DISTRIBUTED__ADMIN__TICK__INTERVAL": "500ms",
}
MINE = """
import asyncio, contextlib, json, os, signal
from pathlib import Path

HERE = Path(__file__).parent
in_flight = 0


def note(change):
    global in_flight
    in_flight += change
    with open(HERE / "in-flight", "a") as file:
        file.write(f"{os.getpid()} {in_flight}\\n")


def once(name):
    with contextlib.suppress(FileExistsError):
        (HERE / name).touch(exist_ok=False)
        return True


@contextlib.asynccontextmanager
async def connect(base_url, headers, concurrency):
    with contextlib.suppress(FileNotFoundError), open(HERE / f"environment-{os.getpid()}", "wb") as file:
        file.write(Path("/proc/self/environ").read_bytes() + (os.environ.get("HTTPS_PROXY", "")[:20].encode()))

    async def post(path, body):
        asked = json.loads(body)["messages"][-1]["content"] if body else ""
        with open(HERE / "asked", "a") as file:
            file.write(asked + "\\n")
        note(+1)
        try:
            return await answer(asked)
        finally:
            note(-1)

    async def answer(asked):
        await asyncio.sleep(1000 if "has no answer" in asked else 0.005)
        if "fails once" in asked and once("failed"):
            return 500, {}, b"{}"
        if "raises" in asked:
            raise LookupError("a bug")
        if "kills its worker" in asked or ("is killed once" in asked and once("killed")):
            note(-in_flight)
            os.kill(os.getpid(), signal.SIGKILL)
        if "kills the driver" in asked and once("driver"):
            os.kill(os.getppid(), signal.SIGKILL)
        choice = {"message": {"content": "To " + asked}, "finish_reason": "stop"}
        return 200, {}, json.dumps({"choices": [choice]}).encode()

    yield post
"""

BY_HAND = """
import json, os, sys
import distributed.cli.dask_scheduler, distributed.cli.dask_worker

scheduler, *workers = json.loads(sys.argv[1])  # each in a process of its own, all of which have Dask imported
kind, *words = next((worker for worker in workers if not os.fork()), scheduler)
sys.argv = [kind, *words]
getattr(distributed.cli, f"dask_{kind}").main()
"""


def arguments(folder, prompts, *more, cluster="2"):
    """Return the command line for these prompts."""
    path = folder / "p.txt"
    if not path.exists():
        path.write_text("".join(f"{prompt}\n" for prompt in prompts))
    return [str(path), "-b", "dask-cluster", "--cluster", cluster, *more]


def launch(folder, prompts, *more, path=None, start=(SCRIPT,), **options):
    """Start a run in a session of its own."""
    environment = {name: text for name, text in os.environ.items() if name not in VARIABLES.split()}
    environment |= IDLE | {"OPENAI_API_KEY": KEY, "PYTHONPATH": str(path or folder), "HTTPS_PROXY": PROXY}
    environment["TMPDIR"] = str(folder / "tmp")
    (folder / "tmp").mkdir(exist_ok=True)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0}
    words = [sys.executable, *start, *arguments(folder, prompts, *more, **options)]
    return subprocess.Popen(words, env=environment, cwd=folder, start_new_session=True, **pipes)


def kill(process):
    """End a run's session, if the test has not seen it end."""
    if process.returncode is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def start():
    """Return a function that starts a run in a session of its own, which ends with the test."""
    with contextlib.ExitStack() as stack:

        def start(*given, **options):
            process = launch(*given, **options)
            stack.callback(kill, process)
            return process

        yield start


def finish(process, timeout=50):
    """Return a run's exit status and output, when nothing is left of its session."""
    out, err = (text.decode() for text in process.communicate(timeout=timeout))
    check(out, err)
    left = [one for one in psutil.process_iter() if session(one) == process.pid]
    _, alive = psutil.wait_procs(left, 10)
    assert not alive
    return process.returncode, out, err


def check(out, err):
    """No run shows a traceback or a key."""
    assert "Traceback" not in err and "distributed." not in err and KEY not in out + err, err


@pytest.fixture
def ask(tmp_path, monkeypatch, capfd):
    """Return a function that does a run in this process, which is quick where the workers are there already."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def ask(*given, folder=tmp_path, **options):
        status = main(arguments(folder, *given, **options))
        out, err = capfd.readouterr()
        check(out, err)
        return status, out, err

    return ask


def session(process):
    with contextlib.suppress(OSError):
        return os.getsid(process.pid)


def rows(folder, name="p.results.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def questions(count):
    return [f"question {number}" for number in range(count)]


def own(folder):
    """Return the arguments for a backend of somebody else's, which needs no server."""
    (folder / "mine.py").write_text(MINE)
    return "--worker-backend", "mine:connect", "--base-url", "http://127.0.0.1:1/v1"


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Return these arguments, with the backend where this process finds it."""
    monkeypatch.syspath_prepend(tmp_path)
    yield own(tmp_path)
    sys.modules.pop("mine", None)


@pytest.fixture(scope="module", autouse=True)
def begun(tmp_path_factory):
    """Begin the runs on local processes that nobody has to watch, all at once; return their folders and processes."""
    runs = {}
    with contextlib.ExitStack() as stack:

        def begin(name, prompts, **options):
            folder = tmp_path_factory.mktemp("run")
            runs[name] = folder, launch(folder, prompts, *own(folder), "-c", "32", **options)
            stack.callback(kill, runs[name][1])

        begin("deaths", DEATHS)
        begin("driver", [*questions(700), "this kills the driver", *questions(300)], cluster="1")
        begin("hangs", ["this has one", *(f"{question} has no answer" for question in questions(100))], cluster="1")
        yield runs


@pytest.fixture(scope="module")
def clusters(tmp_path_factory):
    """Return a function that starts a scheduler and workers by hand, where no copy of ours can be imported."""
    processes = []

    def make(workers):
        """Return the address, the scheduler's process and the folder."""
        place = tmp_path_factory.mktemp("cluster")
        file = str(place / "scheduler.json")
        quiet = "--host", "127.0.0.1", "--no-dashboard", "--dashboard-address", "127.0.0.1:0", "--scheduler-file", file
        worker = "worker", *quiet, "--nthreads", "1", "--no-nanny"
        shown = {name: text for name, text in os.environ.items() if "KEY" not in name and name != "PYTHONPATH"}
        parts = [("scheduler", *quiet, "--port", "0"), *[worker] * workers]
        with open(place / "log", "w") as log:
            scheduler = subprocess.Popen(
                [sys.executable, "-c", BY_HAND, json.dumps(parts)], cwd=place, stdout=log, stderr=log, env=shown | IDLE,
                start_new_session=True,
            )  # fmt: skip
        processes.append(scheduler)
        with distributed.Client(scheduler_file=file, timeout=30, set_as_default=False) as client:
            client.wait_for_workers(workers, timeout=30) if workers else None
            return client.scheduler.address, scheduler, place

    yield make
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


@pytest.fixture
def cluster(clusters):
    """Return the cluster that is there for all, or another one if its scheduler has ended."""
    if not SHARED or SHARED[-1][1].poll() is not None:
        SHARED.append(clusters(2))
    return SHARED[-1]


SHARED = []
DEATHS = questions(1000)
DEATHS[100] = "this one raises"
DEATHS[300] += " is killed once"
DEATHS[500] += " fails once"
DEATHS[900] += " kills its worker"


def test_limits_that_are_told_are_for_all_workers_together(ask, stand_in, cluster):
    server = stand_in(rpm=3600, burst=0.003, no_limit_headers=True)
    status, _, err = ask(questions(40), "--base-url", server.url, "--rpm", "3200", cluster=cluster[0])
    assert status == 0 and "3,200 requests/min, as given" in err
    assert server.stats.rejected <= 2 and server.stats.seconds > 0.6


def test_a_schema_goes_with_the_calls_and_what_is_there_starts_no_processes(ask, stand_in, cluster, tmp_path):
    server = stand_in()
    (tmp_path / "s.json").write_text('{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}')
    more = ["--schema", str(tmp_path / "s.json"), "--max-cost", "1", "--price", "1,2", "-p", "max_tokens=99"]
    status, _, err = ask(questions(20), "--base-url", server.url, *more, cluster=cluster[0])
    assert status == 0 and "20 answered" in err, err
    assert all(isinstance(json.loads(row["text"])["n"], int) for row in rows(tmp_path))
    asked = server.stats.requests
    status, _, err = ask([], "--base-url", server.url, *more)
    assert status == 0 and "20 answers of an earlier run kept" in err and server.stats.requests == asked


def crew(address="tcp://127.0.0.1:1", **settings):
    api = load_backend("dask-cluster", base_url="http://127.0.0.1:1/v1", **settings)
    job = bulk_file.Job(concurrent_prompts.Run(api), api, [], lambda result: None)
    return dask_cluster.Crew(job, None, address, None)


def test_limits_that_are_learned_are_shared(monkeypatch):
    clock = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr(dask_cluster, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    ours, most, left = crew(), 100.0, 10.0  # calls a second that the server lets through, and those it has left
    links = [dask_cluster.Link(f"{number}", f"{number}") for number in range(3)]
    ours._links, ours._began = {link.address: link for link in links}, clock.now
    calls, refusals, credit = 0, 0, [0.0, 0.0, 0.0]
    for step in range(3000):
        clock.now += 0.02
        left = min(10.0, left + most * 0.02)
        for number, link in enumerate(links):
            rate = ours._rate(link, links, 0, "rpm")
            credit[number] = min(5.0, credit[number] + 0.02 * rate[0]) if rate else 20.0
            sent = int(credit[number])
            credit[number] -= sent
            let_in = min(sent, int(left))
            left -= let_in
            before, (_, _, spent, refused) = link.facts, link.facts.get("quotas", [("", math.inf, 0.0, 0)])[0]
            refused += sent - let_in
            quota = ("from rejections" if refused else "", math.inf, spent + let_in, refused)
            facts = {"sent": before.get("sent", 0) + sent, "quotas": [quota, ("", math.inf, 0.0, 0)]}
            ours._learn_limits(facts, before)
            link.facts = facts
            if step > 1500:
                calls, refusals = calls + sent, refusals + sent - let_in
    assert 0.5 * most < calls / 30 < 1.2 * most and refusals < 0.1 * calls
    assert "requests/min, from rejections" in str(ours._job.limiter.requests)


def test_local_processes_do_the_main_job_and_deaths_and_bugs_cost_their_own_rows_only(begun):
    folder, process = begun["deaths"]
    status, _, err = finish(process)
    assert status == 1 and "998 answered" in err and "is lost" in err
    assert [row["id"] for row in rows(folder)] == list(range(1, 1001))
    again = rows(folder)[500]
    assert again["text"] and len(again.get("tries", "1")) == 1  # a worker that dies takes the first attempt with it
    failed = {row["id"]: row["error"]["type"] for row in rows(folder) if row["error"]}
    assert failed == {101: "LookupError", 901: "killed_worker"}
    assert [row["text"] for row in rows(folder) if not row["error"]] == [
        f"To {prompt}" for number, prompt in enumerate(DEATHS, 1) if number not in failed
    ]
    asked = (folder / "asked").read_text().splitlines()
    assert 1000 < len([one for one in asked if one]) <= 1000 + 300  # what was on the workers, and not yet told
    assert 8 < most_in_flight(folder) <= 32  # on both together
    (folder / f"environment-{process.pid}").unlink(missing_ok=True)  # the driver's own
    environments = [path.read_bytes() for path in folder.glob("environment-*")]
    assert len(environments) > 2 or sys.platform != "linux"
    for environment in environments:  # also of those that were started again
        environment, _, told = environment.rpartition(b"\0")
        assert b"OPENAI" not in environment and b"0123456789" not in environment and b"PYTHONSAFEPATH=1" in environment
        assert told == PROXY[:20].encode()  # it came with the key, and is in the process's memory alone


def most_in_flight(folder):
    """Return how many calls there were at once, in all processes."""
    now, most = {}, 0
    for line in (folder / "in-flight").read_text().splitlines():
        process, now[process] = line.split()[0], int(line.split()[1])
        most = max(most, sum(now.values()))
    return most


async def opens(address, security=None, timeout=0.5):
    """Tell whether a Dask node answers who comes with these credentials, or with none."""
    arguments = security.get_connection_args("client") if security else {}
    try:
        async with asyncio.timeout(timeout + 5):
            comm = await distributed.core.connect(address, timeout=timeout, **arguments)
    except OSError:  # a time-out is one, too
        return False
    comm.abort()
    return True


def got(port, path):
    """Return the answer to an HTTP request in clear, or b"" where there is none."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        return b"".join(iter(lambda: connection.recv(65536), b""))
    return b""


PATHS = "/", "/status", "/health", "/metrics", "/json/counts.json", "/info/main/workers.html", "/api/v1/get_workers"


async def test_local_processes_let_nobody_in_show_nothing_and_drain(start, tmp_path, stand_in, set_traps, cluster):
    server, sprung = stand_in(latency=0.3, require_key=KEY), set_traps(tmp_path)
    more = "--base-url", server.url, "-o", "-", "-c", "20", "--max-attempts", "1"
    process = start(tmp_path, questions(5000), *more, path=ROOT, start=("-m", "concurrent_prompts"))
    first = process.stdout.readline()
    driver = psutil.Process(process.pid)
    workers = driver.children(recursive=True)
    sockets = [one for part in (driver, *workers) for one in part.net_connections("inet")]
    ports = {one.laddr.port for one in sockets if one.status == psutil.CONN_LISTEN}
    assert {one.laddr.ip for one in sockets if one.status == psutil.CONN_LISTEN} == {"127.0.0.1"}
    assert len(ports) == 8  # scheduler and workers for Dask and for HTTP, and two nannies
    told = {port: [got(port, path)[:12] for path in PATHS] for port in ports}
    assert sorted(told.values()) == [[b""] * len(PATHS)] * 5 + [[b"HTTP/1.1 404"] * len(PATHS)] * 3
    ports = [port for port in ports if not any(told[port])]
    others = distributed.Security.temporary()
    tried = [opens(f"tcp://127.0.0.1:{port}") for port in ports]
    tried += [opens(f"tls://127.0.0.1:{port}", others) for port in ports]
    assert await asyncio.gather(opens(cluster[0], timeout=10), *tried) == [True] + [False] * 10
    for child in workers if sys.platform == "linux" else ():
        environment = pathlib.Path(f"/proc/{child.pid}/environ").read_bytes()
        assert KEY.encode() not in environment and PROXY.encode() not in environment
    assert {path.stat().st_mode & 0o77 for path in (tmp_path / "tmp").iterdir()} == {0}
    os.killpg(process.pid, signal.SIGINT)
    status, out, err = finish(process)
    assert not sprung.exists() and not list((tmp_path / "tmp").iterdir())
    lines = [json.loads(line) for line in [first, *out.splitlines()]]
    assert status == 130 and "interrupted" in err
    assert len({line["id"] for line in lines}) == len(lines) == server.stats.answered < 1000
    assert server.stats.max_in_flight <= 20
    assert not any(line["error"] for line in lines)


def test_a_second_ctrl_c_ends_at_once(begun):
    folder, process = begun["hangs"]
    while not (folder / "p.results.jsonl").exists() or not rows(folder):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    while b"interrupt again" not in process.stderr.readline():
        pass
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    assert finish(process)[0] == 130 and time.monotonic() - began < 5


def test_a_driver_that_is_killed_is_resumed(begun, ask, cluster, stand_in):
    folder, process = begun["driver"]
    assert finish(process)[0] == -signal.SIGKILL
    kept = len((folder / "p.results.jsonl").read_bytes().splitlines())
    status, _, err = ask([], "--base-url", stand_in().url, cluster=cluster[0], folder=folder)
    assert status == 0 and 0 < kept < 1001 and f"{kept:,} answers of an earlier run kept" in err
    assert [row["id"] for row in rows(folder)] == list(range(1, 1002))
    assert sum(row["text"].startswith("To ") for row in rows(folder)) == kept
    assert all(row["text"] for row in rows(folder))


def test_a_cluster_started_by_hand_gets_all_that_it_needs_and_shows_no_key(start, tmp_path, stand_in, cluster):
    address, _, place = cluster
    server = stand_in(latency=0.2, require_key=KEY)
    process = start(tmp_path, questions(400), "--base-url", server.url, "-o", "-", "-c", "40", cluster=address)
    first = process.stdout.readline()
    with distributed.Client(address, set_as_default=False) as client:
        client.dump_cluster_state(str(tmp_path / "dump"))
        workers = client.run(os.getpid).values()
        logs = repr([client.get_scheduler_logs(), client.get_worker_logs(), client.get_events()])
        assert len(client.processing()) == 2 and all(client.processing().values())  # none of them looks idle
    shown = gzip.decompress((tmp_path / "dump.msgpack.gz").read_bytes()) + logs.encode()
    shown += b"".join(pathlib.Path(f"/proc/{pid}/environ").read_bytes() for pid in workers if sys.platform == "linux")
    status, out, _ = finish(process)
    shown += b"".join(file.read_bytes() for file in place.rglob("*") if file.is_file())
    assert status == 0 and len(out.splitlines()) == 399 and json.loads(first)["text"]
    assert b"concurrent_prompts" in shown and KEY.encode() not in shown


def test_workers_are_told_apart_by_name_where_they_lack_something(ask, mine, cluster):
    status, _, err = ask(questions(5), *mine, cluster=cluster[0])
    assert status == 2 and "there is no module mine" in err and "the worker tcp://127.0.0.1:" in err


def test_a_worker_with_an_older_python_says_so(monkeypatch):
    box = {"cargo": b"", "engine": ""}
    exec(dask_cluster.BOOT, box)
    assert "Error" in box["report"]  # it never raises: Dask would log what it was given
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    exec(dask_cluster.BOOT, box)
    assert box["report"] == "it runs Python 3.9, and 3.11 or newer is needed"


@pytest.mark.parametrize(
    ("address", "allowed", "said"),
    [
        ("tcp://127.0.0.1:8786", False, ""),
        ("tls://203.0.114.1:8786", False, ""),
        ("tcp://10.1.2.3:8786", False, "the key goes to 10.1.2.3 unencrypted"),
        ("203.0.114.1:8786", True, "the key goes to 203.0.114.1 unencrypted"),
        ("tcp://203.0.114.1:8786", False, None),
    ],
)
def test_the_key_crosses_no_open_network_unencrypted(monkeypatch, caplog, address, allowed, said):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    ours = crew(address, allow_http=allowed)
    dask_local.WARNED.clear()
    with pytest.raises(ValueError, match="would go to 203") if said is None else contextlib.nullcontext():
        dask_local.check_network(ours._job, address)
    assert (said or "") in caplog.text and bool(said) == bool(caplog.text)


def test_a_secret_under_another_name_crosses_no_open_network_either(monkeypatch):
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Subscription: 0123456789abcdef")
    with pytest.raises(ValueError, match="would go to 203"):
        dask_local.check_network(crew()._job, "tcp://203.0.114.1:8786")


def test_a_local_cluster_without_cryptography_is_refused(here, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cryptography", None)
    base = "--base-url", "http://127.0.0.1:1/v1"
    assert concurrent_prompts.main(["prompts.txt", "-b", "dask-cluster", "-q", *base]) == 2
    assert "a cluster on this machine needs cryptography: pip install cryptography" in capsys.readouterr().err


def test_nobody_there_or_nobody_left_is_one_sentence(ask, tmp_path, mine, monkeypatch, clusters):
    monkeypatch.setattr(dask_local, "CONNECTING", 1.0)
    monkeypatch.setattr(dask_cluster.Crew, "START", 0.2)
    monkeypatch.setattr(dask_cluster.Crew, "RETURN", 0.2)
    address, _, place = clusters(1)
    (place / "mine.py").write_text(MINE)
    prompts = questions(200)
    prompts[150] += " kills its worker"
    expected = [
        (address, 3, "has no workers any longer"),
        (address, 3, "has no workers"),
        ("127.0.0.1:1", 3, "no scheduler answers at"),
        ("foo://x:1", 2, "--cluster foo://x:1"),
        ("0", 2, "--cluster 0"),
    ]
    for number, (cluster, status, said) in enumerate(expected):
        found, _, err = ask(prompts, *mine, "-c", "4", "-o", str(tmp_path / f"{number}.jsonl"), cluster=cluster)
        assert (found, said in err) == (status, True), err
    kept = rows(tmp_path, "0.jsonl")
    assert 0 < len(kept) < 200 and not any(row["error"] for row in kept)


def test_a_lost_scheduler_ends_the_run_and_loses_nothing(start, tmp_path, stand_in, cluster):
    address, scheduler, _ = cluster
    server = stand_in(latency=0.1)
    process = start(tmp_path, questions(500), "--base-url", server.url, "-o", "-", "-c", "4", cluster=address)
    first = process.stdout.readline()
    scheduler.kill()
    status, _, err = finish(process)
    said = " ".join(err.split())  # the report is wrapped
    assert status == 3 and first and "the scheduler at" in said and "is gone (" in said, err
