"""Connecting to a Dask cluster, or starting one on this machine: what only the driver of `dask-cluster` needs.

A local cluster listens on the loopback address alone and talks over TLS, with credentials that live as long as the run.
Its processes start without the key and ignore Ctrl-C, which the driver passes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.metadata
import logging
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from multiprocessing import resource_tracker
from typing import Any
from urllib.parse import urlsplit

import dask.config
import distributed

from . import reach_of
from .keys import PublicEnvironment, secret_variables

SILENT = logging.CRITICAL + 1
CONNECTING = 5.0  # seconds in which a scheduler has to answer
QUIET = "distributed", "distributed.client", "distributed.gc", "bokeh", "tornado", "tornado.application"


def check_network(job: Any, address: str) -> None:
    """Warn if the key would cross a private network unencrypted. Raises ValueError if the network is public."""
    parts = urlsplit(address if "://" in address else f"tcp://{address}")
    reach = reach_of(parts.hostname or "")
    if parts.scheme in ("tls", "wss") or reach == "loopback" or not job.api.secrets:
        return
    if reach == "public" and not job.api.allow_http:
        advice = "use tls:// addresses for the cluster, or --allow-http if you trust the network"
        raise ValueError(f"the key would go to {parts.hostname} unencrypted; {advice}")
    text = f"the key goes to {parts.hostname} unencrypted; a cluster with tls:// addresses is safer"
    if text not in WARNED:
        WARNED.add(text)
        job.log.warning(text)


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Keep Dask's logs and warnings from standard error, unless the user has configured its logging."""
    handlers = {handler: handler.level for name in QUIET for handler in logging.getLogger(name).handlers}
    if dask.config.get("logging", None) or dask.config.get("distributed.logging", None):
        handlers = {}
    for handler in handlers:
        handler.setLevel(SILENT)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for handler, level in handlers.items():
            handler.setLevel(level)


def report_others(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Report unhandled exceptions, but not those of Dask's connections, which end with the cluster."""
    if type(context.get("exception")).__module__.partition(".")[0] not in ("distributed", "tornado"):
        loop.default_exception_handler(context)


@contextlib.contextmanager
def deaf() -> Iterator[None]:
    """Start processes that ignore Ctrl-C, which a terminal sends to all processes at once."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # started later, it would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def nameless() -> Iterator[None]:
    """Hide the main module's file: each new process would import it and run the user's script."""
    main = sys.modules["__main__"]
    kept = {name: getattr(main, name) for name in ("__file__", "__spec__") if hasattr(main, name)}
    main.__dict__.pop("__file__", None)
    main.__spec__ = None
    try:
        yield
    finally:
        vars(main).update(kept)


WARNED: set[str] = set()  # each warning is given once
LOCAL = {  # Dask's configuration, without the parts that a local cluster does not need
    "distributed.scheduler.http.routes": [],
    "distributed.worker.http.routes": [],
    "distributed.scheduler.active-memory-manager.start": False,
    "distributed.worker.profile.enabled": False,
}


@contextlib.asynccontextmanager
async def connected(job: Any) -> AsyncIterator[tuple[Any, str, dict[str, str] | None]]:
    """Yield a client, the scheduler's address, and the proxies that our workers lack (None for other workers)."""
    address, proxies = job.options["cluster"], None
    client_of: Any = distributed.Client
    settings: dict[str, Any] = {"asynchronous": True, "set_as_default": False, "name": "concurrent_prompts"}
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(hushed())
        loop = asyncio.get_running_loop()
        stack.callback(loop.set_exception_handler, loop.get_exception_handler())
        loop.set_exception_handler(report_others)
        if address is None or address.isdecimal():
            secret = secret_variables()
            proxies = {name: os.environ[name] for name in secret if name.lower().endswith("_proxy")}
            settings["security"] = credentials()
            stack.enter_context(nameless())
            # Others may write in the usual place for workers' files, and Dask would import modules from there.
            folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            environment = clean_environment(job)
            with environment(), deaf(), dask.config.set(LOCAL | {"temporary-directory": folder}):
                count = int(address) if address else cores()
                address = await stack.enter_async_context(local_cluster(count, settings["security"], environment))
        else:
            check_network(job, address)
        job.say(f"connecting to the scheduler at {getattr(address, 'scheduler_address', address)}")
        client = client_of(address, timeout=CONNECTING, **settings)
        try:
            await stack.enter_async_context(client)
        except Exception as failure:
            client.status = "closed"  # else it would close itself after the loop has ended
            if isinstance(failure, ValueError):
                raise ValueError(f"--cluster {address}: {failure}") from None
            version = importlib.metadata.version("distributed")
            what = f"distributed {version} does not understand what answers there ({type(failure).__name__})"
            cause = str(failure) if isinstance(failure, OSError) else what
            raise ConnectionError(f"no scheduler answers at {address}: {cause}") from None
        yield client, client.scheduler.address, proxies


def credentials() -> Any:
    """Return a new certificate and private key, which are written to no file."""
    try:
        return distributed.Security.temporary()  # type: ignore[no-untyped-call]
    except ImportError:
        raise ValueError("a cluster on this machine needs cryptography: pip install cryptography") from None


def clean_environment(job: Any) -> Callable[[], Any]:
    """Return a function that makes a context in which new processes inherit no secret and no import path."""
    return functools.partial(PublicEnvironment, job.api.key_variable, PYTHONSAFEPATH="1")


def local_cluster(count: int, security: Any, environment: Callable[[], Any]) -> Any:
    """Return a cluster of so many processes on this machine.

    It listens on the loopback address alone and accepts only clients that have the credentials. Dask insists on HTTP
    servers; they have no routes.
    """
    if count < 1:
        raise ValueError("--cluster 0: give the address of a scheduler, or a number of processes above 0")

    class Nanny(distributed.Nanny):
        async def instantiate(self) -> Any:
            """Start the worker, also when one has died."""
            with environment():
                return await super().instantiate()

    return distributed.LocalCluster(  # type: ignore[no-untyped-call]
        n_workers=count,
        worker_class=Nanny,
        security=security,
        threads_per_worker=1,
        host="127.0.0.1",
        dashboard_address=None,
        scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},
        memory_limit=0,
        silence_logs=SILENT,
        asynchronous=True,
    )


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
