"""A server that costs next to nothing: every POST gets the same chat completion, over kept-alive HTTP/1.1.

    python -m benchmarks.server [--latency SECONDS] [--tail SEED] [--tls PEM]

Prints its port; for every line on its standard input, what it has seen since the last one, as JSON; and ends with it.
If the line is a number, of calls in flight, that includes the gaps: how long a slot was empty between the answer that
freed it and the next request. With --latency the first answers of the connections are spread over as long again, or
all would come at once. With --tail the latencies are heavy-tailed, each settled by the seed and the prompt. Times are
of the monotonic clock, which all processes share. uvloop is used where it is installed: it is not the server that is to
be measured.
"""

import argparse
import asyncio
import json
import ssl
import sys
import time
import zlib
from array import array
from itertools import islice
from typing import Any

from concurrent_prompts import run_loop

MESSAGE = {"role": "assistant", "content": "Air scatters short waves of light more than long ones. " * 2}
ANSWER = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1700000000,
    "model": "m",
    "choices": [{"index": 0, "message": MESSAGE, "finish_reason": "stop", "logprobs": None}],
    "usage": {"prompt_tokens": 12, "completion_tokens": 24, "total_tokens": 36},
    "system_fingerprint": None,
}
BODY = json.dumps(ANSWER).encode()
# As many as OpenAI's API sends (https://platform.openai.com/docs/api-reference/debugging-requests)
HEADERS = f"""\
HTTP/1.1 200 OK
Date: Sun, 29 Nov 2026 08:00:00 GMT
Content-Type: application/json
Content-Length: {len(BODY)}
Connection: keep-alive
access-control-expose-headers: X-Request-ID
openai-organization: org-1
openai-processing-ms: 321
openai-version: 2020-10-01
x-ratelimit-limit-requests: 10000000
x-ratelimit-limit-tokens: 2000000000
x-ratelimit-remaining-requests: 9999999
x-ratelimit-remaining-tokens: 1999999000
x-ratelimit-reset-requests: 1ms
x-ratelimit-reset-tokens: 1ms
x-request-id: req_0123456789abcdef0123456789abcdef

"""
REPLY = HEADERS.replace("\n", "\r\n").encode() + BODY
GOLDEN = 0.6180339887  # its multiples are spread evenly between the whole numbers
SHORTEST, SHAPE, LONGEST = 0.005, 1.5, 0.25  # of the heavy tail: a Pareto distribution, cut off
NOTHING = {"connections": 0, "answers": 0, "connected": 0.0, "asked": 0.0, "answered": 0.0}
seen: dict[str, float] = dict(NOTHING)
arrivals, departures = array("d"), array("d")  # of all requests and answers, where there is a latency


def tail(seed: int, body: bytes) -> float:
    """Return the latency of the prompt in this body, "prompt N: ...", whatever else stands there."""
    begin = body.find(b"prompt ")
    share = zlib.crc32(body[begin : body.find(b":", begin)], seed) / 2**32
    latency: float = SHORTEST * (1 - share) ** (-1 / SHAPE)
    return min(LONGEST, latency)


def gaps(slots: int) -> dict[str, float]:
    """Return the median and the 99th percentile of the seconds for which a slot was empty.

    With N slots the request number N + i can only be sent once i answers have come.
    """
    waits = sorted(then - freed for freed, then in zip(departures, islice(arrivals, slots, None), strict=False))
    return {"median": waits[len(waits) // 2], "p99": waits[len(waits) * 99 // 100]} if waits else {}


class Connection(asyncio.Protocol):
    """One connection; requests come one after the other, as no client here pipelines."""

    def __init__(self, latency: float, seed: int | None) -> None:
        self.latency, self.seed, self.got = latency, seed, b""
        self.later = asyncio.get_running_loop().call_later

    def connection_made(self, transport: Any) -> None:  # uvloop's is not an asyncio.Transport
        self.transport = transport
        self.offset = self.latency * (seen["connections"] * GOLDEN % 1)
        seen["connections"] += 1
        seen["connected"] = seen["connected"] or time.monotonic()

    def data_received(self, data: bytes) -> None:
        self.got = data = self.got + data if self.got else data
        end = data.find(b"\r\n\r\n") + 4
        if end < 4:
            return
        if data.startswith(b"GET"):  # the list of models, which is no work to be measured
            self.got = b""
            self.transport.write(REPLY)
            return
        at = data.lower().index(b"content-length:", 0, end) + 15
        if len(data) < end + int(data[at : data.index(b"\r", at)]):
            return
        self.got = b""
        seen["asked"] = seen["asked"] or time.monotonic()
        if self.latency:
            arrivals.append(time.monotonic())
        if latency := self.latency if self.seed is None else tail(self.seed, data):
            self.later(latency + self.offset, self.answer)
            self.offset = 0.0
        else:
            self.answer()

    def answer(self) -> None:
        if self.transport.is_closing():
            return  # a client that stops by the clock has calls in flight at its end
        self.transport.write(REPLY)
        seen["answers"] += 1
        seen["answered"] = now = time.monotonic()
        if self.latency:
            departures.append(now)


async def serve(latency: float, seed: int | None, pem: str | None) -> None:
    """Serve until standard input ends."""
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH) if pem else None
    if tls and pem:
        tls.minimum_version = ssl.TLSVersion.TLSv1_3
        tls.load_cert_chain(pem)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(latency, seed), "127.0.0.1", 0, backlog=4096, ssl=tls)
    print(server.sockets[0].getsockname()[1], flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(seen | (gaps(int(line)) if line.strip() else {})), flush=True)
        seen.update(NOTHING)
        del arrivals[:], departures[:]
    server.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--latency", type=float, default=0)
    parser.add_argument("--tail", type=int)
    parser.add_argument("--tls")
    options = parser.parse_args()
    run_loop(serve(options.latency, options.tail, options.tls))
