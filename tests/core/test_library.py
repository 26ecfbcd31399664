"""What people build on: results as plain data, wrong functions, what they get and return, runs one after another."""

import asyncio
import copy
import dataclasses
import gc
import json
import pickle
import weakref

import pytest

from concurrent_prompts import PromptError, as_completed, http_error, run, run_concurrent, run_sequential


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


class Large:
    """What only a frame holds."""


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
