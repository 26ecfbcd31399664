"""Stand-in for an OpenAI-compatible API: made-up answers over real HTTP/1.1, limits and faults to order.

Usage: python -m concurrent_prompts.extras.stand_in [options]

Serves POST /v1/chat/completions, /v1/responses, /v1/completions and /v1/embeddings, GET /v1/models, /v1/files,
/v1/batches, and GET /v1/stand_in/stats: what the server saw of the others, as JSON. Answers say that they are made up;
their text, usage and finish_reason follow from the request body alone. A token is taken to be four characters.

Where it listens:
  --host ADDRESS         default 127.0.0.1
  --port N               default 8000; 0 is any free one
  --tls FILE             serve https with the certificate and key in this PEM file
  --exit-on-eof          stop when standard input ends, as it does when the parent process dies
How fast it is:
  --latency SECONDS      median time to an answer, default 0
  --sigma S              shape of the lognormal latency, default 0: always the median
  --knee N               work on N requests at a time and queue the others; latency starts with the work
Whom it turns away:
  --rpm N, --tpm N       requests, tokens per minute, refilled continuously. In tokens a request costs its
                         prompt plus its maximum output (if it sets none, the real one) times n
  --burst SHARE          what can be saved up, as a share of a minute's worth, default 0.1; a request that
                         is larger (up to the limit) passes when nothing has been used, and leaves a debt
  --no-limit-headers     no x-ratelimit-*, no retry-after, no numbers in the message
  --count-rejected       rejected requests use up the limits too
  --max-in-flight N      beyond N at once, answer --reject-status
  --reject-status N      429 (default) or 503
  --quota N              after N requests that get an answer, 429 insufficient_quota for ever
  --require-key KEY      without "Authorization: Bearer KEY", 401
  --models A,B           any other model is 404
  --shutdown DATE        what the list of models gives as their shutdown_date (YYYY-MM-DD)
What goes wrong:
  --fault KIND=SHARE     this share of the requests fails; may be repeated. The kinds: 429, 500, 502, 503-html,
                         reset, truncated, hang, null-choices, error-200, malformed, empty-html, schema (the last
                         five with status 200; schema: what was to fit one does not, in answer to the first asking)
  --seed N               default 0. The latency of a request follows from the seed and its JSON, its fault also
                         from how often the same was let in before, so every client meets the same fate
  --close-every N        close each connection after its N-th answer, unannounced
  --chunked, --gzip      encode the answers so, asked or not
What becomes of batches (--latency and --require-key are for them, too; --models and --fault for their lines):
  --batch-time SECONDS   from a batch's creation to its end, default 0: it has ended when next anything about files,
                         batches or the stats is asked. The first and the last tenth are validating and finalizing
  --batch-queue N        prompt tokens that the unfinished batches may have together; what exceeds them fails
  --batch-fault KIND     may be repeated; KIND=SHARE for a share of the batches, which follows from their files:
                         invalid, errors-only (each line 400), shuffle (output in another order), strings (each body
                         a JSON string), lost-file (the output is not found), create-lost (a reset after the creation),
                         poll-500 (when looked at for the first time, the third, ...), poll-slow (=SECONDS to look at
                         one); and for a share of the lines: expire, expire-once (when their body is asked first)

Prints its base URL when it is ready; SIGINT, SIGTERM or the end of input stop it, with the counts on stderr.
In Python: ``async with serve(latency=0.1, fault={"500": 0.05}) as server:`` has server.url and server.stats.
Where a request has a JSON schema (response_format, text.format), its answer is a made-up instance: of objects, arrays,
enums, texts, numbers and $ref; patterns and formats mean nothing to it.
It does not stream, call tools, or check parameters that it does not use.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import gzip
import io
import json
import math
import os
import random
import re
import signal
import socket
import ssl
import struct
import sys
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Generator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from hashlib import blake2b
from http import HTTPStatus
from itertools import count
from statistics import NormalDist
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

__all__ = ["BATCH_FAULTS", "FAULTS", "Options", "Server", "Stats", "main", "serve"]

HEAD_LIMIT = 64 * 1024
BODY_LIMIT = 32 * 1024 * 1024
FILE_LIMIT = 200 * 1000 * 1000  # of an upload
LINE_LIMIT = 50_000  # of a batch
STORE_LIMIT = 4 * 1000 * 1000 * 1000  # bytes of all files together
COUNT_LIMIT = 10_000  # files, and batches
NAME_LIMIT = 512  # characters of a file's name, of an id, of a value of the metadata
VALUE_LIMIT = 1_000_000  # values in a request, numbers in an answer to one, values of an instance of a schema
TRAILER_LIMIT = 100  # lines after a chunked body
WINDOW = 16 * 1024  # bytes taken from a socket at a time; asyncio.Protocol's fresh 256 KiB for each read are slow
LINGER = 1.0  # seconds for a client that is still sending when it is refused to read why
FAULTS = ("429", "500", "502", "503-html", "reset", "truncated", "hang",
          "null-choices", "error-200", "malformed", "empty-html", "schema")
BATCH_FAULTS = ("invalid", "errors-only", "shuffle", "strings", "lost-file", "create-lost", "poll-500", "poll-slow",
                "expire", "expire-once")
REASONS = {status.value: status.phrase for status in HTTPStatus}
SERIAL = (f"{random.SystemRandom().getrandbits(48):012x}{number:012x}" for number in count(1))
encode_json = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


# --- Options ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """The flags, by the same names; the parser is made from these fields, the manual above describes them."""

    host: str = "127.0.0.1"
    port: int = 0
    tls: str | None = None
    latency: float = 0.0
    sigma: float = 0.0
    knee: int | None = None
    rpm: int | None = None
    tpm: int | None = None
    burst: float = 0.1
    no_limit_headers: bool = False
    count_rejected: bool = False
    max_in_flight: int | None = None
    reject_status: int = 429
    quota: int | None = None
    require_key: str | None = None
    models: tuple[str, ...] = ()
    shutdown: str | None = None
    fault: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    close_every: int | None = None
    chunked: bool = False
    gzip: bool = False
    batch_time: float = 0.0
    batch_queue: int | None = None
    batch_fault: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lowest = {"port": 0, "latency": 0, "sigma": 0, "burst": 0, "quota": 0, "batch_time": 0, "batch_queue": 0,
                  "knee": 1, "rpm": 1, "tpm": 1, "max_in_flight": 1, "close_every": 1}
        for name, low in lowest.items():
            value = getattr(self, name)
            if value is not None and not low <= value < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} must be {low} or more, not {value}")
        if self.reject_status not in (429, 503):
            raise ValueError(f"--reject-status must be 429 or 503, not {self.reject_status}")
        if unknown := sorted(self.fault.keys() - set(FAULTS)):
            raise ValueError(f"--fault {unknown[0]} is unknown; there are {', '.join(FAULTS)}")
        if not all(share >= 0 for share in self.fault.values()) or math.fsum(self.fault.values()) > 1:
            raise ValueError("--fault takes shares of 0 to 1 that sum up to 1 at most")
        if unknown := sorted(self.batch_fault.keys() - set(BATCH_FAULTS)):
            raise ValueError(f"--batch-fault {unknown[0]} is unknown; there are {', '.join(BATCH_FAULTS)}")
        for kind, value in self.batch_fault.items():
            if not 0 <= value <= 1 and not (kind == "poll-slow" and 1 < value < math.inf):
                wanted = "seconds" if kind == "poll-slow" else "a share of 0 to 1"
                raise ValueError(f"--batch-fault {kind} takes {wanted}, not {value}")


# --- Requests and answers -----------------------------------------------------------------------------------

Prompts = list[tuple[str, str]]  # for each, the text that an answer quotes and the text that it answers


class Reply(NamedTuple):
    """A response, before its encodings and the headers that all have."""

    status: int
    body: str
    headers: str = ""
    content_type: str = "application/json"
    file: bytes = b""  # instead of the body


def error(status: int, message: str, kind: str = "invalid_request_error", *,
          param: str | None = None, code: str | int | None = None, headers: str = "") -> Reply:
    """Put an error into OpenAI's form."""
    detail = {"message": message, "type": kind, "param": param, "code": code}
    return Reply(status, encode_json({"error": detail}), headers)


class Refusal(Exception):
    """Raised wherever a request is found wanting; takes the arguments of error()."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args)
        self.reply = error(*args, **more)


class Ask:
    """What a request body asks for, checked here as far as this server uses it; answering cannot fail."""

    def __init__(self, path: str, given: bytes | dict[str, Any]) -> None:
        self.body = read_body(given) if isinstance(given, bytes) else given
        subject, read_prompts, self.answer = ENDPOINTS[path]
        for name in ("model", subject):
            if self.body.get(name) in (None, "", []):
                raise missing(name)
        self.model = self.body["model"]
        if not isinstance(self.model, str):
            raise invalid("model", "a string")
        if self.body.get("stream"):
            raise invalid("stream", "false: the stand-in server does not stream")
        caps = [self.number(name) for name in ("max_completion_tokens", "max_tokens", "max_output_tokens")]
        self.cap = next(filter(None, caps), None)
        self.size = self.number("dimensions", 4096) or 8
        self.prompts: Prompts = read_prompts(self.body)
        self.schema = schema_in(self.body)
        self.again = any(item.get("role") == "assistant" for item in self.body[subject] if isinstance(item, dict))
        self.prompt_tokens = sum(estimate(whole) for _, whole in self.prompts)
        many = len(self.prompts) * (self.size if self.answer is embeddings else 100 * (self.number("n", 128) or 1))
        if many > 8 * VALUE_LIMIT:
            raise Refusal(413, "The answer would be too large for the stand-in server.")
        self.weight = 25 * many  # bytes of the answer, at the most
        self.texts = [] if self.answer is embeddings else self.invent_texts(self.number("n", 128) or 1)

    def number(self, name: str, most: int = 10**9) -> int | None:
        value = self.body.get(name)
        if value is not None and not (type(value) is int and 1 <= value <= most):
            raise invalid(name, f"an integer from 1 to {most}")
        return value

    def invent_texts(self, n: int) -> list[tuple[str, str]]:
        """Return n texts for each prompt, every one with its finish reason."""
        suffixes = [f", choice {k} of {n}" for k in range(1, n + 1)] if n > 1 else [""]
        texts = [invent(*prompt, suffix) for prompt in self.prompts for suffix in suffixes]
        if self.schema is not None:
            texts = [instance_text(self.schema, text) for text in texts]
        if self.cap is None:
            return [(text, "stop") for text in texts]
        return [(text[: 4 * self.cap], "stop" if estimate(text) <= self.cap else "length") for text in texts]

    def cost(self) -> int:
        """Return the tokens as a rate limiter counts them: what may come out, not what does."""
        return self.prompt_tokens + sum(self.cap or estimate(text) for text, _ in self.texts)


def parse_object(raw: bytes) -> dict[str, Any] | None:
    if len(raw) > VALUE_LIMIT and sum(map(raw.count, (b",", b"[", b"{"))) > VALUE_LIMIT:
        return None
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_body(raw: bytes) -> dict[str, Any]:
    body = parse_object(raw)
    if body is None:
        raise Refusal(400, "We could not parse the JSON body of your request: it must be a JSON object.")
    return body


def missing(param: str) -> Refusal:
    return Refusal(400, f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")


def invalid(param: str, wanted: str) -> Refusal:
    return Refusal(400, f"Invalid value for '{param}': expected {wanted}.", param=param, code="invalid_value")


def estimate(text: str) -> int:
    """Guess how many tokens a text has."""
    return (len(text) + 3) // 4 or 1


def checksum(text: str) -> int:
    return zlib.crc32(text.encode("utf-8", "surrogatepass"))


def invent(shown: str, whole: str, suffix: str) -> str:
    """Write an answer that no one mistakes for a real one, nor for the answer to another prompt."""
    words = shown.split()
    return (f"[made up by the stand-in server] {len(words)} word{'s'[: len(words) != 1]}, "
            f'beginning "{" ".join(words[:6])[:60]}" (checksum {checksum(whole):08x}){suffix}')


def schema_in(body: dict[str, Any]) -> Any:
    """Return the JSON schema that an answer is to fit, or None."""
    form, text = body.get("response_format"), body.get("text")
    form = form.get("json_schema") if isinstance(form, dict) else text.get("format") if isinstance(text, dict) else None
    return form.get("schema") if isinstance(form, dict) else None


def instance_text(schema: Any, seed: str) -> str:
    try:
        return encode_json(instance(schema, schema, Luck(checksum(seed))))
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        raise invalid("response_format", "a JSON schema") from None


class Luck(random.Random):
    """Dice for an instance, which may have so many values."""

    left = VALUE_LIMIT // 10


def instance(schema: Any, root: Any, luck: Luck, depth: int = 0) -> Any:
    """Make up a value that fits a schema; below a few levels as small a one as there is, so that recursions end."""
    deep = depth > 6
    luck.left -= 1
    if luck.left < 0 or schema.get("minLength", 0) > VALUE_LIMIT:
        raise ValueError("too large")
    if "$ref" in schema:
        target = root
        for part in schema["$ref"].split("/")[1:]:
            target = target[part]
        return instance(target, root, luck, depth + 1)
    if "const" in schema or "enum" in schema:
        return luck.choice(schema["enum"]) if "enum" in schema else schema["const"]
    if ways := schema.get("anyOf") or schema.get("oneOf"):
        return instance(min(ways, key=lambda way: "$ref" in way) if deep else luck.choice(ways), root, luck, depth + 1)
    kind = schema.get("type", "object")
    kind = kind[-1] if isinstance(kind, list) and deep else luck.choice(kind) if isinstance(kind, list) else kind
    if kind == "object":
        wanted = schema.get("required", ()) if deep else schema.get("properties", {})
        return {name: instance(schema["properties"][name], root, luck, depth + 1) for name in wanted}
    if kind == "array":
        size = max(schema.get("minItems", 0), min(0 if deep else luck.randint(1, 3), schema.get("maxItems", 3)))
        return [instance(schema.get("items", {}), root, luck, depth + 1) for _ in range(size)]
    if kind == "string":
        return f"made up {luck.getrandbits(16):04x}".ljust(schema.get("minLength", 0), "x")[: schema.get("maxLength")]
    if kind in ("integer", "number"):
        low = schema.get("minimum", schema.get("exclusiveMinimum", -1) + 1)
        high = schema.get("maximum", schema.get("exclusiveMaximum", low + 101) - 1)
        return luck.randint(min(low, high), high)
    return luck.random() < 0.5 if kind == "boolean" else None


def conversation(items: Any, name: str, preface: str = "") -> Prompts:
    """Read a list of messages as one prompt, which quotes the last of the user's."""
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise invalid(name, "an array of objects")
    texts = [content_text(item.get("content")) for item in items]
    asked = [text for text, item in zip(texts, items, strict=True) if item.get("role") == "user"]
    return [((asked or texts)[-1], "\n".join([preface, *texts] if preface else texts))]


def content_text(content: Any) -> str:
    """Return the text of a message, whose content is a string or a list of parts."""
    if isinstance(content, str):
        return content
    parts = [part.get("text") for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    return " ".join(part for part in parts if isinstance(part, str))


def responses_input(body: dict[str, Any]) -> Prompts:
    given = body["input"]
    items = [{"content": given}] if isinstance(given, str) else given
    return conversation(items, "input", content_text(body.get("instructions")))


def several(value: Any, name: str) -> Prompts:
    """Read a string, an array of token numbers, or an array of either: one prompt each."""
    items = value if isinstance(value, list) and not isinstance(value[0], int) else [value]
    texts = [" ".join(map(str, item)) if isinstance(item, list) else item for item in items]
    if len(texts) > 2048 or not all(isinstance(text, str) for text in texts):
        raise invalid(name, "a string or an array of at most 2048 strings")
    return [(text, text) for text in texts]


def chat(ask: Ask) -> dict[str, Any]:
    return completion(ask, "chatcmpl", "chat.completion", [
        {"index": index, "message": {"role": "assistant", "content": text, "refusal": None, "annotations": []},
         "logprobs": None, "finish_reason": reason} for index, (text, reason) in enumerate(ask.texts)])


def legacy(ask: Ask) -> dict[str, Any]:
    return completion(ask, "cmpl", "text_completion", [
        {"text": text, "index": index, "logprobs": None, "finish_reason": reason}
        for index, (text, reason) in enumerate(ask.texts)])


def completion(ask: Ask, prefix: str, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    output = sum(estimate(text) for text, _ in ask.texts)
    details = {"reasoning_tokens": 0, "audio_tokens": 0,
               "accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}
    usage = {"prompt_tokens": ask.prompt_tokens, "completion_tokens": output,
             "total_tokens": ask.prompt_tokens + output, "completion_tokens_details": details,
             "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0}}
    return {"id": f"{prefix}-{next(SERIAL)}", "object": kind, "created": int(time.time()), "model": ask.model,
            "choices": choices, "usage": usage, "service_tier": "default", "system_fingerprint": "fp_stand_in"}


def response(ask: Ask) -> dict[str, Any]:
    text, reason = ask.texts[0]
    output, now, whole = estimate(text), int(time.time()), reason == "stop"
    status = "completed" if whole else "incomplete"
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    message = {"type": "message", "id": f"msg_{next(SERIAL)}", "status": status, "role": "assistant", "content": [part]}
    usage = {"input_tokens": ask.prompt_tokens, "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
             "output_tokens": output, "output_tokens_details": {"reasoning_tokens": 0},
             "total_tokens": ask.prompt_tokens + output}
    return {"id": f"resp_{next(SERIAL)}", "object": "response", "created_at": now, "status": status,
            "completed_at": now if whole else None, "background": False, "error": None,
            "incomplete_details": None if whole else {"reason": "max_output_tokens"},
            "instructions": ask.body.get("instructions"), "max_output_tokens": ask.cap, "metadata": {},
            "model": ask.model, "output": [message], "parallel_tool_calls": True, "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None}, "service_tier": "default", "store": True,
            "temperature": 1.0, "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [],
            "top_p": 1.0, "truncation": "disabled", "usage": usage, "user": None}


def embeddings(ask: Ask) -> dict[str, Any]:
    packed = ask.body.get("encoding_format") == "base64"
    data = [{"object": "embedding", "index": index, "embedding": vector(text, ask.size, packed)}
            for index, (text, _) in enumerate(ask.prompts)]
    usage = {"prompt_tokens": ask.prompt_tokens, "total_tokens": ask.prompt_tokens}
    return {"object": "list", "data": data, "model": ask.model, "usage": usage}


def vector(text: str, size: int, packed: bool) -> str | list[float]:
    """Make a unit vector from a text; of 32-bit floats, so that both encodings agree."""
    draw = random.Random(checksum(text)).random
    raw = [2 * draw() - 1 for _ in range(size)]
    length = math.hypot(*raw)
    binary = struct.pack(f"<{size}f", *(value / length for value in raw))
    return base64.b64encode(binary).decode() if packed else list(struct.unpack(f"<{size}f", binary))


# path: the parameter with the prompt, how to read the prompts from the body, how to answer
ENDPOINTS: dict[str, tuple[str, Callable[[dict[str, Any]], Prompts], Callable[[Ask], dict[str, Any]]]] = {
    "/v1/chat/completions": ("messages", lambda body: conversation(body["messages"], "messages"), chat),
    "/v1/responses": ("input", responses_input, response),
    "/v1/completions": ("prompt", lambda body: several(body["prompt"], "prompt"), legacy),
    "/v1/embeddings": ("input", lambda body: several(body["input"], "input"), embeddings),
}


# --- Faults and limits --------------------------------------------------------------------------------------


def html(status: int, title: str) -> Reply:
    page = f"<html><head><title>{title}</title></head><body><center><h1>{title}</h1></center></body></html>\r\n"
    return Reply(status, page, content_type="text/html")


CRASHED = "The server had an error while processing your request. Sorry about that!"
READY_MADE = {
    "429": error(429, "Rate limit reached.", "requests", code="rate_limit_exceeded"),
    "500": error(500, CRASHED, "server_error"),
    "502": error(502, "Bad gateway.", "cf_bad_gateway", code=502),
    "503-html": html(503, "503 Service Temporarily Unavailable"),
    "error-200": error(200, CRASHED, "server_error", code="server_error"),
    "empty-html": html(200, "Sign in to continue"),
}


def canonical(body: dict[str, Any]) -> bytes:
    """Write a body sorted and spaced anew, because clients differ in that."""
    return json.dumps(body, sort_keys=True).encode()


def draw(text: bytes) -> float:
    """Return a number that follows from the text: above 0 and below 1, which have no place on the normal curve."""
    word: int = struct.unpack("<Q", blake2b(text, digest_size=8).digest())[0]
    return (word >> 12) / 2**52 + 2**-53


def fate(options: Options, body: bytes, before: int) -> tuple[str, float]:
    """Draw the latency of a body, the same each time, and the fault, if any, now that it was let in so often before."""
    quantile = draw(b"%d " % options.seed + body)
    choice = draw(b"%d %d " % (options.seed, before) + body)
    latency = options.latency * math.exp(options.sigma * NormalDist().inv_cdf(quantile))
    for kind in FAULTS:
        choice -= options.fault.get(kind, 0.0)
        if choice < 0:
            return kind, latency
    return "", latency


def answer(ask: Ask, fault: str) -> Reply:
    """Answer a request, as badly as the fault wants it."""
    if fault == "schema":
        ask.schema = None
        ask.texts = ask.invent_texts(len(ask.texts) // len(ask.prompts))
    content = ask.answer(ask)
    if fault == "null-choices":
        content |= {name: None for name in ("choices", "output", "data") if name in content}
    text = encode_json(content)
    return Reply(200, text[: len(text) // 2] if fault == "malformed" else text)


class Bucket:
    """A limit per minute that refills all the time and holds a share of a minute's worth."""

    def __init__(self, name: str, limit: int, burst: float, clock: Callable[[], float]) -> None:
        self.name, self.limit = name, limit
        self._rate, self._capacity = limit / 60, limit * burst
        self._clock = clock
        self._held, self._stamp = self._capacity, clock()

    def __repr__(self) -> str:
        return f"<Bucket of {self.name}: {self.level():.3f} of {self._capacity:g}>"

    def level(self) -> float:
        now = self._clock()
        self._held = min(self._capacity, self._held + (now - self._stamp) * self._rate)
        self._stamp = now
        return self._held

    def wait(self, amount: float) -> float:
        """Return the seconds until the amount may be taken; what exceeds the bucket waits for a full one."""
        lack = min(amount, self._capacity) - self.level()
        return lack / self._rate if lack > 1e-6 else 0.0

    def take(self, amount: float) -> None:
        self._held = self.level() - amount

    def drain(self, amount: float) -> None:
        """Count a rejected request, but not into debt: a crowd that hammers would be shut out for hours."""
        self._held = max(min(self.level(), 0.0), self._held - amount)

    def remaining(self) -> int:
        return max(0, math.floor(self.level() + 1e-6))

    def headers(self) -> str:
        full = duration((self._capacity - self.level()) / self._rate)
        return (f"x-ratelimit-limit-{self.name}: {self.limit}\r\nx-ratelimit-remaining-{self.name}: "
                f"{self.remaining()}\r\nx-ratelimit-reset-{self.name}: {full}\r\n")

    def refusal(self, model: str, amount: int, hints: bool) -> Refusal:
        where = f"on {self.name} per min ({self.name[0].upper()}PM): Limit {self.limit}"
        message, headers, wait = f"Rate limit reached for {model}.", "", self.wait(amount)
        if amount > self.limit:
            message = f"Request too large for {model} {where}, Requested {amount}."
        elif hints:
            message = (f"Rate limit reached for {model} {where}, Used {self.limit - self.remaining()}, "
                       f"Requested {amount}. Please try again in {duration(wait)}.")
            headers = f"retry-after: {math.ceil(wait)}\r\nretry-after-ms: {milliseconds(wait)}\r\n"
        return Refusal(429, message, self.name, code="rate_limit_exceeded", headers=headers)


def milliseconds(seconds: float) -> int:
    return math.ceil(seconds * 1000 - 1e-6)


def duration(seconds: float) -> str:
    """Write a duration as Go does, in whole milliseconds: 12ms, 1.5s, 6m0s."""
    total = milliseconds(seconds)
    if 0 < total < 1000:
        return f"{total}ms"
    minutes, rest = divmod(total, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{f'{hours}h' * (hours > 0)}{f'{minutes}m' * (total >= 60_000)}{rest / 1000:g}s"


# --- Server -------------------------------------------------------------------------------------------------


@dataclass
class Stats:
    """What the server saw of requests; one that met a fault counts as a fault, not as answered or rejected."""

    requests: int = 0
    answered: int = 0
    rejected: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    by_status: Counter[int] = field(default_factory=Counter)
    in_flight: int = 0
    max_in_flight: int = 0
    mean_in_flight: float = 0.0
    seconds: float = 0.0  # from the first request to the last answer
    files: int = 0  # uploads; neither they nor what is asked about batches count as requests
    batches: int = 0
    batch_rows: int = 0  # lines that got an answer, for which an API would want money
    _first: float = 0.0
    _busy: float = 0.0

    def enter(self, now: float) -> None:
        self._first = self._first or now
        self.requests += 1
        self.in_flight += 1
        if self.in_flight > self.max_in_flight:
            self.max_in_flight = self.in_flight

    def leave(self, started: float, now: float) -> None:
        self.in_flight -= 1
        self._busy += now - started
        self.seconds = now - self._first
        self.mean_in_flight = self._busy / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        faults = sum(self.faults.values())
        text = f"requests {self.requests}, answered {self.answered}, rejected {self.rejected}, faults {faults}"
        return f"{text}, batches {self.batches} with {self.batch_rows} answered rows" if self.batches else text


@dataclass(slots=True, eq=False)
class Job:
    """One request, from its arrival to its answer."""

    link: Connection
    head: Head
    started: float
    ask: Ask | None = None
    fault: str = ""
    latency: float = 0.0
    timer: asyncio.TimerHandle | None = None


class Server:
    """Decides what becomes of each request; its connections do the reading and writing."""

    def __init__(self, options: Options, clock: Callable[[], float] = time.monotonic) -> None:
        self.options, self.stats, self.url = options, Stats(), ""
        self.links: set[Connection] = set()
        self._limits = [Bucket(name, limit, options.burst, clock)
                        for name, limit in (("requests", options.rpm), ("tokens", options.tpm)) if limit]
        self._seen: Counter[bytes] = Counter()
        self._granted = 0
        self._working = 0
        self._queue: deque[Job] = deque()
        self._batches = Batches(self, clock)

    async def start(self) -> None:
        context = None
        if self.options.tls:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(self.options.tls)
        self._loop = asyncio.get_running_loop()
        self._listener = await self._loop.create_server(
            lambda: Connection(self), self.options.host, self.options.port, ssl=context, backlog=4096)
        host, port = self._listener.sockets[0].getsockname()[:2]
        self.url = f"http{'s' if context else ''}://{f'[{host}]' if ':' in host else host}:{port}/v1"

    async def close(self) -> None:
        """Stop listening and abort what is open; nothing is left behind."""
        self._listener.close()
        for link in self.links:
            link.abort()
        while self.links:  # each leaves in a callback that is scheduled already
            await asyncio.sleep(0)

    def accept(self, job: Job, raw: bytes) -> None:
        """Answer a request now, or set the timer that will."""
        if job.head.path not in ENDPOINTS and self._serve_more(job, raw):
            return
        self.stats.enter(job.started)
        try:
            self._check_head(job.head)
            job.ask = Ask(job.head.path, raw)
            self._admit(job.ask)
            job.fault, job.latency = self.draw_fate(job.ask)
        except Refusal as refusal:
            self._leave(job, refusal.reply)
        except RecursionError:
            self._leave(job, error(400, "The JSON body of your request is nested too deep."))
        else:
            self._granted += not job.fault
            self._begin(job)

    def _serve_more(self, job: Job, raw: bytes) -> bool:
        """Answer what is no call to a model, and return whether it is none."""
        head = job.head
        if head.path == "/v1/stand_in/stats":
            self._batches.settle()
            shown = {name: value for name, value in vars(self.stats).items() if name[0] != "_"}
            job.link.send(Reply(200, encode_json(shown)))
        elif (head.method, head.path) == ("GET", "/v1/models"):
            job.link.send(self._dress(self._models(head), 0.0))
        elif head.path.startswith(("/v1/files", "/v1/batches")):
            self._serve_batches(job, raw)
        else:
            return False
        return True

    def _serve_batches(self, job: Job, raw: bytes) -> None:
        slow = self.options.latency
        try:
            self._check_key(job.head)
            reply = self._batches.answer(job.head, raw)
        except Refusal as refusal:
            reply = refusal.reply
        except RecursionError:
            reply = error(400, "The JSON body of your request is nested too deep.")
        if job.head.method == "GET" and job.head.path.startswith("/v1/batches/"):
            slow += self.options.batch_fault.get("poll-slow", 0)
        if slow:
            job.timer = self._loop.call_later(slow, self._send_late, job, reply)
        else:
            self._send(job, reply)

    def _send(self, job: Job, reply: Reply | None) -> None:
        if reply:
            job.link.send(self._dress(reply, time.monotonic() - job.started))
        else:
            job.link.reset()

    def _send_late(self, job: Job, reply: Reply | None) -> None:
        self._send(job, reply)
        job.link.advance()

    def refuse(self, job: Job, reply: Reply) -> None:
        """Answer a request that could not even be read."""
        self.stats.enter(job.started)
        self._leave(job, reply)

    def drop(self, job: Job) -> None:
        """Forget a request whose client has gone."""
        if job.timer:
            job.timer.cancel()
            if not job.ask:
                return  # no call to a model, so it has not been counted
        with suppress(ValueError):
            self._queue.remove(job)
        self._leave(job, None)

    def _check_head(self, head: Head) -> None:
        right = "GET" if head.path == "/v1/models" else "POST"
        if head.path not in ENDPOINTS and right == "POST":
            raise Refusal(404, f"Invalid URL ({head.method} {head.path})")
        if head.method != right:
            raise Refusal(405, f"Not allowed to {head.method} on {head.path}.", headers=f"allow: {right}\r\n")
        self._check_key(head)

    def _check_key(self, head: Head) -> None:
        key = self.options.require_key
        if key is not None and head.authorization != f"Bearer {key}":
            raise Refusal(401, "Incorrect API key provided.", code="invalid_api_key")

    def _admit(self, ask: Ask) -> None:
        """Let a request in, or raise because of one of the limits."""
        options = self.options
        if options.models and ask.model not in options.models:
            raise Refusal(404, f"The model `{ask.model}` does not exist or you do not have access to it.",
                          code="model_not_found")
        self.stats.rejected += 1  # until it has passed
        if options.quota is not None and self._granted >= options.quota:
            raise Refusal(429, "You exceeded your current quota, please check your plan and billing details.",
                          "insufficient_quota", code="insufficient_quota")
        if options.max_in_flight is not None and self.stats.in_flight > options.max_in_flight:
            code = "rate_limit_exceeded" if options.reject_status == 429 else "server_is_overloaded"
            raise Refusal(options.reject_status, "Too many requests at once. Please try again later.",
                          "requests", code=code)
        self._charge([(bucket, 1 if bucket.name == "requests" else ask.cost()) for bucket in self._limits], ask.model)
        self.stats.rejected -= 1

    def _charge(self, costs: list[tuple[Bucket, int]], model: str) -> None:
        """Take the costs from all the buckets or from none."""
        refused = [(bucket.wait(cost), bucket, cost) for bucket, cost in costs
                   if cost > bucket.limit or bucket.wait(cost)]
        if not refused:
            for bucket, cost in costs:
                bucket.take(cost)
            return
        _, bucket, cost = max(refused, key=lambda item: (item[2] > item[1].limit, item[0]))
        refusal = bucket.refusal(model, cost, hints=not self.options.no_limit_headers)
        if self.options.count_rejected:
            for bucket, cost in costs:
                bucket.drain(cost)
        raise refusal

    def draw_fate(self, ask: Ask) -> tuple[str, float]:
        if not (self.options.sigma or self.options.fault):
            return "", self.options.latency
        body = canonical(ask.body)
        key = blake2b(body, digest_size=8).digest()
        self._seen[key] += 1
        kind, latency = fate(self.options, body, self._seen[key] - 1)
        first = ask.schema is not None and self._seen[key] == 1 and not ask.again
        return kind if kind != "schema" or first else "", latency

    def _begin(self, job: Job) -> None:
        if job.fault == "hang":
            self.stats.faults["hang"] += 1
        elif not job.latency:
            self._finish(job)
        elif self.options.knee and self._working >= self.options.knee:
            self._queue.append(job)
        else:
            self._working += 1
            job.timer = self._loop.call_later(job.latency, self._ripen, job)

    def _ripen(self, job: Job) -> None:
        self._finish(job)
        job.link.advance()

    def _finish(self, job: Job) -> None:
        if job.fault:
            self.stats.faults[job.fault] += 1
        else:
            self.stats.answered += 1
        assert job.ask
        self._leave(job, READY_MADE.get(job.fault) or answer(job.ask, job.fault))

    def _models(self, head: Head) -> Reply:
        try:
            self._check_head(head)
        except Refusal as refusal:
            return refusal.reply
        names = self.options.models or ("gpt-6-luna", "text-embedding-3-small")
        return Reply(200, encode_json({"object": "list", "data": [
            {"id": name, "object": "model", "created": 0, "owned_by": "stand-in",
             "shutdown_date": self.options.shutdown} for name in names]}))

    def _leave(self, job: Job, reply: Reply | None) -> None:
        """Count a request out, let the next one in the queue begin, and answer."""
        now = time.monotonic()
        self.stats.leave(job.started, now)
        if job.timer:
            self._working -= 1
            if self._queue:
                self._begin(self._queue.popleft())
        if job.fault == "reset":
            job.link.reset()
        elif reply:
            self.stats.by_status[reply.status] += 1
            job.link.send(self._dress(reply, now - job.started), cut=job.fault == "truncated")

    def _dress(self, reply: Reply, took: float) -> Reply:
        """Add the headers of the API, which the error page of a proxy in front of it lacks."""
        if reply.content_type != "application/json":
            return reply
        limits = "" if self.options.no_limit_headers else "".join(bucket.headers() for bucket in self._limits)
        return reply._replace(headers=(
            f"{reply.headers}x-request-id: req_{next(SERIAL)}\r\nopenai-processing-ms: {milliseconds(took)}\r\n"
            f"openai-version: 2020-10-01\r\n{limits}"))


# --- Files and batches --------------------------------------------------------------------------------------

FINISHED = ("failed", "completed", "expired", "cancelled")
ORGANIZATION = "org-stand-in"
DAY = 24 * 3600
NOT_RUN = {
    "batch_expired": "This request could not be executed before the completion window expired.",
    "batch_cancelled": "This request could not be executed because the batch was cancelled.",
    "request_timeout": "The request timed out.",
}


@dataclass(eq=False)
class Batch:
    """A batch as it is shown, and what is behind it."""

    shown: dict[str, Any]
    lines: bytes
    key: bytes  # what follows from the lines alone is drawn by it
    created: float  # this and the next by the server's clock
    cancelled: float = 0.0
    done: float = 1.0  # the share of the lines that are run
    total: int = 0
    tokens: int = 0  # of the prompts
    used: tuple[int, int] = (0, 0)  # tokens of what was answered, in and out
    errors: list[dict[str, Any]] = field(default_factory=list)
    weight: int = 0  # bytes of the answers, at the most
    looks: int = 0


class Batches:
    """Files, and batches made from them, which do not run: what they have come to follows from the time it is."""

    def __init__(self, server: Server, clock: Callable[[], float]) -> None:
        self._server, self._clock = server, clock
        self._epoch = time.time() - clock()
        self._files: dict[str, tuple[dict[str, Any], bytes]] = {}
        self._batches: dict[str, Batch] = {}  # the oldest first
        self._asked: set[bytes] = set()  # bodies, for expire-once

    def settle(self) -> None:
        """Bring all batches to where they are by now."""
        for batch in self._batches.values():
            if batch.shown["status"] not in FINISHED:
                self._move(batch, self._clock())

    def answer(self, head: Head, raw: bytes) -> Reply | None:
        """Answer a request, None being a reset, or raise a Refusal."""
        self.settle()
        match head.method, *head.path.split("/")[2:]:
            case "POST", "files":
                shown = self._upload(read_form(head.content_type, raw))
            case "GET", "files", name:
                shown = self._file(name)[0]
            case "GET", "files", name, "content":
                return Reply(200, "", content_type="application/octet-stream", file=self._file(name)[1])
            case "DELETE", "files", name:
                shown = {"id": self._file(name)[0]["id"], "object": "file", "deleted": True}
                del self._files[name]
            case "POST", "batches":
                batch = self._create(raw)
                if self._hit("create-lost", batch.key):
                    return None
                shown = batch.shown
            case "GET", "batches":
                shown = self._list(parse_qs(head.query))
            case "GET", "batches", name:
                batch = self._batch(name)
                batch.looks += 1
                if batch.looks % 2 and self._hit("poll-500", batch.key):
                    return READY_MADE["500"]
                shown = batch.shown
            case "POST", "batches", name, "cancel":
                shown = self._cancel(self._batch(name))
            case _:
                raise Refusal(404, f"Invalid URL ({head.method} {head.path})")
        return Reply(200, encode_json(shown))

    def _hit(self, kind: str, text: bytes) -> bool:
        """Draw whether a fault meets what the text stands for."""
        options = self._server.options
        return draw(f"{kind} {options.seed} ".encode() + text) < options.batch_fault.get(kind, 0.0)

    def _stamp(self, moment: float) -> int:
        return int(self._epoch + moment)

    def _upload(self, form: dict[str, tuple[str, bytes]]) -> dict[str, Any]:
        for name in ("file", "purpose"):
            if name not in form:
                raise missing(name)
        purpose, (filename, content) = form["purpose"][1].decode("utf-8", "replace"), form["file"]
        if len(content) > FILE_LIMIT:
            raise Refusal(400, "File is too large.")
        if max(len(filename), len(purpose)) > NAME_LIMIT:
            raise invalid("file", f"a name and a purpose of at most {NAME_LIMIT} characters")
        self._check_room(len(content))
        if purpose == "batch" and parse_object(content.partition(b"\n")[0]) is None:
            raise Refusal(400, "Invalid file format for Batch API. Must be .jsonl")
        self._server.stats.files += 1
        return self._keep(f"file-{next(SERIAL)}", filename, purpose, content)

    def _check_room(self, more: int) -> None:
        """Raise a Refusal if there is no room for so many bytes more, or for one file or batch more."""
        stored = sum(len(content) for _, content in self._files.values())
        if stored + more > STORE_LIMIT or max(len(self._files), len(self._batches)) >= COUNT_LIMIT:
            raise Refusal(413, "The stand-in server has no room left for files and batches; restart it.")

    def _keep(self, name: str, filename: str, purpose: str, content: bytes) -> dict[str, Any]:
        now = self._stamp(self._clock())
        shown = {"id": name, "object": "file", "bytes": len(content), "created_at": now,
                 "expires_at": now + 30 * DAY, "filename": filename, "purpose": purpose,
                 "status": "processed", "status_details": None}
        self._files[name] = shown, content
        return shown

    def _file(self, name: str) -> tuple[dict[str, Any], bytes]:
        if name not in self._files:
            raise Refusal(404, f"No such File object: {name}", param="id")
        return self._files[name]

    def _batch(self, name: str) -> Batch:
        if name not in self._batches:
            raise Refusal(404, f"No batch found with id '{name}'.")
        return self._batches[name]

    def _create(self, raw: bytes) -> Batch:
        asked = read_body(raw)
        only = {"endpoint": tuple(ENDPOINTS), "completion_window": ("24h",)}
        for name in ("input_file_id", *only):
            if not asked.get(name):
                raise missing(name)
            if asked[name] not in only.get(name, (asked[name],)):
                raise invalid(name, " or ".join(only[name]))
        metadata = asked.get("metadata")
        if metadata is not None and not (isinstance(metadata, dict)
                                         and all(isinstance(value, str) for value in metadata.values())):
            raise invalid("metadata", "an object of strings")
        texts = [str(asked["input_file_id"]), *(text for pair in (metadata or {}).items() for text in pair)]
        if len(texts) > 33 or max(map(len, texts)) > NAME_LIMIT:
            raise invalid("metadata", f"an object of at most 16 strings of at most {NAME_LIMIT} characters")
        self._check_room(0)
        batch = self._new(asked)
        self._validate(batch)
        self._batches[batch.shown["id"]] = batch
        self._server.stats.batches += 1
        return batch

    def _new(self, asked: dict[str, Any]) -> Batch:
        now = self._clock()
        shown = {"id": f"batch_{next(SERIAL)}", "object": "batch", "endpoint": asked["endpoint"], "model": None,
                 "errors": None, "input_file_id": str(asked["input_file_id"]), "completion_window": "24h",
                 "status": "validating", "output_file_id": None, "error_file_id": None,
                 "created_at": self._stamp(now), "in_progress_at": None,
                 "expires_at": self._stamp(now + DAY), "finalizing_at": None, "completed_at": None,
                 "failed_at": None, "expired_at": None, "cancelling_at": None, "cancelled_at": None,
                 "request_counts": {"total": 0, "completed": 0, "failed": 0}, "usage": batch_usage(0, 0),
                 "metadata": asked.get("metadata")}
        file = self._files.get(shown["input_file_id"])
        lines = file[1] if file and file[0]["purpose"] == "batch" else b""
        return Batch(shown, lines, blake2b(lines, digest_size=16).digest(), now)

    def _list(self, query: dict[str, list[str]]) -> dict[str, Any]:
        limit = query.get("limit", ["20"])[0]
        if not re.fullmatch("[1-9][0-9]?|100", limit):
            raise invalid("limit", "an integer from 1 to 100")
        names = list(reversed(self._batches))
        if after := query.get("after"):
            names = names[names.index(self._batch(after[0]).shown["id"]) + 1:]
        page = names[: int(limit)]
        return {"object": "list", "data": [self._batches[name].shown for name in page],
                "first_id": page[0] if page else None, "last_id": page[-1] if page else None,
                "has_more": len(names) > len(page)}

    def _cancel(self, batch: Batch) -> dict[str, Any]:
        status, now = batch.shown["status"], self._clock()
        if status in ("failed", "completed", "expired"):
            raise Refusal(409, f"Cannot cancel a batch with status '{status}'.")
        if status not in ("cancelling", "cancelled"):
            batch.cancelled, batch.done = now, self._progress(batch, now)
            batch.shown |= {"status": "cancelling", "cancelling_at": self._stamp(now)}
        return batch.shown

    def _validate(self, batch: Batch) -> None:
        """Look for whatever is wrong with a batch; it shows when the time for that is over."""
        names: set[str] = set()
        for number, line in enumerate(io.BytesIO(batch.lines), 1):
            try:
                name, ask = self._read(line, batch)
                if name in names:
                    raise Refusal(400, f"The custom_id '{name}' for this request is a duplicate of another request. "
                                  "The custom_id parameter must be unique for each request in a batch.",
                                  param="custom_id", code="duplicate_custom_id")
                names.add(name)
                batch.tokens += ask.prompt_tokens
                batch.weight += ask.weight
                batch.total += 1
            except Refusal as refusal:
                batch.errors.append(problem(refusal, number))
            if number > LINE_LIMIT:
                break
        if trouble := self._trouble(batch, number if batch.lines else 0):
            batch.errors = [problem(trouble, None)]

    def _trouble(self, batch: Batch, count: int) -> Refusal | None:
        """Say what is wrong with a batch as a whole."""
        shown, queue = batch.shown, self._server.options.batch_queue
        if not count:
            return Refusal(400, f"Cannot find file {shown['input_file_id']}, or organization {ORGANIZATION} does not "
                           "have access to it.", param="file_id", code="invalid_request")
        if count > LINE_LIMIT:
            return Refusal(400, f"The batch has more than {LINE_LIMIT:,} requests.", code="too_many_tasks")
        stored = sum(len(content) for _, content in self._files.values())
        if stored + batch.weight > STORE_LIMIT:
            return Refusal(400, "The answers would be too large for the stand-in server.", code="too_large")
        if self._hit("invalid", batch.key):
            return Refusal(400, "This batch was to fail validation.", code="invalid_request")
        enqueued = batch.tokens + sum(other.tokens for other in self._batches.values()
                                      if other.shown["status"] not in FINISHED and not other.errors)
        if queue is not None and enqueued > queue and not batch.errors:
            return Refusal(400, f"Enqueued token limit reached for {shown['model']} in organization {ORGANIZATION}. "
                           f"Limit: {queue:,} enqueued tokens. Please try again once some in_progress batches have "
                           "been completed.", code="token_limit_exceeded")
        return None

    def _read(self, line: bytes, batch: Batch) -> tuple[str, Ask]:
        """Return the custom_id of a line and what it asks for, or raise a Refusal."""
        name, body = read_line(line, batch.shown["endpoint"])
        try:
            ask = Ask(batch.shown["endpoint"], body)
        except Refusal as refusal:
            detail = problem(refusal, None)
            if detail["code"] == "missing_required_parameter":
                message = f"{detail['param'].capitalize()} parameter is required."
                detail |= {"code": "invalid_request", "message": message}
            raise Refusal(400, detail["message"], param=f"body.{detail['param']}", code=detail["code"]) from None
        models = self._server.options.models
        if models and ask.model not in models:
            raise Refusal(400, f"The provided model '{ask.model}' is not supported by the Batch API.",
                          param="body.model", code="model_not_found")
        batch.shown["model"] = batch.shown["model"] or ask.model
        if ask.model != batch.shown["model"]:
            raise Refusal(400, f"The model '{ask.model}' for this request does not match the rest of the batch. Each "
                          "batch must contain requests for a single model.", param="body.model",
                          code="mismatched_model")
        return name, ask

    def _progress(self, batch: Batch, now: float) -> float:
        """Return the share of the lines that have been run."""
        part = (now - batch.created) / (self._server.options.batch_time or 1e-9)
        return min(max((part - 0.1) / 0.8, 0.0), 1.0)

    def _move(self, batch: Batch, now: float) -> None:
        shown, whole, begun = batch.shown, self._server.options.batch_time, batch.created
        if shown["status"] == "cancelling":
            if now >= batch.cancelled + whole / 10:
                self._finish(batch, "cancelled", batch.cancelled + whole / 10)
        elif batch.errors:
            if now >= begun + whole / 10:
                shown |= {"status": "failed", "failed_at": self._stamp(begun + whole / 10),
                          "errors": {"object": "list", "data": batch.errors}}
        else:
            for status, share in (("in_progress", 0.1), ("finalizing", 0.9)):
                if now >= begun + whole * share:
                    shown |= {"status": status, f"{status}_at": self._stamp(begun + whole * share)}
                    done = round(batch.total * self._progress(batch, now))
                    shown["request_counts"] = {"total": batch.total, "completed": done, "failed": 0}
            if now >= begun + whole:
                self._finish(batch, "completed", begun + whole)

    def _finish(self, batch: Batch, status: str, moment: float) -> None:
        """Run the lines, as far as it came to that, and write the files."""
        files: dict[str, list[str]] = {"output": [], "error": []}
        as_text, never_run = self._hit("strings", batch.key), 0
        for number, line in enumerate(io.BytesIO(b"" if batch.errors else batch.lines)):
            name, ask = self._read(line, batch)
            outcome = self._run(batch, ask) if number < round(batch.done * batch.total) else "batch_cancelled"
            status = "expired" if outcome == "batch_expired" else status
            never_run += outcome in ("batch_cancelled", "batch_expired")
            good = isinstance(outcome, Reply) and outcome.status == 200
            files["output" if good else "error"].append(output_line(name, outcome, as_text))
        if self._hit("shuffle", batch.key):
            random.Random(self._server.options.seed).shuffle(files["output"])
        counts = {"total": batch.total, "completed": len(files["output"]), "failed": len(files["error"]) - never_run}
        batch.shown |= {"status": status, f"{status}_at": self._stamp(moment), "usage": batch_usage(*batch.used),
                        "request_counts": counts}
        for kind, rows in files.items():
            if rows:
                batch.shown[f"{kind}_file_id"] = name = f"file-{next(SERIAL)}"
                self._keep(name, f"{batch.shown['id']}_{kind}.jsonl", "batch_output", "".join(rows).encode())
        if self._hit("lost-file", batch.key):
            self._files.pop(batch.shown["output_file_id"], None)
        batch.lines = b""  # the client may have deleted the file to free the memory

    def _run(self, batch: Batch, ask: Ask) -> Reply | str:
        """Answer a line as a live request is answered, or return why there is no answer."""
        if batch.shown["status"] != "cancelling" and self._expires(ask):
            return "batch_expired"
        if self._hit("errors-only", batch.key):
            return error(400, "This line was to fail.")
        fault, _ = self._server.draw_fate(ask)
        if fault in ("reset", "truncated", "hang"):
            return "request_timeout"
        if fault in READY_MADE:
            return READY_MADE[fault]
        tokens_in, tokens_out = batch.used
        batch.used = tokens_in + ask.prompt_tokens, tokens_out + sum(estimate(text) for text, _ in ask.texts)
        self._server.stats.batch_rows += 1
        return answer(ask, fault)

    def _expires(self, ask: Ask) -> bool:
        if not self._server.options.batch_fault.keys() & {"expire", "expire-once"}:
            return False
        body = canonical(ask.body)
        if self._hit("expire", body):
            return True
        key = blake2b(body, digest_size=16).digest()
        first = key not in self._asked
        self._asked.add(key)
        return first and self._hit("expire-once", body)


def problem(refusal: Refusal, line: int | None) -> dict[str, Any]:
    """Put a refusal into the form that a batch lists it in."""
    detail = json.loads(refusal.reply.body)["error"]
    return {"code": detail["code"], "message": detail["message"], "param": detail["param"], "line": line}


def batch_usage(tokens_in: int, tokens_out: int) -> dict[str, Any]:
    return {"input_tokens": tokens_in, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": tokens_out,
            "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": tokens_in + tokens_out}


def read_form(content_type: str, raw: bytes) -> dict[str, tuple[str, bytes]]:
    """Take a form apart: the file name, if any, and the content of each field."""
    boundary = re.match(r'(?i:multipart/form-data);.*\bboundary="?([^";]+)', content_type)
    if not boundary:
        raise Refusal(400, "Invalid content type: expected multipart/form-data with a boundary.")
    form = {}
    for part in raw.split(b"\r\n--" + boundary[1].encode("latin-1"))[:-1]:
        head, _, content = part.partition(b"\r\n\r\n")
        found = dict(re.findall(r'\b(name|filename)="([^"]*)"', head.decode("utf-8", "replace")))
        form[found.get("name", "")] = found.get("filename", ""), content
    return form


def read_line(line: bytes, endpoint: str) -> tuple[str, dict[str, Any]]:
    """Return the custom_id and the body of a line that is for the endpoint."""
    item = parse_object(line)
    if item is None:
        raise Refusal(400, "This line is not parseable as valid JSON.", code="invalid_json_line")
    for name, kind, wanted in (("custom_id", str, "a string"), ("method", str, "'POST'"), ("url", str, "a string"),
                               ("body", dict, "an object")):
        if name not in item:
            raise missing(name)
        if not isinstance(item[name], kind) or (name == "method" and item[name] != "POST"):
            raise invalid(name, wanted)
    if item["url"] != endpoint:
        raise Refusal(400, "The URL provided for this request does not match the batch endpoint.", param="url",
                      code="invalid_url")
    if item["body"].get("stream"):
        raise Refusal(400, "Streaming is not supported in the Batch API.", param="body.stream",
                      code="streaming_unsupported")
    return item["custom_id"], item["body"]


def output_line(name: str, outcome: Reply | str, as_text: bool) -> str:
    """Write a line of an output or error file."""
    response, trouble = "null", "null"
    if isinstance(outcome, str):
        trouble = encode_json({"code": outcome, "message": NOT_RUN[outcome]})
    else:
        whole = not as_text and parse_object(outcome.body.encode()) is not None
        body = outcome.body if whole else encode_json(outcome.body)
        response = f'{{"status_code":{outcome.status},"request_id":"req_{next(SERIAL)}","body":{body}}}'
    return (f'{{"id":"batch_req_{next(SERIAL)}","custom_id":{encode_json(name)},"response":{response},'
            f'"error":{trouble}}}\n')


# --- HTTP ---------------------------------------------------------------------------------------------------


class Head(NamedTuple):
    """What matters of a request's head."""

    method: str
    path: str
    length: int | None  # None: chunked
    old: bool  # HTTP/1.0
    keep: bool  # the connection
    expect: bool  # 100-continue
    authorization: str
    query: str = ""
    content_type: str = ""
    limit: int = 0  # of the body


UNREADABLE = Head("", "", 0, old=False, keep=False, expect=False, authorization="")
UNREPEATABLE = {"content-length", "transfer-encoding", "host"}


@lru_cache(256)  # a client's heads are all alike, and reading one costs as much as the rest of HTTP
def parse_head(raw: bytes) -> Head:
    line, *lines = raw.decode("latin-1").split("\r\n")
    found: dict[str, str] = {}
    for name, colon, value in (text.partition(":") for text in lines):
        name = name.lower()
        if not colon or not name or name != name.strip() or (name in found and name in UNREPEATABLE):
            raise Refusal(400, "Malformed header.")
        found[name] = value.strip(" \t")
    try:
        method, target, version = line.split(" ")
        old = {"HTTP/1.0": True, "HTTP/1.1": False}[version]
        url = urlsplit(target)  # the target is a whole URL when this server is taken for a proxy
    except (ValueError, KeyError):
        raise Refusal(400, "Malformed request line.") from None
    connection = found.get("connection", "").lower()
    limit = FILE_LIMIT + HEAD_LIMIT if (method, url.path) == ("POST", "/v1/files") else BODY_LIMIT
    return Head(method, url.path, body_length(found, limit), old, authorization=found.get("authorization", ""),
                query=url.query, content_type=found.get("content-type", ""), limit=limit,
                keep="keep-alive" in connection if old else "close" not in connection,
                expect=not old and found.get("expect", "").lower() == "100-continue")


def body_length(headers: dict[str, str], limit: int) -> int | None:
    length, coding = headers.get("content-length", "0"), headers.get("transfer-encoding")
    if coding is not None and ("content-length" in headers or coding.lower() != "chunked"):
        raise Refusal(400, "Only 'Transfer-Encoding: chunked' is understood, and without Content-Length.")
    if not (length.isascii() and length.isdigit()):
        raise Refusal(400, "Malformed Content-Length.")
    if len(length) > 15 or int(length) > limit:
        raise Refusal(413, f"Request body larger than {limit} bytes.")
    return None if coding else int(length)


def encode(reply: Reply, head: Head, options: Options) -> tuple[bytes, bytes]:
    """Return the head and the body of a response as they go over the wire."""
    body, more = reply.file or reply.body.encode(), reply.headers
    if not head.keep:
        more += "connection: close\r\n"
    elif head.old:
        more += "connection: keep-alive\r\n"
    if options.gzip:
        body = gzip.compress(body, 1, mtime=0)
        more += "content-encoding: gzip\r\n"
    if options.chunked and not head.old:
        half = len(body) // 2
        body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:half], body[half:], b""))
        more += "transfer-encoding: chunked\r\n"
    else:
        more += f"content-length: {len(body)}\r\n"
    start = f"HTTP/1.1 {reply.status} {REASONS[reply.status]}\r\ncontent-type: {reply.content_type}\r\n{more}\r\n"
    return start.encode("latin-1"), b"" if head.method == "HEAD" else body


class Connection(asyncio.BufferedProtocol):
    """Takes requests one after the other, so that pipelined ones are answered in order."""

    _transport: asyncio.Transport

    def __init__(self, server: Server) -> None:
        self._server = server
        self._job: Job | None = None  # the request that is being answered
        self._window = memoryview(bytearray(WINDOW))
        self._inbox = bytearray()
        self._reader = self._read()
        self._choked = False
        self._answers = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # a Transport; uvloop's is none by name
        self.abort = transport.abort  # type: ignore[attr-defined]
        self._server.links.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.links.discard(self)
        if self._job:
            self._server.drop(self._job)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._window

    def buffer_updated(self, nbytes: int) -> None:
        self._inbox += self._window[:nbytes]
        self.advance()

    def pause_writing(self) -> None:
        self._choked = True

    def resume_writing(self) -> None:
        self._choked = False
        self.advance()

    def advance(self) -> None:
        """Read on: there are more bytes, or the last request has been answered."""
        try:
            next(self._reader)
        except Refusal as refusal:
            self._job = Job(self, UNREADABLE, time.monotonic())
            self._server.refuse(self._job, refusal.reply)
        except StopIteration:
            self._inbox.clear()  # the connection is on its way out
        if (self._job or self._choked) and len(self._inbox) > HEAD_LIMIT:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def send(self, reply: Reply, cut: bool = False) -> None:
        """Write the response to the current request, or half of it, and hang up when it is time to."""
        assert self._job
        head, self._job = self._job.head, None
        start, body = encode(reply, head, self._server.options)
        self._transport.write(start + (body[: len(body) // 2] if cut else body))
        self._answers += 1
        if head is UNREADABLE and self._transport.can_write_eof():
            # The rest of the request may be on its way, and would reset a closed connection under the answer.
            self._transport.write_eof()
            asyncio.get_running_loop().call_later(LINGER, self.abort)
        elif cut or not head.keep or self._answers == self._server.options.close_every:
            self._transport.close()

    def reset(self) -> None:
        """Hang up with a RST, as a crashed server or an impatient router does."""
        self._job = None
        linger = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)
        self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._transport.abort()

    def _read(self) -> Generator[None, None, None]:
        """Take the stream apart; each ``yield`` waits for more bytes."""
        while not self._transport.is_closing():
            raw = (yield from self._until(b"\r\n\r\n")).lstrip(b"\r\n")
            if not raw:
                continue
            head = parse_head(raw)
            if head.expect and not self._inbox:
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            body = yield from (self._chunks(head.limit) if head.length is None else self._exactly(head.length))
            self._job = Job(self, head, time.monotonic())
            self._server.accept(self._job, body)
            while self._job or self._choked:
                yield

    def _until(self, mark: bytes) -> Generator[None, None, bytes]:
        seen = 0
        while (end := self._inbox.find(mark, seen)) < 0 and len(self._inbox) <= HEAD_LIMIT:
            if self._inbox[:1].strip() and not self._inbox[:1].isalnum():
                raise Refusal(400, "This is not HTTP.")  # most likely TLS, whose client would wait for ever
            seen = max(0, len(self._inbox) - len(mark) + 1)
            yield
        if not 0 <= end <= HEAD_LIMIT:
            raise Refusal(431, f"Request header larger than {HEAD_LIMIT} bytes.")
        line = bytes(self._inbox[:end])
        del self._inbox[: end + len(mark)]
        return line

    def _exactly(self, size: int) -> Generator[None, None, bytes]:
        while len(self._inbox) < size:
            yield
        data = bytes(self._inbox[:size])
        del self._inbox[:size]
        return data

    def _chunks(self, limit: int) -> Generator[None, None, bytes]:
        body = bytearray()
        while True:
            digits = (yield from self._until(b"\r\n")).partition(b";")[0].strip()
            if not digits or digits.strip(b"0123456789abcdefABCDEF"):
                raise Refusal(400, "Malformed chunk.")
            size = int(digits, 16)
            if len(body) + size > limit:
                raise Refusal(413, f"Request body larger than {limit} bytes.")
            if not size:
                break
            body += yield from self._exactly(size)
            if (yield from self._exactly(2)) != b"\r\n":
                raise Refusal(400, "Malformed chunk.")
        for _ in range(TRAILER_LIMIT + 1):
            if not (yield from self._until(b"\r\n")):
                return bytes(body)
        raise Refusal(431, f"More than {TRAILER_LIMIT} trailer lines.")


@asynccontextmanager
async def serve(options: Options | None = None, *, clock: Callable[[], float] = time.monotonic,
                **settings: Any) -> AsyncIterator[Server]:
    """Serve in this event loop while the block runs; the settings are fields of Options and override it."""
    server = Server(replace(options or Options(), **settings), clock)
    await server.start()
    try:
        yield server
    finally:
        await server.close()


# --- Command line -------------------------------------------------------------------------------------------


def fault_share(text: str) -> tuple[str, float]:
    kind, _, share = text.partition("=")
    return kind, 1.0 if text in BATCH_FAULTS else float(share)


READERS: dict[str, Callable[[str], Any]] = {
    "int": int, "int | None": int, "float": float, "str": str, "str | None": str,
    "tuple[str, ...]": lambda text: tuple(text.split(",")), "Mapping[str, float]": fault_share,
}


def make_parser() -> argparse.ArgumentParser:
    """Make a flag of each field of Options; the help is the manual above."""
    parser = argparse.ArgumentParser("stand_in", usage=argparse.SUPPRESS, description=__doc__, add_help=False,
                                     allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    parser.add_argument("--exit-on-eof", action="store_true", help=argparse.SUPPRESS)
    for item in fields(Options):
        how: dict[str, Any] = {"type": READERS.get(str(item.type)), "default": item.default}
        if item.type == "bool":
            how = {"action": "store_true"}
        elif item.name in ("fault", "batch_fault"):
            how |= {"action": "append", "default": []}
        parser.add_argument(f"--{item.name.replace('_', '-')}", help=argparse.SUPPRESS, **how)
    parser.set_defaults(port=8000)
    return parser


def allow_many_connections() -> None:
    """Raise the number of open files, 256 on macOS, to what can be had everywhere."""
    if sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = 10_240 if hard == resource.RLIM_INFINITY else min(hard, 10_240)
        if soft != resource.RLIM_INFINITY and soft < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def await_eof(tell: Callable[[], None]) -> None:
    # Not sys.stdin.read(): the interpreter cannot exit while a thread holds its lock.
    with suppress(OSError, ValueError):
        while sys.stdin and os.read(sys.stdin.fileno(), 4096):
            pass
    tell()


async def serve_until_told(options: Options, exit_on_eof: bool) -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def tell(*_: object) -> None:
        with suppress(RuntimeError):  # the loop is closed, so it has been told
            loop.call_soon_threadsafe(stop.set)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, tell)  # on Windows too, where there is no loop.add_signal_handler
    async with serve(options) as server:
        print(f"stand-in server at {server.url}", flush=True)
        if exit_on_eof:
            threading.Thread(target=await_eof, args=(tell,), daemon=True).start()
        await stop.wait()
    print(server.stats, file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Serve until told to stop; return the exit code."""
    parser = make_parser()
    settings = vars(parser.parse_args(argv))
    exit_on_eof = settings.pop("exit_on_eof")
    settings |= {name: dict(settings[name]) for name in ("fault", "batch_fault")}
    try:
        options = Options(**settings)
    except ValueError as problem:
        parser.error(str(problem))
    allow_many_connections()
    try:
        asyncio.run(serve_until_told(options, exit_on_eof))
    except (OSError, OverflowError) as problem:
        print(f"stand_in: cannot serve at {options.host}:{options.port}: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
