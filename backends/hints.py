"""What the user can do about an error, in plain words: by its kind, else by its HTTP status.

An extra adds what it has to say to HINTS.
"""

from __future__ import annotations

from . import core

HINTS = {
    "401": "check the key: export OPENAI_API_KEY, or name another variable with --api-key-env",
    "403": "this key may not use this model or project; check both",
    "404": "check the model (-m) and the base URL (--base-url; most end in /v1)",
    "407": "the proxy wants a user and password: HTTPS_PROXY=http://user:password@host:port",
    "413": "the request is too large for this server; shorten the prompt",
    "429": "the server's rate limit; ask again later, or with a smaller -c",
    "larger_than_limit": "more tokens than the server takes in a minute; shorten the prompt, or the answer (-p)",
    "4xx": "the message says what is wrong with the request; mend it and run the same command",
    "5xx": "the server's own fault; ask again later",
    "account_deactivated": "the account behind this key is closed; use another key (--api-key-env)",
    "model_not_found": "check the model (-m); not every key may use every model",
    "insufficient_quota": "the account's credit or spending limit is used up; add some, or wait until there is more",
    "context_length_exceeded": "longer than the model's context; shorten the prompt or choose another model (-m)",
    "content_filter": "the provider's content policy refused it; reword the prompt",
    "redirect": "give the address that it redirects to as --base-url",
    "web_page": "the address answers with a web page, not an API (--base-url; most end in /v1; a sign-in page?)",
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
HINTS |= {"invalid_api_key": HINTS["401"], "402": HINTS["insufficient_quota"], "405": HINTS["404"]}
HINTS |= dict.fromkeys(("408", "409", "425", "no_answer"), "ask again")
HINTS["server_error"] = HINTS["5xx"]
OUR_OWN = {"too_many_files", "disk", "timeout", "missing_column", "unreadable", "budget", "unknown_price"}
OUR_OWN |= {"connection_error", "certificate", "unreachable"}


def hint(error: core.Error) -> str:
    """Return what the user can do about the error, in plain words, or ''."""
    status = str(error.status or "")
    kind = "insufficient_quota" if core.QUOTA_CODES.fullmatch(error.type) else error.type
    kind = "content_filter" if kind.startswith("content_") else kind
    kind = "" if error.status and kind in OUR_OWN else kind  # the server's word for something else
    return HINTS.get(kind) or HINTS.get(status) or HINTS.get(f"{status[:1]}xx", "")
