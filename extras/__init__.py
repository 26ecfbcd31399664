"""The extras' contract: how an option in a file of its own joins a run that does not know it.

A file here has two functions. Its docstring is its manual; the first line says in --help what has no flag.

    add_arguments(option)   its flags: `option` is an argparse group's add_argument
    create(args)            check them, and return the object that does the work; None if they ask for nothing.
                            UsageError is for what cannot be; nothing is open or sent by then. It may change `args`

`args` is the parsed command line, with all that other files have added (look with getattr: they may not be loaded),
and besides: `name`, what the input is called; `stack`, an ExitStack that is closed when the command ends; `form`, what
finishes each request's body; `settings`, more of them for `load_backend`; `printer`, what makes the Printer of standard
output; `comparison`, what --compare runs; `taken`, what other files are by their real paths, and `writes`, a list to
which a flag and its file are added if the extra writes one: nothing is written over. `facts` go into --report.

A file that is named by a suffix reads such files, too:

    rows(lines, suffix, name)   yield the line number and the row (a dict, a text, or a core.Error) of each prompt
    count(lines)                about how many prompts there are

The object may have any of these methods. In Python one is passed as it is: run(prompts, send, extras=[Budget(5)]).

    command()               do something else instead of a run; return the exit status, or None to go on
    check()                 before the results are opened: UsageError if they cannot be what is asked of them
    select(prompts)         wrap the lazy input: leave out, expand, attach. It is read more than once; a prompt's
                            `number` is its place in what comes out and is set afterwards
    count(lines)            how many prompts `select` leaves of so many, for the progress (None: unknown)
    session(run)            an async context manager around all calls; a run's own tasks begin here
    wrap(attempt)           wrap `async attempt(prompt) -> Reply`, one try to answer a prompt, composed once before the
                            run. It raises PromptError, of which `again` is the request to send next time (a try that
                            is counted) and `keep` a Reply whose text stays in the row beside the error. What it awaits
                            before the call is cut short by `await run.wait_or_stop(...)`; `run.open[prompt.number]` is
                            the Result in the making, whose `attempts` grows when the request is sent
    on_result(result)       after a result was recorded
    status(ran)             a few words for the progress, or ""
    portable()              plain values of which the file's function `restore` makes the like: for a bulk backend
                            that makes its calls in other processes. Only wraps that have it go there, and only those
                            of files in this folder: a third party's is refused
    report(ran, status)     when all is written: write files, yield lines of the report. `ran` is a list with one entry
                            for each run (several with --compare), of which `run`, `api` and `tally` are useful

Wraps lie around one another in this index's order, the first one outermost; reports come in the same order. What goes
wrong in one of these is one sentence that names the file. A bug before the first call ends the command (exit status 2),
one during the run stops it in good order (3), and one in `report` costs the rest of that report alone (3, if all was
well). Whatever the server has answered by then is in the results.

Two hooks that httpx or WSGI do not have proved necessary: `status`, because money belongs in the progress, and `count`,
because a shard's progress would be wrong by the number of shards.

A third party's file is loaded by `--extra package.module`. It uses the core's public names, and in this folder and in
backends/ they are reached as `core`: the module that has loaded the file, whatever it is called.
"""

import importlib
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import concurrent_prompts as core

    __all__ = ["core"]

# file: the flags and the suffixes that load it; "" is every run
INDEX = {
    "demo": ("--demo", "--dialect"),
    "shards": ("--shard", "--merge"),
    "cluster": ("--cluster", "--worker-backend"),
    "schema": ("--schema",),
    "prices": ("", "--price"),
    "budget": ("--max-cost",),
    "dry_run": ("--dry-run",),
    "to_batch": ("--to-batch",),
    "compare": ("--compare",),
    "text": ("", "--format"),
    "table": (".csv", ".tsv"),
    "shutdown": ("",),
    "plot": ("--plot",),
    "report": ("--report",),
}


def __getattr__(name: str) -> Any:
    """Return the core, when it is asked for: the stand-in server does without."""
    if name == "core":
        return importlib.import_module(__name__.rpartition(".")[0] or "concurrent_prompts")
    raise AttributeError(f"module {__name__} has no attribute {name}")


this: Any = sys.modules[__name__]  # which has the core, too


# ---- Loading them ----------------------------------------------------------------------------------------------


def add_arguments(option: Callable[..., Any]) -> None:
    """Add the flag that loads a third party's."""
    option("--extra", metavar="MODULE", action="append", default=[],
           help="load a third party's option, package.module (repeatable)")  # fmt: skip


def files_for(argv: Sequence[str]) -> list[Any]:
    """Return the files of extras/ that a command line asks for by a flag or a suffix, and third parties'.

    For --help that is all of them. Raises UsageError where one is asked for that is not there.
    """
    signs = {"", *(word.partition("=")[0] for word in argv)}
    texts = "-t", "--template", "-s", "--system", "-p", "--param"
    words = [word for flag, word in itertools.pairwise(("", *argv)) if flag not in texts and not word.startswith(texts)]
    signs |= {os.path.splitext(word.lower().removesuffix(".gz"))[1] or "-" for word in words}
    found = []
    for name, own in INDEX.items():
        asked = next((sign for sign in own if sign and sign in signs), "")
        if asked or "" in own or signs & {"-h", "--help"}:
            try:
                found.append(this.core.sibling("extras", name, asked))
            except this.core.UsageError:
                if asked:
                    raise
    return found + [third_party(name) for name in named_extras(argv)]


def named_extras(argv: Sequence[str]) -> Iterator[str]:
    """Yield what follows each --extra."""
    for word, after in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        flag, mark, name = word.partition("=")
        if flag == "--extra" and (mark or after):
            yield name if mark else after


def third_party(name: str) -> Any:
    """Return the module of that name. Raises UsageError where it is none, or no extra."""
    try:
        file = this.core.sibling("backends", "loading").import_named(name)
        if callable(file.add_arguments) and callable(file.create):
            return file
        reason = "it needs the functions add_arguments and create"
    except (Exception, SystemExit) as failure:  # somebody else's file may raise anything
        reason = this.core.in_short(failure)
    raise this.core.UsageError(f"--extra {this.core.short(name, 60)}: {reason}")


def selected(extra: Any, prompts: Iterable[Any]) -> Iterator[Any]:
    """Yield the prompts that an extra selects. Raises PromptError, which stops the run, for what it raises."""
    try:
        yield from extra.select(prompts)
    except this.core.UsageError:
        raise
    except Exception as failure:
        raise this.core.extra_failure(extra.select, failure) from None


def unwritable(path: str | os.PathLike[str]) -> str:
    """Return why no file can be written, or replaced, there; or ''."""
    folder = os.path.dirname(path) or "."
    if kind := this.core.other_than_file(path):
        return f"{path} is not a regular file but {kind}"
    if why := this.core.unwritable_draft(path):
        return str(why)
    if not os.path.isdir(folder):
        return f"{path} cannot be written: there is no folder {folder}"
    return "" if os.access(folder, os.W_OK) else f"{path} cannot be written: the folder {folder} is write-protected"
