"""Prompts files of every kind, and the requests that are made of them."""

import gzip
import json
import re

import pytest

from concurrent_prompts import (
    Prompt,
    UsageError,
    as_prompts,
    load_backend,
    read_prompts,
)
from concurrent_prompts.backends.api import Api
from tests.helpers import contents, in_rows, line_of

CHAT = "/chat/completions"


def api(**settings):
    return Api(None, base_url="http://test/v1", **settings)


# ---- Forms ---------------------------------------------------------------------------------------------------

FORMS = {
    "text": ("p.txt", "a\nb\n", ["a", "b"]),
    "no newline at the end": ("p.txt", "a\nb", ["a", "b"]),
    "CRLF": ("p.txt", "a\r\nb\r\n", ["a", "b"]),
    "blank lines": ("p.txt", "\na\n\n  \t\nb\n\n", ["a", "b"]),
    "spaces are kept in text": ("p.txt", "  a \n", ["  a "]),
    "other line separators are text": ("p.txt", "a\u2028b\x0cc\x85d\n", ["a\u2028b\x0cc\x85d"]),
    "text that looks like JSON": ("p.txt", '{"prompt": "a"}\n"b"\n', ['{"prompt": "a"}', '"b"']),
    "BOM": ("p.txt", b"\xef\xbb\xbfa\n", ["a"]),
    "only a BOM": ("p.txt", b"\xef\xbb\xbf", []),
    "empty": ("p.txt", "", []),
    "NUL far into a text": ("p.txt", b"a\n" * 9000 + b"b\0c\n", ["a"] * 9000 + ["b\0c"]),
    "NUL": ("p.txt", "a\0 and more\n" + "é" * 3000, ["a\0 and more", "é" * 3000]),
    "JSON strings and objects": ("p.jsonl", '"a"\n{"prompt": "b"}\n  {"input": "c"}  \n', ["a", "b", "c"]),
    "JSON messages": ("p.jsonl", '{"messages": [{"role": "user"}]}', [[{"role": "user"}]]),
    "JSON with BOM, CRLF, blank lines": ("p.jsonl", b'\xef\xbb\xbf"a"\r\n\r\n"b"\r\n', ["a", "b"]),
    "ndjson": ("p.ndjson", '"a"\n', ["a"]),
    "upper-case suffix": ("P.JSONL", '"a"\n', ["a"]),
    "prompt before messages before input": ("p.jsonl", '{"input": "c", "messages": [], "prompt": "a"}', ["a"]),
    "CSV": ("p.csv", "lang,prompt\nde,a\nfr,b\n", ["a", "b"]),
    "CSV with BOM and CRLF": ("p.csv", b"\xef\xbb\xbfprompt\r\na\r\n\r\nb\r\n", ["a", "b"]),
    "CSV blank lines before the header": ("p.csv", "\n\nprompt\na\n", ["a"]),
    "CSV quotes": ("p.csv", 'prompt,x\n"a ""b"", c",1\n"d\ne",2\n', ['a "b", c', "d\ne"]),
    "CSV with a large field": ("p.csv", "prompt\n" + "a" * 200_000 + "\n", ["a" * 200_000]),
    "CSV, only a header": ("p.csv", "prompt\n", []),
    "TSV": ("p.tsv", "x\tprompt\n1,5\ta, b\n", ["a, b"]),
    "unknown suffix, text": ("p.md", "a\nb\n", ["a", "b"]),
}


@in_rows("packed", [False, True], ids=["plain", "gzip"])
@in_rows(("name", "content", "expected"), FORMS.values(), ids=FORMS)
def test_forms(read, name, content, expected, packed):
    content = content if isinstance(content, bytes) else content.encode()
    prompts = read(name + ".gz", gzip.compress(content)) if packed else read(name, content)
    assert contents(prompts) == expected
    assert [prompt.number for prompt in prompts] == list(range(len(expected)))


def test_reading_is_lazy(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes(b"a\n" * 200_000 + b"last\n")
    prompts = read_prompts(path)
    assert next(prompts).content == "a"
    with path.open("r+b") as file:
        file.truncate(300_000)
    assert sum(1 for _ in prompts) < 199_999
    read_prompts(tmp_path / "missing")  # not even opened before the first is asked for


REFUSED = {
    "missing": (None, "cannot read"),
    "UTF-16": ("a\n".encode("utf-16"), "UTF-16"),
    "UTF-16, big end first": (b"\xfe\xff\0a", "UTF-16"),
    "UTF-16 without a mark": ("prompt".encode("utf-16-le"), "binary|iconv -f utf-16le -t utf-8"),
    "NUL": (b"PK\x03\x04\0\0", "binary|spreadsheet"),
}


@pytest.mark.parametrize(("content", "reason"), REFUSED.values(), ids=REFUSED)
def test_unusable_files(tmp_path, content, reason):
    path = tmp_path / "p.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=reason) as caught:
        next(read_prompts(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_directory_is_refused(tmp_path):
    with pytest.raises(UsageError, match="directory"):
        next(read_prompts(tmp_path))


PLAIN = {
    "text": ("p.txt", FORMS["text"][1:]),
    "BOM, CRLF": ("p.jsonl", FORMS["JSON with BOM, CRLF, blank lines"][1:]),
    "upper-case suffix": ("P.NDJSON", ('"a"\n', ["a"])),
    "not UTF-8": ("p.txt", (b"a\n\xff\nb\n", ["a", "!", "b"])),
    "nested too deep": ("p.jsonl", ('"a"\n' + "[" * 500 + "]" * 500 + "\n", ["a", "!"])),
}


@pytest.mark.parametrize(("name", "case"), PLAIN.values(), ids=PLAIN)
def test_a_lone_copy_reads_plain_files(read, alone, name, case):
    content, expected = case
    assert contents(read(name, content)) == expected


PLAINLY_REFUSED = {
    "p.csv": (b"prompt\na\n", "a .csv file needs extras/reading.py, which goes beside"),
    "p.txt.gz": (b"a\n", "a .gz file needs extras/reading.py"),
    "-": (b"", "standard input needs extras/reading.py"),
    "p.txt": ("Why?".encode("utf-16-le"), "binary data or UTF-16"),
    "p.jsonl": (gzip.compress(b"a\n"), "binary data or UTF-16"),
    "folder": (None, "cannot read folder: "),
    "missing": (None, "cannot read missing: No such file"),
}


@pytest.mark.parametrize("name", PLAINLY_REFUSED)
def test_a_lone_copy_refuses_the_others_in_a_sentence(tmp_path, monkeypatch, alone, name):
    monkeypatch.chdir(tmp_path)
    content, reason = PLAINLY_REFUSED[name]
    (tmp_path / "folder").mkdir()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=reason) as caught:
        next(read_prompts(name))
    assert "\n" not in str(caught.value)


# ---- Lines that cannot be read -------------------------------------------------------------------------------

BAD_LINES = {
    "not UTF-8 in text": ("p.txt", b"a\n\xff\xfe\nb\n"),
    "a character cut in half": ("p.txt", b"a\n\xe2\x82\nb\n"),
    "not UTF-8 in JSON": ("p.jsonl", b'"a"\n"\xff"\n"b"\n'),
    "not UTF-8 in CSV": ("p.csv", b"prompt\na\n\xff\nb\n"),
    "not JSON": ("p.jsonl", b'"a"\n{prompt}\n"b"\n'),
    "JSON cut off": ("p.jsonl", b'"a"\n{"prompt": "x\n"b"\n'),
    "more than JSON": ("p.jsonl", b'"a"\n"x" "y"\n"b"\n'),
    "NaN": ("p.jsonl", b'"a"\n{"prompt": "x", "y": NaN}\n"b"\n'),
    "infinity": ("p.jsonl", b'"a"\n{"prompt": "x", "y": -Infinity}\n"b"\n'),
    "a float too large": ("p.jsonl", b'"a"\n{"prompt": "x", "y": 1e999}\n"b"\n'),
    "an integer too long": ("p.jsonl", b'"a"\n{"prompt": "x", "y": ' + b"9" * 5000 + b'}\n"b"\n'),
    "nested too deeply": ("p.jsonl", b'"a"\n' + b"[" * 100_000 + b'\n"b"\n'),
    "nested too deeply, in an open string": ("p.jsonl", b'"a"\n' + b"[" * 201 + b'"' + b'\\"' * 200_000 + b'\n"b"\n'),
    "a number": ("p.jsonl", b'"a"\n17\n"b"\n'),
    "null": ("p.jsonl", b'"a"\nnull\n"b"\n'),
    "a list": ("p.jsonl", b'"a"\n["x"]\n"b"\n'),
    "too few fields": ("p.csv", b"prompt,x\na,1\ny\nb,2\n"),
    "too many fields": ("p.csv", b"prompt,x\na,1\ny,2,3\nb,4\n"),
}


@in_rows(("name", "content"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_names_itself_and_costs_no_other(read, name, content):
    prompts = read(name, content)
    assert contents(prompts) == ["a", "!", "b"]
    assert line_of(prompts[1]) == prompts[1].id == (3 if name == "p.csv" else 2)
    assert name in prompts[1].error.message


@in_rows("depth", [200, 900, 960, 980, 990])
def test_deep_nesting_is_a_bad_line_or_a_good_one(read, depth):
    prompts = read("p.jsonl", '{"messages": ' + "[" * depth + "]" * depth + '}\n"b"\n')
    assert [api().prepare(prompt).error is None for prompt in prompts][1]
    assert prompts[0].error or json.loads(prompts[0].body)


# ---- Ids and columns -----------------------------------------------------------------------------------------

IDS = {
    "none": ('{"prompt": "a"}', 2, False),
    "null": ('{"prompt": "a", "id": null}', 2, False),
    "empty": ('{"prompt": "a", "id": ""}', 2, False),
    "text": ('{"prompt": "a", "id": "x"}', "x", True),
    "number as text": ('{"prompt": "a", "id": "7"}', "7", True),
    "number": ('{"prompt": "a", "id": 7}', 7, True),
    "zero": ('{"prompt": "a", "id": 0}', 0, True),
    "negative": ('{"prompt": "a", "id": -1}', -1, True),
    "beyond 64 bits": ('{"prompt": "a", "id": 99999999999999999999}', 99999999999999999999, True),
    "half a surrogate pair": ('{"prompt": "a", "id": "\\ud800"}', "\ud800", True),
    "Batch": ('{"custom_id": "r-1", "method": "POST", "url": "/v1/x", "body": {}}', "r-1", True),
}


@in_rows(("line", "expected", "named"), IDS.values(), ids=IDS)
def test_ids(read, line, expected, named):
    _, prompt = read("p.jsonl", f'"first"\n{line}\n')
    assert (prompt.id, type(prompt.id), prompt.named, prompt.error) == (expected, type(expected), named, None)


@in_rows("value", ["true", "1.5", "[1]", '{"a": 1}'])
@in_rows("line", ['{{"prompt": "a", "id": {}}}', '{{"custom_id": {}, "url": "/v1/x", "body": {{}}}}'])
def test_ids_that_are_none(read, line, value):
    (prompt,) = read("p.jsonl", line.format(value))
    assert prompt.id == line_of(prompt) == 1 and "id" in prompt.error.message


def test_columns_are_what_is_neither_prompt_nor_id(read):
    (prompt,) = read("p.jsonl", '{"id": 1, "x": [1, null], "prompt": "a", "input": "b", "y": {"z": "é"}}')
    assert prompt.columns == {"x": [1, None], "input": "b", "y": {"z": "é"}}


def test_columns_of_a_table_are_what_is_neither_prompt_nor_id(read):
    (prompt,) = read("p.csv", "id,prompt,x,y\n7,a,,é\n")
    assert (prompt.id, prompt.columns) == ("7", {"x": "", "y": "é"})
    (prompt,) = read("p.csv", ",question\n0,a\n")  # as pandas writes its index
    assert (prompt.content, prompt.columns) == (None, {"": "0", "question": "a"})


def test_a_message_is_short_however_long_the_line(read):
    (prompt,) = read("p.jsonl", '{"a": 1' + "0" * 100_000 + ".0}")
    assert re.search("not JSON: 10+ is not a JSON number", prompt.error.message) and len(prompt.error.message) < 400
    with pytest.raises(UsageError) as caught:
        read("p.csv", ",".join(["a" * 100_000] * 2))
    assert len(str(caught.value)) < 400


# ---- Requests ------------------------------------------------------------------------------------------------

USER = [{"role": "user", "content": "a"}]
TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
M = {"model": "gpt-6-luna"}
REQUESTS = {
    "chat": ({}, '"a"', CHAT, M | {"messages": USER}),
    "chat, prompt": ({}, '{"prompt": "a"}', CHAT, M | {"messages": USER}),
    "chat, input": ({}, '{"input": "a"}', CHAT, M | {"messages": USER}),
    "chat, messages": ({}, {"messages": TALK}, CHAT, M | {"messages": TALK}),
    "chat, system": ({"system": "s"}, '"a"', CHAT, M | {"messages": [{"role": "system", "content": "s"}, *USER]}),
    "chat, system, messages": (
        {"system": "s"}, {"messages": TALK}, CHAT, M | {"messages": [{"role": "system", "content": "s"}, *TALK]},
    ),
    "chat, empty system": ({"system": ""}, '"a"', CHAT, M | {"messages": [{"role": "system", "content": ""}, *USER]}),
    "model and parameters": (
        {"model": "m", "params": {"n": 2, "stop": None}}, '"a"', CHAT,
        {"model": "m", "messages": USER, "n": 2, "stop": None},
    ),
    "responses": ({"endpoint": "responses"}, '"a"', "/responses", M | {"input": "a"}),
    "responses, input list": ({"endpoint": "responses"}, {"input": TALK}, "/responses", M | {"input": TALK}),
    "responses, messages": ({"endpoint": "responses"}, {"messages": TALK}, "/responses", M | {"input": TALK}),
    "responses, system": (
        {"endpoint": "responses", "system": "s"}, '"a"', "/responses", M | {"input": "a", "instructions": "s"},
    ),
    "completions": ({"endpoint": "completions"}, '"a"', "/completions", M | {"prompt": "a"}),
    "completions, input": ({"endpoint": "completions"}, {"input": "a"}, "/completions", M | {"prompt": "a"}),
    "embeddings": ({"endpoint": "embeddings"}, '"a"', "/embeddings", M | {"input": "a"}),
    "embeddings, prompt": ({"endpoint": "embeddings"}, {"prompt": "a"}, "/embeddings", M | {"input": "a"}),
    "embeddings, list": ({"endpoint": "embeddings"}, {"input": ["a", "b"]}, "/embeddings", M | {"input": ["a", "b"]}),
    "a very long integer": ({}, {"messages": [{"n": 10**4000}]}, CHAT, M | {"messages": [{"n": 10**4000}]}),
}  # fmt: skip


@in_rows(("settings", "line", "path", "body"), REQUESTS.values(), ids=REQUESTS)
def test_requests(read, settings, line, path, body):
    (prompt,) = read("p.jsonl", line if isinstance(line, str) else json.dumps(line))
    prepared = api(**settings).prepare(prompt)
    assert (prepared.error, prepared.path, json.loads(prepared.body)) == (None, path, body)


def test_a_body_is_compact_utf8_and_no_parameter_is_added():
    (prompt,) = map(api().prepare, as_prompts(["é ☃"]))
    assert prompt.body == '{"model":"gpt-6-luna","messages":[{"role":"user","content":"é ☃"}]}'.encode()


NO_REQUESTS = {
    "no content": ({}, '{"question": "a"}', r"prompt, messages or input.*\{question\}"),
    "prompt null": ({}, '{"prompt": null}', "prompt"),
    "prompt a number": ({}, '{"prompt": 1}', "prompt"),
    "messages a text": ({}, '{"messages": "a"}', "messages"),
    "messages empty": ({}, '{"messages": []}', "messages"),
    "messages for completions": ({"endpoint": "completions"}, {"messages": TALK}, "messages.*completions"),
    "messages for embeddings": ({"endpoint": "embeddings"}, {"messages": TALK}, "messages.*embeddings"),
    "input list for chat": ({}, {"input": ["a"]}, "input.*chat"),
    "half a surrogate pair": ({}, '"\\ud83d"', "surrogate"),
    "unknown column": ({"template": "{prompt} in {lang}"}, '{"prompt": "a", "x": 1}', r"\{lang\}.*\{x\}"),
    "template and messages": ({"template": "{x}"}, {"messages": TALK, "x": "1"}, "template"),
}


@in_rows(("settings", "line", "reason"), NO_REQUESTS.values(), ids=NO_REQUESTS)
def test_rows_of_which_no_request_can_be_made(read, settings, line, reason):
    line = line if isinstance(line, str) else json.dumps(line)
    bad, good = map(api(**settings).prepare, read("p.jsonl", line + '\n{"prompt": "b", "lang": "de", "x": 2}'))
    assert line_of(bad) == 1 and not bad.body and re.search(reason, bad.error.message)
    assert good.error is None and good.body


TEMPLATES = {
    "text": ("Translate {prompt}!", "a", "Translate a!"),
    "columns": ("{prompt} to {lang}", {"prompt": "a", "lang": "de"}, "a to de"),
    "no prompt": ("{q}?", {"q": "why"}, "why?"),
    "input": ("<{input}>", {"input": "a"}, "<a>"),
    "twice": ("{prompt}{prompt}", "a", "aa"),
    "braces": ("{{}} {{prompt}} {{{prompt}}}", "a", "{} {prompt} {a}"),
    "a brace alone": ('{"q": "{prompt}"', "a", '{"q": "a"'),
    "braces in the data": ("{prompt}", "{lang} {{ }} {prompt.__class__}", "{lang} {{ }} {prompt.__class__}"),
    "backslashes in the data": ("{prompt}", r"\1 \g<0>", r"\1 \g<0>"),
    "one filled value is not filled again": ("{prompt}", {"prompt": "{x}", "x": "no"}, "{x}"),
    "not a text": ("{x} {y} {z}", {"x": [1, "é"], "y": None, "z": True}, '[1, "é"] null true'),
    "a name with spaces": ("{my name}", {"my name": "a"}, "a"),
    "nothing to fill": ("hello", "a", "hello"),
}


@in_rows(("template", "item", "expected"), TEMPLATES.values(), ids=TEMPLATES)
def test_templates(template, item, expected):
    (prompt,) = map(api(template=template).prepare, as_prompts([item]))
    assert prompt.error is None
    assert json.loads(prompt.body)["messages"] == [{"role": "user", "content": expected}]


# ---- OpenAI Batch requests -----------------------------------------------------------------------------------

BATCH = {"custom_id": "r-1", "method": "POST", "url": "/v1/responses", "body": {"model": "m", "input": "a"}}
BATCHES = {
    "as it stands": (BATCH, {}, {"model": "m", "input": "a"}),
    "no method": ({k: v for k, v in BATCH.items() if k != "method"}, {}, {"model": "m", "input": "a"}),
    "the flags win": (BATCH, {"model": "x", "params": {"n": 1}}, {"model": "x", "input": "a", "n": 1}),
    "the endpoint is the line's": (BATCH, {"endpoint": "embeddings"}, {"model": "m", "input": "a"}),
    "no url": ({k: v for k, v in BATCH.items() if k != "url"}, {}, "url"),
    "a whole url": (BATCH | {"url": "https://api.openai.com/v1/responses"}, {}, "url"),
    "another method": (BATCH | {"method": "GET"}, {}, "POST"),
    "body a text": (BATCH | {"body": "a"}, {}, "body"),
    "body null": (BATCH | {"body": None}, {}, "body"),
    "system": (BATCH, {"system": "s"}, "system"),
    "template": (BATCH, {"template": "{prompt}"}, "template"),
}


@in_rows(("row", "settings", "expected"), BATCHES.values(), ids=BATCHES)
def test_batch_lines(read, row, settings, expected):
    (prompt,) = map(api(**settings).prepare, read("p.jsonl", json.dumps(row)))
    assert (prompt.id, prompt.named, prompt.kind) == ("r-1", True, "batch")
    if isinstance(expected, str):
        assert line_of(prompt) == 1 and expected in prompt.error.message
    else:
        assert (prompt.error, prompt.path, json.loads(prompt.body)) == (None, "/responses", expected)


def test_batch_lines_and_others_in_one_file(read):
    prompts = read("p.jsonl", f'"a"\n{json.dumps(BATCH)}\n')
    assert [prompt.kind for prompt in prompts] == ["prompt", "batch"]


# ---- Settings ------------------------------------------------------------------------------------------------

URLS = {
    "https://host/v1": ("https://host/v1", ""),
    " https://host/v1/ ": ("https://host/v1", ""),
    "http://localhost:8000": ("http://localhost:8000", ""),
    "https://host/v1/chat/completions": ("https://host/v1", ""),
    "https://host/v1/embeddings/": ("https://host/v1", ""),
    "https://host/openai/deployments/d?api-version=1": ("https://host/openai/deployments/d", "?api-version=1"),
}


@in_rows(("url", "expected"), URLS.items(), ids=URLS)
def test_base_urls(url, expected):
    found = Api(None, base_url=url)
    (prompt,) = map(found.prepare, as_prompts(["a"]))
    assert (found.base_url, prompt.path) == (expected[0], CHAT + expected[1])


@in_rows("url", ["host/v1", "ftp://host/v1", "https://", "https:///v1", "http://a b/v1", "-"])
def test_base_urls_that_are_none(url):
    with pytest.raises(UsageError, match="base-url"):
        Api(None, base_url=url)


@in_rows(
    ("settings", "reason"),
    [
        ({"endpoint": "chats"}, "chats.*chat, responses"),
        ({"endpoint": "completions", "system": "s"}, "system"),
        ({"endpoint": "embeddings", "system": "s"}, "system"),
        ({"base_url": None}, "OPENAI_API_KEY is not set.*--demo"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_settings_that_cannot_be(settings, reason):
    with pytest.raises(UsageError, match=reason):
        Api(None, **{"base_url": "http://test/v1"} | settings)


@in_rows(
    ("name", "reason"),
    [
        ("no-such", "there is no backend no-such; choose .*raw-aiohttp"),
        ("no_such.package:connect", "backend no_such.package:connect: there is no module no_such"),
        ("json:no_such", "backend json:no_such: .*no_such"),
        (".:x", "backend"),
    ],
)
def test_backends_that_cannot_be_loaded(name, reason):
    with pytest.raises(UsageError, match=reason):
        load_backend(name, base_url="http://test/v1")


def test_prompts_of_the_readers_own():
    prompts = list(as_prompts(["a", {"prompt": "b", "id": "x"}, 3, *as_prompts(["c"])]))
    assert contents(prompts) == ["a", "b", "!", "c"]
    assert [prompt.number for prompt in prompts] == [0, 1, 2, 3]
    assert [prompt.id for prompt in prompts][:3] == [1, "x", 3]
    assert "prompt 3" in prompts[2].error.message


@in_rows(
    "value", [float("nan"), float("inf"), {1, 2}, object()], ids=["NaN", "infinity", "set", "object"]
)
def test_what_json_cannot_hold_fails_only_its_own_prompt(value):
    bad, good = map(api().prepare, as_prompts([{"messages": [{"x": value}]}, "b"]))
    assert "prompt 1" in bad.error.message and not bad.body and good.body


def test_a_prompt_knows_its_row_and_is_the_same_without():
    (prompt,) = as_prompts([{"id": 7, "prompt": "x", "a": 1}])
    assert list(prompt.row) == ["id", "prompt", "a"] and "row=" not in repr(prompt)
    assert prompt == Prompt(0, "x", 7, columns={"a": 1}, where="prompt 1", named=True)
