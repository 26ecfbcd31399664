"""Standard output: text to read on a terminal, else JSON Lines, or as --format says.

With a results file `--format text` prints the answers as well, earlier runs' too, when the run has ended. On a terminal
that is so for up to 10 prompts without being asked for.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import re
import shutil
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from . import core

loading = core.sibling("backends", "loading")
console = core.sibling("backends", "console")

FEW = 10  # prompts, whose answers are printed on a terminal even if they are kept in a file


def add_arguments(option: Callable[..., Any]) -> None:
    """Add the flag."""
    option("--format", choices=("text", "jsonl", "csv"), metavar="NAME",
           help="form of -o -: text, jsonl or csv; text with a results file: print the answers, too")  # fmt: skip


def create(args: argparse.Namespace) -> Answers | None:
    """Set what prints the answers, or return it if they are kept in a file."""
    if args.format and args.compare:
        raise core.UsageError("--compare writes no results file; leave out --format")
    if args.format not in (None, "text") and args.output != "-":
        raise core.UsageError("--format is for standard output (-o -); a file's suffix says its form (-o FILE.csv)")
    if args.output != "-":
        if args.format:
            check_stdout()
        asked = args.format or (sys.stdout and sys.stdout.isatty() and not args.quiet)
        return Answers(args) if asked and not args.compare else None
    if args.format == "csv":
        core.sibling("extras", "table", "--format csv")
        args.printer = table_printer
    elif args.format == "text" or (args.format is None and args.output == "-" and sys.stdout and sys.stdout.isatty()):
        args.printer = lambda args: standard_output(args, as_text)
    return None


def standard_output(args: argparse.Namespace, form: Callable[[core.Result], bytes] = core.Result.as_line) -> Printer:
    """Return what prints the answers in that form. Raises UsageError where they cannot be printed as asked."""
    if args.retry_failed or args.overwrite:
        advice = "leave out --retry-failed and --overwrite, or name a file (-o)"
        raise core.UsageError(f"standard output keeps nothing: {advice}")
    check_stdout()
    return Printer(form)


def table_printer(args: argparse.Namespace) -> Printer:
    """Return what prints the answers as a table."""
    standard_output(args)
    table = core.sibling("extras", "table").Table(loading.prompts_of(args))
    return Printer(table.line, table.head)


class Printer:
    """A journal's stand-in for standard output, where nothing can be kept: results in the input's order, as they can.

    `form` makes of each what is printed, after the `head`.
    """

    kept = answers = 0
    kept_errors: tuple[core.Error, ...] = ()
    path = None
    left = staticmethod(iter)  # all the prompts

    def __init__(self, form: Callable[[core.Result], bytes] = core.Result.as_line, head: bytes = b"") -> None:
        self._form = form
        self._early = {-1: head}
        self._next = -1

    def __enter__(self) -> Printer:
        return self

    def __exit__(self, kind: Any, *failure: Any) -> None:
        if kind is None or not issubclass(kind, OSError | core.UsageError):
            for _, lines in sorted(self._early.items()):  # the run was stopped: what is there, with gaps
                self.write(lines)

    def append(self, *results: core.Result) -> None:
        """Print each result once all before it are printed."""
        self._early |= {result.prompt.number: self._form(result) for result in results}
        while self._next in self._early:
            self.write(self._early.pop(self._next))
            self._next += 1

    def check(self, *given: Any, **options: Any) -> None:
        """Do nothing: nothing was there before, and nothing can be brought to a disk or put into order."""

    sync = finish = check
    tended = staticmethod(lambda run: contextlib.nullcontext())

    def write(self, lines: bytes) -> None:
        """Print lines; on a terminal with nothing in them that it would obey."""
        if sys.stdout.isatty():  # in JSON an escape is the same text
            lines = console.visible(lines.decode().expandtabs()).encode()
        sys.stdout.buffer.write(lines)
        sys.stdout.buffer.flush()


class Answers:
    """Prints the answers that a results file holds, when the run has ended: if asked for, else if they are few."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args, self._shown = args, False

    @contextlib.asynccontextmanager
    async def session(self, run: core.Run) -> AsyncIterator[None]:
        """Print them at the end, before the report."""
        yield
        first = list(itertools.islice(loading.prompts_of(self._args, self._args.limit), FEW + 1))
        if (table := core.meanings("table", "extras")) and (self._args.format or len(first) <= FEW):
            self._shown, printer = True, Printer(as_text)
            prompts = map(run.api.prepare, loading.prompts_of(self._args, self._args.limit))
            try:
                for result in table.results_of(run.journal, prompts):
                    if result.done:
                        printer.write(as_text(result))
            except BrokenPipeError:  # its reader has seen enough
                core.sibling("backends", "console").silence(sys.stdout)

    def report(self, ran: list[core.Ran], status: int) -> Iterator[str]:
        """Offer the command that prints them, if that has not been done; it asks nothing again."""
        if not self._shown and ran[0].run.stopped is None:
            self._args.next.append(("Print the answers with", ["--format", "text"], ["--retry-failed"]))
        yield from ()


# ---- Text for people -------------------------------------------------------------------------------------------

WIDE = "\u1100-\u115f\u2e80-\u303e\u3041-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\uffe0-\uffe6"
WIDE += "\U0001f300-\U0001faff\U00020000-\U0003fffd"  # two columns each: Chinese, Japanese, Korean, emoji
PIECE = re.compile(rf" +|[{WIDE}](?:[\u200d\ufe0f]+[{WIDE}]?)*|[^ {WIDE}]+")  # between two of them a line may be broken
ITEM = re.compile(r" *(?:(?:[-*+•>]|\d{1,3}[.)]) +)*")  # what stands before the text of a list item or a quotation
AS_IT_IS = re.compile(r"(?: {4}|\t)(?! *(?:[-*+•]|\d{1,3}[.)]) )|\s*\|")  # code, or a table


def as_text(result: core.Result) -> bytes:
    """Return a result for people: the beginning of the prompt on one line, the answer below, and a blank line."""
    width = max(20, min(100, shutil.get_terminal_size().columns))
    title, *more = wrapped(core.short(f"[{result.id}] {asked(result.prompt)}", width), width - 2)
    answer = answer_of(result)
    if result.error:
        failed = f"failed: {result.error.type}: {result.error.message}"
        answer = f"{failed}\n\n{answer}" if answer else failed
    elif "texts" in result.extra:
        answer = "\n\n".join(f"({number} of {len(answer)})\n{text}" for number, text in enumerate(answer, 1))
    elif "embedding" in result.extra:
        answer = "\n".join(map(vector_text, answer if answer and isinstance(answer[0], list) else [answer]))
    lines = [f"{title} …" if more else title, *laid_out(cell(answer) or "(an empty answer)", width), "", ""]
    return "\n".join(lines).encode(errors="backslashreplace")


def asked(prompt: core.Prompt) -> str:
    """Return what a prompt asks: the last of several messages, the columns where a template makes it of them."""
    content = prompt.content if prompt.kind else prompt.columns
    if prompt.kind == "batch" and isinstance(content["body"], dict):
        content = next((content["body"][key] for key in core.CONTENT_KEYS if key in content["body"]), content["body"])
    if isinstance(content, list) and content and isinstance(content[-1], dict):
        content = content[-1].get("content")
    return "" if isinstance(content, core.Error) else cell(content)


def vector_text(vector: Any) -> str:
    """Return a vector's size and first numbers; as it came, shortened, where it is encoded."""
    if not isinstance(vector, list):
        return core.short(str(vector), 60)
    return f"{core.plural(len(vector), 'number')}: {', '.join(map(str, vector[:4]))}{', …' if len(vector) > 4 else ''}"


def laid_out(text: str, width: int) -> Iterator[str]:
    """Yield the lines of a text, the long ones broken, but not in code and tables."""
    fenced = False
    for line in text.splitlines():
        fence = line.lstrip().startswith(("```", "~~~"))
        fenced ^= fence
        yield from [line] if fenced or fence or AS_IT_IS.match(line) else wrapped(line.rstrip(), width)


def wrapped(line: str, width: int) -> Iterator[str]:
    """Yield the line in parts of so many columns; a word or an address that is longer stays whole."""
    marker: Any = ITEM.match(line)
    part, hang = "", " " * min(len(marker[0]), width // 2)
    for piece in PIECE.findall(line):
        if part.strip() and len(part + piece) + len(re.findall(f"[{WIDE}]", part + piece)) > width:
            yield part.rstrip()
            part, piece = hang, piece.lstrip()
        part += piece
    yield part.rstrip()


# ---- What is shown of an answer -------------------------------------------------------------------------------

NO_TEXTS = ("texts", "embedding", "reply")  # where an answer is that is not one text


def answer_of(result: core.Result) -> Any:
    """Return the answer: a text, or else all of several, the vectors, or the whole reply."""
    return next((result.extra[name] for name in NO_TEXTS if name in result.extra), result.text)


def cell(value: Any) -> str:
    """Return what stands in a table for a value: a text as it is, anything else as JSON."""
    return value if isinstance(value, str) else "" if value is None else core.to_line(value).decode().rstrip("\n")


def check_stdout() -> None:
    """Raise UsageError where there is no standard output."""
    if sys.stdout is None:
        raise core.UsageError("standard output is closed; name a file with -o")
