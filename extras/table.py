"""Tables: .csv and .tsv files of prompts, and `-o answers.csv` for a spreadsheet.

The columns' names are stripped, and what separates them is found from the header. The table is written at each end of a
run but a kill or a second Ctrl-C; what a run continues from is answers.csv.results.jsonl beside it. A text in which a
spreadsheet would see a formula gets a ' before it in the table, but not there.
"""

from __future__ import annotations

import argparse
import asyncio
import codecs
import collections
import contextlib
import csv
import itertools
import pathlib
import re
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any

from . import core
from .files import open_regular, replacing, unwritable
from .outputs import CarefulJournal
from .reading import Line
from .text import answer_of, cell

SEPARATORS = {".csv": ",", ".tsv": "\t"}
KNOWN = ",;\t|"  # what may separate the columns, as the header shows; German and French Excel write semicolons
EMPTY = b',;|" \t\r\n'  # the only characters in an empty row
# What a spreadsheet takes for a formula: https://owasp.org/www-community/attacks/CSV_Injection
FORMULA = re.compile("[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
LONGEST = 16 << 20  # bytes of the lines that one record may cover: longer than any model's context


def add_arguments(option: Callable[..., Any]) -> None:
    """Add nothing: a file's suffix asks for it."""


def create(args: argparse.Namespace) -> TableFile | None:
    """Return the extra if -o names a table, else None."""
    return TableFile(args) if pathlib.PurePath(args.output).suffix.lower() in SEPARATORS else None


class TableFile:
    """The results as a table beside the journal."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args, self._path = args, pathlib.Path(args.output)
        args.journal = f"{args.output}.results.jsonl"
        self._written = False

    def check(self) -> None:
        """Raise UsageError if the table cannot be written, or would replace another file."""
        check_table(self._path, pathlib.Path(self._args.journal), self._args.overwrite)

    @contextlib.asynccontextmanager
    async def session(self, run: core.Run) -> AsyncIterator[None]:
        """Read the columns' names before the first call, and write the table after the last one."""
        table = Table(prompts_of(self._args), SEPARATORS[self._path.suffix.lower()])
        yield
        journal = run.journal
        kept = journal.kept or journal.kept_errors
        if not (self._args.begun or kept or getattr(self._args, "shard", None)):
            return
        try:
            results = results_of(journal, map(run.api.prepare, prompts_of(self._args)))
            await table.write(self._path, results, journal.path)
            self._written = True
            self._args.facts["table"] = str(self._path)
        except OSError as failure:
            run.stop(core.disk_error(self._path, failure))

    def report(self, ran: list[core.Ran], status: int) -> Iterator[str]:
        """Yield the line that names the table."""
        if self._written:
            yield f"as a table in {self._path}"


class Table:
    """The results for a spreadsheet: the input's own columns as they were, then `text` and `error`.

    An input without columns has `id` and `prompt`; JSON objects have all their keys, in the order in which they come
    up. Raises UsageError where these are more than any spreadsheet takes.
    """

    MOST = 16_000

    def __init__(self, prompts: Iterable[core.Prompt], separator: str = ",") -> None:
        self._names: dict[str, None] = {}
        for prompt in prompts:
            self._names.update(dict.fromkeys(own_columns(prompt)))
            if len(self._names) > self.MOST:
                raise core.UsageError(f"{prompt.where}: more than {self.MOST:,} columns; use -o FILE.jsonl")
        to_text: Any = type("ToText", (), {"write": str})  # writerow returns what `write` does
        self._record = csv.writer(to_text, delimiter=separator).writerow
        self.head = self._line([*core.beside(("text", "error"), self._names), "text", "error"])

    def line(self, result: core.Result) -> bytes:
        """Return a result's record."""
        row, error = own_columns(result.prompt), result.error
        reason = error and f"{error.type}: {error.message}"
        return self._line([*map(row.get, self._names), answer_of(result), reason])

    def _line(self, values: Iterable[Any]) -> bytes:
        record: Any = self._record(map(harmless, values))  # ends with \r\n, so that either is quoted where it is data
        return f"{record[:-2]}\n".encode(errors="backslashreplace")

    async def write(self, path: pathlib.Path, results: Iterable[core.Result], *like: pathlib.Path) -> None:
        """Write the table, completely or not at all. Raises OSError if it cannot be written."""
        with replacing(path, *like) as file:
            file.write(codecs.BOM_UTF8 + self.head)  # by which Excel knows UTF-8
            for number, result in enumerate(results):
                file.write(self.line(result))
                if number % 1000 == 0:
                    await asyncio.sleep(0)  # a second Ctrl-C ends this, too


def harmless(value: Any) -> str:
    """Return a value as a field that no spreadsheet reads as a formula; numbers are unchanged."""
    text: str = cell(value)
    return f"'{text}" if isinstance(value, str) and FORMULA.match(text) else text


OPEN = core.Error("not_answered", "not sent yet, or the run was stopped", None, True)


def results_of(journal: CarefulJournal, prompts: Iterable[core.Prompt]) -> Iterator[core.Result]:
    """Yield the result of each prompt of the whole input: an answer, a failure, or OPEN."""
    for prompt, line in lines_of(journal, prompts):
        yield (core.result_in(line, prompt) if line else None) or core.Result(prompt, error=OPEN, done=False)


def lines_of(journal: CarefulJournal, prompts: Iterable[core.Prompt]) -> Iterator[tuple[core.Prompt, bytes]]:
    """Yield each prompt of the whole input with its line, or with b"" if it is still open."""
    rest: dict[str, Iterator[int]] = {}  # by the fingerprint, the lines of prompts that this run has not reached
    with journal.reading() as lines:
        for prompt in prompts:
            if (offset := journal.place(prompt.number)) is None:
                key = core.fingerprint(prompt)[:16]
                rest[key] = rest[key] if key in rest else iter(journal.unclaimed(key))
                offset = next(rest[key], -1)
            yield prompt, core.line_at(lines, offset) if offset >= 0 else b""


def own_columns(prompt: core.Prompt) -> dict[str, Any]:
    """Return the input's columns of a prompt, in their order; {} if its line could not be read."""
    if isinstance(prompt.row, dict):
        return prompt.row
    return {"id": prompt.id, "prompt": prompt.row} if isinstance(prompt.row, str) else {}


def check_table(path: pathlib.Path, journal: pathlib.Path, overwrite: bool) -> None:
    """Raise UsageError if a table cannot replace the file at `path`, or that is not an earlier table of this job."""
    if why := unwritable(path):
        raise core.UsageError(f"{why}; choose another file with -o")
    if not path.exists():
        return
    if not overwrite and not (journal.exists() and journal.stat().st_size):
        what = f"{path} holds something other than results (there is no {journal.name} beside it)"
        raise core.UsageError(f"{what}; choose another file with -o, or replace it (--overwrite)")
    try:
        open_regular(path, "r+b").close()
    except OSError as failure:
        advice = "close the program that has it open, or choose another file with -o"
        raise core.UsageError(f"cannot write {path}: {failure.strerror}; {advice}") from None


# ---- Reading ---------------------------------------------------------------------------------------------------


class Record(dict[str, str]):
    """A row of a table: all its values are texts, and none is a parameter of a request."""


def prompts_of(args: argparse.Namespace) -> Iterator[core.Prompt]:
    """Yield the prompts of the command's input."""
    return core.sibling("backends", "loading").prompts_of(args)  # type: ignore[no-any-return]


def rows(lines: Iterator[Line], suffix: str, name: str) -> Iterator[tuple[int, Any]]:
    """Yield the line number and the columns of each record below the header that is not empty."""
    before, separator, lines = found_separator(lines, SEPARATORS[suffix])
    records = csv_records(lines, separator)
    for line, header in itertools.islice(records, 1):
        names = checked_header(header, name, before + line)
    for line, record in records:
        if isinstance(record, core.Error):
            yield before + line, record
        elif not "".join(record).strip(f"{KNOWN} "):  # of another separator, too
            continue
        elif len(record) != len(names):
            text = f"{len(record)} fields, the header has {len(names)}"
            yield before + line, core.Error("unreadable", text)
        else:
            trailing = separator.endswith("  ")
            yield before + line, Record(zip(names, map(str.rstrip, record) if trailing else record, strict=True))


def found_separator(lines: Iterator[Line], usual: str) -> tuple[int, str, Iterator[Line]]:
    """Return how many lines stand before the header, what separates its columns, and the lines from it on.

    Excel's own line "sep=;" says it. Else it is what stands outside quotes most often, and the usual one if that is a
    tie. One blank after it means that blanks follow it which are part of no field, two that they come before it, too.
    """
    before, first = 0, b""
    for line in lines:
        if isinstance(line, core.Error):  # too long for any header
            return before, usual, itertools.chain([line], lines)
        first = line
        if first.strip():
            break
        before += 1
    if told := re.fullmatch(rb'"?sep=([,;|\t])"?\s*', first, re.IGNORECASE):
        return before + 1, told[1].decode(), lines
    bare = re.sub(r'"[^"]*"', "", first.decode(errors="replace"))
    best = max(KNOWN, key=lambda one: (bare.count(one), one == usual))
    parts = bare.split(best) if bare.count(best) else [bare]
    after = len(parts) > 1 and all(part.startswith(" ") for part in parts[1:])
    around = after and all(part.endswith(" ") for part in parts[:-1])
    separator = best if len(parts) > 1 else usual
    return before, separator + " " * (after + around), itertools.chain([first], lines)


def csv_records(lines: Iterator[Line], separator: str) -> Iterator[tuple[int, Any]]:
    """Yield the first line's number and the fields of each record; an Error stands for one that cannot be read.

    After such a one, reading goes on at its second line: an open quote may have swallowed good ones. How a quote ends
    depends on the lines below it alone. So where one ended badly, every later one that is open before that line does
    too; none looks for its end again, and no line is read more than a few times.
    """
    csv.field_size_limit(sys.maxsize if sys.maxsize < 2**32 else 2**31 - 1)  # a C long on Windows
    blanks, number, bad, reason = " " in separator, 1, 0, ""  # `bad` is the line in which a quote ended badly
    again: Iterator[Line] = iter(())  # what a record has swallowed
    record: list[Line] = []

    def wanted() -> Iterator[str]:
        size = 0
        for line in itertools.chain(again, lines):
            record.append(line)
            if isinstance(line, core.Error):
                raise csv.Error(line.message)
            yield line.decode(errors="surrogateescape")
            size += sys.getsizeof(line)
            if number + len(record) <= bad:
                raise csv.Error(reason)
            if size > LONGEST:
                raise csv.Error(f"a quote is opened here and still open in line {number + len(record) - 1}")

    while True:
        record.clear()
        try:
            fields: Any = next(csv.reader(wanted(), delimiter=separator[0], skipinitialspace=blanks, strict=True))
            "".join(fields).encode()
        except StopIteration:
            return
        except UnicodeEncodeError:
            fields = core.Error("unreadable", core.NOT_UTF8)
        except csv.Error as failure:
            last = number + len(record) - 1
            fields = core.Error("unreadable", csv_reason(str(failure), number, last))
            if last > number:
                bad, reason, again = last, fields.message, iter(record[1:])
                del record[1:]
        if len(record) > 1 or isinstance(record[0], core.Error) or not record[0].isspace():
            yield number, fields
        number += len(record)


def csv_reason(failure: str, first: int, last: int) -> str:
    """Return what is wrong with the record on these lines, in plainer words than csv.reader's."""
    if failure.startswith("unexpected end"):
        return "a quote is opened here and never closed"
    if failure.startswith("new-line"):
        failure = "a carriage return stands alone outside quotes"
    return failure if first == last or "opened" in failure else f"a quote is opened here; in line {last}, {failure}"


def checked_header(header: list[str] | core.Error, name: str, line: int) -> list[str]:
    """Return the columns' names. Raises UsageError if the header does not name them."""
    if isinstance(header, core.Error):
        raise core.UsageError(f"{name} line {line}, the header: {header.message}")
    if len(header) == 1 and header[0].startswith("#"):
        raise core.UsageError(f"{name} line {line} is a comment, not the columns' names; remove it (grep -v '^#')")
    names = [column.strip() for column in header]
    for place in [place for place, column in enumerate(names) if not column][1:]:  # Excel writes several
        names[place] = f"column {place + 1}"
    if twice := [column for column, count in collections.Counter(names).items() if count > 1]:
        raise core.UsageError(f"{name} has the column {twice[0][:60]!r} twice; rename one of them")
    return names


def count(lines: Iterable[bytes]) -> int:
    """Estimate how many records are below the header; line ends within quotes do not count."""
    records, quotes = -1, 0
    for line in lines:
        quotes += line.count(b'"')
        records += not quotes % 2 and bool(line.strip(EMPTY))
    return records
