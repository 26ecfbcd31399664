"""What the tests share: a clean environment, the stand-in server, and a mend for aioresponses."""

import contextlib
import functools
import inspect
import json
import os
import subprocess
import sys
import types

import pytest

import concurrent_prompts
from tests.helpers import VARIABLES, in_thread

TRAP = "with open({place!r}, 'a') as file:\n    file.write({name!r} + chr(10))\n"
OPTIONAL = "aiohttp dask distributed distro httpx2 jsonschema matplotlib openai orjson tiktoken tqdm uvloop"

# Compile a file once, not in each process that a test starts, and not in each run of the tests.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Keep the developer's own keys and proxies out of the tests, and do not wait for the disk: no power fails here."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    for name in VARIABLES.split():
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True, scope="session")
def mended_aioresponses():
    """Let aioresponses 0.7.9 make responses for aiohttp >= 3.14, where `stream_writer` became a required argument.

    To be deleted when a release of aioresponses passes it.
    """
    try:
        import aiohttp
    except ImportError:
        yield
        return
    original = aiohttp.ClientResponse.__init__
    if "stream_writer" in inspect.signature(original).parameters:

        @functools.wraps(original)
        def init(self, *args, stream_writer=None, **kwargs):
            stream_writer = stream_writer or types.SimpleNamespace(output_size=0)
            original(self, *args, stream_writer=stream_writer, **kwargs)

        aiohttp.ClientResponse.__init__ = init
    yield
    aiohttp.ClientResponse.__init__ = original


@pytest.fixture(params=["as installed", "json alone"])
def codec(request, monkeypatch):
    """Do without orjson, too: what is read and written must be the same."""
    if request.param == "json alone":
        monkeypatch.setattr(concurrent_prompts, "dump", lambda value: concurrent_prompts.encode_json(value).encode())
        monkeypatch.setattr(concurrent_prompts, "load", json.loads)


@pytest.fixture
def alone(monkeypatch):
    """Do without extras/, as a lone copy does."""
    found = concurrent_prompts.sibling

    def missing(folder, name, asked=""):
        if folder == "extras":
            raise concurrent_prompts.UsageError(f"{asked} needs extras/{name}.py, which goes beside it")
        return found(folder, name, asked)

    monkeypatch.setattr(concurrent_prompts, "sibling", missing)
    concurrent_prompts.meanings.cache_clear()
    yield
    concurrent_prompts.meanings.cache_clear()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory with a file of three prompts; no waiting between attempts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(concurrent_prompts, "BACKOFF_BASE", 0.001)
    (tmp_path / "prompts.txt").write_text("What is one?\nWhat is two?\nWhat is three?\n")
    return tmp_path


@pytest.fixture
def read(tmp_path):
    """Return a function that writes a file and reads it as prompts, a table or a gzip file where extras/ is there."""

    def read(name, content):
        if ".csv" in name.lower() or ".tsv" in name.lower():
            pytest.importorskip("concurrent_prompts.extras.table")
        content = content if isinstance(content, bytes) else content.encode()
        if content.startswith(b"\x1f\x8b"):
            pytest.importorskip("concurrent_prompts.extras.inputs")
        path = tmp_path / name
        path.write_bytes(content)
        return list(concurrent_prompts.read_prompts(path))

    return read


@pytest.fixture
def stand_in():
    """Return a function that starts a stand-in server in a thread, for tests of what brings its own event loop."""
    pytest.importorskip("concurrent_prompts.extras.stand_in")
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(in_thread(options))


@pytest.fixture(scope="session")
def set_traps(tmp_path_factory):
    """Return a function that fills a folder with modules that note when they are imported; it returns their note."""
    empty = tmp_path_factory.mktemp("empty")
    (empty / "nothing_else.py").write_text("import sys\nprint(*sys.modules)\n")
    loads = [sys.executable, "-m", "nothing_else"]  # what Python itself imports before it looks at the module
    before = subprocess.run(loads, cwd=empty, capture_output=True, text=True, check=True).stdout.split()

    def fill(folder):
        note = str(folder / "sprung")
        for name in {*sys.stdlib_module_names, *OPTIONAL.split()} - set(before):
            (folder / f"{name}.py").write_text(TRAP.format(place=note, name=name))
        for name in ("__init__", "stdlib", "raw_aiohttp", "plot", "stand_in", "prices"):
            for package in ("backends", "extras"):
                (folder / package).mkdir(exist_ok=True)
                (folder / package / f"{name}.py").write_text(TRAP.format(place=note, name=f"{package}.{name}"))
        return folder / "sprung"

    return fill
