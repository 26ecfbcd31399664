"""Inputs that cannot be sent as they are: refused before the first call, with what helps if it is followed."""

import gzip
import json
import pathlib
import re
import shlex
import shutil
import subprocess

import pytest

from concurrent_prompts import UsageError, main, read_prompts
from concurrent_prompts.extras.inputs import FORMS
from tests.helpers import batch_line, completion, constant, jsonl, rows

# A row of a published data set, and what a prompt made of it is to hold.
SETS = {
    "Alpaca": ({"instruction": "Translate.", "input": "Good day", "output": "Bonjour"}, ["Translate.", "Good day"]),
    "Alpaca, no input": ({"instruction": "Sing.", "input": "", "output": "La"}, ["Sing."]),
    "Dolly": ({"instruction": "Sum up.", "context": "Long.", "response": "L.", "category": "s"}, ["Sum up.", "Long."]),
    "OpenOrca": ({"id": "a", "system_prompt": "Be brief.", "question": "Why?", "response": "B"}, ["Be brief.", "Why?"]),
    "GSM8K": ({"question": "How many?", "answer": "5"}, ["How many?"]),
    "SQuAD": (
        {"id": "a", "title": "T", "context": "Text.", "question": "Who?", "answers": {"text": ["a"]}},
        ["Text.", "Who?"],
    ),
    "MMLU": (
        {"question": "Which?", "subject": "s", "choices": ["red", "blue"], "answer": 1},
        ["Which?", "red", "blue"],
    ),
    "MedMCQA": ({"question": "Which?", "opa": "w", "opb": "x", "opc": "y", "opd": "z", "cop": 1}, ["Which?", "x", "z"]),
    "SNLI": ({"premise": "It rains.", "hypothesis": "It is wet.", "label": 0}, ["It rains.", "It is wet."]),
    "PIQA": ({"goal": "Open it", "sol1": "push", "sol2": "pull", "label": 1}, ["Open it", "push", "pull"]),
    "MBPP": ({"task_id": 1, "text": "Write a loop.", "code": "for", "test_list": []}, ["Write a loop."]),
    "MS MARCO": ({"query": "what", "passages": {"passage_text": ["p"]}, "answers": []}, ["what", "passage_text"]),
    "P3": ({"inputs": "Say it.", "targets": "It."}, ["Say it."]),
    "XSum": ({"document": "Long.", "summary": "L.", "id": "1"}, ["Long."]),
    "other letters": ({"Question": "Why?", "Answer": "B"}, ["Why?"]),
    "system and prompt": ({"system": "Be brief.", "prompt": "Why?"}, ["Be brief.", "Why?"]),
    "prompt and input": ({"prompt": "Translate:", "input": "Good day"}, ["Translate: Good day"]),
    "Orca DPO": ({"system": "Be brief.", "question": "Why?", "chosen": "a", "rejected": "b"}, ["Be brief.", "Why?"]),
    "LLaMA-Factory": ({"instruction": "Sing.", "input": "La", "system": "Be loud."}, ["Be loud.", "Sing.", "La"]),
    "prompt and context": ({"prompt": "Who?", "context": "Text."}, ["Text.", "Who?"]),
    "prompt in capitals": ({"PROMPT": "Why?"}, ["Why?"]),
    "a survey": ({"question": "Why?", "What is your name?": "A", "2019": "x"}, ["Why?"]),
    "Cohere": (
        {"message": "Why?", "preamble": "Be brief.", "chat_history": [{"role": "USER", "message": "hi"}]},
        ["Why?", "Be brief.", "hi"],
    ),
    "P3, before it is split": ({"inputs_pretokenized": "Say it.", "targets_pretokenized": "It."}, ["Say it."]),
    "input and question": ({"input": "Text.", "question": "Who?"}, ["Text.", "Who?"]),
}


@pytest.fixture
def asks(backend, tmp_path, monkeypatch):
    """Return a function that runs the command on a file; it returns the exit status and the requests' messages."""
    monkeypatch.chdir(tmp_path)

    def run(name, *options):
        answer, requests = constant(completion())
        status = main([name, *backend(answer), *options])
        return status, [request["messages"] for request in requests]

    return run


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize(("row", "parts"), SETS.values(), ids=SETS)
def test_a_data_set_is_refused_with_the_template_that_asks_all_of_it(asks, capsys, row, parts, kind):
    if kind == "jsonl":
        text = jsonl(row, row)
    else:
        quoted = ['"{}"'.format(str(value).replace('"', '""')) for value in row.values()]
        text = f"{','.join(row)}\n{','.join(quoted)}\n"
    name = f"set.{kind}"
    pathlib.Path(name).write_text(text)
    status, sent = asks(name)
    said = capsys.readouterr().err
    assert (status, sent) == (2, []) and f"{name} line " in said and said.count("\n") == 1
    assert not pathlib.Path("set.results.jsonl").exists()
    template = re.search(r"(?:such as )?(-t '[^']*')", said)
    status, sent = asks(name, *shlex.split(template[1]))
    assert status == 0 and all(part in sent[0][0]["content"] for part in parts)


def test_a_template_that_leaves_columns_out_is_taken(asks):
    pathlib.Path("a.jsonl").write_text(jsonl(SETS["Alpaca"][0]))
    assert asks("a.jsonl", "-t", "{input}") == (0, [[{"role": "user", "content": "Good day"}]])


HUMAN, GPT = {"from": "human", "value": "hi"}, {"from": "gpt", "value": "Hello"}
USER = [{"role": "user", "content": "hi"}]
SYSTEM = [{"role": "system", "content": "Be brief."}]
ANSWER = {"role": "assistant", "content": "a"}
DIALOGUES = {
    "ShareGPT": ({"id": "x", "conversations": [HUMAN, GPT]}, USER),
    "ShareGPT, two turns": (
        {"conversations": [HUMAN, GPT, HUMAN]},
        [*USER, {"role": "assistant", "content": "Hello"}, *USER],
    ),
    "ShareGPT with a system text": (
        {"conversations": [{"from": "system", "value": "Be brief."}, HUMAN]},
        SYSTEM + USER,
    ),
    "ShareGPT in messages": ({"messages": [HUMAN, GPT]}, USER),
    "LMSYS": (
        {"conversation_id": "x", "model": "vicuna", "conversation": [*USER, {"role": "assistant", "content": "a"}]},
        USER,
    ),
    "a dialogue": ({"dialog": USER}, USER),
    "Gemini": ({"contents": [{"role": "user", "parts": [{"text": "h"}, {"text": "i"}]}]}, USER),
    "Gemini's answer": (
        {"contents": [{"role": "user", "parts": [{"text": "hi"}]}, {"role": "model", "parts": [{"text": "a"}]}]},
        USER,
    ),
    "Anthropic": ({"system": "Be brief.", "messages": USER}, SYSTEM + USER),
    "Gemini, no role": ({"contents": [{"parts": [{"text": "hi"}]}]}, USER),
    "texts in turn": ({"data": ["hi", "a"]}, USER),
    "pairs": ({"conversation": [{"human": "hi", "assistant": "a"}]}, USER),
    "history, query": ({"query": "q", "history": [["hi", "a"]]}, [*USER, ANSWER, {"role": "user", "content": "q"}]),
    "history, prompt": (
        {"prompt": "q", "response": "r", "history": [["hi", "a"]], "system": "Be brief."},
        [*SYSTEM, *USER, ANSWER, {"role": "user", "content": "q"}],
    ),
    "history, instruction": (
        {"instruction": "q", "input": "p", "history": [["hi", "a"]]},
        [*USER, ANSWER, {"role": "user", "content": "q\np"}],
    ),
    "WMT": ({"translation": {"de": "hi", "en": "hello"}}, USER),
}


@pytest.mark.parametrize(("row", "messages"), DIALOGUES.values(), ids=DIALOGUES)
def test_a_dialogue_is_refused_with_the_command_that_makes_messages_of_it(asks, capsys, row, messages):
    pathlib.Path("a set.jsonl").write_text(jsonl(row))
    status, sent = asks("a set.jsonl")
    said = capsys.readouterr().err
    assert (status, sent) == (2, [])
    command = re.search(r"jq -c .* > prompts\.jsonl", said)[0]
    if not shutil.which("jq"):
        pytest.skip("jq is not installed")
    subprocess.run(command, shell=True, check=True)
    status, sent = asks("prompts.jsonl", "-m", "m")
    assert (status, sent) == (0, [messages])


NESTED = {
    "Anthropic's batches": {"custom_id": "a", "params": {"model": "m", "max_tokens": 5, "messages": USER}},
    "Bedrock's": {"recordId": "a", "modelInput": {"messages": USER}},
    "Gemini's": {"key": "a", "request": {"contents": [{"role": "user", "parts": [{"text": "hi"}]}]}},
    "LangSmith's": {"inputs": {"prompt": "hi"}, "outputs": {}},
}


def followed(asks, capsys, *options):
    """Run on p.jsonl, and follow what is said of it to the letter until it is taken; return what was sent."""
    for _ in range(4):
        status, sent = asks("p.jsonl", *options, "--overwrite")
        if status == 0:
            return sent
        command = re.search(r"jq -c .*? > prompts\.jsonl|jq -c 'del.*?'", capsys.readouterr().err)[0]
        if not shutil.which("jq"):
            pytest.skip("jq is not installed")
        command += "" if ">" in command else " p.jsonl > prompts.jsonl"
        subprocess.run(f"{command} && mv prompts.jsonl p.jsonl", shell=True, check=True)
    raise AssertionError(command)


@pytest.mark.parametrize("row", NESTED.values(), ids=NESTED)
def test_a_row_within_a_row_is_taken_out_of_it(asks, capsys, row):
    pathlib.Path("p.jsonl").write_text(jsonl(row))
    assert followed(asks, capsys, "-m", "m") == [USER]


GEMINI = {"contents": [{"role": "user", "parts": [{"text": "hi"}]}]}
WHOLE_SETS = {
    # what stands in a file: the messages that are sent once all is followed that is said
    "prompts": (jsonl({"prompts": ["hi", "ho"]}), [USER, [{"role": "user", "content": "ho"}]]),
    "rows": (jsonl({"version": "1.1", "data": [{"prompt": "hi"}, {"prompt": "hi"}]}), [USER, USER]),
    "the datasets server's": (jsonl({"features": [], "rows": [{"row_idx": 0, "row": {"prompt": "hi"}}]}), [USER]),
    "splits": (jsonl({"train": [{"prompt": "hi"}], "test": [{"prompt": "ho"}]}), [USER]),
    "conversations as lines": (jsonl(USER, SYSTEM + USER), [USER, SYSTEM + USER]),
    "OpenAI's preferences": (
        jsonl({"input": {"messages": USER, "tools": [{"type": "function"}]}, "preferred_output": [ANSWER]}), [USER],
    ),
    "Gemini's system text": (
        jsonl(GEMINI | {"systemInstruction": {"parts": [{"text": "Be brief."}]}}), [SYSTEM + USER],
    ),
    "pairs of input and output": (jsonl({"conversation": [{"input": "hi", "output": "a"}], "source": "x"}), [USER]),
}  # fmt: skip


@pytest.mark.parametrize(("text", "messages"), WHOLE_SETS.values(), ids=WHOLE_SETS)
def test_what_is_said_of_a_set_leads_to_all_of_it(asks, capsys, text, messages):
    pathlib.Path("p.jsonl").write_text(text)
    assert followed(asks, capsys, "-m", "m") == messages


@pytest.mark.parametrize("head", ["What is one?", "1,What is the second one of them", "1,Why"])
def test_a_table_without_a_header_is_told_so_with_what_helps(asks, capsys, head):
    pathlib.Path("p.csv").write_text(f"{head}\n{head.replace('one', 'two')}\n")
    assert asks("p.csv") == (2, [])
    command = re.search(r"\(echo .*", capsys.readouterr().err)[0]
    subprocess.run(command, shell=True, check=True)
    assert asks("new.csv")[1][0][0]["content"] == head.rpartition(",")[2]


@pytest.mark.parametrize("kind", ["prompt", "messages"])
@pytest.mark.parametrize("name", ["images", "image_url"])
def test_pictures_beside_a_prompt_are_not_lost(asks, capsys, kind, name):
    pathlib.Path("p.jsonl").write_text(jsonl({kind: "hi" if kind == "prompt" else USER, name: ["a.jpg"]}))
    assert asks("p.jsonl") == (2, [])
    command = re.search(r"jq -c .* > prompts\.jsonl", capsys.readouterr().err)[0]
    if shutil.which("jq"):
        subprocess.run(command, shell=True, check=True)
        assert asks("prompts.jsonl") == (0, [USER])


JSON_LINES = {
    "prompts": jsonl({"prompt": "one"}, {"prompt": "two"}),
    "messages": "\n" + jsonl({"messages": USER, "id": 1}) * 9,
    "Batch requests": jsonl(batch_line("a", "hi")),
    "a data set": jsonl(SETS["Alpaca"][0], SETS["Alpaca"][0]),
}


@pytest.mark.parametrize("text", JSON_LINES.values(), ids=JSON_LINES)
@pytest.mark.parametrize("packed", ["", ".gz"])
def test_json_lines_in_a_text_file_are_refused_with_what_helps(asks, capsys, text, packed):
    pathlib.Path(f"a set.TXT{packed}").write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    for more in ([], ["--dry-run"], ["--shard", "1/1"]):
        assert asks(f"a set.TXT{packed}", *more) == (2, [])
        said = capsys.readouterr().err
    assert not list(pathlib.Path().glob("*results*"))
    assert asks(f"a set.TXT{packed}", *shlex.split(re.search(r"-t '[^']*'", said)[0]))[1][0][0]["content"][0] == "{"
    subprocess.run(re.search(r"\((cp .*)\),", said)[1], shell=True, check=True)
    assert isinstance(next(read_prompts(f"a set.jsonl{packed}")).row, dict)


@pytest.mark.parametrize(
    "text",
    ["{name}, what is it?\n", '{"a": 1}\n{"b": 2}\n', "{\n", '{"prompt": "x"}\nWhat is this?\n', '["prompt"]\n'],
)
def test_a_text_that_begins_with_a_brace_is_sent_as_it_is(asks, text):
    pathlib.Path("p.txt").write_text(text)
    assert asks("p.txt") == (0, [[{"role": "user", "content": line}] for line in text.splitlines()])


def test_the_table_of_forms_is_in_order():
    """What has fewer columns never hides what has more."""
    names = [set(columns.split()) for columns, _ in FORMS]
    assert not [(one, other) for place, one in enumerate(names) for other in names[place + 1 :] if one <= other]
    assert all(set(re.findall(r"\{(\w+)\}", template)) <= set(columns.split()) for columns, template in FORMS)


def test_unknown_columns_are_named(asks, capsys):
    pathlib.Path("a.jsonl").write_text(jsonl({"foo": 1, "bar": 2}))
    assert asks("a.jsonl") == (2, [])
    assert "a.jsonl line 1: no column is called prompt, messages or input; make one from {foo}, {bar} (-t)" in (
        capsys.readouterr().err
    )


def test_half_a_prompt_further_down_fails_alone(asks):
    pathlib.Path("a.jsonl").write_text(
        jsonl({"prompt": "one"}, {"prompt": "two", "system": "x"}, {"prompt": "3", "system": ""})
    )
    status, sent = asks("a.jsonl")
    assert status == 1 and [messages[0]["content"] for messages in sent] == ["one", "3"]
    assert [bool(row["error"]) for row in rows("a.results.jsonl")] == [False, True, False]


def test_without_the_file_the_error_is_plain(asks, capsys, monkeypatch):
    import concurrent_prompts

    sibling = concurrent_prompts.sibling

    def missing(folder, name, asked=""):
        if name == "inputs":
            raise UsageError("extras/inputs.py is missing")
        return sibling(folder, name, asked)

    monkeypatch.setattr(concurrent_prompts, "sibling", missing)
    pathlib.Path("a.jsonl").write_text(jsonl(SETS["Alpaca"][0]))
    assert asks("a.jsonl") == (2, [])
    plain = "sending `input` alone would lose {instruction}; make a prompt from {input}, {instruction}"
    assert plain in capsys.readouterr().err
    pathlib.Path("a.txt").write_bytes("hello\n".encode("utf-16"))
    assert asks("a.txt") == (2, [])
    assert "a.txt holds binary data or UTF-16" in capsys.readouterr().err


TEXT = "prompt\nWarum?\n日本\n"
ENCODED = ["utf-16", "utf-16-le", "utf-16-be", "utf-32"]


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("encoding", ENCODED)
def test_other_encodings_are_refused_with_the_command_that_helps(asks, capsys, encoding, packed):
    if packed:
        pathlib.Path("p.txt.gz").write_bytes(gzip.compress(TEXT.encode(encoding)))
    else:
        pathlib.Path("p.txt").write_bytes(TEXT.encode(encoding))
    name = f"p.txt{'.gz' * packed}"
    assert asks(name) == (2, [])
    command = re.search(r": ((?:gzip|iconv) .*)", capsys.readouterr().err)[1]
    if shutil.which("iconv") and shutil.which("gzip"):
        subprocess.run(command, shell=True, check=True)
        assert [prompt.content for prompt in read_prompts("new.txt")] == TEXT.split()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"PK\x03\x04\x14\0\x06\0", "is a spreadsheet or a zip archive: save it as CSV UTF-8"),
        (b"PAR1\x15\x04\x15\xff\0", "is Parquet: duckdb -c"),
        (b"\x28\xb5\x2f\xfd\x04\0\xff", "is zstd: zstd -dc p.csv > new.csv"),
        (b"BZh91AY&SY\xff\0", "is bzip2: bzip2 -dc"),
        (b"\xfd7zXZ\0\0\x04", "is xz: xz -dc"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "is PDF: pdftotext"),
        (b"\x7fELF\0\0\0\0", "holds binary data"),
        (b"\x1f\x9d\x90abc\xff\n", "is compress: gzip -dc p.csv > new.csv"),
        (gzip.compress(gzip.compress(b"a\n", mtime=0), mtime=0), "is gzip within gzip: gzip -dc p.csv > new.csv"),
        (b"{\\rtf1\\ansi\\cocoartf2709\n\\f0 What?}\n", "is rich text: save it as plain text"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of Git LFS, not the file"),
        (b"<!doctype html>\n<html><head><title>Sign in</title></head></html>\n", "is a web page"),
        (b"p.txt".ljust(257, b"\0") + b"ustar\x0000".ljust(255, b"\0"), "is a tar archive: tar -xOf p.csv > new.txt"),
    ],
)
def test_what_is_no_text_is_called_by_its_name(asks, capsys, content, said):
    pathlib.Path("p.csv").write_bytes(content)
    assert asks("p.csv") == (2, [])
    assert said in capsys.readouterr().err


def test_windows_own_encoding_costs_its_lines_alone_and_is_named(asks):
    pathlib.Path("p.txt").write_bytes("one\nüber\n".encode("cp1252"))
    status, sent = asks("p.txt")
    assert status == 1 and len(sent) == 1
    assert "iconv -f cp1252 -t utf-8" in rows("p.results.jsonl")[1]["error"]["message"]
    assert json.dumps(sent)
