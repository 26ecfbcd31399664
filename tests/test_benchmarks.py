"""That the benchmark runs, counts the answers and prints its tables; not what it measures."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.report import Table, cell
from benchmarks.runs import Run, answers_in, steady
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
