"""Tests of the stand-in server's files and batches, over real connections on loopback; time is a fake clock."""

from __future__ import annotations

import http.client
import itertools
import json
import socket
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import pytest

from concurrent_prompts.extras import stand_in as module
from concurrent_prompts.extras import stand_in_batches, stand_in_http
from concurrent_prompts.extras.stand_in import BATCH_FAULTS, ENDPOINTS, FAULTS, Options, Server
from tests.helpers import in_rows

CHAT = "/v1/chat/completions"
BODIES = {
    CHAT: {"messages": [{"role": "user", "content": "Tell me a story"}]},
    "/v1/responses": {"input": "Tell me a story"},
    "/v1/completions": {"prompt": "Tell me a story"},
    "/v1/embeddings": {"input": "Tell me a story"},
}
Start = Callable[..., Server]


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Api:
    """What a client does, in plain HTTP."""

    def __init__(self, server: Server, **headers: str) -> None:
        self.url, self.stats, self.headers = urlsplit(server.url), server.stats, headers

    def send(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(str(self.url.hostname), self.url.port, timeout=20)
        try:
            connection.request(method, f"/v1{path}", body, self.headers | headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        status, data = self.send(method, path, None if body is None else json.dumps(body).encode())
        assert status == 200, (status, data)
        return json.loads(data)

    def refusal(self, method: str, path: str, body: Any = None) -> tuple[int, str, str | None, str | None]:
        status, data = self.send(method, path, None if body is None else json.dumps(body).encode())
        detail = json.loads(data)["error"]
        assert detail["type"] == "invalid_request_error"
        return status, detail["message"], detail["param"], detail["code"]

    def upload(self, content: bytes, purpose: str = "batch") -> tuple[int, Any]:
        form = (b'--x.y\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n' + purpose.encode() +
                b'\r\n--x.y\r\nContent-Disposition: form-data; name="file"; filename="in.jsonl"\r\n'
                b"Content-Type: application/octet-stream\r\n\r\n" + content + b"\r\n--x.y--\r\n")
        status, data = self.send("POST", "/files", form, **{"Content-Type": 'multipart/form-data; boundary="x.y"'})
        return status, json.loads(data)

    def create(self, content: bytes, endpoint: str = CHAT, **more: Any) -> Any:
        status, file = self.upload(content)
        assert status == 200, file
        return self.ask("POST", "/batches", asked(file["id"], endpoint=endpoint, **more))

    def look(self, batch: Any) -> Any:
        return self.ask("GET", f"/batches/{batch['id']}")

    def rows(self, name: str | None) -> list[Any]:
        if name is None:
            return []
        status, data = self.send("GET", f"/files/{name}/content")
        assert status == 200 and data.endswith(b"\n")
        return [json.loads(line) for line in data.splitlines()]

    def run(self, content: bytes, endpoint: str = CHAT) -> tuple[Any, list[Any], list[Any]]:
        """Return a finished batch, its output and its errors."""
        batch = self.look(self.create(content, endpoint))
        return batch, self.rows(batch["output_file_id"]), self.rows(batch["error_file_id"])


def asked(file: Any, **more: Any) -> dict[str, Any]:
    return {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h", **more}


def line(number: int = 1, endpoint: str = CHAT, **more: Any) -> dict[str, Any]:
    return {"custom_id": f"row-{number}", "method": "POST", "url": endpoint,
            "body": {"model": "m", "user": str(number), **BODIES[endpoint]}, **more}


def lines(count: int) -> bytes:
    return jsonl(*(line(number) for number in range(1, count + 1)))


def jsonl(*items: Any) -> bytes:
    return b"".join(json.dumps(item).encode() + b"\n" for item in items)


def ids(rows: list[Any]) -> list[str]:
    return [row["custom_id"] for row in rows]


# --- What the API has ---------------------------------------------------------------------------------------


def test_the_official_sdk_does_all_of_it(stand_in: Start) -> None:
    openai = pytest.importorskip("openai")
    server = stand_in(fault={"429": 0.3}, require_key="k")
    with openai.OpenAI(base_url=server.url, api_key="k", max_retries=0) as client:
        file = client.files.create(purpose="batch", file=("prompts.jsonl", lines(20)))
        assert (file.filename, file.purpose, file.bytes, file.status) == (
            "prompts.jsonl", "batch", len(lines(20)), "processed")
        assert client.files.retrieve(file.id) == file and client.files.content(file.id).read() == lines(20)
        batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h",
                                      metadata={"job": "j"})
        assert (batch.status, batch.metadata, batch.model) == ("validating", {"job": "j"}, "m")
        batch = client.batches.retrieve(batch.id)
        assert batch.status == "completed" and [found.id for found in client.batches.list()] == [batch.id]
        with client.files.with_streaming_response.content(batch.output_file_id) as response:
            good = [json.loads(text) for text in response.iter_lines()]
        bad = [json.loads(text) for text in client.files.content(batch.error_file_id).text.splitlines()]
        assert sorted(ids(good + bad)) == sorted(f"row-{number}" for number in range(1, 21))
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (20, len(good), len(bad)) and good and bad
        answers = [openai.types.chat.ChatCompletion.model_validate(row["response"]["body"]) for row in good]
        assert batch.usage.total_tokens == sum(answer.usage.total_tokens for answer in answers)
        assert batch.usage.input_tokens == sum(answer.usage.prompt_tokens for answer in answers)
        assert client.files.delete(file.id).deleted
        with pytest.raises(openai.NotFoundError, match="No such File object"):
            client.files.retrieve(file.id)
        with pytest.raises(openai.ConflictError, match="Cannot cancel a batch with status 'completed'"):
            client.batches.cancel(batch.id)
    assert (server.stats.files, server.stats.batches, server.stats.batch_rows) == (1, 1, len(good))
    assert str(server.stats) == (f"requests 0, answered 0, rejected 0, faults 0, batches 1 with {len(good)} "
                                 "answered rows")


def test_what_is_shown_has_just_the_fields_of_the_api(stand_in: Start) -> None:
    openai = pytest.importorskip("openai")
    api = Api(stand_in())
    batch = api.create(lines(1))
    assert batch.keys() == openai.types.Batch.model_fields.keys()
    assert api.ask("GET", f"/files/{batch['input_file_id']}").keys() == openai.types.FileObject.model_fields.keys()
    openai.types.Batch.model_validate(api.look(batch), strict=True)


def test_the_life_of_a_batch_follows_the_clock(stand_in: Start) -> None:
    clock = Clock()
    api = Api(stand_in(clock=clock, batch_time=100))
    batch = api.create(lines(8))
    born, seen = batch["created_at"], {}
    for second in (0, 9, 10, 50, 89, 90, 99):
        clock.now = 1000.0 + second
        now = api.look(batch)
        seen[second] = (now["status"], *now["request_counts"].values())
        assert now["output_file_id"] is now["error_file_id"] is now["completed_at"] is None
        assert api.stats.batch_rows == 0
    assert seen == {
        0: ("validating", 0, 0, 0), 9: ("validating", 0, 0, 0), 10: ("in_progress", 8, 0, 0),
        50: ("in_progress", 8, 4, 0), 89: ("in_progress", 8, 8, 0), 90: ("finalizing", 8, 8, 0),
        99: ("finalizing", 8, 8, 0)}
    clock.now = 1500.0
    batch = api.look(batch)
    assert (batch["status"], batch["request_counts"]) == ("completed", {"total": 8, "completed": 8, "failed": 0})
    stamps = [batch[f"{name}_at"] - born for name in ("in_progress", "finalizing", "completed", "expires")]
    assert stamps == [10, 90, 100, 24 * 3600]
    assert batch["failed_at"] is batch["expired_at"] is batch["cancelled_at"] is batch["error_file_id"] is None
    assert api.stats.batch_rows == 8 and api.look(batch) == batch


def test_with_no_time_a_batch_has_ended_when_anything_is_asked_next(stand_in: Start) -> None:
    for path in ("/batches", "/stand_in/stats", "/files/unknown"):
        api = Api(stand_in())
        assert api.create(lines(3))["status"] == "validating" and api.stats.batch_rows == 0
        api.send("GET", path)
        assert api.stats.batch_rows == 3


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_line_is_answered_as_a_live_request_is(stand_in: Start, endpoint: str) -> None:
    api = Api(stand_in())
    batch, [row], _ = api.run(jsonl(line(endpoint=endpoint)), endpoint)
    live = api.ask("POST", endpoint.removeprefix("/v1"), line(endpoint=endpoint)["body"])
    body = row["response"].pop("body")
    for answer in (body, live):
        for name in ("id", "created", "created_at", "completed_at"):
            answer.pop(name, None)
        for item in answer.get("output", []):
            del item["id"]
    assert body == live and batch["usage"]["total_tokens"] == live["usage"]["total_tokens"]
    assert row["response"].pop("request_id").startswith("req_") and row.pop("id").startswith("batch_req_")
    assert row == {"custom_id": "row-1", "response": {"status_code": 200}, "error": None}


def test_the_list_has_the_newest_first_and_pages(stand_in: Start) -> None:
    api = Api(stand_in())
    names = [api.create(lines(1))["id"] for _ in range(25)][::-1]
    pages = [[], *(api.ask("GET", f"/batches?limit=10&after={name}")["data"] for name in (names[9], names[19]))]
    first = api.ask("GET", "/batches?limit=10")
    pages[0] = first["data"]
    assert [batch["id"] for page in pages for batch in page] == names
    assert (first["object"], first["has_more"], first["first_id"], first["last_id"]) == (
        "list", True, names[0], names[9])
    assert len(api.ask("GET", "/batches")["data"]) == 20 and not api.ask("GET", "/batches?limit=25")["has_more"]
    end = api.ask("GET", f"/batches?after={names[-1]}")
    assert (end["data"], end["has_more"], end["first_id"]) == ([], False, None)
    for limit in ("0", "101", "-1", "x", "", "9" * 5000):
        status, *_, code = api.refusal("GET", f"/batches?limit={limit or '%20'}")
        assert (status, code) == (400, "invalid_value")
    assert api.refusal("GET", "/batches?after=batch_x")[0] == 404


def test_what_is_unknown_is_not_found(stand_in: Start) -> None:
    api = Api(stand_in())
    for method, path in (("GET", "/files/x"), ("GET", "/files/x/content"), ("DELETE", "/files/x")):
        assert api.refusal(method, path) == (404, "No such File object: x", "id", None)
    for method, path in (("GET", "/batches/x"), ("POST", "/batches/x/cancel")):
        assert api.refusal(method, path) == (404, "No batch found with id 'x'.", None, None)
    for method, path in (("PUT", "/files"), ("DELETE", "/batches/x"), ("GET", "/batches/x/cancel"), ("GET", "/filesx")):
        assert api.refusal(method, path)[:2] == (404, f"Invalid URL ({method} /v1{path})")
    assert api.stats.requests == 0


def test_a_key_is_required_for_all_of_it(stand_in: Start) -> None:
    server = stand_in(require_key="k")
    stranger, friend = Api(server), Api(server, Authorization="Bearer k")
    batch = friend.create(lines(1))
    assert stranger.upload(lines(1))[0] == 401
    for method, path in (("GET", f"/files/{batch['input_file_id']}/content"), ("POST", "/batches"),
                         ("DELETE", f"/files/{batch['input_file_id']}"), ("GET", f"/batches/{batch['id']}"),
                         ("GET", "/batches"), ("POST", f"/batches/{batch['id']}/cancel")):
        assert stranger.refusal(method, path)[::3] == (401, "invalid_api_key")
    assert friend.look(batch)["status"] == "completed" and (server.stats.files, server.stats.batches) == (1, 1)


# --- Validation ---------------------------------------------------------------------------------------------

BODY = line()["body"]
WRONG: dict[str, tuple[Any, str, str | None]] = {  # a second line, the code and the parameter of its error
    "no JSON": (b"{nonsense\n", "invalid_json_line", None),
    "no UTF-8": (b'{"custom_id": "\xff"}\n', "invalid_json_line", None),
    "empty": (b"\n", "invalid_json_line", None),
    "no object": (jsonl([1]), "invalid_json_line", None),
    "same custom_id": (jsonl(line(1)), "duplicate_custom_id", "custom_id"),
    **{f"no {name}": (jsonl({key: value for key, value in line(2).items() if key != name}),
                      "missing_required_parameter", name) for name in ("custom_id", "method", "url", "body")},
    "custom_id a number": (jsonl(line(2, custom_id=2)), "invalid_value", "custom_id"),
    "method GET": (jsonl(line(2, method="GET")), "invalid_value", "method"),
    "body a text": (jsonl(line(2, body="x")), "invalid_value", "body"),
    "other endpoint": (jsonl(line(2, "/v1/embeddings")), "invalid_url", "url"),
    "other model": (jsonl(line(2, body=BODY | {"model": "n"})), "mismatched_model", "body.model"),
    "unknown model": (jsonl(line(2, body=BODY | {"model": "o"})), "model_not_found", "body.model"),
    "no model": (jsonl(line(2, body={"messages": []})), "invalid_request", "body.model"),
    "no messages": (jsonl(line(2, body={"model": "m"})), "invalid_request", "body.messages"),
    "messages a text": (jsonl(line(2, body=BODY | {"messages": "x"})), "invalid_value", "body.messages"),
    "stream": (jsonl(line(2, body=BODY | {"stream": True})), "streaming_unsupported", "body.stream"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_line_fails_the_batch_with_its_number(stand_in: Start, name: str) -> None:
    wrong, code, param = WRONG[name]
    api = Api(stand_in(models=("m", "n")))
    batch, good, bad = api.run(jsonl(line(1)) + wrong + jsonl(line(3)))
    [trouble] = batch["errors"]["data"]
    assert (batch["status"], batch["errors"]["object"], good, bad) == ("failed", "list", [], [])
    assert (trouble["code"], trouble["line"], trouble["param"]) == (code, 2, param) and trouble["message"]
    assert batch["failed_at"] and batch["request_counts"] == {"total": 0, "completed": 0, "failed": 0}
    assert api.stats.batch_rows == 0


def test_all_wrong_lines_are_named_when_the_time_has_come(stand_in: Start) -> None:
    clock = Clock()
    api = Api(stand_in(clock=clock, batch_time=10))
    batch = api.create(jsonl(line(1), line(1), line(2, method="PUT"), line(3)) + b"{")
    clock.now += 0.9
    batch = api.look(batch)
    assert (batch["status"], batch["errors"]) == ("validating", None)
    clock.now += 0.1
    batch = api.look(batch)
    assert [(error["line"], error["code"]) for error in batch["errors"]["data"]] == [
        (2, "duplicate_custom_id"), (3, "invalid_value"), (5, "invalid_json_line")]
    assert (batch["status"], batch["failed_at"]) == ("failed", batch["created_at"] + 1)
    assert api.refusal("POST", f"/batches/{batch['id']}/cancel")[0] == 409


def test_a_file_that_is_none_fails_the_batch(stand_in: Start) -> None:
    api = Api(stand_in())
    for name in ("file-x", api.upload(lines(1), "user_data")[1]["id"]):
        batch = api.look(api.ask("POST", "/batches", asked(name)))
        assert batch["status"] == "failed" and batch["errors"]["data"] == [{
            "code": "invalid_request", "line": None, "param": "file_id",
            "message": f"Cannot find file {name}, or organization org-stand-in does not have access to it."}]


def test_a_batch_has_a_largest_number_of_lines(stand_in: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stand_in_batches, "LINE_LIMIT", 3)
    api = Api(stand_in())
    assert api.run(lines(3))[0]["status"] == "completed"
    batch = api.run(lines(3) + b"{\n" + lines(1))[0]
    assert [error["code"] for error in batch["errors"]["data"]] == ["too_many_tasks"]


def test_what_cannot_be_a_batch_file_is_refused(stand_in: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in (stand_in_batches, stand_in_http):
        monkeypatch.setattr(part, "FILE_LIMIT", 1000)
    api = Api(stand_in())
    for content in (b"", b"\n", b"notes\n"):
        status, answer = api.upload(content)
        assert status == 400 and answer["error"]["message"] == "Invalid file format for Batch API. Must be .jsonl"
    assert api.upload(lines(1).ljust(1000))[0] == 200 and api.upload(b"notes", "user_data")[0] == 200
    status, answer = api.upload(lines(1).ljust(1001))
    assert (status, answer["error"]["message"]) == (400, "File is too large.")
    assert api.upload(lines(1).ljust(100_000))[0] == 413 and api.stats.files == 2
    plain = {"Content-Type": "multipart/form-data; boundary=b"}
    empty = b'--b\r\ncontent-disposition: form-data; name="file"; filename="f"\r\n\r\n{}\r\n--b--\r\n'
    status, data = api.send("POST", "/files", empty, **plain)
    assert (status, json.loads(data)["error"]["param"]) == (400, "purpose")
    assert api.send("POST", "/files", b"nonsense", **plain)[0] == 400
    assert api.refusal("POST", "/files", {})[:1] == (400,)


def test_an_upload_may_be_larger_than_a_request(stand_in: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stand_in_http, "BODY_LIMIT", 1000)
    api, content = Api(stand_in()), lines(1000)
    status, file = api.upload(content)
    assert (status, file["bytes"]) == (200, len(content))
    assert api.send("GET", f"/files/{file['id']}/content") == (200, content)
    assert api.send("POST", "/batches", content)[0] == 413


def test_what_a_batch_is_made_of_is_checked(stand_in: Start) -> None:
    api = Api(stand_in())
    for more, param, code in (
        ({"input_file_id": None}, "input_file_id", "missing_required_parameter"),
        ({"endpoint": ""}, "endpoint", "missing_required_parameter"),
        ({"endpoint": "/v1/x"}, "endpoint", "invalid_value"),
        ({"completion_window": "1h"}, "completion_window", "invalid_value"),
        ({"metadata": {"a": ["b"]}}, "metadata", "invalid_value"), ({"metadata": "x"}, "metadata", "invalid_value"),
    ):
        status, _, *found = api.refusal("POST", "/batches", asked("file-x") | more)
        assert (status, *found) == (400, param, code)
    assert api.send("POST", "/batches", b"[")[0] == 400 and api.stats.batches == 0


def test_what_does_not_fit_into_the_queue_fails(stand_in: Start) -> None:
    clock = Clock()
    api = Api(stand_in(clock=clock, batch_time=10, batch_queue=100))
    first = api.create(lines(20))
    broken = api.create(lines(30) + lines(1))
    second, third = api.create(lines(5)), api.create(lines(1))
    clock.now += 1
    states = [api.look(batch)["status"] for batch in (first, broken, second, third)]
    assert states == ["in_progress", "failed", "in_progress", "failed"]
    assert api.look(broken)["errors"]["data"][0]["code"] == "duplicate_custom_id"
    assert api.look(third)["errors"]["data"] == [{
        "code": "token_limit_exceeded", "line": None, "param": None,
        "message": "Enqueued token limit reached for m in organization org-stand-in. Limit: 100 enqueued tokens. "
                   "Please try again once some in_progress batches have been completed."}]
    clock.now += 9
    again = api.create(lines(25))
    clock.now += 1
    assert api.look(again)["status"] == "in_progress" and api.look(first)["status"] == "completed"


# --- Cancellation and faults --------------------------------------------------------------------------------


@pytest.mark.parametrize(("second", "done"), [(5, 0), (30, 2), (50, 4), (95, 8)])
def test_what_is_done_by_the_time_of_the_cancellation_is_answered(stand_in: Start, second: int, done: int) -> None:
    clock = Clock()
    api = Api(stand_in(clock=clock, batch_time=100))
    batch = api.create(lines(8))
    clock.now += second
    for _ in range(2):
        shown = api.ask("POST", f"/batches/{batch['id']}/cancel")
        assert (shown["status"], shown["cancelling_at"]) == ("cancelling", batch["created_at"] + second)
    clock.now += 9
    assert api.look(batch)["status"] == "cancelling" and api.stats.batch_rows == 0
    clock.now += 1
    batch = api.ask("POST", f"/batches/{batch['id']}/cancel")
    assert (batch["status"], batch["cancelled_at"]) == ("cancelled", batch["cancelling_at"] + 10)
    good, bad = api.rows(batch["output_file_id"]), api.rows(batch["error_file_id"])
    assert ids(good + bad) == [f"row-{number}" for number in range(1, 9)] and len(good) == done == api.stats.batch_rows
    assert {(row["response"], row["error"]["code"]) for row in bad} <= {(None, "batch_cancelled")}
    assert batch["request_counts"] == {"total": 8, "completed": done, "failed": 0}


def test_a_cancelled_batch_neither_fails_nor_expires(stand_in: Start) -> None:
    clock = Clock()
    api = Api(stand_in(clock=clock, batch_time=100, batch_fault={"expire": 1}))
    wrong, sound = api.create(lines(2) + b"{"), api.create(lines(2))
    api.ask("POST", f"/batches/{wrong['id']}/cancel")
    clock.now += 50
    api.ask("POST", f"/batches/{sound['id']}/cancel")
    clock.now += 50
    wrong, sound = api.look(wrong), api.look(sound)
    assert (wrong["status"], wrong["error_file_id"], sound["status"]) == ("cancelled", None, "cancelled")
    assert sound["request_counts"] == {"total": 2, "completed": 1, "failed": 0}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_line_meets_the_faults_of_a_live_request(stand_in: Start, kind: str) -> None:
    api = Api(stand_in(fault={kind: 1.0}))
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}
    batch, good, bad = api.run(jsonl(line(1, body=BODY | {"response_format": schema})))
    [row] = good + bad
    if kind in ("reset", "truncated", "hang"):
        assert (row["response"], row["error"]["code"]) == (None, "request_timeout")
    else:
        response, status = row["response"], int(kind[:3]) if kind[:3].isdigit() else 200
        assert (response["status_code"], row["error"], bool(good)) == (status, None, status == 200)
        assert isinstance(response["body"], str) == (kind in ("503-html", "malformed", "empty-html"))
        assert ("error" in response["body"]) == (kind in ("429", "500", "502", "error-200"))
    paid = kind in ("null-choices", "malformed", "schema")
    assert api.stats.batch_rows == paid and (batch["usage"]["total_tokens"] > 0) == paid
    assert batch["request_counts"] == {"total": 1, "completed": len(good), "failed": len(bad)}


def test_invalid_fails_every_batch(stand_in: Start) -> None:
    api = Api(stand_in(batch_fault={"invalid": 1}))
    batch, good, bad = api.run(lines(2))
    assert (batch["status"], len(batch["errors"]["data"]), good, bad) == ("failed", 1, [], [])


def test_a_share_of_the_lines_expires_and_the_same_each_time(stand_in: Start) -> None:
    api = Api(stand_in(batch_fault={"expire": 0.3}))
    runs = [api.run(lines(100)) for _ in range(2)]
    for batch, good, bad in runs:
        assert (batch["status"], batch["completed_at"]) == ("expired", None) and batch["expired_at"]
        assert sorted(ids(good + bad)) == sorted(f"row-{number}" for number in range(1, 101)) and 20 < len(bad) < 40
        assert {(row["response"], row["error"]["code"]) for row in bad} == {(None, "batch_expired")}
        assert batch["request_counts"] == {"total": 100, "completed": len(good), "failed": 0}
    assert ids(runs[0][2]) == ids(runs[1][2]) and api.stats.batch_rows == 2 * len(runs[0][1])
    assert Api(stand_in(batch_fault={"expire": 0})).run(lines(9))[0]["status"] == "completed"


def test_with_expire_once_the_second_asking_is_answered(stand_in: Start) -> None:
    api = Api(stand_in(batch_fault={"expire-once": 0.5}))
    _, good, bad = api.run(lines(40))
    again = jsonl(*(line(int(name.removeprefix("row-"))) | {"custom_id": f"again {name}"} for name in ids(bad)))
    assert good and bad
    batch, late, _ = api.run(again)
    assert (batch["status"], len(late)) == ("completed", len(bad)) and api.stats.batch_rows == 40


def test_errors_only_leaves_no_output(stand_in: Start) -> None:
    api = Api(stand_in(batch_fault={"errors-only": 1}))
    batch, _, bad = api.run(lines(3))
    assert (batch["status"], batch["output_file_id"], api.stats.batch_rows) == ("completed", None, 0)
    assert batch["request_counts"] == {"total": 3, "completed": 0, "failed": 3}
    assert [(row["response"]["status_code"], row["error"]) for row in bad] == [(400, None)] * 3


def test_shuffle_gives_the_output_another_order(stand_in: Start) -> None:
    plain, shuffled = (Api(stand_in(batch_fault=fault)).run(lines(30))[1] for fault in ({}, {"shuffle": 1}))
    assert ids(plain) == [f"row-{number}" for number in range(1, 31)]
    assert ids(shuffled) != ids(plain) and sorted(ids(shuffled)) == sorted(ids(plain))


def test_strings_gives_bodies_as_text(stand_in: Start) -> None:
    _, [row], _ = Api(stand_in(batch_fault={"strings": 1})).run(lines(1))
    assert json.loads(row["response"]["body"])["object"] == "chat.completion"


def test_a_lost_file_is_not_found(stand_in: Start) -> None:
    api = Api(stand_in(batch_fault={"lost-file": 1}))
    batch = api.look(api.create(lines(1)))
    for more in ("", "/content"):
        assert api.refusal("GET", f"/files/{batch['output_file_id']}{more}")[0] == 404


def test_every_second_look_at_a_batch_can_fail(stand_in: Start) -> None:
    api = Api(stand_in(batch_fault={"poll-500": 1}))
    batch = api.create(lines(1))
    statuses = [api.send("GET", f"/batches/{batch['id']}")[0] for _ in range(4)]
    assert statuses == [500, 200, 500, 200] and api.ask("GET", "/batches")["data"][0]["status"] == "completed"


def test_looks_can_be_slow_and_be_given_up(stand_in: Start) -> None:
    api = Api(server := stand_in(batch_fault={"poll-slow": 0.1}))
    batch = api.create(lines(1))
    started = time.monotonic()
    assert api.look(batch)["status"] == "completed" and time.monotonic() - started > 0.08
    with socket.create_connection((api.url.hostname, api.url.port)) as link:
        link.sendall(f"GET /v1/batches/{batch['id']} HTTP/1.1\r\n\r\n".encode())
    assert api.look(batch)["status"] == "completed"
    assert (server.stats.requests, server.stats.in_flight) == (0, 0)


def test_latency_holds_for_files_too(stand_in: Start) -> None:
    api, started = Api(stand_in(latency=0.05)), time.monotonic()
    assert api.run(lines(1))[0]["status"] == "completed" and time.monotonic() - started > 0.18


def test_the_answer_to_a_creation_can_be_lost(stand_in: Start) -> None:
    api = Api(stand_in(batch_fault={"create-lost": 1}))
    file = api.upload(lines(4))[1]["id"]
    for number in (1, 2):
        with pytest.raises(ConnectionError):
            api.send("POST", "/batches", json.dumps(asked(file)).encode())
        assert [batch["input_file_id"] for batch in api.ask("GET", "/batches")["data"]] == [file] * number
        assert (api.stats.batches, api.stats.batch_rows) == (number, 4 * number), "nobody needs to ask for it"


def test_a_share_of_the_batches_follows_from_their_files(stand_in: Start) -> None:
    apis = [Api(stand_in(batch_fault={"invalid": 0.5}, seed=seed)) for seed in (0, 0, 1)]
    first, again, other = ([api.run(lines(count))[0]["status"] for count in range(1, 21)] for api in apis)
    assert first == again != other and set(first) == {"failed", "completed"}


# --- Options ------------------------------------------------------------------------------------------------


@in_rows(("settings", "words"), [
    ({"batch_time": -1}, "--batch-time must be 0 or more"), ({"batch_queue": -1}, "--batch-queue"),
    ({"batch_fault": {"x": 1}}, "--batch-fault x is unknown; choose invalid,"),
    ({"batch_fault": {"expire": 1.5}}, "--batch-fault expire takes a share of 0 to 1, not 1.5"),
    ({"batch_fault": {"poll-slow": float("inf")}}, "--batch-fault poll-slow takes seconds, not inf"),
])
def test_options_that_cannot_be_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Options(**settings)


def test_kinds_of_faults_are_in_the_manual_and_need_no_share(capsys: pytest.CaptureFixture[str]) -> None:
    manual = (module.__doc__ or "").partition("--batch-fault")[2]
    assert all(kind in manual for kind in BATCH_FAULTS)
    flags = itertools.chain.from_iterable(("--batch-fault", kind) for kind in (*BATCH_FAULTS, "expire=0.25"))
    found = module.make_parser().parse_args([*flags, "--batch-time", "1.5", "--batch-queue", "9"])
    assert dict(found.batch_fault) == dict.fromkeys(BATCH_FAULTS, 1.0) | {"expire": 0.25}
    assert (found.batch_time, found.batch_queue) == (1.5, 9)
    with pytest.raises(SystemExit, match="2"):
        module.main(["--batch-fault", "expire=2"])
    assert "--batch-fault expire takes a share" in capsys.readouterr().err


# --- What it stores -----------------------------------------------------------------------------------------


def test_it_stores_so_many_bytes(stand_in: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stand_in_batches, "STORE_LIMIT", 10_000)
    api = Api(stand_in())
    name = api.upload(lines(10))[1]["id"]
    while (answer := api.upload(lines(10)))[0] == 200:
        assert api.stats.files < 20
    assert answer[0] == 413 and "no room left" in answer[1]["error"]["message"]
    batch = api.look(api.ask("POST", "/batches", asked(name)))
    assert batch["status"] == "failed" and batch["errors"]["data"][0]["code"] == "too_large"
    api.ask("DELETE", f"/files/{name}")
    assert api.upload(lines(1))[0] == 200


def test_it_stores_so_many_files_and_batches(stand_in: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stand_in_batches, "COUNT_LIMIT", 5)
    api = Api(stand_in(batch_time=9.0))
    name = api.upload(lines(1))[1]["id"]
    for _ in range(5):
        api.ask("POST", "/batches", asked(name))
    status, message, *_ = api.refusal("POST", "/batches", asked(name))
    assert status == 413 and "no room left" in message and api.upload(lines(1))[0] == 413


@pytest.mark.parametrize("more", [
    {"metadata": {str(n): "x" for n in range(17)}}, {"metadata": {"x": "y" * 513}}, {"metadata": {"y" * 513: "x"}},
    {"input_file_id": "x" * 513},
])  # fmt: skip
def test_names_have_an_end(stand_in: Start, more: dict[str, Any]) -> None:
    api = Api(stand_in())
    assert api.refusal("POST", "/batches", {**asked("file"), **more})[0] == 400
