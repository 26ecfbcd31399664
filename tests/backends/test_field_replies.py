"""Replies as servers really send them, taken from public bug reports, on every live backend against a real server."""

import asyncio
import copy
import itertools
import json
import pickle

import pytest

from concurrent_prompts import PromptError, as_prompt_error, as_prompts, load_backend, run_concurrent
from concurrent_prompts.backends import ALIVE
from concurrent_prompts.backends.hints import hint
from concurrent_prompts.backends.replies import read_reply, usual_text
from tests.helpers import LIBRARIES, NAMES, Clock, batch_line, in_rows, scripted

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture(params=NAMES)
def backend(request):
    """The name of the backend under test."""
    pytest.importorskip(LIBRARIES.get(request.param, "asyncio"))
    return request.param


def served(status=200, body=b"", **headers):
    """Return a whole HTTP reply; the body is bytes, a text, or written as JSON."""
    body = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    kind = "" if "content_type" in headers else "content-type: application/json\r\n"
    return f"HTTP/1.1 {status} X\r\n{kind}{lines}content-length: {len(body)}\r\n\r\n".encode() + body


def in_turn(replies):
    """Return what answers with these replies, the last again and again."""
    left = list(replies)
    return lambda head, body: left.pop(0) if len(left) > 1 else left[0]


async def once(backend, *replies, prompt="hi", **settings):
    """Send one prompt once to a server that gives these replies; return the answer or error, and the requests."""
    async with scripted(in_turn(replies)) as (url, log):
        api = load_backend(backend, **{"base_url": url, "model": "m"} | settings)
        (asked,) = as_prompts([prompt])
        async with api.open(2) as call:
            try:
                return await call(api.prepare(asked)), log
            except Exception as failure:
                return as_prompt_error(failure), log


def told(message="m", code=None, kind=None, **more):
    """Return an error body in OpenAI's form."""
    return {"error": {"message": message, "code": code, "type": kind} | more}


# ---- What a failure means ------------------------------------------------------------------------------------

GEMINI = {"code": 400, "status": "INVALID_ARGUMENT", "message": "API key not valid. Please pass a valid API key."}
GEMINI["details"] = [{"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}]
EXPIRED = GEMINI | {"message": "API key expired. Please renew the API key.", "details": []}
MINIMAX = {"choices": None, "base_resp": {"status_code": 2049, "status_msg": "invalid api key"}}
FLAGGED = {"code": 403, "message": "Your input was flagged", "metadata": {"reasons": ["violence"]}}
RAW = {
    "code": 400,
    "message": "Provider returned error",
    "metadata": {"raw": "prompt is too long: 9 tokens > 8 maximum"},
}
MEANT = {
    # what a server says: the verdict, and the type
    "Gemini, bad key": (served(400, [{"error": GEMINI}]), "stop", "invalid_api_key"),
    "Gemini, expired key": (served(400, [{"error": EXPIRED}]), "stop", "invalid_api_key"),
    "xAI, bad key": (
        served(400, {"code": "Client specified an invalid argument", "error": "Incorrect API key provided: sk***."}),
        "stop",
        "invalid_api_key",
    ),
    "MiniMax, bad key": (served(200, MINIMAX), "stop", "http_401"),
    "LiteLLM, bad key": (
        served(500, told("AuthenticationError: Invalid proxy server token passed")),
        "stop",
        "invalid_api_key",
    ),
    "Hugging Face, bad key": (
        served(400, {"error": "Authorization header is correct, but the token seems invalid"}),
        "stop",
        "invalid_api_key",
    ),
    "no key": (served(400, told("You didn't provide an API key.")), "stop", "invalid_api_key"),
    "500 Unauthorized": (served(500, {"error": "Unauthorized"}), "stop", "invalid_api_key"),
    "a proxy's 401": (served(500, told("Error code: 401 - {'error': 'x'}")), "stop", "invalid_api_key"),
    "a proxy's 400": (served(502, told("Error code: 400 - {'error': 'x'}")), "fail", "http_502"),
    "Azure's gateway": (served(200, {"statusCode": 401, "message": "Access denied"}), "stop", "http_401"),
    "one error in another": (
        served(500, {"error": told("x", "context_length_exceeded")}),
        "fail",
        "context_length_exceeded",
    ),
    "Apigee": (served(200, {"fault": {"faultstring": "Rate limit quota violation"}}), "retry", "no_answer"),
    "TEI, context": (
        served(413, {"error": "`inputs` must have less than 512 tokens. Given: 600"}),
        "fail",
        "context_length_exceeded",
    ),
    "Tabby, context": (
        served(500, told("Prompt length 5000 is greater than max_seq_len 4096")),
        "fail",
        "context_length_exceeded",
    ),
    "llama.cpp, batch size": (served(500, told("input is too large to process")), "fail", "context_length_exceeded"),
    "llama.cpp, no picture": (served(500, told("image input is not supported")), "fail", "http_500"),
    "Ollama, no room": (served(500, {"error": "model requires more system memory (8 GiB)"}), "fail", "http_500"),
    "LM Studio, crashed": (
        served(400, {"error": "The model has crashed without additional information."}),
        "retry",
        "http_400",
    ),
    "LM Studio, no model": (served(400, {"error": "No models loaded. Please load a model"}), "stop", "model_not_found"),
    "Ollama, no model": (served(404, told("model 'm' not found, try pulling it first")), "stop", "model_not_found"),
    "OpenRouter, key limit": (
        served(403, told("Key limit exceeded (daily limit).", 403)),
        "stop",
        "insufficient_quota",
    ),
    "LiteLLM, budget": (
        served(400, told("Budget has been exceeded!", 400, "budget_exceeded")),
        "stop",
        "insufficient_quota",
    ),
    "a sentence": (served(200, "Unauthorized", content_type="text/plain"), "stop", "invalid_api_key"),
    "a sentence that passes": (served(200, "too many requests", content_type="text/plain"), "retry", "no_answer"),
    "cut off, with such words": (
        served(200, '{"choices": [{"message": {"content": "too many requests'),
        "retry",
        "malformed_reply",
    ),
    "an advice": (served(400, told("shorten it and try again in a shorter form")), "fail", "http_400"),
    "AWS, client closed": (served(460, b""), "retry", "http_460"),
    "a code for the key": (served(403, told(code="InvalidApiKey")), "stop", "invalid_api_key"),
    "Anthropic, no credit": (
        served(400, told("Your credit balance is too low to access the API.", kind="invalid_request_error")),
        "stop",
        "insufficient_quota",
    ),
    "Moonshot, no credit": (served(429, told("x", kind="exceeded_current_quota_error")), "stop", "insufficient_quota"),
    "DashScope, no credit": (
        served(400, {"code": "Arrearage", "message": "Access denied"}),
        "stop",
        "insufficient_quota",
    ),
    "Azure's quota is a rate": (
        served(429, told("exceeded the call rate limit of your quota", "429")),
        "retry",
        "http_429",
    ),
    "one-api, no such model": (
        served(503, told("No available channel for model m", "model_not_found", "new_api_error")),
        "stop",
        "model_not_found",
    ),
    "llama.cpp, context": (
        served(500, told("Context size has been exceeded.", 500, "server_error")),
        "fail",
        "context_length_exceeded",
    ),
    "llama.cpp, its own code": (
        served(500, told("the request exceeds", 500, "exceed_context_size_error")),
        "fail",
        "context_length_exceeded",
    ),
    "llama-cpp-python, context": (
        served(500, told("Requested tokens (2285) exceed context window of 2048", None, "internal_server_error")),
        "fail",
        "context_length_exceeded",
    ),
    "TGI, context": (
        served(
            422,
            {
                "error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096",
                "error_type": "validation",
            },
        ),
        "fail",
        "context_length_exceeded",
    ),
    "vLLM, context": (
        served(500, told("The decoder prompt (length 9000) is longer than the maximum model length of 4096.")),
        "fail",
        "context_length_exceeded",
    ),
    "Ollama, context": (
        served(500, {"error": "prompt too long; exceeded max context length by 7 tokens"}),
        "fail",
        "context_length_exceeded",
    ),
    "LiteLLM, context": (
        served(400, told("litellm.x", "400", "ContextWindowExceededError")),
        "fail",
        "context_length_exceeded",
    ),
    "OpenRouter, the provider's words": (served(400, {"error": RAW}), "fail", "context_length_exceeded"),
    "llama.cpp, template": (
        served(500, told("Conversation roles must alternate user/assistant", 500, "server_error")),
        "fail",
        "server_error",
    ),
    "a bad request as 500": (
        served(500, told("unknown field `x`", None, "invalid_request_error")),
        "fail",
        "invalid_request_error",
    ),
    "not implemented": (served(501, b""), "stop", "http_501"),
    "a sign-in to the network": (served(511, b""), "stop", "http_511"),
    "OpenRouter, flagged": (served(403, {"error": FLAGGED}), "fail", "content_filter"),
    "reasons alone": (served(403, {"error": FLAGGED | {"message": "no"}}), "fail", "content_filter"),
    "DashScope, content": (served(400, {"code": "data_inspection_failed", "message": "x"}), "fail", "content_filter"),
    "403 for all": (served(403, told("You do not have access to this project")), "stop", "http_403"),
    "Google, cancelled": (
        served(499, told("The operation was cancelled.", 499, status="CANCELLED")),
        "retry",
        "CANCELLED",
    ),
    "Bedrock, 424": (served(424, {"message": "Try your request again"}), "retry", "http_424"),
    "TGI, 424": (
        served(424, {"error": "Request failed during generation", "error_type": "generation"}),
        "retry",
        "generation",
    ),
    "misdirected": (served(421, b""), "retry", "http_421"),
    "locked": (served(423, b""), "retry", "http_423"),
    "enhance your calm": (served(420, b""), "retry", "http_420"),
    "400 that passes": (served(400, told("The server is busy, try again later")), "retry", "http_400"),
    "GitHub, 403 rate": (served(403, {"message": "You have exceeded a secondary rate limit"}), "retry", "http_403"),
    "Groq, flex": (served(498, told("x", "capacity_exceeded")), "retry", "capacity_exceeded"),
    "limit with ~": (
        served(429, told("on tokens per minute (TPM): Limit 7000, Used 0, Requested ~12903", "rate_limit_exceeded")),
        "fail",
        "larger_than_limit",
    ),
    "limit with commas": (served(429, told("Limit: 7,000 / min. Requested: 12,903.")), "fail", "larger_than_limit"),
    "limit, commas, fits": (served(429, told("Limit 12,903, Used 7,000, Requested 7,000")), "retry", "http_429"),
    "limit, the other way round": (
        served(429, told("Requested 12_903 tokens, limit is 7000")),
        "fail",
        "larger_than_limit",
    ),
    "limit, in k": (served(429, told("limit of 30k, requested=30001")), "fail", "larger_than_limit"),
    "Groq, 413": (served(413, told("Limit 6000, Requested 6001", "rate_limit_exceeded")), "fail", "larger_than_limit"),
    "LM Studio without /v1": (
        served(200, {"error": "Unexpected endpoint or method. (POST /chat/completions)"}),
        "stop",
        "wrong_path",
    ),
    "Zhipu, no such path": (served(200, {"code": 500, "msg": "404 NOT_FOUND", "success": False}), "stop", "wrong_path"),
    "200, not found": (served(200, {"detail": "Not Found"}), "stop", "wrong_path"),
    "FastChat": (
        served(
            200, {"object": "error", "message": "This model's maximum context length is 2048 tokens.", "code": 40303}
        ),
        "fail",
        "context_length_exceeded",
    ),
    "FastChat, key": (served(200, {"object": "error", "message": "x", "code": 40101}), "stop", "http_401"),
    "FastChat, rate": (served(200, {"object": "error", "message": "x", "code": 42901}), "retry", "http_429"),
    "FastChat, broken": (
        served(200, {"object": "error", "message": "CUDA out of memory", "code": 50002}),
        "retry",
        "http_500",
    ),
    "MiniMax, rate": (
        served(200, {"base_resp": {"status_code": 1002, "status_msg": "rate limit"}}),
        "retry",
        "http_429",
    ),
    "Baidu": (
        served(200, {"error_code": 110, "error_msg": "Access token invalid or no longer valid"}),
        "stop",
        "invalid_api_key",
    ),
    "Cloudflare": (
        served(200, {"success": False, "errors": [{"code": 10000, "message": "Authentication error"}]}),
        "stop",
        "invalid_api_key",
    ),
    "200 in a list": (served(200, [{"error": GEMINI | {"code": "x"}}]), "stop", "invalid_api_key"),
    "200, error true": (served(200, {"error": True, "message": "Too many requests"}), "retry", "no_answer"),
    "200, OAuth": (served(200, {"error": "invalid_token", "error_description": "x"}), "stop", "invalid_api_key"),
    "200, nothing known": (served(200, {"error": "odd"}), "retry", "no_answer"),
    "200, a status of another kind": (served(200, {"status": [{"a": []}]}), "retry", "no_answer"),
    "nginx, plain HTTP": (
        served(400, "<title>400 The plain HTTP request was sent to HTTPS port</title>", content_type="text/html"),
        "stop",
        "plain_http",
    ),
    "Go, plain HTTP": (served(400, "Client sent an HTTP request to an HTTPS server.\n"), "stop", "plain_http"),
}


@in_rows(("answer", "verdict", "kind"), MEANT.values(), ids=MEANT)
async def test_what_a_failure_means(backend, answer, verdict, kind):
    failure, log = await once(backend, answer)
    assert (failure.verdict, failure.error.type) == (verdict, kind), failure
    assert failure.error.retryable is (verdict == "retry") and failure.heard and len(log) == 1
    assert hint(failure.error)


SLOW = {
    "rate": (served(429, told("x", "rate_limit_exceeded")), True, False),
    "403 rate": (served(403, {"message": "rate limit exceeded"}), True, False),
    "flex": (served(429, told("Resource unavailable, please try again later.", "resource_unavailable")), False, False),
    "flex, words alone": (served(429, told("The resource is unavailable")), False, False),
    "llama.cpp loads": (served(503, told("Loading model", 503, "unavailable_error")), False, True),
    "Hugging Face loads": (served(503, {"error": "Model x is currently loading", "estimated_time": 20.0}), False, True),
    "warming up": (served(500, told("The engine is warming up")), False, True),
    "Bedrock loads": (
        served(429, {"__type": "x", "code": "ModelNotReadyException", "message": "Model is not ready"}),
        False,
        True,
    ),
    "200 loads": (served(200, {"error": "model is still loading"}), False, True),
}


@in_rows(("answer", "slow", "loading"), SLOW.values(), ids=SLOW)
async def test_what_the_limiter_is_to_learn(backend, answer, slow, loading):
    failure, _ = await once(backend, answer)
    assert (failure.verdict, failure.slow, failure.loading) == ("retry", slow, loading), failure
    assert hint(failure.error)


WAITS = {
    "LiteLLM": (served(429, told("No deployments available, Try again in 60 seconds")), 60),
    "Azure": (served(429, told("Please retry after 1 second. Contact us")), 1),
    "Azure, a day": (served(429, told("Please retry after 86,400 seconds.")), 86400),
    "Gemini": (served(429, told("Please retry in 37.691s.")), 37.691),
    "Gemini's details": (served(429, [{"error": {"message": "x", "details": [{"retryDelay": "37s"}]}}]), 37),
    "minutes": (served(429, told("TRY AGAIN IN 2 MINUTES")), 120),
    "both": (served(429, told("Your limit resets in 2 hours and 5 minutes")), 7500),
    "short units": (served(503, told("Please wait 1 min 30 secs before the next request")), 90),
    "milliseconds": (served(429, told("retry after 250 milliseconds")), 0.25),
    "days": (served(429, told("available again in about 2 days")), 172800),
    "Hugging Face": (served(503, {"error": "Model x is currently loading", "estimated_time": 20.5}), 20.5),
    "in the body": (served(429, told(retry_after=7)), 7),
    "beside the error": (served(429, {"message": "slow", "retry_after_ms": 1500}), 1.5),
    "the header wins": (served(429, told("Try again in 60 seconds"), retry_after=3), 3),
    "one": (served(429, told("Please try again in a minute.")), 60),
    "Chinese": (served(429, told("请求过于频繁,请在30秒后重试")), 30),
    "cool down": (served(429, told("Cooldown: 15 s")), 15),
    "a date": (served(429, told("try again at 2099-11-28T21:25:30Z")), 1e9),
    "the window's end": (served(429, told(), x_ratelimit_reset=12), 12),
    "the window's end, not reached": (served(429, told(), x_ratelimit_reset=12, x_ratelimit_remaining=3), None),
    "no unit": (served(429, told("try again in 5")), None),
    "another thing's time": (served(429, told("You asked 20 times in 60 seconds")), None),
}


@in_rows(("answer", "wait"), WAITS.values(), ids=WAITS)
async def test_a_wait_told_in_words(backend, answer, wait):
    failure, _ = await once(backend, answer)
    assert failure.verdict == ("stop" if wait and wait > 7200 else "retry")
    assert failure.error.retryable and failure.wait == (wait and pytest.approx(wait))


# ---- Answers that are none, and those that are not whole -----------------------------------------------------


def chat(content="All of it.", reason="stop", more=(), **message):
    """Return a chat completion; `more` is what its choice holds besides."""
    choice = {"index": 0, "message": {"role": "assistant", "content": content, **message}, "finish_reason": reason}
    return {"choices": [choice | dict(more)], "usage": {"prompt_tokens": 5, "completion_tokens": 7}}


USED = {"id": "c", "model": "m-1", "choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 7}}
HALF = {"code": 502, "message": "Upstream error"}
BROKEN = {
    "OpenRouter": (chat("Half", "error", {"error": HALF}), "retry", "http_502", 502),
    "OpenRouter, a bad request": (
        chat("Half", "error", {"error": {"code": 400, "message": "no"}}),
        "fail",
        "http_400",
        400,
    ),
    "Mistral": (chat("Half", "error"), "retry", "broken_off", 200),
    "Zhipu": (chat("Half", "network_error"), "retry", "broken_off", 200),
    "DeepSeek": (chat("Half", "insufficient_system_resource"), "retry", "broken_off", 200),
    "SGLang": (chat("Half", {"type": "abort", "message": "x"}), "retry", "broken_off", 200),
    "an error beside stop": (chat("Half", "stop", {"error": "the engine has died"}), "retry", "no_answer", 200),
    "no message": ({"choices": [{"error": HALF}], "usage": USED["usage"]}, "retry", "http_502", 502),
    "an empty list": (chat() | {"choices": []}, "retry", "no_answer", 200),
}
GEMINIS = {"promptTokenCount": 5, "candidatesTokenCount": 7, "totalTokenCount": 12}


@in_rows(("body", "verdict", "kind", "status"), BROKEN.values(), ids=BROKEN)
async def test_an_answer_that_broke_off_is_none(backend, body, verdict, kind, status):
    failure, _ = await once(backend, served(200, body))
    assert (failure.verdict, failure.error.type, failure.error.status) == (verdict, kind, status)
    assert failure.usage == {"prompt_tokens": 5, "completion_tokens": 7}, "it is billed all the same"


@in_rows("size", [0, 70_000], ids=["short", "long"])
async def test_what_gemini_says_of_a_failure_is_billed_too(backend, size):
    body = chat("x" * size, "error") | {"usage": None, "usageMetadata": GEMINIS}
    (result,), _ = await answered(backend, served(200, body), served(200, chat()))
    assert result.text == "All of it." and list(result.lost_tokens) == [5, 7, 0, 0, 0]


async def answered(backend, *replies, count=1, **settings):
    """Run as many prompts to a server that gives these replies, the last again and again; the results and requests."""
    async with scripted(in_turn(replies)) as (url, log):
        api = load_backend(backend, **{"base_url": url, "model": "m"} | settings)
        prompts, clock = [f"prompt {number}" for number in range(count)], Clock()
        options = {"concurrency": 1, "clock": clock, "sleep": clock.sleep, "max_attempts": 8}
        return await run_concurrent(prompts, api, **options), log


async def no_wait(seconds):
    await asyncio.sleep(0)


async def test_an_answer_that_broke_off_is_asked_again(backend):
    (result,), log = await answered(backend, served(200, chat("Half", "error", {"error": HALF})), served(200, chat()))
    assert result.text == "All of it." and len(log) == 2 and list(result.lost_tokens) == [5, 7, 0, 0, 0]


@in_rows("body", [chat() | {"choices": []}, chat() | {"choices": None}], ids=["empty", "null"])
async def test_what_is_billed_for_nothing_is_asked_twice_at_most(backend, body):
    (result,), log = await answered(backend, served(200, body))
    assert result.error.type == "no_answer" and len(log) == 2
    (result,), log = await answered(backend, *[served(500), served(200, body), served(429)] * 2)
    assert result.error.type == "no_answer" and len(log) == 5, "what is not billed does not count"
    (result,), log = await answered(backend, served(200, body | {"usage": None}))
    assert result.error.type == "no_answer" and len(log) == 8


def response(status, **more):
    """Return a Responses object."""
    part = {"type": "output_text", "text": "Done.", "annotations": []}
    output = [{"type": "message", "content": [part]}] if status == "completed" else []
    return {"id": "resp_1", "object": "response", "status": status, "output": output, "error": None, **more}


@pytest.fixture
def quick(monkeypatch):
    """Have what is made in the background looked at again at once."""
    monkeypatch.setattr("concurrent_prompts.backends.api.Api.sleep", staticmethod(no_wait))


async def test_what_is_made_in_the_background_is_waited_for(backend, quick):
    ways = [response("queued"), response("in_progress"), response("completed")]
    replies = [served(200, ways[0]), served(200, ways[1]), served(503), served(200, ways[2])]
    signs = []
    token = ALIVE.set(lambda: signs.append(1))
    reply, log = await once(backend, *replies, endpoint="responses", params={"background": True})
    ALIVE.reset(token)
    assert len(signs) == 1  # a look that finds it in progress; the first answer and the last say it themselves
    assert reply.text == "Done." and reply.finish_reason == "completed"
    lines = [head.split(b"\r\n")[0] for head, _ in log]
    assert lines == [b"POST /v1/responses HTTP/1.1", *[b"GET /v1/responses/resp_1 HTTP/1.1"] * 3]
    assert not log[1][1] and json.loads(log[0][1])["background"] is True


UNDONE = {
    "failed": (response("failed", error={"code": "server_error", "message": "m"}), "retry", "server_error"),
    "failed for good": (response("failed", error={"code": "invalid_prompt", "message": "m"}), "fail", "invalid_prompt"),
    "failed, no reason": (response("failed"), "retry", "no_answer"),
    "failed, half a text": (response("completed") | {"status": "failed"}, "retry", "no_answer"),
    "cancelled": (response("cancelled"), "retry", "no_answer"),
}


@pytest.mark.parametrize(("body", "verdict", "kind"), UNDONE.values(), ids=UNDONE)
async def test_an_object_that_came_to_nothing_is_no_answer(backend, quick, body, verdict, kind):
    for replies in ([served(200, body)], [served(200, response("queued")), served(200, body)]):
        failure, _ = await once(backend, *replies, endpoint="responses")
        assert (failure.verdict, failure.error.type) == (verdict, kind)


DEFERRED = {
    "xAI": (200, {"request_id": "r"}),
    "202": (202, {"id": "x"}),
    "DashScope": (200, {"output": {}, "task_status": "PENDING", "request_id": "r"}),
    "a response without an id": (200, response("queued", id=None)),
}


@in_rows(("status", "body"), DEFERRED.values(), ids=DEFERRED)
async def test_what_cannot_be_fetched_later_is_an_error_that_says_what_to_do(backend, status, body):
    failure, log = await once(backend, served(status, body), endpoint="responses" if "status" in body else "chat")
    assert (failure.verdict, failure.error.type, len(log)) == ("fail", "unfinished", 1)
    kept = pickle.loads(pickle.dumps(copy.deepcopy(failure)))
    assert vars(kept) == {**vars(failure), "headers": dict(failure.headers)}
    assert (kept.args, type(kept)) == (failure.args, type(failure))
    assert "background" in str(failure) and hint(failure.error)


# ---- Streams -------------------------------------------------------------------------------------------------


def stream(*chunks, done=True, line="\n"):
    """Return a stream of events."""
    events = [f"data: {json.dumps(chunk)}{line}{line}" for chunk in chunks]
    return "".join([f": keep-alive{line}{line}", *events, f"data: [DONE]{line}{line}" if done else ""])


def delta(reason=None, **part):
    return {"id": "c", "model": "m-1", "choices": [{"index": 0, "delta": part, "finish_reason": reason}]}


CHUNKS = [delta(role="assistant", content=""), delta(content="All "), delta(content="of it."), delta("stop")]
CALL = {"index": 0, "id": "call", "type": "function", "function": {"name": "f", "arguments": '{"a"'}}
MORE = {"index": 0, "function": {"arguments": ": 1}"}}
DONE = {"type": "response.completed", "response": response("completed")}
STREAMS = {
    "chat": ("chat", stream(*CHUNKS, USED), "All of it.", "stop"),
    "chat, CR LF": ("chat", stream(*CHUNKS, USED, line="\r\n"), "All of it.", "stop"),
    "no empty lines": ("chat", stream(*CHUNKS, USED).replace("\n\n", "\n"), "All of it.", "stop"),
    "no [DONE]": ("chat", stream(*CHUNKS, done=False), "All of it.", "stop"),
    "whole in one event": ("chat", stream(chat(), done=False), "All of it.", "stop"),
    "completions": (
        "completions",
        stream(
            {"choices": [{"index": 0, "text": "a"}]},
            {"choices": [{"index": 0, "text": "b", "finish_reason": "length"}]},
        ),
        "ab",
        "length",
    ),
    "responses": (
        "responses",
        "event: response.created\n" + stream({"type": "response.created", "response": response("queued")}, DONE),
        "Done.",
        "completed",
    ),
}


@in_rows("kind", ["text/event-stream; charset=utf-8", "application/json"])
@in_rows(("endpoint", "body", "text", "reason"), STREAMS.values(), ids=STREAMS)
async def test_a_stream_is_read_as_one_answer(backend, endpoint, body, text, reason, kind):
    for params in ({}, {"stream": True}):
        reply, log = await once(backend, served(200, body, content_type=kind), endpoint=endpoint, params=params)
        assert (reply.text, reply.finish_reason) == (text, reason)
        assert ("stream" in json.loads(log[0][1])) is bool(params), "what the user asks for is sent"
        assert reply.usage == (USED["usage"] if "completion_tokens" in body else None)


async def test_a_streams_calls_and_thoughts_are_put_together(backend):
    parts = [
        delta(role="assistant", content=None, reasoning_content="Hm"),
        delta(reasoning_content="m."),
        delta(tool_calls=[CALL]),
        delta("tool_calls", tool_calls=[MORE]),
    ]
    reply, _ = await once(backend, served(200, stream(*parts), content_type="text/event-stream"))
    (call,) = json.loads(reply.text)
    assert call == {"id": "call", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    assert reply.finish_reason == "tool_calls" and reply.extra["more"] == {"reasoning_content": "Hmm."}


CUT = {
    "cut off": (stream(*CHUNKS[:2], done=False), "retry", "cut_off"),
    "nothing": (": keep-alive\n\n", "retry", "cut_off"),
    "an error in it": (stream(*CHUNKS[:2], told("x", "context_length_exceeded")), "fail", "context_length_exceeded"),
    "an error event": (
        'event: error\ndata: {"type": "error", "code": "server_error", "message": "x"}\n\n',
        "retry",
        "server_error",
    ),
    "a response that failed": (
        stream(
            {"type": "response.failed", "response": response("failed", error={"code": "server_error", "message": "x"})}
        ),
        "retry",
        "server_error",
    ),
}


@in_rows(("body", "verdict", "kind"), CUT.values(), ids=CUT)
async def test_a_stream_that_ends_early_is_no_answer(backend, body, verdict, kind):
    endpoint = "responses" if "response." in body else "chat"
    failure, _ = await once(backend, served(200, body, content_type="text/event-stream"), endpoint=endpoint)
    assert (failure.verdict, failure.error.type) == (verdict, kind)


GROQ = {"choices": [], "x_groq": {"id": "r", "usage": USED["usage"]}}
HALVES = {
    "cut off": stream(USED | {"choices": CHUNKS[1]["choices"]}, done=False),
    "an error": stream(*CHUNKS[:2], USED, told("x", "server_error")),
    "an error with it": stream(*CHUNKS[:2], told("x", "server_error") | {"usage": USED["usage"]}),
    "Groq's": stream(*CHUNKS[:2], GROQ, told("x", "server_error")),
}


@in_rows("body", HALVES.values(), ids=HALVES)
async def test_what_half_a_stream_used_is_billed_all_the_same(backend, body):
    failure, _ = await once(backend, served(200, body, content_type="text/event-stream"))
    assert failure.verdict == "retry" and failure.usage == USED["usage"]


async def test_a_batch_line_that_asks_for_a_stream_gets_its_answer(backend):
    line = batch_line("a", "hi")
    line["body"]["stream"] = True
    reply, log = await once(backend, served(200, stream(*CHUNKS), content_type="text/event-stream"), prompt=line)
    assert reply.text == "All of it." and json.loads(log[0][1])["stream"] is True


# ---- What an answer holds ------------------------------------------------------------------------------------

LOGPROBS = {"content": [{"token": "a", "logprob": -0.1}]}
THOUGHTS = [{"type": "reasoning.text", "text": "Hm."}]
NOTE = {"type": "url_citation", "url_citation": {"url": "https://a"}}
BESIDES = {
    "nothing": (chat(annotations=[], refusal=None, audio=None, reasoning=None, tool_calls=[]), {}),
    "an ordinary line of vLLM": (chat(more={"logprobs": None, "stop_reason": 128009, "token_ids": None}), {}),
    "an ordinary line of Azure": (
        chat(more={"content_filter_results": {"hate": {"filtered": False, "severity": "safe"}}}),
        {},
    ),
    "logprobs": (chat(more={"logprobs": LOGPROBS}), {"logprobs": LOGPROBS}),
    "reasoning": (chat(reasoning="Hm.", reasoning_content="Hm.", reasoning_details=THOUGHTS), {"reasoning": "Hm."}),
    "secret reasoning": (
        chat(reasoning_details=[{"type": "reasoning.encrypted", "data": "x"}]),
        {"reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}]},
    ),
    "annotations": (chat(annotations=[NOTE]), {"annotations": [NOTE]}),
    "citations": (
        chat() | {"citations": ["https://a"], "id": "c", "object": "o", "created": 1, "model": "m", "x": 1},
        {"citations": ["https://a"]},
    ),
    "calls beside a text": (chat(tool_calls=[CALL]), {"tool_calls": [CALL]}),
    "a refusal beside a text": (chat(refusal="no"), {"refusal": "no"}),
    "parts": (
        chat([{"type": "text", "text": "All of it."}, {"type": "image_url", "image_url": {"url": "data:"}}]),
        {"content": [{"type": "text", "text": "All of it."}, {"type": "image_url", "image_url": {"url": "data:"}}]},
    ),
    "what a filter has found": (
        chat(more={"content_filter_results": {"hate": {"filtered": True}}}),
        {"content_filter_results": {"hate": {"filtered": True}}},
    ),
}


@in_rows(("body", "more"), BESIDES.values(), ids=BESIDES)
async def test_what_a_choice_holds_besides_the_text_is_kept(backend, body, more):
    (result,), _ = await answered(backend, served(200, body))
    assert result.text == "All of it." and result.as_row().get("more", {}) == more
    assert ("more" in result.as_row()) is bool(more)


async def test_what_a_response_holds_besides_the_text_is_kept(backend):
    part = {"type": "output_text", "text": "Done.", "annotations": [NOTE], "logprobs": [1]}
    thought = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]}
    search = {"type": "web_search_call", "status": "completed"}
    output = [{"type": "reasoning", "summary": []}, thought, search, {"type": "message", "content": [part]}]
    reply, _ = await once(backend, served(200, response("completed", output=output)), endpoint="responses")
    assert reply.text == "Done."
    assert reply.extra == {"more": {"annotations": [NOTE], "logprobs": [1], "reasoning": [thought], "calls": [search]}}


async def test_the_index_decides_not_the_place(backend):
    vectors = [{"index": 1, "embedding": [1.0]}, {"index": 0, "embedding": [0.0]}]
    prompt = {"input": ["a", "b"]}
    reply, _ = await once(backend, served(200, {"data": vectors}), prompt=prompt, endpoint="embeddings")
    assert reply.extra == {"embedding": [[0.0], [1.0]]}
    choices = [
        chat(text, reason)["choices"][0] | {"index": 1 - place}
        for place, (text, reason) in enumerate((("b", "stop"), ("a", "stop")))
    ]
    reply, _ = await once(backend, served(200, {"choices": choices}))
    assert (reply.text, reply.extra, reply.finish_reason) == ("a", {"texts": ["a", "b"]}, "stop")
    choices[0] |= {"finish_reason": "length", "logprobs": LOGPROBS}
    reply, _ = await once(backend, served(200, {"choices": choices}))
    assert reply.finish_reason == "length", "one of them is not whole"
    assert reply.extra["more"] == [{}, {"logprobs": LOGPROBS}]
    texts = [{"index": 1, "text": "b"}, {"index": 0, "text": "a"}]
    reply, _ = await once(backend, served(200, {"choices": texts}), endpoint="completions")
    assert reply.extra == {"texts": ["a", "b"]}
    for odd in ([{"index": 0, "text": "a"}, {"index": 0, "text": "b"}], [{"text": "a"}, {"index": 0, "text": "b"}]):
        reply, _ = await once(backend, served(200, {"choices": odd}), endpoint="completions")
        assert reply.extra == {"texts": ["a", "b"]}, "as they came, where it decides nothing"


# Fields that servers have been seen to add to a chat completion, to its choice and to its message
ADDED = {
    "data": "error base_resp type object status code detail message success usage service_tier citations images model",
    "choice": "index finish_reason logprobs error native_finish_reason stop_reason delta text content_filter_results",
    "message": "role content refusal annotations tool_calls function_call audio reasoning reasoning_content name",
}
VALUES = (
    None, "", "x", "stop", "length", "error", 0, 1, [], ["x"], {}, {"a": 1}, {"status_code": 1004}, {"type": "stop"},
    {"transcript": "hi"}, [{"type": "text", "text": "h"}], [{"function": {"name": "f", "arguments": "{}"}}],
)  # fmt: skip


def test_the_usual_answer_is_read_as_any_other(monkeypatch):
    def read(data):
        try:
            return read_reply("/chat/completions", {}, json.dumps(data).encode())
        except PromptError as failure:
            return failure.error, failure.verdict, failure.http, failure.useless

    def variants():
        for part, names in ADDED.items():
            for name, value in itertools.product(names.split(), VALUES):
                message = {"role": "assistant", "content": "hello"}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                data = {"object": "chat.completion", "choices": [choice], "usage": {"prompt_tokens": 1}}
                {"data": data, "choice": choice, "message": message}[part][name] = value
                yield data
        for choices in ([], [choice, choice], {"0": choice}, "x", None, [None], [{**choice, "message": None}]):
            yield {**data, "choices": choices}

    bodies = list(variants())
    quickly = [read(data) for data in bodies]
    assert sum(map(bool, map(usual_text, bodies))) > 100
    monkeypatch.setitem(read_reply.__globals__, "usual_text", lambda data: "")
    assert quickly == [read(data) for data in bodies]
