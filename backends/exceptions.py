"""Read libraries' exceptions: the reply, or the connection error, that they were raised for.

`told_by` finds a status, headers and a body, `wrapped_in` the causes. `failures.py` classifies them.
"""

from __future__ import annotations

import errno
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from . import core

Told = tuple[int, Mapping[str, str], Any]  # a status, headers and a body

MOST = 20  # causes, and members of groups, that are read: they may form a circle

# The HTTP status of a gRPC status: https://github.com/googleapis/googleapis/blob/master/google/rpc/code.proto
GRPC = {
    "CANCELLED": 499, "UNKNOWN": 500, "INVALID_ARGUMENT": 400, "DEADLINE_EXCEEDED": 504, "NOT_FOUND": 404,
    "PERMISSION_DENIED": 403, "UNAUTHENTICATED": 401, "RESOURCE_EXHAUSTED": 429, "FAILED_PRECONDITION": 400,
    "ABORTED": 409, "OUT_OF_RANGE": 400, "UNIMPLEMENTED": 501, "INTERNAL": 500, "UNAVAILABLE": 503, "DATA_LOSS": 500,
}  # fmt: skip
# Bedrock's, which come in an event stream without a status:
# https://docs.aws.amazon.com/bedrock/latest/APIReference/API_runtime_ResponseStream.html
AWS = {
    "throttling": 429, "internalserver": 500, "serviceunavailable": 503, "modeltimeout": 408, "modelstreamerror": 424,
    "modelnotready": 429, "validation": 400,
}  # fmt: skip
# The client itself refuses the URL or the request: nothing was sent
UNSENDABLE = {
    f"{package}.{name}" for package in ("httpx", "httpx2")
    for name in ("UnsupportedProtocol", "LocalProtocolError", "InvalidURL")
} | {"aiohttp.InvalidURL", "requests.InvalidURL", "requests.MissingSchema", "requests.InvalidSchema"}  # fmt: skip
# The client has no key
KEYLESS = {"botocore.NoCredentialsError", "botocore.PartialCredentialsError", "google.DefaultCredentialsError"}
UNHEARD = {"openai.APIConnectionError", "anthropic.APIConnectionError"}  # the SDKs' errors without a reply
REFUSED = re.compile(r"\bconnection refused\b|\bECONNREFUSED\b|\bactively refused\b", re.IGNORECASE)


def told_by(failure: BaseException) -> Told | None:
    """Return the status, the headers and the body in an exception, or None if it has no status."""
    for name in class_names(failure):
        if name in READERS and (told := READERS[name](failure)):
            return told
    reply: Any = getattr(failure, "response", None)  # openai.APIStatusError, httpx.HTTPStatusError
    reply = failure if reply is None else reply
    status = getattr(reply, "status_code", None) or getattr(reply, "status", None)  # aiohttp.ClientResponseError
    body = getattr(failure, "body", None)
    return as_told(status, getattr(reply, "headers", None), body)


def as_told(status: Any, headers: Any, body: Any) -> Told | None:
    """Return them if the status is one of HTTP; headers in lower case, none if they are no mapping."""
    if not isinstance(status, int) or isinstance(status, bool) or not 100 <= status < 600:
        return None
    if type(headers) is dict:
        headers = {str(name).lower(): text for name, text in headers.items()}
    return int(status), headers if hasattr(headers, "get") else {}, body


def from_google_genai(failure: Any) -> Told | None:
    """google-genai's APIError: a code, and the whole body as `details`."""
    return as_told(failure.code, getattr(failure.response, "headers", None), failure.details)


def from_google_api(failure: Any) -> Told | None:
    """google.api_core's: a code, and messages of protobuf as `details`, of which a RetryInfo has the wait."""
    body: dict[str, Any] = {"message": str(failure.message), "status": getattr(failure.grpc_status_code, "name", None)}
    for detail in itertools.islice(failure.details or (), MOST):
        delay = getattr(detail, "retry_delay", None)
        if delay is not None:
            body["details"] = [{"retryDelay": f"{delay.seconds + delay.nanos / 1e9}s"}]
    name = class_names(failure)
    status = failure.code or (500 if "google.Unknown" in name else None)
    return as_told(status, getattr(failure.response, "headers", None), {"error": body})


def from_aws(failure: Any) -> Told | None:
    """botocore's ClientError: its `response` is a dict; an error in an event stream has a code alone."""
    reply = failure.response
    error, meta = reply.get("Error") or {}, reply.get("ResponseMetadata") or {}
    code = str(error.get("Code") or "")
    status = meta.get("HTTPStatusCode") or AWS.get(code.lower().removesuffix("exception"))
    body = {"error": {"code": code, "message": error.get("Message") or reply.get("message") or code}}
    return as_told(status, meta.get("HTTPHeaders"), body)


def from_grpc(failure: Any) -> Told | None:
    """grpc's RpcError, which has a code and details if it is a call's."""
    if not callable(getattr(failure, "code", None)):
        return None
    name, details = failure.code().name, str(failure.details() or "")
    trailing = failure.trailing_metadata() or () if hasattr(failure, "trailing_metadata") else ()
    headers = {key: value for key, value in trailing if isinstance(value, str)}
    if (pushback := headers.get("grpc-retry-pushback-ms", "")).isdigit():
        headers["retry-after-ms"] = pushback
    return as_told(GRPC.get(name), headers, {"error": {"status": name, "message": details or name}})


def from_sdk(failure: Any) -> Told | None:
    """The error of an event in a stream, as the SDKs of OpenAI and Anthropic raise it: no response, or HTTP 200."""
    if hasattr(failure, "response") or class_names(failure) & UNHEARD:
        return None
    return 200, {}, {"error": failure.body if isinstance(failure.body, dict) else {"message": str(failure)}}


READERS: dict[str, Callable[[Any], Told | None]] = {
    "google.APIError": from_google_genai,
    "google.GoogleAPICallError": from_google_api,
    "botocore.ClientError": from_aws,
    "grpc.RpcError": from_grpc,
    "openai.APIError": from_sdk,
    "anthropic.APIError": from_sdk,
}


def wrapped_in(failure: BaseException, hidden: bool = False) -> Iterator[BaseException]:
    """Yield the exception and those that it was raised from, or while they were handled, the outermost first.

    Also those that are `hidden` by "from None", if that is asked for: libraries do so, too.
    """
    seen: set[int] = set()
    behind: BaseException | None = failure
    while behind is not None and id(behind) not in seen and len(seen) < MOST:
        seen.add(id(behind))
        yield behind
        context = behind.__context__ if hidden or not behind.__suppress_context__ else None
        behind = from_retrying(behind) or behind.__cause__ or context


def from_retrying(failure: Any) -> BaseException | None:
    """Return what a library that has tried several times met the last time: google.api_core's, tenacity's."""
    names = class_names(failure)
    if "google.RetryError" in names:
        return failure.cause  # type: ignore[no-any-return]
    if "tenacity.RetryError" in names:
        return failure.last_attempt.exception()  # type: ignore[no-any-return]
    return None


def members(failure: BaseException) -> list[BaseException]:
    """Return the exceptions in a group, nested ones included; for any other exception, itself."""
    found, groups = list[BaseException](), [failure]
    while groups and len(found) < MOST:
        one = groups.pop(0)
        if isinstance(one, BaseExceptionGroup):
            groups += one.exceptions
        else:
            found.append(one)
    return found


def is_refused(failure: BaseException) -> bool:
    """Tell whether a connection was refused, as a library's exception or one that it was raised from says."""
    leaves = [leaf for cause in wrapped_in(failure, hidden=True) for leaf in members(cause)]
    numbers = {getattr(leaf, "errno", None) for leaf in leaves if isinstance(leaf, OSError)}
    plain = errno.ECONNREFUSED in numbers or any(isinstance(leaf, ConnectionRefusedError) for leaf in leaves)
    return plain or any(map(REFUSED.search, map(core.text_of, leaves)))


def class_names(failure: BaseException) -> set[str]:
    """Return the names of an exception's class and its bases, each behind its top-level package: httpx.ReadTimeout."""
    return {f"{base.__module__.partition('.')[0]}.{base.__name__}" for base in type(failure).__mro__}
