"""The extras' contract: how an option in a file of its own joins a run that does not know it.

A file here has two functions. Its docstring is its manual; --help shows the first line of those without a flag.

    add_arguments(option)   add its flags: `option` is an argparse group's add_argument
    create(args)            check them and return the object that does the work, or None if they are not used. Raises
                            UsageError for values that cannot be; nothing is open or sent by then. It may change `args`

`args` is the parsed command line with the flags of all files that are loaded (use getattr: others may not be), and
besides: `name`, what messages call the input; `stack`, an ExitStack that is closed when the command ends; `form`, a
function that completes each request's body; `settings`, further arguments of `load_backend`; `printer`, which makes
the Printer of standard output; `comparison`, which --compare runs; `taken`, the uses of other files by their real
paths, and `writes`, a list to which an extra that writes a file adds its flag and the file: nothing is overwritten.
`facts` go into --report. `next` is what the end of the report offers: texts, each with the words to add to the command
and those to leave out of it.

A file that is loaded by a suffix also reads such files:

    rows(lines, suffix, name)   yield the line number and the row (a dict, a text, or a core.Error) of each prompt
    count(lines)                estimate how many prompts there are

The object may have any of these methods. In Python it is passed directly: run(prompts, send, extras=[Budget(5)]).

    command()               do something else instead of a run; return the exit status, or None to continue
    check()                 before the results are opened: raise UsageError if they cannot be written as requested
    select(prompts)         wrap the lazy input: leave out, expand, attach. It is read more than once; a prompt's
                            `number` is its place in what `select` yields, and is set afterwards
    count(lines)            return how many prompts `select` leaves of so many, for the progress (None: unknown)
    session(run)            an async context manager around all calls; a run's own tasks begin here
    wrap(attempt)           wrap `async attempt(prompt) -> Reply`, one attempt to answer a prompt, composed once before
                            the run. It raises PromptError, which may have `again`, the request to send next time (it
                            counts as an attempt), and `keep`, a Reply whose text stays in the row beside the error.
                            Whatever it awaits before the call goes through `await run.wait_or_stop(...)`, which ends
                            early if the run is stopped; `run.open[prompt.number]` is the prompt's unfinished Result,
                            whose `attempts` grows when the request is sent
    on_result(result)       called after a result was recorded
    status(ran)             return a few words for the progress, or ""
    portable()              return plain values from which the file's function `restore` makes an equal object, for a
                            bulk backend that makes its calls in other processes. Only wraps that have it are taken
                            there, and only those of files in this folder: a third party's is refused
    report(ran, status)     at the end: write files, yield lines of the report. `ran` is a list with one entry for each
                            run (several with --compare), of which `run`, `api` and `tally` are useful

Wraps lie around one another in this index's order, the first one outermost; reports come in the same order. An
exception in one of these is one sentence that names the file. Before the first call it ends the command (exit status
2), during the run it stops that in good order (3), and in `report` it costs the rest of that report alone (3, if all
was well). What the server has answered by then is in the results.

Two hooks that httpx or WSGI do not have proved necessary: `status`, because the cost belongs in the progress, and
`count`, because a shard's progress would be wrong by the number of shards.

A third party's file is loaded by `--extra package.module`. It uses the core's public names, and in this folder and in
backends/ they are reached as `core`: the module that has loaded the file, whatever its name.
"""

import contextlib
import functools
import importlib
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import concurrent_prompts as core

    __all__ = ["core"]

# file: the flags and the suffixes that load it; "" means every run
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
    """Return the core when it is first used: the stand-in server works without it."""
    if name == "core":
        return importlib.import_module(__name__.rpartition(".")[0] or "concurrent_prompts")
    raise AttributeError(f"module {__name__} has no attribute {name}")


this: Any = sys.modules[__name__]  # `this.core` is the core


# ---- Loading extras ----------------------------------------------------------------------------------------------


def add_arguments(option: Callable[..., Any]) -> None:
    """Add --extra, which loads a third party's file."""
    option("--extra", metavar="MODULE", action="append", default=[],
           help="load a third party's option, package.module (repeatable)")  # fmt: skip


def files_for(argv: Sequence[str]) -> list[Any]:
    """Return the modules of extras/ that a command line needs by a flag or a suffix, and those of third parties.

    For --help these are all. Raises UsageError if a file that is needed is missing.
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
    """Yield the value of each --extra."""
    for word, after in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        flag, mark, name = word.partition("=")
        if flag == "--extra" and (mark or after):
            yield name if mark else after


def third_party(name: str) -> Any:
    """Import and return the module of that name. Raises UsageError if that fails, or it is not an extra."""
    try:
        file = this.core.sibling("backends", "loading").import_named(name)
        if callable(file.add_arguments) and callable(file.create):
            return file
        reason = "it needs the functions add_arguments and create"
    except (Exception, SystemExit) as failure:  # somebody else's file may raise anything
        reason = this.core.in_short(failure)
    raise this.core.UsageError(f"--extra {this.core.short(name, 60)}: {reason}")


# ---- Calling them ------------------------------------------------------------------------------------------------


def extra_name(extra: Any) -> str:
    """Return the name of an extra's file: "budget" of concurrent_prompts.extras.budget."""
    return str(getattr(extra, "__module__", None) or getattr(extra, "__name__", "")).rpartition(".")[2]


def named(run: "core.Run", name: str) -> Any:
    """Return the extra of that file's name, None where there is none in this run."""
    return next((extra for extra in run.extras if extra_name(extra) == name), None)


def extra_failure(hook: Any, failure: Exception) -> Any:
    """Return the error that stops a run for what an extra's method raised; what it did not mean to names the two."""
    if isinstance(failure, this.core.PromptError):
        return failure
    name = f"extra {extra_name(getattr(hook, '__self__', hook))}, {getattr(hook, '__name__', 'a hook')}"
    told = str(failure) if isinstance(failure, this.core.UsageError) else this.core.in_short(failure)
    return this.core.PromptError("extra", f"{name}: {this.core.short(told)}", "stop")


def discreet(run: "core.Run", failure: Any) -> Any:
    """Put *** for the secrets in an extra's error, which may quote an answer or a header; return it."""
    failure.error = failure.error._replace(message=run.api.conceal(failure.error.message))
    failure.args = failure.error[1:2]
    return failure


@contextlib.contextmanager
def blaming(hook: Any) -> Iterator[None]:
    """Turn what an extra raises before the first call into a UsageError, which ends the command."""
    try:
        yield
    except this.core.UsageError:
        raise
    except Exception as failure:
        raise this.core.UsageError(str(extra_failure(hook, failure))) from None


def call_hook(run: "core.Run", hook: Any, *given: Any) -> Any:
    """Return what an extra's method does; what it raises stops the run in good order."""
    try:
        return hook(*given)
    except Exception as failure:
        run.stop(discreet(run, extra_failure(hook, failure)))


async def enter(run: "core.Run", hooks: Iterable[Any], stack: contextlib.AsyncExitStack) -> None:
    """Enter the extras' sessions."""
    for hook in hooks:
        with blaming(hook):
            session = hook(run)
            await session.__aenter__()
        stack.push_async_exit(functools.partial(leave, run, hook, session))


async def leave(run: "core.Run", hook: Any, session: Any, *failure: Any) -> Any:
    """Leave an extra's session; what goes wrong there stops the run, whose answers are written by now."""
    try:
        return await session.__aexit__(*failure)
    except Exception as another:
        if another is failure[1]:
            raise
        run.stop(extra_failure(hook, another))
    return False


def selected(extra: Any, prompts: Iterable[Any]) -> Iterator[Any]:
    """Yield the prompts that an extra selects. Raises PromptError, which stops the run, if the extra fails."""
    try:
        yield from extra.select(prompts)
    except this.core.UsageError:
        raise
    except Exception as failure:
        raise extra_failure(extra.select, failure) from None
