"""What a reply says was used, in every provider's form, as the same five counts; and the service tier that served it.

A provider that writes it otherwise is one more line in a table here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

IN, OUT, CACHED, REASONING, WRITTEN, TOTAL, READ_BESIDE, WRITTEN_BESIDE = range(8)
# Which count stands under which name. Where several names of one count are there, the highest is meant.
# OpenAI's chat and Responses APIs: https://platform.openai.com/docs/api-reference/chat/object
NAMES = {
    "prompt_tokens": IN,
    "input_tokens": IN,
    "completion_tokens": OUT,
    "output_tokens": OUT,
    "total_tokens": TOTAL,
    "prompt_cache_hit_tokens": CACHED,  # https://api-docs.deepseek.com/guides/kv_cache
    "cached_tokens": CACHED,  # https://platform.moonshot.ai/docs/api/chat
    "num_cached_tokens": CACHED,  # https://docs.mistral.ai/inference/conversations/advanced/prompt-caching
    "reasoning_tokens": REASONING,  # https://docs.perplexity.ai/api-reference
    # Anthropic's own form counts these beside the input, LiteLLM within `prompt_tokens`:
    # https://docs.anthropic.com/en/docs/build-with-claude/prompt-caching
    "cache_read_input_tokens": READ_BESIDE,
    "cache_creation_input_tokens": WRITTEN_BESIDE,
    # Gemini's own form, and Vertex's: https://ai.google.dev/api/generate-content#UsageMetadata
    "promptTokenCount": IN,
    "candidatesTokenCount": OUT,
    "totalTokenCount": TOTAL,
    "cachedContentTokenCount": CACHED,
    "thoughtsTokenCount": REASONING,
    "prompt_token_count": IN,
    "candidates_token_count": OUT,
    "total_token_count": TOTAL,
    "cached_content_token_count": CACHED,
    "thoughts_token_count": REASONING,
    # Bedrock's: https://docs.aws.amazon.com/bedrock/latest/APIReference/API_runtime_TokenUsage.html; the AI SDK's
    "inputTokens": IN,
    "outputTokens": OUT,
    "totalTokens": TOTAL,
    "cacheReadInputTokens": READ_BESIDE,
    "cacheWriteInputTokens": WRITTEN_BESIDE,
    "promptTokens": IN,
    "completionTokens": OUT,
}
GIVEN = {
    "cached_tokens": CACHED,
    "cache_write_tokens": WRITTEN,  # OpenAI from gpt-5.6 on, OpenRouter
    "cache_creation_tokens": WRITTEN,  # LiteLLM
    "cache_creation_input_tokens": WRITTEN,  # https://help.aliyun.com/zh/model-studio/context-cache
}
DETAILS = {(f"{part}_tokens_details", name): place for part in ("prompt", "input") for name, place in GIVEN.items()}
DETAILS |= {("prompt_token_details", name): place for name, place in GIVEN.items()}
COHERE = "tokens", "billed_units"
DETAILS |= {(part, f"{name}_tokens"): place for part in COHERE for name, place in (("input", IN), ("output", OUT))}
DETAILS |= {(f"{part}_tokens_details", "reasoning_tokens"): REASONING for part in ("completion", "output")}
MOST = 2**53  # tokens: what is more is nonsense
TICKS = 1e10  # in a USD
COSTS = "cost", "estimated_cost"
COST_NAMES = {*COSTS, "cost_in_usd_ticks"}
COST_MOST = 1e6  # USD of a call that are believed
# Names of the ordinary service tier: OpenAI's, Anthropic's (usage.service_tier) and Groq's.
STANDARD = {"", "default", "auto", "standard", "standard_only", "on_demand"}


def token_counts(usage: Mapping[str, Any]) -> list[int]:
    """Return the tokens in, out, cached, for reasoning and written to a cache; 0 where unsaid.

    Those cached and written are of those in, those for reasoning of those out. A count that contradicts the total
    gives way to it: what providers bill is the total.
    """
    asked: Any = usage.get("prompt_tokens")
    answered: Any = usage.get("completion_tokens")
    plain = len(usage) == 3 and type(asked) is int is type(answered) and asked >= 0 <= answered
    if plain and usage.get("total_tokens") == asked + answered < MOST:  # the usual case
        return [asked, answered, 0, 0, 0]
    asked, answered, cached, thought, written, total, *apart = counts_in(usage)
    if beside := sum(apart):
        within = (cached or "prompt_tokens" in usage) and beside <= asked and total < asked + answered + beside
        asked += 0 if within else beside
        cached, written = cached or apart[0], written or apart[1]
    asked = asked or max(0, total - answered)  # some embeddings servers send the total alone
    answered = max(answered, total - asked)  # xAI, Gemini: reasoning counts in the total alone
    if thought > answered:  # beside the answer, and no total
        answered += thought
    cached = min(cached, asked)
    return [asked, answered, cached, thought, min(written, asked - cached)]


def counts_in(usage: Mapping[str, Any]) -> list[int]:
    """Return the counts that a usage object names, in the order of IN, OUT, ...; 0 where unsaid."""
    found = [0] * 8
    for name, value in usage.items():
        if type(value) is dict:
            for part, count in value.items():
                if count and (place := DETAILS.get((name, part))) is not None:
                    found[place] = max(found[place], as_count(count))
        elif value and (place := NAMES.get(name)) is not None:
            found[place] = max(found[place], as_count(value))
    return found


def as_count(value: Any) -> int:
    """Return an integral number as an int; anything else, True included, as 0."""
    return int(value) if type(value) in (int, float) and 0 <= value < 2**53 else 0


def told_cost(usage: Any) -> float | None:
    """Return what a usage object says that the call has cost, in USD; None if it does not.

    OpenRouter's `cost` (with a key of one's own it is the fee alone: https://openrouter.ai/docs/use-cases/byok),
    Perplexity's `cost.total_cost`, DeepInfra's `estimated_cost` and xAI's `cost_in_usd_ticks`
    (https://docs.x.ai/developers/cost-tracking).
    """
    if type(usage) is not dict and not isinstance(usage, Mapping):
        return None
    cost = next((usage[name] for name in COSTS if usage.get(name) is not None), None)
    if cost is None and (ticks := usage.get("cost_in_usd_ticks")) and type(ticks) in (int, float):
        cost = ticks / TICKS
    if cost is None or (told := as_dollars(cost.get("total_cost") if isinstance(cost, dict) else cost)) is None:
        return None
    details = usage.get("cost_details")
    upstream = details.get("upstream_inference_cost") if usage.get("is_byok") and isinstance(details, dict) else 0
    return told + (as_dollars(upstream) or 0.0)


def as_dollars(value: Any) -> float | None:
    """Return a number that may be an amount in USD, or None."""
    return float(value) if type(value) in (int, float) and 0 <= value < COST_MOST else None


def usage_of(data: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the usage object of a reply, or None; in a stream Groq's may be under `x_groq` alone."""
    usage = data.get("usage") or data.get("usageMetadata")
    if not usage and isinstance(beside := data.get("x_groq"), dict):
        usage = beside.get("usage")
    return usage if isinstance(usage, dict) else None


def tier_of(data: Any) -> str:
    """Return the service tier that a reply names, or '' for the ordinary one or none."""
    if type(data) is not dict and not isinstance(data, Mapping):
        return ""
    usage = data.get("usage")
    tier = data.get("service_tier") or (usage.get("service_tier") if isinstance(usage, dict) else "")
    if not tier:
        return ""
    tier = tier[:40].lower() if isinstance(tier, str) else ""
    return "" if tier in STANDARD else tier
