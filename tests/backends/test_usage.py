"""Usage in every provider's form: the same five counts, whatever they are called."""


from concurrent_prompts import token_counts
from concurrent_prompts.backends.usage import tier_of, usage_of
from tests.helpers import in_rows


def openai(asked=1000, answered=100, cached=0, written=0, thought=0, **more):
    given = {"cached_tokens": cached, "cache_write_tokens": written}
    made = {"reasoning_tokens": thought}
    total = {"total_tokens": asked + answered}
    chat = {"prompt_tokens": asked, "completion_tokens": answered, "prompt_tokens_details": given}
    return chat | {"completion_tokens_details": made} | total | more


# The usage as the provider tells it: tokens in, out, cached, for reasoning, and written to a cache.
FORMS = {
    "OpenAI, plain": ({"prompt_tokens": 20, "completion_tokens": 200, "total_tokens": 220}, [20, 200, 0, 0, 0]),
    "OpenAI, chat": (openai(1000, 100, 400, 300, 60), [1000, 100, 400, 60, 300]),
    "OpenAI, Responses": (
        {"input_tokens": 4000, "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 3207},
         "output_tokens": 50, "output_tokens_details": {"reasoning_tokens": 40}, "total_tokens": 4050},
        [4000, 50, 0, 40, 3207],
    ),
    "xAI: reasoning beside the answer": (
        {"prompt_tokens": 32, "completion_tokens": 9, "total_tokens": 1041,
         "completion_tokens_details": {"reasoning_tokens": 1000}},
        [32, 1009, 0, 1000, 0],
    ),
    "Gemini as OpenAI: thoughts in the total alone": (
        {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 510}, [7, 503, 0, 0, 0],
    ),
    "Gemini's own form": (
        {"promptTokenCount": 700, "cachedContentTokenCount": 600, "candidatesTokenCount": 10, "thoughtsTokenCount": 90,
         "totalTokenCount": 800},
        [700, 100, 600, 90, 0],
    ),
    "Vertex's own form": (
        {"prompt_token_count": 700, "cached_content_token_count": 600, "candidates_token_count": 10},
        [700, 10, 600, 0, 0],
    ),
    "Perplexity: reasoning beside the answer, and no part of the total": (
        {"prompt_tokens": 19, "completion_tokens": 498, "total_tokens": 517, "reasoning_tokens": 9000},
        [19, 9498, 0, 9000, 0],
    ),
    "DeepSeek": (
        {"prompt_tokens": 1000, "completion_tokens": 5, "total_tokens": 1005, "prompt_cache_hit_tokens": 960,
         "prompt_cache_miss_tokens": 40},
        [1000, 5, 960, 0, 0],
    ),
    "Moonshot": ({"prompt_tokens": 19, "completion_tokens": 21, "total_tokens": 40, "cached_tokens": 10},
                 [19, 21, 10, 0, 0]),
    "Mistral": ({"prompt_tokens": 19, "completion_tokens": 2, "total_tokens": 21, "num_cached_tokens": 16},
                [19, 2, 16, 0, 0]),
    "Anthropic: the cache beside the input": (
        {"input_tokens": 10, "cache_read_input_tokens": 1000, "cache_creation_input_tokens": 200, "output_tokens": 5},
        [1210, 5, 1000, 0, 200],
    ),
    "LiteLLM: the cache within the input": (
        {"prompt_tokens": 1210, "completion_tokens": 5, "total_tokens": 1215, "cache_read_input_tokens": 1000,
         "cache_creation_input_tokens": 200, "prompt_tokens_details": {"cached_tokens": 1000}},
        [1210, 5, 1000, 0, 200],
    ),
    "a proxy that tells Anthropic's under OpenAI's names": (
        {"prompt_tokens": 10, "completion_tokens": 5, "cache_read_input_tokens": 1000}, [1010, 5, 1000, 0, 0],
    ),
    "a total says that the cache is beside": (
        {"prompt_tokens": 2000, "completion_tokens": 5, "total_tokens": 3005, "cache_read_input_tokens": 1000},
        [3000, 5, 1000, 0, 0],
    ),
    "Qwen": ({"prompt_tokens": 3019, "completion_tokens": 104, "total_tokens": 3123,
              "prompt_tokens_details": {"cached_tokens": 2048, "cache_creation_input_tokens": 900}},
             [3019, 104, 2048, 0, 900]),
    "Cohere's own form": ({"billed_units": {"input_tokens": 10, "output_tokens": 5}}, [10, 5, 0, 0, 0]),
    "Voyage: a total alone": ({"total_tokens": 10}, [10, 0, 0, 0, 0]),
    "embeddings": ({"prompt_tokens": 8, "total_tokens": 8}, [8, 0, 0, 0, 0]),
    "details are null": (openai(9, 1) | {"prompt_tokens_details": None, "completion_tokens_details": None},
                         [9, 1, 0, 0, 0]),
    "details are no object": (openai(9, 1) | {"prompt_tokens_details": [4], "completion_tokens_details": "4"},
                              [9, 1, 0, 0, 0]),
    "more cached and written than went in": (openai(9, 1, 10**9, 10**9), [9, 1, 9, 0, 0]),
    "nothing": ({}, [0, 0, 0, 0, 0]),
}  # fmt: skip


@in_rows(("usage", "counts"), FORMS.values(), ids=FORMS)
def test_each_form_is_the_same_five_counts(usage, counts):
    assert token_counts(usage) == counts


TIERS = [
    ({"service_tier": "priority"}, "priority"),
    ({"service_tier": "Flex"}, "flex"),
    ({"service_tier": "default"}, ""),
    ({"service_tier": None}, ""),
    ({"service_tier": ["flex"]}, ""),
    ({"usage": {"service_tier": "batch"}}, "batch"),  # Anthropic's place
    ({"usage": {"service_tier": "standard"}}, ""),
    ({"service_tier": "on_demand"}, ""),  # Groq's name
    ([], ""),
]


@in_rows(("reply", "tier"), TIERS)
def test_the_tier_that_served(reply, tier):
    assert tier_of(reply) == tier


def test_where_a_reply_has_its_usage():
    assert usage_of({"usage": {"a": 1}}) == usage_of({"usageMetadata": {"a": 1}}) == {"a": 1}
    assert usage_of({"usage": None, "x_groq": {"id": "r", "usage": {"a": 1}}}) == {"a": 1}
    assert usage_of({"usage": "none"}) is usage_of({}) is None
