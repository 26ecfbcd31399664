"""Dialects of the stand-in server: how nine providers word, count and break what OpenAI answers in one form.

A dialect is data: where the API is found, what each kind of failure is called, which headers tell limits, and what an
answer holds besides. The server makes OpenAI's reply, and `Dialect` turns it into the provider's.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .stand_in_answers import DIALECT_FAULTS, Ask, Reply, encode_json, error
from .stand_in_streams import stream_of

AZURE_VERSION = "2024-10-21"
NOWHERE = "/nowhere"  # before a path that the dialect does not have


class Words(NamedTuple):
    """An error as a provider writes it: $model, $path, $wait and $reset (seconds, a time in ms) stand in its texts."""

    status: int
    body: Any
    headers: str = ""


def flat(status: int, message: str, kind: str | None = None, code: Any = None, **more: Any) -> Words:
    """Return an error in OpenAI's form."""
    return Words(status, {"error": {"message": message, "type": kind, "code": code, **more}})


def router(status: int, message: str, **metadata: Any) -> Words:
    """Return an error in OpenRouter's form."""
    detail = {"code": status, "message": message}
    return Words(status, {"error": detail | ({"metadata": metadata} if metadata else {}), "user_id": "user_stand_in"})


def google(status: int, name: str, message: str, *details: Any) -> Words:
    """Return an error in the form of Gemini's compatible endpoint: within a list."""
    detail = {"code": status, "message": message, "status": name}
    return Words(status, [{"error": detail | ({"details": list(details)} if details else {})}])


RETRY_INFO = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "$waits"}
KEY_INFO = {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}
LATER = {"X-RateLimit-Limit": "$limit", "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "$reset"}
FILTERED = {"code": "ResponsibleAIPolicyViolation", "content_filter_result": {"hate": {"filtered": True}}}
RETRY_AFTER = "retry-after: $wait\r\n"

# By dialect: what it says when a key, a model or a path is wrong, the credit is used up, there are too many requests,
# it fails or is busy, the prompt is too long or refused, and an answer breaks off. A kind that is missing is worded as
# OpenAI does. Each message is in the form of the page or the report that is named.
WORDS: dict[str, dict[str, Words]] = {
    "openai": {  # https://platform.openai.com/docs/guides/error-codes
        "context": flat(400, "This model's maximum context length is 8192 tokens. However, your messages resulted in "
                        "9000 tokens.", "invalid_request_error", "context_length_exceeded", param="messages"),
        "content": flat(400, "Invalid prompt: your prompt was flagged as potentially violating our usage policy.",
                        "invalid_request_error", "invalid_prompt"),
        "cut": flat(500, "The server had an error while processing your request.", "server_error"),
    },
    "openrouter": {  # https://openrouter.ai/docs/api/reference/errors-and-debugging; once it works, errors come as 200
        "key": router(401, "User not found."),
        "model": router(400, "$model is not a valid model ID"),
        "path": router(404, "Not Found"),
        "credit": router(402, "Insufficient credits. Add more using https://openrouter.ai/settings/credits"),
        "rate": router(429, "Rate limit exceeded: limit_rpm/$model", headers=LATER)._replace(
            headers="X-RateLimit-Limit: $limit\r\nX-RateLimit-Remaining: 0\r\nX-RateLimit-Reset: $reset\r\n"),
        "server": router(502, "Provider returned error", raw="error code: 502", provider_name="StandIn"),
        "busy": router(503, "No available model provider that meets your routing requirements"),
        "context": router(400, "This endpoint's maximum context length is 8192 tokens. However, you requested about "
                          "9000 tokens (8000 of text input, 1000 in the output)."),
        "content": router(403, "$model requires moderation on StandIn. Your input was flagged for \"violence\". No "
                          "credits were charged.", reasons=["violence"], flagged_input="..."),
    },
    "gemini": {  # https://ai.google.dev/gemini-api/docs/troubleshooting and /docs/rate-limits
        "key": google(400, "INVALID_ARGUMENT", "API key not valid. Please pass a valid API key.", KEY_INFO),
        "model": google(404, "NOT_FOUND", "models/$model is not found for API version v1main, or is not supported for "
                        "generateContent."),
        "credit": google(429, "RESOURCE_EXHAUSTED", "Your prepayment credits are depleted: insufficient credits."),
        "rate": google(429, "RESOURCE_EXHAUSTED", "You exceeded your current quota, please check your plan and billing "
                       "details. Quota exceeded for metric: free_tier_requests, limit: $limit\nPlease retry in $waits.",
                       {"@type": "type.googleapis.com/google.rpc.QuotaFailure"}, RETRY_INFO),
        "server": google(500, "INTERNAL", "An internal error has occurred. Please retry."),
        "busy": google(503, "UNAVAILABLE", "The model is overloaded. Please try again later."),
        "cut": google(504, "DEADLINE_EXCEEDED", "Deadline expired before operation could complete."),
        "context": google(400, "INVALID_ARGUMENT", "The input token count (9000) exceeds the maximum number of tokens "
                          "allowed (8192)."),
    },
    "lmstudio": {  # lmstudio-ai/lmstudio-bug-tracker#2339, https://lmstudio.ai/docs/developer
        "path": Words(200, {"error": "Unexpected endpoint or method. ($path)"}),
        "model": flat(404, "No models loaded. Please load a model in the developer page or use the `lms load` command.",
                      "invalid_request_error", "model_not_found", param="model"),
        "server": Words(400, {"error": "The model has crashed without additional information. (Exit code: null)"}),
        "busy": Words(400, {"error": "Model reloaded."}),
        "context": Words(400, {"error": "Trying to keep the first 9000 tokens when context the overflows. However, the "
                               "model is loaded with context length of only 8192 tokens, which is not enough."}),
        "cut": Words(400, {"error": "Channel Error"}),
    },
    "deepseek": {  # https://api-docs.deepseek.com/quick_start/error_codes; it states no limits
        "key": flat(401, "Authentication Fails, Your api key: ****0000 is invalid", "authentication_error",
                    "invalid_request_error"),
        "model": flat(400, "Model Not Exist", "invalid_request_error", "invalid_request_error"),
        "credit": flat(402, "Insufficient Balance", "unknown_error", "invalid_request_error"),
        "rate": flat(429, "Rate limit reached.", "rate_limit_error", "invalid_request_error"),
        "server": flat(500, "Internal Server Error", "internal_error", "internal_error"),
        "busy": flat(503, "Service is too busy. We advise users to temporarily switch to alternative LLM API service "
                     "providers.", "service_unavailable_error", "service_unavailable"),
        "content": flat(400, "Content Exists Risk", "invalid_request_error", "invalid_request_error"),
    },
    "azure": {  # https://learn.microsoft.com/azure/ai-foundry/openai/how-to/quota and /concepts/content-filter
        "key": Words(401, {"error": {"code": "401", "message": "Access denied due to invalid subscription key or wrong "
                                     "API endpoint."}}),
        "model": Words(404, {"error": {"code": "DeploymentNotFound", "message": "The API deployment for this resource "
                                       "does not exist."}}),
        "path": Words(404, {"error": {"code": "404", "message": "Resource not found"}}),
        "rate": Words(429, {"error": {"code": "429", "message": "Requests to the ChatCompletions_Create Operation have "
                                      "exceeded token rate limit of your current pricing tier. Please retry after "
                                      "$wait seconds."}}, f"{RETRY_AFTER}retry-after-ms: $milliseconds\r\n"),
        "busy": Words(503, {"error": {"code": "ServiceUnavailable", "message": "The service is temporarily unable to "
                                      "process your request. Please try again later."}}),
        "content": Words(400, {"error": {
            "message": "The response was filtered due to the prompt triggering Azure OpenAI's content management "
            "policy.",
            "type": None, "param": "prompt", "code": "content_filter", "status": 400, "innererror": FILTERED}}),
        "cut": Words(408, {"error": {"code": "Timeout", "message": "The operation was timeout."}}),
    },
    "litellm": {  # https://docs.litellm.ai/docs/proxy/error_reference; BerriAI/litellm#5177
        "key": flat(401, "Authentication Error, Invalid proxy server token passed.", "auth_error", "401"),
        "model": flat(400, "/chat/completions: Invalid model name passed in model=$model. Call `/v1/models` to view "
                      "available models for your key.", "invalid_request_error", "400"),
        "path": Words(404, {"detail": "Not Found"}),
        "credit": flat(400, "Budget has been exceeded! Current cost: 0.2, Max budget: 0.1", "budget_exceeded", "400"),
        "rate": flat(429, "No deployments available for selected model, Try again in $wait seconds. Passed "
                     "model=$model. pre-call-checks=False, cooldown_list=[]", "None", "429"),
        "server": flat(500, "litellm.InternalServerError: OpenAIException - Connection error.", None, "500"),
        "busy": flat(503, "litellm.ServiceUnavailableError: OpenAIException - overloaded", None, "503"),
        "context": flat(400, "litellm.ContextWindowExceededError: This model's maximum context length is 8192 tokens.",
                        None, "400"),
        "content": flat(400, "litellm.ContentPolicyViolationError: AzureException - The response was filtered",
                        "None", "400"),
        "cut": flat(408, "litellm.Timeout: Request timed out.", "None", "408"),
    },
    "groq": {  # https://console.groq.com/docs/errors and /docs/rate-limits; Aider-AI/aider#3265
        "key": flat(401, "Invalid API Key", "invalid_request_error", "invalid_api_key"),
        "rate": flat(429, "Rate limit reached for model `$model` in organization `org` service tier `on_demand` on "
                     "tokens per minute (TPM): Limit $limit, Used $limit, Requested 1. Please try again in $waits.",
                     "tokens", "rate_limit_exceeded")._replace(headers=RETRY_AFTER),
        "busy": Words(498, {"error": {"message": "The flex tier is at capacity for this model. Please try again later.",
                                      "type": "flex", "code": "capacity_exceeded"}}),
        "server": flat(500, "Internal Server Error", "internal_server_error"),
        "context": flat(400, "Please reduce the length of the messages or completion.", "invalid_request_error",
                        "context_length_exceeded", param="messages"),
        "cut": flat(400, "Failed to generate JSON. Please adjust your prompt.",
                    "invalid_request_error", "json_validate_failed", failed_generation="{"),
    },
    "llamacpp": {  # https://github.com/ggml-org/llama.cpp/pull/15780, its issue 19774, and tools/server/README.md
        "key": flat(401, "Invalid API Key", "authentication_error", 401),
        "path": flat(404, "File Not Found", "not_found_error", 404),
        "rate": flat(503, "no slot available", "unavailable_error", 503),
        "server": flat(500, "decode: failed to decode the batch", "server_error", 500),
        "busy": flat(503, "Loading model", "unavailable_error", 503),
        "context": flat(500, "Context size has been exceeded.", "server_error", 500),
    },
}  # fmt: skip
# The kind of an error of the server's own, by its code, else by its status.
KINDS: Mapping[Any, str] = {
    "invalid_api_key": "key", "model_not_found": "model", "insufficient_quota": "credit", "rate_limit_exceeded": "rate",
    "server_is_overloaded": "busy", 404: "path", 429: "rate", 500: "server", 502: "server", 503: "busy",
}  # fmt: skip


# ---- Answers -----------------------------------------------------------------------------------------------------

Shape = Callable[[dict[str, Any], Ask], None]
SAFE = {name: {"filtered": False, "severity": "safe"} for name in ("hate", "self_harm", "sexual", "violence")}
THOUGHT = 16  # tokens of reasoning that Gemini counts in the total alone
TOKEN_PRICE = 1e-6  # USD, of OpenRouter's usage.cost


def drop(content: dict[str, Any], *names: str) -> None:
    for name in names:
        content.pop(name, None)


def as_openrouter(content: dict[str, Any], ask: Ask) -> None:
    """https://openrouter.ai/docs/use-cases/usage-accounting and /docs/api-reference/overview"""
    content |= {"id": f"gen-{int(time.time())}-x", "provider": "StandIn"}
    drop(content, "service_tier", "system_fingerprint")
    usage = content.get("usage")
    if usage:
        usage |= {"cost": usage["total_tokens"] * TOKEN_PRICE, "is_byok": False, "cost_details": {}}
    for choice in content.get("choices") or ():
        choice["native_finish_reason"] = choice["finish_reason"]
        if "message" in choice:
            choice["message"]["reasoning"] = None


def as_gemini(content: dict[str, Any], ask: Ask) -> None:
    """https://ai.google.dev/gemini-api/docs/openai; thoughts are in the total alone"""
    drop(content, "service_tier", "system_fingerprint")
    if "choices" in content:
        asked, made = ask.prompt_tokens, content["usage"]["completion_tokens"]
        content["usage"] = {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made + THOUGHT}


def as_lmstudio(content: dict[str, Any], ask: Ask) -> None:
    """https://lmstudio.ai/docs/app/api/endpoints/openai"""
    content |= {"stats": {}, "system_fingerprint": ask.model}
    drop(content, "service_tier")
    for choice in content.get("choices") or ():
        choice.get("message", {})["tool_calls"] = []


def as_deepseek(content: dict[str, Any], ask: Ask) -> None:
    """https://api-docs.deepseek.com/guides/kv_cache"""
    drop(content, "service_tier")
    if "choices" in content:
        asked, made = ask.prompt_tokens, content["usage"]["completion_tokens"]
        hit = asked // 2
        content["usage"] = {
            "prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made,
            "prompt_cache_hit_tokens": hit, "prompt_cache_miss_tokens": asked - hit,
        }  # fmt: skip


def as_azure(content: dict[str, Any], ask: Ask) -> None:
    """https://learn.microsoft.com/azure/ai-foundry/openai/concepts/content-filter"""
    content["model"] = f"{ask.model}-2026-01-01"  # not the deployment's name
    if "choices" in content:
        content["prompt_filter_results"] = [{"prompt_index": 0, "content_filter_results": SAFE}]
    for choice in content.get("choices") or ():
        choice["content_filter_results"] = SAFE


def as_litellm(content: dict[str, Any], ask: Ask) -> None:
    """https://docs.litellm.ai/docs/proxy/response_headers"""
    content["model"] = f"provider/{ask.model}"
    drop(content, "service_tier")


def as_groq(content: dict[str, Any], ask: Ask) -> None:
    """https://console.groq.com/docs/api-reference"""
    content |= {"service_tier": "on_demand", "x_groq": {"id": "req_stand_in"}}
    if content.get("usage"):
        content["usage"] |= {"queue_time": 0.01, "prompt_time": 0.001, "completion_time": 0.1, "total_time": 0.101}
        drop(content["usage"], "prompt_tokens_details", "completion_tokens_details")


def as_llamacpp(content: dict[str, Any], ask: Ask) -> None:
    """tools/server/README.md of ggml-org/llama.cpp"""
    drop(content, "service_tier")
    if "choices" in content:
        content["timings"] = {"cache_n": 0, "prompt_n": ask.prompt_tokens, "predicted_ms": 1.0}
        drop(content["usage"], "prompt_tokens_details", "completion_tokens_details")


# ---- Dialects ----------------------------------------------------------------------------------------------------


class Dialect:
    """One provider's dialect: `base` is the path of its API, `also` its other paths.

    `limits` says how its answers tell limits: "" not at all, "each" as OpenAI does, "whole" in whole seconds.
    `keep_alive` is after how many seconds of work blank lines begin to come, None if none do.
    """

    def __init__(self, name: str, base: str = "/v1", also: tuple[str, ...] = (), shape: Shape | None = None,
                 limits: str = "", headers: str = "", keep_alive: float | None = None) -> None:  # fmt: skip
        self.name, self.base, self.also, self.shape = name, base, also, shape
        self.limits, self.headers, self.keep_alive = limits, headers, keep_alive

    @property
    def address(self) -> str:
        """What stands behind host and port in a base URL."""
        return f"{self.base}/stand-in?api-version={AZURE_VERSION}" if self.name == "azure" else self.base

    def place(self, path: str, query: str) -> str:
        """Return OpenAI's path for this one; an unknown path if the dialect does not have it."""
        if path.startswith("/v1/stand_in/"):
            return path
        if self.name == "azure":
            deployment, slash, rest = path.removeprefix(f"{self.base}/").partition("/")
            found = path.startswith(f"{self.base}/") and deployment and rest and "api-version=" in query
            return f"/v1{slash}{rest}" if found else f"{NOWHERE}{path}"
        for base in sorted((self.base, *self.also), key=len, reverse=True):
            if path.startswith(f"{base}/"):
                return f"/v1{path.removeprefix(base)}"
        return f"{NOWHERE}{path}"

    def key_of(self, authorization: str, api_key: str) -> str:
        """Return the key that a request gives, as a bearer."""
        return f"Bearer {api_key}" if self.name == "azure" else authorization

    def fault(self, kind: str, ask: Ask) -> Reply | None:
        """Return the error that a fault stands for; None if it spoils the answer instead."""
        if self.shape:
            kind = {"500": "server", "502": "server", "429": "rate"}.get(kind, kind)
        answered = kind in ("empty", "stream") or (kind == "cut" and self.name in CUTS)
        if answered or kind not in (*KINDS.values(), *DIALECT_FAULTS):
            return None
        words = WORDS[self.name].get(kind) or WORDS["openai"].get(kind)
        return self.say(words, ask.model, "", 0.01) if words else DEFAULTS.get(kind)

    def say(self, words: Words, model: str, path: str, wait: float, limit: str = "") -> Reply:
        """Fill in an error's texts."""
        milliseconds = math.ceil(wait * 1000)
        facts = {"model": model, "path": path, "waits": f"{wait:.3g}s", "wait": str(max(1, math.ceil(wait))),
                 "limit": limit or "60", "milliseconds": str(milliseconds),
                 "reset": str(int(1000 * time.time()) + milliseconds)}  # fmt: skip
        pattern = re.compile(r"\$(model|path|waits|wait|limit|milliseconds|reset)\b")
        body = pattern.sub(lambda found: encode_json(facts[found[1]])[1:-1], encode_json(words.body))
        return Reply(words.status, body, pattern.sub(lambda found: facts[found[1]], words.headers))

    def reword(self, reply: Reply, method: str, path: str, model: str = "") -> Reply:
        """Return the server's own error in this dialect's words."""
        if not self.shape or reply.status < 400 or reply.content_type != "application/json":
            return reply
        data = json.loads(reply.body)
        detail = data.get("error", {}) if isinstance(data, dict) else {}
        if not isinstance(detail, dict) or detail.keys() != {"message", "type", "param", "code"}:
            return reply  # in its words already
        kind = KINDS.get(detail.get("code")) or KINDS.get(reply.status, "")
        words = WORDS[self.name].get(kind)
        if words is None or detail.get("message", "").startswith("Request too large"):
            return reply
        told = dict(line.split(": ", 1) for line in reply.headers.split("\r\n") if line)
        wait = float(told.get("retry-after-ms", 0)) / 1000 or float(told.get("retry-after", 0.01))
        shown = path.removeprefix(NOWHERE)
        found = re.search(r"Limit (\d+)", detail.get("message", ""))
        said = self.say(words, model, f"{method} {shown}", wait, found[1] if found else "")
        return said if kind != "rate" or told else said._replace(headers="")

    def dress(self, limits: str) -> str:
        """Return the limit headers of each reply in this dialect, made from OpenAI's."""
        if self.limits == "":
            limits = ""
        elif self.limits == "whole":
            limits = re.sub(r"(-reset-\w+: )([^\r]*)", lambda found: f"{found[1]}{whole_seconds(found[2])}", limits)
        return f"{self.headers}{limits}"

    def finish(self, content: dict[str, Any], ask: Ask, fault: str) -> None:
        """Turn OpenAI's answer into this dialect's, or into what the fault makes of it."""
        if self.shape:
            self.shape(content, ask)
        for choice in content.get("choices") or ():
            if fault == "empty":
                hollow(choice, self.name)
            elif fault == "cut":
                self.break_off(choice)

    def break_off(self, choice: dict[str, Any]) -> None:
        """Cut a choice off, as a provider does that has begun to answer."""
        name = "message" if "message" in choice else ""
        inner, key = (choice[name], "content") if name else (choice, "text")
        inner[key] = inner[key][: len(inner[key]) // 2]
        choice["finish_reason"] = CUTS[self.name]
        if self.name == "openrouter":
            choice["error"] = {"code": 502, "message": "Upstream error from StandIn: overloaded"}

    def events(self, content: dict[str, Any], ask: Ask) -> str:
        """Return an answer as a stream of events, "" if this kind of answer has none."""
        return stream_of(content, ask, self.name)


# Finish reasons of answers that broke off, if a provider sends one with HTTP 200: genkit#6259 (OpenRouter),
# https://api-docs.deepseek.com/api/create-chat-completion
CUTS = {"openrouter": "error", "deepseek": "insufficient_system_resource"}
DEFAULTS = {
    "credit": error(429, "You exceeded your current quota, please check your plan and billing details.",
                    "insufficient_quota", code="insufficient_quota"),
    "key": error(401, "Incorrect API key provided.", code="invalid_api_key"),
    "busy": error(503, "The server is overloaded. Please try again later.", "server_error",
                  code="server_is_overloaded"),
}  # fmt: skip


def hollow(choice: dict[str, Any], name: str) -> None:
    """Remove a choice's text: reasoning took all tokens (lmstudio-bug-tracker#2339), or the model said nothing."""
    if "message" not in choice:
        choice["text"] = ""
        return
    message = choice["message"]
    message["content"] = None if name == "gemini" else ""
    if name in ("lmstudio", "deepseek", "llamacpp"):
        message["reasoning_content"] = "Hm, let me think. " * 50
    if name in ("gemini", "deepseek"):
        choice["finish_reason"] = "length"


def whole_seconds(text: str) -> int:
    """Return a Go duration in whole seconds, as Azure and LiteLLM send it."""
    units = {"h": 3600, "m": 60, "s": 1, "ms": 0.001}
    return math.ceil(sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]{1,20}+)(ms|h|m|s)", text)))


DIALECTS = {dialect.name: dialect for dialect in (
    Dialect("openai", limits="each"),
    Dialect("openrouter", "/api/v1", shape=as_openrouter, keep_alive=5.0),
    Dialect("gemini", "/v1beta/openai", shape=as_gemini, headers="server: scaffolding on HTTPServer2\r\n"),
    Dialect("lmstudio", shape=as_lmstudio),
    Dialect("deepseek", "", ("/v1",), as_deepseek, keep_alive=5.0),
    Dialect("azure", "/openai/deployments", shape=as_azure, limits="whole", headers="x-ms-region: Stand-in\r\n"),
    Dialect("litellm", also=("",), shape=as_litellm, limits="whole", headers="x-litellm-version: 1.80\r\n"),
    Dialect("groq", "/openai/v1", shape=as_groq, limits="each", headers="x-groq-region: stand-in\r\n"),
    Dialect("llamacpp", also=("",), shape=as_llamacpp, headers="server: llama.cpp\r\n"),
)}  # fmt: skip
