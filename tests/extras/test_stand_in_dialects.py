"""The main job against each dialect of the stand-in server, with its faults, on every live backend."""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request

import pytest

from concurrent_prompts import Run, as_prompts, load_backend, main, run_concurrent, token_counts
from concurrent_prompts.backends.hints import hint
from concurrent_prompts.extras import stand_in
from concurrent_prompts.extras.stand_in import Options, serve
from concurrent_prompts.extras.stand_in_answers import DIALECT_FAULTS
from concurrent_prompts.extras.stand_in_dialects import DIALECTS, THOUGHT, WORDS, whole_seconds
from tests.helpers import LIBRARIES, NAMES, Clock, in_rows, rows

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
KEY = "sk-stand-in-0123456789"


@pytest.fixture(params=NAMES)
def backend(request):
    """The name of the backend under test."""
    pytest.importorskip(LIBRARIES.get(request.param, "asyncio"))
    return request.param


in_each = in_rows("dialect", DIALECTS)


async def results_of(dialect, backend, count=1, model="m", base=None, endpoint="chat", params=None, **options):
    """Run as many prompts against a stand-in server; return the results and the server."""
    async with serve(dialect=dialect, **options) as server:
        url = base(server.url) if base else server.url
        api = load_backend(backend, base_url=url, model=model, endpoint=endpoint, params=params)
        prompts, clock = [f"What is {number}?" for number in range(count)], Clock()
        options = {"concurrency": 2, "clock": clock, "sleep": clock.sleep, "max_attempts": 3}
        return await run_concurrent(prompts, api, **options), server


@in_each
async def test_an_answer_is_whole_and_its_usage_is_told(dialect, backend, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    results, server = await results_of(dialect, backend, 3, require_key=KEY)
    assert all(result.text.startswith("[made up") and result.finish_reason == "stop" for result in results)
    assert server.stats.answered == 3 and server.url.endswith(DIALECTS[dialect].address)
    for result in results:
        asked, made, cached, *_ = token_counts(result.usage)
        assert asked == 3 and cached == (asked // 2 if dialect == "deepseek" else 0)
        assert made == -(-len(result.text) // 4) + (THOUGHT if dialect == "gemini" else 0)
        assert result.as_row().get("more") is None, "an ordinary answer has nothing besides"


# What each fault comes to: the verdict, then by dialect what is said of it, where that is another type than the first.
COMES_TO = {
    "context": ("fail", "context_length_exceeded", {}),
    "content": ("fail", "content_filter", {}),
    "credit": ("stop", "insufficient_quota", {}),
    "key": ("stop", "invalid_api_key", {"openrouter": "http_401", "azure": "http_401", "litellm": "auth_error",
                                        "deepseek": "authentication_error", "llamacpp": "authentication_error"}),
}  # fmt: skip


@in_each
@in_rows("fault", COMES_TO)
async def test_a_fault_for_good(dialect, backend, fault):
    verdict, kind, others = COMES_TO[fault]
    (result,), server = await results_of(dialect, backend, fault={fault: 1.0})
    kind = others.get(dialect, kind)
    assert result.error and not result.error.retryable and server.stats.requests == 1, result.error
    assert result.exception.verdict == verdict and result.error.type in (kind, "invalid_api_key"), result.error
    assert hint(result.error)


@in_each
@pytest.mark.parametrize("fault", ["500", "busy", "cut"])
async def test_a_fault_that_passes(dialect, backend, fault):
    results, server = await results_of(dialect, backend, 12, fault={fault: 0.4}, seed=2)
    failed = [result for result in results if result.error]
    assert all(result.error.retryable for result in failed)
    met = server.stats.faults[fault]
    assert met > 1 and met > 3 * len(failed), "it was met, and not only by those who failed after three attempts"


@in_each
async def test_too_many_requests(dialect, backend, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1_795_901_100.0)  # a reset that is 10 ms ahead is still ahead when read
    async with serve(dialect=dialect, fault={"429": 1.0}) as server:
        api = load_backend(backend, base_url=server.url, model="m")
        async with api.open(1) as call:
            with pytest.raises(Exception) as failure:
                await call(api.prepare(*prompts_of("a")))
    assert (failure.value.verdict, failure.value.slow) == ("retry", True), failure.value
    assert (failure.value.wait is None) is (dialect in ("openai", "lmstudio", "deepseek", "llamacpp"))


@in_each
async def test_an_answer_with_nothing_in_it_is_kept_as_one(dialect, backend):
    (result,), server = await results_of(dialect, backend, fault={"empty": 1.0})
    assert result.error is None and result.text == "" and server.stats.requests == 1
    reasoned = dialect in ("lmstudio", "deepseek", "llamacpp")
    assert ("reasoning_content" in result.extra.get("more", {})) is reasoned


@in_each
async def test_events_that_nobody_asked_for_are_read(dialect, backend):
    (plain,), _ = await results_of(dialect, backend)
    (result,), _ = await results_of(dialect, backend, fault={"stream": 1.0})
    assert result.text == plain.text and result.usage.keys() == plain.usage.keys()


TELL_USAGE = {"openrouter", "deepseek", "groq"}  # in a stream, asked or not
STREAM = {"stream": True}


@in_each
@in_rows("endpoint", ["chat", "completions", "responses"])
async def test_a_stream_that_was_asked_for_is_read_as_one_answer(dialect, backend, endpoint):
    (plain,), _ = await results_of(dialect, backend, endpoint=endpoint)
    (result,), _ = await results_of(dialect, backend, endpoint=endpoint, params=STREAM)
    (told,), _ = await results_of(
        dialect, backend, endpoint=endpoint, params=STREAM | {"stream_options": {"include_usage": True}}
    )
    assert (result.text, result.finish_reason, result.extra) == (plain.text, plain.finish_reason, plain.extra)
    assert token_counts(told.usage) == token_counts(plain.usage)
    assert bool(result.usage) is (dialect in TELL_USAGE or endpoint == "responses")


@in_each
async def test_a_stream_that_fails(dialect, backend):
    for fault in ("context", "malformed"):  # before it has begun, and half way
        (result,), server = await results_of(dialect, backend, params=STREAM, fault={fault: 1.0})
        assert result.error.type == ("cut_off" if fault == "malformed" else "context_length_exceeded"), result.error
    results, server = await results_of(dialect, backend, 12, params=STREAM, fault={"cut": 0.4}, seed=2)
    assert server.stats.faults["cut"] and any(result.text and result.attempts > 1 for result in results)
    assert all(result.error is None or result.error.retryable for result in results)


@in_each
async def test_a_model_that_is_not_there_stops_the_run(dialect, backend):
    results, server = await results_of(dialect, backend, 5, models=("other",))
    assert {result.error.type for result in results if result.error.status} <= {"model_not_found", "NOT_FOUND",
                                                                                "DeploymentNotFound"}  # fmt: skip
    assert results[0].exception.verdict == "stop" and server.stats.requests <= 2


@in_each
async def test_a_path_that_is_not_there_stops_the_run(dialect, backend):
    def elsewhere(url):
        return re.sub(r"(:\d+)/?.*", r"\1/nowhere", url)

    results, server = await results_of(dialect, backend, 3, base=elsewhere)
    assert results[0].exception.verdict == "stop" and server.stats.requests <= 2
    assert "/nowhere/chat/completions" in results[0].error.message and hint(results[0].error)


TOLD = {"openai": 600, "azure": 600, "groq": 600, "litellm": 600}


@in_each
async def test_limits_are_learned_from_what_is_told(dialect, backend):
    async with serve(dialect=dialect, rpm=600, burst=1.0) as server:
        api = load_backend(backend, base_url=server.url, model="m")
        async with Run(api, concurrency=2) as run:
            (prompt,) = run.admit(iter(prompts_of("hi")))
            assert (await run.answer(prompt)).text
        known = " ".join(run.limiter.learned())
    assert ("600 requests/min" in known) is (dialect in TOLD), known


def prompts_of(*texts):
    return as_prompts(list(texts))


@in_rows("name", ["openrouter", "gemini", "azure", "litellm", "groq"])
async def test_a_wait_is_told_in_the_dialects_way(name, backend):
    async with serve(dialect=name, window=(1, 900.0), window_tells=("retry-after",)) as server:
        api = load_backend(backend, base_url=server.url, model="m")
        first, second = map(api.prepare, prompts_of("a", "b"))
        async with api.open(2) as call:
            await call(first)
            with pytest.raises(Exception) as failure:
                await call(second)
    assert failure.value.verdict == "retry" and 800 < failure.value.wait < 901, failure.value


@in_rows("params", [None, STREAM], ids=["blank lines", "comments"])
@in_rows("name", ["openai", "deepseek", "openrouter"])
async def test_signs_of_life(name, backend, params):
    (result,), server = await results_of(name, backend, latency=0.05, keep_alive=0.01, params=params)
    assert result.text and server.stats.requests == 1


async def test_what_fails_after_a_blank_line_comes_with_status_200(backend):
    (result,), _ = await results_of("openrouter", backend, latency=0.05, keep_alive=0.01, fault={"context": 1.0})
    assert result.error.type == "context_length_exceeded" and result.error.status in (200, 400)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_command_comes_through_with_faults(dialect, backend, stand_in, here):
    server = stand_in(dialect=dialect, fault={"content": 0.3, "busy": 0.2}, seed=1)
    (here / "p.txt").write_text("".join(f"What is {number}?\n" for number in range(12)))
    status = main(["p.txt", "-b", backend, "--base-url", server.url, "-m", "m", "-q", "-o", "out.jsonl"])
    found = rows("out.jsonl")
    assert status == 1 and len(found) == 12
    errors = {row["error"]["type"] for row in found if row["error"]}
    assert errors <= {"content_filter", "invalid_prompt", "content_policy_violation"} and errors
    assert 0 < sum(row["text"] is not None for row in found) < 12


# ---- The dialects themselves -------------------------------------------------------------------------------------


def ask(url, path, body=None, **headers):
    """Return the status, the headers and the body of a reply."""
    request = urllib.request.Request(url + path, data=body and json.dumps(body).encode(), headers=headers)
    try:
        with urllib.request.urlopen(request) as reply:
            return reply.status, dict(reply.headers), json.load(reply)
    except urllib.error.HTTPError as failure:
        return failure.code, dict(failure.headers), json.load(failure)


BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def test_azure_wants_its_version_and_its_key(stand_in):
    url, _, query = stand_in(dialect="azure", require_key="k").url.partition("?")
    assert ask(url, f"/chat/completions?{query}", BODY, **{"api-key": "k"})[0] == 200
    assert ask(url, "/chat/completions", BODY, **{"api-key": "k"})[2] == {
        "error": {"code": "404", "message": "Resource not found"}
    }
    assert ask(url, f"/chat/completions?{query}", BODY, Authorization="Bearer k")[0] == 401


def test_what_each_adds(stand_in):
    found = {name: ask(stand_in(dialect=name).url.partition("?")[0], "/chat/completions" + "?api-version=1" *
                       (name == "azure"), BODY)[2] for name in DIALECTS}  # fmt: skip
    assert found["openrouter"]["usage"]["cost"] > 0 and found["openrouter"]["choices"][0]["native_finish_reason"]
    assert found["azure"]["model"] != "m" and found["azure"]["prompt_filter_results"]
    assert found["groq"]["x_groq"] and found["groq"]["usage"]["queue_time"]
    assert found["llamacpp"]["timings"] and found["lmstudio"]["stats"] == {} and found["litellm"]["model"] != "m"
    assert found["openai"]["service_tier"] == "default" and "service_tier" not in found["gemini"]


def stream(url, **more):
    """Return the events that a chat is answered with: comments as they are, the data parsed."""
    request = urllib.request.Request(f"{url}/chat/completions", data=json.dumps(BODY | STREAM | more).encode())
    with urllib.request.urlopen(request) as reply:
        assert reply.headers["content-type"] == "text/event-stream" and reply.headers["x-request-id"]
        blocks = reply.read().decode().removesuffix("\n\n").split("\n\n")
    assert blocks.pop() == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) if block[0] == "d" else block for block in blocks]


def test_what_each_streams(stand_in):
    url = {name: stand_in(dialect=name).url for name in DIALECTS}
    chunks = stream(url["openai"], stream_options={"include_usage": True})
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["prompt_tokens"] == 1
    assert "usage" not in stream(url["openai"])[-1] and stream(url["openrouter"])[0] == ": OPENROUTER PROCESSING"
    last = {name: stream(url[name])[-1] for name in ("deepseek", "groq", "llamacpp", "openrouter")}
    assert last["deepseek"]["choices"][0]["finish_reason"] and last["deepseek"]["usage"]
    assert last["groq"]["x_groq"]["usage"] and "usage" not in last["groq"]
    assert last["llamacpp"]["timings"] and last["openrouter"]["usage"]["cost"]
    with urllib.request.urlopen(urllib.request.Request(
        url["azure"].replace("?", "/chat/completions?"), data=json.dumps(BODY | STREAM).encode()
    )) as reply:  # fmt: skip
        first = json.loads(reply.readline().decode().removeprefix("data: "))
    assert first["choices"] == [] and first["prompt_filter_results"]


def test_other_places_and_lists_of_models(stand_in):
    for name in ("deepseek", "litellm", "llamacpp"):
        server = stand_in(dialect=name)
        root = re.sub(r"(:\d+).*", r"\1", server.url)
        assert {ask(root + base, "/chat/completions", BODY)[0] for base in ("", "/v1")} == {200}
        assert ask(root, "/v1/models")[2]["object"] == "list"
        assert ask(root, "/v1/stand_in/stats")[2]["answered"] == 2


def test_lm_studio_answers_a_wrong_path_with_200(stand_in):
    root = stand_in(dialect="lmstudio").url.removesuffix("/v1")
    assert ask(root, "/chat/completions", BODY)[::2] == (
        200, {"error": "Unexpected endpoint or method. (POST /chat/completions)"}
    )  # fmt: skip


def test_the_tables_name_what_is_there():
    assert WORDS.keys() == DIALECTS.keys()
    kinds = {"key", "model", "path", "credit", "rate", "server", "busy", "context", "content", "cut"}
    assert all(words.keys() <= kinds for words in WORDS.values())
    assert [whole_seconds(text) for text in ("6m0s", "12ms", "1h0m1.5s", "0s")] == [360, 1, 3602, 0]
    assert all(re.search(rf"\b{word}\b", stand_in.__doc__) for word in (*DIALECTS, *DIALECT_FAULTS))
    with pytest.raises(ValueError, match="--dialect klingon is unknown; choose openai, openrouter"):
        Options(dialect="klingon")
