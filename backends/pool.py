"""What a backend knows of the kept-alive connections of one server or proxy: whether the next request may use one."""

import asyncio

__all__ = ["Reuse"]


class Reuse:
    """Decide whether answered connections are kept for the next request.

    A stale connection is one that had answered before and ended before the first byte of its next reply, since its
    other side had closed it meanwhile. The backend sends that request again on a fresh connection, at once and once
    (RFC 9112, 9.3.1), which costs the prompt no attempt. A server that does so often, or a proxy that closes after
    every reply without `Connection: close`, is given no reused connections for a pause, which doubles each time.

    `allowed` and `score` are plain attributes, since every request looks at them.
    """

    STALE = 4  # what a stale connection adds to the score; each reuse that was answered takes 1 away
    MOST = 12  # the score at which reuse pauses: three stale ones in a row
    UNTRIED = 8  # the score of a server of which nothing is known: the first stale one pauses reuse
    SHORTEST, LONGEST = 10.0, 160.0  # seconds of a pause

    def __init__(self) -> None:
        self.allowed = True
        self.score = self.UNTRIED
        self._pause = self.SHORTEST

    def on_stale(self) -> None:
        """Count a stale connection. Pause reuse if they are frequent."""
        self.score += self.STALE
        if self.allowed and self.score >= self.MOST:
            self.allowed = False
            asyncio.get_running_loop().call_later(self._pause, self._try_again)
            self._pause = min(self.LONGEST, 2 * self._pause)

    def on_reused(self) -> None:
        """Count an answer on a reused connection; to be called only while there is a score."""
        self.score -= 1
        if not self.score:
            self._pause = self.SHORTEST

    def _try_again(self) -> None:
        self.allowed, self.score = True, self.UNTRIED
