"""Inputs that are no plain file of prompts: gzipped ones, standard input, and those that cannot be used as they are,
with what they hold and the template or the command that helps.

Nothing here is loaded before such an input is met.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import gzip
import io
import itertools
import os
import pathlib
import re
import shlex
import sys
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from . import core

# ---- Rows of published data sets -------------------------------------------------------------------------------

# The columns of a data set, and the template (-t) that asks all that it asks. The first that fits is named, so that
# the one with more columns stands before the others. The names are those on https://huggingface.co/datasets
FORMS: tuple[tuple[str, str], ...] = (
    ("article question options", "{article} {question} {options}"),  # ehovy/race
    ("passage question options", "{passage} {question} {options}"),
    ("context question choices", "{context} {question} {choices}"),
    ("input question", "{input} {question}"),
    ("input query", "{input} {query}"),
    ("input problem", "{input} {problem}"),
    ("system_prompt question", "{system_prompt} {question}"),  # Open-Orca/OpenOrca
    ("instruction input", "{instruction} {input}"),  # tatsu-lab/alpaca
    ("instruction context", "{instruction} {context}"),  # databricks/databricks-dolly-15k
    ("instruction question", "{instruction} {question}"),
    ("instructions input", "{instructions} {input}"),
    ("context question", "{context} {question}"),  # rajpurkar/squad
    ("passage question", "{passage} {question}"),  # google/boolq
    ("document question", "{document} {question}"),
    ("story question", "{story} {question}"),
    ("question opa opb opc opd", "{question} A) {opa} B) {opb} C) {opc} D) {opd}"),  # openlifescienceai/medmcqa
    ("question a b c d", "{question} A) {a} B) {b} C) {c} D) {d}"),  # mmlu as a table, ceval
    ("question option_a option_b option_c option_d",
     "{question} A) {option_a} B) {option_b} C) {option_c} D) {option_d}"),
    ("question_stem choices", "{question_stem} {choices}"),  # allenai/openbookqa
    ("question choices", "{question} {choices}"),  # cais/mmlu, allenai/ai2_arc
    ("question options", "{question} {options}"),  # TIGER-Lab/MMLU-Pro
    ("query passages", "{query} {passages}"),  # microsoft/ms_marco
    ("query document", "{query} {document}"),
    ("query context", "{query} {context}"),
    ("premise hypothesis", "{premise} {hypothesis}"),  # stanfordnlp/snli
    ("sentence1 sentence2", "{sentence1} {sentence2}"),  # nyu-mll/glue
    ("question1 question2", "{question1} {question2}"),
    ("sentence option1 option2", "{sentence} 1) {option1} 2) {option2}"),  # allenai/winogrande
    ("goal sol1 sol2", "{goal} 1) {sol1} 2) {sol2}"),  # ybisk/piqa
    ("ctx endings", "{ctx} {endings}"),  # Rowan/hellaswag
    ("system user", "{system} {user}"),
    ("title body", "{title} {body}"),
    ("title text", "{title} {text}"),  # BeIR
    ("title content", "{title} {content}"),
    ("instruction", "{instruction}"),
    ("instructions", "{instructions}"),
    ("question", "{question}"),  # openai/gsm8k
    ("query", "{query}"),
    ("problem", "{problem}"),  # hendrycks/competition_math
    ("inputs", "{inputs}"),  # CohereForAI/aya_dataset, FLAN
    ("inputs_pretokenized", "{inputs_pretokenized}"),  # bigscience/P3
    ("input_text", "{input_text}"),
    ("user_input", "{user_input}"),
    ("user", "{user}"),
    ("human", "{human}"),
    ("goal", "{goal}"),  # AdvBench
    ("act prompt", "{prompt}"),
    ("task", "{task}"),
    ("dialogue", "{dialogue}"),  # knkarthick/samsum
    ("article", "{article}"),  # abisee/cnn_dailymail
    ("document", "{document}"),  # EdinburghNLP/xsum
    ("passage", "{passage}"),
    ("context", "{context}"),
    ("abstract", "{abstract}"),
    ("review", "{review}"),
    ("sentence", "{sentence}"),
    ("source", "{source}"),
    ("text", "{text}"),  # google-research-datasets/mbpp, stanfordnlp/imdb
    ("content", "{content}"),
    ("message", "{message}"),
    ("body", "{body}"),
    ("utterance", "{utterance}"),
    ("request", "{request}"),
    ("turns", "{turns}"),
    ("prompt", "{prompt}"),  # in other letters
)  # fmt: skip
SYSTEM = ["system", "system_prompt", "system_message", "developer", "preprompt", "preamble"]
SYSTEM += ["systemInstruction", "system_instruction"]  # Gemini's, which hold parts
HISTORY = ["history", "chat_history", "conversation_history"]
ANSWERS_OFF = 'if .messages[-1].role == "assistant" then .messages |= .[:-1] else . end'  # what the set answers itself
# Columns that hold a whole request of another API, or a row of another tool: Anthropic's batches, Gemini's, Bedrock's,
# LangSmith's, promptfoo's
NESTED = ("params", "request", "modelInput", "inputs", "input", "vars", "row")
PAIRS = (
    ("human", "assistant"), ("user", "assistant"), ("question", "answer"), ("prompt", "response"), ("q", "a"),
    ("input", "output"), ("instruction", "response"), ("instruction", "output"), ("query", "response"),
)  # fmt: skip
# Keys of an object that is a whole data set, with a list of its rows: SQuAD's, the datasets server's, splits, ...
LISTS = (
    "data", "rows", "prompts", "questions", "items", "examples", "samples", "instances", "records", "entries",
    "requests", "train", "test", "validation",
)  # fmt: skip
DIALOGUES = ("data", "dialog", "dialogue", "conversation", "conversations", "utterances")  # of texts in turn
NAME = re.compile(r"\w+")
ROLES = '{human:"user",gpt:"assistant",chatgpt:"assistant",bot:"assistant",model:"assistant"}'


def advice(prompt: core.Prompt) -> str:
    """Return what makes prompts of rows like this one, '' if nothing is known of them."""
    columns = ({prompt.kind: prompt.content} if prompt.kind else {}) | prompt.columns
    file = file_of(prompt.where.rpartition(" line ")[0] or "FILE")
    if inner := next((name for name in NESTED if isinstance(columns.get(name), dict) and columns[name]), ""):
        return f"jq -c '. + .{inner} | del(.{inner})' {file} > prompts.jsonl makes columns of what is in {inner}"
    ways = conversations(columns), with_system(columns), with_history(columns), translations(columns)
    found = next(itertools.chain(*ways), "")
    if found:
        return f"jq -c '{found} | {ANSWERS_OFF}' {file} > prompts.jsonl makes messages of it"
    lower = {name.lower(): name for name in reversed(columns)}
    media = [name for name in columns if name.lower() in MEDIA]
    if prompt.kind and media:
        program = f"del({', '.join(f'.[{core.encode_json(name)}]' for name in media)})"
        return f"put them into messages (image_url), or leave them out: jq -c '{program}' {file} > prompts.jsonl"
    if prompt.kind == "prompt":
        first = [name for name in columns if name.lower() in (*SYSTEM, "instruction", "instructions", "context")]
        parts = " ".join(f"{{{name}}}" for name in (*first, "prompt", *({"input"} & columns.keys())))
        both = f"-t '{parts}' sends both, " if parts != "{prompt}" else ""
        return f"{both}-t '{{prompt}}' that alone"
    for names, template in FORMS:
        if lower.keys() >= set(names.split()):
            text = re.sub(r"\{(\w+)\}", lambda match: f"{{{lower[match[1]]}}}", template)
            beside = lower.keys() - set(names.split())
            before = [lower[one.lower()] for one in (*SYSTEM, *HISTORY) if one.lower() in beside]
            before = [one for one in before if columns[one]]
            text = " ".join([*(f"{{{name}}}" for name in before), text])  # never half a prompt
            return f"make one of {named(columns)}, such as -t '{text}'"
    if type(prompt.row) is not dict and (header := without_header(list(columns))):
        new = f"new{pathlib.PurePath(prompt.where.rpartition(' line ')[0]).suffix}"
        return f"its first line looks like a prompt; put a header before it: (echo {header}; cat {file}) > {new}"
    return listed(columns, file)


def listed(columns: Mapping[str, Any], file: str) -> str:
    """Return the command for an object that holds all rows in a list, '' if it is none or holds more than that."""
    known = {*LISTS, "features"}
    if any(isinstance(value, list | dict) and name not in known for name, value in columns.items()):
        return ""
    for name in LISTS:
        value = columns.get(name)
        if isinstance(value, list) and value and isinstance(value[0], dict | str):
            inner = ".row" if isinstance(value[0], dict) and isinstance(value[0].get("row"), dict) else ""
            return f"jq -c '.{name}[]{inner}' {file} > prompts.jsonl makes a line of each row in {name}"
    return ""


def without_header(names: list[str]) -> str:
    """Return a header for a table whose first line is none, '' if it looks like one: its names are names."""
    if not any("?" in name or len(name.split()) > 5 or name.isdigit() for name in names):
        return ""
    longest = max(names, key=len)
    return ",".join("prompt" if name == longest else f"column{place}" for place, name in enumerate(names, 1))


MEDIA = ("images", "image", "image_url", "videos", "video", "audios")


def named(columns: Mapping[str, Any]) -> str:
    """Return the columns' names for a message: {a}, {b}."""
    return ", ".join(f"{{{core.short(str(name), 30)}}}" for name in itertools.islice(columns, 8))


def conversations(columns: Mapping[str, Any]) -> Iterator[str]:
    """Yield the jq program for a column that holds a dialogue: ShareGPT's from and value, Gemini's parts, roles."""
    for name, value in columns.items():
        turns = value if isinstance(value, list) else []
        if not turns or not NAME.fullmatch(name):
            continue
        if name.lower() in DIALOGUES and all(isinstance(turn, str) for turn in turns):
            role = 'if .key % 2 == 0 then "user" else "assistant" end'
            yield f".messages = [.{name} | to_entries[] | {{role: ({role}), content: .value}}] | del(.{name})"
        if not all(isinstance(turn, dict) for turn in turns):
            continue
        keys = set().union(*turns)
        if {"from", "value"} <= keys:
            message = f"{{role: (.from as $from | {ROLES}[$from] // $from), content: .value}}"
        elif "parts" in keys:
            role = f'(.role // "user") as $from | {ROLES}[$from] // $from'
            message = f"{{role: ({role}), content: [.parts[].text] | add}}"
        elif pair := next((pair for pair in PAIRS if {*pair} <= keys), None):
            message = f'({{role: "user", content: .{pair[0]}}}, {{role: "assistant", content: .{pair[1]}}})'
        elif {"role", "value"} <= keys or {"role", "text"} <= keys:
            message = f"{{role: ({ROLES}[.role] // .role), content: (.value // .text)}}"
        elif {"speaker", "text"} <= keys:
            message = f"{{role: (.speaker as $from | {ROLES}[$from] // $from), content: .text}}"
        elif {"role", "content"} <= keys and name not in core.CONTENT_KEYS:
            message = "{role, content}"
        else:
            continue
        rest = "" if name == "messages" else f" | del(.{name})"
        yield f".messages = [.{name}[] | {message}]{rest}"


def with_system(columns: Mapping[str, Any]) -> Iterator[str]:
    """Yield the jq program for a system text that stands beside messages."""
    for name in SYSTEM:
        if isinstance(columns.get("messages"), list) and columns.get(name):
            content = f"([.{name}.parts[].text] | add)" if isinstance(columns[name], dict) else f".{name}"
            yield f'.messages = [{{role: "system", content: {content}}}] + .messages | del(.{name})'


def with_history(columns: Mapping[str, Any]) -> Iterator[str]:
    """Yield the jq program for turns that stand before the last one, as pairs (ChatGLM, LLaMA-Factory)."""
    history = columns.get("history")
    pairs = isinstance(history, list) and history and all(isinstance(one, list) and len(one) == 2 for one in history)
    last = next((name for name in ("prompt", "query", "question", "instruction") if columns.get(name)), "")
    if pairs and last:
        said = '{role: "user", content: .[0]}, {role: "assistant", content: .[1]}'
        content = '([.instruction, .input // ""] | join("\\n"))' if last == "instruction" else f".{last}"
        system = next((f'[{{role: "system", content: .{name}}}] + ' for name in SYSTEM if columns.get(name)), "")
        gone = ", ".join(f".{name}" for name in ("history", last, "input", *SYSTEM) if name in columns)
        yield f'.messages = ({system}[.history[] | {said}] + [{{role: "user", content: {content}}}]) | del({gone})'


def translations(columns: Mapping[str, Any]) -> Iterator[str]:
    """Yield the jq program for a text in several languages: {"translation": {"de": ..., "en": ...}} (wmt/wmt14)."""
    value = columns.get("translation")
    if isinstance(value, dict) and value and re.fullmatch(r"\w+", first := str(next(iter(value)))):
        yield f'.messages = [{{role: "user", content: .translation.{first}}}] | del(.translation)'


# ---- Files -----------------------------------------------------------------------------------------------------

# How a file begins that is no text, what it is, and what makes one of it:
# https://en.wikipedia.org/wiki/List_of_file_signatures
SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (b"\xff\xfe\0\0", "UTF-32", "iconv -f utf-32 -t utf-8 {name} > {new}"),
    (b"\0\0\xfe\xff", "UTF-32", "iconv -f utf-32 -t utf-8 {name} > {new}"),
    (b"\xff\xfe", "UTF-16", "iconv -f utf-16 -t utf-8 {name} > {new}"),
    (b"\xfe\xff", "UTF-16", "iconv -f utf-16 -t utf-8 {name} > {new}"),
    (b"PK\x03\x04", "a spreadsheet or a zip archive", "save it as CSV UTF-8, or unzip -p {name} > {new}"),
    (b"\xd0\xcf\x11\xe0", "an old spreadsheet", "save the sheet as CSV UTF-8"),
    (b"PAR1", "Parquet", "duckdb -c \"copy (from {name}) to 'prompts.jsonl'\""),
    (b"ARROW1", "Arrow", "duckdb -c \"copy (from {name}) to 'prompts.jsonl'\""),
    (b"SQLite format 3\0", "an SQLite database", "sqlite3 -csv -header {name} 'select * from TABLE' > prompts.csv"),
    (b"\x28\xb5\x2f\xfd", "zstd", "zstd -dc {name} > {new}"),
    (b"BZh", "bzip2", "bzip2 -dc {name} > {new}"),
    (b"\xfd7zXZ\0", "xz", "xz -dc {name} > {new}"),
    (b"\x04\x22\x4d\x18", "lz4", "lz4 -dc {name} > {new}"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "7z x -so {name} > {new}"),
    (b"%PDF", "PDF", "pdftotext {name} {new}"),
    (b"\x1f\x8b\x08", "gzip within gzip", "gzip -dc {name} > {new}"),
    (b"\x1f\x9d", "compress", "gzip -dc {name} > {new}"),
    (b"{\\rtf", "rich text", "save it as plain text, or textutil -convert txt {name}"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file", "git lfs pull"),
)  # fmt: skip


def file_of(name: str) -> str:
    """Return a file's name as a shell takes it; - for standard input."""
    return "-" if name == "standard input" else shlex.quote(name)


def unreadable(name: str, start: bytes) -> str:
    """Return why a file that begins so cannot be read, and the command that helps; '' if it can be."""
    file, packed = file_of(name), name.lower().endswith(".gz")
    file, source = ("-", f"gzip -dc {file} | ") if packed else (file, "")
    new = f"new{pathlib.PurePath(name.removesuffix('.gz')).suffix or '.txt'}"
    for signature, what, command in SIGNATURES:
        if start.startswith(signature):
            return f"{name} is {what}: {source if '{name}' in command else ''}{command.format(name=file, new=new)}"
    if start[:15].lower().startswith((b"<!doctype html", b"<html")) and b"<head" in start.lower():
        return f"{name} is a web page: fetch the file itself (was a login in the way?)"
    if start[257:262] == b"ustar":
        return f"{name} is a tar archive: tar -xOf {file_of(name)} > new.txt"
    if suffix_of(name) in (".jsonl", ".ndjson", ".json") and is_talk(core.parse_json(start.partition(b"\n")[0])):
        return f"{name} has conversations as its lines: {source}jq -c '{{messages: .}}' {file} > prompts.jsonl"
    half = len(start) // 2
    for encoding, first in (("utf-16le", 1), ("utf-16be", 0)):  # of ASCII every second byte is none
        if half and start[first::2].count(0) * 2 > half and not start[1 - first :: 2].count(0) * 2 > half:
            return f"{name} is UTF-16 without a mark: {source}iconv -f {encoding} -t utf-8 {file} > {new}"
    if is_binary(start):
        return f"{name} holds binary data or UTF-16; PROMPTS is a text, JSON Lines or CSV file in UTF-8"
    if b"\r" in start.rstrip(b"\r") and b"\n" not in start:
        return f"{name} ends its lines with carriage returns alone; pass it through tr '\\r' '\\n'"
    return ""


# Keys of an object by which a line asks something: those of a prompt, and of the usual data sets
ASKING = {*core.CONTENT_KEYS, "custom_id", "instruction", "conversations", "question"}
LOOKED_AT = 5  # lines


def json_in_text(where: str) -> str:
    """Return why a line of a .txt file is no prompt, and what helps; '' unless the file's first lines are all JSON."""
    name = where.rpartition(" line ")[0]
    try:
        told = suffix_of(name) == ".txt" and os.stat(name)
        if not told or not holds_json(name, told.st_mtime_ns, told.st_size):
            return ""
    except (OSError, core.UsageError):  # it is called otherwise, or was taken away
        return ""
    new = re.sub(r"\.txt(?=(\.gz)?$)", ".jsonl", name, flags=re.IGNORECASE)
    command = f"cp {file_of(name)} {file_of(new)}"
    return f"the .txt file holds JSON Lines; name it so ({command}), or send its lines as they are: -t '{{prompt}}'"


@functools.lru_cache(16)
def holds_json(name: str, time: int, size: int) -> bool:
    """Tell whether the first lines of the file of that date and size are objects that ask something."""
    found: list[Any] = []
    with core.sibling("extras", "reading").open_input(name) as (file, *_):
        lines = (line for line in iter(lambda: file.readline(1 << 20), b"") if line.strip())
        with contextlib.suppress(OSError, EOFError, zlib.error):  # the file is damaged: the lines above tell it, too
            found.extend(map(core.parse_json, itertools.islice(lines, LOOKED_AT)))
    return bool(found) and all(isinstance(one, dict) and ASKING & one.keys() for one in found)


def suffix_of(name: str) -> str:
    """Return the suffix that says what a file holds, packed or not."""
    return pathlib.PurePath(name.lower().removesuffix(".gz")).suffix


def is_talk(value: Any) -> bool:
    """Tell whether a line is a list of messages."""
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) and "role" in one for one in value)


def is_binary(start: bytes) -> bool:
    """Whether this is no text: it has NULs in plenty, as UTF-16 has, or NULs and what is not UTF-8."""
    try:
        codecs.utf_8_decode(start)  # a character may be cut off at the end
    except UnicodeDecodeError:
        return b"\0" in start
    return start.count(0) * 8 > len(start)


# ---- Other sources than a plain file ---------------------------------------------------------------------------


class Unpacked(io.BufferedReader):
    """What a gzip file holds; it gives what it has unpacked before it raises what is wrong with the rest."""

    def __init__(self, file: Any) -> None:
        super().__init__(Unpacking(fileobj=file))

    def peek(self, size: int = 0, /) -> bytes:
        """Return the first bytes, and stay there. Raises what reading raises where there is not even one."""
        start = self.read1(size)  # no more than its first member
        with contextlib.suppress(OSError, EOFError, zlib.error):  # damage further on costs only what comes after it
            while len(start) < size and (more := self.read1(size - len(start))):
                start += more
        self.seek(0)
        return start


class Unpacking(gzip.GzipFile):
    """A gzip file that loses nothing in the step in which it meets the damage."""

    def readinto(self, buffer: Any) -> int:
        """Called by a BufferedReader."""
        return self.readinto1(memoryview(buffer)[:1024])


@contextlib.contextmanager
def spooled() -> Iterator[str]:
    """Copy standard input into a file and yield its path: waiting for a writer must not hold up calls in flight."""
    if sys.stdin is None:
        raise core.UsageError("standard input is closed; name a file of prompts")
    if sys.stdin.buffer.isatty():
        print("type prompts, one a line; end with Ctrl-D (Windows: Ctrl-Z, Enter)", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "prompts")
        with open(path, "wb") as file:
            while block := sys.stdin.buffer.read1(1 << 16):  # type: ignore[union-attr]
                file.write(block)
        yield path
