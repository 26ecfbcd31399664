"""Prices: what a run has cost, as far as that is known."""

import asyncio
import itertools
import json
import math

import pytest

import concurrent_prompts
from concurrent_prompts import main, token_counts
from concurrent_prompts.extras.prices import as_price, cost_of, money, price_of, told_cost
from tests.helpers import completion, constant, in_rows


@in_rows(
    ("model", "same"),
    [
        ("gpt-4o-2024-08-06", "gpt-4o"),
        ("openai/gpt-6-luna", "gpt-6-luna"),
        ("openrouter/openai/gpt-5.4-mini-2026-03-17", "gpt-5.4-mini"),
    ],
)
def test_a_snapshot_or_a_prefix_has_the_price_of_its_family(model, same):
    assert price_of(model) == price_of(same) is not None


@in_rows(
    "model", [None, "", "gpt-5-foo", "gpt-6", "gpt-4o-audio-preview", "ft:gpt-4o:me", "gpt-4o-2024"]
)
def test_no_price_is_guessed(model):
    assert price_of(model) is None


def test_an_own_snapshot_has_its_own_price():
    assert price_of("gpt-4o-2024-05-13")[:3] == (5, 5, 15) != price_of("gpt-4o")


def test_cached_tokens_are_part_of_those_in():
    price = as_price((10, 50, 1))
    assert cost_of([1000, 100, 400, 0], price) == pytest.approx((600 * 10 + 400 + 5000) / 1e6)
    assert cost_of([10, 0, 400, 0], price) == pytest.approx(10 / 1e6)  # nonsense
    assert as_price(["2", " 8"])[:4] == (2, 2, 8, 2.5) and as_price((2, 8, 1, 4))[:4] == (2, 1, 8, 4)


@in_rows(
    "numbers", [["1"], ["1", "2", "3", "4", "5"], ["-1", "2"], ["nan", "1"], ["inf", "1"], ["", ""], ["x", "y"]]
)
def test_what_is_no_price(numbers):
    with pytest.raises(ValueError):
        as_price(numbers)


@in_rows(
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


@in_rows("count", ["12", -1, True, 2**60, math.nan, math.inf, None, [1], {}])
def test_counts_that_are_none(count):
    assert token_counts({"prompt_tokens": count, "prompt_tokens_details": {"cached_tokens": count}}) == [0] * 5


def test_a_whole_float_is_a_count():
    assert token_counts({"input_tokens": 12.0, "output_tokens": 3}) == [12, 3, 0, 0, 0]


def test_the_report_says_what_it_cost(prompts, backend, capsys):
    answer, _ = constant(completion())
    assert main([prompts, *backend(answer), "-m", "gpt-6-luna"]) == 0
    words = " ".join(capsys.readouterr().err.split())
    assert "cost $0.00306 (gpt-6-luna at $0.10 in, $0.50 out per million, prices of 2026-11-05)" in words


@pytest.mark.parametrize(
    ("options", "usage", "said"),
    [
        (["-m", "llama"], {}, "cost unknown: no price for llama; give --price IN,OUT"),
        (["-m", "llama", "--price", "1,4"], {}, "cost $0.0246 (llama at $1.00 in, $4.00 out per million, as given)"),
        (["-m", "gpt-5-foo"], {"model": "gpt-5-nano-2025-08-07"}, "(gpt-5-nano-2025-08-07 at $0.05 in"),
        (["-m", "gpt-6-luna"], {"usage": None}, "cost unknown: the server reports no usage"),
        (["-m", "gpt-6-luna"], {"usage": {"prompt_tokens": "7"}}, "cost unknown: the server reports no usage"),
        (["-m", "gpt-6-luna"], {"model": ["?"]}, "cost $0.00306"),
    ],
)
def test_what_is_unknown_is_not_nothing(options, usage, said, prompts, backend, capsys):
    answer, _ = constant(completion(**usage))
    assert main([prompts, *backend(answer), *options]) == 0
    assert said in " ".join(capsys.readouterr().err.split())


def test_tokens_of_failed_attempts_count(prompts, backend, capsys, monkeypatch):
    monkeypatch.setattr(concurrent_prompts, "BACKOFF_BASE", 0.001)
    answer, _ = constant(completion(choices=[]), completion())
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
    answer, _ = constant(completion())
    assert main([str(path), *backend(answer)]) == 0
    words = " ".join(capsys.readouterr().err.split())
    assert "gpt-6-luna at $0.10 in, $0.50 out, gpt-6-sol at $2.00 in, $10.00 out per million" in words
    assert "cost $0.00224" in words and "no price for llama; give --price IN,OUT" in words


def test_no_model_that_a_server_names_floods_the_report(prompts, backend, capsys):
    count = itertools.count()
    answer = lambda request: asyncio.sleep(0, completion(model=f"y{next(count)}/z"))  # noqa: E731
    assert main([prompts, *backend(answer), "-m", "foo"]) == 0
    err = capsys.readouterr().err
    assert "no price for foo; give" in err and "/z" not in err


def test_what_was_lost_or_not_told_is_said(prompts, backend, capsys):
    answers = [ConnectionResetError(), completion(usage={"prompt_tokens": 5}), completion()]

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
    assert concurrent_prompts.token_counts(usage) == [5, 1, 5, 0, 0]


def charged(words):
    """Return what the report says of the cost, in a line."""
    return " ".join(words.split()).partition("cost ")[2]


# What the reply says besides a plain usage of a million tokens in and none out; and the cost with gpt-6-luna.
MILLION = {"prompt_tokens": 1_000_000, "completion_tokens": 1, "total_tokens": 1_000_001}
SHORT = {"prompt_tokens": 200_000, "completion_tokens": 0, "total_tokens": 200_000}
SERVED = {
    "ordinary": ({"usage": SHORT, "service_tier": "default"}, "$0.02 (", None),
    "priority": (
        {"usage": SHORT, "service_tier": "priority"},
        "$0.04 (",
        "$0.04 of it in the tier priority, at 2 times",
    ),
    "flex": ({"usage": SHORT, "service_tier": "flex"}, "$0.01 (", "in the tier flex, at 0.5 times that"),
    "ultrafast": ({"usage": SHORT, "service_tier": "ultrafast"}, "$0.06 (", "ultrafast, at 3 times"),
    "unknown": (
        {"usage": SHORT, "service_tier": "turbo"},
        "$0.02 (",
        "the tier turbo, counted at that price: its own is unknown",
    ),
    "long": ({"usage": MILLION}, "$0.20 (", "for inputs above 272,000 tokens, 2 times that in, 1.5 out"),
    "long and fast": ({"usage": MILLION, "service_tier": "priority"}, "$0.40 (", "of it for inputs above 272,000"),
    "cache hits": ({"usage": SHORT | {"prompt_cache_hit_tokens": 100_000}}, "$0.011 (", None),
    "cache writes": ({"usage": SHORT | {"cache_creation_input_tokens": 100_000}}, "$0.0225 (", None),
    "another model": ({"usage": SHORT, "service_tier": "priority", "model": "gpt-5.5"}, "$0.04 (", None),
}


@pytest.mark.parametrize(("reply", "cost", "remark"), SERVED.values(), ids=SERVED)
def test_what_was_served_is_what_it_costs(reply, cost, remark, prompts, backend, capsys):
    answer, _ = constant(completion("", **reply))
    assert main([prompts, *backend(answer), "-m", "gpt-6-luna", "-n", "1", "-o", "-"]) == 0
    out, err = capsys.readouterr()
    said = charged(err)
    assert said.startswith(cost) and (remark or "") in said
    tier = reply.get("service_tier", "default")
    assert json.loads(out).get("service_tier") == (tier if tier != "default" else None)


@pytest.mark.parametrize(
    ("options", "tier", "cost"),
    [
        (["--price", "1,4"], "priority", "$0.40 ("),  # of the ordinary tier, since no other is asked for
        (["--price", "2,8", "-p", 'service_tier="priority"'], "priority", "$0.40 ("),
        (["--price", "2,8,1,5", "-p", 'service_tier="priority"'], "flex", "$0.10 ("),
    ],
)
def test_a_told_price_is_that_of_the_tier_that_is_asked_for(options, tier, cost, prompts, backend, capsys):
    answer, _ = constant(completion("", usage=SHORT, service_tier=tier))
    assert main([prompts, *backend(answer), "-n", "1", *options]) == 0
    assert charged(capsys.readouterr().err).startswith(cost)


def test_prices_of_several_dates(prompts, backend, capsys):
    answer, _ = constant(completion(model="gpt-6-luna"), completion(model="gpt-6.2-sol"))
    assert main([prompts, *backend(answer), "-m", "gpt-5-foo", "-n", "2", "--sequential"]) == 0
    assert "per million, prices of 2026-11-05 and 2026-11-18)" in charged(capsys.readouterr().err)


# ---- Costs that replies tell -------------------------------------------------------------------------------------


def usage(cost, **more):
    return {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100, "cost": cost, **more}


TOLD = {
    "OpenRouter": (usage(0.0012), 0.0012),
    "OpenRouter, a key of one's own": (
        usage(0.0001, is_byok=True, cost_details={"upstream_inference_cost": 0.002}), 0.0021,
    ),
    "OpenRouter, whose cost has it": (usage(0.0012, cost_details={"upstream_inference_cost": 0.001}), 0.0012),
    "Perplexity": (usage({"input_tokens_cost": 0.001, "request_cost": 0.005, "total_cost": 0.006}), 0.006),
    "DeepInfra": ({"prompt_tokens": 1, "completion_tokens": 1, "estimated_cost": 3e-06}, 3e-06),
    "DeepInfra, and no cost": ({"cost": None, "estimated_cost": 3e-06}, 3e-06),
    "xAI": ({"num_sources_used": 0, "cost_in_usd_ticks": 37_756_000}, 0.0037756),
    "xAI, odd": ({"cost_in_usd_ticks": "many"}, None),
    "free": (usage(0), 0.0),
    "true": (usage(True), None),
    "a text": (usage("0.1"), None),
    "below nothing": (usage(-1), None),
    "not a number": (usage(float("nan")), None),
    "infinite": (usage(float("inf")), None),
    "no usage": (None, None),
}  # fmt: skip


@in_rows(("found", "cost"), TOLD.values(), ids=TOLD)
def test_a_cost_that_a_reply_tells(found, cost):
    assert told_cost(found) == (cost and pytest.approx(cost))


def test_a_cost_that_is_told_needs_no_price(prompts, backend, capsys, tmp_path):
    answer, _ = constant(completion(usage=usage(0.0012), model="some/model"))
    assert main([prompts, *backend(answer), "-m", "some/model", "--report", str(tmp_path / "r.json")]) == 0
    assert "cost $0.036, as the replies report" in " ".join(capsys.readouterr().err.split())
    found = json.loads((tmp_path / "r.json").read_text())
    assert str(found).count("'cost_told_usd': 0.03") == 1


def test_a_cost_that_is_told_comes_before_a_price(prompts, backend, capsys):
    told, untold = completion(usage=usage(0.0012), model="m"), completion(usage=usage(None), model="m")
    answer, _ = constant(*[told] * 10, untold)
    assert main([prompts, *backend(answer), "-m", "m", "--price", "1,4", "--sequential"]) == 0
    text = " ".join(capsys.readouterr().err.split())
    assert "cost $0.04 (m at $1.00 in, $4.00 out per million, as given); $0.012 of it as reported in 10 answers" in text


def test_some_costs_are_told_and_others_are_unknown(prompts, backend, capsys):
    answer, _ = constant(*[completion(usage=usage(0.0012), model="x")] * 10, completion(usage=usage(None), model="y"))
    assert main([prompts, *backend(answer), "-m", "x", "--sequential"]) == 0
    text = " ".join(capsys.readouterr().err.split())
    assert "cost $0.012, as the replies report; unknown: no price for x; give --price" in text
