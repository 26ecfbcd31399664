"""Read replies: the text, the finish reason and everything else in them, or the error that they are instead.

PromptError is raised for an HTTP 200 that is no complete answer: one that holds an error, that broke off, or that is
still in progress. The forms are those of https://platform.openai.com/docs/api-reference and, as the comments say, of
other servers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from . import core
from .failures import (
    ERROR_MOST,
    error_in_answer,
    error_of,
    error_without_call,
    header,
    is_error,
    meaning_of,
    page_title,
)
from .meanings import BROKEN, FOREIGN, MISMADE, STOPPED, UNFINISHED, WHOLE
from .prompts import encode_text
from .streams import is_stream, joined
from .usage import tier_of, usage_of

VALUES_MOST = 8_000_000  # JSON values in an answer: 2,048 vectors of 3,072 numbers are 6 million
# Fields that result lines leave out, or have under other names. All others go into `more` unless they are empty.
ORDINARY = {
    "index", "message", "text", "finish_reason", "native_finish_reason", "stop_reason", "matched_stop", "seed", "role",
    "content", "refusal", "tool_calls", "function_call", "content_filter_results", "reasoning_details", "name",
}  # fmt: skip
# Fields beside the choices that go into `more`
BESIDE = {"citations", "search_results", "related_questions", "images", "web_search", "prompt_logprobs"}
CHAT = "/chat/completions"
# Of the usual chat completion: what its parts hold, and what a reply must not hold besides
MESSAGE, CHOICE = {"role", "content", "refusal", "annotations"}, {"index", "message", "finish_reason", "logprobs"}
ODD = frozenset({"error", "base_resp", "type", *BESIDE})

NOTHING_ELSE: dict[str, Any] = {}  # shared by many replies, never changed
Read = tuple[Any, str | None, dict[str, Any]]  # text, finish reason, further fields of the result line


class Unfinished(core.PromptError):
    """A response that is still in progress; `id` is what it can be polled by, or ''."""

    def __init__(self, status: str, id: Any = None) -> None:
        way = "leave out background, deferred or async (-p, or in the line)"
        told = f"the server accepted the request but did not answer it ({core.short(status, 30)}): {way}"
        super().__init__("unfinished", told, "fail", 200)
        self.id = id if isinstance(id, str) and 0 < len(id) < 200 and id.replace("-", "_").isidentifier() else ""


def parse_reply(body: bytes) -> Any:
    """Parse the body of a reply; return None if it is not JSON, or has more than VALUES_MOST values."""
    if len(body) <= VALUES_MOST:
        return core.parse_json(body)
    with contextlib.suppress(ValueError, RecursionError):
        return core.load(body) if has_few_values(body) else None
    return None


def has_few_values(body: bytes) -> bool:
    """Tell whether a body has at most VALUES_MOST values, estimated without parsing it."""
    return len(body) <= VALUES_MOST or sum(map(body.count, (b",", b"[", b"{"))) <= VALUES_MOST


def reply_of(path: str, status: int, headers: Mapping[str, str], body: bytes) -> core.Reply:
    """Read a response to a request for `path`; status 0 means that there is none. Raises PromptError for no answer."""
    if 200 <= status < 300:
        return read_reply(path, headers, body, status)
    raise core.http_error(status, headers, body) if status else error_without_call(body)


def read_reply(path: str, headers: Mapping[str, str], body: bytes, status: int = 200) -> core.Reply:
    """Read the body of a 2xx response to a request for `path`. Raises PromptError if it has no answer."""
    try:
        data = core.load(body) if len(body) <= VALUES_MOST else parse_reply(body)
    except (ValueError, RecursionError):
        data = parse_reply(body)
    if type(data) is not dict:
        data = other_form(data, headers, body)
    request_id = header(headers, "x-request-id")
    if path == CHAT and (text := usual_text(data)):
        return reply_with(text, "stop", NOTHING_ELSE, data, request_id, headers)
    if is_error(data):
        raise error_in_answer(core.shallow(data, core.DEEPEST) if len(body) <= ERROR_MOST else TOO_LONG)
    reader = READERS.get(path) or READERS.get(path.partition("?")[0], other_reply)
    try:
        text, reason, extra = reader(data)
    except core.PromptError as failure:
        failure.http = failure.error.status or 200, request_id, for_keeping(data, body)
        raise
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RecursionError):
        raise no_answer(data, status, (200, request_id, for_keeping(data, body))) from None
    return reply_with(text, reason, extra, data, request_id, headers)


def reply_with(
    text: Any, reason: str | None, extra: dict[str, Any], data: dict[str, Any], request_id: str, headers: Any
) -> core.Reply:
    """Return a Reply with what the data tell besides: the model, the usage and the service tier."""
    if tier := tier_of(data):
        extra = extra | {"service_tier": tier}
    usage = data.get("usage")
    usage = usage if type(usage) is dict and usage else usage_of(data)
    return core.Reply(text, reason, data.get("model"), usage, extra, (200, request_id, data), headers)


TOO_LONG = {"error": "HTTP 200 with an error in it that is too long to be read"}


def for_keeping(data: Any, body: bytes) -> Any:
    """Return what a failure keeps of a body: of one longer than ERROR_MOST only the usage."""
    if len(body) <= ERROR_MOST:
        return core.shallow(data, core.DEEPEST)
    usage = usage_of(data)
    return {"usage": core.shallow(usage, 3)} if usage else None


def other_form(data: Any, headers: Mapping[str, str], body: bytes) -> dict[str, Any]:
    """Return the JSON object in a body of another form: a stream of events, or a list that holds an error.

    Raises PromptError if there is none: for a web page, another API's reply, or a gateway's plain text.
    """
    if isinstance(data, list) and data and isinstance(data[0], dict) and is_error(data[0]):
        return data[0]
    if isinstance(data, list) and data and isinstance(data[0], dict) and (name := foreign(data[0])):
        raise wrong_api(name)
    if data is None and is_stream(headers, body) and has_few_values(body):
        with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError, RecursionError):
            return joined(body)
    if "html" in header(headers, "content-type"):
        raise core.PromptError("web_page", page_title(body) or "a web page", "stop", 200)
    first = core.parse_json(body[: ERROR_MOST].partition(b"\n")[0]) if data is None else None
    if isinstance(first, dict) and (name := foreign(first)):
        raise wrong_api(name)  # Ollama's own stream
    text = page_title(body)
    if data is None and len(body) < 1000 and not body.lstrip().startswith((b"{", b"[")) and meaning_of(200, "", text):
        raise error_in_answer({"error": text})  # a gateway's plain text
    raise core.PromptError("malformed_reply", f"not JSON: {text or 'an empty body'}", "retry", 200)


def no_answer(data: dict[str, Any], status: int, http: core.Http) -> core.PromptError:
    """Classify a JSON object without an answer: in progress, another API's, an error in any form, or empty."""
    state = str(data.get("status") or data.get("task_status") or ("accepted" if status == 202 else ""))
    if status == 202 or state in UNFINISHED or data.keys() == {"request_id"}:  # xAI's deferred completions
        return Unfinished(str(state or "deferred"))
    if name := foreign(data):
        return wrong_api(name)
    if error_of(data)[1]:
        error = error_in_answer(data)
    else:
        error = core.PromptError("no_answer", "HTTP 200 with no answer in it", "retry", 200)
    error.http = (error.error.status or 200, *http[1:])
    if error.usage and any(core.token_counts(error.usage)):
        error.useless = 1  # the server worked and bills it: two attempts at the most
    return error


def foreign(data: dict[str, Any]) -> str:
    """Return the name of the API whose form this reply has, or '' if it is unknown or reports a failure."""
    failed = data.get("success") is False
    found = "" if failed else next((name for keys, name in FOREIGN if keys <= data.keys()), "")
    around = next((name for name in ("data", "result", "response", "body") if holds_answer(data.get(name))), "")
    return found or (around and f"a gateway's own API, which has the answer within `{around}`")


def holds_answer(value: Any) -> bool:
    """Tell whether a value is a chat completion, as an object or as JSON text."""
    value = core.parse_json(value[: ERROR_MOST]) if isinstance(value, str) and value[:1] == "{" else value
    return isinstance(value, dict) and bool(value.get("choices"))


def wrong_api(name: str) -> core.PromptError:
    """Return the error for an answer in the form of another API."""
    return core.PromptError("wrong_path", f"this answer has the form of {name}", "stop", 200)


# ---- Readers, by endpoint ------------------------------------------------------------------------------------


def usual_text(data: dict[str, Any]) -> str:
    """Return the text of the usual chat completion, which holds nothing else; '' for others. Every answer passes."""
    try:
        (choice,) = data["choices"]
        message = choice["message"]
        text = message["content"]
        usual = choice["finish_reason"] == "stop" and choice.keys() <= CHOICE and message.keys() <= MESSAGE
        nothing_else = not (message.get("refusal") or message.get("annotations") or choice.get("logprobs"))
        usual = usual and data.get("object") != "error" and ODD.isdisjoint(data)
        return text if usual and nothing_else and type(text) is str else ""
    except (KeyError, TypeError, ValueError, AttributeError):
        return ""


def chat_text(data: dict[str, Any]) -> Read:
    """Read a chat completion."""
    choices = in_order(data["choices"])
    reasons = [reason_of(choice) for choice in choices]  # before the messages: an answer that broke off may have none
    return of_choices(data, choices, reasons, list(map(message_of, choices)))


def message_of(choice: dict[str, Any]) -> dict[str, Any]:
    """Return the message of a choice; some proxies call it `delta`, as in a stream, or send `text` alone."""
    message: dict[str, Any] = choice.get("message") or choice.get("delta") or {"content": choice["text"]}
    return message


def completion_text(data: dict[str, Any]) -> Read:
    """Read a completion of the older endpoint, /completions."""
    choices = in_order(data["choices"])
    reasons = [reason_of(choice) for choice in choices]
    return of_choices(data, choices, reasons, [{"content": choice["text"]} for choice in choices])


def of_choices(data: dict[str, Any], choices: list[Any], reasons: list[str | None], messages: list[Any]) -> Read:
    """Combine choices: the first text, all `texts` if there are several, and the reason of the first incomplete one."""
    texts = [message_text(message) for message in messages]
    reason = next((one for one in reasons if one not in WHOLE), reasons[0])
    extra: dict[str, Any] = {"texts": texts} if len(texts) > 1 else {}
    more = [besides(choice, message, text) for choice, message, text in zip(choices, messages, texts, strict=True)]
    more[0] |= {name: data[name] for name in data if name in BESIDE and data[name]}
    if any(more):
        extra["more"] = more if len(more) > 1 else more[0]
    return texts[0], reason, extra


def in_order(items: list[Any]) -> list[Any]:
    """Return the items sorted by their `index`, if all have one: a server may send them in the order of completion."""
    if len(items) > 1 and len({item["index"] for item in items if type(item.get("index")) is int}) == len(items):
        return sorted(items, key=lambda item: item["index"])
    return items


def reason_of(choice: dict[str, Any]) -> str | None:
    """Return the finish reason of a choice. Raises PromptError if the server broke the answer off."""
    reason, error = choice.get("finish_reason"), choice.get("error")
    reason = reason.get("type") if isinstance(reason, dict) else reason  # SGLang's
    native = str(choice.get("native_finish_reason") or "").lower()  # OpenRouter's
    reason = native if not reason and (native in BROKEN or native.endswith("error")) else reason
    word = str(reason or "").lower()
    if error or word in BROKEN or word.endswith("error") or word in MISMADE:
        raise broken_off(str(reason), error)
    if word in WHOLE or word in STOPPED:
        return (word if word in WHOLE else "stop") if reason else reason
    return str(reason)


def broken_off(reason: str, error: Any) -> core.PromptError:
    """Return the error for an answer that the server broke off, by the error that it names, if any."""
    if error:
        found = error_in_answer({"error": error})
        found.error = found.error._replace(message=f"the answer broke off: {found.error.message}")
        found.args = found.error[1:2]
        return found
    text = f"the answer broke off (finish reason {core.short(reason, 60)})"
    found = core.PromptError("broken_off", text, "retry", 200)
    found.useless = int(reason.lower() in MISMADE)  # it is billed: two attempts at the most
    return found


def besides(choice: dict[str, Any], message: dict[str, Any], text: str) -> dict[str, Any]:
    """Return the fields of a choice and its message that go into `more`."""
    found: dict[str, Any] = {}
    for part in (message, choice):
        for name, value in part.items():
            if value and name not in ORDINARY and value not in found.values():  # sent under two names
                found[name] = value
    content, calls = message.get("content"), message.get("tool_calls") or message.get("function_call")
    if isinstance(content, list) and not all(isinstance(part, dict) and part.get("text") for part in content):
        found["content"] = content
    if content and calls:  # without content, the calls are the text
        found["tool_calls" if message.get("tool_calls") else "function_call"] = calls
    if (refusal := message.get("refusal")) and refusal != text:
        found["refusal"] = refusal
    details = message.get("reasoning_details") or ()
    told = "".join(str(one.get("text") or one.get("summary") or "") for one in details)  # OpenRouter: mostly the same
    if details and told != found.get("reasoning"):
        found["reasoning_details"] = details
    filters = choice.get("content_filter_results")
    if isinstance(filters, dict) and any(map(has_found, filters.values())):
        found["content_filter_results"] = filters
    return found


def has_found(verdict: Any) -> bool:
    """Tell whether one of Azure's content filters found anything."""
    if not isinstance(verdict, dict):
        return False
    return bool(verdict.get("filtered") or verdict.get("detected") or verdict.get("severity", "safe") != "safe")


def message_text(message: dict[str, Any]) -> str:
    """Return the text of a message: its content, else an audio transcript, tool calls as JSON, or a refusal."""
    content = message.get("content")
    if content and isinstance(content, str):
        return content
    if isinstance(content, list):
        content = "".join(part if isinstance(part, str) else part.get("text") or "" for part in content)
    if isinstance(content, dict):
        return encode_text(content)
    if content is None and isinstance(audio := message.get("audio"), dict):
        content = audio.get("transcript")
    if not content and (calls := message.get("tool_calls") or message.get("function_call")):
        content = encode_text(calls)
    return str(content if content is not None else message.get("refusal") or "")


def response_text(data: dict[str, Any]) -> Read:
    """Read a Responses object; tool calls without a text become the text, as JSON.

    Raises Unfinished if it is in progress, PromptError if it failed, KeyError if it is empty.
    """
    status = data.get("status")
    if status in UNFINISHED:
        raise Unfinished(status, data.get("id"))
    if status in ("failed", "cancelled"):  # `read_reply` has handled one that names an error
        raise core.PromptError("no_answer", f"the response was {status}, and the server gives no reason", "retry", 200)
    output = data["output"]
    parts = [part for item in output if item.get("type") == "message" for part in parts_of(item)]
    text = "".join(part.get("text") or part.get("refusal") or "" for part in parts)
    others = [item for item in output if item.get("type") not in ("message", "reasoning")]
    calls = [item for item in others if str(item.get("type")).endswith(("_call", "_request"))]  # to be executed
    reason = (data.get("incomplete_details") or {}).get("reason") or status
    if not output and reason == "completed":
        raise KeyError("output")
    more = {name: list(found) for name in ("annotations", "logprobs") if (found := all_of(parts, name))}
    thoughts = [item for item in output if item.get("type") == "reasoning"]
    thoughts = [item for item in thoughts if item.get("summary") or item.get("content")]
    more |= {"reasoning": thoughts} if thoughts else {}
    more |= {"calls": others} if others and (text or others != calls) else {}
    return text or (encode_text(calls) if calls else ""), reason, {"more": more} if more else {}


def parts_of(item: dict[str, Any]) -> list[Any]:
    """Return the parts of a message of a Responses object; some servers send a plain text, or null."""
    content = item.get("content") or []
    return [{"text": content}] if isinstance(content, str) else list(content)


def all_of(parts: list[Any], name: str) -> list[Any]:
    """Return the concatenated lists that the parts of an answer have under that name."""
    return [value for part in parts for value in part.get(name) or ()]


def embedding(data: dict[str, Any]) -> Read:
    """Read an embeddings reply: a vector, or one for each input of a list. Raises KeyError for an empty vector."""
    vectors = [item["embedding"] for item in in_order(data["data"])]
    if not all(vectors):
        raise KeyError("embedding")
    return None, None, {"embedding": vectors if len(vectors) > 1 else vectors[0]}


def other_reply(data: dict[str, Any]) -> Read:
    """Keep the whole reply of an unknown endpoint, which a Batch request may name."""
    return None, None, {"reply": data}


READERS: dict[str, Callable[[dict[str, Any]], Read]] = {
    "/chat/completions": chat_text,
    "/responses": response_text,
    "/completions": completion_text,
    "/embeddings": embedding,
}
