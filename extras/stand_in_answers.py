"""What the stand-in server answers: from the body of a request to the body of a made-up reply, without HTTP.

An Ask is a validated request; ENDPOINTS says how each kind is read and answered. Random draws are seeded with the
request's text, so that the same request always gets the same.
"""

from __future__ import annotations

import base64
import json
import math
import random
import struct
import time
import zlib
from collections.abc import Callable
from hashlib import blake2b
from http import HTTPStatus
from itertools import count
from statistics import NormalDist
from typing import Any, NamedTuple

STREAM = "text/event-stream"
VALUE_LIMIT = 1_000_000  # values in a request, numbers in an answer to one, values of an instance of a schema
SERIAL = (f"{random.SystemRandom().getrandbits(48):012x}{number:012x}" for number in count(1))
encode_json = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode
REASONS = {status.value: status.phrase for status in HTTPStatus}


# --- Requests -----------------------------------------------------------------------------------------------

Prompts = list[tuple[str, str]]  # for each, the part that the answer quotes, and the whole


class Reply(NamedTuple):
    """A response, before it is encoded and gets the headers that all have."""

    status: int
    body: str
    headers: str = ""
    content_type: str = "application/json"
    file: bytes = b""  # a file's content, sent instead of the body


def error(status: int, message: str, kind: str = "invalid_request_error", *,
          param: str | None = None, code: str | int | None = None, headers: str = "") -> Reply:
    """Put an error into OpenAI's form."""
    detail = {"message": message, "type": kind, "param": param, "code": code}
    return Reply(status, encode_json({"error": detail}), headers)


class Refusal(Exception):
    """Raised for a request that is answered with an error; takes the arguments of error()."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args)
        self.reply = error(*args, **more)


class Ask:
    """A parsed request, validated as far as this server uses it, so that answering cannot fail."""

    def __init__(self, path: str, given: bytes | dict[str, Any]) -> None:
        self.body = read_body(given) if isinstance(given, bytes) else given
        subject, read_prompts, self.answer = ENDPOINTS[path]
        for name in ("model", subject):
            if self.body.get(name) in (None, "", []):
                raise missing(name)
        self.model = self.body["model"]
        if not isinstance(self.model, str):
            raise invalid("model", "a string")
        self.stream = self.body.get("stream") or False
        if type(self.stream) is not bool or (self.stream and self.answer is embeddings):
            raise invalid("stream", "false" if self.answer is embeddings else "a boolean")
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
        """Return the tokens as a rate limiter counts them: the most that may come out, not those that do."""
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


# --- Answers ------------------------------------------------------------------------------------------------


def invent(shown: str, whole: str, suffix: str) -> str:
    """Write an answer that cannot be mistaken for a real one, nor for the answer to another prompt."""
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
    """Random choices for an instance of a schema, which may have so many values."""

    left = VALUE_LIMIT // 10


def instance(schema: Any, root: Any, luck: Luck, depth: int = 0) -> Any:
    """Make up a value that fits a schema; below a few levels the smallest one, so that recursions end."""
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


# --- Faults -------------------------------------------------------------------------------------------------

FAULTS = ("429", "500", "502", "503-html", "reset", "truncated", "hang",
          "null-choices", "error-200", "malformed", "empty-html", "schema")
# Those that each dialect words in its own way (stand_in_dialects.py); lines of batches do not meet them
DIALECT_FAULTS = ("context", "content", "credit", "key", "busy", "cut", "empty", "stream")


def html(status: int, title: str = "") -> Reply:
    """Write a page as a proxy does; the title is the status and its meaning unless one is given."""
    title = title or f"{status} {REASONS.get(status, '')}".rstrip()
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


def fate(options: Any, body: bytes, before: int) -> tuple[str, float]:
    """Draw the latency of a body, which is always the same, and its fault at this admission, or ''."""
    quantile = draw(b"%d " % options.seed + body)
    choice = draw(b"%d %d " % (options.seed, before) + body)
    latency = options.latency * math.exp(options.sigma * NormalDist().inv_cdf(quantile))
    if options.stragglers and draw(b"%d %d straggler " % (options.seed, before) + body) < options.stragglers:
        latency *= options.straggler_factor
    for kind in (*FAULTS, *DIALECT_FAULTS):
        choice -= options.fault.get(kind, 0.0)
        if choice < 0:
            return kind, latency
    return "", latency


def answer(ask: Ask, fault: str, dialect: Any = None) -> Reply:
    """Answer a request, as badly as the fault wants it, in a dialect if one is given."""
    if fault == "schema":
        ask.schema = None
        ask.texts = ask.invent_texts(len(ask.texts) // len(ask.prompts))
    content = ask.answer(ask)
    if fault == "null-choices":
        content |= {name: None for name in ("choices", "output", "data") if name in content}
    elif dialect:
        dialect.finish(content, ask, fault)
    events = dialect.events(content, ask) if dialect and (ask.stream or fault == "stream") else ""
    text = events or encode_json(content)
    text = text[: len(text) // 2] if fault == "malformed" else text
    return Reply(200, text, content_type=STREAM if events else "application/json")
