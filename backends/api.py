"""The OpenAI dialect, spoken by every backend: a prompt as a request, limit headers, lines of Batch files.

`Api` is what `load_backend` returns. Below it stand the requests' parts, the headers that tell limits, and the lines of
Batch API files: https://platform.openai.com/docs/api-reference; what a reply holds is in `replies.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import re
import traceback
import urllib.parse
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from . import ALIVE, core, named_proxy
from .failures import ERROR_MOST, error_of
from .keys import PLAIN_HEADERS, concealer, environment_key, exposure, request_headers, secrets_of, split_query
from .limits import LIMIT_FORMS as LIMIT_FORMS
from .limits import limits_in as limits_in
from .prompts import (
    ENDPOINTS,
    asked_in,
    content_of,
    endpoint_of,
    is_blank,
    is_continued,
    is_plain,
    is_templated,
    not_sent,
    whole_request,
)
from .replies import READERS, Unfinished, other_reply, reply_of

if TYPE_CHECKING:
    from . import Post

DEFAULT_BASE_URL = "https://api.openai.com/v1"
TEXT_MOST = 8 * ERROR_MOST  # characters of what Python makes of a body without an answer, or of an exception


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

    PATIENCE = 10.0  # seconds within which a server that works sends something
    FIRST_POLL, LAST_POLL = 1.0, 10.0  # seconds between two polls of a background response, growing
    MISSES = 5  # such looks in a row that may fail
    sleep = staticmethod(asyncio.sleep)
    alive = ALIVE  # holds, for each call, the function to call when bytes arrive
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
        if endpoint not in ENDPOINTS:
            raise core.UsageError(f"unknown endpoint {endpoint}; choose {', '.join(ENDPOINTS)}")
        if system is not None and endpoint in ("completions", "embeddings"):
            raise core.UsageError(f"the endpoint {endpoint} takes no system text; leave out -s")
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
        self._exposure = self._proxy = ""
        self._continued = bytearray()  # by a prompt's number, 1 if it is a conversation that ends with the assistant
        self._told = False  # of columns that are not sent
        self._check_network()

    def __repr__(self) -> str:
        return f"<Api {self.name} {self.model or core.DEFAULT_MODEL} at {self.base_url}>"

    def state(self) -> dict[str, Any]:
        """Return plain values, the key included, from which `of` makes an equal Api in another process."""
        left = ("_connect", "submit", "conceal", "extras", "_form", "_text_frame")
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
        """Warn once if a secret crosses a network unencrypted. Raises UsageError if that is not allowed."""
        before, self._exposure = self._exposure, ""
        if self.secrets and self.base_url.startswith("http:"):
            secret = "the key" if self._key else next(iter(self.secrets))
            self._exposure = exposure(self.base_url, secret, self.allow_http)
        if self._exposure not in ("", before):
            core.log.warning("%s", self._exposure)

    @contextlib.asynccontextmanager
    async def open(self, concurrency: int) -> AsyncIterator[core.Ask]:
        """Open the backend; yield the function that sends a prompt's request and returns the answer."""
        self._proxy = proxy_name(self.base_url)
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
                        try:
                            return self.read(prompt, *await post(path, prompt.body))
                        except Unfinished as unfinished:
                            return await self.poll(post, prompt, unfinished)
                    except Exception as failure:
                        self.raise_discreetly(self.through_proxy(failure))

                yield call
        except Exception as failure:
            self.raise_discreetly(failure)

    async def poll(self, post: Post, prompt: core.Prompt, unfinished: Unfinished) -> core.Reply:
        """Poll a background response until it is complete. Raises PromptError if it fails."""
        if prompt.path.partition("?")[0] != ENDPOINTS["responses"] or not unfinished.id:
            raise unfinished
        query = f"?{self.whole_query()}" if self.whole_query() else ""
        path, wait, missed = f"{ENDPOINTS['responses']}/{unfinished.id}{query}", self.FIRST_POLL, 0
        while True:
            await self.sleep(wait)
            wait = min(self.LAST_POLL, 1.5 * wait)
            try:
                return self.read(prompt, *await post(path, b""))
            except Unfinished:
                missed = 0
                if alive := ALIVE.get():
                    alive()
            except Exception as failure:  # of the look, which may pass, or of the response itself
                error, missed = core.as_prompt_error(failure), missed + 1
                if error.verdict != "retry" or error.error.status == 200 or missed > self.MISSES:
                    raise

    def through_proxy(self, failure: Exception) -> Exception:
        """Return the failure with the proxy named in its message, if the proxy may have sent it."""
        if not self._proxy or "proxy" in core.text_of(failure):
            return failure
        note = f" (through the proxy {self._proxy})"
        if isinstance(failure, core.PromptError):
            page = failure.http and failure.http[0] >= 400 and failure.http[2] is None  # no API's own words
            if self.base_url.startswith("http:") and (page or failure.error.type == "web_page"):
                retell(failure, failure.error.message + note)
            return failure
        for kind in (TimeoutError, ConnectionRefusedError, ConnectionError):
            if isinstance(failure, kind):
                named = kind(core.text_of(failure) + note)
                named.__cause__ = failure
                return named
        return failure

    async def is_there(self, call: core.Ask) -> bool:
        """Whether the server says anything, be it an error, to a request that no prompt is part of."""
        try:
            async with asyncio.timeout(self.PATIENCE):
                await call(core.Prompt(0, None, path=f"/models{self.query}"))
        except Exception as failure:
            found = core.as_prompt_error(failure)
            return found.heard and not core.no_service(found)
        return True

    def whole_query(self) -> str:
        """Return the query of every request, its secrets included."""
        return "&".join(filter(None, [self.query.removeprefix("?"), self._login]))

    def discreet(self, failure: Exception) -> core.PromptError:
        """Return what a call raised as one of our errors, without secrets."""
        try:
            self.raise_discreetly(failure)
        except Exception as shown:
            return core.as_prompt_error(shown)

    def raise_discreetly(self, failure: Exception) -> NoReturn:
        """Raise the exception, or a redacted one if its text, or that of a cause, contains a secret."""
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
        """Return the model that -m, -p or the argument names for all prompts, or None."""
        return self.params.get("model") or self.model

    def model_of(self, prompt: core.Prompt) -> str | None:
        """Return the model that a prompt is sent to; None if the server chooses."""
        if model := self.params.get("model") or self.model:
            return model if isinstance(model, str) else None
        if not prompt.columns and prompt.kind != "batch":
            return core.DEFAULT_MODEL
        if prompt.kind != "batch":
            named = prompt.columns.get("model") if prompt.columns and self._is_request(prompt) else None
            model = named or core.DEFAULT_MODEL
        elif isinstance(prompt.content["body"], dict):
            model = prompt.content["body"].get("model")
        return model if isinstance(model, str) else None

    def show(self, prompt: core.Prompt) -> Iterator[str]:
        """Yield the lines of a prompt's request as it would be sent, with *** for secrets."""
        path = prompt.path + (("&" if "?" in prompt.path else "?") + "***" if self._login else "")
        yield self.conceal(f"POST {self.base_url}{path}")
        for name, text in self.headers.items():
            hidden = "Bearer ***" if text.startswith("Bearer ") else "***"
            yield f"{name}: {self.conceal(text) if PLAIN_HEADERS.fullmatch(name) else hidden}"
        if not self._key and self.base_url == DEFAULT_BASE_URL:
            yield "Authorization: missing, since no key is set"
        yield from ["", *self.conceal(json.dumps(json.loads(prompt.body), indent=2, ensure_ascii=False)).split("\n")]

    def prepare(self, prompt: core.Prompt) -> core.Prompt:
        """Set the prompt's `path` and `body`, or its `error` if no request can be made from it."""
        if prompt.error is None and not prompt.body:
            try:
                prompt.path, prompt.body = self._request(prompt)
            except (ValueError, TypeError, RecursionError, LookupError) as failure:
                half = isinstance(failure, UnicodeEncodeError)
                reason = "it contains half a surrogate pair, which is not a character" if half else failure
                kind = "missing_column" if isinstance(failure, LookupError) else "unreadable"
                prompt.error = core.Error(kind, f"{prompt.where}: {reason}")
        return prompt

    def _is_request(self, prompt: core.Prompt) -> bool:
        """Whether a row names its own model, and is sent as it is."""
        return not is_templated(prompt, self.template) and bool(whole_request(prompt))

    def _request(self, prompt: core.Prompt) -> tuple[str, bytes]:
        if prompt.kind == "prompt" and not prompt.columns and self.template is None and is_plain(prompt.content):
            path, before, after = self._text_frame  # as most are
            return path, (before + core.encode_json(prompt.content) + after).encode()
        if prompt.kind == "batch":
            return self._batch_request(prompt)
        body = whole_request(prompt) if prompt.columns and not is_templated(prompt, self.template) else None
        if body is not None:
            return self._whole_request(prompt, body)
        if prompt.kind == "messages" and not self.model_given() and isinstance(prompt.columns.get("model"), str):
            model = core.short(prompt.columns["model"], 60)
            raise LookupError(f"it names the model {model}, which would not be sent; choose one for all with -m")
        content = content_of(prompt, self.endpoint, self.template)
        if prompt.columns and not self._told:
            self._tell_of_columns(prompt)
        single = isinstance(content, str)
        if not single:
            self._look_at(prompt, content)
        if not single and self.endpoint == "chat" and self.system is not None:
            content = [{"role": "system", "content": self.system}, *content]
        before, hole, after = self._frame(single)
        text = core.encode_json(content) if hole else ""
        return ENDPOINTS[self.endpoint] + self.query, f"{before}{text}{after}".encode()

    def _tell_of_columns(self, prompt: core.Prompt) -> None:
        """Warn once of columns that are named like request parameters but are not sent."""
        given = {*self.params, *(["model"] if self.model_given() else [])}
        if text := not_sent(prompt.columns, self.template, given):
            self._told = True
            core.log.warning("%s: %s", prompt.where, text)

    @functools.cached_property
    def _text_frame(self) -> tuple[str, str, str]:
        before, _, after = self._frame(True)
        return ENDPOINTS[self.endpoint] + self.query, before, after

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
        request = self._formed(ENDPOINTS[self.endpoint], body | self.params)
        return core.encode_json(request).partition(core.encode_json(hole))

    def _formed(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._form(path, body) if self._form else body

    def _whole_request(self, prompt: core.Prompt, body: dict[str, Any]) -> tuple[str, bytes]:
        if self.system is not None or self.template is not None:
            raise LookupError("this is a whole request, which takes no system text or template; leave out -s and -t")
        body = {"model": core.DEFAULT_MODEL} | body | ({"model": self.model} if self.model else {})
        path = endpoint_of(body, self.endpoint)
        self._look_at(prompt, asked_in(body))
        return path + self.query, core.encode_json(self._formed(path, body | self.params)).encode()

    def _look_at(self, prompt: core.Prompt, content: Any) -> None:
        """Note a conversation that ends with an assistant message. Raises ValueError if the request is empty."""
        if content is not None and is_blank(content):
            raise ValueError("the request is empty")
        if is_continued(content) and "continue_final_message" not in self.params:
            self._continued.extend(bytes(max(0, prompt.number + 1 - len(self._continued))))
            self._continued[prompt.number] = 1

    def warn_of_input(self) -> None:
        """Warn of conversations that end with an assistant message, which the model continues."""
        if count := self._continued.count(1):
            what = "conversation ends" if count == 1 else "conversations end"
            command = "jq -c 'if .messages[-1].role == \"assistant\" then .messages |= .[:-1] else . end'"
            text = f"{count:,} {what} with an assistant message, which the model will continue"
            core.log.warning("%s; to get a new answer instead, remove that message: %s", text, command)

    def _batch_request(self, prompt: core.Prompt) -> tuple[str, bytes]:
        row = prompt.content
        url, body = row.get("url"), row["body"]
        if "url" not in row and "method" not in row and isinstance(body, dict):  # Mistral's lines name neither
            url = f"/v1{endpoint_of({'model': self.model} | body, self.endpoint)}"
        known = isinstance(url, str) and (url in READERS or re.fullmatch("/v1/[!-~]+", url))  # Azure has the path alone
        if not isinstance(url, str) or not known or row.get("method", "POST") != "POST":
            raise ValueError('a Batch request has "method": "POST" and a "url" such as /v1/chat/completions')
        if not isinstance(body, dict):
            raise ValueError("the body of a Batch request must be an object")
        if self.system is not None or self.template is not None:
            raise ValueError("a Batch request takes no system text or template; leave out -s and -t")
        self._look_at(prompt, asked_in(body))
        model = {"model": self.model} if self.model else {}
        path = url.removeprefix("/v1")
        return path + self.query, core.encode_json(self._formed(path, body | model | self.params)).encode()

    def read(self, prompt: core.Prompt, status: int, headers: Mapping[str, str], body: bytes) -> core.Reply:
        """Parse the reply. Redact it first if it is an error: some servers echo the key."""
        try:
            return reply_of(prompt.path, status, headers, body)
        except core.PromptError as failure:
            if 200 <= status < 300 and len(body) > ERROR_MOST:
                self.raise_discreetly(failure)  # which has little of the body
            body = self.conceal(body[:ERROR_MOST].decode("latin-1")).encode("latin-1")
        try:
            return reply_of(prompt.path, status, headers, body)
        except core.PromptError as failure:
            kind = failure.error.type
            if (failure.error.status in (404, 405) and kind != "model_not_found") or kind == "wrong_path":
                asked = f"{'POST' if prompt.body else 'GET'} {self.base_url}{prompt.path}"
                retell(failure, self.conceal(f"{failure.error.message} ({asked})"))
            missing = failure.error.status == 404 or kind in ("model_not_found", "wrong_path")
            if missing and prompt.kind == "batch" and not self.model:
                failure.verdict = "fail"  # the line's own model or path, not everybody's
            raise


def retell(failure: core.PromptError, message: str) -> None:
    """Give an error another message."""
    failure.error = failure.error._replace(message=message)
    failure.args = (message,)


def proxy_name(base_url: str) -> str:
    """Return host and port of the proxy that the environment names for a base URL, '' if it names none."""
    try:
        return urllib.parse.urlsplit(named_proxy(base_url) or "").netloc.rpartition("@")[2]
    except ValueError:  # which the backend will say
        return ""


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
    for path in ENDPOINTS.values():
        base = base.rstrip("/").removesuffix(path)
    return base, mark + query


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
        message = row["error"]["message"] if row["error"] else error_of(body)[1]
        return core.Result(prompt, error=error._replace(message=message))
    return None
