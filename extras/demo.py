"""--demo: use the built-in stand-in server, with no key and no network.

Without PROMPTS it sends 15 questions of its own; the answers to a file's prompts go to PROMPTS.demo.results.jsonl.
With --dialect groq (openrouter, azure, ...) the server imitates that provider.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from . import core

DEMO_PROMPTS = [f"What is {thing}?" for thing in (
    "a coroutine", "an event loop", "a semaphore", "back-pressure", "latency", "throughput", "a rate limit", "jitter",
    "a deadline", "a connection pool", "keep-alive", "a token bucket", "a journal", "a straggler", "Little's law",
)]  # fmt: skip
DEMO_SERVER = ("--port", "0", "--latency", "0.4", "--sigma", "0.3", "--exit-on-eof")


RUN = """
import runpy, sys
sys.path.insert(0, sys.argv.pop(1))
runpy.run_module("extras.stand_in", run_name="__main__", alter_sys=True)
"""


def add_arguments(option: Callable[..., Any]) -> None:
    """Add the flags."""
    option("--demo", action="store_true", help="use the built-in stand-in server: no key, no network")
    option("--dialect", metavar="NAME", help="the provider that the server of --demo imitates: openrouter, groq, ...")


def create(args: argparse.Namespace) -> Demo | None:
    """Return the extra, or None without --demo. Raises UsageError for an unknown dialect."""
    if args.dialect is not None:
        known = core.sibling("extras", "stand_in_dialects", "--dialect").DIALECTS
        if args.dialect not in known:
            raise core.UsageError(f"--dialect {core.short(args.dialect, 40)} is unknown; choose {', '.join(known)}")
        if not args.demo:
            raise core.UsageError("--dialect is for the server of --demo; add --demo")
    return Demo(args) if args.demo else None


class Demo:
    """The stand-in server in a process of its own, for one command."""

    def __init__(self, args: argparse.Namespace) -> None:
        if args.prompts is None:
            folder = args.stack.enter_context(tempfile.TemporaryDirectory())
            args.prompts, args.name = os.path.join(folder, "demo.txt"), "the demo"
            pathlib.Path(args.prompts).write_text("\n".join(DEMO_PROMPTS))
        elif args.given_output is None and args.output != "-":  # lest made-up answers pass for real ones
            args.output = args.output.removesuffix(".results.jsonl") + ".demo.results.jsonl"
        args.model = args.model or "made-up"
        self._args = args

    def command(self) -> None:
        """Start the server and set the arguments to its address; a dry run needs no server."""
        args = self._args
        key, args.base_url, args.api_key_env = args.api_key_env, "http://127.0.0.1:8000/v1", ""
        if not getattr(args, "dry_run", False):
            args.base_url = args.stack.enter_context(demo_server(key, args.dialect or "openai"))


@contextmanager
def demo_server(key: str, dialect: str) -> Iterator[str]:
    """Run the stand-in server in that dialect, without the environment variable `key`; yield its base URL.

    Raises UsageError if it does not start.
    """
    folder = str(pathlib.Path(__file__).resolve().parent.parent)
    command = [sys.executable, "-P", "-c", RUN, folder, *DEMO_SERVER, "--dialect", dialect]
    options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    # Out of reach of a Ctrl-C, so that the calls in flight can finish; the flag is for Windows.
    options |= {"start_new_session": True, "creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
    public = core.sibling("backends", "keys").PublicEnvironment(key)
    with public, subprocess.Popen(command, text=True, **options) as server:
        try:
            ready = server.stdout.readline() if server.stdout else ""
            if not ready:
                raise core.UsageError("the stand-in server, extras/stand_in*.py, did not start")
            yield ready.split()[-1]
        finally:
            server.terminate()
