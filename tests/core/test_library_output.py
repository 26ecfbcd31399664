"""output=, on_result= and progress=: what becomes of the results of a run in Python beside being returned."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

import concurrent_prompts
from concurrent_prompts import PromptError, Reply, UsageError, as_completed, load_backend, main, run, run_concurrent
from tests.core.test_library import all_ways, shout
from tests.helpers import ROOT, reply, rows, serving

PROMPTS = ["c", {"prompt": "a", "id": "x", "lang": "fr"}, "b"]


class Counting:
    """The user's own function: capitals, with the tokens that they cost; it fails for what is in `broken`."""

    def __init__(self, broken=()):
        self.asked, self.broken = [], broken

    async def __call__(self, item):
        text = item if isinstance(item, str) else item["prompt"]
        self.asked.append(text)
        await asyncio.sleep(0)
        if text in self.broken:
            raise LookupError(f"no {text}")
        usage = {"prompt_tokens": 7, "completion_tokens": 3}
        return Reply(text.upper(), "stop", "m", usage, extra={"service_tier": "flex"})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "answers.jsonl"


# ---- output= ---------------------------------------------------------------------------------------------------


@all_ways
async def test_what_the_file_holds_is_not_asked_again(way, path):
    send = Counting()
    first = await way(PROMPTS, send, output=path)
    assert [row["text"] for row in rows(path)] == ["C", "A", "B"]  # in the input's order
    again = await way(["new", *PROMPTS], send, output=path)
    assert sorted(send.asked) == ["a", "b", "c", "new"]
    assert sorted((one.text, one.kept) for one in again) == [("A", True), ("B", True), ("C", True), ("NEW", False)]
    before, kept = ({one.text: one for one in found}["A"] for found in (first, again))
    assert (kept.id, kept.prompt.columns, kept.attempts) == ("x", {"lang": "fr"}, 1)
    assert (kept.usage, kept.tokens[:2], kept.model) == (before.usage, [7, 3], "m") and kept.extra == before.extra
    assert kept.as_row() | {"request": ""} == before.as_row() | {"request": ""}
    assert [row["text"] for row in rows(path)] == ["NEW", "C", "A", "B"]


def test_results_come_in_the_inputs_order(path):
    run(PROMPTS[1:], Counting(), output=path)
    assert [(one.text, one.kept) for one in run(PROMPTS, Counting(), output=path)] == [
        ("C", False),
        ("A", True),
        ("B", True),
    ]


@pytest.mark.parametrize("form", [list, iter, "async"])
def test_any_iterable_is_resumed(path, form):
    async def prompts():
        for one in PROMPTS:
            yield one

    if form == "async":
        pytest.importorskip("concurrent_prompts.extras.library")
    send = Counting()
    for _ in range(2):
        results = run(prompts() if form == "async" else form(PROMPTS), send, output=str(path))
        assert [one.text for one in results] == ["C", "A", "B"]
    assert len(send.asked) == 3 and all(one.kept for one in results)


def test_failures_are_kept_or_asked_again(path):
    run(PROMPTS, Counting(broken="a"), output=path)
    kept = run(PROMPTS, send := Counting(), output=path)[1]
    assert (send.asked, kept.kept, kept.error.type, kept.error.message) == ([], True, "LookupError", "no a")
    with pytest.raises(PromptError, match="no a"):
        run(PROMPTS, send, output=path, return_exceptions=False)
    assert run(PROMPTS, send, output=path, retry_failed=True)[1].text == "A" and send.asked == ["a"]
    assert len(run(PROMPTS, send, output=path, overwrite=True)) == 3 and len(send.asked) == 4


def test_the_command_and_the_library_share_a_file(here):
    pytest.importorskip("concurrent_prompts.backends.stdlib")
    prompts, path = ["What is one?", "What is two?", "What is three?"], here / "prompts.results.jsonl"
    with serving(lambda head, body: reply()) as (url, log):
        api = load_backend("stdlib", base_url=url)
        assert [one.text for one in run(prompts[:2], api, output=path)] == ["hi", "hi"]
        assert main(["prompts.txt", "-b", "stdlib", "--base-url", url, "-q"]) == 0
        assert [one.kept for one in run(prompts, load_backend("stdlib", base_url=url), output=path)] == [True] * 3
        assert [head.split()[0] for head, _ in log].count(b'POST') == 3, [body for _, body in log]
        assert [row["id"] for row in rows(path)] == [1, 2, 3]


def test_batch_requests_come_back_with_their_texts(path):
    pytest.importorskip("concurrent_prompts.backends.stdlib")
    line = {"custom_id": "one", "method": "POST", "url": "/v1/chat/completions"}
    line["body"] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
    with serving(lambda head, body: reply()) as (url, log):
        for _ in range(2):
            (result,) = run([line], load_backend("stdlib", base_url=url), output=path)
            assert (result.text, result.id) == ("hi", "one")
    assert len(log) == 1 and result.kept


@pytest.mark.parametrize("end", ["iterable", "cancelled", "raised", "stop"])
async def test_nothing_that_was_answered_is_lost(path, end):
    """Whatever ends a run: what it has answered stands in the file, and the next run goes on from there."""

    async def send(prompt):
        if prompt == "c" and end == "cancelled":
            task.cancel()
            await asyncio.sleep(60)
        if prompt == "c" and end != "iterable":
            raise PromptError("over", "over", "stop" if end == "stop" else "fail")
        return await shout(prompt)

    def prompts():
        yield from "ba"
        if end == "iterable":
            raise OSError("disk")
        yield from "cd"

    options = {"concurrency": 1, "output": path, "return_exceptions": False}
    task = asyncio.ensure_future(run_concurrent(prompts(), send, **options))
    with pytest.raises((OSError, PromptError, asyncio.CancelledError)):
        await task
    answered = [row["text"] for row in rows(path) if row["text"]]
    assert answered == ["B", "A"]
    results = await run_concurrent([*"bacd"], shout, output=path, retry_failed=True)
    assert [(one.text, one.kept) for one in results] == [("B", True), ("A", True), ("C", False), ("D", False)]


@pytest.mark.skipif(os.name == "nt", reason="Windows' own Ctrl-C")
def test_ctrl_c_leaves_the_answers_in_the_file(path):
    async def send(prompt):
        if prompt == "c":
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(60)
        return await shout(prompt)

    with pytest.raises(KeyboardInterrupt):
        run([*"abc"], send, concurrency=1, output=path)
    assert [row["text"] for row in rows(path)] == ["A", "B"]


async def test_a_consumer_that_leaves_early_keeps_what_was_answered(path):
    async with contextlib.aclosing(as_completed([*"abcdef"], shout, output=path, concurrency=2)) as results:
        async for _ in results:
            break
    answered = len(rows(path))
    assert 1 <= answered < 6
    assert sum(one.kept for one in await run_concurrent([*"abcdef"], shout, output=path)) == answered


async def test_many_kept_results_neither_pile_up_nor_hold_up_the_loop(path):
    prompts, seen = [str(number) for number in range(300)], []
    await run_concurrent(prompts, shout, output=path)
    pulled = (seen.append(one) or one for one in prompts)
    async for result in as_completed(pulled, shout, output=path, concurrency=4):
        assert result.kept and len(seen) < int(result.text) + 12
        await asyncio.sleep(0)
    assert len(seen) == 300


class Odd:
    """What no line of JSON can hold."""


def test_what_no_line_can_hold_is_one_type_error(path):
    async def odd(prompt):
        return Odd()

    with pytest.raises(TypeError, match="send returned a value that JSON cannot hold") as caught:
        run(["a", "b"], odd, output=path, concurrency=1)
    assert isinstance(caught.value.results[0].text, Odd) and not rows(path)
    send = Counting()
    with pytest.raises(TypeError, match="prompt 2 contains a value that JSON cannot hold"):
        run(["a", {"prompt": "b", "picture": Odd()}], send, output=path)
    assert send.asked == ["a"] and [row["text"] for row in rows(path)] == ["A"]


def test_a_file_that_cannot_be_used_is_refused_before_the_first_call(tmp_path):
    send = Counting()
    for name in ("answers.csv", "answers.json", "answers.txt"):
        with pytest.raises(UsageError, match="JSON Lines"):
            run(["a"], send, output=tmp_path / name)
    (tmp_path / "other.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(UsageError, match="line 1 is not a result"):
        run(["a"], send, output=tmp_path / "other.jsonl")
    with pytest.raises(ValueError, match="need a results file"):
        run(["a"], send, retry_failed=True)
    assert not send.asked


def test_the_answers_of_another_job_are_not_written_over(path):
    send = Counting()
    run(["z"], send, output=path)
    if concurrent_prompts.meanings("outputs", "extras"):
        with pytest.raises(UsageError, match="results for a different input"):
            run(["a"], send, output=path)
        assert send.asked == ["z"] and [row["text"] for row in rows(path)] == ["Z"]
    else:  # a lone copy keeps them
        run(["a"], send, output=path)
        assert [row["text"] for row in rows(path)] == ["A", "Z"]


def test_a_disk_that_takes_no_more_stops_the_run(path, monkeypatch):
    def full(self, result):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(concurrent_prompts.Journal, "append", full)
    results = run([*"abc"], shout, output=path, concurrency=1)
    assert (results[0].text, results[0].done) == ("A", False)
    assert "No space left" in results[1].error.message and not results[1].attempts


def test_a_lone_copy_keeps_and_resumes(tmp_path):
    shutil.copy(ROOT / "concurrent_prompts.py", tmp_path / "mine.py")
    (tmp_path / "use.py").write_text(
        "import mine\nasync def send(prompt):\n    print('asked', prompt)\n    return prompt.upper()\n"
        "for prompts in (['b', 'a'], iter(['c', 'b', 'a'])):\n"
        "    print(*((one.text, one.kept) for one in mine.run(prompts, send, output='o.jsonl')))\n"
        "for options in ({'progress': True}, {'on_result': print}):\n"
        "    try:\n        mine.run(['a'], send, **options)\n"
        "    except mine.UsageError as missing:\n        print(missing)\n"
    )
    ran = subprocess.run([sys.executable, "use.py"], cwd=tmp_path, capture_output=True, text=True, timeout=50)
    assert ran.stdout.splitlines() == [
        "asked b",
        "asked a",
        "('B', False) ('A', False)",
        "asked c",
        "('C', False) ('B', True) ('A', True)",
        "progress=True needs the folder extras/, which goes beside mine.py",
        "on_result= needs the folder extras/, which goes beside mine.py",
    ], ran.stderr


# ---- on_result= ------------------------------------------------------------------------------------------------


@all_ways
@pytest.mark.parametrize("kind", ["function", "coroutine function"])
async def test_each_new_result_goes_to_the_users_function(way, path, kind):
    pytest.importorskip("concurrent_prompts.extras.library")
    got = []

    async def slowly(result):
        await asyncio.sleep(0)
        got.append(result.text or result.error.type)

    def at_once(result):
        got.append(result.text or result.error.type)

    sink = at_once if kind == "function" else slowly
    await way([*"ab"], Counting(broken="b"), on_result=sink, output=path)
    assert sorted(got) == ["A", "LookupError"]
    assert len(await way([*"abc"], Counting(), on_result=sink, output=path)) == 3
    assert sorted(got) == ["A", "C", "LookupError"]  # those that were kept have been there before


@all_ways
async def test_a_function_of_the_users_that_fails_ends_the_run_and_loses_nothing(way, path):
    pytest.importorskip("concurrent_prompts.extras.library")

    def sink(result):
        raise ConnectionError("no database")

    with pytest.raises(ConnectionError, match="no database") as caught:
        await way([*"abc"], shout, on_result=sink, output=path, concurrency=1)
    assert [row["text"] for row in rows(path)] == ["A"]
    if hasattr(caught.value, "results"):  # as_completed has yielded them
        assert [one.text for one in caught.value.results] == ["A", None, None]


@all_ways
@pytest.mark.parametrize("place", ["on_result", "prompts"])
async def test_a_cancellation_that_the_users_code_awaits_is_its_failure_and_cuts_nothing_short_unseen(way, place):
    pytest.importorskip("concurrent_prompts.extras.library")
    cancelled = asyncio.get_running_loop().create_future()
    cancelled.cancel()

    async def sink(result):
        await cancelled

    async def prompts():
        yield "a"
        await cancelled

    with pytest.raises(asyncio.CancelledError):
        if place == "prompts":
            await way(prompts(), shout)
        else:
            await way([*"abc"], shout, on_result=sink, concurrency=1)


# ---- progress= -------------------------------------------------------------------------------------------------


@all_ways
async def test_the_progress_is_shown(way, monkeypatch, capsys, path):
    progress = pytest.importorskip("concurrent_prompts.extras.progress")
    monkeypatch.setattr(progress.Progress, "EVERY", 0.0)

    async def send(prompt):
        for _ in range(20):
            await asyncio.sleep(0)
        return prompt

    await way(["a"], send, output=path)
    capsys.readouterr()
    await way([*"abc"], send, progress=True, concurrency=1, output=path)
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("2 of 3 done, ") for line in lines) and "3 of 3 done, " not in lines[0]
    await way(iter("ab"), send, progress=True, concurrency=1)
    assert "1 done, " in capsys.readouterr().err


def test_the_progress_shows_what_answers_cost_at_a_told_price(monkeypatch, capsys):
    progress = pytest.importorskip("concurrent_prompts.extras.progress")
    monkeypatch.setattr(progress.Progress, "EVERY", 0.0)

    async def send(prompt):
        for _ in range(20):
            await asyncio.sleep(0)
        return Reply(prompt, usage={"prompt_tokens": 1_000_000, "completion_tokens": 2_000_000})

    run([*"abc"], send, progress=True, concurrency=1, price=(1, 2))
    assert "3 of 3 done, 0 in flight, $15.00" in capsys.readouterr().err
    run([*"abc"], send, progress=True, concurrency=1)
    assert "$" not in capsys.readouterr().err


def test_in_a_notebook_the_bar_is_that_of_tqdm_auto(monkeypatch):
    pytest.importorskip("concurrent_prompts.extras.progress")
    auto, shown = type(sys)("tqdm.auto"), []

    class Bar:
        def __init__(self, **given):
            self.n = 0
            shown.append(given["total"])

        def refresh(self):
            shown.append(self.n)

        def close(self):
            shown.append("closed")

    auto.tqdm = Bar
    monkeypatch.setitem(sys.modules, "tqdm.auto", auto)
    monkeypatch.setitem(sys.modules, "ipykernel", type(sys)("ipykernel"))
    assert len(run([*"ab"], shout, progress=True)) == 2
    assert shown[:2] == [2, 0] and shown[-2:] == [2, "closed"]


def test_rows_of_a_run_in_python_are_strict_json(path):
    async def send(prompt):
        return float("nan") if prompt == "a" else {"parts": (1, 2), 3: None}

    run([*"ab"], send, output=path)
    found = [json.loads(line, parse_constant=pytest.fail) for line in path.read_bytes().splitlines()]
    assert [row["text"] for row in found] == [None, {"parts": [1, 2], "3": None}]
