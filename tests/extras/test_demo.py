"""--demo: answers that cost nothing, and are taken for nothing else."""

import json
import os
import pathlib

import pytest

from concurrent_prompts import main
from tests.helpers import rows, start


def test_a_demo_is_not_taken_for_real_answers(here, stand_in, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert main(["prompts.txt", "--demo"]) == 0
    assert len(rows("prompts.demo.results.jsonl")) == 3 and not pathlib.Path("prompts.results.jsonl").exists()
    assert os.environ["HTTP_PROXY"] and "NO_PROXY" not in os.environ


def test_a_demo_costs_what_a_told_price_makes_of_it(here):
    with start(["--demo", "-n", "3", "-b", "stdlib", "--price", "1,2"]) as process:
        _, err = process.communicate(timeout=30)
    assert process.returncode == 0 and "cost " in err, err


def test_a_demo_in_a_dialect(here):
    assert main(["prompts.txt", "--demo", "--dialect", "azure", "-b", "stdlib", "-q"]) == 0  # its URL has a query
    assert all(row["model"].startswith("made-up-2") for row in rows("prompts.demo.results.jsonl"))


@pytest.mark.parametrize(
    ("flags", "named"),
    [(["--demo", "--dialect", "klingon"], "choose openai, openrouter,"), (["--dialect", "groq"], "add --demo")],
)
def test_a_dialect_that_cannot_be(here, capsys, flags, named):
    assert main(["prompts.txt", *flags]) == 2
    assert named in capsys.readouterr().err


def test_demo(here):
    with start(["--demo", "-n", "3", "-b", "stdlib"]) as process:
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert [json.loads(line)["id"] for line in out.splitlines()] == [1, 2, 3] and "made up" in out
