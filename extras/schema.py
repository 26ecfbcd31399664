"""--schema FILE: a JSON schema that each answer has to fit; one that does not is requested again once, with the fault.

Answers are checked by jsonschema (pip install jsonschema), else only for being JSON. The request names the schema in
its endpoint's own form, `strict` if OpenAI's strict mode can take it. A failed one keeps its text in the results.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import contextlib
import importlib
import importlib.util
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

from . import core

core.sibling("backends", "hints").HINTS["schema_mismatch"] = (
    "see their text; change the prompt or the schema, raise max_completion_tokens (-p), or retry"
)


def add_arguments(option: Callable[..., Any]) -> None:
    """Add the flag."""
    option("--schema", metavar="FILE", help="JSON schema that each answer has to fit")


def create(args: argparse.Namespace) -> Schema | None:
    """Return what checks the answers."""
    if args.schema is None:
        return None
    schema = Schema.read(args.schema)
    schema.check_options(args.endpoint, args.params)
    args.taken[os.path.realpath(args.schema)], args.form = "the schema", schema.asked
    return schema


def restore(state: dict[str, Any]) -> Schema:
    """Return the schema of that state, in another process."""
    return Schema(state)


class SchemaMismatch(core.PromptError):
    """An answer that does not fit the schema; `again` is the request that tells the model so, if that may help."""

    def __init__(self, problem: str, reply: core.Reply, again: bytes = b"") -> None:
        super().__init__("schema_mismatch", core.short(problem), "retry", 200, reply.http)
        self.verdict, self.keep, self.again = "retry" if again else "fail", reply, again


STRICT_KEYWORDS = re.compile(  # of OpenAI's strict mode, https://platform.openai.com/docs/guides/structured-outputs
    r"\$(defs|ref|schema)|additionalProperties|anyOf|const|definitions|description|enum|(exclusiveM|m)(ax|in)imum|format|"
    r"items|(max|min)Items|multipleOf|pattern|properties|required|title|type"
)
STRICT_FORMATS = re.compile("date-time|time|date|duration|email|hostname|ipv4|ipv6|uuid")
STRICT_SIZE, STRICT_LEVELS = 120_000, 10  # characters; objects in one another
CALLS = {"tool_calls", "function_call", "tool_use"}
WHOLE = core.sibling("backends", "meanings").WHOLE - CALLS  # finish reasons: a call is no answer
# Parameters of other servers for the form of answers: llama.cpp's, vLLM's, SGLang's, Ollama's
OWN_FORMS = {"response_format", "json_schema", "grammar", "guided_json", "guided_regex", "guided_choice", "format"}
OWN_FORMS |= {"guided_grammar", "structured_outputs", "regex", "ebnf"}
LONGEST = 16 << 20  # bytes of a schema; characters of an answer
# A schema, as encode_json writes it, with keywords that may take longer than in proportion to the answer.
MAY_TAKE_LONG = re.compile(
    r'"(\$ref":.*"\$ref|\$(dynamic|recursive)Ref|pattern|patternProperties|unevaluated(Items|Properties)|uniqueItems)":',
    re.DOTALL,
)
CHECKER = """import importlib, itertools, json, re, sys
from collections.abc import Callable
from typing import Any
class core:
    encode_json = staticmethod(json.JSONEncoder(separators=(",", ":")).encode)"""
CORRECTION = "This does not fit the JSON schema: {}. Answer once more, with nothing but JSON that fits it."


class Schema:
    """A JSON schema: adds it to requests in each endpoint's form, and validates the answers.

    They are checked by jsonschema; where that is not installed, only for being JSON. Nothing is fetched for a $ref.
    A schema that may take long is used in a process of its own, while the block `checking` runs.
    """

    LARGE = 10_000  # characters: a longer answer is validated in a thread, not on the event loop

    def __init__(self, schema: Any, source: str = "the schema") -> None:
        if not isinstance(schema, dict):
            raise core.UsageError(f"{source} is not a JSON object")
        for name in ("json_schema", "schema"):
            if isinstance(schema.get(name), dict) and "type" not in schema:
                raise core.UsageError(f"{source} contains a schema under `{name}`; give that part alone")
        try:
            text = core.encode_json(schema).encode().decode()
            schema = json.loads(text)  # a copy
            installed = all(map(importlib.util.find_spec, ("jsonschema", "referencing")))
            self._checker = Checker(schema) if installed and MAY_TAKE_LONG.search(text) else None
            self.find = self._checker.find if self._checker else finder(schema)
            strict = schema.get("type") == "object" and "anyOf" not in schema and len(text) <= STRICT_SIZE
            strict = strict and is_strict(schema)
        except Exception as failure:  # jsonschema raises exceptions of many classes
            where = f" at {failure.json_path}" if hasattr(failure, "json_path") else ""
            raise core.UsageError(f"{source} is not a JSON schema{where}: {in_words(failure)}") from None
        self._told_form = False  # by the user, in the server's own way
        self.told = False  # whether it was said that answers are only checked to be JSON
        self._runs = 0
        name = re.sub("[^A-Za-z0-9_-]+", "_", str(schema.get("title", ""))).strip("_")[:64]
        self._form = {"name": name or "answer", "schema": schema, "strict": strict}

    def portable(self) -> dict[str, Any]:
        """Return the schema, from which `restore` makes an equal object in another process."""
        schema: dict[str, Any] = self._form["schema"]
        return schema

    @classmethod
    def read(cls, path: str) -> Schema:
        """Read the schema in a file. Raises UsageError if there is none."""
        data = b""
        try:
            with core.sibling("extras", "files").open_regular(path) as file:  # which no worker has
                data = file.read(LONGEST + 1)
            if len(data) > LONGEST:
                raise core.UsageError(f"{path} is larger than {LONGEST >> 20} MiB; name a file with a JSON schema")
            return cls(core.sibling("backends", "strict").decode_row(data.decode("utf-8-sig")), path)
        except OSError as failure:
            raise core.UsageError(f"cannot read {path}: {failure.strerror or failure}") from None
        except UnicodeDecodeError as failure:
            line = data.count(b"\n", 0, failure.start) + 1
            raise core.UsageError(f"{path} line {line}: not UTF-8; save it as UTF-8") from None
        except json.JSONDecodeError as failure:
            where = f"{path} line {failure.lineno} column {failure.colno}"
            raise core.UsageError(f"{where}: not JSON: {failure.msg}") from None
        except (ValueError, RecursionError) as failure:
            raise core.UsageError(f"{path}: not JSON: {failure}") from None

    def check_options(self, endpoint: str, params: Mapping[str, Any]) -> None:
        """Raise UsageError where an Api's other options leave no place for the schema."""
        if endpoint == "embeddings":
            raise core.UsageError("the endpoint embeddings takes no schema; leave out --schema")
        if not isinstance(params.get("text", {}), dict):
            raise core.UsageError("-p text is not an object; leave it out")
        self._told_form = bool(params.keys() & OWN_FORMS) or "format" in params.get("text", {})

    def asked(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Return a request's body with the schema in its endpoint's form. Raises ValueError if that is unknown.

        A form that the user gives (-p response_format=...) stays as it is: not every server takes the same.
        """
        place = path.partition("?")[0]
        if self._told_form:
            return body
        if place == "/responses":
            return body | {"text": {**(body.get("text") or {}), "format": {"type": "json_schema", **self._form}}}
        if place in ("/chat/completions", "/completions"):  # the latter is vLLM's
            return body | {"response_format": {"type": "json_schema", "json_schema": self._form}}
        raise ValueError(f"--schema is not supported for {path}")

    def wrap(self, attempt: core.Ask) -> core.Ask:
        """Validate each answer; one that does not fit is requested again once, with its fault."""

        async def checked(prompt: core.Prompt) -> core.Reply:
            reply = await attempt(prompt)
            if unfit := await self.judge(prompt, reply):
                raise unfit
            return reply

        return checked

    @contextlib.asynccontextmanager
    async def session(self, run: core.Run) -> AsyncIterator[None]:
        """Provide validation while a run goes on."""
        if not self.find and not self.told:
            self.told = True
            advice = "to check them against the schema: pip install jsonschema"
            core.log.warning("answers are checked as JSON only; %s", advice)
        with self.checking():
            yield

    @contextlib.contextmanager
    def checking(self) -> Iterator[None]:
        """Let answers be checked while the block runs; end with it the process that this takes, if it does."""
        self._runs += 1
        try:
            yield
        finally:
            self._runs -= 1
            if self._checker and not self._runs:
                self._checker.close()

    async def judge(self, prompt: core.Prompt, reply: core.Reply) -> SchemaMismatch | None:
        """Return what is wrong with an answer that does not fit, or None."""
        texts = reply.extra.get("texts") or [reply.text]
        thread = self._checker.thread if self._checker else None  # None: one of the event loop's
        try:
            large = thread or sum(map(len, texts)) > self.LARGE
            looking = asyncio.get_running_loop().run_in_executor(thread, self._look, texts) if large else None
            text, problem = await looking if looking else self._look(texts)
            if problem and (early := ended_early(reply)):
                return SchemaMismatch(f"ended by {early}: {problem}", reply)
            return SchemaMismatch(problem, reply, corrected(prompt, text, problem)) if problem else None
        except Exception as failure:  # the schema refers to itself without end, the answer is nested too deep, ...
            return SchemaMismatch(f"cannot be checked against the schema: {in_words(failure)}", reply)

    def _look(self, texts: list[str]) -> tuple[str, str]:
        """Return the first of the texts that does not fit and what is wrong with it."""
        for number, text in enumerate(texts, 1):
            if problem := self._problem(text):
                return text, f"answer {number} of {len(texts)}: {problem}" if len(texts) > 1 else problem
        return "", ""

    def _problem(self, text: str) -> str:
        if len(text) > LONGEST:
            return f"not JSON: longer than {LONGEST >> 20} MiB"
        if not text.strip() or text.lstrip().startswith("```"):
            return "not JSON: it " + ("is in ``` fences" if text.strip() else "is empty")
        try:
            value = core.sibling("backends", "strict").decode_row(text)
        except (ValueError, RecursionError) as failure:
            return f"not JSON: {failure}"
        return self.find(value) if self.find else ""


def finder(schema: dict[str, Any]) -> Callable[[Any], str] | None:
    """Return a function that finds the fault in a value; None without jsonschema. Raises for a faulty schema."""
    try:
        validators: Any = importlib.import_module("jsonschema.validators")
        best_match: Any = importlib.import_module("jsonschema.exceptions").best_match
        nothing: Any = importlib.import_module("referencing").Registry()  # the default one would fetch from the network
    except ImportError:
        return None
    kind = validators.validator_for(schema, validators.Draft202012Validator)
    kind.check_schema(schema)
    validator = kind(schema, registry=nothing)
    text = core.encode_json(schema)
    if text.count('"$id":"') < 2:  # or else a $ref may start from somewhere in between
        for ref in sorted(set(re.findall(r'"\$ref":("(?:[^"\\]|\\.)*+")', text))):
            validator.evolve(schema={"$ref": json.loads(ref)}).is_valid(None)

    def find(value: Any) -> str:
        error = best_match(itertools.islice(validator.iter_errors(value), 100))
        return f"{error.json_path}: {in_words(error)}" if error else ""

    return find


def in_words(failure: Any) -> str:
    """Return an exception's message, in which jsonschema has written out all of the value, however large."""
    message = str(getattr(failure, "message", failure)) or type(failure).__name__
    value = repr(getattr(failure, "instance", ""))
    return core.short(core.short(value, 60) + message.removeprefix(value) if message.startswith(value) else message)


def check_lines() -> None:
    """Read a path for imports and a schema, then a value a line; write the fault of each, or the exception."""
    sys.path[:], schema = json.loads(sys.stdin.readline())
    find: Any = None
    for line in itertools.chain([""], sys.stdin):
        try:
            find = find or finder(schema)
            found = [find(json.loads(line)) if line else "", None, None]
        except Exception as failure:
            found = ["", in_words(failure), getattr(failure, "json_path", None)]
        print(json.dumps(found), flush=True)


class Checker:
    """Finds the fault in a value in a process of its own, which may take SECONDS for each.

    While Python matches a regular expression no other thread of the process runs and no signal is heard, and some
    need more than a lifetime for a short text. So do `uniqueItems`, and a $ref that is followed twice each time, for an
    answer that is made for it; a thread at that could not be ended. The process has no secrets in its environment. It
    is started when it is needed, by one thread at a time, and again after it had to be killed.
    """

    SECONDS = 5.0
    START = 20.0  # seconds to import jsonschema and to load the schema
    ENVIRONMENT = "PATH", "SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME"

    def __init__(self, schema: dict[str, Any]) -> None:
        self._schema = schema
        self._process: subprocess.Popen[bytes] | None = None
        self.thread = concurrent.futures.ThreadPoolExecutor(1)
        self._start()
        self.close()

    def find(self, value: Any) -> str:
        """Return what is wrong with the value, or ''. Raises TimeoutError, or ValueError if it cannot be checked."""
        return self._ask(value, self.SECONDS, self._process or self._start())

    def _start(self) -> subprocess.Popen[bytes]:
        functions: tuple[Callable[..., Any], ...] = core.short, in_words, finder, check_lines
        parts = [CHECKER, *map(inspect.getsource, functions), "core.short = staticmethod(short)", "check_lines()"]
        code = "\n".join(parts)
        environment = {name: os.environ[name] for name in self.ENVIRONMENT if name in os.environ}
        options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        options |= {"start_new_session": True, "creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
        self._process = subprocess.Popen([sys.executable, "-P", "-c", code], env=environment, **options)
        try:
            self._ask([list(filter(os.path.isabs, sys.path)), self._schema], self.START, self._process)
        except ValueError:
            self.close()
            raise
        return self._process

    def _ask(self, value: Any, seconds: float, process: subprocess.Popen[bytes]) -> str:
        assert process.stdin and process.stdout
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(seconds, end)
        timer.start()
        line = b""
        with contextlib.suppress(OSError, ValueError):  # it is dead, or closed
            process.stdin.write(json.dumps(value).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        timer.cancel()
        if not line:
            self.close()
            if late.is_set():
                raise TimeoutError(f"checking it takes more than {seconds:g} s")
            raise ValueError("the process that checks it has ended")
        found, failure, path = json.loads(line)
        if failure is None:
            return str(found)
        problem = ValueError(failure)
        if path is not None:
            problem.json_path = path  # type: ignore[attr-defined]
        raise problem

    def close(self) -> None:
        """End the process, and with it the validation in progress."""
        process, self._process = self._process, None
        if process:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError, AttributeError):
                    pipe.close()  # type: ignore[union-attr]


def is_strict(schema: Any, levels: int = STRICT_LEVELS) -> bool:
    """Tell whether OpenAI's strict mode takes a schema: of few keywords, and with no property that may be absent."""
    if not isinstance(schema, dict) or not all(map(STRICT_KEYWORDS.fullmatch, schema)):
        return False
    if "$ref" in schema:
        return len(schema) == 1
    kind, properties = schema.get("type"), schema.get("properties", {})
    kinds = kind if isinstance(kind, list) else [kind]
    closed = schema.get("additionalProperties") is False and {*schema.get("required", ())} == {*properties}
    if ("object" in kinds and not (closed and levels)) or ("array" in kinds and "items" not in schema):
        return False
    typed = schema.keys() & {"type", "anyOf", "enum", "const"}
    if not typed or not STRICT_FORMATS.fullmatch(schema.get("format", "date")):
        return False
    below = [*properties.values(), *schema.get("anyOf", ()), *([schema["items"]] if "items" in schema else ())]
    below += [*schema.get("$defs", {}).values(), *schema.get("definitions", {}).values()]
    return all(is_strict(one, levels - ("object" in kinds)) for one in below)


def ended_early(reply: core.Reply) -> str:
    """Return what cut an answer short: a limit, a filter, a refusal, a call; else ''."""
    data = reply.http[2] if reply.http else {}
    choices, output = data.get("choices") or [], data.get("output") or []
    parts = [part for item in output if item.get("type") == "message" for part in item["content"]]
    if any(part.get("refusal") for part in [*parts, *(choice.get("message") or {} for choice in choices)]):
        return "refusal"
    reasons = [choice.get("finish_reason") for choice in choices] or [reply.finish_reason]
    reasons += [output[-1].get("type")] if output and not parts else []
    return next((str(reason) for reason in reasons if reason not in WHOLE), "")


def corrected(prompt: core.Prompt, text: str, problem: str) -> bytes:
    """Return the request with the answer and its fault appended, if the endpoint has conversations."""
    body = json.loads(prompt.body)
    key = next((key for key in ("messages", "input") if key in body), "")
    if not key or not text:
        return prompt.body
    turns = [{"role": "user", "content": body[key]}] if isinstance(body[key], str) else body[key]
    more = {"role": "assistant", "content": text}, {"role": "user", "content": CORRECTION.format(problem)}
    return core.encode_json(body | {key: [*turns, *more]}).encode("utf-8", "replace")


