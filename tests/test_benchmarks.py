"""That the benchmark runs, counts the answers and prints its tables; not what it measures."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import __main__ as benchmark
from benchmarks import clients, runs, server
from benchmarks.report import Table, cell
from benchmarks.runs import Bench, Run, answers_in, ours, steady
from tests.helpers import ROOT


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="the benchmark needs os.wait4")
def test_tables(tmp_path):
    command = "-m benchmarks --quick --only shards --requests 100 --json figures.json --markdown table.md"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command.split()], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    tables = json.loads((tmp_path / "figures.json").read_text())["tables"]
    [[_, [clock, cpu]]] = tables["shards"]["rows"]
    assert clock["why"] == cpu["why"] == ""  # every answer was there
    assert len(clock["values"]) == 1 and 0 < cpu["values"][0] < 3
    assert "| stdlib, nothing installed" in done.stdout
    assert (tmp_path / "table.md").read_text().strip() == done.stdout.strip()


def test_what_is_not_begun_in_time_is_said(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmarks", "--only", "overhead,tls", "--minutes", "0"])
    benchmark.main()
    assert [line for line in capsys.readouterr().out.splitlines() if "left out" in line] == [
        "overhead: left out, 0 minutes are over. For this table: --only overhead",
        "tls: left out, 0 minutes are over. For this table: --only tls",
    ]


@pytest.mark.parametrize(("auto", "options"), [(False, ["-c", "64"]), (True, [])], ids=["given", "default"])
def test_concurrency_is_given_or_not(monkeypatch, tmp_path, auto, options):
    class Still:
        url, trust = "http://127.0.0.1:1/v1", None

        def look(self, slots=""):
            return {}

    commands = []
    monkeypatch.setattr(runs, "spawn", lambda command, *_: commands.append(command) or (Run(error="not run"), ""))
    Bench(str(tmp_path), quick=True).run(ours("stdlib", auto=auto), Still(), 3, 64)
    [command] = commands
    assert command[command.index(Still.url) + 1 : command.index("-o")] == options


def test_the_server_sends_the_headers_of_a_real_one():
    fields = dict(line.split(": ", 1) for line in server.REPLY.split(b"\r\n\r\n")[0].decode().split("\r\n")[1:])
    assert len(fields) == 15
    assert sum(name.startswith("x-ratelimit-") for name in fields) == 6
    assert int(fields["Content-Length"]) == len(server.BODY)


def test_a_slot_is_empty_from_an_answer_to_the_next_request(monkeypatch):
    monkeypatch.setattr(server, "arrivals", [0.0, 0.1, 1.5, 1.75, 2.5])  # the first two fill the slots
    monkeypatch.setattr(server, "departures", [1.0, 1.5, 2.0, 3.0, 4.0])
    assert server.gaps(2) == {"median": 0.5, "p99": 0.5}
    monkeypatch.setattr(server, "arrivals", [0.0, 0.1])
    assert server.gaps(2) == {}


def test_too_few_open_files_are_the_reason(monkeypatch):
    monkeypatch.setattr(benchmark, "open_files", lambda: 1024)
    cells = benchmark.empty_slots(Bench("", quick=True), 1000, 2)
    whys = {one.why for pair in cells.values() for one in pair}
    assert whys == {"1,000 in flight need 1,100 open files; the hard limit (ulimit -Hn) is 1,024"}
    assert all(len(pair) == 2 for pair in cells.values())


@pytest.mark.parametrize("name", clients.CLIENTS)
def test_who_is_not_installed_is_said_in_one_line(monkeypatch, tmp_path, name):
    package = clients.CLIENTS[name][0]
    monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)
    (tmp_path / "prompts.txt").write_text("prompt 1: why?\n")
    with pytest.raises(SystemExit, match=f"^not installed: pip install {package}$"):
        clients.main(name, "http://127.0.0.1:1/v1", str(tmp_path / "prompts.txt"), "1")


@pytest.mark.parametrize(
    ("spoil", "answers"),
    [
        (lambda lines: lines, 3),
        (lambda lines: [line.replace(": ", ":") for line in lines], 3),
        (lambda lines: [lines[0], lines[2]], 1),
        (lambda lines: [lines[1], lines[0], lines[2]], 1),
        (lambda lines: [*lines[:2], lines[2].rstrip("\n")], 2),
        (lambda lines: [*lines[:2], lines[2].replace('"c"', "null")], 2),
    ],
    ids=["all", "compact", "left out", "out of order", "cut off", "without an answer"],
)
def test_answers(tmp_path, spoil, answers):
    lines = [f'{{"id": {number}, "text": "{text}", "error": null}}\n' for number, text in enumerate("abc", 1)]
    file = tmp_path / "results.jsonl"
    file.write_text("".join(spoil(lines)))
    assert answers_in(str(file)) == answers


def test_the_rate_of_a_cluster_is_that_of_the_middle(tmp_path):
    waits = dict.fromkeys(("slot_wait", "limit_wait", "retry_wait", "lost"), 0.25)
    ends = [100.0, *(200 + number / 5 for number in range(9))]  # five a second, but for a slow start
    lines = [json.dumps({"started": end - 1.5, "latency": 0.5, **waits}) + "\n" for end in reversed(ends)]
    (tmp_path / "results.jsonl").write_text("".join(lines))
    assert steady(str(tmp_path / "results.jsonl")) == pytest.approx(5)


def test_who_fails_has_no_figure():
    good, bad = [Run(2, cpu=3.0), Run(2, cpu=5.0), Run(2, cpu=4.0)], [Run(2, cpu=1.0), Run(2, error="answered 1 of 2")]
    table = Table("Title", ["s", "ratio"])
    table.add("good", cell(good, lambda run: run.cpu, form=".1f", most=4.0), cell(good, lambda run: run.cpu, bad))
    table.add("bad", cell(bad, lambda run: run.cpu), cell(bad, lambda run: run.cpu, good))
    assert str(table).splitlines()[2:] == [
        "|      | s                     | ratio |",
        "| ---- | --------------------- | ----- |",
        "| good | 4.0 (3.0-5.0) ≤ 4.0 ✓ | -     |",
        "",
        "- bad: answered 1 of 2",
    ]
