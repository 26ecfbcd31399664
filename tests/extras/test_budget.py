"""Budgets: no more is spent than was said, in this run or over several."""

import asyncio
import json
import math
import random

import pytest

import concurrent_prompts
from concurrent_prompts import Run, UsageError, extras_folder, main, run, run_concurrent
from concurrent_prompts.extras.budget import Budget
from concurrent_prompts.extras.prices import as_price, cost_of, price_of
from tests.helpers import PRICE, api_of, completion, constant, in_rows, virtual


def lengths(seed, told=None):
    """Return an Api whose answers have lognormal lengths and take as long as they are, and what it has billed."""
    draw, billed = random.Random(seed), []

    async def answer(request):
        asked = len(request["messages"][0]["content"].encode()) // 4 + 7
        answered = max(1, int(math.exp(draw.gauss(math.log(200), 1.0))))
        answered = min(answered, told) if told else answered
        await asyncio.sleep(answered / 1e6)
        billed.append(cost_of([asked, answered, 0], as_price(PRICE)))
        return completion("x" * answered, asked, answered)

    return api_of(answer, params={"max_completion_tokens": told} if told else {}), billed


@pytest.mark.parametrize("concurrency", [1, 64, "auto"])
@pytest.mark.parametrize("seed", range(3))
def test_with_a_told_maximum_a_budget_is_never_passed(seed, concurrency):
    api, billed = lengths(seed, told=1000)
    asked = [f"Prompt {number} {'word ' * (number % 40)}" for number in range(600)]
    results = run(asked, api, concurrency=concurrency, max_cost=0.15, price=PRICE)
    assert 0.15 * 0.96 < sum(billed) <= 0.15
    assert sum(result.error is None for result in results) == len(billed)
    assert {result.error.type for result in results if result.error} == {"not_sent"}


@pytest.mark.parametrize(("concurrency", "seed"), [(64, 0), ("auto", 1), ("auto", 2)])
def test_without_one_a_budget_of_many_calls_holds_all_but(seed, concurrency):
    api, billed = lengths(seed)
    run([f"Prompt {number}" for number in range(3000)], api, concurrency=concurrency, max_cost=1, price=PRICE)
    assert 0.94 < sum(billed) < 1.02


@virtual
async def test_the_first_call_goes_alone():
    flying, most, clock = 0, [], asyncio.get_running_loop().time

    async def answer(request):
        nonlocal flying
        flying += 1
        most.append(flying)
        await asyncio.sleep(0.002)
        flying -= 1
        return completion()

    await run_concurrent(["?"] * 30, api_of(answer), concurrency=8, max_cost=0.05, price=PRICE, clock=clock)
    assert most[:2] == [1, 1] and max(most) > 4
    most.clear()
    told = api_of(answer, params={"max_tokens": 300})
    await run_concurrent(["?"] * 30, told, concurrency=8, max_cost=1, price=PRICE, clock=clock)
    assert most[:2] == [1, 2], "a told maximum is known before the first answer"
    most.clear()
    await run_concurrent(["?"] * 30, api_of(answer), concurrency=8, max_cost=100, price=PRICE, clock=clock)
    assert most[:7] == [1, 1, 2, 3, 4, 5, 6], "there is room for all after one answer"


@in_rows(
    ("failure", "counted"),
    [
        ((500, {}, b"{}"), False),
        ((429, {}, b"{}"), False),
        (ConnectionRefusedError(), False),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        ((200, {}, b'{"choices": ['), True),
        ((200, {}, b'{"choices": []}'), True),
    ],
)
@virtual
async def test_what_may_have_been_billed_is_counted(failure, counted):
    answer, _ = constant(completion(), failure)
    api, clock = api_of(answer, params={"max_tokens": 300}), asyncio.get_running_loop().time
    async with Run(api, max_cost=1, price=PRICE, max_attempts=1, deadline=0.05, clock=clock) as work:
        for prompt in work.admit(concurrent_prompts.as_prompts(["?", "?"])):
            await work.answer(prompt)
        budget = extras_folder().named(work, "budget")
    assert budget.spent - budget.assumed == pytest.approx(0.00082)
    assert budget.assumed == pytest.approx(counted * (300 * 4 + len(prompt.body)) / 1e6)
    assert budget._calls == budget._fixed == budget._open == 0


def test_a_server_that_tells_no_usage_does_not_run_for_free(caplog):
    answer, requests = constant(completion("four", usage=None))
    results = run(["?"] * 50, api_of(answer), max_cost=0.001, price=PRICE)
    assert len(requests) < 20
    assert any(result.error is None for result in results)
    assert "reports no usage" in caplog.text


def test_a_tiny_budget_sends_nothing():
    answer, requests = constant(completion())
    results = run(["?"] * 3, api_of(answer), max_cost=1e-9, price=PRICE)
    assert not requests and {result.error.type for result in results} == {"not_sent"}


@in_rows(
    "options", [{"max_cost": 0}, {"max_cost": -1}, {"max_cost": math.nan}, {"price": (1,)}, {"price": (1, -2)}]
)
def test_options_that_cannot_be(options):
    answer, _ = constant(completion())
    with pytest.raises(ValueError):
        run(["?"], api_of(answer), **options)


def test_a_budget_for_what_nobody_sees():
    async def send(prompt):
        return prompt

    with pytest.raises(UsageError, match="loaded backend"):
        run(["?"], send, max_cost=1, price=PRICE)


def test_a_model_of_unknown_price_fails_alone():
    answer, requests = constant(completion())
    bodies = [{"model": model, "messages": [{"role": "user", "content": "?"}]} for model in ("gpt-6-luna", "llama")]
    rows = [{"custom_id": str(n), "url": "/v1/chat/completions", "body": body} for n, body in enumerate(bodies)]
    one, two = run(rows, api_of(answer, model=None), max_cost=1)
    assert one.text == "Yes." and two.error.type == "unknown_price" and len(requests) == 1


def test_a_budget_is_the_jobs_not_the_runs(prompts, backend, capsys, tmp_path):
    answer, requests = constant(completion())
    command = [prompts, *backend(answer), "--price", "1,4", "-p", "max_tokens=200", "-c", "4", "--max-cost"]
    assert main([*command, "0.01"]) == 3
    first = len(requests)
    assert 0 < first * 0.00082 <= 0.01
    words = " ".join(capsys.readouterr().err.split())
    assert "is spent and the next call may cost" in words and "raise --max-cost" in words and "to continue: " in words
    assert main([*command, "0.01"]) == 3 and len(requests) == first
    assert "of it $" in capsys.readouterr().err
    assert main([*command, "0.02"]) == 3 and first < len(requests)
    path = tmp_path / "prompts.results.jsonl"
    damaged = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(damaged[:-1]) + b'{"id": 3, "te\n')
    assert main([*command, "1"]) == 0
    assert len(requests) == 31
    kept = json.loads((tmp_path / "prompts.results.jsonl.spent").read_bytes())
    assert kept == {"spent": pytest.approx(31 * 0.00082), "most": 0.0, "calls": 0, "size": path.stat().st_size}


def test_a_budget_counts_what_was_answered_without_one(prompts, backend, capsys):
    answer, requests = constant(completion())
    command = [prompts, *backend(answer), "--price", "1,4"]
    assert main([*command, "-n", "20"]) == 0
    assert main([*command, "--max-cost", "0.0164"]) == 3 and len(requests) == 20
    assert "$0.0164 of $0.0164 spent, of it $0.0164 by earlier runs" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--max-cost", "1", "-m", "llama"], "no price is known for llama; give --price IN,OUT"),
        (["--price", "1"], "--price 1 is not IN,OUT"),
        (["--price", ""], "--price"),
        (["--price", "1,-2"], "--price 1,-2 is not IN,OUT"),
        (["--price", "nan,1"], "--price nan,1 is not IN,OUT"),
        (["--compare", "--max-cost", "1"], "leave out --max-cost"),
    ],
)
def test_arguments_that_cannot_be(options, said, prompts, backend, capsys):
    answer, requests = constant(completion())
    assert main([prompts, *backend(answer), *options]) == 2
    assert said in capsys.readouterr().err and not requests


def test_a_column_called_cost_is_not_what_it_cost(tmp_path, backend, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n}?", "cost": 1000.0}) + "\n" for n in range(4)))
    answer, requests = constant(completion())
    command = [str(path), *backend(answer), "--price", "1,4"]
    assert main([*command, "-n", "2"]) == 0
    assert main([*command, "--max-cost", "1"]) == 0 and len(requests) == 4
    assert "$0.00328 of $1.00 spent, of it $0.00164 by earlier runs" in " ".join(capsys.readouterr().err.split())
    rows = [json.loads(line) for line in (tmp_path / "prompts.results.jsonl").read_bytes().splitlines()]
    assert [row["cost"] for row in rows] == [1000.0] * 4


@in_rows(
    "usage",
    [{"prompt_tokens": 2**52, "completion_tokens": 1}, {"prompt_tokens": -5}, {"prompt_tokens": True}, "none", [], 7],
)
def test_no_usage_breaks_a_budget(usage):
    answer, requests = constant(completion(usage=usage))
    results = run(["?"] * 20, api_of(answer), max_cost=0.0005, price=PRICE, concurrency=4)
    assert requests and results[0].error is None
    assert len(requests) < 20


def test_a_batch_output_file_is_counted_too(tmp_path, backend, capsys):
    body = {"model": "gpt-6-luna", "messages": [{"role": "user", "content": "?"}]}
    rows = [{"custom_id": str(n), "method": "POST", "url": "/v1/chat/completions", "body": body} for n in range(3)]
    path = tmp_path / "batch.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer, requests = constant(completion())
    assert main([str(path), *backend(answer), "-n", "2"]) == 0
    assert main([str(path), *backend(answer), "--max-cost", "0.00021"]) == 3
    assert len(requests) == 2 and "of it $0.000204 by earlier runs" in " ".join(capsys.readouterr().err.split())


def test_an_interrupted_wait_for_the_budget_ends():
    async def go():
        answer, requests = constant(completion())
        async with Run(api_of(answer), max_cost=1, price=PRICE) as work:
            budget = extras_folder().named(work, "budget")
            most = budget.most_of(b'{"max_tokens":10}', as_price(PRICE))
            assert budget.admit(most)  # under way for ever
            prompts = list(work.admit(concurrent_prompts.as_prompts(["?", "?"])))
            waiting = [asyncio.ensure_future(work.answer(prompt)) for prompt in prompts]
            await asyncio.sleep(0)
            work.stop(concurrent_prompts.PromptError("interrupted", "interrupted", "stop"))
            results = await asyncio.gather(*waiting)
            budget.settle(most, 0.0)
            assert not requests and not any(result.done for result in results)
            assert budget._calls == 0 and not budget._queue.locked()

    asyncio.run(asyncio.wait_for(go(), 5))


# ---- From one run to the next --------------------------------------------------------------------------------


def spent(folder):
    return json.loads((folder / "prompts.results.jsonl.spent").read_bytes())["spent"]


def test_failures_that_were_paid_count_after_they_are_asked_again(prompts, backend, tmp_path):
    nothing = (200, {}, json.dumps({"choices": [], "usage": {"prompt_tokens": 20, "completion_tokens": 200}}).encode())
    answer, requests = constant(nothing)
    command = [prompts, *backend(answer), "-n", "5", "--price", "1,4", "-p", "max_tokens=200", "--max-attempts", "1"]
    for number in range(1, 5):
        status = main([*command, "--max-cost", "0.0123", *(["--retry-failed"] if number > 1 else [])])
        assert len(requests) * 0.00082 <= 0.0123
    assert status == 3 and spent(tmp_path) == pytest.approx(len(requests) * 0.00082)


def test_calls_that_the_end_cuts_off_count_in_the_next_run(prompts, backend, tmp_path):
    hung = []

    async def hang(request):
        hung.append(request)
        await asyncio.Event().wait()

    command = [prompts, "-n", "1", "--price", "1,4", "-p", "max_tokens=200", "--deadline", "0.05"]
    for _ in range(3):
        assert main([*command, *backend(hang), "--max-cost", "0.002"]) == 3
    assert len(hung) == 2 and 0.001 < spent(tmp_path) <= 0.002


def test_calls_under_way_are_kept_long_before_a_second_is_over(prompts, backend, tmp_path, monkeypatch):
    kept, accounts, save = asyncio.Event(), [], Budget.save

    def spy(budget, results, lost=True):
        save(budget, results, lost)
        accounts.append(json.loads((tmp_path / "prompts.results.jsonl.spent").read_bytes())["calls"])
        loop.call_soon_threadsafe(kept.set)

    async def answer_when_kept(request):
        nonlocal loop
        loop = asyncio.get_running_loop()
        await kept.wait()
        return completion()

    loop = None
    monkeypatch.setattr(Budget, "save", spy)
    command = [prompts, "-n", "1", "--price", "1,4", "-p", "max_tokens=200", "--deadline", "0.9", "--max-cost", "1"]
    assert main([*command, *backend(answer_when_kept)]) == 0
    assert accounts[0] == 1


@pytest.mark.parametrize(
    "told", ["", "[]", "{}", '{"spent": "x"}', '{"spent": 1e999, "most": 0, "calls": 0, "size": 0}', "\xff"]
)
def test_a_damaged_account_is_no_account(told, tmp_path, caplog):
    (tmp_path / "r.jsonl.spent").write_text(told, "latin-1")
    budget = Budget(1)
    budget.load(tmp_path / "r.jsonl")
    assert budget.spent == 0 and "r.jsonl.spent is damaged" in caplog.text


def test_lines_that_came_after_the_last_account_count_besides(tmp_path):
    (tmp_path / "r.jsonl.spent").write_text('{"spent": 0.5, "most": 0, "calls": 0, "size": 100}')
    budget = Budget(1)
    budget.load(tmp_path / "r.jsonl")
    row = {"id": 1, "usage": {"prompt_tokens": 0, "completion_tokens": 50_000}, "request": "r"}
    for offset, spent in ((0, 0.5), (99, 0.5), (100, 0.55), (200, 0.6)):
        budget.count(row, as_price((1, 1)), offset)
        assert budget.spent == budget.earlier == pytest.approx(spent)


def test_calls_that_are_killed_count_like_the_mean(tmp_path):
    budget, results = Budget(100), tmp_path / "r.jsonl"
    results.write_text("x" * 10)
    for _ in range(4):
        assert budget.admit((10.0, 0.0))
        budget.settle((10.0, 0.0), 0.25)
    for _ in range(8):
        assert budget.admit((10.0, 0.0))
    budget.save(results)
    again = Budget(100)
    again.load(results)
    assert again.spent == pytest.approx(4 * 0.25 + 8 * 10), "at the most, as long as no line tells a mean"
    row = {"id": 1, "usage": {"prompt_tokens": 0, "completion_tokens": 250_000}, "request": "r"}
    for _ in range(4):
        again.count(row, as_price((1, 1)))
    assert again.spent == pytest.approx(4 * 0.25 + 8 * 0.25)


def test_pictures_are_counted_before_they_are_known():
    budget = Budget(1)
    parts = b'[{"type":"image_url","image_url":{"url":"https://x"}},{"type":"text","text":"?"}]'
    most, _ = budget.most_of(b'{"max_tokens":10.0,"messages":[{"content":' + parts + b"}]}", as_price((1, 1)))
    assert 3000 < most * 1e6 < 3200


@in_rows("concurrency", [1, 32])
@in_rows(("tier", "factor"), [("priority", 2), ("ultrafast", 3), ("flex", 0.5), ("turbo", 3)])
def test_a_dearer_tier_passes_no_budget(tier, factor, concurrency):
    """What a project is served without asking for it, or of which nobody knows the price, is reserved at its worst."""
    answer, requests = constant(completion(service_tier=tier, model="gpt-6-luna"))
    params = {"max_completion_tokens": 200} | ({"service_tier": tier} if factor == 3 else {})
    results = run(
        ["?"] * 200, api_of(answer, model="gpt-6-luna", params=params), max_cost=0.008, concurrency=concurrency
    )
    each = factor * (20 * 0.10 + 200 * 0.50) / 1e6
    assert 0.85 * 0.008 < len(requests) * each <= 0.008
    assert {result.extra["service_tier"] for result in results if result.error is None} == {tier}


@pytest.mark.parametrize("asked", ["default", "flex"])
def test_a_tier_that_is_asked_for_is_reserved_at_its_own_price(asked):
    params = {"max_completion_tokens": 200, "service_tier": asked}
    answer, requests = constant(completion(service_tier=asked))
    api = api_of(answer, model="gpt-6-luna", params=params)
    run(["?"], api, max_cost=0.00014)  # not at "priority", which would not fit
    assert len(requests) == 1


def test_reasoning_beside_the_answer_passes_no_budget():
    usage = {"prompt_tokens": 32, "completion_tokens": 9, "total_tokens": 1041}
    answer, requests = constant(completion(usage=usage | {"completion_tokens_details": {"reasoning_tokens": 1000}}))
    run(["?"] * 300, api_of(answer), max_cost=0.5, price=PRICE, concurrency=64)
    assert 0.9 * 0.5 < len(requests) * (32 * 1 + 1009 * 4) / 1e6 <= 0.5


def test_the_dearest_tier_is_known_from_an_earlier_run(tmp_path):
    budget = Budget(1)
    price = price_of("gpt-6-luna")
    row = {
        "id": 1,
        "request": "r",
        "service_tier": "ultrafast",
        "usage": {"prompt_tokens": 100, "completion_tokens": 1},
    }
    before, _ = budget.most_of(b'{"max_tokens":100}', price)
    budget.count(row, price)
    after, _ = budget.most_of(b'{"max_tokens":100}', price)
    assert after / before == pytest.approx(3 / 2) and budget.spent == pytest.approx(3 * (100 * 0.1 + 0.5) / 1e6)


def test_long_inputs_and_cache_writes_are_reserved_at_their_price():
    budget, price = Budget(1), price_of("gpt-6-luna")
    body = b'{"max_tokens":1000,"service_tier":"default","x":"%s"}'
    short, long = (budget.most_of(body % (b"x" * size), price)[0] for size in (1000, 300_000))
    assert short == pytest.approx((len(body % (b"x" * 1000)) * 0.125 + 1000 * 0.5) / 1e6)
    assert long == pytest.approx((len(body % (b"x" * 300_000)) * 0.25 + 1000 * 0.75) / 1e6)


@pytest.mark.parametrize("output", ["r.jsonl", "r.csv"])
def test_a_budget_without_a_price_leaves_no_file(prompts, backend, capsys, tmp_path, output):
    answer, _ = constant(completion())
    path = tmp_path / output
    command = [prompts, *backend(answer), "-m", "llama", "-o", str(path)]
    assert main([*command, "--max-cost", "1"]) == 2 and "no price is known for llama" in capsys.readouterr().err
    assert [one.name for one in tmp_path.iterdir()] == ["prompts.txt"]
    kept = path if output == "r.jsonl" else tmp_path / "r.csv.results.jsonl"
    kept.touch()  # one that was there stays, as it may have been given its permissions
    assert main([*command, "--max-cost", "1"]) == 2 and kept.exists()


@in_rows(("cost", "spent"), [(0.05, 0.05), (0, 0.00082), (-1, 0.00082)])
def test_a_cost_that_the_reply_tells_is_what_is_spent(cost, spent):
    usage = {"prompt_tokens": 20, "completion_tokens": 200, "total_tokens": 220, "cost": cost}
    answer, _ = constant(completion(usage=usage))
    budget = Budget(1.0, PRICE)
    run(["one", "two"], api_of(answer), extras=[budget], concurrency=1)
    assert budget.spent == pytest.approx(2 * spent)
    later = Budget(1.0, PRICE)
    later.count({"usage": usage, "request": "x", "model": "m"}, as_price(PRICE))
    assert later.spent == pytest.approx(spent), "in a results file, too"
    broken = json.dumps({"choices": [], "usage": usage}).encode()
    answer, _ = constant((200, {}, broken), completion(usage=usage))
    budget = Budget(1.0, PRICE)
    run(["one"], api_of(answer), extras=[budget], concurrency=1)
    assert budget.spent == pytest.approx(2 * spent), "and in what came to nothing"
