"""Stand-in for an OpenAI-compatible API: made-up answers over real HTTP/1.1, with limits and faults on demand.

Usage: python -m concurrent_prompts.extras.stand_in [options]

Serves POST /v1/chat/completions, /v1/responses, /v1/completions and /v1/embeddings, GET /v1/models, /v1/files,
/v1/batches, and GET /v1/stand_in/stats: what the server saw of the others, as JSON. Answers say that they are made up;
their text, usage and finish_reason depend on the request body alone. A token is four characters.

Where it listens:
  --host ADDRESS         default 127.0.0.1
  --port N               default 8000; 0 is any free one
  --tls FILE             serve https with the certificate and key in this PEM file
  --exit-on-eof          stop when standard input ends, as it does when the parent process dies
How fast it is:
  --latency SECONDS      median time to an answer, default 0
  --sigma S              shape of the lognormal latency, default 0: always the median
  --knee N               work on N requests at a time and queue the others; latency starts with the work
  --work-on              continue to work for clients that hung up, queued ones too, as thread pools do
  --gateway-timeout S    a gateway answers 504, an HTML page, after S seconds, and hangs up on the server (--work-on)
  --stragglers SHARE     this share of the calls takes many times as long; a second call for the same may not
  --straggler-factor X   how many times, default 40
What it imitates:
  --dialect NAME         openai (default), openrouter, gemini, lmstudio, deepseek, azure, litellm, groq or llamacpp: its
                         paths, keys, headers of limits, errors, usage and finish reasons (extras/stand_in_dialects.py)
  --keep-alive S         a blank line (in a stream, a comment) every S seconds while it works on a call, as DeepSeek
                         and OpenRouter do (default 5 for these); a failure after the first one has status 200
What it rejects:
  --rpm N, --tpm N       requests, tokens per minute, refilled continuously. In tokens a request costs its
                         prompt plus its maximum output (if it sets none, the real one) times n
  --burst SHARE          what can be saved up, as a share of a minute's limit, default 0.1; a larger request
                         (up to the limit) passes when nothing has been used, and leaves a debt
  --no-limit-headers     no x-ratelimit-*, no retry-after, no numbers in the message
  --count-rejected       rejected requests use up the limits too
  --max-in-flight N      at most N at once
  --gate R               R requests a second, as nginx's limit_req with nodelay: no headers, a page of HTML
  --gate-burst B         that many more at once, default 0
  --window N/S           at most N requests in S seconds
  --window-kind KIND     sliding (default), fixed (all at once, then none until the S seconds are over), or weighted:
                         sliding as HAProxy's http_req_rate estimates it, which counts rejected ones (--count-rejected)
  --window-tells A,B     span or date: x-ratelimit-limit, -remaining and -reset, in seconds or as an epoch date;
                         retry-after: with a rejection, the seconds to wait. Else there are none, and a page of HTML
  --reject-status N      how the last three limits reject, default 429; any from 400 to 599
  --retry-after S        they send this Retry-After, whatever the wait is
  --reject-message TEXT  their message, such as "Limit type: max_parallel_requests. Current limit: 3"
  --quota N              after N answered requests, 429 insufficient_quota for ever
  --require-key KEY      without "Authorization: Bearer KEY", 401
  --models A,B           any other model is 404
  --shutdown DATE        what the list of models gives as their shutdown_date (YYYY-MM-DD)
What goes wrong:
  --fault KIND=SHARE     this share of the requests fails; may be repeated. The kinds: 429, 500, 502, 503-html,
                         reset, truncated, hang, null-choices, error-200, malformed, empty-html, schema (the last
                         five with status 200; schema: the first answer to a request with a schema does not fit it);
                         and in the dialect's words: context (too long), content (refused), credit (used up), key
                         (wrong), busy, cut (half an answer, or why there is none), empty (an answer with nothing in
                         it), stream (events that nobody asked for). 429, 500 and 502 are in its words, too
  --outage KIND@FROM+SECONDS  may be repeated; FROM counts from the first request. The kinds: silent (accepted, never
                         answered; neither is what was to be answered then), refused (the port is closed and connections
                         are reset; use a --port that the system gives to no client), 503, 502-page (HTML; what
                         was to be answered then, too), loading (503 Loading model), slow (ten times the latency)
  --replicas N           so many behind this address; a connection leads to one of them, drawn at random
  --sick K               so many of these answer 500 at once; K:STATUS: another status; K:never: nothing ever
  --seed N               default 0. The latency of a request follows from the seed and its JSON, its fault also
                         from how often the same was accepted before, so every client meets the same faults
  --close-every N        close each connection after its N-th answer, unannounced
  --chunked, --gzip      encode the answers so, asked or not
What becomes of batches (--latency and --require-key are for them, too; --models and --fault for their lines):
  --batch-time SECONDS   from a batch's creation to its end, default 0: it has ended when next anything about files,
                         batches or the stats is asked. The first and the last tenth are validating and finalizing
  --batch-queue N        prompt tokens that the unfinished batches may have together; what exceeds them fails
  --batch-fault KIND     may be repeated; KIND=SHARE for a share of the batches, which follows from their files:
                         invalid, errors-only (each line 400), shuffle (output in another order), strings (each body
                         a JSON string), lost-file (the output is not found), create-lost (a reset after the creation),
                         poll-500 (when looked at for the first time, the third, ...), poll-slow (=SECONDS to look at
                         one); and for a share of the lines: expire, expire-once (when their body is asked first)

Prints its base URL when it is ready; SIGINT, SIGTERM or the end of input stop it, with the counts on stderr.
In Python: ``async with serve(latency=0.1, fault={"500": 0.05}) as server:`` has server.url and server.stats.
Where a request has a JSON schema (response_format, text.format), its answer is a made-up instance: of objects, arrays,
enums, texts, numbers and $ref; patterns and formats mean nothing to it.
Where a request has "stream": true, its answer is a stream of events in the dialect's form, all of them when it is due.
It does not call tools, or check parameters that it does not use.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import signal
import ssl
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from hashlib import blake2b
from typing import Any
from weakref import WeakKeyDictionary

from .stand_in_answers import (
    CRASHED,
    DIALECT_FAULTS,
    ENDPOINTS,
    FAULTS,
    READY_MADE,
    SERIAL,
    STREAM,
    Ask,
    Refusal,
    Reply,
    answer,
    canonical,
    draw,
    encode_json,
    error,
    fate,
    html,
)
from .stand_in_batches import BATCH_FAULTS, Batches
from .stand_in_dialects import DIALECTS, NOWHERE
from .stand_in_http import Connection, Head, Job
from .stand_in_limits import (
    OUTAGES,
    SLOW_FACTOR,
    WINDOW_TELLS,
    WINDOWS,
    Limit,
    limits_of,
    milliseconds,
    read_outages,
    read_sick,
    rejection,
)
from .stand_in_streams import comment_of

__all__ = ["BATCH_FAULTS", "ENDPOINTS", "FAULTS", "OUTAGES", "Options", "Server", "Stats", "main", "serve"]


# --- Options ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """The command's flags as fields of the same names, described in the manual above; the parser is made from them.

    Raises ValueError for impossible values.
    """

    host: str = "127.0.0.1"
    port: int = 0
    tls: str | None = None
    latency: float = 0.0
    sigma: float = 0.0
    dialect: str = "openai"
    keep_alive: float | None = None
    knee: int | None = None
    work_on: bool = False
    gateway_timeout: float | None = None
    stragglers: float = 0.0
    straggler_factor: float = 40.0
    rpm: int | None = None
    tpm: int | None = None
    burst: float = 0.1
    no_limit_headers: bool = False
    count_rejected: bool = False
    max_in_flight: int | None = None
    gate: float | None = None
    gate_burst: int = 0
    window: tuple[int, float] | None = None
    window_kind: str = "sliding"
    window_tells: tuple[str, ...] = ()
    reject_status: int = 429
    retry_after: float | None = None
    reject_message: str = ""
    quota: int | None = None
    require_key: str | None = None
    models: tuple[str, ...] = ()
    shutdown: str | None = None
    fault: Mapping[str, float] = field(default_factory=dict)
    outage: tuple[str, ...] = ()
    replicas: int | None = None
    sick: str | None = None
    seed: int = 0
    close_every: int | None = None
    chunked: bool = False
    gzip: bool = False
    batch_time: float = 0.0
    batch_queue: int | None = None
    batch_fault: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lowest = {"port": 0, "latency": 0, "sigma": 0, "burst": 0, "quota": 0, "batch_time": 0, "batch_queue": 0,
                  "knee": 1, "rpm": 1, "tpm": 1, "max_in_flight": 1, "close_every": 1, "gate": 1e-6, "gate_burst": 0,
                  "gateway_timeout": 1e-3, "stragglers": 0, "straggler_factor": 0, "retry_after": 0, "replicas": 1,
                  "keep_alive": 1e-3}
        for name, low in lowest.items():
            value = getattr(self, name)
            if value is not None and not low <= value < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} must be {low} or more, not {value}")
        self._check_limits()
        self._check_faults()

    def _check_limits(self) -> None:
        for name, needed in (("work_on", "knee"), ("gate_burst", "gate"), ("window_tells", "window"),
                             ("sick", "replicas")):
            if getattr(self, name) and getattr(self, needed) is None:
                raise ValueError(f"--{name.replace('_', '-')} needs --{needed}")
        if not 400 <= self.reject_status <= 599:
            raise ValueError(f"--reject-status must be from 400 to 599, not {self.reject_status}")
        if self.window and not (self.window[0] >= 1 and 0 < self.window[1] < math.inf):
            raise ValueError(f"--window takes N/S, both above 0, such as 40/8, not {self.window[0]}/{self.window[1]:g}")
        if self.window_kind not in WINDOWS:
            raise ValueError(f"--window-kind must be one of {', '.join(WINDOWS)}, not {self.window_kind}")
        if unknown := sorted(set(self.window_tells) - set(WINDOW_TELLS)):
            raise ValueError(f"--window-tells {unknown[0]} is unknown; choose {', '.join(WINDOW_TELLS)}")
        if {"span", "date"} <= set(self.window_tells):
            raise ValueError("--window-tells takes span or date, not both")

    def _check_faults(self) -> None:
        if self.stragglers > 1:
            raise ValueError(f"--stragglers takes a share of 0 to 1, not {self.stragglers}")
        read_outages(self.outage)
        if self.sick and read_sick(self.sick).number > (self.replicas or 0):
            raise ValueError(f"--sick {self.sick} is more than --replicas {self.replicas}")
        if unknown := sorted(self.fault.keys() - {*FAULTS, *DIALECT_FAULTS}):
            raise ValueError(f"--fault {unknown[0]} is unknown; choose {', '.join((*FAULTS, *DIALECT_FAULTS))}")
        if self.dialect not in DIALECTS:
            raise ValueError(f"--dialect {self.dialect} is unknown; choose {', '.join(DIALECTS)}")
        if not all(share >= 0 for share in self.fault.values()) or math.fsum(self.fault.values()) > 1:
            raise ValueError("--fault takes shares of 0 to 1 that sum up to 1 at most")
        if unknown := sorted(self.batch_fault.keys() - set(BATCH_FAULTS)):
            raise ValueError(f"--batch-fault {unknown[0]} is unknown; choose {', '.join(BATCH_FAULTS)}")
        for kind, value in self.batch_fault.items():
            if not 0 <= value <= 1 and not (kind == "poll-slow" and 1 < value < math.inf):
                wanted = "seconds" if kind == "poll-slow" else "a share of 0 to 1"
                raise ValueError(f"--batch-fault {kind} takes {wanted}, not {value}")


# --- Server -------------------------------------------------------------------------------------------------


@dataclass
class Stats:
    """Counts of requests; one that met a fault counts as a fault, not as answered or rejected. Times are in seconds."""

    requests: int = 0
    answered: int = 0
    rejected: int = 0
    unheard: int = 0  # answers that were ready after the client had gone
    faults: Counter[str] = field(default_factory=Counter)
    by_status: Counter[int] = field(default_factory=Counter)
    in_flight: int = 0
    max_in_flight: int = 0
    mean_in_flight: float = 0.0
    seconds: float = 0.0  # from the first request to the last answer
    files: int = 0  # uploads; these and requests about batches do not count as requests
    batches: int = 0
    batch_rows: int = 0  # lines with an answer, which an API would bill
    _first: float = 0.0
    _busy: float = 0.0

    def enter(self, now: float) -> None:
        self._first = self._first or now
        self.requests += 1
        self.in_flight += 1
        if self.in_flight > self.max_in_flight:
            self.max_in_flight = self.in_flight

    def leave(self, started: float, now: float) -> None:
        self.in_flight -= 1
        self._busy += now - started
        self.seconds = now - self._first
        self.mean_in_flight = self._busy / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        faults = sum(self.faults.values())
        text = f"requests {self.requests}, answered {self.answered}, rejected {self.rejected}, faults {faults}"
        return f"{text}, batches {self.batches} with {self.batch_rows} answered rows" if self.batches else text


class Server:
    """Decides how each request is answered; its connections read and write. `clock` returns seconds."""

    def __init__(self, options: Options, clock: Callable[[], float] = time.monotonic) -> None:
        self.options, self.stats, self.url, self.clock = options, Stats(), "", clock
        self.links: set[Connection] = set()
        self.closed = False
        self._listener: asyncio.Server | None = None
        self._limits: list[Limit] = limits_of(options, clock)
        self._outages, self._first = read_outages(options.outage), -math.inf
        self._sick = read_sick(options.sick or "0")
        self._replica_of: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self._drawn = 0  # connections with a replica
        self._tasks: list[asyncio.Task[None]] = []  # of the outages
        self._seen: Counter[bytes] = Counter()
        self._granted = 0
        self._working: set[Job] = set()
        self._queue: deque[Job] = deque()
        self._batches = Batches(self, clock)
        self._dialect = DIALECTS[options.dialect]
        self._keep_alive = options.keep_alive or self._dialect.keep_alive

    async def start(self) -> None:
        context = None
        if self.options.tls:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(self.options.tls)
        self._loop = asyncio.get_running_loop()
        self._listener = await self._loop.create_server(
            lambda: Connection(self), self.options.host, self.options.port, ssl=context, backlog=4096)
        host, port = self._listener.sockets[0].getsockname()[:2]
        place = f"{f'[{host}]' if ':' in host else host}:{port}{self._dialect.address}"
        self.url = f"http{'s' if context else ''}://{place}"

    async def close(self) -> None:
        """Stop listening, and abort the connections and tasks that are open."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._listener:
            self._listener.close()
        self.closed = True
        for link in self.links:
            link.abort()
        turns = 6  # asyncio takes some to make a link of a connection that was just accepted, which ends at once then
        while self.links or turns:  # each is removed by a callback that is already scheduled
            await asyncio.sleep(0)
            turns = max(0, turns - 1)
        self._queue.clear()  # requests whose clients have gone (--work-on)
        for job in list(self._working):
            self._stop_work(job)

    async def go_away(self) -> None:
        """Refuse new connections, and reset the open ones."""
        if self._listener:
            self.options = replace(self.options, port=self._listener.sockets[0].getsockname()[1])
            self._listener.close()
            self._listener = None
        for link in list(self.links):
            link.cut_off()

    async def come_back(self) -> None:
        """Listen again at the same port."""
        await self.start()

    @property
    def outage(self) -> str:
        """The kind of the current outage, or ""."""
        if not self._outages:
            return ""
        since = self.clock() - self._first
        return next((kind for kind, start, end in self._outages if start <= since < end), "")

    def _begin_schedule(self) -> None:
        """Start the schedule of the outages."""
        self._first = self.clock()
        for kind, start, end in self._outages:
            if kind == "refused" and self._listener:
                self._tasks.append(self._loop.create_task(self._pause(start, end)))

    async def _pause(self, start: float, end: float) -> None:
        """Refuse connections from `start` to `end`, in seconds from now."""
        await asyncio.sleep(start)
        await self.go_away()
        await asyncio.sleep(end - start)
        await self.come_back()

    def accept(self, job: Job, raw: bytes) -> None:
        """Answer a request now, or set the timer that will."""
        head, dialect = job.head, self._dialect
        key = dialect.key_of(head.authorization, head.api_key)
        job.head = head._replace(path=dialect.place(head.path, head.query), authorization=key)
        if job.head.path == "/v1/stand_in/stats":
            self._send_stats(job)
            return
        if self._outages and self._first == -math.inf:
            self._begin_schedule()
        ill = self.outage
        if ill in ("", "slow") and job.head.path not in ENDPOINTS and self._serve_more(job, raw):
            return
        self.stats.enter(job.started)
        job.counted = True
        if ill not in ("", "slow"):
            self._suffer(job, ill)
        elif self._sick.number and self._replica(job.link) < self._sick.number:
            self._sicken(job)
        else:
            self._treat(job, raw)

    def _suffer(self, job: Job, kind: str) -> None:
        """Answer, hold or reset a request that arrives during an outage."""
        job.fault = kind
        self.stats.faults[kind] += 1
        if kind == "refused":
            self._leave(job, None)
            job.link.reset()
        elif reply := OUTAGES[kind]:
            self._leave(job, reply)

    def _replica(self, link: Any) -> int:
        """Return the number of the replica that a connection leads to, drawn at random."""
        known, options = self._replica_of, self.options
        if link not in known:
            self._drawn += 1
            known[link] = int(draw(b"%d connection %d" % (options.seed, self._drawn)) * (options.replicas or 1))
        return known[link]

    def _sicken(self, job: Job) -> None:
        """Answer a request that reaches a sick replica with its error, or never."""
        job.fault = "sick"
        self.stats.faults["sick"] += 1
        if self._sick.status:
            self._leave(job, error(self._sick.status, CRASHED, "server_error"))

    def _treat(self, job: Job, raw: bytes) -> None:
        """Check a request against the limits, draw its fault and latency, and start to work on it."""
        try:
            self._check_head(job.head)
            job.ask = Ask(job.head.path, raw)
            self._admit(job.ask)
            job.fault, job.latency = self.draw_fate(job.ask)
        except Refusal as refusal:
            self._leave(job, refusal.reply)
        except RecursionError:
            self._leave(job, error(400, "The JSON body of your request is nested too deep."))
        else:
            self._granted += not job.fault
            if self.options.gateway_timeout:
                job.patience = self._loop.call_later(self.options.gateway_timeout, self._late, self._give_up, job)
            self._begin(job)

    def _give_up(self, job: Job) -> None:
        """Answer 504, as a gateway after its time-out."""
        if self.outage == "silent":
            return
        self.stats.faults["504"] += 1
        self._leave(job, html(504))

    def _serve_more(self, job: Job, raw: bytes) -> bool:
        """Answer a request for the models, files or batches; return whether it is one."""
        head = job.head
        if (head.method, head.path) == ("GET", "/v1/models"):
            job.link.send(self._dress(self._models(head), 0.0))
        elif head.path.startswith(("/v1/files", "/v1/batches")):
            self._serve_batches(job, raw)
        else:
            return False
        return True

    def _send_stats(self, job: Job) -> None:
        self._batches.settle()
        shown = {name: value for name, value in vars(self.stats).items() if name[0] != "_"}
        job.link.send(Reply(200, encode_json(shown)))

    def _serve_batches(self, job: Job, raw: bytes) -> None:
        slow = self.options.latency
        try:
            self._check_key(job.head)
            reply = self._batches.answer(job.head, raw)
        except Refusal as refusal:
            reply = refusal.reply
        except RecursionError:
            reply = error(400, "The JSON body of your request is nested too deep.")
        if job.head.method == "GET" and job.head.path.startswith("/v1/batches/"):
            slow += self.options.batch_fault.get("poll-slow", 0)
        if slow:
            job.timer = self._loop.call_later(slow, self._late, self._send, job, reply)
        else:
            self._send(job, reply)

    def _send(self, job: Job, reply: Reply | None) -> None:
        if reply:
            job.link.send(self._dress(reply, self.clock() - job.started))
        else:
            job.link.reset()

    def _late(self, answer: Callable[..., None], job: Job, *reply: Reply | None) -> None:
        answer(job, *reply)
        job.link.advance()

    def refuse(self, job: Job, reply: Reply) -> None:
        """Answer a request that could not be parsed."""
        self.stats.enter(job.started)
        job.counted = True
        self._leave(job, reply)

    def drop(self, job: Job) -> None:
        """Forget a request whose client has gone."""
        if job.counted:
            self._leave(job, None)
        elif job.timer:
            job.timer.cancel()

    def _check_head(self, head: Head) -> None:
        right = "GET" if head.path == "/v1/models" else "POST"
        if head.path not in ENDPOINTS and right == "POST":
            raise Refusal(404, f"Invalid URL ({head.method} {head.path.removeprefix(NOWHERE)})")
        if head.method != right:
            raise Refusal(405, f"Not allowed to {head.method} on {head.path}.", headers=f"allow: {right}\r\n")
        self._check_key(head)

    def _check_key(self, head: Head) -> None:
        key = self.options.require_key
        if key is not None and head.authorization != f"Bearer {key}":
            raise Refusal(401, "Incorrect API key provided.", code="invalid_api_key")

    def _admit(self, ask: Ask) -> None:
        """Admit a request. Raises Refusal if its model is unknown or a limit is exceeded."""
        options = self.options
        if options.models and ask.model not in options.models:
            raise Refusal(404, f"The model `{ask.model}` does not exist or you do not have access to it.",
                          code="model_not_found")
        self.stats.rejected += 1  # undone below if it passes
        if options.quota is not None and self._granted >= options.quota:
            raise Refusal(429, "You exceeded your current quota, please check your plan and billing details.",
                          "insufficient_quota", code="insufficient_quota")
        if options.max_in_flight is not None and self.stats.in_flight > options.max_in_flight:
            raise rejection(options, "Too many requests at once. Please try again later.")
        self._charge([(limit, ask.cost() if limit.name == "tokens" else 1) for limit in self._limits], ask.model)
        self.stats.rejected -= 1

    def _charge(self, costs: list[tuple[Limit, int]], model: str) -> None:
        """Take the costs from all limits, or from none. Raises Refusal by the limit that resets last."""
        refused = [(limit.wait(cost), limit, cost) for limit, cost in costs
                   if cost > limit.limit or limit.wait(cost)]
        if not refused:
            for limit, cost in costs:
                limit.take(cost)
            return
        _, limit, cost = max(refused, key=lambda item: (item[2] > item[1].limit, item[0]))
        refusal = limit.refusal(model, cost, hints=not self.options.no_limit_headers)
        if self.options.count_rejected:
            for limit, cost in costs:
                limit.drain(cost)
        raise refusal

    def draw_fate(self, ask: Ask) -> tuple[str, float]:
        if not (self.options.sigma or self.options.fault or self.options.stragglers):
            return "", self.options.latency
        body = canonical(ask.body)
        key = blake2b(body, digest_size=8).digest()
        self._seen[key] += 1
        kind, latency = fate(self.options, body, self._seen[key] - 1)
        first = ask.schema is not None and self._seen[key] == 1 and not ask.again
        return kind if kind != "schema" or first else "", latency

    def _begin(self, job: Job) -> None:
        if self._keep_alive and job.latency > self._keep_alive and job.fault != "hang" and not job.head.old:
            job.blank = self._loop.call_later(self._keep_alive, self._send_blank, job)
        if job.fault == "hang":
            self.stats.faults["hang"] += 1
        elif not job.latency:
            self._finish(job)
        elif self.options.knee and len(self._working) >= self.options.knee:
            self._queue.append(job)
        else:
            self._working.add(job)
            slowness = SLOW_FACTOR if self.outage == "slow" else 1.0
            job.timer = self._loop.call_later(job.latency * slowness, self._late, self._finish, job)

    def _send_blank(self, job: Job) -> None:
        """Send a blank line, or a comment in a stream, while a call is worked on."""
        assert self._keep_alive
        if not job.left and self.outage != "silent":
            streamed = job.ask is not None and job.ask.stream
            job.link.send_blank(comment_of(self.options.dialect) if streamed else "")
            job.blank = self._loop.call_later(self._keep_alive, self._send_blank, job)

    def _finish(self, job: Job) -> None:
        """Send the answer that is due, unless the client has gone or an outage has begun."""
        self._stop_work(job)
        if job.left:
            self.stats.unheard += 1
            return
        ill = self.outage
        if ill in ("silent", "502-page"):
            self.stats.faults[ill] += 1
            if reply := OUTAGES[ill]:
                self._leave(job, reply)
            return
        if job.fault:
            self.stats.faults[job.fault] += 1
        else:
            self.stats.answered += 1
        assert job.ask
        own = self._dialect.fault(job.fault, job.ask)
        self._leave(job, own or READY_MADE.get(job.fault) or answer(job.ask, job.fault, self._dialect))

    def _models(self, head: Head) -> Reply:
        try:
            self._check_head(head)
        except Refusal as refusal:
            return refusal.reply
        names = self.options.models or ("gpt-6-luna", "text-embedding-3-small")
        return Reply(200, encode_json({"object": "list", "data": [
            {"id": name, "object": "model", "created": 0, "owned_by": "stand-in",
             "shutdown_date": self.options.shutdown} for name in names]}))

    def _stop_work(self, job: Job) -> None:
        """Remove a request from the work or from the queue, and start the next one in the queue."""
        if job in self._working:
            assert job.timer
            job.timer.cancel()
            self._working.remove(job)
            if self._queue:
                self._begin(self._queue.popleft())
        elif self._queue:
            with suppress(ValueError):
                self._queue.remove(job)

    def _leave(self, job: Job, reply: Reply | None) -> None:
        """Count a request as finished, and send the reply if its client is still connected."""
        now = self.clock()
        self.stats.leave(job.started, now)
        job.left = True
        for timer in filter(None, (job.patience, job.blank)):
            timer.cancel()
        if not self.options.work_on:
            self._stop_work(job)
        if job.fault == "reset":
            job.link.reset()
        elif reply:
            if self._dialect.shape:
                model = job.ask.model if job.ask else ""
                reply = self._dialect.reword(reply, job.head.method, job.head.path, model)
            self.stats.by_status[reply.status] += 1
            job.link.send(self._dress(reply, now - job.started), cut=job.fault == "truncated")

    def _dress(self, reply: Reply, took: float) -> Reply:
        """Add the API's headers, which the error page of a proxy lacks."""
        if reply.content_type not in ("application/json", STREAM):
            return reply
        limits = "" if self.options.no_limit_headers else "".join(limit.headers() for limit in self._limits)
        limits = self._dialect.dress(limits)
        return reply._replace(headers=(
            f"{reply.headers}x-request-id: req_{next(SERIAL)}\r\nopenai-processing-ms: {milliseconds(took)}\r\n"
            f"openai-version: 2020-10-01\r\n{limits}"))


@asynccontextmanager
async def serve(options: Options | None = None, *, clock: Callable[[], float] = time.monotonic,
                **settings: Any) -> AsyncIterator[Server]:
    """Serve in this event loop while the block runs; `settings` are fields of Options that override `options`."""
    server = Server(replace(options or Options(), **settings), clock)
    await server.start()
    try:
        yield server
    finally:
        await server.close()


# --- Command line -------------------------------------------------------------------------------------------


def number_in_seconds(text: str) -> tuple[int, float]:
    number, _, seconds = text.partition("/")
    return int(number), float(seconds)


def fault_share(text: str) -> tuple[str, float]:
    kind, _, share = text.partition("=")
    return kind, 1.0 if text in BATCH_FAULTS else float(share)


READERS: dict[str, Callable[[str], Any]] = {
    "int": int, "int | None": int, "float": float, "str": str, "str | None": str,
    "float | None": float, "tuple[str, ...]": lambda text: tuple(text.split(",")), "Mapping[str, float]": fault_share,
    "tuple[int, float] | None": number_in_seconds,
}


def make_parser() -> argparse.ArgumentParser:
    """Make a parser with a flag for each field of Options; its help is the manual above."""
    parser = argparse.ArgumentParser("stand_in", usage=argparse.SUPPRESS, description=__doc__, add_help=False,
                                     allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    parser.add_argument("--exit-on-eof", action="store_true", help=argparse.SUPPRESS)
    for item in fields(Options):
        how: dict[str, Any] = {"type": READERS.get(str(item.type)), "default": item.default}
        if item.type == "bool":
            how = {"action": "store_true"}
        elif item.name in ("fault", "batch_fault"):
            how |= {"action": "append", "default": []}
        elif item.type == "tuple[str, ...]":
            how |= {"action": "extend", "default": []}
        parser.add_argument(f"--{item.name.replace('_', '-')}", help=argparse.SUPPRESS, **how)
    parser.set_defaults(port=8000)
    return parser


def allow_many_connections() -> None:
    """Raise the limit of open files (256 on macOS) to 10,240, or to the hard limit."""
    if sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = 10_240 if hard == resource.RLIM_INFINITY else min(hard, 10_240)
        if soft != resource.RLIM_INFINITY and soft < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def await_eof(tell: Callable[[], None]) -> None:
    # Not sys.stdin.read(): the interpreter cannot exit while a thread holds its lock.
    with suppress(OSError, ValueError):
        while sys.stdin and os.read(sys.stdin.fileno(), 4096):
            pass
    tell()


async def serve_until_told(options: Options, exit_on_eof: bool) -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def tell(*_: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server has stopped already
            loop.call_soon_threadsafe(stop.set)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, tell)  # on Windows too, where there is no loop.add_signal_handler
    async with serve(options) as server:
        print(f"stand-in server at {server.url}", flush=True)
        if exit_on_eof:
            threading.Thread(target=await_eof, args=(tell,), daemon=True).start()
        await stop.wait()
    print(server.stats, file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Serve until a signal or, with --exit-on-eof, the end of standard input; return the exit status."""
    parser = make_parser()
    settings = vars(parser.parse_args(argv))
    exit_on_eof = settings.pop("exit_on_eof")
    settings |= {name: dict(settings[name]) for name in ("fault", "batch_fault")}
    settings |= {name: tuple(value) for name, value in settings.items() if isinstance(value, list)}
    try:
        options = Options(**settings)
    except ValueError as problem:
        parser.error(str(problem))
    allow_many_connections()
    try:
        asyncio.run(serve_until_told(options, exit_on_eof))
    except (OSError, OverflowError) as problem:
        print(f"stand_in: cannot serve at {options.host}:{options.port}: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
