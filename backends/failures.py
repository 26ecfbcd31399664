"""What a failure means: this prompt has failed, asking again may help, or every prompt would fail.

`http_error` classifies an error response by its code and words, else by its status; the header `x-should-retry`
overrides everything but a verdict that stops the run. `classified` classifies an exception. The codes and words that
servers and libraries use are in the tables of `meanings.py`. The core calls this module if it is there; a lone copy of
the core goes by the status alone.

A verdict is "fail" (this prompt has failed), "retry" (the same request may succeed later) or "stop" (every prompt would
fail, so the run ends).
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import email.utils
import errno
import functools
import itertools
import json
import math
import re
import ssl
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from . import core, meanings
from .exceptions import KEYLESS, REFUSED, UNSENDABLE, class_names, is_refused, members, told_by, wrapped_in

# A server writes what it likes. Only so much of it is read.
HEADER_MOST = 200  # characters of a header's value
MESSAGE_MOST = 4000  # characters of an error's message
ERROR_MOST = 64 * 1024  # bytes of a body that holds no answer; the rest is cut off
LONGEST_WAIT = 1e9  # seconds
AWAY = 7200.0  # seconds: a limit that resets later than this is not waited out, since it may last a day
STOPPING = tuple(meaning for meaning in meanings.MEANINGS if meaning.verdict == "stop")
CODES = "error_type", "error_code", "reason"  # where TGI, Databricks and Novita put the code
TITLE = re.compile(r"<title>([^<]{,1000}+)</title>", re.IGNORECASE)
TAG = re.compile(r"<[^<>]{,1000}+>")


def header(headers: Mapping[str, str], name: str) -> str:
    """Return the value of a header, at most HEADER_MOST characters of it; '' if it is missing."""
    value = headers.get(name)
    return value[:HEADER_MOST] if isinstance(value, str) else ""


# ---- Replies -------------------------------------------------------------------------------------------------


def http_error(status: int, headers: Mapping[str, str], body: bytes | str | Any) -> core.PromptError:
    """Classify an error response: return a PromptError with its type, message, verdict and, for a retry, the wait.

    `headers` have lower-case names; `body` is bytes, text or parsed JSON. At most ERROR_MOST bytes are parsed, so the
    body kept in `http` is None if it is longer; what is nested deeper than DEEPEST is replaced by null.
    """
    if isinstance(body, bytes | str):
        data = core.shallow(core.parse_json(body[: ERROR_MOST]), core.DEEPEST)
    else:
        body = data = core.shallow(body, core.DEEPEST)
    code, message = error_of(data)
    message = message or page_title(body) or f"HTTP {status}"
    meaning = meaning_of(status, code, message, data)
    verdict = judged(status, meaning, header(headers, "x-should-retry"))
    kind = kind_of(meaning, code) or f"http_{status}"
    if verdict != "stop" and exceeds(message):
        verdict, kind = "fail", "larger_than_limit"
    if 300 <= status < 400:
        kind, message = "redirect", f"HTTP {status}, redirected to {header(headers, 'location') or 'nowhere'}"
    told, message = message, core.short(message)
    if status == 401 and header(headers, "www-authenticate").lower().startswith("basic"):
        message += " (WWW-Authenticate: Basic)"
    error = core.PromptError(kind, message, verdict, status, (status, header(headers, "x-request-id"), data))
    error.headers = headers
    return passing(error, meaning, told, status in meanings.SLOW_STATUSES)


def passing(
    error: core.PromptError, meaning: meanings.Meaning | None, message: str, slow: bool = False
) -> core.PromptError:
    """Fill in when a temporary failure may be retried, and whether a rate limit caused it; return the error.

    `message` is the server's whole message, `slow` whether the status alone means a rate limit.
    """
    if error.verdict == "retry":
        data = error.http[2] if error.http else None
        error.loading = meaning is meanings.LOADING
        error.useless = int(meaning is meanings.GENERATED)  # it is billed: two attempts at the most
        crowded = bool(meanings.AT_ONCE_WORDS.search(message))
        error.slow = (slow or crowded or meaning is meanings.RATE) and meaning not in (meanings.LOADING, meanings.FLEX)
        error.scope = "tokens" if meanings.TOKENS_TEXT.search(f"{data}{message}") else "requests"
        error.wait = asked_wait(error.headers, message, data)
        number = meanings.AT_ONCE.search(message)
        error.at_once = int(number[1]) if number and error.slow else 0
        if error.slow and error.error.status != 503 and (error.wait or 0.0) > AWAY:
            return hours_away(error, error.wait or 0.0)
    return error


def hours_away(error: core.PromptError, wait: float) -> core.PromptError:
    """Turn the error into one that stops the run, since the limit resets too late; its message says when."""
    span = f"{wait / 3600:.0f} h" if wait < 48 * 3600 else f"{wait / 86400:.0f} days"
    moment = time.localtime(time.time() + min(wait, 2 * meanings.RESET_MOST))
    when = f", at {time.strftime('%Y-%m-%d %H:%M', moment)}" if wait < meanings.RESET_MOST else ""
    message = f"{error.error.message} (the limit resets in {span}{when})"
    error.error = error.error._replace(type="limit_for_hours", message=message)
    error.args, error.verdict = (message,), "stop"
    return error


def meaning_of(status: int, code: str, message: str, data: Any = None) -> meanings.Meaning | None:
    """Look up what a code and a message mean; return None if only the status says anything."""
    if status == 403 and has_reasons(data):
        return meanings.CONTENT
    for meaning in meanings.MEANINGS:
        told = status in meaning.statuses
        if code and (told or meaning.anywhere) and meaning.codes.fullmatch(code):
            return meaning
        if told and meaning.words.search(message):
            return meaning
    return None


def kind_of(meaning: meanings.Meaning | None, code: str) -> str:
    """Return the type of an error with that meaning, or '' if it has to be named by its status."""
    if meaning is None or not meaning.kind or meaning.own.fullmatch(code):
        return core.short(code, 60)
    return meaning.kind


def has_reasons(data: Any) -> bool:
    """Tell whether a 403 says what is wrong with this input, as OpenRouter's moderation does."""
    inner = data.get("error") if isinstance(data, dict) else None
    metadata = inner.get("metadata") if isinstance(inner, dict) else None
    return isinstance(metadata, dict) and bool(metadata.get("reasons") or metadata.get("flagged_input"))


def judged(status: int, meaning: meanings.Meaning | None, should_retry: str) -> str:
    """Return the verdict of an error; x-should-retry ("true" or "false") overrides all but "stop"."""
    if meaning and not 300 <= status < 400 and (meaning.verdict == "stop" or should_retry not in ("true", "false")):
        return meaning.verdict
    return verdict_of(status, should_retry)


def verdict_of(status: int, should_retry: str = "") -> str:
    """Return the verdict of a status alone."""
    if 300 <= status < 400 or (status in meanings.STOP_STATUSES and should_retry != "true"):
        return "stop"
    passing = (status in meanings.RETRY_STATUSES or status >= 500) and should_retry != "false"
    return "retry" if passing or should_retry == "true" else "fail"


def exceeds(message: str) -> bool:
    """Tell whether the message says that the request alone exceeds a limit, so that it can never succeed."""
    if found := meanings.LIMIT_TEXT.search(message):
        limit, requested = found[1], found[2]
    elif found := meanings.REQUESTED_TEXT.search(message):
        requested, limit = found[1], found[2]
    else:
        return False
    return as_number(requested) > as_number(limit)


def as_number(text: str) -> int:
    """Parse a number with separators between thousands, or with the suffix k or m: 12,903, 12_903, 30k."""
    digits = re.sub("[,_]", "", text.lower())
    return int(digits.rstrip("km")) * {"k": 1000, "m": 1_000_000}.get(digits[-1], 1)


def error_in_answer(data: Any) -> core.PromptError:
    """Classify an error that came with HTTP 200 by its words; one that says nothing is retried."""
    code, message = error_of(data)
    meaning = meaning_of(200, code, message, data)
    if meaning is not meanings.PATH and (status := status_in(data)):  # Zhipu's names another status for a wrong path
        return http_error(status, {}, data)
    verdict = meaning.verdict if meaning else "retry"
    if meaning is None and code and isinstance(data, dict) and data.get("status") == "failed":
        verdict = "fail"  # a Responses object that failed for good
    told = core.short(message) or "HTTP 200 with an error in it"
    error = core.PromptError(kind_of(meaning, code) or "no_answer", told, verdict, 200, (200, "", data))
    return passing(error, meaning, message)


def error_without_call(body: bytes) -> core.PromptError:
    """Classify an error for which a bulk backend has no HTTP status, because no call was made or none was reported."""
    code, message = error_of(core.shallow(core.parse_json(body[: ERROR_MOST]), core.DEEPEST))
    meaning = meaning_of(200, code, message)
    verdict = meaning.verdict if meaning else "fail"
    error = core.PromptError(kind_of(meaning, code) or "no_answer", core.short(message) or "no answer", verdict)
    error.heard = True
    return error


def is_error(data: Any) -> bool:
    """Tell whether a reply (a JSON object) is an error in one of the known forms."""
    error, base = data.get("error"), data.get("base_resp")
    if error and not (isinstance(error, dict) and not any(error.values())):  # {"code": 0, "message": ""}
        return True
    told = isinstance(base, dict) and bool(base.get("status_code"))  # MiniMax sends it with an empty answer
    return told or data.get("object") == "error" or data.get("type") == "error"


def status_in(data: Any) -> int:
    """Return the HTTP status that the body of an HTTP 200 names in one of the usual fields, or 0."""
    outer = data if isinstance(data, dict) else {}
    inner = inner_of(data)
    base = outer.get("base_resp")
    if isinstance(base, dict):
        return meanings.MINIMAX.get(as_int(base.get("status_code")), 0)
    names = "code", "status_code", "statusCode", "status"
    for number in map(as_int, (*(inner.get(name) for name in names), outer.get("code"))):
        if 400 <= number < 600:
            return number
        if 40000 <= number < 60000:  # FastChat's five digits: the first three are a status
            return {40301: 404, 40302: 400, 40303: 400}.get(number, number // 100)
    return 0


def as_int(value: Any) -> int:
    """Return an int, or a text of up to nine digits, as an int; 0 for everything else."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        return int(value)
    return value if type(value) is int else 0


def inner_of(data: Any) -> dict[str, Any]:
    """Return the object within an error body that holds the code and the message, in any of the known forms."""
    data = data[0] if isinstance(data, list) and data else data  # Gemini sends a list
    if not isinstance(data, dict):
        return {}
    several = data.get("errors")
    first = several[0] if isinstance(several, list) and several else several
    for inner in (data.get("error"), first, data.get("fault")):
        if isinstance(inner, dict) and inner:
            below = inner.get("error")
            return below if isinstance(below, dict) and below else inner  # one gateway's error within another's
    base = data.get("base_resp")
    return {"message": base.get("status_msg")} if isinstance(base, dict) else data


def error_of(data: Any) -> tuple[str, str]:
    """Return the code and the message of an error body, or ''; of the message at most MESSAGE_MOST characters."""
    inner = inner_of(data)
    outer = data[0] if isinstance(data, list) and data else data
    plain = outer.get("error") if isinstance(outer, dict) else None
    if plain and not isinstance(plain, dict | bool) and inner is outer:
        more = inner.get("message") or inner.get("error_description")
        text = plain if isinstance(plain, str) else str(core.shallow(plain, core.DEEPEST))
        code = plain if more and isinstance(plain, str) and re.fullmatch(r"\w{1,60}", plain) else code_in(inner)
        return code, f"{text}: {more}"[: MESSAGE_MOST] if isinstance(more, str) else text[: MESSAGE_MOST]
    given = [inner[name] for name in meanings.MESSAGES if inner.get(name)]
    message = next((one for one in given if isinstance(one, str)), given[0] if given else "")  # Apigee's: object
    text = message if isinstance(message, str) else json.dumps(core.shallow(message, core.DEEPEST))
    metadata = inner.get("metadata")
    raw = metadata.get("raw") if isinstance(metadata, dict) else None  # what OpenRouter's provider said
    text = f"{text}: {raw}" if raw and isinstance(raw, str) else text
    return code_in(inner), text[: MESSAGE_MOST]


def code_in(inner: Mapping[str, Any]) -> str:
    """Return the code of an error: of several, one that stops the run, else the first that is not a number."""
    details = inner.get("details")
    details = list(filter(dict_like, details[:10])) if isinstance(details, list) else []
    reasons = [one.get("reason") for one in details] + [id for one in details for id in quotas_in(one)]
    status = inner.get("status")
    google = status if isinstance(status, str) and re.fullmatch("[A-Z_]{4,40}", status) else None
    amazon = str(inner.get("__type") or "").rpartition("#")[2]  # com.amazon.coral.service#ThrottlingException
    given = inner.get("code"), inner.get("type"), *reasons[:9], google, *map(inner.get, CODES), amazon
    codes = [str(code)[: HEADER_MOST] for code in given if code and isinstance(code, str | int)]
    codes = [code for code in codes if not code.isdigit() and code not in meanings.SAY_NOTHING]
    stopping = (code for code in codes for meaning in STOPPING if meaning.codes.fullmatch(code))
    return next(stopping, codes[0] if codes else "")


def quotas_in(detail: Mapping[str, Any]) -> list[Any]:
    """Return the daily limits that one of Google's `details` names; its limits of a minute add nothing to a 429."""
    several = detail.get("violations")
    found = [one.get("quotaId") for one in several[:10] if isinstance(one, dict)] if isinstance(several, list) else []
    return [name for name in found if isinstance(name, str) and "PerDay" in name]


def asked_wait(
    headers: Mapping[str, str], message: str, data: Any = None, now: Callable[[], float] = time.time
) -> float | None:
    """Return the seconds that a reply asks to wait, by its headers, body or message in this order; None if unknown.

    The order within the headers is that of the official SDK: retry-after-ms, then retry-after as a number or a date.
    The result is at most LONGEST_WAIT. `now` returns Unix time.
    """
    told = itertools.chain(waits_of(headers, now), waits_in(data, now), waits_worded(message, now))
    return next((min(wait, LONGEST_WAIT) for wait in told if 0 < wait < math.inf), None)


def waits_of(headers: Mapping[str, str], now: Callable[[], float]) -> Iterator[float]:
    """Yield the waits in the headers, in seconds, the most reliable first."""
    with contextlib.suppress(ValueError):
        yield float(header(headers, "retry-after-ms")) / 1000
    yield after_wait(header(headers, "retry-after"), now)
    for name, unit in meanings.WAIT_HEADERS.items():
        with contextlib.suppress(ValueError):
            yield unit * float(header(headers, name))
    for name, left in meanings.RESETS.items():
        if header(headers, left) in ("", "0"):
            yield reset_wait(header(headers, name), headers)[0]
    both = header(headers, "ratelimit")
    left_in, reset = meanings.LEFT_TEXT.search(both), meanings.RESET_TEXT.search(both)
    if reset and left_in and not int(left_in[1]):
        yield float(reset[1])


def after_wait(text: str, now: Callable[[], float]) -> float:
    """Return the seconds in a Retry-After: a number, a date, or 1m30s (in no standard); 0.0 if there are none."""
    try:
        number = float(text.partition(",")[0] if text[:1].isdigit() else text)  # two proxies may each add a value
    except ValueError:
        span = seconds(text) if text[:1].isdigit() and text[-1:] in "smh" else None
        return span or (moment_of(text) or now()) - now()
    return number - now() if meanings.DATE_LEAST < number < 20 * meanings.DATE_LEAST else number


def waits_in(data: Any, now: Callable[[], float]) -> Iterator[float]:
    """Yield the waits in an error body, in seconds: in the error, in its details, and beside it."""
    inner, outer = inner_of(data), data[0] if isinstance(data, list) and data else data
    details, outer = inner.get("details"), outer if isinstance(outer, dict) else {}
    metadata = inner.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    parts = [inner, metadata, *(details[:10] if isinstance(details, list) else ())]
    for part in filter(dict_like, [*parts, outer, outer.get("parameters"), outer.get("detail")]):
        for name in part.keys() & meanings.WAIT_KEYS.keys():
            yield meanings.WAIT_KEYS[name] * span_of(part[name])
        for name in part.keys() & meanings.WHEN_KEYS:
            yield reset_wait(str(part[name])[: HEADER_MOST], {})[0]
    if dict_like(metadata.get("headers")):  # OpenRouter reports its own limits there
        yield from waits_of({str(name).lower(): str(value) for name, value in metadata["headers"].items()}, now)


def dict_like(value: Any) -> bool:
    """Tell whether a value is a dict that is not empty."""
    return isinstance(value, dict) and bool(value)


def span_of(value: Any) -> float:
    """Return the number in a field: a number, text, a duration such as 6m0s, or Google's {"seconds": N}; else 0.0."""
    if isinstance(value, dict):
        value = value.get("seconds")
    if isinstance(value, str):
        value = value[: HEADER_MOST]
        try:
            return seconds(value) or float(value)
        except ValueError:
            return 0.0
    return float(value) if type(value) in (int, float) and abs(value) < 1e300 else 0.0


def waits_worded(message: str, now: Callable[[], float]) -> Iterator[float]:
    """Yield the waits in the words of a message, in seconds."""
    for found in meanings.WAIT_TEXT.finditer(message):
        yield span_at(message, found.end())
    if clock := meanings.CLOCK_TEXT.search(message):
        yield 3600 * int(clock[1]) + 60 * int(clock[2]) + int(clock[3])
    if one := meanings.ONE_TEXT.search(message):
        yield meanings.UNITS[one[1][0].lower()]
    if date := meanings.BEIJING_TEXT.search(message):
        yield moment_of(f"{date[1] or date[2]}+08:00") - now()
    if chinese := meanings.CHINESE_WAIT.search(message):
        yield int(chinese[1]) * meanings.UNITS[chinese[2][0]]
    if date := meanings.DATE_TEXT.search(message):
        yield moment_of(date[1]) - now()


def span_at(text: str, start: int) -> float:
    """Return the seconds of a span such as "2 hours and 5 minutes" that begins at `start`; 0.0 if there is none."""
    total = 0.0
    for _ in range(6):
        if not (found := meanings.SPAN.match(text, start)):
            break
        unit = found[2].lower()
        total += float(found[1].replace(",", "")) * meanings.UNITS["ms" if unit.startswith(("ms", "mil")) else unit[0]]
        start = found.end()
    return total


def seconds(text: str) -> float | None:
    """Return the seconds in a Go duration such as '6m0s' or '599ms', or None."""
    parts = meanings.DURATION.findall(text)
    try:
        return sum(float(number) * meanings.UNITS[unit] for number, unit in parts) if parts else None
    except ValueError:
        return None


def reset_wait(text: str, headers: Mapping[str, str]) -> tuple[float, bool]:
    """Return the seconds until a limit resets (0.0 if the text does not say), and whether the text is a date.

    The forms are '6m0s', '12', '2026-11-21T00:00:00Z', 'Sat, 21 Nov 2026 00:00:00 GMT', and Unix time in seconds or
    milliseconds.
    """
    wait = seconds(text) or 0.0
    moment = 0.0
    if not wait and text:
        try:
            wait = float(text)
        except ValueError:
            moment = moment_of(text)
        if meanings.DATE_LEAST < wait < meanings.DATE_MOST:
            moment, wait = wait, 0.0
            while moment > 1000 * meanings.DATE_LEAST:
                moment /= 1000
    if moment:
        # By the server's clock, if the header `date` shows it: ours may differ.
        wait = moment - (moment_of(header(headers, "date")) or time.time())
    return (wait if 0 < wait < meanings.RESET_MOST else 0.0), moment > 0


@functools.lru_cache(maxsize=16)
def moment_of(text: str) -> float:
    """Return the Unix time of a date in the form of ISO 8601 or HTTP, or 0.0; a date without a zone is UTC."""
    for parse in (datetime.datetime.fromisoformat, email.utils.parsedate_to_datetime):
        with contextlib.suppress(ValueError, OverflowError, TypeError):
            found = parse(text)
            return (found if found.tzinfo else found.replace(tzinfo=datetime.UTC)).timestamp()
    return 0.0


def page_title(body: bytes | str | Any) -> str:
    """Return the title of a web page, or else the first 120 characters of a text, received instead of JSON."""
    start = body[: ERROR_MOST] if isinstance(body, bytes | str) else str(body or "")
    text = start.decode("utf-8", "replace") if isinstance(start, bytes) else start
    title = TITLE.search(text)
    return core.short(title[1] if title else TAG.sub(" ", text[:2000]), 120)


# ---- Exceptions ----------------------------------------------------------------------------------------------


def classified(failure: Exception, text: str) -> core.PromptError:
    """Classify an exception with that text, by the first known exception among it and its causes.

    Of a group the worst counts. An unknown class fails this prompt alone, with the name of the class as its type.
    """
    if isinstance(failure, ExceptionGroup):
        several = [one for one in members(failure) if isinstance(one, Exception)]
        found = [core.as_prompt_error(one) for one in several]
        return max(found, key=lambda error: (WORST.index(error.verdict), error.slow, error.wait or 0.0))
    causes = [*wrapped_in(failure)]
    for cause in causes:
        if isinstance(cause, ExceptionGroup) and cause is not failure:
            return classified(cause, text)
        if isinstance(cause, core.PromptError) and cause is not failure:
            return copy.copy(cause)
        said = text if cause is failure else core.short(core.text_of(cause))
        if (error := of_library(cause, said, causes)) is not None:
            return error
    return core.PromptError(core.short(type(failure).__name__, 60), text or core.short(type(failure).__name__, 60))


WORST = "retry", "fail", "stop"


def of_library(failure: BaseException, said: str, causes: list[BaseException]) -> core.PromptError | None:
    """Classify one of the known exceptions, with the text `said`; return None for any other class."""
    names, text = class_names(failure), said or core.short(type(failure).__name__, 60)
    if any("ssl.SSLCertVerificationError" in class_names(cause) for cause in causes):
        return core.PromptError("certificate", text, "stop")
    if any(getattr(cause, "errno", None) in (errno.EMFILE, errno.ENFILE) for cause in causes):
        return core.PromptError("too_many_files", text, "retry")
    if (told := told_by(failure)) is not None:
        return of_reply(*told, text)
    if names & UNSENDABLE:
        return core.PromptError(core.short(type(failure).__name__, 60), text)
    if names & KEYLESS:
        return core.PromptError("invalid_api_key", text, "stop")
    lost = names & meanings.LOST_CONNECTIONS or getattr(failure, "errno", None) in meanings.NO_ROUTE
    if lost and (kind := lasting(causes, text)):
        return core.PromptError(kind, text, "stop")
    if names & meanings.TIMEOUTS:
        return core.PromptError("timeout", said or "no answer in time", "retry")
    if lost:
        kind = "unreachable" if is_refused(failure) else "connection_error"
        return core.PromptError(kind, text, "retry")
    if isinstance(failure, json.JSONDecodeError) and read_by(failure) in meanings.LIBRARIES:
        return core.PromptError("malformed_reply", text, "retry")
    return None


def of_reply(status: int, headers: Mapping[str, str], body: Any, text: str) -> core.PromptError:
    """Classify the reply that a library's exception holds; `text` is the message if the body has none."""
    if status == 503 and meanings.GRPC_LOST.search(f"{body}"):  # written by gRPC itself, not by a server
        kind = "unreachable" if REFUSED.search(f"{body}") else "connection_error"
        return core.PromptError(kind, error_of(body)[1] or text, "retry")
    if not 200 <= status < 300:
        return http_error(status, headers, body or text)
    if isinstance(body, dict) and is_error(body):
        error = error_in_answer(body)
        error.headers = headers
        return error
    error = core.PromptError("malformed_reply", text, "retry", status)
    error.useless = 1  # it is billed: two attempts at the most
    return error


def read_by(failure: BaseException) -> str:
    """Return the package that called the JSON parser: a library reads a server's reply, the user's code anything."""
    frames = [frame.f_globals.get("__name__") or "" for frame, _ in traceback.walk_tb(failure.__traceback__)]
    packages = [name.partition(".")[0] for name in frames]
    return next((name for name in reversed(packages) if name not in ("json", "simplejson", "orjson")), "")


def lasting(causes: list[BaseException], text: str) -> str:
    """Return the type of a connection error that no retry mends: the URL's scheme, or a proxy that refuses; else ''."""
    texts = [text, *(core.text_of(cause)[: MESSAGE_MOST] for cause in causes if isinstance(cause, ssl.SSLError))]
    if any(map(meanings.NOT_TLS.search, texts)):
        return "plain_https"
    if meanings.TLS_ALERT.search(text):
        return "plain_http"
    return "proxy_refused" if meanings.PROXY_REFUSAL.search(text) else ""
