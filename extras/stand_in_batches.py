"""The stand-in server's Files and Batches endpoints, with faults of their own.

Batches do not run: what one has come to follows from the time it is, and is worked out when next somebody asks.
"""

from __future__ import annotations

import io
import json
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any
from urllib.parse import parse_qs

from .stand_in_answers import (
    ENDPOINTS,
    READY_MADE,
    SERIAL,
    Ask,
    Refusal,
    Reply,
    answer,
    canonical,
    draw,
    encode_json,
    error,
    estimate,
    invalid,
    missing,
    parse_object,
    read_body,
)
from .stand_in_http import FILE_LIMIT, Head, Service

LINE_LIMIT = 50_000  # of a batch
STORE_LIMIT = 4 * 1000 * 1000 * 1000  # bytes of all files together
COUNT_LIMIT = 10_000  # files, and batches
NAME_LIMIT = 512  # characters of a file's name, of an id, of a value of the metadata
BATCH_FAULTS = ("invalid", "errors-only", "shuffle", "strings", "lost-file", "create-lost", "poll-500", "poll-slow",
                "expire", "expire-once")
FINISHED = ("failed", "completed", "expired", "cancelled")
ORGANIZATION = "org-stand-in"
DAY = 24 * 3600
NOT_RUN = {
    "batch_expired": "This request could not be executed before the completion window expired.",
    "batch_cancelled": "This request could not be executed because the batch was cancelled.",
    "request_timeout": "The request timed out.",
}


@dataclass(eq=False)
class Batch:
    """A batch: the object that the API shows, and its internal state."""

    shown: dict[str, Any]
    lines: bytes
    key: bytes  # a hash of the lines, the seed of what is drawn for them
    created: float  # this and the next by the server's clock
    cancelled: float = 0.0
    done: float = 1.0  # the share of the lines that are run before it ends
    total: int = 0
    tokens: int = 0  # of the prompts
    used: tuple[int, int] = (0, 0)  # tokens of what was answered, in and out
    errors: list[dict[str, Any]] = field(default_factory=list)
    weight: int = 0  # bytes of the answers, at the most
    looks: int = 0


class Batches:
    """Files and the batches made from them. Nothing runs: a batch's state is computed from its age."""

    def __init__(self, server: Service, clock: Callable[[], float]) -> None:
        self._server, self._clock = server, clock
        self._epoch = time.time() - clock()
        self._files: dict[str, tuple[dict[str, Any], bytes]] = {}
        self._batches: dict[str, Batch] = {}  # the oldest first
        self._asked: set[bytes] = set()  # bodies, for expire-once

    def settle(self) -> None:
        """Update the states of all batches by the clock."""
        for batch in self._batches.values():
            if batch.shown["status"] not in FINISHED:
                self._move(batch, self._clock())

    def answer(self, head: Head, raw: bytes) -> Reply | None:
        """Answer a request, None being a reset, or raise a Refusal."""
        self.settle()
        match head.method, *head.path.split("/")[2:]:
            case "POST", "files":
                shown = self._upload(read_form(head.content_type, raw))
            case "GET", "files", name:
                shown = self._file(name)[0]
            case "GET", "files", name, "content":
                return Reply(200, "", content_type="application/octet-stream", file=self._file(name)[1])
            case "DELETE", "files", name:
                shown = {"id": self._file(name)[0]["id"], "object": "file", "deleted": True}
                del self._files[name]
            case "POST", "batches":
                batch = self._create(raw)
                if self._hit("create-lost", batch.key):
                    return None
                shown = batch.shown
            case "GET", "batches":
                shown = self._list(parse_qs(head.query))
            case "GET", "batches", name:
                batch = self._batch(name)
                batch.looks += 1
                if batch.looks % 2 and self._hit("poll-500", batch.key):
                    return READY_MADE["500"]
                shown = batch.shown
            case "POST", "batches", name, "cancel":
                shown = self._cancel(self._batch(name))
            case _:
                raise Refusal(404, f"Invalid URL ({head.method} {head.path})")
        return Reply(200, encode_json(shown))

    def _hit(self, kind: str, text: bytes) -> bool:
        """Draw whether the fault happens to what the text names."""
        options = self._server.options
        share: float = options.batch_fault.get(kind, 0.0)
        return draw(f"{kind} {options.seed} ".encode() + text) < share

    def _stamp(self, moment: float) -> int:
        return int(self._epoch + moment)

    def _upload(self, form: dict[str, tuple[str, bytes]]) -> dict[str, Any]:
        for name in ("file", "purpose"):
            if name not in form:
                raise missing(name)
        purpose, (filename, content) = form["purpose"][1].decode("utf-8", "replace"), form["file"]
        if len(content) > FILE_LIMIT:
            raise Refusal(400, "File is too large.")
        if max(len(filename), len(purpose)) > NAME_LIMIT:
            raise invalid("file", f"a name and a purpose of at most {NAME_LIMIT} characters")
        self._check_room(len(content))
        if purpose == "batch" and parse_object(content.partition(b"\n")[0]) is None:
            raise Refusal(400, "Invalid file format for Batch API. Must be .jsonl")
        self._server.stats.files += 1
        return self._keep(f"file-{next(SERIAL)}", filename, purpose, content)

    def _check_room(self, more: int) -> None:
        """Raise a Refusal if there is no room for so many bytes more, or for one file or batch more."""
        stored = sum(len(content) for _, content in self._files.values())
        if stored + more > STORE_LIMIT or max(len(self._files), len(self._batches)) >= COUNT_LIMIT:
            raise Refusal(413, "The stand-in server has no room left for files and batches; restart it.")

    def _keep(self, name: str, filename: str, purpose: str, content: bytes) -> dict[str, Any]:
        now = self._stamp(self._clock())
        shown = {"id": name, "object": "file", "bytes": len(content), "created_at": now,
                 "expires_at": now + 30 * DAY, "filename": filename, "purpose": purpose,
                 "status": "processed", "status_details": None}
        self._files[name] = shown, content
        return shown

    def _file(self, name: str) -> tuple[dict[str, Any], bytes]:
        if name not in self._files:
            raise Refusal(404, f"No such File object: {name}", param="id")
        return self._files[name]

    def _batch(self, name: str) -> Batch:
        if name not in self._batches:
            raise Refusal(404, f"No batch found with id '{name}'.")
        return self._batches[name]

    def _create(self, raw: bytes) -> Batch:
        asked = read_body(raw)
        only = {"endpoint": tuple(ENDPOINTS), "completion_window": ("24h",)}
        for name in ("input_file_id", *only):
            if not asked.get(name):
                raise missing(name)
            if asked[name] not in only.get(name, (asked[name],)):
                raise invalid(name, " or ".join(only[name]))
        metadata = asked.get("metadata")
        if metadata is not None and not (isinstance(metadata, dict)
                                         and all(isinstance(value, str) for value in metadata.values())):
            raise invalid("metadata", "an object of strings")
        texts = [str(asked["input_file_id"]), *(text for pair in (metadata or {}).items() for text in pair)]
        if len(texts) > 33 or max(map(len, texts)) > NAME_LIMIT:
            raise invalid("metadata", f"an object of at most 16 strings of at most {NAME_LIMIT} characters")
        self._check_room(0)
        batch = self._new(asked)
        self._validate(batch)
        self._batches[batch.shown["id"]] = batch
        self._server.stats.batches += 1
        return batch

    def _new(self, asked: dict[str, Any]) -> Batch:
        now = self._clock()
        shown = {"id": f"batch_{next(SERIAL)}", "object": "batch", "endpoint": asked["endpoint"], "model": None,
                 "errors": None, "input_file_id": str(asked["input_file_id"]), "completion_window": "24h",
                 "status": "validating", "output_file_id": None, "error_file_id": None,
                 "created_at": self._stamp(now), "in_progress_at": None,
                 "expires_at": self._stamp(now + DAY), "finalizing_at": None, "completed_at": None,
                 "failed_at": None, "expired_at": None, "cancelling_at": None, "cancelled_at": None,
                 "request_counts": {"total": 0, "completed": 0, "failed": 0}, "usage": batch_usage(0, 0),
                 "metadata": asked.get("metadata")}
        file = self._files.get(shown["input_file_id"])
        lines = file[1] if file and file[0]["purpose"] == "batch" else b""
        return Batch(shown, lines, blake2b(lines, digest_size=16).digest(), now)

    def _list(self, query: dict[str, list[str]]) -> dict[str, Any]:
        limit = query.get("limit", ["20"])[0]
        if not re.fullmatch("[1-9][0-9]?|100", limit):
            raise invalid("limit", "an integer from 1 to 100")
        names = list(reversed(self._batches))
        if after := query.get("after"):
            names = names[names.index(self._batch(after[0]).shown["id"]) + 1:]
        page = names[: int(limit)]
        return {"object": "list", "data": [self._batches[name].shown for name in page],
                "first_id": page[0] if page else None, "last_id": page[-1] if page else None,
                "has_more": len(names) > len(page)}

    def _cancel(self, batch: Batch) -> dict[str, Any]:
        status, now = batch.shown["status"], self._clock()
        if status in ("failed", "completed", "expired"):
            raise Refusal(409, f"Cannot cancel a batch with status '{status}'.")
        if status not in ("cancelling", "cancelled"):
            batch.cancelled, batch.done = now, self._progress(batch, now)
            batch.shown |= {"status": "cancelling", "cancelling_at": self._stamp(now)}
        return batch.shown

    def _validate(self, batch: Batch) -> None:
        """Validate a batch; errors become visible at the end of its validation time."""
        names: set[str] = set()
        for number, line in enumerate(io.BytesIO(batch.lines), 1):
            try:
                name, ask = self._read(line, batch)
                if name in names:
                    raise Refusal(400, f"The custom_id '{name}' for this request is a duplicate of another request. "
                                  "The custom_id parameter must be unique for each request in a batch.",
                                  param="custom_id", code="duplicate_custom_id")
                names.add(name)
                batch.tokens += ask.prompt_tokens
                batch.weight += ask.weight
                batch.total += 1
            except Refusal as refusal:
                batch.errors.append(problem(refusal, number))
            if number > LINE_LIMIT:
                break
        if trouble := self._trouble(batch, number if batch.lines else 0):
            batch.errors = [problem(trouble, None)]

    def _trouble(self, batch: Batch, count: int) -> Refusal | None:
        """Fail a batch as a whole, with an error."""
        shown, queue = batch.shown, self._server.options.batch_queue
        if not count:
            return Refusal(400, f"Cannot find file {shown['input_file_id']}, or organization {ORGANIZATION} does not "
                           "have access to it.", param="file_id", code="invalid_request")
        if count > LINE_LIMIT:
            return Refusal(400, f"The batch has more than {LINE_LIMIT:,} requests.", code="too_many_tasks")
        stored = sum(len(content) for _, content in self._files.values())
        if stored + batch.weight > STORE_LIMIT:
            return Refusal(400, "The answers would be too large for the stand-in server.", code="too_large")
        if self._hit("invalid", batch.key):
            return Refusal(400, "This batch was to fail validation.", code="invalid_request")
        enqueued = batch.tokens + sum(other.tokens for other in self._batches.values()
                                      if other.shown["status"] not in FINISHED and not other.errors)
        if queue is not None and enqueued > queue and not batch.errors:
            return Refusal(400, f"Enqueued token limit reached for {shown['model']} in organization {ORGANIZATION}. "
                           f"Limit: {queue:,} enqueued tokens. Please try again once some in_progress batches have "
                           "been completed.", code="token_limit_exceeded")
        return None

    def _read(self, line: bytes, batch: Batch) -> tuple[str, Ask]:
        """Return the custom_id of a line and its request. Raises Refusal."""
        name, body = read_line(line, batch.shown["endpoint"])
        try:
            ask = Ask(batch.shown["endpoint"], body)
        except Refusal as refusal:
            detail = problem(refusal, None)
            if detail["code"] == "missing_required_parameter":
                message = f"{detail['param'].capitalize()} parameter is required."
                detail |= {"code": "invalid_request", "message": message}
            raise Refusal(400, detail["message"], param=f"body.{detail['param']}", code=detail["code"]) from None
        models = self._server.options.models
        if models and ask.model not in models:
            raise Refusal(400, f"The provided model '{ask.model}' is not supported by the Batch API.",
                          param="body.model", code="model_not_found")
        batch.shown["model"] = batch.shown["model"] or ask.model
        if ask.model != batch.shown["model"]:
            raise Refusal(400, f"The model '{ask.model}' for this request does not match the rest of the batch. Each "
                          "batch must contain requests for a single model.", param="body.model",
                          code="mismatched_model")
        return name, ask

    def _progress(self, batch: Batch, now: float) -> float:
        """Return the share of the lines that have been run."""
        part = (now - batch.created) / (self._server.options.batch_time or 1e-9)
        return min(max((part - 0.1) / 0.8, 0.0), 1.0)

    def _move(self, batch: Batch, now: float) -> None:
        shown, whole, begun = batch.shown, self._server.options.batch_time, batch.created
        if shown["status"] == "cancelling":
            if now >= batch.cancelled + whole / 10:
                self._finish(batch, "cancelled", batch.cancelled + whole / 10)
        elif batch.errors:
            if now >= begun + whole / 10:
                shown |= {"status": "failed", "failed_at": self._stamp(begun + whole / 10),
                          "errors": {"object": "list", "data": batch.errors}}
        else:
            for status, share in (("in_progress", 0.1), ("finalizing", 0.9)):
                if now >= begun + whole * share:
                    shown |= {"status": status, f"{status}_at": self._stamp(begun + whole * share)}
                    done = round(batch.total * self._progress(batch, now))
                    shown["request_counts"] = {"total": batch.total, "completed": done, "failed": 0}
            if now >= begun + whole:
                self._finish(batch, "completed", begun + whole)

    def _finish(self, batch: Batch, status: str, moment: float) -> None:
        """Answer the lines that the batch came to before its end, and write the files."""
        files: dict[str, list[str]] = {"output": [], "error": []}
        as_text, never_run = self._hit("strings", batch.key), 0
        for number, line in enumerate(io.BytesIO(b"" if batch.errors else batch.lines)):
            name, ask = self._read(line, batch)
            outcome = self._run(batch, ask) if number < round(batch.done * batch.total) else "batch_cancelled"
            status = "expired" if outcome == "batch_expired" else status
            never_run += outcome in ("batch_cancelled", "batch_expired")
            good = isinstance(outcome, Reply) and outcome.status == 200
            files["output" if good else "error"].append(output_line(name, outcome, as_text))
        if self._hit("shuffle", batch.key):
            random.Random(self._server.options.seed).shuffle(files["output"])
        counts = {"total": batch.total, "completed": len(files["output"]), "failed": len(files["error"]) - never_run}
        batch.shown |= {"status": status, f"{status}_at": self._stamp(moment), "usage": batch_usage(*batch.used),
                        "request_counts": counts}
        for kind, rows in files.items():
            if rows:
                batch.shown[f"{kind}_file_id"] = name = f"file-{next(SERIAL)}"
                self._keep(name, f"{batch.shown['id']}_{kind}.jsonl", "batch_output", "".join(rows).encode())
        if self._hit("lost-file", batch.key):
            self._files.pop(batch.shown["output_file_id"], None)
        batch.lines = b""  # the client may have deleted the file to free the memory

    def _run(self, batch: Batch, ask: Ask) -> Reply | str:
        """Answer a line as a live request is answered, or return why there is no answer."""
        if batch.shown["status"] != "cancelling" and self._expires(ask):
            return "batch_expired"
        if self._hit("errors-only", batch.key):
            return error(400, "This line was to fail.")
        fault, _ = self._server.draw_fate(ask)
        if fault in ("reset", "truncated", "hang"):
            return "request_timeout"
        if fault in READY_MADE:
            return READY_MADE[fault]
        tokens_in, tokens_out = batch.used
        batch.used = tokens_in + ask.prompt_tokens, tokens_out + sum(estimate(text) for text, _ in ask.texts)
        self._server.stats.batch_rows += 1
        return answer(ask, fault)

    def _expires(self, ask: Ask) -> bool:
        if not self._server.options.batch_fault.keys() & {"expire", "expire-once"}:
            return False
        body = canonical(ask.body)
        if self._hit("expire", body):
            return True
        key = blake2b(body, digest_size=16).digest()
        first = key not in self._asked
        self._asked.add(key)
        return first and self._hit("expire-once", body)


def problem(refusal: Refusal, line: int | None) -> dict[str, Any]:
    """Return a refusal in the form in which a batch lists it."""
    detail = json.loads(refusal.reply.body)["error"]
    return {"code": detail["code"], "message": detail["message"], "param": detail["param"], "line": line}


def batch_usage(tokens_in: int, tokens_out: int) -> dict[str, Any]:
    return {"input_tokens": tokens_in, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": tokens_out,
            "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": tokens_in + tokens_out}


def read_form(content_type: str, raw: bytes) -> dict[str, tuple[str, bytes]]:
    """Take a form apart: the file name, if any, and the content of each field."""
    boundary = re.match(r'(?i:multipart/form-data);.*\bboundary="?([^";]+)', content_type)
    if not boundary:
        raise Refusal(400, "Invalid content type: expected multipart/form-data with a boundary.")
    form = {}
    for part in raw.split(b"\r\n--" + boundary[1].encode("latin-1"))[:-1]:
        head, _, content = part.partition(b"\r\n\r\n")
        found = dict(re.findall(r'\b(name|filename)="([^"]*)"', head.decode("utf-8", "replace")))
        form[found.get("name", "")] = found.get("filename", ""), content
    return form


def read_line(line: bytes, endpoint: str) -> tuple[str, dict[str, Any]]:
    """Return the custom_id and the body of a line, which must name the batch's endpoint."""
    item = parse_object(line)
    if item is None:
        raise Refusal(400, "This line is not parseable as valid JSON.", code="invalid_json_line")
    for name, kind, wanted in (("custom_id", str, "a string"), ("method", str, "'POST'"), ("url", str, "a string"),
                               ("body", dict, "an object")):
        if name not in item:
            raise missing(name)
        if not isinstance(item[name], kind) or (name == "method" and item[name] != "POST"):
            raise invalid(name, wanted)
    if item["url"] != endpoint:
        raise Refusal(400, "The URL provided for this request does not match the batch endpoint.", param="url",
                      code="invalid_url")
    if item["body"].get("stream"):
        raise Refusal(400, "Streaming is not supported in the Batch API.", param="body.stream",
                      code="streaming_unsupported")
    return item["custom_id"], item["body"]


def output_line(name: str, outcome: Reply | str, as_text: bool) -> str:
    """Write a line of an output or error file."""
    response, trouble = "null", "null"
    if isinstance(outcome, str):
        trouble = encode_json({"code": outcome, "message": NOT_RUN[outcome]})
    else:
        whole = not as_text and parse_object(outcome.body.encode()) is not None
        body = outcome.body if whole else encode_json(outcome.body)
        response = f'{{"status_code":{outcome.status},"request_id":"req_{next(SERIAL)}","body":{body}}}'
    return (f'{{"id":"batch_req_{next(SERIAL)}","custom_id":{encode_json(name)},"response":{response},'
            f'"error":{trouble}}}\n')
