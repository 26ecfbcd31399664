"""What the libraries' own exceptions mean, made by the libraries themselves where they are installed."""

import asyncio
import contextlib
import importlib
import itertools
import socket

import pytest

from concurrent_prompts import PromptError, as_prompt_error, run_concurrent
from tests.helpers import in_rows, virtual


def library(name):
    """Return a module that may be missing; the test is skipped then."""
    return pytest.importorskip(name)


def exchange(package, status, body=None, headers=None):
    """Return a response of httpx or httpx2, whichever the library builds on."""
    http = library(package)
    request = http.Request("POST", "https://api.example/v1/chat")
    return http.Response(status, headers=headers or {}, json=body, request=request)


def http_of(sdk):
    """Return the name of the HTTP library that an SDK builds on."""
    sdk = library(sdk)
    return sdk.APIConnectionError.__init__.__annotations__["request"].partition(".")[0]


def status_error(sdk, name, status, inner, headers=None, whole=False):
    body = {"type": "error", "error": inner} if whole else inner
    made = getattr(library(sdk), name)
    return made(inner["message"], response=exchange(http_of(sdk), status, body, headers), body=body)


def openai_event(message="m", **inner):
    """What the SDK raises for an error event in a stream: an APIError without a response."""
    openai = library("openai")
    request = exchange(http_of("openai"), 200).request
    return openai.APIError(message, request=request, body={"message": message, **inner} if inner else None)


def openai_unfit():
    return library("openai").APIResponseValidationError(exchange(http_of("openai"), 200, {"x": 1}), body={"x": 1})


def claude(status, kind, message="m", headers=None):
    name = {400: "BadRequestError", 401: "AuthenticationError", 429: "RateLimitError", 200: "APIStatusError"}
    name = name.get(status, "InternalServerError")
    return status_error("anthropic", name, status, {"type": kind, "message": message}, headers, whole=True)


def gemini(code, status, message="m", details=()):
    errors = library("google.genai.errors")
    body = {"error": {"code": code, "message": message, "status": status, "details": [*details]}}
    return (errors.ServerError if code >= 500 else errors.ClientError)(code, body, None)


def google(name, text="m", **more):
    return getattr(library("google.api_core.exceptions"), name)(text, **more)


def google_wait():
    detail = library("google.rpc.error_details_pb2").RetryInfo()
    detail.retry_delay.seconds = 9
    return google("ResourceExhausted", details=[detail])


def aws(code, status=None, name="ClientError", headers=None):
    meta = {"HTTPStatusCode": status, "HTTPHeaders": headers or {}} if status else {}
    reply = {"Error": {"Code": code, "Message": "m"}, "ResponseMetadata": meta}
    return getattr(library("botocore.exceptions"), name)(reply, "Converse")


def boto(name, **more):
    return getattr(library("botocore.exceptions"), name)(**more)


def rpc(code, details="m", trailing=()):
    grpc, aio = library("grpc"), library("grpc.aio")
    return aio.AioRpcError(getattr(grpc.StatusCode, code), aio.Metadata(), aio.Metadata(*trailing), details=details)


def chained(*failures, implicit=False):
    for outer, inner in itertools.pairwise(failures):
        setattr(outer, "__context__" if implicit else "__cause__", inner)
    return failures[0]


def timed_out():
    return library("openai").APITimeoutError(request=exchange(http_of("openai"), 200).request)


def gave_up():
    tenacity = library("tenacity")
    attempt = tenacity.Future(3)
    attempt.set_exception(TimeoutError("slow"))
    return tenacity.RetryError(attempt)


def unlike_json(status):
    aiohttp = library("aiohttp")
    info = aiohttp.RequestInfo("https://api.example", "POST", {}, "https://api.example")
    return aiohttp.ContentTypeError(info, (), status=status, message="unexpected mimetype: text/html")


LIMITED = {"retry-after": "7"}
DELAY = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "37s"}
LOW = "Your credit balance is too low to access the Anthropic API."
NO_SERVER = "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:9: Connection refused"
# what is raised: its type, verdict, status and wait; 'slow' where it is a limit's
KNOWN = {
    "openai event, server": (lambda: openai_event(type="server_error", code=None), "server_error retry 200"),
    "openai event, limit": (lambda: openai_event(code="rate_limit_exceeded"), "rate_limit_exceeded retry 200 slow"),
    "openai event, quota": (lambda: openai_event(code="insufficient_quota"), "insufficient_quota stop 200"),
    "openai event, length": (lambda: openai_event(code="context_length_exceeded"), "context_length_exceeded fail 200"),
    "openai event, nothing": (openai_event, "no_answer retry 200"),
    "openai, unfit": (openai_unfit, "malformed_reply retry 200"),
    "openai 429": (
        lambda: status_error("openai", "RateLimitError", 429, {"message": "m"}, LIMITED), "http_429 retry 429 slow 7.0",
    ),
    "openai time-out": (timed_out, "timeout retry None"),
    "anthropic stream, busy": (lambda: claude(200, "overloaded_error"), "overloaded_error retry 200"),
    "anthropic stream, fault": (lambda: claude(200, "api_error"), "api_error retry 200"),
    "anthropic stream, key": (lambda: claude(200, "authentication_error"), "invalid_api_key stop 200"),
    "anthropic 529": (lambda: claude(529, "overloaded_error"), "overloaded_error retry 529 slow"),
    "anthropic credit": (lambda: claude(400, "invalid_request_error", LOW), "insufficient_quota stop 400"),
    "anthropic 429": (lambda: claude(429, "rate_limit_error", headers=LIMITED), "rate_limit_error retry 429 slow 7.0"),
    "genai, delay": (
        lambda: gemini(429, "RESOURCE_EXHAUSTED", details=[DELAY]), "RESOURCE_EXHAUSTED retry 429 slow 37.0",
    ),
    "genai 503": (lambda: gemini(503, "UNAVAILABLE"), "UNAVAILABLE retry 503 slow"),
    "genai key": (lambda: gemini(400, "INVALID_ARGUMENT", "API key not valid."), "invalid_api_key stop 400"),
    "genai 400": (lambda: gemini(400, "INVALID_ARGUMENT"), "INVALID_ARGUMENT fail 400"),
    "google 429": (lambda: google("ResourceExhausted"), "RESOURCE_EXHAUSTED retry 429 slow"),
    "google 429, delay": (google_wait, "RESOURCE_EXHAUSTED retry 429 slow 9.0"),
    "google 503": (lambda: google("ServiceUnavailable"), "UNAVAILABLE retry 503 slow"),
    "google 504": (lambda: google("DeadlineExceeded"), "DEADLINE_EXCEEDED retry 504"),
    "google 401": (lambda: google("Unauthenticated"), "invalid_api_key stop 401"),
    "google 400": (lambda: google("InvalidArgument"), "INVALID_ARGUMENT fail 400"),
    "google unknown": (lambda: google("Unknown"), "UNKNOWN retry 500"),
    "google gave up": (
        lambda: google("RetryError", cause=google("InternalServerError")), "INTERNAL retry 500",
    ),
    "aws throttled": (
        lambda: aws("ThrottlingException", 429, headers={"Retry-After": "7"}), "ThrottlingException retry 429 slow 7.0",
    ),
    "aws throttled, 400": (lambda: aws("ThrottlingException", 400), "ThrottlingException retry 400 slow"),
    "aws stream": (
        lambda: aws("throttlingException", name="EventStreamError"), "throttlingException retry 429 slow",
    ),
    "aws 503": (lambda: aws("ServiceUnavailableException", 503), "ServiceUnavailableException retry 503 slow"),
    "aws loading": (lambda: aws("ModelNotReadyException", 429), "model_loading retry 429"),
    "aws invalid": (lambda: aws("ValidationException", 400), "ValidationException fail 400"),
    "aws no key": (lambda: boto("NoCredentialsError"), "invalid_api_key stop None"),
    "aws time-out": (lambda: boto("ReadTimeoutError", endpoint_url="u"), "timeout retry None"),
    "aws lost": (lambda: boto("ConnectionClosedError", endpoint_url="u"), "connection_error retry None"),
    "grpc limit": (lambda: rpc("RESOURCE_EXHAUSTED"), "RESOURCE_EXHAUSTED retry 429 slow"),
    "grpc pushback": (
        lambda: rpc("UNAVAILABLE", trailing=[("grpc-retry-pushback-ms", "7000")]), "UNAVAILABLE retry 503 slow 7.0",
    ),
    "grpc refused": (lambda: rpc("UNAVAILABLE", NO_SERVER), "unreachable retry None"),
    "grpc lost": (lambda: rpc("UNAVAILABLE", "Socket closed"), "connection_error retry None"),
    "grpc late": (lambda: rpc("DEADLINE_EXCEEDED"), "DEADLINE_EXCEEDED retry 504"),
    "grpc invalid": (lambda: rpc("INVALID_ARGUMENT"), "INVALID_ARGUMENT fail 400"),
    "grpc key": (lambda: rpc("UNAUTHENTICATED"), "invalid_api_key stop 401"),
    "httpx URL": (lambda: library("httpx").UnsupportedProtocol("no http://"), "UnsupportedProtocol fail None"),
    "httpx pool": (lambda: library("httpx").PoolTimeout("full"), "timeout retry None"),
    "httpx 429": (
        lambda: library("httpx").HTTPStatusError("m", request=None, response=exchange("httpx", 429, headers=LIMITED)),
        "http_429 retry 429 slow 7.0",
    ),
    "aiohttp, no JSON": (lambda: unlike_json(200), "malformed_reply retry 200"),
    "aiohttp, no JSON, 502": (lambda: unlike_json(502), "http_502 retry 502"),
    "wrapped": (lambda: chained(RuntimeError("mine"), timed_out()), "timeout retry None"),
    "wrapped twice": (lambda: chained(KeyError(), ValueError(), TimeoutError("slow")), "timeout retry None"),
    "wrapped implicitly": (lambda: chained(KeyError(), TimeoutError("slow"), implicit=True), "timeout retry None"),
    "wrapped ours": (lambda: chained(KeyError(), PromptError("k", "m", "stop")), "k stop None"),
    "given up": (gave_up, "timeout retry None"),
    "a group": (lambda: ExceptionGroup("g", [ConnectionResetError("reset")]), "connection_error retry None"),
    "a group in a group": (lambda: ExceptionGroup("g", [ExceptionGroup("h", [TimeoutError()])]), "timeout retry None"),
    "a group with a bug": (lambda: ExceptionGroup("g", [TimeoutError(), KeyError("k")]), "KeyError fail None"),
    "a group, the limit counts": (
        lambda: ExceptionGroup("g", [TimeoutError(), claude(429, "rate_limit_error", headers=LIMITED)]),
        "rate_limit_error retry 429 slow 7.0",
    ),
    "a wrapped group": (lambda: chained(RuntimeError(), ExceptionGroup("g", [TimeoutError()])), "timeout retry None"),
    "a bug of one's own": (lambda: chained(KeyError("k"), LookupError("l")), "KeyError fail None"),
}  # fmt: skip


@in_rows(("make", "expected"), KNOWN.values(), ids=KNOWN)
def test_what_a_librarys_exception_means(make, expected):
    found = as_prompt_error(make())
    told = [found.error.type, found.verdict, found.error.status, "slow" if found.slow else "", found.wait or ""]
    assert " ".join(filter(None, map(str, told))) == expected and found.error.message
    assert found.heard == (found.error.status is not None)


def test_what_was_handled_and_is_no_part_of_the_failure():
    failure = KeyError("k")
    failure.__context__, failure.__suppress_context__ = TimeoutError(), True
    assert as_prompt_error(failure).verdict == "fail"


def test_causes_in_a_circle_come_to_an_end():
    one, other = KeyError("one"), KeyError("other")
    one.__cause__, other.__cause__ = other, one
    assert as_prompt_error(one).verdict == "fail"


# ---- Refused connections, by the libraries themselves ----------------------------------------------------------


async def by_openai(url):
    async with library("openai").AsyncOpenAI(api_key="k", base_url=url, max_retries=0) as client:
        await client.models.list()


async def by_anthropic(url):
    async with library("anthropic").AsyncAnthropic(api_key="k", base_url=url, max_retries=0) as client:
        await client.models.list()


async def by_genai(url):
    options = {"base_url": url, "retry_options": {"attempts": 1}}
    client = library("google.genai").Client(api_key="k", http_options=options)
    await client.aio.models.get(model="m")


async def by_httpx(url):
    async with library("httpx").AsyncClient() as client:
        await client.get(url)


async def by_aiohttp(url):
    async with library("aiohttp").ClientSession() as session, session.get(url):
        pass


async def by_requests(url):
    await asyncio.to_thread(library("requests").get, url)


async def by_urllib(url):
    await asyncio.to_thread(importlib.import_module("urllib.request").urlopen, url)


async def by_botocore(url):
    config = library("botocore.config").Config(retries={"total_max_attempts": 1})
    settings = {"region_name": "r", "aws_access_key_id": "i", "aws_secret_access_key": "s", "config": config}
    client = library("botocore.session").Session().create_client("sts", endpoint_url=url, **settings)
    await asyncio.to_thread(client.get_caller_identity)


async def by_grpc(url):
    async with library("grpc.aio").insecure_channel(url.removeprefix("http://")) as channel:
        await channel.unary_unary("/a/b")(b"", timeout=20)


WAYS = [by_openai, by_anthropic, by_genai, by_httpx, by_aiohttp, by_requests, by_urllib, by_botocore, by_grpc]


@in_rows("way", WAYS, ids=lambda way: way.__name__.removeprefix("by_"))
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
async def test_a_refused_connection_is_an_outage_whichever_library_meets_it(way):
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(Exception) as caught:
        await way(url)
    found = as_prompt_error(caught.value)
    assert (found.error.type, found.verdict) == ("unreachable", "retry"), caught.value


@virtual
async def test_a_wrapped_refusal_is_waited_for():
    calls = []

    async def send(prompt):
        calls.append(prompt)
        if 5 < len(calls) < 20:
            raise chained(RuntimeError("mine"), OSError("all attempts failed"), ConnectionRefusedError(111, "no"))
        return prompt

    clock = asyncio.get_running_loop().time
    results = await run_concurrent([*"abcdefghij"], send, max_attempts=2, concurrency=2, clock=clock)
    assert [result.text for result in results] == [*"abcdefghij"]
