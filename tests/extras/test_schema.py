"""Structured answers: what is sent for a schema, which answers fit it, what becomes of those that do not."""

import asyncio
import contextlib
import copy
import csv
import json
import logging
import pathlib
import socket
import subprocess
import sys
import time

import pytest

import concurrent_prompts
from concurrent_prompts import PromptError, UsageError, load_backend, main, run, run_sequential
from concurrent_prompts.backends.api import Api
from concurrent_prompts.backends.hints import hint
from concurrent_prompts.extras import schema as schema_file
from concurrent_prompts.extras.schema import Schema, is_strict
from tests.helpers import NAMES, in_rows, longest_pause

both_codecs = pytest.mark.usefixtures("codec")

AGE = {
    "title": "An age, of a person",
    "type": "object",
    "properties": {"age": {"type": "integer"}},
    "required": ["age"],
    "additionalProperties": False,
}
FORM = {"name": "An_age_of_a_person", "schema": AGE, "strict": True}
URL = "http://127.0.0.1:1/v1"
GOOD, BAD = '{"age": 7}', '{"age": "x"}'
MISMATCH = "$.age: 'x' is not of type 'integer'"


@pytest.fixture
def checker():
    """Skip what needs jsonschema where that is not installed."""
    pytest.importorskip("jsonschema")


@pytest.fixture(scope="module")
def idle():
    """The processes that no run uses, by their schema."""
    processes = {}
    yield processes
    for checker in processes.values():
        checker.end()


@pytest.fixture(autouse=True)
def lasting(request, monkeypatch, idle):
    """Leave a process that checks answers for the next run by its schema: it takes a fifth of a second to start.

    Not where its life is the test's matter, and not if it is still at an answer.
    """
    if "children" in request.fixturenames:
        return

    class Lasting(schema_file.Checker):
        at_work = False
        end = schema_file.Checker.close

        def _start(self):
            other = idle.pop(json.dumps(self._schema), None)
            if not other or other._process.poll() is not None:
                return super()._start()
            self._process, other._process = other._process, None
            return self._process

        def _ask(self, *given):
            self.at_work = True
            found = super()._ask(*given)
            self.at_work = False
            return found

        def close(self):
            key = json.dumps(self._schema)
            if self.at_work or key in idle or not self._process:
                return self.end()
            idle[key] = twin = copy.copy(self)
            self._process, twin.thread = None, None

    monkeypatch.setattr(schema_file, "Checker", Lasting)


@pytest.fixture
def no_checker(monkeypatch):
    """Have no jsonschema."""
    monkeypatch.setitem(sys.modules, "jsonschema.validators", None)


def chat(*texts, reason="stop", **message):
    """Return a chat completion with a choice for each text."""
    choices = [{"message": {"content": text, **message}, "finish_reason": reason} for text in texts]
    return {"model": "m", "choices": choices, "usage": {"prompt_tokens": 5, "completion_tokens": 2}}


def response(*parts, status="completed", **more):
    """Return a Responses API object with one message of these parts."""
    message = {"type": "message", "content": [{"type": "output_text", **part} for part in parts]}
    return {"status": status, "output": [message] if parts else [], **more}


def completion(text):
    return {"choices": [{"text": text, "finish_reason": "stop"}]}


def api(*replies, **settings):
    """Return an Api whose backend gives one of these replies after the other, and the list of what it is sent."""
    sent, left = [], list(replies)

    @contextlib.asynccontextmanager
    async def connect(base_url, headers, concurrency):
        async def post(path, body):
            sent.append((path, json.loads(body)))
            status, data = left[0] if isinstance(left[0], tuple) else (200, left[0])
            if len(left) > 1:
                del left[0]
            return status, {"x-request-id": "req_1"}, json.dumps(data).encode()

        yield post

    settings = {"schema": AGE} | settings
    checker = Schema(settings.pop("schema"))
    checker.check_options(settings.get("endpoint", "chat"), settings.get("params", {}))
    return Api(connect, base_url=URL, form=checker.asked, extras=[checker], **settings), sent


def ask(*replies, prompt="How old?", settings=None, **options):
    """Return the Result of one prompt, and the bodies that were sent for it."""
    source, sent = api(*replies, **(settings or {}))
    (result,) = asyncio.run(run_sequential([prompt], source, **options))
    return result, [body for _, body in sent]


# ---- What is sent --------------------------------------------------------------------------------------------

WRAPPED = {"type": "json_schema", "json_schema": FORM}
FLAT = {"type": "json_schema", **FORM}


@both_codecs
@pytest.mark.parametrize(
    ("endpoint", "answer", "params", "form"),
    [
        ("chat", chat(GOOD), {}, {"response_format": WRAPPED}),
        ("completions", completion(GOOD), {}, {"response_format": WRAPPED}),
        ("responses", response({"text": GOOD}), {}, {"text": {"format": FLAT}}),
        (
            "responses",
            response({"text": GOOD}),
            {"text": {"verbosity": "low"}},
            {"text": {"verbosity": "low", "format": FLAT}},
        ),
    ],
)
def test_each_endpoint_gets_the_schema_in_its_own_form(endpoint, answer, params, form):
    result, bodies = ask(answer, settings={"endpoint": endpoint, "params": params})
    assert result.error is None and result.text == GOOD and result.attempts == 1
    assert [{key: body[key] for key in form} for body in bodies] == [form]


@in_rows(
    ("endpoint", "params"),
    [
        ("chat", {"response_format": {"type": "json_object", "schema": {"type": "object"}}}),  # Together
        ("chat", {"guided_json": {"type": "object"}}),  # older vLLM
        ("completions", {"json_schema": {"type": "object"}}),  # llama.cpp
        ("responses", {"text": {"format": {"type": "json_object"}}}),
    ],
)
def test_a_form_of_the_users_own_is_sent_and_the_answer_checked(endpoint, params):
    make = {"chat": chat, "completions": completion, "responses": lambda text: response({"text": text})}[endpoint]
    for text, error in ((GOOD, None), ("no JSON", "schema_mismatch")):
        result, bodies = ask(make(text), settings={"endpoint": endpoint, "params": params})
        assert (result.error and result.error.type) == error
        assert {key: bodies[0][key] for key in params} == params
        assert not bodies[0].keys() & {"response_format", "text"} - params.keys()


def test_a_batch_line_gets_the_form_of_its_own_url():
    def line(url, **body):
        return {"custom_id": "a", "method": "POST", "url": url, "body": {"model": "m", **body}}

    lines = [
        line("/v1/chat/completions?a=1", messages=[{"role": "user", "content": "?"}], response_format={"type": "text"}),
        line("/v1/responses", input="?", text={"verbosity": "low"}),
        line("/v1/moderations", input="?"),
        line("/v1/embeddings", input="?"),
    ]
    source, sent = api(chat(GOOD), response({"text": GOOD}))
    results = asyncio.run(run_sequential(lines, source))
    assert sent[0][1]["response_format"] == WRAPPED and "text" not in sent[0][1]
    assert sent[1][1]["text"] == {"verbosity": "low", "format": FLAT} and len(sent) == 2
    assert [result.error and result.error.type for result in results] == [None, None, "unreadable", "unreadable"]
    assert results[2].error.message == "prompt 3: --schema is not supported for /moderations"


@in_rows(
    ("settings", "named"),
    [
        ({"endpoint": "embeddings"}, "embeddings takes no schema"),
        ({"endpoint": "responses", "params": {"text": "low"}}, "-p text"),
        ({"schema": True}, "the schema is not a JSON object"),
        ({"schema": "schema.json"}, "the schema is not a JSON object"),
        ({"schema": {"const": float("nan")}}, "the schema is not a JSON schema"),
        ({"schema": {"const": {1, 2}}}, "the schema is not a JSON schema"),
        ({"schema": {"const": "\ud800"}}, "the schema is not a JSON schema"),
    ],
)
def test_what_cannot_be_used_is_known_before_the_first_call(settings, named):
    with pytest.raises(UsageError, match=named):
        api(**settings)


def test_a_schema_that_goes_round_in_a_circle():
    circle = {"type": "object"}
    circle["not"] = circle
    with pytest.raises(UsageError, match="the schema is not a JSON schema"):
        api(schema=circle)


def test_the_schema_is_copied():
    schema = copy.deepcopy(AGE)
    source, sent = api(chat(GOOD), schema=schema)
    schema["properties"].clear()
    asyncio.run(run_sequential(["?"], source))
    assert sent[0][1]["response_format"] == WRAPPED


@in_rows(
    ("title", "name"),
    [(None, "answer"), ("Person", "Person"), ("Straße 7-b", "Stra_e_7-b"), ("人", "answer"), ("x" * 70, "x" * 64)],
)
def test_the_name_is_what_openai_allows(title, name):
    schema = {**AGE, "title": title} if title else {key: AGE[key] for key in AGE if key != "title"}
    _, (body,) = ask(chat(GOOD), settings={"schema": schema})
    assert body["response_format"]["json_schema"]["name"] == name


def closed(**properties):
    """Return an object as strict mode wants it."""
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


def nested(levels):
    return closed(a=nested(levels - 1)) if levels else {"type": "string"}


STRICT = [
    (closed(), True),
    (closed(a={"type": ["string", "null"]}, b={"enum": [1, 2]}, c={"anyOf": [{"type": "null"}, closed()]}), True),
    ({**closed(next={"$ref": "#"}), "$schema": "https://json-schema.org/draft/2020-12/schema"}, True),
    ({**closed(a={"$ref": "#/$defs/b"}), "$defs": {"b": closed()}}, True),
    (closed(a={"type": "array", "items": {"type": "number", "minimum": 0}, "minItems": 2}), True),
    (closed(a={"type": "string", "format": "date"}), True),
    (nested(10), True),
    (nested(11), False),
    ({"type": "object"}, False),
    ({**closed(a={"type": "string"}), "required": []}, False),
    ({**closed(), "additionalProperties": {"type": "string"}}, False),
    ({**closed(a={"$ref": "#/$defs/b"}), "$defs": {"b": {"type": "object"}}}, False),
    (closed(a={"type": "array"}), False),
    (closed(a={"type": ["object", "null"]}), False),
    (closed(a={}), False),
    (closed(a=True), False),
    (closed(a={"type": "string", "format": "uri"}), False),
    (closed(a={"type": "string", "default": ""}), False),
    (closed(a={"$ref": "#/$defs/b", "description": "?"}), False),
    (closed(a={"oneOf": [{"type": "string"}]}), False),
    (closed(a={"not": {"type": "string"}}), False),
]


@in_rows(("schema", "strict"), STRICT)
def test_strict_is_said_where_openai_takes_it(schema, strict):
    assert is_strict(schema) is strict


ROOTS = [{"type": "array", "items": closed()}, {"anyOf": [closed()]}, {**closed(), "anyOf": []}]


@pytest.mark.parametrize("root", ROOTS)
def test_strict_mode_wants_an_object_at_the_root(root, no_checker):
    _, (body,) = ask(chat("{}"), settings={"schema": root})
    assert body["response_format"]["json_schema"]["strict"] is False


def test_strict_mode_takes_no_schema_of_more_than_120_000_characters(no_checker):
    for size, strict in ((100_000, True), (120_000, False)):
        _, (body,) = ask(chat("{}"), settings={"schema": closed(a={"enum": ["x" * size]})})
        assert body["response_format"]["json_schema"]["strict"] is strict


# ---- Which answers fit ---------------------------------------------------------------------------------------

UNFIT = [
    (BAD, MISMATCH),
    ("{}", "$: 'age' is a required property"),
    ('{"age": 1, "b": 2}', "$: Additional properties are not allowed ('b' was unexpected)"),
    ("[]", "$: [] is not of type 'object'"),
    (f"```json\n{GOOD}\n```", "not JSON: it is in ``` fences"),
    ("Sure! " + GOOD, "not JSON: Expecting value: line 1 column 1 (char 0)"),
    (GOOD + GOOD, "not JSON: Extra data: line 1 column 11 (char 10)"),
    ('{"age": NaN}', "not JSON: NaN is not a JSON number"),
    (" \n", "not JSON: it is empty"),
    ("[" * 100_000, "not JSON: nested more than 200 deep"),
    ('{"age": ' * 200_000, "not JSON: nested more than 200 deep"),
]


@both_codecs
@pytest.mark.parametrize(("text", "message"), UNFIT)
def test_what_is_wrong_with_an_answer(checker, text, message):
    result, _ = ask(chat(text), max_attempts=1)
    assert result.error == ("schema_mismatch", message, 200, True)
    assert result.text == text and result.usage["prompt_tokens"] == 5 and result.finish_reason == "stop"
    assert result.http[:2] == (200, "req_1") and result.model == "m" and result.done
    assert isinstance(result.exception, PromptError) and result.exception.http == result.http
    assert hint(result.error).startswith("see their text")


@both_codecs
@pytest.mark.parametrize("text", [GOOD, f"\n {GOOD}\r\n", '{"age": 1.0}', '{"age": 123456789012345678901234567890}'])
def test_what_fits(checker, text):
    result, bodies = ask(chat(text))
    assert result.error is None and result.text == text and len(bodies) == 1


def test_a_large_answer_is_quoted_in_short(checker):
    result, _ = ask(chat(json.dumps({"age": list(range(9000))})), max_attempts=1)
    assert result.error.message.startswith("$.age: [0, 1, 2") and len(result.error.message) < 100
    assert result.error.message.endswith("… is not of type 'integer'")


async def test_a_large_answer_does_not_hold_up_the_loop(checker):
    """The check of it ends after that of a small one that came later."""
    source, _ = api(chat(json.dumps([0] * 20_000)), chat("[1]"), schema={"type": "array", "items": {"type": "number"}})
    order = [result.prompt.number async for result in concurrent_prompts.as_completed(["a", "b"], source)]
    assert order == [1, 0]


def test_all_choices_are_checked(checker):
    result, _ = ask(chat(GOOD, BAD, "x"), max_attempts=1)
    assert result.error.message == f"answer 2 of 3: {MISMATCH}"
    assert result.text == GOOD and result.extra["texts"] == [GOOD, BAD, "x"]


def test_without_jsonschema_only_json_is_asked_for(no_checker, caplog):
    source, _ = api(chat(BAD), chat(BAD), chat("no"))
    results = asyncio.run(run_sequential(["1", "2", "3"], source, max_attempts=1))
    assert [result.error and result.error.type for result in results] == [None, None, "schema_mismatch"]
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1 and "pip install jsonschema" in warnings[0]


@pytest.mark.parametrize("draft", ["http://json-schema.org/draft-04/schema#", "http://json-schema.org/draft-07/schema#"])
def test_the_schemas_own_draft_counts(checker, draft):
    """`exclusiveMinimum: true` is draft 4's; `items` as a list was given up after draft 7."""
    schema = {"$schema": draft, "items": [{"type": "integer"}]}
    if "04" in draft:
        schema |= {"minimum": 3, "exclusiveMinimum": True}
    result, _ = ask(chat('["x"]'), settings={"schema": schema}, max_attempts=1)
    assert result.error.message == "$[0]: 'x' is not of type 'integer'"
    if "04" in draft:
        assert ask(chat("3"), settings={"schema": schema}, max_attempts=1)[0].error is not None


INVALID = [
    ({"type": "integr"}, "$.type"),
    ({"properties": []}, "$.properties"),
    ({"pattern": "("}, "$.pattern"),
    ({"properties": {"a": {"$ref": "#/$defs/nowhere"}}}, "nowhere"),
    ({"properties": {"a": {"$ref": "https://example.com/schema.json"}}}, "example.com"),
    ({"properties": {"a": {"$ref": "person.json"}}}, "person.json"),
    ({"$ref": "#"}, "recursion"),
    ({"$schema": ["x"]}, "list"),
]


@pytest.mark.parametrize(("schema", "named"), INVALID)
def test_a_schema_that_is_none(checker, monkeypatch, schema, named):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: pytest.fail("a schema was looked for in the network"))
    with pytest.raises(UsageError) as caught:
        Schema(schema, "s.json")
    assert str(caught.value).startswith("s.json is not a JSON schema") and named in str(caught.value)
    assert "\n" not in str(caught.value)


LATER = [  # found out only by an answer
    {"$id": "https://example.com/a", "properties": {"age": {"$id": "b", "$ref": "https://example.com/c"}}},
    {"properties": {"age": {"anyOf": [{"type": "null"}, {"$dynamicRef": "#nowhere"}]}}},
    {"properties": {"age": {"type": "string", "allOf": [{"$ref": "#/properties/age"}]}}},
]


@pytest.mark.parametrize("schema", LATER)
def test_a_check_that_fails_costs_one_prompt_its_answer_and_no_more(checker, monkeypatch, schema):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: pytest.fail("a schema was looked for in the network"))
    source, sent = api(chat(BAD), chat("{}"), schema=schema)
    first, second = asyncio.run(run_sequential(["1", "2"], source))
    assert first.error.type == "schema_mismatch" and first.text == BAD and second.error is None
    assert "cannot be checked against the schema: " in first.error.message and len(sent) == 2


def test_a_schema_that_refers_to_itself(checker):
    schema = {**closed(next={"anyOf": [{"$ref": "#"}, {"type": "null"}]})}
    deep = "{}"
    for _ in range(3):
        deep = json.dumps({"next": json.loads(deep)})
    assert ask(chat('{"next": {"next": null}}'), settings={"schema": schema})[0].error is None
    assert ask(chat(deep), settings={"schema": schema}, max_attempts=1)[0].error.message.startswith("$.next")
    for levels in (50, 199):  # the latter may be more than there is stack for
        result, bodies = ask(chat('{"next": ' * levels + "null" + "}" * levels), settings={"schema": schema})
        assert result.error is None or (levels == 199 and "cannot be checked" in result.error.message)
        assert len(bodies) == 1


# ---- One more try --------------------------------------------------------------------------------------------


@both_codecs
def test_a_chat_goes_on_with_what_is_wrong(checker):
    result, bodies = ask(chat(BAD), chat(GOOD), settings={"system": "Be brief."})
    assert result.error is None and result.text == GOOD and result.exception is None
    assert result.attempts == 2 and result.lost > 0 and result.retry_wait < 0.1
    first, second = bodies
    assert second["messages"][:2] == first["messages"]
    assert second["messages"][2] == {"role": "assistant", "content": BAD}
    assert second["messages"][3]["role"] == "user" and MISMATCH in second["messages"][3]["content"]
    assert {**second, "messages": 0} == {**first, "messages": 0}
    assert json.loads(result.prompt.body) == first  # by which a later run recognises it


@both_codecs
@pytest.mark.parametrize("given", ["How old?", [{"role": "user", "content": "How old?"}]])
def test_a_response_goes_on_with_what_is_wrong(checker, given):
    prompt = given if isinstance(given, str) else {"input": given}
    replies = response({"text": BAD}), response({"text": GOOD})
    result, bodies = ask(*replies, prompt=prompt, settings={"endpoint": "responses"})
    assert result.error is None and [item["role"] for item in bodies[1]["input"]] == ["user", "assistant", "user"]
    assert bodies[1]["input"][0]["content"] == "How old?" and bodies[1]["input"][1]["content"] == BAD


@pytest.mark.parametrize(("endpoint", "answer"), [("completions", completion(BAD)), ("chat", chat(""))])
def test_where_there_are_no_turns_the_same_is_asked_again(checker, endpoint, answer):
    good = completion(GOOD) if endpoint == "completions" else chat(GOOD)
    result, bodies = ask(answer, good, settings={"endpoint": endpoint})
    assert result.error is None and bodies[0] == bodies[1] and result.attempts == 2


def test_it_is_one_more_try_and_no_more(checker):
    result, bodies = ask(chat(BAD), chat('{"age": null}'), chat(GOOD))
    assert result.error.message == "$.age: None is not of type 'integer'" and result.text == '{"age": null}'
    assert len(bodies) == result.attempts == 2 and result.done


EARLY = [
    ("chat", chat('{"age', reason="length"), "ended by length: not JSON"),
    ("chat", chat("", reason="content_filter"), "ended by content_filter: not JSON: it is empty"),
    ("chat", chat(None, refusal="I cannot help."), "ended by refusal: not JSON"),
    ("chat", chat(None, reason="tool_calls", tool_calls=[{"id": 1}]), "ended by tool_calls: $"),
    ("chat", chat(None, reason="new_reason"), "ended by new_reason: not JSON"),
    ("responses", response({"text": None, "refusal": "No."}), "ended by refusal: not JSON"),
    (
        "responses",
        response({"text": "{"}, status="incomplete", incomplete_details={"reason": "max_output_tokens"}),
        "ended by max_output_tokens: not JSON",
    ),
    ("responses", {"status": "completed", "output": [{"type": "function_call", "id": 1}]}, "ended by function_call: $"),
    (
        "responses",
        {"status": "incomplete", "output": [{"type": "reasoning"}], "incomplete_details": {"reason": "content_filter"}},
        "ended by content_filter: not JSON: it is empty",
    ),
]


@pytest.mark.parametrize(("endpoint", "answer", "message"), EARLY)
def test_what_was_cut_off_or_refused_is_not_asked_again(checker, endpoint, answer, message):
    result, bodies = ask(answer, settings={"endpoint": endpoint})
    assert result.error.type == "schema_mismatch" and result.error.message.startswith(message)
    assert len(bodies) == result.attempts == 1 and result.text is not None


def test_what_was_cut_off_but_fits_is_an_answer(checker):
    assert ask(chat(GOOD, reason="length"))[0].error is None


FAILURES = [
    (400, {"error": {"message": "too long", "code": "context_length_exceeded"}}),
    (500, {"error": {"message": "no"}}),
    (401, {"error": {"message": "no key", "code": "invalid_api_key"}}),
]


@pytest.mark.parametrize("failure", FAILURES)
def test_where_the_second_try_brings_nothing_the_answer_stays(checker, monkeypatch, failure):
    monkeypatch.setattr(concurrent_prompts, "BACKOFF_BASE", 0.001)
    result, bodies = ask(chat(BAD), failure, max_attempts=3)
    assert result.error == ("schema_mismatch", MISMATCH, 200, True) and result.text == BAD
    assert result.http[0] == 200 and result.done and len(bodies) == (3 if failure[0] == 500 else 2)


def test_a_fault_in_between_does_not_bring_another_try(checker, monkeypatch):
    monkeypatch.setattr(concurrent_prompts, "BACKOFF_BASE", 0.001)
    result, bodies = ask(chat(BAD), FAILURES[1], chat(BAD), chat(GOOD))
    assert result.error.message == MISMATCH and len(bodies) == 3 and bodies[1] == bodies[2]


def test_the_next_run_of_the_same_prompts_begins_anew(checker):
    source, sent = api(chat(BAD), chat(GOOD), chat(GOOD))
    prompts = [result.prompt for result in asyncio.run(run_sequential(["?"], source))]
    (result,) = asyncio.run(run_sequential(prompts, source))
    assert result.attempts == 1 and sent[2] == sent[0]


def test_the_first_failure_may_be_raised(checker):
    source, _ = api(chat(BAD))
    with pytest.raises(PromptError, match="is not of type 'integer'"):
        asyncio.run(run_sequential(["?"], source, return_exceptions=False))


@both_codecs
def test_half_a_surrogate_pair_in_an_answer(checker):
    result, bodies = ask(chat('{"age": "\ud800"}'), chat(GOOD))
    assert result.error is None and len(bodies) == 2


# ---- From the user's end -------------------------------------------------------------------------------------

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 20},
        "age": {"type": "integer", "minimum": 18, "maximum": 99},
        "weight": {"type": "number"},
        "sure": {"type": "boolean"},
        "kind": {"enum": ["a", "b"]},
        "friends": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2},
        "boss": {"anyOf": [{"$ref": "#/$defs/boss"}, {"type": "null"}]},
    },
    "required": ["name", "age", "weight", "sure", "kind", "friends", "boss"],
    "additionalProperties": False,
    "$defs": {"boss": {"type": "object", "properties": {"name": {"type": ["string", "null"]}}, "required": ["name"]}},
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory with a file of three prompts and one with a schema."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("One?\nTwo?\nThree?\n")
    (tmp_path / "schema.json").write_text(json.dumps(PERSON))
    return tmp_path


def rows(path="prompts.results.jsonl"):
    return [json.loads(line) for line in pathlib.Path(path).read_text("utf-8").splitlines()]


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("endpoint", ["chat", "responses"])
@pytest.mark.parametrize("way", [[], ["--sequential"]])
def test_with_every_backend(here, stand_in, checker, backend, endpoint, way):
    pytest.importorskip({"raw-aiohttp": "aiohttp", "openai-sdk": "openai"}.get(backend, "asyncio"))
    server = stand_in(fault={"schema": 0.5})
    command = ["prompts.txt", "-b", backend, "-e", endpoint, "--base-url", server.url, "--schema", "schema.json"]
    assert main([*command, *way]) == 0
    found = rows()
    assert len({row["text"] for row in found}) == 3 and all(json.loads(row["text"]).keys() for row in found)
    assert sum(row["attempts"] for row in found) == server.stats.requests == 3 + server.stats.faults["schema"] > 3


@pytest.mark.parametrize("backend", NAMES)
def test_with_completions(here, stand_in, checker, backend):
    server = stand_in(fault={"schema": 1})
    command = ["prompts.txt", "-b", backend, "-e", "completions", "--base-url", server.url]
    assert main([*command, "--schema", "schema.json"]) == 0
    assert [row["attempts"] for row in rows()] == [2, 2, 2]


def test_a_comparison(here, stand_in, checker, capsys):
    server = stand_in(fault={"schema": 0.5})
    command = ["prompts.txt", "--compare", "-b", "stdlib", "--base-url", server.url, "--schema", "schema.json"]
    assert main(command) == 0 and "Concurrent time" in capsys.readouterr().out
    assert server.stats.faults["schema"]


@both_codecs
def test_a_failed_one_is_kept_and_asked_again_on_request(here, stand_in, checker, capsys):
    server = stand_in(fault={"schema": 1})
    command = ["prompts.txt", "--base-url", server.url, "--schema", "schema.json"]
    assert main([*command, "--max-attempts", "1"]) == 1
    err = capsys.readouterr().err
    assert "3 x schema_mismatch, first: not JSON" in err and "-> see their text" in err
    first = rows()
    assert all("made up" in row["text"] and row["usage"] and row["finish_reason"] == "stop" for row in first)
    assert all(row["error"]["type"] == "schema_mismatch" and row["error"]["retryable"] for row in first)
    assert main(command) == 1 and server.stats.requests == 3 and rows() == first
    assert main([*command, "--retry-failed"]) == 0 and server.stats.requests == 6
    assert [row["request"] for row in rows()] == [row["request"] for row in first]


def test_another_schema_is_another_request(here, stand_in, checker):
    server = stand_in()
    command = ["prompts.txt", "--base-url", server.url, "--schema", "schema.json"]
    assert main(command) == 0 and main(command) == 0 and server.stats.requests == 3
    (here / "schema.json").write_text(json.dumps({**PERSON, "title": "Person"}))
    assert main(command) == 0 and server.stats.requests == 6


@both_codecs
def test_a_batch_line_keeps_the_answer_that_does_not_fit(here, stand_in, checker):
    body = {"model": "m", "messages": [{"role": "user", "content": "?"}]}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (here / "batch.jsonl").write_text(json.dumps(line) + "\n")
    server = stand_in(fault={"schema": 1})
    command = ["batch.jsonl", "--base-url", server.url, "--schema", "schema.json"]
    assert main([*command, "--max-attempts", "1"]) == 1
    (row,) = rows("batch.results.jsonl")
    assert row["error"]["code"] == "schema_mismatch" and row["error"]["message"].startswith("not JSON")
    assert "made up" in row["response"]["body"]["choices"][0]["message"]["content"]
    assert main(command) == 1 and server.stats.requests == 1
    assert main([*command, "--retry-failed"]) == 0 and server.stats.requests == 2
    (row,) = rows("batch.results.jsonl")
    assert row["error"] is None and json.loads(row["response"]["body"]["choices"][0]["message"]["content"])


FILES = [
    (b'{"type":\n "object",}', "schema.json line 2 column "),
    (b'{"type": "object"', "schema.json line 1 column 18: not JSON: "),
    (b"", "schema.json line 1 column 1: not JSON: "),
    (b"\n\n\xff", "schema.json line 3: not UTF-8"),
    ('{"a": "ü"}'.encode("utf-16"), "schema.json line 1: not UTF-8"),
    (b"true", "schema.json is not a JSON object"),
    (b"[{}]", "schema.json is not a JSON object"),
    (b'{"const": NaN}', "schema.json: not JSON: NaN is not a JSON number"),
    (b'{"not": ' * 100_000, "schema.json: not JSON: nested more than 200 deep"),
    (b'{"type": 7}', "schema.json is not a JSON schema at $.type: 7 is not valid"),
]


@pytest.mark.parametrize(("text", "message"), FILES)
@pytest.mark.parametrize("way", [[], ["--compare"]])
def test_files_that_hold_no_schema(here, stand_in, checker, capsys, text, message, way):
    (here / "schema.json").write_bytes(text)
    server = stand_in()
    assert main(["prompts.txt", "--base-url", server.url, "--schema", "schema.json", *way]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"concurrent_prompts.py: {message}") and err.count("\n") == 1
    assert server.stats.requests == 0 and not (here / "prompts.results.jsonl").exists()


@pytest.mark.parametrize("path", ["missing.json", "."])
def test_files_that_cannot_be_read(here, stand_in, capsys, path):
    assert main(["prompts.txt", "--base-url", stand_in().url, "--schema", path]) == 2
    assert capsys.readouterr().err.startswith(f"concurrent_prompts.py: cannot read {path}: ")


def test_a_byte_order_mark_is_no_harm(here, stand_in):
    (here / "schema.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(PERSON).encode())
    assert main(["prompts.txt", "--base-url", stand_in().url, "--schema", "schema.json"]) == 0


def test_in_python(stand_in, checker):
    source = load_backend("stdlib", base_url=stand_in(fault={"schema": 1}).url, schema=PERSON)
    results = run(["One?", "Two?"], source)
    assert [result.attempts for result in results] == [2, 2]
    assert all(18 <= json.loads(result.text)["age"] <= 99 for result in results)


# ---- Nothing that was paid is lost ---------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["asked again", "another schema", "asked again in vain"])
def test_a_text_that_did_not_fit_is_kept_when_it_is_asked_again(here, stand_in, how):
    server = stand_in(fault={"schema": 1.0})
    command = ["prompts.txt", "--base-url", server.url, "--schema", "schema.json", "--max-attempts", "1"]
    assert main(command) == 1
    texts = [row["text"] for row in rows()]
    assert all(texts)
    if how == "another schema":
        pathlib.Path("schema.json").write_text(json.dumps(PERSON | {"description": "mended"}))
    elif how == "asked again in vain":
        server.options.fault.clear()
        server.options.fault["500"] = 1.0
    status = main([*command, *([] if how == "another schema" else ["--retry-failed"])])
    assert status == (0 if how == "asked again" else 1)
    assert [row["text"] for row in rows("prompts.results.superseded.jsonl")] == texts


def test_a_table_shows_the_text_that_did_not_fit(here, stand_in, capsysbinary):
    server = stand_in(fault={"schema": 1.0})
    command = ["prompts.txt", "--base-url", server.url, "--schema", "schema.json", "--max-attempts", "1", "-q"]
    assert main([*command, "-o", "a.csv"]) == 1
    with open("a.csv", encoding="utf-8-sig", newline="") as file:
        first = next(csv.DictReader(file))
    text = rows("a.csv.results.jsonl")[0]["text"]
    assert text and first["text"] == text and first["error"].startswith("schema_mismatch: ")
    command[2] = stand_in(fault={"schema": 1.0}).url
    assert main([*command, "-o", "-", "--format", "text"]) == 1
    assert text in " ".join(capsysbinary.readouterr().out.decode().split())


def test_a_schema_in_its_wrapping_is_refused(here, capsys):
    pathlib.Path("schema.json").write_text(json.dumps({"name": "p", "schema": PERSON}))
    assert main(["prompts.txt", "--base-url", "http://127.0.0.1:9/v1", "--schema", "schema.json"]) == 2
    assert "contains a schema under `schema`; give that part alone" in capsys.readouterr().err


# ---- Regular expressions -------------------------------------------------------------------------------------

ENDLESS = "^(a+)+$"
VICIOUS = json.dumps({"name": "a" * 40 + "b"})
NAMED = {"type": "object", "properties": {"name": {"type": "string", "pattern": ENDLESS}}, "required": ["name"]}
KEYED = {"type": "object", "patternProperties": {ENDLESS: {"type": "integer"}}}
PATTERNS = (NAMED, VICIOUS), (KEYED, json.dumps({"a" * 40 + "b": 1}))


@pytest.fixture
def children(checker, monkeypatch):
    """The processes that are started, which have a fifth of a second for an answer."""
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            started.append((self, options["env"]))

    monkeypatch.setattr(subprocess, "Popen", Popen)
    monkeypatch.setattr(schema_file.Checker, "SECONDS", 0.2)
    yield started
    assert all(child.returncode is not None for child, _ in started), "it has not been ended with the run"


@pytest.mark.parametrize(("schema", "vicious"), PATTERNS, ids=["pattern", "patternProperties"])
def test_a_pattern_that_never_ends_costs_one_prompt(children, monkeypatch, schema, vicious):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-for-children")
    good = '{"name": "aaa"}' if schema is NAMED else '{"aaa": 1}'
    bad = good.replace("aaa", "b") if schema is NAMED else good.replace("1", '"x"')
    source, sent = api(chat(good), chat(vicious), chat(bad), chat(good), schema=schema)
    found = asyncio.run(run_sequential(["one", "two", "three"], source))
    assert [result.text for result in found] == [good, vicious, good]
    assert [result.attempts for result in found] == [1, 1, 2] and len(sent) == 4
    assert found[1].error.type == "schema_mismatch" and found[0].error is found[2].error is None
    message = "cannot be checked against the schema: checking it takes more than 0.2 s"
    assert found[1].error.message == message
    assert "does not match" in sent[3][1]["messages"][-1]["content"] or "not of type" in str(sent[3][1])
    assert len(children) == 3, "one for the schema, one for the run, and one after the kill"
    assert not any("sk-not-for-children" in str(environment) for _, environment in children)


DOUBLED = {f"d{n}": {"properties": {"a": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2}}} for n in range(40)}
LONG = {
    "uniqueItems": ({"type": "array", "uniqueItems": True}, json.dumps([{"a": n} for n in range(5000)]), "[]"),
    "$ref": (
        {"type": "object", **DOUBLED["d0"], "$defs": {**DOUBLED, "d40": {}}}, '{"a": ' * 42 + "1" + "}" * 42,
        '{"a": 1}',
    ),
    "unevaluatedProperties": (
        {"type": "object", "unevaluatedProperties": {"type": "integer"}}, json.dumps({str(n): n for n in range(9999)}),
        "{}",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("schema", "vicious", "good"), LONG.values(), ids=LONG)
def test_an_answer_that_takes_too_long_to_check_costs_one_prompt(children, schema, vicious, good):
    source, _ = api(chat(good), chat(vicious), chat(good), schema=schema)
    found = asyncio.run(run_sequential(["one", "two", "three"], source, max_attempts=1))
    assert [result.error and result.error.type for result in found] == [None, "schema_mismatch", None]
    assert found[1].error.message == "cannot be checked against the schema: checking it takes more than 0.2 s"
    assert len(children) == 3


def test_nothing_is_started_without_a_pattern(children):
    result, _ = ask(chat(GOOD), settings={"schema": {**AGE, "title": "pattern", "description": '"pattern":"x"'}})
    assert result.error is None and not children


async def test_the_event_loop_and_the_deadline_go_on_meanwhile(children, monkeypatch):
    monkeypatch.setattr(schema_file.Checker, "SECONDS", 30.0)
    source, _ = api(chat(VICIOUS), schema=NAMED)
    began = time.monotonic()
    found, pause = await longest_pause(concurrent_prompts.run_concurrent(["x"] * 5, source, deadline=0.4))
    assert time.monotonic() - began < 5 and pause < 1
    assert [result.error.type for result in found] == ["deadline"] * 5
    assert all(result.text == VICIOUS and "deadline" in result.error.message for result in found)


def test_a_process_that_dies_is_replaced(children, monkeypatch):
    source, _ = api(chat('{"name": "a"}'), schema=NAMED)
    with source.extras[0].checking():
        assert source.extras[0].find({"name": "b"}).startswith("$.name: 'b' does not match")
        children[-1][0].kill()
        children[-1][0].wait()
        with pytest.raises(ValueError, match="the process that checks it has ended"):
            source.extras[0].find({"name": "a"})
        assert source.extras[0].find({"name": "a"}) == ""
    assert len(children) == 3


@pytest.mark.parametrize(("pattern", "named"), [("(", " at $.pattern: "), ("a{4294967296}", ": the repetition number")])
def test_a_pattern_that_is_none(children, pattern, named):
    with pytest.raises(UsageError) as caught:
        Schema({"pattern": pattern}, "s.json")
    assert str(caught.value).startswith(f"s.json is not a JSON schema{named}") and "\n" not in str(caught.value)


def test_a_schema_that_takes_too_long_is_refused(children, monkeypatch):
    monkeypatch.setattr(schema_file.Checker, "START", 0.01)
    with pytest.raises(UsageError, match=r"checking it takes more than 0\.01 s"):
        Schema(NAMED, "s.json")


def test_a_schema_file_without_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr(schema_file, "LONGEST", 1 << 20)
    (tmp_path / "s.json").write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(UsageError, match=r"s\.json is larger than 1 MiB"):
        Schema.read(str(tmp_path / "s.json"))
