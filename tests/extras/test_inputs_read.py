"""Files of prompts that are packed, damaged, no files, or of another form than their name says."""

import gzip
import io
import os
import re
import sys
import tracemalloc
import types
import zlib

import pytest

from concurrent_prompts import UsageError, main, read_prompts
from concurrent_prompts.extras import progress, reading
from tests.helpers import contents, in_rows, line_of

FORMS = {
    "unknown suffix, JSON": ("p", '\n {"prompt": "a"}\n', ["a"]),
    "JSON objects in a .json": ("p.json", '{"prompt": "a"}\n{"prompt": "b"}\n', ["a", "b"]),
}


@in_rows("packed", [False, True], ids=["plain", "gzip"])
@in_rows(("name", "content", "expected"), FORMS.values(), ids=FORMS)
def test_forms_that_the_content_tells(read, name, content, expected, packed):
    content = gzip.compress(content.encode()) if packed else content
    assert contents(read(name + ".gz" * packed, content)) == expected


REFUSED = {
    "UTF-16 without a mark, hardly any ASCII": ("\u3053\u3093\n".encode("utf-16-be"), "binary"),
    "NUL and not UTF-8": (b"a" * 4000 + b"\0\xff\n", "binary"),
    "UTF-16 in gzip": (gzip.compress("a".encode("utf-16")), "UTF-16"),
    "gzip cut in its header": (gzip.compress(b"a\n")[:5], "cannot read"),
    "gzip with broken data": (gzip.compress(b"a\n")[:10] + b"\xff" * 20, "cannot read"),
}


@pytest.mark.parametrize(("content", "reason"), REFUSED.values(), ids=REFUSED)
def test_unusable_files(tmp_path, content, reason):
    path = tmp_path / "p.txt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=reason) as caught:
        next(read_prompts(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_carriage_return_alone_costs_its_line(read):
    prompts = read("p.txt", "a\nb\rc\r\nd\r\n")
    assert contents(prompts) == ["a", "!", "d"] and "tr '\\r'" in prompts[1].error.message


@in_rows(
    ("name", "packed"),
    [("p.csv", True), ("p.csv.gz", False), ("P.CSV.GZ", True), ("P.CSV.GZ", False)],
    ids=["gzip without .gz", "plain with .gz", "upper-case .GZ", "plain with .GZ"],
)
def test_gzip_is_recognised_by_its_content(read, name, packed):
    content = b"lang,prompt\nde,a\n"
    prompts = read(name, gzip.compress(content) if packed else content)
    assert contents(prompts) == ["a"] and prompts[0].columns == {"lang": "de"}


STDIN = {
    "text": ("a\nb\n", ["a", "b"]),
    "JSON objects": ('{"prompt": "a"}\n"b"\n', ["a", "b"]),
    "JSON strings": ('"a"\n"b"\n', ["a", "b"]),
    "text with a comma": ("prompt,lang\na,de\n", ["prompt,lang", "a,de"]),
    "BOM": (b'\xef\xbb\xbf{"prompt": "a"}\n', ["a"]),
    "gzip": (gzip.compress(b'"a"\n'), ["a"]),
    "nothing": ("", []),
}


@in_rows(("content", "expected"), STDIN.values(), ids=STDIN)
def test_standard_input(monkeypatch, content, expected):
    buffer = io.BytesIO(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=buffer))
    prompts = list(read_prompts("-"))
    assert contents(prompts) == expected
    assert all(prompt.where == f"standard input line {prompt.number + 1}" for prompt in prompts)


def test_a_json_array_is_refused(tmp_path):
    (tmp_path / "p.json").write_text('["a",\n "b"]')
    with pytest.raises(UsageError, match=r"JSON array.*jq"):
        next(read_prompts(tmp_path / "p.json"))


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".ndjson"])
@pytest.mark.parametrize(
    ("text", "jq"),
    [
        ('[\n {"prompt": "a"},\n {"prompt": "b"}\n]\n', "jq -c '.[]'"),
        ('[{"prompt": "a"}, {"prompt": "b"}]\n', "jq -c '.[]'"),
        ('{\n "prompt": "a"\n}\n{\n "prompt": "b"\n}\n', "jq -c '.'"),
    ],
)
def test_json_that_is_no_jsonl_is_refused_with_what_helps(tmp_path, suffix, text, jq):
    (tmp_path / f"p{suffix}").write_text(text)
    with pytest.raises(UsageError, match=re.escape(jq)):
        next(read_prompts(tmp_path / f"p{suffix}"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_pipe_is_refused_since_it_can_be_read_only_once(tmp_path):
    os.mkfifo(tmp_path / "p.txt")
    with pytest.raises(UsageError, match=r"p\.txt is not a regular file.*standard input"):
        next(read_prompts(tmp_path / "p.txt"))


def test_a_first_gzip_member_that_is_short(read):
    parts = [b"\xef", b"\xbb", b'\xbf{"prompt"', b': "a"}\n"b"\n']
    assert contents(read("p", b"".join(map(gzip.compress, parts)))) == ["a", "b"]
    assert contents(read("p", gzip.compress(b"a\nb\n") + gzip.compress(b"c")[:-9])) == ["a", "b", "!"]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["no BOM", "BOM"])
def test_a_small_damaged_gzip_keeps_what_came_before(read, mark):
    packer = zlib.compressobj(wbits=31)
    packed = packer.compress(mark + b'"a"\n' * 400) + packer.flush(zlib.Z_FULL_FLUSH) + b"\xff" * 9
    *good, last = read("p.jsonl.gz", packed)
    assert contents(good) == ["a"] * len(good) and len(good) > 250
    assert line_of(last) == len(good) + 1


LONG_STARTS = {
    "JSON string": ("p", '"' + '\\"é' * 3000 + '"\n"b"\n', ['"é' * 3000, "b"]),
    "cut in an escape": ("p", '"' + "\\u00e9" * 3000 + '"\n"b"\n', ["é" * 3000, "b"]),
    "text in quotes": ("p", '"a" ' + "b" * 5000 + "\n", ['"a" ' + "b" * 5000]),
    "JSON object in a .json": ("p.json", '{"prompt": "' + "a" * 5000 + '"}\n"b"\n', ["a" * 5000, "b"]),
    "blank lines": ("p", '\n \n"a"\n"b"\n', ["a", "b"]),
}


@in_rows(("name", "content", "expected"), LONG_STARTS.values(), ids=LONG_STARTS)
def test_a_form_shows_also_where_the_first_line_is_long(read, name, content, expected):
    assert contents(read(name, content)) == expected


@pytest.fixture
def short_lines(monkeypatch):
    """Lines of more than 100,000 bytes are too long, and of more than a million passed over in vain."""
    monkeypatch.setattr(reading, "LINE_MOST", 100_000)
    monkeypatch.setattr(reading, "SKIPPED_MOST", 1_000_000)


LONG = "x" * 100_001
OVERLONG_LINES = {
    "p.txt": (f"a\n{LONG}\nb\n{LONG}", ["a", "!", "b", "!"], [2, 4]),
    "p.jsonl": (f'"a"\n"{LONG}"\n"b"\n', ["a", "!", "b"], [2]),
    "p.csv": (f'prompt\na\n{LONG}\nb\n"c\n{LONG}\n"\nd\n', ["a", "!", "b", "!", "!", "!", "d"], [3, 5, 6, 7]),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", OVERLONG_LINES)
def test_a_line_that_is_too_long_costs_no_other(read, short_lines, name, packed):
    text, expected, lines = OVERLONG_LINES[name]
    prompts = read(name + ".gz" * packed, gzip.compress(text.encode()) if packed else text)
    assert contents(prompts) == expected
    assert [line_of(prompt) for prompt in prompts if prompt.error] == lines
    assert "longer than 64 MiB" in next(prompt for prompt in prompts if prompt.error).error.message


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.csv"])
def test_a_line_without_an_end_is_not_read_into_memory(tmp_path, short_lines, name):
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(b'{"prompt"\n' + b"a" * 30_000_000 + b"\nb\n"))
    tracemalloc.start()
    try:
        prompts = list(read_prompts(tmp_path / f"{name}.gz"))
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    assert [line_of(prompt) for prompt in prompts if prompt.error][-2:] == [2, 3]
    assert prompts[-1].error.message.endswith("ends here: the line before has no end within 0 MiB")


def test_lines_that_are_too_long_are_counted_without_reading_them(tmp_path, short_lines):
    (tmp_path / "p.txt").write_text(f"a\n{LONG}\nb\n")
    args = types.SimpleNamespace(extras=[], limit=None, source=str(tmp_path / "p.txt"), name="p.txt")
    tracemalloc.start()
    try:
        assert progress.count_prompts(args) == 3
        assert tracemalloc.get_traced_memory()[1] < 500_000
    finally:
        tracemalloc.stop()


def test_a_file_that_is_packed_twice_is_no_text(read):
    with pytest.raises(UsageError, match=r"holds binary data|is gzip within gzip"):
        read("p.txt.gz", gzip.compress(gzip.compress(b"a\n" * 1000)))


@pytest.mark.parametrize(("name", "head"), [("p.txt.gz", ""), ("p.csv.gz", "prompt\n")], ids=["text", "CSV"])
@pytest.mark.parametrize("damage", ["cut off", "checksum", "garbage"])
def test_a_damaged_gzip_keeps_what_came_before(read, name, head, damage):
    lines = [f"prompt {number}" for number in range(9000)]
    packer = zlib.compressobj(wbits=31)
    packed = packer.compress((head + "\n".join(lines) + "\n").encode()) + packer.flush(zlib.Z_FULL_FLUSH)
    ends = {"cut off": b"", "checksum": packer.flush()[:-8] + bytes(8), "garbage": b"\xff" * 9}
    *good, last = read(name, packed + ends[damage])
    assert contents(good) == lines[: len(good)] and len(good) > 5000
    assert line_of(last) == len(good) + 1 + bool(head)


@pytest.mark.parametrize("cut", [4, 9], ids=["in the checksum", "before the end of the data"])
def test_json_in_a_text_file_that_is_damaged_is_refused_all_the_same(here, stand_in, capsys, cut):
    (here / "p.txt.gz").write_bytes(gzip.compress(b'{"prompt": "a"}\n{"prompt": "b"}\n', mtime=0)[:-cut])
    server = stand_in()
    assert main(["p.txt.gz", "-b", "stdlib", "-q", "--base-url", server.url]) == 2
    assert "p.txt.gz line 1: the .txt file holds JSON Lines; name it so" in capsys.readouterr().err
    assert server.stats.requests == 0
