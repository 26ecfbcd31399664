"""Join a reply that comes as a stream of events, requested (`stream`) or not, into one.

The events of the three endpoints that stream are put together into the object that the same call gives without one:
https://platform.openai.com/docs/api-reference/chat-streaming and https://platform.openai.com/docs/guides/streaming-responses
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from . import core
from .failures import header
from .usage import usage_of

LINES_MOST = 1_000_000  # of a stream; an answer of a hundred thousand tokens has three times as many
STARTS = b"data:", b"event:", b"id:", b"retry:", b":"
ENDS = {"response.completed", "response.incomplete", "response.failed", "response.cancelled"}


def is_stream(headers: Mapping[str, str], body: bytes) -> bool:
    """Tell whether a body is a stream of events, regardless of its content type."""
    if body.count(b"\n") + body.count(b"\r") > LINES_MOST:
        return False
    return "event-stream" in header(headers, "content-type") or body[:1000].lstrip().startswith(STARTS)


class Texts(list[str]):
    """The parts of a text, which are joined when all are there."""


def joined(body: bytes) -> dict[str, Any]:
    """Return the object that the events add up to, or the one that holds their error.

    Raises PromptError if the stream ends before the answer does.
    """
    whole, chunks = False, list[dict[str, Any]]()
    for text in events(body.decode("utf-8", "replace")):
        chunk = core.parse_json(text)
        whole = whole or text == "[DONE]"
        if not isinstance(chunk, dict):
            continue
        if chunk.get("error") or chunk.get("type") == "error":
            return (chunk if chunk.get("error") else {"error": chunk}) | usage_among([*chunks, chunk])
        if chunk.get("type") in ENDS and isinstance(chunk.get("response"), dict):
            response: dict[str, Any] = chunk["response"]
            return response
        chunks.append(chunk)
    found = put_together(chunks)
    reasons = [choice.get("finish_reason") for choice in found.get("choices") or ()]
    if not chunks or not (whole or (reasons and all(reasons))):
        failure = core.PromptError("cut_off", "the stream of events ends before the answer does", "retry", 200)
        failure.http = (200, "", usage_among(chunks) or None)
        raise failure
    return found


def usage_among(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the last usage in the chunks as a field, since a broken-off stream is billed; {} if there is none."""
    told = (usage for chunk in reversed(chunks) if (usage := usage_of(chunk)))
    return {"usage": usage} if (usage := next(told, None)) else {}


def events(text: str) -> Iterator[str]:
    """Yield the data of each event; https://html.spec.whatwg.org/multipage/server-sent-events.html"""
    data: list[str] = []
    for line in [*text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n"), ""]:
        if line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
        elif not line and data:
            whole = "\n".join(data)
            alone = len(data) > 1 and core.parse_json(whole) is None  # some leave out the empty line between two
            yield from data if alone else [whole]
            data = []


def put_together(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the completion whose parts these are; the usage is that of the last chunk that has one."""
    found: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        told = {name: value for name, value in chunk.items() if value is not None and name != "choices"}
        for place, part in enumerate(chunk.get("choices") or ()):
            told |= {"usage": usage} if isinstance(usage := part.pop("usage", None), dict) else {}  # Moonshot's
            number = part["index"] if type(part.get("index")) is int else place
            extend(choices.setdefault(number, {"index": number}), part)
        if "usage" in found and not any(core.token_counts(told.get("usage") or {})):
            told.pop("usage", None)  # only zeros
        found |= told
    for choice in choices.values():
        if "delta" in choice:
            choice["message"] = choice.pop("delta")
            calls = choice["message"].get("tool_calls")
            if isinstance(calls, dict):
                choice["message"]["tool_calls"] = [calls[number] for number in sorted(calls)]
    return found | {"choices": [finished(choices[number]) for number in sorted(choices)]}


def finished(value: Any) -> Any:
    """Return the value with its texts joined."""
    if isinstance(value, Texts):
        return "".join(value)
    if isinstance(value, dict):
        return {name: finished(one) for name, one in value.items()}
    return [finished(one) for one in value] if isinstance(value, list) else value


def extend(whole: dict[str, Any], part: Mapping[str, Any]) -> None:
    """Add a part to what there is: texts and lists grow, calls of tools by their index, all else is set."""
    for name, value in part.items():
        before = whole.get(name)
        if value is None or name == "index":
            continue
        if name == "tool_calls" and isinstance(value, list):
            add_calls(whole.setdefault(name, {}), value)
        elif isinstance(value, dict):
            extend(whole.setdefault(name, {}), value)
        elif isinstance(value, list) and isinstance(before, Texts):
            whole[name] = [{"type": "text", "text": before}, *value] if "".join(before) else value
        elif isinstance(value, list) and isinstance(before, list):
            before.extend(value)
        elif isinstance(value, str) and name not in KEPT and isinstance(before, list) and not isinstance(before, Texts):
            add_text(before, value)  # Mistral's: thoughts come as parts, the answer as a text
        elif isinstance(value, str) and name not in KEPT:
            whole[name] = before if isinstance(before, Texts) else Texts()
            whole[name].append(value)
        elif value or not before:
            whole[name] = value


def add_calls(calls: dict[int, Any], parts: list[dict[str, Any]]) -> None:
    """Add parts of calls of tools to those that there are, by their index; a new `id` is a new call.

    Gemini's all have index 0: NousResearch/hermes-agent#62940.
    """
    for place, part in enumerate(parts):
        number = part["index"] if type(part.get("index")) is int else len(calls) + place
        if part.get("id") and calls.get(number, part).get("id") not in (part["id"], None, ""):
            same = (other for other, call in calls.items() if call.get("id") == part["id"])
            number = next(same, max(calls) + 1)
        extend(calls.setdefault(number, {}), part)


def add_text(parts: list[Any], text: str) -> None:
    """Add a text to the parts of a content."""
    last = parts[-1] if parts else None
    if isinstance(last, dict) and isinstance(last.get("text"), Texts):
        last["text"].append(text)
    elif text:
        parts.append({"type": "text", "text": Texts([text])})


# texts that are sent once, or repeated
KEPT = {"role", "id", "type", "name", "finish_reason", "native_finish_reason", "object"}
