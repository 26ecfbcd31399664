"""--shard K/N: send every N-th prompt, from the K-th on, and write files named after the shard, for job arrays.
--merge FILE...: merge the shards' results into one file, in the input's order; needs no key.

The merged file has the lines of a single run, but for the timings. A shard that is missing, unfinished, still being
written, or of another input is refused.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any, NoReturn

from . import core
from .files import open_regular, other_than_file, replacing, unwritable

loading = core.sibling("backends", "loading")
WITH_MERGE = "prompts merge output limit overwrite quiet verbose"  # the options that can go with it


def add_arguments(option: Callable[..., Any]) -> None:
    """Add the flags."""
    option("--shard", metavar="K/N", help="send every N-th prompt, from the K-th on; write files named after the shard")
    option("--merge", metavar="FILE", nargs="+", help="merge the results of all shards into one file; send nothing")


def create(args: argparse.Namespace) -> Shard | Merge | None:
    """Return the extra for --shard or --merge, or None."""
    if args.merge:
        return Merge(args)
    return Shard(args) if args.shard is not None else None


class Shard:
    """--shard: every N-th prompt, from the K-th on. Raises UsageError if K/N is none, or with --compare."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._place, self._shards = shard_numbers(args.shard)
        if args.compare:
            raise core.UsageError("--compare writes no results that could be merged; leave out --shard")
        for name in ("output", "report", "plot", "to_batch"):
            if path := getattr(args, name, None):
                setattr(args, name, in_shard(path, self._place, self._shards))

    def __str__(self) -> str:
        return f"shard {self._place}/{self._shards}"

    def select(self, prompts: Iterable[core.Prompt]) -> Iterator[core.Prompt]:
        """Yield the shard's prompts."""
        return itertools.islice(iter(prompts), self._place - 1, None, self._shards)

    def count(self, lines: int) -> int:
        """Return how many of `lines` prompts belong to the shard."""
        return len(range(lines)[self._place - 1 :: self._shards])


class Merge:
    """--merge: the results of all shards as one file. Raises UsageError without the input, or with other options."""

    def __init__(self, args: argparse.Namespace) -> None:
        if args.prompts is None:
            raise core.UsageError("--merge needs the shards' input: name PROMPTS before it")
        if others := out_of_place(args, WITH_MERGE):
            raise core.UsageError(f"--merge only merges results; leave out {others}")
        if args.given_output is None:
            args.output = re.sub(r"\.shard-\d+-of-\d+(?=[^/\\]*\Z)", "", matching(args.merge[0])[0])
        self._args = args
        self._files = [path for name in args.merge for path in matching(name)]
        for path in self._files:
            args.taken.setdefault(os.path.realpath(path), "one of the shards")

    def command(self) -> int:
        """Merge them; return the exit status."""
        return merge(self._args, self._files)


def out_of_place(args: argparse.Namespace, used: str) -> str:
    """Return the flags on the command line that are not in `used`, a list of names separated by spaces."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in args.given if name not in used.split())


def check_new(args: argparse.Namespace, path: pathlib.Path, flag: str) -> None:
    """Raise UsageError if `path`, given by `flag`, is not writable, is the input, or exists without --overwrite."""
    if why := unwritable(path):
        raise core.UsageError(f"{why}; choose another file with {flag}")
    if args.prompts and os.path.realpath(path) == os.path.realpath(args.prompts):
        raise core.UsageError(f"{path} is the input; choose another file with {flag}")
    if path.exists() and not args.overwrite:
        raise core.UsageError(f"{path} already exists; choose another file with {flag}, or replace it (--overwrite)")


def matching(name: str) -> list[str]:
    """Expand a pattern, which a shell on Windows does not; return the name itself if it matches nothing."""
    import glob

    return [name] if os.path.exists(name) else sorted(glob.glob(name)) or [name]


def shard_numbers(text: str) -> tuple[int, int]:
    """Return K and N of K/N. Raises UsageError if the text is none."""
    place, _, shards = text.partition("/")
    if not re.fullmatch("[0-9]{1,9}/[0-9]{1,9}", text) or not 0 < int(place) <= int(shards):
        raise core.UsageError(f"--shard {core.short(text, 40)} is not K/N, the K-th of N shards, such as 1/4 or 4/4")
    return int(place), int(shards)


def in_shard(path: str, place: int, shards: int) -> str:
    """Return the file name with the shard before its suffix: answers.shard-1-of-4.csv."""
    if path == "-" or os.path.isdir(path):
        return path
    return re.sub(r"((\.results)?\.[^./\\]*)?\Z", rf".shard-{place}-of-{shards}\g<0>", path, count=1)


def shards_in(paths: Iterable[str]) -> list[pathlib.Path]:
    """Return the files in the shards' order. Raises UsageError unless their names are all N shards of one N."""
    found: dict[int, pathlib.Path] = {}
    first, count = pathlib.Path(), 0
    for path in map(pathlib.Path, paths):
        if "*" in path.name:
            advice = "run the shards first (--shard K/N), or name their results"
            raise core.UsageError(f"no file matches {path}; {advice}")
        if path.suffix.lower() in core.TABLES:
            raise core.UsageError(f"{path} is a table; merge the results that it was made from: {path}.results.jsonl")
        name = re.match(r"(?s:.*)\.shard-([0-9]{1,9})-of-([0-9]{1,9})(?:\.|$)", path.name)
        if not name and not path.exists():
            raise core.UsageError(f"there is no file {path}; name the shards' results, after all other options")
        place, shards = map(int, name.groups()) if name else (0, 0)
        if not 0 < place <= shards:
            raise core.UsageError(f"{path}: the name does not say which shard it is; it must contain .shard-K-of-N")
        if shards != (count or shards):
            what = f"{first} is one of {count} shards and {path} one of {shards}"
            raise core.UsageError(f"{what}; merge those of one run")
        if place in found:
            what = f"shard {place}/{shards} is given twice: {found[place]} and {path}"
            raise core.UsageError(f"{what}; leave out one of them")
        found[place], first, count = path, path, shards
    if len(found) < count:
        shard = f"{next(place for place in itertools.count(1) if place not in found)}/{count}"
        others = f" (and {count - len(found) - 1:,} more)" if len(found) < count - 1 else ""
        raise core.UsageError(f"shard {shard} is missing{others}; name its file, too, or run it: --shard {shard}")
    return [found[place] for place in sorted(found)]


@contextlib.contextmanager
def held(path: pathlib.Path) -> Iterator[IO[bytes]]:
    """Open a results file to read, locked against runs. Raises UsageError if it cannot be read or a run writes it."""
    if kind := other_than_file(path):
        raise core.UsageError(f"{path} is not a regular file but {kind}; name a shard's results")
    try:
        file = open_regular(path)
    except OSError as failure:
        raise core.UsageError(f"cannot read {path}: {failure.strerror}; correct that, or run the shard again") from None
    with file:
        if not core.lock(file, path):
            raise core.UsageError(f"a run is writing {path}; merge when it has ended")
        file.seek(0)
        yield file


def is_answer(line: bytes, prompt: core.Prompt) -> bool | None:
    """Tell whether a line is an answer (not a failure) to the prompt; None if it belongs to another prompt.

    The request may have had another model or parameters.
    """
    try:
        row_id, key, error, _ = core.recognised(core.parse_json(line))
    except ValueError:
        return None
    # orjson reads an integer of more than 64 bits as a float.
    same = key[16:] == core.fingerprint(prompt)[16:] and (row_id == prompt.id or isinstance(row_id, float))
    return error is None if same else None


def merge(args: argparse.Namespace, names: Sequence[str]) -> int:
    """Merge the shards' results into one file in the input's order; return the exit status, 1 if prompts failed.

    Raises UsageError if the shards are not complete, or not of this input; nothing is written then.
    """
    if args.output == "-" or args.journal != args.output:
        table = f"{args.journal}; the command of the shards without --shard then makes the table"
        raise core.UsageError(f"--merge writes one file of results: -o {'FILE.jsonl' if args.output == '-' else table}")
    paths, output = shards_in(names), pathlib.Path(args.output)
    check_new(args, output, "-o")
    counts = [0, 0]  # failures, answers
    core.sibling("backends", "loading").open_files()
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(held(path)) for path in paths]
        if output.exists():
            with held(output):
                pass
        draft = stack.enter_context(replacing(output, *paths))
        ends: list[None] = [None] * len(files)
        for number, prompt in enumerate(itertools.chain(loading.prompts_of(args, args.limit), ends)):
            turn, place = divmod(number, len(files))
            line = files[place].readline(core.RESULT_MOST)
            answered = is_answer(line, prompt) if prompt else None
            if answered is not None:
                draft.write(line.rstrip(b"\r\n") + b"\n")
                counts[answered] += 1
            elif prompt or line:
                refuse_line(args, paths, place, turn + 1, line)
    if not args.quiet:
        said = f"{core.plural(counts[1], 'answer')} and {core.plural(counts[0], 'failure')}"
        said = f"{said} of {core.plural(len(paths), 'shard')} merged\n  results in {output}"
        core.sibling("backends", "console").say(said)
    return 1 if counts[0] else 0


def refuse_line(
    args: argparse.Namespace, paths: Sequence[pathlib.Path], place: int, number: int, line: bytes
) -> NoReturn:
    """Raise UsageError that says why this line of a shard (b"" at its end) is not the one expected here."""
    path, shard, text = paths[place], f"{place + 1}/{len(paths)}", line.strip(b"\0\r\n ")
    row, known, total = "", False, 0
    with contextlib.suppress(ValueError):
        row = core.recognised(core.parse_json(text))[1][16:]
    if not row and not core.LINE_START.startswith(text[: len(core.LINE_START)]):  # nor a result cut short
        raise core.UsageError(f"{path} line {number} is not a result; correct that line, and merge again")
    for prompt in itertools.islice(loading.prompts_of(args, args.limit), place, None, len(paths)):
        known = known or core.fingerprint(prompt)[16:] == row
        total += 1
    if row and not known:
        what = f"{path} line {number} belongs to no prompt in shard {shard} of {args.name}"
        raise core.UsageError(f"{what}; name the input and the -n that the shards were run with")
    with open_regular(path) as lines:
        left = total - sum(one.endswith(b"\n") for one in lines)
    what = f"line {number} is out of order"
    what = f"{core.plural(left, 'prompt')} of {total:,} still open" if left > 0 else what
    advice = f"run --shard {shard} again, or name the -n that it was run with"
    raise core.UsageError(f"{path} is not finished, {what}; {advice}")
