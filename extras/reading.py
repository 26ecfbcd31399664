"""Files of prompts as people have them: packed, of another form than their name says, damaged, or no text at all.

What cannot be read is refused in a sentence before the first call, or costs its own line alone. Without this file the
core reads plain lines of UTF-8. What helps against the rarer kinds, and gzip, are in `inputs.py`.
"""

from __future__ import annotations

import codecs
import contextlib
import itertools
import os
import pathlib
import re
import zlib
from collections.abc import Iterator
from typing import IO, Any

from . import core, this
from .files import open_regular, other_than_file

BROKEN = (OSError, EOFError, zlib.error)  # what reading a file raises, and a gzip file that is cut short or damaged
LINE_MOST = 64 << 20  # bytes of a line: more than an API takes, pictures and all
TOO_LONG = core.Error("unreadable", f"longer than {LINE_MOST >> 20} MiB")
SKIPPED_MOST = 256 << 20  # bytes of a line without an end that are passed over before the rest of the file is given up
START = 4096  # bytes by which a file's form is known

Line = bytes | core.Error  # an Error stands for a line that cannot be one of prompts


@contextlib.contextmanager
def open_rows(path: str | os.PathLike[str], name: str) -> Iterator[tuple[Iterator[tuple[int, Any]], str]]:
    """Open a prompts file; yield its rows with their line numbers, and what messages call it.

    The last one is an Error if the file is damaged there. Raises UsageError where the file as a whole cannot be used.
    """
    with open_input(path, name) as (file, form, name):
        damage: list[tuple[int, core.Error]] = []
        lines, reader = sound_lines(file, name, damage, form), reader_of(form)
        rows = reader.rows(lines, form, name) if reader else core.line_rows(lines, form == ".jsonl")
        yield itertools.chain(rows, damage), name


@contextlib.contextmanager
def open_input(path: str | os.PathLike[str], name: str = "") -> Iterator[tuple[IO[bytes], str, str]]:
    """Open a prompts file; yield it as bytes after any byte order mark, its form (a suffix) and its name."""
    with contextlib.ExitStack() as stack:
        name = name or str(path)
        if name == "-":
            path, name = stack.enter_context(core.sibling("extras", "inputs", core.STDIN).spooled()), core.STDIN
        if kind := other_than_file(path):  # a pipe can be read only once, and this is not the only look at it
            advice = "pass what it holds as standard input, with - for PROMPTS"
            advice = "name a file" if kind.startswith(("a directory", "a link")) else advice
            raise core.UsageError(f"{name} is not a regular file but {kind}; {advice}")
        try:
            file: Any = stack.enter_context(open_regular(path, buffering=1 << 16))
            if file.peek(2)[:2] == b"\x1f\x8b":
                file = stack.enter_context(core.sibling("extras", "inputs", f"{name}, a gzip file,").Unpacked(file))
            start = file.peek(START)[:START]
            file.seek(len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0)
        except BROKEN as failure:
            raise core.UsageError(f"cannot read {name}: {getattr(failure, 'strerror', None) or failure}") from None
        if why := no_text(name, start):
            raise core.UsageError(why)
        yield file, form_of(name, start.removeprefix(codecs.BOM_UTF8)), name


def no_text(name: str, start: bytes) -> str:
    """Return why a file that begins so is no text; '' if it is."""
    bad = "\ufffd" in start.decode(errors="replace")
    if not bad and b"\0" not in start and (b"\n" in start or b"\r" not in start) and start[:2] not in b"ve<!<h[{{\\":
        return ""
    with contextlib.suppress(core.UsageError):
        return str(core.sibling("extras", "inputs").unreadable(name, start))
    return f"{name} holds binary data or UTF-16" if start.count(0) * (len(start) if bad else 8) >= len(start) else ""


# ---- Forms -----------------------------------------------------------------------------------------------------


def form_of(name: str, start: bytes) -> str:
    """Return ".csv", ".tsv", ".jsonl" or ".txt": from the name, else (standard input) from the first character."""
    suffix = pathlib.PurePath(name.lower().removesuffix(".gz")).suffix
    if suffix == ".txt" or reader_of(suffix):
        return suffix
    line, whole, _ = start.lstrip().partition(b"\n")
    first, parsed = line[:1], core.parse_json
    array = first == b"[" and (suffix == ".json" or not whole or line.strip() == b"[" or parsed(line) is not None)
    indented = first == b"{" and whole and (parsed(line) is None if suffix == ".json" else line.strip() == b"{")
    if suffix in (".json", ".jsonl", ".ndjson") and (array or indented):
        form = "one JSON array" if array else "indented JSON"
        raise core.UsageError(f"{name} is {form}; put each object on a line (jq -c '{'.[]' if array else '.'}' {name})")
    quoted = first == b'"' and isinstance(parsed(line), str)  # '"Why?", she asked' is text
    if first == b'"' and not whole and len(start) > START - 4:  # is its string still open?
        quoted = re.fullmatch(rb'"(?:[^"\\]|\\.)*+\\?', line) is not None
    return ".jsonl" if suffix in (".jsonl", ".ndjson") or first == b"{" or quoted else ".txt"


def reader_of(suffix: str) -> Any:
    """Return the file of extras/ that reads files of that suffix, None if they are lines of text or of JSON.

    Raises UsageError for a table if it is missing.
    """
    name = next((name for name, signs in this.INDEX.items() if suffix and suffix in signs), "")
    return core.sibling("extras", name, f"a {suffix} file") if name else None


# ---- Lines -----------------------------------------------------------------------------------------------------


def sound_lines(file: IO[bytes], name: str, damage: list[tuple[int, core.Error]], form: str = "") -> Iterator[Line]:
    """Yield the lines up to where the file is damaged, if it is; an Error for one that is too long, or none.

    The damage is added to the list, with the line number.
    """
    number, as_text = 0, form == ".txt"
    try:
        while line := file.readline(LINE_MOST + 1):
            number += 1
            if len(line) > LINE_MOST:
                yield TOO_LONG
                skip_line(file, line)
            elif as_text and b"\r" in line and b"\r" in line.rstrip(b"\r\n"):
                yield core.Error("unreadable", "a carriage return stands alone (tr '\\r' '\\n')")
            else:
                yield line
    except BROKEN as failure:
        damage.append((number + 1, core.Error("unreadable", f"{name} ends here: {failure}")))


def skip_line(file: IO[bytes], line: bytes) -> None:
    """Read on to the end of a line that has begun so. Raises EOFError if that is not within reach."""
    size = len(line)
    while line and not line.endswith(b"\n"):
        if size > SKIPPED_MOST:
            raise EOFError(f"the line before has no end within {SKIPPED_MOST >> 20} MiB")
        line = file.readline(START)
        size += len(line)
