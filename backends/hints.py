"""What the user can do about an error: looked up by what its message names, then by its type, then by its status.

An extra adds its own error types to HINTS.
"""

from __future__ import annotations

import re

from . import core
from .meanings import QUOTA_CODES

HINTS = {
    "401": "check the key: export OPENAI_API_KEY, or name another variable with --api-key-env",
    "403": "check whether the key may use this model and project. If only some prompts fail, their content was refused",
    "404": "check the base URL (--base-url; most end in /v1), the endpoint (-e) and the model (-m)",
    "407": "the proxy requires a user and password: HTTPS_PROXY=http://user:password@host:port",
    "408": "retry it with --retry-failed",
    "413": "the request is too large for this server; shorten the prompt",
    "429": "the server's rate limit; retry later, or use a smaller -c",
    "498": "the service tier is full; retry later, or use another one (-p service_tier=...)",
    "511": "the network requires a sign-in; open any page in a browser",
    "limit_for_hours": "run the same command again at that time; all answers are kept",
    "larger_than_limit": "the request has more tokens than the server takes a minute; shorten it, or the answer (-p)",
    "4xx": "the message says what is wrong with the request; correct it and run the same command: changed prompts are "
    "sent again. If the server had to be corrected, add --retry-failed",
    "5xx": "the server's own fault; retry later",
    "account_deactivated": "the account behind this key is closed; use another key (--api-key-env)",
    "not_allowed": "the provider does not serve this account or this country; the message says what is needed",
    "model_not_found": "check the model (-m); not every key may use every model",
    "model_loading": "the server is still loading the model; retry when it is ready",
    "resource_unavailable": "the service tier has no capacity now; retry later, or use another one "
    "(-p service_tier=...)",
    "insufficient_quota": "the account's credit or spending limit is used up; add credit, or wait until it is renewed",
    "context_length_exceeded": "the prompt is longer than the model's context; shorten it or choose another model (-m)",
    "content_filter": "the provider's content policy refused it; reword the prompt",
    "redirect": "use the address that it redirects to as --base-url",
    "web_page": "the address serves a web page, not an API: check --base-url (most end in /v1; is it a sign-in page?)",
    "plain_http": "the server speaks TLS; write https:// in --base-url",
    "plain_https": "the server does not speak TLS; write http:// in --base-url",
    "proxy_refused": "the proxy that HTTPS_PROXY, HTTP_PROXY or ALL_PROXY names refuses to connect; check whether it "
    "needs a user and password, or name the server's host in NO_PROXY",
    "unfinished": "leave out background, deferred or async, or use the Responses API (-e responses), which is polled "
    "until the response is complete",
    "broken_off": "the server ended the answer early; retry it with --retry-failed",
    "cut_off": "the server ended the answer early; retry it with --retry-failed",
    "batch_expired": "the server did not process it within a day; retry it with --retry-failed",
    "too_many_files": "raise the limit of open files (ulimit -n) or use a smaller -c",
    "disk": "free some space, or check what removed the file",
    "missing_column": "use columns that the input has (-t)",
    "connection_error": "check the network, the base URL and the proxy; then retry",
    "certificate": "set SSL_CERT_FILE to the certificate authority's .pem file if the server is yours",
    "unreachable": "check that the server runs and that --base-url is its address",
    "timeout": "no answer within --timeout seconds; raise it, or check whether the server works",
    "unreadable": "correct these lines and run the same command",
    "malformed_reply": "the reply was not JSON; check the base URL, or retry",
}
HINTS |= {"invalid_api_key": HINTS["401"], "402": HINTS["insufficient_quota"], "451": HINTS["content_filter"]}
HINTS |= dict.fromkeys(("405", "501", "wrong_path"), HINTS["404"])
HINTS |= dict.fromkeys(("409", "424", "425", "499", "no_answer"), HINTS["408"])
# What the message names is more specific than the kind: a proxy, another form of login, a way to need less credit.
NAMED: tuple[tuple[re.Pattern[str], set[int], str], ...] = (
    (
        re.compile(r"\(through the proxy [^ )]{1,300}+\)"), set(),
        "this may come from the proxy: check that it runs and lets you through (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY), "
        "or name the server's host in NO_PROXY",
    ),
    (
        re.compile(r"WWW-Authenticate: Basic"), {401},
        "the server requires a user and password: "
        'export OPENAI_CUSTOM_HEADERS="Authorization: Basic $(printf user:password | base64)"',
    ),
    (re.compile(r"^\W{,3}quota exceeded\W{,3}$", re.IGNORECASE), {403}, HINTS["insufficient_quota"]),  # Tyk
    (
        re.compile("missing authentication token", re.IGNORECASE), {403},
        "AWS also sends this for a wrong path: check --base-url, then the key (--api-key-env)",
    ),
    (
        re.compile(r"\b(?:credit|balance|afford|402).{,200}?\bmax[_ ](?:\w{1,20}_)?tokens", re.IGNORECASE), set(),
        "add credit, or request shorter answers, which need less of it: -p max_tokens=N",
    ),
)  # fmt: skip
ALIKE = (
    "every call so far failed like this, so no single prompt is the cause: check whether the server has {} (-e, "
    "--base-url) and accepts the model (-m) and what is added to each request (-p, --schema)"
)
OUR_OWN = {"too_many_files", "disk", "timeout", "missing_column", "unreadable", "budget", "unknown_price"}
OUR_OWN |= {"connection_error", "certificate", "unreachable", "proxy_refused", "plain_https"}
# Codes that say no more than the status, and may contradict it: a 404 of type server_error
VAGUE = {"server_error": "5xx", "internal_error": "5xx", "api_error": "5xx"}


def hint(error: core.Error, asked: str = "") -> str:
    """Return what the user can do about the error, or ''; `asked` is the request's path if all calls fail alike."""
    for words, statuses, advice in NAMED:
        if (not statuses or error.status in statuses) and words.search(error.message):
            return advice
    status = str(error.status or "")
    kind = "insufficient_quota" if QUOTA_CODES.fullmatch(error.type) else error.type
    kind = "content_filter" if kind.startswith("content_") else kind
    kind = "" if error.status and kind in OUR_OWN else kind  # the server means something else by it
    if kind in VAGUE:
        kind = "" if status[:1] == "4" or asked else VAGUE[kind]
    found = HINTS.get(kind) or HINTS.get(status) or ""
    if asked and (not found or status == "429"):
        return ALIKE.format(asked)
    if not found and status[:1] == "2":  # an error in an HTTP 200, of a kind of its own
        return HINTS["408" if error.retryable else "4xx"]
    return found or HINTS.get(f"{status[:1]}xx", "")
