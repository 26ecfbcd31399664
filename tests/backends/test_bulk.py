"""Bulk backends: what they take and yield, and what the core makes of it."""

import asyncio
import json
import pathlib
import signal
import types

import pytest

import concurrent_prompts
from concurrent_prompts import UsageError, as_completed, extras_folder, load_backend, main, run, run_sequential
from tests.helpers import rows

NOBODY = "http://127.0.0.1:1/v1"
USAGE = {"prompt_tokens": 100, "completion_tokens": 50}


def answer(text, usage=USAGE):
    choice = {"message": {"content": text}, "finish_reason": "stop"}
    return 200, {}, json.dumps({"choices": [choice], "usage": usage}).encode()


def asked(request):
    return json.loads(request.body)["messages"][-1]["content"]


@pytest.fixture
def bulk(monkeypatch):
    """Return a function that makes a module, whose backend is `-b mine:submit`, of an async generator function."""
    monkeypatch.setattr(concurrent_prompts, "BACKOFF_BASE", 0.001)

    def make(submit):
        module = types.ModuleType("mine")
        module.submit = submit
        monkeypatch.setitem(__import__("sys").modules, "mine", module)
        return load_backend("mine:submit", base_url=NOBODY)

    return make


async def echo(job):
    while requests := await job.take(4):
        for request in requests:
            yield request, answer(f"To {asked(request)}")


def test_all_is_answered_in_blocks(bulk):
    sizes = []

    async def submit(job):
        while requests := await job.take(4):
            sizes.append(len(requests))
            for request in reversed(requests):
                yield request, answer(f"To {asked(request)}")

    results = run(map(str, range(10)), bulk(submit))
    assert [result.text for result in results] == [f"To {number}" for number in range(10)]
    assert sizes == [4, 4, 2] and all(result.usage == USAGE and result.attempts == 1 for result in results)


def test_what_failed_is_given_out_again_and_what_is_hopeless_is_not(bulk):
    seen = []

    async def submit(job):
        while requests := await job.take(100):
            for request in requests:
                text = asked(request)
                seen.append(text)
                if text == "lost" and seen.count(text) < 3:
                    yield request, ConnectionResetError("gone")
                elif text == "busy" and seen.count(text) < 2:
                    yield request, (500, {}, b"{}")
                elif text == "wrong":
                    yield request, (400, {}, b'{"error": {"message": "no"}}')
                elif text == "dead":
                    yield request, TimeoutError("never")
                else:
                    yield request, answer("Yes.")

    lost, busy, wrong, dead, good = run(["lost", "busy", "wrong", "dead", "good"], bulk(submit), max_attempts=4)
    assert [one.text for one in (lost, busy, wrong, dead, good)] == ["Yes.", "Yes.", None, None, "Yes."]
    assert [one.attempts for one in (lost, busy, wrong, dead, good)] == [3, 2, 1, 4, 1]
    assert (wrong.error.status, dead.error.type) == (400, "timeout") and len(lost.tries) == 2
    assert lost.unanswered == 2 and seen.count("good") == 1


async def test_sizes_bound_a_block_and_the_first_is_always_given(bulk):
    sizes = []

    async def submit(job):
        while requests := await job.take(100, 250):
            sizes.append([len(asked(request)) for request in requests])
            for request in requests:
                yield request, answer("Yes.")

    texts = ["x" * size for size in (10, 10, 400, 400, 10, 10)]
    results = [result async for result in as_completed(texts, bulk(submit))]
    assert sizes == [[10, 10], [400], [400], [10, 10]] and len(results) == 6


def test_unreadable_lines_are_rows_and_are_not_given_out(here, bulk):
    bulk(echo)
    pathlib.Path("in.jsonl").write_text('"one"\n{broken\n"two"\n')
    assert main(["in.jsonl", "-b", "mine:submit", "--base-url", NOBODY]) == 1
    assert [row["text"] for row in rows("in.results.jsonl")] == ["To one", None, "To two"]


def test_the_same_command_goes_on(here, bulk, capsys):
    taken = []

    async def submit(job):
        while requests := await job.take(1):
            taken.append(asked(requests[0]))
            if len(taken) == 2:
                raise OSError("out of paper")
            yield requests[0], answer("Yes.")

    bulk(submit)
    command = ["prompts.txt", "-b", "mine:submit", "--base-url", NOBODY]
    assert main(command) == 3
    err = capsys.readouterr().err
    assert "stopped: mine:submit: out of paper" in err and "to continue: " in err and "1 answered, 0 failed" in err
    assert main(command) == 0
    assert taken == ["What is one?", "What is two?", "What is two?", "What is three?"]
    assert "1 answer of an earlier run kept" in capsys.readouterr().err


@pytest.mark.parametrize(
    "outcome, status, said",
    [
        ((401, {}, b'{"error": {"message": "wrong key"}}'), 3, "stopped: wrong key"),
        ((429, {}, b'{"error": {"code": "insufficient_quota", "message": "no credit"}}'), 3, "stopped: no credit"),
    ],
)
def test_what_would_meet_every_prompt_stops_the_run(here, bulk, capsys, outcome, status, said):
    async def submit(job):
        while requests := await job.take(2):
            for request in requests:
                yield request, outcome

    bulk(submit)
    assert main(["prompts.txt", "-b", "mine:submit", "--base-url", NOBODY]) == status
    assert said in capsys.readouterr().err and rows("prompts.results.jsonl") == []


def test_a_job_that_cannot_be_done_is_a_usage_error(here, bulk, capsys):
    async def submit(job):
        raise ValueError("no printer")
        yield

    bulk(submit)
    assert main(["prompts.txt", "-b", "mine:submit", "--base-url", NOBODY]) == 2
    assert capsys.readouterr().err == "concurrent_prompts.py: mine:submit: no printer\n"


def test_no_prompt_is_forgotten(here, bulk, capsys):
    async def submit(job):
        one, _ = await job.take(2)
        yield one, answer("Yes.")

    api = bulk(submit)
    assert main(["prompts.txt", "-b", "mine:submit", "--base-url", NOBODY]) == 3
    assert "stopped: mine:submit ended and left 2 prompts unanswered" in capsys.readouterr().err
    assert [row["id"] for row in rows("prompts.results.jsonl")] == [1]
    results = run(["one", "two", "three"], api)
    assert [result.done for result in results] == [True, False, False] and results[2].error.type == "not_sent"


def test_an_answer_that_comes_twice_stops_the_run(here, bulk, capsys):
    async def submit(job):
        requests = await job.take(3)
        for request in [*requests, requests[0]]:
            yield request, answer("Yes.")

    bulk(submit)
    assert main(["prompts.txt", "-b", "mine:submit", "--base-url", NOBODY]) == 3
    assert "stopped: mine:submit answered a prompt twice" in capsys.readouterr().err
    assert len(rows("prompts.results.jsonl")) == 3


def test_nothing_is_given_out_after_a_stop(here, bulk, capsys):
    counts = []

    async def submit(job):
        requests = await job.take(1)
        signal.raise_signal(signal.SIGINT)
        while not job.stopped:
            await asyncio.sleep(0)
        counts.append((job.stopped, await job.take(10), await job.sleep(1000)))
        yield requests[0], answer("Yes.")

    submit.parting = "the printer goes on"
    bulk(submit)
    assert main(["prompts.txt", "-b", "mine:submit", "--base-url", NOBODY]) == 130
    err = capsys.readouterr().err
    assert counts == [("interrupted", [], False)] and "stopping: the printer goes on\n" in err
    assert "to continue: " in err and len(rows("prompts.results.jsonl")) == 1


def test_a_second_interrupt_reaches_the_backend(here, bulk):
    said = []

    async def submit(job):
        requests = await job.take(1)
        try:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            said.append("cancelled")
            raise
        yield requests[0], answer("Yes.")

    bulk(submit)
    assert main(["prompts.txt", "-b", "mine:submit", "--base-url", NOBODY]) == 130
    assert said == ["cancelled"]


def test_notes_are_kept_until_all_is_done(here, bulk, capsys):
    seen = []

    async def submit(job):
        seen.append(list(job.notes))
        await job.note({"batch": len(seen)})
        if len(seen) == 1:
            raise OSError("gone")
        while requests := await job.take(4):
            for request in requests:
                yield request, answer("Yes.")

    bulk(submit)
    command = ["prompts.txt", "-b", "mine:submit", "--base-url", NOBODY]
    assert main(command) == 3
    running = pathlib.Path("prompts.results.jsonl.running")
    assert running.read_bytes() == b'{"backend":"mine:submit"}\n{"batch":1}\n'
    running.write_bytes(running.read_bytes() + b'{"torn')
    capsys.readouterr()
    assert main(["prompts.txt", "-b", "stdlib", "--base-url", NOBODY]) == 2
    sentence = "mine:submit has jobs running for these results; continue with -b mine:submit, or remove that file"
    assert f"prompts.results.jsonl.running: {sentence} to discard them" in " ".join(capsys.readouterr().err.split())
    assert main(command) == 0
    assert seen == [[], [{"batch": 1}]] and not running.exists()


def test_overwriting_gives_up_what_is_running(here, bulk, capsys):
    bulk(echo)
    running = pathlib.Path("prompts.results.jsonl.running")
    running.write_text('{"backend":"mine:submit"}\n{"batch":1}\n')
    assert main(["prompts.txt", "-b", "mine:submit", "--base-url", NOBODY, "--overwrite"]) == 0
    assert "prompts.results.jsonl.running is discarded" in capsys.readouterr().err and not running.exists()


def test_calls_beside_are_tried_again_and_fail_in_words(bulk):
    tries = []

    async def submit(job):
        async def flaky(answer):
            tries.append(answer)
            if len(tries) < 3:
                raise ConnectionResetError("gone")
            return answer

        async def refused():
            raise PermissionError("no")

        [request] = await job.take(1)
        assert await job.call(flaky, "Yes.") == "Yes."
        with pytest.raises(concurrent_prompts.PromptError, match="no"):
            await job.call(refused)
        with pytest.raises(concurrent_prompts.PromptError, match="gone") as failure:
            tries.clear()
            await job.call(flaky, "No.", attempts=1)
        assert not failure.value.heard
        yield request, answer("Yes.")

    [result] = run(["one"], bulk(submit))
    assert result.text == "Yes." and tries == ["No."]


def test_a_budget_bounds_what_is_given_out(here, bulk, capsys):
    blocks = []

    async def submit(job):
        while requests := await job.take(100):
            blocks.append(len(requests))
            for request in requests:
                yield request, answer("Yes.", {"prompt_tokens": 10, "completion_tokens": 1000})

    bulk(submit)
    pathlib.Path("in.txt").write_text("".join(f"prompt {number}\n" for number in range(20)))
    command = ["in.txt", "-b", "mine:submit", "--base-url", NOBODY, "--price", "0,1", "--max-cost", "0.005"]
    assert main([*command, "-p", "max_completion_tokens=1000"]) == 3
    assert blocks == [5] and len(rows("in.results.jsonl")) == 5
    assert "$0.005 of $0.005 is spent" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 2
    assert "needs a maximum for each answer: -p max_completion_tokens=N" in capsys.readouterr().err
    assert rows("in.results.jsonl")[0]["text"] == "Yes.", "nothing is overwritten"


def test_a_share_of_the_price(here, bulk, capsys):
    async def submit(job):
        while requests := await job.take(100):
            for request in requests:
                yield request, answer("Yes.", {"prompt_tokens": 200_000, "completion_tokens": 0})

    submit.price_share = 0.5
    bulk(submit)
    assert main(["prompts.txt", "-b", "mine:submit", "--base-url", NOBODY, "--dry-run"]) == 0
    assert "gpt-6-luna at $0.05 in, $0.25 out per million" in " ".join(capsys.readouterr().out.split())
    assert main(["prompts.txt", "-b", "mine:submit", "--base-url", NOBODY]) == 0
    assert "cost $0.03 (gpt-6-luna at $0.05 in, $0.25 out per million" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--compare"], "mine:submit is a bulk backend; leave out --compare and --sequential"),
        (["--sequential"], "mine:submit is a bulk backend; leave out --compare and --sequential"),
        (["--rpm", "5"], "--rpm has no effect with mine:submit; leave it out"),
        (["--worker-backend", "mine:submit"], "--worker-backend mine:submit answers in bulk; name a live one"),
    ],
)
def test_options_that_mean_nothing_are_refused(here, bulk, capsys, flags, sentence):
    async def submit(job):
        while requests := await job.take(1):
            yield requests[0], answer("Yes.")

    bulk(submit)
    assert main(["prompts.txt", "-b", "mine:submit", "--base-url", NOBODY, *flags]) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_a_live_backend_has_no_workers(here, capsys):
    assert main(["prompts.txt", "-b", "stdlib", "--base-url", NOBODY, "--cluster", "tcp://127.0.0.1:1"]) == 2
    assert "--worker-backend and --cluster are for -b dask-cluster, not for stdlib" in capsys.readouterr().err


async def test_python_refuses_it_for_the_baseline(bulk):
    with pytest.raises(UsageError, match="is a bulk backend"):
        await run_sequential(["one"], bulk(echo))


def test_answers_that_do_not_fit_a_schema_are_asked_again(bulk):
    bodies = []

    async def submit(job):
        while requests := await job.take(1):
            bodies.append(json.loads(requests[0].body)["messages"])
            yield requests[0], answer("no" if len(bodies) == 1 else '{"a": 1}')

    bulk(submit)
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    [result] = run(["one"], load_backend("mine:submit", base_url=NOBODY, schema=schema))
    assert result.text == '{"a": 1}' and result.attempts == 2 and len(bodies[1]) == 3


def test_a_secret_in_what_a_backend_raises_is_hidden(here, bulk, capsys, monkeypatch):
    async def submit(job):
        [request, *_] = await job.take(1)
        yield request, OSError("401 for sk-secret-123456")
        raise RuntimeError(f"headers were {job.headers}")

    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-123456")
    bulk(submit)
    assert main(["prompts.txt", "-b", "mine:submit", "--base-url", NOBODY]) == 3
    err = capsys.readouterr().err
    assert "headers were" in err and "sk-secret" not in err
    assert "sk-secret" not in pathlib.Path("prompts.results.jsonl").read_text()


def test_what_was_never_sent_costs_nothing(here, bulk, capsys):
    async def submit(job):
        await job.take(2)
        job.in_flight(0)
        raise OSError("nobody there")
        yield

    bulk(submit)
    command = ["prompts.txt", "-b", "mine:submit", "--base-url", NOBODY, "--price", "0,1", "--max-cost", "0.003"]
    for _ in range(3):
        assert main([*command, "-p", "max_completion_tokens=1000"]) == 3
        assert "nobody there" in (err := capsys.readouterr().err) and "$0.00 of $0.003 spent\n" in err


def test_a_correction_is_reserved_as_it_is_asked(bulk):
    bodies = []

    async def submit(job):
        while requests := await job.take(1):
            bodies.append(requests[0].body)
            yield requests[0], answer("no" * 2000, {"prompt_tokens": 10, "completion_tokens": 1000})

    bulk(submit)
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    api = load_backend("mine:submit", base_url=NOBODY, schema=schema, params={"max_completion_tokens": 1000})
    [result] = run(["one"], api, max_cost=0.0035, price=(1, 1))
    assert len(bodies) == 1 and result.error.type == "schema_mismatch"


def test_results_from_elsewhere_are_reserved_with_their_retries_and_paid_as_they_say(bulk):
    taken = []

    async def submit(job):
        while requests := await job.take(10):
            taken.append(len(requests))
            for request in requests:
                lost = {"lost_tokens": [0, 50, 0, 0], "unanswered": 1}
                yield request, concurrent_prompts.Result(None, "Yes.", attempts=2, tokens=[9, 100, 0, 0], **lost)

    submit.retries = True
    bulk(submit)
    api = load_backend("mine:submit", base_url=NOBODY, params={"max_completion_tokens": 1000})

    async def work():
        async with concurrent_prompts.Run(api, max_cost=0.0045, price=(0, 1), max_attempts=4) as runs:
            await concurrent_prompts.concurrently(runs, concurrent_prompts.as_prompts(["a", "b", "c"]), lambda _: None)
            return extras_folder().named(runs, "budget").spent, runs.stopped

    spent, stopped = asyncio.run(work())
    assert taken == [1] and stopped.error.type == "budget", "four calls of $0.001 are reserved for each"
    assert spent == pytest.approx(100e-6 + 50e-6 + 0.001)


def test_a_backend_that_costs_nothing_needs_no_key_and_no_price(here, bulk, capsys):
    async def submit(job):
        while requests := await job.take(10):
            for request in requests:
                yield request, answer("Yes.")

    submit.price_share = 0.0
    bulk(submit)
    assert main(["prompts.txt", "-b", "mine:submit", "-m", "nobody/knows"]) == 0
    assert "cost $0.00 (nobody/knows at $0.00 in" in " ".join(capsys.readouterr().err.split())
