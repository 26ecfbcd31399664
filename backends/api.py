"""The OpenAI dialect, spoken by every backend: a prompt as a request, a reply as an answer or an error, limit headers.

`Api` is what `load_backend` returns. Below it stand the requests' parts, the replies, the headers that tell limits, and
the lines of Batch API files: https://platform.openai.com/docs/api-reference
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import re
import time
import traceback
import urllib.parse
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

from . import core
from .keys import PLAIN_HEADERS, concealer, environment_key, exposure, request_headers, secrets_of, split_query
from .prompts import (
    asked_in,
    content_of,
    encode_text,
    endpoint_of,
    is_blank,
    is_continued,
    is_templated,
    whole_request,
)
from .usage import tier_of, usage_of

VALUES_MOST = 8_000_000  # values in an answer: 2,048 vectors of 3,072 numbers are 6 million


def parse_reply(body: bytes) -> Any:
    """Return the parsed body of a reply; None if it is no JSON, or of more values than any answer has."""
    if len(body) <= VALUES_MOST:
        return core.parse_json(body)
    with contextlib.suppress(ValueError, RecursionError):
        return core.load(body) if sum(map(body.count, (b",", b"[", b"{"))) <= VALUES_MOST else None
    return None

DEFAULT_BASE_URL = "https://api.openai.com/v1"
FAIL_CODES = re.compile(r"context_length_exceeded|content_\w+|invalid_\w+|\w*_parse_error")
RETRY_CODES = re.compile(r"server_error|rate_limit_exceeded|slow_down|server_is_overloaded|overloaded_error|timeout")
TEXT_MOST = 8 * core.ERROR_MOST  # characters of what Python makes of a body without an answer, or of an exception



class Api:
    """An OpenAI-compatible API: builds the requests, posts them through a backend and reads the replies.

    `model`, `system`, `template`, `params` and `endpoint` are as on the command line; a Batch request line keeps its
    own unless `model` or `params` are given. `form` finishes each request's body: it is given the path and the body,
    and raises ValueError if the endpoint has no place for it. `extras` go into every run. One Api may serve any number
    of runs.
    The key is read from the environment variable `api_key_env` and is in no message and no repr. Over plain http it
    goes to this machine, with a warning to a private network, and elsewhere only with `allow_http`; a proxy counts too.
    A `dry` one only makes requests, and needs no key. `price_share` is what a call costs of the usual price.
    """

    PATIENCE = 10.0  # seconds in which a server that is there says something
    loop: Any = None  # what takes the place of the run's own
    clocked, parting = True, ""  # whether latencies mean something; what Ctrl-C does, if it is not the usual

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
        price_share: float = 1.0,
        form: Callable[[str, dict[str, Any]], dict[str, Any]] | None = None,
        extras: Iterable[Any] = (),
        dry: bool = False,
    ) -> None:
        if endpoint not in core.ENDPOINTS:
            raise core.UsageError(f"there is no endpoint {endpoint}; choose {', '.join(core.ENDPOINTS)}")
        if system is not None and endpoint in ("completions", "embeddings"):
            raise core.UsageError(f"{endpoint} takes no system text (-s)")
        self.name = name
        environment = os.environ.get("OPENAI_BASE_URL") or os.environ.get("OPENAI_API_BASE")
        self.base_url, query = split_url(base_url or environment or DEFAULT_BASE_URL)
        self.query, self._login = split_query(query)
        self.model = model
        self.system = system
        self.template = template
        self.params = dict(params or {})
        self.endpoint = endpoint
        self.extras, self._form = tuple(extras), form
        self._connect = connect
        self.allow_http, self.price_share = allow_http, price_share
        wanted = self.base_url == DEFAULT_BASE_URL or api_key_env not in ("", "OPENAI_API_KEY")
        self.key_variable = api_key_env
        self._key = environment_key(api_key_env, wanted and not dry and self.price_share > 0)
        self.headers = request_headers(self.base_url, self._key)
        self.secrets = secrets_of(self.headers, self._login)
        self.conceal = concealer(self._key, self.secrets.values())
        self._exposure = ""
        self._continued = bytearray()  # by a prompt's number, 1 if it is a conversation that ends with the assistant
        self._check_network()

    def __repr__(self) -> str:
        return f"<Api {self.name} {self.model or core.DEFAULT_MODEL} at {self.base_url}>"

    def state(self) -> dict[str, Any]:
        """Return plain values, the key among them, of which `of` makes the like in another process."""
        left = ("_connect", "submit", "conceal", "extras", "_form")
        return {name: value for name, value in vars(self).items() if name not in left}

    @classmethod
    def of(cls, state: Mapping[str, Any], connect: Callable[..., Any]) -> Api:
        """Return an Api of that state with another backend, a live one."""
        api = object.__new__(cls)
        vars(api).update(state, _connect=connect, extras=(), _form=None)
        api.conceal = concealer(api._key, api.secrets.values())
        api._check_network()  # another machine may have another proxy
        return api

    def _check_network(self) -> None:
        """Warn of a secret that crosses a network unencrypted, once. Raises UsageError where it must not."""
        before, self._exposure = self._exposure, ""
        if self.secrets and self.base_url.startswith("http:"):
            secret = "the key" if self._key else next(iter(self.secrets))
            self._exposure = exposure(self.base_url, secret, self.allow_http)
        if self._exposure not in ("", before):
            core.log.warning("%s", self._exposure)

    @contextlib.asynccontextmanager
    async def open(self, concurrency: int) -> AsyncIterator[core.Ask]:
        """Open the backend; yield the function that sends a prompt's request and returns the answer."""
        try:
            async with contextlib.AsyncExitStack() as stack:
                try:
                    connecting = self._connect(self.base_url, self.headers, concurrency + 1)  # and one beside the run
                    post = await stack.enter_async_context(connecting)
                except (ValueError, OSError, TypeError) as failure:
                    raise core.UsageError(self.conceal(f"backend {self.name} cannot be opened: {failure}")) from None

                async def call(prompt: core.Prompt) -> core.Reply:
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

    async def is_there(self, call: core.Ask) -> bool:
        """Whether the server says anything, be it an error, to a request that no prompt is part of."""
        try:
            async with asyncio.timeout(self.PATIENCE):
                await call(core.Prompt(0, None, path=f"/models{self.query}"))
        except Exception as failure:
            return core.as_prompt_error(failure).heard
        return True

    def whole_query(self) -> str:
        """Return the query of every request, with what is secret in it."""
        return "&".join(filter(None, [self.query.removeprefix("?"), self._login]))

    def discreet(self, failure: Exception) -> core.PromptError:
        """Return what a call raised as one of our errors, without secrets."""
        try:
            self.raise_discreetly(failure)
        except Exception as shown:
            return core.as_prompt_error(shown)

    def raise_discreetly(self, failure: Exception) -> NoReturn:
        """Raise it, or what shows no secret where it does, in its own text or in that of one behind it."""
        error = core.as_prompt_error(failure)
        texts = [*traceback.format_exception(failure, limit=0), *error.error[:2], repr(error.http)]
        shown = [self.conceal(text[:TEXT_MOST]) for text in texts]
        if shown == texts:
            raise failure
        *_, kind, message, http = shown
        error.error = error.error._replace(type=kind, message=message)
        error.args = (message,)
        error.http = error.http if http == texts[-1] else None
        raise error from None

    def model_given(self) -> Any:
        """Return the model that all prompts are asked of, None if nobody has said."""
        return self.params.get("model") or self.model

    def model_of(self, prompt: core.Prompt) -> str | None:
        """Return the model that a prompt is asked of; None where the server is to choose."""
        model = self.model_given()
        if prompt.kind != "batch":
            named = prompt.columns.get("model") if self._is_request(prompt) else None
            model = model or named or core.DEFAULT_MODEL
        elif not model and isinstance(prompt.content["body"], dict):
            model = prompt.content["body"].get("model")
        return model if isinstance(model, str) else None

    def show(self, prompt: core.Prompt) -> Iterator[str]:
        """Yield the lines of a prompt's request as it would be sent, with *** for what is secret."""
        path = prompt.path + (("&" if "?" in prompt.path else "?") + "***" if self._login else "")
        yield self.conceal(f"POST {self.base_url}{path}")
        for name, text in self.headers.items():
            hidden = "Bearer ***" if text.startswith("Bearer ") else "***"
            yield f"{name}: {self.conceal(text) if PLAIN_HEADERS.fullmatch(name) else hidden}"
        if not self._key and self.base_url == DEFAULT_BASE_URL:
            yield "Authorization: missing, since no key is set"
        yield from ["", *self.conceal(json.dumps(json.loads(prompt.body), indent=2, ensure_ascii=False)).split("\n")]

    def prepare(self, prompt: core.Prompt) -> core.Prompt:
        """Set the prompt's `path` and `body`, or its `error` where no request can be made of it."""
        if prompt.error is None and not prompt.body:
            try:
                prompt.path, prompt.body = self._request(prompt)
            except (ValueError, TypeError, RecursionError, LookupError) as failure:
                reason = "half a surrogate pair" if isinstance(failure, UnicodeEncodeError) else failure
                kind = "missing_column" if isinstance(failure, LookupError) else "unreadable"
                prompt.error = core.Error(kind, f"{prompt.where}: {reason}")
        return prompt

    def _is_request(self, prompt: core.Prompt) -> bool:
        """Whether a row names its own model, and is sent as it is."""
        return bool(prompt.columns) and not is_templated(prompt, self.template) and bool(whole_request(prompt))

    def _request(self, prompt: core.Prompt) -> tuple[str, bytes]:
        if prompt.kind == "batch":
            return self._batch_request(prompt)
        body = whole_request(prompt) if prompt.columns and not is_templated(prompt, self.template) else None
        if body is not None:
            return self._whole_request(prompt, body)
        if prompt.kind == "messages" and not self.model_given() and isinstance(prompt.columns.get("model"), str):
            model = core.short(prompt.columns["model"], 60)
            raise LookupError(f"it names the model {model}, and nobody else does; say -m, with that or another")
        content = content_of(prompt, self.endpoint, self.template)
        single = isinstance(content, str)
        if not single:
            self._look_at(prompt, content)
        if not single and self.endpoint == "chat" and self.system is not None:
            content = [{"role": "system", "content": self.system}, *content]
        before, hole, after = self._frame(single)
        text = core.encode_json(content) if hole else ""
        return core.ENDPOINTS[self.endpoint] + self.query, f"{before}{text}{after}".encode()

    @functools.cache  # noqa: B019 - an Api or two
    def _frame(self, single: bool) -> tuple[str, str, str]:
        """Return the JSON before and after the content, which is all that differs between requests, or no hole."""
        hole: Any = "\0content\0"
        body: dict[str, Any] = {"model": self.model or core.DEFAULT_MODEL}
        if self.endpoint == "chat":
            system = [{"role": "system", "content": self.system}] if self.system is not None else []
            body["messages"] = [*system, {"role": "user", "content": hole}] if single else hole
        elif self.endpoint == "completions":
            body["prompt"] = hole
        else:
            body["input"] = hole
            if self.system is not None:
                body["instructions"] = self.system
        request = self._formed(core.ENDPOINTS[self.endpoint], body | self.params)
        return core.encode_json(request).partition(core.encode_json(hole))

    def _formed(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._form(path, body) if self._form else body

    def _whole_request(self, prompt: core.Prompt, body: dict[str, Any]) -> tuple[str, bytes]:
        if self.system is not None or self.template is not None:
            raise LookupError("this is a whole request, which takes no system text (-s) and no template (-t)")
        body = {"model": core.DEFAULT_MODEL} | body | ({"model": self.model} if self.model else {})
        path = endpoint_of(body, self.endpoint)
        self._look_at(prompt, asked_in(body))
        return path + self.query, core.encode_json(self._formed(path, body | self.params)).encode()

    def _look_at(self, prompt: core.Prompt, content: Any) -> None:
        """Note a conversation that ends with the assistant. Raises ValueError if nothing is asked."""
        if content is not None and is_blank(content):
            raise ValueError("the request is empty: nothing is asked")
        if is_continued(content) and "continue_final_message" not in self.params:
            self._continued.extend(bytes(max(0, prompt.number + 1 - len(self._continued))))
            self._continued[prompt.number] = 1

    def warn_of_input(self) -> None:
        """Warn of conversations that end with the assistant: the model goes on from there."""
        if count := self._continued.count(1):
            what = "conversation ends" if count == 1 else "conversations end"
            command = "jq -c 'if .messages[-1].role == \"assistant\" then .messages |= .[:-1] else . end'"
            text = f"{count:,} {what} with the assistant's own words, which the model is asked to go on with"
            core.log.warning("%s; to have them written anew: %s", text, command)

    def _batch_request(self, prompt: core.Prompt) -> tuple[str, bytes]:
        row = prompt.content
        url, body = row.get("url"), row["body"]
        if not isinstance(url, str) or not re.fullmatch("/v1/[!-~]+", url) or row.get("method", "POST") != "POST":
            raise ValueError('a Batch request has "method": "POST" and a "url" such as /v1/chat/completions')
        if not isinstance(body, dict):
            raise ValueError("the body of a Batch request is an object")
        if self.system is not None or self.template is not None:
            raise ValueError("a Batch request takes no system text (-s) and no template (-t)")
        self._look_at(prompt, asked_in(body))
        model = {"model": self.model} if self.model else {}
        path = url.removeprefix("/v1")
        return path + self.query, core.encode_json(self._formed(path, body | model | self.params)).encode()

    def read(self, prompt: core.Prompt, status: int, headers: Mapping[str, str], body: bytes) -> core.Reply:
        """Return the answer as it is. What is none is read again without secrets, which some servers quote."""
        try:
            return reply_of(prompt.path, status, headers, body)
        except core.PromptError as failure:
            if 200 <= status < 300 and len(body) > core.ERROR_MOST:
                self.raise_discreetly(failure)  # which has little of the body
            body = self.conceal(body[:core.ERROR_MOST].decode("latin-1")).encode("latin-1")
        try:
            return reply_of(prompt.path, status, headers, body)
        except core.PromptError as failure:
            missing = failure.error.status == 404 or failure.error.type == "model_not_found"
            if missing and prompt.kind == "batch" and not self.model:
                failure.verdict = "fail"  # the line's own model or path, not everybody's
            raise


def split_url(url: str) -> tuple[str, str]:
    """Return the base URL without a slash or query at its end, and the query; Azure's has `?api-version=…`."""
    base, mark, query = url.strip().partition("?")
    if "@" in url:
        advice = "take user and password out of it and put the key into OPENAI_API_KEY; an @ of the path is %40"
        raise core.UsageError(f"the base URL holds an @: {advice}")
    try:
        usable = re.fullmatch(r"https?://[^\s/]+(/\S*)?", base) and urllib.parse.urlsplit(url).port != 0
    except ValueError:  # a port beyond 65535, half an IPv6 address
        usable = False
    if not usable or not re.fullmatch(r"[!-~]*", query) or "#" in url:
        # Not the query, which may hold a key.
        raise core.UsageError(f"--base-url {core.short(base)} is not of the form https://host/v1")
    for path in core.ENDPOINTS.values():
        base = base.rstrip("/").removesuffix(path)
    return base, mark + query


def reply_of(path: str, status: int, headers: Mapping[str, str], body: bytes) -> core.Reply:
    """Return the answer that a server has given. Raises PromptError where it is none."""
    if 200 <= status < 300:
        return read_reply(path, headers, body)
    raise core.http_error(status, headers, body) if status else error_without_call(body)


def read_reply(path: str, headers: Mapping[str, str], body: bytes) -> core.Reply:
    """Return the answer in the body of an HTTP 200. Raises PromptError where it holds none."""
    data = parse_reply(body)
    if not isinstance(data, dict):
        if "html" in core.header(headers, "content-type"):
            raise core.PromptError("web_page", core.page_title(body) or "a web page", "stop", 200)
        raise core.PromptError("malformed_reply", f"not JSON: {core.page_title(body) or 'an empty body'}", "retry", 200)
    if data.get("error"):
        raise error_in_answer(core.shallow(data, core.DEEPEST) if len(body) <= core.ERROR_MOST else TOO_LONG)
    reader = READERS.get(path.partition("?")[0], other_reply)
    http = 200, core.header(headers, "x-request-id"), data
    try:
        text, reason, extra = reader(data)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RecursionError):
        kept = (*http[:2], core.shallow(data, core.DEEPEST) if len(body) <= core.ERROR_MOST else None)
        raise core.PromptError("no_answer", "HTTP 200 with no answer in it", "retry", 200, kept) from None
    if tier := tier_of(data):
        extra = extra | {"service_tier": tier}
    return core.Reply(text, reason, data.get("model"), usage_of(data), extra, http, headers)


TOO_LONG = {"error": "HTTP 200 with an error in it that is too long to be read"}


# ---- Replies ---------------------------------------------------------------------------------------------------


def error_in_answer(data: dict[str, Any]) -> core.PromptError:
    """Classify an error that came with HTTP 200, by its code; where that says nothing, it is worth another try."""
    inner = data["error"]
    number = inner.get("code") if isinstance(inner, dict) else None
    if isinstance(number, int) and 400 <= number < 600:
        return core.http_error(number, {}, data)
    code, message = core.error_of(data)
    verdict = "stop" if core.STOP_CODES.fullmatch(code) else "fail" if FAIL_CODES.fullmatch(code) else "retry"
    if code and data.get("status") == "failed" and verdict == "retry" and not RETRY_CODES.fullmatch(code):
        verdict = "fail"  # the Responses API means it
    message = core.short(message) or "HTTP 200 with an error in it"
    error = core.PromptError(code or "no_answer", message, verdict, 200, (200, "", data))
    error.slow = code in ("rate_limit_exceeded", "slow_down")
    return error


def error_without_call(body: bytes) -> core.PromptError:
    """Classify an error of which a bulk backend knows no HTTP status: there was no call, or nobody was told of it."""
    code, message = core.error_of(core.shallow(core.parse_json(body[:core.ERROR_MOST]), core.DEEPEST))
    passing = RETRY_CODES.fullmatch(code) or re.fullmatch(r"request_timeout|batch_\w+", code)
    verdict = "stop" if core.STOP_CODES.fullmatch(code) else "retry" if passing else "fail"
    error = core.PromptError(code or "no_answer", core.short(message) or "no answer", verdict)
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


# ---- Limits ----------------------------------------------------------------------------------------------------


LIMIT_LEAST, LIMIT_MOST = 1e-6, 1e15  # of a limit that is believed
LIMIT_FORMS = {
    "requests": ("x-ratelimit-{}-requests", "anthropic-ratelimit-requests-{}", "x-ratelimit-{}"),
    "tokens": ("x-ratelimit-{}-tokens", "anthropic-ratelimit-tokens-{}"),
}


def limits_in(headers: Mapping[str, str], name: str) -> tuple[float, float, float] | None:
    """Return the rate (a second), what is left and what there can be at most, of requests or tokens; None if unsaid."""
    for form in LIMIT_FORMS[name]:
        try:
            limit, left = (float(core.header(headers, form.format(part))) for part in ("limit", "remaining"))
        except ValueError:
            continue
        if not LIMIT_LEAST < limit < LIMIT_MOST or not 0 <= left < LIMIT_MOST:  # Azure's -1
            continue
        wait = reset_wait(core.header(headers, form.format("reset")))
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
    wait = core.seconds(text) or 0.0
    with contextlib.suppress(ValueError, OverflowError):
        if ":" in text:
            import datetime

            wait = datetime.datetime.fromisoformat(text).timestamp() - time.time()
        elif not wait:
            wait = float(text)
    return wait if 0 < wait < 1e6 else 0.0


# ---- Batch lines -----------------------------------------------------------------------------------------------


# The most that OpenAI takes in a file of Batch requests: https://platform.openai.com/docs/guides/batch
BATCH_LINES, BATCH_BYTES = 50_000, 200_000_000


def request_line(custom_id: str, path: str, body: bytes) -> bytes:
    """Return a line of a file of Batch requests; `path` and `body` are a prompt's, without a base URL's query."""
    head = f'{{"custom_id":{core.encode_json(custom_id)},"method":"POST","url":{core.encode_json(f"/v1{path}")},"body":'
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


def batch_row(result: core.Result) -> dict[str, Any]:
    """Return a result as a line of a Batch API output file, field for field."""
    response = result.http and dict(zip(("status_code", "request_id", "body"), result.http, strict=True))
    error = None
    if result.error and (response is None or response["status_code"] == 200):
        error = {"code": result.error.type, "message": result.error.message}
        response = response if result.text is not None else None  # an answer that was not accepted was paid, too
    row_id = f"batch_req_{core.fingerprint(result.prompt)}"
    return {"id": row_id, "custom_id": result.id, "response": response, "error": error}


def batch_key(row: dict[str, Any]) -> tuple[Any, str, core.Error | None, bool]:
    """Return what a Batch output line is recognised by: its id, fingerprint, error, and whether it holds an answer.

    The error is without its message. Raises AttributeError, KeyError and TypeError if the line is none of ours.
    """
    status = (row["response"] or {}).get("status_code")
    whole = status == 200 and not row["error"]
    error = None if whole else core.Error((row["error"] or {}).get("code") or f"http_{status}", "", status)
    return row["custom_id"], row["id"].removeprefix("batch_req_"), error, status == 200


def batch_result(row: dict[str, Any], prompt: core.Prompt, error: core.Error | None) -> core.Result | None:
    """Return the prompt's result from a Batch output line; None if it is damaged."""
    with contextlib.suppress(AttributeError, IndexError, KeyError, TypeError):
        body: Any = (row["response"] or {}).get("body")
        if error is None:
            text, _, extra = READERS.get(prompt.path.partition("?")[0], other_reply)(body)
            return core.Result(prompt, text, extra=extra)
        message = row["error"]["message"] if row["error"] else core.error_of(body)[1]
        return core.Result(prompt, error=error._replace(message=message))
    return None
