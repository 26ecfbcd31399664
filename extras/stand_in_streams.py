"""Streams of the stand-in server: an answer as the events that each provider makes of it.

The chunks of an endpoint are OpenAI's; HABITS says what a provider does otherwise, above all where it tells the usage.
The events come together when the answer is due, each as a chunk of the transfer encoding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, NamedTuple

from .stand_in_answers import Ask, encode_json

PIECE = 40  # characters of a text in one event


class Habits(NamedTuple):
    """The form of a provider's stream: what comes before the answer, and where the usage is.

    The usage has a chunk of its own, or stands in the `last` one of the answer: `always`, or with the request's
    stream_options.include_usage alone. `beside` are the fields of the whole that its last chunk alone has, and `first`
    those that a first chunk without choices has.
    """

    comment: str = ""  # while it works, too
    last: bool = False
    always: bool = False
    beside: tuple[str, ...] = ()
    first: tuple[str, ...] = ()


# Azure: https://learn.microsoft.com/azure/ai-foundry/openai/concepts/content-streaming; DeepSeek:
# https://api-docs.deepseek.com/api/create-chat-completion; OpenRouter: https://openrouter.ai/docs/api-reference/streaming
# and Effect-TS/effect#6117; Gemini: ogx-ai/ogx#5122; llama.cpp: openai-php/client#780; Groq sends the usage in x_groq,
# always: https://console.groq.com/docs/api-reference
HABITS: dict[str, Habits] = {
    "openrouter": Habits(": OPENROUTER PROCESSING", always=True),
    "gemini": Habits(last=True),
    "deepseek": Habits(": keep-alive", last=True, always=True),
    "azure": Habits(first=("prompt_filter_results",)),
    "lmstudio": Habits(beside=("stats",)),
    "groq": Habits(last=True, beside=("x_groq",)),
    "llamacpp": Habits(beside=("timings",)),
}
COMMENT = ": keep-alive"


def comment_of(name: str) -> str:
    """Return the line that a dialect sends as a sign of life."""
    return HABITS.get(name, Habits()).comment or COMMENT


def stream_of(content: dict[str, Any], ask: Ask, name: str) -> str:
    """Return an answer as a stream of events in that dialect; "" for one that has none, as embeddings."""
    make = STREAMS.get(str(content.get("object"))) if any(map(content.get, ("choices", "output"))) else None
    return "\n\n".join([*make(content, ask, HABITS.get(name, Habits())), ""]) if make else ""


def pieces(text: str) -> Iterator[str]:
    """Yield a text in parts."""
    yield from (text[start : start + PIECE] for start in range(0, len(text), PIECE))


def data(value: Any) -> str:
    return f"data: {encode_json(value)}"


def chat_events(content: dict[str, Any], ask: Ask, habits: Habits) -> Iterator[str]:
    """Yield the chunks of a chat completion; the error that ended an answer comes in the last one of its choice."""
    yield from completion_events(content, ask, habits, "chat.completion.chunk", chat_parts)


def legacy_events(content: dict[str, Any], ask: Ask, habits: Habits) -> Iterator[str]:
    """Yield the chunks of a completion."""
    yield from completion_events(content, ask, habits, "text_completion", legacy_parts)


def chat_parts(choice: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what the chunks of a choice hold, the finish reason and what goes with it last."""
    message = choice["message"]
    yield {"delta": {"role": "assistant", "content": ""}, "finish_reason": None}
    for name in ("reasoning_content", "content"):
        for piece in pieces(message.get(name) or ""):
            yield {"delta": {name: piece}, "finish_reason": None}
    yield {"delta": {}} | {name: value for name, value in choice.items() if name not in ("message", "index")}


def legacy_parts(choice: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what the chunks of a completion's choice hold."""
    for piece in pieces(choice["text"]):
        yield {"text": piece, "logprobs": None, "finish_reason": None}
    yield {name: value for name, value in choice.items() if name != "index"} | {"text": ""}


def completion_events(
    content: dict[str, Any], ask: Ask, habits: Habits, kind: str,
    parts_of: Callable[[dict[str, Any]], Iterator[dict[str, Any]]],
) -> Iterator[str]:  # fmt: skip
    """Yield the events of a completion of either kind, up to [DONE]."""
    if habits.comment:
        yield habits.comment
    told = tells_usage(ask, habits)
    apart = {"choices", "usage", *habits.beside, *habits.first}
    same = {name: value for name, value in content.items() if name not in apart} | {"object": kind}
    if habits.first:
        yield data(same | {"choices": []} | {name: content[name] for name in habits.first if name in content})
    nothing = {"usage": None} if told and not habits.last else {}
    for choice in content["choices"]:
        for part in parts_of(choice):
            last = choice is content["choices"][-1] and part.get("finish_reason") is not None
            more = closing(content, choice, habits, told) if last else {}
            yield data(same | {"choices": [{"index": choice["index"]} | part]} | nothing | more)
    if told and not habits.last:
        yield data(same | {"choices": [], "usage": content.get("usage")})
    yield "data: [DONE]"


def closing(content: dict[str, Any], choice: dict[str, Any], habits: Habits, told: bool) -> dict[str, Any]:
    """Return what else the chunk with the finish reason has, such as the error that ended the answer."""
    more = {name: content[name] for name in habits.beside if name in content}
    if told and habits.last:
        more["usage"] = content.get("usage")
    if "x_groq" in more:
        more["x_groq"] = more["x_groq"] | {"usage": content.get("usage")}
    return more | ({"error": choice["error"]} if "error" in choice else {})  # OpenRouter's


def tells_usage(ask: Ask, habits: Habits) -> bool:
    """Return whether a stream includes the usage; an unrequested stream does."""
    options = ask.body.get("stream_options")
    asked = isinstance(options, dict) and bool(options.get("include_usage"))
    return habits.always or asked or not ask.stream


def response_events(content: dict[str, Any], ask: Ask, habits: Habits) -> Iterator[str]:
    """Yield the events of a Responses object: https://platform.openai.com/docs/api-reference/responses-streaming"""
    numbers = count()

    def event(kind: str, **more: Any) -> str:
        return f"event: {kind}\n{data({'type': kind, 'sequence_number': next(numbers)} | more)}"

    begun = content | {"status": "in_progress", "output": [], "usage": None, "completed_at": None}
    yield event("response.created", response=begun)
    yield event("response.in_progress", response=begun)
    for place, item in enumerate(content["output"]):
        where = {"item_id": item["id"], "output_index": place, "content_index": 0}
        part = item["content"][0]
        yield event("response.output_item.added", output_index=place, item=item | {"content": []})
        yield event("response.content_part.added", **where, part=part | {"text": ""})
        for piece in pieces(part["text"]):
            yield event("response.output_text.delta", **where, delta=piece, logprobs=[])
        yield event("response.output_text.done", **where, text=part["text"], logprobs=[])
        yield event("response.content_part.done", **where, part=part)
        yield event("response.output_item.done", output_index=place, item=item)
    yield event(f"response.{content['status']}", response=content)


# by an answer's `object`
STREAMS: dict[str, Callable[[dict[str, Any], Ask, Habits], Iterator[str]]] = {
    "chat.completion": chat_events,
    "text_completion": legacy_events,
    "response": response_events,
}
