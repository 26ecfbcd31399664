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

import array
import asyncio
import collections.abc
import contextlib
import copyreg
import dataclasses
import errno
import functools
import hashlib
import importlib
import itertools
import json
import logging
import math
import pathlib
import random
import re
import shutil
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence, Sized
from typing import IO, TYPE_CHECKING, Any, Generic, NamedTuple, NoReturn, TypedDict, TypeVar, Unpack

__version__ = "0.1.0"
__all__ = [
    "Error", "Limits", "Prompt", "PromptError", "Reply", "Result", "UsageError", "as_completed", "load_backend", "main",
    "read_prompts", "run", "run_concurrent", "run_sequential",
]  # fmt: skip

MODULE = "concurrent_prompts" if __name__ == "__main__" else __name__
if "__file__" in globals():  # backends/ and extras/ are subpackages: beside this file, or where pip puts them
    _here = os.path.dirname(os.path.abspath(__file__))
    _installed = f"{_here}/concurrent_prompts"
    __path__ = [_installed if os.path.isfile(f"{_installed}/py.typed") else _here]
    for _folder in "backends", "extras":  # or with a _
        if os.path.isdir(f"{_here}/_{_folder}"):
            sys.modules[f"{MODULE}.{_folder}"] = importlib.import_module(f"{MODULE}._{_folder}")

PROGRAM = os.path.basename(globals().get("__file__") or "concurrent_prompts.py")
DEFAULT_MODEL = "gpt-6-luna"
DEFAULT_TIMEOUT = 600.0  # seconds of one attempt: what the official SDK allows; an honest long answer is not paid twice
DEFAULT_ATTEMPTS = 8
AUTO_CONCURRENCY = 1024  # the most that `auto` tries
log = logging.getLogger("concurrent_prompts")

Item = TypeVar("Item")
if TYPE_CHECKING:  # plain `Result` is Result[Any]
    from typing_extensions import TypeVar as Var  # pyright: ignore
    T = Var("T", default=Any)
else:
    T = TypeVar("T")


# ---- Data types ----------------------------------------------------------------------------------------------


class Error(NamedTuple):
    """Why a prompt has no answer: `type` is the server's own code if it gave one, `status` its HTTP status."""

    type: str
    message: str
    status: int | None = None
    retryable: bool = False  # asking again may help


@dataclasses.dataclass(slots=True)
class Prompt:
    """One prompt: what is asked, where it stood, and what comes back beside its answer.

    `kind` is the key of `content` ("prompt", "messages", "input", "batch", or ""), `path` and `body` the request as it
    will be sent. `error` is set if there is nothing to send.
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
NO_TOKENS: Sequence[int] = (0, 0, 0, 0, 0)


class Reply(NamedTuple):
    """An answer as the server gave it; `extra` is what only some endpoints have (`embedding`, `texts`)."""

    text: Any
    finish_reason: str | None = None
    model: str | None = None
    usage: dict[str, Any] | None = None
    extra: dict[str, Any] = {}  # noqa: RUF012 - never changed
    http: Http | None = None
    headers: Mapping[str, str] = NO_HEADERS


@dataclasses.dataclass(init=False)
class Result(Generic[T]):
    """What became of one prompt: `text`, or else `error`; an answer that does not fit the schema has both.

    The clocks are in seconds and add up to the prompt's time from `started`, a Unix time: `slot_wait` (for a place in
    flight), `limit_wait` (for the server's limits or its return), `retry_wait` (back-off), `lost` (failed attempts) and
    `latency` (the last one). `tries` are the start, after `started`, and the length of each failed attempt; `limit` is
    the known limit in calls a minute.
    """

    prompt: Prompt
    text: T = None  # type: ignore[assignment]  # None if it failed
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
    tokens: Sequence[int] = NO_TOKENS  # in, out, cached, for reasoning, and written to a cache
    unanswered: int = 0  # calls whose replies were lost: they may have been billed
    lost_tokens: Sequence[int] = NO_TOKENS  # of failed attempts, as far as known
    finish_reason: str | None = None
    model: str | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    http: Http | None = None
    exception: Exception | None = dataclasses.field(init=False)  # no schema can have it
    done: bool = True  # False: never sent, or cut off by the end of the run
    kept: bool = False  # of an earlier run, from its results file
    losses: int = 0  # how often its call was given up as lost
    sent: float = -math.inf  # when the last attempt began, on the run's clock,
    missed: float = math.inf  # and the first one that found no server
    reply: Reply | None = None  # of the last call, for extras

    def __init__(self, prompt: Prompt, text: Any = None, error: Error | None = None, **fields: Any) -> None:
        self.prompt, self.text, self.error = prompt, text, error
        self.extra = {}
        if fields:  # all others are the class's own until they are set: a Result is small
            vars(self).update(fields)

    @property
    def id(self) -> str | int:
        """The prompt's `id` column, or its line number; in Python its place, from 1."""
        return self.prompt.id

    def take(self, reply: Reply) -> None:
        """Fill in the answer."""
        if reply.usage is not self.usage:
            self.tokens = token_counts(reply.usage) if reply.usage else NO_TOKENS
        self.text, self.finish_reason, self.model, self.usage, self.extra, self.http, _ = reply

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
        prompt = self.prompt
        row: dict[str, Any] = {
            "id": prompt.id,
            "text": self.text,
            "error": self.error and self.error._asdict(),
            "attempts": self.attempts,
            "latency": int(0.5 + 1e6 * self.latency) / 1e6,  # to the microsecond; round() takes four times as long
            "started": int(0.5 + 1e6 * self.started) / 1e6,
            "slot_wait": self.slot_wait and int(0.5 + 1e6 * self.slot_wait) / 1e6,
            "limit_wait": self.limit_wait and int(0.5 + 1e6 * self.limit_wait) / 1e6,
            "retry_wait": self.retry_wait and int(0.5 + 1e6 * self.retry_wait) / 1e6,
            "lost": self.lost and int(0.5 + 1e6 * self.lost) / 1e6,
        }
        if self.tries:
            row["tries"] = [(int(0.5 + 1e6 * begun) / 1e6, int(0.5 + 1e6 * took) / 1e6) for begun, took in self.tries]
        if self.limit:
            row["limit"] = int(10 * self.limit) / 10
        row["usage"], row["finish_reason"], row["model"] = self.usage, self.finish_reason, self.model
        if self.extra:
            row |= self.extra
        row["request"] = fingerprint(prompt)
        return row | beside([*row, *AT_TIMES], prompt.columns) if prompt.columns else row

    def as_line(self) -> bytes:
        """This result as a line of the results file: what went in as a Batch request comes out in kind."""
        return to_line(sibling("backends", "api").batch_row(self) if self.prompt.kind == "batch" else self.as_row())


Result.exception = None
AT_TIMES = "tries", "limit", "service_tier", "more"  # fields that not every line has


Ask = Callable[[Prompt], Awaitable[Reply]]  # what the extras wrap, too


def token_counts(usage: Mapping[str, Any]) -> list[int]:
    """Return a usage object's tokens in, out, cached, for reasoning, written to a cache; 0 where unsaid."""
    known = meanings("usage")
    return known.token_counts(usage) if known else [*NO_TOKENS]


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

    No line number is part of it: lines may be inserted, removed and moved between runs. 8 more digits are of the row
    as it was read: they tell another job from the same one with another model.
    """
    asked = prompt.body or repr(prompt.content if prompt.row is None else prompt.row).encode("utf-8", "replace")
    by = prompt.path + repr(prompt.id) if prompt.named else prompt.path
    row = (prompt.content, prompt.columns) if prompt.columns else prompt.content
    text = row if type(row) is str else repr(row)
    digest = hashlib.blake2b(asked + by.encode("utf-8", "replace"), digest_size=8).digest()
    return (digest + zlib.crc32(text.encode("utf-8", "replace")).to_bytes(4, "big")).hex()


# Requests are written by json alone: a result is recognised by their bytes, with orjson or without.
encode_json = json.JSONEncoder(ensure_ascii=False, check_circular=False, allow_nan=False, separators=(",", ":")).encode


# The value as JSON in UTF-8; TypeError, ValueError, RecursionError: it cannot be
dump: Callable[[Any], bytes] = lambda value: encode_json(value).encode()  # noqa: E731
load: Callable[[bytes | str], Any] = json.loads  # the other way; ValueError, RecursionError
with contextlib.suppress(ImportError):  # several times as fast
    orjson = importlib.import_module("orjson")
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
    too much to do, `loading` whether it is not ready yet, `useless` how many attempts were billed for nothing,
    `http` the status, request id and body, where there were any.
    """

    slow = loading = False
    useless = 0
    scope = ""  # "requests" or "tokens", where the server names the limit
    prompt: Prompt | None = None  # the one that it stopped the run at,
    asked = ""  # and its path, if all prompts have failed alike
    free = False  # it costs the prompt no attempt
    decided = False  # by the user's own `retry`
    at_once = 0  # how many calls at once the server says that it takes
    again = b""  # the request to send next time
    keep: Reply | None = None  # an answer whose text stays in the row, beside the error

    def __init__(
        self, kind: str, message: str, verdict: str = "fail", status: int | None = None, http: Http | None = None
    ) -> None:
        super().__init__(message)
        self.error = Error(kind, message, status, verdict == "retry")
        self.verdict = verdict
        self.heard = status is not None  # the server is there and speaks
        self.http, self.headers = http, NO_HEADERS
        self.wait: float | None = None

    def __str__(self) -> str:
        return self.error.message

    def __reduce__(self) -> tuple[Any, ...]:
        state = {**self.__dict__, "headers": dict(self.headers)}
        return copyreg.__newobj__, (type(self), self.error.message), state  # type: ignore[attr-defined]

    @property
    def kind(self) -> str:
        """The error's type where it is one of ours, '' where a server has spoken: it may write there what it likes."""
        return "" if self.heard else self.error.type

    @property
    def usage(self) -> dict[str, Any] | None:
        """What the server says that the call took all the same."""
        body = self.http[2] if self.http else None
        usage = body.get("usage") or body.get("usageMetadata") if isinstance(body, dict) else None
        return usage if isinstance(usage, dict) else None


def duration(span: float) -> str:
    """Return the seconds in words: '4.2 ms', '0.31 s', '12.4 s', '3 min 20 s', '2 h 5 min'."""
    if span < 0.1:
        return f"{1000 * span:.1f} ms"
    if span < 100:
        return f"{span:.2f} s" if span < 10 else f"{span:.1f} s"
    minutes, rest = divmod(round(span), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def plural(count: int, noun: str) -> str:
    """Return '1 answer', '2 answers'."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def short(text: str, width: int = 300) -> str:
    """Return the text on one line, without control characters, cut to the width."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 10 * width]).split())
    return line if len(line) <= width else f"{line[: width - 2].rstrip()} …"


def http_error(status: int, headers: Mapping[str, str], body: bytes | str | Any) -> PromptError:
    """Classify a reply that is no answer: this prompt has failed, retry, or stop the run.

    backends/failures.py knows what servers say; a lone copy goes by the status and by Retry-After.
    """
    if known := meanings("failures"):
        return known.http_error(status, headers, body)  # type: ignore[no-any-return]
    passing = status in (408, 409, 425, 429) or status >= 500
    verdict = "retry" if passing else "stop" if status in (401, 402, 403, 404, 405, 407) else "fail"
    text = body.decode("utf-8", "replace") if isinstance(body, bytes) else str(body or "")
    error = PromptError(f"http_{status}", short(text) or f"HTTP {status}", verdict, status)
    error.headers, error.slow = headers, status in (429, 503)
    with contextlib.suppress(ValueError):
        wait = float(str(headers.get("retry-after"))[:20])
        error.wait = wait if passing and 0 < wait < 1e9 else None
    return error


@functools.cache
def meanings(name: str, folder: str = "backends") -> Any:
    """Return that file of a folder beside this one, None if it or the folder is not there."""
    with contextlib.suppress(UsageError, ImportError):
        return sibling(folder, name)


def parse_json(body: bytes | str) -> Any:
    """Return the parsed body, or None where it is no JSON."""
    try:
        return load(body)
    except (ValueError, RecursionError):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(body)  # takes more: a byte order mark, NaN, half a surrogate pair
    return None


def as_prompt_error(failure: Exception) -> PromptError:
    """Classify whatever a call raised; if it cannot even be looked at, its prompt has failed."""
    if isinstance(failure, PromptError):
        return failure
    try:
        known = meanings("failures")
        return (known.classified if known else classified)(failure, short(text_of(failure)))
    except Exception:  # one of its attributes, or its class, raises something itself
        return PromptError(short(type(failure).__name__, 60), short(text_of(failure)) or "its text cannot be read")


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
    """Return the error for an exception with that text, as a lone copy can tell: by a status, or what it came from."""
    reply: Any = getattr(failure, "response", failure)
    status = getattr(reply, "status_code", None) or getattr(reply, "status", None)
    if isinstance(status, int) and 100 <= status < 600:
        headers: Any = getattr(reply, "headers", None)
        return http_error(status, headers if hasattr(headers, "get") else {}, text)
    cause: BaseException | None = failure
    for _ in range(20):  # causes may go round in a circle
        if isinstance(cause, TimeoutError | ConnectionError):
            refused = isinstance(cause, ConnectionRefusedError)
            kind = "timeout" if isinstance(cause, TimeoutError) else "unreachable" if refused else "connection_error"
            return PromptError(kind, text or kind, "retry")
        cause = cause and cause.__cause__
    return PromptError(short(type(failure).__name__, 60), text or "it has no text")


# ---- Reading prompts -----------------------------------------------------------------------------------------


TABLES = ".csv", ".tsv"  # which extras/table.py reads; without it they are not taken for text
CONTENT_KEYS = ("prompt", "messages", "input")
STDIN = "standard input"
DEEPEST = 200  # levels of nesting that are certain to be written as well as read
NOT_UTF8 = "not UTF-8 (of Windows: iconv -f cp1252 -t utf-8)"


def read_prompts(path: str | os.PathLike[str], name: str = "") -> Iterator[Any]:
    """Yield the prompts of a file, lazily and in order; what cannot be read becomes a prompt with an `error`.

    Messages call the file by `name`, or by its path. Raises UsageError, at the first, if the file cannot be used.
    """
    known = meanings("reading", "extras")
    with (known.open_rows if known else open_plain)(path, name or str(path)) as (rows, name):
        for number, (line, row) in enumerate(rows):
            yield as_prompt(row, number, line, f"{name} line {line}")


@contextlib.contextmanager
def open_plain(path: str | os.PathLike[str], name: str) -> Iterator[tuple[Iterator[tuple[int, Any]], str]]:
    """Open a file of lines of UTF-8, JSON if it is called .jsonl; extras/reading.py knows what else there may be."""
    suffix = pathlib.PurePath(name).suffix.lower()
    if name == "-" or suffix in (*TABLES, ".gz"):
        sibling("extras", "reading", STDIN if name == "-" else f"a {suffix} file")
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below
    except OSError as failure:
        raise UsageError(f"cannot read {name}: {failure.strerror}") from None
    with file:
        start = file.peek(4096)
        if 8 * start.count(0) > len(start) or start[:2] in (b"\x1f\x8b", b"\xff\xfe", b"\xfe\xff"):
            raise UsageError(f"{name} holds binary data or UTF-16; name a file of text in UTF-8")
        file.seek(3 * start.startswith(b"\xef\xbb\xbf"))  # a byte order mark
        yield line_rows(file, suffix in (".jsonl", ".ndjson")), name


def line_rows(lines: Iterable[bytes | Error], as_json: bool) -> Iterator[tuple[int, Any]]:
    """Yield the number and the value of each line that is not blank; an Error stands for one that cannot be read."""
    decode = getattr(meanings("strict"), "decode_row", json.loads)  # which is less strict
    for number, line in enumerate(lines, 1):
        try:
            if isinstance(line, Error):
                yield number, line
                continue
            text = line.decode().strip() if as_json else line.decode().rstrip("\r\n")
            if text and not text.isspace():
                yield number, decode(text) if as_json else text
        except UnicodeDecodeError:
            yield number, Error("unreadable", NOT_UTF8)
        except json.JSONDecodeError as failure:  # its own line number would be always 1
            yield number, Error("unreadable", f"not JSON: {failure.msg} at column {failure.colno}")
        except (ValueError, RecursionError) as failure:
            yield number, Error("unreadable", f"not JSON: {failure}")


def as_prompt(row: Any, number: int, line: int, where: str) -> Prompt:
    """Return the prompt that a row holds: a text, an object, an OpenAI Batch request, or an Error."""
    prompt = Prompt(number, row, line, where=where, row=row)
    if isinstance(row, str):
        return prompt
    if type(row) is dict and len(row) == 1 and "prompt" in row:
        prompt.content = row["prompt"]
        return prompt
    if not isinstance(row, dict):
        row = row if isinstance(row, Error) else Error("unreadable", "neither a text nor an object")
        prompt.error = row._replace(message=f"{where}: {row.message}")
    elif "custom_id" in row and "body" in row:
        prompt.kind, prompt.id, prompt.named = "batch", row["custom_id"], True
    else:
        prompt.kind = "prompt" if "prompt" in row else next((key for key in CONTENT_KEYS if key in row), "")
        own = ("id", prompt.kind) if prompt.kind else ("id",)  # a column may be called ""
        prompt.content = row[prompt.kind] if prompt.kind else None
        if len(row) > 1 or not prompt.kind:
            prompt.columns = {key: value for key, value in row.items() if key not in own}
        if row.get("id") not in (None, ""):
            prompt.id, prompt.named = row["id"], True
    if type(prompt.id) is not int and (isinstance(prompt.id, bool) or not isinstance(prompt.id, str | int)):
        prompt.id, prompt.named = line, False
        prompt.error = Error("unreadable", f"{where}: the id is neither a text nor a whole number")
    return prompt


def own_prompt(item: Any, number: int) -> Prompt:
    """Return the Prompt for an item of the user's own. Raises TypeError if the first is none."""
    if isinstance(item, Prompt):
        return dataclasses.replace(item, number=number, path="", body=b"")  # another run may ask otherwise
    prompt = as_prompt(item, number, number + 1, f"prompt {number + 1}")
    if prompt.error and not number and not isinstance(item, Error):
        raise TypeError(f"{prompt.error.message}, but {type(item).__name__}: {short(repr(item), 60)}")
    return prompt


def as_prompts(items: Iterable[Any]) -> Iterator[Prompt]:
    if isinstance(items, str | bytes | os.PathLike):
        raise TypeError("prompts is one text; pass a list of them, or read_prompts(path)")
    return map(own_prompt, items, itertools.count())


# ---- Loading -------------------------------------------------------------------------------------------------


def load_backend(name: str | None = None, **settings: Any) -> Any:
    """Return the API behind the backend of that name, ready to be passed as `send`; `settings` are Api's.

    Besides: `schema`, a JSON schema for each answer, and `worker_backend`, what a bulk backend calls with. Raises
    UsageError if there is no such backend or library.
    """
    return sibling("backends", "loading").load_backend(name, **settings)


def sibling(folder: str, name: str, asked: str = "") -> Any:
    """Return the module of that name in a folder beside this file; UsageError if it, or what it needs, is missing."""
    gone = f"{MODULE}.{folder}"
    try:
        if hasattr(importlib.import_module(gone), "core"):  # else it is somebody else's
            return importlib.import_module(f"{gone}.{name}")
    except ModuleNotFoundError as missing:
        gone = missing.name or f"{gone}.{name}"
        if not gone.startswith(MODULE):
            raise
    path = gone.removeprefix(f"{MODULE}.").replace(".", "/")
    file = f"{path}.py" if "/" in path else f"the folder {path}/"
    what = f"{asked} needs {file}, which" if asked else f"{file} is missing; it"
    raise UsageError(f"{what} goes beside {PROGRAM}")


@functools.cache
def extras_folder() -> Any:
    """Return the package extras/, or None if that folder is not there."""
    with contextlib.suppress(ModuleNotFoundError):
        folder = importlib.import_module(f"{MODULE}.extras")
        return folder if hasattr(folder, "INDEX") else None


def hooked(extras: Iterable[Any], hook: str) -> list[Any]:
    """Return that method of all the extras that have it."""
    return [getattr(extra, hook) for extra in extras if hasattr(extra, hook)]


class Own:
    """The user's own coroutine function, behind the same door as an Api."""

    loop, extras, clocked, parting = None, (), True, ""
    conceal, prepare = staticmethod(str), staticmethod(lambda prompt: prompt)
    model_of = staticmethod(lambda prompt: None)  # the function knows, and does not say

    def __init__(self, send: Callable[[Any], Awaitable[Any]], retry: Callable[[Exception], Any] | None = None) -> None:
        if not callable(send):
            raise TypeError("send is neither a coroutine function nor a loaded backend")
        self._send, part = send, meanings("library", "extras")  # a lone copy checks less
        self._decided = sibling("extras", "library", "retry=").deciding(retry) if retry else lambda failure: failure
        self._as_reply = part.replying(send) if part else lambda it: it if isinstance(it, Reply) else Reply(it)

    @contextlib.asynccontextmanager
    async def open(self, concurrency: int) -> AsyncIterator[Ask]:
        yield self._call

    async def _call(self, prompt: Prompt) -> Reply:
        try:
            waiting = self._send(prompt.content if prompt.row is None else prompt.row)
            if isinstance(waiting, Awaitable):
                return self._as_reply(await waiting)
        except Exception as failure:
            raise self._decided(failure)  # noqa: B904 - it is the same one, or has it as its cause
        raise PromptError("send", "send is not a coroutine function: write it as `async def`", "stop")


# ---- Limits and retries --------------------------------------------------------------------------------------


BACKOFF_BASE, BACKOFF_CEILING = 0.5, 60.0  # seconds
PAUSE_CEILING = 120.0  # seconds of Retry-After that are slept through; what is above is said and tried earlier
PROBE = 1.0  # seconds between two tries while nobody is there


def backoff(attempt: int, draw: Callable[[], float] = random.random) -> float:
    """Return the seconds to wait after an attempt (from 1): full jitter below a ceiling that doubles each time."""
    return draw() * min(BACKOFF_CEILING, BACKOFF_BASE * 2.0 ** min(attempt, 30))


@dataclasses.dataclass(slots=True, eq=False)
class Call:
    """A call in flight; `losses` is how often its prompt was given up as lost before, None where it must not be."""

    task: asyncio.Task[Any]
    started: float = 0.0
    losses: int | None = 0
    cost: float = 0.0  # tokens, an estimate
    prompt: int = 0  # its number
    place: int = 1  # among the calls in flight when it went out
    number: int = 1  # among all
    latency: float = 0.0
    spent: Sequence[float] = (math.inf, math.inf)  # requests and tokens by all calls, when it went out
    heard: float = -math.inf  # when some of its reply came
    alive: float = 0.0  # when it, or one that began before it, was seen to go on
    signs: int = 0  # of life since the last look at it
    ended: PromptError | None = None  # why the run has ended it

    def hear(self) -> None:
        """Note that some of its reply has come: such a call is not lost."""
        self.signs += 1

    def end(self, reason: PromptError) -> None:
        """Cancel it."""
        if self.ended is None:
            self.ended = reason
            self.task.cancel()


NEVER_THERE = {"unreachable", "certificate", "too_many_files"}  # calls that nobody has billed


def no_service(failure: PromptError) -> bool:
    """Whether nobody may be there for anybody: a connection was refused or lost, or the server or a gateway says so."""
    if failure.kind in ("unreachable", "connection_error"):
        return True
    return failure.verdict == "retry" and (failure.error.status or 0) >= 500


def best(file: str, plain: Any) -> Any:
    """Return the class of that name in a file of backends/, which knows more; in a lone copy the plain one."""
    return getattr(meanings(file), plain.__name__, plain)


class Limiter:
    """When the next call may go out: the run's state, not each prompt's.

    The calls in flight double each round trip, to no more than will be answered within half of the `timeout` at the
    rate seen. A rejection is a pause of the whole run and makes them a third fewer, after which they grow more slowly;
    one among many answers says little. If several calls in a row found nobody, one a second tries whether somebody is
    there. What is sent for the first time and what is sent again take turns.
    This is what a lone copy knows; in its place backends/limiter.py measures, and learns what limits there are.
    """

    in_flight = sent = queued = 0
    heard = False  # whether the server has ever said anything
    latest = -math.inf  # the start of the latest call that was answered
    limit: float | None = None  # how many calls a minute are known to be let through
    away_since: float | None = None
    opened: Callable[[], None] | None = None  # is called when another call may go out
    defer: Callable[..., Any] | None = None  # calls a function later
    _opens = -math.inf  # before that nothing goes out
    _rejection, _rejections = -math.inf, 0  # the last one; how many since an answer
    _answers = 0  # since a rejection
    _held_up = 0.0  # seconds in which calls waited for the time to come
    _alarm: asyncio.Future[None] | None = None  # for the next one that waits,
    _due = 0.0  # and when it rings
    _again = False  # whether one that is sent again is next
    # How many tokens a request will count for; learn how many it did: backends/limiter.py
    estimate: Any = staticmethod(lambda body: 0.0)
    learn: Any = staticmethod(lambda body, tokens, estimate: None)

    def __init__(
        self, start: int, ceiling: int, clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep, rpm: float | None = None,
        tpm: float | None = None, timeout: float = math.inf,
    ) -> None:  # fmt: skip
        if tpm:
            sibling("backends", "limiter", "tpm")
        self._size, self._ceiling, self._within, self._gave_way = float(start), ceiling, timeout / 2, 0.0
        self._gap = 60 / rpm if rpm else 0.0  # seconds between two calls
        self._clock, self._sleep = clock, sleep
        self._in_vain: list[int] = []  # the prompts whose calls found nobody since one did
        # What waits for its turn, for the first time or again
        self._queues: tuple[collections.deque[Any], collections.deque[Any]] = collections.deque(), collections.deque()

    @property
    def has_room(self) -> bool:
        """Whether one more call may be in flight."""
        return self.in_flight + 1 <= (self._size if self._rejections < 2 else 1)

    def admit(self, call: Call) -> bool:
        """Let a call go out if it need not wait; return whether it may."""
        now = self._clock()
        if self.queued or self._closed(call, now):
            return False
        self._let_go(call, now)
        return True

    async def turn(self, call: Call, again: bool = False) -> float:
        """Wait until a call may go out, maybe not for the first time; return the seconds in which time held it up."""
        asked, held_up = self._clock(), self._held_up
        waiting = self._line_up(call, again)
        try:
            await waiting
        except asyncio.CancelledError:
            self._leave(call, waiting, again)
            raise
        return min(self._clock() - asked, self._held_up - held_up)

    def _line_up(self, call: Call, again: bool) -> asyncio.Future[None]:
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues[again].append((call, waiting))
        self.queued += 1
        self.release()
        return waiting

    def _leave(self, call: Call, waiting: asyncio.Future[None], again: bool) -> None:
        """Give up a turn; let the next one have it."""
        if (call, waiting) in self._queues[again]:
            self.queued -= 1
            self._queues[again].remove((call, waiting))
        else:  # it could have gone
            self._take_back(call)
        self.release()

    def release(self) -> None:
        """Let out what waits, as far as it may go; set an alarm for the next one where that is a matter of time."""
        now = self._clock()
        while self.queued:
            queue = self._queues[self._again] or self._queues[not self._again]
            call, waiting = queue[0]
            if waiting.done():  # cancelled, and about to hear of it
                return
            if span := self._closed(call, now):
                return self._set_alarm(span, now)
            self._let_go(call, now)
            queue.popleft()
            self.queued, self._again = self.queued - 1, not self._again
            self._call_up(waiting)
        if self._alarm:
            self._alarm.cancel()
            self._alarm = None

    @staticmethod
    def _call_up(waiting: asyncio.Future[None]) -> None:
        if not waiting.done():  # cancelled meanwhile
            waiting.set_result(None)

    def _set_alarm(self, span: float, now: float) -> None:
        if span < math.inf and (self._alarm is None or self._alarm.done() or now + span < self._due - 0.001):
            if self._alarm:
                self._alarm.cancel()
            self._due, self._alarm = now + span, asyncio.ensure_future(self._wake(span))

    async def _wake(self, span: float) -> None:
        began = self._clock()
        try:
            await self._sleep(span)
        finally:
            self._held_up += self._clock() - began
        self._alarm = None
        self.release()

    def _closed(self, call: Call, now: float) -> float:
        """Return the seconds until a call may go out: 0.0 now, inf not before another has ended."""
        return max(0.0, self._opens - now) if self.has_room else math.inf

    def _let_go(self, call: Call, now: float) -> None:
        self.in_flight += 1
        self.sent += 1
        call.started, call.place = now, self.in_flight
        self._opens = now + PROBE if self.away_since is not None else max(now, self._opens) + self._gap

    def _take_back(self, call: Call) -> None:
        self.in_flight -= 1

    def settle(self, call: Call, outcome: Reply | PromptError) -> None:
        """Take back the place of a call, and learn from how it ended."""
        now = self._clock()
        self.in_flight -= 1
        call.latency = now - call.started
        if not isinstance(outcome, PromptError):
            self._answered(call)
        elif outcome.slow or outcome.kind == "timeout" or outcome.error.status == 504:
            self._give_way(call, outcome, now)
        self.heard |= not isinstance(outcome, PromptError) or outcome.heard
        if not isinstance(outcome, PromptError) or not no_service(outcome):
            self._mark_up(now)
        elif not outcome.slow:
            self._in_vain.append(call.prompt)
            several = len(self._in_vain) > 2 and len({*self._in_vain}) >= min(2, self._size)
            if several and self.away_since is None:
                self.away_since, self._opens = now, now + PROBE
                log.warning("server unreachable (%s): retrying once a second", outcome)
        self.release()
        if self.opened:
            self.opened()

    def _answered(self, call: Call) -> None:
        self.latest = max(self.latest, call.started)
        if call.started > self._rejection:
            self._rejections, self._answers = 0, self._answers + 1
        most = min(self._ceiling, self._within * call.place / max(1e-6, call.latency))
        self._gave_way *= 0.99
        self._size = max(1.0, min(most, self._size + min(1.0, 1 / max(1e-6, self._gave_way * self._size))))

    def _give_way(self, call: Call, failure: PromptError, now: float) -> None:
        if failure.at_once:
            self._size = self._ceiling = failure.at_once
        elif call.started > self._rejection:  # not one of those that went out together
            seldom, self._answers = self._answers > 12 and not failure.wait, 0
            self._rejection, self._rejections = now, self._rejections + 1
            if not seldom:
                self._size, self._gave_way = max(1.0, min(self._size, self.in_flight + 1) * 2 / 3), self._gave_way + 1
            wait = failure.wait or (0.1 if seldom else backoff(self._rejections) if failure.slow else 0.0)
            self._opens = max(self._opens, now + min(wait, PAUSE_CEILING))

    def _mark_up(self, now: float) -> None:
        self._in_vain.clear()
        if self.away_since is not None:
            log.warning("the server is back after %s", duration(now - self.away_since))
            self.away_since, self._opens = None, now


class Evidence:
    """What failures say of the server rather than of their prompt. backends/evidence.py weighs more of them."""

    FREE_ATTEMPTS = 28  # of each prompt that finds nobody, if nothing else tells whether the server is there

    def __init__(self, run: "Run") -> None:
        self.run = run
        self.refusal: tuple[Any, ...] = ()  # what stops the run, if it is not the prompt's own,
        self.refused_at = -math.inf  # and when somebody was refused so
        self.unheard: collections.Counter[int] = collections.Counter()  # prompts that found nobody since it was heard

    def weigh(self, result: Result, failure: PromptError) -> str:
        """Return "stop" if nothing was answered yet, or three prompts in a row fail so; else "fail"."""
        self.refusal += (result.prompt.number,)
        own = failure.error.status in (403, 404)
        first = not self.run.answers and not own
        return "stop" if not failure.heard or first or len({*self.refusal}) >= 3 else "fail"

    async def examine(self, prompt: Prompt, failure: PromptError, result: Result) -> bool:
        """Whether an attempt failed because nobody is there: it costs its prompt nothing. Stop if nobody ever was."""
        result.missed, since = min(result.missed, result.sent), self.run.limiter.away_since
        self.unheard[prompt.number] += 1
        ever = self.run.limiter.heard or failure.kind != "unreachable"
        if not ever and (result.attempts >= 3 or (since and self.run.clock() - since >= 2 * PROBE)):
            self.run.stop(PromptError("unreachable", failure.error.message, "stop"))
        away = since is not None and no_service(failure)
        return away and self.unheard[prompt.number] <= self.FREE_ATTEMPTS


class Run:
    """One pass over the prompts: how each is answered, and when to stop.

    `answer` does the attempts of one prompt and always returns a Result. An error that would meet every prompt stops
    the run: what is in flight finishes, what waits gives up, nothing more is admitted. A server that goes away is
    waited for, which costs no prompt an attempt; `deadline` (seconds) bounds it all, the calls in flight too.
    `extras` are the objects of extras/; `max_cost` (USD) and `price` the short form of a Budget.
    """

    SWEEP = 0.1  # seconds between two looks at the calls in flight

    stopped: PromptError | None = None
    broken: BaseException | None = None  # what the iterable has raised
    start: Callable[[], None] | None = None  # starts another worker
    passed: Callable[[Prompt], Awaitable[bool]] | None = None  # whether a prompt has a result already
    journal: Any = None  # what keeps or prints the results
    path: pathlib.Path | None = None  # its file
    overwrites, whole = False, True  # whether what it holds is given up; whether all of the input is asked for
    pending: Any = None  # what a bulk backend has running elsewhere,
    said = ""  # and what it is waiting for
    answers = most_in_flight = 0
    answered_at = -math.inf  # when the last answer came
    _oldest = math.inf  # the start of the oldest call that was answered since the last look at all

    def __init__(
        self, send: Any, *, concurrency: int | str = "auto", max_attempts: int = DEFAULT_ATTEMPTS,
        timeout: float = DEFAULT_TIMEOUT, deadline: float | None = None, rpm: float | None = None,
        tpm: float | None = None, extras: Iterable[Any] = (), max_cost: float | None = None,
        price: Iterable[float] | None = None, retry: Callable[[Exception], Any] | None = None,
        resend_lost: bool = True, limits: Any = None, clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:  # fmt: skip
        auto = concurrency == "auto"
        self.concurrency = AUTO_CONCURRENCY if auto else int(concurrency)
        numbers = [number for number in (timeout, deadline, rpm, tpm) if number is not None]
        if self.concurrency < 1 or max_attempts < 1 or not all(number > 0 for number in numbers):
            raise ValueError("concurrency, max_attempts, timeout, deadline, rpm and tpm must be greater than 0")
        if retry and hasattr(send, "prepare"):
            raise ValueError("retry= is for your own function; a backend classifies its own errors")
        self.api: Any = send if hasattr(send, "prepare") else Own(send, retry)
        self.loop = self.api.loop  # what a bulk backend does instead of the run's own
        self.extras = [*self.api.extras, *extras]
        if max_cost is not None:
            self.extras.append(sibling("extras", "budget", "max_cost").Budget(max_cost, price))
        elif price is not None:
            self.extras.append(sibling("extras", "prices", "price").Prices(price))
        if self.extras and not extras_folder():
            sibling("extras", "wraps", "an extra")
        self.listeners, self.wrapped_by = hooked(self.extras, "on_result"), hooked(self.extras, "wrap")
        clock, sleep = (limits.clock, limits.sleep) if limits else (clock, sleep)
        start = max(1, min(16, int(timeout))) if auto else self.concurrency
        own = None if limits else best("rejections", Limiter)(start, self.concurrency, clock, sleep, rpm, tpm, timeout)
        self.limiter: Any = own or limits.share(rpm or tpm or self.loop)
        self.patience: Any = (known := meanings("stragglers")) and known.Patience(self, resend_lost)
        self.evidence: Evidence = best("evidence", Evidence)(self)
        self.options: dict[str, Any] = {"concurrency": concurrency, "max_attempts": max_attempts, "timeout": timeout}
        self.options |= {"rpm": rpm, "tpm": tpm}
        self.max_attempts, self._timeout = max_attempts, timeout
        self._queueing = timeout / 4  # seconds: an answer that takes longer has stood in a queue
        self._deadline, self._bounded = math.inf if deadline is None else deadline, deadline is not None
        self.clock, self.sleep, self.epoch = clock, sleep, time.time() - clock()
        self.first = Prompt(0, "")  # the first prompt that can be sent, if that is known beforehand
        self.open: dict[int, Result] = {}  # what is in the making, by the prompts' numbers
        self.backing_off: dict[int, float] = {}  # until when, by the prompt's number
        self.calls: dict[asyncio.Task[Any], Call] = {}  # in the order of their starts
        self.wrapping: set[asyncio.Task[Any]] = set()  # in what the extras do after the call
        self._counts = best("usage", token_counts)
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._resting: set[asyncio.Task[Any]] = set()
        self._warned: set[str] = set()
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> "Run":
        self._loop = asyncio.get_running_loop()
        async with contextlib.AsyncExitStack() as stack:
            self.call = await stack.enter_async_context(self.api.open(self.concurrency))
            self._alive = getattr(self.api, "alive", None)
            if sessions := hooked(self.extras, "session"):
                await extras_folder().enter(self, sessions, stack)
            wraps: Any = self.wrapped_by and sibling("extras", "wraps")
            self._answer_once: Ask = wraps.wrapped(self, self._attempt) if wraps else self._attempt
            self.limiter.defer = self._loop.call_later
            self._stack = stack.pop_all()
        self._due = self._loop.time() + self._deadline
        if self._bounded:
            self._later("deadline", self._deadline, self._end)
        return self

    def _later(self, name: str, delay: float, action: Callable[[], None], late: bool = False) -> None:
        """Set a timer. If it comes late (the process was stopped), the replies that wait are read first, but only once.

        A server can keep the event loop so busy that every timer is late.
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
        if self.patience:
            await self.patience.close()
        await self._stack.aclose()

    def admit(self, prompts: Iterable[Prompt]) -> Iterator[Prompt]:
        """Yield the prompts, ready to be sent, until there are no more or the run is stopped."""
        rest = iter(prompts)
        while self.stopped is None:
            try:
                prompt = next(rest, None)
            except (PromptError, UsageError) as failure:  # of an extra
                return self.stop(failure if isinstance(failure, PromptError) else PromptError("extra", str(failure)))
            except (Exception, asyncio.CancelledError) as failure:  # of the iterable
                self.broken = failure
                return
            if prompt is None:
                return
            yield prompt if prompt.body else self.api.prepare(prompt)

    def start_more(self) -> None:
        """Start another worker if its call could go out."""
        if self.start and self.limiter.has_room and not self.limiter.queued:
            self.start()

    async def answer(self, prompt: Prompt) -> Result:
        """Send the prompt, again where that may help, and return its Result; raises only CancelledError."""
        result = Result(prompt, error=prompt.error)
        if prompt.error is not None:
            await asyncio.sleep(0)  # a million unreadable lines must not hold up the calls in flight
            return result
        self.open[prompt.number] = result
        result.started = self.epoch + self.clock()
        asked, before = prompt, 0
        try:
            while True:
                try:
                    self.took(result, await self._answer_once(asked))
                    return result
                except Exception as exc:
                    failure = self.missed(result, exc, result.attempts > before)
                free = await self.evidence.examine(prompt, failure, result) or failure.free
                if not await self._goes_on(result, failure, free):
                    return result
                before = result.attempts
                if failure.again:
                    asked = dataclasses.replace(prompt, body=failure.again)
        finally:
            del self.open[prompt.number]

    async def _goes_on(self, result: Result, failure: PromptError, free: bool) -> bool:
        """Wait before the next attempt, after one that may be `free`; return False if this was the last."""
        if self.has_failed(result, failure, free):
            return False
        began, took = result.waited(), result.latency
        at_once = free and (failure.free or self.limiter.away_since is not None)
        if self.stopped or not (at_once or await self._back_off(failure, result)):
            self.unfinished(result)
            return False
        result.attempts -= free and (failure.free or not failure.heard or not self.answered_since(result))
        result.set_aside(began, took)
        return True

    def took(self, result: Result, reply: Reply) -> None:
        """Fill in the answer to a prompt."""
        result.take(reply)
        if result.error is not None or result.reply:
            result.error = result.exception = result.reply = None
        self.answers += 1
        if self.evidence.refusal and result.sent >= self.evidence.refused_at:
            self.evidence.refusal = ()

    def missed(self, result: Result, failure: Exception, sent: bool) -> PromptError:
        """Note what came instead of an answer, of a call if one was `sent`; return it as one of our errors."""
        reply, result.reply = result.reply, None
        if not isinstance(failure, PromptError):  # what an extra did not mean to raise
            return sibling("extras", "wraps").broken(self, result, reply, failure)  # type: ignore[no-any-return]
        if failure.keep:
            result.take(failure.keep)
            result.tokens = NO_TOKENS
            extras_folder().discreet(self, failure)
        if sent:
            result.lose(failure)
        return failure.with_traceback(None)

    def has_failed(self, result: Result, failure: PromptError, free: bool = False) -> bool:
        """Note what came instead of an answer; return whether that is the prompt's end. A `free` attempt is not one."""
        before = result.exception if isinstance(result.exception, PromptError) and result.exception.keep else None
        earlier = getattr(result.exception, "useless", 0)
        failure.useless += earlier
        known = failure if failure.keep else before or failure  # an answer that is not right is more than none
        result.error, result.http, result.exception = known.error, known.http, known
        verdict = "fail" if failure.again and before else failure.verdict  # once is enough
        if verdict == "stop" and (verdict := self.evidence.weigh(result, failure)) == "stop":
            self.stop(failure, result.prompt)
        spent = (result.attempts >= self.max_attempts and not free) or 1 < failure.useless > earlier
        return verdict == "fail" or bool(known.keep if self.stopped else spent)

    def unfinished(self, result: Result) -> Result:
        """Return the result of a prompt that the end of the run has left open."""
        result.done = False
        result.error = result.error if result.attempts else self.not_sent()
        return result

    def answered_since(self, result: Result) -> bool:
        """Whether the server has answered something that it was asked after the prompt first found nobody."""
        return bool(self.limiter.latest > result.missed)

    async def _attempt(self, prompt: Prompt) -> Reply:
        """Send a prompt once, when the limits allow it, and return the answer. Raises PromptError."""
        result, limiter = self.open[prompt.number], self.limiter
        if self._bounded and self._loop.time() >= self._due:
            self._end()  # a user's function that awaits nothing lets no timer ring
        task = asyncio.current_task(self._loop)
        assert task is not None
        losses = result.losses if result.attempts + 1 < self.max_attempts else None
        call = Call(task, 0.0, losses, limiter.estimate(prompt.body), prompt.number)
        if self.stopped or not limiter.admit(call):
            await self._turn(result, call)
        if self.start:
            self.start_more()
        result.attempts += 1
        result.sent = call.started
        if call.place > self.most_in_flight:
            self.most_in_flight = call.place
        self.calls[task] = call
        if self._alive:
            self._alive.set(call.hear)
        if "sweep" not in self._timers:
            self._sweep()
        cancelled = task.cancelling()
        try:
            reply: Reply = await self.call(prompt)
        except BaseException as exc:
            raise self._failed(call, exc, cancelled, result)  # noqa: B904 - it has its cause
        del self.calls[task]
        if call.ended is not None:
            task.uncancel()
        limiter.settle(call, reply)
        self._answered_by(call, reply, prompt, result)
        return reply

    async def _turn(self, result: Result, call: Call) -> None:
        """Wait until a call may go out. Raises PromptError where the run is stopped meanwhile."""
        asked = self.clock()
        waited = await self.wait_or_stop(self.limiter.turn(call, result.attempts > 0))
        if waited is None:
            raise self.stop_error()
        result.limit_wait += waited
        result.slot_wait += max(0.0, self.clock() - asked - waited)

    def _failed(self, call: Call, exc: BaseException, cancelled: int, result: Result) -> BaseException:
        """Learn from a call without an answer; return what is to be raised: a PromptError, or what is not ours."""
        del self.calls[call.task]
        ours = call.task.cancelling() <= cancelled + (call.ended is not None)
        if call.ended is not None:
            call.task.uncancel()
        if isinstance(exc, Exception):  # a bug in the reader's own code too costs no other prompt its answer
            failure = call.ended or as_prompt_error(exc)
        else:
            failure = call.ended or PromptError("CancelledError", "send cancelled its own call")
        if failure is not exc:
            failure.__cause__ = exc if isinstance(exc, Exception) else None
        self.limiter.settle(call, failure)
        if not isinstance(exc, Exception) and not (ours and isinstance(exc, asyncio.CancelledError)):
            return exc
        result.latency = call.latency
        result.losses += failure.kind == "lost" and not failure.free
        return failure

    def _answered_by(self, call: Call, reply: Reply, prompt: Prompt, result: Result) -> None:
        """Learn from an answer."""
        result.latency = latency = call.latency
        result.limit = self.limiter.limit
        if self.wrapped_by:  # an extra may fail
            result.reply = reply
        self.answered_at = call.started + latency
        if latency > self._queueing:
            self._oldest = min(self._oldest, call.started)
        if self.evidence.unheard:
            self.evidence.unheard.clear()
        if self.patience:
            self.patience.answered(call)
        if reply.usage:
            result.usage, result.tokens = reply.usage, self._counts(reply.usage)
            self.limiter.learn(prompt.body, result.tokens, call.cost)

    def _sweep(self) -> None:
        """End the calls that take too long, and look again as long as there are any."""
        now = self.clock()
        for call in self.calls.values():
            if call.signs:
                call.signs, call.heard = 0, now
            if call.heard == now or call.started > self._oldest:
                call.alive = now
            if now - max(call.started, call.alive) >= self._timeout:
                call.end(PromptError("timeout", f"no answer in {duration(self._timeout)}", "retry"))
        if self.patience:
            self.patience.give_up([*self.calls.values()], now)
        self._oldest = math.inf
        oldest = next((max(call.started, call.alive) for call in self.calls.values() if call.ended is None), now)
        if self.calls:
            self._later("sweep", max(0.001, min(self.SWEEP, oldest + self._timeout - now)), self._sweep)
        else:
            self._timers.pop("sweep", None)

    def _end(self) -> None:
        self.cut(PromptError("deadline", f"the deadline of {duration(self._deadline)} is over", "stop"))

    def cut(self, reason: PromptError) -> None:
        """End the run, and what is in flight."""
        self.stop(reason)
        for call in self.calls.values():
            call.end(reason)
        for task in self.wrapping - self.calls.keys() - self._resting:
            self.wrapping.discard(task)
            task.cancel()

    async def _back_off(self, failure: PromptError, result: Result) -> bool:
        """Wait before the next attempt; return False where the run was stopped meanwhile."""
        wait, asked = self.wait_after(failure, result.attempts), self.clock()
        log.info("%s: %s; attempt %d in %s", result.id, failure, result.attempts + 1, duration(wait))
        self.backing_off[result.prompt.number] = asked + wait
        if self.start:
            self.start()  # what is rejected again and again should not be the same few prompts
        try:
            awake = await self.wait_or_stop(self.sleep(wait))
        finally:
            del self.backing_off[result.prompt.number]
        result.retry_wait += self.clock() - asked
        return awake is not None

    def wait_after(self, failure: PromptError, attempts: int) -> float:
        """Return the seconds to wait after so many attempts, the last of which has failed so."""
        if failure.slow:  # else the limits say when the next call may go out
            return 0.0 if failure.at_once else min(failure.wait or 0.0, PAUSE_CEILING)
        if failure.decided and failure.wait is not None:
            return failure.wait
        at_once = failure.kind == "lost" or (failure.kind == "connection_error" and attempts == 1)
        wait = 0.0 if at_once or failure.again else backoff(attempts)
        if self.answered_at > self.clock() - 5:
            wait = min(1.0, wait / 4)  # others are answered meanwhile: there is little to wait for
        told = failure.wait or 0.0
        if told > PAUSE_CEILING:
            text = f"the server asks to wait {duration(told)}; retrying in {PAUSE_CEILING:.0f} s"
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

    def tell(self, result: Result) -> None:
        """Tell the extras of a result that is recorded."""
        for listener in self.listeners:
            extras_folder().call_hook(self, listener, result)

    def stop(self, reason: PromptError, prompt: Prompt | None = None) -> None:
        """Admit nothing more, wake what waits, let the calls in flight finish; `prompt` met the reason."""
        reason.prompt = prompt
        if self.stopped is None and self.calls and reason.kind != "interrupted":
            calls = plural(len(self.calls), "call")
            log.warning("stopping (%s): %s in flight may finish", short(str(reason), 90), calls)
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


class Ran(NamedTuple):
    """One run, with all that is to be said of it."""

    api: Any
    run: Run
    asked: int | str  # calls in flight at the most
    tally: Any


Record = Callable[[Result], Awaitable[None] | None]


async def deliver(run: Run, record: Record, result: Result) -> None:
    """Record a result, wait where that takes long, and tell the extras of it."""
    if (waiting := record(result)) is not None:
        await waiting
    run.tell(result)


async def _work(way: Any, run: Run, items: Any, record: Record) -> None:
    """Answer the user's own prompts in that way; those of a list that were never sent get a Result too."""
    prompts = items if hasattr(items, "__aiter__") else as_prompts(items)
    try:
        await way(run, prompts, record)
    finally:
        if hasattr(items, "aclose"):
            await items.aclose()
    for prompt in prompts if isinstance(items, Sized) else ():
        await asyncio.sleep(0)  # there may be many
        if not (run.passed and await run.passed(run.api.prepare(prompt))):
            await deliver(run, record, Result(prompt, error=run.not_sent(), done=False))


def worker_for(run: Run, prompts: Any, record: Record) -> Any:
    """Return the coroutine function that answers one prompt after the other, as long as there are any.

    It returns True if it ends earlier because others wait for their turn: as many are left as the limits keep busy.
    """
    if hasattr(prompts, "__aiter__"):
        return sibling("extras", "library", "an asynchronous iterable").worker_for(run, prompts, record)
    admitted = run.admit(prompts)

    async def worker() -> bool:
        for prompt in admitted:
            if run.passed and await run.passed(prompt):
                continue
            result = await run.answer(prompt)
            if (waiting := record(result)) is not None:
                await waiting
            if run.listeners:
                run.tell(result)
            if run.limiter.queued:
                return True
        return False

    return worker


# ---- Journal -------------------------------------------------------------------------------------------------


RESULT_MOST = 1 << 30  # bytes of a line: what is longer is none (MAX_BODY in backends/__init__.py twice, and columns)
LINE_START = b'{"id":'  # of every line of ours: what was cut shorter than that may still be one


def open_journal(path: pathlib.Path, **options: bool) -> "Journal":
    """Open a results file to write it: options and errors are Journal's. extras/outputs.py knows odd ones."""
    known = meanings("outputs", "extras")
    return (known.CarefulJournal if known else Journal)(path, **options)


class Earlier:
    """The lines that a results file holds already, by their requests."""

    def __init__(self) -> None:
        self.places: Any = []  # where they begin
        self.errors: dict[int, Error] = {}  # of those that failed, by their numbers
        self._left: dict[str, list[int]] = {}  # those that belong to no prompt

    def add(self, place: int, row_id: Any, key: str, error: Error | None) -> None:
        """Add a line with that fingerprint."""
        number = len(self.places)
        self.places.append(place)
        self._left.setdefault(key[:16], []).append(number)
        if error:
            self.errors[number] = error

    def claim(self, key: str) -> int | None:
        """Return the number of the line that a prompt is given, an answer before the latest failure, or None."""
        if not (numbers := self._left.get(key[:16])):
            return None
        number = next((number for number in numbers if number not in self.errors), numbers[-1])
        numbers.remove(number)
        return number

    def left(self) -> list[int]:
        """Return the numbers of the lines that belong to no prompt."""
        return sorted(itertools.chain(*self._left.values()))


class Journal(contextlib.AbstractContextManager["Journal"]):
    """The results file: a line is appended as soon as a prompt is done, so that nothing answered is ever lost.

    Opening one that exists continues it: `left` passes over the prompts that it already holds. `finish` puts the
    lines into the input's order by an atomic replace; answers to what is no longer asked stay at the end. Raises
    UsageError where the file cannot be written or holds something else.
    """

    # extras/outputs.py looks whether the file is of these prompts and still there, and whether a line has its prompt's
    # id and columns; its index takes less memory.
    check: Any = staticmethod(lambda prompts, source: None)
    tended: Any = staticmethod(lambda run: contextlib.nullcontext())
    compare: Any = staticmethod(lambda prompt, key, number: None)
    index: Any = Earlier

    def __init__(self, path: pathlib.Path, *, overwrite: bool = False, retry_failed: bool = False) -> None:
        self.path = path
        self.kept = 0  # answers of an earlier run
        self.kept_errors: list[Error] = []
        self._retry_failed = retry_failed
        self._earlier: Any = self.index()
        self._offsets = array.array("q")  # where each prompt's line begins, by its number; -1 is nowhere yet
        self._torn = overwrite  # what the file holds after the lines that count is to go
        try:
            self._file = self._open()
        except OSError as failure:
            raise UsageError(f"cannot write {path}: {failure.strerror}; choose another file (-o, output=)") from None
        self._size = self._synced = 0 if overwrite else self._load()
        self.answers = len(self._earlier.places) - len(self._earlier.errors)  # that were there before

    def __exit__(self, kind: Any = None, *failure: Any) -> None:
        with contextlib.suppress(OSError, ValueError):  # it may be closed by now
            self.sync()
        self._file.close()

    def _open(self) -> IO[bytes]:
        return self._locked(open(self.path, "a+b", buffering=0))

    def _locked(self, file: IO[bytes]) -> IO[bytes]:
        """Take the file for this process. Raises UsageError where another has it."""
        if lock(file, self.path):
            return file
        file.close()
        raise UsageError(f"another run is writing {self.path}; wait for its end, or choose another file (-o, output=)")

    def _load(self) -> int:
        """Index the lines that are there; return the size without a last line that was cut short."""
        size, line = 0, b""
        with self.reading() as lines:
            lines.seek(0)
            for number, line in enumerate(iter(functools.partial(lines.readline, RESULT_MOST), b""), 1):
                text = line.strip(b"\0\r\n ")  # what an editor or a power cut may leave
                ours = LINE_START.startswith(text[: len(LINE_START)]) and len(line) < RESULT_MOST
                if (row := parse_json(text) if len(line) < RESULT_MOST else None) is not None:
                    self._recognise(row, number, size + line.index(text))
                elif text and ours and not line.endswith(b"\n"):  # the last one, cut short
                    break
                elif text:
                    self._pass_over(number, size, ours)
                size += len(line)
        return self._mend(size, line)

    def _pass_over(self, number: int, offset: int, ours: bool) -> None:
        """Refuse a damaged line; extras/outputs.py keeps it, where it may be `ours`."""
        self._refuse(number)

    def _mend(self, size: int, last: bytes) -> int:
        """Take away what was cut short; return the size of the file."""
        if size < os.fstat(self._file.fileno()).st_size:
            self._file.truncate(size)
        elif size and not last.endswith(b"\n"):  # only its end was cut off
            self._file.write(b"\n")
            size += 1
        return size

    def _recognise(self, row: Any, number: int, offset: int) -> None:
        """Note a result line's fingerprint, id and error."""
        try:
            row_id, key, error, _ = recognised(row)
        except ValueError:
            self._refuse(number)
        self._earlier.add(offset, row_id, key, error)

    def _refuse(self, number: int) -> NoReturn:
        self._file.close()
        what = f"{self.path} line {number} is not a result"
        raise UsageError(f"{what}; correct it, discard it (--overwrite, overwrite=True), or choose another")

    def left(self, prompts: Iterable[Prompt]) -> Iterator[Prompt]:
        """Yield the prompts that have no line yet; count the others as kept."""
        earlier = self._earlier
        for prompt in prompts:
            self._offsets.append(-1)
            key = fingerprint(prompt) if earlier.places else ""
            if not key or (number := earlier.claim(key)) is None:
                yield prompt
                continue
            error = earlier.errors.get(number)
            if prompt.error or (error and self._retry_failed):
                yield prompt
                continue
            self._offsets[prompt.number] = earlier.places[number]
            self.compare(prompt, key, number)
            self.kept += error is None
            self.kept_errors += [error] if error else []

    def append(self, *results: Result) -> None:
        """Write the results' lines. Raises OSError where the disk will not take them; then no part of them counts."""
        if self._torn:
            self._file.truncate(self._size)
        self._torn = True
        lines = [result.as_line() for result in results]
        rest = b"".join(lines)
        try:
            while rest:
                rest = rest[self._file.write(rest) or 0 :]
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(self._size)
            raise
        self._torn = False
        for result, line in zip(results, lines, strict=True):
            self._offsets[result.prompt.number] = self._size
            self._size += len(line)

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
        self.sync()
        with replacing(pathlib.Path(os.path.realpath(self.path))) as file:  # a link stays one
            with self.reading() as lines:
                file.writelines(self._ordered(lines))
                self._keep_others(file, lines, whole)
            if sys.platform == "win32":  # replaces no open file
                self._file.close()
        self._file.close()  # and with it the lock

    def reading(self) -> IO[bytes]:
        """Open the file once more, to read it."""
        return open(os.dup(self._file.fileno()), "rb", buffering=1 << 14)

    def place(self, number: int) -> int | None:
        """Return where that prompt's line begins, -1 if it has none, None if the run has not reached it."""
        return self._offsets[number] if number < len(self._offsets) else None

    def _ordered(self, lines: IO[bytes]) -> Iterator[bytes]:
        end = lines.seek(0)  # of the line before
        for offset in self._offsets:
            line = lines.readline() if offset == end else line_at(lines, offset)
            end = offset + len(line)
            yield line

    def _keep_others(self, file: IO[bytes], lines: IO[bytes], whole: bool) -> None:
        """Write the answers that belong to nothing in the input: they were paid for."""
        earlier = self._earlier
        rest = [number for number in earlier.left() if number not in earlier.errors or not whole]
        file.writelines(line_at(lines, earlier.places[number]) for number in rest)


def beside_results(results: pathlib.Path, what: str) -> pathlib.Path:
    """Return where something is kept beside a results file: "tmp" is the draft of a new one."""
    return results.with_name(f".{results.name}.tmp" if what == "tmp" else f"{results.name}.{what}")


def recognised(row: Any) -> tuple[Any, str, Error | None, bool]:
    """Return what a result's line is known by: its id, fingerprint, error, and whether it holds an answer.

    The answer may be one that was not accepted. Raises ValueError if the line is none of ours. This is the one look at
    what somebody may have put there: what it lets pass, nothing else stumbles over.
    """
    try:
        if "request" in row:
            error = None if row["error"] is None else Error(**row["error"])
            row_id, key, answered = row["id"], row["request"], row["text"] is not None
        else:
            row_id, key, error, answered = sibling("backends", "api").batch_key(row)
        # orjson reads a whole number of more than 64 bits as a float.
        named = isinstance(row_id, str) or type(row_id) is int or (type(row_id) is float and abs(row_id) >= 2**63)
        kinds = [str, str, int if error and error.status is not None else type(None), bool]
        if not named or (error and [*map(type, error)] != kinds) or not re.fullmatch("[0-9a-f]{24}", key):
            raise ValueError
        return row_id, key, error, answered
    except (AttributeError, KeyError, TypeError) as failure:
        raise ValueError from failure


TIMES = "attempts", "latency", "started", "slot_wait", "limit_wait", "retry_wait", "lost", "tries", "limit"
FIELDS = "text", *TIMES, "usage", "finish_reason", "model"  # of a line, that a Result has under the same name


def result_in(line: bytes, prompt: Prompt) -> Result | None:
    """Return the prompt's Result from its line; None if that is damaged, or another request's."""
    row = parse_json(line)
    try:
        _, key, error, _ = recognised(row)
    except ValueError:  # the file was changed
        return None
    if key[:16] != fingerprint(prompt)[:16]:
        return None
    if "request" not in row:
        return sibling("backends", "api").batch_result(row, prompt, error)  # type: ignore[no-any-return]
    own = own_part(row)
    known = {name: own.pop(name) for name in FIELDS if name in own}
    extra = {name: value for name, value in own.items() if name not in ("id", "error")}
    tokens = token_counts(known["usage"]) if isinstance(known.get("usage"), dict) else NO_TOKENS
    return Result(prompt, error=error, tokens=tokens, extra=extra, **known)


def own_part(row: dict[str, Any]) -> dict[str, Any]:
    """Return what a line of the results file holds before its `request`: what comes after are the input's columns."""
    return {name: row[name] for name in itertools.takewhile("request".__ne__, row)}


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
def replacing(target: pathlib.Path, mode: int | None = None) -> Iterator[IO[bytes]]:
    """Open a draft that takes the file's place in the end, whole or not at all; without a mode it keeps the file's."""
    draft, like = beside_results(target, "tmp"), target.stat().st_mode & 0o666 if mode is None else mode
    with contextlib.suppress(FileNotFoundError):
        draft.unlink()  # it may be a link that somebody has laid
    try:
        with open(draft, "xb", opener=functools.partial(os.open, mode=like)) as file:  # "x" follows no link
            yield file
            flush(file)
        if mode is None:
            with contextlib.suppress(FileNotFoundError):
                shutil.copymode(target, draft)  # where the umask has taken more
        os.replace(draft, target)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


# What a file of these names is expected to hold; others are JSON Lines, whatever they are called.
NOT_WRITTEN = (".json", ".txt", ".md", ".html", ".xml", ".yaml", ".xls", ".xlsx", ".ods", ".parquet", ".gz", ".zip")


@contextlib.asynccontextmanager
async def journaled(run: Run, sink: Any, prompts: Iterable[Prompt] | None, source: str) -> AsyncIterator[None]:
    """Open a run whose results go into the sink: refused if those there are others', in the input's order at the end.

    `prompts` are those of the whole input, None if they cannot be looked at beforehand.
    """
    run.journal, run.path = sink, sink.path
    with sink:
        if prompts is not None:
            sink.check(map(run.api.prepare, prompts), source)
        async with sink.tended(run), run:
            yield
        try:
            if run.stopped is None:
                sink.finish(whole=run.whole)
        except OSError as failure:  # what cannot be written stops the run
            run.stop(disk_error(sink.path, failure))


def keep(run: Run, sink: Any, results: list[Result]) -> int:
    """Write the results; return how many answers could not be.

    Where the disk will not take one the run is stopped: what cannot be kept should not be paid for.
    """
    if not (done := [result for result in results if result.done]):
        return 0
    try:
        sink.append(*done)
    except BrokenPipeError:
        raise
    except OSError as failure:
        if len(done) > 1:  # some of them may fit
            return sum(keep(run, sink, [result]) for result in done)
        run.stop(disk_error(sink.path, failure))
        done[0].done = False
        return int(done[0].error is None)
    return 0


def disk_error(path: str | pathlib.Path | None, failure: OSError) -> PromptError:
    """Return the error that stops a run whose results cannot be written."""
    return PromptError("disk", f"cannot write {path or 'the output'}: {failure.strerror or failure}", "stop")


# ---- Sequential run ------------------------------------------------------------------------------------------


async def sequentially(run: Run, prompts: Iterable[Prompt], record: Record) -> None:
    """Answer one prompt after the other: it takes the sum of the latencies."""
    if run.loop:
        raise UsageError(f"{run.api.name} is a bulk backend; it cannot run one at a time")
    await worker_for(run, prompts, record)()
    if run.broken:
        raise run.broken


# The options of all four functions.
Options = TypedDict("Options", {  # noqa: UP013 - shorter
    "concurrency": int | str, "max_attempts": int, "timeout": float, "deadline": float | None, "rpm": float | None,
    "tpm": float | None, "limits": Any, "retry": Callable[[Exception], str | float | None] | None, "resend_lost": bool,
    "output": str | os.PathLike[str] | None, "overwrite": bool, "retry_failed": bool, "progress": bool,
    "on_result": Callable[[Result], Any] | None, "return_exceptions": bool, "max_cost": float | None,
    "price": Iterable[float] | None, "extras": Iterable[Any], "clock": Callable[[], float],
    "sleep": Callable[[float], Awaitable[None]],
}, total=False)  # fmt: skip
Prompts = Iterable[Prompt] | Iterable[Item] | collections.abc.AsyncIterable[Item]
Send = Callable[[Item], Awaitable[Reply | T]]  # or what load_backend returns


async def run_sequential(prompts: Prompts[Item], send: Send[Item, T], **options: Unpack[Options]) -> list[Result[T]]:
    """Answer the prompts one by one, the baseline: arguments and Results as `run`'s."""
    options["concurrency"] = 1
    return await _collect(sequentially, prompts, send, **options)


# ---- Concurrent run ------------------------------------------------------------------------------------------


async def concurrently(run: Run, prompts: Iterable[Prompt], record: Record) -> None:
    """Answer prompts side by side: N workers pull from one iterator, so that it takes about the slowest latency.

    One starts as a call goes out, if none waits for its turn, and as an attempt fails; one ends where others wait.
    """
    if run.loop:
        await run.loop(run, prompts, record)
        return
    answer_prompts, started = worker_for(run, prompts, record), 0
    task = asyncio.current_task()
    assert task is not None
    cancelled = task.cancelling()

    async def worker() -> None:
        nonlocal started
        if await answer_prompts():
            started, run.start = started - 1, start
        else:
            run.start = None  # there are no more

    def start() -> None:
        nonlocal started
        if task.cancelling() == cancelled:  # else all workers are being cancelled
            started += 1
            run.start = start if started < run.concurrency else None
            workers.create_task(worker())

    try:
        async with asyncio.TaskGroup() as workers:
            run.limiter.opened = run.start_more
            start()
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    finally:
        run.start = None
    if run.broken:
        raise run.broken


async def run_concurrent(prompts: Prompts[Item], send: Send[Item, T], **options: Unpack[Options]) -> list[Result[T]]:
    """Answer the prompts concurrently: arguments and Results as `run`'s."""
    return await _collect(concurrently, prompts, send, **options)


async def _collect(way: Any, items: Any, send: Any, return_exceptions: bool = True, **options: Any) -> list[Result]:
    results = list[Result]()
    try:
        take: Record = lambda one: results.append(checked_result(one, return_exceptions))  # noqa: E731
        async with opened(items, send, take, **options) as (run, record):
            await _work(way, run, items, record)
        check_end(run)
    except BaseException as failure:
        vars(failure)["results"] = results
        raise
    finally:
        results.sort(key=lambda result: result.prompt.number)
    return results


@contextlib.asynccontextmanager
async def opened(
    items: Any, send: Any, take: Record, output: str | os.PathLike[str] | None = None, overwrite: bool = False,
    retry_failed: bool = False, on_result: Any = None, progress: bool = False, **options: Any,
) -> AsyncIterator[tuple[Run, Record]]:  # fmt: skip
    """Open a run of the user's own prompts; yield it with what keeps its Results: in `output`, then by `take`."""
    run, record = Run(send, **options), take
    if on_result or progress:
        named = "on_result=" if on_result else "progress=True"
        record = sibling("extras", "library", named).watched(run, items, take, on_result, progress)
    if output is None:
        if overwrite or retry_failed:
            raise ValueError("overwrite and retry_failed need a results file: output=")
        async with run:
            yield run, record
        return
    path, whole = pathlib.Path(output), isinstance(items, Sized)
    if path.suffix.lower() in (*NOT_WRITTEN, *TABLES):
        raise UsageError(f"output={str(path)!r}: results are written as JSON Lines; name it .jsonl")
    kept = Kept(run, open_journal(path, overwrite=overwrite, retry_failed=retry_failed), take, record)
    run.passed, run.overwrites = kept.passed, overwrite
    async with journaled(run, kept.sink, as_prompts(items) if whole else None, "these prompts"):
        yield run, kept.keep


class Kept(NamedTuple):
    """A results file of a run in Python: old Results are taken from it, new ones are kept before they are recorded."""

    run: Run
    sink: Any
    take: Record
    record: Record

    def keep(self, result: Result) -> Awaitable[None] | None:
        """Keep a result; stop the run where the file or JSON cannot take it."""
        try:
            keep(self.run, self.sink, [result])
        except TypeError as failure:
            result.done, what = False, f"send returned a value that JSON cannot hold ({failure}); return a text"
            self.run.stop(PromptError("send", what, "stop"))
        return self.record(result)

    async def passed(self, prompt: Prompt) -> bool:
        """Take the prompt's result from the file; return whether it has one. Raises TypeError if it cannot be kept."""
        try:
            to_line(prompt.columns)
        except TypeError as failure:
            what = f"{prompt.where} contains a value that JSON cannot hold, as output= needs"
            raise TypeError(f"{what}: {failure}") from None
        if [*self.sink.left([prompt])]:
            return False
        with self.sink.reading() as lines:
            result = result_in(line_at(lines, self.sink.place(prompt.number) or 0), prompt)
        changed = Error("unreadable", f"{self.sink.path} was changed meanwhile")
        result = result or Result(prompt, error=changed, done=False)
        result.kept = True
        if (waiting := self.take(result)) is not None:
            await waiting
        await asyncio.sleep(0)  # there may be many
        return True


def checked_result(result: Result, return_exceptions: bool) -> Result:
    """Return the result as plain data without frames, or raise its PromptError."""
    if result.error is not None and not return_exceptions:
        raise result.exception or PromptError(*result.error[:2])
    result.sent = result.missed = 0.0  # JSON has no infinity
    if result.exception is not None:
        result.exception.__traceback__ = None
        if part := meanings("library", "extras"):
            part.drop_frames(result.exception)
    return result


def Limits(
    *, rpm: float | None = None, tpm: float | None = None, concurrency: int | str = "auto",
    clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> Any:  # fmt: skip
    """Return the limits of one server for all runs that they are passed to: run(..., limits=limits)."""
    return sibling("extras", "limits", "Limits").Limits(rpm, tpm, concurrency, clock, sleep)


def check_end(run: Run) -> None:
    """Raise what `send` or `on_result` did wrong; log that an extra has stopped the run."""
    if run.stopped and run.stopped.kind == "send":
        raise TypeError(str(run.stopped))
    if run.stopped and run.stopped.kind == "on_result" and run.stopped.__cause__:
        raise run.stopped.__cause__
    if run.stopped and run.stopped.kind == "extra":
        log.error("stopped: %s", run.stopped)


async def as_completed(
    prompts: Prompts[Item], send: Send[Item, T], **options: Unpack[Options]
) -> collections.abc.AsyncGenerator[Result[T], None]:
    """Yield the Results as the answers come, at most `concurrency` of them untaken. Arguments as `run`'s."""
    return_exceptions = options.pop("return_exceptions", True)
    async with opened(prompts, send, lambda result: results.put(result), **options) as (run, record):
        results: asyncio.Queue[Result | None] = asyncio.Queue(run.concurrency)

        async def work() -> BaseException | None:
            ended = await asyncio.gather(_work(concurrently, run, prompts, record), return_exceptions=True)
            await results.put(None)
            return ended[0]

        task = asyncio.ensure_future(work())
        try:
            while (result := await results.get()) is not None:
                yield checked_result(result, return_exceptions)
            if failure := await task:
                raise failure
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
    check_end(run)


def new_runner() -> asyncio.Runner:
    """Return an event loop that is not yet running, of uvloop or winloop if that is installed."""
    new_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    with contextlib.suppress(ImportError):
        new_loop = importlib.import_module("winloop" if sys.platform == "win32" else "uvloop").new_event_loop
    return asyncio.Runner(loop_factory=new_loop)


def run_loop(work: Coroutine[Any, Any, T]) -> T:
    """Run the coroutine on an event loop of its own."""
    with new_runner() as runner:
        return runner.run(work)


def run(prompts: Prompts[Item], send: Send[Item, T], **options: Unpack[Options]) -> list[Result[T]]:
    """Answer the prompts concurrently and return their Results in input order; works in a notebook too.

    `send` is an `async` function that takes an item of `prompts` and returns its text or a Reply, or a loaded backend.
    Options: docs/library.md. What it raises has the `results` so far.
    """
    if part := meanings("library", "extras"):
        return part.run_here(run_concurrent(prompts, send, **options))  # type: ignore[no-any-return]
    with contextlib.suppress(RuntimeError):  # a lone copy has an event loop for each run alone
        if asyncio.get_running_loop():
            raise UsageError("an event loop is running: write `await run_concurrent(...)`")
    try:
        return run_loop(run_concurrent(prompts, send, **options))
    except KeyboardInterrupt as interrupt:
        vars(interrupt)["results"] = getattr(interrupt.__context__, "results", [])
        raise


# ---- Command line --------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status. With arguments, the process is left as it was.

    All that a command does is in backends/command.py.
    """
    try:
        return sibling("backends", "command").main(argv)  # type: ignore[no-any-return]
    except UsageError as missing:
        print(f"{PROGRAM}: {missing}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.modules["concurrent_prompts"] = sys.modules["__main__"]  # so that a backend's import finds this very module
    exit_status = main()
    if exit_status == 130:
        os._exit(exit_status)  # who has pressed Ctrl-C does not want to wait for the libraries to be taken down
    sys.exit(exit_status)
