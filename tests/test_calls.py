"""How many calls of our own functions an answered prompt takes: speed that is lost shows here, on whatever machine.

What Python's own modules and other libraries do is not counted: it depends on what is installed. With uvloop and orjson
there are hardly any for `stdlib`.
"""

import pathlib
import sys

import pytest

import concurrent_prompts
from concurrent_prompts import main

ROOT = pathlib.Path(concurrent_prompts.__file__).parent
OURS = concurrent_prompts.__file__, str(ROOT / "backends"), str(ROOT / "extras")
MOST = {"stdlib": 79, "raw-aiohttp": 67, "openai-sdk": 75}
WRAPPED = {"budget": ["--max-cost=1", "-p", "max_completion_tokens=9"], "schema": ["--schema=schema.json"]}
MORE = {"budget": 72, "schema": 12}


@pytest.fixture(autouse=True)
def no_looks(monkeypatch):
    """Leave out what is done every 10 ms: how often that is for a prompt depends on the machine."""
    monkeypatch.setattr(concurrent_prompts.best("rejections", concurrent_prompts.Limiter), "LOOK_EVERY", 3600.0)


def calls_of(url, backend, count, *options):
    """Return how many calls a run of so many prompts takes in this thread."""
    path, calls = pathlib.Path(f"{count}.jsonl"), [0]
    path.write_text("".join(f'{{"prompt": "Why is the sky blue, {number}?"}}\n' for number in range(count)))

    def note(frame, event, argument):
        calls[0] += event == "call" and frame.f_code.co_filename.startswith(OURS)

    sys.setprofile(note)
    try:
        assert main([str(path), "-b", backend, "--base-url", url, "-c", "8", "-q", "--overwrite", *options]) == 0
    finally:
        sys.setprofile(None)
    return calls[0]


def calls_a_prompt(server, backend, *options):
    calls_of(server.url, backend, 20, *options)  # what is loaded and cached
    few, many = (calls_of(server.url, backend, count, *options) for count in (40, 140))
    return (many - few) / 100


@pytest.mark.parametrize("backend", MOST)
def test_an_answered_prompt(here, stand_in, backend):
    if backend != "stdlib":
        pytest.importorskip("aiohttp" if backend == "raw-aiohttp" else "openai")
    assert calls_a_prompt(stand_in(latency=0.0, sigma=0.0), backend) <= MOST[backend]


@pytest.mark.parametrize("extra", WRAPPED)
def test_a_prompt_with_an_extra_that_wraps_the_attempt(here, stand_in, extra):
    if extra == "schema":
        pytest.importorskip("jsonschema")
    (here / "schema.json").write_text("{}")
    server = stand_in(latency=0.0, sigma=0.0)
    assert calls_a_prompt(server, "stdlib", *WRAPPED[extra]) <= MOST["stdlib"] + MORE[extra]
