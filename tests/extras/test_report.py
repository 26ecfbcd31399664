"""--report: all that is said of a run, in numbers."""

import json
import pathlib
import re
import sys

import pytest

from concurrent_prompts import main
from tests.helpers import ROOT


def test_the_report_in_numbers(here, stand_in, capsys):
    server = stand_in(latency=0.01, fault={"500": 1.0}, rpm=60000, seed=1)
    arguments = ["prompts.txt", "--base-url", f"{server.url}?api-key=hush-hush-hush", "--max-attempts", "2"]
    assert main([*arguments, "--report", "r.json"]) == 1
    offer = "3 of 3 failures may be temporary. Retry them with:\n    the same command again, with --retry-failed\n"
    assert offer in capsys.readouterr().err
    text = pathlib.Path("r.json").read_text()
    told = json.loads(text)
    assert "hush" not in text and told["command"][:3] == ["prompts.txt", "--base-url", server.url]
    assert (told["report"], told["exit_status"], told["stopped"], told["input"]) == (1, 1, None, "prompts.txt")
    assert told["results"] == "prompts.results.jsonl" and told["python"] == sys.version.split()[0]
    (run,) = told["runs"]
    (error,) = run["errors"]
    assert (error["type"], error["count"], error["status"], error["retryable"]) == ("server_error", 3, 500, True)
    assert (run["answered"], run["failed"], run["attempts"], run["latency_counts"]) == (0, 3, 6, [])
    assert run["limits_a_minute"]["requests"] == pytest.approx(60000, rel=0.01) and run["waited_seconds"]["lost"] > 0.02
    server.options.fault["500"] = 0.0
    assert main([*arguments, "--report", "r.json", "--retry-failed"]) == 0
    (run,) = json.loads(pathlib.Path("r.json").read_text())["runs"]
    assert sum(count for _, count in run["latency_counts"]) == run["answered"] == 3 and run["tokens"]["out"] > 0
    spent = run["tokens"]["in"] * 0.10 + run["tokens"]["out"] * 0.50
    assert run["cost_usd"] == pytest.approx(spent / 1e6)


def test_the_page_names_all_that_a_report_holds(here, stand_in, capsys):
    part = (ROOT / "docs" / "results.md").read_text("utf-8").partition("## The report for programs")[2]
    described = set(re.findall(r"`([a-z_0-9]+)`", part))
    url = stand_in(latency=0.01, fault={"500": 0.5}).url
    assert main(["prompts.txt", "--base-url", url, "--report", "a.json", "--max-attempts", "1", "--max-cost", "1"]) <= 1
    assert main(["prompts.txt", "--base-url", url, "--report", "b.json", "--compare"]) <= 1
    held = set()
    for name in ("a.json", "b.json"):
        told = json.loads(pathlib.Path(name).read_text())
        (run, *_) = told["runs"]
        held |= {*told, *run, *run["latency_seconds"], *run["waited_seconds"], *run["tokens"], *(run["budget"] or {})}
        held |= {field for error in run["errors"] for field in error}
    assert held - described == set(), "what is written is described"
    assert described - held <= {"hint", "hush", "auto", "requests", "null"}, "what is described is written"


def test_the_key_is_in_no_report(here, stand_in, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-hush-hush-hush-hush")
    command = ["prompts.txt", "--base-url", stand_in().url, "-s", "my key is sk-hush-hush-hush-hush"]
    assert main([*command, "--report", "r.json"]) == 0
    text = pathlib.Path("r.json").read_text()
    assert "hush" not in text and "my key is ***" in text


def test_what_earlier_runs_left_is_in_the_report(here, stand_in, capsys):
    server = stand_in(fault={"500": 1.0})
    command = ["prompts.txt", "--base-url", server.url, "--max-attempts", "1", "--report", "r.json"]
    assert main([*command, "-n", "1"]) == 1
    server.options.fault.clear()
    assert main(command) == 1
    told = json.loads(pathlib.Path("r.json").read_text())
    (run,) = told["runs"]
    assert (told["kept"], told["kept_failed"], run["answered"], run["failed"]) == (0, 1, 2, 0)
    assert [error["count"] for error in run["errors"]] == [1]
    assert "1 failure of an earlier run kept" in capsys.readouterr().err


def test_a_deadline_over_a_comparison(here, stand_in, capsys):
    command = ["prompts.txt", "--base-url", stand_in(latency=0.2).url, "--compare", "--deadline", "0.5"]
    assert main([*command, "--report", "r.json"]) == 3
    out, err = capsys.readouterr()
    assert "the deadline of 0.50 s is over" in err and "report in r.json" in err and out.startswith("backend")


def test_a_stopped_run_has_a_report_too(here, stand_in, capsys):
    url = stand_in(require_key="k").url
    for way in ([], ["--compare"]):
        assert main(["prompts.txt", "--base-url", url, "--report", "r.json", *way]) == 3
        told = json.loads(pathlib.Path("r.json").read_text())
        assert told["exit_status"] == 3 and told["stopped"]["status"] == 401 and "key" in told["stopped"]["hint"]
