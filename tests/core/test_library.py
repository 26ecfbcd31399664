"""What people build on: results as plain data, wrong functions, what they get and return, runs one after another."""

import asyncio
import contextvars
import copy
import dataclasses
import functools
import gc
import itertools
import json
import os
import pickle
import signal
import ssl
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

import concurrent_prompts
from concurrent_prompts import (
    Prompt,
    PromptError,
    Reply,
    Result,
    as_completed,
    http_error,
    run,
    run_concurrent,
    run_sequential,
)
from tests.helpers import ROOT, needs_extras, reply, serving, virtual


async def gathered(prompts, send, **more):
    """Return the results of as_completed, as a list."""
    return [result async for result in as_completed(prompts, send, **more)]


WAYS = {"sequential": run_sequential, "concurrent": run_concurrent, "as_completed": gathered}
all_ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


async def shout(prompt):
    await asyncio.sleep(0)
    return prompt.upper()


# ---- Results are plain data ----------------------------------------------------------------------------------


class Headers(dict):
    """Like those of some libraries: nothing that can be pickled."""

    def __reduce_ex__(self, protocol):
        raise TypeError("cannot pickle")


@pytest.fixture(scope="module")
def mixed():
    """Results of an answer, of the user's own exception, of a server's refusal, and of what a stop left unsent."""

    async def send(prompt):
        if prompt == "own":
            raise KeyError("own")
        if prompt == "refused":
            raise http_error(400, Headers({"x-request-id": "r"}), b'{"error": {"message": "bad", "code": "c"}}')
        if prompt == "stop":
            raise PromptError("enough", "no more", "stop")
        return prompt.upper()

    return run(["fine", "own", "refused", "stop", "late"], send, concurrency=1)


KINDS = [None, "KeyError", "c", "enough", "not_sent"]


@pytest.mark.parametrize("copied", [lambda results: pickle.loads(pickle.dumps(results)), copy.deepcopy, copy.copy])
def test_results_can_be_pickled_and_copied(mixed, copied):
    found = copied(mixed)
    assert [result.error and result.error.type for result in found] == KINDS
    assert [result.text for result in found] == ["FINE", None, None, None, None]
    for one, other in zip(found, mixed, strict=True):
        assert (str(one.exception), type(one.exception)) == (str(other.exception), type(other.exception))
        assert vars(one.exception or http_error(500, {}, b"")).keys() >= {"verdict", "wait", "http", "headers"}
        assert one.exception is None or one.exception.verdict == other.exception.verdict
        assert one.as_row() == other.as_row()


def test_an_error_of_a_class_of_ones_own_can_be_pickled():
    failure = Special("k", "text")
    failure.wait = 5.0
    again = pickle.loads(pickle.dumps(failure))
    assert (type(again), str(again), again.error, again.wait) == (Special, "text", failure.error, 5.0)


class Special(PromptError):
    pass


def test_results_become_dicts_and_json(mixed):
    rows = [dataclasses.asdict(result) for result in mixed]
    assert [row["error"] and row["error"].type for row in rows] == KINDS
    for row in rows:
        row["exception"], row["prompt"]["body"] = str(row["exception"]), row["prompt"]["body"].decode()
        json.dumps(row, allow_nan=False)


def test_results_become_a_frame(mixed):
    pandas = pytest.importorskip("pandas")
    for frame in (pandas.DataFrame(mixed), pandas.DataFrame([dataclasses.asdict(result) for result in mixed])):
        assert list(frame["text"][:1]) == ["FINE"] and len(frame) == 5


def test_results_go_through_a_web_framework(mixed):
    fastapi = pytest.importorskip("fastapi")
    encoded = fastapi.encoders.jsonable_encoder(mixed)
    assert json.loads(json.dumps(encoded, allow_nan=False))[0]["text"] == "FINE"


@pytest.mark.parametrize("kind", [list[Result], list[Result[str]]])
def test_results_have_a_schema_as_a_web_frameworks_return_type(mixed, kind):
    """FastAPI makes one of an endpoint's return type, when the program is imported."""
    adapter = pytest.importorskip("pydantic").TypeAdapter(kind)
    rows = json.loads(adapter.dump_json(mixed))
    assert [row["text"] for row in rows] == [result.text for result in mixed]
    assert [row["error"] and row["error"][0] for row in rows] == KINDS
    assert adapter.json_schema(mode="serialization")["items"]


class Large:
    """What only a frame holds."""


@pytest.mark.skipif(not concurrent_prompts.meanings("library", "extras"), reason="extras/library.py is away")
@all_ways
async def test_failures_do_not_keep_their_frames_alive(way):
    alive = []

    async def send(prompt):
        large = Large()
        alive.append(weakref.ref(large))
        try:
            try:
                raise LookupError("inner")
            except LookupError as inner:
                raise ExceptionGroup("group", [inner]) from None
        except ExceptionGroup as group:
            raise ValueError("outer") from group

    results = await way([str(number) for number in range(5)], send, max_attempts=1)
    gc.collect()
    assert len(alive) == 5 == len(results) and not [one for one in alive if one() is not None]
    assert {type(result.exception.__cause__) for result in results} == {ValueError}  # what it was is still told


# ---- A send that is wrong ------------------------------------------------------------------------------------


def plain(prompt):
    return prompt


async def parts(prompt):
    yield prompt


async def nothing():
    return ""


async def two(prompt, model):
    return ""


async def not_awaited(prompt):
    return shout(prompt)


async def stream(prompt):
    return parts(prompt)


async def returned(prompt):
    return ValueError("not raised")


async def bad_usage(prompt):
    return Reply("x", usage=[1, 2])


async def bad_headers(prompt):
    return Reply("x", headers=[("a", "b")])


WRONG = [plain, parts, nothing, two, functools.partial(two, model="m", more=1), lambda: shout(""), shout("x"), "shout"]
WRONG += [not_awaited, stream, returned, bad_usage, bad_headers]


@all_ways
@pytest.mark.parametrize("send", WRONG, ids=lambda send: getattr(send, "__name__", type(send).__name__))
@pytest.mark.filterwarnings("ignore:coroutine .*shout:RuntimeWarning")  # never awaited, as it is in the user's code
async def test_a_send_that_is_wrong_is_one_type_error(way, send):
    pytest.importorskip("concurrent_prompts.extras.library")
    calls = []

    @functools.wraps(send, updated=())
    def counted(*given):
        calls.append(given)
        return send(*given)

    with pytest.raises(TypeError, match="send"):
        await way(["a", "b", "c"], counted if send in (plain, parts, *WRONG[8:]) else send)
    assert len(calls) <= 3  # those that were started together


def test_what_takes_one_prompt_is_no_mistake():
    async def more(prompt, model="m", **others):
        return f"{prompt} {model}"

    class Client:
        async def send(self, prompt):
            return prompt

        async def __call__(self, prompt):
            return prompt

    found = [more, functools.partial(two, model="m"), Client().send, Client(), lambda *given: shout(*given)]
    assert [run(["a"], send)[0].text for send in found] == ["a m", "", "a", "a", "A"]


@all_ways
@pytest.mark.parametrize("first", [("a", "b"), 3, None, b"a", {"prompt": "a", "id": 1.5}, Reply("a")])
async def test_what_is_no_prompt_is_one_type_error(way, first):
    calls = []

    async def send(prompt):
        calls.append(prompt)

    with pytest.raises(TypeError, match="prompt 1: "):
        await way([first, first, "b"], send)
    assert not calls


# ---- What it receives and may return -------------------------------------------------------------------------

ITEMS = [
    "a",
    {"input": "b", "lang": "fr"},
    {"prompt": "c", "id": "x"},
    {"question": "d"},
    {"messages": [{"role": "user"}]},
]


@all_ways
async def test_send_receives_what_went_in(way):
    given = []

    async def send(prompt):
        given.append(prompt)

    results = await way([*ITEMS, Prompt(0, "own")], send, concurrency=1)
    assert given == [*ITEMS, "own"] and [result.id for result in results][:4] == [1, 2, "x", 4]


@needs_extras
@virtual
async def test_a_reply_brings_its_usage_and_its_headers():
    class Usage:
        def model_dump(self):
            return {"prompt_tokens": 7, "completion_tokens": 3}

    calls = []

    async def send(prompt):
        calls.append(asyncio.get_running_loop().time())
        await asyncio.sleep(0.1)
        left = str(max(0, 20 - len(calls)))
        told = {"X-RateLimit-Limit-Requests": "20", "x-ratelimit-remaining-requests": left}
        return Reply(prompt, "stop", "m", Usage(), headers=told | {"x-ratelimit-reset-requests": "60s"})

    began = asyncio.get_running_loop().time()
    results = await run_concurrent(map(str, range(40)), send, clock=asyncio.get_running_loop().time)
    assert {(result.text, result.model) for result in results} == {(str(n), "m") for n in range(40)}
    assert {tuple(result.tokens[:2]) for result in results} == {(7, 3)}
    assert sum(when < began + 2 for when in calls) <= 20 < len(calls)


@all_ways
async def test_an_asynchronous_iterable_gives_prompts(way):
    pytest.importorskip("concurrent_prompts.extras.library")
    closed = []

    async def prompts():
        try:
            for item in ITEMS:
                await asyncio.sleep(0)
                yield item
        finally:
            closed.append(True)

    given = []

    async def send(prompt):
        given.append(prompt)
        return "x"

    results = await way(prompts(), send, concurrency=1)
    assert given == ITEMS and sorted(result.prompt.number for result in results) == [*range(5)] and closed


@needs_extras
@virtual
async def test_an_asynchronous_iterable_that_waits_holds_up_nothing_and_ends_with_the_run():
    closed, clock = [], asyncio.get_running_loop().time

    async def prompts(failing=False):
        try:
            yield "a"
            if failing:
                raise OSError("disk")
            await asyncio.sleep(1e6)
        finally:
            closed.append(True)

    began = clock()
    async for result in as_completed(prompts(), shout, deadline=5, clock=clock):
        assert result.text == "A" and clock() < began + 1
    assert clock() == pytest.approx(began + 5) and len(closed) == 1
    with pytest.raises(PromptError, match="boom"):
        await run_concurrent(prompts(), boom, return_exceptions=False, clock=clock)
    with pytest.raises(OSError, match="disk"):
        await run_concurrent(prompts(failing=True), shout, clock=clock)
    assert clock() < began + 6 and len(closed) == 3


async def boom(prompt):
    raise ValueError("boom")


@virtual
async def test_an_iterable_that_breaks_costs_no_call_in_flight_its_answer():
    answered = []

    async def send(prompt):
        await asyncio.sleep(5)
        answered.append(prompt)
        return prompt

    def prompts():
        yield from "abc"
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        await run_concurrent(prompts(), send, clock=asyncio.get_running_loop().time)
    assert sorted(answered) == [*"abc"]


async def test_calls_begin_before_many_prompts_are_pulled():
    pulled, first = itertools.count(), []

    async def send(prompt):
        first.append(next(pulled))

    await run_concurrent((str(next(pulled)) for _ in range(1000)), send)
    assert first[0] < 10


# ---- Runs one after another ----------------------------------------------------------------------------------


@needs_extras
def test_one_client_serves_several_runs():
    """A client's connections live on the event loop that it was first used on."""
    loops, lock = [], asyncio.Lock()

    async def send(prompt):
        async with lock:
            loops.append(asyncio.get_running_loop())
            await asyncio.sleep(0)
        return prompt

    async def inside():
        return [result.text for result in run([*"ab"], send)]

    for _ in range(3):
        assert [result.text for result in run([*"ab"], send)] == [*"ab"]
    assert len(set(loops)) == 1 and not loops[0].is_closed()
    loops.clear()
    lock = asyncio.Lock()
    assert [asyncio.run(inside()) for _ in range(2)] == [[*"ab"]] * 2
    assert len(set(loops)) == 1 and not loops[0].is_closed()
    with ThreadPoolExecutor(1) as pool:
        lock = asyncio.Lock()
        assert [pool.submit(run, [*"ab"], send).result()[1].text for _ in range(2)] == ["b"] * 2
    gc.collect()
    assert loops[-1].is_closed()  # with its thread


@needs_extras
def test_one_sdk_client_serves_several_runs_over_tls():
    openai, trustme = pytest.importorskip("openai"), pytest.importorskip("trustme")
    authority, context = trustme.CA(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    trusting = ssl.create_default_context(cadata=authority.cert_pem.bytes().decode())

    with serving(lambda head, body: reply(), context) as (url, log):
        http = openai.DefaultAsyncHttpxClient(verify=trusting, trust_env=False)
        client = openai.AsyncOpenAI(api_key="k", base_url=url, http_client=http, max_retries=0)

        async def send(prompt):
            made = await client.chat.completions.create(model="m", messages=[{"role": "user", "content": prompt}])
            return made.choices[0].message.content

        for _ in range(3):
            assert [result.text or result.error for result in run([*"abcdefgh"], send, concurrency=4)] == ["hi"] * 8
        run(["close"], lambda prompt: client.close())
        assert len(log) == 24


@needs_extras
@pytest.mark.parametrize("nested", [False, True])
def test_context_variables_are_kept(nested):
    async def send(prompt):
        return variable.get()

    async def inside():
        return run(["a"], send)

    for value in ("one", "two"):
        variable.set(value)
        (result,) = asyncio.run(inside()) if nested else run(["a"], send)
        assert result.text == value


variable = contextvars.ContextVar("variable")


@needs_extras
def test_a_run_inside_a_running_loop_says_what_is_meant(caplog):
    async def inside():
        return run(["a"], shout)

    asyncio.run(inside())
    assert "await run_concurrent" in caplog.text


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_has_an_event_loop_of_its_own():
    assert run(["a"], shout)[0].text == "A"
    child = os.fork()
    if not child:
        os._exit(0 if run(["b"], shout)[0].text == "B" else 1)
    assert os.waitpid(child, 0)[1] == 0 and run(["c"], shout)[0].text == "C"


@needs_extras
def test_nothing_is_left_open_at_the_end(tmp_path):
    code = "import asyncio, concurrent_prompts as c\nasync def f(p): return await asyncio.to_thread(str, p)\n"
    code += "async def g(): return c.run(['b'], f)\nprint(c.run(['a'], f)[0].text, asyncio.run(g())[0].text)"
    loud = [sys.executable, "-X", "dev", "-W", "error", "-c", code]
    ran = subprocess.run(loud, cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert (ran.returncode, ran.stdout) == (0, "a b\n") and "Warning" not in ran.stderr


# ---- Nothing that was paid is lost ---------------------------------------------------------------------------


@needs_extras
@pytest.mark.parametrize("way", [run_sequential, run_concurrent])
@pytest.mark.parametrize("end", ["iterable", "raised", "wrong", "cancelled"])
async def test_what_ends_a_run_carries_the_results_so_far(way, end):
    async def send(prompt):
        if prompt == "c" and end == "cancelled":
            task.cancel()
            await asyncio.sleep(60)
        return {"raised": boom, "wrong": parts}.get(end, shout)(prompt) if prompt == "c" else await shout(prompt)

    def prompts():
        yield from "bac" if end != "iterable" else "ba"
        if end == "iterable":
            raise OSError("disk")

    async def sending(prompt):
        found = await send(prompt)
        return await found if end == "raised" and prompt == "c" else found

    task = asyncio.ensure_future(way(prompts(), sending, return_exceptions=False, concurrency=1))
    with pytest.raises((OSError, PromptError, TypeError, asyncio.CancelledError)) as caught:
        await task
    assert [result.text for result in caught.value.results][:2] == ["B", "A"]


@pytest.mark.parametrize("way", [run_sequential, run_concurrent])
async def test_a_generator_that_raises_a_cancellation_ends_no_run_in_silence(way):
    def prompts():
        yield from "ab"
        raise asyncio.CancelledError("mine")

    with pytest.raises(asyncio.CancelledError, match="mine") as caught:
        await way(prompts(), shout)
    assert [result.text for result in caught.value.results] == ["A", "B"]


@needs_extras
@pytest.mark.skipif(os.name == "nt", reason="Windows' own Ctrl-C")
@pytest.mark.parametrize("nested", [False, True])
def test_a_stop_button_leaves_the_results_so_far(nested):
    async def send(prompt):
        if prompt == "c":
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(60)
        return await shout(prompt)

    async def inside():
        return run([*"abc"], send, concurrency=1)

    with pytest.raises(KeyboardInterrupt) as caught:
        if nested:
            with asyncio.Runner() as runner:
                runner.get_loop().run_until_complete(inside())
        else:
            run([*"abc"], send, concurrency=1)
    assert [result.text for result in caught.value.results] == ["A", "B"]
    assert run(["d"], shout)[0].text == "D"


@needs_extras
@pytest.mark.parametrize("nested", [False, True])
def test_an_exit_in_the_middle_ends_the_run_and_no_later_one(nested):
    """SystemExit and KeyboardInterrupt leave an event loop at once, with the run's tasks unfinished on it."""
    loops, cancelled = [], []

    async def send(prompt):
        loops.append(asyncio.get_running_loop())
        if prompt == "c":
            await asyncio.sleep(0)
            sys.exit(3)
        try:
            await asyncio.sleep(60 * (prompt == "b"))
        except asyncio.CancelledError:
            cancelled.append(prompt)
            raise
        return await shout(prompt)

    async def inside(prompts):
        return run(prompts, send)

    def go(prompts):
        return asyncio.run(inside(prompts)) if nested else run(prompts, send)

    with ThreadPoolExecutor(1) as pool:  # its event loop goes with it
        with pytest.raises(SystemExit) as caught:
            pool.submit(go, [*"abc"]).result()
        assert [result.text for result in caught.value.results] == ["A"] and cancelled == ["b"]
        assert [result.text for result in pool.submit(go, [*"de"]).result()] == ["D", "E"]
    assert loops[0] is loops[-1]


@needs_extras
@pytest.mark.skipif(os.name == "nt", reason="Windows' own Ctrl-C")
def test_a_second_stop_in_a_notebook_leaves_a_thread_to_the_next_run():
    let_go = []

    async def send(prompt):
        if prompt != "a":
            return prompt
        event = asyncio.Event()
        let_go.append(functools.partial(asyncio.get_running_loop().call_soon_threadsafe, event.set))
        os.kill(os.getpid(), signal.SIGINT)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            os.kill(os.getpid(), signal.SIGINT)
            await event.wait()
            raise

    async def inside(prompt):
        return run([prompt], send)[0].text

    with asyncio.Runner() as runner:
        with pytest.raises(KeyboardInterrupt):
            runner.get_loop().run_until_complete(inside("a"))
        assert runner.get_loop().run_until_complete(inside("b")) == "b"
    let_go[0]()


STUBBORN = """
import asyncio, contextlib, sys, concurrent_prompts as c
c.sibling("extras", "library").PATIENCE = 0.01

async def send(prompt):
    if prompt == "b":
        sys.exit(3)
    while prompt == "a":
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
    return prompt

with contextlib.suppress(SystemExit):
    c.run(["a", "b"], send)
print(c.run(["c"], send)[0].text)
"""


@needs_extras
def test_a_send_that_refuses_to_end_after_an_exit_holds_up_no_later_run():
    ran = subprocess.run([sys.executable, "-c", STUBBORN], cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert ran.stdout == "c\n"
