"""Batch request files of any input: --to-batch."""

import collections
import json
import os
import sys

import pytest

import concurrent_prompts
from concurrent_prompts import Prompt, main
from concurrent_prompts.backends import api as api_file
from concurrent_prompts.backends.api import request_line
from tests.helpers import batch_line, jsonl, rows, said


@pytest.fixture
def here(ten):
    return ten


def test_a_request_line():
    line = request_line('a"ü\ud800', "/chat/completions", b'{"x":1}')
    assert line.endswith(b',"method":"POST","url":"/v1/chat/completions","body":{"x":1}}\n') and line.count(b"\n") == 1
    assert json.loads(line)["custom_id"] == 'a"ü\ud800'


@pytest.mark.parametrize("options", [
    ["-m", "other", "-p", "temperature=0.5", "-s", "Be brief."],
    ["-t", "Say {prompt} in {lang}"],
    ["-e", "responses"],
])  # fmt: skip
def test_a_request_file_says_what_a_run_asks(answer, here, capsys, options):
    (here / "p.jsonl").write_text(jsonl(*({"prompt": f"p {n}", "lang": "fr", "id": f"x{n}"} for n in range(5))))
    assert answer("p.jsonl", "-o", "live.jsonl", *options) == 0
    assert main(["p.jsonl", "--to-batch", "b.jsonl", *options]) == 0
    assert capsys.readouterr().err.endswith("5 requests in b.jsonl\n")
    assert answer("b.jsonl") == 0
    reader = api_file.READERS["/responses" if "responses" in options else "/chat/completions"]
    answers = {row["custom_id"]: reader(row["response"]["body"])[0] for row in rows("b.results.jsonl")}
    assert answers == {row["id"]: row["text"] for row in rows("live.jsonl")} and len(answers) == 5


def test_a_request_file_of_a_request_file(here):
    (here / "p.jsonl").write_text(jsonl(*(batch_line(f"r{number}", f"q {number}") for number in range(5))))
    assert main(["p.jsonl", "--to-batch", "b.jsonl"]) == 0
    assert rows("b.jsonl") == rows("p.jsonl")


def test_the_query_of_a_base_url_is_no_part_of_a_request_line(here):
    url = "https://x.openai.azure.com/openai/v1?api-version=1"
    assert main(["p.txt", "--to-batch", "b.jsonl", "--base-url", url]) == 0
    assert {row["url"] for row in rows("b.jsonl")} == {"/v1/chat/completions"}


def test_custom_ids_are_unique(here):
    items = [{"prompt": "a", "id": "x"}, {"prompt": "b", "id": "x"}, {"prompt": "c", "id": "x-2"}, batch_line("y", "d"),
             {"prompt": "e", "id": "x"}, {"prompt": "f", "id": 8}, {"prompt": "g", "id": "y"}, "h", "i",
             {"prompt": "j", "id": "8"}, {"prompt": "k", "id": "z"}, batch_line("z", "l")]  # fmt: skip
    (here / "p.jsonl").write_text(jsonl(*items))
    assert main(["p.jsonl", "--to-batch", "b.jsonl"]) == 0
    ids = [row["custom_id"] for row in rows("b.jsonl")]
    assert ids == ["x", "x-3", "x-2", "y", "x-4", "8", "y-2", "8-2", "9", "8-3", "z-2", "z"]


def test_no_file_holds_more_than_it_may(here, monkeypatch, capsys):
    monkeypatch.setattr(api_file, "BATCH_LINES", 4)
    assert main(["p.txt", "--to-batch", "b.jsonl"]) == 0
    assert capsys.readouterr().err == "4 requests in b.jsonl\n4 requests in b-2.jsonl\n2 requests in b-3.jsonl\n"
    lines = [row["custom_id"] for name in ("b", "b-2", "b-3") for row in rows(f"{name}.jsonl")]
    assert lines == [str(number) for number in range(1, 11)]
    monkeypatch.setattr(api_file, "BATCH_BYTES", 2 * os.path.getsize("b-3.jsonl") // 2)
    assert main(["p.txt", "--to-batch", "c.jsonl", "-n", "6"]) == 0
    assert [len(rows(f"{name}.jsonl")) for name in ("c", "c-2", "c-3")] == [2, 2, 2]
    assert max(os.path.getsize(path) for path in here.glob("c*.jsonl")) <= api_file.BATCH_BYTES
    monkeypatch.setattr(api_file, "BATCH_BYTES", 10)
    assert main(["p.txt", "--to-batch", "d.jsonl"]) == 1
    assert said(capsys) == "10 prompts left out: p.txt line 1: too long for a Batch"
    assert not list(here.glob("d*"))


def test_a_file_has_one_endpoint_and_one_model(here):
    items = [batch_line(f"{url} {model} {turn}", "x", model, f"/v1/{url}")
             for turn in range(3) for url in ("embeddings", "responses") for model in ("a", "b")]  # fmt: skip
    (here / "p.jsonl").write_text(jsonl(*items))
    assert main(["p.jsonl", "--to-batch", "b.jsonl"]) == 0
    kinds = [collections.Counter((row["url"], row["body"]["model"]) for row in rows(path)) for path in here.glob("b*")]
    assert sorted(kind for kinds_in_file in kinds for kind in kinds_in_file.items()) == [
        ((f"/v1/{url}", model), 3) for url in ("embeddings", "responses") for model in ("a", "b")
    ]
    assert len(kinds) == 4


def test_rows_that_cannot_be_sent(here, capsys):
    (here / "p.jsonl").write_text(jsonl("a", 7, "b", {"prompt": []}))
    assert main(["p.jsonl", "--to-batch", "b.jsonl"]) == 1
    err = capsys.readouterr().err
    assert err == "2 requests in b.jsonl\n2 prompts left out: p.jsonl line 2: neither a text nor an object\n"
    assert [row["custom_id"] for row in rows("b.jsonl")] == ["1", "3"]


def test_request_files_that_are_there(here, monkeypatch, capsys):
    monkeypatch.setattr(api_file, "BATCH_LINES", 4)
    (here / "b-3.jsonl").write_text("kept")
    assert main(["p.txt", "--to-batch", "b.jsonl"]) == 2
    advice = "choose another file with --to-batch, or replace it (--overwrite)"
    assert said(capsys) == f"b-3.jsonl already exists; {advice}"
    assert sorted(path.name for path in here.iterdir()) == ["b-3.jsonl", "p.txt"]
    assert main(["p.txt", "--to-batch", "b.jsonl", "--overwrite", "-q"]) == 0 and len(rows("b-3.jsonl")) == 2
    assert main(["p.txt", "--to-batch", "b.jsonl", "--overwrite", "-n", "5"]) == 0
    assert said(capsys) == "b-3.jsonl is from an earlier run: it contains none of these requests"
    (here / "p.txt").rename("c-2.jsonl")
    (here / "c-2.jsonl").write_text(jsonl(*"abcdefg"))
    assert main(["c-2.jsonl", "--to-batch", "c.jsonl", "--overwrite"]) == 2
    assert said(capsys) == "c-2.jsonl is the input; choose another file with --to-batch"
    assert not (here / "c.jsonl").exists()


def test_request_files_of_shards(here, monkeypatch):
    monkeypatch.setattr(api_file, "BATCH_LINES", 2)
    assert main(["p.txt", "--to-batch", "b.jsonl", "--shard", "2/3", "-n", "9"]) == 0
    names = "b.shard-2-of-3.jsonl", "b.shard-2-of-3-2.jsonl"
    assert [[row["custom_id"] for row in rows(name)] for name in names] == [["2", "5"], ["8"]]
    assert main(["p.txt", "--to-batch", "c.jsonl", "--shard", "11/11"]) == 0 and not list(here.glob("c*"))


def test_a_request_file_needs_no_key_and_sends_nothing(here, monkeypatch):
    def connect(*args):
        raise AssertionError

    monkeypatch.setattr("socket.socket.connect", connect)
    monkeypatch.setattr(sys, "stdout", None)
    with open("p.txt") as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert main(["-", "--to-batch", "b.jsonl"]) == 0
        file.seek(0)
        assert main(["-", "--to-batch", "b.jsonl", "--overwrite", "-q"]) == 0
    assert len(rows("b.jsonl")) == 10


def test_renumbered_prompts_do_not_change_what_is_asked():
    whole = [Prompt(number, f"p {number}", number + 1) for number in range(4)]
    assert [concurrent_prompts.fingerprint(prompt) for prompt in whole[1::2]] == [
        concurrent_prompts.fingerprint(Prompt(number, prompt.content, prompt.id))
        for number, prompt in enumerate(whole[1::2])
    ]
