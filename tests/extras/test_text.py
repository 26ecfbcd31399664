"""Answers on standard output: in the input's order, and as text to be read on a terminal."""

import contextlib
import json
import pathlib
import shlex
import subprocess
import sys

import pytest

from concurrent_prompts import Error, Result, as_prompts, main
from concurrent_prompts.extras.table import Table
from concurrent_prompts.extras.text import Printer, as_text
from tests.core.test_journal import batch_results, prepare, result_of
from tests.helpers import SCRIPT, Terminal, in_rows, rows


@pytest.fixture
def here(here, monkeypatch):
    """A working directory with a file of three prompts; 40 columns."""
    monkeypatch.setenv("COLUMNS", "40")
    return here


def answered(content, text=None, **fields):
    """Return a Result for the prompt."""
    (prompt,) = as_prompts([content])
    return Result(prompt, text, **fields)


def shown(result, monkeypatch, columns=40):
    """Return the lines of a result as text."""
    monkeypatch.setenv("COLUMNS", str(columns))
    return as_text(result).decode().split("\n")


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


@in_rows(("columns", "most"), [(80, 80), (40, 40), (400, 100), (3, 20)])
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


@in_rows("case", EXTRAS)
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


@in_rows("case", ASKED)
def test_what_was_asked(monkeypatch, case):
    row, text = ASKED[case]
    result = answered(row, "answer")
    assert shown(result, monkeypatch, 80)[0] == f"[{result.id}] {text}".strip()


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


def printed(capsysbinary):
    return [json.loads(line)["text"] for line in capsysbinary.readouterr().out.splitlines()]


def test_the_printer_prints_in_input_order_as_soon_as_it_can(capsysbinary):
    prompts = prepare(list("abcd"))
    steps = [(2, []), (0, ["to a"]), (1, ["to b", "to c"]), (3, ["to d"])]
    with Printer() as printer:
        assert list(printer.left(prompts)) == prompts
        for number, expected in steps:
            printer.append(result_of(prompts[number]))
            assert printed(capsysbinary) == expected
        printer.finish()
    assert printed(capsysbinary) == []


@pytest.mark.parametrize("failure", [None, KeyboardInterrupt])
def test_the_printer_prints_what_is_there_when_the_run_ends_early(capsysbinary, failure):
    prompts = prepare(list("abcd"))
    with contextlib.suppress(KeyboardInterrupt), Printer() as printer:
        for number in (3, 1):
            printer.append(result_of(prompts[number]))
        assert printed(capsysbinary) == []
        if failure:
            raise failure
    assert printed(capsysbinary) == ["to b", "to d"]


def test_the_printer_prints_batch_lines(capsysbinary):
    results, lines = batch_results()
    with Printer() as printer:
        for result in results:
            printer.append(result)
    found = [json.loads(line) for line in capsysbinary.readouterr().out.splitlines()]
    assert [{key: row[key] for key in lines[0]} for row in found] == lines


# ---- Beside a results file -------------------------------------------------------------------------------------


@pytest.fixture
def terminal(here, monkeypatch):
    """Return a function that runs the command on a terminal; it returns the exit status, the answers and the report."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")

    def run(*words):
        out, err = Terminal(), Terminal()
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        status = main([*words])
        return status, out.buffer.getvalue().decode(), err.buffer.getvalue().decode()

    return run


def test_few_answers_are_shown_on_a_terminal_and_kept(terminal, stand_in):
    server = stand_in()
    command = ["prompts.txt", "-b", "stdlib", "--base-url", server.url]
    status, text, report = terminal(*command)
    assert status == 0 and text.startswith("[1] ") and text.count("made up by") == 3
    assert len(rows("prompts.results.jsonl")) == 3
    assert "results in prompts.results.jsonl" in report and "--format text" not in report
    assert terminal(*command)[1] == text, "earlier runs' too"
    assert terminal(*command, "-n", "2")[1] == text[: text.index("[3] ")]
    assert [terminal(*command, *words)[1] for words in (["-q"], ["-q", "-o", "-"])] == ["", text]
    assert server.stats.requests == 3 + 3


def test_failed_ones_are_shown_as_well(terminal, stand_in):
    pathlib.Path("p.jsonl").write_text('"one"\n{"prompt": \n')
    status, text, _ = terminal("p.jsonl", "-b", "stdlib", "--base-url", stand_in().url)
    assert status == 1 and "[2]\nfailed: unreadable: p.jsonl line 2: " in text and "[1] one\n" in text


def test_many_answers_are_a_command_away(terminal, stand_in, monkeypatch):
    pathlib.Path("many.txt").write_text("".join(f"prompt {number}\n" for number in range(11)))
    server = stand_in()
    command = ["many.txt", "-b", "stdlib", "--base-url", server.url]
    _, text, report = terminal(*command, "--overwrite", "--retry-failed")
    offered = report.splitlines()[-1]
    assert text == "" and report.splitlines()[-2] == "  Print the answers with:"
    assert shlex.split(offered)[-len(command) - 2 :] == [*command, "--format", "text"]
    status, text, report = terminal(*shlex.split(offered)[-len(command) - 2 :])
    assert status == 0 and text.count("made up by") == 11 and "Print the answers" not in report
    assert server.stats.requests == 11


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_a_file_has_no_other_form(here, capsys, form):
    assert main(["prompts.txt", "--format", form, "--base-url", "http://127.0.0.1:9/v1"]) == 2
    assert "--format is for standard output (-o -)" in capsys.readouterr().err
