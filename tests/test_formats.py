"""Answers to read: as text, as a table on standard output and in a file, and progress where nothing can be redrawn."""

import asyncio
import csv
import dataclasses
import errno
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

import concurrent_prompts
from concurrent_prompts import Error, Printer, Progress, Prompt, Ran, Result, Run, Tally, as_prompts, main
from concurrent_prompts.extras.table import Table
from concurrent_prompts.extras.text import as_text

SCRIPT = str(pathlib.Path(__file__).resolve().parent.parent / "concurrent_prompts.py")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory with a file of three prompts; 40 columns; no waiting between attempts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(concurrent_prompts, "BACKOFF_BASE", 0.001)
    monkeypatch.setenv("COLUMNS", "40")
    (tmp_path / "prompts.txt").write_text("What is one?\nWhat is two?\nWhat is three?\n")
    return tmp_path


def table(path, separator=","):
    """Return the records of a table, header first."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.reader(file, delimiter=separator, strict=True))


def answered(content, text=None, **fields):
    """Return a Result for the prompt."""
    (prompt,) = as_prompts([content])
    return Result(prompt, text, **fields)


def shown(result, monkeypatch, columns=40):
    """Return the lines of a result as text."""
    monkeypatch.setenv("COLUMNS", str(columns))
    return as_text(result).decode().split("\n")


# ---- Text ------------------------------------------------------------------------------------------------------------


def test_an_answer_stands_below_the_beginning_of_its_prompt(monkeypatch):
    lines = shown(answered("Why " * 40, "Since it is so.\n\nIndeed."), monkeypatch)
    assert lines[0].startswith("[1] Why Why") and lines[0].endswith(" …") and len(lines[0]) <= 40
    assert lines[1:] == ["Since it is so.", "", "Indeed.", "", ""]


def test_long_lines_are_broken_at_spaces_and_nothing_else_is_touched(monkeypatch):
    address = "https://example.com/" + "long/" * 20
    code = "    for item in a_list_of_many_things_that_is_long: print(item)"
    fenced = ["```python", "x = 'one two three four five six seven eight nine'", "```"]
    row = "| a table of one column | and of another column |"
    item = "- " + "word " * 14
    text = "\n".join(["one two " * 9, code, *fenced, row, address, item, "  10. " + "nested " * 10])
    lines = shown(answered("?", text), monkeypatch)[1:]
    for line in (code, *fenced, row, address):
        assert line in lines, "kept whole"
    others = [line for line in lines if line not in (code, *fenced, row, address)]
    assert max(map(len, others)) <= 40
    assert " ".join(" ".join(lines).split()) == " ".join(text.split()), "no word is lost"
    assert "  word word word word word word word" in lines and "      nested nested nested nested nested" in lines


def test_wide_characters_count_twice(monkeypatch):
    text = "日本語の文章は空白なしで続くので、どこでも折り返せる。" * 3 + "🙂" * 30
    lines = shown(answered("質問" * 40, text), monkeypatch)
    widths = [sum(2 if ord(c) > 0x2E00 else 1 for c in line) for line in lines]
    assert max(widths) <= 40 and "".join(lines[1:]) == text
    assert min(widths[1:-3]) >= 38, "the lines are full"


@pytest.mark.parametrize(("columns", "most"), [(80, 80), (40, 40), (400, 100), (3, 20)])
def test_the_width_is_the_terminals_within_bounds(monkeypatch, columns, most):
    lines = shown(answered("?", "a b c d e " * 100), monkeypatch, columns)
    assert most - 2 <= max(map(len, lines)) <= most


def test_failures_are_said_in_words(monkeypatch):
    result = answered("?", error=Error("context_length_exceeded", "too long", 400))
    assert shown(result, monkeypatch, 80)[1] == "failed: context_length_exceeded: too long"


EXTRAS = {
    "a vector": ({"embedding": [0.5, -0.25, 3, 4, 5, 6]}, ["6 numbers: 0.5, -0.25, 3, 4, …"]),
    "vectors": ({"embedding": [[1, 2], [3, 4]]}, ["2 numbers: 1, 2", "2 numbers: 3, 4"]),
    "an encoded vector": ({"embedding": "AAAA" * 99}, ["AAAA" * 14 + "AA …"]),
    "texts": ({"texts": ["one", "two"]}, ["(1 of 2)", "one", "", "(2 of 2)", "two"]),
    "another endpoint": ({"reply": {"a": [1]}}, ['{"a":[1]}']),
    "nothing": ({}, ["(an empty answer)"]),
}


@pytest.mark.parametrize("case", EXTRAS)
def test_what_is_not_one_text(monkeypatch, case):
    extra, lines = EXTRAS[case]
    assert shown(answered("?", extra=extra), monkeypatch, 80)[1:-2] == lines


ASKED = {
    "messages": ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "last"}]}, "last"),
    "parts": ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, '[{"text":"x"}]'),
    "columns": ({"city": "Paris", "id": 7}, '{"city":"Paris"}'),
    "inputs": ({"input": ["a", "b"]}, '["a","b"]'),
    "batch": ({"custom_id": "c", "body": {"messages": [{"role": "user", "content": "hi\nyou"}]}}, "hi you"),
    "a bad batch": ({"custom_id": "c", "body": None}, '{"custom_id":"c","body":null}'),
    "unreadable": (Error("unreadable", "not JSON"), ""),
}  # fmt: skip


@pytest.mark.parametrize("case", ASKED)
def test_what_was_asked(monkeypatch, case):
    row, text = ASKED[case]
    result = answered(row, "answer")
    assert shown(result, monkeypatch, 80)[0] == f"[{result.id}] {text}".strip()


class Terminal(io.TextIOWrapper):
    """A stream that says it is a terminal."""

    def __init__(self):
        super().__init__(io.BytesIO(), "utf-8", newline="", write_through=True)

    def isatty(self):
        return True


@pytest.mark.parametrize("arguments", [[], ["--format", "jsonl"], ["--format", "csv"]])
def test_on_a_terminal_answers_are_text_unless_asked_otherwise(here, stand_in, monkeypatch, arguments):
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["prompts.txt", "-o", "-", "-q", "--base-url", stand_in().url, *arguments]) == 0
    first = out.buffer.getvalue().decode().splitlines()[0]
    beginnings = {"": "[1] What is one?", "jsonl": '{"id":1', "csv": "id,prompt,text,error"}
    assert first.startswith(beginnings["".join(arguments[1:])])


def test_no_answer_commands_the_terminal_and_code_keeps_its_tabs(monkeypatch):
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    with Printer(as_text) as printer:
        printer.append(answered("a\x1b[31m\u202eb", "\tcode\r\nred \x1b[31m \x07 \u202e\nlast"))
    text = out.buffer.getvalue().decode()
    assert text == "[1] a [31m b\n        code\nred \\u001b[31m \\u0007 \\u202e\nlast\n\n"


def test_half_a_surrogate_pair_is_printed_escaped(monkeypatch):
    assert shown(answered("?", "a\ud800b"), monkeypatch)[1] == "a\\ud800b"
    assert b'"[""a\\ud800b"",1]"' in Table([]).line(answered("?", extra={"texts": ["a\ud800b", 1]}))


# ---- Tables ----------------------------------------------------------------------------------------------------------


HOSTILE = {
    "p.txt": ("one\ntwo\n", ["id", "prompt"], [["1", "one"], ["2", "two"]]),
    "p.csv": (
        'id,text,prompt,error,request,,input_text\n"7","a\nb","=cmd()|\'x\'!A1","q""q,q","\0","\t","\r"\n,,two,,,,\n',
        ["id", "input_input_text", "prompt", "input_error", "request", "", "input_text"],
        [["7", "a\nb", "=cmd()|'x'!A1", 'q"q,q', "\0", "\t", "\r"], ["", "", "two", "", "", "", ""]],
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
    "a form of no output": (["--format", "text"], "--format is for standard output (-o -)"),
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
    assert "p.jsonl line 1: over 16,000 columns so far" in capsys.readouterr().err


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


@pytest.mark.parametrize("form", ["text", "csv"])
def test_a_closed_pipe_ends_quietly(here, stand_in, form):
    pathlib.Path("p.txt").write_text("".join(f"prompt {n}\n" for n in range(3000)))
    command = ["p.txt", "-o", "-", "--format", form, "-b", "stdlib", "--base-url", stand_in().url]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, SCRIPT, *command], **pipes) as process:
        assert process.stdout.readline() == ("id,prompt,text,error\n" if form == "csv" else "[1] prompt 0\n")
        process.stdout.close()
        assert process.stderr.read().count("Traceback") == 0
    assert process.returncode == 3


def test_nothing_is_printed_where_the_run_cannot_begin(here, capsys):
    pathlib.Path("mine.py").write_text("def connect(*given):\n    raise ValueError('no')\n")
    sys.path.insert(0, str(here))
    try:
        command = ["prompts.txt", "-o", "-", "--format", "csv", "-b", "mine:connect", "--base-url", "http://127.0.0.1/v1"]
        assert main(command) == 2
    finally:
        sys.path.remove(str(here))
    assert capsys.readouterr().out == ""


def test_a_stopped_table_on_standard_output_has_its_header_and_what_is_there(capsysbinary):
    prompts = list(as_prompts(["a", "b", "c"]))
    form = Table(prompts)
    with Printer(form.line, form.head) as printer:
        printer.append(Result(prompts[1], "to b"))
        assert capsysbinary.readouterr().out == b"id,prompt,text,error\n"
    assert capsysbinary.readouterr().out == b"2,b,to b,\n"


# ---- Progress --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("term", ["dumb", "", None, "xterm"])
async def test_a_terminal_that_cannot_redraw_a_line_gets_whole_lines(monkeypatch, term):
    monkeypatch.delenv("TERM", raising=False)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    if term is not None:
        monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(Progress, "EVERY", 0.001)
    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = Progress(3, Ran(None, Run(lambda prompt: None), 1, Tally()), None, False)
    while not sys.stderr.buffer.getvalue().count(b"3 done"):
        await asyncio.sleep(0)
    progress.close()
    concurrent_prompts.ErrorLog().emit(concurrent_prompts.logging.makeLogRecord({"msg": "noted"}))
    text = sys.stderr.buffer.getvalue().decode()
    if term == "xterm" or os.name == "nt":
        assert text.startswith("\r0 of 3 done") and text.endswith("\r\x1b[Knoted" + os.linesep)
    else:
        assert "\r" not in text and "\x1b" not in text and text.startswith("0 of 3 done, 0 in flight")
        assert text.endswith("/s\nnoted\n")


def test_a_prompt_knows_its_row_and_is_the_same_without():
    (prompt,) = as_prompts([{"id": 7, "prompt": "x", "a": 1}])
    assert list(prompt.row) == ["id", "prompt", "a"] and "row=" not in repr(prompt)
    assert prompt == Prompt(0, "x", 7, columns={"a": 1}, where="prompt 1", named=True)
