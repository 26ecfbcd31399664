"""What servers say when they give no answer, in still more words: each row by its verdict and its type.

The words are those of the provider that is named; `test_field_replies.py` and `test_field_members.py` have the others.
"""

import datetime

import pytest

from concurrent_prompts import PromptError, as_prompt_error, as_prompts, http_error, load_backend
from concurrent_prompts.backends.hints import hint
from concurrent_prompts.backends.replies import reply_of
from tests.backends.test_field_replies import backend, served, told  # noqa: F401
from tests.helpers import in_rows, scripted

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")

CONTEXT, CONTENT, KEY = ("fail", "context_length_exceeded"), ("fail", "content_filter"), ("stop", "invalid_api_key")
QUOTA, MODEL, PATH = ("stop", "insufficient_quota"), ("stop", "model_not_found"), ("stop", "wrong_path")
SUM = "input length and `max_tokens` exceed context limit: 199000 + 8192 > 200000, decrease input length and try again"
VERTEX = "Unable to submit request because the input token count is 40000 but model only supports up to 32768."
VOYAGE = "The max allowed tokens per submitted batch is 120000. Your batch has 150000 tokens after truncation."
WATSONX = "Invalid input argument for Model 'x': the number of input tokens 5000 cannot exceed the total limit 4096"
CLOUDFLARE = "AiError: The estimated number of input and maximum output tokens (8500) exceeded this model context."
HOOKS = "The guardrail checks defined in the config failed. You can find more information in the `hook_results` object."
TRIAL = "You are using a Trial key, which is limited to {} API calls / {}. You can continue to use it"
GEMINI = "You exceeded your current quota, please check your plan and billing details.\n* Quota exceeded for metric: x"
CREDITS = "You have exceeded your monthly included credits for Inference Providers. Subscribe to PRO to get 20x more"
OLD = "The model 'x' has reached its end of life on 2025-12-01T00:00:00Z and is no longer available."
MOVED = "https://api-inference.huggingface.co is no longer supported. Please use https://router.huggingface.co instead."
PROFILE = "Invocation of model ID x with on-demand throughput isn't supported. Retry with the ID of a profile."
SPIKE = {"faultstring": "Spike arrest violation. Allowed rate : 10ps", "detail": {"errorcode": "x"}}


def google(status, message, *limits):
    """Return an error of Gemini's, with the limits that it names."""
    violations = [{"quotaId": f"Generate{limit}PerProjectPerModel-FreeTier"} for limit in limits]
    details = [{"@type": "x.QuotaFailure", "violations": violations}, {"retryDelay": "37s"}]
    return [{"error": {"code": 429, "message": message, "status": status, "details": details}}]


def failed(*codes):
    return {"success": False, "errors": [{"code": code, "message": message} for code, message in codes]}


MEANT = {
    # who says it: the status and the body, the verdict and the type
    "Anthropic, the sum": (400, told(SUM), *CONTEXT),
    "Mistral, context": (400, {"object": "error", "message": "Prompt contains 4000 tokens, too large for this model",
                               "type": "invalid_request_error", "code": "3051"}, *CONTEXT),
    "Cohere, context": (400, {"message": "too many tokens: total number of tokens in the prompt cannot exceed 4081"},
                        *CONTEXT),
    "Bedrock, context": (400, {"message": "Input is too long for requested model."}, *CONTEXT),
    "Vertex, context": (400, google("INVALID_ARGUMENT", VERTEX), *CONTEXT),
    "vLLM, the engine": (400, told("The engine prompt length 5000 exceeds the max_model_len 4096."), *CONTEXT),
    "SGLang, context": (400, told("The input (50 tokens) is longer than the model's context length (40 tokens)."),
                        *CONTEXT),
    "MLC, context": (400, told("Request prompt has 50 tokens in total, larger than the model input length limit 40."),
                     *CONTEXT),
    "watsonx, context": (400, {"errors": [{"code": "invalid_input_argument", "message": WATSONX}]}, *CONTEXT),
    "Databricks, context": (400, {"error_code": "BAD_REQUEST", "message": "prompt token count (5000) + max_tokens (9) "
                                  "cannot exceed 4096"}, *CONTEXT),
    "Copilot, context": (400, told("prompt token count of 90000 exceeds the limit of 64000"), *CONTEXT),
    "Volcengine, context": (400, told("Total tokens of image and text exceed max message tokens", "InvalidParameter"),
                            *CONTEXT),
    "Cloudflare, context": (400, failed((5021, CLOUDFLARE)), *CONTEXT),
    "Voyage, context": (400, {"detail": VOYAGE}, *CONTEXT),
    "Jina, context": (400, {"detail": "Single text cannot exceed 8194 tokens. 9000 tokens given."}, *CONTEXT),
    "Snowflake, context": (400, {"message": "max tokens of 4096 exceeded"}, *CONTEXT),
    "LMDeploy, context": (400, told("The input length (5000) is greater than session_len 4096"), *CONTEXT),
    "Qianfan, context": (400, told("prompt tokens too long"), *CONTEXT),
    "TRT-LLM, context": (400, told("Prompt length (5000) exceeds maximum input length (4096)."), *CONTEXT),
    "Cloudflare, a guardrail": (424, failed((2016, "Prompt blocked due to security configurations")), *CONTENT),
    "Portkey, a guardrail": (446, told(HOOKS, None, "hooks_failed"), *CONTENT),
    "WSO2, a guardrail": (446, {"code": "900514", "message": {"action": "GUARDRAIL_INTERVENED"}}, *CONTENT),
    "LiteLLM, a guardrail": (400, told("Violated guardrail policy", "400"), *CONTENT),
    "Databricks, a guardrail": (400, told("Request blocked by input guardrail 'x'"), *CONTENT),
    "Kong, a guard": (400, told("bad request: prompt pattern is blocked"), *CONTENT),
    "Bedrock, a guardrail": (400, {"message": "Guardrail was enabled and the input was blocked"}, *CONTENT),
    "Google, Model Armor": (400, told("Blocked by Model Armor floor settings"), *CONTENT),
    "Gemini, blocked": (400, google("INVALID_ARGUMENT", "The prompt was blocked. Reason: OTHER"), *CONTENT),
    "Moonshot, content": (400, told("The request was rejected because it was considered high risk"), *CONTENT),
    "Tencent, content": (400, told("内容安全审核不通过"), *CONTENT),
    "StepFun, content": (451, told("The content you provided is blocked.", None, "censorship_blocked"), *CONTENT),
    "OpenAI, a policy": (400, told("x", "cyber_policy_violation"), *CONTENT),
    "GitHub, key": (400, {"message": "Bad credentials"}, *KEY),
    "SiliconFlow, key": (400, "Invalid token", *KEY),
    "Hugging Face, key": (400, {"error": "Invalid username or password."}, *KEY),
    "Coze, key": (200, {"code": 4100, "msg": "authentication is invalid"}, *KEY),
    "Zhipu, key": (200, {"code": 1002, "msg": "Authorization Token非法", "success": False}, *KEY),
    "one-api, key": (400, told("无效的令牌", "", "new_api_error"), *KEY),
    "one-api, expired": (400, told("该令牌已过期"), *KEY),
    "a proxy, key": (500, told("User not authenticated"), *KEY),
    "AWS, key": (403, {"message": "Missing Authentication Token"}, "stop", "http_403"),
    "Tyk, quota": (403, {"error": "Quota exceeded"}, "stop", "http_403"),
    "Cohere, a month": (429, {"message": TRIAL.format("1000", "month")}, *QUOTA),
    "Cohere, a minute": (429, {"message": TRIAL.format("20", "minute")}, "retry", "http_429"),
    "Gemini, a day": (429, google("RESOURCE_EXHAUSTED", GEMINI, "RequestsPerMinute", "RequestsPerDay"), *QUOTA),
    "Gemini, a minute": (429, google("RESOURCE_EXHAUSTED", f"{GEMINI}\nPlease retry in 37s.", "RequestsPerMinute"),
                         "retry", "RESOURCE_EXHAUSTED"),
    "Anthropic, workspace": (400, told("You have reached your specified workspace API usage limits."), *QUOTA),
    "Hugging Face, credits": (400, told(CREDITS), *QUOTA),
    "Bedrock, a day": (429, {"message": "Too many tokens per day, please wait before trying again."}, *QUOTA),
    "Bedrock, a minute": (400, {"message": "Too many tokens, please wait before trying again."}, "retry", "http_400"),
    "Cerebras, a minute": (429, told("Tokens per minute limit exceeded - too many tokens processed."), "retry",
                           "http_429"),
    "LiteLLM, budget of a key": (400, told("ExceededTokenBudget: Current spend for token: 7.2e-05", "400"), *QUOTA),
    "Baidu, in all": (200, {"error_code": 19, "error_msg": "Open api total request limit reached"}, *QUOTA),
    "Zhipu, a day": (429, told("已达到每日调用次数限制", "1304"), *QUOTA),
    "Groq, spend": (400, told("Your organization has reached its spend limit", "blocked_api_access"), *QUOTA),
    "Ollama, a week": (429, {"error": "you (x) have reached your weekly usage limit, upgrade for higher limits"},
                       *QUOTA),
    "Azure, a gateway's quota": (403, {"message": "Out of call volume quota. Quota will be replenished in 01:02:03."},
                                 "retry", "http_403"),
    "Apigee, spike": (500, {"fault": SPIKE}, "retry", "http_500"),
    "NVIDIA, an old model": (410, {"status": 410, "title": "Gone", "detail": OLD}, *MODEL),
    "retired": (400, told("The model x was retired on 2025-10-01. Please use y"), *MODEL),
    "LM Studio, model": (400, told('Invalid model identifier "x". Please specify a valid one.'), *MODEL),
    "LM Studio, several": (400, {"error": "Multiple models are loaded. Please specify a model"}, *MODEL),
    "Bedrock, access": (400, {"message": "You don't have access to the model with the specified model ID."}, *MODEL),
    "Bedrock, profile": (400, {"message": PROFILE}, *MODEL),
    "llama-swap": (400, {"error": "could not find suitable inference handler for x"}, *MODEL),
    "Ollama, no chat": (400, told('"nomic-embed-text:latest" does not support chat'), *MODEL),
    "Hugging Face, task": (400, told("Model x is not supported for task text-generation and provider y."), *MODEL),
    "Hugging Face, moved": (410, {"error": MOVED}, *PATH),
    "OpenAI, another endpoint": (400, told("This model is only supported in v1/responses and not in v1/chat."), *PATH),
    "Gemini, unavailable": (400, google("UNAVAILABLE", "The service is currently unavailable."), "retry",
                            "UNAVAILABLE"),
    "Cloudflare, capacity": (400, failed((3040, "Capacity temporarily exceeded, please try again.")), "retry",
                             "http_400"),
    "Anthropic, overloaded": (200, {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}},
                              "retry", "overloaded_error"),
    # words that look like the above, and mean less
    "a parameter is deprecated": (400, told("For this model the parameter `functions` has been deprecated"), "fail",
                                  "http_400"),
    "a firewall": (403, {"message": "Request blocked by a rule of the firewall"}, "stop", "http_403"),
    "a guardrail is broken": (500, told("Output guardrail 'x' failed to evaluate"), "retry", "http_500"),
    "a budget in the prompt": (400, told("`budget` must be a number"), "fail", "http_400"),
}  # fmt: skip


@in_rows(("status", "body", "verdict", "kind"), MEANT.values(), ids=MEANT)
def test_what_a_failure_means(status, body, verdict, kind):
    with pytest.raises(PromptError) as failure:
        reply_of("/chat/completions", status, {}, served(status, body).partition(b"\r\n\r\n")[2])
    assert (failure.value.verdict, failure.value.error.type) == (verdict, kind), failure.value
    assert hint(failure.value.error)


async def test_it_means_the_same_on_every_backend(backend):  # noqa: F811
    left = [served(status, body) for status, body, *_ in MEANT.values()]
    found = {}
    async with scripted(lambda head, body: left.pop(0)) as (url, _):
        api = load_backend(backend, base_url=url, model="m")
        async with api.open(1) as call:
            for name, prompt in zip(MEANT, as_prompts(list(MEANT)), strict=True):
                try:
                    await call(api.prepare(prompt))
                except Exception as failure:
                    error = as_prompt_error(failure)
                    found[name] = (*MEANT[name][:2], error.verdict, error.error.type)
    assert found == MEANT


def test_hints_by_words():
    assert "--base-url" in hint(http_error(403, {}, {"message": "Missing Authentication Token"}).error)
    assert "credit" in hint(http_error(403, {}, {"error": "Quota exceeded"}).error)


def test_waits_of_gateways():
    soon = datetime.datetime.now(datetime.timezone(datetime.timedelta(hours=8))) + datetime.timedelta(hours=2)
    for text, wait in {
        "Out of call volume quota. Quota will be replenished in 01:02:03.": 3723,
        f"Usage limit reached for 5 hour. Your limit will reset at {soon:%Y-%m-%d %H:%M:%S}": 7200,
        f"已达到 5 小时的使用上限。您的限额将在 {soon:%Y-%m-%d %H:%M:%S} 重置。": 7200,
    }.items():
        failure = http_error(429, {}, told(text))
        assert failure.verdict == "retry" and failure.wait == pytest.approx(wait, abs=5), text
    assert http_error(500, {}, {"fault": SPIKE}).slow and http_error(403, {}, {"message": "Call volume quota"}).slow
