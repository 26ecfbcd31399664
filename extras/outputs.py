"""The results file among others: what else may stand in its place or beside it, and what becomes of it meanwhile.

Without this file a run is as safe for what it has answered, but takes the file for what it seems to be.
"""

from __future__ import annotations

import array
import asyncio
import bisect
import contextlib
import errno
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import IO, Any

from . import core
from .files import foreign, open_beside, open_regular, other_than_file, unwritable_draft

BESIDE = "superseded", "rescued", "spent", "running"


class Index:
    """The lines that a results file holds already, as the core's Earlier, in 50 bytes each."""

    def __init__(self) -> None:
        self.places, self.ids = array.array("q"), array.array("q")  # where a line begins; the hash of its id
        self.requests, self.rows = array.array("Q"), array.array("L")  # the two parts of its fingerprint
        self.errors: dict[int, core.Error] = {}  # of those that failed
        self.claimed = bytearray()  # 1 where a line belongs to a prompt
        self._order = array.array("L")  # of the lines by request, an answer first and then the latest failure
        self._next: dict[int, int] = {}  # place in that order, of requests with several lines

    def add(self, place: int, row_id: Any, key: str, error: core.Error | None) -> None:
        """Add a line."""
        if error:
            self.errors[len(self.places)] = error
        self.places.append(place)
        self.ids.append(hash(row_id))
        self.requests.append(int(key[:16], 16))
        self.rows.append(int(key[16:], 16))
        self.claimed.append(0)

    def of(self, key: str) -> Iterator[int]:
        """Yield the numbers of a request's lines that belong to no prompt yet."""
        request = int(key[:16], 16)
        if len(self._order) < len(self.places):
            self._sort()
        first = self._next.get(request) or bisect.bisect_left(self._order, request, key=self.requests.__getitem__)
        for at in range(first, len(self._order)):
            number = self._order[at]
            if self.requests[number] != request:
                return
            if not self.claimed[number]:
                if at > first:
                    self._next[request] = at
                yield number

    def _sort(self) -> None:
        answers = (number for number in range(len(self.places)) if number not in self.errors)
        parts = [array.array("L") for _ in range(256)]  # sorted one by one: all keys at once are objects of 90 bytes
        for number in itertools.chain(answers, sorted(self.errors, reverse=True)):
            parts[self.requests[number] >> 56].append(number)
        self._order = array.array("L")
        for part in parts:
            self._order.extend(sorted(part, key=self.requests.__getitem__))

    def claim(self, key: str) -> int | None:
        """Return the number of the line that a prompt with this fingerprint is given, None if there is none."""
        if (number := next(self.of(key), None)) is not None:
            self.claimed[number] = 1
        return number

    def left(self) -> list[int]:
        """Return the numbers of the lines that belong to no prompt."""
        return [number for number, claimed in enumerate(self.claimed) if not claimed]


class CarefulJournal(core.Journal):
    """The results file, of which nothing is written over that is not its own.

    Results of prompts that are no longer in the input, or were asked otherwise, go to FILE.superseded.jsonl, since they
    were paid for. Raises UsageError where the file is no file, another job's, or where something stands beside it.
    """

    index = Index

    def __init__(self, path: pathlib.Path, **options: bool) -> None:
        self._refused: set[int] = set()  # where the failures stand that hold a text, which was paid
        self._changed: dict[int, Any] = {}  # what is no longer as a prompt's line has it, see `renewed`
        self._new = False
        self._damaged: list[int] = []  # where the lines stand that are
        self._first_damaged = 0
        super().__init__(path, **options)

    def __exit__(self, kind: Any = None, *failure: Any) -> None:
        if not self._file.closed and self._file.writable():
            try:
                self.attend()
            except OSError:
                self._rescue()
        super().__exit__(kind, *failure)
        if self._new and kind is core.UsageError and not self._size:
            self.path.unlink()

    def _open(self) -> IO[bytes]:
        check_kind(self.path)
        self._new = not self.path.exists()
        check_beside(self.path)
        file: IO[bytes] = open_regular(self.path, "a+b", buffering=0)
        return self._locked(file)

    # ---- Lines of earlier runs -----------------------------------------------------------------------------------

    def _recognise(self, row: Any, number: int, offset: int) -> None:
        super()._recognise(row, number, offset)
        _, _, error, answered = core.recognised(row)
        if error and answered:
            self._refused.add(offset)

    def _pass_over(self, number: int, offset: int, ours: bool) -> None:
        if not ours:
            self._refuse(number)
        self._damaged.append(offset)
        self._first_damaged = self._first_damaged or number

    def _mend(self, size: int, last: bytes) -> int:
        if self._damaged and not self._earlier.places:
            self._refuse(self._first_damaged)
        if self._damaged:
            core.log.warning("%s line %d is damaged; its prompt is sent again", self.path, self._first_damaged)
        return size if not self._file.writable() else super()._mend(size, last)

    def check(self, prompts: Iterable[core.Prompt], source: str) -> None:
        """Raise UsageError where the file holds answers, and all of them are to other prompts than these."""
        earlier = self._earlier
        rows = {row for number, row in enumerate(earlier.rows) if number not in earlier.errors}
        keys = map(core.fingerprint, prompts)
        if not rows or any(next(earlier.of(key), None) is not None or int(key[16:], 16) in rows for key in keys):
            return
        what = f"{self.path} contains results for a different input: none matches {source}"
        raise core.UsageError(f"{what}. Choose another (-o, output=), or discard them (--overwrite, overwrite=True)")

    def compare(self, prompt: core.Prompt, key: str, number: int) -> None:
        """Note what a prompt's line does not have as the prompt has it by now."""
        if self._earlier.rows[number] != int(key[16:], 16):  # the row's content or columns
            self._changed[prompt.number] = prompt.id, key, prompt.columns
        elif self._earlier.ids[number] != hash(prompt.id):
            self._changed[prompt.number] = prompt.id

    def _ordered(self, lines: IO[bytes]) -> Iterator[bytes]:
        for number, line in enumerate(super()._ordered(lines)):
            yield renewed(line, self._changed[number]) if number in self._changed else line

    def unclaimed(self, key: str) -> list[int]:
        """Return where the lines of a request begin that no prompt has claimed, an answer before a failure."""
        return [self._earlier.places[number] for number in self._earlier.of(key)]

    # ---- While it is written ---------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def tended(self, run: core.Run) -> AsyncIterator[None]:
        """Watch over the file during a run. Raises UsageError where a bulk backend has jobs running for it."""
        if not run.loop and core.beside_results(self.path, "running").exists():
            name = getattr(run.api, "name", "your function")
            core.sibling("backends", "bulk").PendingJobs(self.path, name, run.overwrites)
        syncing = asyncio.ensure_future(self._keep_synced(run))
        try:
            yield
        finally:
            syncing.cancel()

    async def _keep_synced(self, run: core.Run) -> None:
        """Bring the results to the disk once a second: a power cut, other than a kill, loses what is not there."""
        for wait in itertools.chain([0.1], itertools.repeat(1.0)):
            await asyncio.sleep(wait)
            try:
                self.attend()
                await asyncio.to_thread(self.sync)
            except OSError as failure:
                run.stop(core.disk_error(self.path, failure))
                return

    def attend(self) -> None:
        """See that the file is there: where somebody has removed it, go on in a new one with all that it held.

        Raises OSError where there can be none, or another file has taken its place.
        """
        with contextlib.suppress(FileNotFoundError):
            if not os.path.samestat(os.fstat(self._file.fileno()), self.path.stat()):
                raise FileExistsError(errno.EEXIST, "another file has taken its place")
            return
        mode = 0o666 & os.fstat(self._file.fileno()).st_mode
        number = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL, mode)
        new = open(number, "a+b", buffering=0)  # noqa: SIM115 - closed by __exit__
        self._copy(new)
        core.lock(new, self.path)
        self._file.close()
        self._file, self._synced = new, 0
        core.log.warning("%s was removed or renamed; writing all answers to a new one", self.path)

    def _copy(self, file: IO[bytes]) -> None:
        with self.reading() as lines:
            lines.seek(0)
            shutil.copyfileobj(lines, file)

    def _rescue(self) -> None:
        """Write the answers beside a file that has taken their place, where that is possible."""
        place = place_of(self.path, "rescued")
        try:
            with open_beside(place, self._file.fileno()) as file:
                self._copy(file)
            core.log.warning("the answers are in %s", place)
        except OSError as failure:
            core.log.warning("the answers could not be written to %s: %s", place, failure.strerror)

    # ---- The end ---------------------------------------------------------------------------------------------------

    def finish(self, whole: bool = True) -> None:
        """Put the file into the input's order; where no file may take its place there, it stays as it is."""
        self.attend()
        try:
            super().finish(whole)
        except OSError as failure:
            if failure.errno not in (errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM):
                raise
            reason = failure.strerror
            core.log.warning("%s cannot be put into the input's order (%s); it is complete", self.path, reason)

    def _keep_others(self, file: IO[bytes], lines: IO[bytes], whole: bool) -> None:
        stale = [core.line_at(lines, place) for place in self._stale(whole)]
        if not whole:
            file.writelines(stale)
        elif stale:
            core.flush(file)
            self._set_aside(stale)

    def _stale(self, answers: bool) -> list[int]:
        """Return where the lines (or only the answers) stand that belong to nothing in the input."""
        earlier = self._earlier
        left, known = earlier.left(), list(zip(earlier.requests, earlier.ids, strict=True)) if not answers else []
        places = {earlier.places[number] for number in left if number not in earlier.errors}.union(self._damaged)
        if self._refused:  # but for those that were kept: others were asked again
            places |= self._refused - {*self._offsets}
        if not answers:  # of those with an id and a request the last, if no other is kept
            last = {known[number]: earlier.places[number] for number in left}
            newer = {known[number] for number in left if earlier.places[number] in places}
            newer |= {line for line, claimed in zip(known, earlier.claimed, strict=True) if claimed}
            places.update(last[line] for line in last.keys() - newer)
        return sorted(places)

    def _set_aside(self, lines: list[bytes]) -> None:
        place = place_of(self.path, "superseded")
        with open_beside(place, self._file.fileno()) as file:
            file.writelines(lines)
            core.flush(file)
        core.log.warning("%s to prompts not in this input moved to %s", core.plural(len(lines), "answer"), place)


class Look(CarefulJournal):
    """The results file as it is: nothing is written, created or locked."""

    def _open(self) -> IO[bytes]:
        check_kind(self.path)
        file: IO[bytes] = open_regular(self.path, buffering=0)
        return file


def renewed(line: bytes, now: Any) -> bytes:
    """Return a result's line with what its prompt has by now: its id, or its id, fingerprint and columns."""
    try:
        row = json.loads(line)  # and not orjson's, to which long numbers are floats
    except (ValueError, RecursionError):  # deeper than it goes
        return line
    if "request" not in row:  # a Batch output line
        return line
    if not isinstance(now, tuple):
        return core.to_line(row | {"id": now})
    row_id, key, columns = now
    row = core.own_part(row) | {"id": row_id, "request": key}
    return core.to_line(row | core.beside([*row, *core.AT_TIMES], columns))


def place_of(results: pathlib.Path, what: str) -> pathlib.Path:
    """Return where one of BESIDE is kept beside a results file: answers keep its suffix."""
    if what in ("superseded", "rescued"):
        return results.with_name(f"{results.stem}.{what}{results.suffix}")
    path: pathlib.Path = core.beside_results(results, what)
    return path


def check_kind(results: pathlib.Path) -> None:
    """Raise UsageError where something else than a file stands there."""
    if kind := other_than_file(results):
        what = f"{results} is not a file that can be continued but {kind}"
        raise core.UsageError(f"{what}; choose another file (-o, output=)")


def check_beside(results: pathlib.Path) -> None:
    """Raise UsageError where something stands in the place of a file that is written beside the results."""
    owner = results if results.exists() else pathlib.Path(os.path.realpath(results)).parent
    for path in (place_of(results, what) for what in BESIDE):
        try:
            reason = other_than_file(path, links=False) or foreign(path.lstat(), owner.stat())
        except FileNotFoundError:
            continue
        if reason:
            raise core.UsageError(f"{path} is {reason}; remove it, or choose another results file (-o, output=)")
    for path in (results, core.beside_results(results, "spent")):
        if why := unwritable_draft(path):
            raise core.UsageError(f"{why}, or choose another results file (-o, output=)")
