"""What can be said without eyes of the pictures: the counts, the cuts, the sizes, and whose words are in them."""

import importlib
import itertools
import json
import math
import os
import pathlib
import random
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest

import concurrent_prompts
from concurrent_prompts import main
from concurrent_prompts.extras import plot
from tests.helpers import ROOT

SVG = "{http://www.w3.org/2000/svg}"


def row(**fields):
    whole = {"id": 1, "error": None, "attempts": 1, "latency": 0.5, "started": 1.7e9}
    return whole | dict.fromkeys(("slot_wait", "limit_wait", "retry_wait", "lost"), 0.0) | fields


def rows(count, seed=0):
    """Rows as a run with a few failures and second attempts would write them."""
    dice = random.Random(seed)
    for number in range(count):
        waits = {name: dice.random() for name in ("slot_wait", "limit_wait")}
        again = {}
        if dice.random() < 0.1:
            again = {"attempts": 2, "lost": 0.25, "retry_wait": 0.5, "tries": [[sum(waits.values()), 0.25]]}
        error = {"type": "server_error", "message": "no"} if dice.random() < 0.1 else None
        start = 1.7e9 + dice.random() * count / 10
        yield row(id=number, started=start, latency=dice.lognormvariate(0, 0.5), error=error, **waits, **again)


@pytest.fixture
def drawn(tmp_path):
    """Return a function that draws runs of rows and returns the file's bytes."""
    pytest.importorskip("matplotlib")

    def draw(kind, *runs):
        path = tmp_path / f"picture.{kind}"
        plot.draw(str(path), [(f"run {place}", run) for place, run in enumerate(runs, 1)])
        content = path.read_bytes()
        path.unlink()
        assert os.listdir(tmp_path) == []
        return content

    return draw


@pytest.fixture
def np():
    pytest.importorskip("matplotlib")
    return importlib.import_module("numpy")


# ---- Where it may go -----------------------------------------------------------------------------------------


def test_check(tmp_path, monkeypatch):
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: name)
    for name in ("a.png", "a.SVG", "a.html"):
        plot.check(str(tmp_path / name))
    with pytest.raises(ValueError, match=r"a\.pdf: a picture's name must end in \.png, \.svg or \.html"):
        plot.check(str(tmp_path / "a.pdf"))
    with pytest.raises(ValueError, match=r"cannot be written: there is no folder .*; name another file"):
        plot.check(str(tmp_path / "none" / "a.png"))
    (tmp_path / "b.png").mkdir()
    with pytest.raises(ValueError, match="is not a regular file but a directory; name another file"):
        plot.check(str(tmp_path / "b.png"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match=r"cannot be written: the folder .* is write-protected; name another file"):
        plot.check(str(tmp_path / "a.png"))


def test_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"^a picture needs matplotlib: pip install matplotlib$"):
        plot.draw(str(tmp_path / "a.png"), [("run", [row()])])
    assert os.listdir(tmp_path) == []


def test_import_is_cheap():
    code = "import sys, concurrent_prompts.extras.plot; print(sorted({'numpy', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_written_whole_or_not_at_all(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    path = tmp_path / "a.png"
    path.write_bytes(b"before")
    monkeypatch.setattr(plot, "as_image", lambda *given: b"\x89PNG")

    def broken(*names):
        raise OSError("no")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", broken)
        with pytest.raises(OSError, match="no"):
            plot.draw(str(path), [("one", [row()])])
    assert (path.read_bytes(), os.listdir(tmp_path)) == (b"before", ["a.png"])
    plot.draw(str(path), [("one", [row()])])
    assert (path.read_bytes()[:4], os.listdir(tmp_path)) == (b"\x89PNG", ["a.png"])


# ---- What is read --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [True, False], ids=["as installed", "json alone"])
def test_damaged_lines_are_passed_over(tmp_path, monkeypatch, fast):
    if not fast:
        monkeypatch.setitem(sys.modules, "orjson", None)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id": 1}\n\xff\xfe\n\n[1]\n7\n{"id": 2, "te\n' + b"[" * 100_000 + b'\n{"id": 3}\n{"id": 4')
    assert [one["id"] for one in plot.read(path)] == [1, 3]


DAMAGE = [{"latency": math.nan}, {"slot_wait": -1.0}, {"started": "x"}, {"latency": True}, {"lost": 10**400},
          {"retry_wait": None}, {"attempts": 0}, {"attempts": None}, {"started": 1e300}]  # fmt: skip


def test_rows_without_clocks_are_passed_over(np):
    run = plot.Run.of("run", [row(**fields) for fields in DAMAGE] + [row(latency=0.25)])
    assert (run.rows, run.answers.tolist(), run.wall) == (len(DAMAGE) + 1, [0.25], 0.25)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], "no call to draw;"),
        ([row(attempts=0)], "no call to draw;"),
        ([{"custom_id": "a"}], "Batch output has no t"),
    ],
)
def test_nothing_to_draw(drawn, lines, words):
    with pytest.raises(ValueError, match=words):
        drawn("png", lines)


def spans_of(run, state):
    return [tuple(round(float(value), 6) for value in span) for span in zip(*run.spans[state], strict=True)]


def test_tries(np):
    again = row(attempts=3, slot_wait=0.1, limit_wait=0.2, retry_wait=0.3, lost=0.7, latency=0.5)
    run = plot.Run.of("run", [again | {"tries": [[0.1, 0.4], [0.7, 0.3]]}])  # 0.2 and then 0.3 between the attempts
    assert spans_of(run, plot.LOST) == [(0, 0.1, 0.5), (0, 0.7, 1.0)]
    assert spans_of(run, plot.BACKOFF) == [(0, 0.5, 0.62), (0, 1.0, 1.18)]
    assert spans_of(run, plot.WAIT) == [(0, 0.0, 0.1), (0, 0.62, 0.7), (0, 1.18, 1.3)]
    assert spans_of(run, plot.ANSWER) == [(0, 1.3, 1.8)]
    assert (run.wall, run.spans[plot.FAILED][0].size) == (pytest.approx(1.8), 0)


@pytest.mark.parametrize("tries", [None, 5, "ab", [[1]], [["a", 1]], [[0.1, 9.0]], [[0.5, 0.1], [0.1, 0.1]], [[-1, 1]]])
def test_unknown_tries_come_after_the_waits(np, tries):
    again = row(attempts=2, slot_wait=0.25, retry_wait=0.5, lost=1.0, error={"type": "x"})
    run = plot.Run.of("run", [again if tries is None else again | {"tries": tries}])
    assert spans_of(run, plot.WAIT) == [(0, 0.0, 0.25)]
    assert spans_of(run, plot.LOST) == [(0, 0.25, 1.25)]
    assert spans_of(run, plot.BACKOFF) == [(0, 1.25, 1.75)]
    assert spans_of(run, plot.FAILED) == [(0, 1.75, 2.25)]


def test_states_fill_the_time(np):
    run = plot.Run.of("run", rows(500))
    filled = sum(float((end - begin).sum()) for _, begin, end in run.spans)
    assert filled == pytest.approx(float((run.end - run.begin).sum()))
    assert (np.diff(run.begin) >= 0).all()


# ---- What is counted -----------------------------------------------------------------------------------------


def test_in_flight(np):
    dice = random.Random(1)
    begin = np.array([dice.randrange(100) for _ in range(200)], float)
    end = begin + np.array([dice.randrange(1, 20) for _ in begin], float)
    when, counts = plot.in_flight(begin, end)

    def brute(at):
        return sum(one <= at < two for one, two in zip(begin, end, strict=True))

    at = np.arange(0, 120, 0.5)
    assert [int(([0, *counts])[np.searchsorted(when, one, "right")]) for one in at] == [brute(one) for one in at]
    edges = np.arange(0, 121, 10.0)
    most = [max(brute(one) for one in np.arange(low, high, 0.5)) for low, high in itertools.pairwise(edges)]
    assert plot.most_in_bins(edges, when, counts).tolist() == most


def test_one_after_another_is_one_in_flight(np):
    start = np.arange(50.0)
    _, counts = plot.in_flight(start, start + 1.000003)  # the clocks are cut off at the microsecond
    assert counts.max() == 1


def test_coverage(np):
    dice = random.Random(2)
    begin = np.array([10 * dice.random() for _ in range(100)])
    end = np.minimum(begin + np.array([3 * dice.random() for _ in begin]), 10.0)
    group = np.array([dice.randrange(4) for _ in begin])
    share = plot.coverage(group, 4, begin, end, 20, 0.5)
    for which, column in itertools.product(range(4), range(20)):
        low, high = 0.5 * column, 0.5 * column + 0.5
        inside = np.minimum(end, high) - np.maximum(begin, low)
        assert share[which, column] == pytest.approx(inside[(group == which) & (inside > 0)].sum() / 0.5, abs=1e-9)


def test_percentiles(np):
    for count in (1, 2, 9, 10, 99, 100, 1000):
        values = np.arange(1.0, count + 1)
        found = plot.percentiles(values)
        for name, share in (("p50", 50), ("p90", 90), ("p99", 99)):
            if count * (100 - share) < 100:
                assert name not in found
            else:
                assert found[name] == min(one for one in values if 100 * (values <= one).sum() >= share * count)


def test_pauses_are_cut_out(np):
    starts = [0, 1, 2, 5000, 5001, 5020, 90000]
    run = plot.Run.of("run", [row(started=1.7e9 + start, latency=2.0) for start in reversed(starts)])
    assert run.begin.tolist() == [0, 1, 2, 4, 5, 7, 9]  # more than 10 s and a twentieth: all three are cut
    assert run.cuts == [(4, 4996), (7, 17), (9, 84978)]


def test_short_pauses_stay(np):
    run = plot.Run.of("run", [row(started=1.7e9 + start, latency=1000.0) for start in (0, 1040, 2200)])
    assert run.cuts == [(2040, 160)]  # 40 s are less than a twentieth of 3,000
    assert run.wall == 3040


def test_words(np):
    slow = plot.Run.of("slow", [row(started=1.7e9 + number, latency=1.0) for number in range(8)])
    fast = plot.Run.of("fast", [row(latency=0.25 * number + 0.25) for number in range(8)])
    assert plot.summary(slow) == "8 prompts in 8.00 s"
    assert plot.summary(fast) == (
        "8 prompts in 2.00 s, latencies add up to 9.00 s, 4.5 times the time that it took"
    )
    assert plot.against(slow, slow) == "slow: 8.00 s"
    assert plot.against(fast, slow) == "fast: 2.00 s, 4.0 times faster"
    assert plot.against(plot.Run.of("one", [row(error={})]), slow) == "one: 0.50 s for 1 prompt, 1 failed"
    failed = plot.Run.of("failed", [row(error={"type": "x"})] * 8)
    assert plot.against(failed, slow) == "failed: 0.50 s, 8 failed"  # which is not faster


# ---- What is drawn -------------------------------------------------------------------------------------------

HOSTILE = "</title><script>alert(1)</script>-->]]>&\x00\x1b[31m\ud800\u202e"
CASES = {
    "one": [row()],
    "no time at all": [row(latency=0.0)] * 3,
    "equal": [row(latency=0.25)] * 9,
    "all failed": [row(error={"type": HOSTILE}, latency=0.1 * number) for number in range(6)],
    "days apart": [row(started=1.7e9 + 86400 * number) for number in range(12)],
    "clock set back": [row(started=1.7e9 - 3600 * (number > 6) + number) for number in range(12)],
    "huge": [row(), row(latency=1e9), row(limit=1e9, latency=3e-7)],
    "hours": [row(started=1.7e9 + 600 * number, latency=3000.0) for number in range(12)],
    "decades": [row(latency=10 ** (number / 2 - 5)) for number in range(20)],
    "limits": [row(started=1.7e9 + number, limit=60 + number if number > 4 else None) for number in range(12)],
    "a limit far above": [row(started=1.7e9 + number, limit=1e6) for number in range(4)],
    "many": list(rows(plot.BARS + 1)),
    "damage": [row(**fields) for fields in DAMAGE] + [row(id=HOSTILE)],
}


@pytest.mark.parametrize("case", CASES)
def test_odd_runs(drawn, case, capfd):
    assert ET.fromstring(drawn("svg", CASES[case]).decode()).tag == f"{SVG}svg"
    assert capfd.readouterr() == ("", "")


def test_comparison(drawn):
    page = drawn("html", *CASES.values(), [row(attempts=0)]).decode()
    assert page.count("<td>") == len(CASES | {"": 0}) * page.count("<tr><th>") - len(CASES | {"": 0})
    assert page.count("</svg>") == 1


def test_bars(drawn):
    from matplotlib.figure import Figure

    runs = [plot.Run.of("one", rows(100)), plot.Run.of("two", rows(plot.BARS + 1))]
    figure = plot.lay_out(runs, 2, notes=False)
    assert isinstance(figure, Figure)
    few, many = figure.axes[:2]
    assert (len(few.images), len(many.images)) == (0, 1)
    assert few.get_ylim() == (100.5, 0.5) and many.get_ylim() == (plot.BARS + 1.5, 0.5)
    assert many.images[0].get_array().shape[0] < plot.BARS
    assert many.images[0].get_extent()[1] == runs[1].wall


def test_groups_keep_their_states(np):
    run = plot.Run.of("run", rows(2000))
    for state, (who, begin, end) in enumerate(run.spans):
        share = plot.coverage(who * 50 // 2000, 50, begin, end, 100, run.wall / 100)
        assert share.sum() * run.wall / 100 == pytest.approx(float((end - begin).sum())), plot.NAMES[state]
        assert (share > -1e-6).all()


def test_size(drawn):
    many = list(rows(5000))
    assert len(drawn("svg", many)) < 1_000_000  # as of 300: with a bar each it would have several MB
    assert len(drawn("html", many[: plot.BARS])) < 280_000  # ten of them, the most that are drawn: 2 MB


def test_notes_and_the_same_again(drawn):
    named = row(id="<b>&'\"\x1b", attempts=2, slot_wait=0.25, lost=0.125, error={"type": HOSTILE})
    svg = drawn("svg", [row(id=7, started=1.7e9 + 1), named])
    assert svg == drawn("svg", [row(id=7, started=1.7e9 + 1), named])
    notes = [one.text for one in ET.fromstring(svg.decode()).iter(f"{SVG}title")]
    assert notes[0] == "run 1"
    assert notes[2] == "7: latency 0.50 s"
    assert notes[1].startswith(
        "<b>&'\"\\u001b: sent 2 times, 0.25 s for a slot, 0.12 s in failed attempts, latency 0.50"
    )
    assert "failed: </title><script>" in notes[1]


def test_hostile_words(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "a.html"
    plot.draw(str(path), [(HOSTILE + "$x_", [row(id=HOSTILE, error={"type": HOSTILE})])] * 2)
    page = path.read_text("utf-8")
    assert "<script" not in page
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", page.replace("\r", ""))
    picture = page[page.index("<svg") : page.index("</svg>") + 6]
    assert ET.fromstring(picture).tag == f"{SVG}svg"


# ---- The command ---------------------------------------------------------------------------------------------


def command(*words, cwd, **environment):
    done = subprocess.run(
        [sys.executable, "-m", "concurrent_prompts.extras.plot", *words], cwd=cwd, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_command(tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("".join(f"{json.dumps(one)}\n" for one in rows(30)))
    odd = dict.fromkeys(("HOME", "MPLCONFIGDIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"), os.devnull)
    odd["MPLBACKEND"] = "module://that_is.not_there"
    assert command("a.jsonl", "b.jsonl", "-o", "p.svg", cwd=tmp_path, **odd) == (0, "", "")
    assert b"<title>a.jsonl, b.jsonl</title>" in (tmp_path / "p.svg").read_bytes()


def test_command_refuses(tmp_path, monkeypatch, capfd):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    for words, said in (
        (["none.jsonl", "-o", "p.png"], "No such file"),
        (["empty.jsonl", "-o", "p.png"], "there is no call to draw"),
        (["empty.jsonl", "-o", "p.gif"], "a picture's name must end in"),
        (["empty.jsonl"], "-o/--output"),
    ):
        with pytest.raises(SystemExit, match="2"):
            plot.main(words)
        out, err = capfd.readouterr()
        assert (out, err.count("\n")) == ("", 1) and said in err, words
    assert os.listdir(tmp_path) == ["empty.jsonl"]


# ---- Pictures of whole runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["prompts.txt"], "a.svg"),
        (["prompts.txt", "--compare", "-c", "1,2,auto"], "a.html"),
        (["prompts.txt", "-o", "-"], "a.png"),
        (["batch.jsonl"], "a.svg"),
    ],
)
def test_a_picture_of_every_kind_of_run(here, stand_in, capsys, arguments, name):
    pytest.importorskip("matplotlib")
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    request = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    pathlib.Path("batch.jsonl").write_text(json.dumps(request))
    server = stand_in(latency=0.02)
    assert main([*arguments, "--base-url", server.url, "--plot", name]) == 0
    assert f"picture in {name}" in capsys.readouterr().err
    start = {"a.svg": b"<?xml", "a.html": b"<!DOCTYPE html>", "a.png": b"\x89PNG"}[name]
    assert pathlib.Path(name).read_bytes().startswith(start) and pathlib.Path(name).stat().st_size > 5000


def test_a_picture_drawn_later_and_one_of_nothing(here, stand_in, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(plot, "as_image", lambda runs, count, kind: b"%d answers" % len(runs[0].answers))
    server = stand_in(latency=0.02)
    assert main(["prompts.txt", "--base-url", server.url]) == 0
    assert main(["prompts.txt", "--base-url", server.url, "--plot", "a.svg"]) == 0 and server.stats.requests == 3
    assert "picture in a.svg" in capsys.readouterr().err and pathlib.Path("a.svg").read_text() == "3 answers"
    pathlib.Path("bad.jsonl").write_text("{x\n")
    assert main(["bad.jsonl", "--base-url", server.url, "--plot", "b.svg"]) == 1
    assert "no picture: there is no call to draw" in capsys.readouterr().err and not pathlib.Path("b.svg").exists()


def test_a_picture_without_the_library_is_refused_before_the_first_call(here, stand_in, monkeypatch, capsys):
    monkeypatch.setattr(concurrent_prompts.importlib.util, "find_spec", lambda name: None)
    server = stand_in()
    assert main(["prompts.txt", "--base-url", server.url, "-b", "stdlib", "--plot", "a.svg"]) == 2
    assert "--plot: a picture needs matplotlib: pip install matplotlib" in capsys.readouterr().err
    assert server.stats.requests == 0
