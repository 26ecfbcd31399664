"""The openai-batch backend: OpenAI's Batch API, at half the price and within a day. Needs: pip install openai.

The requests go into files of one endpoint and one model each; a batch is made of each file and looked at until it has
ended, and its rows are fetched. What a file holds is noted before a batch can be made of it, so that a later run of
the same job finds what is running and pays for nothing twice.
"""

import asyncio
import errno
import json
import re
import tempfile
import time
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from typing import IO, Any

from . import MAX_BODY, api
from .openai_sdk import BELOW_HTTP, below_http, open_client, without_key

ENVELOPE = 150  # bytes of a line, at the most, beside its body
AT_ONCE = 8  # batches that run at a time by default
FIRST_POLL, LAST_POLL = 1.0, 60.0  # seconds between two looks, growing
GRACE = 5.0  # seconds after the first Ctrl-C in which a second one cancels the batches
REFUSALS = 3  # of a file, each time without the lines that were named, until all of it is given up
DAY = 86400.0  # seconds in which a batch ends
SKEW = 3600.0  # seconds by which clocks may differ
TRIALS = 3  # to fetch an output in which rows are missing
CONTACTS = 3  # calls until a server that has never answered is given up
MAX_OBJECT = 16 * 1024 * 1024  # bytes of an object of the API: a batch, with the faults of its 50,000 lines
MAX_FILE = 16 * 1024 * 1024 * 1024  # bytes of an output file
MAX_VALUES = 8_000_000  # in a row: 2,048 vectors of 3,072 numbers are 6 million
MAX_TEXT = 4000  # characters of an error's message
ENDED = {"completed", "failed", "expired", "cancelled"}

Outcome = tuple[int, dict[str, str], bytes]


class Batch:
    """A file of requests, and the batch that is created from it."""

    def __init__(self, names: Iterable[str] = (), file: str = "", time: float = 0.0, refusals: int = 0) -> None:
        self.names = list(names)  # custom ids, in the file's order
        self.time = time  # of the note
        self.requests: dict[str, Any] = {}  # the open ones, by name
        self.moved: set[str] = set()  # of these, what was put into another batch
        self.file, self.id, self.refusals = file, "", refusals
        self.state, self.done = "validating", 0
        self.found: Any = None  # when it was last looked at
        self._keys: Counter[str] = Counter()

    def add(self, request: Any) -> None:
        """Put a request into the file; its custom id is what a later run knows it by."""
        self._keys[request.key] += 1
        name = f"{request.key}-{self._keys[request.key]}"
        self.names.append(name)
        self.requests[name] = request

    @property
    def path(self) -> str:
        """The endpoint's path below /v1, of all the requests."""
        path: str = next(iter(self.requests.values())).path
        return path.partition("?")[0]

    def write(self, file: IO[bytes]) -> None:
        """Write the request file."""
        file.writelines(self.requests[name].line(name) for name in self.names)


async def submit(job: Any) -> AsyncIterator[tuple[Any, Outcome]]:
    """Answer the job's requests in batches; see the contract in the package's docstring."""
    query = dict(item.partition("=")[::2] for item in job.query.split("&") if item)
    timeout = job.options["timeout"]
    async with open_client(job.base_url, job.headers, 4, MAX_OBJECT, default_query=query, timeout=timeout) as client:
        batches = Batches(job, client)
        try:
            async for request, outcome in batches.work():
                yield request, outcome
        except asyncio.CancelledError:
            await batches.cancel()
            raise
        except OSError as failure:
            if failure.errno not in (errno.ENOSPC, errno.EFBIG):
                raise
            raise OSError(f"{failure.strerror} in {tempfile.gettempdir()} (TMPDIR)") from None
        finally:
            batches.say_running()


def check_note(note: dict[str, Any]) -> None:
    """Raise ValueError if a note has not the form that `Batches.note` writes: it may be damaged or forged."""
    texts = [note[name] for name in ("file", "batch", "done") if name in note]
    if "names" in note:
        texts += [*note["names"], *(text for file, name in note["instead"] for text in (file, name))]
        if type(note["names"]) is not list or type(note["time"]) not in (int, float):
            raise ValueError("names and time")
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError("a name that is no text")


submit.price_share = 0.5  # type: ignore[attr-defined]
submit.parting = f"batches run on; interrupt again within {GRACE:.0f} s to cancel them"  # type: ignore[attr-defined]


class Batches:
    """The batches of one job: `ready` are to be created, `running` to be polled."""

    def __init__(self, job: Any, client: Any) -> None:
        self.job, self.client = job, client
        self.running: list[Batch] = []
        self.ready: deque[Batch] = deque()
        told = job.options["concurrency"]
        self.at_once = AT_ONCE if told == "auto" else told
        self.lines = api.BATCH_LINES  # of the next file; fewer if the account's queue accepts no more
        self.full = False  # whether the account's queue is full
        self._heard, self._late = False, list[Batch]()
        self._failed: dict[Any, tuple[str, str]] = {}  # requests, and the rows in which they failed
        self._noted: set[str] = set()  # files of which something may be running
        self._keyless = {"extra_headers": without_key(job.headers)}

    async def work(self) -> AsyncIterator[tuple[Any, Outcome]]:
        """Create batches and fetch those that have ended, until all are done; yield requests with their outcomes."""
        self.job.in_flight(0)
        await self.attach()
        wait = FIRST_POLL
        while not self.job.stopped:
            await self.make()
            if not self.running and not self.ready:
                return
            ended = [batch for batch in self.running if await self.look(batch)]
            for batch in ended:
                self.running.remove(batch)
                async for request, outcome in self.fetch(batch):
                    yield request, outcome
            self.say()
            if ended and not self.full:
                wait = FIRST_POLL
            else:
                await self.job.sleep(wait)
                wait, self.full = min(LAST_POLL, 1.5 * wait), self.full and bool(self.running)
        if self.running and self.job.stopped == "interrupted":
            await asyncio.sleep(GRACE)

    def say(self) -> None:
        """Show the progress of the batches."""
        states = Counter(batch.state.replace("_", " ") for batch in self.running)
        parts = [f"{count} {'batch' if count == 1 else 'batches'} {state}" for state, count in states.items()]
        done, rows = sum(batch.done for batch in self.running), sum(len(batch.names) for batch in self.running)
        parts += [f"{done:,} of {rows:,} rows there"] * bool(rows) + ["the account's queue is full"] * self.full
        self.job.in_flight(sum(len(batch.requests) for batch in self.running))
        self.job.say(", ".join(parts) or "creating the next batch")

    def say_running(self) -> None:
        """Warn of the batches that keep running after this run."""
        if self.running:
            lost = "" if self.job.noted_in else "; without a results file (-o) no later run can fetch their results"
            self.job.log.warning("still running: %s%s", ", ".join(batch.id for batch in self.running), lost)

    async def call(self, function: Callable[..., Awaitable[Any]], *args: Any, attempts: float = 0, **more: Any) -> Any:
        """Call the API, with retries. Raises PromptError."""

        async def once() -> Any:
            try:
                found = await function(*args, **more, **self._keyless)
            except BELOW_HTTP as failure:
                raise below_http(failure) from failure
            if isinstance(found, str):  # the SDK returns a body that is not JSON as text
                raise ConnectionError(f"there is no Batch API at {self.job.base_url}")
            return found

        attempts = attempts or (float("inf") if self._heard else CONTACTS)
        found = await self.job.call(once, attempts=attempts)
        self._heard = True
        return found

    async def note(self, value: dict[str, Any]) -> None:
        """Write a note; remove all notes once no batch is running."""
        await self.job.note(value)
        if "done" in value:
            self._noted.discard(value["done"])
            if not self._noted:
                self.job.forget()
        else:
            self._noted.add(value["file"])

    # -- what an earlier run has left

    async def attach(self) -> None:
        """Find the batches in the notes of earlier runs, and match their requests to this run's prompts."""
        noted: dict[str, Batch] = {}
        try:
            self.read_notes(noted)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ValueError(
                f"{self.job.noted_in} is damaged; repair it, or remove it to discard the running batches"
            ) from None
        for batch in noted.values():  # the run may have ended after creating a batch and before noting its id
            batch.id = batch.id or await self.find(batch)
            if batch.id:
                self._noted.add(batch.file)
        running = [batch for batch in noted.values() if batch.id]
        others = await self.claim(running) if running else []
        self.running = [batch for batch in running if batch.requests]
        if others and not self.running and running and not self.job.answered:
            raise ValueError(
                f"{running[0].id}, which an earlier run started for these results, contains none of these requests "
                "(another input, model or parameter?); run the command that started it, or discard it (--overwrite)"
            )
        for batch in [batch for batch in running if not batch.requests]:
            if await self.look(batch):
                await self.note({"done": batch.file})
            else:
                self.job.log.warning("%s is running and contains none of these requests; leaving it alone", batch.id)
                self.job.keep_notes()
        self.ready.extend(self.pack(others))

    def read_notes(self, noted: dict[str, Batch]) -> None:
        """Read the notes into `noted`, by the id of the uploaded file."""
        for note in self.job.notes:
            check_note(note)
            if "names" in note:
                noted[note["file"]] = Batch(note["names"], note["file"], time=note["time"])
                for file, name in note["instead"]:
                    if file in noted:
                        noted[file].moved.add(name)
            elif "batch" in note:
                noted[note["file"]].id = note["batch"]
            else:
                noted.pop(note["done"], None)

    async def claim(self, running: list[Batch]) -> list[Any]:
        """Take requests until all those in the batches are found; return the ones that are in no batch."""
        places: dict[str, deque[tuple[Batch, str]]] = defaultdict(deque)
        for batch in running:
            for name in (name for name in batch.names if name not in batch.moved):
                places[name.rpartition("-")[0]].append((batch, name))
        others = []
        while places and (requests := await self.job.take(1000)):
            for request in requests:
                if held := places.get(request.key):
                    batch, name = held.popleft()
                    batch.requests[name] = request
                    if not held:
                        del places[request.key]
                else:
                    others.append(request)
        return others

    async def find(self, batch: Batch) -> str:
        """Return the id of the batch that was created from an uploaded file, or ''."""

        async def search() -> Any:
            async for found in self.client.batches.list(limit=100, **self._keyless):  # the newest first
                if found.input_file_id == batch.file or moment(found.created_at, time.time()) < batch.time:
                    return found if found.input_file_id == batch.file else None
            return None

        found = await self.call(lambda **_: search())
        return found.id if found else ""

    # -- making

    def pack(self, requests: Iterable[Any]) -> list[Batch]:
        """Put requests into files of one endpoint and one model each, as the API requires."""
        places = api.BatchFiles(self.lines)
        batches: dict[int, Batch] = defaultdict(Batch)
        for request in requests:
            size = len(request.body) + ENVELOPE
            batches[places.place((request.path, request.model), size)].add(request)
        return [*batches.values()]

    async def make(self) -> None:
        """Create batches until as many are running as may be."""
        while len(self.running) < self.at_once and not self.full and not self.job.stopped:
            if not self.ready:
                size = api.BATCH_BYTES - ENVELOPE * self.lines
                self.ready.extend(self.pack(await self.job.take(self.lines, size)))
            if not self.ready:
                return
            batch = self.ready[0]
            if not batch.file:
                batch.file, batch.time = await self.upload(batch)
                instead = [self._failed.pop(one) for one in batch.requests.values() if one in self._failed]
                await self.note({"file": batch.file, "names": batch.names, "time": batch.time, "instead": instead})
            if self.job.stopped or not (id := await self.create(batch)):
                return
            batch.id = id
            self.running.append(self.ready.popleft())
            await self.note({"file": batch.file, "batch": id})
            self.job.log.info("%s: %s requests", id, f"{len(batch.names):,}")
            self.say()

    async def upload(self, batch: Batch) -> tuple[str, float]:
        """Upload the request file; return its id, and when that was by the server's clock."""
        with tempfile.TemporaryFile() as file:
            await asyncio.to_thread(batch.write, file)

            async def send(**more: Any) -> Any:
                file.seek(0)
                return await self.client.files.create(file=("requests.jsonl", file), purpose="batch", **more)

            try:
                found = await self.call(send)
                return id_of(found), moment(found.created_at, 0.0)
            except self.job.core.PromptError as failure:
                if not self._heard and failure.error.status in (404, 405, 501):
                    raise ValueError(f"there is no Batch API at {self.job.base_url} (POST /files)") from None
                raise

    async def create(self, batch: Batch) -> str:
        """Create a batch from an uploaded file; return its id, or '' if the run was stopped before it is known."""
        asked = {"input_file_id": batch.file, "endpoint": f"/v1{batch.path}", "completion_window": "24h"}
        wait = FIRST_POLL
        while True:
            try:
                return id_of(await self.call(self.client.batches.create, **asked, attempts=1))
            except self.job.core.PromptError as failure:
                if failure.verdict != "retry":
                    raise
                self.job.log.info("%s; checking whether the batch was created", failure)
            if not await self.job.sleep(wait):
                return ""
            if found := await self.find(batch):  # only the response was lost
                return found
            wait = min(LAST_POLL, 2 * wait)

    # -- fetching

    async def look(self, batch: Batch) -> bool:
        """Poll a batch; return whether it has ended."""
        try:
            found = await self.call(self.client.batches.retrieve, batch.id)
        except self.job.core.PromptError as failure:
            if failure.error.status == 404:
                text = "is unknown to this server and key; use those that it was created with"
                raise ValueError(f"{batch.id} {text}, or discard it (--overwrite)") from None
            raise
        batch.state, batch.found = str(found.status)[:40], found
        if time.time() > moment(found.created_at, time.time()) + DAY + SKEW and batch not in self._late:
            self._late.append(batch)
            self.job.log.warning("%s should have ended by now; --overwrite discards it", batch.id)
        counts = found.request_counts
        done = [getattr(counts, name, 0) for name in ("completed", "failed")]
        batch.done = sum(number for number in done if isinstance(number, int) and 0 <= number <= len(batch.names))
        return batch.state in ENDED

    async def fetch(self, batch: Batch) -> AsyncIterator[tuple[Any, Outcome]]:
        """Yield the requests of a batch that has ended, with their outcomes."""
        if batch.state == "failed":
            async for request, outcome in self.refused(batch):
                yield request, outcome
            return
        lost, strays = "", 0
        for trial in range(TRIALS):
            for file in filter(None, (batch.found.output_file_id, batch.found.error_file_id)):
                with tempfile.TemporaryFile() as rows:
                    lost = lost if await self.download(file, rows) else file
                    for name, outcome in map(row_outcome, lines_of(rows)):
                        if (request := batch.requests.pop(name, None)) is not None:
                            if outcome[0] != 200:
                                self._failed[request] = batch.file, name
                            yield request, outcome
                        elif name and name not in batch.moved:
                            strays += not trial
            if not batch.requests or lost or batch.state != "completed":
                break  # a missing row was paid for, and may appear later
            await self.job.sleep(FIRST_POLL)
        for name, request in batch.requests.items():
            self._failed[request] = batch.file, name
            yield request, missing(batch, lost)
        if strays:  # of prompts that have an answer by now, or are another run's
            self.job.log.warning("%s: ignoring %d rows that belong to no open prompt of this run", batch.id, strays)
        elif not self.job.stopped:
            await self.note({"done": batch.file})

    async def download(self, file: str, rows: IO[bytes]) -> bool:
        """Download a file; return False if it does not exist."""

        async def receive(**more: Any) -> Any:
            rows.seek(0)
            rows.truncate()
            async with self.client.files.with_streaming_response.content(file, **more) as reply:
                async for block in reply.iter_bytes():
                    if self.job.stopped or rows.tell() > MAX_FILE:
                        why = "was not fetched: the run was stopped" if self.job.stopped else "is too large"
                        raise self.job.core.PromptError("file_not_fetched", f"the output file {file} {why}", "stop")
                    rows.write(block)
            rows.seek(0)

        try:
            await self.call(receive)
        except self.job.core.PromptError as failure:
            if failure.error.status == 404:
                return False
            raise
        return True

    async def refused(self, batch: Batch) -> AsyncIterator[tuple[Any, Outcome]]:
        """Yield the requests that the server rejected, and put the others of the batch into another file."""
        errors = (batch.found.errors and batch.found.errors.data) or []
        if errors and errors[0].code == "token_limit_exceeded":
            await self.hold(batch)
            return
        await self.note({"done": batch.file})
        named = {batch.names[error.line - 1]: error for error in errors if 0 < (error.line or 0) <= len(batch.names)}
        if not named:
            code, text = (errors[0].code, errors[0].message) if errors else ("", "the server gives no reason")
            self.job.stop(code or "batch_failed", f"{batch.id} was refused: {text}")
            return
        last = batch.refusals + 1 >= REFUSALS
        rest = Batch(refusals=batch.refusals + 1)
        for name, request in batch.requests.items():
            if name in named or last:
                error = named.get(name, errors[0])
                yield request, (400, {}, as_error(error.code, f"{batch.id}: {error.message}"))
            else:
                rest.add(request)
        if rest.names:
            self.ready.appendleft(rest)

    async def hold(self, batch: Batch) -> None:
        """Hold a batch back while the account's queue is full; if no other is running, make it smaller."""
        batch.id = ""
        self.full = bool(self.running) or len(batch.names) == 1
        if self.full:
            return self.ready.appendleft(batch)
        self.lines = (len(batch.names) + 1) // 2
        self.job.log.info("the account's queue does not accept %d requests; trying %d", len(batch.names), self.lines)
        self.ready.extendleft(reversed(self.pack(batch.requests.values())))
        await self.note({"done": batch.file})

    async def cancel(self) -> None:
        """Ask the server to cancel what is running."""
        if self.running:
            async with asyncio.timeout(10):
                calls = (self.client.batches.cancel(batch.id, **self._keyless) for batch in self.running)
                done = await asyncio.gather(*calls, return_exceptions=True)
            asked = [batch.id for batch, one in zip(self.running, done, strict=True) if not isinstance(one, Exception)]
            told = f"the server is cancelling {', '.join(asked)}" if asked else "the batches could not be cancelled"
            self.job.log.warning("%s; what is answered is billed, and fetched when the command is run again", told)


def lines_of(rows: IO[bytes]) -> Iterator[bytes]:
    """Yield the lines of a file, without those longer than MAX_BODY."""
    while line := rows.readline(MAX_BODY + 1):
        if len(line) <= MAX_BODY:
            yield line
        while len(line) > MAX_BODY and not line.endswith(b"\n"):
            line = rows.readline(MAX_BODY + 1)


def moment(told: Any, otherwise: float) -> float:
    """Return the Unix time that a server sent, or `otherwise` if it is none."""
    return float(told) if isinstance(told, int) and 0 <= told < 2**40 else otherwise


def row_outcome(line: bytes) -> tuple[str, Outcome]:
    """Return the custom id in a row of an output or error file, and the reply in it, as a live backend has it."""
    name = ""
    try:
        if len(line) > MAX_VALUES and sum(map(line.count, (b",", b"[", b"{"))) > MAX_VALUES:
            raise ValueError
        row = json.loads(line)
        name, response = str(row["custom_id"]), row.get("response") or {}
        body = response.get("body")
        if not response:
            error = row.get("error") or {}
            status = re.match(r"Error code: (\d{3})\b", str(error.get("message")))  # some servers' only status
            return name, (int(status[1]) if status else 0, {}, as_error(error.get("code"), error.get("message")))
        text = body if isinstance(body, str) else json.dumps(body)  # some servers send the body as a text
        headers = {"x-request-id": str(response.get("request_id") or "")}
        status_code = int(response.get("status_code") or 0)
        if not status_code and not body:  # the server had no response
            return name, (0, {}, as_error("batch_row_empty", "the batch has no answer for this request (status 0)"))
        if not 100 <= status_code < 600:
            raise ValueError
        return name, (status_code, headers, text.encode())
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError):
        text = "its row in the batch's output cannot be read; its answer is billed"
        return name, (0, {}, as_error("row_unreadable", text))


def id_of(found: Any) -> str:
    """Return the id of an object that the server created. Raises ValueError if it has none."""
    if not isinstance(found.id, str) or not 0 < len(found.id) < 200:
        raise ValueError("the server created an object without an id")
    return found.id


def as_error(code: Any, message: Any) -> bytes:
    """Return an error in OpenAI's form."""
    code, message = (str(one)[:MAX_TEXT] if one else "" for one in (code, message))
    error = {"code": code or "row_failed", "message": message or "the row failed; the batch gives no reason"}
    return json.dumps({"error": error}).encode()


def missing(batch: Batch, lost: str) -> Outcome:
    """Return the outcome of a request for which a batch has no row."""
    if lost:
        text = f"{batch.id}: its file {lost} is gone; its answers are billed. --retry-failed sends and pays again"
        return 0, {}, as_error("file_gone", text)
    code = {"expired": "batch_expired", "cancelled": "batch_cancelled"}.get(batch.state, "row_missing")
    return 0, {}, as_error(code, f"{batch.id} is {batch.state} and has no row for this request")
