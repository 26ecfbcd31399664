"""The command line: its options by group, what they are checked for, and the manuals that `--help NAME` prints.

An extra's options are in its own file; they get a group of their own below these.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import inspect
import math
import os
import pathlib
import sys
import textwrap
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from . import core
from .loading import BACKENDS, ROOT, default_backend, import_named
from .prompts import ENDPOINTS
from .strict import decode_row

T = TypeVar("T", int, float)


# ---- The options -----------------------------------------------------------------------------------------------


def positive(kind: type[T]) -> Callable[[str], T]:
    """Return a parser of numbers above 0, for argparse."""

    def number(text: str) -> T:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    return number


def concurrency(text: str) -> list[int | str]:
    """Return numbers of calls, or "auto", with commas between them."""
    return ["auto" if word == "auto" else positive(int)(word) for word in text.split(",")]


def add_input(option: Callable[..., Any]) -> None:
    """Add what says which prompts are asked."""
    option("prompts", nargs="?", metavar="PROMPTS", help=".txt, .jsonl, .csv or .tsv file, maybe gzipped; - is stdin")
    option("-n", "--limit", metavar="N", type=positive(int), help="only the first N prompts")
    option("-t", "--template", metavar="TEXT", help="make each prompt from the columns: 'Translate {prompt} to {lang}'")


def add_request(option: Callable[..., Any]) -> None:
    """Add what says which API is asked, and what."""
    option("-b", "--backend", metavar="NAME", help="stdlib, raw-aiohttp (default, if installed), "
           "openai-sdk, openai-batch, dask-cluster, module:name")  # fmt: skip
    option("-m", "--model", metavar="NAME", help=f"model (default: {core.DEFAULT_MODEL})")
    option("-s", "--system", metavar="TEXT", help="system text before each prompt")
    option("-p", "--param", metavar="NAME=JSON", action="append", default=[], help="request parameter (repeatable)")
    option("-e", "--endpoint", choices=ENDPOINTS, default="chat", metavar="NAME",
           help="chat, responses, completions or embeddings (default: chat)")  # fmt: skip
    option("--base-url", metavar="URL", help="default: OPENAI_BASE_URL, else OpenAI's own")
    option("--api-key-env", metavar="NAME", default="OPENAI_API_KEY",
           help="variable with the key (default: %(default)s)")  # fmt: skip
    option("--allow-http", action="store_true", help="send the key unencrypted to a public host")


def add_limits(option: Callable[..., Any]) -> None:
    """Add what says how many calls are made, how fast and for how long."""
    option("-c", "--concurrency", metavar="N", type=concurrency, help="most calls in flight (default: auto, up to "
           f"{core.AUTO_CONCURRENCY}); 1,16,auto with --compare: a sweep that finds the knee")  # fmt: skip
    option("--sequential", action="store_true", help="one at a time: the baseline")
    option("--compare", action="store_true", help="sequential and concurrent, with each backend (-b a,b)")
    option("--rpm", metavar="N", type=positive(float), help="most requests a minute (default: learned)")
    option("--tpm", metavar="N", type=positive(float), help="most tokens a minute (default: learned)")
    option("--max-attempts", metavar="N", type=positive(int), default=core.DEFAULT_ATTEMPTS,
           help="attempts for each prompt (default: %(default)s)")  # fmt: skip
    option("--timeout", metavar="SECONDS", type=positive(float), default=core.DEFAULT_TIMEOUT,
           help="for one attempt (default: %(default).0f)")  # fmt: skip
    option("--deadline", metavar="SECONDS", type=positive(float), help="for the run; what is in flight then is cut off")


def add_output(option: Callable[..., Any]) -> None:
    """Add what says where the answers go, and what is said besides."""
    option("-o", "--output", metavar="FILE", help="results (default: PROMPTS' stem + .results.jsonl); "
           "- is stdout; .csv, .tsv: a table as well")  # fmt: skip
    option("--retry-failed", action="store_true", help="send the failed prompts of earlier runs again")
    option("--overwrite", action="store_true", help="discard what the results file holds")
    option("-q", "--quiet", action="store_true", help="no progress and no report, only warnings")
    option("-v", "--verbose", action="store_true", help="say why each retry and slow-down happens")
    option("--version", action="version", version=f"%(prog)s {core.__version__}", help="print the version and exit")
    option("-h", "--help", action=Help, metavar="NAME", help="print this, or the manual of a backend or an extra")


GROUPS = {"input": add_input, "request": add_request, "limits": add_limits, "output": add_output}


def build_parser(extras: Iterable[Any] = ()) -> argparse.ArgumentParser:
    """Return the parser of all options, those of the extras too; the core's docstring is its manual."""
    parser = argparse.ArgumentParser(prog=core.PROGRAM, usage=f"{core.PROGRAM} PROMPTS [options]",
        description=core.__doc__, formatter_class=Columns, allow_abbrev=False, add_help=False)  # fmt: skip
    for title, add in GROUPS.items():
        add(parser.add_argument_group(title).add_argument)
    if extras:
        core.extras_folder().add_arguments(parser.add_argument_group("extras").add_argument)
    for file in extras:
        group = parser.add_argument_group(core.extras_folder().extra_name(file))
        with core.extras_folder().blaming(file.add_arguments):
            file.add_arguments(group.add_argument)
        if not group._group_actions:
            group.description = textwrap.fill((file.__doc__ or "").partition("\n")[0], 76)
    return parser


# ---- Help ------------------------------------------------------------------------------------------------------


class Columns(argparse.RawDescriptionHelpFormatter):
    """Help in 80 columns: an option's names on the left, `-o, --output FILE`, and what it means on the right."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=27, width=80)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)  # a backend's name stays whole


class Help(argparse.Action):
    """Prints the options, or the manual of the backend or the extra that follows the flag, and exits."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings | {"nargs": "?", "dest": argparse.SUPPRESS, "default": argparse.SUPPRESS})

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, name: Any, flag: str | None = None) -> None:
        """Print it. Raises UsageError if there is none of that name."""
        sys.stdout.write(parser.format_help() if name is None else f"{manual(name)}{flags_of(name, parser)}")
        sys.stdout.flush()
        parser.exit()


def files_of_names() -> dict[str, str]:
    """Return the module of each backend and extra, by the names that --help takes."""
    extras = core.extras_folder().INDEX if core.extras_folder() else ()
    files = [f"backends.{name}" for name in BACKENDS] + [f"extras.{name}" for name in extras]
    return {file.partition(".")[2].replace("_", "-"): f"{ROOT}.{file.replace('-', '_')}" for file in files}


def plain_name(name: str) -> str:
    """Return the name of a backend or an extra, which may be told by one of its flags, too."""
    index = core.extras_folder().INDEX if core.extras_folder() else {}
    name = name.lstrip("-").replace("_", "-")
    return next((file.replace("_", "-") for file, signs in index.items() if f"--{name}" in signs), name)


def manual(name: str) -> str:
    """Return the docstring of a backend's or an extra's file. Raises UsageError if there is no such file."""
    files = files_of_names()
    if plain_name(name) in files:
        spec = importlib.util.find_spec(files[plain_name(name)])  # importing it may need a library
        text = spec and spec.origin and ast.get_docstring(ast.parse(pathlib.Path(spec.origin).read_text("utf-8")))
    elif "." in name or ":" in name:  # a third party's
        try:
            text = inspect.getdoc(import_named(name.partition(":")[0]))
        except Exception as failure:  # which may raise anything
            raise core.UsageError(f"--help {core.short(name, 60)}: {core.in_short(failure)}") from None
    else:
        raise core.UsageError(f"--help {core.short(name, 60)}: no backend or extra has this name; there are "
                              f"{', '.join(files)}")  # fmt: skip
    return f"{text or 'It has no manual.'}\n"


def flags_of(name: str, parser: argparse.ArgumentParser) -> str:
    """Return the flags of that extra with what they mean, '' if it has none."""
    group = next((one for one in parser._action_groups if one.title == plain_name(name).replace("-", "_")), None)
    if not group or not group._group_actions:
        return ""
    formatter = parser._get_formatter()
    formatter.start_section("\noptions")
    formatter.add_arguments(group._group_actions)
    formatter.end_section()
    return f"\n{formatter.format_help()}"


# ---- Reading a command line ------------------------------------------------------------------------------------


def parse(argv: list[str], stack: contextlib.ExitStack) -> argparse.Namespace:
    """Return the parsed and checked command line; what its extras open is closed with the stack."""
    files = core.extras_folder().files_for(argv) if "--version" not in argv and core.extras_folder() else []
    parser = build_parser(files)
    args, unknown = parser.parse_known_args(argv)
    if unknown:  # not the whole of it: somebody may try to give a key here
        word = core.short(unknown[0].partition("=")[0], 40)
        where = "" if files else f"; other options are in the folder extras/, which goes beside {core.PROGRAM}"
        said = "is not an option" if word.startswith("-") else "is one argument too many"
        raise core.UsageError(f"{word} {said}; see --help{where}")
    args.given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
    args.argv, args.stack, args.begun = argv, stack, False
    args.facts, args.settings, args.form, args.printer, args.next = {}, {}, None, None, []
    args.name = core.STDIN if args.prompts == "-" else args.prompts  # in messages
    args.calls = list(dict.fromkeys(args.concurrency or ["auto"]))
    check(args)
    args.given_output, args.output = args.output, args.output or default_output(args.prompts)
    args.journal = ""
    args.taken, args.writes = {os.path.realpath(args.prompts): "the input"} if args.prompts else {}, []
    args.extras = []
    for file in files:
        with core.extras_folder().blaming(file.create):
            args.extras += [extra] if (extra := file.create(args)) is not None else []
    args.journal = args.journal or args.output
    check_files(args)
    return args


def check(args: argparse.Namespace) -> None:
    """Read the names of the backends and the parameters. Raises UsageError where one is none."""
    args.backends = list(dict.fromkeys((args.backend if args.backend is not None else default_backend()).split(",")))
    args.params = dict(parameter(text) for text in args.param)
    if "" in args.backends:
        raise core.UsageError("-b has an empty name")
    if "," in (args.backend or "") and not args.compare:
        raise core.UsageError("several backends (-b a,b) are for --compare")
    refuse_together(args)


def refuse_together(args: argparse.Namespace) -> None:
    """Raise UsageError where options contradict one another."""
    results = args.output or args.retry_failed or args.overwrite
    for wrong, advice in (
        (args.sequential and (args.compare or args.concurrency),
         "--sequential is one at a time, and --compare does it too: leave out one of them, or -c"),
        (args.compare and results,
         "--compare writes no results file; leave out -o, --retry-failed and --overwrite"),
        (len(args.calls) > 1 and not args.compare, "several numbers of calls (-c 1,16,auto) are for --compare"),
    ):  # fmt: skip
        if wrong:
            raise core.UsageError(advice)


def default_output(prompts: str | None) -> str:
    """Return where the results go if nobody says."""
    path = pathlib.Path((prompts or "-").removesuffix(".gz"))
    return "-" if prompts in (None, "-") else str(path.parent / f"{path.stem}.results.jsonl")


def check_files(args: argparse.Namespace) -> None:
    """Raise UsageError where something is missing, or the output cannot be what is asked of it."""
    if args.prompts is None:
        raise core.UsageError("no PROMPTS file given; try --demo --compare, or --help")
    for flag, path in [("-o", args.output), ("-o", args.journal), *args.writes]:
        if path != "-" and (other := args.taken.setdefault(os.path.realpath(path), flag)) != flag:
            raise core.UsageError(f"{path} is {other}; choose another file with {flag}")
        if flag != "-o" and (why := core.sibling("extras", "files").unwritable(path)):
            raise core.UsageError(f"{why}; choose another file with {flag}")
    if (suffix := pathlib.PurePath(args.output).suffix.lower()) in core.NOT_WRITTEN:
        raise core.UsageError(f"-o {args.output}: results are written as .jsonl, .csv or .tsv, not as {suffix}")
    if suffix in core.TABLES:  # what reads a table writes it, too
        core.sibling("extras", "table", f"a {suffix} file")


def parameter(text: str) -> tuple[str, Any]:
    """Return the name and the value of NAME=JSON."""
    name, _, value = map(str.strip, text.partition("="))
    try:
        parsed = decode_row(value)
    except (ValueError, RecursionError):
        advice = f"a text needs its quotes: -p '{name or 'stop'}=\"…\"'"
        raise core.UsageError(f"-p {text}: not NAME=JSON; {advice}") from None
    if not name or (name == "stream" and parsed):
        raise core.UsageError(f"-p {text}: " + ("answers are not streamed here" if name else "no name"))
    return name, parsed
