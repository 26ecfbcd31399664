"""--to-batch FILE.jsonl: only write the requests, as OpenAI's Batch API takes them, and send nothing.

Above the Batch API's limits the requests go on in FILE-2.jsonl, and so do those of another endpoint or model.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import pathlib
from collections.abc import Callable, Iterable
from typing import IO, Any

from . import core
from .files import replacing
from .shards import check_new, out_of_place

loading = core.sibling("backends", "loading")


USED = (
    "prompts to_batch model system template param endpoint schema base_url api_key_env allow_http limit shard "
    "overwrite quiet verbose extra"
)


def add_arguments(option: Callable[..., Any]) -> None:
    """Add the flag."""
    option("--to-batch", metavar="FILE.jsonl", help="write the requests as files for OpenAI's Batch API; send nothing")


def create(args: argparse.Namespace) -> ToBatch | None:
    """Return what writes the files."""
    return ToBatch(args) if args.to_batch is not None else None


class ToBatch:
    """The prompts as files of Batch requests."""

    def __init__(self, args: argparse.Namespace) -> None:
        if others := out_of_place(args, USED):
            raise core.UsageError(f"--to-batch only writes requests; leave out {others}")
        if not args.to_batch.endswith(".jsonl"):
            raise core.UsageError(f"--to-batch {args.to_batch}: the name must end in .jsonl")
        args.writes.append(("--to-batch", args.to_batch))
        self._args = args

    def command(self) -> int:
        """Write them; return the exit status."""
        return write_batch(self._args)


def write_batch(args: argparse.Namespace) -> int:
    """Write the prompts as files of Batch requests, each of one endpoint and one model; return the exit status."""
    api = core.sibling("backends", "loading").make_api(args, None, dry=True)
    name_of = custom_ids(loading.prompts_of(args, args.limit))
    batch = core.sibling("backends", "api")
    places, files, counts = batch.BatchFiles(), list[IO[bytes]](), collections.Counter[pathlib.Path]()
    bad, reason = 0, ""
    core.sibling("backends", "loading").open_files()
    with contextlib.ExitStack() as stack:  # all the files are written, or none
        for prompt in loading.checked(loading.prompts_of(args, args.limit), api):
            url = prompt.path.removesuffix(api.query)
            line = b"" if prompt.error else batch.request_line(name_of(prompt), url, prompt.body)
            if prompt.error or len(line) > batch.BATCH_BYTES:
                bad += 1
                reason = reason or (prompt.error.message if prompt.error else f"{prompt.where}: too long for a Batch")
                continue
            number = places.place((url, api.model_of(prompt)), len(line))
            path = numbered(args.to_batch, number)
            if number > len(files):
                check_new(args, path, "--to-batch")
                files.append(stack.enter_context(replacing(path)))
            counts[path] += 1
            files[number - 1].write(line)
    said = [f"{core.plural(count, 'request')} in {path}" for path, count in counts.items()] or ["no requests"]
    core.sibling("backends", "console").say(*said if not args.quiet else ())
    if (left := numbered(args.to_batch, len(counts) + 1)).exists():
        core.log.warning("%s is from an earlier run: it contains none of these requests", left)
    if bad:
        core.log.warning("%s left out: %s", core.plural(bad, "prompt"), reason)
    return 1 if bad else 0


def numbered(path: str, number: int) -> pathlib.Path:
    """Return the name of the first file, FILE-2 of the second."""
    return pathlib.Path(f"{path.removesuffix('.jsonl')}-{number}.jsonl" if number > 1 else path)


def custom_ids(prompts: Iterable[core.Prompt]) -> Callable[[core.Prompt], str]:
    """Return the function that names a prompt in a Batch: by its id, or by x-2, x-3 where x is another's.

    An id belongs to the first that has it: of the Batch requests, else of those with an id, else of the line numbers.
    """
    owners: dict[str, str] = {}
    again: collections.Counter[str] = collections.Counter()
    for prompt in prompts:
        if prompt.named:
            name = str(prompt.id)
            owners[name] = "batch" if prompt.kind == "batch" else owners.get(name, "id")

    def name_of(prompt: core.Prompt) -> str:
        name = str(prompt.id)
        owner = "line" if not prompt.named else "batch" if prompt.kind == "batch" else "id"
        if owners.get(name, "line") != owner:
            while (other := f"{name}-{again[name] + 2}") in owners:
                again[name] += 1
            name = other
        if prompt.named or name != str(prompt.id):
            owners[name] = "taken"
        return name

    return name_of
