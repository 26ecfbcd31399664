#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""Send a file of prompts to an OpenAI-compatible API, one by one or all at once,
and lose none.

    python concurrent_prompts.py prompts.txt                concurrently
    python concurrent_prompts.py prompts.txt --sequential   one at a time
    python concurrent_prompts.py prompts.txt --compare      both, side by side
    python concurrent_prompts.py prompts.txt --dry-run      what it would cost
    python concurrent_prompts.py --demo --compare           no key, no network

PROMPTS is a file with a prompt a line (.txt), a JSON string or object a line
(.jsonl: `prompt`, `messages` or `input`, maybe an `id`; other keys are
columns), a table with a header (.csv, .tsv), a file of OpenAI Batch API
requests, any of these gzipped, or - for standard input. Answers go to a JSON
Lines file beside it, each as soon as it is there; the same command again asks
only what is still open.

In Python, with your own coroutine function or with a backend:

    from concurrent_prompts import run, load_backend
    results = run(["Why is the sky blue?", "Why is grass green?"],
                  load_backend(model="gpt-6-luna"))
    print([result.text for result in results])

Exit status: 0 every prompt is answered, 1 some failed, 2 unusable arguments or
input, 3 stopped early (key, quota, address, disk, deadline, budget), 130
interrupted.
"""

import os
import sys

# `python -m` looks for modules in the current folder first: what lies there by chance is none of ours. Nothing else is
# imported before this, not even __future__. (`python -m concurrent_prompts.extras.plot` imports this module first.)
if (
    (__name__ == "__main__" and __spec__)
    or (sys.argv[:1] == ["-m"] and any(f"{__name__}." in word for word in sys.orig_argv))
) and not (sys.flags.safe_path or sys.path[0] == os.path.dirname(os.path.abspath(__file__))):
    del sys.path[0]

import argparse
import array
import asyncio
import base64
import bisect
import codecs
import collections
import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import gc
import gzip
import hashlib
import importlib
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import pathlib
import random
import re
import shlex
import shutil
import signal
import stat
import subprocess
import textwrap
import threading
import time
import traceback
import urllib.parse
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence, Sized
from typing import IO, Any, NamedTuple, NoReturn, TypeVar

__version__ = "0.1.0"
__all__ = [
    "Api",
    "Error",
    "Prompt",
    "PromptError",
    "Result",
    "UsageError",
    "as_completed",
    "load_backend",
    "main",
    "read_prompts",
    "run",
    "run_concurrent",
    "run_sequential",
]

MODULE = "concurrent_prompts" if __name__ == "__main__" else __name__
if "__file__" in globals():  # backends/ and extras/ are subpackages: beside this file, or where pip puts them
    _here = os.path.dirname(os.path.abspath(__file__))
    _installed = os.path.join(_here, "concurrent_prompts_files")
    __path__ = [_installed if os.path.isdir(_installed) else _here]

PROGRAM = "concurrent_prompts.py"
DEFAULT_MODEL = "gpt-6-luna"
DEFAULT_BASE_URL = "https://api.openai.com/v1"
DEFAULT_TIMEOUT = 600.0  # seconds of one attempt: what the official SDK allows; an honest long answer is not paid twice
DEFAULT_ATTEMPTS = 8
AUTO_CONCURRENCY = 1024  # the most that `auto` tries
log = logging.getLogger("concurrent_prompts")

T = TypeVar("T")


# ---- Data types ----------------------------------------------------------------------------------------------


class Error(NamedTuple):
    """Why a prompt has no answer.

    `type` is the server's own code where it gave one ("context_length_exceeded"), `status` its HTTP status, and
    `retryable` whether asking again may help.
    """

    type: str
    message: str
    status: int | None = None
    retryable: bool = False


@dataclasses.dataclass(slots=True)
class Prompt:
    """One prompt: what is asked, where it stood, and what goes back out beside its answer.

    `kind` is the key that `content` stood under ("prompt", "messages", "input", "batch", or "" where there was
    none). `path` and `body` are the request as it will be sent. `error` is set where there is nothing to send.
    """

    number: int  # place in the input (or in the shard of it), from 0
    content: Any
    id: str | int = 0
    kind: str = "prompt"
    columns: dict[str, Any] = dataclasses.field(default_factory=dict)
    where: str = ""  # "prompts.csv line 7", for messages
    named: bool = False  # the id is the input's own, not a line number
    path: str = ""
    body: bytes = b""
    error: Error | None = None
    row: Any = dataclasses.field(default=None, compare=False, repr=False)  # what the input holds, as it was read


Http = tuple[int, str, Any]  # status, request id and parsed body: what a Batch output line is made of
NO_HEADERS: Mapping[str, str] = {}
NO_TOKENS: Sequence[int] = (0, 0, 0, 0)


class Reply(NamedTuple):
    """An answer as the server gave it; `extra` is what only some endpoints have (`embedding`, `texts`)."""

    text: Any
    finish_reason: str | None = None
    model: str | None = None
    usage: dict[str, Any] | None = None
    extra: dict[str, Any] = {}  # noqa: RUF012 - never changed
    http: Http | None = None
    headers: Mapping[str, str] = NO_HEADERS


@dataclasses.dataclass(slots=True)
class Result:
    """What became of one prompt: `text`, or else `error`; an answer that does not fit the schema has both.

    The clocks are in seconds. `latency` is the last attempt's time on the wire; before it came `slot_wait` (for a
    place among the calls in flight), `limit_wait` (for the server's limits or its return), `retry_wait` (back-off)
    and `lost` (on the wire in attempts that failed), so that the five add up to the prompt's time from `started`, a
    Unix time. `tries` says when each of the failed attempts before the last one began, after `started`, and how long
    it took; `limit` is how many calls a minute the server was known to let through by then.
    """

    prompt: Prompt
    text: Any = None
    error: Error | None = None
    attempts: int = 0
    latency: float = 0.0
    started: float = 0.0
    slot_wait: float = 0.0
    limit_wait: float = 0.0
    retry_wait: float = 0.0
    lost: float = 0.0
    tries: list[tuple[float, float]] | None = None
    limit: float | None = None
    usage: dict[str, Any] | None = None
    tokens: Sequence[int] = NO_TOKENS  # in, out, cached and for reasoning, as the usage has them
    unanswered: int = 0  # calls whose replies were lost: they may have been billed
    lost_tokens: Sequence[int] = NO_TOKENS  # of the attempts that failed, where the server has told them
    finish_reason: str | None = None
    model: str | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    http: Http | None = None
    exception: Exception | None = None  # what was raised last, where `error` is set
    done: bool = True  # False: never sent, or cut off by the end of the run; it will be asked again
    losses: int = 0  # how often its call was given up as lost
    reply: Reply | None = None  # of the last call, as long as the extras are not through with it

    @property
    def id(self) -> str | int:
        """The prompt's `id` column, or else its line number; in Python its place in the list, from 1."""
        return self.prompt.id

    def take(self, reply: Reply) -> None:
        """Fill in the answer."""
        self.text, self.finish_reason, self.model, self.usage, self.extra, self.http, _ = reply
        self.tokens = token_counts(reply.usage) if reply.usage else NO_TOKENS

    def lose(self, failure: "PromptError") -> None:
        """Count the tokens of an attempt that failed: they are paid for, too."""
        self.unanswered += not failure.heard and failure.kind not in NEVER_THERE
        if failure.usage:
            pairs = zip(self.lost_tokens, token_counts(failure.usage), strict=True)
            self.lost_tokens = [before + more for before, more in pairs]

    def waited(self) -> float:
        """Return the seconds from `started` to the last attempt."""
        return self.slot_wait + self.limit_wait + self.retry_wait + self.lost

    def set_aside(self, began: float, took: float) -> None:
        """Make place for another attempt: the last one is one of those that failed."""
        self.tries = [*(self.tries or ()), (began, took)]
        self.lost, self.latency = self.lost + took, 0.0

    def as_row(self) -> dict[str, Any]:
        """This result as a line of the results file; a column whose name is taken gets the prefix `input_`."""
        row = {
            "id": self.prompt.id,
            "text": self.text,
            "error": self.error and self.error._asdict(),
            "attempts": self.attempts,
            "latency": int(1e6 * self.latency) / 1e6,  # to the microsecond; round() takes four times as long
            "started": int(1e6 * self.started) / 1e6,
            "slot_wait": int(1e6 * self.slot_wait) / 1e6,
            "limit_wait": int(1e6 * self.limit_wait) / 1e6,
            "retry_wait": int(1e6 * self.retry_wait) / 1e6,
            "lost": int(1e6 * self.lost) / 1e6,
            **self._more_clocks(),
            "usage": self.usage,
            "finish_reason": self.finish_reason,
            "model": self.model,
            **self.extra,
            "request": fingerprint(self.prompt),
        }
        return row | beside([*row, *AT_TIMES], self.prompt.columns) if self.prompt.columns else row

    def _more_clocks(self) -> dict[str, Any]:
        if self.tries is None and self.limit is None:
            return {}
        tries = [(int(1e6 * begun) / 1e6, int(1e6 * took) / 1e6) for begun, took in self.tries or ()]
        return ({"tries": tries} if tries else {}) | ({"limit": int(10 * self.limit) / 10} if self.limit else {})

    def clocks(self) -> dict[str, Any]:
        """The part of that line which says what ran when: all that a picture needs."""
        row = self.as_row()
        names = "error attempts latency started slot_wait limit_wait retry_wait lost tries limit"
        return {name: row[name] for name in names.split() if name in row}

    def as_line(self) -> bytes:
        """This result as a line of the results file: what went in as a Batch request comes out in kind."""
        return to_line(self.as_batch_row() if self.prompt.kind == "batch" else self.as_row())

    def as_batch_row(self) -> dict[str, Any]:
        """This result as a line of a Batch API output file, field for field."""
        response = self.http and dict(zip(("status_code", "request_id", "body"), self.http, strict=True))
        error = None
        if self.error and (response is None or response["status_code"] == 200):
            error = {"code": self.error.type, "message": self.error.message}
            response = response if self.text is not None else None  # what does not fit the schema was paid, too
        row_id = f"batch_req_{fingerprint(self.prompt)}"
        return {"id": row_id, "custom_id": self.id, "response": response, "error": error}


AT_TIMES = "tries", "limit"  # fields that not every line has
# The most that OpenAI takes in a file of Batch requests: https://platform.openai.com/docs/guides/batch
BATCH_LINES, BATCH_BYTES = 50_000, 200_000_000


def request_line(custom_id: str, path: str, body: bytes) -> bytes:
    """Return a line of a file of Batch requests; `path` and `body` are a prompt's, without a base URL's query."""
    head = f'{{"custom_id":{encode_json(custom_id)},"method":"POST","url":{encode_json(f"/v1{path}")},"body":'
    return head.encode("utf-8", "backslashreplace") + body + b"}\n"


class BatchFiles:
    """Tells which file of Batch requests takes the next one: each of one endpoint and model, and within the limits."""

    def __init__(self, lines: int | None = None) -> None:
        self.count = 0
        self._lines = lines or BATCH_LINES
        self._filling: dict[Any, tuple[int, int, int]] = {}  # by the kind: a file's number, lines and bytes

    def place(self, kind: Any, size: int) -> int:
        """Return the number of the file, from 1, for a request of that kind and so many bytes."""
        number, lines, total = self._filling.get(kind, (0, 0, 0))
        if not number or lines >= self._lines or total + size > BATCH_BYTES:
            self.count += 1
            number, lines, total = self.count, 0, 0
        self._filling[kind] = number, lines + 1, total + size
        return number


Ask = Callable[[Prompt], Awaitable[Reply]]
Attempt = Ask  # what the extras wrap


def token_counts(usage: Mapping[str, Any]) -> list[int]:
    """Return the tokens in, out, cached and for reasoning of a usage object, whichever endpoint's; 0 where unsaid."""
    given = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
    made = usage.get("completion_tokens_details") or usage.get("output_tokens_details")
    counts = (
        usage.get("prompt_tokens") or usage.get("input_tokens"),
        usage.get("completion_tokens") or usage.get("output_tokens"),
        given.get("cached_tokens") if isinstance(given, dict) else 0,
        made.get("reasoning_tokens") if isinstance(made, dict) else 0,
    )
    found = [count if type(count) is int and 0 <= count < 2**53 else whole(count) for count in counts]
    if found[2] > found[0]:  # what is cached is of what goes in
        found[2] = found[0]
    return found


def whole(count: Any) -> int:
    """Return what is no plain count as one: 12.0 is, True is not."""
    return int(count) if isinstance(count, float) and 0 <= count < 2**53 else 0


def beside(row: Mapping[str, Any] | Sequence[str], columns: dict[str, Any]) -> dict[str, Any]:
    """Return the columns under names that the row does not have."""
    named: dict[str, Any] = {}
    for name, value in columns.items():
        while name in row or name in named:
            name = f"input_{name}"
        named[name] = value
    return named


def fingerprint(prompt: Prompt) -> str:
    """Return what a result is recognised by in a later run: 16 hex digits of the request and of the given id.

    A line number is not part of it, so that lines may be inserted, removed and moved between runs. 8 more are of the
    row as it was read: they tell another job from the same one with another model.
    """
    asked = prompt.body or repr(prompt.content).encode("utf-8", "replace")
    by = prompt.path + repr(prompt.id) if prompt.named else prompt.path
    row = prompt.content if not prompt.columns else (prompt.content, prompt.columns)
    text = row if isinstance(row, str) else repr(row)
    digest = hashlib.blake2b(asked + by.encode("utf-8", "replace"), digest_size=8)
    return f"{digest.hexdigest()}{zlib.crc32(text.encode('utf-8', 'replace')):08x}"


# What a request says is written by json alone: a result is recognised by the very bytes, with orjson or without.
encode_json = json.JSONEncoder(ensure_ascii=False, check_circular=False, allow_nan=False, separators=(",", ":")).encode
encode_text = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
read_json = json.JSONDecoder().raw_decode


def _dump(value: Any) -> bytes:
    return encode_json(value).encode()


def _load(text: bytes | str) -> Any:
    text = text if isinstance(text, str) else text.decode()
    value, end = read_json(text)
    if end < len(text) and not text[end:].isspace():
        raise ValueError("more than one value")
    return value


dump: Callable[[Any], bytes] = _dump  # the value as JSON in UTF-8; TypeError, ValueError, RecursionError: it cannot be
load: Callable[[bytes | str], Any] = _load  # the other way; ValueError, RecursionError
with contextlib.suppress(ImportError):  # replies and results, several times as fast
    import orjson

    dump, load = orjson.dumps, orjson.loads


def to_line(row: dict[str, Any]) -> bytes:
    """Return the row as a line of JSON in UTF-8, whatever a server has put into it.

    Half a surrogate pair, which UTF-8 cannot hold, stays escaped; NaN and what is nested too deep become null.
    """
    try:
        return dump(row) + b"\n"
    except (TypeError, ValueError, RecursionError):  # of which there are more with orjson
        pass
    row = json.loads(json.dumps(shallow(row, DEEPEST)), parse_constant=lambda _: None)
    return encode_json(row).encode("utf-8", "backslashreplace") + b"\n"


def shallow(value: Any, levels: int) -> Any:
    """Return the value with null for what is nested deeper than that."""
    if isinstance(value, dict):
        return {name: shallow(one, levels - 1) for name, one in value.items()} if levels else None
    if isinstance(value, list | tuple):
        return [shallow(one, levels - 1) for one in value] if levels else None
    return value


# ---- Errors --------------------------------------------------------------------------------------------------


class UsageError(Exception):
    """Arguments, a file or an environment that cannot be used; the message says what to do. Exit status 2."""


class PromptError(Exception):
    """A call that brought no answer, and what follows from it.

    `verdict` is "fail" (this prompt cannot be answered), "retry" (asking again may help) or "stop" (every prompt
    would fail: the run ends). `wait` is the seconds that the server asked for, `slow` whether it said that it has
    too much to do, `http` the status, request id and body, where there were any.
    """

    def __init__(
        self, kind: str, message: str, verdict: str = "fail", status: int | None = None, http: Http | None = None
    ) -> None:
        super().__init__(message)
        self.error = Error(kind, message, status, verdict != "fail")
        self.verdict = verdict
        self.wait: float | None = None
        self.slow = False
        self.scope = ""  # "requests" or "tokens", where the server names the limit
        self.headers = NO_HEADERS
        self.heard = status is not None  # the server is there and speaks
        self.http = http
        self.again = b""  # the request to send next time
        self.keep: Reply | None = None  # an answer whose text stays in the row, beside the error

    def __str__(self) -> str:
        return self.error.message

    @property
    def kind(self) -> str:
        """The error's type where it is one of ours, '' where a server has spoken: it may write there what it likes."""
        return "" if self.heard else self.error.type

    @property
    def usage(self) -> dict[str, Any] | None:
        """What the server says that the call took all the same."""
        body = self.http[2] if self.http else None
        usage = body.get("usage") if isinstance(body, dict) else None
        return usage if isinstance(usage, dict) else None


MISMATCH = "schema_mismatch"


class Unfit(PromptError):
    """An answer that does not fit the schema; `again` is the request that tells the model so, where that may help."""

    def __init__(self, problem: str, reply: Reply, again: bytes = b"") -> None:
        super().__init__(MISMATCH, short(problem), "retry", 200, reply.http)
        self.verdict, self.keep, self.again = "retry" if again else "fail", reply, again


# What the statuses and codes mean: https://platform.openai.com/docs/guides/error-codes, and what other servers do.
STOP_STATUSES = frozenset({401, 402, 403, 404, 405, 407})
RETRY_STATUSES = frozenset({408, 409, 425, 429})  # and everything from 500 on
SLOW_STATUSES = frozenset({429, 503, 529})
QUOTA_CODES = re.compile(
    r"insufficient_quota|credit_balance_exhausted|\w*_spend_limit_exceeded|organization_usage_limit_exceeded|"
    r"billing_not_active|billing_hard_limit_reached"
)
STOP_CODES = re.compile(QUOTA_CODES.pattern + r"|invalid_api_key|account_deactivated|model_not_found")
FAIL_CODES = re.compile(r"context_length_exceeded|content_\w+|invalid_\w+|\w*_parse_error")
RETRY_CODES = re.compile(r"server_error|rate_limit_exceeded|slow_down|server_is_overloaded|overloaded_error|timeout")
# A server writes what it likes. Only so much of it is read, and the patterns take linear time: every repetition in them
# is bounded or possessive.
HEADER_MOST = 200  # characters of a header's value
MESSAGE_MOST = 4000  # characters of an error's message
ERROR_MOST = 64 * 1024  # bytes of a body that holds no answer; of a longer one only the beginning is read and quoted
TEXT_MOST = 8 * ERROR_MOST  # characters of what Python makes of such a body, or of an exception's text
VALUES_MOST = 8_000_000  # values in an answer: 2,048 vectors of 3,072 numbers are 6 million
LONGEST_WAIT = 1e9  # seconds
LIMIT_TEXT = re.compile(r"Limit:? (\d{1,15}+).{,300}?Requested:? (\d{1,15}+)", re.DOTALL)
MODEL_TEXT = re.compile(r"invalid model name|model\b.{,200}?(does not exist|not found)", re.IGNORECASE | re.DOTALL)
TOKENS_TEXT = re.compile(r"'type': 'tokens'|tokens per|\bTPM\b")
WAIT_TEXT = re.compile(r"try again in ((?:[\d.]{1,20}+(?:ms|h|m|s)){1,6}+)")
DURATION = re.compile(r"([\d.]{1,20}+)(ms|s|m|h)")
UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
TITLE = re.compile(r"<title>([^<]{,1000}+)</title>", re.IGNORECASE)
TAG = re.compile(r"<[^<>]{,1000}+>")

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
    "schema_mismatch": "see their text; mend the prompt or the schema, raise max_completion_tokens (-p), or ask again",
}
HINTS |= {"invalid_api_key": HINTS["401"], "402": HINTS["insufficient_quota"], "405": HINTS["404"]}
HINTS |= dict.fromkeys(("408", "409", "425", "no_answer"), "ask again")
HINTS["server_error"] = HINTS["5xx"]
OUR_OWN = {"too_many_files", "disk", "timeout", "missing_column", "unreadable", "budget", "unknown_price"}
OUR_OWN |= {"connection_error", "certificate", "unreachable"}


def hint(error: Error) -> str:
    """Return what the user can do about the error, in plain words, or ''."""
    status = str(error.status or "")
    kind = "insufficient_quota" if QUOTA_CODES.fullmatch(error.type) else error.type
    kind = "content_filter" if kind.startswith("content_") else kind
    kind = "" if error.status and kind in OUR_OWN else kind  # the server's word for something else
    return HINTS.get(kind) or HINTS.get(status) or HINTS.get(f"{status[:1]}xx", "")


def seconds(text: str) -> float | None:
    """Return the seconds in a Go duration such as '6m0s' or '599ms', or None."""
    parts = DURATION.findall(text)
    try:
        return sum(float(number) * UNITS[unit] for number, unit in parts) if parts else None
    except ValueError:
        return None


def duration(span: float) -> str:
    """Return the seconds in words: '4.2 ms', '0.31 s', '12.4 s', '3 min 20 s', '2 h 5 min'."""
    if span < 0.1:
        return f"{1000 * span:.1f} ms"
    if span < 100:
        return f"{span:.2f} s" if span < 10 else f"{span:.1f} s"
    minutes, rest = divmod(round(span), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def header(headers: Mapping[str, str], name: str) -> str:
    """Return the value of a header, at most HEADER_MOST characters of it; '' if it is missing."""
    value = headers.get(name)
    return value[:HEADER_MOST] if isinstance(value, str) else ""


def asked_wait(headers: Mapping[str, str], message: str, now: Callable[[], float] = time.time) -> float | None:
    """Return the seconds that a reply asks to wait, from its headers or else its text; None where it does not say.

    retry-after-ms comes first, then retry-after as a number or a date, as in the official SDK. More than LONGEST_WAIT
    is taken for that.
    """
    import email.utils  # slow to import, and for failures only

    candidates: list[float | None] = []
    with contextlib.suppress(TypeError, ValueError):
        candidates.append(float(header(headers, "retry-after-ms")) / 1000)
    after = header(headers, "retry-after")
    try:
        candidates.append(float(after))
    except (TypeError, ValueError):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            candidates.append(email.utils.parsedate_to_datetime(after).timestamp() - now())
    found = WAIT_TEXT.search(message)
    candidates.append(seconds(found[1]) if found else None)
    return next((min(wait, LONGEST_WAIT) for wait in candidates if wait is not None and 0 < wait < math.inf), None)


def error_of(data: Any) -> tuple[str, str]:
    """Return the code and the message of an error body, in all the shapes that are seen in the wild."""
    data = data[0] if isinstance(data, list) and data else data  # Gemini's
    if not isinstance(data, dict):
        return "", ""
    inner = data.get("error") or data
    if not isinstance(inner, dict):
        return "", str(shallow(inner, DEEPEST))[:MESSAGE_MOST]
    given = inner.get("code"), inner.get("type")
    codes = [str(code)[:HEADER_MOST] for code in given if code and isinstance(code, str | int)]
    code = next((code for code in codes if not code.isdigit()), "")
    code = next(filter(STOP_CODES.fullmatch, codes), code)
    message = inner.get("message") or inner.get("detail") or inner.get("msg") or ""
    return code, (message if isinstance(message, str) else json.dumps(shallow(message, DEEPEST)))[:MESSAGE_MOST]


def short(text: str, width: int = 300) -> str:
    """Return the text on one line, without control characters, cut to the width."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 10 * width]).split())
    return line if len(line) <= width else f"{line[: width - 2].rstrip()} …"


CONTROLS = re.compile(r"[\0-\t\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """Return the text with its control characters escaped as in JSON: no terminal obeys them; line ends stay."""
    return CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def obeys(stream: IO[str]) -> bool:
    """Tell whether the stream is a terminal that can clear a line; Emacs' and a serial one cannot."""
    return stream.isatty() and (sys.platform == "win32" or os.environ.get("TERM") not in (None, "", "dumb"))


def http_error(status: int, headers: Mapping[str, str], body: bytes | str | Any) -> PromptError:
    """Classify a reply that is no answer: this prompt has failed, retry, or stop the run.

    What is kept of the body (`http`) is None if it is longer than ERROR_MOST, and null for what is nested too deep.
    """
    if isinstance(body, bytes | str):
        data = shallow(parse_json(body[:ERROR_MOST]), DEEPEST)
    else:
        body = data = shallow(body, DEEPEST)
    code, message = error_of(data)
    code, message = short(code, 60), message or page_title(body) or f"HTTP {status}"
    if status == 400 and MODEL_TEXT.search(message):
        code = "model_not_found"  # LiteLLM's proxy, Groq and others have no 404 for it
    verdict = verdict_of(status, code, header(headers, "x-should-retry"))
    numbers = LIMIT_TEXT.search(message)
    if verdict == "retry" and numbers and int(numbers[2]) > int(numbers[1]):
        verdict, code = "fail", "larger_than_limit"
    if 300 <= status < 400:
        code, message = "redirect", f"HTTP {status}, redirected to {header(headers, 'location') or 'nowhere'}"
    http = status, header(headers, "x-request-id"), data
    error = PromptError(code or f"http_{status}", short(message), verdict, status, http)
    error.headers = headers
    if verdict == "retry":
        error.slow = status in SLOW_STATUSES
        error.scope = "tokens" if TOKENS_TEXT.search(f"{data}{message}") else "requests"
        error.wait = asked_wait(headers, message)
    return error


def verdict_of(status: int, code: str, should_retry: str) -> str:
    """Return "fail", "retry" or "stop"; the server's x-should-retry overrides the status, but not a lack of credit."""
    if STOP_CODES.fullmatch(code) or 300 <= status < 400 or (status in STOP_STATUSES and should_retry != "true"):
        return "stop"
    passing = (status in RETRY_STATUSES or status >= 500) and should_retry != "false"
    return "retry" if passing or should_retry == "true" else "fail"


def page_title(body: bytes | str | Any) -> str:
    """Return the title of a web page, or the beginning of a text, that came where JSON should be."""
    start = body[:ERROR_MOST] if isinstance(body, bytes | str) else str(body or "")
    text = start.decode("utf-8", "replace") if isinstance(start, bytes) else start
    title = TITLE.search(text)
    return short(title[1] if title else TAG.sub(" ", text[:2000]), 120)


def parse_json(body: bytes | str) -> Any:
    """Return the parsed body, or None where it is no JSON."""
    try:
        return load(body)
    except (ValueError, RecursionError):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(body)  # takes more: a byte order mark, NaN, half a surrogate pair
    return None


def parse_reply(body: bytes) -> Any:
    """Return the parsed body of a reply; None if it is no JSON, or of more values than any answer has."""
    if len(body) <= VALUES_MOST:
        return parse_json(body)
    with contextlib.suppress(ValueError, RecursionError):
        return load(body) if sum(map(body.count, (b",", b"[", b"{"))) <= VALUES_MOST else None
    return None


# What a call raised, by its class: a built-in one, or one of a library that is known, "package.Class" to the letter.
TIMEOUTS = {
    "builtins.TimeoutError", "httpx.TimeoutException", "httpx2.TimeoutException", "httpcore.TimeoutException",
    "openai.APITimeoutError", "anthropic.APITimeoutError", "requests.Timeout", "urllib3.TimeoutError",
}  # fmt: skip
LOST_CONNECTIONS = {
    "builtins.ConnectionError", "asyncio.IncompleteReadError", "socket.gaierror", "ssl.SSLError", "http.HTTPException",
    "urllib.URLError", "aiohttp.ClientConnectionError", "aiohttp.ClientPayloadError", "httpx.TransportError",
    "httpx2.TransportError", "httpcore.NetworkError", "httpcore.ProtocolError", "openai.APIConnectionError",
    "anthropic.APIConnectionError", "requests.ConnectionError", "requests.ChunkedEncodingError",
    "urllib3.ProtocolError", "urllib3.NewConnectionError",
}  # fmt: skip
NO_ROUTE = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN}  # plain OSErrors


def as_prompt_error(failure: Exception) -> PromptError:
    """Classify whatever a call raised: ours, a connection's, or that of a library that the user's own code uses.

    Raises nothing: an exception that cannot even be looked at is a failure of its prompt.
    """
    if isinstance(failure, PromptError):
        return failure
    try:
        return classified(failure, short(text_of(failure)))
    except Exception:  # one of its attributes, or its class, raises something itself
        return PromptError(short(type(failure).__name__, 60), short(text_of(failure)) or "it cannot be looked at")


def in_short(failure: BaseException) -> str:
    """Return what was raised in a line: "ValueError: a text"."""
    return f"{short(type(failure).__name__, 60)}: {short(text_of(failure))}"


def text_of(failure: BaseException) -> str:
    """Return an exception's text, '' if it has none or raises something itself when it is asked for it."""
    try:
        return str(failure)
    except Exception:
        return ""


def classified(failure: Exception, text: str) -> PromptError:
    """Return the error for an exception with that text."""
    said, text = text, text or short(type(failure).__name__, 60)
    causes = [*itertools.islice(causes_of(failure), 20)]  # they may go round in a circle
    if any("ssl.SSLCertVerificationError" in class_names(cause) for cause in causes):
        return PromptError("certificate", text, "stop")
    if any(getattr(cause, "errno", None) in (errno.EMFILE, errno.ENFILE) for cause in causes):
        return PromptError("too_many_files", text, "retry")
    reply = getattr(failure, "response", failure)  # openai.APIStatusError, httpx.HTTPStatusError
    status = getattr(reply, "status_code", None) or getattr(reply, "status", None)  # aiohttp.ClientResponseError
    if isinstance(status, int) and 100 <= status < 600:
        headers: Any = getattr(reply, "headers", None)
        return http_error(status, headers if hasattr(headers, "get") else {}, getattr(failure, "body", None) or text)
    names = class_names(failure)
    if names & TIMEOUTS:
        return PromptError("timeout", said or "no answer in time", "retry")
    if isinstance(failure, ConnectionRefusedError):
        return PromptError("unreachable", text, "retry")
    if names & LOST_CONNECTIONS or getattr(failure, "errno", None) in NO_ROUTE:
        return PromptError("connection_error", text, "retry")
    if isinstance(failure, json.JSONDecodeError):
        return PromptError("malformed_reply", text, "retry")
    return PromptError(short(type(failure).__name__, 60), text)


def causes_of(failure: BaseException | None) -> Iterator[BaseException]:
    """Yield the exception and those that it was raised from."""
    while failure is not None:
        yield failure
        failure = failure.__cause__


def class_names(failure: BaseException) -> set[str]:
    """Return the names of an exception's class and its bases, each behind its top-level package: httpx.ReadTimeout."""
    return {f"{base.__module__.partition('.')[0]}.{base.__name__}" for base in type(failure).__mro__}


# ---- Reading prompts -----------------------------------------------------------------------------------------


SEPARATORS = {".csv": ",", ".tsv": "\t"}
CONTENT_KEYS = ("prompt", "messages", "input")
STDIN = "standard input"
BROKEN = (OSError, EOFError, zlib.error)  # what reading a file raises, and a gzip file that is cut short or damaged
DEEPEST = 200  # levels of nesting that are certain to be written as well as read
LONGEST = 16 << 20  # bytes of the lines that one CSV record may cover: longer than any model's context
LINE_MOST = 64 << 20  # bytes of a line: more than an API takes, pictures and all
SKIPPED_MOST = 256 << 20  # bytes of a line without an end that are passed over before the rest of the file is given up
OVERLONG = b"\0\n"  # this very object stands for a line that is too long
TOO_LONG_LINE = f"longer than {LINE_MOST >> 20} MiB"
START = 4096  # bytes by which a file's form is known


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:40]} is not a JSON number")
    return number


decode_row = json.JSONDecoder(parse_constant=_finite, parse_float=_finite).decode


def read_prompts(path: str | os.PathLike[str], name: str = "") -> Iterator[Prompt]:
    """Yield the prompts of a file, lazily and in order; what cannot be read becomes a prompt with an `error`.

    Messages call the file by `name`, or else by its path. Raises UsageError, when the first is asked for, where the
    file as a whole cannot be used.
    """
    with open_input(path, name) as (file, form, name):
        damage: list[tuple[int, Error]] = []
        lines = sound_lines(file, name, damage)
        rows = csv_rows(lines, SEPARATORS[form], name) if form in SEPARATORS else line_rows(lines, form)
        for number, (line, row) in enumerate(itertools.chain(rows, damage)):
            yield as_prompt(row, number, line, f"{name} line {line}")


def other_than_file(path: str | os.PathLike[str], links: bool = True) -> str:
    """Return what stands at the path, in a few words, where that is no regular file; '' if it is one, or nothing.

    A link to a file is one, unless `links` is false.
    """
    try:
        mode = os.stat(path, follow_symlinks=links).st_mode
    except OSError:
        return "a link that leads nowhere" if os.path.islink(path) else ""
    if stat.S_ISREG(mode):
        return ""
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFLNK: "a link", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def open_regular(
    path: str | os.PathLike[str], form: str = "rb", buffering: int = -1, *, mode: int = 0o666, links: bool = True
) -> Any:
    """Open a regular file, as `open` does; a new one gets the mode, less the umask.

    Raises OSError where something else stands there: a pipe, which would hold up everything, a device, a directory, or
    a link that leads nowhere; without `links` any link.
    """

    def open_at_once(path: str, flags: int) -> int:
        # What has been put there just now is not waited for, nor followed; Windows knows neither.
        flags |= getattr(os, "O_NONBLOCK", 0) | (0 if links else getattr(os, "O_NOFOLLOW", 0))
        number = os.open(path, flags, mode)
        if not stat.S_ISREG(os.fstat(number).st_mode):
            os.close(number)
            raise OSError(errno.EINVAL, "it is not a regular file", path)
        return number

    if kind := other_than_file(path, links):
        raise OSError(errno.EINVAL, f"it is not a regular file but {kind}; name a file", os.fspath(path))
    return open(path, form, buffering=buffering, opener=open_at_once)


@contextlib.contextmanager
def open_input(path: str | os.PathLike[str], name: str = "") -> Iterator[tuple[IO[bytes], str, str]]:
    """Open a prompts file; yield it as bytes after any byte order mark, its form (a suffix) and its name."""
    with contextlib.ExitStack() as stack:
        name = name or str(path)
        if name == "-":
            path, name = stack.enter_context(spooled()), STDIN
        if kind := other_than_file(path):  # a pipe can be read only once, and this is not the only look at it
            advice = "pass what it holds as standard input, with - for PROMPTS"
            advice = "name a file" if kind.startswith(("a directory", "a link")) else advice
            raise UsageError(f"{name} is not a regular file but {kind}; {advice}")
        try:
            file: Any = stack.enter_context(open_regular(path))
            if file.peek(2)[:2] == b"\x1f\x8b":
                file = stack.enter_context(io.BufferedReader(Unpacked(fileobj=file)))
            start = beginning(file)
            file.seek(len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0)
        except BROKEN as failure:
            raise UsageError(f"cannot read {name}: {getattr(failure, 'strerror', None) or failure}") from None
        if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise UsageError(f"{name} is UTF-16; save it as UTF-8 (iconv -f utf-16 -t utf-8)")
        if is_binary(start):
            raise UsageError(f"{name} holds binary data or UTF-16; PROMPTS is a text, JSON Lines or CSV file in UTF-8")
        yield file, form_of(name, start.removeprefix(codecs.BOM_UTF8)), name


class Unpacked(gzip.GzipFile):
    """A gzip file that gives what it has unpacked before it raises what is wrong with the rest."""

    def readinto(self, buffer: Any) -> int:
        """Called by a BufferedReader."""
        return self.readinto1(memoryview(buffer)[:1024])  # zlib loses the step in which it meets the damage


def beginning(file: IO[bytes]) -> bytes:
    """Return the first bytes of a file. Raises what reading raises where there is not even one."""
    start: bytes = file.read1(START)  # type: ignore[attr-defined]  # of a gzip file no more than its first member
    with contextlib.suppress(*BROKEN):  # damage further on costs only what comes after it
        while len(start) < START and (more := file.read1(START - len(start))):  # type: ignore[attr-defined]
            start += more
    return start


@contextlib.contextmanager
def spooled() -> Iterator[str]:
    """Copy standard input into a file and yield its path: waiting for a writer must not hold up calls in flight."""
    if sys.stdin is None:
        raise UsageError("standard input is closed; name a file of prompts")
    if sys.stdin.buffer.isatty():
        print("type prompts, one a line; end with Ctrl-D (Windows: Ctrl-Z, Enter)", file=sys.stderr)
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "prompts")
        with open(path, "wb") as file:
            while block := sys.stdin.buffer.read1(1 << 16):  # type: ignore[union-attr]
                file.write(block)
        yield path


def is_binary(start: bytes) -> bool:
    """Tell whether this is no text: it has NULs in plenty, as UTF-16 has, or NULs and what is not UTF-8."""
    try:
        codecs.utf_8_decode(start)  # a character may be cut off at the end
    except UnicodeDecodeError:
        return b"\0" in start
    return start.count(0) * 8 > len(start)


def form_of(name: str, start: bytes) -> str:
    """Return ".csv", ".tsv", ".jsonl" or ".txt": from the name, else (standard input) from the first character."""
    suffix = pathlib.PurePath(name.lower().removesuffix(".gz")).suffix
    if suffix in SEPARATORS or suffix == ".txt":
        return suffix
    line, whole, _ = start.lstrip().partition(b"\n")
    first = line[:1]
    if suffix == ".json" and (first == b"[" or (first == b"{" and whole and parse_json(line) is None)):
        raise UsageError(f"{name} is one JSON array, or indented; put each object on a line (jq -c '.[]' {name})")
    quoted = first == b'"' and isinstance(parse_json(line), str)  # '"Why?", she asked' is text
    if first == b'"' and not whole and len(start) > START - 4:  # the line goes on; is its string still open?
        quoted = re.fullmatch(rb'"(?:[^"\\]|\\.)*+\\?', line) is not None
    return ".jsonl" if suffix in (".jsonl", ".ndjson") or first == b"{" or quoted else ".txt"


def sound_lines(file: IO[bytes], name: str, damage: list[tuple[int, Error]]) -> Iterator[bytes]:
    """Yield the lines, and OVERLONG for one of more than LINE_MOST bytes, up to where the file is damaged, if it is.

    That is added to `damage`, with the line number.
    """
    number = 0
    try:
        while line := file.readline(LINE_MOST + 1):
            number += 1
            yield OVERLONG if len(line) > LINE_MOST else line
            if len(line) > LINE_MOST:
                skip_line(file, line)
    except BROKEN as failure:
        damage.append((number + 1, Error("unreadable", f"{name} ends here: {failure}")))


def skip_line(file: IO[bytes], line: bytes) -> None:
    """Read on to the end of a line that has begun so. Raises EOFError if that is not within reach."""
    size = len(line)
    while line and not line.endswith(b"\n"):
        if size > SKIPPED_MOST:
            raise EOFError(f"the line before has no end within {SKIPPED_MOST >> 20} MiB")
        line = file.readline(START)
        size += len(line)


def line_rows(lines: Iterator[bytes], form: str) -> Iterator[tuple[int, Any]]:
    """Yield the number and the value of each line that is not blank; an Error stands for one that cannot be read."""
    decode = decode_nested if form == ".jsonl" else str
    for number, line in enumerate(lines, 1):
        try:
            if line is OVERLONG:
                raise ValueError(TOO_LONG_LINE)
            text = line.decode().rstrip("\r\n")
            if text and not text.isspace():
                yield number, decode(text.strip() if form == ".jsonl" else text)
        except UnicodeDecodeError:
            yield number, Error("unreadable", "not UTF-8")
        except json.JSONDecodeError as failure:  # its own line number would be always 1
            yield number, Error("unreadable", f"not JSON: {failure.msg} at column {failure.colno}")
        except (ValueError, RecursionError) as failure:
            what = "" if line is OVERLONG else "not JSON: "
            yield number, Error("unreadable", f"{what}{failure}")


def decode_nested(line: str) -> Any:
    """Return the value of a line of JSON. Raises ValueError also where it is nested too deep to be written again."""
    if line.count("[") + line.count("{") > DEEPEST:
        brackets = re.findall(r"[\[\]{}]", re.sub(r'"(?:[^"\\]|\\.)*+"?', "", line))
        if any(depth > DEEPEST for depth in itertools.accumulate(1 if one in "[{" else -1 for one in brackets)):
            raise ValueError(f"nested more than {DEEPEST} deep")
    return decode_row(line)


def csv_rows(lines: Iterator[bytes], separator: str, name: str) -> Iterator[tuple[int, Any]]:
    """Yield the line number and the columns, as a dict, of each record below the header."""
    records = csv_records(lines, separator)
    for line, header in itertools.islice(records, 1):
        check_header(header, separator, name, line)
    for line, record in records:
        if isinstance(record, Error):
            yield line, record
        elif len(record) != len(header):
            yield line, Error("unreadable", f"{len(record)} fields, the header has {len(header)}")
        else:
            yield line, dict(zip(header, record, strict=True))


def csv_records(lines: Iterator[bytes], separator: str) -> Iterator[tuple[int, Any]]:
    """Yield the first line's number and the fields of each record; an Error stands for one that cannot be read.

    After such a one, reading goes on at its second line: an open quote may have swallowed good ones. How a quote ends
    depends on the lines below it alone. So where one ended badly, every later one that is open before that line does
    too; none looks for its end again, and no line is read more than a few times.
    """
    import csv

    csv.field_size_limit(sys.maxsize if sys.maxsize < 2**32 else 2**31 - 1)  # a C long on Windows
    number, bad, reason = 1, 0, ""  # `bad` is the line in which a quote ended badly
    again: Iterator[bytes] = iter(())  # what a record has swallowed
    record: list[bytes] = []

    def wanted() -> Iterator[str]:
        size = 0
        for line in itertools.chain(again, lines):
            record.append(line)
            if line is OVERLONG:
                raise csv.Error(TOO_LONG_LINE)
            yield line.decode(errors="surrogateescape")
            size += sys.getsizeof(line)
            if number + len(record) <= bad:
                raise csv.Error(reason)
            if size > LONGEST:
                raise csv.Error(f"a quote is opened here and still open in line {number + len(record) - 1}")

    while True:
        record.clear()
        try:
            fields: Any = next(csv.reader(wanted(), delimiter=separator, strict=True))
            "".join(fields).encode()
        except StopIteration:
            return
        except UnicodeEncodeError:
            fields = Error("unreadable", "not UTF-8")
        except csv.Error as failure:
            last = number + len(record) - 1
            fields = Error("unreadable", csv_reason(str(failure), number, last))
            if last > number:
                bad, reason, again = last, fields.message, iter(record[1:])
                del record[1:]
        if not record[0].isspace() or len(record) > 1:
            yield number, fields
        number += len(record)


def csv_reason(failure: str, first: int, last: int) -> str:
    """Return what is wrong with the record on these lines, in other words than csv.reader's."""
    if failure.startswith("unexpected end"):
        return "a quote is opened here and never closed"
    if failure.startswith("new-line"):
        failure = "a carriage return stands alone outside quotes"
    return failure if first == last or "opened" in failure else f"a quote is opened here; in line {last}, {failure}"


def check_header(header: list[str] | Error, separator: str, name: str, line: int) -> None:
    """Raise UsageError where the columns' names cannot be told."""
    if isinstance(header, Error):
        raise UsageError(f"{name} line {line}, the header: {header.message}")
    if twice := [name for name, count in collections.Counter(header).items() if count > 1]:
        raise UsageError(f"{name} has the column {twice[0][:60]!r} twice; rename one of them")
    if len(header) == 1 and separator not in header[0] and re.search("[;\\t|]", header[0]):
        raise UsageError(f"{name} is not separated by {separator!r}; save it so (tabs: with the suffix .tsv)")


def as_prompt(row: Any, number: int, line: int, where: str) -> Prompt:
    """Return the prompt that a row holds: a text, an object, an OpenAI Batch request, or an Error."""
    prompt = Prompt(number, row, line, where=where, row=row)
    if isinstance(row, str):
        return prompt
    if not isinstance(row, dict):
        row = row if isinstance(row, Error) else Error("unreadable", "neither a text nor an object")
        prompt.error = row._replace(message=f"{where}: {row.message}")
    elif "custom_id" in row and "body" in row:
        prompt.kind, prompt.id, prompt.named = "batch", row["custom_id"], True
    else:
        prompt.kind = next((key for key in CONTENT_KEYS if key in row), "")
        own = ("id", prompt.kind) if prompt.kind else ("id",)  # a column may be called ""
        prompt.content = row[prompt.kind] if prompt.kind else None
        prompt.columns = {key: value for key, value in row.items() if key not in own}
        if row.get("id") not in (None, ""):
            prompt.id, prompt.named = row["id"], True
    if isinstance(prompt.id, bool) or not isinstance(prompt.id, str | int):
        prompt.id, prompt.named = line, False
        prompt.error = Error("unreadable", f"{where}: the id is neither a text nor a whole number")
    return prompt


def as_prompts(items: Iterable[Any]) -> Iterator[Prompt]:
    """Yield a Prompt for each text, object or Prompt of the reader's own iterable."""
    if isinstance(items, str | bytes | os.PathLike):
        raise TypeError("prompts is one text; pass a list of them, or read_prompts(path)")
    for number, item in enumerate(items):
        if isinstance(item, Prompt):
            yield dataclasses.replace(item, number=number, path="", body=b"")  # another run may ask otherwise
        else:
            yield as_prompt(item, number, number + 1, f"prompt {number + 1}")


# ---- Backend loading -----------------------------------------------------------------------------------------


ENDPOINTS = {
    "chat": "/chat/completions",
    "responses": "/responses",
    "completions": "/completions",
    "embeddings": "/embeddings",
}
BACKENDS = "openai-sdk", "raw-aiohttp", "stdlib", "openai-batch", "dask-cluster"
LIBRARIES = {"openai-sdk": "openai", "raw-aiohttp": "aiohttp", "openai-batch": "openai"}
LIBRARIES["dask-cluster"] = "distributed cryptography"  # as pip takes them


def load_backend(name: str | None = None, *, worker_backend: str | None = None, **settings: Any) -> "Api":
    """Return the API behind the backend of that name, ready to be passed as `send`; `settings` are Api's.

    Without a name it is raw-aiohttp where aiohttp is installed, else stdlib. `worker_backend` is the live backend
    that a bulk backend makes its calls with. Raises UsageError where there is no such backend, or its library is
    missing.
    """
    name = name or default_backend()
    name = name if ":" in name else name.replace("_", "-")
    connect = find_backend(name)
    if not inspect.isasyncgenfunction(connect):
        if worker_backend is not None or settings.get("cluster") is not None:
            raise UsageError(f"--worker-backend and --cluster are for -b dask-cluster, not for {name}")
        return Api(connect, name=name, **settings)
    try:
        live = find_backend(worker_backend or default_backend())
    except UsageError as problem:
        raise UsageError(f"--worker-backend: {problem}") from None
    if inspect.isasyncgenfunction(live):
        raise UsageError(f"--worker-backend {worker_backend} answers in bulk; name a live one")
    return Api(live, name=name, submit=connect, worker_backend=worker_backend, **settings)


def find_backend(name: str) -> Callable[..., Any]:
    """Return the function that the backend of that name is. Raises UsageError where there is none."""
    module, _, attribute = name.partition(":")
    try:
        if attribute:
            found: Any = functools.reduce(getattr, attribute.split("."), import_named(module))
        else:
            one = importlib.import_module(f"{MODULE}.backends.{name.replace('-', '_')}")
            found = getattr(one, "submit", None) or one.connect
    except ModuleNotFoundError as missing:
        raise UsageError(missing_backend(name, missing.name or "")) from None
    except (ImportError, AttributeError, ValueError, TypeError) as failure:
        raise UsageError(f"backend {name}: {failure}") from None
    except Exception as failure:  # somebody else's file may raise anything
        raise UsageError(f"backend {name}: {in_short(failure)}") from None
    if not callable(found):
        raise UsageError(f"backend {name} is no function; see the contract in backends/__init__.py")
    return found  # type: ignore[no-any-return]


def import_named(module: str) -> Any:
    """Import a module that the user has named. The current folder is searched too: last, and for nothing else."""
    sys.path.append("")
    try:
        return importlib.import_module(module)
    finally:
        sys.path.reverse()  # it may have been there before, and what is imported may have added more
        sys.path.remove("")
        sys.path.reverse()


def default_backend() -> str:
    """Return the name of the backend that is used where none is asked for."""
    return "raw-aiohttp" if importlib.util.find_spec("aiohttp") else "stdlib"


def missing_backend(name: str, module: str) -> str:
    """Return the sentence that says why a backend cannot be loaded and what to do."""
    if module == f"{MODULE}.backends":
        return f"backend {name} is in the folder backends/, which goes beside {PROGRAM}"
    if module.startswith(f"{MODULE}.backends."):
        return f"there is no backend {name}; choose {', '.join(BACKENDS)} or package.module:name"
    if name in LIBRARIES:
        return f"backend {name} needs {LIBRARIES[name].replace(' ', ' and ')}: pip install {LIBRARIES[name]}"
    return f"backend {name}: there is no module {module}"


STRICT_KEYWORDS = re.compile(  # of OpenAI's strict mode, https://platform.openai.com/docs/guides/structured-outputs
    r"\$(defs|ref|schema)|additionalProperties|anyOf|const|definitions|description|enum|(exclusiveM|m)(ax|in)imum|format|"
    r"items|(max|min)Items|multipleOf|pattern|properties|required|title|type"
)
STRICT_FORMATS = re.compile("date-time|time|date|duration|email|hostname|ipv4|ipv6|uuid")
STRICT_SIZE, STRICT_LEVELS = 120_000, 10  # characters; objects in one another
WHOLE = frozenset({None, "", "stop", "completed", "eos", "eos_token", "end_turn", "stop_sequence"})  # finish reasons
# A schema, as encode_json writes it, with keywords that may take longer than in proportion to the answer.
MAY_TAKE_LONG = re.compile(
    r'"(\$ref":.*"\$ref|\$(dynamic|recursive)Ref|pattern|patternProperties|unevaluated(Items|Properties)|uniqueItems)":',
    re.DOTALL,
)
CHECKER = """import importlib, itertools, json, re, sys
from collections.abc import Callable
from typing import Any
encode_json = json.JSONEncoder(separators=(",", ":")).encode"""
CORRECTION = "This does not fit the JSON schema: {}. Answer once more, with nothing but JSON that fits it."


class Schema:
    """A JSON schema: asks each endpoint for answers that fit it, and tells whether they do.

    They are checked by jsonschema; where that is not installed, only for being JSON. Nothing is fetched for a $ref.
    A schema that may take long is used in a process of its own, while the block `checking` runs.
    """

    LARGE = 10_000  # characters of an answer that is not to hold up the event loop

    def __init__(self, schema: Any, source: str = "the schema") -> None:
        if not isinstance(schema, dict):
            raise UsageError(f"{source} is no JSON object")
        for name in ("json_schema", "schema"):
            if isinstance(schema.get(name), dict) and "type" not in schema:
                raise UsageError(f"{source} holds a schema under `{name}`; give that alone")
        try:
            text = encode_json(schema).encode().decode()
            schema = json.loads(text)  # a copy
            installed = all(map(importlib.util.find_spec, ("jsonschema", "referencing")))
            self._checker = Checker(schema) if installed and MAY_TAKE_LONG.search(text) else None
            self.find = self._checker.find if self._checker else finder(schema)
            strict = schema.get("type") == "object" and "anyOf" not in schema and len(text) <= STRICT_SIZE
            strict = strict and is_strict(schema)
        except Exception as failure:  # whatever a library finds wrong with it
            where = f" at {failure.json_path}" if hasattr(failure, "json_path") else ""
            raise UsageError(f"{source} is no JSON schema{where}: {in_words(failure)}") from None
        self.told = False  # that it finds nothing but what is no JSON
        self._runs = 0
        name = re.sub("[^A-Za-z0-9_-]+", "_", str(schema.get("title", ""))).strip("_")[:64]
        self._form = {"name": name or "answer", "schema": schema, "strict": strict}

    @classmethod
    def read(cls, path: str) -> "Schema":
        """Return the schema in a file. Raises UsageError where there is none."""
        data = b""
        try:
            with open_regular(path) as file:
                data = file.read(LONGEST + 1)
            if len(data) > LONGEST:
                raise UsageError(f"{path} is larger than {LONGEST >> 20} MiB; name a file with a JSON schema")
            return cls(decode_nested(data.decode("utf-8-sig")), path)
        except OSError as failure:
            raise UsageError(f"cannot read {path}: {failure.strerror or failure}") from None
        except UnicodeDecodeError as failure:
            line = data.count(b"\n", 0, failure.start) + 1
            raise UsageError(f"{path} line {line}: not UTF-8; save it as UTF-8") from None
        except json.JSONDecodeError as failure:
            raise UsageError(f"{path} line {failure.lineno} column {failure.colno}: not JSON: {failure.msg}") from None
        except (ValueError, RecursionError) as failure:
            raise UsageError(f"{path}: not JSON: {failure}") from None

    def check_options(self, endpoint: str, params: Mapping[str, Any]) -> None:
        """Raise UsageError where an Api's other options leave no place for the schema."""
        if endpoint == "embeddings":
            raise UsageError("embeddings takes no schema (--schema)")
        text = params.get("text", {})
        if "response_format" in params or not isinstance(text, dict) or "format" in text:
            name = "response_format" if "response_format" in params else "text"
            raise UsageError(f"--schema and -p {name} both say what answers look like; leave out one of them")

    def asked(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Return a request's body with the schema in its endpoint's form. Raises ValueError where that is unknown."""
        place = path.partition("?")[0]
        if place == ENDPOINTS["responses"]:
            return body | {"text": {**(body.get("text") or {}), "format": {"type": "json_schema", **self._form}}}
        if place in (ENDPOINTS["chat"], ENDPOINTS["completions"]):  # the latter is vLLM's: OpenAI's has no such thing
            return body | {"response_format": {"type": "json_schema", "json_schema": self._form}}
        raise ValueError(f"how {path} takes a schema (--schema) is not known")

    def wrap(self, attempt: Attempt) -> Attempt:
        """Check each answer; one that does not fit is asked for once more, with what is wrong with it."""

        async def checked(prompt: Prompt) -> Reply:
            reply = await attempt(prompt)
            if unfit := await self.judge(prompt, reply):
                raise unfit
            return reply

        return checked

    @contextlib.asynccontextmanager
    async def session(self, run: "Run") -> AsyncIterator[None]:
        """Let answers be checked while a run goes on."""
        with self.checking():
            yield

    @contextlib.contextmanager
    def checking(self) -> Iterator[None]:
        """Let answers be checked while the block runs; end with it the process that this takes, if it does."""
        self._runs += 1
        try:
            yield
        finally:
            self._runs -= 1
            if self._checker and not self._runs:
                self._checker.close()

    async def judge(self, prompt: Prompt, reply: Reply) -> Unfit | None:
        """Return what is wrong with an answer that does not fit, or None."""
        texts = reply.extra.get("texts") or [reply.text]
        thread = self._checker.thread if self._checker else None  # None: one of the event loop's
        try:
            large = thread or sum(map(len, texts)) > self.LARGE
            looking = asyncio.get_running_loop().run_in_executor(thread, self._look, texts) if large else None
            text, problem = await looking if looking else self._look(texts)
            if problem and (early := ended_early(reply)):
                return Unfit(f"ended by {early}: {problem}", reply)
            return Unfit(problem, reply, corrected(prompt, text, problem)) if problem else None
        except Exception as failure:  # the schema refers to itself without end, the answer is nested too deep, ...
            return Unfit(f"cannot be checked against the schema: {in_words(failure)}", reply)

    def _look(self, texts: list[str]) -> tuple[str, str]:
        """Return the first of the texts that does not fit and what is wrong with it."""
        for number, text in enumerate(texts, 1):
            if problem := self._problem(text):
                return text, f"answer {number} of {len(texts)}: {problem}" if len(texts) > 1 else problem
        return "", ""

    def _problem(self, text: str) -> str:
        if len(text) > LONGEST:
            return f"not JSON: longer than {LONGEST >> 20} MiB"
        if not text.strip() or text.lstrip().startswith("```"):
            return "not JSON: it " + ("stands in ``` fences" if text.strip() else "is empty")
        try:
            value = decode_nested(text)
        except (ValueError, RecursionError) as failure:
            return f"not JSON: {failure}"
        return self.find(value) if self.find else ""


def finder(schema: dict[str, Any]) -> Callable[[Any], str] | None:
    """Return what finds the fault in a value; None without jsonschema. Raises what is wrong with the schema."""
    try:
        validators: Any = importlib.import_module("jsonschema.validators")
        best_match: Any = importlib.import_module("jsonschema.exceptions").best_match
        nothing: Any = importlib.import_module("referencing").Registry()  # the default one would fetch from the network
    except ImportError:
        return None
    kind = validators.validator_for(schema, validators.Draft202012Validator)
    kind.check_schema(schema)
    validator = kind(schema, registry=nothing)
    text = encode_json(schema)
    if text.count('"$id":"') < 2:  # or else a $ref may start from somewhere in between
        for ref in sorted(set(re.findall(r'"\$ref":("(?:[^"\\]|\\.)*+")', text))):
            validator.evolve(schema={"$ref": json.loads(ref)}).is_valid(None)

    def find(value: Any) -> str:
        error = best_match(itertools.islice(validator.iter_errors(value), 100))
        return f"{error.json_path}: {in_words(error)}" if error else ""

    return find


def in_words(failure: Any) -> str:
    """Return an exception's message, in which jsonschema has written out all of the value, however large."""
    message = str(getattr(failure, "message", failure)) or type(failure).__name__
    value = repr(getattr(failure, "instance", ""))
    return short(short(value, 60) + message.removeprefix(value) if message.startswith(value) else message)


def check_lines() -> None:
    """Read a path for imports and a schema, then a value a line; write what is wrong with each, or what is raised."""
    sys.path[:], schema = json.loads(sys.stdin.readline())
    find: Any = None
    for line in itertools.chain([""], sys.stdin):
        try:
            find = find or finder(schema)
            found = [find(json.loads(line)) if line else "", None, None]
        except Exception as failure:
            found = ["", in_words(failure), getattr(failure, "json_path", None)]
        print(json.dumps(found), flush=True)


class Checker:
    """Finds the fault in a value in a process of its own, which may take SECONDS for each.

    While Python matches a regular expression no other thread of the process runs and no signal is heard, and some
    need more than a lifetime for a short text. So do `uniqueItems`, and a $ref that is followed twice each time, for an
    answer that is made for it; a thread at that could not be ended. The process has no secrets in its environment. It
    is started when it is needed, by one thread at a time, and again after it had to be killed.
    """

    SECONDS = 5.0
    START = 20.0  # seconds to import jsonschema and to load the schema
    ENVIRONMENT = "PATH", "SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME"

    def __init__(self, schema: dict[str, Any]) -> None:
        self._schema = schema
        self._process: subprocess.Popen[bytes] | None = None
        self.thread = concurrent.futures.ThreadPoolExecutor(1)
        self._start()
        self.close()

    def find(self, value: Any) -> str:
        """Return what is wrong with the value, or ''. Raises TimeoutError, or ValueError if it cannot be checked."""
        return self._ask(value, self.SECONDS, self._process or self._start())

    def _start(self) -> subprocess.Popen[bytes]:
        functions: tuple[Callable[..., Any], ...] = short, in_words, finder, check_lines
        code = "\n".join([CHECKER, *map(inspect.getsource, functions), "check_lines()"])
        environment = {name: os.environ[name] for name in self.ENVIRONMENT if name in os.environ}
        options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        options |= {"start_new_session": True, "creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
        self._process = subprocess.Popen([sys.executable, "-P", "-c", code], env=environment, **options)
        try:
            self._ask([list(filter(os.path.isabs, sys.path)), self._schema], self.START, self._process)
        except ValueError:
            self.close()
            raise
        return self._process

    def _ask(self, value: Any, seconds: float, process: subprocess.Popen[bytes]) -> str:
        assert process.stdin and process.stdout
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(seconds, end)
        timer.start()
        line = b""
        with contextlib.suppress(OSError, ValueError):  # it is dead, or closed
            process.stdin.write(json.dumps(value).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        timer.cancel()
        if not line:
            self.close()
            if late.is_set():
                raise TimeoutError(f"checking it takes more than {seconds:g} s")
            raise ValueError("the process that checks it has ended")
        found, failure, path = json.loads(line)
        if failure is None:
            return str(found)
        problem = ValueError(failure)
        if path is not None:
            problem.json_path = path  # type: ignore[attr-defined]
        raise problem

    def close(self) -> None:
        """End the process, and with it the check that is under way."""
        process, self._process = self._process, None
        if process:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError, AttributeError):
                    pipe.close()  # type: ignore[union-attr]


def is_strict(schema: Any, levels: int = STRICT_LEVELS) -> bool:
    """Tell whether OpenAI's strict mode takes a schema: of few keywords, and with no property that may be absent."""
    if not isinstance(schema, dict) or not all(map(STRICT_KEYWORDS.fullmatch, schema)):
        return False
    if "$ref" in schema:
        return len(schema) == 1
    kind, properties = schema.get("type"), schema.get("properties", {})
    kinds = kind if isinstance(kind, list) else [kind]
    closed = schema.get("additionalProperties") is False and {*schema.get("required", ())} == {*properties}
    if ("object" in kinds and not (closed and levels)) or ("array" in kinds and "items" not in schema):
        return False
    typed = schema.keys() & {"type", "anyOf", "enum", "const"}
    if not typed or not STRICT_FORMATS.fullmatch(schema.get("format", "date")):
        return False
    below = [*properties.values(), *schema.get("anyOf", ()), *([schema["items"]] if "items" in schema else ())]
    below += [*schema.get("$defs", {}).values(), *schema.get("definitions", {}).values()]
    return all(is_strict(one, levels - ("object" in kinds)) for one in below)


def ended_early(reply: Reply) -> str:
    """Return what ended an answer, where that is not its end: a limit, a filter, a refusal, a call; else ''."""
    data = reply.http[2] if reply.http else {}
    choices, output = data.get("choices") or [], data.get("output") or []
    parts = [part for item in output if item.get("type") == "message" for part in item["content"]]
    if any(part.get("refusal") for part in [*parts, *(choice.get("message") or {} for choice in choices)]):
        return "refusal"
    reasons = [choice.get("finish_reason") for choice in choices] or [reply.finish_reason]
    reasons += [output[-1].get("type")] if output and not parts else []
    return next((str(reason) for reason in reasons if reason not in WHOLE), "")


def corrected(prompt: Prompt, text: str, problem: str) -> bytes:
    """Return the request with the answer and what is wrong with it appended, where the endpoint has turns."""
    body = json.loads(prompt.body)
    key = next((key for key in ("messages", "input") if key in body), "")
    if not key or not text:
        return prompt.body
    turns = [{"role": "user", "content": body[key]}] if isinstance(body[key], str) else body[key]
    more = {"role": "assistant", "content": text}, {"role": "user", "content": CORRECTION.format(problem)}
    return encode_json(body | {key: [*turns, *more]}).encode("utf-8", "replace")


class Api:
    """An OpenAI-compatible API: builds the requests, posts them through a backend and reads the replies.

    `model`, `system`, `template`, `params` and `endpoint` are as on the command line; a Batch request line keeps its
    own unless `model` or `params` are given. `schema` is a JSON schema, as a dict: answers that do not fit it fail,
    after one more try. One Api may serve any number of runs.
    The key is read from the environment variable `api_key_env` and is in no message and no repr. Over plain http it
    goes to this machine, with a warning to a private network, and elsewhere only with `allow_http`; a proxy counts too.
    A `dry` one only makes requests, and needs no key. `submit` is a bulk backend, which is told the `cluster` and the
    `worker_backend` that are asked for; `connect` is then for what is looked up beside it.
    """

    PATIENCE = 10.0  # seconds in which a server that is there says something

    def __init__(
        self,
        connect: Callable[..., Any],
        *,
        name: str = "",
        model: str | None = None,
        system: str | None = None,
        template: str | None = None,
        params: Mapping[str, Any] | None = None,
        endpoint: str = "chat",
        base_url: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        allow_http: bool = False,
        schema: dict[str, Any] | Schema | None = None,
        dry: bool = False,
        submit: Callable[..., Any] | None = None,
        cluster: str | None = None,
        worker_backend: str | None = None,
    ) -> None:
        if endpoint not in ENDPOINTS:
            raise UsageError(f"there is no endpoint {endpoint}; choose {', '.join(ENDPOINTS)}")
        if system is not None and endpoint in ("completions", "embeddings"):
            raise UsageError(f"{endpoint} takes no system text (-s)")
        self.name = name
        environment = os.environ.get("OPENAI_BASE_URL") or os.environ.get("OPENAI_API_BASE")
        self.base_url, query = split_url(base_url or environment or DEFAULT_BASE_URL)
        self.query, self._login = split_query(query)
        self.model = model
        self.system = system
        self.template = template
        self.params = dict(params or {})
        self.endpoint = endpoint
        self.schema = schema if schema is None or isinstance(schema, Schema) else Schema(schema)
        self.extras = (self.schema,) if self.schema else ()
        if self.schema:
            self.schema.check_options(endpoint, self.params)
        self._connect = connect
        self.submit, self.worker_backend, self.allow_http = submit, worker_backend, allow_http
        self.cluster = None if cluster is None else str(cluster)
        self.price_share = getattr(submit, "price_share", 1.0)  # of the table's prices
        wanted = self.base_url == DEFAULT_BASE_URL or api_key_env not in ("", "OPENAI_API_KEY")
        self.key_variable = api_key_env
        self._key = environment_key(api_key_env, wanted and not dry and self.price_share > 0)
        self.headers = request_headers(self.base_url, self._key)
        self.secrets = secrets_of(self.headers, self._login)
        self.conceal = concealer(self._key, self.secrets.values())
        self._exposure = ""
        self._check_network()

    def __repr__(self) -> str:
        return f"<Api {self.name} {self.model or DEFAULT_MODEL} at {self.base_url}>"

    def state(self) -> dict[str, Any]:
        """Return plain values, the key among them, of which `of` makes the like in another process."""
        left = ("_connect", "submit", "conceal", "extras")
        own = {name: value for name, value in vars(self).items() if name not in left}
        return own | {"schema": self.schema and self.schema._form["schema"]}

    @classmethod
    def of(cls, state: Mapping[str, Any], connect: Callable[..., Any]) -> "Api":
        """Return an Api of that state with another backend, a live one."""
        api = object.__new__(cls)
        vars(api).update(state, schema=state["schema"] and Schema(state["schema"]), submit=None, _connect=connect)
        api.conceal = concealer(api._key, api.secrets.values())
        api.extras = (api.schema,) if api.schema else ()
        api._check_network()  # another machine may have another proxy
        return api

    def _check_network(self) -> None:
        """Warn of a secret that crosses a network unencrypted, once. Raises UsageError where it must not."""
        before, self._exposure = self._exposure, ""
        if self.secrets and self.base_url.startswith("http:"):
            secret = "the key" if self._key else next(iter(self.secrets))
            self._exposure = exposure(self.base_url, secret, self.allow_http)
        if self._exposure not in ("", before):
            log.warning("%s", self._exposure)

    @contextlib.asynccontextmanager
    async def open(self, concurrency: int) -> AsyncIterator[Ask]:
        """Open the backend; yield the function that sends a prompt's request and returns the answer."""
        if self.schema and not self.schema.find and not self.schema.told:
            self.schema.told = True
            log.warning("answers are checked as JSON only; to check them against the schema: pip install jsonschema")
        try:
            async with contextlib.AsyncExitStack() as stack:
                try:
                    connecting = self._connect(self.base_url, self.headers, concurrency + 1)  # and one beside the run
                    post = await stack.enter_async_context(connecting)
                except (ValueError, OSError, TypeError) as failure:
                    raise UsageError(self.conceal(f"backend {self.name} cannot be opened: {failure}")) from None

                async def call(prompt: Prompt) -> Reply:
                    path = prompt.path
                    if self._login:
                        path += ("&" if "?" in path else "?") + self._login
                    try:
                        return self.read(prompt, *await post(path, prompt.body))
                    except Exception as failure:
                        self.raise_discreetly(failure)

                yield call
        except Exception as failure:
            self.raise_discreetly(failure)

    async def is_there(self, call: Ask) -> bool:
        """Whether the server says anything, be it an error, to a request that no prompt is part of."""
        try:
            async with asyncio.timeout(self.PATIENCE):
                await call(Prompt(0, None, path=f"/models{self.query}"))
        except Exception as failure:
            return as_prompt_error(failure).heard
        return True

    def whole_query(self) -> str:
        """Return the query of every request, with what is secret in it."""
        return "&".join(filter(None, [self.query.removeprefix("?"), self._login]))

    def discreet(self, failure: Exception) -> PromptError:
        """Return what a call raised as one of our errors, without secrets."""
        try:
            self.raise_discreetly(failure)
        except Exception as shown:
            return as_prompt_error(shown)

    def raise_discreetly(self, failure: Exception) -> NoReturn:
        """Raise it, or what shows no secret where it does, in its own text or in that of one behind it."""
        error = as_prompt_error(failure)
        texts = [*traceback.format_exception(failure, limit=0), *error.error[:2], repr(error.http)]
        shown = [self.conceal(text[:TEXT_MOST]) for text in texts]
        if shown == texts:
            raise failure
        *_, kind, message, http = shown
        error.error = error.error._replace(type=kind, message=message)
        error.args = (message,)
        error.http = error.http if http == texts[-1] else None
        raise error from None

    def model_of(self, prompt: Prompt) -> str | None:
        """Return the model that a prompt is asked of; None where the server is to choose."""
        model = self.params.get("model") or self.model
        if prompt.kind != "batch":
            model = model or DEFAULT_MODEL
        elif not model and isinstance(prompt.content["body"], dict):
            model = prompt.content["body"].get("model")
        return model if isinstance(model, str) else None

    def show(self, prompt: Prompt) -> Iterator[str]:
        """Yield the lines of a prompt's request as it would be sent, with *** for what is secret."""
        path = prompt.path + (("&" if "?" in prompt.path else "?") + "***" if self._login else "")
        yield self.conceal(f"POST {self.base_url}{path}")
        for name, text in self.headers.items():
            hidden = "Bearer ***" if text.startswith("Bearer ") else "***"
            yield f"{name}: {self.conceal(text) if PLAIN_HEADERS.fullmatch(name) else hidden}"
        if not self._key and self.base_url == DEFAULT_BASE_URL:
            yield "Authorization: missing, since no key is set"
        yield from ["", *self.conceal(json.dumps(json.loads(prompt.body), indent=2, ensure_ascii=False)).split("\n")]

    def prepare(self, prompt: Prompt) -> Prompt:
        """Set the prompt's `path` and `body`, or its `error` where no request can be made of it."""
        if prompt.error is None and not prompt.body:
            try:
                prompt.path, prompt.body = self._request(prompt)
            except (ValueError, TypeError, RecursionError, LookupError) as failure:
                reason = "half a surrogate pair" if isinstance(failure, UnicodeEncodeError) else failure
                kind = "missing_column" if isinstance(failure, LookupError) else "unreadable"
                prompt.error = Error(kind, f"{prompt.where}: {reason}")
        return prompt

    def _request(self, prompt: Prompt) -> tuple[str, bytes]:
        if prompt.kind == "batch":
            return self._batch_request(prompt.content)
        content = self._content(prompt)
        single = isinstance(content, str)
        if not single and self.endpoint == "chat" and self.system is not None:
            content = [{"role": "system", "content": self.system}, *content]
        before, hole, after = self._frame(single)
        return ENDPOINTS[self.endpoint] + self.query, f"{before}{encode_json(content) if hole else ''}{after}".encode()

    @functools.cache  # noqa: B019 - an Api or two
    def _frame(self, single: bool) -> tuple[str, str, str]:
        """Return the JSON before and after the content, which is all that differs between requests, or no hole."""
        hole: Any = "\0content\0"
        body: dict[str, Any] = {"model": self.model or DEFAULT_MODEL}
        if self.endpoint == "chat":
            system = [{"role": "system", "content": self.system}] if self.system is not None else []
            body["messages"] = [*system, {"role": "user", "content": hole}] if single else hole
        elif self.endpoint == "completions":
            body["prompt"] = hole
        else:
            body["input"] = hole
            if self.system is not None:
                body["instructions"] = self.system
        return encode_json(self._formed(ENDPOINTS[self.endpoint], body | self.params)).partition(encode_json(hole))

    def _formed(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self.schema.asked(path, body) if self.schema else body

    def _content(self, prompt: Prompt) -> Any:
        content = prompt.content
        if self.template is not None:
            if prompt.kind == "messages":
                raise ValueError("a template (-t) and `messages` do not go together")
            return fill(self.template, {**prompt.columns, prompt.kind: content} if prompt.kind else prompt.columns)
        if not prompt.kind:
            raise LookupError(f"no column is called prompt, messages or input; make one of {say(prompt.columns)} (-t)")
        lists = {"messages": ("chat", "responses"), "input": ("responses", "embeddings")}.get(prompt.kind, ())
        fits = prompt.kind != "messages" if isinstance(content, str) else self.endpoint in lists
        if not fits or not isinstance(content, str | list) or content == []:
            raise ValueError(f"`{prompt.kind}` does not hold what the endpoint {self.endpoint} takes")
        return content

    def _batch_request(self, row: dict[str, Any]) -> tuple[str, bytes]:
        url, body = row.get("url"), row["body"]
        if not isinstance(url, str) or not re.fullmatch("/v1/[!-~]+", url) or row.get("method", "POST") != "POST":
            raise ValueError('a Batch request has "method": "POST" and a "url" such as /v1/chat/completions')
        if not isinstance(body, dict):
            raise ValueError("the body of a Batch request is an object")
        if self.system is not None or self.template is not None:
            raise ValueError("a Batch request takes no system text (-s) and no template (-t)")
        model = {"model": self.model} if self.model else {}
        path = url.removeprefix("/v1")
        return path + self.query, encode_json(self._formed(path, body | model | self.params)).encode()

    def read(self, prompt: Prompt, status: int, headers: Mapping[str, str], body: bytes) -> Reply:
        """Return the answer as it is. What is none is read again without secrets, which some servers quote."""
        try:
            return reply_of(prompt.path, status, headers, body)
        except PromptError as failure:
            if 200 <= status < 300 and len(body) > ERROR_MOST:
                self.raise_discreetly(failure)  # which has little of the body
            body = self.conceal(body[:ERROR_MOST].decode("latin-1")).encode("latin-1")
        try:
            return reply_of(prompt.path, status, headers, body)
        except PromptError as failure:
            missing = failure.error.status == 404 or failure.error.type == "model_not_found"
            if missing and prompt.kind == "batch" and not self.model:
                failure.verdict = "fail"  # the line's own model or path, not everybody's
            raise


class Own:
    """The reader's own coroutine function, behind the same door as an Api."""

    conceal = staticmethod(str)

    def __init__(self, send: Callable[[Any], Awaitable[Any]]) -> None:
        if not callable(send):
            raise TypeError("send is neither a coroutine function nor a loaded backend")
        self._send = send

    def prepare(self, prompt: Prompt) -> Prompt:
        """Nothing is to be done: the function makes its own request."""
        return prompt

    def model_of(self, prompt: Prompt) -> None:
        """The function knows, and does not say."""

    @contextlib.asynccontextmanager
    async def open(self, concurrency: int) -> AsyncIterator[Ask]:
        """Yield the function that answers a prompt."""
        yield self._call

    async def _call(self, prompt: Prompt) -> Reply:
        waiting = self._send(prompt.content if prompt.kind else prompt.columns)
        if not isinstance(waiting, Awaitable):
            raise TypeError("send is no coroutine function: write it as `async def`")
        return Reply(await waiting)


def say(names: Iterable[str]) -> str:
    """Return the column names for a message: {a}, {b}."""
    return ", ".join(f"{{{short(str(name), 30)}}}" for name in itertools.islice(names, 8))


def fill(template: str, values: Mapping[str, Any]) -> str:
    """Return the template with each {column} filled in; {{ and }} are braces. Braces in the data mean nothing."""

    def value(match: re.Match[str]) -> str:
        if match[0] in ("{{", "}}"):
            return match[0][0]
        if match[1] not in values:
            raise LookupError(f"the template (-t) names {match[0]}; the columns are {say(values)}; a brace is {{{{")
        found = values[match[1]]
        return found if isinstance(found, str) else encode_text(found)

    return re.sub(r"\{\{|\}\}|\{([^{}]*)\}", value, template)


def environment_key(variable: str, wanted: bool) -> str:
    """Return the key in the environment variable. Raises UsageError where it is none, or wanted and not there."""
    key = os.environ.get(variable, "")
    if wanted and not key:
        name = variable if re.fullmatch("[A-Z0-9_]+", variable) else "the variable that --api-key-env names"
        raise UsageError(f"{name} is not set; export it, or try --demo, which needs no key")  # it may be the key
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UsageError(f"{variable} holds characters that no key has; set it anew")
    return key


def split_url(url: str) -> tuple[str, str]:
    """Return the base URL without a slash or query at its end, and the query; Azure's has `?api-version=…`."""
    base, mark, query = url.strip().partition("?")
    if "@" in url:
        advice = "take user and password out of it and put the key into OPENAI_API_KEY; an @ of the path is %40"
        raise UsageError(f"the base URL holds an @: {advice}")
    try:
        usable = re.fullmatch(r"https?://[^\s/]+(/\S*)?", base) and urllib.parse.urlsplit(url).port != 0
    except ValueError:  # a port beyond 65535, half an IPv6 address
        usable = False
    if not usable or not re.fullmatch(r"[!-~]*", query) or "#" in url:
        raise UsageError(f"--base-url {short(base)} is not of the form https://host/v1")  # the query may hold a key
    for path in ENDPOINTS.values():
        base = base.rstrip("/").removesuffix(path)
    return base, mark + query


def request_headers(base_url: str, key: str) -> dict[str, str]:
    """Return the headers of every request, from the official SDK's environment variables."""
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    headers["User-Agent"] = f"concurrent_prompts/{__version__}"
    if key:
        headers |= {"api-key": key} if "/deployments" in base_url else {"Authorization": f"Bearer {key}"}  # Azure's
    for header, name in (("OpenAI-Organization", "OPENAI_ORG_ID"), ("OpenAI-Project", "OPENAI_PROJECT_ID")):
        if os.environ.get(name):
            headers[header] = os.environ[name]
    for line in os.environ.get("OPENAI_CUSTOM_HEADERS", "").splitlines():
        header, colon, text = line.partition(":")
        if colon and header.strip():
            headers[header.strip()] = text.strip()
    for header, text in headers.items():
        if not re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", header, re.ASCII) or not re.fullmatch(r"[\t -~]*", text):
            raise UsageError(f"the header {short(header)} has characters that no header may have; see OPENAI_*")
    return headers


PLAIN_HEADERS = re.compile(
    "accept(-encoding|-language)?|anthropic-(beta|version)|content-type|(http-)?referer|"
    "openai-(beta|organization|project)|user-agent|x-title",
    re.IGNORECASE,
)
SECRET_NAME = re.compile(
    "access|auth|bearer|cookie|cred|jwt|key|login|pass|pwd|saml|secret|session|sig|token|"
    "^code$|(?<![a-z])(?:hmac|otp|pat|pin|sas|sid)(?![a-z])",
    re.IGNORECASE,
)
SECRET_LENGTH = 8  # of a header's value whose name does not sound secret
ORDINARY = re.compile("auto|default|disabled|enabled|false|none|null|production|staging|true", re.IGNORECASE)
NAMED = {"&": "amp", "<": "lt", ">": "gt", '"': "quot", "'": "apos"}  # characters in HTML
APART = "\"'<>\\,;& \t\r\n"  # what may end a word in a text
AUTH_SCHEME = re.compile("(?:apikey|basic|bearer|digest|token) +(?=[^ ])", re.IGNORECASE)


def split_query(query: str) -> tuple[str, str]:
    """Return the query without the items whose names sound secret, and those: they are not what is asked."""
    items = query.removeprefix("?").split("&")
    secret = [item for item in items if SECRET_NAME.search(urllib.parse.unquote(item.partition("=")[0]))]
    plain = "&".join(item for item in items if item not in secret)
    return plain and f"?{plain}", "&".join(secret)


def secrets_of(headers: Mapping[str, str], login: str) -> dict[str, str]:
    """Return the secret headers and items of the query by what messages call them.

    A header is secret if its name sounds so or its value is long, unless it is one that is known to be plain.
    """
    found = {}
    for name, text in headers.items():
        least = 1 if SECRET_NAME.search(name) else SECRET_LENGTH
        if len(text) >= least and not PLAIN_HEADERS.fullmatch(name):
            found[f"the header {name}"] = text
    for item in login.split("&"):
        name, _, text = item.partition("=")
        found[f"{name}= of the base URL"] = text
    return {name: text for name, text in found.items() if text and not ORDINARY.fullmatch(text)}


def concealer(key: str, secrets: Iterable[str]) -> Callable[[str], str]:
    """Return a function that puts *** for the key, the secrets and the proxies' logins in a text.

    It finds them escaped too (in JSON, HTML or a URL), and cut off, as long as 12 characters are left. It takes time
    in proportion to the text, whatever that holds.
    """
    words = {key}
    for value in secrets:
        scheme = AUTH_SCHEME.match(value)
        value = value[scheme.end() :] if scheme else value  # not the "Bearer"
        words |= {value, *(word for word in re.findall(r"[^\s;,=]{8,}", value) if not ORDINARY.fullmatch(word))}
        if scheme and scheme[0].lower().startswith("basic"):
            words |= login_forms(decoded_login(value))
    for name, url in os.environ.items():
        if name.lower().endswith("_proxy") and "@" in url:
            words |= login_forms(url.rpartition("@")[0].split("://", 1)[-1])
    words |= {decode(word) for decode in (urllib.parse.unquote, urllib.parse.unquote_plus) for word in words}
    words = {word for word in words if len(word) >= 4}  # "x" is no secret
    return functools.partial(re.compile(pattern_of(words) if words else "(?!)").sub, "***")


def login_forms(login: str) -> set[str]:
    """Return user:password, which may be percent-encoded, the password alone, and what Basic authentication sends."""
    login += "" if ":" in login else ":"
    forms = {login, login.removesuffix(":"), urllib.parse.unquote(login)}
    coded = [form.encode(coding, "replace") for form in forms for coding in ("utf-8", "latin-1")]
    passwords = {form.partition(":")[2] for form in forms}
    return forms | passwords | {base64.b64encode(form).decode() for form in coded}


def decoded_login(text: str) -> str:
    """Return what Basic authentication has as base64, or ''."""
    try:
        return base64.b64decode(text).decode("utf-8", "replace")
    except ValueError:
        return ""


def secret_variables(*names: str) -> set[str]:
    """Return the names of the environment variables that hold a secret: those given, our own, copies of their values.

    A proxy's address is one if it holds a password.
    """
    given = {"OPENAI_CUSTOM_HEADERS", *map(str.upper, names)}  # Windows knows no small letters
    found = {name for name in os.environ if name.upper() in given}
    found |= {name for name in os.environ if "OPENAI" in name.upper() and SECRET_NAME.search(name)}
    secrets = {os.environ[name] for name in found if len(os.environ[name]) >= 8}
    for name, value in os.environ.items():
        login = name.lower().endswith("_proxy") and "@" in value
        in_query = name in ("OPENAI_BASE_URL", "OPENAI_API_BASE") and split_query(value.partition("?")[2])[1]
        if login or in_query or any(secret in value for secret in secrets):
            found.add(name)
    return found


class PublicEnvironment:
    """Context manager: take all secrets out of the environment while processes are started, which inherit it.

    `names` are variables that hold one besides the usual, `more` variables to be set instead. Any number of them may
    overlap, in any threads; the last to end puts everything back.
    """

    _lock, _users, _before = threading.Lock(), 0, dict[str, str | None]()

    def __init__(self, *names: str, **more: str) -> None:
        self._names, self._more = names, more

    def __enter__(self) -> None:
        with self._lock:
            PublicEnvironment._users += 1
            for name in secret_variables(*self._names):
                self._before.setdefault(name, os.environ.pop(name))
            for name, value in self._more.items():
                self._before.setdefault(name, os.environ.get(name))
                os.environ[name] = value

    def __exit__(self, *failure: Any) -> None:
        with self._lock:
            PublicEnvironment._users -= 1
            for name, value in self._before.items() if not self._users else ():
                os.environ.pop(name, None)
                os.environ.update({} if value is None else {name: value})
            if not self._users:
                self._before.clear()


def pattern_of(words: Iterable[str]) -> str:
    """Return a pattern of these words, the longest first, as JSON, HTML and URLs write them, whole or cut off.

    Of what is cut off 12 characters must be there. All that follows without a space or the like is taken for the rest:
    it may belong to another form of the word, and a pattern of a long key would take long to compile.
    """
    alike = re.escape("".join(sorted({one for word in words for one in word if one not in APART})))
    signs = re.escape("".join(sorted({one for word in words for one in word if not one.isalnum()})) or "/")
    coded = rf"%[\da-f]{{2}}|&(?:#x?[\da-f]{{1,9}}|{'|'.join(NAMED.values())});|\\{{1,9}}+u[\da-f]{{4}}"
    rest = rf"(?:(?i:{coded})|\\{{1,9}}+[{signs}]|[{alike}])*+"
    whole, cut = [], []
    for word in sorted(sorted(words), key=len, reverse=True):
        apart = any(one in APART for one in word)
        parts = spelled(word if apart else word[:12])
        if apart or len(word) <= 12:
            whole.append("".join(parts))
        if len(word) > 12:
            cut.append("".join([*parts[:12], *(f"(?:{part})?" for part in parts[12:]), rest]))
    found = "|".join(whole + cut)
    starts = "".join({form[0] for word in words for form in (word, word[0].encode().decode("latin-1"))})
    return rf"(?=[{re.escape(starts)}\\%&])(?:{found})"  # most places are passed over by one character


def spelled(word: str) -> list[str]:
    """Return a pattern for each character of a word, and one for each run of backslashes.

    Such a run counts as one, and takes what it finds for good: there would be too many ways to divide it.
    """
    parts: list[str] = []
    run = False
    for part in re.findall(r"\\+|[^\\]", word):
        raw = part[0].encode("utf-8", "replace")
        octets = "".join(f"%{octet:02x}" for octet in raw)
        escapes = rf"{octets}|&#(?:{ord(part[0])}|x0{{0,6}}{ord(part[0]):x});"
        if part[0] in NAMED:
            escapes += f"|&{NAMED[part[0]]};"
        least, run = 0 if run else 1, part[0] == "\\"  # a run before has taken this one's, too
        if run:
            parts.append(rf"(?i:\\{{1,32}}+(?:u005c)?+|{escapes}){{1,{len(part)}}}+")
        else:
            quoted = "" if part.isalnum() else rf"|\\{{1,9}}+{re.escape(part)}"
            plain = "|".join(re.escape(form) for form in {part, raw.decode("latin-1")})  # as `Api.read` takes bodies
            parts.append(rf"(?:(?i:\\{{{least},9}}+u{ord(part):04x}|{escapes}){quoted}|{plain})")
    return parts


def exposure(base_url: str, secret: str, allowed: bool) -> str:
    """Return the warning that a secret would cross a network unencrypted, or ''.

    The way to a proxy counts too. Raises UsageError if the network is the open one and that is not allowed.
    """
    try:
        network = importlib.import_module(f"{MODULE}.backends")
        urls = [base_url, *filter(None, [network.named_proxy(base_url)])]
        hosts = [urllib.parse.urlsplit(url).hostname or "" for url in urls]
    except ModuleNotFoundError:
        raise UsageError(f"a base URL with http:// needs the folder backends/ beside {PROGRAM}") from None
    except ValueError:
        raise UsageError("the proxy that the environment names is not of the form http://host:port") from None
    reach = [network.reach_of(host) for host in hosts]
    place = " through the proxy ".join(hosts if reach[-1] != "loopback" else hosts[:1])
    if "public" in reach and not allowed:
        directly = "" if reach[0] == "public" else f" name {hosts[0]} in NO_PROXY,"
        advice = f"write https:// in the base URL,{directly} or give --allow-http if the network is trusted"
        raise UsageError(f"{secret} would go to {place} unencrypted; {advice}")
    if reach == ["loopback"]:
        return ""
    return f"{secret} goes to {place} unencrypted; write https:// in the base URL if that is possible"


def reply_of(path: str, status: int, headers: Mapping[str, str], body: bytes) -> Reply:
    """Return the answer that a server has given. Raises PromptError where it is none."""
    if 200 <= status < 300:
        return read_reply(path, headers, body)
    raise http_error(status, headers, body) if status else error_without_call(body)


def read_reply(path: str, headers: Mapping[str, str], body: bytes) -> Reply:
    """Return the answer in the body of an HTTP 200. Raises PromptError where it holds none."""
    data = parse_reply(body)
    if not isinstance(data, dict):
        if "html" in header(headers, "content-type"):
            raise PromptError("web_page", page_title(body) or "a web page", "stop", 200)
        raise PromptError("malformed_reply", f"not JSON: {page_title(body) or 'an empty body'}", "retry", 200)
    if data.get("error"):
        raise error_in_answer(shallow(data, DEEPEST) if len(body) <= ERROR_MOST else TOO_LONG)
    reader = READERS.get(path.partition("?")[0], other_reply)
    http = 200, header(headers, "x-request-id"), data
    try:
        text, reason, extra = reader(data)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RecursionError):
        kept = (*http[:2], shallow(data, DEEPEST) if len(body) <= ERROR_MOST else None)
        raise PromptError("no_answer", "HTTP 200 with no answer in it", "retry", 200, kept) from None
    usage = data.get("usage")
    usage = usage if isinstance(usage, dict) else None
    return Reply(text, reason, data.get("model"), usage, extra, http, headers)


TOO_LONG = {"error": "HTTP 200 with an error in it that is too long to be read"}


def error_in_answer(data: dict[str, Any]) -> PromptError:
    """Classify an error that came with HTTP 200, by its code; where that says nothing, it is worth another try."""
    inner = data["error"]
    number = inner.get("code") if isinstance(inner, dict) else None
    if isinstance(number, int) and 400 <= number < 600:
        return http_error(number, {}, data)
    code, message = error_of(data)
    verdict = "stop" if STOP_CODES.fullmatch(code) else "fail" if FAIL_CODES.fullmatch(code) else "retry"
    if code and data.get("status") == "failed" and verdict == "retry" and not RETRY_CODES.fullmatch(code):
        verdict = "fail"  # the Responses API means it
    message = short(message) or "HTTP 200 with an error in it"
    error = PromptError(code or "no_answer", message, verdict, 200, (200, "", data))
    error.slow = code in ("rate_limit_exceeded", "slow_down")
    return error


def error_without_call(body: bytes) -> PromptError:
    """Classify an error of which a bulk backend knows no HTTP status: there was no call, or nobody was told of it."""
    code, message = error_of(shallow(parse_json(body[:ERROR_MOST]), DEEPEST))
    passing = RETRY_CODES.fullmatch(code) or re.fullmatch(r"request_timeout|batch_\w+", code)
    verdict = "stop" if STOP_CODES.fullmatch(code) else "retry" if passing else "fail"
    error = PromptError(code or "no_answer", short(message) or "no answer", verdict)
    error.heard = True
    return error


def chat_text(data: dict[str, Any]) -> tuple[Any, str | None, dict[str, Any]]:
    """Return the text, the finish reason and what else there is of a chat completion."""
    texts = [message_text(choice["message"]) for choice in data["choices"]]
    return texts[0], data["choices"][0].get("finish_reason"), {"texts": texts} if len(texts) > 1 else {}


def message_text(message: dict[str, Any]) -> str:
    """Return a message's text; a refusal is text too, and so are tool calls, as JSON."""
    content = message.get("content")
    if content and isinstance(content, str):
        return content
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content)
    if not content and message.get("tool_calls"):
        content = encode_text(message["tool_calls"])
    return str(content if content is not None else message.get("refusal") or "")


def response_text(data: dict[str, Any]) -> tuple[Any, str | None, dict[str, Any]]:
    """Return the text and the finish reason of a Responses API object; calls of tools are kept as JSON."""
    output = data["output"]
    parts = [part for item in output if item.get("type") == "message" for part in item["content"]]
    text = "".join(part.get("text") or part.get("refusal") or "" for part in parts)
    calls = [item for item in output if str(item.get("type")).endswith("_call")]
    reason = (data.get("incomplete_details") or {}).get("reason") or data.get("status")
    if not output and reason in ("completed", "failed"):
        raise KeyError("output")
    return text or (encode_text(calls) if calls else ""), reason, {}


def completion_text(data: dict[str, Any]) -> tuple[Any, str | None, dict[str, Any]]:
    """Return the text, the finish reason and what else there is of a completion."""
    texts = [choice["text"] or "" for choice in data["choices"]]
    return texts[0], data["choices"][0].get("finish_reason"), {"texts": texts} if len(texts) > 1 else {}


def embedding(data: dict[str, Any]) -> tuple[Any, str | None, dict[str, Any]]:
    """Return the vector of an embeddings reply, or the list of them for a list of inputs."""
    vectors = [item["embedding"] for item in data["data"]]
    return None, None, {"embedding": vectors if len(vectors) > 1 else vectors[0]}


def other_reply(data: dict[str, Any]) -> tuple[Any, str | None, dict[str, Any]]:
    """Return what came from an endpoint of which nothing is known here; a Batch request may name one."""
    return None, None, {"reply": data}


READERS = {
    "/chat/completions": chat_text,
    "/responses": response_text,
    "/completions": completion_text,
    "/embeddings": embedding,
}


# ---- Limits and retries --------------------------------------------------------------------------------------


BACKOFF_BASE = 0.5  # seconds
BACKOFF_CEILING = 60.0  # seconds
PAUSE_CEILING = 120.0  # seconds of Retry-After that are slept through; what is above is said and tried earlier
PROBE = 1.0  # seconds between two tries while nobody is there


def backoff(attempt: int, draw: Callable[[], float] = random.random) -> float:
    """Return the seconds to wait after an attempt (from 1): full jitter below a ceiling that doubles each time."""
    return draw() * min(BACKOFF_CEILING, BACKOFF_BASE * 2.0 ** min(attempt, 30))


@dataclasses.dataclass(slots=True)
class Call:
    """A call in flight; `losses` is how often its prompt was given up as lost before, None where it must not be."""

    task: asyncio.Task[Any]
    started: float
    losses: int | None = 0
    cost: float = 0.0  # tokens, an estimate
    place: int = 1  # among the calls in flight when it went out
    number: int = 1  # among all
    latency: float = 0.0
    spent: tuple[float, float] = math.inf, math.inf  # requests and tokens by all calls, when it went out
    ended: PromptError | None = None  # why the run has ended it

    def end(self, reason: PromptError) -> None:
        """Cancel it."""
        if self.ended is None:
            self.ended = reason
            self.task.cancel()


NEVER_THERE = {"unreachable", "certificate", "too_many_files"}  # calls that nobody has billed
RAMP = 1e6 / 60  # tokens a second; OpenAI answers 429 slow_down to more than half as much again in 15 minutes above it
LIMIT_LEAST, LIMIT_MOST = 1e-6, 1e15  # of a limit that is believed
LIMIT_FORMS = {
    "requests": ("x-ratelimit-{}-requests", "anthropic-ratelimit-requests-{}", "x-ratelimit-{}"),
    "tokens": ("x-ratelimit-{}-tokens", "anthropic-ratelimit-tokens-{}"),
}


def limits_in(headers: Mapping[str, str], name: str) -> tuple[float, float, float] | None:
    """Return the rate (a second), what is left and what there can be at most, of requests or tokens; None if unsaid."""
    for form in LIMIT_FORMS[name]:
        try:
            limit, left = (float(header(headers, form.format(part))) for part in ("limit", "remaining"))
        except ValueError:
            continue
        if not LIMIT_LEAST < limit < LIMIT_MOST or not 0 <= left < LIMIT_MOST:  # Azure's -1
            continue
        wait = reset_wait(header(headers, form.format("reset")))
        period = period_of(limit, left, wait, 1 if form == "x-ratelimit-{}" else 60)  # Together's is per second
        return limit / period, left, max(1.0, min(limit, left + wait * limit / period))
    return None


def period_of(limit: float, left: float, wait: float, least: int) -> int:
    """Return the seconds that a limit is for: with too short ones more would be left at the reset than there can be."""
    wait = max(0.0, wait - 1) if wait == int(wait) else wait  # whole seconds are rounded
    for period, slack in ((1, 0.1), (60, 0.1), (3600, 0.0), (86400, 0.0)):
        if period >= least and left + wait * limit / period <= limit * (1 + slack) + 1:
            return period
    return 60


def reset_wait(text: str) -> float:
    """Return the seconds until a limit is whole again: of '6m0s', '12' or '2026-11-21T00:00:00Z'; 0.0 if unsaid."""
    wait = seconds(text) or 0.0
    with contextlib.suppress(ValueError, OverflowError):
        if ":" in text:
            import datetime

            wait = datetime.datetime.fromisoformat(text).timestamp() - time.time()
        elif not wait:
            wait = float(text)
    return wait if 0 < wait < 1e6 else 0.0


class Quota:
    """What a server lets through of one thing, requests or tokens: a bucket that is refilled all the time.

    Its rate comes from the user, from the headers of the replies, or from where the refusals fall: what was let in
    between two of them, when the bucket was empty, is what was refilled.
    """

    FADE = 3.0  # seconds over which the use of others, who share the key, is averaged

    def __init__(self, name: str, told: float | None = None) -> None:
        self.name = name
        self.rate, self.source = math.inf, ""  # a second
        self.size = math.inf  # what a full bucket holds
        self.spent, self._calls = 0.0, 0
        self._level, self._stamp = math.inf, 0.0
        self._others = 0.0  # their rate
        self._heard = -math.inf, 0.0, 0.0  # when the last reply came, what was left by then, and spent
        self._empty = self._refused = 0.0, 0.0  # when it was, and what was spent by then: at first, and at last
        self._sure, self._let_in, self._barren = False, 0, 0
        self.led, self.refused = False, 0  # whether somebody else learns from what is refused here
        self._unsaid, self._began = 0, 0.0  # replies since one has told the limit
        self._told = math.inf if told is None else told / 60
        self._stated = math.inf  # by the headers
        if told is not None:
            self.rate, self.size, self.source, self._level = self._told, 1.0, "as told", 0.0

    def __str__(self) -> str:
        about = "about " if self.source == "from refusals" else ""
        return f"{about}{60 * self.limit:,.0f} {self.name}/min, {self.source}"

    def tell(self, rate: float, source: str, now: float) -> None:
        """Take over a rate (a second) that is known from elsewhere: from the other processes of a run."""
        if source == "from headers":
            self._stated, self.source = rate, source
        elif source == "as told" and rate != self._told:
            self._level, self._stamp = self.level(now), now
            self._told = self.rate = rate
        elif source == "from refusals":
            self._level, self._stamp = 0.0 if self.source == "" else self.level(now), now
            self.rate, self.size, self.source, self.led = rate, 0.0, source, True

    @property
    def limit(self) -> float:
        """What the server lets through a second, by itself or as it is told; inf where that is not known."""
        return self.rate if self.source == "from refusals" else min(self._told, self._stated)

    def level(self, now: float) -> float:
        """Return what is in the bucket."""
        return self._level if self.rate == math.inf else min(self.size, self._level + (now - self._stamp) * self.rate)

    def wait(self, cost: float, now: float) -> float:
        """Return the seconds until so much may be spent; what is larger than the bucket goes when it is full."""
        lack = min(cost, self.size) - self.level(now)
        return lack / self.rate if lack > 0 else 0.0

    def spend(self, cost: float, now: float) -> None:
        """Take out the cost of a call that goes out."""
        self._level, self._stamp = self.level(now) - cost, now
        self.spent += cost
        self._calls += 1

    def correct(self, more: float) -> None:
        """Take out what a call cost more than was thought."""
        self._level -= more
        self.spent += more

    def refund(self, cost: float, started: float) -> None:
        """Put back the cost of a call that began at `started` and was refused."""
        self.correct(-cost)
        self._calls -= 1
        marks = self._empty, self._refused
        self._empty, self._refused = ((when, spent - cost * (started <= when)) for when, spent in marks)

    def hear(self, headers: Mapping[str, str], call: Call, spent: float, now: float) -> bool:
        """Learn from a reply's headers; return whether they say that there is nothing left for such a call.

        `spent` is what all calls had spent when this one went out.
        """
        self._unsaid += 1
        if (self._unsaid > 50 and self._unsaid % 50) or not (found := limits_in(headers, self.name)):
            return False  # looking for them costs time, too
        self._unsaid = 0
        rate, left, size = found
        if self._stated not in (rate, math.inf):
            log.info("the server has changed its limit of %s to %.0f/min", self.name, 60 * rate)
        self._stated = rate
        if self.name == "tokens" and rate > RAMP:
            self._began = self._began or now
            rate = min(rate, RAMP * 1.5 ** ((now - self._began) / 900))
        if not self.source:
            log.info("the server tells its limit of %s", self.name)
        if self.source != "as told":
            self.source = "from headers"
        own = self.level(now) if self._told < rate else math.inf  # who is told less keeps his own account
        self.size = size if own == math.inf else 1.0
        self._count_others(rate, left, now)
        self.rate = min(self._told, max(rate / 2, rate - max(0.0, self._others)))
        since = self.spent - spent if spent < math.inf else 0.0
        # The server counts when it admits or when it answers: the lesser of both, and a call in reserve.
        mean = self.spent / max(1, self._calls)
        reserve = min(mean * (2 if self.source == "as told" else 1), size / 10)
        self._level = min(own, left - reserve, min(size, left + self.rate * (now - call.started)) - since - reserve)
        self._stamp = now
        return left < 2 * max(1.0, mean, call.cost if self.name == "tokens" else 1.0)

    def _count_others(self, rate: float, left: float, now: float) -> None:
        when, before, spent = self._heard
        span = now - when
        if span >= 0.01:
            gone = min(self.size, before + rate * span) - (self.spent - spent) - left
            fade = math.exp(-span / self.FADE)
            self._others = self._others * fade + gone / span * (1 - fade)
            self._heard = now, left, self.spent

    def guess(self, rate: float, now: float) -> None:
        """Begin to feel for the rate of an empty bucket, from a low one."""
        self.rate, self.size, self.source = max(0.1, rate), 0.0, "from refusals"
        self._level, self._stamp, self._let_in, self._sure = 0.0, now, 0, False
        self._empty = self._refused = now, self.spent
        log.info("feeling for the limit of %s a minute", self.name)

    def let_in(self) -> None:
        """Try a little more after each call that was let in, and the more the longer it goes well."""
        if self.source == "from refusals" and not self.led:
            self._let_in += 1
            more = 1e-5 if self.name == "requests" else 6e-4  # a token limit is known less exactly: calls differ
            faster = 1 + more * (1 + (self._let_in / 250) ** 2) if self._sure else 1.02
            self.rate = min(self.rate * faster, 1e6)

    def refuse(self, cost: float, now: float) -> None:
        """Learn from a call that was refused, of which nothing more is known."""
        self.refused += 1
        if self.led:
            self._level, self._stamp = -cost, now
            return
        when, spent = self._refused
        self._barren = self._barren + 1 if self.spent <= spent else 0
        # Where nothing was let in since, there is nothing to learn but patience: so many seconds.
        patience = min(8.0, 2.0 ** (self._barren - 3)) if self._barren > 2 else 0.0
        if not self._barren and (self._sure or self.spent - spent >= 2 * cost):  # else how full it was matters more
            if self._sure and (self.spent - spent + 1.5 * cost) / max(1e-3, now - when) < 0.9 * self.rate:
                self._empty = self._refused  # the server lets through less than it did
            when, spent = self._empty
            self.rate = max(0.01, (self.spent - spent + (cost - 0.5) / 2) / max(1e-3, now - when))
            self._sure = True
            log.info("limit: %s", self)
        self._let_in, self._refused = 0, (now, self.spent)
        self._level, self._stamp = -max(cost, self.rate * patience), now


class Window:
    """How many calls may be in flight: as few as bring the most answers.

    It grows fourfold each round trip and holds where answers take a third longer than they did. If by then twice as
    many in flight bring less than half as many answers again, it is set to what keeps the server busy (Little's law:
    throughput times the latency without a queue, and a little more). From then on it grows slowly while there is hardly
    a queue, and tries a quarter more now and then: the answers may have become longer since, or the servers more.
    Where the server refuses one more, that was the limit; from there it grows slowly at first, then ever faster.
    """

    LONGER = math.log(4 / 3)
    GAIN = 0.55  # log2 of what twice as many must bring

    def __init__(self, start: int, ceiling: int) -> None:
        self.size = float(start)
        self.ceiling = ceiling
        self.source = ""  # why it grows fourfold no longer
        self.highest = 0  # place of the last call in the row that was answered, since it was last set
        self.answers = 0  # since then
        self._octaves: dict[int, list[float]] = {}  # answers, the logarithms of their latencies, places
        self._noted = 0  # answers in the octaves
        self._usual, self._lately, self._held = math.inf, 0.0, 0.0  # logarithms of latencies; round trips on hold
        self._total = 0.0  # logarithms of the latencies since it was last set
        self._before: tuple[float, float] | None = None  # size and mean before a quarter more was tried
        self._rounds = 24  # to the next trial

    def __str__(self) -> str:
        return f"{int(self.size)} in flight, {self.source}"

    def answered(self, place: int, latency: float) -> None:
        """Learn from an answer to a call that was the `place`-th in flight."""
        if place > self.highest:
            self.highest = place
        self.answers += 1
        if self.source == "from refusals":
            self.size = min(self.ceiling, self.size + min(1.0, (self.answers / self.size / 6) ** 2 / self.size))
        elif self.source:
            self._watch(place, math.log(max(1e-6, latency)))
        elif self.size / 4 <= self.highest:
            self._note(place, math.log(max(1e-6, latency)))
            if self._lately < self._usual + self.LONGER:
                self.size, self._held = min(self.ceiling, self.size + 3), 0.0
            else:
                self._held += 1 / self.size
                if self._held > 1:
                    self._decide()

    def _note(self, place: int, latency: float) -> None:
        octave = self._octaves.setdefault(place.bit_length(), [0, 0.0, 0])
        octave[0] += 1
        octave[1] += latency
        octave[2] += place
        self._noted += 1
        self._lately += (latency - self._lately) / min(16, self._noted)
        if octave[0] > 15:
            self._usual = min(self._usual, octave[1] / octave[0])

    def _decide(self) -> None:
        """Grow on, or settle where the throughput is about the highest with the least waiting at the server."""
        octaves = [octave for octave in self._octaves.values() if octave[0] > 11]
        means = sorted((places / count, math.exp(total / count)) for count, total, places in octaves)
        (few, quick), (many, slow) = means[-2:] if len(means) > 1 else means * 2
        self._held = 0.0
        if many > few and math.log(many * quick / (few * slow)) > self.GAIN * math.log(many / few):
            self._usual = self._lately
            return
        throughput = max(place / latency for place, latency in means)
        calm = [(count, total) for count, total, places in self._octaves.values() if places <= count * many / 3]
        self._usual = sum(total for _, total in calm) / sum(count for count, _ in calm) if calm else math.log(quick)
        self.source = "since more bring no more answers"
        self.size, self.answers = max(1.0, min(self.size, 1.02 * throughput * math.exp(self._usual))), 0
        log.info("more calls in flight bring no more answers: now %d", self.size)

    def _watch(self, place: int, latency: float) -> None:
        self._lately += (latency - self._lately) / 64
        self._total += latency
        if self._lately < self._usual + math.log(1.12) and place >= self.size - 2:
            self.size = min(self.ceiling, self.size + 1 / self.size)
        if self.answers < self._rounds * self.size:
            return
        mean = self._total / self.answers
        before, self._before = self._before, None
        if before is None:
            self._before = self.size, mean
            self.size, self._rounds = min(self.ceiling, self.size * 1.25), 4
        elif mean > before[1] + math.log(1.1):  # it does not bring a tenth more
            self.size, self._rounds = before[0], 24
        self.answers, self._total = 0, 0.0

    def shrink(self, size: float) -> None:
        """Give way to a refusal."""
        self.source, self.size, self.answers, self.highest = "from refusals", max(1.0, min(self.size, size)), 0, 0
        log.info("the server takes no more calls at once: now %d", self.size)


class Limiter:
    """How many calls may be in flight, and from when: the run's state, not each prompt's.

    A `Window` bounds the calls in flight, two `Quota`s what goes out a minute; `acquire` waits for all three, in
    order, and `settle` learns from each reply. A wait that the server asks for is a pause of the whole run, with
    jitter at its end so that nobody comes in a herd. A refusal that says nothing more is taken for the window's where
    it hit the one call more than were ever in flight, for the rate's where the next ones are refused as well.
    After a connection that is lost or refused one call goes ahead and the others wait until the server is heard again,
    for a second at most; where most are refused, the server is away: one call a second tries until it is back.
    """

    PAUSE = 2.0  # seconds in which a bucket of which nothing is known may fill

    def __init__(
        self,
        start: int,
        ceiling: int,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        rpm: float | None = None,
        tpm: float | None = None,
    ) -> None:
        self.window = Window(start, ceiling)
        self.requests, self.tokens = Quota("requests", rpm), Quota("tokens", tpm)
        self.in_flight = self.sent = 0
        self.pause_end = -math.inf
        self.away_since: float | None = None
        self.heard = False  # whether the server has ever said anything
        self._clock, self._sleep = clock, sleep
        self._began = math.inf
        self._slow = 0.0  # the share of late replies that said "too much to do"
        self._latency = 0.0  # of the answers of late
        self._refusal, self._mark, self._strikes = -math.inf, 0, 0  # the last one; calls sent by then; in a row
        self._next = -math.inf  # when the next call may go out: one at a time in doubt, and spread after a pause
        self._doubt_end = self._probed = self._failed = -math.inf
        self._refusals, self._tries = 0, 0  # connections refused in a row, and calls that went out since the first one
        self._first_refused = -math.inf
        self._spread_end, self._gap = -math.inf, 0.0
        self._held_up = 0.0  # seconds in which calls waited for the time to come
        self._queue = asyncio.Lock()
        self._queued = 0
        self._changed = asyncio.Event()

    def __repr__(self) -> str:
        facts = [f"{self.in_flight} in flight of {int(self.window.size)} allowed", *self.learned(), self.state()]
        return f"<Limiter {', '.join(filter(None, facts))}>"

    def learned(self) -> list[str]:
        """Return what is known of the server's limits, for the report."""
        return [str(known) for known in (self.requests, self.tokens, self.window) if known.source]

    def share(self, calls: int, start: float, rates: Iterable[tuple[float, str] | None]) -> None:
        """Take over a share of what a run in several processes may do: at first, and whenever that changes.

        `calls` is the most in flight, `start` what it begins with; `rates`, of requests and of tokens a second, are
        those that are told or known from refusals.
        """
        window = self.window
        if not window.source:
            window.size = float(max(start, window.size if self.sent else 0))
        window.ceiling, window.size = calls, min(window.size, calls)
        for quota, known in zip((self.requests, self.tokens), rates, strict=True):
            if known:
                window.source = window.source if quota.source else ""  # it was not the number at once
                quota.tell(*known, self._clock())
        self._changed.set()

    def calls_a_minute(self) -> float | None:
        """Return how many calls a minute the server is known to let through, None where nothing is known."""
        if not self.requests.source and not self.tokens.source:
            return None
        rate = min(self.requests.limit, self.tokens.limit * self.sent / max(1.0, self.tokens.spent))
        return 60 * rate if rate < math.inf else None

    def state(self) -> str:
        """Return what holds up the run, in a few words, or ''."""
        now = self._clock()
        if self.away_since is not None:
            return f"nobody there for {duration(now - self.away_since)}, one try a second"
        if self.pause_end > now:
            return f"a pause that the server asked for, {duration(self.pause_end - now)} left"
        held = next((f"limit: {quota}" for quota in (self.requests, self.tokens) if quota.wait(1, now)), "")
        held = held or (f"server: {self.window}" if self.window.source else "")
        return f"held by the {held}" if held and self._queued else ""

    @property
    def busy(self) -> bool:
        """Whether more than a tenth of the replies of late said that the server has too much to do."""
        return self._slow > 0.1

    async def acquire(self, cost: float = 0.0, again: bool = False) -> float:
        """Wait until a call of so many tokens may go out; return the seconds of it in which the run was held up.

        What is asked `again` does not queue up behind all that is asked for the first time.
        """
        asked, held_up = self._clock(), self._held_up
        self._queued += 1
        try:
            async with contextlib.nullcontext() if again else self._queue:
                while span := self._closed(cost, self._clock()):
                    await self._change(span)
        finally:
            self._queued -= 1
        now = self._clock()
        self._let_go(cost, now)
        return min(now - asked, self._held_up - held_up)

    def admit(self, cost: float, again: bool) -> bool:
        """Let a call go out if it need not wait; return whether it may."""
        now = self._clock()
        if (self._queued and not again) or self._closed(cost, now):
            return False
        self._let_go(cost, now)
        return True

    def _let_go(self, cost: float, now: float) -> None:
        self.in_flight += 1
        self.sent += 1
        self._tries += 1
        self._began = min(self._began, now)
        self.requests.spend(1, now)
        self.tokens.spend(cost, now)
        if now < self._doubt_end:
            if self._probed > self._failed and self.away_since is not None:
                self._trust()  # the one that went ahead a second ago is connected
            else:
                self._probed, self._next = now, now + PROBE
        elif now < self._spread_end:
            self._next = now + random.uniform(0.5, 1.5) * self._gap

    def enter(self, call: Call) -> None:
        """Note where a call stands that goes out."""
        call.place, call.number = self.in_flight, self.sent
        call.spent = self.requests.spent, self.tokens.spent

    def _closed(self, cost: float, now: float) -> float:
        """Return the seconds until a call may go out: 0.0 now, inf not before another has ended."""
        if self.in_flight + 1 > self.window.size:
            return math.inf
        wait = max(self.pause_end - now, self._next - now, self.requests.wait(1, now), self.tokens.wait(cost, now))
        return wait if wait > 1e-6 else 0.0

    async def _change(self, span: float) -> None:
        """Wait until a call has ended, or until the time has come."""
        self._changed.clear()
        if span == math.inf:
            await self._changed.wait()
            return
        began = self._clock()
        waits = [asyncio.ensure_future(self._sleep(span)), asyncio.ensure_future(self._changed.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._held_up += self._clock() - began
            for wait in waits:
                wait.cancel()

    def settle(self, call: Call, outcome: Reply | PromptError) -> None:
        """Take back the place of a call, and learn from how it ended."""
        now = self._clock()
        call.latency = now - call.started
        failure = outcome if isinstance(outcome, PromptError) else None
        self.in_flight -= 1
        self._changed.set()
        self._listen(call.started, failure, now)
        slow = failure is not None and failure.slow
        self._slow += (slow - self._slow) / 50
        if slow:
            self.requests.refund(1, call.started)
            self.tokens.refund(call.cost, call.started)
        told = self.requests.hear(outcome.headers, call, call.spent[0], now)
        told |= self.tokens.hear(outcome.headers, call, call.spent[1], now)
        if failure is None:
            self._latency += (call.latency - self._latency) / (50 if self._latency else 1)
            self.window.answered(call.place, call.latency)
            self.requests.let_in()
            self.tokens.let_in()
            if self._strikes and call.started > self._refusal:
                self._spread_end = -math.inf
        elif slow and failure.wait is not None:
            self._pause(min(failure.wait, PAUSE_CEILING))
        elif slow and not told and call.started > self._refusal:
            self._refused(call, failure, now)

    def _refused(self, call: Call, failure: PromptError, now: float) -> None:
        """Learn from a refusal that says nothing more: were they too many at once, or too many a minute?"""
        at_the_door = not self._latency or call.latency < self._latency / 4
        if not at_the_door and not self.busy:
            return  # after some work, and now and then: a fault, not a limit
        again = call.number - self._mark <= 2
        place = max(call.place, self.in_flight + 1)  # calls that go out together may arrive in another order
        self._refusal, self._mark = now, self.sent
        quota = self.tokens if "token" in failure.scope else self.requests
        if at_the_door and quota.source == "from refusals":
            quota.refuse(call.cost if quota is self.tokens else 1, now)
        elif at_the_door and place >= self.window.highest and not again:
            self.window.shrink(call.place - 1)
            self._strikes = 0
        elif not at_the_door or failure.error.status != 429:
            self.window.shrink(min(self.window.size, self.in_flight + 1) * 2 / 3)
        else:
            self._strike(quota, again, now)

    def _strike(self, quota: Quota, again: bool, now: float) -> None:
        """Take a refusal for the rate's, if it is the second one in a row."""
        self._strikes = self._strikes + 1 if again else 1
        if self._strikes == 1 and self.window.answers > 2:
            self._gap, self._spread_end, self._next = 0.05, now + 1, now + 0.05
        elif quota.source:
            self.window.shrink(min(self.window.size, self.in_flight + 1) * 2 / 3)  # that limit is known: another one
        else:
            quota.guess(quota.spent / max(0.1, now - self._began) / 4, now)
            self.window.source = ""  # it was not the number at once
            self._next = now + self.PAUSE

    def _pause(self, wait: float) -> None:
        spread = min(1.0, wait / 10)
        self._gap = spread / max(2.0, self.window.size)
        self.pause_end = max(self.pause_end, self._clock() + wait)
        self._spread_end = self.pause_end + spread
        self._next = self.pause_end + random.random() * self._gap

    def _listen(self, started: float, failure: PromptError | None, now: float) -> None:
        """Note whether the server is there; a reply to what was sent before it was found away says nothing."""
        if failure is None or failure.heard:
            self.heard = True
            if started >= self._failed:
                self._refusals = 0
            if now < self._doubt_end and (started >= self._failed or self.away_since is None):
                self._trust()
        elif failure.kind in ("unreachable", "connection_error"):
            self._doubt_end = max(self._doubt_end, now + PROBE)
            if failure.kind == "unreachable":
                if not self._refusals:
                    self._first_refused, self._tries = now, 0
                self._refusals += 1
                if self._refusals > 1 and 2 * self._refusals > self._tries:
                    self.leave(failure)
            if self._refusals:
                self._failed = now
            if self.away_since is not None:
                self._next = now + PROBE

    def leave(self, failure: PromptError) -> None:
        """Take the server for away."""
        if self.away_since is None:
            self.away_since = self._first_refused if self._refusals else self._clock()
            if self.heard:
                log.warning("nobody is there any longer (%s): waiting, with one try a second", failure)
        self._doubt_end, self._failed, self._next = math.inf, self._clock(), self._clock() + PROBE

    def _trust(self) -> None:
        """Let the calls go out again."""
        if self.away_since is not None:
            log.warning("the server is back after %s", duration(self._clock() - self.away_since))
        self.away_since = None
        self._doubt_end = self._next = -math.inf


def own_part(row: dict[str, Any]) -> dict[str, Any]:
    """Return what a line of the results file holds before its `request`: what comes after are the input's columns."""
    return {name: row[name] for name in itertools.takewhile("request".__ne__, row)}


class Costs:
    """How many tokens a request will count for: its prompt by length, and the most that it may answer."""

    ENVELOPE = 60  # bytes of a request that are no prompt
    MOST = re.compile(rb'"max_(?:completion_|output_)?tokens": ?(\d{1,9})')  # an input may hold any number
    CHOICES = re.compile(rb'"n": ?(\d{1,9})')

    def __init__(self) -> None:
        self._bytes, self._in, self._out, self._answers = 4.0, 1.0, 20.0, 1  # four characters a token, at first

    def estimate(self, body: bytes) -> float:
        """Return the tokens of a request."""
        most = self.MOST.search(body) if b'"max_' in body else None
        answer = float(most[1]) if most else self._out / self._answers
        if most and (choices := self.CHOICES.search(body)):
            answer *= int(choices[1])
        return max(4, len(body) - self.ENVELOPE) * self._in / self._bytes + answer

    def learn(self, body: bytes, tokens: Iterable[int], estimate: float) -> float:
        """Learn from what the server has counted; return how many tokens it was more than the estimate."""
        asked, answered, *_ = tokens
        if not 0 < asked < len(body) + 1e5 or answered > 1e6:  # nothing, or nonsense
            return 0.0
        self._bytes += max(4, len(body) - self.ENVELOPE)
        self._in += asked
        self._out += answered
        self._answers += 1
        # What may be answered at the most is counted even where the answer is shorter.
        return 0.0 if b'"max_' in body else asked + answered - estimate


class Patience:
    """Which calls are given up as lost, learned from how long the answered ones took.

    A call is late when it takes half as long again as the slowest answer so far, longer while few are known, and
    twice that after each time that its prompt was given up, so that an honest slow answer comes in the end. A late
    call is lost once one that began after it was late has been answered; where there is no such call, the oldest
    is given up to make one, since the server may be at a standstill. An honest slow answer may be given up too, and
    paid twice: so no more calls are given up than 3 and a twentieth of the answers.
    """

    LEAST = 1.0  # seconds

    def __init__(self) -> None:
        self.answers = 0
        self.slowest = 0.0
        self.given_up = 0
        self.latest = -math.inf  # the start of the latest call that was answered

    def limit(self, losses: int | None) -> float:
        """Return after how many seconds a call is late."""
        if not self.answers or losses is None:
            return math.inf
        return max(self.LEAST, 1.5 * self.slowest * (1 + 20 / self.answers)) * 2.0**losses

    def answered(self, call: Call) -> None:
        """Learn from an answer."""
        self.answers += 1
        if call.latency > self.slowest:
            self.slowest = call.latency
        if call.started > self.latest:
            self.latest = call.started

    def lost(self, calls: Iterable[Call], now: float) -> list[Call]:
        """Return those of the calls in flight, given in the order of their starts, that are to be given up."""

        def due(call: Call) -> float:
            return call.started + self.limit(call.losses)

        calls, least = list(calls), self.limit(0)
        old = itertools.takewhile(lambda call: now - call.started > least, calls)
        late = [call for call in old if now > due(call) and call.ended is None]
        found = [call for call in late if self.latest > due(call)]
        if late and not found and not any(call.started > due(late[0]) for call in calls):
            found = late[:1]
        found = found[: max(0, 3 + self.answers // 20 - self.given_up)]
        self.given_up += len(found)
        return found


class Run:
    """One pass over the prompts: how each is answered, and when to stop.

    `answer` does the attempts of one prompt and always returns a Result. An error that would meet every prompt stops
    the run: what is in flight finishes, what waits gives up, nothing more is admitted. A server that goes away is
    waited for, which costs no prompt an attempt; `deadline` (seconds) bounds it all, the calls in flight too.
    `extras` are the objects of extras/; `max_cost` (USD) and `price` are the short form of a Budget.
    """

    SWEEP = 0.1  # seconds between two looks at the calls in flight
    FREE_ATTEMPTS = 30  # of each prompt that finds nobody, with the user's own function
    BELIEVED = 3  # the same with an API, before it is asked whether it is there

    def __init__(
        self,
        send: Any,
        *,
        concurrency: int | str = "auto",
        max_attempts: int = DEFAULT_ATTEMPTS,
        timeout: float = DEFAULT_TIMEOUT,
        deadline: float | None = None,
        rpm: float | None = None,
        tpm: float | None = None,
        extras: Iterable[Any] = (),
        max_cost: float | None = None,
        price: Iterable[float] | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        auto = concurrency == "auto"
        self.concurrency = AUTO_CONCURRENCY if auto else int(concurrency)
        limits = [limit for limit in (timeout, deadline, rpm, tpm) if limit is not None]
        if self.concurrency < 1 or max_attempts < 1 or not all(limit > 0 for limit in limits):
            raise ValueError("concurrency, max_attempts, timeout, deadline, rpm and tpm are greater than 0")
        self.extras = [*getattr(send, "extras", ()), *extras]
        if max_cost is not None:
            self.extras.append(load_extra("budget").Budget(max_cost, price))
        elif price is not None:
            load_extra("prices").as_price(price)
        self.limiter = Limiter(16 if auto else self.concurrency, self.concurrency, clock, sleep, rpm, tpm)
        self.patience = Patience()
        self._costs = Costs()
        self.stopped: PromptError | None = None
        self.most_in_flight = 0
        self.api: Any = send if isinstance(send, Api) else Own(send)
        self.open: dict[int, Result] = {}  # what is in the making, by the prompts' numbers
        self.listeners = hooked(self.extras, "on_result")
        self.journal: Any = None  # what keeps or prints the results,
        self.first = Prompt(0, "")  # the first prompt that can be sent, if that is known beforehand
        self.path: pathlib.Path | None = None  # its file,
        self.overwrites = False  # and whether what it holds is given up
        self.bulk = send if isinstance(send, Api) and send.submit else None
        self.options: dict[str, Any] = {"concurrency": concurrency, "max_attempts": max_attempts, "timeout": timeout}
        self.options |= {"rpm": rpm, "tpm": tpm}
        self.notes: Notes | None = None
        self.said = ""  # what a bulk backend is waiting for
        self._max_attempts, self._timeout = max_attempts, timeout
        self._deadline = math.inf if deadline is None else deadline
        self.clock, self.sleep = clock, sleep
        self.epoch = time.time() - clock()
        self._answered = -math.inf  # when the last answer came
        self._backing_off: dict[int, float] = {}  # until when, by the prompt's number
        self._unheard: collections.Counter[int] = collections.Counter()  # prompts that found nobody since it was heard
        self._calls: dict[asyncio.Task[Any], Call] = {}  # in the order of their starts
        self._wrapping: set[asyncio.Task[Any]] = set()  # in what the extras do after the call
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._resting: set[asyncio.Task[Any]] = set()
        self._warned: set[str] = set()
        self._stack = contextlib.AsyncExitStack()

    @property
    def running_elsewhere(self) -> bool:
        """Whether what is under way goes on where it is when this run ends, and is found again by the next."""
        return bool(self.notes and self.notes.kept)

    def at_most(self, calls: int) -> None:
        """Bound the calls in flight by what the system allows, and say so if that is less than was asked for."""
        if self.concurrency > max(1, calls):
            self.concurrency = self.limiter.window.ceiling = max(1, calls)
            self.limiter.window.size = min(self.limiter.window.size, self.concurrency)
            text = f"at most {self.concurrency} calls in flight: raise the limit of open files (ulimit -n) for more"
            self.warn_once("files", text)

    async def __aenter__(self) -> "Run":
        self._loop = asyncio.get_running_loop()
        self._call = await self._stack.enter_async_context(self.api.open(self.concurrency))
        for extra in self.extras:
            if hasattr(extra, "session"):
                await self._stack.enter_async_context(extra.session(self))
        self._answer_once = self.wrapped(self._attempt)
        self._due = self._loop.time() + self._deadline
        if self._deadline < math.inf:
            self._later("deadline", self._deadline, self._end)
        return self

    def _later(self, name: str, delay: float, action: Callable[[], None], late: bool = False) -> None:
        """Set a timer. If it comes late (the process was stopped), the replies that wait are read first.

        Only once: a server can keep the event loop so busy that every timer is late.
        """
        loop = self._loop
        due = loop.time() + delay

        def act() -> None:
            if loop.time() > due + 0.5 and not late:
                self._later(name, 0.1, action, late=True)
            else:
                loop.call_soon(action)

        self._timers[name] = loop.call_at(due, act)

    async def __aexit__(self, *failure: Any) -> None:
        for timer in self._timers.values():
            timer.cancel()
        await self._stack.aclose()

    def state(self) -> str:
        """Return what holds up the run, in a few words, or ''."""
        if held := "stopping" if self.stopped else self.said or self.limiter.state():
            return held
        now = self.clock()
        if not self._calls and self._backing_off:
            wait = duration(max(0.0, min(self._backing_off.values()) - now))
            return f"{len(self._backing_off)} waiting, {wait} to the next attempt"
        silence = now - max([self._answered, *itertools.islice((call.started for call in self._calls.values()), 1)])
        return f"no answer for {duration(silence)}" if self._calls and silence > max(5, self.patience.limit(0)) else ""

    def extra(self, name: str) -> Any:
        """Return the extra of that file's name, None where there is none in this run."""
        return next((extra for extra in self.extras if extra_name(extra) == name), None)

    def wrapped(self, attempt: Attempt, without: str = "") -> Attempt:
        """Return the attempt with what the extras wrap around it, the first one outermost."""
        wrapping = [extra for extra in self.extras if hasattr(extra, "wrap") and extra_name(extra) != without]
        for extra in reversed(wrapping):
            attempt = extra.wrap(attempt)
        return self._endable(attempt) if wrapping else attempt

    def _endable(self, attempt: Attempt) -> Attempt:
        """Let the deadline end what the extras do after a call, as it ends the call itself."""

        async def call(prompt: Prompt) -> Reply:
            task = asyncio.current_task(self._loop)
            assert task is not None
            self._wrapping.add(task)
            cancelled = task.cancelling()
            try:
                return await attempt(prompt)
            except asyncio.CancelledError:
                if task in self._wrapping or task.uncancel() > cancelled:
                    raise
                failure = PromptError("deadline", "the deadline came before the answer was checked", "stop")
                failure.keep = self.open[prompt.number].reply
                raise failure from None
            finally:
                self._wrapping.discard(task)

        return call

    def admit(self, prompts: Iterable[Prompt]) -> Iterator[Prompt]:
        """Yield the prompts, ready to be sent, until there are no more or the run is stopped."""
        rest = iter(prompts)
        while self.stopped is None:
            try:
                prompt = next(rest, None)
            except PromptError as failure:  # of an extra
                return self.stop(failure)
            if prompt is None:
                return
            yield self.api.prepare(prompt)

    async def answer(self, prompt: Prompt) -> Result:
        """Send the prompt, again where that may help, and return its Result; raises only CancelledError."""
        result = Result(prompt, error=prompt.error)
        if prompt.error is not None:
            await asyncio.sleep(0)  # a million unreadable lines must not hold up the calls in flight
            return result
        self.open[prompt.number] = result
        try:
            return await self._answer(prompt, result)
        finally:
            del self.open[prompt.number]

    async def _answer(self, prompt: Prompt, result: Result) -> Result:
        first_missed, asked = math.inf, prompt
        result.started = self.epoch + self.clock()
        while (failure := await self.take(self._answer_once, asked, result)) is not None:
            if self._never_there(failure, result):
                kind = "timeout" if failure.kind == "timeout" else "unreachable"
                self.stop(PromptError(kind, failure.error.message, "stop"))
            missed = self._missed(prompt, failure)
            first_missed = min(first_missed, self.clock()) if missed else math.inf
            free = missed and self.patience.latest < first_missed and await self._is_outage(failure)
            if self.has_failed(result, failure, free):
                return result
            if failure.again:
                asked = dataclasses.replace(prompt, body=failure.again)
            began, took = result.waited(), result.latency
            if self.stopped or not (free or await self._back_off(failure, result)):
                return self.unfinished(result)
            result.attempts -= free
            result.set_aside(began, took)
        return result

    async def take(self, attempt: Attempt, prompt: Prompt, result: Result) -> PromptError | None:
        """Attempt a prompt and fill in the answer; return what came instead of one."""
        before = result.attempts
        try:
            result.take(await attempt(prompt))
            result.error = result.exception = None
            return None
        except PromptError as failure:
            if failure.keep:
                result.take(failure.keep)
                result.tokens = NO_TOKENS
                failure.error = failure.error._replace(message=self.api.conceal(failure.error.message))
                failure.args = failure.error[1:2]
            if result.attempts > before:
                result.lose(failure)
            return failure.with_traceback(None)
        except Exception as failure:  # what an extra did not mean to raise
            error = PromptError("extra", f"an extra, wrap: {in_short(failure)}", "stop")
            if result.reply:  # it was paid
                error.keep = result.reply
                result.take(result.reply)
            return error
        finally:
            result.reply = None

    def has_failed(self, result: Result, failure: PromptError, free: bool = False) -> bool:
        """Note what came instead of an answer; return whether that is the prompt's end. A `free` attempt is not one."""
        before = result.exception if isinstance(result.exception, PromptError) and result.exception.keep else None
        known = failure if failure.keep else before or failure  # an answer that is not right is more than none
        result.error, result.http, result.exception = known.error, known.http, known
        if failure.again and before:  # once is enough
            failure.verdict = "fail"
        if failure.verdict == "stop":
            self.stop(failure)
        spent = result.attempts >= self._max_attempts and not free
        return failure.verdict == "fail" or bool(known.keep if self.stopped else spent)

    def unfinished(self, result: Result) -> Result:
        """Return the result of a prompt that the end of the run has left open."""
        result.done = False
        result.error = result.error if result.attempts else self.not_sent()
        return result

    def _missed(self, prompt: Prompt, failure: PromptError) -> bool:
        """Whether the attempt found nobody there: a connection was refused, or those of several prompts were lost."""
        if failure.heard:
            self._unheard.clear()
        elif failure.kind in ("connection_error", "unreachable"):
            self._unheard[prompt.number] += 1
        if failure.kind == "connection_error":
            if len(self._unheard) >= 3 + len(self._calls) // 8 and self.limiter.heard:
                self.limiter.leave(failure)
            return self.limiter.away_since is not None
        return failure.kind == "unreachable"

    async def _is_outage(self, failure: PromptError) -> bool:
        """Whether nobody is there for anybody, so that an attempt which found that costs its prompt nothing.

        A few prompts may be the cause themselves, if no others are tried meanwhile: an API is then asked for something
        that no prompt is part of. The user's own function cannot be; there each prompt is believed only so often.
        """
        attempts, prompts = self._unheard.total(), len(self._unheard)
        if isinstance(self.api, Own):
            return attempts <= self.FREE_ATTEMPTS * prompts
        if failure.kind == "unreachable" or attempts <= self.BELIEVED * prompts:  # refused before any of it was sent
            return True
        return not await self.wait_or_stop(self.api.is_there(self._call))

    def _never_there(self, failure: PromptError, result: Result) -> bool:
        """Whether a server that has never said a word is to be given up."""
        if self.limiter.heard or failure.verdict != "retry":
            return False
        now, since = self.clock(), self.limiter.away_since
        if since is not None:
            return now - since >= PROBE * min(2, self._max_attempts - 1)
        if any(now - call.started > max(PROBE, 2 * result.latency) for call in self._calls.values()):
            return False  # somebody there is thinking
        return result.attempts >= min(3, self._max_attempts)

    async def _attempt(self, prompt: Prompt) -> Reply:
        """Send a prompt once, when the limits allow it, and return the answer. Raises PromptError."""
        task, asked, result = asyncio.current_task(self._loop), self.clock(), self.open[prompt.number]
        assert task is not None
        cost, again, paused = self._costs.estimate(prompt.body), result.attempts > 0, 0.0
        if self._loop.time() >= self._due:  # a user's function that awaits nothing lets no timer ring
            self._end()
        if self.stopped or not self.limiter.admit(cost, again):
            waited = await self.wait_or_stop(self.limiter.acquire(cost, again))
            if waited is None:
                raise self.stop_error()
            paused = waited
        result.attempts += 1
        losses = result.losses if result.attempts < self._max_attempts else None
        call = Call(task, self.clock(), losses, cost)
        result.limit_wait += paused
        result.slot_wait += max(0.0, call.started - asked - paused)
        outcome = await self._send(call, prompt)
        result.latency = call.latency
        if isinstance(outcome, PromptError):
            result.losses += outcome.kind == "lost"
            raise outcome
        self._answered = call.started + call.latency
        result.limit = self.limiter.calls_a_minute()
        self._unheard.clear()
        self.patience.answered(call)
        tokens = token_counts(outcome.usage) if outcome.usage else NO_TOKENS
        self.limiter.tokens.correct(self._costs.learn(prompt.body, tokens, cost))
        result.reply = outcome
        return outcome

    async def _send(self, call: Call, prompt: Prompt) -> Reply | PromptError:
        """Make a call; return what came of it."""
        cancelled = call.task.cancelling()
        self.limiter.enter(call)
        if call.place > self.most_in_flight:
            self.most_in_flight = call.place
        self._calls[call.task] = call
        if "sweep" not in self._timers:
            self._sweep()
        outcome: Reply | PromptError
        try:
            outcome = await self._call(prompt)
        except Exception as exc:  # one prompt's failure, a bug in the reader's own code too, costs no other its answer
            outcome = call.ended or as_prompt_error(exc)
            if outcome is not exc:
                outcome.__cause__ = exc
        except BaseException as exc:
            outcome = call.ended or PromptError("CancelledError", "the call was cancelled from within")
            ours = call.task.cancelling() <= cancelled + (call.ended is not None)
            if not ours or not isinstance(exc, asyncio.CancelledError):
                raise
        finally:
            del self._calls[call.task]
            if call.ended is not None:
                call.task.uncancel()
            self.limiter.settle(call, outcome)
        return outcome

    async def look_up(self, path: str) -> Any:
        """Return the document at a path of the API: beside the run, outside its limits, tried once.

        Raises what a call raises.
        """
        reply = await self._call(Prompt(0, None, path=path))
        return reply.extra["reply"]

    def _sweep(self) -> None:
        """End the calls that take too long, and look again as long as there are any."""
        now = self.clock()
        for call in self._calls.values():
            if now - call.started >= self._timeout:
                call.end(PromptError("timeout", f"no answer in {duration(self._timeout)}", "retry"))
        for call in self.patience.lost(self._calls.values(), now):
            took = f"no answer in {duration(now - call.started)}"
            call.end(PromptError("lost", f"{took}; the slowest took {duration(self.patience.slowest)}", "retry"))
        oldest = next((call.started for call in self._calls.values() if call.ended is None), now)
        if self._calls:
            self._later("sweep", max(0.001, min(self.SWEEP, oldest + self._timeout - now)), self._sweep)
        else:
            self._timers.pop("sweep", None)

    def _end(self) -> None:
        """End the run, and what is in flight."""
        reason = PromptError("deadline", f"the deadline of {duration(self._deadline)} is over", "stop")
        self.stop(reason)
        for call in self._calls.values():
            call.end(reason)
        for task in self._wrapping - self._calls.keys() - self._resting:
            self._wrapping.discard(task)
            task.cancel()

    async def _back_off(self, failure: PromptError, result: Result) -> bool:
        """Wait before the next attempt; return False where the run was stopped meanwhile."""
        wait, asked = self.wait_after(failure, result.attempts), self.clock()
        log.info("%s: %s; attempt %d in %s", result.id, failure, result.attempts + 1, duration(wait))
        self._backing_off[result.prompt.number] = asked + wait
        try:
            awake = await self.wait_or_stop(self.sleep(wait))
        finally:
            del self._backing_off[result.prompt.number]
        result.retry_wait += self.clock() - asked
        return awake is not None

    def wait_after(self, failure: PromptError, attempts: int) -> float:
        """Return the seconds to wait after so many attempts, the last of which has failed so."""
        at_once = failure.kind == "lost" or (failure.kind == "connection_error" and attempts == 1)
        wait = 0.0 if at_once or failure.again else backoff(attempts)
        if self._answered > self.clock() - 5 and not (failure.slow and self.limiter.busy):
            wait /= 4  # others are answered meanwhile: there is little to wait for
        told = failure.wait or 0.0
        if told > PAUSE_CEILING:
            text = f"the server asks to wait {duration(told)}; trying again in {PAUSE_CEILING:.0f} s"
            self.warn_once("wait", text)
        return wait + min(told, PAUSE_CEILING)

    async def wait_or_stop(self, waiting: Awaitable[T]) -> T | bool | None:
        """Await something that `stop` may cut short; return what it gave (True for nothing), or None when stopped."""
        task = asyncio.current_task()
        assert task is not None
        if self.stopped:
            if asyncio.iscoroutine(waiting):
                waiting.close()
            return None
        self._resting.add(task)
        cancelled = task.cancelling()
        try:
            found = await waiting
            return True if found is None else found
        except asyncio.CancelledError:
            if self.stopped and task not in self._resting and task.uncancel() <= cancelled:
                return None
            raise
        finally:
            self._resting.discard(task)

    def stop(self, reason: PromptError) -> None:
        """Admit nothing more, wake what waits, and let the calls in flight finish."""
        if self.stopped is None and self._calls and reason.kind != "interrupted":
            log.warning("stopping (%s): %s in flight may finish", reason, plural(len(self._calls), "call"))
        self.stopped = self.stopped or reason
        while self._resting:
            self._resting.pop().cancel()

    def stop_error(self) -> PromptError:
        """Return the reason of the stop, to be raised: the same exception would gather every frame that it passes."""
        assert self.stopped
        return PromptError(*self.stopped.error[:2], "stop", self.stopped.error.status)

    def not_sent(self) -> Error:
        """Return the error of a prompt that a stopped run never sent."""
        return Error("not_sent", f"the run was stopped: {self.stopped}", None, True)

    def warn_once(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            log.warning(text)


Record = Callable[[Result], Awaitable[None] | None]


async def _record(run: Run, record: Record, result: Result) -> None:
    waiting = record(result)
    if waiting is not None:
        await waiting
    for listener in run.listeners:
        try:
            listener(result)
        except Exception as failure:
            run.stop(extra_failure(listener, failure))


async def _work(way: Any, run: Run, items: Iterable[Any], record: Record) -> None:
    """Answer the user's own prompts in that way; those that a stopped run never sent get a Result too.

    Not those that an iterator has not yielded by then: there may be no end to them.
    """
    prompts = as_prompts(items)
    await way(run, prompts, record)
    for prompt in prompts if isinstance(items, Sized) else ():
        await asyncio.sleep(0)  # there may be many
        await _record(run, record, Result(prompt, error=run.not_sent(), done=False))


# ---- Journal -------------------------------------------------------------------------------------------------


# Lines of ours hold at most a reply's body (MAX_BODY in backends/__init__.py) twice, as JSON, and the prompt's columns.
RESULT_MOST = 1 << 30  # bytes: what is longer is none
LINE_START = b'{"id":'  # of every line of ours: what was cut shorter than that may still be one


class Journal:
    """The results file: a line is appended as soon as a prompt is done, so that nothing answered is ever lost.

    Opening one that exists continues it: `left` passes over the prompts that it already holds. `finish` puts the
    lines into the input's order by an atomic replace; results of prompts that are no longer in the input, or were
    asked otherwise, go to FILE.superseded.jsonl, since they were paid for. Raises UsageError where the file cannot be
    written or holds something else. To `look` writes and locks nothing.
    """

    def __init__(
        self,
        path: pathlib.Path,
        *,
        overwrite: bool = False,
        retry_failed: bool = False,
        look: bool = False,
    ) -> None:
        self.path = path
        self.kept = 0  # answers of an earlier run
        self.kept_errors: list[Error] = []
        self._retry_failed = retry_failed
        self._earlier: dict[str, list[int]] = {}  # by the request's fingerprint, where its lines stand
        self._lines: dict[int, tuple[Any, str, Error | None]] = {}  # by where it stands: a line's id, row and error
        # Where each prompt's line begins, by its number, and 1 more: 0 is nowhere yet. Four bytes, while they will do.
        self._offsets = array.array("I")
        self._changed: dict[int, Prompt] = {}  # those whose place or columns are no longer as their line has them
        self._outdone: list[int] = []  # where the texts stand that did not fit and are asked for again
        self._claimed: set[tuple[str, Any]] = set()  # request and id of the lines that were, where there are more
        self._torn = overwrite  # what the file holds after the lines that count is to go
        if kind := other_than_file(path):
            what = f"{path} is not a file that can be continued but {kind}"
            raise UsageError(f"{what}; choose another with -o (- is stdout)")
        if not look:
            check_beside(path)
        try:
            self._file: IO[bytes] = open_regular(path, "rb" if look else "a+b", buffering=0)
        except OSError as failure:
            raise UsageError(f"cannot write {path}: {failure.strerror}; choose another file with -o") from None
        if not look and not lock(self._file, path):
            self._file.close()
            raise UsageError(f"another run is writing {path}; wait for its end, or choose another file with -o")
        self._size = self._synced = 0 if overwrite else self._load()
        self.answers = sum(error is None for _, _, error in self._lines.values())  # that were there before

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *failure: Any) -> None:
        if not self._file.closed and self._file.writable():
            try:
                self.attend()
            except OSError:
                self._rescue()
            with contextlib.suppress(OSError):
                self.sync()
        self._file.close()

    def _load(self) -> int:
        """Index the lines that are there; return the size without a last line that was cut short."""
        size, damaged = 0, 0
        line = b""
        with open(os.dup(self._file.fileno()), "rb") as lines:
            lines.seek(0)
            for number, line in enumerate(iter(functools.partial(lines.readline, RESULT_MOST), b""), 1):
                if len(line) == RESULT_MOST:
                    self._refuse(number)
                text = line.strip(b"\0\r\n ")  # what an editor or a power cut may leave
                if (row := parse_json(text)) is not None:
                    self._recognise(row, number, size + line.index(text))
                elif text and not LINE_START.startswith(text[: len(LINE_START)]):
                    self._refuse(number)
                elif text and line.endswith(b"\n"):
                    damaged = damaged or number
                    self._lines[size] = None, "", None
                elif text:  # the last one, cut short
                    break
                size += len(line)
        if damaged and not self._earlier:
            self._refuse(damaged)
        if damaged:
            log.warning("%s line %d is damaged: what it answered is asked again", self.path, damaged)
        if not self._file.writable():
            return size
        if size < os.fstat(self._file.fileno()).st_size:
            self._file.truncate(size)
        elif size and not line.endswith(b"\n"):  # only its end was cut off
            self._file.write(b"\n")
            size += 1
        return size

    def _recognise(self, row: Any, number: int, offset: int) -> None:
        """Note a result line's fingerprint, id and error."""
        try:
            row_id, key, error = recognised(row)
        except ValueError:
            self._refuse(number)
        self._earlier.setdefault(key[:16], []).append(offset)
        self._lines[offset] = row_id, key[16:], error

    def _refuse(self, number: int) -> NoReturn:
        self._file.close()
        what = f"{self.path} holds something other than results in line {number}"
        raise UsageError(f"{what}; mend that, choose another file (-o), or give it up (--overwrite)")

    def check(self, prompts: Iterable[Prompt], source: str) -> None:
        """Raise UsageError where the file holds answers, and all of them are to other prompts than these."""
        rows = {row for _, row, error in self._lines.values() if error is None}
        keys = map(fingerprint, prompts)
        if not rows or any(key[:16] in self._earlier or key[16:] in rows for key in keys):
            return
        what = f"{self.path} holds the answers of another job: none belongs to {source}"
        raise UsageError(f"{what}; choose another file (-o), or give them up (--overwrite)")

    def left(self, prompts: Iterable[Prompt]) -> Iterator[Prompt]:
        """Yield the prompts that have no line yet; count the others as kept."""
        for prompt in prompts:
            self._offsets.append(0)
            key = fingerprint(prompt) if self._earlier else ""
            earlier = self._earlier.get(key[:16])
            if not earlier:
                yield prompt
                continue
            answered = (offset for offset in earlier if self._lines[offset][2] is None)
            offset = next(answered, earlier[-1])  # an answer before a failure
            earlier.remove(offset)
            row_id, row, error = self._lines.pop(offset)
            if earlier:
                self._claimed.add((key[:16], row_id))
            if prompt.error or (error and self._retry_failed):
                self._outdone += [offset] if error and error.type == MISMATCH else []
                yield prompt
                continue
            self._place(prompt.number, offset)
            if row_id != prompt.id or row != key[16:]:
                self._changed[prompt.number] = prompt
            self.kept += error is None
            self.kept_errors += [error] if error else []

    def append(self, result: Result) -> None:
        """Write a result's line. Raises OSError where the disk will not take it; then no part of it counts."""
        if self._torn:
            self._file.truncate(self._size)
        self._torn = True
        line = rest = result.as_line()
        try:
            while rest:
                rest = rest[self._file.write(rest) or 0 :]
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(self._size)
            raise
        self._torn = False
        self._place(result.prompt.number, self._size)
        self._size += len(line)

    def _place(self, number: int, offset: int) -> None:
        try:
            self._offsets[number] = offset + 1
        except OverflowError:  # from 4 GiB on
            self._offsets = array.array("Q", self._offsets)
            self._offsets[number] = offset + 1

    def attend(self) -> None:
        """See that the file is there: where somebody has removed it, go on in a new one with all that it held.

        Raises OSError where there can be none, or another file has taken its place.
        """
        with contextlib.suppress(FileNotFoundError):
            if not os.path.samestat(os.fstat(self._file.fileno()), self.path.stat()):
                raise FileExistsError(errno.EEXIST, "another file has taken its place")
            return
        number = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL, mode_of(self._file.fileno()))
        new = open(number, "a+b", buffering=0)  # noqa: SIM115 - closed by __exit__
        self._copy(new)
        lock(new, self.path)
        self._file.close()
        self._file, self._synced = new, 0
        log.warning("%s was removed or renamed; going on in a new one, which holds all answers", self.path)

    def _copy(self, file: IO[bytes]) -> None:
        with open(os.dup(self._file.fileno()), "rb") as lines:
            lines.seek(0)
            shutil.copyfileobj(lines, file)

    def _rescue(self) -> None:
        """Write the answers beside a file that has taken their place, where that is possible."""
        place = beside_results(self.path, "rescued")
        try:
            with open_beside(place, self._file.fileno()) as file:
                self._copy(file)
            log.warning("the answers are in %s", place)
        except OSError as failure:
            log.warning("the answers could not be written to %s: %s", place, failure.strerror)

    def sync(self) -> None:
        """Bring to the disk what was written since the last time. Raises OSError where that fails."""
        size = self._size  # `append` may go on meanwhile
        if size != self._synced:
            os.fsync(self._file.fileno())
            self._synced = size

    def finish(self, whole: bool = True) -> None:
        """Put the complete file into the input's order, all of it or nothing.

        Raises OSError where that cannot be. Not `whole`: only the first prompts of the input were asked for, so that
        the other lines stay in the file.
        """
        self.attend()
        self.sync()
        try:
            with replacing(self.path) as file:
                with open(os.dup(self._file.fileno()), "rb") as lines:
                    file.writelines(self._ordered(lines))
                    stale = [line_at(lines, offset) for offset in self._stale(whole)]
                if not whole:
                    file.writelines(stale)
                elif stale:
                    flush(file)
                    self._set_aside(stale)
                if sys.platform == "win32":  # replaces no open file
                    self._file.close()
            self._file.close()  # and with it the lock
        except OSError as failure:
            if failure.errno not in (errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM):
                raise
            log.warning("%s cannot be put into the input's order (%s); it is complete", self.path, failure.strerror)

    def results(self, prompts: Iterable[Prompt]) -> Iterator[Result]:
        """Yield what is known of each prompt of the whole input: an answer, a failure, or that it is still open."""
        rest: dict[str, Iterator[int]] = {}  # by the fingerprint, the lines of prompts that this run has not reached
        with open(os.dup(self._file.fileno()), "rb") as lines:
            for prompt in prompts:
                key = fingerprint(prompt)[:16]
                if prompt.number < len(self._offsets):
                    offset = self._offsets[prompt.number] - 1
                else:
                    if key not in rest:  # an answer before a failure, as in `left`
                        places = self._earlier.get(key, ())
                        rest[key] = iter(sorted(places, key=lambda place: self._lines[place][2] is not None))
                    offset = next(rest[key], -1)
                found = result_in(line_at(lines, offset), prompt, key) if offset >= 0 else None
                yield found or Result(prompt, error=OPEN, done=False)

    def _ordered(self, lines: IO[bytes]) -> Iterator[bytes]:
        end = lines.seek(0)  # of the line before
        for number, place in enumerate(self._offsets):
            offset = place - 1
            line = lines.readline() if offset == end else line_at(lines, offset)
            end = offset + len(line)
            yield renewed(line, self._changed[number]) if number in self._changed else line

    def _stale(self, answers: bool) -> list[int]:
        """Return where the lines (or only the answers) stand that belong to nothing in the input."""
        places = {offset for offset, (_, _, error) in self._lines.items() if error is None or error.type == MISMATCH}
        places.update(self._outdone)
        if not answers:
            for key, offsets in self._earlier.items():
                last = {self._lines[offset][0]: offset for offset in offsets}  # of those with an id
                newer = {self._lines[offset][0] for offset in offsets if offset in places}
                places.update(last[row_id] for row_id in last.keys() - newer if (key, row_id) not in self._claimed)
        return sorted(places)

    def _set_aside(self, lines: list[bytes]) -> None:
        place = beside_results(self.path, "superseded")
        with open_beside(place, self._file.fileno()) as file:
            file.writelines(lines)
            flush(file)
        log.warning("%s to what is no longer asked moved to %s", plural(len(lines), "answer"), place)


BESIDE = "superseded", "rescued", "spent", "running"


def beside_results(results: pathlib.Path, what: str) -> pathlib.Path:
    """Return where something is kept beside a results file: one of BESIDE, or "tmp", the draft of a new one."""
    if what in ("superseded", "rescued"):
        return results.with_name(f"{results.stem}.{what}{results.suffix}")
    return results.with_name(f".{results.name}.tmp" if what == "tmp" else f"{results.name}.{what}")


def check_beside(results: pathlib.Path) -> None:
    """Raise UsageError where something stands in the place of a file that is written beside the results."""
    owner = results if results.exists() else pathlib.Path(os.path.realpath(results)).parent
    for path in (beside_results(results, what) for what in BESIDE):
        try:
            reason = other_than_file(path, links=False) or foreign(path.lstat(), owner.stat())
        except FileNotFoundError:
            continue
        if reason:
            raise UsageError(f"{path} is {reason}; remove it, or choose another results file with -o")
    for path in (results, beside_results(results, "spent")):
        if why := unwritable_draft(path):
            raise UsageError(f"{why}, or choose another results file with -o")


def foreign(file: os.stat_result, results: os.stat_result) -> str:
    """Return "somebody else's file" if a file belongs to neither this user nor the owner of the results; or ''."""
    ours = not hasattr(os, "geteuid") or file.st_uid in (os.geteuid(), results.st_uid)
    return "" if ours else "somebody else's file"


def unwritable_draft(path: str | os.PathLike[str]) -> str:
    """Return why no draft can be written for a file, and what to do; or ''."""
    draft = beside_results(pathlib.Path(os.path.realpath(path)), "tmp")
    return f"{draft} is a directory; remove it" if draft.is_dir() and not draft.is_symlink() else ""


def mode_of(*files: str | os.PathLike[str] | int | None) -> int:
    """Return the permissions that all of these files give, those left out that are not there; of none, the usual."""
    mode = 0o666
    for file in files:
        if file is not None:
            with contextlib.suppress(FileNotFoundError):
                mode &= os.stat(file).st_mode
    return mode


def open_beside(path: pathlib.Path, results: str | os.PathLike[str] | int) -> IO[bytes]:
    """Open a file beside the results to append to it, with no wider permissions than those of the results.

    Raises OSError, with a sentence, where that cannot be. No link is followed.
    """
    like = os.stat(results)
    try:
        file: IO[bytes] = open_regular(path, "ab", mode=like.st_mode & 0o666, links=False)
    except OSError as failure:
        kind = other_than_file(path, links=False)
        reason = f"{path} is {kind}; remove it" if kind else f"{path}: {failure.strerror}"
        raise OSError(failure.errno, reason) from None
    now = os.fstat(file.fileno())
    if now.st_mode & ~like.st_mode & 0o777 and hasattr(os, "fchmod"):  # it was there before
        with contextlib.suppress(PermissionError):  # then it is somebody else's
            os.fchmod(file.fileno(), now.st_mode & like.st_mode & 0o777)
    if foreign(now, like):
        file.close()
        raise OSError(errno.EPERM, f"{path} is somebody else's file; remove it")
    return file


def read_results(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield where each line of a results file stands, and its row; what is no result is passed over."""
    offset = 0
    with open_regular(path) as lines:
        for line in iter(functools.partial(lines.readline, RESULT_MOST), b""):
            row = parse_json(line.strip(b"\0\r\n "))
            with contextlib.suppress(ValueError):
                recognised(row)
                yield offset, row
            offset += len(line)


def recognised(row: Any) -> tuple[Any, str, Error | None]:
    """Return the id, the fingerprint and the error of a result's line. Raises ValueError where it is none.

    This is the one look at what somebody may have put there: what it lets pass, nothing else stumbles over.
    """
    try:
        own = "request" in row
        key, error, row_id = key_in(row), error_in(row), row["id" if own else "custom_id"]
        # orjson reads a whole number of more than 64 bits as a float.
        named = isinstance(row_id, str) or type(row_id) is int or (type(row_id) is float and abs(row_id) >= 2**63)
        sound = error is None or [*map(type, (error.type, error.message, error.retryable))] == [str, str, bool]
        status = error and error.status
        if not named or not sound or type(status) not in (int, type(None)) or (own and "text" not in row):
            raise ValueError
        if not re.fullmatch("[0-9a-f]{24}", key):
            raise ValueError
        return row_id, key, error
    except (AttributeError, KeyError, TypeError) as failure:
        raise ValueError from failure


def key_in(row: dict[str, Any]) -> str:
    """Return the fingerprint in a result's line; only in a Batch output line is it part of the id."""
    key: str = row["request"] if "request" in row else row["id"].removeprefix("batch_req_")
    return key


def error_in(row: dict[str, Any]) -> Error | None:
    """Return the error in a result's line, or None; that of a Batch output line without its message."""
    if "request" in row:
        return None if row["error"] is None else Error(**row["error"])
    status = (row["response"] or {}).get("status_code")
    if status == 200 and not row["error"]:
        return None
    return Error((row["error"] or {}).get("code") or f"http_{status}", "", status)


class Notes:
    """What a bulk backend has running elsewhere for a results file: lines in FILE.running, each on the disk at once.

    Raises UsageError where another backend has something running for that file.
    """

    def __init__(
        self, results: pathlib.Path | None = None, backend: str = "", overwrite: bool = False, answered: int = 0
    ) -> None:
        self.answered, self.stay = answered, False  # by earlier runs; whether it stays when all is answered
        self.path = results and beside_results(results, "running")
        self._results = results
        self.kept: list[Any] = []
        self._backend = {"backend": backend}
        if self.path is None or not self.path.exists():
            return
        if overwrite:
            log.warning("%s is given up, and with it what an earlier run has running", self.path)
            return self.remove()
        with open_regular(self.path, links=False) as file:  # Journal has looked whether it is one
            *lines, torn = file.read().split(b"\n")
        first, *self.kept = [*map(parse_json, lines)] or [self._backend]
        if not all(isinstance(value, dict) for value in (first, *self.kept)) or type(first.get("backend")) is not str:
            raise UsageError(f"{self.path} is damaged; mend it, or remove it to give up what is running")
        if (other := first["backend"]) != backend:
            what = f"{self.path}: {other} has something running for these results"
            raise UsageError(f"{what}; go on with -b {other}, or remove that file to give it up")
        if torn:
            os.truncate(self.path, sum(len(line) + 1 for line in lines))

    def add(self, value: Any) -> None:
        """Keep a value. Raises OSError where the disk will not take it."""
        self.kept.append(value)
        if self.path and self._results:
            with open_beside(self.path, self._results) as file:
                file.writelines(dump(line) + b"\n" for line in ([] if file.tell() else [self._backend]) + [value])
                flush(file)

    def remove(self) -> None:
        """Forget all: nothing is running any longer."""
        self.kept.clear()
        if self.path:
            self.path.unlink(missing_ok=True)


NO_TEXTS = ("texts", "embedding", "reply")  # where an answer is that is not one text
OPEN = Error("not_answered", "not asked yet, or the run was stopped", None, True)


def result_in(line: bytes, prompt: Prompt, key: str) -> Result | None:
    """Return the prompt's result from its line, without clocks and counts; None where the line is another request's.

    It may be, if the input was changed while the run went on.
    """
    row = parse_json(line)
    try:
        _, found, error = recognised(row)
    except ValueError:  # the file was changed
        return None
    if found[:16] != key:
        return None
    if "request" in row:
        extra = {name: value for name, value in own_part(row).items() if name in NO_TEXTS}
        return Result(prompt, row["text"], error, extra=extra)
    with contextlib.suppress(AttributeError, IndexError, KeyError, TypeError):  # what a damaged line may hold
        body: Any = (row["response"] or {}).get("body")
        if error is None:
            text, _, extra = READERS.get(prompt.path.partition("?")[0], other_reply)(body)
            return Result(prompt, text, extra=extra)
        message = row["error"]["message"] if row["error"] else error_of(body)[1]
        return Result(prompt, error=error._replace(message=message))
    return None


def renewed(line: bytes, prompt: Prompt) -> bytes:
    """Return a result's line with the id and the columns that its prompt has by now."""
    try:
        row = json.loads(line)  # and not `load`, to which long numbers are floats
    except (ValueError, RecursionError):  # deeper than it goes
        return line
    if "request" not in row:  # a Batch output line
        return line
    row = own_part(row) | {"id": prompt.id, "request": fingerprint(prompt)}
    return to_line(row | beside([*row, *AT_TIMES], prompt.columns))


def lock(file: IO[bytes], path: pathlib.Path) -> bool:
    """Take the file for this process until it is closed; return False where another has it, or has replaced it."""
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(2**40)  # a lock keeps even readers from a byte, so it is one that is not there
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as failure:
        if isinstance(failure, BlockingIOError) or failure.errno in (errno.EACCES, errno.EDEADLK):
            return False  # else a file system without locks
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())


def line_at(file: IO[bytes], offset: int) -> bytes:
    """Return the line that begins at the offset."""
    file.seek(offset)
    return file.readline()


def flush(file: IO[bytes]) -> None:
    """Bring the file to the disk."""
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], *like: str | os.PathLike[str], side: bool = False) -> Iterator[IO[bytes]]:
    """Open a draft that takes the file's place in the end, whole or not at all. A link stays a link.

    It has the permissions of the file that was there, else no wider ones than those that are `like` it. One at the
    `side` of these has no wider ones in any case, and takes the place of a link.
    """
    target = pathlib.Path(path if side else os.path.realpath(path))
    draft = beside_results(target, "tmp")
    replaced = not side and target.exists()
    with contextlib.suppress(FileNotFoundError):
        draft.unlink()  # it may be a link that somebody has laid
    try:
        with open_regular(draft, "xb", mode=mode_of(*([target] if replaced else like)), links=False) as file:
            yield file
            flush(file)
        if replaced:
            with contextlib.suppress(FileNotFoundError):
                shutil.copymode(target, draft)  # where the umask has taken more
        os.replace(draft, target)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


# ---- Other forms of the results ------------------------------------------------------------------------------


def answer_of(result: Result) -> Any:
    """Return the answer: a text, or else all of several, the vectors, or the whole reply."""
    return next((result.extra[name] for name in NO_TEXTS if name in result.extra), result.text)


def cell(value: Any) -> str:
    """Return what stands in a table for a value: a text as it is, anything else as JSON."""
    return value if isinstance(value, str) else "" if value is None else to_line(value).decode().rstrip("\n")


def wrapped(line: str, width: int) -> list[str]:
    """Return the line in parts of so many columns; a word or an address that is longer stays whole."""
    indent = " " * (len(line) - len(line.lstrip()))
    whole = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.wrap(line, width, subsequent_indent=indent, **whole) or [line]  # type: ignore[arg-type]


class Printer:
    """A journal's stand-in for standard output, where nothing can be kept: results in the input's order, as they can.

    `form` makes of each what is printed, after the `head`.
    """

    kept = answers = 0
    kept_errors: tuple[Error, ...] = ()
    path = None
    left = staticmethod(iter)  # all the prompts

    def __init__(self, form: Callable[[Result], bytes] = Result.as_line, head: bytes = b"") -> None:
        self._form = form
        self._early = {-1: head}
        self._next = -1

    def __enter__(self) -> "Printer":
        return self

    def __exit__(self, kind: Any, *failure: Any) -> None:
        if kind is None or not issubclass(kind, OSError | UsageError):
            for _, lines in sorted(self._early.items()):  # the run was stopped: what is there, with gaps
                self._write(lines)

    def append(self, result: Result) -> None:
        """Print a result once all before it are printed."""
        self._early[result.prompt.number] = self._form(result)
        while self._next in self._early:
            self._write(self._early.pop(self._next))
            self._next += 1

    def check(self, *given: Any, **options: Any) -> None:
        """Do nothing: nothing was there before, and nothing can be brought to a disk or put into order."""

    attend = sync = finish = check

    def _write(self, lines: bytes) -> None:
        if sys.stdout.isatty():  # in JSON an escape is the same text
            lines = visible(lines.decode().expandtabs()).encode()
        sys.stdout.buffer.write(lines)
        sys.stdout.buffer.flush()


# ---- Sequential run ------------------------------------------------------------------------------------------


async def sequentially(run: Run, prompts: Iterable[Prompt], record: Record) -> None:
    """Answer one prompt after the other: it takes the sum of the latencies."""
    if run.bulk:
        raise UsageError(f"{run.bulk.name} answers in bulk, not one at a time")
    for prompt in run.admit(prompts):
        await _record(run, record, await run.answer(prompt))


async def run_sequential(
    prompts: Iterable[Any], send: Any, *, return_exceptions: bool = True, **options: Any
) -> list[Result]:
    """Answer the prompts one by one; return their Results in input order. The baseline: arguments as `run`'s."""
    return await _collect(sequentially, prompts, send, return_exceptions, **options | {"concurrency": 1})


# ---- Concurrent run ------------------------------------------------------------------------------------------


async def concurrently(run: Run, prompts: Iterable[Prompt], record: Record) -> None:
    """Answer prompts side by side: N workers pull from one iterator, so that it takes about the slowest latency."""
    if run.bulk:
        return await in_bulk(run, run.bulk, prompts, record)
    admitted = run.admit(prompts)

    async def worker(prompt: Prompt | None) -> None:
        while prompt is not None:
            await _record(run, record, await run.answer(prompt))
            prompt = next(admitted, None)

    workers = []
    try:
        for prompt in itertools.islice(admitted, run.concurrency):
            workers.append(asyncio.ensure_future(worker(prompt)))
        await asyncio.gather(*workers)
    finally:  # after an error gather leaves the others running
        for task in workers:
            task.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


async def run_concurrent(
    prompts: Iterable[Any], send: Any, *, return_exceptions: bool = True, **options: Any
) -> list[Result]:
    """Answer the prompts concurrently; return their Results in input order. Arguments as `run`'s."""
    return await _collect(concurrently, prompts, send, return_exceptions, **options)


@dataclasses.dataclass(slots=True, eq=False)
class Request:
    """What a bulk backend is to answer."""

    prompt: Prompt  # as it is asked now
    result: Result
    model: str | None = None
    taken: float = 0.0  # when
    most: tuple[float, float] = 0.0, 0.0  # what is reserved for it in the budget

    @property
    def path(self) -> str:
        """The path below the base URL."""
        return self.prompt.path

    @property
    def body(self) -> bytes:
        """The request, as JSON."""
        return self.prompt.body

    def line(self, custom_id: str) -> bytes:
        """Return it as a line of a file of Batch requests."""
        return request_line(custom_id, self.path.partition("?")[0], self.body)

    @property
    def key(self) -> str:
        """What the request is recognised by in a later run; the same one asked twice has it twice."""
        return fingerprint(self.result.prompt)[:16]


class Job:
    """What a bulk backend works on; what it may use of it is in the contract in backends/__init__.py."""

    def __init__(self, run: Run, api: Api, prompts: Iterable[Prompt], record: Record) -> None:
        self.api, self.base_url, self.headers = api, api.base_url, api.headers
        self.options = run.options | {"cluster": api.cluster, "worker_backend": api.worker_backend}
        self.core = sys.modules[__name__]  # which may be __main__, or have another name
        self.limiter, self.log, self.query = run.limiter, log, api.whole_query()
        self.answered, self.noted_in = (run.notes.answered, run.notes.path) if run.notes else (0, None)
        self._run, self._record, self._kept = run, record, run.notes or Notes()
        self._budget = run.extra("budget")
        self._fresh = run.admit(prompts)
        self._again: collections.deque[Request] = collections.deque()  # what has failed, to be taken again,
        self._since = self._due = -math.inf  # the first of it since when, and all of it together from when on
        self._calls = run.options["max_attempts"] if getattr(api.submit, "retries", False) else 1  # for a request
        self.broken: OSError | None = None  # what came of an attempt to record a result
        self._counted = False  # by the backend itself: the calls in flight
        self._held: Request | None = None  # for which the last block had no room
        self._open: set[Request] = set()

    @property
    def stopped(self) -> str:
        """Why the run is to end ("interrupted", "deadline", ...), or ''."""
        return self._run.stopped.error.type if self._run.stopped else ""

    def stop(self, kind: str, message: str, status: int | None = None) -> None:
        """Stop the run, since every prompt would fail."""
        kind, message = self.api.conceal(kind[:MESSAGE_MOST]), self.api.conceal(message[:MESSAGE_MOST])
        self._run.stop(PromptError(short(kind, 60), short(message, 1000), "stop", status))

    @property
    def notes(self) -> Sequence[Any]:
        """What this run and the ones before it have noted."""
        return self._kept.kept

    async def note(self, value: Any) -> None:
        """Keep a note on the disk. Raises PromptError where that will not take it."""
        try:
            await asyncio.to_thread(self._kept.add, value)
        except OSError as failure:
            raise disk_error(self._kept.path, failure) from None

    def keep_notes(self) -> None:
        """Let the notes stay when all is answered: something is running that nobody has asked for here."""
        self._kept.stay = True

    def forget(self) -> None:
        """Remove all notes: nothing is running elsewhere any longer."""
        self._kept.remove()

    def say(self, text: str) -> None:
        """Show in the progress what is waited for."""
        self._run.said = text

    def in_flight(self, count: int | None = None) -> None:
        """Note how many calls are in flight; all that is taken, where the backend does not know better."""
        self._counted = self._counted or count is not None
        if count is not None or not self._counted:
            self.limiter.in_flight = len(self._open) if count is None else count
            self._run.most_in_flight = max(self._run.most_in_flight, self.limiter.in_flight)

    async def sleep(self, seconds: float) -> bool:
        """Sleep, less long where the run is stopped; return whether it was to the end."""
        return await self._run.wait_or_stop(self._run.sleep(seconds)) is not None

    async def call(
        self, function: Callable[..., Awaitable[T]], *args: Any, attempts: float = math.inf, **more: Any
    ) -> T:
        """Await a call, again where that may help. Raises PromptError."""
        for attempt in itertools.count(1):
            try:
                return await function(*args, **more)
            except Exception as exc:
                failure = self.api.discreet(exc)
            wait = self._run.wait_after(failure, attempt)
            if failure.verdict != "retry" or attempt >= attempts:
                raise failure
            log.log(logging.WARNING if attempt == 3 else logging.INFO, "%s; trying on", failure)
            if not await self.sleep(wait):
                raise failure
        raise AssertionError

    async def take(self, count: int, size: float = math.inf) -> list[Request]:
        """Return the next requests: at most so many, of so many bytes together, but one at least if there is any."""
        taken: list[Request] = []
        while not self.stopped and len(taken) < count:
            request = await self._next()
            if request is None:
                if taken or self._open or not self._again:
                    break
                await self.sleep(self._due - self._run.clock())
            elif (taken and len(request.body) > size) or not self._reserve(request):
                self._held = request
                break
            else:
                self._send_out(request)
                taken.append(request)
                size -= len(request.body)
        return taken

    async def _next(self) -> Request | None:
        """Return what is to be asked again by now, or else the next prompt; None where there is neither."""
        if held := self._held:
            self._held = None
            return held
        if self._again and self._due <= self._run.clock():
            return self._again.popleft()
        for number, prompt in enumerate(self._fresh):
            prompt.error = prompt.error or self.unpaid(prompt)
            if number % 100 == 99:
                await asyncio.sleep(0)
            if prompt.error is None:
                return Request(prompt, Result(prompt), self.api.model_of(prompt))
            try:
                await _record(self._run, self._record, Result(prompt, error=prompt.error))
            except OSError as failure:
                self.broken = failure
                raise
        return None

    def unpaid(self, prompt: Prompt) -> Error | None:
        """Return why a prompt cannot be sent within a budget, or None."""
        if not self._budget or not prompt.body:
            return None
        name, price = self._budget.price_for(prompt)
        if price is None:
            return Error("unknown_price", f"{prompt.where}: no price is known for {short(name, 60)}")
        text = f"with --max-cost {self.api.name} needs a maximum for the answer (-p max_completion_tokens=N)"
        return Error("no_maximum", f"{prompt.where}: {text}") if self._budget.most_of(prompt.body, price)[1] else None

    def _reserve(self, request: Request) -> bool:
        """Reserve in the budget, if there is one, what the request may cost; stop the run if that can never be."""
        budget = self._budget
        if budget is None:
            return True
        most, _ = budget.most_of(request.prompt.body, budget.price_for(request.prompt)[1])
        request.most = most * self._calls, 0.0
        if budget.admit(request.most):
            return True
        if not self._open:
            self._run.stop(budget.used_up(request.most))
        return False

    def _send_out(self, request: Request) -> None:
        request.taken = now = self._run.clock()
        result = request.result
        result.started = result.started or self._run.epoch + now
        result.retry_wait = self._run.epoch + now - result.started - result.lost
        self._open.add(request)
        self._run.open[request.prompt.number] = result
        self.in_flight()

    def _put_back(self, request: Request, wait: float) -> None:
        now = self._run.clock()
        self._since = self._since if self._again else now
        self._again.append(request)
        self._due = min(max(self._due, now + wait), self._since + PAUSE_CEILING)

    async def settle(self, request: Request, outcome: Any) -> None:
        """Take down what came of a request: it is answered, has failed, or is to be taken again."""
        if not isinstance(request, Request) or request not in self._open:
            return self.stop("twice", f"{self.api.name} has answered a prompt twice, or one that was not given out")
        self._open.remove(request)
        self.in_flight()
        if isinstance(outcome, Result):
            outcome.prompt = request.result.prompt
            del self._run.open[request.prompt.number]
            self._pay(request, outcome, None)
            return await _record(self._run, self._record, outcome)
        result, run = request.result, self._run
        result.latency = run.clock() - request.taken
        failure = await self._read(request, outcome)
        del self._run.open[request.prompt.number]
        self._pay(request, result, failure)
        if failure is None or run.has_failed(result, failure):
            return await _record(self._run, self._record, result)
        if run.stopped:
            return await _record(self._run, self._record, run.unfinished(result))
        if failure.again:
            request.prompt = dataclasses.replace(request.prompt, body=failure.again)
        result.set_aside(result.waited(), result.latency)
        self._put_back(request, run.wait_after(failure, result.attempts))

    async def _read(self, request: Request, outcome: Any) -> PromptError | None:
        """Fill in the answer; return what there is instead of one."""

        async def told(prompt: Prompt) -> Reply:
            request.result.attempts += 1
            try:
                if isinstance(outcome, Exception):
                    raise outcome
                return self.api.read(prompt, *outcome)
            except Exception as exc:
                raise self.api.discreet(exc) from None

        return await self._run.take(self._run.wrapped(told, without="budget"), request.prompt, request.result)

    def _pay(self, request: Request, result: Result, failure: PromptError | None) -> None:
        """Put what a request has cost in the place of what was reserved for it."""
        budget = self._budget
        price = budget.price_for(request.prompt)[1] if budget else None
        if price is None:
            return
        cost, assumed, most = 0.0, False, request.most[0] / self._calls
        if failure:
            cost, assumed = budget.price_failure(failure, (most, 0.0), price)
        elif result.error is None:
            cost, assumed = budget.price_reply(request.prompt, result, (most, 0.0), price)
        if failure is None:  # a Result may have seen calls fail
            cost += budget.cost_of(result.lost_tokens, price) + result.unanswered * most
            assumed = assumed or result.unanswered > 0
        budget.settle(request.most, cost, assumed)

    def refund(self) -> None:
        """Give back what is reserved in the budget for requests of which none is in flight."""
        if self._budget and not self.limiter.in_flight:
            for request in self._open:
                self._budget.settle(request.most, 0.0)

    async def close(self) -> None:
        """End the run of what the backend has left unanswered."""
        rest = [*self._open, *self._again, *filter(None, [self._held])]
        results = [request.result for request in rest] + [Result(prompt) for prompt in itertools.islice(self._fresh, 1)]
        if results:
            self.stop("unanswered", f"{self.api.name} has ended and left {plural(len(results), 'prompt')} unanswered")
        for result in results:
            await _record(self._run, self._record, self._run.unfinished(result))


async def settle_all(run: Run, api: Api, job: Job, outcomes: AsyncIterator[Any]) -> None:
    """Take down what a bulk backend yields; where it fails, stop the run."""
    for answered in itertools.count():
        if answered % 50 == 49:
            await asyncio.sleep(0)  # there may be many at once
        try:
            request, outcome = await anext(outcomes)
        except StopAsyncIteration:
            return
        except (Exception, SystemExit) as exc:
            if exc is job.broken:  # our own output
                raise
            failure = api.discreet(exc if isinstance(exc, Exception) else RuntimeError("it has called sys.exit()"))
            if isinstance(exc, ValueError) and not answered and not run.stopped:
                raise UsageError(f"{api.name}: {failure}") from None
            kind = failure.error.type if isinstance(exc, PromptError) else "backend"
            return job.stop(kind, f"{api.name}: {failure}", failure.error.status)
        await job.settle(request, outcome)
        if job.stopped == "twice":
            return


async def in_bulk(run: Run, api: Api, prompts: Iterable[Prompt], record: Record) -> None:
    """Let a bulk backend answer the prompts in its own way."""
    job = Job(run, api, prompts, record)
    assert api.submit
    if (error := job.unpaid(run.first)) and error.type == "no_maximum":
        raise UsageError(f"--max-cost with {api.name} needs a maximum for each answer: -p max_completion_tokens=N")
    try:
        async with contextlib.aclosing(api.submit(job)) as outcomes:
            await settle_all(run, api, job, outcomes)
    finally:
        job.refund()
    await job.close()


async def _collect(way: Any, items: Iterable[Any], send: Any, return_exceptions: bool, **options: Any) -> list[Result]:
    results: list[Result] = []
    async with Run(send, **options) as run:
        await _work(way, run, items, lambda result: results.append(checked_result(result, return_exceptions)))
    return sorted(results, key=lambda result: result.prompt.number)


def checked_result(result: Result, return_exceptions: bool) -> Result:
    """Return the result. Raises its PromptError, if that is asked for."""
    if result.error is not None and not return_exceptions:
        raise result.exception or PromptError(*result.error[:2])
    return result


async def as_completed(
    prompts: Iterable[Any], send: Any, *, return_exceptions: bool = True, **options: Any
) -> AsyncIterator[Result]:
    """Yield the Results as the answers come, with no more than `concurrency` of them waiting to be taken.

    Arguments as `run`'s.
    """
    async with Run(send, **options) as run:
        results: asyncio.Queue[Result | None] = asyncio.Queue(run.concurrency)
        work = asyncio.ensure_future(_work(concurrently, run, prompts, results.put))

        async def close() -> None:
            await asyncio.wait([work])
            await results.put(None)

        end = asyncio.ensure_future(close())
        try:
            while (result := await results.get()) is not None:
                yield checked_result(result, return_exceptions)
            await work
        finally:
            work.cancel()
            end.cancel()
            await asyncio.gather(work, end, return_exceptions=True)


def run_loop(work: Coroutine[Any, Any, T]) -> T:
    """Run the coroutine on an event loop of its own: uvloop's where it is installed, else asyncio's."""
    new_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    with contextlib.suppress(ImportError):
        from uvloop import new_event_loop as new_loop
    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(work)


def run(prompts: Iterable[Any], send: Any, **options: Any) -> list[Result]:
    """Answer the prompts concurrently and return their Results in input order; works in a notebook too.

    `prompts` are texts, or objects as in a .jsonl file. `send` is an `async` function that takes a prompt and returns
    its text, or a loaded backend (`load_backend`). The event loop is uvloop's where that is installed. Options:
    `concurrency`, the most calls in flight, or "auto"; `max_attempts` for each prompt; `timeout`, seconds for one
    attempt; `deadline`, seconds for the run; `rpm` and `tpm`, requests and tokens a minute; `max_cost`, USD, and
    `price`, (in, out) or (in, out, cached) USD per million tokens, for models that PRICES lacks; `return_exceptions`:
    True (a failed prompt's Result has an `error`, the others their answers) or False (the first failure is raised as
    PromptError and ends the run); `clock` and `sleep`, for tests. What `send` raises is classified: ConnectionError,
    TimeoutError and HTTP errors worth another try are retried; ConnectionRefusedError, once anything has been
    answered, is an outage that is waited for, as long as it is met by others or for about 30 attempts of one prompt.
    Prompts that a stopped run never sent have a Result too (`not_sent`), unless `prompts` is an iterator.
    """
    work = run_concurrent(prompts, send, **options)
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return run_loop(work)
    return _run_in_thread(work)


def _run_in_thread(work: Coroutine[Any, Any, T]) -> T:
    """Run the coroutine in a thread of its own, since an event loop is running in this one."""
    started: list[Callable[[], Any]] = []

    async def body() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        started.append(lambda: loop.call_soon_threadsafe(task.cancel))
        return await work

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        outcome = pool.submit(run_loop, body())
        try:
            concurrent.futures.wait([outcome])
        except KeyboardInterrupt:
            for cancel in started:
                cancel()
            raise
    return outcome.result()


# ---- Report --------------------------------------------------------------------------------------------------


def plural(count: int, noun: str) -> str:
    """Return '1 answer', '2 answers'."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def times(ratio: float) -> str:
    """Return 'N times' with as many digits as mean something."""
    return f"{ratio:,.0f} times" if ratio >= 100 else f"{ratio:.1f} times"


class Tally:
    """What the report is made of, counted as the results come."""

    KINDS = 50  # of failures that are told apart

    def __init__(self, model_of: Callable[[Prompt], str | None] = lambda prompt: None) -> None:
        self.answered = self.failed = self.attempts = self.unwritten = 0
        self.latency = 0.0  # of all answers together
        self.latencies: collections.Counter[int] = collections.Counter()  # by their logarithm, a thousandth a step
        self.slot_wait = self.limit_wait = self.retry_wait = self.lost = 0.0
        self.hopeful = 0  # failures that another run may not meet
        # Tokens in, out, cached and for reasoning by the model asked and the one that the replies name.
        self.bills: dict[tuple[str | None, str | None], list[int]] = {}
        self.wasted = self.silent = 0  # tokens of attempts that failed; answers that do not tell theirs
        self.unanswered = 0  # calls whose replies were lost
        self._model_of = model_of
        self.errors: collections.Counter[str] = collections.Counter()
        self._examples: dict[str, Error] = {}
        self.marked: collections.Counter[str] = collections.Counter()
        self.wall = self.cpu = 0.0
        self._start = time.monotonic(), time.process_time()

    def stop(self) -> None:
        """Take the time."""
        self.wall, self.cpu = time.monotonic() - self._start[0], time.process_time() - self._start[1]

    def add(self, result: Result) -> None:
        """Count a result."""
        self.attempts += result.attempts
        self.slot_wait += result.slot_wait
        self.limit_wait += result.limit_wait
        self.retry_wait += result.retry_wait
        self.lost += result.lost
        self.unanswered += result.unanswered
        if result.tokens is not NO_TOKENS:
            self._bill(result, result.tokens)
        if result.lost_tokens is not NO_TOKENS:
            self._bill(result, result.lost_tokens)
            self.wasted += sum(result.lost_tokens[:2])
        if result.done and result.error is not None:
            self.failed += 1
            self.note(result.error)
        elif result.done:
            self.answered += 1
            self.latency += result.latency
            self.latencies[round(1000 * math.log(result.latency or 1e-6))] += 1
            if result.finish_reason in ("length", "content_filter", "max_output_tokens", "refusal"):
                self.marked[result.finish_reason] += 1
            self.silent += not result.tokens[0] or (not result.tokens[1] and bool(result.text))

    def _bill(self, result: Result, tokens: Sequence[int]) -> None:
        key = self._model_of(result.prompt), result.model if type(result.model) is str else None
        bill = self.bills.get(key)
        if bill is None:  # a server may name what it likes
            bill = self.bills.setdefault(key if len(self.bills) < 100 else (key[0], None), [0, 0, 0, 0])
        for place, count in enumerate(tokens):
            if count:
                bill[place] += count

    def note(self, error: Error) -> None:
        """Count a failure by its kind."""
        self.hopeful += error.retryable
        kind = error.type if error.type in self.errors or len(self.errors) < self.KINDS else "others"
        self.errors[kind] += 1  # a server may name them as it likes
        self._examples.setdefault(kind, error._replace(type=kind))

    @property
    def tokens(self) -> list[int]:
        """The tokens in, out, cached and for reasoning of all attempts."""
        return [sum(counts) for counts in zip(*self.bills.values(), strict=True)] or [0, 0, 0, 0]

    def lines(self) -> Iterator[str]:
        """Yield the lines of the report."""
        yield f"{self.answered:,} answered, {self.failed:,} failed in {duration(self.wall)}"
        if self.answered > 1 and self.wall > 0:
            ratio = self.latency / self.wall
            compared = f" ({times(ratio)} the wall time)" if ratio > 1.05 else ""
            yield f"sum of latencies {duration(self.latency)}{compared}, {self.answered / self.wall:,.1f} answers/s"
        spread = [f"{name} {duration(value)}" for name, value in self.percentiles().items() if value is not None]
        if spread:
            yield f"latency {', '.join(spread)}"
        if any(self.tokens):
            counts = zip(self.tokens, ("in", "out", "cached", "for reasoning"), strict=True)
            wasted = f"; {self.wasted:,} of them in failed attempts" if self.wasted else ""
            yield "tokens " + ", ".join(f"{count:,} {name}" for count, name in counts if count) + wasted
        lost = self.attempts - self.answered - self.unwritten
        yield plural(self.attempts, "attempt") + (f", {lost:,} of them without an answer" if lost > 0 else "")
        waited = [(getattr(self, name), text) for name, text in WAITS.items()]
        if waits := [f"{duration(wait)} {text}" for wait, text in waited if wait >= 0.005]:
            yield f"waiting, all calls added up: {', '.join(waits)}"

    def as_dict(self) -> dict[str, Any]:
        """Return what was counted; times are in seconds."""
        names = ("in", "out", "cached", "reasoning")
        return {
            "wall_seconds": self.wall,
            "cpu_seconds": self.cpu,
            "answered": self.answered,
            "failed": self.failed,
            "attempts": self.attempts,
            "latency_sum_seconds": self.latency,
            "latency_seconds": self.percentiles(),
            "latency_counts": [[math.exp(step / 1000), count] for step, count in sorted(self.latencies.items())],
            "waited_seconds": {name: getattr(self, name) for name in WAITS},
            "tokens": dict(zip(names, self.tokens, strict=True)) | {"in_failed_attempts": self.wasted},
            "answers_without_usage": self.silent,
            "lost_calls": self.unanswered,
            "errors": [
                {**error._asdict(), "count": count, "hint": hint(error) or None} for error, count in self.failures()
            ],
            "ended_by": dict(self.marked),
        }

    def failures(self) -> Iterator[tuple[Error, int]]:
        """Yield the first failure of each kind and how many there are, the most frequent kind first."""
        for kind, count in self.errors.most_common():
            yield self._examples[kind], count

    def percentiles(self) -> dict[str, float | None]:
        """Return the latency's p50, p90 and p99 in seconds, None where there are too few answers to know it."""
        steps = sorted(self.latencies)
        upto = list(itertools.accumulate(self.latencies[step] for step in steps))
        found: dict[str, float | None] = {"p50": None, "p90": None, "p99": None}
        for name in found:
            share = int(name[1:]) / 100
            if self.answered * (1 - share) >= 1 - 1e-9:
                found[name] = math.exp(steps[bisect.bisect_left(upto, self.answered * share)] / 1000)
        return found

    def warnings(self) -> Iterator[str]:
        """Yield a line for each kind of failure, with what to do, and for answers that are not whole."""
        if self.unwritten:
            yield f"{plural(self.unwritten, 'answer')} could not be written"
        for error, count in self.failures():
            advice, first = hint(error), ", first" if count > 1 else ""
            yield f"{count:,} x {error.type}{first}: {error.message}" + (f"\n  -> {advice}" if advice else "")
        for reason, count in self.marked.items():
            advice = "raise max_completion_tokens (-p)" if "length" in reason or "max" in reason else "see their text"
            yield f"{count:,} answered but ended by {reason}: {advice}"


WAITS = {
    "slot_wait": "for a place",
    "limit_wait": "for limits or the server's return",
    "retry_wait": "between attempts",
    "lost": "in lost attempts",
}


class Progress:
    """A bar on a terminal (tqdm's where it is installed), elsewhere a line every few seconds; nothing when quiet."""

    EVERY = 5.0  # seconds between lines

    def __init__(self, total: int | None, ran: "Ran", sink: Any, quiet: bool) -> None:
        self._total, self._ran, self._run, self._sink, self._tally = total, ran, ran.run, sink, ran.tally
        self._terminal = obeys(sys.stderr)
        self._bar: Any = None
        self._timer: asyncio.TimerHandle | None = None
        self._began = time.monotonic()
        if self._terminal and not quiet:
            with contextlib.suppress(ImportError):
                from tqdm import tqdm

                self._bar = tqdm(total=total, unit=" prompts", file=sys.stderr, leave=False)
        if not quiet:
            self._tick()

    def _tick(self) -> None:
        """Write what there is to say, and set the timer for the next time."""
        kept = self._sink.kept + len(self._sink.kept_errors) if self._sink else 0
        new = self._tally.answered + self._tally.failed
        if self._bar is not None:
            self._bar.initial, self._bar.n = kept, kept + new
            self._bar.bar_format = "{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix}" if self._run.state() else None
            self._bar.set_postfix_str(", ".join(self._state()))
        elif self._terminal:
            self._write(f"\r{self._text(kept, new)[: shutil.get_terminal_size().columns - 1]}\x1b[K")
        elif self._timer is not None:
            self._write(f"{self._text(kept, new)}\n")
        every = 0.2 if self._terminal else self.EVERY
        self._timer = asyncio.get_running_loop().call_later(every, self._tick)

    def _text(self, kept: int, new: int) -> str:
        done, total, state = kept + new, self._total, self._state()
        if not self._run.state():
            rate = new / max(0.001, time.monotonic() - self._began)
            left = f", {duration(max(0, total - done) / rate)} left" if total and rate > 0 else ""
            state.append(f"{rate:,.1f}/s{left}")
        return ", ".join([f"{done:,}" + (f" of {total:,}" if total else "") + " done", *state])

    def _state(self) -> list[str]:
        failed = f"{self._tally.failed:,} failed" if self._tally.failed else ""
        told = []
        for status in hooked(self._run.extras, "status"):
            try:
                told.append(str(status(self._ran)))
            except Exception as failure:
                self._run.stop(extra_failure(status, failure))
        return [*filter(None, [failed, f"{self._run.limiter.in_flight} in flight", *told, self._run.state()])]

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.write(text)
            sys.stderr.flush()

    def close(self) -> None:
        """Clear the line."""
        if self._timer is not None:
            self._timer.cancel()
        if self._bar is not None:
            self._bar.close()
        elif self._timer is not None and self._terminal:
            self._write("\r\x1b[K")


@dataclasses.dataclass
class Ran:
    """One run, with all that is to be said of it."""

    api: Api
    run: Run
    asked: int | str  # calls in flight at the most
    tally: Tally
    texts: dict[int, str] = dataclasses.field(default_factory=dict)  # the first few answers

    @property
    def rate(self) -> float:
        """Answers a second."""
        return self.tally.answered / self.tally.wall if self.tally.wall else 0.0

    @property
    def most(self) -> int:
        """The most calls that were in flight."""
        return self.run.most_in_flight

    @property
    def cpu(self) -> float:
        """CPU time a prompt, in seconds."""
        return self.tally.cpu / max(1, self.tally.answered + self.tally.failed)

    def title(self) -> str:
        """Return what a picture calls it."""
        auto = " (auto)" if self.asked == "auto" else ""
        return f"{self.api.name}, {'one at a time' if self.asked == 1 else f'{self.most:,} in flight{auto}'}"

    def as_dict(self) -> dict[str, Any]:
        """Return the figures; the README says what they mean."""
        limiter = self.run.limiter
        return {
            "backend": self.api.name,
            "base_url": self.api.base_url,
            "model": self.api.params.get("model") or self.api.model or DEFAULT_MODEL,
            "endpoint": self.api.endpoint,
            "concurrency": self.asked,
            "most_in_flight": self.most,
            "answers_a_second": self.rate,
            "cpu_seconds_a_prompt": self.cpu,
            **self.tally.as_dict(),
            "limits": limiter.learned(),
            "limits_a_minute": {q.name: 60 * q.limit for q in (limiter.requests, limiter.tokens) if q.source},
        }


def table(ran: list[Ran]) -> Iterator[str]:
    """Yield the lines of the comparison, aligned, one unit a column; '-' for what cannot be known."""
    rows = [["backend", "-c", "wall s", "sum s", "req/s", "CPU ms", "p50 ms", "p90 ms", "p99 ms", "failed"]]
    for one in ran:
        tally = one.tally
        spread = [f"{1000 * value:,.0f}" if value is not None else "-" for value in tally.percentiles().values()]
        figures = [f"{tally.wall:.2f}", f"{tally.latency:.2f}", f"{one.rate:,.1f}", f"{1000 * one.cpu:.2f}", *spread]
        rows.append([short(one.api.name, 20), str(one.asked), *figures, str(tally.failed)])
    first, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *figures in rows:
        yield "  ".join([name.ljust(first), *map(str.rjust, figures, widths)])


def verdicts(ran: list[Ran]) -> Iterator[str]:
    """Yield the sentences that say which way was faster, with each backend, and which backend is the cheapest."""
    for name in dict.fromkeys(one.api.name for one in ran):
        runs = [one for one in ran if one.api.name == name and one.tally.answered]
        if len(runs) == 2:
            slow, fast = (one.tally.wall for one in runs)
            won = f"ran {times(slow / fast)} faster than" if slow >= 1.05 * fast else "was no faster than"
            yield f"{name}: concurrent {won} sequential ({duration(fast)}, {duration(slow)})."
    yield from cpu_verdict(ran)


def cpu_verdict(ran: list[Ran]) -> Iterator[str]:
    """Yield the sentence that names the backend which used the least CPU time, if there are several."""
    known = [one for one in {one.api.name: one for one in ran}.values() if one.tally.answered >= 100]
    if len(known) > 1:  # CPU time of fewer is mostly chance
        cheap, *_, dear = sorted(known, key=lambda one: one.cpu)
        less = times(dear.cpu / cheap.cpu)
        yield f"{cheap.api.name} used the least CPU time per request, {less} less than {dear.api.name}."


def as_in_the_article(ran: Ran, way: str) -> Iterator[str]:
    """Yield the first results of a run and its time."""
    yield f"{way} results ({ran.api.name}):"
    yield from (f"  {number + 1}. {short(text, 74)}" for number, text in sorted(ran.texts.items()))
    if (rest := ran.tally.answered + ran.tally.failed - len(ran.texts)) > 0:
        yield f"  ... and {rest:,} more"
    yield f"{way} time: {ran.tally.wall:.2f} seconds"


# ---- Extras ---------------------------------------------------------------------------------------------------


def load_extra(name: str) -> Any:
    """Return the file of that name in extras/. Raises UsageError where it is not there."""
    try:
        return importlib.import_module(f"{MODULE}.extras.{name}")
    except ModuleNotFoundError as missing:
        if missing.name and not missing.name.startswith(MODULE):
            raise
        raise UsageError(f"it is in extras/{name}.py, which goes beside {PROGRAM}") from None


def extra_files(argv: Sequence[str]) -> list[Any]:
    """Return the files of extras/ that a command line asks for by a flag or a suffix, and third parties'.

    For --help that is all of them. Raises UsageError where one is asked for that is not there.
    """
    if "--version" in argv:
        return []
    index: dict[str, tuple[str, ...]] = {}
    with contextlib.suppress(ModuleNotFoundError):
        index = importlib.import_module(f"{MODULE}.extras").INDEX
    signs = {"", *(word.partition("=")[0] for word in argv)}
    signs |= {os.path.splitext(word.lower().removesuffix(".gz"))[1] or "-" for word in argv}
    found = []
    for name, own in index.items():
        asked = next((sign for sign in own if sign and sign in signs), "")
        if asked or "" in own or signs & {"-h", "--help"}:
            try:
                found.append(load_extra(name))
            except UsageError as missing:
                if asked:
                    raise UsageError(f"{asked}: {missing}") from None
    return found + [third_party(name) for name in named_extras(argv)]


def named_extras(argv: Sequence[str]) -> Iterator[str]:
    """Yield what follows each --extra."""
    for word, after in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        flag, mark, name = word.partition("=")
        if flag == "--extra" and (mark or after):
            yield name if mark else after


def third_parties(argv: Sequence[str] | None) -> set[str]:
    """Return the top-level packages of the extras and backends that are not ours."""
    words = sys.argv[1:] if argv is None else argv
    names = [*named_extras(words), *(word.removeprefix("-b").partition(":")[0] for word in words if ":" in word)]
    return {name.partition(".")[0] for name in names}


def raised_in(failure: BaseException, packages: set[str]) -> str:
    """Return in which module and function of those packages an exception was raised, or ''."""
    frames = [frame for frame, _ in traceback.walk_tb(failure.__traceback__)]
    places = [(str(frame.f_globals.get("__name__")), frame.f_code.co_name) for frame in frames]
    return next((f"{module}, {name}" for module, name in reversed(places) if module.partition(".")[0] in packages), "")


def third_party(name: str) -> Any:
    """Return the module of that name. Raises UsageError where it is none, or no extra."""
    try:
        file = importlib.import_module(name)
        if callable(file.add_arguments) and callable(file.create):
            return file
        reason = "add_arguments and create are to be functions"
    except Exception as failure:  # somebody else's file may raise anything
        reason = in_short(failure)
    raise UsageError(f"--extra {short(name, 60)}: {reason}")


def create_extra(file: Any, args: argparse.Namespace) -> Any:
    """Return the extra that the arguments ask a file for, or None. Raises UsageError where they cannot be."""
    try:
        return file.create(args)
    except UsageError:
        raise
    except Exception as failure:
        raise UsageError(f"extra {extra_name(file)}, create: {in_short(failure)}") from None


def extra_name(extra: Any) -> str:
    """Return the name of an extra's file: "budget" of concurrent_prompts.extras.budget."""
    return str(getattr(extra, "__module__", None) or getattr(extra, "__name__", "")).rpartition(".")[2]


def hooked(extras: Iterable[Any], hook: str) -> list[Any]:
    """Return that method of all the extras that have it."""
    return [getattr(extra, hook) for extra in extras if hasattr(extra, hook)]


def extra_failure(hook: Any, failure: Exception) -> PromptError:
    """Return the error that stops a run for what an extra did not mean to raise."""
    extra = getattr(hook, "__self__", hook)
    name = getattr(hook, "__name__", "")
    text = f"extra {extra_name(extra)}, {name}: {in_short(failure)}"
    return PromptError("extra", text, "stop")


def guarded(extra: Any, hook: str, items: Iterable[T]) -> Iterator[T]:
    """Yield the items; what the extra did not mean to raise becomes an error that stops the run."""
    try:
        yield from items
    except (PromptError, UsageError):
        raise
    except Exception as failure:
        raise extra_failure(getattr(extra, hook), failure) from None


def tell_report(extras: Iterable[Any], ran: list[Ran], status: int) -> tuple[int, list[str]]:
    """Let the extras write their files; return the exit status and the lines that they have for the report."""
    lines: list[str] = []
    for hook in hooked(extras, "report"):
        try:
            lines += map(str, hook(ran, status))
        except Exception as failure:
            known = failure if isinstance(failure, PromptError) else extra_failure(hook, failure)
            status = status or 3
            say_error(f"{PROGRAM}: {known}")
    return status, lines


# ---- Command line --------------------------------------------------------------------------------------------


class ErrorLog(logging.Handler):
    """Log records on standard error, on a line of their own where there is a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record."""
        say_error(record.getMessage(), start="\r\x1b[K" if obeys(sys.stderr) else "")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:  # no file of ours may become what a closed stream was
        pass
    os.close(number)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115 - started without one
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an answer may hold what the terminal cannot show
    handler = ErrorLog()
    log.addHandler(handler)
    args = None
    try:
        with contextlib.ExitStack() as stack:
            args = parse_arguments(argv, stack)
            log.setLevel(logging.INFO if args.verbose else logging.WARNING)
            args.source = stack.enter_context(spooled()) if args.prompts == "-" else args.prompts
            for command in hooked(args.extras, "command"):
                if (status := command()) is not None:
                    return int(status)
            status = run_command(compare(args, [1, args.calls[0]]) if args.compare else answer_file(args))
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a failure still has a name
        return status
    except UsageError as problem:
        say_error(f"{PROGRAM}: {problem}")
        return 2
    except PromptError as failure:  # of an extra, before the run
        say_error(f"{PROGRAM}: {failure}")
        return 3
    except (KeyboardInterrupt, asyncio.CancelledError):
        say_stopped(PromptError("interrupted", "interrupted", "stop"), args)
        return 130
    except OSError as failure:
        silence(sys.stdout)
        if not isinstance(failure, BrokenPipeError):  # whose reader has had enough
            say_error(f"{PROGRAM}: cannot write the output: {failure.strerror or failure}")
        return 3
    except Exception as failure:
        if not (where := raised_in(failure, third_parties(argv))):
            raise
        say_error(f"{PROGRAM}: {where}: {in_short(failure)}")
        return 3 if args and args.begun else 2
    finally:
        log.removeHandler(handler)
        try:
            sys.stderr.flush()
        except OSError:
            silence(sys.stderr)


def run_command(work: Coroutine[Any, Any, int]) -> int:
    """Run what a command does; return the exit status."""
    gc.freeze()  # what is there by now stays, and what a thousand calls in flight hold is in no circles:
    gc.set_threshold(50_000)  # for the collector to look at all of it again and again is a waste
    return run_loop(work)


def silence(stream: IO[str]) -> None:
    """Let what a stream still holds go nowhere: its reader takes no more, and Python would complain at its exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def parse_arguments(argv: list[str] | None, stack: contextlib.ExitStack) -> argparse.Namespace:
    """Return the parsed and checked command line; what its extras open is closed with the stack."""
    argv = sys.argv[1:] if argv is None else argv
    files = extra_files(argv)
    parser = build_parser(files)
    args, unknown = parser.parse_known_args(argv)
    if unknown:  # not the whole of it: somebody may try to give a key here
        word = short(unknown[0].partition("=")[0], 40)
        where = "" if files else f"; other options are in the folder extras/, which goes beside {PROGRAM}"
        raise UsageError(f"{word} is not an option or one too many; see --help{where}")
    args.given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
    args.argv, args.stack, args.begun = argv, stack, False
    args.facts, args.form, args.printer = {}, None, None
    args.name = STDIN if args.prompts == "-" else args.prompts  # in messages
    args.backends = list(dict.fromkeys((args.backend if args.backend is not None else default_backend()).split(",")))
    args.calls = list(dict.fromkeys(args.concurrency or ["auto"]))
    args.params = dict(parameter(text) for text in args.param)
    refuse_together(args)
    args.given_output, args.output = args.output, args.output or default_output(args.prompts)
    args.journal = ""
    args.taken, args.writes = {os.path.realpath(args.prompts): "the input"} if args.prompts else {}, []
    if args.schema is not None:
        args.taken[os.path.realpath(args.schema)], args.schema = "the schema", Schema.read(args.schema)
    args.extras = [extra for file in files if (extra := create_extra(file, args)) is not None]
    args.journal = args.journal or args.output
    check_arguments(args)
    return args


def default_output(prompts: str | None) -> str:
    """Return where the results go if nobody says."""
    path = pathlib.Path((prompts or "-").removesuffix(".gz"))
    return "-" if prompts in (None, "-") else str(path.parent / f"{path.stem}.results.jsonl")


def refuse_together(args: argparse.Namespace) -> None:
    """Raise UsageError where options contradict one another."""
    results = args.output or args.retry_failed or args.overwrite
    for wrong, advice in (
        ("" in args.backends, "-b has an empty name"),
        ("" in (args.cluster, args.worker_backend), "--cluster and --worker-backend take no empty name"),
        ("," in (args.backend or "") and not args.compare, "several backends (-b a,b) are for --compare"),
        (args.sequential and (args.compare or args.concurrency),
         "--sequential is one at a time, and --compare does it too: leave out one of them, or -c"),
        (args.compare and results,
         "--compare writes no results file; leave out -o, --retry-failed and --overwrite"),
        (len(args.calls) > 1 and not args.compare, "several numbers of calls (-c 1,16,auto) are for --compare"),
    ):  # fmt: skip
        if wrong:
            raise UsageError(advice)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise UsageError where something is missing, or the output cannot be what is asked of it."""
    if args.prompts is None:
        raise UsageError("no PROMPTS file given; try --demo --compare, or --help")
    for flag, path in [("-o", args.output), ("-o", args.journal), *args.writes]:
        if path != "-" and (other := args.taken.setdefault(os.path.realpath(path), flag)) != flag:
            raise UsageError(f"{path} is {other}; choose another file with {flag}")
        if flag != "-o" and (why := unwritable(path)):
            raise UsageError(f"{why}; choose another file with {flag}")
    if (suffix := pathlib.PurePath(args.output).suffix.lower()) in NOT_WRITTEN:
        raise UsageError(f"-o {args.output}: results are written as .jsonl, .csv or .tsv, not as {suffix}")


def out_of_place(args: argparse.Namespace, used: str) -> str:
    """Return those of the given options that are not among the used ones, for a command that does something else."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in args.given if name not in used.split())


def unwritable(path: str | os.PathLike[str]) -> str:
    """Return why no file can be written, or replaced, there; or ''."""
    folder = os.path.dirname(path) or "."
    if kind := other_than_file(path):
        return f"{path} is not a regular file but {kind}"
    if why := unwritable_draft(path):
        return why
    if not os.path.isdir(folder):
        return f"{path} cannot be written: there is no folder {folder}"
    return "" if os.access(folder, os.W_OK) else f"{path} cannot be written: the folder {folder} is protected"


def check_new(args: argparse.Namespace, path: pathlib.Path, flag: str) -> None:
    """Raise UsageError where no file can be written anew."""
    if why := unwritable(path):
        raise UsageError(f"{why}; choose another file with {flag}")
    if args.prompts and os.path.realpath(path) == os.path.realpath(args.prompts):
        raise UsageError(f"{path} is the input; choose another file with {flag}")
    if path.exists() and not args.overwrite:
        raise UsageError(f"{path} is there already; choose another file with {flag}, or give it up (--overwrite)")


def build_parser(extras: Iterable[Any] = ()) -> argparse.ArgumentParser:
    """Return the parser; the module's docstring is its manual."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} PROMPTS [options]",
        description=__doc__,
        formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=32, width=80),
        allow_abbrev=False,
    )
    option = parser.add_argument
    option("prompts", nargs="?", metavar="PROMPTS", help="prompts file, or - for standard input (optional with --demo)")
    option("-b", "--backend", metavar="NAME", help="openai-sdk, raw-aiohttp, stdlib, openai-batch, "
           "dask-cluster or package.module:name (default: raw-aiohttp where aiohttp is installed, else stdlib); a,b,c "
           "with --compare")  # fmt: skip
    option("--sequential", action="store_true", help="one at a time: the baseline")
    option("--compare", action="store_true", help="sequential and concurrent, for each backend, on the same prompts")
    option("-c", "--concurrency", metavar="N", type=concurrency,
           help=f"calls in flight at the most (default: auto, up to {AUTO_CONCURRENCY}); 1,16,auto with --compare: a "
           "sweep that finds the knee")  # fmt: skip
    option("-m", "--model", metavar="NAME", help=f"model (default: {DEFAULT_MODEL})")
    option("-s", "--system", metavar="TEXT", help="system text before each prompt")
    option("-t", "--template", metavar="TEXT", help="make each prompt from the columns: 'Translate {prompt} to {lang}'")
    option("-p", "--param", metavar="NAME=JSON", action="append", default=[], help="request parameter (repeatable)")
    option("-e", "--endpoint", choices=ENDPOINTS, default="chat", metavar="NAME",
           help="chat, responses, completions or embeddings (default: chat)")  # fmt: skip
    option("--schema", metavar="FILE", help="JSON schema that each answer has to fit")
    option("--base-url", metavar="URL", help="default: OPENAI_BASE_URL, else OpenAI's own")
    option("--api-key-env", metavar="NAME", default="OPENAI_API_KEY",
           help="variable with the key (default: %(default)s)")  # fmt: skip
    option("--allow-http", action="store_true", help="send the key unencrypted to a public host")
    option("--worker-backend", metavar="NAME", help="with dask-cluster: what its workers call the API with (as -b)")
    option("--cluster", metavar="ADDRESS", help="with dask-cluster: the scheduler (tcp://host:8786), or a number of "
           "local processes (default: one for each core)")  # fmt: skip
    option("--rpm", metavar="N", type=positive(float), help="requests a minute at the most (default: learned)")
    option("--tpm", metavar="N", type=positive(float), help="tokens a minute at the most (default: learned)")
    option("--max-attempts", metavar="N", type=positive(int), default=DEFAULT_ATTEMPTS,
           help="attempts for each prompt (default: %(default)s)")  # fmt: skip
    option("--timeout", metavar="SECONDS", type=positive(float), default=DEFAULT_TIMEOUT,
           help="for one attempt (default: %(default).0f)")  # fmt: skip
    option("--deadline", metavar="SECONDS", type=positive(float), help="for the run; what is in flight then is cut off")
    option("-o", "--output", metavar="FILE", help="results (default: PROMPTS' stem + .results.jsonl); - is "
           "stdout; .csv or .tsv: a table, and all the rest in FILE.results.jsonl")  # fmt: skip
    option("-n", "--limit", metavar="N", type=positive(int), help="only the first N prompts")
    option("--retry-failed", action="store_true", help="ask the failed prompts of the last run again")
    option("--overwrite", action="store_true", help="begin the output file anew")
    option("-q", "--quiet", action="store_true", help="no progress and no report, only warnings")
    option("-v", "--verbose", action="store_true", help="say why each retry and slow-down happens")
    option("--extra", metavar="MODULE", action="append", default=[],
           help="load an option of a third party's, package.module (repeatable)")  # fmt: skip
    option("--version", action="version", version=f"%(prog)s {__version__}")
    for file in extras:
        group = parser.add_argument_group(extra_name(file))
        file.add_arguments(group.add_argument)
    return parser


def positive(kind: type[T]) -> Callable[[str], T]:
    """Return a parser of numbers above 0, for argparse."""

    def number(text: str) -> T:
        value: Any = kind(text)  # type: ignore[call-arg]
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value  # type: ignore[no-any-return]

    return number


def concurrency(text: str) -> list[int | str]:
    """Return numbers of calls, or "auto", with commas between them."""
    return ["auto" if word == "auto" else positive(int)(word) for word in text.split(",")]


def parameter(text: str) -> tuple[str, Any]:
    """Return the name and the value of NAME=JSON."""
    name, _, value = map(str.strip, text.partition("="))
    try:
        parsed = decode_row(value)
    except (ValueError, RecursionError):
        raise UsageError(f"-p {text}: not NAME=JSON; a text needs its quotes: -p '{name or 'stop'}=\"…\"'") from None
    if not name or (name == "stream" and parsed):
        raise UsageError(f"-p {text}: " + ("answers are not streamed here" if name else "no name"))
    return name, parsed


# What a file of these names is expected to hold; others are JSON Lines, whatever they are called.
NOT_WRITTEN = (".json", ".txt", ".md", ".html", ".xml", ".yaml", ".xls", ".xlsx", ".ods", ".parquet", ".gz", ".zip")


def open_sink(args: argparse.Namespace) -> Journal | Printer:
    """Open what keeps or prints the results."""
    for check in hooked(args.extras, "check"):
        check()
    if args.output == "-" and (args.retry_failed or args.overwrite):
        raise UsageError("standard output keeps nothing: leave out --retry-failed and --overwrite, or name a file (-o)")
    if args.output == "-":
        check_stdout()
        return args.printer(args) if args.printer else Printer()
    return Journal(pathlib.Path(args.journal), overwrite=args.overwrite, retry_failed=args.retry_failed)


def check_stdout() -> None:
    """Raise UsageError where there is no standard output."""
    if sys.stdout is None:
        raise UsageError("standard output is closed; name a file with -o")


def prompts_of(args: argparse.Namespace, limit: int | None = None) -> Iterator[Prompt]:
    """Yield the first prompts of the file, or those of them that the extras select, numbered from 0.

    Raises UsageError where there are none at all.
    """
    prompts = read_prompts(args.source, args.name)
    first = list(itertools.islice(prompts, 1))
    if not first:
        raise UsageError(f"{args.name} holds no prompts")
    chosen: Iterable[Prompt] = itertools.islice(itertools.chain(first, prompts), limit)
    for extra in args.extras:
        if hasattr(extra, "select"):
            chosen = guarded(extra, "select", extra.select(chosen))
    for number, prompt in enumerate(chosen):
        prompt.number = number
        yield prompt


def first_of(prompts: Iterable[Prompt], api: Api) -> Prompt:
    """Return the first prompt that can be sent, an empty one where there is none."""
    return next((prompt for prompt in prompts if api.prepare(prompt).error is None), Prompt(0, ""))


def checked(prompts: Iterator[Prompt], api: Api) -> Iterator[Prompt]:
    """Yield the prepared prompts. Raises UsageError where the first cannot be used as asked."""
    first = list(itertools.islice(prompts, 1))  # a shard may have none
    if first and (error := api.prepare(first[0]).error) and error.type == "missing_column":
        raise UsageError(error.message)
    return map(api.prepare, itertools.chain(first, prompts))


def make_api(args: argparse.Namespace, backend: str | None, dry: bool = False) -> Api:
    """Return the API that the arguments ask for; without a backend it only makes requests."""
    names = ("model", "system", "template", "params", "endpoint", "base_url", "api_key_env", "allow_http", "schema")
    settings = {name: getattr(args, name) for name in (*names, "cluster", "worker_backend")}
    return load_backend(backend, dry=dry, **settings) if backend else Api(lambda *_: None, dry=dry, **settings)


def check_bulk(args: argparse.Namespace, api: Api) -> None:
    """Raise UsageError where an option means nothing to a bulk backend."""
    if api.submit and (args.compare or args.sequential):
        raise UsageError(f"{api.name} answers in bulk: no --compare and no --sequential with it")
    for name in ("rpm", "tpm", "cluster", "worker_backend") if api.submit else ():
        if getattr(args, name) is not None and name not in getattr(api.submit, "uses", ()):
            raise UsageError(f"--{name.replace('_', '-')} means nothing to {api.name}; leave it out")


def make_run(args: argparse.Namespace, api: Api, calls: int | str) -> Run:
    """Return a run as the arguments ask for, with so many calls in flight."""
    names = ("max_attempts", "timeout", "deadline", "rpm", "tpm", "extras")
    run = Run(api, concurrency=calls, **{name: getattr(args, name) for name in names})
    if not api.submit:
        run.at_most(open_files() - 64)  # the others are the interpreter's, the input's and the output's
    return run


def open_files() -> int:
    """Return how many files (each connection is one) may be open, after asking for as many as may be had."""
    if sys.platform == "win32":  # knows no such limit
        return 1 << 20
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return soft if soft != resource.RLIM_INFINITY else 1 << 20


async def answer_file(args: argparse.Namespace) -> int:
    """Do the main job: answer the file's prompts, write the results, report; return the exit status."""
    api = make_api(args, args.backends[0])
    check_bulk(args, api)
    prompts = checked(prompts_of(args, args.limit), api)
    way = sequentially if args.sequential else concurrently
    calls = 1 if args.sequential else args.calls[0]
    run = make_run(args, api, calls)
    sink = open_sink(args)
    run.first, run.overwrites = first_of(prompts_of(args), api), args.overwrite
    run.journal, run.path = sink, sink.path
    quiet = args.quiet or (args.output == "-" and sys.stdout.isatty())  # the answers themselves are the progress
    with sink, interruptible(run):
        run.notes = Notes(sink.path, api.name, args.overwrite, sink.answers)
        sink.check(map(api.prepare, prompts_of(args)), args.name)
        ran = Ran(api, run, calls, Tally(api.model_of))
        async with run:
            progress = Progress(count_prompts(args), ran, sink, quiet)
            syncing = asyncio.ensure_future(keep_synced(run, sink))
            try:
                await way(run, sink.left(prompts), functools.partial(record, args, ran, sink))
            finally:
                syncing.cancel()
                progress.close()
        ran.tally.stop()
        finish(args, run, sink)
    return report(args, ran, sink)


def finish(args: argparse.Namespace, run: Run, sink: Journal | Printer) -> None:
    """Put the results into order, if all is done; what cannot be written stops the run."""
    if run.stopped is not None:
        return
    try:
        sink.finish(whole=args.limit is None)
        if run.notes and not run.notes.stay and args.limit is None:
            run.notes.remove()
    except OSError as failure:
        run.stop(disk_error(sink.path, failure))


async def keep_synced(run: Run, sink: Journal | Printer) -> None:
    """Bring the results to the disk once a second: a power cut, unlike a killed process, loses what is not there."""
    for wait in itertools.chain([0.1], itertools.repeat(1.0)):
        await asyncio.sleep(wait)
        try:
            sink.attend()
            await asyncio.to_thread(sink.sync)
        except OSError as failure:
            run.stop(disk_error(sink.path, failure))
            return


def record(args: argparse.Namespace, ran: Ran, sink: Journal | Printer, result: Result) -> None:
    """Keep a result; where the disk will not take it, stop the run: what cannot be kept should not be paid for."""
    if result.done:
        args.begun = True
        try:
            sink.append(result)
        except BrokenPipeError:
            raise
        except OSError as failure:
            result.done = False
            ran.tally.unwritten += result.error is None
            ran.run.stop(disk_error(sink.path, failure))
    ran.tally.add(result)


def disk_error(path: str | pathlib.Path | None, failure: OSError) -> PromptError:
    """Return the error that stops a run whose results cannot be written."""
    return PromptError("disk", f"cannot write {path or 'the output'}: {failure.strerror or failure}", "stop")


def count_prompts(args: argparse.Namespace) -> int | None:
    """Return about how many prompts there are, for the progress; None where that cannot be known beforehand."""
    selecting = [extra for extra in args.extras if hasattr(extra, "select")]
    if not all(hasattr(extra, "count") for extra in selecting):
        return None
    with contextlib.suppress(UsageError, *BROKEN), open_input(args.source, args.name) as (file, form, _):
        lines, quotes = -(form in SEPARATORS), 0
        for line in sound_lines(file, "", []):
            quotes += line.count(b'"') if form in SEPARATORS else 0  # within them a line is not a row
            lines += not quotes % 2 and not line.isspace()
        lines = min(lines, args.limit or lines)
        for extra in selecting:
            lines = extra.count(lines)
        return lines
    return None


HELD_UP = 0.5  # seconds in which an event loop that works hears a signal


@contextlib.contextmanager
def interruptible(run: Run) -> Iterator[None]:
    """Let the first Ctrl-C (SIGTERM, SIGHUP) stop the run in good order, and the second at once.

    The second does so too where the event loop is held up: by an input that takes long to read, by somebody's function.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    presses, interrupted = itertools.count(1), PromptError("interrupted", "interrupted", "stop")
    unheard: list[float] = []  # when the first signal came that the event loop has not heard of yet

    def signalled(*_: Any) -> None:
        if unheard and time.monotonic() > unheard[0] + HELD_UP:
            run.stop(interrupted)
            raise KeyboardInterrupt  # from within whatever it is that keeps the event loop
        unheard.append(time.monotonic())
        loop.call_soon_threadsafe(interrupt)

    def interrupt() -> None:
        unheard.clear()
        if next(presses) > 1:
            task.cancel()
            return
        run.stop(interrupted)
        calls = f"{plural(run.limiter.in_flight, 'call')} in flight may finish; once more to stop at once"
        say_error(f"\nstopping: {getattr(run.bulk and run.bulk.submit, 'parting', calls)}")

    with contextlib.ExitStack() as stack:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # nohup
                with contextlib.suppress(ValueError):  # not in the main thread
                    before = signal.signal(number, signalled)
                    stack.callback(signal.signal, number, before)
        yield


def report(args: argparse.Namespace, ran: Ran, sink: Journal | Printer) -> int:
    """Print the report and the warnings; return the exit status."""
    tally, run = ran.tally, ran.run
    batches = run.bulk and not getattr(run.bulk.submit, "retries", False)  # whose latencies mean nothing
    lines = [line for line in tally.lines() if not (batches and line.startswith(("sum of latencies", "latency")))]
    lines += [f"limit: {known}" for known in run.limiter.learned()]
    if kept := sink.answers if run.stopped else sink.kept:
        lines.append(f"{plural(kept, 'answer')} of an earlier run kept")
    if sink.kept_errors:
        lines.append(f"{plural(len(sink.kept_errors), 'failure')} of an earlier run kept")
    for error in sink.kept_errors:
        tally.note(error)
    failed = tally.failed + len(sink.kept_errors)
    status = (130 if run.stopped.kind == "interrupted" else 3) if run.stopped else 1 if failed else 0
    args.facts |= {"results": str(sink.path) if sink.path else None, "table": args.facts.get("table")}
    args.facts |= {"kept": sink.kept, "kept_failed": len(sink.kept_errors)}
    status, more = tell_report(args.extras, [ran], status)
    if not args.quiet:
        way = ", one at a time" if args.sequential else f", up to {ran.most} in flight" if ran.most else ""
        say_error(f"{ran.api.name} at {ran.api.base_url}{way}")
        say_error(*lines, *more, indent="  ", width=80)
        say_error(*([f"results in {sink.path}"] if sink.path else []), indent="  ", width=80)
    for warning in tally.warnings():
        say_error(warning, indent="  ")
    if run.stopped is not None:
        say_stopped(run.stopped, args)
    elif sink.path and tally.hopeful and not args.quiet:
        say_error(f"{tally.hopeful:,} of {failed:,} failed for what may pass; to ask again:", indent="  ")
        say_error(command_again(args.argv, True, "--retry-failed"), indent="    ", wrap=False)
    return status


def say_stopped(reason: PromptError, args: argparse.Namespace | None) -> None:
    """Say why the run was stopped, what to do and how to continue."""
    say_error(f"{PROGRAM}: {'' if reason.kind == 'interrupted' else 'stopped: '}{reason.error.message}")
    if advice := hint(reason.error):
        say_error(f"-> {advice}", indent="  ")
    if args and args.output != "-" and not args.compare:
        say_error(f"to continue: {command_again(args.argv, args.begun)}", indent="  ", wrap=False)


def without_secrets(word: str) -> str:
    """Return a word of the command line without what sounds secret in a URL's query."""
    before, mark, query = word.partition("?")
    kept, secret = split_query(query)
    return before + kept if mark and secret else word


def command_again(argv: list[str], begun: bool, *more: str) -> str:
    """Return the command line that continues what this one began; not where a key stands in it, in a URL's query."""
    without = "--overwrite" if begun else ""  # what it has written is to be kept
    more = tuple(word for word in more if word not in argv)
    if any(without_secrets(word) != word for word in argv):
        changes = [f"without {without}"] * (without in argv) + [f"with {word}" for word in more]
        return ", ".join(["the same command again", *changes])
    name = os.path.basename(sys.executable)
    python = [name if shutil.which(name) == sys.executable else sys.executable] * sys.argv[0].endswith(".py")
    words = [*python, sys.argv[0], *(word for word in argv if word != without), *more]
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)


def say_error(*lines: str, start: str = "", indent: str = "", width: int | None = None, wrap: bool = True) -> None:
    """Print lines on standard error, with nothing in them that a terminal would obey but `start`.

    They are wrapped to a terminal's width, elsewhere to `width`, if one is given.
    """
    width = shutil.get_terminal_size().columns if sys.stderr.isatty() else width
    width = max(20, width - 3) if wrap and width else sys.maxsize
    with contextlib.suppress(OSError):
        for line in "\n".join(lines).split("\n") if lines else ():
            print(start + "\n  ".join(wrapped(indent + visible(line), width)), file=sys.stderr)


async def compare(args: argparse.Namespace, levels: list[int | str], judge: Any = None) -> int:
    """Run the prompts with each of so many calls in flight, with each backend; print who won."""
    check_stdout()
    ran: list[Ran] = []
    deadline = args.deadline or math.inf
    end = time.monotonic() + deadline
    apis = [make_api(args, name) for name in args.backends]
    for api in apis:
        check_bulk(args, api)
    prompts = list(checked(prompts_of(args, args.limit), apis[0]))
    for api, calls in itertools.product(apis, levels):
        args.deadline = min(args.deadline, max(0.001, end - time.monotonic())) if args.deadline else None
        ran.append(await measure(args, api, calls, prompts))
        if (reason := ran[-1].run.stopped) is not None:
            print(*table(ran), sep="\n")
            if reason.kind == "deadline":  # of all runs together
                reason = PromptError("deadline", f"the deadline of {duration(deadline)} is over", "stop")
            args.facts["verdicts"] = []
            status, files = tell_report(args.extras, ran, 130 if reason.kind == "interrupted" else 3)
            say_error(*files)
            say_stopped(reason, args)
            return status
    shown = [] if judge else [as_in_the_article(ran[0], "Sequential"), as_in_the_article(ran[1], "Concurrent")]
    said = args.facts["verdicts"] = list((judge or verdicts)(ran))
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 80
    for lines in [*shown, table(ran), (line for sentence in said for line in wrapped(sentence, width))]:
        print(*lines, "", sep="\n")
    for one in ran:
        say_error(*(f"{one.title()}: {warning}" for warning in one.tally.warnings()))
    status, files = tell_report(args.extras, ran, int(any(one.tally.failed for one in ran)))
    say_error(*([] if args.quiet else files))
    return status


async def measure(args: argparse.Namespace, api: Api, calls: int | str, prompts: list[Prompt]) -> Ran:
    """Do one run of the comparison; the first call, which loads and connects everything, is before the clock."""
    run = make_run(args, api, calls)
    run.first = prompts[0]
    with interruptible(run):
        async with run:
            await run.answer(prompts[0])
            ran = Ran(api, run, calls, Tally(api.model_of))
            progress = Progress(len(prompts), ran, None, args.quiet)

            def note(result: Result) -> None:
                ran.tally.add(result)
                if result.prompt.number < 3:
                    ran.texts[result.prompt.number] = result.error.message if result.error else cell(answer_of(result))

            await (sequentially if calls == 1 else concurrently)(run, iter(prompts), note)
            ran.tally.stop()
            progress.close()
    return ran


if __name__ == "__main__":
    sys.modules["concurrent_prompts"] = sys.modules["__main__"]  # so that a backend's import finds this very module
    exit_status = main()
    if exit_status == 130:
        os._exit(exit_status)  # who has pressed Ctrl-C does not want to wait for the libraries to be taken down
    sys.exit(exit_status)
