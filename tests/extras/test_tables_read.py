"""What .csv and .tsv files are read as, whatever their quotes and headers."""

import gzip
import re
import sys

import pytest

from concurrent_prompts import (
    UsageError,
)
from tests.helpers import contents, in_rows, line_of


def test_csv_line_numbers_count_lines_not_records(read):
    prompts = read("p.csv", 'prompt,x\n"a\n\nb",1\n\nragged\nc,2\n')
    assert contents(prompts) == ["a\n\nb", "!", "c"]
    assert [prompt.id for prompt in prompts] == [2, 6, 7]
    assert line_of(prompts[1]) == 6


# Below the header "prompt,x": the content, the line number and the content (or what is wrong) of each row.
QUOTES = {
    "never closed": ('"a,1\nb,2\nc,3\n', [(2, "never closed"), (3, "b"), (4, "c")]),
    "never closed, last line": ('a,1\n"b,2', [(2, "a"), (3, "never closed")]),
    "two never closed": ('a,"1\nb,2\nc,3\nx"d,"4\n', [(2, "line 5, .*expected"), (3, "b"), (4, "c"), (5, "never")]),
    "closed by the next": ('"a,1\n"b",2\nc,3\n', [(2, "in line 3, .*expected"), (3, "b"), (4, "c")]),
    "text after it": ('"a" x,1\nb,2\n', [(2, "^',' expected"), (3, "b")]),
    "in a later line of a record": ('"a\nb","c\nd,1\n', [(2, "never closed"), (3, 'b"', "never"), (4, "d")]),
    "a good one over two lines follows": ('"a,1\n"b\nb",2\nc,3\n', [(2, "in line 3"), (3, "b\nb"), (5, "c")]),
    "blank lines inside": ('"a,1\n\n \nb,2\n', [(2, "never closed"), (5, "b")]),
    "CRLF": ('"a,1\r\nb,2\r\n', [(2, "never closed"), (3, "b")]),
    "all open, never closed": ('x","y\n' * 3, [(2, "never closed"), (3, "never closed"), (4, "never closed")]),
    "carriage return alone": ("a\rb,1\nb,2\n", [(2, "carriage return"), (3, "b")]),
    "carriage return in quotes": ('"a\rb",1\nb,2\n', [(2, "a\rb"), (3, "b")]),
    "doubled carriage returns": ('a,1\r\r\n"b",2\r\r\n', [(2, "a"), (3, "b")]),
    "NUL": ("a\0,1\nb,2\n", [(2, "a\0"), (3, "b")]),
    "blanks are a blank line": (' \t\nb,2\n \n"c",3', [(3, "b"), (5, "c")]),
}


@in_rows("packed", [False, True], ids=["plain", "gzip"])
@in_rows(("content", "expected"), QUOTES.values(), ids=QUOTES)
def test_a_bad_quote_costs_no_other_row(read, content, expected, packed):
    content = b"\xef\xbb\xbfprompt,x\n" + content.encode()
    prompts = read("p.csv", gzip.compress(content) if packed else content)
    assert [prompt.id for prompt in prompts] == [row[0] for row in expected]
    for prompt, (line, *texts) in zip(prompts, expected, strict=True):
        if prompt.error:
            assert line_of(prompt) == line and re.search(texts[-1], prompt.error.message.partition(": ")[2])
        else:
            assert prompt.content == texts[0]


def test_open_quotes_in_every_line_take_no_quadratic_time(read):
    prompts = read("p.csv", "prompt,x\n" + 'x","y\n' * 30_000)
    assert [line_of(prompt) for prompt in prompts] == list(range(2, 30_002))


def test_an_open_quote_does_not_read_all_of_a_large_file(read, monkeypatch):
    monkeypatch.setattr("concurrent_prompts.extras.table.LONGEST", 2000)
    monkeypatch.setattr(sys, "getsizeof", len)  # what a line costs besides its bytes varies
    prompts = read("p.csv", 'prompt\n"' + "a\n" * 3000 + '"' + "b" * 9000 + '"\nc\n')
    assert contents(prompts) == ["!"] + ["a"] * 2999 + ["b" * 9000, "c"]
    assert line_of(prompts[0]) == 2 and re.search("still open in line 1001$", prompts[0].error.message)


HEADERS = {
    "open quote": ('"prompt,x\na,1\n', "line 1, the header: a quote is opened here and never closed"),
    "bad quote": ('\n"prompt" ,x\na,1\n', "line 2, the header: ',' expected"),
    "carriage returns for line ends": ("prompt,x\ra,1\r", "ends its lines with carriage returns alone; .*tr '"),
    "not UTF-8": (b"pr\xe9mpt,x\na,1\n", "line 1, the header: not UTF-8"),
    "a comment": ("# made by x\nid,prompt\n1,a\n", "line 1 is a comment"),
}


@in_rows(("content", "reason"), HEADERS.values(), ids=HEADERS)
def test_headers_that_cannot_be_read(read, content, reason):
    with pytest.raises(UsageError, match=reason):
        read("p.csv", content)


# What stands in a table with the columns id and prompt; the prompts are "a" and "b".
SEPARATED = {
    "commas": "id,prompt\n1,a\n2,b\n",
    "blanks after commas": "id, prompt\n1, a\n2,  b\n",
    "quotes after blanks": 'id, prompt\n1, "a"\n"2", b\n',
    "names in quotes": '"id", "prompt"\n1, "a"\n2,b\n',
    "blanks around names": " id ,prompt \n1,a\n2,b\n",
    "semicolons": "id;prompt\r\n1;a\r\n2;b\r\n",
    "semicolons and quotes": '"id";"prompt"\n"1";"a"\n"2";"b"\n',
    "semicolons and blanks": "id; prompt\n1; a\n2; b\n",
    "tabs": "id\tprompt\n1\ta\n2\tb\n",
    "bars": "id|prompt\n1|a\n2|b\n",
    "padded bars": "id | prompt\n1  | a\n2  | b\n",
    "Excel says it": "sep=;\nid;prompt\n1;a\n2;b\n",
    "Excel says tabs": '"sep=\t"\r\nid\tprompt\r\n1\ta\r\n2\tb\r\n',
    "a comma in a quoted name": 'id;prompt;"x, y, z"\n1;a;\n2;b;\n',
    "a byte order mark": "\ufeffid;prompt\n1;a\n2;b\n",
    "names that are missing": "id,prompt,,\n1,a,,\n2,b,,\n",
    "rows of another separator": "id,prompt\n;;\n1,a\n2,b\n;\n",
    "rows with nothing": "id,prompt\n,\n1,a\n , \n,,,\n2,b\n" + ",\r\n" * 500,
    "rows with nothing, of semicolons": "id;prompt\n;\n1;a\n2;b\n;\n",
    "rows with nothing in quotes": 'id,prompt\n"",""\n1,a\n2,b\n',
}


@in_rows("suffix", ["csv", "tsv"])
@in_rows("content", SEPARATED.values(), ids=SEPARATED)
def test_the_header_says_what_separates_the_columns(read, content, suffix):
    prompts = read(f"p.{suffix}", content)
    assert [(prompt.id, prompt.content) for prompt in prompts] == [("1", "a"), ("2", "b")]


def test_lines_are_counted_from_the_files_first(read):
    prompts = read("p.csv", "\n\nsep=;\nid;prompt\n1;a\n;;\n2;b;c\n")
    assert [prompt.where for prompt in prompts] == [f"{prompts[0].where[:-1]}{line}" for line in (5, 7)]
    assert prompts[1].error.message.endswith("line 7: 3 fields, the header has 2")


def test_separators_in_a_text_separate_nothing(read):
    (prompt,) = read("p.csv", "prompt,x\na; b| c\td,1\n")
    assert prompt.content == "a; b| c\td"
    (prompt,) = read("p.csv", "id;prompt\n1;a, b, c\n")
    assert prompt.content == "a, b, c"


def test_rows_with_nothing_are_not_counted():
    from concurrent_prompts.extras.table import count

    assert count([b"id,prompt\n", b"1,a\n", b",\r\n", b" , ,\n", b";;\n", b'2,"b\n', b'c"\n']) == 2


def test_blank_lines_are_no_header(read):
    (prompt,) = read("p.tsv", "\n \n\t\t\nprompt\tx\na\t1\n")
    assert (prompt.content, prompt.columns, prompt.id) == ("a", {"x": "1"}, 5)
