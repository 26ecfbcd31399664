"""What a row asks: whole requests, messages in other forms, half prompts and empty ones."""

import json
import logging
import pathlib
import re

import pytest

from concurrent_prompts import UsageError, main, read_prompts, run
from concurrent_prompts.backends.prompts import endpoint_of
from tests.helpers import NAMES, api_of, completion, constant, in_rows, jsonl, rows

HI = [{"role": "user", "content": "hi"}]
SYSTEM = {"role": "system", "content": "Be nice."}
ANSWERED = [*HI, {"role": "assistant", "content": "Hello"}]


def asked(row, **settings):
    """Return the path and the body of the request that a row makes; the type and the message of its error else."""
    sent = []

    async def answer(request):
        sent.append(request)
        return completion()

    api = api_of(answer, **settings)
    paths = []
    prepare = api.prepare
    api.prepare = lambda prompt: paths.append(prepare(prompt)) or prompt
    (result,) = run([row], api, max_attempts=1)  # a chat's answer is none of another endpoint's
    return (paths[0].path, sent[0]) if sent else result.error.message.partition(": ")[2]


REQUESTS = {
    "the cookbook's": (
        {"model": "gpt-4o-mini", "messages": HI, "temperature": 0, "max_tokens": 5, "metadata": {"row": 1}},
        "/chat/completions",
        {"model": "gpt-4o-mini", "messages": HI, "temperature": 0, "max_tokens": 5},
    ),
    "a model alone": ({"model": "a", "messages": HI}, "/chat/completions", {"model": "a", "messages": HI}),
    "no model": ({"messages": HI, "tools": [1]}, "/chat/completions", {"model": "m", "messages": HI, "tools": [1]}),
    "kept metadata": (
        {"model": "a", "messages": HI, "store": True, "metadata": {"a": "b"}},
        "/chat/completions",
        {"model": "a", "messages": HI, "store": True, "metadata": {"a": "b"}},
    ),
    "a stream": (
        {"model": "a", "messages": HI, "stream": True, "stream_options": {}, "id": 3},
        "/chat/completions",
        {"model": "a", "messages": HI},
    ),
    "vLLM's": (
        {"model": "a", "messages": HI, "top_k": 5, "chat_template_kwargs": {"enable_thinking": False}},
        "/chat/completions",
        {"model": "a", "messages": HI, "top_k": 5, "chat_template_kwargs": {"enable_thinking": False}},
    ),
    "Responses": (
        {"model": "a", "input": "hi", "instructions": "Be nice.", "reasoning": {"effort": "low"}},
        "/responses",
        {"model": "a", "input": "hi", "instructions": "Be nice.", "reasoning": {"effort": "low"}},
    ),
    "Responses, a list": ({"model": "a", "input": HI}, "/responses", {"model": "a", "input": HI}),
    "completions": (
        {"model": "a", "prompt": "hi", "max_tokens": 5, "echo": True},
        "/completions",
        {"model": "a", "prompt": "hi", "max_tokens": 5, "echo": True},
    ),
    "embeddings": (
        {"model": "text-embedding-3-small", "input": "hi"},
        "/embeddings",
        {"model": "text-embedding-3-small", "input": "hi"},
    ),
    "embeddings, a list": (
        {"model": "bge-m3", "input": ["a", "b"]},
        "/embeddings",
        {"model": "bge-m3", "input": ["a", "b"]},
    ),
    "embeddings, by a parameter": (
        {"model": "e5", "input": "hi", "dimensions": 8},
        "/embeddings",
        {"model": "e5", "input": "hi", "dimensions": 8},
    ),
    "moderations": (
        {"model": "omni-moderation-latest", "input": "hi"},
        "/moderations",
        {"model": "omni-moderation-latest", "input": "hi"},
    ),
}


@in_rows(("row", "path", "body"), REQUESTS.values(), ids=REQUESTS)
def test_a_line_that_is_a_whole_request_is_sent_as_one(row, path, body):
    model = {"model": None} if "model" in row else {}
    assert asked(row, **model) == (path, body)


def test_the_command_line_goes_before_a_requests_own():
    row = {"model": "a", "messages": HI, "temperature": 1}
    assert asked(row, model="b", params={"temperature": 0}) == (
        "/chat/completions",
        row | {"model": "b", "temperature": 0},
    )
    assert endpoint_of({"model": "e5", "input": "x"}, "embeddings") == "/embeddings"


REFUSED = {
    "a system text": ({"model": "a", "messages": HI}, {"system": "x"}, r"whole request, .*leave out -s and -t"),
    "another endpoint": ({"model": "a", "messages": HI}, {"endpoint": "responses"}, "leave out -e responses"),
    "a column": (
        {"model": "a", "messages": HI, "temperature": 0, "max_tokens": 1, "topic": "x"},
        {},
        r"no API has `topic`; remove that: jq -c 'del\(\.\[\"topic\"\]\)'",
    ),
    "a model that is not asked": ({"model": "a", "messages": HI, "topic": "x"}, {"model": None}, "names the model a,"),
    "a parameter beside a text": ({"prompt": "hi", "max_tokens": 5}, {}, r"\(-p 'max_tokens=5'\)"),
    "a temperature beside a text": ({"input": "hi", "temperature": 0.5}, {}, "would not be sent with `input`"),
    "Anthropic's": (
        {"model": "a", "max_tokens": 5, "system": "Be nice.", "messages": HI},
        {},
        "would lose {system}; jq",
    ),
}


@in_rows(("row", "settings", "reason"), REFUSED.values(), ids=REFUSED)
def test_half_a_request_is_refused(row, settings, reason):
    if "jq" in reason:
        pytest.importorskip("concurrent_prompts.extras.inputs")
    said = asked(row, **settings)
    assert isinstance(said, str) and re.search(reason, said), said


COLUMNS = [
    {"prompt": "How warm is it?", "city": "Rome", "temperature": 21},
    {"prompt": "hi", "model": "Corolla", "make": "Toyota"},
    {"prompt": "hi", "user": "bob", "n": 3, "seed": 1},
]


@in_rows("row", COLUMNS)
def test_columns_that_are_called_like_parameters_are_columns(row):
    assert asked(row) == ("/chat/completions", {"model": "m", "messages": [{"role": "user", "content": row["prompt"]}]})


def test_a_template_makes_columns_of_what_is_called_like_a_request():
    row = {"prompt": "Who makes the", "model": "Corolla"}
    assert asked(row, template="{prompt} {model}?")[1]["messages"] == [
        {"role": "user", "content": "Who makes the Corolla?"}
    ]
    assert (
        asked({"prompt": "hi", "max_tokens": 5}, template="{prompt} {max_tokens}")[1]["messages"][0]["content"]
        == "hi 5"
    )
    assert "no system text or template" in asked(row | {"max_tokens": 5, "temperature": 0}, template="{prompt}")


def test_a_table_holds_no_requests(read):
    (prompt,) = read("p.csv", "model,prompt,max_tokens\nCorolla,hi,5\n")
    answer, requests = constant(completion())
    run([prompt], api_of(answer))
    assert requests == [{"model": "m", "messages": HI}]


NOT_SENT = {
    "a table": ("p.csv", "model,prompt\na,hi\nb,ho\n", [], "the column `model` is not sent; set one for all (-m)"),
    "two": ("p.csv", "model,prompt,max_tokens\na,hi,5\n", [], "the columns `model`, `max_tokens` are not sent"),
    "a row": ("p.jsonl", '{"prompt": "hi", "model": "a", "topic": "x"}\n', [], "the column `model` is not sent"),
    "one is given": ("p.csv", "model,prompt,top_p\na,hi,1\n", ["-m", "m"], "one for all (-p top_p=...)"),
    "all are given": ("p.csv", "model,prompt,top_p\na,hi,1\n", ["-m", "m", "-p", "top_p=1"], ""),
    "the template names it": ("p.csv", "model,prompt\na,hi\n", ["-t", "{prompt} {model}"], ""),
    "other columns": ("p.csv", "make,prompt,temperature\na,hi,5\n", [], ""),
    "a whole request": ("p.jsonl", jsonl({"model": "a", "messages": HI}), [], ""),
}  # fmt: skip


@pytest.mark.parametrize(("name", "text", "flags", "said"), NOT_SENT.values(), ids=NOT_SENT)
def test_columns_that_are_not_sent_are_told_of_once(here, stand_in, caplog, name, text, flags, said):
    if name == "p.csv":
        pytest.importorskip("concurrent_prompts.extras.table")
    pathlib.Path(name).write_text(text)
    for more in (["--dry-run", "--base-url", "http://127.0.0.1:9/v1"], ["--base-url", stand_in().url]):
        caplog.clear()
        assert main([name, "-q", *flags, *more]) == 0
        told = [record.getMessage() for record in caplog.records if "not sent" in record.getMessage()]
        assert len(told) == bool(said) and said in "".join(told), told


@pytest.mark.parametrize("backend", NAMES)
def test_whole_requests_on_a_server(here, stand_in, backend):
    lines = [{"id": "x", "model": "gpt-4o-mini", "messages": HI, "max_tokens": 5}]
    lines += [{"model": "text-embedding-3-small", "input": "a"}, {"model": "gpt-4o", "input": "a"}]
    pathlib.Path("r.jsonl").write_text(jsonl(*lines))
    assert main(["r.jsonl", "-b", backend, "-q", "--base-url", stand_in().url]) == 0
    one, two, three = rows("r.results.jsonl")
    assert (one["id"], one["model"], one["input_model"], one["max_tokens"]) == ("x", "gpt-4o-mini", "gpt-4o-mini", 5)
    assert two["embedding"] and two["model"] == "text-embedding-3-small" and three["finish_reason"] == "completed"


MESSAGES = {
    "in prompt": ({"prompt": HI}, HI),
    "in input": ({"input": [SYSTEM, *HI], "ideal": "Hello"}, [SYSTEM, *HI]),
    "one alone": ({"prompt": HI[0]}, HI),
    "one alone in messages": ({"messages": HI[0]}, HI),
    "as JSON": ({"messages": json.dumps(HI)}, HI),
}


@in_rows(("row", "messages"), MESSAGES.values(), ids=MESSAGES)
def test_messages_in_another_place_are_messages(row, messages):
    assert asked(row) == ("/chat/completions", {"model": "m", "messages": messages})
    assert asked(row, system="Hm.")[1]["messages"] == [{"role": "system", "content": "Hm."}, *messages]
    assert asked(row, endpoint="responses") == ("/responses", {"model": "m", "input": messages})


EMPTY = {
    "a text": "",
    "blanks": " \t\u00a0",
    "what is not seen": "\ufeff\u200b",
    "a prompt": {"id": 7, "prompt": ""},
    "an input": {"input": " "},
    "nothing": {},
    "a message": {"messages": [{"role": "user", "content": ""}]},
    "a part": {"messages": [SYSTEM, {"role": "user", "content": [{"type": "text", "text": " "}]}]},
    "null": {"messages": [{"role": "system", "content": ""}, {"role": "user", "content": None}]},
    "all": {"messages": [{"role": "system", "content": ""}, {"role": "assistant", "content": ""}]},
    "a request": {"model": "a", "messages": [{"role": "user", "content": "\n"}]},
    "a Batch request": {
        "custom_id": "1",
        "url": "/v1/chat/completions",
        "body": {"model": "a", "messages": [{"role": "user", "content": ""}]},
    },
    "a Batch request of completions": {
        "custom_id": "1",
        "url": "/v1/completions",
        "body": {"model": "a", "prompt": ""},
    },
    "inputs": {"custom_id": "1", "url": "/v1/embeddings", "body": {"model": "a", "input": ["", " "]}},
}


@in_rows("row", EMPTY.values(), ids=EMPTY)
def test_an_empty_prompt_is_no_call(row):
    assert "empty" in asked(row)


@in_rows(
    "row",
    [
        {
            "messages": [
                *HI,
                {"role": "assistant", "content": None, "tool_calls": [{}]},
                {"role": "tool", "content": ""},
            ]
        },
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
        {"custom_id": "1", "url": "/v1/completions", "body": {"model": "a", "prompt": [15496]}},
        {"custom_id": "1", "url": "/v1/other", "body": {"model": "a"}},
    ],
)
def test_what_only_looks_empty_is_sent(row):
    assert isinstance(asked(row), tuple)


def test_a_template_of_empty_columns_asks_nothing():
    template = "Translate {prompt} into {lang}"
    assert "are empty" in asked({"prompt": "", "lang": " "}, template=template)
    assert asked({"prompt": "", "lang": "de"}, template=template)[1]["messages"][0]["content"] == "Translate  into de"
    assert "are empty" in asked({"prompt": "x"}, template="")


@pytest.mark.parametrize("kind", ["p.csv", "p.jsonl"])
def test_empty_prompts_fail_and_the_others_are_answered(here, stand_in, kind):
    server = stand_in()
    lines = [{"id": "1", "prompt": "hello", "note": "x"}, {"id": "2", "prompt": "", "note": "y"}]
    table = "id,prompt,note\n1,hello,x\n2,,y\n,,\n" + ",,\r\n" * 300 + " , ,\n,,,,\n"
    pathlib.Path(kind).write_text(table if kind == "p.csv" else jsonl(*lines))
    assert main([kind, "-q", "--base-url", server.url]) == 1
    one, two = rows("p.results.jsonl")
    where = f"{kind} line {3 if kind == 'p.csv' else 2}"
    assert one["text"] and two["error"]["message"] == f"{where}: `prompt` is empty"
    assert two["attempts"] == 0


def test_conversations_that_end_with_the_assistant_are_warned_about_once(here, stand_in, capsys):
    lines = [{"messages": ANSWERED}] * 2 + [{"messages": HI}] + [{"model": "a", "messages": ANSWERED}]
    lines += [{"messages": [*HI, {"role": "assistant", "content": "He", "prefix": True}]}]
    pathlib.Path("d.jsonl").write_text(jsonl(*lines))
    for options in ([], ["-o", "-"], ["--dry-run"], ["--overwrite", "-c", "1"]):
        assert main(["d.jsonl", "-q", *options, "--base-url", stand_in().url]) == 0
        said = capsys.readouterr().err
        assert said.count("with an assistant message") == 1 and "3 conversations end" in " ".join(said.split()), options
    pathlib.Path("d.jsonl").write_text(jsonl({"messages": HI}))
    assert main(["d.jsonl", "-q", "--overwrite", "--base-url", stand_in().url]) == 0
    assert "assistant" not in capsys.readouterr().err


CARRIAGE_RETURNS = {
    "p.txt": b"q1\rq2\rq3\r",
    "p.csv": b"id,prompt\r1,a\r2,b\r",
    "p.jsonl": b'{"prompt": "a"}\r{"prompt": "b"}\r',
}


@pytest.mark.parametrize(("name", "content"), CARRIAGE_RETURNS.items(), ids=CARRIAGE_RETURNS)
def test_carriage_returns_alone_are_refused_with_what_helps(tmp_path, read, name, content):
    pytest.importorskip("concurrent_prompts.extras.inputs")
    with pytest.raises(UsageError, match=r"carriage returns alone; pass it through tr '\\r' '\\n'"):
        read(name, content)
    assert len(read(name, content.replace(b"\r", b"\n"))) >= 2


def test_a_carriage_return_within_a_text_costs_that_line_alone(read):
    one, two, three = read("p.txt", b"a\rb\nc\r\nd\r")
    assert "carriage return" in one.error.message and (two.content, three.content) == ("c", "d")


def test_the_warning_is_logged_once_in_a_dry_run(here, caplog):
    pytest.importorskip("concurrent_prompts.extras.dry_run")
    pathlib.Path("d.jsonl").write_text(jsonl({"messages": ANSWERED}))
    with caplog.at_level(logging.WARNING):
        assert main(["d.jsonl", "--dry-run", "--base-url", "http://127.0.0.1:9/v1"]) == 0
    assert [record.getMessage() for record in caplog.records if "1 conversation ends" in record.getMessage()]
    assert len(list(read_prompts("d.jsonl"))) == 1


def test_parts_of_a_message_are_taken_as_one():
    parts = [{"type": "text", "text": "q"}, {"type": "image_url", "image_url": {"url": "data:x"}}]
    assert asked({"prompt": parts})[1]["messages"] == [{"role": "user", "content": parts}]


def test_a_batch_line_without_url_is_taken_by_its_body():
    path, body = asked({"custom_id": "a", "body": {"messages": HI}})
    assert (path, body) == ("/chat/completions", {"messages": HI, "model": "m"})


def test_the_end_of_a_dos_file_is_no_prompt():
    assert "is empty" in asked("\x1a")
