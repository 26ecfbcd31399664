"""The command line, from the user's end: what is typed, what is on the screen, what is in the files."""

import dataclasses
import gzip
import importlib.util
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

import concurrent_prompts
from concurrent_prompts import main
from concurrent_prompts.backends import api as api_file
from concurrent_prompts.backends import options as options_file
from concurrent_prompts.backends.console import wrapped
from concurrent_prompts.backends.hints import hint
from tests.helpers import LIBRARIES, ROOT, SCRIPT, rows, start


def test_the_main_job(here, stand_in, capsys):
    assert main(["prompts.txt", "--base-url", stand_in().url]) == 0
    found = rows("prompts.results.jsonl")
    assert [row["id"] for row in found] == [1, 2, 3]
    assert all("made up" in row["text"] and row["error"] is None and row["attempts"] == 1 for row in found)
    assert found[0]["usage"]["total_tokens"] > 0 and found[0]["finish_reason"] == "stop"
    out, err = capsys.readouterr()
    assert out == "" and "3 answered, 0 failed" in err and "results in prompts.results.jsonl" in err


@pytest.mark.parametrize("backend", ["stdlib", "raw-aiohttp", "openai-sdk"])
@pytest.mark.parametrize("way", [["--sequential"], ["-c", "3"], []])
def test_every_backend_both_ways(here, stand_in, capsys, backend, way):
    pytest.importorskip({"raw-aiohttp": "aiohttp", "openai-sdk": "openai"}.get(backend, "asyncio"))
    server = stand_in(latency=0.02)
    assert main(["prompts.txt", "-b", backend, "--base-url", server.url, *way]) == 0
    assert server.stats.max_in_flight == (1 if way == ["--sequential"] else 3)
    assert backend in capsys.readouterr().err


def test_a_second_run_asks_nothing_again(here, stand_in, capsys):
    server = stand_in()
    command = ["prompts.txt", "--base-url", server.url]
    assert main(command) == 0
    before = pathlib.Path("prompts.results.jsonl").read_bytes()
    assert main(command) == 0
    assert server.stats.requests == 3
    assert pathlib.Path("prompts.results.jsonl").read_bytes() == before
    assert "3 answers of an earlier run kept" in capsys.readouterr().err
    assert main([*command, "-m", "other"]) == 0
    assert server.stats.requests == 6


def test_only_the_first_n_then_the_rest(here, stand_in):
    server = stand_in()
    command = ["prompts.txt", "--base-url", server.url]
    assert main([*command, "-n", "2"]) == 0
    assert main(command) == 0
    assert main([*command, "-n", "1"]) == 0
    assert (server.stats.requests, [row["id"] for row in rows("prompts.results.jsonl")]) == (3, [1, 2, 3])


def test_failed_prompts_are_kept_and_asked_again_on_request(here, stand_in, capsys):
    broken, sound = stand_in(fault={"500": 1.0}), stand_in()
    assert main(["prompts.txt", "--base-url", broken.url, "--max-attempts", "2"]) == 1
    assert "retry later" in capsys.readouterr().err
    assert [row["error"]["status"] for row in rows("prompts.results.jsonl")] == [500] * 3
    assert broken.stats.requests == 6
    assert main(["prompts.txt", "--base-url", sound.url]) == 1
    assert sound.stats.requests == 0
    assert main(["prompts.txt", "--base-url", sound.url, "--retry-failed"]) == 0
    assert [row["error"] for row in rows("prompts.results.jsonl")] == [None] * 3


FILES = {
    "a.jsonl": '"plain"\n{"prompt": "p", "id": "x", "lang": "fr"}\n{"messages": [{"role": "user", "content": "m"}]}\n',
    "a.csv": 'id,prompt,lang\n7,"two\nlines",fr\n8,plain,de\n9,x,y\n',
    "a.tsv": "prompt\tlang\none\tfr\ntwo\tde\nthree\ten\n",
    "a.ndjson": '{"input": "i"}\n{"prompt": "p"}\n"x"\n',
}


@pytest.mark.parametrize("name", [*FILES, *(f"{name}.gz" for name in FILES)])
def test_input_formats(here, stand_in, name):
    text = FILES[name.removesuffix(".gz")].encode()
    pathlib.Path(name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    assert main([name, "--base-url", stand_in().url]) == 0
    found = rows("a.results.jsonl")
    assert len(found) == 3 and all(row["text"] for row in found)
    if "csv" in name:
        assert [(row["id"], row["lang"]) for row in found] == [("7", "fr"), ("8", "de"), ("9", "y")]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("arguments", [["-o", "-"], ["--compare"]])
def test_an_output_that_takes_nothing(here, stand_in, arguments):
    with open("/dev/full", "w") as full:
        command = [sys.executable, SCRIPT, "prompts.txt", "--base-url", stand_in().url, *arguments]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 3 and "cannot write the output" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell is needed")
@pytest.mark.parametrize(("redirection", "status"), [("<&-", 2), ("2>&-", 0), ("2>/dev/full", 0), (">&-", 0)])
def test_closed_streams(here, stand_in, redirection, status):
    prompts = "-" if redirection == "<&-" else "prompts.txt"
    command = f"{sys.executable} {SCRIPT} {prompts} -b stdlib --base-url {stand_in().url} {redirection}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == status and "Traceback" not in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such limit")
def test_few_open_files_lower_the_concurrency_and_say_so(here, stand_in):
    pathlib.Path("p.txt").write_text("".join(f"prompt {n}\n" for n in range(300)))
    server = stand_in(latency=0.02)
    command = f"ulimit -n 128; {sys.executable} {SCRIPT} p.txt -b stdlib -c 5000 --base-url {server.url}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 0 and "at most 64 calls in flight: raise the limit of open files" in done.stderr
    assert server.stats.requests == 300 and server.stats.max_in_flight <= 64


def test_standard_input_to_standard_output(here, stand_in, monkeypatch, capsysbinary):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo\nthree\n")))
    assert main(["-", "--base-url", stand_in(latency=0.01, sigma=1.0).url, "-q"]) == 0
    out, err = capsysbinary.readouterr()
    assert [json.loads(line)["id"] for line in out.splitlines()] == [1, 2, 3] and err == b""


def test_system_template_and_parameters(here, stand_in):
    pathlib.Path("t.csv").write_text("word,lang\n{cat},French\n")
    seen = []

    class Spy(api_file.Api):
        def read(self, prompt, *reply):
            seen.append(json.loads(prompt.body))
            return super().read(prompt, *reply)

    original, api_file.Api = api_file.Api, Spy
    try:
        template = ["-s", "Be brief.", "-t", "Say {word} in {lang} {{ok}}", "-p", "temperature=0.5", "-p", 'stop=["x"]']
        assert main(["t.csv", "--base-url", stand_in().url, "-m", "mine", *template]) == 0
    finally:
        api_file.Api = original
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Say {cat} in French {ok}"},
    ]
    assert seen == [{"model": "mine", "messages": messages, "temperature": 0.5, "stop": ["x"]}]


def test_batch_request_lines_get_batch_output_lines(here, stand_in):
    request = {"method": "POST", "url": "/v1/chat/completions"}
    body = {"model": "gpt-6-luna", "messages": [{"role": "user", "content": "hi"}]}
    lines = [
        {"custom_id": "a", **request, "body": body},
        {"custom_id": "b", **request, "body": {**body, "messages": None}},
        {"custom_id": "c", "method": "POST", "url": "/v1/embeddings", "body": {"model": "gpt-6-luna", "input": "x"}},
        {"custom_id": "d", **request, "body": {**body, "model": "nobody's"}},
        {"custom_id": "e", "method": "GET", "url": "/v1/models", "body": {}},
    ]
    pathlib.Path("batch.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert main(["batch.jsonl", "--base-url", stand_in(models=("gpt-6-luna",)).url]) == 1
    found = rows("batch.results.jsonl")
    assert [row["custom_id"] for row in found] == list("abcde")
    assert all(list(row) == ["id", "custom_id", "response", "error"] for row in found)
    assert all(row["id"].startswith("batch_req_") for row in found)
    assert [(row["response"] or {}).get("status_code") for row in found] == [200, 400, 200, 404, None]
    assert [row["error"] and row["error"]["code"] for row in found] == [None, None, None, None, "unreadable"]
    assert found[0]["response"]["body"]["object"] == "chat.completion" and found[0]["response"]["request_id"]
    assert "message" in found[1]["response"]["body"]["error"]


def test_compare(here, stand_in, capsys):
    names = ["stdlib"]
    for name in ("openai-sdk", "raw-aiohttp"):
        if importlib.util.find_spec(LIBRARIES[name]):
            names.append(name)
    pathlib.Path("prompts.txt").write_text("".join(f"prompt {number}\n" for number in range(12)))
    server = stand_in(latency=0.02)
    assert main(["prompts.txt", "--compare", "-b", ",".join(names), "-c", "4", "--base-url", server.url, "-q"]) == 0
    assert server.stats.requests == 2 * len(names) * (12 + 1), "the same work for all, and a warm-up each"
    out, err = capsys.readouterr()
    assert err == ""
    assert re.search(r"Sequential results \(stdlib\):\n  1\. .*made up.*\n.*\n.*\n  ... and 9 more\n", out)
    assert re.search(r"Concurrent time: \d\.\d\d seconds", out)
    lines = out.splitlines()
    header = next(number for number, line in enumerate(lines) if line.startswith("backend"))
    block = lines[header : header + 1 + 2 * len(names)]
    assert len({len(line) for line in block}) == 1, "aligned"
    for line in block[1:]:
        cells = line.split()
        assert cells[1] in ("1", "4") and cells[-1] == "0" and len(line) <= 80
        assert cells[-2] == "-", "there is no p99 of twelve"
    for name in names:
        won = re.search(rf"{name}: concurrent ran ([\d.]+) times faster than sequential \(", " ".join(out.split()))
        assert won and float(won[1]) > 1
    assert "least CPU time" not in out, "that of twelve requests is chance"
    assert not pathlib.Path("prompts.results.jsonl").exists()


def test_compare_of_a_server_that_refuses_the_key(here, stand_in, capsys):
    assert main(["prompts.txt", "--compare", "--base-url", stand_in(require_key="k").url]) == 3
    assert "check the key" in capsys.readouterr().err


UNUSABLE = {
    "missing file": (["nothing.txt"], "cannot read nothing.txt: No such file"),
    "a directory": (["."], ". is not a regular file but a directory; name a file"),
    "no prompts file": ([], "no PROMPTS file given"),
    "empty": (["empty.txt"], "empty.txt holds no prompts"),
    "binary": (["binary.txt"], "binary.txt holds binary data"),
    "UTF-16": (["utf16.txt"], "utf16.txt is UTF-16"),
    "unknown column": (["prompts.txt", "-t", "{city}"], "prompts.txt line 1: the template (-t) names {city}"),
    "no prompt column": (["table.csv"], "table.csv line 2: no column is called prompt"),
    "bad parameter": (["prompts.txt", "-p", "stop=x"], "-p stop=x: not NAME=JSON"),
    "nameless parameter": (["prompts.txt", "-p", "=1"], "-p =1: no name"),
    "streaming": (["prompts.txt", "-p", "stream=true"], "answers are not streamed"),
    "bad URL": (["prompts.txt", "--base-url", "localhost:8000"], "not of the form https://host/v1"),
    "system for embeddings": (["prompts.txt", "-e", "embeddings", "-s", "x"], "embeddings takes no system text"),
    "output is input": (["prompts.txt", "-o", "./prompts.txt"], "is the input"),
    "output directory": (["prompts.txt", "-o", "no/where.jsonl"], "cannot write no/where.jsonl: No such file"),
    "foreign output": (["prompts.txt", "-o", "table.csv"], "table.csv holds something other than results"),
    "an unknown option": (["prompts.txt", "-x"], "-x is not an option; see --help"),
    "two files": (["prompts.txt", "more.txt"], "more.txt is one argument too many; see --help"),
    "another job's results": (["prompts.txt", "-o", "others.jsonl"], "others.jsonl contains results for a diff"),
    "unknown backend": (["prompts.txt", "-b", "curl"], "there is no backend curl"),
    "a backend that is no function": (["prompts.txt", "-b", "os:path"], "backend os:path is no function"),
    "a nameless backend": (["prompts.txt", "-b", "stdlib,", "--compare"], "-b has an empty name"),
    "an impossible port": (["prompts.txt", "--base-url", "http://h:99999/v1"], "not of the form https://host/v1"),
    "a column twice": (["twice.csv"], "twice.csv has the column 'a' twice"),
    "a device": (["prompts.txt", "-o", os.devnull], "is not a file that can be continued"),
    "a report elsewhere": (
        ["prompts.txt", "--report", "no/r.json"],
        "no/r.json cannot be written: there is no folder no; choose another file with --report",
    ),
    "a report that is none": (["prompts.txt", "--report", "r.txt"], "r.txt: the name of a report ends in .json"),
    "a report for the input": (["table.json", "--report", "table.json"], "table.json is the input; choose another"),
    "a picture elsewhere": (
        ["prompts.txt", "--plot", "no/r.svg"],
        "--plot: no/r.svg cannot be written: there is no folder no; name another file",
    ),
    "a picture of another kind": (["prompts.txt", "--plot", "r.pdf"], "r.pdf: a picture's name must end in .png"),
    "a picture for a results file": (["prompts.txt", "-o", "r.svg", "--plot", "r.svg"], "r.svg is -o; choose another"),
    "nothing to ask again": (["prompts.txt", "-o", "-", "--retry-failed"], "standard output keeps nothing"),
    "a sweep apart from a comparison": (["prompts.txt", "-c", "1,2"], "(-c 1,16,auto) are for --compare"),
    "backends apart from a comparison": (["prompts.txt", "-b", "stdlib,stdlib"], "are for --compare"),
    "both ways": (["prompts.txt", "--compare", "--sequential"], "leave out one of them"),
    "one at a time, many at once": (["prompts.txt", "--sequential", "-c", "4"], "or -c"),
    "a comparison's results": (["prompts.txt", "--compare", "-o", "x.jsonl"], "--compare writes no results file"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_what_cannot_be_used_is_one_line_and_nothing_is_sent(here, stand_in, capsys, case):
    arguments, text = UNUSABLE[case]
    (here / "empty.txt").write_text("\n  \n")
    (here / "binary.txt").write_bytes(b"\x89PNG\x00\x01")
    (here / "utf16.txt").write_text("hello", "utf-16")
    (here / "table.csv").write_text("city,word\nParis,hello\n")
    (here / "twice.csv").write_text("prompt,a,a\nx,1,2\n")
    other = {"id": 1, "text": "x", "error": None, "request": "0" * 24}
    (here / "others.jsonl").write_text(json.dumps(other) + "\n")
    server = stand_in()
    base = [] if "--base-url" in arguments else ["--base-url", server.url]
    assert main([*arguments, *base]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("concurrent_prompts.py: ") and text in err and err.count("\n") == 1
    assert server.stats.requests == 0
    assert (here / "table.csv").read_text() == "city,word\nParis,hello\n"


@pytest.mark.parametrize("arguments", ["-c 0", "-c x", "--timeout nan", "-n -1", "-e moon"])
def test_bad_numbers_and_names_are_usage_errors(here, capsys, arguments):
    with pytest.raises(SystemExit, match="2"):
        main(["prompts.txt", *arguments.split()])
    assert "error: " in capsys.readouterr().err


def test_no_key(here, capsys):
    assert main(["prompts.txt"]) == 2
    assert "OPENAI_API_KEY is not set; export it, or try --demo" in capsys.readouterr().err


STOPS = {
    "wrong key": ({"require_key": "right"}, [], "check the key", 401),
    "wrong model": ({"models": ("m",)}, [], "check the model (-m)", 404),
    "no credit": ({"quota": 1}, [], "credit or spending limit is used up", 429),
    "without /v1": ({}, ["--base-url"], "most end in /v1", 404),
}


@pytest.mark.parametrize("case", STOPS)
def test_what_would_meet_every_prompt_stops_the_run(here, stand_in, capsys, case, monkeypatch):
    options, arguments, text, _ = STOPS[case]
    pathlib.Path("prompts.txt").write_text("".join(f"prompt {number}\n" for number in range(500)))
    server = stand_in(latency=0.01, **options)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    url = server.url.removesuffix("/v1") if arguments else server.url
    assert main(["prompts.txt", "-c", "5", "--base-url", url]) == 3
    out, err = capsys.readouterr()
    assert text in err and "Traceback" not in err and "sk-very-secret" not in out + err
    assert server.stats.requests <= 12
    assert len(rows("prompts.results.jsonl")) == (1 if case == "no credit" else 0)


def test_a_model_that_is_missing_with_a_400():
    body = b'{"error": {"message": "Invalid model name passed in model=x.", "type": "invalid_request_error"}}'
    error = concurrent_prompts.http_error(400, {}, body)
    assert (error.verdict, error.error.type) == ("stop", "model_not_found")
    assert "check the model (-m)" in hint(error.error)


def test_nobody_there(here, capsys, monkeypatch):
    monkeypatch.setattr(concurrent_prompts, "PROBE", 0.01)
    assert main(["prompts.txt", "--base-url", "http://127.0.0.1:9/v1", "-q"]) == 3
    err = capsys.readouterr().err
    assert "stopped: " in err and "check that the server runs" in err and "Traceback" not in err


def test_the_key_is_in_no_file_and_on_no_screen(here, stand_in, capsys, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    server = stand_in(require_key="sk-very-secret", fault={"500": 0.3})
    assert main(["prompts.txt", "--base-url", server.url, "--api-key-env", "MY_KEY", "-v"]) == 0
    assert "sk-very-secret" not in "".join(capsys.readouterr()) + pathlib.Path("prompts.results.jsonl").read_text()


def test_unreadable_lines_fail_alone_and_name_their_place(here, stand_in, capsys):
    lines = [b'"good"', b'{"prompt": ', b"\xff\xfe", b'{"prompt": NaN}', b'{"id": {}, "prompt": "x"}', b'"last"']
    pathlib.Path("p.jsonl").write_bytes(b"\n".join(lines))
    assert main(["p.jsonl", "--base-url", stand_in().url]) == 1
    found = rows("p.results.jsonl")
    assert [row["id"] for row in found] == [1, 2, 3, 4, 5, 6]
    assert [row["error"] is None for row in found] == [True, False, False, False, False, True]
    assert all(f"p.jsonl line {row['id']}: " in row["error"]["message"] for row in found[1:5])
    assert "4 x unreadable" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to one process")
@pytest.mark.parametrize(("number", "once"), [(signal.SIGINT, True), (signal.SIGTERM, True), (signal.SIGINT, False)])
def test_interruption_keeps_what_is_answered_and_the_same_command_continues(here, stand_in, number, once):
    pathlib.Path("p.txt").write_text("".join(f"prompt {n}\n" for n in range(16)))
    server = stand_in(latency=0.15 if once else 30, max_in_flight=500)
    command = ["p.txt", "-b", "stdlib", "-c", "4", "--base-url", server.url]
    with start(command) as process:
        while server.stats.requests < 4 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(number)
        while not once and "stopping: 4 calls in flight" not in process.stderr.readline():
            assert process.poll() is None
        if not once:
            process.send_signal(number)
        _, err = process.communicate(timeout=10)
    assert process.returncode == 130 and "Traceback" not in err
    assert f"to continue: {sys.executable} {SCRIPT} {' '.join(command)}\n" in err
    assert len(rows("p.results.jsonl")) == (server.stats.requests if once else 0)
    if once:
        assert 4 <= server.stats.requests <= 12
        server.options = dataclasses.replace(server.options, latency=0.0)
        assert main(command) == 0
        assert server.stats.requests == 16


def test_a_closed_pipe_ends_quietly(here, stand_in):
    url = stand_in().url
    pathlib.Path("p.txt").write_text("".join(f"prompt {n}\n" for n in range(3000)))
    with start(["p.txt", "-o", "-", "-b", "stdlib", "--base-url", url]) as process:
        process.stdout.readline()
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()


def test_run_as_a_script_and_on_a_bare_python(here, stand_in):
    """Isolated from installed packages the stdlib backend is the default, and the module needs nothing."""
    command = [sys.executable, "-I", "-S", SCRIPT]
    done = subprocess.run([*command, "prompts.txt", "-b", "stdlib", "--base-url", stand_in().url], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert subprocess.run([*command, "--version"], capture_output=True).stdout.startswith(b"concurrent_prompts.py ")


def test_a_copied_file_alone(here):
    (here / "concurrent_prompts.py").write_bytes(pathlib.Path(SCRIPT).read_bytes())
    program = (
        "import concurrent_prompts as c\n"
        "async def send(prompt): return prompt.upper()\n"
        "print([r.text for r in c.run(['a', 'b'], send)])\n"
        "print(c.main(['--demo']), c.main(['prompts.txt', '--base-url', 'http://h/v1']))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=here)
    assert done.stdout == "['A', 'B']\n2 2\n" and done.stderr.count("the folder ") == 2


LONE = """
import asyncio, concurrent_prompts as c
class SDKError(Exception):
    def __init__(self, status, headers=()):
        super().__init__("boom")
        self.status_code, self.response = status, type("R", (), {"status_code": status, "headers": dict(headers)})
class Lost(Exception):
    pass
def lost():
    error = Lost("gone")
    error.__cause__ = ConnectionResetError("reset")
    return error
left = {"limited": [SDKError(429, {"retry-after": "0.001"})], "broken": [SDKError(503)], "gone": [lost()],
        "late": [TimeoutError()], "bad": [SDKError(400)] * 9, "a bug": [ValueError("boom")] * 9}
async def send(prompt):
    if left.get(prompt):
        raise left[prompt].pop()
    return prompt.upper()
c.BACKOFF_BASE = 0.001
for result in c.run([*left], send, concurrency=1, max_attempts=3):
    print(result.id, result.text or result.error.type, result.attempts)
async def keyless(prompt):
    raise SDKError(401)
print([result.error.type for result in c.run(["a", "b"], keyless, concurrency=1)])
"""


def test_a_lone_copy_goes_by_the_status(here):
    """What servers say is in backends/; without that, a 429, a 5xx and a lost connection pass, and a 401 stops."""
    (here / "concurrent_prompts.py").write_bytes(pathlib.Path(SCRIPT).read_bytes())
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", LONE], capture_output=True, text=True, env=environment, cwd=here)
    assert done.stdout.splitlines() == [
        "1 LIMITED 2", "2 BROKEN 2", "3 GONE 2", "4 LATE 2", "5 http_400 1", "6 ValueError 1",
        "['http_401', 'not_sent']",
    ], done.stderr  # fmt: skip


def test_the_manual_is_the_help():
    extras = pytest.importorskip("concurrent_prompts.extras")
    help_text = options_file.build_parser(extras.files_for(["--help"])).format_help()
    assert concurrent_prompts.__doc__.strip() in help_text


def test_the_report_without_extras_is_a_line_and_the_first_failure(here, stand_in, capsys, monkeypatch):
    monkeypatch.setattr(concurrent_prompts, "extras_folder", lambda: None)
    pathlib.Path("p.jsonl").write_text('"one"\n{"prompt": \n"two"\n')
    assert main(["p.jsonl", "-b", "stdlib", "--base-url", stand_in().url]) == 1
    first, where, failure = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"2 answered, 1 failed in [\d.]+ m?s", first) and where == "  results in p.results.jsonl"
    assert failure.startswith("  first failure: unreadable: p.jsonl line 2: ")
    assert main(["p.jsonl", "-b", "stdlib", "--base-url", "http://127.0.0.1:9/v1"]) == 1
    assert "  2 answers of an earlier run kept\n" in capsys.readouterr().err


def test_public_names():
    assert all(hasattr(concurrent_prompts, name) for name in concurrent_prompts.__all__)
    assert sorted(concurrent_prompts.__all__, key=str.lower) == sorted(set(concurrent_prompts.__all__), key=str.lower)


def test_importing_needs_the_standard_library_alone():
    program = "import sys, concurrent_prompts; print(*(sys.modules.keys() & {'aiohttp', 'openai', 'tqdm', 'httpx2'}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("\n", "")


def test_a_number_keeps_its_unit_in_few_columns():
    assert wrapped("  waited 3.22 s for limits, 0.99 s of back-off", 36) == [
        "  waited 3.22 s for limits, 0.99 s",
        "  of back-off",
    ]
    assert wrapped("  waited 3.22 s for limits, 0.99 s of back-off", 33)[0] == "  waited 3.22 s for limits,"


def test_a_run_without_results_names_no_file_of_results(here, stand_in, capsys):
    server = stand_in(require_key="right")
    assert main(["prompts.txt", "-b", "stdlib", "--base-url", server.url, "--api-key-env", ""]) == 3
    err = capsys.readouterr().err
    assert "0 answered, 0 failed" in err and "results in" not in err and "to continue:" in err


# ---- Standard output -----------------------------------------------------------------------------------------


def test_nothing_is_printed_where_the_run_cannot_begin(here, capsys, monkeypatch):
    pytest.importorskip("concurrent_prompts.extras")
    pathlib.Path("without_a_beginning.py").write_text("def connect(*given):\n    raise ValueError('no')\n")
    monkeypatch.syspath_prepend(here)
    command = ["prompts.txt", "-o", "-", "--format", "csv", "-b", "without_a_beginning:connect"]
    assert main([*command, "--base-url", "http://127.0.0.1/v1"]) == 2
    assert capsys.readouterr().out == ""
