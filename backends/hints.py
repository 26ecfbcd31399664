"""What the user can do about an error, in plain words: by what its message names, by its kind, else by its status.

An extra adds what it has to say to HINTS.
"""

from __future__ import annotations

import re

from . import core
from .meanings import QUOTA_CODES

HINTS = {
    "401": "check the key: export OPENAI_API_KEY, or name another variable with --api-key-env",
    "403": "this key may not use this model or project; check both. If only some prompts get this, it is their content",
    "404": "check the base URL (--base-url; most end in /v1), the endpoint (-e) and the model (-m)",
    "407": "the proxy wants a user and password: HTTPS_PROXY=http://user:password@host:port",
    "408": "ask again, with --retry-failed",
    "413": "the request is too large for this server; shorten the prompt",
    "429": "the server's rate limit; ask again later, or with a smaller -c",
    "498": "the service tier is full; ask again later, or in another one (-p service_tier=...)",
    "511": "the network wants a sign-in first; open any page in a browser",
    "limit_for_hours": "run the same command again then: what is answered is kept",
    "larger_than_limit": "more tokens than the server takes in a minute; shorten the prompt, or the answer (-p)",
    "4xx": "the message says what is wrong with the request; mend that and run the same command: what is changed is "
    "asked again. If it was the server that had to be mended, add --retry-failed",
    "5xx": "the server's own fault; ask again later",
    "account_deactivated": "the account behind this key is closed; use another key (--api-key-env)",
    "not_allowed": "the provider does not let this account, or this country, use it; the message says what is needed",
    "model_not_found": "check the model (-m); not every key may use every model",
    "model_loading": "the server is still loading the model; ask again when it is ready",
    "resource_unavailable": "the service tier has no room just now; ask again later, or in another one "
    "(-p service_tier=...)",
    "insufficient_quota": "the account's credit or spending limit is used up; add some, or wait until there is more",
    "context_length_exceeded": "longer than the model's context; shorten the prompt or choose another model (-m)",
    "content_filter": "the provider's content policy refused it; reword the prompt",
    "redirect": "give the address that it redirects to as --base-url",
    "web_page": "the address answers with a web page, not an API (--base-url; most end in /v1; a sign-in page?)",
    "plain_http": "the server speaks TLS; write https:// in --base-url",
    "plain_https": "the server does not speak TLS; write http:// in --base-url",
    "proxy_refused": "the proxy that HTTPS_PROXY, HTTP_PROXY or ALL_PROXY names will not connect; see whether it needs "
    "a user and password, or name the server's host in NO_PROXY",
    "unfinished": "leave out background, deferred or async, or ask the Responses API (-e responses), which is looked "
    "at until it is done",
    "broken_off": "the server broke it off; ask again, with --retry-failed",
    "cut_off": "the server broke it off; ask again, with --retry-failed",
    "batch_expired": "there was no room for it within a day; ask again",
    "too_many_files": "raise the limit of open files (ulimit -n) or give a smaller -c",
    "disk": "make room, or see who removed it",
    "missing_column": "name a column that is there (-t)",
    "connection_error": "check the network, the base URL and the proxy; then ask again",
    "certificate": "set SSL_CERT_FILE to the certificate authority's .pem file if the server is yours",
    "unreachable": "check that the server runs and that --base-url is its address",
    "timeout": "no answer within --timeout seconds; raise it, or see whether the server works",
    "unreadable": "mend these lines and run the same command",
    "malformed_reply": "the reply was not JSON; check the base URL, or ask again",
}
HINTS |= {"invalid_api_key": HINTS["401"], "402": HINTS["insufficient_quota"], "451": HINTS["content_filter"]}
HINTS |= dict.fromkeys(("405", "501", "wrong_path"), HINTS["404"])
HINTS |= dict.fromkeys(("409", "424", "425", "499", "no_answer"), HINTS["408"])
# What the message names is more than the kind: a proxy on the way, another form of login, a way to do with less.
NAMED: tuple[tuple[re.Pattern[str], set[int], str], ...] = (
    (
        re.compile(r"\(through the proxy [^ )]{1,300}+\)"), set(),
        "that may be the proxy's word: see whether it runs and lets you through (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY), "
        "or name the server's host in NO_PROXY",
    ),
    (
        re.compile(r"WWW-Authenticate: Basic"), {401},
        "the server wants a user and password: "
        'export OPENAI_CUSTOM_HEADERS="Authorization: Basic $(printf user:password | base64)"',
    ),
    (re.compile(r"^\W{,3}quota exceeded\W{,3}$", re.IGNORECASE), {403}, HINTS["insufficient_quota"]),  # Tyk
    (
        re.compile("missing authentication token", re.IGNORECASE), {403},
        "AWS says this of a path that is not there, too: check --base-url, and then the key (--api-key-env)",
    ),
    (
        re.compile(r"\b(?:credit|balance|afford|402).{,200}?\bmax[_ ](?:\w{1,20}_)?tokens", re.IGNORECASE), set(),
        "add credit, or ask for shorter answers, which need less of it: -p max_tokens=N",
    ),
)  # fmt: skip
ALIKE = (
    "every call so far got this, so it is no single prompt's: see whether the server has {} (-e, --base-url) and takes "
    "the model (-m) and what is added to each request (-p, --schema)"
)
OUR_OWN = {"too_many_files", "disk", "timeout", "missing_column", "unreadable", "budget", "unknown_price"}
OUR_OWN |= {"connection_error", "certificate", "unreachable", "proxy_refused", "plain_https"}
# Codes that say no more than the status does, and may not fit it: a 404 of type server_error
VAGUE = {"server_error": "5xx", "internal_error": "5xx", "api_error": "5xx"}


def hint(error: core.Error, asked: str = "") -> str:
    """Return what the user can do about the error, in plain words, or ''; `asked` is the path if all fail alike."""
    for words, statuses, advice in NAMED:
        if (not statuses or error.status in statuses) and words.search(error.message):
            return advice
    status = str(error.status or "")
    kind = "insufficient_quota" if QUOTA_CODES.fullmatch(error.type) else error.type
    kind = "content_filter" if kind.startswith("content_") else kind
    kind = "" if error.status and kind in OUR_OWN else kind  # the server's word for something else
    if kind in VAGUE:
        kind = "" if status[:1] == "4" or asked else VAGUE[kind]
    found = HINTS.get(kind) or HINTS.get(status) or ""
    if asked and (not found or status == "429"):
        return ALIKE.format(asked)
    if not found and status[:1] == "2":  # an error in an HTTP 200, of a kind of its own
        return HINTS["408" if error.retryable else "4xx"]
    return found or HINTS.get(f"{status[:1]}xx", "")
