"""Feed the program what no test has thought of: python -m tests.fuzz [--inputs N] [--responses N] [--seed S]

Inputs: prompts files of every form, well made, badly made and then damaged. Each is read and compared with a slow and
simple second reader (`Expected`); requests are made of it, answered, written, half lost, continued and finished.
Responses: HTTP answers, well made and then damaged, are given to the stdlib backend in pieces of any size, and to
aiohttp. Where both take an answer it is the same; where only one does, one of `RULES` says why.

Every case follows from the seed and its number. The first that fails is made as small as it can be and printed.
"""

import argparse
import asyncio
import collections
import csv
import dataclasses
import functools
import gzip
import importlib.util
import io
import itertools
import json
import math
import os
import pathlib
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

import concurrent_prompts
from concurrent_prompts import Error, Prompt, PromptError, Result, UsageError, open_journal, read_prompts
from concurrent_prompts.backends import prompts as prompts_file
from concurrent_prompts.backends import stdlib
from concurrent_prompts.backends.api import Api
from tests.backends.test_stdlib import FRAMINGS, MALFORMED, TOKENS, FakeTransport, answer, feed, pieces

SLOW = 20  # seconds after which a case counts as hanging
MAX_BODY = 100_000  # instead of 256 MiB, so that small cases reach it

# ---- Prompts files: making them --------------------------------------------------------------------------------------

TEXTS = [
    *("", " ", "a", "Why?", "é", "☃", "🎉", "two words", '"', '""', 'say "hi"', ",", ";", "\t", "|", "\\", "'", "=1+1"),
    *("{prompt}", "{x}", "{{", "}}", "{", "}", "{0.__class__}", "%s", "../../etc/passwd", "/", "null", "NaN", "-0"),
    *("\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\xa0", "\ufeff", "\0", "\x1b[31m", "\u202e", "\x7f"),
    *("a" * 3000, "\r", "\n", "\r\n", "a\nb", 'a\n"b', "a\r\nb", "\n\n"),
]
BYTES = [
    *(b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\x1f\x8b", b"\xef\xbb\xbf", b"\xff\xfe"),
    *(b"\0", b"\0" * 600, b"\n", b"\r", b"\r\n", b"\n\n", b'"', b'""', b'"""', b'",', b',"', b'","', b'x","y\n', b","),
    *(b"\t", b"\\", b"\\u", b"\\ud800", b"{", b"}", b"[", b"]", b":", b"NaN", b"1e999", b"-", b"null"),
    *(b"[" * 300, b"9" * 5000),
    *(b'{"prompt":', b"\xe2\x80\xa8"),
]
NUMBERS = ["0", "-0", "7", "-1", "1.5", "-0.0", "1e2", "1e999", "NaN", "-Infinity", "9" * 25, "9" * 4300, "9" * 4301]
KEYS = ["prompt", "messages", "input", "id", "custom_id", "body", "url", "method", "lang", "x", "", "text", "error"]
KEYS += ["id", "prompt", "request", "input_text", "input_input_text", "latency", "a b", "\ud800", "prompt\0", "reply"]
URLS = ["/v1/x", "/v1/x", "/v1/\ud800", "/v1/é", "/v1/a b", "/v1/x\r\nHost: y", "/v1/", "/v2/x", "https://x/v1/x", None]
BIG = [
    b"a" * 10_000_000,
    b"[" * 100_000,
    b'{"prompt":' * 100_000,
    b"[" * 201 + b'"' + b'\\"' * 1_000_000,
    b'{"prompt": "' + b"\\u00e9" * 300_000 + b'"}',
    b'x","y\n' * 2000,  # the second reader takes quadratic time
    b'"\n' * 2000,
    b"\n" * 200_000,
]


def json_text(dice: random.Random, depth: int = 0) -> str:
    """Return a JSON value, now and then one that Python would read and nobody should write."""
    kind = dice.randrange(10)
    if kind < 5:
        return json.dumps(dice.choice([*TEXTS, "\ud800", "\udfff\ud83d"]), ensure_ascii=dice.random() < 0.5)
    if kind < 7:
        return dice.choice([*NUMBERS, "true", "null"])
    if kind == 9 and dice.random() < 0.1:
        return "[" * (levels := dice.choice([5, 198, 199, 200, 201, 300])) + "]" * levels
    items = [json_text(dice, depth + 1) for _ in range(dice.randrange(3 if depth < 3 else 1))]
    if kind == 7:
        return f"[{', '.join(items)}]"
    return "{" + ", ".join(f"{json.dumps(dice.choice(KEYS))}: {item}" for item in items) + "}"


def json_line(dice: random.Random) -> bytes:
    """Return a line of JSON Lines: mostly a prompt, mostly sound."""
    text = json.dumps(dice.choice(TEXTS), ensure_ascii=dice.random() < 0.5)
    role = {"role": "user", "content": dice.choice(TEXTS)}
    body = {"model": "m", "messages": [role]}
    line: str = dice.choice([
        lambda: text,
        lambda: f'{{"prompt": {text}}}',
        lambda: f'{{"id": {json_text(dice)}, "prompt": {text}, {json.dumps(dice.choice(KEYS))}: {json_text(dice)}}}',
        lambda: json.dumps({"messages": [role], "id": dice.choice(["x", "y", 7, None])}),
        lambda: json.dumps({"custom_id": dice.choice(["r-1", "r-2"]), "url": dice.choice(URLS), "body": body}),
        lambda: f'{{"custom_id": {json_text(dice)}, "url": {json_text(dice)}, "body": {json_text(dice)}}}',
        lambda: "{" + ", ".join(f"{json.dumps(dice.choice(KEYS))}: {json_text(dice)}" for _ in range(4)) + "}",
        lambda: json_text(dice),
    ])()  # fmt: skip
    return line.encode("utf-8", "surrogatepass").replace(b"\n", b" ")


def csv_line(dice: random.Random, fields: list[str], separator: str) -> bytes:
    """Return a record as a good program would write it."""
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=separator, quoting=dice.choice([0, 1])).writerow(fields)
    return text.getvalue().removesuffix("\r\n").encode()


def file_of(dice: random.Random) -> tuple[str, bytes]:
    """Return the name and the content of a prompts file, in half of the cases damaged somewhere."""
    name = dice.choice(["p.txt", "p.jsonl", "p.jsonl", "p.csv", "p.csv", "p.tsv", "p", "p.json", "P.NDJSON"])
    separator = "\t" if name == "p.tsv" else ","
    count = dice.choice([0, 1, 2, 3, 5, 8, 13])
    if name in ("p.csv", "p.tsv"):
        header = dice.choice(["prompt", "id prompt", "prompt lang", "id input x text", "", "x"]).split(" ")
        lines = [csv_line(dice, header, separator)]
        lines += [csv_line(dice, [dice.choice(TEXTS) for _ in header], separator) for _ in range(count)]
    elif name == "p.txt" or (name == "p" and dice.random() < 0.5):
        lines = [dice.choice(TEXTS).encode().replace(b"\n", b" ") for _ in range(count)]
    else:
        lines = [json_line(dice) for _ in range(count)]
    ending = dice.choice([b"\n", b"\n", b"\r\n"])
    data = dice.choice([b"", b"", b"\xef\xbb\xbf"]) + ending.join(lines) + dice.choice([ending, b""])
    if dice.random() < 0.5:
        data = damaged(dice, data, BYTES)
    if dice.random() < 0.001:
        at = data.find(b"\n", dice.randrange(len(data) + 1)) + 1
        data = data[:at] + dice.choice(BIG) + b"\n" + data[at:]
    if len(data) > 4000 and name in ("p", "p.json"):  # whose form is told by the first 4096 bytes
        name = "p.jsonl"
    return name, data


def damaged(dice: random.Random, data: bytes, tokens: list[bytes]) -> bytes:
    """Return the bytes with one or a few places cut out, doubled, moved or replaced."""
    raw = bytearray(data)
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        at = dice.randrange(len(raw) + 1)
        end = min(len(raw), at + dice.choice((0, 1, 1, 3, 12)))
        here = dice.randrange(len(raw) + 1)
        new = (b"", dice.randbytes(1), dice.choice(tokens), dice.choice(tokens), raw[at:end] * 2, raw[here : here + 30])
        raw[at : dice.choice((at, end))] = dice.choice(new)
    return bytes(raw)


# ---- Prompts files: what should be read ------------------------------------------------------------------------------

BAD = object()  # a line that cannot be read
BLANK = re.compile(r"\s*")


class Refused(Exception):
    """The file as a whole cannot be used."""


def expected(name: str, data: bytes) -> list[tuple[int, Any]]:
    """Return the line number and the value, or BAD, of each row, by a reader that is slow and simple."""
    start = data[:4096].removeprefix(b"\xef\xbb\xbf")  # by which the form is told
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or (b"\n" not in data[:4096] and b"\r" in data[:4096].rstrip(b"\r")):
        raise Refused
    data = data.removeprefix(b"\xef\xbb\xbf")
    form = pathlib.PurePath(name.lower()).suffix
    if form in (".csv", ".tsv"):
        return expected_table(data, "\t" if form == ".tsv" else ",")
    line, whole, _ = start.lstrip().partition(b"\n")
    sound, alone = parsed(line) is not BAD, line.strip() in (b"[", b"{")
    if form != ".txt" and (line[:1] == b"[" or (line[:1] == b"{" and whole)):  # one value over several lines?
        array = line[:1] == b"[" and (alone or sound or not whole or form == ".json")
        if form and (array or (line[:1] == b"{" and (not sound if form == ".json" else alone))):
            raise Refused
    is_json = form in (".jsonl", ".ndjson") or line[:1] == b"{"
    is_json = (is_json or (line[:1] == b'"' and isinstance(parsed(line), str))) and form != ".txt"
    rows = []
    for number, line in enumerate(data.split(b"\n"), 1):
        try:
            text = line.decode().rstrip("\r\n")
        except UnicodeDecodeError:
            rows.append((number, BAD))
            continue
        if not is_json and "\r" in text:
            rows.append((number, BAD))
        elif text.strip():
            rows.append((number, strictly_parsed(text) if is_json else text))
    return rows


def parsed(line: bytes) -> Any:
    """Return the JSON value in a line, or BAD."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return BAD


def strictly_parsed(text: str) -> Any:
    """Return the JSON value, or BAD where it is none that can be written again."""

    def number(text: str) -> float:
        assert math.isfinite(float(text)), "a ValueError would do"
        return float(text)

    try:
        value = json.loads(text.strip(), parse_float=number, parse_constant=lambda name: number("nan"))
    except (ValueError, RecursionError, AssertionError):
        return BAD
    depth = deepest = 0
    for bracket in re.sub(r"[^\[\]{}]", "", re.sub(r'"[^"]*"', "", text.replace("\\\\", "").replace('\\"', ""))):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return BAD if deepest > 200 else value


def expected_table(data: bytes, usual: str) -> list[tuple[int, Any]]:
    """Return the same for a table: each record is matched by a regular expression from the start of its line."""
    text = data.decode(errors="surrogateescape")
    lines = re.findall(r"[^\n]*\n|[^\n]+", text)
    blank = len([*itertools.takewhile(lambda line: not line.strip(" \t\r\n\x0b\x0c"), lines)])
    first = lines[blank] if blank < len(lines) else ""
    told = re.fullmatch(r'"?sep=([,;|\t])"?\s*', first, re.IGNORECASE)  # Excel's own line before the header
    separator, blanks = (told[1], "") if told else separator_of(first, usual)
    number = blank + bool(told)
    at = len("".join(lines[:number]))
    before, bare = " *+" if blanks else "", rf'[^{separator}\r\n"][^{separator}\r\n]*+'
    field = re.compile(rf'{before}(?:"((?:[^"]|"")*+)"|((?:{bare})?))')
    end = re.compile(r"\r*+(?:\n|\Z)")
    header: list[str] | None = None
    rows: list[tuple[int, Any]] = []
    while at < len(text):
        number += 1
        line_end = text.find("\n", at) + 1 or len(text)
        if text[at:line_end].isascii() and not text[at:line_end].strip(" \t\r\n\x0b\x0c"):
            at = line_end
            continue
        record: Any = []
        here = at
        while match := field.match(text, here):
            record.append(match[2] if match[1] is None else match[1].replace('""', '"'))
            here = match.end()
            if text[here : here + 1] != separator:
                break
            here += 1
        after = end.match(text, here)
        if after is None:
            record, after_line = BAD, line_end
        else:
            after_line = after.end()
        if header is None:
            header = readable_header(record)
        elif record is BAD or any(map(has_surrogates, record)):
            rows.append((number, BAD))
        elif set("".join(record)) - set(",;\t| "):  # it is not empty
            columns = zip(header, (value.rstrip() if blanks == "  " else value for value in record), strict=False)
            rows.append((number, dict(columns) if len(record) == len(header) else BAD))
        number += text.count("\n", at, after_line - 1)
        at = after_line
    return rows


def separator_of(line: str, usual: str) -> tuple[str, str]:
    """Return what separates the columns in a header, and the blanks that come with it: " " after it, "  " around it."""
    bare = re.sub(r'"[^"]*"', "", line)
    counts = {one: bare.count(one) for one in ",;\t|"}
    most = [one for one in counts if counts[one] == max(counts.values())]
    best = usual if usual in most else most[0]
    if not counts[best]:
        return usual, ""
    first, *rest = bare.split(best)
    if not all(part[:1] == " " for part in rest):
        return best, ""
    return best, "  " if all(part[-1:] == " " for part in [first, *rest[:-1]]) else " "


def readable_header(record: Any) -> list[str]:
    """Return the columns' names where the header has them."""
    if record is BAD or any(map(has_surrogates, record)) or (len(record) == 1 and record[0][:1] == "#"):
        raise Refused
    names = [name.strip() for name in record]
    unnamed = [place for place, name in enumerate(names) if not name][1:]
    names = [f"column {place + 1}" if place in unnamed else name for place, name in enumerate(names)]
    if len(set(names)) < len(names):
        raise Refused
    return names


def has_surrogates(text: str) -> bool:
    """Tell whether a field was not UTF-8."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def expected_prompt(line: int, row: Any) -> tuple[Any, ...]:
    """Return line, whether it can be read, id, content and columns of the prompt that a row is."""
    unreadable = (line, False, line, None, None)
    if isinstance(row, str):
        return line, True, line, row, {}
    if not isinstance(row, dict):
        return unreadable
    batch = "custom_id" in row and "body" in row
    given = row["custom_id"] if batch else row.get("id")
    if given is None or given == "":
        if batch and given is None:
            return unreadable
        given = line if not batch else given
    if type(given) not in (str, int):
        return unreadable
    if batch:
        return line, True, given, row, {}
    kind = next((key for key in ("prompt", "messages", "input") if key in row), None)
    columns = {key: value for key, value in row.items() if key not in ("id", kind)}
    return line, True, given, row.get(kind), columns


# ---- Prompts files: the checks ---------------------------------------------------------------------------------------


def read(path: pathlib.Path) -> list[Prompt]:
    """Read a file of prompts."""
    prompts = list(read_prompts(path))
    for number, prompt in enumerate(prompts):
        assert prompt.number == number, "numbers have gaps"
        line = int(prompt.where.removeprefix(f"{path} line "))
        assert number == 0 or line > line_of(prompts[number - 1], path), "lines are out of order"
        if prompt.error:
            check_error(prompt)
    return prompts


def line_of(prompt: Prompt, path: pathlib.Path) -> int:
    """Return the line of its file that a prompt stood in."""
    return int(prompt.where.removeprefix(f"{path} line "))


def check_error(prompt: Prompt) -> None:
    """Check that an error names file, line and reason on one line, and is none of Python's."""
    assert prompt.error is not None
    where, _, reason = prompt.error.message.partition(": ")
    assert where == prompt.where and reason.strip(), f"no reason: {prompt.error}"
    assert len(prompt.error.message.splitlines()) == 1 and len(reason) < 1000, f"not one line: {prompt.error}"
    assert "object has no attribute" not in reason and "codec can't" not in reason, reason


def check_file(folder: pathlib.Path, name: str, data: bytes, dice: random.Random) -> str:
    """Read a file, compare with what is expected of it and run it; return what became of it."""
    packing = dice.choice([*("plain", "plain", "gzip", "members"), dice.choice(["cut", "garbage", "flipped"])])
    stored = packed(dice, data, packing)
    path = folder / (name + dice.choice(["", "", ".gz"]))
    path.write_bytes(stored)
    if packing == "plain" and stored[:2] == b"\x1f\x8b":
        packing = "cut"  # the damage has made it look like gzip
    try:
        rows = expected(name, data)
    except Refused:
        rows = None
    try:
        prompts = read(path)
    except UsageError as refusal:
        assert str(path) in str(refusal) and len(str(refusal).splitlines()) == 1, f"unclear: {refusal}"
        fair = rows is None or b"\0" in data[:4096] or packing not in ("plain", "gzip", "members")
        assert fair, f"refused for no reason: {refusal}"
        return "input refused"
    found = [(line_of(p, path), p.error is None, p.id, None if p.error else p.content, None if p.error else p.columns)
             for p in prompts]  # fmt: skip
    if packing in ("plain", "gzip", "members"):
        assert rows is not None, "a file was read that should have been refused"
        wanted = [expected_prompt(*row) for row in rows]
        for mine, theirs in itertools.zip_longest(found, wanted):
            assert repr(mine) == repr(theirs), f"read {mine!r:.300}, expected {theirs!r:.300}"
    elif rows is not None and packing != "flipped":
        compare_up_to_damage(found, [expected_prompt(*row) for row in rows], table=name in ("p.csv", "p.tsv"))
    check_run(folder, prompts, dice)
    return "input read" if all(prompt.error is None for prompt in prompts) else "input read, with bad rows"


def packed(dice: random.Random, data: bytes, packing: str) -> bytes:
    """Return the file as it is stored."""
    if packing == "plain":
        return data
    middle = dice.randrange(len(data) + 1) if packing == "members" else len(data)
    members = [data[:middle], data[middle:]] if middle < len(data) else [data]
    whole = b"".join(gzip.compress(member, 1, mtime=0) for member in members)
    at = dice.randrange(2, len(whole))
    if packing == "cut":
        return whole[:at]
    if packing == "flipped":
        return whole[:at] + bytes([whole[at] ^ 1 << dice.randrange(8)]) + whole[at + 1 :]
    return whole + b"garbage" * (packing == "garbage")


def compare_up_to_damage(found: list[Any], wanted: list[Any], table: bool) -> None:
    """Check a file that ends before its time: the rows above are as ever, and the last says that it ends here."""
    assert found and found[-1][1] is False, "the damage is not reported"
    end = found[-1][0]
    above = [row for row in wanted if row[0] < end]
    if not table:  # in a table the last record may have been cut, and then its lines are rows of their own
        assert repr(found[:-1]) == repr(above), f"lost above the damage: {found!r:.300}, expected {above!r:.300}"
    for mine, theirs in zip(found[:-1], above, strict=False):
        if repr(mine) != repr(theirs):
            assert table and not mine[1], f"read {mine!r:.300}, expected {theirs!r:.300}"
            break


HOSTILE_LINES = {
    "p.txt": [b"\xff", b"\xc3", b"\r", b"a\rb", b"\xe2\x80\xa8", b'"', b"{"],
    "p.jsonl": [b"{", b'"', b"[" * 300, b"NaN", b"9" * 5000, b"\xff", b'{"prompt": 1', b"{}", b"[]", b'\xef\xbb\xbf""'],
    "p.csv": [b'"', b'"a', b'a,"', b'x","y', b'"a"b', b'"""', b'a,"b""', b"\xff,a", b"a\rb", b"a", b",,,", b'"a" '],
}
GOOD_TEXTS = [text for text in TEXTS if text.strip() and not set(text) & set("\r\0\ufeff")]


def check_neighbours(folder: pathlib.Path, lines: list[tuple[bytes, str | None]], name: str) -> str:
    """Check that the good lines are all read, wherever the hostile ones (None) stand."""
    head = [b"prompt,n"] if name == "p.csv" else []
    path = folder / name
    path.write_bytes(b"".join(line + b"\n" for line in [*head, *(line for line, _ in lines)]))
    found = {line_of(prompt, path): prompt.content for prompt in read(path) if prompt.error is None}
    number = 1 + len(head)
    for line, content in lines:
        if content is not None:
            read_as = found.get(number)
            assert read_as == content, f"line {number}, {content!r}, was lost or read as {read_as!r}"
        number += line.count(b"\n") + 1
    return "neighbours kept"


def good_and_hostile(dice: random.Random, name: str) -> list[tuple[bytes, str | None]]:
    """Return lines of which some are good, with their content, and others are not, with None."""
    lines: list[tuple[bytes, str | None]] = []
    for n in range(dice.randrange(1, 9)):
        text = dice.choice(GOOD_TEXTS)
        if dice.random() < 0.4:
            hostile = dice.choice(HOSTILE_LINES[name])
            if name == "p.csv" and b'"' in hostile and any(line is None for _, line in lines):
                continue  # two might pass for the two quotes of one field
            if name == "p.jsonl" and hostile in (b"[]", b"{") and not lines:
                continue  # a file that begins so is refused: it holds one value, not one a line
            lines.append((hostile, None))
        elif name == "p.csv":
            lines.append((csv_line(dice, [text, str(n)], ","), text))
        elif name == "p.jsonl":
            lines.append((json.dumps({"prompt": text}, ensure_ascii=False).encode(), text))
        elif "\n" not in text:
            lines.append((text.encode(), text))
    return lines


def apis() -> list[Api]:
    """Return an API for each way to make requests."""
    templates = [None, "", "{prompt}", "{{{x}}} {prompt} {lang}", "{\ud800}"]
    made = [Api(None, base_url="http://test/v1", template=template) for template in templates]
    made += [Api(None, base_url="http://test/v1", system="{s}", params={"n": 1}, model="m", endpoint="responses")]
    return made + [Api(None, base_url="http://test/v1?a=b", endpoint=name) for name in ("completions", "embeddings")]


APIS = apis()
DEEP = json.loads("[" * 900 + "]" * 900)
ANSWERS: list[dict[str, Any]] = [
    {"text": "Yes."},
    {"text": "\ud800 \u2028\x85\0\x1b\n\r"},
    {"text": None, "extra": {"embedding": [1.5, float("nan")]}},
    {"text": "", "usage": {"total_tokens": float("inf"), "x": "\udfff"}},
    {"text": "a", "extra": {"reply": DEEP}, "finish_reason": "\ud800", "model": {"x": float("-inf")}},
    {"error": Error("http_500", "no \u2028 \ud800", 500, True)},
    {"error": Error("no_answer", "", 200, True)},
]


def check_run(folder: pathlib.Path, prompts: list[Prompt], dice: random.Random) -> None:
    """Answer the prompts in three runs, of which the first is killed, and check each line that is written."""
    api = dice.choice(APIS)
    for prompt in prompts:
        api.prepare(prompt)
        assert (prompt.error is None) == bool(prompt.body), "neither a request nor an error, or both"
        if prompt.error:
            check_error(prompt)
        else:
            strictly(prompt.body)
            assert re.fullmatch("/[!-~]*", prompt.path), f"no path for a request line: {prompt.path!r}"
            if isinstance(prompt.content, str) and api.template in (None, "{prompt}"):
                assert repr(prompt.content) in repr(json.loads(prompt.body)), f"{prompt.content!r} is not what is sent"
    path = folder / "p.results.jsonl"
    path.unlink(missing_ok=True)
    seed = dice.random()  # requests that are the same get the same answer
    dices = [random.Random(f"{seed} {key(prompt)}") for prompt in prompts]
    results = list(map(answer_to, prompts, dices))
    begun = dice.sample(results, dice.randrange(len(results) + 1))
    with open_journal(path) as journal:
        list(journal.left(prompts))
        for result in begun:
            journal.append(result)
    if begun and dice.random() < 0.5:  # the last line was being written
        os.truncate(path, path.stat().st_size - dice.randrange(2, len(begun.pop().as_line()) + 1))
    continue_run(path, prompts, results, begun, finish=dice.random() < 0.5)
    continue_run(path, prompts, results, results, finish=True)
    rows = [strictly(line) for line in path.read_bytes().splitlines(keepends=True)]
    for prompt, row in itertools.zip_longest(prompts, rows):
        assert repr(row["id" if "request" in row else "custom_id"]) == repr(prompt.id), "wrong id"
    assert not list(folder.glob("*superseded*")), "answers were set aside"


def key(prompt: Prompt) -> str:
    """Return what a prompt's answer is recognised by."""
    return concurrent_prompts.fingerprint(prompt)[:16]


def continue_run(
    path: pathlib.Path, prompts: list[Prompt], results: list[Result], done: list[Result], finish: bool
) -> None:
    """Do a run after one that has done some of the work; check that it asks the rest and nothing else."""
    with open_journal(path) as journal:
        left = list(journal.left(prompts))
        kept = sum(result.error is None for result in done)
        assert journal.kept == kept, f"{journal.kept} of {kept} answers recognised"
        again = collections.Counter(key(prompt) for prompt in left if prompt.error is None)
        rest = collections.Counter(key(prompt) for prompt in prompts if prompt.error is None)
        rest.subtract(key(result.prompt) for result in done if result.prompt.error is None)
        assert again == +rest, "asks what is answered, or not what is open"
        for prompt in left:
            journal.append(results[prompt.number])
        if finish:
            journal.finish()


def answer_to(prompt: Prompt, dice: random.Random) -> Result:
    """Return a result with an answer such as servers give."""
    result = Result(prompt, error=prompt.error) if prompt.error else Result(prompt, **dice.choice(ANSWERS))
    if prompt.kind == "batch" and not prompt.error:
        failed = result.error is not None
        result.http = dice.choice([None, (500, "x", None)]) if failed else (200, "\ud800", {"x": [float("nan")]})
    row = strictly(result.as_line())
    if prompt.kind == "batch":
        assert repr(row["custom_id"]) == repr(prompt.id), "wrong id"
    else:
        assert repr(row["id"]) == repr(prompt.id) and (row["error"] is None) == (result.error is None)
        alone = dataclasses.replace(result, prompt=dataclasses.replace(prompt, columns={})).as_row()
        assert len(row) == len(alone) + len(prompt.columns), "a column was lost"
    return result


def strictly(line: bytes) -> Any:
    """Return the value of one line of JSON, strictly."""

    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is no JSON")

    assert line.count(b"\n") <= 1 and b"\n" not in line[:-1], "more than one line"
    return json.loads(line.decode("utf-8", "strict"), parse_constant=refuse)


# ---- Responses -------------------------------------------------------------------------------------------------------

BOMB = gzip.compress(b"\0" * 2_000_000, mtime=0)
SAMPLES = [raw for raw, *_ in FRAMINGS.values() if len(raw) < 3000] * 4
NO_ANSWERS = {raw for raw, _ in MALFORMED.values() if len(raw) < 3000}
SAMPLES += sorted(NO_ANSWERS)
PARTS = [*TOKENS, BOMB, b"Content-Encoding: deflate\r\n", b"Transfer-Encoding: chunked\r\n\r\n", b"HTTP/1.0 "]
PARTS += [b"Content-Length: %d\r\n" % n for n in (0, 2, 99_999, 100_001, 10**17)]
PARTS += [b"186a1\r\n", b"5\r\nhello\r\n", b"%", b"\x0b"]
WAITS = [*NUMBERS, "inf", "1_0", "", "soon", "Fri, 31 Dec 9999 23:59:59 GMT", "Fri, 31 Dec 0000 23:59:59 GMT"]
WAITS += ["Fri, 31 Dec 9999 23:59:59 -0000", "Mon, 1 Jan 0001 00:00:00 -0000"]
WAITS += ["Fri", "Fri, 31 Dec 99999 23:59:59 GMT", "Fri, 31 Dec 9999 23:59:59 -2359", "1 Jan 1 0:0 +9999"]
ENDLESS = [b"X: y\r\n", b"x", b"\r\n", b"0", b"1\r\nx\r\n", b"3e8\r\n%b\r\n" % (b"x" * 1000)]
ENDLESS += [b"HTTP/1.1 100 Continue\r\n\r\n"]
WORDS = ["choices", "message", "content", "text", "finish_reason", "usage", "model", "output", "type", "data"]
WORDS += ["embedding", "error", "code", "status", "detail", "msg", "tool_calls", "refusal", "incomplete_details"]
WORDS += ["reason", "id"]


def response_of(dice: random.Random) -> bytes:
    """Return the bytes of an answer; most are damaged."""
    raw = dice.choice(SAMPLES)
    if dice.random() < 0.3:
        body = json_body(dice).encode("utf-8", "surrogatepass")
        status = dice.choice(["200 OK", "200 OK", "200 OK", "400 x", "404 x", "429 x", "500 x", "302 x", "529 "])
        raw = answer(body, status, f"{dice.choice(['Retry-After', 'retry-after-ms'])}: {dice.choice(WAITS)}")
    elif dice.random() < 0.2:
        other = dice.choice(SAMPLES)
        raw = raw[: dice.randrange(len(raw) + 1)] + other[dice.randrange(len(other) + 1) :]
    return damaged(dice, raw, PARTS) if dice.random() < 0.7 else raw


def json_body(dice: random.Random, depth: int = 0) -> str:
    """Return a JSON value that looks like an API's reply, or like none."""
    if depth > 4 or dice.random() < 0.15:
        return json_text(dice, 3) if dice.random() < 0.99 else "[" * 100_000
    if dice.random() < 0.3:
        return f"[{', '.join(json_body(dice, depth + 1) for _ in range(dice.choice((0, 1, 1, 2))))}]"
    reply = {
        "choices": '[{"message": {"content": %s}, "finish_reason": %s}]',
        "output": '[{"type": "message", "content": [{"text": %s}]}, {"type": %s}]',
        "data": '[{"embedding": [%s]}, {"embedding": %s}]',
        "error": '{"message": %s, "code": %s}',
    }
    if depth == 0 and dice.random() < 0.7:
        name = dice.choice(list(reply))
        extra = f', "{dice.choice(WORDS)}": {json_body(dice, 2)}' if dice.random() < 0.5 else ""
        return f'{{"{name}": {reply[name] % (json_body(dice, 4), json_body(dice, 4))}{extra}}}'
    items = (f'"{dice.choice(WORDS)}": {json_body(dice, depth + 1)}' for _ in range(dice.randrange(4)))
    return f"{{{', '.join(items)}}}"


class Wire(FakeTransport):
    """What aiohttp's protocol needs of a transport besides."""

    def close(self) -> None:
        self.closed = True

    def pause_reading(self) -> None:
        """Not possible: all that there is comes at once."""

    resume_reading = pause_reading

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default


async def by_aiohttp(raw: bytes) -> Any:
    """Return what aiohttp makes of an answer: status, header lines and body, or its error as a text."""
    from aiohttp.client_proto import ResponseHandler

    protocol, wire = ResponseHandler(asyncio.get_running_loop()), Wire()
    protocol.connection_made(wire)  # type: ignore[arg-type]
    protocol.set_response_params(read_until_eof=True)
    try:
        protocol.data_received(raw)
        reading = asyncio.ensure_future(aiohttp_answer(protocol))
        await asyncio.sleep(0)
        protocol.eof_received()
        protocol.connection_lost(None)
        return await asyncio.wait_for(reading, SLOW)
    except TimeoutError:
        raise AssertionError("aiohttp hangs") from None
    except Exception as failure:  # whatever it raises is a refusal
        return f"{type(failure).__name__}: {failure}"


async def aiohttp_answer(protocol: Any) -> Any:
    """Wait for the answer as aiohttp's client does."""
    message, payload = await protocol.read()
    while 100 <= message.code < 200 and message.code != 101:
        message, payload = await protocol.read()
    headers: dict[str, str] = {}
    for name, value in message.headers.items():
        headers.setdefault(name.lower(), value.encode("utf-8", "surrogateescape").decode("latin-1"))
    return message.code, headers, await payload.read()


# Where one of the two refuses, what it says must be in this list. Each line is a decision.
STDLIB_IS_STRICTER = {
    "unknown transfer coding": "RFC 9112, 7: a coding that is not known cannot be undone; aiohttp takes it as it came",
    "malformed header line": "no bare line feeds, folded lines and control characters: they hide what an answer means",
    "not an HTTP/1.1 answer": "the same in the status line",
    "malformed trailer line": "the same in trailers",
    "bad chunk size": "the same in chunks",
    "a chunk is longer": "the same after chunks",
    "more than 100 ": "its limits are lower: header and trailer lines, gzip members",
    "the body is longer": "aiohttp itself has no such limit; the raw-aiohttp backend adds it",
    "1000 interim answers": "aiohttp reads them for ever",
    "content coding that was not requested": "aiohttp hands out a body that is still coded",
    "the gzip body was cut short": "aiohttp hands out what there is",
    "the deflate body was cut short": "aiohttp hands out what there is",
    "the body is not x-gzip": "aiohttp knows no x-gzip and hands it out as it came",
    "the x-gzip body was cut short": "aiohttp knows no x-gzip and hands it out as it came",
}
AIOHTTP_IS_STRICTER = {
    r"Transfer-Encoding can't be present": "RFC 9112, 6.3: chunked wins, and the connection is closed",
    r"Invalid HTTP version": "RFC 9110, 2.5: 1.2 and the like are to be taken for 1.1",
    r"chunk extension": "an extension means nothing, whatever it holds",
    r"Got more than 8190 bytes": "its limit of a line is lower",
}


def own_bytes(raw: bytes) -> bytes:
    """Return the bytes up to where the stdlib backend has its answer: aiohttp parses on, and minds what comes after."""
    enough, short = len(raw), 0
    while enough - short > 1:
        middle = (enough + short) // 2
        enough, short = (middle, short) if settled(raw[:middle]) else (enough, middle)
    return raw[:enough]


def settled(raw: bytes) -> bool:
    """Tell whether the stdlib backend needs no more than these bytes."""
    try:
        feed([raw], end=False)
    except AssertionError:
        return False
    return True


async def check_response(raw: bytes) -> str:
    """Give an answer to the stdlib backend in pieces, and to aiohttp; return what became of it."""
    dice = random.Random(raw[:100])
    mine, reusable = feed([raw])
    again = feed(list(pieces(raw, dice)))
    both_fail = isinstance(mine, str) and isinstance(again[0], str)
    assert both_fail or again == (mine, reusable), f"differs when it is split: {mine!r:.200} {again!r:.200}"
    assert raw not in NO_ANSWERS or isinstance(mine, str), "an answer was made of what is none"
    if isinstance(mine, str):
        assert not reusable, "a connection is used again after an error"
        assert len(mine) < 300 and mine.isprintable(), f"unfit for a message: {mine!r}"
    elif reusable:
        cut, _ = feed([raw[: dice.randrange(len(raw))]])
        assert isinstance(cut, str), "a part of an answer was taken for the whole"
        after, kept = feed([raw, b"HTTP/1.1 200 OK\r\n"])
        assert after == mine and not kept, "what came after an answer is taken for the next"
    if dice.random() < 0.02:
        endless = dice.choice(ENDLESS)
        begun = raw[: dice.choice([raw.find(b"\n", dice.randrange(len(raw) + 1)) + 1, len(raw)])]
        feed([begun + endless * (2_500_000 // len(endless))], end=False)  # asserts that there is an end
    if not isinstance(mine, str):
        check_reading(mine)
    if not AIOHTTP:
        return "response refused" if isinstance(mine, str) else "response answered"
    theirs = await by_aiohttp(raw)
    if isinstance(theirs, str) and not isinstance(mine, str):
        theirs = await by_aiohttp(own_bytes(raw))
    return compare(raw, mine, theirs)


def compare(raw: bytes, mine: Any, theirs: Any) -> str:
    """Check that two answers are the same, or that the list says why there is only one."""
    if re.search(rb"chunked[ \t]*\t", raw, re.IGNORECASE):
        return "response not compared"  # aiohttp knows no tab after the value
    if isinstance(mine, str):
        known = isinstance(theirs, str) or any(mine.startswith(rule) for rule in STDLIB_IS_STRICTER)
        if mine.endswith("in the middle of its answer"):  # to aiohttp such a trailer or line is an end
            known |= re.search(rb"\n0.*transfer-encoding|[ \t\r]\r\n", raw, re.DOTALL | re.IGNORECASE) is not None
        assert known, f"only aiohttp answers: {theirs!r:.200}; stdlib says: {mine}"
        return "response refused by both" if isinstance(theirs, str) else "response refused by stdlib alone"
    if isinstance(theirs, str):
        known = any(re.search(rule, theirs) for rule in AIOHTTP_IS_STRICTER)
        if mine[0] in (204, 304) or "transfer-encoding" in mine[1] or raw[9:10] == b"1":  # it means nothing there
            known |= "Content-Length" in theirs
        if raw[9:10] == b"1":  # aiohttp gives an interim answer the body that its length speaks of
            known |= "Bad status line" in theirs
        assert known, f"only stdlib answers: {mine!r:.200}; aiohttp says: {theirs}"
        return "response refused by aiohttp alone"
    coded = mine[1].get("content-encoding", "").lower() == "x-gzip"  # aiohttp hands that out as it came
    assert mine[:2] == theirs[:2] and (coded or mine[2] == theirs[2]), f"{mine!r:.200} is not {theirs!r:.200}"
    return "response answered alike"


def check_reading(reply: tuple[int, dict[str, str], bytes]) -> None:
    """Check that the core makes an answer or a PromptError of whatever came, and one line of either."""
    for prompt in PROMPTS:
        result = Result(prompt)
        try:
            result.take(APIS[0].read(prompt, *reply))
        except PromptError as failure:
            result.error, result.http = failure.error, failure.http
            assert failure.wait is None or 0 < failure.wait < math.inf
            assert str(failure).isprintable(), f"unfit for a message: {failure}"
        strictly(result.as_line())


PROMPTS = [Prompt(0, "a", path=path, body=b"{}") for path in (*prompts_file.ENDPOINTS.values(), "/other")]
PROMPTS.append(Prompt(0, "a", id="r-1", kind="batch", path="/chat/completions", body=b"{}"))
AIOHTTP = importlib.util.find_spec("aiohttp") is not None



# ---- The loop --------------------------------------------------------------------------------------------------------

Payload = bytes | list[Any]
Check = Callable[[Any], Awaitable[str]]


def input_case(dice: random.Random, folder: pathlib.Path) -> tuple[Payload, Check]:
    """Return a prompts file and how to check it."""
    seed = dice.random()
    if dice.random() < 0.2:
        name = dice.choice(list(HOSTILE_LINES))

        async def check_lines(lines: Any) -> str:
            return check_neighbours(folder, lines, name)

        return good_and_hostile(dice, name), check_lines
    name, data = file_of(dice)

    async def check_bytes(data: Any) -> str:
        return check_file(folder, name, data, random.Random(seed))

    return data, check_bytes


def response_case(dice: random.Random, folder: pathlib.Path) -> tuple[Payload, Check]:
    """Return a response and how to check it."""
    return response_of(dice), check_response


class Hanging(BaseException):
    """A case takes too long. No code of the program's may catch this."""


def hang(*signal: Any) -> None:
    """Called when the alarm goes off."""
    raise Hanging


async def trouble(payload: Payload, check: Check, outcomes: collections.Counter[str]) -> str:
    """Check a case; return what is wrong, or ''."""
    if hasattr(signal, "alarm"):
        signal.alarm(SLOW)
    try:
        outcomes[await check(payload)] += 1
    except (Exception, Hanging):
        return traceback.format_exc(limit=-4)
    return ""


async def smallest(payload: Payload, check: Check) -> Payload:
    """Return what is left of a failing case when nothing more can be left out of it."""
    size = len(payload) // 2
    tries = 2000
    while size and tries:
        for at in range(0, len(payload), size):
            less = payload[:at] + payload[at + size :]  # type: ignore[operator]
            tries -= 1
            if tries and await trouble(less, check, collections.Counter()):
                payload = less
                break
        else:
            size //= 2
    return payload


async def fuzz(make: Any, count: int, seed: int, end: float, outcomes: collections.Counter[str]) -> bool:
    """Check so many cases; print the first that fails, made small, and return False."""
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as name:
        for number in range(count):
            if time.monotonic() > end:
                break
            payload, check = make(random.Random(f"{seed}/{number}"), pathlib.Path(name))
            if await trouble(payload, check, outcomes):
                payload = await smallest(payload, check)
                print(await trouble(payload, check, collections.Counter()) or "not every time")
                print(f"seed {seed}, {make.__name__} {number}: {payload!r:.2000}")
                return False
    return True


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").partition("\n")[0])
    option = functools.partial(parser.add_argument, type=int, metavar="N", help="default: %(default)s")
    option("--inputs", default=100_000)
    option("--responses", default=100_000)
    option("--seed", default=1)
    option("--seconds", type=float, metavar="S", default=math.inf, help="stop after this time")
    args = parser.parse_args()
    stdlib.MAX_BODY = MAX_BODY
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGALRM, hang)
    os.fsync = lambda file: None  # no power cut is tried here
    began = time.monotonic()
    outcomes: collections.Counter[str] = collections.Counter()
    passed = True
    for make, count, share in ((input_case, args.inputs, 0.5), (response_case, args.responses, 1.0)):
        passed &= asyncio.run(fuzz(make, count, args.seed, began + share * args.seconds, outcomes))
    counts = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(outcomes.items()))
    print(f"seed {args.seed}, {time.monotonic() - began:.0f} s: {counts}" + ("" if passed else ": FAILED"))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
