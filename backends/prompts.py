"""What a row of the input asks: a text, messages, or a whole request; and what would be half a prompt, or none.

The tables of data sets that cannot be sent as they are stand in extras/inputs.py, which is loaded for a refusal alone.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from . import core

encode_text = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
ENDPOINTS = {
    "chat": "/chat/completions",
    "responses": "/responses",
    "completions": "/completions",
    "embeddings": "/embeddings",
}
PECULIAR = {"", " ", "{", "\u3164"}  # first characters of a text that may be blank, or JSON
BLANK = " \t\r\n\f\v\x1a\xa0\u3000\ufeff\u200b\u200c\u200d\u2060\u3164"  # not seen; isspace() does not know all of them


def words(text: str) -> frozenset[str]:
    """Return the words of a text."""
    return frozenset(text.split())


# The parameters of a request, by which a line is known as one. OpenAI's: https://platform.openai.com/docs/api-reference
# (chat, responses, completions, embeddings); vLLM's: https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html
PARAMETERS = words("""
    audio background best_of conversation dimensions echo encoding_format frequency_penalty function_call functions
    include input instructions logit_bias logprobs max_completion_tokens max_output_tokens max_tokens max_tool_calls
    messages modalities moderation n parallel_tool_calls prediction presence_penalty previous_response_id prompt
    prompt_cache_key prompt_cache_options prompt_cache_retention reasoning reasoning_effort response_format
    safety_identifier seed service_tier stop store stream stream_options suffix temperature text tool_choice tools
    top_logprobs top_p truncation user verbosity web_search_options

    add_generation_prompt chat_template chat_template_kwargs continue_final_message extra_body guided_choice
    guided_grammar guided_json guided_regex ignore_eos include_reasoning length_penalty min_p min_tokens models provider
    repetition_penalty skip_special_tokens stop_token_ids structured_outputs thinking top_k transforms use_beam_search
""")
UNMISTAKABLE = words("""
    frequency_penalty function_call functions logit_bias max_completion_tokens max_output_tokens max_tokens
    presence_penalty response_format stream_options tool_choice tools top_p
""")  # names that are no column of data
CALLED_SO = UNMISTAKABLE | {"model", "generationConfig"}  # as a column of data they are not sent, which surprises
BESIDE = words("id custom_id metadata model")  # what stands beside a request's parameters
# Columns that hold a part of the request beside `prompt`, `messages` or `input`.
INSTRUCTIONS = words(
    "instruction instructions system system_prompt system_message developer preprompt task_description preamble "
    "systeminstruction system_instruction"  # Cohere's, Gemini's
)
FOREIGN = words("from value speaker parts")  # keys of a turn that no API has: ShareGPT's, Gemini's
# What goes with a prompt as well: the turns before it (ChatGLM's, LLaMA-Factory's), what it is about (RAG sets), media
ADDED = words("history chat_history context images image image_url videos video audios")
PARTS = words("text image_url input_audio file")  # types of a message's parts
BESIDE_PROMPT = INSTRUCTIONS | ADDED | frozenset(core.CONTENT_KEYS)
BESIDE_INPUT = BESIDE_PROMPT | words("question query problem")


def content_of(prompt: core.Prompt, endpoint: str, template: str | None) -> Any:
    """Return the content of a prompt's request, a text or a list.

    Raises LookupError if the columns hold no content, or more than would be sent, and ValueError if the content is
    empty or the endpoint does not take it.
    """
    if template is not None:
        return filled(prompt, template)
    if type(prompt.content) is str and prompt.kind in ("prompt", "input") and not (prompt.columns and half(prompt)):
        if is_blank(prompt.content):
            raise ValueError(f"`{prompt.kind}` is empty")
        if prompt.content.lstrip()[0] == "{" and not prompt.columns and (why := json_in_text(prompt.where)):
            raise LookupError(why)
        return prompt.content
    if not prompt.kind and not prompt.columns:
        raise ValueError("the object is empty")
    if not prompt.kind or half(prompt):
        raise LookupError(way_out(prompt))
    content = as_messages(prompt.content, prompt.kind) if endpoint in ("chat", "responses") else prompt.content
    if is_conversation(content) or (prompt.kind == "messages" and isinstance(content, list)):
        fits = endpoint in ("chat", "responses")
    elif isinstance(content, str):
        fits = prompt.kind != "messages"
    else:
        fits = prompt.kind == "input" and isinstance(content, list) and endpoint in ("responses", "embeddings")
    if isinstance(content, dict) and {"messages", "prompt"} & content.keys():  # OpenAI's preference data sets
        raise LookupError(way_out(prompt))
    if isinstance(content, list) and any(isinstance(one, dict) and FOREIGN & one.keys() for one in content):
        raise LookupError(way_out(prompt))
    if not fits or (isinstance(content, list) and not content):
        raise ValueError(f"`{prompt.kind}` does not contain what the endpoint {endpoint} takes")
    if is_blank(content):
        raise ValueError(f"`{prompt.kind}` is empty")
    return content


def is_plain(content: Any) -> bool:
    """Whether the content is a text that is neither blank nor begins like JSON: `content_of` need not look at it."""
    return type(content) is str and content[:1].isprintable() and content[:1] not in PECULIAR


def json_in_text(where: str) -> str:
    """Return why a line in braces is not a prompt (JSON Lines in a .txt file), or ''."""
    with contextlib.suppress(core.UsageError):  # without extras/inputs.py the line is sent unchanged
        return str(core.sibling("extras", "inputs").json_in_text(where)) if ".txt" in where[-40:].lower() else ""
    return ""


def not_sent(columns: Mapping[str, Any], template: str | None, given: set[str]) -> str:
    """Return a warning of columns that are named like request parameters but not sent: `model`, `max_tokens`.

    '' if the template or the command line names all of them.
    """
    if CALLED_SO.isdisjoint(columns):
        return ""
    known = given | set(names_in(template) if template is not None else ())
    names = [f"`{name}`" for name in columns if name in CALLED_SO and name not in known]
    way = "-m" if names[:1] == ["`model`"] else f"-p {names[0][1:-1]}=..." if names else ""
    what = f"the columns {', '.join(names[:4])} are" if names[1:] else f"the column {names[0]} is" if names else ""
    whole = 'make each row a whole request, in .jsonl: {"model": ..., "messages": ...}'
    return f"{what} not sent; set one for all ({way}), or {whole}" if names else ""


def filled(prompt: core.Prompt, template: str) -> str:
    """Return the text that a template makes from a prompt. Raises LookupError and ValueError, as `content_of` does."""
    if prompt.kind == "messages":
        raise ValueError("a template (-t) cannot be used with `messages`")
    values = {**prompt.columns, prompt.kind: prompt.content} if prompt.kind else prompt.columns
    text = fill(template, values)
    named = [values[name] for name in names_in(template)]
    if (named and all(map(is_blank, named))) or is_blank(text):
        raise ValueError("the columns that the template (-t) names are empty")
    return text


@functools.cache
def names_in(template: str) -> list[str]:
    """Return the columns that a template names."""
    return [name for name in re.findall(r"\{\{|\}\}|\{([^{}]*)\}", template) if name]


def say(names: Iterable[str]) -> str:
    """Return the column names for a message: {a}, {b}."""
    return ", ".join(f"{{{core.short(str(name), 30)}}}" for name in itertools.islice(names, 8))


def fill(template: str, values: Mapping[str, Any]) -> str:
    """Return the template with each {column} filled in; {{ and }} are braces. Braces in the data mean nothing."""

    def value(match: re.Match[str]) -> str:
        if match[0] in ("{{", "}}"):
            return match[0][0]
        if match[1] not in values:
            raise LookupError(f"the template (-t) names {match[0]}; the columns are {say(values)} ({{{{ is a brace)")
        found = values[match[1]]
        return found if isinstance(found, str) else encode_text(found)

    return re.sub(r"\{\{|\}\}|\{([^{}]*)\}", value, template)


def is_blank(content: Any) -> bool:
    """Whether the content is empty: a blank text, a list of blank texts, or messages that end with a blank one."""
    if isinstance(content, str):
        return not content.strip(BLANK) or content.isspace()
    if content is None:
        return True
    if not isinstance(content, list):
        return False
    if is_conversation(content):
        last = content[-1]
        empty = "content" in last and not last.get("tool_calls") and is_blank(last["content"])
        return empty and (last.get("role") in ("user", None) or all(is_blank(one.get("content")) for one in content))
    return content != [] and all(is_blank(one.get("text", one) if isinstance(one, dict) else one) for one in content)


def is_conversation(content: Any) -> bool:
    """Whether it is a list of messages with roles."""
    return isinstance(content, list) and any(isinstance(one, dict) and "role" in one for one in content)


def as_messages(content: Any, kind: str) -> Any:
    """Return messages of other forms as a list: a single message, its parts, or JSON in a table's field."""
    if isinstance(content, str) and kind == "messages" and content.lstrip()[:1] in ("[", "{"):
        content = core.parse_json(content)
    if kind == "prompt" and isinstance(content, list) and content and all(map(is_part, content)):
        content = {"role": "user", "content": content}
    return [content] if isinstance(content, dict) and "role" in content else content


def is_part(value: Any) -> bool:
    """Whether it is a part of a message's content."""
    return isinstance(value, dict) and value.get("type") in PARTS and "role" not in value


def half(prompt: core.Prompt) -> list[str]:
    """Return the columns, other than empty ones, that hold another part of the request."""
    columns = prompt.columns
    return [name for name in other_parts(prompt.kind, tuple(columns)) if not is_blank(columns[name])]


@functools.lru_cache(1000)
def other_parts(kind: str, names: tuple[str, ...]) -> list[str]:
    """Return the columns that, by their names, hold another part of the request."""
    others = BESIDE_INPUT if kind == "input" else BESIDE_PROMPT
    return [name for name in names if name.lower() in others]


@functools.lru_cache(1000)
def parameters_in(names: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Return the columns that are not request parameters, and those that can be nothing else."""
    asked = set(names) - BESIDE
    sure = sorted(asked & UNMISTAKABLE) or (["temperature"] if asked == {"temperature"} else [])
    return sorted(asked - PARAMETERS), sure


def way_out(prompt: core.Prompt) -> str:
    """Return why a row cannot be sent as it is, and the template or the command that makes a prompt from it."""
    columns = [prompt.kind, *prompt.columns] if prompt.kind else prompt.columns
    plain = f"make a prompt from {say(columns)} (-t)"
    if prompt.kind and not half(prompt):
        what = "an object" if isinstance(prompt.content, dict) else "turns that are not messages"
        problem = f"`{prompt.kind}` holds {what}"
    elif prompt.kind:
        problem = f"sending `{prompt.kind}` alone would lose {say(half(prompt))}"
    else:
        problem, plain = "no column is called prompt, messages or input", f"make one from {say(columns)} (-t)"
    try:
        advice = core.sibling("extras", "inputs").advice(prompt)
    except core.UsageError:
        advice = ""
    return f"{problem}; {advice or plain}"


# ---- Whole requests --------------------------------------------------------------------------------------------


def whole_request(prompt: core.Prompt) -> dict[str, Any] | None:
    """Return the body of a row that is a whole request, or None.

    Raises LookupError if it is half a request: with columns that no API has, or without a model.
    """
    row = prompt.row
    if type(row) is not dict or not prompt.columns or not isinstance(prompt.content, str | list):  # of a table: never
        return None
    unknown, sure = parameters_in(tuple(prompt.columns))
    model = isinstance(row.get("model"), str)
    if not (model and not unknown) and not sure:
        return None
    chat = prompt.kind == "messages" and is_conversation(prompt.content)
    if INSTRUCTIONS & {name.lower() for name in unknown}:
        raise LookupError(way_out(prompt))
    if unknown:
        what = ", ".join(f"`{core.short(name, 30)}`" for name in unknown[:4])
        command = f"jq -c 'del({', '.join(f'.[{core.encode_json(name)}]' for name in unknown[:8])})'"
        raise LookupError(f"this is a request (`{sure[0]}`), but no API has {what}; remove that: {command}")
    if not model and not chat:
        value = core.short(encode_text(row[sure[0]]), 40)
        advice = f"set it for all (-p '{sure[0]}={value}'), rename it, or add a `model` to make a whole request"
        raise LookupError(f"`{sure[0]}` would not be sent with `{prompt.kind}`; {advice}")
    left_out = {"id", "custom_id", "stream", "stream_options"} | ({"metadata"} if not row.get("store") else set())
    return {name: value for name, value in row.items() if name not in left_out}


def is_templated(prompt: core.Prompt, template: str | None) -> bool:
    """Whether a row's columns are for a template: some may be named like request parameters, but not all."""
    sure = template is not None and "model" in prompt.columns and parameters_in(tuple(prompt.columns))[1]
    return template is not None and not sure


def endpoint_of(body: Mapping[str, Any], endpoint: str) -> str:
    """Return the path of a whole request, by its keys. Raises LookupError if -e names another endpoint."""
    model, text = str(body.get("model", "")).lower(), body.get("input")
    if "messages" in body:
        found = "chat"
    elif "prompt" in body:
        found = "completions"
    elif "moderation" in model:
        return "/moderations"
    elif {"dimensions", "encoding_format"} & body.keys() or "embed" in model or endpoint == "embeddings":
        found = "embeddings"
    else:
        plain = isinstance(text, list) and not any(isinstance(one, dict) for one in text)
        found = "embeddings" if plain else "responses"
    if endpoint not in ("chat", found):
        raise LookupError(f"this is a whole request for {ENDPOINTS[found]}; leave out -e {endpoint}")
    return ENDPOINTS[found]


def asked_in(body: Mapping[str, Any]) -> Any:
    """Return the messages, input or prompt of a request's body; [0], which is not blank, if it has none of them."""
    return next((body[name] for name in ("messages", "input", "prompt") if name in body), [0])


def is_continued(messages: Any) -> bool:
    """Whether messages end with an assistant message that is not marked as one to continue."""
    last = messages[-1] if isinstance(messages, list) and messages else None
    told = isinstance(last, dict) and (last.get("prefix") or last.get("partial"))  # DeepSeek and Mistral, Qwen
    return isinstance(last, dict) and last.get("role") == "assistant" and not told
