"""Parts of a job: every N-th prompt into a file of its own, and the files put together again."""

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

from concurrent_prompts import Result, main, open_journal, read_prompts, recognised
from concurrent_prompts.extras.shards import in_shard
from tests.helpers import SCRIPT, batch_line, jsonl, rows, said

CLOCKS = "attempts latency started slot_wait limit_wait retry_wait lost tries limit"


@pytest.fixture
def here(ten):
    return ten


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
    "p.ndjson": jsonl(*(batch_line(f"r{number}", f"q {number}") for number in range(8)), batch_line("r0", "q 0"),
                      {"prompt": "x"}, batch_line("bad", "x", url="elsewhere")),
}  # fmt: skip


@pytest.mark.parametrize("name", [*FORMS, "p.jsonl.gz", "p.csv.gz"])
@pytest.mark.usefixtures("codec")
def test_three_shards_equal_one_run(answer, capsys, name):
    shards_equal_one_run(answer, capsys, name, 3)


@pytest.mark.parametrize("shards", [1, 7])
@pytest.mark.parametrize("name", FORMS)
def test_so_do_one_and_seven(answer, capsys, name, shards):
    shards_equal_one_run(answer, capsys, name, shards)


def shards_equal_one_run(answer, capsys, name, shards):
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
    assert "prompts     0 in shard 11/11 of p.txt\nto send     0\n" in capsys.readouterr().out


def test_what_a_shard_asks_no_longer_is_superseded(answer, here):
    assert answer("p.txt", "--shard", "1/2") == 0
    (here / "p.txt").write_text((here / "p.txt").read_text().replace("What is 2?", "What is two?"))
    before = answer.server.stats.requests
    assert answer("p.txt", "--shard", "1/2") == 0 and answer.server.stats.requests == before + 1
    assert len(rows("p.shard-1-of-2.results.superseded.jsonl")) == 1 and len(rows(shard(1, 2))) == 5


def test_failed_prompts_of_a_shard(answer, stand_in):
    broken = ["p.txt", "--max-attempts", "1", "-q", "--base-url", stand_in(fault={"null-choices": 1.0}).url]
    assert [main([*broken, "--shard", f"{place}/2"]) for place in (1, 2)] == [1, 1]
    assert merge() == 1
    assert [row["error"]["status"] for row in rows("p.results.jsonl")] == [200] * 10
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
    assert f"{what}; run --shard 2/2 again, or name the -n that it was run with" in said(capsys)
    asked = server.stats.requests
    server.options = dataclasses.replace(server.options, latency=0.0)
    assert main(command) == 0 and server.stats.requests == asked + 20 - kept
    assert merge() == 0 and [row["id"] for row in rows("p.results.jsonl")] == list(range(1, 41))


# ---- What cannot be ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["0/4", "5/4", "2", "a/b", "", "1/4/2", "-1/4", "1/0", "٢/4", "1/9999999999"])
def test_no_shard(here, capsys, text):
    assert main(["p.txt", f"--shard={text}"]) == 2
    assert said(capsys) == f"--shard {text} is not K/N, the K-th of N shards, such as 1/4 or 4/4"


@pytest.mark.parametrize(("arguments", "sentence"), [
    ("p.txt --shard 1/2 --compare", "--compare writes no results that could be merged; leave out --shard"),
    ("p.txt --merge a --demo", "--merge only merges results; leave out --demo"),
    ("p.txt --merge a --compare -b stdlib", "--merge only merges results; leave out --backend, --compare"),
    ("p.txt --merge a --dry-run", "--merge only merges results; leave out --dry-run"),
    ("p.txt --merge a --shard 1/2", "--merge only merges results; leave out --shard"),
    ("p.txt --merge a --to-batch b", "--merge only merges results; leave out --to-batch"),
    ("p.txt --merge a --report r.json", "--merge only merges results; leave out --report"),
    ("--merge a p.txt", "--merge needs the shards' input: name PROMPTS before it"),
    ("p.txt -o - --merge a", "--merge writes one file of results: -o FILE.jsonl"),
    ("p.txt -o t.csv --merge a",
     "--merge writes one file of results: -o t.csv.results.jsonl; "
     "the command of the shards without --shard then makes the table"),
    ("p.txt --to-batch b.jsonl -o x", "--to-batch only writes requests; leave out --output"),
    ("p.txt --to-batch b.jsonl --rpm 1 -c 3", "--to-batch only writes requests; leave out --concurrency, --rpm"),
    ("p.txt --to-batch b.txt", "--to-batch b.txt: the name must end in .jsonl"),
    ("p.txt --to-batch=", "--to-batch : the name must end in .jsonl"),
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
AGAIN = "run --shard 2/2 again, or name the -n that it was run with"
FOREIGN = "of p.txt; name the input and the -n that the shards were run with"
SPOILT = {
    "missing": (lambda: [A], "shard 2/2 is missing; name its file, too, or run it: --shard 2/2"),
    "more missing": (lambda: ["p.shard-2-of-9.jsonl"],
                     "shard 1/9 is missing (and 7 more); name its file, too, or run it: --shard 1/9"),
    "twice": (lambda: [A, B, f"./{B}", A], f"shard 2/2 is given twice: {B} and {B}; leave out one of them"),
    "another number": (lambda: [A, "p.shard-1-of-3.jsonl"],
                       f"{A} is one of 2 shards and p.shard-1-of-3.jsonl one of 3; merge those of one run"),
    "no shard": (lambda: [A, "q.results.jsonl"],
                 "there is no file q.results.jsonl; name the shards' results, after all other options"),
    "no shard's name": (lambda: [A, "p.txt"],
                        "p.txt: the name does not say which shard it is; it must contain .shard-K-of-N"),
    "no place": (lambda: ["p.shard-3-of-2.jsonl"],
                 "p.shard-3-of-2.jsonl: the name does not say which shard it is; it must contain .shard-K-of-N"),
    "open": (lambda: change(B, (4, b""), (5, b"")),
             f"{B} is not finished, 2 prompts of 5 still open; {AGAIN}"),
    "cut short": (lambda: change(B, (5, b'{"id":9,"te')),
                  f"{B} is not finished, 1 prompt of 5 still open; {AGAIN}"),
    "in another order": (lambda: change(B, (2, b""), (4, pathlib.Path(B).read_bytes().splitlines(True)[1] * 2)),
                         f"{B} is not finished, line 2 is out of order; {AGAIN}"),
    "one too many": (lambda: change(B, (5, pathlib.Path(B).read_bytes().splitlines(True)[4] * 2)),
                     f"{B} is not finished, line 6 is out of order; {AGAIN}"),
    "another input's": (lambda: change(B, (3, pathlib.Path(A).read_bytes().splitlines(True)[2])),
                        f"{B} line 3 belongs to no prompt in shard 2/2 {FOREIGN}"),
    "a longer input's": (lambda: pathlib.Path("p.txt").write_text("".join(f"What is {n}?\n" for n in range(9))),
                         f"{B} line 5 belongs to no prompt in shard 2/2 {FOREIGN}"),
    "something else": (lambda: change(B, (3, b'{"a": 1}\n')),
                       f"{B} line 3 is not a result; correct that line, and merge again"),
    "no JSON": (lambda: change(B, (5, b"end of file\n")),
                f"{B} line 5 is not a result; correct that line, and merge again"),
    "not there": (lambda: os.remove(B),
                  f"cannot read {B}: No such file or directory; correct that, or run the shard again"),
    "the output": (lambda: [A, B, "-o", A], f"{A} is one of the shards; choose another file with -o"),
    "the output, by a pattern": (lambda: ["p.shard-*", "-o", A, "--overwrite"],
                                 f"{A} is one of the shards; choose another file with -o"),
    "the input": (lambda: [A, B, "-o", "p.txt"], "p.txt is the input; choose another file with -o"),
    "no folder": (lambda: [A, B, "-o", "no/x.jsonl"],
                  "no/x.jsonl cannot be written: there is no folder no; choose another file with -o"),
    "there already": (lambda: pathlib.Path("p.results.jsonl").write_text("kept"),
                      "p.results.jsonl already exists; choose another file with -o, or replace it (--overwrite)"),
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
    assert said(capsys).startswith(f"{A} is not finished, line 1 is out of order")
    assert [answer("p.txt", "--shard", f"{place}/2") for place in (1, 2)] == [0, 0] and merge() == 0
    assert [row["id"] for row in rows("p.results.jsonl")] == list(range(2, 12))
    assert answer.server.stats.requests == before


def test_the_n_of_the_shards_has_to_be_named(answer, capsys):
    assert [answer("p.txt", "-n", "7", "--shard", f"{place}/2") for place in (1, 2)] == [0, 0]
    assert merge() == 2
    assert said(capsys) == f"{B} is not finished, 2 prompts of 5 still open; {AGAIN}"
    assert merge("-n", "6") == 2
    assert said(capsys) == f"{A} line 4 belongs to no prompt in shard 1/2 {FOREIGN}"
    assert merge("-n", "7") == 0
    for place in ("1/2", "2/2"):
        assert answer("p.txt", "--shard", place) == answer("p.txt", "--shard", place, "-n", "3") == 0
    assert merge("--overwrite") == 0 and len(rows("p.results.jsonl")) == 10  # what is beyond the 3 has stayed


def test_a_shard_or_an_output_that_a_run_is_writing(answer, capsys):
    assert [answer("p.txt", "--shard", f"{place}/2") for place in (1, 2)] == [0, 0]
    with open_journal(pathlib.Path(B)):
        assert merge() == 2
    assert said(capsys) == f"a run is writing {B}; merge when it has ended"
    with open_journal(pathlib.Path("p.results.jsonl")):
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
