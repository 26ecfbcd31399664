"""More members of the kinds in test_field_replies.py: other providers' words, headers, fields and finish reasons."""

import json
import time

import pytest

from concurrent_prompts import PromptError, http_error, token_counts
from concurrent_prompts.backends.hints import hint
from concurrent_prompts.backends.limits import limits_in
from concurrent_prompts.backends.replies import read_reply
from tests.backends.test_field_replies import answered, backend, chat, once, served, stream, told  # noqa: F401
from tests.helpers import in_rows

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


def flagged(reason, message):
    return told(message, 403, metadata={"reasons": [reason], "flagged_input": "x"})


REGION = {"code": 400, "message": "User location is not supported for the API use.", "status": "FAILED_PRECONDITION"}
XAI = {"code": "The caller does not have permission to execute the specified operation"}
BALANCE = {"code": 400, "reason": "NOT_ENOUGH_BALANCE", "message": "x", "metadata": {}}
AMAZON = {"__type": "com.amazon.coral.service#ThrottlingException", "message": "x"}
QUOTA = "You exceeded your current quota, please check your plan and billing details."
GEMINIS = f"{QUOTA}\n* Quota exceeded for metric: free_tier_requests, limit: 20\nPlease retry in 37.69s."
USED_UP = "Your team x has either used all available credits or reached its monthly spending limit."
CUT = "This model's maximum prompt length is 131072 but the request contains 150000 tokens."
KEPT = "Trying to keep the first 5000 tokens when context the overflows."
MEANT = {
    # who says it: the status and the body, the verdict and the type
    "OpenRouter charges nothing": (
        403, flagged("hate", "x requires moderation. Your input was flagged. No credits were charged."), "fail",
        "content_filter",
    ),
    "no credits were charged": (502, told("upstream died. No credits were charged."), "retry", "http_502"),
    "OpenRouter, model": (400, told("foo/bar is not a valid model ID", 400), "stop", "model_not_found"),
    "DeepSeek, model": (400, told("Model Not Exist", "invalid_request_error"), "stop", "model_not_found"),
    "Mistral, model": (400, {"object": "error", "message": "Invalid model: x", "type": "invalid_model"}, "stop",
                       "model_not_found"),
    "Perplexity, model": (400, told("Invalid model 'x'. Permitted models are", 400), "stop", "model_not_found"),
    "Together, model": (400, told("Unable to access x", "model_not_available"), "stop", "model_not_found"),
    "Hugging Face, model": (400, told("x", "model_not_supported"), "stop", "model_not_found"),
    "Bedrock, model": (400, {"message": "The provided model identifier is invalid."}, "stop", "model_not_found"),
    "Jan, model": (400, {"message": "Model has not been loaded, please load it"}, "stop", "model_not_found"),
    "Zhipu, model": (400, told("模型不存在, 请检查模型代码。", "1211"), "stop", "model_not_found"),
    "an invalid model output": (400, told("Invalid model output: not JSON"), "fail", "http_400"),
    "Gemini, no key": (400, told("Missing or invalid Authorization header.", 400), "stop", "invalid_api_key"),
    "a gateway's 200": (200, {"message": "Forbidden"}, "stop", "invalid_api_key"),
    "Gemini, country": (400, [{"error": REGION}], "stop", "not_allowed"),
    "OpenAI, verified": (400, told("Your organization must be verified to use the model `x`."), "stop", "not_allowed"),
    "Groq, terms": (400, told("x", "model_terms_required"), "stop", "not_allowed"),
    "Groq, restricted": (400, told("x", "organization_restricted"), "stop", "account_deactivated"),
    "Anthropic, disabled": (400, told("This organization has been disabled."), "stop", "account_deactivated"),
    "Anthropic, limits": (400, told("You have reached your specified API usage limits."), "stop", "insufficient_quota"),
    "LiteLLM, OpenAI's quota": (429, told(f"litellm.RateLimitError: {QUOTA}", "429"), "stop", "insufficient_quota"),
    "Gemini, rate": (429, told(GEMINIS, 429, status="RESOURCE_EXHAUSTED"), "retry", "RESOURCE_EXHAUSTED"),
    "xAI, credits": (429, {"code": "Some resource has been exhausted", "error": USED_UP}, "stop", "insufficient_quota"),
    "Zhipu, credit": (429, told("您的账户已欠费, 请充值后重试。", "1113"), "stop", "insufficient_quota"),
    "one-api, credit": (403, told("用户额度不足", "insufficient_user_quota"), "stop", "insufficient_quota"),
    "SiliconFlow, credit": (403, {"code": 30001, "message": "Sorry, your account balance is insufficient"}, "stop",
                            "insufficient_quota"),
    "Novita, credit": (400, BALANCE, "stop", "insufficient_quota"),
    "Cloudflare, credit": (429, {"errors": [{"message": "you have used up your daily free allocation of 10,000"}]},
                           "stop", "insufficient_quota"),
    "Portkey, credit": (412, {"status": "failure", "message": "Usage limit exceeded"}, "stop", "insufficient_quota"),
    "Baidu, a day": (200, {"error_code": 17, "error_msg": "Open api daily request limit reached"}, "stop",
                     "insufficient_quota"),
    "xAI, context": (400, {"code": "x", "error": CUT}, "fail", "context_length_exceeded"),
    "Moonshot, context": (400, told("Your request exceeded model token limit: 8192"), "fail",
                          "context_length_exceeded"),
    "LM Studio, context": (400, {"error": KEPT}, "fail", "context_length_exceeded"),
    "llama.cpp, batch": (500, told("input (9000 tokens) is too large to process. increase the batch size"), "fail",
                         "context_length_exceeded"),
    "llama.cpp, cache": (500, told("Input prompt is too big compared to KV size."), "fail", "context_length_exceeded"),
    "SambaNova, context": (400, told("the maximum supported sequence length is just 4096!"), "fail",
                           "context_length_exceeded"),
    "Zhipu, context": (400, told("Prompt 超长", "1261"), "fail", "context_length_exceeded"),
    "GitHub, context": (413, told("x", "tokens_limit_reached"), "fail", "context_length_exceeded"),
    "DeepSeek, content": (400, told("Content Exists Risk"), "fail", "content_filter"),
    "xAI, content": (403, XAI | {"error": "Content violates usage guidelines. Failed check: X"}, "fail",
                     "content_filter"),
    "Volcengine, content": (400, told("x", "InputTextSensitiveContentDetected"), "fail", "content_filter"),
    "Zhipu, content": (400, told("系统检测到输入可能包含敏感内容", "1301"), "fail", "content_filter"),
    "MiniMax, content beside an answer": (
        200, chat("") | {"base_resp": {"status_code": 1027, "status_msg": "output new_sensitive"}}, "fail",
        "content_filter",
    ),
    "llama.cpp, no such endpoint": (501, told("This server does not support embeddings.", 501, "not_supported_error"),
                                    "stop", "not_supported_error"),
    "AWS, rate": (400, {"message": "Rate exceeded"}, "retry", "http_400"),
    "AWS, its own code": (400, AMAZON, "retry", "ThrottlingException"),
    "LM Studio, channel": (400, {"error": "Channel Error"}, "retry", "http_400"),
    "Ollama's own API": (200, {"model": "m", "message": {"content": "x"}, "done": True}, "stop", "wrong_path"),
    "Gemini's own API": (200, {"candidates": [{"content": {}}]}, "stop", "wrong_path"),
    "Hugging Face's own API": (200, [{"generated_text": "x"}], "stop", "wrong_path"),
    "Cloudflare's own API": (200, {"result": {"response": "x"}, "success": True, "errors": []}, "stop", "wrong_path"),
}  # fmt: skip


@in_rows(("status", "body", "verdict", "kind"), MEANT.values(), ids=MEANT)
async def test_what_a_failure_means(backend, status, body, verdict, kind):  # noqa: F811
    failure, _ = await once(backend, served(status, body))
    assert isinstance(failure, PromptError), failure
    assert (failure.verdict, failure.error.type) == (verdict, kind), failure
    assert hint(failure.error)


@in_rows("code", ["json_validate_failed", "tool_use_failed"])
async def test_what_the_model_got_wrong_is_asked_twice(backend, code):  # noqa: F811
    wrong = served(400, told("Failed to generate JSON.", code))
    (result,), log = await answered(backend, wrong, served(200, chat()))
    assert result.text == "All of it." and len(log) == 2
    (result,), log = await answered(backend, wrong)
    assert result.error.type == code and len(log) == 2


async def test_a_call_that_gemini_could_not_form_is_asked_twice(backend):  # noqa: F811
    wrong = served(200, chat(None, "function_call_filter: MALFORMED_FUNCTION_CALL"))
    (result,), log = await answered(backend, wrong)
    assert result.error.type == "broken_off" and len(log) == 2


# ---- Waits and limits --------------------------------------------------------------------------------------------

NOW = int(time.time())
LATER = {"X-RateLimit-Limit": "50", "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": str(1000 * (NOW + 3000))}
WAITS = {
    "a Go duration": ({"retry-after": "1m30s"}, {}, 90),
    "with its unit": ({"retry-after": "500ms"}, {}, 0.5),
    "two of them": ({"retry-after": "120, 120"}, {}, 120),
    "a Unix time": ({"retry-after": str(NOW + 3000)}, {}, 3000),
    "Azure's": ({"x-ms-retry-after-ms": "700"}, {}, 0.7),
    "Discord's": ({"x-ratelimit-reset-after": "12"}, {}, 12),
    "IETF's": ({"ratelimit": '"default";r=0;t=7'}, {}, 7),
    "IETF's, former": ({"ratelimit": "limit=10, remaining=0, reset=7"}, {}, 7),
    "IETF's, something is left": ({"ratelimit": '"default";r=3;t=7'}, {}, None),
    "OpenRouter's in the body": ({}, told(metadata={"headers": LATER}), 3000),
    "beside the error": ({}, told() | {"retry_after": 12}, 12),
    "Telegram's": ({}, {"message": "x", "parameters": {"retry_after": 12}}, 12),
    "Google's object": ({}, told(details=[{"retryDelay": {"seconds": 12}}]), 12),
    "a date": ({}, told(resets_at=NOW + 3000), 3000),
    "other names": ({}, told(resets_in_seconds=9), 9),
    "weeks": ({}, told("try again in 2 weeks"), 1209600),
    "a clock": ({}, told("try again in 00:05:30"), 330),
    "back off": ({}, told("throttled, back off for 5000ms"), 5),
    "time left": ({}, told("Too many requests. Time left: 12s"), 12),
    "come back": ({}, told("You have used all of it. Come back in 1h 2m"), 3720),
    "cooling": ({}, told("Cooling down for 30s"), 30),
    "Japanese": ({}, told("30秒後に再試行してください"), 30),
    "a plan's length": ({}, told("已达到 5 小时的使用上限"), None),
    "nonsense": ({"retry-after": "soon"}, told(retry_after=[], resets_at={}), None),
    "infinity": ({"retry-after": "inf"}, told(retry_after=10**400), None),
}


@in_rows(("headers", "body", "wait"), WAITS.values(), ids=WAITS)
def test_a_wait_is_found(headers, body, wait):
    assert http_error(429, headers, body).wait == (wait and pytest.approx(wait, rel=0.2 if wait == 3000 else 0.02))


FIT = {
    "limit (6000) exceeded, requested (7000)": True,
    "Limit 6000, Used 5999, Requested approximately 7000": True,
    "Limit 1M, Requested 2M": True,
    "limit: '6000', requested: '7000'": True,
    "Requested tokens: 9000 exceed the TPM limit: 6000": True,
    "Requested about 5000, limit of 6,000": False,
}


@in_rows(("message", "larger"), FIT.items())
def test_numbers_that_can_never_fit(message, larger):
    assert (http_error(429, {}, told(message)).error.type == "larger_than_limit") is larger


def quota(kind, limit, left, reset):
    names = {"limit": limit, "remaining": left, "reset": reset}
    return {f"x-ratelimit-{name}-{kind}": value for name, value in names.items()}


LIMITS = {
    "Cerebras, a minute": (quota("tokens-minute", "60000", "59000", "12.5"), "tokens", 1000, 59000, 60000),
    "Cerebras, a day": (quota("requests-day", "14400", "14000", "33011.3"), "requests", 1 / 6, 14000, 14400),
    "Mistral": (quota("req-minute", "60", "59", ""), "requests", 1, 59, 60),
    "thousands": (quota("requests", "1,200", "1,199", "50ms"), "requests", 20, 1199, 1200),
    "IETF": ({"ratelimit": '"a";r=50;t=30', "ratelimit-policy": '"a";q=100;w=50'}, "requests", 2, 50, 100),
}


@in_rows(("headers", "name", "rate", "left", "size"), LIMITS.values(), ids=LIMITS)
def test_a_limit_is_found(headers, name, rate, left, size):
    found = limits_in(headers, name)
    assert found[:3] == (pytest.approx(rate), left, pytest.approx(size, rel=0.01))


@in_rows("policy", ["", '"a";q=0;w=5', '"a";q=5;w=0', '"a";q=5'])
def test_a_limit_that_is_half_told_is_none(policy):
    assert limits_in({"ratelimit": '"a";r=50;t=30', "ratelimit-policy": policy}, "requests") is None


# ---- Answers -------------------------------------------------------------------------------------------------


def read(body):
    return read_reply("/chat/completions", {}, json.dumps(body).encode())


WHOLE = ("STOP", "Stop", "END_TURN", "COMPLETE", "finished", "stop_token", "FINISH_REASON_STOP", "<|im_end|>", "eog")
BROKEN = ("failed", "rate_limit", "USER_CANCEL", "FINISH_REASON_ERROR", "kv_transfer_error", "interrupted")


@in_rows("reason", WHOLE)
def test_an_answer_that_is_whole_by_another_word(reason):
    assert read(chat("Hi", reason)).finish_reason in ("stop", reason.lower())


@in_rows("reason", ["length", "MAX_TOKENS", "SAFETY", "ERROR_TOXIC", "pause_turn"])
def test_an_answer_that_is_not_whole_keeps_its_word(reason):
    assert read(chat("Hi", reason)).finish_reason == reason


@in_rows("reason", BROKEN)
def test_an_answer_that_broke_off_by_another_word(reason):
    for body in (chat("Hi", reason), chat("Hi", None, {"native_finish_reason": reason})):
        with pytest.raises(PromptError) as failure:
            read(body)
        assert failure.value.verdict == "retry"


@in_rows("error", [{"code": 0, "message": ""}, {}, "", None, False])
def test_an_error_that_is_none_is_passed_over(error):
    assert read(chat() | {"error": error, "base_resp": {"status_code": 0, "status_msg": ""}}).text == "All of it."


TEXTS = {
    "a chunk": {"choices": [{"delta": {"content": "Hi"}, "finish_reason": "stop"}]},
    "a completion's": {"choices": [{"text": "Hi", "finish_reason": "stop"}]},
    "spoken": chat(None, audio={"data": "x", "transcript": "Hi"}),
}


@in_rows("body", TEXTS.values(), ids=TEXTS)
def test_a_text_in_another_place(body):
    assert read(body).text == "Hi"


def test_an_object_as_content_is_written_as_json():
    assert read(chat({"a": "ü"})).text == '{"a": "ü"}'


# ---- Half streams, calls in parts, answers in other places -----------------------------------------------------


def delta(reason=None, **part):
    return {"id": "c", "choices": [{"index": 0, "delta": part, "finish_reason": reason}]}


def streamed(*chunks):
    return read_reply("/chat/completions", {}, stream(*chunks).encode())


def call(id, name, arguments, **more):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}} | more


F, G = call("1", "f", '{"a":1}'), call("2", "g", '{"b":2}')
AT_0 = {"index": 0}
CALLS = {
    # the parts of each chunk's calls: what they come to
    "Gemini's, all at index 0": ([[F | AT_0], [G | AT_0]], [F, G]),
    "in one chunk": ([[F | AT_0, G | AT_0]], [F, G]),
    "without an index": ([[F], [G]], [F, G]),
    "the id again": ([[call("1", "f", '{"a"', index=0)], [call("1", "", ":1}", index=0)]], [F]),
    "an empty id later": ([[call("1", "f", '{"a"', index=0)], [call("", None, ":1}", index=0)]], [F]),
    "the name again": ([[call("1", "f", '{"a"', index=0)], [call("1", "f", ":1}", index=0)]], [F]),
    "in turn": ([[call("1", "f", "{", index=0), call("2", "g", "{", index=1)],
                 [call(None, None, '"a":1}', index=0), call(None, None, '"b":2}', index=1)]], [F, G]),
    "in turn, all at index 0": ([[F | AT_0], [call("2", "g", "{", index=0)], [call("2", "g", '"b":2}', index=0)]],
                                [F, G]),
}  # fmt: skip


@in_rows(("parts", "calls"), CALLS.values(), ids=CALLS)
def test_calls_that_come_in_parts(parts, calls):
    assert json.loads(streamed(*[delta(tool_calls=part) for part in parts], delta("tool_calls")).text) == calls


THOUGHT = {"type": "thinking", "thinking": [{"type": "text", "text": "Hm"}]}


@in_rows(
    "chunks", [["All ", "of it."], [[THOUGHT], "All ", "of it."], ["All ", [{"type": "text", "text": "of it."}]]]
)
def test_a_content_that_comes_in_parts_and_texts(chunks):
    reply = streamed(*[delta(content=chunk) for chunk in chunks], delta("stop"))
    assert reply.text == "All of it." and ("Hm" in json.dumps(reply.extra)) is (chunks[0] == [THOUGHT])


TOLD, NOUGHT = {"usage": {"prompt_tokens": 1}}, {"usage": {"prompt_tokens": 0}}
LAST = {"index": 0, "delta": {}, "finish_reason": "stop"}
PLACES = {
    "Moonshot's": [delta(content="a"), {"choices": [LAST | TOLD]}],
    "noughts after it": [delta("stop", content="a") | TOLD, {"choices": []} | NOUGHT],
    "a count so far": [delta(content="a") | {"usage": {"prompt_tokens": 9}}, delta("stop") | TOLD],
}


@in_rows("chunks", PLACES.values(), ids=PLACES)
def test_where_a_stream_has_its_usage(chunks):
    reply = streamed(*chunks)
    assert reply.usage == {"prompt_tokens": 1} and reply.extra == {}


async def test_a_stream_of_calls_and_thoughts_on_every_backend(backend):  # noqa: F811
    chunks = delta(content=[THOUGHT]), delta(content="x", tool_calls=[F | AT_0]), delta("stop", tool_calls=[G | AT_0])
    reply, _ = await once(backend, served(200, stream(*chunks), content_type="text/event-stream"))
    assert reply.text == "x" and reply.extra["more"]["tool_calls"] == [F, G] and "Hm" in json.dumps(reply.extra)


OTHERS = {
    "Ollama's own stream": ("/chat/completions", '{"message": {"content": "a"}, "done": false}\n{"done": true}\n'),
    "Ollama's own vector": ("/embeddings", '{"embedding": [1.0]}'),
    "Cohere's own vectors": ("/embeddings", '{"embeddings": [[1.0]], "id": "x"}'),
    "llama.cpp's own vectors": ("/embeddings", '[{"index": 0, "embedding": [[1.0]]}]'),
    "a gateway's": ("/chat/completions", json.dumps({"code": 0, "msg": "ok", "data": chat()})),
    "a function's": ("/chat/completions", json.dumps({"statusCode": 200, "body": json.dumps(chat())})),
}


@in_rows(("path", "body"), OTHERS.values(), ids=OTHERS)
def test_an_answer_of_another_api_stops_the_run(path, body):
    with pytest.raises(PromptError) as failure:
        read_reply(path, {}, body.encode())
    assert (failure.value.verdict, failure.value.error.type) == ("stop", "wrong_path")
    assert "form of" in str(failure.value) and "--base-url" in hint(failure.value.error)


@in_rows("reason", ["UNEXPECTED_TOOL_CALL", "MALFORMED_RESPONSE", "userStopped"])
def test_more_words_for_what_broke_off(reason):
    with pytest.raises(PromptError) as failure:
        read(chat(None, reason))
    assert failure.value.useless == reason.isupper()


@in_rows("vectors", [[None], [[]], [[1.0], None]])
def test_an_empty_vector_is_no_answer(vectors):
    data = {"data": [{"index": place, "embedding": vector} for place, vector in enumerate(vectors)]}
    with pytest.raises(PromptError, match="no answer"):
        read_reply("/embeddings", {}, json.dumps(data).encode())


TOOLS, APPROVAL = {"type": "mcp_list_tools", "tools": [1]}, {"type": "mcp_approval_request", "arguments": "{}"}
SAID = {"type": "message", "content": [{"type": "output_text", "text": "Hi"}]}
ITEMS = {
    # the items of a Responses object: its text, and what is kept besides
    "a text as content": ([{"type": "message", "content": "Hi"}], "Hi", None),
    "no content": ([{"type": "message", "content": None}], "", None),
    "a question back": ([APPROVAL], json.dumps([APPROVAL]), None),
    "tools beside a text": ([TOOLS, SAID], "Hi", [TOOLS]),
    "tools beside a question": ([TOOLS, APPROVAL], json.dumps([APPROVAL]), [TOOLS, APPROVAL]),
    "tools alone": ([TOOLS], "", [TOOLS]),
}


@in_rows(("items", "text", "calls"), ITEMS.values(), ids=ITEMS)
def test_no_item_of_a_response_vanishes(items, text, calls):
    body = {"id": "r", "object": "response", "status": "completed", "output": items}
    reply = read_reply("/responses", {}, json.dumps(body).encode())
    assert reply.text == text and reply.extra.get("more", {}).get("calls") == calls


USAGES = {
    "Bedrock": ({"inputTokens": 10, "outputTokens": 20, "cacheReadInputTokens": 5}, [15, 20, 5, 0, 0]),
    "AI SDK": ({"promptTokens": 10, "completionTokens": 20, "totalTokens": 30}, [10, 20, 0, 0, 0]),
    "Cohere": ({"tokens": {"input_tokens": 10, "output_tokens": 20}}, [10, 20, 0, 0, 0]),
}


@in_rows(("usage", "counts"), USAGES.values(), ids=USAGES)
def test_usage_in_other_forms(usage, counts):
    assert token_counts(usage) == counts
