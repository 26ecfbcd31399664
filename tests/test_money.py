"""Prices, budgets and dry runs: what it costs, that no more is spent than was said, and that nothing is sent."""

import asyncio
import contextlib
import itertools
import json
import math
import random
import sys
import types

import pytest

import concurrent_prompts
from concurrent_prompts import Run, UsageError, main, run, token_counts
from concurrent_prompts.backends.api import Api
from concurrent_prompts.extras import demo, dry_run
from concurrent_prompts.extras.budget import Budget
from concurrent_prompts.extras.prices import as_price, cost_of, money, price_of

PRICE = 1.0, 4.0  # USD per million tokens in, out


def reply(text="Yes.", asked=20, answered=200, **more):
    usage = {"prompt_tokens": asked, "completion_tokens": answered}
    choices = [{"message": {"content": text}, "finish_reason": "stop"}]
    return 200, {}, json.dumps({"model": "m", "choices": choices, "usage": usage} | more).encode()


def connector(answer):
    """Return a backend whose replies `answer` makes from the request."""

    @contextlib.asynccontextmanager
    async def connect(base_url, headers, concurrency):
        async def post(path, body):
            return await answer(json.loads(body))

        yield post

    return connect


def api_of(answer, **settings):
    return Api(connector(answer), base_url="http://127.0.0.1:9/v1", **{"model": "m"} | settings)


def constant(*replies):
    """Return an Api that gives these replies, one after the other, the last again and again; and its requests."""
    left, requests = list(replies), []

    async def answer(request):
        requests.append(request)
        found = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(found, Exception):
            raise found
        return found

    return answer, requests


# ---- Prices


@pytest.mark.parametrize(
    ("model", "same"),
    [
        ("gpt-4o-2024-08-06", "gpt-4o"),
        ("openai/gpt-6-luna", "gpt-6-luna"),
        ("openrouter/openai/gpt-5.4-mini-2026-03-17", "gpt-5.4-mini"),
    ],
)
def test_a_snapshot_or_a_prefix_has_the_price_of_its_family(model, same):
    assert price_of(model) == price_of(same) is not None


@pytest.mark.parametrize(
    "model", [None, "", "gpt-5-foo", "gpt-6", "gpt-4o-audio-preview", "ft:gpt-4o:me", "gpt-4o-2024"]
)
def test_no_price_is_guessed(model):
    assert price_of(model) is None


def test_an_own_snapshot_has_its_own_price():
    assert price_of("gpt-4o-2024-05-13") == (5, 5, 15) != price_of("gpt-4o")


def test_cached_tokens_are_part_of_those_in():
    price = as_price((10, 50, 1))
    assert cost_of([1000, 100, 400, 0], price) == pytest.approx((600 * 10 + 400 + 5000) / 1e6)
    assert cost_of([10, 0, 400, 0], price) == pytest.approx(10 / 1e6)  # nonsense
    assert as_price(["2", " 8"]) == (2, 2, 8)


@pytest.mark.parametrize(
    "numbers", [["1"], ["1", "2", "3", "4"], ["-1", "2"], ["nan", "1"], ["inf", "1"], ["", ""], ["x", "y"]]
)
def test_what_is_no_price(numbers):
    with pytest.raises(ValueError):
        as_price(numbers)


@pytest.mark.parametrize(
    ("dollars", "text"),
    [
        (0, "$0.00"),
        (1e-9, "$0.000000001"),
        (0.01234, "$0.0123"),
        (0.1, "$0.10"),
        (0.075, "$0.075"),
        (1234.5, "$1,234.50"),
    ],
)
def test_amounts(dollars, text):
    assert money(dollars) == text


@pytest.mark.parametrize("count", ["12", -1, True, 2**60, math.nan, math.inf, None, [1], {}])
def test_counts_that_are_none(count):
    assert token_counts({"prompt_tokens": count, "prompt_tokens_details": {"cached_tokens": count}}) == [0, 0, 0, 0]


def test_a_whole_float_is_a_count():
    assert token_counts({"input_tokens": 12.0, "output_tokens": 3}) == [12, 3, 0, 0]


# ---- The report


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"Question {number}?\n" for number in range(30)))
    return str(path)


@pytest.fixture
def backend(monkeypatch):
    """Return a function that makes `-b package:name` of what answers."""
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")

    def install(answer):
        module = types.ModuleType("money_backend")
        module.connect = connector(answer)
        monkeypatch.setitem(sys.modules, "money_backend", module)
        return ["-b", "money_backend:connect"]

    return install


def test_the_report_says_what_it_cost(prompts, backend, capsys):
    answer, _ = constant(reply())
    assert main([prompts, *backend(answer), "-m", "gpt-6-luna"]) == 0
    words = " ".join(capsys.readouterr().err.split())
    assert "cost $0.00306 (gpt-6-luna at $0.10 in, $0.50 out per million, prices of 2026-11-05)" in words


@pytest.mark.parametrize(
    ("options", "usage", "said"),
    [
        (["-m", "llama"], {}, "cost unknown: no price for llama; give --price IN,OUT"),
        (["-m", "llama", "--price", "1,4"], {}, "cost $0.0246 (llama at $1.00 in, $4.00 out per million, as told)"),
        (["-m", "gpt-5-foo"], {"model": "gpt-5-nano-2025-08-07"}, "(gpt-5-nano-2025-08-07 at $0.05 in"),
        (["-m", "gpt-6-luna"], {"usage": None}, "cost unknown: the server tells no usage"),
        (["-m", "gpt-6-luna"], {"usage": {"prompt_tokens": "7"}}, "cost unknown: the server tells no usage"),
        (["-m", "gpt-6-luna"], {"model": ["?"]}, "cost $0.00306"),
    ],
)
def test_what_is_unknown_is_not_nothing(options, usage, said, prompts, backend, capsys):
    answer, _ = constant(reply(**usage))
    assert main([prompts, *backend(answer), *options]) == 0
    assert said in " ".join(capsys.readouterr().err.split())


def test_tokens_of_failed_attempts_count(prompts, backend, capsys, monkeypatch):
    monkeypatch.setattr(concurrent_prompts, "BACKOFF_BASE", 0.001)
    answer, _ = constant(reply(choices=[]), reply())
    assert main([prompts, *backend(answer), "-m", "gpt-6-luna"]) == 0
    words = " ".join(capsys.readouterr().err.split())
    assert "tokens 620 in, 6,200 out; 220 of them in failed attempts" in words
    assert "cost $0.00316 " in words


def test_each_batch_line_has_the_price_of_its_own_model(tmp_path, backend, capsys):
    path = tmp_path / "batch.jsonl"
    rows = [("gpt-6-luna", 2), ("gpt-6-sol", 1), ("llama", 1)]
    lines = []
    for model, count in rows:
        for number in range(count):
            body = {"model": model, "messages": [{"role": "user", "content": "?"}]}
            lines.append(
                {"custom_id": f"{model} {number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    answer, _ = constant(reply())
    assert main([str(path), *backend(answer)]) == 0
    words = " ".join(capsys.readouterr().err.split())
    assert "gpt-6-luna at $0.10 in, $0.50 out, gpt-6-sol at $2.00 in, $10.00 out per million" in words
    assert "cost $0.00224" in words and "no price for llama; give --price IN,OUT" in words


# ---- Budgets


def lengths(seed, told=None):
    """Return an Api whose answers have lognormal lengths and take as long as they are, and what it has billed."""
    draw, billed = random.Random(seed), []

    async def answer(request):
        asked = len(request["messages"][0]["content"].encode()) // 4 + 7
        answered = max(1, int(math.exp(draw.gauss(math.log(200), 1.0))))
        answered = min(answered, told) if told else answered
        await asyncio.sleep(answered / 1e6)
        billed.append(cost_of([asked, answered, 0], as_price(PRICE)))
        return reply("x" * answered, asked, answered)

    return api_of(answer, params={"max_completion_tokens": told} if told else {}), billed


@pytest.mark.parametrize("concurrency", [1, 64, "auto"])
@pytest.mark.parametrize("seed", range(5))
def test_with_a_told_maximum_a_budget_is_never_passed(seed, concurrency):
    api, billed = lengths(seed, told=1000)
    asked = [f"Prompt {number} {'word ' * (number % 40)}" for number in range(600)]
    results = run(asked, api, concurrency=concurrency, max_cost=0.15, price=PRICE)
    assert 0.15 * 0.96 < sum(billed) <= 0.15
    assert sum(result.error is None for result in results) == len(billed)
    assert {result.error.type for result in results if result.error} == {"not_sent"}


@pytest.mark.parametrize("concurrency", [64, "auto"])
@pytest.mark.parametrize("seed", range(3))
def test_without_one_a_budget_of_many_calls_holds_all_but(seed, concurrency):
    api, billed = lengths(seed)
    run([f"Prompt {number}" for number in range(3000)], api, concurrency=concurrency, max_cost=1, price=PRICE)
    assert 0.94 < sum(billed) < 1.02


def test_the_first_call_goes_alone():
    flying, most = 0, []

    async def answer(request):
        nonlocal flying
        flying += 1
        most.append(flying)
        await asyncio.sleep(0.002)
        flying -= 1
        return reply()

    run(["?"] * 30, api_of(answer), concurrency=8, max_cost=0.05, price=PRICE)
    assert most[:2] == [1, 1] and max(most) > 4
    most.clear()
    run(["?"] * 30, api_of(answer, params={"max_tokens": 300}), concurrency=8, max_cost=1, price=PRICE)
    assert most[:2] == [1, 2], "a told maximum is known before the first answer"
    most.clear()
    run(["?"] * 30, api_of(answer), concurrency=8, max_cost=100, price=PRICE)
    assert most[:7] == [1, 1, 2, 3, 4, 5, 6], "there is room for all after one answer"


@pytest.mark.parametrize(
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
def test_what_may_have_been_billed_is_counted(failure, counted):
    async def go():
        answer, _ = constant(reply(), failure)
        api = api_of(answer, params={"max_tokens": 300})
        async with Run(api, max_cost=1, price=PRICE, max_attempts=1, deadline=0.05) as work:
            for prompt in work.admit(concurrent_prompts.as_prompts(["?", "?"])):
                await work.answer(prompt)
            return work.extra("budget"), len(prompt.body)

    budget, size = asyncio.run(go())
    assert budget.spent - budget.assumed == pytest.approx(0.00082)
    assert budget.assumed == pytest.approx(counted * (300 * 4 + size) / 1e6)
    assert budget._calls == budget._fixed == budget._open == 0


def test_a_server_that_tells_no_usage_does_not_run_for_free(caplog):
    answer, requests = constant(reply("four", usage=None))
    results = run(["?"] * 50, api_of(answer), max_cost=0.001, price=PRICE)
    assert len(requests) < 20
    assert any(result.error is None for result in results)
    assert "tell the usage" in caplog.text


def test_a_tiny_budget_sends_nothing():
    answer, requests = constant(reply())
    results = run(["?"] * 3, api_of(answer), max_cost=1e-9, price=PRICE)
    assert not requests and {result.error.type for result in results} == {"not_sent"}


@pytest.mark.parametrize(
    "options", [{"max_cost": 0}, {"max_cost": -1}, {"max_cost": math.nan}, {"price": (1,)}, {"price": (1, -2)}]
)
def test_options_that_cannot_be(options):
    answer, _ = constant(reply())
    with pytest.raises(ValueError):
        run(["?"], api_of(answer), **options)


def test_a_budget_for_what_nobody_sees():
    async def send(prompt):
        return prompt

    with pytest.raises(UsageError, match="loaded backend"):
        run(["?"], send, max_cost=1, price=PRICE)


def test_a_model_of_unknown_price_fails_alone():
    answer, requests = constant(reply())
    bodies = [{"model": model, "messages": [{"role": "user", "content": "?"}]} for model in ("gpt-6-luna", "llama")]
    rows = [{"custom_id": str(n), "url": "/v1/chat/completions", "body": body} for n, body in enumerate(bodies)]
    one, two = run(rows, api_of(answer, model=None), max_cost=1)
    assert one.text == "Yes." and two.error.type == "unknown_price" and len(requests) == 1


def test_a_budget_is_the_jobs_not_the_runs(prompts, backend, capsys, tmp_path):
    answer, requests = constant(reply())
    command = [prompts, *backend(answer), "--price", "1,4", "-p", "max_tokens=200", "-c", "4", "--max-cost"]
    assert main([*command, "0.01"]) == 3
    first = len(requests)
    assert 0 < first * 0.00082 <= 0.01
    words = " ".join(capsys.readouterr().err.split())
    assert "is spent and a call may cost" in words and "give a higher --max-cost" in words and "to continue: " in words
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
    answer, requests = constant(reply())
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
    answer, requests = constant(reply())
    assert main([prompts, *backend(answer), *options]) == 2
    assert said in capsys.readouterr().err and not requests


# ---- Dry runs


@pytest.fixture
def offline(monkeypatch):
    """Let tiktoken be absent."""
    monkeypatch.setitem(sys.modules, "tiktoken", None)


def dry(capsys, *arguments):
    status = main([*arguments, "--dry-run"])
    return status, capsys.readouterr().out


def test_a_dry_run_needs_no_key_and_writes_nothing(prompts, capsys, offline, tmp_path):
    before = sorted(tmp_path.iterdir())
    status, out = dry(capsys, prompts, "-p", "max_completion_tokens=100", "--rpm", "10", "--max-cost", "5")
    words = " ".join(out.split())
    assert status == 0 and sorted(tmp_path.iterdir()) == before
    assert "prompts 30 in " in words and "to ask 30 " in words
    assert "tokens out at most 3,000" in words
    assert "out = at most $0.0015" in words and "prices of 2026-11-05" in words
    assert "at least 2 min 54 s at 10 requests/min" in words
    assert "--max-cost $5.00 suffices" in words
    assert "POST https://api.openai.com/v1/chat/completions" in out and '"max_completion_tokens": 100' in out
    assert max(map(len, out.splitlines())) <= 80


def test_a_dry_run_shows_no_key(prompts, capsys, monkeypatch, offline):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-0123456789")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Trace: sk-secret-0123456789\nCookie: a=secret-1; b=secret-2")
    status, out = dry(capsys, prompts, "--base-url", "https://example.org/v1?api-key=hidden-key-1&api-version=2")
    assert status == 0 and "secret" not in out and "hidden" not in out
    assert "Authorization: Bearer ***" in out and "?api-version=2&***" in out


def test_a_dry_run_groups_what_cannot_be_read(tmp_path, capsys, offline):
    path = tmp_path / "prompts.jsonl"
    path.write_text('"fine"\n' + "".join(f"{' ' * n}{{broken\n" for n in range(5)) + "[1]\n")
    status, out = dry(capsys, str(path))
    words = " ".join(out.split())
    assert status == 1 and "prompts 7 in" in words and "to ask 1 " in words
    assert "5 x " in words and "line 2: not JSON" in words and "1 x " in words and "line 7: neither a text" in words


def test_a_dry_run_of_nothing_usable(tmp_path, capsys, offline):
    path = tmp_path / "prompts.jsonl"
    path.write_text("{broken\n")
    assert dry(capsys, str(path))[0] == 2
    path.write_text("")
    assert main([str(path), "--dry-run"]) == 2


def test_a_dry_run_knows_what_is_answered(prompts, backend, capsys, offline, tmp_path):
    answer, _ = constant(reply())
    main([prompts, *backend(answer), "-n", "20", "-m", "gpt-6-luna"])
    path = tmp_path / "prompts.results.jsonl"
    path.write_bytes(path.read_bytes() + b'{"id": 21, "text": "cut o')  # another run is writing
    before = path.read_bytes()
    with path.open("ab") as other:
        assert concurrent_prompts.lock(other, path)
        status, out = dry(capsys, prompts, "-m", "gpt-6-luna", "--max-cost", "0.002")
    words = " ".join(out.split())
    assert status == 0 and path.read_bytes() == before
    assert "answered 20 in " in words and "to ask 10 " in words
    assert "if they are like those there" in words
    assert "may not suffice" in words


def test_a_dry_run_says_what_it_does_not_know(tmp_path, capsys, offline):
    path = tmp_path / "prompts.jsonl"
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 5000}}
    rows = [{"messages": [{"role": "user", "content": [{"type": "text", "text": "What?"}, image]}]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, out = dry(capsys, str(path), "-m", "llama", "-p", 'tools=[{"type":"function"}]', "--compare")
    words = " ".join(out.split())
    assert status == 0 and "unknown: no price for llama; give --price IN,OUT" in words
    assert "besides images, audio and files and tools and schemas: not counted" in words
    assert "in each of 2 runs" in words
    assert max(map(len, out.splitlines())) <= 80


def test_a_dry_run_starts_no_server(capsys, monkeypatch, offline):
    monkeypatch.setattr(demo, "demo_server", None)
    status, out = dry(capsys, "--demo")
    assert status == 0 and "made-up" in out


def test_tokens_are_counted_where_that_can_be(prompts, capsys, monkeypatch):
    module = types.ModuleType("tiktoken")
    encoding = types.SimpleNamespace(name="o200k_base", encode_ordinary=str.split)
    module.encoding_for_model = lambda model: {"gpt-4o": encoding}[model]
    module.get_encoding = lambda name: encoding
    monkeypatch.setitem(sys.modules, "tiktoken", module)
    words = " ".join(dry(capsys, prompts, "-m", "openai/gpt-4o")[1].split())
    assert "tokens in about 270, counted by tiktoken (o200k_base)" in words  # 2 words, and 7 around each message
    assert "approximate for this model" in " ".join(dry(capsys, prompts, "-m", "llama")[1].split())


def test_a_slow_download_is_not_waited_for(prompts, capsys, monkeypatch):
    import threading

    end = threading.Event()
    module = types.ModuleType("tiktoken")
    module.encoding_for_model = lambda model: end.wait(60)
    monkeypatch.setitem(sys.modules, "tiktoken", module)
    monkeypatch.setattr(dry_run, "ENCODING_TIMEOUT", 0.01)
    status, out = dry(capsys, prompts)
    end.set()
    assert status == 0 and "did not come in time" in " ".join(out.split())


def test_a_column_called_cost_is_not_what_it_cost(tmp_path, backend, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n}?", "cost": 1000.0}) + "\n" for n in range(4)))
    answer, requests = constant(reply())
    command = [str(path), *backend(answer), "--price", "1,4"]
    assert main([*command, "-n", "2"]) == 0
    assert main([*command, "--max-cost", "1"]) == 0 and len(requests) == 4
    assert "$0.00328 of $1.00 spent, of it $0.00164 by earlier runs" in " ".join(capsys.readouterr().err.split())
    rows = [json.loads(line) for line in (tmp_path / "prompts.results.jsonl").read_bytes().splitlines()]
    assert [row["cost"] for row in rows] == [1000.0] * 4


@pytest.mark.parametrize(
    "usage",
    [{"prompt_tokens": 2**52, "completion_tokens": 1}, {"prompt_tokens": -5}, {"prompt_tokens": True}, "none", [], 7],
)
def test_no_usage_breaks_a_budget(usage):
    answer, requests = constant(reply(usage=usage))
    results = run(["?"] * 20, api_of(answer), max_cost=0.0005, price=PRICE, concurrency=4)
    assert requests and results[0].error is None
    assert len(requests) < 20


def test_a_batch_output_file_is_counted_too(tmp_path, backend, capsys):
    body = {"model": "gpt-6-luna", "messages": [{"role": "user", "content": "?"}]}
    rows = [{"custom_id": str(n), "method": "POST", "url": "/v1/chat/completions", "body": body} for n in range(3)]
    path = tmp_path / "batch.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer, requests = constant(reply())
    assert main([str(path), *backend(answer), "-n", "2"]) == 0
    assert main([str(path), *backend(answer), "--max-cost", "0.00021"]) == 3
    assert len(requests) == 2 and "of it $0.000204 by earlier runs" in " ".join(capsys.readouterr().err.split())


def test_an_interrupted_wait_for_the_budget_ends():
    async def go():
        answer, requests = constant(reply())
        async with Run(api_of(answer), max_cost=1, price=PRICE) as work:
            budget = work.extra("budget")
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
        budget.count(row, (1.0, 1.0, 1.0), offset)
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
        again.count(row, (1.0, 1.0, 1.0))
    assert again.spent == pytest.approx(4 * 0.25 + 8 * 0.25)


def test_pictures_are_counted_before_they_are_known():
    budget = Budget(1)
    parts = b'[{"type":"image_url","image_url":{"url":"https://x"}},{"type":"text","text":"?"}]'
    most, _ = budget.most_of(b'{"max_tokens":10.0,"messages":[{"content":' + parts + b"}]}", (1.0, 1.0, 1.0))
    assert 3000 < most * 1e6 < 3200


def test_no_model_that_a_server_names_floods_the_report(prompts, backend, capsys):
    count = itertools.count()
    answer = lambda request: asyncio.sleep(0, reply(model=f"y{next(count)}/z"))  # noqa: E731
    assert main([prompts, *backend(answer), "-m", "foo"]) == 0
    err = capsys.readouterr().err
    assert "no price for foo; give" in err and "/z" not in err


def test_what_was_lost_or_not_told_is_said(prompts, backend, capsys):
    answers = [ConnectionResetError(), reply(usage={"prompt_tokens": 5}), reply()]

    async def answer(request):
        given = answers.pop(0)
        if isinstance(given, Exception):
            raise given
        return given

    assert main([prompts, *backend(answer), "-n", "2", "--sequential"]) == 0
    words = " ".join(capsys.readouterr().err.split())
    assert "1 answer without usage not counted; 1 lost call may have been billed, too" in words


def test_one_wrong_count_makes_no_other_cheaper():
    usage = {"prompt_tokens": 5, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 10**9}}
    assert concurrent_prompts.token_counts(usage) == [5, 1, 5, 0]
