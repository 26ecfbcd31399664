"""Keys: where they come from, where they may go, and *** for them in every text.

A key is read from the environment and goes into the header of a request, nowhere else. Over plain http it goes to this
machine without a word, to a private network with a warning, and elsewhere only if that is allowed.
"""

from __future__ import annotations

import base64
import functools
import os
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from . import core, named_proxy, reach_of


def environment_key(variable: str, wanted: bool) -> str:
    """Return the key in the environment variable. Raises UsageError if it is not a key, or `wanted` but missing."""
    key = os.environ.get(variable, "")
    if wanted and not key:
        name = variable if re.fullmatch("[A-Z0-9_]+", variable) else "the variable that --api-key-env names"
        raise core.UsageError(f"{name} is not set; export it, or try --demo, which needs no key")  # it may be the key
    if not key.isascii() or not key.isprintable() or " " in key:
        raise core.UsageError(f"{variable} contains characters that no key can have; set it again")
    return key


def request_headers(base_url: str, key: str) -> dict[str, str]:
    """Return the headers of every request, from the official SDK's environment variables."""
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    headers["User-Agent"] = f"concurrent_prompts/{core.__version__}"
    if key:
        headers |= {"api-key": key} if "/deployments" in base_url else {"Authorization": f"Bearer {key}"}  # Azure's
    for header, name in (("OpenAI-Organization", "OPENAI_ORG_ID"), ("OpenAI-Project", "OPENAI_PROJECT_ID")):
        if os.environ.get(name):
            headers[header] = os.environ[name]
    for line in os.environ.get("OPENAI_CUSTOM_HEADERS", "").splitlines():
        header, colon, text = line.partition(":")
        if colon and header.strip():  # replaces one of ours, in upper or lower case
            headers = {name: value for name, value in headers.items() if name.lower() != header.strip().lower()}
            headers[header.strip()] = text.strip()
    for header, text in headers.items():
        if not re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", header, re.ASCII) or not re.fullmatch(r"[\t -~]*", text):
            what = f"the header {core.short(header)} contains characters that HTTP does not allow"
            raise core.UsageError(f"{what}; check the variables OPENAI_*")
    return headers


PLAIN_HEADERS = re.compile(
    "accept(-encoding|-language)?|anthropic-(beta|version)|content-type|(http-)?referer|"
    "openai-(beta|organization|project)|user-agent|x-title",
    re.IGNORECASE,
)
SECRET_NAME = re.compile(
    "access|auth|bearer|cookie|cred|jwt|key|login|pass|pwd|saml|secret|session|sig|token|"
    "^code$|(?<![a-z])(?:hmac|otp|pat|pin|sas|sid)(?![a-z])",
    re.IGNORECASE,
)
SECRET_LENGTH = 8  # of a header's value whose name does not sound secret
ORDINARY = re.compile("auto|default|disabled|enabled|false|none|null|production|staging|true", re.IGNORECASE)
NAMED = {"&": "amp", "<": "lt", ">": "gt", '"': "quot", "'": "apos"}  # characters in HTML
APART = "\"'<>\\,;& \t\r\n"  # what may end a word in a text
AUTH_SCHEME = re.compile("(?:apikey|basic|bearer|digest|token) +(?=[^ ])", re.IGNORECASE)


def split_query(query: str) -> tuple[str, str]:
    """Split a query into the items that belong to the request and those whose names sound secret."""
    items = query.removeprefix("?").split("&")
    secret = [item for item in items if SECRET_NAME.search(urllib.parse.unquote(item.partition("=")[0]))]
    plain = "&".join(item for item in items if item not in secret)
    return plain and f"?{plain}", "&".join(secret)


def secrets_of(headers: Mapping[str, str], login: str) -> dict[str, str]:
    """Return the secret headers and items of the query by what messages call them.

    A header is secret if its name sounds so or its value is long, unless it is one that is known to be plain.
    """
    found = {}
    for name, text in headers.items():
        least = 1 if SECRET_NAME.search(name) else SECRET_LENGTH
        if len(text) >= least and not PLAIN_HEADERS.fullmatch(name):
            found[f"the header {name}"] = text
    for item in login.split("&"):
        name, _, text = item.partition("=")
        found[f"{name}= of the base URL"] = text
    return {name: text for name, text in found.items() if text and not ORDINARY.fullmatch(text)}


def concealer(key: str, secrets: Iterable[str]) -> Callable[[str], str]:
    """Return a function that puts *** for the key, the secrets and the proxies' logins in a text.

    It finds them escaped too (in JSON, HTML or a URL), and cut off, as long as 12 characters are left. It takes time
    in proportion to the text, whatever that holds.
    """
    words = {key}
    for value in secrets:
        scheme = AUTH_SCHEME.match(value)
        value = value[scheme.end() :] if scheme else value  # not the "Bearer"
        words |= {value, *(word for word in re.findall(r"[^\s;,=]{8,}", value) if not ORDINARY.fullmatch(word))}
        if scheme and scheme[0].lower().startswith("basic"):
            words |= login_forms(decoded_login(value))
    for name, url in os.environ.items():
        if name.lower().endswith("_proxy") and "@" in url:
            words |= login_forms(url.rpartition("@")[0].split("://", 1)[-1])
    words |= {decode(word) for decode in (urllib.parse.unquote, urllib.parse.unquote_plus) for word in words}
    words = {word for word in words if len(word) >= 4}  # "x" is no secret
    return functools.partial(re.compile(pattern_of(words) if words else "(?!)").sub, "***")


def login_forms(login: str) -> set[str]:
    """Return user:password, which may be percent-encoded, the password alone, and what Basic authentication sends."""
    login += "" if ":" in login else ":"
    forms = {login, login.removesuffix(":"), urllib.parse.unquote(login)}
    coded = [form.encode(coding, "replace") for form in forms for coding in ("utf-8", "latin-1")]
    passwords = {form.partition(":")[2] for form in forms}
    return forms | passwords | {base64.b64encode(form).decode() for form in coded}


def decoded_login(text: str) -> str:
    """Return what Basic authentication has as base64, or ''."""
    try:
        return base64.b64decode(text).decode("utf-8", "replace")
    except ValueError:
        return ""


def secret_variables(*names: str) -> set[str]:
    """Return the names of the environment variables that hold a secret: those given, our own, copies of their values.

    A proxy's address is one if it holds a password.
    """
    given = {"OPENAI_CUSTOM_HEADERS", *map(str.upper, names)}  # Windows knows no small letters
    found = {name for name in os.environ if name.upper() in given}
    found |= {name for name in os.environ if "OPENAI" in name.upper() and SECRET_NAME.search(name)}
    secrets = {os.environ[name] for name in found if len(os.environ[name]) >= 8}
    for name, value in os.environ.items():
        login = name.lower().endswith("_proxy") and "@" in value
        in_query = name in ("OPENAI_BASE_URL", "OPENAI_API_BASE") and split_query(value.partition("?")[2])[1]
        if login or in_query or any(secret in value for secret in secrets):
            found.add(name)
    return found


class PublicEnvironment:
    """Context manager: take all secrets out of the environment while processes are started, which inherit it.

    `names` are variables that hold one besides the usual, `more` variables to be set instead. Any number of them may
    overlap, in any threads; the last to end puts everything back.
    """

    _lock, _users, _before = threading.Lock(), 0, dict[str, str | None]()

    def __init__(self, *names: str, **more: str) -> None:
        self._names, self._more = names, more

    def __enter__(self) -> None:
        with self._lock:
            PublicEnvironment._users += 1
            for name in secret_variables(*self._names):
                self._before.setdefault(name, os.environ.pop(name))
            for name, value in self._more.items():
                self._before.setdefault(name, os.environ.get(name))
                os.environ[name] = value

    def __exit__(self, *failure: Any) -> None:
        with self._lock:
            PublicEnvironment._users -= 1
            for name, value in self._before.items() if not self._users else ():
                os.environ.pop(name, None)
                os.environ.update({} if value is None else {name: value})
            if not self._users:
                self._before.clear()


def pattern_of(words: Iterable[str]) -> str:
    """Return a pattern of these words, the longest first, as JSON, HTML and URLs write them, whole or cut off.

    Of what is cut off 12 characters must be there. All that follows without a space or the like is taken for the rest:
    it may belong to another form of the word, and a pattern of a long key would take long to compile.
    """
    alike = re.escape("".join(sorted({one for word in words for one in word if one not in APART})))
    signs = re.escape("".join(sorted({one for word in words for one in word if not one.isalnum()})) or "/")
    coded = rf"%[\da-f]{{2}}|&(?:#x?[\da-f]{{1,9}}|{'|'.join(NAMED.values())});|\\{{1,9}}+u[\da-f]{{4}}"
    rest = rf"(?:(?i:{coded})|\\{{1,9}}+[{signs}]|[{alike}])*+"
    whole, cut = [], []
    for word in sorted(sorted(words), key=len, reverse=True):
        apart = any(one in APART for one in word)
        parts = spelled(word if apart else word[:12])
        if apart or len(word) <= 12:
            whole.append("".join(parts))
        if len(word) > 12:
            cut.append("".join([*parts[:12], *(f"(?:{part})?" for part in parts[12:]), rest]))
    found = "|".join(whole + cut)
    starts = "".join({form[0] for word in words for form in (word, word[0].encode().decode("latin-1"))})
    return rf"(?=[{re.escape(starts)}\\%&])(?:{found})"  # most places are passed over by one character


def spelled(word: str) -> list[str]:
    """Return a pattern for each character of a word, and one for each run of backslashes.

    Such a run counts as one, and takes what it finds for good: there would be too many ways to divide it.
    """
    parts: list[str] = []
    run = False
    for part in re.findall(r"\\+|[^\\]", word):
        raw = part[0].encode("utf-8", "replace")
        octets = "".join(f"%{octet:02x}" for octet in raw)
        escapes = rf"{octets}|&#(?:{ord(part[0])}|x0{{0,6}}{ord(part[0]):x});"
        if part[0] in NAMED:
            escapes += f"|&{NAMED[part[0]]};"
        least, run = 0 if run else 1, part[0] == "\\"  # a run before has taken this one's, too
        if run:
            parts.append(rf"(?i:\\{{1,32}}+(?:u005c)?+|{escapes}){{1,{len(part)}}}+")
        else:
            quoted = "" if part.isalnum() else rf"|\\{{1,9}}+{re.escape(part)}"
            plain = "|".join(re.escape(form) for form in {part, raw.decode("latin-1")})  # as `Api.read` takes bodies
            parts.append(rf"(?:(?i:\\{{{least},9}}+u{ord(part):04x}|{escapes}){quoted}|{plain})")
    return parts


def exposure(base_url: str, secret: str, allowed: bool) -> str:
    """Return the warning that a secret would cross a network unencrypted, or ''.

    The way to a proxy counts too. Raises UsageError if the network is the open one and that is not allowed.
    """
    try:
        urls = [base_url, *filter(None, [named_proxy(base_url)])]
        hosts = [urllib.parse.urlsplit(url).hostname or "" for url in urls]
    except ValueError:
        raise core.UsageError("the proxy that the environment names is not of the form http://host:port") from None
    reach = [reach_of(host) for host in hosts]
    place = " through the proxy ".join(hosts if reach[-1] != "loopback" else hosts[:1])
    if "public" in reach and not allowed:
        directly = "" if reach[0] == "public" else f" name {hosts[0]} in NO_PROXY,"
        advice = f"write https:// in the base URL,{directly} or give --allow-http if the network is trusted"
        raise core.UsageError(f"{secret} would go to {place} unencrypted; {advice}")
    if reach == ["loopback"]:
        return ""
    return f"{secret} goes to {place} unencrypted; write https:// in the base URL if that is possible"


def without_secrets(word: str) -> str:
    """Return a word of the command line without what sounds secret in a URL's query."""
    before, mark, query = word.partition("?")
    kept, secret = split_query(query)
    return before + kept if mark and secret else word
