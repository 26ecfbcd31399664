"""What the tests of several extras share."""

import sys
import types

import pytest

import concurrent_prompts
from concurrent_prompts import main
from tests.helpers import connector


@pytest.fixture
def prompts(tmp_path):
    """Return the name of a file of thirty prompts."""
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"Question {number}?\n" for number in range(30)))
    return str(path)


@pytest.fixture
def backend(monkeypatch):
    """Return a function that makes `-b package:name` of what answers."""
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")

    def install(answer):
        module = types.ModuleType("money_backend")
        module.connect = connector(answer)
        monkeypatch.setitem(sys.modules, "money_backend", module)
        return ["-b", "money_backend:connect"]

    return install


@pytest.fixture
def ten(tmp_path, monkeypatch):
    """An empty working directory with a file of ten prompts, p.txt; no waiting between attempts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(concurrent_prompts, "BACKOFF_BASE", 0.001)
    (tmp_path / "p.txt").write_text("".join(f"What is {number}?\n" for number in range(10)))
    return tmp_path


@pytest.fixture
def answer(here, stand_in):
    """Return a function that runs the command line against a stand-in server and returns the exit status."""
    server = stand_in()

    def run(*arguments):
        return main([*arguments, "-q", "--base-url", server.url])

    run.server = server
    return run
