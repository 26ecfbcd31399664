"""Tables: .csv and .tsv in, out, and on standard output."""

import csv
import dataclasses
import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

import concurrent_prompts
from concurrent_prompts import Result, as_prompts, main
from concurrent_prompts.extras.table import Table
from concurrent_prompts.extras.text import Printer
from tests.helpers import SCRIPT, completion, jsonl, rows


@pytest.fixture
def here(here, monkeypatch):
    """A working directory with a file of three prompts; 40 columns."""
    monkeypatch.setenv("COLUMNS", "40")
    return here


def table(path, separator=","):
    """Return the records of a table, header first."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.reader(file, delimiter=separator, strict=True))


HOSTILE = {
    "p.txt": ("one\ntwo\n", ["id", "prompt"], [["1", "one"], ["2", "two"]]),
    "p.csv": (
        'id,text,prompt,error,request,,input_text\n"7","a\nb","=cmd()|\'x\'!A1","q""q,q","\0","\t","\r"\n,,two,,,,\n',
        ["id", "input_input_text", "prompt", "input_error", "request", "", "input_text"],
        [["7", "a\nb", "'=cmd()|'x'!A1", 'q"q,q', "\0", "'\t", "'\r"], ["", "", "two", "", "", "", ""]],
    ),
    "p.jsonl": (
        '{"prompt": "one", "n": 1.50, "b": true, "o": {"a": ["é"]}, "none": null}\n"two"\nno JSON\n'
        '{"id": "x", "prompt": "\\ud800", "later": "z"}\n{"id": {}, "input": "i"}\n',
        ["prompt", "n", "b", "o", "none", "id", "later", "input"],
        [
            ["one", "1.5", "true", '{"a":["é"]}', "", "", "", ""],
            ["two", "", "", "", "", "2", "", ""],
            [""] * 8,
            ["\\ud800", "", "", "", "", "x", "z", ""],
            ["", "", "", "", "", "{}", "", "i"],
        ],
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("to", ["out.csv", "out.TSV", "-"])
def test_a_table_has_the_inputs_own_columns_and_the_answers(here, stand_in, capfdbinary, name, to):
    text, header, own = HOSTILE[name]
    pathlib.Path(name).write_text(text, newline="")
    arguments = ["--format", "csv"] if to == "-" else []
    status = main([name, "-o", to, "-q", "--base-url", stand_in().url, *arguments])
    if to == "-":
        to = "out.csv"
        pathlib.Path(to).write_bytes(capfdbinary.readouterr().out)
    found = table(to, "\t" if to == "out.TSV" else ",")
    input_text = next((place for place, key in enumerate(header) if key == "input_input_text"), None)
    if input_text is not None:  # the one that was there keeps its name
        header = [{"input_input_text": "input_text", "input_text": "input_input_text"}.get(key, key) for key in header]
    assert found[0] == [*header, "text", "error"]
    assert [record[:-2] for record in found[1:]] == own
    failed = [record for record in found[1:] if record[-1]]
    assert status == bool(failed) and all("made up" in record[-2] for record in found[1:] if not record[-1])
    assert [record[-2] for record in failed] == [""] * len(failed)
    assert all(record[-1].startswith("unreadable: p.jsonl line ") for record in failed)


FORMULAS = {
    '=HYPERLINK("http://x","y")': "'",
    "+49 30 123": "'",
    "-1+cmd|' /C calc'!A0": "'",
    "@SUM(1)": "'",
    "\t=1": "'",
    "\r=1": "'",
    "\n=1": "'",
    "\uff1d1": "'",  # as wide as a Chinese letter
    "\uff0b1": "'",
    "\uff20x": "'",
    "- a list": "'",
    "1-2": "",
    "a=b": "",
    "'quoted": "",
    "": "",
}


@pytest.mark.parametrize("to", ["out.csv", "out.tsv", "-"])
def test_no_field_of_a_table_is_a_formula(here, backend, capfdbinary, to):
    """Not an answer, an id, a column of the input's, a column's name, nor what the error quotes."""

    async def answer(request):
        text = request["messages"][0]["content"]
        return (400, {}, b'{"error": {"message": "=bad", "code": "@x"}}') if text == "bad" else completion(text[1:])

    ask = [{"id": f"{text}{n}", "prompt": f"?{text}", "=x": text, "n": -5} for n, text in enumerate(FORMULAS)]
    pathlib.Path("p.jsonl").write_text(jsonl(*ask, {"id": "e", "prompt": "bad", "=x": "", "n": 1}))
    options = ["--format", "csv"] if to == "-" else []
    assert main(["p.jsonl", "-o", to, "-q", *backend(answer), *options]) == 1
    if to == "-":
        pathlib.Path("out.csv").write_bytes(capfdbinary.readouterr().out)
    header, *records, failed = table("out.csv" if to == "-" else to, "\t" if to == "out.tsv" else ",")
    assert header == ["id", "prompt", "'=x", "n", "text", "error"] and failed[-1] == "'@x: =bad"
    for number, (record, (text, mark)) in enumerate(zip(records, FORMULAS.items(), strict=True)):
        assert record == [f"{mark}{text}{number}", f"?{text}", f"{mark}{text}", "-5", f"{mark}{text}", ""]
    if to != "-":  # what a run goes on from has the answers as they were
        assert [row["text"] for row in rows(f"{to}.results.jsonl")][: len(FORMULAS)] == [*FORMULAS]


def test_what_is_no_text_is_json_in_a_table(here, stand_in):
    url = stand_in().url
    chat, good = "/v1/chat/completions", [{"role": "user", "content": "x"}]
    lines = [
        {"custom_id": "a", "url": chat, "body": {"model": "m", "messages": good}},
        {"custom_id": "b", "url": "/v1/embeddings", "body": {"model": "m", "input": "x"}},
        {"custom_id": "c", "url": chat, "body": {"model": "m", "messages": None}},
        {"custom_id": "d", "url": "nowhere", "body": {}},
    ]
    pathlib.Path("b.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert main(["b.jsonl", "-o", "b.csv", "-q", "--base-url", url]) == 1
    header, a, b, c, d = table("b.csv")
    assert header == ["custom_id", "url", "body", "text", "error"] and "made up" in a[3] and a[4] == ""
    assert isinstance(json.loads(b[3])[0], float) and json.loads(b[2]) == {"model": "m", "input": "x"}
    assert c[3] == d[3] == "" and ": " in c[4] and "messages" in c[4] and d[4].startswith("unreadable: ")
    assert main(["prompts.txt", "-o", "n.csv", "-n", "1", "-p", "n=2", "-q", "--base-url", url]) == 0
    assert len(json.loads(table("n.csv")[1][2])) == 2


def test_a_table_is_made_of_the_whole_input_and_made_again_from_the_journal(here, stand_in, capsys):
    server = stand_in()
    command = ["prompts.txt", "-o", "out.csv", "--base-url", server.url]
    assert main([*command, "-n", "1"]) == 0
    open_rows = table("out.csv")[2:]
    assert [row[:3] for row in open_rows] == [["2", "What is two?", ""], ["3", "What is three?", ""]]
    assert all(row[3].startswith("not_answered: ") for row in open_rows)
    assert main(command) == 0
    whole = pathlib.Path("out.csv").read_bytes()
    assert whole.startswith(b"\xef\xbb\xbfid,") and b"not_answered" not in whole
    pathlib.Path("out.csv").unlink()
    assert main([*command, "-n", "2"]) == 0
    assert pathlib.Path("out.csv").read_bytes() == whole, "the answers of others are not lost from it"
    assert server.stats.requests == 3
    err = capsys.readouterr().err
    assert "results in out.csv.results.jsonl\n" in err and "as a table in out.csv\n" in err


def test_repeated_prompts_that_were_not_reached_find_their_own_answers(here, stand_in):
    pathlib.Path("p.txt").write_text("same\nother\nsame\nsame\n")
    broken, sound = stand_in(fault={"500": 1.0}), stand_in()
    command = ["p.txt", "-o", "out.csv", "-q", "--max-attempts", "1"]
    assert main([*command, "-n", "1", "--base-url", broken.url]) == 1
    assert main([*command, "-n", "3", "--base-url", sound.url]) == 1
    assert main([*command, "-n", "1", "--base-url", sound.url]) == 0
    found = table("out.csv")[1:]
    assert [row[3].partition(":")[0] for row in found] == ["", "", "server_error", "not_answered"]
    assert '"same"' in found[0][2] and '"other"' in found[1][2] and found[2][2] == found[3][2] == ""


def test_a_file_of_somebody_elses_is_refused_and_kept(here, stand_in, capsys):
    server = stand_in()
    pathlib.Path("out.csv").write_text("mine\n")
    command = ["prompts.txt", "-o", "out.csv", "--base-url", server.url]
    assert main(command) == 2 and not pathlib.Path("out.csv.results.jsonl").exists()
    pathlib.Path("out.csv.results.jsonl").write_text("")
    assert main(command) == 2, "an empty journal has made no table"
    assert capsys.readouterr().err.count("out.csv holds something other than results") == 2
    assert pathlib.Path("out.csv").read_text() == "mine\n" and server.stats.requests == 0
    assert main([*command, "--overwrite"]) == 0 and len(table("out.csv")) == 4


def test_a_run_without_any_answer_leaves_the_table_alone(here, stand_in):
    command = ["prompts.txt", "-o", "out.csv", "-q", "--base-url"]
    assert main([*command, stand_in(require_key="k").url]) == 3 and not pathlib.Path("out.csv").exists()
    assert main([*command, stand_in().url]) == 0
    before = pathlib.Path("out.csv").read_bytes()
    assert main([*command, stand_in(require_key="k").url, "--overwrite"]) == 3
    assert pathlib.Path("out.csv").read_bytes() == before and pathlib.Path("out.csv.results.jsonl").stat().st_size


@pytest.mark.parametrize("reverse", [False, True])
def test_the_same_request_as_a_batch_line_and_as_a_row(here, stand_in, reverse):
    server = stand_in()
    body = {"model": concurrent_prompts.DEFAULT_MODEL, "messages": [{"role": "user", "content": "x"}]}
    pathlib.Path("b.jsonl").write_text(json.dumps({"custom_id": "a", "url": "/v1/chat/completions", "body": body}))
    pathlib.Path("r.jsonl").write_text('{"id": "a", "prompt": "x"}')
    for name in ("rb" if reverse else "br"):
        assert main([f"{name}.jsonl", "-o", "out.csv", "-q", "--base-url", server.url]) == 0
        header, record = table("out.csv")
        assert len(header) == (4 if name == "r" else 5) and "made up" in record[-2]
    assert server.stats.requests == 1, "what is asked is the same"


def test_a_journal_that_is_cut_off_during_the_run_brings_no_table_down(here, stand_in, monkeypatch):
    original = Table.write

    async def changed(self, path, results, *like):
        os.truncate("out.csv.results.jsonl", 10)
        await original(self, path, results, *like)

    monkeypatch.setattr(Table, "write", changed)
    assert main(["prompts.txt", "-o", "out.csv", "-q", "--base-url", stand_in().url]) == 0
    assert all(row[3].startswith("not_answered") for row in table("out.csv")[1:])


def test_an_input_that_changes_during_the_run_puts_no_answer_beside_another_prompt(here, stand_in, monkeypatch):
    original = Table.write

    async def changed(self, path, results, *like):
        pathlib.Path("prompts.txt").write_text("A new one?\nWhat is two?\nWhat is one?\n")
        await original(self, path, results, *like)

    monkeypatch.setattr(Table, "write", changed)
    assert main(["prompts.txt", "-o", "out.csv", "-q", "--base-url", stand_in().url]) == 0
    found = table("out.csv")[1:]
    assert [bool(row[2]) for row in found] == [False, True, False]
    assert found[0][3].startswith("not_answered") and "What is two?" in found[1][2]


def test_a_table_that_cannot_be_written_loses_no_answer(here, stand_in, capsys, monkeypatch):
    def full(file):
        if "out.csv.tmp" in file.name:
            raise OSError(errno.ENOSPC, "No space left on device")

    server = stand_in()
    command = ["prompts.txt", "-o", "out.csv", "--base-url", server.url]
    with monkeypatch.context() as patch:
        patch.setattr(concurrent_prompts, "flush", full)
        assert main(command) == 3
    err = capsys.readouterr().err
    assert "cannot write out.csv: No space left" in err and "as a table" not in err and "to continue: " in err
    assert sorted(os.listdir()) == ["out.csv.results.jsonl", "prompts.txt"]
    assert main(command) == 0 and len(table("out.csv")) == 4 and server.stats.requests == 3


UNUSABLE = {
    "a form that -o does not write": (["-o", "a.json"], "a.json: results are written as .jsonl, .csv or .tsv"),
    "a workbook": (["-o", "a.XLSX"], "not as .xlsx"),
    "two forms": (["-o", "a.csv", "--format", "csv"], "--format is for standard output (-o -)"),
    "a form of no output": (["--format", "jsonl"], "--format is for standard output (-o -)"),
    "a form of a comparison": (["--compare", "--format", "text"], "leave out --format"),
    "no folder": (["-o", "no/a.csv"], "no/a.csv cannot be written: there is no folder no"),
    "a folder": (["-o", "dir.csv"], "dir.csv is not a regular file"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_what_cannot_be_written_is_refused_before_the_first_call(here, stand_in, capsys, case):
    arguments, text = UNUSABLE[case]
    pathlib.Path("dir.csv").mkdir()
    server = stand_in()
    assert main(["prompts.txt", "--base-url", server.url, *arguments]) == 2
    err = capsys.readouterr().err
    assert text in err and err.count("\n") == 1 and server.stats.requests == 0


def test_the_journal_of_a_table_is_not_the_input(here, capsys):
    pathlib.Path("a.csv.results.jsonl").write_text('"x"\n')
    assert main(["a.csv.results.jsonl", "-o", "a.csv", "--base-url", "http://127.0.0.1:9/v1"]) == 2
    assert "a.csv.results.jsonl is the input" in capsys.readouterr().err


def test_more_columns_than_a_spreadsheet_takes(here, stand_in, capsys):
    keys = {f"k{number}": 1 for number in range(Table.MOST)}
    pathlib.Path("p.jsonl").write_text(json.dumps({"prompt": "x", **keys}))
    assert main(["p.jsonl", "-o", "a.csv", "--base-url", stand_in().url]) == 2
    assert "p.jsonl line 1: more than 16,000 columns" in capsys.readouterr().err


def test_a_cell_of_a_megabyte(here, stand_in):
    (here / "p.csv").write_text('prompt,long\nx,"' + 'a"",\n' * 200_000 + '"\n')
    assert main(["p.csv", "-o", "out.csv", "-q", "--base-url", stand_in().url]) == 0
    csv.field_size_limit(1 << 24)
    assert table("out.csv")[1][1] == 'a",\n' * 200_000


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to one process")
@pytest.mark.parametrize("number", [signal.SIGINT, getattr(signal, "SIGKILL", 9)])
def test_a_stopped_run_goes_on_and_completes_its_table(here, stand_in, number):
    pathlib.Path("p.txt").write_text("".join(f"prompt {n}\n" for n in range(16)))
    server = stand_in(latency=0.15)
    command = ["p.txt", "-o", "out.csv", "-b", "stdlib", "-c", "4", "--base-url", server.url]
    with subprocess.Popen([sys.executable, SCRIPT, *command], stderr=subprocess.DEVNULL) as process:
        while server.stats.requests < 8 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(number)
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert os.path.exists("out.csv") == (number == signal.SIGINT)
    if number == signal.SIGINT:
        found = table("out.csv")[1:]
        assert len(found) == 16 and all(bool(row[2]) != row[3].startswith("not_answered") for row in found)
        assert sum(bool(row[2]) for row in found) == server.stats.requests
    server.options = dataclasses.replace(server.options, latency=0.0)
    assert main(command) == 0
    found = table("out.csv")[1:]
    assert [row[1] for row in found] == [f"prompt {n}" for n in range(16)]
    assert all(f'"{row[1]}"' in row[2] and not row[3] for row in found)


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_a_link_to_a_table_stays_a_link(here, stand_in):
    pathlib.Path("there.csv").touch()
    pathlib.Path("real.csv").symlink_to("there.csv")
    assert main(["prompts.txt", "-o", "real.csv", "-q", "--overwrite", "--base-url", stand_in().url]) == 0
    assert pathlib.Path("real.csv").is_symlink() and len(table("there.csv")) == 4


# ---- Standard output -------------------------------------------------------------------------------------------------


def test_a_stopped_table_on_standard_output_has_its_header_and_what_is_there(capsysbinary):
    prompts = list(as_prompts(["a", "b", "c"]))
    form = Table(prompts)
    with Printer(form.line, form.head) as printer:
        printer.append(Result(prompts[1], "to b"))
        assert capsysbinary.readouterr().out == b"id,prompt,text,error\n"
    assert capsysbinary.readouterr().out == b"2,b,to b,\n"
