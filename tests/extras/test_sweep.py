"""Sweeps: --compare over several numbers of calls in flight, and where the knee is."""

import json
import pathlib
import re

from concurrent_prompts import main


def test_a_sweep_finds_the_knee(here, stand_in, capsys):
    pathlib.Path("prompts.txt").write_text("".join(f"prompt {number}\n" for number in range(40)))
    server = stand_in(latency=0.02, knee=4)
    arguments = ["prompts.txt", "--compare", "-b", "stdlib", "-c", "1,4,30,auto", "--base-url", server.url]
    assert main([*arguments, "--report", "r.json", "-q"]) == 0
    out = capsys.readouterr().out
    header, *lines = out.splitlines()[:5]
    assert header.split()[:2] == ["backend", "-c"]
    assert [line.split()[1] for line in lines] == ["1", "4", "30", "auto"]
    words = " ".join(out.split())
    assert re.search(r"stdlib: the knee is at 4 in flight: [\d.]+ answers/s at 4 in flight, [34]\.\d times th", words)
    told = json.loads(pathlib.Path("r.json").read_text())
    assert " ".join(told["verdicts"]) in words
    assert [(run["concurrency"], run["answered"]) for run in told["runs"]] == [(1, 40), (4, 40), (30, 40), ("auto", 40)]
    assert max(run["most_in_flight"] for run in told["runs"][:3]) == 30 == told["runs"][2]["most_in_flight"]


def test_a_sweep_of_too_few_prompts_says_so(here, stand_in, capsys):
    assert main(["prompts.txt", "--compare", "-c", "1,2,50", "--base-url", stand_in(latency=0.01).url, "-q"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "no more than 3 were ever in flight; to reach 50, use more prompts." in words
