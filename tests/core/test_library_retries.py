"""retry= and resend_lost=: what the user decides about retries, and what happens if they do not."""

import asyncio
import itertools
import json
import types

import pytest

from concurrent_prompts import PromptError, http_error, load_backend, run, run_concurrent, run_sequential
from concurrent_prompts.backends import failures
from tests.core.test_library import all_ways
from tests.helpers import in_rows, virtual


class Failing:
    """The user's own function: `failures` are what it raises one after the other, per prompt, before it answers."""

    def __init__(self, **failures):
        self.failures, self.calls = {name: iter(several) for name, several in failures.items()}, []

    async def __call__(self, prompt):
        self.calls.append((prompt, asyncio.get_running_loop().time()))
        await asyncio.sleep(0.01)
        if failure := next(self.failures.get(prompt, iter(())), None):
            raise failure
        return prompt.upper()


def of(results):
    return [result.text or result.error.type for result in results]


def timed():
    return {"clock": asyncio.get_running_loop().time}


# ---- The default -----------------------------------------------------------------------------------------------


def not_json():
    try:
        json.loads("no JSON")
    except ValueError as failure:
        return failure


BUGS = [not_json(), ValueError("x"), KeyError("x"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"), AssertionError()]
BUGS += [TypeError("x"), LookupError(), RuntimeError("x"), ArithmeticError(), NotImplementedError(), EOFError()]


@all_ways
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: type(bug).__name__)
async def test_a_bug_of_ones_own_costs_one_call(way, bug):
    send = Failing(bad=[bug] * 9)
    results = await way(["a", "bad", "b"], send, concurrency=1)
    assert sorted(of(results)) == sorted(["A", type(bug).__name__, "B"])
    assert [prompt for prompt, _ in send.calls] == ["a", "bad", "b"]


def test_a_reply_that_a_library_could_not_read_is_asked_for_again():
    library = types.ModuleType("httpx.models")
    exec("import json\ndef read(text):\n    return json.loads(text)", vars(library))
    for read, verdict in ((library.read, "retry"), (json.loads, "fail")):
        with pytest.raises(ValueError) as caught:
            read("no JSON")
        assert failures.classified(caught.value, "no JSON").verdict == verdict


@in_rows("place", [0, 50, 93])
@in_rows("concurrency", [1, 8, "auto"])
@virtual
async def test_one_404_of_ones_own_does_not_stop_the_others(place, concurrency):
    prompts = [f"p{number}" for number in range(94)]
    send = Failing(**{prompts[place]: [http_error(404, {}, b"no such page")] * 9})
    results = await run_concurrent(prompts, send, concurrency=concurrency, **timed())
    assert [one.error.status for one in results if one.error] == [404] and len(send.calls) <= 97


@virtual
async def test_404s_of_all_prompts_stop_a_run():
    prompts = [f"p{number}" for number in range(50)]
    send = Failing(**{one: [http_error(404, {}, b"no such model")] * 9 for one in prompts})
    results = await run_concurrent(prompts, send, **timed())
    assert len(send.calls) <= 16 and of(results)[-1] == "not_sent"


@in_rows("max_attempts", [1, 2, 8])
@virtual
async def test_a_first_prompt_that_takes_too_long_does_not_stop_a_run(max_attempts):
    async def send(prompt):
        await asyncio.sleep(1e6 if prompt == "slow" else 0.01)
        return prompt.upper()

    options = {"timeout": 5, "max_attempts": max_attempts, **timed()}
    assert of(await run_sequential(["slow", "a", "b"], send, **options)) == ["timeout", "A", "B"]


@virtual
async def test_silence_for_all_prompts_stops_a_run():
    async def send(prompt):
        await asyncio.sleep(1e6)

    results = await run_sequential([*"abcdef"], send, timeout=5, max_attempts=1, **timed())
    assert of(results) == [*["timeout"] * 3, *["not_sent"] * 3]


# ---- retry= ----------------------------------------------------------------------------------------------------


@pytest.fixture
def extras():
    """Skip a test of what extras/ does where that is not there."""
    pytest.importorskip("concurrent_prompts.extras.library")


@pytest.mark.usefixtures("extras")
@virtual
async def test_the_user_decides():
    class Busy(Exception):
        pass

    send = Failing(
        again=[ValueError("x")] * 3,
        seconds=[Busy()] * 12,
        default=[KeyError("x")] * 9,
        never=[ConnectionResetError("x")] * 9,
        limited=[http_error(429, {}, b"")] * 9,
    )
    asked = []

    def retry(failure):
        asked.append(failure)
        kind = type(failure)
        if kind is Busy:
            return 7
        return {ValueError: "retry", ConnectionResetError: "fail", PromptError: "fail"}.get(kind)

    results = await run_sequential(
        ["seconds", "again", "default", "never", "limited"], send, retry=retry, max_attempts=13, **timed()
    )
    assert of(results) == ["SECONDS", "AGAIN", "KeyError", "connection_error", "http_429"]
    assert [one.attempts for one in results] == [13, 4, 1, 1, 1]
    times = [when for prompt, when in send.calls if prompt == "seconds"]
    assert [after - before for before, after in itertools.pairwise(times)] == pytest.approx([7.01] * 12)
    assert not results[3].error.retryable and isinstance(results[3].exception.__cause__, ConnectionResetError)
    assert len(asked) == 12 + 3 + 3


@pytest.mark.usefixtures("extras")
@virtual
async def test_the_user_may_stop_the_run():
    send = Failing(b=[ValueError("over")])
    results = await run_sequential([*"abc"], send, retry=lambda failure: "stop", **timed())
    assert of(results) == ["A", "ValueError", "not_sent"] and "over" in results[2].error.message
    send = Failing(a=[http_error(400, {}, b"bad")])
    assert of(await run_sequential([*"abc"], send, retry=lambda failure: "stop", **timed()))[1:] == ["not_sent"] * 2


@all_ways
@pytest.mark.usefixtures("extras")
@pytest.mark.parametrize("answer", [True, "again", -1, float("nan"), float("inf"), [], ValueError])
async def test_a_decision_that_is_none_is_one_type_error(way, answer):
    def retry(failure):
        if answer is ValueError:
            raise ValueError("a bug in it")
        return answer

    send = Failing(a=[KeyError("x")] * 9)
    with pytest.raises(TypeError, match=r"retry (returned|raised)"):
        await way([*"abc"], send, retry=retry, concurrency=1)
    assert [prompt for prompt, _ in send.calls] == ["a"]


@pytest.mark.parametrize("option", ["retry", "on_result"])
async def test_what_is_no_function_is_a_type_error_before_the_first_call(option):
    pytest.importorskip("concurrent_prompts.extras.library")
    with pytest.raises(TypeError, match=f"{option} must be a function, not str 'fail'"):
        await run_concurrent(["a"], lambda prompt: pytest.fail("called"), **{option: "fail"})


def test_a_backend_takes_no_retry():
    with pytest.raises(ValueError, match="for your own function"):
        run(["a"], load_backend("stdlib", base_url="http://127.0.0.1:9/v1"), retry=lambda failure: "retry")


# ---- Side effects ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resend_lost", [True, False])
@virtual
async def test_no_call_is_given_up_where_that_is_switched_off(resend_lost):
    calls = []

    async def send(prompt):
        calls.append(prompt)
        await asyncio.sleep(500 if prompt == "p0" and calls.count("p0") == 1 else 0.1)
        return prompt

    prompts = [f"p{number}" for number in range(300)]
    await run_concurrent(prompts, send, concurrency=4, resend_lost=resend_lost, **timed())
    assert len(calls) == (301 if resend_lost else 300)
