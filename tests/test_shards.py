"""Parts of a job: every N-th prompt into a file of its own, the files put together again, and Batch request files."""

import collections
import dataclasses
import gzip
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import tracemalloc

import pytest

import concurrent_prompts
from concurrent_prompts import Journal, Prompt, Result, main, read_prompts, recognised
from concurrent_prompts.backends import api as api_file
from concurrent_prompts.backends.api import request_line
from concurrent_prompts.extras.shards import in_shard

SCRIPT = str(pathlib.Path(__file__).resolve().parent.parent / "concurrent_prompts.py")
CLOCKS = "attempts latency started slot_wait limit_wait retry_wait lost tries limit"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory with a file of ten prompts; no waiting between attempts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(concurrent_prompts, "BACKOFF_BASE", 0.001)
    (tmp_path / "p.txt").write_text("".join(f"What is {number}?\n" for number in range(10)))
    return tmp_path


@pytest.fixture
def answer(here, stand_in):
    """Return a function that runs the command line against a stand-in server and returns the exit status."""
    server = stand_in()

    def run(*arguments):
        return main([*arguments, "-q", "--base-url", server.url])

    run.server = server
    return run


def rows(path):
    """Return the rows of a file of JSON Lines."""
    return [json.loads(line) for line in pathlib.Path(path).read_text("utf-8").splitlines()]


def timeless(path):
    """Return the lines of a results file as they are but for the clocks, and a Batch answer's serial numbers."""
    lines = []
    for row in rows(path):
        if "request" in row:
            row |= dict.fromkeys(row.keys() & set(CLOCKS.split()))
        elif row["response"]:
            row["response"]["request_id"] = None
            row["response"]["body"] |= {"id": None, "created": None}
        lines.append(json.dumps(row))
    return lines


def shard(place, shards, stem="p"):
    return f"{stem}.shard-{place}-of-{shards}.results.jsonl"


def batch(custom_id, content, model="gpt-6-luna", url="/v1/chat/completions"):
    body = {"model": model, "messages": [{"role": "user", "content": content}]}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def jsonl(*values):
    return "".join(f"{json.dumps(value)}\n" for value in values)


def merge(*arguments, source="p.txt", shards=2):
    """Merge the shards of a source; return the exit status."""
    return main([source, *arguments, "--merge", *(shard(place, shards) for place in range(1, shards + 1))])


# ---- A shard ---------------------------------------------------------------------------------------------------------


FORMS = {
    "p.txt": "one\n\ntwo\n \nthree\nfour\nfour\nsix\n",
    "p.jsonl": jsonl(
        "plain", {"prompt": "a", "id": "x", "lang": "fr"}, "plain", {"prompt": "a", "id": "x", "lang": "fr"},
        {"prompt": "a", "id": "y", "lang": "fr"}, {"messages": [{"role": "user", "content": "m"}]},
        {"prompt": "big", "id": 2**70}, {"prompt": "a", "lang": "fr"}, "\ud800",
    ) + '{"broken\n' + jsonl({"prompt": "half", "id": "\ud800"}, 7, {"prompt": []}, {"id": True, "prompt": "x"}),
    "p.csv": 'id,prompt,text\n7,"two\nlines",a\n8,plain,b\n8,plain,b\nx,too,many,fields\n9,last,c\n',
    "p.ndjson": jsonl(*(batch(f"r{number}", f"q {number}") for number in range(8)), batch("r0", "q 0"), {"prompt": "x"},
                      batch("bad", "x", url="elsewhere")),
}  # fmt: skip


@pytest.mark.parametrize("shards", [1, 3, 7])
@pytest.mark.parametrize("name", [*FORMS, "p.jsonl.gz", "p.csv.gz"])
@pytest.mark.usefixtures("codec")
def test_shards_equal_one_run(answer, capsys, name, shards):
    text = FORMS[name.removesuffix(".gz")].encode()
    pathlib.Path(name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    status = answer(name)
    statuses = [answer(name, "--shard", f"{place}/{shards}") for place in range(1, shards + 1)]
    assert max(statuses) == status
    assert merge("-o", "merged.jsonl", source=name, shards=shards) == status
    whole = timeless("p.results.jsonl")
    assert timeless("merged.jsonl") == whole and len(whole) == len(list(read_prompts(name))) > 4
    for place in range(1, shards + 1):
        assert timeless(shard(place, shards)) == whole[place - 1 :: shards]
    failed = sum(recognised(row)[2] is not None for row in rows("merged.jsonl"))
    counts = f"{len(whole) - failed} answers and {failed} failure{'s' * (failed != 1)}"
    assert f"{counts} of {shards} shard{'s' * (shards > 1)} merged\n" in capsys.readouterr().err
    before, asked = pathlib.Path("merged.jsonl").read_bytes(), answer.server.stats.requests
    assert answer(name, "-o", "merged.jsonl") == status
    assert (pathlib.Path("merged.jsonl").read_bytes(), answer.server.stats.requests) == (before, asked)


@pytest.mark.parametrize("limit", ["1", "6", "9", "99"])
def test_a_limit_comes_before_the_shards(answer, limit):
    assert answer("p.txt", "-n", limit) == 0
    for place in (1, 2, 3):
        assert answer("p.txt", "-n", limit, "--shard", f"{place}/3") == 0
    assert merge("-n", limit, "-o", "merged.jsonl", shards=3) == 0
    assert timeless("merged.jsonl") == timeless("p.results.jsonl")
    assert len(rows("merged.jsonl")) == min(10, int(limit))
    assert answer("p.txt", "--shard", "2/3") == 0  # the rest of it
    assert [row["id"] for row in rows(shard(2, 3))] == [2, 5, 8]


def test_the_default_output_of_a_merge_is_that_of_one_run(answer):
    assert [answer("p.txt", "--shard", f"{place}/2") for place in (2, 1)] == [0, 0]
    assert main(["p.txt", "--merge", "p.shard-*.results.jsonl"]) == 0  # a pattern that no shell has expanded
    assert [row["id"] for row in rows("p.results.jsonl")] == list(range(1, 11))
    assert main(["p.txt", "--merge", "p.shard-*.results.jsonl", "--overwrite", "-q"]) == 0


@pytest.mark.parametrize(("given", "named"), [
    ("out.jsonl", "out.shard-2-of-4.jsonl"),
    ("out", "out.shard-2-of-4"),
    ("a.b/out.results.jsonl", "a.b/out.shard-2-of-4.results.jsonl"),
    ("out.tar.jsonl", "out.tar.shard-2-of-4.jsonl"),
    ("a.b/out", "a.b/out.shard-2-of-4"),
    ("a.b", "a.b"),
    ("-", "-"),
])  # fmt: skip
def test_names(here, given, named):
    (here / "a.b").mkdir()
    assert in_shard(given, 2, 4) == named


def test_everything_is_named_by_the_shard(answer, here):
    pytest.importorskip("matplotlib")
    command = ["p.txt", "--shard", "2/4", "-o", "t.csv", "--report", "r.json", "--plot", "v.svg", "--max-cost", "1"]
    assert answer(*command, "--price", "1,1") == 0
    assert sorted(path.name for path in here.iterdir()) == [
        "p.txt", "r.shard-2-of-4.json", "t.shard-2-of-4.csv", "t.shard-2-of-4.csv.results.jsonl",
        "t.shard-2-of-4.csv.results.jsonl.spent", "v.shard-2-of-4.svg",
    ]  # fmt: skip
    records = (here / "t.shard-2-of-4.csv").read_text("utf-8-sig").splitlines()
    assert [record.partition(",")[0] for record in records] == ["id", "2", "6", "10"]
    report = json.loads((here / "r.shard-2-of-4.json").read_text())
    assert report["results"] == "t.shard-2-of-4.csv.results.jsonl"
    for place in (1, 3, 4):
        assert answer("p.txt", "--shard", f"{place}/4", "-o", "t.csv") == 0
    names = [f"t.shard-{place}-of-4.csv.results.jsonl" for place in range(1, 5)]
    assert main(["p.txt", "-o", "t.csv.results.jsonl", "--merge", *names]) == 0
    (here / "t.csv").touch()
    before = answer.server.stats.requests
    assert answer("p.txt", "-o", "t.csv") == 0 and answer.server.stats.requests == before
    assert len((here / "t.csv").read_text().splitlines()) == 11


def test_standard_streams(answer, monkeypatch, capsysbinary):
    with open("p.txt") as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert answer("-", "--shard", "3/4") == 0
    assert [json.loads(line)["id"] for line in capsysbinary.readouterr().out.splitlines()] == [3, 7]


def test_the_demo(here):
    assert main(["--demo", "--shard", "2/4", "-q", "-o", "out.jsonl"]) == 0
    assert [row["id"] for row in rows("out.shard-2-of-4.jsonl")] == [2, 6, 10, 14]


def test_a_dry_run_of_a_shard(answer, capsys):
    assert answer("p.txt", "--dry-run", "--shard", "2/4") == 0
    out = capsys.readouterr().out
    assert "prompts     3 in shard 2/4 of p.txt\n" in out and "What is 1?" in out
    assert answer("p.txt", "--dry-run", "--shard", "11/11") == 0
    assert "prompts     0 in shard 11/11 of p.txt\nto ask      0\n" in capsys.readouterr().out


def test_what_a_shard_asks_no_longer_is_superseded(answer, here):
    assert answer("p.txt", "--shard", "1/2") == 0
    (here / "p.txt").write_text((here / "p.txt").read_text().replace("What is 2?", "What is two?"))
    before = answer.server.stats.requests
    assert answer("p.txt", "--shard", "1/2") == 0 and answer.server.stats.requests == before + 1
    assert len(rows("p.shard-1-of-2.results.superseded.jsonl")) == 1 and len(rows(shard(1, 2))) == 5


def test_failed_prompts_of_a_shard(answer, stand_in):
    broken = ["p.txt", "--max-attempts", "1", "-q", "--base-url", stand_in(fault={"500": 1.0}).url]
    assert [main([*broken, "--shard", f"{place}/2"]) for place in (1, 2)] == [1, 1]
    assert merge() == 1
    assert [row["error"]["status"] for row in rows("p.results.jsonl")] == [500] * 10
    assert answer("p.txt", "--shard", "2/2", "--retry-failed") == 0
    assert merge("--overwrite") == 1
    assert [row["error"] is None for row in rows("p.results.jsonl")] == [False, True] * 5


@pytest.mark.skipif(os.name == "nt", reason="Windows knows no SIGKILL")
def test_a_killed_shard_goes_on(answer, here, stand_in, capsys):
    (here / "p.txt").write_text("".join(f"prompt {number}\n" for number in range(40)))
    server = stand_in(latency=0.15)
    command = ["p.txt", "-b", "stdlib", "-c", "4", "-q", "--base-url", server.url, "--shard", "2/2"]
    with subprocess.Popen([sys.executable, SCRIPT, *command], stderr=subprocess.DEVNULL) as process:
        while server.stats.requests < 9 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert answer("p.txt", "--shard", "1/2") == 0
    kept = len(rows(shard(2, 2)))
    assert 4 <= kept < 20 and merge() == 2
    what = f"{shard(2, 2)} is not finished, {20 - kept} prompts of 20 still open"
    assert f"{what}; run --shard 2/2 again, or name the -n that it was made with" in said(capsys)
    asked = server.stats.requests
    server.options = dataclasses.replace(server.options, latency=0.0)
    assert main(command) == 0 and server.stats.requests == asked + 20 - kept
    assert merge() == 0 and [row["id"] for row in rows("p.results.jsonl")] == list(range(1, 41))


# ---- What cannot be ------------------------------------------------------------------------------------------------


def said(capsys):
    """Return the last message on standard error, without the program's name."""
    return capsys.readouterr().err.splitlines()[-1].removeprefix("concurrent_prompts.py: ")


@pytest.mark.parametrize("text", ["0/4", "5/4", "2", "a/b", "", "1/4/2", "-1/4", "1/0", "٢/4", "1/9999999999"])
def test_no_shard(here, capsys, text):
    assert main(["p.txt", f"--shard={text}"]) == 2
    assert said(capsys) == f"--shard {text} is not K/N, the K-th of N shards, such as 1/4 or 4/4"


@pytest.mark.parametrize(("arguments", "sentence"), [
    ("p.txt --shard 1/2 --compare", "--compare writes no results to be merged; leave out --shard"),
    ("p.txt --merge a --demo", "--merge only puts results together; leave out --demo"),
    ("p.txt --merge a --compare -b stdlib", "--merge only puts results together; leave out --backend, --compare"),
    ("p.txt --merge a --dry-run", "--merge only puts results together; leave out --dry-run"),
    ("p.txt --merge a --shard 1/2", "--merge only puts results together; leave out --shard"),
    ("p.txt --merge a --to-batch b", "--merge only puts results together; leave out --to-batch"),
    ("p.txt --merge a --report r.json", "--merge only puts results together; leave out --report"),
    ("--merge a p.txt", "--merge needs the shards' input: name PROMPTS before it"),
    ("p.txt -o - --merge a", "--merge writes one file of results: -o FILE.jsonl"),
    ("p.txt -o t.csv --merge a",
     "--merge writes one file of results: -o t.csv.results.jsonl; "
     "the command of the shards without --shard then makes the table"),
    ("p.txt --to-batch b.jsonl -o x", "--to-batch only writes requests; leave out --output"),
    ("p.txt --to-batch b.jsonl --rpm 1 -c 3", "--to-batch only writes requests; leave out --concurrency, --rpm"),
    ("p.txt --to-batch b.txt", "--to-batch b.txt: the name of a file of Batch requests ends in .jsonl"),
    ("p.txt --to-batch=", "--to-batch : the name of a file of Batch requests ends in .jsonl"),
    ("p.jsonl --to-batch p.jsonl", "p.jsonl is the input; choose another file with --to-batch"),
    ("p.txt --to-batch no/b.jsonl",
     "no/b.jsonl cannot be written: there is no folder no; choose another file with --to-batch"),
])  # fmt: skip
def test_what_does_not_go_together(here, capsys, arguments, sentence):
    (here / "p.jsonl").write_text('"one"\n')
    assert main(arguments.split()) == 2
    assert said(capsys) == sentence
    assert sorted(path.name for path in here.iterdir()) == ["p.jsonl", "p.txt"]


def change(path, *changes):
    """Replace lines of a file: (number, text) each."""
    lines = pathlib.Path(path).read_bytes().splitlines(True)
    for number, text in changes:
        lines[number - 1 : number] = [text]
    pathlib.Path(path).write_bytes(b"".join(lines))


A, B = "p.shard-1-of-2.results.jsonl", "p.shard-2-of-2.results.jsonl"
AGAIN = "run --shard 2/2 again, or name the -n that it was made with"
FOREIGN = "of p.txt; name the input and the -n that the shards were made with"
SPOILT = {
    "missing": (lambda: [A], "shard 2/2 is missing; name its file, too, or run it: --shard 2/2"),
    "more missing": (lambda: ["p.shard-2-of-9.jsonl"],
                     "shard 1/9 is missing (and 7 more); name its file, too, or run it: --shard 1/9"),
    "twice": (lambda: [A, B, f"./{B}", A], f"shard 2/2 is there twice: {B} and {B}; leave out one of them"),
    "another number": (lambda: [A, "p.shard-1-of-3.jsonl"],
                       f"{A} is one of 2 shards and p.shard-1-of-3.jsonl one of 3; merge those of one run"),
    "no shard": (lambda: [A, "q.results.jsonl"],
                 "q.results.jsonl: the name does not say which shard it is; it is to hold .shard-K-of-N"),
    "no place": (lambda: ["p.shard-3-of-2.jsonl"],
                 "p.shard-3-of-2.jsonl: the name does not say which shard it is; it is to hold .shard-K-of-N"),
    "open": (lambda: change(B, (4, b""), (5, b"")),
             f"{B} is not finished, 2 prompts of 5 still open; {AGAIN}"),
    "cut short": (lambda: change(B, (5, b'{"id":9,"te')),
                  f"{B} is not finished, 1 prompt of 5 still open; {AGAIN}"),
    "in another order": (lambda: change(B, (2, b""), (4, pathlib.Path(B).read_bytes().splitlines(True)[1] * 2)),
                         f"{B} is not finished, line 2 is not in its place; {AGAIN}"),
    "one too many": (lambda: change(B, (5, pathlib.Path(B).read_bytes().splitlines(True)[4] * 2)),
                     f"{B} is not finished, line 6 is not in its place; {AGAIN}"),
    "another input's": (lambda: change(B, (3, pathlib.Path(A).read_bytes().splitlines(True)[2])),
                        f"{B} line 3 answers nothing in shard 2/2 {FOREIGN}"),
    "a longer input's": (lambda: pathlib.Path("p.txt").write_text("".join(f"What is {n}?\n" for n in range(9))),
                         f"{B} line 5 answers nothing in shard 2/2 {FOREIGN}"),
    "something else": (lambda: change(B, (3, b'{"a": 1}\n')),
                       f"{B} holds something other than results in line 3; mend that, and merge again"),
    "no JSON": (lambda: change(B, (5, b"end of file\n")),
                f"{B} holds something other than results in line 5; mend that, and merge again"),
    "not there": (lambda: os.remove(B),
                  f"cannot read {B}: No such file or directory; mend that, or run the shard again"),
    "the output": (lambda: [A, B, "-o", A], f"{A} is one of the shards; choose another file with -o"),
    "the output, by a pattern": (lambda: ["p.shard-*", "-o", A, "--overwrite"],
                                 f"{A} is one of the shards; choose another file with -o"),
    "the input": (lambda: [A, B, "-o", "p.txt"], "p.txt is the input; choose another file with -o"),
    "no folder": (lambda: [A, B, "-o", "no/x.jsonl"],
                  "no/x.jsonl cannot be written: there is no folder no; choose another file with -o"),
    "there already": (lambda: pathlib.Path("p.results.jsonl").write_text("kept"),
                      "p.results.jsonl is there already; choose another file with -o, or give it up (--overwrite)"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_what_cannot_be_merged(answer, here, capsys, name):
    assert [answer("p.txt", "--shard", f"{place}/2") for place in (1, 2)] == [0, 0]
    spoil, sentence = SPOILT[name]
    arguments = spoil()
    before = {path.name: path.read_bytes() for path in here.iterdir()}
    assert main(["p.txt", "--merge", *(arguments if isinstance(arguments, list) else [A, B])]) == 2
    assert said(capsys) == sentence
    assert {path.name: path.read_bytes() for path in here.iterdir()} == before


@pytest.mark.parametrize("name", ["open", "cut short", "in another order", "one too many"])
def test_what_is_to_be_run_again_can_be_merged_then(answer, name):
    assert [answer("p.txt", "--shard", f"{place}/2") for place in (1, 2)] == [0, 0]
    SPOILT[name][0]()
    assert answer("p.txt", "--shard", "2/2") == 0 and merge() == 0
    assert [row["id"] for row in rows("p.results.jsonl")] == list(range(1, 11))


def test_ids_that_have_moved(answer, here, capsys):
    assert [answer("p.txt", "--shard", f"{place}/2") for place in (1, 2)] == [0, 0]
    (here / "p.txt").write_text("\n" + (here / "p.txt").read_text())
    before = answer.server.stats.requests
    assert merge() == 2
    assert said(capsys).startswith(f"{A} is not finished, line 1 is not in its place")
    assert [answer("p.txt", "--shard", f"{place}/2") for place in (1, 2)] == [0, 0] and merge() == 0
    assert [row["id"] for row in rows("p.results.jsonl")] == list(range(2, 12))
    assert answer.server.stats.requests == before


def test_the_n_of_the_shards_has_to_be_named(answer, capsys):
    assert [answer("p.txt", "-n", "7", "--shard", f"{place}/2") for place in (1, 2)] == [0, 0]
    assert merge() == 2
    assert said(capsys) == f"{B} is not finished, 2 prompts of 5 still open; {AGAIN}"
    assert merge("-n", "6") == 2
    assert said(capsys) == f"{A} line 4 answers nothing in shard 1/2 {FOREIGN}"
    assert merge("-n", "7") == 0
    for place in ("1/2", "2/2"):
        assert answer("p.txt", "--shard", place) == answer("p.txt", "--shard", place, "-n", "3") == 0
    assert merge("--overwrite") == 0 and len(rows("p.results.jsonl")) == 10  # what is beyond the 3 has stayed


def test_a_shard_or_an_output_that_a_run_is_writing(answer, capsys):
    assert [answer("p.txt", "--shard", f"{place}/2") for place in (1, 2)] == [0, 0]
    with Journal(pathlib.Path(B)):
        assert merge() == 2
    assert said(capsys) == f"a run is writing {B}; merge when it has ended"
    with Journal(pathlib.Path("p.results.jsonl")):
        assert merge("--overwrite") == 2
    assert said(capsys) == "a run is writing p.results.jsonl; merge when it has ended"
    assert merge("--overwrite") == 0


def test_an_input_without_prompts(answer, here, capsys):
    (here / "p.txt").write_text("\n\n")
    for command in (["--shard", "2/2"], ["--merge", A, B], ["--to-batch", "b.jsonl"]):
        pathlib.Path(A).touch()
        pathlib.Path(B).touch()
        status = answer("p.txt", *command) if "--shard" in command else main(["p.txt", *command])
        assert status == 2
        assert said(capsys) == "p.txt holds no prompts"


def test_merging_holds_no_lines_in_memory(here):
    count, shards = 5_000, 4
    with open("p.txt", "w") as file:
        file.writelines(f"What is {number}?\n" for number in range(count))
    files = [open(shard(place, shards), "wb") for place in range(1, shards + 1)]  # noqa: SIM115 - closed below
    for prompt in read_prompts("p.txt"):
        files[prompt.number % shards].write(Result(prompt, "an answer " * 50).as_line())
    for file in files:
        file.close()
    tracemalloc.start()
    try:
        assert merge("-q", shards=shards) == 0
        assert tracemalloc.get_traced_memory()[1] < 1_000_000  # of 4 MB
    finally:
        tracemalloc.stop()
    assert [row["id"] for row in rows("p.results.jsonl")] == list(range(1, count + 1))


# ---- Batch request files ---------------------------------------------------------------------------------------------


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
    (here / "p.jsonl").write_text(jsonl(*(batch(f"r{number}", f"q {number}") for number in range(5))))
    assert main(["p.jsonl", "--to-batch", "b.jsonl"]) == 0
    assert rows("b.jsonl") == rows("p.jsonl")


def test_the_query_of_a_base_url_is_no_part_of_a_request_line(here):
    url = "https://x.openai.azure.com/openai/v1?api-version=1"
    assert main(["p.txt", "--to-batch", "b.jsonl", "--base-url", url]) == 0
    assert {row["url"] for row in rows("b.jsonl")} == {"/v1/chat/completions"}


def test_custom_ids_are_unique(here):
    items = [{"prompt": "a", "id": "x"}, {"prompt": "b", "id": "x"}, {"prompt": "c", "id": "x-2"}, batch("y", "d"),
             {"prompt": "e", "id": "x"}, {"prompt": "f", "id": 8}, {"prompt": "g", "id": "y"}, "h", "i",
             {"prompt": "j", "id": "8"}, {"prompt": "k", "id": "z"}, batch("z", "l")]  # fmt: skip
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
    items = [batch(f"{url} {model} {turn}", "x", model, f"/v1/{url}")
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
    advice = "choose another file with --to-batch, or give it up (--overwrite)"
    assert said(capsys) == f"b-3.jsonl is there already; {advice}"
    assert sorted(path.name for path in here.iterdir()) == ["b-3.jsonl", "p.txt"]
    assert main(["p.txt", "--to-batch", "b.jsonl", "--overwrite", "-q"]) == 0 and len(rows("b-3.jsonl")) == 2
    assert main(["p.txt", "--to-batch", "b.jsonl", "--overwrite", "-n", "5"]) == 0
    assert said(capsys) == "b-3.jsonl is of an earlier time: no request of these is in it"
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
