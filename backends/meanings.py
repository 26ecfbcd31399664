"""Tables of the codes and words in error responses and exceptions, and what they mean; `failures.py` uses them.

Only the beginning of a server's text is searched, and each pattern takes linear time: every repetition is bounded or
possessive. A group is never possessive: Python before 3.11.5 may not find what such a group matches
(https://github.com/python/cpython/issues/100061).
"""

from __future__ import annotations

import errno
import re
from typing import Any, NamedTuple, cast

# Meanings of statuses: https://platform.openai.com/docs/guides/error-codes, and other servers' use. 501, 505 and
# 511 are as lasting as 405 and 407. 420 and 449 are old forms of 429; 421, 423, 425 and 444 pass; 424 is Bedrock's and
# TGI's for a model that broke down, 498 Groq's for a full flex tier, 499 Google's and nginx's for a cancelled call, as
# 460 is AWS's.
STOP_STATUSES = frozenset({401, 402, 403, 404, 405, 407, 501, 505, 511})
RETRY_STATUSES = frozenset({408, 409, 420, 421, 423, 424, 425, 429, 444, 449, 460, 498, 499})  # and all from 500 on
SLOW_STATUSES = frozenset({420, 429, 449, 503, 529})
OK = frozenset({200})
FAULTS = frozenset(range(500, 600))  # the server's own fault
NEVER = re.compile(r"(?!)")
SAY_NOTHING = {"error", "None", "null", "undefined"}  # codes without meaning; LiteLLM writes Python's None
QUOTA_CODES = re.compile(
    r"insufficient_quota|credit_balance_exhausted|\w*_spend_limit_exceeded|organization_usage_limit_exceeded|"
    r"billing_not_active|billing_hard_limit_reached"
)


class Forms:
    """A pattern that matches any of the lines of a text, in upper or lower case.

    It is compiled when it is first used: most runs meet no failure, and all of them together take 10 ms.
    """

    METHODS = "search", "match", "fullmatch", "finditer", "findall"

    def __init__(self, text: str) -> None:
        self.pattern = "|".join(map(str.strip, text.strip().splitlines()))

    def __getattr__(self, method: str) -> Any:
        if method not in self.METHODS:
            raise AttributeError(method)
        compiled = re.compile(self.pattern, re.IGNORECASE | re.DOTALL)
        vars(self).update({name: getattr(compiled, name) for name in self.METHODS})
        return vars(self)[method]


def forms(text: str) -> re.Pattern[str]:
    """Return the Forms of a text, which have a pattern's methods."""
    return cast("re.Pattern[str]", Forms(text))


class Meaning(NamedTuple):
    """What a code, or words in the message of some statuses mean.

    `kind` becomes the error's type, unless it is "" or the code has its own hint (`own`). A code counts with every
    status, or (not `anywhere`) with those of the words.
    """

    kind: str
    verdict: str
    codes: re.Pattern[str]
    words: re.Pattern[str]
    statuses: frozenset[int]
    own: re.Pattern[str] = NEVER
    anywhere: bool = True


# llama.cpp 503 "Loading model" (ramalama#2343), Hugging Face's "is currently loading", Bedrock, LM Studio, vLLM
LOADING = Meaning(
    "model_loading", "retry", forms("model_loading|model_not_ready|ModelNotReady(?:Exception)?"),
    forms(r"""
        \bloading (?:the )?model\b
        \bmodel\b.{,200}?\bis (?:currently |still |now )?(?:being )?(?:load|start|deploy)
        \bmodel\b.{,200}?\bnot (?:yet )?(?:ready|loaded yet)\b
        \bwarming up\b
        \bstill (?:loading|starting)\b
        \b(?:is|are) starting up\b
    """),
    OK | {409, 424, 425, 429} | FAULTS,
)  # fmt: skip
# OpenAI's flex tier, which charges nothing for it; Groq's 498: https://platform.openai.com/docs/guides/flex-processing
FLEX = Meaning(
    "", "retry", forms("resource_unavailable|capacity_exceeded"), forms("resources?[ _](?:is |are )?unavailable"),
    frozenset({429, 498, 503}), anywhere=False,
)  # fmt: skip
# Gemini's 400 API_KEY_INVALID, xAI's 400, DashScope's InvalidApiKey, MiniMax' and Baidu's 200, LiteLLM's 400 and 500
KEY = Meaning(
    "invalid_api_key", "stop",
    forms(r"""
        invalid_?api_?key|api_key_\w+|missing_api_key|expired_api_key
        invalid_?(?:authentication|iam_token|token)\w*|token_expired|invalid_credentials|InvalidAccessKeyId
        authentication_?error|auth_error|unauthenticated|unauthorized
    """),
    forms(r"""
        \bapi[ _-]?(?:key|token)\b.{,60}?\b(?:not valid|invalid|expired|incorrect|missing|not found|required|revoked)
        \b(?:invalid|incorrect|expired|missing|no|wrong|bad|unknown|revoked)(?: or \w{1,20})? api[ _-]?keys?\b
        \b(?:invalid|incorrect|expired|missing) (?:access|bearer|auth\w{,20}|security|proxy server|virtual)[ _]?token\b
        \b(?:access|bearer|security) token\b.{,60}?\b(?:invalid|expired|no longer valid)
        \b(?:invalid|incorrect|expired|missing) credentials?\b
        \b(?:authentication|authorization) (?:is |was )?(?:error|failed|required|invalid)\b
        \bauthori[sz]ation\b.{,60}?\btoken\b.{,20}?\b(?:invalid|expired)
        \bdid(?:n't| not) provide an? api key\b
        \b(?:missing|invalid|no)\b.{,20}?\bauthori[sz]ation header\b
        ^\W{,3}(?:bad credentials|invalid token)\W{,3}$
        \binvalid username or password\b
        \bnot authenticated\b
        (?:令牌|token).{,10}?(?:无效|过期|非法)|无效的(?:令牌|密钥)|身份验证失败
        ^\W{,3}unauthori[sz]ed\b
        ^\W{,3}forbidden\W{,3}$
        \berror code: 401\b
        \blogin fail
        \blitellm\.AuthenticationError\b
    """),
    OK | {400, 412, 422} | FAULTS, own=re.compile("invalid_api_key"),
)  # fmt: skip
# Anthropic's 400, DashScope's Arrearage, Moonshot's exceeded_current_quota_error, MiniMax' 1008, Fireworks' 412, xAI's
# 429, Cloudflare's and Baidu's allowance of a day, Zhipu's 1113, Volcengine's SetLimitExceeded, one-api's and Novita's
# codes, Gemini's quotaId of a day (google-gemini/gemini-cli#8437), Cohere's trial keys, LiteLLM's and Groq's budgets,
# Bedrock's and Zhipu's day, Ollama's plans. The word "quota" says nothing: Azure's rate limits have it too, and
# Gemini's have OpenAI's whole sentence.
QUOTA = Meaning(
    "insufficient_quota", "stop",
    forms(QUOTA_CODES.pattern + "|arrearage|exceeded_current_quota_error|insufficient_?(?:balance|credits?|funds)|"
          "payment_required|account_?overdue(?:error)?|budget_exceeded|insufficient_user_quota|SetLimitExceeded|"
          r"not_enough_(?:balance|credits?|funds)|AllocationQuota\.FreeTierOnly|out_of_credits|blocked_api_access|"
          r"[a-z]{1,60}PerDay[a-z-]{,60}"),
    forms(r"""
        \bcredit balance is too low\b
        \b(?:insufficient|not enough|no|out of) (?:\w{1,20} )?(?:balance|credits?|funds)\b(?! (?:was|were) )
        \bbalance is (?:insufficient|too low|not enough|negative)\b
        \bused (?:up )?all (?:of )?(?:\w{1,20} ){,2}credits\b
        \bused up your (?:\w{1,20} ){,3}allocation\b
        \bspecified (?:\w{1,20} )?api usage limits?\b
        \bexceeded your monthly included credits\b
        \blimited to \d[\d,]{,12}+ (?:api )?calls ?/ ?month\b
        \btoo many tokens per day\b
        \bExceeded(?:Token)?Budget\b
        \breached (?:its|your|the) (?:\w{1,20} )?(?:spend|spending|budget|credit) limit\b
        \breached (?:its|your|the) (?:session|daily|weekly|monthly) usage limit\b
        ^\W{,3}usage limit exceeded\W{,3}$
        \b(?:daily|total) (?:request|usage|token)s? limit (?:has been |was |is )?(?:reached|exceeded)\b
        \bover budget\. spend=
        \bexceeded your current quota, please check your plan(?!.{,1500}?\b(?:retry|metric|ai\.google))
        (?:欠费|余额不足|额度不足|额度已用尽|每日.{,10}(?:上限|限制))
        \baccount\b.{,80}?\b(?:overdue|in arrears|suspended)
        \b(?:key|credit|spend|spending|budget) limit (?:has been |was )?(?:exceeded|reached)\b
        \bbudget has been exceeded\b
    """),
    OK | {400, 402, 403, 412, 422, 429} | FAULTS, own=QUOTA_CODES,
)  # fmt: skip
# OpenAI's account_deactivated, Groq's organization_restricted, Anthropic's "This organization has been disabled."
CLOSED = Meaning(
    "account_deactivated", "stop",
    forms("(?:account|user|organization)_(?:deactivated|restricted|suspended|disabled|banned)"),
    forms(r"\b(?:organization|account|workspace) (?:has been|was|is) (?:deactivated|disabled|restricted|banned)\b"),
    OK | {400, 403},
)  # fmt: skip
# OpenAI's and Gemini's countries, OpenAI's verified organizations, Groq's terms of a model
ACCESS = Meaning(
    "not_allowed", "stop", forms("unsupported_country_region_territory|model_terms_required"),
    forms(r"""
        \buser location is not supported\b
        \bcountry, region,? or territory\b.{,20}?\bnot supported\b
        \borganization must be verified\b
        \brequires terms acceptance\b
    """),
    OK | {400, 403},
)  # fmt: skip
# llama.cpp#19774 and #15780, llama-cpp-python, TGI, vLLM, SGLang, Ollama, Gemini, Anthropic, LiteLLM, DashScope, xAI,
# LM Studio, Moonshot, SambaNova, Zhipu, Baidu, GitHub Models, Mistral, Vertex, MLC, Volcengine, Voyage, Jina, LMDeploy
CONTEXT = Meaning(
    "context_length_exceeded", "fail",
    forms(r"""
        context_length_exceeded|exceed_context_size_error|prompt_too_long|input_too_long|string_above_max_length
        tokens_limit_reached
        \w{,40}context_?(?:window|size|length|limit)_?(?:exceed\w{,40}|error|limit)
    """),
    forms(r"""
        \bcontext (?:size|length|window|limit)\b.{,80}?\bexceed
        \bexceed\w{,3}\b.{,80}?\bcontext\b
        \b(?:maximum|model's|max) context (?:length|size|window)\b
        \b(?:longer|larger|greater|more) than\b.{,80}?\bcontext\b
        \b(?:longer|larger|greater) than\b.{,40}?\bmax\w{,8} (?:model|sequence) len
        \b(?:prompt|input|message|request)s?(?: text| prompt)?(?: \([^()]{1,40}+\))? (?:is|are) too (?:long|large|big)\b
        \b(?:prompt|input) too (?:long|large)\b
        \btoo many (?:input |prompt )?tokens\b(?!,? (?:please wait|per )| processed)
        \btokens?\b.{,60}?\btoo large for (?:this |the )?model\b
        \btoken count is \d.{,40}?\bonly supports\b
        \blarger than\b.{,40}?\binput length limit\b
        \btotal tokens\b.{,60}?\bexceed
        \bmax allowed tokens per\b
        \b(?:text|input|prompt|document)s? cannot exceed \d{1,9} tokens\b
        \bmax(?:imum)? tokens of \d{1,9} exceeded\b
        \b(?:prompt|input) tokens too (?:long|many)\b
        \bcontext (?:window |the )?overflow
        \bmax(?:imum)? (?:supported )?(?:sequence|prompt|input) length is\b
        \bexceed\w{,3} (?:the |this )?model(?:'s)? token limit\b
        \bthe max input characters is \d
        \bContextWindowExceededError\b
        (?:超长|输入过长|超出.{,10}上下文|上下文.{,10}超)
        \b(?:input|prompt)s?\b.{,60}?\b(?:tokens?|length)\b.{,80}?(?:\bexceed|\bmust be <=)
        \b(?:exceed\w{,3}|greater than)\b.{,40}?\b(?:cache size|max_?seq|session_len)
        \bmust have less than \d{1,9} tokens\b
        \brange of input length\b
        \breduce the length of the (?:messages|prompt|input)
    """),
    OK | {400, 413, 422} | FAULTS,
)  # fmt: skip
# LiteLLM's proxy, OpenRouter, Groq, DeepSeek, Mistral, Together, Hugging Face, Bedrock and others have no 404 for it;
# one-api's is a 503, NVIDIA's a 410
MODEL = Meaning(
    "model_not_found", "stop",
    forms(r"""
        model_?not_?(?:found|exist|available|supported)(?:error)?|model_decommissioned|DeploymentNotFound
        (?:invalid|unknown)_?model|InvalidEndpoint\w{,20}\.\w{,20}
    """),
    forms(r"""
        \binvalid model name
        \bmodel\b.{,200}?(?:does not exist|not found|has been decommissioned|is not supported for task)
        \bmodel (?:\S{1,120} )?(?:(?:was|has been) (?:retired|removed|deprecated)|is no longer |has reached its end)
        \binvalid model identifier\b
        \bmultiple models are loaded\b
        \baccess to the model with the specified model id\b
        \binvocation of model id\b.{,200}?\bon-demand\b
        \bcould not find (?:real modelid|suitable inference handler) for\b
        ^\W{,3}\S{1,120} does not support (?:chat|generate|completions?|embeddings?)\b
        \bmodel not exist\b
        \bis not a valid model\b
        ^\W{,3}invalid model(?::| ['"`]|$)
        \bmodel identifier is invalid\b
        \bmodel has not been loaded\b
        模型不存在
        \b(?:unknown|no such) model\b
        \bno models? (?:is |are )?loaded\b
        \bmodel (?:is )?not loaded\b
    """),
    OK | {400, 404, 410, 422, 500},
)  # fmt: skip
# OpenAI's models for one endpoint alone, Hugging Face's former address
ELSEWHERE = Meaning(
    "wrong_path", "stop", NEVER,
    forms(r"""
        \b(?:only |not )supported in (?:the )?v1/\w
        \bno longer supported\b.{,20}?\bplease use https?://
    """),
    frozenset({400, 404, 410}),
)  # fmt: skip
# LM Studio without /v1, Zhipu's 200 for a path that is not there, OpenAI's "Unrecognized request URL"
PATH = Meaning(
    "wrong_path", "stop", NEVER,
    forms(r"""
        \bunexpected endpoint\b
        \bunrecogni[sz]ed request url\b
        \binvalid url \((?:post|get)\b
        \b(?:unknown|no such) (?:path|endpoint|route)\b
        \b(?:path|endpoint|route) (?:was )?not found\b
        \bcannot (?:post|get) /
        \b404\b.{,3}?\bnot.found\b
        ^\W{,3}not found\W{,3}$
        \bmethod not allowed\b
    """),
    OK,
)  # fmt: skip
# nginx (its own 497 too), Go, Apache
PLAIN_HTTP = Meaning(
    "plain_http", "stop", NEVER,
    forms(r"""
        \bplain http request\b.{,40}?\bhttps\b
        \bhttp request to an https\b
        \bspeaking plain http\b
    """),
    frozenset({400, 403, 426, 497}),
)  # fmt: skip
# OpenRouter's 403, which may give its reasons; DashScope, Azure, Gemini, xAI's 403, DeepSeek, Volcengine, Zhipu's 1301,
# MiniMax' 1026; guardrails of Cloudflare (2016 and 2017), Portkey and WSO2 (446), LiteLLM, Kong, Databricks, Bedrock
# and Google's Model Armor: of this prompt alone
CONTENT = Meaning(
    "content_filter", "fail",
    forms(r"""
        content_(?!length)\w+|data_?inspection_?failed|ContentPolicyViolationError|ResponsibleAIPolicyViolation
        moderation_blocked|censorship_\w+|hooks_failed|\w{,40}policy_violation|prohibited_content|\w{,40}sensitive_?content\w{,40}
    """),
    forms(r"""
        \b(?:input|prompt|request|message|content|text|image)s?\b.{,60}?\bflagged\b
        \brequires moderation\b
        \bblocked\b.{,60}?\b(?:security configurations|guardrail|moderation|safety)
        \bprompt (?:pattern )?(?:was |is )blocked\b
        \bguardrails?\b.{,80}?\b(?:blocked|violat\w{2,5}|intervened)\b
        \bguardrail_intervened\b|\bviolat\w{2,5} (?:the )?guardrail
        \bguardrail checks\b.{,40}?\bfailed\b
        \bmodel armor\b
        \bconsidered high risk\b
        \bcontent (?:management |usage |safety )?(?:policy|policies|filter)
        \bsafety (?:system|filter|polic)
        \b(?:prohibited|inappropriate|sensitive) (?:content|words?|information)\b
        \bviolat\w{,5}\b.{,40}?\b(?:usage|content|safety) (?:guideline|polic)
        \bcontent exists risk\b
        \bContentPolicyViolationError\b
        \bnew_sensitive\b
        (?:敏感|违规|不安全|安全审核)
    """),
    OK | {400, 403, 424, 446, 451} | FAULTS, own=re.compile(r"content_\w+"),
)  # fmt: skip
# llama.cpp's 500 for a template, a grammar or a picture; others' for a request that is not right
REQUEST = Meaning(
    "", "fail",
    forms(r"""
        invalid_(?:request|prompt|argument|parameter|value|type|image|file|base64|schema)\w*|\w{,40}_parse_error
        bad_?request\w*|unsupported_\w+|validation_?error|unprocessable_?entity\w*|request_too_large
    """),
    forms(r"""
        \broles must alternate\b
        \bnot support(?:ed)?\b
        \brequires more (?:system |gpu )?memory\b
        \b(?:error|status)[ _]code:? 4(?:00|13|15|22)\b
        \bunsupported (?:parameter|value|content|image|file)
        \bsurrogates not allowed\b
        \bfailed to parse (?:the )?(?:grammar|messages|input|tools|json|schema)
        \bunknown (?:parameter|field|argument)\b
        \bmust be (?:a|an|one of|of type)\b
        \bvalidation errors?\b
        \bmissing (?:a )?required\b
        \brequest (?:body )?(?:is )?too large\b
    """),
    OK | FAULTS - STOP_STATUSES, anywhere=False,
)  # fmt: skip
# LiteLLM: "Limit type: max_parallel_requests. Current limit: 3"; others: "Maximum concurrent requests (limit: 5)"
AT_ONCE_WORDS = re.compile(r"\b(?:max_)?parallel|concurren|\btoo many\b", re.IGNORECASE)
AT_ONCE = re.compile(
    r"(?:parallel|concurren|simultaneous).{,80}?(?:limit|max\w{,20}|allowed)\D{,20}(\d{1,6})", re.IGNORECASE | re.DOTALL
)
# GitHub's and Google's 403, gateways' 200 and 400, Azure API Management's 403, Apigee's 500
RATE = Meaning(
    "", "retry",
    forms(r"\w{,40}rate_?limit\w*|too_?many_?requests\w*|slow_down|throttl\w*(?:\.\w+)?|resource_exhausted"),
    forms(r"""
        \brate.?(?:limit|exceeded)|\btoo many requests\b|\bthrottl(?:ed|ing)\b|\brequest limit reached\b
        \bspike arrest\b|\bquota violation\b|\bcall volume quota\b|\btoken quota (?:is |has been )?exceeded\b
        \btoo many tokens, please wait\b
    """),
    OK | {400, 403, 500}, anywhere=False,
)  # fmt: skip
# Groq's, of a text that the model has got wrong; it may do better: https://console.groq.com/docs/structured-outputs
GENERATED = Meaning(
    "", "retry", forms("json_validate_failed|tool_use_failed|output_parse_failed"), NEVER, frozenset({400}),
    anywhere=False,
)
# Codes by which a Responses object or a row of a Batch says that the fault was the server's
SERVER = Meaning(
    "", "retry", forms(r"server_error|\w{,40}timeout|batch_\w+|internal_(?:server_)?error|\w{,40}overloaded\w*"),
    NEVER, OK, anywhere=False,
)  # fmt: skip
PASSING = Meaning(
    "", "retry", NEVER,
    forms(r"""
        \btry (?:your request |this )?again (?:later|shortly|soon)
        \btry (?:your request |this )?again in (?:an? )?(?:\d|few|moment|while|minute|second|hour)
        \btry your request again\b
        \btemporar(?:y|ily) (?:unavailable|overloaded|exceeded|failure|error)
        \bservice is (?:currently |temporarily )?unavailable\b
        \b(?:is|are) (?:currently )?overloaded\b
        \bserver (?:is )?(?:too )?busy\b
        \bmodel (?:has |was )?(?:crashed|unloaded|reloaded)\b
        ^\W{,3}channel error\b
        \bupstream (?:error|timeout|timed out|connect error)
    """),
    OK | {400, 410, 412},
)  # fmt: skip
# The first that is met counts: what is said of the key, the account or the address is more than a code for everything.
MEANINGS = (
    LOADING, FLEX, KEY, QUOTA, CLOSED, ACCESS, CONTEXT, ELSEWHERE, MODEL, PATH, PLAIN_HTTP, CONTENT, REQUEST, RATE,
    GENERATED, SERVER, PASSING,
)  # fmt: skip

# ---- Replies without answers ---------------------------------------------------------------------------------

# Finish reasons, in small letters, that are the server's fault: OpenRouter's and Mistral's "error", Zhipu's
# network_error, DeepSeek's insufficient_system_resource, vLLM's and SGLang's "abort", Cohere's error_limit
BROKEN = {
    "error", "network_error", "insufficient_system_resource", "abort", "aborted", "server_error", "internal_error",
    "cancelled", "canceled", "timeout", "overloaded", "engine_error", "error_limit", "failed", "interrupted",
    "terminated", "unavailable", "rate_limit", "user_cancel", "user_cancelled", "preempted", "engine_dead",
    "userstopped", "modelunloaded",  # LM Studio's
}  # fmt: skip
# The model's own fault, which it may not make again; Gemini's
MISMADE = {"malformed_function_call", "unexpected_tool_call", "malformed_response"}
MISMADE |= {f"function_call_filter: {word}" for word in MISMADE}
# Finish reasons of an answer that is whole: OpenAI's, and what others call the same
WHOLE = frozenset(
    {None, "", "stop", "completed", "complete", "eos", "eos_token", "end_turn", "stop_sequence", "tool_calls",
     "function_call", "tool_use"}
)  # fmt: skip
# Other words for "stop": DashScope's, TGI's, llamafile's, vLLM's forks', Vertex's; with any letters, as for WHOLE
STOPPED = {
    "finish", "finished", "finish_reason_stop", "stop_token", "content_stop", "end", "done", "normal", "eog",
    "eosfound", "end_of_text", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "tool_call",
}  # fmt: skip
# Keys of an answer of another API than OpenAI's, and whose it is; the first that are all there count
FOREIGN = (
    ({"message", "done"}, "Ollama's own API, not of the one below /v1"),
    ({"response", "done"}, "Ollama's own API, not of the one below /v1"),
    ({"candidates"}, "Gemini's own API, not of the one below /v1beta/openai"),
    ({"content", "stop_reason"}, "Anthropic's own API"),
    ({"embeddings"}, "another API (Cohere's, Ollama's /api), not of the one below /v1"),
    ({"embedding"}, "another API (Ollama's /api, llama.cpp's own), not of the one below /v1"),
    ({"generated_text"}, "Hugging Face's own API, not of the one below /v1"),
    ({"result", "success"}, "Cloudflare's own API, not of the one below /ai/v1"),
    ({"content", "stop", "tokens_predicted"}, "llama.cpp's own API, not of the one below /v1"),
)
# Of an object that the server has only taken on: the Responses API's, DashScope's and others'
UNFINISHED = {"queued", "in_progress", "pending", "running", "processing", "PENDING", "RUNNING"}

# ---- Numbers in words ----------------------------------------------------------------------------------------

BEFORE = r"(?:[:=]| is| of| up to)? ?(?:about |approx\.? |approximately )?[~≈'\"(]?"
COUNT = r"(\d{1,15}+(?:[,_]\d{3}){,4}[km]?)\b"
LIMIT_TEXT = forms(rf"\blimit{BEFORE}{COUNT}.{{,300}}?\brequested(?: tokens)?{BEFORE}{COUNT}")
REQUESTED_TEXT = forms(rf"\brequested(?: tokens)?{BEFORE}{COUNT}.{{,300}}?\blimit{BEFORE}{COUNT}")
TOKENS_TEXT = forms(r"'type': 'tokens'|tokens per|\bTPM\b")
# "try again in 6m0s" (OpenAI), "Please retry after 5 seconds" (Azure), "retry in 37.7s" (Gemini), "resets in 2 hours"
WAIT_TEXT = forms(
    r"\b(?:again|retry\w{,8}|wait\w{,4}|resets?|available|refresh\w{,4}|renew\w{,4}|expires?|lifted|blocked|"
    r"cool(?:ing)? ?down|come back|"
    r"back(?:ing)?[ -]?off|time (?:left|remaining)|next (?:request|attempt))\b[^.\d]{,40}+(?=\d)"
)
ONE_TEXT = forms(r"\b(?:again|retry\w{,8}|wait\w{,4})\b[^.\d]{,30}?\b(?:an?|one) (second|minute|hour|day)\b")
CHINESE_WAIT = forms(r"(\d{1,9}+) ?(秒|分钟|小时)(?! ?的)")
SPAN = forms(
    r"(\d{1,12}+(?:,\d{3}){,3}(?:\.\d{1,12}+)?) ?"
    r"(milliseconds?|msecs?|ms|seconds?|secs?|s|minutes?|mins?|m|hours?|hrs?|h|days?|d|weeks?)(?![a-z])"
    r"(?:, and |, | and | )?"
)
DATE_TEXT = forms(
    r"\b(?:again|retry|until|resets?|available|after|at)\b[^.\d]{,40}+"
    r"(\d{4}-\d\d-\d\d[T ]\d\d:\d\d(?::\d\d(?:\.\d{1,9})?)?(?:Z|[+-]\d\d:?\d\d)?)"
)
# Zhipu's plans, by Beijing's clock: https://docs.z.ai/api-reference/api-code (1308 and others)
BEIJING_TEXT = forms(
    r"\byour limit will reset at (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)(?![\dZ+.])|(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) ?重置"
)
CLOCK_TEXT = forms(r"\b(?:again|retry|resets?|available|replenished) (?:in|after) (\d{1,2}):(\d\d):(\d\d)\b")
DURATION = re.compile(r"([\d.]{1,20}+)(ms|s|m|h)")
UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}
UNITS |= {"秒": 1.0, "分": 60.0, "小": 3600.0}
# Headers of a 429 that state when a window ends, as a span or a date; they count if the other header says 0 left
RESETS = {
    "x-ratelimit-reset": "x-ratelimit-remaining", "ratelimit-reset": "ratelimit-remaining",
    "x-rate-limit-reset": "x-rate-limit-remaining",
}  # fmt: skip
# Other headers with a wait, and in what: Azure's, Discord's and GitHub's kind, gateways'
WAIT_HEADERS = {
    "x-ms-retry-after-ms": 0.001, "x-retry-after": 1.0, "x-ratelimit-retry-after": 1.0, "x-ratelimit-reset-after": 1.0,
}  # fmt: skip
# What is left and for how long, in one header: https://datatracker.ietf.org/doc/draft-ietf-httpapi-ratelimit-headers/
# from 08 on ("default";r=0;t=7), and before (limit=10, remaining=0, reset=7)
LEFT_TEXT = forms(r"(?:;\s?r|\bremaining)=(\d{1,15}+)\b")
RESET_TEXT = forms(r"(?:;\s?t|\breset)=(\d{1,15}+)\b")
POLICY_TEXT = forms(r"(?:;\s?q=|^)(\d{1,15}+);\s?w=(\d{1,9}+)")
DATE_LEAST, DATE_MOST = 1e8, 1e20  # more seconds than three years are a date: seconds, or parts of them, since 1970
RESET_MOST = 32 * 86400.0  # seconds of a reset that is believed
# Fields of a body with the wait, and their units in seconds: of Google's RetryInfo, Hugging Face, Cloudflare and others
WAIT_KEYS = {
    "retryDelay": 1.0, "retry_after": 1.0, "retryAfter": 1.0, "retry_after_seconds": 1.0, "estimated_time": 1.0,
    "retry_after_ms": 0.001, "retryAfterMs": 0.001, "retry_after_s": 1.0, "retryAfterSeconds": 1.0, "retry_in": 1.0,
    "retry_in_seconds": 1.0, "wait_seconds": 1.0, "resets_in_seconds": 1.0, "reset_in_seconds": 1.0,
}  # fmt: skip
WHEN_KEYS = {"resets_at", "reset_at", "resetAt", "resetsAt", "retry_at"}  # the same as a date
# Where a body has its message, in this order: OpenAI's, AWS', FastAPI's, Zhipu's, Baidu's, OAuth's, Apigee's, RFC 9457
MESSAGES = (
    "message", "Message", "detail", "msg", "error_msg", "error_message", "error_description", "reason", "description",
    "faultstring", "title",
)  # fmt: skip
# MiniMax' codes as statuses: https://www.minimax.io/platform/document/error_code
MINIMAX = {1001: 408, 1002: 429, 1004: 401, 1008: 402, 1026: 400, 1027: 400, 1039: 429, 1041: 429, 2013: 400, 2049: 401}

# ---- Exceptions ----------------------------------------------------------------------------------------------

# What a call raised, by its class: a built-in one, or one of a library that is known, "package.Class" to the letter.
TIMEOUTS = {
    "builtins.TimeoutError", "httpx.TimeoutException", "httpx2.TimeoutException", "httpcore.TimeoutException",
    "openai.APITimeoutError", "anthropic.APITimeoutError", "requests.Timeout", "urllib3.TimeoutError",
    "botocore.ConnectTimeoutError", "botocore.ReadTimeoutError",
}  # fmt: skip
LOST_CONNECTIONS = {
    "builtins.ConnectionError", "asyncio.IncompleteReadError", "socket.gaierror", "ssl.SSLError", "http.HTTPException",
    "urllib.URLError", "aiohttp.ClientConnectionError", "aiohttp.ClientPayloadError", "httpx.TransportError",
    "httpx2.TransportError", "httpcore.NetworkError", "httpcore.ProtocolError", "openai.APIConnectionError",
    "anthropic.APIConnectionError", "requests.ConnectionError", "requests.ChunkedEncodingError",
    "urllib3.ProtocolError", "urllib3.NewConnectionError", "botocore.ConnectionError",
    "botocore.HTTPClientError", "google.TransportError",
    "websockets.ConnectionClosed",
}  # fmt: skip
LIBRARIES = {"aiohttp", "anthropic", "google", "httpx", "httpx2", "openai", "requests"}  # that read replies as JSON
# gRPC says UNAVAILABLE of a connection that is lost, and of a server that has too much to do
GRPC_LOST = forms(r"""
    failed to connect to all addresses
    \b(?:socket closed|GOAWAY|connection reset|dns resolution failed)\b
""")
NO_ROUTE = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN}  # plain OSErrors
# What the backends say of a proxy that does not connect: stdlib, aiohttp, httpx2
PROXY_REFUSAL = forms(r"\bCONNECT with status (4\d\d)|ClientHttpProxyError: (4\d\d)|ProxyError: (4\d\d)")
NOT_TLS = forms(r"wrong.version.number|record.layer.failure|\bhttp.request\b.{,20}?_ssl")  # https:// to plain HTTP
TLS_ALERT = forms(r"\\{1,4}x15\\{1,4}x03")  # http:// to TLS: the alert that comes instead of a status line
