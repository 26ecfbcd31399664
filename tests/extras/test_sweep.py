"""Sweeps: --compare over several numbers of calls in flight, and where the knee is."""

import json
import pathlib
import re
import sys
import types

import pytest

from concurrent_prompts import Ran, main
from concurrent_prompts.extras import compare, sweep
from tests.helpers import Terminal


def test_a_sweep_measures_each_number(here, stand_in, capsys):
    pathlib.Path("prompts.txt").write_text("".join(f"prompt {number}\n" for number in range(40)))
    server = stand_in(latency=0.02, knee=4)
    arguments = ["prompts.txt", "--compare", "-b", "stdlib", "-c", "1,4,30,auto", "--base-url", server.url]
    assert main([*arguments, "--report", "r.json", "-q"]) == 0
    out = capsys.readouterr().out
    header, *lines = out.splitlines()[:5]
    assert header.split()[:2] == ["backend", "-c"]
    assert [line.split()[1] for line in lines] == ["1", "4", "30", "auto"]
    words = " ".join(out.split())
    told = json.loads(pathlib.Path("r.json").read_text())
    assert " ".join(told["verdicts"]) in words and re.search(r"stdlib: (the knee is at \d+|no knee yet)", words)
    assert [(run["concurrency"], run["answered"]) for run in told["runs"]] == [(1, 40), (4, 40), (30, 40), ("auto", 40)]
    assert max(run["most_in_flight"] for run in told["runs"][:3]) == 30 == told["runs"][2]["most_in_flight"]


def measured(*runs):
    """Return what runs of so many calls in flight, each with its answers a second and its median, come to."""
    for calls, answers, median in runs:
        tally = types.SimpleNamespace(answered=answers, wall=1.0, percentiles=lambda median=median: {"p50": median})
        run = types.SimpleNamespace(most_in_flight=calls)
        yield Ran(types.SimpleNamespace(name="stdlib"), run, calls, tally)


def test_the_knee_is_the_fewest_calls_that_bring_nine_tenths():
    found = [*sweep.verdicts([*measured((30, 200, 0.15), (1, 50, 0.02), (4, 190, 0.02), (3, 140, 0.02))])]
    assert found == [
        "stdlib: the knee is at 4 in flight: 190.0 answers/s at 4 in flight, 3.8 times those at 1, "
        "and 95% of the highest rate.",
        "Half of its answers take up to 20.0 ms; with 30 in flight, up to 0.15 s.",
    ]
    found = [*sweep.verdicts([*measured((1, 50, 0.02), (4, 170, 0.02), (30, 200, 0.15))])]
    assert found == [
        "stdlib: no knee yet: 200.0 answers/s at 30 in flight, 4.0 times those at 1; "
        "more calls in flight may be faster."
    ]


def test_a_sweep_of_too_few_prompts_says_so(here, stand_in, capsys):
    assert main(["prompts.txt", "--compare", "-c", "1,2,50", "--base-url", stand_in(latency=0.01).url, "-q"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "no more than 3 were ever in flight; to reach 50, use more prompts." in words


def summed_up(name):
    spread = {"p50": 0.4, "p90": 0.5, "p99": None}
    tally = types.SimpleNamespace(answered=9, wall=1.0, latency=4.0, cpu=0.01, failed=0, percentiles=lambda: spread)
    return Ran(types.SimpleNamespace(name=name), types.SimpleNamespace(most_in_flight=9), "auto", tally)


@pytest.mark.parametrize(("columns", "gone"), [
    (80, []), (79, []), (72, ["p99 ms"]), (60, ["p99 ms", "CPU ms"]), (40, ["p99 ms", "CPU ms", "p90 ms", "sum s"]),
])  # fmt: skip
def test_a_narrow_terminal_gets_fewer_figures(columns, gone):
    header, line = compare.table([summed_up("stdlib")], columns)
    assert len(header) == len(line) <= columns or columns == 40
    assert [name for name in compare.RARE if name not in header] == gone
    assert {"backend", "req/s", "failed"} <= {*header.split()}


def test_a_dry_run_and_a_comparison_fit_the_terminal(here, stand_in, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    for option in ("--dry-run", "--compare"):
        monkeypatch.setattr("sys.stdout", Terminal())
        assert main(["prompts.txt", option, "-b", "stdlib", "--base-url", stand_in().url, "-q"]) == 0
        lines = sys.stdout.buffer.getvalue().decode().splitlines()
        assert len(lines) > 5 and max(map(len, lines)) <= 60
