"""Whole jobs against servers as they really are: what the command comes to, on every live backend."""

import json
import re
import time

import pytest

from concurrent_prompts import main
from tests.backends.test_field_replies import answered, backend, chat, served, told  # noqa: F401
from tests.helpers import completion, jsonl, rows, serving

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")

GOOD = served(200, chat())
FLAGGED = {"code": 403, "message": "Your input was flagged", "metadata": {"reasons": ["violence"]}}


@pytest.fixture
def job(here, backend, capsys):  # noqa: F811
    """Return a function that runs the command on so many prompts against a server that answers by the prompt's number.

    It returns the exit status, the rows, what is said, and how many calls there were.
    """

    def job(answer, count, *flags):
        (here / "p.jsonl").write_text(jsonl(*({"id": f"n{one}", "prompt": f"What is {one}?"} for one in range(count))))

        def reply(head, body):
            return answer(int(re.search(rb"What is (\d+)", body)[1])) if body else served(404)

        with serving(reply) as (url, log):
            status = main(["p.jsonl", "-b", backend, "--base-url", url, "-m", "m", *flags])
        said = " ".join(capsys.readouterr().err.split())
        return status, rows("p.results.jsonl"), said, sum(bool(body) for _, body in log)

    return job


@pytest.mark.parametrize("refusal", [FLAGGED, {"code": 403, "message": "no"}], ids=["its reasons", "no reason"])
def test_one_prompts_own_refusal_does_not_end_the_job(job, refusal):
    refused = served(403, {"error": refusal})
    status, found, said, calls = job(lambda number: refused if number == 2 else GOOD, 8, "-c", "1")
    assert status == 1 and [bool(row["error"]) for row in found] == [row["id"] == "n2" for row in found]
    assert calls <= 10, said


def test_what_every_prompt_gets_stops_the_run_and_names_one(job):
    status, _, said, calls = job(lambda number: served(403, {"error": {"code": 403, "message": "no"}}), 200, "-c", "4")
    assert status == 3 and calls <= 12 and re.search(r"\bn\d+ \(p\.jsonl line \d+\)", said), said


@pytest.mark.parametrize("message", ["Unsupported parameter: 'top_k'", "Invalid service_tier argument"])
def test_the_same_refusal_for_everything_stops_the_run(job, message):
    status, _, said, calls = job(lambda number: served(400, told(message)), 300)
    assert status == 3 and calls <= 60, (calls, said)
    assert message in said and re.search(r"line \d+", said)


async def test_a_server_that_is_still_loading_is_waited_for(backend):  # noqa: F811
    loading = served(503, told("Loading model", 503, "unavailable_error"))
    (result,), log = await answered(backend, *[loading] * 12, GOOD)
    assert result.text == "All of it." and len(log) == 13 and result.attempts <= 2


def test_answers_with_nothing_in_them_are_said(job):
    thought = chat("", reasoning_content="Hm. " * 300)
    thought["usage"]["completion_tokens_details"] = {"reasoning_tokens": 7}
    status, found, said, _ = job(lambda number: served(200, thought if number < 3 else chat("x", "length")), 5)
    assert status == 0 and [row["text"] for row in found] == ["", "", "", "x", "x"]
    assert "3 answered but empty: reasoning took all tokens; raise" in said and "2 answered but ended by length" in said


RESETS = {
    "a date": lambda now: {"x_ratelimit_limit": 20, "x_ratelimit_remaining": 0, "x_ratelimit_reset": int(now) + 18000},
    "thousandths": lambda now: {"x_ratelimit_remaining": 0, "x_ratelimit_reset": int(1000 * (now + 18000))},
    "a header": lambda now: {"retry_after": 18000},
}


@pytest.mark.parametrize("headers", RESETS.values(), ids=RESETS)
def test_a_limit_that_is_hours_away_stops_the_run_and_says_when(job, headers):
    answer = served(429, told("Rate limit exceeded: free-models-per-day"), **headers(time.time()))
    status, found, said, calls = job(lambda number: answer, 40, "--deadline", "30")
    assert status == 3 and calls <= 20 and re.search(r"resets in 5 h, at 20\d\d-.*\(p\.jsonl line \d+\)", said), said
    assert "run the same command again at that time" in said and not any(row["text"] for row in found)


def test_a_cost_that_is_billed_is_reported(job):
    usage = {"prompt_tokens": 32, "completion_tokens": 9, "total_tokens": 1041}
    usage["completion_tokens_details"] = {"reasoning_tokens": 1000}
    body = json.loads(completion()[2]) | {"usage": usage}
    status, _, said, _ = job(lambda number: served(200, body), 2, "--price", "1,10")
    assert status == 0 and "2,018" in said and "0.0202" in said, said
