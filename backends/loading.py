"""Which backends there are, how one is found by its name, and what a command makes of its options: an API, a run.

Nothing here is needed where the user's own coroutine function makes the calls.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.util
import inspect
import itertools
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from . import core

BACKENDS = "openai-sdk", "raw-aiohttp", "stdlib", "openai-batch", "dask-cluster"
LIBRARIES = {"openai-sdk": "openai", "raw-aiohttp": "aiohttp", "openai-batch": "openai"}
LIBRARIES["dask-cluster"] = "distributed cryptography"  # as pip takes them
SETTINGS = "model", "system", "template", "params", "endpoint", "base_url", "api_key_env", "allow_http", "form"
ROOT = (__package__ or "").rpartition(".")[0]  # the core's name


# ---- Finding one -----------------------------------------------------------------------------------------------


def load_backend(
    name: str | None = None, *, worker_backend: str | None = None, schema: Any = None, **settings: Any
) -> Any:
    """Return the API behind the backend of that name. Arguments and errors as those of the core's `load_backend`."""
    name = name or default_backend()
    name = name if ":" in name else name.replace("_", "-")
    connect = find_backend(name)
    if schema is not None:
        checker = core.sibling("extras", "schema", "schema").Schema(schema)
        checker.check_options(settings.get("endpoint", "chat"), settings.get("params") or {})
        settings |= {"form": checker.asked, "extras": (checker,)}
    if not inspect.isasyncgenfunction(connect):
        if worker_backend is not None or settings.get("cluster") is not None:
            raise core.UsageError(f"--worker-backend and --cluster are for -b dask-cluster, not for {name}")
        return core.sibling("backends", "api").Api(connect, name=name, **settings)
    try:
        live = find_backend(worker_backend or default_backend())
    except core.UsageError as problem:
        raise core.UsageError(f"--worker-backend: {problem}") from None
    if inspect.isasyncgenfunction(live):
        raise core.UsageError(f"--worker-backend {worker_backend} answers in bulk; name a live one")
    bulk = core.sibling("backends", "bulk")
    return bulk.BulkApi(live, name=name, submit=connect, worker_backend=worker_backend, **settings)


def find_backend(name: str) -> Callable[..., Any]:
    """Return the function that the backend of that name is. Raises UsageError where there is none."""
    module, _, attribute = name.partition(":")
    try:
        if attribute:
            found: Any = functools.reduce(getattr, attribute.split("."), import_named(module))
        else:
            one = importlib.import_module(f"{ROOT}.backends.{name.replace('-', '_')}")
            found = getattr(one, "submit", None) or one.connect
    except ModuleNotFoundError as missing:
        raise core.UsageError(missing_backend(name, missing.name or "")) from None
    except (ImportError, AttributeError, ValueError, TypeError) as failure:
        raise core.UsageError(f"backend {name}: {failure}") from None
    except Exception as failure:  # somebody else's file may raise anything
        raise core.UsageError(f"backend {name}: {core.in_short(failure)}") from None
    if not callable(found):
        raise core.UsageError(f"backend {name} is no function; see the contract in backends/__init__.py")
    return found  # type: ignore[no-any-return]


def import_named(module: str) -> Any:
    """Import a module that the user has named. The current folder is searched too: last, and for nothing else."""
    sys.path.append("")
    try:
        return importlib.import_module(module)
    finally:
        sys.path.reverse()  # it may have been there before, and what is imported may have added more
        sys.path.remove("")
        sys.path.reverse()


def default_backend() -> str:
    """Return the name of the backend that is used where none is asked for."""
    return "raw-aiohttp" if importlib.util.find_spec("aiohttp") else "stdlib"


def missing_backend(name: str, module: str) -> str:
    """Return the sentence that says why a backend cannot be loaded and what to do."""
    if name in BACKENDS and module.startswith(ROOT):
        file = module.removeprefix(f"{ROOT}.").replace(".", "/") + ".py"
        return f"backend {name} needs {file}, which goes beside {core.PROGRAM}"
    if module.startswith(f"{ROOT}.backends."):
        return f"there is no backend {name}; choose {', '.join(BACKENDS)} or package.module:name"
    if name in LIBRARIES:
        return f"backend {name} needs {LIBRARIES[name].replace(' ', ' and ')}: pip install {LIBRARIES[name]}"
    return f"backend {name}: there is no module {module}"


def raised_in(failure: BaseException, args: argparse.Namespace) -> str:
    """Return in which module and function of a third party's extra or backend an exception was raised, or ''."""
    names = [*getattr(args, "extra", ()), *(name for name in (args.backend or "").split(",") if ":" in name)]
    packages = {re.split("[.:]", name)[0] for name in [*names, getattr(args, "worker_backend", None) or ""]}
    frames = [frame for frame, _ in traceback.walk_tb(failure.__traceback__)]
    places = [(str(frame.f_globals.get("__name__")), frame.f_code.co_name) for frame in frames]
    return next((f"{module}, {name}" for module, name in reversed(places) if module.partition(".")[0] in packages), "")


# ---- For a command ---------------------------------------------------------------------------------------------


def prompts_of(args: Any, limit: int | None = None) -> Iterator[core.Prompt]:
    """Yield the first prompts of the file, or those of them that the extras select, numbered from 0.

    Raises core.UsageError where there are none at all.
    """
    prompts = core.read_prompts(args.source, args.name)
    first = list(itertools.islice(prompts, 1))
    if not first:
        raise core.UsageError(f"{args.name} holds no prompts")
    chosen: Iterable[core.Prompt] = itertools.islice(itertools.chain(first, prompts), limit)
    for extra in args.extras:
        if hasattr(extra, "select"):
            chosen = core.extras_folder().selected(extra, chosen)
    for number, prompt in enumerate(chosen):
        prompt.number = number
        yield prompt


def checked(prompts: Iterator[core.Prompt], api: Any) -> Iterator[core.Prompt]:
    """Yield the prepared prompts. Raises core.UsageError where the first cannot be used as asked."""
    first = list(itertools.islice(prompts, 1))  # a shard may have none
    if first and (error := api.prepare(first[0]).error) and error.type == "missing_column":
        raise core.UsageError(error.message)
    return map(api.prepare, itertools.chain(first, prompts))


def make_api(args: argparse.Namespace, backend: str | None, dry: bool = False) -> Any:
    """Return the API that the arguments ask for; without a backend it only makes requests."""
    settings = {name: getattr(args, name) for name in SETTINGS}
    if not backend:
        return core.sibling("backends", "api").Api(lambda *_: None, dry=dry, **settings)
    api = load_backend(backend, dry=dry, **settings, **args.settings)
    if api.loop and not dry:
        api.check_options(args)
    return api


def make_run(args: argparse.Namespace, api: Any, calls: int | str) -> core.Run:
    """Return a run as the arguments ask for, with so many calls in flight."""
    names = ("max_attempts", "timeout", "deadline", "rpm", "tpm", "extras")
    run = core.Run(api, concurrency=calls, **{name: getattr(args, name) for name in names})
    if not api.loop:
        connections = open_files() - 64  # the interpreter and the files need some
        at_most(run, connections)
    return run


def open_files() -> int:
    """Return how many files (each connection is one) may be open, after asking for as many as may be had."""
    if sys.platform == "win32":  # knows no such limit
        return 1 << 20
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return soft if soft != resource.RLIM_INFINITY else 1 << 20


def at_most(run: core.Run, calls: int) -> None:
    """Limit a run's calls in flight to what the system allows; warn if that is less than was asked for."""
    if run.concurrency > max(1, calls):
        run.concurrency = run.limiter.window.ceiling = max(1, calls)
        run.limiter.window.size = min(run.limiter.window.size, run.concurrency)
        text = f"at most {run.concurrency} calls in flight: raise the limit of open files (ulimit -n) for more"
        run.warn_once("files", text)
